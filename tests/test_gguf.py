"""GGUF files: the reader and bad input, dequantisers, config, names and tokenizer, whole models of every family."""

from __future__ import annotations

import logging
import os
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.families import VOCABULARY, random_model

from griffin.errors import GriffinError
from griffin.gguf import reader, types
from griffin.gguf.config import config_of, stop_tokens, why_not
from griffin.gguf.dequantise import dequantise, unpack
from griffin.gguf.names import NAMINGS, row_order, sources
from griffin.gguf.reader import GgufFile
from griffin.gguf.types import REFUSED, TYPES, TensorType
from griffin.models import gguf_model
from griffin.models.gguf_model import read_gguf
from griffin.models.load import load

# --------------------------------------------------------------------------------------------- files made by hand

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10


def text(value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: bytes | str, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def entry(name: str, dimensions: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


ARCHITECTURE = key("general.architecture", STRING, text("llama"))
ONE = entry("one", (8, 4), 0, 0)


def file_of(
    path: Path,
    keys: tuple[bytes, ...] = (ARCHITECTURE,),
    tensors: tuple[bytes, ...] = (ONE,),
    data: int = 128,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> Path:
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys)))) + b"".join(keys + tensors)
    path.write_bytes(head + bytes(-len(head) % alignment + data))
    return path


def message_of(call: Callable[[], Any], *parts: str, kind: type[Exception] = GriffinError) -> str:
    with pytest.raises(kind) as caught:
        call()
    found = str(caught.value)
    assert "\n" not in found
    assert len(found) < 700
    for part in parts:
        assert part in found
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_values(path: Path) -> None:
    numbers = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
    keys = [key(f"n{kind}", kind, struct.pack(f"<{form}", 7)) for kind, form in numbers.items()]
    keys += [key(f"a{kind}", ARRAY, struct.pack(f"<IQ2{form}", kind, 2, 7, 8)) for kind, form in numbers.items()]
    keys += [key("yes", BOOL, b"\1"), key("empty", STRING, text("")), key("é", STRING, text("ü\n"))]
    keys += [key("words", ARRAY, struct.pack("<IQ", STRING, 3) + text("a") + text("") + text("bé"))]
    keys += [key("none", ARRAY, struct.pack("<IQ", STRING, 0))]
    with GgufFile(file_of(path, (ARCHITECTURE, *keys), version=2)) as file:
        found = file.metadata
        assert file.version == 2
        assert file.architecture == "llama"
        for kind in numbers:
            assert found[f"n{kind}"] == 7
            assert found[f"a{kind}"].tolist() == [7, 8]
        assert type(found["n4"]) is int
        assert type(found["n6"]) is float
        assert found["yes"] is True
        assert (found["empty"], found["é"], found["words"], found["none"]) == ("", "ü\n", ["a", "", "bé"], [])
        assert file.tensors["one"].shape == (4, 8)
        assert (file.tensors["one"].rows, file.tensors["one"].row_bytes, file.tensors["one"].nbytes) == (4, 32, 128)


