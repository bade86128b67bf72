"""The CPU kernel of group_norm_silu at every instruction set level, through raw pointers.

The extension reads FASTDIFF_ISA_MAX once, so each level is a process of its own: this file run as a
program checks every case at the level it finds itself at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fastdiff._ext import DTYPE_CODES, ext, require_ext
from fastdiff.testing import assert_within_2x

Tensor = torch.Tensor
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

SHAPES = {
    "sd15_mid": (1, 320, 16, 16, 32),
    "sd15_lowest": (2, 1280, 8, 8, 32),
    "odd_pixels": (2, 96, 7, 9, 32),
    "odd_channels": (2, 35, 13, 11, 5),
    "one_pixel": (3, 64, 1, 1, 32),
    "one_pixel_one_channel": (2, 32, 1, 1, 32),
    "one_channel_per_group": (2, 7, 13, 11, 7),
    "one_group": (1, 19, 30, 31, 1),
    "shorter_than_a_vector": (5, 6, 1, 3, 3),
    "one_element": (1, 1, 1, 1, 1),
    "split_between_threads": (1, 6, 150, 140, 2),
    "more_threads_than_work": (1, 2, 3, 3, 2),
    "no_images": (0, 32, 4, 4, 32),
}


@dataclass
class Case:
    x: Tensor
    groups: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    add: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    eps: float = 1e-5
    silu: bool = True
    skip: Tensor | None = None
    residual: Tensor | None = None


def plain(case: Case, dtype: torch.dtype) -> Tensor:
    """The op in plain torch, computed in ``dtype``."""

    def rows(row: Tensor) -> Tensor:
        return row.to(dtype)[..., None, None]

    y = case.x.to(dtype)
    if case.skip is not None:
        y = torch.cat([y, case.skip.to(dtype)], 1)
    if case.residual is not None:
        y = (case.x + case.residual).to(dtype)  # rounded to x's dtype
    if case.add is not None:
        y = y + rows(case.add)
    images, channels = y.shape[:2]
    grouped = y.reshape(images, case.groups, channels // case.groups * math.prod(y.shape[2:]))
    centred = grouped - grouped.mean(2, keepdim=True)
    variance = centred.square().mean(2, keepdim=True)
    y = (centred * torch.rsqrt(variance + case.eps)).reshape(y.shape)
    if case.weight is not None:
        y = y * rows(case.weight)
    if case.bias is not None:
        y = y + rows(case.bias)
    if case.scale is not None:
        y = y * (1 + rows(case.scale))
    if case.shift is not None:
        y = y + rows(case.shift)
    return torch.nn.functional.silu(y) if case.silu else y


def kernel(case: Case, threads: int) -> Tensor:
    x, skip, residual = case.x, case.skip, case.residual
    whole = x if skip is None else torch.cat([x, skip], 1)
    images, channels = whole.shape[:2]
    last = not (x.is_contiguous() and (skip is None or skip.is_contiguous()))
    layout = torch.channels_last if last else torch.contiguous_format
    out = torch.full_like(whole, math.nan, memory_format=layout)
    total = None if residual is None else torch.full_like(x, math.nan)

    def pointer(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    def stride(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.stride(0)

    def code(*tensors: Tensor | None) -> int:
        return next((DTYPE_CODES[t.dtype] for t in tensors if t is not None), 0)

    require_ext().group_norm_silu(
        *(x.data_ptr(), pointer(case.add), stride(case.add)),
        *(pointer(case.weight), pointer(case.bias)),
        *(pointer(case.scale), stride(case.scale), pointer(case.shift), stride(case.shift)),
        *(out.data_ptr(), images, channels, math.prod(x.shape[2:]), case.groups, case.eps),
        *(int(case.silu), last, DTYPE_CODES[x.dtype]),
        *(code(case.weight, case.bias), code(case.add, case.scale, case.shift), threads),
        *(pointer(skip), 0 if skip is None else skip.shape[1], pointer(residual), pointer(total)),
    )
    if residual is not None:
        assert total is not None
        assert torch.equal(total, x + residual)
    return out


def make(
    name: str, dtype: torch.dtype, layout: torch.memory_format, option: int, second: str = ""
) -> Case:
    """Option 0 has no per-channel arguments; 1 an affine and an added term; 2 a modulation of its
    own dtype without bias; 3 everything, as strided rows of one tensor, without activation.

    second: "skip" takes it from the channels, "residual" adds one.
    """
    images, channels, height, width, groups = SHAPES[name]
    generator = torch.Generator().manual_seed(option)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = normal(images, channels, height, width).to(dtype).contiguous(memory_format=layout)
    case = Case(x, groups)
    if second == "skip":
        parts = x.split([max(1, channels * 3 // 5), channels - max(1, channels * 3 // 5)], 1)
        case.x, case.skip = (part.contiguous(memory_format=layout) for part in parts)
    elif second == "residual":
        case.residual = normal(*x.shape).to(dtype).contiguous(memory_format=layout)
    parameters = (dtype, dtype, torch.float32, torch.bfloat16)[option]
    rows = normal(images, 3 * channels).to((dtype, torch.float32, torch.float16, dtype)[option])
    if option:
        case.weight = normal(channels).to(parameters)
    if option in (1, 3):
        case.bias, case.add = normal(channels).to(parameters), rows[:, :channels]
    if option in (2, 3):
        case.scale, case.shift = rows[:, channels : 2 * channels], rows[:, 2 * channels :]
    case.silu = option != 3
    return case


def judge(case: Case, threads: int, what: str) -> None:
    """Against float64; what the kernel is measured by is torch in float32, rounded once."""
    expected = plain(case, torch.float32).to(case.x.dtype)
    assert_within_2x(kernel(case, threads), plain(case, torch.float64), expected, what)


def check_shapes() -> int:
    count = 0
    for name in SHAPES:
        for dtype in DTYPES:
            for layout in (torch.contiguous_format, torch.channels_last):
                for option in range(4):
                    for threads in (1, 2, 5):
                        what = f"{name} {dtype} {layout} option {option} threads {threads}"
                        judge(make(name, dtype, layout, option), threads, what)
                        count += 1
    return count


def check_second() -> int:
    """With a skip or a residual, whose boundary and sum lie anywhere in a group."""
    count = 0
    for name, (images, channels, *_) in SHAPES.items():
        for dtype in DTYPES:
            for layout in (torch.contiguous_format, torch.channels_last):
                for second in ("skip", "residual"):
                    if second == "skip" and (channels == 1 or images == 0):
                        continue
                    for option, threads in ((1, 2), (2, 5), (3, 1)):
                        what = f"{name} {second} {dtype} {layout} option {option} {threads}"
                        judge(make(name, dtype, layout, option, second), threads, what)
                        count += 1
    return count


def check_far_centres() -> int:
    """The first samples mislead, so that the sums are taken twice: from what was written once."""
    count = 0
    for layout in (torch.contiguous_format, torch.channels_last):
        for dtype in DTYPES:
            x = torch.randn(2, 24, 40, 33, generator=torch.Generator().manual_seed(0))
            x[:, :, 0, 0] = 3e4
            x, residual = x.to(dtype), (x.flip(1) * 0.01 + 500).to(dtype)
            x, residual = (t.contiguous(memory_format=layout) for t in (x, residual))
            for threads in (1, 3):
                judge(Case(x, 4, residual=residual), threads, f"residual {dtype} {threads}")
                judge(Case(x, 3, skip=residual), threads, f"skip {dtype} {threads}")
                count += 2
    return count


def check_statistics() -> int:
    """Data whose variance is small beside its mean, or whose first samples mislead."""
    count = 0
    for layout in (torch.contiguous_format, torch.channels_last):
        for dtype in DTYPES:
            for kind in ("offset", "constant", "border", "outlier", "ramp"):
                x = torch.randn(2, 24, 40, 33, generator=torch.Generator().manual_seed(0))
                if kind == "offset":
                    x += 1000
                elif kind == "constant":
                    x.fill_(3.3)
                elif kind == "border":
                    x[:, :, :20] = 500.0
                elif kind == "outlier":
                    x[:, :, 0, 0] = 3e4
                else:
                    x += torch.linspace(-100, 100, 33)
                x = x.to(dtype).contiguous(memory_format=layout)
                for threads in (1, 3):
                    judge(Case(x, 4), threads, f"{kind} {dtype} {layout} threads {threads}")
                    count += 1
    return count


def check_float32_offset() -> int:
    """A mean of 1000 with unit variance costs none of float32's digits: x - mean is exact."""
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(1, 8, 64, 64, generator=torch.Generator().manual_seed(0)) + 1000
        case = Case(x.contiguous(memory_format=layout), 2, silu=False)
        error = (kernel(case, 1).double() - plain(case, torch.float64)).abs().max()
        assert error < 8 * torch.finfo(torch.float32).eps, error  # |y| < 8
    return 2


