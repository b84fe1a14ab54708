"""Checks every node before a training, over the ranks that would train, and names the bad ones."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dist_attn.config import ClusterConfig, Config, dump_config
from dist_attn.errors import NodeError
from dist_attn.planner.calibration import Calibration
from dist_attn.planner.cluster import Cluster
from dist_attn.training.links import clock_offset_s, exchange_bytes_per_s, matmul_tflops
from dist_attn.training.runtime import Runtime, choose_device, joined
from dist_attn.training.watchdog import SETUP

logger = logging.getLogger(__name__)

_PACKAGES = ("dist-attn", "torch", "triton", "deepspeed", "megatron-core", "transformers", "numpy")
#: A device that is slower than this share of the median of its kind is at fault.
_MIN_SPEED_SHARE = 0.8
GIB = 1 << 30


@dataclass(frozen=True)
class Limits:
    """What a node must meet."""

    min_free_gib: float = 20.0
    max_clock_offset_s: float = 1.0
    #: Of the rate that the cluster description promises.
    min_bandwidth_share: float = 0.5


@dataclass(frozen=True)
class Findings:
    """What one rank found out about its place."""

    node: str
    device: str
    #: CPUs that the rank may run on.
    cpus: int
    #: Ranks of the node for every device that it has.
    ranks_per_device: float
    versions: tuple[tuple[str, str], ...]
    config_hash: str
    free_gib: float
    #: Why the run's folder cannot be written; empty if it can.
    unwritable: str
    #: Whether rank 0's note in the run's folder is seen here.
    shared: bool
    clock_offset_s: float
    #: Of a large matrix product; 0 on CPUs, whose ranks share cores.
    tflops: float
    #: What this rank sent while it received as much; None without such a neighbour.
    intra_node_bytes_per_s: float | None
    inter_node_bytes_per_s: float | None


@dataclass(frozen=True)
class Promise:
    """Bytes per second that links are said to reach, and who says so; None where nobody does."""

    source: str
    intra_node: float | None
    inter_node: float | None

    @classmethod
    def of(cls, config: Config, calibration: Path | None) -> Promise:
        """What a calibration measured on good nodes, and for the rest the cluster description.

        Raises:
            ConfigError: the calibration cannot be read.
        """
        described = config.cluster if isinstance(config.cluster, ClusterConfig) else None
        cluster = None if described is None else Cluster.from_config(described)
        rates: list[float | None] = [None, None]
        if cluster is not None:
            rates = [cluster.intra_node.bytes_per_s, cluster.inter_node.bytes_per_s]
        if calibration is None:
            return cls("the cluster", *rates)
        fits = Calibration.load(calibration)
        for index, fit in enumerate((fits.intra_node, fits.inter_node)):
            if fit is not None and fit.coefficients[1] > 0:
                rates[index] = 1 / fit.coefficients[1]
        return cls(str(calibration), *rates)


@dataclass(frozen=True)
class Complaint:
    """Something wrong with a node."""

    node: str
    text: str


def preflight(config: Config, limits: Limits, calibration: Path | None = None) -> None:
    """Check the nodes of this run; rank 0 prints a table and what is wrong.

    Args:
        config: of the run.
        limits: what a node must meet.
        calibration: a file of `dist-attn calibrate`, whose links are held against what is measured.

    Raises:
        ConfigError: the calibration cannot be read.
        NodeError: on every rank, naming the bad nodes.

    Collective: by all ranks; the process group is made from the environment and ended.
    """
    config = config.on(choose_device(config.run.device, 0).type)
    with joined(config.run) as (runtime, mark):
        mark(SETUP, "the preflight")
        check_nodes(config, limits, runtime, calibration)


def check_nodes(
    config: Config, limits: Limits, runtime: Runtime, calibration: Path | None = None
) -> list[Findings]:
    """Check the nodes on a process group that exists; see `preflight`."""
    mine = None
    with runtime.together():
        if runtime.is_main:
            mine = Promise.of(config, calibration)
    promise: Promise = runtime.broadcast(mine)
    everyone: list[Findings] = runtime.gather(_examine(config, runtime))
    described = config.cluster if isinstance(config.cluster, ClusterConfig) else None
    complaints = judge(everyone, limits, described, promise)
    if runtime.is_main:
        _show(everyone)
        for complaint in complaints:
            logger.error("%s: %s", complaint.node, complaint.text)
    bad = list(dict.fromkeys(c.node for c in complaints))
    if bad:
        raise NodeError(f"bad nodes: {','.join(bad)}")
    if runtime.is_main:
        logger.info("%d ranks on %d nodes are fit", len(everyone), len({f.node for f in everyone}))
    return everyone


def judge(
    everyone: list[Findings],
    limits: Limits,
    described: ClusterConfig | None,
    promise: Promise,
) -> list[Complaint]:
    """Hold what the ranks found against the limits, the description and each other."""
    complaints = [
        Complaint(finding.node, text)
        for finding in everyone
        for text in _own_faults(finding, limits)
    ]
    complaints += _outliers("configuration", everyone, [f.config_hash for f in everyone])
    packages = [dict(f.versions) for f in everyone]
    for package in packages[0]:
        complaints += _outliers(package, everyone, [p.get(package) for p in packages])
    complaints += _slow_devices(everyone)
    if described is not None:
        misplaced = _against_description(everyone, described)
        if misplaced and len(everyone) != described.world_size:
            return list(dict.fromkeys(misplaced))
        complaints += misplaced
    complaints += _slow_links(everyone, limits, promise)
    return list(dict.fromkeys(complaints))


def _own_faults(finding: Findings, limits: Limits) -> Iterable[str]:
    if finding.unwritable:
        yield f"run.dir cannot be written: {finding.unwritable}"
    elif not finding.shared:
        yield "run.dir is not the folder that rank 0 sees; put it on a shared file system"
    if finding.free_gib < limits.min_free_gib:
        yield f"{finding.free_gib:.1f} GiB free for run.dir, {limits.min_free_gib:g} are wanted"
    if abs(finding.clock_offset_s) > limits.max_clock_offset_s:
        yield (
            f"clock is {finding.clock_offset_s:+.3f} s off rank 0's, "
            f"{limits.max_clock_offset_s:g} s are allowed"
        )
    if finding.ranks_per_device > 1:
        yield (
            f"{finding.ranks_per_device:g} ranks share a GPU, so that communication would go "
            f"through the host; let each task see all GPUs of its node (srun --gpu-bind=none)"
        )


def _outliers(what: str, everyone: list[Findings], values: list[Hashable]) -> list[Complaint]:
    """Nodes that differ from what most ranks have."""
    usual, _ = Counter(values).most_common(1)[0]
    return [
        Complaint(f.node, f"{what} is {value}, where most have {usual}")
        for f, value in zip(everyone, values, strict=True)
        if value != usual
    ]


def _slow_devices(everyone: list[Findings]) -> list[Complaint]:
    complaints = []
    for device in {f.device for f in everyone if f.tflops}:
        alike = [f for f in everyone if f.device == device]
        median = statistics.median(f.tflops for f in alike)
        complaints += [
            Complaint(f.node, f"a {device} reaches {f.tflops:.0f} TFLOP/s, others {median:.0f}")
            for f in alike
            if f.tflops < _MIN_SPEED_SHARE * median
        ]
    return complaints


def _against_description(everyone: list[Findings], described: ClusterConfig) -> list[Complaint]:
    cluster = Cluster.from_config(described)
    complaints = []
    if cluster.world_size != len(everyone):
        text = f"{len(everyone)} ranks came, the cluster describes {cluster.world_size} devices"
        return [Complaint(node, text) for node in dict.fromkeys(f.node for f in everyone)]
    nodes = list(dict.fromkeys(f.node for f in everyone))
    for rank, finding in enumerate(everyone):
        if nodes.index(finding.node) != cluster.node_of[rank]:
            text = f"rank {rank} is here, the cluster puts it on node {cluster.node_of[rank]}"
            complaints.append(Complaint(finding.node, text))
    return complaints


def _slow_links(everyone: list[Findings], limits: Limits, promise: Promise) -> list[Complaint]:
    complaints = []
    for what, promised, rates in (
        ("inside the node", promise.intra_node, [f.intra_node_bytes_per_s for f in everyone]),
        ("to other nodes", promise.inter_node, [f.inter_node_bytes_per_s for f in everyone]),
    ):
        if promised is None:
            continue
        for rank, (finding, rate) in enumerate(zip(everyone, rates, strict=True)):
            if rate is not None and rate < promised * limits.min_bandwidth_share:
                text = (
                    f"rank {rank} sends {rate / 1e9:.2f} GB/s {what}, {promise.source} promises "
                    f"{promised / 1e9:.2f}"
                )
                complaints.append(Complaint(finding.node, text))
    return complaints


def _examine(config: Config, runtime: Runtime) -> Findings:
    folder = Path(config.run.dir)
    unwritable, shared = _try_folder(folder, runtime)
    cuda = runtime.device.type == "cuda"
    nodes = runtime.nodes or ("here",) * runtime.world_size
    rates = exchange_bytes_per_s(nodes, runtime)
    return Findings(
        node=nodes[runtime.rank],
        device=torch.cuda.get_device_name(runtime.device) if cuda else "cpu",
        cpus=len(os.sched_getaffinity(0)),
        ranks_per_device=runtime.local_world_size / torch.cuda.device_count() if cuda else 1.0,
        versions=_versions(),
        config_hash=hashlib.sha256(dump_config(config).encode()).hexdigest()[:16],
        free_gib=shutil.disk_usage(_existing(folder)).free / GIB,
        unwritable=unwritable,
        shared=shared,
        clock_offset_s=clock_offset_s(nodes, runtime),
        tflops=matmul_tflops(runtime.device) if cuda else 0.0,
        intra_node_bytes_per_s=rates.intra_node,
        inter_node_bytes_per_s=rates.inter_node,
    )


def _try_folder(folder: Path, runtime: Runtime) -> tuple[str, bool]:
    """Why files cannot be made beside the run's folder, and whether rank 0's are seen here."""
    unwritable = ""
    note: str | None = None
    with contextlib.ExitStack() as stack:
        try:
            place = _existing(folder)
            file = stack.enter_context(tempfile.NamedTemporaryFile(dir=place, prefix=".preflight-"))
            note = file.name
        except OSError as error:
            unwritable = str(error)
        of_main: str | None = runtime.broadcast(note)
        shared = of_main is not None and Path(of_main).exists()
        runtime.barrier()  # Rank 0's note stays until all have looked.
    return unwritable, shared


def _existing(folder: Path) -> Path:
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())


def _versions() -> tuple[tuple[str, str], ...]:
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        driver = Path("/proc/driver/nvidia/version")
        if driver.is_file() and os.access(driver, os.R_OK):
            found["driver"] = driver.read_text(encoding="utf-8").splitlines()[0]
    return tuple(found.items())


def _show(everyone: list[Findings]) -> None:
    table = Table(box=None)
    titles = "node,ranks,CPUs,device,free GiB,clock s,TFLOP/s,GB/s in,GB/s out"
    for title in titles.split(","):
        table.add_column(title, justify="left" if title in ("node", "device") else "right")
    for node in dict.fromkeys(f.node for f in everyone):
        mine = [f for f in everyone if f.node == node]
        table.add_row(
            node,
            str(len(mine)),
            str(min(f.cpus for f in mine)),
            ", ".join(sorted({f.device for f in mine})),
            f"{min(f.free_gib for f in mine):.1f}",
            f"{max((f.clock_offset_s for f in mine), key=abs):+.4f}",
            _least([f.tflops or None for f in mine], 1.0, 0),
            _least([f.intra_node_bytes_per_s for f in mine], 1e9, 2),
            _least([f.inter_node_bytes_per_s for f in mine], 1e9, 2),
        )
    # A log is as wide as its lines.
    width = None if sys.stdout.isatty() else 160
    Console(soft_wrap=True, highlight=False, width=width).print(table)


def _least(values: list[float | None], unit: float, digits: int) -> str:
    there = [v for v in values if v is not None]
    return f"{min(there) / unit:.{digits}f}" if there else "-"
