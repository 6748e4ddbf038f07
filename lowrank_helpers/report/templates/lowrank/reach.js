// What scrolls sideways must be reachable by keyboard; what does not scroll need not be.
const reach = () => {
  for (const box of document.querySelectorAll(".scroll, .output pre, .output_png")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
};
addEventListener("load", reach);
addEventListener("resize", reach);
document.addEventListener("toggle", reach, true);