def test_strings_across_what_is_read_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_CHUNK", 7)
    words = [f"{number}" * (number % 5) for number in range(50)]
    payload = struct.pack("<IQ", STRING, len(words)) + b"".join(map(text, words))
    with GgufFile(file_of(path, (ARCHITECTURE, key("words", ARRAY, payload)))) as file:
        assert file.metadata["words"] == words


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda p: file_of(p, counts=(1, 200_000)), "claims 200,000 metadata keys"),
        (lambda p: file_of(p, counts=(2**63, 1)), "claims 9,223,372,036,854,775,808 tensors"),
        (lambda p: file_of(p, (ARCHITECTURE, ARCHITECTURE)), "'general.architecture' comes twice"),
        (lambda p: file_of(p, (key("k", STRING, struct.pack("<Q", 2**62)),)), "it should go on to byte"),
        (lambda p: file_of(p, (text(b"\xff") + struct.pack("<IB", 0, 0),)), "not UTF-8"),
        (lambda p: file_of(p, (key("k", 13, b""),)), "of type 13"),
        (lambda p: file_of(p, (key("k", ARRAY, struct.pack("<IQ", ARRAY, 2)),)), "of type 9"),
        (lambda p: file_of(p, (key("k", ARRAY, struct.pack("<IQ", U64, 2**61)),)), "it should go on to byte"),
        (lambda p: file_of(p, (key("k", ARRAY, struct.pack("<IQ", STRING, 2**40)),)), "more than there can be"),
        (lambda p: file_of(p, (key("general.alignment", U32, struct.pack("<I", 24)),)), "expected a power of two"),
        (lambda p: file_of(p, (key("general.alignment", U32, struct.pack("<I", 0)),)), "expected a power of two"),
        (lambda p: file_of(p, (key("split.count", STRING, text("2")),)), "split.count is 2, expected a count"),
        (lambda p: file_of(p, tensors=(entry("one", (), 0, 0),)), "has 0 dimensions"),
        (lambda p: file_of(p, tensors=(entry("one", (1,) * 5, 0, 0),)), "has 5 dimensions"),
        (lambda p: file_of(p, tensors=(entry("one", (8, 0), 0, 0),)), "has the shape (0, 8)"),
        (lambda p: file_of(p, tensors=(entry("one", (2**40, 2**40), 0, 0),)), "has the shape"),
        (lambda p: file_of(p, tensors=(entry("one", (8, 5), 0, 0),)), "ends at byte"),
        (lambda p: file_of(p, tensors=(entry("one", (8, 2), 0, 2**63),)), "ends at byte"),
        (lambda p: file_of(p, tensors=(entry("one", (8, 2), 0, 4),)), "starts at 4, no multiple of 32"),
        (lambda p: file_of(p, tensors=(entry("one", (16,), 2, 0),)), "has rows of 16 values, not in 32s"),
        (lambda p: file_of(p, tensors=(entry("one", (8,), 4_000, 0),)), "is of type 4000, which is not known"),
        (lambda p: file_of(p, tensors=(ONE, entry("two", (8,), 0, 96))), "'two' starts inside of 'one'"),
        (lambda p: file_of(p, tensors=(entry("a", (8,), 0, 0), entry("a", (8,), 0, 32))), "'a' comes twice"),
    ],
)
def test_damaged(path: Path, make: Callable[[Path], Path], part: str) -> None:
    tracemalloc.start()
    message_of(lambda: GgufFile(make(path)), str(path), "is damaged or cut off", part, "fetch the file again")
    assert tracemalloc.get_traced_memory()[1] < 1 << 25
    tracemalloc.stop()


def test_claims_in_a_large_file(path: Path) -> None:
    """What would fit in the file by its size is limited too. The file takes no space on the disk."""
    for payload, part in (
        (struct.pack("<IQ", STRING, reader.MAX_STRINGS + 1), "more than there can be"),
        (struct.pack("<IQ", U8, 1 << 30), "its metadata goes beyond 256 MiB"),
    ):
        file_of(path, (key("k", ARRAY, payload),))
        os.truncate(path, 1 << 34)
        message_of(lambda: GgufFile(path), part)


def test_cut_anywhere(path: Path, tmp_path: Path) -> None:
    words = key("words", ARRAY, struct.pack("<IQ", STRING, 3) + text("a") + text("bc") + text("def"))
    whole = file_of(path, (ARCHITECTURE, words)).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in range(len(whole)):
        cut.write_bytes(whole[:size])
        message_of(lambda: GgufFile(cut), "cut.gguf", "fetch the file again")


def test_other_versions(path: Path) -> None:
    message_of(lambda: GgufFile(file_of(path, version=1)), "GGUF version 1, expected 2 or 3", kind=ValueError)
    message_of(lambda: GgufFile(file_of(path, version=3 << 24)), "big-endian", kind=ValueError)


@pytest.mark.parametrize("number", REFUSED)
def test_types_are_refused_by_name(path: Path, number: int) -> None:
    file_of(path, tensors=(entry("blk.0.ffn_up.weight", (256,), number, 0),))
    said = message_of(lambda: GgufFile(path), f"blk.0.ffn_up.weight is of type {REFUSED[number]},", kind=ValueError)
    assert "such as Q4_K_M" in said


