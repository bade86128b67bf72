"""The command line: ``fastdiff sample``, ``evaluate``, ``inspect``, ``convert``, ``solvers``, ...

Exit codes: 0 done, 1 something failed or a bar was missed, 2 a wrong argument, 130 Ctrl-C.
PyTorch is imported by the command that needs it, so help and wrong arguments answer at once.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from fastdiff._version import __version__

if TYPE_CHECKING:
    from fastdiff.models import DiT

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
# Of models of classes; pipelines have defaults of their own.
SOLVER, STEPS = "best_linear", 20

EXAMPLES = """examples:
  fastdiff sample                          four rows of the digits 0-9 in digits.png
  fastdiff sample --labels 3,1,4 --rows 1 --seed 7 --out pi.png
  fastdiff sample --solver ddim --steps 50 --guidance-scale 2
  fastdiff sample --model sd15/ --prompt "a lighthouse" --out lighthouse.png
  fastdiff evaluate                        quality of 1,000 samples against real digits
  fastdiff inspect model.safetensors       what a checkpoint is, and whether it is complete
  fastdiff solvers plot                    how exact each solver is, in solvers.png
  fastdiff doctor                          what works on this machine
"""


class _Parser(argparse.ArgumentParser):
    """One line per error; the usage is what --help is for."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)


def _integer(low: int, high: int | None = None) -> Callable[[str], int]:
    rule = f"must be an integer of at least {low}" + (f" and at most {high}" if high else "")

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{rule}, got {text!r}") from None
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{rule}, got {value}")
        return value

    return parse


