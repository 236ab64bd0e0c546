"""Spark's GPU discovery script: prints addresses as JSON, for ``spark.*.resource.gpu.discoveryScript``.

    python -m sparkgauge.discovery              all GPUs that this process may use
    python -m sparkgauge.discovery FOLDER       the next share of the plan in FOLDER

A cluster of this host has several workers, and each must find GPUs of its own: :func:`write_script` lays out the
shares, and every call takes the next one. Spark runs a script by its path alone, hence the small shell script.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from sparkgauge import gpu

PLAN, SCRIPT = "plan.json", "discover-gpus"


def write_script(folder: Path, shares: Sequence[Sequence[str]], python: str) -> Path:
    """Return the executable that gives each worker the next of ``shares``."""
    folder.mkdir(mode=0o700)
    (folder / PLAN).write_text(json.dumps(shares))
    script = folder / SCRIPT
    search = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = " ".join(map(shlex.quote, [python, "-m", "sparkgauge.discovery", str(folder)]))
    script.write_text(f"#!/bin/sh\nPYTHONPATH={shlex.quote(search)} exec {command}\n")
    script.chmod(0o700)
    return script


def take(folder: Path) -> list[str]:
    """Return the next share of the plan in ``folder``, no two callers the same; empty once all are taken."""
    for index, share in enumerate(json.loads((folder / PLAN).read_text())):
        try:
            (folder / f"taken-{index}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return [str(address) for address in share]
    return []


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the resource as Spark reads it."""
    given = sys.argv[1:] if arguments is None else arguments
    addresses = take(Path(given[0])) if given else [gpu.address(one) for one in gpu.detect()]
    print(json.dumps({"name": "gpu", "addresses": addresses}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
