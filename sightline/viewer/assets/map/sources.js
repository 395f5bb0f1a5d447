const TILE = 256, STRIP = 1024, CHUNK = 4096; // pixels of a tile, values of a track, tokens of a piece of text
const fromHalf = (half, factor) => new Float32Array(half).map(x => x / factor)

class ServerSource {
	together = 4; // of the six that a browser allows, so that a weight need not wait for tiles
	async ask(path, signal, version = manifest.version) {
		const answer = await fetch(`${path}${path.includes("?") ? "&" : "?"}v=${version}`, {signal})
		if (!answer.ok) throw assign(Error(await answer.text()), {status: answer.status})
		return answer
	}
	async facts(path) {return (await this.ask(path)).json();}
	async numbers(path, signal, version) {
		const buffer = await (await this.ask(path, signal, version)).arrayBuffer(), head = new DataView(buffer)
		if (head.getUint32(0) !== 0x534c5431) throw Error("load the page again")
		const rows = head.getUint32(8, true), columns = head.getUint32(12, true), count = rows * columns
		const values = head.getUint8(4) === 1 ? new Float32Array(buffer, 20, count)
			: fromHalf(new Float16Array(buffer, 20, count), head.getFloat32(16, true))
		return {rows, columns, values}
	}
}

class EmbeddedSource {
	together = 1
	arrays = new Map()
	squares = new Map()
	array(name) {
		if (this.arrays.size > 80) this.arrays.clear(); // those of some heads
		return once(this.arrays, name, 99, () => {
			const text = document.getElementById(`array-${name}`).textContent
			if (name.endsWith("tokens")) return JSON.parse(text)
			const {buffer} = Uint8Array.fromBase64(text)
			return this.about(name).dtype === "float32" ? new Float32Array(buffer) : fromHalf(new Float16Array(buffer), /map|wall/.test(name) ? 4096 : 1)
		})
	}
	about(name) {return manifest.embedded.arrays[name];}

