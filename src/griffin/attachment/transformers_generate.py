"""Let `model.generate` say its phases: its prefill stage is the prompt phase, the rest is the generation phase."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from transformers.generation.configuration_utils import GenerationMode

from griffin.attachment.handle import Griffin, Phase, refuse_training
from griffin.attachment.patching import patch
from griffin.method import statistics as conversations

_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)

# Methods of Transformers' GenerationMixin that generate calls on the instance.
_NEEDED = ("_prefill", "_validate_generation_mode")


def attach_generate(handle: Griffin, stack: ExitStack) -> None:
    """Patch one model's `generate` until `stack` closes. A model without `generate` is left to own loops.

    Raises:
        ValueError: the installed Transformers has no prefill stage to hook into.
    """
    model: Any = handle.model
    if not hasattr(model, "generate"):
        return
    missing = [name for name in _NEEDED if not hasattr(model, name)]
    if missing:
        import transformers

        raise ValueError(
            f"transformers {transformers.__version__} has no {' and no '.join(missing)} in its generate, where GRIFFIN "
            "learns the phase; install transformers from 5.16 on, below 6"
        )
    generate, prefill, validate = model.generate, model._prefill, model._validate_generation_mode

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
        if model_kwargs.get("use_cache") is False:
            raise ValueError(
                "the key/value cache is off (use_cache=False, from the call or from the model's own config), so every "
                "step would run the prompt again with the experts only; pass use_cache=True to generate"
            )
        cache = model_kwargs.get("past_key_values")
        mask = model_kwargs.get("attention_mask")
        if mask is not None:
            mask = mask[:, conversations.cached_tokens(cache) :].bool()
        handle._phase = Phase.FULL
        with handle.prompt_phase(attention_mask=mask, conversation=conversations.of_cache(cache)):
            outputs = prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        conversations.keep_with_cache(handle.conversation, outputs.get("past_key_values"))
        handle._phase = Phase.GENERATION
        return outputs

    def generated(*args: Any, **kwargs: Any) -> Any:
        refuse_training(model)
        if handle.phase is not Phase.FULL:
            raise ValueError(f"generate was called inside the {handle.phase.value} phase; it says its phases itself")
        if kwargs.get("custom_generate") is not None:
            raise ValueError(
                "generate was called with custom_generate, whose phases GRIFFIN does not know; detach first, or say "
                "them with handle.prompt_phase() and handle.generation_phase()"
            )
        try:
            return generate(*args, **kwargs)
        finally:
            handle._phase = Phase.FULL

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "continuous batching mixes prompt and generation in one pass, which GRIFFIN cannot follow: detach first"
        )

    patch(stack, model, "_validate_generation_mode", validated)
    patch(stack, model, "_prefill", prefilled)
    patch(stack, model, "generate", generated)
    if hasattr(model, "generate_batch"):
        patch(stack, model, "generate_batch", refused)
