"""Noise: the Philox stream's bits and statistics, and the order of torch's draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastdiff._ext import ext
from fastdiff.solvers import noise
from fastdiff.solvers.noise import INITIAL_DRAW, GeneratorNoise, PhiloxNoise

CPU = torch.device("cpu")


def _words(counter, key):
    arrays = [np.array([word], dtype=np.uint64) for word in counter]
    return [int(word[0]) for word in noise.philox4x32(arrays, key)]


def test_philox_known_answers():
    """The vectors published with Random123 (kat_vectors, philox4x32 with 10 rounds)."""
    ones = 0xFFFFFFFF
    assert _words([0] * 4, (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert _words([ones] * 4, (ones, ones)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    digits = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    expected = [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    assert _words(digits, (0xA4093822, 0x299F31D0)) == expected


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1, 0x0123456789ABCDEF])
@pytest.mark.parametrize("draw", [0, 1, 999, INITIAL_DRAW])
def test_extension_and_numpy_give_the_same_bits(seed, draw):
    if not hasattr(ext(), "philox_normal"):
        pytest.skip("the extension is not built")
    for numel in (1, 3, 4, 5, 1023, 16384):
        by_extension = noise.philox_normal((1, numel), [seed], draw)[0].numpy()
        by_numpy = noise._philox_normal_numpy(numel, seed, draw)
        assert by_extension.tobytes() == by_numpy.tobytes()


def test_philox_normals_are_normal():
    n = 2_000_000
    z = noise._philox_normal_numpy(n, 12345, 7).astype(np.float64)
    assert np.isfinite(z).all()
    # Four standard errors of each moment of a unit normal.
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)
    # Kolmogorov-Smirnov at the 1e-4 level, and no correlation between neighbours of a block.
    ordered = np.sort(z)
    cdf = 0.5 * (1 + torch.erf(torch.from_numpy(ordered) / math.sqrt(2)).numpy())
    assert np.abs(cdf - (np.arange(n) + 0.5) / n).max() < 2.23 / math.sqrt(n)
    blocks = z.reshape(-1, 4)
    off_diagonal = np.corrcoef(blocks.T) - np.eye(4)
    assert np.abs(off_diagonal).max() < 5 / math.sqrt(n / 4)


def test_philox_log_sine_and_cosine_are_accurate():
    words = np.concatenate([np.arange(4096), 2**32 - 1 - np.arange(4096)]).astype(np.uint64)
    words = np.concatenate([words, np.random.default_rng(0).integers(0, 2**32, 100_000)])
    words = words.astype(np.uint64)
    turns = words[::-1].copy()
    first, second = noise._box_muller(words, turns)
    u = ((words >> np.uint64(9)).astype(np.float64) + 0.5) / 2**23
    r = np.sqrt(-2 * np.log(u))
    angle = 2 * np.pi * (((turns >> np.uint64(8)).astype(np.float64) + 0.5) / 2**24 - 0.125)
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(first, r * np.cos(angle), atol=6 * 4 * eps)
    np.testing.assert_allclose(second, r * np.sin(angle), atol=6 * 4 * eps)


def test_images_streams_and_draws_are_independent_of_each_other():
    z = noise.philox_normal((2, 100_000), [5, 6], 0).double()
    w = noise.philox_normal((2, 100_000), [5, 6], 1).double()
    for a, b in ((z[0], z[1]), (z[0], w[0]), (z[1], w[0])):
        assert abs((a * b).mean().item()) < 4 / math.sqrt(100_000)


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
