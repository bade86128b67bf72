"""A small model, files of it, and files written byte by byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdiff.checkpoints.family import Source


class Toy(nn.Module):
    """A fused projection, a convolution, a counter, a table that is computed, and tied weights."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Conv2d(width, width, 1)
        self.modulation = nn.Linear(width, 2 * width)
        self.table = nn.Embedding(5, width)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("steps", torch.empty((), dtype=torch.int64))
        self.register_buffer("places", torch.arange(width).float() / 7, persistent=False)


def toy(seed: int = 0, width: int = 4) -> Toy:
    """A Toy with values in all its weights."""
    torch.manual_seed(seed)
    model = Toy(width)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    model.steps.fill_(7)
    return model


# The toy in another layout: split projection, a linear layer, halves exchanged, tied weights once.
OTHER = {
    **{
        f"qkv.{kind}": Source(tuple(f"attn.{part}.{kind}" for part in "qkv"), "rows")
        for kind in ("weight", "bias")
    },
    "out.weight": Source(("proj.weight",), flat=True),
    "out.bias": Source(("proj.bias",)),
    **{f"modulation.{kind}": Source((f"ada.{kind}",), "swap") for kind in ("weight", "bias")},
    "table.weight": Source(("shared.weight",)),
    "head.weight": Source(("head.weight",)),
    "steps": Source(("steps",)),
}


def state(model: nn.Module) -> dict[str, Tensor]:
    """What a file holds of a model: tied weights once."""
    return {k: v.clone() for k, v in model.state_dict().items() if k != "head.weight"}


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with any header: bytes, text, or what json makes of it."""
    if not isinstance(header, (bytes, str)):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the tensors' bytes of a file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_shards(folder: Path, tensors: dict[str, Tensor], count: int = 2) -> Path:
    """A folder of shards with their index; returns the index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    where = {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        held = names[number::count]
        save_file({name: tensors[name] for name in held}, folder / file)
        where |= dict.fromkeys(held, file)
    index = folder / "model.safetensors.index.json"
    total = sum(value.nbytes for value in tensors.values())
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))
    return index
