"""The Triton kernels against PyTorch's own operations: on a GPU, or by Triton's interpreter where it is installed."""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn import functional

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported
pytest.importorskip("triton", reason="needs Triton, which PyTorch's builds for NVIDIA GPUs bring along")

from sparkgauge.adapters import fused
from sparkgauge.adapters.collective import Exchange, Team
from sparkgauge.adapters.torch.networks import norm_over_channels
from sparkgauge.adapters.torch.norms import BatchNorm, _FusedNorm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WINDOWS = [
    ((3, 8, 9, 8), 3, 2, True),
    ((2, 4, 7, 7), 2, 2, False),
    ((2, 4, 6, 5), 3, 2, True),
    ((1, 4, 5, 5), 1, 3, True),
]
"""Shape of the images, kernel, stride, whether sides are rounded up."""


def images(shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
    """Return numbers with many ties, channels last in memory."""
    drawn = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale).round(decimals=1)
    return drawn.contiguous(memory_format=torch.channels_last).to(DEVICE)


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize(("shape", "kernel", "stride", "round_up"), WINDOWS)
def test_max_pool(shape, kernel, stride, round_up, rectify):
    x = images(shape).requires_grad_()
    y = functional.max_pool2d(functional.relu(x) if rectify else x, kernel, stride, ceil_mode=round_up)
    dy = images(y.shape)
    y.backward(dy)
    found, places = fused.max_pool_forward(x.detach(), kernel, stride, rectify=rectify, round_up=round_up)
    torch.testing.assert_close(found, y.detach(), rtol=0, atol=0)
    torch.testing.assert_close(fused.max_pool_backward(dy, places, shape, kernel, stride), x.grad)


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize(("shape", "kernel", "stride", "round_up"), [one for one in WINDOWS if one[3]])
def test_average_pool(shape, kernel, stride, round_up, rectify):
    x = images(shape).requires_grad_()
    rectified = functional.relu(x) if rectify else x
    y = functional.avg_pool2d(rectified, kernel, stride, ceil_mode=round_up, count_include_pad=False)
    dy = images(y.shape)
    y.backward(dy)
    own = x.detach().clone().requires_grad_()
    found = fused._AveragePool.apply(own, kernel, stride, rectify)
    found.backward(dy)
    torch.testing.assert_close(found.detach(), y.detach())
    torch.testing.assert_close(own.grad, x.grad)


@pytest.mark.parametrize("rectify", [False, True])
def test_norm_over_channels(rectify):
    x = images((2, 16, 3, 3), 30.0).cpu().requires_grad_()
    y = norm_over_channels(x, 4, 1.0, 0.001, rectify=rectify)
    dy = images(y.shape)
    y.backward(dy.cpu())
    own = x.detach().to(DEVICE).requires_grad_()
    found = fused.norm_over_channels(own, 4, 1.0, 0.001, rectify=rectify)
    found.backward(dy)
    torch.testing.assert_close(found.detach().cpu(), y.detach())
    torch.testing.assert_close(own.grad.cpu(), x.grad)


@pytest.mark.parametrize(("channels", "kernel", "padding", "filters"), [(3, 5, 2, 32), (3, 2, 0, 24), (1, 3, 1, 16)])
def test_convolution_of_few_channels(channels, kernel, padding, filters):
    x = images((3, channels, 9, 8))
    weight = images((filters, channels, kernel, kernel)).requires_grad_()
    bias = images((1, filters, 1, 1)).flatten().detach().requires_grad_()
    y = functional.conv2d(x.double(), weight.double(), bias.double(), padding=padding)
    dy = images(y.shape)
    y.backward(dy.double())
    own = [one.detach().clone().requires_grad_() for one in (weight, bias)]
    found = fused._FirstConvolution.apply(x, *own, padding)
    found.backward(dy)
    torch.testing.assert_close(found.detach().double(), y.detach(), rtol=2e-3, atol=2e-2)  # products in TF32
    for one, other in zip(own, (weight, bias), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=2e-3, atol=5e-2)


def test_a_nan_is_not_lost():
    x = images((1, 4, 4, 4))
    x[0, 1, 1, 1] = float("nan")
    assert fused.max_pool_forward(x, 3, 2, rectify=True)[0].isnan().sum() == 1
    assert fused._AveragePool.apply(x, 3, 2, True).isnan().sum() == 1


