"use strict";
// Positions are in micrometres and, like lengths and indices, in the order z, y, x. The server sends tiles of numbers as
// they are stored; a plane is drawn from them here, so contrast and colours change without asking it again.

const $ = (id) => document.getElementById(id);
const PLANES = { xy: [0, 1, 2], xz: [1, 0, 2], yz: [2, 0, 1] }; // axes across the plane, down and to the right
const ARRAYS = {
  uint8: Uint8Array, int8: Int8Array, uint16: Uint16Array, int16: Int16Array, uint32: Uint32Array, int32: Int32Array,
  float32: Float32Array, float64: Float64Array, uint64: BigUint64Array, int64: BigInt64Array,
};
const MAX_TILES = 256; // that a view may need: without coarse levels only a part is shown
const CACHE_NBYTES = 2 ** 28, MAX_PIXELS = 4e6;
const TOGETHER = 6; // requests at a time, as many as browsers send to one server

const state = { plane: "xy", at: [0, 0, 0], t: 0, centre: [0, 0, 0], um: 0, split: 0.5, opacity: 0.8, style: "both", across: false };
const canvas = $("canvas"), context = canvas.getContext("2d", { willReadFrequently: true });
const tiles = new Map(); // by key, the one used last at the end
const pending = new Map();
let needed = new Map();
let scene, sources, base, tileLength, heldNbytes = 0, isScheduled = false, picked = null;
let width = 1, height = 1, ratio = 1, image, values, ids;

// Where things are

const axes = () => PLANES[state.plane];
const pixelUm = () => state.um / ratio;
const timeOf = (source) => Math.min(state.t, source.n_t - 1);
const imageSources = () => sources.filter((source) => source.kind !== "labels");
const isDivided = () => imageSources().length > 1;
const position = (axis, index) => base.translation[axis] + index * base.scale[axis];

function indexAt(level, axis, um) {
  return Math.floor((um - level.translation[axis]) / level.scale[axis] + 0.5);
}

function planeIndex(level) {
  const [across] = axes(), n = level.shape[across];
  if (n === 1) return 0;
  const index = indexAt(level, across, position(across, state.at[across]));
  return index < -1 || index > n ? null : Math.min(Math.max(index, 0), n - 1); // levels end up to a voxel early
}

function usableLevels(source) {
  return [...source.levels.keys()].filter((k) => source.levels[k].planes.includes(state.plane));
}

// The coarsest level whose voxels are no larger than a pixel, give or take, or than the finest ones.
function levelFor(source) {
  const [, ...within] = axes(), usable = usableLevels(source);
  const isFine = (k) => within.every(
    (axis) => source.levels[k].scale[axis] <= Math.max(1.2 * pixelUm(), 1.001 * source.levels[usable[0]].scale[axis]));
  return usable.findLast(isFine) ?? usable[0];
}

function indices(level, axis, n) {
  const found = new Int32Array(n), start = state.centre[axis] + (0.5 - n / 2) * pixelUm();
  for (let i = 0; i < n; i++) {
    const index = indexAt(level, axis, start + i * pixelUm());
    found[i] = index < 0 || index >= level.shape[axis] ? -1 : index;
  }
  return found;
}

// Runs of pixels in the same tile.
function runs(found, start, stop) {
  const result = [];
  for (let i = start; i < stop; i++) {
    if (found[i] < 0) continue;
    const tile = Math.floor(found[i] / tileLength), last = result.at(-1);
    if (last && last.tile === tile) last.stop = i + 1;
    else result.push({ tile, start: i, stop: i + 1 });
  }
  return result;
}

// Tiles

function tileAt(source, k, c, n, v, u, distance) {
  const key = [source.index, k, state.plane, timeOf(source), c, n, v, u].join("/"), tile = tiles.get(key);
  if (tile) {
    tiles.delete(key);
    tiles.set(key, tile);
  } else if (distance !== undefined) {
    needed.set(key, { key, source, distance, width: Math.min(tileLength, source.levels[k].shape[axes()[2]] - u * tileLength) });
  }
  return tile;
}

