"""``fastdiff inspect`` and ``fastdiff convert``: what a checkpoint is, and its other layout."""

from __future__ import annotations

import argparse
from typing import Any

EXAMPLES = """examples:
  fastdiff inspect model.safetensors               architecture, size, dtype, what is missing
  fastdiff inspect stable-diffusion-v1-5/          every model of a diffusers folder
  fastdiff convert sd15.safetensors unet/ --component unet
  fastdiff convert unet/ unet.safetensors --layout official --dtype bfloat16
"""
DTYPES = ("float32", "float16", "bfloat16")


def add_checkpoint_commands(commands: Any) -> None:
    """Adds the two commands."""
    style: dict[str, Any] = {
        "epilog": EXAMPLES,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    inspect = commands.add_parser(
        "inspect",
        help="say what a checkpoint is and whether it is complete",
        description="Reads the headers of a .safetensors file or of a folder and prints what is "
        "in it. Exit code 1 when tensors are missing, unknown or of another shape.",
        **style,
    )
    inspect.add_argument("path", help="a .safetensors file or a folder")
    inspect.add_argument("--variant", help="of the files in folders, such as fp16")
    inspect.set_defaults(run=run_inspect)

    convert = commands.add_parser(
        "convert",
        help="write a model in diffusers' or in the official layout",
        description="Writes one model of a file or a folder in another layout: diffusers' folder "
        "(config.json and weights) or one file with the names of the official code.",
        **style,
    )
    convert.add_argument("source", help="a .safetensors file or a folder")
    convert.add_argument("target", help="a new folder, or a .safetensors file (--layout official)")
    convert.add_argument(
        "--layout",
        choices=("diffusers", "official"),
        default="diffusers",
        help="the names and files to write (default %(default)s)",
    )
    convert.add_argument("--component", help="which model of several, such as unet or vae")
    convert.add_argument("--dtype", choices=DTYPES, help="default: as it is")
    convert.add_argument(
        "--prefix", default="", help="what official names begin with (default: nothing)"
    )
    convert.add_argument(
        "--max-shard-size", default="10GB", help="of one file of a folder (default %(default)s)"
    )
    convert.set_defaults(run=run_convert)


def run_inspect(args: argparse.Namespace) -> int:
    """Prints the report; 1 when the checkpoint is not complete."""
    from fastdiff.checkpoints.inspection import inspect

    report = inspect(args.path, args.variant)
    print(report)
    return 0 if report.ok else 1


def run_convert(args: argparse.Namespace) -> int:
    """Writes the target and says what it is."""
    import torch

    from fastdiff.checkpoints.convert import convert
    from fastdiff.checkpoints.inspection import inspect

    target = convert(
        args.source,
        args.target,
        layout=args.layout,
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
        component=args.component,
        prefix=args.prefix,
        max_shard_size=args.max_shard_size,
    )
    print(inspect(target))
    return 0
