"""Every known mistake, planted in somebody's code, is named; right code of any style is never accused."""

import itertools
import json

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from subjects import checked, refusal

from sightline.checking.attention_mistakes import CAUSAL, MASKS, SCORES
from sightline.checking.checks import CheckConfig, check
from sightline.checking.definitions import EncodingSteps, Maps, Steps, attend, causal, encoding, multi_head
from sightline.checking.encoding_mistakes import ENCODINGS
from sightline.checking.maps import readings
from sightline.checking.mistakes import difference, explain
from sightline.checking.module_mistakes import HEADS, LOST, ROLES
from sightline.checking.subject import CheckError
from sightline.layers import MultiHeadAttention


def status(report, law: str) -> str:
    return next(finding.status for finding in report.findings if finding.law == law)


def names(report) -> list[str]:
    return [mistake.name for mistake in report.mistakes]


# --- The definitions ----------------------------------------------------------------------------------


def test_the_definition_is_that_of_the_library():
    random = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 3, 5, 4, generator=random, dtype=torch.float64)
    value = torch.randn(2, 3, 5, 6, generator=random, dtype=torch.float64)
    allowed = causal(5, 5)
    output, weights = attend(query, key, value, allowed, Steps())
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, allowed)
    assert difference(output, exact) < 1e-12
    assert difference(weights.sum(-1), torch.ones(2, 3, 5)) < 1e-12


def test_several_heads_are_those_of_the_library():
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    maps = next(readings(dict(theirs.named_parameters()), d_model=12, heads=3))
    assert difference(multi_head(x, None, maps, Steps())[0], theirs(x, x, x)[0].detach()) < 1e-12


def test_the_encoding_is_ours():
    import sightline as sl

    assert difference(sl.sinusoidal(50, 9, dtype=torch.float64), encoding(50, 9, EncodingSteps())) < 1e-12


# --- Mistakes of attention ----------------------------------------------------------------------------

PLAIN = """
def mine(q, k, v):
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    weights = torch.softmax(scores, dim=-1)
    return weights @ v
"""
SCALED = "/ math.sqrt(q.shape[-1])"


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("dim=-1", "dim=-2", "softmax over the queries"),
        ("dim=-1", "dim=0", "softmax over the batch"),
        ("torch.softmax(scores, dim=-1)", "scores", "no softmax"),
        ("torch.softmax(scores, dim=-1)", "scores.exp()", "exponentials not divided by their sum"),
        ("torch.softmax(scores, dim=-1)", "scores / scores.sum(-1, keepdim=True)", "no exponential"),
        ("torch.softmax(scores, dim=-1)", "scores.sigmoid()", "sigmoid for softmax"),
        ("torch.softmax(scores, dim=-1)", "scores.flatten(-2).softmax(-1).view_as(scores)", "softmax over everything"),
        (SCALED, "", "no scale"),
        (SCALED, "/ q.shape[-1]", "scale by d, not by its root"),
        (SCALED, "* math.sqrt(q.shape[-1])", "multiplied by the root"),
        (SCALED, "/ math.sqrt(v.shape[-1])", "scale of the values"),
        (SCALED, "/ math.sqrt(k.shape[-2])", "scale by the number of keys"),
        (SCALED, "/ math.sqrt(q.shape[-2])", "scale by the number of queries"),
        (SCALED, "/ 8", "wrong scale"),
        (SCALED, "/ 2", "fixed scale"),
        ("k.transpose(-2, -1)", "k.reshape(*k.shape[:-2], k.shape[-1], k.shape[-2])", "reshape for transpose"),
        ("weights @ v", "weights.transpose(-2, -1) @ v", "weights transposed"),
    ],
)
def test_a_mistake_of_the_scores_is_named(tmp_path, old, new, named):
    assert old in PLAIN
    report = checked(tmp_path, PLAIN.replace(old, new))
    assert names(report) == [named]
    assert not report.passed
    assert named == "fixed scale" or report.example is not None


def test_a_softmax_that_overflows(tmp_path):
    code = PLAIN.replace("torch.softmax(scores, dim=-1)", "scores.exp() / scores.exp().sum(-1, keepdim=True)")
    report = checked(tmp_path, code)
    assert names(report) == ["softmax overflows"]
    assert [finding.law for finding in report.findings if finding.status == "fail"] == ["large scores"]


def test_two_mistakes_are_both_named(tmp_path):
    report = checked(tmp_path, PLAIN.replace(SCALED, "").replace("dim=-1", "dim=-2"))
    assert names(report) == ["softmax over the queries", "no scale"]


