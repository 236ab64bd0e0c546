"""Engine torch as a whole: resuming, splitting a batch over executors, exact counts, bad input."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="engine torch needs PyTorch")
pytest.importorskip("google.protobuf", reason="reading prototxt needs protobuf")

from sparkgauge.adapters import layout  # noqa: E402
from sparkgauge.adapters.caffe.engine_torch import TEST_BATCH, TorchEngine  # noqa: E402
from sparkgauge.caffe import net, schema, text  # noqa: E402
from sparkgauge.errors import ConfigurationError, DataError, TrainingError  # noqa: E402

SHAPE = (3, 9, 8)
NET = """
name: "small"
layer { name: "data" type: "Data" top: "data" top: "label" transform_param { scale: 0.01 mean_value: 100 }
  data_param { source: "unused" batch_size: 8 } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  param { lr_mult: 1 } param { lr_mult: 2 decay_mult: 0 }
  convolution_param { num_output: 5 kernel_size: 3 pad: 1 weight_filler { type: "xavier" } } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "pool" type: "Pooling" bottom: "conv" top: "pool" pooling_param { pool: AVE kernel_size: 3 stride: 2 } }
layer { name: "fixed" type: "Convolution" bottom: "pool" top: "fixed" param { lr_mult: 0 } param { lr_mult: 0 }
  convolution_param { num_output: 4 kernel_size: 1 weight_filler { type: "msra" } } }
layer { name: "max" type: "Pooling" bottom: "fixed" top: "max" pooling_param { kernel_size: 2 stride: 2 } }
layer { name: "relu2" type: "ReLU" bottom: "max" top: "max" }
layer { name: "ip" type: "InnerProduct" bottom: "max" top: "ip"
  inner_product_param { num_output: 4 weight_filler { type: "gaussian" std: 0.3 } } }
