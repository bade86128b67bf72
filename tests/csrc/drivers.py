"""Building the programs that run kernels under valgrind and sanitizers."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
X86 = platform.machine() in ("x86_64", "AMD64")


def build(program: Path, isa: str, *sources: str, options: tuple[str, ...] = ()) -> str:
    """Compiles sources (paths in the repository) for an instruction set and links ``program``.

    What setup.py compiles with, but -O1, and symbols. Returns "" or what the compiler said.
    """
    spec = importlib.util.spec_from_file_location("fastdiff_check", ROOT / "csrc" / "check.py")
    assert spec is not None
    assert spec.loader is not None
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    setup = check.load_build()
    flags = [flag for flag in setup.BASE_FLAGS if flag != "-O3"]
    flags += {**setup.X86_VARIANTS, **setup.X86_BF16_VARIANTS}[isa]
    flags += ["-O1", "-g", f"-DFASTDIFF_ISA={isa}", *options]
    if X86:
        flags.append("-DFASTDIFF_X86_VARIANTS")

    def compiled(source: str) -> tuple[str, str]:
        # Some have the same name in two folders.
        target = program.with_name(source.replace("/", "_") + ".o")
        command = [*setup.find_compiler(), *flags, "-c", str(ROOT / source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        return str(target), done.stderr if done.returncode else ""

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(compiled, sources))
    errors = "".join(error for _, error in made)
    if errors:
        return errors
    objects = [target for target, _ in made]
    command = [*setup.find_compiler(), *flags, *objects, "-o", str(program), "-lpthread", "-ldl"]
    linked = subprocess.run(command, capture_output=True, text=True)
    return linked.stderr if linked.returncode else ""
