"""Process groups of torch.distributed over executors, and one flat buffer of gradients summed through them.

Torch is imported inside the functions: the driver of another framework's adapter may import this module without it.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparkgauge.adapters.shared_sums import SPIN_SECONDS, SharedSums, let_others_run
from sparkgauge.device import set_up_collectives
from sparkgauge.errors import MachineError
from sparkgauge.job import Job

LOOPBACK = "127.0.0.1"

MEETING_SECONDS = 120.0
"""Longest wait for the other executors at the start; a barrier stage starts them within a second of each other."""

BUCKET_BYTES = 8 * 1024 * 1024
"""Gradients up to this size go in one all-reduce, larger ones in several that overlap with the backward pass."""

_PEER_WORDS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "socket timeout")


@dataclass(frozen=True)
class StoreAddress:
    """Where the executors meet; travels with the job."""

    host: str
    port: int


@dataclass
class Store:
    """The driver's end of the rendezvous; unauthenticated, hence loopback wherever all executors are local."""

    address: StoreAddress
    _server: Any = field(repr=False, default=None)

    def close(self) -> None:
        """Stop serving; harmless when repeated."""
        self._server = None  # the TCPStore's destructor ends its thread and closes the port


def open_store(job: Job) -> Store | None:
    """Return a TCPStore served by this process on a port the system picks; None for a single executor."""
    if job.executors == 1:
        return None
    from torch.distributed import TCPStore

    listener = _listener(LOOPBACK if job.loopback else "0.0.0.0")
    port = int(listener.getsockname()[1])
    # without a listening socket of ours the store would bind every interface; it owns the descriptor from here on
    server = TCPStore(
        LOOPBACK, port, is_master=True, wait_for_workers=False, timeout=_meeting(), master_listen_fd=listener.detach()
    )
    return Store(StoreAddress(LOOPBACK if job.loopback else job.address.host, port), server)


def _listener(host: str, port: int = 0) -> socket.socket:
    """Return a listening socket; MachineError where the address is taken or not this machine's."""
    try:
        return socket.create_server((host, port), backlog=128)
    except OSError as error:
        raise MachineError(
            "The driver cannot open the port at which the executors meet",
            expected="a free port" if port == 0 else f"port {port} to be free",
            actual=str(error),
            where=f"{host}, on the driver",
            hint="See what listens there with: ss -ltnp",
        ) from error


@dataclass(frozen=True)
class Team:
    """All executors of a round, as one of them reaches the others."""

    group: Any = None
    """The process group of all executors; None for one."""
    shared: SharedSums | None = None
    """The way through shared memory, where all are on one machine and train on its CPU."""

    @property
    def alone(self) -> bool:
        """Return whether there is nobody else."""
        return self.group is None

    def start_sum(self, values: Any, *, beside: bool = False) -> Callable[[], None]:
        """Begin to sum the contiguous tensor ``values`` over the executors in place; return what waits for the end.

        No host waits for a GPU. There a sum takes its turn among the kernels, unless it is to travel ``beside`` them:
        in a captured step leaving the stream and coming back costs 20 microseconds, as much as a small sum (one H200).
        """
        import torch
        import torch.distributed as dist

        if self.alone:
            return _nothing
        if self.shared is not None and values.dtype == torch.float32:
            return self.shared.start(values.detach().numpy().reshape(-1)).wait
        work = dist.all_reduce(values, group=self.group, async_op=beside or not values.is_cuda)
        return _nothing if work is None else functools.partial(_wait, work, spin=not values.is_cuda)

    def copy_first_(self, values: Any) -> None:
        """Overwrite the tensor ``values`` by executor 0's; every executor must call it."""
        import torch.distributed as dist

        if not self.alone:
            dist.broadcast(values, src=0, group=self.group)


def _nothing() -> None:
    """Stand for waiting where there is nobody to wait for."""


@contextlib.contextmanager
def open_team(
    job: Job, rank: int, address: StoreAddress | None, device: str = "cpu", attempt: int = 0
) -> Iterator[Team]:
    """Yield the team of all executors (gloo, or NCCL on ``gpu``); set ``job.threads`` threads.

    Each ``attempt`` of a stage has keys of its own in the store: the last one's name processes that are gone.
    ConnectionResetError where a peer goes away while it is open.
    """
    import torch

    _limit_threads(torch, job.threads)
    if job.executors == 1 or address is None:
        yield Team()
        return
    import torch.distributed as dist

    set_up_collectives(job)
    with peer_errors():
        store = dist.TCPStore(address.host, address.port, is_master=False, wait_for_workers=False, timeout=_meeting())
        store = dist.PrefixStore(f"attempt-{attempt}", store)
        backend = "nccl" if device == "gpu" else "gloo"
        settings = {"device_id": torch.device("cuda", 0)} if device == "gpu" else {}
        dist.init_process_group(backend, store=store, rank=rank, world_size=job.executors, **settings)
    shared = None
    try:
        with peer_errors():
            shared = SharedSums.meet(store, rank, job.executors) if device == "cpu" else None
            yield Team(dist.group.WORLD, shared)
    finally:
        if shared is not None:
            shared.close()
        dist.destroy_process_group()


