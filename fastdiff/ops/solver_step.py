"""solver_step: one row of a solver table, all its linear updates in one pass over memory.

    output     = output                   or  uncond + guidance_scale*(output - uncond)
    prediction = from_state*registers[feed] + from_output*output
    result[u]  = sum_r coefficients[u][r]*registers[r]
                 + coefficients[u][R]*prediction + coefficients[u][R+1]*noise

elementwise, in the registers' dtype. A term whose coefficient is exactly 0 is not read, terms are
added in the order written, nothing is contracted to an FMA: every implementation has the same bits.
The noise may be drawn inside: Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller.

The loop of ``fastdiff.sample`` runs the same kernels in place; see fastdiff/solvers/table.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fastdiff import tuning
from fastdiff._ext import DTYPE_CODES, ext, ext_status
from fastdiff._philox import device_seeds, reference_normal
from fastdiff.environment import interpreting
from fastdiff.ops._contract import AotConfig, Call, Example, Implementation, Op, Tuning, register

Tensor = torch.Tensor
MAX_REGISTERS = 8
MAX_UPDATES = 4


class Step(NamedTuple):
    """The arguments of one call, in the order and with the defaults of the schema."""

    registers: Tensor
    output: Tensor
    coefficients: Sequence[float]
    from_state: float = 0.0
    from_output: float = 1.0
    feed: int = 0
    guidance_scale: float = 1.0
    uncond: Tensor | None = None
    noise: Tensor | None = None
    seeds: Sequence[int] | None = None
    draw: int = 0

    @property
    def width(self) -> int:
        """Coefficients of one update."""
        return int(self.registers.shape[0]) + 2  # a number even where shapes are symbols

    @property
    def updates(self) -> list[Sequence[float]]:
        """The coefficients of each update."""
        flat, width = self.coefficients, self.width
        return [flat[start : start + width] for start in range(0, len(flat), width)]

    @property
    def uses_noise(self) -> bool:
        return any(update[-1] != 0 for update in self.updates)


def check(*args: Any, **kwargs: Any) -> None:
    """ValueError or TypeError for arguments outside the contract."""
    step = Step(*args, **kwargs)
    registers, shape = step.registers, tuple(step.registers.shape[1:])
    if registers.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"registers must be float32 or float64, got {registers.dtype}")
    if registers.dim() < 2 or not 1 <= registers.shape[0] <= MAX_REGISTERS:
        raise ValueError(
            f"registers must have shape [1..{MAX_REGISTERS}, B, ...], got {tuple(registers.shape)}"
        )
    if step.output.dtype not in DTYPE_CODES:
        raise TypeError(
            f"output must be float32, float16, bfloat16 or float64, got {step.output.dtype}"
        )
    dtypes = {"output": step.output.dtype, "uncond": step.output.dtype, "noise": registers.dtype}
    for name, dtype in dtypes.items():
        tensor = getattr(step, name)
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
        if tensor.device != registers.device:
            raise ValueError(f"{name} must be on {registers.device}, got {tensor.device}")
    updates, rest = divmod(len(step.coefficients), step.width)
    if rest or not 1 <= updates <= MAX_UPDATES:
        raise ValueError(
            f"coefficients must hold {step.width} numbers (registers, prediction, noise) for each "
            f"of 1..{MAX_UPDATES} updates, got {len(step.coefficients)}"
        )
    if not 0 <= step.feed < registers.shape[0]:
        raise ValueError(f"feed must be in 0..{registers.shape[0] - 1}, got {step.feed}")
    _check_noise(step)


def _check_noise(step: Step) -> None:
    if step.noise is not None and step.seeds is not None:
        raise ValueError("seeds must be None when noise is given, got both")
    if step.uses_noise and step.noise is None and step.seeds is None:
        raise ValueError("noise or seeds must be given for a step that uses noise, got neither")
    if not 0 <= step.draw < 2**32:
        raise ValueError(f"draw must be in 0..2^32-1, got {step.draw}")
    if step.seeds is None:
        return
    if len(step.seeds) != step.registers.shape[1]:
        raise ValueError(
            f"seeds must hold one per image ({step.registers.shape[1]}), got {len(step.seeds)}"
        )
    for seed in step.seeds:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seeds must be in 0..2^63-1, got {seed}")


def reference(*args: Any, **kwargs: Any) -> Tensor:
    """The op in plain PyTorch; each product and each sum is an operation of its own."""
    step = Step(*args, **kwargs)
    values = torch.stack(_values(step))
    out = empty_stack(step.registers[0], len(step.updates))
    return values if values.stride() == out.stride() else out.copy_(values)


def pattern(*args: Any, **kwargs: Any) -> Tensor:
    """A sampler's step as it is written."""
    return torch.stack(_values(Step(*args, **kwargs)))


