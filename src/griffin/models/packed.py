"""Models in 8 or 4 bits in the cache: quantised once from a built-in model or a GGUF file, then read as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from griffin.cache import cache_folder
from griffin.errors import GriffinError
from griffin.models.cache_entry import is_complete, made_once, one_line, share
from griffin.models.convert import convert, prepare
from griffin.models.progress import progress
from griffin.weights.quantised import QuantisedLinear

PACKING = 2
"""Raised whenever the packed formats or their rounding change, so that cached folders of older versions are redone."""

CONVERSION = 1
"""Raised whenever `griffin.gguf` would read a file as another model, so that cached folders are redone."""

_FILE = "packed.safetensors"
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def packed_folder(name: str, source_sha256: str, weights: str, load: Callable[[], Loaded]) -> Path:
    """The folder in the cache that holds a model in `weights`, made from what `load` returns if it is not there yet.

    Raises:
        ValueError: `load` or `convert` refuses the model.
        GriffinError: the cache folder cannot be written or is full, or `load` failed.
    """
    folder = f"{name}-{source_sha256[:12]}-{weights}"
    identity = {"source_sha256": source_sha256, "conversion": CONVERSION, "weights": weights, "packing": PACKING}
    if is_complete(cache_folder() / folder, identity):
        return cache_folder() / folder
    model, tokenizer = load()  # before the cache's errors: what they raise is about the model
    with progress(f"converting {name} to {weights} (once)"):
        convert(model, weights)

        def make(work: Path, made: Path) -> None:
            made.mkdir()
            model.config.save_pretrained(made)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(made)
            tokenizer.save_pretrained(made)
            save_file({key: tensor.contiguous() for key, tensor in stored(model).items()}, made / _FILE)
            share(made)

        space_bytes = sum(tensor.nbytes for tensor in stored(model).values()) + 50_000_000  # the tokenizer
        return made_once(folder, identity, space_bytes, make, name)


def read_packed(folder: Path, weights: str, dtype: torch.dtype | None) -> Loaded:
    """The model and tokenizer in such a folder.

    Args:
        dtype: of embeddings, norms and biases; None: as stored, bfloat16.

    Raises:
        GriffinError: the folder does not hold what the model needs.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with no_init_weights():  # memory that is never touched costs nothing, and prepare replaces most of it
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
        prepare(model, weights)
        wanted = stored(model)
        with safe_open(folder / _FILE, framework="pt") as file:
            if differing := sorted(wanted.keys() ^ set(file.keys())):
                raise ValueError(f"{len(differing)} tensors differ, such as {differing[0]}")
            for name, tensor in wanted.items():
                tensor.copy_(file.get_tensor(name))
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, RuntimeError) as error:
        raise GriffinError(f"{folder} cannot be loaded: {one_line(error)}; remove it, it is made again") from error
    if dtype is not None:
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
            if isinstance(module, QuantisedLinear):
                module.reset()
    return model, tokenizer


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a state_dict, each once where modules share one."""
    keys: dict[int, str] = {}
    state = model.state_dict()
    for key, tensor in state.items():
        keys.setdefault((tensor.data_ptr() if tensor.numel() else id(tensor)), key)
    return {key: state[key].detach() for key in keys.values()}


def sha256_of(paths: Iterable[Path]) -> str:
    """SHA-256 of a file, or of several one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
