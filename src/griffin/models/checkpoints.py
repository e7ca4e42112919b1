"""Models from quantised Transformers checkpoints (GPTQ, AWQ, compressed-tensors, bitsandbytes, FP8), weights exact.

Neither the formats' own packages nor a GPU are needed; how each format stores a Linear is in `checkpoint_formats`.
"""

from __future__ import annotations

import copy
import json
import logging
from collections import defaultdict
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from griffin.errors import GriffinError
from griffin.layouts import find_ff_blocks
from griffin.models.checkpoint_formats import CheckpointFormat, Grouped, Settings, Stored, format_of
from griffin.models.gguf_model import unfilled
from griffin.native import library
from griffin.text_files import read_text
from griffin.weights.projection import shape_of
from griffin.weights.quantised import QuantisedLinear

logger = logging.getLogger("griffin")


def quantisation_of(config: PreTrainedConfig) -> Settings | None:
    """How a checkpoint says that it is quantised; `None`: it is not."""
    settings = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    return settings if settings is None or isinstance(settings, dict) else settings.to_dict()


@torch.no_grad()
def read_checkpoint(source: str, config: PreTrainedConfig, dtype: torch.dtype | None, **where: Any) -> PreTrainedModel:
    """The model of a quantised checkpoint, in eval mode.

    Args:
        source: a folder or an id on the Hub.
        config: the checkpoint's, with a `quantization_config`.
        dtype: dequantise all weights to it. None: quantised ones stay exactly what the checkpoint says
            (`QuantisedLinear`), all else is float32; without the native library, bfloat16.
        where: what `cached_file` of transformers takes (revision, token, local_files_only).

    Raises:
        RefusedError: a format, or a variant of one, that is not read.
        GriffinError: weights are missing or of other shapes than they should be.
        OSError: a file is missing.
    """
    settings = quantisation_of(config) or {}
    format = format_of(settings)
    if format.check(settings):
        logger.info("%s quantises activations too: here they stay wide, with the weights that it says", source)
    if dtype is None and (reason := library.why_not()) is not None:
        logger.warning("%s: the weights are dequantised to bfloat16, several times the file: %s", source, reason)
        dtype = torch.bfloat16
    plain = copy.deepcopy(config)
    for name in ("quantization_config", "compression_config"):
        if hasattr(plain, name):
            delattr(plain, name)
    model = unfilled(plain, dtype or torch.float32)
    with ExitStack() as files:
        _fill(model, _Tensors(_paths(source, **where), files, model), settings, format, source, packs=dtype is None)
    if cached_file(source, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **where):
        model.generation_config = GenerationConfig.from_pretrained(source, **where)
    return model.eval()  # type: ignore[no-untyped-call, no-any-return, unused-ignore]


def _paths(source: str, **where: Any) -> list[str]:
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **where)
    names = {SAFE_WEIGHTS_NAME}
    if index is not None:
        names = set(json.loads(read_text(Path(index)))["weight_map"].values())
    return [str(cached_file(source, name, **where)) for name in sorted(names)]


class _Tensors:
    """A checkpoint's tensors by their names in the model, read when they are asked for."""

    def __init__(self, paths: list[str], files: ExitStack, model: PreTrainedModel) -> None:
        self._file: dict[str, tuple[Any, str]] = {}
        prefix = f"{model.base_model_prefix}."  # left out where the decoder alone was saved
        children = {name for name, _ in model.named_children()}
        for path in paths:
            file = files.enter_context(safe_open(path, framework="pt"))
            for key in file.keys():  # noqa: SIM118 - no mapping
                self._file[key if key.partition(".")[0] in children else prefix + key] = file, key

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def __getitem__(self, name: str) -> Tensor:
        file, key = self._file[name]
        tensor: Tensor = file.get_tensor(key)
        return tensor

    def of_modules(self, paths: set[str]) -> dict[str, list[str]]:
        """Names of the tensors that lie under each of these modules."""
        found: dict[str, list[str]] = defaultdict(list)
        for name in self._file:
            owner = next((name[:i] for i, c in enumerate(name) if c == "." and name[:i] in paths), None)
            if owner is not None:
                found[owner].append(name)
        return found


def _fill(
    model: PreTrainedModel, tensors: _Tensors, settings: Settings, format: CheckpointFormat, source: str, *, packs: bool
) -> None:
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    names = tensors.of_modules(set(linears))
    outputs, fused = set(), set()
    with suppress(ValueError):  # a family whose FF blocks are not known
        for block in find_ff_blocks(model):
            outputs.add(id(block.output))
            fused |= {id(projection) for projection in block.inputs if block.layout.fused}
    done = set()  # parameters whose weights are quantised
    for path, module in linears.items():
        stored = {name.removeprefix(f"{path}."): tensors[name] for name in names[path]}
        d_out, d_in = shape_of(module)
        weight = format.read(settings, Stored(path, type(module).__name__, d_out, d_in, stored))
        if weight is None:
            continue
        done.add(f"{path}.weight")
        if not packs:
            values = weight.dequantised()
            module.weight.copy_(values.t() if isinstance(module, Conv1D) else values)
            continue
        if module.bias is not None:
            _copy(module.bias, f"{path}.bias", tensors, source)
        parent, _, name = path.rpartition(".")
        new = _packed(weight, module, neuron_major=id(module) in outputs, parts=2 if id(module) in fused else 1)
        setattr(model.get_submodule(parent), name, new)
    for name, parameter in model.named_parameters():
        if name not in done:
            _copy(parameter, name, tensors, source)
    for name, buffer in model.named_buffers():
        if name in tensors and buffer.shape == tensors[name].shape:
            buffer.copy_(tensors[name])


def _packed(weight: Grouped, module: nn.Module, *, neuron_major: bool, parts: int) -> QuantisedLinear:
    step = weight.codes.shape[0] // parts
    packed = [weight.rows(i * step, (i + 1) * step).packed(neuron_major=neuron_major) for i in range(parts)]
    bias = module.bias
    return QuantisedLinear(packed, bias if isinstance(bias, Tensor) else None)


def _copy(parameter: Tensor, name: str, tensors: _Tensors, source: str) -> None:
    if name not in tensors:
        raise GriffinError(f"{source} lacks weights of its model, such as {name}; fetch or save it again")
    values = tensors[name]
    if values.shape != parameter.shape or not values.is_floating_point():
        raise GriffinError(
            f"{source} holds {name} as {tuple(values.shape)} {values.dtype}, expected {tuple(parameter.shape)} floats; "
            "fetch or save it again"
        )
    parameter.copy_(values)
