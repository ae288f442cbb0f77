"""Clip bounds of convolutions, tables and tied weights: judged in float64, without slack."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxunlearn import kernels
from jaxunlearn.kernels import factors

SEEDS = st.integers(0, 2**31 - 1)
few = settings(max_examples=6, deadline=None)
NUM_ROWS = 8
PLAIN, HUGE, TINY, CANCELLING, HUGE_CANCELLING, MIXED, EDGE, ABOVE = range(NUM_ROWS)

# --- losses that are linear in the parameter: the rows are the factors ----------------------------


def correlation(w, batch, **options):
    x, g = batch
    return jnp.sum(convolved(x, w, **options) * g) / x.shape[0]


def convolved(x, w, *, stride=1, groups=1, lhs_dilation=1):
    num = w.ndim - 2
    spatial, each = "DHW"[-num:], lambda value: (value,) * num
    return lax.conv_general_dilated(
        x, w, each(stride), each((0, 0)), lhs_dilation=each(lhs_dilation),
        feature_group_count=groups,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
    )  # fmt: skip


def frames(w, batch):
    x, g = batch
    return jnp.sum(convolved(x.reshape(-1, *x.shape[2:]), w).reshape(g.shape) * g) / x.shape[0]


def lookup(w, batch):
    ids, g = batch
    return jnp.sum(w[ids] * g) / ids.shape[0]


def tied(w, batch):
    ids, g, x, h = batch
    return lookup(w, (ids, g)) + jnp.sum((x @ w.T) * h) / ids.shape[0]


def decayed(w, batch):
    x, g = batch
    return 0.5 * jnp.sum(w**2) + jnp.sum((x @ w) * g) / x.shape[0]


def decayed_lookup(w, batch):
    return 0.5 * jnp.sum(w**2) + lookup(w, batch)


def decayed_correlation(w, batch):
    return 0.5 * jnp.sum(w**2) + correlation(w, batch)


def both_ways(w, batch):
    x, g, y, h = batch
    return (jnp.sum((x @ w) * g) + jnp.sum((y @ w.T) * h)) / x.shape[0]


def two_scales(w, batch):
    x, g, h = batch
    return correlation(w, (x, g)) + jnp.sum(convolved(x[:, ::2], w) * h) / x.shape[0]


def layers(w, batch):
    x, g = batch
    return sum(jnp.sum((x[:, k] @ w[k]) * g[:, k]) for k in range(3)) / x.shape[0]


# --- rows that a bound can break on ---------------------------------------------------------------


def opposite(rng, a, axis, epsilon):
    """`a` with the second half along `axis` minus the first, but for one part in 1 / epsilon."""
    half = a.shape[axis] // 2
    first, _, rest = np.split(a, [half, 2 * half], axis)
    return np.concatenate([first, -first * (1 + epsilon * rng.normal(size=first.shape)), rest * 0],
                          axis)  # fmt: skip


def flattened(rng, x, axes, epsilon):
    """Nearly the same everywhere along `axes`."""
    first = x[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(x.ndim))]
    return first * (1 + epsilon * rng.normal(size=x.shape))


def images(inputs, outputs):
    """A row of a convolution: the same patch everywhere, and cotangents that sum to nothing."""

    def rows(rng, epsilon):
        x, g = rng.normal(size=(NUM_ROWS, *inputs)), rng.normal(size=(NUM_ROWS, *outputs))
        spatial = tuple(range(1, x.ndim - 1))
        for row in (CANCELLING, HUGE_CANCELLING):
            x[row] = flattened(rng, x[row], [axis - 1 for axis in spatial], epsilon)
            g[row] = opposite(rng, g[row].reshape(-1, outputs[-1]), 0, epsilon).reshape(outputs)
        scales = 10.0 ** rng.uniform(-6, 6, (*outputs[:-1], 1))
        g[MIXED] *= scales
        return scaled(x, g)

    return rows


def scaled(x, *others):
    """Factors whose squares leave the range of float32."""
    for row, left, right in [(HUGE, 1e22, 1e-12), (TINY, 1e-24, 1e10), (HUGE_CANCELLING, 1e9, 1)]:
        x[row] *= left
        for g in others:
            g[row] *= right
    return x, *others


def table_rows(num_rows, num_tokens, d):
    def rows(rng, epsilon):
        ids = rng.integers(0, num_rows, (NUM_ROWS, num_tokens))
        g = rng.normal(size=(NUM_ROWS, num_tokens, d))
        half = num_tokens // 2
        for row in (CANCELLING, HUGE_CANCELLING):
            ids[row, half : 2 * half] = ids[row, :half]
            g[row] = opposite(rng, g[row], 0, epsilon)
        g[MIXED] *= 10.0 ** rng.uniform(-12, 12, (num_tokens, 1))
        g[HUGE], g[TINY], g[HUGE_CANCELLING] = g[HUGE] * 1e22, g[TINY] * 1e-24, g[CANCELLING] * 1e9
        return ids, g

    return rows


def tied_rows(num_rows, num_tokens, d):
    """What the table's row gets back as an embedding, the projection takes away."""

    def rows(rng, epsilon):
        ids, g = table_rows(num_rows, num_tokens, d)(rng, epsilon)
        x, h = rng.normal(size=g.shape), rng.normal(size=(NUM_ROWS, num_tokens, num_rows))
        for row, size in [(CANCELLING, 1), (HUGE_CANCELLING, 1e9)]:
            ids[row], g[row] = (
                np.arange(num_tokens) % num_rows,
                rng.normal(size=g[row].shape) * size,
            )
            h[row] = np.eye(num_rows)[ids[row]]
            x[row] = -g[row] * (1 + epsilon * rng.normal(size=x[row].shape))
        x[HUGE] *= 1e20
        x[TINY], h[TINY] = x[TINY] * 1e-30, h[TINY] * 1e6
        return ids, g, x, h

    return rows


