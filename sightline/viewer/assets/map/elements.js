// Looks at captures: a wall of heads, the map of one head or two, the words. Numbers come from a source, by the
// paths of the server; where the page was written to a file, the source is that file and computes them here.

const {assign, entries, fromEntries} = Object, {abs, ceil, exp, floor, hypot, log, log10, log2, max, min, round} = Math
const root = document.documentElement, ui = fromEntries(Array.from(document.querySelectorAll("[id]"), node => [node.id, node]))
const clamp = (x, low, high) => min(high, max(low, x))
const make = (tag, properties, ...children) => {
	const node = assign(document.createElement(tag), properties)
	node.append(...children)
	return node
}
const listen = (node, kind, action) => node.addEventListener(kind, action, {passive: false})
const put = (node, text) => {node.textContent = text;}
const span = (className, textContent, ...children) => make("span", {className, textContent}, ...children)
const press = buttons => {for (const id in buttons) ui[id].ariaPressed = Boolean(buttons[id]);}
const whole = n => round(n).toLocaleString("en")
function once(map, key, most, create) { // the newest are kept
	if (!map.has(key)) {
		if (map.size >= most) map.delete(map.keys().next().value)
		map.set(key, create())
	}
	return map.get(key)
}
