"""`python -m fastdiff.tune`: measures launch configurations on this GPU and keeps the best.

    python -m fastdiff.tune                                        every op's examples, bfloat16
    python -m fastdiff.tune --op group_norm_silu --shape 2,320,96,96 --dtype float16
    python -m fastdiff.tune --op group_norm_silu --shape 2,320,96,96 --set channels_last=True

Candidates take turns with a cold L2 and are compared by their medians, after the result of each was
compared with float64. What `select` gives is the first candidate, and stays unless another is
faster by more than the noise. The table is described in fastdiff/tuning.py. Exit codes: 0 done, 1
no GPU or something failed, 2 a wrong argument.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff import tuning
from fastdiff._timing import Function, Timing, interleaved
from fastdiff.ops import OPS, Op
from fastdiff.ops._contract import Call, Example, outputs
from fastdiff.testing import assert_within_2x

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# A choice has to be this much faster than `select`'s, and by more than both spreads, to replace it.
LEAST_GAIN = 0.02

# Seconds of each function, called in turns.
Timer = Callable[[Mapping[str, Function]], Mapping[str, Timing]]


@dataclass(frozen=True)
class Verdict:
    """What the measurement of one case says. us: of the best; rejected: choice -> why."""

    best: tuning.Choice
    us: float
    default_us: float
    measured: int
    rejected: dict[str, str]

    def entry(self) -> dict[str, Any]:
        """As the table holds it."""
        return {
            "choice": self.best,
            "us": round(self.us, 3),
            "default_us": round(self.default_us, 3),
            "candidates": self.measured,
        }


def pick(timings: Mapping[str, Timing], default: str) -> str:
    """The fastest, unless its gain over the default is within the noise."""
    best = min(timings, key=lambda name: timings[name].median)
    mine, theirs = timings[best], timings[default]
    gain = 1 - mine.median / theirs.median
    return best if gain > max(LEAST_GAIN, mine.spread + theirs.spread) else default


def measure(
    op: Op, call: Call, timer: Timer, note: Callable[[str], object] = lambda text: None
) -> Verdict:
    """Checks every candidate of a call, times those that are right and picks one.

    note is told what is going on. RuntimeError when `select`'s own launch fails: then nothing can
    be said.
    """
    assert op.tuning is not None
    choices = {str(c): c for c, _ in op.tuning.candidates(*call.args, **call.kwargs)}
    default = next(iter(choices))
    exact = call.double()
    oracle = outputs(op.reference(*exact.args, **exact.kwargs))
    torch_result = outputs(op.reference(*call.args, **call.kwargs))

    def function(choice: tuning.Choice) -> Callable[[], Any]:
        def run() -> Any:
            with tuning.forced(op.name, choice):
                return op(*call.args, **call.kwargs, impl="triton")

        return run

    functions, rejected = {}, {}
    for number, (name, choice) in enumerate(choices.items(), 1):
        note(f"checking {number}/{len(choices)}")
        run = function(choice)
        try:
            for mine, right, theirs in zip(outputs(run()), oracle, torch_result, strict=True):
                assert_within_2x(mine, right, theirs)
            functions[name] = run
        except Exception as error:  # whatever it is, this candidate is not used
            rejected[name] = f"{type(error).__name__}: {error}"
    if default not in functions:
        raise RuntimeError(rejected[default])
    note(f"timing {len(functions)}")
    timings = timer(functions)
    best = pick(timings, default)
    return Verdict(
        choices[best],
        timings[best].median * 1e6,
        timings[default].median * 1e6,
        len(functions),
        rejected,
    )


def run_cases(
    cases: Sequence[tuple[Op, Example]],
    device: torch.device,
    dtype: torch.dtype,
    timer: Timer,
    progress: bool = True,
) -> int:
    """Measures and saves each case, and prints a line for it; how many failed."""
    from tqdm import tqdm

    failed = 0
    with tqdm(cases, disable=not progress, unit="shape", leave=False) as bar:
        for op, example in bar:
            title = f"{op.name}, {example.name}"
            assert op.tuning is not None
            try:
                call = _call(op, example, device, dtype)
                verdict = measure(op, call, timer, bar.set_postfix_str)
                # At once: an interrupted run keeps what it has measured.
                key = op.tuning.key(*call.args, **call.kwargs).text()
                tuning.save(op.name, {key: verdict.entry()})
            except (RuntimeError, ValueError, TypeError, OSError) as error:
                failed += 1
                bar.write(f"{title}: FAILED: {_first_line(str(error))}")
                continue
            gain = verdict.default_us / verdict.us
            bar.write(
                f"{title}: {verdict.best}, {verdict.us:.1f} us "
                f"({gain:.2f} x the default's speed, {verdict.measured} candidates)"
            )
            for name, reason in verdict.rejected.items():
                bar.write(f"  not used: {name}: {_first_line(reason)}")
    return failed


def _call(op: Op, example: Example, device: torch.device, dtype: torch.dtype) -> Call:
    call = example.make(device, dtype)
    op.check(*call.args, **call.kwargs)
    if reason := op.why_not("triton", *call.args, **call.kwargs):
        raise ValueError(f"the Triton kernel cannot run: {reason}")
    return call


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"must be sizes such as 2,320,64,64, got {text!r}")
    return shape


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"must be name=value, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastdiff.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [op.name for op in OPS if op.tuning is not None]
    parser.add_argument("--op", choices=names, help="this op only")
    parser.add_argument(
        "--shape", type=_shape, action="append", help="not the examples; needs --op"
    )
    parser.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the op's shapes, such as groups=32 or channels_last=True",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 (default %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="of timing per shape (default %(default)s)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _examples(options: argparse.Namespace) -> list[tuple[Op, Example]]:
    """What to measure. ValueError for a shape or a setting that the op does not take."""
    if not options.shape:
        if options.set:
            raise ValueError("--set must come with --shape")
        ops = [op for op in OPS if op.tuning and options.op in (None, op.name)]
        return [(op, example) for op in ops for example in op.examples]
    if options.op is None:
        raise ValueError("--shape must come with --op")
    op = next(op for op in OPS if op.name == options.op)
    assert op.tuning is not None
    known = [name for name in inspect.signature(op.tuning.example).parameters if name != "shape"]
    for name, _ in options.set:
        if name not in known:
            raise ValueError(f"--set must name one of {', '.join(known)}, got {name!r}")
    return [(op, op.tuning.example(shape, **dict(options.set))) for shape in options.shape]


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        examples = _examples(options)
    except ValueError as error:
        parser.error(str(error))
    prog = parser.prog
    if not torch.cuda.is_available():
        print(f"{prog}: there is no GPU to measure on (see `fastdiff doctor`)", file=sys.stderr)
        return 1
    try:
        path = tuning.check_writable()
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{prog}: failed: {_first_line(str(error))}", file=sys.stderr)
        return 1

    def timer(functions: Mapping[str, Function]) -> Mapping[str, Timing]:
        return interleaved(functions, device, options.seconds)

    dtype = DTYPES[options.dtype]
    try:
        failed = run_cases(examples, device, dtype, timer, progress=not options.quiet)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; what was measured is in {path}", file=sys.stderr)
        return 130
    print(path)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
