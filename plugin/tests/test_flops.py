"""FLOPs counted per model against known figures."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from sparkgauge.adapters.collective import Exchange, Team
from sparkgauge.adapters.torch import networks
from sparkgauge.errors import ConfigurationError
from sparkgauge.models.cifar10 import RECIPES
from sparkgauge.models.flops import PRODUCTS, achieved_gflops, training_flops, width_of


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


def test_the_width_of_speedrun_counts() -> None:
    whole, half = (achieved_gflops("speedrun", 1.0, {"width": width}) for width in (1, 0.5))
    assert whole == pytest.approx(0.70778, rel=1e-4) and half == pytest.approx(0.19729, rel=1e-4)
    network = networks.build(RECIPES["speedrun"], 1, Exchange(Team()), 0.5)
    assert [block.conv2.weight.shape[0] for block in network.blocks] == [32, 128, 128]


@pytest.mark.parametrize("width", [0, -1.0, "half", True, 9])
def test_a_width_that_is_none_is_refused(width: object) -> None:
    with pytest.raises(ConfigurationError, match="Bad value for width"):
        width_of({"width": width})


def test_achieved_rate() -> None:
    assert achieved_gflops("resnet20", 100.0) == pytest.approx(24.242, rel=1e-3)
    assert achieved_gflops("custom", 100.0) is None
