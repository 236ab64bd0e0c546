"""Every solver's update against the formulas in plain NumPy, over several iterations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="engine torch needs PyTorch")
pytest.importorskip("google.protobuf", reason="reading prototxt needs protobuf")

from sparkgauge.adapters.caffe.solvers import build_solver  # noqa: E402
from sparkgauge.caffe import schema, text  # noqa: E402
from sparkgauge.errors import ConfigurationError  # noqa: E402

RATE, COUNT = 0.1, 6
FACTORS = np.array([1, 1, 1, 2, 2, 0.5])


def solver(source: str) -> Any:
    message = text.parse(source, schema.SolverParameter).message
    buffers = {"values": torch.linspace(-1, 2, COUNT), "gradients": torch.zeros(COUNT)}
    factors = torch.from_numpy(FACTORS.astype(np.float32))
    parameters = SimpleNamespace(**buffers, rate_factors=factors, decay_factors=torch.ones(COUNT))
    return build_solver(message, parameters)  # type: ignore[arg-type]


def reference(kind: str, g: Any, h: list[Any], step: int) -> Any:
    """Return the change of the weights and update the histories ``h`` in place: float64, one formula per solver."""
    rate = RATE * FACTORS
    if kind == "SGD":
        h[0][:] = rate * g + 0.9 * h[0]
        return h[0].copy()
    if kind == "Nesterov":
        before = h[0].copy()
        h[0][:] = rate * g + 0.9 * h[0]
        return 1.9 * h[0] - 0.9 * before
    if kind == "AdaGrad":
        h[0] += g**2
        return rate * g / (np.sqrt(h[0]) + 1e-3)
    if kind == "RMSProp":
        h[0][:] = 0.98 * h[0] + 0.02 * g**2
        return rate * g / (np.sqrt(h[0]) + 1e-3)
    if kind == "AdaDelta":
        h[0][:] = 0.9 * h[0] + 0.1 * g**2
        change = g * np.sqrt((h[1] + 1e-3) / (h[0] + 1e-3))
        h[1][:] = 0.9 * h[1] + 0.1 * change**2
        return rate * change
    h[0][:] = 0.9 * h[0] + 0.1 * g
    h[1][:] = 0.999 * h[1] + 0.001 * g**2
    correction = np.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
    return rate * correction * h[0] / (np.sqrt(h[1]) + 1e-3)


@pytest.mark.parametrize("decay", ["", "weight_decay: 0.05", "weight_decay: 0.05 regularization_type: 'L1'"])
@pytest.mark.parametrize("kind", ["SGD", "Nesterov", "AdaGrad", "RMSProp", "AdaDelta", "Adam"])
def test_updates_equal_the_formula(kind: str, decay: str) -> None:
    momentum = "" if kind in ("AdaGrad", "RMSProp") else "momentum: 0.9"
    rms = "rms_decay: 0.98" if kind == "RMSProp" else ""
    subject = solver(f"type: '{kind}' delta: 0.001 momentum2: 0.999 {momentum} {rms} {decay}")
    weights, histories = subject.parameters.values.double().numpy().copy(), [np.zeros(COUNT), np.zeros(COUNT)]
    generator = np.random.default_rng(3)
    for step in range(5):
        g = generator.normal(size=COUNT)
        subject.parameters.gradients.copy_(torch.from_numpy(g))
        subject.update(torch.tensor(RATE * subject.scale(step)))
        if decay:
            g = g + 0.05 * (np.sign(weights) if "L1" in decay else weights)
        weights -= reference(kind, g, histories, step)
        np.testing.assert_allclose(subject.parameters.values, weights, rtol=3e-5, atol=1e-6)
    for found, expected in zip(subject.history, histories, strict=False):
        np.testing.assert_allclose(found, expected, rtol=3e-5, atol=1e-7)


@pytest.mark.parametrize(("norm", "expected"), [(1.99, 1.99), (2.0, 2.0), (2.01, 2.0), (20.0, 2.0), (0.0, 0.0)])
def test_gradients_are_clipped_by_their_norm(norm: float, expected: float) -> None:
    subject = solver("type: 'SGD' clip_gradients: 2")
    subject.parameters.gradients[0] = norm
    before = subject.parameters.values.clone()
    subject.update(torch.tensor(1.0))
    assert float((before - subject.parameters.values).norm()) == pytest.approx(expected, rel=1e-5)


def test_clipping_looks_at_the_sum_over_iter_size() -> None:
    subject = solver("type: 'SGD' clip_gradients: 2 iter_size: 4")
    subject.parameters.gradients[0] = 1.0  # a mean of four passes: their sum is 4
    before = subject.parameters.values.clone()
    subject.update(torch.tensor(1.0))
    assert float(before[0] - subject.parameters.values[0]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("type: 'LBFGS'", "unknown solver type"),
        ("type: 'AdaGrad' momentum: 0.9", "takes no momentum"),
        ("type: 'SGD' regularization_type: 'L3'", "regularization_type"),
    ],
)
def test_a_bad_solver_is_refused(source: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        solver(source)
