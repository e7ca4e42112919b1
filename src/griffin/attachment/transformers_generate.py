"""Let `model.generate` say its phases: its prefill stage is the prompt phase, the rest is the generation phase."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from griffin.attachment.patching import patch
from griffin.method.statistics import cached_tokens, keep_with_cache, of_cache

if TYPE_CHECKING:
    from griffin.attachment.handle import Griffin

_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)

# Methods of Transformers' GenerationMixin that generate calls on the instance.
_NEEDED = ("_prefill", "_validate_generation_mode")


def attach_generate(handle: Griffin, stack: ExitStack) -> None:
    """Patch a model's `generate` until `stack` closes. A model without `generate` is left to own loops.

    Wrappers (PEFT, `torch.compile`) hand `generate` on to the model inside, so the model inside is patched.

    Raises:
        ValueError: the installed Transformers has no prefill stage to hook into, `generate` is not that of
            Transformers, or an adapter puts virtual tokens before the prompt.
    """
    if not hasattr(handle.model, "generate"):
        return
    _refuse_virtual_tokens(handle.model)
    model = _generating(handle.model)
    generate, prefill, validate = model.generate, model._prefill, model._validate_generation_mode
    phases = ExitStack()  # the generation phase, once it has begun
    prompts = 0  # prefill stages that ran

    def validated(mode: GenerationMode, *args: Any, **kwargs: Any) -> Any:
        if mode not in _MODES:
            raise ValueError(
                f"generate was asked for {mode.value}, which GRIFFIN cannot follow: it verifies or contrasts several "
                "drafts in one pass, so prompt and generation phase are mixed; use greedy search, sampling or beam "
                "search, or detach first"
            )
        return validate(mode, *args, **kwargs)

    def prefilled(
        input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        nonlocal prompts
        _refuse_unknown_phases(generation_config, model_kwargs)
        cache = model_kwargs.get("past_key_values")
        mask = model_kwargs.get("attention_mask")
        if mask is not None:
            mask = mask[:, cached_tokens(cache) :].bool()
        phases.close()
        with handle.prompt_phase(attention_mask=mask, statistics=of_cache(cache)):
            outputs = prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        keep_with_cache(handle.gathered, outputs.get("past_key_values"))
        prompts += 1
        phases.enter_context(handle.generation_phase())
        return outputs

    def generated(*args: Any, **kwargs: Any) -> Any:
        with handle.turn.taken():
            handle.refuse_phase("generate says its phases itself")
            if kwargs.get("custom_generate") is not None:
                raise ValueError(
                    "generate was called with custom_generate, whose phases GRIFFIN does not know; detach first, or "
                    "say them with handle.prompt_phase() and handle.generation_phase()"
                )
            before = prompts
            with phases:
                outputs = generate(*args, **kwargs)
        if prompts == before:
            warnings.warn(
                "GRIFFIN is attached, but this generate never reached Transformers' prefill stage, so the full model "
                "generated; say the phases with handle.prompt_phase() and handle.generation_phase()",
                RuntimeWarning,
                stacklevel=2,
            )
        return outputs

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "continuous batching mixes prompt and generation in one pass, which GRIFFIN cannot follow: detach first"
        )

    patch(stack, model, "_validate_generation_mode", validated)
    patch(stack, model, "_prefill", prefilled)
    patch(stack, model, "generate", generated)
    if hasattr(model, "generate_batch"):
        patch(stack, model, "generate_batch", refused)


def _generating(model: nn.Module) -> Any:
    """The module whose `generate` does the work: the model, or the one that a wrapper hands `generate` on to."""
    inside = next((module for module in model.modules() if isinstance(module, GenerationMixin)), None)
    if inside is None:
        raise ValueError(
            f"{type(model).__name__}.generate is not that of Transformers, so GRIFFIN cannot learn its phases; attach "
            "to the Transformers model inside"
        )
    missing = [name for name in _NEEDED if not hasattr(inside, name)]
    if missing:
        import transformers

        raise ValueError(
            f"transformers {transformers.__version__} has no {' and no '.join(missing)} in its generate, where GRIFFIN "
            "learns the phase; install transformers from 5.21 on, below 6"
        )
    return inside


def _refuse_virtual_tokens(model: nn.Module) -> None:
    """PEFT's prompt learning puts tokens before the prompt that `generate` does not know of."""
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise ValueError(
            f"{type(model).__name__} has an adapter of {type(adapter).__name__}, which puts virtual tokens before "
            "every prompt, and GRIFFIN cannot tell them from the prompt's; attach to the base model"
        )


def _refuse_unknown_phases(generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    if model_kwargs.get("use_cache") is False:
        raise ValueError(
            "the key/value cache is off (use_cache=False, from the call or from the model's own config), so every "
            "step would run the prompt again with the experts only; pass use_cache=True to generate"
        )
    scale = getattr(generation_config, "guidance_scale", None)
    if scale is not None and scale != 1:
        raise ValueError(
            f"classifier-free guidance (guidance_scale={scale:g}) runs a second prompt inside the generation phase, "
            "which GRIFFIN cannot follow: leave guidance_scale and negative_prompt_ids out, or detach first"
        )
