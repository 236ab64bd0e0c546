"""Do more executors still pay off as much as they did? (GPUs: test_gpu.py)"""

from __future__ import annotations

import pytest

from sparkgauge import speedup

MARGIN_PERCENT = 30
"""A ratio has the noise of both its sides: 10 % of it on a shared two-core machine, where 10 % would stay undecided."""


@pytest.mark.cpu
@pytest.mark.usefixtures("ratios")
def test_tensorflow_executors_pay_off(train, baseline, several_executors):
    # a ratio needs no whole training, and pairs of interleaved rounds vary less than the rounds do
    length = {"iterations": 40, "rounds": 6, "speedup_margin": MARGIN_PERCENT}
    one = train("tensorflow", "cifar10_quick", executors=1, label="one", **length)
    all_of_them = train("tensorflow", "cifar10_quick", executors=several_executors, label="all", **length)
    assert speedup(all_of_them, over=one) >= baseline.speedup
