"""The tokenizer of a GGUF file. Transformers makes it from the metadata; the file itself is not read again."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import TOKENIZER_MAPPING, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

from griffin.errors import GriffinError
from griffin.gguf.reader import AGAIN, GgufFile

_PREFIX = "tokenizer.ggml."
_LISTS = ("tokens", "scores", "token_type", "merges")
_KEYS = {
    "tokenizer_type": "model",
    "pre_tokenizer_type": "pre",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unk_token_id": "unknown_token_id",
    "pad_token_id": "padding_token_id",
    "add_prefix_space": "add_space_prefix",
}
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def tokenizer_of(file: GgufFile, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a file: its vocabulary, special tokens and chat template.

    Args:
        file: the file.
        config: the model's, which says the tokenizer's class and the size of the embeddings.

    Raises:
        GriffinError: there is no vocabulary, it does not fit the embeddings, is damaged or of an unknown kind.
    """
    ggml = {key.removeprefix(_PREFIX): value for key, value in file.metadata.items() if key.startswith(_PREFIX)}
    tokens = ggml.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        raise GriffinError(f"{file.path} has no vocabulary; fetch a file with one, or pass the model's original folder")
    if len(tokens) != config.vocab_size:
        raise GriffinError(
            f"{file.path} has a vocabulary of {len(tokens):,} tokens for {config.vocab_size:,} embeddings; {AGAIN}"
        )
    for name in ("scores", "token_type"):
        if name in ggml and not (isinstance(ggml[name], np.ndarray) and len(ggml[name]) == len(tokens)):
            raise GriffinError(f"{file.path} is damaged: {name} does not have one value a token; {AGAIN}")
    described = {name: ggml[key] for name, key in _KEYS.items() if key in ggml}
    for name in _LISTS:
        if name in ggml:
            described[name] = ggml[name].tolist() if isinstance(ggml[name], np.ndarray) else ggml[name]
    given: dict[str, Any] = {}
    for name in _SPECIAL:
        number = described.get(f"{name}_id")
        if number is not None and not (isinstance(number, int) and 0 <= number < len(tokens)):
            raise GriffinError(f"{file.path} is damaged: its {name} is number {str(number)[:80]}, it has "
                               f"{len(tokens):,} tokens; {AGAIN}")  # fmt: skip
        given[name] = None if number is None else tokens[number]
    # llama.cpp starts with the first token where a sentencepiece vocabulary says nothing
    given |= {"add_bos_token": True} if described.get("tokenizer_type") == "llama" else {}
    given |= {name: ggml[name] for name in ("add_bos_token", "add_eos_token") if name in ggml}
    if isinstance(template := file.metadata.get("tokenizer.chat_template"), str):
        given["chat_template"] = template
    try:
        backend, more = convert_gguf_tokenizer(file.architecture, described)
        kind = TOKENIZER_MAPPING.get(type(config), PreTrainedTokenizerFast)
        if not (isinstance(kind, type) and issubclass(kind, PreTrainedTokenizerFast)):
            kind = PreTrainedTokenizerFast
        tokenizer: PreTrainedTokenizerBase = kind(  # type: ignore[no-untyped-call, unused-ignore]
            tokenizer_object=_Itself(backend), **given, **more
        )
    except Exception as error:  # transformers and tokenizers raise whatever a garbled vocabulary makes them
        text = " ".join(str(error).split())[:300]
        raise GriffinError(f"{file.path}: its tokenizer cannot be made: {text}; {AGAIN}") from error
    return tokenizer


class _Itself:
    """Transformers makes a deep copy of the tokenizer that it is given, by way of JSON: the longest part of making one.

    Args:
        backend: which nobody else holds.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __deepcopy__(self, memo: object) -> Any:
        return self._backend
