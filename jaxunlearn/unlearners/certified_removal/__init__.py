"""Certified removal by objective perturbation: noise once, in training, and a budget of residuals.

Guo, Goldstein, Hannun, van der Maaten 2020 (arXiv 1911.03030) train with b'w in the objective,

    L_b(w; D) = sum_D loss_i(w) + (l2 |D| / 2) ||w||^2 + b'w,      b ~ N(0, sigma^2 I), secret,

and remove rows by a Newton step on the others. What the step leaves, u = grad L_b(w; R), makes the
result the exact minimiser for b - u in place of b: as long as ||u|| fits what sigma covers, it
cannot be told from training without the rows. Nothing is added to the parameters at removal.
`unlearners.newton` adds noise to each release instead; its proof leaves no gap (see Guarantees).
"""

import functools
import secrets
import time
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int, UInt8, UInt32

from jaxunlearn import accounting, certificates, errors, kernels, records, tree
from jaxunlearn.progress import progress as show_progress
from jaxunlearn.types import (
    Budget,
    ForgetInfo,
    Forgotten,
    LossFn,
    Quote,
    Request,
    Unlearner,
    UnlearnerState,
)
from jaxunlearn.unlearners.certified_removal._promises import measurements, promise

__all__ = ["CertifiedRemovalRecord", "certified_removal"]

Bound = Literal["tight", "evaluated", "corollary_1", "worst_case"]


class CertifiedRemovalRecord(NamedTuple):
    """What the next deletion needs; never released: whoever knows b knows the rows.

    perturbation_words: b in float64, as pairs of 32-bit words.
    num_draws: 1 where b was drawn, 0 where `init` ran inside a trace and could not draw it.
    iterate_words: the last step's float64 result, of which the release is the rounding.
    release_digest: SHA-256 of the parameters last released; zeros before the first release.
    residual_words: the residual that the last release was charged with; published bounds add up.
    num_releases: releases so far.
    declaration: digest of the budget, the noise, its source and constants, as `init` knew them.
    """

    participation: records.Participation
    perturbation_words: UInt32[Array, "p 2"]
    num_draws: Int[Array, ""]
    iterate_words: UInt32[Array, "p 2"]
    release_digest: UInt8[Array, "32"]
    residual_words: UInt32[Array, "1 2"]
    num_releases: Int[Array, ""]
    declaration: UInt8[Array, "32"]


