"""The benchmarks of whole runs: both models are one function, and nothing wrong is timed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fastdiff.testing import psnr

pytest.importorskip("diffusers")
ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT / "benchmarks", ROOT / "benchmarks" / "e2e")
SMALL = ("SD1.5 small", "SDXL small", "FLUX.1-dev small", "SD3-medium small", "DiT small",
         "FLUX.1-schnell small", "VAE decode small")  # fmt: skip


@pytest.fixture(autouse=True)
def e2e(monkeypatch: pytest.MonkeyPatch) -> Any:
    for folder in FOLDERS:
        monkeypatch.syspath_prepend(str(folder))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(name: str) -> Any:
    import workloads

    return next(work for work in workloads.SMALL if work.name == name)


def variant(name: str) -> Any:
    import variants

    return next(v for v in variants.VARIANTS if v.name == name)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_the_zoo_and_diffusers_end_in_the_same_latents(name: str) -> None:
    import loops
    import runs
    from pairs import Pair

    pair = Pair(small(name), 2, "cpu", torch.float32)
    right = runs.result(runs._eager(pair), pair)
    if pair.workload.family == "autoencoder":
        mine = loops.zoo_decode(pair.zoo)(pair.noise)
    else:
        mine = loops.sample_loop(pair, pair.zoo)(runs.gate_steps(pair.workload, 2))
    assert psnr(mine, right) > 80
    assert right.std() > 0.1
    assert pair.flops() > 1e6


@pytest.fixture(scope="module")
def dit() -> Any:
    """(a pair of bf16 models, its gate)"""
    for folder in FOLDERS:
        sys.path.insert(0, str(folder))
    import runs
    from pairs import Pair

    for folder in FOLDERS:
        sys.path.remove(str(folder))
    pair = Pair(small("DiT small"), 1, "cpu")
    with torch.no_grad():
        return pair, runs.make_gate(pair)


@pytest.mark.parametrize("name", ["fastdiff.sample", "fastdiff.sample step cache"])
def test_a_wrong_model_gets_no_figures(name: str, dit: Any, tmp_path: Path) -> None:
    import runs

    pair, gate = dit
    found = runs.measure(variant(name), pair, gate, 0.01, tmp_path, warm=False)
    assert found["runs"] >= runs.least_runs(0.1) == 3
    assert found["seconds"]["least"] <= found["seconds"]["p50"] <= found["seconds"]["p99"]
    assert found["peak_bytes"] is found["joules_per_image"] is found["throttled"] is None
    weight = pair.zoo.blocks[0].attn.qkv.weight
    with torch.no_grad():
        before = weight.clone()
        weight.copy_(weight.flip(0))
    try:
        # What changes results is held to less, so it takes a larger mistake to be refused.
        if not variant(name).exact:
            with torch.no_grad():
                pair.zoo.final_layer.linear.weight.neg_()
        with pytest.raises(AssertionError, match=r"dB, must be at least"):
            runs.measure(variant(name), pair, gate, 0.01, tmp_path, warm=False)
    finally:
        with torch.no_grad():
            weight.copy_(before)
            if not variant(name).exact:
                pair.zoo.final_layer.linear.weight.neg_()


def test_a_variant_leaves_the_models_as_they_were(dit: Any) -> None:
    import variants

    pair, _ = dit
    for one in variants.variants_for(pair.workload, "cpu"):
        if one.by in ("eager", "fastdiff") and not one.slow:
            with torch.no_grad(), variants.applied(one, pair):
                pass
            assert pair.zoo._compiled_call_impl is pair.peer._compiled_call_impl is None
            assert next(pair.peer.parameters()).dtype == torch.bfloat16


def test_every_variant_is_in_a_pass_and_the_worthiest_come_first() -> None:
    import test_e2e
    import variants
    import workloads

    cases = [found.values[0] for found in test_e2e.cases()]
    gpu = [case for case in cases if case.device == "cuda"]
    measured = {(c.workload.name, c.batch, v.name) for c in gpu for v in c.variants()}
    for work in workloads.GPU:
        for one in variants.variants_for(work, "cuda"):
            assert (work.name, 1, one.name) in measured
        for batch in workloads.BATCHES:
            assert (work.name, batch, "eager") in measured
            assert (work.name, batch, "fastdiff") in measured
    assert {v.name for v in gpu[0].variants()} == {"eager", "fastdiff", "fastdiff.sample"}
    assert [c.batch for c in gpu[: len(workloads.GPU)]] == [1] * len(workloads.GPU)
    places = sorted(v.waterfall for v in variants.VARIANTS if v.waterfall is not None)
    assert places == list(range(len(places)))
    assert len({v.name for v in variants.VARIANTS}) == len(variants.VARIANTS)


class Driver(ModuleType):
    """nvidia-ml-py's answers; a name without one raises, as on older drivers."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, energy: bool) -> None:
        super().__init__("pynvml")
        self.millijoules = 0
        if energy:
            self.nvmlDeviceGetTotalEnergyConsumption = self._energy

    def _energy(self, _gpu: Any) -> int:
        self.millijoules += 6000
        return self.millijoules

    def nvmlDeviceGetPowerUsage(self, _gpu: Any) -> int:
        return 400_000

    def nvmlDeviceGetClockInfo(self, _gpu: Any, which: int) -> int:
        return {1: 1980, 2: 3201}[which]

    def nvmlDeviceGetTemperature(self, _gpu: Any, _which: int) -> int:
        raise RuntimeError("Not Supported")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, _gpu: Any) -> int:
        return 0x4 | 0x1