def test_types_are_ggmls() -> None:
    assert {kind.number: (kind.name, kind.block, kind.bytes) for kind in TYPES.values()} == {
        kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind])
        for kind in GGMLQuantizationType
        if kind.value not in REFUSED
    }
    assert all(REFUSED[kind.value] == kind.name for kind in GGMLQuantizationType if kind.value in REFUSED)


def test_no_architecture(path: Path) -> None:
    message_of(lambda: read_gguf(file_of(path, ()), torch.float32), "names no general.architecture")


def test_alignment(path: Path) -> None:
    keys = (ARCHITECTURE, key("general.alignment", U32, struct.pack("<I", 512)))
    with GgufFile(file_of(path, keys, alignment=512)) as file:
        assert file.tensors["one"].offset % 512 == 0


def test_a_file_that_changes(path: Path) -> None:
    with GgufFile(file_of(path)) as file:
        tensor = file.tensors["one"]
        assert np.array_equal(tensor.data, tensor.read())
        assert tensor.read(1, 3).shape == (2, 32)
        tensor.forget()
        assert not tensor.data.any()
        with pytest.raises(ValueError, match="read-only"):
            tensor.data[0] = 1
        assert file.unchanged()
        file.check_unchanged()
        other = GgufFile(path)
        os.truncate(path, path.stat().st_size - 1)
        assert not file.unchanged()
        message_of(lambda: other.tensors["one"].data, "has become shorter")
        other.close()
        message_of(file.check_unchanged, "has changed while it was read")
        message_of(tensor.read, "has become shorter while it was read")
    with GgufFile(file_of(path)) as file:
        with path.open("r+b") as other:
            other.seek(-1, os.SEEK_END)
            other.write(b"x")
        os.utime(path, ns=(1, 1))
        message_of(file.check_unchanged, "has changed while it was read")


def write_parts(folder: Path, changes: dict[int, bytes] | None = None) -> Path:
    """Two parts; a change replaces a part's second tensor entry."""
    for number in range(2):
        names = (key("split.no", U32, struct.pack("<I", number)), key("split.count", U32, struct.pack("<I", 2)))
        total = key("split.tensors.count", U32, struct.pack("<I", 2))
        keys = (ARCHITECTURE, *names, total) if number == 0 else names
        own = entry(f"t{number}", (8,), 0, 0)
        file_of(folder / f"m-{number + 1:05}-of-00002.gguf", keys, ((changes or {}).get(number, own),))
    return folder / "m-00001-of-00002.gguf"


def test_parts(tmp_path: Path) -> None:
    with GgufFile(write_parts(tmp_path)) as file:
        assert list(file.tensors) == ["t0", "t1"]
        assert file.tensors["t1"].part.path.name == "m-00002-of-00002.gguf"
        assert file.unchanged()
        os.utime(file.paths[1], ns=(1, 1))
        assert not file.unchanged()


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    first = write_parts(tmp_path, {1: entry("t0", (8,), 0, 0)})
    message_of(lambda: GgufFile(first), "tensor t0 is in two parts")
    second = tmp_path / "m-00002-of-00002.gguf"
    file_of(second)
    message_of(lambda: GgufFile(first), str(second), "does not say that it is part 2 of 2")
    second.write_bytes(b"GGUF")
    message_of(lambda: GgufFile(first), str(second), "is damaged or cut off")
    write_parts(tmp_path)
    keys = (ARCHITECTURE, key("split.count", U32, struct.pack("<I", 2)), key("split.tensors.count", U8, b"\5"))
    file_of(first, keys, (entry("t0", (8,), 0, 0),))
    message_of(lambda: GgufFile(first), "have 2 tensors, split.tensors.count says 5")


# ------------------------------------------------------------------------------------------------- dequantisers

# Where the float16 scales of a block are.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "F16": (0,), "BF16": (), "F32": (),
}  # fmt: skip


