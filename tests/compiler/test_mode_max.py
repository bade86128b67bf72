"""mode="max": the same results with Inductor between the ops."""

from __future__ import annotations

import shutil

import pytest
import torch
from denoisers import made, tensors
from torch import nn

from fastdiff import compiler

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(
        not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a compiler"
    ),
]


def test_a_dit_through_inductor():
    model, inputs = made("zoo_dit")
    compiler.compile(model, mode="max")
    with torch.no_grad():
        for step in range(4):
            mine = tensors(model(**inputs(step)))
            for value, right in zip(mine, tensors(model._call_impl(**inputs(step))), strict=True):
                torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-5)
        for parameter in model.parameters():
            parameter.mul_(1.05)
        mine = tensors(model(**inputs(0)))
        for value, right in zip(mine, tensors(model._call_impl(**inputs(0))), strict=True):
            torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-5)
    (graph,) = compiler.report(model).graphs
    (entry,) = model._compiled_call_impl._entries.values()
    assert entry.runners[0]._run_step._function is not entry.runners[0].step.module
    assert graph.hoisted > 0


def test_bad_mode():
    with pytest.raises(ValueError, match="mode must be one of default, max, got 'fast'"):
        compiler.compile(nn.Linear(2, 2), mode="fast")
