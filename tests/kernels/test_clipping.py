"""`clipped_grad`: the drop-in, its sensitivity, and what happens at the edges."""

import enum
import fractions
import json
import operator
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxunlearn import errors, kernels

SEEDS = st.integers(0, 2**31 - 1)
few = settings(max_examples=10, deadline=None)
NUM_ROWS = 5


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) - y) ** 2)


PARAMS = {"w": normal(0, 7, 3), "b": normal(1, 3)}
BATCH = (normal(2, NUM_ROWS, 7), normal(3, NUM_ROWS, 3))


def reference(fun, params, *rows):
    """Each row's gradient in float64, (B, P): fun(params, *rows of one)."""
    one = lambda params, *row: fun(params, *jax.tree.map(lambda leaf: leaf[None], row))
    axes = (None, *[0] * len(rows))
    leaves = jax.tree.leaves(jax.vmap(jax.grad(one), axes)(params, *rows))
    flat = [np.asarray(leaf, np.float64).reshape(leaf.shape[0], -1) for leaf in leaves]
    return np.concatenate(flat, axis=1)


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def near(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * (1 + np.max(np.abs(want))))


ROWS = reference(loss_fn, PARAMS, BATCH)
NORMS = np.linalg.norm(ROWS, axis=1)
CLIP = float(np.median(NORMS))

# --- the drop-in ----------------------------------------------------------------------------------


def double_batch(params, x, y, scale):
    return scale * loss_fn(params, (x, y))


def with_aux(params, batch):
    loss = loss_fn(params, batch)
    return loss, {"loss": loss, "x": batch[0] + 0.0}


def one_example(params, row):
    x, y = row
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) - y) ** 2)


def two_parameters(w, batch, b):
    return loss_fn({"w": w, "b": b}, batch)


def dropout(params, batch, key):
    keep = jax.random.bernoulli(key, 0.5, batch[0].shape)
    return loss_fn(params, (batch[0] * keep, batch[1]))


def keyworded(params, batch, *, weight):
    return jnp.sum(weight) * loss_fn(params, batch)


def preconditioned(grads):
    return {"w": grads["w"] * 3.0, "only": grads["b"][:2]}


