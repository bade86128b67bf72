"""The solver step beyond its conformance: every twin has the reference's bits, in place too."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rows import expected, random_case, run_cpp, run_cuda, run_triton, same_bits

import fastdiff
from fastdiff._ext import ext
from fastdiff.ops._contract import Example
from fastdiff.ops.solver_step import OP, solver_step
from fastdiff.solvers import make_table, scaled_linear
from fastdiff.solvers.engine import run, run_reference
from fastdiff.solvers.noise import PhiloxNoise

Tensor = torch.Tensor
needs_ext = pytest.mark.skipif(ext() is None, reason="needs the extension")
needs_cuda_ext = pytest.mark.skipif(
    not hasattr(ext(), "cuda_solver_step"), reason="the extension was built without CUDA"
)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CASES = 60


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", OP.samples, ids=lambda sample: sample.name)
def test_every_implementation_has_the_references_bits(
    sample: Example, dtype: torch.dtype, device: str
) -> None:
    call = sample.make(device, dtype)
    cpu = sample.make("cpu", dtype)
    exact = OP.reference(*cpu.args, **cpu.kwargs)
    for impl in OP.implementation_names():
        if OP.why_not(impl, *call.args, **call.kwargs):
            continue
        result = OP(*call.args, **call.kwargs, impl=impl)
        assert same_bits([result.cpu()], [exact]), impl


@needs_ext
@pytest.mark.parametrize("number", range(CASES))
def test_rows_in_place(number: int) -> None:
    case = random_case(number)
    assert same_bits(run_cpp(case), expected(case))


LEVELS = """
import sys
sys.path.insert(0, sys.argv[1])
from rows import expected, random_case, run_cpp, same_bits
from fastdiff._ext import ext
numbers = range(int(sys.argv[2]))
wrong = [n for n in numbers if not same_bits(run_cpp(random_case(n)), expected(random_case(n)))]
print(ext().isa_level(), wrong)
"""


@needs_ext
def test_every_instruction_set_level_has_the_same_bits(fresh_python: Callable[..., str]) -> None:
    for level in range(ext().isa_level() + 1):
        arguments = ("-c", LEVELS, str(Path(__file__).parent), str(CASES))
        printed = fresh_python(*arguments, FASTDIFF_ISA_MAX=str(level))
        assert printed.strip() == f"{level} []"


@pytest.mark.interpret
@pytest.mark.slow
def test_triton_in_the_interpreter(fresh_python: Callable[..., str]) -> None:
    pytest.importorskip("triton")
    program = Path(__file__).with_name("rows.py")
    fresh_python(str(program), str(CASES), TRITON_INTERPRET="1")


@needs_ext
def test_threads_do_not_change_the_result() -> None:
    """Half a million elements: enough for several ranges; the last image ends inside a block."""
    shape = (3, 5, 179, 191)
    state, output = torch.randn(2, *shape), torch.randn(shape)
    row = {
        "coefficients": [0.8, -0.1, 0.3, 0.2],
        "from_state": 2.4,
        "from_output": -2.2,
        "seeds": [1, 2, 3],
    }
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(solver_step(state, output, impl="cpp", **row))
    torch.set_num_threads(before)
    exact = solver_step(state, output, impl="reference", **row)
    assert all(same_bits([result], [exact]) for result in results)


@needs_ext
def test_memory_order_does_not_change_the_noise() -> None:
    """More channels than a block of the kernel holds, and fewer pixels than a Philox counter."""
    for shape in [(2, 4, 64, 64), (3, 3, 5, 7), (2, 600, 3, 3), (1, 1030, 2, 1)]:
        state = torch.zeros(1, *shape)
        last = state[0].contiguous(memory_format=torch.channels_last)[None]
        output = torch.zeros(shape).contiguous(memory_format=torch.channels_last)
        seeds = list(range(shape[0]))
        first = solver_step(state, state[0], [0.0, 0.0, 1.0], seeds=seeds, draw=5, impl="cpp")
        second = solver_step(last, output, [0.0, 0.0, 1.0], seeds=seeds, draw=5, impl="cpp")
        assert second[0].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(first, second), shape


def test_a_draw_is_not_the_neighbours() -> None:
    state = torch.zeros(1, 2, 8)
    results = [
        solver_step(state, state[0], [0.0, 0.0, 1.0], seeds=seeds, draw=draw)
        for seeds, draw in (([1, 2], 0), ([1, 2], 1), ([3, 2], 0), ([1, 2], 2**32 - 1))
    ]
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[3])
    assert torch.equal(results[0][0, 1], results[2][0, 1])  # the second image has the same seed
    assert not torch.equal(results[0][0, 0], results[2][0, 0])


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        ({"registers": torch.zeros(1, 2, 3, dtype=torch.float16)}, TypeError, "registers must be"),
        ({"registers": torch.zeros(9, 2, 3)}, ValueError, "registers must have shape"),
        ({"registers": torch.zeros(3)}, ValueError, "registers must have shape"),
        ({"output": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "output must be float32"),
        ({"output": torch.zeros(2, 4)}, ValueError, r"output must have shape \(2, 3\), got"),
        ({"uncond": torch.zeros(2, 4)}, ValueError, "uncond must have shape"),
        ({"uncond": torch.zeros(2, 3).half()}, TypeError, "uncond must be torch.float32"),
        ({"noise": torch.zeros(2, 3).double()}, TypeError, "noise must be torch.float32"),
        ({"coefficients": [1.0, 2.0]}, ValueError, "coefficients must hold 3 numbers"),
        ({"coefficients": []}, ValueError, "coefficients must hold 3 numbers"),
        ({"coefficients": [1.0] * 15}, ValueError, "coefficients must hold 3 numbers"),
        ({"feed": 1}, ValueError, "feed must be in 0..0, got 1"),
        ({"seeds": [1, 2]}, ValueError, "seeds must be None when noise is given"),
        ({"noise": None}, ValueError, "noise or seeds must be given"),
        ({"noise": None, "seeds": [1]}, ValueError, r"seeds must hold one per image \(2\), got 1"),
        ({"noise": None, "seeds": [1, -1]}, ValueError, "seeds must be in 0..2"),
        ({"draw": -1}, ValueError, "draw must be in 0..2"),
        ({"impl": "fast"}, ValueError, "impl must be"),
    ],
)
def test_bad_arguments(edit: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "registers": torch.zeros(1, 2, 3),
        "output": torch.zeros(2, 3),
        "coefficients": [1.0, 1.0, 1.0],
        "noise": torch.zeros(2, 3),
    }
    with pytest.raises(error, match=message):
        solver_step(**{**arguments, **edit})


# --- The extension's own guards: what a wrong call could do to memory.


@needs_ext
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (0, 2, "feed must be a register"),
        (0, -1, "feed must be a register"),
        (2, 3, "updates must be in"),
        (3, 7, "next_feed must be a register"),
        (4, 2, "dest must be a register"),
        (5, -1, "dest must be a register"),
    ],
)
def test_no_table_can_leave_the_registers(column: int, value: int, message: str) -> None:
    index = np.array([[0, -1, 2, -1, 0, 1]], dtype=np.int32)
    coef = np.zeros((1, 4 + 2 * 4))
    ext().PackedTable(index, coef, 2, 2)
    index[0, column] = value
    with pytest.raises(ValueError, match=message):
        ext().PackedTable(index, coef, 2, 2)


@needs_ext
@pytest.mark.parametrize(
    "edit",
    [
        {"num_registers": 9},
        {"num_registers": 0},
        {"max_updates": 5},
        {"coef": np.zeros((1, 11))},
        {"coef": np.zeros((2, 12))},
        {"coef": np.zeros((1, 12), dtype=np.float32)},
        {"coef": np.zeros((1, 24))[:, ::2]},
        {"index": np.zeros((1, 6), dtype=np.int64)},
        {"index": np.zeros(6, dtype=np.int32)},
    ],
)
def test_no_table_of_another_shape(edit: dict[str, Any]) -> None:
    index = np.array([[0, -1, 2, -1, 0, 1]], dtype=np.int32)
    arguments = {"index": index, "coef": np.zeros((1, 12)), "num_registers": 2, "max_updates": 2}
    with pytest.raises(ValueError, match="must"):
        ext().PackedTable(**{**arguments, **edit})


@needs_ext
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"row": 1}, "row must be in 0..rows-1, got 1"),
        ({"row": -1}, "row must be in 0..rows-1, got -1"),
        ({"registers": [0]}, "registers must hold 2 pointers, got 1"),
        ({"state_dtype": 1}, "state_dtype must be float32 or float64"),
        ({"output_dtype": 4}, "output_dtype must be a dtype code"),
        ({"copies": 3}, "copies must be 1 or 2, got 3"),
        ({"per_image": -1}, "must not be negative"),
        ({"channels": 0}, "channels must divide per_image, got 0"),
        ({"channels": 3}, "channels must divide per_image, got 3"),
        ({"seeds": [1]}, r"seeds must be empty or one per image \(2\), got 1"),
        ({"seeds": []}, "noise or seeds must be given"),
    ],
)
def test_the_extension_checks_what_memory_needs(edit: dict[str, Any], message: str) -> None:
    index = np.array([[0, 0, 1, -1, 0]], dtype=np.int32)
    coef = np.array([[0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0]])
    x, output = torch.zeros(2, 2, 4), torch.zeros(2, 4)
    arguments: dict[str, Any] = {
        "row": 0,
        "registers": [x[0].data_ptr(), x[1].data_ptr()],
        "state_dtype": 0,
        "output_dtype": 0,
        "input_dtype": 0,
        "output": output.data_ptr(),
        "uncond": 0,
        "input": 0,
        "noise": 0,
        "copies": 1,
        "seeds": [1, 2],
        "images": 2,
        "per_image": 4,
        "threads": 1,
        "channels": 1,
    }
    with pytest.raises(ValueError, match=message):
        ext().solver_step(ext().PackedTable(index, coef, 2, 1), **{**arguments, **edit})


# --- The loop: what a model may return and do.


def loop(model: Any, steps: int = 4, **kwargs: Any) -> Tensor:
    x = kwargs.pop("x", torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4))
    return fastdiff.sample(
        model, x=x, schedule=scaled_linear(), steps=steps, engine="cpp", **kwargs
    )


@needs_ext
def test_outputs_of_every_form_give_the_same_sample() -> None:
    class Output:
        def __init__(self, sample: Tensor) -> None:
            self.sample = sample

    def plain(x: Tensor, t: Tensor) -> Tensor:
        return x * 0.5

    exact = loop(plain)
    forms = {
        "tuple": lambda x, t: (plain(x, t), None),
        "object": lambda x, t: Output(plain(x, t)),
        "parameter": lambda x, t: torch.nn.Parameter(plain(x, t), requires_grad=False),
        "strided": lambda x, t: torch.cat([plain(x, t)] * 2, 1)[:, :3],
        "other layout": lambda x, t: plain(x, t).to(memory_format=torch.channels_last),
        "float64": lambda x, t: plain(x, t).double(),
        "another in turn": lambda x, t: (plain(x, t),) if int(t[0]) % 2 else plain(x, t),
        "the input itself": lambda x, t: x.mul_(0.5).mul_(2).mul(0.5),
    }
    for name, form in forms.items():
        assert torch.equal(loop(form), exact), name


@needs_ext
@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda x, t: x[:1], ValueError, r"model must return shape \(2, 3, 4, 4\), got \(1, 3,"),
        (lambda x, t: x.to("meta"), ValueError, "model must return a tensor on cpu, got meta"),
        (lambda x, t: x.long(), TypeError, "model must return a floating-point tensor"),
        (lambda x, t: None, TypeError, "model must return a tensor, a tuple .* got NoneType"),
    ],
)
def test_wrong_outputs_are_named(model: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loop(model)


@needs_ext
def test_exceptions_of_the_model_and_the_callback_come_through() -> None:
    def failing(x: Tensor, t: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop(failing)

    def callback(info: Any) -> None:
        raise LookupError(info.index)

    with pytest.raises(LookupError, match="0"):
        loop(lambda x, t: x, callback=callback)


@needs_ext
def test_a_signal_stops_the_loop() -> None:
    import signal

    calls = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return x

    # A Python that was started in the background ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            loop(model, steps=10)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(calls) <= 3


@needs_ext
def test_the_loop_leaks_no_references() -> None:
    outputs = torch.zeros(2, 3, 4, 4)
    model = lambda x, t: outputs  # noqa: E731
    loop(model)
    before = sys.getrefcount(outputs), sys.getrefcount(model), sys.getrefcount(torch.float32)
    for _ in range(50):
        loop(model)
    after = sys.getrefcount(outputs), sys.getrefcount(model), sys.getrefcount(torch.float32)
    assert after[:2] == before[:2]
    assert after[2] - before[2] < 50


class NoMemory:
    """Looks like the tensor it stands for, and has no data."""

    def __call__(self, x: Tensor, row: int, /) -> object:
        return None

    def accept(self, output: object, /) -> Tensor:
        return torch.empty(2, 3, 4, 4, device="meta")


@needs_ext
def test_null_pointers_are_refused() -> None:
    x = torch.zeros(2, 3, 4, 4)
    table = make_table("ddim", scaled_linear(), 4)
    with pytest.raises(ValueError, match="model must return a tensor with memory"):
        run(table, x, NoMemory(), dtype=x.dtype, engine="cpp")
    packed = table.pack()
    native = ext().PackedTable(packed.index, packed.coef, packed.num_registers, packed.max_updates)
    zeros = ("row", "state_dtype", "output_dtype", "input_dtype", "uncond", "input", "noise")
    arguments: dict[str, Any] = dict.fromkeys(zeros, 0)
    arguments |= {"table": native, "copies": 1, "seeds": [], "images": 2, "per_image": 48}
    arguments |= {"threads": 1}
    registers = [x.data_ptr()] * packed.num_registers
    with pytest.raises(ValueError, match="output must not be null"):
        ext().solver_step(**arguments, registers=registers, output=0)
    with pytest.raises(ValueError, match=r"registers\[0\] must not be null"):
        ext().solver_step(**arguments, registers=[0, *registers[1:]], output=x.data_ptr())


# --- On the GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(CASES))
def test_triton_on_the_gpu(number: int) -> None:
    case = random_case(number)
    assert same_bits(run_triton(case, "cuda"), expected(case))


@pytest.mark.gpu
@needs_cuda_ext
@pytest.mark.parametrize("number", range(CASES))
def test_cuda(number: int) -> None:
    case = random_case(number)
    assert same_bits(run_cuda(case), expected(case))


class Halving:
    """A stand-in for a model, with the protocol of engine.Evaluate; the same bits on a GPU."""

    def __call__(self, x: Tensor, row: int, /) -> Tensor:
        return x * 0.5 + 0.125

    def accept(self, output: Tensor, /) -> Tensor:
        return output


def reference_run(table: Any, x: Tensor, seeds: list[int]) -> Tensor:
    noise = PhiloxNoise(x.shape, seeds, state_dtype=x.dtype, device=x.device)
    return run_reference(table, x, Halving(), dtype=x.dtype, noise=noise)


@pytest.mark.gpu
@needs_cuda_ext
@pytest.mark.parametrize("solver", ["dpmpp_2m", "ddpm"])
def test_one_captured_graph_serves_every_row(solver: str) -> None:
    """Model and step are captured once; every replay takes the next row and the last goes back."""
    table = make_table(solver, scaled_linear(), 12)
    packed = table.pack()
    native = ext().PackedTable(packed.index, packed.coef, packed.num_registers, packed.max_updates)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seeds = [5, 6]
    exact = reference_run(table, x, seeds)

    state = x.cuda()
    registers = [state, *(torch.empty_like(state) for _ in range(1, table.num_registers))]
    rows = torch.frombuffer(bytearray(ext().cuda_device_rows(native, False)), dtype=torch.uint8)
    rows = rows.cuda()
    counter = torch.zeros(2, dtype=torch.int32, device="cuda")
    keys = torch.tensor(seeds, device="cuda")
    graph = torch.cuda.CUDAGraph()
    state_before = state.clone()
    with torch.cuda.graph(graph):
        output = Halving()(state, 0)
        ext().cuda_solver_step_indexed(
            native,
            rows=rows.data_ptr(),
            counter=counter.data_ptr(),
            registers=[register.data_ptr() for register in registers],
            state_dtype=0,
            output_dtype=0,
            input_dtype=0,
            output=output.data_ptr(),
            uncond=0,
            input=0,
            noise=0,
            copies=1,
            seeds=keys.data_ptr(),
            images=2,
            per_image=4 * 8 * 8,
            stream=torch.cuda.current_stream().cuda_stream,
        )
    for _ in range(2):  # the second time round finds the counter at row 0 again
        state.copy_(state_before)
        for _ in range(len(table)):
            graph.replay()
        assert torch.equal(state.cpu(), exact)
        assert counter.tolist() == [0, 0]


@pytest.mark.gpu
@needs_cuda_ext
@pytest.mark.parametrize("solver", ["dpmpp_2m", "ddpm"])
def test_the_loop_on_a_stream_does_not_synchronise(solver: str) -> None:
    table = make_table(solver, scaled_linear(), 12)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    state, seeds = x.cuda(), [5, 6]
    noise = PhiloxNoise(x.shape, seeds, state_dtype=x.dtype, device=state.device)

    def go() -> Tensor:
        return run(table, state, Halving(), dtype=x.dtype, noise=noise, engine="cpp")

    go()  # the seeds are on the GPU from here on
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = go()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.equal(result.cpu(), reference_run(table, x, seeds))
