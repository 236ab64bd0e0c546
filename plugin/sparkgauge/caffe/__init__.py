"""Reads and writes what Caffe trains from: prototxt, weights, solver states, mean images, LMDB. Needs protobuf only."""

from __future__ import annotations

from importlib.util import find_spec

from sparkgauge.errors import MachineError

INSTALL_HINT = "Install it with: pip install 'pytest-sparkgauge[caffe]'"


def require_protobuf() -> None:
    """Raise MachineError where the messages of this package's other modules cannot be read; imports nothing."""
    if find_spec("google") is None or find_spec("google.protobuf") is None:
        raise MachineError("Reading Caffe's files needs protobuf, which is not installed", hint=INSTALL_HINT)