def test_what_no_known_mistake_explains_is_told(tmp_path):
    report = checked(tmp_path, PLAIN.replace("return weights @ v", "return weights @ v + q.mean()"))
    assert not report.passed and names(report) == []
    assert "None of the known mistakes" in report.text()


MASKED = """
def mine(q, k, v, mask=None):
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    return weights @ v, weights
"""


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("~mask", "mask", "mask inverted"),
        ('float("-inf")', "0.0", "masked with 0, not with -inf"),
        ('float("-inf")', "1e-9", "masked with 0, not with -inf"),
        ("scores = scores.masked_fill", "scores.masked_fill", "mask ignored"),
    ],
)
def test_a_mistake_of_the_mask_is_named(tmp_path, old, new, named):
    report = checked(tmp_path, MASKED.replace(old, new))
    assert names(report) == [named]
    assert [finding.law for finding in report.findings if finding.status == "fail"] == ["mask"]


@pytest.mark.parametrize(
    ("late", "named"),
    [
        ("weights * mask", "mask added after the softmax"),
        ("weights.masked_fill(~mask, 0)", "mask added after the softmax"),
        ("weights + mask", "mask added to the weights"),
        ("weights + (~mask) * -1e9", "masked weights are -1e9"),
    ],
)
def test_a_mask_after_the_softmax_is_named(tmp_path, late, named):
    code = f"""
def mine(q, k, v, mask=None):
    weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
    if mask is not None:
        weights = {late}
    return weights @ v
"""
    assert names(checked(tmp_path, code)) == [named]


CAUSAL_CODE = """
def causal_attention(q, k, v):
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    hidden = torch.ones(q.shape[-2], k.shape[-2]).triu(diagonal=1).bool()
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
"""


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("diagonal=1", "diagonal=2", "causal off by one: sees the next token"),
        ("diagonal=1", "diagonal=0", "causal off by one: does not see itself"),
        ("triu(diagonal=1)", "tril(diagonal=-1)", "causal upside down"),
        ("triu(diagonal=1)", "tril()", "causal inverted"),
        ('float("-inf")', "0", "masked with 0, not with -inf"),
        ("scores.masked_fill(hidden, float", "torch.add(scores, 0 * float", "not causal"),
    ],
)
def test_a_mistake_of_causality_is_named(tmp_path, old, new, named):
    code = CAUSAL_CODE.replace(old, new)
    if named == "not causal":
        code = PLAIN.replace("mine", "causal_attention")
    report = checked(tmp_path, code)
    assert names(report) == [named]
    assert status(report, "causality") == "fail"


def test_an_argument_for_causality_is_tried(tmp_path):
    code = """
def mine(q, k, v, causal=False):
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -1e9).triu(DIAGONAL)
    return scores.softmax(-1) @ v
"""
    assert checked(tmp_path, code.replace("DIAGONAL", "1")).passed
    assert names(checked(tmp_path, code.replace("DIAGONAL", "2"))) == ["causal off by one: sees the next token"]


# --- Right attention ----------------------------------------------------------------------------------

