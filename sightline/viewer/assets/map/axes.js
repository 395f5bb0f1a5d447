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
			const late = at(n) + 48 > end // its word would be cut off at the right
			if (keys) pen.text(at(n) + (late ? -4 : 4), edge + 9, late ? `${text} \u2192` : text, {fill: css(name), size: 10, align: late ? "right" : "left"})
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
				const size = TRACK * clamp(scale(found.values[row * found.columns + i - place * STRIP] || 0), 0, 1)
				bars[row].push(box(a, base - size, length, size))
			}
		}
	}
	bars.forEach((list, row) => pen.bars(list, css("muted"), row ? 0.38 : 0.7))
	const notes = [[name, "ink", -10], [`${bent ? "log, " : ""}max ${short(highest)}`, "muted", 2]]
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
		clip(context, pane.first ? 0 : left - 2 * TRACK - 2 * GAP, 0, 1e4, bottom + 9, () => {
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
	const ten = n => n >= -3 ? String(10 ** n) : `1e${n}`, every = ceil(-least / (difference() ? 2 : 6))
	const room = difference() ? 0.2 : max(0.2, 56 / ui.colours.clientWidth) // for the first label, which stands to the right
	const powers = Array.from({length: -least}, (_, n) => -n).filter(n => n % every === 0 && n - least > -least * room || !n).reverse()
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
