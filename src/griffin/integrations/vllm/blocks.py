"""The FF blocks of a vLLM model, and how their rows are computed.

Rows of the prompt phase, and of requests at density 1.0, go through vLLM's own layers. Rows of the generation phase are
computed for their experts only: by the native library, in place, or on an accelerator from a copy of one request's
experts. Where a block can do neither, vLLM's layers compute all neurons and those that are no experts are set to zero:
the result is the same, but no time is saved.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear, UnquantizedLinearMethod

from griffin import activation
from griffin.config import GriffinConfig
from griffin.families import LAYOUTS
from griffin.integrations.vllm import operator
from griffin.integrations.vllm.copied import Copied
from griffin.integrations.vllm.requests import Requests, RequestState, StepPlan
from griffin.layouts import FFBlock
from griffin.native import kernel, library, operands

_LAYOUTS = tuple(layout for layout in LAYOUTS if len(layout.inputs) == 1)  # vLLM stores gate and up as one projection
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ZERO = 1e-30  # a squared norm that is not zero, for rows that are zero on every rank
_LOADING = threading.Lock()  # one model at a time is loaded, as a class of vLLM is patched meanwhile


Weights = dict[nn.Module, tuple[Tensor, Tensor | None]]


@contextmanager
def kept_weights() -> Iterator[Weights]:
    """Keep the linear weights that vLLM frees on a CPU while it loads a model, after packing them its own way.

    Yields:
        Weight and bias of every layer of `find`'s layouts.
    """
    kept: Weights = {}
    names = tuple(f".{name}" for layout in _LAYOUTS for name in (*layout.inputs, layout.output))

    def process(self: Any, layer: Any) -> None:
        if str(getattr(layer, "prefix", "")).endswith(names):
            bias = getattr(layer, "bias", None)
            kept[layer] = layer.weight.data, None if bias is None else bias.detach().clone()
        original(self, layer)

    with _LOADING:
        original: Any = UnquantizedLinearMethod.process_weights_after_loading
        UnquantizedLinearMethod.process_weights_after_loading = process
        try:
            yield kept
        finally:
            UnquantizedLinearMethod.process_weights_after_loading = original


def find(model: nn.Module, layers: int) -> list[FFBlock]:
    """The FF blocks of a model, in order; with tensor parallelism, this rank's part of each.

    Raises:
        ValueError: the model does not have one a layer, or their weights are quantised.
    """
    blocks: list[FFBlock] = []
    for path, module in model.named_modules():
        for layout in _LAYOUTS:
            inputs, output = getattr(module, layout.inputs[0], None), getattr(module, layout.output, None)
            if not isinstance(inputs, ColumnParallelLinear) or not isinstance(output, RowParallelLinear):
                continue
            if _activation_name(module) is None:
                continue
            for projection in (inputs, output):
                if not isinstance(projection.quant_method, UnquantizedLinearMethod):
                    kind = type(projection.quant_method).__name__
                    raise ValueError(f"{path} has quantised weights ({kind}), which GRIFFIN cannot read here")
            width = int(output.input_size_per_partition)
            blocks.append(FFBlock(len(blocks), path, layout, module, (inputs,), output, width))
    if len(blocks) != layers:
        tried = "; ".join(str(layout) for layout in _LAYOUTS)
        raise ValueError(
            f"{type(model).__name__} has {layers} layers, and {len(blocks)} FF blocks of a known layout were found; "
            f"GRIFFIN needs exactly one a layer (a mixture of experts has none). Tried: {tried}"
        )
    return blocks


def _activation_name(module: nn.Module) -> str | None:
    """Attribute name of an FF block's activation module."""
    names = (name for name, function in activation.callables_of(module) if isinstance(function, nn.Module))
    return next(names, None)