def _values(step: Step) -> list[Tensor]:
    registers = step.registers.unbind(0)
    x = registers[0]
    output = step.output.to(x.dtype)
    if step.uncond is not None:
        uncond = step.uncond.to(x.dtype)
        output = uncond + (output - uncond) * step.guidance_scale
    prediction = _sum([(step.from_state, registers[step.feed]), (step.from_output, output)], x)
    noise = step.noise
    if step.uses_noise and noise is None:
        assert step.seeds is not None  # the check
        noise = reference_normal(x.shape, step.seeds, step.draw, x.device).to(x.dtype)
    return [
        _sum(list(zip(update, (*registers, prediction, noise), strict=True)), x)
        for update in step.updates
    ]


def _sum(terms: list[tuple[float, Any]], like: Tensor) -> Tensor:
    total = None
    for coefficient, value in terms:
        if coefficient == 0:
            continue
        term = value * coefficient
        total = term if total is None else total + term
    return torch.zeros_like(like) if total is None else total


def empty_stack(x: Tensor, count: int) -> Tensor:
    """[count, ...] of tensors like ``x``, each with its memory order."""
    if x.is_contiguous():
        return x.new_empty((count, *x.shape))
    strides = torch.empty_like(x).stride()
    return torch.empty_strided(
        (count, *x.shape), (x.numel(), *strides), dtype=x.dtype, device=x.device
    )


# --- The kernels. They update registers in place; the results are handed to them as registers of
# their own, so that no input changes.


class _Row(NamedTuple):
    """What of a call does not depend on the tensors' contents; the key of what is made once."""

    registers: int
    coefficients: tuple[float, ...]
    from_state: float
    from_output: float
    guidance_scale: float
    feed: int
    draw: int

    @staticmethod
    def of(step: Step) -> _Row:
        return _Row(
            step.registers.shape[0],
            tuple(step.coefficients),
            *(step.from_state, step.from_output, step.guidance_scale, step.feed, step.draw),
        )

    def pack(self) -> tuple[np.ndarray, np.ndarray]:
        """(index, coef) as in fastdiff.solvers.PackedTable; register R+u is result u."""
        width = self.registers + 2
        updates = len(self.coefficients) // width
        # A draw is a bit pattern to the kernels, a signed number in the table.
        draw = self.draw if self.draw < 2**31 else self.draw - 2**32
        dests = range(self.registers, self.registers + updates)
        index = np.array([[self.feed, draw, updates, -1, *dests]], dtype=np.int32)
        coef = [0.0, self.from_state, self.from_output, self.guidance_scale]
        for start in range(0, len(self.coefficients), width):
            update = self.coefficients[start : start + width]
            coef += [*update[:-2], *[0.0] * updates, *update[-2:]]
        return index, np.array([coef], dtype=np.float64)


@functools.lru_cache(maxsize=256)
def _native_table(row: _Row) -> Any:
    index, coef = row.pack()
    module = ext()
    assert module is not None  # `supports` came first
    updates = index.shape[1] - 4
    return module.PackedTable(index, coef, row.registers + updates, updates)


