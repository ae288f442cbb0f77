"""Certified removal by one Newton step, for L2-regularised convex losses.

Sekhari, Acharya, Kamath, Suresh 2021 (arXiv 2103.03279) and Guo, Goldstein, Hannun, van der Maaten
2020 (arXiv 1911.03030) take the same step,

    w + H^-1 delta,   H = sum_R hess loss_i(w) + |R| l2 I,   delta = sum_U (grad loss_i(w) + l2 w),

with U the forget set, R the retain set, and bound what is left before or after it. After it any
solver is certified: F_R is l2-strongly convex, so ||w - w*_R|| <= ||grad F_R(w)|| / l2.
"""

import functools
import secrets
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, UInt8, UInt32

from jaxunlearn import accounting, certificates, errors, kernels, records, tree
from jaxunlearn.progress import progress as show_progress
from jaxunlearn.records import all_rows, check_solution, last_iterate, pack_float64, widen
from jaxunlearn.types import (
    Budget,
    ForgetInfo,
    Forgotten,
    LossFn,
    Params,
    Quote,
    Request,
    Status,
    Unlearner,
    UnlearnerState,
)
from jaxunlearn.unlearners.newton._promises import measurements, promise

__all__ = ["NewtonRecord", "newton"]

DEFAULT_NOISE_STDDEV = 0.01


class NewtonRecord(NamedTuple):
    """What the next deletion needs; never released, since the iterate has no noise.

    iterate_words: the un-noised float64 iterate as pairs of 32-bit words, one row a parameter.
    release_digest: SHA-256 of the parameters last released; zeros before the first release.
    spent_units: total mu squared spent, of `accounting.BUDGET_UNITS`, rounded up.
    num_releases: releases so far.
    declaration: digest of the budget, the noise and the constants, as `init` knew them.
    """

    participation: records.Participation
    iterate_words: UInt32[Array, "p 2"]
    release_digest: UInt8[Array, "32"]
    spent_units: Int[Array, ""]
    num_releases: Int[Array, ""]
    declaration: UInt8[Array, "32"]


