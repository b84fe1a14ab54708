"""The command line, `dist-attn COMMAND`: arguments and exit codes, nothing else."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import itertools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dist_attn.config import load_cluster, load_config
from dist_attn.errors import (
    NODE_ERROR_EXIT,
    STOPPED_EXIT,
    USER_ERROR_EXIT,
    ConfigError,
    NodeError,
    Stopped,
    UserError,
)
from dist_attn.training.rank_log import log_to
from dist_attn.training.slurm import adopt_task
from dist_attn.training.stop import STACKS_SIGNAL


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code.

    0: done. 2: the input is at fault. 69: a machine is. 75: stopped when asked to, start again with
    --resume. In these cases one message says how. Anything else: the program is at fault.
    """
    parsed = _parser().parse_args(argv)
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(message)s" if rank == 0 else f"[rank {rank}] %(message)s",
    )
    # A signal that ends the process (a truncated file under a memory map, say) shows where it was.
    with contextlib.suppress(io.UnsupportedOperation):  # stderr may be no file
        faulthandler.enable()
        faulthandler.register(STACKS_SIGNAL)
    # Whatever the user's mask: nobody else writes into what a run leaves.
    os.umask(os.umask(0o022) | 0o022)
    try:
        run: Callable[[argparse.Namespace], int] = parsed.run
        return run(parsed)
    except (UserError, Stopped) as error:
        # Every rank raises the same; one of them says it.
        stopped = isinstance(error, Stopped)
        if rank == 0:
            sys.stderr.write(f"{error}\n" if stopped else f"error: {error}\n")
        return STOPPED_EXIT if stopped else USER_ERROR_EXIT
    except NodeError as error:
        sys.stderr.write(f"[rank {rank}] error: {error}\n")
        return NODE_ERROR_EXIT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dist-attn", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train, or continue a training",
        description="Without torchrun around it, starts one rank per GPU of this machine (four "
        "on CPUs) and passes on their exit code.",
    )
    _add_config(train)
    train.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="CHECKPOINT",
        help="continue from the newest checkpoint of the run folder, or from the one named; `auto` "
        "begins where there is none yet, for jobs that are started again by themselves",
    )
    _add_ranks(train)
    train.set_defaults(run=_train)

    preflight = commands.add_parser(
        "preflight",
        help="check every node before a training, and name the bad ones",
        description="Started like `train`, on the same nodes: devices, versions, configuration, "
        "disk, clocks and bandwidth. Exit code 69 and a line `bad nodes: ...` if any is unfit.",
    )
    _add_config(preflight)
    _add_ranks(preflight)
    preflight.add_argument("--min-free-gib", type=float, default=20.0, metavar="GIB")
    preflight.add_argument("--max-clock-offset-s", type=float, default=1.0, metavar="S")
    preflight.add_argument(
        "--min-bandwidth-share",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of what the calibration or the cluster description promises",
    )
    preflight.add_argument(
        "--calibration", type=Path, metavar="FILE", help="of `dist-attn calibrate`, on good nodes"
    )
    preflight.set_defaults(run=_preflight)

    calibrate = commands.add_parser(
        "calibrate",
        help="measure this machine, and write costs that plans read",
        description="Started like `train`, on ranks of one kind of device: times the configured "
        "model over lengths and degrees, and exchanges over group sizes; fits costs to them, says "
        "how well, and writes a file for `cost: {calibrations: [FILE]}`.",
    )
    _add_config(calibrate)
    _add_ranks(calibrate)
    calibrate.add_argument("--out", type=Path, required=True, metavar="FILE", help="YAML")
    calibrate.add_argument(
        "--max-tokens", type=int, metavar="N", help="longest document (2,048 on CPUs, 65,536)"
    )
    calibrate.add_argument("--repeats", type=int, default=5, metavar="N")
    calibrate.set_defaults(run=_calibrate)

    export = commands.add_parser(
        "export",
        help="write a checkpoint as a folder that transformers loads",
        description="Writes config.json, safetensors and the tokenizer, if the run has one.",
    )
    export.add_argument("--run", type=Path, required=True, metavar="DIR", dest="run_folder")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    export.add_argument("--checkpoint", default="latest", metavar="NAME")
    export.add_argument("--dtype", choices=["fp32", "bf16"], help="default: the run's own")
    export.set_defaults(run=_export)

    plan = commands.add_parser(
        "plan",
        help="preview the plan of a batch of documents, for any cluster",
        description="Prints the plan as a table and writes plan.json, plan.png and plan.html. "
        "Several configurations, lengths or clusters are planned in all combinations and "
        "compared.",
    )
    _add_config(plan, several=True)
    plan.add_argument(
        "--lengths",
        type=Path,
        required=True,
        nargs="+",
        metavar="FILE",
        help="tokens of each document",
    )
    plan.add_argument(
        "--cluster",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="cluster files, in place of the configuration's",
    )
    plan.add_argument("--out", type=Path, required=True, metavar="DIR", help="where files go")
    plan.set_defaults(run=_plan)
    return parser


