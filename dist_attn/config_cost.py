"""The section that says where a plan's costs come from."""

from __future__ import annotations

from pydantic import Field

from dist_attn.config_masks import Section


class CostConfig(Section):
    """Measured costs in place of those derived from spec sheets."""

    #: Files that `dist-attn calibrate` wrote, one per kind of device; a relative path counts from
    #: the configuration's folder, or else from the working directory.
    calibrations: list[str] = Field(default_factory=list)
