const NAMED = {"\n": "\u21b5", "\r": "\u240d", "\t": "\u21e5"}
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u115f\u180e\u200b-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff\ufff9-\ufffb\ufffe\uffff\ud800-\udfff]|[\u{e0000}-\u{e0fff}]/gu
function sign(c) {
	const code = c.codePointAt(0)
	if (NAMED[c]) return NAMED[c]
	if (code < 32) return String.fromCharCode(0x2400 + code)
	return code === 127 ? "\u2421" : `\u2039${code.toString(16).toUpperCase().padStart(4, "0")}\u203a`
}
// A joiner inside an emoji belongs to its picture; elsewhere it is a character that must be seen.
const unseen = text => text.replace(UNSEEN, (c, at) =>
	c === "\u200d" && at > 0 && /\p{Extended_Pictographic}/u.test(text.slice(at + 1, at + 3)) ? c : sign(c))
const visible = text => text.trim() ? unseen(text) : unseen(text).replace(/ /g, "\u00b7") || "\u2205"
const label = (side, n) => visible(word(side, n)?.trim() || (word(side, n) ?? "\u2026"))
function around(side, at, room = 32) { // some characters to each side, token by token
	const part = step => {
		let out = "", token
		for (let n = at + step; out.length < room && (token = word(side, n)) !== null; n += step) {
			out = step < 0 ? unseen(token) + here.separator + out : out + here.separator + unseen(token)
		}
		return make("bdi", {textContent: out, dir: "auto"})
	}
	return [part(-1), make("mark", {textContent: visible(word(side, at) ?? "\u2026"), dir: "auto"}), part(1)]
}
function weightText(weight) {
	if (weight === null || isNaN(weight)) return "hidden"
	return weight === 0 ? "0" : abs(weight) >= 0.001 ? weight.toPrecision(5) : weight.toExponential(4)
}
function short(x) {
	const size = abs(x)
	return size >= 1e4 ? `${(x / 1000).toFixed(1)}k` : size >= 100 ? x.toFixed(0) : size >= 10 ? x.toFixed(1) : x.toFixed(2)
}
