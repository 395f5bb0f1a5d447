"""The command line: one function a command that parses, calls and prints. Knows how nothing is computed.

Options are the fields of the dataclass that the work takes; what only one command needs is imported there.
"""

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from sightline.beams import DecodeConfig
from sightline.captures import Capture
from sightline.checking.command import check
from sightline.checkpoints import steps
from sightline.corpora import Errors
from sightline.encoder_decoder import EncoderDecoder
from sightline.events import each
from sightline.generation import SampleConfig
from sightline.models import Decoder
from sightline.opening import fetch, open_model, open_text
from sightline.options import Decoding, Layers, Sampling, Shape, Training, given
from sightline.parsing import named, parsed
from sightline.recipes import RecipeName
from sightline.schedule import TrainConfig
from sightline.terminal import fail, free, harmless, has_screen, note, stream
from sightline.tokenizers import Kind
from sightline.training import Preset

SOURCE = "A file, a folder, - for standard input, 'embedded', or 'wikitext-2'."
Task = Literal["text", "translate"]
MODEL = "The folder of a run, one of its steps, or a folder of transformers."


def demo(
    out: Annotated[Path, arg(help="Where everything is written.")] = Path("sightline-demo"),
) -> None:
    """The first five minutes: train on an embedded text, compare, write, look. Nothing is downloaded."""
    from rich.console import Console
    from rich.table import Table

    from sightline import demo as work
    from sightline.progress import TrainProgress

    out = free(out)
    console = Console(highlight=False)
    console.print(
        f"[bold]1. Training[/bold] on the documentation inside this Python, for {work.TRAINING.minutes} minutes at most"
    )
    with TrainProgress() as progress:
        lesson = work.learn(out, progress)
    console.print("\n[bold]2. What it learned[/bold], on the tenth of the text that it never trained on")
    table = Table("bits per byte", "", box=None, pad_edge=False, padding=(0, 2))
    for name, evaluation in (
        ("the model before training", lesson.result.start),
        ("counting tokens (unigram)", lesson.unigram),
        ("counting pairs (bigram)", lesson.bigram),
        (f"the model at step {lesson.result.best_step:,}", lesson.result.best),
    ):
        table.add_row(f"{evaluation.bits_per_byte:.3f}", name)
    console.print(table)
    console.print("\n[bold]3. Writing[/bold] 100 words at temperature 0.8\n")
    stream(work.PROMPT, work.write(out))
    console.print("\n[bold]4. Looking[/bold] at every head of every layer")
    for file in work.look(out):
        console.print(f"  {file}", soft_wrap=True)
    console.print(
        f'\nTry next:\n  sightline generate --model {out} "Class definitions"\n'
        f"  sightline look --model {out} --text README.md\n"
        f"  sightline train YOUR.txt --out my-model",
        soft_wrap=True,
        markup=False,
    )


