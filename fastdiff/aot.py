"""`python -m fastdiff.aot`: compiles every Triton configuration for every GPU type, without a GPU.

Prints registers, spills, shared memory and tensor-core instructions as the compiler reports them.
Exits with 1 when a configuration spills registers to memory, does not compile, does not fit the
GPU, or lacks the tensor-core instruction it is expected to have. Needs Triton with its CUDA tools.
"""

from __future__ import annotations

import argparse
import re
import sys
import time

from fastdiff._compile import PROCESSES, all_configs, compile_jobs, jobs_of
from fastdiff.environment import interpreting
from fastdiff.hardware import ARCHITECTURES


def _widest() -> list[int]:
    """The first configuration, which has the widest tile, of each kernel and signature."""
    seen: set[tuple[object, ...]] = set()
    indices = []
    for index, config in enumerate(all_configs()):
        key = (id(config.kernel), *config.signature.values())
        if key not in seen:
            seen.add(key)
            indices.append(index)
    return indices


def _each(jobs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """One job of every configuration, and all of the widest.

    Configurations of one architecture each, the same but for that, count as one.
    """
    widest, configs = set(_widest()), all_configs()

    def name(index: int) -> str:
        return re.sub(r" sm_\d+$", "", configs[index].label)

    of_config: dict[str, list[int]] = {}
    for index, arch in jobs:
        of_config.setdefault(name(index), []).append(arch)
    return [
        (index, arch)
        for index, arch in jobs
        if index in widest
        or arch == (90 if 90 in of_config[name(index)] else max(of_config[name(index)]))
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastdiff.aot", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="the widest tile of each kernel, sm_80 and sm_90 only"
    )
    parser.add_argument(
        "--each",
        action="store_true",
        help="every configuration once, for sm_90 where it is used there, and the widest tile of "
        "each kernel for every architecture: a quarter of the time",
    )
    parser.add_argument("--op", action="append", help="of this op only; may be repeated")
    parser.add_argument(
        "--processes", type=int, default=PROCESSES, help="at once (default %(default)s)"
    )
    options = parser.parse_args(argv)
    if interpreting():
        parser.error("TRITON_INTERPRET must be unset: the interpreter compiles nothing")
    configs = all_configs()
    names = [config.label.split()[0] for config in configs]
    for name in options.op or ():
        if name not in names:
            parser.error(f"--op must be one of {', '.join(dict.fromkeys(names))}, got {name!r}")
    indices = _widest() if options.quick else list(range(len(configs)))
    indices = [index for index in indices if not options.op or names[index] in options.op]
    jobs = jobs_of(indices, (80, 90) if options.quick else ARCHITECTURES)
    if options.each:
        jobs = _each(jobs)
    bad = 0
    start = time.perf_counter()
    width = max(len(configs[index].label) for index in indices)
    print(f"{'configuration':<{width}}  arch   registers  spilled B  shared B  tensor cores")
    for outcome in compile_jobs(jobs, options.processes):
        bad += outcome.bad
        verdict = outcome.error or ("SPILLS" if outcome.bad else "")
        counts = " ".join(f"{name}:{count}" for name, count in outcome.tensor_cores)
        print(
            f"{outcome.label:<{width}}  sm_{outcome.arch:<4}{outcome.registers:>8}"
            f"{outcome.spill_bytes:>11}{outcome.shared_bytes:>10}  {counts}  {verdict}".rstrip(),
            flush=True,
        )
    print(f"{len(jobs)} compiled in {time.perf_counter() - start:.0f} s, {bad} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
