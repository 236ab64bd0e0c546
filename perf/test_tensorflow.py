"""Has TensorFlow on Spark become slower, or does it learn worse?"""

from __future__ import annotations

import pytest

MARGIN_PERCENT = 15
"""Ten-second rounds vary by 2 to 7 % on a shared two-core machine; five of them a side leave 10 % undecided."""


@pytest.mark.gauge(framework="tensorflow", model="cifar10_quick", runtime_margin=MARGIN_PERCENT)
def test_cifar10_quick(trained, baseline):
    assert trained.runtime <= baseline.runtime
    assert trained.accuracy >= baseline.accuracy


@pytest.mark.usefixtures("minutes")
@pytest.mark.gauge(framework="tensorflow", model="cifar10_tutorial", runtime_margin=MARGIN_PERCENT)
def test_cifar10_tutorial(trained, baseline):
    assert trained.runtime <= baseline.runtime
    assert trained.accuracy >= baseline.accuracy


@pytest.mark.gauge(framework="tensorflow", model="cifar10_quick", device="gpu")
def test_cifar10_quick_gpu(trained, baseline):
    assert trained.runtime <= baseline.runtime
    assert trained.accuracy >= baseline.accuracy


@pytest.mark.gauge(framework="tensorflow", model="cifar10_tutorial", device="gpu")
def test_cifar10_tutorial_gpu(trained, baseline):
    assert trained.runtime <= baseline.runtime
    assert trained.accuracy >= baseline.accuracy
