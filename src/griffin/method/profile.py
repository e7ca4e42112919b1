"""A model's profile: which FF neurons matter over many texts, and what densities cost. A small safetensors file.

It is made by `griffin profile`. As a *prior* it counts as some tokens of every prompt: `A = A_prompt + m * n`, where
`n` is the mean energy of a token over the profile's texts and m the number of pseudo-tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from griffin.cache import cache_folder
from griffin.errors import GriffinError
from griffin.layouts import FFBlock
from griffin.method.planes import Curve
from griffin.method.statistics import Statistics
from griffin.weights.projection import rows
from griffin.weights.quantised import QuantisedEmbedding, QuantisedLinear

PSEUDO_TOKENS = 100  # m: from 32 to 400 make little difference (results/ablation)
SHIPPED = Path(__file__).parents[1] / "profiles"
MADE_HERE = "profiles"  # folder of the cache
_FORMAT = "1"
_SAMPLE = 512  # values of the input embeddings by which a model is known
_CLOSE = 0.02  # as a share of their spread: they may be stored in bfloat16 or float16


@dataclass(frozen=True, eq=False)
class Profile:
    """What is known of a model.

    Args:
        energies: by layer, the mean over tokens of the energy that a token adds: its sum is 1.
        ups: by layer, the mean over tokens of the squared up projection; none for blocks without a gate.
        embeddings: values of the input embeddings at even distances.
        about: model, text and number of tokens, for people.
        losses: by format of the FF weights and density: KL to the full model in nats a token, of `config.BEST`.
        curves: by layer, how its output energy is spread, for `planes+`; none in older profiles.

    Shapes:
        energies, ups: each (D_ff,), float32. embeddings: (512,), float32.
    """

    energies: Mapping[int, Tensor]
    ups: Mapping[int, Tensor]
    embeddings: Tensor
    about: Mapping[str, str] = field(default_factory=dict)
    losses: Mapping[str, Mapping[float, float]] = field(default_factory=dict)
    curves: Mapping[int, Curve] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """8 hex digits that tell it from other profiles of its model."""
        digest = hashlib.sha256(json.dumps([dict(self.losses), list(self.energies)], sort_keys=True).encode())
        curves = [torch.tensor([curve.token, curve.prompt]) for curve in self.curves.values()]
        for values in (*self.energies.values(), *self.ups.values(), *curves):
            digest.update(values.contiguous().numpy().tobytes())
        return digest.hexdigest()[:8]

    def fits(self, model: nn.Module, blocks: Sequence[FFBlock]) -> bool:
        """Whether it is this model's, in whatever format its weights are stored."""
        widths = {layer: values.shape[0] for layer, values in self.energies.items()}
        if widths != {block.layer: block.width for block in blocks}:
            return False
        values = sample(model)
        return float((values - self.embeddings).abs().max()) <= _CLOSE * float(self.embeddings.std())

    def added_to(self, statistics: Statistics) -> Statistics:
        """New statistics with this profile as pseudo-tokens of every sequence."""
        total = statistics.copy()
        for layer, energies in statistics.energies.items():
            total.energies[layer] = energies + PSEUDO_TOKENS * self.energies[layer].to(energies.device)
            total.tokens[layer] = statistics.tokens[layer] + PSEUDO_TOKENS
        for layer, ups in statistics.ups.items():
            total.ups[layer] = ups + PSEUDO_TOKENS * self.ups[layer].to(ups.device)
        return total

    def density_of(self, weights: str, loss: float) -> float:
        """The smallest density whose loss is at most this, for FF weights of a format.

        Raises:
            ValueError: the profile has no losses for the format, or none so small.
        """
        losses = self.losses.get(weights)
        if losses is None and weights == "f32":  # a sketch is a smaller share of a wider gate, so they lose less
            losses = self.losses.get("bf16")
        if not losses:
            formats = ", ".join(self.losses) or "none"
            raise ValueError(
                f"the profile has no losses for {weights} weights (it has {formats}), so loss {loss:g} is no density; "
                f"measure them: griffin profile -m MODEL --weights {weights}, or give a density"
            )
        good = [density for density, measured in losses.items() if measured <= loss]
        if not good:
            density, least = min(losses.items(), key=lambda item: item[1])
            raise ValueError(
                f"no density of the profile keeps KL to at most {loss:g}: the least is {least:.2g}, at density "
                f"{density:g}; give a larger loss, or density=1.0"
            )
        return min(good)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            GriffinError: it cannot be written.
        """
        tensors = {f"energies.{layer}": values.bfloat16() for layer, values in self.energies.items()}
        tensors |= {f"ups.{layer}": values.bfloat16() for layer, values in self.ups.items()}
        tensors |= {f"curves.{layer}": torch.tensor([c.token, c.prompt]) for layer, c in self.curves.items()}
        tensors["embeddings"] = self.embeddings
        losses = {
            name: {str(density): loss for density, loss in values.items()} for name, values in self.losses.items()
        }
        metadata = {"griffin_profile": _FORMAT, "about": json.dumps(dict(self.about)), "losses": json.dumps(losses)}
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(save(tensors, metadata))
            partial.replace(path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise GriffinError(f"cannot write {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a file.

        Raises:
            ValueError: there is none, or it is no profile.
        """
        if not path.is_file():
            raise ValueError(f"{path} is not there; expected a profile, made by griffin profile")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            if metadata.get("griffin_profile") != _FORMAT:
                raise ValueError(f"{path} is no profile of this version of griffin; make it again: griffin profile")
            losses = {
                name: {float(density): float(loss) for density, loss in by_density.items()}
                for name, by_density in json.loads(metadata["losses"]).items()
            }
            return cls(
                _by_layer("energies", tensors), _by_layer("ups", tensors), tensors["embeddings"],
                json.loads(metadata["about"]), losses,
                {layer: Curve(*map(tuple, values.tolist())) for layer, values in _by_layer("curves", tensors).items()},
            )  # fmt: skip
        except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
            raise ValueError(f"{path} is damaged or no profile ({error}); make it again: griffin profile") from error


