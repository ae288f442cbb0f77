"""What a certificate of certified_finetuning says."""

from typing import Any

from jaxunlearn import certificates

_PAPER = "Koloskova, Allouah, Jha, Guerraoui, Koyejo 2025, arXiv 2506.06985"


def promise(tuning, mu, num_steps, release, rebuild) -> dict[str, Any]:
    """The fields of the certificate."""
    remade = {"public_rebuild": rebuild.assumption} if rebuild else {}
    excluded = [name for name in _EXCLUDED if not (rebuild and name == "optimizer state")]
    by_gradients = tuning.model_radius is None
    return {
        "method": "certified_finetuning",
        "paper": _PAPER,
        "target": "counterfactual",
        "guarantee": "certified",
        "scope": "full-state" if rebuild else "params",
        "sensitivity": certificates.Sensitivity(
            value=mu * release.noise_stddev,
            status="proven",
            text=_BY_GRADIENTS if by_gradients else _BY_MODEL,
        ),
        "noise": certificates.Noise(
            stddev=release.noise_stddev,
            grid=release.grid,
            mechanism=certificates.DISCRETE_GAUSSIAN,
            rng=release.rng,
        ),
        "dimension": release.values.size * num_steps,
        "residuals": {"unlearning_steps": float(num_steps), "mu": mu},
        "assumptions": certificates.assumed(
            *("rows unchanged", "ids complete", "oblivious requests", "public settings"),
            *("one lineage",),
            **_ASSUMED,
            **remade,
        ),
        "not_covered": certificates.excluded(*excluded),
    }


_BY_GRADIENTS = (
    "mu after all steps times the noise of one: the shift of one Gaussian that is as hard to tell "
    "apart as two runs from any two starts (amplification by iteration)"
)
_BY_MODEL = (
    "The shift of the one Gaussian that has this epsilon and delta; two runs from any two starts "
    "were bounded at them by the hockey-stick recursion, and at no other epsilon"
)
_EXCLUDED = (
    *("earlier models", "optimizer state", "preparation", "copies"),
    *("adaptive requests", "other rows"),
)
_ASSUMED = {
    "reference": (
        "The reference is the same fine-tuning from any parameters that no forgotten row has "
        "touched; that it starts from a retrained model is not required, nor that it is accurate."
    ),
    "public_clips": "Clips, rates, the number of steps and the noise depend on no data.",
    "secret_noise": "The noise, and the models between the steps, are never revealed.",
}
