"""The one shape: what goes in and out of an unlearner, and that nothing of it gets lost."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxunlearn.types import Budget, Quote, Status, Unlearner, UnlearnerState, released

NAMES = ("init", "update", "forget", "quote", "forget_step")


def five():
    """Five functions that can be told apart."""
    return [lambda *_, name=name: name for name in NAMES]


def functions_of(unlearner):
    return [
        unlearner.init, unlearner.update, unlearner.forget, unlearner.quote, unlearner.forget_step,
    ]  # fmt: skip


def test_to_optax_it_is_a_pair():
    parts = five()
    unlearner = Unlearner(*parts)
    init, update = unlearner
    assert len(unlearner) == 2
    assert (init, update) == tuple(parts[:2])
    assert isinstance(unlearner, optax.GradientTransformationExtraArgs)
    assert optax.with_extra_args_support(unlearner) is unlearner


@pytest.mark.parametrize(
    "remake",
    [
        copy.copy,
        copy.deepcopy,
        lambda u: u._replace(),
        lambda u: u._make(functions_of(u)),
        lambda u: type(u)(**u._asdict()),
        lambda u: u.__reduce__()[0](*u.__reduce__()[1]),
    ],
)
def test_a_copy_has_all_five_functions(remake):
    parts = five()
    again = remake(Unlearner(*parts))
    assert type(again) is Unlearner
    assert functions_of(again) == parts
    assert tuple(again) == tuple(parts[:2])


@pytest.mark.parametrize("name", NAMES)
def test_replacing_one_function_leaves_the_others(name):
    parts = five()
    unlearner = Unlearner(*parts)
    other = lambda: "other"
    changed = unlearner._replace(**{name: other})
    for field, was, now in zip(unlearner._asdict(), parts, functions_of(changed)):
        assert now is (other if field == name else was)
    assert functions_of(unlearner) == parts


def test_replacing_what_is_not_there_is_refused():
    with pytest.raises(TypeError):
        Unlearner(*five())._replace(forgot=None)


def test_a_pair_does_not_make_an_unlearner():
    with pytest.raises(TypeError, match="Expected 5 functions"):
        Unlearner._make(five()[:2])
    with pytest.raises(TypeError):
        Unlearner(*five()[:2])


def test_mapping_over_it_as_a_pytree_is_refused_rather_than_losing_forget():
    with pytest.raises(TypeError):
        jax.tree.map(lambda leaf: leaf, Unlearner(*five()))


def test_released_is_the_inner_state_and_nothing_of_the_record():
    inner = (jnp.ones(3), {"count": jnp.zeros((), jnp.int32)})
    assert released(UnlearnerState(inner=inner, record=object())) is inner


def test_a_budget_keeps_what_it_was_given():
    budget = Budget(epsilon=0.5, delta=1e-6, max_forget=7)
    assert dataclasses.asdict(budget) == {"epsilon": 0.5, "delta": 1e-6, "max_forget": 7}


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 0.0},
        {"epsilon": -1.0},
        {"epsilon": float("inf")},
        {"epsilon": float("nan")},
        {"delta": 0.0},
        {"delta": 1.0},
        {"delta": -1e-5},
        {"delta": float("nan")},
        {"max_forget": 0},
        {"max_forget": -3},
        {"max_forget": 2.5},
        {"max_forget": True},
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(change):
    with pytest.raises(ValueError, match="Expected"):
        Budget(**({"epsilon": 1.0, "delta": 1e-5, "max_forget": 10} | change))


def test_budgets_and_quotes_are_frozen_and_take_names_only():
    budget = Budget(epsilon=1.0, delta=1e-5, max_forget=10)
    with pytest.raises(dataclasses.FrozenInstanceError):
        budget.epsilon = 8.0
    with pytest.raises(TypeError):
        Budget(1.0, 1e-5, 10)
    with pytest.raises(TypeError):
        Quote(1, True)


def test_statuses_are_bits_that_combine():
    flags = [flag for flag in Status if flag]
    assert [int(flag) for flag in flags] == [2**k for k in range(len(flags))]
    assert Status.OK == 0
    assert not Status.OK


def test_every_status_has_a_story_of_its_own():
    stories = [flag.story for flag in Status if flag]
    assert len(set(stories)) == len(stories)
    assert Status.OK.story == "all is well"
    both = Status.ID_OUT_OF_RANGE | Status.NON_FINITE
    assert both.story == f"{Status.ID_OUT_OF_RANGE.story}; {Status.NON_FINITE.story}"
