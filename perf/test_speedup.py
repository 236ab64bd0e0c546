"""Do more executors still pay off as much as they did? (GPUs: test_gpu.py)"""

from __future__ import annotations

import pytest

from sparkgauge import speedup


@pytest.mark.cpu
def test_tensorflow_executors_pay_off(train, baseline, several_executors):
    # four rounds of each: pairs of interleaved rounds vary less than the rounds do
    one = train("tensorflow", "cifar10_quick", executors=1, rounds=4, label="one")
    all_of_them = train("tensorflow", "cifar10_quick", executors=several_executors, rounds=4, label="all")
    assert speedup(all_of_them, over=one) >= baseline.speedup
