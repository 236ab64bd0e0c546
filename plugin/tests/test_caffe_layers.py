"""Each layer of engine torch against plain NumPy loops, and its gradient against finite differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="engine torch needs PyTorch")
pytest.importorskip("google.protobuf", reason="reading prototxt needs protobuf")

from sparkgauge.adapters.caffe.layers import LAYERS, Pass  # noqa: E402
from sparkgauge.adapters.caffe.layers.pooling import pooled_side  # noqa: E402
from sparkgauge.caffe import schema, text  # noqa: E402
from sparkgauge.errors import ConfigurationError  # noqa: E402

SEED = 20


def build(source: str, *shapes: tuple[int, ...]) -> Any:
    """Return the layer of a prototxt snippet with random float64 weights."""
    message = text.parse(f"layer {{ name: 'l' bottom: 'x' top: 'y' {source} }}", schema.NetParameter).message.layer[0]
    layer = LAYERS[message.type](message, list(shapes), "here")
    generator = np.random.default_rng(SEED)
    for weight in layer.weights:
        layer.blobs.append(torch.from_numpy(generator.normal(size=weight.shape)))
        layer.gradients.append(torch.zeros(weight.shape, dtype=torch.float64))
        layer.wants.append(weight.learned)
    return layer


def values(*shape: int) -> Any:
    """Return float64 values no two of which are equal, and none near zero: kinks would spoil the differences."""
    count = math.prod(shape)
    steps = np.random.default_rng(SEED).permutation(count) - count / 2 + 0.25
    return torch.from_numpy((steps / count * 4).reshape(shape))


def forward(layer: Any, *bottoms: Any, training: bool = True) -> Any:
    return layer.forward(list(bottoms), Pass(training, len(bottoms[0])))[0]


def check_gradient(layer: Any, x: Any, *more: Any) -> None:
    """Compare ``backward`` with central differences of sum(y * direction), for the input and every weight."""
    y = forward(layer, x, *more)
    direction = torch.from_numpy(np.random.default_rng(SEED + 1).normal(size=tuple(y.shape)))
    (dx,) = layer.backward([direction], True, Pass(True, len(x)))
    pairs = [(x, dx), *((b, g) for b, g, w in zip(layer.blobs, layer.gradients, layer.wants, strict=True) if w)]
    for values_, gradient in pairs:
        flat, step = values_.reshape(-1) if values_.is_contiguous() else values_.view(-1), 1e-6
        for index in range(0, len(flat), max(1, len(flat) // 7)):
            kept, sides = float(flat[index]), []
            for moved in (kept + step, kept - step):
                flat[index] = moved
                sides.append(float((forward(layer, x, *more) * direction).sum()))
            flat[index] = kept
            slope = (sides[0] - sides[1]) / (2 * step)
            assert float(gradient.reshape(-1)[index]) == pytest.approx(slope, rel=2e-5, abs=2e-6)


def windows(size: int, out: int, kernel: int, stride: int, pad: int) -> list[tuple[int, int, int]]:
    """Return (first, end, counted) of each window along one side, as Caffe's loops place them."""
    found = []
    for index in range(out):
        start = index * stride - pad
        end = min(start + kernel, size + pad)
        found.append((max(start, 0), min(end, size), end - start))
    return found


