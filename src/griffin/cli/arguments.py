"""Arguments that several commands share, and the objects made from them.

The flags of `GriffinConfig` come from its fields. The flags of `Sampling` are listed here, as its module imports torch;
a test checks that the list is complete.
"""

from __future__ import annotations

import argparse
import gc
import logging
import re
from collections.abc import Callable, Container
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from griffin.config import BACKENDS, BATCHES, BEST, REFINEMENTS, GriffinConfig
from griffin.methods import METHODS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from griffin.engine.step import Sampling

BUILTIN_MODELS = ("smollm2-135m", "gemma3-270m", "qwen2.5-coder-1.5b")
REFINED = ", ".join(f"{name}+" for name in REFINEMENTS) + f" may stand before it, as in {BEST}"
_MOST_LAYERS = 10_000


def parse_layers(text: str) -> tuple[int, ...]:
    """Layer indices such as `0,1,2`, `0-5` or `0-5,8`."""
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last >= _MOST_LAYERS:
            raise argparse.ArgumentTypeError(f"found {text!r}; expected layer indices such as 0,1,2 or 0-5,8")
        layers.extend(range(first, last + 1))
    return tuple(layers)


def parse_densities(text: str) -> list[float]:
    """Densities such as `0.5` or `0.75,0.5`; `GriffinConfig` checks their range."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected numbers such as 0.5 or 0.75,0.5") from None


def parse_lengths(text: str) -> list[int]:
    """Numbers of tokens such as `128` or `64,256`; returns them unique and sorted."""
    if not all(re.fullmatch(r"\s*\d+\s*", part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected numbers of tokens such as 128 or 64,256")
    lengths = sorted({int(part) for part in text.split(",")})
    if lengths[0] < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected numbers of tokens from 1")
    return lengths


def parse_biases(text: str) -> dict[int, float]:
    """Token ids with numbers to add to their logits, such as `198=-100,11=2.5`; `Sampling` checks their range."""
    try:
        return {int(token): float(bias) for token, bias in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected ID=NUMBER, such as 198=-100,11=2.5") from None


# By field: the parser of the value, the metavar, the help.
_CONFIG: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "density": (
        float,
        "D",
        "share of the FF neurons kept in the generation phase (with dynamic+, and with auto where that is dynamic, of "
        "the FF bytes read), 0 < D <= 1; 1 is the full model",
    ),
    "selection": (
        str,
        "NAME",
        f"how experts are selected: {', '.join(METHODS)}, or auto: the best known; {REFINED}",
    ),
    "layers": (parse_layers, "LIST", "layers to prune, such as 0,1,2 or 0-5,8; the others stay whole (default: all)"),
    "batch": (str, "NAME", f"experts of a batch: {', '.join(BATCHES)}"),
    "backend": (str, "NAME", f"what computes the experts: {', '.join(BACKENDS)}"),
    "seed": (int, "N", "seed of random selections (default: 0) and of sampling (default: a new one each time)"),
    "profile": (str, "FILE", "the model's profile (default: one that is known)"),
    "loss": (
        float,
        "KL",
        "instead of a density: the smallest whose KL to the full model, by the profile, is at most this",
    ),
}
_SWITCHES = {
    "compact": "copy the experts of quantised weights one behind the other: a step reads them faster, for D of the FF "
    "weights' memory more; not with dynamic+",
}
_SAMPLING: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "max_tokens": (int, "N", "most tokens to generate for an answer (default: 256)"),
    "temperature": (float, "T", "0 is greedy; above, logits are divided by it before drawing (default: 0.0)"),
    "top_p": (float, "P", "draw from the smallest set of tokens whose probability reaches P (default: 1.0, off)"),
    "top_k": (int, "K", "draw from the K most likely tokens (default: 0, off)"),
    "min_p": (float, "P", "drop tokens less likely than this share of the likeliest (default: 0.0, off)"),
    "repetition_penalty": (float, "R", "above 1, tokens that have occurred become less likely (default: 1.0, off)"),
    "frequency_penalty": (
        float,
        "F",
        "subtracted from a token's logit for each time that the answer has it (default: 0.0, off)",
    ),
    "presence_penalty": (
        float,
        "F",
        "subtracted from the logits of all tokens that the answer has (default: 0.0, off)",
    ),
    "logit_bias": (parse_biases, "LIST", "numbers to add to the logits of tokens, such as 198=-100,11=2.5"),
    "stop": (str, "TEXT", "a text that ends an answer, not part of it; may be given several times"),
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `load_model`."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m",
        "--model",
        default=BUILTIN_MODELS[0],
        metavar="MODEL",
        help=f"a built-in model ({', '.join(BUILTIN_MODELS)}), a .gguf file, a model folder or a Hugging Face Hub id "
        f"such as org/name (default: {BUILTIN_MODELS[0]})",
    )
    group.add_argument(
        "--dtype",
        metavar="TYPE",
        help="bf16, f16 or f32; quantised weights are dequantised to it (default: as stored, on the CPU quantised "
        "weights too)",
    )
    group.add_argument(
        "--weights",
        metavar="FORMAT",
        help="how the weights of a float model are stored on the CPU: bf16, f32, int8 or int4 (default: as --dtype "
        "says); a quantised model takes int8 and int4 with --dtype only",
    )
    group.add_argument("--device", metavar="DEVICE", help="such as cpu, cuda or mps (default: cuda if there is one)")
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub model")


def add_json_argument(group: argparse._ArgumentGroup, holding: str, instead_of: str) -> None:
    """Declare `--json [FILE]`; without a FILE its value is `-`."""
    group.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help=f"one JSON object with {holding}: to a file, or to stdout in place of the {instead_of}",
    )


def add_config_arguments(parser: argparse.ArgumentParser, without: Container[str] = (), **defaults: str | bool) -> None:
    """Declare one flag for each field of `GriffinConfig` except `without`; `defaults` override the fields' defaults."""
    group = parser.add_argument_group("GRIFFIN")
    for field in fields(GriffinConfig):
        if field.name in without:
            continue
        default = defaults.get(field.name, field.default)
        if isinstance(default, bool):
            group.add_argument(
                f"--{field.name}", action=argparse.BooleanOptionalAction, default=default, help=_SWITCHES[field.name]
            )
            continue
        read, metavar, text = _CONFIG[field.name]
        if field.default is None or field.name == "seed":
            group.add_argument(f"--{field.name}", type=read, metavar=metavar, help=text)
        else:
            text = f"{text} (default: {default})"
            group.add_argument(f"--{field.name}", type=read, metavar=metavar, help=text, default=default)


