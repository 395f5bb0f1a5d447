"""Headings, lines and search in a text of tokens."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline import passages as passages_module
from sightline.passages import Passages


def tokens(text: str) -> list[str]:
    return re.findall(r"\w+|\W", text)


TEXTS = {
    " = Title one = \n\n some = text \n = = Sub = = \n more\n": ["Title one", "Sub"],
    "# Head\n\ntext # no\n## Second  \n#no\n": ["Head", "Second"],
    "CHAPTER IV\n\nOnce\nChapter 4: the thing\n part of it\n": ["CHAPTER IV", "Chapter 4: the thing"],
    "ROMEO:\nhello there\n\nJULIET:\nO my\n\n\nand so": ["ROMEO:", "JULIET:", "and so"],
    "one line": ["one line"],
    "": [],
}


@pytest.mark.parametrize("text", TEXTS)
def test_titles_are_headings_or_else_paragraphs(text):
    passages = Passages(tokens(text), "")
    assert [title for _, title in passages.titles] == TEXTS[text]
    for token, title in passages.titles:
        assert title.startswith(tokens(text)[token])


def test_lines_begin_where_they_do():
    text = "one two\nthree\n\nfour"
    assert [tokens(text)[token] for token in Passages(tokens(text), "").lines] == ["one", "three", "\n", "four"]


def test_titles_of_words_with_spaces_between():
    assert Passages(["=", "X", "Y", "=", "\n", "a", "b"], " ").titles == [(1, "X Y")]


def test_many_are_thinned_evenly(monkeypatch):
    monkeypatch.setattr(passages_module, "MOST_TITLES", 3)
    monkeypatch.setattr(passages_module, "MOST_LINES", 4)
    passages = Passages(tokens("".join(f"# T{n}\n" for n in range(9))), "")
    assert [title for _, title in passages.titles] == ["T0", "T3", "T6"]
    assert len(passages.lines) == 4


def test_a_long_title_is_cut_at_a_word():
    (_, title), *_ = Passages(tokens("# " + "word " * 40), "").titles
    assert len(title) <= 60 and re.fullmatch(r"(word )+word\u2026", title)


def test_search_ignores_case_and_the_edges_of_tokens():
    passages = Passages(["the", " c", "at", " sat", " Caterpillar"], "")
    assert passages.search("CAT") == ([1, 4], [2, 1], False)
    assert passages.search("e c") == ([0], [2], False)
    assert passages.search("at", after=3).at == [3, 4]
    assert passages.search("dog") == ([], [], False) == passages.search("the", after=99)
    assert passages.search(".") == ([], [], False)
    with pytest.raises(ValueError, match="nothing to search for"):
        passages.search("")


def test_search_finds_characters_that_are_split_over_tokens():
    passages = Passages(["a", " \\xc3", "\\xa9", "t\\xe2\\x82", "\\xac", "\\xff", "end"], "")
    assert passages.text == "a \u00e9t\u20ac\ufffdend"
    assert passages.search("\u00c9T") == ([1], [3], False)
    assert passages.search("\u20ac").at == [3] and passages.search("end").at == [6]


def test_a_search_ends(monkeypatch):
    monkeypatch.setattr(passages_module, "MOST_HITS", 5)
    hits = Passages(["ab"] * 9, "").search("b")
    assert hits.at == [0, 1, 2, 3, 4] and hits.more


@given(
    st.lists(st.text(alphabet="ab \n=#\u00e9\U0001f469\\x", max_size=4)),
    st.text(alphabet="ab \u00e9", min_size=1, max_size=3),
)
def test_every_hit_holds_what_was_searched_for(pieces, wanted):
    passages = Passages(pieces, "")
    hits = passages.search(wanted)
    assert len(hits.at) == len(re.findall(re.escape(wanted), passages.text, re.IGNORECASE))
    for at, length in zip(hits.at, hits.length, strict=True):
        assert wanted.lower() in "".join(pieces[at : at + length]).lower()
    assert all(0 <= token < len(pieces) for token, _ in passages.titles)