def newton(
    tx: optax.GradientTransformation,
    loss_fn: LossFn,
    *,
    num_examples: int,
    l2: float,
    budget: Budget,
    noise_stddev: float | None = None,
    solver: kernels.Solver | None = None,
    linear_model: accounting.LinearModel | None = None,
    worst_case: accounting.WorstCase | None = None,
    num_steps: int = 1,
    rebuild: records.Rebuild | None = None,
    microbatch_size: int | None = None,
    entropy: accounting.Entropy = secrets.token_bytes,
    progress: bool | None = None,
) -> Unlearner:
    """Wrap `tx` so that `forget` takes one Newton step to the retain-set minimiser and adds noise.

    `update` adds `l2 * params` to the gradient. Train to a small gradient norm. `forget` bounds the
    distance of the step to the minimiser, and refuses ("retrain") where it exceeds the budget.

    Args:
      tx: the whole optimizer, `optax.lbfgs()` say.
      loss_fn: convex in the parameters; the mean of per-example losses, without L2; no key.
      num_examples: ids are dense in 0..num_examples-1.
      l2: > 0; strong convexity of the objective mean_i loss_i + (l2 / 2) ||params||^2.
      budget: total epsilon and delta of all releases, and how many ids may ever be forgotten.
      noise_stddev: noise per parameter of each release, fixed before any request. None takes twice
        the least that certifies one release of `budget.max_forget` ids under `worst_case`, and
        0.01 without it: a distance that this does not cover is refused.
      solver: `kernels.cg(...)` or `kernels.cholesky()`; None means cg(tol=1e-8, 1000 iterations).
      linear_model: an `accounting.LinearModel`; bounds the residual by solver gap, curvature
        remainder and the measured residual of the start. Without it the result's is evaluated.
      worst_case: an `accounting.WorstCase`; charges Sekhari's bound instead of a measured one.
      num_steps: Newton steps; the second and later ones start from the retained gradient and
        square the error. More than one needs the evaluated residual (no model of either kind).
      rebuild: how to remake the state of `tx` from the released parameters and the retain set:
        scope "full-state". None starts it afresh: scope "params".
      microbatch_size: rows differentiated at a time in Hessian products; None takes all.
      entropy: bytes for the noise; replace it in tests only.

    Returns:
      An `Unlearner`. After `forget`, `inner` is `tx.init(released parameters)`, or with `rebuild`
      `records.rebuild(tx, loss_fn, released parameters, data, retained ids, num_steps=updates so
      far, settings=records.get_settings(opt_state.inner), l2=l2)`: of the state handed in, nothing
      but hyperparameters set from outside, which must be public (`tx.init` sets them anew).
      `forget_step` takes all rows, leading axis num_examples, weight 0 for those to forget and id
      -1 for those absent, and returns parameters WITHOUT noise.

    Cost: three gradients and about two per solver iteration, over all rows, in float64; `rebuild`
      adds its own.

    Guarantees:
      The bound is not below the true gradient norm of the retained objective at the iterate.
      The noise of every release is fixed before the request, and the sum of what releases cost
      never exceeds the budget.
      With `rebuild` the state is a function of released parameters, retained rows, the number of
      updates and hyperparameters set from outside alone.

    Raises (forget):
      IdError, WrongStateError, MissingDataError, TrainingRecordError, CoupledLossError,
      SolverError (the objective is not convex), BudgetExhaustedError (retrain); inputs untouched.
    """
    solver = solver or kernels.cg(tol=1e-8, max_iterations=1000)
    _check_options(loss_fn, l2, noise_stddev, worst_case, linear_model, num_steps)
    features = linear_model.features if linear_model else None
    make_step = functools.partial(
        kernels.newton_step, loss_fn, l2=l2, solver=solver, microbatch_size=microbatch_size
    )
    step = make_step()
    take_step, refine = jax.jit(step), jax.jit(make_step(refine=True))
    figures = kernels.removal_figures(
        loss_fn, l2=l2, features=features, microbatch_size=microbatch_size
    )
    measure = jax.jit(figures)
    gram_of = jax.jit(kernels.feature_gram(features or (lambda rows: rows)))
    penalty = records.Penalty(l2)
    inner_update = records.wrapped_update(tx, penalty)
    rebuilder = records.make_rebuild(tx, loss_fn, rebuild, penalty) if rebuild else None
    loss_checked: list[bool] = []
    templates: list[Params] = []
    last: dict[str, float] = {}

    def fresh_inner(params):
        return tree.copy(optax.with_extra_args_support(tx).init(params))

    def noise_of(dimension):
        if noise_stddev or worst_case is None:
            return noise_stddev or DEFAULT_NOISE_STDDEV
        return accounting.worst_case_noise(
            worst_case, l2=l2, budget=budget, num_examples=num_examples, dimension=dimension
        )

    noise_of(1)  # refuse here what cannot be

    def declaration():
        return records.declare(
            num_examples=num_examples, budget=budget, noise=noise_stddev,
            constants=worst_case,
            curvature=l2,
        )  # fmt: skip

    def remade_inner(params, reader, batch, opt_state):
        if rebuilder is None:
            return fresh_inner(params)
        retained, settings = batch.ids[batch.weights > 0], records.get_settings(opt_state.inner)
        done = int(opt_state.record.participation.num_steps)
        return rebuilder.again(params, reader, retained, num_steps=done, settings=settings)

    def init(params):
        if rebuilder:
            rebuilder.check(params)
        templates[:] = [jax.eval_shape(lambda: params)]
        count = tree.num_parameters(params)
        record = NewtonRecord(
            participation=records.init_participation(num_examples),
            iterate_words=jnp.zeros((count, 2), jnp.uint32),
            release_digest=jnp.zeros((32,), jnp.uint8),
            spent_units=jnp.zeros((), jnp.int32),
            num_releases=jnp.zeros((), jnp.int32),
            declaration=declaration(),
        )
        return UnlearnerState(inner=fresh_inner(params), record=record)

    def update(updates, opt_state, params=None, *, batch=None, ids=None, key=None, **extra):
        del batch, key
        records.check_update(opt_state, params, ids, NewtonRecord, "newton")
        record = opt_state.record
        ids = None if ids is None else jnp.asarray(ids)
        participation = records.observe(record.participation, ids, num_examples)
        updates, inner = inner_update(updates, opt_state.inner, params, **extra)
        return updates, UnlearnerState(inner, record._replace(participation=participation))

    def forget_step(params, state, rows, ids, weights):
        new_params, solution = step(params, rows, ids, weights)
        failed = jnp.where(solution.negative_curvature, int(Status.SOLVER_FAILED), 0)
        return records.finished(
            new_params, state.inner, state.record, failed.astype(jnp.int32),
            residual_norm=solution.residual_norm, num_iterations=solution.num_iterations,
        )  # fmt: skip

    def checked(params, opt_state, ids, requester=None):
        begun = time.perf_counter()
        records.check_state(opt_state, NewtonRecord, "newton")
        ids, num_duplicates = records.validate_ids(ids, num_examples)
        record = opt_state.record
        records.check_participation(record.participation, ids)
        if templates:
            records.check_params(params, templates[0], "newton")
        records.check_declaration(record.declaration, declaration(), "newton")
        total = len(records.forgotten_ids(record.participation)) + len(ids)
        if ids.size:
            accounting.check_request(budget, total, int(record.spent_units))
        return Request(ids, num_duplicates, begun, requester)

    def check_once(params, batch):
        if loss_checked:
            return
        few = jax.tree.map(lambda leaf: leaf[batch.weights > 0][:8], batch.rows)
        kernels.check_loss(loss_fn, params, few)
        with jax.enable_x64(True):
            kernels.check_float64(loss_fn, *widen((params, few)))
        loss_checked.append(True)

    def take(params, record, batch):
        with jax.enable_x64(True):
            wide = widen(tuple(batch))
            start = last_iterate(params, record.iterate_words, record.release_digest)
            start = widen(start)
            moved, solution = take_step(start, *wide)
            for _ in range(num_steps - 1):
                check_solution(solution, moved)
                moved, solution = refine(moved, *wide)
            check_solution(solution, moved)
            measured = jax.device_get(measure(start, moved, *wide))
        figures = kernels.RemovalFigures(*(leaf.item() for leaf in measured))
        return tree.flatten(moved), figures, int(solution.num_iterations)

    def feature_norm(batch):
        with jax.enable_x64(True):
            present = (batch.ids >= 0).astype(np.float64)
            gram = jax.device_get(gram_of(*widen((batch.rows, present))))
        return accounting.spectral_norm_bound(gram, num_rows=num_examples)

    def forget(params, opt_state, ids, *, data=None, requester=None):
        request = checked(params, opt_state, ids, requester)
        ids, record = request.ids, opt_state.record
        if not ids.size:
            return Forgotten(params, opt_state, ForgetInfo.of("newton", request))
        with show_progress("forgetting", 3, show=progress) as advance:
            reader = records.RowReader(data)
            batch = all_rows(reader, record.participation, ids, num_examples)
            check_once(params, batch)
            advance(1)
            flat, figures, iterations = take(params, record, batch)
            advance(1)
            norm = feature_norm(batch) if features else None
            bound = accounting.residual_bound(
                figures, l2=l2, model=linear_model or worst_case, feature_norm=norm
            )
            advance(1)
        last.update(iterations=iterations, bytes=2 * tree.num_bytes(batch.rows))
        stddev = noise_of(len(flat))
        charge = accounting.charge_release(
            int(record.spent_units),
            budget=budget,
            distance=bound.distance,
            noise_stddev=stddev,
            dimension=len(flat),
        )
        release = accounting.add_grid_noise(
            flat, noise_stddev=stddev, sensitivity=bound.distance, entropy=entropy
        )
        new_params = records.noisy_params(release.values, params)
        inner = remade_inner(new_params, reader, batch, opt_state)
        new_state = UnlearnerState(
            inner=tree.match_weak_types(inner, opt_state.inner),
            record=_next_record(record, ids, flat, new_params, charge),
        )
        return certificates.concluded(
            request, (params, opt_state), (new_params, new_state),
            measurements(figures, bound, iterations, stddev, charge),
            epsilon=budget.epsilon, delta=budget.delta, prior_mu=charge.prior_mu,
            releases_covered=int(new_state.record.num_releases),
            **promise(bound, release, rebuild),
        )  # fmt: skip

    terms: dict[str, Any] = {
        "guarantee": "certified",
        "epsilon": budget.epsilon,
        "delta": budget.delta,
    }

    @records.refusals_as_quotes(**terms)
    def quote(params, opt_state, ids):
        ids = checked(params, opt_state, ids).ids
        stops = "unless the measured residual exceeds what is left of the budget"
        return Quote(
            **terms,
            num_forgotten=len(ids),
            feasible=True,
            reason=stops if ids.size else "",
            num_steps=num_steps,
            num_gradients=8
            + 2 * num_steps * int(last.get("iterations", tree.num_parameters(params)))
            + (rebuild.num_batches if rebuild else 0),
            retrain_gradients=int(opt_state.record.participation.num_steps),
            memory_bytes=int(last.get("bytes", 0)) + 80 * tree.num_parameters(params),
        )

    return Unlearner(init, update, forget, quote, forget_step)


