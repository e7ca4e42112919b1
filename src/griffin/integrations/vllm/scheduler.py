"""vLLM's schedulers, changed so that the prefix cache holds nothing that a pruned FF has computed."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from griffin.integrations.vllm import settings


class _CleanCache:
    """Requests with GRIFFIN do not read the prefix cache, and publish the blocks of their prompts only.

    A cache hit would skip prompt tokens, and the statistic would miss them. Keys and values of generated tokens come
    from a pruned FF, so other requests must not read them.
    """

    vllm_config: Any
    kv_cache_manager: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = settings.of(self.vllm_config)
        assert config is not None
        self._griffin = config
        coordinator = self.kv_cache_manager.coordinator
        publish = coordinator.cache_blocks

        def publish_prompt(request: Any, num_computed_tokens: int) -> None:
            if self._prunes(request):
                num_computed_tokens = min(num_computed_tokens, request.num_prompt_tokens)
            publish(request, num_computed_tokens)

        coordinator.cache_blocks = publish_prompt

    def add_request(self, request: Any) -> None:
        """Add a request."""
        if self._prunes(request):
            request.skip_reading_prefix_cache = True
        super().add_request(request)  # type: ignore[misc]

    def _prunes(self, request: Any) -> bool:
        return settings.of_request(request.sampling_params, self._griffin).density < 1.0


class GriffinScheduler(_CleanCache, Scheduler):  # type: ignore[misc]
    """vLLM's scheduler with a clean prefix cache."""


class GriffinAsyncScheduler(_CleanCache, AsyncScheduler):  # type: ignore[misc]
    """vLLM's asynchronous scheduler with a clean prefix cache."""
