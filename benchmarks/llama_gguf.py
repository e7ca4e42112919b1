"""GGUF files for `compare_llamacpp.py`, of Llama-type models and shapes: every matrix in one type, no tokenizer."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType as FileType
from transformers import PreTrainedModel

import griffin
from griffin.analysis import benchmark, machine, shapes
from griffin.errors import GriffinError

TYPES = {  # by griffin's format of weights
    "int8": (Type.Q8_0, FileType.MOSTLY_Q8_0),
    "int4": (Type.Q4_0, FileType.MOSTLY_Q4_0),
    "bf16": (Type.BF16, FileType.MOSTLY_BF16),
    "f32": (Type.F32, FileType.ALL_F32),
}
FAMILIES = ("llama", "mistral")  # llama.cpp has both under the architecture "llama"


def written(folder: Path, name: str, shape: str | None, weights: str) -> Path:
    """The GGUF file of a model, or of a shape, in a format. A shape's is written once.

    Args:
        folder: where it is written.
        name: the model; unused where there is a shape.
        shape: the shape: one random layer of it is written again and again.
        weights: a key of `TYPES`.

    Raises:
        ValueError: no such model, or it is of another family than Llama's.
        GriffinError: no room on the disk or in memory.
    """
    kind, _ = TYPES[weights]
    dtype = benchmark.dtype_of(weights)
    file = folder / f"{shape or Path(name).stem}-{kind.name}.gguf"
    if shape is None:
        model, _ = griffin.load(name, dtype=dtype, device="cpu")
        layers = model.config.num_hidden_layers
    else:
        layers = shapes.shape_of(shape).config().num_hidden_layers
        model = shapes.build(shapes.shape_of(shape), dtype, layers=1)
    rope = getattr(model.config, "rope_parameters", None) or {}
    if model.config.model_type not in FAMILIES or rope.get("rope_type") != "default":
        raise ValueError(
            f"{shape or name} is of type {model.config.model_type} with rope parameters {rope}; expected one of "
            f"{', '.join(FAMILIES)} with the default rope"
        )
    block, size = gguf.GGML_QUANT_SIZES[kind]
    total = sum(tensor.numel() // block * size for _, tensor in tensors(model, layers))
    free = machine.available_bytes()
    if free is not None and 2 * total > free:
        raise GriffinError(
            f"{file.stem} needs {2 * total / 1e9:.1f} GB of memory, {total / 1e9:.1f} GB in each engine, "
            f"{free / 1e9:.1f} GB are free; choose a smaller model or weights of fewer bits"
        )
    if shape is not None and file.is_file():
        return file
    partial = file.with_suffix(".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (room := shutil.disk_usage(folder).free) < total:
            raise GriffinError(
                f"{file} needs {total / 1e9:.1f} GB of disk, {room / 1e9:.1f} GB are free; pass another --gguf-folder"
            )
        print(f"writing {file.name}", file=sys.stderr)
        write_gguf(partial, model, layers, weights)
        partial.replace(file)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise GriffinError(f"cannot write {file}: {error.strerror or error}; pass another --gguf-folder") from error
    return file


def tensors(model: PreTrainedModel, layers: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters under GGUF's names; a model of fewer layers is repeated to `layers`. A tied head comes once."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    there: int = model.config.num_hidden_layers
    for name, tensor in model.named_parameters():
        for layer in range(layers // there if ".layers." in name else 1):
            repeated = name.replace(".layers.0.", f".layers.{layer}.") if there == 1 else name
            found = names.get_name(repeated, try_suffixes=(".weight", ".bias"))
            if found is None:
                raise ValueError(f"{name} has no place in a GGUF file of the Llama family")
            yield found, tensor


@torch.no_grad()
def write_gguf(file: Path, model: PreTrainedModel, layers: int, weights: str) -> None:
    """Write the model with every matrix in one type; vectors stay float32, as llama.cpp wants them. No tokenizer."""
    config: Any = model.config
    kind, file_type = TYPES[weights]
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_file_type(file_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    made: dict[int, np.ndarray[Any, Any]] = {}  # a repeated layer is quantised once
    for name, tensor in tensors(model, layers):
        own = kind if tensor.dim() > 1 else Type.F32
        if id(tensor) not in made:
            values = tensor.float().numpy()
            if ".attn_q." in name or ".attn_k." in name:  # llama.cpp rotates neighbours, Transformers halves of a head
                count = heads if ".attn_q." in name else kv_heads
                halves = values.reshape(count, 2, values.shape[0] // count // 2, *values.shape[1:])
                values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
            made[id(tensor)] = gguf.quantize(values, own)
        writer.add_tensor(name, made[id(tensor)], raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def format_of(file: Path) -> str:
    """The file's own word for its format, such as Q4_K_M."""
    return _read(file)[0]


def bytes_per_token(file: Path) -> int:
    """Bytes of weights that generating a token reads: all but an embedding that is not the head too."""
    return _read(file)[1]


@cache  # of a vocabulary of 150,000 tokens, gguf's reader needs seconds
def _read(file: Path) -> tuple[str, int]:
    reader = gguf.GGUFReader(file)
    kind = reader.fields.get("general.file_type")
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
    read = sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)
    return "unknown" if kind is None else FileType(kind.contents()).name.removeprefix("MOSTLY_"), read
