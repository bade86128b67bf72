"""The CPU kernel of attention at every instruction set level.

The extension reads FASTDIFF_ISA_MAX once, so each level is a process of its own: this file run as a
program checks every case at the level it finds itself at.
"""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff._ext import ext, require_ext
from fastdiff.ops.attention import OP
from fastdiff.testing import assert_within_2x, poisoned_empty

Tensor = torch.Tensor
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def judge(what: str, *args: Tensor, threads: int = 1, **kwargs: Any) -> None:
    """Against float64, by twice the reference's error in the same dtype."""

    def double(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    oracle = OP.reference(*map(double, args), **{k: double(v) for k, v in kwargs.items()})
    expected = OP.reference(*args, **kwargs)
    torch.set_num_threads(threads)
    with poisoned_empty():
        result = OP(*args, **kwargs, impl="cpp")
    torch.set_num_threads(1)
    for mine, right, theirs in zip(result, oracle, expected, strict=True):
        assert_within_2x(mine, right, theirs, what)


def check_head_dimensions() -> int:
    """Every multiple of 8, and some that no instruction likes."""
    widths = [*range(8, 257, 8), 1, 2, 3, 7, 9, 15, 17, 33, 300]
    for width in widths:
        for dtype in DTYPES if width in (7, 40, 160) else DTYPES[:1]:
            q, k, v = (random(1, n, 2, width, seed=n, dtype=dtype) for n in (21, 67, 67))
            judge(f"width {width} {dtype}", q, k, v, return_lse=width % 16 == 8)
    return len(widths)


def check_counts() -> int:
    """Blocks of 64 queries and of 64 keys, tiles of 6 and vectors of 16: full, missed, exceeded."""
    queries, keys = (1, 2, 15, 16, 17, 33, 63, 64, 65, 130), (1, 2, 3, 5, 63, 64, 65, 77, 128, 131)
    for n in queries:
        for m in keys:
            judge(
                f"{n} by {m}", random(1, n, 1, 16), *(random(1, m, 1, 16, seed=s) for s in (1, 2))
            )
    for n in (17, 64):
        for m in (1, 77, 130):
            q, k, v = (random(2, c, 3, 24, seed=c, dtype=torch.float32) for c in (n, m, m))
            judge(f"{n} by {m}, fp32", q, k, v, return_lse=True)
    return len(queries) * len(keys) + 6


def check_strides() -> int:
    """Heads as views of a fused projection, before or after one another; broadcast keys."""
    for dtype in DTYPES:
        fused = random(2, 70, 3, 3, 40, dtype=dtype)
        judge(f"[S, 3, H, D] {dtype}", *fused.unbind(2))
        judge(f"[S, H, 3, D] {dtype}", *fused.unbind(3))
        judge(f"[3, B, S, H, D] {dtype}", *random(3, 2, 70, 3, 40, dtype=dtype).unbind(0))
        judge(f"[H, S] {dtype}", *(random(2, 3, 70, 40, dtype=dtype).transpose(1, 2),) * 3)
        wide = random(2, 70, 3, 41, dtype=dtype)[..., 1:]
        judge(f"odd rows {dtype}", wide, wide, wide)
        one = random(1, 70, 1, 40, dtype=dtype).expand(2, 70, 3, 40)
        judge(f"expanded {dtype}", fused[:, :, 0], one, one)
    return 18


def check_masks() -> int:
    count = 0
    for dtype in DTYPES[::2]:
        q, k, v = (random(4, n, 2, 40, seed=s, dtype=dtype) for s, n in enumerate((70, 131, 131)))
        mask = torch.rand(4, 131, generator=torch.Generator().manual_seed(1)) > 0.6
        mask[1], mask[2, 1:] = False, False
        lengths = torch.tensor([131, 0, 65, 64], dtype=torch.int32)
        extra = {f"extra_{n}": random(4, 19, 2, 40, seed=9 + i, dtype=dtype)
                 for i, n in enumerate("qkv")}  # fmt: skip
        both = torch.cat([mask, torch.ones(4, 19, dtype=torch.bool)], 1)
        extra_lengths = torch.tensor([0, 0, 19, 7])
        for lse in (False, True):
            judge("mask", q, k, v, key_mask=mask, return_lse=lse)
            judge("lengths", q, k, v, key_lengths=lengths, return_lse=lse)
            judge("two segments", q, k, v, **extra, return_lse=lse)
            judge("second mask", q, k, v, **extra, key_mask=both, extra_key_lengths=extra_lengths,
                  key_lengths=lengths, return_lse=lse)  # fmt: skip
            del_q = {n: t for n, t in extra.items() if n != "extra_q"}
            judge("keys only", q, k, v, **del_q, return_lse=lse)
            count += 5
        dead = OP(q, k, v, key_mask=mask, return_lse=True, impl="cpp")
        assert torch.equal(dead[0][1], torch.zeros_like(dead[0][1]))
        assert bool((dead[2][1] == -math.inf).all())
        # What is masked is not read, so it may be anything.
        k[:, 5], v[:, 5] = math.nan, math.inf
        mask[:, 5] = False
        assert bool(OP(q, k, v, key_mask=mask, impl="cpp")[0].isfinite().all())
    return count


def check_growing_scores() -> int:
    """Maxima that grow with every block, more and less than what is rescaled for."""
    for dtype in DTYPES:
        for step in (0.02, 0.3, 3.0):
            q, v = torch.ones(1, 70, 1, 8, dtype=dtype), random(1, 400, 1, 8, dtype=dtype)
            k = (torch.arange(400.0)[None, :, None, None] * step).repeat(1, 1, 1, 8).to(dtype)
            judge(f"growing by {step}", q, k, v, return_lse=True)
            judge(f"falling by {step}", q, k.flip(1), v, return_lse=True)
            judge(f"negative, {step}", q, -k - 30, v, return_lse=True)
            judge(
                f"some queries {step}", q * torch.linspace(-1, 1, 70)[:, None, None].to(dtype), k, v
            )
    return 36


def check_special_values() -> int:
    """NaN and infinite scores and values land where the reference has them."""
    count = 0
    for dtype in DTYPES:
        for at in (0, 63, 64, 79):
            for value in (math.nan, math.inf, -math.inf):
                for where in range(3):
                    given = [random(1, 80, 1, 16, seed=s, dtype=dtype).abs() for s in range(3)]
                    given[where][0, at, 0, 3] = value
                    expected = OP.reference(*given, return_lse=True)
                    result = OP(*given, return_lse=True, impl="cpp")
                    for mine, theirs in zip(result, expected, strict=True):
                        what = f"{dtype} {value} at {at} of argument {where}"
                        assert torch.equal(mine.isnan(), theirs.isnan()), what
                        infinite = theirs.isinf()
                        assert torch.equal(mine[infinite], theirs[infinite]), what
                        assert torch.equal(mine.isinf(), infinite), what
                    count += 1
        # Every score is -inf, then every one but those of the last block.
        q = torch.ones(1, 20, 1, 8, dtype=dtype)
        k = torch.full((1, 80, 1, 8), -math.inf, dtype=dtype)
        out, _, lse = OP(q, k, q[:, :1].expand_as(k), return_lse=True, impl="cpp")
        assert bool(out.isnan().all())
        assert bool((lse == -math.inf).all())
        k[:, 70:] = -100.0
        judge("late keys", q, k.nan_to_num(neginf=-3e4), random(1, 80, 1, 8, dtype=dtype))
        v = random(1, 80, 1, 8, dtype=dtype)
        late = OP(q, k, v, impl="cpp")[0]
        assert_within_2x(late, *(OP.reference(*(x.to(d) for x in (q, k, v)))[0].to(d)
                                 for d in (torch.float64, dtype)))  # fmt: skip
        large = torch.finfo(dtype).max
        judge("largest values", q, q.expand(1, 20, 1, 8), torch.full_like(q, large / 64))
        count += 3
    return count


def check_scales() -> int:
    q, k, v = (random(1, 70, 2, 16, seed=s, dtype=torch.float32) for s in range(3))
    for scale in (1e-30, 1e-3, 1.0, 30.0, 1e30):
        judge(f"scale {scale}", q, k, v, scale=scale)
        judge(f"scale {scale}", q.bfloat16(), k.bfloat16(), v.bfloat16(), scale=scale)
    return 10


def check_threads() -> int:
    """However the work is split, the bits are the same, and so with two callers at once."""
    cases = []
    for batch, heads, n, m in ((2, 8, 64, 64), (1, 1, 700, 300), (1, 3, 130, 200), (1, 2, 1, 700)):
        for dtype in (torch.bfloat16, torch.float32):
            q, k, v = (random(batch, c, heads, 40, seed=c, dtype=dtype) for c in (n, m, m))
            results = []
            for threads in (1, 2, 5):
                judge(f"{threads} threads", q, k, v, threads=threads)
                torch.set_num_threads(threads)
                results.append(OP(q, k, v, impl="cpp")[0])
            torch.set_num_threads(2)
            assert all(torch.equal(results[0], other) for other in results)
            cases.append(((q, k, v), results[0]))
    wrong = []

    def repeat() -> None:
        torch.set_num_threads(2)
        for _ in range(5):
            for given, right in cases:
                if not torch.equal(OP(*given, impl="cpp")[0], right):
                    wrong.append(given[0].shape)

    callers = [threading.Thread(target=repeat) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong, wrong
    torch.set_num_threads(1)
    return 2 * len(cases)


def check_empty() -> int:
    for shape in ((0, 5, 2, 8), (2, 0, 2, 8)):
        q = torch.zeros(shape, dtype=torch.bfloat16)
        k = torch.zeros(shape[0], 7, 2, 8, dtype=torch.bfloat16)
        out, _, lse = OP(q, k, k, return_lse=True, impl="cpp")
        assert out.shape == q.shape
        assert lse.shape == (shape[0], 2, shape[1])
    return 2


def run_all() -> None:
    torch.set_num_threads(1)
    checks = (check_head_dimensions, check_counts, check_strides, check_masks, check_scales)
    checks = (*checks, check_growing_scores, check_special_values, check_threads, check_empty)
    total = sum(check() for check in checks)
    print(f"level {require_ext().attention_level()}: {total} cases")


@pytest.mark.skipif(ext() is None, reason="needs the extension")
@pytest.mark.parametrize("level", [0, 1, 2, 3, 4])
def test_kernel_at_level(level: int, fresh_python: Callable[..., str]) -> None:
    code = "from fastdiff._ext import require_ext; print(require_ext().attention_level())"
    most = int(fresh_python("-c", code, FASTDIFF_ISA_MAX="4"))
    if level > most:
        pytest.skip(f"the processor has level {most} only")
    printed = fresh_python(str(Path(__file__).resolve()), FASTDIFF_ISA_MAX=str(level))
    assert f"level {level}:" in printed


@pytest.mark.skipif(ext() is None, reason="needs the extension")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 3}, "dtype must be 0"),
        ({"width": 0}, r"width must be in 1\.\.1024, got 0"),
        ({"width": 1025}, r"width must be in 1\.\.1024, got 1025"),
        ({"scale": 0.0}, "scale must be positive and finite, got 0"),
        ({"scale": math.nan}, "scale must be positive and finite, got nan"),
        ({"keys": -1}, "sizes must be 0 or more"),
        ({"extra_keys": 3}, "tensors with tokens must have a pointer, got 0"),
    ],
)
def test_nonsense_is_refused(change: dict[str, Any], message: str) -> None:
    x = torch.zeros(1, 4, 1, 8)
    rows = [[x.data_ptr(), *x.stride()[:3]]] * 4 + [[0] * 4] * 4
    sizes = dict.fromkeys(("extra_queries", "extra_keys", "valid", "lse", "dtype"), 0)
    sizes |= {"queries": 4, "keys": 4, "batch": 1, "heads": 1, "width": 8, "threads": 1}
    with pytest.raises(ValueError, match=message):
        require_ext().attention(**{"tensors": rows, "scale": 1.0, **sizes, **change})


@pytest.mark.skipif(
    sys.platform != "linux", reason="sanitizers as GCC and clang have them on Linux"
)
def test_tiles_emulated_under_sanitizers(tmp_path: Path) -> None:
    """The code for AMX with its instructions in plain C++, every access and every shape checked."""
    from drivers import ROOT, build  # not where this file is a program

    if ext() is None or require_ext().attention_level() < 3:
        pytest.skip("needs a processor with AVX512_BF16")
    program = tmp_path / "attention_driver"
    errors = build(
        program,
        "isa_amx",
        "tests/csrc/attention_driver.cpp",
        options=(
            *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
            f'-DFASTDIFF_TILE_INSTRUCTIONS="{ROOT}/tests/csrc/amx_emulated.h"',
        ),
    )
    if "sanitize" in errors or "asan" in errors:
        pytest.skip("the compiler has no sanitizers here")
    assert errors == ""
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "702 cases, 0 wrong" in done.stdout


if __name__ == "__main__":
    run_all()
