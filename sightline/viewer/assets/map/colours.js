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
