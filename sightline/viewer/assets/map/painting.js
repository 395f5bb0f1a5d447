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
function hides({capture, layer}, query, key) { // by position, or as padding
	const {before, after} = capture.masks[capture.layers.indexOf(layer)], {queries, keys, length} = capture, far = query + keys - queries - key
	return (after !== null && -far > after) || (before !== null && far > before) || key >= (length ?? keys)
}
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
