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
from sparkgauge.adapters.torch.networks import BatchNorm, norm_over_channels

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


@pytest.mark.skipif(DEVICE == "cpu", reason="these kernels of PyTorch's are CUDA's alone")
def test_batch_norm_of_several_gpus_is_that_of_several_cpus():
    class Alone(Exchange):
        """Stands for one member of a group that has no others."""

        shares = (6,)

        def sum_(self, values):
            return values

        def gather(self, values):
            return values[None]

    x, dy = images((6, 8, 5, 5), 3.0), images((6, 8, 5, 5))
    results = {}
    for device in ("cpu", "cuda"):
        norm = BatchNorm(8, Alone(Team(object()))).to(device).train()
        own = x.detach().to(device).requires_grad_()
        y = norm(own)
        y.backward(dy.to(device))
        results[device] = [
            one.detach().cpu() for one in (y, own.grad, norm.weight.grad, norm.bias.grad, norm.running_var)
        ]
    for one, other in zip(*results.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
