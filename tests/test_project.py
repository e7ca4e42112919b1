"""What surrounds the code agrees with it: versions, ranges, files of the repository."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

from griffin.version import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(path: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / path).read_text(), flags=re.MULTILINE))


def version(text: str) -> list[int]:
    return [int(number) for number in text.strip(".").split(".")]


def test_oldest_versions_that_ci_installs_are_the_lower_ends_of_the_ranges() -> None:
    oldest = pins(".github/constraints-oldest.txt")
    lowest = dict(re.match(r"([\w-]+)>=([\d.]+)", requirement).groups() for requirement in PROJECT["dependencies"])  # type: ignore[union-attr]
    assert {"torch", "transformers"} <= set(oldest)
    for name, oldest_version in oldest.items():
        least = version(lowest[name])
        assert version(oldest_version)[: len(least)] == least, name


def test_pinned_versions_are_in_the_ranges() -> None:
    pinned = pins("constraints.txt")
    for requirement in PROJECT["dependencies"]:
        name, least = re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()  # type: ignore[union-attr]
        assert version(pinned[name]) >= version(least), name


def test_files_of_the_repository_can_be_read() -> None:
    for path in [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]:
        assert yaml.safe_load(path.read_text()), path
    ruff = re.search(r"ruff-pre-commit\n    rev: v([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert ruff is not None
    assert ruff[1] == pins("constraints.txt")["ruff"]


def test_version_is_the_same_everywhere() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
