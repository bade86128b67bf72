"""PNG charts of the results: a roofline, speed-ups, the waterfall. Drawn by Pillow."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stored import Row
from tables import Areas, on_gpu, significant

if TYPE_CHECKING:  # their names are needed without drawing them, and so without PyTorch
    from PIL import Image

Points = Mapping[str, Sequence[tuple[float, float]]]  # of each op, (FLOP a byte, GFLOP/s)
BAR = 26  # height of a bar with its gap


def roofline(
    points: Points, copies: Mapping[str, float], gflop_per_s: float | None, title: str
) -> Image.Image:
    """Both axes logarithmic. copies: GB/s by label, a roof each; above them all a matrix product's
    GFLOP/s, where it was measured."""
    from fastdiff._canvas import COLOURS, GREY, LIGHT, MARKERS, Canvas

    size, (left, top, right, bottom) = (1000, 600), (84, 56, 740, 530)
    every = [point for found in points.values() for point in found]
    first, last = (pick(math.log10(x) for x, _ in every) for pick in (min, max))
    first, last = math.floor(first), max(math.ceil(last), math.floor(first) + 1)
    fastest = max(copies.values())
    most = max(max(y for _, y in every), gflop_per_s or fastest * 10**last)
    low = math.floor(math.log10(min(y for _, y in every)))
    high = max(math.ceil(math.log10(most)), low + 1)

    def across(value: float) -> float:
        return left + (right - left) * (math.log10(value) - first) / (last - first)

    def down(value: float) -> float:
        return bottom - (bottom - top) * (math.log10(value) - low) / (high - low)

    canvas = Canvas(size)
    for decade in range(low, high + 1):
        y = down(10.0**decade)
        canvas.line([(left - 5, y), (right, y)], LIGHT, 1)
        canvas.text(left - 10, y, f"{10.0**decade:g}", 13, "rm", GREY)
    for decade in range(first, last + 1):
        x = across(10.0**decade)
        canvas.line([(x, top), (x, bottom + 5)], LIGHT, 1)
        canvas.text(x, bottom + 10, f"{10.0**decade:g}", 13, "mt", GREY)
    canvas.line([(left, top), (left, bottom), (right, bottom)], GREY, 1.5)
    canvas.text((left + right) / 2, bottom + 36, "FLOP a byte", 15, "mt", GREY)
    canvas.upright(22, (top + bottom) / 2, "GFLOP/s", 15)
    canvas.text(left, 28, title, 16, "lm", "black")

    flat = gflop_per_s or math.inf
    for number, (label, rate) in enumerate(copies.items()):
        start = max(10.0**first, 10.0**low / rate)  # not below the axis
        ends = [start, min(max(flat / rate, start), 10.0**last), 10.0**last]
        colour = ("black", GREY)[number % 2]
        canvas.line([(across(x), down(min(rate * x, flat))) for x in ends], colour, 2)
        y = top + 12 + 24 * (len(points) + 1 + number)
        canvas.line([(right + 14, y), (right + 34, y)], colour, 2)
        canvas.text(right + 40, y, f"{label}, {rate:.3g} GB/s", 13, "lm", "black")
    for i, (op, found) in enumerate(points.items()):
        colour, kind = COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]
        for x, y in found:
            canvas.marker(kind, across(x), down(y), colour)
        canvas.marker(kind, right + 24, top + 12 + 24 * i, colour)
        canvas.text(right + 40, top + 12 + 24 * i, op, 13, "lm", "black")
    return canvas.finished()


def bars(
    values: Mapping[str, float], title: str, unit: str, mark: float | None = 1.0
) -> Image.Image:
    """Horizontal bars with their numbers; mark: a line at that value."""
    from fastdiff._canvas import COLOURS, GREY, Canvas

    left, width, top = 320, 480, 64
    canvas = Canvas((left + width + 120, top + BAR * len(values) + 20))
    most = max([*values.values(), mark or 0.0])
    canvas.text(16, 28, title, 16, "lm", "black")
    for i, (name, value) in enumerate(values.items()):
        y = top + BAR * i
        canvas.box(left, y, left + width * value / most, y + BAR - 8, COLOURS[1])
        canvas.text(left - 10, y + (BAR - 8) / 2, name, 13, "rm", "black")
        text = f"{significant(value, 3)} {unit}"
        canvas.text(left + width * value / most + 8, y + (BAR - 8) / 2, text, 13, "lm", GREY)
    if mark:
        x = left + width * mark / most
        canvas.line([(x, top - 8), (x, top + BAR * len(values))], GREY, 1.5)
    return canvas.finished()


# --- what is drawn of a device's results ----------------------------------------------------------


def _best(row: Row) -> str | None:
    """The implementation shown: what "auto" takes, else the fastest of ours."""
    ours = {name: v.median for name, v in row.variants.items() if v.ours}
    if not ours:
        return None
    auto = row.facts.get("auto")
    return auto if auto in ours else min(ours, key=ours.__getitem__)


def of_ops(areas: Areas) -> list[tuple[Row, str]]:
    """(row, implementation) of every case of an op that was timed beside a copy."""
    rows = areas["ops"].rows.values() if "ops" in areas else ()
    found = [(row, _best(row)) for row in rows if "op" in row.facts and "copy" in row.variants]
    return [(row, name) for row, name in found if name is not None]


def pictures(areas: Areas) -> dict[str, Callable[[], Image.Image]]:
    """What there are rows for, not drawn yet: "roofline", "speed-ups", "waterfall <workload>"."""
    found: dict[str, Callable[[], Image.Image]] = {}
    cases = of_ops(areas)
    if cases:
        device = areas["ops"].machine["device"]
        points: dict[str, list[tuple[float, float]]] = {}
        speed: dict[str, list[float]] = {}
        for row, name in cases:
            facts, which = row.facts, row.variants[name]
            if facts["flops"]:
                point = (facts["flops"] / facts["bytes"], facts["flops"] / which.median / 1e9)
                points.setdefault(facts["op"], []).append(point)
            best = which.columns.get("times_best_baseline", which.columns["times_eager"])
            speed.setdefault(f"{facts['op']} {facts['dtype']}", []).append(best)
        largest = max((row for row, _ in cases), key=lambda row: row.facts["bytes"])
        copies = [row.variants["copy"].columns["gb_per_s"] for row, _ in cases]
        limits = [row.facts["limit"] for row, _ in cases if "limit" in row.facts]
        found["roofline"] = partial(
            roofline,
            points,
            {
                f"copy of {largest.facts['bytes'] / 1e6:.0f} MB": largest.variants["copy"].columns[
                    "gb_per_s"
                ],
                "fastest copy (caches)": max(copies),
            },
            max((limit["matmul_gflop_per_s"] for limit in limits), default=None),
            f"Ops on {device}, each case with its operations a byte",
        )
        means = {name: statistics.geometric_mean(values) for name, values in speed.items()}
        title = f"Times the fastest baseline, geometric means, {device}"
        found["speed-ups"] = partial(bars, means, title, "x")
    for workload, rows in waterfalls(areas).items():
        title = f"{workload}: one technique more per row"
        if on_gpu(areas):
            values = {name: 1e3 * seconds for name, seconds in rows.items()}
            found[f"waterfall {workload}"] = partial(bars, values, title, "ms", None)
        else:
            first = next(iter(rows.values()))
            values = {name: first / seconds for name, seconds in rows.items()}
            found[f"waterfall {workload}"] = partial(bars, values, title, "x the first")
    return found


def waterfalls(areas: Areas) -> dict[str, dict[str, float]]:
    """Of each workload with two rows and more, seconds by variant, in the waterfall's order."""
    rows = areas["e2e"].rows.values() if "e2e" in areas else ()
    found: dict[str, list[tuple[int, str, float]]] = {}
    for row in rows:
        place = row.facts.get("waterfall")
        for which in row.variants.values() if place is not None else ():
            entry = (int(place), row.facts["variant"], which.median)
            found.setdefault(row.facts["workload"], []).append(entry)
    return {
        workload: {name: seconds for _, name, seconds in sorted(entries)}
        for workload, entries in found.items()
        if len(entries) > 1
    }


def file_name(slug: str, picture: str) -> str:
    plain = "".join(c if c.isalnum() else "-" for c in picture.lower())
    return f"measured-{slug}-{plain}.png"


def save(slug: str, areas: Areas, folder: Path) -> list[Path]:
    """Writes a device's pictures; their paths."""
    paths = []
    for name, picture in pictures(areas).items():
        paths.append(folder / file_name(slug, name))
        picture().save(paths[-1], optimize=True)
    return paths
