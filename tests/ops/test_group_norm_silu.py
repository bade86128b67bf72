"""What is special to group_norm_silu: bad input, exact cases, equivalences, launch policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdiff.ops import group_norm_silu
from fastdiff.ops.group_norm_silu import OP, reference
from fastdiff.testing import assert_within_2x

X = torch.zeros(2, 8, 3, 3)
ROW = torch.zeros(2, 8)

BAD = [
    ((torch.zeros(2, 8, 3, dtype=torch.int32), 2), {}, TypeError, "x must be float32"),
    ((torch.zeros(8), 2), {}, ValueError, r"x must have shape \[N, C, ...\], got \(8,\)"),
    ((X, 3), {}, ValueError, "num_groups must divide the 8 channels of x, got 3"),
    ((X, 0), {}, ValueError, "num_groups must divide the 8 channels of x, got 0"),
    ((X, -2), {}, ValueError, "num_groups must divide the 8 channels of x, got -2"),
    ((X[..., :0], 2), {}, ValueError, "x must have at least one pixel, got"),
    ((X, 2, torch.zeros(4)), {}, ValueError, r"weight must have shape \(8,\), got \(4,\)"),
    ((X, 2, torch.ones(8), torch.zeros(8, 1)), {}, ValueError, r"bias must have shape \(8,\)"),
    ((X, 2, None, torch.zeros(8)), {}, ValueError, "bias must come with weight"),
    ((X, 2, torch.ones(8).double()), {}, TypeError, "weight must be torch.float32 like x"),
    (
        (X.half(), 2, torch.ones(8), torch.zeros(8).half()),
        {},
        TypeError,
        "bias must be torch.float32 like weight, got torch.float16",
    ),
    ((X, 2), {"add": torch.zeros(8)}, ValueError, r"add must have shape \(2, 8\), got \(8,\)"),
    ((X, 2), {"scale": torch.zeros(1, 8)}, ValueError, r"scale must have shape \(2, 8\)"),
    ((X, 2), {"shift": torch.zeros(2, 8, 1, 1)}, ValueError, r"shift must have shape \(2, 8\)"),
    ((X, 2), {"add": ROW.to("meta")}, ValueError, "add must be on cpu like x, got meta"),
    ((X, 2), {"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
    ((X, 2), {"eps": float("nan")}, ValueError, "eps must be positive and finite, got nan"),
    ((X, 2), {"activation": "relu"}, ValueError, "activation must be one of .* got 'relu'"),
    ((X, 2), {"impl": "cuda"}, ValueError, "impl must be 'auto' or one of"),
    ((X, 2), {"skip": X[:1]}, ValueError, r"skip must have shape \[2, C2, 3, 3\], got \(1, 8"),
    ((X, 2), {"skip": X[..., 0]}, ValueError, r"skip must have shape \[2, C2, 3, 3\]"),
    ((X, 2), {"skip": X[:, :0]}, ValueError, r"skip must have shape \[2, C2, 3, 3\]"),
    ((X, 2), {"skip": X[:, :1]}, ValueError, "num_groups must divide the 9 channels of x and skip"),
    ((X, 2), {"skip": X.half()}, TypeError, "skip must be torch.float32 like x, got torch.float16"),
    ((X, 2), {"skip": X.to("meta")}, ValueError, "skip must be on cpu like x, got meta"),
    ((X, 2, ROW[0]), {"skip": X}, ValueError, r"weight must have shape \(16,\), got \(8,\)"),
    ((X, 2), {"skip": X, "add": ROW}, ValueError, r"add must have shape \(2, 16\), got \(2, 8\)"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD)
def test_bad_input(args: Any, kwargs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        group_norm_silu(*args, **kwargs)


def test_is_the_chain_of_torch_modules() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 5, 5, generator=generator, dtype=torch.float64)
    add, scale, shift = torch.randn(3, 2, 12, generator=generator, dtype=torch.float64)
    norm = torch.nn.GroupNorm(3, 12, eps=1e-6, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight, generator=generator)
    torch.nn.init.normal_(norm.bias, generator=generator)
    weight, bias = norm.weight.detach(), norm.bias.detach()
    expected = (
        norm(x + add[..., None, None]) * (1 + scale[..., None, None]) + shift[..., None, None]
    )
    given: dict[str, Any] = {"add": add, "scale": scale, "shift": shift, "eps": 1e-6}
    result = group_norm_silu(x, 3, weight, bias, **given)
    torch.testing.assert_close(result, torch.nn.functional.silu(expected.detach()))
    plain = group_norm_silu(x, 3, weight, bias, **given, activation="none")
    torch.testing.assert_close(plain, expected.detach())


@pytest.mark.parametrize("name", [impl.name for impl in OP.implementations])
def test_constant_group_gives_the_bias(name: str) -> None:
    """x - mean is exactly 0 in our kernels, whatever the constant; torch's own are near it."""
    bias = torch.linspace(-1, 1, 8)
    for value in (0.0, 1.0, -7.25, 4096.0):
        x = torch.full((2, 8, 6, 6), value)
        if reason := OP.why_not(name, x, 2):
            pytest.skip(reason)
        result = group_norm_silu(x, 2, torch.ones(8), bias, activation="none", impl=name)
        assert torch.equal(result, bias[None, :, None, None].expand_as(result))


