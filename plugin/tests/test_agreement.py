"""Whether executors ended with the same model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparkgauge import agreement
from sparkgauge.errors import TrainingError


def weights(**changes: Any) -> dict[str, Any]:
    drawn = np.random.default_rng(3)
    made = {
        "whitening": drawn.standard_normal((24, 3, 2, 2)).astype(np.float32),
        "dense": drawn.standard_normal((512, 700)).astype(np.float32),
        "bias": np.zeros(10, np.float32),
        "count": np.int64(7),
    }
    return {**made, **changes}


def check(*executors: dict[str, Any]) -> None:
    agreement.check([agreement.fingerprint(one) for one in executors], "net")


def swapped(values: Any, one: int, other: int) -> Any:
    order = list(range(len(values)))
    order[one], order[other] = other, one
    return values[order]


def test_equal_weights_and_those_that_differ_by_rounding() -> None:
    dense = weights()["dense"]
    check(weights(), weights(), weights(dense=dense * np.float32(1 + 1e-6)))
    check({}, {})
    assert agreement.fingerprint(weights())["bias"] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "which"),
    [
        ({"whitening": swapped(weights()["whitening"], 3, 15)}, "whitening"),
        ({"whitening": -weights()["whitening"]}, "whitening"),
        ({"dense": swapped(weights()["dense"], 0, 511)}, "dense"),
        ({"dense": weights()["dense"][:, ::-1]}, "dense"),
        ({"dense": weights()["dense"] * 1.001}, "dense"),
        ({"bias": np.full(10, 1e-9)}, "bias"),
        ({"count": np.int64(8)}, "count"),
    ],
)
def test_what_differs_is_named_with_its_executor(changes: dict[str, Any], which: str) -> None:
    with pytest.raises(TrainingError, match=rf"did not train the same 'net'.*{which} of executor 2 and of executor 0"):
        check(weights(), weights(), weights(**changes))


def test_a_single_step_that_one_executor_left_out_is_seen() -> None:
    drawn = np.random.default_rng(4)
    dense = weights()["dense"]
    step = 1e-3 * drawn.standard_normal(dense.shape)  # a thousand of them, each of a thousandth, one missing
    with pytest.raises(TrainingError, match=r"dense of executor 1 .* differ: 0\.00"):
        check(weights(), weights(dense=dense + step))


def test_what_is_not_finite() -> None:
    broken = np.full(10, np.nan)
    check(weights(bias=broken), weights(bias=broken))
    with pytest.raises(TrainingError, match="no finite numbers on one of them"):
        check(weights(), weights(bias=broken))


def test_other_arrays() -> None:
    with pytest.raises(TrainingError, match="of executors 0 and 1 only 0 has reported bias"):
        check(weights(), {})
    with pytest.raises(TrainingError, match="of executors 0 and 2 only 2 has reported extra"):
        check(weights(), weights(), weights(extra=np.ones(3)))
    check(weights(), dict(reversed(weights().items())))
