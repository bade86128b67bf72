"""How good the embedded digits model's samples are: `fastdiff evaluate`, as figures (README)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

import fastdiff
from fastdiff.evaluation import evaluate


def test_digits(benchmark: Any, record: Callable[..., None], quick: bool) -> None:
    pytest.importorskip("sklearn")
    samples = {"samples": 200} if quick else {}
    report = benchmark.pedantic(evaluate, (fastdiff.load("digits"),), samples, rounds=1)
    facts = dataclasses.asdict(report)
    row = {"name": "digits", **facts, "frechet_ratio": report.frechet_ratio}
    benchmark.extra_info.update(row)
    record("cpu", row)
    if not quick:  # the bars are those of a thousand samples
        assert all(met for *_, met in report.checks())
