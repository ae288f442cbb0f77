"""What docstrings say of cost, counted in jaxprs: matrix products, and what is read at all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import kernels
from jaxunlearn.kernels import lbfgs
from tests.kernels.costs import dots, reads

B, T, M, N = 32, 3, 64, 48
KEY = jax.random.key(0)


def ones(*shape):
    return jnp.ones(shape)


def loss_fn(params, x):
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"]) ** 2)


PARAMS, ROWS = {"w": ones(M, N), "v": ones(N, M)}, ones(B, M)
WEIGHTS = 2 * M * N  # parameters

# --- per-example gradients ------------------------------------------------------------------------


def gradients(rows=ROWS):
    return jax.eval_shape(kernels.per_example(loss_fn), PARAMS, rows)


@pytest.mark.parametrize("figure", ["leaf_norms", "layer_norms", "norm_bounds", "clip_weights"])
def test_figures_of_norms_cost_norms(figure):
    grads = gradients(ones(B, T, M))
    args = (1.0,) if figure == "clip_weights" else ()
    assert dots(lambda g: getattr(g, figure)(*args), grads) == dots(lambda g: g.norms(), grads)


@pytest.mark.parametrize(
    "figure", ["clipped_sum", "layer_clipped_sum", "automatic_sum", "normalized_sum"]
)
def test_sums_cost_norms_and_one_product_a_weight(figure):
    grads = gradients(ones(B, T, M))
    args = () if figure == "normalized_sum" else (1.0,)
    total, norms = dots(lambda g: g.sum(), grads), dots(lambda g: g.norms(), grads)
    assert total == 2 * B * T * WEIGHTS
    assert 0 < norms <= 2 * B * T**2 * 2 * (M + N) + total  # the product, should the Grams cancel
    assert dots(lambda g: getattr(g, figure)(*args), grads) == norms + total


def test_other_figures_of_factors_cost_what_they_say():
    one, several = gradients(), gradients(ones(B, T, M))
    assert dots(lambda g: g.norms(), one) == 0
    assert dots(lambda g: g.materialize(), several) == 2 * B * T * WEIGHTS
    assert dots(lambda g, v: g.dot(v), several, PARAMS) <= 2 * B * T * WEIGHTS * 1.05
    assert dots(lambda g: g.gram(), one) <= 2 * B * B * 2 * (M + N)
    across = dots(lambda g: g.gram(), several)
    assert across <= 2 * (2 * B * T + B * B) * WEIGHTS * 1.05
    k = 16
    full = dots(lambda g: g.project(KEY, k), one)
    assert full <= k * 2 * B * WEIGHTS * 1.05
    kronecker = lambda g: g.project(KEY, k, structure="kronecker")
    assert dots(kronecker, several) <= 2 * B * T * 2 * (M + N) * k * 1.05
    units = lambda g: g.by_unit(jnp.arange(B) // 2, num_units=B // 2, max_rows_per_unit=2)
    assert dots(units, one) == 0


def test_microbatches_cost_what_all_rows_at_once_cost():
    consume = lambda grads: (grads.clipped_sum(1.0), grads.norms())
    whole = dots(lambda p, x: consume(kernels.per_example(loss_fn)(p, x)), PARAMS, ROWS)
    step = kernels.microbatched(loss_fn, consume, microbatch_size=8)
    assert dots(step, PARAMS, ROWS) == whole
    total = lambda grads: (grads.sum(), None)
    whole = dots(lambda p, x: total(kernels.per_example(loss_fn)(p, x)), PARAMS, ROWS)
    step = kernels.microbatched(loss_fn, total, microbatch_size=8)
    units = {"units_of_rows": jnp.arange(B) // 2, "num_units": B // 2, "max_rows_per_unit": 4}
    assert dots(lambda p, x: step(p, x, **units), PARAMS, ROWS) == 2 * whole  # B / 2 units of 4


# --- losses, gradients, the Newton step -----------------------------------------------------------


def test_losses_of_rows_cost_one_forward_pass():
    forward = dots(loss_fn, PARAMS, ROWS)
    assert dots(kernels.row_losses(loss_fn), PARAMS, ROWS) == forward
    assert dots(kernels.weighted_loss(loss_fn), PARAMS, ROWS, ones(B)) == forward


def test_a_newton_step_costs_one_gradient_and_its_products():
    ids, weights = jnp.arange(B), ones(B).at[0].set(0)
    gradient = dots(kernels.weighted_grad(loss_fn), PARAMS, ROWS, weights)
    hessian = lambda p, x, v, w: kernels.hvp(loss_fn)(p, x, v, weights=w)
    product = dots(hessian, PARAMS, ROWS, PARAMS, weights)

    def twice(matvec, rhs):
        return kernels.Solution(matvec(matvec(rhs)), 0.0, 2, False)

    step = kernels.newton_step(loss_fn, l2=0.1, solver=twice)
    assert dots(step, PARAMS, ROWS, ids, weights) == gradient + 2 * product
    figures = kernels.removal_figures(loss_fn, l2=0.1)
    norms = dots(lambda p, x: kernels.per_example(loss_fn)(p, x).norms(), PARAMS, ROWS)
    spent = dots(figures, PARAMS, PARAMS, ROWS, ids, weights)
    lengths = 8 * 2 * WEIGHTS
    assert spent <= 3 * gradient + 2 * norms + product + lengths


@pytest.mark.parametrize("name", ["hessian", "ggn", "fisher", "empirical_fisher"])
def test_operators_cost_their_products(name):
    outputs = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]
    square = lambda z, x: jnp.mean(z**2)
    given = {
        "hessian": (loss_fn,),
        "ggn": (outputs, square),
        "fisher": (outputs, kernels.gaussian()),
        "empirical_fisher": (loss_fn,),
    }[name]
    names = {"hessian": "hvp_many", "ggn": "ggn_vp_many"}
    products = getattr(kernels, names.get(name, f"{name}_vp_many"))(*given)
    operator = getattr(kernels, f"{name}_operator")(*given)
    vectors = jax.tree.map(lambda leaf: ones(2, *leaf.shape), PARAMS)
    apply = jax.vmap(lambda p, x, v: operator(p, x) @ v, (None, None, 0))
    assert dots(apply, PARAMS, ROWS, vectors) <= dots(products, PARAMS, ROWS, vectors) * 1.05


# --- L-BFGS ---------------------------------------------------------------------------------------

DIMENSION, PAIRS = 4096, 6
INNER = 2 * DIMENSION
VECTOR = ones(DIMENSION)
MEMORY = lbfgs.init(VECTOR, PAIRS)


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        (lbfgs.curvature(), 3),
        (lbfgs.cautious(), 2),
        (lbfgs.regularised(), 2),
    ],
)  # fmt: skip
def test_a_push_costs_its_rule_and_four_inner_products_a_slot(rule, count):
    alone = dots(lambda s, y: rule(MEMORY, s, y, 1.0), VECTOR, VECTOR)
    assert alone <= count * INNER
    push = functools.partial(lbfgs.push, admission=rule, gradient_norm=1.0)
    assert dots(push, MEMORY, VECTOR, VECTOR) == alone + (4 * PAIRS + 3) * INNER


def test_powell_damping_costs_a_product_and_two_inner_products():
    alone = dots(lambda s, y: lbfgs.powell()(MEMORY, s, y, 1.0), VECTOR, VECTOR)
    assert alone <= dots(lbfgs.product, MEMORY, VECTOR) + 2 * INNER


def test_products_of_many_vectors_cost_eight_m_r_a_parameter():
    stack = ones(5, DIMENSION)
    for product in (lbfgs.inverse_product_many, lbfgs.product_many):
        spent = dots(functools.partial(product, form="compact"), MEMORY, stack)
        assert 0.95 <= spent / (8 * PAIRS * 5 * DIMENSION) <= 1.05


def test_forgetting_takes_no_inner_product_and_a_distance_24_m_squared():
    assert dots(lbfgs.drop, MEMORY, jnp.zeros(PAIRS, bool)) == 0
    spent = dots(lbfgs.operator_distance, MEMORY, MEMORY)
    assert spent <= 24 * PAIRS**2 * DIMENSION * 1.05 + 1e3 * PAIRS**3


@pytest.mark.parametrize(
    "function",
    [lbfgs.ages, lbfgs.is_occupied, lbfgs.initial_scale, lbfgs.eigenvalue_range,
     lambda m: lbfgs.owned(m, 3), lambda m: lbfgs.find(m, 3)],
)  # fmt: skip
def test_what_reads_no_pair_reads_none(function):
    assert not reads(function, MEMORY)
    assert reads(lbfgs.inverse_product, MEMORY, VECTOR)


# --- solves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preconditioned", "bound"), [(False, 16), (True, 22)])
def test_block_cg_costs_what_it_says_an_iteration(preconditioned, bound):
    size, sides = 4096, 8
    inverse = (lambda v: 2 * v) if preconditioned else None

    def solve(count):
        solver = kernels.block_cg(max_iterations=count, loop="unrolled", preconditioner=inverse)
        return dots(lambda b: solver(lambda v: 3 * v, b).x, ones(sides, size))

    assert solve(4) - solve(3) <= (bound * sides + 4) * size * sides * 1.01  # two lengths beside


def test_nystrom_costs_what_it_says():
    size, rank = 4096, 8
    sketch = lambda v: kernels.nystrom(lambda x: 3 * x, v, rank=rank, key=KEY)
    vector = ones(size)
    assert dots(sketch, vector) <= (28 * rank + 12) * size * rank * 1.01  # six lengths beside
    found = jax.eval_shape(sketch, vector)
    assert dots(lambda a, v: a.preconditioner(0.1)(v), found, vector) == 4 * rank * size
    assert dots(lambda v: kernels.jacobi(v)(v), vector) == 0


def test_the_gram_matrix_of_woodbury_is_formed_once():
    grads = gradients()
    solve = lambda g, v: kernels.woodbury(damping=0.1)(g, v).x
    gram, dot, total = (
        dots(lambda g: g.gram(), grads),
        dots(lambda g, v: g.dot(v), grads, PARAMS),
        dots(lambda g: g.sum(ones(B)), grads),
    )
    # Two applications of the inverse, one product between them and one for the residual.
    assert dots(solve, grads, PARAMS) <= gram + 4 * (dot + total) + 2 * 10 * WEIGHTS


def test_dots_counts_loops_branches_and_convolutions():
    twice = lambda w: jax.lax.scan(lambda c, _: (c @ w, None), w, length=2)[0]
    assert dots(twice, ones(4, 4)) == 2 * 2 * 64
    either = lambda w: jax.lax.cond(w[0, 0] > 0, lambda: w @ w, lambda: w @ w @ w)
    assert dots(either, ones(4, 4)) == 2 * 2 * 64
    image, kernel = ones(1, 3, 8, 8), ones(5, 3, 1, 1)
    convolve = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME")
    assert dots(convolve, image, kernel) == 2 * 64 * 15
    np.testing.assert_equal(dots(jnp.sin, 1.0), 0)
