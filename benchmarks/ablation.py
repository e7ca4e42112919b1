"""What each idea for less loss at equal bytes is worth, alone and together: KL(full || method) and top-1 agreement.

    python benchmarks/ablation.py MODEL DATA --weights bf16|int8|int4 --bytes 0.5,0.75 [--methods NAME,...] -o FILE.csv

MODEL is whatever `griffin.load` takes, with gated FF blocks; DATA is the folder of local data files, see
docs/evaluation.md. Of each sequence the prompt runs through the full model once; the continuation is teacher-forced,
with every method from a copy of the same cache and sums. Everything is computed in float32, in torch, on masks: no
kernel, no rounding of weights but a sketch's, nothing of the library's selections or backends, so it checks those
independently. `--weights` says only in which format the bytes are counted. `--bytes` is the share of the FF weights
that a method may read per token: the neurons, the gates or the sketch of them, the tier's and the compensation's
vectors (float32), and the full passes of the reselection, spread over the tokens between them.

A method is a row of `METHODS`; one that the bytes do not allow is left out. Ratios are to `griffin` at the same bytes;
intervals are bootstrapped over sequences (of a ratio: paired). The prior comes from other texts than those measured.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from texts import kinds, prior_texts
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from griffin.analysis import files, machine
from griffin.analysis.bootstrap import mean_interval
from griffin.cli.arguments import parse_densities
from griffin.errors import GriffinError
from griffin.layouts import FFBlock, find_ff_blocks
from griffin.models.load import load
from griffin.weights.projection import rows

BITS = {"bf16": 16.0, "int8": 8.0, "int4": 4.5}  # a weight, int4 with the float16 scales of its groups
GROUP = 32  # weights that share a scale in int4
PRIOR_TOKENS = 512  # of each of the prior's windows
PRIOR_WINDOWS = 8  # of each of the prior's four texts: 16k tokens
_LOGITS_AT_A_TIME = 2**22


@dataclass(frozen=True)
class Method:
    """What is read per token, and by which scores.

    Args:
        statistic: name of the sums in `Sums` that rank the neurons.
        prior: pseudo-tokens of average text that are added to the prompt's sums.
        mix: "ranks": neurons by the mean of their ranks in the prompt's and in the prior's statistic (GLASS); "core":
            half of the experts by the prior's alone, the rest by the prompt's.
        budgets: layers get the k at which each keeps the same share of its sum of scores, instead of the same k.
        compensation: the dropped neurons' mean contribution over the prompt is added as a constant vector.
        tier: which gates are read before the k neurons of each token are chosen by `|act(gate)| * rms(u) * ||W_2||`:
            "own" of the experts, or a sketch in "int4" or "int8" of all neurons, whose activation is then used too.
            "exact" is the bound, the k largest `|z| * ||W_2||` of all neurons, as if finding them cost no bytes.
        gates: share of the neurons that the tier "own" reads the gates of; 0 for 1.5 times the share of bytes.
        reselect: after so many tokens the full model runs over them again, and experts are chosen anew; 0 for never.
    """

    statistic: str = "energy"
    prior: float = 0.0
    mix: str = ""
    budgets: bool = False
    compensation: bool = False
    tier: str = ""
    gates: float = 0.0
    reselect: int = 0


METHODS = {
    "griffin": Method(),
    "output-aware": Method(statistic="output_energy"),
    "output-aware-raw": Method(statistic="output_squares"),
    "prior-32": Method(prior=32),
    "prior-100": Method(prior=100),
    "prior-400": Method(prior=400),
    "rank-mix": Method(mix="ranks"),
    "core": Method(mix="core"),
    "budgets": Method(budgets=True),
    "compensation": Method(compensation=True),
    "own-0.6": Method(tier="own", gates=0.6),
    "own-0.75": Method(tier="own", gates=0.75),
    "own-0.9": Method(tier="own", gates=0.9),
    "own-1.0": Method(tier="own", gates=1.0),
    "sketch-int4": Method(tier="int4"),
    "sketch-int8": Method(tier="int8"),
    "exact": Method(tier="exact"),
    "reselection": Method(reselect=32),
    "prior+own": Method(prior=100, tier="own"),
    "prior+own+reselection": Method(prior=100, tier="own", reselect=32),
    "prior+own+compensation": Method(prior=100, tier="own", compensation=True),
    "own+budgets": Method(tier="own", budgets=True),
    "prior+sketch": Method(prior=100, tier="int4"),
    "prior+sketch+reselection": Method(prior=100, tier="int4", reselect=32),
    "sketch+budgets": Method(tier="int4", budgets=True),
}


@dataclass(frozen=True)
class Sums:
    """Sums over tokens, of each neuron of an FF block.

    `energy` is the flocking statistic's, `output_energy` the same of `z_j * ||W_2[:, j]||`, `output_squares` that
    without scaling tokens to unit norm; `up_squares` of `W_1 x`, `gate` of `|act(W_g x)|`, and `z`.

    Shapes:
        totals: each (D_ff,).
    """

    tokens: float
    totals: dict[str, Tensor]

    @classmethod
    def of(cls, gate: Tensor, up: Tensor, z: Tensor, norms: Tensor) -> Sums:
        """Sums of the tokens of a pass.

        Shapes:
            gate (activated), up, z: (1, S, D_ff). norms: (D_ff,).
        """
        output = z * norms
        values = {
            "energy": F.normalize(z, dim=-1).square(),
            "output_energy": F.normalize(output, dim=-1).square(),
            "output_squares": output.square(),
            "up_squares": up.square(),
            "gate": gate.abs(),
            "z": z,
        }
        return cls(z.shape[1], {name: value.sum(dim=(0, 1)) for name, value in values.items()})

    def plus(self, other: Sums, tokens: float | None = None) -> Sums:
        """With the other's sums added: as they are, or as if they came from so many tokens."""
        scale = 1.0 if tokens is None else tokens / other.tokens
        totals = {name: total + scale * other.totals[name] for name, total in self.totals.items()}
        return Sums(self.tokens + scale * other.tokens, totals)


