"""Floating-point operations of training, counted layer by layer: a multiplication and an addition are two.

Counted are the matrix products of the forward pass and of both backward products (by the weights and by the input),
the latter not for the first layer, whose input needs no gradient. Element-wise work, pools and normalisation, a few
per cent, are left out, as is usual.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """A convolution or dense layer as the matrix product it is, for one image."""

    positions: int
    """Output pixels (1 for a dense layer)."""
    inputs: int
    """Numbers that each output depends on: kernel height x width x channels."""
    outputs: int
    """Output channels."""
    frozen: bool = False
    """Its weights are not trained and its input needs no gradient: there is no backward product."""

    @property
    def forward_flops(self) -> int:
        """Return the operations of one forward pass."""
        return 2 * self.positions * self.inputs * self.outputs


def training_flops(products: tuple[Product, ...]) -> int:
    """Return the operations of training on one image: 3 x forward, 2 x for the first layer (1 x where frozen)."""
    first = products[0]
    return 3 * sum(product.forward_flops for product in products) - (2 if first.frozen else 1) * first.forward_flops


def conv(side: int, kernel: int, channels: int, outputs: int) -> Product:
    """Return a convolution with ``side`` x ``side`` output pixels."""
    return Product(side * side, kernel * kernel * channels, outputs)


def dense(inputs: int, outputs: int) -> Product:
    """Return a dense layer."""
    return Product(1, inputs, outputs)


def _resnet20() -> tuple[Product, ...]:
    layers = [conv(32, 3, 3, 16)]
    channels = 16
    for width, side in ((16, 32), (32, 16), (64, 8)):
        for _ in range(3):
            layers += [conv(side, 3, channels, width), conv(side, 3, width, width)]
            channels = width
    return (*layers, dense(64, 10))


def _speedrun() -> tuple[Product, ...]:
    layers = [Product(31 * 31, 2 * 2 * 3, 24, frozen=True)]
    for before, after, side in ((24, 64, 31), (64, 256, 15), (256, 256, 7)):
        layers += [conv(side, 3, before, after), conv(side // 2, 3, after, after)]
    return (*layers, dense(256, 10))


PRODUCTS: dict[str, tuple[Product, ...]] = {
    "cifar10_quick": (
        *(conv(32, 5, 3, 32), conv(16, 5, 32, 32), conv(8, 5, 32, 64)),
        *(dense(1024, 64), dense(64, 10)),
    ),
    "cifar10_full": (conv(32, 5, 3, 32), conv(16, 5, 32, 32), conv(8, 5, 32, 64), dense(1024, 10)),
    "cifar10_tutorial": (
        *(conv(24, 5, 3, 64), conv(12, 5, 64, 64)),
        *(dense(2304, 384), dense(384, 192), dense(192, 10)),
    ),
    "resnet20": _resnet20(),
    "speedrun": _speedrun(),
}
"""By model."""


def achieved_gflops(model: str, images_per_second: float) -> float | None:
    """Return the GFLOP/s of a training at ``images_per_second``; None for a model whose work is not counted."""
    products = PRODUCTS.get(model)
    return None if products is None else training_flops(products) * images_per_second / 1e9
