"""Power, clocks and throttling of a GPU while something runs, read by nvidia-ml-py in a thread.

    with Sampler() as sampler:
        run()
    sampler.facts(images=4)

Without the library, a GPU or the right to ask, every figure is None: never a guess. The readings
take the driver, not the device, and nothing here changes a setting.
"""

from __future__ import annotations

import statistics
import threading
import time
from types import TracebackType
from typing import Any

import torch

SECONDS = 0.05  # between readings; the driver renews power about every 0.1 s
# Bits of nvmlClocksEventReasons that are no throttling: idle, applications' clocks, display.
HARMLESS = 0x1 | 0x2 | 0x100
REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}


def library() -> Any:
    """nvidia-ml-py where it answers, else None."""
    if not torch.cuda.is_available():
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # absent, or no driver for it: both mean no readings
        return None
    return pynvml


class Sampler:
    """Reads between ``__enter__`` and ``__exit__``.

    nvml, gpu: the library and the handle of the device; the defaults are the current device's.
    """

    def __init__(self, nvml: Any = None, gpu: Any = None) -> None:
        self._nvml = nvml if nvml is not None else library()
        self._gpu = gpu
        if self._nvml is not None and gpu is None:
            uuid = torch.cuda.get_device_properties().uuid
            self._gpu = self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.readings: list[dict[str, Any]] = []
        self.joules: float | None = None
        self.seconds = 0.0

    def __enter__(self) -> Sampler:
        self._start, self._energy = time.perf_counter(), self._ask("TotalEnergyConsumption")
        if self._nvml is not None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        after = self._ask("TotalEnergyConsumption")
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._energy is not None and after is not None:
            self.joules = (after - self._energy) / 1e3
        elif watts := [r["watts"] for r in self.readings if r["watts"] is not None]:
            self.joules = statistics.mean(watts) * self.seconds

    def _ask(self, name: str, *arguments: Any) -> Any:
        """One of the library's answers, None where this driver has none."""
        if self._nvml is None:
            return None
        try:
            return getattr(self._nvml, f"nvmlDeviceGet{name}")(self._gpu, *arguments)
        except Exception:  # an NVMLError, or a library without this question
            return None

    def _watch(self) -> None:
        while True:
            power = self._ask("PowerUsage")
            reasons = self._ask("CurrentClocksEventReasons")
            if reasons is None:
                reasons = self._ask("CurrentClocksThrottleReasons")
            self.readings.append(
                {
                    "watts": None if power is None else power / 1e3,
                    "sm_mhz": self._ask("ClockInfo", self._nvml.NVML_CLOCK_SM),
                    "memory_mhz": self._ask("ClockInfo", self._nvml.NVML_CLOCK_MEM),
                    "celsius": self._ask("Temperature", self._nvml.NVML_TEMPERATURE_GPU),
                    "reasons": reasons,
                }
            )
            if self._stop.wait(SECONDS):
                return

    def facts(self, images: int) -> dict[str, Any]:
        """{"joules_per_image", "watts", "sm_mhz", "sm_mhz_least", "memory_mhz", "celsius",
        "throttled"}: medians; the share of readings by reason of throttling, or None."""
        columns: dict[str, list[Any]] = {}
        for reading in self.readings:
            for name, value in reading.items():
                if value is not None:
                    columns.setdefault(name, []).append(value)
        middle = {name: statistics.median(values) for name, values in columns.items()}
        found: dict[str, Any] = {
            "joules_per_image": None if self.joules is None or not images else self.joules / images,
            "sm_mhz_least": min(columns["sm_mhz"]) if "sm_mhz" in columns else None,
            "throttled": None,
        }
        for name in ("watts", "sm_mhz", "memory_mhz", "celsius"):
            found[name] = middle.get(name)
        if seen := columns.get("reasons"):
            bits = {1 << i for mask in seen for i in range(16) if int(mask) >> i & 1}
            found["throttled"] = {
                REASONS.get(bit, hex(bit)): sum(bool(int(m) & bit) for m in seen) / len(seen)
                for bit in sorted(bits)
                if not bit & HARMLESS
            }
        return found
