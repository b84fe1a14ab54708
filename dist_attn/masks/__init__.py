"""What may attend to what: rules as data, composable with `&` and `|`."""

from dist_attn.masks.base import And, Mask, Or
from dist_attn.masks.dense import DenseForm, dense_form
from dist_attn.masks.rules import Causal, Documents, Full, Window

__all__ = ["And", "Causal", "DenseForm", "Documents", "Full", "Mask", "Or", "Window", "dense_form"]