@dataclass(frozen=True)
class Chosen:
    """What an FF block computes for the tokens of a method.

    Args:
        experts: bool, (D_ff,); with a tier the neurons whose gates are read.
        gate: `W_g`, or the sketch of it.
        k: neurons of each token that the tier chooses.
        weights: the tier's, (D_ff,), times the absolute activated gate; of the bound, times the absolute z.
        exact: the tier is the bound.
        constant: the compensation, (D,), or 0.
    """

    experts: Tensor
    gate: Tensor
    k: int
    weights: Tensor | None
    exact: bool
    constant: Tensor | float


class FF:
    """A gated FF block whose forward is the full one, adding to `sums`, or that of `chosen`."""

    def __init__(self, block: FFBlock) -> None:
        biases = [part for part in (*block.inputs, block.output) if getattr(part, "bias", None) is not None]
        act: Callable[[Tensor], Tensor] | None = getattr(block.module, "act_fn", None)
        if not block.gated or biases or act is None:
            raise ValueError(f"{block.path} has no gate, biases or no act_fn; expected a gated FF block as Llama's")
        self.act = act
        self.gate, self.up = (weight.detach() for weight in block.input_weights())
        self.down = rows(block.output)[0].detach()
        self.norms = block.output_norms()
        self.width, self.d = self.up.shape
        self.sketches: dict[str, Tensor] = {}
        self.sums: Sums | None = None
        self.chosen: Chosen | None = None
        block.module.forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.chosen
        gate = self.act(F.linear(x, self.gate if chosen is None else chosen.gate))
        up = F.linear(x, self.up)
        z = gate * up
        if chosen is None:
            own = Sums.of(gate, up, z, self.norms)
            self.sums = own if self.sums is None else self.sums.plus(own)
            return F.linear(z, self.down)
        z = z.masked_fill(~chosen.experts, 0.0)
        if chosen.weights is not None:
            scores = (z if chosen.exact else gate).abs() * chosen.weights
            kept = scores.masked_fill(~chosen.experts, -1.0).topk(chosen.k, dim=-1, sorted=False).indices
            z = torch.zeros_like(z).scatter(-1, kept, z.gather(-1, kept))
        return F.linear(z, self.down) + chosen.constant

    def sketch(self, weights: str) -> Tensor:
        """A copy of `W_g` rounded to int4, in groups of 32, or to int8, in rows; made once."""
        if weights not in self.sketches:
            size, levels = (GROUP, 8) if weights == "int4" else (self.d, 128)
            if self.d % size:
                raise ValueError(f"D = {self.d} is no multiple of {size}; leave out the methods with a sketch in int4")
            groups = self.gate.reshape(self.width, -1, size)
            scales = groups.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / (levels - 0.5)
            rounded = (groups / scales).round().clamp(-levels, levels - 1) * scales
            self.sketches[weights] = rounded.reshape(self.gate.shape)
        return self.sketches[weights]


