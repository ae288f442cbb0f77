"""Microbatches: the same figures as all rows at once, in the memory of a few."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import kernels

NUM_ROWS = 7


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def dense(params, x):
    return jnp.mean(jnp.tanh(x @ params["w"]) ** 2)


def convolving(params, x):
    dims = ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=dims)
    return jnp.mean(jnp.tanh(h) ** 2)


def keyed(params, x, key):
    return dense(params, x * jax.random.bernoulli(key, 0.5, x.shape))


CASES = {
    "dense": (dense, {"w": normal(0, 5, 4)}, normal(1, NUM_ROWS, 5)),
    "convolving": (convolving, {"w": normal(0, 3, 3, 2, 2)}, normal(1, NUM_ROWS, 4, 4, 2)),
}


def figures(grads):
    return grads.clipped_sum(0.1), {"norms": grads.norms(), "losses": grads.losses}


def assert_alike(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, want)


@pytest.mark.parametrize(
    ("name", "microbatch_size"),
    [("dense", 3), ("dense", 100), pytest.param("convolving", 3, marks=pytest.mark.slow)],
)
def test_microbatches_give_what_all_rows_at_once_give(name, microbatch_size):
    loss_fn, params, batch = CASES[name]
    step = kernels.microbatched(loss_fn, figures, microbatch_size=microbatch_size)
    assert_alike(step(params, batch), figures(kernels.per_example(loss_fn)(params, batch)))
    padding = jnp.arange(NUM_ROWS) >= 2  # two microbatches of padding at the end
    got = step(params, batch, is_padding_example=padding)
    grads = kernels.per_example(loss_fn)(params, batch, is_padding_example=padding)
    assert_alike(got, figures(grads))
    assert_alike(jax.jit(step)(params, batch), step(params, batch))


def test_every_row_keeps_its_own_key_and_its_padding_by_id():
    _, params, batch = CASES["dense"]
    keys = jax.random.split(jax.random.key(0), NUM_ROWS)
    ids = jnp.array([5, -1, 3, 2, -1, 0, 1])
    step = kernels.microbatched(keyed, figures, microbatch_size=2)
    grads = kernels.per_example(keyed)(params, batch, keys=keys, ids=ids)
    assert_alike(step(params, batch, keys=keys, ids=ids), figures(grads))


def one_tap(params, x):
    dims = ("NHWC", "HWIO", "NHWC")
    taps = params["w"][None, None]
    return jnp.mean(jax.lax.conv_general_dilated(x, taps, (1, 1), "SAME", dimension_numbers=dims))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("convolves", [False, True])
def test_microbatches_of_narrow_parameters_are_added_in_float32(dtype, convolves):
    """Next to 2048 ones vanish in float16, and sixes too in bfloat16."""
    x = jnp.array([2048, 1, 1, 1, 1, 6, 6], dtype)[:, None]
    loss_fn = one_tap if convolves else lambda p, x: jnp.mean(x @ p["w"])
    x = x[:, None, None] if convolves else x
    total = lambda grads: ({"sum": grads.clipped_sum(jnp.inf), "rows": grads.contributes.sum()}, ())
    step = kernels.microbatched(loss_fn, total, microbatch_size=1)
    params = {"w": jnp.zeros((1, 1), dtype)}
    added, _ = step(params, x)
    assert added["sum"]["w"].dtype == dtype
    assert added["rows"] == 7
    assert float(added["sum"]["w"][0, 0]) == 2064.0


def test_a_batch_without_rows_and_one_of_padding_alone_sum_to_zero():
    loss_fn, params, batch = CASES["dense"]
    step = kernels.microbatched(loss_fn, figures, microbatch_size=3)
    added, stacked = step(params, batch[:0])
    assert stacked["norms"].shape == (0,)
    assert not np.any(added["w"])
    added, stacked = step(params, batch, is_padding_example=jnp.ones(NUM_ROWS, bool))
    assert not np.any(added["w"])
    assert not np.any(stacked["norms"])


def loops(jaxpr):
    """The primitives bound in the loops of a jaxpr."""
    found = set()
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    is_loop = eqn.primitive.name in ("while", "scan")
                    found |= names(inner) if is_loop else loops(inner)
    return found


def names(jaxpr):
    found = {eqn.primitive.name for eqn in jaxpr.eqns}
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            found |= names(inner) if hasattr(inner, "eqns") else set()
    return found


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere a loop is fine")
def test_on_cpu_no_convolution_stands_in_a_loop_and_dense_layers_do():
    inside = {}
    for name, (loss_fn, params, batch) in CASES.items():
        step = kernels.microbatched(loss_fn, figures, microbatch_size=3)
        inside[name] = loops(jax.make_jaxpr(step)(params, batch).jaxpr)
    assert "dot_general" in inside["dense"]
    assert "conv_general_dilated" not in inside["convolving"]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere all run in a loop")
def test_many_convolving_microbatches_run_in_a_loop_with_channels_last():
    _, params, batch = CASES["convolving"]
    batch = jnp.concatenate([batch] * 5)

    def loss_fn(params, x):
        x, w = jnp.moveaxis(x, 3, 1), params["w"].transpose(3, 2, 0, 1)
        return jnp.mean(jnp.tanh(jax.lax.conv(x, w, (1, 1), "SAME")) ** 2)

    step = kernels.microbatched(loss_fn, figures, microbatch_size=1)
    jaxpr = jax.make_jaxpr(step)(params, batch).jaxpr
    assert "conv_general_dilated" in loops(jaxpr)
    layouts = re.findall(r"lhs_spec=(.*?), rhs_spec=(.*?), out_spec=(.*?)\)\s", str(jaxpr))
    assert {layout[0] for layout in layouts} == {"(0, 3, 1, 2)"}, layouts
    assert_alike(step(params, batch), figures(kernels.per_example(loss_fn)(params, batch)))


def test_memory_is_that_of_a_microbatch():
    """64 rows of 64 tokens by a layer that has no factors, 8 rows at a time."""
    params = {"w": jnp.zeros((64, 64))}
    x = jnp.ones((64, 64, 64))
    loss_fn = lambda p, x: jnp.mean(jnp.tanh(x @ p["w"]) ** 2)
    sizes = {}
    for size in (8, 64):
        step = jax.jit(kernels.microbatched(loss_fn, figures, microbatch_size=size))
        memory = step.lower(params, x).compile().memory_analysis()
        sizes[size] = memory.temp_size_in_bytes
    assert sizes[8] < sizes[64] / 4


def test_memory_is_that_of_a_microbatch_where_it_convolves():
    params = {"w": normal(0, 3, 3, 8, 8)}
    x = jnp.ones((32, 16, 16, 8))
    sizes = {}
    for size in (4, 32):
        step = jax.jit(kernels.microbatched(convolving, figures, microbatch_size=size))
        sizes[size] = step.lower(params, x).compile().memory_analysis().temp_size_in_bytes
    assert sizes[4] < sizes[32] / 3


def test_a_second_call_does_not_trace_again():
    traces = []

    def loss_fn(params, x):
        traces.append(None)
        return dense(params, x)

    _, params, batch = CASES["dense"]
    step = kernels.microbatched(loss_fn, figures, microbatch_size=2)
    step(params, batch)
    count = len(traces)
    step(params, batch + 1)
    assert len(traces) == count


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_a_microbatch_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match="microbatch_size"):
        kernels.microbatched(dense, figures, microbatch_size=size)


def test_any_integer_is_a_microbatch_size():
    loss_fn, params, batch = CASES["dense"]
    step = kernels.microbatched(loss_fn, figures, microbatch_size=np.int64(3))
    assert_alike(step(params, batch), figures(kernels.per_example(loss_fn)(params, batch)))
    for size in (3.0, True, np.bool_(True), "3"):
        with pytest.raises(ValueError, match="integer microbatch_size"):
            kernels.microbatched(loss_fn, figures, microbatch_size=size)


# --- units ----------------------------------------------------------------------------------------

UNITS, NUM_UNITS = np.array([0, 2, 0, 3, -1, 0, 2]), 5
SPOILT, PADDING = 1, 5  # a row of unit 2 that is not finite, and one of unit 0 that is none


def of_units(grads):
    shown = {"norms": grads.norms(), "losses": grads.losses, "is_finite": grads.is_finite}
    return (grads.clipped_sum(0.1), jnp.sum(grads.contributes)), shown


def unit_oracle(loss_fn, params, batch, rows):
    """What `of_units` gives, from the gradients of some rows, each by itself."""
    one = jax.jit(jax.value_and_grad(loss_fn))
    grads, losses = np.zeros((NUM_UNITS, params["w"].size)), np.zeros(NUM_UNITS)
    for row in rows:
        if UNITS[row] >= 0:
            loss, grad = one(params, batch[row : row + 1])
            grads[UNITS[row]] += np.asarray(grad["w"], np.float64).ravel()
            losses[UNITS[row]] += loss
    norms = np.linalg.norm(grads, axis=1)
    clipped = np.minimum(1, 0.1 / np.where(norms > 0, norms, 1)) @ grads
    shown = {"norms": norms, "losses": losses, "is_finite": np.ones(NUM_UNITS, bool)}
    return ({"w": clipped.reshape(params["w"].shape)}, NUM_UNITS), shown


@pytest.mark.parametrize(
    ("name", "microbatch_size"),
    [("dense", 3), ("dense", 6), pytest.param("convolving", 4, marks=pytest.mark.slow)],
)
def test_units_that_straddle_microbatches_are_the_sums_of_their_rows(name, microbatch_size):
    loss_fn, params, batch = CASES[name]
    batch = 3 * batch
    rows = [row for row in range(NUM_ROWS) if row not in (SPOILT, PADDING)]
    spoilt = batch.at[np.array([SPOILT, PADDING])].set(jnp.nan)
    step = kernels.microbatched(loss_fn, of_units, microbatch_size=microbatch_size)
    padding = jnp.arange(NUM_ROWS) == PADDING
    units = {"num_units": NUM_UNITS, "max_rows_per_unit": 3, "is_padding_example": padding}
    got = step(params, spoilt, units_of_rows=UNITS, **units)
    want = unit_oracle(loss_fn, params, batch, rows)
    assert np.max(want[1]["norms"]) > 0.1
    assert_alike(got, want)
    order = np.random.default_rng(0).permutation(NUM_ROWS)
    moved = {**units, "is_padding_example": padding[order], "units_of_rows": UNITS[order]}
    assert_alike(step(params, spoilt[order], **moved), want)


@pytest.mark.parametrize("microbatch_size", [None, 4])
def test_a_clipped_gradient_of_units_clips_their_sums(microbatch_size):
    loss_fn, params, batch = CASES["dense"]
    grad = kernels.clipped_grad(
        loss_fn, l2_clip_norm=0.1, return_values=True, return_grad_norms=True,
        microbatch_size=microbatch_size,
    )  # fmt: skip
    total, figures = grad(params, 3 * batch, units_of_rows=jnp.asarray(UNITS), num_units=NUM_UNITS)
    (clipped, _), want = unit_oracle(loss_fn, params, 3 * batch, range(NUM_ROWS))
    assert_alike(total, clipped)
    assert_alike(figures.grad_norms, want["norms"])
    assert_alike(figures.values, want["losses"])
    assert grad.sensitivity() == 0.1


@pytest.mark.parametrize("microbatch_size", [None, 6])
def test_units_of_other_sizes_compile_for_powers_of_two_alone(microbatch_size):
    """The largest unit has 3, 4, 5, 6 and 7 rows: sizes 4 and 8, or 6 where that is the most."""
    traces = []

    def counted(grad):
        traces.append(None)
        return grad

    _, params, _ = CASES["dense"]
    batch, options = normal(1, 12, 5), {"l2_clip_norm": 0.1, "microbatch_size": microbatch_size}
    grad = kernels.clipped_grad(dense, pre_clipping_transform=counted, **options)
    counts = []
    for most in (3, 4, 5, 6) if microbatch_size else (3, 4, 5, 6, 7):
        units = np.where(np.arange(12) < most, 0, 1 + np.arange(12) % 3)
        got = grad(params, batch, units_of_rows=units, num_units=4)
        counts.append(len(traces))
        if most == 3:
            want = kernels.per_example(dense)(params, batch).by_unit(units, num_units=4)
            assert_alike(got, want.clipped_sum(0.1))
    assert len(set(counts)) == 2, counts


def test_a_traced_unit_with_too_many_rows_contributes_nothing():
    loss_fn, params, batch = CASES["dense"]
    step = kernels.microbatched(loss_fn, of_units, microbatch_size=2)
    sizes = {"num_units": NUM_UNITS, "max_rows_per_unit": 2}
    call = jax.jit(lambda units: step(params, 3 * batch, units_of_rows=units, **sizes))
    (_, count), shown = call(UNITS)
    want = unit_oracle(loss_fn, params, 3 * batch, range(NUM_ROWS))[1]
    assert shown["is_finite"].tolist() == [False, True, True, True, True]
    assert int(count) == NUM_UNITS - 1
    assert_alike(shown["norms"], np.where(np.arange(NUM_UNITS) == 0, 0, want["norms"]))


def test_units_that_no_microbatch_holds_are_refused():
    loss_fn, params, batch = CASES["dense"]
    step = kernels.microbatched(loss_fn, of_units, microbatch_size=2)
    with pytest.raises(ValueError, match="microbatch_size=2 >= 3, the rows of one unit"):
        step(params, batch, units_of_rows=UNITS, num_units=NUM_UNITS)
    with pytest.raises(ValueError, match="units_of_rows= and num_units= together"):
        step(params, batch, units_of_rows=UNITS)
    with pytest.raises(ValueError, match="units_of_rows= and num_units= together"):
        step(params, batch, max_rows_per_unit=2)


def test_microbatches_of_units_bound_the_memory():
    """256 units of two rows, and factors of 8 x 256 floats a row and side."""
    params, x = {"w": normal(0, 256, 256)}, jnp.ones((512, 8, 256))
    units = jnp.arange(512) % 256
    sizes = {"num_units": 256, "max_rows_per_unit": 2}

    def memory(microbatch_size):
        options = {"l2_clip_norm": 1.0, "microbatch_size": microbatch_size}
        grad = kernels.clipped_grad(dense, **options)
        step = jax.jit(lambda p, x, units: grad(p, x, units_of_rows=units, **sizes))
        return step.lower(params, x, units).compile().memory_analysis().temp_size_in_bytes

    assert memory(8) < 0.1 * memory(None)
