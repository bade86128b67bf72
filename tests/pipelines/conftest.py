from __future__ import annotations

from pathlib import Path
from typing import Any

import folders
import pytest

import fastdiff


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a tiny pipeline by the name of its function in ``folders``, made once."""
    made: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in made:
            pipe = getattr(folders, name)()
            made[name] = folders.saved(pipe, tmp_path_factory.mktemp("pipelines") / name)
        return made[name]

    return save


@pytest.fixture
def loaded(saved: Any) -> Any:
    """``fastdiff.load`` of such a folder."""
    return lambda name: fastdiff.load(saved(name))