PLAIN = (PARAMS, BATCH)
FIGURES = {"return_values": True, "return_grad_norms": True}
CASES = {
    "plain": (loss_fn, PLAIN, {}, {}),
    "figures": (loss_fn, PLAIN, FIGURES, {}),
    "aux": (with_aux, PLAIN, {"has_aux": True, **FIGURES}, {}),
    "rescaled": (loss_fn, PLAIN, {"rescale_to_unit_norm": True}, {}),
    "normalised": (loss_fn, PLAIN, {"normalize_by": 7.0}, {}),
    "both": (loss_fn, PLAIN, {"normalize_by": 7.0, "rescale_to_unit_norm": True}, {}),
    "infinite": (loss_fn, PLAIN, {"l2_clip_norm": np.inf}, {}),
    "infinite rescaled": (
        loss_fn,
        PLAIN,
        {"l2_clip_norm": np.inf, "rescale_to_unit_norm": True},
        {},
    ),
    "zero": (loss_fn, PLAIN, {"l2_clip_norm": 0.0}, {}),
    "zero rescaled": (loss_fn, PLAIN, {"l2_clip_norm": 0.0, "rescale_to_unit_norm": True}, {}),
    "several batch arguments": (
        double_batch,
        (PARAMS, *BATCH, jnp.float32(2.0)),
        {"batch_argnums": (1, 2)},
        {},
    ),
    "several parameters": (
        two_parameters,
        (PARAMS["w"], BATCH, PARAMS["b"]),
        {"argnums": (0, 2)},
        {},
    ),
    "one example": (one_example, PLAIN, {"keep_batch_dim": False, **FIGURES}, {}),
    "transformed": (loss_fn, PLAIN, {"pre_clipping_transform": preconditioned, **FIGURES}, {}),
    "microbatches": (loss_fn, PLAIN, {"microbatch_size": 1, **FIGURES}, {}),
    "padding": (
        loss_fn,
        PLAIN,
        {},
        {"is_padding_example": jnp.array([False, True, False, True, True])},
    ),
    "key": (dropout, (*PLAIN, jax.random.key(5)), {"prng_argnum": 2}, {}),
    "keyword": (keyworded, PLAIN, {}, {"weight": jnp.arange(1.0, 6.0)}),
    "dtype": (loss_fn, PLAIN, {"dtype": jnp.bfloat16}, {}),
    "wide dtype": (loss_fn, PLAIN, {"dtype": jnp.float32}, {}),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_gives_what_the_function_of_that_name_gives(name):
    peer = pytest.importorskip("jax_privacy.clipping")
    fun, args, options, keywords = CASES[name]
    options = {"l2_clip_norm": CLIP} | options
    ours, theirs = kernels.clipped_grad(fun, **options), peer.clipped_grad(fun, **options)
    got, want = ours(*args, **keywords), theirs(*args, **keywords)
    if isinstance(want, tuple) and hasattr(want[-1], "grad_norms"):
        assert [x is None for x in got[-1]] == [x is None for x in want[-1]]
    got_leaves, want_leaves = jax.tree.leaves(got), jax.tree.leaves(want)
    assert [x.shape for x in got_leaves] == [x.shape for x in want_leaves]
    assert [x.dtype for x in got_leaves] == [x.dtype for x in want_leaves]
    tolerance = 2e-2 if name == "dtype" else 1e-5
    for mine, its in zip(got_leaves, want_leaves):
        near(np.float64(mine), np.float64(its), tolerance)
    assert ours.has_aux == theirs.has_aux
    if name == "dtype":
        return  # no sensitivity is stated: see below
    accounting = pytest.importorskip("dp_accounting")
    for relation in accounting.NeighboringRelation:
        np.testing.assert_allclose(ours.sensitivity(relation), theirs.sensitivity(relation))


def test_clips_every_row_and_adds_them_up():
    """What the peer would be compared with, where it is not installed."""
    scales = np.minimum(1, CLIP / NORMS)
    near(flat(kernels.clipped_grad(loss_fn, l2_clip_norm=CLIP)(*PLAIN)), scales @ ROWS)
    grad = kernels.clipped_grad(loss_fn, l2_clip_norm=CLIP, rescale_to_unit_norm=True, **FIGURES)
    total, figures = grad(*PLAIN)
    near(flat(total), scales @ ROWS / CLIP)
    np.testing.assert_allclose(figures.grad_norms, NORMS, rtol=1e-5)
    assert figures.aux is None
    one = kernels.clipped_grad(one_example, keep_batch_dim=False, l2_clip_norm=CLIP)
    near(flat(one(*PLAIN)), scales @ ROWS)


def test_keys_are_split_one_for_each_example():
    key = jax.random.key(5)
    grad = kernels.clipped_grad(dropout, l2_clip_norm=np.inf, prng_argnum=2)
    keys = jax.random.split(key, NUM_ROWS)
    want = kernels.per_example(dropout)(PARAMS, BATCH, keys=keys).sum()
    near(flat(grad(*PLAIN, key)), flat(want))
    raw = grad(*PLAIN, jax.random.PRNGKey(5))
    near(flat(raw), flat(want))


def test_units_of_several_rows_are_rows_without_the_batch_axis():
    users = jax.tree.map(lambda leaf: jnp.stack([leaf[:2], leaf[2:4]]), BATCH)
    grad = kernels.clipped_grad(
        loss_fn, l2_clip_norm=CLIP, keep_batch_dim=False, return_grad_norms=True
    )
    total, figures = grad(PARAMS, users)
    means = np.stack([ROWS[:2].mean(0), ROWS[2:4].mean(0)])
    norms = np.linalg.norm(means, axis=1)
    np.testing.assert_allclose(figures.grad_norms, norms, rtol=1e-5)
    near(flat(total), np.minimum(1, CLIP / norms) @ means)


def test_a_microbatch_size_need_not_divide_the_batch():
    whole = kernels.clipped_grad(loss_fn, l2_clip_norm=CLIP, **FIGURES)(*PLAIN)
    parts = kernels.clipped_grad(loss_fn, l2_clip_norm=CLIP, microbatch_size=2, **FIGURES)(*PLAIN)
    jax.tree.map(near, parts, whole)


@pytest.mark.parametrize("size", [None, 2])
def test_a_transform_that_is_not_finite_poisons_all_where_that_is_asked_for(size):
    """NaN of a gradient that is zero: of a row of zeros, and not of padding."""
    spoil = lambda grad: grad / jnp.any(grad != 0)
    grad = kernels.clipped_grad(
        lambda w, x: jnp.mean(x @ w), l2_clip_norm=np.inf, pre_clipping_transform=spoil,
        nan_safe=False, microbatch_size=size,
    )  # fmt: skip
    w, x = jnp.zeros(2), jnp.array([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]])
    assert np.all(np.isnan(grad(w, x)))
    padding = jnp.array([False, True, False])
    assert grad(w, x, is_padding_example=padding).tolist() == [4.0, 6.0]


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_row_that_is_not_finite_contributes_zero_or_poisons_all(poison):
    x, y = BATCH
    bad = PARAMS, (x.at[1, 2].set(poison), y)
    keep = np.arange(NUM_ROWS) != 1
    scales = np.where(keep, np.minimum(1, CLIP / NORMS), 0)
    total, figures = kernels.clipped_grad(loss_fn, l2_clip_norm=CLIP, **FIGURES)(*bad)
    near(flat(total), scales @ ROWS)
    assert np.array_equal(figures.values != 0, keep)
    assert np.array_equal(figures.grad_norms != 0, keep)
    unsafe = kernels.clipped_grad(loss_fn, l2_clip_norm=CLIP, nan_safe=False)
    assert np.all(np.isnan(flat(unsafe(*bad))))
    assert np.all(np.isfinite(flat(unsafe(*PLAIN))))
    padding = jnp.asarray(~keep)
    assert np.all(np.isfinite(flat(unsafe(*bad, is_padding_example=padding))))