def check_activation() -> int:
    """SiLU of the bias, where its exponential underflows, overflows, and at NaN."""
    ends = [1e30, 120.0, 104.0, 89.0, 88.0, 87.0, 20.0, 1.0, 1e-3, 1e-30, 0.0]
    values = torch.tensor([*ends, *(-v for v in ends), math.nan])
    count = 0
    for dtype in DTYPES:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(1, len(values), 3, 3).to(dtype).contiguous(memory_format=layout)
            case = Case(x, 1, torch.zeros(len(values)), values)
            result = kernel(case, 1)[0, :, 0, 0]
            expected = torch.nn.functional.silu(values.double()).to(dtype)
            assert torch.equal(result.isnan(), expected.isnan())
            torch.testing.assert_close(
                result,
                expected,
                rtol=2 * torch.finfo(dtype).eps,
                # Results below float32's normal range may be flushed.
                atol=max(1e-36, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps),
                equal_nan=True,
            )
            count += 1
    return count


def check_conversion() -> int:
    """Without groups' statistics in the way: 16-bit results are float32 ones rounded to even."""
    count = 0
    for dtype in (torch.float16, torch.bfloat16):
        bias = torch.cat([torch.randn(4093) * 10.0**e for e in range(-9, 6)])
        case = Case(torch.zeros(1, len(bias), 1, 1, dtype=dtype), 1, bias=bias, silu=False)
        assert torch.equal(kernel(case, 1)[0, :, 0, 0], bias.to(dtype)), dtype
        count += 1
    return count


