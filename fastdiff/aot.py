"""`python -m fastdiff.aot`: compiles every Triton configuration for every GPU type, without a GPU.

Prints registers, spills and shared memory as the compiler reports them, and exits with 1 when a
configuration spills registers to memory, needs more shared memory than a program can have, lacks an
instruction that it must hold (tensor cores) or does not compile. Needs Triton with its bundled
ptxas, cuobjdump and nvdisasm.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fastdiff.ops._contract import AotConfig

ARCHITECTURES = (80, 89, 90, 100)
PROCESSES = 2
# Bytes of shared memory that one program can have (CUDA C++ Programming Guide, table of compute
# capabilities).
MAX_SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}


@dataclass(frozen=True)
class Outcome:
    """What the compiler says about one configuration. error is "" unless it failed to compile."""

    label: str
    arch: int
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    error: str = ""

    @property
    def bad(self) -> bool:
        return bool(self.verdict)

    @property
    def verdict(self) -> str:
        """ "" or what is wrong."""
        if self.error or self.spill_bytes:
            return self.error or "SPILLS"
        most = MAX_SHARED[self.arch]
        return "" if self.shared_bytes <= most else f"SHARED MEMORY above {most}"


def _inspect(cubin: bytes, tool: str, option: str) -> str:
    """What a tool of Triton's wheel prints about compiled code."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(path), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def opcodes(cubin: bytes) -> set[str]:
    """The opcodes of the compiled code without their modifiers: "HGMMA", "LDG", ..."""
    text = _inspect(cubin, "nvdisasm", "--print-code")
    return set(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", text, re.M))


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory per thread) from the compiled code.

    Local memory holds spilled registers and arrays indexed at run time; the kernels have no such
    arrays, so any of it is a spill.
    """
    text = _inspect(cubin, "cuobjdump", "--dump-resource-usage")
    registers = re.search(r"REG:(\d+)", text)
    stack, local = re.search(r"STACK:(\d+)", text), re.search(r"LOCAL:(\d+)", text)
    if not (registers and stack and local):
        raise RuntimeError(f"cuobjdump reported no resource usage: {text!r}")
    return int(registers[1]), int(stack[1]) + int(local[1])


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
        cubin = compiled.asm["cubin"]
        registers, spill = _resource_usage(cubin)
        if config.instruction and config.instruction not in opcodes(cubin):
            raise RuntimeError(f"the compiled code must hold {config.instruction}, it does not")
    except Exception as error:  # reported, whatever it is
        message = f"{type(error).__name__}: {error}"
        return Outcome(config.label, arch, error=message)
    return Outcome(config.label, arch, registers, spill, compiled.metadata.shared)


def all_configs() -> list[AotConfig]:
    """Every configuration of every op, labelled with the op's name."""
    from fastdiff.ops import OPS

    return [
        dataclasses.replace(c, label=f"{op.name} {c.label}")
        for op in OPS
        if op.aot is not None
        for c in op.aot()
    ]


def _compile_at(job: tuple[int, int]) -> Outcome:
    index, arch = job
    return compile_config(all_configs()[index], arch)


def main(argv: list[str] | None = None) -> int:
    from fastdiff.ops import OPS

    parser = argparse.ArgumentParser(prog="python -m fastdiff.aot", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="the widest tile of each kernel, sm_80 and sm_90 only"
    )
    names = [op.name for op in OPS if op.aot is not None]
    parser.add_argument("--op", choices=names, help="this op only")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET must be unset: the interpreter compiles nothing")
    configs = all_configs()
    indices = [
        index
        for index, config in enumerate(configs)
        if options.op is None or config.label.startswith(f"{options.op} ")
    ]
    architectures: tuple[int, ...] = ARCHITECTURES
    if options.quick:
        architectures = (80, 90)
        seen: set[tuple[object, ...]] = set()
        every, indices = indices, []
        for index in every:
            config = configs[index]
            key = (id(config.kernel), *config.signature.values(), *config.architectures)
            if key not in seen:
                seen.add(key)
                indices.append(index)
    jobs = [
        (index, arch)
        for index in indices
        for arch in architectures
        if arch in (configs[index].architectures or ARCHITECTURES)
    ]
    bad = 0
    width = max(len(config.label) for config in configs)
    print(f"{'configuration':<{width}}  arch   registers  spilled B  shared B")
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        for outcome in pool.imap(_compile_at, jobs, chunksize=4):
            bad += outcome.bad
            print(
                f"{outcome.label:<{width}}  sm_{outcome.arch:<4}{outcome.registers:>8}"
                f"{outcome.spill_bytes:>11}{outcome.shared_bytes:>10}  {outcome.verdict}".rstrip(),
                flush=True,
            )
    print(f"{len(jobs)} compiled, {bad} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
