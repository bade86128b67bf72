"""Compiles Triton configurations for GPUs that are not there, and reads what came out.

Used by `python -m fastdiff.aot` (the check) and `python -m fastdiff.kernel_report` (the document).
What is compiled stays in Triton's cache (TRITON_CACHE_DIR): a second run only reads it.
"""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastdiff.hardware import ARCHITECTURES, MULTIPROCESSORS, WARP, Occupancy, occupancy
from fastdiff.ops._contract import AotConfig

PROCESSES = 2

# SASS's names of the tensor cores' instructions. H: fp16, bf16, tf32; I: int8; Q: fp8; D: fp64;
# O: fp4; with G for a warp group (sm_90), with UTC for tensor memory (sm_100). The form follows the
# name after a dot.
_TENSOR_CORE = re.compile(r"\b(UTC[A-Z]*MMA|[HIQDBO]G?MMA)\b")
_PTX_TENSOR_CORE = re.compile(r"\b(?:wgmma|tcgen05|w?mma)\b")


@dataclass(frozen=True)
class Outcome:
    """What the compiler says about one configuration.

    error is "" unless it failed to compile, cannot be launched on sm_<arch>, or lacks the
    tensor-core instruction it is expected to have. shared_bytes, threads and tensor_columns (of
    tensor memory): per block. tensor_cores: (SASS instruction, how many of it), sorted.
    """

    label: str
    arch: int
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    threads: int = 0
    tensor_columns: int = 0
    tensor_cores: tuple[tuple[str, int], ...] = ()
    error: str = ""

    @property
    def bad(self) -> bool:
        return bool(self.error) or self.spill_bytes > 0

    @property
    def occupancy(self) -> Occupancy:
        return occupancy(
            self.arch, self.registers, self.shared_bytes, self.threads, self.tensor_columns
        )


def _tool(name: str, *arguments: str) -> str:
    """What one of the CUDA tools in Triton's wheel prints."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    command = [str(folder / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _resource_usage(cubin: str) -> tuple[int, int]:
    """(registers, bytes of local memory per thread) of the compiled file.

    Local memory holds spilled registers and arrays indexed at run time; the kernels have no such
    arrays, so any of it is a spill.
    """
    text = _tool("cuobjdump", "--dump-resource-usage", cubin)
    registers = re.search(r"REG:(\d+)", text)
    stack, local = re.search(r"STACK:(\d+)", text), re.search(r"LOCAL:(\d+)", text)
    if not (registers and stack and local):
        raise RuntimeError(f"cuobjdump reported no resource usage: {text!r}")
    return int(registers[1]), int(stack[1]) + int(local[1])


def count_tensor_cores(sass: str) -> tuple[tuple[str, int], ...]:
    """(instruction, how many of it) for each kind of tensor-core instruction in SASS."""
    return tuple(sorted(Counter(_TENSOR_CORE.findall(sass)).items()))


def _examine(config: AotConfig, arch: int, compiled: object) -> Outcome:
    asm, metadata = compiled.asm, compiled.metadata  # type: ignore[attr-defined]
    ptx = asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        registers, spill = _resource_usage(file.name)
        # Disassembly takes as long as a compilation; SASS has what PTX asks for and no more.
        asks = _PTX_TENSOR_CORE.search(ptx)
        found = count_tensor_cores(_tool("nvdisasm", "-c", file.name)) if asks else ()
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", ptx)
    outcome = Outcome(
        config.label,
        arch,
        registers,
        spill,
        metadata.shared,
        int(threads[1]) if threads else WARP * metadata.num_warps,
        getattr(metadata, "tmem_size", 0) or 0,
        found,
    )
    return dataclasses.replace(outcome, error=_refusal(config, outcome))


def _refusal(config: AotConfig, outcome: Outcome) -> str:
    """Why a configuration that compiled may not be shipped, or ""."""
    most = MULTIPROCESSORS[outcome.arch].shared_bytes_per_block
    if outcome.shared_bytes > most:
        return f"needs {outcome.shared_bytes} bytes of shared memory, a block has {most}"
    if outcome.occupancy.blocks == 0:
        return f"no block fits a multiprocessor: {outcome.occupancy.limit}"
    wanted = config.tensor_cores.get(outcome.arch)
    if wanted and wanted not in dict(outcome.tensor_cores):
        found = ", ".join(name for name, _ in outcome.tensor_cores) or "no tensor-core instruction"
        return f"SASS must hold {wanted}, has {found}"
    return ""


def compile_config(config: AotConfig, arch: int) -> Outcome:
    """Compiles one configuration for sm_<arch>."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # As at run time: PyTorch's allocations are 16-byte aligned, and Triton specialises on integers
    # that are multiples of 16.
    names = list(config.signature)
    attrs = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if config.signature[name].startswith("*")
        or (config.signature[name] == "i32" and name in config.multiples_of_16)
    }
    constants = {(names.index(name),): value for name, value in config.constexprs.items()}
    try:
        source = ASTSource(config.kernel, config.signature, constants, attrs)
        target = GPUTarget("cuda", arch, 32)
        compiled = triton.compile(source, target=target, options=dict(config.options))
        return _examine(config, arch, compiled)
    except Exception as error:  # reported, whatever it is
        message = f"{type(error).__name__}: {error}"
        return Outcome(config.label, arch, error=message)


@functools.lru_cache(maxsize=1)
def all_configs() -> tuple[AotConfig, ...]:
    """Every configuration of every op, labelled with the op's name."""
    from fastdiff.ops import OPS

    return tuple(
        dataclasses.replace(c, label=f"{op.name} {c.label}")
        for op in OPS
        if op.aot is not None
        for c in op.aot()
    )


# One of `all_configs` by its number, and an architecture: what a worker process is sent.
Job = tuple[int, int]


def jobs_of(configs: Iterable[int], architectures: Iterable[int] = ARCHITECTURES) -> list[Job]:
    """The jobs of these configurations, for the architectures each is meant for."""
    wanted, known = tuple(architectures), all_configs()
    return [(index, arch) for index in configs for arch in wanted if arch in known[index].archs]


def _compile_job(job: Job) -> Outcome:
    index, arch = job
    return compile_config(all_configs()[index], arch)


def compile_jobs(jobs: list[Job], processes: int = PROCESSES) -> Iterator[Outcome]:
    """The outcome of each job, in order, from as many processes."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(_compile_job, jobs, chunksize=4)