layer { name: "accuracy" type: "Accuracy" bottom: "ip" bottom: "label" top: "accuracy" include { phase: TEST } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
"""
SGD = 'type: "SGD" base_lr: 0.05 momentum: 0.9 weight_decay: 0.01 lr_policy: "step" stepsize: 3 gamma: 0.5'


def engine(solver: str = SGD, source: str = NET, **options: Any) -> TorchEngine:
    message = text.parse(source, schema.NetParameter).message
    nets = [net.for_phase(message, "TRAIN"), net.for_phase(message, "TEST")]
    parsed = text.parse(solver, schema.SolverParameter).message
    return TorchEngine(parsed, *nets, **{"input_shape": SHAPE, "batch": 8, "seed": 5, **options})


def batch(count: int = 8, seed: int = 0) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (count, SHAPE[1], SHAPE[2], SHAPE[0]), dtype=np.uint8)
    return pixels.transpose(0, 3, 1, 2), generator.integers(0, 4, count)


def close(first: Any, second: Any, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    assert first.keys() == second.keys()
    for name, arrays in first.items():
        for one, other in zip(arrays, second[name], strict=True):
            np.testing.assert_allclose(one, other, rtol=rtol, atol=atol, err_msg=name)


def test_training_learns_and_leaves_frozen_layers_alone() -> None:
    subject, (images, labels) = engine(), batch()
    before = subject.parameters()
    losses = [subject.step(images, labels, global_batch=8) for _ in range(30)]
    after = subject.parameters()
    assert losses[-1] < 0.9 * losses[0]
    assert subject.iteration == 30
    np.testing.assert_array_equal(before["fixed"][0], after["fixed"][0])
    assert not np.array_equal(before["conv"][0], after["conv"][0])


def _keep(buffers: list[Any], buffer: Any) -> None:
    buffers.append(buffer.copy())


def _overwrite(total: Any, buffer: Any) -> None:
    buffer[:] = total


@pytest.mark.parametrize("parts", [(4, 4), (5, 2, 1), (8, 0)])
@pytest.mark.parametrize("iter_size", [1, 2])
def test_parts_of_a_batch_with_summed_gradients_equal_the_whole(parts: tuple[int, ...], iter_size: int) -> None:
    solver = f"{SGD} iter_size: {iter_size}"
    whole, executors = engine(solver), [engine(solver, rank=rank) for rank in range(len(parts))]
    bounds = np.cumsum([0, *parts])
    shares = [slice(a, b) for a, b in pairwise(bounds)]
    for step in range(4):
        images, labels = batch(seed=step)
        loss = whole.step(images, labels, global_batch=8)
        buffers: list[Any] = []
        for executor, share in zip(executors, shares, strict=True):
            copy = engine(solver)
            copy.set_parameters(executor.parameters())
            copy.step(images[share], labels[share], global_batch=8, reduce=partial(_keep, buffers))
        total = partial(_overwrite, sum(buffers))
        found = [
            executor.step(images[share], labels[share], global_batch=8, reduce=total)
            for executor, share in zip(executors, shares, strict=True)
        ]
        assert sum(found) == pytest.approx(loss, rel=1e-5)
    for executor in executors:
        close(whole.parameters(), executor.parameters())


@pytest.mark.parametrize("solver", [SGD, SGD.replace("SGD", "Adam"), SGD.replace("SGD", "AdaDelta")])
def test_a_resumed_run_equals_an_uninterrupted_one(solver: str, tmp_path: Path) -> None:
    straight, first, second = engine(solver), engine(solver), engine(solver, seed=9)
    for step in range(7):
        straight.step(*batch(seed=step), global_batch=8)
    for step in range(4):
        first.step(*batch(seed=step), global_batch=8)
    first.save_weights(tmp_path / "w.caffemodel")
    first.save_state(tmp_path / "s.solverstate", "w.caffemodel")
    second.load_weights(tmp_path / "w.caffemodel")
    second.load_state(tmp_path / "s.solverstate")
    assert second.iteration == 4
    for step in range(4, 7):
        second.step(*batch(seed=step), global_batch=8)
    for name, arrays in straight.parameters().items():
        for one, other in zip(arrays, second.parameters()[name], strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("count", [1, TEST_BATCH["cpu"], TEST_BATCH["cpu"] + 1])
def test_every_image_is_counted_once(count: int) -> None:
    subject, (images, labels) = engine(), batch(count)
    scores = np.concatenate(
        [subject.blobs(images[i : i + 50], labels[i : i + 50]).data["ip"] for i in range(0, count, 50)]
    )
    found = subject.test(images, labels)
    assert found.tested == count
    assert found.correct == int((scores.argmax(1) == labels).sum())
    logs = scores - np.log(np.exp(scores.astype(float)).sum(1, keepdims=True))
    assert found.loss_sum == pytest.approx(-logs[np.arange(count), labels].sum(), rel=1e-5)


def test_blobs_change_nothing_and_carry_every_gradient() -> None:
    subject, (images, labels) = engine(), batch()
    before = subject.parameters()
    found = subject.blobs(images, labels)
    close(before, subject.parameters(), rtol=0)
    np.testing.assert_allclose(found.data["data"], (images.astype(float) - 100) * 0.01, rtol=1e-5, atol=1e-6)
    assert found.data["conv"].shape == found.diff["conv"].shape == (8, 5, 9, 8)
    assert found.data["conv"].min() == 0  # after the in-place ReLU
    assert not found.diff["conv"][found.data["conv"] == 0].any()  # the gradient below it
    np.testing.assert_allclose(found.parameters["conv"][1], found.diff["conv"].sum((0, 2, 3)), rtol=1e-4)
    assert not found.parameters["fixed"][0].any()
    assert "data" not in found.diff


BRANCHES = """
name: "branches"
layer { name: "data" type: "Data" top: "data" top: "label" data_param { source: "unused" batch_size: 8 } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 6 kernel_size: 3 pad: 1 weight_filler { type: "xavier" } } }
layer { name: "grouped" type: "Convolution" bottom: "conv" top: "grouped"
  convolution_param { num_output: 4 kernel_size: 3 group: 2 weight_filler { type: "xavier" } } }
layer { name: "leaky" type: "ReLU" bottom: "conv" top: "leaky" relu_param { negative_slope: 0.1 } }
layer { name: "padded" type: "Pooling" bottom: "leaky" top: "padded"
  pooling_param { pool: AVE kernel_size: 3 stride: 2 pad: 1 } }
layer { name: "max" type: "Pooling" bottom: "conv" top: "max" pooling_param { kernel_size: 3 stride: 2 } }
layer { name: "relu" type: "ReLU" bottom: "max" top: "max" }
layer { name: "conv2" type: "Convolution" bottom: "max" top: "conv2"
  convolution_param { num_output: 5 kernel_size: 2 bias_term: false weight_filler { type: "xavier" } } }
layer { name: "ip" type: "InnerProduct" bottom: "conv2" top: "ip"
  inner_product_param { num_output: 4 weight_filler { type: "gaussian" std: 0.3 } } }
layer { name: "ip2" type: "InnerProduct" bottom: "padded" top: "ip2"
  inner_product_param { num_output: 4 weight_filler { type: "gaussian" std: 0.3 } } }
layer { name: "ip3" type: "InnerProduct" bottom: "grouped" top: "ip3"
  inner_product_param { num_output: 4 weight_filler { type: "gaussian" std: 0.3 } } }