RIGHT = {
    "PyTorch's own": "mine = F.scaled_dot_product_attention",
    "plain": PLAIN,
    "with a mask": MASKED,
    "causal": CAUSAL_CODE,
    "einsum": """
def mine(query, key, value, mask=None):
    scores = torch.einsum("bqd,bkd->bqk", query, key) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(mask == 0, -1e9)
    return torch.einsum("bqk,bkd->bqd", scores.softmax(dim=-1), value)
""",
    "a loop over tokens": """
def mine(q, k, v):
    rows = []
    for n in range(len(q)):
        scores = torch.stack([q[n] @ k[m] for m in range(len(k))]) / len(q[n]) ** 0.5
        weights = torch.exp(scores - scores.max())
        rows.append(sum(w * x for w, x in zip(weights / weights.sum(), v)))
    return rows
""",
    "numpy": """
def mine(q, k, v):
    scores = q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1])
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = scores / scores.sum(axis=-1, keepdims=True)
    return weights @ v, weights
""",
    "numpy, tokens in columns": """
def mine(Q, K, V):
    scores = K.T @ Q / np.sqrt(len(Q))
    scores = np.exp(scores - scores.max(axis=0))
    weights = scores / scores.sum(axis=0)
    return V @ weights, weights
""",
    "numpy's einsum": """
def mine(Q, K, V, mask=None):
    scores = np.einsum("bqd,bkd->bqk", Q, K) / np.sqrt(Q.shape[-1])
    if mask is not None:
        scores = scores + (1.0 - mask) * -1e9
    weights = np.exp(scores - np.max(scores, axis=-1, keepdims=True))
    return np.einsum("bqk,bkd->bqd", weights / weights.sum(axis=-1, keepdims=True), V)
""",
    "block by block": """
def mine(q, k, v):
    most, total, output = torch.full((*q.shape[:-1], 1), -torch.inf), 0, 0
    for keys, values in zip(k.split(2, dim=-2), v.split(2, dim=-2)):
        scores = q @ keys.mT * q.shape[-1] ** -0.5
        higher = torch.maximum(most, scores.amax(-1, keepdim=True))
        share, old = (scores - higher).exp(), (most - higher).exp()
        total, output, most = total * old + share.sum(-1, keepdim=True), output * old + share @ values, higher
    return output / total
""",
    "lists": """
def mine(q, k, v):
    result = []
    for query in q.tolist():
        scores = [sum(a * b for a, b in zip(query, key)) / math.sqrt(len(query)) for key in k.tolist()]
        most = max(scores)
        weights = [math.exp(score - most) for score in scores]
        result.append([sum(w * x for w, x in zip(weights, column)) / sum(weights) for column in zip(*v.tolist())])
    return result
""",
    "four axes, values first": """
def mine(values, keys, queries, mask):
    energy = torch.einsum("nhqd,nhkd->nhqk", [queries, keys])
    if mask is not None:
        energy = energy.masked_fill(mask == 0, float("-1e20"))
    return torch.einsum("nhql,nhld->nhqd", [torch.softmax(energy / queries.shape[-1] ** 0.5, dim=3), values])
""",
    "a mask that is added": """
def mine(q, k, v, attn_mask=None):
    scores = q @ k.mT / math.sqrt(q.size(-1))
    return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ v
""",
    "as many keys as queries": """
def mine(q, k, v):
    n, d = q.shape
    out = torch.zeros(n, v.shape[1], dtype=q.dtype)
    for i in range(n):
        for j in range(n):
            out[i] = out[i] + torch.softmax(k[:n] @ q[i] / d ** 0.5, 0)[j] * v[j]
    assert k.shape == q.shape
    return out
""",
    "several heads": """
def mine(q, k, v, num_heads):
    def split(x):
        return x.view(*x.shape[:2], num_heads, -1).transpose(1, 2)
    heads = F.scaled_dot_product_attention(split(q), split(k), split(v))
    return heads.transpose(1, 2).reshape(*q.shape[:2], -1)
""",
    "an object": """
class Attention(nn.Module):
    def __init__(self, dropout=0.1):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
    def forward(self, query, key, value, mask=None):
        weights = (query @ key.mT / math.sqrt(query.size(-1)))
        if mask is not None:
            weights = weights.masked_fill(mask == 0, -1e9)
        weights = self.dropout(weights.softmax(-1))
        return weights @ value, weights
""",
}


@pytest.mark.parametrize("style", RIGHT)
def test_right_attention_is_not_accused(tmp_path, style):
    name = "mine" if style == "PyTorch's own" else None
    report = checked(tmp_path, RIGHT[style], name)
    assert report.passed, report.text()
    assert not report.mistakes and report.example is None


def test_another_scale_is_right_where_it_is_asked_for(tmp_path):
    unscaled = PLAIN.replace(SCALED, "")
    assert checked(tmp_path, unscaled, scale=1.0).passed
    assert not checked(tmp_path, PLAIN, scale=1.0).passed


def test_true_may_hide_where_that_is_said(tmp_path):
    assert checked(tmp_path, MASKED.replace("~mask", "mask"), mask_means="hide").passed
    assert names(checked(tmp_path, MASKED, mask_means="hide")) == ["mask inverted"]


def test_what_is_expected_of_causality(tmp_path):
    code = CAUSAL_CODE.replace("causal_attention", "mine")
    assert checked(tmp_path, code).passed and checked(tmp_path, code, causal=True).passed
    assert not checked(tmp_path, code, causal=False).passed
    assert names(checked(tmp_path, PLAIN, causal=True)) == ["not causal"]


def test_heads_mixed_in_a_function(tmp_path):
    mixed = RIGHT["several heads"].replace(
        "x.view(*x.shape[:2], num_heads, -1).transpose(1, 2)", "x.reshape(len(x), num_heads, x.shape[1], -1)"
    )
    assert names(checked(tmp_path, mixed)) == ["heads mixed"]
    mixed = RIGHT["several heads"].replace("heads.transpose(1, 2).", "heads.")
    assert names(checked(tmp_path, mixed)) == ["heads mixed when joined"]


