"""The picture: horizontal bars relative to the floor, one panel per model."""

import pathlib

import matplotlib
import numpy as np

matplotlib.use("Agg", force=False)
from matplotlib import pyplot
from matplotlib.patches import Patch

from _kernels import bars
from _kernels.cells import Cell

OURS, JAX, TORCH, INK, FAINT = "#2a6f97", "#c9a227", "#b4424a", "#2b2d33", "#b9bcc4"
WHO = ("jaxunlearn", "other JAX", "PyTorch")
KINDS = ("logistic", "MLP", "CNN", "transformer")
KERNELS = {
    "per_example": (bars.CLIP, "Clipping every example's gradient"),
    "products": (bars.MANY, "Hessian times 64 vectors, each"),
}


def draw(path: pathlib.Path, cells: list[Cell], environment) -> pathlib.Path:
    """A row per kernel, a panel per model; the floor is the plain batch gradient at 1."""
    rows = [s for s in KERNELS if any(c.section == s for c in cells)]
    kinds = [k for k in KINDS if any(c.section in rows and c.model.startswith(k) for c in cells)]
    if not rows:
        raise ValueError("Expected a run with per_example or products: nothing else is drawn.")
    figure, axes = pyplot.subplots(
        len(rows), len(kinds), figsize=(4.1 * len(kinds), 3.7 * len(rows) + 0.7), squeeze=False
    )
    for row, section in enumerate(rows):
        for column, kind in enumerate(kinds):
            found = [c for c in cells if c.section == section and c.model.startswith(kind)]
            _panel(axes[row, column], found, KERNELS[section][0])
        axes[row, 0].annotate(
            KERNELS[section][1], (0, 1), (-2, 32), xycoords="axes fraction", fontsize=13,
            textcoords="offset points", weight="bold", color=INK,
        )  # fmt: skip
    figure.legend(
        handles=[Patch(color=c, label=k) for k, c in zip(WHO, (OURS, JAX, TORCH), strict=True)],
        loc="upper right", ncols=len(WHO), frameon=False, fontsize=10,
    )  # fmt: skip
    figure.text(
        0.01, 0.01,
        "Seconds over those of JAX's plain batch gradient (dashed). Bars: the batch size B above; "
        "dots: other batches; lines: 95 % intervals of the median. "
        f"jax {environment['jax']}, {environment['cpu_count']} cores, "
        f"{environment['device'].split(':')[0]}.", fontsize=9.5, color=INK,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.04, 1, 1), h_pad=3.0)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    return path


def _panel(axis, cells: list[Cell], kernel: str) -> None:
    """Bars of one model, fastest on top; log scale, since it is a story of factors."""
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(left=False, labelsize=9.5, colors=INK)
    if not cells:
        axis.set_axis_off()
        return
    main = max(cells, key=lambda c: (len(c.results), -abs(np.log(c.size / 256))))
    per = bars.NUM_TANGENTS if kernel == bars.MANY else 1
    shown = {n: r for n, r in main.results.items() if r["kernel"] == kernel}
    names = sorted(shown, key=lambda n: shown[n]["ratio"], reverse=True)
    ratios = np.array([shown[n]["ratio"] for n in names]) / per
    start = min(0.5, 0.7 * ratios.min())
    for place, (name, ratio) in enumerate(zip(names, ratios, strict=True)):
        result = shown[name]
        colour = OURS if result["ours"] else JAX if result["framework"] == "jax" else TORCH
        axis.barh(place, ratio - start, left=start, height=0.66, color=colour)
        low, high = result["ratio_low"] / per, result["ratio_high"] / per
        axis.plot([low, high], [place, place], color=INK, lw=1.3, solid_capstyle="butt")
        dots = [
            c.results[name]["ratio"] / per
            for c in cells
            if c is not main and c.model == main.model and name in c.results
        ]
        axis.plot(dots, [place] * len(dots), "o", ms=3.6, mfc="white", mec=INK, mew=0.9)
        text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
        axis.annotate(
            text, (max(ratio, high, *dots, 1.0), place), (6, 0), textcoords="offset points",
            va="center", fontsize=10 if result["ours"] else 9,
            weight="bold" if result["ours"] else "normal", color=INK,
        )  # fmt: skip
    axis.axvline(1, color=INK, lw=1, ls=(0, (4, 3)), zorder=3)
    axis.set_xscale("log")
    axis.set_xlim(start, 2.6 * max(ratios.max(), 2.0))
    axis.set_yticks(range(len(names)), names)
    for label, name in zip(axis.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if shown[name]["ours"] else "normal")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(lambda value, _: "")
    axis.set_title(f"{main.model}, B={main.size}", fontsize=10.5, loc="left", color=INK)
