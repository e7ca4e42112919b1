"""Where a model's FF blocks are, by the layouts of `griffin.families`.

A `Layout` names the projections of one FF block: those that read the block's input and the one that writes its output.
That is all that GRIFFIN has to know: the input projections are computed for the experts only, whatever the model puts
between them (activation, gate, clamp) works on the experts alone, and the output projection reads the experts only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from griffin.activation import activation_of
from griffin.families import LAYOUTS, Layout
from griffin.weights.projection import bias_of, device_of, is_plain, nbytes_of, rows, shape_of
from griffin.weights.quantised import QuantisedLinear

# Families that a row would fit, but whose neurons are not independent of each other: model_type and why.
_TOP_NEURONS = "its gate is cut at a threshold over all neurons of a token (activation_sparsity_pattern)"
_NOT_INDEPENDENT = {"gemma3n": _TOP_NEURONS, "gemma3n_text": _TOP_NEURONS}


@dataclass(frozen=True, eq=False)
class FFBlock:
    """One FF block of a model, found by a layout.

    Args:
        layer: index of the decoder layer.
        path: name of the module that holds the projections, from the model's root.
        layout: the row that found it.
        module: the module that holds the projections.
        inputs: the input projections, in the layout's order.
        output: the output projection.
        width: D_ff, the number of neurons.
    """

    layer: int
    path: str
    layout: Layout
    module: nn.Module
    inputs: tuple[nn.Module, ...]
    output: nn.Module
    width: int

    @property
    def gated(self) -> bool:
        """Whether the block has a gate."""
        return self.layout.gated

    @property
    def device(self) -> torch.device:
        """Where the weights of the output projection are."""
        return device_of(self.output)

    @property
    def activation(self) -> str | None:
        """Name of the block's activation in `griffin.activation.ACTIVATIONS`; `None` for another one."""
        return activation_of(self.module)

    @property
    def parameters(self) -> int:
        """Number of weights that belong to neurons: the rows of the input projections, the columns of the output."""
        weights = sum(math.prod(shape_of(projection)) for projection in (*self.inputs, self.output))
        return weights + sum(bias_of(projection).numel() for projection in self.inputs)

    @property
    def nbytes(self) -> int:
        """Bytes of those weights as they are stored, scales included."""
        weights = sum(nbytes_of(projection) for projection in (*self.inputs, self.output))
        return weights + sum(bias_of(projection).nbytes for projection in self.inputs)

    @property
    def quantised(self) -> bool:
        """Whether some of the weights are packed: a `QuantisedLinear`, which has no `weight`."""
        return any(isinstance(projection, QuantisedLinear) for projection in (*self.inputs, self.output))

    def stored(self) -> list[Tensor]:
        """The projections' weights as they are stored, packed ones too."""
        projections = (*self.inputs, self.output)
        return [p.stored if isinstance(p, QuantisedLinear) else rows(p)[0] for p in projections]

    def input_weights(self) -> list[Tensor]:
        """Weights that read the block's input, one tensor for the gate (if there is one) and one for `W_1`.

        Shapes: each (D_ff, D).
        """
        weights = [rows(module)[0] for module in self.inputs]
        return list(weights[0].chunk(2)) if self.layout.fused else weights

    def input_norms(self) -> list[Tensor]:
        """L2 norms of the rows of `input_weights`, of packed ones too.

        Shapes: each (D_ff,), float32.
        """
        norms = []
        for projection in self.inputs:
            if isinstance(projection, QuantisedLinear):
                norms += projection.row_norms()
            else:
                own: Tensor = torch.linalg.vector_norm(rows(projection)[0].detach().float(), dim=1)
                norms += own.chunk(2) if self.layout.fused else [own]
        return norms

    def output_norms(self) -> Tensor:
        """L2 norms of the output projection's columns, one a neuron, of packed ones too.

        Shapes: (D_ff,), float32.
        """
        if isinstance(self.output, QuantisedLinear):
            return self.output.row_norms()[0]
        norms: Tensor = torch.linalg.vector_norm(rows(self.output)[0].detach().float(), dim=0)
        return norms


