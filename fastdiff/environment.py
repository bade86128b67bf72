"""Where fastdiff runs: the one table of environment variables, and ``fastdiff doctor``.

Nothing else in the package reads the environment, except the C++ side for the variable marked so.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class Variable:
    """One environment variable: its default, who reads it and what it does."""

    name: str
    default: str
    read_by: str
    meaning: str


VARIABLES = (
    Variable(
        "FASTDIFF_EXT",
        "auto",
        "setup.py",
        "what the install builds: auto, off, cpu or cuda",
    ),
    Variable(
        "CUDA_HOME",
        "",
        "setup.py",
        "the CUDA toolkit whose nvcc builds the CUDA kernels; else nvcc on PATH",
    ),
    Variable(
        "FASTDIFF_ISA_MAX",
        "3",
        "the C++ kernels, once",
        "highest CPU instruction set used: 0 portable, 1 AVX2, 2 AVX-512, 3 AVX512_BF16, "
        "4 AMX (only emulated so far)",
    ),
    Variable(
        "ONEDNN_MAX_CPU_ISA",
        "ALL",
        "oneDNN, once; fastdiff.compile",
        "oneDNN's own limit; below AVX512_CORE_BF16, bf16 is not chosen and nothing is packed",
    ),
    Variable(
        "TRITON_INTERPRET",
        "0",
        "Triton",
        "1 runs the Triton kernels on CPU tensors, slowly, for tests",
    ),
    Variable(
        "FASTDIFF_CACHE",
        "",
        "fastdiff, once",
        "folder of tuned launches and captured graphs; else fastdiff in XDG_CACHE_HOME",
    ),
    Variable(
        "XDG_CACHE_HOME",
        "~/.cache",
        "fastdiff, once",
        "the user's cache folder, where FASTDIFF_CACHE is not set",
    ),
)


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def cache_folder() -> Path:
    """Where fastdiff keeps what it can make again: FASTDIFF_CACHE, else the user's cache folder.

    It may not exist. A relative XDG_CACHE_HOME is not used, as its specification says.
    FileNotFoundError when neither is set and the user has no home.
    """
    own = os.environ.get("FASTDIFF_CACHE", "")
    if own:
        return Path(own).expanduser()
    user = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not user.is_absolute():
        try:
            user = Path.home() / ".cache"
        except RuntimeError as error:
            raise FileNotFoundError(
                "FASTDIFF_CACHE must name a folder: there is no home"
            ) from error
    return user / "fastdiff"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report. ``remedy`` is empty when there is nothing to do."""

    name: str
    status: str  # "ok", "missing" or "broken"
    detail: str
    remedy: str = ""


SUPPORTED = {"torch": ("2.11", "2.16"), "triton": ("3.6", "3.10")}


def _version_tuple(text: str) -> tuple[int, ...]:
    numbers = []
    for part in text.split("+")[0].split(".")[:2]:
        digits = "".join(ch for ch in part if ch.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)


def _package(name: str, required: bool) -> Finding:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        if required:
            return Finding(name, "missing", "not installed", f"pip install {name}")
        return Finding(name, "ok", "not installed (optional)")
    low, high = SUPPORTED.get(name, ("0", "999"))
    if not _version_tuple(low) <= _version_tuple(version) < _version_tuple(high):
        remedy = f"pip install '{name}>={low},<{high}'"
        return Finding(
            name, "broken", f"{version} is not among the tested {low} <= v < {high}", remedy
        )
    if name == "torch":  # it says itself which build it is ("+cpu", "+cu130"), its metadata may not
        import torch

        version = str(torch.__version__)
    return Finding(name, "ok", version)


