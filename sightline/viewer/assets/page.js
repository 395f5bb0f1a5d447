// Draws one Capture. The page holds queries, keys and logsumexp; every weight shown is recomputed here as
// exp(scale q.k + bias - logsumexp). Knows nothing about models, files or networks.

const byId = (id) => document.getElementById(id);
const capture = JSON.parse(byId("capture").textContent);
const N = capture.query_tokens.length, M = capture.key_tokens.length; // queries, keys
const SHIFT = M - N; // query i stands at position i + SHIFT
const HEADS = capture.heads, WIDTH = capture.width;
const FLOOR = Math.log10(capture.floor); // weights below the floor share the lowest colour
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));

// ------------------------------------------------------------------------------------------- data

function bytes(name) {
  const text = atob(byId(name).textContent);
  const out = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
  return out;
}
const floats = (name) => new Float32Array(bytes(name).buffer);
const perQuery = Object.fromEntries(["logsumexp", "entropy", "distance", "sink"].map((n) => [n, floats(n)]));
const received = floats("received"), thumbs = bytes("thumbs");
const layers = new Map(); // decoded when first looked at

function layerOf(layer) {
  if (!layers.has(layer)) {
    const extra = capture.masks[layer].extra;
    layers.set(layer, {
      queries: floats(`queries-${layer}`), keys: floats(`keys-${layer}`),
      extra: extra ? floats(`extra-${layer}`) : null,
    });
  }
  return layers.get(layer);
}

// ---------------------------------------------------------------------------------------- weights

// One head: weight(i, j), NaN where the mask hides key j from query i, and all weights at once.
function makeHead(layer, head) {
  const { queries, keys, extra } = layerOf(layer), mask = capture.masks[layer];
  const scale = capture.scales[layer], softcap = capture.softcaps[layer];
  const slope = mask.slopes ? mask.slopes[head] : 0;
  const query0 = head * N * WIDTH, key0 = Math.floor(head * capture.groups / HEADS) * M * WIDTH;
  const extra0 = mask.extra === HEADS ? head * N * M : 0;
  const row0 = (layer * HEADS + head) * N;

  const span = (i) => [
    mask.before === null ? 0 : Math.max(0, i + SHIFT - mask.before),
    Math.min(M, mask.length ?? M, mask.after === null ? M : i + SHIFT + mask.after + 1),
  ];
  function weightAt(i, j) {
    let score = 0;
    for (let a = query0 + i * WIDTH, b = key0 + j * WIDTH, end = a + WIDTH; a < end; a++, b++) {
      score += queries[a] * keys[b];
    }
    score *= scale;
    if (softcap !== null) score = softcap * Math.tanh(score / softcap);
    score -= slope * Math.abs(i + SHIFT - j);
    if (extra) {
      const added = extra[extra0 + i * M + j];
      if (added === -Infinity) return NaN;
      score += added;
    }
    return Math.exp(score - perQuery.logsumexp[row0 + i]);
  }
  function weight(i, j) {
    const [from, to] = span(i);
    return j >= from && j < to ? weightAt(i, j) : NaN;
  }
  function all() {
    const out = new Float32Array(N * M).fill(NaN);
    for (let i = 0; i < N; i++) {
      const [from, to] = span(i);
      for (let j = from; j < to; j++) out[i * M + j] = weightAt(i, j);
    }
    return out;
  }
  return { layer, head, weight, weights: all(), row0, key0: (layer * HEADS + head) * M };
}

function topKeys(i) {
  const row = current.weights.subarray(i * M, i * M + M);
  const order = [];
  for (let j = 0; j < M; j++) if (row[j] > 0) order.push(j);
  order.sort((a, b) => row[b] - row[a] || a - b);
  return order.slice(0, capture.top);
}

// ---------------------------------------------------------------------------------------- colours

// One ramp, even in lightness, from deep indigo over teal to pale yellow; the light theme reads it backwards,
// so that more weight always stands out more from the page.
const ramp = Array.from({ length: 255 }, (_, n) => {
  const t = n / 254, hue = (292 - 186 * t) * Math.PI / 180;
  const L = 0.24 + 0.73 * t, C = 0.035 + 0.1 * Math.sin(Math.PI * (0.12 + 0.78 * t));
  const a = C * Math.cos(hue), b = C * Math.sin(hue);
  const l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (L - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ].map((x) => Math.round(255 * clamp(x <= 0.0031308 ? 12.92 * x : 1.055 * x ** (1 / 2.4) - 0.055, 0, 1)));
});
const dark = () => document.documentElement.dataset.theme === "dark";
const colourOf = (level) => ramp[dark() ? level - 1 : 255 - level]; // levels 1 to 255; 0 is hidden
const packed = new Uint32Array(256); // the same as pixels; pixel 0 is transparent
const inkOn = (level) => (level > 140) === dark() ? "#10151c" : "#f6f7f8";

