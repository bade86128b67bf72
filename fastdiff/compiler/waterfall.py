"""How the calls of a step become fewer, stage by stage, as numbers and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from xml.sax.saxutils import escape

from torch import Tensor, fx

from fastdiff.compiler.graph import name_of, value_of

# What computes nothing: another look at the same memory, or at its shape.
FREE = frozenset(
    """view reshape transpose permute expand unsqueeze squeeze chunk split getitem t flatten
    unflatten unbind movedim narrow select detach swapaxes view_as expand_as tensor_split diagonal
    real imag stacked""".split()  # noqa: SIM905
)


def calls_of(nodes: Iterable[fx.Node]) -> int:
    """How many calls launch something: all that give tensors and are not mere views.

    An estimate. A call may launch several kernels, and a reshape may copy.
    """
    return sum(
        node.op in ("call_function", "call_method", "call_module")
        and name_of(node) not in FREE
        and _gives_tensors(node)
        for node in nodes
    )


def _gives_tensors(node: fx.Node) -> bool:
    value = value_of(node)
    several = isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value)
    return several or isinstance(value, Tensor)


def svg(title: str, stages: Mapping[str, int]) -> str:
    """A bar for each stage, with its number; the part that the stage has taken away is pale."""
    row, left, width = 26, 230, 480
    most = max([*stages.values(), 1])
    height = row * len(stages) + 50
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 90}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="24" font-weight="bold">{escape(title)}</text>',
    ]
    before = 0
    for number, (stage, count) in enumerate(stages.items()):
        y = 40 + number * row
        long, pale = width * count / most, width * max(before, count) / most
        lines += [
            f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(stage)}</text>',
            f'<rect x="{left}" y="{y}" width="{pale:.1f}" height="{row - 8}" fill="#dbe4f0"/>',
            f'<rect x="{left}" y="{y}" width="{long:.1f}" height="{row - 8}" fill="#2f6db5"/>',
            f'<text x="{left + pale + 6:.1f}" y="{y + 15}">{count}</text>',
        ]
        before = count
    return "\n".join([*lines, "</svg>", ""])
