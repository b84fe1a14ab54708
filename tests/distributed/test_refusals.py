"""Bad input is refused on every rank, in words, and nothing is written over."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_attn.config import load_config
from dist_attn.errors import UserError
from dist_attn.training.loop import run_training
from dist_attn.training.runtime import Runtime
from tests.e2e.command import small_config
from tests.ranks import run_ranks


def attempt(config: str, overrides: list[str], resume: str | None) -> str:
    """The refusal's text on this rank, or `done`."""
    rank, size = dist.get_rank(), dist.get_world_size()
    # The planner's process is a child of rank 0, which the helper's daemons may not have.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    try:
        # Two ranks hold the longest documents unless the test says otherwise.
        overrides = ["planner.max_tokens_per_device=256", *overrides]
        settings = load_config(config, overrides).on("cpu")
        run_training(settings, resume, Runtime(rank, size, rank, size, torch.device("cpu")))
    except UserError as error:
        return str(error)
    return "done"


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(config: Path, overrides: list[str] | None = None, resume: str | None = None) -> str:
    texts = run_ranks(attempt, 2, str(config), overrides or [], resume)
    assert texts[0] == texts[1]
    assert texts[0] != "done"
    return texts[0]


def jsonl(folder: Path, lines: str) -> list[str]:
    (folder / "bad.jsonl").write_text(lines, encoding="utf-8")
    return [f"data.corpus={{kind: jsonl, path: {folder / 'bad.jsonl'}}}"]


def invalid_utf8(folder: Path) -> list[str]:
    (folder / "texts" / "zz.txt").write_bytes(b"fine \xff not fine")
    return []


def empty_corpus(folder: Path) -> list[str]:
    (folder / "nothing").mkdir()
    return [f"data.corpus={{kind: text, path: {folder / 'nothing'}}}"]


def plan_of_another_cluster(folder: Path) -> list[str]:
    plans = folder / "given"
    plans.mkdir()
    done = run_ranks(
        attempt, 2, str(folder / "small.yaml"), [f"run.dir={folder / 'other'}", "run.steps=1"], None
    )
    assert done == ["done", "done"]
    plan = json.loads((folder / "other" / "plans" / "step-000000.json").read_text())
    plan["cluster_fingerprint"] = "0123456789abcdef"
    (plans / "step-000000.json").write_text(json.dumps(plan))
    return [f"planner.plans_dir={plans}"]


def plan_of_another_version(folder: Path) -> list[str]:
    overrides = plan_of_another_cluster(folder)
    file = folder / "given" / "step-000000.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 99}))
    return overrides


CASES: dict[str, tuple[Callable[[Path], list[str]], list[str]]] = {
    "missing path": (
        lambda f: [f"data.corpus={{kind: text, path: {f / 'nowhere'}}}"],
        ["nowhere"],
    ),
    "empty corpus": (empty_corpus, ["nothing"]),
    "invalid UTF-8": (invalid_utf8, ["zz.txt", "UTF-8"]),
    "JSONL line": (lambda f: jsonl(f, '{"text": "a b c"}\n{"text": '), ["bad.jsonl", "2"]),
    "JSONL field": (lambda f: jsonl(f, '{"txt": "a b c"}\n'), ["bad.jsonl", "text"]),
    "document beyond every group": (
        lambda _: ["planner.max_tokens_per_device=64"],
        ["512", "64", ".txt"],
    ),
    "document beyond the limit": (
        lambda _: ["data.overlong=refuse", "data.max_document_tokens=100"],
        [".txt", "100", "split"],
    ),
    "plan of another cluster": (plan_of_another_cluster, ["another cluster", "0123456789abcdef"]),
    "plan of another version": (plan_of_another_version, ["version 99"]),
    "world size": (
        lambda _: ["cluster={nodes: [{count: 2, devices_per_node: 4, device: cpu}]}"],
        ["describes 8 devices", "2 ranks"],
    ),
    "no checkpoint folder": (
        lambda f: [f"model.checkpoint={f / 'nowhere'}"],
        ["nowhere", "config.json"],
    ),
    "tokenizer": (lambda f: [f"data.tokenizer={f / 'none.json'}"], ["none.json"]),
}


@pytest.mark.parametrize("name", CASES)
def test_input_is_refused(tmp_path: Path, name: str) -> None:
    config = small_config(tmp_path)
    prepare, words = CASES[name]
    overrides = prepare(tmp_path)
    text = refused(config, overrides)
    assert all(word in text for word in words), text
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or "plan" in name


def test_a_run_is_not_written_over_and_resumes_only_as_itself(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    assert run_ranks(attempt, 2, str(config), ["run.steps=4"], None) == ["done", "done"]
    before = everything_in(tmp_path / "run")

    assert "is not empty" in refused(config)
    assert "has done all of run.steps" in refused(config, ["run.steps=4"], "latest")
    text = refused(config, ["optimizer.lr=0.5"], "latest")
    assert "optimizer.lr: 0.01 there, 0.5 here" in text
    text = refused(config, ["data.max_document_tokens=511"], "latest")
    assert "corpus" in text
    assert "no checkpoint there" in refused(config, [], "step-000099")
    assert "holds no checkpoint yet" in refused(config, [f"run.dir={tmp_path / 'new'}"], "latest")
    assert everything_in(tmp_path / "run") == before
    assert not (tmp_path / "new").exists()

    # A checkpoint that is named is that one or none; so is the only one.
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000004"
    file = next(checkpoint.glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    damaged = everything_in(tmp_path / "run")
    for resume in ("step-000004", "latest", "auto"):
        text = refused(config, [], resume)
        assert file.name in text
        assert "bytes" in text
    assert everything_in(tmp_path / "run") == damaged
    file.write_bytes(whole)
    assert run_ranks(attempt, 2, str(config), ["run.steps=6"], "latest") == ["done", "done"]
