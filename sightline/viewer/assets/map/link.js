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
		adopt(capture, capture)
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
	if (manifest.goal) keepUp()
	listen(window, "hashchange", () => {if (location.hash !== written) restore();})
	listen(night, "change", ({matches}) => setTheme(matches ? "dark" : "light"))
}
start().catch(error => {ui.status.textContent = `The captures cannot be read: ${error.message}`;});
