"""Fitting the cost model's terms to measurements, and keeping them in YAML.

What is fitted: seconds of a layer stack = constant + linear * tokens + pair * attended pairs, per
kind of device; seconds of an exchange = latency + bytes / bandwidth, inside a node and across;
bytes of a rank = static + per token * tokens. Fits minimise relative errors with coefficients of
no negative sign, and are judged on points that were held out.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dist_attn.config import read_yaml
from dist_attn.errors import ConfigError
from dist_attn.planner.cost import CostModel
from dist_attn.planner.costs import DeviceRates, FloatArray, LinkRates
from dist_attn.planner.shape import ModelShape

#: A vocabulary may be that of another tokenizer with a few more special tokens.
_VOCABULARY_SLACK = 0.02


@dataclass(frozen=True)
class ComputePoint:
    """One measured forward and backward on one device."""

    tokens: int
    pairs: float
    seconds: float


@dataclass(frozen=True)
class TransferPoint:
    """One measured exchange: bytes that each rank sent, messages in a row, and seconds."""

    num_bytes: float
    messages: float
    seconds: float


@dataclass(frozen=True)
class MemoryPoint:
    """The peak of one rank that held so many tokens."""

    tokens: int
    num_bytes: float


@dataclass(frozen=True)
class Fit:
    """Coefficients, and their relative errors on points that were not used to fit them."""

    coefficients: tuple[float, ...]
    mean_error: float
    max_error: float


@dataclass(frozen=True)
class Check:
    """A group's measured pass, and what the fits predict for it; no fit has seen it."""

    degree: int
    strategy: str
    crosses_nodes: bool
    tokens: int
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        """Of the prediction, relative to the measurement."""
        return self.predicted_s / self.measured_s - 1


