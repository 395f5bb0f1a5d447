"""What the doctor says of the native kernel: there, in which instructions, and how to change either."""

import pytest

from sightline.diagnosis import doctor
from sightline.kernels import build, cpu


@pytest.mark.skipif(bool(cpu.MISSING), reason=cpu.MISSING or "built")
def test_it_says_what_was_built_and_what_is_in_use():
    before = cpu.instructions()
    try:
        for name in cpu.available():
            cpu.use_instructions(name)
            facts = doctor().machine
            assert facts["its instructions"].startswith(name)
            for other in cpu.available():
                assert other in facts["native CPU kernel"]
                assert (f'"{other}"' in facts["its instructions"]) == (other != name)
    finally:
        cpu.use_instructions(before)


def test_it_says_who_multiplies(multiplier):
    fact = doctor().machine["products in float32"]
    assert fact.startswith(f"{multiplier}") and ("use_multiplier" in fact) == (len(cpu.multipliers()) > 1)


@pytest.mark.parametrize(("compiler", "says"), [("/usr/bin/g++", "/usr/bin/g++ is here"), (None, "install g++")])
def test_without_it_it_says_how_to_get_it(compiler, says, monkeypatch):
    monkeypatch.setattr(cpu, "MISSING", f"the native kernel is not built; {cpu.HOW_TO_GET_IT}")
    monkeypatch.setattr(build, "find_compiler", lambda: compiler)
    fact = doctor().machine["native CPU kernel"]
    assert "python -m sightline.kernels.build" in fact and says in fact
    assert doctor().choices["observe, any length"].implementation == "tiled"
