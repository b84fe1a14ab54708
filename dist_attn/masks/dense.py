"""Recognise the masks that dense kernels carry out: documents, each fully or causally."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dist_attn.layout import IntArray
from dist_attn.masks.base import And, Mask
from dist_attn.masks.rules import Causal, Documents, Full


@dataclass(frozen=True, eq=False)
class DenseForm:
    """A mask that is one square or triangle per document.

    Attributes:
        cu_seqlens: int64 boundaries of the documents, which may be empty.
        causal: whether each is a triangle.
    """

    cu_seqlens: IntArray
    causal: bool


def dense_form(mask: Mask, seq_len: int) -> DenseForm | None:
    """Return the dense form of a mask over a stream, or None when it has none.

    Raises:
        PlanError: the mask has documents for a stream of another length.
    """
    match mask:
        case Full():
            return DenseForm(np.array([0, seq_len]), False)
        case Causal():
            return DenseForm(np.array([0, seq_len]), True)
        case Documents():
            mask.check(seq_len)
            return DenseForm(mask.cu_seqlens, False)
        case And():
            left, right = dense_form(mask.left, seq_len), dense_form(mask.right, seq_len)
            if left is None or right is None:
                return None
            cu = np.union1d(left.cu_seqlens, right.cu_seqlens)
            return DenseForm(cu, left.causal or right.causal)
    return None
