"""Compare plans with FlexSP's on a file of batches; the last line is one JSON object.

    tools/bench_planner.py --batches FILE [--baselines] [--outside]

FILE is a JSON list of batches: `lengths`, `cluster_size`, `device_token_capacity`, `costmodel` and,
where FlexSP's solver was run, `flexsp_objective_ms`. Every plan passes the independent checker.
Seconds are of one core (processor time of this process).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from dist_attn.config import PlannerConfig
from dist_attn.planner.baselines import dynamic_plan
from dist_attn.planner.check import check_plan
from dist_attn.planner.cluster import Cluster
from dist_attn.planner.costs import GroupKind
from dist_attn.planner.flexsp import FlexSPCost, flexsp_cluster
from dist_attn.planner.free import plan_free
from dist_attn.planner.plan import Plan
from dist_attn.planner.program import build_program
from dist_attn.planner.solve import plan, static_plan
from dist_attn.planner.step_plan import plan_step, step_bound

RULES = PlannerConfig(time_limit_s=60.0)


def main() -> None:
    """Print one line per batch, and the summary as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--baselines", action="store_true", help="static and greedy dynamic degrees"
    )
    parser.add_argument("--outside", action="store_true", help="also plan outside FlexSP's rules")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    records = json.loads(args.batches.read_text(encoding="utf-8"))
    rows = [measure(record, args) for record in records]
    print(json.dumps(summary(rows)))


def measure(record: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Plan one batch under FlexSP's rules, and what else was asked for."""
    lengths = record["lengths"]
    cluster, cost = flexsp_cluster(record["cluster_size"]), FlexSPCost.from_record(record)
    started = time.process_time()
    found = plan(lengths, cluster, cost, RULES, ["ulysses"], args.seed)
    row: dict[str, Any] = {
        "name": record.get("name", "batch"),
        "ours_ms": found.predicted_s * 1e3,
        "bound_ms": found.lower_bound_s * 1e3,
        "gap": found.gap,
        "seconds": time.process_time() - started,
        "flexsp_ms": record.get("flexsp_objective_ms"),
    }
    check_plan(found, lengths, cluster, cost)
    if args.baselines:
        row["static_ms"] = _checked(
            static_plan(lengths, cluster, cost, RULES, ["ulysses"]), lengths, cluster, cost
        )
        row["dynamic_ms"] = _checked(
            dynamic_plan(lengths, cluster, cost, RULES, ["ulysses"]), lengths, cluster, cost
        )
    if args.outside:
        alone = FlexSPCost.from_record(record, min_degree=1)
        strategies = ["ulysses"]
        row["degree1_ms"] = _checked(
            plan(lengths, cluster, alone, RULES, strategies, args.seed), lengths, cluster, alone
        )
        free = RULES.model_copy(update={"degrees": "all"})
        row["free_degrees_ms"] = _checked(
            plan(lengths, cluster, alone, free, strategies, args.seed), lengths, cluster, alone
        )
        step = plan_step(lengths, cluster, alone, RULES, strategies, args.seed)
        row["step_ms"] = _checked(step, lengths, cluster, alone)
        row["step_bound_ms"] = step.lower_bound_s * 1e3
        placed = plan_free(lengths, cluster, alone, RULES, strategies, args.seed)
        row["free_ms"] = _checked(placed, lengths, cluster, alone)
        row["free_bound_ms"] = placed.lower_bound_s * 1e3
        row |= limits(lengths, cluster, alone)
    shown = [f"{row['name']:24s}"]
    for key, value in row.items():
        if isinstance(value, float):
            unit = "8.1f" if key.endswith("_ms") else "7.4f"
            shown.append(f"{key} {value:{unit}}")
    if row["flexsp_ms"]:
        shown.append(f"ratio {row['flexsp_ms'] / row['ours_ms']:.4f}")
    print("  ".join(shown), flush=True)
    return row


def limits(lengths: list[int], cluster: Cluster, cost: FlexSPCost) -> dict[str, float]:
    """Times that no plan beats, whatever placement, synchronisation and degrees it combines.

    `arithmetic_ms`: the work of all documents, level over all ranks. `constants_ms`: besides, every
    rank pays the constant for every micro-batch of its own, of which there are at least as many as
    tokens over room, counted in fractions. `together_bound_ms`: besides, every document is sent at
    least at its cheapest degree, of all degrees in which a rank's memory suffices. Uneven shares do
    not change the last: together the ranks never send less than with even ones (`uneven`).
    """
    array = np.array(lengths)
    one = GroupKind(1, "local")
    work = float(cost.compute_s(one, array).sum()) / cluster.world_size
    fill = float(array.sum()) / (cluster.world_size * cost.device_token_capacity)
    every = RULES.model_copy(update={"degrees": "all"})
    program = build_program(lengths, cluster, cost, every, ["ulysses"], whole_documents=False)
    return {
        "arithmetic_ms": 1e3 * work,
        "constants_ms": 1e3 * (work + fill * cost.fixed_s(one)),
        "together_bound_ms": 1e3 * step_bound(program),
    }


def _checked(found: Plan | None, lengths: list[int], cluster: Any, cost: Any) -> float | None:
    if found is None:
        return None
    check_plan(found, lengths, cluster, cost)
    return found.predicted_s * 1e3


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and extremes over the batches."""
    known = [r for r in rows if r["flexsp_ms"]]
    ratios = [r["flexsp_ms"] / r["ours_ms"] for r in known]
    result: dict[str, Any] = {
        "batches": len(rows),
        "worse": sum(r < 1 for r in ratios),
        "mean_ratio": statistics.mean(ratios) if ratios else None,
        "mean_gap": statistics.mean(r["gap"] for r in rows),
        "max_gap": max(r["gap"] for r in rows),
        "mean_seconds": statistics.mean(r["seconds"] for r in rows),
        "max_seconds": max(r["seconds"] for r in rows),
    }
    for key in ("static_ms", "dynamic_ms"):
        others = [r[key] / r["ours_ms"] for r in rows if r.get(key)]
        if others:
            result[f"mean_ratio_to_{key[:-3]}"] = statistics.mean(others)
    outside = ("degree1_ms", "free_degrees_ms", "step_ms", "step_bound_ms")
    proven = ("together_bound_ms", "constants_ms", "arithmetic_ms")
    for key in (*outside, "free_ms", "free_bound_ms", *proven):
        gains = [r["flexsp_ms"] / r[key] for r in known if r.get(key)]
        if gains:
            result[f"mean_ratio_{key[:-3]}"] = statistics.mean(gains)
            tails = [r["flexsp_ms"] / r[key] for r in known if r["name"].startswith("tail")]
            result[f"mean_ratio_{key[:-3]}_tails"] = statistics.mean(tails)
    return result


if __name__ == "__main__":
    main()
