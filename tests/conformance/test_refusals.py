"""What is refused, how the refusal reads, and that it leaves every byte of the inputs alone."""

import contextlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import Status, UnlearnerState, errors, tree
from tests.conformance import cases
from tests.conformance.cases import CASES, PLAIN, trained

each = cases.each()


@contextlib.contextmanager
def refused(error, match, *inputs):
    """The block raises a typed error that reads well, and the inputs keep every byte."""
    before = tree.digest(inputs)
    with pytest.raises(error, match=match) as caught:
        yield
    assert isinstance(caught.value, errors.JaxUnlearnError)
    assert tree.digest(inputs) == before
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(inputs))


# --- ids ---------------------------------------------------------------------------------------

BAD_IDS = {
    "out-of-range": ([cases.NUM_EXAMPLES], errors.IdRangeError, r"0\.\.39, got 40"),
    "one-of-two-out-of-range": ([3, 99], errors.IdRangeError, "got 99"),
    "negative": ([-5], errors.IdRangeError, "negative -5"),
    "padding": ([-1], errors.IdRangeError, "-1 is padding"),
    "float": ([3.0], errors.IdTypeError, "3.0 of type float"),
    "float-array": (np.array([3.0]), errors.IdTypeError, "integer example ids"),
    "bool": ([True], errors.IdTypeError, "True of type bool"),
    "bool-mask": (np.arange(40) == 3, errors.IdTypeError, "integer example ids"),
    "nan": ([float("nan")], errors.IdTypeError, "NaN is nobody's id"),
    "beyond-32-bits": ([2**32 + 5], errors.IdRangeError, "4294967301"),
    "beyond-32-bits-array": (np.array([2**32 + 5]), errors.IdRangeError, "4294967301"),
    "text": (["7"], errors.IdTypeError, "'7' of type str"),
    "bare-text": ("7", errors.IdTypeError, "'7' of type str"),
    "none": (None, errors.IdTypeError, "None"),
    "matrix": (np.array([[3, 5]]), errors.IdTypeError, "one axis"),
    "never-seen": ([13], errors.NeverSeenError, "got 13"),
    "one-of-two-never-seen": ([3, 13], errors.NeverSeenError, "got 13"),
}


@each
@pytest.mark.parametrize("kind", BAD_IDS)
def test_a_bad_id_is_refused_by_its_own_error_and_nothing_changes(case, kind):
    ids, error, match = BAD_IDS[kind]
    run = trained(case.name)
    with refused(error, match, run.params, run.state):
        run.problem.forget(run.params, run.state, ids)


@each
def test_an_id_is_forgotten_once(case):
    run = trained(case.name)
    params, state, _ = run.forgotten
    with refused(errors.AlreadyForgottenError, "got 3, already forgotten", params, state):
        run.problem.forget(params, state, [3, 7])


@each
def test_ids_are_validated_before_the_data_is_looked_at(case):
    run = trained(case.name)

    class Untouchable:
        def __getitem__(self, ids):
            raise AssertionError("the data was read")

    for ids, error, _ in BAD_IDS.values():
        with pytest.raises(error):
            run.problem.forget(run.params, run.state, ids, data=Untouchable())


# --- data and losses ---------------------------------------------------------------------------


class Rows:
    """Data that answers as told."""

    def __init__(self, answer):
        self.answer = answer

    def __getitem__(self, ids):
        return self.answer(ids)


BAD_DATA = {
    "none": None,
    "not-indexable": 7,
    "too-short": {"x": np.zeros((2, 5), np.float32), "y": np.zeros(2, np.float32)},
    "wrong-length": Rows(lambda ids: {"x": np.zeros((1, 5)), "y": np.zeros(1)}),
    "raises-key-error": Rows(lambda ids: {}[int(ids[0])]),
}


@each
@pytest.mark.parametrize("kind", BAD_DATA)
def test_missing_or_broken_data_is_refused(case, kind):
    run = trained(case.name)
    if kind == "none" and not case.needs_data:
        run.problem.forget(run.params, run.state, [3, 5], data=None)
        return
    with refused(errors.MissingDataError, "Expected", run.params, run.state):
        run.problem.forget(run.params, run.state, [3, 5], data=BAD_DATA[kind])


@each
def test_a_loss_that_couples_rows_is_refused(case):
    run = trained(case.name)

    def normalised_by_the_batch(params, batch):
        x = (batch["x"] - jnp.mean(batch["x"], 0)) / (jnp.std(batch["x"], 0) + 0.1)
        return cases.squared_error(params, batch | {"x": x})

    coupled = case.factory(
        run.problem.tx, normalised_by_the_batch, num_examples=cases.NUM_EXAMPLES, **case.options
    )
    with refused(errors.CoupledLossError, "not the mean of per-example", run.params, run.state):
        coupled.forget(run.params, run.state, [3, 5], data=run.problem.data)


