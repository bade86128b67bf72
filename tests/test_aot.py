"""The compile check: what it must let through and, above all, what it must refuse."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

import dataclasses  # noqa: E402

from fastdiff import _compile, aot  # noqa: E402
from fastdiff.environment import interpreting  # noqa: E402
from fastdiff.hardware import ARCHITECTURES  # noqa: E402
from fastdiff.ops import OPS  # noqa: E402
from fastdiff.ops._contract import AotConfig  # noqa: E402

pytestmark = pytest.mark.skipif(interpreting(), reason="the interpreter compiles nothing")


@triton.jit
def _hungry_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Keeps a tile in one warp's registers that does not fit them."""
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    total = tl.sum(x)
    tl.store(out_ptr + offsets, x / total)


def hungry(block: int) -> AotConfig:
    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "BLOCK": "constexpr"}
    return AotConfig(_hungry_kernel, signature, {"BLOCK": block}, {"num_warps": 1}, "hungry")


def test_reports_a_spill() -> None:
    """256 values per thread and 255 registers."""
    outcome = _compile.compile_config(hungry(32 * 512), 80)
    assert not outcome.error
    assert outcome.spill_bytes > 0
    assert outcome.bad


def test_reports_what_does_not_compile() -> None:
    outcome = _compile.compile_config(hungry(1000), 80)  # not a power of two
    assert "power of 2" in outcome.error
    assert outcome.bad


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """One tile's product, for SIZE x SIZE x WIDE."""
    m = tl.arange(0, SIZE)
    k = tl.arange(0, WIDE)
    a = tl.load(a_ptr + m[:, None] * WIDE + k[None, :])
    b = tl.load(b_ptr + k[:, None] * SIZE + m[None, :])
    tl.store(out_ptr + m[:, None] * SIZE + m[None, :], tl.dot(a, b))


def dot(size: int = 64, wide: int = 64, **tensor_cores: str) -> AotConfig:
    """tensor_cores: sm_90="HGMMA"."""
    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32"}
    signature |= {"SIZE": "constexpr", "WIDE": "constexpr"}
    expected = {int(name.removeprefix("sm_")): value for name, value in tensor_cores.items()}
    constants = {"SIZE": size, "WIDE": wide}
    return AotConfig(
        _dot_kernel, signature, constants, {"num_warps": 4}, "dot", tensor_cores=expected
    )


@pytest.mark.parametrize(
    ("arch", "instruction"), [(80, "HMMA"), (89, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")]
)
def test_counts_tensor_core_instructions(arch: int, instruction: str) -> None:
    config = dot(**{f"sm_{arch}": instruction})
    outcome = _compile.compile_config(config, arch)
    assert not outcome.bad, outcome
    ((name, count),) = outcome.tensor_cores
    assert name == instruction
    # 64x64x64: HMMA 16x8x16, HGMMA 64xNx16 and UTCHMMA's instructions all take 16 of the depth.
    assert count % 4 == 0
    assert (outcome.tensor_columns > 0) == (arch == 100)
    assert outcome.threads == 128


def test_refuses_a_kernel_without_its_tensor_core_instruction() -> None:
    wrong = _compile.compile_config(dot(sm_80="HGMMA"), 80)
    assert wrong.error == "SASS must hold HGMMA, has HMMA"
    none = dataclasses.replace(hungry(1024), tensor_cores={80: "HMMA"})
    assert _compile.compile_config(none, 80).error.endswith("has no tensor-core instruction")
    # It is held to what is said of its own architecture only.
    assert not _compile.compile_config(dot(sm_90="HGMMA"), 80).error


def test_refuses_more_shared_memory_than_a_block_has() -> None:
    """Two tiles of 64 x 512 bf16 are 128 KiB."""
    outcome = _compile.compile_config(dot(64, 512), 89)
    assert outcome.shared_bytes > 99 * 1024
    assert (
        outcome.error == f"needs {outcome.shared_bytes} bytes of shared memory, a block has 101376"
    )


@pytest.mark.parametrize(
    ("line", "counted"),
    [
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4 ;", "HMMA"),
        ("IMMA.16832.S8.S8.SAT R4, R8.ROW, R12.COL, R4 ;", "IMMA"),
        ("QMMA.16832.F32.E4M3.E4M3 R4, R8, R12, R4 ;", "QMMA"),
        ("IGMMA.64x128x32.S8.S8 R24, gdesc[UR4], R24 ;", "IGMMA"),
        ("QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24 ;", "QGMMA"),
        ("@P0 UTCQMMA gdesc[UR6], gdesc[UR10], tmem[UR8], tmem[UR30], UPT ;", "UTCQMMA"),
        # Neither computes anything.
        ("UTCBAR [UR12], URZ ;", ""),
        ("UTCATOMSWS.FIND_AND_SET.ALIGN UP0, UR6, UR6 ;", ""),
        ("FFMA R4, R8, R12, R4 ;", ""),
    ],
)  # fmt: skip
def test_knows_tensor_core_instructions(line: str, counted: str) -> None:
    assert _compile.count_tensor_cores(line) == (((counted, 1),) if counted else ())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_lets_a_small_kernel_through(arch: int) -> None:
    outcome = _compile.compile_config(hungry(1024), arch)
    assert not outcome.bad, outcome
    assert 0 < outcome.registers < 255


def test_every_op_with_a_kernel_is_checked() -> None:
    labels = [config.label for config in _compile.all_configs()]
    assert len(set(labels)) == len(labels)
    for op in OPS:
        if op.aot is not None:
            assert any(label.startswith(f"{op.name} ") for label in labels), op.name


def test_a_configuration_is_compiled_for_its_own_architectures(monkeypatch) -> None:
    configs = (hungry(1024), dataclasses.replace(hungry(1024), architectures=(90,)))
    monkeypatch.setattr(_compile, "all_configs", lambda: configs)
    assert _compile.jobs_of([0, 1], (80, 90)) == [(0, 80), (0, 90), (1, 90)]


def test_the_check_fails_for_a_bad_configuration(monkeypatch, capsys) -> None:
    configs = (hungry(1024), dot(sm_89="HGMMA"))
    monkeypatch.setattr(_compile, "all_configs", lambda: configs)
    monkeypatch.setattr(aot, "all_configs", lambda: configs)
    # In this process: the others would not see the patch.
    monkeypatch.setattr(aot, "compile_jobs", lambda jobs, _: map(_compile._compile_job, jobs))
    assert aot.main(["--quick"]) == 0  # sm_80 and sm_90
    assert aot.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    (refused,) = [line for line in lines if line.endswith("SASS must hold HGMMA, has HMMA")]
    assert refused.split()[:2] == ["dot", "sm_89"]
    assert lines[-1].startswith("8 compiled in ")
    assert lines[-1].endswith(", 1 bad")
    with pytest.raises(SystemExit):
        aot.main(["--op", "no_such_op"])


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in OPS if op.aot is not None], ids=lambda op: op.name)
def test_first_configurations_do_not_spill(op) -> None:
    for config in [config for config in op.aot() if 90 in config.archs][:4]:
        outcome = _compile.compile_config(config, 90)
        assert not outcome.bad, outcome
