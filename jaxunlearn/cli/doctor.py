"""`jaxunlearn doctor`: what this machine runs with, and what to do about it."""

import importlib.metadata
import importlib.util
import os

import jax

from jaxunlearn import datasets
from jaxunlearn.certificates import environment

_EXTRAS = {
    "flax": "flax",
    "data": "sklearn",
    "plots": "matplotlib",
    "cli": "rich",
    "privacy": "dp_accounting",
    "orbax": "orbax.checkpoint",
}


def run() -> int:
    """Print the findings; the exit status is 1 where the library cannot work."""
    print("Environment")
    for name, value in environment().items():
        print(f"  {name:<18} {value}")
    print("Extras")
    for extra, module in _EXTRAS.items():
        found = "yes" if _found(module) else f"no     pip install 'jaxunlearn[{extra}]'"
        print(f"  {extra:<18} {found}")
    print("Data")
    folder = os.environ.get("JAXUNLEARN_DATA")
    state = folder or "not set: the larger data sets are not available"
    print(f"  {'JAXUNLEARN_DATA':<18} {state}")
    print(f"  {'data sets':<18} {', '.join(datasets.names())}")
    print("Advice")
    for line in _advice() or ["nothing to change"]:
        print(f"  - {line}")
    return 0


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _advice() -> list[str]:
    """What stands between this machine and a bitwise replay or an exact product."""
    advice = []
    backend = jax.default_backend()
    flags = os.environ.get("XLA_FLAGS", "")
    if backend == "gpu" and "xla_gpu_deterministic_ops" not in flags:
        advice.append(
            "GPU: set XLA_FLAGS=--xla_gpu_deterministic_ops=true before starting Python, or a "
            "replay may be verified within a tolerance only."
        )
    if backend != "cpu" and environment()["matmul_precision"] == "default":
        advice.append(
            f"{backend}: float32 matrix products are rounded further by default; kernels ask for "
            "highest precision, your own training step does not."
        )
    if environment()["prng"] != "threefry2x32":
        advice.append("Keys are not threefry: values may change between backends and versions.")
    if _version_below("jax", (0, 10)):
        advice.append("jax is older than 0.10, the oldest version that is tested.")
    return advice


def _version_below(package: str, least: tuple[int, int]) -> bool:
    major, minor = importlib.metadata.version(package).split(".")[:2]
    return (int(major), int(minor)) < least
