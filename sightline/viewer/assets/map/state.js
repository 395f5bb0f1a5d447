let source, manifest, captures, here; // `here` is the capture on show
// `one` is the head on show, `two` the one beside it; `list` is the side of the word whose weights are listed.
const state = {one: null, two: null, mode: "one", pool: "max", log: true, order: "layer", down: true, filter: "",
	cell: null, pin: null, list: "query", wall: null}
const view = {x: 0, y: 0, size: 1, whole: true}; // top left token, pixels a token
const heads = () => state.mode === "one" ? [state.one] : [state.one, state.two]
const pooled = () => state.pool === "max" ? "largest" : "mass"
const difference = () => state.mode === "difference"
const find = (c, layer, h) => captures[c]?.heads.find(spec => spec.layer === layer && spec.head === h)
const from = spec => spec.capture === here ? "" : ` of ${spec.capture.name}`
const long = spec => `Layer ${spec.layer}, head ${spec.head}${from(spec)}`
const alike = (a, b) => a.keys === b.keys && a.queries === b.queries && a.same === b.same
const count = side => side === "key" ? here.keys : here.queries
// The word that is spoken of, as a query or as a key, and the cell where it meets another.
const looking = () => state.list === "query", facing = () => looking() ? "key" : "query"
const subject = () => state.pin?.[state.list] ?? state.cell[state.list]
const meet = other => looking() ? {query: subject(), key: other} : {query: other, key: subject()}
