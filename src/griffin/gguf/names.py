"""Names of tensors: where a parameter of a Transformers model is in a GGUF file, and what llama.cpp did to it there.

Two things are undone here. llama.cpp rotates neighbouring values of a head where Transformers rotates its halves, so
for the families that it took over from Llama the rows of the query and key projections were reordered. And it adds
the 1 to the weights of Gemma's norms that Gemma's code adds when it runs. Source: llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Naming:
    """What an architecture of llama.cpp does with the decoder of a family.

    Args:
        model_type: of the family in Transformers.
        interleaved: whether the rows of the query and key projections were reordered.
        norm_offset: what was added to the norms' weights.
        sandwich: whether attention and FF block have a norm behind them too.
    """

    model_type: str
    interleaved: bool = False
    norm_offset: float = 0.0
    sandwich: bool = False


NAMINGS = {
    "llama": Naming("llama", interleaved=True),
    "qwen2": Naming("qwen2"),
    "qwen3": Naming("qwen3"),
    "gemma": Naming("gemma", norm_offset=1.0),
    "gemma2": Naming("gemma2", norm_offset=1.0, sandwich=True),
    "gemma3": Naming("gemma3_text", norm_offset=1.0, sandwich=True),
    "smollm3": Naming("smollm3", interleaved=True),
    "granite": Naming("granite", interleaved=True),
}
"""By general.architecture: the families whose files are read. Mistral's files are of the architecture llama."""

IGNORED = ("rope_freqs.weight", ".attn_rot_embd.weight", ".rope_freqs.weight")
"""How the names of tensors end that are no parameters."""

_LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_SANDWICH = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclass(frozen=True)
class Source:
    """Where a module's weight or bias is.

    Args:
        module: its path in the Transformers model, such as "model.layers.0.mlp.up_proj".
        tensor: name in the file without ".weight" or ".bias", such as "blk.0.ffn_up".
        heads: heads whose rows were reordered, see `row_order`; `None`: rows are in order.
        offset: what was added to it.
        linear: whether the module is a projection: a layer's, or the output embeddings.
    """

    module: str
    tensor: str
    heads: int | None = None
    offset: float = 0.0
    linear: bool = False


def sources(architecture: str, layers: int, heads: int, kv_heads: int) -> Iterator[Source]:
    """Where the modules of a decoder are, those that a family has none of among them.

    Args:
        architecture: a key of `NAMINGS`.
        layers: how many.
        heads: query heads.
        kv_heads: key and value heads.
    """
    naming = NAMINGS[architecture]
    norms = _NORMS | (_SANDWICH if naming.sandwich else {})
    reordered = {"attn_q": heads, "attn_k": kv_heads} if naming.interleaved else {}
    yield Source("model.embed_tokens", "token_embd")
    yield Source("model.norm", "output_norm", offset=naming.norm_offset)
    yield Source("lm_head", "output", linear=True)
    for layer in range(layers):
        for module, tensor in _LINEARS.items():
            path, name = f"model.layers.{layer}.{module}", f"blk.{layer}.{tensor}"
            yield Source(path, name, heads=reordered.get(tensor), linear=True)
        for module, tensor in norms.items():
            yield Source(f"model.layers.{layer}.{module}", f"blk.{layer}.{tensor}", offset=naming.norm_offset)


def row_order(rows: int, heads: int) -> npt.NDArray[np.int64]:
    """The row of a reordered tensor that each row of the parameter is: `parameter = tensor[row_order(rows, heads)]`.

    In a file, a head's rows are 0, h/2, 1, h/2 + 1, ... of its h rows.

    Raises:
        ValueError: the rows do not make pairs in every head.
    """
    if rows % (2 * heads):
        raise ValueError(f"{rows} rows are no whole pairs in {heads} heads")
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
