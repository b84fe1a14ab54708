"""One clear message and exit code 2 for bad input, from the command line itself."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.command import ROOT, run, small_config


def only_message(code: int, out: str, err: str) -> str:
    assert code == 2, err[-3000:]
    assert "Traceback" not in out + err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_configuration_is_refused_before_ranks_start(tmp_path: Path) -> None:
    config = small_config(tmp_path, extra="planner2: {}\n")
    done = run("train", "--cfg", config, timeout_s=30)
    message = only_message(done.returncode, done.stdout, done.stderr)
    assert "planner2: unknown key; did you mean 'planner'?" in message
    assert not (tmp_path / "run").exists()


def test_ranks_that_find_bad_input_say_it_once(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    (tmp_path / "texts" / "zz.txt").write_bytes(b"fine \xff not")
    done = run("train", "--cfg", config, "--nproc-per-node", "2")
    message = only_message(done.returncode, done.stdout, done.stderr)
    assert "zz.txt" in message
    assert "byte 5" in message
    assert not (tmp_path / "run").exists()


def test_lengths_that_are_none(tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("100\n-5\n")
    config = ROOT / "configs" / "128k.yaml"
    done = run("plan", "--cfg", config, "--lengths", lengths, "--out", tmp_path / "out")
    message = only_message(done.returncode, done.stdout, done.stderr)
    assert "lengths.txt" in message
    assert "line 2" in message
