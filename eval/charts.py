"""The report's pictures: charts by matplotlib and montages of images, each as PNG bytes."""

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = (
    "#4c6272", "#b5651d", "#1b6f8a", "#7a9a3a", "#8c4a6b", "#c9a227",
    "#2f2f4f", "#d98a8a", "#5fb3a1", "#9b7fc7", "#70502c", "#a8b0b8",
)  # fmt: skip
LINES = tuple({"color": colour, "linestyle": style} for style in ("-", "--", ":") for colour in COLOURS)
OUTLINE = (255, 196, 0)  # requested nodule outlines
GAP = 3  # px between tiles

Curve = tuple[Sequence[float], Sequence[float]]  # x, y
Tile = NDArray[np.uint8]  # (H, W) or (H, W, 3)
Estimate = tuple[float, float, float]  # value, and the bounds of its 95 % CI


def to_png(figure: "Figure") -> bytes:
    """Render and close a figure."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight", metadata={"Software": ""})
    pyplot.close(figure)
    return buffer.getvalue()


def axes(count: int, width: float = 4.6, height: float = 3.2) -> tuple["Figure", list]:
    """A row of plain axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, row = pyplot.subplots(1, count, figsize=(width * count, height), squeeze=False, layout="constrained")
    for ax in row[0]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, list(row[0])


def add_legend(figure: "Figure", panels: Sequence) -> None:
    """One legend for all panels, beside them: over the lines it would hide those of a long list."""
    lines = {label: line for ax in panels for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(list(lines.values()), list(lines), loc="outside right upper", frameon=False, fontsize="small")


def loss_chart(stages: Mapping[str, Mapping[str, Curve]]) -> bytes:
    """stages[title][name] = (steps, losses): one panel a stage, raw values pale, their running mean strong."""
    figure, panels = axes(len(stages))
    for ax, (title, curves) in zip(panels, stages.items(), strict=True):
        for (name, (steps, values)), colour in zip(curves.items(), COLOURS, strict=False):
            ax.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            ax.plot(steps, running_mean(values), color=colour, label=name, linewidth=1.6)
        ax.set(title=title, xlabel="optimizer step", ylabel="loss")
        ax.legend(frameon=False)
    return to_png(figure)


def running_mean(values: Sequence[float], share: float = 0.1) -> np.ndarray:
    """Mean over a centred window of a tenth of the series, cut off at its ends."""
    x = np.asarray(values, float)
    half = max(1, round(len(x) * share / 2))
    return np.array([x[max(0, i - half) : i + half + 1].mean() for i in range(len(x))])


def roc_chart(tasks: Mapping[str, Mapping[str, Curve]]) -> bytes:
    """tasks[title][arm] = (false positive rates, true positive rates): one panel a task."""
    figure, panels = axes(len(tasks), 4.0, 3.8)
    for ax, (title, arms) in zip(panels, tasks.items(), strict=True):
        ax.plot([0, 1], [0, 1], color="#999", linewidth=0.8, linestyle=":")
        for (arm, (fpr, tpr)), line in zip(arms.items(), itertools.cycle(LINES), strict=False):
            ax.plot(fpr, tpr, **line, label=arm, linewidth=1.5)
        ax.set(title=title, xlabel="1 − specificity", ylabel="sensitivity", xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
    add_legend(figure, panels)
    return to_png(figure)


def calibration_chart(tasks: Mapping[str, Mapping[str, Curve]]) -> bytes:
    """tasks[title][arm] = (mean probabilities, shares of positives) of groups of images: one panel a task."""
    figure, panels = axes(len(tasks), 4.0, 3.8)
    for ax, (title, arms) in zip(panels, tasks.items(), strict=True):
        ax.plot([0, 1], [0, 1], color="#999", linewidth=0.8, linestyle=":")
        for (arm, (predicted, observed)), line in zip(arms.items(), itertools.cycle(LINES), strict=False):
            ax.plot(predicted, observed, marker="o", **line, label=arm, linewidth=1.2, markersize=3)
        ax.set(title=title, xlabel="mean probability", ylabel="share of positives", xlim=(0, 1), ylim=(0, 1.01))
        ax.set_aspect("equal")
    add_legend(figure, panels)
    return to_png(figure)


def band_chart(tasks: Mapping[str, Mapping[str, Sequence[tuple[float, ...]]]], x: str, y: str) -> bytes:
    """tasks[title][line] = [(x, value, low, high)]: lines with bars for their intervals, one panel a task."""
    figure, panels = axes(len(tasks), 4.6, 3.6)
    for ax, (title, lines) in zip(panels, tasks.items(), strict=True):
        for (name, points), line in zip(lines.items(), itertools.cycle(LINES), strict=False):
            at, value, low, high = (np.array(column, float) for column in zip(*points, strict=True))
            # a percentile interval may leave its value out
            bars = np.maximum(0, [value - low, high - value])
            ax.errorbar(at, value, bars, marker="o", **line, label=name, linewidth=1.5, markersize=4, capsize=2)
        ax.set(title=title, xlabel=x, ylabel=y)
    add_legend(figure, panels)
    return to_png(figure)


def interval_chart(tasks: Mapping[str, Mapping[str, Estimate]], label: str) -> bytes:
    """tasks[title][arm] = (value, low, high): points with their intervals, one panel a task."""
    arms = list(dict.fromkeys(arm for task in tasks.values() for arm in task))
    figure, panels = axes(len(tasks), 4.6, 0.9 + 0.34 * len(arms))
    for ax, (title, task) in zip(panels, tasks.items(), strict=True):
        for y, (arm, colour) in enumerate(zip(arms, itertools.cycle(COLOURS), strict=False)):
            if arm in task:
                value, low, high = task[arm]
                ax.plot([low, high], [y, y], color=colour, linewidth=2)
                ax.plot(value, y, "o", color=colour, markersize=6)
                ax.annotate(f"{value:.3f}", (value, y), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        ax.set(title=title, xlabel=label, ylim=(len(arms) - 0.5, -0.8))
        ax.set_yticks(range(len(arms)), arms if ax is panels[0] else [""] * len(arms))
    return to_png(figure)


def montage(rows: Sequence[Sequence[np.ndarray]]) -> bytes:
    """Rows of equally large HxW or HxWx3 uint8 tiles, white gaps between them."""
    lines = [join([to_rgb(tile) for tile in row], axis=1) for row in rows]
    width = max(line.shape[1] for line in lines)
    lines = [np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0)), constant_values=255) for line in lines]
    buffer = io.BytesIO()
    Image.fromarray(join(lines, axis=0)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def join(parts: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Parts side by side (axis 1) or below each other (axis 0)."""
    shape = list(parts[0].shape)
    shape[axis] = GAP
    gap = np.full(shape, 255, np.uint8)
    return np.concatenate([piece for part in parts for piece in (part, gap)][:-1], axis=axis)


def to_rgb(tile: np.ndarray) -> np.ndarray:
    """(H, W) -> (H, W, 3); colour stays as it is."""
    return np.repeat(tile[..., None], 3, axis=2) if tile.ndim == 2 else tile


def outlined(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(H, W) uint8 image with the mask's outline -> (H, W, 3)."""
    coloured = np.ascontiguousarray(to_rgb(image))
    outlines, _ = cv2.findContours((mask > 0).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(coloured, outlines, -1, OUTLINE, 1)


def fit_png(path: Path, width: int) -> bytes:
    """A PNG file, reduced to at most `width` px."""
    with Image.open(path) as image:
        if image.width > width:
            image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
