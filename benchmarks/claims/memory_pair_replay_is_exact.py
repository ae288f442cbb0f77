"""Claim: `memory_pair` deletes exactly by replay, at every lag, and its paper mode is the paper's.

A stream of 440 inserts of two rows, logistic and squared loss, each deletion judged by four
distances to the stream that never held the row: parameters, memory operator (the largest over all
vectors), all of the state, direction of the next update. Replay must have all four at zero, bit for
bit, at lags 1 to 400, within the stream and by a single request. Beside it, what the other ways of
deleting leave. With the golden files (JAXUNLEARN_GOLDEN, or golden/ next to JAXUNLEARN_DATA) paper
mode must follow both published traces to 1e-9.

python benchmarks/claims/memory_pair_replay_is_exact.py [--quick]    exits 1 where this fails.
"""

import argparse
import os
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxunlearn import accounting, kernels, transforms, tree, unlearners
from jaxunlearn.kernels import lbfgs
from jaxunlearn.unlearners import Event, EventKind

INSERTS, WIDTH, DIM = 440, 2, 8
LAGS = (1, 2, 5, 10, 20, 50, 100, 200, 400)
MODES = ("replay", "tangent", "drop_pair", "paper")


def logistic(params, batch):
    return jnp.mean(jnp.logaddexp(0.0, -batch["y"] * (batch["x"] @ params)))


def squared(params, batch):
    return 0.5 * jnp.mean((batch["x"] @ params - batch["y"]) ** 2)


LOSSES = {"logistic": logistic, "squared": squared}


def stream_data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(INSERTS * WIDTH, DIM))
    y = np.sign(x @ rng.normal(size=DIM) + 0.5 * rng.normal(size=INSERTS * WIDTH))
    return {"x": x, "y": y}


def make(loss_fn, mode):
    return unlearners.memory_pair(
        loss_fn, num_examples=INSERTS * WIDTH, max_steps=INSERTS, batch_size=WIDTH, mode=mode,
        learning_rate=0.1, l2=0.1, memory_size=10, admission=transforms.prudente_souza(),
        num_checkpoints=12, nothing_below=None, segment_length=1, progress=False,
    )  # fmt: skip


def events_of(data, victim=None, deletes=False):
    """All inserts and one more event; without the victim's row where it never came."""
    ids = np.full((INSERTS + 1, WIDTH), -1, np.int32)
    ids[:-1] = np.arange(INSERTS * WIDTH).reshape(INSERTS, WIDTH)
    rows = jax.tree.map(lambda leaf: leaf[np.maximum(ids, 0)], data)
    kinds = np.full(INSERTS + 1, int(EventKind.INSERT), np.int32)
    kinds[-1] = int(EventKind.DELETE if deletes else EventKind.NOTHING)
    if deletes:
        ids[-1, 0] = victim
    elif victim is not None:
        ids[ids == victim] = -1
    return Event(kinds, ids, rows)


def distances(found, target, held_out, loss_fn) -> np.ndarray:
    """Parameters, memory operator, combined state, direction: relative, after Stewart 2026."""
    (w, inner), (w_target, inner_target) = found, target
    operator = lbfgs.operator_distance(inner.curvature, inner_target.curvature)
    _, largest = lbfgs.eigenvalue_range(inner_target.curvature)
    step = lambda w, inner: lbfgs.inverse_product(
        inner.curvature, jax.grad(loss_fn)(w, held_out) + 0.1 * w
    )
    norm = jnp.linalg.norm
    params = norm(w - w_target) / norm(w_target)
    memory = operator / largest
    ahead = step(w_target, inner_target)
    direction = norm(step(w, inner) - ahead) / norm(ahead)
    return jnp.stack([params, memory, jnp.sqrt(params**2 + memory**2), direction])


def on_streams(loss_fn, name, lags) -> bool:
    data = stream_data()
    rng = np.random.default_rng(1)
    x = rng.normal(size=(64, DIM))
    held_out = {"x": x, "y": np.sign(x[:, 0])}
    judge = jax.jit(lambda a, b: distances(a, b, held_out, loss_fn))
    runs = {}
    for mode in MODES:
        made = make(loss_fn, mode)
        first = jax.tree.map(lambda leaf: leaf[0], events_of(data))
        run = lambda events, made=made, first=first: made.stream.run(
            made.stream.init(jnp.zeros(DIM), first), events
        )
        runs[mode] = jax.jit(run)
    learned = lambda state: (state.stream_params, state.stream_opt_state.inner)
    before = learned(runs["replay"](events_of(data))[0])
    holds = True
    print(f"{name}: parameters / memory operator / state / direction")
    for lag in lags:
        victim = WIDTH * (INSERTS - lag)
        target = learned(runs["replay"](events_of(data, victim))[0])
        told = [f"nothing {_show(judge(before, target))}"]
        for mode in MODES:
            after = learned(runs[mode](events_of(data, victim, deletes=True))[0])
            found = judge(after, target)
            told.append(f"{mode} {_show(found)}")
            if mode == "replay":
                holds &= tree.same_bits(after, target) and not np.any(found)
                holds &= not tree.same_bits(after, before)
        print(f"  lag {lag:3}: " + "; ".join(told))
    return holds


def _show(figures) -> str:
    return "/".join("0" if value == 0 else f"{value:.0e}" for value in np.asarray(figures))


