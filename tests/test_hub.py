"""`sightline look --model owner/name`: what is asked of the hub, and of one that stands on this machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from families import build  # noqa: E402 (after the skip)
from hub import hub  # noqa: E402

from sightline.store import load_capture  # noqa: E402
from sightline.tokenizers import Tokenizer  # noqa: E402

pytestmark = pytest.mark.slow

TEXT = "the cat sat on the mat and the dog sat on the cat\n"


@pytest.fixture
def models(tmp_path) -> dict[str, Path]:
    """Three times the same small model: in one file, in several, and pickled."""
    whole, shards, pickled = (tmp_path / name for name in ("whole", "shards", "pickled"))
    model = build("gemma2", "eager")
    model.save_pretrained(whole)
    model.save_pretrained(shards, max_shard_size="20kB")
    for folder in (whole, shards):
        (folder / "pytorch_model.bin").write_bytes(b"a pickle that nobody may want")
        Tokenizer.train("characters", [TEXT + "".join(map(chr, range(65, 123)))]).save(folder / "tokenizer.json")
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    shutil.copytree(whole, pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    return {"owner/whole": whole, "owner/shards": shards, "owner/pickled": pickled}


@pytest.fixture
def command(tmp_path):
    """Runs python in an empty folder, with a cache of the hub's own."""
    here = tmp_path / "here"
    here.mkdir()
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}

    def run(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**clean, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home")}
        return subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=here, capture_output=True, text=True, timeout=300
        )

    return run


def test_what_is_named_is_fetched_once_as_safetensors_alone(models, command, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ("--text", str(tmp_path / "text.txt"), "--tokens", "20", "--out", str(tmp_path / "page.html"))
    with hub(models) as served:
        for number, name in enumerate(("owner/whole", "owner/shards")):
            saved = str(tmp_path / f"seen-{number}")
            done = command(served.url, "-m", "sightline", "look", "--model", name, *arguments, "--save", saved)
            assert done.returncode == 0, done.stderr
            weights = {file.name for file in models[name].glob("model*")}
            assert len(weights) == 1 if number == 0 else len(weights) > 2
            there = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", *weights}
            assert served.fetched() == there
            assert not any("pytorch_model.bin" in line for line in served.asked)
            served.asked.clear()
        one, other = (load_capture(tmp_path / f"seen-{number}") for number in (0, 1))
        assert torch.equal(one.logsumexp, other.logsumexp) and one.tokens == tuple(TEXT[:20])
    # The hub is gone: what was fetched is here.
    done = command(served.url, "-m", "sightline", "generate", "--model", "owner/whole", "the", "--tokens", "3")
    assert done.returncode == 0 and done.stdout.startswith("the") and not done.stderr, done.stderr


TRY = """
import sys
from sightline.cli import main
for name in sys.argv[1:]:
    print(main(["generate", "--model", name, "the"]))
"""


def test_what_cannot_be_had_is_one_line(models, command):
    names = {
        "owner/pickled": "it has no safetensors",
        "owner/gated": "ask on its page, then `hf auth login`",
        "owner/missing": "no public model of the hub",
    }
    with hub(models, gated={"owner/gated"}) as served:
        done = command(served.url, "-c", TRY, *names)
        assert served.fetched() == {"config.json"}
    assert done.stdout.split() == ["2"] * 3
    for line, (name, said) in zip(done.stderr.splitlines(), names.items(), strict=True):
        assert line.startswith(f"sightline generate: transformers cannot open {name} as a language model: ")
        assert said in line
    done = command(served.url, "-c", TRY, "owner/whole")  # the hub is gone, and nothing was fetched
    assert done.stdout.split() == ["2"] and done.stderr.count("\n") == 1, done.stderr
    assert "the hub does not give it (ConnectError" in done.stderr
