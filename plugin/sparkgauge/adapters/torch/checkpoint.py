"""What a PyTorch training keeps in a checkpoint beside its tensors, and how it gets it back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sparkgauge.checkpoints import check_shapes
from sparkgauge.context import Context

Tensor = Any


def random_states(handle: Any) -> list[dict[str, Tensor]]:
    """Return the state of every executor's random generators, by rank; all executors must call it together.

    Executors draw for images of their own, so their generators part, and only executor 0 writes checkpoints.
    """
    own = {"cpu": torch.get_rng_state()}
    if handle.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(handle.device)
    if handle.group is None:
        return [own]
    gathered = {name: _gather(state, handle) for name, state in own.items()}
    return [{name: states[rank] for name, states in gathered.items()} for rank in range(handle.group.size())]


def restore_random_state(context: Context, states: list[dict[str, Tensor]]) -> None:
    """Set this executor's random generators to where they were."""
    own = states[context.rank]
    torch.set_rng_state(own["cpu"])
    if "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"], context.handle.device)


def restore_tensors(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy the tensors of ``state`` into ``own`` in place; DataError where they are of another model."""
    check_shapes(own, state, "the checkpoint's tensors")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def module_state(context: Context, network: Any, optimiser: Any) -> dict[str, Any]:
    """Return what a module, its optimiser and the random generators need to go on; all executors must call it."""
    return {
        "module": dict(network.state_dict()),
        "optimiser": optimiser.state_dict(),
        "random": random_states(context.handle),
    }


def restore_module(context: Context, network: Any, optimiser: Any) -> None:
    """Go on from the last checkpoint, where there is one; DataError where it is of another model."""
    state = context.restore()
    if state is None:
        return
    restore_tensors(network.state_dict(), state["module"])  # these share memory with the module
    optimiser.load_state_dict(state["optimiser"])
    restore_random_state(context, state["random"])


def _gather(state: Tensor, handle: Any) -> list[Tensor]:
    import torch.distributed as dist

    # NCCL moves what is on the GPU only
    mine = state.to(handle.device)
    parts = [torch.empty_like(mine) for _ in range(handle.group.size())]
    dist.all_gather(parts, mine, group=handle.group)
    return [part.cpu() for part in parts]
