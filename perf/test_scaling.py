"""Does training still get faster with executors, and how much of them does it use?

Strong scaling keeps the global batch, so that any number of executors does the same work; weak scaling keeps the batch
of each executor. Both are gated as efficiencies: the quotient of throughputs over the quotient of executors. Profile ci
has no time for it; its question is asked there by test_speedup.py, for one framework.
"""

from __future__ import annotations

import pytest

from sparkgauge import efficiency
from sparkgauge.workload import FRAMEWORKS

AVAILABLE = [name for name, spec in FRAMEWORKS.items() if spec.module is not None]


@pytest.fixture
def counts(several_executors):
    """Return one executor, two, and all of them."""
    return sorted({1, 2, several_executors})


@pytest.mark.cpu
@pytest.mark.usefixtures("minutes")
@pytest.mark.parametrize("framework", AVAILABLE)
def test_strong(train, baseline, counts, framework):
    length = {"iterations": 40, "rounds": 3, "speedup_margin": 15}
    runs = [train(framework, "cifar10_quick", executors=n, label=f"on-{n}", **length) for n in counts]
    assert efficiency(runs[-1], over=runs[0]) >= baseline.efficiency
    for run in runs:
        assert run.accuracy >= baseline[run.label].accuracy


@pytest.mark.cpu
@pytest.mark.usefixtures("minutes")
@pytest.mark.parametrize("framework", AVAILABLE)
def test_weak(train, baseline, counts, framework):
    length = {"iterations": 40, "rounds": 3, "speedup_margin": 15}
    runs = [
        train(framework, "cifar10_quick", executors=n, batch_size=100 * n, label=f"on-{n}", **length) for n in counts
    ]
    assert efficiency(runs[-1], over=runs[0]) >= baseline.efficiency
