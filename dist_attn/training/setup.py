"""What must be there and fit together before the first step."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from dist_attn.config import ClusterConfig, Config
from dist_attn.data import AnyCorpus, open_corpus
from dist_attn.errors import CheckpointError, ConfigError, CorpusError, UserError
from dist_attn.planner.cluster import Cluster, local_cluster
from dist_attn.planner.fitting import describe_capacity, smallest_change
from dist_attn.planner.problem import PlanningProblem
from dist_attn.training.runtime import Runtime

#: Change how the model is computed, not what it is.
_FREE_MODEL_KEYS = (
    "gradient_checkpointing",
    "keep_attention",
    "offload_checkpoints",
    "mlp_tile_tokens",
    "loss",
    "loss_chunk_tokens",
    "checkpoint",
    "kernels",
)


def open_corpus_on_every_rank(
    config: Config, runtime: Runtime, begun_with: str | None = None
) -> AnyCorpus:
    """Open the corpus on rank 0, then once per node, then everywhere: only the first tokenises.

    A run that goes on passes the folder of the cache that it has begun with.

    Collective: by all ranks.

    Raises:
        CorpusError: on every rank.
    """
    cache = Path(config.data.cache_dir or Path(config.run.dir).parent / "corpus-cache")
    corpus: AnyCorpus | None = None
    for turn in range(3):
        mine = 0 if runtime.is_main else 1 if runtime.local_rank == 0 else 2
        with runtime.together():
            if mine == turn:
                corpus = _open(config, cache, begun_with, show_progress=runtime.is_main)
    assert corpus is not None
    prints = runtime.gather(corpus.fingerprint)
    different = [r for r, f in enumerate(prints) if f != prints[0]]
    if different:
        raise CorpusError(
            f"rank {different[0]} reads another corpus than rank 0; give every node the same files"
        )
    return corpus


def _open(config: Config, cache: Path, begun_with: str | None, *, show_progress: bool) -> AnyCorpus:
    if not (show_progress and config.logging.progress_bar and sys.stdout.isatty()):
        return open_corpus(config.data, cache, None, begun_with)
    with Progress(transient=True) as progress:
        task = progress.add_task("reading the corpus", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return open_corpus(config.data, cache, show, begun_with)


def devices_of_ranks(config: Config, runtime: Runtime) -> Cluster:
    """The cluster that runs: as described, else by the names of its devices.

    Collective: by all ranks.

    Raises:
        ConfigError: on every rank, when the described cluster has another number of ranks.
    """
    return cluster_at_hand(config, runtime)


def cluster_at_hand(config: Config, runtime: Runtime) -> Cluster:
    """The cluster of the ranks that run, as described or as found.

    Collective: by all ranks.

    Raises:
        ConfigError: on every rank, when the described cluster has another number of ranks.
    """
    names = runtime.gather(_device_name(runtime))
    with runtime.together():
        return _cluster(config, runtime, names)


def _device_name(runtime: Runtime) -> str:
    if runtime.device.type == "cpu":
        return "cpu"
    return str(torch.cuda.get_device_name(runtime.device))


def _cluster(config: Config, runtime: Runtime, names: list[str]) -> Cluster:
    described = config.cluster
    if not isinstance(described, ClusterConfig):
        return local_cluster(runtime.world_size, names, runtime.local_world_size)
    if described.world_size != runtime.world_size:
        raise ConfigError(
            f"cluster: describes {described.world_size} devices, but {runtime.world_size} ranks "
            f"run; start {described.world_size} ranks, or set cluster to 'auto'"
        )
    return Cluster.from_config(described)


def check_longest(
    problem: PlanningProblem, corpus: AnyCorpus, config: Config, devices: Cluster
) -> None:
    """Refuse before training a document that no group can hold.

    Raises:
        UserError: naming the document, its length, the capacity with its parts, and the smallest
            change that would fit it.
    """
    longest = int(corpus.lengths.argmax())
    length = int(corpus.lengths[longest])
    try:
        problem.solve((length,))
    except UserError as error:
        parts = [f"{corpus.name(longest)}: {error}"]
        if config.planner.max_tokens_per_device is None:
            with contextlib.suppress(UserError):
                parts.append(describe_capacity(config, problem, corpus.vocab_size))
            parts.append(smallest_change(config, devices, corpus.vocab_size, length))
        raise type(error)("; ".join(parts)) from None


def run_identity(config: Config, corpus: AnyCorpus) -> dict[str, Any]:
    """What a resumed run must have in common with the one that wrote the checkpoint."""
    data = config.model_dump(mode="json")
    model = {k: v for k, v in data["model"].items() if k not in _FREE_MODEL_KEYS}
    return {
        "model": model,
        "optimizer": data["optimizer"],
        "batch": data["data"]["batch"],
        "shuffle": data["data"]["shuffle"],
        "masks": data["attention"]["masks"],
        "seed": data["run"]["seed"],
        "stages": data["stages"],
        "loss_weights": {s.name: s.loss_weight for s in config.data.sources},
        "corpus": corpus.fingerprint,
    }


def check_identity(path: Path, saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise CheckpointError with every difference between the checkpoint's run and this one."""
    changed = []
    for key, value in here.items():
        old = saved.get(key)
        if old is None and not value:
            continue  # written before there was such a key
        if isinstance(value, dict) and isinstance(old, dict):
            changed += [
                f"{key}.{k}: {old.get(k)!r} there, {v!r} here"
                for k, v in value.items()
                if old.get(k) != v
            ]
        elif old != value:
            changed.append(f"{key}: {old!r} there, {value!r} here")
    if changed:
        raise CheckpointError(
            f"checkpoint {path} is of another run; " + "; ".join(changed) + "; resume with the "
            "configuration and corpus that it was made with"
        )


def check_steps_left(path: Path, step: int, steps: int) -> None:
    """Raise CheckpointError when a checkpoint leaves nothing to do."""
    if step >= steps:
        raise CheckpointError(
            f"checkpoint {path} has done all of run.steps ({steps}); to train further raise it, "
            f"for example --set run.steps={step + steps}"
        )