@dataclass(frozen=True)
class Calibration:
    """Fitted terms of one kind of device and its links; what is None stays derived."""

    device: str
    compute: Fit
    intra_node: Fit | None = None
    inter_node: Fit | None = None
    memory: Fit | None = None
    #: Sizes of the model that was measured.
    model: Mapping[str, Any] | None = None
    checks: tuple[Check, ...] = ()

    def save(self, path: str | Path) -> None:
        """Write YAML."""
        data = {"format": "dist_attn calibration", **asdict(self)}
        text = yaml.safe_dump(_plain(data), sort_keys=False)
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            ConfigError: the file cannot be read or is no calibration.
        """
        data = read_yaml(path)
        if data.pop("format", None) != "dist_attn calibration":
            raise ConfigError(f"{path} is not a calibration; `dist-attn calibrate` writes one")
        try:
            fits = {
                name: None if data.get(name) is None else _fit_of(data[name])
                for name in ("compute", "intra_node", "inter_node", "memory")
            }
            compute = fits.pop("compute")
            if compute is None:
                raise KeyError("compute")
            return cls(
                device=str(data["device"]),
                compute=compute,
                model=data.get("model"),
                checks=tuple(Check(**c) for c in data.get("checks") or ()),
                **fits,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{path}: a damaged calibration ({type(error).__name__}: {error}); calibrate again"
            ) from None


def fit_compute(points: Sequence[ComputePoint], held_out: float = 0.25) -> Fit:
    """Fit constant, linear and pair seconds."""
    columns = np.array([[1.0, p.tokens, p.pairs] for p in points])
    return _fit(columns, np.array([p.seconds for p in points]), held_out)


def fit_transfer(points: Sequence[TransferPoint], held_out: float = 0.25) -> Fit:
    """Fit seconds per message and seconds per byte."""
    columns = np.array([[p.messages, p.num_bytes] for p in points])
    return _fit(columns, np.array([p.seconds for p in points]), held_out)


def fit_memory(points: Sequence[MemoryPoint], held_out: float = 0.25) -> Fit:
    """Fit static bytes and bytes per token."""
    columns = np.array([[1.0, p.tokens] for p in points])
    return _fit(columns, np.array([p.num_bytes for p in points]), held_out)


def calibrated(
    cost: CostModel, calibrations: Sequence[Calibration], names: Sequence[str], shape: ModelShape
) -> CostModel:
    """The cost model with fitted terms in place of derived ones.

    A micro-batch's overhead is the larger of the fitted constant and the cluster's, which may count
    what a calibration does not see (ZeRO's gathers). Of memory only the bytes per token are taken:
    what does not depend on tokens was measured without optimizer and sharding.

    Args:
        cost: a derived model.
        calibrations: at most one per kind of device.
        names: the device kinds of the cluster, in the model's order.
        shape: of the model that is planned for.

    Raises:
        ConfigError: a calibration of a device that the cluster does not have, or of another model.
    """
    devices = list(cost.devices)
    changes: dict[str, Any] = {}
    for calibration in calibrations:
        if calibration.device not in names:
            raise ConfigError(
                f"a calibration of '{calibration.device}' does not fit a cluster of "
                f"{', '.join(sorted(set(names)))}; calibrate there, or leave it out"
            )
        _check_model(calibration, shape)
        index = list(names).index(calibration.device)
        constant, linear, pair = calibration.compute.coefficients
        devices[index] = replace(
            devices[index], linear_s_per_token=linear, attention_s_per_pair=pair
        )
        changes["micro_batch_overhead_s"] = max(
            changes.get("micro_batch_overhead_s", cost.micro_batch_overhead_s), constant
        )
        for name in ("intra_node", "inter_node"):
            fit: Fit | None = getattr(calibration, name)
            if fit is not None:
                latency, per_byte = fit.coefficients
                derived: LinkRates = getattr(cost, name)
                rate = 1 / per_byte if per_byte > 0 else derived.bytes_per_s
                changes[name] = LinkRates(bytes_per_s=rate, latency_s=latency)
        if calibration.memory is not None:
            per_token = calibration.memory.coefficients[1]
            changes["bytes_per_token"] = max(int(np.ceil(per_token)), 1)
    checked: tuple[DeviceRates, ...] = tuple(devices)
    return replace(cost, devices=checked, source="calibrated", **changes)


def _check_model(calibration: Calibration, shape: ModelShape) -> None:
    here = asdict(shape)
    measured = calibration.model or here
    different = [
        f"{k} {measured[k]} there, {v} here"
        for k, v in here.items()
        if not _alike(k, measured.get(k, v), v)
    ]
    if different:
        raise ConfigError(
            f"the calibration of '{calibration.device}' is of another model: "
            f"{', '.join(different)}; calibrate with this configuration, or leave it out"
        )


def _alike(key: str, measured: Any, here: Any) -> bool:
    """Whether a size is the same; a vocabulary may be padded a little."""
    if key == "vocab_size":
        return bool(abs(measured - here) <= _VOCABULARY_SLACK * here)
    return bool(measured == here)


def _fit(columns: FloatArray, values: FloatArray, held_out: float) -> Fit:
    """Fit on some points and judge on the others, which are spread evenly over the values."""
    wanted = columns.shape[1]
    order = np.argsort(values, kind="stable")
    every = max(round(1 / held_out), 2) if held_out > 0 else 0
    # Neither the least nor the greatest value is held out: a fit should not be asked to
    # extrapolate.
    inner = np.arange(1, len(values) - 1)
    test = order[inner[inner % every == every // 2]] if every else order[:0]
    train = np.setdiff1d(order, test)
    if len(train) < wanted or np.linalg.matrix_rank(columns[train]) < wanted:
        raise ConfigError(
            f"{len(values)} measurements do not determine {wanted} terms; measure at more lengths"
        )
    if (values <= 0).any():
        raise ConfigError("measurements must be positive; measure again")
    coefficients = _least_relative(columns[train], values[train])
    judged = test if len(test) else train
    errors = np.abs(columns[judged] @ coefficients / values[judged] - 1)
    return Fit(tuple(coefficients.tolist()), float(errors.mean()), float(errors.max()))


def _least_relative(columns: FloatArray, values: FloatArray) -> FloatArray:
    """Least squares of relative errors over coefficients that are not negative.

    There are two or three terms, so that every set of terms can be tried.
    """
    scaled = columns / values[:, None]
    units = np.abs(scaled).max(axis=0)
    best, best_error = np.zeros(columns.shape[1]), np.inf
    for count in range(1, columns.shape[1] + 1):
        for chosen in itertools.combinations(range(columns.shape[1]), count):
            picked = list(chosen)
            found = np.linalg.lstsq(
                scaled[:, picked] / units[picked], np.ones(len(values)), rcond=None
            )[0]
            if (found < 0).any():
                continue
            trial = np.zeros(columns.shape[1])
            trial[picked] = found / units[picked]
            error = float(((scaled @ trial - 1) ** 2).sum())
            if error < best_error * (1 - 1e-12):
                best, best_error = trial, error
    return best


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _fit_of(data: dict[str, Any]) -> Fit:
    return Fit(
        coefficients=tuple(float(c) for c in data["coefficients"]),
        mean_error=float(data["mean_error"]),
        max_error=float(data["max_error"]),
    )