# --- The other laws -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "law"),
    [
        (PLAIN.replace("    scores =", "    v += 0.5\n    scores ="), "inputs"),
        (PLAIN.replace("weights @ v", "weights @ v * (1 + 1e-5 * torch.rand(()))"), "twice the same"),
        (PLAIN.replace("weights @ v", "weights @ v.detach()"), "gradients"),
        (PLAIN.replace("weights @ v", "weights @ v + 0 / (q.shape[-1] < 16)"), "scale"),
        (PLAIN.replace("    weights", "    scores = scores.bfloat16().float()\n    weights"), "the definition"),
        (PLAIN.replace("    weights", "    scores = scores.clamp(max=500)\n    weights"), "large scores"),
        (PLAIN.replace("weights @ v", "(weights @ v)[..., :3]"), "shape"),
        (MASKED.replace("return weights @ v, weights", "return weights @ v, weights * 2"), "the weights"),
        (PLAIN.replace("weights @ v", "weights @ v if q.dtype != torch.bfloat16 else weights @ v * 1.1"), "bfloat16"),
    ],
)
def test_each_law_can_fail(tmp_path, code, law):
    report = checked(tmp_path, code)
    assert law in [finding.law for finding in report.findings if finding.status == "fail"], report.text()


def test_the_order_of_tokens_matters_where_positions_are_added_inside(tmp_path):
    code = PLAIN.replace("    scores", "    k = k + torch.arange(k.shape[-2])[:, None]\n    scores", 1)
    assert status(checked(tmp_path, code), "order of tokens") == "fail"


@pytest.mark.parametrize(("fill", "said"), [('float("-inf")', "NaN"), ("-1e9", "still mixes")])
def test_an_empty_row_is_worth_a_note(tmp_path, fill, said):
    code = MASKED.replace('float("-inf")', fill)
    report = checked(tmp_path, code)
    assert report.passed
    (finding,) = [finding for finding in report.findings if finding.law == "empty rows"]
    assert finding.status == "note"
    assert said in finding.said


# --- Positions ----------------------------------------------------------------------------------------

TABLE = """
def positions(length, d_model):
    table = np.zeros((length, d_model))
    for pos in range(length):
        for i in range(0, d_model, 2):
            table[pos, i] = np.sin(pos / 10000 ** (i / d_model))
            table[pos, i + 1] = np.cos(pos / 10000 ** (i / d_model))
    return table
"""
ADDED = """
class Positions(nn.Module):
    def __init__(self, d_model, dropout=0.1, max_len=100):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        angle = torch.arange(max_len)[:, None] * torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
        table = torch.zeros(max_len, d_model)
        table[:, 0::2] = angle.sin()
        table[:, 1::2] = angle.cos()
        self.register_buffer("table", table)
    def forward(self, x):
        return self.dropout(x + self.table[: x.size(1)])
"""


@pytest.mark.parametrize(
    "code",
    [
        TABLE,
        TABLE.replace("length, d_model):", "d_model, max_len):\n    length = max_len"),
        TABLE.replace("return table", "return table.T"),
        TABLE.replace("return table", "return table[None]"),
        TABLE.replace("return table", "return torch.tensor(table, dtype=torch.float32)"),
        ADDED,
        ADDED.replace("self.table[: x.size(1)]", "self.table[: x.size(0), None]"),
        ADDED + "\ndef build():\n    return Positions(32)\n",
        "def mine(x):\n    import sightline as sl\n    return x + sl.sinusoidal(*x.shape[-2:])\n",
    ],
)
def test_a_right_encoding_is_not_accused(tmp_path, code):
    report = checked(tmp_path, code, "build" if "build" in code else None)
    assert report.passed, report.text()
    assert report.findings[1].law == "the definition"


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("np.sin", "np.tan", None),
        ("for pos in range(length)", "for pos in range(length) if False else []", None),
        ("pos / 10000 ** (i / d_model)", "pos / 10000 ** (2 * i / d_model)", "wrong exponent: 4i / d_model"),
        ("pos / 10000 ** (i / d_model)", "pos / 10000 ** (i // 2 / d_model)", "wrong exponent: i / d_model"),
        ("pos / 10000 ** (i / d_model)", "pos * 10000 ** (i / d_model)", "wrong exponent: its sign"),
        ("pos / 10000", "(pos + 1) / 10000", "positions from 1"),
        ("10000", "1000", "base 1000"),
        ("np.cos", "np.sin", "sine alone"),
        ("return table", "return np.hstack((table[:, 0::2], table[:, 1::2]))", "halves, not pairs"),
        (
            "np.cos(pos / 10000 ** (i / d_model))",
            "np.cos(pos / 10000 ** ((i + 1) / d_model))",
            "each column has its own",
        ),
    ],
)
def test_a_mistake_of_an_encoding_is_named(tmp_path, old, new, named):
    report = checked(tmp_path, TABLE.replace(old, new))
    assert not report.passed
    assert len(names(report)) == (named is not None) and (named is None or named in names(report)[0])


