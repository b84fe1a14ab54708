"""The configuration of attention: strategies, layouts and masks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dist_attn.config_masks import LayerMaskConfig, Section

Strategy = Literal[
    "ring", "ulysses", "gather",
    "ring+ring", "ring+gather", "ring+ulysses",
    "gather+ring", "gather+gather", "gather+ulysses",
    "ulysses+ring", "ulysses+gather", "ulysses+ulysses",
]  # fmt: skip


class AttentionConfig(Section):
    """How attention may be carried out inside a group."""

    #: The planner chooses among these for every group. Those in two levels, `inner+outer`, run the
    #: first inside each node of a group and the second between its nodes.
    strategies: Annotated[list[Strategy], Field(min_length=1)] = ["ring", "ulysses"]
    #: Ranks of a node for strategies in two levels; by default those of the cluster's nodes, and
    #: then only groups of several whole nodes use them.
    inner_degree: Annotated[int, Field(ge=2)] | None = None
    #: Which rank of a group holds which tokens, for all strategies but ulysses, to which it makes
    #: no difference. `zigzag`: of each document a piece from the front and one from the back.
    #: `balanced`: chunks dealt by how many pairs the layers' masks let through. `striped`: tokens
    #: in turn. `contiguous`: rank after rank, which keeps windows at hand.
    ring_layout: Literal["zigzag", "balanced", "striped", "contiguous"] = "zigzag"
    deterministic: bool = False
    #: In what gradients of keys and values travel. By default those that one kernel call returned,
    #: in its own type, in which they lose nothing; sums over ranks in float32. `bfloat16` halves
    #: what sums take on the way and rounds them at every hop; they add up in float32 in any case.
    gradient_dtype: Literal["float32", "bfloat16"] | None = None
    #: GPUs of one host copy keys to each other where they can; else NCCL sends them.
    copy_engines: bool = True
    #: What the queries of some layers see inside their document; later entries win, and layers that
    #: none names are causal.
    masks: list[LayerMaskConfig] = []

    @model_validator(mode="after")
    def _levels(self) -> AttentionConfig:
        if self.inner_degree is not None and not any("+" in s for s in self.strategies):
            raise ValueError(
                f"inner_degree {self.inner_degree} is for strategies in two levels, got "
                f"{self.strategies}; add one such as 'ulysses+ring', 'ring+ring' or "
                f"'gather+gather', or leave inner_degree out"
            )
        return self