def pool(x: Any, kernel: int, stride: int, pad: int, *, average: bool) -> Any:
    sides = [pooled_side(side, kernel, stride, pad) for side in x.shape[2:]]
    rows, columns = (windows(x.shape[2 + a], sides[a], kernel, stride, pad) for a in range(2))
    y = np.empty((*x.shape[:2], *sides))
    for i, (top, bottom, height) in enumerate(rows):
        for j, (left, right, width) in enumerate(columns):
            part = x[:, :, top:bottom, left:right]
            y[:, :, i, j] = part.sum((2, 3)) / (height * width) if average else part.max((2, 3))
    return y


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "pad", "expected"),
    [
        (31, 3, 2, 0, 15),  # fits
        (32, 3, 2, 0, 16),  # one over: rounded up
        (33, 3, 2, 0, 16),
        (4, 2, 2, 1, 3),  # the last window reaches the input's end
        (5, 2, 2, 1, 3),  # rounded up to 4, which would start beyond the input: dropped
        (3, 3, 2, 0, 1),
    ],
)
def test_pool_sizes_are_rounded_up_and_clipped(side: int, kernel: int, stride: int, pad: int, expected: int) -> None:
    assert pooled_side(side, kernel, stride, pad) == expected


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["MAX", "AVE"]),
    st.integers(3, 11),
    st.integers(3, 11),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 2),
)
def test_pooling_equals_caffes_loops(kind: str, height: int, width: int, kernel: int, stride: int, pad: int) -> None:
    source = f"type: 'Pooling' pooling_param {{ pool: {kind} kernel_size: {kernel} stride: {stride} pad: {pad} }}"
    x = values(2, 3, height, width)
    try:
        layer = build(source, (3, height, width))
    except ConfigurationError as error:
        assert "window" in str(error)
        return
    expected = pool(x.numpy(), kernel, stride, pad, average=kind == "AVE")
    y = forward(layer, x)
    assert tuple(y.shape[1:]) == layer.tops[0]
    # a mean whose terms cancel has no relative error
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["MAX", "AVE"])
def test_pooling_gradient(kind: str) -> None:
    source = f"type: 'Pooling' pooling_param {{ pool: {kind} kernel_size: 3 stride: 2 }}"
    check_gradient(build(source, (2, 6, 7)), values(2, 2, 6, 7))


def test_first_of_equal_values_takes_the_gradient() -> None:
    layer = build("type: 'Pooling' pooling_param { kernel_size: 2 stride: 2 }", (1, 2, 2))
    y = forward(layer, torch.zeros(1, 1, 2, 2))
    (dx,) = layer.backward([torch.ones_like(y)], True, Pass(True, 1))
    assert dx.flatten().tolist() == [1, 0, 0, 0]