async function load({ key, source, width: tileWidth }) {
  const controller = new AbortController();
  pending.set(key, controller);
  let tile = { data: null, nbytes: 64 };
  try {
    const response = await fetch(`tile/${key}`, { signal: controller.signal });
    if (!response.ok) throw new Error(await response.text());
    const raw = new ARRAYS[source.dtype](await response.arrayBuffer());
    const data = source.kind === "labels" ? keysOf(raw) : raw;
    tile = { data, raw, width: tileWidth, nbytes: raw.byteLength + (data === raw ? 0 : data.byteLength) };
  } catch (error) {
    if (controller.signal.aborted) return;
    say(`${source.name}: ${error.message}`);
  }
  pending.delete(key);
  tiles.set(key, tile);
  heldNbytes += tile.nbytes;
  for (const [old, { nbytes }] of tiles) {
    if (heldNbytes <= CACHE_NBYTES || old === key) break;
    tiles.delete(old);
    heldNbytes -= nbytes;
  }
  redraw();
}

// Numbers of 32 bits that tell labels apart; ids of 64 bits are folded.
function keysOf(raw) {
  if (raw.BYTES_PER_ELEMENT < 8) return Int32Array.from(raw);
  const halves = new Int32Array(raw.buffer), keys = new Int32Array(raw.length);
  for (let i = 0; i < keys.length; i++) {
    const low = halves[2 * i], high = halves[2 * i + 1];
    keys[i] = low ^ Math.imul(high, 0x9e3779b1) || (low | high ? 1 : 0);
  }
  return keys;
}

function fetchNeeded() {
  for (const [key, controller] of pending) {
    if (needed.has(key)) continue;
    controller.abort();
    pending.delete(key);
  }
  const waiting = [...needed.values()].filter(({ key }) => !pending.has(key)).sort((a, b) => a.distance - b.distance);
  waiting.slice(0, Math.max(0, TOGETHER - pending.size)).forEach(load);
  $("view").setAttribute("aria-busy", String(needed.size > 0 || isScheduled));
}

// Drawing

function fill(source, k, c, [from, to], out, isWanted) {
  const level = source.levels[k], [, down, right] = axes(), n = planeIndex(level);
  if (n === null) return true;
  const columns = indices(level, right, width), rows = indices(level, down, height), across = runs(columns, from, to);
  let isWhole = true;
  for (const v of runs(rows, 0, height)) {
    for (const u of across) {
      const distance = isWanted ? Math.hypot(v.start + v.stop - height, u.start + u.stop - width) : undefined;
      const tile = tileAt(source, k, c, n, v.tile, u.tile, distance);
      if (!tile) isWhole = false;
      if (!tile?.data) continue;
      for (let y = v.start; y < v.stop; y++) {
        const offset = (rows[y] - v.tile * tileLength) * tile.width - u.tile * tileLength, line = y * width;
        for (let x = u.start; x < u.stop; x++) out[line + x] = tile.data[offset + columns[x]];
      }
    }
  }
  return isWhole;
}

// Fills `out` with the voxels under the pixels; what is not there yet is taken from other levels.
function sample(source, c, range, out, nothing) {
  out.fill(nothing);
  const usable = usableLevels(source), k = levelFor(source);
  if (!usable.length || fill(source, k, c, range, out, true)) return true;
  for (const other of usable.filter((i) => i >= k - 2 && i !== k).reverse()) fill(source, other, c, range, out);
  return fill(source, k, c, range, out);
}

function rangeOf(source) {
  const cut = Math.round(state.split * width);
  if (!isDivided()) return [0, width];
  if (source.kind === "labels") return state.across ? [0, width] : [cut, width];
  return source.kind === "before" ? [0, cut] : [cut, width];
}

