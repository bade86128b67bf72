"""``fastdiff sample``, ``img2img`` and ``inpaint`` for pipelines: prompts to PNGs."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdiff.pipelines import Pipeline

EXAMPLES = """examples:
  fastdiff sample --model stable-diffusion-v1-5/ --prompt "a lighthouse" --seed 7 --out a.png
  fastdiff sample --model sd.safetensors --tokenizers sd15/ --prompt "a cat" --prompt "a dog"
  fastdiff sample --like a.png --steps 40              the same picture with more steps
  fastdiff img2img --model sd15/ --image in.png --prompt "in oil" --strength 0.6
  fastdiff inpaint --model sd15/ --image in.png --mask mask.png --prompt "a door"
"""
DTYPES = ("float32", "float16", "bfloat16")
# What a PNG's settings say, and the option that says it.
FROM_SETTINGS = {
    "prompt": "prompt",
    "negative": "negative",
    "seed": "seed",
    "steps": "steps",
    "solver": "solver",
    "grid": "grid",
    "guidance_scale": "guidance_scale",
    "width": "width",
    "height": "height",
    "strength": "strength",
    "clip_skip": "clip_skip",
    "model": "model",
}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C between pictures; the message says what was kept."""


def add_picture_options(parser: argparse.ArgumentParser, integer: Callable[..., Any]) -> None:
    """The options of pipelines, beyond those of every model."""
    group = parser.add_argument_group("pipelines (Stable Diffusion, SDXL, SD3, FLUX, DiT)")
    group.add_argument("--prompt", action="append", help="what to draw; again for more prompts")
    group.add_argument("--negative", help="what to lead away from")
    group.add_argument("--images", type=integer(1, 10000), default=1, help="per prompt (default 1)")
    group.add_argument("--width", type=integer(8), help="in pixels (default: the model's own)")
    group.add_argument("--height", type=integer(8), help="in pixels (default: the model's own)")
    group.add_argument("--grid", help="time grid, such as karras (default: the solver's own)")
    group.add_argument("--clip-skip", type=integer(0, 11), help="layers of CLIP left out")
    group.add_argument(
        "--long",
        choices=("windows", "cut", "error"),
        default="windows",
        help="prompts of more tokens than fit at once (default %(default)s)",
    )
    group.add_argument("--dtype", choices=DTYPES, help="to compute in (default: the file's own)")
    group.add_argument("--compile", action="store_true", help="fastdiff.compile first")
    group.add_argument("--tokenizers", help="folder with the tokenizers, for single files")
    group.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:SCALE]", help="again for more"
    )
    group.add_argument(
        "--control",
        action="append",
        nargs=2,
        default=[],
        metavar=("MODEL", "IMAGE"),
        help="a ControlNet and the picture it follows; again for more",
    )
    group.add_argument(
        "--batch-size",
        type=integer(1, 1024),
        default=1,
        help="pictures at once; each batch is saved when it is done (default 1)",
    )
    group.add_argument("--preview", metavar="PNG", help="written again in every step")
    group.add_argument("--tiled", action="store_true", help="decode in tiles, for large pictures")
    group.add_argument("--like", metavar="PNG", help="take the settings of that picture")


def add_picture_commands(
    commands: Any, integer: Callable[..., Any], add_model: Callable[..., None]
) -> None:
    """``img2img`` and ``inpaint``."""
    style: dict[str, Any] = {
        "epilog": EXAMPLES,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    texts = {
        "img2img": ("draw over a picture", "Noises a picture and draws it again (SDEdit)."),
        "inpaint": ("draw inside a mask", "Draws where the mask is white and keeps the rest."),
    }
    for name, (short, long) in texts.items():
        parser = commands.add_parser(name, help=short, description=long, **style)
        add_model(parser)
        parser.add_argument("--out", default="picture.png", help="the PNG (default %(default)s)")
        parser.add_argument("--image", required=True, help="the picture to start from")
        if name == "inpaint":
            parser.add_argument("--mask", required=True, help="white where to draw")
        parser.add_argument(
            "--strength",
            type=_fraction,
            help=f"0..1, how much is drawn anew (default {'1' if name == 'inpaint' else '0.8'})",
        )
        add_picture_options(parser, integer)
        parser.set_defaults(run=run_pictures, labels=None)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text!r}")
    return value


