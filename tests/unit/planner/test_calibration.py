from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dist_attn.errors import ConfigError
from dist_attn.planner.calibration import (
    Calibration,
    ComputePoint,
    MemoryPoint,
    TransferPoint,
    calibrated,
    fit_compute,
    fit_memory,
    fit_transfer,
)
from dist_attn.planner.costs import GroupKind

TRUE = (0.02, 3e-6, 5e-11)


def _points(noise: float) -> list[ComputePoint]:
    generator = np.random.default_rng(0)
    points = []
    for tokens in (512, 1024, 3000, 8192, 20000, 65536, 131072, 200000):
        pairs = tokens * (tokens + 1) / 2
        seconds = TRUE[0] + TRUE[1] * tokens + TRUE[2] * pairs
        points.append(ComputePoint(tokens, pairs, seconds * (1 + noise * generator.normal())))
    return points


def test_terms_are_found_from_exact_and_noisy_points():
    exact = fit_compute(_points(0.0))
    assert exact.coefficients == pytest.approx(TRUE, rel=1e-9)
    assert exact.max_error < 1e-9
    noisy = fit_compute(_points(0.02))
    assert noisy.coefficients == pytest.approx(TRUE, rel=0.2)
    assert 0 < noisy.mean_error < 0.06


def test_no_term_is_negative():
    points = [ComputePoint(n, n * n / 2, 1e-6 * n) for n in (100, 1000, 5000, 20000, 90000)]
    fit = fit_compute(points)
    assert min(fit.coefficients) >= 0
    assert fit.coefficients[1] == pytest.approx(1e-6)


def test_links_and_memory():
    transfers = [TransferPoint(b, m, 2e-5 * m + b / 4e10) for b in (1e4, 1e6, 1e8) for m in (1, 7)]
    assert fit_transfer(transfers).coefficients == pytest.approx((2e-5, 1 / 4e10))
    memory = [MemoryPoint(n, 3e9 + 5e5 * n) for n in (1000, 5000, 20000, 60000)]
    assert fit_memory(memory).coefficients == pytest.approx((3e9, 5e5))


def test_too_few_points_are_refused():
    with pytest.raises(ConfigError, match="do not determine 3 terms"):
        fit_compute(_points(0.0)[:2])


def test_a_calibration_goes_through_yaml_into_costs(four, tmp_path):
    _, cost = four
    made = Calibration(
        "cpu",
        fit_compute(_points(0.0)),
        intra_node=fit_transfer(
            [TransferPoint(b, 1, 1e-4 + b / 1e9) for b in (1e4, 1e6, 1e7, 1e8)]
        ),
    )
    made.save(tmp_path / "cpu.yaml")
    read = Calibration.load(tmp_path / "cpu.yaml")
    assert read.compute.coefficients == pytest.approx(made.compute.coefficients)
    fitted = calibrated(cost, [read], ["cpu"], cost.shape)
    one = GroupKind(1, "local")
    n = 5000
    expected = TRUE[1] * n + TRUE[2] * n * (n + 1) / 2
    assert fitted.compute_s(one, np.array([n]))[0] == pytest.approx(expected)
    assert fitted.fixed_s(one) == pytest.approx(max(cost.micro_batch_overhead_s, TRUE[0]))
    assert fitted.intra_node.bytes_per_s == pytest.approx(1e9)
    assert fitted.fingerprint() != cost.fingerprint()
    with pytest.raises(ConfigError, match="does not fit a cluster of h100"):
        calibrated(cost, [read], ["h100"], cost.shape)


def test_a_calibration_serves_its_own_model(four):
    _, cost = four
    shape = cost.shape
    made = Calibration("cpu", fit_compute(_points(0.0)), model=dataclasses.asdict(shape))
    # A tokenizer with a few more special tokens, but not another vocabulary.
    near = dataclasses.replace(shape, vocab_size=shape.vocab_size + 3)
    assert calibrated(cost, [made], ["cpu"], near).source == "calibrated"
    for changes in ({"vocab_size": 2 * shape.vocab_size}, {"num_layers": 3}):
        other = dataclasses.replace(shape, **changes)
        with pytest.raises(ConfigError, match="another model"):
            calibrated(cost, [made], ["cpu"], other)


@pytest.mark.parametrize("text", ["a: 1", "format: dist_attn calibration\ndevice: cpu"])
def test_what_is_no_calibration_is_refused(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="calibrat"):
        Calibration.load(path)
