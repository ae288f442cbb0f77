"""`unlearners.replay` on networks: equal to the oracle by bits, to other training code by ulps."""

import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import records
from tests.conformance.cases import differing
from tests.unlearners import _problems as problems
from tests.unlearners._problems import MODELS, OPTIMIZERS

FAST = {("mnist", "mlp", "adamw"), ("mnist", "cnn", "momentum"), ("cifar10", "cnn", "clipped-adam")}
"""Real images outside `make test-all`: each model, each optimizer and each data set once."""


def _marked(dataset, model, optimizer):
    fast = dataset == "digits" or (dataset, model, optimizer) in FAST
    marks = [] if dataset == "digits" else [pytest.mark.data]
    return pytest.param(
        (dataset, model, optimizer),
        id=f"{dataset}-{model}-{optimizer}",
        marks=marks if fast else [*marks, pytest.mark.slow],
    )


ALL = list(itertools.product(["digits", "mnist", "cifar10"], MODELS, OPTIMIZERS))
on_digits = pytest.mark.parametrize(
    "which", [_marked(*which) for which in ALL if which[0] == "digits"]
)


@pytest.fixture(scope="module", params=[_marked(*which) for which in ALL])
def which(request):
    """A data set, a model and an optimizer."""
    if request.param[0] != "digits" and not os.environ.get("JAXUNLEARN_DATA"):
        pytest.skip("needs JAXUNLEARN_DATA, the folder with the data sets")
    return request.param


def forget(run):
    return run.unlearner.forget(run.params, run.state, problems.FORGET, data=run.data)


def test_every_leaf_is_bitwise_the_oracles(which):
    run = problems.trained_network(*which)
    result = forget(run)
    params, inner = records.oracle(
        run.tx, run.loss_fn, run.init,
        log=run.state.record.log, data=run.data, forget=problems.FORGET,
    )  # fmt: skip
    assert differing(params, result.params) == []
    assert differing(inner, result.opt_state.inner) == []
    assert differing(run.params, result.params)


@on_digits
def test_training_is_bitwise_the_oracle_that_forgets_nothing(which):
    run = problems.trained_network(*which)
    params, inner = records.oracle(
        run.tx, run.loss_fn, run.init, log=run.state.record.log, data=run.data
    )
    assert differing(params, run.params) == []
    assert differing(inner, run.state.inner) == []


def test_code_that_never_had_the_rows_agrees_within_ten_times_a_one_ulp_change(which):
    run = problems.trained_network(*which)
    result = forget(run)
    plain = lambda init: problems.train_plainly(
        run.tx, run.loss_fn, init, run.data, problems.FORGET
    )
    judge = plain(run.init)
    ulp = max(
        problems.relative_gap(plain(problems.one_ulp_away(run.init, seed)), judge)
        for seed in range(2)
    )
    gap = problems.relative_gap((result.params, result.opt_state.inner), judge)
    untouched = problems.relative_gap((run.params, run.state.inner), judge)
    assert gap <= 10 * ulp
    assert untouched > 100 * ulp


WIDE = {("digits", "mlp", "adamw"), ("digits", "cnn", "momentum")}


@pytest.mark.parametrize(
    "which",
    [pytest.param(w, id="-".join(w), marks=[] if w in WIDE else [pytest.mark.slow]) for w in ALL],
)
def test_code_that_never_had_the_rows_agrees_to_1e_12_in_float64(request, x64, which):
    if which[0] != "digits":
        request.getfixturevalue("data_root")
    run = problems.trained_network(*which, jnp.float64)
    result = forget(run)
    judge = problems.train_plainly(run.tx, run.loss_fn, run.init, run.data, problems.FORGET)
    assert problems.relative_gap((result.params, result.opt_state.inner), judge) < 1e-12
    assert {leaf.dtype for leaf in jax.tree.leaves(result.params)} == {np.dtype(np.float64)}