def add_lossless_argument(parser: argparse.ArgumentParser) -> None:
    """Declare `--lossless`, after `add_config_arguments`: without `--density` it means density 1.0."""
    parser.add_argument(
        "--lossless",
        action="store_true",
        help="the full model, faster where the answer repeats the prompt or itself: tokens are drafted from the text "
        "so far and verified several at a time; the answer is exactly that of --density 1",
    )
    parser.set_defaults(density=None)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare one flag for each field of `Sampling` except the seed, which `add_config_arguments` declares."""
    group = parser.add_argument_group("sampling")
    for name, (read, metavar, text) in _SAMPLING.items():
        action = "append" if name == "stop" else "store"
        group.add_argument(f"--{name.replace('_', '-')}", type=read, metavar=metavar, help=text, action=action)


def config_from(args: argparse.Namespace) -> GriffinConfig:
    """The `GriffinConfig` for the arguments.

    Raises:
        ValueError: a value is out of range, or `--lossless` was given with `--loss` or a density below 1.
    """
    given = {field.name: getattr(args, field.name) for field in fields(GriffinConfig)}
    if getattr(args, "lossless", False):
        for name in ("density", "loss"):
            if given[name] not in (None, 1.0):
                raise ValueError(
                    f"--lossless gives the answer of the full model, and --{name} is {given[name]:g}; leave one out"
                )
        given["density"] = 1.0
    return GriffinConfig(**{name: value for name, value in given.items() if value is not None})


def sampling_from(args: argparse.Namespace) -> Sampling:
    """The `Sampling` for the arguments. Imports torch.

    Raises:
        ValueError: a value is out of range.
    """
    from griffin.engine.step import Sampling

    given = {name: getattr(args, name) for name in (*_SAMPLING, "seed")}
    return Sampling(**{name: value for name, value in given.items() if value is not None})


def begin_loading(args: argparse.Namespace) -> None:
    """Before torch is imported, by commands that answer prompts: start to read the model, if it is a file.

    Until `load_model` is done nothing is collected as garbage: modules and a vocabulary are millions of objects that
    stay, and looking through them again and again takes a seventh of the imports' time.
    """
    gc.disable()
    if args.model.lower().endswith(".gguf") and args.dtype is None and args.weights is None:
        from griffin.models import early

        early.begin(Path(args.model).expanduser())


def load_model(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model for the arguments.

    Raises:
        ValueError: there is no such model, dtype or device.
        GriffinError: the network is down, a file is damaged, or the disk is full.
    """
    from griffin.models.load import load

    # A command-line error is one line; the warnings of transformers address programmers.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    loaded = load(args.model, dtype=args.dtype, device=args.device, weights=args.weights, revision=args.revision)
    if not gc.isenabled():  # by `begin_loading`
        gc.freeze()
        gc.enable()
    return loaded
