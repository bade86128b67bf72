"""Random tables for solver_step_indexed, and what solver_step makes of each of their rows."""

from __future__ import annotations

import random
from typing import Any

import torch
from rows import HALVES, SHAPES, same_bits

from fastdiff.ops.solver_step import reference as solver_step
from fastdiff.ops.solver_step_indexed import solver_step_indexed, solver_step_indexed_

Tensor = torch.Tensor
ROWS = 3


def random_table(number: int, device: str = "cpu") -> tuple[dict[str, Any], list[int]]:
    """(the arguments but the index, the register that feeds each row); zeros are frequent."""
    rng = random.Random(number)
    torch.manual_seed(number)
    count = rng.randint(1, 8)
    state = rng.choice([torch.float32] * 3 + [torch.float64])
    model = torch.float64 if state == torch.float64 else rng.choice(HALVES)
    shape = rng.choice(SHAPES)
    last = rng.random() < 0.4 and shape[1] > 1

    def tensor(dtype: torch.dtype) -> Tensor:
        value = torch.randn(shape).to(device, dtype)
        return value.contiguous(memory_format=torch.channels_last) if last else value

    rows = torch.tensor(
        [
            [[rng.choice([0.0, 0.0, rng.uniform(-2, 2)]) for _ in range(count + 2)]
             for _ in range(count + 1)]
            for _ in range(ROWS)
        ],
        dtype=torch.float64,
    )  # fmt: skip
    feeds = [rng.randrange(count) for _ in range(ROWS)]
    for row, feed in zip(rows, feeds, strict=True):
        row[0, :count] = 0.0
        row[0, feed] = rng.choice([0.0, 0.8])
        row[0, count:] = torch.tensor([rng.choice([0.0, 1.0, -0.3]), rng.choice([1.0, 7.5])])
    arguments: dict[str, Any] = {
        "registers": torch.stack([tensor(state) for _ in range(count)]),
        "output": tensor(model),
        "rows": rows.to(device),
    }
    if last:
        arguments["registers"] = arguments["registers"].movedim(2, -1).contiguous().movedim(-1, 2)
    if rng.random() < 0.5:
        arguments["uncond"] = tensor(model)
    if rng.random() < 0.6:
        seeds = [rng.randrange(2**63) for _ in range(shape[0])]
        arguments["seeds"] = torch.tensor(seeds, device=device)
        draws = [rng.randrange(2**31) for _ in range(ROWS)]
        kind = rng.choice([torch.int32, torch.int64])
        arguments["draws"] = torch.tensor(draws, dtype=kind, device=device)
    else:
        arguments["noise"] = tensor(state)
    return arguments, feeds


def blank_unread(arguments: dict[str, Any], at: int) -> dict[str, Any]:
    """The same with NaN in every register, output and noise that row ``at`` does not read."""
    row = arguments["rows"][at]
    count = row.shape[0] - 1
    new = {name: value.clone() for name, value in arguments.items()}
    for r in range(count):
        if not row[:, r].any():
            new["registers"][r] = torch.nan
    if row[0, count] == 0:
        new["output"].fill_(torch.nan)
    if "noise" in new and not row[1:, -1].any():
        new["noise"].fill_(torch.nan)
    return new


def expected(arguments: dict[str, Any], feeds: list[int], at: int) -> list[Tensor]:
    """Registers and prediction by solver_step, a register at a time (it takes four updates)."""
    given = {name: value.cpu() for name, value in arguments.items()}
    registers, output, rows = (given[name] for name in ("registers", "output", "rows"))
    row, count = rows[at].tolist(), registers.shape[0]
    options: dict[str, Any] = {"uncond": given.get("uncond"), "noise": given.get("noise")}
    options |= {"from_state": row[0][feeds[at]], "feed": feeds[at]}
    options |= {"from_output": row[0][count], "guidance_scale": row[0][count + 1]}
    if "seeds" in given:
        options |= {"seeds": given["seeds"].tolist(), "draw": int(given["draws"][at])}
    lines = [*row[1:], [0.0] * count + [1.0, 0.0]]
    return [solver_step(registers, output, line, **options)[0] for line in lines]


def run(arguments: dict[str, Any], at: int, impl: str, *, in_place: bool = False) -> list[Tensor]:
    """Registers, and the prediction unless ``in_place``."""
    given = dict(arguments)
    registers = given.pop("registers")
    index = torch.tensor(at, device=registers.device)
    if in_place:
        registers = registers.clone(memory_format=torch.preserve_format)
        solver_step_indexed_(registers, index=index, impl=impl, **given)
        return list(registers.cpu())
    history = registers[1:] if registers.shape[0] > 1 else None
    result = solver_step_indexed(
        registers[0], index=index, history=history, with_prediction=True, impl=impl, **given
    )
    return list(result.cpu())


def wrong(numbers: range, impl: str, device: str = "cpu") -> list[tuple[int, int]]:
    """(case, row) where the bits are not solver_step's."""
    differ = []
    for number in numbers:
        arguments, feeds = random_table(number, device)
        for at in range(ROWS):
            given = blank_unread(arguments, at)
            right = expected(given, feeds, at)
            same = same_bits(run(given, at, impl), right)
            if not same or not same_bits(run(given, at, impl, in_place=True), right[:-1]):
                differ.append((number, at))
    return differ
