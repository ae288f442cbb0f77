"""What enters the conformance suite of `ExactLearner`: a method by one line of LEARNERS."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxunlearn import ExactLearner, unlearners

NUM_EXAMPLES, NUM_SEEN = 40, 31
"""40 ids are declared, rows 0..31 have data, ids 0..30 are fitted on."""


@dataclasses.dataclass(frozen=True)
class LearnerCase:
    """One method. factory(num_examples=) -> `ExactLearner`.

    fit_options: go to `fit`.
    reads_forgotten: `forget` reads the rows to be forgotten.
    """

    name: str
    factory: Callable[..., ExactLearner]
    fit_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    reads_forgotten: bool = True


def statistical_queries(query, *, num_examples):
    return unlearners.statistical_queries(query, num_examples=num_examples)


def _line(row):
    """Statistics of a regression line, by hand."""
    x, y = row["x"][0], row["y"].astype(jnp.float32)
    return {"x": x, "y": y, "xx": x * x, "xy": x * y}


def _through(sums, count):
    spread = count * sums["xx"] - sums["x"] ** 2
    slope = (count * sums["xy"] - sums["x"] * sums["y"]) / spread
    return {"slope": slope, "offset": (sums["y"] - slope * sums["x"]) / count}


def _predict_line(params, batch):
    return params["slope"] * batch["x"][:, 0] + params["offset"]


def cross_entropy(params, batch):
    """Softmax regression."""
    scores = batch["x"] @ params["w"] + params["b"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(scores, batch["y"]).mean()


def sisa(*, num_examples):
    """Three shards of two slices, Adam."""
    return unlearners.sisa(
        optax.adam(0.1),
        cross_entropy,
        init_params=lambda key: {"w": 0.1 * jax.random.normal(key, (5, 3)), "b": jnp.zeros(3)},
        apply_fn=lambda params, batch: jax.nn.softmax(batch["x"] @ params["w"] + params["b"]),
        num_examples=num_examples,
        num_shards=3,
        num_slices=2,
        batch_size=4,
    )


_queries = lambda name, query: LearnerCase(
    f"statistical_queries-{name}", functools.partial(statistical_queries, query)
)
LEARNERS = [
    _queries("ridge", unlearners.ridge(l2=0.5)),
    _queries("gaussian", unlearners.gaussian_naive_bayes(num_classes=3)),
    _queries("multinomial", unlearners.multinomial_naive_bayes(num_classes=3, grid=2.0**-16)),
    LearnerCase(
        "quantised_kmeans",
        functools.partial(unlearners.quantised_kmeans, 3, lattice=0.5),
        {"key": jax.random.key(0)},
    ),
    LearnerCase(
        "divided_kmeans",
        functools.partial(unlearners.divided_kmeans, 3, width=2),
        {"key": jax.random.key(0)},
        reads_forgotten=False,
    ),
    LearnerCase("sisa", sisa, {"key": jax.random.key(0)}, reads_forgotten=False),
    _queries("line", unlearners.summation(_line, _through, _predict_line, grid=2.0**-20)),
]


@dataclasses.dataclass
class FittedCase:
    """A learner, what it was fitted on, and its answer to `forget([3, 5])`."""

    case: LearnerCase
    learner: ExactLearner
    data: dict[str, np.ndarray]
    params: Any
    state: Any
    forgotten: Any

    def forget(self, params, state, ids, **options):
        """`forget` with the suite's data."""
        return self.learner.forget(params, state, ids, **({"data": self.data} | options))


def make_data() -> dict[str, np.ndarray]:
    """Three classes of positive rows."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, NUM_SEEN + 1).astype(np.int32)
    x = np.abs(rng.normal(size=(NUM_SEEN + 1, 5)) + y[:, None]).astype(np.float32)
    return {"x": x, "y": y}


@functools.cache
def fitted(name: str) -> FittedCase:
    """Fitted once a session."""
    case = next(case for case in LEARNERS if case.name == name)
    learner, data = case.factory(num_examples=NUM_EXAMPLES), make_data()
    params, state = learner.fit(data, np.arange(NUM_SEEN), **case.fit_options)
    forgotten = learner.forget(params, state, [3, 5], data=data)
    return FittedCase(case, learner, data, params, state, forgotten)


def refit(run: FittedCase, without) -> tuple:
    """(params, state) of a fresh fit on the fitted ids but some."""
    ids = np.setdiff1d(np.arange(NUM_SEEN), without)
    return run.learner.fit(run.data, ids, **run.case.fit_options)
