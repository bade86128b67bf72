"""Where a step can be cut, so that a part of it stands in for the whole: see `step_cache`.

Two cuts, both found in the captured graph before fusion:

- "deepcache": a U-Net's concatenations of what comes up from below with a skip connection. What
  comes from below is kept.
- "first_block": the outermost lists of blocks. What the first block gives is compared, and what
  all others add to it is kept.

The values at the cut stay in the graph while it is fused: they are results of it until then, and no
fusion reaches across those that partial steps are given (`kept`).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from fastdiff.compiler.graph import calls, insert, is_tensor, name_of, value_of
from fastdiff.compiler.options import CacheOptions
from fastdiff.compiler.passes.prepack import restored
from fastdiff.compiler.split import Program, dependencies, extract, program_of, step_body

# Calls that are the work of a model.
WORK = frozenset(
    """linear matmul mm bmm addmm baddbmm einsum conv1d conv2d conv3d conv_transpose1d
    conv_transpose2d conv_transpose3d scaled_dot_product_attention""".split()  # noqa: SIM905
)
# What a residual stream goes through between one sum and the next.
_ALONG = frozenset(
    """add iadd radd sub to float half bfloat16 type_as contiguous clamp clip nan_to_num view
    reshape unsqueeze squeeze flatten unflatten truediv div kept
    gate_residual.default""".split()  # noqa: SIM905
)
_SLICES = ("getitem", "narrow")
SMALL_BLOCKS = 4  # lists whose blocks have so many times fewer calls are none of blocks


class CannotCut(Exception):
    """Why a graph has no place to be cut at."""


def kept(x: Tensor) -> Tensor:
    """``x``: no pass knows this function, so none fuses what is before it with what is after."""
    return x


@dataclass
class Cut:
    """The programs of a step in pieces, by name, and the names of what passes between them.

    "deepcache": "step" gives the model's results, then ``given``; "part" takes ``given``.
    "first_block": "head", "middle" and "tail". ``given``: what the middle makes and the tail takes;
    ``bases``: the head's values that it is added to; ``change``: the first block's residual.
    results: how many the model has.
    """

    options: CacheOptions
    programs: dict[str, Program]
    given: tuple[str, ...]
    results: int
    bases: tuple[str, ...] = ()
    change: str = ""


@dataclass
class Marks:
    """The places of a cut in a graph that is not fused yet."""

    options: CacheOptions
    barriers: list[fx.Node]
    values: list[fx.Node] = field(default_factory=list)
    results: int = 0


def mark(graph: fx.Graph, model: nn.Module, roles: dict[str, str], options: CacheOptions) -> Marks:
    """Finds the cut, and keeps its values alive. CannotCut with the reason where there is none."""
    if "time" not in roles.values():
        raise CannotCut("no argument is a time, so nothing tells where a run begins")
    depends = dependencies(graph, roles)
    sampled = {n for n, d in depends.items() if program_of(d) == "step"}
    if options.kind == "deepcache":
        marks = Marks(options, [_deep(graph, depends, options.branch)])
    else:
        x, first, pairs = _first_block(graph, model, sampled)
        values = [x, first, *(base for base, _ in pairs)]
        marks = Marks(options, [end for _, end in pairs], values)
    marks.barriers = [_barrier(graph, node) for node in marks.barriers]
    output = _output(graph)
    results: Any = output.args[0]
    marks.results = len(results)
    output.args = ((*results, *marks.values, *marks.barriers),)
    return marks


def release(graph: fx.Graph, marks: Marks) -> tuple[list[fx.Node], list[fx.Node]]:
    """(values, ends) as they are after fusion; the graph gives its own results again."""
    output = _output(graph)
    results: Any = output.args[0]
    found: list[fx.Node] = []
    for node in results[marks.results :]:
        while node.target is restored:
            node = node.args[0]
        found.append(node)
    output.args = (tuple(results[: marks.results]),)
    for number, node in enumerate(found):
        if node.target is kept:
            found[number] = node.args[0]  # type: ignore[assignment]
    for node in list(graph.nodes):
        if node.target is kept:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    count = len(marks.values)
    return found[:count], found[count:]


def programs_of(module: fx.GraphModule, roles: dict[str, str], marks: Marks, nodes: Any) -> Cut:
    """The programs of a cut; ``nodes`` are what `release` gave. CannotCut where fusion has moved
    something across it."""
    graph, (values, ends) = module.graph, nodes
    body = step_body(graph, roles)
    if not set(ends) <= set(body):
        raise CannotCut("the value to be kept does not depend on the sample")
    results: Any = _output(graph).args[0]
    given = tuple(end.name for end in ends)
    part = _before(results, body, ends)
    if marks.options.kind == "deepcache":
        programs = {
            "step": extract(module, "step", body, (*results, *ends)),
            "part": extract(module, "part", [n for n in body if n in part], results),
        }
        return Cut(marks.options, programs, given, marks.results)
    x, first, *bases = values
    if not set(values) <= set(body):
        raise CannotCut("the first block does not depend on the sample")
    with graph.inserting_before(_output(graph)):
        change = graph.call_function(operator.sub, (first, x))
    change.meta["example_value"] = value_of(first)
    head = _before([change], [*body, change])
    middle = _before(ends, body) - head
    both = middle & part
    if any(calls(node, *WORK) or _is_op(node) for node in both):
        raise CannotCut("what the other blocks compute reaches the end by another way, too")
    # Shapes and constants that both need; and programs hand over tensors, not tuples.
    head |= both
    head |= {n for n in middle | part if n.target is operator.getitem and _of_tuple(n, head)}
    middle -= head
    tail = part - head
    body.append(change)
    handed = [n for n in body if n in head and any(u in middle | tail for u in n.users)]
    handed += [n for n in dict.fromkeys((change, *bases)) if n not in handed]
    programs = {
        "head": extract(module, "head", [n for n in body if n in head], handed),
        "middle": extract(module, "middle", [n for n in body if n in middle], ends),
        "tail": extract(module, "tail", [n for n in body if n in tail], results),
    }
    names = tuple(base.name for base in bases)
    cut = Cut(marks.options, programs, given, marks.results, names, change.name)
    graph.erase_node(change)
    return cut


def _of_tuple(node: fx.Node, nodes: set[fx.Node]) -> bool:
    source = node.args[0]
    return source in nodes and not is_tensor(source)


def _is_op(node: fx.Node) -> bool:
    return node.op == "call_function" and str(node.target).startswith("fastdiff.")


def _output(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op == "output")


def _barrier(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """``kept`` between a value and all that uses it."""
    barrier = insert(graph, node.next, kept, node)
    node.replace_all_uses_with(barrier, delete_user_cb=lambda user: user is not barrier)
    return barrier


def _before(
    nodes: Iterable[Any], body: Iterable[fx.Node], stop: Sequence[fx.Node] = ()
) -> set[fx.Node]:
    """What of ``body`` these nodes need, themselves included; not what only ``stop`` needs."""
    inside, found = set(body), set()
    waiting = [node for node in nodes if isinstance(node, fx.Node)]
    while waiting:
        node = waiting.pop()
        if node in found or node not in inside or node in stop:
            continue
        found.add(node)
        waiting += node.all_input_nodes
    return found


def _ancestors(graph: fx.Graph) -> dict[fx.Node, int]:
    """For each node a set of bits: those of itself and of all that it is made of."""
    found: dict[fx.Node, int] = {}
    for number, node in enumerate(graph.nodes):
        bits = 1 << number
        for parent in node.all_input_nodes:
            bits |= found[parent]
        found[node] = bits
    return found


def _deep(graph: fx.Graph, depends: dict[fx.Node, frozenset[str]], branch: int) -> fx.Node:
    """What comes up from below at the skip connection number ``branch``, from the outside.

    A skip connection is a concatenation of two values of which one is made of the other (but for
    what no weights are multiplied with: a ControlNet's sum, a filter), by layers with weights that
    include those under the skip connection before it.
    """
    before = _ancestors(graph)
    work = weighted = 0
    for number, node in enumerate(graph.nodes):
        if calls(node, *WORK) and program_of(depends[node]) == "step":
            work |= 1 << number
            if any(depends[parent] == {"weights"} for parent in node.all_input_nodes):
                weighted |= 1 << number
    found: list[fx.Node] = []
    under = 0
    for node in graph.nodes:
        parts = node.args[0] if calls(node, "cat", "concat", "concatenate") and node.args else ()
        if not isinstance(parts, (list, tuple)) or len(parts) != 2:
            continue
        if not all(is_tensor(p) and program_of(depends[p]) == "step" for p in parts):
            continue
        for deep, skip in (tuple(parts), tuple(parts[::-1])):
            deeper = before[deep] & ~before[skip] & weighted
            early = before[skip] & work and not before[skip] & ~before[deep] & work
            if deeper and early and not under & ~deeper:
                found.append(deep)
                under = deeper
    if not found:
        raise CannotCut(
            "deepcache looks for a concatenation of a value with an earlier one that it is made "
            "of (the skip connections of a U-Net), and there is none"
        )
    if branch >= len(found):
        raise CannotCut(f"branch must be below {len(found)}, its skip connections, got {branch}")
    return found[-1 - branch]


_PATH = re.compile(r"\['([^']+)'\]|\[(\d+)\]|\.(\w+)")


def module_path(node: fx.Node) -> tuple[str, ...]:
    """The names from the model down to the module whose code made the call; () for its own."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ()
    path = str(list(stack.values())[-1][0])
    parts = [next(filter(None, found)) for found in _PATH.findall(path)]
    parts = [part for part in parts if part not in ("__dict__", "_modules")]
    return tuple(parts[1:] if parts[:1] == ["model"] else parts)


def _blocks(graph: fx.Graph, model: nn.Module, sampled: set[fx.Node]) -> list[set[fx.Node]]:
    """The calls of each block, in the order in which they run: those of the outermost lists of
    modules, but for lists of small ones (the projections of a ControlNet)."""
    lists: list[tuple[str, ...]] = []
    for name, module in model.named_modules():
        path = tuple(name.split("."))
        inside = any(path[: len(other)] == other for other in lists)
        if name and isinstance(module, (nn.ModuleList, nn.Sequential)) and not inside:
            lists.append(path)
    found: dict[tuple[str, ...], dict[str, set[fx.Node]]] = {path: {} for path in lists}
    for node in graph.nodes:
        path = module_path(node) if node in sampled else ()
        for length in range(1, len(path)):
            if path[:length] in found:
                found[path[:length]].setdefault(path[length], set()).add(node)
    sizes = {path: sum(map(len, blocks.values())) for path, blocks in found.items() if blocks}
    if not sizes:
        return []
    largest = max(sizes, key=lambda path: sizes[path])
    least = sizes[largest] / len(found[largest]) / SMALL_BLOCKS
    kept_lists = [path for path in sizes if sizes[path] / len(found[path]) >= least]
    order = {node: number for number, node in enumerate(graph.nodes)}
    blocks = [block for path in kept_lists for block in found[path].values()]
    return sorted(blocks, key=lambda block: min(order[node] for node in block))


def _first_block(
    graph: fx.Graph, model: nn.Module, sampled: set[fx.Node]
) -> tuple[fx.Node, fx.Node, list[tuple[fx.Node, fx.Node]]]:
    """(what enters the first block, what comes out of it, pairs of the latter or another of its
    results with the one of the last block that it becomes)."""
    blocks = _blocks(graph, model, sampled)
    if len(blocks) < 2:
        raise CannotCut(
            "first_block looks for two or more blocks in lists of modules (nn.ModuleList, "
            f"nn.Sequential) that a step runs, and found {len(blocks)}"
        )
    order = {node: number for number, node in enumerate(graph.nodes)}
    first, second, last = blocks[0], blocks[1], blocks[-1]
    soon, end = (max(order[node] for node in block) for block in (second, last))
    outputs = [n for n in graph.nodes if n in first and is_tensor(n)]
    outputs = [
        n
        for n in outputs
        if any(u in second or (u not in first and order[u] < soon) for u in n.users)
    ]
    inputs = [n for n in graph.nodes if n in sampled and n not in first and n.users.keys() & first]
    stream = _stream([n for n in inputs if is_tensor(n)], outputs)
    before = _ancestors(graph)
    bits = {node: 1 << number for node, number in order.items()}
    head = 0
    for node in outputs:
        head |= before[node]
    made = sum(bits[node] for node in outputs)
    ends: list[fx.Node] = []
    for node in graph.nodes:
        if order[node] > end or not before[node] & made or bits[node] & head:
            continue
        if any(order[user] > end for user in node.users):
            ends += [node] if is_tensor(node) else [u for u in node.users if order[u] > end]
    if not ends:
        raise CannotCut("nothing of the last block is used after it")
    pairs = []
    for number, node in enumerate(ends):
        node = _with_base(node, outputs)
        bases = [base for base in outputs if _same(base, node)]
        single = len(ends) == 1 and stream[1] in bases
        pairs.append((stream[1] if single else bases[min(number, len(bases) - 1)], node))
    return *stream, pairs


def _same(a: fx.Node, b: fx.Node) -> bool:
    x, y = value_of(a), value_of(b)
    return is_tensor(a) and is_tensor(b) and x.shape == y.shape and x.dtype == y.dtype


def _with_base(end: fx.Node, outputs: list[fx.Node]) -> fx.Node:
    """The last block's result, or the slice of it that is used, of the shape of one of the first
    block's."""
    node = end
    while not any(_same(base, node) for base in outputs):
        users = list(node.users)
        if len(users) != 1 or name_of(users[0]) not in _SLICES:
            shapes = ", ".join(str(list(value_of(base).shape)) for base in outputs)
            raise CannotCut(
                f"the last block gives {list(value_of(end).shape)}, the first one {shapes or '-'}: "
                "there is no residual between them ('deepcache' is for U-Nets)"
            )
        node = users[0]
    return node


def _stream(inputs: list[fx.Node], outputs: list[fx.Node]) -> tuple[fx.Node, fx.Node]:
    """The input and the output of the first block that the residual connections join."""
    for output in outputs:
        for source in inputs:
            if _same(source, output) and _leads(output, source):
                return source, output
    raise CannotCut(
        "first_block looks for a value that the first block adds to and hands on to the second "
        "one, and there is none ('deepcache' is for U-Nets)"
    )


def _leads(node: fx.Node, source: fx.Node) -> bool:
    """Whether sums and changes of dtype or shape lead from a node back to ``source``."""
    seen: set[Any] = set()
    waiting: list[Any] = [node]
    while waiting:
        here = waiting.pop()
        if here is source:
            return True
        if here not in seen and name_of(here) in _ALONG:
            seen.add(here)
            waiting += here.all_input_nodes
    return False
