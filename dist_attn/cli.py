"""The command line: `dist-attn train`, `plan`, `export`. Arguments and exit codes, nothing else."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dist_attn.config import load_config
from dist_attn.errors import ConfigError, UserError

USER_ERROR_EXIT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code.

    0: done. 2: the input is at fault, one message says how. Anything else: the program is.
    """
    parsed = _parser().parse_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(message)s" if rank == 0 else f"[rank {rank}] %(message)s",
    )
    try:
        run: Callable[[argparse.Namespace], int] = parsed.run
        return run(parsed)
    except UserError as error:
        # Every rank raises the same refusal; one of them says it.
        if rank == 0:
            sys.stderr.write(f"error: {error}\n")
        return USER_ERROR_EXIT


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
        help="continue from the newest checkpoint of the run folder, or from the one named",
    )
    train.add_argument("--nproc-per-node", type=int, metavar="N", help="ranks to start")
    train.set_defaults(run=_train)

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
        description="Prints the plan as a table and writes plan.json, plan.png and plan.html.",
    )
    _add_config(plan)
    plan.add_argument(
        "--lengths", type=Path, required=True, metavar="FILE", help="tokens of each document"
    )
    plan.add_argument("--out", type=Path, required=True, metavar="DIR", help="where files go")
    plan.set_defaults(run=_plan)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cfg", required=True, metavar="FILE", help="run configuration, YAML")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="override a value of the configuration; may be given several times",
    )


def _train(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.cfg, parsed.set)
    if "RANK" not in os.environ:
        from dist_attn.training.launcher import launch, ranks_per_node

        arguments = ["--cfg", parsed.cfg]
        arguments += [part for item in parsed.set for part in ("--set", item)]
        arguments += ["--resume", parsed.resume] if parsed.resume is not None else []
        return launch(arguments, ranks_per_node(parsed.nproc_per_node))
    if parsed.nproc_per_node is not None:
        raise ConfigError("--nproc-per-node goes to torchrun when torchrun starts the ranks")
    from dist_attn.training.loop import train

    train(config, parsed.resume)
    return 0


def _export(parsed: argparse.Namespace) -> int:
    from dist_attn.training.export import export

    path = export(parsed.run_folder, parsed.checkpoint, parsed.out, parsed.dtype)
    logging.getLogger(__name__).info("wrote %s as %s", path, parsed.out)
    return 0


def _plan(parsed: argparse.Namespace) -> int:
    from dist_attn.planner.command import run_plan_command

    run_plan_command(load_config(parsed.cfg, parsed.set), parsed.lengths, parsed.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
