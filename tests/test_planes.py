"""Precision by prompt and token (`planes+`), against plain loops over codes and neurons."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import griffin
from conftest import tiny_llama
from griffin import GriffinConfig
from griffin.analysis import profiling
from griffin.gguf import types
from griffin.gguf.dequantise import unpack
from griffin.layouts import find_ff_blocks
from griffin.method import planes
from griffin.method.planes import PlaneSplit
from griffin.method.profile import Profile
from griffin.models.convert import convert
from griffin.native import grouped, library

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason=f"{library.why_not()}")
TYPES = {kind.name: kind for kind in vars(types).values() if getattr(kind, "name", None) in grouped.GGUF_TYPES}
ZERO = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128, "Q6_K": 32, "Q3_K": 4}  # the code of 0, where codes are signed
PROMPT = torch.tensor([[5, 17, 3, 88, 41, 9, 60, 22, 71, 13, 2], [7, 7, 12, 90, 4, 33, 18, 2, 61, 50, 11]])
LATER = torch.tensor([[8, 30, 77], [19, 5, 64]])


def blocks_of(name: str, count: int) -> np.ndarray[Any, Any]:
    """Blocks of random bytes whose scales are finite."""
    kind = TYPES[name]
    blocks = np.random.default_rng(1).integers(0, 256, (count, kind.bytes), dtype=np.uint8)
    for at in {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(
        name, (0, 2) if name in ("Q4_K", "Q5_K") else (0,)
    ):
        blocks[:, at : at + 2] = np.frombuffer(np.float16(0.05).tobytes(), np.uint8)
    return blocks


@pytest.mark.parametrize("neuron_major", [False, True])
@pytest.mark.parametrize("name", sorted(TYPES))
def test_reduced_weights_are_the_high_bits_of_the_codes(name: str, neuron_major: bool) -> None:
    d_out, d_in = 128, 512
    blocks = blocks_of(name, d_out * d_in // TYPES[name].block)
    packed = grouped.from_gguf(name, torch.from_numpy(blocks.reshape(-1)), d_out, d_in, neuron_major=neuron_major)
    groups, zero, bits = unpack(blocks, TYPES[name]), ZERO.get(name, 0), packed.format.bits
    for count in range(1, len(packed.format.planes) + 1):
        left = bits - sum(packed.format.planes[:count])
        codes = groups.codes.astype(np.int64) + zero
        kept = (codes >> left << left) + (2**left - 1) / 2 - zero
        expected = torch.from_numpy(kept * groups.scales + (0 if groups.offsets is None else groups.offsets))
        found = packed.reduced(count).unpack()
        torch.testing.assert_close(
            (found.T if neuron_major else found).double(), expected.reshape(d_out, d_in).double()
        )
    some = torch.tensor([3, 99, 64])
    torch.testing.assert_close(packed.reduced(1).unpack(some), packed.reduced(1).unpack()[some], rtol=0, atol=0)


def test_bytes_of_planes_add_up_to_the_row() -> None:
    for name, neuron_major in product(sorted(TYPES), (False, True)):
        packed = grouped.empty(grouped.gguf_format(name)[0], 512, 512, neuron_major=neuron_major)
        found = [packed.row_bytes(count) for count in range(1, len(packed.format.planes) + 1)]
        per_plane = [512 * bits / 8 for bits in packed.format.planes]
        assert found[-1] == packed.row_bytes() == packed.rows.shape[1] / 32
        assert [b - a for a, b in pairwise(found)] == per_plane[1:]
        assert found[0] - (0 if neuron_major else 64) * (found[0] > 128) <= 128 + 512 // 16 * 2 + 64


def quantised(weights: str = "int4", **settings: Any) -> Any:
    model = tiny_llama(torch.float32, **{"hidden_size": 256, "intermediate_size": 320} | settings)
    convert(model, weights)
    return model


def naive(block: Any, split: PlaneSplit, prompt: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One sequence's FF block, token by token and neuron by neuron. Shapes: prompt (S, D), x (T, D)."""
    parts = planes.parts(block)
    by_planes = [[part.reduced(count).unpack() for count in range(1, 5)] for part in parts]
    gate, up, down = (every[-1] for every in by_planes)  # down: (D_ff, D)
    ups = prompt @ up.T
    rms = ups.square().mean(dim=0).sqrt()
    z = F.silu(prompt @ gate.T) * ups
    statistic = (z / z.norm(dim=1, keepdim=True)).square().sum(dim=0).sqrt()
    experts, whole = (statistic.topk(k).indices.tolist() for k in (split.experts, split.whole))
    rows = []
    for token in x:
        gates = {j: F.silu((gate if j in whole else by_planes[0][split.first - 1])[j] @ token) for j in experts}
        worth = {j: float(abs(g) * rms[j] * down[j].norm()) for j, g in gates.items()}
        order = sorted(worth, key=worth.__getitem__, reverse=True)
        y = torch.zeros(x.shape[1])
        for place, j in enumerate(order):
            level = sum(place < count for count in split.levels)
            if level:
                y += gates[j] * (by_planes[1][level - 1][j] @ token) * by_planes[2][level - 1][j]
        rows.append(y)
    return torch.stack(rows)


