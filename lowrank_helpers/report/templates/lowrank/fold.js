const code = [...document.querySelectorAll("details.code")];
const fold = document.getElementById("fold");
fold.addEventListener("click", () => {
  const open = fold.getAttribute("aria-pressed") === "false";
  fold.setAttribute("aria-pressed", open);
  for (const details of code) details.open = open;
});
