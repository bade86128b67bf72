"""Cases of the adaln_attention op: blocks of real models, and awkward ones for the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastdiff.ops._contract import Call, Example

Tensor = torch.Tensor


def example(
    name: str,
    shape: tuple[int, int, int],
    heads: int,
    head_dim: int = 0,
    extra: int = 0,
    extra_width: int = 0,
    keys_only: bool = False,
    bias: bool = True,
    norm: str = "none",
    rope: bool = False,
    known: bool = False,
    modulation: str = "row",
    wide: bool = False,
    values: Callable[[Tensor], Tensor] | None = None,
    edit: Callable[[Call], Call] | None = None,
    **options: Any,
) -> Example:
    """A case with random numbers, the same on every machine.

    shape: [B, S, C]; head_dim: C // heads unless given. extra: tokens of a second stream, of
    extra_width channels (C unless given), which with keys_only has no result. rope: tables for
    both streams. known: the statistics of x are given. modulation: chunks of one [B, 6 C] ("row"),
    of [B, 1, 6 C] ("row 1") or of [B, S, 6 C] ("token"); wide: in float32. values: edits x.
    """

    def make(device: torch.device | str, dtype: torch.dtype) -> Call:
        generator = torch.Generator().manual_seed(23)
        width = head_dim or shape[2] // heads
        wider = torch.promote_types(dtype, torch.float32)

        def random(*size: int, times: float = 1.0, to: torch.dtype = dtype) -> Tensor:
            return (torch.randn(size, generator=generator) * times).to(device=device, dtype=to)

        def layer(columns: int, rows: int) -> tuple[Tensor, Tensor | None]:
            """Weights are scaled as when trained."""
            weight = random(rows, columns, times=columns**-0.5)
            return weight, random(rows, times=0.1) if bias else None

        def stream(tokens: int, channels: int, result: bool = True) -> dict[str, Tensor | None]:
            x = random(shape[0], tokens, channels)
            x = x if values is None else values(x.float()).to(x)
            sizes = {"row": (), "row 1": (1,), "token": (tokens,)}[modulation]
            chunks = random(shape[0], *sizes, 6 * channels, to=wider if wide else dtype)
            made: dict[str, Tensor | None] = {"x": x}
            made |= zip(("shift", "scale", "gate"), chunks.chunk(6, -1), strict=False)
            made["qkv_weight"], made["qkv_bias"] = layer(channels, 3 * heads * width)
            made["out_weight"], made["out_bias"] = layer(heads * width, channels)
            if norm != "none":
                made |= {f"{of}_weight": 1 + random(width, times=0.2) for of in ("q", "k")}
            if rope:
                angles = torch.randn(tokens, width // 2, generator=generator)
                angles = angles.repeat_interleave(2, 1).to(device, wider)
                made |= {"cos": angles.cos(), "sin": angles.sin()}
            if known:
                variance, made["mean"] = torch.var_mean(x.to(wider), -1, correction=0)
                made["rstd"] = torch.rsqrt(variance + options.get("eps", 1e-6))
            if not result:
                for of in ("gate", "out_weight", "out_bias", "q_weight"):
                    made.pop(of, None)
            return made

        given: dict[str, Any] = stream(*shape[1:])
        given["num_heads"] = heads
        if norm != "none":
            given["norm"] = norm
        if extra:
            second = stream(extra, extra_width or shape[2], not keys_only)
            given |= {f"extra_{of}": value for of, value in second.items()}
        call = Call((given.pop("x"),), {**given, **options})
        return edit(call) if edit else call

    return Example(name, make)


EXAMPLES = (
    example("DiT-XL/2 256x256", (2, 256, 1152), 16),
    example("DiT-XL/2 512x512", (2, 1024, 1152), 16),
    example("PixArt-alpha 512x512", (2, 1024, 1152), 16, modulation="row 1"),
    example("SD3-medium joint 4096 + 333", (2, 4096, 1536), 24, extra=333),
    example("FLUX joint 4096 + 512, QK-norm, RoPE", (1, 4096, 3072), 24, extra=512, norm="rms",
            rope=True),
)  # fmt: skip


def _sliced(call: Call) -> Call:
    """Tokens of a longer sequence, and weights that are columns of wider ones."""
    x = call.args[0]
    kwargs = {
        name: torch.cat([t, t], 1)[:, : t.shape[1]] if name in ("qkv_weight", "out_weight")
        else t for name, t in call.kwargs.items()
    }  # fmt: skip
    return Call((torch.cat([x, x], 1)[:, : x.shape[1]],), kwargs)


def _transposed(call: Call) -> Call:
    """Channels are strided, as patch embedding leaves them."""
    return Call((call.args[0].transpose(1, 2).contiguous().transpose(1, 2),), call.kwargs)


def _batch_inside(call: Call) -> Call:
    """Tokens first: [S, B, C] in memory."""
    return Call((call.args[0].transpose(0, 1).contiguous().transpose(0, 1),), call.kwargs)


def _expanded(call: Call) -> Call:
    """One modulation for the batch."""
    names = ("shift", "scale", "gate")
    one = {name: call.kwargs[name][:1].expand_as(call.kwargs[name]) for name in names}
    return Call(call.args, {**call.kwargs, **one})


_EVERYTHING: dict[str, Any] = {"norm": "rms", "rope": True, "return_statistics": True}
SAMPLES = (
    # The first three are also gradient cases. Statistics are asked of many rows: a mean's error is
    # an average of roundings, and over a few rows luck decides whose largest is the larger.
    example("two heads, statistics", (2, 70, 16), 2, return_statistics=True),
    example("joint with everything", (2, 40, 16), 2, extra=39, known=True, **_EVERYTHING),
    example("text gives keys only, without bias", (2, 5, 16), 1, extra=3, keys_only=True,
            bias=False, norm="layer"),
    example("one token, one head", (1, 1, 8), 1),
    example("one token of each image", (3, 1, 16), 2),
    # Full tiles of K, and rows, columns and images that fill none.
    example("whole K, statistics", (2, 66, 64), 2, head_dim=32, return_statistics=True),
    example("whole K, joint", (1, 65, 64), 1, extra=33, extra_width=128, return_statistics=True),
    example("head dimension 72", (1, 20, 144), 2),
    example("heads wider than x", (1, 18, 24), 2, head_dim=40),
    example("odd width", (2, 35, 19), 3, head_dim=8, return_statistics=True),
    # More parts of a row than the combining kernel takes at a time.
    example("wide row", (1, 40, 1032), 1, head_dim=8, return_statistics=True),
    example("streams of other widths", (2, 17, 32), 2, head_dim=16, extra=9, extra_width=24),
    example("statistics known", (2, 66, 40), 1, known=True, return_statistics=True),
    example("modulation with a dimension of one", (2, 18, 32), 2, modulation="row 1"),
    example("modulation per token", (2, 18, 32), 2, modulation="token"),
    example("modulation in float32", (2, 18, 32), 2, wide=True, extra=5),
    example("one modulation for the batch", (3, 17, 32), 2, edit=_expanded),
    example("tokens of a longer sequence", (2, 18, 32), 2, edit=_sliced),
    example("batch inside", (3, 18, 32), 2, edit=_batch_inside),
    example("channels are strided", (2, 18, 32), 2, edit=_transposed),
    example("mean far above the deviation", (1, 67, 64), 2, values=lambda x: x / 4 + 30,
            return_statistics=True),
    example("large x", (1, 18, 32), 2, values=lambda x: x * 3e3),
    example("eps", (1, 67, 32), 2, values=lambda x: x * 1e-2, eps=1e-3, return_statistics=True),
    example("a batch", (3, 6, 16), 2, extra=4, norm="rms", qk_eps=1e-5),
    example("joint, keys only, RoPE", (2, 17, 32), 2, extra=9, keys_only=True, rope=True),
    example("empty batch", (0, 4, 16), 2, extra=3, return_statistics=True),
)  # fmt: skip
