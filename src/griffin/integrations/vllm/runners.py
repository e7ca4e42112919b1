"""Where the plugin meets vLLM's two model runners: it learns the rows of a step, and chooses among recorded graphs.

Both are followed through methods of their objects. The V1 runner calls `_model_forward` for real steps only, when its
batch is final. The V2 runner calls `preprocess_state` of its model state for real steps only, then runs the model. It
forgets preempted requests and takes them anew, so nothing is kept with it: requests are known by name until the
scheduler says that they are finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from vllm.config import CUDAGraphMode

from griffin.config import GriffinConfig
from griffin.integrations.vllm.requests import Requests, Scheduled

FULL = CUDAGraphMode.FULL


class Known(NamedTuple):
    """What a request asked for, and its number of prompt tokens."""

    config: GriffinConfig
    prompt: int


def follow(runner: Any, v2: bool, requests: Requests, known: Mapping[str, Known]) -> None:
    """Let the FF blocks follow the steps of a model runner, whose model is loaded.

    Args:
        runner: vLLM's runner.
        v2: whether it is the V2 model runner.
        requests: the engine's requests.
        known: all unfinished requests by name.
    """
    if v2:
        _follow_v2(runner, requests, known)
    else:
        _follow_v1(runner, requests, known)


def _follow_v1(runner: Any, requests: Requests, known: Mapping[str, Known]) -> None:
    forward = runner._model_forward

    def model_forward(*args: Any, **kwargs: Any) -> Any:
        batch, count = runner.input_batch, runner.input_batch.num_reqs
        rows = _rows(batch.req_ids[:count], runner.query_start_loc.np, batch.num_computed_tokens_cpu, known)
        with requests.running():
            requests.begin(rows)
            return forward(*args, **kwargs)

    runner._model_forward = model_forward


def _follow_v2(runner: Any, requests: Requests, known: Mapping[str, Known]) -> None:
    preprocess, execute = runner.model_state.preprocess_state, runner.execute_model

    def preprocess_state(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        batch = input_batch
        requests.begin(_rows(batch.req_ids, batch.query_start_loc_np, batch.num_computed_tokens_np, known))
        return preprocess(input_batch, *args, **kwargs)

    def execute_model(*args: Any, **kwargs: Any) -> Any:
        with requests.running():
            return execute(*args, **kwargs)

    runner.model_state.preprocess_state = preprocess_state
    runner.execute_model = execute_model


def _rows(names: Iterable[str], begins: Any, computed: Any, known: Mapping[str, Known]) -> Iterator[Scheduled]:
    for index, name in enumerate(names):
        config, prompt = known[name]
        yield Scheduled(name, int(begins[index]), int(begins[index + 1]), int(computed[index]), prompt, config)


def scheduled(output: Any, known: Mapping[str, Known]) -> Iterator[Scheduled]:
    """The requests of a step before the runner sorts them: vLLM's scheduler output, in no order of rows."""
    cached = output.scheduled_cached_reqs
    computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    computed |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
    for name, count in output.num_scheduled_tokens.items():
        config, prompt = known[name]
        yield Scheduled(name, 0, count, computed[name], prompt, config)


def choose_full_graphs(runner: Any, v2: bool, serves: Callable[[int], bool]) -> bool:
    """Let steps take a graph of the whole model only if it does what they need; piecewise graphs serve any step.

    Args:
        runner: vLLM's runner, whose graphs are recorded.
        v2: whether it is the V2 model runner.
        serves: whether a graph of the whole model, for so many rows, does what this step needs.

    Returns:
        Whether there are graphs of the whole model, so that `serves` is asked.

    Raises:
        ValueError: the runner has graphs of the whole model only.
    """
    chooser = runner.cudagraph_manager if v2 else runner.cudagraph_dispatcher
    if chooser is None or not chooser.cudagraph_mode.has_full_cudagraphs():
        return False
    if not chooser.cudagraph_mode.has_piecewise_cudagraphs():
        raise ValueError(
            f"vLLM resolved its CUDA graphs to {chooser.cudagraph_mode.name} for this model, graphs of the whole model "
            'alone, which do not tell the rows of a step apart; pass --compilation-config \'{"cudagraph_mode": '
            '"PIECEWISE"}\''
        )
    dispatch = chooser.dispatch

    def v1_dispatch(*args: Any, invalid_modes: Any = None, **kwargs: Any) -> Any:
        mode, batch = dispatch(*args, invalid_modes=invalid_modes, **kwargs)
        if mode == FULL and not serves(batch.num_tokens):
            return dispatch(*args, invalid_modes={FULL, *(invalid_modes or ())}, **kwargs)
        return mode, batch

    def v2_dispatch(num_reqs: int, num_tokens: int, uniform_token_count: int | None, *args: Any, **kwargs: Any) -> Any:
        batch = dispatch(num_reqs, num_tokens, uniform_token_count, *args, **kwargs)
        if batch.cg_mode == FULL and not serves(batch.num_tokens):
            # Graphs of the whole model are for decode batches alone, which their uniform or longest query tells.
            batch = dispatch(num_reqs, num_tokens, None, *args, **kwargs | {"max_query_len": None})
            if batch.cg_mode == FULL:
                raise RuntimeError(f"vLLM has no other graph than {batch} for a step that gathers or prunes")
        return batch

    chooser.dispatch = v2_dispatch if v2 else v1_dispatch
    return True
