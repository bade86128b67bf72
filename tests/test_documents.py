"""The code in README.md and CONTRIBUTING.md runs and does what the text says."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastdiff
from fastdiff.solvers import get_schedule, make_grid, make_table

ROOT = Path(__file__).resolve().parent.parent


TINY = {"sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}  # fmt: skip


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def test_readme_example_runs():
    (code, *_) = blocks("README.md")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["x"].shape == (5, 1, 8, 8)
    assert names["x"].isfinite().all()
    one = fastdiff.sample(
        names["model"],
        cond={"y": torch.tensor([4])},
        uncond={"y": torch.tensor([10])},
        guidance_scale=1.25,
        seed=2,
    )
    # Image 2 of the batch used seed 0 + 2.
    torch.testing.assert_close(names["x"][2:3], one, rtol=0, atol=1e-4)


def test_readmes_other_examples_run(capsys):
    diffusers = pytest.importorskip("diffusers")
    _, _, own_model, denoiser, guided, pipeline, compiling = blocks("README.md")
    names: dict = {}
    exec(compile(own_model, "README.md", "exec"), names)
    assert names["latents"].shape == (2, 4, 64, 64)
    assert names["latents"].isfinite().all()
    exec(compile(denoiser, "README.md", "exec"), names)
    # The exact denoiser of unit normal data: what it draws has nearly that deviation.
    assert names["images"].shape == (4, 16)
    assert names["images"].std().item() == pytest.approx(1, abs=0.4)
    exec(compile(guided, "README.md", "exec"), names)
    assert (names["latents"][..., :32] == 0).all()
    assert names["latents"][..., 32:].isfinite().all()
    assert names["latents"][..., 32:].abs().min() > 0
    pipe = SimpleNamespace(scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear"))
    exec(compile(pipeline, "README.md", "exec"), {"pipe": pipe})
    assert isinstance(pipe.scheduler, diffusers.DPMSolverMultistepScheduler)
    assert pipe.scheduler.config.beta_schedule == "scaled_linear"
    assert type(pipe.scheduler).__module__.startswith("fastdiff")
    pipe = diffusers.DDPMPipeline(
        diffusers.UNet2DModel(**TINY), diffusers.DDPMScheduler(clip_sample=False)
    )
    exec(compile(compiling, "README.md", "exec"), {"pipe": pipe, "fastdiff": fastdiff})
    assert "scheduler: swapped" in capsys.readouterr().out


def test_contributing_solver_is_the_sde_form_of_ddpm():
    """First-order SDE-DPM-Solver++ is DDPM's posterior, another writing of the same step."""
    (code,) = blocks("CONTRIBUTING.md")
    names: dict = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    schedule = get_schedule("scaled_linear")
    grid = make_grid(schedule, 12, "leading")
    table = names["sde_dpmpp_1"](schedule, grid)
    reference = make_table("ddim", schedule, grid=grid, eta=1.0)
    for row, expected in zip(table.rows, reference.rows, strict=True):
        ours, theirs = row.updates[0], expected.updates[0]
        assert ours.from_registers == pytest.approx(theirs.from_registers, rel=1e-12, abs=1e-15)
        assert ours.from_prediction == pytest.approx(theirs.from_prediction, rel=1e-12)
        assert ours.from_noise == pytest.approx(theirs.from_noise, rel=1e-12, abs=1e-15)
    x = fastdiff.sample(lambda x, t: 0.1 * x, (2, 4, 8, 8), solver=table, seed=1)
    assert x.isfinite().all()


def test_documents_name_files_that_exist():
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text()
        paths = re.findall(r"`((?:fastdiff|kernels|csrc|tests|benchmarks|examples)/[\w./]+)`", text)
        paths = [path for path in paths if "my_op" not in path]
        assert paths
        assert not [path for path in paths if not (ROOT / path).exists()]
        for image in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
            assert (ROOT / image).exists(), image


def test_numbers_of_the_solver_page_are_what_the_command_prints():
    from fastdiff.solvers import SOLVERS, plot

    text = (ROOT / "docs" / "solvers.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| `\w+` +\| \d\.\d\de", line)]
    assert len(rows) == len(plot.SOLVERS_SHOWN)
    errors = plot.measure(evaluations=(5, 20))
    for row in rows:
        name, *cells = (cell.strip(" `") for cell in row.strip("|").split("|"))
        for cell, value in zip((cells[0], cells[4]), errors[name], strict=True):
            assert float(cell) == pytest.approx(value, rel=0.02)
    for name in SOLVERS:
        if name not in ("dpmpp_1", "dpm_1"):
            assert f"`{name.removesuffix('_sde')}" in text or f"`{name}`" in text, name
