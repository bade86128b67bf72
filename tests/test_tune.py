"""`python -m fastdiff.tune`: the measuring loop with a timer that makes its numbers up."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff import tune, tuning
from fastdiff._timing import Function, Timing
from fastdiff.ops import OPS, Op, group_norm_silu, solver_step
from fastdiff.ops._contract import Call, Example, Implementation, Tuning

CPU = torch.device("cpu")
BLOCKS = (512, 1024, 2048, 4096)
PROGRAM = """
import torch
from fastdiff import tuning
from fastdiff.ops import OPS
from fastdiff.ops._contract import outputs
from fastdiff.testing import assert_within_2x, poisoned_empty

ran = 0
for op in OPS:
    if op.tuning is None:
        continue
    for name in {samples!r}[op.name]:
        # A sample by its name, or a shape.
        found = [s for s in op.samples if s.name == name] or [op.tuning.example(name, groups=2)]
        call = found[0].make("cpu", torch.float32)
        exact = call.double()
        oracle = op.reference(*exact.args, **exact.kwargs)
        torch_result = op.reference(*call.args, **call.kwargs)
        seen = []
        for choice, plan in op.tuning.candidates(*call.args, **call.kwargs):
            key = op.tuning.key(*call.args, **call.kwargs)
            tuning.save(op.name, {{key.text(): {{"choice": choice}}}})
            assert tuning.lookup(op.name, key) == choice
            launched = []
            module = __import__(f"fastdiff.kernels.{{op.name}}", fromlist=["x"])
            launcher = "launch" if hasattr(module, "launch") else op.name
            inner = getattr(module, launcher)
            def watch(*args, **kwargs):
                launched.append(kwargs.get("policy", args[-1] if args else None))
                return inner(*args, **kwargs)
            setattr(module, launcher, watch)
            with poisoned_empty():
                result = op(*call.args, **call.kwargs, impl="triton")
            setattr(module, launcher, inner)
            assert launched == [plan], (launched, plan)
            for three in zip(*map(outputs, (result, oracle, torch_result)), strict=True):
                assert_within_2x(*three, what=f"{{name}} {{choice}}")
            seen.append(plan)
            ran += 1
        assert len(seen) > 1 and len(set(seen)) == len(seen), (name, seen)