def _check_options(loss_fn, l2, noise_stddev, worst_case, linear_model, num_steps):
    """Refuse a bad configuration at the factory."""
    if not (l2 > 0 and np.isfinite(l2)):
        raise ValueError(f"Expected l2={l2} > 0: without it the minimiser is not unique.")
    if noise_stddev is not None and not (noise_stddev > 0 and np.isfinite(noise_stddev)):
        raise ValueError(f"Expected noise_stddev={noise_stddev} > 0.")
    if worst_case is not None and linear_model is not None:
        raise ValueError("Expected worst_case or linear_model, got both: choose one bound.")
    modelled = worst_case is not None or linear_model is not None
    records.check_integers(num_steps=num_steps)
    if num_steps > 1 and modelled:
        raise ValueError(f"Expected num_steps=1 with a model, got {num_steps}.")
    if kernels.takes_key(loss_fn):
        raise errors.LossSignatureError(
            "Expected loss_fn(params, batch): a minimiser has no key. Evaluate the model "
            "deterministically, or use unlearners.replay."
        )


def _next_record(record, ids, flat, new_params, charge) -> NewtonRecord:
    return NewtonRecord(
        participation=records.bury(record.participation, ids),
        iterate_words=pack_float64(flat),
        release_digest=jnp.asarray(np.frombuffer(tree.digest_bytes(new_params), np.uint8)),
        spent_units=jnp.asarray(charge.spent_units, jnp.int32),
        num_releases=record.num_releases + 1,
        declaration=record.declaration,
    )