function levelOf(weight, high) {
  if (Number.isNaN(weight)) return 0;
  const t = state.log ? 1 - Math.log10(Math.max(weight, 1e-30)) / FLOOR : weight / high;
  return 1 + Math.round(254 * clamp(t, 0, 1));
}

// ------------------------------------------------------------------------------------ shown text

const NAMED = { "\n": "\u21b5", "\r": "\u240d", "\t": "\u21e5" };
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u115f\u180e\u200b-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff\ufff9-\ufffb\ud800-\udfff]|[\u{e0000}-\u{e0fff}]/gu;

function sign(c) {
  const code = c.codePointAt(0);
  if (NAMED[c]) return NAMED[c];
  if (code < 32) return String.fromCharCode(0x2400 + code);
  if (code === 127) return "\u2421";
  return `\u2039${code.toString(16).toUpperCase().padStart(4, "0")}\u203a`;
}
// A joiner inside an emoji belongs to its picture; elsewhere it is a character that must be seen.
function unseen(text) {
  return text.replace(UNSEEN, (c, at) =>
    c === "\u200d" && at > 0 && /\p{Extended_Pictographic}/u.test(text.slice(at + 1, at + 3)) ? c : sign(c));
}
const visible = (text) => unseen(text).replace(/ /g, "\u00b7") || "\u2205";
const label = (text) => unseen(text.trim()) || visible(text);

function around(tokens, at) { // some characters to each side, token by token
  const sides = [-1, 1].map((step) => {
    let out = "";
    for (let i = at + step; i >= 0 && i < tokens.length && out.length < 32; i += step) {
      const token = unseen(tokens[i]);
      out = step < 0 ? token + capture.separator + out : out + capture.separator + token;
    }
    return out;
  });
  const part = (name, text) => Object.assign(document.createElement(name), { textContent: text, dir: "auto" });
  const word = part("mark", visible(tokens[at]));
  word.title = unseen(tokens[at]);
  return [part("bdi", sides[0]), word, part("bdi", sides[1])];
}
function weightText(weight) {
  if (Number.isNaN(weight)) return "hidden";
  if (weight === 0) return "0";
  return weight >= 0.001 ? weight.toPrecision(5) : weight.toExponential(4);
}
function short(x) {
  return Math.abs(x) >= 100 ? x.toFixed(0) : Math.abs(x) >= 10 ? x.toFixed(1) : x.toFixed(2);
}

// ------------------------------------------------------------------------------------------ state

const state = { log: true, order: "layer", down: true, cell: null, pin: null };
const view = { x: 0, y: 0, size: 1 }; // top left cell and pixels a cell
const box = { left: 0, top: 0, width: 0, height: 0, fit: 1 }; // the map inside the canvas
let current, levels, high = 1, shown = []; // the head on show; its colours; the wall's order
const asking = () => state.pin ?? state.cell?.i ?? null;

function show(layer, head) {
  current = makeHead(layer, head);
  high = 0;
  for (const weight of current.weights) if (weight > high) high = weight;
  high ||= 1;
  const name = `Layer ${capture.layers[layer]}, head ${head}`;
  byId("name").textContent = name;
  document.title = `${name} - Sightline`;
  for (const button of byId("wall").querySelectorAll("button")) {
    const chosen = Number(button.dataset.index) === layer * HEADS + head;
    button.setAttribute("aria-pressed", chosen);
    if (chosen) button.scrollIntoView({ block: "nearest" });
  }
  if (!state.cell) state.cell = { i: N - 1, j: topKeys(N - 1)[0] ?? 0 };
  grade();
}

function grade() { // weights to colours
  levels = new Uint8Array(N * M);
  for (let n = 0; n < levels.length; n++) levels[n] = levelOf(current.weights[n], high);
  drawColourBar();
  draw();
  inspect();
}

function recolour() {
  packed.forEach((_, level) => {
    const [r, g, b] = level ? colourOf(level) : [0, 0, 0];
    packed[level] = level ? (255 << 24 | b << 16 | g << 8 | r) >>> 0 : 0;
  });
  drawWall();
  if (current) grade();
}

// ------------------------------------------------------------------------------------------- wall

const METRICS = ["entropy", "sink", "distance", "previous"];
const UNITS = { entropy: "mean entropy, nats", sink: `mean weight on the first ${capture.sink_keys} keys`,
  distance: "mean distance of query and key, tokens", previous: "mean weight on the key just before" };

