"""Remaking the optimizer's state from released parameters and the retain set, and nothing else.

What `forget` releases as parameters is certified; the optimizer state that belongs to them need not
be corrected and noised as well. It is a function of those parameters, of the rows that stay and of
public figures, so that whatever holds for the parameters holds for the state too (post-processing).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, Key, PyTree

from jaxunlearn import errors, kernels, tree
from jaxunlearn.records.curvature import Curvature
from jaxunlearn.records.ids import validate_ids
from jaxunlearn.records.log import AnyArray, set_settings
from jaxunlearn.records.options import check_integers
from jaxunlearn.records.replay import Penalty, wrapped_update
from jaxunlearn.records.rows import RowReader
from jaxunlearn.records.rules import Context, Rule, Rules, check_states, remake, take_rules
from jaxunlearn.types import Batch, LossFn, Params


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rebuild:
    """How to remake a state; public, and fixed before any request.

    key: a typed key; chooses the rows, their order, and the keys of a loss that takes one.
    batch_size: rows of a mini-batch, as in training: second moments depend on it.
    num_batches: mini-batches whose gradients are taken, fewer where rows run out.
    rules: for states of types that the library does not know. They go before those of
      `records.register_state`, of which a `Rebuild` takes what is registered as it is made.
    taken: all of these together.
    """

    key: Key[Array, ""]
    batch_size: int = 128
    num_batches: int = 16
    rules: Mapping[type, Rule] = dataclasses.field(default_factory=dict)
    taken: Rules = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "taken", take_rules(self.rules))
        check_integers(batch_size=self.batch_size, num_batches=self.num_batches)
        if not jnp.issubdtype(jnp.result_type(self.key), jax.dtypes.prng_key):
            raise TypeError("Expected a typed key, jax.random.key(...).")

    @property
    def assumption(self) -> str:
        """What a certificate has to say, whose promise covers a state remade in this way."""
        own = f", and rules of its own ({'; '.join(self.taken.own)})" if self.taken.own else ""
        return (
            "The optimizer state is remade from the released parameters and the retained rows, and "
            "adds nothing to epsilon if what else it is made from depends on no row: the number of "
            "updates, the optimizer with its schedule and the hyperparameters that were set from "
            f"outside (inject_hyperparams), and key, batch_size={self.batch_size} and "
            f"num_batches={self.num_batches} of the rebuild{own}."
        )


class Sample(NamedTuple):
    """Mini-batches of retained rows; the first `num_filled` hold rows, the others padding."""

    rows: Batch
    ids: Int[AnyArray, "k b"]
    num_filled: Int[AnyArray, ""]


class Rebuilder(NamedTuple):
    """What `make_rebuild` returns.

    check: (params), raises `UnknownStateError`; it looks at shapes alone.
    again: (params, reader, retained_ids, *, num_steps, settings=None) -> state.
    """

    check: Callable[[Params], None]
    again: Callable[..., optax.OptState]


def rebuild(
    tx: optax.GradientTransformation,
    loss_fn: LossFn,
    params: Params,
    data: Any,
    retained_ids: Any,
    *,
    num_steps: int,
    key: Key[Array, ""],
    batch_size: int = 128,
    num_batches: int = 16,
    l2: float | None = None,
    l2_mask: PyTree | None = None,
    settings: Mapping[str, Any] | None = None,
    rules: Mapping[type, Rule] | None = None,
) -> optax.OptState:
    """The state of `tx` after `num_steps` updates with retained gradients, parameters held.

    With E g and E g^2 the mean, and the mean square of each entry, of the gradients of mini-batches
    of retained rows at `params`, `tx.update` runs `num_steps` times from `tx.init(params)` on
    gradients E g + d, E g - d, E g + d, .., d = sqrt(E g^2 - (E g)^2), once more on those in the
    other order, and the state is the mean of both. So moments carry the bias of `num_steps` steps,

        m = (1 - b1^T) E g,    v = (1 - b2^T) E g^2,    trace = (1 - mu^T) / (1 - mu) E g,

    which the bias correction by the public counter takes away, free of the noise of single batches;
    counters, schedules, accumulators of `MultiSteps` and keys stand where the schedule has them. A
    driven L-BFGS memory would be empty, since the parameters do not move: its pairs are (s, H s)
    for conjugate steps s on the sampled rows. A line search starts afresh.

    Near a minimiser this is close to what training would have left. Far from one it knows how large
    gradients are and not which steps were just taken: of softmax regression on digits after 310
    to 480 steps of 32 rows, the next step of RMSProp was 0.16 to 0.23 from the counterfactual's (a
    fresh state: 2.0 to 2.2), and that of momentum 1.5 (fresh: 0.7). To keep one part fresh, pass
    `rules={optax.TraceState: records.as_fresh}`; `audits.state_alignment` measures.

    Args:
      tx: the whole optimizer, any nesting.
      loss_fn: the mean of per-example losses, without L2; it may take a key.
      params: the released parameters.
      data: `data[ids]`, or a pytree of arrays; only rows of `retained_ids` are read.
      retained_ids: the retain set, in any order.
      num_steps: updates so far; public.
      key, batch_size, num_batches, rules: as in `Rebuild`.
      l2, l2_mask: as the unlearner had them.
      settings: hyperparameters that were set from outside, as `records.get_settings` gives them;
        public too. None takes those of `tx`.

    Returns:
      A state with the avals of `tx.init(params)`. A pure function of the arguments and of the rules
      that are registered when it is called, on one device and version bit for bit.

    Cost: `num_batches` gradients, 2 `num_steps` calls of `tx.update`, and m + 1 Hessian products
      over the sample for a memory of m pairs. Memory: the sampled rows, five parameter counts and
      three states.

    Raises:
      UnknownStateError: a part of the state that no rule knows, by name.
      RetainSetEmptyError, MissingDataError, IdError, NonFiniteError.

    References: the project's own; the moments are the expectations in Kingma and Ba 2015, section
      3, equation (4), for gradients that do not move.

    >>> loss = lambda w, batch: jnp.mean(0.5 * (w - batch) ** 2)
    >>> state = rebuild(
    ...     optax.trace(0.5), loss, jnp.float32(0.0), np.float32([1.0, 1.0, 9.0]), [0, 1],
    ...     num_steps=3, key=jax.random.key(0),
    ... )
    >>> state.trace  # -1 (1 + 1/2 + 1/4)
    Array(-1.75, dtype=float32)
    """
    options = Rebuild(key=key, batch_size=batch_size, num_batches=num_batches, rules=rules or {})
    rebuilder = make_rebuild(tx, loss_fn, options, Penalty(l2, l2_mask))
    reader = RowReader(data)
    return rebuilder.again(params, reader, retained_ids, num_steps=num_steps, settings=settings)


def make_rebuild(
    tx: optax.GradientTransformation, loss_fn: LossFn, options: Rebuild, penalty: Penalty
) -> Rebuilder:
    """`rebuild` for one optimizer, compiled once for all requests."""
    drive = jax.jit(_make_drive(tx, loss_fn, options, penalty))
    init = optax.with_extra_args_support(tx).init
    words = [int(word) for word in np.ravel(jax.random.key_data(options.key))]

    def check(params):
        check_states(jax.eval_shape(init, params), options.taken)

    def again(params, reader: RowReader, retained_ids, *, num_steps: int, settings=None):
        check(params)
        check_integers(0, num_steps=num_steps)
        ids, _ = validate_ids(retained_ids, np.iinfo(np.int32).max)
        sample = _draw(reader, ids, words, options)
        settings = dict(settings or {})
        inner, failed = drive(params, sample, np.int32(num_steps), settings, options.key)
        if bool(failed):
            raise errors.NonFiniteError(
                "Rebuilding the optimizer state from retained gradients gave NaN; nothing was "
                "released. Do the optimizer and these parameters train at all?"
            )
        return inner

    return Rebuilder(check, again)


def _make_drive(tx, loss_fn, options: Rebuild, penalty: Penalty):
    """(params, sample, num_steps, settings, key) -> (state, failed); pure, for `jax.jit`."""
    update = wrapped_update(tx, penalty)
    init = optax.with_extra_args_support(tx).init
    product = kernels.hvp(loss_fn, microbatch_size=options.batch_size)
    moments_of = _make_moments(loss_fn)
    keyed = kernels.takes_key(loss_fn)

    def drive(params, sample: Sample, num_steps, settings, key):
        weights = (sample.ids >= 0).astype(jnp.float32)
        keys = None
        if keyed:
            batch_keys = jax.random.split(key, options.num_batches)
            keys = jax.vmap(kernels.example_keys)(batch_keys, jnp.maximum(sample.ids, 0))
        batches = (sample.rows, weights, keys)
        value, mean, spread = moments_of(params, batches, sample.num_filled)
        fresh = set_settings(init(params), settings)

        def run(sign):
            def step(t, inner):
                side = jnp.where(t % 2 == 0, sign, -sign)
                grads = jax.tree.map(lambda m, d: (m + side * d).astype(m.dtype), mean, spread)
                change = lambda p: jax.tree.map(jnp.subtract, p, params)
                value_fn = lambda p: value + tree.vdot(grads, change(p)).astype(value.dtype)
                extra = {"value": value, "grad": grads, "value_fn": value_fn}
                return update(grads, set_settings(inner, settings), params, **extra)[1]

            return jax.lax.fori_loop(0, num_steps, step, fresh)

        both = jax.lax.map(run, jnp.array([1.0, -1.0]))
        driven = tree.match_weak_types(jax.tree.map(_middle, both), fresh)
        flat = lambda stack: jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stack)
        rows, kept, row_keys = flat(batches)
        curvature = Curvature(
            params=params,
            gradient=penalty.gradient(mean, params),
            product=lambda v: penalty.gradient(
                product(params, rows, v, weights=kept, keys=row_keys), v
            ),
        )
        inner = remake(driven, fresh, Context(num_steps, curvature), options.taken)
        inner = set_settings(tree.match_weak_types(inner, fresh), settings)
        # Infinity is what a fresh line search holds for a value that it does not know.
        nans = [
            jnp.any(jnp.isnan(leaf)) for leaf in jax.tree.leaves(inner) if tree.is_inexact(leaf)
        ]
        return inner, jnp.any(jnp.array(nans, bool))

    return drive


def _make_moments(loss_fn: LossFn):
    """(params, batches, num_filled) -> mean loss, and mean and spread of the batches' gradients."""
    gradient = kernels.weighted_grad(loss_fn, has_info=True)
    like = lambda tree_, params: jax.tree.map(lambda x, p: x.astype(p.dtype), tree_, params)

    def moments(params, batches, num_filled):
        wide = jax.tree.map(
            lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params
        )

        def welford(i, carry):
            value, mean, square = carry
            rows, weights, keys = jax.tree.map(lambda leaf: leaf[i], batches)
            grads, info = gradient(params, rows, weights, keys=keys)
            gap = jax.tree.map(lambda g, m: g - m, grads, mean)
            mean = jax.tree.map(lambda m, d: m + d / (i + 1), mean, gap)
            square = jax.tree.map(lambda s, d: s + d * d * (i / (i + 1)), square, gap)
            return value + (info.value - value) / (i + 1), mean, square

        start = (jnp.zeros((), jnp.result_type(float)), wide, wide)
        shape = jax.eval_shape(lambda: welford(0, start))
        start = jax.tree.map(lambda leaf, aval: leaf.astype(aval.dtype), start, shape)
        value, mean, square = jax.lax.fori_loop(0, num_filled, welford, start)
        spread = jax.tree.map(lambda s: jnp.sqrt(s / num_filled), square)
        return value, like(mean, params), like(spread, params)

    return moments


def _middle(pair):
    """The mean of the two runs; what is no average is the same in both."""
    return 0.5 * pair[0] + 0.5 * pair[1] if tree.is_inexact(pair) else pair[0]


def _draw(reader: RowReader, ids: np.ndarray, words: list[int], options: Rebuild) -> Sample:
    """Mini-batches of as many retained rows as fit, in an order that the key's words choose."""
    if not ids.size:
        raise errors.RetainSetEmptyError(
            "Expected at least one retained row to take gradients from. Use tx.init instead."
        )
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
    chosen = order.permutation(ids)[: options.batch_size * options.num_batches]
    num_filled = -(-len(chosen) // options.batch_size)
    table = np.full((options.num_batches, options.batch_size), -1, np.int32)
    for row, part in zip(table, np.array_split(chosen, num_filled)):
        row[: len(part)] = part
    return Sample(rows=reader(table), ids=table, num_filled=np.asarray(num_filled, np.int32))
