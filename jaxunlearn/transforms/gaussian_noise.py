"""Gaussian noise on the updates of training, from a typed key that the state carries."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key, PyTree

from jaxunlearn import tree

Schedule = Callable[[Array], Array]


class GaussianNoiseState(NamedTuple):
    """State of `gaussian_noise`.

    noise_key: the key handed to the factory; it never changes.
    num_noise_steps: calls of `update` so far.
    """

    noise_key: Key[Array, ""]
    num_noise_steps: Int[Array, ""]


def gaussian_noise(
    stddev: float | Array | Schedule,
    *,
    key: Key[Array, ""],
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds sigma_t N(0, I) to the updates, independent for every step, leaf and entry.

        u_t <- u_t + sigma_t z_t,   z_t = normal(fold_in(fold_in(key, t), leaf))

    Where it stands says what is noisy. `optax.chain(gaussian_noise(s, key=key), optax.sgd(r))`
    perturbs the gradient, as DP-SGD does; `optax.chain(optax.sgd(r), gaussian_noise(s, key=key))`
    the step, as Langevin dynamics does (s = sqrt(2 r / beta)).

    The noise is that of `jax.random`: float32 normals take 2^23 values, end at 5.42 sigma, and give
    away what they were added to within a few coordinates. It makes a guarantee `bounded` at most,
    never `certified`: released parameters get `accounting.add_grid_noise`.

    Args:
      stddev: sigma_t >= 0, in the unit of the updates where they pass (of a *mean* gradient, it is
        noise multiplier * clip norm / batch size); a number, or a schedule of the number of steps
        before this one. `optax.inject_hyperparams(gaussian_noise, static_args=("key", "mask"))`
        makes it a hyperparameter.
      key: a typed threefry key. One run, one key: two runs with the same key have the same noise,
        and their difference has none.
      mask: pytree of bools like the updates, or a prefix of it, or a function from updates to one;
        False leaves pass unchanged. It does not change what the others get.

    Returns:
      A transform with state `GaussianNoiseState`; it takes and ignores extra arguments. Leaves that
      are not floating or complex numbers pass unchanged; complex ones get sigma in both parts.
      Noise is drawn and added in float32 or wider and the sum rounded to the type of the update.
      jit, scan and the number of devices change at most the last bit of a sum, and sharded updates
      get noise that is sharded alike. Inside `shard_map` every shard of a leaf has its own, and
      what is replicated stays so: sum gradients over devices first, or their noises add up.

    Cost: one normal draw an entry; no gradient; memory for a leaf of noise.

    Raises:
      ValueError: a negative or non-finite `stddev`; no typed threefry key; inside
        `shard_map(check_vma=False)`, where nothing says which leaves are shards.

    >>> tx = gaussian_noise(0.5, key=jax.random.key(0))
    >>> updates, state = tx.update(jnp.zeros(3), tx.init(jnp.zeros(3)))
    >>> updates.shape, int(state.num_noise_steps)
    ((3,), 1)

    References: Abadi et al. 2016, "Deep learning with differential privacy", Algorithm 1; Welling
      and Teh 2011, "Bayesian learning via stochastic gradient Langevin dynamics", equation (4).
      Deviation from `optax.add_noise`: the key is typed and does not change, so a state at step t
      says which noise comes next; noise is not of the updates' type where that is narrow.
    """
    _check_stddev(stddev)
    _check_key(key)

    def init(params):
        del params
        return GaussianNoiseState(noise_key=jnp.copy(key), num_noise_steps=jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra):
        del params, extra
        count = state.num_noise_steps
        sigma = stddev(count) if callable(stddev) else stddev
        step_key = jax.random.fold_in(state.noise_key, count)
        leaves, structure = jax.tree.flatten(updates)
        noisy = [
            _add_noise(leaf, sigma, jax.random.fold_in(step_key, index)) if wanted else leaf
            for index, (leaf, wanted) in enumerate(zip(leaves, _wanted(mask, updates), strict=True))
        ]
        state = GaussianNoiseState(
            noise_key=state.noise_key, num_noise_steps=optax.safe_increment(count)
        )
        return jax.tree.unflatten(structure, noisy), state

    return optax.GradientTransformationExtraArgs(init, update)


def _wanted(mask, updates) -> list[bool]:
    """Which leaves get noise, in tree order."""
    if mask is None:
        return [True] * len(jax.tree.leaves(updates))
    mask = mask(updates) if callable(mask) else mask
    spread = lambda wanted, part: jax.tree.map(lambda leaf: bool(wanted), part)
    return jax.tree.leaves(jax.tree.map(spread, mask, updates))


def _add_noise(leaf, sigma, key):
    """leaf + sigma N(0, I), rounded once."""
    if not tree.is_inexact(leaf):
        return leaf
    leaf = jnp.asarray(leaf)
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    for axis in _shard_axes(leaf):
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    sharding = jax.typeof(leaf).sharding
    placed = {"out_sharding": sharding} if any(sharding.spec) else {}
    noise = jax.random.normal(key, leaf.shape, wide, **placed)
    sigma = jnp.asarray(sigma, jnp.finfo(wide).dtype)
    if jnp.issubdtype(wide, jnp.complexfloating):
        sigma = sigma * math.sqrt(2.0)  # a complex normal has variance 1/2 in either part
    # Where sigma is zero nothing is added: -0.0 + 0.0 would lose its sign.
    return jnp.where(sigma == 0, leaf, (leaf.astype(wide) + sigma * noise).astype(leaf.dtype))


def _shard_axes(leaf) -> list[Any]:
    """The mesh axes over which `leaf` is split, inside `shard_map`; none elsewhere."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    varying = lambda x: jax.typeof(x).manual_axis_type.varying
    if manual and manual[0] not in varying(jax.lax.axis_index(manual[0])):
        raise ValueError(
            "Expected shard_map(..., check_vma=True) round gaussian_noise: without it every shard "
            "of a leaf would get the same noise."
        )
    return [axis for axis in manual if axis in varying(leaf)]


def _check_stddev(stddev):
    """Refuse what is no standard deviation, as far as that is known before tracing."""
    if isinstance(stddev, (int, float)) and not (0 <= stddev < math.inf):
        raise ValueError(f"Expected stddev={stddev} >= 0 and finite.")


def _check_key(key):
    """Refuse raw and batched keys, and generators whose bits are not the same everywhere."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed or key.shape != ():
        raise ValueError(f"Expected one typed key, jax.random.key(seed), got {type(key).__name__}.")
    name = str(jax.random.key_impl(key))
    if not name.startswith("threefry"):
        raise ValueError(
            f"Expected a threefry key, got {name}: its bits depend on the device and on vmap, so a "
            "run could not be replayed."
        )
