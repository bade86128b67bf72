"""Where noise comes from: seeds (bits and statistics: tests/csrc/test_philox.py) and generators."""

from __future__ import annotations

import pytest
import torch

from fastdiff._philox import reference_normal
from fastdiff.solvers.noise import INITIAL_DRAW, GeneratorNoise, PhiloxNoise

CPU = torch.device("cpu")


def test_seeded_noise_is_one_stream_per_image_in_the_states_dtype():
    seeds = [2**64 - 1, 6]
    source = PhiloxNoise((2, 3, 5), seeds, state_dtype=torch.float64, device=CPU)
    for index in (1, 0):  # any order
        expected = reference_normal((2, 3, 5), seeds, index, CPU)
        assert torch.equal(source.draw(index), expected.double())
    assert torch.equal(
        source.initial(), reference_normal((2, 3, 5), seeds, INITIAL_DRAW, CPU).double()
    )


def test_generator_noise_is_torch_randn_in_order():
    shape = (2, 3, 4, 4)
    source = GeneratorNoise(
        shape,
        torch.Generator().manual_seed(3),
        dtype=torch.float16,
        state_dtype=torch.float32,
        device=CPU,
    )
    generator = torch.Generator().manual_seed(3)
    for z in (source.initial(), source.draw(0), source.draw(1)):
        expected = torch.randn(shape, generator=generator, dtype=torch.float16)
        assert torch.equal(z, expected.float())


def test_one_generator_per_image_gives_each_image_its_own_noise():
    def make(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return GeneratorNoise(
            (len(seeds), 5), generators, dtype=torch.float32, state_dtype=torch.float32, device=CPU
        )

    both, one = make([1, 2]), make([2])
    for _ in range(3):
        assert torch.equal(both.draw(0)[1:], one.draw(0))


@pytest.mark.parametrize("seeds", [[-1], [2**64], [1, 2]])
def test_bad_seeds_are_refused(seeds):
    with pytest.raises(ValueError, match="seed"):
        PhiloxNoise((1, 4), seeds, state_dtype=torch.float32, device=CPU)