@pytest.mark.parametrize("energy", [True, False])
def test_the_sampler_reads_what_the_driver_tells(energy: bool) -> None:
    from sampler import Sampler

    with Sampler(Driver(energy), object()) as sampler:
        time.sleep(0.12)
    facts = sampler.facts(images=3)
    watts = 2.0 if energy else 400 * sampler.seconds / 3
    assert facts["joules_per_image"] == pytest.approx(watts)
    assert (facts["sm_mhz"], facts["sm_mhz_least"], facts["celsius"]) == (1980, 1980, None)
    assert facts["throttled"] == {"power cap": 1.0}
    assert len(sampler.readings) >= 2


def test_without_a_driver_there_are_no_figures() -> None:
    from sampler import Sampler

    if torch.cuda.is_available():
        pytest.skip("a driver is here")
    with Sampler() as sampler:
        pass
    assert set(sampler.facts(images=1).values()) == {None}


def test_a_budget_leaves_out_what_does_not_fit() -> None:
    import budget

    made = budget.Budget(budget.positive("100"))
    assert 90 < made.left <= 100
    assert made.why_not(50) == ""
    assert made.why_not(150).startswith("--budget: takes about 150 s, ")
    with pytest.raises(pytest.skip.Exception):
        made.need(150)
    assert budget.Budget(None).why_not(1e9) == ""
    for text in ("0", "-1", "nan", "inf"):
        with pytest.raises(ValueError, match="--budget must be seconds above 0"):
            budget.positive(text)


def sanitizer() -> Any:
    spec = importlib.util.spec_from_file_location("sanitize", ROOT / "csrc" / "sanitize.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_the_sanitizer_runs_is_right_on_a_cpu() -> None:
    from fastdiff._ext import ext

    if ext() is None:
        pytest.skip("needs the extension")
    assert sanitizer().run("cpu") > 40


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (1, 1)])
def test_the_sanitizer_is_started_for_every_tool(
    code: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sanitizer()
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" >>{tmp_path}/log\n'
                    f"exit {code}\n")  # fmt: skip
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert module.main([]) == expected
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[2] for line in lines] == list(module.TOOLS)
    assert all(line.startswith("1 ") and line.endswith("--run cuda") for line in lines)
    monkeypatch.setattr(module, "find_tool", lambda: None)
    assert module.main([]) == 2


def test_a_session_keeps_results_and_logs_of_every_piece(tmp_path: Path) -> None:
    """With a ``make`` that writes results and fails once: the other pieces run."""
    work = SimpleNamespace(bin=tmp_path / "bin", out=tmp_path / "out")
    work.bin.mkdir()
    (tmp_path / "benchmarks" / "results" / "gpu").mkdir(parents=True)
    fake = work.bin / "make"
    fake.write_text(
        "#!/bin/bash\n"
        'echo "$2 $4 COMMIT=$COMMIT"\n'
        '[ "$2" = gpu-test ] && exit 1\n'
        'sleep 0.1; echo "{}" >benchmarks/results/gpu/"$2".json\n'
    )
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{work.bin}:{os.environ['PATH']}", "OUT": str(work.out)}
    command = ["bash", str(ROOT / "benchmarks" / "gpu_session.sh"), "build", "test", "ops"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True,
        env={**environment, "COMMIT": "abc", "LIMIT": "200"},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert sorted(p.name for p in (work.out / "gpu").iterdir()) == [
        "gpu-bench-ops.json", "gpu-build.json",
    ]  # fmt: skip
    assert "gpu-bench-ops GPU_BUDGET=1" in (work.out / "ops.log").read_text()
    assert "COMMIT=abc" in (work.out / "test.log").read_text()
    late = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**environment, "LIMIT": "20"}
    )
    assert late.returncode == 1
    assert "build: left out, 20 s are left" in late.stdout
    wrong = subprocess.run(
        [*command[:2], "fly"], cwd=tmp_path, env=environment, capture_output=True
    )
    assert wrong.returncode == 2
