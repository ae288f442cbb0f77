"""The contract of `Unlearner`, for every method of cases.CASES round every optimizer of INSIDE.

Parameters, state and data are judged by their bytes; a method that adds noise is judged with its
noise rewound, so that equality is equality before noise.
"""

import dataclasses
import io
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxunlearn
from jaxunlearn import Status, UnlearnerState, records
from tests.conformance import cases
from tests.conformance.cases import PLAIN, avals, bits, differing, make_problem, trained

each = cases.each()
each_method = cases.each(lambda case: case.crossed)


@pytest.fixture(scope="module", params=cases.CROSSED, ids="-".join)
def run(request):
    """A method round an optimizer, trained; module scope keeps the tests of one pair together."""
    return trained(*request.param)


@pytest.fixture(scope="module", params=cases.CROSSED_EXACT, ids="-".join)
def exact_run(request):
    """The same for methods that must equal the oracle."""
    return trained(*request.param)


# --- crossed with what may stand inside --------------------------------------------------------


def test_update_keeps_shape_dtype_and_weak_type_of_every_leaf(run):
    params, state = run.problem.start()
    assert avals(run.state) == avals(state)
    assert avals(run.params) == avals(params)


def test_training_traces_update_once_and_compiles_nothing_in_later_steps(run):
    params, state = run.problem.train(2)
    with cases.compilations() as compiled:
        run.problem.train(1, start=(params, state), first=2)
    assert run.problem.step_traces == [1]
    assert compiled == []


def test_forget_keeps_shape_dtype_and_weak_type_of_every_leaf(run):
    assert avals(run.forgotten.opt_state) == avals(run.state)
    assert avals(run.forgotten.params) == avals(run.params)


def test_forget_changes_the_parameters_and_certifies_it(run):
    moved = differing(run.forgotten.params, run.params)
    assert bool(moved) == run.problem.case.moves_params
    assert moved or differing(run.forgotten.opt_state.inner, run.state.inner)
    info = run.forgotten.info
    assert (info.ids, info.status, info.num_duplicates) == ((3, 5), Status.OK, 0)
    assert info.certificate is not None


def test_forget_leaves_its_inputs_alive_and_unchanged(run):
    leaves = jax.tree.leaves((run.params, run.state))
    assert not any(leaf.is_deleted() for leaf in leaves)
    params, state = run.problem.train()
    assert differing((params, state), (run.params, run.state)) == []


def test_three_deletions_of_one_bucket_share_one_trace(run):
    traces = list(run.problem.traces)
    second = run.problem.forget(run.forgotten.params, run.forgotten.opt_state, [0, 7])
    with cases.compilations() as compiled:
        third = run.problem.forget(second.params, second.opt_state, [11, 1])
    assert run.problem.traces == traces
    assert compiled == []
    assert avals(third.opt_state) == avals(run.state)


def test_training_goes_on_after_forget_without_another_trace(run):
    start = cases.copied((run.forgotten.params, run.forgotten.opt_state))
    rows = np.array([0, 1, 2, -1], np.int32)
    params, state = run.problem.step(*start, *run.problem.batch(rows))
    assert run.problem.step_traces == [1]
    assert int(state.record.participation.status) == Status.OK
    assert avals(params) == avals(run.params)


def test_released_is_the_wrapped_optimizers_state(run):
    plain = run.problem.tx.init(run.problem.params)
    assert jax.tree.structure(jaxunlearn.released(run.state)) == jax.tree.structure(plain)
    assert isinstance(run.state, UnlearnerState)


def test_an_exact_method_equals_the_oracle_in_every_leaf(exact_run):
    run, problem = exact_run, exact_run.problem
    params, inner = records.oracle(
        problem.tx, problem.loss_fn, problem.params,
        log=run.state.record.log, data=problem.data, forget=[3, 5],
        **problem.case.oracle_options,
    )  # fmt: skip
    assert differing(params, run.forgotten.params) == []
    assert differing(inner, run.forgotten.opt_state.inner) == []


def test_init_works_on_shapes_alone(run):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), run.problem.params)
    abstract = jax.eval_shape(run.problem.unlearner.init, shapes)
    assert [a[:3] for a in avals(abstract)] == [a[:3] for a in avals(run.state)]


# --- saved states ------------------------------------------------------------------------------


