"""The cached trajectory of a run: its parameters and its gradient at every step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, DTypeLike, Int, PyTree

from jaxunlearn import errors, tree
from jaxunlearn.types import Params


class Trajectory(NamedTuple):
    """What a run passed through; leaves like the parameters, after a leading axis of steps.

    trajectory_params: the parameters before each step.
    trajectory_gradients: the gradient that `update` was given, without the L2 term.
    """

    trajectory_params: PyTree
    trajectory_gradients: PyTree


def trajectory_bytes(
    params: Params, max_steps: int, *, storage_dtype: DTypeLike | None = None
) -> int:
    """Bytes of an `init_trajectory`, known before anything is allocated.

    >>> trajectory_bytes({"w": jnp.zeros((10, 3))}, 100), trajectory_bytes(jnp.zeros(4), 5)
    (24000, 160)
    """
    return tree.num_bytes(
        jax.eval_shape(lambda p: init_trajectory(p, max_steps, storage_dtype=storage_dtype), params)
    )


def check_trajectory_bytes(
    params: Params, max_steps: int, storage_dtype, max_bytes: int | None
) -> None:
    """Refuse a trajectory of more than `max_bytes`, before training.

    Raises:
      RecordTooLargeError: with its size.
    """
    size = trajectory_bytes(params, max_steps, storage_dtype=storage_dtype)
    if max_bytes is not None and size > max_bytes:
        raise errors.RecordTooLargeError(
            f"Expected a trajectory of at most max_bytes={max_bytes}, got {size} bytes: parameters "
            f"and gradient of {max_steps} steps. Raise max_bytes, or use unlearners.replay."
        )


def init_trajectory(
    params: Params, max_steps: int, *, storage_dtype: DTypeLike | None = None
) -> Trajectory:
    """Zeros for `max_steps` steps; a concrete leaf's `NamedSharding` is kept.

    Args:
      storage_dtype: of the cached gradients; None means that of each parameter. Parameters are
        always stored as they are: what is taken from them is their difference to other ones.
    """

    def zeros(leaf, dtype):
        stack = jnp.zeros((max_steps, *jnp.shape(leaf)), dtype)
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            spec = PartitionSpec(None, *sharding.spec)
            stack = jax.device_put(stack, NamedSharding(sharding.mesh, spec))
        return stack

    return Trajectory(
        trajectory_params=jax.tree.map(lambda p: zeros(p, jnp.result_type(p)), params),
        trajectory_gradients=jax.tree.map(
            lambda p: zeros(p, storage_dtype or jnp.result_type(p)), params
        ),
    )


def write_trajectory(
    trajectory: Trajectory, step: Int[Array, ""] | int, params: Params, gradient: PyTree
) -> Trajectory:
    """One step overwritten, in place under donation; a step beyond the end is dropped."""
    put = lambda leaf, value: leaf.at[step].set(value.astype(leaf.dtype), mode="drop")
    return Trajectory(
        trajectory_params=jax.tree.map(put, trajectory.trajectory_params, params),
        trajectory_gradients=jax.tree.map(put, trajectory.trajectory_gradients, gradient),
    )


def read_trajectory(trajectory: Trajectory, step: Int[Array, ""] | int) -> tuple[Params, PyTree]:
    """Parameters before a step, and its gradient as it is stored."""
    return jax.tree.map(lambda leaf: leaf[step], tuple(trajectory))
