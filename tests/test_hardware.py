"""Occupancy and roofline against numbers worked out by hand from the published limits."""

from __future__ import annotations

import pytest

from fastdiff.hardware import GPUS, MULTIPROCESSORS, Gpu, Occupancy, occupancy, roofline

CASES = [
    # 32 registers x 1024 threads x 2 = 65536: registers and threads both allow two.
    ((80, 32, 0, 1024), Occupancy(2, "registers")),
    ((80, 16, 0, 1024), Occupancy(2, "threads")),
    # sm_89 holds 1536 threads.
    ((89, 16, 0, 512), Occupancy(3, "threads")),
    # 255 registers take 8192 a warp, two of which fit each quarter of the register file.
    ((90, 255, 0, 256), Occupancy(1, "registers")),
    # 168 take 5376: three fit a quarter (3.05), twelve warps in all; 65536 / 5376 alone is 12.2.
    ((90, 168, 0, 128), Occupancy(3, "registers")),
    # 100 registers are rounded up to 104: 4 warps fit a quarter (4.9), 16 in all, 3 of 5 warps.
    ((90, 100, 0, 160), Occupancy(3, "registers")),
    # 48 KiB and 1 KiB of CUDA's own, in 164 KiB.
    ((80, 32, 48 * 1024, 128), Occupancy(3, "shared memory")),
    # The most a block may have, then one byte more.
    ((89, 32, 99 * 1024, 128), Occupancy(1, "shared memory")),
    ((89, 32, 99 * 1024 + 1, 128), Occupancy(0, "shared memory")),
    ((90, 16, 0, 32), Occupancy(32, "blocks")),
    ((89, 16, 0, 32), Occupancy(24, "blocks")),
    ((100, 32, 1024, 128, 256), Occupancy(2, "tensor memory")),
]


@pytest.mark.parametrize(("arguments", "expected"), CASES)
def test_occupancy(arguments: tuple[int, ...], expected: Occupancy) -> None:
    assert occupancy(*arguments) == expected


def test_roofline_is_the_larger_of_memory_and_compute() -> None:
    gpu = Gpu("test", 90, 1e12, {"float32": 1e13, "half": 1e15}, "nowhere")
    moved = 10**9
    assert roofline(gpu, moved, 10**9, "float32").seconds == pytest.approx(1e-3)
    assert roofline(gpu, moved, 10**9, "float32").bound == "memory"
    assert roofline(gpu, moved, 10**11, "float32").seconds == pytest.approx(1e-2)
    assert roofline(gpu, moved, 10**11, "float32").bound == "compute"
    assert roofline(gpu, moved, 10**11, "half").bound == "memory"
    assert roofline(gpu, moved, 10**11, "fp8").seconds == 0


def test_every_gpu_has_limits_a_source_and_dense_rates() -> None:
    for gpu in GPUS:
        assert gpu.arch in MULTIPROCESSORS
        assert gpu.source.startswith("NVIDIA")
        # tf32 : half : int8 is 1 : 2 : 4 on the tensor cores; a rate with sparsity breaks it.
        assert gpu.rates["half"] / gpu.rates["tf32"] == pytest.approx(2, rel=0.05)
        assert gpu.rates["int8"] / gpu.rates["half"] == pytest.approx(2, rel=0.05)
        assert ("fp8" in gpu.rates) == (gpu.arch >= 89)
