"""Every kernel of csrc/cuda once, under compute-sanitizer: ``make gpu-sanitize``.

    python csrc/sanitize.py                 starts itself under each tool
    python csrc/sanitize.py --run [DEVICE]  the calls alone, each compared bit by bit

The calls: solver_step on its samples in every dtype, noise drawn inside it and alone, and, on a
GPU, the step whose row is on the device, all the way through a table and round once more. On "cpu"
the same calls run the C++ kernels, which proves this file where there is no GPU.

Each tensor is an allocation of its own (PyTorch's caching is off), so that one element beyond a
tensor is seen. Exit code 1 on a finding or a wrong bit, 2 when a tool or the build is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SECONDS = 240  # for each tool
KERNELS = "kns=fastdiff"  # a part of the mangled name: the namespace of all of ours
SHAPES = ((1, 3), (2, 3, 5, 7), (3, 4, 8, 8))
SEEDS = (2**64 - 1, 2**40 + 7, 0)


def find_tool() -> str | None:
    """compute-sanitizer, on PATH or in the toolkit's folder."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    beside = Path(home) / "bin" / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def command(tool: str, sanitizer: str) -> list[str]:
    """How one tool is started: only our kernels are looked into, and errors are its exit code."""
    return [
        *(sanitizer, "--tool", tool, "--error-exitcode", "1", "--kernel-name", KERNELS),
        *(sys.executable, str(Path(__file__).resolve()), "--run", "cuda"),
    ]


def run(device: str) -> int:
    """The calls; how many there were. AssertionError for a wrong bit."""
    import torch

    from fastdiff import _philox
    from fastdiff.ops._contract import outputs
    from fastdiff.ops.solver_step import OP

    impl, calls = {"cuda": "cuda", "cpu": "cpp"}[device], 0
    for sample in OP.samples:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            call, exact = sample.make(device, dtype), sample.make("cpu", dtype)
            if reason := OP.why_not(impl, *call.args, **call.kwargs):
                print(f"{sample.name} {dtype}: {reason}")
                continue
            right = outputs(OP.reference(*exact.args, **exact.kwargs))
            results = outputs(OP(*call.args, **call.kwargs, impl=impl))
            for mine, other in zip(results, right, strict=True):
                assert torch.equal(mine.cpu(), other), f"{sample.name} {dtype}"
            calls += 1
    assert calls, f"no sample runs as {impl}: is the extension built?"
    for shape in SHAPES:
        seeds = list(SEEDS[: shape[0]])
        expected = _philox.reference_normal(shape, seeds, 5, "cpu")
        assert torch.equal(_philox.normal(shape, seeds, 5, device).cpu(), expected), shape
        calls += 1
    for solver in ("dpmpp_2m", "ddpm"):
        calls += indexed(solver, device)
    return calls


def indexed(solver: str, device: str) -> int:
    """A whole table, twice, as the loop's rows on the host, or by the counter on the device."""
    import torch

    from fastdiff._ext import ext
    from fastdiff.solvers import make_table, scaled_linear
    from fastdiff.solvers.engine import run as run_table
    from fastdiff.solvers.engine import run_reference
    from fastdiff.solvers.noise import PhiloxNoise

    table, seeds = make_table(solver, scaled_linear(), 6), [5, 6]
    x = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))

    class Halving:
        def __call__(self, x: torch.Tensor, row: int, /) -> torch.Tensor:
            return x * 0.5 + 0.125

        def accept(self, output: torch.Tensor, /) -> torch.Tensor:
            return output

    noise = PhiloxNoise(x.shape, seeds, state_dtype=x.dtype, device=x.device)
    right = run_reference(table, x, Halving(), dtype=x.dtype, noise=noise)
    module = ext()
    if device == "cpu" or module is None:
        mine = run_table(table, x, Halving(), dtype=x.dtype, noise=noise, engine="cpp")
        assert torch.equal(mine, right), solver
        return len(table)
    packed = table.pack()
    native = module.PackedTable(packed.index, packed.coef, packed.num_registers, packed.max_updates)
    state = x.to(device)
    registers = [state, *(torch.zeros_like(state) for _ in range(1, table.num_registers))]
    raw = torch.frombuffer(bytearray(module.cuda_device_rows(native, False)), dtype=torch.uint8)
    rows, counter = raw.to(device), torch.zeros(2, dtype=torch.int32, device=device)
    keys = torch.tensor(seeds, device=device)
    for _ in range(2):
        state.copy_(x)
        for _ in range(len(table)):
            output = Halving()(state, 0)
            module.cuda_solver_step_indexed(
                native,
                rows=rows.data_ptr(),
                counter=counter.data_ptr(),
                registers=[register.data_ptr() for register in registers],
                **dict.fromkeys(("state_dtype", "output_dtype", "input_dtype"), 0),  # float32
                **dict.fromkeys(("uncond", "input", "noise"), 0),  # none
                output=output.data_ptr(),
                copies=1,
                seeds=keys.data_ptr(),
                images=len(x),
                per_image=x[0].numel(),
                stream=torch.cuda.current_stream().cuda_stream,
            )
            torch.cuda.synchronize()
        assert torch.equal(state.cpu(), right), solver
        assert counter.tolist() == [0, 0]
    return 2 * len(table)


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--run"]:
        device = arguments[1] if len(arguments) > 1 else "cuda"
        print(f"{run(device)} calls on {device}, all bits right")
        return 0
    sanitizer = find_tool()
    if sanitizer is None:
        print("compute-sanitizer not found: put it on PATH, or set CUDA_HOME", file=sys.stderr)
        return 2
    worst = 0
    for tool in TOOLS:
        print(f"== {tool}", flush=True)
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            code = subprocess.run(
                command(tool, sanitizer), env=environment, timeout=SECONDS, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            print(f"{tool}: not done after {SECONDS} s", file=sys.stderr)
            code = 1
        print(f"== {tool}: {'nothing found' if code == 0 else f'exit code {code}'}", flush=True)
        worst = max(worst, int(code != 0))
    return worst


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
