"""Running diffusers' schedulers as references: in float32 as they are, and widened to float64.

In float64 the two agree to rounding, which shows that the coefficients are the same. In float32
they differ by less than 1e-5, with three exceptions. Where the run magnifies a rounding (noise
prediction multiplies the state by up to 1/alpha_T, 20,000 on the cosine schedule), by a few times
what rounding the state and the model's output alone does. Where a prediction is multiplied by a
large factor (1/alpha for an eps model's x0), by that factor times float32's rounding. And on the
cosine schedule the variances of DDPM and eta = 1, which diffusers takes as differences of numbers
near 1, are off by one rounding of 1: their roots by up to 2^-12, or NaN where the difference comes
out negative.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch
from mixture import Mixture

import fastdiff
from fastdiff.solvers import SolverTable

BETAS: dict[str, dict[str, Any]] = {
    "linear": {},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {},
}
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["leading", "linspace", "trailing"]
STEPS = [5, 10, 20, 50]


def cover(count: int, *axes: list) -> list[tuple]:
    """``count`` cases of the product of the axes, always the same, every pair of values in some."""
    chosen = random.Random(1).sample(list(itertools.product(*axes)), count)
    for (i, a), (j, b) in itertools.combinations(enumerate(axes), 2):
        seen = {(repr(case[i]), repr(case[j])) for case in chosen}
        missing = [p for p in itertools.product(a, b) if (repr(p[0]), repr(p[1])) not in seen]
        for first, second in missing:
            case = [axis[0] for axis in axes]
            case[i], case[j] = first, second
            chosen.append(tuple(case))
    return chosen


def start(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64).to(dtype)


def widen(scheduler: Any) -> None:
    """Makes the scheduler compute in float64, from its own float32 alphas_cumprod."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if hasattr(scheduler, "final_alpha_cumprod"):
        to_one = scheduler.config.set_alpha_to_one
        first = scheduler.alphas_cumprod[0]
        scheduler.final_alpha_cumprod = torch.ones_like(first) if to_one else first
    if hasattr(scheduler, "one"):
        scheduler.one = scheduler.one.double()


def reference(scheduler: Any, model: Mixture, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, **kwargs).prev_sample
    return x


def seeded(seed: int) -> dict[str, Any]:
    return {"generator": torch.Generator().manual_seed(seed)}


def check(
    table: SolverTable, model: Any, reference32, reference64, noise=None, slack: float = 1e-5
) -> None:
    def ours(dtype: torch.dtype, network: Any = model, **kwargs: Any) -> torch.Tensor:
        draws = {} if noise is None else seeded(noise)
        x = start(dtype) * table.init_scale
        result = fastdiff.sample(network, x=x, solver=table, **draws, **kwargs)
        assert result.dtype == dtype
        assert torch.isfinite(result).all()
        return result

    def rounded(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return model(x.float().double(), t).float().double()

    def round_state(info: Any) -> None:
        info.x.copy_(info.x.float())

    single, double = ours(torch.float32), ours(torch.float64)
    size = max(1.0, reference64.abs().max().item())
    assert (double - reference64).abs().max() < 1e-10 * size
    # What float32 does to the state and at the model's two ends, the steps being float64.
    sensitivity = (ours(torch.float64, rounded, callback=round_state) - double).abs().max()
    rounding = 4 * torch.finfo(torch.float32).eps * _magnification(table)
    gap = (single - reference32).abs().max()
    if slack > 1e-5 and torch.isnan(gap):
        return  # the root of a negative difference, see above
    # Where the reference's own float32 loses digits (DEIS), the exact result decides.
    gap = min(gap, (single - reference64).abs().max())
    assert gap < max(slack * size, 8 * sensitivity, rounding)


def _magnification(table: SolverTable) -> float:
    """The largest factor on a prediction's rounding: its two terms cancel, their rounding stays.

    A prediction acts on x in its own row and, kept in a register, in the next ones; what it does to
    x is multiplied by the coefficients of x from there on, where those are above 1.
    """
    factors, growth = [], 1.0
    for i, row in reversed(list(enumerate(table.rows))):
        uses = abs(row.updates[0].from_prediction)
        for following in table.rows[i + 1 : i + table.num_registers]:
            uses += max(map(abs, following.updates[0].from_registers[1:]))
        factors.append(max(abs(row.from_state), abs(row.from_output)) * uses * growth)
        growth *= max(1.0, abs(row.updates[0].from_registers[0]))
    return max(factors)
