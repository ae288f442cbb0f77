"""The optimizers, with the settings under which they train; the online Newton step is here."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from jaxunlearn import records, transforms

MEMORY = 10


class NewtonStepState(NamedTuple):
    """inverse_metric: (lambda I + sum g g')^-1."""

    inverse_metric: Float[Array, "d d"]


def online_newton_step(rate: float, *, damping: float = 1.0) -> optax.GradientTransformation:
    """w' = w - rate A^-1 g,  A = damping I + sum over all steps of g g' (Hazan et al. 2007).

    The inverse is kept by Sherman and Morrison's formula, and nothing is projected.
    """

    def init(params):
        size = ravel_pytree(params)[0].size
        return NewtonStepState(jnp.eye(size) / damping)

    def update(updates, state, params=None):
        del params
        g, unravel = ravel_pytree(updates)
        along = state.inverse_metric @ g
        inverse = state.inverse_metric - jnp.outer(along, along) / (1 + g @ along)
        return unravel(-rate * (inverse @ g)), NewtonStepState(inverse)

    return optax.GradientTransformation(init, update)


def newton_step_action(params, state, vector):
    """A^-1 v, the memory operator of the online Newton step."""
    flat, unravel = ravel_pytree(vector)
    return unravel(state.inverse_metric @ flat)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """make(rate, num_steps) -> the transform. rates: by loss.

    kind: "first order" for any plain Optax optimizer, "pairs" for online L-BFGS.
    deltagrad: whether DeltaGrad is meant for it. operator: its action, where it is no plain update.
    rules: how `rebuild` remakes a state that the library does not know.
    """

    name: str
    make: Callable[[float, int], optax.GradientTransformation]
    rates: dict[str, float]
    kind: str = "first order"
    deltagrad: bool = False
    operator: Callable[..., Any] | None = None
    rules: dict[type, Any] = dataclasses.field(default_factory=dict)


def _adamw(rate: float, num_steps: int):
    schedule = optax.cosine_decay_schedule(rate, num_steps, alpha=0.1)
    return optax.adamw(schedule, eps=1e-3, eps_root=1e-8, weight_decay=1e-2)


_SGD = {"ridge": 0.02, "logistic": 0.1, "MLP": 0.1}
_MOMENTUM = {loss: rate / 5 for loss, rate in _SGD.items()}
_ADAM = {"ridge": 0.002, "logistic": 0.01, "MLP": 0.003}
_MANY = (
    Optimizer("SGD", lambda rate, n: optax.sgd(rate), _SGD, deltagrad=True),
    Optimizer("momentum", lambda rate, n: optax.sgd(rate, 0.9), _MOMENTUM, deltagrad=True),
    Optimizer(
        "Nesterov", lambda rate, n: optax.sgd(rate, 0.9, nesterov=True), _MOMENTUM, deltagrad=True
    ),
    Optimizer("Adam, eps 1e-3", lambda rate, n: optax.adam(rate, eps=1e-3, eps_root=1e-8), _ADAM),
    # The least that makes the usual one differentiable: without eps_root tangents are NaN.
    Optimizer("Adam, eps 1e-8", lambda rate, n: optax.adam(rate, eps=1e-8, eps_root=1e-8), _ADAM),
    Optimizer("AdamW, cosine", _adamw, _ADAM),
    Optimizer("RMSProp", lambda rate, n: optax.rmsprop(rate, eps=1e-6), _ADAM),
    Optimizer(
        "online L-BFGS",
        lambda rate, n: transforms.online_lbfgs(
            None, learning_rate=rate, memory_size=MEMORY, admission=transforms.prudente_souza()
        ),
        {"ridge": 0.1, "logistic": 0.1, "MLP": 0.05},
        kind="pairs",
    ),
    Optimizer(
        "online Newton",
        lambda rate, n: online_newton_step(rate),
        {"ridge": 0.5, "logistic": 0.5},
        operator=newton_step_action,
        rules={NewtonStepState: records.as_driven},
    ),
)
OPTIMIZERS = {one.name: one for one in _MANY}

LBFGS_OPTIONS = {"memory_size": MEMORY, "admission": transforms.prudente_souza()}
"""Of `unlearners.memory_pair`, so that it trains as the optimizer of that name above."""