def test_sine_and_cosine_swapped(tmp_path):
    swapped = TABLE.replace("np.sin", "SIN").replace("np.cos", "np.sin").replace("SIN", "np.cos")
    assert names(checked(tmp_path, swapped)) == ["sine and cosine swapped"]
    swapped = ADDED.replace("0::2] = angle.sin", "0::2] = angle.cos").replace("1::2] = angle.cos", "1::2] = angle.sin")
    assert names(checked(tmp_path, swapped)) == ["sine and cosine swapped"]


# --- Modules ------------------------------------------------------------------------------------------

ONE_HEAD = """
class Head(nn.Module):
    def __init__(self, d_in, d_k, d_v):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(d_in, d_k), nn.Linear(d_in, d_k), nn.Linear(d_in, d_v)
    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        return (q @ k.mT / math.sqrt(q.size(-1))).softmax(-1) @ v
"""
MANY = """
class Many(nn.Module):
    def __init__(self, d_model, num_heads, dropout=0.1):
        super().__init__()
        self.num_heads, self.width = num_heads, d_model // num_heads
        self.W_q, self.W_k, self.W_v, self.W_o = (nn.Linear(d_model, d_model) for _ in range(4))
        self.dropout = nn.Dropout(dropout)
    def split(self, x):
        return x.view(*x.shape[:2], self.num_heads, self.width).transpose(1, 2)
    def forward(self, x, mask=None):
        q, k, v = self.split(self.W_q(x)), self.split(self.W_k(x)), self.split(self.W_v(x))
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.width)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = self.dropout(scores.softmax(-1))
        joined = (weights @ v).transpose(1, 2).reshape(*x.shape)
        return self.W_o(joined), weights
"""
BY_HEAD = """
class Head(nn.Module):
    def __init__(self, d_model, width):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(d_model, width, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(32, 32)))
    def forward(self, x):
        scores = self.query(x) @ self.key(x).mT * self.key.out_features ** -0.5
        scores = scores.masked_fill(self.tril[: x.size(1), : x.size(1)] == 0, float("-inf"))
        return scores.softmax(-1) @ self.value(x)

class Several(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.heads = nn.ModuleList(Head(n_embd, n_embd // n_head) for _ in range(n_head))
        self.proj = nn.Linear(n_embd, n_embd)
    def forward(self, x):
        return self.proj(torch.cat([head(x) for head in self.heads], dim=-1))
"""
IN_NUMPY = """
class Attention:
    def __init__(self, d_model):
        random = np.random.default_rng(0)
        self.W_q, self.W_k, self.W_v = random.normal(size=(3, d_model, d_model))
        self.b_q, self.b_k, self.b_v = random.normal(size=(3, d_model))
    def __call__(self, x):
        q, k, v = x @ self.W_q + self.b_q, x @ self.W_k + self.b_k, x @ self.W_v + self.b_v
        scores = q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1])
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        return shares / shares.sum(-1, keepdims=True) @ v
"""
FUSED = """
class Fused(nn.Module):
    def __init__(self, d_model, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv, self.to_out = nn.Linear(d_model, 3 * d_model, bias=False), nn.Linear(d_model, d_model)
    def forward(self, x):
        k, q, v = (t.unflatten(-1, (-1, self.num_heads)).permute(0, 3, 1, 2) for t in self.to_qkv(x).chunk(3, -1))
        return self.to_out(F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(0, 2, 3, 1).flatten(-2))
"""
OURS = """
import sightline as sl
def build():
    return sl.MultiHeadAttention(16, 4, d_k=8, d_v=12, num_groups=4)
"""


