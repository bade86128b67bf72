"""The text encoders in single files against diffusers' own converters and transformers' modules."""

from __future__ import annotations

import builtins
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastdiff.checkpoints.family import Family, Source, written
from fastdiff.checkpoints.layouts import text

pytest.importorskip("transformers")
utils = pytest.importorskip("diffusers.loaders.single_file_utils")

FAMILIES = {family.name: family for family in text.FAMILIES}
TINY: dict[str, Any] = {
    "clip": text.ClipConfig(64, 96, 2, 1, "quick_gelu", vocab_size=99, positions=16),
    "clip_sd3_l": text.ClipConfig(64, 96, 2, 1, "quick_gelu", 64, 99, 16),
    "clip_sd3_g": text.ClipConfig(128, 96, 2, 2, "gelu", 128, 99, 16),
    "openclip_h": text.ClipConfig(64, 96, 23, 1, "gelu", None, 99, 16),
    "openclip_g": text.ClipConfig(128, 96, 2, 2, "gelu", 48, 99, 16),
    "t5": text.T5Config(32, 48, 2, 4, 8, 99, 8),
}
FULL = {name: next(iter(family.configs.values())) for name, family in FAMILIES.items()}


def randomised(family: Family, config: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    module = family.build(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if family.name == "clip_sd3_l":
        module.text_projection.weight.data = torch.eye(config.width)
    return module


def single_file(family: Family, config: Any, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The official tensors, with what real files have besides."""
    assert family.official is not None
    file = {family.prefixes[0] + k: v for k, v in written(family.official(config), state).items()}
    if family.name == "openclip_h":
        block = "cond_stage_model.model.transformer.resblocks."
        last = {k: v for k, v in file.items() if k.startswith(f"{block}22.")}
        file |= {k.replace("22.", "23."): torch.full_like(v, 9.0) for k, v in last.items()}
        file["cond_stage_model.model.text_projection"] = torch.ones(config.width, config.width)
        file["cond_stage_model.model.logit_scale"] = torch.ones(())
    if family.name == "clip":
        name = "cond_stage_model.transformer.text_model.embeddings.position_ids"
        file[name] = torch.arange(config.positions)[None]
    return file


def converted(family: Family, module: torch.nn.Module, file: dict[str, Any]) -> dict[str, Any]:
    """What diffusers makes of the single file, for the module."""
    prefix = family.prefixes[0]
    if family.name == "t5":
        return utils.convert_sd3_t5_checkpoint_to_diffusers(file)
    if family.name.startswith("openclip"):
        state = utils.convert_open_clip_checkpoint(module, file, prefix=prefix)
    else:
        state = utils.convert_ldm_clip_checkpoint(file, remove_prefix=prefix)
    if family.name == "clip_sd3_l":
        state["text_projection.weight"] = torch.eye(module.config.hidden_size)
    if not hasattr(module, "text_model"):
        state = {name.removeprefix("text_model."): value for name, value in state.items()}
    return state


def read(family: Family, config: Any, file: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Our reading of the file, by the layout alone."""
    assert family.official is not None
    module, prefix = family.build(config), family.prefixes[0]
    state = module.state_dict()
    found = {}
    for name, source in family.official(config).items():
        tensors = [file[prefix + key] for key in source.keys]
        shapes = source.shapes(tuple(state[name].shape))
        assert [tuple(tensor.shape) for tensor in tensors] == shapes, name
        found[name] = source.read(tensors, tuple(state[name].shape))
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_reads_what_diffusers_converts(name: str) -> None:
    family, config = FAMILIES[name], TINY[name]
    module = randomised(family, config)
    file = single_file(family, config, module.state_dict())
    shapes = {key.removeprefix(family.prefixes[0]): tuple(v.shape) for key, v in file.items()}
    assert family.recognise(shapes) == config
    theirs = converted(family, module, file)
    mine = read(family, config, file)
    assert set(mine) == set(module.state_dict())
    computed = {"embeddings.position_ids", "encoder.embed_tokens.weight"}
    assert set(mine) - computed == set(theirs) - computed
    for key, value in mine.items():
        if key in theirs:
            assert torch.equal(value, theirs[key]), key
    other = family.build(config)
    other.load_state_dict(theirs, strict=False)
    again = family.build(config)
    again.load_state_dict(mine)
    tokens = torch.randint(1, 90, (2, 9))
    with torch.no_grad():
        results = [m(tokens) for m in (module, again, other)]
    for part in results[0]:
        for result in results[1:]:
            assert torch.equal(results[0][part], result[part]), part


@pytest.mark.parametrize("name", FAMILIES)
def test_full_size_names_are_those_diffusers_converts(name: str) -> None:
    family, config = FAMILIES[name], FULL[name]
    with torch.device("meta"):
        module = family.build(config)
        state = module.state_dict()
        file = single_file(family, config, state)
        theirs = converted(family, module, file)
    computed = {"embeddings.position_ids", "encoder.embed_tokens.weight"}
    assert set(theirs) - computed == set(state) - computed
    for key, value in theirs.items():
        if key in state:
            assert value.shape == state[key].shape, key
    shapes = {key.removeprefix(family.prefixes[0]): tuple(v.shape) for key, v in file.items()}
    assert family.recognise(shapes) == config
    # Positions are numbers also where the weights are none.
    assert not any(buffer.is_meta for buffer in module.buffers())


def test_public_files_have_these_tensors() -> None:
    """Counts and shapes as in the files of Stability and Comfy: SD2's ViT-H, SDXL's ViT-bigG."""
    with torch.device("meta"):
        for name, rows, count in (("openclip_h", 3072, 4 + 23 * 12), ("openclip_g", 3840, 389)):
            family, config = FAMILIES[name], FULL[name]
            file = written(family.official(config), family.build(config).state_dict())
            weight = file["transformer.resblocks.3.attn.in_proj_weight"]
            assert weight.shape == (rows, rows // 3)
            assert file["transformer.resblocks.3.attn.in_proj_bias"].shape == (rows,)
            assert len(file) == count
        assert file["text_projection"].shape == (1280, 1280)


@pytest.mark.parametrize("name", ["clip", "clip_sd3_g", "t5"])
def test_folders_of_transformers(name: str, tmp_path) -> None:
    from safetensors.torch import load_file

    family, config = FAMILIES[name], TINY[name]
    module = randomised(family, config)
    module.save_pretrained(tmp_path)
    entries = module.config.to_dict()
    assert entries["architectures"] == list(family.classes)
    last = {} if name == "t5" else {"eos_token_id": config.vocab_size - 1}
    assert family.from_diffusers(entries) == replace(config, **last)
    assert family.from_diffusers(family.to_diffusers(config)) == replace(config, **last)
    stored = load_file(tmp_path / "model.safetensors")
    before = {f"text_model.{key}": value for key, value in stored.items()} if name == "clip" else {}
    for file in (stored, before):  # as transformers writes it, and as it wrote it before 5.6
        if file:
            file = {
                ".".join(p for p in (family.older.get(p, p) for p in key.split(".")) if p): value
                for key, value in file.items()
            }
            state = module.state_dict()
            for key, source in family.diffusers(config).items():
                value = source.read([file[source.keys[0]]], tuple(state[key].shape))
                assert torch.equal(value, state[key]), key


def test_the_pooled_token_is_where_transformers_looks() -> None:
    """SD1's config.json says eos_token_id 2, for which transformers takes the largest token."""
    config = replace(TINY["clip"], eos_token_id=2)
    assert FAMILIES["clip"].build(config).config.eos_token_id == 2
    assert FAMILIES["clip"].build(TINY["clip"]).config.eos_token_id == 98
    assert FAMILIES["clip"].build(TINY["clip"]).config.bos_token_id == 97


def test_each_file_is_recognised_by_its_own_family() -> None:
    for name, family in FAMILIES.items():
        config = FULL[name]
        with torch.device("meta"):
            file = single_file(family, config, family.build(config).state_dict())
        for prefix in {p for other in text.FAMILIES for p in other.prefixes}:
            shapes = {
                key.removeprefix(prefix): tuple(value.shape)
                for key, value in file.items()
                if key.startswith(prefix)
            }
            for other in text.FAMILIES:
                if prefix in other.prefixes:
                    found = other.recognise(shapes)
                    assert (found is not None) == (prefix == family.prefixes[0]), (name, prefix)
        # Alone in a file, without a prefix: L for L, G for G.
        bare = {key.removeprefix(family.prefixes[0]): tuple(v.shape) for key, v in file.items()}
        first = next(other for other in text.FAMILIES if other.recognise(bare))
        expected = {"clip_sd3_l": "clip"}.get(name, name)
        assert first.name == expected
    assert all(f.recognise({"encoder.conv_in.weight": (8, 3, 3, 3)}) is None for f in text.FAMILIES)


def test_what_cannot_be_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="hidden_act must be quick_gelu or gelu, got 'relu'"):
        text.clip_from_diffusers({"hidden_act": "relu"})
    with pytest.raises(ValueError, match=r"feed_forward_proj must be 'gated-gelu' .*'relu'"):
        text.t5_from_diffusers({})
    load = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install transformers"):
        text.build_clip(text.CLIP_L)


def test_sources_read_what_they_write() -> None:
    whole = torch.arange(24.0).view(6, 4)
    parts = {
        "a": Source(("w",), "part", (0, 2, 6)),
        "b": Source(("w",), "part", (2, 3, 6)),
        "c": Source(("w",), "part", (3, 6, 6)),
        "t": Source(("u",), "transposed"),
        "e": Source(("n",), "eye"),
        "n": Source(("n",)),
    }
    file = {"w": whole, "u": whole.T, "n": torch.zeros(3, dtype=torch.bfloat16)}
    shapes = {"a": (2, 4), "b": (1, 4), "c": (3, 4), "t": (6, 4), "e": (3, 3), "n": (3,)}
    ours = {k: s.read([file[s.keys[0]]], shapes[k]) for k, s in parts.items()}
    for key, source in parts.items():
        assert tuple(ours[key].shape) == shapes[key]
        assert source.shapes(shapes[key]) == [tuple(file[source.keys[0]].shape)]
    assert torch.equal(ours["e"], torch.eye(3, dtype=torch.bfloat16))
    again = written(dict(reversed(parts.items())), ours)
    assert again.keys() == file.keys()
    assert all(torch.equal(again[key], file[key]) for key in file)
