"""Caffe's solvers on flat buffers: each update is a few vector operations over all weights at once."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sparkgauge.adapters.caffe.net import Parameters
from sparkgauge.errors import ConfigurationError


class Solver:
    """Base of the solvers; ``values``, ``gradients`` and ``history`` are flat and in the same order.

    ``rate`` is a scalar tensor on the weights' device, so that a captured CUDA graph reads each step's value.
    """

    histories: ClassVar[int] = 1
    """Buffers of the size of the weights that it remembers; a state file holds them one after the other."""
    takes_momentum: ClassVar[bool] = True

    def __init__(self, message: Any, parameters: Parameters) -> None:
        self.parameters = parameters
        self.momentum, self.delta = float(message.momentum), float(message.delta)
        if self.momentum and not self.takes_momentum:
            raise ConfigurationError(
                f"solver {message.type} takes no momentum", expected="0", actual=str(self.momentum)
            )
        self.clip = float(message.clip_gradients)
        self.iter_size = int(message.iter_size)
        self.regularization = _regularization(message)
        self.decay = parameters.decay_factors * float(message.weight_decay)
        self.has_decay = bool(self.decay.any())
        self.history = [torch.zeros_like(parameters.values) for _ in range(self.histories)]
        self._rates = torch.empty_like(parameters.values)
        self._configure(message)

    def _configure(self, message: Any) -> None:
        """Read what only this solver has."""

    def scale(self, iteration: int) -> float:
        """Return what multiplies the learning rate of the 0-based ``iteration``."""
        return 1.0

    def update(self, rate: Tensor) -> None:
        """Clip, add the decay, and change the weights; the gradients are overwritten."""
        gradients, values = self.parameters.gradients, self.parameters.values
        if self.clip > 0:
            # Caffe clips the sum over iter_size passes, before it divides by their number.
            gradients.mul_((self.clip / (gradients.norm() * self.iter_size)).clamp_(max=1.0))
        if self.has_decay:
            gradients.addcmul_(values if self.regularization == "L2" else values.sign(), self.decay)
        torch.mul(self.parameters.rate_factors, rate, out=self._rates)
        values.sub_(self.change(gradients, self._rates))

    def change(self, g: Tensor, rates: Tensor) -> Tensor:
        """Return what is subtracted from the weights, given the gradient and each weight's own rate."""
        raise NotImplementedError


class SGD(Solver):
    """h = rate g + momentum h; change h."""

    def change(self, g: Tensor, rates: Tensor) -> Tensor:
        """Return the new history."""
        return self.history[0].mul_(self.momentum).addcmul_(g, rates)


class Nesterov(Solver):
    """h' = rate g + momentum h; change (1 + momentum) h' - momentum h."""

    def change(self, g: Tensor, rates: Tensor) -> Tensor:
        """Return the step from the look-ahead point."""
        before = self.history[0].clone()
        after = self.history[0].mul_(self.momentum).addcmul_(g, rates)
        return (after * (1 + self.momentum)).sub_(before, alpha=self.momentum)


class AdaGrad(Solver):
    """h = h + g^2; change rate g / (sqrt(h) + delta)."""

    takes_momentum = False

    def change(self, g: Tensor, rates: Tensor) -> Tensor:
        """Return the gradient over the root of its summed squares."""
        root = self.history[0].addcmul_(g, g).sqrt()
        return g.div_(root.add_(self.delta)).mul_(rates)


class RMSProp(Solver):
    """h = decay h + (1 - decay) g^2; change rate g / (sqrt(h) + delta)."""

    takes_momentum = False

    def _configure(self, message: Any) -> None:
        self.rms_decay = float(message.rms_decay)

    def change(self, g: Tensor, rates: Tensor) -> Tensor:
        """Return the gradient over the root of its mean square."""
        root = self.history[0].mul_(self.rms_decay).addcmul_(g, g, value=1 - self.rms_decay).sqrt()
        return g.div_(root.add_(self.delta)).mul_(rates)


class AdaDelta(Solver):
    """h = m h + (1 - m) g^2; u = g sqrt((k + delta) / (h + delta)); k = m k + (1 - m) u^2; change rate u."""

    histories = 2

    def change(self, g: Tensor, rates: Tensor) -> Tensor:
        """Return the gradient in units of the past updates."""
        squares, updates = self.history
        squares.mul_(self.momentum).addcmul_(g, g, value=1 - self.momentum)
        g.mul_(((updates + self.delta).div_(squares + self.delta)).sqrt_())
        updates.mul_(self.momentum).addcmul_(g, g, value=1 - self.momentum)
        return g.mul_(rates)


class Adam(Solver):
    """m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; change rate sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + delta)."""

    histories = 2

    def _configure(self, message: Any) -> None:
        self.momentum2 = float(message.momentum2)

    def scale(self, iteration: int) -> float:
        """Return the correction of the averages' start at zero."""
        steps = iteration + 1
        return float((1 - self.momentum2**steps) ** 0.5 / (1 - self.momentum**steps))

    def change(self, g: Tensor, rates: Tensor) -> Tensor:
        """Return the mean gradient over the root of its mean square."""
        mean, square = self.history
        mean.mul_(self.momentum).add_(g, alpha=1 - self.momentum)
        square.mul_(self.momentum2).addcmul_(g, g, value=1 - self.momentum2)
        return (mean / square.sqrt().add_(self.delta)).mul_(rates)


SOLVERS: dict[str, type[Solver]] = {kind.__name__: kind for kind in (SGD, Nesterov, AdaGrad, RMSProp, AdaDelta, Adam)}


def build_solver(message: Any, parameters: Parameters) -> Solver:
    """Return the solver that ``message.type`` names; ConfigurationError for another."""
    kind = SOLVERS.get(message.type)
    if kind is None:
        raise ConfigurationError("unknown solver type", expected=" or ".join(SOLVERS), actual=repr(message.type))
    return kind(message, parameters)


def _regularization(message: Any) -> str:
    kind = message.regularization_type
    if kind not in ("L1", "L2"):
        raise ConfigurationError("unknown regularization_type", expected="L1 or L2", actual=repr(kind))
    return str(kind)
