"""The pictures of a page, by matplotlib. The same values give the same bytes."""

import contextlib
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kd_dist.page.markup import Picture, printable
from kd_dist.tasks.binary import POINTS

# Okabe and Ito 2008, which the colour-blind tell apart, without yellow; markers and lines differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, LINES = ("o", "s", "^", "D", "v", "P", "X", "h"), ("-", "--", ":", "-.")
FILLINGS = ("full", "none", "left", "top", "right", "bottom")
SIZE = (4.8, 3.5)  # inches, of a plot without its legend
LABEL, LEGEND, TITLE = 18, 28, 44  # characters of a name beside an axis, below a plot and above it
LEGEND_LINE = 0.19  # inches
TICKS = 5  # of an axis of sizes or times, about
NUMBERED = 10  # classes of a confusion matrix whose cells are numbered
SETTINGS = {
    "svg.hashsalt": "kd_dist",
    "svg.fonttype": "none",
    "text.parse_math": False,  # names may hold a $
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.06,
}


class Series(NamedTuple):
    """Points of a plot, and who they are of."""

    name: str
    number: int  # of its colour, marker and line
    points: Sequence[tuple[float, float]]


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def marker(number: int) -> str:
    return MARKERS[number % len(MARKERS)]


def line(number: int) -> str:
    return LINES[number % len(LINES)]


def short(name: str, most: int = LABEL) -> str:
    """A name for an axis, a title or a legend; of a long one both ends, as names differ in either."""
    one = printable(name)
    kept = most - 1
    return one if len(one) <= most else f"{one[: kept - kept // 2]}…{one[-(kept // 2) :]}"


def label(name: str) -> str:
    """A name for what `legend` lists, whole: what begins with an underscore would be left out."""
    one = printable(name)
    return f" {one}" if one.startswith("_") else one


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """POINTS of a curve's own points at most, evenly along it, with both ends."""
    if len(points) <= POINTS:
        return list(points)
    return [points[place] for place in np.linspace(0, len(points) - 1, POINTS).round().astype(int)]


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Matplotlib as it comes, whatever the user's settings are, and as SETTINGS say."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the browser has other fonts
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def drawing(size: tuple[float, float] = SIZE) -> tuple[Any, Any]:
    """A figure and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def rendered(figure: Any, alt: str, kind: str = "svg") -> Picture:
    """A figure as bytes without a date in them."""
    buffer = io.BytesIO()
    if kind == "svg":
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        return Picture("image/svg+xml", buffer.getvalue(), alt)
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return Picture("image/png", buffer.getvalue(), alt)


def legend(figure: Any, axes: Any) -> None:
    """The names of what is drawn, each once, below it, where there is room for them."""
    handles, names = axes.get_legend_handles_labels()
    once = dict(zip(names, handles, strict=True))
    if once:
        figure.set_figheight(figure.get_figheight() + LEGEND_LINE * math.ceil(len(once) / 2))
        figure.legend(once.values(), [short(name, LEGEND) for name in once], loc="outside lower center", ncols=2)


def against(models: Sequence[Mapping[str, Any]], metric: str, axis: str) -> Picture:
    """A metric against what it takes, one mark a model: `name`, `number`, `teacher`, `x` [least, middle, most], `y`
    and its interval `half`, or None."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    figure, axes = drawing()
    for one in models:
        least, x, most = one["x"]
        errors = {"xerr": [[x - least], [most - x]], "yerr": one["half"]}
        sign, size = ("*", 14) if one["teacher"] else (marker(one["number"]), 7)
        axes.errorbar(
            x,
            one["y"],
            **errors,
            color=colour(one["number"]),
            marker=sign,
            markersize=size,
            linestyle="none",
            capsize=3,
            label=label(one["name"]),
        )
    spread = [value for one in models for value in one["x"]]
    axes.xaxis.set_major_locator(MaxNLocator(TICKS))
    if max(spread) > 5 * min(spread) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(spread) < 100 * min(spread) else (1,)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(0.1)
    axes.set(xlabel=axis, ylabel=metric)
    legend(figure, axes)
    said = "; ".join(f"{one['name']} {one['y']:.4f} at {one['x'][1]:.4g}" for one in models)
    return rendered(figure, f"{metric} against {axis}: {said}.")


def bars(quantity: str, parts: Sequence[Mapping[str, Any]], numbers: Mapping[str, int]) -> Picture:
    """A bar for each stage of `numbers` and each of the parts, as `compare.by_part` gives them."""
    stages = [stage for stage in numbers if any(stage in one["stages"] for one in parts)]
    height = max(2.4, 0.9 + len(parts) * (0.14 + 0.11 * len(stages)))
    figure, axes = drawing((SIZE[0], height))
    thick = 0.8 / len(stages)
    for place, stage in enumerate(stages):
        here = [(row, one["stages"][stage]) for row, one in enumerate(parts) if stage in one["stages"]]
        rows = [row + (place - (len(stages) - 1) / 2) * thick for row, _ in here]
        errors = [half or 0 for _, (_, half) in here]
        axes.barh(
            rows,
            [mean for _, (mean, _) in here],
            thick,
            color=colour(numbers[stage]),
            label=label(stage),
            xerr=errors if any(errors) else None,
            error_kw={"elinewidth": 0.8},
            hatch="" if numbers[stage] < 7 else "//",
        )
    axes.set_yticks(range(len(parts)), [short(one["name"]) for one in parts])
    axes.grid(axis="y", visible=False)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set(xlabel=quantity)
    legend(figure, axes)
    worst = {
        stage: min((one["stages"][stage][0], one["name"]) for one in parts if stage in one["stages"])
        for stage in stages
    }
    said = "; ".join(f"{stage} has least for {name}, {value:.4f}" for stage, (value, name) in worst.items())
    return rendered(figure, f"{quantity} of {len(parts)} classes or outputs by model: {said}.")


