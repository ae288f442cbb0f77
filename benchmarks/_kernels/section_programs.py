"""Compile time and temporary memory: properties of the programs, not of a call."""

import jax
import numpy as np
from _harness import compile_seconds, median_interval, temporary_bytes

from _kernels import bars, ours, peers_jax
from _kernels.cells import Cell
from _kernels.models import Model

FRESH_FUNCTIONS = 6


def compiling(model: Model, size: int, *, peers: bool, **options) -> Cell:
    """Trace, lower and compile: fresh functions on shapes nobody has seen, in turn."""
    del peers, options
    params = model.params()
    clip = 1.0

    def fresh(kind, rows):
        loss_fn = lambda params, batch: model.loss_fn(params, batch)
        makers = {
            bars.PLAIN: lambda: jax.grad(loss_fn),
            "jaxunlearn": lambda: ours.clipped_sum(loss_fn, clip),
        }
        return compile_seconds(makers[kind](), params, model.batch(rows))

    kinds = {bars.PLAIN: "gradient", "jaxunlearn": bars.COMPILE}
    raw = {kind: [] for kind in kinds}
    for turn in range(FRESH_FUNCTIONS + 1):
        for kind in kinds:
            raw[kind].append(fresh(kind, size + turn))
    cell = Cell("compile", model.name, size, bars.PLAIN)
    for kind, kernel in kinds.items():
        cell.results[kind] = _summary(
            raw[kind][1:], raw[bars.PLAIN][1:], kernel, kind == "jaxunlearn"
        )
    return cell


def memory(model: Model, size: int, *, peers: bool, **options) -> Cell:
    """Temporary bytes of the compiled programs; in the place of seconds, and exact."""
    del options
    params, batch = model.params(), model.batch(size)
    functions = {
        bars.PLAIN: ("gradient", jax.grad(model.loss_fn)),
        "jaxunlearn": (bars.MEMORY, ours.clipped_sum(model.loss_fn, 1.0)),
        "jaxunlearn norms": ("norms, bytes", ours.norms(model.loss_fn)),
        "vmap(grad)": (bars.MEMORY, peers_jax.vmap_clip_sum(model.loss_fn, 1.0)),
    }
    if peers:
        functions["Optax"] = (bars.MEMORY, peers_jax.optax_clip_sum(model.loss_fn, 1.0))
    cell = Cell("memory", model.name, size, bars.PLAIN)
    used = {
        name: temporary_bytes(function, params, batch) for name, (_, function) in functions.items()
    }
    if any(amount is None for amount in used.values()) or not used[bars.PLAIN]:
        cell.blanks["memory"] = "XLA does not say on this device"
        return cell
    for name, (kernel, _) in functions.items():
        cell.results[name] = _summary(
            [used[name]], [used[bars.PLAIN]], kernel, name.startswith("jaxunlearn")
        )
    return cell


def _summary(raw, baseline, kernel, ours) -> dict:
    """Figures in the form that `compare` gives; a single exact figure is its own interval."""
    ratios = np.array(raw) / np.array(baseline)
    exact = len(raw) == 1
    low, high = (ratios[0], ratios[0]) if exact else median_interval(ratios)
    return {
        "median_seconds": float(np.median(raw)), "ratio": float(np.median(ratios)),
        "ratio_low": float(low), "ratio_high": float(high), "num_repeats": len(raw),
        "seconds": [float(x) for x in raw], "kernel": kernel, "ours": ours, "framework": "jax",
    }  # fmt: skip