LIST = """
class Listed(nn.Module):
    def __init__(self, h, d_model):
        super().__init__()
        self.h, self.maps = h, nn.ModuleList(nn.Linear(d_model, d_model) for _ in range(4))
    def forward(self, query, key, value):
        q, k, v = (m(x).unflatten(-1, (self.h, -1)).mT for m, x in zip(self.maps, (query, key, value)))
        q, k, v = (x.movedim(-1, 1) for x in (q, k, v))
        return self.maps[-1](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
"""
VALUES_FIRST = """
class Attention(nn.Module):
    def __init__(self, embed_size, heads):
        super().__init__()
        self.heads = heads
        self.values, self.keys, self.queries = (nn.Linear(embed_size, embed_size, bias=False) for _ in range(3))
        self.fc_out = nn.Linear(embed_size, embed_size)
    def forward(self, values, keys, query, mask):
        split = lambda x: x.unflatten(-1, (self.heads, -1))
        q, k, v = split(self.queries(query)), split(self.keys(keys)), split(self.values(values))
        energy = torch.einsum("nqhd,nkhd->nhqk", q, k) / q.shape[-1] ** 0.5
        weights = energy.masked_fill(mask == 0, float("-1e20")).softmax(3)
        return self.fc_out(torch.einsum("nhqk,nkhd->nqhd", weights, v).flatten(2))
"""


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (ONE_HEAD, None),
        (MANY, None),
        (LIST, None),
        (VALUES_FIRST, None),
        (BY_HEAD, "Several"),
        (IN_NUMPY, None),
        (FUSED, None),
        (OURS, None),
        ("def build():\n    return nn.MultiheadAttention(12, 3, batch_first=True)\n", None),
        ("mine = nn.MultiheadAttention(8, 2)", "mine"),
    ],
)
def test_a_right_module_is_not_accused(tmp_path, code, name):
    report = checked(tmp_path, code, name)
    assert report.passed, report.text()
    assert not report.mistakes


SPLIT = "x.view(*x.shape[:2], self.num_heads, self.width).transpose(1, 2)"


@pytest.mark.parametrize(
    ("code", "old", "new", "named"),
    [
        (ONE_HEAD, "self.query(x)", "x @ self.query.weight.T", "the bias of query lost"),
        (ONE_HEAD, "self.value(x)", "x @ self.value.weight.T", "the bias of value lost"),
        (IN_NUMPY, " + self.b_v", "", "the bias of value lost"),
        (MANY, "self.W_o(joined)", "joined @ self.W_o.weight.T", "the bias of output lost"),
        (MANY, "self.W_o(joined)", "joined", "output map unused"),
        (MANY, "self.W_k(x)", "self.W_q(x)", "query's map used for key"),
        (MANY, "self.W_o(joined)", "self.W_o(joined) + x", "input added"),
        (MANY, SPLIT, "x.reshape(len(x), self.num_heads, x.shape[1], self.width)", "heads mixed"),
        (MANY, "(weights @ v).transpose(1, 2)", "(weights @ v)", "heads mixed when joined"),
        (MANY, "math.sqrt(self.width)", "math.sqrt(x.shape[-1])", "scale of the whole width"),
        (MANY, "/ math.sqrt(self.width)", "", "no scale"),
        (MANY, "scores.softmax(-1)", "scores.softmax(1)", "softmax over the heads"),
        (MANY, "scores.softmax(-1)", "scores.softmax(2)", "softmax over the queries"),
        (MANY, "~mask", "mask", "mask inverted"),
    ],
)
def test_a_mistake_of_a_module_is_named(tmp_path, code, old, new, named):
    assert old in code
    report = checked(tmp_path, code.replace(old, new))
    assert names(report) == [named]
    assert not report.passed


def test_a_norm_inside_is_told(tmp_path):
    code = ONE_HEAD.replace("super().__init__()", "super().__init__()\n        self.norm = nn.LayerNorm(d_in)")
    report = checked(tmp_path, code.replace("def forward(self, x):", "def forward(self, x):\n        x = self.norm(x)"))
    (said,) = [finding.said for finding in report.findings if finding.law == "the definition"]
    assert said.endswith("the definition has no place for its norm.weight, norm.bias")


def test_a_lost_bias_of_the_keys_changes_nothing(tmp_path):
    """It adds the same to every score of a query, which the softmax takes out again."""
    assert checked(tmp_path, ONE_HEAD.replace("self.key(x)", "x @ self.key.weight.T")).passed


def test_a_module_with_a_detached_weight_cannot_be_trained(tmp_path):
    report = checked(
        tmp_path, ONE_HEAD.replace("self.value(x)", "F.linear(x, self.value.weight.detach(), self.value.bias)")
    )
    assert status(report, "gradients") == "fail"


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # as its own process does
@pytest.mark.parametrize(
    ("code", "old", "new"),
    [
        (MANY, "scores.softmax(-1)", "scores.exp() / scores.exp().sum(-1, keepdim=True)"),
        (IN_NUMPY, "scores - scores.max(-1, keepdims=True)", "scores"),
    ],
)
def test_a_module_whose_softmax_overflows(tmp_path, code, old, new):
    report = checked(tmp_path, code.replace(old, new))
    assert names(report) == ["softmax overflows"]
    assert [finding.law for finding in report.findings if finding.status == "fail"] == ["large scores"]


