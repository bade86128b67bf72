"""One graph as several programs, by what its values depend on.

The inputs of a denoiser have roles: the noisy ``sample``, the ``time``, the ``condition`` (text
embeddings and whatever else stays the same over a sampling run) and the ``weights``. A value
depends on a set of them. What depends on the sample has to be computed in every step. The rest are
programs of their own, whose results are kept:

========  ==========================  ======================================================
program   depends on                  in a Stable Diffusion U-Net
========  ==========================  ======================================================
weights   the weights alone           constant tables
prompt    the condition               keys and values of the cross-attentions
schedule  the time                    the embedding of the time and all its projections
both      the condition and the time  SDXL: the sum of the two embeddings, and its projections
step      the sample and all the rest everything else
========  ==========================  ======================================================
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fastdiff.compiler.graph import is_tensor, value_of
from fastdiff.compiler.packing import stacked

ROLES = ("weights", "condition", "time", "sample")
PROGRAMS = ("weights", "prompt", "schedule", "both", "step")


def program_of(roles: frozenset[str]) -> str:
    """The program of a value that depends on these roles."""
    if "sample" in roles:
        return "step"
    if "time" in roles:
        return "both" if "condition" in roles else "schedule"
    return "prompt" if "condition" in roles else "weights"


@dataclass
class Program:
    """A part of the graph.

    inputs: names of the values it reads: placeholders of the whole graph, and results of programs
    before it. outputs: names of the values it gives.
    """

    name: str
    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: int

    def nbytes(self) -> int:
        """Bytes of all inputs and results, each once."""
        graph = self.module.graph
        ends = [node for node in graph.nodes if node.op == "placeholder"]
        ends += next(node for node in graph.nodes if node.op == "output").all_input_nodes
        found = {node: value_of(node) for node in ends if is_tensor(node)}
        return sum(value.numel() * value.element_size() for value in found.values())


def dependencies(graph: fx.Graph, roles: dict[str, str]) -> dict[fx.Node, frozenset[str]]:
    """The roles that each node depends on; ``roles`` gives those of the placeholders, by name."""
    found: dict[fx.Node, frozenset[str]] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            found[node] = frozenset((roles[node.name],))
        elif is_random(node):
            # New numbers in every step.
            found[node] = frozenset(("sample",))
        else:
            parents = (found[parent] for parent in node.all_input_nodes)
            found[node] = frozenset().union(*parents)
    return found


def split(module: fx.GraphModule, roles: dict[str, str]) -> list[Program]:
    """The programs of a graph, in the order in which they run; the last is the step.

    Views, which cost nothing, stay with what uses them, so that less is kept.
    """
    graph = module.graph
    where = _places(graph, roles)
    order = {name: i for i, name in enumerate(PROGRAMS)}
    programs = []
    output = next(node for node in graph.nodes if node.op == "output")
    for name in PROGRAMS[:-1]:
        body = [
            n for n in graph.nodes if n.op not in ("placeholder", "output") and where[n] == name
        ]
        kept = [
            n
            for n in body
            if any(user is output or order[where[user]] > order[name] for user in n.users)
        ]
        if kept:
            programs.append(extract(module, name, body, kept))
    programs.append(extract(module, "step", step_body(graph, roles), output.args[0]))
    return programs


def step_body(graph: fx.Graph, roles: dict[str, str]) -> list[fx.Node]:
    """The nodes of the step, in order."""
    where = _places(graph, roles)
    return [n for n in graph.nodes if n.op not in ("placeholder", "output") and where[n] == "step"]


def _places(graph: fx.Graph, roles: dict[str, str]) -> dict[fx.Node, str]:
    """The program of each node."""
    depends = dependencies(graph, roles)
    where = {node: program_of(found) for node, found in depends.items()}
    _pull_views(graph, where)
    return where


def _pull_views(graph: fx.Graph, where: dict[fx.Node, str]) -> None:
    """Moves views of inputs, and of other programs' results, to the program that uses them."""
    for node in reversed(list(graph.nodes)):
        if node.op not in ("call_method", "call_function") or where[node] == "step":
            continue
        users = {where[user] for user in node.users if user.op != "output"}
        if len(users) != 1 or where[node] in users:
            continue
        cheap = node.op == "call_method" and node.target in ("view", "transpose", "unsqueeze")
        # Not out of a tuple: programs hand over tensors.
        cheap = cheap or (node.target is operator.getitem and is_tensor(node.args[0]))
        cheap = cheap or node.target is stacked
        if cheap:
            where[node] = users.pop()


def extract(module: fx.GraphModule, name: str, body: list[fx.Node], results: Any) -> Program:
    """A graph module of the nodes ``body`` that returns ``results`` (nodes in any structure)."""
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inside = set(body)
    inputs: list[fx.Node] = []

    def need(node: fx.Node) -> None:
        if node not in inside and node not in inputs:
            inputs.append(node)

    for node in body:
        for parent in node.all_input_nodes:
            need(parent)
    fx.node.map_arg(results, need)
    for node in inputs:
        copies[node] = new.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in body:
        copies[node] = new.node_copy(node, copies.__getitem__)
    returned = fx.node.map_arg(results, copies.__getitem__)
    new.output(returned if name == "step" else tuple(returned))
    names: list[str] = []
    fx.node.map_arg(results, lambda node: names.append(node.name))
    return Program(
        name,
        fx.GraphModule(module, new),
        tuple(node.name for node in inputs),
        tuple(names),
        len(body),
    )


_RANDOM = frozenset(
    """rand randn randint rand_like randn_like randint_like normal bernoulli multinomial randperm
    poisson""".split()  # noqa: SIM905
)


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers."""
    if node.op not in ("call_method", "call_function"):
        return False
    name = str(getattr(node.target, "__name__", node.target))
    if name in _RANDOM or name in ("dropout", "alpha_dropout", "feature_dropout"):
        return name in _RANDOM or bool(node.args[2:] and node.args[2])
    return node.target is torch.nn.functional.dropout and bool(node.kwargs.get("training"))
