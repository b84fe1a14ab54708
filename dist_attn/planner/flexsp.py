"""The cost model and the rules of FlexSP, for comparison under equal terms.

Source: "Data-Centric and Heterogeneity-Adaptive Sequence Parallelism for Efficient LLM Training"
(ASPLOS 2025) and its published constants. A group of degree d takes
`beta1 + sum over sequences of (alpha1 s^2 + alpha2 s) / d + a2a(s, d)`; the all-to-all moves
`8 * layers * hidden * s` elements of two bytes through a bandwidth measured per degree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dist_attn.planner.cluster import Cluster, Device, Link, fingerprint
from dist_attn.planner.costs import FloatArray, GroupKind, IntArray

_MIB = 1 << 20


@dataclass(frozen=True)
class FlexSPCost:
    """FlexSP's constants; its milliseconds are seconds here.

    `min_degree` is 2 under FlexSP's own rules.
    """

    alpha1_ms: float
    alpha2_ms: float
    beta1_ms: float
    hidden_size: int
    num_layers: int
    device_token_capacity: int
    bytes_per_token: int
    bandwidth_gb_per_s: tuple[tuple[int, float], ...]
    min_degree: int = 2

    @classmethod
    def from_record(cls, record: Mapping[str, Any], min_degree: int = 2) -> FlexSPCost:
        """Read one entry of a file of batches."""
        model = record["costmodel"]
        return cls(
            alpha1_ms=model["cpt_alpha1"],
            alpha2_ms=model["cpt_alpha2"],
            beta1_ms=model["cpt_beta1"],
            hidden_size=model["hidden_size"],
            num_layers=model["layer_num"],
            device_token_capacity=record["device_token_capacity"],
            bytes_per_token=int(model["act_per_token"] * _MIB),
            bandwidth_gb_per_s=tuple(
                sorted((int(d), b) for d, b in model["alltoall_bandwidth_dict_gbs"].items())
            ),
            min_degree=min_degree,
        )

    def allows(self, kind: GroupKind) -> bool:
        """All-to-all groups of two ranks and more; one rank alone only outside FlexSP's rules."""
        return kind.degree >= self.min_degree and kind.strategy in ("local", "ulysses")

    def fixed_s(self, kind: GroupKind) -> float:
        """The constant beta1."""
        return self.beta1_ms / 1e3

    def compute_s(self, kind: GroupKind, lengths: IntArray) -> FloatArray:
        """Quadratic and linear work, shared evenly."""
        n = lengths.astype(np.float64)
        return np.asarray((self.alpha1_ms * n * n + self.alpha2_ms * n) / kind.degree / 1e3)

    def linear_s(self, kind: GroupKind, lengths: IntArray) -> FloatArray:
        """Linear work, shared evenly."""
        return np.asarray(self.alpha2_ms * lengths / kind.degree / 1e3)

    def communication_s(self, kind: GroupKind, lengths: IntArray) -> FloatArray:
        """All-to-all, none of it hidden."""
        return self.exchange_s(kind, lengths)

    def overlap(self, kind: GroupKind) -> float:
        """Nothing is hidden."""
        return 0.0

    def exchange_s(self, kind: GroupKind, lengths: IntArray) -> FloatArray:
        """All-to-all."""
        if kind.degree == 1:
            return np.zeros(len(lengths))
        moved_mib = 8 * self.num_layers * self.hidden_size * 2 / _MIB * lengths / kind.degree
        # Megabytes over gigabytes per second are milliseconds in FlexSP's constants.
        return np.asarray(moved_mib / self.bandwidth(kind.degree) / 1e3)

    def bandwidth(self, degree: int) -> float:
        """The bandwidth of a degree; between two listed ones, the lower (slower) of both."""
        listed = [b for d, b in self.bandwidth_gb_per_s if d >= degree]
        below = [b for d, b in self.bandwidth_gb_per_s if 1 < d <= degree]
        return min(listed[:1] + below[-1:])

    def capacity_tokens(self, kind: GroupKind) -> int:
        """Tokens of one rank."""
        return self.device_token_capacity

    def memory_bytes(self, tokens: int) -> int:
        """Bytes of the activations."""
        return tokens * self.bytes_per_token

    def fingerprint(self) -> str:
        """A short hash of the constants."""
        return fingerprint(asdict(self))


def flexsp_cluster(num_devices: int, devices_per_node: int | None = None) -> Cluster:
    """Devices whose rates the cost model does not ask for; one node unless told otherwise."""
    node = devices_per_node or num_devices
    return Cluster(
        node_of=tuple(r // node for r in range(num_devices)),
        devices=(Device("flexsp", 1.0, 1.0, 1),),
        device_of=(0,) * num_devices,
        intra_node=Link(1.0, 0.0),
        inter_node=Link(1.0, 0.0),
    )
