"""Tokenizer files of CLIP's form without its vocabulary, for checkpoints of random weights."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"


def byte_characters() -> list[str]:
    """The printable character that stands for each of the 256 bytes, as GPT-2's vocabulary has."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in kept)
    table = {byte: chr(byte) for byte in kept}
    table |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def write_clip_tokenizer(folder: str | Path, size: int = 49408, pad: str = END) -> None:
    """Writes ``vocab.json``, ``merges.txt`` and the configuration of a CLIP tokenizer.

    size: of the vocabulary, at least 514. The tokens are the bytes, alone and at the end of a word,
    pairs of letters joined by merges, and the start and end; CLIP's own merges are others.
    """
    if size < 514:
        raise ValueError(f"size must be at least 514, got {size}")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    single = byte_characters()
    tokens = [*single, *(f"{c}</w>" for c in single)]
    merges = []
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    known = set(tokens)
    words = list(letters)
    for left, right in product(letters, [*letters, *(f"{c}</w>" for c in letters)]):
        merges.append((left, right))
    for left in [a + b for a, b in product(letters, letters)]:
        merges += [(left, right) for right in (*words, *(f"{c}</w>" for c in words))]
    for left in [a + b for a, b in product(letters, letters)]:
        merges += [
            (left, right + "</w>") for right in (a + b for a, b in product(letters, letters))
        ]
    kept = []
    for left, right in merges:
        if len(tokens) == size - 2:
            break
        if left + right not in known:
            known.add(left + right)
            tokens.append(left + right)
            kept.append(f"{left} {right}")
    tokens += [START, END]
    write = {
        "vocab.json": json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *kept, ""]),
        "special_tokens_map.json": json.dumps(
            {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
        ),
        "tokenizer_config.json": json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": 77,
                "bos_token": START,
                "eos_token": END,
                "unk_token": END,
                "pad_token": pad,
                "do_lower_case": True,
            }
        ),
    }
    for name, text in write.items():
        (target / name).write_text(text, encoding="utf-8")