def train(
    source: Annotated[Positional[str], arg(help=SOURCE)],
    out: Annotated[Path, arg(help="The folder of the run.")],
    task: Annotated[Task, arg(help="translate: from pairs of lines, source<TAB>target.")] = "text",
    target: Annotated[Path | None, arg(help="The targets, line by line, where --task translate has two files.")] = None,
    preset: Annotated[Preset, arg(help="modern: Qwen3's architecture; classic: the 2017 paper's.")] = "modern",
    recipe: Annotated[RecipeName, arg(help="What fills in the settings not given. auto: by the text.")] = "auto",
    model: OmitArgPrefixes[Shape] = Shape(),  # pyright: ignore[reportInvalidTypeForm] (made above)  # noqa: B008 (frozen)
    tokenizer: Annotated[Kind | None, arg(help="None: words for WikiText's format, else bpe.")] = None,
    vocabulary: Annotated[int | None, arg(help="Tokens at most. None: by the amount of text.")] = None,
    schedule: OmitArgPrefixes[Training] = Training(),  # pyright: ignore[reportInvalidTypeForm]  # noqa: B008 (as above)
    errors: Annotated[Errors, arg(help="What becomes of bytes that are not UTF-8.")] = "strict",
    cache: Annotated[Path | None, arg(help="Folder for token files. None: inside the run's.")] = None,
    resume: Annotated[bool, arg(help="Go on where the run in --out stopped.")] = False,
    download: Annotated[bool, arg(help="Fetch the named corpus first; says what and from where.")] = False,
    plan: Annotated[bool, arg(help="Only tell what would be: tokens, model, memory, time; writes nothing.")] = False,
    log: Annotated[Literal["tensorboard"] | None, arg(help="Write TensorBoard's files into the folder too.")] = None,
) -> None:
    """Train a Transformer on text, keeping its best and its latest step in a folder."""
    from sightline import plan as planning
    from sightline import training, translation
    from sightline.curves import LossPicture
    from sightline.distributed import is_restart, joined
    from sightline.progress import TrainProgress
    from sightline.tensorboard import TensorBoard

    pairs = task == "translate"
    if pairs and (cache is not None or errors != "strict" or download or plan or recipe != "auto"):
        raise ValueError("--task translate reads UTF-8 pairs: drop --cache, --errors, --download, --plan, --recipe")
    if target is not None and not pairs:
        raise ValueError("--target is the other half of parallel text: add --task translate")
    picture = LossPicture(out)
    with joined(os.environ, given(schedule).get("device", TrainConfig.device)) as team, ExitStack() as stack:
        choices: dict[str, Any] = {
            "preset": preset,
            "model": given(model),
            "tokenizer": tokenizer,
            "vocabulary": vocabulary,
            "resume": resume or (is_restart(os.environ) and bool(steps(out))),
        }
        listeners = []
        with team.together():
            if plan and team.size > 1:
                raise ValueError("--plan is made by one process: run it without torchrun")
            if download and team.leads:
                fetch(source)
            if team.leads and not plan:
                shown = (picture, *([TensorBoard(out)] if log else []), TrainProgress())
                listeners = [stack.enter_context(one) for one in shown]
        if plan:
            print(planning.plan(source, out, recipe=recipe, config=given(schedule), errors=errors, **choices))
            return
        choices["listener"] = each(*listeners)
        if pairs:
            config = TrainConfig(**given(schedule))
            result = translation.train_pairs(source, out, target=target, config=config, **choices)
        else:
            choices |= {"recipe": recipe, "config": given(schedule)}
            result = training.train(source, out, cache=cache, errors=errors, **choices)
    if not team.leads:
        return
    print(f"best at step {result.best_step:,}: {result.best}")
    print(f"loss curve: {picture.drawn}")
    print(f'next: sightline {"translate" if pairs else "generate"} --model {out} "Some words to start with"')


def watch(
    run: Annotated[Positional[Path], arg(help="The folder of a run, going on, ended or killed.")],
    out: Annotated[Path | None, arg(help="The picture. None: loss.png in that folder.")] = None,
) -> None:
    """Follow a run that another process trains, and draw its loss; of a run that is over, draw the loss."""
    from sightline.curves import LossPicture
    from sightline.events import Ended
    from sightline.logs import follow
    from sightline.progress import TrainProgress

    event = None
    with LossPicture(run, out, every=10.0) as picture, TrainProgress() as progress:
        for event in follow(run):
            progress(event)
            picture(event)
    if picture.drawn is None:
        raise ValueError(
            f"expected a run with a loss to draw, but {run} has none: it ended before its first evaluation"
        )
    if not isinstance(event, Ended):
        note(f"no process trains {run}: it was stopped after step {event.step if event else 0:,}")
    print(f"loss curve: {picture.drawn}")


def evaluate(
    source: Annotated[Positional[str], arg(help=SOURCE)],
    model: Annotated[Path, arg(help=MODEL)],
    split: Annotated[Literal["train", "valid", "test", "all"], arg(help="Which part; of pairs also all.")] = "valid",
    context: Annotated[int | None, arg(help="Tokens in a window. None: the model's context.")] = None,
    stride: Annotated[int | None, arg(help="Also score overlapping windows, so many tokens apart.")] = None,
    dynamic: Annotated[float | None, arg(help="Also score a model that learns on the way, at this rate.")] = None,
    errors: Annotated[Errors, arg(help="What becomes of bytes that are not UTF-8.")] = "strict",
    cache: Annotated[Path | None, arg(help="Folder for token files. None: beside the model.")] = None,
) -> None:
    """Score a model on text: loss, perplexity, bits per byte."""
    from sightline.batches import tokenize
    from sightline.evaluation import evaluate
    from sightline.pairs import open_pairs
    from sightline.translation import score_pairs

    decoder = open_model(model, Decoder, EncoderDecoder)
    if isinstance(decoder, EncoderDecoder):
        if any(one is not None for one in (context, stride, dynamic, cache)) or errors != "strict":
            raise ValueError("pairs are UTF-8 and scored whole: drop --context, --stride, --dynamic, --errors, --cache")
        parallel = open_pairs(source)
        print(f"{parallel.name}, {split}: {score_pairs(decoder, parallel.split(split), name=parallel.name)}")
        return
    assert decoder.tokenizer is not None
    corpus = open_text(source, errors)
    if split not in corpus.splits:
        raise ValueError(f"{corpus.name} has no {split} split; choose --split {' or '.join(corpus.splits)}")
    data = tokenize(corpus, decoder.tokenizer, model / "tokens" if cache is None else cache)
    tokens = getattr(data, split)
    scored = evaluate(decoder, tokens, context=context)
    print(f"{corpus.name}, {split}: {scored}")
    if stride is not None:
        print(f"windows {stride} tokens apart: {evaluate(decoder, tokens, context=context, stride=stride)}")
    if dynamic is not None:
        print(f"learning at {dynamic:g}: {evaluate(decoder, tokens, context=context, dynamic=dynamic)}")
    if scored.unknown:
        note(f"{scored.unknown:.1%} of the tokens are <unk>, each of them scored as one easy token")


