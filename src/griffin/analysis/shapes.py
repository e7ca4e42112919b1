"""Models of real shapes with random weights. They run as fast as the trained models and need no download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights


@dataclass(frozen=True)
class Shape:
    """The shape of a model: a family of transformers and the settings of its config.

    Args:
        model_type: the family's name in transformers.
        settings: arguments of the family's config that define the shape; token ids are not among them.
    """

    model_type: str
    settings: Mapping[str, Any]

    def config(self, layers: int | None = None) -> PreTrainedConfig:
        """The config; `layers` overrides the number of layers."""
        settings = dict(self.settings) | ({} if layers is None else {"num_hidden_layers": layers})
        return AutoConfig.for_model(self.model_type, **settings, **_NO_TOKENS)


_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def _llama(d: int, d_ff: int, layers: int, heads: int, kv_heads: int, context: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": d,
        "intermediate_size": d_ff,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "vocab_size": vocabulary,
    }


# The settings are those of the published config.json files.
SHAPES: dict[str, Shape] = {
    "llama2-7b": Shape("llama", _llama(4096, 11008, 32, 32, 32, 4096, 32000)),
    "llama2-13b": Shape("llama", _llama(5120, 13824, 40, 40, 40, 4096, 32000)),
    "mistral-7b": Shape("mistral", _llama(4096, 14336, 32, 32, 8, 32768, 32000) | {"sliding_window": 4096}),
    "qwen2.5-7b": Shape("qwen2", _llama(3584, 18944, 28, 28, 4, 131072, 152064)),
    "gemma-7b": Shape(
        "gemma",
        _llama(3072, 24576, 28, 16, 16, 8192, 256000)
        | {"head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    ),
    "opt-6.7b": Shape(
        "opt",
        {
            "hidden_size": 4096,
            "word_embed_proj_dim": 4096,
            "ffn_dim": 16384,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
            "vocab_size": 50272,
            "activation_function": "relu",
            "tie_word_embeddings": True,
        },
    ),
    "tinyllama-1.1b": Shape("llama", _llama(2048, 5632, 22, 32, 4, 2048, 32000)),
}


def shape_of(name: str) -> Shape:
    """The shape with this name.

    Raises:
        ValueError: there is no such shape.
    """
    if name not in SHAPES:
        raise ValueError(f"shape is {name!r}; expected one of {', '.join(SHAPES)}")
    return SHAPES[name]


def on_meta(shape: Shape, dtype: torch.dtype, layers: int | None = None) -> PreTrainedModel:
    """The model on the device meta, with sizes but without weights."""
    with torch.device("meta"):
        return _from_config(shape.config(layers), dtype)


def weight_bytes(shape: Shape, dtype: torch.dtype, layers: int | None = None) -> int:
    """Bytes of the model's weights, computed without building it; a tied head counts once."""
    model = on_meta(shape, dtype, layers)
    return sum(parameter.nbytes for parameter in model.parameters())


def packed_bytes(shape: Shape, bytes_per_weight: float) -> int:
    """Peak bytes of building the model layer by layer with quantised Linears."""
    dtype = torch.bfloat16
    model = on_meta(shape, dtype)
    packed = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    tied = bool(model.config.tie_word_embeddings)  # the packed head is stored beside the embeddings
    plain = sum(parameter.nbytes for parameter in model.parameters()) - packed * dtype.itemsize
    if tied:
        head: Any = model.get_output_embeddings  # untyped in Transformers
        plain += head().weight.nbytes
    return int(packed * bytes_per_weight) + plain + weight_bytes(shape, dtype, 1)


def cache_bytes(shape: Shape, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of the key/value cache for `tokens` tokens, all sequences together."""
    config: Any = shape.config()
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * tokens * dtype.itemsize)


@torch.no_grad()
def build(
    shape: Shape, dtype: torch.dtype, layers: int | None = None, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A model of this shape with random weights, in eval mode; `layers` overrides the number of layers.

    Random weights give the same speed as trained ones, as the bytes read do not depend on the values.
    """
    with no_init_weights(), torch.device(device):  # transformers' own initialization is slow
        model = _from_config(shape.config(layers), dtype)
    generator = torch.Generator(device).manual_seed(0)
    # Drawing billions of numbers takes a minute, so a few million are drawn and repeated. Their odd number makes every
    # row of a weight start at a different one.
    # At this spread an FF block's output is as large as the residual stream, at any width, so a wrong output shows.
    spread = model.config.hidden_size**-0.5
    drawn = torch.empty(_DRAWN, dtype=dtype, device=device).normal_(0.0, spread, generator=generator)
    at = 0
    for name, parameter in model.named_parameters():
        at = _fill(parameter.view(-1), drawn, at)
        if parameter.dim() == 1 and not name.endswith("bias"):  # a norm
            parameter.add_(1.0)
    model.eval()  # type: ignore[no-untyped-call, unused-ignore]
    return model


def _from_config(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call, unused-ignore]
    return model


_DRAWN = 2**22 + 7919


def _fill(flat: Tensor, drawn: Tensor, at: int) -> int:
    """Fill a tensor with the drawn numbers, starting at index `at`; returns the next index."""
    done, size = 0, flat.shape[0]
    while done < size:
        count = min(size - done, drawn.shape[0] - at)
        flat[done : done + count].copy_(drawn[at : at + count])
        done, at = done + count, (at + count) % drawn.shape[0]
    return at
