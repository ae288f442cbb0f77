"""What the benchmarks share: timing (of `jaxunlearn.cli.timing`), environment, JSON."""

import functools
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

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
    "busy",
    "compare",
    "compile_seconds",
    "environment",
    "flops",
    "matmul_flops_per_second",
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
        "load_before": os.getloadavg()[0],
        "versions": {name: _version(name) for name in ("jaxlib", "optax", "numpy", *PEERS)},
    }


def busy() -> str | None:
    """A warning where something else is running: PyTorch's threads suffer most from company."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < 0.5 * cores:
        return None
    return f"warning: load {load:.1f} on {cores} cores; figures of a busy machine are not fair"


@functools.cache
def matmul_flops_per_second(size: int = 1024) -> float:
    """What a square float32 matrix product reaches here, at its best of nine."""
    product = jax.jit(jnp.matmul)
    matrix = jnp.ones((size, size))
    seconds(lambda: product(matrix, matrix))
    return 2 * size**3 / min(seconds(lambda: product(matrix, matrix)) for _ in range(9))


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
