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
