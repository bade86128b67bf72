"""The solver step in Triton: one row of a solver table as one pass over memory.

    output     = cond                     or  uncond + guidance*(cond - uncond)
    prediction = from_state*registers[feed] + from_output*output
    registers[dest] <- sum_j from_registers[j]*registers[j]
                       + from_prediction*prediction + from_noise*noise
    input      = next_input_scale * registers[next_feed]                      (`copies` times)

registers: [images, per_image] each, float32 or float64, one memory order. output, input: in the
model's dtype (input [copies, images, per_image]). noise: like a register, or drawn here from
Philox4x32-10.
Bytes: every register read or written once, the output and the input once.

The bits are those of csrc/cpu/solver_step.cpp: products and sums are rounded one by one in the
table's order, so the kernel must be compiled with ``enable_fp_fusion=False``; the noise is
csrc/philox.h's.

Which coefficients are zero is a compile-time mask (a zero term is not read), so a table compiles to
a handful of kernels: its first, middle and last rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

MAX_REGISTERS = 8
MAX_UPDATES = 4
PREDICTION_BIT = MAX_REGISTERS
NOISE_BIT = MAX_REGISTERS + 1
# Triton's interpreter cuts digits off on the way to bfloat16; GPUs round to nearest.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@dataclass(frozen=True)
class LaunchPolicy:
    """Elements and warps of one program."""

    block: int
    num_warps: int

    @staticmethod
    def select(per_image: int, state_bytes: int, num_registers: int) -> LaunchPolicy:
        """16 bytes a thread and load, two loads of each tensor in flight where they fit.

        Two are too many for more than four registers (the compile check: 8 bytes spilled on sm_90)
        and for float64; small states take small blocks, so that more multiprocessors have work.
        """
        small = per_image * state_bytes <= 1 << 20
        if small or state_bytes == 8 or num_registers > 4:
            return LaunchPolicy(block=512, num_warps=4)
        return LaunchPolicy(block=1024, num_warps=4)

    @staticmethod
    def candidates(
        per_image: int, state_bytes: int, num_registers: int
    ) -> tuple[LaunchPolicy, ...]:
        """`select`'s choice, then what tuning tries beside it.

        4 elements per thread, or 8 where two loads fit. The compile check has all of them for the
        rows that need most registers, which hardly depend on the number of warps.
        """
        chosen = LaunchPolicy.select(per_image, state_bytes, num_registers)
        loads = (4, 8) if state_bytes < 8 and num_registers <= 4 else (4,)
        others = (LaunchPolicy(32 * warps * load, warps) for load in loads for warps in (2, 4, 8))
        return (chosen, *(policy for policy in others if policy != chosen))


@dataclass(frozen=True)
class RowStructure:
    """What a kernel is compiled for. In masks: bit r is register r, then prediction, noise."""

    num_registers: int
    feed: int
    next_feed: int  # -1: last row
    prediction_mask: int  # bit 0: from_state is not 0; bit 1: from_output is not 0
    update_masks: tuple[int, ...]
    dests: tuple[int, ...]

    @staticmethod
    def of(index: Sequence[int], coef: Sequence[float], num_registers: int) -> RowStructure:
        """From one row of a packed table (see fastdiff.solvers.PackedTable)."""
        width = num_registers + 2
        masks = []
        for u in range(index[2]):
            values = coef[4 + u * width : 4 + (u + 1) * width]
            mask = sum(1 << r for r in range(num_registers) if values[r] != 0)
            mask |= (values[num_registers] != 0) << PREDICTION_BIT
            mask |= (values[num_registers + 1] != 0) << NOISE_BIT
            masks.append(int(mask))
        return RowStructure(
            num_registers=num_registers,
            feed=int(index[0]),
            next_feed=int(index[3]),
            prediction_mask=int(coef[1] != 0) | int(coef[2] != 0) << 1,
            update_masks=tuple(masks),
            dests=tuple(int(d) for d in index[4 : 4 + index[2]]),
        )

    @property
    def uses_noise(self) -> bool:
        return any(mask >> NOISE_BIT & 1 for mask in self.update_masks)

    def reads(self, with_input: bool) -> int:
        """The registers whose old values are needed, as a mask."""
        mask = 0
        for update in self.update_masks:
            mask |= update & ((1 << MAX_REGISTERS) - 1)
        if self.prediction_mask & 1:
            mask |= 1 << self.feed
        if with_input and self.next_feed >= 0 and self.next_feed not in self.dests:
            mask |= 1 << self.next_feed
        return mask

    def constexprs(self, with_input: bool) -> dict[str, int]:
        """The compile-time arguments of the kernel."""
        masks = [*self.update_masks, *([0] * (MAX_UPDATES - len(self.update_masks)))]
        dests = [*self.dests, *([-1] * (MAX_UPDATES - len(self.dests)))]
        return {
            "NUM_REGISTERS": self.num_registers,
            "FEED": self.feed,
            "NEXT_FEED": self.next_feed if with_input else -1,
            "READS": self.reads(with_input),
            "PREDICTION_MASK": self.prediction_mask,
            **{f"MASK{u}": masks[u] for u in range(MAX_UPDATES)},
            **{f"DEST{u}": dests[u] for u in range(MAX_UPDATES)},
            "USES_NOISE": int(self.uses_noise),
        }


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint32 tensors; four words."""
    a = tl.full((), 0xD2511F53, tl.uint32)
    b = tl.full((), 0xCD9E8D57, tl.uint32)
    w0 = tl.full((), 0x9E3779B9, tl.uint32)
    w1 = tl.full((), 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, a)
        low0 = c0 * a
        high1 = tl.umulhi(c2, b)
        low1 = c2 * b
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + w0
        k1 = k1 + w1
    return c0, c1, c2, c3