function percentiles(range) {
  const found = [], step = Math.max(1, Math.round(((range[1] - range[0]) * height) / 60000));
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = range[0]; x < range[1]; x++, i++) {
      if (i % step === 0 && Number.isFinite(values[y * width + x])) found.push(values[y * width + x]);
    }
  }
  if (!found.length) return null;
  const sorted = Float32Array.from(found).sort(), at = (share) => sorted[Math.round(share * (sorted.length - 1))];
  return [at(0.001), at(0.999) > at(0.001) ? at(0.999) : at(0.001) + 1];
}

function addChannel(source, c) {
  const { data } = image, channel = source.channels[c], range = rangeOf(source), isWhole = sample(source, c, range, values, NaN);
  let shown = channel.window;
  if (!shown) {
    shown = percentiles(range);
    if (!shown) return;
    if (isWhole) setWindow(channel, shown, true);
  }
  const [low, high] = shown, factor = 255 / (high - low);
  const [red, green, blue] = [1, 3, 5].map((i) => parseInt(channel.color.slice(i, i + 2), 16) / 255);
  for (let y = 0; y < height; y++) {
    for (let i = y * width + range[0], stop = y * width + range[1]; i < stop; i++) {
      let value = (values[i] - low) * factor, j = 4 * i;
      if (!(value > 0)) continue; // nor where there is no number
      if (value > 255) value = 255;
      data[j] += value * red; // sums stop at 255
      data[++j] += value * green;
      data[++j] += value * blue;
    }
  }
}

const PALETTE = Array.from({ length: 255 }, (_, i) => [...fromHue((i * 0.618034) % 1, 0.65 + (0.35 * (i % 3)) / 2), 255]);

function fromHue(hue, saturation) {
  return [5, 3, 1].map((n) => {
    const k = (n + hue * 6) % 6;
    return Math.round(255 * (1 - saturation * Math.max(0, Math.min(k, 4 - k, 1))));
  });
}

const colorOf = (source, key) => source.colors.get(key) ?? PALETTE[((key >>> 0) + 254) % 255];

function addLabels(source) {
  const { data } = image, range = rangeOf(source);
  sample(source, 0, range, ids, 0);
  let key = 0, color = PALETTE[0];
  for (let y = 0; y < height; y++) {
    for (let x = range[0]; x < range[1]; x++) {
      const i = y * width + x;
      if (!ids[i]) continue;
      if (ids[i] !== key) color = colorOf(source, (key = ids[i]));
      const isEdge = (x > range[0] && ids[i - 1] !== key) || (x + 1 < range[1] && ids[i + 1] !== key)
        || (y > 0 && ids[i - width] !== key) || (y + 1 < height && ids[i + width] !== key);
      const isPicked = isEdge && picked?.source === source && picked.key === key;
      if (!isEdge && state.style === "line") continue;
      const strength = isPicked ? 1 : (color[3] / 255) * state.opacity * (isEdge || state.style === "fill" ? 1 : 0.4);
      for (let j = 0; j < 3; j++) data[4 * i + j] += strength * ((isPicked ? 255 : color[j]) - data[4 * i + j]);
    }
  }
}

function resize() {
  const { clientWidth, clientHeight } = $("view");
  ratio = Math.min(devicePixelRatio || 1, Math.sqrt(MAX_PIXELS / Math.max(1, clientWidth * clientHeight)));
  const wide = Math.max(1, Math.round(clientWidth * ratio)), high = Math.max(1, Math.round(clientHeight * ratio));
  if (image && wide === width && high === height) return;
  canvas.width = width = wide;
  canvas.height = height = high;
  image = context.createImageData(width, height);
  [values, ids] = [new Float32Array(width * height), new Int32Array(width * height)];
}

function draw() {
  isScheduled = false;
  resize();
  limitZoom();
  needed = new Map();
  new Uint32Array(image.data.buffer).fill(0xff000000);
  for (const source of imageSources()) {
    source.channels.forEach((channel, c) => channel.active && addChannel(source, c));
  }
  sources.filter((source) => source.kind === "labels" && source.active).forEach(addLabels);
  context.putImageData(image, 0, 0);
  showFrame();
  fetchNeeded();
}

