"""How everything here is timed; the tuner of launches times the same way."""

from __future__ import annotations

from fastdiff._timing import MAX_ROUNDS, MIN_ROUNDS, Function, Timing, interleaved

__all__ = ["MAX_ROUNDS", "MIN_ROUNDS", "Function", "Timing", "interleaved"]