def _by_layer(name: str, tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
    layers = {int(key.partition(".")[2]): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    return dict(sorted(layers.items()))


@torch.no_grad()
def sample(model: nn.Module) -> Tensor:
    """Values of the input embeddings by which a profile knows its model. Shapes: (512,), float32."""
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    height, width = table.num_embeddings, table.embedding_dim
    at = torch.linspace(0, height * width - 1, _SAMPLE, dtype=torch.float64).long()
    rows, columns = at // width, at % width
    if isinstance(table, QuantisedEmbedding):
        return table.parts[0].unpack(rows).gather(1, columns[:, None])[:, 0]
    weight: Tensor = table.weight
    return weight[rows.to(weight.device), columns.to(weight.device)].float().cpu()


def find(model: nn.Module, blocks: Sequence[FFBlock], path: str | None = None) -> Profile | None:
    """The model's profile: from a file, or of those that come with griffin and those in its cache the one that fits.

    Raises:
        ValueError: the file is none, or another model's.
    """
    if path is not None:
        given = Profile.load(Path(path).expanduser())
        if not given.fits(model, blocks):
            raise ValueError(
                f"{path} is the profile of another model ({given.about.get('model', 'unknown')}, {len(given.energies)} "
                f"layers); make one for this model: griffin profile"
            )
        return given
    for folder in (SHIPPED, cache_folder() / MADE_HERE):
        for file in sorted(folder.glob("*.safetensors")):
            known = _known(file, file.stat().st_mtime_ns)
            if known is not None and known.fits(model, blocks):
                return known
    return None


@cache
def _known(path: Path, changed_ns: int) -> Profile | None:
    try:
        return Profile.load(path)
    except ValueError:  # of another version: as if it were not there
        return None


def format_of(block: FFBlock) -> str:
    """How an FF block's weights are stored, as a profile's losses name it."""
    if isinstance(block.output, QuantisedLinear):
        bits = sum(
            projection.nbytes for projection in (*block.inputs, block.output) if isinstance(projection, QuantisedLinear)
        )
        return "int8" if 8 * bits > 6 * block.parameters else "int4"  # the nearest of the formats that it knows
    names = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "bf16"}  # as many bits
    return names.get(rows(block.output)[0].dtype, "f32")
