"""Has PyTorch on Spark become slower, or does it learn worse?"""

from __future__ import annotations

import pytest

MARGIN_PERCENT = 15
"""As for TensorFlow: short rounds on a shared two-core machine leave 10 % undecided."""

GPU_ROUNDS = 5
"""A round on a GPU takes seconds in every profile: more of them cost little and narrow every interval."""

SPEEDRUNS = 10
"""What a recipe is said to reach is the mean over at least ten seeds."""


@pytest.mark.gauge(framework="torch", model="cifar10_quick", runtime_margin=MARGIN_PERCENT)
def test_cifar10_quick(trained, baseline):
    assert trained.runtime <= baseline.runtime
    assert trained.accuracy >= baseline.accuracy


@pytest.mark.usefixtures("minutes")
@pytest.mark.gauge(framework="torch", model="cifar10_tutorial", iterations=1000, runtime_margin=MARGIN_PERCENT)
def test_cifar10_tutorial(trained, baseline):
    assert trained.runtime <= baseline.runtime
    assert trained.accuracy >= baseline.accuracy


@pytest.mark.usefixtures("minutes")
@pytest.mark.gauge(framework="torch", model="resnet20", iterations=400, runtime_margin=MARGIN_PERCENT)
def test_resnet20(trained, baseline):
    assert trained.runtime <= baseline.runtime
    assert trained.accuracy >= baseline.accuracy


@pytest.mark.usefixtures("minutes")
@pytest.mark.gauge(framework="torch", model="speedrun", iterations=50, runtime_margin=MARGIN_PERCENT)
def test_speedrun(trained, baseline):
    # one epoch; the rate keeps its shape, so that an epoch is a whole training
    assert trained.runtime <= baseline.runtime
    assert trained.accuracy >= baseline.accuracy


@pytest.mark.gauge(
    framework="torch", model="cifar10_quick", device="gpu", executors=1, iterations=5000, rounds=GPU_ROUNDS
)
def test_cifar10_quick_gpu(trained, baseline):
    assert trained.runtime <= baseline.runtime
    assert trained.accuracy >= baseline.accuracy


@pytest.mark.gauge(
    framework="torch", model="cifar10_tutorial", device="gpu", executors=1, iterations=3000, rounds=GPU_ROUNDS
)
def test_cifar10_tutorial_gpu(trained, baseline):
    assert trained.runtime <= baseline.runtime
    assert trained.accuracy >= baseline.accuracy


@pytest.mark.gauge(framework="torch", model="resnet20", device="gpu", executors=1, iterations=2000, rounds=GPU_ROUNDS)
def test_resnet20_gpu(trained, baseline):
    assert trained.runtime <= baseline.runtime
    assert trained.accuracy >= baseline.accuracy


@pytest.mark.gauge(framework="torch", model="speedrun", device="gpu", executors=1, iterations=750, rounds=SPEEDRUNS)
def test_speedrun_gpu(trained, baseline):
    # a GPU trains the whole recipe in seconds, in every profile
    assert trained.runtime <= baseline.runtime
    assert trained.accuracy >= baseline.accuracy
