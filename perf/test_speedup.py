"""Do more executors, and a GPU, still pay off as much as they did?"""

from __future__ import annotations

import pytest

from sparkgauge import speedup


@pytest.mark.cpu
def test_tensorflow_executors_pay_off(train, baseline, several_executors):
    # four rounds of each: pairs of interleaved rounds vary less than the rounds do
    one = train("tensorflow", "cifar10_quick", executors=1, rounds=4, label="one")
    all_of_them = train("tensorflow", "cifar10_quick", executors=several_executors, rounds=4, label="all")
    assert speedup(all_of_them, over=one) >= baseline.speedup


@pytest.mark.gpu
def test_tensorflow_gpu_pays_off(train, baseline):
    cpu = train("tensorflow", "cifar10_tutorial", executors=1, device="cpu", label="cpu")
    gpu = train("tensorflow", "cifar10_tutorial", executors=1, device="gpu", label="gpu")
    assert speedup(gpu, over=cpu) >= baseline.speedup