def test_a_transform_that_is_not_finite_takes_its_row_out():
    spoil = lambda grads: jax.tree.map(lambda g: jnp.where(grads["b"][0] > 0, g, jnp.nan), grads)
    grad = kernels.clipped_grad(loss_fn, l2_clip_norm=np.inf, pre_clipping_transform=spoil)
    first_bias = ROWS[:, 0]  # "b" comes before "w"
    assert 0 < np.sum(first_bias > 0) < NUM_ROWS
    near(flat(grad(*PLAIN)), ROWS[first_bias > 0].sum(0))


def test_a_spmd_axis_name_goes_to_vmap():
    grad = kernels.clipped_grad(loss_fn, l2_clip_norm=CLIP, spmd_axis_name="data")
    near(flat(grad(*PLAIN)), np.minimum(1, CLIP / NORMS) @ ROWS)


def test_no_rows_sum_to_zero():
    empty = jax.tree.map(lambda leaf: leaf[:0], BATCH)
    grad = kernels.clipped_grad(loss_fn, l2_clip_norm=1.0, return_values=True)
    total, figures = grad(PARAMS, empty)
    assert not np.any(flat(total))
    assert figures.values.shape == (0,)


def test_a_second_call_compiles_nothing_and_another_clip_norm_neither():
    traces = []

    def counted(params, batch):
        traces.append(None)
        return loss_fn(params, batch)

    for clip in (1.0, 2.0, 3.0):
        kernels.clipped_grad(counted, l2_clip_norm=clip)(*PLAIN)
    assert len(traces) == 1


# --- sensitivity ----------------------------------------------------------------------------------


class Relation(enum.Enum):
    REPLACE_ONE = 2


@pytest.mark.parametrize(
    ("relation", "factor"),
    [
        ("add_or_remove_one", 1),
        ("REPLACE_ONE", 2),
        ("change-one", 2),
        ("zero_out", 1),
        (Relation.REPLACE_ONE, 2),
    ],
)
def test_sensitivity_is_the_bound_or_twice_it(relation, factor):
    grad = kernels.clipped_grad(loss_fn, l2_clip_norm=3.0)
    assert grad.sensitivity(relation) == 3.0 * factor
    scaled = kernels.clipped_grad(loss_fn, l2_clip_norm=3.0, normalize_by=4.0)
    assert scaled.sensitivity(relation) == 0.75 * factor
    unit = kernels.clipped_grad(
        loss_fn, l2_clip_norm=3.0, rescale_to_unit_norm=True, normalize_by=4.0
    )
    assert unit.sensitivity(relation) == 0.25 * factor


def test_sensitivity_of_another_relation_is_refused():
    with pytest.raises(ValueError, match="Expected neighboring_relation in"):
        kernels.clipped_grad(loss_fn, l2_clip_norm=1.0).sensitivity("edit distance")


@pytest.mark.parametrize("size", [None, 1])
def test_a_row_moves_a_sum_of_bfloat16_parameters_by_no_more_than_is_stated(size):
    """Rounded to bfloat16, sums of about 1020 ones are 4 apart; in float32, below 1e-3."""
    grad = kernels.clipped_grad(
        lambda w, x: jnp.mean(x @ w), l2_clip_norm=1.0, microbatch_size=size
    )
    w, x = jnp.zeros(2, jnp.bfloat16), jnp.tile(jnp.array([1, 0], jnp.bfloat16), (1024, 1))
    rows = np.arange(1024)
    sums = [float(grad(w, x, is_padding_example=rows >= count)[0]) for count in range(1016, 1025)]
    assert abs(sums[-1] - 1024) < 1e-3
    assert max(np.diff(sums)) < grad.sensitivity("ADD_OR_REMOVE_ONE") + 1e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sensitivity_of_sums_that_are_rounded_to_narrow_dtypes_is_refused(dtype):
    grad = kernels.clipped_grad(loss_fn, l2_clip_norm=1.0, dtype=dtype)
    assert grad(*PLAIN)["w"].dtype == dtype
    with pytest.raises(ValueError, match="Expected sums in float32 or wider, got dtype="):
        grad.sensitivity()


