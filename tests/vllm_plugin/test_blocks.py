"""FF blocks of vLLM's own layers, without an engine: several models in one process."""

from __future__ import annotations

import gc
import importlib.util
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed here: make test-vllm has an environment of its own", allow_module_level=True)

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.model_executor.models.falcon_h1 import FalconH1MLP
from vllm.model_executor.models.gpt2 import GPT2MLP
from vllm.model_executor.models.llama import LlamaMLP

from griffin.config import GriffinConfig
from griffin.integrations.vllm.blocks import FF, STEP, Counts, find, kept_weights
from griffin.integrations.vllm.requests import Requests, Scheduled, StepPlan

D, WIDTH, LAYERS = 16, 32, 2


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    meeting: Path = tmp_path_factory.mktemp("ranks") / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
    yield
    destroy_model_parallel()
    destroy_distributed_environment()


class Stack(nn.Module):
    """FF blocks one after the other, with the names that they have in a model."""

    def __init__(self, block: Callable[[str], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": block(f"layers.{i}.mlp")}) for i in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["mlp"](x)
        return x


def llama(prefix: str) -> nn.Module:
    return LlamaMLP(D, WIDTH, "silu", prefix=prefix)


def gpt2(prefix: str) -> nn.Module:
    return GPT2MLP(WIDTH, SimpleNamespace(hidden_size=D, activation_function="gelu_new"), prefix=prefix)


def falcon_h1(prefix: str) -> nn.Module:
    config = SimpleNamespace(hidden_size=D, intermediate_size=WIDTH, mlp_multipliers=(1.0, 0.5), hidden_act="silu")
    return FalconH1MLP(config, prefix=prefix)


class Engine:
    """What an engine is to the FF blocks: a model, and a config that holds vLLM's layers by name."""

    def __init__(self, seed: int, block: Callable[[str], nn.Module] = llama) -> None:
        self.config = VllmConfig()
        with set_current_vllm_config(self.config):
            self.model = Stack(block)
        torch.manual_seed(seed)
        with kept_weights() as weights:
            for module in self.model.modules():
                if hasattr(module, "quant_method"):
                    for parameter in module.parameters():
                        parameter.data.copy_(0.3 * torch.randn_like(parameter))
                    module.quant_method.process_weights_after_loading(module)
        self.x = torch.randn(3, D)
        self.expected = self.model(self.x)  # by vLLM's layers
        named = self.config.compilation_config.static_forward_context
        self.counts = Counts()
        self.ffs = [FF(block, weights, "auto", named, self.counts) for block in find(self.model, LAYERS)]

    def run(self, function: Any, x: Tensor) -> Tensor:
        with set_forward_context(None, self.config):
            y: Tensor = function(x)
        return y


def test_two_models_in_one_process_keep_their_weights() -> None:
    """Eager and compiled, each before and after the other."""
    engines = [Engine(seed) for seed in (1, 2)]
    assert not torch.allclose(engines[0].expected, engines[1].run(engines[1].model, engines[0].x))
    for compiled in (False, True):
        functions = []
        for engine in engines:
            torch.compiler.reset()
            functions.append(torch.compile(engine.model, backend="eager", fullgraph=True) if compiled else engine.model)
            torch.testing.assert_close(engine.run(functions[-1], engine.x), engine.expected)
        for engine, function in zip(engines, functions, strict=True):
            torch.testing.assert_close(engine.run(function, engine.x), engine.expected)


def test_a_graph_holds_names_that_mean_the_running_engines_blocks() -> None:
    """vLLM's compile cache gives a graph of one engine to another, of another process too."""
    graphs: list[torch.fx.GraphModule] = []

    def kept(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    first = Engine(1)
    torch.compiler.reset()
    first.run(torch.compile(first.model, backend=kept, fullgraph=True), first.x)
    calls = [node for node in graphs[0].graph.nodes if "vllm_ff" in str(node.target)]
    assert [call.args[1] for call in calls] == [f"layers.{i}.mlp.down_proj.griffin" for i in range(LAYERS)]
    second = Engine(2)
    (y,) = second.run(graphs[0], second.x)
    torch.testing.assert_close(y, second.expected)


def test_one_engine_cannot_have_a_name_twice() -> None:
    engine = Engine(1)
    named = engine.config.compilation_config.static_forward_context
    message = r"already has an FF block layers\.0\.mlp\.down_proj\.griffin"
    with set_forward_context(None, engine.config), pytest.raises(ValueError, match=message):
        FF(engine.ffs[0].block, {}, "reference", named, Counts())


def test_blocks_go_with_their_engine() -> None:
    engine = Engine(1)
    alive = [weakref.ref(ff) for ff in engine.ffs]
    del engine
    torch.compiler.reset()
    gc.collect()
    assert [ff() for ff in alive] == [None] * LAYERS


def test_every_layout_of_one_input_projection_is_found() -> None:
    """GPT-2's FF blocks are modules without a gate, with biases."""
    engine = Engine(1, gpt2)
    assert {str(ff.block.layout) for ff in engine.ffs} == {"c_fc -> c_proj"}
    torch.testing.assert_close(engine.run(engine.model, engine.x), engine.expected)
    config = GriffinConfig(density=0.5, selection="topk", batch="per_sequence")
    requests = Requests([ff.block for ff in engine.ffs])

    def step(plan: StepPlan, x: Tensor) -> Tensor:
        with set_forward_context(None, engine.config):
            get_forward_context().additional_kwargs[STEP] = plan
            y: Tensor = engine.model(x)
        requests.select(plan)
        return y

    prompt = step(requests.plan([Scheduled("a", 0, 3, 0, 3, config)]), engine.x)
    torch.testing.assert_close(prompt, engine.expected)
    y = step(requests.plan([Scheduled("a", 0, 1, 3, 3, config)]), engine.x[:1])
    assert engine.counts.native == LAYERS
    plan = requests.plan([Scheduled("a", 0, 1, 4, 3, config)])
    expected = engine.x[:1]
    for ff in engine.ffs:
        expected = expected + ff._whole(expected, plan)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(y, engine.expected[:1], rtol=1e-2, atol=1e-2)


def test_a_block_with_terms_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.mlp: FalconH1MLP computes more than its projections"):
        Engine(1, falcon_h1)
