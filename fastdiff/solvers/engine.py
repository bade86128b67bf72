"""Running a solver table. :func:`run_reference` is the meaning; the C++ loop must give its bits.

Every product and every sum is a torch operation of its own, in the registers' dtype and in the
order of the table: nothing is contracted to an FMA, so every engine can round the same way.

For one recorded step that replays a whole trajectory, see fastdiff/solvers/trajectory.py.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff._ext import DTYPE_CODES, ext, ext_status
from fastdiff._philox import device_seeds
from fastdiff.solvers.grids import check_choice
from fastdiff.solvers.noise import Noise, PhiloxNoise
from fastdiff.solvers.table import PackedTable, Row, SolverTable, Update


@dataclass(frozen=True)
class StepInfo:
    """What a callback sees after a step.

    index: 0..total-1. time: the time the model was given.
    x: the state after the step, in the state's dtype; a view of memory the next step overwrites:
        clone it to keep it.
    prediction: the solver's prediction in this step (``table.prediction`` says of what), or None
        when the engine does not keep it.
    registers: all registers, state first; views too, None where nothing is written yet.
    level: (alpha, sigma) of ``x``, where the table knows it.
    capture: in ``fastdiff.sample``, gives the RunState from which the run can be resumed.
    """

    index: int
    total: int
    time: float
    x: Tensor
    prediction: Tensor | None = None
    registers: Sequence[Tensor | None] = ()
    level: tuple[float, float] | None = None
    capture: Callable[[], Any] | None = None

    def with_capture(self, capture: Callable[[], Any]) -> StepInfo:
        """The same with that ``capture``."""
        return replace(self, capture=capture)


class Evaluate(Protocol):
    """The model of one run.

    A call gives whatever the model returns. ``accept`` makes of it a tensor like the model input
    (shape, dtype, device, memory format) or raises; a fast engine skips it for an output that is
    one already.
    """

    def __call__(self, model_input: Tensor, row: int, /) -> object: ...

    def accept(self, output: object, /) -> Tensor: ...


# Called after each step; False stops the run.
OnStep = Callable[[StepInfo], bool]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype registers are held in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def run_reference(
    table: SolverTable,
    x: Tensor,
    evaluate: Evaluate,
    *,
    dtype: torch.dtype,
    copies: int = 1,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    resume: tuple[int, Sequence[Tensor | None]] | None = None,
) -> Tensor:
    """Runs ``table`` from the state ``x`` with plain torch operations.

    x: [B, ...] in the registers' dtype (float32 or float64); not modified.
    dtype: the model input's dtype. copies: 2 evaluates [uncond, cond] as one batch of 2B.
    noise: gives draw k as a tensor like x; needed when the table draws noise.
    resume: the row to begin with and the registers before it, the first of which is ``x``.
    Returns the state after the last step, or after the one where ``on_step`` returned False.
    """
    if table.num_draws and noise is None:
        raise ValueError(f"noise must be given for a table with {table.num_draws} draws, got None")
    first, rest = (0, ()) if resume is None else (resume[0], resume[1][1:])
    registers: list[Tensor | None] = [x, *rest, *([None] * (table.num_registers - 1 - len(rest)))]
    batch = x.shape[0]
    total = len(table)
    for i, row in enumerate(table.rows[first:], start=first):
        feed = registers[row.feed]
        assert feed is not None  # the table's validation
        output = feed
        if row.evaluates:
            model_input = (feed if row.input_scale == 1 else feed * row.input_scale).to(dtype)
            if copies > 1:
                model_input = torch.cat([model_input] * copies)
            elif model_input is x:
                model_input = x.clone()  # a model may write to its input; the caller's x must live
            output = evaluate.accept(evaluate(model_input, i)).to(x.dtype)
            if copies == 2:
                uncond, cond = output[:batch], output[batch:]
                output = uncond + (cond - uncond) * row.guidance_scale
        z = noise.draw(row.draw) if noise is not None and row.draw >= 0 else None
        new, prediction = _row_values(row, registers, output, z)
        for update, value in zip(row.updates, new, strict=True):
            registers[update.dest] = value
        state = registers[0]
        assert state is not None
        if on_step is not None:
            if state is x:
                state = registers[0] = x.clone()  # a callback may write to the state
            level = table.level_after(i)
            if not on_step(StepInfo(i, total, row.time, state, prediction, registers, level)):
                break
    result = registers[0]
    assert result is not None
    return result.clone() if result is x else result


def _row_values(
    row: Row, registers: Sequence[Tensor | None], output: Tensor, z: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """What the row's updates give, and its prediction."""
    feed = registers[row.feed]
    assert feed is not None  # the table's validation
    prediction = _sum([(row.from_state, feed), (row.from_output, output)], like=feed)
    return [_update(u, registers, prediction, z, feed) for u in row.updates], prediction


