"""Cases of the attention op: the shapes of real models, and awkward ones for the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fastdiff.ops._contract import Call, Example

Tensor = torch.Tensor


def example(
    name: str,
    shape: tuple[int, int, int, int],
    keys: int | None = None,
    extra: int = 0,
    extra_queries: bool = True,
    norm: str = "none",
    weights: bool = True,
    rope: Iterable[str] = (),
    lengths: tuple[int, ...] = (),
    extra_lengths: tuple[int, ...] = (),
    masked: Callable[[Tensor], Tensor] | None = None,
    fused: bool = False,
    magnitude: float = 1.0,
    v_magnitude: float = 1.0,
    wide_tables: bool = True,
    edit: Callable[[Call], Call] | None = None,
    **options: Any,
) -> Example:
    """A case with random numbers. shape: [B, Sq, H, D]; keys: Sk, else Sq; extra: tokens of the
    second segment; fused: q, k and v are views of one [B, S, 3, H, D]; rope: "main", "extra";
    masked(mask) edits a mask of ones; wide_tables: tables and weights are float32."""

    def make(device: torch.device | str, dtype: torch.dtype) -> Call:
        generator = torch.Generator().manual_seed(23)
        batch, queries, heads, width = shape

        def random(*size: int, times: float = 1.0, to: torch.dtype = dtype) -> Tensor:
            return (torch.randn(size, generator=generator) * times).to(device=device, dtype=to)

        def segment(queries: int, keys: int) -> tuple[Tensor, ...]:
            if fused:
                return random(batch, queries, 3, heads, width, times=magnitude).unbind(2)
            return (
                random(batch, queries, heads, width, times=magnitude),
                random(batch, keys, heads, width, times=magnitude),
                random(batch, keys, heads, width, times=v_magnitude),
            )

        many = queries if keys is None else keys
        q, k, v = segment(queries, many)
        given: dict[str, Any] = {}
        if extra:
            given = dict(zip(("extra_q", "extra_k", "extra_v"), segment(extra, extra), strict=True))
            if not extra_queries:
                del given["extra_q"]
        table_dtype = torch.float32 if wide_tables and dtype != torch.float64 else dtype
        if norm != "none":
            given["norm"] = norm
        if norm != "none" and weights:
            for of in ("q", "k", "extra_q", "extra_k"):
                if of in ("q", "k") or of in given:
                    given[f"{of}_weight"] = 1 + random(width, times=0.2, to=table_dtype)
        for which, rows in (("main", max(queries, many)), ("extra", extra)):
            if which in rope:
                angles = random(rows, width // 2, to=torch.float32).repeat_interleave(2, 1)
                prefix = "" if which == "main" else "extra_"
                given[f"{prefix}cos"] = angles.cos().to(table_dtype)
                given[f"{prefix}sin"] = angles.sin().to(table_dtype)
        if lengths:
            given["key_lengths"] = torch.tensor(lengths, device=device)
        if extra_lengths:
            given["extra_key_lengths"] = torch.tensor(
                extra_lengths, device=device, dtype=torch.int32
            )
        if masked is not None:
            mask = torch.ones(batch, many + extra, dtype=torch.bool)
            given["key_mask"] = masked(mask).to(device)
        call = Call((q, k, v), {**given, **options})
        return edit(call) if edit else call

    return Example(name, make)


EXAMPLES = (
    example("SD1.5 mid block 8x8", (2, 64, 8, 160)),
    example("SD1.5 cross 64x64, 77 keys", (2, 4096, 8, 40), 77),
    example("SD1.5 self 64x64", (2, 4096, 8, 40), fused=True),
    example("SD1.5 self 32x32", (2, 1024, 8, 80), fused=True),
    example("SDXL self 64x64", (2, 4096, 10, 64), fused=True),
    example("SDXL self 32x32", (2, 1024, 20, 64), fused=True),
    example("SDXL cross 32x32, 77 keys", (2, 1024, 20, 64), 77),
    example("SD3 joint 4096 + 333", (2, 4096, 24, 64), extra=333, fused=True),
    example(
        "FLUX joint 4096 + 512, QK-norm, RoPE", (1, 4096, 24, 128), extra=512, norm="rms",
        rope=("main", "extra"), fused=True,
    ),
    example("DiT-XL/2 256x256", (2, 256, 16, 72), fused=True),
    example("PixArt cross 64x64, 120 padded keys", (2, 4096, 16, 72), 120, lengths=(17, 120)),
)  # fmt: skip


def _heads_first(call: Call) -> Call:
    """Views of [B, S, H, 3 * D]: head by head q, k and v."""
    fused = torch.cat(call.args, -1)
    return Call(fused.chunk(3, -1), call.kwargs)


def _one_table(call: Call) -> Call:
    """Both segments' tables are parts of one."""
    kwargs = dict(call.kwargs)
    for name in ("cos", "sin"):
        both = torch.cat([kwargs[f"extra_{name}"], kwargs[name]])
        kwargs[name] = both[len(kwargs[f"extra_{name}"]) :]
        kwargs[f"extra_{name}"] = both
    return Call(call.args, kwargs)


