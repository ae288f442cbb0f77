"""A training step, and what goes along with it: tangents of its state, and shadow runs.

A shadow is the same training with one retained unit's weight at zero. Its distance to the run is
what the tangent of that unit predicts, so the two together measure how linear the run is.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxunlearn import kernels, tree
from jaxunlearn.records import (
    Penalty,
    Segment,
    StepFlags,
    loop_over_steps,
    set_settings,
    wrapped_update,
)
from jaxunlearn.types import Batch, LossFn, Params

NOT_MEASURED = -1.0
NOT_DRAWN, ENDED = -1, -2
_FLOOR = 0.03  # of the largest gradient so far: below it, a step's is rounding of larger terms


class Shadows(NamedTuple):
    """Shadow runs, and the figure they give.

    shadow_units: the unit each one leaves out; -1 until the first batch with a tracked unit, from
      which it is drawn, and -2 after a deletion, which ends all shadows and leaves their figure.
    shadow_states: (params, inner) of each.
    linearity: relative error of the predicted change, in parameters and in optimizer state, the
      largest of all shadows; -1 where nothing was measured.
    """

    shadow_units: Int[Array, " shadows"]
    shadow_states: tuple[tuple[Params, PyTree], ...]
    linearity: Float[Array, "2"]


class Along(NamedTuple):
    """What is carried along: stacks of tangents, which slots are live, shadows.

    gradient_squares: over all steps, the sums of ||incoming gradient - that of the loss||^2 and of
      ||that of the loss||^2.
    step_squares: the largest ||that of the loss||^2 so far, and the largest ratio of a single step.
    """

    tangents: kernels.Tangents
    slot_is_live: Bool[Array, " slots"]
    shadows: Shadows
    gradient_squares: Float[Array, "2"]
    step_squares: Float[Array, "2"]

    @property
    def gradient_gap(self) -> float:
        """Root of the ratio of the two sums, on the host: how far training left the loss."""
        gap, size = map(float, jax.device_get(self.gradient_squares))
        return math.sqrt(gap / size) if gap and size else math.inf * gap if gap else 0.0

    @property
    def step_gap(self) -> float:
        """The same of the single step where it was largest."""
        return math.sqrt(float(self.step_squares[1]))


class TracedStep(NamedTuple):
    """One step's rows. slots: of each row's unit; units: of each row, -1 for none.

    drawable: rows whose unit a new shadow may leave out.
    """

    rows: Batch
    weights: Float[Array, " b"]
    num_rows: Int[Array, ""]
    keys: Any
    units: Int[Array, " b"]
    slots: Int[Array, " b"]
    drawable: Bool[Array, " b"]


def init_along(tangents: kernels.Tangents, params, inner, *, num_shadows: int) -> Along:
    """Zero tangents, no shadow drawn."""
    copies = tuple(tree.copy((params, inner)) for _ in range(num_shadows))
    return Along(
        tangents=tangents,
        slot_is_live=jnp.ones((tangents[0].shape[0],), bool),
        shadows=Shadows(
            shadow_units=jnp.full((num_shadows or 1,), NOT_DRAWN, jnp.int32),
            shadow_states=copies,
            linearity=jnp.full((2,), NOT_MEASURED, jnp.float32),
        ),
        gradient_squares=jnp.zeros((2,), jnp.float32),
        step_squares=jnp.zeros((2,), jnp.float32),
    )


def end_shadows(shadows: Shadows) -> Shadows:
    """Shadows no longer followed: they were trained on what is forgotten. Their figure stays.

    The next step clears them; `without_states` does so at once.
    """
    return shadows._replace(shadow_units=jnp.full_like(shadows.shadow_units, ENDED))


def without_states(shadows: Shadows) -> Shadows:
    """The same with zeros in the place of what the shadows held."""
    cleared = jax.tree.map(_zeros, shadows.shadow_states)
    return shadows._replace(shadow_states=cleared)


def _zeros(leaf):
    """Zeros for floats; integers and keys as they are."""
    return jnp.zeros_like(leaf) if tree.is_inexact(leaf) else leaf


class Lockstep:
    """Steps of a run with what goes along.

    Args:
      tx, loss_fn, normalizer, penalty: the training.
      tangent_options: of `kernels.state_tangents`.
      slots: units -> slots of their tangents, where every unit that a shadow may leave out has one.
      own_slots: the first of slots that shadows have for themselves, where units have none.
    """

    def __init__(
        self,
        tx: optax.GradientTransformation,
        loss_fn: LossFn,
        *,
        normalizer: str,
        penalty: Penalty,
        slots: Callable[[Array], Array] | None = None,
        own_slots: int = 0,
        **tangent_options: Any,
    ):
        self.inner_update = wrapped_update(tx, penalty)
        self._init = optax.with_extra_args_support(tx).init
        self._gradient = kernels.weighted_grad(loss_fn, has_info=True)
        self._value = kernels.weighted_loss(loss_fn)
        self._is_kept = normalizer == "kept"
        self._slots, self._own_slots = slots, own_slots
        self._make: Callable[..., kernels.StateTangents] = functools.partial(
            kernels.state_tangents, loss_fn, normalizer=normalizer, **tangent_options
        )

    def tangents(self, extra: dict[str, Any] | None = None) -> kernels.StateTangents:
        """The kernel round this optimizer. extra: arguments of `tx.update` at this step."""
        given = extra or {}

        def apply(grads, inner, params):
            own = {"grad": grads} if given.get("grad") is not None else {}
            return self._applied(grads, inner, params, given | own)

        return self._make(apply)

    def _applied(self, grads, inner, params, extra):
        updates, inner = self.inner_update(grads, inner, params, **extra)
        return optax.apply_updates(params, updates), inner

    def is_smooth_at_rest(self, params) -> bool:
        """Whether the update has finite tangents at zero gradient and fresh state.

        Looks at shapes alone. Adam without eps_root has none.
        """
        zeros = lambda leaf: jnp.zeros(jnp.shape(leaf), jnp.result_type(leaf))
        with jax.ensure_compile_time_eval():
            still = jax.tree.map(zeros, params)
            fresh = self._init(still)
            kernel = self.tangents()

            def update(grads):
                extra = {"value": jnp.zeros(()), "grad": grads, "value_fn": lambda p: jnp.zeros(())}
                return kernel.take(*self._applied(grads, fresh, still, extra))

            try:
                _, moved = jax.jvp(update, (still,), (jax.tree.map(jnp.ones_like, still),))
            except TypeError:  # it wants arguments of which nothing is known here
                return True
            return bool(tree.all_finite(moved))

    def gradient(self, params, step: TracedStep):
        """The training gradient, what it met, and the arguments that `tx.update` may want."""
        options = {"num_rows": None if self._is_kept else step.num_rows, "keys": step.keys}
        grads, info = self._gradient(params, step.rows, step.weights, **options)
        value_fn = lambda p: self._value(p, step.rows, step.weights, **options)
        return grads, info, {"value": info.value, "grad": grads, "value_fn": value_fn}

    def compared(self, along: Along, params, grads, step: TracedStep) -> Along:
        """Along, with the incoming gradient compared to that of the loss; one more gradient."""
        own, _, _ = self.gradient(params, step)
        gap = jax.tree.map(lambda g, o: g.astype(o.dtype) - o, grads, own)
        squares = jnp.stack([tree.vdot(gap, gap), tree.vdot(own, own)]).astype(jnp.float32)
        largest = jnp.maximum(along.step_squares[0], squares[1])
        size = jnp.maximum(squares[1], _FLOOR**2 * largest)
        ratio = jnp.where(size > 0, squares[0] / jnp.where(size > 0, size, 1.0), 0.0)
        ratio = jnp.maximum(along.step_squares[1], ratio)
        return along._replace(
            gradient_squares=along.gradient_squares + squares,
            step_squares=jnp.stack([largest, ratio]),
        )

    def goes_on(self, params, inner) -> Bool[Array, ""]:
        """Whether a step with no gradient from this state is finite: a negative second moment, say,
        is reached by no run."""
        still = jax.tree.map(jnp.zeros_like, params)
        extra = {"value": jnp.zeros(()), "grad": still, "value_fn": lambda p: jnp.zeros(())}
        try:
            return tree.all_finite(self._applied(still, inner, params, extra)[0])
        except TypeError:  # it wants arguments of which nothing is known here
            return jnp.ones((), bool)

    def go_along(self, along: Along, before, after, grads, step: TracedStep, extra) -> Along:
        """Tangents and shadows after the step from `before` to `after`, each (params, inner)."""
        kernel = self.tangents(extra)
        shadows = self._drawn(along.shadows, before, step)
        slots = step.slots
        if self._slots is None:
            for i in range(len(shadows.shadow_states)):
                mine = (step.units == shadows.shadow_units[i]) & (step.units >= 0)
                slots = jnp.where(mine, self._own_slots + i, slots)
        moved = tuple(
            self._without(state, shadows.shadow_units[i], step, extra)
            for i, state in enumerate(shadows.shadow_states)
        )
        tangents = kernel.step(
            along.tangents, *before, grads, step.rows, step.weights, slots,
            num_rows=None if self._is_kept else step.num_rows, keys=step.keys,
            live=along.slot_is_live,
        )  # fmt: skip
        shadows = shadows._replace(shadow_states=moved)
        shadows = shadows._replace(linearity=self._linearity(kernel, tangents, shadows, after))
        return along._replace(tangents=tangents, shadows=shadows)

    def _without(self, state, unit, step: TracedStep, extra):
        """One step of the shadow that leaves `unit` out; zeros where there is none."""
        params, inner = state
        weights = jnp.where((step.units == unit) & (unit >= 0), 0, step.weights)
        grads, _, own = self.gradient(params, step._replace(weights=weights))
        wanted = {name: own[name] for name in own if extra.get(name) is not None}
        moved = self._applied(grads, inner, params, extra | wanted)
        return jax.tree.map(
            lambda leaf: jnp.where(unit >= 0, leaf, 0) if tree.is_inexact(leaf) else leaf, moved
        )

    def _slot_of(self, unit, i: int):
        return self._own_slots + i if self._slots is None else self._slots(unit)

    def _drawn(self, shadows: Shadows, before, step: TracedStep) -> Shadows:
        """Shadows not yet drawn leave out a unit of this batch; until now they are the run."""
        units, states = shadows.shadow_units, []
        places = jnp.cumsum(step.drawable)
        for i, state in enumerate(shadows.shadow_states):
            row = jnp.argmax(places > i % jnp.maximum(places[-1], 1))
            draws = (units[i] == NOT_DRAWN) & (places[-1] > 0)
            units = units.at[i].set(jnp.where(draws, step.units[row], units[i]))
            own = lambda old=state: old
            states.append(jax.lax.cond(draws, lambda: before, own))
        return shadows._replace(shadow_units=units, shadow_states=tuple(states))

    def _linearity(self, kernel, tangents, shadows: Shadows, after) -> Float[Array, "2"]:
        """The largest relative error of all shadows; what it was, where there are none."""
        found = []
        for i, state in enumerate(shadows.shadow_states):
            slot = self._slot_of(shadows.shadow_units[i], i)
            pairs = zip(kernel.take(*state), kernel.take(*after))
            actual = [[a - b for a, b in zip(*pair)] for pair in pairs]
            changes = [*actual[0], *actual[1]]
            tangent = kernel.read(tangents, slot)
            predicted = [leaf.astype(a.dtype) for leaf, a in zip(tangent, changes)]
            count = len(actual[0])
            errors = jnp.stack(
                [
                    _relative_error(predicted[:count], actual[0]),
                    _relative_error(predicted[count:], actual[1]),
                ]
            )
            found.append(jnp.where(shadows.shadow_units[i] >= 0, errors, shadows.linearity))
        return functools.reduce(_worse, found, shadows.linearity if not found else found[0])

    def run(self, step_of: Callable[[Segment], TracedStep]):
        """A function (params, inner, along, segment, num_active) -> the same after the segment."""

        def one(pair, inner, row: Segment):
            params, along = pair
            inner = set_settings(inner, row.settings)
            step = step_of(row)
            grads, info, extra = self.gradient(params, step)
            flags = StepFlags(~tree.all_finite(grads), info.num_non_finite)
            after = self._applied(grads, inner, params, extra)
            along = self.go_along(along, (params, inner), after, grads, step, extra)
            return (after[0], along), after[1], flags

        loop = loop_over_steps(one)

        def segment(params, inner, along, segment: Segment, num_active):
            (params, along), inner, flags = loop((params, along), inner, segment, num_active)
            return params, inner, along, flags

        return segment


def _relative_error(predicted, actual) -> Float[Array, ""]:
    """||predicted - actual|| / ||actual||; -1 where both vanish."""
    squares = lambda leaves: sum((tree.vdot(x, x) for x in leaves), start=jnp.zeros(()))
    gap = jnp.sqrt(squares([p - a for p, a in zip(predicted, actual)]))
    size = jnp.sqrt(squares(actual))
    error = gap / jnp.where(size > 0, size, 1.0)
    error = jnp.where(size > 0, error, jnp.where(gap > 0, jnp.inf, NOT_MEASURED))
    return error.astype(jnp.float32)


def _worse(a, b):
    """The larger of two figures; NaN is the worst there is."""
    return jnp.where(jnp.isnan(a) | jnp.isnan(b), jnp.nan, jnp.maximum(a, b))
