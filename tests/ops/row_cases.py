"""What the tests of the row-wise ops share: implementations side by side, and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastdiff.ops import Op
from fastdiff.ops._contract import outputs

Tensor = torch.Tensor
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def usable(op: Op, *args: Any, **kwargs: Any) -> list[str]:
    """The implementations besides the reference that take this call here."""
    return [i.name for i in op.implementations if not i.supports(*args, **kwargs)]


def extremes(dtype: torch.dtype, rows: int, width: int) -> list[tuple[str, Tensor]]:
    """Inputs at the ends of a dtype's range, by name."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    top = 65504.0 if dtype == torch.float16 else 1e30
    small = torch.finfo(dtype).smallest_normal / 64
    kinds = {
        "largest": noise.sign() * top,
        "largest, one sign": noise.abs().clamp(0.5, 1) * top,
        "denormal": noise * small,
        "zero": noise * 0,
        "constant": noise * 0 + 3.25,
        "one outlier": torch.where(torch.arange(width) == width // 2, top, noise),
    }
    return [(name, values.to(dtype)) for name, values in kinds.items()]


def assert_no_new_nan(op: Op, *args: Any, **kwargs: Any) -> None:
    """No implementation gives NaN or infinity where the reference is finite."""
    expected = outputs(op.reference(*args, **kwargs))
    for name in usable(op, *args, **kwargs):
        result = outputs(op(*args, **kwargs, impl=name))
        for mine, theirs in zip(result, expected, strict=True):
            assert bool(mine.isfinite()[theirs.isfinite()].all()), name


def check_policy(kernels: Any, kernel: Any) -> None:
    """select() returns only what aot_configs() compiles, and its tiles hold the row."""
    compiled = set()
    for config in kernels.aot_configs():
        constants, options = config["constexprs"], config["options"]
        assert config["kernel"] is kernel
        plan = kernels.Launch(
            constants["ROWS"], constants["MAIN"], constants["TAIL"], constants["EXACT"],
            options["num_warps"],
        )  # fmt: skip
        # An odd width is compiled without a fact about the sizes, which holds with it, too.
        compiled.add((plan, bool(config["multiples_of_16"])))
    exact = set()
    for width in (*range(1, 700, 13), 640, 1000, 1152, 1280, 1536, 2304, 3072, 4096, 6144, 8192):
        for rows in (1, 24, 4096, 2**20, 2**31 - 1):
            plan = kernels.select(rows, width, torch.bfloat16, 90)
            assert (plan, plan.exact) in compiled
            assert plan.main + plan.tail >= width
            assert plan.exact == (plan.main + plan.tail == width)
            if plan.exact:
                exact.add(width)
    assert {320, 640, 1152, 1280, 1536, 3072, 4096, 8192} <= exact | {320}
    assert kernels.select(4096, 320, torch.bfloat16, 90).exact
    with pytest.raises(ValueError, match=r"C must be in 1\.\.8192, got 8193"):
        kernels.select(1, 8193, torch.bfloat16, 90)


def gradcheck(function: Callable[..., Any], *tensors: Tensor | None) -> None:
    """Against finite differences, in float64."""
    leaves = [None if t is None else t.double().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(function, leaves)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def far_rows(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[3, 64] whose last row starts 2^31 elements from the first; pages between stay untouched."""
    stride = 2**30 + 64
    storage = torch.empty(2 * stride + 64, dtype=dtype)
    rows = storage.as_strided((3, 64), (stride, 1))
    rows.copy_(numbers(3, 64, dtype=dtype))
    return rows
