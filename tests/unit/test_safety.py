"""Nothing that is loaded runs code, and nothing is reachable that need not be."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from dist_attn.config import load_cluster, load_config
from dist_attn.data import open_corpus
from dist_attn.errors import ConfigError, CorpusError
from dist_attn.planner.calibration import Calibration
from tests.e2e.command import ROOT, small_config

#: Calls that can run what they read, by the end of their name.
NEVER = (
    "pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "torch.jit.load", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "marshal.loads", "joblib.load", "shelve.open",
    "os.system", "os.popen",
)  # fmt: skip
#: Arguments that turn it on, or that keep it off and must be what they are.
NEVER_ARGUMENTS = {
    "allow_pickle": True, "trust_remote_code": True, "weights_only": False, "shell": True,
    "use_safetensors": False, "local_files_only": False,
}  # fmt: skip


def unsafe(source: str) -> Iterator[str]:
    """What a module calls that can run what it reads."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in ("eval", "exec", "__import__") or name.endswith(NEVER):
            yield f"line {node.lineno}: {name}"
        for keyword in node.keywords:
            value = getattr(keyword.value, "value", None)
            if keyword.arg in NEVER_ARGUMENTS and value is NEVER_ARGUMENTS[keyword.arg]:
                yield f"line {node.lineno}: {name}({keyword.arg}={value})"
        if name.endswith("from_pretrained"):
            given = {k.arg for k in node.keywords}
            if not {"local_files_only", "trust_remote_code"} <= given:
                yield f"line {node.lineno}: {name} without local_files_only, trust_remote_code"


def test_no_module_can_run_what_it_reads() -> None:
    files = [
        path
        for folder in ("dist_attn", "kernels", "launch")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    assert len(files) > 100
    found = {str(p.relative_to(ROOT)): list(unsafe(p.read_text(encoding="utf-8"))) for p in files}
    assert {path: calls for path, calls in found.items() if calls} == {}
    # The control.
    bad = "torch.load(f)\nnp.load(f, allow_pickle=True)\nA.from_pretrained(f)\neval('1')\n"
    assert len(list(unsafe(bad))) == 4


@pytest.mark.parametrize("load", [load_config, load_cluster, Calibration.load])
def test_yaml_makes_no_objects(tmp_path: Path, load: object) -> None:
    proof, file = tmp_path / "ran", tmp_path / "evil.yaml"
    file.write_text(f"run: !!python/object/apply:os.mkdir ['{proof}']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(file)  # type: ignore[operator]
    assert not proof.exists()


def test_a_value_of_the_command_line_makes_no_object(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    with pytest.raises(ConfigError, match="not a YAML value"):
        load_config(small_config(tmp_path), [f"run.dir=!!python/object/apply:os.mkdir ['{proof}']"])
    assert not proof.exists()


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.mkdir, (self.proof,)  # type: ignore[return-value]


def test_a_pickle_in_the_cache_is_not_read(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    np.save(tmp_path / "evil.npy", np.array([Evil(proof)], dtype=object), allow_pickle=True)
    evil = (tmp_path / "evil.npy").read_bytes()
    # The control: whoever allows it runs it.
    np.load(tmp_path / "evil.npy", allow_pickle=True)
    assert proof.exists()
    proof.rmdir()
    pickle.loads(pickle.dumps(Evil(proof)))
    proof.rmdir()

    config = load_config(small_config(tmp_path)).data
    cache = tmp_path / "cache"
    open_corpus(config, cache)
    (origins,) = cache.rglob("origins.npy")
    origins.write_bytes(evil)
    with pytest.raises(CorpusError, match="damaged"):
        open_corpus(config, cache)
    assert not proof.exists()


@pytest.mark.slow
def test_tensorboard_as_the_readme_starts_it_listens_on_the_loopback_interface(
    tmp_path: Path,
) -> None:
    assert "tensorboard --logdir runs" in (ROOT / "README.md").read_text(encoding="utf-8")
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as board:
        try:
            deadline = time.monotonic() + 120
            listening: set[str] = set()
            while not listening:
                assert time.monotonic() < deadline
                assert board.poll() is None
                time.sleep(0.5)
                listening = {
                    c.laddr.ip
                    for c in psutil.Process(board.pid).net_connections("tcp")
                    if c.status == psutil.CONN_LISTEN
                }
        finally:
            board.kill()
    assert listening <= {"127.0.0.1", "::1"}
