"""vLLM's worker, whose model gathers statistics and computes experts."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm.config import CompilationMode, CUDAGraphMode
from vllm.logger import init_logger
from vllm.platforms import current_platform

from griffin.integrations.vllm import runners, settings
from griffin.integrations.vllm.blocks import FF, find, kept_weights
from griffin.integrations.vllm.requests import Needs, Requests, RequestState

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
        plain = compilation.mode == CompilationMode.NONE and compilation.cudagraph_mode == CUDAGraphMode.NONE
        named = None if plain else compilation.static_forward_context
        self._griffin_requests = Requests(blocks)
        ffs = [FF(block, weights, config, named, self._griffin_requests) for block in blocks]

        def load(request: RequestState) -> None:
            for ff in ffs:
                ff.load(request)

        self._griffin_requests.pays = lambda requests: all(ff.pays(requests) for ff in ffs)
        self._griffin_requests.load = load
        self._griffin_records_experts = all(ff.records_experts for ff in ffs)
        self._griffin_known: dict[str, runners.Known] = {}
        self._griffin_needs, self._griffin_full_graphs, self._griffin_told = Needs.ALL_NEURONS, False, False
        runners.follow(runner, self.use_v2_model_runner, self._griffin_requests, self._griffin_known)
        ways = ", ".join(f"{count} {way}" for way, count in Counter(ff.way for ff in ffs).items())
        logger.info(
            "GRIFFIN: %d FF blocks of %d neurons here, %s at density %g: %s",
            len(blocks), blocks[0].width, config.selection, config.density, ways,
        )  # fmt: skip

    def compile_or_warm_up_model(self) -> Any:
        """Compile the model and record CUDA graphs.

        Raises:
            ValueError: the recorded graphs leave no place for experts.
        """
        times = super().compile_or_warm_up_model()
        self._griffin_full_graphs = runners.choose_full_graphs(
            self.model_runner, self.use_v2_model_runner, self._serves
        )
        return times

    def _serves(self, rows: int) -> bool:
        """Whether a graph of the whole model, for so many rows, does what this step needs."""
        if rows == 1 and self._griffin_records_experts:
            serves = self._griffin_needs == Needs.EXPERTS_OF_ONE_ROW
            self._griffin_requests.counts.recorded += serves
            return serves
        return self._griffin_needs == Needs.ALL_NEURONS

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run a step."""
        requests, known = self._griffin_requests, self._griffin_known
        for name in scheduler_output.finished_req_ids:
            known.pop(name, None)
        requests.drop(scheduler_output.finished_req_ids)
        for new in scheduler_output.scheduled_new_reqs:
            config = settings.of_request(new.sampling_params, self._griffin)
            known[new.req_id] = runners.Known(config, new.prompt_len)
        if self._griffin_full_graphs:
            self._griffin_needs = requests.needs(runners.scheduled(scheduler_output, known))
        try:
            return super().execute_model(scheduler_output)
        finally:
            self._griffin_needs = Needs.ALL_NEURONS
            if requests.counts.left_out and not self._griffin_told:
                self._griffin_told = True
                logger.info("GRIFFIN: so many requests generate at once that experts save no time; they are left out")

    def griffin_report(self) -> dict[str, int]:
        """Counts of what was computed, and how, since the start. For `collective_rpc`."""
        requests = self._griffin_requests
        return {
            "native_rows": requests.counts.native,
            "copied_rows": requests.counts.copied,
            "recorded_rows": requests.counts.recorded,
            "masked_rows": requests.counts.masked,
            "left_out_rows": requests.counts.left_out,
            "prompt_tokens": requests.prompt_tokens,
            "incomplete": requests.incomplete,
            "requests": len(requests.experts),
        }

    def griffin_experts(self) -> dict[str, dict[int, list[int]]]:
        """Experts of the unfinished requests, by request and layer. For `collective_rpc`."""
        requests = self._griffin_requests.experts
        return {name: {layer: e.tolist() for layer, e in by_layer.items()} for name, by_layer in requests.items()}