@each
def test_an_error_inside_the_data_reaches_the_caller_and_nothing_changes(case):
    run = trained(case.name)

    def fail(ids):
        raise OSError("disk on fire")

    before = tree.digest((run.params, run.state))
    with pytest.raises(OSError, match="disk on fire"):
        run.problem.forget(run.params, run.state, [3, 5], data=Rows(fail))
    assert tree.digest((run.params, run.state)) == before


# --- states ------------------------------------------------------------------------------------

OUTSIDE = {
    "optax.chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "optax.named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("tx", tx)),
    "optax.masked": lambda tx: optax.masked(tx, True),
    "optax.partition": lambda tx: optax.partition({"all": tx}, lambda p: "all"),
    "optax.MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "optax.inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda rate: optax.GradientTransformationExtraArgs(tx.init, tx.update)
    )(rate=0.1),
    "optax.apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


@each
@pytest.mark.parametrize("outer", OUTSIDE)
def test_standing_inside_another_transform_is_refused_with_the_right_nesting(case, outer):
    run = trained(case.name)
    unlearner = run.problem.unlearner
    state = OUTSIDE[outer](unlearner).init(run.problem.params)
    method = case.factory.__name__
    with refused(errors.WrongNestingError, outer, run.params, state):
        unlearner.forget(run.params, state, [3], data=run.problem.data)
    with pytest.raises(errors.WrongNestingError) as caught:
        unlearner.quote(run.params, state, [3])
    assert f"{method}({outer}(" in str(caught.value)
    with pytest.raises(errors.WrongNestingError):
        unlearner.update(run.params, state, run.params, ids=np.array([3], np.int32))


@each
def test_a_bare_optimizer_state_is_refused(case):
    run = trained(case.name)
    with refused(errors.WrongStateError, "UnlearnerState", run.params, run.state):
        run.problem.unlearner.forget(run.params, run.state.inner, [3], data=run.problem.data)


@each
@pytest.mark.parametrize("state", [None, {}, 3.0, "state"], ids=repr)
def test_what_is_no_state_at_all_is_refused(case, state):
    run = trained(case.name)
    with pytest.raises(errors.WrongStateError, match="UnlearnerState"):
        run.problem.unlearner.forget(run.params, state, [3], data=run.problem.data)


@each
def test_the_state_of_another_method_is_refused_by_name(case):
    run = trained(case.name)
    others = {other.factory: other for other in reversed(CASES) if not other.is_slow}
    others.pop(case.factory)
    for other in others.values():
        state = trained(other.name).state
        with refused(errors.WrongStateError, "unlearner that trained it", run.params, state):
            run.problem.forget(run.params, state, [3])


@each
@pytest.mark.parametrize("change", ["structure", "shape"])
def test_parameters_of_another_model_are_refused(case, change):
    run = trained(case.name)
    other = run.params | {"more": jnp.zeros(3)}
    if change == "shape":
        other = run.params | {"bias": jnp.zeros(4)}
    with refused(errors.WrongStateError, "parameters", run.params, run.state):
        run.problem.forget(other, run.state, [3])


@each
def test_an_nnx_optimizer_is_refused_with_its_adapter(case):
    nnx = pytest.importorskip("flax.nnx")
    unlearner = trained(case.name).problem.unlearner
    model = nnx.Linear(5, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, unlearner, wrt=nnx.Param)
    with pytest.raises(errors.WrongStateError, match=r"adapters\.nnx\.forget"):
        unlearner.forget(nnx.state(model), optimizer, [3], data={})


@each
def test_a_linen_train_state_is_refused_with_its_adapter(case):
    train_state = pytest.importorskip("flax.training.train_state")
    run = trained(case.name)
    stock = train_state.TrainState.create(
        apply_fn=None, params=run.problem.params, tx=run.problem.unlearner
    )
    with pytest.raises(errors.WrongStateError, match=r"adapters\.linen\.forget"):
        run.problem.unlearner.forget(run.params, stock, [3], data={})


# --- what went wrong in a traced update ---------------------------------------------------------


def _state_after(case, ids):
    """The trained state after one more step with these ids."""
    run = trained(case.name)
    _, state = run.problem.step(
        *cases.copied((run.params, run.state)), *run.problem.batch(np.array(ids, np.int32))
    )
    return state


