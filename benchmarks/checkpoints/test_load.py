"""Loading a file of 1.7 GB (SD1.5's U-Net in bfloat16) beside reading it once; bar: at most 1.3 x.

Both have the file in the page cache, and both touch every byte: reading fills a buffer, loading is
followed by a sum over every page of the parameters. ``peak_to_file`` is the peak of the process's
memory beyond what it had, over the file's size; bar: at most 1.2.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastdiff.checkpoints.detect import describe
from fastdiff.checkpoints.empty import build_empty
from fastdiff.checkpoints.load import load
from fastdiff.checkpoints.writing import serialised
from fastdiff.models.unet import UNet
from fastdiff.models.unet_configs import CONFIGS

BARS = {"ratio_to_reading": 1.3, "peak_to_file": 1.2}
RUN = """
import json, sys, time, torch
from fastdiff.checkpoints.load import load
from fastdiff.checkpoints.layouts import families
import tqdm
families()
def status(key):
    lines = dict(line.split(':') for line in open('/proc/self/status'))
    return int(lines[key].split()[0]) * 1024
path, work = sys.argv[1], sys.argv[2]
before = status('VmRSS')
start = time.perf_counter()
if work == 'read':
    size = 0
    with open(path, 'rb', buffering=0) as file:
        buffer = bytearray(2**24)
        while count := file.readinto(buffer):
            size += count
else:
    model = load(path, dtype=torch.float32 if work == 'float32' else None)
    for p in model.parameters():
        p.view(-1)[:: 2048].view(torch.int16 if p.itemsize == 2 else torch.int32).sum()
print(json.dumps([time.perf_counter() - start, status('VmHWM') - before]))
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    config = CONFIGS["sd1"]
    if pytestconfig.getoption("--quick"):
        config = replace(config, channels=(64, 128, 128, 128))
    state = build_empty(UNet, config).state_dict()
    about = {name: (torch.bfloat16, tuple(value.shape)) for name, value in state.items()}
    path = tmp_path_factory.mktemp("load") / "unet.safetensors"

    def values(name: str) -> torch.Tensor:
        return torch.full(about[name][1], 0.5, dtype=torch.bfloat16)

    with open(path, "wb") as file:
        file.writelines(serialised(about, values))
    return path


def run(path: Path, work: str) -> list[float]:
    command = [sys.executable, "-c", RUN, str(path), work]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("work", ["bfloat16", "float32"])
def test_load_beside_reading(benchmark, record, path: Path, work: str) -> None:
    size = path.stat().st_size
    part = describe(path).components["unet"]
    assert sum(p.nbytes for p in load(path).parameters()) == part.checkpoint.nbytes
    reading: list[float] = []
    loading: list[list[float]] = []

    def pair() -> None:
        reading.append(run(path, "read")[0])
        loading.append(run(path, work))

    benchmark.pedantic(pair, rounds=4, warmup_rounds=1)
    once = sorted(reading[1:])[len(reading[1:]) // 2]
    ours = sorted(seconds for seconds, _ in loading[1:])[len(loading[1:]) // 2]
    row = {
        "file_bytes": size,
        "read_s": once,
        "load_s": ours,
        "ratio_to_reading": ours / once,
        "peak_to_file": max(peak for _, peak in loading) / size,
        "bars": BARS,
    }
    benchmark.extra_info.update(row)
    record("cpu", {"name": f"load 1.7 GB as {work}", **row})
