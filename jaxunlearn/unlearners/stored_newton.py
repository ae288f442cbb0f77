"""Certified removal from stored sums: Newton's step without any of the rows that stay.

Sekhari, Acharya, Kamath, Suresh 2021 (arXiv 2103.03279) keep T(S), the Hessian of the training
objective at its minimiser w, and answer a request U from T(S), w and the rows of U alone:

    H_R = (sum_S hess loss_i - sum_U hess loss_i) / (n - m) + l2 I
    w_R = w - H_R^-1 grad F_R(w),   grad F_R(w) = (sum_S - sum_U) grad loss_i / (n - m) + l2 w

then noise, of a scale that is fixed for the declared capacity m_max before any request. Here T(S)
has the gradient's sum as well, so that what training left is stepped away and not carried along.
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

PAPER = "Sekhari, Acharya, Kamath, Suresh 2021, arXiv 2103.03279, Algorithms 1 and 2"


class StoredNewtonRecord(NamedTuple):
    """What the next deletion needs; never released, since it has no noise.

    statistics: the sums over the rows that stay, at the minimiser that training found.
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


def stored_newton(
    tx: optax.GradientTransformation,
    loss_fn: LossFn,
    *,
    num_examples: int,
    l2: float,
    budget: Budget,
    constants: accounting.LossConstants,
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

        distance <= (M q^2 / (2 lambda^2) + r) / lambda,   q = s + 2 L m / n,   lambda = l2 + mu

    `update` adds `l2 * params` to the gradient. Train to a minimum, call `store`, and the rows that
    stay are not read again. Every request starts from that minimum with the union of all forgotten
    rows, not from an earlier result.

    Args:
      tx: the whole optimizer.
      loss_fn: convex in the parameters; the mean of per-example losses, without L2; no key.
      num_examples: ids are dense in 0..num_examples-1; the noise is for a run that sees them all.
      l2: >= 0; a convex loss is made strongly convex by it. `accounting.balanced_l2` chooses one.
      budget: total epsilon and delta of all releases; max_forget is the declared capacity m_max.
      constants: L and M of every row's loss. L, and the feature norm where there is one, are
        checked on all rows at the minimiser; M is taken on trust.
      strong_convexity: mu >= 0, of the loss itself, on trust; l2 + mu must be positive.
      noise_stddev: noise per parameter of each release. None takes the least with which
        `max_releases` releases of max_forget rows each fit the budget
        (`accounting.capacity_noise`). With the default of 1 that is one request for all of them.
      start: the gradient norm of the mean objective that training and `polish_steps` may leave;
        where they leave more than this and a thousandth of q, that noise may not do.
      measured: charge the measured norm of grad F_R(w) where it is below q.
      paper_constants: charge 2 M m^2 (2 L)^2 / (lambda^3 n^2) at least, and add at least
        `accounting.classic_noise`.
      polish_steps: Newton steps on all rows that `store` takes, while they lower the gradient.
      max_parameters: refuse more; the record takes 4 p^2 bytes.
      rebuild: how to remake the state of `tx`: scope "full-state". It reads retained rows.
      microbatch_size: rows differentiated at a time in Hessian products.
      entropy: bytes for the noise; replace it in tests only.

    Returns:
      A `records.StoringUnlearner`: an `Unlearner` with `store(params, opt_state, *, data)`.
      `forget_step` takes the rows to forget alone, weight 0, id -1 for padding, and a state that
      holds the sums; it returns parameters WITHOUT noise, in float32.

    Cost: p Hessian products over the m rows and p^3 / 3 operations, whatever n. `store`: the same
      over all rows. Memory: 8 p^2 bytes.

    Guarantees:
      The bound is not below the distance of the result to the retain-set minimiser.
      Where `store` was called, no row but those to forget is read (without `rebuild`).
      The noise of every release is fixed before the request, and the sum of what releases cost
      never exceeds the budget.

    Raises (forget, store):
      IdError, WrongStateError, MissingDataError, TrainingRecordError, CoupledLossError,
      RetainSetEmptyError, SolverError (not convex), AssumptionError (a row refutes the constants),
      BudgetExhaustedError (retrain); inputs untouched.

    References: Sekhari et al. 2021, Algorithms 1 and 2, Lemmas 3 to 5. Deviations: the stored
      gradient; n in place of n - m and L of the loss without its L2 term, which both follow from
      the mean form (`accounting.LossConstants`); exact Gaussian noise.
    """
    curvature = l2 + strong_convexity
    records.check_stored(loss_fn, l2, strong_convexity, noise_stddev, max_releases)
    constants.check()
    accounting.check_capacity(budget, num_examples)
    sums_at = kernels.loss_sums(loss_fn, microbatch_size=microbatch_size)
    penalty = records.Penalty(l2)
    inner_update = records.wrapped_update(tx, penalty)
    remaker = records.make_remaker(tx, loss_fn, rebuild, penalty)
    templates: list[Any] = []

    def objective_gradient(sums):
        return sums.gradient / sums.num_rows + l2 * sums.origin

    def solve(sums):
        damped = records.factorised(sums.hessian, scale=sums.num_rows, curvature=l2)
        return records.solve_damped(damped, objective_gradient(sums))

    def check_figures(figures):
        constants.check_rows(
            largest_gradient=float(figures.largest_gradient),
            largest_feature=float(figures.largest_feature),
        )

    gatherer = records.make_gatherer(
        loss_fn, num_examples=num_examples, l2=l2, check=check_figures,
        refine=lambda sums: sums.origin + solve(sums)[0], left=lambda sums: sums.start,
        polish_steps=polish_steps, features=constants.features, microbatch_size=microbatch_size,
    )  # fmt: skip
    distance_of = functools.partial(
        constants.newton_distance, curvature, paper_constants=paper_constants
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
            curvature=(l2, strong_convexity),
        )  # fmt: skip

    def bound_of(sums, solver):
        """The distance, its terms, and the gradient bound that it rests on."""
        sizes = {"num_forgotten": sums.num_gone, "num_retained": sums.num_rows}
        count = sums.num_rows + sums.num_gone
        slack = accounting.summation_slack(sums.gradient_norm_sum, num_rows=count) / sums.num_rows
        gradient = constants.gradient_bound(**sizes, start=sums.start + slack)
        if measured:
            gradient = min(gradient, float(np.linalg.norm(objective_gradient(sums))) + slack)
        distance = distance_of(**sizes, gradient=gradient, solver=solver + slack)
        rest = (solver + slack) / curvature
        terms = {"newton_error": max(distance - rest, 0.0), "solver": rest, "gradient": gradient}
        return distance, terms

    def init(params):
        remaker.check(params)
        templates[:] = [jax.eval_shape(lambda: params)]
        statistics = records.init_statistics(params, max_parameters=max_parameters)
        record = StoredNewtonRecord(
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
        records.check_update(opt_state, params, ids, StoredNewtonRecord, "stored_newton")
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
        matrix = (hessian - gone.hessian) / count + l2 * jnp.eye(origin.size)
        factor = jax.scipy.linalg.cho_factor(matrix)
        step = jax.scipy.linalg.cho_solve(factor, (gradient - gone.gradient) / count + l2 * origin)
        return records.landed(params, state, unravel(origin - step), left > 0)

    def checked(params, opt_state, ids, requester=None):
        begun = time.perf_counter()
        records.check_state(opt_state, StoredNewtonRecord, "stored_newton")
        ids, num_duplicates = records.validate_ids(ids, num_examples)
        record = opt_state.record
        records.check_participation(record.participation, ids)
        if templates:
            records.check_params(params, templates[0], "stored_newton")
        records.check_declaration(record.declaration, declaration(), "stored_newton")
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
            return Forgotten(params, opt_state, ForgetInfo.of("stored_newton", request))
        record, reader = opt_state.record, records.RowReader(data)
        with show_progress("forgetting", 2, show=progress) as advance:
            statistics = gatherer.stored(params, record, reader)
            advance(1)
            origin = records.unpack_sums(statistics)
            sums = origin.without(gatherer.removed(origin, params, ids, reader))
            records.check_convex(
                sums.hessian - sums.num_rows * strong_convexity * np.eye(len(sums.origin)),
                num_rows=sums.num_rows + sums.num_gone,
            )
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
        new_record = StoredNewtonRecord(
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
            measurements, method="stored_newton", paper=PAPER,
            epsilon=budget.epsilon, delta=budget.delta, prior_mu=charge.prior_mu,
            releases_covered=int(new_record.num_releases),
            **certificates.stored_sums(
                distance=distance, terms=parts, release=release, constants=constants,
                budget=budget, is_measured=measured,
                rebuilt=rebuild.assumption if rebuild else None,
                hessian_constant=(
                    f"Every loss has a {constants.hessian_lipschitz:g}-Lipschitz Hessian."
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
