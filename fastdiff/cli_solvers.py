"""``fastdiff solvers``: list them, show one's table, plot their errors."""

from __future__ import annotations

import argparse
from typing import Any

EXAMPLES = """examples:
  fastdiff solvers list                            every solver with its options
  fastdiff solvers show dpmpp_2m --steps 6         a solver's table
  fastdiff solvers plot                            error against evaluations, in solvers.png
  fastdiff solvers plot --solvers unipc,deis --grid karras --oracle narrow --out karras.png
"""


def add_solvers_command(commands: Any, integer: Any) -> None:
    """Adds the command and its three subcommands; ``integer(low, high)`` makes argument types."""
    style: dict[str, Any] = {
        "epilog": EXAMPLES,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    solvers = commands.add_parser(
        "solvers",
        help="list solvers, show their tables, plot their errors",
        description="What the solvers are, and how exact.",
        **style,
    )
    actions = solvers.add_subparsers(dest="action", metavar="action", required=True)

    listing = actions.add_parser("list", help="names, families, default grids, options", **style)
    listing.set_defaults(run=run_list)

    show = actions.add_parser("show", help="print a solver's table", **style)
    show.add_argument("name", help="the solver")
    show.add_argument("--steps", type=integer(1, 1000), default=5, help="default %(default)s")
    _add_common(show)
    show.set_defaults(run=run_show)

    plot = actions.add_parser(
        "plot",
        help="error against model evaluations, as numbers and as a PNG",
        description="Runs solvers on data whose exact samples are known, prints the root mean "
        "square errors and draws them.",
        **style,
    )
    plot.add_argument("--solvers", type=_names, help="names separated by commas, at most eight")
    plot.add_argument(
        "--evaluations",
        type=lambda text: _counts(text, integer(1, 1000)),
        help="numbers of model evaluations separated by commas (default 5,8,10,15,20,30,40)",
    )
    plot.add_argument(
        "--oracle", default="mixture", help="mixture, narrow or gaussian (default %(default)s)"
    )
    _add_common(plot)
    plot.add_argument("--out", default="solvers.png", help="the PNG (default %(default)s)")
    plot.set_defaults(run=run_plot)


def _add_common(parser: Any) -> None:
    parser.add_argument(
        "--schedule", default="scaled_linear", help="the noise schedule (default %(default)s)"
    )
    parser.add_argument("--grid", help="the spacing (default: each solver's own)")
    parser.add_argument(
        "--prediction", default="eps", help="what the model predicts (default %(default)s)"
    )
    parser.add_argument("--mode", default="parity", help="parity or exact (default %(default)s)")


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def _counts(text: str, parse: Any) -> list[int]:
    return sorted({parse(part) for part in text.split(",")})


def run_list(args: argparse.Namespace) -> int:
    """Prints one line per solver."""
    from fastdiff.solvers import SOLVERS

    rows = [["name", "family", "grid", "options"]]
    for solver in SOLVERS.values():
        fixed = ", ".join(f"{key}={value}" for key, value in solver.fixed.items())
        family = solver.build.__name__ + (f" ({fixed})" if fixed else "")
        rows.append([solver.name, family, solver.spacing, ", ".join(solver.options())])
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[3]]))
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Prints the table."""
    from fastdiff.solvers import make_table

    table = make_table(
        args.name,
        args.schedule,
        args.steps,
        grid=args.grid,
        prediction=args.prediction,
        mode=args.mode,
    )
    print(table)
    return 0


def run_plot(args: argparse.Namespace) -> int:
    """Prints the errors and writes the PNG."""
    from fastdiff import images
    from fastdiff.solvers import plot

    path = images.check_writable(args.out)
    names = args.solvers or list(plot.SOLVERS_SHOWN)
    counts = args.evaluations or list(plot.COUNTS)
    if len(names) > 8:
        raise ValueError(f"--solvers must be at most 8 names, got {len(names)}")
    chosen = {
        "oracle": args.oracle,
        "schedule": args.schedule,
        "prediction": args.prediction,
        "grid": args.grid,
        "mode": args.mode,
    }
    errors = plot.measure(names, counts, **chosen)
    settings = {key: value for key, value in chosen.items() if value is not None}
    title = f"{args.oracle} oracle, {args.schedule} schedule, {args.prediction} model, "
    title += f"{args.grid} grid" if args.grid else "each solver's own grid"
    images.save_png(plot.draw(errors, counts, title), path, settings)
    print(plot.as_text(errors, counts))
    print(f"\n{path}: {len(names)} solvers, {args.oracle} oracle, {args.schedule} schedule")
    return 0
