const store = new Map(), MOST = 160; // numbers by path, newest last; about half a megabyte each
const underway = new Map(), refused = new Map(), chunks = new Map()
let fault = "", since = 0, wants = [], drawn
const want = (path, urgency) => wants.push([urgency, path])

function have(path) {
	const found = store.get(path)
	return found && keep(path, found)
}
function keep(path, numbers, version = manifest.version) {
	numbers.version ??= version; // what an older capture gave is shown until the new has come
	store.delete(path)
	store.set(path, numbers)
	if (store.size > MOST) store.delete(store.keys().next().value)
	return numbers
}
function demand() { // what the picture needs, most urgent first; the rest is called off
	const now = performance.now(), missing = new Set(wants.sort((a, b) => a[0] - b[0]).map(([, path]) => path).filter(path => store.get(path)?.version !== manifest.version))
	const paths = [...missing].filter(path => !(refused.get(path)?.until > now)), left = paths.length
	for (const [path, stop] of underway) {
		if (missing.has(path)) continue
		stop.abort()
		underway.delete(path)
	}
	for (const path of paths) if (underway.size < source.together && !underway.has(path)) load(path)
	since = left ? since || now : 0
	ui.stage.ariaBusy = left > 0
	const text = (missing.size > left ? refused.get([...missing].find(path => !paths.includes(path))).message : fault) || (left && now - since > 350 ? `computing, ${left} to go` : "")
	if (ui.status.textContent !== text) put(ui.status, text)
	if (left && !text) setTimeout(draw, 400)
}
async function load(path) {
	const stop = new AbortController(), {signal} = stop, {version} = manifest
	underway.set(path, stop)
	try {
		const numbers = await source.numbers(path, signal)
		if (!signal.aborted) keep(path, numbers, version)
	} catch ({status, message}) {
		if (signal.aborted) return
		refused.set(path, {until: performance.now() + 2000, message: status ? message : "The server does not answer"})
		setTimeout(draw, 2100)
	}
	if (underway.get(path) === stop) underway.delete(path)
	draw()
}
// The text of one token, or null as long as its piece of the text is on the way.
function word(side, n) {
	if (here.same && side === "query") return word("key", n + here.shift)
	if (n < 0 || n >= count(side)) return null
	const path = `text/${here.id}/${side}/${floor(n / CHUNK)}`, {version} = manifest, known = chunks.get(path)
	if (known?.version !== version && !(known?.tokens?.length === CHUNK)) {
		const chunk = {version, tokens: known?.tokens}
		chunks.set(path, chunk)
		source.facts(path).then(tokens => {chunk.tokens = tokens; draw(); inspectSoon();},
			() => setTimeout(() => {chunk.version = null;}, 2000))
	}
	return chunks.get(path).tokens?.[n % CHUNK] ?? null
}
