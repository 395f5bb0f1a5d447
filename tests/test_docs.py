"""The pages under docs/ hold: their Python runs, their commands run and print what is shown, their links lead on."""

import contextlib
import doctest
import io
import re
import shlex
from pathlib import Path

import pytest

import sightline
from sightline import cli

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LONG = {"demo.md", "bench.md"}  # their commands take minutes

pytestmark = [
    pytest.mark.filterwarnings("always::sightline.generation.ContextWarning"),
    pytest.mark.usefixtures("no_pictures"),
]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def only(text: str, language: str | None) -> str:
    """A page with every line blank but those in blocks of one language; None: those outside of blocks."""
    kept, inside = [], None
    for line in text.splitlines():
        if line.startswith("```"):
            inside = line[3:] if inside is None else None
            kept.append("")
        else:
            kept.append(line if inside == language else "")
    return "\n".join(kept) + "\n"


# --- Python -------------------------------------------------------------------------------------------


def write_files(text: str) -> None:
    """A block that starts with ```python NAME.py is a file that the rest of the page uses."""
    for file, content in re.findall(r"^```python (\w+\.py)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        Path(file).write_text(content, encoding="utf-8")


def check_python(text: str) -> None:
    """Run every Python block of a page as one doctest."""
    write_files(text)
    source = only(text, "python")
    assert all(block.startswith(">>> ") for block in re.split(r"\n\n+", source.strip("\n")) if block)
    test = doctest.DocTestParser().get_doctest(source, {"__name__": "__main__"}, "page", None, 0)
    report = io.StringIO()
    failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.write)
    assert not failed, report.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_python(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("block", [">>> 1 + 1\n3", "1 + 1", ">>> 1 / 0"])
def test_the_check_of_python_can_fail(block):
    check_python("```python\n>>> 1 + 1\n2\n```\n")
    with pytest.raises(AssertionError):
        check_python(f"text\n```python\n{block}\n```\n")


# --- Commands -----------------------------------------------------------------------------------------


def examples(text: str) -> list[tuple[list[str], str]]:
    """Each command of a page's console blocks, and what it is shown to print; empty where nothing is shown."""
    found: list[tuple[list[str], str]] = []
    for line in only(text, "console").replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            found.append((shlex.split(line[2:]), ""))
        elif line:
            assert found, f"output without a command: {line}"
            found[-1] = (found[-1][0], found[-1][1] + line + "\n")
    return found


def check_commands(text: str) -> None:
    """Run every command of a page in order; `...` in what is shown stands for anything."""
    write_files(text)
    for (program, *arguments), shown in examples(text):
        assert program == "sightline"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = cli.main(arguments)
        assert code == 0 or (arguments[0] == "check" and code == 1), printed.getvalue()
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        same = doctest.OutputChecker().check_output(shown, printed.getvalue(), flags)
        assert same or not shown, f"{shlex.join(arguments)} printed\n{printed.getvalue()}"


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page.name in LONG else [], id=name(page))
        for page in PAGES
        if "```console" in page.read_text(encoding="utf-8")
    ],
)
def test_commands(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_commands(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("block", ["$ sightline --version\n0.0.1", "$ sightline nothing", "$ ls", "output"])
def test_the_check_of_commands_can_fail(block):
    check_commands("```console\n$ sightline --version\nsightline ...\n$ sightline \\\n  --version\n```\n")
    with pytest.raises(AssertionError):
        check_commands(f"```console\n{block}\n```\n")


# --- Links and names ----------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The headings of a page as a browser addresses them."""
    titles = re.findall(r"^#+ (.*)", only(page.read_text(encoding="utf-8"), None), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> list[tuple[str, Path, str]]:
    """Each link of a page that does not leave the repository: as written, the file, the anchor."""
    text = re.sub(r"`[^`\n]*`", "", only(page.read_text(encoding="utf-8"), None))
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    inside = [target.partition("#") for target in targets if not target.startswith(("http://", "https://"))]
    return [(file + mark + anchor, page.parent / file if file else page, anchor) for file, mark, anchor in inside]


def check_links(page: Path) -> None:
    for written, file, anchor in links(page):
        assert file.exists(), f"{page} links to {written}, which is not there"
        assert not anchor or anchor in anchors(file), f"{page} links to {written}, which has no such heading"


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("*.md"))], ids=name)
def test_links(page):
    check_links(page)


def test_the_check_of_links_can_fail(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# The page\n[here](#the-page) and `[not](a link)`\n", encoding="utf-8")
    check_links(page)
    for link in ("nowhere.md", "#the-pages", "page.md#nowhere"):
        page.write_text(f"# The page\n[there]({link})\n", encoding="utf-8")
        with pytest.raises(AssertionError):
            check_links(page)


def test_the_index_leads_to_every_page():
    index = DOCS / "index.md"
    assert {file.resolve() for _, file, _ in links(index)} >= {page.resolve() for page in PAGES} - {index.resolve()}
    assert index in [file for _, file, _ in links(ROOT / "README.md")]


def test_every_command_has_its_page():
    for command in cli.COMMANDS:
        page = (DOCS / "commands" / f"{command}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# sightline {command}\n")
        assert f"$ sightline {command}" in page


def test_every_public_name_is_in_some_page():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    missing = [name for name in sightline.__all__ if not re.search(rf"\bsl\.{name}\b", pages)]
    assert not missing


def test_every_option_that_a_page_names_is_one(capsys):
    for command in cli.COMMANDS:
        assert cli.main([command, "--help"]) == 0
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)) | {"--version"}
    known |= {"--logdir"}  # TensorBoard's
    for page in PAGES:
        text = re.sub(r"torchrun [^`\n]*?(?= -m |[`\n])", "", page.read_text(encoding="utf-8"))
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
        assert named <= known, f"{name(page)} names {sorted(named - known)}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_are_written_plainly(page):
    text = page.read_text(encoding="utf-8")
    assert text.isascii()
    assert len(re.findall(r"^# ", only(text, None), re.MULTILINE)) == 1
