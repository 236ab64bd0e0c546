"""FLOPs counted per model against known figures."""

from __future__ import annotations

import pytest

from sparkgauge.models.cifar10 import RECIPES
from sparkgauge.models.flops import PRODUCTS, achieved_gflops, training_flops


@pytest.mark.parametrize(
    ("model", "megaflops"),
    [
        ("cifar10_quick", 69.21),
        ("cifar10_full", 68.87),
        ("cifar10_tutorial", 105.30),
        ("resnet20", 242.42),
        ("speedrun", 707.78),
    ],
)
def test_counted_work_per_image(model: str, megaflops: float) -> None:
    counted = training_flops(PRODUCTS[model])
    assert counted == pytest.approx(megaflops * 1e6, rel=1e-4)
    assert RECIPES[model].train_flops_per_image == pytest.approx(counted, rel=1e-4)


def test_achieved_rate() -> None:
    assert achieved_gflops("resnet20", 100.0) == pytest.approx(24.242, rel=1e-3)
    assert achieved_gflops("custom", 100.0) is None