def token_rows(num_tokens, m, n, *, again=False):
    def rows(rng, epsilon):
        x, g = (rng.normal(size=(NUM_ROWS, num_tokens, d)) for d in (m, n))
        if not again:
            for row in (CANCELLING, HUGE_CANCELLING):
                x[row, num_tokens // 2 :] = x[row, : num_tokens // 2]
                g[row] = opposite(rng, g[row], 0, epsilon)
            return scaled(x, g)
        y, h = (rng.normal(size=leaf.shape) for leaf in (g, x))
        for row in (CANCELLING, HUGE_CANCELLING):
            y[row] = -g[row] * (1 + epsilon * rng.normal(size=g[row].shape))
            h[row] = x[row]
        x, g, h, y = scaled(x, g, h, y)
        return x, g, y, h

    return rows


def layer_rows(rng, epsilon):
    x, g = token_rows(12, 16, 20)(rng, epsilon)
    return x.reshape(NUM_ROWS, 3, 4, 16), g.reshape(NUM_ROWS, 3, 4, 20)


def two_scale_rows(rng, epsilon):
    x, g = images((5, 4, 8), (3, 2, 20))(rng, epsilon)
    return x, g, -g[:, :1] * (1 + epsilon)


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss, its parameter's shape, the rows, the factor they lead to, the parameter's size."""

    loss_fn: Callable
    shape: tuple[int, ...]
    rows: Callable
    factor: type
    scale: float = 0.0


CONV, LOOKUP, SUM = factors.Conv, factors.Lookup, factors.Sum
strided = functools.partial(correlation, stride=2)
grouped = functools.partial(correlation, groups=2)
depthwise = functools.partial(correlation, groups=4)
holes = functools.partial(correlation, lhs_dilation=2)
CASES = {
    "convolution, Gram": Case(correlation, (3, 3, 8, 32), images((5, 5, 8), (3, 3, 32)), CONV),
    "convolution, product": Case(correlation, (3, 3, 8, 16), images((8, 8, 8), (6, 6, 16)), CONV),
    "strided taps": Case(strided, (9, 8, 16), images((37, 8), (15, 16)), CONV),
    "grouped convolution": Case(grouped, (3, 3, 8, 40), images((4, 5, 16), (2, 3, 40)), CONV),
    "depthwise convolution": Case(depthwise, (3, 3, 1, 32), images((4, 4, 4), (2, 2, 32)), CONV),
    "holes in the input": Case(holes, (2, 2, 8, 16), images((3, 3, 8), (4, 4, 16)), CONV),
    "three dimensions": Case(
        correlation, (2, 2, 2, 4, 24), images((3, 3, 3, 4), (2, 2, 2, 24)), CONV
    ),
    "frames": Case(frames, (3, 3, 8, 32), images((2, 4, 4, 8), (2, 2, 2, 32)), CONV),
    "table": Case(lookup, (20, 12), table_rows(20, 16, 12), LOOKUP),
    "table of few rows": Case(lookup, (40, 6), table_rows(40, 16, 6), LOOKUP),
    "table of one id": Case(lookup, (11, 12), table_rows(11, 1, 12), LOOKUP),
    "tied": Case(tied, (30, 24), tied_rows(30, 8, 24), SUM),
    "tied, many tokens": Case(tied, (80, 60), tied_rows(80, 20, 60), SUM),
    "decay": Case(decayed, (20, 16), token_rows(4, 20, 16), SUM, 1e-3),
    "decay of a table": Case(decayed_lookup, (30, 8), table_rows(30, 20, 8), SUM, 1e-3),
    "decay of a kernel": Case(
        decayed_correlation, (3, 3, 8, 32), images((5, 5, 8), (3, 3, 32)), SUM, 1e-3
    ),
    "both ways": Case(
        both_ways, (40, 36), token_rows(3, 40, 36, again=True), factors.Outer
    ),
    "two scales": Case(two_scales, (3, 3, 8, 20), two_scale_rows, SUM),
    "layers": Case(layers, (3, 16, 20), layer_rows, SUM),
}  # fmt: skip
FAST = {"convolution, Gram", "table", "tied"}
every = pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)


def operands(name, seed):
    """The parameter, the rows in float32, and a clip norm that float32 has."""
    case, rng = CASES[name], np.random.default_rng(seed)
    w = np.float32(case.scale * rng.normal(size=case.shape))
    leaves = case.rows(rng, 10.0 ** rng.uniform(-7, -2))
    rows = [
        x.astype(np.int32 if np.issubdtype(x.dtype, np.integer) else np.float32) for x in leaves
    ]
    return w, tuple(rows), np.float32(10.0 ** rng.uniform(-3, 3))


@functools.lru_cache
def compiled(name):
    """(figures in float32, the gradients of the rows in float64) of one case."""
    loss_fn = CASES[name].loss_fn

    def figures(w, batch, clip):
        grads = kernels.per_example(loss_fn)(w, batch)

        def alone(row):
            only = dataclasses.replace(grads, is_padding=jnp.arange(NUM_ROWS) != row)
            return {
                "clipped": only.clipped_sum(clip),
                "automatic": only.automatic_sum(clip, gamma=0.0),
                "normalized": only.normalized_sum(),
                "layer": only.layer_clipped_sum(clip),
            }

        return {
            "norms": grads.norms(),
            "bounds": grads.norm_bounds(),
            "weights": grads.clip_weights(clip),
            "contributions": lax.map(alone, jnp.arange(NUM_ROWS)),
            "factors": grads.factors,
        }

    def slow(w, batch):
        one = lambda w, row: loss_fn(w, jax.tree.map(lambda leaf: leaf[None], row))
        return jax.vmap(jax.grad(one), (None, 0))(w, batch)

    return jax.jit(figures), jax.jit(slow)


def exact(name, w, batch):
    """Each row's gradient, (B, P), in float64 from the very numbers that float32 has."""
    with jax.enable_x64(True):
        wide = lambda x: jnp.asarray(x, jnp.float64) if x.dtype == np.float32 else jnp.asarray(x)
        rows = compiled(name)[1](wide(w), jax.tree.map(wide, batch))
        return np.asarray(rows).reshape(NUM_ROWS, -1)


def fitted(name, w, batch, clip):
    """The batch with one row whose norm is the clip norm, and one a millionth above."""
    norms = np.linalg.norm(exact(name, w, batch), axis=1)
    for row, size in [(EDGE, 1.0), (ABOVE, 1 + 1e-6)]:
        for leaf in batch[1::2] if len(batch) == 4 else batch[1:]:
            leaf[row] *= np.float32(clip * size / norms[row])
    return batch


def judge(name, w, batch, clip):
    """No figure is below what it bounds, whatever the rows are."""
    rows = exact(name, w, batch)
    norms = np.linalg.norm(rows, axis=1)
    found = compiled(name)[0](w, batch, clip)
    assert isinstance(found["factors"][0], CASES[name].factor)
    assert np.all(norms <= np.float64(found["norms"]) + np.float64(found["bounds"]))
    assert np.all(np.float64(found["weights"]) * norms <= clip)
    for kind, bound in dict.fromkeys(found["contributions"], clip).items():
        alone = np.float64(found["contributions"][kind]).reshape(NUM_ROWS, -1)
        bound = 1.0 if kind == "normalized" else clip
        assert np.all(np.linalg.norm(alone, axis=1) <= bound), kind
    return rows, np.float64(found["contributions"]["clipped"]).reshape(NUM_ROWS, -1)


@every
@few
@given(seed=SEEDS)
def test_no_contribution_exceeds_the_clip_norm(name, seed):
    """Huge, tiny, mixed and cancelling rows, and rows on the edge; the plain ones come close."""
    w, batch, clip = operands(name, seed)
    batch = fitted(name, w, batch, clip)
    contributions = judge(name, w, batch, clip)[1]
    largest = np.linalg.norm(contributions, axis=1)
    near = [HUGE] if CASES[name].scale else [HUGE, ABOVE]
    assert np.all(largest[near] >= clip * (1 - 2e-2))


@every
@few
@given(seed=SEEDS)
def test_no_contribution_exceeds_the_clip_norm_where_no_row_cancels(name, seed):
    """Then the Gram trick serves every norm that it can serve."""
    w, batch, clip = operands(name, seed)
    for leaf in batch:
        leaf[[CANCELLING, HUGE_CANCELLING]] = leaf[[PLAIN, ABOVE]]
    judge(name, w, batch, clip)


@every
@few
@given(seed=SEEDS)
def test_what_a_row_holds_moves_no_other_row_by_a_bit(name, seed):
    """A row that cancels is clipped by another norm than the rest; the rest must not notice."""
    w, batch, clip = operands(name, seed)
    for leaf in batch:
        leaf[[CANCELLING, HUGE_CANCELLING, HUGE, TINY]] = leaf[[PLAIN, PLAIN, ABOVE, ABOVE]]
    calm = compiled(name)[0](w, batch, clip)
    rough = operands(name, seed)[1]
    for changed in (CANCELLING, HUGE_CANCELLING, HUGE, TINY):
        keep = np.arange(NUM_ROWS) != changed
        mixed = jax.tree.map(np.copy, batch)
        for leaf, its in zip(mixed, rough):
            leaf[changed] = its[changed]
        found = compiled(name)[0](w, mixed, clip)
        for figure in ("norms", "bounds", "weights", "contributions"):
            pairs = zip(jax.tree.leaves(found[figure]), jax.tree.leaves(calm[figure]))
            assert all(np.array_equal(a[keep], b[keep]) for a, b in pairs), (figure, changed)


BATCH, TOKENS, WIDTH, CLIP = 512, 16, 96, 1.0
KINDS = ("clipped", "automatic", "normalized", "layer", "units")
OPTIONS = {
    "plain": {},
    "rescaled": {"rescale_to_unit_norm": True},
    "divided": {"normalize_by": 3.0},
    "microbatches": {"microbatch_size": 128},
}


def product(w, batch):
    x, g = batch
    return jnp.sum((x @ w) * g) / x.shape[0]


@jax.jit
def sums(batch, padding):
    """Every clipped sum of a batch, and what is stated of it."""
    w = jnp.zeros((WIDTH, WIDTH))
    grads = kernels.per_example(product)(w, batch, is_padding_example=padding)
    units = grads.by_unit(jnp.arange(BATCH), num_units=BATCH, max_rows_per_unit=1)
    figures = {
        "clipped": grads.clipped_sum(CLIP),
        "automatic": grads.automatic_sum(CLIP, gamma=0.0),
        "normalized": grads.normalized_sum(),
        "layer": grads.layer_clipped_sum(CLIP),
        "units": units.clipped_sum(CLIP),
    }
    for name, options in OPTIONS.items():
        grad = kernels.clipped_grad(product, l2_clip_norm=CLIP, **options)
        figures[name] = grad(w, batch, is_padding_example=padding)
    return figures


def stated(kind):
    if kind in KINDS:
        return CLIP
    return kernels.clipped_grad(product, l2_clip_norm=CLIP, **OPTIONS[kind]).sensitivity()


def test_one_row_moves_a_large_sum_by_no_more_than_is_stated():
    """512 rows of one direction: were all clipped otherwise because of one, their sum would tell.

    Their tokens cancel as far as the Gram trick is trusted with, so that its bound is wide.
    """
    rng = np.random.default_rng(0)
    x, g = (rng.normal(size=(BATCH, TOKENS, WIDTH)) for _ in "xg")
    x[:] = np.concatenate([x[0, : TOKENS // 2]] * 2)
    first = {"itself": (x[0], opposite(rng, g[0], 0, 0.25))}
    g[:] = first["itself"][1]
    first["opposite"] = x[0], -g[0]
    first["cancelling"] = x[0], opposite(rng, g[0], 0, 1e-2)
    first["huge"], first["tiny"] = (x[0] * 1e18, g[0] * 1e12), (x[0] * 1e-18, g[0] * 1e-8)
    found = {}
    for name, (left, right) in first.items():
        rows = x.astype(np.float32), g.astype(np.float32)
        rows[0][0], rows[1][0] = left, right
        padding = np.arange(BATCH) % 2 == 1  # half of the rows are none, whatever they hold
        rows[0][padding] *= np.float32(10.0 ** rng.integers(-9, 9))
        found[name] = sums(rows, padding)
    found["padding"] = sums(rows, padding | (np.arange(BATCH) == 0))
    for kind in found["itself"]:
        rounding = 4 * BATCH * 2.0**-24 * stated(kind)
        totals = {name: np.float64(each[kind]) for name, each in found.items()}
        gaps = [np.linalg.norm(one - other) for one in totals.values() for other in totals.values()]
        assert max(gaps) <= 2 * stated(kind) + rounding, kind
        away = [np.linalg.norm(total - totals["padding"]) for total in totals.values()]
        assert max(away) <= stated(kind) + rounding, kind
        assert max(away) >= stated(kind) * (1 - 2e-2), kind


# --- weights and products too small to be normal numbers ------------------------------------------

NUM_EXTREME = 48
PLAINS = np.arange(NUM_EXTREME) % 4 == 0


def uncancelled(rng):
    """How much of each row is left: a tenth of the plain ones."""
    return np.where(PLAINS, 0.1, 10.0 ** rng.uniform(-7, -1, NUM_EXTREME))


def extreme_rows(rng, left, right, axis=1, span=(-150, 90)):
    """Tokens that cancel, and factors of any exponents whose products have one within `span`.

    One row in four is of plain magnitude.
    """
    least, most = span
    x, g = (rng.normal(size=(NUM_EXTREME, *shape)) for shape in (left, right))
    x[:] = flattened(rng, x, [axis], 0)
    epsilon = uncancelled(rng).reshape(-1, *[1] * (g.ndim - 1))
    cancelling = opposite(rng, g, axis, 0) + epsilon * np.abs(g)
    g = np.where(rng.random(epsilon.shape) < 0.8, cancelling, g) if g.shape[axis] > 1 else g
    tokens = rng.integers(0, 12, g.shape[: axis + 1]) * rng.integers(0, 2, NUM_EXTREME)[:, None]
    g = np.ldexp(g, tokens.reshape(*tokens.shape, *[1] * (g.ndim - axis - 1)))
    first = rng.integers(-120, 118, NUM_EXTREME)
    both = rng.integers(least, most, NUM_EXTREME)
    second = np.clip(both - first, -124, 106)
    first = np.clip(first, least - second, most - second)
    return [
        np.ldexp(each, np.where(PLAINS, 0, e).reshape(-1, *[1] * (each.ndim - 1))).astype(
            np.float32
        )
        for each, e in ((x, first), (g, second))
    ]


def extreme_table(rng, **span):
    x, g = extreme_rows(rng, (2, 1), (2, 12), **span)
    g *= np.exp2(np.float32(np.frexp(x[:, :1])[1] if span else 0))
    return np.zeros(g.shape[:2], np.int32), g


def extreme_tied(rng, **span):
    """One token of each use: what they have in common cancels."""
    x, h = extreme_rows(rng, (1, 24), (1, 30), **span)
    h[:] = h * np.eye(30)[0]
    g = -np.float32(x[:, 0] * h[:, :, 0] * (1 + uncancelled(rng)[:, None]))
    return np.zeros((*g.shape[:1], 1), np.int32), g[:, None], x, h


def extreme_factors(left, right):
    return functools.partial(extreme_rows, left=left, right=right)


def extreme_vector(rng, **span):
    return extreme_table(rng, **span)[1][:, 0, :7]


EXTREMES = {
    "one token": (product, (12, 16), extreme_factors((1, 12), (1, 16))),
    "tokens": (product, (16, 16), extreme_factors((2, 16), (2, 16))),
    "tokens, left": (product, (12, 40), extreme_factors((2, 12), (2, 40))),
    "convolution": (correlation, (3, 8, 32), extreme_factors((5, 8), (3, 32))),
    "table": (lookup, (5, 12), extreme_table),
    "tied": (tied, (30, 24), extreme_tied),
    "vector": (lambda w, x: jnp.sum(x * w) / x.shape[0], (7,), extreme_vector),
}
EXTREME_FACTORS = dict(zip(EXTREMES, (factors.Outer,) * 3 + (CONV, LOOKUP, SUM, factors.Dense)))


@functools.lru_cache
def compiled_extremes(name):
    """(which rows are finite, the contribution of each row alone, of every kind)."""
    loss_fn, shape, _ = EXTREMES[name]
    divided = {"rescale_to_unit_norm": True, "normalize_by": 3.0}

    def figures(batch, clip):
        w = jnp.zeros(shape)
        grads = kernels.per_example(loss_fn)(w, batch)
        assert isinstance(grads.factors[0], EXTREME_FACTORS[name])
        divide = kernels.clipped_grad(loss_fn, l2_clip_norm=clip, normalize_by=3.0)

        def alone(row):
            padding = jnp.arange(NUM_EXTREME) != row
            only = dataclasses.replace(grads, is_padding=padding)
            weights = only.clip_weights(clip)
            return {
                "clipped": only.clipped_sum(clip),
                "weights": only.sum(weights),
                "automatic": only.automatic_sum(clip, gamma=0.0),
                "normalized": only.normalized_sum(),
                "layer": only.layer_clipped_sum(clip),
                "divided": divide(w, batch, is_padding_example=padding),
                "rescaled": kernels.clipped_grad(loss_fn, l2_clip_norm=clip, **divided)(
                    w, batch, is_padding_example=padding
                ),
            }

        return grads.is_finite, lax.map(alone, jnp.arange(NUM_EXTREME))

    return jax.jit(figures)


extremes = pytest.mark.parametrize(
    "name",
    [
        n if n in {"tokens", "convolution", "table", "tied"}
        else pytest.param(n, marks=pytest.mark.slow)
        for n in EXTREMES
    ],
)  # fmt: skip


def judge_extremes(name, batch, clip):
    """No contribution exceeds what is stated, and the plain rows come through."""
    is_finite, found = compiled_extremes(name)(batch, clip)
    stated = {"normalized": 1.0, "divided": float(clip) / 3, "rescaled": 1 / 3}
    for kind, rows in found.items():
        norms = np.linalg.norm(np.float64(rows).reshape(NUM_EXTREME, -1), axis=1)
        assert np.all(norms <= stated.get(kind, float(clip))), (kind, norms.max() / clip)
    assert np.all(np.asarray(is_finite)[PLAINS])
    norms = np.linalg.norm(np.float64(found["normalized"]).reshape(NUM_EXTREME, -1), axis=1)
    assert np.all(norms[PLAINS] >= 1e-2)
    return np.asarray(is_finite), norms


@extremes
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_what_underflows_takes_no_contribution_above_the_clip_norm(name, seed):
    """A token whose weighted cotangent is flushed to zero leaves the other without its opposite."""
    rng = np.random.default_rng(seed)
    batch = EXTREMES[name][2](rng)
    clip = np.float32(10.0 ** rng.choice([rng.uniform(-36, 0), rng.uniform(-12, 3)]))
    judge_extremes(name, batch, clip)


@extremes
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_what_overflows_takes_no_contribution_above_the_clip_norm(name, seed):
    """Rows whose size, or bound, or factor is just below the largest number, or beyond it."""
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore", invalid="ignore"):
        batch = EXTREMES[name][2](rng, span=(110, 132))
    clip = np.float32(10.0 ** rng.uniform(-3, 38))
    is_finite, norms = judge_extremes(name, batch, clip)
    assert np.any(is_finite & ~PLAINS)
    assert not np.all(is_finite)
    assert not np.any(norms[~is_finite])


def test_a_token_that_is_flushed_to_zero_leaves_no_other_without_its_opposite():
    """1.2e-29 w is a normal number, 1.1e-29 w is not; times 1e30 the difference is 12 C."""
    x = np.full((1, 2, 16), 1e30, np.float32)
    g = np.zeros((1, 2, 16), np.float32)
    g[0, 0], g[0, 1] = 1.2e-29, -1.1e-29
    grads = kernels.per_example(product)(jnp.zeros((16, 16)), (x, g))
    assert isinstance(grads.factors[0], factors.Outer)
    for clip in (1e-9, 1.6e-8, 1e-3):
        assert np.linalg.norm(np.float64(grads.clipped_sum(clip))) <= clip


# --- what norm_bounds says of products ------------------------------------------------------------


def test_norm_bounds_hold_for_gradients_that_are_multiplied_out():
    """64 tokens that nearly cancel in 5 x 4 weights: float64 on the factors."""
    rng = np.random.default_rng(0)
    rows = 100

    def opposed(*shape):
        first = rng.normal(size=(rows, shape[0] // 2, *shape[1:]))
        return np.concatenate([first, first * (1 + 1e-6 * rng.normal(size=first.shape))], axis=1)

    x = opposed(64, 5).astype(np.float32)
    r = opposed(64, 4)
    r[:, 32:] *= -1
    r = r.astype(np.float32)
    grads = kernels.per_example(product)(jnp.zeros((5, 4)), (x, r))
    assert {row.path for row in grads.explain().rows} == {"product"}
    exact = np.einsum("btm,btn->bmn", np.float64(x), np.float64(r))
    true = np.linalg.norm(exact.reshape(rows, -1), axis=1)
    norms, bounds = (np.float64(v) for v in (grads.norms(), grads.norm_bounds()))
    assert np.any(true > norms * (1 + 1e-5))  # what is hidden is there to be found
    assert np.all(true <= norms + bounds)
    assert np.all(bounds < 1e-3 * np.sqrt((x**2).sum((1, 2)) * (r**2).sum((1, 2))))
    units = grads.by_unit(np.arange(rows) // 2, num_units=rows // 2)
    exact = exact.reshape(rows // 2, 2, -1).sum(1)
    assert np.all(np.linalg.norm(exact, axis=1) <= np.float64(units.norms() + units.norm_bounds()))
    x[0] = np.nan
    units = kernels.per_example(product)(jnp.zeros((5, 4)), (x, r)).by_unit(
        np.arange(rows) // 2, num_units=rows // 2
    )
    assert np.all(np.isfinite(units.norm_bounds()))
