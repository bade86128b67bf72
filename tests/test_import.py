"""Importing fastdiff is free: no CUDA context, no Triton, nothing edited."""

from __future__ import annotations

import json
from importlib import metadata

import pytest

import fastdiff


def test_import_takes_no_cuda_context_and_no_triton(fresh_python):
    out = fresh_python(
        "-c",
        "import json, os, sys, torch\n"
        "before, environment = set(sys.modules), dict(os.environ)\n"
        "def settings():\n"
        "    return (torch.get_default_dtype(), torch.get_num_threads(),\n"
        "            torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision())\n"
        "defaults = settings()\n"
        "import fastdiff\n"
        "after = settings()\n"
        "new = set(sys.modules) - before\n"
        "print(json.dumps(dict(\n"
        "  triton=[m for m in new if m.split('.')[0] == 'triton'],\n"
        "  heavy=[m for m in new if m.split('.')[0] in ('diffusers', 'sklearn', 'PIL')],\n"
        "  inductor=[m for m in new if m.startswith('torch._inductor')],\n"
        "  initialised=torch.cuda.is_initialized(),\n"
        "  environment=environment == dict(os.environ),\n"
        "  defaults=defaults == after,\n"
        "  registered=hasattr(torch.ops.fastdiff, 'group_norm_silu'))))\n",
    )
    assert json.loads(out) == {
        "triton": [],
        "heavy": [],
        "inductor": [],
        "initialised": False,
        "environment": True,
        "defaults": True,
        "registered": True,
    }


@pytest.mark.parametrize("name", fastdiff.__all__)
def test_public_names_resolve(name):
    assert getattr(fastdiff, name) is not None
    assert name in dir(fastdiff)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'smaple'"):
        _ = fastdiff.smaple


def test_version_matches_the_distribution():
    assert metadata.version("fastdiff") == fastdiff.__version__