def run_all() -> None:
    torch.set_num_threads(2)
    checks = (check_shapes, check_statistics, check_float32_offset, check_activation)
    checks = (*checks, check_conversion, check_second, check_far_centres)
    total = sum(check() for check in checks)
    print(f"level {require_ext().isa_level()}: {total} cases")


@pytest.mark.skipif(ext() is None, reason="needs the extension")
@pytest.mark.parametrize("level", [0, 1, 2])
def test_kernel_at_level(level: int, fresh_python: Callable[..., str]) -> None:
    if level > require_ext().isa_level():
        pytest.skip(f"the processor has level {require_ext().isa_level()} only")
    printed = fresh_python(str(Path(__file__).resolve()), FASTDIFF_ISA_MAX=str(level))
    assert f"level {level}:" in printed


@pytest.mark.skipif(ext() is None, reason="needs the extension")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 3}, "groups must divide 32 channels, got 3"),
        ({"groups": 0}, "groups must divide 32 channels, got 0"),
        ({"act": 2}, "act must be 0"),
        ({"x_dtype": 3}, "x_dtype must be 0"),
        ({"skip": 1}, r"skip_channels must be in 1\.\.31 with a skip and 0 without, got 0"),
        ({"skip": 1, "skip_channels": 32}, "skip_channels must be in .* got 32"),
        ({"skip_channels": 3}, "skip_channels must be in .* got 3"),
        ({"residual": 1}, "residual and total must come together, and without a skip"),
    ],
)
def test_nonsense_is_refused(change: dict[str, int], message: str) -> None:
    x = torch.zeros(1, 32, 2, 2)
    arguments = dict.fromkeys(
        ("add", "add_stride", "weight", "bias", "scale", "scale_stride", "shift", "shift_stride"), 0
    )
    arguments |= {"x": x.data_ptr(), "out": x.data_ptr(), "batch": 1, "channels": 32, "hw": 4}
    arguments |= {"groups": 32, "act": 1, "channels_last": False, "x_dtype": 0}
    arguments |= {"param_dtype": 0, "mod_dtype": 0, "threads": 1}
    with pytest.raises(ValueError, match=message):
        require_ext().group_norm_silu(eps=1e-5, **{**arguments, **change})


if __name__ == "__main__":
    run_all()
