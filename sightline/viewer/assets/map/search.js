let hits = {text: "", at: [], now: -1}
async function search(text, go = true) {
	const mine = hits = {text, at: [], now: -1}
	if (text) await searchMore()
	if (hits !== mine) return
	tellHits()
	if (go && hits.at.length) jump(0)
}
async function searchMore() {
	const {at, text} = hits, mine = hits
	try {
		const more = await source.facts(`search/${here.id}?text=${encodeURIComponent(text)}${at.length ? `&after=${at.at(-1) + 1}` : ""}`)
		at.push(...more.at)
		mine.more = more.more
	} catch (error) {fault = error.message;}
}
function tellHits() {
	const {text, at, more, now} = hits
	ui.found.textContent = !text ? "" : at.length ? `${now < 0 ? "" : `${whole(now + 1)} / `}${whole(at.length)}${more ? "+" : ""}` : "not found"
	ui.previous.disabled = ui.next.disabled = !at.length
	draw()
	inspectSoon()
}
async function nextHit(by) {
	if (by > 0 && hits.now === hits.at.length - 1 && hits.more) await searchMore()
	if (hits.at.length) jump((hits.now + by + hits.at.length) % hits.at.length)
}
function jump(n) {
	hits.now = n
	pin("key", hits.at[n])
	goTo(state.cell.query + 0.5, state.cell.key + 0.5, max(view.size, 14))
	tellHits()
}
