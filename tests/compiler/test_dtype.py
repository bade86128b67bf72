"""dtype=: the model in another precision, for callers that keep theirs."""

from __future__ import annotations

import copy
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from denoisers import made, tensors
from torch import Tensor, nn

from fastdiff import compiler
from fastdiff.testing import assert_within_2x

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
]
HALVES = [torch.bfloat16, torch.float16]


def cast(values: Any, dtype: torch.dtype) -> Any:
    def one(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    return torch.utils._pytree.tree_map(one, values)


def by_hand(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """What users write: all but times and positions."""
    kept = {n: v for n, v in inputs.items() if n == "timestep" or n.endswith("ids")}
    result: dict[str, Any] = cast({n: v for n, v in inputs.items() if n not in kept}, dtype)
    return result | kept


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "name", ["unet", pytest.param("sdxl", marks=pytest.mark.long), "dit", "sd3", "flux"]
)
def test_float32_goes_in_and_comes_out(name, dtype):
    pytest.importorskip("diffusers")
    model, inputs = made(name)
    wide = copy.deepcopy(model).double()
    eager = copy.deepcopy(model).to(dtype)
    compiler.compile(model, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        for step in range(3):
            right = tensors(wide(**by_hand(inputs(step), torch.float64)))
            # The numbers themselves are rounded once more where they go in.
            theirs = tensors(eager(**by_hand(inputs(step), dtype)))
            for mine, oracle, other in zip(
                tensors(model(**inputs(step))), right, theirs, strict=True
            ):
                assert mine.dtype == torch.float32
                assert torch.equal(mine, mine.to(dtype).float())
                assert_within_2x(mine.to(dtype), oracle, other, what=f"{name}, step {step}")
    report = compiler.report(model)
    assert report.cast == f"torch.float32 to {dtype}"
    assert f"cast from torch.float32 to {dtype}" in str(report)
    assert report.captures == 1
    assert not report.eager
    assert report.hits > 0  # casts of a condition are kept like the rest


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.time = nn.Linear(4, 4), nn.Linear(1, 4)
        self.register_buffer("table", torch.full((4,), 1 / 3))
        self.register_buffer("count", torch.arange(4))
        self.seen: list[Any] = []

    def forward(self, sample: Tensor, timestep: Tensor, extra: Any = None, **more: Any) -> Any:
        if not torch.compiler.is_compiling():
            self.seen = [timestep.dtype, extra, more]
        t = self.time((timestep.reshape(-1, 1) - 900).to(self.table.dtype))
        out = self.inner(sample) + t + self.table
        for value in (extra or {}).get("parts", ()):
            out = out + value
        return {"sample": out, "indices": self.count + 1, "twice": (out * 2,)}


def small() -> Small:
    torch.manual_seed(0)
    return Small().eval().requires_grad_(False)


X, T = torch.randn(2, 4), torch.tensor([901.0, 333.0])


def test_the_cast_is_in_place_and_stays():
    model = small()
    inner = model.inner
    weight = inner.weight
    state = {n: v.clone() for n, v in model.state_dict().items()}
    assert compiler.compile(model, dtype=torch.bfloat16) is model
    assert model.inner is inner
    assert inner.weight is weight
    assert model.count.dtype == torch.int64
    compiler.uncompile(model)
    for name, value in model.state_dict().items():
        expected = state[name].bfloat16() if state[name].is_floating_point() else state[name]
        assert torch.equal(value, expected)
    with pytest.raises(RuntimeError):  # the model's own code again, which takes its own dtype
        model.inner(X)


def test_nested_inputs_and_results():
    model = small()
    parts = {"parts": [torch.randn(2, 4), torch.randn(2, 4)], "other_ids": T}
    right = copy.deepcopy(model)(X, T, parts)
    compiler.compile(model, dtype=torch.bfloat16)
    result = model(X, T, parts)
    assert compiler.report(model).eager == {}
    assert result["sample"].dtype == result["twice"][0].dtype == torch.float32
    assert result["indices"].dtype == torch.int64
    torch.testing.assert_close(result["sample"], right["sample"], rtol=0.02, atol=0.05)
    assert parts["parts"][0].dtype == torch.float32  # the caller's own


def test_a_sample_in_the_new_dtype_comes_back_in_it():
    model = small()
    compiler.compile(model, dtype=torch.bfloat16)
    assert model(X.bfloat16(), T)["sample"].dtype == torch.bfloat16
    torch.testing.assert_close(model(X.bfloat16(), T)["sample"].float(), model(X, T)["sample"])


def test_the_models_own_code_gets_the_same():
    """Gradients and training mode."""
    model = small()
    compiler.compile(model, dtype=torch.bfloat16)
    right = model(X, T)["sample"]
    model.train()
    result = model(X, T, extra={"parts": (X * 0, X * 0)}, mask_ids=X, scale=X)["sample"]
    torch.testing.assert_close(result, right, rtol=0.02, atol=0.02)
    timestep, extra, more = model.seen
    assert timestep == torch.float32
    assert extra["parts"][0].dtype == torch.bfloat16
    assert (more["mask_ids"].dtype, more["scale"].dtype) == (torch.float32, torch.bfloat16)
    model.eval().requires_grad_(True)
    x = X.clone().requires_grad_()
    model(x, T)["sample"].sum().backward()
    assert x.grad.dtype == torch.float32
    assert model.inner.weight.grad.dtype == torch.bfloat16
    assert len(compiler.report(model).eager) == 2


def test_times_keep_their_digits():
    """901 is no bfloat16: the table of times would be another one."""
    model = small()
    compiler.compile(model, dtype=torch.bfloat16)
    right = model._call_impl(X.bfloat16(), T)["sample"].float()
    wrong = model._call_impl(X.bfloat16(), T.bfloat16())["sample"].float()
    torch.testing.assert_close(model(X, T)["sample"], right)
    assert float((right - wrong).abs().max()) > 0.1


def test_again():
    model = small()
    compiler.compile(model, dtype=torch.bfloat16)
    compiler.compile(model, dtype=torch.bfloat16, freeze=True)
    assert model(X, T)["sample"].dtype == torch.float32
    compiler.compile(model, dtype=torch.float32)
    assert model.inner.weight.dtype == torch.float32
    assert compiler.report(model).cast == "torch.bfloat16 to torch.float32"
    assert model(X, T)["sample"].dtype == torch.float32
    fresh = small()
    compiler.compile(fresh, dtype=torch.float32)
    assert compiler.report(fresh).cast == ""


def test_what_diffusers_keeps_in_float32_stays():
    pytest.importorskip("diffusers")
    model, inputs = made("wan")
    compiler.compile(model, dtype=torch.bfloat16)
    own = set(type(model)._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        stays = bool(own & set(name.split(".")))
        assert parameter.dtype == (torch.float32 if stays else torch.bfloat16)
    with torch.no_grad():
        (result,) = tensors(model(**inputs(0)))
        (right,) = tensors(model._call_impl(**by_hand(inputs(0), torch.bfloat16)))
    torch.testing.assert_close(result, right.float(), rtol=0.05, atol=0.05)


def test_with_quantize():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval().requires_grad_(False)
    x = torch.randn(3, 64)
    right = model(x)
    compiler.compile(model, dtype=torch.bfloat16, quantize="int8")
    result = model(x)
    assert result.dtype == torch.float32
    assert float((result - right).norm() / right.norm()) < 0.02
    assert sorted(compiler.report(model).quantized) == ["0", "1"]


@pytest.mark.parametrize("dtype", [torch.float64, "bfloat16", torch.int8])
def test_bad_dtypes(dtype):
    model = small()
    with pytest.raises(
        ValueError, match=r"dtype must be one of None, auto, torch\.bfloat16, .* got"
    ):
        compiler.compile(model, dtype=dtype)
    model.is_quantized = True
    with pytest.raises(ValueError, match="dtype must be None for a model that is quantised"):
        compiler.compile(model, dtype=torch.bfloat16)
    assert model.inner.weight.dtype == torch.float32


def has_bf16() -> bool:
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    return "avx512_bf16" in flags


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="x86 flags")
def test_auto_is_bfloat16_where_the_cpu_multiplies_it(monkeypatch):
    """And the report says so; where oneDNN may not, the model stays what it is."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    after = torch.bfloat16 if has_bf16() else torch.float32
    model = small()
    for _ in range(2):
        compiler.compile(model, dtype="auto")
        assert model.inner.weight.dtype == after
        assert model(X, T)["sample"].dtype == torch.float32
        report = compiler.report(model)
        assert report.cast == (f"torch.float32 to {after}" if has_bf16() else "")
        assert report.dtype == str(after)[6:]
        assert f"weights: {report.dtype}" in str(report)
        ending = "with bfloat16 products" if has_bf16() else "without bfloat16 products"
        assert f"CPU: {report.instructions}" in str(report)
        assert report.instructions.endswith(ending)
    for most in ("AVX2", "AVX512_CORE", "AVX512_CORE_VNNI"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
        model = small()
        compiler.compile(model, dtype="auto")
        assert model.inner.weight.dtype == torch.float32
        assert f"oneDNN up to {most}, without bfloat16" in compiler.report(model).instructions
    for dtype in (torch.float16, torch.float64):
        model = small().to(dtype)
        assert compiler.compile(model, dtype="auto").inner.weight.dtype == dtype
        assert compiler.report(model).cast == ""
    assert compiler.compile(small()).inner.weight.dtype == torch.float32
