"""The picture of the demo: two runs that meet, and losses of forgotten against held-out rows."""

import pathlib
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg", force=False)
from matplotlib import pyplot

_COLOURS = {"before": "#b4424a", "after": "#2a6f97", "oracle": "#2b2d33", "held out": "#b9bcc4"}


def draw(path: pathlib.Path, task, results) -> pathlib.Path:
    """One row: trajectories of the network, then losses before and after for each method."""
    figure, axes = pyplot.subplots(1, 1 + len(results), figsize=(5.2 * (1 + len(results)), 4.6))
    _trajectories(axes[0], results[0]["paths"])
    for axis, result in zip(axes[1:], results, strict=True):
        _losses(axis, result)
    figure.suptitle(
        f"{len(task.forget)} of {len(task.x)} rows of {task.name} forgotten", x=0.01, ha="left"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    return path


def _trajectories(axis, paths) -> None:
    """Both runs in the plane of the largest variance of their steps."""
    trained, oracle = paths["trained"], paths["oracle"]
    plane = _plane(np.concatenate([trained, oracle]), trained[-1] - oracle[-1])
    a, b = trained @ plane, oracle @ plane
    axis.plot(*a.T, color=_COLOURS["before"], lw=1.6, label="trained with the rows")
    axis.plot(*b.T, color=_COLOURS["oracle"], lw=1.6, label="oracle: never saw them")
    axis.annotate(
        "", xy=b[-1], xytext=a[-1],
        arrowprops={"arrowstyle": "-|>", "color": _COLOURS["after"], "lw": 2.2},
    )  # fmt: skip
    axis.plot([], [], color=_COLOURS["after"], lw=2.2, label="forget")
    axis.plot(*b[-1], "o", color=_COLOURS["after"], ms=6)
    axis.set_title("The forgotten model lands on the oracle", fontsize=11)
    axis.set_xlabel("direction of most movement")
    axis.set_ylabel("direction of the rows' influence")
    axis.legend(frameon=False, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def _plane(points: np.ndarray, influence: np.ndarray) -> np.ndarray:
    """Two orthonormal directions: the main one of the paths, and the final gap's part beside it."""
    centred = points - points.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    beside = influence - directions[0] * (influence @ directions[0])
    return np.stack([directions[0], beside / max(np.linalg.norm(beside), 1e-30)], axis=1)


def _losses(axis, result) -> None:
    """Sorted losses: where the forgotten rows stand among rows that nobody trained on."""
    models = result["models"]
    floor = 1e-6
    curves = {
        "held out": models["oracle"]["losses"]["test"],
        "before": models["before"]["losses"]["forget"],
        "after": models["after"]["losses"]["forget"],
        "oracle": models["oracle"]["losses"]["forget"],
    }
    labels = {
        "held out": "held-out rows, oracle",
        "before": "forget rows, before",
        "after": "forget rows, after",
        "oracle": "forget rows, oracle",
    }
    for name, losses in curves.items():
        ordered = np.maximum(np.sort(np.asarray(losses)), floor)
        share = (np.arange(len(ordered)) + 1) / len(ordered)
        style: dict[str, Any] = {"lw": 5, "alpha": 0.7} if name == "held out" else {"lw": 1.8}
        if name == "oracle":
            style |= {"ls": "--"}
        axis.step(ordered, share, where="post", color=_COLOURS[name], label=labels[name], **style)
    axis.set_xscale("log")
    axis.set_title(result["name"], fontsize=11)
    axis.set_xlabel("cross-entropy of a row")
    axis.set_ylabel("share of rows below")
    axis.legend(frameon=False, fontsize=9, loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)
