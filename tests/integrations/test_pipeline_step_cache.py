"""fastdiff.compile(pipe, cache=...): the denoiser's steps in part; every call begins whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from test_pipeline import denoiser
from tiny_pipelines import draw, made

import fastdiff
from fastdiff.compiler import step_cache
from fastdiff.testing import psnr

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
]


def facts(module: Any) -> dict[str, Any]:
    (graph,) = fastdiff.report(module).graphs
    return graph.cache


# PLMS asks twice at its second time: the steps after that are whole until the time moves on.
PLMS = {step_cache.BEGINS: 1, step_cache.TWICE: 2, step_cache.INTERVAL: 1, step_cache.LAST: 1}


@pytest.mark.parametrize(
    ("name", "cache", "whole", "part"),
    [
        ("sd", {"kind": "deepcache", "interval": 2, "last": 1}, PLMS, 2),
        ("sd_controlnet", {"kind": "deepcache", "interval": 2, "last": 1}, PLMS, 2),
        (
            "flux",
            {"kind": "first_block", "threshold": 1e6, "last": 1},
            {step_cache.BEGINS: 1, step_cache.LAST: 1},
            4,
        ),
    ],
)
def test_every_call_of_a_pipeline_is_a_run(name, cache, whole, part):
    pipe, call = made(name)
    arguments = {**call(), "num_inference_steps": 6}
    right = draw(pipe, arguments)
    fastdiff.compile(pipe, cache=cache)
    first = draw(pipe, arguments)
    found = facts(denoiser(pipe))
    assert (found["whole"], found["part"]) == (whole, part)
    assert psnr(first, right) < 120  # in part, indeed
    assert torch.equal(draw(pipe, arguments), first)
    again = facts(denoiser(pipe))
    assert again["whole"] == {why: 2 * count for why, count in found["whole"].items()}
    assert again["part"] == 2 * found["part"]
    text = str(fastdiff.report(pipe))
    assert f"{cache['kind']}: {2 * sum(found['whole'].values())} steps whole" in text
    if name == "sd_controlnet":
        assert "looks for a concatenation" in facts(pipe.controlnet)["why_not"]
    for half in (pipe.vae.encoder, pipe.vae.decoder):
        assert fastdiff.report(half).cache == ""
