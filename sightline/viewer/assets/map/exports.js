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
