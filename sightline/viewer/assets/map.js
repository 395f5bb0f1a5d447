// Looks at captures: a wall of heads, the map of one head or two, the words. Numbers come from a source, by the
// paths of the server; where the page was written to a file, the source is that file and computes them here.

const {assign, entries, fromEntries} = Object, {abs, ceil, exp, floor, hypot, log, log10, log2, max, min, round} = Math
const root = document.documentElement, ui = fromEntries(Array.from(document.querySelectorAll("[id]"), node => [node.id, node]))
const clamp = (x, low, high) => min(high, max(low, x))
const make = (tag, properties, ...children) => {
	const node = assign(document.createElement(tag), properties)
	node.append(...children)
	return node
}
const listen = (node, kind, action) => node.addEventListener(kind, action, {passive: false})
const put = (node, text) => {node.textContent = text;}
const span = (className, textContent, ...children) => make("span", {className, textContent}, ...children)
const press = buttons => {for (const id in buttons) ui[id].ariaPressed = Boolean(buttons[id]);}
const whole = n => round(n).toLocaleString("en")
function once(map, key, most, create) { // the newest are kept
	if (!map.has(key)) {
		if (map.size >= most) map.delete(map.keys().next().value)
		map.set(key, create())
	}
	return map.get(key)
}

// ---- source

const TILE = 256, STRIP = 1024, CHUNK = 4096; // pixels of a tile, values of a track, tokens of a piece of text
const fromHalf = (half, factor) => new Float32Array(half).map(x => x / factor)

class ServerSource {
	together = 4; // of the six that a browser allows, so that a weight need not wait for tiles
	async ask(path, signal) {
		const answer = await fetch(`${path}${path.includes("?") ? "&" : "?"}v=${manifest.version}`, {signal})
		if (!answer.ok) throw assign(Error(await answer.text()), {status: answer.status})
		return answer
	}
	async facts(path) {return (await this.ask(path)).json();}
	async numbers(path, signal) {
		const buffer = await (await this.ask(path, signal)).arrayBuffer(), head = new DataView(buffer)
		if (head.getUint32(0) !== 0x534c5431) throw Error("load the page again")
		const rows = head.getUint32(8, true), columns = head.getUint32(12, true), count = rows * columns
		const values = head.getUint8(4) === 1 ? new Float32Array(buffer, 20, count)
			: fromHalf(new Float16Array(buffer, 20, count), head.getFloat32(16, true))
		return {rows, columns, values}
	}
}

class EmbeddedSource {
	together = 1
	arrays = new Map()
	squares = new Map()
	array(name) {
		if (this.arrays.size > 80) this.arrays.clear(); // those of some heads
		return once(this.arrays, name, 99, () => {
			const text = document.getElementById(`array-${name}`).textContent
			if (name.endsWith("tokens")) return JSON.parse(text)
			const {buffer} = Uint8Array.fromBase64(text)
			return this.about(name).dtype === "float32" ? new Float32Array(buffer) : fromHalf(new Float16Array(buffer), /map|wall/.test(name) ? 4096 : 1)
		})
	}
	about(name) {return manifest.embedded.arrays[name];}

	// One head: the keys that a query may see by position, and exp(scale q.k + bias - logsumexp), NaN where hidden.
	head(c, layer, h) {
		const {queries: height, keys: width, layers, masks} = captures[c], {groups, heads, scales, softcaps, slopes, lengths} = manifest.embedded.captures[c]
		const row = layers.indexOf(layer), name = `c${c}-l${layer}-h${h}-`, shift = width - height, {before, after} = masks[row]
		const query = this.array(`${name}queries`), key = this.array(`c${c}-l${layer}-g${floor(h * groups / heads)}-keys`), size = query.length / height
		const logsumexp = this.array(`${name}logsumexp`), softcap = softcaps[row], slope = slopes[row]?.[h] ?? 0, end = min(width, lengths[row] ?? width)
		const extra = this.about(`${name}extra`) && this.array(`${name}extra`), [down, across] = this.about(`${name}extra`)?.shape ?? []
		const span = i => [max(0, i + shift - (before ?? width)), min(end, i + shift + 1 + (after ?? width))]
		const value = (i, j) => {
			let score = 0
			for (let a = i * size, b = j * size, stop = a + size; a < stop; a++, b++) score += query[a] * key[b]
			score *= scales[row]
			if (softcap) score = softcap * Math.tanh(score / softcap)
			score -= slope * abs(i + shift - j)
			if (extra) score += extra[(down > 1 ? i * across : 0) + (across > 1 ? j : 0)]
			return score === -Infinity ? NaN : exp(score - logsumexp[i])
		}
		const weight = (i, j) => j >= span(i)[0] && j < span(i)[1] ? value(i, j) : NaN
		return {height, width, span, value, weight, mass: (i, j, weight) => weight, live: i => logsumexp[i] > -Infinity}
	}
	map(c, layer, h) { // the same, of the squares that the kernel pooled
		const name = `c${c}-l${layer}-h${h}-`, [height, width] = this.about(`${name}mapmax`).shape, alive = new Int32Array(height)
		const largest = this.array(`${name}mapmax`), mass = this.array(`${name}mapmass`), block = 2 ** captures[c].map_level
		this.array(`${name}logsumexp`).forEach((x, i) => {alive[floor(i / block)] += x > -Infinity;})
		return {height, width, span: () => [0, width], value: (i, j) => largest[i * width + j],
			mass: (i, j) => mass[i * width + j] * alive[i], live: i => alive[i]}
	}
	async square({height, width, span, value, mass, live}, level, row, column, signal) { // both poolings in one pass
		const step = 2 ** level, top = row * TILE * step, left = column * TILE * step
		const bottom = min(height, top + TILE * step), right = min(width, left + TILE * step)
		const rows = ceil((bottom - top) / step), columns = ceil((right - left) / step)
		const most = new Float32Array(rows * columns).fill(NaN), sum = most.slice(), alive = new Int32Array(rows)
		let until = performance.now() + 8; // in slices, so that the page goes on moving
		for (let i = top; i < bottom; i++) {
			if (performance.now() > until) {
				await new Promise(go => {setTimeout(go);})
				signal.throwIfAborted()
				until = performance.now() + 8
			}
			const [from, to] = span(i), y = floor((i - top) / step)
			alive[y] += live(i)
			for (let j = max(from, left), stop = min(to, right); j < stop; j++) {
				const weight = value(i, j), p = y * columns + floor((j - left) / step)
				if (isNaN(weight)) continue
				if (!(most[p] >= weight)) most[p] = weight
				sum[p] = (sum[p] || 0) + mass(i, j, weight)
			}
		}
		return {rows, columns, max: most, sum: sum.map((x, p) => x / max(1, alive[floor(p / columns)]))}
	}
	async numbers(path, signal) {
		const [what, c, layer, h, name, level, row, column] = path.split("/").map(part => isNaN(part) ? part : +part)
		if (what === "wall") return {values: this.array(`c${c}-wall`)}
		if (what === "track") return this.track(this.array(`c${c}-l${layer}-h${h}-${name}`), 2 ** level, row)
		const at = [c, layer, h, level, row, column].join(), base = captures[c].map_level, pooled = base !== null && level >= base
		if (!this.squares.has(at)) {
			const found = await this.square(this[pooled ? "map" : "head"](c, layer, h), pooled ? level - base : level, row, column, signal)
			once(this.squares, at, 64, () => found)
		}
		const {rows, columns, [name]: values} = this.squares.get(at)
		return {rows, columns, values}
	}
	track(all, each, index) {
		const from = index * STRIP * each, columns = min(STRIP, ceil((all.length - from) / each)), values = new Float32Array(2 * columns)
		for (let n = 0; n < columns; n++) {
			const part = all.subarray(from + n * each, from + (n + 1) * each)
			values[n] = part.reduce((a, b) => a + b) / part.length
			values[columns + n] = part.reduce((a, b) => max(a, b))
		}
		return {rows: 2, columns, values}
	}
	async facts(path) {
		const [place, question] = path.split("?"), [what, c, layer, h, ...rest] = place.split("/"), [at, other] = rest.map(Number)
		if (what === "text") return this.array(`c${c}-${layer}tokens`).slice(h * CHUNK, (+h + 1) * CHUNK)
		if (what === "search") return this.search(c, new URLSearchParams(question))
		const {height, width, weight} = this.head(c, +layer, +h), looking = what === "query"
		if (what === "weight") return {weight: weight(at, other)}
		const line = Float64Array.from({length: looking ? width : height}, (_, n) => looking ? weight(at, n) : weight(n, at))
		const order = [...line.keys()].filter(n => line[n] > 0).sort((a, b) => line[b] - line[a] || a - b).slice(0, looking ? 8 : 16)
		const facts = (looking ? ["entropy", "sink", "distance"] : ["received"]).map(name => [name, this.array(`c${c}-l${layer}-h${h}-${name}`)[at]])
		return {...fromEntries(facts), [looking ? "keys" : "queries"]: order, weights: order.map(n => line[n])}
	}
	search(c, question) { // over the ends of tokens, without regard to case
		const parts = this.array(`c${c}-keytokens`).map(part => (part + captures[c].separator).toLowerCase()), starts = [0]
		for (const part of parts) starts.push(starts.at(-1) + part.length)
		const all = parts.join(""), text = question.get("text").toLowerCase(), at = []
		let n = +question.get("after"), from = all.indexOf(text, starts[n])
		while (from >= 0 && at.length < 1000) {
			while (starts[n + 1] <= from) n++
			at.push(n)
			from = all.indexOf(text, starts[n + 1])
		}
		return {at, more: from >= 0}
	}
}

