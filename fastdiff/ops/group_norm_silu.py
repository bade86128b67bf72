"""group_norm_silu: y = act((GroupNorm(x + add) * weight + bias) * (1 + scale) + shift).

With a skip, x stands for cat([x, skip], 1), which the fused kernels do not make.

GroupNorm: Wu and He, 2018, https://arxiv.org/abs/1803.08494. add, scale and shift are the forms in
which diffusion U-Nets inject the time embedding: added to the convolution's output (Stable
Diffusion) or as scale and shift (ADM, https://arxiv.org/abs/2105.05233, adaptive group norm).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from fastdiff import tuning
from fastdiff._ext import DTYPE_CODES, ext, ext_status
from fastdiff.ops._contract import AotConfig, Call, Example, Implementation, Op, Tuning, register
from fastdiff.ops._strides import why_not_triton

Tensor = torch.Tensor
ACTIVATIONS = ("none", "silu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
    skip: Tensor | None = None,
) -> Tensor:
    """The op in plain PyTorch, in the widest dtype among the arguments; the result has x's."""
    dtype = x.dtype
    for tensor in (weight, bias, add, scale, shift):
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)

    def rows(row: Tensor) -> Tensor:
        return row.to(dtype).reshape(*row.shape, *[1] * (x.dim() - 2))

    y = (x if skip is None else torch.cat([x, skip], 1)).to(dtype)
    if add is not None:
        y = y + rows(add)
    y = torch.group_norm(
        y,
        num_groups,
        None if weight is None else weight.to(dtype),
        None if bias is None else bias.to(dtype),
        eps,
    )
    if scale is not None:
        y = y * (1 + rows(scale))
    if shift is not None:
        y = y + rows(shift)
    if activation == "silu":
        y = torch.nn.functional.silu(y)
    y = y.to(x.dtype)
    out = _empty_result(x, skip)  # x's memory format, whatever group_norm made of it
    return y if y.stride() == out.stride() else out.copy_(y)


def pattern(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
    skip: Tensor | None = None,
) -> Tensor:
    """The calls of a U-Net's residual block, in the inputs' own dtypes."""
    trailing = (..., *[None] * (x.dim() - 2))
    y = x if skip is None else torch.cat([x, skip], 1)
    y = y if add is None else y + add[trailing]
    y = torch.nn.functional.group_norm(y, num_groups, weight, bias, eps)
    if scale is not None:
        y = y * (1 + scale[trailing])
    if shift is not None:
        y = y + shift[trailing]
    return torch.nn.functional.silu(y) if activation == "silu" else y


def check(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
    skip: Tensor | None = None,
) -> None:
    """ValueError or TypeError for arguments outside the contract."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"x must have shape [N, C, ...], got {tuple(x.shape)}")
    batch, channels = x.shape[:2]
    of = "x"
    if skip is not None:
        _check_skip(x, skip)
        channels, of = channels + skip.shape[1], "x and skip"
    if num_groups < 1 or channels < 1 or channels % num_groups:
        raise ValueError(
            f"num_groups must divide the {channels} channels of {of}, got {num_groups}"
        )
    if any(size == 0 for size in x.shape[2:]):
        raise ValueError(f"x must have at least one pixel, got {tuple(x.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be positive and finite, got {eps}")
    if bias is not None and weight is None:
        raise ValueError("bias must come with weight, got weight=None")
    vector: tuple[int, ...] = (channels,)
    rows: tuple[int, ...] = (batch, channels)
    shapes = {"weight": vector, "bias": vector, "add": rows, "scale": rows, "shift": rows}
    given = {"weight": weight, "bias": bias, "add": add, "scale": scale, "shift": shift}
    seen: dict[bool, tuple[str, torch.dtype]] = {}
    for name, tensor in given.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} must have shape {shapes[name]}, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {tensor.device}")
        if tensor.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{name} must be {x.dtype} like x or float32, got {tensor.dtype}")
        first, dtype = seen.setdefault(name in ("weight", "bias"), (name, tensor.dtype))
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} like {first}, got {tensor.dtype}")


def _check_skip(x: Tensor, skip: Tensor) -> None:
    sizes = (skip.shape[0], *skip.shape[2:]) if skip.dim() == x.dim() else ()
    if sizes != (x.shape[0], *x.shape[2:]) or skip.shape[1] < 1:
        wanted = ", ".join(map(str, (x.shape[0], "C2", *x.shape[2:])))
        raise ValueError(f"skip must have shape [{wanted}], got {tuple(skip.shape)}")
    if skip.device != x.device:
        raise ValueError(f"skip must be on {x.device} like x, got {skip.device}")
    if skip.dtype != x.dtype:
        raise TypeError(f"skip must be {x.dtype} like x, got {skip.dtype}")


def memory_layout(*tensors: Tensor | None) -> str:
    """ "channels_first", "channels_last", or "" where the tensors do not share one of them."""
    given = [tensor for tensor in tensors if tensor is not None]
    if all(tensor.is_contiguous() for tensor in given):
        return "channels_first"
    last = all(tensor.movedim(1, -1).is_contiguous() for tensor in given)
    return "channels_last" if last else ""


def _empty_result(x: Tensor, skip: Tensor | None) -> Tensor:
    """Like x, or like cat([x, skip], 1) in their memory layout."""
    if skip is None:
        return torch.empty_like(x)
    sizes, channels = (x.shape[0], *x.shape[2:]), x.shape[1] + skip.shape[1]
    if memory_layout(x, skip) == "channels_last":
        return x.new_empty((*sizes, channels)).movedim(-1, 1)
    return x.new_empty((sizes[0], channels, *sizes[1:]))


def unsupported(x: Tensor, other: Tensor | None, other_name: str, *vectors: Tensor | None) -> str:
    """Why the fused kernels cannot take x, another tensor like it and per-channel ones, or ""."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"x is {x.dtype}; the kernels take float32, float16 and bfloat16"
    if not memory_layout(x):
        return f"x has strides {x.stride()}, neither contiguous nor channels last"
    if not memory_layout(x, other):
        assert other is not None
        return f"{other_name} has strides {other.stride()}, another memory layout than x"
    for vector in vectors:
        if vector is not None and vector.shape[-1] > 1 and vector.stride(-1) != 1:
            return "a per-channel argument has strided channels"
    return ""


