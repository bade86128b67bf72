"""What is special to timestep_mlp: bad input, the modules it replaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdiff.ops import timestep_mlp

T, W1, W2 = torch.zeros(3), torch.zeros(6, 8), torch.zeros(4, 6)
BAD = [
    ((T[None], W1, None, W2, None), {}, ValueError, r"t must have shape \[S\], got \(1, 3\)"),
    ((T, W1[0], None, W2, None), {}, ValueError, r"w1 must have shape \[H, E\], got \(8,\)"),
    ((T, W1.int(), None, W2, None), {}, TypeError, "w1 must be float32"),
    ((T, W1, T, W2, None), {}, ValueError, r"b1 must have shape \(6,\), got \(3,\)"),
    ((T, W1, None, W1, None), {}, ValueError, r"w2 must have shape \[N, 6\] with N > 0, got"),
    ((T, W1, None, W2.half(), None), {}, TypeError, "w2 must be torch.float32 like w1"),
    ((T, W1, None, W2, T), {}, ValueError, r"b2 must have shape \(4,\), got \(3,\)"),
    ((T, W1.to("meta"), None, W2, None), {}, ValueError, "w1 must be on cpu like t, got meta"),
    ((T, W1, None, W2, None), {"impl": "cpp"}, ValueError, "impl must be 'auto' or one of"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD)
def test_bad_input(args: Any, kwargs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        timestep_mlp(*args, True, 0.0, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("post", [None, "silu"])
def test_is_the_diffusers_modules(post: str | None, dtype: torch.dtype) -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    projection = embeddings.Timesteps(32, flip_sin_to_cos=True, downscale_freq_shift=0)
    mlp = embeddings.TimestepEmbedding(32, 48, post_act_fn=post).to(dtype)
    t = torch.arange(0, 1000, 50)
    first, second = mlp.linear_1, mlp.linear_2
    with torch.no_grad():
        expected = mlp(projection(t).to(dtype))
        layers = (first.weight, first.bias, second.weight, second.bias)
        result = timestep_mlp(t, *layers, True, 0.0, final_silu=post == "silu")
    assert torch.equal(result, expected)


def test_steps_do_not_depend_on_the_schedule() -> None:
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(0, 1000, 100, dtype=torch.float64)
    w1 = torch.randn(16, 8, dtype=torch.float64, generator=generator)
    w2 = torch.randn(4, 16, dtype=torch.float64, generator=generator)
    together = timestep_mlp(t, w1, None, w2, None, True, 0.0)
    alone = torch.cat([timestep_mlp(step[None], w1, None, w2, None, True, 0.0) for step in t])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
