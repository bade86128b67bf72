"""Where a run's normal noise comes from: torch generators, or one Philox stream per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastdiff._philox import normal

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

    def states(self) -> list[Tensor]:
        """The generators' states, uint8, one per generator; see :meth:`resumed`."""
        return [_actual(one, self._device).get_state() for one in self._generators]

    @classmethod
    def resumed(
        cls,
        shape: Sequence[int],
        states: Sequence[Tensor],
        *,
        dtype: torch.dtype,
        state_dtype: torch.dtype,
        device: torch.device,
    ) -> GeneratorNoise:
        """Noise that goes on where :meth:`states` were taken, with generators of its own."""
        generators = []
        for state in states:
            # A CPU generator's state is the 5,056 bytes of a Mersenne twister, a GPU's a few words.
            generator = torch.Generator(device if state.numel() < 5000 else "cpu")
            generator.set_state(state)
            generators.append(generator)
        which = generators[0] if len(generators) == 1 and shape[0] != 1 else generators
        return cls(shape, which, dtype=dtype, state_dtype=state_dtype, device=device)

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


def _actual(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """The generator that draws where None was given."""
    if generator is not None:
        return generator
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or torch.cuda.current_device()]
    return torch.default_generator


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
        return normal(self._shape, self.seeds, index, self._device).to(self._state_dtype)


def beside(seed: int) -> int:
    """Another seed for the same image, whose stream has nothing in common with ``seed``'s."""
    return seed ^ 2**63