// ---- state

let source, manifest, captures, here; // `here` is the capture on show
// `one` is the head on show, `two` the one beside it; `list` is the side of the word whose weights are listed.
const state = {one: null, two: null, mode: "one", pool: "max", log: true, order: "layer", down: true, filter: "",
	cell: null, pin: null, list: "query", wall: null}
const view = {x: 0, y: 0, size: 1, whole: true}; // top left token, pixels a token
const heads = () => state.mode === "one" ? [state.one] : [state.one, state.two]
const pooled = () => state.pool === "max" ? "largest" : "mass"
const difference = () => state.mode === "difference"
const find = (c, layer, h) => captures[c]?.heads.find(spec => spec.layer === layer && spec.head === h)
const from = spec => spec.capture === here ? "" : ` of ${spec.capture.name}`
const long = spec => `Layer ${spec.layer}, head ${spec.head}${from(spec)}`
const alike = (a, b) => a.keys === b.keys && a.queries === b.queries && a.same === b.same
const count = side => side === "key" ? here.keys : here.queries
// The word that is spoken of, as a query or as a key, and the cell where it meets another.
const looking = () => state.list === "query", facing = () => looking() ? "key" : "query"
const subject = () => state.pin?.[state.list] ?? state.cell[state.list]
const meet = other => looking() ? {query: subject(), key: other} : {query: other, key: subject()}

// ---- tiles and cache

const store = new Map(), MOST = 160; // numbers by path, newest last; about half a megabyte each
const underway = new Map(), refused = new Map(), chunks = new Map()
let fault = "", since = 0, wants = [], drawn
const want = (path, urgency) => wants.push([urgency, path])

function have(path) {
	const found = store.get(path)
	return found && keep(path, found)
}
function keep(path, numbers) {
	store.delete(path)
	store.set(path, numbers)
	if (store.size > MOST) store.delete(store.keys().next().value)
	return numbers
}
function demand() { // what the picture needs, most urgent first; the rest is called off
	const now = performance.now(), missing = new Set(wants.sort((a, b) => a[0] - b[0]).map(([, path]) => path).filter(path => !store.has(path)))
	const paths = [...missing].filter(path => !(refused.get(path)?.until > now)), left = paths.length
	for (const [path, stop] of underway) {
		if (missing.has(path)) continue
		stop.abort()
		underway.delete(path)
	}
	for (const path of paths) if (underway.size < source.together && !underway.has(path)) load(path)
	since = left ? since || now : 0
	ui.stage.ariaBusy = left > 0
	const text = (missing.size > left ? refused.get([...missing].find(path => !paths.includes(path))).message : fault) || (left && now - since > 350 ? `computing, ${left} to go` : "")
	if (ui.status.textContent !== text) put(ui.status, text)
	if (left && !text) setTimeout(draw, 400)
}
async function load(path) {
	const stop = new AbortController(), {signal} = stop
	underway.set(path, stop)
	try {
		const numbers = await source.numbers(path, signal)
		if (!signal.aborted) keep(path, numbers)
	} catch ({status, message}) {
		if (signal.aborted) return
		refused.set(path, {until: performance.now() + 2000, message: status ? message : "The server does not answer"})
		setTimeout(draw, 2100)
	}
	if (underway.get(path) === stop) underway.delete(path)
	draw()
}
// The text of one token, or null as long as its piece of the text is on the way.
function word(side, n) {
	if (here.same && side === "query") return word("key", n + here.shift)
	if (n < 0 || n >= count(side)) return null
	const path = `text/${here.id}/${side}/${floor(n / CHUNK)}`
	if (!chunks.has(path)) {
		chunks.set(path, null)
		source.facts(path).then(tokens => {chunks.set(path, tokens); draw(); inspectSoon();},
			() => setTimeout(() => chunks.delete(path), 2000))
	}
	return chunks.get(path)?.[n % CHUNK] ?? null
}

// ---- colours

const dark = () => root.dataset.theme === "dark"
function oklch(L, C, degrees) {
	const hue = degrees * Math.PI / 180, a = C * Math.cos(hue), b = C * Math.sin(hue)
	const l = (L + 0.39634 * a + 0.2158 * b) ** 3
	const m = (L - 0.10556 * a - 0.06385 * b) ** 3
	const s = (L - 0.08948 * a - 1.29149 * b) ** 3
	return [
		4.07674 * l - 3.30771 * m + 0.23097 * s,
		-1.26844 * l + 2.60976 * m - 0.34132 * s,
		-0.0042 * l - 0.70342 * m + 1.70761 * s,
	].map(x => round(255 * clamp(x <= 0.0031308 ? 12.92 * x : 1.055 * x ** (1 / 2.4) - 0.055, 0, 1)))
}
// One ramp, even in lightness, from indigo over teal to yellow; light theme reads it backwards: more weight stands out.
const ramp = Array.from({length: 255}, (_, n) => oklch(0.24 + 0.73 * n / 254,
	0.035 + 0.1 * Math.sin(Math.PI * (0.12 + 0.78 * n / 254)), 292 - 186 * n / 254))
// Differences: blue where the other head has more, orange where this one has; none is as light as the page.
const fork = [false, true].map(night => Array.from({length: 255}, (_, n) => {
	const far = abs(n - 127) / 127
	return oklch(night ? 0.27 + 0.55 * far : 0.965 - 0.5 * far, 0.004 + 0.146 * far ** 0.8, n < 127 ? 250 : 50)
}))
const colourAt = (level, signed) => signed ? fork[+dark()][level - 1] : ramp[dark() ? level - 1 : 255 - level]
const inkOn = level => (difference() ? abs(level - 128) > 78 : level > 140) === dark() ? "#10151c" : "#f6f7f8"

// The logarithmic scale begins at about a tenth of an even share; the linear one ends at the largest weight.
let least = -4, most = 1
function levelOf(value, signed = difference()) { // 1 to 255; 0 is hidden
	if (isNaN(value)) return 0
	const size = abs(value), t = clamp(state.log ? 1 - log10(max(size, 1e-30)) / least : size / most, 0, 1)
	return signed ? 128 + Math.sign(value) * round(127 * t) : 1 + round(254 * t)
}
// A pixel's colour by the upper half of its number's bits: finer than the ramp, and no logarithm a pixel.
const tables = [new Uint32Array(65536), new Uint32Array(65536)]
let stamp = 0
function recolour() {
	const bits = new Uint32Array(1), number = new Float32Array(bits.buffer)
	least = -clamp(round(log10(here.keys) + 1.3), 3, 9)
	most = state.pool === "max" ? max(...heads().map(spec => tallest(thumb(spec)))) : 1
	for (const signed of difference() ? [false, true] : [false]) {
		const packed = Uint32Array.from({length: 256}, (_, level) => {
			const [r, g, b] = level ? colourAt(level, signed) : []
			return level && (255 << 24 | b << 16 | g << 8 | r) >>> 0
		})
		for (let upper = 0; upper < 65536; upper++) {
			bits[0] = upper << 16 | 0x8000
			tables[+signed][upper] = packed[levelOf(number[0], signed)]
		}
	}
	stamp++
	named.clear()
	tellColours()
	drawWall()
	draw()
}
const tallest = values => values.reduce((a, b) => b > a ? b : a, 0) || 1
function colour(values, columns, canvas, table) {
	const bits = new Uint32Array(values.buffer, values.byteOffset, values.length), image = new ImageData(columns, values.length / columns)
	const pixels = new Uint32Array(image.data.buffer)
	for (let p = 0; p < pixels.length; p++) pixels[p] = table[bits[p] >>> 16]
	canvas.getContext("2d").putImageData(image, 0, 0)
}
// The numbers of a tile as a picture, made once; of two tiles, their difference.
function picture(tile, other) {
	if (tile.stamp !== stamp || tile.other !== other) {
		const {rows, columns, values} = tile, canvas = tile.canvas ?? new OffscreenCanvas(columns, rows)
		colour(other ? values.map((x, p) => x - other.values[p]) : values, columns, canvas, tables[other ? 1 : 0])
		assign(tile, {canvas, other, stamp})
	}
	return tile.canvas
}

// ---- shown text

const NAMED = {"\n": "\u21b5", "\r": "\u240d", "\t": "\u21e5"}
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u115f\u180e\u200b-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff\ufff9-\ufffb\ufffe\uffff\ud800-\udfff]|[\u{e0000}-\u{e0fff}]/gu
function sign(c) {
	const code = c.codePointAt(0)
	if (NAMED[c]) return NAMED[c]
	if (code < 32) return String.fromCharCode(0x2400 + code)
	return code === 127 ? "\u2421" : `\u2039${code.toString(16).toUpperCase().padStart(4, "0")}\u203a`
}
// A joiner inside an emoji belongs to its picture; elsewhere it is a character that must be seen.
const unseen = text => text.replace(UNSEEN, (c, at) =>
	c === "\u200d" && at > 0 && /\p{Extended_Pictographic}/u.test(text.slice(at + 1, at + 3)) ? c : sign(c))
