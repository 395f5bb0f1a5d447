"""The known wrong versions of the sinusoidal encoding."""

import torch

from sightline.checking.mistakes import Mistake

EXPONENT = "the exponent is wrong: columns 2i and 2i + 1 have 2i / d_model"

ENCODINGS = [
    Mistake(
        name="sine and cosine swapped",
        what="sine and cosine are swapped: even columns have the sine, odd ones the cosine",
        fix="table[:, 0::2] = sin(angle); table[:, 1::2] = cos(angle)",
        steps={"wave": lambda angle, column: torch.where(column % 2 == 1, angle.sin(), angle.cos())},
    ),
    Mistake(
        name="sine alone",
        what="all columns have a sine: odd ones have the cosine",
        fix="table[:, 1::2] = cos(angle)",
        steps={"wave": lambda angle, column: angle.sin()},
    ),
    Mistake(
        name="wrong exponent: i / d_model",
        what=f"{EXPONENT}, and this has i / d_model: the frequencies fall half as fast",
        fix="exponent = arange(0, d_model, 2) / d_model",
        steps={"exponent": lambda column, d: (column // 2) / d},
    ),
    Mistake(
        name="wrong exponent: 4i / d_model",
        what=f"{EXPONENT}, and this has 4i / d_model: arange(0, d_model, 2) is 2i already",
        fix="exponent = arange(0, d_model, 2) / d_model",
        steps={"exponent": lambda column, d: 4 * (column // 2) / d},
    ),
    Mistake(
        name="wrong exponent: each column has its own",
        what=f"{EXPONENT}, and here column j has j / d_model: sine and cosine of a pair have different angles",
        fix="exponent = 2 * (column // 2) / d_model",
        steps={"exponent": lambda column, d: column / d},
    ),
    Mistake(
        name="wrong exponent: 2j / d_model in column j",
        what=f"{EXPONENT}, and here column j has 2j / d_model: j counts columns, i counts pairs",
        fix="exponent = 2 * (column // 2) / d_model",
        steps={"exponent": lambda column, d: 2 * column / d},
    ),
    Mistake(
        name="wrong exponent: j / d_model in even columns, 2j / d_model in odd ones",
        what=f"{EXPONENT}: in odd columns 2i is j - 1",
        fix="exponent = 2 * (column // 2) / d_model",
        steps={"exponent": lambda column, d: torch.where(column % 2 == 0, column, 2 * column) / d},
    ),
    Mistake(
        name="wrong exponent: 2(j + 1) / d_model in odd columns",
        what=f"{EXPONENT}: an odd column has the angle of the even one before it",
        fix="exponent = 2 * (column // 2) / d_model",
        steps={"exponent": lambda column, d: torch.where(column % 2 == 0, 2 * column, 2 * (column + 1)) / d},
    ),
    Mistake(
        name="wrong exponent: 2i / (d_model - 2)",
        what=f"{EXPONENT}, and this divides by d_model - 2, so that the last pair reaches 1/10000",
        fix="exponent = arange(0, d_model, 2) / d_model",
        steps={"exponent": lambda column, d: 2 * (column // 2) / (d - 2)},
    ),
    Mistake(
        name="wrong exponent: its sign",
        what="the exponent's sign is wrong: positions are multiplied by 10000^(2i/d_model), not divided",
        fix="angle = position / 10000 ** exponent",
        steps={"exponent": lambda column, d: -2 * (column // 2) / d},
    ),
    Mistake(
        name="times, not to the power",
        what="10000 is multiplied by the exponent, not raised to it",
        fix="angle = position / 10000 ** exponent",
        steps={"angle": lambda position, exponent, base: position / (base * exponent)},
    ),
    Mistake(
        name="halves, not pairs",
        what="sines fill the first half and cosines the second: here they take turns, column by column",
        fix="table[:, 0::2] = sin(angle); table[:, 1::2] = cos(angle)",
        steps={"order": lambda table: torch.cat((table[:, 0::2], table[:, 1::2]), dim=-1)},
    ),
    Mistake(
        name="positions from 1",
        what="the first position is 1; it is 0",
        fix="position = arange(length)",
        steps={"first": 1},
    ),
    *(
        Mistake(
            name=f"base {name}",
            what=f"the base is {name}, not 10000",
            fix="angle = position / 10000 ** exponent",
            steps={"base": base},
        )
        for name, base in (("1000", 1e3), ("100000", 1e5), ("e", 2.718281828459045))
    ),
]