	// One head: the keys that a query may see by position, and exp(scale q.k + bias - logsumexp), NaN where hidden.
	head(c, layer, h) {
		const {queries: height, keys: width, layers, masks} = captures[c], {groups, heads, scales, softcaps, slopes, lengths} = manifest.embedded.captures[c]
		const row = layers.indexOf(layer), name = `c${c}-l${layer}-h${h}-`, shift = width - height, {before, after} = masks[row]
		const query = this.array(`${name}queries`), key = this.array(`c${c}-l${layer}-g${floor(h * groups / heads)}-keys`), size = query.length / height
		const logsumexp = this.array(`${name}logsumexp`), softcap = softcaps[row], slope = slopes[row]?.[h] ?? 0, end = min(width, lengths[row] ?? width)
		const extra = this.about(`${name}extra`) && this.array(`${name}extra`), [down, across] = this.about(`${name}extra`)?.shape ?? []
		const span = i => [max(0, i + shift - (before ?? Infinity)), min(end, i + shift + 1 + (after ?? Infinity))]
		const value = (i, j) => {
			let score = 0
			for (let a = i * size, b = j * size, stop = a + size; a < stop; a++, b++) score += query[a] * key[b]
			score *= scales[row]
			if (softcap) score = softcap * Math.tanh(score / softcap)
			score -= slope * abs(i + shift - j)
			if (extra) score += extra[(down > 1 ? i * across : 0) + (across > 1 ? j : 0)]
			return score === -Infinity ? NaN : exp(score - logsumexp[i])
		}
		const weight = (i, j) => j >= span(i)[0] && j < span(i)[1] ? value(i, j) : NaN
		return {height, width, span, value, weight, mass: (i, j, weight) => weight, live: i => logsumexp[i] > -Infinity}
	}
	map(c, layer, h) { // the same, of the squares that the kernel pooled
		const name = `c${c}-l${layer}-h${h}-`, [height, width] = this.about(`${name}mapmax`).shape, alive = new Int32Array(height)
		const largest = this.array(`${name}mapmax`), mass = this.array(`${name}mapmass`), block = 2 ** captures[c].map_level
		this.array(`${name}logsumexp`).forEach((x, i) => {alive[floor(i / block)] += x > -Infinity;})
		return {height, width, span: () => [0, width], value: (i, j) => largest[i * width + j],
			mass: (i, j) => mass[i * width + j] * alive[i], live: i => alive[i]}
	}
	async square({height, width, span, value, mass, live}, level, row, column, signal) { // both poolings in one pass
		const step = 2 ** level, top = row * TILE * step, left = column * TILE * step
		const bottom = min(height, top + TILE * step), right = min(width, left + TILE * step)
		const rows = ceil((bottom - top) / step), columns = ceil((right - left) / step)
		const most = new Float32Array(rows * columns).fill(NaN), sum = most.slice(), alive = new Int32Array(rows)
		let until = performance.now() + 8; // in slices, so that the page goes on moving
		for (let i = top; i < bottom; i++) {
			if (performance.now() > until) {
				await new Promise(go => {setTimeout(go);})
				signal.throwIfAborted()
				until = performance.now() + 8
			}
			const [from, to] = span(i), y = floor((i - top) / step)
			alive[y] += live(i)
			for (let j = max(from, left), stop = min(to, right); j < stop; j++) {
				const weight = value(i, j), p = y * columns + floor((j - left) / step)
				if (isNaN(weight)) continue
				if (!(most[p] >= weight)) most[p] = weight
				sum[p] = (sum[p] || 0) + mass(i, j, weight)
			}
		}
		return {rows, columns, max: most, sum: sum.map((x, p) => x / max(1, alive[floor(p / columns)]))}
	}
	async numbers(path, signal) {
		const [what, c, layer, h, name, level, row, column] = path.split("/").map(part => isNaN(part) ? part : +part)
		if (what === "wall") return {values: this.array(`c${c}-wall`)}
		if (what === "track") return this.track(this.array(`c${c}-l${layer}-h${h}-${name}`), 2 ** level, row)
		const at = [c, layer, h, level, row, column].join(), base = captures[c].map_level, pooled = base !== null && level >= base
		if (!this.squares.has(at)) {
			const found = await this.square(this[pooled ? "map" : "head"](c, layer, h), pooled ? level - base : level, row, column, signal)
			once(this.squares, at, 64, () => found)
		}
		const {rows, columns, [name]: values} = this.squares.get(at)
		return {rows, columns, values}
	}
	track(all, each, index) {
		const from = index * STRIP * each, columns = min(STRIP, ceil((all.length - from) / each)), values = new Float32Array(2 * columns)
		for (let n = 0; n < columns; n++) {
			const part = all.subarray(from + n * each, from + (n + 1) * each)
			values[n] = part.reduce((a, b) => a + b) / part.length
			values[columns + n] = part.reduce((a, b) => max(a, b))
		}
		return {rows: 2, columns, values}
	}
	async facts(path) {
		const [place, question] = path.split("?"), [what, c, layer, h, ...rest] = place.split("/"), [at, other] = rest.map(Number)
		if (what === "text") return this.array(`c${c}-${layer}tokens`).slice(h * CHUNK, (+h + 1) * CHUNK)
		if (what === "search") return this.search(c, new URLSearchParams(question))
		const {height, width, weight} = this.head(c, +layer, +h), looking = what === "query"
		if (what === "weight") return {weight: weight(at, other)}
		const line = Float64Array.from({length: looking ? width : height}, (_, n) => looking ? weight(at, n) : weight(n, at))
		const order = [...line.keys()].filter(n => line[n] > 0).sort((a, b) => line[b] - line[a] || a - b).slice(0, looking ? 8 : 16)
		const facts = (looking ? ["entropy", "sink", "distance"] : ["received"]).map(name => [name, this.array(`c${c}-l${layer}-h${h}-${name}`)[at]])
		return {...fromEntries(facts), [looking ? "keys" : "queries"]: order, weights: order.map(n => line[n])}
	}
	search(c, question) { // over the ends of tokens, without regard to case
		const parts = this.array(`c${c}-keytokens`).map(part => (part + captures[c].separator).toLowerCase()), starts = [0]
		for (const part of parts) starts.push(starts.at(-1) + part.length)
		const all = parts.join(""), text = question.get("text").toLowerCase(), at = []
		let n = +question.get("after"), from = all.indexOf(text, starts[n])
		while (from >= 0 && at.length < 1000) {
			while (starts[n + 1] <= from) n++
			at.push(n)
			from = all.indexOf(text, starts[n + 1])
		}
		return {at, more: from >= 0}
	}
}
