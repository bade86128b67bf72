"""The command line: what it writes, its exit codes, and one line per error."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import cli
from fastdiff.models import DiT, DiTConfig, Sampling, save


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small untrained model whose pictures depend on the label."""
    torch.manual_seed(0)
    config = DiTConfig(
        input_size=8,
        in_channels=1,
        hidden_size=16,
        depth=1,
        num_heads=2,
        num_classes=10,
        learn_sigma=False,
    )
    net = DiT(config)
    for layer in (net.final_layer.linear, net.final_layer.adaLN_modulation[1]):
        torch.nn.init.normal_(layer.weight, std=0.3)
    torch.nn.init.normal_(net.y_embedder.embedding_table.weight, std=2)
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save(net, path, sampling=Sampling(guidance_scale=1.5))
    return str(path)


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def picture(path: Path) -> tuple[np.ndarray, dict[str, str]]:
    with Image.open(path) as image:
        return np.asarray(image), dict(image.text)


def test_sample_writes_the_grid_with_its_settings(tmp_path: Path, model: str, capsys) -> None:
    out = tmp_path / "a.png"
    assert run("sample", "--model", model, "--out", out, "--steps", 3, "--seed", 5) == 0
    pixels, text = picture(out)
    cell = 8 * 6 + 4
    assert pixels.shape == (4 + 16 + 4 * cell, 4 + 10 * cell)
    assert text["seed"] == "5"
    assert text["labels"] == "0,1,2,3,4,5,6,7,8,9"
    assert (text["solver"], text["steps"], text["guidance_scale"]) == ("best_linear", "3", "1.5")
    captured = capsys.readouterr()
    assert captured.out == f"{out}: 40 images, best_linear in 3 steps, seed 5\n"
    assert "3/3" in captured.err  # the progress bar
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_same_seed_same_picture_and_labels_matter(tmp_path: Path, model: str, capsys) -> None:
    def draw(name: str, *more: object) -> np.ndarray:
        out = tmp_path / name
        options = ("--steps", 2, "--rows", 1, "--quiet")
        assert run("sample", "--model", model, "--out", out, *options, *more) == 0
        return picture(out)[0]

    first = draw("a.png", "--labels", "3")
    assert np.array_equal(first, draw("b.png", "--labels", "3"))
    below = slice(20, None)  # the caption differs anyway
    assert not np.array_equal(first[below], draw("c.png", "--labels", "4")[below])
    assert not np.array_equal(first, draw("d.png", "--labels", "3", "--seed", 1))
    assert capsys.readouterr().err == ""


BAD = [
    (["sample", "--steps", "0"], "argument --steps: must be an integer of at least 1 .*, got 0"),
    (["sample", "--steps", "x"], "argument --steps: must be an integer .*got 'x'"),
    (["sample", "--rows", "-1"], "argument --rows: must be an integer of at least 1"),
    (["sample", "--labels", "1,b"], "argument --labels: must be class numbers .*got '1,b'"),
    (["sample", "--labels", "3,10"], "--labels must be in 0..9, got 10"),
    (["sample", "--guidance-scale", "inf"], "--guidance-scale: must be a finite number"),
    (["sample", "--seed", "-1"], "argument --seed: must be an integer of at least 0"),
    (["sample", "--solver", "dmi"], "--solver must be one of .*got 'dmi'.*did you mean"),
    (["sample", "--device", "abacus"], "--device must be usable here, got 'abacus'"),
    (["sample", "--out", "absent/a.png"], "--out must be in a folder that exists"),
    (["sample", "--out", "a.jpg"], "--out must end in .png, got 'a.jpg'"),
    (["sample", "--model", "digit"], "--model must be one of 'digits'.*did you mean 'digits'"),
    (["sample", "--model", "a.ckpt"], "--model must be a .safetensors file.*pickle"),
    (["sample", "--model", "no.safetensors"], "--model must exist, got 'no.safetensors'"),
    (["evaluate", "--samples", "3"], "--samples: must be an integer of at least 25"),
    (["paint"], "invalid choice: 'paint'"),
    ([], "required: command"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_arguments(
    arguments: list[str], message: str, model: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[:1] == ["sample"] and "--model" not in arguments:
        arguments = [*arguments, "--model", model]
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    import re

    assert re.search(message, captured.err), captured.err
    assert list(tmp_path.iterdir()) == []


def test_interrupt_leaves_nothing_half_written(
    tmp_path: Path, model: str, monkeypatch, capsys
) -> None:
    out = tmp_path / "a.png"
    out.write_bytes(b"what was there")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for place in ("fastdiff.pipelines.sample_classes", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupted)
            assert run("sample", "--model", model, "--out", out, "--steps", 1, "--quiet") == 130
        assert out.read_bytes() == b"what was there"
        assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
        assert capsys.readouterr().err == "fastdiff sample: interrupted, nothing written\n"


def test_a_failure_that_is_not_an_argument(tmp_path: Path, model: str, monkeypatch, capsys) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    out = tmp_path / "a.png"
    assert run("sample", "--model", model, "--out", out, "--steps", 1, "--quiet") == 1
    assert capsys.readouterr().err == (
        "fastdiff sample: failed: [Errno 28] No space left on device\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bars_met", [True, False])
def test_evaluate_exit_code(bars_met: bool, model: str, monkeypatch, capsys) -> None:
    from fastdiff.evaluation import Report

    report = Report(1000, 0.97 if bars_met else 0.94, 0.99, 0.3, 0.25, 1.5, 2.0, 1.0, 2.0)
    monkeypatch.setattr("fastdiff.evaluation.evaluate", lambda *_, **__: report)
    assert run("evaluate", "--model", model) == (0 if bars_met else 1)
    assert ("MISS" in capsys.readouterr().out) != bars_met


def test_evaluate_without_scikit_learn(model: str, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert run("evaluate", "--model", model) == 1
    assert "pip install scikit-learn" in capsys.readouterr().err


def test_help_and_version_as_a_program(fresh_python: Callable[..., str]) -> None:
    assert "examples:" in fresh_python("-m", "fastdiff", "--help")
    for option in ("--labels", "--seed", "--guidance-scale", "--out"):
        assert option in fresh_python("-m", "fastdiff", "sample", "--help")
    assert fresh_python("-m", "fastdiff", "--version").startswith("fastdiff ")
