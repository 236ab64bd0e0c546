"""Have Caffe's nets on Spark become slower, or do they learn worse, with either engine?"""

from __future__ import annotations

import pytest

MARGIN_PERCENT = 15
"""As for TensorFlow: ten-second rounds on a shared two-core machine leave 10 % undecided."""


@pytest.mark.gauge(framework="caffe", model="cifar10_quick", runtime_margin=MARGIN_PERCENT)
def test_cifar10_quick(trained, baseline):
    assert trained.runtime <= baseline.runtime
    assert trained.accuracy >= baseline.accuracy


@pytest.mark.usefixtures("minutes")
@pytest.mark.gauge(framework="caffe", model="cifar10_full", runtime_margin=MARGIN_PERCENT)
def test_cifar10_full(trained, baseline):
    assert trained.runtime <= baseline.runtime
    assert trained.accuracy >= baseline.accuracy


@pytest.mark.usefixtures("real_caffe")
@pytest.mark.gauge(
    framework="caffe", engine="caffe", model="cifar10_quick", rounds=3, runtime_margin=MARGIN_PERCENT
)  # each of its rounds takes three times as long as one of engine torch
def test_cifar10_quick_by_caffe_itself(trained, baseline):
    assert trained.runtime <= baseline.runtime
    assert trained.accuracy >= baseline.accuracy


@pytest.mark.gauge(
    framework="caffe", model="cifar10_quick", device="gpu", executors=1, rounds=5
)  # a round takes seconds, in every profile
def test_cifar10_quick_gpu(trained, baseline):
    assert trained.runtime <= baseline.runtime
    assert trained.accuracy >= baseline.accuracy
