"""FF blocks of vLLM's own layers, without an engine: several models in one process."""

from __future__ import annotations

import gc
import importlib.util
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed here: make test-vllm has an environment of its own", allow_module_level=True)

from vllm.compilation.backends import split_graph
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.models.falcon_h1 import FalconH1MLP
from vllm.model_executor.models.gpt2 import GPT2MLP
from vllm.model_executor.models.llama import LlamaMLP

from griffin.config import GriffinConfig
from griffin.integrations.vllm.blocks import FF, find, kept_weights
from griffin.integrations.vllm.requests import Requests, RequestState, Scheduled
from griffin.integrations.vllm.startup import SPLITS

pytestmark = pytest.mark.usefixtures("one_rank")

D, WIDTH, LAYERS = 16, 32, 2
HALF = GriffinConfig(density=0.5, selection="topk", batch="per_sequence")
FULL = GriffinConfig(density=1.0, selection="topk", batch="per_sequence")


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

    def __init__(
        self, seed: int, block: Callable[[str], nn.Module] = llama, config: GriffinConfig = HALF, operator: bool = True
    ) -> None:
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
        named = self.config.compilation_config.static_forward_context if operator else None
        blocks = find(self.model, LAYERS)
        self.requests = Requests(blocks)
        self.ffs = [FF(block, weights, config, named, self.requests) for block in blocks]
        self.requests.load = self.load

    def load(self, request: RequestState) -> None:
        for ff in self.ffs:
            ff.load(request)

    def run(self, function: Any, x: Tensor) -> Tensor:
        with set_forward_context(None, self.config):
            y: Tensor = function(x)
        return y

    def step(self, function: Any, x: Tensor, *scheduled: Scheduled) -> Tensor:
        """Run a step of requests."""
        with self.requests.running():
            self.requests.begin(scheduled)
            return self.run(function, x)


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
    assert [call.args[2] for call in calls] == [f"layers.{i}.mlp.down_proj.griffin" for i in range(LAYERS)]
    second = Engine(2)
    (y,) = second.run(graphs[0], second.x)
    torch.testing.assert_close(y, second.expected)


class Recorded(nn.Module):
    """What a CUDA graph is: it reads where its inputs lay when it was recorded, and writes where its outputs lay."""

    def __init__(self, part: Callable[..., Any]) -> None:
        super().__init__()
        self.part, self.inputs, self.outputs = part, (), ()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if not self.inputs:
            self.inputs, self.outputs = inputs, self.part(*inputs)
            return self.outputs
        assert [each.data_ptr() for each in inputs] == [each.data_ptr() for each in self.inputs]
        for output, again in zip(self.outputs, self.part(*self.inputs), strict=True):
            output.copy_(again)
        return self.outputs


def test_graphs_recorded_between_blocks_follow_every_step() -> None:
    """vLLM's own splitting, and recordings of two rows that also serve one row and padding."""
    eager, recorded = Engine(1), Engine(1)
    graphs: list[Any] = []

    def split(graph: torch.fx.GraphModule, _: Any) -> Any:
        whole, parts = split_graph(graph, [SPLITS])
        for part in parts:
            calls = [node for node in part.graph.graph.nodes if "vllm_ff" in str(node.target)]
            assert len(calls) == part.is_splitting_graph
            if not part.is_splitting_graph:
                setattr(whole, part.submod_name, Recorded(part.graph))
        graphs.append(parts)
        return whole

    torch.compiler.reset()
    function, x = torch.compile(recorded.model, backend=split, fullgraph=True), torch.zeros(2, D)
    recorded.run(function, x)  # the dummy run that records
    assert sum(part.is_splitting_graph for part in graphs[0]) == LAYERS
    assert len(graphs[0]) >= 2 * LAYERS + 1
    steps: tuple[tuple[Scheduled, ...], ...] = (
        (Scheduled("a", 0, 2, 0, 2, HALF),),
        (Scheduled("a", 0, 1, 2, 2, HALF), Scheduled("b", 1, 2, 0, 1, HALF)),  # pruned and gathered
        (Scheduled("a", 0, 1, 3, 2, HALF), Scheduled("b", 1, 2, 1, 1, HALF)),
        (Scheduled("b", 0, 1, 2, 1, HALF),),
        (Scheduled("c", 0, 2, 0, 2, FULL),),
    )
    for number, step in enumerate(steps):
        rows = step[-1].end
        torch.manual_seed(number)
        x.copy_(torch.randn(2, D))
        expected = eager.step(eager.model, x[:rows].clone(), *step)
        torch.testing.assert_close(recorded.step(function, x, *step)[:rows], expected)
    assert recorded.requests.counts == eager.requests.counts
    assert eager.requests.counts.native == 4 * LAYERS


