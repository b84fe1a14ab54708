"""The parts of the configuration that describe the cluster and how batches are scattered."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dist_attn.config_section import Fraction, Positive, PositiveFloat, Section


class PlannerConfig(Section):
    """How each global batch is scattered over the ranks."""

    #: `planned`: per batch, by search, LP and MILP. `static`: all groups of `static_degree` ranks.
    mode: Literal["planned", "static"] = "planned"
    static_degree: Positive | None = None
    degrees: Literal["powers_of_two", "all"] = "powers_of_two"
    max_degree: Positive | None = None
    max_micro_batches: Positive = 64
    #: `groups`: every document lies evenly on the ranks of one group. `free`: short documents lie
    #: whole on one rank and cost no communication, long ones fill the ranks of a group unevenly.
    placement: Literal["groups", "free"] = "groups"
    #: `micro_batch`: all ranks wait for each other at every micro-batch. `step`: only at the
    #: optimizer step, so that ranks may run different numbers of micro-batches.
    synchronisation: Literal["micro_batch", "step"] = "micro_batch"
    #: A cap on a rank's tokens per micro-batch, beside what its memory allows; a mapping caps the
    #: devices that it names (`{cpu: 2048}`).
    max_tokens_per_device: Positive | dict[str, Positive] | None = None
    time_limit_s: PositiveFloat = 5.0
    #: A solver that is silent for so long, or dies, is replaced once; then the run ends.
    give_up_s: PositiveFloat = 120.0
    #: A folder of plan files (step-000000.json, ...) to carry out instead of solving.
    plans_dir: str | None = None

    @model_validator(mode="after")
    def _static(self) -> PlannerConfig:
        if (self.mode == "static") != (self.static_degree is not None):
            raise ValueError("static_degree goes with mode 'static', and only with it")
        if self.placement == "free" and self.synchronisation == "step":
            raise ValueError(
                "placement 'free' levels the ranks of every micro-batch and is planned for "
                "synchronisation 'micro_batch' only; use placement 'groups' with 'step'"
            )
        return self


class DeviceConfig(Section):
    """One kind of device: what it computes, holds and moves."""

    #: Dense matrix rate in the training dtype, and the shares of it that a layer's matrix products
    #: and attention reach.
    peak_tflops: PositiveFloat
    linear_efficiency: Fraction = 0.55
    attention_efficiency: Fraction = 0.5
    memory_gib: PositiveFloat
    #: Memory that the framework, NCCL and fragmentation take.
    reserved_gib: Annotated[float, Field(ge=0)] = 4.0


class LinkConfig(Section):
    """What one device can send while it receives as much."""

    bandwidth_gb_per_s: PositiveFloat
    latency_us: Annotated[float, Field(ge=0)] = 10.0


class NodesConfig(Section):
    """Equal nodes, `count` of them."""

    count: Positive
    devices_per_node: Positive
    #: A name from the spec sheets (a100-40gb, a100-80gb, h100-80gb, h200-141gb, b200-192gb, cpu) or
    #: from the cluster's own `devices`.
    device: str


class ClusterConfig(Section):
    """A cluster, here or elsewhere: nodes, devices and links."""

    nodes: Annotated[list[NodesConfig], Field(min_length=1)]
    devices: dict[str, DeviceConfig] = {}
    intra_node: LinkConfig = LinkConfig(bandwidth_gb_per_s=150.0, latency_us=8.0)
    #: Per device, not per node.
    inter_node: LinkConfig = LinkConfig(bandwidth_gb_per_s=20.0, latency_us=20.0)
    #: Share of attention's time behind which a ring exchange hides; 0 where the cores that compute
    #: also send.
    ring_overlap: Fraction = 0.9
    #: Seconds that every micro-batch costs beside its tokens (launches, ZeRO gathers).
    micro_batch_overhead_s: Annotated[float, Field(ge=0)] = 0.0

    @property
    def world_size(self) -> int:
        """Devices in all."""
        return sum(n.count * n.devices_per_node for n in self.nodes)
