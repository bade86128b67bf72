"""Random rows of solver tables, run in place by each twin of the solver step.

As a program (in a process of its own, since Triton decides between interpreting and compiling when
it is imported) it compares the interpreted Triton kernel with the reference.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastdiff._ext import DTYPE_CODES, ext
from fastdiff.ops.solver_step import reference

Tensor = torch.Tensor
SHAPES = [(1, 4, 8, 8), (3, 3, 5, 7), (2, 5, 13, 11), (2, 4, 16, 24), (1, 1, 1, 1), (1, 2, 37, 31)]
HALVES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Case:
    """One row and everything it reads; unread registers hold NaN."""

    index: np.ndarray  # [1, 4 + U], as in PackedTable
    coef: np.ndarray  # [1, 4 + U*(R + 2)]
    registers: list[Tensor]
    output: Tensor
    uncond: Tensor | None
    noise: Tensor | None
    seeds: list[int]
    copies: int
    model_input: Tensor | None
    channels: int

    @property
    def updates(self) -> int:
        return int(self.index[0, 2])

    def copy(self, device: str) -> tuple[list[Tensor], Tensor | None]:
        """Fresh registers and model input."""

        def fresh(tensor: Tensor) -> Tensor:
            return tensor.to(device, copy=True, memory_format=torch.preserve_format)

        buffer = None if self.model_input is None else fresh(self.model_input)
        return [fresh(register) for register in self.registers], buffer


def random_case(number: int) -> Case:
    rng = random.Random(number)
    torch.manual_seed(number)
    count = rng.randint(1, 8)
    updates = rng.randint(1, min(4, count))
    state = rng.choice([torch.float32] * 3 + [torch.float64])
    model = torch.float64 if state == torch.float64 else rng.choice(HALVES)
    shape = rng.choice(SHAPES)
    last = rng.random() < 0.4 and shape[1] > 1
    guided, drawn = rng.random() < 0.5, rng.random() < 0.6
    copies = 2 if guided else 1

    width = count + 2
    coef = np.zeros((1, 4 + updates * width))
    coef[0, :4] = (
        rng.choice([1.0, 0.7]),
        rng.choice([0.0, 0.8]),
        rng.choice([0.0, 1.0, -0.3]),
        rng.choice([1.0, 7.5]),
    )
    for k in range(4, coef.shape[1]):
        coef[0, k] = rng.choice([0.0, 0.0, rng.uniform(-2, 2)])
    dests = rng.sample(range(count), updates)
    feed, next_feed = rng.randrange(count), rng.choice([-1, rng.randrange(count)])
    index = np.array([[feed, 2, updates, next_feed, *dests]], dtype=np.int32)

    def tensor(dtype: torch.dtype, batch: int = shape[0]) -> Tensor:
        value = torch.randn(batch, *shape[1:]).to(dtype)
        return value.contiguous(
            memory_format=torch.channels_last if last else torch.contiguous_format
        )

    registers = [tensor(state) for _ in range(count)]
    read = {feed} if coef[0, 1] else set()
    for u in range(updates):
        start = 4 + u * width
        read |= {r for r in range(count) if coef[0, start + r]}
    if next_feed >= 0 and next_feed not in dests:
        read.add(next_feed)
    for r in set(range(count)) - read:
        registers[r].fill_(torch.nan)
    output = tensor(model)
    if coef[0, 2] == 0:
        output.fill_(torch.nan)
    return Case(
        index=index,
        coef=coef,
        registers=registers,
        output=output,
        uncond=tensor(model) if guided else None,
        noise=None if drawn else tensor(state),
        seeds=[rng.randrange(2**63) for _ in range(shape[0])],
        copies=copies,
        model_input=tensor(model, copies * shape[0]) if next_feed >= 0 else None,
        channels=shape[1] if last else 1,
    )


def expected(case: Case) -> list[Tensor]:
    """Registers and model input after the row, in plain torch."""
    feed, draw, _, next_feed, *dests = (int(value) for value in case.index[0])
    scale, from_state, from_output, guidance, *coefficients = (float(c) for c in case.coef[0])
    new = reference(
        torch.stack(case.registers),
        case.output,
        coefficients,
        from_state,
        from_output,
        feed,
        guidance,
        uncond=case.uncond,
        noise=case.noise,
        seeds=None if case.noise is not None else case.seeds,
        draw=draw,
    )
    registers, buffer = case.copy("cpu")
    for dest, value in zip(dests, new, strict=True):
        registers[dest] = value
    if buffer is None:
        return registers
    following = registers[next_feed] * scale
    return [*registers, torch.cat([following] * case.copies).to(buffer.dtype)]


def _arguments(case: Case, registers: list[Tensor], buffer: Tensor | None) -> dict[str, Any]:
    def pointer(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    return {
        "registers": [register.data_ptr() for register in registers],
        "state_dtype": DTYPE_CODES[registers[0].dtype],
        "output_dtype": DTYPE_CODES[case.output.dtype],
        "input": pointer(buffer),
        "input_dtype": DTYPE_CODES[case.output.dtype],
        "copies": case.copies,
        "images": registers[0].shape[0],
        "per_image": registers[0][0].numel(),
        "channels": case.channels,
    }


def native_table(case: Case) -> Any:
    return ext().PackedTable(case.index, case.coef, len(case.registers), case.updates)


def run_cpp(case: Case, threads: int = 1) -> list[Tensor]:
    registers, buffer = case.copy("cpu")
    ext().solver_step(
        native_table(case),
        0,
        output=case.output.data_ptr(),
        uncond=0 if case.uncond is None else case.uncond.data_ptr(),
        noise=0 if case.noise is None else case.noise.data_ptr(),
        seeds=case.seeds,
        threads=threads,
        **_arguments(case, registers, buffer),
    )
    return [*registers, *([] if buffer is None else [buffer])]


def run_cuda(case: Case) -> list[Tensor]:
    registers, buffer = case.copy("cuda")
    parts = [None if t is None else t.cuda() for t in (case.output, case.uncond, case.noise)]
    output, uncond, noise = (0 if t is None else t.data_ptr() for t in parts)
    seeds = torch.tensor(case.seeds, device="cuda")
    ext().cuda_solver_step(
        native_table(case),
        0,
        output=output,
        uncond=uncond,
        noise=noise,
        seeds=seeds.data_ptr(),
        stream=torch.cuda.current_stream().cuda_stream,
        **_arguments(case, registers, buffer),
    )
    return [tensor.cpu() for tensor in (*registers, *([] if buffer is None else [buffer]))]


def run_triton(case: Case, device: str) -> list[Tensor]:
    from fastdiff.kernels import solver_step as kernels

    registers, buffer = case.copy(device)
    structure = kernels.RowStructure.of(
        case.index[0].tolist(), case.coef[0].tolist(), len(registers)
    )
    kernels.solver_step(
        structure,
        registers,
        case.output.to(device),
        None if case.uncond is None else case.uncond.to(device),
        buffer,
        torch.tensor(case.coef[0], dtype=registers[0].dtype, device=device),
        noise=None if case.noise is None else case.noise.to(device),
        seeds=torch.tensor(case.seeds, device=device),
        draw=int(case.index[0, 1]),
        copies=case.copies,
        channels=case.channels,
    )
    return [tensor.cpu() for tensor in (*registers, *([] if buffer is None else [buffer]))]


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(results: list[Tensor], others: list[Tensor]) -> bool:
    """Equal to the last bit, zeros' signs included (and NaN where a register was never touched)."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().view(_BITS[tensor.element_size()])

    pairs = zip(results, others, strict=True)
    return all(a.dtype == b.dtype and torch.equal(bits(a), bits(b)) for a, b in pairs)


if __name__ == "__main__":
    wrong = [
        number
        for number in range(int(sys.argv[1]))
        if not same_bits(run_triton(random_case(number), "cpu"), expected(random_case(number)))
    ]
    print("differ:", wrong)
    sys.exit(bool(wrong))
