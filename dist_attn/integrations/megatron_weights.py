"""Where the weights of a Megatron model lie in a transformers Llama, and back.

Megatron keeps the query, key and value rows of one key/value head together in one matrix, the gate
and the up projection in another, and cuts each among tensor ranks. Everything that leaves the
engine (checkpoints, gradients, Hugging Face files) goes by transformers' names and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

#: Megatron's part of a layer -> transformers', where one matrix is one matrix.
_NORMS = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Block:
    """Rows of this rank's matrix, and the rows and columns of the whole one that they are.

    A vector is a matrix of one column.
    """

    name: str
    shape: tuple[int, ...]
    local_row: int
    rows: int
    row: int = 0
    col: int = 0


@dataclass(frozen=True)
class Sizes:
    """What the mapping depends on."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    degree: int
    tensor_rank: int

    @property
    def vocab_rows(self) -> int:
        """Rows of the vocabulary on each tensor rank; the last ones may be padding."""
        return -(-self.vocab_size // self.degree)

    @property
    def first_vocab_row(self) -> int:
        """This rank's first row of the vocabulary."""
        return self.tensor_rank * self.vocab_rows

    @property
    def real_vocab_rows(self) -> int:
        """This rank's rows without padding."""
        return max(0, min(self.vocab_rows, self.vocab_size - self.first_vocab_row))


@dataclass(frozen=True)
class Part:
    """A part of a whole parameter, as a range of this rank's flattened one; see `Fragment`."""

    name: str
    shape: tuple[int, ...]
    start: int
    run: int | None
    local_start: int
    numel: int


class WeightMap:
    """The blocks of every parameter of one rank's Megatron model."""

    def __init__(
        self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]], sizes: Sizes
    ) -> None:
        """Match a model with the names and shapes of the transformers model that it computes."""
        self.sizes = sizes
        self.shapes = dict(shapes)
        self._local = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.blocks = {name: list(self._blocks(name)) for name in self._local}
        covered = {b.name for blocks in self.blocks.values() for b in blocks}
        missing = sorted(set(shapes) - covered) if sizes.real_vocab_rows else []
        assert not missing, f"no place for {missing}"

    def is_divided(self, name: str) -> bool:
        """Whether tensor ranks hold different parts of a Megatron parameter."""
        return self.sizes.degree > 1 and len(self._local[name]) > 1

    def cut_dim(self, name: str) -> int:
        """The dimension along which tensor ranks divide a Megatron matrix."""
        return 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0

    @torch.no_grad()
    def load(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Fill a model with this rank's parts of whole weights; padding becomes 0."""
        for name, param in model.named_parameters():
            param.zero_()
            width = param.shape[1] if param.dim() > 1 else 1
            for block in self.blocks[name]:
                whole = _matrix(weights[block.name])
                rows = whole[block.row : block.row + block.rows, block.col : block.col + width]
                _matrix(param)[block.local_row : block.local_row + block.rows].copy_(rows)

    def parts(self, name: str, start: int, numel: int) -> Iterator[Part]:
        """What a range of a flattened Megatron parameter is of the whole parameters."""
        width = self._local[name][1] if len(self._local[name]) > 1 else 1
        for block in self.blocks[name]:
            first = max(start, block.local_row * width)
            last = min(start + numel, (block.local_row + block.rows) * width)
            if first < last:
                yield from _cut(block, width, first, last)

    def _blocks(self, name: str) -> Iterator[Block]:
        match name:
            case "embedding.word_embeddings.weight":
                yield from self._vocabulary("model.embed_tokens.weight")
                return
            case "output_layer.weight":
                yield from self._vocabulary("lm_head.weight")
                return
            case "decoder.final_layernorm.weight":
                yield self._whole("model.norm.weight")
                return
        found = _LAYER.fullmatch(name)
        assert found is not None, f"unknown parameter {name}"
        layer, part = f"model.layers.{found[1]}.", found[2]
        match part:
            case "self_attention.linear_qkv.weight":
                yield from self._qkv(layer + "self_attn.")
            case "self_attention.linear_proj.weight":
                yield self._columns(layer + "self_attn.o_proj.weight")
            case "mlp.linear_fc1.weight":
                yield from self._gate_and_up(layer + "mlp.")
            case "mlp.linear_fc2.weight":
                yield self._columns(layer + "mlp.down_proj.weight")
            case _:
                assert part in _NORMS, f"unknown parameter {name}"
                yield self._whole(layer + _NORMS[part])

    def _block(self, name: str, local_row: int, rows: int, row: int = 0, col: int = 0) -> Block:
        return Block(name, self.shapes[name], local_row, rows, row, col)

    def _whole(self, name: str) -> Block:
        return self._block(name, 0, self.shapes[name][0])

    def _columns(self, name: str) -> Block:
        rows, cols = self.shapes[name]
        return self._block(name, 0, rows, col=self.sizes.tensor_rank * (cols // self.sizes.degree))

    def _vocabulary(self, name: str) -> Iterator[Block]:
        if self.sizes.real_vocab_rows:
            yield self._block(name, 0, self.sizes.real_vocab_rows, self.sizes.first_vocab_row)

    def _qkv(self, prefix: str) -> Iterator[Block]:
        s = self.sizes
        queries = s.num_heads // s.num_kv_heads * s.head_dim
        kv_heads = s.num_kv_heads // s.degree
        for local in range(kv_heads):
            head = s.tensor_rank * kv_heads + local
            first = local * (queries + 2 * s.head_dim)
            yield self._block(prefix + "q_proj.weight", first, queries, head * queries)
            for place, kind in enumerate("kv"):
                row = first + queries + place * s.head_dim
                yield self._block(f"{prefix}{kind}_proj.weight", row, s.head_dim, head * s.head_dim)

    def _gate_and_up(self, prefix: str) -> Iterator[Block]:
        rows = self.sizes.intermediate_size // self.sizes.degree
        first = self.sizes.tensor_rank * rows
        yield self._block(prefix + "gate_proj.weight", 0, rows, first)
        yield self._block(prefix + "up_proj.weight", rows, rows, first)


def _matrix(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() > 1 else tensor.unsqueeze(-1)


def _cut(block: Block, width: int, first: int, last: int) -> Iterator[Part]:
    """Parts of the local elements [first, last) of a block."""
    whole_width = block.shape[1] if len(block.shape) > 1 else 1

    def at(local: int) -> int:
        row, col = divmod(local, width)
        return (block.row + row - block.local_row) * whole_width + block.col + col

    if width == whole_width:
        yield Part(block.name, block.shape, at(first), None, first, last - first)
        return
    # The rest of a first row, whole rows, the beginning of a last one.
    head = min(last, -(-first // width) * width)
    tail = max(head, last // width * width)
    for begin, end, run in ((first, head, None), (head, tail, width), (tail, last, None)):
        if begin < end:
            yield Part(block.name, block.shape, at(begin), run, begin, end - begin)