def _gpu() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        build = torch.version.cuda
        if build is None:
            return [
                Finding(
                    "GPU",
                    "missing",
                    "this PyTorch is a CPU build",
                    "on a machine with an NVIDIA GPU, install a CUDA build of PyTorch",
                )
            ]
        return [
            Finding(
                "GPU",
                "missing",
                f"PyTorch is built for CUDA {build} but sees no GPU",
                "check `nvidia-smi` and the driver's version",
            )
        ]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        arch = properties.major * 10 + properties.minor
        detail = (
            f"{properties.name}, sm_{arch}, {properties.total_memory / 2**30:.0f} GiB, "
            f"CUDA {torch.version.cuda}"
        )
        if arch < 80:
            found.append(
                Finding(
                    f"GPU {index}", "broken", detail, "the kernels need sm_80 (Ampere) or newer"
                )
            )
        else:
            found.append(Finding(f"GPU {index}", "ok", detail))
    return found


def _extension() -> Finding:
    import torch

    from fastdiff._ext import build_info, ext, ext_status

    module = ext()
    if module is None:
        remedy = "install a C++17 compiler (g++ or clang), then reinstall fastdiff"
        return Finding("C++ extension", "missing", ext_status(), remedy)
    kind = "C++ and CUDA" if module.with_cuda else "C++"
    detail = f"{kind}, {module.isa_name()}, threads from {module.parallel_backend()}"
    if torch.cuda.is_available() and not module.with_cuda:
        reason = build_info().get("reason", "")
        return Finding(
            "C++ extension",
            "missing",
            f"{detail}; no CUDA kernels: {reason}",
            "set CUDA_HOME to the toolkit's folder and reinstall fastdiff; "
            "Triton kernels serve meanwhile",
        )
    return Finding("C++ extension", "ok", detail)


def _operators() -> list[Finding]:
    """Runs every op's first example on the CPU, and on the GPU when there is one."""
    import torch

    from fastdiff import ops

    found = []
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for op in ops.OPS:
        for device in devices:
            for name, outcome in op.self_check(device).items():
                ok = outcome.startswith("ok")
                unusable = outcome.startswith("not usable")
                found.append(
                    Finding(
                        f"op {op.name} [{name}, {device}]",
                        "ok" if ok else "missing" if unusable else "broken",
                        outcome,
                        ""
                        if ok or unusable
                        else "please report this with the whole of this output",
                    )
                )
    return found


def diagnose() -> list[Finding]:
    """Everything `fastdiff doctor` reports, in order; never raises for a broken part."""
    sections: list[Callable[[], Finding | list[Finding]]] = [
        lambda: Finding(
            "fastdiff", "ok", f"{metadata.version('fastdiff')} at {Path(__file__).parent}"
        ),
        lambda: Finding("python", "ok", f"{sys.version.split()[0]} on {platform.platform()}"),
        lambda: _package("torch", required=True),
        lambda: _package("triton", required=False),
        lambda: [_package(name, required=False) for name in ("diffusers", "transformers")],
        _gpu,
        _extension,
        _operators,
    ]
    findings: list[Finding] = []
    for section in sections:
        try:
            result = section()
        except Exception as error:
            result = Finding(
                "doctor", "broken", f"{type(error).__name__}: {error}", "please report this"
            )
        findings += result if isinstance(result, list) else [result]
    return findings


def run_doctor(_args: argparse.Namespace) -> int:
    """Prints the report; 0 when nothing is broken, 1 otherwise."""
    findings = diagnose()
    marks = {"ok": "ok     ", "missing": "missing", "broken": "BROKEN "}
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{marks[finding.status]}  {finding.name:<{width}}  {finding.detail}")
        if finding.remedy:
            print(f"{'':9}{'':<{width}}  -> {finding.remedy}")
    print("\nenvironment variables")
    for variable in VARIABLES:
        value = os.environ.get(variable.name)
        shown = f"{value!r}" if value is not None else f"unset (default {variable.default!r})"
        print(f"  {variable.name} = {shown}: {variable.meaning}; read by {variable.read_by}")
    return 1 if any(finding.status == "broken" for finding in findings) else 0


def add_doctor_command(subparsers: argparse._SubParsersAction) -> None:
    """Adds ``fastdiff doctor`` to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="versions, GPU, which kernels are usable, and what to do about each that is not",
        description="Checks the installation and runs every operator once. Exit code 1 when "
        "something is broken; a part that is merely absent (no GPU, no compiler) is not.",
    )
    parser.set_defaults(run=run_doctor)
