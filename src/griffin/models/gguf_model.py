"""Models from GGUF files: read by `griffin.gguf` where it knows the family, and by transformers otherwise."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from griffin.errors import GriffinError
from griffin.gguf import config as gguf_config
from griffin.gguf.dequantise import dequantise
from griffin.gguf.names import Source, row_order
from griffin.gguf.reader import AGAIN, GgufFile, GgufTensor
from griffin.gguf.tokenizer import tokenizer_of
from griffin.layouts import find_ff_blocks
from griffin.method.dynamic import output_norms
from griffin.models import early
from griffin.models.cache_entry import one_line
from griffin.native import library
from griffin.native.grouped import Packed
from griffin.native.packing import GGUF_TYPES, PackedTensor, Packing
from griffin.weights.quantised import QuantisedEmbedding, QuantisedLinear, forget_ties

logger = logging.getLogger("griffin")

_STEP = 1 << 18  # values that are read and dequantised at once
_PIECE = 1 << 15  # values that torch converts with one thread: on a busy machine its threads wait for each other


def read_gguf(path: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a GGUF file, or of the split one that the file is a part of.

    Args:
        path: the file, or any part. What `griffin.models.early` has begun of it is taken up.
        dtype: dequantise all weights to it. None: weights stay exactly what the file says, quantised ones packed as
            the native library reads them (`QuantisedLinear`, `QuantisedEmbedding`), all else float32. Where there are
            no quantised ones, or no native library, or a family that the reader does not know, bfloat16.

    Raises:
        ValueError: there is no such file, a tensor's type is not read, or no causal language model is in it.
        GriffinError: it is no GGUF file, is damaged, incomplete, or changes while it is read.
    """
    if dtype is not None:
        early.dropped(path)
    file, packing = early.taken(path) if dtype is None else (GgufFile(path), None)
    with file:
        if (reason := gguf_config.why_not(file)) is not None:
            return _by_transformers(file, dtype or torch.bfloat16, reason)
        if packing is not None:
            model, tokenizer = _as_stored(file, packing)
        else:
            if dtype is None:
                _tell_dequantised(file)
            model = empty_model(file, dtype or torch.bfloat16)
            tokenizer = tokenizer_of(file, model.config)
        fill(model, file)
        file.check_unchanged()
        return model, tokenizer


def _as_stored(file: GgufFile, packing: Packing) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, weights as the file has them; what is not packed is not filled yet.

    A tokenizer takes Python's lock and half a second. Packing, and then the norms that dynamic neuron selection would
    ask for at the first prompt, take a thread of their own and hardly the lock.
    """

    def prepare() -> None:
        pack(model, file, packing.wait())
        for block in find_ff_blocks(model):
            output_norms(block)

    with ThreadPoolExecutor(1) as beside, packing:  # a damaged vocabulary stops the packing first
        model = empty_model(file, torch.float32)
        prepared = beside.submit(prepare)
        tokenizer = tokenizer_of(file, model.config)
        prepared.result()
    return model, tokenizer


def _tell_dequantised(file: GgufFile) -> None:
    quantised = any(tensor.type.name in GGUF_TYPES for tensor in file.tensors.values())
    if quantised and (reason := library.why_not()) is not None:
        logger.warning("%s: the weights are dequantised to bfloat16, several times the file: %s", file.path, reason)


@torch.no_grad()
def pack(model: PreTrainedModel, file: GgufFile, packed: Mapping[str, PackedTensor]) -> None:
    """Replace the modules whose weights are packed by modules over exactly these.

    The codes and scales are the file's; an FF block's output projection is stored neuron-major.

    Args:
        model: of `empty_model`.
        file: its file.
        packed: matrices by the names of their tensors; tied embeddings share one.
    """
    found = {source.module: f"{source.tensor}.weight" for source in gguf_config.sources_of(file)}
    matrices = {name: Packed.of(tensor) for name, tensor in packed.items()}
    tied = model.config.tie_word_embeddings
    for path, module in list(model.named_modules()):
        tensor = found.get("model.embed_tokens" if path == "lm_head" and tied else path, "")
        if (matrix := matrices.get(tensor)) is None:
            continue
        new: torch.nn.Module
        if isinstance(module, torch.nn.Embedding):
            new = QuantisedEmbedding(matrix, scale=getattr(module, "embed_scale", None))
        else:
            new = QuantisedLinear([matrix], module.bias)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
    forget_ties(model)


def empty_model(file: GgufFile, dtype: torch.dtype) -> PreTrainedModel:
    """The file's model, its weights not there yet: memory that is never touched costs nothing.

    Raises:
        GriffinError: the metadata is damaged, or tensors are missing or of another shape than it says.
    """
    config = gguf_config.config_of(file)
    with torch.device("meta"):
        wanted = dict(unfilled(config, dtype).named_parameters())
    there = {name: source for name, source in _sources(file) if name in wanted}
    if missing := sorted(
        name for name in wanted if name not in there or _tensor(there[name], name) not in file.tensors
    ):
        raise GriffinError(f"{file.path}: {len(missing)} weights are missing, such as {missing[0]}; {AGAIN}")
    for name, source in there.items():
        tensor = file.tensors[_tensor(source, name)]
        if tensor.shape != tuple(wanted[name].shape):
            raise GriffinError(
                f"{file.path} is damaged: tensor {tensor.name} has the shape {tensor.shape}, expected "
                f"{tuple(wanted[name].shape)}; {AGAIN}"
            )
    model = unfilled(config, dtype)
    stop = gguf_config.stop_tokens(file)
    if model.generation_config is not None and len(stop) > 1:
        model.generation_config.eos_token_id = stop
    return model.eval()  # type: ignore[no-untyped-call, no-any-return, unused-ignore]


def unfilled(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The config's model with weights of `dtype` that are not initialised, tied where the config says so."""
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.tie_weights()  # which is left out with the initialisation
    return model


