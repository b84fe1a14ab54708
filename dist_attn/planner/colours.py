"""The colours of groups, in pictures and on pages."""

from __future__ import annotations

#: From few ranks to many: cool to warm, readable with black text, told apart by the colour-blind.
PALETTE = ("#9ecae1", "#6baed6", "#4fb3bf", "#74c476", "#c7e26a", "#fdd05a", "#fdae6b", "#f4795b")
OVERHEAD = "#bdbdbd"


def degree_colour(degree: int) -> str:
    """One colour per power of two."""
    return PALETTE[min((degree - 1).bit_length(), len(PALETTE) - 1)]
