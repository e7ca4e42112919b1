"""Which recorded graphs a step takes, with the choosers of vLLM's two model runners."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed here: make test-vllm has an environment of its own", allow_module_level=True)

from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from griffin.config import GriffinConfig
from griffin.integrations.vllm import runners, startup
from griffin.integrations.vllm.requests import Scheduled

FULL, PIECEWISE, NONE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE
SIZES = [1, 2, 4, 8]
# Rows whose graphs of the whole model serve a step, and which graphs steps of 1, 3 and 8 rows take.
STEPS = [
    ({1, 2, 4, 8}, (FULL, FULL, FULL)),
    ({2, 4, 8}, (PIECEWISE, FULL, FULL)),
    ({1}, (FULL, PIECEWISE, PIECEWISE)),
    (set(), (PIECEWISE, PIECEWISE, PIECEWISE)),
]


def config(mode: CUDAGraphMode) -> Any:
    """What the choosers read of an engine's config, with vLLM's own config of the graphs."""
    compilation = CompilationConfig(
        mode=CompilationMode.VLLM_COMPILE,
        cudagraph_mode=mode,
        cudagraph_capture_sizes=SIZES,
        max_cudagraph_capture_size=SIZES[-1],
    )
    compilation.set_splitting_ops_for_v1(all2all_backend="naive")
    startup._split_at_ff(compilation)
    return SimpleNamespace(
        compilation_config=compilation,
        num_speculative_tokens=0,
        speculative_config=None,
        lora_config=None,
        scheduler_config=SimpleNamespace(max_num_seqs=SIZES[-1]),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
    )


def v1_runner(mode: CUDAGraphMode) -> Any:
    dispatcher = CudagraphDispatcher(config(mode))
    dispatcher.initialize_cudagraph_keys(mode)
    return SimpleNamespace(cudagraph_dispatcher=dispatcher)


def v2_runner(mode: CUDAGraphMode, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(type(current_platform), "get_global_graph_pool", lambda self: None)  # the CPU has none
    manager = CudaGraphManager(config(mode), SimpleNamespace(), mode, decode_query_len=1)
    manager._graphs_captured = True
    return SimpleNamespace(cudagraph_manager=manager)


def test_blocks_are_among_the_splitting_operators() -> None:
    splits = config(CUDAGraphMode.FULL_AND_PIECEWISE).compilation_config.splitting_ops
    assert splits.count("griffin::vllm_ff") == 1
    assert "vllm::unified_attention_with_output" in splits


@pytest.mark.parametrize(("rows", "modes"), STEPS)
def test_v1_takes_graphs_of_the_whole_model_that_serve(rows: set[int], modes: tuple[CUDAGraphMode, ...]) -> None:
    runner = v1_runner(CUDAGraphMode.FULL_AND_PIECEWISE)
    assert runners.choose_full_graphs(runner, False, rows.__contains__)
    dispatch = runner.cudagraph_dispatcher.dispatch
    for tokens, padded, expected in zip((1, 3, 8), (1, 4, 8), modes, strict=True):
        mode, batch = dispatch(num_tokens=tokens, uniform_decode=True, invalid_modes=None, valid_modes=None)
        assert (mode, batch.num_tokens) == (expected, padded)
    assert dispatch(num_tokens=5, uniform_decode=False)[0] == PIECEWISE
    assert dispatch(num_tokens=9, uniform_decode=True)[0] == NONE
    assert dispatch(num_tokens=2, uniform_decode=True, valid_modes={NONE})[0] == NONE


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("rows", "modes"), STEPS)
def test_v2_takes_graphs_of_the_whole_model_that_serve(
    rows: set[int], modes: tuple[CUDAGraphMode, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = v2_runner(CUDAGraphMode.FULL_AND_PIECEWISE, monkeypatch)
    assert runners.choose_full_graphs(runner, True, rows.__contains__)
    dispatch = runner.cudagraph_manager.dispatch
    for tokens, padded, expected in zip((1, 3, 8), (1, 4, 8), modes, strict=True):
        batch = dispatch(tokens, tokens, 1, num_active_loras=0, max_query_len=1)
        assert (batch.cg_mode, batch.num_tokens) == (expected, padded)
    assert dispatch(2, 5, None, num_active_loras=0).cg_mode == PIECEWISE
    assert dispatch(9, 9, 1, num_active_loras=0, max_query_len=1).cg_mode == NONE


def test_graphs_of_the_whole_model_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="FULL_DECODE_ONLY"):
        runners.choose_full_graphs(v1_runner(CUDAGraphMode.FULL_DECODE_ONLY), False, lambda rows: True)
    for runner in (v1_runner(PIECEWISE), v1_runner(NONE)):
        assert not runners.choose_full_graphs(runner, False, lambda rows: True)
    assert not runners.choose_full_graphs(SimpleNamespace(cudagraph_manager=None), True, lambda rows: True)


def test_what_the_scheduler_says_of_a_step() -> None:
    half = GriffinConfig(batch="per_sequence", selection="topk")
    known = {name: runners.Known(half, prompt) for name, prompt in (("a", 4), ("b", 7))}
    output = SimpleNamespace(
        scheduled_cached_reqs=SimpleNamespace(req_ids=["b"], num_computed_tokens=[5]),
        scheduled_new_reqs=[SimpleNamespace(req_id="a", num_computed_tokens=0)],
        num_scheduled_tokens={"a": 4, "b": 2},
    )
    assert list(runners.scheduled(output, known)) == [
        Scheduled("a", 0, 4, 0, 4, half),
        Scheduled("b", 0, 2, 5, 7, half),
    ]