def _scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def _labels(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be class numbers separated by commas, got {text!r}"
        ) from None


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``args.run(args)`` returns the exit code."""
    from fastdiff.cli_checkpoints import add_checkpoint_commands
    from fastdiff.cli_pictures import EXAMPLES as PICTURE_EXAMPLES
    from fastdiff.cli_pictures import add_picture_commands, add_picture_options
    from fastdiff.cli_solvers import add_solvers_command
    from fastdiff.environment import add_doctor_command

    parser = _Parser(
        prog="fastdiff",
        description="A custom-kernel performance engine for diffusion models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastdiff {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="command", required=True, parser_class=_Parser
    )

    sample = commands.add_parser(
        "sample",
        help="draw pictures of prompts, or a labelled grid of classes",
        description="Of a pipeline: draws each prompt into a PNG of its own. Of a class model such "
        "as digits: draws --rows images of each label, one column per label, into one PNG. The "
        "settings and the seed are stored in the PNG's text entries.",
        epilog=PICTURE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model_arguments(sample)
    sample.add_argument("--out", help="the PNG (default: digits.png, or picture.png of a prompt)")
    sample.add_argument(
        "--labels", type=_labels, help="class numbers, such as 3,1,4 (default: the first ten)"
    )
    sample.add_argument(
        "--rows", type=_integer(1, 1000), default=4, help="images per label (default %(default)s)"
    )
    sample.add_argument(
        "--scale",
        type=_integer(1, 64),
        default=6,
        help="each pixel becomes SCALE x SCALE (default %(default)s)",
    )
    add_picture_options(sample, _integer)
    sample.set_defaults(run=run_sample)
    add_picture_commands(commands, _integer, _add_model_arguments)

    evaluate = commands.add_parser(
        "evaluate",
        help="measure the quality of the digits model (needs scikit-learn)",
        description="Draws samples, compares them with real digits and prints a table. Exit code "
        "1 when a bar is missed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model_arguments(evaluate)
    evaluate.add_argument(
        "--samples", type=_integer(25, 100000), default=1000, help="how many (default %(default)s)"
    )
    evaluate.set_defaults(run=run_evaluate)

    add_solvers_command(commands, _integer)
    add_checkpoint_commands(commands)
    add_doctor_command(commands)
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        help="'digits', a .safetensors file, a folder or a hub's owner/name (default digits)",
    )
    parser.add_argument(
        "--solver",
        help="name of the solver (default: best_linear, or what distilled and flow models need)",
    )
    parser.add_argument(
        "--steps", type=_integer(1, 1000), help="model evaluations (default 20; 4 when distilled)"
    )
    parser.add_argument(
        "--guidance-scale",
        type=_scale,
        help="classifier-free guidance, 1 is none (default: the model's own)",
    )
    parser.add_argument(
        "--seed",
        type=_integer(0, 2**63 - 1),
        help="image i uses seed + i (default 0; of a prompt a new one, which is printed)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default cpu)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def load_model(args: argparse.Namespace) -> Any:
    """The model on its device. Raises ValueError naming the option for each thing wrong."""
    import torch

    from fastdiff.models import load
    from fastdiff.solvers.registry import get_solver

    try:
        get_solver(args.solver or SOLVER)
    except ValueError as error:
        raise ValueError(_as_option("solver", error)) from error
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device must be usable here, got {args.device!r} ({reason})") from error
    dtype = getattr(args, "dtype", None)
    options = {"dtype": getattr(torch, dtype)} if dtype else {}
    args.model = args.model or "digits"
    try:
        return load(
            args.model, device=device, tokenizers=getattr(args, "tokenizers", None), **options
        )
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(_as_option("name_or_path", error, "model")) from error


def _class_model(args: argparse.Namespace, loaded: Any = None) -> DiT:
    """A model of classes and pixels, as the grid and the evaluation want it."""
    from fastdiff.models import DiT

    model = load_model(args) if loaded is None else loaded
    if not isinstance(model, DiT):
        raise ValueError(
            f"--model must be a DiT of pixels for {args.command}, got {type(model).__name__}"
        )
    args.solver, args.seed = args.solver or SOLVER, args.seed or 0
    args.steps = args.steps or STEPS
    return model


def _as_option(argument: str, error: Exception, option: str | None = None) -> str:
    """The message of an API error, with the argument under its name on the command line."""
    name = f"--{(option or argument).replace('_', '-')}"
    message = str(error)
    if message.startswith(f"{argument} "):
        return name + message[len(argument) :]
    return f"{name}: {message}"


def run_sample(args: argparse.Namespace) -> int:
    """Draws the grid and writes the PNG; 0 when it is there."""
    from fastdiff import images
    from fastdiff.cli_pictures import draw, take_settings

    found = None
    if args.prompt or args.like or (args.model or "digits") != "digits":
        from fastdiff.pipelines import Pipeline

        take_settings(args)
        found = load_model(args)
        if isinstance(found, Pipeline):
            return draw(found, args)
        if args.prompt:
            raise ValueError(f"--prompt must be for a pipeline, got a {type(found).__name__}")
    args.out = args.out or "digits.png"
    try:
        path = images.check_writable(args.out)
    except ValueError as error:
        raise ValueError(_as_option("path", error, "out")) from error
    model = _class_model(args, found)
    from fastdiff.pipelines import sample_classes

    sampling = model.sampling
    labels = args.labels or list(range(min(10, sampling.num_classes)))
    wrong = [label for label in labels if not 0 <= label < sampling.num_classes]
    if wrong:
        raise ValueError(f"--labels must be in 0..{sampling.num_classes - 1}, got {wrong[0]}")
    if sampling.shape[0] not in (1, 3):
        raise ValueError(
            f"--model must draw images of 1 or 3 channels, got {sampling.shape[0]} (latents)"
        )
    guidance = sampling.guidance_scale if args.guidance_scale is None else args.guidance_scale
    samples = sample_classes(
        model,
        labels * args.rows,
        solver=args.solver,
        steps=args.steps,
        guidance_scale=guidance,
        seed=args.seed,
        progress=not args.quiet,
    )
    picture = images.labelled_grid(
        images.to_uint8(samples, sampling.value_range),
        len(labels),
        [str(label) for label in labels],
        scale=args.scale,
    )
    settings = {
        "Software": f"fastdiff {__version__}",
        "model": args.model,
        "solver": args.solver,
        "steps": args.steps,
        "guidance_scale": guidance,
        "seed": args.seed,
        "labels": ",".join(map(str, labels)),
        "rows": args.rows,
    }
    images.save_png(picture, path, settings)
    count = len(labels) * args.rows
    print(f"{path}: {count} images, {args.solver} in {args.steps} steps, seed {args.seed}")
    return EXIT_OK


def run_evaluate(args: argparse.Namespace) -> int:
    """Prints the quality report; 1 when a bar is missed."""
    from fastdiff.evaluation import evaluate

    report = evaluate(
        _class_model(args),
        samples=args.samples,
        solver=args.solver,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        progress=not args.quiet,
    )
    print(report)
    return EXIT_OK if report.passed else EXIT_FAILED


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; argv defaults to the process's arguments."""
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as leaving:  # --help, --version and usage errors have printed
        return leaving.code if isinstance(leaving.code, int) else EXIT_USAGE
    prog = f"fastdiff {args.command}"
    try:
        code = args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt as leaving:
        print(f"{prog}: interrupted, {str(leaving) or 'nothing written'}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (ValueError, TypeError) as error:
        print(f"{prog}: error: {_one_line(error)}", file=sys.stderr)
        return EXIT_USAGE
    except (OSError, ImportError, RuntimeError) as error:
        print(f"{prog}: failed: {_one_line(error)}", file=sys.stderr)
        return EXIT_FAILED
    return code


def _one_line(error: Exception) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
