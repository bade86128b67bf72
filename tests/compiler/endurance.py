"""Compiling, uncompiling and changing shapes a thousand times: what stays in memory.

Run by hand, not in CI; `test_robust.py` does the same a few times:

    python tests/compiler/endurance.py [--cycles 1000] [--shapes 200]

Held: no graph, kept result or recorded program outlives its model or its place among ``max_graphs``
sets of shapes; PyTorch's own tables (backends, finalizers, generated sources) do not grow; what
Python's collector counts grows by at most MOST_OBJECTS for each capture, and the resident memory by
at most MOST_BYTES. PyTorch 2.13 itself keeps some 20 objects (tracebacks of its metrics, context
variables) and some KiB of every compilation.

The exit status is 1 when something held does not hold.
"""

from __future__ import annotations

import argparse
import gc
import linecache
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable

import torch
from recorders import Again
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch.fx import graph_module

from fastdiff import compiler
from fastdiff.compiler import captured, compiled, cuda_graphs, runner

MOST_OBJECTS = 40
MOST_BYTES = 32 << 10
OURS = (
    compiled.Compiled, captured.Entry, captured.Graph, runner.Runner, runner.Kept,
    cuda_graphs.Graphed,
)  # fmt: skip


class Small(nn.Module):
    """A denoiser that is captured at once."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.time = nn.GroupNorm(2, 4), nn.Linear(1, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        t = self.time(timestep.reshape(-1, 1).float())
        return nn.functional.silu(self.norm(sample + t[:, :, None, None]))


def inputs(size: int = 8) -> tuple[Tensor, Tensor]:
    """A sample and times."""
    generator = torch.Generator().manual_seed(size)
    return torch.randn(2, 4, size, size, generator=generator), torch.tensor([3, 4])


def call(model: nn.Module, size: int = 8, calls: int = 3) -> None:
    """The right answer, as it is and replayed."""
    values = inputs(size)
    with torch.no_grad():
        for _ in range(calls):
            torch.testing.assert_close(model(*values), model._call_impl(*values))


def cycle(model: nn.Module, _: int) -> None:
    """Compiles, calls, records, and undoes."""
    compiler.compile(model)
    model._compiled_call_impl.pool.recorder = Again()
    call(model)
    (graph,) = compiler.report(model).graphs
    assert graph.cuda_graphs["step"]["replays"] == 2
    compiler.uncompile(model)


def reshape(model: nn.Module, number: int) -> None:
    """Another shape, of more than a model keeps."""
    call(model, 2 + number % 50)


def counts() -> dict[str, int]:
    """What there is of ours, and in the tables of PyTorch that only grow."""
    gc.collect()
    found = Counter(type(thing) for thing in gc.get_objects())
    return {
        **{kind.__name__: found[kind] for kind in OURS},
        "backends": len(eval_frame.cached_backends),
        "finalizers": len(weakref.finalize._registry),
        "sources": len(graph_module._loader.eval_cache),
        "lines": sum(name.startswith("<eval_with_key>") for name in linecache.cache),
        "objects": sum(found.values()),
    }


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def grown(work: Callable[[nn.Module, int], None], model: nn.Module, times: int) -> dict[str, float]:
    """How much more there is of everything per time, and the seconds of one; after a warm-up."""
    # PyTorch keeps the last 64 of some things.
    warm = min(70, times)
    for number in range(warm):
        work(model, number)
    before, start = counts(), time.perf_counter()
    memory: list[tuple[int, int]] = []
    for number in range(times):
        work(model, warm + number)
        if number % max(1, times // 20) == 0:
            gc.collect()
            memory.append((number, resident()))
    seconds = (time.perf_counter() - start) / times
    slopes = {name: (count - before[name]) / times for name, count in counts().items()}
    slope = statistics.linear_regression(*zip(*memory, strict=True)).slope if times > 1 else 0.0
    return {**slopes, "bytes": slope, "seconds": seconds}


def too_much(found: dict[str, float]) -> list[str]:
    """What of it grows and must not."""
    most = {"objects": MOST_OBJECTS, "bytes": MOST_BYTES, "seconds": float("inf")}
    return [
        f"{name} grow by {value:.3g}" for name, value in found.items() if value > most.get(name, 0)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--shapes", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    broken = []
    for name, work, times in (("cycle", cycle, options.cycles), ("shape", reshape, options.shapes)):
        model = Small().eval()
        if work is reshape:
            compiler.compile(model)
        found = grown(work, model, times)
        grows = ", ".join(f"{value:.3g} {what}" for what, value in found.items() if value)
        print(f"{times} times, for each {name}: {grows or 'nothing'}", flush=True)
        broken += too_much(found)
        compiler.uncompile(model)
    for line in broken:
        print(f"BROKEN {line}")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
