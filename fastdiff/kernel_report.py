"""`python -m fastdiff.kernel_report`: writes docs/kernels.md, what is known of every Triton kernel.

Two kinds of facts, neither of which needs a GPU: what the compiler made of every launch
configuration for every architecture, and what the bytes and FLOPs of every example cost at the
published peaks of some GPUs. Exits with 1, and writes nothing, when a configuration is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from fastdiff._compile import PROCESSES, Outcome, all_configs, compile_jobs, jobs_of
from fastdiff.environment import interpreting
from fastdiff.hardware import ARCHITECTURES, GPUS, MULTIPROCESSORS, roofline
from fastdiff.ops import OPS, Op
from fastdiff.ops._contract import Example

DEFAULT_PATH = Path("docs/kernels.md")
DTYPES = (torch.bfloat16, torch.float32)
# By SASS's first letter, without UTC; H is fp16, bf16 or tf32 and goes by the tensors.
_RATE_OF_INSTRUCTION = {"I": "int8", "Q": "fp8"}
_LIMIT_LETTER = {
    "registers": "r",
    "shared memory": "s",
    "tensor memory": "m",
    "threads": "t",
    "blocks": "b",
}

Row = Sequence[str]


def _table(header: Row, rows: Sequence[Row]) -> str:
    """Markdown: the first column to the left, the others to the right."""
    marks = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, marks, *rows))


def _ops() -> list[Op]:
    return [op for op in OPS if op.aot is not None]


def rate_of(op: Op, dtype: torch.dtype) -> str:
    """Which of a GPU's rates bounds the op: the CUDA cores', unless its kernels declare more."""
    declared = {
        name.removeprefix("UTC")
        for config in all_configs()
        if config.label.split()[0] == op.name
        for name in config.tensor_cores.values()
    }
    if not declared:
        return "float32"
    letters = {name[0] for name in declared}
    if len(letters) == 1 and (rate := _RATE_OF_INSTRUCTION.get(min(letters))):
        return rate
    return "tf32" if dtype == torch.float32 else "half"


def work(op: Op, example: Example, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes, FLOPs) of an example, from the op's contract; its tensors are not made."""
    try:
        with FakeTensorMode():
            call = example.make("cpu", dtype)
            return op.bytes_moved(*call.args, **call.kwargs), op.flops(*call.args, **call.kwargs)
    except (DataDependentOutputException, DynamicOutputShapeException):
        call = example.make("cpu", dtype)
        return op.bytes_moved(*call.args, **call.kwargs), op.flops(*call.args, **call.kwargs)


def gpu_section() -> str:
    """The published peaks, and the limits of a multiprocessor."""
    names = ("float32", "tf32", "half", "int8", "fp8")
    peaks = [
        (
            gpu.name,
            f"sm_{gpu.arch}",
            f"{gpu.bandwidth / 1e12:.3f}",
            *(f"{gpu.rates[name] / 1e12:g}" if name in gpu.rates else "none" for name in names),
            gpu.source,
        )
        for gpu in GPUS
    ]
    limits = [
        (
            f"sm_{arch}",
            *(f"{value:,}" for value in (sm.registers, sm.threads, sm.blocks, sm.shared_bytes)),
            f"{sm.shared_bytes_per_block:,}",
            f"{sm.tensor_columns or 'none'}",
        )
        for arch, sm in MULTIPROCESSORS.items()
    ]
    header = ("GPU", "arch", "TB/s", "fp32", "tf32", "fp16/bf16", "int8", "fp8", "source")
    of_sm = (
        "arch",
        "registers",
        "threads",
        "blocks",
        "shared B",
        "shared B a block",
        "TMEM columns",
    )
    return (
        "## Published peaks\n\n"
        "Published limits, not measured: dense TFLOP/s (TOP/s for int8) and memory bandwidth at "
        "boost clock.\nfp32 is the CUDA cores' rate, the others are the tensor cores'.\n\n"
        f"{_table(header, peaks)}\n\n"
        "Per multiprocessor, from the CUDA Programming Guide (compute capabilities) and the PTX\n"
        "ISA "
        "(tensor memory); the last of the bytes is what one block may have:\n\n"
        f"{_table(of_sm, limits)}\n"
    )


def roofline_section() -> str:
    """Bytes, FLOPs, intensity and the least time on each GPU, for every example of every op."""
    parts = [
        "## Roofline\n\n"
        "Published limits, not measured: the larger of bytes over bandwidth and FLOPs over the "
        "peak rate,\nin microseconds; (c) where FLOPs decide. Bytes and FLOPs are the contract's: "
        "every input read once,\nevery output written once. An op that uses no tensor cores is "
        "held to the fp32 rate.\n"
    ]
    header = ("example", "dtype", "rate", "MB", "MFLOP", "FLOP/B", *(gpu.name for gpu in GPUS))
    for op in _ops():
        rows = []
        for example in op.examples:
            for dtype in DTYPES:
                moved, flops = work(op, example, dtype)
                rate = rate_of(op, dtype)
                cells = []
                for gpu in GPUS:
                    least = roofline(gpu, moved, flops, rate)
                    mark = " (c)" if least.bound == "compute" else ""
                    cells.append(f"{least.seconds * 1e6:.3g}{mark}" if least.seconds else "none")
                rows.append(
                    (
                        example.name,
                        str(dtype).removeprefix("torch."),
                        rate,
                        f"{moved / 1e6:.2f}",
                        f"{flops / 1e6:.2f}",
                        f"{flops / moved:.2f}",
                        *cells,
                    )
                )
        parts.append(f"### {op.name}: roofline\n\n{_table(header, rows)}\n")
    return "\n".join(parts)


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    fits = outcome.occupancy
    spilled = f" !{outcome.spill_bytes}" if outcome.spill_bytes else ""
    return (
        f"{outcome.registers}{spilled} · {outcome.shared_bytes} · "
        f"{fits.blocks}{_LIMIT_LETTER[fits.limit]}"
    )


