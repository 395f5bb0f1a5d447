// While a model writes, the server has a newer capture about twice a second; heads, view and word stay what they are.
function adopt(capture, facts) { // with fewer queries than keys of one text the queries are the newest
	assign(capture, facts, {shift: facts.same ? facts.keys - facts.queries : 0})
}
async function grow() {
	const answer = await fetch(`manifest.json?v=${manifest.version}`)
	if (!answer.ok) throw Error(await answer.text())
	if (answer.status === 204) return
	const next = await answer.json(), fresh = new Map()
	for (const capture of walls.keys()) {
		const {values} = await source.numbers(`wall/${capture.id}`, undefined, next.version), {pairs, wall: [height, width]} = next.captures[capture.id]
		if (values.length !== pairs.length * height * width) return; // a still newer one
		fresh.set(capture, values)
	}
	const following = state.cell.query === here.queries - 1
	manifest = next
	captures.forEach((capture, n) => adopt(capture, next.captures[n]))
	fresh.forEach((values, capture) => walls.set(capture, values))
	answers.clear()
	marked.clear()
	said.old = true
	if (following) state.cell = {query: here.queries - 1, key: here.keys - 1}
	tellCapture()
	tellWall()
	layout()
	recolour()
	if (following && !view.whole) reveal(state.cell)
	if (hits.text) searchMore().then(tellHits)
	inspectSoon()
}
async function keepUp() {
	put(ui.announce, "The model is writing")
	while (manifest.goal) {
		await new Promise(go => {setTimeout(go, fault ? 2000 : 400);})
		try {
			await grow()
			fault = ""
		} catch ({message}) {
			fault = message === "Failed to fetch" ? "The server does not answer" : message
			draw()
		}
	}
	arrangeWall()
	put(ui.announce, `The model has written ${whole(here.keys - here.prompt)} tokens`)
}
