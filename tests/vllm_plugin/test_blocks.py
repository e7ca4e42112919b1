"""FF blocks of vLLM's own layers, without an engine: several models in one process."""

from __future__ import annotations

import gc
import importlib.util
import weakref
from collections.abc import Iterator
from pathlib import Path
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
from vllm.forward_context import set_forward_context
from vllm.model_executor.models.llama import LlamaMLP

from griffin.integrations.vllm.blocks import FF, Counts, find, kept_weights

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

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LlamaMLP(D, WIDTH, "silu", prefix=f"layers.{i}.mlp") for i in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Engine:
    """What an engine is to the FF blocks: a model, and a config that holds vLLM's layers by name."""

    def __init__(self, seed: int) -> None:
        self.config = VllmConfig()
        with set_current_vllm_config(self.config):
            self.model = Stack()
        torch.manual_seed(seed)
        with kept_weights() as weights:
            for module in self.model.modules():
                if hasattr(module, "quant_method"):
                    module.weight.data.copy_(0.3 * torch.randn_like(module.weight))
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
    with pytest.raises(ValueError, match=r"already has an FF block layers\.0\.mlp\.down_proj\.griffin"):
        FF(engine.ffs[0].block, {}, "reference", named, Counts())


def test_blocks_go_with_their_engine() -> None:
    engine = Engine(1)
    alive = [weakref.ref(ff) for ff in engine.ffs]
    del engine
    torch.compiler.reset()
    gc.collect()
    assert [ff() for ff in alive] == [None] * LAYERS
