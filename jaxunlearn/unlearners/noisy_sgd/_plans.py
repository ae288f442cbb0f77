"""How far rows moved a noisy run, which steps hide it, and the record after them."""

import hashlib
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from jaxunlearn import accounting, errors, records

SLACK = 1 + 2.0**-36
_LIMIT = 2**20


class NoisySGDRecord(NamedTuple):
    """What the next deletion needs: who took part, which rows each step used, and how far off.

    log: the steps of training and of unlearning, in order.
    largest_update: norm of the largest incoming update, over the clip.
    carried_distance: how far the model is from one that never saw the rows forgotten so far.
    carried_at: after how many steps that was so; each step since shrank it by c.
    settings_digest: SHA-256 of what the distances rest on; zeros where steps differed in it.
    """

    participation: records.Participation
    log: records.StepLog
    largest_update: Float[Array, ""]
    carried_distance: Float[Array, ""]
    carried_at: Int[Array, ""]
    settings_digest: UInt8[Array, "32"]


def digest_of(setting) -> np.ndarray:
    """SHA-256 of l2, the rate, the clip, the noise and the radius of a step."""
    numbers = (
        *(setting.strong_convexity, setting.rate, setting.gradient_clip),
        *(setting.step_noise, setting.radius),
    )
    text = " ".join(float(number).hex() for number in numbers)
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)


def same_settings(record, digest) -> Array:
    """The record's digest, or zeros for ever after a step of other settings; in traced code."""
    return jnp.where(jnp.all(record.settings_digest == digest), record.settings_digest, 0)


class Plan(NamedTuple):
    """Steps to come. ids (K, b), -1 for what is gone; num_rows (K,); distance z; mu after them."""

    ids: np.ndarray
    num_rows: np.ndarray
    distance: float
    mu: float


def distance_of(setting, step_ids, num_rows, ids) -> float:
    """Equation (1) over a log, at most the diameter: an upper bound."""
    shares = np.isin(step_ids, ids).sum(axis=1) / np.maximum(num_rows, 1)
    ages = np.arange(len(shares))[::-1]
    with np.errstate(under="ignore"):
        total = float(np.sum(shares * setting.contraction**ages))
    distance = setting.rate * setting.gradient_clip * total * (SLACK + len(shares) * 2.0**-50)
    return min(distance, 2 * setting.radius)


def _grid_drift(setting, dimension) -> float:
    """By how much a step's rounding to the grid, and its float64, can part two runs.

    Two runs part by at most grid sqrt(d) where the map's value is rounded, as much once more where
    rounded Gaussian noise stands for Gaussian noise, and far less by float64.
    """
    grid, _ = accounting.grid_of(setting.step_noise)
    return 3 * grid * math.sqrt(dimension) * SLACK


def mu_of(setting, distance, num_steps, dimension) -> float:
    """Equation (2), with the grid: an upper bound."""
    return accounting.iteration_mu(
        contractions=setting.contraction, noise_stddevs=setting.step_noise,
        shifts=_grid_drift(setting, dimension), start=distance, diameter=2 * setting.radius,
        num_steps=num_steps,
    )  # fmt: skip


def _fewest_steps(setting, distance, budget, dimension) -> int:
    """The least K after which the release fits the budget."""
    grid, on_grid = accounting.grid_of(setting.step_noise)
    stddev = grid * on_grid

    def fits(count):
        mu = mu_of(setting, distance, count, dimension)
        if not mu < math.inf:
            return False
        epsilon = accounting.release_epsilon(
            delta=budget.delta, sensitivity=mu * stddev * SLACK,
            noise_stddev=stddev, dimension=dimension * count,
        )  # fmt: skip
        return epsilon <= budget.epsilon

    low, high = 0, 1
    while not fits(high):
        low, high = high, 2 * high
        if high > _LIMIT:
            raise errors.BudgetExhaustedError(
                f"Expected noise that {_LIMIT} steps make enough, got {setting.step_noise:.3g} a "
                f"step for a distance of {distance:.3g}. Retrain, or train with more noise."
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def make_plan(setting, record, ids, budget, dimension, epoch, paper_constants) -> Plan:
    """How far the rows moved the model, and the steps that hide it."""
    done = int(record.participation.num_steps)
    log = jax.device_get(record.log)
    step_ids, num_rows = log.step_ids[:done], log.step_num_rows[:done]
    own = distance_of(setting, step_ids, num_rows, ids)
    if paper_constants:
        own = max(own, setting.drift(len(ids)))
    since = setting.contraction ** (done - int(record.carried_at))
    rounding = _grid_drift(setting, dimension) / (1 - setting.contraction)
    carried = float(record.carried_distance) * since
    distance = min((own + carried + rounding) * SLACK, 2 * setting.radius)
    count = _fewest_steps(setting, distance, budget, dimension)
    if paper_constants:
        count = max(count, _published_epochs(setting, distance, budget) * setting.steps_per_epoch)
    source = sources(done, count, epoch, np)
    kept = np.where(np.isin(step_ids, ids), -1, step_ids)
    mu = mu_of(setting, distance, count, dimension)
    return Plan(kept[source], num_rows[source], distance, mu)


def _published_epochs(setting, distance, budget) -> int:
    """Epochs by the published bound."""
    for count in range(1, _LIMIT):
        cost = setting.epsilon(distance, count, delta=budget.delta, paper_constants=True)
        if cost <= budget.epsilon:
            return count
    raise errors.BudgetExhaustedError("Expected a target that the published bound reaches.")


def sources(done, count, epoch, numpy):
    """Which steps of the log the next `count` steps repeat: the last `epoch` of them, in turn."""
    epoch = numpy.minimum(epoch, numpy.maximum(done, 1))
    return numpy.maximum(done, 1) - epoch + numpy.arange(count) % epoch


def logged(record, at, ids, num_rows) -> NoisySGDRecord:
    """The record after steps of unlearning, in traced code."""
    participation, log = record.participation, record.log
    put = lambda leaf, value: leaf.at[at].set(value, mode="drop")
    return record._replace(
        participation=participation._replace(
            num_steps=participation.num_steps + len(at),
            num_steps_with_ids=participation.num_steps_with_ids + len(at),
        ),
        log=log._replace(
            step_ids=put(log.step_ids, ids), step_num_rows=put(log.step_num_rows, num_rows)
        ),
    )


def after(record, ids, plan, setting) -> NoisySGDRecord:
    """The record after a deletion; on the host, since K differs from request to request."""
    done, count = int(record.participation.num_steps), len(plan.ids)
    step_ids, num_rows = (np.array(x) for x in (record.log.step_ids, record.log.step_num_rows))
    step_ids[np.isin(step_ids, ids)] = -1
    step_ids[done : done + count], num_rows[done : done + count] = plan.ids, plan.num_rows
    left = plan.distance * setting.contraction**count * SLACK
    participation = records.bury(record.participation, ids)
    with_ids = int(participation.num_steps_with_ids) + count
    return NoisySGDRecord(
        participation=participation._replace(
            num_steps=jnp.asarray(done + count, jnp.int32),
            num_steps_with_ids=jnp.asarray(with_ids, jnp.int32),
        ),
        log=record.log._replace(
            step_ids=jnp.asarray(step_ids), step_num_rows=jnp.asarray(num_rows)
        ),
        largest_update=record.largest_update,
        carried_distance=jnp.asarray(np.nextafter(np.float32(left), np.float32(np.inf))),
        carried_at=jnp.asarray(done + count, jnp.int32),
        settings_digest=record.settings_digest,
    )
