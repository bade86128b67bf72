"""A solver as data: one float64 row per model evaluation, which any engine can run.

Between two model evaluations every diffusion sampler takes a linear combination of the current
state, earlier predictions, the new prediction and noise, with coefficients that depend on the
schedule alone. :class:`SolverTable` holds those coefficients.

One row, elementwise, in the registers' dtype::

    output     = cond                     or  uncond + guidance_scale*(cond - uncond)
    prediction = from_state*registers[feed] + from_output*output
    registers[dest] <- sum_j from_registers[j]*registers[j]
                       + from_prediction*prediction + from_noise*noise      for every update

The updates of a row read the registers as they were before the row. A term whose coefficient is
exactly 0 is skipped, terms are added in the order written, nothing is contracted to an FMA: engines
agree bit for bit. A row with ``from_output == 0`` does not evaluate the model. Register 0 starts as
``init_scale*z`` and ends as the sample.

What a few samplers do is not linear: a row's ``rule`` names it, and ``fastdiff.sample`` does it
before the step (``fastdiff/sampling/rules.py``).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

MAX_REGISTERS = 8
MAX_UPDATES = 4
FORMAT_VERSION = 1
RULES = ("", "langevin", "learned_range")


@dataclass(frozen=True)
class Update:
    """``registers[dest] <- from_registers . registers + from_prediction*p + from_noise*z``."""

    dest: int
    from_registers: tuple[float, ...]
    from_prediction: float
    from_noise: float = 0.0


@dataclass(frozen=True)
class Row:
    """One model evaluation and what follows it.

    feed: the register that feeds the model.
    time: the time handed to the model, in the model's own units (0..T-1, fractions allowed).
    input_scale: the model sees ``input_scale * registers[feed]``.
    from_state, from_output: ``prediction = from_state*registers[feed] + from_output*output``.
    updates: simultaneous; all read the registers as they were before the row.
    guidance_scale: used when the model is evaluated with and without the condition.
    draw: the index of the noise draw this row consumes, -1 for none.
    level: (alpha, sigma) of the state that is fed, where it is known.
    rule: "", or what is done to prediction and noise before the updates, with ``rule_value``.
        "langevin": with r the ratio of the batch's mean norms |z|/|prediction|, the prediction is
        multiplied by r^2 and the noise by r. "learned_range": the model returns 2C channels, and
        the second half v multiplies the noise by rule_value^((1 + v)/2).
    """

    feed: int
    time: float
    input_scale: float
    from_state: float
    from_output: float
    updates: tuple[Update, ...]
    guidance_scale: float = 1.0
    draw: int = -1
    level: tuple[float, float] | None = None
    rule: str = ""
    rule_value: float = 0.0

    @property
    def evaluates(self) -> bool:
        """Whether the row evaluates the model."""
        return self.from_output != 0


@dataclass(frozen=True, eq=False)
class PackedTable:
    """The table as three arrays, for engines that are not Python.

    index: int32 [N, 4+U], a row is [feed, draw, n_updates, next_feed, dest_0 .. dest_{U-1}];
        next_feed is -1 on the last row, dest is -1 past n_updates.
    coef: float64 [N, 4+U*(R+2)], a row is [next_input_scale, from_state, from_output,
        guidance_scale, then per update from_registers[0..R-1], from_prediction, from_noise];
        next_input_scale is 0 on the last row, and row 0's is the table's alone.
    times: float64 [N].
    """

    index: np.ndarray
    coef: np.ndarray
    times: np.ndarray
    num_registers: int
    max_updates: int
    num_draws: int
    init_scale: float


def _check_number(where: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{where} must be finite, got {value}")


def _check_index(where: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where} must be an integer, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{where} must be in {low}..{high}, got {value}")


@dataclass(frozen=True)
class SolverTable:
    """A whole solver run: ``rows`` over ``num_registers`` state-shaped registers.

    name: the solver's name, as in ``fastdiff.solvers.SOLVERS``.
    num_draws: how many noise draws the rows name, 0..num_draws-1 in row order.
    init_scale: the run starts from ``x_T = init_scale * z``.
    prediction: what ``prediction`` is in the rows: "x0", "eps", "v" or "score".
    description: the options the table was built with.
    end_level: (alpha, sigma) of the sample, where it is known; (1, 0) is a clean one.

    Raises ValueError or TypeError for a table no engine could run: an index out of range, a
    non-finite coefficient, a register read before it is written, a register written twice in one
    row, noise without a draw, draws out of order.
    """

    name: str
    num_registers: int
    rows: tuple[Row, ...]
    num_draws: int = 0
    init_scale: float = 1.0
    prediction: str = "x0"
    description: str = ""
    end_level: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        _check_index("num_registers", self.num_registers, 1, MAX_REGISTERS)
        _check_index("num_draws", self.num_draws, 0, 2**31 - 1)
        _check_number("init_scale", self.init_scale)
        if not self.rows:
            raise ValueError("rows must hold at least one row, got 0")
        written = {0}
        next_draw = 0
        for i, row in enumerate(self.rows):
            next_draw = self._check_row(f"rows[{i}]", row, written, next_draw)
        if next_draw != self.num_draws:
            raise ValueError(
                f"num_draws must equal the draws of the rows ({next_draw}), got {self.num_draws}"
            )

    def _check_row(self, where: str, row: Row, written: set[int], next_draw: int) -> int:
        """Checks one row; adds to ``written``; returns the next free draw."""
        _check_index(f"{where}.feed", row.feed, 0, self.num_registers - 1)
        if row.feed not in written:
            raise ValueError(f"{where}.feed must name a register written before, got {row.feed}")
        for field in ("time", "input_scale", "from_state", "from_output", "guidance_scale"):
            _check_number(f"{where}.{field}", getattr(row, field))
        if row.rule not in RULES:
            raise ValueError(f"{where}.rule must be one of {RULES}, got {row.rule!r}")
        if row.rule == "learned_range" and not row.rule_value > 0:
            raise ValueError(f"{where}.rule_value must be positive, got {row.rule_value}")
        if row.rule and (row.draw < 0 or not row.evaluates):
            raise ValueError(f"{where}.rule must be '' in a row without a draw, got {row.rule!r}")
        _check_index(f"{where}.draw", row.draw, -1, self.num_draws - 1)
        if row.draw >= 0:
            if row.draw != next_draw:
                raise ValueError(
                    f"{where}.draw must be {next_draw} (draws run in row order), got {row.draw}"
                )
            next_draw += 1
        if not 1 <= len(row.updates) <= MAX_UPDATES:
            raise ValueError(
                f"{where}.updates must hold 1..{MAX_UPDATES} updates, got {len(row.updates)}"
            )
        dests: set[int] = set()
        for k, update in enumerate(row.updates):
            at = f"{where}.updates[{k}]"
            _check_index(f"{at}.dest", update.dest, 0, self.num_registers - 1)
            if update.dest in dests:
                raise ValueError(f"{at}.dest must be written once per row, got {update.dest} again")
            dests.add(update.dest)
            if len(update.from_registers) != self.num_registers:
                raise ValueError(
                    f"{at}.from_registers must hold one coefficient per register "
                    f"({self.num_registers}), got {len(update.from_registers)}"
                )
            for j, value in enumerate(update.from_registers):
                _check_number(f"{at}.from_registers[{j}]", value)
                if value != 0 and j not in written:
                    raise ValueError(
                        f"{at}.from_registers[{j}] must be 0 because register {j} is not written "
                        f"yet, got {value}"
                    )
            _check_number(f"{at}.from_prediction", update.from_prediction)
            _check_number(f"{at}.from_noise", update.from_noise)
            if update.from_noise != 0 and row.draw < 0:
                raise ValueError(
                    f"{at}.from_noise must be 0 in a row without a draw, got {update.from_noise}"
                )
        written |= dests
        return next_draw

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def evaluations(self) -> int:
        """How often the model is evaluated."""
        return sum(row.evaluates for row in self.rows)

    @functools.cached_property
    def scales(self) -> frozenset[float]:
        """The guidance scales of the rows that evaluate the model."""
        return frozenset(row.guidance_scale for row in self.rows if row.evaluates)

    @functools.cached_property
    def has_rules(self) -> bool:
        """Whether any row does something that is not linear."""
        return any(row.rule for row in self.rows)

    @functools.cached_property
    def times(self) -> tuple[float, ...]:
        """The times handed to the model, in row order."""
        return tuple(row.time for row in self.rows)

    @functools.cached_property
    def feeds(self) -> tuple[int, ...]:
        """The register that feeds the model, in row order."""
        return tuple(row.feed for row in self.rows)

    def level_after(self, row: int) -> tuple[float, float] | None:
        """(alpha, sigma) of register 0 after that row, where it is known."""
        return self.rows[row + 1].level if row + 1 < len(self.rows) else self.end_level

    @functools.cached_property
    def scales_inputs(self) -> bool:
        """Whether any row scales what it feeds the model."""
        return any(row.input_scale != 1 for row in self.rows)

    def time_tensors(
        self, batch: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, ...]:
        """The time of each row as a tensor [batch]: int64 when all are whole, else ``dtype``.

        The last ones are kept, and made again when somebody has written to them.
        """
        key = (batch, dtype, device)
        kept = self._kept_times
        if kept and kept["key"] == key and kept["all"]._version == kept["version"]:
            rows: tuple[torch.Tensor, ...] = kept["rows"]
            return rows
        whole = all(float(time).is_integer() for time in self.times)
        kind = torch.int64 if whole else dtype
        with torch.inference_mode(False):
            times = torch.tensor(self.times, dtype=torch.float64).to(kind).to(device)
            times = times[:, None].expand(-1, batch).contiguous()
            rows = times.unbind(0)
        kept |= {"key": key, "all": times, "version": times._version, "rows": rows}
        return rows

    @functools.cached_property
    def _kept_times(self) -> dict[str, Any]:
        return {}

    def pack(self) -> PackedTable:
        """The table as read-only arrays; see :class:`PackedTable`. Made once per table."""
        return self._packed

    @functools.cached_property
    def _packed(self) -> PackedTable:
        n, r = len(self.rows), self.num_registers
        u = max(len(row.updates) for row in self.rows)
        index = np.full((n, 4 + u), -1, dtype=np.int32)
        coef = np.zeros((n, 4 + u * (r + 2)), dtype=np.float64)
        for i, row in enumerate(self.rows):
            following = self.rows[i + 1] if i + 1 < n else None
            index[i, :4] = (
                row.feed,
                row.draw,
                len(row.updates),
                following.feed if following else -1,
            )
            coef[i, 0] = following.input_scale if following else 0.0
            coef[i, 1:4] = (row.from_state, row.from_output, row.guidance_scale)
            for k, update in enumerate(row.updates):
                index[i, 4 + k] = update.dest
                start = 4 + k * (r + 2)
                coef[i, start : start + r] = update.from_registers
                coef[i, start + r] = update.from_prediction
                coef[i, start + r + 1] = update.from_noise
        times = np.array(self.times, dtype=np.float64)
        for array in (index, coef, times):
            array.setflags(write=False)
        return PackedTable(
            index=index,
            coef=coef,
            times=times,
            num_registers=r,
            max_updates=u,
            num_draws=self.num_draws,
            init_scale=float(self.init_scale),
        )

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        """Bytes of all registers for a state of ``shape`` (batch included) and ``dtype``.

        Half-precision states are held in float32, and counted so.
        """
        item = 8 if dtype == torch.float64 else 4
        return self.num_registers * math.prod(shape) * item

    def with_guidance(self, scale: float | Sequence[float]) -> SolverTable:
        """The same table with ``guidance_scale`` set, one number or one per row."""
        if isinstance(scale, (int, float)):
            scales: Sequence[float] = [float(scale)] * len(self.rows)
        else:
            scales = [float(value) for value in scale]
        if len(scales) != len(self.rows):
            raise ValueError(
                f"scale must be one number or one per row ({len(self.rows)}), "
                f"got {len(scales)} numbers"
            )
        rows = tuple(
            dataclasses.replace(row, guidance_scale=g)
            for row, g in zip(self.rows, scales, strict=True)
        )
        return dataclasses.replace(self, rows=rows)

    @functools.cached_property
    def of_predictions(self) -> SolverTable:
        """The same steps for a model that returns each row's prediction, given the register.

        Scaling, conversion, guidance and rules are then the model's business.
        """
        rows = tuple(
            dataclasses.replace(
                row,
                input_scale=1.0,
                from_state=0.0,
                from_output=1.0,
                guidance_scale=1.0,
                rule="",
                rule_value=0.0,
            )
            if row.evaluates
            else row
            for row in self.rows
        )
        return dataclasses.replace(self, rows=rows)

    def from_step(self, start: int) -> SolverTable:
        """The table without its first ``start`` rows, with the draws renumbered from 0.

        Right for solvers without history. A multistep table whose row ``start`` reads an earlier
        prediction raises ValueError: build it from ``grid.from_step(start)`` instead.
        """
        _check_index("start", start, 0, len(self.rows) - 1)
        kept = self.rows[start:]
        first_draw = min((row.draw for row in kept if row.draw >= 0), default=0)
        rows = tuple(
            dataclasses.replace(row, draw=row.draw - first_draw) if row.draw >= 0 else row
            for row in kept
        )
        num_draws = sum(row.draw >= 0 for row in rows)
        try:
            return dataclasses.replace(self, rows=rows, num_draws=num_draws)
        except ValueError as error:
            raise ValueError(
                f"start must be a row that reads no history, got {start} ({error}); "
                "build the table from grid.from_step(start) instead"
            ) from error

    def until(self, end: int) -> SolverTable:
        """The table's first ``end`` rows; they end on a state of the level ``end_level``."""
        _check_index("end", end, 1, len(self.rows))
        kept = self.rows[:end]
        return dataclasses.replace(
            self,
            rows=kept,
            num_draws=sum(row.draw >= 0 for row in kept),
            end_level=self.level_after(end - 1),
        )

    def __str__(self) -> str:
        names = ["x", *(f"r{j}" for j in range(1, self.num_registers))]
        header = f"{self.name}: {self.evaluations} model evaluations, "
        header += f"{self.num_registers} registers ({', '.join(names)}; in float32 "
        header += f"{4 * self.num_registers} bytes for each element of the state), "
        header += f"{self.num_draws} noise draws, x_T = {self.init_scale:.6g} z"
        columns = ["row", "time", "model input", f"p = {self.prediction}", "updates"]
        body = [self._cells(i, row, names) for i, row in enumerate(self.rows)]
        widths = [max(len(line[k]) for line in [columns, *body]) for k in range(4)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(line[:4], widths, strict=True)), line[4]])
            for line in [columns, *body]
        ]
        return "\n".join([header, *([self.description] if self.description else []), *lines])

    def _cells(self, i: int, row: Row, names: list[str]) -> list[str]:
        feed = names[row.feed]
        model_input = feed if row.input_scale == 1 else f"{row.input_scale:.6g} {feed}"
        prediction = _linear([(row.from_state, feed), (row.from_output, "out")])
        if not row.evaluates:
            model_input = "-"
        if row.rule:
            prediction += f" [{row.rule}{f' {row.rule_value:.6g}' if row.rule_value else ''}]"
        updates = []
        for update in row.updates:
            terms = list(zip(update.from_registers, names, strict=True))
            terms += [(update.from_prediction, "p"), (update.from_noise, f"z{row.draw}")]
            updates.append(f"{names[update.dest]} = {_linear(terms)}")
        return [str(i), f"{row.time:.6g}", model_input, prediction, ";  ".join(updates)]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, as :meth:`save` writes them."""
        return {
            "format": "fastdiff.SolverTable",
            "version": FORMAT_VERSION,
            **dataclasses.asdict(self),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SolverTable:
        """The inverse of :meth:`to_dict`; ValueError when ``data`` is not a solver table."""
        if not isinstance(data, dict) or data.get("format") != "fastdiff.SolverTable":
            raise ValueError("data must be a fastdiff.SolverTable, got something else")
        if data.get("version") != FORMAT_VERSION:
            raise ValueError(f"version must be {FORMAT_VERSION}, got {data.get('version')}")
        try:
            rows = tuple(_row(entry) for entry in data["rows"])
            rest = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name != "rows"}
            if rest["end_level"] is not None:
                rest["end_level"] = tuple(rest["end_level"])
            return cls(rows=rows, **rest)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"data must hold every field of a solver table, got {error!r}"
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table as JSON. Numbers keep every bit (shortest round-trip decimals)."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SolverTable:
        """Reads a table written by :meth:`save`; ValueError when the file is not one."""
        try:
            data = json.loads(Path(path).read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"path must be a JSON solver table, got {path} ({error})") from error
        return cls.from_dict(data)


def _row(entry: dict[str, Any]) -> Row:
    updates = tuple(
        Update(**{**update, "from_registers": tuple(update["from_registers"])})
        for update in entry["updates"]
    )
    level = None if entry["level"] is None else tuple(entry["level"])
    return Row(**{**entry, "updates": updates, "level": level})


def _linear(terms: Iterable[tuple[float, str]]) -> str:
    """ "0.98 x - 0.2 p" out of (coefficient, name) pairs; zero terms left out."""
    text = ""
    for value, name in terms:
        if value == 0:
            continue
        magnitude = name if abs(value) == 1 else f"{abs(value):.6g} {name}"
        if not text:
            text = magnitude if value > 0 else f"-{magnitude}"
        else:
            text += f" {'+' if value > 0 else '-'} {magnitude}"
    return text or "0"