@pytest.mark.parametrize(
    ("new", "law"),
    [
        ("scores.clamp(max=500).softmax(-1)", "large scores"),
        ("scores.softmax(-1) * (1.1 if x.dtype == torch.bfloat16 else 1)", "bfloat16"),
        ("scores.softmax(-1) * (math.nan if x.dtype == torch.bfloat16 else 1)", "bfloat16"),
    ],
)
def test_a_module_can_fail_in_numbers_alone(tmp_path, new, law):
    report = checked(tmp_path, MANY.replace("scores.softmax(-1)", new))
    assert [finding.law for finding in report.findings if finding.status == "fail"] == [law]


@pytest.mark.parametrize(("code", "expected"), [(MANY, "ok"), (FUSED, "ok"), (OURS, "ok"), (IN_NUMPY, None)])
def test_a_module_is_tried_in_bfloat16(tmp_path, code, expected):
    """A copy of it: what is tried afterwards is in float32 as before."""
    report = checked(tmp_path, code)
    found = [finding.status for finding in report.findings if finding.law == "bfloat16"]
    assert found == ([] if expected is None else [expected])
    assert expected is None or status(report, "gradients") == "ok"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("scores.softmax(-1)", "scores.float().softmax(-1)", "not taken: "),
        ("self.W_o(joined)", "self.W_o(joined).float()", "it gives torch.float32 for bfloat16"),
    ],
)
def test_what_a_module_does_not_do_in_bfloat16_is_a_note(tmp_path, old, new, said):
    report = checked(tmp_path, MANY.replace(old, new))
    (found,) = [finding for finding in report.findings if finding.law == "bfloat16"]
    assert report.passed and found.status == "note" and said in found.said


# --- Every mistake ------------------------------------------------------------------------------------


