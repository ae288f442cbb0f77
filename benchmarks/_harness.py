"""What the benchmarks share: timing (of `jaxunlearn.cli.timing`), environment, JSON."""

import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax

from jaxunlearn.cli.timing import (
    MIN_REPEATS,
    aligned,
    compare,
    compile_seconds,
    flops,
    median_interval,
    ratio_of,
    seconds,
    table,
    temporary_bytes,
)

__all__ = [
    "MIN_REPEATS",
    "aligned",
    "compare",
    "compile_seconds",
    "environment",
    "flops",
    "median_interval",
    "ratio_of",
    "seconds",
    "table",
    "temporary_bytes",
    "write_json",
]

PEERS = (
    "jax_privacy", "jaxopt", "torch", "opacus", "backpack-for-pytorch", "curvlinops-for-pytorch",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """What a figure depends on, without date or host name."""
    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "platform": platform.machine(),
        "device": f"{device.platform}: {device.device_kind}",
        "num_devices": jax.device_count(),
        "cpu_count": os.cpu_count(),
        "x64": bool(jax.config.jax_enable_x64),
        "versions": {name: _version(name) for name in ("jaxlib", "optax", "numpy", *PEERS)},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_json(path: str | os.PathLike, cases: Mapping[str, Any]) -> None:
    """Write results and environment, directories included."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment(), "cases": cases}
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
