"""What a certificate of certified_removal says."""

from typing import Any

from jaxunlearn import accounting, certificates, records

PAPER = "Guo, Goldstein, Hannun, van der Maaten 2020, arXiv 1911.03030, section 3"


def promise(
    residual: float,
    terms: dict[str, float],
    *,
    dimension: int,
    noise_stddev: float,
    rng: str,
    bound: str,
    one_vs_rest: bool,
    constants: accounting.LossConstants | None,
    rebuild: records.Rebuild | None,
) -> dict[str, Any]:
    """The fields of the certificate that say what is promised, and what is not."""
    remade = {"public rebuild": rebuild.assumption} if rebuild else {}
    told = {
        "shift": "The residual acts as a shift that does not depend on the noise drawn.",
        "real_arithmetic": "Minimisation is exact beyond the residual that is charged.",
    }
    if bound in ("tight", "corollary_1"):
        told["linear_model"] = "The loss depends on the parameters through x'w, with this gamma."
        if one_vs_rest:
            told["one_vs_rest"] = "The loss is a sum of losses, each of its own column of w."
    names, status = ("data-dependent bound", "arithmetic"), "measured"
    seen: tuple[certificates.Assumption, ...] = ()
    if bound == "worst_case" and constants is not None:
        status = "assumed"
        told["loss_constants"] = (
            f"Every loss is {constants.lipschitz:g}-Lipschitz with a "
            f"{constants.hessian_lipschitz:g}-Lipschitz Hessian."
        )
        text = f"Every row's gradient at the start was seen to be within {constants.lipschitz:g}."
        seen = (certificates.Assumption("gradient norms", "measured", text),)
    grid, units = accounting.grid_of(noise_stddev)
    excluded = [name for name in _EXCLUDED if not (rebuild and name == "optimizer state")]
    return {
        "method": "certified_removal",
        "paper": PAPER,
        "target": "minimiser",
        "guarantee": "certified",
        "scope": "full-state" if rebuild else "params",
        "sensitivity": certificates.Sensitivity(
            value=residual, status=status, text=f"gradient residual, bound {bound!r}"
        ),
        "noise": certificates.Noise(
            stddev=grid * units, grid=grid, mechanism=certificates.DISCRETE_GAUSSIAN,
            rng=rng,
        ),
        "dimension": dimension,
        "residuals": terms,
        "assumptions": (
            *certificates.assumed(*_ASSUMED, **told, **remade),
            *certificates.measured(*names),
            *seen,
        ),
        "not_covered": (*certificates.excluded(*excluded), _SAME_NOISE),
    }  # fmt: skip


_SAME_NOISE = (
    "Other models with the same noise in their objective, earlier releases among them: two, and "
    "the rows that they share, give the noise away. Nobody may hold both."
)
_ASSUMED = (
    *("convexity", "rows unchanged", "oblivious requests", "public settings"),
    *("one lineage", "secret record"),
)
_EXCLUDED = (
    *("earlier models", "optimizer state", "preparation", "copies", "adaptive requests"),
    *("other rows", "this page"),
)


def measurements(figures, terms: dict[str, float], l2: float) -> dict[str, Any]:
    """The figures of a removal that `forget` reports."""
    residual = sum(terms.values())
    return {
        "residual_bound": residual,
        "true_residual": figures.final_residual,
        "start_residual": figures.start_residual,
        "distance_bound": residual / (figures.num_retained * l2),
        "num_non_finite_rows": figures.num_non_finite,
        **{f"bound_{name}": value for name, value in terms.items()},
    }
