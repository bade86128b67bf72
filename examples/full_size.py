"""A full-size Stable Diffusion picture without downloading anything, against diffusers.

    python examples/full_size.py --out weights                      # SD1.5: 860M + 84M + 123M
    python examples/full_size.py --out weights --model sdxl     # 7 GB a layout

Writes a checkpoint of random weights in both file layouts (once), draws one picture end to end from
each with fastdiff and from the folder with diffusers, each in a process of its own, and prints
seconds, peak memory (RSS, mapped files included) and how far the final latents are apart: in bf16
both from diffusers in float32 by the 2 x rule. Exit status 1 when something held does not hold.
Needs diffusers and transformers.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

PROMPT = "a photograph of an astronaut riding a horse"
SIZES = {"sd15": 512, "sdxl": 1024}


def draw(args: argparse.Namespace) -> dict[str, Any]:
    """One run in this process; the latents go to ``args.latents``."""
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    size = args.size
    start = torch.randn(1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    if args.engine == "diffusers":
        import diffusers

        pipe = diffusers.DiffusionPipeline.from_pretrained(args.path, torch_dtype=dtype)
        loaded = time.perf_counter()
        result = pipe(
            PROMPT,
            num_inference_steps=args.steps,
            guidance_scale=7.5,
            latents=start.to(dtype),
            height=size,
            width=size,
            output_type="latent",
        ).images
        sampled = time.perf_counter()
        with torch.no_grad():
            pipe.vae.decode(result / pipe.vae.config.scaling_factor)
    else:
        import fastdiff

        pipe = fastdiff.load(args.path, dtype=dtype, tokenizers=args.tokenizers)
        if args.engine == "compiled":
            pipe.compile()
        loaded = time.perf_counter()
        solver = {"PNDMScheduler": "pndm", "EulerDiscreteScheduler": "euler"}[args.scheduler]
        options = {"grid": "leading", "solver_options": {"steps_offset": 1}}
        if solver == "pndm":
            options["solver_options"]["set_alpha_to_one"] = False  # type: ignore[index]
        drawn = pipe(
            PROMPT,
            steps=args.steps,
            guidance_scale=7.5,
            solver=solver,
            **options,
            latents=start.to(dtype),
            height=size,
            width=size,
            seed=0,
            output="latent",
            progress=sys.stderr.isatty(),
        )
        sampled = time.perf_counter()
        pipe.pictures(drawn.latents)[0].save(args.latents.with_suffix(".png"))
        result = drawn.latents
    torch.save(result.float(), args.latents)
    return {
        "load": loaded - began,
        "sample": sampled - loaded,
        "decode": time.perf_counter() - sampled,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def in_own_process(engine: str, path: Path, dtype: str, args: argparse.Namespace) -> Any:
    """(latents, measurements) of a run."""
    latents = args.out / f"{args.model}-{engine}-{path.suffix.strip('.') or 'folder'}-{dtype}.pt"
    command = [sys.executable, __file__, "--engine", engine, "--path", str(path), "--dtype", dtype]
    command += ["--latents", str(latents), "--size", str(args.size), "--steps", str(args.steps)]
    command += ["--threads", str(args.threads), "--tokenizers", str(args.out / args.model)]
    command += ["--scheduler", args.scheduler]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    shown = "  ".join(f"{name} {value:.2f}" for name, value in facts.items())
    print(f"{engine:10} {path.name:18} {dtype:9} {shown}", flush=True)
    return torch.load(latents, weights_only=True), facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("weights"))
    parser.add_argument("--model", choices=sorted(SIZES), default="sd15")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, help="pixels of a side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compiled", action="store_true", help="fastdiff.compile, too")
    for name in ("engine", "path", "tokenizers", "scheduler"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    parser.add_argument("--latents", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.size = args.size or SIZES[args.model]
    if args.engine:
        print(json.dumps(draw(args)))
        return 0
    from fastdiff.checkpoints.random import PIPELINES, write_pipeline

    single, folder = args.out / f"{args.model}.safetensors", args.out / args.model
    if not (folder / "model_index.json").exists():
        began = time.perf_counter()
        write_pipeline(args.model, args.out)
        print(f"written in {time.perf_counter() - began:.0f} s")
    args.scheduler = PIPELINES[args.model].scheduler["_class_name"]
    exact, _ = in_own_process("diffusers", folder, "float32", args)
    theirs, _ = in_own_process("diffusers", folder, "bfloat16", args)
    runs = [("fastdiff", folder, "float32")]
    runs += [("fastdiff", path, "bfloat16") for path in (folder, single)]
    if args.compiled:
        runs.append(("compiled", folder, "bfloat16"))
    failed = 0
    error = float((theirs - exact).square().mean().sqrt())
    print(f"diffusers in bfloat16 is {error:.2e} (root mean square) from float32")
    for engine, path, dtype in runs:
        latents, _ = in_own_process(engine, path, dtype, args)
        ours = float((latents - exact).square().mean().sqrt())
        largest = float((latents - exact).abs().max())
        bound = 2 * error if dtype == "bfloat16" else 1e-4
        held = (ours if dtype == "bfloat16" else largest) <= bound
        failed += not held
        print(
            f"  {ours:.2e} from it, at most {largest:.2e}: {'holds' if held else 'DOES NOT HOLD'}"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