@contextlib.contextmanager
def peer_errors() -> Iterator[None]:
    """Raise ConnectionResetError for an error of a collective, so that the driver looks for its cause elsewhere."""
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in _PEER_WORDS):
            raise
        raise ConnectionResetError(f"an executor left the collective: {error}") from error


class FlatGradients:
    """All gradients in one float32 buffer, summed over the executors in one or several buckets.

    Buckets are reduced in the order in which the backward pass fills them, the same on every executor; with several
    of them the earlier ones travel while the later ones are computed.
    """

    def __init__(self, parameters: Sequence[Any], team: Team, bucket_bytes: int = BUCKET_BYTES) -> None:
        """Give each of ``parameters`` (dense float32 tensors) a view of the buffer as its ``grad``."""
        import torch

        self._team = team
        self.flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
        self.bytes_reduced = 0
        """Payload handed to all-reduce so far."""
        self._waits = Stopwatch(self.flat.is_cuda)
        self._buckets = _buckets([p.numel() for p in parameters], bucket_bytes)
        self._bucket_of = {
            id(parameters[i]): bucket for bucket, (members, _) in enumerate(self._buckets) for i in members
        }
        self._waiting = [0] * len(self._buckets)
        self._started: list[Callable[[], None]] = []
        self._attach(parameters)

    @property
    def exposed_seconds(self) -> float:
        """Return the waiting for all-reduces so far: slower executors and what the backward pass did not hide.

        On a GPU the host waits for the last of them.
        """
        return self._waits.seconds

    @property
    def captured_seconds(self) -> float:
        """Return the same of captured steps: the sum over all graphs, each as its latest replay took."""
        return self._waits.captured_seconds

    def clear(self) -> None:
        """Set all gradients to zero; call it before every backward pass."""
        self.flat.zero_()
        self._started = []
        self._waiting = [len(members) for members, _ in self._buckets]

    def reduce(self) -> None:
        """Return when the buffer holds the sums over all executors (on a GPU: when that is queued).

        Every executor must call it.
        """
        if self._team.alone:
            return
        with self._waits:
            while len(self._started) < len(self._buckets):  # all of them where there was no backward pass
                self._start_next()
            for finish in self._started:
                finish()

    def added(self, parameter: Any) -> None:
        """Note that a gradient is complete, so that its bucket may travel when it was the last one missing."""
        if self._team.alone or len(self._buckets) == 1:
            return
        self._waiting[self._bucket_of[id(parameter)]] -= 1
        while len(self._started) < len(self._buckets) and not self._waiting[len(self._started)]:
            self._start_next()

    def _attach(self, parameters: Sequence[Any]) -> None:
        start = 0
        for parameter in parameters:
            # the parameter's own strides: accumulating into another layout is a transposition per step
            parameter.grad = self.flat.as_strided(parameter.shape, parameter.stride(), start)
            start += parameter.numel()
        if not self._team.alone and len(self._buckets) > 1:
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(self.added)

    def _start_next(self) -> None:
        part = self.flat[self._buckets[len(self._started)][1]]
        self.bytes_reduced += part.numel() * part.element_size()
        self._started.append(self._team.start_sum(part, beside=len(self._buckets) > 1))


