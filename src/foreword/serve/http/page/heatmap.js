// The share of attention that a prefix gets, drawn: a row for each layer, a column for a part of the text.

const SVG = "http://www.w3.org/2000/svg";
const percent = (share) => (share === null ? "no share" : `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`);

/** Draw into a figure what /v1/foreword/shares told. */
export function draw(figure, told) {
  const { layers, edges, prompt_tokens: prompt } = told;
  const svg = figure.querySelector("svg");
  const [width, height] = [edges.at(-1), layers.length];
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren(...layers.flatMap((layer, row) => layer.share.map((share, column) =>
    make("rect", { class: "cell", x: edges[column], y: row, width: edges[column + 1] - edges[column], height: 1,
                   "fill-opacity": share ?? 0, "data-layer": row, "data-column": column }))));
  if (prompt < width) svg.append(make("line", { class: "border", x1: prompt, x2: prompt, y1: 0, y2: height }));
  const cursor = make("rect", { class: "cursor", width: 0, height: 1 });
  svg.append(cursor);

  const said = summary(layers);
  figure.querySelector("figcaption").textContent = said;
  figure.querySelector(".top").textContent = "layer 0";
  figure.querySelector(".bottom").textContent = height > 1 ? `layer ${height - 1}` : "";
  figure.querySelector(".along").textContent = prompt < width ? "Left to right: the text. Dashed: the answer begins." : "Left to right: the text.";
  svg.setAttribute("aria-label", `${said} Arrow keys read it cell by cell.`);
  read(figure, svg, cursor, told);
  figure.hidden = false;
}

function summary(layers) {
  const known = layers.map((layer, number) => ({ number, mean: layer.mean })).filter((layer) => layer.mean !== null);
  if (!known.length) return "Attention to the prefix stands outside the softmax here: it has no share.";
  const mean = known.reduce((sum, layer) => sum + layer.mean, 0) / known.length;
  const most = known.reduce((a, b) => (b.mean > a.mean ? b : a));
  return `Attention to the prefix: ${percent(mean)} on average, most in layer ${most.number} (${percent(most.mean)}).`;
}

/** The cell under the pointer, or under the cursor that the arrow keys move, in words. */
function read(figure, svg, cursor, { layers, edges, prompt_tokens: prompt }) {
  const output = figure.querySelector(".readout");
  let [row, column] = [0, 0];

  function show() {
    const [from, stop] = [edges[column], edges[column + 1]];
    const which = stop - from === 1 ? `token ${from + 1}` : `tokens ${from + 1}–${stop}`;
    const where = stop <= prompt ? "prompt" : from >= prompt ? "answer" : "prompt and answer";
    output.textContent = `layer ${row}, ${which} (${where}): ${percent(layers[row].share[column])}`;
    set(cursor, { x: from, y: row, width: stop - from });
  }

  function hide() {
    output.textContent = "";
    cursor.setAttribute("width", 0);
  }

  svg.onpointermove = (event) => {
    const { layer, column: place } = event.target.dataset;
    if (layer === undefined) return;
    [row, column] = [Number(layer), Number(place)];
    show();
  };
  svg.onpointerleave = hide;
  svg.onblur = hide;
  svg.onfocus = () => { if (svg.matches(":focus-visible")) show(); };
  svg.onkeydown = (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
                    Home: [0, -edges.length], End: [0, edges.length] };
    const move = moves[event.key];
    if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    row = Math.min(Math.max(row + move[0], 0), layers.length - 1);
    column = Math.min(Math.max(column + move[1], 0), edges.length - 2);
    show();
  };
}

const make = (name, attributes) => set(document.createElementNS(SVG, name), attributes);

function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
