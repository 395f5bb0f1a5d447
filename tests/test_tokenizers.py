import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from sightline import tokenizers as ours
from sightline.tokenizers import BPE_VOCABULARY, Kind, Tokenizer

KINDS: tuple[Kind, ...] = ("words", "characters", "bpe")
TEXT = "the cat sat on the mat\n\nthe <unk> of \u00fcber caf\u00e9s @-@ isn't it ?\n   indented\r\n\U0001f600 ok\n" * 3
HARD = [
    "",
    " ",
    "\n",
    "\r\n\r\n",
    "\n \n\n  \n",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "a\u200bb\u200c\u200d\ufeff",
    "\x00\x01\x1f\x7f\x85\xa0",
    "\x1c\x1d\x1e\x1f",
    "a\tb\x0bc\x0cd\u2028e\u2029f\u3000g",
    "e\u0301 \u00e9 \ufb01",
    "<unk> <eos> a<eos>b <|endoftext|>",
    "I've we'll 1234  ...!!!   ",
    "\U0010ffff\ufffd\ufffe",
]


@pytest.fixture(scope="module")
def trained():
    return {kind: Tokenizer.train(kind, [TEXT]) for kind in KINDS}


@pytest.fixture(scope="module")
def small_words():
    return Tokenizer.train("words", ["b a b\nb a c\n"])


# Rules


@pytest.mark.parametrize("text", HARD)
def test_bpe_decodes_to_the_text(trained, text):
    assert trained["bpe"].decode(trained["bpe"].encode(text)) == text


@given(text=st.text())
def test_bpe_decodes_to_any_text(trained, text):
    assert trained["bpe"].decode(trained["bpe"].encode(text)) == text


@given(text=st.text(min_size=1))
def test_characters_decode_to_any_text_they_were_trained_on(text):
    tokenizer = Tokenizer.train("characters", [text])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text)
    assert tokenizer.unknown not in ids


@given(text=st.text(alphabet=st.sampled_from("ab\n\r\t \x1c\x85\u3000<>"), max_size=30))
def test_words_decode_to_their_words_and_lines(text):
    tokenizer = Tokenizer.train("words", ["a b ab ba\n", text])
    decoded = tokenizer.decode(tokenizer.encode(text))
    assert decoded == "\n".join(" ".join(line.split()) for line in text.split("\n"))


@given(text=st.one_of(st.text(), st.text(alphabet=st.sampled_from("the cat\n\r\t \x1c\x1f\x85\u2028\u200b'1.<unk>"))))
def test_the_saved_rules_encode_as_we_do(trained, text):
    """What transformers does with our file is the backend's own encode."""
    for tokenizer in trained.values():
        assert tokenizer._backend.encode(text).ids == tokenizer.encode(text)


@given(ids=st.lists(st.integers(0, 299)))
def test_decoding_grows_with_the_ids(trained, ids):
    for tokenizer in trained.values():
        kept = [i for i in ids if i < len(tokenizer)]
        for n in range(len(kept)):
            shorter, longer = tokenizer.decode(kept[:n]), tokenizer.decode(kept[: n + 1])
            assert longer.startswith(shorter.rstrip("\ufffd"))


def test_words_write_line_ends_as_eos_and_unseen_words_as_unk(small_words):
    ids = small_words.encode("b\n\nd a\n")
    assert small_words.pieces(ids) == ["b", "<eos>", "<eos>", "<unk>", "a", "<eos>"]
    assert small_words.decode(ids) == "b\n\n<unk> a\n"
    assert small_words.unknown == small_words.encode("d")[0]


def test_wikitext_lines_become_their_words_and_eos():
    line = " = Robert <unk> = \n \n one @-@ two @,@ three \n"
    tokenizer = Tokenizer.train("words", [line])
    pieces = tokenizer.pieces(tokenizer.encode(line))
    assert " ".join(pieces) == "= Robert <unk> = <eos> <eos> one @-@ two @,@ three <eos>"
    assert tokenizer.encode("<unk>") == [tokenizer.unknown]


