"""The steps of certified fine-tuning and what they certify, on the host and in traced code."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn import accounting, errors, records, tree
from jaxunlearn.types import Budget

_SLACK = 1 + 2.0**-36
_ROOM = 1e-6
"""Share of epsilon and delta that model clipping leaves for the grid."""


class Tuning(NamedTuple):
    """Public constants of the steps of `certified_finetuning`; none of them may depend on data.

    start_radius: C_0, to which trained parameters are clipped; not used by model clipping.
    gradient_clip: C_1, of the mean gradient of a step; not used by model clipping.
    model_radius: C_2; given, the model is clipped in every step, and the gradient is not.
    """

    learning_rate: float
    start_radius: float = 1.0
    gradient_clip: float = 1.0
    l2: float = 0.0
    model_radius: float | None = None

    @property
    def steps(self) -> accounting.ClippedSteps:
        """The same for `accounting`."""
        return accounting.ClippedSteps(
            self.start_radius, self.gradient_clip, self.learning_rate, self.l2
        )

    def mu(self, num_steps: int, noise_stddev: float, dimension: int) -> float:
        """mu of gradient clipping with noise on the grid: an upper bound."""
        moved = 2 * self.learning_rate * self.gradient_clip * _SLACK
        return accounting.iteration_mu(
            contractions=self.steps.contraction, noise_stddevs=noise_stddev,
            shifts=moved + _rounding(noise_stddev, dimension), start=2 * self.start_radius * _SLACK,
            num_steps=num_steps,
        )  # fmt: skip

    def shift(
        self, num_steps: int, noise_stddev: float, dimension: int, budget: Budget
    ) -> float | None:
        """mu for a certificate of (epsilon, delta) on the grid, or None where they do not hold.

        With model clipping, delta at an epsilon just below is compared with a delta just below, and
        mu is that of the one Gaussian that has the budget's own (epsilon, delta).
        """
        coordinates = num_steps * dimension
        if self.model_radius is None:
            mu = self.mu(num_steps, noise_stddev, dimension) * _SLACK
            cost = accounting.release_epsilon(
                delta=budget.delta, sensitivity=mu * noise_stddev, noise_stddev=noise_stddev,
                dimension=coordinates,
            )  # fmt: skip
            return mu if cost <= budget.epsilon else None
        width = 2 * self.model_radius * _SLACK + _rounding(noise_stddev, dimension)
        delta = accounting.hockey_stick_recursion(
            epsilon=budget.epsilon * (1 - _ROOM), mus=[width / noise_stddev] * num_steps
        )
        spent = accounting.discretisation_epsilon(
            coordinates, delta=budget.delta * math.exp(-budget.epsilon) * 2.0**-40
        )
        if not (
            delta <= budget.delta * (1 - _ROOM) and spent <= min(budget.epsilon, 1.0) * _ROOM / 4
        ):
            return None
        total = accounting.certified_mu(
            epsilon=budget.epsilon, delta=budget.delta, dimension=coordinates
        )
        mu = total * (1 - 2.0**-30) - 2.0**-23 * math.sqrt(coordinates)
        return mu if mu > 0 else None

    def noise(self, num_steps: int, dimension: int, budget: Budget) -> float:
        """Noise per step and coordinate that certifies the budget on the grid: an upper bound."""
        epsilon, delta = (x * (1 - 2 * _ROOM) for x in (budget.epsilon, budget.delta))
        if self.model_radius is None:
            stddev = accounting.clipped_finetuning_noise(
                self.steps, epsilon=epsilon, delta=delta, num_steps=num_steps
            )
        else:
            stddev = accounting.model_clipping_noise(
                epsilon=epsilon, delta=delta, radius=self.model_radius, num_steps=num_steps
            )
        for _ in range(200):
            grid, on_grid = accounting.grid_of(stddev)
            stddev = grid * on_grid
            if self.shift(num_steps, stddev, dimension, budget) is not None:
                return stddev
            stddev *= 1 + 1e-4
        raise ValueError(
            f"Expected a budget above what rounding {dimension} coordinates to a grid costs in "
            f"{num_steps} steps, got {budget}."
        )


def _rounding(noise_stddev, dimension) -> float:
    """By how much the grid and float64 can part two runs in a step; see `noisy_sgd`."""
    grid, _ = accounting.grid_of(noise_stddev)
    return 3 * grid * math.sqrt(dimension) * _SLACK


def checked_steps(tuning, num_steps) -> int:
    """T, or the number of steps that needs the least noise; refuses a bad `Tuning`."""
    _ = tuning.steps.contraction
    if num_steps is not None:
        records.check_integers(num_steps=num_steps)
        return num_steps
    if tuning.model_radius is not None:
        raise ValueError("Expected num_steps with model_radius: more steps need less noise.")
    return accounting.best_num_steps(tuning.steps, max_steps=10_000)


def batches_of(retained, batch_size, num_steps, words):
    """Ids of each step: epochs over the retained rows in public orders, padded with -1."""
    order, rng = np.zeros((0,), np.int32), np.random.default_rng(words)
    for _ in range(num_steps):
        if not order.size:
            order = rng.permutation(retained).astype(np.int32)
        ids, order = order[:batch_size], order[batch_size:]
        yield np.concatenate([ids, np.full(batch_size - len(ids), -1, np.int32)])


def start_radius_of(tuning) -> float:
    """C_0; model clipping needs none."""
    return float(tuning.start_radius) if tuning.model_radius is None else math.inf


def clipped(flat, radius):
    """A float64 vector inside a ball; what is not finite is refused.

    Raises:
      NonFiniteError.
    """
    norm = float(np.linalg.norm(flat))
    if not math.isfinite(norm):
        raise errors.NonFiniteError(
            "Expected finite parameters and gradients, got NaN or infinity; nothing was released."
        )
    return flat if norm <= radius else flat * (radius / norm)


def host_move(flat, grads, tuning):
    """A step without noise, in float64."""
    shrunk = (1 - tuning.learning_rate * tuning.l2) * flat
    if tuning.model_radius is None:
        return shrunk - tuning.learning_rate * clipped(grads, tuning.gradient_clip)
    return clipped(shrunk - tuning.learning_rate * grads, tuning.model_radius)


def _within(vector, radius):
    """`clipped` of a pytree in traced code; NaN stays."""
    norm = jnp.sqrt(tree.vdot(vector, vector))
    scale = jnp.where(norm > radius, radius / norm, 1.0)
    return jax.tree.map(lambda leaf: (scale * leaf).astype(leaf.dtype), vector)


def started(params, tuning):
    """Parameters where fine-tuning begins."""
    return params if tuning.model_radius is not None else _within(params, tuning.start_radius)


def moved_by(params, grads, tuning):
    """`host_move` of pytrees in traced code."""
    rate, radius = tuning.learning_rate, tuning.model_radius
    grads = grads if radius is not None else _within(grads, tuning.gradient_clip)
    step = lambda p, g: ((1 - rate * tuning.l2) * p - rate * g).astype(p.dtype)
    moved = jax.tree.map(step, params, grads)
    return moved if radius is None else _within(moved, radius)
