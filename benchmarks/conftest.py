"""Options, and results with their conditions (`stored.py`).

The area of a results file is the folder of the benchmark. Every row is written as soon as it is
measured, so that an interrupted run loses nothing, and ``--resume`` goes on where it stopped; rows
in the file from other conditions (another commit, other versions) are dropped. ``--quick`` writes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import budget as budgets
import conditions
import pytest
import stored
import torch
from timing import Timing

ROWS = pytest.StashKey[list[stored.Row]]()
BUDGET = pytest.StashKey[budgets.Budget]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastdiff")
    group.addoption(
        "--quick", action="store_true", help="small shapes, few rounds, no results file"
    )
    group.addoption(
        "--with-compile",
        action="store_true",
        help="torch.compile, OpenVINO and ONNX Runtime as peers on a CPU (takes long)",
    )
    group.addoption(
        "--resume", action="store_true", help="skip what the results file has at this commit"
    )

    group.addoption(
        "--budget", type=budgets.positive, metavar="SECONDS", help="leave out what does not fit"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[BUDGET] = budgets.Budget(config.getoption("--budget"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def budget(pytestconfig: pytest.Config) -> budgets.Budget:
    """What is left of ``--budget``."""
    return pytestconfig.stash[BUDGET]


@pytest.fixture(autouse=True)
def _in_budget(budget: budgets.Budget) -> None:
    """Nothing starts when the time is over; benchmarks that take long ask for more themselves."""
    budget.need(1.0)


@pytest.fixture
def quick(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--quick"))


def _now(device: str) -> stored.Results:
    return stored.Results(conditions.machine(device), conditions.commit())


@pytest.fixture
def record(request: pytest.FixtureRequest, quick: bool) -> Callable[..., None]:
    """record(device, row, timings=None, columns=None, ours=(), per=1): keeps it and prints it.

    row: its "name" and its facts. timings: of the variants, divided by ``per`` (the steps in one
    call, say); columns: what was derived for each; ours: which of them fastdiff computes.
    """
    area = request.path.parent.name

    def keep(
        device: str,
        row: Mapping[str, Any],
        timings: Mapping[str, Timing] | None = None,
        columns: Mapping[str, Mapping[str, Any]] | None = None,
        ours: Any = (),
        per: int = 1,
    ) -> None:
        facts = {key: value for key, value in row.items() if key != "name"}
        found = stored.Row(row["name"], facts)
        for name, timing in (timings or {}).items():
            seconds = [value / per for value in timing.seconds]
            found.variants[name] = stored.variant(seconds, (columns or {}).get(name), name in ours)
        request.config.stash[ROWS].append(found)
        if quick:
            return
        found.facts["state"] = conditions.state(device)
        path, results = stored.of_area(area, _now(device))
        results.rows[found.name] = found
        stored.write(path, results)

    return keep


@pytest.fixture
def resumed(request: pytest.FixtureRequest, quick: bool) -> Callable[[str, str], None]:
    """resumed(device, name): with ``--resume``, skips the test when the row is in the file."""

    def skip(device: str, name: str) -> None:
        if quick or not request.config.getoption("--resume"):
            return
        if name in stored.of_area(request.path.parent.name, _now(device))[1].rows:
            pytest.skip("--resume: measured already")

    return skip


COLUMNS = {  # heading and format of the columns that ops have
    "gb_per_s": ("GB/s", ".1f"),
    "gflop_per_s": ("GFLOP/s", ".1f"),
    "percent_of_limit": ("% limit", ".0f"),
    "times_eager": ("x eager", ".2f"),
    "times_compile": ("x compile", ".2f"),
    "times_best_peer": ("x peer", ".2f"),
}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One line per variant: microseconds, spread and the columns; else the row's facts."""
    write = terminalreporter.write_line
    rows = config.stash[ROWS]
    for row in (row for row in rows if not row.variants):
        facts = {k: v for k, v in row.facts.items() if isinstance(v, (str, int, float))}
        write(f"\n{row.name}: {facts or 'in the results file'}")
    rows = [row for row in rows if row.variants]
    if not rows:
        return
    wide = max(len(row.name) for row in rows)
    names = max(len(name) for row in rows for name in row.variants)
    heads = " ".join(f"{title:>9}" for title, _ in COLUMNS.values())
    write(f"\n{'':{wide}} {'':{names}} {'us':>11} {'+-':>5} {heads}")
    for row in rows:
        label = row.name
        for name, which in row.variants.items():
            spread = "" if which.spread is None else f"{which.spread:.0%}"
            cells = " ".join(
                f"{which.columns[key]:>9{form}}" if key in which.columns else " " * 9
                for key, (_, form) in COLUMNS.items()
            )
            write(f"{label:{wide}} {name:{names}} {which.median * 1e6:>11.1f} {spread:>5} {cells}")
            label = ""
        for name, reason in row.facts.get("left_out", {}).items():
            write(f"{'':{wide}} {name:{names}} {reason}")
