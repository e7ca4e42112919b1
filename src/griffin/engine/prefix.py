"""Beginnings of prompts that have been run, to be continued: keys, values and the flocking statistic at block borders.

Only what the full model has computed from prompt tokens is kept. The statistic adds up over tokens, so a block holds
what all tokens up to its end add up to. Whoever runs prompts in chunks of a block gets the same numbers from a kept
beginning as from running it again, to the bit, as every token has been computed in the same chunk.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from griffin.attachment import Statistics
from griffin.engine.cache import BufferedCache


@dataclass(frozen=True, eq=False)
class _Block:
    """The tokens of one block.

    Args:
        states: keys and values by layer, each (1, K, tokens, E).
        statistics: what all tokens up to the block's end add up to.
        needs: what was gathered beside the flocking statistic.
        nbytes: bytes of all that.
    """

    states: list[tuple[Tensor, Tensor]]
    statistics: Statistics
    needs: frozenset[str]
    nbytes: int


class PrefixCache:
    """Beginnings of prompts, the least recently used dropped first.

    Args:
        nbytes: the most bytes that they may take.
        block: tokens of a block. Prompts share whole blocks only.
    """

    def __init__(self, nbytes: int, block: int) -> None:
        self.limit, self.block = nbytes, block
        self.nbytes = 0
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()

    def prefix_of(self, ids: Sequence[int], needs: Collection[str]) -> Prefix:
        """The beginning of a prompt.

        Args:
            ids: the whole prompt.
            needs: what its selection needs beside the flocking statistic; blocks without it do not count.
        """
        return Prefix(self, ids, frozenset(needs))

    def get(self, key: bytes, needs: frozenset[str]) -> _Block | None:
        """A block, if it is known and has what is needed."""
        block = self._blocks.get(key)
        return block if block is not None and needs <= block.needs else None

    def put(self, keys: Sequence[bytes], block: _Block) -> None:
        """Keep the last block of a beginning whose earlier blocks are known; else it would not be found.

        Args:
            keys: of all blocks up to this one.
            block: the last one.
        """
        if any(key not in self._blocks for key in keys[:-1]):
            return
        self.touch(keys[:-1])
        self._drop(keys[-1])
        own = set(keys)
        while self._blocks and self.nbytes + block.nbytes > self.limit:
            oldest = next(iter(self._blocks))
            if oldest in own:
                return
            self._drop(oldest)
        if block.nbytes <= self.limit:
            self._blocks[keys[-1]] = block
            self.nbytes += block.nbytes
            self.touch(keys)

    def touch(self, keys: Sequence[bytes]) -> None:
        """These blocks are used now. Of a beginning the last block is dropped first, as none is of use without those
        before it."""
        for key in reversed(keys):
            self._blocks.move_to_end(key)

    def _drop(self, key: bytes) -> None:
        block = self._blocks.pop(key, None)
        self.nbytes -= 0 if block is None else block.nbytes


class Prefix:
    """The blocks with which one prompt begins. Its last token is in none of those that are read: it has to be run."""

    def __init__(self, cache: PrefixCache, ids: Sequence[int], needs: frozenset[str]) -> None:
        self._cache, self._needs = cache, needs
        self._readable = (len(ids) - 1) // cache.block
        self._keys: list[bytes] = []
        key = b""
        for end in range(cache.block, len(ids) + 1, cache.block):
            tokens = array("q", ids[end - cache.block : end]).tobytes()
            key = hashlib.blake2b(key + tokens, digest_size=16).digest()
            self._keys.append(key)

    def read(self, cache: BufferedCache) -> tuple[int, Statistics]:
        """Fill an empty cache with the blocks that are known.

        Returns:
            How many tokens they are, and what they add up to.
        """
        blocks: list[_Block] = []
        for key in self._keys[: self._readable]:
            block = self._cache.get(key, self._needs)
            if block is None:
                break
            blocks.append(block)
        if not blocks:
            return 0, Statistics()
        self._cache.touch(self._keys[: len(blocks)])
        layers: list[Any] = cache.layers
        for number, layer in enumerate(layers):
            pairs = [block.states[number] for block in blocks]
            layer.update(torch.cat([keys for keys, _ in pairs], 2), torch.cat([values for _, values in pairs], 2))
        return len(blocks) * self._cache.block, blocks[-1].statistics

    def keep(self, cache: BufferedCache, start: int, statistics: Statistics) -> None:
        """Keep a block that has been run, if it is a whole one.

        Args:
            cache: the prompt's keys and values up to the end of the chunk that has been run.
            start: the first token of the chunk.
            statistics: what all tokens up to its end add up to.
        """
        end, block = cache.length, self._cache.block
        if start % block or end - start != block or self._cache.get(self._keys[start // block], self._needs):
            return
        layers: list[Any] = cache.layers
        states = [(layer.keys[:, :, start:end].clone(), layer.values[:, :, start:end].clone()) for layer in layers]
        tensors = [state for pair in states for state in pair]
        tensors += [*statistics.energies.values(), *statistics.ups.values()]
        tensors += [both for pair in statistics.inputs.values() for both in pair]
        nbytes = sum(tensor.nbytes for tensor in tensors)
        self._cache.put(self._keys[: start // block + 1], _Block(states, statistics.copy(), self._needs, nbytes))
