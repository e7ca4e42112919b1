"""Rows, phases and refusals, without an engine."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from griffin.config import GriffinConfig
from griffin.integrations.vllm import settings
from griffin.integrations.vllm.copied import Copied
from griffin.integrations.vllm.requests import Needs, Requests, Scheduled
from griffin.layouts import FFBlock, Layout

HALF, FULL = (
    GriffinConfig(batch="per_sequence", selection="topk"),
    GriffinConfig(density=1.0, batch="per_sequence", selection="topk"),
)


def requests() -> Requests:
    module = nn.Identity()
    return Requests([FFBlock(0, "ff", Layout(("a",), "b"), module, (module,), module, 8)])


def step(own: Requests, *scheduled: Scheduled) -> tuple[list[tuple[int, int]], list[int]]:
    """Run a step: which rows were gathered, which pruned."""
    plan = own.plan(scheduled)
    for request, begin, end in plan.gathered:
        request.statistics.add(0, torch.rand(1, end - begin, 8), None)
    own.select(plan)
    return [(begin, end) for _, begin, end in plan.gathered], [row for row, _ in plan.pruned]


def test_chunks_and_mixed_phases() -> None:
    own = requests()
    assert step(own, Scheduled("a", 0, 4, 0, 5, HALF), Scheduled("b", 4, 5, 0, 1, HALF)) == ([(0, 4), (4, 5)], [])
    # b generates while the last chunk of a's prompt, of one token, still is a prompt
    assert step(own, Scheduled("a", 0, 1, 4, 5, HALF), Scheduled("b", 1, 2, 1, 1, HALF)) == ([(0, 1)], [1])
    assert step(own, Scheduled("c", 0, 3, 0, 3, FULL), Scheduled("a", 3, 4, 5, 5, HALF)) == ([], [3])
    assert len(own.experts["a"][0]) == 4
    own.drop(["a"])
    assert "a" not in own.experts


def test_preempted_requests_keep_their_experts_and_count_no_token_twice() -> None:
    own = requests()
    step(own, Scheduled("a", 0, 4, 0, 6, HALF))
    assert step(own, Scheduled("a", 0, 5, 0, 6, HALF)) == ([(4, 5)], [])  # began anew inside the prompt
    step(own, Scheduled("a", 0, 1, 5, 6, HALF))
    before = own.experts["a"][0]
    assert step(own, Scheduled("a", 0, 9, 0, 6, HALF)) == ([], [6, 7, 8])  # prompt and what was generated, anew
    assert own.experts["a"][0] is before
    assert own.incomplete == 0


@pytest.mark.parametrize("gated", [True, False])
def test_a_copy_equals_masking(gated: bool) -> None:
    """Also of fewer experts than it has room for, after one of more."""
    width, d = 8, 5
    weight, bias = torch.randn(2 * width if gated else width, d), torch.randn(2 * width if gated else width)
    down, down_bias = torch.randn(d, width), torch.randn(d)

    def activate(z: torch.Tensor) -> torch.Tensor:
        return z[:, : z.shape[1] // 2].relu() * z[:, z.shape[1] // 2 :] if gated else (1 + z).relu()

    copied = Copied((weight, bias), (down, down_bias), activate, gated, 4)
    x = torch.randn(3, d)
    for experts in ([1, 2, 5, 7], [0, 6], [2, 3, 4, 5]):
        copied.load(torch.tensor(experts))
        mask = torch.zeros(width).index_fill_(0, torch.tensor(experts), 1)
        expected = (activate(x @ weight.t() + bias) * mask) @ down.t() + down_bias
        torch.testing.assert_close(copied.run(x), expected)


def test_experts_are_left_out_where_they_do_not_pay() -> None:
    own, loaded = requests(), []
    own.pays, own.load = (lambda many: len(many) == 1), loaded.append
    step(own, Scheduled("a", 0, 4, 0, 4, HALF), Scheduled("b", 4, 6, 0, 2, HALF))
    a, b = Scheduled("a", 0, 1, 4, 4, HALF), Scheduled("b", 1, 2, 2, 2, HALF)
    for lone in (a, a, Scheduled("b", 0, 1, 2, 2, HALF)):
        assert own.needs([lone]) == Needs.EXPERTS_OF_ONE_ROW
        assert step(own, lone) == ([], [0])
    assert [request.experts for request in loaded] == [own.experts["a"], own.experts["b"]]
    assert own.needs([a, b]) == Needs.ALL_NEURONS
    assert step(own, a, b) == ([], [])
    assert own.counts.left_out == 2
    assert own.incomplete == 0


def test_missing_prompt_tokens_are_counted() -> None:
    own = requests()
    step(own, Scheduled("a", 0, 2, 4, 6, HALF))
    assert step(own, Scheduled("a", 0, 1, 6, 6, HALF)) == ([], [])
    assert own.incomplete == 1


def test_what_steps_need() -> None:
    own = requests()
    prompt, generated = Scheduled("a", 0, 4, 0, 4, HALF), Scheduled("a", 0, 1, 4, 4, HALF)
    assert own.needs([prompt]) == Needs.ROWS
    assert own.needs([Scheduled("c", 0, 4, 0, 4, FULL)]) == Needs.ALL_NEURONS
    assert own.needs([generated]) == Needs.ALL_NEURONS  # its prompt has not been seen
    step(own, prompt)
    assert own.needs([generated]) == Needs.EXPERTS_OF_ONE_ROW
    assert own.needs([Scheduled("a", 0, 2, 4, 4, HALF)]) == Needs.ROWS
    assert own.needs([Scheduled("c", 0, 1, 0, 1, FULL), generated]) == Needs.ROWS
    assert own.needs([Scheduled("a", 0, 1, 3, 4, HALF)]) == Needs.ROWS  # preempted: a prompt's row, computed again
    assert own.needs([generated, Scheduled("b", 1, 2, 0, 1, HALF)]) == Needs.ROWS  # a prompt of one token


def test_a_step_ends_with_its_run() -> None:
    own = requests()
    with own.running():
        pass  # a dummy run
    with pytest.raises(RuntimeError), own.running():
        own.begin([Scheduled("a", 0, 4, 0, 4, HALF)])
        raise RuntimeError
    assert own.step is None
    assert own.experts["a"] == {}


def test_requests_of_several_densities_share_a_union() -> None:
    own = requests()
    quarter = GriffinConfig(density=0.25, batch="per_sequence", selection="topk")
    step(own, Scheduled("a", 0, 3, 0, 3, HALF), Scheduled("b", 3, 6, 0, 3, quarter))
    plan = own.plan([Scheduled("a", 0, 1, 3, 3, HALF), Scheduled("b", 1, 2, 3, 3, quarter)])
    experts, who = plan.set_of(0, 8)
    assert who is not None
    for bit, name in enumerate("ab"):
        wanted = [int(e) for e, mask in zip(experts, who, strict=True) if int(mask) >> bit & 1]
        assert wanted == own.experts[name][0].tolist()


def engine(**own: Any) -> Any:
    from vllm.config import CUDAGraphMode

    plain = {
        "additional_config": {"griffin": {"density": 0.5}},
        "cache_config": SimpleNamespace(kv_sharing_fast_prefill=False),
        "compilation_config": SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE),
        "speculative_config": None,
        "lora_config": None,
        "kv_transfer_config": None,
        "device_config": SimpleNamespace(device_type="cpu"),
        "model_config": SimpleNamespace(
            quantization=None, runner_type="generate", is_encoder_decoder=False, enforce_eager=False
        ),
        "parallel_config": SimpleNamespace(
            pipeline_parallel_size=1, enable_dbo=False, worker_cls="vllm.v1.worker.cpu_worker.CPUWorker"
        ),
        "scheduler_config": SimpleNamespace(scheduler_cls=None),
    }
    return SimpleNamespace(**{**plain, **own})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"densty": 0.5}, "did you mean 'density'"),
        ({"density": 2}, "density is 2"),
        ({"batch": "shared"}, "every request has its own experts"),
        ({"selection": "dynamic+topk"}, "no dynamic neuron selection"),
        ({"selection": "wanda"}, "wanda was asked for"),
        (0.5, "expected settings"),
    ],
)
def test_settings_that_mean_nothing_here_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings.of(SimpleNamespace(additional_config={"griffin": given}))


def test_absent_key_means_nothing() -> None:
    assert settings.of(SimpleNamespace(additional_config={})) is None


def test_a_requests_own_density() -> None:
    assert settings.of_request(SimpleNamespace(extra_args={"griffin_density": 0.25}), HALF).density == 0.25
    assert settings.of_request(SimpleNamespace(extra_args=None), HALF) is HALF
    with pytest.raises(ValueError, match="unknown request argument 'griffin_densty'"):
        settings.of_request(SimpleNamespace(extra_args={"griffin_densty": 0.25}), HALF)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed here: see make test-vllm")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cache_config": SimpleNamespace(kv_sharing_fast_prefill=True)}, "kv_sharing_fast_prefill"),
        ({"speculative_config": object()}, "speculative"),
        ({"lora_config": object()}, "LoRA"),
        ({"kv_transfer_config": object()}, "KV connector"),
        ({"scheduler_config": SimpleNamespace(scheduler_cls="own.Scheduler")}, "own.Scheduler"),
    ],
)
def test_engines_that_do_not_work_are_refused(changed: dict[str, Any], message: str) -> None:
    from griffin.integrations.vllm import startup

    startup.check(engine(), HALF)
    with pytest.raises(ValueError, match=message):
        startup.check(engine(**changed), HALF)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed here: see make test-vllm")
def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    from griffin.integrations.vllm import startup

    monkeypatch.setattr(vllm, "__version__", "0.33.1+cpu")
    with pytest.raises(ValueError, match=r"vLLM is 0\.33\.1"):
        startup.check(engine(), HALF)