def certified_removal(
    tx: optax.GradientTransformation,
    loss_fn: LossFn,
    *,
    num_examples: int,
    l2: float,
    budget: Budget,
    noise_stddev: float,
    linear_model: accounting.LinearModel | None = None,
    bound: Bound | None = None,
    constants: accounting.LossConstants | None = None,
    one_vs_rest: bool = False,
    paper_constants: bool = False,
    num_rows: int | None = None,
    solver: kernels.Solver | None = None,
    rebuild: records.Rebuild | None = None,
    microbatch_size: int | None = None,
    entropy: accounting.Entropy = secrets.token_bytes,
    progress: bool | None = None,
) -> Unlearner:
    """Wrap `tx` so that training carries noise in its objective, and `forget` a residual budget.

        ||grad L_b(w + v; R)|| <= ||H v + grad L_b(w; R)|| + (gamma / 2) ||X|| ||(x_i'v)^2||

    `update` adds `l2 * params + b / num_rows` to the gradient. Train to a minimum. `forget` takes a
    Newton step on the rows that stay, bounds its residual, and refuses ("retrain", with a fresh
    `init`) where it exceeds what `noise_stddev` covers at the budget.

    Args:
      tx: the whole optimizer.
      loss_fn: convex in the parameters; the mean of per-example losses, without L2; no key.
      num_examples: ids are dense in 0..num_examples-1.
      l2: > 0; strong convexity of the mean objective.
      budget: epsilon and delta of the last release, and how many ids may ever be forgotten.
      noise_stddev: sigma of b, in the sum form of the loss above: 10 in the paper's experiments.
      linear_model: an `accounting.LinearModel`: one leaf, (d,) or (d, k), and gamma.
      bound: "tight", the one above, is the default with a linear model; "evaluated" takes the
        gradient at the result, the default without. For the paper's own step, and adding up from
        one removal to the next: "corollary_1", gamma ||X|| ||v|| ||X v|| (times max ||x_i|| / 2
        where a row is beyond 2), and "worst_case", (n - m) M ||v||^2 / 2 by `constants`, which are
        checked on all rows at the start. Where the paper's figures are meant, gamma is 1/4.
      constants: for "worst_case" alone.
      one_vs_rest: the loss is a sum over the k columns of one leaf: the classes' remainders are
        combined by the root of their squares; by their sum with `paper_constants`.
      paper_constants: also hold the residual to sigma epsilon / sqrt(2 ln(1.5 / delta)), which is
        less than the exact calibration for epsilon up to about ten; and Theorem 1 as printed.
      num_rows: rows that training runs on; None means num_examples.
      solver: `kernels.cg(...)` or `kernels.cholesky()`; None means cg(tol=1e-10, 1000 iterations).
      rebuild: how to remake the state of `tx`: scope "full-state".
      microbatch_size: rows differentiated at a time in Hessian products.
      entropy: bytes for b, drawn by `init`; call that outside of `jit`. Replace it in tests only.

    Returns:
      An `Unlearner`. `forget_step` takes all rows, leading axis num_examples, weight 0 for those to
      forget and id -1 for those absent; it steps in the dtype of the parameters.

    Cost: three gradients and two per solver iteration, over all rows, in float64.

    Guarantees:
      The bound is not below the norm of grad L_b at the float64 iterate that the release rounds.
      A release whose residual b does not cover is refused, and nothing changes.
      Theorem 3 takes the residual as a shift that does not depend on b. Here, as in the paper, it
      is a figure of the realised (w, b); the certificate lists that as assumed.
      One release is covered: two models with the same b, and the rows that they share, betray it.

    Raises (forget):
      IdError, WrongStateError, MissingDataError, TrainingRecordError, CoupledLossError,
      SolverError (not convex), AssumptionError (a row refutes the constants),
      BudgetExhaustedError (retrain); inputs untouched.

    References: Guo et al. 2020, Algorithm 2, Theorems 1 and 3, Corollaries 1 and 2. Deviations: the
      step stands on grad L_b(w; R), so that no residual is carried from one removal to the next;
      integral remainder; exact Gaussian; b on a grid, a uniform part of a grid step added.
    """
    kind: Bound = bound or ("tight" if linear_model else "evaluated")
    _check_options(loss_fn, l2, noise_stddev, kind, linear_model, constants)
    published = kind in ("corollary_1", "worst_case")
    features = linear_model.features if linear_model else None
    step_of = functools.partial(
        kernels.perturbed_step, loss_fn, l2=l2, features=features, one_vs_rest=one_vs_rest,
        published=published, microbatch_size=microbatch_size,
        row_features=constants.features if constants and kind == "worst_case" else None,
        solver=solver or kernels.cg(tol=1e-10, max_iterations=1000),
    )  # fmt: skip
    step, take_step = step_of(), jax.jit(step_of())
    gram_of = jax.jit(kernels.feature_gram(features or (lambda rows: rows)))
    penalty = records.Penalty(l2)
    inner_update = records.wrapped_update(tx, penalty)
    remaker = records.make_remaker(tx, loss_fn, rebuild, penalty)
    limit = np.inf
    if paper_constants:
        limit = accounting.removal_budget(
            noise_stddev=noise_stddev, epsilon=budget.epsilon, delta=budget.delta,
            paper_constants=True,
        )  # fmt: skip
    rows_trained = num_examples if num_rows is None else num_rows
    loss_checked: list[bool] = []
    templates: list[Any] = []

    def declaration():
        return records.declare(
            num_examples=num_examples, rows_trained=rows_trained, budget=budget, l2=l2,
            noise=(noise_stddev, accounting.source_of(entropy)), constants=constants,
        )  # fmt: skip

    def init(params):
        remaker.check(params)
        templates[:] = [jax.eval_shape(lambda: params)]
        count = tree.num_parameters(params)
        words, drawn = jnp.zeros((count, 2), jnp.uint32), not _is_traced(params)
        if drawn:
            noise = accounting.objective_noise(count, noise_stddev=noise_stddev, entropy=entropy)
            words = records.pack_float64(noise)
        record = CertifiedRemovalRecord(
            participation=records.init_participation(num_examples),
            perturbation_words=words,
            num_draws=jnp.full((), int(drawn), jnp.int32),
            iterate_words=jnp.zeros((count, 2), jnp.uint32),
            release_digest=jnp.zeros((32,), jnp.uint8),
            residual_words=jnp.zeros((1, 2), jnp.uint32),
            num_releases=jnp.zeros((), jnp.int32),
            declaration=declaration(),
        )
        return UnlearnerState(inner=remaker.fresh(params), record=record)

    def update(updates, opt_state, params=None, *, batch=None, ids=None, key=None, **extra):
        del batch, key
        records.check_update(opt_state, params, ids, CertifiedRemovalRecord, "certified_removal")
        record = opt_state.record
        ids = None if ids is None else jnp.asarray(ids)
        participation = records.observe(record.participation, ids, num_examples)
        shift = perturbation_in(record, params)
        pushed = jax.tree.map(lambda g, b: g + (b / rows_trained).astype(g.dtype), updates, shift)
        updates, inner = inner_update(pushed, opt_state.inner, params, **extra)
        return updates, UnlearnerState(inner, record._replace(participation=participation))

    def perturbation_in(record, params):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        return ravel_pytree(wide)[1](records.as_float32(record.perturbation_words))

    def forget_step(params, state, rows, ids, weights):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        shift = perturbation_in(state.record, params)
        moved, solution, _ = step(wide, shift, rows, ids, weights)
        solved = ~solution.negative_curvature & jnp.isfinite(solution.residual_norm)
        return records.landed(params, state, moved, solved)

    def checked(params, opt_state, ids, requester=None):
        begun = time.perf_counter()
        records.check_state(opt_state, CertifiedRemovalRecord, "certified_removal")
        ids, num_duplicates = records.validate_ids(ids, num_examples)
        record = opt_state.record
        records.check_participation(record.participation, ids)
        if templates:
            records.check_params(params, templates[0], "certified_removal")
        records.check_declaration(record.declaration, declaration(), "certified_removal")
        if not int(record.num_draws):
            raise errors.TrainingRecordError(
                "Expected an init that drew the noise of the objective, got one that ran inside "
                "jit. Call init eagerly and train again."
            )
        total = len(records.forgotten_ids(record.participation)) + len(ids)
        if ids.size:
            accounting.check_request(budget, total, 0)
        return Request(ids, num_duplicates, begun, requester)

    def check_once(params, batch):
        if loss_checked:
            return
        few = jax.tree.map(lambda leaf: leaf[batch.weights > 0][:8], batch.rows)
        kernels.check_loss(loss_fn, params, few)
        with jax.enable_x64(True):
            kernels.check_float64(loss_fn, *records.widen((params, few)))
        loss_checked.append(True)

    def take(params, record, batch):
        """The float64 result, its figures, the solver's iterations and a bound of ||X||."""
        start = records.last_iterate(params, record.iterate_words, record.release_digest)
        shift = tree.split(records.unpack_float64(record.perturbation_words), params)
        with jax.enable_x64(True):
            wide = records.widen((start, shift, *batch))
            moved, solution, figures = take_step(*wide)
            records.check_solution(solution, moved)
            norm = None
            if features:
                gram = jax.device_get(gram_of(wide[2], jnp.asarray(wide[3] >= 0, float)))
                norm = accounting.spectral_norm_bound(gram, num_rows=num_examples)
            figures = kernels.PerturbedFigures(*(leaf.item() for leaf in jax.device_get(figures)))
        return tree.flatten(moved), figures, int(solution.num_iterations), norm

    def forget(params, opt_state, ids, *, data=None, requester=None):
        request = checked(params, opt_state, ids, requester)
        ids, record = request.ids, opt_state.record
        if not ids.size:
            return Forgotten(params, opt_state, ForgetInfo.of("certified_removal", request))
        with show_progress("forgetting", 2, show=progress) as advance:
            reader = records.RowReader(data)
            batch = records.all_rows(reader, record.participation, ids, num_examples)
            check_once(params, batch)
            advance(1)
            flat, figures, iterations, norm = take(params, record, batch)
            advance(1)
        carried = float(records.unpack_float64(record.residual_words)[0])
        begins = not int(record.num_releases) or not _is_release(params, record)
        parts = accounting.perturbed_residual(
            figures, l2=l2, bound=kind, model=linear_model, constants=constants,
            feature_norm=norm, carried=None if begins else carried,
            one_vs_rest=one_vs_rest, paper_constants=paper_constants,
        )  # fmt: skip
        residual = sum(parts.values())
        if not np.isfinite(residual):
            raise errors.NonFiniteError("The residual is not finite; nothing was released.")
        charge = accounting.charge_release(
            0, budget=budget, distance=residual, noise_stddev=noise_stddev, dimension=len(flat)
        )
        if residual > limit:
            raise errors.BudgetExhaustedError(
                f"Expected a residual within sigma epsilon / c = {limit:.4g}, got {residual:.4g}. "
                "Nothing was released: retrain on the retain set, from a fresh init."
            )
        covered = noise_stddev * accounting.certified_mu(
            epsilon=budget.epsilon, delta=budget.delta, dimension=len(flat)
        )
        new_params = tree.unflatten(flat, params)
        inner = remaker.after(new_params, reader, opt_state, ids)
        new_record = CertifiedRemovalRecord(
            participation=records.bury(record.participation, ids),
            perturbation_words=record.perturbation_words,
            num_draws=record.num_draws,
            iterate_words=records.pack_float64(flat),
            release_digest=records.digest_leaf(new_params),
            residual_words=records.pack_float64(np.array([residual])),
            num_releases=record.num_releases + 1,
            declaration=record.declaration,
        )
        budgets = {
            "budget_spent": charge.spent_units / accounting.BUDGET_UNITS,
            "residual_budget": min(limit, covered),
            "solver_iterations": iterations,
        }
        return certificates.concluded(
            request, (params, opt_state), (new_params, UnlearnerState(inner, new_record)),
            measurements(figures, parts, l2) | budgets,
            epsilon=budget.epsilon, delta=budget.delta,
            **promise(
                residual, parts, dimension=len(flat), noise_stddev=noise_stddev,
                rng=accounting.source_of(entropy), bound=kind, one_vs_rest=one_vs_rest,
                constants=constants, rebuild=rebuild,
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
        return Quote(
            **terms, num_forgotten=len(ids), feasible=True, num_steps=1,
            reason="unless the residual exceeds what the noise of training covers",
            num_gradients=8 + 2 * tree.num_parameters(params),
            retrain_gradients=int(opt_state.record.participation.num_steps),
            memory_bytes=80 * tree.num_parameters(params),
        )  # fmt: skip

    return Unlearner(init, update, forget, quote, forget_step)


def _is_traced(params) -> bool:
    """Whether these are a trace's parameters, which have no values."""
    try:
        np.asarray(jnp.ravel(jax.tree.leaves(params)[0])[:0])
    except jax.errors.TracerArrayConversionError:
        return True
    return False


def _is_release(params, record) -> bool:
    return tree.digest_bytes(params) == np.asarray(record.release_digest).tobytes()


def _check_options(loss_fn, l2, noise_stddev, bound, linear_model, constants):
    """Refuse a bad configuration at the factory."""
    if not (l2 > 0 and np.isfinite(l2)):
        raise ValueError(f"Expected l2={l2} > 0: without it the minimiser is not unique.")
    if not (noise_stddev > 0 and np.isfinite(noise_stddev)):
        raise ValueError(f"Expected noise_stddev={noise_stddev} > 0.")
    if bound not in ("tight", "evaluated", "corollary_1", "worst_case"):
        raise ValueError(f'Expected bound "tight", "evaluated", ..., got {bound!r}.')
    if bound in ("tight", "corollary_1") and linear_model is None:
        raise ValueError(f"Expected linear_model with bound={bound!r}.")
    if bound == "worst_case" and constants is None:
        raise ValueError('Expected constants with bound="worst_case".')
    if constants is not None:
        constants.check()
    if kernels.takes_key(loss_fn):
        raise errors.LossSignatureError(
            "Expected loss_fn(params, batch): a minimiser has no key. Evaluate the model "
            "deterministically, or use unlearners.replay."
        )