def test_a_last_line_without_its_end_has_no_eos(small_words):
    assert small_words.pieces(small_words.encode("b a")) == ["b", "a"]


def test_a_word_that_contains_eos_is_a_word():
    tokenizer = Tokenizer.train("words", ["a<eos>b\n"])
    assert tokenizer.decode(tokenizer.encode("a<eos>b a<eos>b\n")) == "a<eos>b a<eos>b\n"


def test_bpe_has_no_unknown(trained):
    assert trained["bpe"].unknown is None
    assert trained["bpe"].unknown_words("\u4e2d\u6587") == []


def test_bpe_keeps_the_space_before_a_word(trained):
    tokenizer = trained["bpe"]
    assert tokenizer.pieces(tokenizer.encode("the cat")) == ["the", " cat"]


def test_bpe_merges_do_not_cross_words():
    tokenizer = Tokenizer.train("bpe", ["ab cd " * 100])
    assert not [piece for piece in tokenizer.pieces(range(len(tokenizer))) if " " in piece[1:]]


# Vocabularies


def test_vocabulary_is_in_order_of_frequency_then_of_text(small_words):
    assert small_words.pieces(range(len(small_words))) == ["<unk>", "<eos>", "b", "a", "c"]
    assert Tokenizer.train("characters", ["cbab"]).pieces(range(4)) == ["<unk>", "b", "a", "c"]


def test_vocabulary_keeps_the_most_frequent():
    tokenizer = Tokenizer.train("words", ["b a b\nb a c\n"], vocabulary=4)
    assert tokenizer.pieces(range(4)) == ["<unk>", "<eos>", "b", "a"]
    assert len(Tokenizer.train("characters", ["aab"], vocabulary=2)) == 2


def test_vocabulary_does_not_depend_on_where_the_text_is_cut():
    parts = ["the cat", " sat on\nthe", "\n\n  mat", "\nthe end of the mat\n"]
    for kind in KINDS:
        whole, cut = Tokenizer.train(kind, ["".join(parts)]), Tokenizer.train(kind, iter(parts))
        assert whole.hash == cut.hash


def test_bpe_vocabulary_is_bounded_and_trained_alike_each_time():
    sizes = [len(Tokenizer.train("bpe", [TEXT], vocabulary=size)) for size in (256, 260)]
    assert sizes == [256, 260]
    assert Tokenizer.train("bpe", [TEXT]).hash == Tokenizer.train("bpe", [TEXT]).hash
    assert len(Tokenizer.train("bpe", [TEXT])) < BPE_VOCABULARY


