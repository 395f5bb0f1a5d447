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
	const between = 2 * TRACK + 4 * GAP, height = max(40, clientHeight - TOP - 9)
	const width = max(40, side ? (clientWidth - LEFT - between) / 2 - 2 : clientWidth - LEFT - 9)
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