function buildWall() {
  byId("wall").append(...capture.summaries.entropy.map((_, index) => {
    const item = document.createElement("li"), button = document.createElement("button");
    const layer = Math.floor(index / HEADS), head = index % HEADS;
    const canvas = document.createElement("canvas"), numbers = document.createElement("div");
    [canvas.width, canvas.height] = [capture.thumb[1], capture.thumb[0]];
    numbers.className = "numbers";
    const name = document.createElement("strong");
    name.textContent = `L${capture.layers[layer]} H${head}`;
    numbers.append(name, ...METRICS.map((metric) => {
      const line = document.createElement("div");
      line.className = "number";
      line.dataset.metric = metric;
      line.title = UNITS[metric];
      for (const text of [metric, short(capture.summaries[metric][index])]) {
        line.append(Object.assign(document.createElement("span"), { textContent: text }));
      }
      return line;
    }));
    button.type = "button";
    button.dataset.index = index;
    button.append(canvas, numbers);
    button.addEventListener("click", () => show(layer, head));
    item.append(button);
    return item;
  }));
}

function sortWall() {
  const items = [...byId("wall").children];
  const index = (item) => Number(item.firstChild.dataset.index);
  const value = (i) => state.order === "layer" ? -i : capture.summaries[state.order][i];
  const way = state.down ? 1 : -1;
  items.sort((a, b) => way * (value(index(b)) - value(index(a))) || index(a) - index(b));
  shown = items.map(index);
  byId("wall").append(...items);
  for (const line of byId("wall").querySelectorAll(".number")) {
    line.toggleAttribute("data-order", line.dataset.metric === state.order);
  }
  const first = state.order === "layer" ? state.down ? "first" : "last" : state.down ? "largest" : "smallest";
  const direction = byId("direction");
  direction.textContent = state.down ? "\u2193" : "\u2191";
  direction.title = `${first} first`;
  direction.setAttribute("aria-label", `${first} first; turn round`);
}

function drawWall() {
  const [rows, columns] = capture.thumb, size = rows * columns;
  for (const canvas of byId("wall").querySelectorAll("canvas")) {
    const index = Number(canvas.parentNode.dataset.index);
    const part = thumbs.subarray(index * size, index * size + size);
    const most = part.reduce((a, b) => Math.max(a, b), 1);
    const weight = (level) => 10 ** (FLOOR * (1 - (level - 1) / 254));
    const table = Uint8Array.from({ length: 256 }, (_, level) =>
      level === 0 ? 0 : state.log ? level : level === 1 ? 1 : levelOf(weight(level), weight(most)));
    const image = new ImageData(columns, rows), pixels = new Uint32Array(image.data.buffer);
    part.forEach((level, p) => { pixels[p] = packed[table[level]]; });
    canvas.getContext("2d").putImageData(image, 0, 0);
  }
}

function step(by) {
  const at = shown.indexOf(current.layer * HEADS + current.head);
  const next = shown[clamp(at + by, 0, shown.length - 1)];
  show(Math.floor(next / HEADS), next % HEADS);
}

// -------------------------------------------------------------------------------------------- map

const LABELS = 76, TRACK = 28, GAP = 5, EDGE = 1, GUTTER = LABELS + GAP + TRACK + GAP;
const FONT = '11px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif';
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const xOf = (j) => box.left + (j - view.x) * view.size;
const yOf = (i) => box.top + (i - view.y) * view.size;
let queued = false;

function layout() {
  const stage = byId("stage"), ratio = devicePixelRatio || 1;
  for (const canvas of [byId("map"), byId("overlay")]) {
    canvas.width = Math.round(stage.clientWidth * ratio);
    canvas.height = Math.round(stage.clientHeight * ratio);
  }
  const whole = view.size <= box.fit;
  const wide = Math.max(40, stage.clientWidth - GUTTER - EDGE);
  const tall = Math.max(40, stage.clientHeight - GUTTER - EDGE);
  box.fit = Math.min(wide / M, tall / N);
  box.width = Math.floor(box.fit * M);
  box.height = Math.floor(box.fit * N);
  box.left = GUTTER + Math.floor((wide - box.width) / 2);
  box.top = GUTTER;
  if (whole) view.size = box.fit;
  settle();
}

function settle() { // keep the map inside its box
  view.size = clamp(view.size, box.fit, Math.max(box.fit, 72));
  view.x = clamp(view.x, 0, Math.max(0, M - box.width / view.size));
  view.y = clamp(view.y, 0, Math.max(0, N - box.height / view.size));
  draw();
}

function zoom(factor, x, y) {
  const before = view.size;
  view.size = clamp(before * factor, box.fit, Math.max(box.fit, 72));
  view.x += (x - box.left) * (1 / before - 1 / view.size);
  view.y += (y - box.top) * (1 / before - 1 / view.size);
  settle();
}
function zoomHere(factor) {
  const { i, j } = state.cell, inside = (at, from, size) => at >= from && at <= from + size;
  const x = xOf(j + 0.5), y = yOf(i + 0.5);
  const seen = inside(x, box.left, box.width) && inside(y, box.top, box.height);
  zoom(factor, seen ? x : box.left + box.width / 2, seen ? y : box.top + box.height / 2);
}