def convolve(x: Any, w: Any, b: Any, stride: int, pad: int, dilation: int, groups: int) -> Any:
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    reach = [dilation * (k - 1) + 1 for k in w.shape[2:]]
    sides = [(x.shape[2 + a] - reach[a]) // stride + 1 for a in range(2)]
    y = np.zeros((len(x), len(w), *sides))
    per_group, within = len(w) // groups, w.shape[1]
    for o in range(len(w)):
        part = x[:, o // per_group * within : (o // per_group + 1) * within]
        for i in range(sides[0]):
            for j in range(sides[1]):
                top, left = i * stride, j * stride
                field = part[:, :, top : top + reach[0] : dilation, left : left + reach[1] : dilation]
                y[:, o, i, j] = (field * w[o]).sum((1, 2, 3)) + b[o]
    return y


@settings(max_examples=25, deadline=None)
@given(
    st.integers(4, 8),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 2),
    st.integers(1, 2),
    st.sampled_from([1, 2]),
)
def test_convolution_equals_its_definition(
    side: int, kernel: int, stride: int, pad: int, dilation: int, groups: int
) -> None:
    source = f"""type: 'Convolution' convolution_param {{ num_output: 4 kernel_h: {kernel} kernel_w: {kernel}
        stride: {stride} pad: {pad} dilation: {dilation} group: {groups} }}"""
    try:
        layer = build(source, (2, side, side + 1))
    except ConfigurationError as error:
        assert "does not fit" in str(error)
        return
    x, (w, b) = values(2, 2, side, side + 1), layer.blobs
    y = forward(layer, x)
    assert tuple(y.shape[1:]) == layer.tops[0]
    np.testing.assert_allclose(y, convolve(x.numpy(), w.numpy(), b.numpy(), stride, pad, dilation, groups), atol=1e-10)


LRN_ACROSS = "type: 'LRN' lrn_param { local_size: 3 alpha: 2.0 beta: 0.75 k: 1.5 }"
LRN_WITHIN = "type: 'LRN' lrn_param { local_size: 3 alpha: 2.0 beta: 0.6 norm_region: WITHIN_CHANNEL }"


@pytest.mark.parametrize(
    ("source", "shape"),
    [
        ("type: 'Convolution' convolution_param { num_output: 4 kernel_size: 3 pad: 1 stride: 2 group: 2 }", (2, 5, 4)),
        ("type: 'Convolution' convolution_param { num_output: 2 kernel_size: 2 bias_term: false }", (2, 4, 4)),
        ("type: 'InnerProduct' inner_product_param { num_output: 3 }", (2, 3, 2)),
        ("type: 'InnerProduct' inner_product_param { num_output: 3 transpose: true bias_term: false }", (4,)),
        ("type: 'ReLU'", (3, 2, 2)),
        ("type: 'ReLU' relu_param { negative_slope: 0.1 }", (3, 2, 2)),
        ("type: 'Sigmoid'", (3, 2, 2)),
        ("type: 'TanH'", (5,)),
        ("type: 'Flatten'", (3, 2, 2)),
        ("type: 'Softmax'", (5,)),
        ("type: 'Scale' scale_param { bias_term: true }", (3, 2, 2)),
        ("type: 'Bias'", (3, 2, 2)),
        (LRN_ACROSS, (5, 2, 2)),
        (LRN_WITHIN, (2, 4, 4)),
        ("type: 'BatchNorm'", (2, 3, 3)),
    ],
)
def test_gradient_equals_finite_differences(source: str, shape: tuple[int, ...]) -> None:
    check_gradient(build(source, shape), values(3, *shape))


def test_lrn_across_channels_equals_its_formula() -> None:
    x = values(2, 5, 2, 2)
    squares = np.pad(x.numpy() ** 2, ((0, 0), (1, 1), (0, 0), (0, 0)))
    sums = squares[:, :-2] + squares[:, 1:-1] + squares[:, 2:]
    expected = x.numpy() * (1.5 + 2.0 / 3 * sums) ** -0.75
    np.testing.assert_allclose(forward(build(LRN_ACROSS, (5, 2, 2)), x), expected, rtol=1e-12)


def test_lrn_within_a_channel_counts_the_border_and_takes_no_k() -> None:
    x = values(1, 2, 4, 4)
    squares = np.pad(x.numpy() ** 2, ((0, 0), (0, 0), (1, 1), (1, 1)))
    means = sum(squares[:, :, i : i + 4, j : j + 4] for i in range(3) for j in range(3)) / 9
    expected = x.numpy() * (1 + 2.0 * means) ** -0.6
    np.testing.assert_allclose(forward(build(LRN_WITHIN, (2, 4, 4)), x), expected, rtol=1e-6)  # beta is a float32


def test_batch_norm_keeps_weighted_sums_of_unbiased_variances() -> None:
    layer = build("type: 'BatchNorm' batch_norm_param { moving_average_fraction: 0.9 eps: 0.01 }", (2, 3, 3))
    for blob in layer.blobs:
        blob.zero_()
    batches = [values(4, 2, 3, 3), values(4, 2, 3, 3) * 2 + 1]
    mean, variance, weight = np.zeros(2), np.zeros(2), 0.0
    for x in batches:
        y, array = forward(layer, x), x.numpy()
        center, spread = array.mean((0, 2, 3)), array.var((0, 2, 3))
        expected = (array - center[:, None, None]) / np.sqrt(spread + 0.01)[:, None, None]
        np.testing.assert_allclose(y, expected, rtol=1e-9)
        mean, variance, weight = 0.9 * mean + center, 0.9 * variance + spread * 36 / 35, 0.9 * weight + 1
    np.testing.assert_allclose(torch.cat(layer.blobs), [*mean, *variance, weight], rtol=1e-6)  # so is the fraction
    tested = forward(layer, batches[0], training=False).numpy()
    by_average = (batches[0].numpy() - (mean / weight)[:, None, None]) / np.sqrt(variance / weight + 0.01)[
        :, None, None
    ]
    np.testing.assert_allclose(tested, by_average, rtol=1e-5)


def test_dropout_keeps_the_mean_and_repeats_its_mask_backward() -> None:
    layer = build("type: 'Dropout' dropout_param { dropout_ratio: 0.25 }", (10_000,))
    run = Pass(True, 1, torch.Generator().manual_seed(1))
    x = torch.ones(1, 10_000)
    (y,) = layer.forward([x], run)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float(y.mean()) == pytest.approx(1, abs=0.03)
    assert torch.equal(layer.backward([x], True, run)[0], y)
    assert torch.equal(layer.forward([x], Pass(False, 1))[0], x)


def loss_layer(extra: str = "") -> Any:
    return build(f"bottom: 'z' type: 'SoftmaxWithLoss' {extra}", (4,), ())


def test_loss_is_the_mean_over_the_global_batch() -> None:
    x, labels = values(3, 4), torch.tensor([0, 3, 2])
    logs = x.numpy() - np.log(np.exp(x.numpy()).sum(1, keepdims=True))
    layer, run = loss_layer(), Pass(True, 6)
    (loss,) = layer.forward([x, labels], run)
    assert float(loss) == pytest.approx(-logs[np.arange(3), labels.numpy()].sum() / 6)
    expected = np.exp(logs)
    expected[np.arange(3), labels.numpy()] -= 1
    np.testing.assert_allclose(layer.backward([None], True, run)[0], expected / 6, rtol=1e-12)


@pytest.mark.parametrize(
    ("parameters", "divisor"),
    [
        ("", 2),
        ("normalization: FULL", 3),
        ("normalization: BATCH_SIZE", 3),
        ("normalization: NONE", 1),
        ("normalize: false", 3),
    ],
)
def test_ignored_labels_count_as_the_normalization_says(parameters: str, divisor: int) -> None:
    x, labels = values(3, 4), torch.tensor([0, 1, 2])
    layer, run = loss_layer(f"loss_param {{ ignore_label: 1 {parameters} }}"), Pass(True, 3)
    (loss,) = layer.forward([x, labels], run)
    logs = torch.log_softmax(x, 1)
    assert float(loss) == pytest.approx(-float(logs[0, 0] + logs[2, 2]) / divisor)
    (dx,) = layer.backward([None], True, run)
    assert dx[1].tolist() == [0, 0, 0, 0]
    assert float(dx[0, 0]) == pytest.approx((float(logs[0, 0].exp()) - 1) / divisor)


def test_loss_of_an_impossible_label_is_bounded_as_caffes() -> None:
    (loss,) = loss_layer().forward([torch.tensor([[0.0, 200.0, 0, 0]]), torch.tensor([0])], Pass(True, 1))
    assert float(loss) == pytest.approx(87.3365, abs=1e-3)


@pytest.mark.parametrize(("top_k", "correct"), [(1, 1), (2, 1), (3, 2), (4, 3)])
def test_accuracy_counts_ties_as_wrong(top_k: int, correct: int) -> None:
    layer = build(f"bottom: 'z' type: 'Accuracy' accuracy_param {{ top_k: {top_k} }}", (4,), ())
    scores = torch.tensor([[9.0, 1, 2, 3], [5, 5, 5, 1], [4, 3, 2, 1]])
    layer.forward([scores, torch.tensor([0, 1, 3])], Pass(False, 3))
    assert int(layer.correct) == correct


@pytest.mark.parametrize(
    ("source", "shape", "message"),
    [
        ("type: 'Pooling' pooling_param { pool: STOCHASTIC kernel_size: 2 }", (1, 4, 4), "unsupported pool"),
        ("type: 'Pooling' pooling_param { kernel_size: 5 }", (1, 4, 4), "does not fit"),
        ("type: 'Pooling' pooling_param { kernel_size: 1 stride: 3 }", (1, 5, 5), "outside the input"),
        ("type: 'Convolution' convolution_param { num_output: 2 kernel_size: 5 }", (1, 4, 4), "does not fit"),
        (
            "type: 'Convolution' convolution_param { num_output: 2 kernel_size: 3 stride: 0 }",
            (1, 4, 4),
            "numbers from 1",
        ),
        (
            "type: 'Convolution' convolution_param { num_output: 2 kernel_size: 3 group: 0 }",
            (1, 4, 4),
            "numbers from 1",
        ),
        ("type: 'Convolution' convolution_param { num_output: 3 kernel_size: 1 group: 2 }", (2, 4, 4), "groups"),
        ("type: 'LRN' lrn_param { local_size: 4 }", (2, 4, 4), "odd local_size"),
        ("type: 'InnerProduct' inner_product_param { num_output: 2 axis: 2 }", (2, 4, 4), "unsupported axis"),
        ("type: 'Dropout' dropout_param { dropout_ratio: 1.0 }", (2,), "dropout_ratio"),
    ],
)
def test_what_cannot_be_computed_is_refused(source: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        build(source, shape)
    assert "'l'" in str(caught.value) and "here" in str(caught.value)
