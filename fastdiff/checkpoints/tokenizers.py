"""Tokenizer files of CLIP's and T5's form without their vocabularies, for random weights."""

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
    for left, right in product(letters, [*letters, *(f"{c}</w>" for c in letters)]):
        merges.append((left, right))
    for left in [a + b for a, b in product(letters, letters)]:
        merges += [(left, right) for right in (*letters, *(f"{c}</w>" for c in letters))]
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


def write_t5_tokenizer(folder: str | Path, size: int = 32128, length: int = 512) -> None:
    """Writes ``tokenizer.json`` of a unigram tokenizer of T5's form, and its configuration.

    size: of the vocabulary, at least 64: padding, end, unknown, the letters, then syllables.
    length: the longest text in tokens.
    """
    if size < 64:
        raise ValueError(f"size must be at least 64, got {size}")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["\u2581", *letters, *letters.upper(), *",.!?'-:;"]
    pieces += ["".join(parts) for parts in product(letters, repeat=2)]
    pieces += ["\u2581" + "".join(parts) for parts in product(letters, repeat=2)]
    pieces += ["".join(parts) for parts in product(letters, repeat=3)]
    pieces += ["\u2581" + "".join(parts) for parts in product(letters, repeat=3)]
    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = [[token, 0.0] for token in special]
    vocabulary += [[piece, -2.0 - i / size] for i, piece in enumerate(pieces)]
    spaces = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": True, **added} for i, token in enumerate(special)
        ],
        "pre_tokenizer": {**spaces, "split": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": {**spaces, "split": True},
        "model": {"type": "Unigram", "unk_id": 2, "vocab": vocabulary[:size]},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (target / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (target / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
