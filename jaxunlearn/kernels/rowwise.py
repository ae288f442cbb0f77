"""A mean loss seen row by row: signatures, per-row losses, masks for rows that do not count."""

import inspect

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxunlearn import errors
from jaxunlearn.kernels._stable import widen
from jaxunlearn.types import Batch, LossFn, Params


def takes_key(loss_fn: LossFn) -> bool:
    """Whether `loss_fn` is `loss_fn(params, batch, key)` rather than `loss_fn(params, batch)`.

    A third positional argument without a default, or any argument named `key`, is the key.

    Raises:
      LossSignatureError: the function cannot take (params, batch) or wants more than a key.

    >>> takes_key(lambda params, batch: 0.0), takes_key(lambda params, batch, key: 0.0)
    (False, True)
    """
    try:
        parameters = inspect.signature(loss_fn).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    starred = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(required) > 3 or (len(positional) < 2 and not starred):
        raise errors.LossSignatureError(
            f"Expected loss_fn(params, batch) or loss_fn(params, batch, key), got "
            f"loss_fn{inspect.signature(loss_fn)}. Close over everything else."
        )
    return len(required) == 3 or any(p.name == "key" for p in positional[2:])


def check_operands(loss_fn: LossFn, params: Params, batch: Batch, keys) -> None:
    """Refuse what tracing would only report from deep inside."""
    operands = ("params", "batch") if keys is None else ("params", "batch", "key")
    try:
        inspect.signature(loss_fn).bind(*operands)
    except TypeError as error:
        hint = "Pass keys= for a loss that takes a key." if keys is None else "Leave keys= out."
        raise errors.LossSignatureError(
            f"Expected loss_fn({', '.join(operands)}) -> scalar, but calling it so fails: {error}. "
            f"{hint} Close over everything else."
        ) from error
    except ValueError:  # a built-in without a signature: the call itself will tell
        pass
    check_params(params)
    num_rows = num_rows_of(batch)
    if keys is not None and not (
        jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) and keys.shape == (num_rows,)
    ):
        raise ValueError(
            f"Expected typed keys of shape ({num_rows},), got {keys.dtype} of shape {keys.shape}. "
            "Make them with kernels.example_keys(step_key, ids), or with "
            "jax.random.split(jax.random.key(seed), num_rows)."
        )


def check_params(params: Params) -> None:
    """Refuse a parameter that has no gradient, by name."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = f"params{jax.tree_util.keystr(path)}"
        if not isinstance(leaf, float | int | complex) and not hasattr(leaf, "dtype"):
            raise TypeError(
                f"Expected arrays as parameters, got {type(leaf).__name__} at {name}. A module "
                "holds more than its parameters: split it, params, static = eqx.partition(model, "
                "eqx.is_inexact_array), and put it together inside loss_fn with eqx.combine."
            )
        if not jnp.issubdtype(jax.dtypes.result_type(leaf), jnp.floating):
            raise TypeError(
                f"Expected floating-point parameters, got {jax.dtypes.result_type(leaf)} at "
                f"{name}. Close over it, or move it into the batch; of an Equinox module pass "
                "eqx.filter(model, eqx.is_inexact_array)."
            )


def example_keys(step_key: Key[Array, ""], ids: Int[Array, "b"]) -> Key[Array, "b"]:
    """Each example's own key, `fold_in(step_key, id)`: dropping a row shifts no other's dropout.

    Cost: one fold for each id.
    """
    return jax.vmap(lambda i: jax.random.fold_in(step_key, i))(ids.astype(jnp.uint32))


def num_rows_of(batch: Batch) -> int:
    """The length of the leading axis that all leaves of `batch` share.

    Raises:
      ValueError: no leaf, a leaf without a leading axis, or unequal lengths.
    """
    shapes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(shapes) != 1 or () in shapes:
        raise ValueError(
            "Expected a batch whose leaves share one leading axis, got leaves of shapes "
            f"{[jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]}."
        )
    return shapes.pop()[0]


def row_losses(loss_fn: LossFn):
    """The per-row losses of a mean loss: each row is evaluated as a batch of one.

    Returns a function (params, batch, keys=None) -> losses of shape (B,).

    Cost: one forward pass.

    >>> losses = row_losses(lambda w, batch: jnp.mean((batch - w) ** 2))
    >>> losses(1.0, jnp.array([1.0, 3.0]))
    Array([0., 4.], dtype=float32)
    """

    def one(params: Params, row: Batch, key: Key[Array, ""] | None):
        single = jax.tree.map(lambda leaf: leaf[None], row)
        value = loss_fn(params, single) if key is None else loss_fn(params, single, key)
        shapes = jax.tree.map(jnp.shape, value)
        if shapes != ():
            raise errors.LossSignatureError(
                "Expected loss_fn to return a scalar, the mean over the batch, got shape "
                f"{shapes}. Take jnp.mean over the rows, and return nothing else."
            )
        return value

    def losses(params: Params, batch: Batch, keys: Key[Array, "b"] | None = None):
        return jax.vmap(one, in_axes=(None, 0, None if keys is None else 0))(params, batch, keys)

    return losses


def finite_rows(batch: Batch) -> Bool[Array, "b"]:
    """Which rows of `batch` are finite in every inexact leaf."""
    finite = jnp.ones((num_rows_of(batch),), bool)
    for leaf in jax.tree.leaves(batch):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            finite &= jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, jnp.ndim(leaf))))
    return finite


def fill_rows(batch: Batch, live: Bool[Array, "b"]) -> Batch:
    """`batch` with every row that is not live replaced by the first live one (zeros if none is).

    A masked row must be harmless, not merely weighted zero: zero times NaN is NaN, and a row of
    zeros is not harmless to a loss that normalises its input.
    """
    if live.shape[0] == 0:
        return batch
    donor = jnp.argmax(live)
    any_live = jnp.any(live)

    def fill(leaf):
        leaf = jnp.asarray(leaf)
        keep = live.reshape((-1,) + (1,) * (leaf.ndim - 1))
        safe = jnp.where(any_live, leaf[donor], jnp.zeros_like(leaf[0]))
        return jnp.where(keep, leaf, safe)

    return jax.tree.map(fill, batch)


def check_rows(batch: Batch, weights, keys) -> None:
    """Refuse shapes that would broadcast silently."""
    rows = num_rows_of(batch)
    if jnp.shape(weights) != (rows,):
        raise ValueError(f"Expected weights of shape ({rows},), got {jnp.shape(weights)}.")
    if keys is not None and jnp.shape(keys) != (rows,):
        raise ValueError(
            f"Expected typed keys of shape ({rows},), got {jnp.shape(keys)}. "
            "Make them with kernels.example_keys(step_key, ids)."
        )


def as_weights(weights) -> Float[Array, "b"]:
    """Weights as floats: a divisor cast to the type of a boolean mask would be one."""
    return widen(weights)


def largest_feature(features, rows: Batch, counted: Bool[Array, "b"]) -> Float[Array, ""]:
    """max_i ||x_i|| over the counted rows, X = features(rows); 0 without features."""
    if features is None:
        return jnp.zeros(())
    x = jnp.where(counted[:, None], features(rows), 0.0)
    return jnp.max(jnp.sqrt(jnp.sum(x**2, axis=1)))
