"""The table of tuned launches: looking up, and a file that others write, break or lock."""

from __future__ import annotations

import json
import multiprocessing
import warnings
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch

from fastdiff import environment, tuning
from fastdiff.tuning import Key

CPU = torch.device("cpu")
KEY = Key(CPU, torch.bfloat16, (("N", 2), ("HW", 4000)), (("groups", 32),))
CANDIDATES = [({"block": 512}, "select's"), ({"block": 1024}, "the other")]


def write_many(name: str, barrier: Barrier) -> None:
    """One writer: 25 entries, one at a time, from the moment all are ready."""
    barrier.wait()
    for number in range(25):
        tuning.save("op", {f"{name} {number}": {"choice": {"block": number}}})


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder; its table's path."""
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    tuning.reload()
    yield tmp_path / "cache" / "tuning.json"
    tuning.reload()


def planned(key: Key = KEY) -> str | None:
    return tuning.plan("op", key, lambda: CANDIDATES)


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    tuning.reload()


def test_without_a_file_nothing_is_tuned_and_nothing_is_made(table: Path) -> None:
    assert not tuning.active()
    assert tuning.lookup("op", KEY) is None
    assert planned() is None
    assert not table.parent.exists()


def test_the_file_is_looked_for_once(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    monkeypatch.setattr(tuning, "read", lambda path: reads.append(path) or {})
    for _ in range(3):
        tuning.active()
        tuning.lookup("op", KEY)
    assert reads == [table]


def test_what_was_saved_is_found(table: Path) -> None:
    assert tuning.save("op", {KEY.text(): {"choice": {"block": 1024}, "us": 7.5}}) == table
    assert tuning.active()
    assert tuning.lookup("op", KEY) == {"block": 1024}
    assert planned() == "the other"
    assert tuning.lookup("another op", KEY) is None
    content = json.loads(table.read_text())
    assert content["version"] == tuning.VERSION
    assert content["entries"]["op"][KEY.text()]["us"] == 7.5
    assert [path.name for path in table.parent.iterdir() if path.suffix != ".lock"] == [table.name]


def test_the_key_has_device_arch_dtype_and_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    assert KEY.text() == "cpu | sm_0 | bfloat16 | N<=2 HW<=4096 groups=32"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    tuning._device.cache_clear()
    key = KEY._replace(device=torch.device("cuda", 7), dtype=torch.float32)
    assert key.text() == "NVIDIA H200 | sm_90 | float32 | N<=2 HW<=4096 groups=32"
    tuning._device.cache_clear()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"sizes": (("N", 2), ("HW", 4096))}, True),
        ({"sizes": (("N", 2), ("HW", 2049))}, True),
        ({"sizes": (("N", 2), ("HW", 2048))}, False),
        ({"sizes": (("N", 2), ("HW", 4097))}, False),
        ({"sizes": (("N", 1), ("HW", 4000))}, False),
        ({"exact": (("groups", 31),)}, False),
        ({"dtype": torch.float16}, False),
        ({"device": torch.device("meta")}, False),
    ],
)
def test_a_bucket_ends_at_powers_of_two(change: dict, found: bool) -> None:
    tuning.save("op", {KEY.text(): {"choice": {"block": 1024}}})
    assert (planned(KEY._replace(**change)) is not None) == found


@pytest.mark.parametrize(
    "choice", [{"block": 1000}, {"block": "1024"}, {"block": 1024, "warps": 4}, {}]
)
def test_a_choice_that_is_no_candidate_is_not_executed(choice: dict) -> None:
    tuning.save("op", {KEY.text(): {"choice": choice}})
    assert tuning.lookup("op", KEY) == choice
    assert planned() is None


def test_a_plan_is_made_once_for_a_shape() -> None:
    tuning.save("op", {KEY.text(): {"choice": {"block": 1024}}})
    asked = []
    for size in (4000, 4000, 4001, 4000):
        key = KEY._replace(sizes=(("N", 2), ("HW", size)))
        assert tuning.plan("op", key, lambda size=size: asked.append(size) or CANDIDATES)
    assert asked == [4000, 4001]


def test_forced_choices_come_first_and_go_again() -> None:
    tuning.save("op", {KEY.text(): {"choice": {"block": 1024}}})
    assert planned() == "the other"
    with tuning.forced("op", {"block": 512}):
        assert planned() == "select's"
        with tuning.forced("op", {"block": 1}):
            assert planned() is None
        assert planned() == "select's"
    assert planned() == "the other"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot be read"),
        ('{"version": 1, "entries": {"op"', "cannot be read"),
        ("[1, 2]", "is not a tuning table"),
        ('{"entries": {}}', "is not a tuning table"),
        ('{"version": "1", "entries": {}}', "is not a tuning table"),
        ('{"version": 1}', "has entries that are none"),
        ('{"version": 1, "entries": []}', "has entries that are none"),
        ('{"version": 1, "entries": {"op": {"key": {"us": 1}}}}', "has entries that are none"),
        ('{"version": 1, "entries": {"op": {"key": {"choice": 3}}}}', "has entries that are none"),
        ('{"version": 2, "entries": {}}', "has version 2, this fastdiff reads 1"),
        ("\x00\x01\ufffd", "cannot be read"),
    ],
)
def test_a_file_that_is_no_table_is_ignored_with_one_warning(
    table: Path, text: str, reason: str
) -> None:
    put(table, text)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert not tuning.active()
            assert tuning.lookup("op", KEY) is None
    assert len(caught) == 1
    assert reason in str(caught[0].message)
    assert caught[0].category is RuntimeWarning
    assert str(table) in str(caught[0].message)
    assert table.read_text() == text