def test_hash_tells_tokenizers_apart(trained):
    hashes = {tokenizer.hash for tokenizer in trained.values()} | {Tokenizer.train("words", ["a"]).hash}
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("kind", "vocabulary", "message"),
    [
        ("bpe", 255, r"a bpe vocabulary has at least 256 tokens \(one for each byte\), got 255"),
        ("words", 2, r"a words vocabulary has at least 3 tokens \(<unk>, <eos> and one more\), got 2"),
        ("characters", 1, r"a characters vocabulary has at least 2 tokens \(<unk> and one more\), got 1"),
        ("character", None, r"kind must be one of words, characters, bpe, got 'character': did you mean 'characters'"),
    ],
)
def test_training_refuses(kind, vocabulary, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.train(kind, ["abc"], vocabulary)


@pytest.mark.parametrize("texts", [[], [""], [" \n "]])
def test_training_on_nothing_is_an_error(texts):
    with pytest.raises(ValueError, match="the text has no words to make a vocabulary of"):
        Tokenizer.train("words", texts)


def test_training_on_a_string_is_an_error():
    with pytest.raises(ValueError, match=r"got one string of 7 characters: give \[text\]"):
        Tokenizer.train("words", "the cat")


# For a person


def test_pieces_of_parts_of_characters_are_readable():
    tokenizer = Tokenizer.train("bpe", ["plain"], vocabulary=256)
    assert tokenizer.pieces(tokenizer.encode("\u20ac\n")) == [r"\xe2", r"\x82", r"\xac", r"\n"]


def test_pieces_of_whole_characters_are_the_characters():
    tokenizer = Tokenizer.train("bpe", ["\u20ac \u20ac " * 9])
    assert tokenizer.pieces(tokenizer.encode(" \u20ac")) == [" \u20ac"]


@given(ids=st.lists(st.integers(0, 299)))
def test_pieces_are_printable(trained, ids):
    for tokenizer in trained.values():
        kept = [i for i in ids if i < len(tokenizer)]
        assert len(tokenizer.pieces(kept)) == len(kept)
        assert all(piece.isprintable() for piece in tokenizer.pieces(kept))


def test_every_byte_has_a_piece_of_its_own():
    tokenizer = Tokenizer.train("bpe", ["plain"], vocabulary=256)
    assert sorted(ours._byte_of_character().values()) == list(range(256))
    assert set(ours._byte_of_character()) == set(tokenizer._tokens)
    assert len(set(tokenizer.pieces(range(256)))) == 256


def test_unknown_words_come_in_order_and_once(small_words, trained):
    assert small_words.unknown_words("z b y z <unk>\n y") == ["z", "y"]
    assert trained["characters"].unknown_words("zza%") == ["z", "%"]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_outside_the_vocabulary_are_an_error(trained, kind):
    size = len(trained[kind])
    for wrong in (-1, size):
        for method in (trained[kind].decode, trained[kind].pieces):
            with pytest.raises(ValueError, match=f"token id {wrong} is outside the vocabulary of {size} tokens"):
                method([0, wrong])


def test_half_a_surrogate_pair_is_an_error_in_bpe(trained):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        trained["bpe"].encode("a\ud800")


# The file


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_comes_back(trained, tmp_path, kind):
    trained[kind].save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(str(tmp_path / "tokenizer.json"))
    assert (loaded.kind, len(loaded), loaded.hash) == (kind, len(trained[kind]), trained[kind].hash)
    assert loaded.unknown == trained[kind].unknown
    assert loaded.encode(TEXT) == trained[kind].encode(TEXT)
    assert repr(loaded) == f"Tokenizer(kind={kind!r}, vocabulary={len(loaded)})"


@pytest.mark.parametrize("kind", KINDS)
def test_the_library_decodes_the_file_as_we_do(trained, tmp_path, kind):
    trained[kind].save(tmp_path / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = backend.encode(TEXT).ids
    assert backend.decode(ids, skip_special_tokens=True) == trained[kind].decode(ids)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer file .*nothing"):
        Tokenizer.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"version": ', "is damaged, it should be JSON"),
        (b"\xff\xfe", "is damaged, it should be JSON"),
        (b'{"version": "1.0"}', r"is not a tokenizer.json that `tokenizers` can read"),
        (b"[]", r"is not a tokenizer.json that `tokenizers` can read"),
    ],
)
def test_a_damaged_file_is_an_error(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(tmp_path / "tokenizer.json")
    assert "\n" not in str(error.value)


def test_a_foreign_tokenizer_is_an_error(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer.json: expected the rules .* got a WordPiece model .* Whitespace"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_a_vocabulary_without_unk_or_with_a_gap_is_an_error(trained):
    saved = json.loads(trained["words"]._backend.to_str())
    for vocabulary, message in (
        ({"<unk>": 0, "a": 1}, "a words vocabulary needs <eos>"),
        ({"<unk>": 0, "<eos>": 1, "a": 7}, "count up from 0 without a gap"),
    ):
        saved["model"]["vocab"] = vocabulary
        with pytest.raises(ValueError, match=message):
            Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(saved)))
