"""The labs under docs/labs: committed as they ran, whole in themselves, and their exercises can be solved."""

import base64
import copy
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from subprocess import run as start

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "labs"
LABS = sorted(FOLDER.glob("*.ipynb"))
LARGEST, LARGEST_TOGETHER = 600_000, 2_000_000
UNWRITTEN = "not written yet"

every_lab = pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)


def cells(lab: NotebookNode, kind: str, tag: str | None = None) -> list[NotebookNode]:
    return [c for c in lab.cells if c.cell_type == kind and (tag is None or tag in c.metadata.get("tags", []))]


def texts(cell: NotebookNode) -> str:
    """All that a cell printed or gave, without its pictures."""
    return "".join(one.get("text") or one.get("data", {}).get("text/plain", "") for one in cell.outputs)


def has_picture(cell: NotebookNode) -> bool:
    return cell.cell_type == "code" and any("image/png" in one.get("data", {}) for one in cell.outputs)


def folded(cell: NotebookNode, title: str) -> list[str]:
    return re.findall(rf"<details><summary>{title}</summary>\n\n(.*?)\n\n</details>", cell.source, re.DOTALL)


def solution(cell: NotebookNode) -> str:
    """The one block of code in a folded solution; of an exercise that is a file, the text of that file."""
    (text,) = folded(cell, "Solution")
    (code,) = re.findall(r"^```python\n(.*?)\n```", text, re.MULTILINE | re.DOTALL)
    return code


# --- As committed -------------------------------------------------------------------------------------


