"""The reference kernel: a fixed piece of work whose wall time says how fast this machine is now, with its neighbours.

A whole one is timed before a round, a small piece of it between the training steps (:class:`BetweenSteps`). The pieces
meet what the training meets: on two busy cores the time of 60 steps varied by 70 %, divided by the pieces between them
by 6 %, by a kernel before them by 30 to 40 % (docs/gate.md).
"""

from __future__ import annotations

import time
from typing import Any

SIDE, STACK = 48, 64
"""Matrices of 48 x 48, 64 of them: small enough that no BLAS spreads their products over threads."""

PRODUCTS, MEMORY_BYTES, MEMORY_PASSES = 480, 16 * 2**20, 200
"""Of a whole kernel: products of the stack, and passes that read and write memory beyond the caches of one core."""

PIECE_PRODUCTS = 8
"""Of a piece between two steps: 4 to 6 ms."""

PIECES = 120
"""In a round, about: half a second, however long the steps are. Few steps are followed by several pieces each."""


def reference_seconds() -> float:
    """Return the wall seconds of a whole kernel, about 0.15 s on one core: products in the cache, memory passes."""
    import numpy as np

    stack, product = _stack()
    memory = np.zeros(MEMORY_BYTES // 4, dtype=np.float32)
    began = time.perf_counter()
    for _ in range(PRODUCTS):
        np.matmul(stack, product, out=product)
    for _ in range(MEMORY_PASSES):
        np.add(memory, 1.0, out=memory)
    return time.perf_counter() - began


class BetweenSteps:
    """Times pieces of the kernel between steps: after the same steps on every executor and in every run."""

    def __init__(self, total_steps: int) -> None:
        self.seconds: list[float] = []
        """Wall seconds of the pieces so far."""
        self._every = max(1, total_steps // PIECES)
        self._at_once = max(1, PIECES // max(1, total_steps))
        self._stack, self._product = _stack()

    def is_due(self, index: int) -> bool:
        """Return whether pieces follow the step with this index."""
        return index % self._every == 0

    def time(self) -> None:
        """Do the pieces that follow a step."""
        import numpy as np

        for _ in range(self._at_once):
            began = time.perf_counter()
            for _ in range(PIECE_PRODUCTS):
                np.matmul(self._stack, self._product, out=self._product)
            self.seconds.append(time.perf_counter() - began)


def _stack() -> tuple[Any, Any]:
    """Return the matrices and their product, which products with the matrices leave as it is."""
    import numpy as np

    stack = np.full((STACK, SIDE, SIDE), 1.0 / SIDE, dtype=np.float32)
    return stack, stack @ stack
