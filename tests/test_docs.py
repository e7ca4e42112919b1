"""What the documentation shows runs, and imports are as light as it says."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from griffin.methods import METHODS

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ASKING = "client"  # which needs a server: tests/test_server.py


@pytest.mark.model
@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.stem != ASKING], ids=lambda path: path.stem)
def test_examples_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = set(METHODS)
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        for name in set(METHODS) - known:  # an example adds a method
            del METHODS[name]
    assert path.stem == "handle" or capsys.readouterr().out.strip()


def test_every_snippet_of_the_readme_is_in_an_example() -> None:
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    sources = [path.read_text() for path in EXAMPLES]
    assert len(snippets) >= 4
    for snippet in snippets:
        assert any(snippet in source for source in sources), snippet


def test_commands_of_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"^make (\w+)", text, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


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
