"""The config of a Transformers model from a GGUF file's metadata, and whether the file can be read that way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from griffin.errors import GriffinError
from griffin.gguf.dequantise import dequantise
from griffin.gguf.names import IGNORED, NAMINGS, Source, sources
from griffin.gguf.reader import AGAIN, GgufFile

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# The largest Gemma 2 and Gemma 3 scale queries by the size of the hidden state, and nothing in a file says so.
_SCALED_BY_HIDDEN = {("gemma2", 46), ("gemma3", 62)}
_EMBEDDING = "token_embd.weight"


def why_not(file: GgufFile) -> str | None:
    """What of a file's model is not known here; `None` if `config_of` and `griffin.gguf.names` cover it.

    Raises:
        GriffinError: the file is damaged.
    """
    architecture = file.architecture
    if architecture not in NAMINGS:
        return f"architecture {architecture!r}"
    keys = _Keys(file)
    if keys.integer("expert_count", 0):
        return "experts"
    head_dim = _head_dim(keys)
    for key in ("rope.dimension_count", "attention.value_length"):
        if keys.integer(key, head_dim) != head_dim:
            return f"{architecture}.{key} other than a head's size"
    if (scaling := keys.text("rope.scaling.type", "none")) not in ("none", "linear", "yarn"):
        return f"rope scaling {scaling!r}"
    if not keys.get("rope.scaling.finetuned", True) and architecture == "granite":
        return "attention without positions"
    if (layers := keys.integer("block_count")) > len(file.tensors):
        raise keys.error("block_count", layers, f"no more than the {len(file.tensors)} tensors")
    known = {source.tensor for source in sources(architecture, layers, 1, 1)}
    for name in file.tensors:
        if name.rpartition(".")[0] not in known and not name.endswith(IGNORED):
            return f"tensor {name[:80]!r}"
    return None


def sources_of(file: GgufFile) -> Iterator[Source]:
    """Where the modules of the model in a file are that `why_not` lets pass; see `griffin.gguf.names.sources`.

    Raises:
        GriffinError: the metadata lacks something.
    """
    keys = _Keys(file)
    heads = keys.integer("attention.head_count")
    return sources(
        file.architecture, keys.integer("block_count"), heads, keys.integer("attention.head_count_kv", heads)
    )


def config_of(file: GgufFile) -> PreTrainedConfig:
    """The config of the model in a file that `why_not` lets pass. Imports transformers.

    Raises:
        GriffinError: the metadata lacks something, contradicts itself or the tensors.
    """
    from transformers import AutoConfig

    architecture = file.architecture
    keys = _Keys(file)
    heads, head_dim = keys.integer("attention.head_count"), _head_dim(keys)
    layers, hidden = keys.integer("block_count"), keys.integer("embedding_length")
    tensors = file.tensors
    if _EMBEDDING not in tensors:
        raise GriffinError(f"{file.path} has no {_EMBEDDING}; {AGAIN}")
    embedding = tensors[_EMBEDDING].shape
    if len(embedding) != 2 or embedding[1] != hidden:
        raise GriffinError(f"{file.path} is damaged: embeddings of shape {embedding} for a width of {hidden}; {AGAIN}")
    if f"blk.{layers - 1}.attn_q.weight" not in tensors:
        raise GriffinError(f"{file.path} is damaged: it claims {layers} layers and lacks tensors of the last; {AGAIN}")
    naming = NAMINGS[architecture]
    fields: dict[str, Any] = {
        "vocab_size": embedding[0],
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": _rope(file, keys),
        **_token_ids(file),
    }
    if naming.model_type in ("llama", "qwen3", "gemma", "gemma2", "gemma3_text") or head_dim * heads != hidden:
        fields["head_dim"] = head_dim
    if naming.model_type != "qwen2" and "blk.0.attn_q.bias" in tensors:
        fields["attention_bias"] = True
    if "blk.0.ffn_up.bias" in tensors:
        fields["mlp_bias"] = True
    model_type = naming.model_type
    if architecture == "llama" and (window := keys.integer("attention.sliding_window", 0)):
        model_type = "mistral"
        fields["sliding_window"] = window
    if architecture == "granite":
        fields |= {
            "attention_multiplier": keys.number("attention.scale", head_dim**-0.5),
            "embedding_multiplier": keys.number("embedding_scale", 1.0),
            "residual_multiplier": keys.number("residual_scale", 1.0),
            "logits_scaling": keys.number("logit_scale", 1.0),
        }
    if architecture in ("gemma2", "gemma3"):
        fields |= _gemma(keys, layers, hidden // heads if (architecture, layers) in _SCALED_BY_HIDDEN else head_dim)
    try:
        config: PreTrainedConfig = AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # the config's own checks
        text = " ".join(str(error).split())[:300]
        raise GriffinError(f"{file.path} is damaged: no {model_type} model can be made: {text}; {AGAIN}") from error
    return config


def stop_tokens(file: GgufFile) -> list[int]:
    """The tokens that end an answer: of the text, of a turn and of a message, those that the file names."""
    ids = (file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(number for number in ids if isinstance(number, int)))


def _gemma(keys: _Keys, layers: int, query_scalar: int) -> dict[str, Any]:
    """What Gemma 2 and 3 have and others do not: softcaps, and layers that see a window only."""
    second = keys.architecture == "gemma2"
    window = keys.integer("attention.sliding_window", 4096 if second else 0)
    pattern = keys.get("attention.sliding_window_pattern", 2 if second else 6)
    if isinstance(pattern, np.ndarray) and len(pattern) >= layers:
        slides = [bool(pattern[layer]) for layer in range(layers)]
    elif isinstance(pattern, int) and pattern > 0:
        slides = [bool((layer + 1) % pattern) for layer in range(layers)]
    else:
        raise keys.error("attention.sliding_window_pattern", pattern, "a number of layers or one value a layer")
    return {
        "query_pre_attn_scalar": query_scalar,
        "sliding_window": window or None,
        "layer_types": ["sliding_attention" if window and slide else "full_attention" for slide in slides],
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0 if second else 0.0) or None,
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0 if second else 0.0) or None,
    }


def _head_dim(keys: _Keys) -> int:
    default = keys.integer("embedding_length") // keys.integer("attention.head_count")
    if keys.architecture == "llama":  # whose older files say it there only
        default = keys.integer("rope.dimension_count", default)
    head_dim = keys.integer("attention.key_length", default)
    if head_dim < 2 or head_dim % 2:
        raise keys.error("attention.key_length", head_dim, "pairs to rotate")
    return head_dim


def _rope(file: GgufFile, keys: _Keys) -> dict[str, Any]:
    gemma3 = keys.architecture == "gemma3"
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", 1e6 if gemma3 else 1e4)}
    scaling = keys.text("rope.scaling.type", "none")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0))
    if scaling == "yarn":
        rope |= {"rope_type": "yarn", "factor": keys.number("rope.scaling.factor")}
        rope["original_max_position_embeddings"] = keys.integer("rope.scaling.original_context_length")
        for name, key in (("attention_factor", "attn_factor"), ("beta_fast", "yarn_beta_fast"),
                          ("beta_slow", "yarn_beta_slow")):  # fmt: skip
            if value := keys.number(f"rope.scaling.{key}", 0.0):
                rope[name] = value
    elif factor not in (0.0, 1.0):
        rope |= {"rope_type": "linear", "factor": factor}
    if "rope_freqs.weight" in file.tensors:
        rope |= _llama3(file, rope["rope_theta"], _head_dim(keys))
    if not gemma3:
        return rope
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 1e4)}
    return {"full_attention": rope, "sliding_attention": local}


def _llama3(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """The rope scaling of Llama 3, of which a file has the result only: what each frequency is divided by."""
    tensor = file.tensors["rope_freqs.weight"]
    found = dequantise(tensor.read(), tensor.type)
    if len(found) != head_dim // 2:
        raise GriffinError(f"{file.path} is damaged: rope_freqs.weight has {len(found)} values; {AGAIN}")
    factor = round(float(found.max()), 3)
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = _LLAMA3["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(found, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise GriffinError(f"{file.path}: rope_freqs.weight does not hold Llama 3's frequencies, which alone are known")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _token_ids(file: GgufFile) -> dict[str, int | None]:
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    return {name: file.metadata.get(f"tokenizer.ggml.{key}") for name, key in names.items()}


class _Keys:
    """An architecture's values in the metadata, checked."""

    def __init__(self, file: GgufFile) -> None:
        self.architecture = file.architecture
        self._path = file.path
        self._metadata: Mapping[str, Any] = file.metadata

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"{self.architecture}.{key}", default)

    def integer(self, key: str, default: int | None = None) -> int:
        """A count; of one for every layer, which may not differ."""
        value = self.get(key, default)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size and (value == value[0]).all():
            value = value[0].item()
        least = 0 if default == 0 else 1
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 31:
            raise self.error(key, value, "a count")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number that was stored as float32, as it was written before."""
        value = self.get(key, default)
        if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise self.error(key, value, "a number")
        short = float(str(np.float32(value)))
        return short if np.float32(short) == np.float32(value) == value else float(value)

    def text(self, key: str, default: str) -> str:
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.error(key, value, "a text")
        return value

    def error(self, key: str, value: object, expected: str) -> GriffinError:
        found = "missing" if value is None else " ".join(str(value).split())[:80]
        name = f"{self.architecture}.{key}"
        return GriffinError(f"{self._path} is damaged: {name} is {found}, expected {expected}; {AGAIN}")
