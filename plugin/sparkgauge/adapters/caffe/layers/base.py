"""What a layer is: shapes and weights when the net is built, then ``forward`` and ``backward`` on tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparkgauge.errors import ConfigurationError

Shape = tuple[int, ...]
"""Shape of a blob without its first axis, the batch: (c, h, w) or (n,)."""


@dataclass(frozen=True)
class Constant:
    """A FillerParameter of one value, where Caffe's default differs from the message's."""

    value: float
    type: str = "constant"


@dataclass(frozen=True)
class Weight:
    """One array that a layer learns or keeps."""

    shape: Shape
    """Caffe's shape."""
    filler: Any
    """FillerParameter that draws its first values."""
    learned: bool = True
    """False for what only the forward pass changes: BatchNorm's statistics."""


@dataclass
class Pass:
    """What the layers must know of the pass under way."""

    training: bool
    """True for the TRAIN phase."""
    loss_images: float
    """Images the loss is averaged over: the global batch, of which this executor may hold a part."""
    generator: Any = None
    """torch.Generator of the dropout masks; None takes the device's own."""
    whole_batch: bool = True
    """True when this pass holds the whole global batch."""


class Layer:
    """Base of all layers; a subclass says what it ``takes`` and writes ``forward``, whose gradient autograd derives.

    Where a hand-written gradient is faster, the subclass overrides ``backward`` too. One object serves one net: it
    may keep what its backward pass needs in ``self.saved``.
    """

    inputs: ClassVar[int] = 1
    """Bottoms it takes."""
    outputs: ClassVar[tuple[int, ...]] = (1,)
    """Numbers of tops it may give."""
    keeps_output: ClassVar[bool] = False
    """True if its output must survive a following in-place layer: backward reads it, or it is another blob."""
    makes_blocks: ClassVar[bool] = False
    """True if it gives blocks whatever it takes; other layers only pass them on."""
    keeps_blocks: ClassVar[bool] = False
    """``keeps_output`` where it is blocked."""

    blocked = False
    """Set by the net where images and gradients come and go in oneDNN's blocked order (CPU only); else they are
    ordinary tensors. See :mod:`sparkgauge.adapters.layout`."""

    def __init__(self, message: Any, bottoms: list[Shape], where: str) -> None:
        self.message, self.name, self.where, self.bottoms = message, message.name, where, bottoms
        self.weights: list[Weight] = []
        self.blobs: list[Tensor] = []
        """The weights' values, in the order of ``weights``: views of the net's flat buffer."""
        self.gradients: list[Tensor] = []
        """Views of the flat gradient buffer, which is zero before a step; backward adds to them."""
        self.wants: list[bool] = []
        """Whether each weight's gradient is needed (``lr_mult`` is not 0)."""
        self.saved: Any = None
        self.tops = self.setup()

    def setup(self) -> list[Shape]:
        """Check the parameters, name the weights and return the shapes of the tops."""
        return [self.bottoms[0]] * len(self.message.top)

    def takes_blocks(self, readers: list[Layer]) -> bool:
        """Return whether images and gradients may be blocked here, given the layers that read its first top."""
        return False

    def forward(self, bottoms: list[Tensor], run: Pass) -> list[Tensor]:
        """Return the tops; what ``backward`` will need is kept when ``run.training``."""
        if not run.training:
            return self.compute(bottoms, run)
        with torch.enable_grad():
            leaves = [bottom.detach().requires_grad_() for bottom in bottoms]
            weights = [
                blob.detach().requires_grad_(wanted) for blob, wanted in zip(self.blobs, self.wants, strict=True)
            ]
            tops = self.compute(leaves, run, *weights)
        self.saved = leaves, [weight for weight in weights if weight.requires_grad], tops
        return [top.detach() for top in tops]

    def compute(self, bottoms: list[Tensor], run: Pass, *weights: Tensor) -> list[Tensor]:
        """Return the tops by operations that autograd can follow; ``weights`` default to ``self.blobs``."""
        raise NotImplementedError

    def backward(self, gradients: list[Tensor], needed: bool, run: Pass) -> list[Tensor]:
        """Return the bottoms' gradients (none unless ``needed``); add those of the weights to ``self.gradients``."""
        leaves, weights, tops = self.saved
        wanted = [*(leaves if needed else []), *weights]
        found = torch.autograd.grad(tops, wanted, gradients)
        learned = [g for g, wants in zip(self.gradients, self.wants, strict=True) if wants]
        for target, gradient in zip(learned, found[len(wanted) - len(weights) :], strict=True):
            target.add_(gradient)
        self.saved = None
        return list(found[: len(leaves)]) if needed else []

    def error(self, what: str, *, expected: str | None = None, actual: str | None = None) -> ConfigurationError:
        """Return the error for a parameter or shape that this layer cannot take."""
        summary = f"layer {self.name!r} ({self.message.type}): {what}"
        return ConfigurationError(summary, expected=expected, actual=actual, where=self.where)

    def require(self, parameter: Any, **values: Any) -> None:
        """Raise unless each named field of ``parameter`` has the one value that is supported."""
        for field, wanted in values.items():
            if (actual := getattr(parameter, field, wanted)) != wanted:
                raise self.error(f"unsupported {field}", expected=str(wanted), actual=str(actual))


def channels_last(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in the layout that convolutions and pools run fastest in; vectors and blocks are left alone."""
    is_plain = tensor.dim() == 4 and tensor.layout is torch.strided
    return tensor.contiguous(memory_format=torch.channels_last) if is_plain else tensor


def per_channel(weight: Tensor, like: Tensor) -> Tensor:
    """Return a vector of c values shaped to multiply or add to ``like`` (b, c, ...)."""
    return weight.view(1, -1, *[1] * (like.dim() - 2))