@functools.lru_cache(maxsize=256)
def _triton_row(row: _Row, dtype: torch.dtype, device: torch.device) -> tuple[Any, Tensor]:
    from fastdiff.kernels.solver_step import RowStructure

    index, coef = row.pack()
    registers = row.registers + index.shape[1] - 4
    structure = RowStructure.of(index[0].tolist(), coef[0].tolist(), registers)
    return structure, torch.tensor(coef[0], dtype=dtype, device=device)


def channels_of(x: Tensor) -> int:
    """1 for a contiguous state, C for a channels-last one."""
    return 1 if x.is_contiguous() else int(x.shape[1])


def unsupported_tensors(x: Tensor, output: Tensor, *others: Tensor | None) -> str:
    """Why the kernels cannot take a state, an output and more tensors of their shape, or ""."""
    if torch.float64 in (x.dtype, output.dtype) and x.dtype != output.dtype:
        return f"registers are {x.dtype}, output is {output.dtype}"
    given = [x, output, *(tensor for tensor in others if tensor is not None)]
    formats = [torch.contiguous_format]
    if x.dim() == 4:
        formats.append(torch.channels_last)
    if not any(all(t.is_contiguous(memory_format=f) for t in given) for f in formats):
        return "registers, output, uncond and noise are not in one dense memory order"
    return ""


def _unsupported(step: Step) -> str:
    registers, updates = step.registers.shape[0], len(step.updates)
    if registers + updates > MAX_REGISTERS:
        return f"{registers} registers and {updates} updates are more than {MAX_REGISTERS}"
    return unsupported_tensors(step.registers[0], step.output, step.uncond, step.noise)


def _cpp_supports(*args: Any, **kwargs: Any) -> str:
    step = Step(*args, **kwargs)
    if step.registers.device.type != "cpu":
        return f"it computes on the CPU, registers are on {step.registers.device}"
    return ext_status() or _unsupported(step)


def _cuda_supports(*args: Any, **kwargs: Any) -> str:
    step = Step(*args, **kwargs)
    if step.registers.device.type != "cuda":
        return f"it computes on CUDA devices, registers are on {step.registers.device}"
    if not hasattr(ext(), "cuda_solver_step"):
        return ext_status() or "the extension was built without CUDA"
    return _unsupported(step)


def _triton_supports(*args: Any, **kwargs: Any) -> str:
    step = Step(*args, **kwargs)
    if step.registers.device.type != "cuda" and not interpreting():
        return f"it computes on CUDA devices, registers are on {step.registers.device}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return _unsupported(step)


def _pointers(step: Step, out: Tensor) -> dict[str, Any]:
    """The arguments that the CPU and the CUDA kernel share."""

    def slices(tensor: Tensor) -> list[int]:
        stride = tensor.stride(0) * tensor.element_size()
        return [tensor.data_ptr() + i * stride for i in range(tensor.shape[0])]

    return {
        "table": _native_table(_Row.of(step)),
        "row": 0,
        "registers": [*slices(step.registers), *slices(out)],
        "state_dtype": DTYPE_CODES[out.dtype],
        "output": step.output.data_ptr(),
        "uncond": 0 if step.uncond is None else step.uncond.data_ptr(),
        "output_dtype": DTYPE_CODES[step.output.dtype],
        "input": 0,
        "input_dtype": DTYPE_CODES[step.output.dtype],
        "copies": 1,
        "noise": 0 if step.noise is None else step.noise.data_ptr(),
        "images": out.shape[1],
        "per_image": out[0, 0].numel(),
        "channels": channels_of(out[0]),
    }


def _cpp(*args: Any, **kwargs: Any) -> Tensor:
    step = Step(*args, **kwargs)
    out = empty_stack(step.registers[0], len(step.updates))
    if out.numel():
        seeds = [] if step.seeds is None else list(step.seeds)
        threads = torch.get_num_threads()
        ext().solver_step(**_pointers(step, out), seeds=seeds, threads=threads)  # type: ignore[union-attr]
    return out


