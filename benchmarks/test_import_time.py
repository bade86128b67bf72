"""`import fastdiff` beside `import torch` alone, in fresh processes; bar: at most 1.3 x."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

CODE = "import time; s = time.perf_counter(); import {}; print(time.perf_counter() - s)"


def import_seconds(module: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(module)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    return float(done.stdout)


def test_import_fastdiff_beside_torch(benchmark, quick):
    baseline: list[float] = []

    def pair() -> float:
        baseline.append(import_seconds("torch"))
        return import_seconds("fastdiff")

    ours: list[float] = []
    benchmark.pedantic(lambda: ours.append(pair()), rounds=3 if quick else 7, warmup_rounds=1)
    ratio = statistics.median(ours[1:]) / statistics.median(baseline[1:])
    benchmark.extra_info.update(
        import_torch_s=statistics.median(baseline[1:]),
        import_fastdiff_s=statistics.median(ours[1:]),
        ratio_to_torch=ratio,
        bar=1.3,
    )
    assert ratio < 1.3