def _tensor_cores(outcomes: Sequence[Outcome]) -> str:
    cells = [
        f"{outcome.arch}: " + ", ".join(f"{name} {count}" for name, count in outcome.tensor_cores)
        for outcome in outcomes
        if outcome.tensor_cores
    ]
    return "; ".join(cells) or "none"


def summary_section(outcomes: Sequence[Outcome]) -> str:
    """One line per op."""
    rows = []
    for op in _ops():
        mine = [outcome for outcome in outcomes if outcome.label.split()[0] == op.name]
        names = sorted({name for outcome in mine for name, _ in outcome.tensor_cores})
        rows.append(
            (
                f"`{op.name}`",
                str(len({outcome.label for outcome in mine})),
                str(len(mine)),
                str(max(outcome.registers for outcome in mine)),
                str(max(outcome.spill_bytes for outcome in mine)),
                f"{max(outcome.shared_bytes for outcome in mine):,}",
                f"{min(o.occupancy.blocks * o.threads // 32 for o in mine)}",
                ", ".join(names) or "none",
            )
        )
    header = (
        "op", "configurations", "compiled", "most registers", "most spilled B", "most shared B",
        "fewest warps a multiprocessor", "tensor cores",
    )  # fmt: skip
    return f"## Ops\n\n{_table(header, rows)}\n"


def configurations_section(outcomes: Sequence[Outcome]) -> str:
    """One line per configuration, a column per architecture."""
    letters = ", ".join(f"{letter} {name}" for name, letter in _LIMIT_LETTER.items())
    parts = [
        "## Configurations\n\n"
        "registers a thread (!n: n bytes spilled) · bytes of shared memory a block · blocks that "
        "fit one\nmultiprocessor, an estimate from its limits, and the limit that decides: "
        f"{letters}.\nTensor-core instructions are counted in SASS.\n"
    ]
    header = ("configuration", "threads", *(f"sm_{arch}" for arch in ARCHITECTURES), "tensor cores")
    for op in _ops():
        by_label: dict[str, dict[int, Outcome]] = {}
        for outcome in outcomes:
            name, label = outcome.label.split(maxsplit=1)
            if name == op.name:
                by_label.setdefault(label, {})[outcome.arch] = outcome
        rows = [
            (
                label,
                "/".join(str(n) for n in sorted({o.threads for o in by_arch.values()})),
                *(_cell(by_arch.get(arch)) for arch in ARCHITECTURES),
                _tensor_cores(list(by_arch.values())),
            )
            for label, by_arch in by_label.items()
        ]
        parts.append(
            f"### {op.name}: {len(rows)} configurations\n\n"
            f"<details><summary>every launch</summary>\n\n{_table(header, rows)}\n\n</details>\n"
        )
    return "\n".join(parts)


def document(outcomes: Sequence[Outcome], versions: str) -> str:
    """The whole file."""
    head = (
        "# Kernels\n\n"
        "Written by `python -m fastdiff.kernel_report`; a test compares it with the code. Nothing "
        "here was measured\non a GPU: the first and the last part are what the compiler reports "
        f"({versions}), the others follow from\npublished figures.\n"
    )
    parts = (
        head,
        summary_section(outcomes),
        gpu_section(),
        roofline_section(),
        configurations_section(outcomes),
    )
    return "\n".join(parts)


def undeclared(outcomes: Sequence[Outcome]) -> list[str]:
    """Ops whose code has tensor-core instructions that no configuration of theirs declares."""
    declared = {config.label.split()[0] for config in all_configs() if config.tensor_cores}
    using = {outcome.label.split()[0] for outcome in outcomes if outcome.tensor_cores}
    return sorted(using - declared)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastdiff.kernel_report", description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_PATH, help="default %(default)s")
    parser.add_argument(
        "--processes", type=int, default=PROCESSES, help="at once (default %(default)s)"
    )
    options = parser.parse_args(argv)
    if interpreting():
        parser.error("TRITON_INTERPRET must be unset: the interpreter compiles nothing")
    if not options.out.parent.is_dir():
        parser.error(f"--out must be in a folder that exists, got {options.out}")
    import triton
    from tqdm import tqdm

    jobs = jobs_of(range(len(all_configs())))
    bar = tqdm(compile_jobs(jobs, options.processes), total=len(jobs), unit="kernel")
    outcomes = list(bar)
    refused = [
        f"{outcome.label}, sm_{outcome.arch}: {outcome.error or 'spills'}"
        for outcome in outcomes
        if outcome.bad
    ] + [f"{name}: AotConfig must declare its tensor_cores" for name in undeclared(outcomes)]
    for line in refused:
        print(line, file=sys.stderr)
    if refused:
        return 1
    options.out.write_text(document(outcomes, f"Triton {triton.__version__}"), encoding="utf-8")
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