@torch.no_grad()
def fill(model: PreTrainedModel, file: GgufFile) -> None:
    """Dequantise the file's tensors into the model's parameters.

    Raises:
        GriffinError: the file has become shorter.
    """
    named = dict(_sources(file))
    for name, parameter in model.named_parameters():
        _fill(parameter, file.tensors[_tensor(named[name], name)], named[name])


def _fill(parameter: Tensor, tensor: GgufTensor, source: Source) -> None:
    if parameter.dim() == 1:
        order = slice(None) if source.heads is None else row_order(len(parameter), source.heads)
        parameter.copy_(torch.from_numpy((dequantise(tensor.read(), tensor.type) - source.offset)[order]))
        return
    rows, columns = parameter.shape
    whole = None if source.heads is None else tensor.read()[row_order(rows, source.heads)]
    step, piece = (max(1, values // columns) for values in (_STEP, _PIECE))
    data, values = np.empty((step, tensor.row_bytes), np.uint8), np.empty((step, columns), np.float32)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        read = tensor.read(start, stop, data[: stop - start]) if whole is None else whole[start:stop]
        dequantised = torch.from_numpy(dequantise(read, tensor.type, values[: stop - start])).view(-1, columns)
        for target, part in zip(*(torch.split(of, piece) for of in (parameter[start:stop], dequantised)), strict=True):
            target.copy_(part)


def _sources(file: GgufFile) -> Iterator[tuple[str, Source]]:
    """By parameter."""
    for source in gguf_config.sources_of(file):
        for kind in ("weight", "bias"):
            yield f"{source.module}.{kind}", source


def _tensor(source: Source, parameter: str) -> str:
    return f"{source.tensor}.{parameter.rpartition('.')[2]}"


def _by_transformers(
    file: GgufFile, dtype: torch.dtype, reason: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if len(file.paths) > 1:
        whole = file.paths[0].with_name("NAME.gguf")
        raise ValueError(
            f"{file.path} is one of {len(file.paths)} parts of a model with {reason}, which transformers reads in one "
            f"file only; join them: llama-gguf-split --merge {file.paths[0]} {whole}"
        )
    path, architecture = file.path, file.architecture
    logger.warning(
        "%s: griffin's reader does not know %s; transformers dequantises it, which takes longer", path, reason
    )
    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        with redirect_stderr(io.StringIO()):  # transformers draws this one bar whatever its own switch says
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(path.parent),
                dtype=dtype,
                output_loading_info=True,
                quantization_config=GgufConfig(dequantize=True),
                **options,
            )
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **options)
    except Exception as error:
        text = one_line(error)
        if isinstance(error, ValueError) and ("not supported" in text or "nrecognized configuration" in text):
            raise ValueError(
                f"{path} holds architecture {architecture!r}, which transformers cannot read from GGUF as a causal "
                "language model; pass the model's original folder or Hub id"
            ) from error
        raise GriffinError(f"{path} (architecture {architecture!r}) cannot be loaded: {text}; {AGAIN}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise GriffinError(f"{path}: {len(missing)} weights are missing, such as {missing[0]}; {AGAIN}")
    if hasattr(model.config, "quantization_config"):  # the weights are plain now
        del model.config.quantization_config
    return model, tokenizer