class Exchange:
    """Small sums over the executors in the middle of a step, such as those of batch normalisation.

    While a sum travels between CPUs the executor does what was put off for such a moment: gradients of filters, which
    nothing that follows in the backward pass needs.
    """

    def __init__(self, team: Team, *, on_gpu: bool = False) -> None:
        self._team = team
        self.bytes_reduced = 0
        self.shares: tuple[int, ...] = ()
        """Images of each executor in the step at hand; empty where nobody said so."""
        self.added: Callable[[Any], None] = _ignore
        """Called with a parameter whose gradient was put off and is now complete."""
        self._put_off: list[tuple[Callable[[], Any], Any]] = []
        self._waits = Stopwatch(on_gpu)

    @property
    def alone(self) -> bool:
        """Return whether there is nobody to exchange with."""
        return self._team.alone

    @property
    def seconds(self) -> float:
        """Return how long sums were waited for so far; on a GPU the host waits for the last of them."""
        return self._waits.seconds

    @property
    def captured_seconds(self) -> float:
        """Return the same of captured steps: the sum over all graphs, each as its latest replay took."""
        return self._waits.captured_seconds

    def sum_(self, values: Any) -> Any:
        """Return the tensor ``values`` after summing it over the executors in place."""
        if not self.alone:
            if values.is_cuda:
                with self._waits:
                    self._team.start_sum(values)()
            else:
                finish = self._team.start_sum(values)
                self.work_off()
                with self._waits:
                    finish()
            self.bytes_reduced += values.numel() * values.element_size()
        return values

    def total(self, images: Any) -> int:
        """Return how many numbers per channel all executors have together, ``images`` (b, c, h, w) being this one's."""
        pixels: int = images.shape[2] * images.shape[3]
        return pixels * (sum(self.shares) or len(images))

    def put_off(self, gradient: Callable[[], Any], parameter: Any) -> None:
        """Add ``gradient()`` to the parameter's own during the next sum, or when :meth:`work_off` is called."""
        self._put_off.append((gradient, parameter))

    def work_off(self) -> None:
        """Do what was put off; call it after the backward pass."""
        if not self._put_off:
            return
        import torch

        with torch.no_grad():  # after the pass it would be recorded, and keep every step's images
            while self._put_off:
                gradient, parameter = self._put_off.pop(0)
                parameter.grad.add_(gradient())
                self.added(parameter)


def _ignore(parameter: Any) -> None:
    """Stand for who is told of complete gradients where nobody is."""


class Stopwatch:
    """Adds up how long ``with`` blocks take: on a GPU between marks in its stream, which no host waits for.

    Blocks of a captured step are seen in its latest replay alone: :attr:`captured_seconds`.
    """

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._seconds = self._began = 0.0
        self._marks: list[tuple[Any, Any]] = []
        self._captured: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        if self._on_gpu:
            self._pairs().append((self._mark(), None))
        else:
            self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._on_gpu:
            pairs = self._pairs()
            pairs[-1] = (pairs[-1][0], self._mark())
        else:
            self._seconds += time.perf_counter() - self._began

    @property
    def captured_seconds(self) -> float:
        """Return the sum over the blocks of all captured steps, each as its latest replay took, after waiting for it;
        0 where PyTorch cannot time within a graph."""
        pairs = [pair for pair in self._captured if None not in pair]
        for _, end in pairs[-1:]:
            end.synchronize()
        return float(sum(start.elapsed_time(end) for start, end in pairs)) / 1000

    def _pairs(self) -> list[tuple[Any, Any]]:
        import torch

        return self._captured if torch.cuda.is_current_stream_capturing() else self._marks

    @property
    def seconds(self) -> float:
        """Return the sum so far; on a GPU after waiting for the last block's end."""
        if self._marks:
            self._marks[-1][1].synchronize()
            self._seconds += sum(start.elapsed_time(end) for start, end in self._marks) / 1000
            self._marks = []
        return self._seconds

    def _mark(self) -> Any:
        import torch

        if not torch.cuda.is_current_stream_capturing():
            event = torch.cuda.Event(enable_timing=True)
        else:
            try:
                event = torch.cuda.Event(enable_timing=True, external=True)
            except TypeError:  # a PyTorch whose events cannot be read outside their graph
                return None
        event.record()
        return event


def _wait(work: Any, *, spin: bool) -> None:
    """Return when a collective is done; NCCL's ``wait`` only orders the streams: no host waits for a GPU."""
    if spin:
        until = time.perf_counter() + SPIN_SECONDS
        while not work.is_completed() and time.perf_counter() < until:
            let_others_run()
    work.wait()


def all_reduce_(array: Any, team: Team) -> float:
    """Sum a contiguous numpy float32 array over the executors in place; return the seconds it took."""
    if team.alone:
        return 0.0
    import torch

    began = time.perf_counter()
    team.start_sum(torch.from_numpy(array))()
    return time.perf_counter() - began


def _buckets(sizes: Sequence[int], bucket_bytes: int) -> list[tuple[list[int], slice]]:
    """Return (parameter indices, range of the flat buffer) from the last parameter to the first."""
    buckets: list[tuple[list[int], slice]] = []
    members: list[int] = []
    stop = end = sum(sizes)
    for index in reversed(range(len(sizes))):
        members.append(index)
        end -= sizes[index]
        if 4 * (stop - end) >= bucket_bytes or index == 0:
            buckets.append((members, slice(end, stop)))
            members, stop = [], end
    return buckets


def _limit_threads(torch: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    with contextlib.suppress(RuntimeError):  # fixed once parallel work has begun, as in a second round of one process
        torch.set_num_interop_threads(1)


def _meeting() -> datetime.timedelta:
    return datetime.timedelta(seconds=MEETING_SECONDS)
