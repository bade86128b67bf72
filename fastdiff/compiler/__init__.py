"""``fastdiff.compile``: a model's own code, captured, fused and split, behind the same model."""

from __future__ import annotations

from fastdiff.compiler.api import compile, report, uncompile
from fastdiff.compiler.reports import GraphReport, Report

__all__ = ["GraphReport", "Report", "compile", "report", "uncompile"]
