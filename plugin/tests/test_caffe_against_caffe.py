"""Engine torch against the real Caffe: same weights, same data, same numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="engine torch needs PyTorch")
pytest.importorskip("google.protobuf", reason="reading prototxt needs protobuf")

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import sparkgauge
from sparkgauge.adapters.caffe import engine_caffe
from sparkgauge.adapters.caffe.engine_caffe import CaffeEngine
from sparkgauge.adapters.caffe.engine_torch import TorchEngine
from sparkgauge.caffe import weights
from sparkgauge.caffe.net import parse_net
from sparkgauge.caffe.solver import read_solver
from sparkgauge.errors import DataError, MachineError, TrainingError

BATCH, SHAPE = 20, (3, 32, 32)
QUICK = Path(sparkgauge.__file__).parent / "models" / "caffe" / "cifar10_quick_solver.prototxt"


@pytest.fixture(autouse=True, scope="module")
def _real_caffe() -> None:
    """Skip without pycaffe; SPARKGAUGE_CAFFE=1 says that it must be there."""
    try:
        engine_caffe.require()
    except MachineError as error:
        if os.environ.get("SPARKGAUGE_CAFFE") == "1":
            raise
        pytest.skip(str(error))


def images(count: int, seed: int = 0) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, *SHAPE), np.uint8), random.integers(0, 10, count)


def made(kind: Any, *, batch: int = BATCH, train: Any = None) -> Any:
    solver = read_solver(QUICK)
    nets = (train, None) if train is not None else (solver.train_net(), solver.test_net())
    mean = np.full(SHAPE, 120, np.float32)
    return kind(solver.message, *nets, input_shape=SHAPE, batch=batch, mean=mean, seed=3)


@pytest.fixture
def pair() -> Iterator[tuple[Any, Any]]:
    real, ours = made(CaffeEngine), made(TorchEngine)
    ours.set_parameters(real.parameters())
    yield real, ours
    real.close()
    ours.close()


def assert_near(ours: Any, real: Any, name: str, relative: float = 1e-4) -> None:
    """The largest difference against the largest value: single values near 0 have no relative error."""
    assert np.abs(ours - real).max() <= relative * max(float(np.abs(real).max()), 1e-12), name


def assert_equal(ours: Any, real: Any) -> None:
    assert ours.keys() == real.keys()
    assert all(np.array_equal(a, b) for name in real for a, b in zip(ours[name], real[name], strict=True))


def assert_same(ours: Any, real: Any) -> None:
    for part in ("data", "diff"):
        values, wanted = getattr(ours, part), getattr(real, part)
        assert values.keys() & wanted.keys(), part
        for name in values.keys() & wanted.keys():
            assert_near(values[name], wanted[name], f"{part} {name}")
    for layer, blobs in real.parameters.items():
        for index, blob in enumerate(blobs):
            assert_near(ours.parameters[layer][index], blob, f"gradient {layer}[{index}]")


def test_every_output_and_gradient_of_cifar10_quick(pair: tuple[Any, Any]) -> None:
    real, ours = pair
    assert_same(ours.blobs(*images(BATCH)), real.blobs(*images(BATCH)))


def test_recording_changes_neither_weights_nor_history(pair: tuple[Any, Any]) -> None:
    real, _ = pair
    before = real.parameters()
    real.blobs(*images(BATCH))
    assert_equal(real.parameters(), before)


def test_a_caffemodel_of_either_engine_counts_the_same_in_the_other(pair: tuple[Any, Any], tmp_path: Path) -> None:
    real, ours = pair
    for index in range(3):
        real.step(*images(BATCH, index), global_batch=BATCH)
    real.save_weights(tmp_path / "real.caffemodel")
    ours.load_weights(tmp_path / "real.caffemodel")
    assert ours.test(*images(203)).correct == real.test(*images(203)).correct
    ours.step(*images(BATCH, 9), global_batch=BATCH)
    ours.save_weights(tmp_path / "ours.caffemodel")
    real.load_weights(tmp_path / "ours.caffemodel")
    assert ours.test(*images(203)).correct == real.test(*images(203)).correct


def test_two_halves_summed_equal_the_whole_batch() -> None:
    whole, half = made(CaffeEngine), made(CaffeEngine, batch=BATCH // 2)
    other = made(CaffeEngine, batch=BATCH // 2)
    pixels, labels = images(BATCH)
    first, second = slice(BATCH // 2), slice(BATCH // 2, None)
    kept: list[Any] = []
    try:
        other.step(pixels[second], labels[second], global_batch=BATCH, reduce=lambda flat: kept.append(flat.copy()))
        half.step(pixels[first], labels[first], global_batch=BATCH, reduce=lambda flat: np.add(flat, kept[0], out=flat))
        whole.step(pixels, labels, global_batch=BATCH)
        ours, wanted = half.parameters(), whole.parameters()
        for name, blobs in wanted.items():
            for index, blob in enumerate(blobs):
                assert_near(ours[name][index], blob, name, 1e-5)
    finally:
        for engine in (whole, half, other):
            engine.close()


def test_a_state_resumes_to_the_same_weights(pair: tuple[Any, Any], tmp_path: Path) -> None:
    real, _ = pair
    real.step(*images(BATCH, 1), global_batch=BATCH)
    real.save_weights(tmp_path / "one.caffemodel")
    real.save_state(tmp_path / "one.solverstate", "one.caffemodel")
    real.step(*images(BATCH, 2), global_batch=BATCH)
    resumed = made(CaffeEngine)
    try:
        resumed.load_weights(tmp_path / "one.caffemodel")
        resumed.load_state(tmp_path / "one.solverstate")
        assert resumed.iteration == 1
        resumed.step(*images(BATCH, 2), global_batch=BATCH)
        assert_equal(resumed.parameters(), real.parameters())
    finally:
        resumed.close()


def test_labels_beyond_the_outputs_are_refused_before_caffe_reads_beyond_its_memory(pair: tuple[Any, Any]) -> None:
    pixels, labels = images(BATCH)
    labels[:2] = 0, 9
    for engine in pair:
        for wrong in (labels + 1, labels - 1):
            with pytest.raises(DataError, match="labels do not fit the net: expected 0 to 9, got .* in loss"):
                engine.step(pixels, wrong, global_batch=BATCH)
            with pytest.raises(DataError, match="labels do not fit the net"):
                engine.test(pixels, wrong)
        engine.step(pixels, labels, global_batch=BATCH)


def test_a_state_of_another_net_is_refused_by_both(pair: tuple[Any, Any], tmp_path: Path) -> None:
    other = tmp_path / "other.solverstate"
    weights.write_state(other, weights.State(3, 0, "", [np.zeros((4, 4), np.float32)] * 10))
    for engine in pair:
        with pytest.raises(DataError):
            engine.load_state(other)


def test_a_net_that_diverged_in_its_last_update_fails_its_test(pair: tuple[Any, Any]) -> None:
    for engine in pair:
        engine.set_parameters({"ip2": [np.full((10, 64), np.nan, np.float32), np.zeros(10, np.float32)]})
        with pytest.raises(TrainingError, match=r"the loss is not finite: .*Lower base_lr"):
            engine.test(*images(BATCH))


def test_a_failed_check_is_one_error_with_caffes_message() -> None:
    net = "layer { name: 'data' type: 'Input' top: 'data' top: 'label' input_param {"
    net += " shape { dim: 20 dim: 3 dim: 32 dim: 32 } shape { dim: 20 } } } layer { name: 'ip' type: 'InnerProduct'"
    net += " bottom: 'data' top: 'ip'"
    message = parse_net(net + " inner_product_param { num_output: 10 } }").message
    message.layer[1].bottom[0] = "absent"
    with pytest.raises(TrainingError, match="Unknown bottom blob 'absent'"):
        made(CaffeEngine, train=message)


@settings(max_examples=6, deadline=None)
@given(
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    pad=st.integers(0, 1),
    pool=st.sampled_from(["MAX", "AVE"]),
    pool_kernel=st.integers(2, 3),
    outputs=st.integers(1, 4),
)
def test_random_small_nets_agree(kernel: int, stride: int, pad: int, pool: str, pool_kernel: int, outputs: int) -> None:
    net = parse_net(f"""
        layer {{ name: "data" type: "Input" top: "data" top: "label" input_param {{
          shape {{ dim: 4 dim: 3 dim: 32 dim: 32 }} shape {{ dim: 4 }} }} }}
        layer {{ name: "conv" type: "Convolution" bottom: "data" top: "conv" convolution_param {{ num_output: {outputs}
          kernel_size: {kernel} stride: {stride} pad: {pad} weight_filler {{ type: "xavier" }} }} }}
        layer {{ name: "relu" type: "ReLU" bottom: "conv" top: "conv" }}
        layer {{ name: "pool" type: "Pooling" bottom: "conv" top: "pool"
          pooling_param {{ pool: {pool} kernel_size: {pool_kernel} stride: 2 }} }}
        layer {{ name: "ip" type: "InnerProduct" bottom: "pool" top: "ip"
          inner_product_param {{ num_output: 10 weight_filler {{ type: "xavier" }} }} }}
        layer {{ name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }}
    """).message
    real, ours = made(CaffeEngine, batch=4, train=net), made(TorchEngine, batch=4, train=net)
    try:
        ours.set_parameters(real.parameters())
        assert_same(ours.blobs(*images(4)), real.blobs(*images(4)))
    finally:
        real.close()
        ours.close()
