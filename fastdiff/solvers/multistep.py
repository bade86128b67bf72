"""What multistep solvers share: the history of predictions, and integrals of exponentials."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastdiff.solvers.grids import TimeGrid
from fastdiff.solvers.table import Update


class History:
    """Earlier predictions in a ring of registers: each is written once and never moved.

    first: the first register of the ring. depth: how many predictions back a step may look.
    registers: of the whole table.
    """

    def __init__(self, first: int, depth: int) -> None:
        self.first, self.depth = first, depth
        self.registers = first + depth

    def row(self, step: int, state: Sequence[float], weights: Sequence[float]) -> tuple[float, ...]:
        """``from_registers`` in step ``step``.

        state: coefficients of the registers before the ring. weights: of the predictions of steps
        step-1, step-2, ...; those beyond ``depth`` must be 0.
        """
        ring = [0.0] * self.depth
        for back, weight in enumerate(weights, start=1):
            if weight != 0:
                assert back <= min(self.depth, step)
                ring[(step - back) % self.depth] = weight
        return (*state, *ring)

    def keep(self, step: int) -> list[Update]:
        """The update that keeps the prediction of this step."""
        if not self.depth:
            return []
        return [Update(self.first + step % self.depth, (0.0,) * self.registers, 1.0)]


def check_joined(grid: TimeGrid) -> None:
    """ValueError unless every step of the grid ends where the next evaluation is."""
    if not grid.contiguous:
        raise ValueError(
            "grid must join its steps for a multistep solver, got one whose steps end elsewhere "
            f"than at the next evaluation ({grid.name})"
        )


def check_order(order: object, most: int) -> None:
    """ValueError unless ``order`` is an integer in 1..most."""
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= most:
        known = ", ".join(map(str, range(1, most)))
        raise ValueError(f"order must be {known} or {most}, got {order}")


def phi(k: int, h: float) -> float:
    """int_0^1 e^{(s - 1) h} s^{k-1}/(k-1)! ds for k >= 1; any sign of h, and h = inf gives 0.

    phi(1) = (1 - e^{-h})/h, phi(2) = (h - 1 + e^{-h})/h^2: with x0 linear in lambda over a step,
    x0 = m + d s, the step's integral is alpha_t h (phi(1) m + phi(2) d).
    """
    if math.isinf(h):
        return 0.0
    if abs(h) < 1.0:
        # sum_j (-h)^j / (j + k)!
        total, term, j = 0.0, 1.0 / math.factorial(k), 0
        while abs(term) > 1e-18 * max(abs(total), 1e-300):
            total += term
            j += 1
            term *= -h / (j + k)
        return total
    value = -math.expm1(-h) / h
    for i in range(1, k):
        value = (1.0 / math.factorial(i) - value) / h
    return value
