"""The infinitesimal jackknife: deletion from one stored Hessian, online, with or without L1.

Suriyakumar and Wilson 2022 (arXiv 2209.12269) answer every request with the Hessian of the first
training run, which is not updated, so that a request costs a product and no factorisation:

    w_R = w - H_S^-1 grad F_R(w),    H_S = sum_S hess loss_i / n + l2 I

and for an objective with a term that is not smooth, l1 ||w||_1 here, the proximal form

    w_R = argmin_v grad F_R(w)'(v - w) + (v - w)'H_S (v - w) / 2 + l1 ||v||_1.
"""

import functools
import secrets
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int, UInt8, UInt32

from jaxunlearn import accounting, certificates, kernels, records, tree
from jaxunlearn.progress import progress as show_progress
from jaxunlearn.types import (
    Budget,
    ForgetInfo,
    Forgotten,
    LossFn,
    Quote,
    Request,
    UnlearnerState,
)

PAPER = "Suriyakumar and Wilson 2022, arXiv 2209.12269"


class JackknifeRecord(NamedTuple):
    """What the next deletion needs; never released, since it has no noise.

    statistics: the gradient's sum over the rows that stay and the Hessian's over all, at the
      minimiser that training found.
    iterate_words: the last step's float64 result without noise; zeros before the first.
    release_digest: SHA-256 of the parameters last released; zeros before the first release.
    spent_units: total mu squared spent, of `accounting.BUDGET_UNITS`, rounded up.
    num_releases: releases so far.
    declaration: digest of the budget, the noise and the constants, as `init` knew them.
    """

    participation: records.Participation
    statistics: records.Statistics
    iterate_words: UInt32[Array, "p 2"]
    release_digest: UInt8[Array, "32"]
    spent_units: Int[Array, ""]
    num_releases: Int[Array, ""]
    declaration: UInt8[Array, "32"]


