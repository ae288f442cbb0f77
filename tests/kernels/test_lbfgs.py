"""The memory of L-BFGS: the ring, who may enter, and what is left when a pair goes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxunlearn import tree
from jaxunlearn.kernels import lbfgs
from tests import oracles
from tests.kernels import lbfgs_oracles as dense

seeds = st.integers(0, 2**32 - 1)
SIZE = 3
ZERO = np.zeros(dense.DIMENSION, np.float32)


@functools.cache
def empty():
    return lbfgs.init(dense.split(ZERO), SIZE, owners_per_pair=2)


@jax.jit
def push(memory, s, y, owner):
    return lbfgs.push(memory, s, y, owner=owner)


drop = jax.jit(lbfgs.drop)
correct = jax.jit(lbfgs.correct)
find = jax.jit(lbfgs.find)


def filled(steps, changes, owners=None, memory=None):
    memory = empty() if memory is None else memory
    owners = range(len(steps)) if owners is None else owners
    for s, y, owner in zip(steps, changes, owners):
        owner = np.resize(np.asarray([*np.atleast_1d(owner), -1], np.int32), 2)
        memory, _ = push(memory, dense.split(s), dense.split(y), owner)
    return memory


def held(memory):
    """(steps, changes, first owners, clocks), oldest first."""
    order = (int(memory.next_slot) - int(memory.num_pairs) + np.arange(SIZE)) % SIZE
    order = order[: int(memory.num_pairs)]
    flat = dense.join(memory.pairs, 2)[order]
    return (
        flat[:, 0],
        flat[:, 1],
        list(np.asarray(memory.pair_owners)[order, 0]),
        list(np.asarray(memory.pair_clocks)[order]),
    )


def check_gram(memory):
    flat = dense.join(memory.pairs, 2)
    want = np.einsum("iad,jbd->iajb", flat, flat)
    assert oracles.relative_gap(memory.pair_gram, want) < 1e-6
    assert np.array_equal(memory.pair_gram, np.moveaxis(memory.pair_gram, (0, 1), (2, 3)))


# The ring.


@pytest.mark.parametrize("count", [0, 1, SIZE, 2 * SIZE, 2 * SIZE + 1])
@pytest.mark.parametrize("clock", [0, 2**31 - 2, 2**32 - 2])
def test_the_newest_pairs_are_held_in_order_whatever_the_clock_says(count, clock):
    steps, changes = dense.pairs(count, count)
    start = empty()._replace(push_clock=jnp.array(clock, jnp.uint32))
    memory = filled(steps, changes, memory=start)
    kept = slice(max(count - SIZE, 0), count)
    s, y, owners, clocks = held(memory)
    assert np.array_equal(s, steps[kept])
    assert np.array_equal(y, changes[kept])
    assert owners == list(range(count))[kept]
    assert clocks == [(clock + i) % 2**32 for i in range(count)][kept]
    assert int(memory.push_clock) == (clock + count) % 2**32
    newest_first = sorted(np.asarray(lbfgs.ages(memory))[np.asarray(lbfgs.is_occupied(memory))])
    assert newest_first == list(range(min(count, SIZE)))
    check_gram(memory)


def test_avals_stay_and_one_trace_serves_every_push():
    traces = []

    @jax.jit
    def counted(memory, s, y, owner):
        traces.append(1)
        return lbfgs.push(memory, s, y, owner=owner)

    memory = empty()
    avals = jax.tree.map(jax.typeof, memory)
    for i in range(2 * SIZE + 1):
        s, y = (dense.split(x[0]) for x in dense.pairs(i, 1))
        memory, _ = counted(memory, s, y, np.int32(i))
        assert jax.tree.map(jax.typeof, memory) == avals
    assert len(traces) == 1
    dropped = jax.eval_shape(lbfgs.drop, memory, jnp.zeros(SIZE, bool))
    corrected, _ = jax.eval_shape(lbfgs.correct, memory, 0, dense.split(ZERO))
    shapes = lambda t: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), t)
    assert shapes(dropped) == shapes(corrected) == shapes(jax.eval_shape(lambda: memory))


def test_a_donated_memory_is_filled_in_place():
    memory = lbfgs.init({"w": jnp.zeros((50, 40)), "b": jnp.zeros(40)}, 32)
    vector = {"w": jnp.ones((50, 40)), "b": jnp.ones(40)}
    donating = jax.jit(lbfgs.push, donate_argnums=0)
    analysis = donating.lower(memory, vector, vector).compile().memory_analysis()
    num_bytes = tree.num_bytes(memory)
    assert analysis.alias_size_in_bytes == num_bytes
    assert analysis.temp_size_in_bytes < num_bytes / 8  # a pair or two, not the ring
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(memory.pairs)]
    for _ in range(40):
        memory, _ = donating(memory, vector, vector)
    assert places == [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(memory.pairs)]


def test_scan_over_pairs_equals_pushing_them_one_by_one():
    steps, changes = dense.pairs(0, 2 * SIZE)
    owners = np.stack([np.arange(2 * SIZE), np.full(2 * SIZE, -1)], 1).astype(np.int32)
    body = lambda memory, pair: lbfgs.push(memory, *pair[:2], owner=pair[2])
    xs = dense.split(steps), dense.split(changes), owners
    memory, admitted = jax.jit(lambda m, xs: jax.lax.scan(body, m, xs))(empty(), xs)
    assert bool(jnp.all(admitted))
    want = filled(steps, changes)
    assert oracles.relative_gap(memory.pair_gram, want.pair_gram) < 1e-6
    same = lambda m: m._replace(pair_gram=0)
    assert tree.same_bits(same(memory), same(want))


def test_vmap_over_memories_admits_each_by_itself():
    steps, changes = dense.pairs(1, 2)
    changes[1] *= -1
    memories = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), empty())
    offer = jax.jit(jax.vmap(lambda m, s, y: lbfgs.push(m, s, y)))
    memories, admitted = offer(memories, dense.split(steps), dense.split(changes))
    assert list(map(bool, admitted)) == [True, False]
    assert list(map(int, memories.num_pairs)) == [1, 0]


def test_pairs_are_float32_under_bfloat16_parameters_and_float64_under_float64(x64):
    params = {"h": jnp.zeros(2, jnp.bfloat16), "f": jnp.zeros(2), "d": jnp.zeros(2, jnp.float64)}
    params["f"] = params["f"].astype(jnp.float32)
    memory = lbfgs.init(params, 2)
    dtypes = {name: leaf.dtype.name for name, leaf in memory.pairs.items()}
    assert dtypes == {"h": "float32", "f": "float32", "d": "float64"}
    assert memory.pair_gram.dtype == jnp.float64
    fine = jnp.array([1.0, 1.0 + 2.0**-20], jnp.float32)
    memory, _ = lbfgs.push(memory, params | {"h": fine}, params | {"h": fine})
    assert np.array_equal(memory.pairs["h"][0, 0], fine)


# Who may enter.


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, 1e-30])
@pytest.mark.parametrize("where", ["s", "y"])
def test_a_pair_whose_figures_do_not_exist_changes_nothing_but_the_clock(value, where):
    steps, changes = dense.pairs(0, 2)
    memory = filled(steps, changes)
    s, y = steps[0].copy(), changes[0].copy()
    if np.isfinite(value):
        s, y = s * np.float32(value), y * np.float32(value)
    else:
        (s if where == "s" else y)[0] = value
    after = filled([s], [y], memory=memory)
    assert tree.same_bits(after, memory._replace(push_clock=memory.push_clock + np.uint32(1)))


def rule_figures(rule, s, y, norm=None, memory=None):
    admitted = jax.jit(rule)(
        empty() if memory is None else memory, dense.split(s), dense.split(y), norm
    )
    return dense.join(admitted[0]), bool(admitted[1])


@settings(max_examples=10)
@given(seed=seeds)
def test_admission_by_angle_and_by_caution_draw_the_line_where_the_papers_do(seed):
    rng = np.random.default_rng(seed)
    s, y = rng.normal(size=(2, dense.DIMENSION)).astype(np.float32)
    y = y if s @ y > 0 else -y
    cosine = s @ y / np.linalg.norm(s) / np.linalg.norm(y)
    for factor, expected in ((0.99, True), (1.01, False)):
        assert rule_figures(lbfgs.curvature(float(cosine * factor)), s, y)[1] == expected
        tolerance = float(factor * (s @ y) / (s @ s) / 3.0**0.5)
        rule = lbfgs.cautious(tolerance, exponent=0.5)
        assert rule_figures(rule, s, y, norm=3.0)[1] == expected
        assert not rule_figures(rule, s, -y, norm=3.0)[1]


@pytest.mark.parametrize("sign", [1.0, 0.05, -1.0])
def test_powells_damping_reaches_its_threshold_and_leaves_good_pairs_alone(sign):
    steps, changes = dense.pairs(0, 2)
    memory, (b, _) = filled(steps, changes), dense.bfgs(steps, changes)
    s = steps[0] + steps[1]
    y = (sign * (b @ s)).astype(np.float32)
    damped, admitted = rule_figures(lbfgs.powell(0.2), s, y, memory=memory)
    expected = s @ b @ s
    share = 1.0 if s @ y >= 0.2 * expected else 0.8 * expected / (expected - s @ y)
    assert admitted
    assert oracles.relative_gap(damped, share * y + (1 - share) * (b @ s)) < 1e-5
    assert s @ damped >= 0.2 * expected * (1 - 1e-5)
    if sign == 1.0:
        assert np.array_equal(damped, y)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_regularised_change_has_the_curvature_that_li_and_fukushima_prove(sign):
    steps, changes = dense.pairs(0, 1)
    s, y, norm = steps[0], sign * changes[0], 0.3
    lifted, admitted = rule_figures(lbfgs.regularised(shift=2.0), s, y, norm)
    size = 2.0 * norm + max(0.0, -(s @ y) / (s @ s))
    assert admitted
    assert oracles.relative_gap(lifted, y + size * s) < 1e-6
    assert s @ lifted >= 2.0 * norm * (s @ s) * (1 - 1e-5)


def test_a_rule_that_needs_the_gradient_says_so():
    for rule in (lbfgs.cautious(), lbfgs.regularised()):
        with pytest.raises(ValueError, match="gradient_norm"):
            lbfgs.push(empty(), dense.split(ZERO), dense.split(ZERO), admission=rule)


# Who must go.


@settings(max_examples=10)
@given(seed=seeds, gone=st.sets(st.integers(0, 2)), before=st.integers(0, 2))
def test_after_a_drop_no_bit_of_any_leaf_knows_of_the_dropped_pairs(seed, gone, before):
    """Offered zeros instead, under the same clock; `before` pairs were dropped long ago."""
    steps, changes = dense.pairs(seed, before + 3)
    owners = [*(50 + i for i in range(before)), 10, 11, 12]
    full = filled(steps[:before], changes[:before], owners[:before])
    full = drop(full, np.ones(SIZE, bool))
    never = full
    full = filled(steps[before:], changes[before:], owners[before:], full)
    ids = jnp.array([10 + i for i in gone] + [-1] * (3 - len(gone)), jnp.int32)
    dropped = drop(full, lbfgs.owned(full, ids))
    for i in range(3):
        mask = np.float32(i not in gone)
        at = before + i
        never = filled([mask * steps[at]], [mask * changes[at]], [owners[at]], never)
    assert tree.same_bits(dropped, never)


@settings(max_examples=10)
@given(seed=seeds)
def test_a_drop_after_the_ring_came_round_keeps_the_others_bit_for_bit(seed):
    steps, changes = dense.pairs(seed, 5)
    memory = filled(steps, changes)
    dropped = drop(memory, lbfgs.owned(memory, 3))
    never = drop(filled(steps[[2, 4]], changes[[2, 4]], [2, 4]), np.zeros(SIZE, bool))
    clocks = jnp.array([2, 4, 0], jnp.uint32)
    assert tree.same_bits(dropped, never._replace(pair_clocks=clocks, push_clock=jnp.uint32(5)))
    again = dense.pairs([seed, 1], 3)
    after, want = (filled(*again, memory=m) for m in (dropped, never))
    assert tree.same_bits((after.pairs, after.pair_gram), (want.pairs, want.pair_gram))


def test_pairs_are_dropped_by_age_and_by_any_of_their_owners():
    steps, changes = dense.pairs(0, 4)
    memory = filled(steps, changes, [(0, 7), (1, 7), (2, 8), (3, 7)])
    assert held(drop(memory, lbfgs.ages(memory) > 1))[2] == [2, 3]
    assert held(drop(memory, lbfgs.ages(memory) < 1))[2] == [1, 2]
    assert held(drop(memory, lbfgs.owned(memory, jnp.array([7, -1]))))[2] == [2]
    assert held(drop(memory, lbfgs.owned(memory, -1)))[2] == [1, 2, 3]
    assert int(find(memory, 7)) == 0
    assert int(find(memory, 8)) == 2
    assert int(find(memory, 0)) == -1


@settings(max_examples=10)
@given(seed=seeds, which=st.integers(1, 3))
def test_a_corrected_pair_is_as_if_it_had_been_so_from_the_start(seed, which):
    steps, changes = dense.pairs(seed, 4)
    delta = 0.1 * np.random.default_rng(seed).normal(size=dense.DIMENSION)
    delta = (delta * np.linalg.norm(steps[which])).astype(np.float32)
    memory = filled(steps, changes)
    fixed, admitted = correct(memory, find(memory, which), dense.split(delta))
    moved = changes.copy()
    moved[which] += delta
    assert bool(admitted)
    assert tree.same_bits(fixed, filled(steps, moved))


def test_a_correction_that_is_not_admitted_drops_the_pair_and_disowns_only_the_named():
    steps, changes = dense.pairs(0, 3)
    memory = filled(steps, changes, [(0, 7), (1, 7), (2, 8)])
    jitted = jax.jit(lambda slot, delta: lbfgs.correct(memory, slot, delta, disown=7))
    fix = lambda slot, delta: jitted(slot, dense.split(delta))
    bad, admitted = fix(1, -2 * changes[1])
    assert not bool(admitted)
    assert tree.same_bits(bad, drop(memory, jnp.array([False, True, False])))
    good, admitted = fix(1, 0 * changes[1])
    assert bool(admitted)
    assert [list(map(int, row)) for row in good.pair_owners] == [[0, 7], [1, -1], [2, 8]]
    for slot in (-1, SIZE):
        none, admitted = fix(slot, changes[1])
        assert not bool(admitted)
        assert tree.same_bits(none, memory)


def test_a_rule_sees_only_the_pairs_older_than_the_corrected_one():
    steps, changes = dense.pairs(0, 4)
    memory = filled(steps, changes)
    rule = lambda memory, s, y, _: (lbfgs.product(memory, s), memory.num_pairs > 0)
    again = jax.jit(functools.partial(lbfgs.correct, admission=rule))
    fixed, admitted = again(memory, find(memory, 2), dense.split(ZERO))
    b, _ = dense.bfgs(steps[1:2], changes[1:2])
    assert bool(admitted)
    assert oracles.relative_gap(held(fixed)[1][1], b @ steps[2]) < 1e-5
    check_gram(fixed)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lbfgs.init(jnp.zeros(2), 0), ValueError, "memory_size=0"),
        (lambda: lbfgs.init({}, 1), ValueError, "at least one leaf"),
        (lambda: lbfgs.init({"n": jnp.zeros(2, int)}, 1), TypeError, r"int32 at params\['n'\]"),
        (lambda: lbfgs.init(jnp.zeros(2, complex), 1), TypeError, "complex64"),
        (lambda: lbfgs.push(empty(), {}, {}), ValueError, "Expected s like the parameters"),
        (lambda: lbfgs.owned(empty(), 1.5), TypeError, "integer owners"),
        (lambda: lbfgs.drop(empty(), jnp.zeros(2, bool)), ValueError, "mask of 3 slots"),
        (lambda: lbfgs.drop(empty(), jnp.zeros(3, int)), ValueError, "mask of 3 slots"),
        (lambda: lbfgs.curvature(1.0), ValueError, "tolerance=1.0"),
        (lambda: lbfgs.cautious(0.0), ValueError, "tolerance=0.0"),
        (lambda: lbfgs.powell(1.0), ValueError, "threshold=1.0"),
        (lambda: lbfgs.regularised(0.0), ValueError, "shift=0.0"),
    ],
)
def test_a_mistake_is_refused_at_once(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_more_owners_than_a_pair_can_carry_are_refused():
    vector = dense.split(ZERO)
    with pytest.raises(ValueError, match="at most owners_per_pair=2"):
        lbfgs.push(empty(), vector, vector, owner=jnp.arange(3))