function draw() {
  if (queued || !current) return;
  queued = true;
  requestAnimationFrame(() => { queued = false; drawMap(); drawOverlay(); });
}

function surface(id) {
  const canvas = byId(id), context = canvas.getContext("2d"), ratio = devicePixelRatio || 1;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.font = FONT;
  context.textBaseline = "middle";
  context.direction = "ltr";
  return context;
}

// For each device pixel along one axis: the first cell it covers and the one after its last.
function cells(pixels, ratio, from, count) {
  const first = new Int32Array(pixels), last = new Int32Array(pixels), per = 1 / (view.size * ratio);
  for (let p = 0; p < pixels; p++) {
    first[p] = clamp(Math.floor(from + p * per + 1e-9), 0, count - 1);
    last[p] = clamp(Math.ceil(from + (p + 1) * per - 1e-9), first[p] + 1, count);
    if (per < 1) last[p] = first[p] + 1;
  }
  return [first, last];
}

const canvasOf = (width, height) => Object.assign(document.createElement("canvas"), { width, height });
function hatch(context) {
  const tile = canvasOf(6, 6), pen = tile.getContext("2d");
  pen.strokeStyle = colour("line");
  pen.beginPath();
  for (const x of [-6, 0, 6]) { pen.moveTo(x, 6); pen.lineTo(x + 6, 0); }
  pen.stroke();
  return context.createPattern(tile, "repeat");
}

function drawMap() {
  const context = surface("map"), ratio = devicePixelRatio || 1;
  const width = Math.round(box.width * ratio), height = Math.round(box.height * ratio);
  const [left, right] = cells(width, ratio, view.x, M), [top, bottom] = cells(height, ratio, view.y, N);
  const image = new ImageData(width, height), pixels = new Uint32Array(image.data.buffer);
  for (let y = 0, p = 0; y < height; y++) {
    for (let x = 0; x < width; x++, p++) {
      let most = 0;
      for (let i = top[y]; i < bottom[y]; i++) {
        for (let j = left[x], at = i * M + j; j < right[x]; j++, at++) if (levels[at] > most) most = levels[at];
      }
      pixels[p] = packed[most];
    }
  }
  const picture = canvasOf(width, height), pen = picture.getContext("2d");
  pen.putImageData(image, 0, 0);
  if (view.size >= 14) drawGrid(pen, ratio);
  context.fillStyle = hatch(context);
  context.fillRect(box.left, box.top, box.width, box.height);
  context.drawImage(picture, box.left, box.top, box.width, box.height);
  drawNumbers(context);
  context.strokeStyle = colour("line");
  context.strokeRect(box.left - 0.5, box.top - 0.5, box.width + 1, box.height + 1);
  drawTracks(context);
  drawLabels(context);
}

function drawGrid(pen, ratio) { // only between weights, not over what is hidden
  pen.setTransform(ratio, 0, 0, ratio, -box.left * ratio, -box.top * ratio);
  pen.globalCompositeOperation = "source-atop";
  pen.strokeStyle = colour("surface");
  pen.beginPath();
  for (let j = Math.ceil(view.x); xOf(j) < box.left + box.width; j++) {
    pen.moveTo(xOf(j), box.top);
    pen.lineTo(xOf(j), box.top + box.height);
  }
  for (let i = Math.ceil(view.y); yOf(i) < box.top + box.height; i++) {
    pen.moveTo(box.left, yOf(i));
    pen.lineTo(box.left + box.width, yOf(i));
  }
  pen.stroke();
}

function drawNumbers(context) {
  if (view.size < 32) return;
  context.save();
  context.beginPath();
  context.rect(box.left, box.top, box.width, box.height);
  context.clip();
  context.textAlign = "center";
  for (let i = Math.floor(view.y); i < N && yOf(i) < box.top + box.height; i++) {
    for (let j = Math.floor(view.x); j < M && xOf(j) < box.left + box.width; j++) {
      const weight = current.weights[i * M + j];
      if (Number.isNaN(weight)) continue;
      context.fillStyle = inkOn(levels[i * M + j]);
      const text = weight >= 0.0005 ? weight.toFixed(3).replace(/^0/, "") : weight > 0 ? weight.toExponential(0) : "0";
      context.fillText(text, xOf(j + 0.5), yOf(i + 0.5));
    }
  }
  context.restore();
}

