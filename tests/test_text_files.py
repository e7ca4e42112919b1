"""Texts from outside: a byte order mark is no part of any, wherever it is read."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

import griffin
from griffin.analysis.folder import _object
from griffin.analysis.report.tables import at_equal_bytes
from griffin.text_files import decode, lines, read_text, without_mark

MARK = "\ufeff".encode()
SOURCE = Path(griffin.__file__).parent
# What reads text by itself, and why a mark does no harm there.
ELSEWHERE = {
    "analysis/machine.py": "the kernel's files",
    "native/library.py": "the kernel's files",
    "analysis/report/page.py": "the package's own files",
    "cli/commands/chat.py": "a line typed on a terminal, whose mark it takes off",
    "integrations/lm_eval/generating.py": "utf-8-sig, as half of a line must not fail",
}


def test_texts_are_read_in_one_place() -> None:
    reads = re.compile(
        r"[\w)]\.read_text\(|sys\.stdin\.(buffer|read)|= input\(|return input\(|gzip\.open|\.open\(enc|\.open\(new"
    )
    found = {
        str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if reads.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"text_files.py", *ELSEWHERE}


def test_a_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    for text in ("", "a", "a\ufeffb\ufeff", "é\n"):
        (tmp_path / "file").write_bytes(MARK + text.encode())
        assert (
            read_text(tmp_path / "file") == decode(MARK + text.encode(), "it") == without_mark("\ufeff" + text) == text
        )
        assert decode(text.encode(), "it") == without_mark(text) == text
    assert without_mark("\ufeff\ufeffa") == "\ufeffa"  # the second is a character
    with pytest.raises(ValueError, match=r"it is not UTF-8 text \(byte 0\)"):
        decode("a".encode("utf-16"), "it")


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz"])
def test_lines(tmp_path: Path, name: str) -> None:
    path, data = tmp_path / name, MARK + b"a,b\n" + MARK + b"1,2"
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert list(lines(path)) == [(f"{path}, line 1", "a,b\n"), (f"{path}, line 2", "\ufeff1,2")]


def test_json_and_tables(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(MARK + b'{"a": 1}')
    assert _object(tmp_path / "run.json") == {"a": 1}
    (tmp_path / "equal_bytes").mkdir()
    ranges = "kl,kl_low,kl_high,ratio,ratio_low,ratio_high,agreement"
    names = f"method,density,{ranges},prompt_tokens,generated_tokens,weights,sequences"
    row = "x,0.5,1,1,1,1,1,1,1,8,8,bf16,2"
    (tmp_path / "equal_bytes" / "one.csv").write_bytes(MARK + f"{names}\n{row}\n".encode())
    assert at_equal_bytes(tmp_path)[0][0] == "8 + 8 tokens, bf16 weights, 2 sequences"