class Recording(TorchDispatchMode):
    """What a CUDA graph of the whole model is: the same operators again, on the same memory, without any Python."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, output))
        return output

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, output in self.calls:
            again = function(*args, **kwargs)
            if isinstance(output, Tensor):
                output.copy_(again)


@pytest.mark.parametrize("block", [llama, gpt2])
def test_a_graph_of_the_whole_model_computes_the_experts_of_any_request(
    block: Callable[[str], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For one row, with the copy's memory: the experts are no part of the recording."""
    engine, masked = (Engine(1, block, replace(HALF, backend=backend), False) for backend in ("gather", "reference"))
    monkeypatch.setattr("griffin.integrations.vllm.blocks._is_recorded", lambda: True)
    row = torch.zeros(1, D)
    with torch.no_grad(), engine.requests.running():  # a dummy run
        with Recording() as recording:
            recorded = engine.run(engine.model, row)
        torch.testing.assert_close(engine.run(engine.model, engine.x), engine.expected)  # more rows: all neurons
    quarter = replace(HALF, density=0.25)
    assert len(recording.calls) > 2 * LAYERS
    for name, config in (("a", HALF), ("b", quarter), ("c", HALF)):
        prompt, next_token = Scheduled(name, 0, 3, 0, 3, config), Scheduled(name, 0, 1, 3, 3, config)
        torch.manual_seed(ord(name))
        x = torch.randn(3, D)
        for each in (engine, masked):
            torch.testing.assert_close(each.step(each.model, x, prompt), each.run(each.model, x))
        expected = masked.step(masked.model, x[:1], next_token)
        with engine.requests.running():
            engine.requests.begin([next_token])
            row.copy_(x[:1])
            recording.replay()
        torch.testing.assert_close(recorded, expected)
        assert not torch.allclose(expected, masked.run(masked.model, x[:1]), rtol=1e-2, atol=1e-2)
    assert engine.requests.counts.copied == 0


def test_one_engine_cannot_have_a_name_twice() -> None:
    engine = Engine(1)
    named = engine.config.compilation_config.static_forward_context
    message = r"already has an FF block layers\.0\.mlp\.down_proj\.griffin"
    with set_forward_context(None, engine.config), pytest.raises(ValueError, match=message):
        FF(engine.ffs[0].block, {}, replace(HALF, backend="reference"), named, engine.requests)


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
    prompt = engine.step(engine.model, engine.x, Scheduled("a", 0, 3, 0, 3, HALF))
    torch.testing.assert_close(prompt, engine.expected)
    y = engine.step(engine.model, engine.x[:1], Scheduled("a", 0, 1, 3, 3, HALF))
    assert engine.requests.counts.native == LAYERS
    plan = engine.requests.plan([Scheduled("a", 0, 1, 4, 3, HALF)])
    expected = engine.x[:1]
    for ff in engine.ffs:
        expected = expected + ff._whole(expected, plan)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(y, engine.expected[:1], rtol=1e-2, atol=1e-2)


def test_a_block_with_terms_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.mlp: FalconH1MLP computes more than its projections"):
        Engine(1, falcon_h1)
