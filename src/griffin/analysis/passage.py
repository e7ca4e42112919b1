"""The passage that the commands use where the user gives no text."""

from __future__ import annotations

from pathlib import Path

from griffin.text_files import read_text

PASSAGE = Path(__file__).with_name("passage.txt")


def passage() -> str:
    """The passage."""
    return read_text(PASSAGE)
