"""A damaged checkpoint is passed over for the one before it, loudly, and the curve stays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_attn.config import load_config
from dist_attn.errors import UserError
from dist_attn.training import checkpoint_files
from dist_attn.training.loop import run_training
from dist_attn.training.runtime import Runtime
from tests.e2e.command import losses, small_config
from tests.ranks import run_ranks

OVERRIDES = [
    "planner.max_tokens_per_device=256", "run.steps=10",
    "checkpoint={every_steps: 3, keep: 9, at_end: false}",
]  # fmt: skip


def training(config: str, overrides: list[str], resume: str | None = None) -> tuple[str, list[str]]:
    """Train in this rank; how it ended, and the warnings about checkpoints."""
    rank, size = dist.get_rank(), dist.get_world_size()
    settings = load_config(config, overrides).on("cpu")
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            checkpoint_files.logger, "warning", lambda text, *rest: said.append(text % rest)
        )
        try:
            run_training(settings, resume, Runtime(rank, size, rank, size, torch.device("cpu")))
        except UserError as error:
            return str(error), said
    return "done", said


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A run that ended after ten steps, with checkpoints of steps 3, 6 and 9, and its curve."""
    folder = tmp_path_factory.mktemp("begun")
    ends = run_ranks(training, 2, str(small_config(folder)), OVERRIDES)
    assert ends == [("done", [])] * 2
    return folder / "run", losses(folder / "run")


@pytest.fixture
def run(tmp_path: Path, begun: tuple[Path, list[float]]) -> Path:
    shutil.copytree(begun[0], tmp_path / "run")
    return tmp_path / "run"


def a_file(checkpoint: Path) -> Path:
    return sorted(checkpoint.glob("*.safetensors"))[1]


def truncate(checkpoint: Path) -> None:
    a_file(checkpoint).write_bytes(a_file(checkpoint).read_bytes()[:-7])


def alter(checkpoint: Path) -> None:
    content = bytearray(a_file(checkpoint).read_bytes())
    content[len(content) // 2] ^= 64
    a_file(checkpoint).write_bytes(content)


def alter_manifest(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["state"]["offset"] += 1
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "bytes"),
    "altered": (alter, "sha256"),
    "altered manifest": (alter_manifest, "sha256"),
    "gone": (shutil.rmtree, "cannot be read"),
}


@pytest.mark.parametrize(
    "kind",
    [
        "altered",
        "gone",
        pytest.param("truncated", marks=pytest.mark.slow),
        pytest.param("altered manifest", marks=pytest.mark.slow),
    ],
)
def test_the_one_before_is_used_and_said_so(
    run: Path, begun: tuple[Path, list[float]], kind: str
) -> None:
    damage, says = DAMAGE[kind]
    damage(run / "checkpoints" / "step-000009")
    if kind == "altered":
        damage(run / "checkpoints" / "step-000006")
    used = "step-000003" if kind == "altered" else "step-000006"
    config = str(begun[0].parent / "small.yaml")
    ends = run_ranks(training, 2, config, [*OVERRIDES, f"run.dir={run}"], "latest")
    assert [e[0] for e in ends] == ["done"] * 2
    assert len(ends[0][1]) == 1
    assert ends[1][1] == []
    text = ends[0][1][0]
    assert "step-000009" in text
    assert says in text
    assert f"Going on from {run / 'checkpoints' / used}, the newest whole checkpoint" in text
    assert losses(run) == begun[1]
    # The damaged ones were written anew on the way; now there is nothing to say.
    again = run_ranks(training, 2, config, [*OVERRIDES, f"run.dir={run}"], "auto")
    assert again == [("done", [])] * 2
    assert losses(run) == begun[1]


def test_a_lost_pointer_does_not_lose_the_run(run: Path, begun: tuple[Path, list[float]]) -> None:
    (run / "checkpoints" / "latest").unlink()
    config = str(begun[0].parent / "small.yaml")
    ends = run_ranks(training, 2, config, [*OVERRIDES, f"run.dir={run}"], "auto")
    assert ends == [("done", [])] * 2
    assert losses(run) == begun[1]
    assert (run / "checkpoints" / "latest").is_file() is False  # no checkpoint was due since
