"""Losses that are means over rows pass; each kind of coupling is found and gets its own advice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import errors
from jaxunlearn.kernels import check_loss

ROWS, FEATURES, CLASSES = 6, 4, 3
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]


def batch_of(seed=0, rows=ROWS):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, FEATURES + 1, rows)
    lengths[0], lengths[-1] = 1, FEATURES
    return {
        "x": rng.normal(size=(rows, FEATURES)).astype(np.float32),
        "y": rng.integers(0, CLASSES, rows).astype(np.int32),
        "mask": (np.arange(FEATURES) < lengths[:, None]).astype(np.float32),
    }


def params_of(seed=1):
    rng = np.random.default_rng(seed)
    return {
        "w": rng.normal(size=(FEATURES, CLASSES)).astype(np.float32),
        "b": np.zeros(CLASSES, np.float32),
    }


def losses_of(params, batch):
    logits = batch["x"] @ params["w"] + params["b"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], axis=1)[:, 0]


def good(params, batch):
    return jnp.mean(losses_of(params, batch))


def layer_norm(params, batch):
    x = batch["x"]
    x = (x - x.mean(1, keepdims=True)) / (x.std(1, keepdims=True) + 1e-3)
    return good(params, batch | {"x": x})


def convolution(params, batch):
    image = batch["x"].reshape(-1, 2, 2, 1)
    kernel = params["w"][:, :1].reshape(2, 2, 1, 1)
    out = jax.lax.conv_general_dilated(
        image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.mean(jnp.mean(out**2, axis=(1, 2, 3)))


def tokens_in_each_row(params, batch):
    scores = (batch["x"] - params["b"][0]) ** 2 * batch["mask"]
    return jnp.mean(jnp.sum(scores, 1) / jnp.sum(batch["mask"], 1))


def tokens_by_a_constant(params, batch):
    return jnp.mean(jnp.sum((batch["x"] - params["b"][0]) ** 2 * batch["mask"], 1) / FEATURES)


def sum_of_losses(params, batch):
    return jnp.sum(losses_of(params, batch))


def batch_norm(params, batch):
    x = batch["x"]
    x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-3)
    return good(params, batch | {"x": x})


def batch_norm_under_a_head_of_zeros(params, batch):
    return batch_norm(params | {"w": params["w"] * params["b"][0]}, batch)


def tokens_in_the_batch(params, batch):
    scores = (batch["x"] - params["b"][0]) ** 2 * batch["mask"]
    return jnp.sum(scores) / jnp.sum(batch["mask"])


def class_weights_in_the_batch(params, batch):
    weights = 1.0 + batch["y"]
    return jnp.sum(weights * losses_of(params, batch)) / jnp.sum(weights)


def contrastive(params, batch):
    z = batch["x"] @ params["w"]
    z = z / jnp.linalg.norm(z, axis=1, keepdims=True)
    return -jnp.mean(jnp.diag(jax.nn.log_softmax(z @ (2.0 * z).T)))


def pairwise(params, batch):
    scores = batch["x"] @ params["w"][:, 0]
    return jnp.mean(jax.nn.softplus(scores[:, None] - scores[None, :] + batch["y"][:, None]))


def mix_up(params, batch):
    return good(params, batch | {"x": 0.7 * batch["x"] + 0.3 * jnp.roll(batch["x"], 1, 0)})


GOOD = [good, layer_norm, convolution, tokens_in_each_row, tokens_by_a_constant]
COUPLED = {
    sum_of_losses: "jnp.mean(losses) instead",
    batch_norm: "BatchNorm in training mode",
    batch_norm_under_a_head_of_zeros: "BatchNorm in training mode",
    tokens_in_the_batch: "a count taken over the whole batch",
    class_weights_in_the_batch: "a count taken over the whole batch",
    contrastive: "rows are compared with one another",
    pairwise: "rows are compared with one another",
    mix_up: "rows are compared with one another",
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("loss_fn", GOOD)
def test_a_mean_over_rows_passes(loss_fn, seed):
    assert check_loss(loss_fn, params_of(seed), batch_of(seed)) is None


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("loss_fn", COUPLED)
def test_each_kind_of_coupling_is_found_and_gets_its_own_advice(loss_fn, seed):
    with pytest.raises(errors.CoupledLossError) as caught:
        check_loss(loss_fn, params_of(seed), batch_of(seed))
    assert COUPLED[loss_fn] in str(caught.value)


def test_a_head_of_zeros_hides_the_coupling_only_at_the_point_itself():
    """With the head at zero the loss is a constant, whatever batch statistics feed it."""
    params, batch = params_of(), batch_of()
    hidden = [
        batch_norm_under_a_head_of_zeros(params, batch_of(s) | {"y": batch["y"]}) for s in (0, 1)
    ]
    assert np.isclose(*hidden)


def test_double_precision_finds_a_coupling_that_single_precision_cannot_see(x64):
    faint = lambda params, batch: good(params, batch) * (1 + 1e-7 * jnp.mean(batch["x"]))
    widen = lambda t: jax.tree.map(
        lambda leaf: np.float64(leaf) if leaf.dtype.kind == "f" else leaf, t
    )
    check_loss(faint, params_of(), batch_of())
    check_loss(good, widen(params_of()), widen(batch_of()))
    with pytest.raises(errors.CoupledLossError):
        check_loss(faint, widen(params_of()), widen(batch_of()))


def test_half_precision_is_given_the_room_its_rounding_needs():
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params_of())
    check_loss(good, half, batch_of())
    with pytest.raises(errors.CoupledLossError):
        check_loss(sum_of_losses, half, batch_of())


def test_the_tolerance_can_be_set():
    check_loss(batch_norm, params_of(), batch_of(), tolerance=1e3)
    with pytest.raises(errors.CoupledLossError):
        check_loss(batch_norm, params_of(), batch_of(), tolerance=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 8, 50])
def test_any_number_of_rows_will_do_for_a_good_loss(rows):
    check_loss(good, params_of(), batch_of(rows=rows))


def test_of_many_rows_only_a_few_are_looked_at():
    batch = batch_of(rows=50)
    batch["x"][8:] = np.nan
    check_loss(good, params_of(), batch)


def test_sequences_of_one_token_are_a_mean():
    one = lambda params, batch: good(params, batch | {"x": batch["x"][:, 0]})
    batch = batch_of()
    check_loss(one, params_of(), batch | {"x": batch["x"][:, None]})


def keyed(params, batch, key):
    keep = jax.random.bernoulli(key, 0.5, batch["x"].shape)
    return good(params, batch | {"x": batch["x"] * keep})


@pytest.mark.parametrize("content", [np.nan, np.inf])
def test_a_row_that_is_not_finite_hides_no_coupling(content):
    batch = batch_of()
    batch["x"][2] = content
    check_loss(good, params_of(), batch)
    with pytest.raises(errors.CoupledLossError, match="BatchNorm in training mode"):
        check_loss(batch_norm, params_of(), batch)
    batch["x"][:] = content
    check_loss(good, params_of(), batch)


def test_a_coupling_is_found_where_the_first_rows_do_not_show_it():
    batch = batch_of(rows=100)
    batch["mask"][:] = 1
    batch["mask"][77, 2:] = 0
    with pytest.raises(errors.CoupledLossError, match="a count taken over the whole batch"):
        check_loss(tokens_in_the_batch, params_of(), batch)
    check_loss(tokens_in_each_row, params_of(), batch)


def test_no_row_at_all_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        check_loss(good, params_of(), jax.tree.map(lambda leaf: leaf[:0], batch_of()))


def test_a_parameter_without_a_gradient_is_named():
    with pytest.raises(TypeError, match=r"int32 at params\['steps'\]"):
        check_loss(good, params_of() | {"steps": np.int32(3)}, batch_of())
    with pytest.raises(TypeError, match=r"function at params\['act'\].*\n?.*eqx\.partition"):
        check_loss(good, params_of() | {"act": good}, batch_of())


@pytest.mark.parametrize("seed", SEEDS)
def test_the_coupling_of_a_keyed_loss_is_found_in_expectation(seed):
    batch, key = batch_of(seed), jax.random.key(seed)
    for coupled in (batch_norm, sum_of_losses, tokens_in_the_batch):
        noisy = lambda params, batch, key, coupled=coupled: coupled(
            params, batch | {"x": batch["x"] + 0.01 * jax.random.normal(key, batch["x"].shape)}
        )
        with pytest.raises(errors.CoupledLossError):
            check_loss(noisy, params_of(seed), batch, key=key)
    for seeds in range(10 * seed, 10 * seed + 3):
        check_loss(keyed, params_of(seed), batch, key=jax.random.key(seeds))


def test_a_keyed_loss_is_checked_for_shape():
    with pytest.raises(errors.LossSignatureError, match="scalar"):
        check_loss(
            lambda params, batch, key: losses_of(params, batch),
            params_of(), batch_of(), key=jax.random.key(0),
        )  # fmt: skip


def test_a_keyed_loss_needs_a_key():
    with pytest.raises(errors.LossSignatureError, match=r"jax\.random\.key\(0\)"):
        check_loss(keyed, params_of(), batch_of())


@pytest.mark.parametrize(
    "loss_fn",
    [
        losses_of,
        lambda params, batch: (good(params, batch), 0.0),
        lambda params: 0.0,
        lambda params, batch, key, more: 0.0,
    ],
)
def test_a_loss_of_another_form_is_refused(loss_fn):
    with pytest.raises(errors.LossSignatureError, match="Expected"):
        check_loss(loss_fn, params_of(), batch_of())


def test_nothing_is_changed():
    params, batch = params_of(), batch_of()
    before = jax.tree.map(np.copy, (params, batch))
    check_loss(good, params, batch)
    for now, was in zip(jax.tree.leaves((params, batch)), jax.tree.leaves(before)):
        assert np.array_equal(now, was)


def test_flax_batch_norm_is_found_in_training_mode_and_passes_in_evaluation_mode():
    nnx = pytest.importorskip("flax.nnx")
    from jaxunlearn import adapters

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(FEATURES, 5, rngs=rngs)
            self.norm = nnx.BatchNorm(5, rngs=rngs)
            self.head = nnx.Linear(5, 1, rngs=rngs, kernel_init=nnx.initializers.zeros)

        def __call__(self, x):
            return self.head(jax.nn.relu(self.norm(self.inner(x))))

    def loss(model, batch):
        return jnp.mean((model(batch["x"])[:, 0] - batch["y"]) ** 2)

    model = Model(nnx.Rngs(0))
    model.train()
    with pytest.raises(errors.CoupledLossError, match="BatchNorm in training mode"):
        adapters.nnx.check_loss(model, loss, batch_of())
    model.eval()
    adapters.nnx.check_loss(model, loss, batch_of())