def _through_numpy(tree, like):
    """Every leaf through an .npz file; typed keys by their words."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    file = io.BytesIO()
    leaves = [jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(tree)]
    np.savez(file, **{str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)})
    file.seek(0)
    with np.load(file) as saved:
        loaded = [jnp.asarray(saved[str(i)]) for i in range(len(leaves))]
    templates = jax.tree.leaves(like)
    loaded = [jax.random.wrap_key_data(x) if is_key(t) else x for x, t in zip(loaded, templates)]
    return jax.tree.unflatten(jax.tree.structure(like), loaded)


def test_save_load_forget_equals_forget(run):
    template = run.problem.start()
    params, state = _through_numpy((run.params, run.state), template)
    result = run.problem.forget(params, state, [3, 5])
    assert differing(result[:2], run.forgotten[:2]) == []


@each_method
def test_save_load_forget_equals_forget_through_flax_bytes(case):
    serialization = pytest.importorskip("flax.serialization")
    run = trained(case.name)
    blob = serialization.to_bytes((run.params, run.state))
    params, state = serialization.from_bytes(run.problem.start(), blob)
    result = run.problem.forget(params, state, [3, 5])
    assert differing(result[:2], run.forgotten[:2]) == []


@each_method
def test_save_load_forget_equals_forget_through_orbax(case, tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    run = trained(case.name)
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"params": run.params, "state": run.state})
        checkpointer.wait_until_finished()
        params, state = run.problem.start()
        template = {"params": params, "state": state}
        loaded = checkpointer.restore(pathlib.Path(tmp_path / "state"), template)
    result = run.problem.forget(loaded["params"], loaded["state"], [3, 5])
    assert differing(result[:2], run.forgotten[:2]) == []


# --- requests ----------------------------------------------------------------------------------


@each
@pytest.mark.parametrize(
    "nothing", [[], (), np.zeros((0,), np.int32)], ids=["list", "tuple", "array"]
)
def test_forgetting_nothing_releases_nothing(case, nothing):
    run = trained(case.name)
    result = run.problem.forget(run.params, run.state, nothing)
    assert result.params is run.params
    assert result.opt_state is run.state
    assert result.info.certificate is None
    assert result.info.ids == ()


@each
def test_forgetting_nothing_needs_no_data(case):
    run = trained(case.name)
    assert run.problem.forget(run.params, run.state, [], data=None).params is run.params


@each
@pytest.mark.parametrize(
    ("ids", "num_duplicates"),
    [([5, 3], 0), ([5, 3, 5, 5, 3], 3), ({3, 5}, 0), (np.array([5, 3], np.uint8), 0)],
    ids=["reversed", "repeated", "set", "uint8"],
)
def test_order_and_repeats_of_ids_do_not_matter(case, ids, num_duplicates):
    run = trained(case.name)
    result = run.problem.forget(run.params, run.state, ids)
    assert differing(result[:2], run.forgotten[:2]) == []
    assert result.info.ids == (3, 5)
    assert result.info.num_duplicates == num_duplicates
    assert result.info.certificate.num_duplicates == num_duplicates


@each
def test_data_may_be_an_object_with_rows_by_id(case):
    run = trained(case.name)
    seen = []

    class Table:
        def __getitem__(self, ids):
            assert ids.dtype == np.int32
            seen.extend(ids.tolist())
            return jax.tree.map(lambda leaf: leaf[ids], run.problem.data)

    result = run.problem.forget(run.params, run.state, [3, 5], data=Table())
    assert differing(result[:2], run.forgotten[:2]) == []
    assert min(seen) >= 0
    assert 13 not in seen


@each
def test_rows_of_forgotten_ids_are_never_read_again(case):
    run = trained(case.name)
    asked = []

    class Spy:
        def __getitem__(self, ids):
            asked.extend(ids.tolist())
            return jax.tree.map(lambda leaf: leaf[ids], run.problem.data)

    second = run.problem.forget(run.forgotten.params, run.forgotten.opt_state, [7], data=Spy())
    assert asked
    assert not {3, 5, -1} & set(asked)
    assert second.info.ids == (7,)


@each
def test_the_requester_stays_on_this_side(case):
    run = trained(case.name)
    result = run.problem.forget(run.params, run.state, [3], requester="jane@example.org")
    assert result.info.requester == "jane@example.org"
    assert "jane" not in result.info.certificate.to_json()


@each
def test_quote_spends_nothing_and_changes_nothing(case):
    run = trained(case.name)
    before = bits((run.params, run.state))
    quotes = [run.problem.unlearner.quote(run.params, run.state, [3, 5]) for _ in range(3)]
    assert quotes[0] == quotes[1] == quotes[2]
    assert quotes[0].feasible
    assert quotes[0].guarantee == run.forgotten.info.certificate.guarantee
    assert quotes[0].num_forgotten == 2
    assert bits((run.params, run.state)) == before
    after = run.problem.forget(run.params, run.state, [3, 5])
    assert differing(after[:2], run.forgotten[:2]) == []


@each
@pytest.mark.parametrize("ids", [[99], [13], [3, 3.5]], ids=["range", "never", "float"])
def test_quote_says_why_a_request_would_be_refused(case, ids):
    run = trained(case.name)
    quote = run.problem.unlearner.quote(run.params, run.state, ids)
    assert not quote.feasible
    assert quote.reason


# --- update ------------------------------------------------------------------------------------


@each_method
def test_unknown_extra_arguments_reach_the_wrapped_optimizer(case):
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append(extra)
        return jax.tree.map(lambda g: -0.1 * g, updates), state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    problem = make_problem(case, PLAIN, tx=tx, extra={"moon_phase": jnp.float32(0.25)})
    problem.train(1)
    assert "moon_phase" in seen[0]
    assert {"ids", "batch", "key"}.isdisjoint(seen[0])


@each
def test_update_works_without_any_of_the_extra_arguments(case):
    problem = trained(case.name).problem
    params, state = problem.start()
    updates, state = jax.jit(problem.unlearner.update)(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert int(state.record.participation.num_steps) == 1


@each
def test_an_unlearner_is_an_optax_transform_that_passes_extra_arguments(case):
    unlearner = trained(case.name).problem.unlearner
    assert isinstance(unlearner, optax.GradientTransformationExtraArgs)
    assert optax.with_extra_args_support(unlearner) is unlearner


@each
def test_init_copies_so_that_a_donated_state_breaks_neither_params_nor_the_next_init(case):
    problem = trained(case.name, "add_noise" if case.crossed else PLAIN.name).problem
    params = cases.copied(problem.params)
    for _ in range(2):
        state = problem.unlearner.init(params)
        jax.jit(lambda s: jax.tree.map(lambda x: x, s), donate_argnums=0)(state)
    assert differing(params, problem.params) == []


@each
def test_the_record_updates_in_place_under_donation(case):
    problem = trained(case.name).problem
    params, state = problem.train(2)
    large = lambda s: {
        path: leaf.unsafe_buffer_pointer()
        for path, leaf in jax.tree_util.tree_leaves_with_path(s.record)
        if leaf.size >= 2
    }
    before = large(state)
    params, state = problem.train(4, start=(params, state), first=2)
    assert before
    assert large(state) == before


@each_method
def test_a_step_needs_no_second_copy_of_the_record(case):
    options = {"num_examples": 32 * 10**5}
    options |= {"max_steps": 10**5} if case.has_max_steps else {}
    factory = lambda tx, loss_fn, **rest: case.factory(tx, loss_fn, **(rest | options))
    problem = make_problem(dataclasses.replace(case, factory=factory), PLAIN)
    params, state = problem.start()
    record_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.record))
    compiled = problem.step.lower(params, state, *problem.batch(cases.ids_of_step(0))).compile()
    memory = compiled.memory_analysis()
    assert record_bytes > 700_000
    assert memory.alias_size_in_bytes >= record_bytes
    assert memory.temp_size_in_bytes < 0.1 * record_bytes


@each_method
def test_bfloat16_parameters_stay_bfloat16(case):
    problem = make_problem(case, PLAIN, dtype=jnp.bfloat16)
    params, state = problem.train()
    result = problem.forget(params, state, [3, 5])
    assert avals(result.params) == avals(params)
    assert avals(result.opt_state) == avals(state)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(params))
    assert differing(result.params, params)
    if case.exact:
        oracle = records.oracle(
            problem.tx, problem.loss_fn, problem.params, log=state.record.log,
            data=problem.data, forget=[3, 5], **case.oracle_options,
        )  # fmt: skip
        assert differing(oracle, (result.params, result.opt_state.inner)) == []
