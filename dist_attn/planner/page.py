"""The plan as one self-contained HTML page: inline SVG, style and script, no network."""

from __future__ import annotations

import html
import json
from string import Template

from dist_attn.planner.colours import OVERHEAD, degree_colour
from dist_attn.planner.plan import Group, MicroBatch, Plan
from dist_attn.planner.schedule import Span, blocks, busy_share, group_starts, spans

_WIDTH = 1000.0

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Plan</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1080px;padding:0 1rem;color:#222}
h1{font-size:1.35rem;margin:0 0 .8rem}
.cards{display:flex;flex-wrap:wrap;gap:.6rem;margin-bottom:1rem}
.card{border:1px solid #ddd;border-radius:8px;padding:.5rem .9rem;min-width:7.5rem}
.card b{display:block;font-size:1.2rem;font-variant-numeric:tabular-nums}
.card span{color:#666;font-size:.82rem}
svg{width:100%;height:auto;border:1px solid #ddd;border-radius:6px;background:#fff}
svg .g{stroke:#444;stroke-width:.5;cursor:pointer}
svg .g:hover,svg .g.on{stroke:#000;stroke-width:1.8}
svg text{font:10px system-ui,sans-serif;fill:#222;pointer-events:none}
#tip{min-height:3.2em;padding:.5rem .2rem;font-variant-numeric:tabular-nums}
.legend span{display:inline-flex;align-items:center;margin-right:1rem;font-size:.85rem}
.legend i{width:14px;height:14px;border:1px solid #555;display:inline-block;margin-right:.35rem}
.scroll{max-height:32rem;overflow:auto;border:1px solid #ddd;border-radius:6px}
table{border-collapse:collapse;width:100%;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.25rem .6rem;border-bottom:1px solid #eee;white-space:nowrap}
th{position:sticky;top:0;background:#f6f6f6;cursor:pointer}
tr.on td{background:#fff3cd}
</style></head><body>
<h1>$title</h1>
<div class="cards">$cards</div>
<svg viewBox="-34 -6 1044 $height" role="img" aria-label="Timeline of the plan">
<defs><pattern id="idle" width="8" height="8" patternUnits="userSpaceOnUse">
<path d="M0 8L8 0" stroke="#d0d0d0" stroke-width="1"/></pattern></defs>
$drawing</svg>
<div class="legend">$legend</div>
<div id="tip">Point at a group for its documents and times.</div>
<div class="scroll"><table><thead><tr>
<th>micro-batch<th>group<th>degree<th>strategy<th>ranks
<th>documents<th>tokens<th>compute (s)<th>communication (s)<th>idle (s)<th>memory (GiB)</tr></thead>
<tbody></tbody></table></div>
<script>
const groups=$data;
const body=document.querySelector("tbody"),tip=document.getElementById("tip");
const f=x=>x.toPrecision(4);
function cells(g){return [g.m,g.g,g.d,g.s,g.r,g.n.length,g.t,f(g.c),f(g.x),f(g.i),f(g.b)]}
groups.forEach((g,k)=>{const row=body.insertRow();
cells(g).forEach(v=>row.insertCell().textContent=v);row.dataset.k=k});
function show(k){document.querySelectorAll(".on").forEach(e=>e.classList.remove("on"));
const g=groups[k];document.querySelectorAll('[data-k="'+k+'"]').forEach(e=>e.classList.add("on"));
const n=g.n.slice(0,40).join(", ")+(g.n.length>40?", ...":"");
tip.textContent="Micro-batch "+g.m+", group "+g.g+": ranks "+g.r+", "+g.s+", "+g.t+
" tokens, compute "+f(g.c)+" s, communication "+f(g.x)+" s, idle "+f(g.i)+" s. Lengths: "+n}
document.addEventListener("mouseover",e=>{const t=e.target.closest("[data-k]");
if(t)show(+t.dataset.k)});
document.querySelectorAll("th").forEach((th,c)=>th.addEventListener("click",()=>{
const up=th.dataset.up!=="1";th.dataset.up=up?"1":"0";const rows=[...body.rows];
rows.sort((a,b)=>{const x=a.cells[c].textContent,y=b.cells[c].textContent;
const d=isNaN(x)||isNaN(y)?x.localeCompare(y):x-y;return up?d:-d});
rows.forEach(r=>body.append(r))}));
</script></body></html>
""")


def page(plan: Plan, static: Plan | None = None) -> str:
    """The HTML text of a plan's page."""
    height = max(min(plan.world_size * 14.0, 620.0), 120.0)
    degrees = sorted({g.degree for m in plan.micro_batches for g in m.groups})
    legend = "".join(
        f'<span><i style="background:{degree_colour(d)}"></i>degree {d}</span>' for d in degrees
    )
    if any(m.overhead_s > 0 for m in plan.micro_batches):
        legend += f'<span><i style="background:{OVERHEAD}"></i>overhead</span>'
    legend += (
        '<span><i style="background:repeating-linear-gradient(135deg,#fff 0 3px,#ccc 3px 4px)">'
    )
    legend += "</i>idle</span>"
    return _PAGE.substitute(
        title=html.escape(
            f"{len(plan.lengths)} documents, {sum(plan.lengths):,} tokens "
            f"on {plan.world_size} ranks"
        ),
        cards=_cards(plan, static),
        height=f"{height + 34:g}",
        drawing=drawing(plan, height),
        legend=legend,
        data=json.dumps(_groups(plan), separators=(",", ":")).replace("</", "<\\/"),
    )


def _cards(plan: Plan, static: Plan | None) -> str:
    facts = [
        (f"{plan.predicted_s:.4g} s", "predicted step"),
        (f"{plan.lower_bound_s:.4g} s", "lower bound"),
        (f"{plan.gap:.1%}", "gap"),
        (f"{busy_share(plan):.1%}", "ranks busy"),
        (str(len(plan.micro_batches)), "micro-batches"),
        (f"{plan.solver.seconds:.2f} s", "to solve"),
    ]
    if static is not None:
        degree = static.micro_batches[0].groups[0].degree
        facts.append((f"{static.predicted_s:.4g} s", f"best static degree ({degree})"))
        facts.append((f"{static.predicted_s / plan.predicted_s:.2f}x", "against static"))
    return "".join(f'<div class="card"><b>{a}</b><span>{b}</span></div>' for a, b in facts)


def drawing(plan: Plan, height: float, *, labels: bool = True) -> str:
    """The timeline as SVG elements, 1,000 wide; with `labels` also axes and a hatched ground."""
    parts = []
    if labels:
        parts.append(f'<rect width="{_WIDTH:g}" height="{height:g}" fill="url(#idle)"/>')
    per_s = _WIDTH / (plan.predicted_s or 1.0)
    per_rank = height / plan.world_size
    for micro_batch, starts in zip(plan.micro_batches, group_starts(plan), strict=True):
        if micro_batch.overhead_s > 0:
            parts.append(
                f'<rect x="{starts[0] * per_s:.2f}" width="{micro_batch.overhead_s * per_s:.2f}" '
                f'height="{height:g}" fill="{OVERHEAD}"/>'
            )
    for span in spans(plan):
        parts += _block(span, per_s, per_rank, labels=labels)
    if not labels:
        return "".join(parts)
    for m, (micro_batch, starts) in enumerate(
        zip(plan.micro_batches, group_starts(plan), strict=True)
    ):
        if plan.synchronisation == "micro_batch":
            x, end = starts[0] * per_s, (starts[0] + micro_batch.time_s) * per_s
            parts.append(f'<path d="M{end:.2f} 0V{height:g}" stroke="#000" stroke-width="1"/>')
            parts.append(
                f'<text x="{(x + end) / 2:.1f}" y="{height + 12:g}" text-anchor="middle">{m}</text>'
            )
            parts.append(
                f'<text x="{end:.1f}" y="{height + 25:g}" text-anchor="end">{end / per_s:.3g} s'
                f"</text>"
            )
    for rank in range(0, plan.world_size, max(1, plan.world_size // 16)):
        parts.append(
            f'<text x="-6" y="{(rank + 0.5) * per_rank + 3.5:.1f}" text-anchor="end">{rank}</text>'
        )
    return "\n".join(parts)


def _block(span: Span, per_s: float, per_rank: float, *, labels: bool) -> list[str]:
    x, width = span.start_s * per_s, span.seconds * per_s
    y, tall = span.first_rank * per_rank, span.num_ranks * per_rank
    parts = [
        f'<rect class="g" data-k="{span.number}" x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" '
        f'height="{tall:.2f}" fill="{degree_colour(span.group.degree)}"/>'
    ]
    if labels and tall >= 10 and width >= 14:
        parts.append(
            f'<text x="{x + width / 2:.1f}" y="{y + tall / 2 + 3.5:.1f}" '
            f'text-anchor="middle">{span.group.degree}</text>'
        )
    return parts


def _groups(plan: Plan) -> list[dict[str, object]]:
    rows = []
    for m, micro_batch in enumerate(plan.micro_batches):
        for g, group in enumerate(micro_batch.groups):
            lengths = sorted((plan.lengths[d] for d in group.documents), reverse=True)
            rows.append(
                {
                    "m": m,
                    "g": g,
                    "d": group.degree,
                    "s": group.strategy,
                    "r": ",".join(
                        str(a) if n == 1 else f"{a}-{a + n - 1}" for a, n in blocks(group.ranks)
                    ),
                    "n": lengths,
                    "t": group.tokens,
                    "c": group.compute_s + group.overhead_s,
                    "x": group.communication_s,
                    "i": micro_batch.time_s - _end(micro_batch, group),
                    "b": group.memory_bytes / 2**30,
                }
            )
    return rows


def _end(micro_batch: MicroBatch, group: Group) -> float:
    """When the group's ranks are done with the micro-batch, on average where they differ."""
    if not group.rank_s:
        return group.time_s
    seconds = micro_batch.seconds_of_ranks()
    return micro_batch.overhead_s + sum(seconds[r] for r in group.ranks) / group.degree
