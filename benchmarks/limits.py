"""What the machine can do at best: `python benchmarks/limits.py` measures copy bandwidth.

A fused op that reads its input once and writes its result once cannot be faster than a copy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import interleaved

SIZES_MB = (1, 4, 16, 64, 256, 1024)


def copy_of(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The copy that a result of x's size cannot beat: like an op it allocates what it returns."""
    return x.clone


def copy_bytes(x: torch.Tensor) -> int:
    """What that copy moves: every byte once in and once out."""
    return 2 * x.numel() * x.element_size()


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"copy on {device}, {torch.get_num_threads()} threads; bytes read plus bytes written")
    print(f"{'MB read':>8} {'us':>10} {'GB/s':>8} {'spread':>7}")
    for size in SIZES_MB:
        x = torch.zeros(size * 2**20 // 4, device=device)
        timing = interleaved({"copy": copy_of(x)}, device, budget=1.0)["copy"]
        rate = copy_bytes(x) / timing.median / 1e9
        print(f"{size:>8} {timing.median * 1e6:>10.1f} {rate:>8.1f} {timing.spread:>6.0%}")


if __name__ == "__main__":
    main()