function redraw() {
  if (isScheduled) return;
  isScheduled = true;
  $("view").setAttribute("aria-busy", "true");
  requestAnimationFrame(draw);
}

// Zoom and position

function limitZoom() {
  const [, down, right] = axes();
  let most = Infinity;
  for (const source of sources) {
    const level = source.levels[usableLevels(source).at(-1)];
    if (!level) continue;
    const n = Math.ceil(level.shape[down] / tileLength) * Math.ceil(level.shape[right] / tileLength);
    const area = MAX_TILES * tileLength ** 2 * level.scale[down] * level.scale[right];
    if (n > MAX_TILES) most = Math.min(most, ratio * Math.sqrt(area / (width * height)));
  }
  const least = Math.min(base.scale[down], base.scale[right]) / 64;
  $("far").hidden = state.um < most;
  $("notes").hidden = $("far").hidden && !scene.notes.length;
  state.um = Math.max(least, Math.min(state.um || most, most, 1e12));
}

function fit() {
  const [, down, right] = axes();
  resize();
  for (const axis of [down, right]) state.centre[axis] = position(axis, (base.shape[axis] - 1) / 2);
  const spans = [[down, height], [right, width]].map(([axis, n]) => (base.shape[axis] * base.scale[axis]) / n);
  state.um = Math.max(...spans) * ratio * 1.06;
  changed();
}

function zoom(factor, x = width / 2, y = height / 2) {
  const [, down, right] = axes(), before = state.um;
  state.um *= factor;
  limitZoom();
  const shift = (before - state.um) / ratio;
  state.centre[right] += (x - width / 2) * shift;
  state.centre[down] += (y - height / 2) * shift;
  changed();
}

function pan(dx, dy) {
  const [, down, right] = axes();
  state.centre[right] -= dx * pixelUm();
  state.centre[down] -= dy * pixelUm();
  changed();
}

function step(n) {
  const [across] = axes();
  state.at[across] = clamp(state.at[across] + n, 0, base.shape[across] - 1);
  changed();
}

function setPlane(plane) {
  for (const axis of axes().slice(1)) {
    state.at[axis] = clamp(indexAt(base, axis, state.centre[axis]), 0, base.shape[axis] - 1);
  }
  state.centre[axes()[0]] = position(axes()[0], state.at[axes()[0]]);
  state.plane = plane;
  changed();
}

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

// What is under a pixel

function under(x, y) {
  const [across, down, right] = axes(), where = [0, 0, 0];
  where[across] = position(across, state.at[across]);
  where[right] = state.centre[right] + (x + 0.5 - width / 2) * pixelUm();
  where[down] = state.centre[down] + (y + 0.5 - height / 2) * pixelUm();
  return where;
}

function valueAt(source, c, where) {
  const [, down, right] = axes(), k = levelFor(source);
  for (const other of [k, ...usableLevels(source).filter((i) => i !== k)]) {
    const level = source.levels[other], n = level && planeIndex(level);
    if (!level || n === null) continue;
    const [v, u] = [down, right].map((axis) => indexAt(level, axis, where[axis]));
    if (v < 0 || u < 0 || v >= level.shape[down] || u >= level.shape[right]) continue;
    const tile = tileAt(source, other, c, n, Math.floor(v / tileLength), Math.floor(u / tileLength));
    if (!tile?.data) continue;
    const i = (v % tileLength) * tile.width + (u % tileLength);
    return { value: tile.raw[i], key: tile.data[i], level: other };
  }
  return null;
}

const isUnder = (source, x) => x >= rangeOf(source)[0] && x < rangeOf(source)[1];
const short = (value) => (typeof value === "number" && !Number.isInteger(value) ? String(+value.toPrecision(7)) : String(value));

