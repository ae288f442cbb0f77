"""Unlearning by more noisy steps on the rows that stay (Chien et al. 2024 a, b).

Training is projected noisy SGD on a strongly convex objective, over public batches,

    x <- Pi_R(x - eta (g_t + l2 x) + s N(0, I)),    s = sqrt(2 eta) sigma,

g_t the sum of per-example gradients clipped to M, over the rows the step was scheduled with. Every
step contracts by c = 1 - eta l2. To forget U, K further steps run on the rows that stay.

How far U moved the model [D]. Couple training with and without U by their noise. A step with k_t
rows of U among n_t adds at most eta M k_t / n_t, so after T steps they are at most

    z = sum_t c^(T - t) eta M k_t / n_t                                                      (1)

apart, whatever the noise was. (Cyclic batches of b, for ever, and a row replaced instead of left
out: z = Z_B = 2 eta M / (b (1 - c^(n/b))), Chien et al. 2024 b [C].)

What K steps leave of it [D: `accounting.iteration_mu`, shifted divergence]. Both runs then take the
same steps with noise, and are no easier to tell apart than N(0, 1) and N(mu, 1),

    mu = (z / s) sqrt((1 - c^2) / (c^(-2 K) - 1)).                                           (2)

The published Renyi bound is twice alpha mu^2 / 2 [C, N]: `paper_constants=True`. Later requests
start from z c^K plus what (1) says of the new rows: distances add, while the Renyi divergences of
Langevin unlearning (2024 a, the full-batch case) double their order at every request.
"""

import functools
import math
import secrets
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key

from jaxunlearn import accounting, certificates, errors, kernels, records, transforms, tree
from jaxunlearn.progress import progress as show_progress
from jaxunlearn.types import (
    Budget,
    ForgetInfo,
    Forgotten,
    LossFn,
    Quote,
    Request,
    Status,
    Unlearner,
    UnlearnerState,
)
from jaxunlearn.unlearners.noisy_sgd._plans import (
    NoisySGDRecord,
    after,
    digest_of,
    logged,
    make_plan,
    same_settings,
    sources,
)
from jaxunlearn.unlearners.noisy_sgd._promises import (
    asymmetry_of,
    check_clip,
    check_curvature,
    check_run,
    check_symmetry,
    curvature_of,
    promise,
)
from jaxunlearn.unlearners.noisy_sgd._steps import inside, projected, widen

__all__ = ["NoisySGDRecord", "noisy_sgd"]


