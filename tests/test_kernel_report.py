"""docs/kernels.md: up to date with the code, as far as that shows without compiling."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fastdiff import _compile, kernel_report
from fastdiff._compile import Outcome
from fastdiff.ops import OPS

PATH = Path(__file__).parents[1] / kernel_report.DEFAULT_PATH
written = pytest.mark.skipif(not PATH.exists(), reason="docs/kernels.md is not written yet")
REMEDY = "run `python -m fastdiff.kernel_report`"
WITH_KERNELS = [op for op in OPS if op.aot is not None]


def labels_of(text: str) -> dict[str, list[str]]:
    """Op -> the configurations listed in its table."""
    sections = re.split(r"^### (\w+): \d+ configurations$", text, flags=re.MULTILINE)[1:]
    return {
        name: [line.split(" | ")[0].removeprefix("| ") for line in body.splitlines()
               if line.startswith("| ")][2:]
        for name, body in zip(sections[::2], sections[1::2], strict=True)
    }  # fmt: skip


def expected_labels() -> dict[str, list[str]]:
    expected: dict[str, list[str]] = {op.name: [] for op in WITH_KERNELS}
    for config in _compile.all_configs():
        name, label = config.label.split(maxsplit=1)
        expected[name].append(label)
    return expected


@written
def test_the_document_lists_every_op_and_configuration() -> None:
    text = PATH.read_text(encoding="utf-8")
    assert labels_of(text) == expected_labels(), REMEDY


@written
def test_the_document_counts_are_those_of_the_code() -> None:
    text = PATH.read_text(encoding="utf-8")
    configs = _compile.all_configs()
    for op in WITH_KERNELS:
        mine = [config for config in configs if config.label.split()[0] == op.name]
        compiled = sum(len(config.archs) for config in mine)
        assert f"| `{op.name}` | {len(mine)} | {compiled} | " in text, REMEDY
        assert f"### {op.name}: {len(mine)} configurations\n" in text, REMEDY


@written
def test_the_documents_bytes_flops_and_limits_are_those_of_the_code() -> None:
    text = PATH.read_text(encoding="utf-8")
    assert kernel_report.gpu_section() in text, REMEDY
    assert kernel_report.roofline_section() in text, REMEDY


@written
def test_the_document_says_that_nothing_was_measured() -> None:
    text = PATH.read_text(encoding="utf-8")
    assert text.count("Published limits, not measured") == 2
    assert " | ! " not in text
    assert not re.search(r"\d ![1-9]", text), "a configuration spills"


def test_fake_tensors_give_the_work_of_real_ones() -> None:
    for op in WITH_KERNELS:
        example = op.examples[0]
        call = example.make("cpu", torch.bfloat16)
        real = (op.bytes_moved(*call.args, **call.kwargs), op.flops(*call.args, **call.kwargs))
        assert kernel_report.work(op, example, torch.bfloat16) == real


def outcomes() -> list[Outcome]:
    """One outcome for every configuration, as a compiler could have given it."""
    return [
        Outcome(config.label, arch, 40, 0, 1024, 128)
        for config in _compile.all_configs()
        for arch in config.archs
    ]


def test_what_it_writes_is_what_the_test_reads() -> None:
    given = outcomes()
    given[0] = dataclasses.replace(
        given[0], spill_bytes=24, tensor_cores=(("HMMA", 128),), registers=255
    )
    text = kernel_report.document(given, "Triton 0.0")
    assert labels_of(text) == expected_labels()
    assert "(Triton 0.0)" in text
    # sm_80: 255 registers x 128 threads, two warps of each quarter's registers.
    assert "| 255 !24 · 1024 · 2r | " in text
    assert "| 80: HMMA 128 |" in text


def test_rates_follow_the_declared_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    op = WITH_KERNELS[0]
    config = _compile.all_configs()[0]
    assert config.label.startswith(op.name)
    for declared, dtype, rate in (
        ({}, torch.bfloat16, "float32"),
        ({80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}, torch.bfloat16, "half"),
        ({80: "HMMA"}, torch.float32, "tf32"),
        ({90: "QGMMA", 100: "UTCQMMA"}, torch.bfloat16, "fp8"),
        ({80: "IMMA", 90: "IGMMA"}, torch.bfloat16, "int8"),
        ({80: "HMMA", 90: "QGMMA"}, torch.bfloat16, "half"),
    ):
        changed = (dataclasses.replace(config, tensor_cores=declared),)
        monkeypatch.setattr(kernel_report, "all_configs", lambda changed=changed: changed)
        assert kernel_report.rate_of(op, dtype) == rate


def test_nothing_is_written_when_a_configuration_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(given: list[Outcome]) -> int:
        monkeypatch.setattr(kernel_report, "compile_jobs", lambda jobs, processes: iter(given))
        return kernel_report.main(["--out", str(tmp_path / "kernels.md")])

    monkeypatch.setattr(kernel_report, "interpreting", lambda: False)
    good = outcomes()
    assert run([dataclasses.replace(good[0], spill_bytes=8), *good[1:]]) == 1
    assert "spills" in capsys.readouterr().err
    monkeypatch.setattr(kernel_report, "undeclared", lambda outcomes: ["some_op"])
    assert run(good) == 1
    assert "some_op: AotConfig must declare its tensor_cores" in capsys.readouterr().err
    assert not (tmp_path / "kernels.md").exists()
    monkeypatch.setattr(kernel_report, "undeclared", lambda outcomes: [])
    assert run(good) == 0
    assert (tmp_path / "kernels.md").read_text().startswith("# Kernels\n")


def test_undeclared_tensor_cores_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    given = outcomes()[:1]
    assert kernel_report.undeclared(given) == []
    using = [dataclasses.replace(given[0], tensor_cores=(("HMMA", 4),))]
    op = using[0].label.split()[0]
    bare = tuple(dataclasses.replace(c, tensor_cores={}) for c in _compile.all_configs())
    monkeypatch.setattr(kernel_report, "all_configs", lambda: bare)
    assert kernel_report.undeclared(using) == [op]
    declared = (dataclasses.replace(bare[0], tensor_cores={80: "HMMA"}), *bare[1:])
    monkeypatch.setattr(kernel_report, "all_configs", lambda: declared)
    assert kernel_report.undeclared(using) == []
