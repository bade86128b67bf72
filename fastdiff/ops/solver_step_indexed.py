"""solver_step_indexed: a solver step whose row is a number on the device, which nobody reads back.

    w          = rows[index]                                            [1 + R, R + 2]
    registers  = [state, *history]                                      R of them
    output     = output                  or  uncond + w[0][R+1]*(output - uncond)
    prediction = sum_r w[0][r]*registers[r] + w[0][R]*output
    result[r]  = sum_s w[1+r][s]*registers[s] + w[1+r][R]*prediction + w[1+r][R+1]*noise

The whole table is handed over; what a row reads, writes and draws follows from its coefficients.
So one launch serves every row, and a CUDA graph of one step replays a trajectory. An index outside
the table takes its first or its last row. The op changes no index: ``index.add_(1)`` is the
caller's, who knows when a step is over (inside a kernel, other blocks may not have read it yet).

Bits: those of solver_step with the row's coefficients. A term whose coefficient is exactly 0 is
left out and not read. fastdiff/solvers/trajectory.py makes ``rows`` and ``draws`` of a SolverTable.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from fastdiff._ext import DTYPE_CODES, ext, ext_status
from fastdiff._philox import reference_normal
from fastdiff.environment import interpreting
from fastdiff.ops._contract import (
    AotConfig,
    Call,
    Example,
    Implementation,
    Op,
    outputs,
    register,
)
from fastdiff.ops.solver_step import (
    MAX_REGISTERS,
    MAX_UPDATES,
    ROWS,
    channels_of,
    empty_stack,
    unsupported_tensors,
)

Tensor = torch.Tensor


@dataclass(frozen=True)
class Step:
    """The arguments of one call, in the order and with the defaults of the schema."""

    state: Tensor
    output: Tensor
    rows: Tensor
    index: Tensor
    history: Tensor | None = None
    uncond: Tensor | None = None
    noise: Tensor | None = None
    seeds: Tensor | None = None
    draws: Tensor | None = None
    with_prediction: bool = False

    @property
    def registers(self) -> int:
        return int(self.rows.shape[1]) - 1

    def row(self) -> int:
        """The row's number, read back: for the CPU and for counting."""
        return min(max(int(self.index), 0), self.rows.shape[0] - 1)

    def weights(self) -> list[list[float]]:
        """The row's coefficients, read back."""
        return self.rows[self.row()].tolist()  # type: ignore[no-any-return]


def check(*args: Any, **kwargs: Any) -> None:
    """ValueError or TypeError for arguments outside the contract; no number is looked at."""
    step = Step(*args, **kwargs)
    state, rows, shape = step.state, step.rows, tuple(step.state.shape)
    if state.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"state must be float32 or float64, got {state.dtype}")
    if step.output.dtype not in DTYPE_CODES:
        raise TypeError(
            f"output must be float32, float16, bfloat16 or float64, got {step.output.dtype}"
        )
    if state.dim() < 1:
        raise ValueError("state must have shape [B, ...], got ()")
    if rows.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"rows must be float32 or float64, got {rows.dtype}")
    if (
        rows.dim() != 3
        or rows.shape[0] < 1
        or not 2 <= rows.shape[1] <= MAX_REGISTERS + 1
        or rows.shape[2] != rows.shape[1] + 1
    ):
        raise ValueError(
            f"rows must have shape [N, 1 + R, R + 2] for 1..{MAX_REGISTERS} registers, "
            f"got {tuple(rows.shape)}"
        )
    integers = (torch.int32, torch.int64)
    number = rows.shape[0]
    expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "output": (shape, (step.output.dtype,)),
        "uncond": (shape, (step.output.dtype,)),
        "noise": (shape, (state.dtype,)),
        "history": ((step.registers - 1, *shape), (state.dtype,)),
        "seeds": (shape[:1], (torch.int64,)),
        "draws": ((number,), integers),
        "index": ((), integers),
        "rows": (tuple(rows.shape), (rows.dtype,)),
    }
    for name, (size, dtypes) in expected.items():
        tensor = getattr(step, name)
        if tensor is None:
            continue
        if tuple(tensor.shape) != size:
            raise ValueError(f"{name} must have shape {size}, got {tuple(tensor.shape)}")
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
        if tensor.device != state.device:
            raise ValueError(f"{name} must be on {state.device}, got {tensor.device}")
    if step.history is None and step.registers > 1:
        raise ValueError(f"history must be given for {step.registers} registers, got None")
    if step.noise is not None and step.seeds is not None:
        raise ValueError("seeds must be None when noise is given, got both")
    if (step.seeds is None) != (step.draws is None):
        raise ValueError("seeds and draws must be given together, got one of them")


