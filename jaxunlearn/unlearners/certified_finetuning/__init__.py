"""Certified noisy fine-tuning for any model (Koloskova et al. 2025): no convexity, only clips.

What the model knew of the forget set U is in its parameters x alone. Clip them to a ball, and run T
noisy steps on the rows that stay: two runs from any two starts become hard to tell apart.

    gradient clipping:  x_0 = Pi_(C_0)(x),   x <- (1 - gamma l2) x - gamma Pi_(C_1)(g_t) + s N(0, I)
    model clipping:     x <- Pi_(C_2)(x - gamma (g_t + l2 x)) + s N(0, I)

with g_t a mean gradient of retained rows, whatever it is. Clipped gradients part two runs by at
most 2 gamma C_1 a step, so with c = 1 - gamma l2 [D: `accounting.finetuning`]

    mu = (2 C_0 c^T + 2 gamma C_1 (1 + .. + c^(T-1))) / (s sqrt(1 + c^2 + .. + c^(2 (T-1)))),

and model clipping loses delta step by step by the hockey-stick recursion of
`accounting.hockey_stick` [D; C]. The noise is calibrated by the exact Gaussian curve at mu. The
published code converts a Renyi epsilon as if it were the same at every order: what it logs as 1.004
is 6.57 [C, N], and without l2 it adds half the variance that its own Renyi epsilon needs [C].
"""

import functools
import secrets
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key

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
from jaxunlearn.unlearners.certified_finetuning._promises import promise
from jaxunlearn.unlearners.certified_finetuning._tuning import (
    Tuning,
    batches_of,
    checked_steps,
    clipped,
    host_move,
    moved_by,
    start_radius_of,
    started,
)

__all__ = ["FinetuningRecord", "Tuning", "certified_finetuning"]


class FinetuningRecord(NamedTuple):
    """Who took part; nothing else is needed."""

    participation: records.Participation