function drawTracks(context) {
  const entropy = perQuery.entropy.subarray(current.row0, current.row0 + N);
  const mass = received.subarray(current.key0, current.key0 + M);
  const tallest = (values) => values.reduce((a, b) => Math.max(a, b), 0) || 1;
  const share = (value, most) => clamp(value / most, 0, 1);
  const logShare = (value, most) => clamp(1 + Math.log10(Math.max(value / most, 1e-30)) / 2, 0, 1);
  const [mostEntropy, mostMass] = [tallest(entropy), tallest(mass)];
  const gap = view.size >= 6 ? 1 : 0;
  context.fillStyle = colour("muted");
  context.globalAlpha = 0.6;
  const bars = (count, from, size, value, bar) => {
    const pixels = Math.floor(size), [first, last] = cells(pixels, 1, from, count);
    if (view.size >= 1) {
      for (let n = first[0]; n < last[pixels - 1]; n++) {
        const start = Math.max(0, (n - from) * view.size);
        bar(start, Math.min(size, (n + 1 - from) * view.size) - start - gap, value(n));
      }
    } else {
      for (let p = 0; p < pixels; p++) {
        let most = 0;
        for (let n = first[p]; n < last[p]; n++) most = Math.max(most, value(n));
        bar(p, 1, most);
      }
    }
  };
  bars(N, view.y, box.height, (i) => share(entropy[i], mostEntropy), (start, size, value) =>
    context.fillRect(box.left - GAP - TRACK * value, box.top + start, TRACK * value, size));
  bars(M, view.x, box.width, (j) => (state.log ? logShare : share)(mass[j], mostMass), (start, size, value) =>
    context.fillRect(box.left + start, box.top - GAP - TRACK * value, size, TRACK * value));

  context.globalAlpha = 1;

  const corner = (x, y, turn, title, range) => {
    context.save();
    context.translate(x, y);
    context.rotate(turn);
    context.textAlign = turn ? "left" : "right";
    context.fillStyle = colour("ink");
    context.fillText(title, 0, -6);
    context.fillStyle = colour("muted");
    context.fillText(range, 0, 7);
    context.restore();
  };
  const middle = GAP + TRACK / 2, away = GAP + TRACK + 6;
  corner(box.left - away, box.top - middle, 0, "received", `${state.log ? "log, " : ""}max ${short(mostMass)}`);
  corner(box.left - middle, box.top - away, -Math.PI / 2, "entropy", `max ${short(mostEntropy)}`);
}

function cut(context, text, room) {
  if (context.measureText(text).width <= room) return text;
  const letters = [...text];
  while (letters.length > 1 && context.measureText(letters.join("") + "\u2026").width > room) letters.pop();
  return letters.join("") + "\u2026";
}

function rowLabel(context, i, text) {
  context.textAlign = "right";
  context.fillText(cut(context, text, LABELS - 6), box.left - GUTTER + LABELS, yOf(i + 0.5));
}
function columnLabel(context, j, text) {
  context.save();
  context.translate(xOf(j + 0.5), box.top - GUTTER + LABELS);
  const flat = view.size >= 34 && context.measureText(text).width < view.size - 4;
  if (!flat) context.rotate(-Math.PI / 2);
  context.textAlign = flat ? "center" : "left";
  context.fillText(cut(context, text, LABELS - 6), 0, flat ? -6 : 0);
  context.restore();
}

// Tokens where they fit, positions at round numbers where they do not.
function drawLabels(context) {
  context.fillStyle = colour("muted");
  const axis = (count, from, size, shift, tokens, write) => {
    let every = 1;
    if (view.size < 11.5) {
      const rough = 34 / view.size, ten = 10 ** Math.floor(Math.log10(rough));
      every = [1, 2, 5, 10].map((n) => n * ten).find((n) => n >= rough);
    }
    for (let n = Math.floor(from); n < count && (n - from) * view.size < size; n++) {
      const middle = (n + 0.5 - from) * view.size;
      if (middle < 0 || middle > size) continue;
      if (every === 1) write(context, n, label(tokens[n]));
      else if ((n + shift) % every === 0) write(context, n, String(n + shift));
    }
  };
  axis(N, view.y, box.height, capture.same ? SHIFT : 0, capture.query_tokens, rowLabel);
  axis(M, view.x, box.width, 0, capture.key_tokens, columnLabel);
}

