"""A file imports its own row of the layout or rows above it, never below."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: Sections of the configuration in files of their own.
CONFIG_PARTS = sorted(f"dist_attn.{path.stem}" for path in (ROOT / "dist_attn").glob("config_*.py"))
#: Lower rows may import higher ones, not the other way round.
ROWS = [
    ["dist_attn_kernels"],
    ["dist_attn.config", *CONFIG_PARTS, "dist_attn.errors"],
    ["dist_attn.masks", "dist_attn.layout", "dist_attn.groups", "dist_attn.peer_memory"],
    ["dist_attn.comm"],
    ["dist_attn.attention"],
    ["dist_attn.planner"],
    ["dist_attn.data"],
    ["dist_attn.integrations"],
    ["dist_attn.training"],
    ["dist_attn.cli"],
]
#: Only integrations may import these.
FRAMEWORKS = ("transformers", "deepspeed", "megatron", "peft")
#: What `dist-attn plan` and the solver's process import must not bring torch along.
WITHOUT_TORCH = [
    "dist_attn.config",
    *CONFIG_PARTS,
    "dist_attn.errors",
    "dist_attn.masks",
    "dist_attn.planner",
    "dist_attn.layout",
]


def modules() -> list[tuple[str, Path]]:
    found = []
    for package in (ROOT / "dist_attn", ROOT / "kernels" / "dist_attn_kernels"):
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(package.parent).with_suffix("").parts
            found.append((".".join(p for p in parts if p != "__init__"), path))
    return found


def row_of(module: str) -> int | None:
    for index, names in enumerate(ROWS):
        if any(module == n or module.startswith(n + ".") for n in names):
            return index
    return None


def imports_of(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def offences(module: str, imported: list[str]) -> list[str]:
    row = row_of(module)
    found = []
    for name in imported:
        other = row_of(name)
        if row is not None and other is not None and other > row:
            found.append(f"{module} imports {name}, which lies below it")
        top = name.split(".")[0]
        if top in FRAMEWORKS and not module.startswith("dist_attn.integrations"):
            found.append(f"{module} imports {name}: only dist_attn.integrations may")
        torchless = any(module == n or module.startswith(n + ".") for n in WITHOUT_TORCH)
        if top == "torch" and torchless:
            found.append(f"{module} imports torch")
    return found


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: str(value)[-40:])
def test_imports_point_up(module: str, path: Path) -> None:
    assert module == "dist_attn" or row_of(module) is not None, f"{module} has no row"
    assert offences(module, imports_of(path)) == []


def test_offences_are_seen() -> None:
    assert offences("dist_attn.layout", ["dist_attn.comm.ring"])
    assert offences("dist_attn.training.loop", ["deepspeed"])
    assert offences("dist_attn.planner.plan", ["torch.distributed"])
    assert not offences("dist_attn.training.loop", ["torch", "dist_attn.planner.plan.Plan"])