def _largest(call: Call) -> Call:
    """+-65504 (float16) or +-2^50 in four columns of q and k: the largest logits there are, many of
    them tied, and exact in float32, so that only the softmax can go wrong."""
    q, k, v = call.args
    most = 65504.0 if q.dtype == torch.float16 else 2.0**50
    few = (torch.arange(q.shape[-1], device=q.device) < 4) * most
    return Call(((torch.sign(q) * few).to(q), (torch.sign(k) * few).to(k), v), call.kwargs)


def _every_other(mask: Tensor) -> Tensor:
    mask[:, ::2] = False
    return mask


def _first_image_dead(mask: Tensor) -> Tensor:
    mask[0] = False
    return mask


_BOTH = ("main", "extra")
SAMPLES = (
    # The first three are also gradient cases.
    example("joint, RMS, RoPE, lse", (2, 5, 1, 8), extra=3, norm="rms", rope=_BOTH,
            return_lse=True),
    example("layer norm, lengths", (2, 3, 1, 16), 7, norm="layer", lengths=(4, 0)),
    example("mask, lse", (2, 4, 2, 8), 6, masked=_first_image_dead, return_lse=True),
    example("one query, one key, one head", (1, 1, 1, 8), 1),
    # Every kind of split: 8 and 16 are one piece with and without columns to spare, 24 and 56 are
    # cheaper as one, 40 and 72 mask the second piece, 88 and 136 most of it.
    *(
        example(f"head dimension {d}", (1, 37, 1, d), 41)
        for d in (16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 128, 136, 160, 192, 200, 256)
    ),
    example("one query, many keys", (1, 1, 1, 40), 600, return_lse=True),
    example("split keys, two segments, lengths", (2, 9, 1, 40), 500, extra=301,
            extra_queries=False, lengths=(499, 13), extra_lengths=(0, 301)),
    example("split keys, mask, nothing in one image", (2, 9, 1, 16), 600,
            masked=_first_image_dead, return_lse=True),
    example("split keys, joint", (1, 66, 1, 40), 380, extra=30, return_lse=True),
    # Keys that fill blocks and miss them by one, either way.
    *(example(f"{keys} keys", (1, 65, 1, 16), keys) for keys in (63, 64, 65, 127, 129)),
    example("odd lengths, three heads", (1, 131, 3, 24), 77),
    example("fused QKV", (2, 33, 2, 40), fused=True),
    example("fused QKV, head by head", (2, 33, 2, 40), edit=_heads_first),
    example("fused joint", (2, 33, 1, 40), extra=19, fused=True),
    example("keys of a second segment only", (2, 20, 2, 16), 30, extra=11, extra_queries=False),
    example("RoPE on one segment", (1, 20, 2, 40), extra=7, rope=("main",)),
    example("RoPE on the other", (1, 20, 2, 72), extra=7, rope=("extra",), norm="layer"),
    example("one RoPE table for both", (1, 9, 2, 40), extra=21, rope=_BOTH, edit=_one_table),
    example("RoPE of other lengths", (1, 20, 1, 16), 33, rope=("main",)),
    example("RMS without weights", (2, 20, 2, 40), 33, norm="rms", weights=False),
    example("layer norm, wide head", (1, 20, 1, 160), norm="layer", rope=("main",)),
    example("weights and tables like q", (2, 20, 2, 24), norm="rms", rope=("main",),
            wide_tables=False),
    example("lengths and mask", (2, 18, 2, 16), 70, lengths=(70, 33), masked=_every_other),
    example("scale", (1, 18, 2, 16), scale=1.0),
    example("sharp", (1, 40, 2, 40), magnitude=6.0),
    example("large logits", (1, 18, 1, 64), 70, edit=_largest),
    example("large values", (1, 18, 1, 40), 70, v_magnitude=1.5e4),
    example("small values", (1, 18, 1, 40), 70, magnitude=1e-6, v_magnitude=1e-6),
    example("no queries", (2, 0, 2, 16), 5),
    example("a batch", (3, 5, 2, 16), 7, extra=4, lengths=(7, 0, 3), return_lse=True),
    example("empty batch", (0, 5, 2, 16), 7, extra=4),
)  # fmt: skip