def step_reference(
    row: Row, registers: Sequence[Tensor], output: Tensor, noise: Tensor | None
) -> None:
    """One row, in place on the registers, with plain torch operations."""
    new, _ = _row_values(row, registers, output, noise)
    for update, value in zip(row.updates, new, strict=True):
        registers[update.dest].copy_(value)


def _update(
    update: Update,
    registers: Sequence[Tensor | None],
    prediction: Tensor,
    z: Tensor | None,
    like: Tensor,
) -> Tensor:
    terms = list(zip(update.from_registers, registers, strict=True))
    return _sum([*terms, (update.from_prediction, prediction), (update.from_noise, z)], like)


def _sum(terms: list[tuple[float, Tensor | None]], like: Tensor) -> Tensor:
    """The sum in the order given; a coefficient of exactly 0 skips its term, unread."""
    total: Tensor | None = None
    for coefficient, value in terms:
        if coefficient == 0:
            continue
        assert value is not None
        term = value * coefficient
        total = term if total is None else total + term
    return torch.zeros_like(like) if total is None else total


ENGINES = ("auto", "cpp", "reference")


def run(
    table: SolverTable,
    x: Tensor,
    evaluate: Evaluate,
    *,
    dtype: torch.dtype,
    copies: int = 1,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    engine: str = "auto",
    resume: tuple[int, Sequence[Tensor | None]] | None = None,
    owned: bool = False,
) -> Tensor:
    """Runs ``table`` with the engine asked for; the arguments are those of run_reference.

    owned: ``x`` may be overwritten, and its memory be that of the result.

    "auto" takes the C++ loop where it can run, else the reference. "cpp" raises RuntimeError with
    the reason where it cannot.
    """
    check_choice("engine", engine, ENGINES)
    if table.has_rules:
        raise ValueError(
            f"table must have no rules here, {table.name} has; see fastdiff/sampling/rules.py"
        )
    module, reason = (None, "") if engine == "reference" else _cpp(x)
    if engine == "cpp" and module is None:
        raise RuntimeError(f"engine='cpp' cannot run: {reason}")
    if module is not None:
        return _run_cpp(module, table, x, evaluate, dtype, copies, noise, on_step, resume, owned)
    return run_reference(
        table,
        x,
        evaluate,
        dtype=dtype,
        copies=copies,
        noise=noise,
        on_step=on_step,
        resume=resume,
    )


# The extension's copies of packed tables, so that a table is handed over once.
_NATIVE: weakref.WeakKeyDictionary[PackedTable, Any] = weakref.WeakKeyDictionary()


def native_table(module: ModuleType, packed: PackedTable) -> Any:
    """The extension's copy of a packed table, made once."""
    native = _NATIVE.get(packed)
    if native is None:
        native = module.PackedTable(
            packed.index, packed.coef, packed.num_registers, packed.max_updates
        )
        _NATIVE[packed] = native
    return native