def _cpp_supports(
    x,
    num_groups,
    weight=None,
    bias=None,
    add=None,
    scale=None,
    shift=None,
    eps=1e-5,
    activation="",
    skip=None,
) -> str:
    if x.device.type != "cpu":
        return f"it computes on the CPU, x is on {x.device}"
    return ext_status() or unsupported(x, skip, "skip", weight, bias, add, scale, shift)


def _cpp(
    x,
    num_groups,
    weight=None,
    bias=None,
    add=None,
    scale=None,
    shift=None,
    eps=1e-5,
    activation="silu",
    skip=None,
) -> Tensor:
    out = _empty_result(x, skip)
    run_cpp(x, out, num_groups, weight, bias, add, scale, shift, eps, activation, skip=skip)
    return out


def run_cpp(
    x: Tensor,
    out: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: str,
    skip: Tensor | None = None,
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    """Writes ``out``, and x + residual into ``total``, by the C++ kernel."""
    batch, channels = out.shape[:2]
    if out.numel() == 0:
        return

    def dtype_of(*vectors: Tensor | None) -> int:
        return next((DTYPE_CODES[v.dtype] for v in vectors if v is not None), 0)

    def pointer(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    def stride(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.stride(0)

    ext().group_norm_silu(  # type: ignore[union-attr]
        *(x.data_ptr(), pointer(add), stride(add), pointer(weight), pointer(bias)),
        *(pointer(scale), stride(scale), pointer(shift), stride(shift), out.data_ptr()),
        *(
            batch,
            channels,
            out.numel() // (batch * channels),
            num_groups,
            eps,
            activation == "silu",
        ),
        *(memory_layout(x, skip, residual) == "channels_last", DTYPE_CODES[x.dtype]),
        *(dtype_of(weight, bias), dtype_of(add, scale, shift), torch.get_num_threads()),
        *(pointer(skip), 0 if skip is None else skip.shape[1], pointer(residual), pointer(total)),
    )


def _triton_supports(
    x,
    num_groups,
    weight=None,
    bias=None,
    add=None,
    scale=None,
    shift=None,
    eps=1e-5,
    activation="",
    skip=None,
) -> str:
    return why_not_triton(x) or unsupported(x, skip, "skip", weight, bias, add, scale, shift)


def _triton(
    x,
    num_groups,
    weight=None,
    bias=None,
    add=None,
    scale=None,
    shift=None,
    eps=1e-5,
    activation="silu",
    skip=None,
) -> Tensor:
    from fastdiff.kernels import group_norm_silu as kernels

    out = _empty_result(x, skip)
    if out.numel():
        channels_last = memory_layout(x, skip) == "channels_last"
        rows = (add, scale, shift)
        plan = None
        if tuning.active():
            key = _tuning_key(x, num_groups, skip=skip)
            plan = tuning.plan(OP.name, key, lambda: _tuning_candidates(x, num_groups, skip=skip))
        silu = activation == "silu"
        kernels.launch(
            x, out, num_groups, weight, bias, *rows, eps, silu, channels_last, plan, skip=skip
        )
    return out


def _skip_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The skip among the arguments after num_groups."""
    return args[7] if len(args) > 7 else kwargs.get("skip")


def _tuning_key(x: Tensor, num_groups: int, *args, **kwargs) -> tuning.Key:
    skip = _skip_of(args, kwargs)
    if skip is None:
        return tuning_key(x, None, num_groups, x.shape[1])
    return tuning_key(x, skip, num_groups, x.shape[1] + skip.shape[1], (("skip", skip.shape[1]),))


def tuning_key(
    x: Tensor,
    other: Tensor | None,
    num_groups: int,
    channels: int,
    more: tuple[tuple[str, int], ...] = (),
) -> tuning.Key:
    """Of x and another tensor like it; channels: of the result."""
    pixels = x[:1, :1].numel()
    exact = (
        ("groups", num_groups),
        ("channels_last", memory_layout(x, other) == "channels_last"),
        ("odd", pixels % 16 != 0),
        *more,
    )
    sizes = (("N", x.shape[0]), ("C", channels), ("HW", pixels))
    return tuning.Key(x.device, x.dtype, sizes, exact)


def _tuning_candidates(
    x: Tensor, num_groups: int, *args, **kwargs
) -> Sequence[tuple[tuning.Choice, Any]]:
    skip = _skip_of(args, kwargs)
    return launches(x, num_groups, skip, "" if skip is None else "skip")


def launches(
    x: Tensor, num_groups: int, other: Tensor | None, second: str
) -> Sequence[tuple[tuning.Choice, Any]]:
    """A group in registers where it fits, and the split way with smaller blocks, more or fewer
    parts. second: what ``other`` is, in the terms of the launch policy."""
    from fastdiff.kernels import group_norm_silu as kernels

    last = memory_layout(x, other) == "channels_last"
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
    channels = x.shape[1]
    if second == "skip":
        assert other is not None
        channels += other.shape[1]
    shape = (x.shape[0], channels, x[:1, :1].numel(), num_groups, x.dtype, last)
    select = functools.partial(kernels.select, second=second, first=x.shape[1])
    chosen = select(*shape, 10 * major + minor)
    plans = [(kernels.TARGET_PROGRAMS, chosen)]
    blocks = [kernels.MAX_BLOCK_HW]
    while not last and blocks[-1] > kernels.MIN_BLOCK_HW:
        blocks.append(blocks[-1] // 2)
    for block_hw, programs in itertools.product(blocks, (2048, 1024, 4096)):
        plan = select(*shape, 10 * major + minor, True, block_hw, programs)
        if all(plan != known for _, known in plans):
            plans.append((programs, plan))

    def choice(programs: int, plan: Any) -> tuning.Choice:
        if plan.kind == "group":
            return {"kind": "group"}
        return {"kind": "split", "block_hw": plan.block_hw, "programs": programs}

    return [(choice(programs, plan), plan) for programs, plan in plans]


def bytes_moved(x: Tensor, num_groups: int, *args, **kwargs) -> int:
    """x and skip read once, y written once, every per-channel argument read once."""
    tensors = [x, *(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))]
    skip = _skip_of(args, kwargs)
    written = x.numel() + (0 if skip is None else skip.numel())
    return written * x.element_size() + sum(v.numel() * v.element_size() for v in tensors)


def flops(x: Tensor, num_groups: int, *args, **kwargs) -> int:
    """Per element: 4 for the statistics, 2 for one multiply-add, 4 for SiLU (exp counts as one)."""
    activation = kwargs.get("activation", args[6] if len(args) > 6 else "silu")
    skip = _skip_of(args, kwargs)
    elements = x.numel() + (0 if skip is None else skip.numel())
    return elements * (10 if activation == "silu" else 6)


def example(
    name: str,
    shape: tuple[int, ...],
    groups: int = 32,
    extras: Iterable[str] = (),
    channels_last: bool = False,
    affine: bool = True,
    activation: str = "silu",
    mean: float = 0.0,
    magnitude: float = 1.0,
    edit: Callable[[Call], Call] | None = None,
    skip: int = 0,
) -> Example:
    """A case with random numbers; extras: "add", "scale", "shift", "param32" (float32 weights).

    skip: how many of the channels in ``shape`` are the skip's.
    """

    def make(device: torch.device | str, dtype: torch.dtype) -> Call:
        generator = torch.Generator().manual_seed(17)

        def random(size: tuple[int, ...], to: torch.dtype = dtype) -> Tensor:
            return torch.randn(size, generator=generator).to(device=device, dtype=to)

        x = (torch.randn(shape, generator=generator) * magnitude + mean).to(device, dtype)
        parts = [part.contiguous() for part in x.split([shape[1] - skip, skip], 1)]
        if channels_last:
            parts = [part.movedim(1, -1).contiguous().movedim(-1, 1) for part in parts]
        rows = {key: random(shape[:2]) for key in ("add", "scale", "shift") if key in extras}
        vectors = {}
        if affine:
            to = torch.float32 if "param32" in extras else dtype
            vectors = {"weight": random(shape[1:2], to), "bias": random(shape[1:2], to)}
        second = {"skip": parts[1]} if skip else {}
        call = Call((parts[0], groups), {**vectors, **rows, "activation": activation, **second})
        return edit(call) if edit else call

    return Example(name, make)


EXAMPLES = (
    example("SD1.5 mid block 8x8", (2, 1280, 8, 8), extras=("add",)),
    example("SD1.5 down block 64x64", (2, 320, 64, 64), extras=("add",)),
    example("SD1.5 up block 32x32", (2, 960, 32, 32), channels_last=True),
    example("SD1.5 up block 1280 + 640, 16x16", (2, 1920, 16, 16), skip=640),
    example("SD1.5 up block 640 + 320, 32x32", (2, 960, 32, 32), skip=320, channels_last=True),
    example("SDXL up block 640 + 320, 128x128", (2, 960, 128, 128), skip=320, channels_last=True),
    example("SDXL down block 128x128", (2, 320, 128, 128), extras=("add",), channels_last=True),
    example("SDXL transformer entry 32x32", (2, 1280, 32, 32), activation="none"),
    example("ADM-256 res block 32x32", (1, 512, 32, 32), extras=("scale", "shift")),
    example("VAE decoder 512x512", (1, 128, 512, 512)),
    example("VAE decoder 512x512 channels last", (1, 256, 256, 256), channels_last=True),
)


def _strided_rows(call: Call) -> Call:
    """scale, shift = modulation.chunk(2, 1), and an add that is one row for the whole batch."""
    x, kwargs = call.args[0], dict(call.kwargs)
    both = torch.cat([kwargs["scale"], kwargs["shift"]], 1)
    kwargs["scale"], kwargs["shift"] = both.chunk(2, 1)
    kwargs["add"] = kwargs["add"][:1].expand(x.shape[0], -1)
    return Call(call.args, kwargs)


def _sliced_x(call: Call) -> Call:
    wide = torch.cat([call.args[0]] * 2, 1)
    return Call((wide[:, : call.args[0].shape[1]], *call.args[1:]), call.kwargs)


def _means_apart(call: Call) -> Call:
    """x around -2000, skip around 2000: one group's centre is far from both."""
    skip = call.kwargs["skip"]
    return Call((call.args[0] - 2000, *call.args[1:]), {**call.kwargs, "skip": skip + 2000})


def _skip_of_another_layout(call: Call) -> Call:
    skip = call.kwargs["skip"].movedim(1, -1).contiguous().movedim(-1, 1)
    return Call(call.args, {**call.kwargs, "skip": skip})


_ALL = ("add", "scale", "shift")
SAMPLES = (
    example("one pixel, two channels per group", (2, 8, 1, 1), 4, _ALL),
    example("one group", (2, 6, 5, 7), 1, _ALL),
    example("a group per channel", (2, 5, 9, 3), 5, _ALL),
    example("40 channels per group, odd pixels", (1, 80, 3, 5), 2, _ALL),
    example("no weight", (2, 12, 4, 4), 3, affine=False),
    example("no activation", (2, 12, 4, 4), 3, _ALL, activation="none"),
    example("float32 weights", (2, 12, 4, 4), 3, ("add", "param32")),
    example("3-D", (2, 12, 37), 3, ("scale", "shift")),
    example("5-D", (1, 12, 3, 5, 4), 3, ("add",)),
    example("2-D", (3, 12), 3, ("add",)),
    example("channels last", (2, 24, 5, 7), 4, _ALL, channels_last=True),
    example("channels last 5-D", (1, 12, 3, 5, 4), 3, ("add",), channels_last=True),
    example("channels last, 130 channels", (1, 130, 6, 11), 13, _ALL, channels_last=True),
    # Larger than one block: the statistics come in parts.
    example("split group", (1, 4, 130, 131), 2, _ALL),
    example("split group, channels last", (1, 24, 80, 81), 2, _ALL, channels_last=True),
    # E[x^2] - E[x]^2 has no digits left here in float32.
    example("mean far above the deviation", (1, 8, 16, 16), 2, mean=3000.0),
    example("the same, split", (1, 4, 130, 131), 2, mean=3000.0, channels_last=True),
    example("large values", (1, 8, 16, 16), 2, magnitude=1.5e4),
    example("small values", (1, 8, 16, 16), 2, magnitude=1e-4),
    example("strided rows", (3, 12, 4, 5), 3, _ALL, edit=_strided_rows),
    example("x is a view", (2, 12, 4, 5), 3, edit=_sliced_x),
    example("empty batch", (0, 12, 4, 5), 3, _ALL),
    example("skip, boundary in a group", (2, 24, 4, 4), 3, skip=12),
    example("skip, boundary between groups", (2, 12, 5, 3), 3, skip=4, activation="none"),
    example("skip of 1 channel, odd pixels", (2, 12, 5, 7), 3, skip=1),
    example("x of 1 channel, channels last", (2, 12, 4, 4), 3, skip=11, channels_last=True),
    example("skip, channels last", (2, 48, 4, 5), 4, skip=16, channels_last=True),
    example("skip, channels last, odd", (1, 130, 6, 11), 13, _ALL, skip=61, channels_last=True),
    example("skip, every argument", (2, 24, 4, 4), 3, _ALL, skip=12),
    example("skip, one pixel", (3, 12, 1, 1), 3, skip=5),
    example("skip, mean far above", (1, 12, 16, 16), 2, skip=5, mean=3000.0),
    example("skip, split group", (1, 12, 40, 41), 2, _ALL, skip=7),
    example("skip, means apart", (1, 12, 16, 16), 1, skip=6, edit=_means_apart),
    example("skip, layouts differ", (2, 12, 4, 5), 3, skip=5, edit=_skip_of_another_layout),
    example("skip, empty batch", (0, 12, 4, 5), 3, skip=5),
)


def _aot() -> Iterable[AotConfig]:
    from fastdiff.kernels import group_norm_silu as kernels

    return (AotConfig(**config) for config in kernels.aot_configs())


def _example_of_shape(
    shape: tuple[int, ...], groups: int = 32, channels_last: bool = False, skip: int = 0
) -> Example:
    if len(shape) < 2 or not 0 <= skip < shape[1]:
        raise ValueError(f"shape must be [N, C, ...] with more channels than skip={skip}")
    return example(f"{shape}", shape, groups, channels_last=channels_last, skip=skip)


OP = register(
    Op(
        name="group_norm_silu",
        schema="(Tensor x, int num_groups, Tensor? weight=None, Tensor? bias=None, "
        "Tensor? add=None, Tensor? scale=None, Tensor? shift=None, float eps=1e-05, "
        'str activation="silu", Tensor? skip=None, str impl="auto") -> Tensor',
        reference=reference,
        pattern=pattern,
        check=check,
        implementations=(
            Implementation("cpp", _cpp_supports, _cpp),
            Implementation("triton", _triton_supports, _triton),
        ),
        examples=EXAMPLES,
        samples=SAMPLES,
        bytes_moved=bytes_moved,
        flops=flops,
        aot=_aot,
        tuning=Tuning(_example_of_shape, _tuning_key, _tuning_candidates),
    )
)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
    skip: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """act((GroupNorm(x + add) * weight + bias) * (1 + scale) + shift) in one or two passes over x.

    x: [N, C, ...], float32, float16, bfloat16 (float64 by the reference); contiguous or channels
    last run fused, any other view by the reference. skip: [N, C2, ...] like x, in x's memory layout
    to run fused: the result is that of cat([x, skip], 1), and C is C + C2 in what follows; a group
    may have channels of both. weight, bias: [C]. add, scale, shift: [N, C] with any batch stride.
    Each is x's dtype or float32. activation: "silu" or "none". impl: "auto", "cpp", "triton" or
    "reference". Returns a tensor of x's dtype and memory format, differentiable through the
    reference; statistics are float32 or wider.

    ValueError or TypeError for arguments outside this; RuntimeError when a named impl cannot run.
    """
    return torch.ops.fastdiff.group_norm_silu(
        x, num_groups, weight, bias, add, scale, shift, eps, activation, skip, impl
    )
