"""The published mode against traces of the two published codes, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import accounting, transforms, unlearners
from jaxunlearn.kernels import lbfgs
from jaxunlearn.unlearners import Event, EventKind, Outcome
from tests.unlearners import _streams as streams

TOLERANCE = 1e-9


def linear(params, batch):
    return 0.5 * jnp.mean((batch["x"] @ params - batch["y"]) ** 2)


def trace(unlearner, trace, events):
    """Parameters after every event, the outputs, and the last state."""
    kinds, ids = (np.asarray(column, np.int32) for column in np.transpose(events))
    rows = {"x": trace["X"][ids][:, None], "y": trace["y"][ids][:, None]}
    events = Event(kinds, ids[:, None], rows)
    first = jax.tree.map(lambda leaf: leaf[0], events)

    def step(state, event):
        state, output = unlearner.stream.step(state, event)
        return state, (state.stream_params, output)

    start = unlearner.stream.init(jnp.zeros(trace["X"].shape[1]), first)
    state, (path, output) = jax.jit(lambda s, e: jax.lax.scan(step, s, e))(start, events)
    assert not np.any(output.outcome == int(Outcome.REFUSED))
    return path, output, state


def ordered_pairs(memory):
    """S and Y, oldest first."""
    size = memory.pairs.shape[0]
    order = (int(memory.next_slot) - int(memory.num_pairs) + np.arange(size)) % size
    return memory.pairs[order, 0], memory.pairs[order, 1]


def assert_rows_close(path, expected):
    """Relative to the norm of each row: the published deletions grow to 1e40."""
    gap = np.linalg.norm(path - expected, axis=1)
    assert np.all(gap <= TOLERANCE * np.maximum(1.0, np.linalg.norm(expected, axis=1)))


@pytest.mark.data
@pytest.mark.slow
def test_the_first_published_code(x64):
    """Rate 0.5, noise scaled to each step back, steps back at rate 1."""
    with np.load(streams.golden("memory_pair_exp_trace.npz")) as file:
        given = dict(file)
    num_inserts, num_deletions = len(given["X"]), len(given["delete_idx"])
    noise = jnp.asarray(given["unit_noise"])
    unlearner = unlearners.memory_pair(
        linear, num_examples=num_inserts, max_steps=num_inserts, mode="paper", learning_rate=0.5,
        admission=transforms.relative_curvature(), nothing_below=None, num_checkpoints=2,
        paper=transforms.PaperDeletion(
            rate=1.0,
            noise_multiplier=accounting.published_noise(1.0, 1e-5, share=0.5)(num_deletions),
            unit_noise=lambda index, params: noise[index],
        ),
    )  # fmt: skip
    script = [(int(EventKind.INSERT), i) for i in range(num_inserts)]
    script += [(int(EventKind.DELETE), i) for i in given["delete_idx"]]
    path, output, state = trace(unlearner, given, script)
    memory = state.stream_opt_state.inner.curvature
    assert_rows_close(path[:num_inserts], given["theta_after_insert"])
    assert_rows_close(path[num_inserts:], given["theta_after_delete"])
    for found, expected in zip(ordered_pairs(memory), (given["S"], given["Y"])):
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    direction = -lbfgs.inverse_product(memory, jnp.asarray(given["probe"]))
    np.testing.assert_allclose(direction, given["direction_probe"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(output.noise_stddev[num_inserts:], given["sigma"], rtol=TOLERANCE)


@pytest.mark.data
@pytest.mark.slow
def test_the_last_published_code(x64):
    """D / sqrt(S) steps, damped pairs, gamma at most 1, parameters scaled back after the pair."""
    with np.load(streams.golden("urm_memory_pair_trace_a.npz")) as file:
        given = dict(file)
    events = given["events"]
    deletions = np.flatnonzero(events[:, 0] == 1)
    # Theirs draws noise at every tenth insert from the 610th on, also where its gate then closes.
    attempts = (deletions - np.arange(len(deletions)) - deletions[0]) // 10
    noise = jnp.asarray(given["unit_noise"][attempts])
    unlearner = unlearners.memory_pair(
        linear, num_examples=len(given["X"]), max_steps=len(given["X"]), mode="paper",
        learning_rate=transforms.AdaptiveRate(diameter=1.0, max_rate=1.0),
        admission=transforms.levenberg_damped(), nothing_below=None, num_checkpoints=2,
        optimizer_options={"scale_range": (1e-6, 1.0), "max_norm": 10.0, "move": "step"},
        paper=transforms.PaperDeletion(
            rate=None,
            noise_stddev=float(given["sens_sigma"][deletions[0], 1]),
            unit_noise=lambda index, params: noise[index],
        ),
    )  # fmt: skip
    path, output, state = trace(unlearner, given, events)
    assert_rows_close(path, given["theta"])
    # Theirs logs the direction before it is scaled by the step size.
    sensitivity = output.step_norm[deletions] / given["eta"][deletions]
    np.testing.assert_allclose(sensitivity, given["sens_sigma"][deletions, 0], rtol=TOLERANCE)
    memory = state.stream_opt_state.inner.curvature
    for found, expected in zip(ordered_pairs(memory), (given["S"], given["Y"])):
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    scale = jnp.clip(lbfgs.initial_scale(memory), 1e-6, 1.0)
    direction = -lbfgs.inverse_product(memory, jnp.asarray(given["probe"]), scale=scale)
    np.testing.assert_allclose(direction, given["direction_probe"], rtol=0, atol=TOLERANCE)