def reference(*args: Any, **kwargs: Any) -> Tensor:
    """The op in plain PyTorch; nothing is read back, so that compilers and graphs can hold it."""
    values = torch.stack(results(*args, **kwargs))
    out = empty_stack(Step(*args, **kwargs).state, len(values))
    return values if values.stride() == out.stride() else out.copy_(values)


def pattern(*args: Any, **kwargs: Any) -> Tensor:
    """The same operations, in the memory order they give."""
    return torch.stack(results(*args, **kwargs))


def results(*args: Any, **kwargs: Any) -> list[Tensor]:
    """The reference's results one by one, for a compiler to fuse with what is around them."""
    step = Step(*args, **kwargs)
    x = step.state
    registers = [x, *(() if step.history is None else step.history.unbind(0))]
    index = step.index.clamp(0, step.rows.shape[0] - 1).reshape(1)
    of_prediction, *of_results = step.rows.index_select(0, index)[0].unbind(0)
    weights = of_prediction.unbind(0)
    output = step.output.to(x.dtype)
    if step.uncond is not None:
        uncond = step.uncond.to(x.dtype)
        output = uncond + (output - uncond) * weights[-1].to(x.dtype)
    prediction = _sum([*registers, output], weights[:-1])
    if step.noise is not None:
        noise = step.noise
    elif step.seeds is not None:
        assert step.draws is not None  # the check
        draw = step.draws.index_select(0, index)[0].long()
        noise = reference_normal(x.shape, step.seeds, draw, x.device).to(x.dtype)
    else:
        noise = torch.full_like(x, float("nan"))
    operands = [*registers, prediction, noise]
    new = [_sum(operands, weights.unbind(0)) for weights in of_results]
    return [*new, prediction] if step.with_prediction else new


