"""Results files, benchmarks/results/<device>/<area>.json: pytest-benchmark's JSON with conditions.

{"machine_info": {...}, "commit_info": {"id", "dirty"}, "version", "datetime",
 "benchmarks": [{"group", "name", "fullname", "params", "param", "options", "extra_info", "stats"}],
 "figures": [{"name", ...}]}

A row is one measurement, its variants timed in turns. Each variant is an entry of "benchmarks":
"group" is the row's name, "name" the variant's, "stats" seconds per call, "extra_info" the columns
derived from them and "ours". What belongs to the row, timed or not (a shape, a ratio, an error), is
in "figures", under the same name. `pytest-benchmark compare` reads the files, too.
"""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import conditions

RESULTS = Path(__file__).with_name("results")
VERSION = "1"


@dataclass(frozen=True)
class Variant:
    """Seconds per call: the median, and half the distance between the quartiles as a fraction of
    it (None where a row was taken without). columns: what was derived."""

    median: float
    spread: float | None
    stats: dict[str, Any]
    columns: dict[str, Any] = field(default_factory=dict)
    ours: bool = False


@dataclass
class Row:
    """One measurement: its facts, and its variants by name."""

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, Variant] = field(default_factory=dict)


@dataclass
class Results:
    """A results file."""

    machine: dict[str, Any]
    commit: dict[str, Any]
    rows: dict[str, Row] = field(default_factory=dict)

    def same_conditions(self, other: Results) -> bool:
        """Whether both were taken on one machine, with the same versions, at one commit."""
        return (self.machine, self.commit) == (other.machine, other.commit)


def variant(
    seconds: Sequence[float], columns: Mapping[str, Any] | None = None, ours: bool = False
) -> Variant:
    """Of the seconds of each call, in pytest-benchmark's statistics."""
    from pytest_benchmark.stats import Stats

    found = Stats()
    for value in seconds:
        found.update(value)
    stats = {**found.as_dict(), "iterations": 1}
    spread = None
    if len(seconds) > 1:
        low, _, high = statistics.quantiles(seconds, n=4)
        stats |= {"q1": low, "q3": high, "iqr": high - low}
        spread = (high - low) / 2 / found.median
    return Variant(found.median, spread, stats, dict(columns or {}), ours)


def _entry(row: Row, name: str, which: Variant) -> dict[str, Any]:
    return {
        "group": row.name,
        "name": name,
        "fullname": f"{row.name} [{name}]",
        "params": None,
        "param": None,
        "options": {},
        "extra_info": {"ours": which.ours, **which.columns},
        "stats": which.stats,
    }


def write(path: Path, results: Results) -> None:
    """The whole file at once, one entry a line; a reader never sees half of it."""
    head = {
        "machine_info": results.machine,
        "commit_info": results.commit,
        "version": VERSION,
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    rows = results.rows.values()
    lists = {
        "benchmarks": [_entry(row, name, v) for row in rows for name, v in row.variants.items()],
        "figures": [{"name": row.name, **row.facts} for row in rows],
    }
    parts = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    for key, entries in lists.items():
        lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
        parts.append(f' "{key}": [\n{lines}\n ]')
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    scratch.replace(path)


def read(path: Path) -> Results:
    """ValueError for a file that is none of ours."""
    data = json.loads(path.read_text())
    needed = {"machine_info", "commit_info", "benchmarks", "figures"}
    if not isinstance(data, dict) or needed - set(data):
        raise ValueError(f"{path} must be a results file with {sorted(needed)}")
    found = Results(data["machine_info"], data["commit_info"])
    for figure in data["figures"]:
        name = figure["name"]
        found.rows[name] = Row(name, {k: v for k, v in figure.items() if k != "name"})
    for entry in data["benchmarks"]:
        row = found.rows.setdefault(entry["group"], Row(entry["group"]))
        stats, columns = entry["stats"], dict(entry["extra_info"])
        iqr = stats.get("iqr") if stats.get("rounds", 0) > 1 else None
        row.variants[entry["name"]] = Variant(
            stats["median"],
            None if iqr is None else iqr / 2 / stats["median"],
            stats,
            columns=columns,
            ours=bool(columns.pop("ours", False)),
        )
    return found


def of_area(area: str, now: Results, folder: Path | None = None) -> tuple[Path, Results]:
    """(the file, its rows if they were taken under these conditions, else none)."""
    path = (folder or RESULTS) / conditions.slug(now.machine["device"]) / f"{area}.json"
    if path.exists():
        before = read(path)
        if before.same_conditions(now):
            return path, before
    return path, now


def all_results(folder: Path = RESULTS) -> dict[str, dict[str, Results]]:
    """Everything that is committed: device folder -> area -> results."""
    found: dict[str, dict[str, Results]] = {}
    for path in sorted(folder.glob("*/*.json")):
        found.setdefault(path.parent.name, {})[path.stem] = read(path)
    return found
