"""``--budget SECONDS``: what does not fit any more is skipped, and says so.

On a machine that is lent for minutes the rows that matter come first, and a test that would be cut
off in the middle does not start. The time counts from the start of pytest.
"""

from __future__ import annotations

import math
import time

import pytest


def positive(text: str) -> float:
    """The option's value. ValueError for what is no number of seconds above 0."""
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise ValueError(f"--budget must be seconds above 0, got {text}")
    return seconds


class Budget:
    """Seconds that are left; infinitely many without the option."""

    def __init__(self, seconds: float | None) -> None:
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def why_not(self, seconds: float) -> str:
        """Why something of about so many seconds is left out, or ""."""
        if seconds <= self.left:
            return ""
        return f"--budget: takes about {seconds:.0f} s, {max(0.0, self.left):.0f} s are left"

    def need(self, seconds: float) -> None:
        """Skips the test that asks."""
        if reason := self.why_not(seconds):
            pytest.skip(reason)
