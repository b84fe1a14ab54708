"""What may attend to what: rules as data, composable with `&` and `|`."""

from dist_attn.masks.base import And, Mask, Or
from dist_attn.masks.blocks import (
    BlockList,
    StridedBlocks,
    VariableBlockList,
    listed_blocks,
)
from dist_attn.masks.dense import DenseForm, dense_form
from dist_attn.masks.rules import (
    BlockCausal,
    BlockDistance,
    Causal,
    DocumentPrefix,
    Documents,
    Full,
    Keys,
    PerHead,
    Predicate,
    Queries,
    Window,
)
from dist_attn.masks.tiles import TileLists, stretches, tile_lists

__all__ = [
    "And",
    "BlockCausal",
    "BlockDistance",
    "BlockList",
    "Causal",
    "DenseForm",
    "DocumentPrefix",
    "Documents",
    "Full",
    "Keys",
    "Mask",
    "Or",
    "PerHead",
    "Predicate",
    "Queries",
    "StridedBlocks",
    "TileLists",
    "VariableBlockList",
    "Window",
    "dense_form",
    "listed_blocks",
    "stretches",
    "tile_lists",
]
