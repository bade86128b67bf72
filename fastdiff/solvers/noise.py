"""Where a run's normal noise comes from: torch generators, or one Philox stream per image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastdiff._ext import ext

# The draw of x_T; csrc/philox.h, kInitialDraw.
INITIAL_DRAW = 0xFFFFFFFF


class Noise(Protocol):
    """The noise of one run, shaped like the state."""

    def initial(self) -> Tensor:
        """z of ``x_T = init_scale*z``. Called at most once, before any draw."""

    def draw(self, index: int) -> Tensor:
        """Draw ``index``; called with 0, 1, 2, ... in order."""


class GeneratorNoise:
    """Draws of ``torch.randn`` in the order and dtype in which diffusers makes them.

    shape: of the state, batch first. dtype: the model's, in which numbers are drawn; they are
    returned in ``state_dtype`` on ``device``.
    generator: None (PyTorch's global one), one torch.Generator, or one per image. A CPU generator
    may serve any device: the draw is made on the CPU and moved.

    Raises ValueError for a generator of another accelerator, or a list of the wrong length.
    """

    def __init__(
        self,
        shape: Sequence[int],
        generator: torch.Generator | Sequence[torch.Generator] | None,
        *,
        dtype: torch.dtype,
        state_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._shape = tuple(shape)
        self._dtype = dtype
        self._state_dtype = state_dtype
        self._device = device
        if isinstance(generator, Sequence):
            generators = list(generator)
            if len(generators) != self._shape[0]:
                raise ValueError(
                    f"generator must be one or one per image ({self._shape[0]}), "
                    f"got {len(generators)}"
                )
            self._generators: list[torch.Generator | None] = [*generators]
            self._draw_shape = (1, *self._shape[1:])
        else:
            self._generators = [generator]
            self._draw_shape = self._shape
        for one in self._generators:
            if one is not None and not isinstance(one, torch.Generator):
                raise TypeError(f"generator must be a torch.Generator, got {type(one).__name__}")
            if one is not None and one.device.type not in ("cpu", device.type):
                raise ValueError(
                    f"generator must be on the CPU or on {device.type}, got {one.device}"
                )

    def initial(self) -> Tensor:
        """The next draw."""
        return self.draw(-1)

    def draw(self, index: int) -> Tensor:
        """The next draw, whatever ``index``: a generator has an order of its own."""
        parts = []
        for generator in self._generators:
            where = self._device if generator is None else generator.device
            part = torch.randn(
                self._draw_shape, generator=generator, device=where, dtype=self._dtype
            )
            parts.append(part.to(self._device))
        z = parts[0] if len(parts) == 1 else torch.cat(parts)
        return z.to(self._state_dtype)


class PhiloxNoise:
    """One Philox4x32-10 stream per image, the same bits on every device and in every batch.

    shape: of the state, batch first. seeds: one integer in 0..2^64-1 per image. Element e of an
    image (in contiguous order) of draw k is a function of (seed, k, e) alone, so draws may be made
    in any order, or inside a kernel.

    Raises ValueError or TypeError for seeds out of range, of another type, or of another number.
    """

    def __init__(
        self,
        shape: Sequence[int],
        seeds: Sequence[int],
        *,
        state_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._shape = tuple(shape)
        if len(seeds) != self._shape[0]:
            raise ValueError(f"seed must be one or one per image ({shape[0]}), got {len(seeds)}")
        for seed in seeds:
            if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
                raise TypeError(f"seed must be an integer, got {type(seed).__name__}")
            if not 0 <= seed < 2**64:
                raise ValueError(f"seed must be in 0..2^64-1 for every image, got {seed}")
        self.seeds = [int(seed) for seed in seeds]
        self._state_dtype = state_dtype
        self._device = device

    def initial(self) -> Tensor:
        """The normals of the draw kept for x_T."""
        return self.draw(INITIAL_DRAW)

    def draw(self, index: int) -> Tensor:
        """The normals of draw ``index``, in any order."""
        z = philox_normal(self._shape, self.seeds, index)
        return z.to(self._device, self._state_dtype)


def philox_normal(shape: Sequence[int], seeds: Sequence[int], draw: int) -> Tensor:
    """Float32 normals [len(seeds), ...] on the CPU; by the extension when there is one."""
    out = torch.empty(tuple(shape), dtype=torch.float32)
    per_image = math.prod(shape[1:])
    module = ext()
    if module is not None and hasattr(module, "philox_normal"):
        module.philox_normal(
            out.data_ptr(), len(seeds), per_image, list(seeds), draw, torch.get_num_threads()
        )
        return out
    for image, seed in zip(out.numpy(), seeds, strict=True):
        image[...] = _philox_normal_numpy(per_image, seed, draw).reshape(image.shape)
    return out


def philox4x32(counter: Sequence[np.ndarray], key: Sequence[int]) -> list[np.ndarray]:
    """Philox4x32-10 (Salmon et al., SC 2011): four words for each counter of four words.

    counter: four uint64 arrays holding 32-bit words. key: two 32-bit words.
    """
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * c0
        p1 = np.uint64(0xCD9E8D57) * c2
        c0, c2 = (p1 >> half) ^ c1 ^ np.uint64(k0), (p0 >> half) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & low, p0 & low
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def _philox_normal_numpy(per_image: int, seed: int, draw: int) -> np.ndarray:
    """csrc/philox.h for one image: every operation rounds once, in the same order."""
    groups = np.arange((per_image + 3) // 4, dtype=np.uint64)
    zero = np.zeros_like(groups)
    words = philox4x32(
        [groups, np.full_like(groups, draw), zero, zero], (seed & 0xFFFFFFFF, seed >> 32)
    )
    z = np.empty((groups.size, 4), dtype=np.float32)
    z[:, 0], z[:, 1] = _box_muller(words[0], words[1])
    z[:, 2], z[:, 3] = _box_muller(words[2], words[3])
    return z.reshape(-1)[:per_image]


def _f32(value: float) -> np.float32:
    return np.float32(value)


def _polynomial(variable: np.ndarray, coefficients: Sequence[float]) -> np.ndarray:
    """Horner's rule, highest power first, each product and each sum rounded to float32."""
    total = np.full_like(variable, _f32(coefficients[0]))
    for coefficient in coefficients[1:]:
        total = total * variable + _f32(coefficient)
    return total


# Cephes' logf, sinf and cosf, highest power first; csrc/philox.h has the same.
_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)


