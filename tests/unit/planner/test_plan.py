from __future__ import annotations

import dataclasses
import json

import pytest

from dist_attn.config import PlannerConfig
from dist_attn.errors import PlanError
from dist_attn.planner.check import check_plan
from dist_attn.planner.cluster import local_cluster
from dist_attn.planner.plan import Group, MicroBatch, Plan
from dist_attn.planner.solve import plan

LENGTHS = [5000, 17, 900, 0, 2048, 2049, 64, 3333]


@pytest.fixture
def made(four) -> Plan:
    cluster, cost = four
    return plan(LENGTHS, cluster, cost, PlannerConfig())


def test_json_round_trip(made, tmp_path):
    assert Plan.from_json(made.to_json()) == made
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_digest_covers_decisions_and_nothing_else(made):
    slower = dataclasses.replace(made, predicted_s=made.predicted_s * 2)
    assert slower.digest() == made.digest()
    other = dataclasses.replace(made, micro_batches=made.micro_batches[::-1])
    assert len(made.micro_batches) > 1
    assert other.digest() != made.digest()


def test_other_cluster_world_or_version_is_refused(made, four):
    cluster, _ = four
    text = made.to_json()
    here = cluster.fingerprint()
    assert Plan.from_json(text, cluster_fingerprint=here, world_size=4) == made
    elsewhere = local_cluster(4, ["cpu"] * 4, 2).fingerprint()
    with pytest.raises(PlanError, match="another cluster"):
        Plan.from_json(text, cluster_fingerprint=elsewhere)
    with pytest.raises(PlanError, match="for 4 ranks, 8 run"):
        Plan.from_json(text, world_size=8)
    data = json.loads(text)
    data["version"] = 99
    with pytest.raises(PlanError, match="version 99 cannot be read, only version 1"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not JSON"),
        ("[1, 2]", "not a plan"),
        ('{"loss": 3}', "not a plan"),
        ('{"format": "dist_attn plan"}', "without a version"),
        ('{"format": "dist_attn plan", "version": 1}', "damaged plan"),
    ],
)
def test_what_is_no_plan_is_refused(text, says):
    with pytest.raises(PlanError, match=says):
        Plan.from_json(text, source="x.json")


def test_a_truncated_file_is_refused(made, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(made.to_json()[:200])
    with pytest.raises(PlanError, match=r"plan\.json is not JSON"):
        Plan.load(path)
    with pytest.raises(PlanError, match="cannot read the plan"):
        Plan.load(tmp_path / "none.json")


def test_a_document_twice_or_a_rank_twice_is_refused(made):
    data = json.loads(made.to_json())
    data["micro_batches"][0]["groups"][0]["documents"].append(1)
    data["micro_batches"][0]["groups"][0]["documents"].append(1)
    with pytest.raises(PlanError, match="instead of each"):
        Plan.from_json(json.dumps(data))
    data = json.loads(made.to_json())
    data["micro_batches"][0]["groups"][0]["ranks"][0] = 7
    with pytest.raises(PlanError, match="a rank outside"):
        Plan.from_json(json.dumps(data))


def _edit(made: Plan, **changes: object) -> Plan:
    """The plan with its first group changed."""
    first = made.micro_batches[0]
    group = dataclasses.replace(first.groups[0], **changes)
    batch = MicroBatch((group, *first.groups[1:]))
    return dataclasses.replace(made, micro_batches=(batch, *made.micro_batches[1:]))


def test_the_checker_accepts_and_finds_each_fault(made, four):
    cluster, cost = four
    check_plan(made, LENGTHS, cluster, cost)
    group: Group = made.micro_batches[0].groups[0]
    faults = [
        (_edit(made, documents=group.documents[1:]), "lies in 0 groups"),
        (_edit(made, ranks=(0, 0, 1, 2)), "used twice"),
        (_edit(made, compute_s=group.compute_s / 2), "recomputed"),
        (_edit(made, tokens=group.tokens + 1), "tokens stated"),
        (_edit(made, strategy="local"), "strategy 'local' on"),
        (_edit(made, ranks=(9, 10, 11, 12)), "outside the cluster"),
        (_edit(made, ranks=(0, 1), strategy="ring"), "on 2 ranks of 2048"),
        (dataclasses.replace(made, predicted_s=made.predicted_s * 0.9), "predicts"),
        (dataclasses.replace(made, lower_bound_s=made.predicted_s * 1.1), "lower bound"),
    ]
    for wrong, says in faults:
        with pytest.raises(PlanError, match=says):
            check_plan(wrong, LENGTHS, cluster, cost)
    with pytest.raises(PlanError, match="other lengths"):
        check_plan(made, LENGTHS[:-1], cluster, cost)