def _is_recorded() -> bool:
    """Whether a CUDA graph records this call. Piecewise graphs do not: they are cut here."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class FF:
    """One FF block, patched so that it follows the step's plan.

    Args:
        block: the block.
        weights: from `kept_weights`; the weights of other layers are read where they are.
        config: the engine's settings.
        layers: where compiled graphs find the block, vLLM's `static_forward_context` of this engine; `None` where
            vLLM neither compiles the model nor records CUDA graphs.
        requests: whose step the block follows, and where its rows are counted.

    Raises:
        ValueError: the native backend was asked for by name and cannot compute the block, or the block is more than
            its projections and its activation.
    """

    def __init__(
        self, block: FFBlock, weights: Weights, config: GriffinConfig, layers: dict[str, Any] | None, requests: Requests
    ) -> None:
        backend = config.backend
        self.block, self._requests, self._counts = block, requests, requests.counts
        self._activation_name = _activation_name(block.module) or ""
        self._input, self._output = cast(Any, block.inputs[0]), cast(Any, block.output)
        self._read, self._write = self._input.forward, self._output.forward
        self._activate = getattr(block.module, self._activation_name).forward
        self._ranks, self._rank = int(self._output.tp_size), int(self._output.tp_rank)
        self._in_layer = block.path.rpartition(".")[2].isdigit()  # OPT: the decoder layer itself holds the projections
        self._full: Callable[[Tensor], Tensor] = self._whole if self._in_layer else block.module.forward
        self.native: operands.Block | None = None
        self._copied: Copied | None = None
        self._refuse_other_terms()
        self.reason = self._why_not_native(weights)
        if self.reason is None and backend in ("auto", "native"):
            self.native = self._native_block(weights)
        elif backend == "native":
            raise ValueError(f"backend is native, but {self.reason}")
        elif backend == "gather" or (backend == "auto" and self._input.weight.device.type != "cpu"):
            self._copied = self._copied_block(weights, config.experts_of(block.width))
        self._patch(layers)

    @property
    def way(self) -> str:
        """How experts are computed, and, if not in place, the reason."""
        if self.native is not None:
            return "by the native library, in place"
        why = self.reason or "as the backend was asked for by name"
        return f"from a copy of one request's experts ({why})" if self._copied is not None else f"by masking ({why})"

    def pays(self, requests: Collection[RequestState]) -> bool:
        """Whether computing so many requests for their experts only saves time; masking never does, nor costs any."""
        if self._copied is not None:
            return len(requests) == 1 and all(len(r.experts[self.block.layer]) <= self._copied.most for r in requests)
        return self.native is None or len(requests) <= kernel.MAX_ROWS

    def load(self, request: RequestState) -> None:
        """Make a request the one whose experts are copied, if experts are."""
        if self._copied is not None:
            self._copied.load(request.experts[self.block.layer])

    @property
    def records_experts(self) -> bool:
        """Whether a CUDA graph of the whole model, for one row, computes the copied experts, not all neurons."""
        return self._copied is not None

    def run(self, x: Tensor) -> Tensor:
        """The FF of a step's rows.

        Shapes:
            x: (rows, D), padding included. Returns the same.
        """
        if self._copied is not None and len(x) == 1 and _is_recorded():
            return self._summed(self._copied.run(x))
        step = self._requests.step
        if step is None or not (step.pruned or step.gathered):
            return self._full(x)
        if not step.pruned or not self._for_experts_only(step):
            return self._whole(x, step)
        if len(step.pruned) == len(x):
            return self._experts(x, step)
        y = torch.zeros_like(x)
        if not step.whole:  # rows after the step's are padding
            y[: step.rows] = self._experts(x[: step.rows], step)
            return y
        whole, pruned = step.indices(x.device)
        y[pruned] = self._experts(x[pruned], step)
        z = self._neurons(x[whole])
        self._gather(z, step, {row: at for at, row in enumerate(step.whole)})
        y[whole] = self._written(z)
        return y

    def _for_experts_only(self, step: StepPlan) -> bool:
        """Whether the pruned rows can be computed for experts only. A preempted request comes back with too many."""
        return self._copied is not None or (self.native is not None and len(step.pruned) <= kernel.MAX_ROWS)

    def _neurons(self, x: Tensor) -> Tensor:
        z: Tensor = self._activate(self._read(x)[0])
        return z

    def _written(self, z: Tensor) -> Tensor:
        y: Tensor = self._write(z)[0]
        return y

    def _whole(self, x: Tensor, step: StepPlan | None = None) -> Tensor:
        """Compute rows by vLLM's layers. In pruned rows, neurons that are no experts are set to zero."""
        z = self._neurons(x)
        if step is not None:
            self._gather(z, step, None)
            for row, request in step.pruned:
                z[row] *= self._mask(request, z)
            self._counts.masked += len(step.pruned)
        return self._written(z)

    def _mask(self, request: RequestState, like: Tensor) -> Tensor:
        layer = self.block.layer
        if layer not in request.masks:
            mask = torch.zeros(self.block.width, dtype=like.dtype, device=like.device)
            request.masks[layer] = mask.index_fill_(0, request.experts[layer].to(like.device), 1)
        return request.masks[layer]

    def _gather(self, z: Tensor, step: StepPlan, place: dict[int, int] | None) -> None:
        """Add the prompt tokens of a step to the statistics of their requests. `place` maps rows of the step to z's."""
        if not step.gathered:
            return
        norms = None
        if self._ranks > 1:  # the row's other neurons are on other ranks
            norms = tensor_model_parallel_all_reduce(z.float().square().sum(dim=1)).clamp_min(_ZERO)
        for request, begin, end in step.gathered:
            start = begin if place is None else place[begin]
            rows = slice(start, start + end - begin)
            squared_norms = None if norms is None else norms[None, rows]
            request.statistics.add(self.block.layer, z[None, rows], None, squared_norms)

    def _experts(self, x: Tensor, step: StepPlan) -> Tensor:
        """Compute pruned rows by the native library, or from the copy. Shapes: x (pruned rows, D), as returned."""
        if self._copied is not None:
            self._counts.copied += len(x)
            return self._summed(self._copied.run(x))
        assert self.native is not None
        experts, row_mask = step.set_of(self.block.layer, self.block.width)
        self._counts.native += len(x)
        readable = x.float() if x.dtype == torch.float16 else x
        return self._summed(kernel.ff(self.native, readable, experts, row_mask).to(x.dtype))

    def _summed(self, y: Tensor) -> Tensor:
        """The sum over the ranks."""
        return tensor_model_parallel_all_reduce(y) if self._ranks > 1 else y

    def _why_not_native(self, weights: Weights) -> str | None:
        """Why the native library cannot compute this block; `None` if it can."""
        if (reason := library.why_not()) is not None:
            return reason
        for projection in (self._input, self._output):
            weight = weights.get(projection, (projection.weight, None))[0]
            if weight.device.type != "cpu" or weight.dtype not in _DTYPES or weight.numel() == 0:
                return f"{self.block.path} has weights of {weight.dtype} on {weight.device} that it cannot read"
        if not self._output.reduce_results or self._output.skip_bias_add:
            return f"{self.block.path} leaves its sum over the ranks, or its bias, to another layer"
        if self._activation() is None:
            return f"{self.block.path} has an activation that the native library does not know"
        return None

    @torch.no_grad()
    def _refuse_other_terms(self) -> None:
        """Refuse a module whose forward has terms of its own (Falcon-H1 multiplies), by trying it out."""
        if self._in_layer:
            return
        weight = self._input.weight
        x = torch.linspace(-1, 1, self._input.input_size, dtype=weight.dtype, device=weight.device)[None]
        y, expected = self._full(x), self._whole(x)
        tolerance = 0.01 * float(expected.abs().max())
        if not isinstance(y, Tensor) or not torch.allclose(y, expected, rtol=0, atol=tolerance, equal_nan=True):
            raise ValueError(
                f"{self.block.path}: {type(self.block.module).__name__} computes more than its projections and its "
                "activation, so GRIFFIN cannot prune it here"
            )

    def _activation(self) -> str | None:
        if not self.block.gated:
            return activation.name_of(self._activate)
        # The module takes gate and up in one row: with an up of ones it gives act(gate).
        return activation.name_of(lambda gate: self._activate(torch.stack([gate, torch.ones_like(gate)], 1))[:, 0])

    def _projections(self, weights: Weights) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """Weight and bias of the input and of the output projection; the latter's bias on rank 0 alone."""
        read = weights.get(self._input, (self._input.weight, self._input.bias))
        write, bias = weights.get(self._output, (self._output.weight, self._output.bias))
        return read, (write, bias if self._rank == 0 else None)

    def _copied_block(self, weights: Weights, most: int) -> Copied:
        read, write = self._projections(weights)
        return Copied(read, write, self._activate, self.block.gated, most)

    def _native_block(self, weights: Weights) -> operands.Block:
        """The block for the native library: gate and up where vLLM loaded them, down neuron-major."""
        (read, read_bias), (write, write_bias) = self._projections(weights)
        parts = 2 if self.block.gated else 1
        biases = [None] * parts if read_bias is None else list(read_bias.chunk(parts))
        inputs = [operands.matrix(*pair) for pair in zip(read.detach().chunk(parts), biases, strict=True)]
        down = operands.matrix(write.detach().t().contiguous(), write_bias, neuron_major=True)
        name = self._activation()
        assert name is not None
        return operands.ff_block(inputs[0] if self.block.gated else None, inputs[-1], down, activation=name)

    def _patch(self, layers: dict[str, Any] | None) -> None:
        name = f"{self._output.prefix}.griffin"  # vLLM's names are unique in an engine, a draft model's included
        forward = self.run if layers is None else operator.registered(self, name, layers)
        if not self._in_layer:
            self.block.module.forward = forward
            return
        # The decoder layer calls the projections itself: let the output projection compute the whole block.
        self._input.forward = lambda x: (x, None)
        setattr(self.block.module, self._activation_name, nn.Identity())  # all layers share one activation: replace it
        self._output.forward = lambda x: (forward(x), None)