function readOut(x, y) {
  const where = under(x, y), parts = [], index = where.map((um, axis) => indexAt(base, axis, um));
  if (index.some((i, axis) => i < 0 || i >= base.shape[axis])) return $("readout").replaceChildren();
  const shown = [0, 1, 2].filter((axis) => base.shape[axis] > 1 || axis > 0);
  parts.push(shown.map((axis) => `${"zyx"[axis]} ${index[axis]}`).join("  "));
  parts.push(`${shown.map((axis) => short(+where[axis].toFixed(3))).join(", ")} ${scene.unit}`);
  for (const source of sources.filter((one) => isUnder(one, x))) {
    const listed = source.kind === "labels" ? (source.active ? [[source.name, 0]] : [])
      : source.channels.map((channel, c) => [channel.active && channelName(source, c), c]).filter(([name]) => name);
    for (const [name, c] of listed) {
      const found = valueAt(source, c, where);
      if (found) parts.push([name, `${short(found.value)}${found.level ? ` (level ${found.level})` : ""}`]);
    }
  }
  $("readout").replaceChildren(...parts.flatMap((part, i) => {
    const nodes = Array.isArray(part) ? [`${part[0]} `, element("b", part[1])] : [part];
    return i ? ["  ·  ", ...nodes] : nodes;
  }));
}

const channelName = (source, c) => (source.channels.length > 1 ? source.channels[c].name : source.name);

async function pick(x, y) {
  const where = under(x, y);
  picked = null;
  for (const source of sources.filter((one) => one.kind === "labels" && one.active && isUnder(one, x))) {
    const found = valueAt(source, 0, where);
    if (found?.key) picked = { source, key: found.key, id: String(found.value) };
  }
  redraw();
  $("object").hidden = !picked;
  if (!picked) return;
  const { source, key, id } = picked, swatch = element("span", "", "swatch");
  swatch.style.background = `rgb(${colorOf(source, key).slice(0, 3).join(" ")})`;
  $("object").firstElementChild.replaceChildren(swatch, `${source.name} ${id}`);
  const list = $("object").lastElementChild;
  list.replaceChildren();
  const response = await fetch(`object/${source.index}/${timeOf(source)}/${id}`);
  const row = response.ok ? await response.json() : null;
  if (picked?.id !== id || picked.source !== source) return;
  if (!response.ok) say(`${source.name}: ${await response.text()}`);
  const entries = row ? Object.entries(row).filter(([name]) => !["t", "c", "label"].includes(name)) : [["", "There is no table of this object."]];
  list.replaceChildren(...entries.flatMap(([name, value]) => [element("dt", name), element("dd", value === null ? "–" : short(value))]));
}

// The page around the canvas

function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function input(type, label, properties = {}) {
  const made = Object.assign(document.createElement("input"), { type, ...properties });
  made.setAttribute("aria-label", label);
  return made;
}

function say(text) {
  $("message").textContent = text.slice(0, 400);
  $("message").hidden = false;
}

function showFrame() {
  const [across] = axes(), name = "zyx"[across], n = base.shape[across];
  $("plane-row").hidden = n === 1;
  Object.assign($("plane"), { max: n - 1, value: state.at[across] });
  $("plane").setAttribute("aria-label", `Plane along ${name}`);
  $("plane-now").textContent = `${name} ${state.at[across]} / ${n - 1}  ·  ${short(+position(across, state.at[across]).toFixed(3))} ${scene.unit}`;
  $("time").value = state.t;
  $("time-now").textContent = `t ${state.t} / ${$("time").max}`;
  for (const radio of document.getElementsByName("plane")) radio.checked = radio.value === state.plane;
  $("divider").style.left = `${100 * state.split}%`;
  $("divider").setAttribute("aria-valuenow", Math.round(100 * state.split));
  for (const id of ["opacity", "style"]) $(id).value = state[id];
  $("across").checked = state.across;
  const most = 140 * state.um, unit = 10 ** Math.floor(Math.log10(most)), length = unit * [5, 2, 1].find((m) => m * unit <= most);
  $("scale").firstElementChild.style.width = `${length / state.um}px`;
  $("scale").lastElementChild.textContent = lengthText(length);
}

