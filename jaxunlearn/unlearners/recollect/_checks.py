"""What recollect refuses, and when it calls a run too rough."""

import math
import warnings
from typing import Any

import jax

from jaxunlearn import errors, records
from jaxunlearn.unlearners.recollect._lockstep import NOT_MEASURED, Along

POLICIES = ("warn", "refuse", "replay")
EPS_ROOT = (
    "Adam's square root has no derivative where a second moment is zero: give it eps_root=1e-8 or "
    "more (optax.adam(..., eps_root=1e-8)); the larger, the more linear its first steps."
)


def check_options(num_probes, if_rough, rough_above, storage_dtype, verify, verify_tolerance):
    """Refuse a bad configuration at the factory."""
    records.check_integers(0, num_probes=num_probes)
    records.check_choices(if_rough=(if_rough, POLICIES), verify=(verify, ("report", "off")))
    records.check_storage(storage_dtype)
    for name, value in {"rough_above": rough_above, "verify_tolerance": verify_tolerance}.items():
        if not value > 0:
            raise ValueError(f"Expected {name}={value} > 0.")


def check_gradients(along: Along, tolerance: float) -> None:
    """Refuse a run that was not trained with the gradients of its loss.

    The gap of the whole run must be within the tolerance, and that of each step within its square
    root: what is wrong in a few small steps does not show in the sum.

    Raises:
      VerificationError: tangents, shadows and replays are of another run.
    """
    gap, step_gap, step_tolerance = along.gradient_gap, along.step_gap, math.sqrt(tolerance)
    if not (gap <= tolerance and step_gap <= step_tolerance):
        raise errors.VerificationError(
            "Expected a run trained with the gradients of loss_fn, got incoming updates at a "
            f"relative distance of {gap:.3g} (tolerance {tolerance:.3g}), of {step_gap:.3g} in the "
            f"worst step (tolerance {step_tolerance:.3g}). Clipping and the like "
            "belong inside the wrapped optimizer: recollect(optax.chain(clip, adam), ...)."
        )


def judge(linearity: Any, rough_above: float) -> tuple[dict[str, float], bool]:
    """The measured errors by name, and whether the run is too rough to trust."""
    names = ("linearity_params", "linearity_state")
    figures = dict(zip(names, map(float, jax.device_get(linearity)), strict=True))
    measured = {name: x for name, x in figures.items() if x != NOT_MEASURED}
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
