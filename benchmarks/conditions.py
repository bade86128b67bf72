"""What a number depends on besides the code: the machine, the versions, the commit, the clocks."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

SOURCES = ("kernels", "fastdiff", "csrc")
PEERS = ("diffusers", "flash-attn", "xformers", "apex", "liger-kernel", "openvino", "onnxruntime")


def device_name(device: str) -> str:
    """The hardware's own name: "NVIDIA H200", "Intel(R) Xeon(R) ..."."""
    if device == "cuda":
        import torch

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
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _nvml() -> tuple[Any, Any] | None:
    """(pynvml, the handle of the current device); None without nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        return None
    import torch

    pynvml.nvmlInit()
    uuid = torch.cuda.get_device_properties().uuid
    return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")


def machine(device: str) -> dict[str, Any]:
    """The hardware and the versions; the same for every row of a run."""
    import torch

    from fastdiff._ext import ext

    module = ext()
    found: dict[str, Any] = {
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        **{name: version for name in PEERS if (version := _version(name)) != "not installed"},
        "extension": module.isa_name() if module else "none",
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device == "cuda":
        found["cuda"] = torch.version.cuda
        if (nvml := _nvml()) is not None:
            driver, gpu = nvml
            found |= {
                "driver": driver.nvmlSystemGetDriverVersion(),
                "max_sm_mhz": driver.nvmlDeviceGetMaxClockInfo(gpu, driver.NVML_CLOCK_SM),
                "max_memory_mhz": driver.nvmlDeviceGetMaxClockInfo(gpu, driver.NVML_CLOCK_MEM),
                "power_limit_w": driver.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1e3,
            }
    return found


def commit() -> dict[str, Any]:
    """The commit, and whether the sources differ from it; $COMMIT where .git is not with them."""
    return {
        "id": _git("rev-parse", "HEAD") or os.environ.get("COMMIT", ""),
        "dirty": bool(_git("status", "--porcelain", "--", *SOURCES)),
    }


def state(device: str) -> dict[str, Any]:
    """What changes from row to row: the load average, the GPU's clocks, power and throttling."""
    # Others at work on the machine make a CPU number worthless; the load average shows them.
    found: dict[str, Any] = {"load_average": os.getloadavg()[0]}
    nvml = _nvml() if device == "cuda" else None
    if nvml is not None:
        driver, gpu = nvml
        reasons = driver.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)
        found |= {
            "sm_mhz": driver.nvmlDeviceGetClockInfo(gpu, driver.NVML_CLOCK_SM),
            "memory_mhz": driver.nvmlDeviceGetClockInfo(gpu, driver.NVML_CLOCK_MEM),
            "power_w": driver.nvmlDeviceGetPowerUsage(gpu) / 1e3,
            "celsius": driver.nvmlDeviceGetTemperature(gpu, driver.NVML_TEMPERATURE_GPU),
            "throttled_by": reasons,  # NVML's bits; 0: nothing, 1: idle
        }
    return found