def _add_config(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    parser.add_argument(
        "--cfg",
        required=True,
        nargs="+" if several else None,
        metavar="FILE",
        help="run configuration, YAML",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="override a value of the configuration; may be given several times",
    )


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nproc-per-node", type=int, metavar="N", help="ranks to start per node")
    parser.add_argument(
        "--log-dir",
        type=Path,
        metavar="DIR",
        help="what each rank writes goes to DIR/rank-N.log, after what is there",
    )


def _is_rank(parsed: argparse.Namespace) -> bool:
    """Whether torchrun or srun made this process a rank; else it starts the ranks of its node."""
    if parsed.nproc_per_node is None:
        is_rank = "RANK" in os.environ or adopt_task(os.environ)
        if is_rank and parsed.log_dir is not None:
            log_to(parsed.log_dir, int(os.environ["RANK"]))
        return is_rank
    if "RANK" in os.environ:
        raise ConfigError("--nproc-per-node goes to torchrun when torchrun starts the ranks")
    return False


def _launch(command: str, parsed: argparse.Namespace, patience_s: float, *more: str) -> int:
    from dist_attn.training.launcher import launch, ranks_per_node
    from dist_attn.training.slurm import place_of_node

    node = place_of_node(os.environ) if parsed.nproc_per_node is not None else None
    overrides = [part for item in parsed.set for part in ("--set", item)]
    arguments = [command, "--cfg", parsed.cfg, *overrides, *more]
    if parsed.log_dir is not None:
        arguments += ["--log-dir", str(parsed.log_dir)]
    code = launch(arguments, ranks_per_node(parsed.nproc_per_node), patience_s, node)
    if code and parsed.log_dir is not None:
        sys.stderr.write(f"exit code {code}; what the ranks wrote is in {parsed.log_dir}\n")
    return code


def _train(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.cfg, parsed.set)
    if not _is_rank(parsed):
        resume = ["--resume", parsed.resume] if parsed.resume is not None else []
        return _launch("train", parsed, config.run.timeout_s, *resume)
    from dist_attn.training.loop import train

    train(config, parsed.resume)
    return 0


def _preflight(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.cfg, parsed.set)
    limits = ("min_free_gib", "max_clock_offset_s", "min_bandwidth_share")
    if not _is_rank(parsed):
        more = [(f"--{k.replace('_', '-')}", str(getattr(parsed, k))) for k in limits]
        if parsed.calibration is not None:
            more.append(("--calibration", str(parsed.calibration)))
        timeout_s = config.run.timeout_s
        return _launch("preflight", parsed, timeout_s, *(part for pair in more for part in pair))
    from dist_attn.training.preflight import Limits, preflight

    preflight(config, Limits(**{k: getattr(parsed, k) for k in limits}), parsed.calibration)
    return 0


def _calibrate(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.cfg, parsed.set)
    if parsed.max_tokens is not None and parsed.max_tokens < 256:
        raise ConfigError(f"--max-tokens takes 256 or more, got {parsed.max_tokens}")
    if parsed.repeats < 1:
        raise ConfigError(f"--repeats takes 1 or more, got {parsed.repeats}")
    if not _is_rank(parsed):
        more = ["--out", str(parsed.out), "--repeats", str(parsed.repeats)]
        more += [] if parsed.max_tokens is None else ["--max-tokens", str(parsed.max_tokens)]
        return _launch("calibrate", parsed, config.run.timeout_s, *more)
    from dist_attn.training.calibrate import Extent, calibrate

    calibrate(config, parsed.out, Extent(parsed.max_tokens, parsed.repeats))
    return 0


def _export(parsed: argparse.Namespace) -> int:
    from dist_attn.training.export import export

    path = export(parsed.run_folder, parsed.checkpoint, parsed.out, parsed.dtype)
    logging.getLogger(__name__).info("wrote %s as %s", path, parsed.out)
    return 0


def _plan(parsed: argparse.Namespace) -> int:
    from dist_attn.planner.command import run_compare_command, run_plan_command

    choices = list(itertools.product(parsed.cfg, parsed.cluster or [None], parsed.lengths))
    cases = []
    for cfg, cluster, lengths in choices:
        config = load_config(cfg, parsed.set)
        if cluster is not None:
            config = config.model_copy(update={"cluster": load_cluster(cluster)})
        # What is the same in all of them tells nothing.
        parts = ((cfg, parsed.cfg), (cluster, parsed.cluster or []), (lengths, parsed.lengths))
        name = " ".join(Path(part).stem for part, given in parts if len(given) > 1)
        cases.append((name, config, lengths))
    if len(cases) == 1:
        run_plan_command(cases[0][1], cases[0][2], parsed.out)
    elif len({name for name, _, _ in cases}) < len(cases):
        raise ConfigError("two plans would have one name; give files of different names")
    else:
        run_compare_command(cases, parsed.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