def by_requests(loss_fn, name, lags) -> bool:
    """The same by `forget` after a training loop, judged by a loop that never had the row."""
    data, made = stream_data(), make(loss_fn, "replay")
    gradient = kernels.weighted_grad(loss_fn)

    @jax.jit
    def step(params, state, rows, ids):
        count = jnp.sum(ids >= 0, dtype=jnp.int32)
        grads = gradient(params, rows, (ids >= 0).astype(jnp.float32), num_rows=count)
        updates, state = made.update(grads, state, params, batch=rows, ids=ids)
        return optax.apply_updates(params, updates), state

    def train(gone=()):
        params = jnp.zeros(DIM)
        state = made.init(params)
        for t in range(INSERTS):
            ids = np.arange(WIDTH * t, WIDTH * (t + 1), dtype=np.int32)
            rows = jax.tree.map(lambda leaf, i=ids: leaf[i], data)
            ids = np.where(np.isin(ids, gone), -1, ids).astype(np.int32)
            if np.any(ids >= 0):
                params, state = step(params, state, rows, ids)
        return params, state

    params, state = train()
    holds = True
    for lag in lags:
        victims = [WIDTH * (INSERTS - lag), WIDTH * (INSERTS - lag) + 1]
        begun = time.perf_counter()
        result = made.forget(params, state, victims, data=data)
        seconds = time.perf_counter() - begun
        never_params, never = train(victims)
        same = tree.same_bits((result.params, result.opt_state.inner), (never_params, never.inner))
        print(f"{name}: forget at lag {lag:3}, a whole step: bitwise {same}, {seconds:.2f} s")
        holds &= same
    return holds


def _golden():
    root = os.environ.get("JAXUNLEARN_GOLDEN")
    if not root and os.environ.get("JAXUNLEARN_DATA"):
        root = pathlib.Path(os.environ["JAXUNLEARN_DATA"]).parent / "golden"
    return None if not root or not pathlib.Path(root).is_dir() else pathlib.Path(root)


def published_traces() -> bool:
    root = _golden()
    if root is None:
        print("published traces: skipped, JAXUNLEARN_GOLDEN is not set")
        return True
    first = dict(np.load(root / "memory_pair_exp_trace.npz"))
    noise = jnp.asarray(first["unit_noise"])
    paper = transforms.PaperDeletion(
        rate=1.0, unit_noise=lambda index, params: noise[index],
        noise_multiplier=accounting.published_noise(1.0, 1e-5, share=0.5)(20),
    )  # fmt: skip
    script = [(0, i) for i in range(len(first["X"]))] + [(1, i) for i in first["delete_idx"]]
    expected = np.concatenate([first["theta_after_insert"], first["theta_after_delete"]])
    options = {"learning_rate": 0.5, "admission": transforms.relative_curvature()}
    holds = _follows("memory-pair-exp", first, script, expected, paper, **options)

    last = dict(np.load(root / "urm_memory_pair_trace_a.npz"))
    deletions = np.flatnonzero(last["events"][:, 0] == 1)
    attempts = (deletions - np.arange(len(deletions)) - deletions[0]) // 10
    drawn = jnp.asarray(last["unit_noise"][attempts])
    paper = transforms.PaperDeletion(
        rate=None, unit_noise=lambda index, params: drawn[index],
        noise_stddev=float(last["sens_sigma"][deletions[0], 1]),
    )  # fmt: skip
    options = {
        "learning_rate": transforms.AdaptiveRate(1.0, 1.0),
        "admission": transforms.levenberg_damped(),
        "optimizer_options": {"scale_range": (1e-6, 1.0), "max_norm": 10.0, "move": "step"},
    }
    script = last["events"]
    return holds & _follows("research-meta", last, script, last["theta"], paper, **options)


def _follows(name, trace, script, expected, paper, **options) -> bool:
    """Whether paper mode gives the parameters of the trace after every event."""
    num_rows = len(trace["X"])
    made = unlearners.memory_pair(
        squared, num_examples=num_rows, max_steps=num_rows, mode="paper", nothing_below=None,
        num_checkpoints=2, paper=paper, **options,
    )  # fmt: skip
    kinds, ids = (np.asarray(column, np.int32) for column in np.transpose(script))
    rows = {"x": trace["X"][ids][:, None], "y": trace["y"][ids][:, None]}
    events = Event(kinds, ids[:, None], rows)

    def step(state, event):
        state, _ = made.stream.step(state, event)
        return state, state.stream_params

    start = made.stream.init(
        jnp.zeros(trace["X"].shape[1]), jax.tree.map(lambda leaf: leaf[0], events)
    )
    path = jax.jit(lambda s, e: jax.lax.scan(step, s, e)[1])(start, events)
    scale = np.maximum(1.0, np.linalg.norm(expected, axis=1))
    gap = float(np.max(np.linalg.norm(path - expected, axis=1) / scale))
    print(f"published trace {name}: {len(path)} events, largest relative gap {gap:.1e}")
    return gap <= 1e-9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three lags")
    arguments = parser.parse_args()
    lags = (1, 50, 400) if arguments.quick else LAGS
    jax.config.update("jax_enable_x64", True)
    holds = True
    for name, loss_fn in LOSSES.items():
        holds &= on_streams(loss_fn, name, lags)
        holds &= by_requests(loss_fn, name, lags[::4] if len(lags) > 3 else lags[-1:])
    holds &= published_traces()
    print("holds" if holds else "DOES NOT HOLD")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
