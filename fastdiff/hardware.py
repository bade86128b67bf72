"""What NVIDIA publishes about its GPUs, as data, and the two estimates that follow from it.

Nothing here is measured. Limits of a multiprocessor: CUDA Programming Guide, "Compute
Capabilities", and for tensor memory the PTX ISA, "Tensor Memory". Rates: the data sheets named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ARCHITECTURES = (80, 89, 90, 100)


@dataclass(frozen=True)
class Multiprocessor:
    """The limits of one multiprocessor (SM) of an architecture."""

    threads: int
    blocks: int
    shared_bytes: int
    shared_bytes_per_block: int
    registers: int = 65536
    tensor_columns: int = 0  # of tensor memory; 0: has none


MULTIPROCESSORS = {
    80: Multiprocessor(2048, 32, 164 * 1024, 163 * 1024),
    89: Multiprocessor(1536, 24, 100 * 1024, 99 * 1024),
    90: Multiprocessor(2048, 32, 228 * 1024, 227 * 1024),
    100: Multiprocessor(2048, 32, 228 * 1024, 227 * 1024, tensor_columns=512),
}

WARP = 32
PARTITIONS = 4  # of a multiprocessor: a warp's registers lie in one of them
REGISTER_UNIT = 256  # registers are handed to a warp in units of this many
SHARED_UNIT = 128
SYSTEM_SHARED = 1024  # bytes of each block's shared memory that CUDA keeps, from sm_80 on


@dataclass(frozen=True)
class Occupancy:
    """Blocks that fit one multiprocessor together, and what stops one more. 0: none can run."""

    blocks: int
    limit: str  # "registers", "shared memory", "threads", "blocks" or "tensor memory"


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(
    arch: int, registers: int, shared_bytes: int, threads: int, tensor_columns: int = 0
) -> Occupancy:
    """How many blocks of a kernel fit one multiprocessor of sm_<arch>.

    registers: per thread. shared_bytes, threads, tensor_columns: per block. Of two limits that
    allow as many blocks, the first named in :class:`Occupancy` is given.
    """
    sm = MULTIPROCESSORS[arch]
    warps = -(-threads // WARP)
    per_warp = max(REGISTER_UNIT, _round_up(registers * WARP, REGISTER_UNIT))
    shared = _round_up(shared_bytes + SYSTEM_SHARED, SHARED_UNIT)
    fits = {
        "registers": sm.registers // PARTITIONS // per_warp * PARTITIONS // warps,
        "shared memory": sm.shared_bytes // shared,
        "threads": sm.threads // (warps * WARP),
        "blocks": sm.blocks,
    }
    if tensor_columns:
        fits["tensor memory"] = sm.tensor_columns // tensor_columns
    if shared_bytes > sm.shared_bytes_per_block:
        fits["shared memory"] = 0
    limit = min(fits, key=lambda name: fits[name])
    return Occupancy(fits[limit], limit)


@dataclass(frozen=True)
class Gpu:
    """A GPU's published peaks: dense, without sparsity, at boost clock.

    bandwidth: bytes per second. rates: operations per second; "float32" is that of the CUDA cores,
    the others of the tensor cores. A missing rate is one the GPU does not have.
    """

    name: str
    arch: int
    bandwidth: float
    rates: Mapping[str, float]
    source: str


def _rates(
    float32: float, tf32: float, half: float, int8: float, fp8: float | None
) -> dict[str, float]:
    rates = {"float32": float32, "tf32": tf32, "half": half, "int8": int8}
    if fp8 is not None:
        rates["fp8"] = fp8
    return {name: 1e12 * rate for name, rate in rates.items()}


# Where a data sheet gives rates with 2:4 sparsity only, the dense one is half of it.
GPUS = (
    Gpu(
        "A100 80GB SXM", 80, 2.039e12, _rates(19.5, 156, 312, 624, None),
        "NVIDIA A100 Tensor Core GPU data sheet",
    ),
    Gpu(
        "L40S", 89, 0.864e12, _rates(91.6, 183, 362.05, 733, 733),
        "NVIDIA L40S data sheet",
    ),
    Gpu(
        "H100 SXM", 90, 3.35e12, _rates(67, 494.5, 989.5, 1979, 1979),
        "NVIDIA H100 Tensor Core GPU data sheet",
    ),
    Gpu(
        "H200 SXM", 90, 4.8e12, _rates(67, 494.5, 989.5, 1979, 1979),
        "NVIDIA H200 Tensor Core GPU data sheet",
    ),
    Gpu(
        "B200 HGX", 100, 8.0e12, _rates(80, 1100, 2250, 4500, 4500),
        "NVIDIA Blackwell Architecture Technical Brief, HGX B200",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Roofline:
    """The least time a GPU's published peaks allow. seconds is 0 where the GPU lacks the rate."""

    seconds: float
    bound: str  # "memory" or "compute"


def roofline(gpu: Gpu, moved: int, flops: int, rate: str) -> Roofline:
    """The larger of moved bytes over the bandwidth and operations over the rate."""
    if rate not in gpu.rates:
        return Roofline(0.0, "compute")
    memory, compute = moved / gpu.bandwidth, flops / gpu.rates[rate]
    return Roofline(max(memory, compute), "memory" if memory >= compute else "compute")