def later(model: Any, handle: Any, prompt: torch.Tensor = PROMPT) -> torch.Tensor:
    with torch.no_grad():
        with handle.prompt_phase():
            cache = model(prompt).past_key_values
        with handle.generation_phase():
            return model(LATER, past_key_values=cache).logits


@torch.no_grad()
@pytest.mark.parametrize(
    "split",
    [
        PlaneSplit(320, 100, 1, (200, 90), 0),
        PlaneSplit(250, 0, 1, (250, 0), 0),
        PlaneSplit(250, 250, 2, (80, 80), 0),
        PlaneSplit(300, 40, 2, (260, 200, 90, 20), 0),
    ],
)
@pytest.mark.parametrize("batch", ["shared", "per_sequence"])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_backend_is_the_naive_computation(
    split: PlaneSplit, batch: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planes, "split", lambda block, density, curve: split)
    model = quantised("int8" if len(split.levels) == 4 else "int4")
    mlp = model.model.layers[0].mlp
    with griffin.attach(model, selection="planes+topk", density=0.5, batch=batch, backend=backend) as handle:
        seen: list[torch.Tensor] = []
        hooks = (
            mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
            mlp.register_forward_hook(lambda _, args, output: seen.append(output)),
        )
        later(model, handle, PROMPT if batch == "per_sequence" else PROMPT[:1].repeat(2, 1))
        for hook in hooks:
            hook.remove()
        prompt, _, x, y = seen
        for row in range(2):
            expected = naive(handle.blocks[0], split, prompt[row], x[row])
            if backend == "reference":
                torch.testing.assert_close(y[row], expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
            else:  # inputs are of 8 bits there, which also moves a neuron or two over the edge of a level
                assert float((y[row] - expected).norm() / expected.norm()) < 0.1
        assert handle.sparse_calls == 3  # layers


def test_all_planes_of_all_neurons_are_the_full_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantised()
    width = find_ff_blocks(model)[0].width
    monkeypatch.setattr(planes, "split", lambda block, density, curve: PlaneSplit(width, width, 2, (width, width), 0))
    with griffin.attach(model, selection="planes+topk", density=0.9) as handle:
        found = later(model, handle)
    with griffin.attach(model, selection="topk", density=1.0) as handle:
        expected = later(model, handle)
    assert float((found - expected).norm() / expected.norm()) < 0.08  # products of the full model round their inputs


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_a_split_spends_its_bytes(weights: str) -> None:
    block = find_ff_blocks(quantised(weights))[0]
    gate, up, down = planes.parts(block)
    before = 0
    for density in (0.35, 0.5, 0.6, 0.75, 0.9):
        split = planes.split(block, density)
        counts = [*split.levels, 0]
        read = split.whole * gate.row_bytes() + (split.experts - split.whole) * gate.row_bytes(split.first)
        for level, (n, more) in enumerate(pairwise(counts), 1):
            read += (n - more) * (up.row_bytes(level) + down.row_bytes(level))
        assert split.nbytes == read + down.scales.numel()  # type: ignore[union-attr]
        assert 0.98 * density * block.nbytes < split.nbytes <= density * block.nbytes
        assert split.experts >= max(split.whole, *split.levels)
        assert list(split.levels) == sorted(split.levels, reverse=True)
        assert split.nbytes > before
        before = split.nbytes


def test_levels_lose_no_more_than_any_other_counts() -> None:
    energy = planes._fine(planes.TYPICAL.token, 24)
    lost, costs = torch.tensor([1.0, 0.24, 0.0]), torch.tensor([0.0, 5.0, 9.0])
    for budget in (1.0, 2.5, 4.0, 7.0):
        found = planes._levels(energy, lost, costs, budget, 1.0)
        assert found is not None

        def of(counts: Any) -> tuple[float, float]:
            level = planes._level_of(torch.tensor(counts), 24)
            return float((energy * lost[level]).sum()), float(costs[level].mean())

        mine, spent = of(found)
        assert spent <= budget
        others = [of((n, m)) for n in range(25) for m in range(n + 1)]
        assert mine <= min(loss for loss, cost in others if cost <= spent) + 1e-6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"selection": "planes+sample"}, "among experts chosen by topk"),
        ({"selection": "planes+dynamic+topk"}, "among experts chosen by topk"),
        ({"selection": "planes+magnitude"}, "cannot be refined"),
        ({"selection": "planes+topk", "backend": "gather"}, "copies experts once a prompt"),
        ({"selection": "planes+topk", "density": 0.02}, "too small for planes"),
    ],
)
def test_what_planes_cannot_do_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        griffin.attach(quantised(), **settings)


