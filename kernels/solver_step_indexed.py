"""The solver step whose row is a number on the device: one launch serves every row of a table.

    w          = rows[min(max(index, 0), N - 1)]                       [1 + R, R + 2], on the device
    output     = output                   or  uncond + w[0][R+1]*(output - uncond)
    prediction = sum_r w[0][r]*registers[r] + w[0][R]*output
    new[r]     = sum_s w[1+r][s]*registers[s] + w[1+r][R]*prediction + w[1+r][R+1]*noise

registers: state [images, per_image] and history [R-1, images, per_image], float32 or float64, one
memory order. new: [R, images, per_image], the registers' own memory or other. output: in the
model's dtype. rows: float32 or float64. noise: like the state, or drawn here from Philox4x32-10,
draw ``draws[row]`` of each image's seed. index, draws: int32 or int64.

The bits are those of kernels/solver_step.py for the same row: a term whose coefficient is 0 is
left out, products and sums are rounded one by one (``enable_fp_fusion=False``). The coefficients
are scalars of the device, so what is not needed is not read: a load's mask is off for every element
of a tensor with no coefficient but 0. Bytes: every register that the row reads, all R new ones, the
output where it is needed; the row itself is a few hundred bytes, once per program.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from fastdiff.kernels.solver_step import (
    MAX_REGISTERS,
    LaunchPolicy,
    _normals,
    _normals_channels_last,
)

# Where the noise comes from.
NO_NOISE, GIVEN, DRAWN = 0, 1, 2


@triton.jit
def _is_read(w_ptr, column, R: tl.constexpr, FIRST: tl.constexpr):
    """1 if any of the rows FIRST.. of [1 + R, R + 2] has a coefficient there, else 0."""
    read = tl.load(w_ptr + FIRST * (R + 2) + column) != 0
    for row in tl.static_range(FIRST + 1, R + 1):
        read = read | (tl.load(w_ptr + row * (R + 2) + column) != 0)
    return read.to(tl.int32)


@triton.jit
def _add_term(total, started, value, w_ptr):
    """(total + coefficient*value, True), or what it was where the coefficient is 0."""
    weight = tl.load(w_ptr)
    used = weight != 0
    term = value * weight.to(value.dtype)
    total = tl.where(used, tl.where(started, total + term, term), total)
    return total, started | used


@triton.jit
def _sum_of_registers(values, w_ptr, R: tl.constexpr):
    total = tl.zeros_like(values[0])
    started = tl.full((), 0, tl.int1)
    for r in tl.static_range(R):
        total, started = _add_term(total, started, values[r], w_ptr + r)
    return total, started


@triton.jit
def _load_register(
    history_ptr, at, size, element, per_image, w_ptr, NUMBER: tl.constexpr, R: tl.constexpr
):
    """Register NUMBER >= 1, 0 where the row does not read it or the table does not have it."""
    value = tl.zeros_like(at).to(history_ptr.dtype.element_ty)
    if NUMBER < R:
        offset = at
        for _ in tl.static_range(NUMBER - 1):
            offset = offset + size  # a product of two int32 could overflow
        # The interpreter cannot combine a block of booleans with one boolean, so the limit is 0.
        needed = element < per_image * _is_read(w_ptr, NUMBER, R, 0)
        value = tl.load(history_ptr + offset, mask=needed, other=0.0)
    return value


@triton.jit
def solver_step_indexed_kernel(
    state_ptr,  # register 0
    history_ptr,  # the others, one after the other
    output_ptr,  # the model's output; with guidance the conditioned one
    uncond_ptr,  # the other, when GUIDED
    noise_ptr,  # this row's draw, when NOISE is 1
    seeds_ptr,  # int64 [images], when NOISE is 2
    draws_ptr,  # [N], when NOISE is 2
    rows_ptr,  # [N, 1 + R, R + 2]
    index_ptr,  # one number
    new_ptr,  # the new registers, one after the other
    prediction_ptr,  # when PREDICTION
    num_rows,
    per_image,  # elements of one image
    channels,  # of channels-last memory, when CHANNELS_LAST
    R: tl.constexpr, NOISE: tl.constexpr, CHANNELS_LAST: tl.constexpr, GUIDED: tl.constexpr,
    PREDICTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    size = tl.num_programs(1).to(tl.int64) * per_image
    element = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < per_image
    at = image * per_image + element
    state = state_ptr.dtype.element_ty

    row = tl.load(index_ptr).to(tl.int64)
    row = tl.minimum(tl.maximum(row, 0), num_rows - 1)
    w_ptr = rows_ptr + row * ((1 + R) * (R + 2))

    needed = element < per_image * _is_read(w_ptr, 0, R, 0)
    v0 = tl.load(state_ptr + at, mask=needed, other=0.0)
    v1 = _load_register(history_ptr, at, size, element, per_image, w_ptr, 1, R)
    v2 = _load_register(history_ptr, at, size, element, per_image, w_ptr, 2, R)
    v3 = _load_register(history_ptr, at, size, element, per_image, w_ptr, 3, R)
    v4 = _load_register(history_ptr, at, size, element, per_image, w_ptr, 4, R)
    v5 = _load_register(history_ptr, at, size, element, per_image, w_ptr, 5, R)
    v6 = _load_register(history_ptr, at, size, element, per_image, w_ptr, 6, R)
    v7 = _load_register(history_ptr, at, size, element, per_image, w_ptr, 7, R)
    values = (v0, v1, v2, v3, v4, v5, v6, v7)

    needed = element < per_image * (tl.load(w_ptr + R) != 0).to(tl.int32)
    output = tl.load(output_ptr + at, mask=needed, other=0.0).to(state)
    if GUIDED:
        uncond = tl.load(uncond_ptr + at, mask=needed, other=0.0).to(state)
        output = uncond + (output - uncond) * tl.load(w_ptr + R + 1).to(state)
    prediction, started = _sum_of_registers(values, w_ptr, R)
    prediction, started = _add_term(prediction, started, output, w_ptr + R)

    noise = tl.full([BLOCK], float("nan"), state)
    noisy = _is_read(w_ptr, R + 1, R, 1)
    if NOISE == 1:
        noise = tl.load(noise_ptr + at, mask=element < per_image * noisy, other=0.0)
    if NOISE == 2:
        if noisy != 0:
            seed = tl.load(seeds_ptr + image)
            draw = tl.load(draws_ptr + row)
            if CHANNELS_LAST:
                noise = _normals_channels_last(seed, draw, element, channels, per_image).to(state)
            else:
                noise = _normals(seed, draw, pid.to(tl.int64) * (BLOCK // 4), BLOCK // 4).to(state)

    target = at
    for r in tl.static_range(R):
        w_ptr = w_ptr + (R + 2)
        total, started = _sum_of_registers(values, w_ptr, R)
        total, started = _add_term(total, started, prediction, w_ptr + R)
        total, started = _add_term(total, started, noise, w_ptr + R + 1)
        tl.store(new_ptr + target, total, mask=mask)
        target = target + size
    if PREDICTION:
        tl.store(prediction_ptr + at, prediction, mask=mask)


def solver_step_indexed(
    state: torch.Tensor,
    history: torch.Tensor | None,
    output: torch.Tensor,
    rows: torch.Tensor,
    index: torch.Tensor,
    new: torch.Tensor,
    prediction: torch.Tensor | None,
    *,
    uncond: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    draws: torch.Tensor | None = None,
    channels: int = 1,
) -> None:
    """Launches the row that ``index`` names; nothing is read back, nothing allocated.

    state: [images, ...], dense. history: [R-1, images, ...], each slice in the state's memory order
    and behind the one before; None when R is 1. new: [R, images, ...] of the same kind, which may
    be the memory of state and history; prediction: like the state, or None where nobody wants it.
    Without noise, seeds and draws a row that adds noise gives NaN.
    """
    if state.numel() == 0:
        return
    images, per_image = state.shape[0], state[0].numel()
    registers = rows.shape[1] - 1
    policy = LaunchPolicy.select(per_image, state.element_size(), registers)
    source = GIVEN if noise is not None else NO_NOISE if seeds is None else DRAWN
    solver_step_indexed_kernel[(triton.cdiv(per_image, policy.block), images)](
        state,
        state if history is None else history,
        output,
        output if uncond is None else uncond,
        state if noise is None else noise,
        index if seeds is None else seeds,
        index if draws is None else draws,
        rows,
        index,
        new,
        new if prediction is None else prediction,
        rows.shape[0],
        per_image,
        channels,
        R=registers,
        NOISE=source,
        CHANNELS_LAST=int(source == DRAWN and channels > 1),
        GUIDED=int(uncond is not None),
        PREDICTION=int(prediction is not None),
        BLOCK=policy.block,
        num_warps=policy.num_warps,
        enable_fp_fusion=False,
    )


# (registers, state, model, rows, noise, channels last, guided): the most a thread holds for each
# block of the policy, then what a pipeline's scheduler launches.
_AOT = (
    (MAX_REGISTERS, "fp32", "bf16", "fp64", DRAWN, 0, 1),
    (MAX_REGISTERS, "fp32", "bf16", "fp64", DRAWN, 1, 1),
    (MAX_REGISTERS, "fp64", "fp64", "fp64", DRAWN, 0, 1),
    (4, "fp32", "bf16", "fp64", DRAWN, 0, 1),
    (4, "fp32", "fp32", "fp64", DRAWN, 1, 1),
    (2, "fp32", "fp16", "fp64", NO_NOISE, 0, 0),
    (1, "fp32", "bf16", "fp64", GIVEN, 0, 0),
)


def aot_configs() -> Iterator[dict[str, Any]]:
    """Launches to compile ahead of time, in the terms of fastdiff.ops.AotConfig."""
    for registers, state, model, rows, noise, last, guided in _AOT:
        policy = LaunchPolicy.select(1 << 24, 8 if state == "fp64" else 4, registers)
        constexprs = {
            "R": registers,
            "NOISE": noise,
            "CHANNELS_LAST": last,
            "GUIDED": guided,
            "PREDICTION": 1,
            "BLOCK": policy.block,
        }
        types = dict.fromkeys(("num_rows", "per_image", "channels"), "i32")
        types |= dict.fromkeys(("seeds_ptr", "draws_ptr", "index_ptr"), "*i64")
        types |= dict.fromkeys(("output_ptr", "uncond_ptr"), f"*{model}")
        types |= {"rows_ptr": f"*{rows}", **dict.fromkeys(constexprs, "constexpr")}
        names = solver_step_indexed_kernel.arg_names
        source = ("no noise", "noise", "drawn")[noise]
        kind = f"{'guided ' * guided}{'channels last ' * last}"
        yield {
            "kernel": solver_step_indexed_kernel,
            "signature": {name: types.get(name, f"*{state}") for name in names},
            "constexprs": constexprs,
            "options": {"num_warps": policy.num_warps, "enable_fp_fusion": False},
            "label": f"R={registers} {state}/{model} {kind}{source} BLOCK={policy.block} "
            f"warps={policy.num_warps}",
            "multiples_of_16": ("per_image",),
        }
