"""What the executors' shares of a round say together: who holds the others up, and what their talk costs."""

from __future__ import annotations

from sparkgauge.records import ExecutorRecord, Round


def own_seconds(share: ExecutorRecord) -> float:
    """Return an executor's seconds of feeding and computing: its steps without the waiting for others."""
    return share.phases.feed + share.phases.compute


def straggler_ratio(one: Round) -> float:
    """Return the busiest executor's own seconds over the mean of all: 1 where all work equally long."""
    own = [own_seconds(share) for share in one.executors]
    mean = sum(own) / len(own) if own else 0.0
    return max(own) / mean if mean > 0 else 1.0


def exposed(one: Round) -> float:
    """Return the share of the steps' time, over all executors, in which communication was not hidden by work."""
    waited = sum(share.phases.sync for share in one.executors)
    steps = waited + sum(own_seconds(share) for share in one.executors)
    return waited / steps if steps > 0 else 0.0
