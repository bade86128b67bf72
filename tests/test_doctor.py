"""`fastdiff doctor`: says what is usable, and what to do about each part that is not."""

from __future__ import annotations

import pytest
import torch

from fastdiff import _ext, environment, ops


def find(findings, name):
    matches = [finding for finding in findings if finding.name.startswith(name)]
    assert matches, [finding.name for finding in findings]
    return matches


def test_healthy_installation_runs_every_op():
    findings = environment.diagnose()
    assert not [finding for finding in findings if finding.status == "broken"]
    for op in ops.OPS:
        outcomes = find(findings, f"op {op.name} [reference, cpu]")
        assert [finding.status for finding in outcomes] == ["ok"]
    assert find(findings, "torch")[0].detail == torch.__version__


def test_missing_extension_says_why_and_what_to_do(monkeypatch):
    monkeypatch.setattr(
        _ext, "_load", lambda: (None, "fastdiff._C is missing: no C++ compiler found")
    )
    (finding,) = find(environment.diagnose(), "C++ extension")
    assert finding.status == "missing"
    assert "no C++ compiler found" in finding.detail
    assert "install a C++17 compiler" in finding.remedy
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler found.*Remedy"):
        _ext.require_ext()


def test_a_wrong_kernel_is_reported_as_broken(monkeypatch, capsys):
    monkeypatch.setattr(
        type(ops.OPS[0]), "self_check", lambda self, device: {"cpp": "wrong by 0.5"}
    )
    assert environment.run_doctor(None) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["BROKEN", "op", "group_norm_silu", "[cpp,", "cpu]", "wrong", "by", "0.5"] in lines


def test_unsupported_version_is_broken_with_a_remedy(monkeypatch):
    monkeypatch.setattr(environment.metadata, "version", lambda name: "2.4.0")
    finding = environment._package("torch", required=True)
    assert finding.status == "broken"
    assert finding.remedy == "pip install 'torch>=2.11,<2.16'"


@pytest.mark.gpu
def test_doctor_on_a_gpu():
    findings = environment.diagnose()
    assert [finding for finding in find(findings, "GPU 0") if finding.status == "ok"]
    assert not [finding for finding in findings if finding.status == "broken"]
