"""The noise streams of csrc/philox.h: by the extension, or in plain PyTorch with the same bits.

Element e of an image (in contiguous order) is normal e % 4 of counter (e // 4, draw) under the key
(seed's low word, high word). In plain PyTorch each operation rounds once, in the order of the C++.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from fastdiff._ext import ext

Tensor = torch.Tensor


def normal(
    shape: Sequence[int], seeds: Sequence[int], draw: int, device: torch.device | str
) -> Tensor:
    """Float32 normals [len(seeds), ...] on ``device``; by the extension where it can."""
    device = torch.device(device)
    module = ext()
    per_image = math.prod(shape[1:])
    if device.type == "cpu" and module is not None:
        out = torch.empty(tuple(shape), dtype=torch.float32)
        threads = torch.get_num_threads()
        module.philox_normal(out.data_ptr(), len(seeds), per_image, list(seeds), draw, threads)
        return out
    if device.type == "cuda" and module is not None and hasattr(module, "cuda_philox_normal"):
        with torch.cuda.device(device):
            out = torch.empty(tuple(shape), dtype=torch.float32, device=device)
            keys = device_seeds(tuple(seeds), out.device)
            stream = torch.cuda.current_stream().cuda_stream
            module.cuda_philox_normal(
                out.data_ptr(), len(seeds), per_image, keys.data_ptr(), draw, stream
            )
        return out
    return reference_normal(shape, seeds, draw, device)


@functools.lru_cache(maxsize=64)
def device_seeds(seeds: tuple[int, ...], device: torch.device) -> Tensor:
    """The seeds as the kernels read them: 64 bits each, on ``device``."""
    return _signed(seeds, device)


def _signed(seeds: Sequence[int], device: torch.device | str) -> Tensor:
    signed = [seed - 2**64 if seed >= 2**63 else seed for seed in seeds]
    return torch.tensor(signed, dtype=torch.int64, device=device)


def reference_normal(
    shape: Sequence[int],
    seeds: Sequence[int] | Tensor,
    draw: int | Tensor,
    device: torch.device | str,
) -> Tensor:
    """Float32 normals [images, ...] in plain PyTorch.

    seeds: one per image; as a tensor, int64 with their 64 bits. draw: a tensor is int64, 0-dim, and
    is not looked at on the host.
    """
    if not isinstance(seeds, Tensor):
        seeds = _signed(seeds, device)
    count = math.prod(shape[1:])
    groups = torch.arange((count + 3) // 4, device=device).expand(shape[0], -1)
    zero = torch.zeros_like(groups)
    key = [(seeds & _LOW)[:, None], (seeds >> 32 & _LOW)[:, None]]
    c = philox4x32([groups & _LOW, zero + draw, groups >> 32, zero], key)
    z = torch.stack([*_box_muller(c[0], c[1]), *_box_muller(c[2], c[3])], -1)
    return z.flatten(1)[:, :count].reshape(tuple(shape))


_LOW = 0xFFFFFFFF


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011): four words for each counter of four words.

    counter, key: four and two int64 tensors of 32-bit words that broadcast.
    """
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = _multiply(c[0], 0xD2511F53)
        high1, low1 = _multiply(c[2], 0xCD9E8D57)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) & _LOW, (k[1] + 0xBB67AE85) & _LOW]
    return c


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product, without leaving int64."""
    upper, lower = (word >> 16) * factor, (word & 0xFFFF) * factor
    middle = upper + (lower >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)


def _box_muller(word0: Tensor, word1: Tensor) -> tuple[Tensor, Tensor]:
    u = ((word0 >> 9).float() + 0.5) * 2.0**-23
    # The CPU's float32 torch.sqrt is not always correctly rounded. Through float64 it is: the root
    # of a float32 is never nearer to the middle of two float32 than float64 can tell.
    radius = torch.sqrt((_log_unit(u) * -2.0).double()).float()
    turn = word1 >> 8
    quadrant = turn >> 22
    theta = (((turn & 0x3FFFFF) - 0x200000).float() + 0.5) * 3.7450704e-7
    t2 = theta * theta
    sine = _horner(t2, (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)) * t2 * theta + theta
    cosine = _horner(t2, (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2))
    cosine = cosine * t2 * t2 - t2 * 0.5 + 1.0
    odd = (quadrant & 1) != 0
    first, second = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    first = torch.where(((quadrant + 1) & 2) != 0, -first, first)
    second = torch.where((quadrant & 2) != 0, -second, second)
    return radius * first, radius * second


_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip


def _log_unit(u: Tensor) -> Tensor:
    bits = u.view(torch.int32) - 0x3F3504F3
    exponent = (bits >> 23).float()
    f = ((bits & 0x7FFFFF) + 0x3F3504F3).view(torch.float32) - 1.0
    f2 = f * f
    y = _horner(f, _LOG) * f * f2
    y = y + exponent * -2.12194440e-4
    y = y - f2 * 0.5
    return (f + y) + exponent * 0.693359375


def _horner(variable: Tensor, coefficients: Sequence[float]) -> Tensor:
    total = variable * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        total = total * variable + coefficient
    return total