function drawOverlay() {
  const context = surface("overlay"), accent = colour("accent"), ground = colour("surface");
  const size = Math.max(view.size, 1), fine = view.size < 4;
  const inView = (at, from, room) => at + size > from && at < from + room;
  const frame = (x, y, width, height) => { // two lines around large cells, one through small ones
    context.globalAlpha = fine ? 0.55 : 0.75;
    context.fillStyle = context.strokeStyle = accent;
    if (fine) context.fillRect(x, y, Math.max(1, width - size), Math.max(1, height - size));
    else context.strokeRect(x, y, width, height);
    context.globalAlpha = 1;
  };
  const chip = (x, y, width, height, write) => {
    context.fillStyle = ground;
    context.fillRect(x, y, width, height);
    context.fillStyle = accent;
    write();
  };
  const row = (i) => {
    if (!inView(yOf(i), box.top, box.height)) return;
    frame(box.left - GAP - TRACK, fine ? yOf(i + 0.5) : yOf(i) - 0.5, box.width + GAP + TRACK + (fine ? size : 0),
      fine ? 1 : size + 1);
    const y = clamp(yOf(i + 0.5), box.top, box.top + box.height);
    chip(box.left - GUTTER, y - 8, LABELS + 3, 16, () => rowLabel(context, i, label(capture.query_tokens[i])));
  };
  const column = (j) => {
    if (!inView(xOf(j), box.left, box.width)) return;
    frame(fine ? xOf(j + 0.5) : xOf(j) - 0.5, box.top - GAP - TRACK, fine ? 1 : size + 1,
      box.height + GAP + TRACK + (fine ? size : 0));
    const room = clamp(view.size, 16, 60);
    chip(xOf(j + 0.5) - room / 2, box.top - GUTTER, room, LABELS + 3,
      () => columnLabel(context, j, label(capture.key_tokens[j])));
  };
  context.beginPath();
  context.rect(0, 0, box.left + box.width + 1, box.top + box.height + 1);
  context.clip();
  const { i, j } = state.cell;
  if (state.pin !== null && state.pin !== i) row(state.pin);
  row(i);
  column(j);
  if (fine && inView(yOf(i), box.top, box.height) && inView(xOf(j), box.left, box.width)) {
    context.strokeStyle = accent;
    context.beginPath();
    context.arc(xOf(j + 0.5), yOf(i + 0.5), 6, 0, 2 * Math.PI);
    context.stroke();
  }
}

function drawColourBar() {
  const canvas = byId("colours"), image = new ImageData(256, 1);
  new Uint32Array(image.data.buffer).forEach((_, x, row) => { row[x] = packed[Math.max(1, x)]; });
  canvas.getContext("2d").putImageData(image, 0, 0);
  const ticks = state.log
    ? Array.from({ length: 1 - FLOOR }, (_, n) => [n / -FLOOR, n ? String(10 ** (FLOOR + n)) : `\u2264\u200a1e${FLOOR}`])
    : [0, 0.5, 1].map((t) => [t, t ? (t * high).toPrecision(2) : "0"]);
  byId("ticks").replaceChildren(...ticks.map(([at, text]) => {
    const tick = Object.assign(document.createElement("span"), { textContent: text });
    tick.style.left = `${100 * at}%`;
    return tick;
  }));
  byId("log").setAttribute("aria-pressed", state.log);
  byId("linear").setAttribute("aria-pressed", !state.log);
}

// -------------------------------------------------------------------------------------- inspector

let queryMarks, keyMarks; // the tokens of the text, as queries and as keys

function buildText() {
  const pane = byId("text");
  const run = (tokens, click) => tokens.map((token, n) => {
    const mark = document.createElement("span");
    mark.className = "token";
    mark.title = String(n);
    for (const part of token.split(/(\n|\t)/)) { // a new line is seen as a sign, and it breaks the line
      const shownPart = unseen(part);
      if (part === "\n" || part === "\t") {
        mark.append(Object.assign(document.createElement("span"), { className: "sign", textContent: shownPart }), part);
      } else mark.append(shownPart);
    }
    if (token === "") mark.textContent = "\u2205";
    mark.addEventListener("click", () => click(n));
    mark.addEventListener("pointerenter", () => { if (mark.dataset.key) point(asking(), n); });
    pane.append(mark, capture.separator);
    return mark;
  });
  const title = (text) => pane.append(Object.assign(document.createElement("h3"), { textContent: text }));
  const ask = (i) => {
    if (i < 0) return;
    state.pin = i;
    point(i, topKeys(i)[0] ?? 0);
  };
  if (!capture.same) title("queries");
  queryMarks = capture.same ? null : run(capture.query_tokens, ask);
  if (!capture.same) title("keys");
  keyMarks = run(capture.key_tokens, capture.same ? (j) => ask(j - SHIFT) : () => {});
  for (const mark of keyMarks) mark.dataset.key = "yes";
  queryMarks ??= keyMarks.slice(SHIFT);
}

function point(i, j) { // the cell that everything speaks of
  state.cell = { i: clamp(i, 0, N - 1), j: clamp(j, 0, M - 1) };
  drawOverlay();
  inspect();
}