@given(clip=st.floats(1e-30, 1e30), divisor=st.floats(1e-5, 1e5))
def test_a_stated_bound_is_rounded_up(clip, divisor):
    bound = kernels.clipped_grad(loss_fn, l2_clip_norm=clip, normalize_by=divisor).sensitivity()
    assert fractions.Fraction(clip) / fractions.Fraction(divisor) <= fractions.Fraction(bound)
    assert bound <= clip / divisor * (1 + 1e-15)


def test_sensitivity_of_a_traced_clip_norm_is_traced():
    @jax.jit
    def step(clip):
        grad = kernels.clipped_grad(loss_fn, l2_clip_norm=clip)
        return grad(*PLAIN), grad.sensitivity("CHANGE_ONE")

    total, bound = step(CLIP)
    np.testing.assert_allclose(bound, 2 * CLIP, rtol=1e-6)
    near(flat(total), np.minimum(1, CLIP / NORMS) @ ROWS)
    assert not np.any(flat(step(-1.0)[0]))


def tokens(params, batch):
    """The gradient is sum_t x_t g_t^T: two equal tokens, or two that nearly cancel."""
    x, g = batch
    return jnp.mean(jnp.sum((x @ params) * g, axis=(1, 2)))


def adversarial(rng, clip):
    """Rows that a bound can break on: on the edge, huge, tiny, cancelling, and their opposites."""
    x, g = rng.normal(size=(5, 2, 16)), rng.normal(size=(5, 2, 16))
    x[1], x[2] = x[1] * 1e15, x[2] * 1e-15
    x[3, 1], g[3, 1] = x[3, 0] * (1 + 1e-6 * rng.normal(size=16)), -g[3, 0]
    x[3] *= 1e8
    x[0] *= clip / np.linalg.norm(x[0].T @ g[0])
    x[4] *= clip * (1 + 1e-6) / np.linalg.norm(x[4].T @ g[4])
    x, g = np.concatenate([x, x]), np.concatenate([g, -g])
    return jnp.asarray(x, jnp.float32), jnp.asarray(g, jnp.float32)


