"""Is a GPU worth its price, does it still train as fast, and do two of them share the work?

Needs NVIDIA GPUs (docs/gpu.md): ``pytest perf -m gpu``. Add ``--gauge-price cpu=…/h,gpu=…/h`` to see it in money.
"""

from __future__ import annotations

import pytest

from sparkgauge import speedup

ROWS = [("caffe", "cifar10_quick"), ("tensorflow", "cifar10_tutorial"), ("torch", "cifar10_quick")]
"""The models of the 2017 report on the frameworks it used, and one of them on PyTorch."""

EPOCHS = 10
"""ResNet-20's own 164 epochs say nothing more about speed."""

GLOBAL_BATCH = 2048
"""Large enough that half of it keeps a data-centre GPU busy: what is measured is the exchange, not the overhead."""


@pytest.mark.gpu
@pytest.mark.parametrize(("framework", "model"), ROWS, ids=[framework for framework, _ in ROWS])
def test_gpu_pays_off(train, baseline, framework, model):
    cpu = train(framework, model, executors=1, device="cpu", label="cpu")
    gpu = train(framework, model, executors=1, device="gpu", label="gpu")
    assert speedup(gpu, over=cpu) >= baseline.speedup
    assert gpu.runtime <= baseline["gpu"].runtime
    assert gpu.accuracy >= baseline["gpu"].accuracy


@pytest.mark.gpu
def test_two_gpus_share_the_work(train, baseline, gpus, several_executors):
    if len(gpus) < 2:
        pytest.skip(f"needs 2 GPUs, and there {'is' if len(gpus) == 1 else 'are'} {len(gpus)}")
    work = {"device": "gpu", "batch_size": GLOBAL_BATCH, "epochs": EPOCHS, "rounds": 4}
    one = train("torch", "resnet20", executors=1, label="one", **work)
    both = train("torch", "resnet20", executors=2, label="both", **work)
    assert speedup(both, over=one) >= baseline.speedup
