"""Translation from text to text: it learns, goes on bit for bit, scores by definition, and names what is wrong."""

import itertools
import json
import re
import sys

import pytest
import torch
from commands import refused, run

from sightline.beams import DecodeConfig
from sightline.checkpoints import load, save
from sightline.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from sightline.loop import Interrupted
from sightline.pairs import Pair, line_end, open_pairs, source_ids
from sightline.schedule import TrainConfig
from sightline.translation import score_pairs, train_pairs, translate

pytestmark = pytest.mark.usefixtures("no_pictures")

SMALL = {"d_model": 32, "num_layers": 1, "num_heads": 2}
FAST = {"batch": 4, "evaluate_batches": 1}


@pytest.fixture(scope="module")
def tsv(tmp_path_factory):
    """Words backwards: the target's order is the source's reversed."""
    draw = torch.Generator().manual_seed(0)
    lines = {}
    while len(lines) < 600:
        count = int(torch.randint(1, 5, (1,), generator=draw))
        letters = ["abcdef"[i] for i in torch.randint(6, (count,), generator=draw)]
        lines[" ".join(letters)] = " ".join(reversed(letters))
    file = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    file.write_text("".join(f"{source}\t{target}\n" for source, target in lines.items()), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def trained(tsv, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    train_pairs(tsv, out, model=SMALL, tokenizer="words", config=TrainConfig(steps=200, batch=4, evaluate_every=100))
    return out


def test_it_learns_what_it_never_saw(tsv, trained):
    held_out = open_pairs(tsv).valid
    score = score_pairs(load(trained), held_out)
    assert score.pairs == len(held_out) and score.exact > 0.5 and score.accuracy > 0.85
    assert "exact, token accuracy" in str(score)


def test_a_run_is_a_run(trained):
    pointer = json.loads((trained / "checkpoint.json").read_text())
    assert set(pointer) == {"best", "latest"} and (trained / pointer["best"] / "manifest.json").exists()
    events = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    losses = [event["loss_nats"] for event in events if event["event"] == "evaluated"]
    assert losses[-1] < losses[0] / 2
    model = load(trained)
    assert isinstance(model, EncoderDecoder) and model.tokenizer is not None and model.config.context == 64


def test_going_on_is_bit_for_bit(tsv, tmp_path):
    model = SMALL | {"dropout": 0.1}

    def train(out: str, steps: int, **options) -> dict[str, torch.Tensor]:
        config = TrainConfig(steps=steps, evaluate_every=3, decay="inverse-sqrt", smoothing=0.1, cooldown=0.0, **FAST)
        train_pairs(tsv, tmp_path / out, model=model, config=config, **options)
        return load(tmp_path / out / f"step-{steps}").state_dict()

    def stop(event) -> None:
        if type(event).__name__ == "Stepped" and event.step == 4:
            raise KeyboardInterrupt

    whole = train("whole", 6)
    with pytest.raises(Interrupted, match="stopped at step 4, saved"):
        train("parts", 6, listener=stop)
    assert json.loads((tmp_path / "parts" / "checkpoint.json").read_text())["latest"] == "step-4"
    parts = train("parts", 6, resume=True)
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    with pytest.raises(ValueError, match=r"whose smoothing is 0\.1"):
        train_pairs(
            tsv,
            tmp_path / "parts",
            model=model,
            config=TrainConfig(steps=9, decay="inverse-sqrt", cooldown=0.0, **FAST),
            resume=True,
        )


def test_scores_are_what_they_are_called(tsv, trained):
    import sacrebleu

    model, pairs = load(trained), list(open_pairs(tsv).valid)
    pairs[0] = pairs[0]._replace(target="f f f f f f")
    score = score_pairs(model, pairs, DecodeConfig(beam=1))
    found = translate(model, [pair.source for pair in pairs], DecodeConfig(beam=1))
    assert score.exact == sum(a == b.target for a, b in zip(found, pairs, strict=True)) / len(pairs) < 1
    assert score.bleu == sacrebleu.corpus_bleu(found, [[pair.target for pair in pairs]]).score
    assert score.chrf == sacrebleu.corpus_chrf(found, [[pair.target for pair in pairs]]).score
    right = count = 0
    for pair in pairs:
        target = torch.tensor([[1, *model.tokenizer.encode(pair.target), 1]])  # <eos> is token 1 of words
        with torch.no_grad():
            logits = model(torch.tensor([[*model.tokenizer.encode(pair.source), 1]]), target[:, :-1])
        right += int((logits.argmax(-1) == target[:, 1:]).sum())
        count += target.shape[1] - 1
    assert score.accuracy == right / count and score.evaluation.tokens == count


def test_without_sacrebleu_the_rest_is_scored(tsv, trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    score = score_pairs(load(trained), open_pairs(tsv).valid[:3])
    assert score.bleu is None and score.chrf is None and "no BLEU and chrF without sacrebleu" in str(score)


def test_the_order_of_texts_is_kept(trained):
    model = load(trained)
    texts = ["a b c d", "a", "b c", "f e d", "a"]
    assert translate(model, texts) == [translate(model, [text])[0] for text in texts]
    assert translate(model, []) == []


def test_bad_texts_are_named_by_line(trained):
    model = load(trained)
    for text, message in (
        ("", "of line 2 it is empty"),
        ("a\nb", "of line 2 it has a line break"),
        ("a zebra b", "line 2 has words that the model's vocabulary lacks: 'zebra'"),
        ("a " * 64, "line 2 has 65 tokens, more than the model's context of 64"),
    ):
        with pytest.raises(ValueError, match=message):
            translate(model, ["a", text])
    with pytest.raises(ValueError, match="has none"):
        score_pairs(model, [], name="nothing")
    model.tokenizer = None
    with pytest.raises(ValueError, match="has no tokenizer"):
        translate(model, ["a"])


def test_digits_are_tokens_of_their_own(tmp_path):
    lines = [f"year {n}\t{n} {n}" for n in range(1000, 1300)]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines))
    train_pairs(tmp_path / "pairs.tsv", tmp_path / "run", model=SMALL, config=TrainConfig(steps=1, **FAST))
    tokenizer = load(tmp_path / "run").tokenizer
    assert [piece.strip() for piece in tokenizer.pieces(tokenizer.encode("1987"))] == ["1", "9", "8", "7"]


def test_a_config_that_cannot_be_is_refused_before_reading(tmp_path):
    for options, message in (
        ({"preset": "new"}, "preset to be modern or classic"),
        ({"model": {"vocabulary": 3}}, "use --vocabulary"),
        ({"model": {"num_groups": 2}}, "EncoderDecoderConfig: unknown key 'num_groups'"),
    ):
        with pytest.raises(ValueError, match=message):
            train_pairs(tmp_path / "missing.tsv", tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_source_beyond_a_given_context_names_its_line(tsv, tmp_path):
    with pytest.raises(ValueError, match=r"the (source|target) in line \d+ of .* more than the context of 4"):
        train_pairs(tsv, tmp_path / "run", model=SMALL | {"context": 4}, tokenizer="characters")


def test_an_encoder_decoder_is_saved_and_opened(tmp_path):
    model = EncoderDecoder(EncoderDecoderConfig.classic(vocabulary=9, d_model=16, num_layers=1, decoder_layers=2))
    again = load(save(tmp_path / "model", model))
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="expected a Decoder for the format huggingface"):
        save(tmp_path / "other", model, format="huggingface")


# --- The command line --------------------------------------------------------------------------------


def test_the_commands(tsv, tmp_path, capsys):
    out = tmp_path / "run"
    small = ("--d-model", 32, "--num-layers", 1, "--num-heads", 2, "--tokenizer", "words", "--steps", 2, "--batch", 2)

    def printed(*arguments) -> str:
        assert run(*arguments) == 0
        return capsys.readouterr().out

    assert "next: sightline translate --model" in printed("train", tsv, "--task", "translate", "--out", out, *small)
    assert len(printed("translate", "--model", out, "a b", "--tokens", 3).splitlines()) == 1
    (tmp_path / "lines").write_text("a\nb c\n")
    lines = printed("translate", "--model", out, "--source", tmp_path / "lines", "--tokens", 3)
    assert len(lines.splitlines()) == 2
    scored = printed("evaluate", tsv, "--model", out, "--split", "valid")
    assert "exact, token accuracy" in scored and "pairs)" in scored


def in_page(page) -> tuple[list, list]:
    """What a page knows of its captures, and the tokens of the keys of each."""
    html = page.read_text(encoding="utf-8")
    said = json.loads(re.findall(r'id="manifest">(.*?)</script>', html)[0])["captures"]
    return said, [json.loads(one) for one in re.findall(r'keytokens">(.*?)</script>', html)]


def test_look_shows_a_source_its_translation_and_the_rectangle_between(trained, tmp_path, capsys):
    page, model = tmp_path / "attention.html", load(trained)
    assert run("look", "--model", trained, "--text", "a b c", "--out", page) == 0
    (found,) = translate(model, ["a b c"])
    written = found.split()
    assert f"captured 4 and {len(written) + 1} tokens of source and target" in (told := capsys.readouterr().err)
    assert f"; the model wrote {found!r}" in told
    said, keys = in_page(page)
    assert [one["name"] for one in said] == ["cross", "encoder", "decoder"]
    assert [(one["queries"], one["keys"], one["same"]) for one in said] == [
        (len(written) + 1, 4, False),
        (4, 4, True),
        (len(written) + 1, len(written) + 1, True),
    ]
    assert [one["prompt"] for one in said] == [None, None, 1]
    assert keys == [["a", "b", "c", "\n"], ["a", "b", "c", "\n"], ["\n", *written]]


def test_look_takes_a_given_target_layers_and_heads(trained, tmp_path, capsys):
    page = tmp_path / "attention.html"
    same = ("look", "--model", trained, "--text", "a b c", "--out", page)
    assert run(*same, "--target", "c b a", "--layers", 0, "--heads", "0.1") == 0
    assert "; the target was given" in capsys.readouterr().err
    said, keys = in_page(page)
    assert keys[2] == ["\n", "c", "b", "a"] and said[2]["prompt"] is None
    assert [one["pairs"] for one in said] == [[[0, 1]]] * 3
    assert run(*same, "--write", 2) == 0
    assert in_page(page)[0][0]["queries"] <= 3


def test_the_end_of_a_source_tells_repeated_tokens_apart(trained):
    """Without it all tokens of "a a a" would be one vector, as of "a a": nothing says where, or how many."""
    model = load(trained)
    model.eval()
    for text in ("a", "a a a"):
        ids = torch.tensor([source_ids(text, 1, model.tokenizer, context=64)])
        assert ids[0, -1] == line_end(model.tokenizer)
        alone, ended = model.encode(ids[:, :-1])[0], model.encode(ids)[0]
        torch.testing.assert_close(alone, alone[:1].expand_as(alone), atol=1e-5, rtol=1e-5)
        for one, other in itertools.pairwise(ended):
            assert not torch.allclose(one, other, atol=1e-3)


def test_mistakes_end_in_one_line(tsv, trained, tmp_path, capsys):
    for arguments, message in (
        (("translate", "--model", trained, "a", "--source", tsv), "give a text or --source, not both"),
        (("translate", "--model", trained, "a", "--beam", 0), "beam must be at least 1, got 0"),
        (("translate", "--model", trained, "zebra"), "vocabulary lacks: 'zebra'"),
        (("generate", "--model", trained, "a"), "holds an encoder-decoder"),
        (("train", tsv, "--out", tmp_path / "x", "--target", tsv), "add --task translate"),
        (("train", tsv, "--task", "translate", "--out", tmp_path / "x", "--errors", "replace"), "drop --cache, --err"),
        (("train", "embedded", "--out", tmp_path / "x", "--smoothing", 0.1), "smoothing is for translation"),
        (("evaluate", tsv, "--model", trained, "--split", "test"), "has no test split"),
        (("evaluate", tsv, "--model", trained, "--context", 8), "drop --context, --stride"),
        (("evaluate", tsv, "--model", trained, "--errors", "replace"), "drop --context, --stride"),
        (("look", "--model", trained, "--text", "zebra"), "vocabulary lacks: 'zebra'"),
        (("look", "--model", trained, "--text", " "), "it is empty"),
        (("look", "--model", trained, "--text", tsv), "is a file: give its line"),
        (("look", "--model", trained, "--text", "a", "--target", ""), "one line of text as --target, got ''"),
        (("look", "--model", trained, "--text", "a", "--target", "b\nc"), "one line of text as --target"),
        (("look", "--model", trained, "--text", "a", "--target", "zebra"), "not in the vocabulary: 'zebra'"),
        (("look", "--model", trained, "--text", "a", "--target", "a", "--write", 3), "drop one of the two"),
        (("look", "--model", trained, "--text", "a", "--write", -1), "at least 1"),
        (("look", "--model", trained, "--text", "a", "--layers", 1), "layers are 0 to 0, got 1"),
        (("look", "--model", trained, "--text", "a", "--tokens", 3), "drop --compare, --save, --tokens"),
        (("look", "--model", trained, "--text", "a", "--save", tmp_path / "seen"), "drop --compare, --save"),
        (("look", "--model", trained, "--text", "a", "--compare", tmp_path), "drop --compare"),
        (("look", "--model", trained, "--target", "a"), "look needs --model and --text"),
        (("look", "--capture", tmp_path, "--target", "a"), "of the others only"),
    ):
        refused(capsys, *arguments, says=(message,))


@pytest.mark.slow
def test_the_embedded_job_is_learned(tmp_path):
    """A short course of it: the whole takes minutes (benchmarks/translation.py)."""
    result = train_pairs("numerals", tmp_path / "run", config=TrainConfig(steps=150, evaluate_every=75))
    assert result.best.loss < 1.0 < result.start.loss
    pairs = [Pair("7", "seven", 1), Pair("3 May 1987", "1987-05-03", 2)]
    assert score_pairs(load(tmp_path / "run"), pairs).accuracy > 0.4