def infinitesimal_jackknife(
    tx: optax.GradientTransformation,
    loss_fn: LossFn,
    *,
    num_examples: int,
    l2: float,
    budget: Budget,
    constants: accounting.LossConstants,
    l1: float = 0.0,
    strong_convexity: float = 0.0,
    noise_stddev: float | None = None,
    max_releases: int = 1,
    start: float = 0.0,
    measured: bool = False,
    paper_constants: bool = False,
    polish_steps: int = 1,
    max_parameters: int = 4096,
    rebuild: records.Rebuild | None = None,
    microbatch_size: int | None = None,
    entropy: accounting.Entropy = secrets.token_bytes,
    progress: bool | None = None,
) -> records.StoringUnlearner:
    """Wrap `tx` so that `forget` needs the rows to forget and no other.

        distance <= (M q^2 / (2 lambda^2) + beta m q / (lambda n) + r) / lambda,   q = s + 2 L m / n

    with lambda = l2 + mu. `update` adds `l2 * params` to the gradient. Train to a minimum, call
    `store`, and the rows that stay are not read again. Every request starts from that minimum with
    the union of all forgotten rows. A row of high leverage is hardly moved by a Hessian that it
    dominates itself (Izzo et al. 2021, Theorem 3): `smoothness` pays for that.

    Args:
      tx: the whole optimizer.
      loss_fn: convex in the parameters; the mean of per-example losses, without L2; no key.
      num_examples: ids are dense in 0..num_examples-1; the noise is for a run that sees them all.
      l2: >= 0; a convex loss is made strongly convex by it. `accounting.balanced_l2` chooses one.
      budget: total epsilon and delta of all releases; max_forget is the declared capacity m_max.
      constants: L, M and smoothness beta of every row's loss. L, and the feature norm where there
        is one, are checked on all rows at the minimiser; M and beta are taken on trust.
      l1: >= 0; the objective has l1 ||w||_1, which `tx` must bring to training, or `polish_steps`
        enough to reach the minimum from where it was left. Released values are noisy, not sparse.
      strong_convexity: mu >= 0, of the loss itself, on trust; l2 + mu must be positive.
      noise_stddev: noise per parameter of each release. None takes the least with which
        `max_releases` releases of max_forget rows each fit the budget
        (`accounting.capacity_noise`). With the default of 1 that is one request for all of them.
      start: the gradient norm of the mean objective that training and `polish_steps` may leave;
        where they leave more than this and a thousandth of q, that noise may not do.
      measured: charge the measured norm of grad F_R(w) where it is below q.
      paper_constants: step by (1/n) H_S^-1 sum_U grad, (n - m) / n of the default (not with l1),
        and add at least `accounting.classic_noise`.
      polish_steps: (proximal) Newton steps on all rows that `store` takes, while they help.
      max_parameters: refuse more; the record takes 4 p^2 bytes.
      rebuild: how to remake the state of `tx`: scope "full-state". It reads retained rows.
      microbatch_size: rows differentiated at a time in Hessian products.
      entropy: bytes for the noise; replace it in tests only.

    Returns:
      A `records.StoringUnlearner`: an `Unlearner` with `store(params, opt_state, *, data)`.
      `forget_step` takes the rows to forget alone, weight 0, id -1 for padding, and a state that
      holds the sums; it returns parameters WITHOUT noise, in float32.

    Cost: one gradient and p Hessian products over the m rows, and p^2 operations, whatever n;
      p^3 / 3 for the first request, 5000 p^2 at most for each with l1. Memory: 16 p^2 bytes.

    Guarantees:
      The bound is not below the distance of the result to the retain-set minimiser.
      Where `store` was called, no row but those to forget is read (without `rebuild`).
      The noise of every release is fixed before the request, and the sum of what releases cost
      never exceeds the budget.

    Raises (forget, store):
      IdError, WrongStateError, MissingDataError, TrainingRecordError, CoupledLossError,
      RetainSetEmptyError, SolverError (not convex), AssumptionError (a row refutes the constants),
      BudgetExhaustedError (retrain); inputs untouched.

    References: Suriyakumar and Wilson 2022, Algorithms 1 and 2 (their numbers recalled, not read);
      Izzo et al. 2021, Theorem 3. The bound is derived in `accounting.LossConstants`. Deviations:
      the step stands on the gradient over the rows that stay, which training's own residual and the
      L1 term are part of: written as a shrinkage of w + (1/n) H^-1 sum_U grad, a request for nobody
      would shrink w once more.
    """
    curvature = l2 + strong_convexity
    records.check_stored(loss_fn, l2, strong_convexity, noise_stddev, max_releases)
    _check_options(l1, constants)
    accounting.check_capacity(budget, num_examples)
    sums_at = kernels.loss_sums(loss_fn, microbatch_size=microbatch_size)
    penalty = records.Penalty(l2)
    inner_update = records.wrapped_update(tx, penalty)
    remaker = records.make_remaker(tx, loss_fn, rebuild, penalty)
    templates: list[Any] = []
    factors: dict[int, records.Damped] = {}

    def objective_gradient(sums):
        return sums.gradient / sums.num_rows + l2 * sums.origin

    def solve(sums):
        damped = damped_of(sums)
        gradient = objective_gradient(sums)
        if l1 > 0:
            new, left = records.proximal_step(damped.matrix, gradient, sums.origin, l1=l1)
            return new - sums.origin, left
        if paper_constants:  # 1 / n in place of 1 / (n - m)
            gradient = gradient * (sums.num_rows / (sums.num_rows + sums.num_gone))
        return records.solve_damped(damped, gradient)

    def damped_of(sums):
        """H_S and its factor, made once for all requests to one set of sums."""
        count = sums.num_rows + sums.num_gone
        key = hash((sums.hessian.tobytes(), count))
        if key not in factors:
            records.check_convex(
                sums.hessian - count * strong_convexity * np.eye(len(sums.origin)), num_rows=count
            )
            factors.clear()
            factors[key] = records.factorised(sums.hessian, scale=count, curvature=l2)
        return factors[key]

    def left_at(sums):
        """The norm of the least subgradient of the whole objective over the rows in the sums."""
        gradient = objective_gradient(sums)
        return float(np.linalg.norm(records.least_subgradient(gradient, sums.origin, l1)))

    def check_figures(figures):
        constants.check_rows(
            largest_gradient=float(figures.largest_gradient),
            largest_feature=float(figures.largest_feature),
        )

    gatherer = records.make_gatherer(
        loss_fn, num_examples=num_examples, l2=l2, check=check_figures,
        refine=lambda sums: sums.origin + solve(sums)[0], left=left_at,
        polish_steps=polish_steps, features=constants.features, microbatch_size=microbatch_size,
    )  # fmt: skip
    paper_step = paper_constants and not l1 > 0
    distance_of = functools.partial(
        constants.jackknife_distance, curvature, paper_step=paper_step, l2=l2
    )

    def noise_of(dimension):
        if noise_stddev is not None:
            return noise_stddev
        return accounting.capacity_noise(
            distance_of, constants, curvature=curvature, budget=budget, start=start,
            num_examples=num_examples, dimension=dimension, max_releases=max_releases,
            paper_constants=paper_constants,
        )  # fmt: skip

    noise_of(1)  # refuse here what cannot be

    def declaration():
        return records.declare(
            num_examples=num_examples, budget=budget, constants=constants,
            noise=(noise_stddev, max_releases, start, paper_constants),
            curvature=(l1, l2, strong_convexity),
        )  # fmt: skip

    def bound_of(sums, solver):
        """The distance, its terms, and the gradient bound that it rests on."""
        sizes = {"num_forgotten": sums.num_gone, "num_retained": sums.num_rows}
        count = sums.num_rows + sums.num_gone
        slack = accounting.summation_slack(sums.gradient_norm_sum, num_rows=count) / sums.num_rows
        gradient = constants.gradient_bound(**sizes, start=sums.start + slack)
        if measured:
            gradient = min(gradient, left_at(sums) + slack)
        distance = distance_of(**sizes, gradient=gradient, solver=solver + slack)
        rest = (solver + slack) / curvature
        terms = {"jackknife_error": max(distance - rest, 0.0), "solver": rest, "gradient": gradient}
        return distance, terms

    def init(params):
        remaker.check(params)
        templates[:] = [jax.eval_shape(lambda: params)]
        statistics = records.init_statistics(params, max_parameters=max_parameters)
        record = JackknifeRecord(
            participation=records.init_participation(num_examples),
            statistics=statistics,
            iterate_words=jnp.zeros_like(statistics.origin_words),
            release_digest=jnp.zeros((32,), jnp.uint8),
            spent_units=jnp.zeros((), jnp.int32),
            num_releases=jnp.zeros((), jnp.int32),
            declaration=declaration(),
        )
        return UnlearnerState(inner=remaker.fresh(params), record=record)

    def update(updates, opt_state, params=None, *, batch=None, ids=None, key=None, **extra):
        del batch, key
        records.check_update(opt_state, params, ids, JackknifeRecord, "infinitesimal_jackknife")
        record = opt_state.record
        ids = None if ids is None else jnp.asarray(ids)
        participation = records.observe(record.participation, ids, num_examples)
        updates, inner = inner_update(updates, opt_state.inner, params, **extra)
        return updates, UnlearnerState(inner, record._replace(participation=participation))

    def forget_step(params, state, rows, ids, weights):
        _, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))
        origin, gradient, hessian = records.traced_sums(state.record.statistics)
        going = ((ids >= 0) & (weights == 0)).astype(jnp.float32)
        gone = sums_at(unravel(origin), rows, going)
        left = state.record.statistics.num_stored - gone.num_rows
        count = jnp.maximum(left, 1).astype(jnp.float32)
        stored = state.record.statistics.num_stored + state.record.statistics.num_gone
        total = jnp.maximum(stored, 1).astype(jnp.float32)
        matrix = hessian / total + l2 * jnp.eye(origin.size)
        wanted = (gradient - gone.gradient) / count + l2 * origin
        if l1 > 0:
            moved = records.traced_proximal(matrix, wanted, origin, l1)
        else:
            scale = count / total if paper_constants else 1.0
            factor = jax.scipy.linalg.cho_factor(matrix)
            moved = origin - jax.scipy.linalg.cho_solve(factor, scale * wanted)
        return records.landed(params, state, unravel(moved), left > 0)

    def checked(params, opt_state, ids, requester=None):
        begun = time.perf_counter()
        records.check_state(opt_state, JackknifeRecord, "infinitesimal_jackknife")
        ids, num_duplicates = records.validate_ids(ids, num_examples)
        record = opt_state.record
        records.check_participation(record.participation, ids)
        if templates:
            records.check_params(params, templates[0], "infinitesimal_jackknife")
        records.check_declaration(record.declaration, declaration(), "infinitesimal_jackknife")
        total = len(records.forgotten_ids(record.participation)) + len(ids)
        if ids.size:
            accounting.check_request(budget, total, int(record.spent_units))
        return Request(ids, num_duplicates, begun, requester)

    def store(params, opt_state, *, data):
        checked(params, opt_state, [])
        statistics = gatherer.stored(params, opt_state.record, records.RowReader(data))
        return opt_state._replace(record=opt_state.record._replace(statistics=statistics))

    def forget(params, opt_state, ids, *, data=None, requester=None):
        request = checked(params, opt_state, ids, requester)
        ids = request.ids
        if not ids.size:
            return Forgotten(params, opt_state, ForgetInfo.of("infinitesimal_jackknife", request))
        record, reader = opt_state.record, records.RowReader(data)
        with show_progress("forgetting", 2, show=progress) as advance:
            statistics = gatherer.stored(params, record, reader)
            advance(1)
            origin = records.unpack_sums(statistics)
            gone = gatherer.removed(origin, params, ids, reader)
            sums = origin.without(gone, keep_hessian=True)
            step, residual = solve(sums)
            distance, parts = bound_of(sums, residual)
            advance(1)
        flat = sums.origin + step
        stddev = noise_of(len(flat))
        charge = accounting.charge_release(
            int(record.spent_units), budget=budget, distance=distance, noise_stddev=stddev,
            dimension=len(flat),
        )  # fmt: skip
        release = accounting.add_grid_noise(
            flat, noise_stddev=stddev, sensitivity=distance, entropy=entropy
        )
        new_params = records.noisy_params(release.values, params)
        inner = remaker.after(new_params, reader, opt_state, ids)
        new_record = JackknifeRecord(
            participation=records.bury(record.participation, ids),
            statistics=records.pack_sums(sums, statistics.origin_digest),
            iterate_words=records.pack_float64(flat),
            release_digest=records.digest_leaf(new_params),
            spent_units=jnp.asarray(charge.spent_units, jnp.int32),
            num_releases=record.num_releases + 1,
            declaration=record.declaration,
        )
        measurements = {
            "distance_bound": distance,
            "start_residual": sums.start,
            "num_gone": sums.num_gone,
            "noise_stddev": stddev,
            "budget_spent": charge.spent_units / accounting.BUDGET_UNITS,
            **{f"bound_{name}": value for name, value in parts.items()},
        }
        return certificates.concluded(
            request, (params, opt_state), (new_params, UnlearnerState(inner, new_record)),
            measurements, method="infinitesimal_jackknife", paper=PAPER,
            epsilon=budget.epsilon, delta=budget.delta, prior_mu=charge.prior_mu,
            releases_covered=int(new_record.num_releases),
            **certificates.stored_sums(
                distance=distance, terms=parts, release=release, constants=constants,
                budget=budget, is_measured=measured,
                rebuilt=rebuild.assumption if rebuild else None,
                hessian_constants=(
                    f"Every loss has a {constants.hessian_lipschitz:g}-Lipschitz Hessian of norm "
                    f"at most {constants.smoothness:g}."
                ),
            ),
        )  # fmt: skip

    terms: dict[str, Any] = {
        "guarantee": "certified",
        "epsilon": budget.epsilon,
        "delta": budget.delta,
    }

    @records.refusals_as_quotes(**terms)
    def quote(params, opt_state, ids):
        ids = checked(params, opt_state, ids).ids
        count, record = tree.num_parameters(params), opt_state.record
        at_hand, sizes = gatherer.sizes(params, record, len(ids))
        if ids.size and not measured:
            accounting.charge_least(
                int(record.spent_units), distance_of, constants, budget=budget,
                noise_stddev=noise_of(count), dimension=count, **sizes,
            )  # fmt: skip
        return Quote(
            **terms,
            num_forgotten=len(ids),
            feasible=True,
            reason="" if at_hand else "reads all rows once, since store was not called",
            num_steps=1,
            num_gradients=(0 if at_hand else 2 * count + 1)
            + (rebuild.num_batches if rebuild else 0),
            retrain_gradients=int(opt_state.record.participation.num_steps),
            memory_bytes=32 * count * count,
        )

    return records.StoringUnlearner(init, update, forget, quote, forget_step, store=store)


def _check_options(l1, constants):
    """Refuse a bad configuration at the factory."""
    if not (l1 >= 0 and np.isfinite(l1)):
        raise ValueError(f"Expected l1={l1} >= 0.")
    if not np.isfinite(constants.smoothness):
        raise ValueError("Expected constants with a finite smoothness: the Hessian is not updated.")
    constants.check()
