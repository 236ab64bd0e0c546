"""The order that travels from the driver to every executor: what to train, on which data, and whom to tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparkgauge.channel import Address


@dataclass(frozen=True)
class Recovery:
    """How a round outlives the loss of an executor."""

    retries: int
    """Times that the stage may be run again."""
    every_steps: int | None
    """Steps between two checkpoints; None writes none, and a stage that is run again starts at the first step."""
    folder: str
    """Where this round's checkpoints go: a folder that all executors see, or a URI of Hadoop's; empty without any."""


@dataclass(frozen=True)
class Job:
    """One round's training + test, the same for all executors."""

    address: Address
    executors: int
    model: str
    """Name in :data:`sparkgauge.models.cifar10.RECIPES`, or anything when ``fn`` is given."""
    device: str
    """``cpu`` or ``gpu``."""
    iterations: int | None
    """Training steps; None when ``epochs`` says it."""
    epochs: float | None
    global_batch: int
    test_every: int | None
    """Steps between tests on the whole test set; None tests once, at the end."""
    seed: int
    dataset_folder: str
    """The prepared data set on the executors' disks; empty where Spark brings its files (``SparkContext.addFile``)."""
    train_count: int
    """Training images of the data set."""
    threads: int
    """CPU threads each training process may use."""
    loopback: bool
    """All executors are on this machine: bind and connect on 127.0.0.1 only."""
    fn: Callable[..., Any] | None = None
    """The user's own ``fit(context, shard)``; None trains a built-in model."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Passed through to ``fn`` as ``context.options``."""
    plan: Any = None
    """What the framework's adapter needs beside the model's name, e.g. a :class:`sparkgauge.caffe.plan.Plan`."""
    save_to: str = ""
    """Path on the driver that the names of the files begin with that executor 0 hands over; empty for none."""
    injections: Mapping[str, float] = field(default_factory=dict)
    """Deliberate slowdown per phase, as a fraction of the phase's own time: shows that the gate works."""
    recovery: Recovery | None = None
    """None where a lost executor ends the round."""
    shares_gpus: bool = False
    """Several of the executors may train on the same GPU."""
    test_count: int | None = None
    """Test images of the data set, all of which the last test must have counted; None where nobody checks that."""


@dataclass(frozen=True)
class Launched:
    """A launched round, as an adapter's launcher hands it to the driver."""

    failure: Callable[[], str | None]
    """Returns what Spark said of the job's failure, None so far."""
    close: Callable[[], None]
    """Frees what the launcher holds on the driver; called once the round is over."""
