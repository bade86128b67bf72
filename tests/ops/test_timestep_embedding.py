"""What is special to timestep_embedding: bad input, the bits of diffusers, large angles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastdiff.ops import timestep_embedding

T = torch.zeros(3)
BAD = [
    ((T.bool(), 8, True, 0.0), {}, TypeError, "t must be a float, int32 or int64 tensor"),
    ((T[None], 8, True, 0.0), {}, ValueError, r"t must have shape \[S\], got \(1, 3\)"),
    ((T, 1, True, 0.0), {}, ValueError, "dim must be at least 2, got 1"),
    ((T, 2, True, 1.0), {}, ValueError, "downscale_freq_shift must be below dim // 2 = 1, got 1.0"),
    ((T, 8, True, float("nan")), {}, ValueError, "downscale_freq_shift must be below dim // 2"),
    ((T, 8, True, 0.0, 0.0), {}, ValueError, "max_period must be positive and finite, got 0.0"),
    ((T, 8, True, 0.0, 1e4, float("inf")), {}, ValueError, "scale must be finite, got inf"),
    ((T, 8, True, 0.0), {"impl": "cpp"}, ValueError, "impl must be 'auto' or one of"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD)
def test_bad_input(args: Any, kwargs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        timestep_embedding(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("dim", "flip", "shift"), [(320, True, 0.0), (128, False, 1.0), (33, True, 0.5)]
)
def test_reference_has_the_bits_of_diffusers(
    dim: int, flip: bool, shift: float, dtype: torch.dtype
) -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    t = torch.arange(1000).to(dtype)
    for further in ({}, {"scale": 7.5}, {"max_period": 100}):
        expected = embeddings.get_timestep_embedding(t, dim, flip, shift, **further)
        result = timestep_embedding(t, dim, flip, shift, **further, impl="reference")
        assert torch.equal(result, expected)


def test_is_dits_embedding() -> None:
    """DiT writes cosines first and divides by half the width."""
    t = torch.arange(0, 1000, 20)
    frequency = torch.exp(-torch.log(torch.tensor(1e4).double()) * torch.arange(128) / 128)
    angle = t[:, None].double() * frequency
    expected = torch.cat([angle.cos(), angle.sin()], 1)
    result = timestep_embedding(t, 256, True, 0.0)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-4)


INTERPRETED = """
import torch
from fastdiff.ops import timestep_embedding

t = torch.arange(1000)
for dim, flip, shift in ((320, True, 0.0), (129, False, 1.0)):
    theirs = timestep_embedding(t, dim, flip, shift, impl="reference")
    mine = timestep_embedding(t, dim, flip, shift, impl="triton")
    # The same angles but for an exponential rounded the other way, which t multiplies.
    assert (mine - theirs).abs().max() <= 1.3e-4, (mine - theirs).abs().max()
    assert (mine != theirs).float().mean() < 0.1, (mine != theirs).float().mean()
t = torch.tensor([1e6, -3e7, 1e9, 1e30, torch.inf, torch.nan])
mine = timestep_embedding(t, 2, True, 0.0, impl="triton")
theirs = timestep_embedding(t, 2, True, 0.0, impl="reference")
assert torch.allclose(mine[:3], theirs[:3], rtol=0, atol=1e-6), (mine, theirs)
assert mine[3].abs().max() <= 1
assert mine[4:].isnan().all()
"""


@pytest.mark.interpret
def test_kernel_is_near_the_reference_at_every_step(fresh_python: Callable[..., str]) -> None:
    pytest.importorskip("triton")
    fresh_python("-W", "ignore", "-c", INTERPRETED, TRITON_INTERPRET="1")


def test_padding_stays_zero_for_nan() -> None:
    result = timestep_embedding(torch.tensor([torch.nan]), 5, True, 0.0)
    assert result[0, 4] == 0
    assert result[0, :4].isnan().all()
