"""What a row's ``rule`` does to prediction and noise before its (linear) updates."""

from __future__ import annotations

import torch
from torch import Tensor


def langevin(prediction: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """A Langevin step whose size follows the signal-to-noise ratio (arXiv 2011.13456, alg. 4, 5).

    With r = mean|z|/mean|g|, the means over the batch of the images' norms, the step's size is
    2 a (snr r)^2: the prediction g is multiplied by r^2 and the noise by r.
    """

    def size(value: Tensor) -> Tensor:
        return torch.linalg.vector_norm(value.flatten(1), dim=1).mean()

    ratio = size(noise) / size(prediction)
    return prediction * (ratio * ratio), noise * ratio


def learned_range(noise: Tensor, share: Tensor, ratio: float) -> Tensor:
    """Noise with a learned deviation between the two bounds (arXiv 2102.09672, equation 15).

    share: the model's v, -1 (the row's own deviation) .. 1 (``ratio`` times that).
    """
    return noise * torch.pow(ratio, (share + 1) / 2)
