"""What recollect refuses, and when it calls a run too rough."""

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxunlearn import errors, records, tree

POLICIES = ("warn", "refuse", "replay")
EPS_ROOT = (
    "Adam's square root has no derivative where a second moment is zero: give it eps_root=1e-8 or "
    "more (optax.adam(..., eps_root=1e-8)); the larger, the more linear its first steps."
)


def check_options(
    batch_size, max_steps, num_probes, if_rough, rough_above, l2, storage_dtype, verify,
    verify_tolerance,
):  # fmt: skip
    """Refuse a bad configuration at the factory."""
    for name, value, least in (
        ("batch_size", batch_size, 1), ("max_steps", max_steps, 1), ("num_probes", num_probes, 0),
    ):  # fmt: skip
        if isinstance(value, bool) or int(value) != value or value < least:
            raise ValueError(f"Expected an integer {name}={value} >= {least}.")
    if if_rough not in POLICIES:
        raise ValueError(f"Expected if_rough to be one of {POLICIES}, got {if_rough!r}.")
    if not rough_above > 0:
        raise ValueError(f"Expected rough_above={rough_above} > 0.")
    if storage_dtype is not None and not jnp.issubdtype(storage_dtype, jnp.floating):
        raise ValueError(f"Expected a floating storage_dtype, got {storage_dtype!r}.")
    if verify not in ("report", "off") or not verify_tolerance > 0:
        raise ValueError(
            f'Expected verify to be "report" or "off" and verify_tolerance > 0, got {verify!r} and '
            f"{verify_tolerance}."
        )
    if l2 is not None and not (isinstance(l2, int | float) and l2 >= 0):
        raise ValueError(f"Expected l2={l2} >= 0, or None.")


def check_step(ids, key, batch, batch_size, keyed, joint):
    """Refuse a step that could not be recorded."""
    if ids is None:
        return
    if jnp.shape(ids)[0] > batch_size:
        raise ValueError(f"Expected at most batch_size={batch_size} ids, got {jnp.shape(ids)[0]}.")
    if keyed and key is None:
        raise ValueError("Expected key=step_key in update: the loss takes one.")
    if batch is None and not joint:
        raise ValueError(
            "Expected batch= in update, beside ids=: tangents are taken from its rows."
        )


def check_seen(participation, table, ids):
    """The refusals of `records.check_participation`, for units."""
    records.check_status(participation)
    if not ids.size:
        return
    seen, gone = records.seen_ids(participation), records.forgotten_ids(participation)
    again = [u for u in ids if np.isin(table.examples(np.array([u])), gone).any()]
    if again:
        raise errors.AlreadyForgottenError(
            f"Expected ids that are still in the model, got {records.show_ids(again)}, already "
            "forgotten. An id is never used again; a new row needs a new id."
        )
    strangers = [u for u in ids if not np.isin(table.examples(np.array([u])), seen).any()]
    if strangers:
        never = int(participation.num_steps_with_ids) == 0
        hint = (
            "update never received ids: pass ids= on every step."
            if never
            else "There is nothing of them to forget in this run."
        )
        raise errors.NeverSeenError(
            f"Expected ids that update has seen, got {records.show_ids(strangers)}. {hint}"
        )


def check_gradients(gap: float, tolerance: float) -> None:
    """Refuse a run that was not trained with the gradients of its loss.

    Raises:
      VerificationError: tangents, shadows and replays are of another run.
    """
    if not gap <= tolerance:
        raise errors.VerificationError(
            "Expected a run trained with the gradients of loss_fn, got incoming updates at a "
            f"relative distance of {gap:.3g} (tolerance {tolerance:.3g}). Clipping and the like "
            "belong inside the wrapped optimizer: recollect(optax.chain(clip, adam), ...)."
        )


def check_reached(reached: PyTree, given: PyTree, tolerance: float) -> float:
    """The distance of a replayed run's end to the state that was handed in.

    Raises:
      VerificationError: it is not the same run.
    """
    distance = max(map(tree.relative_distance, reached, given))
    if not distance <= tolerance:
        raise errors.VerificationError(
            "Expected the recorded run to replay to the given state, got a relative distance of "
            f"{distance:.3g} (tolerance {tolerance:.3g}). Were params, state or data changed "
            "outside update, or gradients before it?"
        )
    return distance


def judge(linearity: Any, rough_above: float) -> tuple[dict[str, float], bool]:
    """The measured errors by name, and whether the run is too rough to trust."""
    names = ("linearity_params", "linearity_state")
    figures = dict(zip(names, map(float, jax.device_get(linearity)), strict=True))
    measured = {name: x for name, x in figures.items() if x != records.NOT_MEASURED}
    return measured, any(not x <= rough_above for x in measured.values())


def complain(measured: dict[str, float], rough_above: float, if_rough: str) -> None:
    """Warn of a rough run, or refuse.

    Raises:
      RoughRunError: `if_rough` is "refuse".
    """
    shown = ", ".join(f"{name} {x:.3g}" for name, x in measured.items())
    text = (
        "The run is not linear enough to trust a first-order deletion: for units left out on trial "
        f"the relative error of the predicted change was {shown} (rough_above={rough_above}). "
        "Train more smoothly (smaller steps, larger eps and eps_root), or use unlearners.replay."
    )
    if any(math.isnan(x) for x in measured.values()):
        text += f" {EPS_ROOT}"
    if if_rough == "refuse":
        raise errors.RoughRunError(text)
    warnings.warn(text, stacklevel=4)
