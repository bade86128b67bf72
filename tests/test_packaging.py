"""What the wheel holds, and what the build does where something is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def build_wheel(folder: Path, **environment: str) -> tuple[zipfile.ZipFile, str]:
    """Builds a wheel from a copy of the sources, with the build tools of this environment."""
    pytest.importorskip("pybind11")
    source = folder / "source"
    source.mkdir(parents=True)
    for name in ("csrc", "kernels", "fastdiff"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in (
        "pyproject.toml",
        "setup.py",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
    ):
        shutil.copy2(ROOT / name, source / name)
    env = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CXX", "FASTDIFF_EXT")}
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--no-index", "-w", str(folder / "dist"), str(source)],
        capture_output=True,
        text=True,
        env={**env, **environment},
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    return zipfile.ZipFile(wheel), done.stdout + done.stderr


def build_record(wheel: zipfile.ZipFile) -> dict[str, str]:
    return json.loads(wheel.read("fastdiff/_build_info.json"))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
def test_wheel_holds_fastdiff_only_with_extension_and_kernels(tmp_path):
    wheel, _ = build_wheel(tmp_path, FASTDIFF_EXT="cpu")
    names = wheel.namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fastdiff"}
    assert "fastdiff/kernels/__init__.py" in names
    assert "fastdiff/kernels/group_norm_silu.py" in names
    assert "fastdiff/models/data/digits.safetensors" in names
    assert [name for name in names if name.startswith("fastdiff/_C.") and name.endswith(".so")]
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h"))]
    assert build_record(wheel)["extension"] == "cpu"
    (library,) = [name for name in names if name.endswith(".so")]
    wheel.extract(library, tmp_path)
    needed = subprocess.run(
        ["readelf", "-d", str(tmp_path / library)], check=True, capture_output=True, text=True
    ).stdout
    needed_libraries = [line for line in needed.splitlines() if "NEEDED" in line]
    assert needed_libraries
    assert not [
        line for line in needed_libraries if any(n in line for n in ("torch", "c10", "omp", "cuda"))
    ]


def test_without_a_compiler_the_install_succeeds_and_says_what_is_missing(tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    wheel, log = build_wheel(tmp_path, PATH=str(empty))
    assert "no C++ compiler found" in log
    record = build_record(wheel)
    assert record["extension"] == "none"
    assert "no C++ compiler found" in record["reason"]
    assert not [name for name in wheel.namelist() if name.endswith(".so")]


def test_switched_off_extension_is_recorded(tmp_path):
    wheel, _ = build_wheel(tmp_path, FASTDIFF_EXT="off")
    assert build_record(wheel) == {"extension": "none", "reason": "built with FASTDIFF_EXT=off"}


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("fast", "FASTDIFF_EXT must be auto, off, cpu or cuda, got 'fast'"),
        ("cuda", "FASTDIFF_EXT=cuda needs nvcc"),
    ],
)
def test_bad_switch_is_refused(tmp_path, mode, message):
    env = {**os.environ, "FASTDIFF_EXT": mode, "CUDA_HOME": str(tmp_path)}
    command = [sys.executable, "setup.py", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode != 0
    assert message in done.stderr


def test_kernels_refuses_to_be_a_top_level_package():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "must be imported as fastdiff.kernels, got 'kernels'" in done.stderr


def test_every_environment_variable_is_in_the_table():
    """environment.VARIABLES is the one place that lists them."""
    import re

    from fastdiff.environment import VARIABLES

    listed = {variable.name for variable in VARIABLES}
    pattern = re.compile(r"(?:getenv\(|environ(?:\.get\(|\[))\s*[\"']([A-Z][A-Z0-9_]+)[\"']")
    used: set[str] = set()
    for folder in ("fastdiff", "kernels", "csrc"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".cu"):
                used |= set(pattern.findall(path.read_text()))
    used |= set(pattern.findall((ROOT / "setup.py").read_text())) - {"CXX"}
    assert used <= listed, used - listed
    assert len(listed) <= 8


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_modules_have_names_of_their_own(folder: str):
    """pytest imports them by their bare names: of two that are called alike, one is not run."""
    scripts = {"conftest.py", "diffusers_suite.py"}  # never imported by name
    names = [path.name for path in (ROOT / folder).rglob("*.py") if path.name not in scripts]
    assert sorted(names) == sorted(set(names))
