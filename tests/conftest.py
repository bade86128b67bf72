"""Shared by all tests: a Python of its own, and GPU tests skipped, visibly, without a GPU."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch


@pytest.fixture(scope="session")
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("caches")
    return (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _own_cache(
    _caches: Iterator[Path], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test finds what another one has stored, nor what the user has; but the tests of a module
    with ``SHARED_CACHE = True`` share what they store. They are not about captures, and most of
    their time would go into capturing the same few models."""
    shared = getattr(request.module, "SHARED_CACHE", False)
    folder = request.getfixturevalue("_shared_cache") if shared else next(_caches)
    monkeypatch.setenv("FASTDIFF_CACHE", str(folder))


@pytest.fixture(scope="session")
def _shared_cache(_caches: Iterator[Path]) -> Path:
    return next(_caches)


@pytest.fixture
def fresh_python(tmp_path: Path) -> Callable[..., str]:
    """fresh_python(*arguments, **environment): runs a new Python and gives what it printed.

    It starts in an empty folder: in the repository's root, Python 3.10 would import the sources
    instead of what is installed. A non-zero exit fails the test.
    """

    def run(*arguments: str, **environment: str) -> str:
        if environment.get("TRITON_INTERPRET") == "1":
            _skip_without_interpreter()
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONSAFEPATH": "1", **environment},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def _skip_without_interpreter() -> None:
    triton = pytest.importorskip("triton")
    versions = [tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, numpy)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip("Triton 3.6's interpreter cannot run loops with NumPy 2.4 and newer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
