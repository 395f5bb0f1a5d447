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
	if (said.about !== about || said.old) {
		said = said.about === about ? {...said, old: false} : {about}
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
		const place = pinOf(mark.side, mark.at), at = place[side], pair = meet(at), weight = at === null ? undefined : weights.get(at), classes = {
			top: weight, masked: at !== null && hides(state.one, pair.query, pair.key), asking: place[state.list] === subject(), pointed: at === state.cell[side], written: isWritten(mark.side, mark.at)}
		const look = ["token", ...entries(classes).filter(([, on]) => on).map(([name]) => name)].join(" ")
		const glow = weight ? `rgb(var(--glow) / ${(0.62 * (weight / top) ** 0.6).toFixed(2)})` : ""
		if (looks.get(mark) === look + glow) continue
		looks.set(mark, look + glow)
		mark.className = look
		mark.style.backgroundColor = glow
	}
}