@each
@pytest.mark.parametrize("stranger", [cases.NUM_EXAMPLES, -2, 2**31 - 1])
def test_an_id_out_of_range_in_update_is_remembered_and_forget_tells(case, stranger):
    run = trained(case.name)
    row = run.problem.batch(np.array([0, 1, 2, 0], np.int32))[0]
    ids = np.array([0, 1, 2, stranger], np.int32)
    params, state = run.problem.step(*cases.copied((run.params, run.state)), row, ids)
    assert int(state.record.participation.status) == Status.ID_OUT_OF_RANGE
    with refused(errors.TrainingRecordError, r"an id outside 0\.\.num_examples-1", params, state):
        run.problem.forget(params, state, [3])


@each
def test_training_on_a_forgotten_id_is_remembered_and_forget_tells(case):
    run = trained(case.name)
    start = cases.copied((run.forgotten.params, run.forgotten.opt_state))
    params, state = run.problem.step(*start, *run.problem.batch(np.array([0, 1, 3, 2], np.int32)))
    assert int(state.record.participation.status) == Status.FORGOTTEN_ID_USED
    with refused(errors.TrainingRecordError, "had already been forgotten", params, state):
        run.problem.forget(params, state, [7])


@each
def test_the_status_is_sticky(case):
    run = trained(case.name)
    row, _ = run.problem.batch(np.zeros(4, np.int32))
    state = run.problem.step(*cases.copied((run.params, run.state)), row, np.full(4, 99, np.int32))
    _, state = run.problem.train(1, start=state)
    assert int(state.record.participation.status) == Status.ID_OUT_OF_RANGE


@each
@pytest.mark.parametrize("first", [True, False], ids=["ids-then-none", "none-then-ids"])
def test_ids_on_some_steps_only_are_remembered_and_forget_tells(case, first):
    problem = trained(case.name).problem
    without = jax.jit(lambda g, s, p: problem.unlearner.update(g, s, p))
    params, state = problem.start()
    if first:
        params, state = problem.train(1, start=(params, state))
    _, state = without(params, state, params)
    if not first:
        params, state = problem.train(1, start=(params, state))
    assert int(state.record.participation.status) == Status.IDS_MISSING
    with refused(errors.TrainingRecordError, "ids were passed to update on some", params, state):
        problem.forget(params, state, [int(cases.ids_of_step(0)[0])])


@each
def test_a_run_without_ids_says_that_update_never_received_any(case):
    problem = trained(case.name).problem
    params, state = problem.start()
    _, state = jax.jit(lambda g, s, p: problem.unlearner.update(g, s, p))(params, state, params)
    assert int(state.record.participation.status) == Status.OK
    with refused(errors.NeverSeenError, "never received ids", params, state):
        problem.forget(params, state, [3])


@cases.each(lambda case: case.has_max_steps)
def test_more_steps_than_declared_are_remembered_and_forget_tells(case):
    problem = trained(case.name).problem
    allowed = problem.train(case.options["max_steps"])
    assert int(allowed[1].record.participation.status) == Status.OK
    params, state = problem.train(1, start=allowed, first=3)
    assert int(state.record.participation.status) == Status.TOO_MANY_STEPS
    with refused(errors.TrainingRecordError, "more often than max_steps", params, state):
        problem.forget(params, state, [3])


@each
def test_a_refusal_names_everything_that_went_wrong(case):
    run = trained(case.name)
    state = run.state.record.participation._replace(
        status=jnp.asarray(int(Status.ID_OUT_OF_RANGE | Status.IDS_MISSING), jnp.int32)
    )
    state = UnlearnerState(run.state.inner, run.state.record._replace(participation=state))
    with refused(errors.TrainingRecordError, "some steps", run.params, state):
        run.problem.forget(run.params, state, [3])
    assert not run.problem.unlearner.quote(run.params, state, [3]).feasible


@each
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"ids": np.array([1.0, 2.0])}, errors.IdTypeError),
        ({"ids": np.array([[1, 2]])}, ValueError),
        ({"params": None}, ValueError),
    ],
    ids=["float-ids", "two-axes", "no-params"],
)
def test_update_refuses_what_types_alone_show(case, arguments, error):
    run = trained(case.name)
    call = {"params": run.params, "ids": np.array([1], np.int32)} | arguments
    with pytest.raises(error, match="Expected"):
        run.problem.unlearner.update(run.params, run.state, **call)


def test_every_case_is_a_line_of_the_registry():
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(isinstance(case.factory, types.FunctionType) for case in CASES)
    assert PLAIN in cases.INSIDE
