"""Seconds from the first call of a compiled model to its result, in fresh processes.

"first": nothing is stored; "second": the captured graph is on the disk; "frozen": the same with
prepacked weights; "torch.compile" with ``--with-compile``. From each the time of a later call of
the same process is subtracted in "overhead". The imports are not in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
CODE = """
import json, sys, time
import torch
sys.path.insert(0, sys.argv[1])
from denoisers import DENOISERS, result
import fastdiff
torch.set_grad_enabled(False)
model, inputs = DENOISERS[sys.argv[2]](torch.bfloat16)
kind = sys.argv[3]
if kind == "torch.compile":
    import torch._inductor.config
    torch._inductor.config.freezing = True
    model = torch.compile(model.to(memory_format=torch.channels_last), dynamic=False)
else:
    fastdiff.compile(model, freeze=kind == "frozen")
times = []
for step in range(3):
    inputs["timestep"] = inputs["timestep"] * 0 + 900 - step
    start = time.perf_counter()
    result(model(**inputs))
    times.append(time.perf_counter() - start)
stored = kind != "torch.compile" and fastdiff.report(model).graphs[0].stored
print(json.dumps({"seconds": times[0], "overhead": times[0] - min(times[1:]), "stored": stored}))
"""


def cold(name: str, kind: str, cache: Path) -> dict[str, Any]:
    folders = {"FASTDIFF_CACHE": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(Path(__file__).parent), name, kind],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONSAFEPATH": "1", **folders},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("stored") == (kind in ("second", "frozen"))
    return found


@pytest.mark.parametrize("name", ["sd15"])
def test_cold_start(
    name: str, quick: bool, tmp_path: Path, pytestconfig: pytest.Config, benchmark: Any, record: Any
) -> None:
    name = "small" if quick else name
    kinds = ["first", "second", "frozen"]
    if pytestconfig.getoption("--with-compile"):
        kinds.append("torch.compile")

    def measured() -> None:
        found = {kind: cold(name, kind, tmp_path) for kind in kinds}
        record("cpu", {"name": f"cold start of {name}", "dtype": "bfloat16", "cold": found})

    benchmark.pedantic(measured, rounds=1)