function lengthText(um) {
  if (scene.unit !== "µm") return `${short(+um.toPrecision(1))} ${scene.unit}`;
  const [factor, unit] = um >= 1000 ? [1e-3, "mm"] : um < 1 ? [1e3, "nm"] : [1, "µm"];
  return `${+(um * factor).toPrecision(1)} ${unit}`;
}

function setWindow(channel, shown, isNew = false) {
  channel.window = shown;
  const span = shown[1] - shown[0], [least, most] = channel.limits ?? [-Infinity, Infinity];
  if (isNew) channel.bounds = [Math.max(least, shown[0] - span / 2), Math.min(most, shown[1] + span)];
  channel.show?.();
  remember();
}

function channelRow(source, c) {
  const channel = source.channels[c], name = `${source.kind === "before" ? "before " : ""}${channelName(source, c)}`;
  const box = element("div"), row = element("div", "", "row"), ends = element("div", "", "row"), bar = element("div", "", "window");
  const on = input("checkbox", `Show ${name}`, { checked: channel.active });
  const color = input("color", `Colour of ${name}`, { value: channel.color });
  const auto = Object.assign(element("button", "Auto"), { type: "button", title: `Contrast of ${name} from what is shown` });
  const [sliders, numbers] = ["range", "number"].map((type) => ["darkest", "brightest"].map((end) => input(type, `Intensity shown as ${end} of ${name}`, { step: "any" })));
  channel.show = () => {
    on.checked = channel.active;
    color.value = channel.color;
    bar.style.setProperty("--of", channel.color);
    if (!channel.window) return;
    channel.window.forEach((value, i) => {
      Object.assign(sliders[i], { min: channel.bounds[0], max: channel.bounds[1], value });
      if (document.activeElement !== numbers[i]) numbers[i].value = +value.toPrecision(4);
    });
  };
  const set = (i, value, isNew) => {
    if (!channel.window || !Number.isFinite(value)) return;
    const shown = [...channel.window];
    shown[i] = value;
    if (shown[0] < shown[1]) setWindow(channel, shown, isNew);
    else channel.show();
    redraw();
  };
  on.addEventListener("change", () => { channel.active = on.checked; changed(); });
  color.addEventListener("input", () => { channel.color = color.value; channel.show(); changed(); });
  auto.addEventListener("click", () => { channel.window = null; redraw(); });
  sliders.forEach((slider, i) => slider.addEventListener("input", () => set(i, slider.valueAsNumber, false)));
  numbers.forEach((number, i) => number.addEventListener("change", () => set(i, number.valueAsNumber, true)));
  row.append(on, element("span", channel.name, "name"), color, auto);
  bar.append(...sliders);
  ends.append(...numbers);
  box.append(row, bar, ends);
  channel.show();
  return box;
}

function build() {
  document.title = `${scene.title} – chunkrestore`;
  $("title").textContent = scene.title;
  const planes = Object.keys(PLANES).filter((plane) => PLANES[plane].slice(1).every((axis) => axis > 0 || base.shape[0] > 1));
  $("planes").hidden = !planes[1];
  for (const plane of planes) {
    const label = element("label"), radio = input("radio", `Plane ${plane}`, { name: "plane", value: plane });
    radio.addEventListener("change", () => { setPlane(plane); fit(); });
    label.append(radio, plane);
    $("planes").append(label);
  }
  for (const { name, url } of scene.links) {
    $("links").append(Object.assign(element("a", name), { href: url, target: "_blank", rel: "noopener noreferrer" }));
  }
  for (const kind of ["before", "image", "labels"]) sources.filter((source) => source.kind === kind).forEach(kind === "labels" ? addOverlay : addSection);
  $("time").max = Math.max(...sources.map((source) => source.n_t)) - 1;
  $("time-row").hidden = $("time").max === "0";
  for (const id of ["left", "right", "divider", "across-row"]) $(id).hidden = !isDivided();
  for (const [id, kind, words] of [["left", "before", "Before"], ["right", "image", "After"]]) {
    $(id).textContent = `${words}: ${sources.find((source) => source.kind === kind)?.name}`;
  }
  $("across-row").hidden ||= $("labels").hidden;
  const far = Object.assign(element("li", "There is no coarser level, so only a part is shown at a time: chunkrestore pyramid adds levels."), { id: "far", hidden: true });
  $("notes").lastElementChild.append(...scene.notes.map((note) => element("li", note)), far);
}

