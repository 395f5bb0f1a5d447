"""The embedded job of translation: English number words to digits and back, and dates in many styles to ISO form.

Written by rule, so that it needs no download and every answer is known. Knows nothing of models.
"""

import datetime
import random
from collections.abc import Callable
from hashlib import sha256

_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
    "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth",
    "twentieth",
)  # fmt: skip
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

LARGEST = 999_999
"""The largest number that is written in words."""
FIRST_YEAR, LAST_YEAR = 1800, 2099
HELD_OUT = 20
"""One value in so many is for validation alone; below 100 none, as nobody can know a word that was never seen."""


def in_words(number: int) -> str:
    """A whole number from 0 to 999,999 in English words.

    >>> in_words(12_345)
    'twelve thousand three hundred forty-five'
    """
    if not 0 <= number <= LARGEST:
        raise ValueError(f"in_words: expected a number from 0 to {LARGEST:,}, got {number}")
    thousands, rest = divmod(number, 1000)
    parts = [f"{_below_thousand(thousands)} thousand"] if thousands else []
    if rest or not thousands:
        parts.append(_below_thousand(rest))
    return " ".join(parts)


def _below_thousand(number: int) -> str:
    hundreds, rest = divmod(number, 100)
    parts = [f"{_ONES[hundreds]} hundred"] if hundreds else []
    if rest or not hundreds:
        parts.append(_below_hundred(rest))
    return " ".join(parts)


def _below_hundred(number: int) -> str:
    if number < 20:
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")


def year_in_words(year: int) -> str:
    """A year from 1100 to 2099 as it is spoken.

    >>> year_in_words(1987), year_in_words(1905), year_in_words(2003)
    ('nineteen eighty-seven', 'nineteen oh five', 'two thousand three')
    """
    if not 1100 <= year <= 2099:
        raise ValueError(f"year_in_words: expected a year from 1100 to 2099, got {year}")
    century, rest = divmod(year, 100)
    if 2000 <= year <= 2009:
        return in_words(year)
    if not rest:
        return f"{_below_hundred(century)} hundred"
    return f"{_below_hundred(century)} {f'oh {_ONES[rest]}' if rest < 10 else _below_hundred(rest)}"


def _ordinal(day: int) -> str:
    ending = "th" if 11 <= day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"


def _ordinal_in_words(day: int) -> str:
    if day <= 20:
        return _ORDINALS[day - 1]
    return "thirtieth" if day == 30 else f"{_TENS[day // 10 - 2]}-{_ORDINALS[day % 10 - 1]}"


def _month(date: datetime.date) -> str:
    return _MONTHS[date.month - 1]


STYLES: tuple[Callable[[datetime.date], str], ...] = (
    lambda d: f"{d.day} {_month(d)} {d.year}",
    lambda d: f"{d.day} {_month(d)[:3]} {d.year}",
    lambda d: f"{_month(d)} {d.day}, {d.year}",
    lambda d: f"{_month(d)[:3]} {d.day}, {d.year}",
    lambda d: f"{_month(d)} {_ordinal(d.day)}, {d.year}",
    lambda d: f"the {_ordinal(d.day)} of {_month(d)}, {d.year}",
    lambda d: f"{_WEEKDAYS[d.weekday()]}, {d.day} {_month(d)} {d.year}",
    lambda d: f"{_WEEKDAYS[d.weekday()][:3]} {_month(d)[:3]} {d.day} {d.year}",
    lambda d: f"{d.day:02}.{d.month:02}.{d.year}",
    lambda d: f"{d.year}/{d.month:02}/{d.day:02}",
    lambda d: f"{d.day:02}-{_month(d)[:3].upper()}-{d.year}",
    lambda d: f"the {_ordinal_in_words(d.day)} of {_month(d)} {year_in_words(d.year)}",
)
"""How a date may be written; all of them say which number is the day."""


def examples(count: int, *, held_out: bool, seed: int = 0) -> list[tuple[str, str]]:
    """So many different pairs of a source and its answer: a third dates, a third each way of numbers.

    Every value, a number or a day, is of training or held out, in whatever style and direction it is written: the two
    share no pair, no source and no answer.

    >>> examples(3, held_out=True)
    [('499', 'four hundred ninety-nine'), ('2960', 'two thousand nine hundred sixty'), ('Feb 28, 1824', '1824-02-28')]
    """
    draw = random.Random(f"{seed} {held_out}")
    found: dict[str, str] = {}
    while len(found) < count:
        kind = draw.randrange(3)
        value = _date(draw) if kind == 0 else _number(draw)
        if _is_held_out(value) != held_out:
            continue
        if isinstance(value, datetime.date):
            found[draw.choice(STYLES)(value)] = value.isoformat()
        elif kind == 1:
            found[in_words(value)] = str(value)
        else:
            found[str(value)] = in_words(value)
    return list(found.items())


def _is_held_out(value: int | datetime.date) -> bool:
    if isinstance(value, int) and value < 100:
        return False
    return int.from_bytes(sha256(str(value).encode()).digest()[:8], "big") % HELD_OUT == 0


def _date(draw: random.Random) -> datetime.date:
    first, last = datetime.date(FIRST_YEAR, 1, 1).toordinal(), datetime.date(LAST_YEAR, 12, 31).toordinal()
    return datetime.date.fromordinal(draw.randint(first, last))


def _number(draw: random.Random) -> int:
    """Short numbers as often as long ones, and many zeros, which words leave out."""
    digits = [draw.choice("0123456789") if draw.random() < 0.8 else "0" for _ in range(draw.randint(1, 6))]
    return int("".join(digits))
