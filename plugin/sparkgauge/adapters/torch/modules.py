"""Wraps a factory of plain ``torch.nn.Module`` objects into a training function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModuleFit:
    """``fit(context, shard)`` around a factory; imports no torch until it is called on an executor."""

    make: Callable[[], Any]
    learning_rate: float
    momentum: float

    @property
    def __wrapped__(self) -> Callable[[], Any]:
        """Return the factory, whose module has to travel to the executors."""
        return self.make

    def __call__(self, context: Any, shard: Any) -> dict[str, float]:
        """Train on this executor."""
        from sparkgauge.adapters.torch.training import train_module

        rates = {"learning_rate": self.learning_rate, "momentum": self.momentum}
        return train_module(self.make, {**rates, **context.options}, context, shard)


def torch_module(make: Callable[[], Any], *, learning_rate: float = 0.02, momentum: float = 0.9) -> ModuleFit:
    """Return a training function for ``train(framework="torch", fn=...)`` around ``make``, which returns a Module.

    The module takes float32 images (b, 3, 32, 32) from -1 to 1 and returns logits; it is trained by SGD with momentum
    on cross-entropy over the global batch. ``options`` of the test may override both numbers.
    """
    return ModuleFit(make, learning_rate, momentum)