function addSection(source) {
  const section = element("section"), words = { before: "Before", image: isDivided() ? "After" : "Image" }[source.kind];
  const title = element("h2", `${words} `);
  title.append(element("small", source.name));
  section.append(title, ...source.channels.map((_, c) => channelRow(source, c)));
  $("sources").append(section);
}

function addOverlay(source) {
  const row = element("label", "", "row check"), on = input("checkbox", `Show labels ${source.name}`, { checked: source.active });
  on.addEventListener("change", () => { source.active = on.checked; changed(); });
  source.show = () => { on.checked = source.active; };
  row.append(on, element("span", source.name, "name"));
  $("overlays").append(row);
  $("labels").hidden = false;
}

// State in the address: a link shows the same

let rememberLater;
function remember() {
  clearTimeout(rememberLater);
  rememberLater = setTimeout(() => {
    const all = { ...state, centre: state.centre.map((v) => +v.toPrecision(9)), um: +state.um.toPrecision(6), split: +state.split.toFixed(4), across: +state.across };
    for (const source of sources) {
      source.channels.forEach((channel, c) => { all[`c${source.index}.${c}`] = [+channel.active, channel.color.slice(1), ...(channel.window ?? []).map((v) => +v.toPrecision(7))]; });
      if (source.kind === "labels") all[`l${source.index}`] = +source.active;
    }
    const text = Object.entries(all).map(([key, value]) => `${key}=${value}`).join("&");
    history.replaceState(null, "", `#${text}`);
  }, 150);
}

function recall() {
  const given = new URLSearchParams(location.hash.slice(1)), numbers = (key) => (given.get(key) ?? "").split(",").map(Number);
  const isVector = (v) => v.length === 3 && v.every(Number.isFinite);
  const number = (key, low, high) => { if (given.get(key) && Number.isFinite(+given.get(key))) state[key] = clamp(+given.get(key), low, high); };
  if (Object.hasOwn(PLANES, given.get("plane"))) state.plane = given.get("plane");
  if (isVector(numbers("at"))) state.at = numbers("at").map((i, axis) => clamp(Math.round(i), 0, base.shape[axis] - 1));
  if (isVector(numbers("centre"))) state.centre = numbers("centre");
  number("t", 0, $("time").max * 1);
  number("um", 1e-9, 1e12);
  number("split", 0, 1);
  number("opacity", 0, 1);
  if ([...$("style").options].some(({ value }) => value === given.get("style"))) state.style = given.get("style");
  if (given.has("across")) state.across = given.get("across") === "1";
  for (const source of sources) {
    source.channels.forEach((channel, c) => {
      const [active, color, low, high] = (given.get(`c${source.index}.${c}`) ?? "").split(",");
      if (active) channel.active = active === "1";
      if (/^[0-9a-f]{6}$/.test(color)) channel.color = `#${color}`;
      if (low && high && +low < +high && Number.isFinite(high - low)) setWindow(channel, [+low, +high], true);
      channel.show();
    });
    if (given.has(`l${source.index}`)) source.active = given.get(`l${source.index}`) === "1";
    source.show?.();
  }
  if (!state.um || !isVector(numbers("centre"))) fit();
  changed();
}

function changed() {
  redraw();
  remember();
}

// Hands on it

const pixel = (event) => {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) * (width / box.width), (event.clientY - box.top) * (height / box.height)].map(Math.floor);
};

