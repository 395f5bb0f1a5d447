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
	tellCapture()
	reading = {at: {}, runs: [], windows: ""}
	ui.text.replaceChildren()
	buildWall()
	arrangeWall()
	search(ui.search.value, false)
}
function tellCapture() {
	const {keys, queries, same, prompt, length, model, name} = here, said = [model]
	said.push(same ? `${whole(keys)} token${keys > 1 ? "s" : ""}` : `${whole(queries)} queries, ${whole(keys)} keys`)
	if (prompt !== null) said.push(manifest.goal ? `writing, ${whole(keys - prompt)} of ${whole(manifest.goal - prompt)}` : `${whole(keys - prompt)} written by the model`)
	if (length !== null) said.push(`${whole(keys - length)} of padding`)
	assign(ui.model, {textContent: said.join(" \u00b7 "), title: name, ariaBusy: Boolean(manifest.goal)})
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