def _sum(values: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The terms in order, the first one unadded; one whose weight is 0 is left out."""
    total, started = torch.zeros_like(values[0]), None
    for value, weight in zip(values, weights, strict=True):
        used = weight != 0
        # Whatever is in what is left out, no gradient sees it.
        term = torch.where(used, value, 0.0) * weight.to(value.dtype)
        new = term if started is None else torch.where(started, total + term, term)
        total = torch.where(used, new, total)
        started = used if started is None else started | used
    return total


# --- The kernels write wherever they are told: to new memory, or over the registers.


class _Memory(NamedTuple):
    """history: the registers but the first. new: [R, ...]. prediction: where it is wanted."""

    history: Tensor | None
    new: Tensor
    prediction: Tensor | None


def _unsupported(step: Step) -> str:
    x, history = step.state, step.history
    for name, tensor in (("rows", step.rows), ("seeds", step.seeds), ("draws", step.draws)):
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} is not contiguous"
    if history is not None and history.numel():
        if history.shape[0] > 1 and history.stride(0) != x.numel():
            return "the registers do not lie one behind the other"
        history = history[0]
    return unsupported_tensors(x, step.output, step.uncond, step.noise, history)


def _cpp_supports(*args: Any, **kwargs: Any) -> str:
    step = Step(*args, **kwargs)
    if step.state.device.type != "cpu":
        return f"it computes on the CPU, the state is on {step.state.device}"
    return ext_status() or _unsupported(step) or _native_row(step)[1]


def _triton_supports(*args: Any, **kwargs: Any) -> str:
    step = Step(*args, **kwargs)
    if step.state.device.type != "cuda" and not interpreting():
        return f"it computes on CUDA devices, the state is on {step.state.device}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return _unsupported(step)


def _native_row(step: Step) -> tuple[Any, str]:
    """The row as csrc/solver_step.h knows it, and why it cannot be one, or ""."""
    weights = tuple(map(tuple, step.weights()))
    if step.noise is None and step.seeds is None and any(row[-1] != 0 for row in weights[1:]):
        return None, "there is neither noise nor seeds for a row that adds noise"
    draw = 0 if step.draws is None else int(step.draws[step.row()])
    return _packed(weights, draw, step.with_prediction)


@functools.lru_cache(maxsize=2048)
def _packed(
    weights: tuple[tuple[float, ...], ...], draw: int, with_prediction: bool
) -> tuple[Any, str]:
    registers = len(weights) - 1
    *of_registers, from_output, guidance = weights[0]
    read = [r for r, value in enumerate(of_registers) if value != 0]
    updates = {
        r: row for r, row in enumerate(weights[1:]) if any(v != (i == r) for i, v in enumerate(row))
    }
    count = registers + with_prediction
    if with_prediction:
        updates[registers] = (*(0.0,) * registers, 1.0, 0.0)
    if len(read) > 1 or count > MAX_REGISTERS or len(updates) > MAX_UPDATES:
        return None, (
            f"the row reads {len(read)} registers for its prediction and updates {len(updates)} "
            f"of {count}, more than 1, {MAX_UPDATES} and {MAX_REGISTERS}"
        )
    # Something is always updated: the state by itself, where nothing else is.
    updates = updates or {0: weights[1]}
    feed = read[0] if read else 0
    signed = (draw + 2**31) % 2**32 - 2**31  # a bit pattern to the kernels
    index = np.array([[feed, signed, len(updates), -1, *updates]], dtype=np.int32)
    coef = [0.0, of_registers[feed], from_output, guidance]
    for row in updates.values():
        coef += [*row[:registers], *[0.0] * with_prediction, *row[registers:]]
    module = ext()
    assert module is not None  # `supports` came first
    return module.PackedTable(index, np.array([coef]), count, len(updates)), ""


def _run_cpp(step: Step, memory: _Memory) -> None:
    """In place: what is not there yet is copied first."""
    x, new = step.state, memory.new
    if new.data_ptr() != x.data_ptr():
        new[0].copy_(x)
        if memory.history is not None:
            new[1:].copy_(memory.history)
    slices = [*new.unbind(0), *([] if memory.prediction is None else [memory.prediction])]
    code = DTYPE_CODES[step.output.dtype]
    ext().solver_step(  # type: ignore[union-attr]
        _native_row(step)[0],
        0,
        registers=[tensor.data_ptr() for tensor in slices],
        state_dtype=DTYPE_CODES[x.dtype],
        output=step.output.data_ptr(),
        uncond=0 if step.uncond is None else step.uncond.data_ptr(),
        output_dtype=code,
        input=0,
        input_dtype=code,
        copies=1,
        noise=0 if step.noise is None else step.noise.data_ptr(),
        seeds=[] if step.seeds is None else [seed % 2**64 for seed in step.seeds.tolist()],
        images=x.shape[0],
        per_image=x[0].numel(),
        threads=torch.get_num_threads(),
        channels=channels_of(x),
    )


def _run_triton(step: Step, memory: _Memory) -> None:
    from fastdiff.kernels import solver_step_indexed as kernels

    kernels.solver_step_indexed(
        step.state,
        memory.history,
        step.output,
        step.rows,
        step.index,
        memory.new,
        memory.prediction,
        uncond=step.uncond,
        noise=step.noise,
        seeds=step.seeds,
        draws=step.draws,
        channels=channels_of(step.state),
    )


def _to_new_memory(run: Any, *args: Any, **kwargs: Any) -> Tensor:
    step = Step(*args, **kwargs)
    count = step.registers
    out = empty_stack(step.state, count + step.with_prediction)
    if out.numel():
        prediction = out[count] if step.with_prediction else None
        run(step, _Memory(step.history, out[:count], prediction))
    return out


def bytes_moved(*args: Any, **kwargs: Any) -> int:
    """What the row reads, each tensor once, and every result."""
    step = Step(*args, **kwargs)
    weights, count, size = step.weights(), step.output.numel(), step.state.element_size()
    state = sum(any(row[r] != 0 for row in weights) for r in range(step.registers))
    state += step.registers + step.with_prediction
    state += step.noise is not None and any(row[-1] != 0 for row in weights[1:])
    outputs = (weights[0][-2] != 0) * (1 if step.uncond is None else 2)
    return count * (state * size + outputs * step.output.element_size())


def flops(*args: Any, **kwargs: Any) -> int:
    """A product and a sum for every term of the row; 3 for guidance; 60 for a normal drawn."""
    step = Step(*args, **kwargs)
    weights = step.weights()
    terms = sum(value != 0 for row in (weights[0][:-1], *weights[1:]) for value in row)
    guided = 0 if step.uncond is None else 3
    drawn = 60 if step.seeds is not None and any(row[-1] != 0 for row in weights[1:]) else 0
    return step.output.numel() * (2 * terms + guided + drawn)


# --- Cases: tables of a few rows, of which the index takes one.

_RANDOM = [float(k * 7 % 11 - 5) / 4 for k in range(64)]


def _weights(row: str | int, guidance_scale: float) -> list[list[float]]:
    """[1 + R, R + 2] of a name of ROWS, or of so many registers, each of which reads every one."""
    if isinstance(row, int):
        flat = [value or 0.3 for value in _RANDOM]
        count, from_state, from_output = row, 0.3, 0.7
        updates = [[flat[(r * 5 + k) % 64] for k in range(row + 2)] for r in range(row)]
    else:
        from_state, from_output, coefficients = ROWS[row]
        count = 2 if row == "DPM++ 2M" else 1
        width = count + 2
        updates = [list(coefficients[k * width : (k + 1) * width]) for k in range(count)]
    first = [from_state, *(0.0,) * (count - 1), from_output, guidance_scale]
    return [first, *updates]


def example(
    name: str,
    row: str | int,
    shape: tuple[int, ...],
    *,
    at: int = 1,
    guidance_scale: float | None = None,
    noise: str = "",
    channels_last: bool = False,
    with_prediction: bool = False,
    rows_dtype: torch.dtype = torch.float64,
    unread: bool = False,
) -> Example:
    """A case with random numbers: a table of three rows, multiples of ``row``.

    row: a name of ROWS, or a number of registers that all read each other. at: the index. noise:
    "tensor" or "seeds". unread: the history is not read.
    """

    def make(device: torch.device | str, dtype: torch.dtype) -> Call:
        generator = torch.Generator().manual_seed(29)

        def random(size: tuple[int, ...], to: torch.dtype) -> Tensor:
            tensor = torch.randn(size, generator=generator).to(device, to)
            if channels_last:
                tensor = tensor.movedim(-3, -1).contiguous().movedim(-1, -3)
            return tensor

        scale = 1.0 if guidance_scale is None else guidance_scale
        middle = torch.tensor(_weights(row, scale), dtype=torch.float64)
        count = middle.shape[0] - 1
        if unread:
            middle[:, 1:count] = 0.0
        rows = torch.stack([middle * 0.5, middle, middle * -3]).to(device, rows_dtype)
        index = torch.tensor(at, device=device)
        kwargs: dict[str, Any] = {"with_prediction": with_prediction}
        if count > 1:
            kwargs["history"] = random((count - 1, *shape), torch.float32)
        if guidance_scale is not None:
            kwargs["uncond"] = random(shape, dtype)
        if noise == "tensor":
            kwargs["noise"] = random(shape, torch.float32)
        elif noise == "seeds":
            seeds = [2**40 + 7 * i for i in range(shape[0])]
            kwargs["seeds"] = torch.tensor(seeds, dtype=torch.int64, device=device)
            kwargs["draws"] = torch.tensor([0, 3, 9], dtype=torch.int32, device=device)
        return Call((random(shape, torch.float32), random(shape, dtype), rows, index), kwargs)

    return Example(name, make)


EXAMPLES = (
    example("SD1.5 512x512, DPM++ 2M", "DPM++ 2M", (1, 4, 64, 64)),
    example("FLUX 1024x1024, Euler", "flow Euler", (1, 4096, 64)),
    example(
        "SDXL 1024x1024, batch 16, DPM++ 2M guided",
        "DPM++ 2M",
        (16, 4, 128, 128),
        guidance_scale=7.5,
    ),
    example("SDXL 1024x1024, batch 16, DDPM drawn", "DDPM", (16, 4, 128, 128), noise="seeds"),
)

SAMPLES = (
    example("2M, one image", "DPM++ 2M", (1, 4, 8, 8)),
    example("2M, guided", "DPM++ 2M", (2, 4, 9, 7), guidance_scale=7.5, with_prediction=True),
    example("DDPM", "DDPM", (3, 3, 5, 7), noise="tensor", rows_dtype=torch.float32),
    example("DDPM, drawn", "DDPM", (3, 3, 5, 7), noise="seeds"),
    example("drawn, channels last", "DDPM", (2, 5, 6, 3), noise="seeds", channels_last=True),
    example("2M, channels last", "DPM++ 2M", (2, 4, 9, 7), channels_last=True, at=0),
    example("last row", "DDIM", (2, 1543), at=2, with_prediction=True),
    example("past the end", "DDIM", (5, 1), at=1000),
    example("before the start", "DDIM", (2, 37), at=-4),
    example("history unread", "DPM++ 2M", (2, 3, 4), unread=True),
    example("three registers", 3, (2, 37), noise="tensor", with_prediction=True),
    example("eight registers, drawn", 8, (2, 37), noise="seeds", with_prediction=True),
    example("one image, one element", "DDIM", (1, 1)),
    example("empty batch", "DPM++ 2M", (0, 4, 8, 8)),
)


def _aot() -> Iterable[AotConfig]:
    from fastdiff.kernels import solver_step_indexed as kernels

    return (AotConfig(**config) for config in kernels.aot_configs())


OP = register(
    Op(
        name="solver_step_indexed",
        schema="(Tensor state, Tensor output, Tensor rows, Tensor index, Tensor? history=None, "
        "Tensor? uncond=None, Tensor? noise=None, Tensor? seeds=None, Tensor? draws=None, "
        'bool with_prediction=False, str impl="auto") -> Tensor',
        reference=reference,
        pattern=pattern,
        check=check,
        implementations=(
            Implementation("cpp", _cpp_supports, functools.partial(_to_new_memory, _run_cpp)),
            Implementation(
                "triton", _triton_supports, functools.partial(_to_new_memory, _run_triton)
            ),
        ),
        examples=EXAMPLES,
        samples=SAMPLES,
        bytes_moved=bytes_moved,
        flops=flops,
        aot=_aot,
        numerics="exact",
    )
)


def solver_step_indexed(
    state: Tensor,
    output: Tensor,
    rows: Tensor,
    index: Tensor,
    *,
    history: Tensor | None = None,
    uncond: Tensor | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    draws: Tensor | None = None,
    with_prediction: bool = False,
    impl: str = "auto",
) -> Tensor:
    """One solver step by the row that ``index`` names on the device; see the file's docstring.

    state: [B, ...], float32 or float64: register 0. history: the R - 1 others, [R-1, B, ...].
    output: [B, ...], what the model returned; uncond: its output without the condition.
    rows: [N, 1 + R, R + 2], float32 or float64, R <= 8. index: 0-dim, int32 or int64.
    noise: [B, ...] like the state; or seeds (int64 [B], 0..2^63-1) with draws (int32 or int64 [N]):
    row n then takes draw draws[n] of each seed's Philox stream. With none of them a row that adds
    noise gives NaN.
    with_prediction: the prediction is returned, too, as the last result.
    impl: "auto", "cpp" (which reads the index: it is on the CPU), "triton" or "reference".

    Returns the new registers [R (+ 1), B, ...] in the state's dtype and memory order,
    differentiable through the reference. ValueError or TypeError for arguments outside this;
    RuntimeError when a named impl cannot run.
    """
    return torch.ops.fastdiff.solver_step_indexed(
        state, output, rows, index, history, uncond, noise, seeds, draws, with_prediction, impl
    )


@torch.library.custom_op("fastdiff::solver_step_indexed_", mutates_args=("registers",))
def _in_place(
    registers: Tensor,
    output: Tensor,
    rows: Tensor,
    index: Tensor,
    uncond: Tensor | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    draws: Tensor | None = None,
    impl: str = "auto",
) -> None:
    history = registers[1:] if registers.shape[0] > 1 else None
    arguments = (registers[0], output, rows, index, history, uncond, noise, seeds, draws)
    check(*arguments)
    run = OP.choose(impl, *arguments)
    one_block = registers.shape[0] == 1 or registers.stride(0) == registers[0].numel()
    if isinstance(run, functools.partial) and one_block:
        if registers.numel():
            run.args[0](Step(*arguments), _Memory(history, registers, None))
    else:
        registers.copy_(outputs(run(*arguments))[0])


@_in_place.register_fake
def _(*args: Any, **kwargs: Any) -> None:
    return None


def solver_step_indexed_(
    registers: Tensor,
    output: Tensor,
    rows: Tensor,
    index: Tensor,
    *,
    uncond: Tensor | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    draws: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """:func:`solver_step_indexed` over its own registers, [R, B, ...], in one pass over them.

    Without a gradient. It is what a captured trajectory replays.
    """
    torch.ops.fastdiff.solver_step_indexed_(
        registers, output, rows, index, uncond, noise, seeds, draws, impl
    )
