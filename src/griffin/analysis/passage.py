"""The text that commands use if the user gives none."""

from __future__ import annotations

from pathlib import Path

from griffin.text_files import read_text

PASSAGE = Path(__file__).with_name("passage.txt")


def passage() -> str:
    """The passage that the package contains."""
    return read_text(PASSAGE)
