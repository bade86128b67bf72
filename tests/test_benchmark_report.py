"""README's measured figures are those of the results files; the charts; the comparison."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import report

    return report


def row(report: Any, name: str, ours: list[float], other: list[float], **facts: Any) -> Any:
    made = report.stored.Row(name, facts)
    made.variants["ours"] = report.stored.variant(ours, ours=True)
    made.variants["eager"] = report.stored.variant(other)
    return made


def results(report: Any, *rows: Any, device: str = "A") -> Any:
    return report.stored.Results(
        {"device": device}, {"id": "1", "dirty": False}, {r.name: r for r in rows}
    )


def test_every_figure_of_the_readme_is_in_a_results_file(report):
    assert report.check(ROOT / "README.md") == []


def test_a_figure_that_no_file_has_is_found(report, tmp_path):
    readme = tmp_path / "README.md"
    text = (ROOT / "README.md").read_text()
    start = text.index(report.BEGIN)
    figure = re.compile(r"\b\d+(?:\.\d+)? x\b").search(text, start)
    assert figure is not None
    edited = text[: figure.start()] + "99.9 x" + text[figure.end() :]
    readme.write_text(edited)
    assert any("99.9 x" in line for line in report.check(readme))
    typed = text.replace("## Measured\n", "## Measured\n\nIt is 7 x as fast.\n")
    readme.write_text(typed)
    assert "typed, not generated: It is 7 x as fast." in report.check(readme)
    readme.write_text(text.replace(report.END, ""))
    with pytest.raises(ValueError, match="once each"):
        report.check(readme)


@pytest.mark.parametrize("area", ["compiler", "ops", "quality", "solvers"])
def test_a_file_that_says_something_else_is_found(report, tmp_path, area):
    """Another number in any of the files changes what the section must say."""
    folder = tmp_path / "results"
    shutil.copytree(ROOT / "benchmarks" / "results", folder)
    assert report.check(ROOT / "README.md", folder) == []
    (path,) = folder.glob(f"*/{area}.json")
    found = report.stored.read(path)

    def scaled(value: Any, factor: float) -> Any:
        if isinstance(value, dict):
            return {key: scaled(item, factor) for key, item in value.items()}
        return value * factor if isinstance(value, float) else value

    for each in found.rows.values():
        each.facts = scaled(each.facts, 1.5)
    report.stored.write(path, found)
    assert report.check(ROOT / "README.md", folder)


def test_every_chart_the_readme_links_to_is_there_and_no_other(report):
    text = (ROOT / "README.md").read_text()
    linked = set(re.findall(r"\(docs/(measured-[\w.-]+\.png)\)", text))
    assert linked == {path.name for path in (ROOT / "docs").glob("measured-*.png")}
    assert linked


def test_numbers_are_rounded_once(report):
    right = {270.09: "270", 38.02: "38", 9.96: "10", 8.31: "8.3", 0.0681: "0.068", 0: "0"}
    for value, text in right.items():
        assert report.tables.significant(value) == text
    assert report.tables.significant(1.403, 3) == "1.40"


def test_charts_of_ops_and_of_a_waterfall(report):
    facts = {"op": "geglu", "dtype": "float32", "flops": 4000, "bytes": 1000, "auto": "ours"}
    facts["limit"] = {"matmul_gflop_per_s": 100.0}
    op = row(report, "geglu A", [1e-6, 2e-6], [4e-6, 4e-6], **facts)
    copy = report.stored.variant([1e-6, 1e-6], {"gb_per_s": 10.0})
    op.variants["copy"] = copy
    op.variants["ours"].columns["times_eager"] = 2.5
    steps = []
    for place, seconds in ((1, 2.0), (0, 3.0)):
        step = report.stored.Row(f"SD: {place}")
        step.facts = {"workload": "SD", "variant": f"step {place}", "waterfall": place}
        step.variants["x"] = report.stored.variant([seconds, seconds], ours=place == 1)
        steps.append(step)
    areas = {"ops": results(report, op), "e2e": results(report, *steps)}
    assert report.charts.waterfalls(areas) == {"SD": {"step 0": 3.0, "step 1": 2.0}}
    pictures = {name: draw() for name, draw in report.charts.pictures(areas).items()}
    assert set(pictures) == {"roofline", "speed-ups", "waterfall SD"}
    for picture in pictures.values():
        assert np.asarray(picture.convert("L")).std() > 5  # something is drawn
    # A bar as long as its number: the second of the waterfall is 1.5 times the first.
    bars = np.asarray(pictures["waterfall SD"].convert("RGB")).astype(int)
    blue = (bars[..., 2] - bars[..., 0] > 120).sum(1)
    middle = [report.charts.BAR * i + 64 + 9 for i in range(2)]
    assert blue[middle[1]] / blue[middle[0]] == pytest.approx(1.5, abs=0.02)


def test_gpu_rows_show_times_and_the_share_of_the_limit(report):
    rows = []
    for variant, seconds, ours in (
        ("eager", 3.0, False),
        ("compile", 2.0, False),
        ("max", 1.6, True),
    ):
        made = report.stored.Row(f"SDXL: {variant}", {"workload": "SDXL", "variant": variant})
        columns = {"percent_of_limit": 40.0}
        made.variants[variant] = report.stored.variant([seconds] * 2, columns, ours)
        rows.append(made)
    found = results(report, *rows, device="GPU")
    found.machine |= {"cuda": "13.0", "driver": "580", "torch": "2.13.0+cu130"}
    text = report.tables.section({"gpu": {"e2e": found}}, lambda slug, areas: [])
    assert "| SDXL | max | 1.60 s | 40 % | 1.88 x | 1.25 x |" in text
    assert "On GPU, driver 580, PyTorch 2.13.0." in text
    assert "not measured" not in text
    assert "Nothing here was measured on a GPU" not in text


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ([1.06, 1.07, 1.08], "slower"),  # beyond both spreads
        ([0.98, 1.01, 1.03], "same"),
        ([0.90, 0.91, 0.92], "faster"),
        ([0.6, 1.06, 1.6], "same"),  # too noisy to say
    ],
)
def test_comparison(report, tmp_path, capsys, after, expected):
    before = [0.99, 1.0, 1.01]
    files = []
    for name, ours, other in (("a", before, before), ("b", after, [2.0, 2.0, 2.0])):
        files.append(tmp_path / f"{name}.json")
        report.stored.write(files[-1], results(report, row(report, "op", ours, other)))
    assert report.main(["compare", *map(str, files)]) == (expected == "slower")
    printed = capsys.readouterr().out
    assert ("op [ours]" in printed) == (expected != "same")
    assert "op [eager]  (a baseline" in printed  # said, but no regression of ours
    elsewhere = tmp_path / "c.json"
    report.stored.write(elsewhere, results(report, device="B"))
    with pytest.raises(ValueError, match="of one device, got A and B"):
        report.main(["compare", str(files[0]), str(elsewhere)])


def test_the_command_runs_from_the_root():
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    command = [sys.executable, "-m", "benchmarks.report", "--check"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "README.md says what the results files say\n")