def find_ff_blocks(model: nn.Module, layout: Layout | None = None) -> list[FFBlock]:
    """Find the FF block of every decoder layer.

    Args:
        model: a Transformers causal language model, or its decoder.
        layout: a row of one's own, tried instead of `LAYOUTS`.

    Returns:
        One block for each decoder layer, in order.

    Raises:
        ValueError: the model is an encoder-decoder or a mixture of experts, a layer has no FF block or several of
            them, or its projections are not plain ones. The message says what was found and what to add.
    """
    config = getattr(model, "config", None)
    name = getattr(config, "model_type", None) or type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; GRIFFIN prunes decoder-only models")
    if name in _NOT_INDEPENDENT:
        raise ValueError(
            f"{name}: {_NOT_INDEPENDENT[name]}, so the neurons are not independent of each other; this family is not "
            "supported"
        )
    prefix, layers = decoder_layers(model)
    candidates = LAYOUTS if layout is None else (layout,)
    return [_block_of(index, f"{prefix}.{index}", layer, candidates, name) for index, layer in enumerate(layers)]


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder's layers: the ModuleList of the decoder that is as long as the config says.

    Raises:
        ValueError: there is none.
    """
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else model
    decoder = model if decoder is None else decoder
    text_config = getattr(decoder, "config", None)
    # BART's num_hidden_layers counts the encoder's.
    count = getattr(text_config, "decoder_layers", None) or getattr(text_config, "num_hidden_layers", None)
    paths = {id(module): path for path, module in model.named_modules()}
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    matching = [modules for modules in lists if len(modules) == count]
    if not matching:
        lengths = sorted({len(modules) for modules in lists})
        name = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
        raise ValueError(
            f"{name}: found no list of {count} decoder layers (lists of modules here have lengths {lengths}); "
            "GRIFFIN needs a Transformers decoder with its layers in one nn.ModuleList"
        )
    return paths[id(matching[0])], matching[0]


def _block_of(index: int, path: str, layer: nn.Module, candidates: Sequence[Layout], name: str) -> FFBlock:
    _refuse_moe(index, layer, name)
    for layout in candidates:
        owners = [(p, module) for p, module in layer.named_modules() if _has(module, (*layout.inputs, layout.output))]
        if len(owners) > 1:
            listed = ", ".join(p for p, _ in owners[:4]) + (", ..." if len(owners) > 4 else "")
            raise ValueError(
                f"{name}: layer {index} has {len(owners)} FF blocks ({listed}); GRIFFIN prunes dense models, with "
                "exactly one FF block a layer"
            )
        if owners:
            inner, module = owners[0]
            return _checked(index, f"{path}.{inner}" if inner else path, layer, module, layout, name)
    shapes = ", ".join(
        f"{p} {tuple(module.weight.shape)}"
        for p, module in layer.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
    )
    tried = "; ".join(str(layout) for layout in candidates)
    raise ValueError(
        f"{name}: layer {index} has no FF block of a known layout. Found: {shapes}. Tried: {tried}. If it has one, "
        "name its projections: griffin.attach(model, layout=griffin.Layout(inputs=('gate', 'up'), output='down'))"
    )


def _refuse_moe(index: int, layer: nn.Module, name: str) -> None:
    for path, module in layer.named_modules():
        kind = type(module).__name__
        if path and any(word in f"{path} {kind}".lower() for word in ("expert", "router", "moe")):
            raise ValueError(
                f"{name}: layer {index} is a mixture of experts (found {path!r}, a {kind}); GRIFFIN prunes dense "
                "models, with exactly one FF block a layer"
            )


def _has(module: nn.Module, names: Sequence[str]) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _checked(index: int, path: str, layer: nn.Module, module: nn.Module, layout: Layout, name: str) -> FFBlock:
    inputs = tuple(getattr(module, attribute) for attribute in layout.inputs)
    output = getattr(module, layout.output)
    for attribute, projection in zip((*layout.inputs, layout.output), (*inputs, output), strict=True):
        if not (is_plain(projection) or isinstance(projection, QuantisedLinear)):
            raise ValueError(
                f"{name}: {path}.{attribute} is a {type(projection).__module__}.{type(projection).__name__}, not a "
                "plain Linear or Conv1D of floating-point weights; load the model unquantised and without adapters"
            )
    for child, other in _others(layer, module, layout):
        if any(parameter.numel() > 1 for parameter in other.parameters()):
            raise ValueError(
                f"{name}: {path}.{child} ({type(other).__name__}) has weights of its own inside the FF block, so the "
                "neurons are not independent of each other; this family is not supported"
            )
    width = shape_of(output)[1]
    expected = 2 * width if layout.fused else width
    for attribute, projection in zip(layout.inputs, inputs, strict=True):
        if shape_of(projection)[0] != expected:
            raise ValueError(
                f"{name}: {path}.{attribute} writes {shape_of(projection)[0]} values, but {layout.output} reads "
                f"{width}; expected {expected} for the layout {layout}"
            )
    return FFBlock(index, path, layout, module, inputs, output, width)


def _others(layer: nn.Module, module: nn.Module, layout: Layout) -> Iterator[tuple[str, nn.Module]]:
    """Submodules of the FF block other than its projections. A block that is the decoder layer itself (OPT) has none.

    Only scalars are allowed in them (the xIELU activation learns two): a norm between the projections would tie the
    neurons to each other.
    """
    if module is layer:
        return iter(())
    named = {*layout.inputs, layout.output}
    return ((child, other) for child, other in module.named_children() if child not in named)
