"""Random numbers of rows, from the key and the row's own id alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64, UInt32

_UNIT = 2.0**-52


def key_words(key: Array) -> UInt32[Array, "2"]:
    """The words of a typed key of the default implementation.

    Raises:
      TypeError, ValueError: another kind of key.
    """
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"Expected key=jax.random.key(...), got {type(key).__name__}.")
    if jax.random.key_impl(key) != jax.random.key_impl(jax.random.key(0)) or key.ndim:
        raise ValueError("Expected one key of the default implementation: its words are kept.")
    return jnp.array(jax.random.key_data(key), copy=True)


@functools.partial(jax.jit, static_argnums=2)
def _words_of_rows(key, ids, rounds):
    words = lambda i: jax.random.bits(jax.random.fold_in(key, i), (rounds, 2), jnp.uint32)
    return jax.vmap(words)(ids)


def row_draws(key: Array, ids: np.ndarray, rounds: int) -> Float64[np.ndarray, "n rounds"]:
    """Uniform numbers in (0, 1) of each row, from the key and the row's own id alone.

    Integers on the device and one exact product on the host: no figure depends on other rows.
    """
    size = 1 << max(0, len(ids) - 1).bit_length()
    padded = np.zeros((size,), np.int32)
    padded[: len(ids)] = ids
    words = np.asarray(jax.device_get(_words_of_rows(key, padded, rounds)))[: len(ids)]
    high, low = words[..., 0].astype(np.uint64), words[..., 1].astype(np.uint64)
    return (((high << np.uint64(20)) | (low >> np.uint64(12))).astype(np.float64) + 0.5) * _UNIT
