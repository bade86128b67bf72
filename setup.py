"""Build of the C++/CUDA extension ``fastdiff._C``.

Framework-free: needs a C++17 compiler, pybind11 and ninja, never PyTorch, never a GPU. One switch:

    FASTDIFF_EXT=auto   (default) CUDA kernels when nvcc is found, else CPU only; without a compiler
                        the install goes on and the Python and Triton paths serve
    FASTDIFF_EXT=off    no extension
    FASTDIFF_EXT=cpu    CPU only; a failure is an error
    FASTDIFF_EXT=cuda   CPU and CUDA; a failure is an error

nvcc is ``$CUDA_HOME/bin/nvcc``, else the one on PATH.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BASE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    # The solver step is bit-identical on every target, so products and sums must not be fused
    # behind its back; kernels that want FMA ask for it with intrinsics.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]
X86_VARIANTS = {
    "isa_base": [],
    "isa_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512": [
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        "-mprefer-vector-width=512",
    ],
}
# Attention is compiled for two more, whose dot products take bf16: GCC 11 or clang 12 know both.
_BF16 = [*X86_VARIANTS["isa_avx512"], "-mavx512bf16"]
X86_BF16_VARIANTS = {
    "isa_avx512bf16": _BF16,
    "isa_amx": [*_BF16, "-mamx-tile", "-mamx-bf16"],
}
BF16_SOURCES = ("attention",)
# What each toolkit does not know is left out; the newest one also goes in as PTX, for GPUs to come.
CUDA_ARCHITECTURES = (80, 86, 89, 90, 100)


class BuildUnavailable(Exception):
    """The extension cannot be built here; the text says what is missing."""


def find_compiler() -> list[str]:
    candidates = [os.environ["CXX"].split()] if os.environ.get("CXX") else []
    candidates += [[name] for name in ("c++", "g++", "clang++")]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    raise BuildUnavailable(
        "no C++ compiler found (tried $CXX, c++, g++, clang++): install g++ or clang"
    )


def knows_bf16(compiler: list[str]) -> bool:
    """Whether the compiler has the options of ``X86_BF16_VARIANTS``."""
    options = [flag for flags in X86_BF16_VARIANTS.values() for flag in flags]
    command = [*compiler, *dict.fromkeys(options), "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def variants_of(source: Path, with_bf16: bool) -> dict[str, list[str]]:
    """The instruction sets that a file of csrc/cpu is compiled for on x86, with their flags."""
    more = X86_BF16_VARIANTS if with_bf16 and source.stem in BF16_SOURCES else {}
    return {**X86_VARIANTS, **more}


def find_ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found:
            return found
        raise BuildUnavailable("ninja not found: pip install ninja") from None


def find_pybind11() -> str:
    try:
        import pybind11
    except ImportError:
        raise BuildUnavailable("pybind11 not found: pip install pybind11") from None
    return pybind11.get_include()


def find_nvcc() -> Path | None:
    if os.environ.get("CUDA_HOME"):
        nvcc = Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc"
        return nvcc if nvcc.exists() else None
    found = shutil.which("nvcc")
    return Path(found).resolve() if found else None


def cuda_targets(nvcc: Path) -> list[str]:
    listed = subprocess.run(
        [str(nvcc), "--list-gpu-code"], check=True, capture_output=True, text=True
    ).stdout.split()
    known = [arch for arch in CUDA_ARCHITECTURES if f"sm_{arch}" in listed]
    if not known:
        raise BuildUnavailable(f"{nvcc} supports none of sm_{CUDA_ARCHITECTURES}")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known]
    return [*flags, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]


def static_cudart(nvcc: Path) -> Path:
    home = nvcc.parent.parent
    for folder in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"):
        library = home / folder / "libcudart_static.a"
        if library.exists():
            return library
    raise BuildUnavailable(f"libcudart_static.a not found below {home}")


def quote(text: str | Path) -> str:
    """Escapes ninja's own characters."""
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(target: Path, nvcc: Path | None) -> str:
    """The build of ``target`` as ninja rules; absolute paths, objects beside the file."""
    command = find_compiler()
    compiler = " ".join(command)
    python_include = sysconfig.get_paths()["include"]
    includes = f'-I"{ROOT / "csrc"}" -isystem "{find_pybind11()}" -isystem "{python_include}"'
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    with_bf16 = is_x86 and knows_bf16(command)
    defines = ["-DFASTDIFF_X86_VARIANTS"] if is_x86 else []
    if with_bf16:
        defines.append("-DFASTDIFF_BF16_VARIANTS")
    if nvcc:
        defines.append("-DFASTDIFF_WITH_CUDA")
    flags = " ".join([*BASE_FLAGS, *defines])
    is_mac = sys.platform == "darwin"
    link = ["-shared", *(["-undefined", "dynamic_lookup"] if is_mac else ["-Wl,-s"])]
    libraries = ["-lpthread"] + ([] if is_mac else ["-ldl"])
    lines = [
        "ninja_required_version = 1.3",
        "rule cxx",
        f"  command = {compiler} {flags} $isa {includes} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = C++ $out",
        "rule link",
        f"  command = {compiler} {' '.join(link)} -o $out $in $libs",
        "  description = LINK $out",
    ]
    objects = []

    def compile_with(rule: str, source: Path, obj: str, isa: str = "") -> None:
        objects.append(obj)
        lines.append(f"build {obj}: {rule} {quote(source)}")
        if isa:
            lines.append(f"  isa = {isa}")

    for source in sorted((ROOT / "csrc").glob("*.cpp")):
        compile_with("cxx", source, f"{source.stem}.o")
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        variants = variants_of(source, with_bf16) if is_x86 else {"isa_base": []}
        for name, isa_flags in variants.items():
            isa = " ".join([f"-DFASTDIFF_ISA={name}", *isa_flags])
            compile_with("cxx", source, f"{source.stem}.{name}.o", isa)
    if nvcc:
        host = "-fPIC,-fvisibility=hidden"
        lines += [
            "rule nvcc",
            f'  command = "{nvcc}" -std=c++17 -O3 -Xcompiler {host} {" ".join(cuda_targets(nvcc))} '
            f'-DFASTDIFF_WITH_CUDA -I"{ROOT / "csrc"}" -MD -MF $out.d -c $in -o $out',
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = CUDA $out",
        ]
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            compile_with("nvcc", source, f"{source.stem}.cu.o")
        libraries = [f'"{static_cudart(nvcc)}"', "-lrt", *libraries]
    lines.append(f"build {quote(target)}: link {' '.join(objects)}")
    lines.append(f"  libs = {' '.join(libraries)}")
    return "\n".join([*lines, f"default {quote(target)}", ""])


