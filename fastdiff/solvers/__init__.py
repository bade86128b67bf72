"""Noise schedules, time grids and solvers: a solver is a function that returns a table."""

from __future__ import annotations

from fastdiff.solvers.table import PackedTable, Row, SolverTable, Update

__all__ = ["PackedTable", "Row", "SolverTable", "Update"]
