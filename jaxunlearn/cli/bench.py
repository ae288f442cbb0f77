"""`jaxunlearn bench kernels`: what the kernels cost on your model, your batch and your device."""

import functools
import importlib
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn import errors, kernels
from jaxunlearn.certificates import environment
from jaxunlearn.cli import timing
from jaxunlearn.types import Batch, LossFn, Params

GRADIENT, NORMS, CLIPPED, PRODUCT = "gradient", "norms", "clipped sum", "Hessian product"
USUAL = "vmap(grad), clip, sum"
MAX_USUAL_BYTES = 2**31
_PATIENCE, _SAMPLE_SECONDS = 10.0, 0.002


class Case(NamedTuple):
    """What is measured: a mean loss, its parameters, and a batch."""

    loss_fn: LossFn
    params: Params
    batch: Batch


def run(*, loss: str | None, clip: float, tangents: int, repeats: int, out: str | None) -> int:
    """Measure and print; `loss` is "package.module:function", None the built-in network."""
    if not clip > 0:
        raise errors.UsageError(f"Expected --clip > 0, got {clip}.")
    if tangents < 1:
        raise errors.UsageError(f"Expected --tangents >= 1, got {tangents}.")
    if repeats < timing.MIN_REPEATS:
        raise errors.UsageError(f"Expected --repeats >= {timing.MIN_REPEATS}, got {repeats}.")
    case = load(loss) if loss else built_in()
    num_rows = jnp.shape(jax.tree.leaves(case.batch)[0])[0]
    num_params = sum(jnp.size(leaf) for leaf in jax.tree.leaves(case.params))
    device = jax.devices()[0]
    print(f"{loss or 'MLP 784-256-256-10'}: {num_params} parameters, {num_rows} rows, ", end="")
    print(f"{device.platform}, {device.device_kind}\n")
    results = measure(*case, l2_clip_norm=clip, num_tangents=tangents, repeats=repeats)
    print(table(results))
    print(f"\n{kernels.per_example(case.loss_fn)(case.params, case.batch).explain()}")
    if out:
        content = {"environment": environment(), "results": results}
        pathlib.Path(out).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    return 0


def load(spec: str) -> Case:
    """The case that a function named by "package.module:function" returns.

    Raises:
      UsageError: no such module or function, or it does not return (loss_fn, params, batch).
    """
    module_name, colon, name = spec.partition(":")
    if not (module_name and colon and name):
        raise errors.UsageError(f"Expected --loss package.module:function, got {spec!r}.")
    if "" not in sys.path:  # as `python -m` does: the user's own files come first
        sys.path.insert(0, "")
    try:
        make: Any = importlib.import_module(module_name)
        for part in name.split("."):
            make = getattr(make, part)
    except (ImportError, AttributeError) as error:
        raise errors.UsageError(f"Expected --loss to name a function, but {error}.") from error
    try:
        loss_fn, params, batch = make()
    except (TypeError, ValueError) as error:
        raise errors.UsageError(
            f"Expected {spec} to take no arguments and to return (loss_fn, params, batch), "
            f"but {error}."
        ) from error
    if not callable(loss_fn) or kernels.takes_key(loss_fn):
        raise errors.UsageError(
            f"Expected {spec} to return loss_fn(params, batch), the mean over the batch; close "
            "over everything else, keys included."
        )
    return Case(loss_fn, params, batch)


def built_in(batch_size: int = 256, widths: tuple[int, ...] = (784, 256, 256, 10)) -> Case:
    """A ReLU network with cross-entropy, on random rows."""
    keys = iter(jax.random.split(jax.random.key(0), len(widths) + 1))
    params = [
        {"w": jax.random.normal(next(keys), (m, n)) * (2 / m) ** 0.5, "b": jnp.zeros(n)}
        for m, n in itertools.pairwise(widths)
    ]

    def loss_fn(params, batch):
        h = batch["x"]
        for layer in params[:-1]:
            h = jax.nn.relu(h @ layer["w"] + layer["b"])
        logits = h @ params[-1]["w"] + params[-1]["b"]
        chosen = jnp.take_along_axis(logits, batch["y"][:, None], axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)

    rows = jax.random.normal(next(keys), (batch_size, widths[0]))
    labels = jax.random.randint(next(keys), (batch_size,), 0, widths[-1])
    return Case(loss_fn, params, {"x": rows, "y": labels})