def certified_finetuning(
    tx: optax.GradientTransformation,
    loss_fn: LossFn,
    *,
    num_examples: int,
    batch_size: int,
    tuning: Tuning,
    budget: Budget,
    key: Key[Array, ""],
    num_steps: int | None = None,
    rebuild: records.Rebuild | None = None,
    entropy: accounting.Entropy = secrets.token_bytes,
    progress: bool | None = None,
) -> Unlearner:
    """Wrap `tx` so that `forget` clips the model and fine-tunes it with noise on the retain set.

    Any model, any loss, any optimizer. Accuracy is lost to the clip and the noise, and won back by
    training on as usual afterwards, which costs no privacy (post-processing).

    Args:
      tx: the whole optimizer; it takes no part in `forget`.
      loss_fn: `loss_fn(params, batch[, key])`, the mean of per-example losses, without L2.
      num_examples: ids are dense in 0..num_examples-1.
      batch_size: rows of a fine-tuning step.
      tuning: rates, clips and L2 of the fine-tuning.
      budget: epsilon and delta of every release, and how many ids may ever be forgotten.
      key: a typed key, public; orders the batches, and goes to a loss that takes one.
      num_steps: T. None takes the number that needs the least noise (gradient clipping only).
      rebuild: how to remake the state of `tx` from the released parameters and the retain set:
        scope "full-state". None starts it afresh: scope "params".
      entropy: bytes for the noise; replace it in tests only.

    Returns:
      An `Unlearner`. The record takes two bits an example. `forget_step` clips the start and runs
      the steps of one (S, B) window without noise.

    Cost: `forget`: T gradients of a batch, and T draws of host noise; 32 bytes a parameter.

    Guarantees:
      Every release is (epsilon, delta)-close to the same fine-tuning from any other parameters that
      no forgotten row has touched, a retrained model say, and later ones are its post-processing.
      The noise does not depend on the request.

    Raises (forget):
      IdError, WrongStateError, MissingDataError, TrainingRecordError, CoupledLossError,
      RetainSetEmptyError, NonFiniteError, BudgetExhaustedError (max_forget); inputs are untouched.

    >>> tuning = Tuning(learning_rate=0.01)
    >>> budget = Budget(epsilon=1.0, delta=1e-5, max_forget=10)
    >>> round(tuning.noise(100, 10, budget), 3)    # 2 (1 + 100 * 0.01) / (0.26805 * sqrt(100))
    1.492

    References: Koloskova, Allouah, Jha, Guerraoui and Koyejo 2025, arXiv 2506.06985, gradient
      clipping and model clipping (theorem numbers not verified). Deviations: exact Gaussian
      calibration instead of the conversion of the published code; noise on a power-of-two grid.
    """
    num_steps = checked_steps(tuning, num_steps)
    records.check_integers(batch_size=batch_size)
    accounting.check_capacity(budget, num_examples)
    tuning.noise(num_steps, 1, budget)  # refuse here what cannot be
    inner_update = records.wrapped_update(tx, records.Penalty(None))
    rebuilder = (
        records.make_rebuild(tx, loss_fn, rebuild, records.Penalty(None)) if rebuild else None
    )
    gradient, keyed = kernels.weighted_grad(loss_fn), kernels.takes_key(loss_fn)
    words = [int(word) for word in np.ravel(jax.random.key_data(key))]
    templates: list[Any] = []
    loss_checked: list[bool] = []
    last: dict[str, float] = {}
    noise_of = functools.cache(lambda dimension: tuning.noise(num_steps, dimension, budget))

    def slope(params, rows, ids, weights, step):
        keys = kernels.example_keys(jax.random.fold_in(key, step), ids) if keyed else None
        return gradient(params, rows, weights, keys=keys)

    take = jax.jit(slope)

    def fresh_inner(params):
        return tree.copy(optax.with_extra_args_support(tx).init(params))

    def init(params):
        if rebuilder:
            rebuilder.check(params)
        templates[:] = [jax.eval_shape(lambda: params)]
        record = FinetuningRecord(records.init_participation(num_examples))
        return UnlearnerState(fresh_inner(params), record)

    def update(updates, opt_state, params=None, *, batch=None, ids=None, key=None, **extra):
        del batch, key
        records.check_update(opt_state, params, ids, FinetuningRecord, "certified_finetuning")
        ids = None if ids is None else jnp.asarray(ids)
        seen = records.observe(opt_state.record.participation, ids, num_examples)
        updates, inner = inner_update(updates, opt_state.inner, params, **extra)
        return updates, UnlearnerState(inner, FinetuningRecord(seen))

    def forget_step(params, state, rows, ids, weights):
        ids, weights = jnp.asarray(ids), jnp.asarray(weights)

        def body(current, step):
            index, row, row_ids, row_weights = step
            grads = slope(current, row, row_ids, row_weights, index)
            moved = moved_by(current, grads, tuning)
            return tree.match_weak_types(moved, current), None

        start = tree.match_weak_types(started(params, tuning), params)
        steps = (jnp.arange(ids.shape[0]), rows, ids, weights)
        new_params, _ = jax.lax.scan(body, start, steps)
        return records.finished(new_params, state.inner, state.record)

    def checked(params, opt_state, ids, requester=None):
        begun = time.perf_counter()
        records.check_state(opt_state, FinetuningRecord, "certified_finetuning")
        ids, num_duplicates = records.validate_ids(ids, num_examples)
        participation = opt_state.record.participation
        records.check_participation(participation, ids)
        if templates:
            records.check_params(params, templates[0], "certified_finetuning")
        if ids.size:
            total = len(records.forgotten_ids(participation)) + len(ids)
            accounting.check_request(budget, total, 0)
        return Request(ids, num_duplicates, begun, requester)

    def left_without(ids, participation):
        retained = np.setdiff1d(records.seen_ids(participation), ids)
        if not retained.size:
            raise errors.RetainSetEmptyError(
                "Expected a retained row to fine-tune on. Start afresh."
            )
        return retained

    def opened(data, retained, params):
        reader = records.RowReader(data)
        reader.prepare(retained)
        if not loss_checked:
            few = reader(retained[:8])
            kernels.check_loss(loss_fn, params, few, key=key if keyed else None)
            loss_checked.append(True)
        return reader

    def run(params, reader, retained):
        stddev = noise_of(tree.num_parameters(params))
        flat = clipped(tree.flatten(params), start_radius_of(tuning))
        release = None
        with show_progress("forgetting", num_steps, show=progress) as advance:
            for step, ids in enumerate(batches_of(retained, batch_size, num_steps, words)):
                here = tree.unflatten(flat, params)
                weights = (ids >= 0).astype(np.float32)
                grads = take(here, reader(ids), ids, weights, np.int32(step))
                moved = host_move(flat, tree.flatten(grads), tuning)
                release = accounting.add_grid_noise(moved, noise_stddev=stddev, entropy=entropy)
                flat = release.values
                advance(1)
        return release

    def forget(params, opt_state, ids, *, data=None, requester=None):
        request = checked(params, opt_state, ids, requester)
        if not request.ids.size:
            return Forgotten(params, opt_state, ForgetInfo.of("certified_finetuning", request))
        participation = opt_state.record.participation
        retained = left_without(request.ids, participation)
        reader = opened(data, retained, params)
        begun = time.perf_counter()
        release = run(params, reader, retained)
        last["seconds"] = time.perf_counter() - begun
        new_params = tree.match_weak_types(tree.unflatten(release.values, params), params)
        if rebuilder is None:
            inner = fresh_inner(new_params)
        else:
            done, settings = int(participation.num_steps), records.get_settings(opt_state.inner)
            inner = rebuilder.again(new_params, reader, retained, num_steps=done, settings=settings)
        record = FinetuningRecord(records.bury(participation, request.ids))
        new_state = UnlearnerState(tree.match_weak_types(inner, opt_state.inner), record)
        mu = tuning.shift(num_steps, release.noise_stddev, release.values.size, budget)
        measured = {"num_steps": num_steps, "noise_stddev": release.noise_stddev, "mu": mu}
        return certificates.concluded(
            request, (params, opt_state), (new_params, new_state), measured,
            epsilon=budget.epsilon, delta=budget.delta,
            **promise(tuning, mu, num_steps, release, rebuild),
        )  # fmt: skip

    terms: dict[str, Any] = {
        "guarantee": "certified", "epsilon": budget.epsilon, "delta": budget.delta,
    }  # fmt: skip

    @records.refusals_as_quotes(**terms)
    def quote(params, opt_state, ids):
        ids = checked(params, opt_state, ids).ids
        steps = num_steps if ids.size else 0
        if ids.size:
            try:
                left_without(ids, opt_state.record.participation)
            except errors.RetainSetEmptyError as error:
                return Quote(**terms, feasible=False, reason=str(error))
        return Quote(
            **terms, num_forgotten=len(ids), feasible=True, reason="", num_steps=steps,
            num_gradients=steps + (rebuild.num_batches if rebuild and steps else 0),
            retrain_gradients=int(opt_state.record.participation.num_steps),
            memory_bytes=32 * tree.num_parameters(params), seconds=last.get("seconds"),
        )  # fmt: skip

    return Unlearner(init, update, forget, quote, forget_step)