def reads(method: Method, share: float, bits: float, width: int, d: int) -> tuple[int, int] | None:
    """Neurons of a layer that a tier may choose from, and k, so that the bytes fit; `None` if they allow no such k.

    Args:
        share: of the bytes of the FF weights, that may be read per token.
        bits: of a weight. width, d: D_ff and D.
    """
    neuron = 3 * d * bits
    if method.reselect:
        share -= 1 / method.reselect
    left = share * width * neuron - (32 * d if method.compensation else 0)
    if method.tier in ("", "exact"):
        gates, k = width, int(left / neuron + 1e-6)
    elif method.tier == "own":
        gates = int(min(1.0, method.gates or 1.5 * share) * width)
        k = int((left - gates * (d * bits + 32)) / (2 * d * bits))
        if gates <= share * width:  # all of their neurons could be read
            return None
    else:
        gates = width
        k = min(width, int((left - gates * (d * BITS[method.tier] + 32)) / (2 * d * bits)))
        if BITS[method.tier] >= bits:
            return None
    return (gates, k) if k >= 1 else None


def layer_budgets(scores: Sequence[Tensor], total: int, most: Sequence[int]) -> list[int]:
    """k of each layer, `total` at most in all, so that the k largest scores of each have the same share of its sum.

    The share is found by bisection. A layer gets at least one neuron and no more than `most`.

    Shapes:
        scores: each (D_ff,), not negative.
    """
    ordered = [own.double().sort(descending=True).values.cumsum(0) for own in scores]
    curves = [own / own[-1] for own in ordered]
    low, high, counts = 0.0, 1.0, [1] * len(curves)
    for _ in range(40):
        share = (low + high) / 2
        tried = [min(limit, 1 + int((own < share).sum())) for own, limit in zip(curves, most, strict=True)]
        if sum(tried) <= total:
            low, counts = share, tried
        else:
            high = share
    return counts