def test_weights_without_planes_are_refused() -> None:
    with pytest.raises(ValueError, match="not stored in planes of bits"):
        griffin.attach(tiny_llama(torch.float32), selection="planes+topk")


def test_the_name_is_canonical() -> None:
    assert GriffinConfig(selection="planes + prior+topk").selection == "prior+planes+topk"
    assert GriffinConfig(selection="planes+topk").needs == {"ups"}


@torch.no_grad()
def test_a_profile_measures_the_curves(tmp_path: Path) -> None:
    model = tiny_llama(torch.float32, max_position_embeddings=600)
    sequences = torch.randint(3, 90, (2, profiling.TOKENS))
    profile = profiling.prior(model, sequences, {"model": "tiny"})
    profile = profiling.with_curves(profile, model, sequences)
    block, totals = find_ff_blocks(model)[1], torch.zeros(2, 20, dtype=torch.float64)
    seen: list[torch.Tensor] = []
    hook = block.module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    gate, up, down = (p.weight for p in (*block.inputs, block.output))
    for row in sequences:
        model(row[None])
        a, u = F.silu(seen[-1] @ gate.T), seen[-1] @ up.T
        z, half = a * u, 256
        statistic = (z[:half] / z[:half].norm(dim=1, keepdim=True)).square().sum(dim=0)
        worth = a.abs() * u[:half].square().mean(dim=0).sqrt() * down.norm(dim=0)
        lost = (z * down.norm(dim=0)).square()
        for token in range(half, len(row)):
            for at, order in enumerate((worth[token], statistic)):
                ranked = sorted(range(block.width), key=order.tolist().__getitem__, reverse=True)
                for part, places in enumerate(torch.tensor(ranked).tensor_split(20)):
                    totals[at, part] += float(lost[token, places].sum())
    hook.remove()
    expected = totals / totals.sum(dim=1, keepdim=True)
    found = torch.tensor([profile.curves[1].token, profile.curves[1].prompt], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    profile.save(tmp_path / "a.safetensors")
    again = Profile.load(tmp_path / "a.safetensors")
    assert again.curves == profile.curves
    assert again.digest != replace(again, curves={}).digest