def _log_unit(u: np.ndarray) -> np.ndarray:
    """ln u for float32 u in [2^-24, 1)."""
    bits = u.view(np.uint32) - np.uint32(0x3F3504F3)
    e = (bits.view(np.int32) >> 23).astype(np.float32)
    f = ((bits & np.uint32(0x7FFFFF)) + np.uint32(0x3F3504F3)).view(np.float32) - _f32(1)
    f2 = f * f
    y = _polynomial(f, _LOG) * f * f2
    y = y + e * _f32(-2.12194440e-4)
    y = y - _f32(0.5) * f2
    return (f + y) + e * _f32(0.693359375)


def _box_muller(word0: np.ndarray, word1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    u = ((word0 >> np.uint64(9)).astype(np.float32) + _f32(0.5)) * _f32(2.0**-23)
    r = np.sqrt(_f32(-2) * _log_unit(u))
    turn = word1.astype(np.uint32) >> np.uint32(8)
    quadrant = turn >> np.uint32(22)
    centred = (turn & np.uint32(0x3FFFFF)).astype(np.int32) - np.int32(0x200000)
    theta = (centred.astype(np.float32) + _f32(0.5)) * _f32(3.7450704e-7)
    t2 = theta * theta
    sine = _polynomial(t2, _SIN) * t2 * theta + theta
    cosine = _polynomial(t2, _COS) * t2 * t2 - _f32(0.5) * t2 + _f32(1)
    odd = (quadrant & np.uint32(1)).astype(bool)
    first, second = np.where(odd, sine, cosine), np.where(odd, cosine, sine)
    first = np.where((quadrant + np.uint32(1)) & np.uint32(2), -first, first)
    second = np.where(quadrant & np.uint32(2), -second, second)
    return r * first, r * second
