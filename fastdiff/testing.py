"""How results are judged: against float64, by twice PyTorch's own error and never by taste."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch


def rounding_band(oracle: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What rounding the exact result to ``dtype`` alone may cost, per element, in float64."""
    info = torch.finfo(dtype)
    return oracle.double().abs() * (info.eps / 2) + info.smallest_normal * info.eps / 2


def assert_within_2x(
    result: torch.Tensor, oracle: torch.Tensor, torch_result: torch.Tensor, what: str = "result"
) -> float:
    """AssertionError unless the error of ``result`` is at most twice that of PyTorch's own op.

    error(result) <= 2 * (error(torch_result) + rounding band), all against ``oracle`` (float64,
    from the same inputs), for the largest and for the mean absolute error; both are taken over the
    whole tensor. ``result`` has the dtype and shape of ``torch_result``, and is finite where the
    oracle, rounded to that dtype, is finite. Returns the error as a fraction of the bound.
    """
    if result.dtype != torch_result.dtype or result.shape != oracle.shape:
        raise AssertionError(
            f"{what} must have dtype {torch_result.dtype} and shape {tuple(oracle.shape)}, "
            f"got {result.dtype} and {tuple(result.shape)}"
        )
    if result.numel() == 0:
        return 0.0
    oracle = oracle.double()
    finite = oracle.to(result.dtype).isfinite()
    if not bool(result.isfinite()[finite].all()):
        bad = int((~result.isfinite() & finite).sum())
        raise AssertionError(
            f"{what} must be finite, got {bad} of {result.numel()} elements not finite"
        )
    oracle = oracle[finite]
    error = (result.double()[finite] - oracle).abs()
    torch_error = (torch_result.double()[finite] - oracle).abs().nan_to_num(0.0, posinf=0.0)
    band = rounding_band(oracle, result.dtype)
    worst = 0.0
    for name in ("amax", "mean"):
        if error.numel() == 0:
            break
        mine, theirs, rounding = (float(getattr(t, name)()) for t in (error, torch_error, band))
        which = "largest" if name == "amax" else "mean"
        bound = 2 * (theirs + rounding)
        worst = max(worst, mine / bound)
        if not mine <= bound:
            raise AssertionError(
                f"{what}: {which} error must be at most {bound:.3e} "
                f"(twice torch's {theirs:.3e} plus rounding {rounding:.3e}), got {mine:.3e}"
            )
    return worst


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within it, torch.empty, empty_like, empty_strided and Tensor.new_empty give NaN, not luck.

    An op that leaves an element of its output or workspace unwritten shows it.
    """

    def poison(allocate: Any) -> Any:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            return tensor

        return allocate_poisoned

    with contextlib.ExitStack() as stack:
        for name in ("empty", "empty_like", "empty_strided"):
            stack.enter_context(mock.patch.object(torch, name, poison(getattr(torch, name))))
        new_empty = poison(torch.Tensor.new_empty)
        stack.enter_context(mock.patch.object(torch.Tensor, "new_empty", new_empty))
        yield


def psnr(mine: torch.Tensor, right: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of the range of ``right``; inf where they are equal."""
    mine, right = mine.double(), right.double()
    error = float((mine - right).square().mean())
    reach = float(right.max() - right.min())
    return 10 * math.log10(reach**2 / error) if error else math.inf