function inspect() {
  const { i, j } = state.cell, weight = current.weight(i, j);
  byId("weight").textContent = weightText(weight);
  byId("weight").value = String(weight);
  byId("unit").textContent = Number.isNaN(weight) ? "by the mask" : "weight";
  byId("row").textContent = i + (capture.same ? SHIFT : 0);
  byId("column").textContent = j;
  byId("query").replaceChildren(...around(capture.query_tokens, i));
  byId("key").replaceChildren(...around(capture.key_tokens, j));
  byId("facts").replaceChildren(...[
    ["entropy", perQuery.entropy[current.row0 + i], "of this query, nats"],
    ["sink", perQuery.sink[current.row0 + i], `weight of this query on the first ${capture.sink_keys} keys`],
    ["distance", perQuery.distance[current.row0 + i], "mean distance of this query from its keys, tokens"],
    ["received", received[current.key0 + j], "by this key, summed over queries"],
  ].map(([name, value, title]) => {
    const fact = Object.assign(document.createElement("div"), { title });
    fact.append(Object.assign(document.createElement("dt"), { textContent: name }),
      Object.assign(document.createElement("dd"), { textContent: short(value) }));
    return fact;
  }));
  inspectQuery();
}

// Touching a thousand elements is slow; most of them stay as they are.
const seenAs = { look: new WeakMap(), glow: new WeakMap() };
function change(mark, what, value) {
  if (seenAs[what].get(mark) === value) return;
  seenAs[what].set(mark, value);
  if (what === "look") mark.className = value;
  else mark.style.backgroundColor = value;
}

function inspectQuery() {
  const i = asking(), row = current.weights.subarray(i * M, i * M + M), top = topKeys(i);
  byId("asker").textContent = `Top keys of \u201c${visible(capture.query_tokens[i])}\u201d`;
  const pin = byId("pin");
  pin.setAttribute("aria-pressed", state.pin !== null);
  pin.textContent = state.pin === null ? "Pin" : "Pinned";
  byId("top").replaceChildren(...Array.from({ length: capture.top }, (_, rank) => {
    const item = document.createElement("li"), j = top[rank];
    if (j === undefined) return item;
    const span = (name, text) => Object.assign(document.createElement("span"), { className: name, textContent: text });
    const token = span("token", ""), fill = span("fill", "");
    fill.style.width = `${100 * row[j]}%`;
    token.append(fill, span("", visible(capture.key_tokens[j])));
    const weight = current.weight(i, j), tiny = weight < 0.00005;
    const share = span("share", tiny ? weight.toExponential(0) : weight.toFixed(4));
    share.title = weightText(weight);
    item.append(token, span("place", String(j)), share);
    item.addEventListener("pointerenter", () => { if (state.cell.j !== j || state.cell.i !== i) point(i, j); });
    item.addEventListener("click", () => keyMarks[j].scrollIntoView({ block: "nearest" }));
    return item;
  }));
  const most = row[top[0]] || 1, listed = new Set(top);
  keyMarks.forEach((mark, j) => {
    const share = (row[j] || 0) / most;
    change(mark, "look", `token${Number.isNaN(row[j]) ? " unseen" : ""}${listed.has(j) ? " top" : ""}` +
      `${j === state.cell.j ? " pointed" : ""}${mark === queryMarks[i] ? " asking" : ""}`);
    change(mark, "glow", share > 0.002 ? `rgb(var(--glow) / ${(0.62 * share ** 0.6).toFixed(2)})` : "");
  });
  if (queryMarks[0] !== keyMarks[SHIFT]) {
    queryMarks.forEach((mark, n) => change(mark, "look", n === i ? "token asking" : "token"));
  }
}

// ------------------------------------------------------------------------------- pointer and keys

function listenToPointer() {
  const overlay = byId("overlay"), fingers = new Map();
  let moved = 0;
  const at = (event) => {
    const place = overlay.getBoundingClientRect();
    return [event.clientX - place.left, event.clientY - place.top];
  };
  const cellAt = ([x, y]) => {
    const j = Math.floor(view.x + (x - box.left) / view.size), i = Math.floor(view.y + (y - box.top) / view.size);
    return x >= box.left && y >= box.top && x < box.left + box.width && y < box.top + box.height && i < N && j < M
      ? [i, j] : null;
  };
  overlay.addEventListener("pointerdown", (event) => {
    overlay.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, at(event));
    moved = fingers.size > 1 ? Infinity : 0;
  });
  overlay.addEventListener("pointermove", (event) => {
    const [x, y] = at(event), old = fingers.get(event.pointerId);
    if (!old) {
      const cell = cellAt([x, y]);
      if (cell && (cell[0] !== state.cell.i || cell[1] !== state.cell.j)) point(...cell);
      return;
    }
    const others = [...fingers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
    fingers.set(event.pointerId, [x, y]);
    if (others.length) {
      const [ox, oy] = others[0], reach = (px, py) => Math.hypot(px - ox, py - oy) || 1;
      zoom(reach(x, y) / reach(...old), (x + ox) / 2, (y + oy) / 2);
      return;
    }
    moved += Math.abs(x - old[0]) + Math.abs(y - old[1]);
    if (moved > 4) {
      overlay.classList.add("dragging");
      view.x -= (x - old[0]) / view.size;
      view.y -= (y - old[1]) / view.size;
      settle();
    }
  });
  const release = (event) => {
    overlay.classList.remove("dragging");
    const cell = fingers.delete(event.pointerId) && moved <= 4 ? cellAt(at(event)) : null;
    if (cell && event.type === "pointerup") {
      state.pin = state.pin === cell[0] ? null : cell[0];
      point(...cell);
      queryMarks[cell[0]].scrollIntoView({ block: "nearest" });
    }
  };
  overlay.addEventListener("pointerup", release);
  overlay.addEventListener("pointercancel", release);
  overlay.addEventListener("wheel", (event) => {
    event.preventDefault();
    const lines = event.deltaMode === 1 ? 16 : 1;
    zoom(Math.exp(-clamp(event.deltaY * lines, -240, 240) / 320), ...at(event));
  }, { passive: false });
}

