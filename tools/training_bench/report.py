"""How the training benchmark shows its cases."""

from __future__ import annotations

from typing import Any


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| documents | mask | recompute | step s | of equal streams | predicted s | calibrated s "
        "| tokens/s | MFU | peak GiB | predicted GiB |",
        "|" + "---|" * 11,
    ]
    for r in rows:
        equal, calibrated = (
            "" if r.get(k) is None else f"{r[k]:.3f}" for k in ("equal_streams_s", "calibrated_s")
        )
        lines.append(
            f"| {r['documents']} x {r['tokens']:,} | {r['mask']} | "
            f"{'layers' if r['recompute'] else 'no'} | {r['step_s']:.3f} | {equal} | "
            f"{r['predicted_s']:.3f} | {calibrated} | {r['tokens_per_s']:,.0f} | "
            f"{r['mfu']:.1%} | {r['peak_gib']:.1f} | {r['predicted_gib']:.1f} |"
        )
    return "\n".join(lines)


def line(row: dict[str, Any]) -> str:
    keys = ("step_s", "optimizer_s", "predicted_s", "tokens_per_s", "mfu", "peak_gib",
            "predicted_gib")  # fmt: skip
    return (
        f"{row['case']}: "
        + "  ".join(f"{k} {row[k]:.3f}" for k in keys)
        + (f"  recompute {row['recompute']}  micro-batches {row['micro_batches']}")
    )