@triton.jit
def _log_unit(u):
    offset = tl.full((), 0x3F3504F3, tl.uint32)
    mantissa = tl.full((), 0x007FFFFF, tl.uint32)
    bits = u.to(tl.uint32, bitcast=True) - offset
    e = (bits.to(tl.int32, bitcast=True) >> 23).to(tl.float32)
    f = ((bits & mantissa) + offset).to(tl.float32, bitcast=True) - 1.0
    f2 = f * f
    p = f * 7.0376836292e-2 + -1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f + -1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f + -1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f + -2.4999993993e-1
    p = p * f + 3.3333331174e-1
    y = p * f * f2
    y = y + e * -2.12194440e-4
    y = y - f2 * 0.5
    return (f + y) + e * 0.693359375


@triton.jit
def box_muller(word0, word1):
    """Two float32 normals out of two uint32 words; csrc/philox.h, operation by operation."""
    u = ((word0 >> 9).to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * 1.1920928955078125e-7
    r = tl.sqrt_rn(_log_unit(u) * -2.0)
    turn = word1 >> 8
    quadrant = turn >> 22
    fraction = (turn & tl.full((), 0x3FFFFF, tl.uint32)).to(tl.int32, bitcast=True)
    theta = ((fraction - 0x200000).to(tl.float32) + 0.5) * 3.7450704e-7
    t2 = theta * theta
    s = t2 * -1.9515295891e-4 + 8.3321608736e-3
    s = s * t2 + -1.6666654611e-1
    s = s * t2 * theta + theta
    c = t2 * 2.443315711809948e-5 + -1.388731625493765e-3
    c = c * t2 + 4.166664568298827e-2
    c = (c * t2 * t2 - t2 * 0.5) + 1.0
    odd = (quadrant & 1) != 0
    x = tl.where(odd, s, c)
    y = tl.where(odd, c, s)
    x = tl.where(((quadrant + 1) & 2) != 0, -x, x)
    y = tl.where((quadrant & 2) != 0, -y, y)
    return r * x, r * y


@triton.jit
def _normals(seed, draw, first_group, GROUPS: tl.constexpr):
    """[4*GROUPS] normals of elements 4*first_group .. of the image with this seed."""
    group = first_group + tl.arange(0, GROUPS).to(tl.int64)
    zero = tl.zeros([GROUPS], tl.uint32)
    w0, w1, w2, w3 = philox4x32(
        group.to(tl.uint32),
        zero + draw.to(tl.uint32),
        (group >> 32).to(tl.uint32),
        zero,
        zero + seed.to(tl.uint32),
        zero + (seed >> 32).to(tl.uint32),
    )
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def _normals_channels_last(seed, draw, element, channels, per_image):
    """Normals in channels-last memory: element m is number (m % C)*(per_image/C) + m // C."""
    pixel = element // channels
    number = (element - pixel * channels) * (per_image // channels) + pixel
    group = number >> 2
    zero = tl.zeros_like(group).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(
        group.to(tl.uint32),
        zero + draw.to(tl.uint32),
        (group >> 32).to(tl.uint32),
        zero,
        zero + seed.to(tl.uint32),
        zero + (seed >> 32).to(tl.uint32),
    )
    upper = (number & 2) != 0
    z0, z1 = box_muller(tl.where(upper, w2, w0), tl.where(upper, w3, w1))
    return tl.where((number & 1) != 0, z1, z0)


@triton.jit
def _narrow(value, dtype: tl.constexpr):
    """Rounds to ``dtype``, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        even = (bits >> 16) & 1
        bits = tl.where(value == value, bits + even + 0x7FFF, bits) >> 16 << 16
        value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def _combine(values, prediction, noise, coef_ptr, MASK: tl.constexpr, NUM_REGISTERS: tl.constexpr):
    """The sum of the terms in MASK, in order, the first one unadded."""
    total = tl.zeros_like(values[0])
    for r in tl.static_range(NUM_REGISTERS):
        if (MASK >> r) & 1:
            term = values[r] * tl.load(coef_ptr + r)
            if MASK & ((1 << r) - 1):
                total = total + term
            else:
                total = term
    if (MASK >> 8) & 1:
        term = prediction * tl.load(coef_ptr + NUM_REGISTERS)
        if MASK & 0xFF:
            total = total + term
        else:
            total = term
    if (MASK >> 9) & 1:
        term = noise * tl.load(coef_ptr + NUM_REGISTERS + 1)
        if MASK & 0x1FF:
            total = total + term
        else:
            total = term
    return total


@triton.jit
def solver_step_kernel(
    r0_ptr, r1_ptr, r2_ptr, r3_ptr, r4_ptr, r5_ptr, r6_ptr, r7_ptr,  # registers; unused ones: r0
    output_ptr,  # the model's output; with guidance the conditioned half
    uncond_ptr,  # the other half
    input_ptr,  # the next model input
    noise_ptr,  # this row's draw, when USES_NOISE and not PHILOX
    seeds_ptr,  # int64 [images], when PHILOX
    coef_ptr,  # the row of the packed table in the registers' dtype
    draw,  # int32, the row's draw
    per_image,  # elements of one image
    images,
    channels,  # of channels-last memory, when CHANNELS_LAST
    NUM_REGISTERS: tl.constexpr, FEED: tl.constexpr, NEXT_FEED: tl.constexpr, READS: tl.constexpr,
    PREDICTION_MASK: tl.constexpr,
    MASK0: tl.constexpr, MASK1: tl.constexpr, MASK2: tl.constexpr, MASK3: tl.constexpr,
    DEST0: tl.constexpr, DEST1: tl.constexpr, DEST2: tl.constexpr, DEST3: tl.constexpr,
    USES_NOISE: tl.constexpr, PHILOX: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    GUIDED: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    element = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < per_image
    at = image * per_image + element
    pointers = (r0_ptr, r1_ptr, r2_ptr, r3_ptr, r4_ptr, r5_ptr, r6_ptr, r7_ptr)
    state = r0_ptr.dtype.element_ty
    zero = tl.zeros([BLOCK], state)

    v0 = tl.load(r0_ptr + at, mask=mask, other=0.0) if READS & 1 else zero
    v1 = tl.load(r1_ptr + at, mask=mask, other=0.0) if READS & 2 else zero
    v2 = tl.load(r2_ptr + at, mask=mask, other=0.0) if READS & 4 else zero
    v3 = tl.load(r3_ptr + at, mask=mask, other=0.0) if READS & 8 else zero
    v4 = tl.load(r4_ptr + at, mask=mask, other=0.0) if READS & 16 else zero
    v5 = tl.load(r5_ptr + at, mask=mask, other=0.0) if READS & 32 else zero
    v6 = tl.load(r6_ptr + at, mask=mask, other=0.0) if READS & 64 else zero
    v7 = tl.load(r7_ptr + at, mask=mask, other=0.0) if READS & 128 else zero
    values = (v0, v1, v2, v3, v4, v5, v6, v7)

    prediction = zero
    if PREDICTION_MASK & 1:
        prediction = values[FEED] * tl.load(coef_ptr + 1)
    if PREDICTION_MASK & 2:
        output = tl.load(output_ptr + at, mask=mask, other=0.0).to(state)
        if GUIDED:
            uncond = tl.load(uncond_ptr + at, mask=mask, other=0.0).to(state)
            output = uncond + (output - uncond) * tl.load(coef_ptr + 3)
        term = output * tl.load(coef_ptr + 2)
        if PREDICTION_MASK & 1:
            prediction = prediction + term
        else:
            prediction = term

    noise = zero
    if USES_NOISE:
        if PHILOX:
            seed = tl.load(seeds_ptr + image)
            if CHANNELS_LAST:
                noise = _normals_channels_last(seed, draw, element, channels, per_image).to(state)
            else:
                first = pid.to(tl.int64) * (BLOCK // 4)
                noise = _normals(seed, draw, first, BLOCK // 4).to(state)
        else:
            noise = tl.load(noise_ptr + at, mask=mask, other=0.0)

    WIDTH: tl.constexpr = NUM_REGISTERS + 2
    n0 = _combine(values, prediction, noise, coef_ptr + 4, MASK0, NUM_REGISTERS)
    n1 = _combine(values, prediction, noise, coef_ptr + 4 + WIDTH, MASK1, NUM_REGISTERS)
    n2 = _combine(values, prediction, noise, coef_ptr + 4 + 2 * WIDTH, MASK2, NUM_REGISTERS)
    n3 = _combine(values, prediction, noise, coef_ptr + 4 + 3 * WIDTH, MASK3, NUM_REGISTERS)
    tl.store(pointers[DEST0] + at, n0, mask=mask)
    if DEST1 >= 0:
        tl.store(pointers[DEST1] + at, n1, mask=mask)
    if DEST2 >= 0:
        tl.store(pointers[DEST2] + at, n2, mask=mask)
    if DEST3 >= 0:
        tl.store(pointers[DEST3] + at, n3, mask=mask)

    if NEXT_FEED >= 0:
        following = values[NEXT_FEED]
        if DEST0 == NEXT_FEED:
            following = n0
        if DEST1 == NEXT_FEED:
            following = n1
        if DEST2 == NEXT_FEED:
            following = n2
        if DEST3 == NEXT_FEED:
            following = n3
        following = _narrow(following * tl.load(coef_ptr), input_ptr.dtype.element_ty)
        for copy in tl.static_range(COPIES):
            tl.store(input_ptr + copy * images.to(tl.int64) * per_image + at, following, mask=mask)


def solver_step(
    structure: RowStructure,
    registers: Sequence[torch.Tensor],
    output: torch.Tensor,
    uncond: torch.Tensor | None,
    model_input: torch.Tensor | None,
    coef: torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    draw: int = 0,
    copies: int = 1,
    channels: int = 1,
    policy: LaunchPolicy | None = None,
) -> None:
    """Launches one row, in place on ``registers`` and ``model_input``.

    registers: tensors [images, ...] of one shape, dtype (float32, float64) and memory order.
    output, uncond: like a register, in the model's dtype. model_input: None, or
    [copies*images, ...].
    coef: the packed row in the registers' dtype on their device. noise: like a register, or None.
    seeds: int64 [images]; drawn from Philox when ``noise`` is None. channels: 1 for contiguous
    registers, C for channels-last ones (the noise is numbered in contiguous order).
    policy: one of `LaunchPolicy.candidates`; None: what `select` gives.

    Raises ValueError when a row that uses noise gets neither noise nor seeds.
    """
    x = registers[0]
    if x.numel() == 0:
        return
    if structure.uses_noise and noise is None and seeds is None:
        raise ValueError("noise or seeds must be given for a row that uses noise, got neither")
    images, per_image = x.shape[0], x[0].numel()
    policy = policy or LaunchPolicy.select(per_image, x.element_size(), structure.num_registers)
    padded = [*registers, *([x] * (MAX_REGISTERS - len(registers)))]
    philox = structure.uses_noise and noise is None
    options: dict[str, Any] = structure.constexprs(model_input is not None)
    solver_step_kernel[(triton.cdiv(per_image, policy.block), images)](
        *padded,
        output,
        output if uncond is None else uncond,
        x if model_input is None else model_input,
        x if noise is None else noise,
        x if seeds is None else seeds,
        coef,
        draw,
        per_image,
        images,
        channels,
        **options,
        PHILOX=int(philox),
        CHANNELS_LAST=int(philox and channels > 1),
        GUIDED=int(uncond is not None),
        COPIES=copies,
        BLOCK=policy.block,
        num_warps=policy.num_warps,
        enable_fp_fusion=False,
    )


# Rows of the tables the package makes: (registers, feed, next_feed, prediction, masks, dests).
_AOT_ROWS = {
    "ddim middle": RowStructure(1, 0, 0, 3, (0x101,), (0,)),
    "ddpm middle": RowStructure(1, 0, 0, 3, (0x301,), (0,)),
    "2M first": RowStructure(2, 0, 0, 3, (0x101, 0x100), (0, 1)),
    "2M middle": RowStructure(2, 0, 0, 3, (0x103, 0x100), (0, 1)),
    "2M last": RowStructure(2, 0, -1, 3, (0x103,), (0,)),
    # The most that takes the wide block.
    "four registers": RowStructure(4, 0, 0, 3, (0x30F, 0x30F, 0x30F, 0x30F), (0, 1, 2, 3)),
    "full width": RowStructure(8, 0, 0, 3, (0x3FF, 0x3FF, 0x3FF, 0x3FF), (0, 1, 2, 3)),
}


_AOT_HUNGRIEST = ("four registers", "full width")
_AOT_TYPES = (("fp32", "fp32"), ("fp32", "fp16"), ("fp32", "bf16"), ("fp64", "fp64"))
_AOT_INTEGERS = ("draw", "per_image", "images", "channels")


def aot_configs() -> Iterator[dict[str, Any]]:
    """Launches to compile ahead of time, in the terms of fastdiff.ops.AotConfig."""
    for name, structure in _AOT_ROWS.items():
        for state, model in _AOT_TYPES:
            size = 8 if state == "fp64" else 4
            # The blocks of small and of large states; of the hungriest rows, all candidates.
            policies = {LaunchPolicy.select(n, size, structure.num_registers) for n in (1, 1 << 24)}
            if name in _AOT_HUNGRIEST and model in ("bf16", "fp64"):
                policies |= set(LaunchPolicy.candidates(1, size, structure.num_registers))
            for (guided, last), policy in itertools.product(
                ((0, 0), (1, 0), (1, 1)), sorted(policies, key=lambda p: (-p.block, p.num_warps))
            ):
                if last and not structure.uses_noise:
                    continue
                constexprs = {
                    **structure.constexprs(True),
                    "PHILOX": int(structure.uses_noise),
                    "CHANNELS_LAST": last,
                    "GUIDED": guided,
                    "COPIES": 1 + guided,
                    "BLOCK": policy.block,
                }
                types = {"seeds_ptr": "*i64", **dict.fromkeys(_AOT_INTEGERS, "i32")}
                types |= dict.fromkeys(("output_ptr", "uncond_ptr", "input_ptr"), f"*{model}")
                types |= dict.fromkeys(constexprs, "constexpr")
                names = solver_step_kernel.arg_names
                signature = {argument: types.get(argument, f"*{state}") for argument in names}
                options = {"num_warps": policy.num_warps, "enable_fp_fusion": False}
                kind = f"{'guided ' * guided}{'channels last ' * last}"
                label = (
                    f"{name} {state}/{model} {kind}BLOCK={policy.block} warps={policy.num_warps}"
                )
                yield {
                    "kernel": solver_step_kernel,
                    "signature": signature,
                    "constexprs": constexprs,
                    "options": options,
                    "label": label,
                    # Images of such a size are the rule, and take the kernel's widest loads.
                    "multiples_of_16": ("per_image",),
                }