def _cpp(x: Tensor) -> tuple[ModuleType | None, str]:
    """The extension when its loop can run on ``x``, else None and why not."""
    module = ext()
    if module is None:
        return None, ext_status()
    if not hasattr(module, "sampling_loop"):
        return None, "this build of the extension has no sampling loop; reinstall fastdiff"
    if x.device.type == "cuda" and not hasattr(module, "cuda_solver_step"):
        return None, f"the state is on {x.device}, the extension was built without CUDA"
    if x.device.type not in ("cpu", "cuda"):
        return None, f"its loop runs on the CPU and on CUDA devices, the state is on {x.device}"
    return module, ""


def _run_cpp(
    module: ModuleType,
    table: SolverTable,
    x: Tensor,
    evaluate: Evaluate,
    dtype: torch.dtype,
    copies: int,
    noise: Noise | None,
    on_step: OnStep | None,
    resume: tuple[int, Sequence[Tensor | None]] | None,
    owned: bool,
) -> Tensor:
    if table.num_draws and noise is None:
        raise ValueError(f"noise must be given for a table with {table.num_draws} draws, got None")
    total = len(table)
    packed = table.pack()
    x = x.contiguous(memory_format=_format(x))  # one of the two orders the kernels know
    start, given = (0, ()) if resume is None else resume
    kept = [None if r is None else r.contiguous(memory_format=_format(x)) for r in given[1:]]
    kept += [None] * (table.num_registers - 1 - len(kept))
    registers = [
        x if owned else x.clone(),
        *(torch.empty_like(x) if r is None else r.clone() for r in kept),
    ]
    written = [True, *(r is not None for r in kept)]
    direct = dtype == x.dtype and copies == 1 and not table.scales_inputs
    if direct:
        inputs = [registers[feed] for feed in table.feeds]
        buffer = None
    else:
        row = table.rows[start]
        first = registers[row.feed]
        scaled = first if row.input_scale == 1 else first * row.input_scale
        # cat would turn a channels_last batch of one into a contiguous one.
        buffer = torch.empty((copies * x.shape[0], *x.shape[1:]), dtype=dtype, device=x.device).to(
            memory_format=_format(x)
        )
        for part in buffer.chunk(copies):
            part.copy_(scaled)
        inputs = [buffer] * total

    seeds: list[int] = []
    draw = None
    if isinstance(noise, PhiloxNoise):
        seeds = noise.seeds  # drawn inside the step
    elif noise is not None:

        def draw(index: int) -> Tensor:
            return noise.draw(index).contiguous(memory_format=_format(x))

    after = None
    if on_step is not None:

        def after(row: int) -> bool:
            for update in table.rows[row].updates:
                written[update.dest] = True
            views = [r if w else None for r, w in zip(registers, written, strict=True)]
            time, level = table.rows[row].time, table.level_after(row)
            return on_step(StepInfo(row, total, time, registers[0], None, views, level))

    place: dict[str, Any] = {"seeds": seeds, "threads": torch.get_num_threads()}
    if x.is_cuda:
        keys = device_seeds(tuple(seeds), x.device) if seeds else None
        place |= {
            "seeds": [],
            "device_seeds": 0 if keys is None else keys.data_ptr(),
            "stream": torch.cuda.current_stream(x.device).cuda_stream,
        }
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        module.sampling_loop(
            table=native_table(module, packed),
            evaluate=evaluate,
            inputs=inputs,
            like=inputs[0],
            accept=evaluate.accept,
            draw=draw,
            on_step=after,
            registers=[register.data_ptr() for register in registers],
            state_dtype=DTYPE_CODES[x.dtype],
            output_dtype=DTYPE_CODES[dtype],
            input=0 if buffer is None else buffer.data_ptr(),
            input_dtype=DTYPE_CODES[dtype],
            copies=copies,
            first=start,
            images=x.shape[0],
            per_image=x[0].numel(),
            channels=1 if x.is_contiguous() else x.shape[1],
            **place,
        )
    return registers[0]


def _format(x: Tensor) -> torch.memory_format:
    """channels_last for a state that is laid out so, else contiguous."""
    if x.dim() == 4 and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format
