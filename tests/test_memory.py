"""What the machine, and a container on it, let a process hold."""

import os

import pytest
import torch

from sightline import memory

pytestmark = pytest.mark.skipif(not hasattr(os, "sysconf"), reason="the system does not tell")


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Writes /proc/self/cgroup and files of limits; gives what `machine_bytes` makes of them, None for all there is."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_LIMITS", tmp_path / "sys")

    def seen(said: str | None = None, limits: dict[str, str] | None = None) -> int | None:
        if said is not None:
            (tmp_path / "cgroup").write_text(said)
        for place, limit in (limits or {}).items():
            file = tmp_path / "sys" / place
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{limit}\n")
        found = memory.machine_bytes(torch.device("cpu"))
        return None if found == whole else found

    return seen


V2, V1 = "0::/pod/box\n", "7:blkio:/\n4:cpu,memory:/docker/abc\n0::/\n"


def test_without_groups_it_is_the_machine(groups):
    assert groups() is None
    assert groups(V2) is None


def test_the_group_and_each_around_it_count(groups):
    assert groups(V2, {"pod/box/memory.max": "max", "pod/memory.max": "3000000"}) == 3_000_000
    assert groups(V2, {"pod/box/memory.max": "2000000"}) == 2_000_000
    assert groups(V2, {"memory.max": "1000000"}) == 1_000_000


def test_the_older_groups(groups):
    name = "memory.limit_in_bytes"
    assert groups(V1, {f"memory/{name}": "9223372036854771712"}) is None
    assert groups(V1, {f"memory/{name}": "5000000"}) == 5_000_000  # inside a container its own is the root
    assert groups(V1, {f"memory/docker/abc/{name}": "4000000"}) == 4_000_000
    assert groups(V1, {"memory.max": "1"}) == 1
