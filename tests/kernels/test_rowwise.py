"""A mean loss seen row by row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import errors
from jaxunlearn.kernels import example_keys, row_losses, takes_key
from jaxunlearn.kernels._stable import widen
from jaxunlearn.kernels.rowwise import as_weights, fill_rows, finite_rows, num_rows_of


def square(params, batch):
    return jnp.mean((batch - params) ** 2)


class Method:
    def plain(self, params, batch):
        return 0.0

    def keyed(self, params, batch, key):
        return 0.0

    def __call__(self, params, batch):
        return 0.0


@pytest.mark.parametrize(
    ("loss_fn", "expected"),
    [
        (lambda params, batch: 0.0, False),
        (lambda params, batch, key: 0.0, True),
        (lambda params, batch, rng: 0.0, True),
        (lambda params, batch, key=None: 0.0, True),
        (lambda params, batch, scale=1.0: 0.0, False),
        (lambda *args: 0.0, False),
        (functools.partial(lambda scale, params, batch: 0.0, 1.0), False),
        (functools.partial(lambda params, batch, scale: 0.0, scale=1.0), False),
        (functools.partial(lambda scale, params, batch, key: 0.0, 1.0), True),
        (jax.jit(lambda params, batch, key: 0.0), True),
        (Method(), False),
        (Method().plain, False),
        (Method().keyed, True),
    ],
)
def test_a_third_required_argument_or_one_named_key_is_the_key(loss_fn, expected):
    assert takes_key(loss_fn) is expected


@pytest.mark.parametrize(
    "loss_fn",
    [lambda: 0.0, lambda params: 0.0, lambda params, batch, key, extra: 0.0],
)
def test_a_loss_with_another_signature_is_refused(loss_fn):
    with pytest.raises(errors.LossSignatureError, match="Expected loss_fn\\(params, batch\\)"):
        takes_key(loss_fn)


def test_a_callable_without_a_signature_counts_as_keyless():
    assert takes_key(max) is False


def test_an_examples_key_depends_on_its_id_and_not_on_its_place():
    step_key = jax.random.key(3)
    words = lambda ids: np.asarray(jax.random.key_data(example_keys(step_key, jnp.array(ids))))
    assert np.array_equal(words([7, 2, 9]), words([9, 7, 2])[[1, 2, 0]])
    assert np.array_equal(words([7])[0], jax.random.key_data(jax.random.fold_in(step_key, 7)))
    assert len(np.unique(words(range(50)), axis=0)) == 50


def test_the_key_of_padding_is_nobodys_key():
    words = np.asarray(jax.random.key_data(example_keys(jax.random.key(0), jnp.arange(-1, 200))))
    assert len(np.unique(words, axis=0)) == 201


def test_row_losses_are_the_loss_of_each_row_alone():
    batch = jnp.array([1.0, 3.0, -2.0])
    assert np.array_equal(row_losses(square)(0.5, batch), [0.25, 6.25, 6.25])


def test_row_losses_give_each_row_its_own_key():
    loss_fn = lambda params, batch, key: jnp.mean(batch * jax.random.uniform(key))
    keys = jax.random.split(jax.random.key(0), 3)
    expected = [float(jax.random.uniform(key)) for key in keys]
    assert np.allclose(row_losses(loss_fn)(0.0, jnp.ones(3), keys), expected)


def test_a_loss_that_is_not_a_scalar_is_refused():
    with pytest.raises(errors.LossSignatureError, match="scalar"):
        row_losses(lambda params, batch: (batch - params) ** 2)(0.0, jnp.ones(3))


@pytest.mark.parametrize("batch", [{}, (), jnp.ones(()), {"x": jnp.ones(3), "y": jnp.ones(2)}])
def test_a_batch_without_one_leading_axis_is_refused(batch):
    with pytest.raises(ValueError, match="one leading axis"):
        num_rows_of(batch)


def test_finite_rows_looks_at_every_inexact_leaf_and_only_at_those():
    batch = {
        "x": jnp.array([[1.0, 2.0], [jnp.nan, 0.0], [0.0, 1.0], [1.0, 1.0]]),
        "y": jnp.array([0.0, 1.0, jnp.inf, 2.0]),
        "label": jnp.array([1, 2, 3, jnp.iinfo(jnp.int32).max]),
    }
    assert np.array_equal(finite_rows(batch), [True, False, False, True])


def test_fill_rows_puts_a_live_row_in_place_of_a_dead_one():
    batch = jnp.array([[jnp.nan, 1.0], [2.0, 3.0], [4.0, 5.0]])
    filled = fill_rows(batch, jnp.array([False, True, False]))
    assert np.array_equal(filled, [[2.0, 3.0]] * 3)


def test_fill_rows_puts_zeros_where_nothing_is_live():
    assert np.array_equal(
        fill_rows(jnp.full((2, 2), jnp.nan), jnp.zeros(2, bool)), np.zeros((2, 2))
    )


def test_widen_widens_half_precision_and_leaves_the_rest(x64):
    widths = {jnp.bfloat16: jnp.float32, jnp.float16: jnp.float32, jnp.float64: jnp.float64}
    for narrow, wide in widths.items():
        assert widen(jnp.ones(2, narrow)).dtype == wide


@pytest.mark.parametrize("dtype", [bool, np.int32, np.uint8, jnp.bfloat16])
def test_weights_become_floats(dtype):
    assert as_weights(np.ones(3, dtype)).dtype == jnp.float32
