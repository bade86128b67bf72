"""The noise streams: Philox's published vectors, the normals' error and statistics, and that C++ at
every instruction set level, CUDA and PyTorch give the same bits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch

from fastdiff import _philox
from fastdiff._ext import ext
from fastdiff.solvers.noise import INITIAL_DRAW

needs_ext = pytest.mark.skipif(ext() is None, reason="needs the extension")

# Random123's kat_vectors: (counter, key, words).
VECTORS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@needs_ext
@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_published_vectors_in_cpp(counter: list[int], key: list[int], words: list[int]) -> None:
    assert ext().philox4x32(counter, key) == words


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_published_vectors_in_torch(counter: list[int], key: list[int], words: list[int]) -> None:
    assert [int(w) for w in _philox.philox4x32(list(map(torch.tensor, counter)), key)] == words


def cpp_normal(shape: Sequence[int], seeds: Sequence[int], draw: int, threads: int = 2):
    out = torch.full(tuple(shape), math.nan)
    ext().philox_normal(
        out.data_ptr(), len(seeds), math.prod(shape[1:]), list(seeds), draw, threads
    )
    return out


def torch_normal(shape: Sequence[int], seeds: Sequence[int], draw: int) -> torch.Tensor:
    return _philox.reference_normal(shape, seeds, draw, "cpu")


STREAMS: list[Callable[..., torch.Tensor]] = [torch_normal]
if ext() is not None:
    STREAMS.append(cpp_normal)
EVERY_STREAM = pytest.mark.parametrize("stream", STREAMS, ids=lambda f: f.__name__)


@pytest.mark.parametrize("draw", [0, 5, INITIAL_DRAW])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1),
        (2, 3),  # less than one counter
        (1, 4, 64, 64),
        (3, 3, 5, 7),  # 105 elements: ends inside a counter
        (2, 4099),  # ends inside a block
    ],
)
def test_same_bits(shape: tuple[int, ...], draw: int) -> None:
    seeds = [2**64 - 1, 2**40 + 7, 0][: shape[0]]
    expected = torch_normal(shape, seeds, draw)
    for stream in STREAMS:
        assert torch.equal(stream(shape, seeds, draw), expected), stream.__name__


@EVERY_STREAM
def test_an_image_does_not_depend_on_its_batch(stream: Callable[..., torch.Tensor]) -> None:
    seeds = [3, 1, 4, 1 << 33]
    together = stream((4, 3, 5, 7), seeds, 2)
    for image, seed in zip(together, seeds, strict=True):
        assert torch.equal(stream((1, 3, 5, 7), [seed], 2)[0], image)


@EVERY_STREAM
def test_streams_differ(stream: Callable[..., torch.Tensor]) -> None:
    """Another seed (in either word) or draw gives other, uncorrelated numbers."""
    n = 1 << 14
    pairs = itertools.product([0, 1, 1 << 32, (1 << 32) + 1], [0, 1, INITIAL_DRAW])
    streams = torch.stack([stream((1, n), [seed], draw)[0] for seed, draw in pairs])
    correlation = torch.corrcoef(streams.double()) - torch.eye(len(streams))
    assert correlation.abs().max() < 5 / math.sqrt(n)  # 66 pairs at 5 sigma


@needs_ext
def test_threads_do_not_change_the_numbers() -> None:
    one = cpp_normal((3, 40000), [1, 2, 3], 0, threads=1)
    for threads in (2, 3, 7):
        assert torch.equal(cpp_normal((3, 40000), [1, 2, 3], 0, threads=threads), one)


LEVELS = """
import hashlib, torch
from fastdiff import _philox
from fastdiff._ext import ext
out = torch.empty(2, 5003)
ext().philox_normal(out.data_ptr(), 2, 5003, [7, 2**50], 3, 1)
print(ext().isa_level(), hashlib.sha256(out.numpy().tobytes()).hexdigest())
"""


@needs_ext
def test_every_instruction_set_level_gives_the_same_bits(fresh_python: Callable[..., str]) -> None:
    digests = {}
    for level in range(ext().isa_level() + 1):
        used, digest = fresh_python("-c", LEVELS, FASTDIFF_ISA_MAX=str(level)).split()
        assert int(used) == level
        digests[level] = digest
    assert len(set(digests.values())) == 1, digests


def exact(word0: torch.Tensor, word1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """csrc/philox.h's formulas in float64."""
    u = ((word0 >> 9).double() + 0.5) * 2.0**-23
    angle = ((word1 >> 8).double() + 0.5) * 2.0**-24 * 2 * math.pi - math.pi / 4
    radius = torch.sqrt(-2 * torch.log(u))
    return radius * torch.cos(angle), radius * torch.sin(angle)


