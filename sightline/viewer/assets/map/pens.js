const FAMILY = getComputedStyle(document.body).fontFamily, named = new Map()
const css = name => once(named, name, 99, () => getComputedStyle(root).getPropertyValue(`--${name}`).trim())
const fontOf = ({size = 11, bold, italic}) => `${italic ? "italic " : ""}${bold ? 600 : 400} ${size}px ${FAMILY}`

// Two pens: on a canvas, and as SVG.
class CanvasPen {
	constructor(context) {this.context = context;}
	open(width, height) {
		this.context = new OffscreenCanvas(width * FINE, height * FINE).getContext("2d")
		this.context.scale(FINE, FINE)
	}
	bars(list, fill, alpha = 1) {
		assign(this.context, {fillStyle: fill, globalAlpha: alpha}).beginPath()
		for (const bar of list) this.context.rect(...bar)
		this.context.fill()
		this.context.globalAlpha = 1
	}
	text(x, y, text, style) {
		const {fill, align = "left", turn} = style, {context} = this
		assign(context, {font: fontOf(style), fillStyle: fill, textAlign: align, textBaseline: "middle", direction: "ltr"}).save()
		context.translate(x, y)
		if (turn) context.rotate(-Math.PI / 2)
		context.fillText(text, 0, 0)
		context.restore()
	}
	image(canvas, ...place) {
		this.context.imageSmoothingEnabled = false
		this.context.drawImage(canvas, ...place)
	}
}
class SvgPen {
	parts = []
	open(width, height) {
		this.parts.push(`<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family="${this.escape(FAMILY)}">`)
	}
	escape = text => String(text).replace(/[&<>"]/g, c => `&#${c.charCodeAt(0)};`)
	tag(name, attributes, inside = "") {
		const written = entries(attributes).filter(([, value]) => value !== undefined)
			.map(([key, value]) => ` ${key}="${this.escape(typeof value === "number" ? +value.toFixed(2) : value)}"`)
		this.parts.push(`<${name}${written.join("")}>${this.escape(inside)}</${name}>`)
	}
	bars(list, fill, opacity) {
		const path = list.map(bar => bar.map(n => +n.toFixed(2))).map(([x, y, w, h]) => `M${x} ${y}h${w}v${h}h${-w}z`)
		this.tag("path", {d: path.join(""), fill, opacity})
	}
	text(x, y, text, {fill, align, turn, size = 11, bold, italic}) {
		this.tag("text", {x, y, dy: "0.35em", fill, "font-size": size, "text-anchor": {center: "middle", right: "end"}[align],
			"font-weight": bold && 600, "font-style": italic ? "italic" : undefined, "xml:space": "preserve",
			transform: turn ? `rotate(-90 ${x.toFixed(2)} ${y.toFixed(2)})` : undefined}, text)
	}
	image(canvas, x, y, width, height) {
		this.tag("image", {x, y, width, height, preserveAspectRatio: "none", href: canvas.toDataURL()})
	}
}
