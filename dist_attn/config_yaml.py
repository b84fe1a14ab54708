"""YAML into plain data, and plain data into sections, with complaints that a user can act on."""

from __future__ import annotations

import difflib
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dist_attn.errors import ConfigError

T = typing.TypeVar("T", bound=BaseModel)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, got {type(data).__name__}")
    return data


def validate(kind: type[T], data: dict[str, Any], source: str) -> T:
    """Build `kind` from plain data, turning every complaint into one ConfigError."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        lines = sorted({_complaint(kind, e) for e in error.errors()})
        raise ConfigError(f"{source}: " + "\n  ".join(lines)) from None


def override(data: dict[str, Any], item: str) -> None:
    """Apply one `a.b=c` of the command line to plain data."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set takes key.path=value, got '{item}'")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {key}: '{text}' is not a YAML value") from None
    *parents, last = key.split(".")
    node = data
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {key}: '{part}' holds {child!r} and has no keys below it")
        node = child
    node[last] = value


def _complaint(kind: type[BaseModel], error: Any) -> str:
    # A union reports each of its members; their names in the path would only confuse.
    loc = [str(p) for p in error["loc"] if not _is_union_member(str(p))]
    path = ".".join(loc) or "configuration"
    given = error["input"]
    shown = (
        f"got {type(given).__name__} {given!r}" if not isinstance(given, dict) else "got a mapping"
    )
    match error["type"]:
        case "extra_forbidden":
            known = _known_keys(kind, loc[:-1])
            near = difflib.get_close_matches(loc[-1], known, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            return f"{path}: unknown key; {hint}allowed here: {', '.join(known)}"
        case "value_error":
            return f"{path}: {error['ctx']['error']}"
        case _:
            return f"{path}: {error['msg']}, {shown}"


def _is_union_member(part: str) -> bool:
    return part.endswith("Config") or part in ("str", "int") or part.startswith(("dict[", "constr"))


def _known_keys(kind: type[BaseModel], parents: list[str]) -> list[str]:
    node: Any = kind
    for part in parents:
        fields = getattr(node, "model_fields", {})
        if part in fields:
            node = _section_in(fields[part].annotation)
    return sorted(getattr(node, "model_fields", {}))


def _section_in(annotation: Any) -> Any:
    """The section class inside an annotation such as `str | Section` or `list[Section]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_section_in(a) for a in typing.get_args(annotation))
    return next((f for f in found if f is not None), None)