def check_it_ran(lab: NotebookNode) -> None:
    """Every cell ran once, in order, and none failed or warned."""
    code = cells(lab, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for output in (one for cell in code for one in cell.outputs):
        assert output.output_type != "error", output.get("evalue")
        assert output.get("name") != "stderr", output.get("text")


def check_it_knows_no_machine(lab: NotebookNode) -> None:
    """No path of the machine it ran on, and no version of its Python."""
    assert set(lab.metadata) <= {"kernelspec", "language_info"} and lab.metadata.kernelspec.name == "python3"
    assert all(re.fullmatch(r"[a-z0-9-]+", cell.id) for cell in lab.cells)
    text = "\n".join(cell.source + (texts(cell) if cell.cell_type == "code" else "") for cell in lab.cells)
    found = re.findall(r"(?:(?<![\w.:/])/(?:home|work|root|tmp|usr|Users|mnt)/|[A-Z]:\\)\S*", text)
    assert not found, found


def check_it_loads_nothing(lab: NotebookNode) -> None:
    """Pictures are in it, not linked; formulas need no script."""
    for cell in cells(lab, "markdown"):
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", cell.source, flags=re.DOTALL)
        assert not re.search(r"!\[|<img|<script|<iframe|\$", prose), cell.source
    for output in (one for cell in cells(lab, "code") for one in cell.outputs):
        assert set(output.get("data", {})) <= {"image/png", "text/plain", "text/html"}
        assert not re.search(r"""(src|href)=["']?http""", output.get("data", {}).get("text/html", ""))


def check_it_says_what_to_expect(lab: NotebookNode) -> None:
    """It begins with what one will know, and before each picture stands what to expect of it."""
    assert lab.cells[0].source.startswith("# Lab ") and "**At the end you know**" in lab.cells[0].source
    for before, cell in zip(lab.cells, lab.cells[1:], strict=False):
        if has_picture(cell):
            assert before.cell_type == "markdown" and "**Expect**" in before.source, cell.source
            assert cell.metadata.get("alt"), f"no words for the picture of\n{cell.source}"


def check_questions(lab: NotebookNode) -> None:
    """They are counted, and each has its answer folded below it."""
    numbers = []
    for cell in cells(lab, "markdown"):
        asked = re.split(r"^\*\*Question (\d+)\.\*\*", cell.source, flags=re.MULTILINE)[1:]
        for number, text in zip(asked[::2], asked[1::2], strict=True):
            numbers.append(int(number))
            assert len(folded(NotebookNode(source=text), "Answer")) == 1, text
        assert len(folded(cell, "Answer")) == len(asked) // 2, "an answer without a question"
        assert cell.source.count("<details>") == len(folded(cell, "Answer")) + len(folded(cell, "Solution"))
    assert numbers and numbers == list(range(1, len(numbers) + 1))


def check_exercises(lab: NotebookNode) -> None:
    """Stub, check, solution, in this order; the check says that the stub is one."""
    assert len(cells(lab, "code", "exercise")) == len(cells(lab, "code", "check")) > 0
    for stub, check, answer in zip(lab.cells, lab.cells[1:], lab.cells[2:], strict=False):
        if "exercise" in stub.metadata.get("tags", []):
            assert re.search(r"^ +\.\.\.$", stub.source, re.MULTILINE), stub.source
            assert "check" in check.metadata.get("tags", [])
            assert UNWRITTEN in texts(check) and len(texts(check).splitlines()) == 1
            assert "..." not in solution(answer)


CHECKS: list[Callable[[NotebookNode], None]] = [
    check_it_ran,
    check_it_knows_no_machine,
    check_it_loads_nothing,
    check_it_says_what_to_expect,
    check_questions,
    check_exercises,
]


@every_lab
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_as_committed(path, check):
    check(nbformat.read(path, 4))


def test_sizes():
    sizes = [path.stat().st_size for path in LABS]
    assert LABS and max(sizes) <= LARGEST and sum(sizes) <= LARGEST_TOGETHER


@every_lab
def test_links(path):
    for cell in cells(nbformat.read(path, 4), "markdown"):
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", cell.source)):
            if not target.startswith("https://"):
                assert (FOLDER / target.partition("#")[0]).exists(), target


def test_the_index_leads_to_every_lab():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\(labs/(.*?)\)", index) == [path.name for path in LABS]


# --- As they run --------------------------------------------------------------------------------------


def with_solutions(lab: NotebookNode) -> NotebookNode:
    """The same, where after each check the solution is written and checked; these cells have the tag `solved`."""
    longer, stub, check = copy.deepcopy(lab), None, None
    longer.cells = []
    for cell in copy.deepcopy(lab.cells):
        longer.cells.append(cell)
        tags = cell.metadata.get("tags", [])
        stub, check = (cell if "exercise" in tags else stub), (cell if "check" in tags else check)
        if cell.cell_type == "markdown" and folded(cell, "Solution"):
            assert stub is not None and check is not None
            magic = re.match(r"%%writefile .*\n", stub.source)
            written = (magic[0] if magic else "") + solution(cell)
            longer.cells += [new_code_cell(written), new_code_cell(check.source, metadata={"tags": ["solved"]})]
    return longer


def execute(lab: NotebookNode, folder: Path) -> NotebookNode:
    """Run it from top to bottom, in a folder of its own. Raises: CellExecutionError."""
    from nbclient import NotebookClient

    client = NotebookClient(copy.deepcopy(lab), timeout=600, resources={"metadata": {"path": str(folder)}})
    return client.execute()


def check_solved(executed: NotebookNode) -> None:
    for cell in cells(executed, "code", "solved"):
        assert texts(cell) and UNWRITTEN not in texts(cell), cell.source
        assert not re.search(r"\bFAIL\b", texts(cell)), texts(cell)


def check_same(executed: NotebookNode, committed: NotebookNode) -> None:
    """The outputs are those committed: their kinds and their words, but for digits, which differ between CPUs."""
    now = {cell.id: cell for cell in cells(executed, "code")}
    for cell in cells(committed, "code"):
        assert has_picture(cell) == has_picture(now[cell.id]), cell.source
        if "varies" not in cell.metadata.get("tags", []):
            assert words(cell) == words(now[cell.id]), f"{texts(cell)}\nis now\n{texts(now[cell.id])}"


def words(cell: NotebookNode) -> list[str]:
    return re.findall(r"[a-zA-Z_]+", re.sub(r"[\d.]+e[+-]\d+", "", texts(cell)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@every_lab
def test_run(path, tmp_path):
    lab = nbformat.read(path, 4)
    executed = execute(with_solutions(lab), tmp_path)
    check_solved(executed)
    check_same(executed, lab)


class Loads(HTMLParser):
    """What a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag in ("script", "link", "iframe") or not given.get("src", "data:").startswith("data:"):
            self.found.append(self.get_starttag_text() or tag)


def loads(page: str) -> list[str]:
    parser = Loads()
    parser.feed(page)
    return parser.found + re.findall(r"@import.*|url\((?!data:).*", page)


@pytest.mark.slow
@every_lab
def test_page(path, tmp_path):
    """What `make labs` writes, of the lab as it is committed."""
    options = ["--to", "html", "--template-file", FOLDER / "page.html.j2", "--output-dir", tmp_path]
    done = start([sys.executable, "-m", "nbconvert", *options, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / f"{path.stem}.html").read_text(encoding="utf-8")
    assert loads(page) == []
    assert page.count("<img ") == sum(map(has_picture, nbformat.read(path, 4).cells)) == page.count('alt="')
    assert ".ipynb" not in page and "<details>" in page
    for target in re.findall(r'href="(\.\./[^"#]+)', page):
        assert (ROOT / "build" / "labs" / target).resolve().exists(), target


@pytest.mark.parametrize(
    "page", ["<script src='https://a.b/c.js'></script>", "<img src='a.png'>", "<style>@import 'a.css'</style>"]
)
def test_the_check_of_pages_can_fail(page):
    assert loads("<a href='https://a.b'>there</a><img src='data:image/png;base64,'>") == []
    assert len(loads(page)) == 1


# --- The checks can fail ------------------------------------------------------------------------------

INTRODUCTION = "# Lab 0: Doubling\n\n**At the end you know** how to double.\n\n**Expect** a picture."
QUESTION = "**Question 1.** Why?\n\n<details><summary>Answer</summary>\n\nBecause.\n\n</details>"
STUB = 'def double(x):\n    """Twice x."""\n    ...'
CHECK = (
    'if double(1) is None:\n    print("double: not written yet")\nelse:\n    assert double(3) == 6\n    print("right")'
)
SOLUTION = (
    "<details><summary>Solution</summary>\n\n"
    '```python\ndef double(x):\n    """Twice x."""\n    return 2 * x\n```\n\n</details>'
)


def small() -> NotebookNode:
    """A lab in which everything is as it should be."""
    pixel = base64.b64encode(b"a picture").decode()
    picture = new_output("display_data", {"image/png": pixel, "text/plain": "<Figure>"})
    said = new_output("stream", text="double: not written yet\n")
    lab = new_notebook(
        cells=[
            new_markdown_cell(INTRODUCTION, id="introduction"),
            new_code_cell("1", id="picture", execution_count=1, outputs=[picture], metadata={"alt": "A pixel."}),
            new_markdown_cell(QUESTION, id="question"),
            new_code_cell(STUB, id="stub", execution_count=2, metadata={"tags": ["exercise"]}),
            new_code_cell(CHECK, id="check", execution_count=3, outputs=[said], metadata={"tags": ["check"]}),
            new_markdown_cell(SOLUTION, id="solution"),
        ],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    return lab


def replaced(index: int, old: str, new: str) -> Callable[[NotebookNode], None]:
    def change(lab: NotebookNode) -> None:
        assert old in lab.cells[index].source
        lab.cells[index].source = lab.cells[index].source.replace(old, new)

    return change


FAULTS: dict[str, tuple[Callable[[NotebookNode], None], Callable[[NotebookNode], None]]] = {
    "not run": (lambda lab: lab.cells[1].update(execution_count=None), check_it_ran),
    "out of order": (lambda lab: lab.cells[1].update(execution_count=4), check_it_ran),
    "an error": (lambda lab: lab.cells[1].outputs.append(new_output("error", evalue="no")), check_it_ran),
    "a warning": (lambda lab: lab.cells[1].outputs.append(new_output("stream", name="stderr")), check_it_ran),
    "a path": (lambda lab: lab.cells[4].outputs[0].update(text="/home/a/b.py"), check_it_knows_no_machine),
    "a path of Windows": (replaced(1, "1", r"'C:\a'"), check_it_knows_no_machine),
    "metadata": (lambda lab: lab.metadata.update(widgets={}), check_it_knows_no_machine),
    "a linked picture": (replaced(2, "Why", "![](https://a.b/c.png) Why"), check_it_loads_nothing),
    "a formula": (replaced(2, "Why", "$x$ Why"), check_it_loads_nothing),
    "a script": (
        lambda lab: lab.cells[1].outputs.append(
            new_output("display_data", {"text/html": "<script src='https://a.b'></script>"})
        ),
        check_it_loads_nothing,
    ),
    "no goal": (replaced(0, "At the end you know", "This is"), check_it_says_what_to_expect),
    "no expectation": (replaced(0, "Expect", "See"), check_it_says_what_to_expect),
    "no words": (lambda lab: lab.cells[1].metadata.pop("alt"), check_it_says_what_to_expect),
    "no answer": (replaced(2, "<summary>Answer", "<summary>More"), check_questions),
    "counted wrong": (replaced(2, "Question 1", "Question 2"), check_questions),
    "an answer too many": (replaced(2, "**Question 1.** ", ""), check_questions),
    "left open": (replaced(2, "</details>", ""), check_questions),
    "no check": (lambda lab: lab.cells.pop(4), check_exercises),
    "no stub": (replaced(3, "...", "return 2 * x"), check_exercises),
    "solved before": (lambda lab: lab.cells[4].outputs[0].update(text="right\n"), check_exercises),
    "no solution": (replaced(5, "return 2 * x", "..."), check_exercises),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_checks_can_fail(name):
    change, check = FAULTS[name]
    lab = small()
    for one in CHECKS:
        one(lab)
    change(lab)
    with pytest.raises((AssertionError, ValueError)):
        check(lab)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_running_can_fail(tmp_path):
    from nbclient.exceptions import CellExecutionError

    lab = small()
    lab.cells.pop(1)
    executed = execute(with_solutions(lab), tmp_path)
    check_solved(executed)
    check_same(executed, lab)
    lab.cells[3].outputs[0].text = "something else"
    with pytest.raises(AssertionError, match="is now"):
        check_same(executed, lab)
    cells(executed, "code", "solved")[0].outputs[0].text = "double: not written yet"
    with pytest.raises(AssertionError):
        check_solved(executed)
    lab.cells[4].source = lab.cells[4].source.replace("2 * x", "3 * x")
    with pytest.raises(CellExecutionError, match="AssertionError"):
        execute(with_solutions(lab), tmp_path)