def epochs(every: Sequence[Series], quantity: str, title: str, alt: str) -> Picture:
    """A quantity by epoch, a line each."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = drawing()
    lines(axes, every)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epoch", ylabel=quantity, title=short(title, TITLE))
    legend(figure, axes)
    return rendered(figure, alt)


def square(every: Sequence[Series], names: tuple[str, str], alt: str, dots: bool = False) -> Picture:
    """Lines from 0 to 1, with the diagonal; `names` of the axes."""
    figure, axes = drawing((4.4, 4.8))
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    lines(axes, every, dots)
    axes.set(xlabel=names[0], ylabel=names[1], aspect="equal")
    legend(figure, axes)
    return rendered(figure, alt)


def lines(axes: Any, every: Sequence[Series], dots: bool = False) -> None:
    """Each of the series, those of one name in one style, without the points that are not known."""
    for one in every:
        points = thinned([point for point in one.points if None not in point])
        look = {"color": colour(one.number), "linestyle": line(one.number), "linewidth": 1.4, "markersize": 4}
        look["marker"] = marker(one.number) if dots or len(points) == 1 else None
        axes.plot(*np.array(points).reshape(-1, 2).T, label=label(one.name), **look)


def confusion(stage: str, counts: np.ndarray, names: Sequence[str]) -> Picture:
    """A confusion matrix (truth, prediction), each row as shares of its examples."""
    total = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, total, where=total > 0, out=np.zeros(counts.shape))
    figure, axes = drawing((4.8, 4.6))
    axes.grid(visible=False)
    drawn = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
    labels, places = [short(name) for name in names], range(len(names))
    axes.set_xticks(places, labels, rotation=90)
    axes.set_yticks(places, labels)
    axes.set(xlabel="predicted class", ylabel="true class", title=short(stage, TITLE))
    if len(names) <= NUMBERED:
        for row, column in np.ndindex(*counts.shape):
            ink = "black" if shares[row, column] > 0.5 else "white"
            axes.text(
                column,
                row,
                f"{counts[row, column]:,}" if counts[row, column] else "",
                ha="center",
                va="center",
                fontsize=7.5,
                color=ink,
            )
    figure.colorbar(drawn, label="share of the true class", shrink=0.7)
    right = f"{int(counts.trace()):,} of {int(counts.sum()):,}"
    wrong = counts - np.diag(counts.diagonal())
    truth, said = np.unravel_index(wrong.argmax(), wrong.shape)
    most = (
        f"; most often mistaken, {wrong[truth, said]:,} times: {names[truth]} for {names[said]}" if wrong.any() else ""
    )
    return rendered(figure, f"Confusion matrix of {stage}: {right} on the diagonal{most}.")


def scatter(stage: str, output: str, pairs: np.ndarray, limits: tuple[float, float], number: int) -> Picture:
    """Predictions against the truth, `pairs` (n, 2), NaN: not known; `limits` of both axes."""
    figure, axes = drawing((4.2, 4.2))
    axes.plot(limits, limits, color="grey", linewidth=0.8)
    axes.scatter(*pairs.T, s=12, alpha=0.7, color=colour(number), linewidths=0)
    axes.set(xlabel=f"{short(output)}, truth", ylabel=f"{short(output)}, prediction", aspect="equal")
    axes.set_title(short(stage, TITLE))
    known = pairs[~np.isnan(pairs).any(axis=1)]
    gap = f", {np.abs(known[:, 0] - known[:, 1]).mean():.4f} apart in the mean" if len(known) else ""
    alt = f"{output}: {len(known):,} predictions of {stage} against the truth{gap}."
    return rendered(figure, alt, "png")


def files(found: Sequence[Mapping[str, Any]], metric: str, axis: str, formats: Sequence[str]) -> Picture:
    """A metric against what a file takes: `package`, `format`, `x`, `y`; a mark a format, a filling a package."""
    figure, axes = drawing()
    packages = list(dict.fromkeys(one["package"] for one in found))
    for one in found:
        number, filled = formats.index(one["format"]), FILLINGS[packages.index(one["package"]) % len(FILLINGS)]
        look = {"marker": marker(number), "color": colour(number), "fillstyle": filled, "markersize": 8}
        axes.plot(one["x"], one["y"], linestyle="none", label=one["format"], **look)
    for number, name in enumerate(packages if packages[1:] else ()):
        filled = FILLINGS[number % len(FILLINGS)]
        axes.plot([], [], marker="o", color="grey", fillstyle=filled, linestyle="none", label=label(name))
    axes.locator_params(axis="x", nbins=TICKS)
    axes.margins(0.1)
    axes.set(xlabel=axis, ylabel=metric)
    legend(figure, axes)
    said = "; ".join(f"{one['package']} as {one['format']} {one['y']:.4f} at {one['x']:.4g}" for one in found)
    return rendered(figure, f"{metric} against {axis}: {said}.")


def sheet(name: str, pixels: np.ndarray, most: int) -> Picture:
    """Pixels (H, W, 3) uint8 as a PNG of at most so many bytes, halved until they are."""
    from PIL import Image

    image = Image.fromarray(pixels)
    while True:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", optimize=True)
        if len(buffer.getvalue()) <= most or min(image.size) < 2:
            alt = f"Examples, a row each: the image, the true mask, and what each model of {name} says."
            return Picture("image/png", buffer.getvalue(), alt)
        image = image.reduce(2)
