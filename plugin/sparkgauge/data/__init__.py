"""CIFAR-10 for executors: found, checked, prepared once into memory-mapped files, and dealt out in shards.

Importing this package does not import numpy; the names that need it are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparkgauge.data.dataset import Arrays, Dataset
from sparkgauge.data.sources import OFFICIAL_MD5, OFFICIAL_URL, resolve

if TYPE_CHECKING:
    from sparkgauge.data.augment import Augmentation, augmentation_parameters, crop_flip
    from sparkgauge.data.shards import Sampler, Shard, evaluation_range, global_order

_LAZY = {
    "Augmentation": "augment",
    "augmentation_parameters": "augment",
    "crop_flip": "augment",
    "Sampler": "shards",
    "Shard": "shards",
    "evaluation_range": "shards",
    "global_order": "shards",
}

__all__ = [
    "OFFICIAL_MD5",
    "OFFICIAL_URL",
    "Arrays",
    "Augmentation",
    "Dataset",
    "Sampler",
    "Shard",
    "augmentation_parameters",
    "crop_flip",
    "evaluation_range",
    "global_order",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
