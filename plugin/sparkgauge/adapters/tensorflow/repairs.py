"""TensorFlowOnSpark, repaired from outside: what it gets wrong for code that must survive its failures.

TensorFlowOnSpark 2.2.5 (the last release) waits in whole-second sleeps, calls ``sys.exit`` in the driver when an
executor fails, keeps that failure in a module global for every later cluster, finds "its" address by connecting to a
public DNS server, runs ``nvidia-smi`` without a time limit, and leaves its manager processes behind when a worker is
killed. Nothing here changes the package on disk: :func:`on_driver` substitutes three names while ``TFCluster.run`` is
running, and :func:`on_executor` runs in the (freshly forked) task before TensorFlowOnSpark does.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from sparkgauge.errors import TrainingError

POLL_SECONDS = 0.02
"""Between two looks at the reservations; the package sleeps whole seconds."""

LONGEST_SOCKET_PATH = 100
"""Bytes of a Unix socket's path: Linux takes 107, macOS 103, and what exceeds it kills the manager without a word."""


@contextlib.contextmanager
def on_driver(check: Callable[[], None], job_group: str, loopback: bool) -> Iterator[dict[str, str]]:
    """Substitute the driver's server and task for the block; yields the status dict of the launching thread.

    ``check`` is called while waiting for reservations and raises when the round has failed or timed out.
    """
    from tensorflowonspark import TFCluster, TFSparkNode, reservation, util

    status: dict[str, str] = {}
    address = util.get_ip_address
    saved = TFCluster.reservation, TFCluster.TFSparkNode, TFCluster.tf_status
    TFCluster.reservation = _Module(reservation, Server=_server_class(reservation.Server, check, loopback))
    TFCluster.TFSparkNode = _Module(TFSparkNode, run=_task_maker(TFSparkNode.run, job_group, loopback))
    TFCluster.tf_status = status
    if loopback:
        util.get_ip_address = _loopback_address
    try:
        yield status
    finally:
        TFCluster.reservation, TFCluster.TFSparkNode, TFCluster.tf_status = saved
        util.get_ip_address = address


def on_executor(loopback: bool) -> None:
    """Repair TensorFlowOnSpark inside a task; the task's process is forked for it alone and ends with it."""
    from tensorflowonspark import TFManager, gpu_info, reservation, util

    logging.getLogger("tensorflowonspark").setLevel(logging.WARNING)  # at INFO it logs its managers' keys
    if loopback:
        util.get_ip_address = _loopback_address
        # given a port, it neither probes for one on all interfaces nor keeps that socket
        os.environ["TENSORFLOW_PORT"] = str(_free_loopback_port())
    gpu_info.is_gpu_available = _no_gpu_probe
    reservation.Client.await_reservations = _await_reservations
    TFManager.TFManager = _mortal_manager(TFManager.TFManager)


class _Module:
    """A module's names with some of them replaced."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _server_class(base: Any, check: Callable[[], None], loopback: bool) -> Any:
    class Server(base):  # type: ignore[misc]
        """Waits in milliseconds, raises instead of exiting, stops at once, and closes what it accepted."""

        def start(self) -> tuple[str, int]:
            self._listener = (
                socket.create_server(("127.0.0.1", 0), backlog=64) if loopback else self.start_listening_socket()
            )
            threading.Thread(target=self._serve, name="sparkgauge-reservations", daemon=True).start()
            # get_server_ip() obeys TFOS_SERVER_HOST, which knows nothing of where this one listens
            return ("127.0.0.1" if loopback else self.get_server_ip(), self._listener.getsockname()[1])

        def await_reservations(self, sc: Any, status: dict[str, str] | None = None, timeout: float = 600) -> Any:
            try:
                while not self.reservations.done():
                    check()
                    _raise_failure(status)
                    time.sleep(POLL_SECONDS)
            except BaseException:
                self.stop()  # TFCluster.run, which made this server, does not
                raise
            return self.reservations.get()

        def stop(self) -> None:
            super().stop()
            with contextlib.suppress(OSError):  # wakes accept(); the thread may have closed it already
                self._listener.shutdown(socket.SHUT_RDWR)

        def _serve(self) -> None:
            with self._listener, contextlib.suppress(OSError):
                while not self.done:
                    node, _ = self._listener.accept()
                    threading.Thread(target=self._answer, args=(node,), daemon=True).start()

        def _answer(self, node: socket.socket) -> None:
            # the package signals a closed connection by a bare Exception
            with node, contextlib.suppress(Exception):
                while True:
                    self._handle_message(node, self.receive(node))

    return Server


def _raise_failure(status: dict[str, str] | None) -> None:
    if status and "error" in status:
        raise TrainingError("An executor failed before TensorFlow's cluster was formed", traceback_text=status["error"])


def _task_maker(original: Callable[..., Any], job_group: str, loopback: bool) -> Callable[..., Any]:
    def make_task(*arguments: Any, **keywords: Any) -> Callable[[Any], Any]:
        # called in the thread that submits the job, which is where Spark takes the group from
        from pyspark import SparkContext

        context = SparkContext._active_spark_context
        assert context is not None
        context.setJobGroup(job_group, "sparkgauge: training round", interruptOnCancel=True)
        task = original(*arguments, **keywords)

        def repaired(rows: Any) -> Any:
            from sparkgauge.adapters.tensorflow import repairs

            repairs.on_executor(loopback)
            return task(rows)

        return repaired

    return make_task


def _loopback_address() -> str:
    return "127.0.0.1"


def _no_gpu_probe() -> bool:
    return False  # GPUs come from Spark's own resources, which TensorFlowOnSpark asks first


def _free_loopback_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _await_reservations(self: Any) -> Any:
    while not self._request("QUERY"):
        time.sleep(POLL_SECONDS)
    return self.get_reservations()


def _mortal_manager(base: Any) -> Any:
    class Manager(base):  # type: ignore[misc]
        """A manager whose process dies with the task, however the task ends, at an address that always fits."""

        def __init__(self, address: Any = None, **keywords: Any) -> None:
            super().__init__(address or _manager_address(), **keywords)

        def start(self, initializer: Any = None, initargs: Any = ()) -> None:
            super().start(initializer=die_with_parent)

    return Manager


def _manager_address() -> tuple[str, int] | None:
    """Return None for a socket in the temporary folder, as usual, or loopback where that path would be too long."""
    length = len(os.fsencode(tempfile.gettempdir())) + len("/pymp-12345678/listener-12345678")
    return ("127.0.0.1", 0) if length > LONGEST_SOCKET_PATH else None


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies (Linux; elsewhere the parent must see to it)."""
    if threading.current_thread() is threading.main_thread() and os.uname().sysname == "Linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
