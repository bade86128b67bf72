"""What the machine can do at best: `python benchmarks/limits.py` measures copies and products.

A fused op that reads its input once and writes its result once cannot be faster than a copy, nor
than a matrix product of as many operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from timing import interleaved

SIZES_MB = (1, 4, 16, 64, 256, 1024)
SIDES = {"cuda": 8192, "cpu": 2048}  # of the square product


def copy_of(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The copy that a result of x's size cannot beat: like an op it allocates what it returns."""
    return x.clone


def copy_bytes(x: torch.Tensor) -> int:
    """What that copy moves: every byte once in and once out."""
    return 2 * x.numel() * x.element_size()


@functools.cache
def matmul_rate(kind: str, dtype: torch.dtype, budget: float, side: int | None = None) -> float:
    """FLOP/s of a square product of random numbers on "cpu" or "cuda"; measured once in a run."""
    side, device = side or SIDES[kind], torch.device(kind)
    random = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randn(side, side, device=device, generator=random).to(dtype) / side**0.5
        for _ in range(2)
    )
    timing = interleaved({"matmul": lambda: a @ b}, device, budget)["matmul"]
    return 2 * side**3 / timing.median


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"copy on {device}, {torch.get_num_threads()} threads; bytes read plus bytes written")
    print(f"{'MB read':>8} {'us':>10} {'GB/s':>8} {'spread':>7}")
    for size in SIZES_MB:
        x = torch.zeros(size * 2**20 // 4, device=device)
        timing = interleaved({"copy": copy_of(x)}, device, budget=1.0)["copy"]
        rate = copy_bytes(x) / timing.median / 1e9
        print(f"{size:>8} {timing.median * 1e6:>10.1f} {rate:>8.1f} {timing.spread:>6.0%}")
    for dtype in (torch.float32, torch.bfloat16):
        rate = matmul_rate(device.type, dtype, 1.0) / 1e9
        print(
            f"product of {SIDES[device.type]} x {SIDES[device.type]}, {dtype}: {rate:.0f} GFLOP/s"
        )


if __name__ == "__main__":
    main()