def scores_of(method: Method, local: Sums, prior: Sums, k: int) -> Tensor:
    """What the experts are ranked by, (D_ff,)."""
    own, average = local.totals[method.statistic], prior.totals[method.statistic]
    if method.mix == "ranks":
        return (own.argsort().argsort() + average.argsort().argsort()) / 2
    if method.mix == "core":
        return own.scatter(0, average.topk(k // 2).indices, torch.inf)
    return own


def choose(ffs: Sequence[FF], method: Method, limits: Sequence[tuple[int, int]], priors: Sequence[Sums]) -> None:
    """Set what each block computes, from the sums in it."""
    sums = []
    for ff, prior in zip(ffs, priors, strict=True):
        assert ff.sums is not None
        sums.append(ff.sums.plus(prior, method.prior))
    ranked = [scores_of(method, s, p, k) for s, p, (_, k) in zip(sums, priors, limits, strict=True)]
    weights = [(s.totals["up_squares"] / s.tokens).sqrt() * ff.norms for s, ff in zip(sums, ffs, strict=True)]
    counts = [k for _, k in limits]
    if method.budgets:
        shares = [s.totals["gate"] * w for s, w in zip(sums, weights, strict=True)] if method.tier else ranked
        counts = layer_budgets(shares, sum(counts), [gates for gates, _ in limits])
    for ff, own, score, weight, (gates, _), k in zip(ffs, sums, ranked, weights, limits, counts, strict=True):
        experts = torch.zeros(ff.width, dtype=torch.bool)
        experts[score.topk(gates if method.tier else k).indices] = True
        dropped = (own.totals["z"] / own.tokens).masked_fill(experts, 0.0)
        ff.chosen = Chosen(
            experts=experts,
            gate=ff.sketch(method.tier) if method.tier in ("int4", "int8") else ff.gate,
            k=k,
            weights={"": None, "exact": ff.norms}.get(method.tier, weight),
            exact=method.tier == "exact",
            constant=F.linear(dropped, ff.down) if method.compensation else 0.0,
        )


def difference(full: Tensor, logits: Tensor) -> tuple[float, int]:
    """Sum over tokens of KL(full || logits), and number of tokens with the same likeliest one; in slices of rows.

    Shapes:
        full, logits: (G, vocabulary).
    """
    kl, agreed = 0.0, 0
    count = max(1, _LOGITS_AT_A_TIME // full.shape[1])
    for wanted, found in zip(torch.split(full, count), torch.split(logits, count), strict=True):
        kl += float(F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True))
        agreed += int((wanted.argmax(-1) == found.argmax(-1)).sum())
    return kl, agreed


class Case(NamedTuple):
    """A method at a share of bytes, and what it `reads` of each layer."""

    share: float
    name: str
    limits: list[tuple[int, int]]


class Measurement:
    """A model, its blocks, and the prior of each."""

    def __init__(self, model: PreTrainedModel, prior: Sequence[Tensor]) -> None:
        self.model = model
        check = prior[0][:, :64]
        before = model(check).logits
        self.ffs = [FF(block) for block in find_ff_blocks(model)]
        error = float((model(check).logits - before).abs().max() / before.abs().max())
        if not error < 1e-3:  # float32, summed in another order
            raise ValueError(f"the FF blocks computed here differ from the model's own: relative error {error:.2g}")
        self.start(None)
        for window in prior:
            model(window, use_cache=False, logits_to_keep=1)
        self.priors = self.sums()

    def start(self, sums: Sequence[Sums] | None) -> None:
        """Compute in full from now on, adding to these sums."""
        for number, ff in enumerate(self.ffs):
            ff.chosen, ff.sums = None, None if sums is None else sums[number]

    def sums(self) -> list[Sums]:
        return [ff.sums for ff in self.ffs if ff.sums is not None]

    def sequence(self, window: Tensor, prompt_tokens: int, cases: Sequence[Case]) -> list[tuple[float, float]]:
        """Mean KL and agreement of every case, over the tokens after the prompt.

        Shapes:
            window: (1, S + G).
        """
        prompt, rest = window[:, :prompt_tokens], window[:, prompt_tokens:]
        # Without a config no layer forgets what a sliding window has passed, so that it can be cropped; masks stay.
        cache = DynamicCache()
        self.start(None)
        self.model(prompt, past_key_values=cache, logits_to_keep=1)
        sums = self.sums()
        full = self.model(rest, past_key_values=copy.deepcopy(cache)).logits[0]
        found = []
        for case in cases:
            self.start(sums)
            kl, agreed = self.continuation(rest, copy.deepcopy(cache), full, case)
            found.append((kl / rest.shape[1], agreed / rest.shape[1]))
        return found

    def continuation(self, tokens: Tensor, cache: DynamicCache, full: Tensor, case: Case) -> tuple[float, int]:
        """As `difference`, of the logits of a case, from the sums in the blocks and a cache of its own."""
        step = METHODS[case.name].reselect or tokens.shape[1]
        kl, agreed, last = 0.0, 0, None
        for chunk, wanted in zip(torch.split(tokens, step, dim=1), torch.split(full, step), strict=True):
            if last is not None:  # the reselection: the full model over the tokens since the last one
                cache.crop(-last.shape[1])
                self.start(self.sums())
                self.model(last, past_key_values=cache, logits_to_keep=1)
            choose(self.ffs, METHODS[case.name], case.limits, self.priors)
            more = difference(wanted, self.model(chunk, past_key_values=cache).logits[0])
            kl, agreed, last = kl + more[0], agreed + more[1], chunk
        return kl, agreed


def windows(tokenizer: PreTrainedTokenizerBase, text: str, size: int, count: int) -> list[Tensor]:
    """Windows of `size` tokens, the tokenizer's BOS among them, from the middles of equal parts of a text.

    Raises:
        ValueError: the text is too short for windows that do not overlap.

    Shapes:
        Returns (1, size) each.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    bos = [tokenizer.bos_token_id] if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else []
    own = size - len(bos)
    if own < 1 or len(ids) < own * count:
        raise ValueError(f"a text has {len(ids)} tokens, too few for {count} sequences of {size}; ask for less")
    starts = [round((number + 0.5) / count * len(ids) - own / 2) for number in range(count)]
    return [torch.tensor([bos + ids[start : start + own]]) for start in starts]


def cases_of(names: Sequence[str], shares: Sequence[float], bits: float, ffs: Sequence[FF]) -> list[Case]:
    """The methods at every share of bytes that allows them, griffin first."""
    cases = []
    for share in shares:
        for name in dict.fromkeys(["griffin", *names]):
            limits = [reads(METHODS[name], share, bits, ff.width, ff.d) for ff in ffs]
            allowed = [own for own in limits if own is not None]
            if len(allowed) == len(ffs):
                cases.append(Case(share, name, allowed))
            elif name == "griffin":
                raise ValueError(f"--bytes {share:g} allows not one neuron; expected more")
            else:
                print(f"{name} is left out at {share:g} of the bytes, which do not allow it", file=sys.stderr)
    return cases


def row_of(case: Case, found: Tensor, base: Tensor, kinds: Sequence[str]) -> dict[str, Any]:
    """The figures of a case over all sequences, beside griffin's at the same bytes.

    Shapes:
        found, base: (N, 2), KL and agreement of each sequence. kinds: N.
    """
    kl, agreement = found.unbind(dim=1)
    row: dict[str, Any] = {"bytes": case.share, "method": case.name}
    intervals = {
        "kl": mean_interval(kl),
        # The mean of the ratios, weighted with griffin's KL, is the ratio of the means.
        "ratio": mean_interval(kl / base[:, 0], weights=base[:, 0]),
        "agreement": mean_interval(agreement),
    }
    for name, own in intervals.items():
        row |= {name: own.value, f"{name}_low": own.low, f"{name}_high": own.high}
    for kind in dict.fromkeys(kinds):
        row[f"kl_{kind}"] = float(kl[[own == kind for own in kinds]].mean())
    return row


def print_figures(measured: Sequence[dict[str, Any]], kinds: Sequence[str]) -> None:
    widths = [max(7, len(kind)) for kind in kinds]
    names = "  ".join(f"{kind:>{width}}" for kind, width in zip(kinds, widths, strict=True))
    print(f"bytes  {'method':24}     KL  to griffin, 95% interval  agreement  {names}")
    for row in measured:
        ratio = f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"
        each = "  ".join(f"{row[f'kl_{kind}']:{width}.3f}" for kind, width in zip(kinds, widths, strict=True))
        print(f"{row['bytes']:5g}  {row['method']:24}  {row['kl']:.3f}  {ratio:>24}  {row['agreement']:9.3f}  {each}")


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """Measure every method on every sequence, print the table and write the file.

    Raises:
        ValueError: wrong arguments, or a model whose FF blocks are not plain gated ones.
        GriffinError, OSError: a file that cannot be read or written.
    """
    names = args.methods.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"--methods has {unknown[0]!r}; expected some of {', '.join(METHODS)}")
    if wrong := [share for share in args.bytes if not 0.0 < share < 1.0]:
        raise ValueError(f"--bytes has {wrong[0]:g}; expected shares between 0 and 1")
    for name in ("prompt", "generate", "sequences"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; expected a whole number from 1")
    files.check_writable(args.output)
    begin, load_average = time.perf_counter(), machine.load_average()
    model, tokenizer = load(args.model, dtype="f32", device="cpu")
    size, known = args.prompt + args.generate, kinds(args.data)
    cut = [own for text in known.values() for own in windows(tokenizer, text, size, args.sequences)]
    prior = [own for text in prior_texts(args.data) for own in windows(tokenizer, text, PRIOR_TOKENS, PRIOR_WINDOWS)]
    measurement = Measurement(model, prior)
    cases = cases_of(names, args.bytes, BITS[args.weights], measurement.ffs)
    of_kind = [kind for kind in known for _ in range(args.sequences)]
    figures = []
    for kind, window in zip(of_kind, cut, strict=True):
        figures.append(measurement.sequence(window, args.prompt, cases))
        passed = time.perf_counter() - begin
        print(f"{kind}: sequence {len(figures)} of {len(of_kind)}, {passed:.0f} s passed", file=sys.stderr, flush=True)
    found = torch.tensor(figures, dtype=torch.float64)  # (sequences, cases, 2)
    base = {case.share: found[:, number] for number, case in enumerate(cases) if case.name == "griffin"}
    measured = [row_of(case, found[:, number], base[case.share], of_kind) for number, case in enumerate(cases)]
    lengths = {"prompt_tokens": args.prompt, "generated_tokens": args.generate, "sequences": len(of_kind)}
    print(f"{args.model}, bytes of {args.weights}, {args.prompt} + {args.generate} tokens, {len(of_kind)} sequences")
    print_figures(measured, list(known))
    about = machine.machine() | {"load_average": load_average}
    lines = [{"model": args.model, "weights": args.weights} | row | lengths for row in measured]
    files.write_text(args.output, files.csv_text(lines, about, machine.versions()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="as griffin.load takes it, with gated FF blocks")
    parser.add_argument("data", type=Path, help="folder of local data files, see docs/evaluation.md")
    parser.add_argument("--weights", default="bf16", choices=BITS, help="format that bytes are counted in")
    parser.add_argument("--bytes", type=parse_densities, default=[0.5, 0.75], help="shares (default: 0.5,0.75)")
    parser.add_argument("--prompt", type=int, default=384, help="tokens (default: %(default)s)")
    parser.add_argument("--generate", type=int, default=128, help="tokens (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=2, help="of each kind of text (default: %(default)s)")
    parser.add_argument("--methods", default=",".join(METHODS), metavar="NAME,...", help="(default: all: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.csv")
    args = parser.parse_args()
    try:
        run(args)
    except (ValueError, GriffinError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