const visible = text => text.trim() ? unseen(text) : unseen(text).replace(/ /g, "\u00b7") || "\u2205"
const label = (side, n) => visible(word(side, n)?.trim() || (word(side, n) ?? "\u2026"))
function around(side, at, room = 32) { // some characters to each side, token by token
	const part = step => {
		let out = "", token
		for (let n = at + step; out.length < room && (token = word(side, n)) !== null; n += step) {
			out = step < 0 ? unseen(token) + here.separator + out : out + here.separator + unseen(token)
		}
		return make("bdi", {textContent: out, dir: "auto"})
	}
	return [part(-1), make("mark", {textContent: visible(word(side, at) ?? "\u2026"), dir: "auto"}), part(1)]
}
function weightText(weight) {
	if (weight === null || isNaN(weight)) return "hidden"
	return weight === 0 ? "0" : abs(weight) >= 0.001 ? weight.toPrecision(5) : weight.toExponential(4)
}
function short(x) {
	const size = abs(x)
	return size >= 1e4 ? `${(x / 1000).toFixed(1)}k` : size >= 100 ? x.toFixed(0) : size >= 10 ? x.toFixed(1) : x.toFixed(2)
}

// ---- view transform

const LABELS = 84, TRACK = 24, GAP = 5, TOP = LABELS + TRACK + 2 * GAP, LEFT = LABELS + 2 * TRACK + 3 * GAP, CLOSEST = 72
let panes = [], fit = 1
const xOf = (pane, j) => pane.left + (j - view.x) * view.size
const yOf = (pane, i) => pane.top + (i - view.y) * view.size
// The finest level whose pixels are no smaller than the screen's: none is skipped, so no strong weight is.
const levelFor = ratio => clamp(ceil(-log2(view.size * ratio) - 1e-6), 0, here.levels - 1)

function layout() {
	const {clientWidth, clientHeight} = ui.stage, ratio = devicePixelRatio, side = state.mode === "side", [old] = panes
	for (const canvas of [ui.map, ui.overlay]) {
		assign(canvas, {width: round(clientWidth * ratio), height: round(clientHeight * ratio)})
	}
	const between = 2 * TRACK + 4 * GAP, height = max(40, clientHeight - TOP - 2)
	const width = max(40, side ? (clientWidth - LEFT - between) / 2 - 2 : clientWidth - LEFT - 2)
	panes = (side ? [[state.one], [state.two]] : [heads()]).map((specs, n) =>
		({specs, left: LEFT + n * (width + between), top: TOP, width, height, first: !n}))
	fit = min(width / here.keys, height / here.queries)
	if (view.whole) view.size = fit
	else if (old) {
		view.x += (old.width - width) / view.size / 2
		view.y += (old.height - height) / view.size / 2
	}
	settle()
}
function settle() { // keep the map inside its box; a map smaller than the box stands in its middle
	view.size = clamp(view.size, fit, max(fit, CLOSEST))
	view.whole = view.size <= fit * 1.0001
	const columns = panes[0].width / view.size, rows = panes[0].height / view.size
	view.x = columns >= here.keys ? (here.keys - columns) / 2 : clamp(view.x, 0, here.keys - columns)
	view.y = rows >= here.queries ? 0 : clamp(view.y, 0, here.queries - rows)
	draw()
	remember()
}
function zoom(factor, x, y, pane = panes[0]) {
	const before = view.size, after = view.size = clamp(before * factor, fit, max(fit, CLOSEST)), less = 1 / before - 1 / after
	view.x += (x - pane.left) * less
	view.y += (y - pane.top) * less
	settle()
}
function zoomHere(factor) { // about the cell, or what in view is next to it
	const [pane] = panes, {left, top, width, height} = pane, {query, key} = state.cell
	zoom(factor, clamp(xOf(pane, key + 0.5), left, left + width), clamp(yOf(pane, query + 0.5), top, top + height))
}
function goTo(y, x, size) {
	view.size = clamp(size, fit, CLOSEST)
	view.x = x - panes[0].width / view.size / 2
	view.y = y - panes[0].height / view.size / 2
	settle()
}
function reveal({query, key}) { // move as little as needed
	const rows = panes[0].height / view.size, columns = panes[0].width / view.size
	view.y = clamp(view.y, query + 1 - rows, query)
	view.x = clamp(view.x, key + 1 - columns, key)
	settle()
}
const frameOf = pane => ({ // the part of the box where the map is
	left: max(pane.left, xOf(pane, 0)), right: min(pane.left + pane.width, xOf(pane, here.keys)),
	top: pane.top, bottom: min(pane.top + pane.height, max(yOf(pane, here.queries), pane.top + 1)),
})

// ---- drawing

const FAMILY = getComputedStyle(document.body).fontFamily, named = new Map()
const css = name => once(named, name, 99, () => getComputedStyle(root).getPropertyValue(`--${name}`).trim())
const fontOf = ({size = 11, bold, italic}) => `${italic ? "italic " : ""}${bold ? 600 : 400} ${size}px ${FAMILY}`