function move(di, dj) {
  point(state.cell.i + di, state.cell.j + dj);
  const { i, j } = state.cell, rows = box.height / view.size, columns = box.width / view.size;
  view.y = clamp(view.y, i + 1 - rows, i);
  view.x = clamp(view.x, j + 1 - columns, j);
  settle();
  announce();
}
function announce() {
  const { i, j } = state.cell;
  byId("announce").textContent = `query ${label(capture.query_tokens[i])}, key ${label(capture.key_tokens[j])}, ` +
    `weight ${weightText(current.weight(i, j))}`;
}
function togglePin() {
  state.pin = state.pin === null ? state.cell.i : null;
  point(state.cell.i, state.cell.j);
}
function setScale(log) {
  state.log = log;
  recolour();
}
function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", `Switch to ${theme === "dark" ? "light" : "dark"} theme`);
  recolour();
}

function listenToKeys() {
  const actions = {
    ArrowUp: (n) => move(-n, 0), ArrowDown: (n) => move(n, 0),
    ArrowLeft: (n) => move(0, -n), ArrowRight: (n) => move(0, n),
    "+": () => zoomHere(1.4), "=": () => zoomHere(1.4), "-": () => zoomHere(1 / 1.4), 0: () => zoomHere(0),
    "[": () => step(-1), "]": () => step(1), l: () => setScale(!state.log),
    t: () => setTheme(dark() ? "light" : "dark"), Escape: () => { if (state.pin !== null) togglePin(); },
  };
  document.addEventListener("keydown", (event) => {
    const target = event.target, key = event.key;
    if (event.ctrlKey || event.metaKey || event.altKey || byId("shortcuts").open) return;
    if (target.closest("select") || (target.closest("#text") && key.startsWith("Arrow"))) return;
    const onMap = target === byId("overlay") || target === document.body;
    const action = (key === "Enter" || key === " ") && onMap ? togglePin : actions[key];
    if (!action) return;
    event.preventDefault();
    action(event.shiftKey ? 10 : 1);
  });
}

function listenToControls() {
  const click = (id, action) => byId(id).addEventListener("click", action);
  byId("order").addEventListener("change", (event) => { state.order = event.target.value; state.down = true; sortWall(); });
  click("direction", () => { state.down = !state.down; sortWall(); });
  click("earlier", () => step(-1));
  click("later", () => step(1));
  click("out", () => zoomHere(1 / 1.4));
  click("in", () => zoomHere(1.4));
  click("fit", () => zoomHere(0));
  click("log", () => setScale(true));
  click("linear", () => setScale(false));
  click("pin", togglePin);
  click("help", () => byId("shortcuts").showModal());
  click("theme", () => setTheme(dark() ? "light" : "dark"));
}

// ------------------------------------------------------------------------------------------ start

function start() {
  const wish = new URLSearchParams(location.hash.slice(1));
  buildWall();
  const system = matchMedia("(prefers-color-scheme: dark)");
  setTheme(["light", "dark"].includes(wish.get("theme")) ? wish.get("theme") : system.matches ? "dark" : "light");
  system.addEventListener("change", () => setTheme(system.matches ? "dark" : "light"));
  byId("model").textContent = `${capture.model} \u00b7 ${M.toLocaleString("en")} token${M > 1 ? "s" : ""}`;
  byId("excerpt").textContent = unseen(capture.key_tokens.slice(0, 60).join(capture.separator)).slice(0, 240);
  buildText();
  sortWall();
  listenToPointer();
  listenToKeys();
  listenToControls();
  layout();
  const layer = capture.layers.indexOf(Number(wish.get("layer") ?? capture.layers[0]));
  show(Math.max(0, layer), clamp(Math.trunc(Number(wish.get("head"))) || 0, 0, HEADS - 1));
  new ResizeObserver(layout).observe(byId("stage"));
}
start();
