for (const root of document.querySelectorAll(".explorer:empty")) {
  const { layers, digits, labels } = JSON.parse(root.dataset.measured);
  root.innerHTML = `
    <div class="row"><label>layer <select name="layer"></select></label>
      <label>cut by the <select name="cut"></select></label></div>
    <label class="row"><span>rank</span> <input type="range" min="0" step="1"></label>
    <output aria-live="polite"></output>
    <div class="row">
      <figure><svg viewBox="0 0 320 170" role="img"></svg><figcaption>Singular values. Both axes are logarithmic, and the line is the rank.</figcaption></figure>
      <figure><svg viewBox="0 0 320 170" role="img"></svg><figcaption>Accuracy in percent, train dashed, against the rank.</figcaption></figure>
    </div>
    <div>What the network answers. A frame marks a mistake.</div><div class="row digits"></div>
    <div>The layer's strongest directions: images, each weighted by how much it excites them.</div><div class="row directions"></div>`;
  root.onkeydown = (event) => event.stopPropagation(); // in JupyterLab, arrow keys are the slider's
  const find = (what) => root.querySelector(what);
  const [layer, cut, slider, output] = ["[name=layer]", "[name=cut]", "input", "output"].map(find);
  const [spectrum, accuracy] = root.querySelectorAll("svg");
  const options = (select, names) => select.replaceChildren(...names.map((name) => new Option(name)));

  function picture(pixels, label, coloured) {
    const tile = document.createElement("div"), canvas = document.createElement("canvas");
    const bytes = Uint8Array.from(atob(pixels), (c) => c.charCodeAt(0)), side = Math.sqrt(bytes.length);
    canvas.width = canvas.height = side;
    const image = new ImageData(side, side);
    bytes.forEach((b, i) => {
      const t = coloured ? (b - 128) / 128 : b / 255, pale = Math.round(255 * (1 - Math.abs(t)));
      image.data.set(!coloured ? [255 - b, 255 - b, 255 - b, 255] : t > 0 ? [pale, pale, 255, 255] : [255, pale, pale, 255], 4 * i);
    });
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", label);
    tile.className = "tile";
    tile.append(canvas, document.createElement("span"));
    return tile;
  }

  // Curves of [x, y] points: x on a logarithmic axis, y as it is; a line marks the rank.
  function draw(svg, curves, ticks, mark, label) {
    const points = Object.values(curves).flat(), [low, high] = [ticks[0][0], ticks.at(-1)[0]];
    const most = Math.log(Math.max(...points.map(([x]) => x), 2));
    const at = (x) => 34 + (280 * Math.log(x)) / most, height = (y) => 150 - (140 * (y - low)) / (high - low || 1);
    const path = (curve) => curve.map(([x, y]) => `${at(x)},${height(Math.max(y, low))}`).join(" ");
    const line = (x1, y1, x2, y2, more) => `<line x1="${x1}" y1="${y1}" x2="${x2}" y2="${y2}" stroke="currentColor" ${more}/>`;
    const text = (x, y, said, anchor) => `<text x="${x}" y="${y}" font-size="11" text-anchor="${anchor}" fill="currentColor">${said}</text>`;
    svg.setAttribute("aria-label", label);
    svg.innerHTML =
      ticks.map(([y, said]) => line(34, height(y), 314, height(y), 'opacity="0.2"') + text(30, height(y) + 4, said, "end")).join("") +
      [1, 10, 100, 1000].filter((x) => Math.log(x) <= most).map((x) => text(at(x), 165, x, "middle")).join("") +
      Object.values(curves).map((curve, i, all) => `<polyline points="${path(curve)}" fill="none" stroke="#0072b2" stroke-width="2" ${i < all.length - 1 ? 'stroke-dasharray="6 4"' : ""}/>`).join("") +
      line(at(mark), 10, at(mark), 150, 'stroke-width="1.5"');
  }

  function show() {
    const { shape: [n, m], ranks, cuts } = layers[layer.value], of = cuts[cut.value], i = +slider.value, rank = ranks[i];
    const splits = Object.keys(of.accuracy), shares = splits.map((split) => `${split} ${of.accuracy[split][i]} %`).join(", ");
    output.textContent =
      `Rank ${rank} of ${Math.min(n, m)}: ${(rank * (n + m)).toLocaleString("en")} numbers in place of ${(n * m).toLocaleString("en")}. ` +
      `Error of the matrix ${of.matrix[i]} %, of its outputs ${of.outputs[i]} %. Accuracy: ${shares}.`;
    slider.setAttribute("aria-valuetext", `rank ${rank}`);
    const logs = of.spectrum.filter(([, s]) => s > 0).map(([x, s]) => [x, Math.log10(s)]), top = Math.ceil(logs[0][1]);
    const bottom = Math.max(Math.floor(logs.at(-1)[1]), top - 4);
    const powers = Array.from({ length: top - bottom + 1 }, (_, k) => [bottom + k, +(10 ** (bottom + k)).toPrecision(1)]);
    draw(spectrum, [logs], powers, rank, `Singular values of ${layer.value}; a line at rank ${rank}`);
    const curves = Object.fromEntries(splits.map((split) => [split, ranks.map((r, k) => [r, of.accuracy[split][k]])]));
    draw(accuracy, curves, [0, 25, 50, 75, 100].map((y) => [y, y]), rank, `Accuracy at rank ${rank}: ${shares}`);
    root.querySelectorAll(".digits .tile").forEach((tile, k) => {
      const answer = of.answers[i][k];
      tile.lastChild.textContent = answer;
      tile.classList.toggle("wrong", answer !== labels[k]);
    });
  }

  function chooseCut() {
    const { directions } = layers[layer.value].cuts[cut.value];
    find(".directions").replaceChildren(...directions.map((d, k) => picture(d, `direction ${k + 1}`, true)));
    show();
  }

  function chooseLayer() {
    const { ranks, cuts } = layers[layer.value], before = cut.value;
    options(cut, Object.keys(cuts));
    if (before in cuts) cut.value = before;
    slider.max = ranks.length - 1;
    slider.value = Math.floor(ranks.length / 2);
    chooseCut();
  }

  options(layer, Object.keys(layers));
  find(".digits").append(...digits.map((d, k) => picture(d, `a ${labels[k]}`)));
  layer.onchange = chooseLayer;
  cut.onchange = chooseCut;
  slider.oninput = show;
  chooseLayer();
}