def test_known_mistakes_are_told_apart():
    """With the sizes that are asked for, no mistake gives what the definition or another mistake gives."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 12, generator=random, dtype=torch.float64)
    weights = {role: torch.randn(12, 12, generator=random, dtype=torch.float64) for role in ("query", "key", "value")}
    weights["output"] = torch.randn(12, 12, generator=random, dtype=torch.float64)
    biases = {role: torch.randn(12, generator=random, dtype=torch.float64) for role in weights}
    maps = Maps(weights=weights, biases=biases, heads=3)
    # One that the softmax takes out; others that are alike where all is square, as it is not in functions.
    same = {"the bias of key lost", "scale of the values", "scale by the number of queries", "mask transposed"}
    known = [*SCORES, *MASKS, *CAUSAL, *HEADS, *LOST, *ROLES]
    steps = Steps(pattern=causal)
    results = {
        mistake.name: multi_head(x, None, maps, steps.wrong(**mistake.steps))[0]
        for mistake in known
        if mistake.name not in same
    }
    results[""] = multi_head(x, None, maps, steps)[0]
    alike = {
        (one, other)
        for (one, a), (other, b) in itertools.combinations(results.items(), 2)
        if difference(a, b) < 1e-3 and a.isfinite().all()
    }
    assert alike == set()


@settings(max_examples=12)
@given(st.sampled_from(SCORES), st.sampled_from([*CAUSAL, *MASKS]))
def test_two_mistakes_at_once_are_explained(one, other):
    random = torch.Generator().manual_seed(1)
    query, key, value = torch.randn(3, 2, 2, 5, 4, generator=random, dtype=torch.float64)
    right = Steps(pattern=causal)
    if one.steps.keys() & other.steps.keys():
        return

    def definition(steps):
        return attend(query, key, value, None, steps)[0]

    wrong = definition(right.wrong(**one.steps, **other.steps))
    assume(wrong.isfinite().all())
    some = explain(wrong, definition, right, [*SCORES, *CAUSAL, *MASKS])
    assert some is not None
    changes = {name: step for mistake in some for name, step in mistake.steps.items()}
    assert difference(wrong, definition(right.wrong(**changes))) < 1e-4


def test_known_encodings_are_told_apart():
    for mistake in ENCODINGS:
        table = encoding(20, 16, EncodingSteps().wrong(**mistake.steps))
        found = explain(table, lambda steps: encoding(20, 16, steps), EncodingSteps(), ENCODINGS)
        assert found == (mistake,)


# --- The report ---------------------------------------------------------------------------------------


def test_the_report_is_narrow_and_complete(tmp_path):
    report = checked(tmp_path, MASKED.replace("~mask", "mask").replace(SCALED, ""))
    for width in (50, 80):
        text = report.text(width)
        assert max(len(line) for line in text.splitlines()[1:]) <= width
        for mistake in report.mistakes:
            assert mistake.what.split()[-1] in text
    told = json.loads(json.dumps(report.to_json()))
    assert told["verdict"] == "fail"
    assert [mistake["name"] for mistake in told["mistakes"]] == ["no scale", "mask inverted"]
    assert len(told["example"]["yours"]) == len(told["example"]["expected"]) == 3


def test_what_is_not_finite_is_null_for_programs(tmp_path):
    report = checked(tmp_path, PLAIN.replace("weights @ v", "weights @ v / 0"))
    assert not report.passed
    assert json.dumps(report.to_json(), allow_nan=False)
    assert names(report) == []


@pytest.mark.parametrize(
    ("code", "config", "says"),
    [
        ("def mine(q, k, v):\n    return torch.zeros(()).expand(10**9)", {}, "returned 1000000000 numbers"),
        ("def mine(q, k, v):\n    return q + 1j", {}, "expected a few real ones"),
        (
            "def mine(q, k):\n    return q",
            {"kind": "attention"},
            "expected a function of (query, key, value), got (q, k)",
        ),
        ("def mine(q, k, v, a, b):\n    return q", {}, "'b' is not known: give it a default"),
        (
            "def mine(q, k, v):\n    raise RuntimeError('no')",
            {},
            "line 8, raised RuntimeError: no, while it was called",
        ),
        ("def mine(q, k, v):\n    return 'text'", {}, "returned str, expected an array"),
        ("def mine(q, k, v):\n    ...", {}, "mine is not written yet, or lacks its return: it gives nothing back"),
        ("def mine(length, d_model):\n    return ...", {}, "mine is not written yet"),
        (
            ONE_HEAD.replace("return", "result ="),
            {},
            "is not written yet, or lacks its return",
        ),
        ("def one(): ...\ndef two(): ...", {}, "needs a name, FILE.py:FUNCTION; it defines one, two"),
        (
            ONE_HEAD.replace("self.query, self.key", "self.a, self.b").replace("self.key(x)", "x"),
            {},
            "found no map to query",
        ),
        (ONE_HEAD.replace("d_in, d_k, d_v", "d_in, d_k, d_v, colour"), {}, "colour is not known"),
        (PLAIN, {"kind": "module"}, "has no parameters"),
        (PLAIN, {"mask_means": "hide"}, "takes no mask"),
    ],
)
def test_what_cannot_be_run_is_told_in_a_line(tmp_path, code, config, says):
    line = refusal(tmp_path, code, **config)
    assert says in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("code", "config"),
    [(TABLE, {"scale": 1.0}), (TABLE, {"causal": True}), (TABLE, {"speed": True}), (ONE_HEAD, {"speed": True})],
)
def test_a_setting_without_effect_is_refused(tmp_path, code, config):
    with pytest.raises(ValueError, match="drop"):
        checked(tmp_path, code, **config)


@pytest.mark.parametrize("config", [{"seconds": 0}, {"memory_gb": -1}, {"scale": 0}])
def test_numbers_that_make_no_sense_are_refused(tmp_path, config):
    with pytest.raises(ValueError, match="above 0"):
        checked(tmp_path, PLAIN, **config)


# --- What is here already -----------------------------------------------------------------------------


def test_a_function_itself_is_checked_as_its_file_would_be():
    def mine(query, key, value):
        print("called")
        return (query @ key.mT).softmax(-1) @ value

    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    report = check(mine)
    assert report.subject == "mine"
    assert names(report) == ["no scale"]
    assert report.printed.startswith("called")
    assert torch.equal(torch.rand(1), expected)  # its draws are not the notebook's
    assert not check(lambda query, key, value: torch.dropout(query @ key.mT, 0.5, True).softmax(-1) @ value).passed


def test_a_module_itself_keeps_its_weights():
    module = MultiHeadAttention(12, 3)
    before = {name: weight.clone() for name, weight in module.named_parameters()}
    assert check(module).passed
    assert module.training
    assert all(torch.equal(weight, before[name]) for name, weight in module.named_parameters())


def test_what_cannot_be_checked_here_is_one_line():
    def broken(query, key, value):
        raise ZeroDivisionError("no")

    def todo(query, key, value): ...

    with pytest.raises(CheckError, match=r"broken, line \d+, raised ZeroDivisionError: no, while"):
        check(broken)
    with pytest.raises(CheckError, match="todo is not written yet"):
        check(todo)
    with pytest.raises(CheckError, match="int cannot be called"):
        check(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seconds and memory_gb limit code in a file"):
        check(todo, CheckConfig(seconds=1))
