"""What does Spark itself cost a training, and what does a launcher?"""

from __future__ import annotations

import pytest

from sparkgauge import efficiency


@pytest.mark.cpu
@pytest.mark.usefixtures("minutes")
def test_spark_against_bare_processes(train, baseline, by_hand):
    # the same code in as many processes, started by hand: what is left is Spark, and 1 means that it costs nothing
    inside = train("torch", "cifar10_quick", iterations=150, rounds=4)
    assert efficiency(inside, over=by_hand(inside)) >= baseline.efficiency


@pytest.mark.gpu
@pytest.mark.usefixtures("minutes")
def test_spark_against_a_bare_process_on_a_gpu(train, baseline, by_hand):
    inside = train("torch", "cifar10_quick", device="gpu", executors=1, iterations=4000, rounds=4)
    assert efficiency(inside, over=by_hand(inside)) >= baseline.efficiency


@pytest.mark.cpu
@pytest.mark.usefixtures("minutes")
def test_our_launcher_against_torchdistributor(train, baseline):
    pytest.importorskip("pandas", reason="TorchDistributor needs it: pip install 'pytest-sparkgauge[torchdistributor]'")
    pytest.importorskip(
        "pyarrow", reason="TorchDistributor needs it: pip install 'pytest-sparkgauge[torchdistributor]'"
    )
    length = {"iterations": 2, "rounds": 4}
    ours = train("torch", "cifar10_quick", label="barrier", **length)
    theirs = train("torch", "cifar10_quick", launcher="torchdistributor", label="torchdistributor", **length)
    assert ours.metric("launch_seconds") <= baseline["barrier"].metric("launch_seconds")
    assert float(theirs.metric("launch_seconds")) >= 4 * float(ours.metric("launch_seconds"))
