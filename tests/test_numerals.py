"""The embedded job is right, and what is held out is in no form in training."""

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline.numerals import LARGEST, STYLES, examples, in_words, year_in_words

WORDS = {word: number for number, word in enumerate(in_words(n) for n in range(100))}


def read(words: str) -> int:
    """The number that words stand for, by reading them from the left."""
    total = part = 0
    for word in words.split():
        if word == "thousand":
            total, part = part * 1000, 0
        elif word == "hundred":
            part *= 100
        else:
            part += WORDS[word]
    return total + part


@given(st.integers(0, LARGEST))
def test_words_read_back(number):
    assert read(in_words(number)) == number


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (100, "one hundred"),
        (1001, "one thousand one"),
        (90_017, "ninety thousand seventeen"),
        (999_999, "nine hundred ninety-nine thousand nine hundred ninety-nine"),
    ],
)
def test_known_words(number, words):
    assert in_words(number) == words


def test_years_are_spoken():
    years = {1800: "eighteen hundred", 1905: "nineteen oh five", 2000: "two thousand", 2010: "twenty ten"}
    assert {year: year_in_words(year) for year in years} == years


def test_every_style_of_a_day():
    day = datetime.date(1969, 7, 21)
    assert [style(day) for style in STYLES] == [
        "21 July 1969",
        "21 Jul 1969",
        "July 21, 1969",
        "Jul 21, 1969",
        "July 21st, 1969",
        "the 21st of July, 1969",
        "Monday, 21 July 1969",
        "Mon Jul 21 1969",
        "21.07.1969",
        "1969/07/21",
        "21-JUL-1969",
        "the twenty-first of July nineteen sixty-nine",
    ]
    endings = {1: "1st", 2: "2nd", 3: "3rd", 4: "4th", 11: "11th", 12: "12th", 13: "13th", 22: "22nd", 31: "31st"}
    for number, ordinal in endings.items():
        assert ordinal in STYLES[4](day.replace(day=number))


def value(source: str, target: str) -> str:
    return target if target[-1].isdigit() else source


def test_nothing_held_out_is_in_training():
    train, held_out = examples(20_000, held_out=False), examples(1_000, held_out=True)
    assert len(dict(train)) == 20_000 and len(dict(held_out)) == 1_000
    assert not {value(*pair) for pair in train} & {value(*pair) for pair in held_out}
    assert not {text for pair in train for text in pair} & {text for pair in held_out for text in pair}
    assert examples(50, held_out=True) == held_out[:50]
    assert examples(50, held_out=True, seed=1) != held_out[:50]


def test_every_answer_is_right():
    for source, target in examples(3_000, held_out=False):
        if target[0].isalpha():
            assert read(target) == int(source)
        elif "-" in target:
            assert source in [style(datetime.date.fromisoformat(target)) for style in STYLES]
        else:
            assert read(source) == int(target)


def test_what_has_no_words_is_refused():
    with pytest.raises(ValueError, match="from 0 to 999,999, got 1000000"):
        in_words(1_000_000)
    with pytest.raises(ValueError, match="from 1100 to 2099, got 2100"):
        year_in_words(2100)
