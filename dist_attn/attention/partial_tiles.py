"""How kernels cut tiles that are neither empty nor full: by key intervals per query, or by bits.

A tile is cut by the one or two intervals of keys that each query sees, where the mask is made of
these, also where some of its keys are thinned out but not inside this tile. Everything else is cut
by bits: a word of 64 keys for each query, put together from intervals and key sets without looking
at single elements.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_attn.layout import IntArray
from dist_attn.masks import Mask
from dist_attn.masks.parts import Part, stack_parts, union_per_row
from dist_attn_kernels.lists import BITS, BLOCK, FULL, INTERVAL

Words = npt.NDArray[np.uint64]
#: Tiles whose bits are made at a time.
TILES_AT_A_TIME = 4096
#: Bounds of a query's intervals that the kernels take.
MAX_BOUNDS = 4
#: Queries that are asked first whether they have more.
SAMPLE = 1 << 12
#: Parts of a mask up to which equal tiles are looked for before their bits are made.
MAX_SIGNED_PARTS = 16
#: Key indices beyond all others.
_FAR = np.int64(2**40)
#: The lowest n bits, for n from 0 to 64.
_LOW_BITS = np.array([(1 << n) - 1 for n in range(BLOCK + 1)], dtype=np.uint64)
#: Of a key block, how many of its keys a set holds.
_NONE, _SOME, _ALL = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Partial:
    """The partial tiles of one head: query block and key block of each."""

    row: IntArray
    key: IntArray


@dataclass(frozen=True, eq=False)
class Cut:
    """How partial tiles are cut; those that turned out empty are left out.

    Attributes:
        kind: FULL, INTERVAL, or BITS + i for words[i].
        words: uint64 [n, 64], all different.
    """

    tiles: Partial
    kind: IntArray
    words: Words


class Bounds:
    """The keys of single queries, as intervals of local keys, for heads that differ in key sets.

    Args:
        mask: the mask.
        positions: stream positions of queries and keys.
        head: one of the heads.
        rows: the query blocks that are asked about, ascending.
    """

    def __init__(
        self, mask: Mask, positions: tuple[IntArray, IntArray], head: int, rows: IntArray
    ) -> None:
        self._mask = mask
        self._q_positions, self._k_positions = positions
        self._rows = rows
        self._where = np.zeros(int(rows.max(initial=0)) + 1, dtype=np.int64)
        self._where[rows] = np.arange(len(rows))
        index = rows[:, None] * BLOCK + np.arange(BLOCK)
        self._inside = index < len(self._q_positions)
        self._index = index[self._inside]
        #: Queries of each row, and where they begin among all that are asked about.
        self._counts = self._inside.sum(axis=1)
        self._begin = np.cumsum(self._counts) - self._counts
        self._parts: list[tuple[IntArray, IntArray]] = []
        #: The intervals that cut tiles, int64 [2 or 4, queries], or None where there are more.
        self.table: IntArray | None = None
        if not mask.exact_rows or len(rows) == 0:
            return
        q = self._q_positions[self._index]
        parts = mask.touched(q, q, head)
        self._parts = [self._local(p) for p in parts]
        found = self._union([Part(lo, hi) for lo, hi in self._parts])
        if len(found) <= MAX_BOUNDS:
            width = 2 if len(found) <= 2 else 4
            self.table = np.zeros((width, len(self._q_positions)), dtype=np.int64)
            self.table[: len(found), self._index] = found
            self._found = found

    def cut(self, head: int, tiles: Partial) -> Cut:
        """Say how each partial tile of a head is cut."""
        if len(tiles.row) == 0:
            return Cut(tiles, np.empty(0, dtype=np.int64), np.empty((0, BLOCK), dtype=np.uint64))
        if not self._mask.exact_rows:
            return self._by_bits(tiles, np.ones(len(tiles.row), dtype=bool), head, [])
        q = self._q_positions[:1]
        sets = [p.keys for p in self._mask.touched(q, q, head)]
        if self.table is None:
            by_bits = np.ones(len(tiles.row), dtype=bool)
        elif all(s is None for s in sets):
            by_bits = np.zeros(len(tiles.row), dtype=bool)
        else:
            by_bits = ~self._is_interval(tiles, [self._held(s) for s in sets])
        return self._by_bits(tiles, by_bits, head, sets)

    def _local(self, part: Part) -> tuple[IntArray, IntArray]:
        """Turn positions into local keys."""
        k, size = self._k_positions, len(self._index)
        ends = []
        for x in (part.lo, part.hi):
            if k[-1] - k[0] == len(k) - 1:
                local = np.clip(x - k[0], 0, len(k))
            else:
                local = np.searchsorted(k, x)
            ends.append(np.broadcast_to(local, size))
        return ends[0], np.maximum(ends[0], ends[1])

    def _union(self, parts: list[Part]) -> IntArray:
        """The parts' union as rows lo, hi, lo, hi ... of as many intervals as the widest query.

        Of more than the kernels take, only that they are more.
        """
        step = 1 + len(self._index) // SAMPLE
        sample = [Part(p.lo[::step], p.hi[::step]) for p in parts]
        if step > 1 and len(self._widest(sample, -(-len(self._index) // step))) > MAX_BOUNDS:
            return np.empty((MAX_BOUNDS + 1, 0), dtype=np.int64)
        for whole in parts:
            if all(
                p is whole or ((p.lo >= whole.lo) & (p.hi <= whole.hi) | (p.lo >= p.hi)).all()
                for p in parts
            ):
                return np.stack([whole.lo, whole.hi])
        return self._widest(parts, len(self._index))

    def _widest(self, parts: list[Part], num_rows: int) -> IntArray:
        lo, hi = union_per_row(*stack_parts(parts, num_rows, len(self._k_positions)))
        # Columns that are empty in most rows are pushed together; what counts is the fullest row.
        width = max(int((lo < hi).sum(axis=1).max(initial=0)), 1)
        if width < lo.shape[1]:
            order = np.argsort(lo >= hi, axis=1, kind="stable")[:, :width]
            lo, hi = np.take_along_axis(lo, order, 1), np.take_along_axis(hi, order, 1)
        if lo.shape[1] == 0:
            return np.zeros((2, num_rows), dtype=np.int64)
        return np.stack([lo, np.maximum(hi, lo)], axis=1).transpose(2, 1, 0).reshape(2 * width, -1)

    def _held(self, keys: IntArray | None) -> npt.NDArray[np.int8]:
        """Of each key block, whether a key set holds none, some or all of its keys."""
        num_keys = len(self._k_positions)
        starts = np.arange(0, num_keys, BLOCK)
        if keys is None:
            return np.full(len(starts), _ALL, dtype=np.int8)
        bounds = np.searchsorted(self._k_positions, keys.reshape(-1)).reshape(-1, 2)
        below = np.zeros(len(bounds) + 1, dtype=np.int64)
        np.cumsum(bounds[:, 1] - bounds[:, 0], out=below[1:])
        points = np.append(starts, num_keys)
        i = np.searchsorted(bounds[:, 0], points, side="right")
        last = bounds[np.maximum(i - 1, 0)] if len(bounds) else np.zeros((len(points), 2), np.int64)
        count = np.where(i > 0, below[i] - np.maximum(last[:, 1] - points, 0), 0)
        held = np.diff(count)
        size = np.diff(points)
        return np.where(held == size, _ALL, np.where(held > 0, _SOME, _NONE)).astype(np.int8)

    def _is_interval(self, tiles: Partial, held: list[npt.NDArray[np.int8]]) -> npt.NDArray:
        """Whether the one interval of the table is right inside each tile.

        It is where no key set cuts the tile, and where a part of which every key counts here
        reaches as far as the table does, in all rows.
        """
        right = np.zeros(len(tiles.row), dtype=bool)
        if len(self._found) > 2:
            return right
        at, first = self._where[tiles.row], tiles.key * BLOCK
        for reach, of_block in zip(self._reaches, held, strict=True):
            same_lo, same_hi, from_key, to_key = (x[at] for x in reach)
            reaches = (same_lo | (from_key <= first)) & (same_hi | (to_key >= first + BLOCK))
            right |= reaches & (of_block[tiles.key] == _ALL)
        for of_block in held:
            right &= of_block[tiles.key] != _SOME
        return right

    @functools.cached_property
    def _reaches(self) -> list[tuple[npt.NDArray, ...]]:
        """How each part compares with the table in all rows of a block.

        Whether both begin, and whether both end, at the same keys; the last of the part's first
        keys, and the first of its ends.
        """
        lo, hi = self._found[:2]
        none = lo >= hi
        found: list[tuple[npt.NDArray, ...]] = []
        for p_lo, p_hi in self._parts:
            missing = (p_lo >= p_hi) & ~none
            from_key = np.where(missing, _FAR, np.where(none, -_FAR, p_lo))
            to_key = np.where(missing, -_FAR, np.where(none, _FAR, p_hi))
            found.append(
                (
                    self._of_rows(((p_lo == lo) | none) & ~missing, np.logical_and, True),
                    self._of_rows(((p_hi == hi) | none) & ~missing, np.logical_and, True),
                    self._of_rows(from_key, np.maximum, -_FAR),
                    self._of_rows(to_key, np.minimum, _FAR),
                )
            )
        return found

    def _of_rows(self, values: npt.NDArray, function: np.ufunc, neutral: object) -> npt.NDArray:
        """Put together what the queries of each block say."""
        if self._inside.all():
            return function.reduce(values.reshape(-1, BLOCK), axis=1)
        every = np.full(self._inside.shape, neutral, dtype=values.dtype)
        every[self._inside] = values
        return function.reduce(every, axis=1)

    def _by_bits(
        self, tiles: Partial, chosen: npt.NDArray, head: int, sets: list[IntArray | None]
    ) -> Cut:
        """Make the bits of the chosen tiles; the others are cut by intervals."""
        kind = np.full(len(tiles.row), INTERVAL)
        which = np.flatnonzero(chosen)
        if len(which) == 0:
            return Cut(tiles, kind, np.empty((0, BLOCK), dtype=np.uint64))
        row, key = tiles.row[which], tiles.key[which]
        of_keys = [self._key_words(s) for s in sets]
        # Tiles that no interval cuts are the same in many rows: one of each is made.
        first, same = self._alike(row, key)
        row, key = row[first], key[first]
        words = np.empty((len(first), BLOCK), dtype=np.uint64)
        for start in range(0, len(first), TILES_AT_A_TIME):
            some = slice(start, start + TILES_AT_A_TIME)
            if self._mask.exact_rows:
                words[some] = self._made_of_parts(row[some], key[some], of_keys)
            else:
                words[some] = self._looked_at(row[some], key[some], head)
        every = np.asarray(words == _LOW_BITS[BLOCK]).all(axis=1)
        some_keys = np.asarray(words.any(axis=1))
        unique, index = different(words)
        kind[which] = np.where(every, FULL, BITS + index)[same]
        keep = np.ones(len(kind), dtype=bool)
        keep[which] = some_keys[same]
        return Cut(Partial(tiles.row[keep], tiles.key[keep]), kind[keep], unique)

    def _alike(self, row: IntArray, key: IntArray) -> tuple[IntArray, IntArray]:
        """Return tiles of which each stands for all that have its bits, and for each tile which."""
        every = np.arange(len(row))
        if not self._mask.exact_rows or len(self._parts) > MAX_SIGNED_PARTS:
            return every, every
        at, first = self._where[row], key * BLOCK
        uncut = self._counts[at] == BLOCK
        signature = key.copy()
        for lo_min, lo_max, hi_min, hi_max in self._spans:
            covers = (lo_max[at] <= first) & (hi_min[at] >= first + BLOCK)
            misses = (lo_min[at] >= first + BLOCK) | (hi_max[at] <= first)
            uncut &= covers | misses
            signature = signature * 2 + covers
        # The others are of their own kind each.
        signature = np.where(uncut, signature, -1 - every)
        _, found, same = np.unique(signature, return_index=True, return_inverse=True)
        return found, same

    @functools.cached_property
    def _spans(self) -> list[tuple[npt.NDArray, ...]]:
        """Of each part the least and greatest first key, and end, in each block of queries."""
        found: list[tuple[npt.NDArray, ...]] = []
        for lo, hi in self._parts:
            empty = lo >= hi
            found.append(
                (
                    self._of_rows(np.where(empty, _FAR, lo), np.minimum, _FAR),
                    self._of_rows(lo, np.maximum, -_FAR),
                    self._of_rows(hi, np.minimum, _FAR),
                    self._of_rows(np.where(empty, -_FAR, hi), np.maximum, -_FAR),
                )
            )
        return found

    def _made_of_parts(self, row: IntArray, key: IntArray, of_keys: list[Words | None]) -> Words:
        at = self._where[row]
        inside = self._inside[at]
        last = self._counts[at][:, None] - 1
        index = self._begin[at][:, None] + np.minimum(np.arange(BLOCK), last)
        words = np.zeros(index.shape, dtype=np.uint64)
        first = (key * BLOCK)[:, None]
        for (lo, hi), mine in zip(self._parts, of_keys, strict=True):
            seen = _LOW_BITS[np.clip(hi[index] - first, 0, BLOCK)]
            seen &= ~_LOW_BITS[np.clip(lo[index] - first, 0, BLOCK)]
            words |= seen if mine is None else seen & mine[key][:, None]
        return np.where(inside, words, np.uint64(0))

    def _looked_at(self, row: IntArray, key: IntArray, head: int) -> Words:
        """Ask the mask about every element."""
        q, q_inside = _tile_positions(self._q_positions, row)
        k, k_inside = _tile_positions(self._k_positions, key)
        allowed = self._mask.allows(q[:, :, None], k[:, None, :], head)
        allowed = allowed & q_inside[:, :, None] & k_inside[:, None, :]
        packed = np.packbits(allowed, axis=-1, bitorder="little")
        return np.ascontiguousarray(packed).view("<u8")[:, :, 0]

    def _key_words(self, keys: IntArray | None) -> Words | None:
        """Of each key block which of its keys a set holds, as bits; None for all."""
        if keys is None:
            return None
        num_keys = len(self._k_positions)
        bounds = np.searchsorted(self._k_positions, keys.reshape(-1)).reshape(-1, 2)
        change = np.zeros(-(-num_keys // BLOCK) * BLOCK + 1, dtype=np.int8)
        np.add.at(change, bounds[:, 0], 1)
        np.add.at(change, bounds[:, 1], -1)
        held = np.cumsum(change[:-1], dtype=np.int8).astype(bool)
        return np.packbits(held, bitorder="little").view("<u8")


def different(words: Words) -> tuple[Words, IntArray]:
    """Return the different rows and which of them each row is, as np.unique does, but by a hash."""
    _, first, index = np.unique(_hash(words), return_index=True, return_inverse=True)
    if np.array_equal(words[first][index], words):
        return words[first], index
    rows, index = np.unique(words, axis=0, return_inverse=True)  # two rows have one hash
    return rows, index.reshape(-1)


def _hash(words: Words) -> Words:
    factors = np.random.default_rng(0).integers(0, 1 << 64, words.shape[1], dtype=np.uint64)
    mixed = (words ^ (words >> np.uint64(29))) * factors
    return np.asarray(mixed.sum(axis=1, dtype=np.uint64))


def _tile_positions(positions: IntArray, tiles: IntArray) -> tuple[IntArray, npt.NDArray]:
    """Return the positions of each tile's tokens [n, 64], and which of them are there."""
    index = tiles[:, None] * BLOCK + np.arange(BLOCK)
    inside = index < len(positions)
    return positions[np.minimum(index, len(positions) - 1)], inside
