"""Trains the class-conditional digits model from nothing, on a CPU, and measures it.

    python examples/train_digits.py --out digits.safetensors

DDPM's loss |eps - eps_model(sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t, y)|^2 (Ho et al.,
https://arxiv.org/abs/2006.11239, equation 14) on scikit-learn's 8x8 digits, with the cosine
schedule of Nichol and Dhariwal (T = 1000). One label in ten is dropped, so that the model also
learns the unconditional score that classifier-free guidance needs. The saved weights are the
exponential moving average. A fifth of the data is held out for the report at the end.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff.evaluation import evaluate, load_split
from fastdiff.images import check_writable
from fastdiff.models import CONFIGS, DiT, Sampling, save

TRAIN_STEPS = 1000  # T of the diffusion process
BATCH = 128
LEARNING_RATE = 1e-3
FINAL_LEARNING_RATE = 0.02  # of LEARNING_RATE, at the end of the cosine
WARM_UP = 200
EMA_DECAY = 0.999
LABEL_DROPOUT = 0.1
GUIDANCE_SCALE = 1.25


def cosine_alphas_bar() -> Tensor:
    """abar_t for t = 0..999, float64 (Nichol and Dhariwal, equation 17, betas at most 0.999)."""
    times = torch.arange(TRAIN_STEPS + 1, dtype=torch.float64) / TRAIN_STEPS
    f = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, 0)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a half cosine down to FINAL_LEARNING_RATE of the peak."""
    cosine = max(FINAL_LEARNING_RATE, 0.5 * (1 + math.cos(math.pi * step / steps)))
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP) * cosine


def batches(images: Tensor, labels: Tensor, null_label: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random batches, images [BATCH, 1, 8, 8] and labels [BATCH] with some dropped."""
    while True:
        index = torch.randint(len(images), (BATCH,))
        dropped = torch.rand(BATCH) < LABEL_DROPOUT
        yield images[index], torch.where(dropped, null_label, labels[index])


def train(model: DiT, images: Tensor, labels: Tensor, steps: int) -> DiT:
    """Trains ``model`` in place and returns its moving average."""
    alphas_bar = cosine_alphas_bar().float()
    average = copy.deepcopy(model).requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    averaged = [
        a for a, p in zip(average.parameters(), model.parameters(), strict=True) if p.requires_grad
    ]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    smoothed = None
    source = batches(images, labels, model.config.null_label)
    with tqdm(range(steps), desc="train", unit="step") as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            x0, y = next(source)
            t = torch.randint(TRAIN_STEPS, (BATCH,))
            noise = torch.randn_like(x0)
            abar = alphas_bar[t].view(-1, 1, 1, 1)
            x = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
            loss = (model(x, t, y) - noise).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            # The early average forgets fast, or it would remember the initialisation.
            decay = min(EMA_DECAY, (step + 2) / (step + 11))
            with torch.no_grad():
                torch._foreach_lerp_(averaged, [p.detach() for p in trained], 1 - decay)
            smoothed = loss.item() if smoothed is None else 0.99 * smoothed + 0.01 * loss.item()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{smoothed:.4f}")
    return average.eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", type=int, default=3000, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--out", default="digits.safetensors", help="default %(default)s")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    try:
        path = check_writable(args.out, ".safetensors")
    except ValueError as error:
        parser.error(f"--out: {error}")

    torch.manual_seed(args.seed)
    split = load_split()
    images = torch.from_numpy(split.train_images)
    labels = torch.from_numpy(np.ascontiguousarray(split.train_labels))
    model = train(DiT(CONFIGS["digits"]), images, labels, args.steps)
    # float16 halves the file; the rounding is far below what the samples show.
    sampling = Sampling(guidance_scale=GUIDANCE_SCALE)
    save(model, path, sampling=sampling, dtype=torch.float16)
    model.sampling = sampling
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    report = evaluate(model, progress=True)
    print(report)
    return 0 if report.passed else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
