from __future__ import annotations

import gzip
import io
import json
import re

import pytest
from rich.console import Console

from dist_attn.cli import main
from dist_attn.config import Config, PlannerConfig, load_cluster, load_config
from dist_attn.errors import ConfigError, PlanError
from dist_attn.planner.command import run_plan_command
from dist_attn.planner.compare import Shares
from dist_attn.planner.free import plan_free
from dist_attn.planner.lengths import read_lengths
from dist_attn.planner.page import page
from dist_attn.planner.plan import Plan
from dist_attn.planner.preview import figure, ranks_text
from dist_attn.planner.solve import plan


@pytest.mark.parametrize("name", ["h100_64", "h100_1024", "a100_64", "mixed_48", "cpu4"])
def test_described_clusters_load(name):
    sizes = {"h100_64": 64, "h100_1024": 1024, "a100_64": 64, "mixed_48": 48, "cpu4": 4}
    assert load_cluster(f"configs/clusters/{name}.yaml").world_size == sizes[name]


def test_lengths_from_lines_gzip_and_json(tmp_path):
    plain, packed, listed = (tmp_path / n for n in ("a.txt", "a.txt.gz", "a.json"))
    plain.write_text("12\n\n 7 \n0\n")
    packed.write_bytes(gzip.compress(b"12\n7\n0\n"))
    listed.write_text("[12, 7, 0]")
    assert read_lengths(plain) == read_lengths(packed) == read_lengths(listed) == [12, 7, 0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3\nfour\n", "line 2: .*'four'"),
        ("3\n-4\n", "line 2: .*'-4'"),
        ("", "holds no lengths"),
        ("[1, true]", "entry 1: .*True"),
        ("[1,", "not valid JSON"),
        ("[]", "empty list"),
    ],
)
def test_bad_lengths_are_refused_by_line(tmp_path, text, says):
    path = tmp_path / "bad.txt"
    path.write_text(text)
    with pytest.raises(PlanError, match=says):
        read_lengths(path)
    with pytest.raises(PlanError, match="cannot read lengths"):
        read_lengths(tmp_path / "none.txt")


def test_the_command_prints_80_columns_and_writes_files(tmp_path):
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("\n".join(["100000", "40000", *["900"] * 60]))
    config = load_config("configs/128k.yaml", ["planner.max_tokens_per_device=4096"])
    screen = io.StringIO()
    out = tmp_path / "out"
    found = run_plan_command(config, lengths, out, Console(file=screen, width=80))
    text = screen.getvalue()
    assert max(len(line) for line in text.splitlines() if "plan.json" not in line) <= 80
    assert "best static degree" in text
    assert "lower bound" in text
    assert Plan.load(out / "plan.json") == found
    assert (out / "plan.png").read_bytes()[:4] == b"\x89PNG"
    html = (out / "plan.html").read_text()
    assert not re.search(r"(src|href)\s*=|https?://", html)


def test_auto_cluster_is_refused_and_nothing_is_written(tmp_path):
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("10\n")
    with pytest.raises(ConfigError, match="cluster is 'auto'"):
        run_plan_command(Config(), lengths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_page_holds_every_group(four):
    cluster, cost = four
    found = plan([8000, 100, 2000, 30], cluster, cost, PlannerConfig())
    text = page(found)
    data = json.loads(re.search(r"const groups=(\[.*?\]);\n", text).group(1))
    assert sum(g["t"] for g in data) == 10130
    assert len(data) == sum(len(m.groups) for m in found.micro_batches)
    assert text.count('class="g"') >= len(data)


def test_the_figure_has_a_block_per_group(four):
    cluster, cost = four
    found = plan([8000, 100, 2000, 30], cluster, cost, PlannerConfig())
    axes = figure(found).axes[0]
    groups = sum(len(m.groups) for m in found.micro_batches)
    # A hatched background and at least one block per group.
    assert len(axes.patches) >= groups + 1
    assert axes.get_xlim()[1] == pytest.approx(found.predicted_s)


def test_ranks_as_intervals():
    assert ranks_text((0, 1, 2, 5, 7, 6)) == "0-2,5-7"
    assert ranks_text((3,)) == "3"


def test_plans_are_compared_side_by_side(tmp_path, capsys):
    for name, long in (("even", 9000), ("tail", 100000)):
        (tmp_path / f"{name}.txt").write_text("\n".join(map(str, [long, *[900] * 40])))
    lengths = [str(tmp_path / f"{n}.txt") for n in ("even", "tail")]
    clusters = [f"configs/clusters/{n}_64.yaml" for n in ("h100", "a100")]
    command = ["plan", "--cfg", "configs/128k.yaml", "--out", str(tmp_path / "out")]
    command += ["--set", "planner.max_tokens_per_device=4096"]
    assert main([*command, "--lengths", *lengths, "--cluster", *clusters]) == 0
    shown = capsys.readouterr().out.splitlines()
    rows = [line for line in shown if line.startswith(("h100_64 even", "h100_64 tail", "a100_64"))]
    assert len(rows) == 4
    assert max(map(len, shown[:5])) <= 80
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert page.count("<svg") == 4
    assert "http" not in page
    one = Plan.load(tmp_path / "out" / "a100_64-tail" / "plan.json")
    assert max(one.lengths) == 100000
    assert main([*command, "--lengths", lengths[0], lengths[0]]) == 2
    assert "one name" in capsys.readouterr().err


def test_shares_of_time_add_up(four):
    cluster, cost = four
    made = [
        make([2000, 1500, 900, 300, 300], cluster, cost, PlannerConfig())
        for make in (plan, plan_free)
    ]
    for shares in map(Shares.of, made):
        assert shares.compute + shares.communication + shares.idle == pytest.approx(1.0)
        assert min(shares.compute, shares.communication + 1e-12, shares.idle + 1e-12) > 0