layer { name: "accuracy" type: "Accuracy" bottom: "ip" bottom: "label" top: "accuracy" include { phase: TEST } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
layer { name: "loss2" type: "SoftmaxWithLoss" bottom: "ip2" bottom: "label" top: "loss2" }
layer { name: "loss3" type: "SoftmaxWithLoss" bottom: "ip3" bottom: "label" top: "loss3" }
"""
"""One convolution read by a grouped one, by a ReLU with a slope and by a pool: some take blocks, some do not."""


@pytest.mark.parametrize("source", [NET, BRANCHES], ids=["chain", "branches"])
def test_both_orders_in_memory_give_the_same_blobs_and_weights(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (images, labels), found, counts = batch(), [], []
    for blocks in (True, False):
        monkeypatch.setattr(layout, "prefers_blocks", lambda blocks=blocks: blocks)
        subject = engine(SGD.replace("0.05", "1e-4") if source is BRANCHES else SGD, source)
        blocked = {op.layer.name for op in subject._net.operations if op.layer.blocked}
        expected = (
            {"conv", "relu", "pool", "fixed", "max", "relu2"} if source is NET else {"conv", "max", "relu", "conv2"}
        )
        assert blocked == (expected if blocks else set())
        blobs = subject.blobs(images, labels)
        for _ in range(3):
            subject.step(images, labels, global_batch=8)
        found.append([{name: [array] for name, array in part.items()} for part in (blobs.data, blobs.diff)])
        found[-1] += [blobs.parameters, subject.parameters()]
        counts.append(subject.test(images, labels).correct)
    for one, other in zip(*found, strict=True):
        close(one, other, rtol=1e-4)
    assert counts[0] == counts[1]


def test_attached_images_give_the_same_step() -> None:
    first, second, (images, labels) = engine(), engine(), batch(20)
    chosen = np.array([3, 19, 4, 4, 0, 7, 11, 2])
    second.attach(images, labels)
    direct = first.step(images[chosen], labels[chosen], global_batch=8)
    assert second.step_at(chosen, global_batch=8) == direct
    close(first.parameters(), second.parameters(), rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch sees")
@pytest.mark.parametrize("summed", [False, True])
def test_captured_steps_on_a_gpu_equal_those_on_the_cpu(summed: bool) -> None:
    def keep(flat: Any) -> None:
        """Sum over one executor."""

    keep.on_device = True  # type: ignore[attr-defined]
    first, second, (images, labels) = engine(), engine(device="cuda"), batch(40)
    second.attach(images, labels)
    for step in range(12):
        chosen = np.random.default_rng(step).permutation(40)[: 8 if step % 3 else 5]
        loss = second.start_step_at(chosen, global_batch=len(chosen), reduce=keep if summed else None)
        wanted = first.step(images[chosen], labels[chosen], global_batch=len(chosen))
        assert float(loss) == pytest.approx(wanted, rel=1e-2)  # products in TF32: ten bits
    close(first.parameters(), second.parameters(), rtol=1e-2, atol=5e-3)
    assert abs(second.test(images, labels).correct - first.test(images, labels).correct) <= 1


def test_the_same_seed_gives_the_same_weights_on_every_rank() -> None:
    close(engine(rank=0).parameters(), engine(rank=1).parameters(), rtol=0)
    assert not np.array_equal(engine(seed=1).parameters()["ip"][0], engine(seed=2).parameters()["ip"][0])


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    subject, (images, labels) = engine(), batch()
    with pytest.raises(TrainingError, match="loss is not finite") as caught:
        subject.step(images * np.float32(np.nan), labels, global_batch=8)
    assert "iteration" in str(caught.value)


def test_images_and_labels_that_do_not_fit_are_refused() -> None:
    subject, (images, labels) = engine(), batch()
    with pytest.raises(DataError, match="images do not fit"):
        subject.step(images[:, :2], labels, global_batch=8)
    with pytest.raises(DataError, match="expected 0 to 3, got 0 to 4"):
        subject.step(images, np.array([0, 1, 2, 3, 4, 0, 0, 0]), global_batch=8)
    with pytest.raises(DataError, match="mean does not fit"):
        engine(mean=np.zeros((3, 8, 9), np.float32))


def test_weights_of_another_net_are_refused(tmp_path: Path) -> None:
    engine(source=NET.replace("num_output: 5", "num_output: 6")).save_weights(tmp_path / "w.caffemodel")
    with pytest.raises(DataError, match="another shape.*'conv'"):
        engine().load_weights(tmp_path / "w.caffemodel")


def test_shared_weights_and_unknown_blobs_are_refused() -> None:
    shared = NET.replace("param { lr_mult: 1 }", 'param { name: "w" lr_mult: 1 }')
    with pytest.raises(ConfigurationError, match="sharing weights by name"):
        engine(source=shared)
    with pytest.raises(ConfigurationError, match="ghost"):
        engine(source=NET.replace('bottom: "pool"', 'bottom: "ghost"'))