def take_settings(args: argparse.Namespace) -> None:
    """Fills what was not given from the picture of ``--like``."""
    if not getattr(args, "like", None):
        return
    from fastdiff.images import read_settings

    try:
        settings = read_settings(args.like)
    except (OSError, ValueError) as error:
        raise ValueError(f"--like must be a PNG with fastdiff's settings: {error}") from error
    for name, option in FROM_SETTINGS.items():
        given = getattr(args, option, None)
        if name in settings and given in (None, []):
            value = settings[name]
            setattr(args, option, [value] if name == "prompt" else value)


def run_pictures(args: argparse.Namespace) -> int:
    """Draws with a pipeline: loads it, and saves each batch as it is done; 0."""
    from fastdiff.cli import load_model
    from fastdiff.pipelines import Pipeline

    take_settings(args)
    pipe = load_model(args)
    if not isinstance(pipe, Pipeline):
        raise ValueError(
            f"--model must be a pipeline for {args.command}, got a {type(pipe).__name__}"
        )
    return draw(pipe, args)


def draw(pipe: Pipeline, args: argparse.Namespace) -> int:
    """The pictures of one command."""
    from fastdiff import images

    out = args.out or "picture.png"
    try:
        images.check_writable(out)
    except ValueError as error:
        raise ValueError(f"--out: {error}") from error
    prompts = _prompts(pipe, args)
    names = images.numbered(out, len(prompts) * args.images)
    for spec in args.lora:
        file, _, scale = spec.rpartition(":")
        try:
            pipe.load_lora(file or spec, float(scale) if file else 1.0)
        except ValueError as error:
            raise ValueError(f"--lora {spec}: {error}") from error
    if args.compile:
        pipe.compile()
    arguments: dict[str, Any] = {
        "negative": args.negative,
        "images_per_prompt": args.images,
        "width": args.width,
        "height": args.height,
        "steps": args.steps,
        "solver": args.solver,
        "grid": args.grid,
        "guidance_scale": args.guidance_scale,
        "seed": args.seed,
        "clip_skip": args.clip_skip or 0,
        "long": args.long,
        "batch_size": args.batch_size,
        "tiled": args.tiled,
        "progress": not args.quiet,
        "control": _controls(args),
    }
    for name in ("image", "mask"):
        if getattr(args, name, None):
            arguments[name] = _open(name, getattr(args, name))
    if getattr(args, "strength", None) is not None and "image" in arguments:
        arguments["strength"] = args.strength
    if args.preview:
        arguments["preview"] = _preview(args.preview)
    began, done = time.monotonic(), 0
    try:
        for result in pipe.batches(prompts, **arguments):
            for image, settings in zip(result.images or [], result.settings, strict=True):
                path = images.save_with_settings(image, names[done], settings)
                done += 1
                print(f"{path}: seed {settings['seed']}", flush=True)
    except KeyboardInterrupt:
        kept = f"kept {done} of {len(names)} pictures" if done else "nothing written"
        raise Interrupted(kept) from None
    if not args.quiet:
        print(f"{done} in {time.monotonic() - began:.1f} s")
    return 0


def _prompts(pipe: Pipeline, args: argparse.Namespace) -> list[Any]:
    from fastdiff.pipelines.prompts import ClassLabels, Unconditional

    if isinstance(pipe.conditioner, ClassLabels):
        labels = args.labels or args.prompt
        if not labels:
            raise ValueError("--labels must be given for a class-conditional model, got none")
        return list(labels)
    if args.labels:
        raise ValueError("--labels must not be given for a model without classes")
    if isinstance(pipe.conditioner, Unconditional):
        return [""]
    if not args.prompt:
        raise ValueError("--prompt must be given for a model of text, got none")
    return list(args.prompt)


def _open(name: str, path: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            opened.load()
            return opened
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"--{name} must be a picture, got {path!r} ({error})") from error


def _controls(args: argparse.Namespace) -> list[Any]:
    import torch

    import fastdiff
    from fastdiff.pipelines import Control

    dtype = getattr(torch, args.dtype) if args.dtype else None
    return [
        Control(fastdiff.load(model, device=args.device, dtype=dtype), _open("control", image))
        for model, image in args.control
    ]


def _preview(path: str) -> Callable[[list[Any], int], None]:
    from fastdiff import images

    target = Path(path)
    images.check_writable(target)

    def show(shown: list[Any], step: int) -> None:
        images.save_png(shown[0], target, {"step": step})

    return show
