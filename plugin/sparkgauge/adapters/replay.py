"""A training step on a GPU as a captured CUDA graph: one launch instead of a few hundred."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensor = Any
StepFunction = Callable[..., Tensor]
"""``(*arguments) -> loss``: changes weights and optimiser state in place; everything that varies is an argument."""

WARM_UP_PASSES = 3
"""Eager steps before a capture: libraries choose their kernels and allocate in them."""


class Replayed:
    """``step`` as a graph for each shape of its arguments, captured when a shape is first seen.

    A step may hold NCCL's collectives: then every executor must see new shapes at the same calls, and :meth:`close`
    must come before the process group's end, which waits for the graphs that use it.
    """

    def __init__(self, step: StepFunction, state: Callable[[], list[Tensor]], generator: Any = None) -> None:
        """``state`` returns the tensors that ``step`` changes; captures leave them as they were.

        ``generator`` is the ``torch.Generator`` that ``step`` draws from, so that each replay draws anew.
        """
        self._step, self._state, self._generator = step, state, generator
        self._graphs: dict[Any, _Graph] = {}
        self.calls = 0

    def __call__(self, *arguments: Tensor, key: Any = None) -> Tensor:
        """Return the loss of the step, which the GPU may still be computing; ``key`` tells equal shapes apart."""
        shape = key, tuple(tuple(argument.shape) for argument in arguments)
        if shape not in self._graphs:
            self._graphs[shape] = _Graph(self._step, arguments, self._state(), self._generator)
        self.calls += 1
        return self._graphs[shape].replay(arguments)

    @property
    def graphs(self) -> int:
        """Return how many graphs there are."""
        return len(self._graphs)

    @property
    def passes(self) -> int:
        """Return how often Python has gone through ``step``: before and in each capture."""
        return self.graphs * (WARM_UP_PASSES + 1)

    def close(self) -> None:
        """Free the graphs."""
        self._graphs.clear()


class _Graph:
    def __init__(self, step: StepFunction, arguments: tuple[Tensor, ...], state: list[Tensor], generator: Any) -> None:
        self._arguments = [argument.clone() for argument in arguments]
        before = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_PASSES):
                step(*self._arguments)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        if generator is not None:
            self._graph.register_generator_state(generator)
        # thread_local: NCCL's own thread may talk to the device meanwhile
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._loss = step(*self._arguments)
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)

    def replay(self, arguments: tuple[Tensor, ...]) -> Tensor:
        for own, given in zip(self._arguments, arguments, strict=True):
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._loss.clone()