def _cuda(*args: Any, **kwargs: Any) -> Tensor:
    step = Step(*args, **kwargs)
    out = empty_stack(step.registers[0], len(step.updates))
    if out.numel():
        with torch.cuda.device(out.device):
            seeds = None if step.seeds is None else device_seeds(tuple(step.seeds), out.device)
            ext().cuda_solver_step(  # type: ignore[union-attr]
                **_pointers(step, out),
                seeds=0 if seeds is None else seeds.data_ptr(),
                stream=torch.cuda.current_stream().cuda_stream,
            )
    return out


def _triton(*args: Any, **kwargs: Any) -> Tensor:
    from fastdiff.kernels import solver_step as kernels

    step = Step(*args, **kwargs)
    out = empty_stack(step.registers[0], len(step.updates))
    if out.numel():
        structure, coef = _triton_row(_Row.of(step), out.dtype, out.device)
        seeds = None if step.seeds is None else device_seeds(tuple(step.seeds), out.device)
        policy = None
        if tuning.active():
            key = _tuning_key(*args, **kwargs)
            policy = tuning.plan(OP.name, key, lambda: _tuning_candidates(*args, **kwargs))
        kernels.solver_step(
            structure,
            [*step.registers.unbind(0), *out.unbind(0)],
            step.output,
            step.uncond,
            None,
            coef,
            noise=step.noise,
            seeds=seeds,
            draw=step.draw,
            channels=channels_of(out[0]),
            policy=policy,
        )
    return out


def _tuning_key(*args: Any, **kwargs: Any) -> tuning.Key:
    step = Step(*args, **kwargs)
    x = step.registers[0]
    sizes = (("images", x.shape[0]), ("per_image", x[0].numel()))
    exact = (
        ("registers", step.registers.shape[0] + len(step.updates)),
        ("output_bytes", step.output.element_size()),
        ("guided", step.uncond is not None),
        ("drawn", step.uses_noise and step.noise is None),
    )
    return tuning.Key(x.device, x.dtype, sizes, exact)


def _tuning_candidates(*args: Any, **kwargs: Any) -> Sequence[tuple[tuning.Choice, Any]]:
    from fastdiff.kernels.solver_step import LaunchPolicy

    step = Step(*args, **kwargs)
    x, registers = step.registers[0], step.registers.shape[0] + len(step.updates)
    policies = LaunchPolicy.candidates(x[0].numel(), x.element_size(), registers)
    return [(dataclasses.asdict(policy), policy) for policy in policies]


def bytes_moved(*args: Any, **kwargs: Any) -> int:
    """Every tensor that is needed read once, every result written once."""
    step = Step(*args, **kwargs)
    count, size = step.output.numel(), step.registers.element_size()
    needed = {r for update in step.updates for r, value in enumerate(update[:-2]) if value != 0}
    if step.from_state != 0:
        needed.add(step.feed)
    outputs = (step.from_output != 0) * (1 if step.uncond is None else 2)
    state = len(needed) + len(step.updates) + (step.uses_noise and step.noise is not None)
    return count * (state * size + outputs * step.output.element_size())


def flops(*args: Any, **kwargs: Any) -> int:
    """A product and a sum for every term; 3 for guidance; 60 for a normal drawn inside."""
    step = Step(*args, **kwargs)
    terms = sum(value != 0 for value in (*step.coefficients, step.from_state, step.from_output))
    guided = 0 if step.uncond is None else 3
    drawn = 60 if step.uses_noise and step.noise is None else 0
    return step.output.numel() * (2 * terms + guided + drawn)