print("ran", ran)
"""


class FakeOp(Op):
    """Doubles x; its "launch" is what tuning chose: block 4096 is wrong and 2048 breaks."""

    def __call__(self, x: torch.Tensor, impl: str = "auto") -> torch.Tensor:
        assert impl == "triton"
        key = fake_key(x)
        block = tuning.plan(self.name, key, lambda: fake_candidates(x)) or 0
        RAN.append(block)
        if block == 2048:
            raise RuntimeError("out of resources\nshared memory")
        return x * (3 if block == 4096 else 2)


RAN: list[int] = []


def fake_key(x: torch.Tensor) -> tuning.Key:
    return tuning.Key(x.device, x.dtype, (("n", x.numel()),))


def fake_candidates(x: torch.Tensor) -> list[tuple[tuning.Choice, int]]:
    return [({"block": block}, block) for block in BLOCKS]


def fake_example(name: str, size: int) -> Example:
    return Example(
        name, lambda device, dtype: Call((torch.ones(size, device=device, dtype=dtype),))
    )


OP = FakeOp(
    name="doubled",
    schema="(Tensor x) -> Tensor",
    reference=lambda x: x * 2,
    pattern=lambda x: x * 2,
    check=lambda x: None,
    implementations=(Implementation("triton", lambda x: "", lambda x: x * 2),),
    examples=(fake_example("small", 3), fake_example("large", 5000)),
    samples=(),
    bytes_moved=lambda x: 1,
    flops=lambda x: 1,
    tuning=Tuning(lambda shape: fake_example("given", shape[0]), fake_key, fake_candidates),
)
CALL = Call((torch.ones(7),))


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    tuning.reload()
    RAN.clear()
    return tmp_path / "tuning.json"


def steady(seconds: float, spread: float = 0.0) -> Timing:
    """Quartiles at seconds * (1 -+ spread)."""
    return Timing(tuple(seconds * (1 + spread * at) for at in (-1, -1, 0, 1, 1)))


def timer(times: Mapping[int, Timing], called: list[str] | None = None) -> tune.Timer:
    """Gives the candidates these times, and calls each once as a real timer does."""

    def made_up(functions: Mapping[str, Function]) -> Mapping[str, Timing]:
        for name, function in functions.items():
            function()
            if called is not None:
                called.append(name)
        return {str({"block": b}): t for b, t in times.items() if str({"block": b}) in functions}

    return made_up


def test_takes_the_fastest_of_those_that_are_right() -> None:
    called: list[str] = []
    times = {512: steady(9e-6), 1024: steady(6e-6), 2048: steady(1e-6), 4096: steady(1e-6)}
    verdict = tune.measure(OP, CALL, timer(times, called))
    assert verdict.best == {"block": 1024}
    assert verdict.us == pytest.approx(6)
    assert verdict.default_us == pytest.approx(9)
    assert called == ["{'block': 512}", "{'block': 1024}"], "only what is right is timed"
    assert RAN == [512, 1024, 2048, 4096, 512, 1024]
    assert verdict.rejected["{'block': 2048}"].startswith("RuntimeError: out of resources")
    assert "AssertionError" in verdict.rejected["{'block': 4096}"]
    assert not tuning.active(), "measuring leaves nothing forced"


@pytest.mark.parametrize(
    ("default", "other", "taken"),
    [
        (steady(1.0), steady(0.9), True),
        (steady(1.0), steady(0.985), False),  # less than 2 %
        (steady(1.0, 0.1), steady(0.9, 0.1), False),  # within the spreads
        (steady(1.0, 0.1), steady(0.7, 0.1), True),
        (steady(1.0), steady(1.2), False),
    ],
)
def test_select_stays_unless_the_gain_is_more_than_noise(
    default: Timing, other: Timing, taken: bool
) -> None:
    times = {"default": default, "other": other}
    assert tune.pick(times, "default") == ("other" if taken else "default")


def test_nothing_is_said_when_selects_own_launch_fails() -> None:
    broken = dataclasses.replace(
        OP, tuning=dataclasses.replace(OP.tuning, candidates=lambda x: [({"block": 2048}, 2048)])
    )
    with pytest.raises(RuntimeError, match="out of resources"):
        tune.measure(broken, CALL, timer({}))


def test_cases_are_saved_one_by_one_and_looked_up(table: Path, capsys: Any) -> None:
    times = {512: steady(9e-6), 1024: steady(6e-6)}
    seen: list[dict] = []

    def watching(functions: Mapping[str, Function]) -> Mapping[str, Timing]:
        seen.append(tuning.read(table))
        return timer(times)(functions)

    cases = [(OP, example) for example in OP.examples]
    assert tune.run_cases(cases, CPU, torch.float32, watching, progress=False) == 0
    assert seen[0] == {}
    assert len(seen[1]["doubled"]) == 1, "the first is on the disk before the second is measured"
    entries = tuning.read(table)["doubled"]
    assert list(entries) == ["cpu | sm_0 | float32 | n<=4", "cpu | sm_0 | float32 | n<=8192"]
    assert entries["cpu | sm_0 | float32 | n<=4"].items() >= {
        "choice": {"block": 1024}, "us": 6.0, "default_us": 9.0, "candidates": 2,
    }.items()  # fmt: skip
    RAN.clear()
    OP(torch.ones(8000), impl="triton")
    OP(torch.ones(16), impl="triton")
    assert RAN == [1024, 0]
    out = capsys.readouterr().out
    assert "doubled, small: {'block': 1024}, 6.0 us (1.50 x the default's speed" in out
    assert "not used: {'block': 2048}: RuntimeError: out of resources\n" in out


def test_a_case_that_fails_is_counted_and_the_others_go_on(table: Path, capsys: Any) -> None:
    def refuses(x: torch.Tensor) -> str:
        return "too small" if x.numel() < 5 else ""

    picky = dataclasses.replace(
        OP, implementations=(Implementation("triton", refuses, lambda x: x),)
    )
    cases = [(picky, example) for example in OP.examples]
    times = timer({512: steady(1.0), 1024: steady(1.0)})
    assert tune.run_cases(cases, CPU, torch.float32, times, progress=False) == 1
    assert list(tuning.read(table)["doubled"]) == ["cpu | sm_0 | float32 | n<=8192"]
    out = capsys.readouterr().out
    assert "doubled, small: FAILED: the Triton kernel cannot run: too small" in out


def test_progress_bar_counts_the_cases(capsys: Any) -> None:
    times = timer({512: steady(1.0), 1024: steady(1.0)})
    cases = [(OP, example) for example in OP.examples]
    tune.run_cases(cases, CPU, torch.float32, times, progress=True)
    assert "0/2" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_1(table: Path, capsys: Any) -> None:
    assert tune.main([]) == 1
    assert "there is no GPU to measure on" in capsys.readouterr().err
    assert not table.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--op", "no_such_op"], "invalid choice"),
        (["--shape", "2,320,64,64"], "--shape must come with --op"),
        (["--op", "group_norm_silu", "--shape", "2,x"], "must be sizes such as"),
        (["--op", "group_norm_silu", "--shape", "2,0,4"], "must be sizes such as"),
        (["--op", "group_norm_silu", "--set", "groups=8"], "--set must come with --shape"),
        (
            ["--op", "group_norm_silu", "--shape", "2,32,4", "--set", "group=8"],
            "--set must name one of groups, channels_last, skip, got 'group'",
        ),
        (["--op", "solver_step", "--shape", "1,4", "--set", "row=x"], "row must be one of"),
        (["--op", "solver_step", "--shape", "1,4", "--set", "row"], "must be name=value"),
        (["--dtype", "int8"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_named(argv: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as leaving:
        tune.main(argv)
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err


def test_a_shape_and_its_settings_make_a_call() -> None:
    argv = ["--op", "group_norm_silu", "--shape", "2,24,5,5", "--set", "groups=8"]
    options = tune._parser().parse_args([*argv, "--set", "channels_last=True"])
    ((op, example),) = tune._examples(options)
    call = example.make("cpu", torch.float16)
    assert op.name == "group_norm_silu"
    assert call.args[0].shape == (2, 24, 5, 5)
    assert call.args[0].is_contiguous(memory_format=torch.channels_last)
    assert call.args[1] == 8
    options = tune._parser().parse_args(["--op", "solver_step", "--shape", "3,4,8"])
    ((op, example),) = tune._examples(options)
    assert example.make("cpu", torch.float16).args[0].shape == (2, 3, 4, 8)


@functools.lru_cache(maxsize=1)
def compiled() -> set[tuple[Any, ...]]:
    """What the compile check covers, in the terms of the launches."""
    pytest.importorskip("triton")
    from fastdiff.kernels import _group_norm as gn
    from fastdiff.kernels import add_group_norm_silu, group_norm_silu

    step = pytest.importorskip("fastdiff.kernels.solver_step", exc_type=ImportError)
    known: set[tuple[Any, ...]] = set()
    for config in (*group_norm_silu.aot_configs(), *add_group_norm_silu.aot_configs()):
        constants, warps = config["constexprs"], config["options"]["num_warps"]
        aligned = bool(config["multiples_of_16"])
        if config["kernel"] is gn._group_kernel:
            tile = (constants["BLOCK_C"], constants["BLOCK_HW"], warps, constants["ALIGN"])
            second = (constants["HAS_SKIP"], constants["HAS_RESIDUAL"])
            known.add(("group", *second, constants["IS_NHWC"], aligned, *tile))
        elif config["kernel"] in (gn._apply_kernel, gn._apply_last_kernel):
            last = config["kernel"] is gn._apply_last_kernel
            block = constants["BLOCK_HW" if last else "BLOCK"]
            known.add(("split", last, aligned, constants.get("BLOCK_C", 1), block, warps))
    for config in step.aot_configs():
        constants, warps = config["constexprs"], config["options"]["num_warps"]
        bits = 64 if config["signature"]["r0_ptr"] == "*fp64" else 32
        many = constants["NUM_REGISTERS"] > 4
        known.add(("step", bits, many, constants["BLOCK"], warps))
    return known


@pytest.mark.parametrize("second", ["", "skip", "residual"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 320, 64, 64), 32), ((2, 1280, 8, 8), 32), ((1, 6, 5, 7), 1), ((1, 130, 81, 81), 13),
        ((1, 128, 512, 512), 32), ((16, 4096, 1, 1), 1), ((1, 5, 1, 3), 5),
    ],
)  # fmt: skip
def test_group_norms_candidates_are_compiled_ahead_of_time(
    shape: tuple[int, ...], groups: int, channels_last: bool, second: str
) -> None:
    known = compiled()
    from fastdiff.kernels import group_norm_silu as kernels

    x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    name = "add_group_norm_silu" if second == "residual" else "group_norm_silu"
    tuning_of = next(op for op in OPS if op.name == name).tuning
    assert tuning_of is not None
    pixels = x[0, 0].numel()
    last = group_norm_layout(x)
    first = shape[1]
    if second == "skip":
        first = max(1, shape[1] * 2 // 3)
        x, skip = (torch.empty_like(part) for part in x.split([first, shape[1] - first], 1))
        candidates = tuning_of.candidates(x, groups, skip=skip)
    else:
        candidates = tuning_of.candidates(*[x] * (1 + (second == "residual")), groups)
    size = (*shape[:2], pixels, groups, x.dtype, last, 0)
    assert candidates[0][1] == kernels.select(*size, second=second, first=first)
    choices = [choice for choice, _ in candidates]
    assert all(choice not in choices[:n] for n, choice in enumerate(choices)), "one launch each"
    for _, plan in candidates:
        aligned = plan.align > 1 if last else pixels % 16 == 0
        if plan.kind == "group":
            tile = (plan.block_c, plan.block_hw, plan.num_warps, plan.align)
            kind = (second == "skip", second == "residual")
            assert ("group", *kind, last, aligned, *tile) in known
        else:
            assert (plan.splits - 1) * plan.span < pixels <= plan.splits * plan.span
            assert plan.span % plan.block_hw == 0
            block = (plan.block_c, plan.block_hw, plan.num_warps)
            assert ("split", last, last or aligned, *block) in known


def group_norm_layout(x: torch.Tensor) -> bool:
    from fastdiff.ops.group_norm_silu import memory_layout

    return memory_layout(x) == "channels_last"


@pytest.mark.parametrize("registers", [1, 4, 5, 8])
@pytest.mark.parametrize("per_image", [1, 5000, 1 << 22])
@pytest.mark.parametrize("bits", [32, 64])
def test_solver_steps_candidates_are_compiled_ahead_of_time(
    registers: int, per_image: int, bits: int
) -> None:
    known = compiled()
    from fastdiff.kernels.solver_step import LaunchPolicy

    policies = LaunchPolicy.candidates(per_image, bits // 8, registers)
    assert policies[0] == LaunchPolicy.select(per_image, bits // 8, registers)
    assert len(set(policies)) == len(policies) > 1
    for policy in policies:
        assert policy.block & (policy.block - 1) == 0
        assert ("step", bits, registers > 4, policy.block, policy.num_warps) in known


@pytest.mark.interpret
@pytest.mark.slow
def test_every_candidate_is_right_in_the_interpreter(fresh_python: Any, tmp_path: Path) -> None:
    """A table's choice reaches the kernel, and each candidate gives the op's result."""
    pytest.importorskip("triton")
    samples = {
        "group_norm_silu": (
            *("one group", "channels last", (1, 4, 40, 40)),
            *("skip, boundary in a group", "skip, channels last"),
        ),
        "add_group_norm_silu": ("a group in registers", (1, 4, 40, 40)),
        "solver_step": ("2M, one image", "DDPM, drawn"),
    }
    environment = {"TRITON_INTERPRET": "1", "FASTDIFF_CACHE": str(tmp_path / "cache")}
    out = fresh_python("-c", PROGRAM.format(samples=samples), **environment)
    assert int(out.split()[-1]) > 15


@pytest.mark.gpu
def test_measures_on_a_gpu(table: Path) -> None:
    argv = ["--op", "group_norm_silu", "--shape", "2,64,32,32", "--seconds", "0.2", "--quiet"]
    assert tune.main(argv) == 0
    assert tune.main(["--op", "solver_step", "--shape", "2,4,64,64", "--seconds", "0.2"]) == 0
    entries = tuning.read(table)
    assert set(entries) == {"group_norm_silu", "solver_step"}
    for keys in entries.values():
        ((key, entry),) = keys.items()
        assert key.startswith(torch.cuda.get_device_name())
        assert 0 < entry["us"] <= entry["default_us"]
    x = torch.randn(2, 64, 32, 32, device="cuda", dtype=torch.bfloat16)
    assert group_norm_silu(x, 32).isfinite().all()
    assert solver_step(x[None].float(), x, [1.0, 0.5, 0.0]).isfinite().all()