@few
@given(seed=SEEDS, exponent=st.floats(-3, 3), divisor=st.sampled_from([1.0, 3.0]))
def test_the_measured_sensitivity_is_never_above_the_stated(seed, exponent, divisor):
    """Contributions, each alone through the function, compared in float64: no slack.

    The pairs of opposite rows come within 1e-4 of the bound: it is not simply loose.
    """
    clip = 10.0**exponent
    rows = adversarial(np.random.default_rng(seed), clip)
    for unit in (False, True):
        grad = kernels.clipped_grad(
            tokens, l2_clip_norm=clip, rescale_to_unit_norm=unit, normalize_by=divisor
        )
        alone = [
            grad(jnp.zeros((16, 16)), jax.tree.map(operator.itemgetter(slice(i, i + 1)), rows))
            for i in range(10)
        ]
        alone = np.stack([np.float64(part).ravel() for part in alone])
        assert np.max(np.linalg.norm(alone, axis=1)) <= grad.sensitivity("ADD_OR_REMOVE_ONE")
        gaps = np.linalg.norm(alone[:, None] - alone[None], axis=-1)
        stated = grad.sensitivity("REPLACE_ONE")
        assert np.max(gaps) <= stated
        assert np.max(gaps) >= stated * (1 - 1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_narrow_parameters_keep_the_bound_where_the_usual_way_breaks_it():
    """bfloat16: scaling a gradient in its own dtype rounds by up to 2^-8, above the clip norm."""
    params = jnp.zeros((64, 64), jnp.bfloat16)
    x = normal(0, 40, 1, 64).astype(jnp.bfloat16)
    g = normal(1, 40, 1, 64).astype(jnp.bfloat16)
    grad = kernels.clipped_grad(tokens, l2_clip_norm=1.0, dtype=jnp.float32)
    ours = [np.float64(grad(params, (x[i : i + 1], g[i : i + 1]))) for i in range(40)]
    assert max(map(np.linalg.norm, ours)) <= 1.0
    peer = pytest.importorskip("jax_privacy.clipping")
    grad = peer.clipped_grad(tokens, l2_clip_norm=1.0)
    theirs = [np.float64(grad(params, (x[i : i + 1], g[i : i + 1]))) for i in range(40)]
    assert max(map(np.linalg.norm, theirs)) > 1.0


DEVICES = """
import json, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from jaxunlearn import kernels

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
w = jnp.asarray(rng.normal(size=3), jnp.float32)
x = jnp.asarray(rng.normal(size=(8, 3)) * 10, jnp.float32)
loss_fn = lambda w, x: jnp.mean(jnp.sin(x @ w) * 5)

def total(grad, check_vma=True):
    local = lambda w, x: jax.lax.psum(grad(w, x), "data")
    return jax.jit(jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma
    ))

def change_one(f, turned):
    one, other = np.float64(f(w, x)), np.float64(f(w, turned))
    return float(np.linalg.norm(one - other))

def naive(w, x):
    rows = jax.vmap(jax.grad(lambda w, row: jnp.sin(row @ w) * 5), (None, 0))(w, x)
    norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return jnp.sum(rows * jnp.minimum(1, 1 / norms), axis=0)

turned = [x.at[0].set(jnp.asarray(rng.normal(size=3) * s, jnp.float32)) for s in (1, 30, 1000) * 8]
found = {"naive": max(change_one(total(naive), t) for t in turned)}
for size in (None, 1):
    grad = kernels.clipped_grad(loss_fn, l2_clip_norm=1.0, microbatch_size=size)
    step = total(grad)
    found[f"ours {size}"] = max(change_one(step, t) for t in turned)
    found[f"gap {size}"] = float(np.max(np.abs(step(w, x) - grad(w, x))))
found["unchecked"] = float(np.max(np.abs(total(grad, False)(w, x) - grad(w, x))))
found["stated"] = grad.sensitivity("REPLACE_ONE")
print(json.dumps(found))
"""


def test_inside_shard_map_the_stated_sensitivity_holds_where_the_usual_way_breaks_it():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run(
        [sys.executable, "-c", DEVICES], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["naive"] > found["stated"]
    for name in ("ours None", "ours 1"):
        assert 1.0 < found[name] <= found["stated"] * (1 + 1e-6), found  # sums of eight rows
    assert max(found[name] for name in ("gap None", "gap 1", "unchecked")) < 1e-5, found


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l2_clip_norm": -1.0}, r"l2_clip_norm=-1\.0 >= 0"),
        ({"l2_clip_norm": float("nan")}, "l2_clip_norm=nan >= 0"),
        ({"l2_clip_norm": np.float32(-2)}, r"l2_clip_norm=-2\.0 >= 0"),
        ({"l2_clip_norm": jnp.float32(-2)}, r"l2_clip_norm=-2\.0 >= 0"),
        ({"l2_clip_norm": np.ones(2)}, "l2_clip_norm to be one number"),
        ({"normalize_by": 0.0}, "normalize_by=0.0 > 0"),
        ({"normalize_by": float("inf")}, "normalize_by=inf > 0"),
        ({"batch_argnums": ()}, "one at least"),
        ({"batch_argnums": -1}, ">= 0"),
        ({"batch_argnums": 0}, "without a batch axis"),
        ({"prng_argnum": 1}, "argument of its own"),
        ({"microbatch_size": 0}, "microbatch_size=0 >= 1"),
    ],
)
def test_options_out_of_range_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        kernels.clipped_grad(loss_fn, **({"l2_clip_norm": 1.0} | options))


def test_arguments_that_do_not_fit_are_refused():
    grad = kernels.clipped_grad(loss_fn, l2_clip_norm=1.0)
    with pytest.raises(ValueError, match="Expected at least 2 positional arguments, got 1"):
        grad(PARAMS)
    with pytest.raises(ValueError, match="one leading axis"):
        grad(PARAMS, (BATCH[0], BATCH[1][:2]))
    with pytest.raises(ValueError, match="is_padding_example"):
        grad(*PLAIN, is_padding_example=jnp.zeros(2, bool))
    with pytest.raises(TypeError, match="int32"):
        grad({"w": jnp.int32(1)}, BATCH)
    with pytest.raises(errors.LossSignatureError, match="return a scalar"):
        kernels.clipped_grad(lambda p, b: b[0] @ p["w"], l2_clip_norm=1.0)(*PLAIN)
    with pytest.raises(errors.LossSignatureError, match=r"\(scalar, aux\)"):
        kernels.clipped_grad(loss_fn, has_aux=True, l2_clip_norm=1.0)(*PLAIN)
