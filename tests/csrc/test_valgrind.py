"""Every CPU kernel on small shapes under valgrind: no access outside of a tensor, nothing used
before it was written, no memory lost; at the levels whose instructions valgrind knows."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from drivers import ROOT, X86, build

from fastdiff._ext import ext, require_ext

SOURCES = (
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*.cpp")),
    *(f"csrc/{name}.cpp" for name in ("digest", "dispatch", "parallel", "workspace")),
    "tests/csrc/kernels_driver.cpp",
)


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("valgrind"), reason="no valgrind")
@pytest.mark.parametrize("isa", ["isa_base", "isa_avx2"])
def test_kernels_under_valgrind(isa: str, tmp_path: Path) -> None:
    if isa == "isa_avx2" and not (X86 and ext() is not None and require_ext().isa_level() >= 1):
        pytest.skip("needs a processor with AVX2")
    program = tmp_path / "kernels"
    assert build(program, isa, *SOURCES) == ""
    command = ["valgrind", "-q", "--error-exitcode=9", "--leak-check=full", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1230 cases, 0 wrong" in done.stdout
