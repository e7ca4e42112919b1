"""vLLM's worker, whose model gathers statistics and computes experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from vllm.config import CompilationMode
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.platforms import current_platform

from griffin.integrations.vllm import settings
from griffin.integrations.vllm.blocks import FF, STEP, Counts, find, kept_weights
from griffin.integrations.vllm.requests import Requests, Scheduled

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker

logger = init_logger("vllm.griffin")


class GriffinWorker(Worker):  # type: ignore[misc]
    """The platform's worker, with the settings from the key `griffin` of the additional config."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model and patch its FF blocks.

        Raises:
            ValueError: GRIFFIN cannot prune this model.
        """
        config = settings.of(self.vllm_config)
        assert config is not None
        self._griffin = config
        with kept_weights() as weights:
            super().load_model(*args, **kwargs)
        runner = self.model_runner
        layers = self.model_config.hf_text_config.num_hidden_layers
        blocks = find(runner.get_model(), layers)
        if config.layers is not None:
            if config.layers[-1] >= layers:
                raise ValueError(f"layers has {config.layers[-1]}, but the model has layers 0 to {layers - 1}")
            blocks = [block for block in blocks if block.layer in config.layers]
        compilation = self.vllm_config.compilation_config
        named = None if compilation.mode == CompilationMode.NONE else compilation.static_forward_context
        self._griffin_counts = Counts()
        ffs = [FF(block, weights, config.backend, named, self._griffin_counts) for block in blocks]
        self._griffin_requests = Requests(blocks)
        forward = runner._model_forward

        def model_forward(*args: Any, **kwargs: Any) -> Any:
            step = self._griffin_requests.plan(self._scheduled())
            get_forward_context().additional_kwargs[STEP] = step
            output = forward(*args, **kwargs)
            self._griffin_requests.select(step)
            return output

        runner._model_forward = model_forward
        ways = ", ".join(f"{count} {way}" for way, count in Counter(ff.way for ff in ffs).items())
        logger.info(
            "GRIFFIN: %d FF blocks of %d neurons here, %s at density %g: %s",
            len(blocks), blocks[0].width, config.selection, config.density, ways,
        )  # fmt: skip

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run a step."""
        self._griffin_requests.drop(scheduler_output.finished_req_ids)
        return super().execute_model(scheduler_output)

    def _scheduled(self) -> Iterator[Scheduled]:
        runner: Any = self.model_runner
        batch, begins = runner.input_batch, runner.query_start_loc.np
        for index in range(batch.num_reqs):
            name = batch.req_ids[index]
            yield Scheduled(
                name,
                int(begins[index]),
                int(begins[index + 1]),
                int(batch.num_computed_tokens_cpu[index]),
                int(batch.num_prompt_tokens[index]),
                settings.of_request(runner.requests[name].sampling_params, self._griffin),
            )

    def griffin_report(self) -> dict[str, int]:
        """Counts of what was computed, and how, since the start. For `collective_rpc`."""
        requests = self._griffin_requests
        return {
            "native_rows": self._griffin_counts.native,
            "copied_rows": self._griffin_counts.copied,
            "masked_rows": self._griffin_counts.masked,
            "prompt_tokens": requests.prompt_tokens,
            "incomplete": requests.incomplete,
            "requests": len(requests.experts),
        }

    def griffin_experts(self) -> dict[str, dict[int, list[int]]]:
        """Experts of the unfinished requests, by request and layer. For `collective_rpc`."""
        requests = self._griffin_requests.experts
        return {name: {layer: e.tolist() for layer, e in by_layer.items()} for name, by_layer in requests.items()}
