"""What a certificate of noisy_sgd says, and what contradicts the constants it rests on."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn import certificates, errors, tree
from jaxunlearn.unlearners.noisy_sgd._plans import SLACK

_PAPER = "Chien, Wang, Chen, Li 2024, arXiv 2403.17105; full batch: arXiv 2401.10371"
_CLIP_SLACK = 1 + 1e-4


def curvature_of(loss, params, rows, weights):
    """Lowest and highest Rayleigh quotient of the batch's Hessian along a power iteration."""
    product = lambda v: jax.jvp(lambda p: jax.grad(loss)(p, rows, weights), (params,), (v,))[1]

    def body(v, _):
        image = product(v)
        size = jnp.sqrt(tree.vdot(image, image))
        onward = jax.tree.map(lambda x: x / jnp.where(size > 0, size, 1.0), image)
        return onward, tree.vdot(v, image)

    _, quotients = jax.lax.scan(body, _direction(params, 0), length=8)
    return jnp.min(quotients), jnp.max(quotients)


def check_curvature(lowest, highest, smoothness):
    """Refuse a loss whose Hessian at the parameters contradicts what was said of it."""
    room = 1e-9 * max(1.0, smoothness)
    if lowest < -room:
        raise errors.SolverError(
            f"Expected a convex loss, got curvature {lowest:.3g} at the parameters: noisy SGD does "
            "not contract on it. Use unlearners.certified_finetuning, which needs no convexity."
        )
    if highest > smoothness + room:
        raise ValueError(
            f"Expected curvature of at most smoothness={smoothness:g} in every batch, got "
            f"{highest:.6g} at the parameters. State more, and retrain with the rate that allows."
        )


def asymmetry_of(loss_fn, clip, params, rows, is_kept):
    """|<u, J v> - <v, J u>| for two random unit vectors, J of the mean of clipped gradients.

    Where a gradient g with Hessian H is clipped, J = (clip / |g|) (I - g g^T / |g|^2) H, which is
    symmetric for one linear output (it is zero), and not monotone where it is not symmetric.
    """

    def total(p):
        def add(sums, row_and_kept):
            row, kept = row_and_kept
            slope = jax.grad(loss_fn)(p, jax.tree.map(lambda leaf: leaf[None], row))
            square = tree.vdot(slope, slope)
            is_long = square > clip * clip
            scale = jnp.where(is_long, clip * jax.lax.rsqrt(jnp.where(is_long, square, 1.0)), 1.0)
            add_one = lambda s, g: s + jnp.where(kept, scale * g, 0.0)
            return jax.tree.map(add_one, sums, slope), None

        zeros = jax.tree.map(jnp.zeros_like, p)
        return jax.lax.scan(add, zeros, (rows, is_kept))[0]

    u, v = (_direction(params, seed) for seed in (1, 2))
    product = lambda w: jax.jvp(total, (params,), (w,))[1]
    skew = tree.vdot(u, product(v)) - tree.vdot(v, product(u))
    return jnp.abs(skew) / jnp.sum(is_kept)


def _direction(params, seed):
    """A random unit vector."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draws = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves)]
    start = jax.tree.unflatten(structure, draws)
    norm = jnp.sqrt(tree.vdot(start, start))
    return jax.tree.map(lambda x: x / norm, start)


def check_symmetry(skew, smoothness):
    """Refuse a loss whose clipped gradients were seen not to be the gradient of anything."""
    if not skew <= 1e-11 * max(1.0, smoothness):
        raise errors.SolverError(
            "Expected a clipped loss that is convex, got clipped gradients with a Jacobian that is "
            f"not symmetric (by {skew:.3g}), as with several outputs: a step does not contract. "
            "Train anew with gradient_clip above every gradient, or with one output, or use "
            "unlearners.certified_finetuning, which needs no convexity."
        )


def check_run(record, digest, params, radius):
    """Refuse a run whose steps had other settings, and parameters that no projection left."""
    if not np.array_equal(jax.device_get(record.settings_digest), digest):
        raise errors.TrainingRecordError(
            "Expected a run whose every step had the l2, learning_rate, gradient_clip, "
            "noise_stddev and radius of this unlearner: how far rows moved the model follows from "
            "them. Call forget of the unlearner that trained it."
        )
    if radius == math.inf or int(record.participation.num_steps) == 0:
        return
    norm = float(np.linalg.norm(tree.flatten(params)))
    room = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(params))
    if not norm <= radius * (1 + 16 * room):
        raise errors.WrongStateError(
            f"Expected parameters inside the ball of radius={radius:g} that every step projects "
            f"to, got norm {norm:.6g}. Pass what apply_updates returned."
        )


def check_clip(largest):
    """Refuse a run with an update that no mean of clipped gradients could be."""
    if not largest <= _CLIP_SLACK:
        raise errors.TrainingRecordError(
            "Expected incoming updates that are means of gradients clipped to gradient_clip, got "
            f"one of {largest:.4g} times that norm. Train with kernels.clipped_grad(loss_fn, "
            "l2_clip_norm=gradient_clip, normalize_by=rows of the step)."
        )


def promise(plan, release) -> dict[str, Any]:
    """The fields of the certificate."""
    return {
        "method": "noisy_sgd",
        "paper": _PAPER,
        "target": "counterfactual",
        "guarantee": "certified",
        "scope": "full-state",
        "sensitivity": certificates.Sensitivity(
            value=plan.mu * release.noise_stddev * SLACK,
            status="proven",
            text="mu after the unlearning steps times the noise of one step: the shift of one "
            "Gaussian that is as hard to tell apart as the two chains (amplification by iteration)",
        ),
        "noise": certificates.Noise(
            stddev=release.noise_stddev,
            grid=release.grid,
            mechanism=certificates.DISCRETE_GAUSSIAN,
            rng=release.rng,
        ),
        "dimension": release.values.size * len(plan.ids),
        "residuals": {
            "unlearning_steps": float(len(plan.ids)),
            "start_distance": plan.distance,
            "mu": plan.mu,
        },
        "assumptions": certificates.assumed(
            *("convexity", *certificates.RECORDED, "one lineage"), **_ASSUMED
        ),
        "not_covered": certificates.excluded(
            "earlier models", "preparation", "copies", "adaptive requests", "other rows"
        ),
    }


_ASSUMED = {
    "smoothness": (
        "The mean loss of every step has curvature of at most the stated smoothness, everywhere; "
        "it was looked at for one batch at the given parameters."
    ),
    "clipped_training": (
        "Training used means of gradients clipped per example; each was checked to be no longer "
        "than the clip, on the mean. Where clipping is active, the clipped loss is convex and as "
        "smooth, as it is for generalised linear models with one output and not with several; it "
        "was looked at for one batch at the given parameters."
    ),
    "reference": (
        "The reference is the same training, with the same batches, start and noise, without the "
        "rows, and the same number of unlearning steps after it."
    ),
    "training_arithmetic": (
        "The steps of training are exact, and so is the type of the parameters where more steps "
        "follow a release: what rounding to it parts two runs by is not in the distance. Steps of "
        "unlearning are in float64, with their rounding in it."
    ),
}