# [from_state, from_output] and the coefficients of one row of real tables.
ROWS: dict[str, tuple[float, float, tuple[float, ...]]] = {
    # prediction = x0; x <- sigma ratio x - history m1 + m0; m1 <- m0
    "DPM++ 2M": (2.417, -2.2, (0.816, -0.094, 0.281, 0.0, 0.0, 0.0, 1.0, 0.0)),
    "DDIM": (2.417, -2.2, (0.816, 0.187, 0.0)),
    "DDPM": (2.417, -2.2, (0.9741, 0.0263, 0.0412)),
    "flow Euler": (0.0, 1.0, (1.0, -0.0357, 0.0)),
}


def example(
    name: str,
    row: str | tuple[float, float, tuple[float, ...]],
    shape: tuple[int, ...],
    *,
    registers: int | None = None,
    guidance_scale: float | None = None,
    noise: str = "",
    feed: int = 0,
    channels_last: bool = False,
    cut: bool = False,
) -> Example:
    """A case with random numbers.

    row: a name of ROWS, or its three entries. noise: "tensor" or "seeds". cut: every tensor is a
    part of a wider one. The registers are float32, the output has the dtype asked for.
    """
    from_state, from_output, coefficients = ROWS[row] if isinstance(row, str) else row
    count = registers or (2 if row == "DPM++ 2M" else 1)

    def make(device: torch.device | str, dtype: torch.dtype) -> Call:
        generator = torch.Generator().manual_seed(23)

        def random(size: tuple[int, ...], to: torch.dtype) -> Tensor:
            full = (*size[:-1], 2 * size[-1]) if cut else size
            tensor = torch.randn(full, generator=generator)[..., : size[-1]].to(device, to)
            if cut:
                tensor = tensor.repeat_interleave(2, -1)[..., ::2]
            if channels_last:
                tensor = tensor.movedim(-3, -1).contiguous().movedim(-1, -3)
            return tensor

        kwargs: dict[str, Any] = {"from_state": from_state, "from_output": from_output}
        kwargs["feed"] = feed
        state = random((count, *shape), torch.float32)
        output = random(shape, dtype)
        if guidance_scale is not None:
            kwargs |= {"guidance_scale": guidance_scale, "uncond": random(shape, dtype)}
        if noise == "tensor":
            kwargs["noise"] = random(shape, torch.float32)
        elif noise == "seeds":
            kwargs |= {"seeds": [2**40 + 7 * i for i in range(shape[0])], "draw": 3}
        return Call((state, output, list(coefficients)), kwargs)

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
    example("SDXL 1024x1024, batch 16, DDPM", "DDPM", (16, 4, 128, 128), noise="tensor"),
    example("SD3 1024x1024, batch 64, DPM++ 2M", "DPM++ 2M", (64, 16, 128, 128)),
)

_ALL = tuple(float(k % 5 - 2) / 4 or 0.3 for k in range(4 * 6))  # 4 updates of 4 registers
_SPARSE = (0.0, 0.0, 0.7, 0.0, 0.0, 0.0, *(0.0,) * 6, 0.0, -1.25, 0.0, 0.5, 0.0, 0.0)
SAMPLES = (
    example("2M, one image", "DPM++ 2M", (1, 4, 8, 8)),
    example("2M, guided", "DPM++ 2M", (2, 4, 9, 7), guidance_scale=7.5),
    example("DDPM", "DDPM", (3, 3, 5, 7), noise="tensor"),
    example("DDPM, drawn", "DDPM", (3, 3, 5, 7), noise="seeds"),
    example("drawn, channels last", "DDPM", (2, 5, 6, 3), noise="seeds", channels_last=True),
    example("2M, channels last", "DPM++ 2M", (2, 4, 9, 7), channels_last=True, guidance_scale=3.0),
    # A number of elements that divides by no vector width, over several blocks.
    example("odd elements", "DDIM", (2, 1543)),
    example("odd elements, drawn", "DDPM", (2, 1543), noise="seeds"),
    example("one element an image", "DDIM", (5, 1)),
    example("output unread", (1.0, 0.0, (0.5, 0.25, 0.0)), (2, 3, 4)),
    example("four updates of four registers", (0.3, 0.7, _ALL), (2, 37), registers=4, feed=3,
            noise="tensor"),
    # The second update has no term at all: zeros.
    example("unread registers", (0.0, 1.0, _SPARSE), (2, 37), registers=4),
    # More than the kernels hold: the reference serves.
    example("seven registers", (0.5, 0.5, (0.2,) * 18), (2, 37), registers=7, noise="tensor"),
    example("tensors are views", "DPM++ 2M", (2, 3, 4, 5), cut=True),
    example("2M, once more", "DPM++ 2M", (2, 3, 4, 5), guidance_scale=1.0),
    example("empty batch", "DPM++ 2M", (0, 4, 8, 8)),
)  # fmt: skip


