"""Documents do as they print: every block of Python and of commands runs, and gives the text that stands below it."""

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("numba")

from flagops import registry  # noqa: E402
from flagops.override import interpose  # noqa: E402
from flagops.tools import companions  # noqa: E402

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not a checkout")

ELSEWHERE = {"docs/own_backend.md": "tests/test_own_backend.py"}
"""Pages whose blocks are files of a package and commands on it, and the test that writes and runs them."""

PAGES = sorted(
    str(p.relative_to(ROOT)) for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"))
)
EXAMPLES = sorted(path.name for path in ROOT.glob("examples/*.py"))
NOT_RUN = 22
"""Blocks that say why they are not run; a new one is a decision."""

STAND_INS = ("kernel", "fast_hadamard_transform")
"""Modules that a document puts in the place of others."""

BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n)?```(?P<kind>python|console)\n(?P<text>.*?)^```$"
    r"(?:\n\n```text\n(?P<said>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)


@dataclass
class Block:
    kind: str
    text: str
    said: str | None
    why: str | None
    line: int


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(m["kind"], m["text"], m["said"], m["why"], text.count("\n", 0, m.start("text")))
        for m in BLOCK.finditer(text)
    ]


def of_new_operator(block: Block) -> bool:
    """Files of CONTRIBUTING's worked examples, which `test_new_operator.py` writes and holds to the suite."""
    return bool(re.match(r"# (to )?\S+\.py\n", block.text))


def alike(text: str) -> list[str]:
    """Lines without what no two runs share: times, their units, and the width of columns."""
    text = re.sub(r"\d+(\.\d+)?(e[-+]\d+)? (us|ms|s)\b", "TIME", text)
    text = re.sub(r"\d+\.\d+ times|\d+% of their TIME", "RATIO", text)
    return [" ".join(line.split()) for line in text.strip().splitlines()]


def says(got: str, said: str) -> bool:
    """Whether a text is what a document shows of it; a last line of ``...`` stands for the rest."""
    found, shown = alike(got), alike(said)
    return found[: len(shown) - 1] == shown[:-1] if shown[-1] == "..." else found == shown


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder like a checkout, to be written into, with this flagops as the command."""
    for name in ("examples", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, words in {"flagops": "-m flagops ", "python": ""}.items():
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}"$@"\n')
        (commands / name).chmod(0o755)
    for name in [name for name in os.environ if name.startswith(("FLAGOPS_", "TRITON_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    yield
    for name in STAND_INS:
        sys.modules.pop(name, None)
    if registry._added.pop("mine", None):
        for known in (registry.backend_names, registry.backend, registry.find):
            known.cache_clear()


def commands_of(block: Block) -> list[str]:
    return [line.removeprefix("$ ") for line in block.text.splitlines() if line.startswith("$ ")]


DRAWN = [page for page in PAGES if page not in (*ELSEWHERE, "README.md")]


@pytest.mark.parametrize("page", ["README.md", *(pytest.param(page, marks=pytest.mark.drawn) for page in DRAWN)])
def test_every_block_runs_as_printed(page, place, monkeypatch):
    """Blocks of Python go on from each other, as a reader types them, on a machine that is his alone."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)
    space = {"__name__": "__main__"}
    for block in blocks(page):
        if block.why or of_new_operator(block):
            continue
        where = f"{page}:{block.line}"
        said = io.StringIO()
        if block.kind == "python":
            with contextlib.redirect_stdout(said):
                exec(compile(block.text, where, "exec"), space)
        else:
            for command in commands_of(block):
                done = subprocess.run(["bash", "-ec", command], capture_output=True, text=True, timeout=300)
                assert done.returncode == 0, f"{where}: {command}\n{done.stdout}{done.stderr}"
                said.write(done.stdout)
        assert block.said is None or says(said.getvalue(), block.said), f"{where} prints\n{said.getvalue()}"
    assert not interpose.live


@pytest.mark.parametrize("script", EXAMPLES)
def test_examples_run(script, place, monkeypatch, capsys):
    path = ROOT / "examples" / script
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    said = capsys.readouterr().out
    assert said
    assert "False" not in said
    assert not interpose.live
    assert len(path.read_text().splitlines()) < 40


@pytest.mark.parametrize("page", ELSEWHERE)
def test_pages_held_elsewhere_are(page):
    assert Path(page).name in (ROOT / ELSEWHERE[page]).read_text(encoding="utf-8")


def test_blocks_that_are_not_run_are_few_and_say_why():
    why = [block.why for page in PAGES for block in blocks(page) if block.why]
    assert len(why) == NOT_RUN, why


def test_every_fence_is_one_that_is_run_or_an_output():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        opened = re.findall(r"^```(\S*)$", text, re.MULTILINE)[::2]
        assert set(opened) <= {"python", "console", "text", "toml", "{toctree}"}, page
        assert opened.count("python") + opened.count("console") == len(blocks(page)), page


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_the_first_screen_shows_what_one_gets():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert any("calls replaced" in line for line in lines[:25])
    assert len(lines) <= 125


def test_readme_names_every_operator_once():
    from flagops import registry

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("## Operators") : text.index("## What it does not do")]
    named = re.findall(r"`(\w+)`", table)
    assert sorted(named) == sorted(registry.operators())
    assert table.count("\n| ") == 2 + 9


def test_speeds_are_those_of_the_files_of_results():
    figures = companions.load("figures")
    assert figures.wrong() == []


def test_every_page_is_reached_from_the_first():
    text = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    pages = {path.name for path in ROOT.glob("docs/*.md")} - {"index.md"}
    assert pages == set(re.findall(r"\]\((\w+\.md)\)", text))


def test_versions_are_those_of_the_package():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs/versions.md").read_text(encoding="utf-8")
    wanted = [*project["dependencies"], *project["optional-dependencies"]["triton"]]
    wanted += project["optional-dependencies"]["transformers"][:1]
    for library in ("torch", "numba", "triton", "transformers"):
        (floor,) = (re.search(r">=([\d.]+)", word)[1] for word in wanted if re.match(rf"{library}\W", word))
        assert re.search(rf"^\| {library} \| {re.escape(floor)} and", page, re.MULTILINE | re.IGNORECASE), library