def generate(
    model: Annotated[Path, arg(help=MODEL)],
    prompt: Annotated[Positional[str], arg(help="What the text starts with.")] = "",
    sampling: OmitArgPrefixes[Sampling] = Sampling(),  # noqa: B008 (frozen)
) -> None:
    """Write, word by word, from a prompt."""
    from sightline.huggingface.folders import write

    stream(prompt, write(model, open_model, prompt, SampleConfig(**vars(sampling))))


def translate(
    model: Annotated[Path, arg(help=MODEL)],
    text: Annotated[Positional[str], arg(help="What to translate. Nothing: each line of standard input.")] = "",
    source: Annotated[Path | None, arg(help="A file to translate line by line.")] = None,
    decoding: OmitArgPrefixes[Decoding] = Decoding(),  # noqa: B008 (frozen)
) -> None:
    """Translate a line, a file or standard input, line by line."""
    from sightline import translation
    from sightline.pairs import read_lines

    if text and source is not None:
        raise ValueError("give a text or --source, not both")
    config = DecodeConfig(**vars(decoding))
    translator = open_model(model, EncoderDecoder)
    lines = [text] if text else read_lines(source) if source is not None else sys.stdin.read().splitlines()
    for line in translation.translate(translator, lines, config):
        print(harmless(line) if sys.stdout.isatty() else line)


def look(
    model: Annotated[Path | None, arg(help=MODEL)] = None,
    text: Annotated[str | None, arg(help=f"What to look at the beginning of. {SOURCE}")] = None,
    target: Annotated[str | None, arg(help="Of the line --text, where --model translates. None: it writes it.")] = None,
    capture: Annotated[Path | None, arg(help="What --save wrote, instead of a model and a text.")] = None,
    tokens: Annotated[int | None, arg(help="How many tokens. None: as many as the model's context holds.")] = None,
    layers: Annotated[Layers, arg(help="Which layers, such as 0,2. None: all.")] = None,
    heads: Annotated[str | None, arg(help="Which to show, layer.head, such as 0.1,2.3. None: all.")] = None,
    write: Annotated[int, arg(help="Let the model write so many tokens after the text, and show them too.")] = 0,
    compare: Annotated[Path | None, arg(help="Another model, to look at the same text beside the first.")] = None,
    save: Annotated[Path | None, arg(help="A folder for the capture, to look again without the model.")] = None,
    out: Annotated[Path | None, arg(help="Write a page that opens from disk, instead of serving one.")] = None,
    port: Annotated[int | None, arg(help="Where to serve. None: 8765 or the next that is free.")] = None,
    no_open: Annotated[bool, arg(help="Only print the link, and open no browser.")] = False,
    errors: Annotated[Errors, arg(help="What becomes of bytes that are not UTF-8.")] = "strict",
) -> None:
    """Show where every head of every layer looks, in a browser, from this machine alone."""
    from sightline.store import load_capture
    from sightline.viewer.manifest import parse_heads
    from sightline.viewer.page import page
    from sightline.viewer.server import PORT, follow

    if out is not None and (port is not None or no_open):
        raise ValueError("--out writes a page and serves none: drop --port and --no-open, or --out")
    if out is not None and not out.absolute().parent.is_dir():
        raise ValueError(f"cannot write {out}: there is no folder {out.parent}; give another --out")
    chosen = None if heads is None else parse_heads(heads)  # before the work
    if capture is None:
        if chosen is not None and layers is None and save is None:  # what is not shown costs nothing
            layers = tuple(sorted({layer for layer, _ in chosen}))
        options = {"tokens": tokens, "layers": layers, "write": write, "folder": save, "live": out is None}
        stages = _stages(model, text, target, compare, errors, **options)
    elif any((model, text, target, tokens, layers, write, compare, save)):
        raise ValueError("--capture is a capture already: of the others only --heads, --out, --port and --no-open go")
    else:
        stages = iter([({str(capture): load_capture(capture)}, None)])
    if chosen is not None:
        stages = (({name: seen.select(chosen) for name, seen in captures.items()}, goal) for captures, goal in stages)
    if out is None:
        follow(stages, port=PORT if port is None else port, open_browser=not no_open and has_screen())
    else:
        ((captures, _),) = stages
        print(f"{page(captures, out)}: open it in a browser")


