"""Performance-regression testing for distributed deep-learning training on Apache Spark, as a pytest plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sparkgauge.context import Context as Context
    from sparkgauge.data.shards import Shard as Shard
    from sparkgauge.gate import efficiency as efficiency
    from sparkgauge.gate import speedup as speedup

__all__ = ["Context", "Shard", "__version__", "efficiency", "speedup"]

_HOMES = {
    "Context": "sparkgauge.context",
    "Shard": "sparkgauge.data.shards",
    "efficiency": "sparkgauge.gate",
    "speedup": "sparkgauge.gate",
}


def __getattr__(name: str) -> Any:
    """Return a public name, importing its module on first use so that loading the plugin stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sparkgauge' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