def measure(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    *,
    l2_clip_norm: float = 1.0,
    num_tangents: int = 64,
    repeats: int = timing.MIN_REPEATS,
) -> dict[str, dict[str, Any]]:
    """Time the kernels against the plain gradient, interleaved.

    Returns, by name, what `timing.compare` gives, with `each` (by how many vectors the figures may
    be divided) and `temporary_bytes` beside it. The usual way, `vmap(grad)`, is left out where its
    gradients would take more than 2 GiB.
    """
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    vectors = jax.tree.map(
        lambda p: jax.random.normal(next(keys), (num_tangents, *jnp.shape(p)), jnp.result_type(p)),
        params,
    )
    functions = _functions(loss_fn, l2_clip_norm, num_tangents)
    if _materialised_bytes(params, batch) > MAX_USUAL_BYTES:
        del functions[USUAL]
    operands: dict[str, tuple] = dict.fromkeys(functions, (params, batch))
    operands[PRODUCT] = (params, batch, jax.tree.map(lambda v: v[0], vectors))
    operands[many_name(num_tangents)] = (params, batch, vectors)
    jitted = {name: jax.jit(function) for name, function in functions.items()}
    results = timing.compare(
        {name: functools.partial(f, *operands[name]) for name, f in jitted.items()},
        baseline=GRADIENT, repeats=repeats, patience=_PATIENCE, sample_seconds=_SAMPLE_SECONDS,
    )  # fmt: skip
    for name, result in results.items():
        result["each"] = num_tangents if name == many_name(num_tangents) else 1
        result["temporary_bytes"] = timing.temporary_bytes(functions[name], *operands[name])
    return results


def many_name(num_tangents: int) -> str:
    """The row of several Hessian products."""
    return f"{num_tangents} Hessian products, each"


def _functions(loss_fn: LossFn, clip: float, num_tangents: int) -> dict[str, Callable]:
    """What is timed, by name."""
    gradients = kernels.per_example(loss_fn)

    def usual(params, batch):
        def one(row):
            return jax.grad(loss_fn)(params, jax.tree.map(lambda leaf: leaf[None], row))

        rows = jax.vmap(one)(batch)
        squares = [
            jnp.sum(jnp.square(g).reshape(g.shape[0], -1), axis=1) for g in jax.tree.leaves(rows)
        ]
        scale = jnp.minimum(1, clip / jnp.sqrt(sum(squares)))
        return jax.tree.map(lambda g: jnp.tensordot(scale, g, 1), rows)

    return {
        GRADIENT: jax.grad(loss_fn),
        NORMS: lambda params, batch: gradients(params, batch).norms(),
        CLIPPED: lambda params, batch: gradients(params, batch).clipped_sum(clip),
        USUAL: usual,
        PRODUCT: kernels.hvp(loss_fn),
        many_name(num_tangents): kernels.hvp_many(loss_fn),
    }


def _materialised_bytes(params: Params, batch: Batch) -> int:
    """What every row's gradient takes."""
    num_rows = np.shape(jax.tree.leaves(batch)[0])[0]
    leaves = jax.tree.leaves(params)
    return num_rows * sum(np.size(p) * jnp.result_type(p).itemsize for p in leaves)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a kernel: time, ratio to the plain gradient, memory."""
    cells = [("", "median ms", "/ gradient", "95% interval", "temporary MB", "first call s")]
    for name, r in results.items():
        each, memory = r["each"], r["temporary_bytes"]
        cells.append(
            (
                name,
                f"{1e3 * r['median_seconds'] / each:.3g}",
                f"{r['ratio'] / each:.2f}",
                f"[{r['ratio_low'] / each:.2f}, {r['ratio_high'] / each:.2f}]",
                "" if memory is None else f"{memory / 1e6:.1f}",
                f"{r['compile_seconds']:.2f}",
            )
        )
    return timing.aligned(cells)