def _stages(
    model: Path | None, text: str | None, target: str | None, compare: Path | None, errors: Errors, **options: Any
) -> Iterator[tuple[dict[str, Capture], int | None]]:
    """What the models see, by their names; of a translation what each part sees, by its name."""
    from sightline.huggingface import folders
    from sightline.looking import stages, translation

    if model is None or text is None:
        raise ValueError("look needs --model and --text, or the --capture that it saved before")
    if compare is not None and options["folder"] is not None:
        raise ValueError("--save saves one capture: save each model's on its own, without --compare")
    if compare == model:
        raise ValueError("--compare takes another model, and this is --model's: name another step or run")
    names = [one for one in (model, compare) if one is not None]
    if target is not None and folders.is_foreign(model):
        raise ValueError(f"--target is of a translation, and {model} is of transformers, which reads --text alone")
    if any(map(folders.is_foreign, names)):
        return folders.stages(names, open_model, open_text(text, errors), tell=note, **options)
    first = open_model(model, Decoder, EncoderDecoder)
    if isinstance(first, EncoderDecoder):
        if compare or options["folder"] or options["tokens"] or errors != "strict":
            raise ValueError("a translation is looked at alone and whole: drop --compare, --save, --tokens, --errors")
        return translation(first, text, target=target, tell=note, layers=options["layers"], write=options["write"])
    if target is not None:
        raise ValueError(f"--target is of a translation, and {model} holds a decoder, which reads --text alone")
    models = {str(model): first, **({str(compare): open_model(compare, Decoder)} if compare else {})}
    return stages(models, open_text(text, errors), tell=note, **options)


def bench() -> None:
    """Time attention and observe beside PyTorch on this machine."""
    from rich.console import Console

    from sightline.bench import table

    print("Batch 1, 8 heads, width 64, causal, float32; medians in milliseconds; observe keeps every fact.")
    Console(highlight=False).print(table())


def doctor() -> None:
    """Tell versions, CPU features, and which implementation is taken for which call, and why."""
    from sightline import diagnosis

    print(diagnosis.doctor())


COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command
    for command in (demo, train, watch, generate, translate, evaluate, look, check, bench, doctor)
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0: it went well, 1: `check` finds a fault, 2: a mistake that a line explains, 130: Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = arguments[0] if arguments else "--help"
    where = f"sightline {name}" if name in COMMANDS else "sightline"
    with warnings.catch_warnings():
        warnings.showwarning = note
        try:
            _run(name, arguments[1:])
        except SystemExit as stop:  # the parser has told what it had to tell
            return int(stop.code or 0)
        except KeyboardInterrupt as stop:
            return fail(where, str(stop) or "stopped", code=130)
        except BrokenPipeError:
            sys.stderr.close()  # the reader has gone: nobody is left to tell
            return 1
        except (ValueError, OSError) as error:
            return fail(where, str(error))
    return 0


def _run(name: str, options: list[str]) -> None:
    if name in ("-h", "--help"):
        print(_usage())
    elif name == "--version":
        from sightline import __version__

        print(f"sightline {__version__}")
    else:
        parsed(named(name, COMMANDS), options, f"sightline {name}")()


def _usage() -> str:
    lines = [
        "sightline: train a Transformer on your text, write with it, see where every head looks.",
        "",
        "usage: sightline COMMAND ...        sightline COMMAND --help tells its options",
        "",
    ]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:<10}{(command.__doc__ or '').splitlines()[0]}")
    return "\n".join(lines)


def entry() -> None:
    """The `sightline` program."""
    # The default would end it at once, and leave behind what is temporary.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
