"""One variant of a workload: its gate, then its figures.

The gate: a short run (``gate_steps``) from the same noise, against diffusers' own loop in float32.
A variant that promises the same function must be at most ``GATE_DB`` below diffusers in bf16, in
dB of its final latents, or, for a decoder, of its picture. One that changes results (fp8, step
cache) must be clearly nearer to the right latents than those are to themselves moved by half a
picture; how near is in the row.

The figures are of whole runs on the host's clock, which ends when the device is done.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loops import diffusers_decode, diffusers_loop, latents_in
from pairs import Pair
from sampler import Sampler
from torch import Tensor
from variants import Ready, Variant, applied, forget
from workloads import Workload

from fastdiff.testing import psnr

GATE_STEPS = 4
GATE_DB = 1.0
MARGIN_DB = 6.0
MOST_RUNS = 50
LONG_RUN = 10.0  # seconds


@dataclass(frozen=True)
class Gate:
    """right: float32's result on the CPU. eager: PSNR of diffusers in bf16. moved: of the result
    against itself moved by half a picture."""

    right: Tensor
    eager: float
    moved: float

    def check(self, mine: Tensor, what: str, exact: bool) -> float:
        """The PSNR; AssertionError for a result that may not be timed."""
        mine = mine.float().cpu()
        assert mine.shape == self.right.shape, f"{what}: {mine.shape} is not {self.right.shape}"
        assert mine.isfinite().all(), f"{what}: not finite"
        found = psnr(mine, self.right)
        least = self.eager - GATE_DB if exact else self.moved + MARGIN_DB
        assert found >= least, f"{what}: {found:.1f} dB, must be at least {least:.1f}"
        return found


def gate_steps(work: Workload, batch: int) -> int | None:
    """Of the short run: 4 for one picture, 2 for 4, 1 for 16, as float32 takes long."""
    return min(work.steps, max(1, int(GATE_STEPS / batch**0.5))) or None


def result(ready: Ready, pair: Pair) -> Tensor:
    """What is compared: latents, or a decoder's picture."""
    latents = ready.denoise(gate_steps(pair.workload, pair.batch))
    if pair.workload.family != "autoencoder":
        return latents.clone()
    assert ready.decode is not None
    return ready.decode(latents).clone()


def make_gate(pair: Pair) -> Gate:
    """Leaves diffusers' modules in the pair's dtype."""
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        right = result(_eager(pair.to(torch.float32)), pair).float().cpu()
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    forget()
    low = result(_eager(pair.to(pair.dtype)), pair).float().cpu()
    half = [side // 2 for side in right.shape[2:]]
    return Gate(right, psnr(low, right), psnr(right.roll(half, (2, 3)), right))


def _eager(pair: Pair) -> Ready:
    if pair.workload.family == "autoencoder":
        dtype = next(pair.peer.parameters()).dtype
        return Ready(latents_in(pair, dtype), diffusers_decode(pair.peer))
    return Ready(diffusers_loop(pair, pair.peer), None)


def finished(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def one_run(ready: Ready, pair: Pair) -> tuple[float, float]:
    """Seconds of the loop, and of the decoder."""
    finished(pair.device)
    start = time.perf_counter()
    latents = ready.denoise(None)
    finished(pair.device)
    between = time.perf_counter()
    if ready.decode is not None:
        ready.decode(latents)
        finished(pair.device)
    return between - start, time.perf_counter() - between


@contextmanager
def cache_at(folder: Path) -> Iterator[None]:
    """Nothing stored by others is found, neither by Inductor nor by us."""
    names = {"FASTDIFF_CACHE": folder, "TORCHINDUCTOR_CACHE_DIR": folder / "inductor"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: str(value) for name, value in names.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def measure(
    variant: Variant, pair: Pair, gate: Gate, seconds: float, folder: Path, warm: bool
) -> dict[str, Any]:
    """The row of a variant, without what the workload says.

    seconds: for the timed runs. folder: of caches of its own. warm: also the time to a first result
    when compiled again in this process, with what the first time stored.
    """
    with torch.no_grad(), cache_at(folder):
        found: dict[str, Any] = {}
        if variant.by != "eager" and warm:
            with applied(variant, pair) as ready:
                cold, first = _first(ready, pair)
                found["first_result_cold_s"], found["psnr_db"] = cold, _db(gate, first, variant)
        with applied(variant, pair) as ready:
            again, first = _first(ready, pair)
            name = "first_result_warm_s" if warm else "first_result_cold_s"
            if variant.by != "eager":
                found[name] = again
            found["psnr_db"] = _db(gate, first, variant)
            found |= _figures(ready, pair, seconds)
            # Replayed runs, too, must end where they should: the gate's again, after all of them.
            found["psnr_db_last"] = _db(gate, result(ready, pair), variant)
            found["notes"] = ready.notes()
    return found


def _db(gate: Gate, mine: Tensor, variant: Variant) -> float:
    return gate.check(mine, variant.name, variant.exact)


def _first(ready: Ready, pair: Pair) -> tuple[float, Tensor]:
    """Seconds to the first result of a short run, compiling included, and that result."""
    finished(pair.device)
    start = time.perf_counter()
    mine = result(ready, pair)
    finished(pair.device)
    return time.perf_counter() - start, mine


def _figures(ready: Ready, pair: Pair, seconds: float) -> dict[str, Any]:
    cuda = pair.device.type == "cuda"
    pilot = sum(one_run(ready, pair))
    if pilot < LONG_RUN:  # graphs may be recorded in the second call only
        pilot = min(pilot, sum(one_run(ready, pair)))
    count = max(least_runs(pilot), min(MOST_RUNS, int(seconds / pilot)))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    loops, decodes = [], []
    with Sampler() as sampler:
        for _ in range(count):
            loop, decode = one_run(ready, pair)
            loops.append(loop)
            decodes.append(decode)
    whole = [a + b for a, b in zip(loops, decodes, strict=True)]
    middle = statistics.median(whole)
    steps = pair.workload.steps
    return {
        "runs": count,
        "seconds_each": whole,
        "seconds": {"p50": middle, "p99": percentile(whole, 0.99), "least": min(whole)},
        "loop_s": statistics.median(loops) if steps else None,
        "decode_s": statistics.median(decodes) if ready.decode is not None else None,
        "ms_per_step": 1e3 * statistics.median(loops) / steps if steps else None,
        "images_per_s": pair.batch / middle,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
        **sampler.facts(pair.batch * count),
    }


def least_runs(seconds: float) -> int:
    """How many runs are timed at least, if one takes so long."""
    return 3 if seconds < LONG_RUN else 1


def percentile(values: list[float], part: float) -> float:
    """The smallest value that ``part`` of all are at most; with few values the largest."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]