def _aot() -> Iterable[AotConfig]:
    from fastdiff.kernels import solver_step as kernels

    return (AotConfig(**config) for config in kernels.aot_configs())


def _example_of_shape(
    shape: tuple[int, ...], row: str = "DPM++ 2M", guided: bool = False, noise: str = ""
) -> Example:
    if row not in ROWS:
        raise ValueError(f"row must be one of {', '.join(ROWS)}, got {row!r}")
    if row == "DDPM" and not noise:
        noise = "seeds"
    guidance_scale = 7.5 if guided else None
    return example(f"{shape}", row, shape, guidance_scale=guidance_scale, noise=noise)


OP = register(
    Op(
        name="solver_step",
        schema="(Tensor registers, Tensor output, float[] coefficients, float from_state=0.0, "
        "float from_output=1.0, int feed=0, float guidance_scale=1.0, Tensor? uncond=None, "
        'Tensor? noise=None, int[]? seeds=None, int draw=0, str impl="auto") -> Tensor',
        reference=reference,
        pattern=pattern,
        check=check,
        implementations=(
            Implementation("cpp", _cpp_supports, _cpp),
            Implementation("cuda", _cuda_supports, _cuda),
            Implementation("triton", _triton_supports, _triton),
        ),
        examples=EXAMPLES,
        samples=SAMPLES,
        bytes_moved=bytes_moved,
        flops=flops,
        aot=_aot,
        tuning=Tuning(_example_of_shape, _tuning_key, _tuning_candidates),
        numerics="exact",
    )
)


def solver_step(
    registers: Tensor,
    output: Tensor,
    coefficients: Sequence[float],
    *,
    from_state: float = 0.0,
    from_output: float = 1.0,
    feed: int = 0,
    guidance_scale: float = 1.0,
    uncond: Tensor | None = None,
    noise: Tensor | None = None,
    seeds: Sequence[int] | None = None,
    draw: int = 0,
    impl: str = "auto",
) -> Tensor:
    """The linear updates of one solver step in one pass over memory; the same bits everywhere.

    registers: [R, B, ...], float32 or float64, R <= 8: the state and what the solver remembers.
    output: [B, ...], what the model returned; uncond: its output without the condition, then
    output = uncond + guidance_scale*(output - uncond). The prediction is
    from_state*registers[feed] + from_output*output.
    coefficients: for each of 1..4 updates, R numbers for the registers, one for the prediction, one
    for the noise. A coefficient of exactly 0 leaves its term unread.
    noise: [B, ...] like a register; or seeds, one per image in 0..2^63-1: the noise is then draw
    ``draw`` of each seed's Philox stream, which does not depend on the batch or the memory order.
    impl: "auto", "cpp", "cuda", "triton" or "reference".

    Returns the new values [updates, B, ...] in the registers' dtype and memory order,
    differentiable through the reference. ValueError or TypeError for arguments outside this;
    RuntimeError when a named impl cannot run.
    """
    return torch.ops.fastdiff.solver_step(
        registers,
        output,
        list(coefficients),
        from_state,
        from_output,
        feed,
        guidance_scale,
        uncond,
        noise,
        None if seeds is None else list(seeds),
        draw,
        impl,
    )
