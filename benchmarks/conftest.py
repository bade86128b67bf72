"""Options, and results with their conditions: benchmarks/results/<device>/<area>.json.

The area is the folder of the benchmark. Every row is written as soon as it is measured; rows in the
file from other conditions (another commit, other versions) are dropped. ``--quick`` writes nothing.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

RESULTS = Path(__file__).with_name("results")
ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastdiff")
    group.addoption(
        "--quick", action="store_true", help="small shapes, few rounds, no results file"
    )
    group.addoption(
        "--with-compile", action="store_true", help="torch.compile of the plain code as a baseline"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def quick(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--quick"))


def device_name(device: str) -> str:
    """The hardware's own name: "NVIDIA H200", "Intel(R) Xeon(R) ..."."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A folder name: "Intel(R) Xeon(R) CPU @ 2.60GHz" -> "intel-xeon-cpu-2.60ghz"."""
    plain = re.sub(r"\((r|tm|c)\)", " ", name.lower())
    return re.sub(r"[^a-z0-9.]+", "-", plain).strip("-")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(RESULTS.parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpu_state() -> dict[str, Any]:
    """Clocks and the power limit, from the driver; empty without nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        return {}
    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
    return {
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "max_sm_mhz": pynvml.nvmlDeviceGetMaxClockInfo(gpu, pynvml.NVML_CLOCK_SM),
        "max_memory_mhz": pynvml.nvmlDeviceGetMaxClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
        "power_limit_w": pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1e3,
    }


def conditions(device: str) -> dict[str, Any]:
    """What a number depends on, besides the code."""
    from fastdiff._ext import ext

    module = ext()
    stamp: dict[str, Any] = {
        "device": device_name(device),
        "commit": _git("rev-parse", "HEAD"),
        "changed_since_commit": bool(
            _git("status", "--porcelain", "--", "kernels", "fastdiff", "csrc")
        ),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "extension": module.isa_name() if module else "none",
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device == "cuda":
        stamp |= {"cuda": torch.version.cuda, **_gpu_state()}
    return stamp


@pytest.fixture
def record(request: pytest.FixtureRequest, quick: bool) -> Callable[[str, dict[str, Any]], None]:
    """record(device, row): prints the row at the end and keeps it, under its "name"."""
    area = request.path.parent.name

    def keep(device: str, row: dict[str, Any]) -> None:
        request.config.stash[ROWS].append(row)
        if quick:
            return
        stamp = conditions(device)
        folder = RESULTS / slug(stamp["device"])
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{area}.json"
        rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            before = json.loads(path.read_text())
            if before["conditions"] == stamp:
                rows = {old["name"]: old for old in before["rows"]}
        # Others at work on the machine make a CPU number worthless; the load average shows them.
        rows[row["name"]] = {**row, "load_average": os.getloadavg()[0]}
        text = json.dumps({"conditions": stamp, "rows": list(rows.values())}, indent=1)
        scratch = path.with_suffix(".tmp")
        scratch.write_text(text + "\n")
        scratch.replace(path)

    return keep


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One line per variant: microseconds, GB/s, percent of a copy, times eager."""
    write = terminalreporter.write_line
    for row in config.stash[ROWS]:
        if "variants" not in row:
            write(f"\n{row.get('name')}: {row}")
    rows = [row for row in config.stash[ROWS] if "variants" in row]
    if not rows:
        return
    width = max(len(row["name"]) for row in rows)
    head = f"{'us':>10} {'+-':>5} {'GB/s':>8} {'% copy':>7} {'x eager':>8} {'x best':>7}"
    write(f"\n{'':<{width}} {'':<9} {head}")
    for row in rows:
        label = row["name"]
        for name, v in row["variants"].items():
            line = f"{label:<{width}} {name:<9} {v['us']:>10.1f} {v['spread']:>5.0%} "
            line += f"{v['gb_per_s']:>8.1f} {v['percent_of_copy']:>6.0f}% {v['times_eager']:>8.2f}"
            if "times_best_baseline" in v:
                line += f" {v['times_best_baseline']:>7.2f}"
            write(line)
            label = ""