def random_blocks(kind: TensorType, count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Random bytes, with finite scales."""
    generator = np.random.default_rng(seed)
    if kind in (types.F32, types.BF16):
        values = generator.standard_normal((count, 1)).astype(np.float32).view(np.uint8)
        return np.ascontiguousarray(values[:, -kind.bytes :])
    blocks = generator.integers(0, 256, (count, kind.bytes), dtype=np.uint8)
    for at in HALVES[kind.name]:
        scales = 0.1 * generator.standard_normal((count, 1))
        blocks[:, at : at + 2] = scales.astype(np.float16).view(np.uint8)
    return blocks


def oracle(blocks: np.ndarray[Any, Any], kind: TensorType) -> np.ndarray[Any, Any]:
    return gguf.dequantize(blocks.reshape(1, -1), GGMLQuantizationType(kind.number)).reshape(-1).astype(np.float32)


@pytest.mark.parametrize("kind", TYPES.values(), ids=lambda kind: kind.name)
def test_dequantised_to_the_bit(kind: TensorType) -> None:
    blocks = random_blocks(kind, 70_000 if kind.block == 1 else 2_100)
    found = dequantise(blocks, kind)
    assert found.dtype == np.float32
    assert np.array_equal(found.view(np.uint32), oracle(blocks, kind).view(np.uint32))
    assert np.array_equal(dequantise(blocks, kind, np.empty(found.shape, np.float32)), found)
    if kind.block == 1:
        with pytest.raises(ValueError, match="has no blocks"):
            unpack(blocks, kind)
    else:
        assert unpack(blocks, kind).codes.dtype.itemsize == 1
    if kind.bytes > 1:
        with pytest.raises(ValueError, match="no whole number"):
            dequantise(blocks.reshape(-1)[:-1], kind)


# ---------------------------------------------------------------------------------------------- models of families

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_THETA = {"rope_theta": 5000.0}
_YARN = _THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16.0}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_LOCAL = {
    "full_attention": _THETA | {"rope_type": "linear", "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
_SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_GRANITE = {
    "attention_multiplier": 0.5, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": _THETA}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", {"rope_parameters": _LLAMA3, "max_position_embeddings": 131072, "head_dim": 64}),
    "mistral": ("mistral", {"sliding_window": 4, "head_dim": 16}),
    "qwen2": ("qwen2", {"rope_parameters": _YARN}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", _SLIDING | {"head_dim": 8, "final_logit_softcapping": 20.0, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", _SLIDING | {"head_dim": 16, "rope_parameters": _LOCAL, "query_pre_attn_scalar": 16}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "rope_parameters": _THETA, "tie_word_embeddings": True}),
    "granite": ("granite", _GRANITE | {"tie_word_embeddings": True}),
}
SUPPORTED_BY_TRANSFORMERS = ("llama", "llama-tied", "qwen2", "gemma2", "gemma3")
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}


def model_of(case: str) -> Any:
    model_type, own = CASES[case]
    return random_model(model_type, _SHAPE | own, torch.float32)


def add_vocabulary(writer: gguf.GGUFWriter, size: int = VOCABULARY) -> None:
    tokens = ["<pad>", "<s>", "</s>", *(chr(number) for number in range(33, 33 + 90)), "ab", "abc"]
    tokens += [f"<extra{number}>" for number in range(size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens[:size])
    writer.add_token_types(([3, 3, 3] + [1] * (size - 3))[:size])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")


def write_model(path: Path, model: Any, change: Callable[[gguf.GGUFWriter], None] = lambda writer: None) -> Path:
    """A model as llama.cpp's converter writes it, in float32.

    Args:
        change: called before the file is written; what it adds replaces what was added.
    """
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if architecture == "llama":
        writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    if "full_attention" in rope:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    if rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy())
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture == "gemma3":
        writer.add_sliding_window_pattern(2)
    if architecture == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    add_vocabulary(writer)
    change(writer)
    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if architecture in ("llama", "smollm3", "granite") and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
            values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("case", CASES)
def test_models_of_every_family(path: Path, case: str) -> None:
    """A model, written as llama.cpp writes it and read again, is the same model."""
    expected = model_of(case)
    model, tokenizer = read_gguf(write_model(path, expected), torch.float32)
    assert type(model) is type(expected)
    assert not model.training
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():  # 1 is added to Gemma's norms, and subtracted
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=3e-7 if "gemma" in case else 0)
    tied = model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert tied == expected.config.tie_word_embeddings
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    ignored = {"architectures", "dtype", "transformers_version"}
    differing = {
        name: (value, getattr(model.config, name, None))
        for name, value in expected.config.to_dict().items()
        if name not in ignored and value != getattr(model.config, name, None)
    }
    assert differing == {}
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 2
    assert tokenizer("abcab</s>").input_ids == tokenizer.convert_tokens_to_ids(["abc", "ab", "</s>"])
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.chat_template == "{{ messages[0].content }}"


def sentencepiece(writer: gguf.GGUFWriter) -> None:
    """Llama's and Gemma's kind of vocabulary in place of the other."""
    for name in [name for name in writer.kv_data[0] if name.startswith("tokenizer.")]:
        del writer.kv_data[0][name]
    tokens = ["<unk>", "<s>", "</s>", "\u2581", *map(chr, range(97, 97 + 26)), "ab", "abc", "\u2581abc", "  "]
    tokens += [f"<0x{byte:02X}>" for byte in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(VOCABULARY)])
    writer.add_token_types([2, 3, 3, *[1] * 31, *[6] * (VOCABULARY - 34)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("case", SUPPORTED_BY_TRANSFORMERS)
def test_models_are_transformers(path: Path, case: str, kind: str) -> None:
    """Transformers' own loader gives the same weights, vocabulary and ids."""
    write_model(path, model_of(case), sentencepiece if kind == "sentencepiece" else lambda writer: None)
    model, tokenizer = read_gguf(path, torch.bfloat16)
    with GgufFile(path) as file:
        expected_model, expected = gguf_model._by_transformers(file, torch.bfloat16, "a test")
    found, wanted = model.state_dict(), expected_model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert type(tokenizer) is type(expected)
    assert tokenizer.get_vocab() == expected.get_vocab()
    assert tokenizer.special_tokens_map == expected.special_tokens_map
    for words in ("abcab", " a</s>b", "", "xyz<s>"):
        assert tokenizer(words).input_ids == expected(words).input_ids


def test_names_are_ggmls() -> None:
    """Every name that is used is one that llama.cpp's own table has for the architecture."""
    for architecture in NAMINGS:
        arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        known = {name for _, name in gguf.get_tensor_name_map(arch, 2).mapping.values()}
        extra = {"output"} | {f"blk.{layer}.attn_{which}_norm" for layer in range(2) for which in "qk"}
        assert {source.tensor for source in sources(architecture, 2, 4, 2)} <= known | extra


def test_linears_in_the_file(path: Path) -> None:
    """The parameter is the tensor with its rows in order: what packed formats go by."""
    expected = model_of("llama")
    with GgufFile(write_model(path, expected)) as file:
        count = 0
        for source in sources("llama", 2, 4, 2):
            if source.linear:
                tensor = file.tensors[f"{source.tensor}.weight"]
                rows = tensor.data.view(np.float32)
                if source.heads is not None:
                    rows = rows[row_order(tensor.rows, source.heads)]
                assert np.array_equal(rows, expected.get_submodule(source.module).weight.detach().numpy())
                count += 1
        assert count == 15
    with pytest.raises(ValueError, match="no whole pairs"):
        row_order(6, 2)


def test_mixed_types(path: Path) -> None:
    """Every type in one file, as in real ones."""
    model = random_model("llama", _SHAPE | {"hidden_size": 256, "intermediate_size": 512}, torch.float32)
    kinds = cycle(TYPES.values())
    blocks: dict[str, tuple[np.ndarray[Any, Any], TensorType]] = {}
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 64), (writer.add_embedding_length, 256), (writer.add_block_count, 2),
        (writer.add_feed_forward_length, 512), (writer.add_head_count, 4), (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
    ):  # fmt: skip
        add(value)
    add_vocabulary(writer)
    parameters = dict(model.named_parameters())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for index, (name, parameter) in enumerate(parameters.items()):
        kind = types.F32 if parameter.dim() == 1 else next(kinds)
        made = random_blocks(kind, parameter.numel() // kind.block, index)
        blocks[name] = (made, kind)
        shaped = made.reshape(*parameter.shape[:-1], -1)
        if kind is types.F32:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), shaped.view(np.float32))
        else:
            writer.add_tensor(
                names.get_name(name, try_suffixes=(".weight",)), shaped, raw_dtype=GGMLQuantizationType(kind.number)
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert len({kind.name for _, kind in blocks.values()}) == len(TYPES)
    loaded = dict(read_gguf(path, torch.float32)[0].named_parameters())
    for name, (made, kind) in blocks.items():
        values = oracle(made, kind).reshape(parameters[name].shape)
        if ".q_proj." in name or ".k_proj." in name:
            values = values[row_order(len(values), 4 if ".q_proj." in name else 2)]
        assert np.array_equal(loaded[name].detach().numpy().view(np.uint32), values.view(np.uint32)), name


def test_more_than_one_stop_token(path: Path) -> None:
    write_model(path, model_of("llama"), lambda writer: writer.add_eot_token_id(5))
    with GgufFile(path) as file:
        assert stop_tokens(file) == [2, 5]
    model, _ = read_gguf(path, torch.float32)
    assert model.generation_config is not None
    assert model.generation_config.eos_token_id == [2, 5]
    assert model.config.eos_token_id == 2


# ------------------------------------------------------------------------------------------------ models: bad input


def replaced(name: str, add: Callable[[gguf.GGUFWriter], None]) -> Callable[[gguf.GGUFWriter], None]:
    def change(writer: gguf.GGUFWriter) -> None:
        for data in writer.kv_data:
            data.pop(name, None)
        add(writer)

    return change


@pytest.mark.parametrize(
    ("name", "add", "parts"),
    [
        ("llama.block_count", lambda w: None, ("llama.block_count is missing, expected a count",)),
        ("llama.block_count", lambda w: w.add_block_count(2**31), ("llama.block_count is 2147483648",)),
        ("llama.block_count", lambda w: w.add_block_count(2**31 - 1), ("expected no more than the 21 tensors",)),
        ("llama.block_count", lambda w: w.add_block_count(9), ("claims 9 layers",)),
        ("llama.attention.key_length", lambda w: w.add_key_length(7), ("key_length is 7, expected pairs",)),
        ("llama.block_count", lambda w: w.add_string("llama.block_count", "two"), ("llama.block_count is two",)),
        ("llama.embedding_length", lambda w: w.add_embedding_length(64), ("embeddings of shape (99, 32)",)),
        ("llama.feed_forward_length", lambda w: w.add_feed_forward_length(48), ("the shape (64, 32), expected (48",)),
        ("llama.attention.head_count", lambda w: w.add_head_count(0), ("head_count is 0",)),
        ("llama.attention.head_count_kv", lambda w: w.add_head_count_kv(0), ("head_count_kv is 0",)),
        ("llama.attention.head_count_kv", lambda w: w.add_head_count_kv([1, 2]), ("head_count_kv is [1 2]",)),
        ("llama.attention.layer_norm_rms_epsilon", lambda w: w.add_layer_norm_rms_eps(float("nan")), ("is nan",)),
        ("tokenizer.ggml.tokens", lambda w: None, ("has no vocabulary",)),
        ("tokenizer.ggml.tokens", lambda w: w.add_token_list(["a"]), ("a vocabulary of 1 tokens for 99 embeddings",)),
        ("tokenizer.ggml.token_type", lambda w: w.add_token_types([1]), ("token_type does not have one value",)),
        ("tokenizer.ggml.eos_token_id", lambda w: w.add_eos_token_id(99), ("eos_token is number 99",)),
        ("tokenizer.ggml.merges", lambda w: w.add_token_merges(["a b c"]), ("its tokenizer cannot be made",)),
        ("tokenizer.ggml.model", lambda w: w.add_tokenizer_model("rwkv"), ("its tokenizer cannot be made", "rwkv")),
    ],
)
def test_metadata_that_does_not_fit(
    path: Path, name: str, add: Callable[[gguf.GGUFWriter], None], parts: tuple[str, ...]
) -> None:
    write_model(path, model_of("llama"), replaced(name, add))
    message_of(lambda: read_gguf(path, torch.float32), str(path), *parts)


def test_sizes_that_no_machine_has_room_for(path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            writer.kv_data[0].pop(f"llama.{name}")
            writer.add_uint32(f"llama.{name}", 2**31 - 2)

    write_model(path, model_of("llama"), change)
    message_of(lambda: read_gguf(path, torch.float32), "has the shape (32, 32), expected (8589934584, 32)")


def test_missing_weights(path: Path) -> None:
    model = model_of("llama")
    del model.model.layers[1].mlp.up_proj
    message_of(lambda: read_gguf(write_model(path, model), torch.float32), "1 weights are missing", "layers.1.mlp.up")


def test_frequencies_that_are_not_llama3s(path: Path) -> None:
    write_model(path, model_of("llama"), lambda w: w.add_tensor("rope_freqs.weight", np.ones(4, np.float32) * 3))
    message_of(lambda: read_gguf(path, torch.float32), "rope_freqs.weight")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda writer: writer.add_expert_count(4), "experts"),
        (lambda writer: writer.add_rope_dimension_count(4), "llama.rope.dimension_count"),
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "rope scaling 'longrope'"),
        (lambda writer: writer.add_tensor("blk.0.odd.weight", np.ones(4, np.float32)), "tensor 'blk.0.odd.weight'"),
    ],
)
def test_what_is_not_known_goes_to_transformers(
    path: Path, change: Callable[[gguf.GGUFWriter], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_model(path, model_of("llama"), change)
    # transformers takes the size of a head from rope.dimension_count
    with caplog.at_level(logging.WARNING, "griffin"), suppress(GriffinError):
        read_gguf(path, torch.float32)
    assert [record.getMessage() for record in caplog.records if reason in record.getMessage()]


def test_an_architecture_that_is_not_known(path: Path) -> None:
    file_of(path, (key("general.architecture", STRING, text("nonesuch")),))
    message_of(lambda: read_gguf(path, torch.float32), "architecture 'nonesuch'", kind=ValueError)
    second = write_parts(path.parent)
    other = (key("general.architecture", STRING, text("phi3")), key("split.count", U32, struct.pack("<I", 2)))
    file_of(second, other, (entry("t0", (8,), 0, 0),))
    message_of(lambda: read_gguf(second, torch.float32), "llama-gguf-split --merge", kind=ValueError)


# ------------------------------------------------------------------------------------------------------- fuzzing


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int]:
    """A model's file, its bytes, and where its tensors begin."""
    path = write_model(tmp_path_factory.mktemp("fuzz") / "whole.gguf", model_of("llama"))
    with GgufFile(path) as file:
        return path, path.read_bytes(), min(tensor.offset for tensor in file.tensors.values())


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_garbled_files(whole: tuple[Path, bytes, int], data: st.DataObject) -> None:
    """Whatever a file holds, it is read or refused in one line, and claims cost neither time nor memory."""
    path, content, header = whole
    garbled = bytearray(content)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(4, header - 1))
        patch = data.draw(st.binary(min_size=1, max_size=9) | st.sampled_from([b"\xff" * 8, bytes(8), b"\0\0\0\x7f"]))
        garbled[at : at + len(patch)] = patch
    size = data.draw(st.just(len(garbled)) | st.integers(0, len(garbled)))
    target = path.with_name("garbled.gguf")
    target.write_bytes(garbled[:size])
    tracemalloc.start()
    said = refusal(lambda: look_at(target))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 25
    assert said is None or ("\n" not in said and str(target) in said)


def refusal(call: Callable[[], Any]) -> str | None:
    """What a call says where it refuses a file; other errors come through."""
    try:
        call()
    except (GriffinError, ValueError) as error:
        return str(error)
    return None


def look_at(path: Path) -> None:
    with GgufFile(path) as file:
        if why_not(file) is None:
            config_of(file)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_garbled_models(whole: tuple[Path, bytes, int], data: st.DataObject) -> None:
    path, content, header = whole
    garbled = bytearray(content)
    at = data.draw(st.integers(4, header - 1))
    garbled[at : at + 4] = data.draw(st.binary(min_size=4, max_size=4))
    target = path.with_name("garbled-model.gguf")
    target.write_bytes(garbled)
    said = refusal(lambda: load(target))
    assert said is None or ("\n" not in said and str(target) in said)
