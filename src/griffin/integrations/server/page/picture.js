// The flocking picture: neurons as rows, tokens as columns.

const MAGMA = ["#000004", "#1d1147", "#51127c", "#832681", "#b73779", "#e75263", "#fc8961", "#fec488", "#fcfdbf"];
const WIDEST = 30, NARROWEST_LABELLED = 13;  // of a column, in CSS pixels
const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const at = (id) => document.getElementById(id);
const heat = at("heat"), strip = at("experts"), tip = at("tip");
let shown = null;  // the server's answer, its values as numbers
let cursor = null;  // column and row that the tip tells about

const SHADES = Uint32Array.from({ length: 256 }, (_, value) => {  // the bytes R G B A
  const place = (value / 255) * (MAGMA.length - 1), below = Math.min(Math.floor(place), MAGMA.length - 2);
  const channels = [1, 3, 5].map((from) => {
    const [low, high] = [MAGMA[below], MAGMA[below + 1]].map((colour) => parseInt(colour.slice(from, from + 2), 16));
    return Math.round(low + (high - low) * (place - below));
  });
  return channels[0] | (channels[1] << 8) | (channels[2] << 16) | (255 << 24);
});

export function show(found) {
  const shades = Uint8Array.from(atob(found.values), (letter) => letter.charCodeAt(0));
  const values = Float32Array.from(shades, (shade) => found.scale * (shade / 255) ** 2);  // roots, which show what is small
  shown = { ...found, shades, values };
  cursor = null;
  at("awaited").hidden = true;
  at("picture").hidden = false;
  paint();
  lay();
  describe();
}

export function forget() {
  shown = null;
  at("picture").hidden = true;
  at("awaited").hidden = false;
}

function paint() {
  const { width, height, shades, experts } = shown;
  [heat.width, heat.height, strip.width, strip.height] = [width, height, 1, height];
  const image = new ImageData(width, height);
  new Uint32Array(image.data.buffer).set(Array.from(shades, (shade) => SHADES[shade]));
  heat.getContext("2d").putImageData(image, 0, 0);
  const context = strip.getContext("2d");
  context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent");
  experts.shown.forEach((expert, row) => expert && context.fillRect(0, row, 1, 1));
}

function lay() {
  if (!shown) return;
  const { width, height, tokens } = shown;
  const across = Math.min(heat.parentElement.clientWidth, WIDEST * width), down = Math.min(Math.max(3 * height, 160), 420);
  heat.style.width = `${across}px`;
  heat.style.imageRendering = across < width ? "auto" : "pixelated";
  for (const canvas of [heat, strip]) canvas.style.height = `${down}px`;
  const fits = across / width >= NARROWEST_LABELLED;
  at("tokens").hidden = !fits;
  at("tokens").replaceChildren(...(fits ? tokens : []).map((token, index) => {
    const label = document.createElement("span");
    label.textContent = visible(token);
    label.style.left = `${((index + 0.5) * across) / width}px`;
    return label;
  }));
  point(cursor);
}

function describe() {
  const { width, height, values, neurons, layer, layers, d_ff: all, scale, experts } = shown;
  const rows = neurons.map((neuron, row) => {
    const own = values.subarray(row * width, (row + 1) * width);
    const mean = own.reduce((sum, value) => sum + value, 0) / width;
    return { neuron, mean, least: Math.min(...own), expert: experts.shown[row] };
  }).sort((one, other) => other.mean - one.mean).slice(0, 10);
  heat.setAttribute("aria-label",
    `Heat map of relative activations in layer ${layer} (of 0 to ${layers - 1}): ${height} of ${all} neurons as rows, ` +
    `${width} tokens as columns. Brightest on average: neurons ${rows.slice(0, 5).map((row) => row.neuron).join(", ")}. ` +
    "The arrow keys read single values.");
  at("rows").replaceChildren(...rows.map((row) => {
    const line = document.createElement("tr");
    const cells = [row.neuron, row.mean.toFixed(3), row.least.toFixed(3), row.expert ? "yes" : "no"];
    line.append(...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
    return line;
  }));
  at("extent").textContent = `${height} of ${all} neurons (rows), ${width} tokens (columns)`;
  at("most").textContent = scale.toFixed(2);
  at("chosen").textContent = `${Math.round(experts.density * 100)}%`;
}

const visible = (token) => token.replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5");

function point(place, spoken = false) {
  cursor = place;
  tip.hidden = !cursor;
  if (!cursor) return;
  const { width, height, values, neurons, tokens, experts } = shown;
  const [x, y] = cursor;
  tip.setAttribute("aria-live", spoken ? "polite" : "off");
  tip.textContent = `token ${x + 1} \u201c${visible(tokens[x])}\u201d, neuron ${neurons[y]}` +
    `${experts.shown[y] ? " (expert)" : ""}: ${values[y * width + x].toFixed(3)}`;
  tip.style.left = "0";  // so that its width is its own, not what is left beside its old place
  const left = ((x + 0.5) * heat.clientWidth) / width + 12, top = ((y + 0.5) * heat.clientHeight) / height;
  tip.style.left = `${Math.max(0, Math.min(left, heat.parentElement.clientWidth - tip.offsetWidth))}px`;
  tip.style.top = `${top > heat.clientHeight / 2 ? top - tip.offsetHeight - 12 : top + 12}px`;
}

function follow(event) {
  const box = heat.getBoundingClientRect();
  const within = (offset, size, count) => Math.min(Math.max(Math.floor((offset / size) * count), 0), count - 1);
  point([within(event.clientX - box.left, box.width, shown.width), within(event.clientY - box.top, box.height, shown.height)]);
}

function walk(event) {
  const step = STEPS[event.key];
  if (!step) return;
  event.preventDefault();
  const [x, y] = cursor ? [cursor[0] + step[0], cursor[1] + step[1]] : [0, 0];
  point([Math.min(Math.max(x, 0), shown.width - 1), Math.min(Math.max(y, 0), shown.height - 1)], true);
}

heat.addEventListener("pointermove", follow);
heat.addEventListener("pointerdown", follow);
heat.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(null));  // a finger leaves when it lifts
heat.addEventListener("blur", () => point(null));
heat.addEventListener("keydown", walk);
new ResizeObserver(lay).observe(at("picture"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => shown && paint());