function listen() {
  let start = null, turned = 0;
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    start = { last: pixel(event), moved: 0 };
  });
  canvas.addEventListener("pointermove", (event) => {
    const now = pixel(event);
    if (start) {
      const [dx, dy] = now.map((value, i) => value - start.last[i]);
      start.moved += Math.abs(dx) + Math.abs(dy);
      start.last = now;
      canvas.classList.toggle("dragged", start.moved > 3);
      if (start.moved > 3) pan(dx, dy);
    }
    readOut(...now);
  });
  canvas.addEventListener("pointerup", (event) => {
    if (start && start.moved <= 3) pick(...pixel(event));
    start = null;
    canvas.classList.remove("dragged");
  });
  canvas.addEventListener("pointerleave", () => $("readout").replaceChildren());
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    if (event.ctrlKey || event.metaKey || base.shape[axes()[0]] === 1) return zoom(Math.exp(clamp(event.deltaY, -100, 100) / 300), ...pixel(event));
    turned += event.deltaMode ? event.deltaY * 40 : event.deltaY;
    const n = Math.trunc(turned / 40);
    turned -= 40 * n;
    if (n) step(clamp(n, -3, 3));
    readOut(...pixel(event));
  }, { passive: false });
  document.addEventListener("keydown", (event) => {
    if (![canvas, document.body].includes(event.target) || event.ctrlKey || event.metaKey || event.altKey) return;
    const far = Math.round(Math.min(width, height) / 10), plane = Object.keys(PLANES)[event.key - 1];
    const actions = {
      ArrowLeft: () => pan(far, 0), ArrowRight: () => pan(-far, 0), ArrowUp: () => pan(0, far), ArrowDown: () => pan(0, -far),
      PageUp: () => step(1), PageDown: () => step(-1), "+": () => zoom(0.8), "=": () => zoom(0.8), "-": () => zoom(1.25), 0: fit,
    };
    const radio = [...document.getElementsByName("plane")].find(({ value }) => value === plane);
    const act = actions[event.key] ?? (radio && (() => radio.click()));
    if (!act) return;
    event.preventDefault();
    act();
  });
  const divider = $("divider"), split = (value) => { state.split = clamp(value, 0, 1); changed(); };
  divider.addEventListener("pointerdown", (event) => divider.setPointerCapture(event.pointerId));
  divider.addEventListener("pointermove", (event) => divider.hasPointerCapture(event.pointerId) && split(pixel(event)[0] / width));
  divider.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: state.split - 0.02, ArrowRight: state.split + 0.02, Home: 0, End: 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    split(to);
  });
  const follow = (id, take) => $(id).addEventListener("input", ({ target }) => { take(target); changed(); });
  follow("plane", ({ valueAsNumber }) => { state.at[axes()[0]] = valueAsNumber; });
  follow("time", ({ valueAsNumber }) => { state.t = valueAsNumber; });
  follow("opacity", ({ valueAsNumber }) => { state.opacity = valueAsNumber; });
  follow("style", ({ value }) => { state.style = value; });
  follow("across", ({ checked }) => { state.across = checked; });
  for (const [id, act] of [["in", () => zoom(0.8)], ["out", () => zoom(1.25)], ["fit", fit]]) $(id).addEventListener("click", act);
  addEventListener("hashchange", recall);
  new ResizeObserver(redraw).observe($("view"));
}

async function start() {
  const response = await fetch("scene.json");
  if (!response.ok) throw new Error(`the scene cannot be read: ${response.status}`);
  scene = await response.json();
  tileLength = scene.tile;
  sources = scene.sources.map((source, index) => {
    const of = (id) => keysOf(ARRAYS[source.dtype].of(source.dtype.endsWith("64") ? BigInt(id) : +id))[0];
    const channels = source.channels.map((channel) => ({ ...channel, color: `#${channel.color}` }));
    return { ...source, index, channels, active: true, colors: new Map(Object.entries(source.colors).map(([id, rgba]) => [of(id), rgba])) };
  });
  base = sources[0].levels[0];
  for (const source of sources) for (const channel of source.channels) if (channel.window) setWindow(channel, channel.window, true);
  state.at = base.shape.map((n) => n >> 1);
  state.centre = base.shape.map((n, axis) => position(axis, (n - 1) / 2));
  build();
  listen();
  recall();
}

start().catch((error) => say(error.message));