class BuildExtension(build_ext):
    """Builds with ninja, or records why not, in ``fastdiff/_build_info.json``."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        info = self.attempt(target)
        self.record = target.parent / "_build_info.json"
        self.record.write_text(json.dumps(info, indent=1) + "\n")

    def copy_extensions_to_source(self) -> None:
        """In-place (editable) builds: the record goes along, an extension not built goes away."""
        for ext in self.extensions:
            built = Path(self.get_ext_fullpath_of_build(ext.name))
            destination = ROOT / "fastdiff" / built.name
            destination.unlink(missing_ok=True)
            if built.exists():
                shutil.copy2(built, destination)
            shutil.copy2(self.record, ROOT / "fastdiff" / self.record.name)

    def get_ext_fullpath_of_build(self, name: str) -> str:
        return str(Path(self.build_lib) / self.get_ext_filename(name))

    def attempt(self, target: Path) -> dict[str, str]:
        mode = os.environ.get("FASTDIFF_EXT", "auto").lower()
        if mode not in ("auto", "off", "cpu", "cuda"):
            raise SystemExit(f"FASTDIFF_EXT must be auto, off, cpu or cuda, got {mode!r}")
        # An extension of an earlier build must not pass for this one's.
        target.unlink(missing_ok=True)
        if mode == "off":
            return {"extension": "none", "reason": "built with FASTDIFF_EXT=off"}
        nvcc = None if mode == "cpu" else find_nvcc()
        if mode == "cuda" and nvcc is None:
            raise SystemExit(
                "FASTDIFF_EXT=cuda needs nvcc: set CUDA_HOME to the CUDA toolkit's folder"
            )
        reason = "" if nvcc or mode == "cpu" else "nvcc not found: set CUDA_HOME and install again"
        if mode == "cpu":
            reason = "built with FASTDIFF_EXT=cpu"
        for with_nvcc in [nvcc, None] if nvcc else [None]:
            try:
                self.run_ninja(target, with_nvcc)
                kind = "cuda" if with_nvcc else "cpu"
                print(f"fastdiff: built the {kind} extension {reason and f'({reason})'}")
                return {"extension": kind, "reason": reason}
            except (BuildUnavailable, subprocess.CalledProcessError) as error:
                if mode == "cuda" or (mode == "cpu" and with_nvcc is None):
                    raise SystemExit(f"fastdiff: FASTDIFF_EXT={mode}: {error}") from error
                reason = str(error)
                print(f"fastdiff: {'CUDA' if with_nvcc else 'extension'} left out: {reason}")
        return {"extension": "none", "reason": reason}

    def run_ninja(self, target: Path, nvcc: Path | None) -> None:
        tag = f"{sysconfig.get_config_var('SOABI') or 'abi'}-{'cuda' if nvcc else 'cpu'}"
        folder = Path(self.build_temp).resolve() / tag
        folder.mkdir(parents=True, exist_ok=True)
        rules = ninja_file(target, nvcc)
        path = folder / "build.ninja"
        if not path.exists() or path.read_text() != rules:
            path.write_text(rules)
        subprocess.run([find_ninja(), "-C", str(folder)], check=True)


def packages() -> list[str]:
    found = ["fastdiff", "fastdiff.kernels"]
    for init in sorted((ROOT / "fastdiff").rglob("__init__.py")):
        name = ".".join(init.parent.relative_to(ROOT).parts)
        if name not in found:
            found.append(name)
    return found


setup(
    packages=packages(),
    # The folder is top-level for people to find; a package of that name belongs to somebody else.
    package_dir={"fastdiff.kernels": "kernels"},
    package_data={
        "fastdiff": ["py.typed"],
        "fastdiff.models": ["data/*.safetensors"],
    },
    ext_modules=[Extension("fastdiff._C", sources=[])],
    cmdclass={"build_ext": BuildExtension},
)
