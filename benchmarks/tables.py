"""README's "Measured" section, written from the results files: every number comes from one.

Each function gives the Markdown of one part for one device, or "" where its rows are not there.
On a CPU only ratios are shown: absolute times say little about another machine.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from stored import Results, Row

Areas = dict[str, Results]  # of one device, by area


def significant(value: float, digits: int = 2) -> str:
    """ "270", "38", "8.3", "1.40" with digits=3; never an exponent."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    places = digits - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, places)
    places = digits - 1 - math.floor(math.log10(abs(rounded)))  # 9.96 is 10, not 10.0
    return f"{rounded:.{max(0, places)}f}"


def times(value: float, digits: int = 2) -> str:
    return f"{significant(value, digits)} x"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def prose(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def on_gpu(areas: Areas) -> bool:
    return any("cuda" in results.machine for results in areas.values())


def conditions(areas: Areas) -> str:
    """The machine and the versions, in one line; each version that occurs."""
    machines = [results.machine for results in areas.values()]

    def every(key: str) -> str:
        found = {str(m[key]).split("+")[0] for m in machines if m.get(key)}
        return ", ".join(sorted(found))

    device = machines[0]["device"]
    if on_gpu(areas):
        limit = every("power_limit_w")
        parts = [device, f"driver {every('driver')}", f"{limit} W" if limit else ""]
    else:
        parts = [f"{every('cpus')}-core {device} with {every('extension')}"]
    parts.append(f"PyTorch {every('torch')}")
    if every("diffusers"):
        parts.append(f"diffusers {every('diffusers')}")
    return ", ".join(part for part in parts if part)


def _rows(areas: Areas, area: str, *keys: str) -> list[Row]:
    """The rows of an area that have all these facts."""
    results = areas.get(area)
    rows = results.rows.values() if results else ()
    return [row for row in rows if all(key in row.facts for key in keys)]


def solver_steps(areas: Areas) -> str:
    rows = [r for r in _rows(areas, "solvers", "ratio", "peer") if " step, " in r.name]
    if not rows:
        return ""
    where = rows[0].name.split(" step, ")[1]
    lines = []
    for row in rows:
        peer = row.facts["peer"].split()[1]
        note = "; `torch.randn` is most of it on both sides" if row.name.startswith("ddpm ") else ""
        name = row.name.split(" step, ")[0]
        lines.append((f"`{name}`, against `{peer}.step`{note}", times(row.facts["ratio"])))
    text = table((f"cost of a step outside the model, {where}", "diffusers takes, as long"), lines)
    streams = [r for r in _rows(areas, "solvers", "times_copy") if " step, " in r.name]
    if streams:
        ratios = [row.facts["times_copy"] for row in streams]
        shape = streams[0].name.split(" step, ")[1]
        low, high = significant(min(ratios)), significant(max(ratios))
        names = ", ".join(f"`{row.name.split(' step, ')[0]}`" for row in streams)
        text += "\n\n" + prose(
            f"A step of {names} on a latent of {shape}, takes {low} to {high} of the time of a "
            "copy of as many bytes."
        )
    return text


MODELS = {"sd15": "SD1.5's U-Net", "dit-xl-2": "DiT-XL/2"}
NAMES = {"torch.compile": "torch.compile with frozen weights, channels last"}


def denoisers(areas: Areas) -> str:
    lines = []
    for row in _rows(areas, "compiler"):
        model, mine = MODELS.get(row.name), row.variants.get("fastdiff")
        if model is None or mine is None:
            continue
        peers = [
            f"{NAMES.get(name, name)} {times(v.median / mine.median, 3)}"
            for name, v in sorted(row.variants.items(), key=lambda item: item[1].median)
            if not v.ours
        ]
        what = f"a step of {model} through `fastdiff.compile`, {row.facts['dtype']}"
        lines.append((what, "; ".join(peers)))
    for row in _rows(areas, "compiler", "cold"):
        model, cold = MODELS.get(row.name.removeprefix("cold start of ")), row.facts["cold"]
        if model is None:
            continue
        seconds = {kind: found["seconds"] for kind, found in cold.items()}
        what = f"first call of {model} to its result, {seconds['first']:.1f} s "
        what += f"(next process {seconds['second']:.1f} s; there with `freeze=True` "
        what += f"{seconds['frozen']:.1f} s)"
        peer = seconds.get("torch.compile")
        ratio = f"torch.compile {times(peer / seconds['first'])} ({peer:.0f} s)" if peer else ""
        lines.append((what, ratio))
    if not lines:
        return ""
    threads = areas["compiler"].machine["threads"]
    head = f"whole denoisers, a batch of 2 for guidance, random weights, {threads} threads"
    return table((head, "peers take, as long"), lines)


def group_norm(areas: Areas) -> str:
    rows = _rows(areas, "ops")
    means = [r.facts for r in rows if r.name == "group_norm_silu SD1.5 geometric mean"]
    shapes = [r for r in rows if "memory_format" in r.facts]
    if not means:
        return ""
    count = len({(r.name.split()[2]) for r in shapes})
    found = means[0]["times_best_baseline"]
    head = f"`group_norm_silu` over the {count} GroupNorm shapes of SD1.5's U-Net, geometric mean"
    lines = [("all" if key == "all" else key, times(value)) for key, value in found.items()]
    return table((head, "`group_norm` then `silu` takes, as long"), lines)


def ops(areas: Areas) -> str:
    """One line an op, over the shapes of models; only rows that know their limit."""
    by_op: dict[str, list[Row]] = {}
    for row in _rows(areas, "ops", "op", "example", "limit", "auto"):
        if row.facts["auto"] in row.variants:
            by_op.setdefault(row.facts["op"], []).append(row)
    if not by_op:
        return ""

    def mean(rows: list[Row], key: str) -> str:
        columns = [row.variants[row.facts["auto"]].columns for row in rows]
        values = [found[key] for found in columns if key in found]
        return times(statistics.geometric_mean(values)) if values else "-"

    lines = []
    for op, rows in by_op.items():
        shares = sorted(r.variants[r.facts["auto"]].columns["percent_of_limit"] for r in rows)
        keys = ("times_eager", "times_compile", "times_best_peer")
        middle = f"{shares[len(shares) // 2]:.0f} %"
        lines.append((f"`{op}`", str(len(rows)), middle, *(mean(rows, key) for key in keys)))
    head = ("op (`impl=\"auto\"`)", "cases", "of the limit (median)", "eager", "torch.compile",
            "best peer op")  # fmt: skip
    note = "The last three: how long they take, times ours, geometric means; the limit is a copy "
    note += "or a matrix product of as many bytes or operations in the same run."
    return f"{table(head, lines)}\n\n{prose(note)}"


def end_to_end(areas: Areas) -> str:
    """One line a workload: fastdiff's default and its fastest exact variant, beside the peers."""
    workloads: dict[str, list[tuple[Row, Any]]] = {}
    for row in _rows(areas, "e2e", "workload", "variant"):
        for which in row.variants.values():
            workloads.setdefault(row.facts["workload"], []).append((row, which))
    lines = []
    for workload, found in workloads.items():
        ours = [(r, v) for r, v in found if v.ours and not r.facts.get("changes_results")]
        peers = {r.facts["variant"]: v.median for r, v in found if not v.ours}
        if not ours or not peers:
            continue
        row, best = min(ours, key=lambda pair: pair[1].median)
        rest = [value for name, value in peers.items() if name != "eager"]
        cells = [workload, row.facts["variant"]]
        cells.append(f"{significant(best.median, 3)} s" if on_gpu(areas) else "-")
        share = best.columns.get("percent_of_limit")
        cells.append("-" if share is None else f"{share:.0f} %")
        cells.append(times(peers["eager"] / best.median, 3) if "eager" in peers else "-")
        cells.append(times(min(rest) / best.median, 3) if rest else "-")
        lines.append(cells)
    if not lines:
        return ""
    head = ("end to end", "fastest exact", "time", "of the limit", "eager takes, as long",
            "fastest peer takes, as long")  # fmt: skip
    return table(head, lines)


def errors(areas: Areas) -> str:
    """The oracle that the solvers' page shows."""
    rows = [r for r in _rows(areas, "quality", "evaluations", "error") if "mixture" in r.name]
    if not rows:
        return ""
    counts, found = rows[0].facts["evaluations"], rows[0].facts["error"]
    ours = found["fastdiff best_linear"]
    lines = [["`best_linear`, the default", *(f"{value:.1e}" for value in ours)]]
    packages = dict.fromkeys(name.split()[0] for name in found if not name.startswith("fastdiff"))
    for package in packages:
        best = [
            min(values[i] for name, values in found.items() if name.startswith(package))
            for i in range(len(counts))
        ]
        lines.append([f"the best of {package}, in their default grids",
                      *(f"{value:.1e}" for value in best)])  # fmt: skip
    head = [f"error on the mixture oracle ({len(found)} runs), evaluations", *map(str, counts)]
    return table(head, lines)


def digits(areas: Areas) -> str:
    rows = [row for row in _rows(areas, "quality", "accuracy") if row.name == "digits"]
    if not rows:
        return ""
    found = rows[0].facts
    return prose(
        f"The embedded digits model on {found['samples']:,} samples (`make evaluate`): "
        f"{100 * found['accuracy']:.1f} % of the labels asked for are recognised "
        f"({100 * found['held_out_accuracy']:.1f} % on real held-out digits), the Frechet distance "
        f"to held-out digits is {significant(found['frechet_ratio'])} x that of the real training "
        "digits, and no sample is a copy of a training image (smallest distance "
        f"{found['nearest_min']:.2f}; held-out images {found['held_out_nearest_min']:.2f})."
    )


PARTS: tuple[Callable[[Areas], str], ...] = (
    end_to_end,
    denoisers,
    ops,
    group_norm,
    solver_steps,
    errors,
    digits,
)


def section(devices: dict[str, Areas], charts: Callable[[str, Areas], list[str]]) -> str:
    """All of it. charts: the Markdown links of a device's pictures."""
    first = (
        "Every figure is written by `python -m benchmarks.report --write` from the files in "
        "`benchmarks/results`, which have the conditions of each; ratios are to a peer in the same "
        "run. `make bench` repeats them on your machine."
    )
    if not any(map(on_gpu, devices.values())):
        first += " Nothing here was measured on a GPU yet."
    text = [prose(first)]
    for slug, areas in sorted(devices.items(), key=lambda item: not on_gpu(item[1])):
        parts = [part for part in (make(areas) for make in PARTS) if part]
        if not parts:
            continue
        links = charts(slug, areas)
        shown = f" Charts: {', '.join(links)}." if links else ""
        text += [prose(f"On {conditions(areas)}.{shown}"), *parts]
    return "\n\n".join(text)
