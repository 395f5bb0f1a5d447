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
	try {
		const {values} = await source.numbers(`wall/${capture.id}`)
		walls.set(capture, walls.get(capture) ?? values); // a newer one may have come meanwhile
		recolour()
	} catch (error) {
		walls.delete(capture)
		fault = error.message
		setTimeout(() => loadWall(capture), 2000)
		draw()
	}
}
function buildWall() {
	ui.wall.replaceChildren(...here.heads.map(spec => {
		const numbers = METRICS.map(metric => {
			const line = make("div", {className: "number"}, span("", metric), span("", ""))
			line.dataset.metric = metric
			return line
		})
		const button = make("button", {type: "button"}, make("canvas", {}),
			make("div", {className: "numbers"}, make("strong", {textContent: spec.short}), ...numbers))
		listen(button, "click", event => event.shiftKey ? compare(difference() ? state.mode : "side", spec) : show(spec))
		return assign(make("li", {}, button), {spec})
	}))
	tellWall()
	loadWall(here)
}
function tellWall() {
	const [height, width] = here.wall
	for (const item of ui.wall.children) {
		const {spec: {index}, firstChild: {firstChild: canvas}} = item
		if (canvas.width !== width || canvas.height !== height) assign(canvas, {width, height})
		for (const line of item.querySelectorAll(".number")) put(line.lastChild, short(here.summaries[line.dataset.metric][index]))
	}
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
