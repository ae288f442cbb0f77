"""The contract of `ExactLearner`, for every method of learners.LEARNERS. Equality is of bytes."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import ExactLearner, Status, UnlearnerState, errors, released, tree
from tests.conformance import cases, learners
from tests.conformance.cases import avals, differing
from tests.conformance.learners import LEARNERS, fitted, refit
from tests.conformance.test_refusals import BAD_IDS, Rows, refused

each = pytest.mark.parametrize("case", LEARNERS, ids=lambda case: case.name)
BEYOND = {
    "never-seen": ([31], errors.NeverSeenError, "got 31"),
    "one-of-two-never-seen": ([3, 31], errors.NeverSeenError, "got 31"),
}


@each
def test_it_has_the_shape_of_an_exact_learner(case):
    run = fitted(case.name)
    assert isinstance(run.learner, ExactLearner)
    assert isinstance(run.state, UnlearnerState)
    assert released(run.state) == run.state.inner
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((run.params, run.state)))


@each
def test_forget_equals_a_fit_on_the_retained_rows(case):
    run = fitted(case.name)
    params, state = refit(run, [3, 5])
    assert differing(params, run.forgotten.params) == []
    assert differing(state.inner, run.forgotten.opt_state.inner) == []
    assert differing(params, run.params)


@each
def test_forgetting_one_by_one_equals_forgetting_together(case):
    run = fitted(case.name)
    params, state = run.params, run.state
    for i in [5, 11, 3]:
        params, state, _ = run.forget(params, state, [i])
    together = run.forget(run.params, run.state, [11, 3, 5])
    assert differing(params, together.params) == []
    assert differing(params, refit(run, [3, 5, 11])[0]) == []


@each
def test_forget_keeps_shape_dtype_and_weak_type_of_every_leaf(case):
    run = fitted(case.name)
    assert avals(run.forgotten.params) == avals(run.params)
    assert avals(run.forgotten.opt_state) == avals(run.state)


@each
def test_forget_leaves_its_inputs_alive_and_unchanged(case):
    run = fitted(case.name)
    before = tree.digest((run.params, run.state))
    run.forget(run.params, run.state, [7])
    assert tree.digest((run.params, run.state)) == before


@each
def test_a_deletion_is_certified_exact(case):
    run = fitted(case.name)
    info = run.forgotten.info
    assert (info.ids, info.status, info.num_duplicates) == ((3, 5), Status.OK, 0)
    certificate = info.certificate
    assert (certificate.guarantee, certificate.scope) == ("exact", "full-state")
    assert certificate.params_after == tree.digest(run.forgotten.params)
    assert certificate.state_after == tree.digest(run.forgotten.opt_state.inner)
    assert type(certificate).from_json(certificate.to_json()) == certificate


@each
def test_later_deletions_of_one_size_compile_nothing(case):
    run = fitted(case.name)
    second = run.forget(run.forgotten.params, run.forgotten.opt_state, [0, 7])
    third = run.forget(second.params, second.opt_state, [9, 12])
    with cases.compilations() as compiled:
        run.forget(third.params, third.opt_state, [2, 8])
    assert compiled == []


@each
def test_predict_jits(case):
    run = fitted(case.name)
    batch = {"x": jnp.asarray(run.data["x"][:4]), "y": jnp.asarray(run.data["y"][:4])}
    out = jax.jit(run.learner.predict)(run.params, batch)
    assert all(leaf.shape[0] == 4 for leaf in jax.tree.leaves(out))
    assert bool(tree.all_finite(out))


@each
@pytest.mark.parametrize("how", ["npz", "flax", "orbax"])
def test_save_load_forget_equals_forget(case, how, tmp_path):
    run = fitted(case.name)
    if how == "orbax":
        orbax = pytest.importorskip("orbax.checkpoint")
        pair = {"params": run.params, "state": run.state}
        with orbax.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", pair)
            checkpointer.wait_until_finished()
            loaded = checkpointer.restore(tmp_path / "state", pair)
        params, state = loaded["params"], loaded["state"]
    elif how == "flax":
        serialization = pytest.importorskip("flax.serialization")
        blob = serialization.to_bytes((run.params, run.state))
        params, state = serialization.from_bytes((run.params, run.state), blob)
    else:
        file = io.BytesIO()
        np.savez(file, *map(np.asarray, jax.tree.leaves((run.params, run.state))))
        file.seek(0)
        with np.load(file) as saved:
            leaves = [jnp.asarray(saved[name]) for name in saved.files]
        structure = jax.tree.structure((run.params, run.state))
        params, state = jax.tree.unflatten(structure, leaves)
    fresh = case.factory(num_examples=learners.NUM_EXAMPLES)
    result = fresh.forget(params, state, [3, 5], data=run.data)
    assert differing(result[:2], run.forgotten[:2]) == []


# --- requests ----------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("nothing", [[], np.zeros((0,), np.int32)], ids=["list", "array"])
def test_forgetting_nothing_releases_nothing_and_needs_no_data(case, nothing):
    run = fitted(case.name)
    result = run.learner.forget(run.params, run.state, nothing)
    assert result.params is run.params
    assert result.opt_state is run.state
    assert result.info.certificate is None


@each
@pytest.mark.parametrize(
    ("ids", "num_duplicates"), [([5, 3], 0), ([5, 3, 5], 1), ({3, 5}, 0)],
    ids=["reversed", "repeated", "set"],
)  # fmt: skip
def test_order_and_repeats_of_ids_do_not_matter(case, ids, num_duplicates):
    run = fitted(case.name)
    result = run.forget(run.params, run.state, ids)
    assert differing(result[:2], run.forgotten[:2]) == []
    assert result.info.num_duplicates == num_duplicates


@each
def test_rows_that_are_gone_or_were_never_there_are_not_read(case):
    run = fitted(case.name)
    asked = []

    def answer(ids):
        assert ids.dtype == np.int32
        asked.extend(ids.tolist())
        return jax.tree.map(lambda leaf: leaf[ids], run.data)

    run.forget(run.forgotten.params, run.forgotten.opt_state, [7], data=Rows(answer))
    assert not {3, 5, -1, 31} & set(asked)
    assert (7 in asked) == case.reads_forgotten


@each
def test_the_requester_stays_on_this_side(case):
    run = fitted(case.name)
    result = run.forget(run.params, run.state, [3], requester="jane@example.org")
    assert result.info.requester == "jane@example.org"
    assert "jane" not in result.info.certificate.to_json()


@each
def test_quote_spends_nothing_and_says_what_forget_does(case):
    run = fitted(case.name)
    before = tree.digest((run.params, run.state))
    quotes = [run.learner.quote(run.params, run.state, [3, 5]) for _ in range(2)]
    assert quotes[0] == quotes[1]
    assert quotes[0].feasible
    assert (quotes[0].guarantee, quotes[0].num_forgotten) == ("exact", 2)
    assert quotes[0].num_gradients <= quotes[0].retrain_gradients
    assert tree.digest((run.params, run.state)) == before


@each
@pytest.mark.parametrize("ids", [[99], [31], [3, 3.5]], ids=["range", "never", "float"])
def test_quote_says_why_a_request_would_be_refused(case, ids):
    run = fitted(case.name)
    quote = run.learner.quote(run.params, run.state, ids)
    assert not quote.feasible
    assert quote.reason


# --- refusals ----------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("kind", BAD_IDS)
def test_a_bad_id_is_refused_before_the_data_is_looked_at(case, kind):
    ids, error, match = (BAD_IDS | BEYOND)[kind]
    run = fitted(case.name)

    def fail(ids):
        raise AssertionError("the data was read")

    with refused(error, match, run.params, run.state):
        run.learner.forget(run.params, run.state, ids, data=Rows(fail))


@each
def test_an_id_is_forgotten_once(case):
    run = fitted(case.name)
    params, state, _ = run.forgotten
    with refused(errors.AlreadyForgottenError, "got 3, already forgotten", params, state):
        run.forget(params, state, [3, 7])


@each
def test_forgetting_every_row_is_refused(case):
    run = fitted(case.name)
    everyone = list(range(learners.NUM_SEEN))
    with refused(errors.RetainSetEmptyError, "nothing left", run.params, run.state):
        run.forget(run.params, run.state, everyone)
    assert not run.learner.quote(run.params, run.state, everyone).feasible


BAD_DATA = {
    "none": None,
    "not-indexable": 7,
    "too-short": {"x": np.zeros((2, 5), np.float32), "y": np.zeros(2, np.int32)},
    "wrong-length": Rows(lambda ids: {"x": np.zeros((9, 5)), "y": np.zeros(9)}),
    "raises-key-error": Rows(lambda ids: {}[int(ids[0])]),
}


@each
@pytest.mark.parametrize("kind", BAD_DATA)
def test_missing_or_broken_data_is_refused(case, kind):
    run = fitted(case.name)
    with refused(errors.MissingDataError, "Expected", run.params, run.state):
        run.forget(run.params, run.state, [3, 5, 6], data=BAD_DATA[kind])
    with pytest.raises(errors.MissingDataError):
        run.learner.fit(BAD_DATA[kind], range(learners.NUM_SEEN), **case.fit_options)


@each
def test_an_error_inside_the_data_reaches_the_caller_and_nothing_changes(case):
    run = fitted(case.name)

    def fail(ids):
        raise OSError("disk on fire")

    before = tree.digest((run.params, run.state))
    with pytest.raises(OSError, match="disk on fire"):
        run.forget(run.params, run.state, [3, 5, 6], data=Rows(fail))
    assert tree.digest((run.params, run.state)) == before


@each
@pytest.mark.parametrize("state", [None, {}, "state", optax.EmptyState()], ids=repr)
def test_what_is_no_state_is_refused(case, state):
    run = fitted(case.name)
    with pytest.raises(errors.WrongStateError, match="UnlearnerState"):
        run.forget(run.params, state, [3])


@each
def test_the_state_of_another_method_is_refused(case):
    run = fitted(case.name)
    alien = UnlearnerState(inner=(), record=("someone", "else's"))
    with refused(errors.WrongStateError, "unlearner that trained it", run.params, run.state):
        run.forget(run.params, alien, [3])


@each
def test_parameters_that_are_not_the_learners_are_refused(case):
    run = fitted(case.name)
    other = jax.tree.map(lambda leaf: leaf + 1, run.params)
    with refused(errors.WrongStateError, "parameters", run.params, run.state):
        run.forget(other, run.state, [3])
    with pytest.raises(errors.WrongStateError, match="parameters"):
        run.learner.quote(run.forgotten.params, run.state, [3])


@each
@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([99], errors.IdRangeError),
        ([1, 1], errors.IdError),
        ([], errors.RetainSetEmptyError),
        ([0.5], errors.IdTypeError),
    ],
    ids=["range", "twice", "none", "float"],
)
def test_fit_refuses_bad_ids(case, ids, error):
    run = fitted(case.name)
    with pytest.raises(error, match="Expected"):
        run.learner.fit(run.data, ids, **case.fit_options)


@each
def test_rows_that_are_not_finite_are_refused(case):
    run = fitted(case.name)
    spoilt = {"x": run.data["x"].copy(), "y": run.data["y"]}
    spoilt["x"][4] = np.nan
    with pytest.raises(errors.NonFiniteError):
        run.learner.fit(spoilt, range(learners.NUM_SEEN), **case.fit_options)


def test_every_learner_is_a_line_of_the_registry():
    assert len({case.name for case in LEARNERS}) == len(LEARNERS)
