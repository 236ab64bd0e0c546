"""Have Caffe's nets on Spark become slower, or do they learn worse, with either engine?"""

from __future__ import annotations

import pytest

MARGIN_PERCENT = 15
"""As for TensorFlow: ten-second rounds on a shared two-core machine leave 10 % undecided."""


def test_cifar10_quick(train, baseline, brief):
    # a third of the profile's length, as PyTorch's row has it
    trained = train("caffe", "cifar10_quick", runtime_margin=MARGIN_PERCENT, **brief(iterations=100))
    assert trained.runtime <= baseline.runtime
    assert trained.accuracy >= baseline.accuracy


@pytest.mark.usefixtures("minutes")
@pytest.mark.gauge(framework="caffe", model="cifar10_full", runtime_margin=MARGIN_PERCENT)
def test_cifar10_full(trained, baseline):
    assert trained.runtime <= baseline.runtime
    assert trained.accuracy >= baseline.accuracy


@pytest.mark.usefixtures("real_caffe")
def test_cifar10_quick_by_caffe_itself(train, baseline, brief):
    # each of its rounds takes three times as long as one of engine torch
    work = {"engine": "caffe", "rounds": 3, "runtime_margin": MARGIN_PERCENT, **brief(iterations=100)}
    trained = train("caffe", "cifar10_quick", **work)
    assert trained.runtime <= baseline.runtime
    assert trained.accuracy >= baseline.accuracy


@pytest.mark.gauge(framework="caffe", model="cifar10_quick", device="gpu")
def test_cifar10_quick_gpu(trained, baseline):
    assert trained.runtime <= baseline.runtime
    assert trained.accuracy >= baseline.accuracy