def test_bytes_that_are_no_text_are_ignored(table: Path) -> None:
    table.parent.mkdir()
    table.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        assert not tuning.active()


def test_a_folder_in_the_files_place_is_ignored(table: Path) -> None:
    table.mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        assert not tuning.active()


def test_a_corrupted_file_is_written_anew_and_said_so(table: Path) -> None:
    put(table, "garbage")
    with pytest.warns(RuntimeWarning, match="the table is written anew: .* cannot be read"):
        tuning.save("op", {KEY.text(): {"choice": {"block": 512}}})
    assert planned() == "select's"


def test_a_newer_file_is_never_overwritten(table: Path) -> None:
    text = '{"version": 2, "entries": {"op": "in some new form"}}'
    put(table, text)
    for write in (lambda: tuning.save("op", {"k": {"choice": {}}}), tuning.check_writable):
        with pytest.raises(tuning.TableError, match="has version 2"):
            write()
    assert table.read_text() == text
    assert not list(table.parent.glob(".tuning*"))


def test_saving_keeps_other_entries_and_replaces_its_own() -> None:
    tuning.save("a", {"1": {"choice": {"x": 1}}, "2": {"choice": {"x": 2}}})
    tuning.save("b", {"1": {"choice": {"x": 3}}})
    tuning.save("a", {"2": {"choice": {"x": 4}}})
    entries = tuning.read(tuning.table_path())
    found = {op: {key: e["choice"]["x"] for key, e in keys.items()} for op, keys in entries.items()}
    assert found == {"a": {"1": 1, "2": 4}, "b": {"1": 3}}


def test_an_entry_without_a_choice_is_refused(table: Path) -> None:
    with pytest.raises(ValueError, match="measured must hold a choice"):
        tuning.save("op", {"key": {"us": 3.0}})
    assert not table.exists()


def test_concurrent_writers_lose_nothing(table: Path) -> None:
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(4)
    writers = [fork.Process(target=write_many, args=(name, barrier)) for name in "wxyz"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=120)
    assert [writer.exitcode for writer in writers] == [0] * 4
    entries = tuning.read(table)["op"]
    assert len(entries) == 100
    assert entries["y 7"]["choice"] == {"block": 7}
    assert sorted(path.name for path in table.parent.iterdir()) == ["tuning.json", "tuning.lock"]


def test_a_write_that_fails_leaves_the_old_table(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning.save("op", {"1": {"choice": {"x": 1}}})
    before = table.read_text()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tuning.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tuning.save("op", {"2": {"choice": {"x": 2}}})
    assert table.read_text() == before
    assert sorted(path.name for path in table.parent.iterdir()) == ["tuning.json", "tuning.lock"]


def test_where_locks_do_not_work_it_says_so_and_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def fail(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.warns(RuntimeWarning, match="cannot be locked"):
        tuning.save("op", {KEY.text(): {"choice": {"block": 512}}})
    assert planned() == "select's"


def test_a_folder_that_cannot_be_made_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_CACHE", "/dev/null/cache")
    tuning.reload()
    with pytest.raises(OSError, match="/dev/null/cache"):
        tuning.check_writable()
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        assert not tuning.active()


def test_a_user_without_a_home_runs_and_is_told_when_saving(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FASTDIFF_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert not tuning.active()
    with pytest.raises(OSError, match="FASTDIFF_CACHE must name a folder"):
        tuning.save("op", {KEY.text(): {"choice": {"block": 512}}})


def test_check_writable_leaves_no_table(table: Path) -> None:
    assert tuning.check_writable() == table
    assert [path.name for path in table.parent.iterdir()] == ["tuning.lock"]


@pytest.mark.parametrize(
    ("own", "user", "expected"),
    [
        ("/a/b", "/c", "/a/b"),
        ("~/b", "", "{home}/b"),
        ("", "/c", "/c/fastdiff"),
        ("", "", "{home}/.cache/fastdiff"),
        ("", "relative", "{home}/.cache/fastdiff"),
    ],
)
def test_the_cache_folder(
    own: str, user: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("FASTDIFF_CACHE", own)
    monkeypatch.setenv("XDG_CACHE_HOME", user)
    assert str(environment.cache_folder()) == expected.format(home="/home/someone")


def test_ops_without_a_gpu_never_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a Triton launch asks: import and the CPU's implementations read no file."""
    from fastdiff.ops import group_norm_silu

    def refuse(path: Path) -> None:
        raise AssertionError(path)

    monkeypatch.setattr(tuning, "read", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group_norm_silu(torch.ones(1, 4, 2, 2), 2)
