"""``fastdiff sample``, ``img2img`` and ``inpaint`` on a tiny pipeline's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastdiff import images
from fastdiff.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def run(saved: Any) -> Any:
    """Runs a command with the tiny Stable Diffusion and returns its exit code."""

    def call(command: str, *arguments: Any, model: Any = None) -> int:
        given = ["--model", saved("sd") if model is None else model, "--quiet", "--steps", 3]
        return main([str(part) for part in (command, *given, *arguments)])

    return call


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_prompts_become_pngs_that_can_be_drawn_again(run: Any, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "a.png"
    prompts = ("--prompt", "a cat", "--prompt", "a dog")
    assert run("sample", *prompts, "--seed", 7, "--negative", "bad", "--out", out) == 0
    lines = capsys.readouterr().out.splitlines()
    paths = [tmp_path / "a-000.png", tmp_path / "a-001.png"]
    assert lines == [f"{path}: seed {7 + i}" for i, path in enumerate(paths)]
    settings = images.read_settings(paths[1])
    assert (settings["prompt"], settings["seed"], settings["steps"]) == ("a dog", 8, 3)
    again = tmp_path / "again.png"
    assert main(["sample", "--like", str(paths[1]), "--out", str(again), "--quiet"]) == 0
    assert np.abs(pixels(again) - pixels(paths[1])).max() <= 1
    assert np.abs(pixels(paths[0]) - pixels(paths[1])).max() > 5


def test_pictures_to_draw_over(run: Any, tmp_path: Path) -> None:
    start, mask = tmp_path / "in.png", tmp_path / "mask.png"
    drawn = np.random.default_rng(0).random((32, 32, 3)) * 255
    Image.fromarray(drawn.astype("uint8")).save(start)
    hole = np.zeros((32, 32), dtype="uint8")
    hole[:, 16:] = 255
    Image.fromarray(hole).save(mask)
    outs = [tmp_path / name for name in ("i.png", "p.png", "s.png")]
    common = ("--prompt", "a cat", "--seed", 1, "--image", start)
    preview = tmp_path / "preview.png"
    assert run("img2img", *common, "--out", outs[0], "--strength", 0.5, "--preview", preview) == 0
    assert run("inpaint", *common, "--mask", mask, "--out", outs[1]) == 0
    assert run("sample", "--prompt", "a cat", "--seed", 1, "--out", outs[2]) == 0
    results = [pixels(path) for path in outs]
    assert all(np.abs(results[0] - other).max() > 5 for other in results[1:])
    assert Image.open(preview).size == (16, 16)
    assert images.read_settings(outs[0])["strength"] == 0.5


def test_ctrl_c_keeps_what_is_done(
    run: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastdiff.pipelines import pipeline

    plain, calls = pipeline.sample, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr(pipeline, "sample", interrupted)
    out = tmp_path / "a.png"
    assert run("sample", "--prompt", "a", "--images", 4, "--out", out) == 130
    kept = sorted(path.name for path in tmp_path.glob("*.png"))
    assert kept == ["a-000.png", "a-001.png"]
    assert "interrupted, kept 2 of 4 pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("sample", [], "--prompt must be given"),
        ("sample", ["--prompt", "a", "--labels", "3"], "--labels must not be given"),
        ("sample", ["--prompt", "a", "--width", "33"], "width must be a multiple of 2, got 33"),
        ("sample", ["--prompt", "a", "--out", "a.jpg"], "--out"),
        ("sample", ["--prompt", "a", "--solver", "dpm"], "--solver must be one of"),
        ("sample", ["--prompt", "a", "--lora", "no.safetensors:0.5"], "no.safetensors"),
        ("sample", ["--like", "no.png"], "--like must be a PNG with fastdiff's settings"),
        ("img2img", ["--prompt", "a", "--image", "no.png"], "--image must be a picture"),
        ("img2img", ["--prompt", "a"], "--image"),
        ("inpaint", ["--prompt", "a", "--image", "no.png"], "--mask"),
        ("img2img", ["--prompt", "a", "--image", "x", "--strength", "2"], "above 0 and at most 1"),
    ],
)
def test_wrong_options_exit_with_2_and_one_line(
    command: str, arguments: list[str], message: str, run: Any, capsys: Any, tmp_path: Path
) -> None:
    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path / "a.png")]
    assert run(command, *arguments) in ((1, 2) if "no.safetensors" in message else (2,))
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.glob("a*.png"))


def test_pictures_need_a_pipeline(run: Any, capsys: Any, tmp_path: Path) -> None:
    arguments = ("--prompt", "a", "--out", tmp_path / "a.png")
    assert run("sample", *arguments, model="digits") == 2
    assert "--prompt must be for a pipeline, got a DiT" in capsys.readouterr().err
