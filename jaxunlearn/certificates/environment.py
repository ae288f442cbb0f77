"""Where a deletion ran: versions, devices and switches that change floating-point results."""

import functools
import importlib.metadata
import os
import platform

import jax


def environment() -> dict[str, str]:
    """Versions, devices and numerical switches of this process, as text by name.

    Starts JAX's backend if it is not running. No host name, path, user or flag value is recorded.

    >>> sorted(environment())[:3]
    ['backend', 'device_count', 'device_kind']
    """
    devices = jax.devices()
    versions = {name: _version(name) for name in ("jaxunlearn", "jax", "jaxlib", "numpy", "optax")}
    return versions | {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "backend": jax.default_backend(),
        "device_kind": ", ".join(sorted({device.device_kind for device in devices})),
        "device_count": str(len(devices)),
        "process_count": str(jax.process_count()),
        "visible_cores": str(_visible_cores()),
        "x64": str(bool(_setting("jax_enable_x64"))),
        "matmul_precision": str(_setting("jax_default_matmul_precision") or "default"),
        "prng": str(_setting("jax_default_prng_impl")),
        "xla_flags": "set" if os.environ.get("XLA_FLAGS") else "not set",
    }


def _setting(name):
    """One of JAX's switches."""
    return getattr(jax.config, name)


@functools.cache
def _version(package):
    """A package's version, or that it is not installed as a package; read from disk once."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _visible_cores():
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
