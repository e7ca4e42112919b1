"""What the documentation shows runs, and imports are as light as it says."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import griffin
from griffin.cli import COMMANDS
from griffin.methods import METHODS

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ASKING = "client"  # which needs a server: tests/test_server.py


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = {"cli.md": "generate_cli", "reference.md": "generate_reference"}
FENCE = re.compile(r"(<!-- not run: [^\n]+ -->\n)?^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def loaded() -> Any:
    """The built-in model, loaded once for all examples and pages."""
    return griffin.load("smollm2-135m")


@pytest.fixture
def shared(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`griffin.load` of the built-in model gives the shared one; methods that an example adds are gone afterwards."""
    load = griffin.load
    monkeypatch.setattr(griffin, "load", lambda *a, **k: loaded if (a, k) == (("smollm2-135m",), {}) else load(*a, **k))
    known = set(METHODS)
    yield
    for name in set(METHODS) - known:
        del METHODS[name]


@pytest.mark.model
@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.stem != ASKING], ids=lambda path: path.stem)
def test_examples_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    assert path.stem == "handle" or capsys.readouterr().out.strip()


def snippets(page: Path, language: str = "python") -> list[str]:
    """The page's code in a language, but for what is marked as not run, with its reason."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [code for reason, name, code in found if name == language and not reason]


def test_every_snippet_of_the_readme_is_in_an_example() -> None:
    sources = [path.read_text() for path in EXAMPLES]
    found = snippets(PAGES[0])
    assert len(found) >= 2
    for snippet in found:
        assert any(snippet in source for source in sources), snippet


@pytest.mark.model
@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("page", [page for page in PAGES[1:] if snippets(page)], ids=lambda page: page.stem)
def test_snippets_of_the_docs_run(page: Path, loaded: Any) -> None:
    """A page's snippets run one after the other, as a reader would type them."""
    model, tokenizer = loaded
    inputs = tokenizer("The history of the lighthouse begins", return_tensors="pt")
    names = {"griffin": griffin, "model": model, "tokenizer": tokenizer, "inputs": inputs}
    for snippet in snippets(page):
        exec(compile(snippet, str(page), "exec"), names)
    griffin.attach(model).detach()  # nothing was left attached


def test_every_code_block_names_its_language() -> None:
    for page in PAGES:
        for _, language, code in FENCE.findall(page.read_text(encoding="utf-8")):
            assert language in ("ini", "json", "python", "sh", "text"), f"{page.name}: {code}"


def test_commands_in_the_docs_exist() -> None:
    targets = (ROOT / "Makefile").read_text()
    helps = dict(
        re.findall(r"^## griffin (\w+)\n(.*?)(?=^## |\Z)", (ROOT / "docs/cli.md").read_text(), flags=re.S | re.M)
    )
    assert set(helps) == set(COMMANDS)
    for page in PAGES:
        for line in "".join(snippets(page, "sh")).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["make"]:
                assert re.search(rf"^{words[1]}:", targets, flags=re.MULTILINE), line
            if words[:1] == ["griffin"]:
                assert words[1] in helps, line
                unknown = [word for word in words if word.startswith("--") and f"{word} " not in helps[words[1]]]
                assert not unknown or words[1] == "eval", f"{page.name}: {line}"  # eval passes others on


def test_links_in_the_docs_lead_somewhere() -> None:
    pages = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"))]
    anchors = {page: set(map(anchor, headings(page))) for page in pages}
    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" in link:
                continue
            target, _, fragment = link.partition("#")
            path = (page.parent / target).resolve() if target else page
            assert path.exists(), f"{page.name}: {link}"
            assert not fragment or fragment in anchors[path], f"{page.name}: {link}"


def headings(page: Path) -> list[str]:
    without_code = FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"^#+ (.+)$", without_code, flags=re.MULTILINE)


def anchor(heading: str) -> str:
    """As GitHub and MkDocs make it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", GENERATED)
def test_generated_pages_are_current(page: str) -> None:
    script = runpy.run_path(str(ROOT / "docs" / f"{GENERATED[page]}.py"))
    assert script["PAGE"].read_text(encoding="utf-8") == script["render"](), f"run `python docs/{GENERATED[page]}.py`"


def imported_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_griffin_is_light() -> None:
    assert not imported_by("import griffin") & {"torch", "transformers", "numpy", "rich"}
    heavy = {"vllm", "lm_eval", "fastapi", "matplotlib", "plotly"}
    assert not imported_by("import griffin; [getattr(griffin, name) for name in griffin.__all__]") & heavy
    assert not imported_by("import griffin.integrations.lm_eval, griffin.cli.commands.eval") & {
        *heavy,
        "torch",
        "datasets",
    }