def worst_error(word0: torch.Tensor, word1: torch.Tensor) -> float:
    pairs = zip(_philox._box_muller(word0, word1), exact(word0, word1), strict=True)
    return max(float((mine - theirs).abs().max()) for mine, theirs in pairs)


def test_normals_are_within_1e_6_of_the_formula() -> None:
    """At every radius (angle 0 is where the cosine is largest) and at the largest radius for every
    fourth angle; the bits are those of every other implementation."""
    every_radius = torch.arange(2**23) << 9
    upright = torch.full_like(every_radius, 2**29)  # angle 0
    assert worst_error(every_radius, upright) < 1e-6
    angles = torch.arange(0, 2**24, 4) << 8
    assert worst_error(torch.zeros_like(angles), angles) < 1e-6


def test_statistics() -> None:
    """Moments of 2^22 normals within 5 standard errors, and Kolmogorov-Smirnov at 1e-4."""
    n = 1 << 22
    stream = STREAMS[-1]
    z = stream((4, n // 4), [0, 1, 2, 3], 0).flatten().double()
    assert abs(float(z.mean())) < 5 / math.sqrt(n)
    assert abs(float((z**2).mean()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((z**3).mean())) < 5 * math.sqrt(15 / n)
    assert abs(float((z**4).mean()) - 3) < 5 * math.sqrt(96 / n)
    for lag in (1, 2, 3, 4, 64):
        assert abs(float((z[lag:] * z[:-lag]).mean())) < 5 / math.sqrt(n), lag
    # Squares too: the two normals of a pair share their radius.
    for lag in (1, 2, 3):
        products = ((z[lag:] ** 2 - 1) * (z[:-lag] ** 2 - 1)).mean()
        assert abs(float(products)) < 5 * 2 / math.sqrt(n), lag
    ordered = z.sort().values
    cdf = torch.special.ndtr(ordered)
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    distance = max(float((steps - cdf).max()), float((cdf - steps).max()) + 1 / n)
    assert distance < 2.23 / math.sqrt(n)  # the Kolmogorov distribution's 1e-4 quantile


BAD = [
    ({"counter": [0] * 3, "key": [0, 0]}, ValueError, "counter must hold 4 words and key 2"),
    ({"counter": [0] * 4, "key": [0]}, ValueError, "counter must hold 4 words and key 2"),
    ({"counter": [-1, 0, 0, 0], "key": [0, 0]}, TypeError, "philox4x32"),
]


@needs_ext
@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ext().philox4x32(**arguments)


@needs_ext
def test_seeds_are_one_per_image() -> None:
    out = torch.empty(2, 4)
    with pytest.raises(ValueError, match="seeds must hold one number per image"):
        ext().philox_normal(out.data_ptr(), 2, 4, [1], 0, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 3), (3, 3, 5, 7), (1, 4, 64, 64)])
def test_same_bits_on_the_gpu(shape: tuple[int, ...]) -> None:
    seeds = [2**64 - 1, 2**40 + 7, 0][: shape[0]]
    expected = torch_normal(shape, seeds, INITIAL_DRAW)
    for stream in (_philox.reference_normal, _philox.normal):  # the second by CUDA where built
        result = stream(shape, seeds, INITIAL_DRAW, "cuda")
        assert result.is_cuda
        assert torch.equal(result.cpu(), expected), stream.__name__