// Two pens: on a canvas, and as SVG.
class CanvasPen {
	constructor(context) {this.context = context;}
	open(width, height) {
		this.context = new OffscreenCanvas(width * FINE, height * FINE).getContext("2d")
		this.context.scale(FINE, FINE)
	}
	bars(list, fill, alpha = 1) {
		assign(this.context, {fillStyle: fill, globalAlpha: alpha}).beginPath()
		for (const bar of list) this.context.rect(...bar)
		this.context.fill()
		this.context.globalAlpha = 1
	}
	text(x, y, text, style) {
		const {fill, align = "left", turn} = style, {context} = this
		assign(context, {font: fontOf(style), fillStyle: fill, textAlign: align, textBaseline: "middle", direction: "ltr"}).save()
		context.translate(x, y)
		if (turn) context.rotate(-Math.PI / 2)
		context.fillText(text, 0, 0)
		context.restore()
	}
	image(canvas, ...place) {
		this.context.imageSmoothingEnabled = false
		this.context.drawImage(canvas, ...place)
	}
}
class SvgPen {
	parts = []
	open(width, height) {
		this.parts.push(`<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family="${this.escape(FAMILY)}">`)
	}
	escape = text => String(text).replace(/[&<>"]/g, c => `&#${c.charCodeAt(0)};`)
	tag(name, attributes, inside = "") {
		const written = entries(attributes).filter(([, value]) => value !== undefined)
			.map(([key, value]) => ` ${key}="${this.escape(typeof value === "number" ? +value.toFixed(2) : value)}"`)
		this.parts.push(`<${name}${written.join("")}>${this.escape(inside)}</${name}>`)
	}
	bars(list, fill, opacity) {
		const path = list.map(bar => bar.map(n => +n.toFixed(2))).map(([x, y, w, h]) => `M${x} ${y}h${w}v${h}h${-w}z`)
		this.tag("path", {d: path.join(""), fill, opacity})
	}
	text(x, y, text, {fill, align, turn, size = 11, bold, italic}) {
		this.tag("text", {x, y, dy: "0.35em", fill, "font-size": size, "text-anchor": {center: "middle", right: "end"}[align],
			"font-weight": bold && 600, "font-style": italic ? "italic" : undefined, "xml:space": "preserve",
			transform: turn ? `rotate(-90 ${x.toFixed(2)} ${y.toFixed(2)})` : undefined}, text)
	}
	image(canvas, x, y, width, height) {
		this.tag("image", {x, y, width, height, preserveAspectRatio: "none", href: canvas.toDataURL()})
	}
}

let queued = false
function draw() {
	if (queued || !panes.length) return
	queued = true
	requestAnimationFrame(() => {queued = false; paint(); drawOverlay();})
}
function surface(canvas) {
	const context = canvas.getContext("2d"), ratio = devicePixelRatio
	context.setTransform(ratio, 0, 0, ratio, 0, 0)
	context.clearRect(0, 0, canvas.width, canvas.height)
	return context
}
function paint() {
	const context = surface(ui.map), ratio = devicePixelRatio, pen = new CanvasPen(context)
	wants = []
	for (const pane of panes) {
		context.setTransform(1, 0, 0, 1, 0, 0)
		drawTiles(context, pane, ratio)
		context.setTransform(ratio, 0, 0, ratio, 0, 0)
		drawNumbers(pen, pane)
		drawAxes(pen, pane)
	}
	demand()
}
function clip(context, x, y, width, height, inside) {
	context.save()
	context.beginPath()
	context.rect(x, y, width, height)
	context.clip()
	inside()
	context.restore()
}
const tilePath = (spec, level, row, column) => `tile/${spec.path}/${state.pool}/${level}/${row}/${column}`
function blank({capture, layer}, level, row, column) { // nothing of the tile is seen, by position
	const {before, after} = capture.masks[capture.layers.indexOf(layer)], {queries, keys, length} = capture
	const size = TILE * 2 ** level, first = row * size + keys - queries, last = min(keys, first + size) - 1
	const left = column * size, right = min(keys, left + size) - 1
	return (after !== null && left > last + after) || (before !== null && right < first - before) || left >= (length ?? keys)
}
const hatch = ratio => once(named, `hatch ${ratio}`, 99, () => {
	const side = round(6 * ratio), tile = new OffscreenCanvas(side, side), pen = tile.getContext("2d")
	assign(pen, {strokeStyle: css("line"), lineWidth: ratio})
	for (const x of [-side, 0, side]) {
		pen.moveTo(x, side)
		pen.lineTo(x + side, 0)
	}
	pen.stroke()
	return pen.createPattern(tile, "repeat")
})
function drawTiles(context, pane, ratio) { // in the screen's own pixels
	const level = levelFor(ratio), last = here.levels - 1, size = TILE * 2 ** level, {left, top, right, bottom} = frameOf(pane)
	const X = j => round(xOf(pane, j) * ratio), Y = i => round(yOf(pane, i) * ratio)
	const [x0, y0] = [left, top].map(n => round(n * ratio)), width = round(right * ratio) - x0, height = round(bottom * ratio) - y0
	const held = (l, row, column) => {
		const tiles = pane.specs.map(spec => have(tilePath(spec, l, row, column)))
		return tiles.every(Boolean) && picture(...tiles)
	}
	const place = (canvas, l, row, column) => { // only the pixels in view, so that their edges are exact
		const step = 2 ** l, cut = (from, room, at, count) => [floor(from / step), ceil((from + room / view.size) / step)]
			.map(n => clamp(n - at * TILE, 0, count))
		const [a, b] = cut(view.x, pane.width, column, canvas.width), [c, d] = cut(view.y, pane.height, row, canvas.height)
		if (b <= a || d <= c) return
		const x = X((column * TILE + a) * step), y = Y((row * TILE + c) * step)
		context.drawImage(canvas, a, c, b - a, d - c, x, y, X((column * TILE + b) * step) - x, Y((row * TILE + d) * step) - y)
	}
	const rows = axisOf(pane, "query"), columns = axisOf(pane, "key")
	const bar = (...box) => {context.fillStyle = css("surface"); context.fillRect(...box);}
	for (const spec of pane.specs) want(tilePath(spec, last, 0, 0), 0)
	clip(context, x0, y0, width, height, () => {
		context.fillStyle = hatch(ratio)
		context.fillRect(x0, y0, width, height)
		context.imageSmoothingEnabled = false
		for (let row = floor(rows.from / size); row * size < rows.to; row++) {
			for (let column = floor(columns.from / size); column * size < columns.to; column++) {
				if (pane.specs.some(spec => blank(spec, level, row, column))) continue
				const x = X(column * size), y = Y(row * size), x1 = X((column + 1) * size), y1 = Y((row + 1) * size), own = held(level, row, column)
				const far = hypot((x + x1) / 2 - x0 - width / 2, (y + y1) / 2 - y0 - height / 2)
				for (const spec of pane.specs) want(tilePath(spec, level, row, column), 2 + far)
				if (own) place(own, level, row, column)
				if (own) drawn ||= performance.mark("sightline:first-tile")
				for (let l = level + 1, near = own; !near && l <= last; l++) { // the nearest coarser one
					const at = [row, column].map(n => floor(n / 2 ** (l - level)))
					near = held(l, ...at)
					if (near) clip(context, x, y, x1 - x, y1 - y, () => place(near, l, ...at))
				}
			}
		}
		if (view.size >= 14) { // the grid
			for (let j = ceil(view.x); X(j) < x0 + width; j++) bar(X(j), y0, round(ratio), height)
			for (let i = ceil(view.y); Y(i) < y0 + height; i++) bar(x0, Y(i), width, round(ratio))
		}
	})
}
function valueAt(spec, i, j, level) { // undefined where its tile is not here
	const y = floor(i / 2 ** level), x = floor(j / 2 ** level), tile = store.get(tilePath(spec, level, floor(y / TILE), floor(x / TILE)))
	return tile?.values[y % TILE * tile.columns + x % TILE]
}
function drawNumbers(pen, pane) {
	const rows = axisOf(pane, "query"), columns = axisOf(pane, "key")
	for (let i = floor(rows.from); view.size >= 32 && i < rows.to; i++) {
		for (let j = floor(columns.from); j < columns.to; j++) {
			const weight = pane.specs.map(spec => valueAt(spec, i, j, 0)).reduce((a, b) => a - b), size = abs(weight)
			if (!(size >= 0) || !rows.seen(i) || !columns.seen(j)) continue
			const text = size >= 0.0005 ? weight.toFixed(3).replace(/^(-?)0/, "$1") : size > 0 ? weight.toExponential(0) : "0"
			pen.text(columns.at(j + 0.5), rows.at(i + 0.5), text, {fill: inkOn(levelOf(weight)), align: "center"})
		}
	}
}

// ---- ruler and tracks

const pencil = new OffscreenCanvas(1, 1).getContext("2d"), cuts = new Map(), marked = new Map()
const cut = (text, room, style = {}) => once(cuts, `${room} ${fontOf(style)} ${text}`, 3000, () => {
	const letters = [...text]
	let out = text
	pencil.font = fontOf(style)
	for (let n = min(60, letters.length - 1); n && pencil.measureText(out).width > room; n--) out = `${letters.slice(0, n).join("")}\u2026`
	return out
})
// Sections, and between them lines, none nearer than the gap; by the zoom alone, so that they hold still.
const landmarks = gap => once(marked, `${here.id} ${gap}`, 8, () => {
	const {titles, lines} = here.sections, out = []
	for (const [at, text] of titles) if (!out.length || at - out.at(-1).at >= gap) out.push({at, text, kind: "title"})
	if (here.keys / lines.length < gap * 0.6) return out
	let n = 0, free = 0; // the next title, and where there is room again
	const fitting = []
	for (const at of lines) {
		while (n < out.length && out[n].at <= at) free = out[n++].at + gap
		if (at < free || out[n]?.at < at + gap) continue
		fitting.push({at, kind: "line"})
		free = at + gap
	}
	return [...out, ...fitting].sort((a, b) => a.at - b.at)
})
function lineAt(at) { // the beginning of a line
	let out = "", token
	for (let n = at; out.length < 28 && n < at + 24 && (token = word("key", n)) !== null; n++) {
		const [head, ...rest] = token.split("\n")
		out += head
		if (rest.length && out.trim()) break
		out += here.separator
	}
	return unseen(out.trim().replace(/\s+/g, " "))
}
// One axis of a pane: what runs along it is drawn by the same code for keys, across, and queries, down.
function axisOf(pane, side) {
	const {left, top, right, bottom} = frameOf(pane), keys = side === "key", shift = keys ? 0 : here.shift
	const at = n => keys ? xOf(pane, n) : yOf(pane, n), [start, end, edge, far] = keys ? [left, right, top, bottom] : [top, bottom, left, right]
	const first = keys ? view.x : view.y, from = max(0, first), to = min(count(side), first + (keys ? pane.width : pane.height) / view.size)
	return {side, keys, shift, at, start, end, edge, far, from, to, box: (a, b, size, depth) => keys ? [a, b, size, depth] : [b, a, depth, size],
		seen: n => at(n + 0.5) >= start && at(n + 0.5) <= end}
}
// What it says in view: words where they fit, else sections and lines, else round numbers.
function ruler({side, keys, shift, from, to}) {
	const out = []
	if (view.size >= 11.5) {
		for (let n = floor(from); n < to; n++) out.push({n, text: label(side, n), kind: isWritten(side, n) ? "written" : "word"})
		return out
	}
	for (const {at, text, kind} of keys || here.same ? landmarks(2 ** (ceil(2 * log2(15 / view.size)) / 2)) : []) {
		if (at - shift >= from && at - shift < to) out.push({n: at - shift, text: text ? unseen(text) : lineAt(at), kind})
	}
	const rough = 38 / view.size, ten = 10 ** floor(log10(rough)), gap = 14 / view.size, marks = out.length
	const every = max(1, [1, 2, 5, 10].map(n => n * ten).find(n => n >= rough))
	for (let n = ceil((from + shift) / every) * every - shift, near = 0; n < to; n += every) {
		while (near < marks && out[near].n < n - gap) near++
		if (near === marks || out[near].n > n + gap) out.push({n, text: whole(n + shift)})
	}
	return out
}
const isWritten = (side, n) => here.prompt !== null && (side === "key" ? n : here.same && n + here.shift) >= here.prompt
function drawLabel(pen, {keys, at, edge, start, end}, n, text, style) {
	const place = at(n + 0.5), out = edge - (keys ? 1 : 2) * (TRACK + GAP) - GAP, short = cut(text, LABELS - 6, style)
	const flat = view.size >= 34 && cut(text, view.size - 4, style) === text
	if (!keys) pen.text(out, clamp(place, start, end), short, {...style, align: "right"})
	else pen.text(place, flat ? out - 6 : out, short, {...style, align: flat ? "center" : "left", turn: !flat})
}
function drawAxes(pen, pane) {
	for (const side of ["key", "query"]) {
		const axis = axisOf(pane, side), {keys, at, start, end, edge, far, seen, box, shift} = axis
		const tick = (n, size, name) => seen(n) && pen.bars([box(at(n + 0.5) - size / 2, edge - GAP - size, size, GAP + size)], css(name))
		pen.bars([edge - 1, far].map(line => box(start - 1, line, end - start + 2, 1)), css("line"))
		for (const {n, text, kind} of keys || pane.first ? ruler(axis) : []) {
			const style = {fill: css({written: kind, title: "ink"}[kind] ?? "muted"), italic: kind === "written"}
			if (kind === "title") tick(n, 1, "muted")
			if (seen(n)) drawLabel(pen, axis, n, text, style)
		}
		if (keys || here.same) hits.at.forEach((hit, n) => tick(hit - shift, n === hits.now ? 3 : 1, "accent"))
		for (const [name, n] of keys ? [["received", 0]] : [["entropy", 0], ["top", 1]]) drawTrack(pen, pane, axis, name, n)
		for (const [text, n, name] of [["written", here.prompt, "written"], ["padding", here.length, "muted"]]) {
			if (n === null || !(keys || here.same) || !seen(n - shift)) continue
			pen.bars([box(at(n - shift), edge, 1, far - edge)], css(name))
			if (keys) pen.text(at(n) + 4, edge + 9, text, {fill: css(name), size: 10})
		}
	}
}
function drawTrack(pen, pane, {keys, at, start, end, edge, from, to, box}, name, n) {
	const last = here.levels - 1, level = levelFor(1), one = STRIP * 2 ** level, bars = [[], []], path = (l, index) => `track/${pane.specs[0].path}/${name}/${l}/${index}`
	const all = have(path(last, 0)), base = edge - GAP - n * (TRACK + GAP), gap = view.size >= 6 ? 1 : 0
	want(path(last, 0), 1)
	if (!all) return
	// A sink receives thousands of times what another key does, and top weights fall with the length.
	const highest = tallest(all.values), low = keys ? min(0.01, highest / 100) : 10 ** least, bent = state.log && name !== "entropy"
	const scale = value => bent ? log(max(value, low) / low) / log(highest / low) : value / highest
	for (let index = floor(from / one); index * one < to; index++) {
		let l = level, place = index, found = have(path(l, place))
		want(path(l, place), 1e5)
		while (!found) found = have(path(++l, place = floor(place / 2)))
		const step = 2 ** l
		for (let i = floor(max(from, index * one) / step); i * step < min(to, (index + 1) * one); i++) {
			const a = clamp(at(i * step), start, end), length = max(0, min(at((i + 1) * step), end) - a - gap)
			for (const row of [0, 1]) {
				const size = TRACK * clamp(scale(found.values[row * found.columns + i - place * STRIP]), 0, 1)
				bars[row].push(box(a, base - size, length, size))
			}
		}
	}
	bars.forEach((list, row) => pen.bars(list, css("muted"), row ? 0.38 : 0.7))
	const notes = [[name, "ink", -6], [`${bent ? "log, " : ""}max ${short(highest)}`, "muted", 6]]
	for (const [text, fill, off] of keys && !pane.first ? [] : notes) {
		const style = {fill: css(fill), size: 10, align: keys ? "right" : "left", turn: !keys}
		if (keys) pen.text(start - 2 * TRACK - 3 * GAP, base - TRACK / 2 + off, text, style)
		else pen.text(base - TRACK / 2 + off, start - TRACK - 2 * GAP - 4, text, style)
	}
}
function drawOverlay() {
	const context = surface(ui.overlay), pen = new CanvasPen(context), accent = css("accent"), size = max(view.size, 1), fine = view.size < 4, {cell, pin} = state
	for (const pane of panes) {
		const {left, top, right, bottom} = frameOf(pane)
		const cross = (axis, n) => { // two lines around large cells, one through small ones
			const {at, box, edge, far, start, end, keys} = axis, a = at(n), b = edge - GAP - TRACK, depth = far - b
			if (a + size < start || a > end) return
			pen.bars((fine ? [a] : [a - 1, a + size]).map(line => box(line, b, 1, depth)), accent, fine ? 0.55 : 0.75)
			if (!keys && !pane.first) return
			const room = keys ? clamp(view.size, 16, 60) : 16
			pen.bars([box(clamp(a + view.size / 2, start, end) - room / 2, edge - (keys ? TOP : LEFT), room, LABELS + GAP)], css("surface"))
			drawLabel(pen, axis, n, label(axis.side, n), {fill: accent})
		}
		const ring = ({query, key}, strokeStyle, lineWidth) => {
			const x = xOf(pane, key + 0.5), y = yOf(pane, query + 0.5), radius = clamp(view.size * 0.47, 4, 32)
			if (x < left || x > right || y < top || y > bottom) return
			assign(context, {strokeStyle, lineWidth}).beginPath()
			if (view.size < 20) context.arc(x, y, min(radius, 8), 0, 7)
			else context.rect(x - radius, y - radius, 2 * radius, 2 * radius)
			context.stroke()
		}
		clip(context, pane.first ? 0 : left - 2 * TRACK - 2 * GAP, 0, 1e4, bottom + 1, () => {
			for (const side of ["query", "key"]) for (const n of new Set([pin?.[side] ?? cell[side], cell[side]])) cross(axisOf(pane, side), n)
			for (const [other] of pin ? listed() : []) {
				ring(meet(other), css("surface"), 3)
				ring(meet(other), accent, 1.5)
			}
			if (fine) ring(cell, accent, 1)
		})
	}
}
function quantity() {
	const what = pooled().replace("largest", "weight")
	return difference() ? `${what}: ${state.one.short} minus ${state.two.short}${from(state.two)}` : what
}
function barTicks() {
	const ten = n => n >= -3 ? String(10 ** n) : `1e${n}`, every = ceil(-least / (difference() ? 3 : 6))
	const powers = Array.from({length: -least}, (_, n) => -n).filter(n => n % every === 0 && n - least > -least / 5 || !n).reverse()
	const up = state.log ? [[0, `\u2264\u200a${ten(least)}`], ...powers.map(n => [1 - n / least, ten(n)])]
		: [0, 0.5, 1].map(t => [t, t ? (t * most).toPrecision(2) : "0"])
	if (!difference()) return up
	const side = (way, name) => up.slice(1).map(([at, text]) => [(1 + way * at) / 2, name + text])
	return [...side(-1, "\u2212").reverse(), [0.5, "0"], ...side(1, "+")]
}
function tellColours() {
	const image = new ImageData(256, 1)
	for (let x = 0; x < 256; x++) image.data.set([...colourAt(max(1, x), difference()), 255], 4 * x)
	ui.colours.getContext("2d").putImageData(image, 0, 0)
	ui.colours.ariaLabel = `Colour bar of ${quantity()}`
	ui.ticks.replaceChildren(...barTicks().map(([at, text]) => {
		const tick = span("", text)
		tick.style.left = `${100 * at}%`
		return tick
	}))
	press({log: state.log, linear: !state.log, max: state.pool === "max", mass: state.pool === "sum"})
}

// ---- wall

const METRICS = ["entropy", "sink", "distance", "previous", "induction"]
const walls = new Map()
let shown = []; // the heads on the wall, in its order

function thumb({capture, index}) { // the small map of a head
	const size = capture.wall[0] * capture.wall[1]
	return walls.get(capture)?.subarray(index * size, (index + 1) * size) ?? [1]
}
async function loadWall(capture) {
	if (walls.has(capture)) return
	walls.set(capture, null)
	walls.set(capture, (await source.numbers(`wall/${capture.id}`)).values)
	recolour()
}
function buildWall() {
	const [height, width] = here.wall
	ui.wall.replaceChildren(...here.heads.map(spec => {
		const numbers = METRICS.map(metric => {
			const line = make("div", {className: "number"}, span("", metric), span("", short(here.summaries[metric][spec.index])))
			line.dataset.metric = metric
			return line
		})
		const button = make("button", {type: "button"}, make("canvas", {width, height}),
			make("div", {className: "numbers"}, make("strong", {textContent: spec.short}), ...numbers))
		listen(button, "click", event => event.shiftKey ? compare(difference() ? state.mode : "side", spec) : show(spec))
		return assign(make("li", {}, button), {spec})
	}))
	loadWall(here)
}
// Terms such as L2, H1, entropy>3, sink 0.1-0.5; a bare range speaks of what the wall is ordered by.
function filterOf(text) {
	const tests = [], term = /\b([lh])\w*\s*(\d+)\b|([a-z]*)\s*(?:([<>])=?\s*([\d.]+)|([\d.]+)\s*-\s*([\d.]+))/g
	const rest = text.toLowerCase().replace(term, (all, axis, n, name, sign, end, low, high) => {
		const metric = name ? METRICS.find(one => one.startsWith(name)) : state.order, values = here.summaries[metric]
		if (axis) tests.push(spec => spec[axis === "l" ? "layer" : "head"] === +n)
		else if (!values) return all
		else tests.push(({index}) => values[index] >= (low ?? (sign === ">" ? end : 0)) && values[index] <= (high ?? (sign === "<" ? end : Infinity)))
		return ""
	})
	return {wrong: /[^\s,;]/.test(rest), keep: spec => tests.every(test => test(spec))}
}
function arrangeWall() {
	const items = [...ui.wall.children], {wrong, keep} = filterOf(state.filter), way = state.down ? 1 : -1
	const value = ({spec}) => state.order === "layer" ? -spec.index : here.summaries[state.order][spec.index]
	items.sort((a, b) => way * (value(b) - value(a)) || a.spec.index - b.spec.index)
	for (const item of items) item.hidden = !keep(item.spec)
	shown = items.filter(item => !item.hidden).map(item => item.spec)
	ui.wall.append(...items)
	ui.filter.ariaInvalid = wrong
	ui.count.textContent = shown.length < items.length ? `${shown.length} of ${items.length}` : ""
	for (const line of ui.wall.querySelectorAll(".number")) line.toggleAttribute("data-order", line.dataset.metric === state.order)
	const first = state.order === "layer" ? state.down ? "first" : "last" : state.down ? "largest" : "smallest"
	assign(ui.direction, {textContent: state.down ? "\u2193" : "\u2191", ariaLabel: `${first} first; turn round`})
}
function drawWall() {
	if (walls.get(here)) for (const {spec, firstChild} of ui.wall.children) colour(thumb(spec), here.wall[1], firstChild.firstChild, tables[0])
}
const turn = by => show(shown[clamp(shown.indexOf(state.one) + by, 0, shown.length - 1)] ?? state.one)

// ---- compare

function compare(mode, two = state.two) {
	assign(state, {mode, two})
	update()
}
function show(one) {
	const moved = one.capture !== here
	if (moved && !alike(one.capture, here)) {
		assign(state, {pin: null, cell: null, mode: "one", two: null})
		view.whole = true
	}
	state.one = one
	if (moved) openCapture()
	update()
}
function swap() {
	const {one, two} = state
	state.two = one
	show(two)
}
function openCapture() { // what hangs on the capture alone
	here = state.one.capture
	const {keys, queries, same, prompt, length, model, name} = here, said = [model]
	said.push(same ? `${whole(keys)} token${keys > 1 ? "s" : ""}` : `${whole(queries)} queries, ${whole(keys)} keys`)
	if (prompt !== null) said.push(`${whole(keys - prompt)} written by the model`)
	if (length !== null) said.push(`${whole(keys - length)} of padding`)
	assign(ui.model, {textContent: said.join(" \u00b7 "), title: name})
	reading = {at: {}, runs: [], windows: ""}
	ui.text.replaceChildren()
	buildWall()
	arrangeWall()
	search(ui.search.value, false)
}
function update() { // after the choice of heads has changed
	const others = captures.filter(one => alike(one, here)).flatMap(one => one.heads), {one} = state
	state.cell ??= {query: here.queries - 1, key: min(here.keys, here.length ?? here.keys) - 1}
	if (!others.includes(state.two)) {
		state.two = others.find(two => two.capture !== here && two.layer === one.layer && two.head === one.head) ?? others.find(two => two !== one)
	}
	if (!state.two) state.mode = "one"
	const alone = state.mode === "one", wall = state.wall ?? (state.mode !== "side" || innerWidth > 1600)
	put(ui.name, long(one))
	document.title = `${long(one)} - Sightline`
	ui.mode.value = state.mode
	ui.mode.disabled = !state.two
	ui.other.hidden = ui.swap.hidden = alone
	ui.other.replaceChildren(...others.map(two => make("option", {value: two.path, textContent: two.short + from(two)})))
	ui.other.value = state.two?.path
	ui.capture.value = here.id
	if (!alone) loadWall(state.two.capture)
	ui.main.dataset.wall = wall ? "on" : "off"
	assign(ui.walls, {ariaExpanded: wall, ariaLabel: wall ? "Hide the heads" : "Show the heads"})
	for (const {spec, firstChild: button} of ui.wall.children) {
		if (spec === one && button.ariaPressed !== "true") button.scrollIntoView({block: "nearest"})
		button.ariaPressed = spec === one
		button.toggleAttribute("data-other", !alone && spec === state.two)
	}
	layout()
	recolour()
	inspectSoon()
}

// ---- word panel

const answers = new Map(), looks = new WeakMap(), READ = 400; // tokens of the text that the panel holds
let said = {}, timer = 0, inspecting = false, reading = {at: {}, runs: [], windows: ""}
const ask = path => once(answers, path, 400, () => {
	const answer = source.facts(path)
	answer.catch(() => answers.delete(path))
	return answer
})
function point(cell) { // the cell that everything speaks of
	state.cell = {query: clamp(cell.query, 0, here.queries - 1), key: clamp(cell.key, 0, here.keys - 1)}
	draw()
	inspectSoon()
}
function inspectSoon() {
	if (!inspecting) requestAnimationFrame(() => {inspecting = false; inspect();})
	inspecting = true
}
// Until the source has answered the panel is empty: better nothing than a number of another cell.
function inspect() {
	const {cell: {query, key}, list, one} = state, paths = heads().map(({path}) => `weight/${path}/${query}/${key}`)
	paths.push(`query/${one.path}/${query}`, `key/${one.path}/${key}`, `${list}/${one.path}/${subject()}`)
	const about = paths.join()
	if (said.about !== about) {
		said = {about}
		clearTimeout(timer)
		timer = setTimeout(async () => {
			try {
				const found = await Promise.all(paths.map(ask))
				if (said.about !== about) return
				const [facts, received, strongest] = found.splice(-3)
				said = {about, list, weights: found.map(({weight}) => weight ?? NaN), facts: {...facts, received: received.received}, strongest}
				fault = ""
				follow()
				inspect()
			} catch (error) {
				said = {}
				fault = error.message
			}
			draw()
		}, 60)
	}
	tell()
}
const listed = () => said.list === state.list ? said.strongest[looking() ? "keys" : "queries"].map((at, n) => [at, said.strongest.weights[n]]) : []
function tell() {
	const {cell: {query, key}, one, two, list} = state, [weight, second] = said.weights ?? [], known = weight !== undefined
	const level = levelFor(devicePixelRatio), square = level ? valueAt(one, query, key, level) : NaN, size = whole(2 ** level)
	assign(ui.weight, {textContent: known ? weightText(weight) : "", value: known ? String(weight) : ""})
	ui.unit.textContent = !known ? "" : isNaN(weight) ? "by the mask" : second === undefined ? "weight" : `weight of ${one.short}`
	ui.second.textContent = !known ? "" : second !== undefined ? `${two.short}${from(two)}: ${weightText(second)}, difference ${weightText(weight - second)}`
		: square >= 0 ? `${pooled()} of its ${size} \u00d7 ${size} square: ${square.toPrecision(3)}` : ""
	put(ui.row, query + here.shift)
	put(ui.column, key)
	ui.query.replaceChildren(...around("query", query))
	ui.key.replaceChildren(...around("key", key))
	for (const name of ["entropy", "sink", "distance", "received"]) ui[name].textContent = said.facts ? short(said.facts[name]) : ""
	ui.asker.textContent = `${looking() ? "Keys that query" : "Queries that look at key"} \u201c${label(list, subject())}\u201d${looking() ? " looks at" : ""}`
	put(ui.pin, state.pin ? "Pinned" : "Pin")
	press({pin: state.pin, looks: looking(), seen: !looking()})
	ui.top.replaceChildren(...listed().map(([other, weight]) => {
		const button = make("button", {title: weightText(weight)}, span("fill", ""), span("context", "", ...around(facing(), other, 24)),
			span("place", other + (looking() ? 0 : here.shift)), span("share", weight < 0.00005 ? weight.toExponential(0) : weight.toFixed(4)))
		button.firstChild.style.width = `${100 * weight}%`
		listen(button, "click", () => {
			const cell = meet(other)
			state.pin ??= pinOf(list, subject())
			reading.at = {query: cell.query, key: here.same && !looking() ? cell.query + here.shift : cell.key}
			point(cell)
			reveal(cell)
		})
		return make("li", {}, button)
	}))
	buildText()
}
function pinOf(side, at) { // in one text a word is a query and a key
	if (side === "query") return {query: at, key: here.same ? at + here.shift : null}
	return {query: here.same && at >= here.shift ? at - here.shift : null, key: at}
}
function pin(side, at) {
	state.pin = pinOf(side, at)
	if (state.pin[state.list] === null) state.list = side
	point({query: state.pin.query ?? state.cell.query, key: state.pin.key ?? state.cell.key})
	remember()
}
function togglePin() {
	if (!state.pin) return pin(state.list, subject())
	state.pin = null
	point(state.cell)
	remember()
}
function setList(list) {
	state.list = list
	point(state.cell)
}
function follow() { // the text goes where the word is, once the pointer rests
	const at = subject() + (looking() ? here.shift : 0)
	const wish = here.same ? {key: at} : {query: state.pin?.query ?? state.cell.query, key: state.pin?.key ?? state.cell.key}
	for (const run of reading.runs) {
		if (wish[run.side] >= run.from && wish[run.side] < run.to) wish[run.side] = (scrollText(run, wish[run.side]), reading.at[run.side])
	}
	reading.at = wish
}
function buildText() {
	const sides = here.same ? ["key"] : ["query", "key"], room = READ / sides.length
	const runs = sides.map(side => {
		const from = clamp(round((reading.at[side] ?? 0) - room / 2), 0, max(0, count(side) - room))
		return {side, from, to: min(count(side), from + room), marks: []}
	})
	const windows = runs.map(({from, to}) => `${from}-${to}`).join(), ready = runs.every(({side, from, to}) => word(side, from) !== null && word(side, to - 1) !== null)
	if (reading.windows !== windows && ready) {
		assign(reading, {runs, windows})
		ui.text.replaceChildren(...runs.flatMap(run => {
			const nodes = here.same ? [] : [make("h3", {textContent: run.side === "key" ? "keys" : "queries"})]
			for (let n = run.from; n < run.to; n++) {
				run.marks.push(textMark(run.side, n))
				nodes.push(run.marks.at(-1), here.separator)
			}
			return nodes
		}))
		ui.window.textContent = runs.map(({side, from, to}) => to - from < count(side) ? `${whole(from)}\u2013${whole(to - 1)}` : "").join(" ")
		for (const run of runs) scrollText(run, reading.at[run.side])
	}
	markText()
}
function scrollText(run, at) {
	const {offsetTop, scrollTop, clientHeight} = ui.text, top = run.marks[at - run.from]?.offsetTop - offsetTop
	if (top < scrollTop || top > scrollTop + clientHeight - 30) ui.text.scrollTop = top - clientHeight / 2
}
function textMark(side, n) {
	const token = word(side, n), mark = make("span", {className: "token", title: n + (side === "query" ? here.shift : 0), side, at: n})
	for (const part of token.split(/([\n\t])/)) { // a new line is seen as a sign, and it breaks the line
		if (NAMED[part]) mark.append(span("sign", NAMED[part]), part)
		else mark.append(unseen(part))
	}
	if (token === "") mark.textContent = "\u2205"
	return mark
}
// The listed words in the colour of their weight; touching the others too would be slow.
function markText() {
	const weights = new Map(listed()), top = max(...weights.values()), side = facing()
	for (const mark of reading.runs.flatMap(({marks}) => marks)) {
		const place = pinOf(mark.side, mark.at), weight = place[side] === null ? undefined : weights.get(place[side]), classes = {
			top: weight, asking: place[state.list] === subject(), pointed: place[side] === state.cell[side], written: isWritten(mark.side, mark.at)}
		const look = ["token", ...entries(classes).filter(([, on]) => on).map(([name]) => name)].join(" ")
		const glow = weight ? `rgb(var(--glow) / ${(0.62 * (weight / top) ** 0.6).toFixed(2)})` : ""
		if (looks.get(mark) === look + glow) continue
		looks.set(mark, look + glow)
		mark.className = look
		mark.style.backgroundColor = glow
	}
}

// ---- search

let hits = {text: "", at: [], now: -1}
async function search(text, go = true) {
	const mine = hits = {text, at: [], now: -1}
	if (text) await searchMore()
	if (hits !== mine) return
	tellHits()
	if (go && hits.at.length) jump(0)
}
async function searchMore() {
	const {at, text} = hits, mine = hits
	try {
		const more = await source.facts(`search/${here.id}?text=${encodeURIComponent(text)}${at.length ? `&after=${at.at(-1) + 1}` : ""}`)
		at.push(...more.at)
		mine.more = more.more
	} catch (error) {fault = error.message;}
}
function tellHits() {
	const {text, at, more, now} = hits
	ui.found.textContent = !text ? "" : at.length ? `${now < 0 ? "" : `${whole(now + 1)} / `}${whole(at.length)}${more ? "+" : ""}` : "not found"
	ui.previous.disabled = ui.next.disabled = !at.length
	draw()
	inspectSoon()
}
async function nextHit(by) {
	if (by > 0 && hits.now === hits.at.length - 1 && hits.more) await searchMore()
	if (hits.at.length) jump((hits.now + by + hits.at.length) % hits.at.length)
}
function jump(n) {
	hits.now = n
	pin("key", hits.at[n])
	goTo(state.cell.query + 0.5, state.cell.key + 0.5, max(view.size, 14))
	tellHits()
}

// ---- export

const HEAD = 46, FOOT = 44, FINE = 3
// Draws the view once more, finer, with its titles and its colour bar.
async function compose(pen) {
	const frames = panes.map(frameOf), left = frames[0].left - LEFT, bottom = max(...frames.map(frame => frame.bottom)) + HEAD
	const width = round(max(frames.at(-1).right + 12 - left, LEFT + 260)), height = round(bottom + FOOT), ink = css("ink"), muted = css("muted")
	const moved = panes.map(pane => ({...pane, left: pane.left - left, top: pane.top + HEAD}))
	const raster = make("canvas", {width: width * FINE, height: height * FINE})
	const tiles = () => {for (const pane of moved) drawTiles(raster.getContext("2d"), pane, FINE);}
	wants = []
	tiles()
	const missing = new Set(wants.map(([, path]) => path).filter(path => !store.has(path))), signal = new AbortController().signal
	await Promise.all(Array.from(missing, async path => keep(path, await source.numbers(path, signal))))
	tiles()
	pen.open(width, height)
	pen.bars([[0, 0, width, height]], css("surface"))
	pen.text(12, 16, cut([...new Set([here.name, here.model, `${whole(here.keys)} tokens`])].join(", "), width - 24), {fill: muted})
	for (const pane of moved) {
		const frame = frameOf(pane), x = pane.first ? 12 : frame.left, style = {size: 13, bold: true, fill: ink}
		pen.text(x, 35, cut(difference() ? `${long(state.one)} minus ${long(state.two)}` : long(pane.specs[0]), frame.right - x, style), style)
		const [a, b, c, d] = [frame.left, frame.top, frame.right, frame.bottom].map(n => round(n * FINE)), part = make("canvas", {width: c - a, height: d - b})
		part.getContext("2d").drawImage(raster, -a, -b)
		pen.image(part, a / FINE, b / FINE, part.width / FINE, part.height / FINE)
		drawNumbers(pen, pane)
		drawAxes(pen, pane)
		if (pane.first) for (const [n, text] of ["key \u2192", "query \u2193"].entries()) pen.text(12, frame.top - 66 + 14 * n, text, {fill: ink, size: 10})
	}
	const bar = clamp(width - LEFT - 130, 130, 260), x = width - bar - 16, y = bottom + 14, level = levelFor(FINE), size = whole(2 ** level)
	pen.image(ui.colours, x, y, bar, 9)
	barTicks().forEach(([at, text], n, all) => pen.text(x + at * bar, y + 17, text, {fill: muted, size: 10, align: n ? all[n + 1] ? "center" : "right" : "left"}))
	pen.text(x - 10, y + 4, quantity(), {fill: ink, align: "right"})
	pen.text(x - 10, y + 17, level ? `${pooled()} of ${size} \u00d7 ${size}` : "single weights", {fill: muted, size: 10, align: "right"})
}
function download(blob, kind) {
	const link = make("a", {href: URL.createObjectURL(blob), download: `attention-L${state.one.layer}-H${state.one.head}.${kind}`})
	link.click()
	setTimeout(() => URL.revokeObjectURL(link.href), 60000)
}
async function exportPng() {
	const pen = new CanvasPen()
	await compose(pen)
	download(await pen.context.canvas.convertToBlob(), "png")
}
async function exportSvg() {
	const pen = new SvgPen()
	await compose(pen)
	download(new Blob([...pen.parts, "</svg>"], {type: "image/svg+xml"}), "svg")
}
async function exportHtml() {
	const wanted = ui.chosen.value.match(/[^\s,;]+/g) ?? []
	download(await (await source.ask(`export?capture=${here.id}&heads=${wanted}`)).blob(), "html")
}
const exporting = action => async () => {
	put(ui.exporting, "working\u2026")
	try {
		await action()
		put(ui.exporting, "done")
	} catch (error) {put(ui.exporting, error.message);}
}
const listHeads = specs => {ui.chosen.value = specs.filter(({capture}) => capture === here).map(({layer, head}) => `${layer}.${head}`).join(", ");}
function openExports() {
	listHeads(heads())
	put(ui.exporting, "")
	ui.exports.showModal()
}

// ---- pointer and keys

function listenToPointer() {
	const {overlay, text} = ui, fingers = new Map(), paneAt = x => panes.findLast(pane => x >= frameOf(pane).left) ?? panes[0]
	let moved = 0
	const cellAt = ({offsetX: x, offsetY: y}) => {
		const pane = paneAt(x), {left, top, right, bottom} = frameOf(pane), inside = x >= left && y >= top && x < right && y < bottom
		return inside && {query: floor(view.y + (y - pane.top) / view.size), key: floor(view.x + (x - pane.left) / view.size)}
	}
	listen(overlay, "pointerdown", event => {
		overlay.setPointerCapture(event.pointerId)
		fingers.set(event.pointerId, [event.offsetX, event.offsetY])
		moved = fingers.size > 1 ? Infinity : 0
	})
	listen(overlay, "pointermove", event => {
		const {pointerId, offsetX: x, offsetY: y} = event, old = fingers.get(pointerId), cell = !old && cellAt(event)
		if (cell && (cell.query !== state.cell.query || cell.key !== state.cell.key)) point(cell)
		if (!old) return
		fingers.set(pointerId, [x, y])
		const [, other] = [...fingers].find(([id]) => id !== pointerId) ?? []
		if (other) zoom(hypot(x - other[0], y - other[1]) / hypot(old[0] - other[0], old[1] - other[1]) || 1, (x + other[0]) / 2, (y + other[1]) / 2)
		moved += abs(x - old[0]) + abs(y - old[1])
		if (moved <= 4) return
		overlay.className = "dragging"
		view.x -= (x - old[0]) / view.size / fingers.size
		view.y -= (y - old[1]) / view.size / fingers.size
		settle()
	})
	const release = event => {
		overlay.className = ""
		const cell = fingers.delete(event.pointerId) && moved <= 4 && event.type === "pointerup" && cellAt(event)
		if (!cell) return
		if (state.pin?.[state.list] === cell[state.list]) togglePin()
		else pin(state.list, cell[state.list])
		point(cell)
	}
	listen(overlay, "pointerup", release)
	listen(overlay, "pointercancel", release)
	listen(overlay, "wheel", event => {
		event.preventDefault()
		const {deltaY, deltaMode, offsetX: x, offsetY: y} = event
		zoom(exp(-clamp(deltaY * (deltaMode === 1 ? 16 : 1), -240, 240) / 320), x, y, paneAt(x))
	})
	listen(text, "click", ({target}) => {
		const mark = target.closest(".token")
		if (mark) pin(mark.side, mark.at)
		if (mark) reveal(state.cell)
	})
	listen(text, "pointerover", ({target}) => {
		const mark = target.closest(".token"), other = mark && pinOf(mark.side, mark.at)[facing()]
		if (mark && other !== null) point(meet(other))
	})
}
async function step(di, dj) { // by cells, or by what a pixel covers
	const far = 2 ** levelFor(1), {cell} = state
	point({query: cell.query + di * far, key: cell.key + dj * far})
	reveal(state.cell)
	const {query, key} = state.cell, {weight} = await ask(`weight/${state.one.path}/${query}/${key}`)
	if (state.cell.query === query && state.cell.key === key) ui.announce.textContent = `query ${label("query", query)}, key ${label("key", key)}, weight ${weightText(weight)}`
}
function set(change) { // what alters colours
	assign(state, change)
	recolour()
	inspectSoon()
	remember()
}
function setWall() {
	state.wall = ui.main.dataset.wall === "off"
	update()
}
function setTheme(theme) {
	root.dataset.theme = theme
	const other = theme === "dark" ? "Light" : "Dark"
	assign(ui.theme, {textContent: other, ariaLabel: `${other} theme`})
	if (panes.length) set({})
}
const nextTheme = () => setTheme(dark() ? "light" : "dark")
function listenToKeys() {
	const buttons = {"+": "in", "=": "in", "-": "out", 0: "fit", "[": "earlier", "]": "later", t: "theme", w: "walls", x: "swap", e: "export", "?": "help"}
	const moves = {arrowup: [-1, 0], arrowdown: [1, 0], arrowleft: [0, -1], arrowright: [0, 1]}, modes = ["one", "side", "difference"]
	const actions = {
		l: () => ui[state.log ? "linear" : "log"].click(), m: () => ui[state.pool === "max" ? "mass" : "max"].click(),
		b: () => ui[looking() ? "seen" : "looks"].click(), n: back => ui[back ? "previous" : "next"].click(),
		c: () => state.two && compare(modes[(modes.indexOf(state.mode) + 1) % 3]), "/": () => ui.search.focus(), escape: () => state.pin && togglePin(),
	}
	listen(document, "keydown", event => {
		const {target, shiftKey} = event, key = event.key.toLowerCase(), onMap = target === ui.overlay || target === document.body
		if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]") || target.closest("select, input")) return
		const move = !target.closest("#text, #top, #wall") && moves[key], enter = onMap && (key === "enter" || key === " ")
		if (!move && !enter && !buttons[key] && !actions[key]) return
		event.preventDefault()
		if (move) step(...move.map(n => n * (shiftKey ? 10 : 1)))
		else if (enter) togglePin()
		else if (buttons[key]) ui[buttons[key]].click()
		else actions[key](shiftKey)
	})
}
function listenToControls() {
	const on = (id, kind, action) => listen(ui[id], kind, event => action(ui[id].value, event))
	on("order", "change", order => {assign(state, {order, down: true}); arrangeWall(); remember();})
	on("filter", "input", filter => {state.filter = filter; arrangeWall(); remember();})
	on("mode", "change", mode => compare(mode))
	on("other", "change", path => compare(state.mode, find(...path.split("/").map(Number))))
	on("capture", "change", c => show(find(c, state.one.layer, state.one.head) ?? captures[c].heads[0]))
	on("find", "submit", (_, event) => {event.preventDefault(); if (ui.search.value === hits.text) nextHit(1); else search(ui.search.value);})
	let typed = 0
	on("search", "input", text => {clearTimeout(typed); typed = setTimeout(() => text !== hits.text && search(text), 350);})
	on("search", "keydown", (_, event) => {
		if (event.key === "Escape") ui.overlay.focus()
		if (event.key === "Enter" && event.shiftKey) {event.preventDefault(); nextHit(-1);}
	})
	const clicks = {
		direction: () => {state.down = !state.down; arrangeWall();}, walls: setWall, earlier: () => turn(-1), later: () => turn(1), swap,
		out: () => zoomHere(1 / 1.4), in: () => zoomHere(1.4), fit: () => zoomHere(0), max: () => set({pool: "max"}), mass: () => set({pool: "sum"}),
		log: () => set({log: true}), linear: () => set({log: false}), pin: togglePin, looks: () => setList("query"), seen: () => setList("key"),
		previous: () => nextHit(-1), next: () => nextHit(1), export: openExports,
		help: () => ui.shortcuts.showModal(), theme: nextTheme, png: exporting(exportPng), svg: exporting(exportSvg), html: exporting(exportHtml),
		all: () => listHeads(shown),
	}
	for (const [id, action] of entries(clicks)) on(id, "click", action)
}

// ---- link

const night = matchMedia("(prefers-color-scheme: dark)")
let written = "", writing = 0
function remember() { // the address holds the view; replaced, so that Back leads out of the page
	clearTimeout(writing)
	if (location.protocol !== "about:") writing = setTimeout(() => {
		const {one, two, pool, log, order, filter, mode, pin} = state, {theme} = root.dataset, [{width, height}] = panes
		const said = {capture: here.id, layer: one.layer, head: one.head, pool, scale: log ? "log" : "linear", theme, order, filter, compare: mode}
		if (mode !== "one") said.with = two.path
		if (pin) said.pin = `${pin.query ?? ""}/${pin.key ?? ""}`
		if (!view.whole) said.at = [view.y + height / view.size / 2, view.x + width / view.size / 2, view.size].map(n => +n.toPrecision(9)).join("/")
		history.replaceState(null, "", written = `#${new URLSearchParams(said)}`.replaceAll("%2F", "/"))
	}, 250)
}
function restore() {
	const wish = new URLSearchParams(location.hash.slice(1)), among = (name, ...all) => all.includes(wish.get(name)) ? wish.get(name) : all[0]
	const numbers = name => (wish.get(name) ?? "").split("/").map(part => part === "" ? NaN : +part)
	here = captures[wish.get("capture")] ?? captures[0]
	state.one = find(here.id, numbers("layer")[0] || here.layers[0], numbers("head")[0] || 0) ?? here.heads[0]
	assign(state, {pool: among("pool", "max", "sum"), log: among("scale", "log", "linear") === "log", mode: among("compare", "one", "side", "difference"),
		order: ui.order.value = among("order", "layer", ...METRICS), filter: ui.filter.value = wish.get("filter") ?? "", pin: null, cell: null, two: find(...numbers("with"))})
	const [query, key] = numbers("pin"), [y, x, size] = numbers("at")
	if (query < here.queries) state.pin = pinOf("query", query)
	else if (key < here.keys) state.pin = pinOf("key", key)
	if (state.pin) state.cell = {query: state.pin.query ?? here.queries - 1, key: state.pin.key ?? 0}
	if (state.pin?.[state.list] === null) state.list = query >= 0 ? "query" : "key"
	setTheme(among("theme", night.matches ? "dark" : "light", "light", "dark"))
	view.whole = !size
	openCapture()
	update()
	if (size) goTo(y, x, size)
}
async function start() {
	manifest = ui.manifest ? JSON.parse(ui.manifest.textContent) : await (await fetch("manifest.json")).json()
	source = new (ui.manifest ? EmbeddedSource : ServerSource)()
	captures = manifest.captures
	for (const capture of captures) {
		// With fewer queries than keys of one text the queries are the newest.
		capture.shift = capture.same ? capture.keys - capture.queries : 0
		capture.heads = capture.pairs.map(([layer, head], index) => ({capture, layer, head, index, path: `${capture.id}/${layer}/${head}`, short: `L${layer} H${head}`}))
		ui.capture.append(make("option", {value: capture.id, textContent: capture.name}))
	}
	ui.pages.hidden = Boolean(ui.manifest)
	ui.capture.hidden = captures.length < 2
	for (const value of ["layer", ...METRICS]) ui.order.append(make("option", {value, textContent: value}))
	listenToPointer()
	listenToKeys()
	listenToControls()
	restore()
	new ResizeObserver(layout).observe(ui.stage)
	listen(window, "hashchange", () => {if (location.hash !== written) restore();})
	listen(night, "change", ({matches}) => setTheme(matches ? "dark" : "light"))
}
start().catch(error => {ui.status.textContent = `The captures cannot be read: ${error.message}`;});
