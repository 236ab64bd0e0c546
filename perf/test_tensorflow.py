"""Has TensorFlow on Spark become slower, or does it learn worse?"""

from __future__ import annotations

import pytest


@pytest.mark.gauge(framework="tensorflow", model="cifar10_quick")
def test_cifar10_quick(trained, baseline):
    assert trained.runtime <= baseline.runtime
    assert trained.accuracy >= baseline.accuracy


@pytest.mark.gauge(framework="tensorflow", model="cifar10_tutorial")
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
