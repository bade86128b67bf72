"""The benchmarks' own rules: nothing wrong is timed, peers are judged, files round-trip."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdiff.ops import OPS
from fastdiff.ops._contract import Call, Op, outputs

FOLDER = str(Path(__file__).parents[1] / "benchmarks")
SIDE = 64  # of the product that gives the limit
BY_NAME = {op.name: op for op in OPS}


@pytest.fixture(autouse=True)
def benchmarks_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Any:
    import measure

    return measure


def call_of(op: Op, dtype: torch.dtype = torch.float32) -> Any:
    return op.examples[0].make("cpu", dtype)


def wrong(impl: Any, change: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        result = impl.run(*args, **kwargs)
        changed = tuple(change(t) if t.numel() else t for t in outputs(result))
        return changed[0] if isinstance(result, torch.Tensor) else changed

    return dataclasses.replace(impl, run=run)


@pytest.fixture
def break_op(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """break_op(op, change): its first implementation that runs here gives change(result)."""
    before: list[tuple[Op, Any]] = []

    def breaks(op: Op, change: Any) -> None:
        call = call_of(op)
        usable = [i for i in op.implementations if not i.supports(*call.args, **call.kwargs)]
        if not usable:
            pytest.skip(f"no implementation of {op.name} besides the reference runs here")
        before.append((op, op.implementations))
        implementations = tuple(wrong(i, change) if i is usable[0] else i for i in before[-1][1])
        object.__setattr__(op, "implementations", implementations)

    yield breaks
    for op, implementations in before:
        object.__setattr__(op, "implementations", implementations)


def one_bit(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone().flatten()
    changed[0] = torch.nextafter(changed[0], changed.new_tensor(torch.inf))
    return changed.view(tensor.shape)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("group_norm_silu", lambda t: t * 1.01, "error must be at most"),
        ("attention", lambda t: torch.full_like(t, torch.nan), "must be finite"),
        ("geglu", lambda t: t.double(), "must have dtype"),
        ("solver_step", one_bit, "the reference's bits"),  # exact ops: any other bit is wrong
    ],
)
def test_a_wrong_kernel_fails_instead_of_being_timed(
    measuring, break_op, monkeypatch, name, change, message
):
    def timed(*_: Any, **__: Any) -> Any:
        raise RuntimeError("something was timed")

    op = BY_NAME[name]
    break_op(op, change)
    monkeypatch.setattr(measuring, "interleaved", timed)
    monkeypatch.setattr(measuring, "matmul_rate", timed)
    with torch.no_grad(), pytest.raises(AssertionError, match=message):
        measuring.measure(op, call_of(op), 0.01, False, SIDE)


def test_a_row_has_its_columns_and_its_limit(measuring):
    op = BY_NAME["attention"]
    with torch.no_grad():
        found = measuring.measure(op, call_of(op), 0.01, False, SIDE)
    times = {name: timing.median for name, timing in found.timings.items()}
    assert {"eager", "copy", "sdpa math", "sdpa"} <= set(times)
    limit = found.facts["limit"]
    by_matmul = found.facts["flops"] / limit["matmul_gflop_per_s"] / 1e9
    assert limit["seconds"] == pytest.approx(max(times["copy"], by_matmul))
    assert found.facts["auto"] in found.ours
    for name in found.ours:
        columns = found.columns[name]
        assert columns["times_eager"] == pytest.approx(times["eager"] / times[name])
        best = min(time for peer, time in times.items() if peer.startswith("sdpa "))
        assert columns["times_best_peer"] == pytest.approx(best / times[name])
        assert columns["percent_of_limit"] == pytest.approx(100 * limit["seconds"] / times[name])
        moved = found.facts["bytes"] / times[name] / 1e9
        assert columns["gb_per_s"] == pytest.approx(moved)


def test_peers_are_found_by_import_and_judged(measuring, monkeypatch):
    """A package that agrees is timed; one that does not, or cannot run, is reported."""
    op, call = BY_NAME["swiglu"], Call((torch.randn(8, 64),))

    def liger(function: Any) -> Any:
        module = SimpleNamespace(LigerSiLUMulFunction=SimpleNamespace(apply=function))
        monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(__path__=[]))
        monkeypatch.setitem(sys.modules, "liger_kernel.ops", SimpleNamespace(__path__=[]))
        monkeypatch.setitem(sys.modules, "liger_kernel.ops.swiglu", module)
        with torch.no_grad():
            return measuring.measure(op, call, 0.01, False, SIDE)

    right = liger(lambda gate, hidden: torch.nn.functional.silu(gate) * hidden)
    assert "liger" in right.timings
    assert not right.facts["left_out"]
    other = liger(lambda gate, hidden: torch.nn.functional.silu(hidden) * gate)
    assert "liger" not in other.timings
    assert other.facts["left_out"]["liger"].startswith("not equal: ")

    def raises(gate: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("needs a GPU")

    assert liger(raises).facts["left_out"]["liger"] == "cannot run: RuntimeError: needs a GPU"


def test_a_layer_has_an_ops_weights_inside_and_gives_its_result():
    import peers

    for name in ("group_norm_silu", "linear_gate", "timestep_mlp"):
        op = BY_NAME[name]
        call = call_of(op)
        layer = peers.Layer(op, call)
        given = peers.named(op, call)
        weights = [n for n in given if peers.is_weight(n) and given[n] is not None]
        assert len(list(layer.buffers())) == len(weights) > 0
        expected = outputs(op.pattern(*call.args, **call.kwargs))
        for mine, right in zip(outputs(layer(*layer.inputs())), expected, strict=True):
            assert torch.equal(mine, right)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["geglu", "attention", "solver_step_indexed"])
def test_on_a_gpu_replays_are_timed(measuring, name):
    op = BY_NAME[name]
    dtype = torch.float32 if name.startswith("solver") else torch.bfloat16
    call = op.examples[0].make("cuda", dtype)
    with torch.no_grad():
        found = measuring.measure(op, call, 0.05, True, SIDE)
    assert "triton" in found.ours
    assert not {*found.ours, "eager", "copy"} & set(found.facts["not_captured"])
    names = set(found.timings) | set(found.facts["left_out"])
    assert {"compile max-autotune-no-cudagraphs", "compile max-autotune"} <= names
    assert all(timing.median > 0 for timing in found.timings.values())


def test_rows_of_other_conditions_are_dropped_and_an_interrupted_run_goes_on(tmp_path):
    import stored

    def now(commit: str) -> stored.Results:
        return stored.Results({"device": "A (R) 1"}, {"id": commit, "dirty": False})

    for name in ("first", "second"):
        path, results = stored.of_area("ops", now("1"), tmp_path)
        results.rows[name] = stored.Row(name)
        stored.write(path, results)
    assert path == tmp_path / "a-1" / "ops.json"
    assert set(stored.of_area("ops", now("1"), tmp_path)[1].rows) == {"first", "second"}
    assert not stored.of_area("ops", now("2"), tmp_path)[1].rows


def test_results_files_round_trip_and_are_pytest_benchmarks(tmp_path):
    import stored

    row = stored.Row("op shape", {"bytes": 12}, {})
    row.variants["ours"] = stored.variant([3.0, 1.0, 2.0, 5.0], {"gb_per_s": 4.0}, ours=True)
    row.variants["once"] = stored.variant([1.0])
    results = stored.Results({"device": "A"}, {"id": "1", "dirty": False}, {row.name: row})
    path = tmp_path / "a" / "ops.json"
    stored.write(path, results)
    again = stored.read(path)
    assert again.same_conditions(results)
    assert again.rows["op shape"].facts == {"bytes": 12}
    ours = again.rows["op shape"].variants["ours"]
    assert (ours.median, ours.ours, ours.columns) == (2.5, True, {"gb_per_s": 4.0})
    assert ours.spread == pytest.approx(row.variants["ours"].spread)
    assert ours.stats["rounds"] == 4
    assert again.rows["op shape"].variants["once"].spread is None
    path.write_text("{}")
    with pytest.raises(ValueError, match="must be a results file"):
        stored.read(path)
