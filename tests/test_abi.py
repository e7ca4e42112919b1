"""The declaration of the C interface in Python against the headers and the built library."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from griffin import activation
from griffin.native import abi, grouped, library

if (reason := library.why_not()) is not None:
    pytest.fail(f"these tests need the native library: {reason}", pytrace=False)

HEADERS = Path(__file__).parents[1] / "native" / "include"


@pytest.fixture(scope="module")
def headers() -> str:
    """The headers without their comments."""
    text = "".join((HEADERS / name).read_text() for name in ("griffin_native.h", "griffin_decode.h", "griffin_gguf.h"))
    return re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)


def test_every_struct_of_the_headers_is_declared(headers: str) -> None:
    assert sorted(re.findall(r"\} (griffin_\w+);", headers)) == sorted(abi.STRUCTS)


@pytest.mark.parametrize("name", abi.STRUCTS)
def test_fields_have_the_headers_names_and_order(name: str, headers: str) -> None:
    found = re.search(r"typedef struct \{([^}]*)\} " + name + ";", headers)
    assert found is not None
    declarators = [part for line in found[1].split(";") for part in line.split(",") if part.strip()]
    fields = [re.search(r"(\w+)(\[\d+\])?\s*$", part) for part in declarators]
    assert [field[1] for field in fields if field] == [field[0] for field in abi.STRUCTS[name]._fields_]


def test_numbers_are_the_headers(headers: str) -> None:
    def enum(name: str) -> list[str]:
        found = re.search(f"enum {name} {{([^}}]*)}}", headers)
        assert found is not None
        return [value.strip().removeprefix("GRIFFIN_").lower() for value in found[1].split(",")]

    assert re.findall(r"GRIFFIN_ABI = (\d+)", headers) == [str(abi.ABI)]
    assert enum("griffin_format") == list(abi.FORMATS)
    for name, values in (("scale", abi.SCALES), ("offset", abi.OFFSETS)):
        assert enum(f"griffin_{name}") == [f"{name}_{value.replace(' ', '_')}" for value in values]
    numbers = dict(re.findall(r"GRIFFIN_GGUF_(\w+) = (\d+)", headers))
    assert numbers == {name: str(number) for name, number in grouped.GGUF_TYPES.items()}
    assert re.findall(r"GRIFFIN_SLACK = (\d+)", headers) == [str(grouped.SLACK)]
    assert enum("griffin_activation") == list(abi.ACTIVATIONS) == list(activation.ACTIVATIONS)
    assert len(enum("griffin_status")) == 1 + len(abi.STATUS)


def test_every_function_of_the_headers_is_declared(headers: str) -> None:
    assert sorted(re.findall(r"GRIFFIN_API [\w *]+[ *](griffin_\w+)\(", headers)) == sorted(abi.FUNCTIONS)


@pytest.mark.parametrize("name", abi.STRUCTS)
def test_a_struct_of_another_size_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = abi.STRUCTS[name]

    class Larger(ctypes.Structure):
        _fields_ = [*known._fields_, ("more", ctypes.c_int64)]

    monkeypatch.setitem(abi.STRUCTS, name, Larger)
    size = ctypes.sizeof(known)
    refused = library._open.__wrapped__()
    assert isinstance(refused, str)
    assert f"has a {name} of {size} bytes, this package needs {size + 8}: reinstall griffin-llm" in refused


@pytest.mark.parametrize("name", abi.STRUCTS)
def test_a_last_field_elsewhere_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = abi.STRUCTS[name]
    *first, before, last = known._fields_

    class Split(ctypes.Structure):  # of the same size
        if half := {2: ctypes.c_uint8, 8: ctypes.c_int32, 16: ctypes.c_void_p}.get(ctypes.sizeof(last[1])):
            _fields_ = [*first, before, ("low", half), ("high", half)]
        else:
            _fields_ = [*first, ("both", ctypes.c_int64)]

    assert ctypes.sizeof(Split) == ctypes.sizeof(known)
    monkeypatch.setitem(abi.STRUCTS, name, Split)
    refused = library._open.__wrapped__()
    assert isinstance(refused, str)
    assert f"has the last field of {name} at byte {getattr(known, last[0]).offset}, this package needs" in refused


def test_another_interface_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abi, "ABI", abi.ABI + 1)
    refused = library._open.__wrapped__()
    assert isinstance(refused, str)
    assert f"has interface {abi.ABI - 1}, this package needs {abi.ABI}: reinstall griffin-llm" in refused


def test_an_unknown_struct_has_no_size() -> None:
    assert library.loaded().griffin_sizeof(b"griffin_rows") == -1
    assert library.loaded().griffin_last_offset(b"griffin_rows") == -1