def test_images_do_not_depend_on_their_batch() -> None:
    x = torch.randn(3, 16, 9, 7, generator=torch.Generator().manual_seed(1))
    together = group_norm_silu(x, 4)
    alone = torch.cat([group_norm_silu(image[None], 4) for image in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("name", [impl.name for impl in OP.implementations])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("sizes", [(24, 8, 5), (1, 31, 7), (31, 1, 64), (20, 12, 1)], ids=str)
def test_a_skip_is_joined_in_the_way(
    sizes: tuple[int, int, int], channels_last: bool, name: str
) -> None:
    """group_norm_silu(x, skip=skip) is group_norm_silu(cat([x, skip], 1)), and as precise."""
    of_x, of_skip, side = sizes
    generator = torch.Generator().manual_seed(2)
    both = torch.randn(2, of_x + of_skip, side, side + 2, generator=generator)
    both[:, of_x:] += 100  # the parts of a group that straddles them are far apart
    if channels_last:
        both = both.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, of_x + of_skip, generator=generator)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, skip = (
        part.contiguous(memory_format=memory_format) for part in both.split([of_x, of_skip], 1)
    )
    if reason := OP.why_not(name, x, 4, weight, bias, skip=skip):
        pytest.skip(reason)
    result = group_norm_silu(x, 4, weight, bias, skip=skip, impl=name)
    assert result.shape == both.shape
    oracle = reference(both.double(), 4, weight.double(), bias.double())
    assert_within_2x(result, oracle, reference(both, 4, weight, bias))


def test_the_result_of_a_skip_lies_like_x() -> None:
    last = torch.randn(2, 8, 3, 5).contiguous(memory_format=torch.channels_last)
    first = torch.randn(2, 4, 3, 5)
    one = torch.randn(2, 1, 3, 5)  # its two layouts are the same memory
    for name in ("auto", "reference"):
        assert group_norm_silu(last, 3, skip=last[:, :1], impl=name).is_contiguous()
        for x, skip in ((last, one), (one, last)):
            result = group_norm_silu(x, 3, skip=skip, impl=name)
            assert result.is_contiguous(memory_format=torch.channels_last)
        assert group_norm_silu(first, 5, skip=one, impl=name).is_contiguous()
        assert group_norm_silu(last, 3, skip=first, impl=name).is_contiguous()


def test_the_tuning_table_knows_a_skip() -> None:
    assert OP.tuning is not None
    x, skip = torch.zeros(2, 24, 4, 4), torch.zeros(2, 8, 4, 4)
    whole = OP.tuning.key(torch.cat([x, skip], 1), 4)
    for call in (((x, 4), {"skip": skip}), ((x, 4, *[None] * 5, 1e-5, "silu", skip), {})):
        key = OP.tuning.key(*call[0], **call[1])
        assert key.sizes == whole.sizes
        assert dict(key.exact) == {**dict(whole.exact), "skip": 8}
    call = OP.tuning.example((2, 32, 4, 4), groups=4, skip=8).make("cpu", torch.float32)
    assert OP.tuning.key(*call.args, **call.kwargs) == key
    for shape, channels in (((2, 8, 3), 8), ((5,), 0)):
        with pytest.raises(ValueError, match="shape must be"):
            OP.tuning.example(shape, skip=channels)


@pytest.mark.parametrize("second", ["", "skip", "residual"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_launch_policy_covers_every_shape(channels_last: bool, second: str) -> None:
    """select() returns only what is compiled ahead of time, and its parts cover the image."""
    kernels = pytest.importorskip("fastdiff.kernels.group_norm_silu", exc_type=ImportError)
    from fastdiff.kernels import _group_norm as shared
    from fastdiff.kernels import _group_norm_policy as policy
    from fastdiff.kernels import add_group_norm_silu as adding

    groups_compiled = set()
    blocks_compiled = set()
    for config in (*kernels.aot_configs(), *adding.aot_configs()):
        constants, warps = config["constexprs"], config["options"]["num_warps"]
        known = bool(config["multiples_of_16"])
        residual = constants.get("HAS_RESIDUAL", False)
        kind = "skip" if constants.get("HAS_SKIP") else "residual" if residual else ""
        if config["kernel"] is shared._group_kernel and constants["IS_NHWC"] == channels_last:
            tile = (constants["BLOCK_C"], constants["BLOCK_HW"], warps, constants["ALIGN"])
            if kind == second:
                groups_compiled.add((known, *tile))
        stats = shared._stats_last_kernel if channels_last else shared._stats_kernel
        if config["kernel"] is stats and residual == (second == "residual"):
            block = constants["BLOCK_HW" if channels_last else "BLOCK"]
            blocks_compiled.add((known, block, warps))
    kinds = set()
    for batch in (0, 1, 2, 16):
        for channels, groups in (
            *((32, 32), (96, 32), (128, 32), (320, 32), (1920, 32), (2560, 32)),
            *((6, 1), (100, 5), (4096, 1)),
        ):
            for pixels in (1, 7, 64, 1000, 4096, 4097, 262144, 2**24, 2**24 + 1):
                first = {"skip": channels * 2 // 3}.get(second, channels)
                plan = kernels.select(
                    *(batch, channels, pixels, groups, torch.bfloat16, channels_last, 90),
                    second=second,
                    first=first,
                )
                width = channels // groups
                kinds.add(plan.kind)
                if plan.kind == "group":
                    # What is compiled without a fact about the sizes holds with it.
                    known = pixels % 16 == 0 if not channels_last else plan.align > 1
                    tile = (plan.block_c, plan.block_hw, plan.num_warps, plan.align)
                    assert (known, *tile) in groups_compiled
                    assert plan.align == 1 or (channels % 16 == 0 and first % 16 == 0)
                    assert plan.block_c >= width
                    assert plan.block_hw >= pixels
                    assert width % plan.align == 0
                    continue
                known = channels_last or pixels % 16 == 0
                assert (known, plan.block_hw, plan.stats_warps) in blocks_compiled
                assert (plan.splits - 1) * plan.span < pixels <= plan.splits * plan.span
                if not channels_last:
                    assert plan.splits * width <= max(width, policy.MAX_PARTS)
                assert plan.span % plan.block_hw == 0
    assert kinds == {"group", "split"}


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(9, 64, 2048, 2048), (2**15 + 1, 1024, 8, 8)], ids=str)
def test_more_elements_than_int32_counts(shape: tuple[int, ...], channels_last: bool) -> None:
    """The last image is 4.3 GB from the first; the shapes take both ways through the policy."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=memory_format)
    assert x.numel() > 2**31
    x.normal_(mean=1.0)
    result = group_norm_silu(x, 32, impl="triton")
    last = x[-1:]
    oracle = reference(last.double(), 32)
    assert_within_2x(result[-1:], oracle, reference(last, 32))


def test_compiles_with_symbolic_shapes() -> None:
    compiled = torch.compile(
        lambda x, add: group_norm_silu(x, 4, add=add) + 1,
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for batch, size in ((2, 5), (3, 8), (7, 6)):
        x, add = torch.randn(batch, 8, size, size), torch.randn(batch, 8)
        assert torch.equal(compiled(x, add), group_norm_silu(x, 4, add=add) + 1)