def noisy_sgd(
    loss_fn: LossFn,
    *,
    num_examples: int,
    batch_size: int,
    max_steps: int,
    l2: float,
    smoothness: float,
    gradient_clip: float,
    noise_stddev: float,
    key: Key[Array, ""],
    budget: Budget,
    learning_rate: float | None = None,
    radius: float = math.inf,
    cycle: int | None = None,
    paper_constants: bool = False,
    entropy: accounting.Entropy = secrets.token_bytes,
    progress: bool | None = None,
) -> Unlearner:
    """Projected noisy SGD whose `forget` runs as many noisy steps as the target needs.

    It is the optimizer too: the incoming updates are the mean of gradients clipped per example,

        kernels.clipped_grad(loss_fn, l2_clip_norm=gradient_clip, normalize_by=rows of the step),

    and `update` adds `l2 * params`, the rate, the noise and the projection. `forget` goes round the
    last `cycle` batches, without what is forgotten, until (2) certifies `budget`.

    Args:
      loss_fn: convex in the parameters; the mean of per-example losses, without L2; no key. With
        several outputs (softmax) its clipped gradients are no gradients, and no step contracts:
        `gradient_clip` has to be above every gradient then.
      num_examples: ids are dense in 0..num_examples-1.
      batch_size: the most rows a step may have.
      max_steps: the most steps a run may have, those of unlearning included.
      l2: > 0; strong convexity.
      smoothness: L >= 0, of the mean loss of any step, without L2.
      gradient_clip: M, of per-example gradients without L2.
      noise_stddev: sigma; each step adds sqrt(2 learning_rate) sigma per coordinate.
      key: for the noise of training, on which nothing rests: it may be known.
      budget: epsilon and delta of every release, and how many ids may ever be forgotten.
      learning_rate: eta <= 1 / (smoothness + l2); None is that.
      radius: R of the ball round zero that parameters are projected to; inf for none.
      cycle: steps of an epoch; None is ceil(num_examples / batch_size).
      paper_constants: as many steps as the published bound wants, with Z_B, twice the divergence
        and Mironov's conversion; whole epochs, batches that divide num_examples.
      entropy: bytes for the noise of unlearning; replace it in tests only.

    Returns:
      An `Unlearner` with the state of `optax.chain(optax.scale(-1.0), transforms.gaussian_noise)`,
      a key and a counter that no row has touched: scope "full-state". `forget_step` runs steps
      of one (S, B) window with the noise of training, which certifies nothing.

    Cost: `update` adds O(batch_size log batch_size), and the record 4 * max_steps * (batch_size +
      1) bytes. `forget`: K gradients of a batch in float64, and K draws of host noise; K grows with
      log(z / s) / (eta l2).

    Guarantees:
      The stated distance is not below that of training with and without the rows, coupled.
      The stated mu is not below that of the two laws after the steps.

    Raises (forget):
      IdError, WrongStateError (parameters outside the ball, too), MissingDataError,
      TrainingRecordError (an update above the clip, a step with other settings), CoupledLossError,
      SolverError (the loss, or the clipped loss, is not convex), ValueError (it is less smooth
      than was said), BudgetExhaustedError (max_forget, or max_steps: retrain); inputs untouched.

    >>> loss_fn = lambda w, batch: jnp.mean(jax.nn.softplus(-batch * w))
    >>> tx = noisy_sgd(loss_fn, num_examples=4, batch_size=2, max_steps=100, l2=0.25,
    ...     smoothness=0.25, gradient_clip=1.0, noise_stddev=0.05, key=jax.random.key(0),
    ...     budget=Budget(epsilon=1.0, delta=1e-5, max_forget=2))
    >>> data, w = np.ones(4, np.float32), jnp.float32(0.0)
    >>> state = tx.init(w)
    >>> for ids in np.array([[0, 1], [2, 3]], np.int32):
    ...     grad = jax.grad(loss_fn)(w, data[ids])
    ...     updates, state = tx.update(grad, state, w, ids=ids)
    ...     w = optax.apply_updates(w, updates)
    >>> tx.quote(w, state, [1]).num_steps    # 5 sqrt(0.75 / (4^K - 1)) <= 0.268
    5
    >>> tx.forget(w, state, [1], data=data).info.certificate.guarantee
    'certified'

    References: Chien, Wang, Chen and Li 2024 b, Theorem 3.2 and Corollary 3.4 (numbering recalled);
      deviations: a row leaves its sum, whose divisor stays, so that M stands where a replaced row
      costs 2 M; z is that of the logged batches, in any order; noise on a power-of-two grid.
    """
    if kernels.takes_key(loss_fn):
        raise errors.LossSignatureError("Expected loss_fn(params, batch): it has to be convex.")
    records.check_integers(batch_size=batch_size, max_steps=max_steps)
    epoch = -(-num_examples // batch_size) if cycle is None else cycle
    records.check_integers(cycle=epoch)
    setting = accounting.NoisySGD(
        strong_convexity=l2, smoothness=smoothness + l2, gradient_clip=gradient_clip,
        noise_stddev=noise_stddev, learning_rate=learning_rate, radius=radius,
        num_examples=num_examples if paper_constants else batch_size * epoch, batch_size=batch_size,
    )  # fmt: skip
    if not setting.contraction < 1:
        raise ValueError(f"Expected l2={l2} that contracts a step of {setting.rate} in float64.")
    rate = setting.rate
    digest = digest_of(setting)
    tx = optax.chain(optax.scale(-rate), transforms.gaussian_noise(setting.step_noise, key=key))
    inner_update = records.wrapped_update(tx, records.Penalty(l2))
    gradient = kernels.clipped_grad(loss_fn, l2_clip_norm=gradient_clip)
    templates: list[Any] = []
    loss_checked: list[bool] = []
    last: dict[str, float] = {}

    def mean_gradient(params, rows, ids, weights, num_rows):
        gone = (ids < 0) | (weights == 0)
        total = gradient(params, rows, is_padding_example=gone)
        return jax.tree.map(lambda g: g / jnp.maximum(num_rows, 1).astype(g.dtype), total)

    @jax.jit
    def descend(params, rows, ids, num_rows):
        grads = mean_gradient(params, rows, ids, jnp.ones(ids.shape), num_rows)
        return jax.tree.map(lambda p, g: p - rate * (g + l2 * p), params, grads)

    curvature = jax.jit(functools.partial(curvature_of, kernels.weighted_loss(loss_fn)))
    asymmetry = jax.jit(functools.partial(asymmetry_of, loss_fn, gradient_clip))

    def init(params):
        templates[:] = [jax.eval_shape(lambda: params)]
        inner = tree.copy(tx.init(params))
        record = NoisySGDRecord(
            participation=records.init_participation(num_examples),
            log=records.init_log(max_steps, batch_size, has_key=False, inner=inner),
            largest_update=jnp.zeros((), jnp.float32),
            carried_distance=jnp.zeros((), jnp.float32),
            carried_at=jnp.zeros((), jnp.int32),
            settings_digest=jnp.asarray(digest),
        )
        return UnlearnerState(inner, record)

    def update(updates, opt_state, params=None, *, batch=None, ids=None, key=None, **extra):
        del batch, key
        records.check_update(opt_state, params, ids, NoisySGDRecord, "noisy_sgd")
        records.check_logged_step(ids, None, batch_size, False)
        record = opt_state.record
        ids = None if ids is None else jnp.asarray(ids)
        step = record.participation.num_steps
        seen = records.observe(record.participation, ids, num_examples)
        overrun = jnp.where(step >= max_steps, int(Status.TOO_MANY_STEPS), 0).astype(jnp.int32)
        size = jnp.sqrt(tree.vdot(updates, updates)).astype(jnp.float32) / gradient_clip
        record = NoisySGDRecord(
            participation=seen._replace(status=seen.status | overrun),
            log=records.write_step(
                record.log, step, ids=ids, key=None, settings={},
                non_finite=~tree.all_finite(updates),
            ),
            largest_update=jnp.maximum(record.largest_update, size),
            carried_distance=record.carried_distance,
            carried_at=record.carried_at,
            settings_digest=same_settings(record, digest),
        )  # fmt: skip
        updates, inner = inner_update(updates, opt_state.inner, params, **extra)
        return inside(updates, params, radius), UnlearnerState(inner, record)

    def forget_step(params, state, rows, ids, weights):
        at = state.record.participation.num_steps + jnp.arange(ids.shape[0])
        source = sources(state.record.participation.num_steps, ids.shape[0], epoch, jnp)
        num_rows = state.record.log.step_num_rows[source]

        def body(carry, step):
            params, inner = carry
            updates, inner = inner_update(mean_gradient(params, *step), inner, params)
            new_params = optax.apply_updates(params, inside(updates, params, radius))
            return tree.match_weak_types((new_params, inner), carry), None

        steps = (rows, jnp.asarray(ids), jnp.asarray(weights), num_rows)
        (new_params, inner), _ = jax.lax.scan(body, (params, state.inner), steps)
        kept = jnp.where(steps[2] != 0, steps[1], -1).astype(jnp.int32)
        full = at[-1] >= max_steps
        record = logged(state.record, at, kept, num_rows)
        return records.finished(
            new_params, inner,
            record._replace(settings_digest=same_settings(record, digest)),
            jnp.where(full, int(Status.TOO_MANY_STEPS), 0).astype(jnp.int32),
            num_steps=jnp.asarray(len(kept), jnp.int32),
        )  # fmt: skip

    def checked(params, opt_state, ids, requester=None):
        begun = time.perf_counter()
        records.check_state(opt_state, NoisySGDRecord, "noisy_sgd")
        ids, num_duplicates = records.validate_ids(ids, num_examples)
        record = opt_state.record
        records.check_participation(record.participation, ids)
        if templates:
            records.check_params(params, templates[0], "noisy_sgd")
        check_run(record, digest, params, radius)
        if ids.size:
            total = len(records.forgotten_ids(record.participation)) + len(ids)
            accounting.check_request(budget, total, 0)
            check_clip(float(record.largest_update))
        return Request(ids, num_duplicates, begun, requester)

    def planned(params, record, ids):
        plan = make_plan(
            setting, record, ids, budget, tree.num_parameters(params), epoch, paper_constants
        )
        room = max_steps - int(record.participation.num_steps)
        if len(plan.ids) > room:
            raise errors.BudgetExhaustedError(
                f"Expected at most {room} more steps (max_steps={max_steps}), got a request that "
                f"needs {len(plan.ids)}. Retrain on the retain set, or declare more steps."
            )
        return plan

    def check_batch(params, plan, reader):
        """Look at the first batch that still has a row."""
        ids = next((ids for ids in plan.ids if np.any(ids >= 0)), None)
        if ids is None:
            return
        rows = reader(ids)
        few = jax.tree.map(lambda leaf: leaf[ids >= 0][:8], rows)
        if not loss_checked:
            kernels.check_loss(loss_fn, params, few)
        with jax.enable_x64(True):
            wide = widen((params, rows))
            if not loss_checked:
                kernels.check_float64(loss_fn, wide[0], widen(few))
            lowest, highest = curvature(*wide, (ids >= 0).astype(np.float64))
            skew = asymmetry(*wide, ids >= 0)
        check_curvature(float(lowest), float(highest), smoothness)
        check_symmetry(float(skew), smoothness)
        loss_checked.append(True)

    def run(params, plan, reader):
        check_batch(params, plan, reader)
        release = None
        with (
            jax.enable_x64(True),
            show_progress("forgetting", len(plan.ids), show=progress) as advance,
        ):
            current = widen(params)
            for ids, num_rows in zip(plan.ids, plan.num_rows):
                current = descend(current, widen(reader(ids)), ids, np.int32(num_rows))
                release = accounting.add_grid_noise(
                    tree.flatten(current), noise_stddev=setting.step_noise, entropy=entropy
                )
                current = tree.split(projected(release.values, radius), params)
                advance(1)
        return tree.flatten(current), release

    def forget(params, opt_state, ids, *, data=None, requester=None):
        request = checked(params, opt_state, ids, requester)
        if not request.ids.size:
            return Forgotten(params, opt_state, ForgetInfo.of("noisy_sgd", request))
        record = opt_state.record
        plan = planned(params, record, request.ids)
        reader = records.RowReader(data)
        retained = np.setdiff1d(records.seen_ids(record.participation), request.ids)
        reader.prepare(retained, may_be_empty=True)
        begun = time.perf_counter()
        flat, release = run(params, plan, reader)
        last["seconds"] = (time.perf_counter() - begun) / len(plan.ids)
        new_params = tree.match_weak_types(tree.unflatten(flat, params), params)
        new_record = after(record, request.ids, plan, setting)
        measured = {
            "num_steps": len(plan.ids),
            "start_distance": plan.distance,
            "mu": plan.mu,
            "left_distance": float(new_record.carried_distance),
        }
        return certificates.concluded(
            request, (params, opt_state), (new_params, UnlearnerState(opt_state.inner, new_record)),
            measured, epsilon=budget.epsilon, delta=budget.delta, **promise(plan, release),
        )  # fmt: skip

    terms: dict[str, Any] = {
        "guarantee": "certified", "epsilon": budget.epsilon, "delta": budget.delta,
    }  # fmt: skip

    @records.refusals_as_quotes(**terms)
    def quote(params, opt_state, ids):
        ids = checked(params, opt_state, ids).ids
        steps = len(planned(params, opt_state.record, ids).ids) if ids.size else 0
        seconds = last.get("seconds")
        return Quote(
            **terms, num_forgotten=len(ids), feasible=True, reason="",
            num_steps=steps, num_gradients=steps,
            retrain_gradients=int(opt_state.record.participation.num_steps),
            memory_bytes=32 * tree.num_parameters(params),
            seconds=None if seconds is None else steps * seconds,
        )  # fmt: skip

    return Unlearner(init, update, forget, quote, forget_step)
