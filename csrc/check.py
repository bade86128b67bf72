"""Checks of the native code that need no GPU: ``make check-native``.

1. Every csrc/cuda/*.cu compiles with nvcc for every target, without register spills and without
   stack frames (ptxas's own report).
2. No object of csrc/cpu/ compiled for AVX2 or AVX-512 exports a symbol outside its own namespace:
   the linker could pick that copy for every CPU, and an older one would stop at an illegal
   instruction.

Needs nvcc ($CUDA_HOME/bin/nvcc or on PATH), a C++ compiler and nm. Exit code 1 on a violation, 2
when a tool is missing.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent


def load_build() -> ModuleType:
    """setup.py as a module (its flags and finders), without running setup()."""
    spec = importlib.util.spec_from_file_location("fastdiff_build", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch("setuptools.setup"):
        spec.loader.exec_module(module)
    return module


def cuda_report(nvcc: Path, source: Path, arch: int, folder: Path) -> tuple[list[str], list[str]]:
    """Compiles one source for one target. Returns (report rows, violations)."""
    command = [
        *(str(nvcc), "-std=c++17", "-O3", "-DFASTDIFF_WITH_CUDA", f"-I{ROOT / 'csrc'}"),
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v", "-Xcompiler", "-fPIC"),
        *("-c", str(source), "-o", str(folder / f"{source.stem}.{arch}.o")),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    label = f"{source.name} sm_{arch}"
    if done.returncode:
        return [], [f"{label}: nvcc failed\n{done.stderr}"]
    stats = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*?Used (\d+) registers",
        done.stderr,
    )
    if not stats:
        if "__global__" not in source.read_text():
            return [f"{label:32} no kernels"], []
        return [], [f"{label}: ptxas reported no kernel"]
    bad = [row for row in stats if any(int(value) for value in row[:3])]
    registers = sorted(int(row[3]) for row in stats)
    spread = f"{registers[0]}-{registers[-1]} registers"
    rows = [f"{label:32} {len(stats):3} kernels, {spread}, {len(bad)} spill"]
    return rows, [f"{label}: stack, spill stores, spill loads, registers = {row}" for row in bad]


def check_cuda(build: ModuleType) -> tuple[list[str], list[str]]:
    nvcc = build.find_nvcc()
    if nvcc is None:
        print("nvcc not found: set CUDA_HOME to the CUDA toolkit's folder", file=sys.stderr)
        raise SystemExit(2)
    targets = build.cuda_targets(nvcc)
    architectures = [
        arch for arch in build.CUDA_ARCHITECTURES if any(f"sm_{arch}" in t for t in targets)
    ]
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(cuda_report, nvcc, source, arch, Path(folder))
            for source in sources
            for arch in architectures
        ]
        results = [job.result() for job in jobs]
    violations = [text for _, bad in results for text in bad]
    if not jobs:
        violations.append("csrc/cuda holds no source")
    missing = [arch for arch in build.CUDA_ARCHITECTURES if arch not in architectures]
    if missing:
        print(f"note: {nvcc} does not know sm_{missing}")
    return [row for rows, _ in results for row in rows], violations


def foreign_symbols(
    compiler: list[str], flags: list[str], source: Path, isa: str, folder: Path
) -> list[str]:
    """Symbols the object defines for others to use that do not carry its namespace."""
    target = folder / f"{source.stem}.{isa}.o"
    command = [
        *compiler,
        *flags,
        f"-DFASTDIFF_ISA={isa}",
        f"-I{ROOT / 'csrc'}",
        "-c",
        str(source),
        "-o",
        str(target),
    ]
    subprocess.run(command, check=True)
    listed = subprocess.run(
        ["nm", "--defined-only", "--extern-only", str(target)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    names = [line.split()[-1] for line in listed.splitlines() if line]
    return [f"{source.name} {isa}: exports {name}" for name in names if isa not in name]


def check_isa(build: ModuleType) -> list[str]:
    compiler = build.find_compiler()
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    base = [*build.BASE_FLAGS, "-DFASTDIFF_X86_VARIANTS"]
    with_bf16 = build.knows_bf16(compiler)
    if not with_bf16:
        print(f"note: {compiler[0]} does not know {' and '.join(build.X86_BF16_VARIANTS)}")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(foreign_symbols, compiler, [*base, *flags], source, isa, Path(folder))
            for source in sources
            for isa, flags in build.variants_of(source, with_bf16).items()
            if isa != "isa_base"
        ]
        return [text for job in jobs for text in job.result()]


def main() -> int:
    build = load_build()
    rows, violations = check_cuda(build)
    print("\n".join(rows))
    violations += check_isa(build)
    for text in violations:
        print(f"VIOLATION {text}", file=sys.stderr)
    print(f"{len(rows)} compilations, {len(violations)} violations")
    return 1 if violations else 0


if __name__ == "__main__":
    raise SystemExit(main())