class Twice(Exchange):
    """Stands for two executors that have the same images."""

    alone = False

    def sum_(self, values):
        return values.mul_(2)


@pytest.mark.parametrize("executors", [1, 2])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("shape", [(3, 16, 5, 5), (40, 64, 8, 8), (2, 8, 1, 1)])
def test_batch_norm_with_what_follows_it(shape, rectify, beside, executors):
    drawn = torch.Generator().manual_seed(2)
    x, added, dy = (torch.randn(shape, generator=drawn, dtype=torch.float64) * 3 + 1 for _ in range(3))
    channels = shape[1]
    wanted = torch.nn.BatchNorm2d(channels, dtype=torch.float64)
    norm = BatchNorm(channels, Twice(Team("both")) if executors == 2 else Exchange(Team())).to(DEVICE).train()
    norm.exchange.shares = (shape[0],) * executors
    for values, theirs in ((norm.weight, wanted.weight), (norm.bias, wanted.bias)):
        theirs.data.copy_(torch.randn(channels, generator=drawn, dtype=torch.float64))
        values.data.copy_(theirs)
    leaves = [one.clone().requires_grad_() for one in (x, added)]
    y = wanted(torch.cat([leaves[0]] * executors))[: shape[0]]
    y = y + leaves[1] if beside else y
    (functional.relu(y) if rectify else y).backward(dy)
    own = [one.float().contiguous(memory_format=torch.channels_last).to(DEVICE).requires_grad_() for one in (x, added)]
    assert fused.fits_norm(own[0]) or DEVICE == "cpu"
    found = _FusedNorm.apply(own[0], norm.weight, norm.bias, own[1] if beside else None, norm, rectify)
    found.backward(dy.float().contiguous(memory_format=torch.channels_last).to(DEVICE))
    near = {"rtol": 1e-4, "atol": 1e-4 * float(leaves[0].grad.abs().max() + 1)}
    torch.testing.assert_close(found.detach().cpu().double(), (functional.relu(y) if rectify else y).detach(), **near)
    pairs = [(norm.running_mean, wanted.running_mean), (norm.running_var, wanted.running_var)]
    pairs += [(own[1].grad, leaves[1].grad)] if beside else []
    if executors == 1:  # of two, the reference has the gradients of one half alone
        pairs += [
            (own[0].grad, leaves[0].grad),
            (norm.weight.grad, wanted.weight.grad),
            (norm.bias.grad, wanted.bias.grad),
        ]
    for one, other in pairs:
        torch.testing.assert_close(one.cpu().double(), other, **near)


def test_gradients_of_batch_norm_over_two_executors():
    x, dy = images((4, 16, 3, 3), 3.0), images((4, 16, 3, 3), 2.0)
    whole = x.detach().cpu().double().repeat(2, 1, 1, 1).requires_grad_()
    functional.relu(functional.batch_norm(whole, None, None, training=True)).backward(
        dy.cpu().double().repeat(2, 1, 1, 1)
    )
    norm = BatchNorm(16, Twice(Team("both"))).to(DEVICE).train()
    norm.exchange.shares = (4, 4)
    own = x.detach().clone().requires_grad_()
    _FusedNorm.apply(own, norm.weight, norm.bias, None, norm, True).backward(dy)
    torch.testing.assert_close(own.grad.cpu().double(), whole.grad[:4], rtol=1e-3, atol=1e-4)


def test_a_nan_is_not_rectified_away():
    x = images((2, 16, 3, 3))
    x[0, 3, 1, 1] = float("nan")
    norm = BatchNorm(16, Exchange(Team())).to(DEVICE).train()
    assert _FusedNorm.apply(x, norm.weight, norm.bias, None, norm, True)[:, 3].isnan().all()


@pytest.mark.parametrize(("channels", "fit"), [(4, False), (8, True), (48, False), (1024, True), (2048, False)])
def test_channels_that_the_kernels_of_a_norm_take(channels, fit, monkeypatch):
    monkeypatch.setattr(fused, "fits", lambda x: True)
    assert fused.fits_norm(torch.empty(1, channels, 1, 1)) == fit
