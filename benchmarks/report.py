"""What the results files say: `python -m benchmarks.report` in the repository's root.

  python -m benchmarks.report                    prints README's "Measured" section
  python -m benchmarks.report --write            puts it into README.md, and the charts into docs/
  python -m benchmarks.report --check            exit code 1 when README.md says something else
  python -m benchmarks.report compare A.json B.json
                                                 what became slower between two commits on one
                                                 machine; exit code 1 when something of ours did

A change counts as one when it is above 5 % and the medians lie further apart than both spreads
together; without a spread (one round, old rows) when it is above 20 %.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
if __package__:  # python -m: the root, which has a folder called kernels, is not to be importable
    sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != FOLDER.parent]
if str(FOLDER) not in sys.path:
    sys.path.insert(0, str(FOLDER))

import charts  # noqa: E402
import stored  # noqa: E402
import tables  # noqa: E402

ROOT = FOLDER.parent
BEGIN = "<!-- measured: written by `python -m benchmarks.report --write` -->"
END = "<!-- /measured -->"
LEAST, WITHOUT_SPREAD = 0.05, 0.20


def links(slug: str, areas: tables.Areas) -> list[str]:
    """Markdown links to a device's charts."""
    return [f"[{name}](docs/{charts.file_name(slug, name)})" for name in charts.pictures(areas)]


def generated(results: Path = stored.RESULTS) -> str:
    """The section's text, between the markers."""
    return tables.section(stored.all_results(results), links)


def replaced(text: str, section: str) -> str:
    """README's text with another section; ValueError without one pair of markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md must have {BEGIN} and {END} once each, in this order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{section}\n\n{END}{rest.split(END)[1]}"


def typed_figures(text: str) -> list[str]:
    """Lines with digits in README's section "Measured" that are not between the markers."""
    found = re.search(r"^## Measured\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError('README.md must have a section "## Measured"')
    outside = re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), "", found[1], flags=re.DOTALL)
    return [line for line in outside.splitlines() if re.search(r"\d", line)]


def check(readme: Path, results: Path = stored.RESULTS) -> list[str]:
    """What is wrong with the section, as lines; none when it says what the files say."""
    text = readme.read_text()
    right = replaced(text, generated(results))
    wrong = [f"typed, not generated: {line}" for line in typed_figures(text)]
    lines = difflib.unified_diff(
        text.splitlines(), right.splitlines(), "README.md", "the results files", lineterm="", n=0
    )
    return [*wrong, *lines]


@dataclass(frozen=True)
class Change:
    """One variant of both files. ratio: seconds in the second over seconds in the first."""

    name: str
    before: float
    after: float
    allowed: float
    ours: bool

    @property
    def ratio(self) -> float:
        return self.after / self.before

    @property
    def verdict(self) -> str:
        if self.ratio > 1 + self.allowed:
            return "slower"
        return "faster" if self.ratio < 1 / (1 + self.allowed) else "same"


def compared(first: stored.Results, second: stored.Results) -> list[Change]:
    """Of every variant that both have; ValueError for files of two machines."""
    if first.machine["device"] != second.machine["device"]:
        raise ValueError(
            f"both files must be of one device, got {first.machine['device']} and "
            f"{second.machine['device']}"
        )
    found = []
    for name, row in first.rows.items():
        other = second.rows.get(name)
        for key, a in row.variants.items():
            b = other.variants.get(key) if other else None
            if b is None:
                continue
            spreads = [v.spread for v in (a, b) if v.spread is not None]
            allowed = max(LEAST, sum(spreads)) if len(spreads) == 2 else WITHOUT_SPREAD
            found.append(Change(f"{name} [{key}]", a.median, b.median, allowed, a.ours))
    return found


def compare(first: Path, second: Path) -> int:
    """Prints what changed; 1 when something of ours became slower."""
    a, b = stored.read(first), stored.read(second)
    changes = compared(a, b)
    differing = [
        k for k in sorted({*a.machine, *b.machine}) if a.machine.get(k) != b.machine.get(k)
    ]
    for key in differing:
        print(f"not the same {key}: {a.machine.get(key)}, {b.machine.get(key)}")
    for change in sorted(changes, key=lambda c: -c.ratio):
        if change.verdict != "same":
            whose = "" if change.ours else "  (a baseline: the machine, not the code)"
            print(
                f"{change.verdict}  {change.ratio:6.2f} x  {change.before * 1e6:12.1f} us -> "
                f"{change.after * 1e6:12.1f} us  {change.name}{whose}"
            )
    slower = [c for c in changes if c.ours and c.verdict == "slower"]
    only = sum(name not in b.rows for name in a.rows) + sum(name not in a.rows for name in b.rows)
    print(f"{len(changes)} compared, {len(slower)} of ours slower, {only} rows in one file only")
    return 1 if slower else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.report", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--write", action="store_true", help="edit README.md, draw the charts")
    which.add_argument("--check", action="store_true", help="exit code 1 when README.md differs")
    commands = parser.add_subparsers(dest="command")
    two = commands.add_parser("compare", help="two results files of one machine")
    two.add_argument("first", type=Path)
    two.add_argument("second", type=Path)
    chosen = parser.parse_args(arguments)
    readme = ROOT / "README.md"
    if chosen.command == "compare":
        return compare(chosen.first, chosen.second)
    if chosen.check:
        problems = check(readme)
        print("\n".join(problems) or "README.md says what the results files say")
        return 1 if problems else 0
    if not chosen.write:
        print(generated())
        return 0
    readme.write_text(replaced(readme.read_text(), generated()))
    for slug, areas in stored.all_results().items():
        for path in charts.save(slug, areas, ROOT / "docs"):
            print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
