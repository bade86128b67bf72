"""LoRA files with kohya's, PEFT's, diffusers' and ComfyUI's names against diffusers' loading."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.checkpoints.family import Family, Source, written
from fastdiff.checkpoints.layouts import text, unet
from fastdiff.checkpoints.layouts.autoencoder import FAMILY as AUTOENCODER
from fastdiff.checkpoints.lora import apply_lora, loras, remove_lora, set_lora_scale
from fastdiff.models.autoencoder import AutoencoderConfig
from fastdiff.models.unet import UNet
from fastdiff.testing import assert_within_2x

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SD: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
# Three levels of two blocks, as diffusers' reader of LDM's names expects.
SDXL: dict[str, Any] = {
    "block_out_channels": (32, 32, 64),
    "layers_per_block": 2,
    "cross_attention_dim": 128,
    "attention_head_dim": (2, 2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 48 + 48,
    "transformer_layers_per_block": (1, 1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
CLIP = text.ClipConfig(64, 96, 2, 1, "quick_gelu", vocab_size=99, positions=16)
CLIP_2 = text.ClipConfig(128, 96, 2, 2, "gelu", 48, 99, 16)
CLIPS = {family.name: family for family in text.FAMILIES}


def unets(entries: dict[str, Any]) -> tuple[UNet, Any]:
    """Ours and diffusers', of the same random weights."""
    torch.manual_seed(0)
    other = diffusers.UNet2DConditionModel(**entries).eval()
    config = unet.FAMILY.from_diffusers(dict(other.config))
    model = UNet(config).eval()
    state = other.state_dict()
    model.load_state_dict(
        {
            name: source.read([state[key] for key in source.keys], tuple(ours.shape))
            for (name, ours), source in zip(
                model.state_dict().items(), unet.FAMILY.diffusers(config).values(), strict=True
            )
        }
    )
    return model, other


def pipeline(other: Any, *clips: Any) -> Any:
    """A pipeline of diffusers around its U-Net, to load LoRAs with."""
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    common: dict[str, Any] = {"vae": None, "unet": other, "tokenizer": None, "scheduler": scheduler}
    first, second = (*clips, None, None)[:2]
    if second is not None:
        common |= {"text_encoder": first, "text_encoder_2": second, "tokenizer_2": None}
        return diffusers.StableDiffusionXLPipeline(**common)
    common |= {"text_encoder": first, "safety_checker": None, "feature_extractor": None}
    return diffusers.StableDiffusionPipeline(**common, requires_safety_checker=False)


def layers(module: nn.Module, pattern: str = "") -> dict[str, Tensor]:
    """The weights that a LoRA may change, by the module's name."""
    return {
        name: layer.weight
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and re.search(pattern, name)
    }


def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(down, up) as trainers store them."""
    outer, inner, *kernel = weight.shape
    down, up = torch.randn(rank, inner, *kernel), torch.randn(outer, rank, *[1] * len(kernel))
    return down / weight[0].numel() ** 0.5, up * 0.3


def spell(style: str, prefix: str, name: str) -> tuple[str, str, str]:
    """The names of down, up and alpha."""
    if style == "kohya":
        stem = f"{prefix}_{name.replace('.', '_')}"
        return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"
    stem = f"{prefix}.{name}"
    if style == "peft":
        return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", ""
    if style == "dotted":
        return f"{stem}.lora.down.weight", f"{stem}.lora.up.weight", ""
    if style == "text":
        start = f"{stem}.lora_linear_layer"
        return f"{start}.down.weight", f"{start}.up.weight", ""
    stem = re.sub(r"(attn\d)\.(to_\w+)(\.0)?$", r"\1.processor.\2", stem)  # older diffusers
    return f"{stem}_lora.down.weight", f"{stem}_lora.up.weight", ""


def lora(style: str, prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    file = {}
    for number, (name, weight) in enumerate(weights.items()):
        rank = 2 + number % 3
        down, up, alpha = spell(style, prefix, name)
        file[down], file[up] = factors(weight, rank)
        if alpha:
            file[alpha] = torch.tensor(1.5)  # diffusers mistakes some of several for each other
    return file


def check_fused(mine: nn.Module, layout: Any, before: Any, pipe: Any, part: str) -> None:
    """Our weights are those that diffusers fuses, within twice its error."""
    exact = copy.deepcopy(getattr(pipe, part)).double()
    rounded = getattr(pipe, part)
    ours = written(layout, mine.state_dict())
    changed = 0
    for name, layer in rounded.named_modules():
        if not hasattr(layer, "base_layer"):
            continue
        wide = exact.get_submodule(name)
        right = wide.base_layer.weight + wide.get_delta_weight("default_0")
        theirs = layer.base_layer.weight + layer.get_delta_weight("default_0")
        key = f"{name}.weight"
        key = key if key in ours else f"text_model.{key}"
        assert_within_2x(ours[key].view(theirs.shape), right, theirs, name)
        assert not torch.equal(ours[key].view(theirs.shape), before[key].view(theirs.shape)), name
        changed += 1
    same = sum(torch.equal(ours[key], before[key]) for key in ours)
    assert same == len(ours) - changed
    assert changed


EVERY = ""
ATTENTION = r"attn\d\.to_(q|k|v|out\.0)$"
STYLES = {
    "kohya": ("kohya", "lora_unet", EVERY),
    "peft": ("peft", "unet", EVERY),
    "diffusers": ("dotted", "unet", EVERY),
    "older": ("older", "unet", ATTENTION),
}


@pytest.mark.parametrize("style", STYLES)
def test_unet_of_sd1_as_diffusers_loads_it(style: str, tmp_path) -> None:
    from safetensors.torch import save_file

    model, other = unets(SD)
    spelling, prefix, pattern = STYLES[style]
    file = lora(spelling, prefix, layers(other, pattern))
    save_file(file, tmp_path / "painting.safetensors")
    layout = unet.FAMILY.diffusers(model.config)
    before = {k: v.clone() for k, v in written(layout, model.state_dict()).items()}
    assert apply_lora(model, tmp_path / "painting.safetensors") == "painting"
    pipe = pipeline(other)
    pipe.load_lora_weights(tmp_path, weight_name="painting.safetensors")
    check_fused(model, layout, before, pipe, "unet")


@torch.no_grad()
def test_sdxl_with_both_text_encoders_and_names_of_ldm() -> None:
    model, other = unets(SDXL)
    torch.manual_seed(3)
    encoders = [CLIPS["clip"].build(CLIP), CLIPS["openclip_g"].build(CLIP_2)]
    pipe = pipeline(other, *copy.deepcopy(encoders))
    layout = unet.FAMILY.diffusers(model.config)
    official = {key: name for name, source in layout.items() for key in source.keys}
    attention = layers(other, r"attn\d\.|ff\.|proj_")
    named = {official[f"{name}.weight"].removesuffix(".weight"): w for name, w in attention.items()}
    assert any(name.startswith("output_blocks.3.1.") for name in named)
    file = lora("kohya", "lora_unet", named)
    for number, encoder in enumerate(encoders, 1):
        found = layers(encoder, r"_proj$|fc\d$")
        found = {f"text_model.{name.removeprefix('text_model.')}": w for name, w in found.items()}
        file |= lora("kohya", f"lora_te{number}", found)
    before = {k: v.clone() for k, v in written(layout, model.state_dict()).items()}
    texts = [{k: v.clone() for k, v in encoder.state_dict().items()} for encoder in encoders]
    names = ("text_encoder", "text_encoder_2")
    models = {"unet": model, **dict(zip(names, encoders, strict=True))}
    assert apply_lora(models, file) == "lora"
    pipe.load_lora_weights(dict(file))
    check_fused(model, layout, before, pipe, "unet")
    for name, encoder, state in zip(names, encoders, texts, strict=True):
        same = {key: Source((key,)) for key in state}
        check_fused(encoder, same, state, pipe, name)
    # The U-Net alone needs to be told that the others are left out.
    alone, _ = unets(SDXL)
    with pytest.raises(ValueError, match=r"modules of 'text_encoder', .* skip=\{'text_encoder'\}"):
        apply_lora(alone, file)
    apply_lora(alone, file, skip=set(names))
    for a, b in zip(alone.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("style", ["kohya", "text", "peft", "comfy"])
def test_text_encoder_as_diffusers_loads_it(style: str) -> None:
    torch.manual_seed(0)
    mine = CLIPS["clip"].build(CLIP)
    _, other = unets(SD)
    pipe = pipeline(other, copy.deepcopy(mine))
    found = {f"text_model.{name}": w for name, w in layers(mine, r"_proj$|fc\d$").items()}
    prefix = {"kohya": "lora_te"}.get(style, "text_encoder")
    file = lora("peft" if style == "comfy" else style, prefix, found)
    before = {k: v.clone() for k, v in mine.state_dict().items()}
    if style == "comfy":
        official = "text_encoders.clip_l.transformer"
        renamed = {key.replace("text_encoder", official): value for key, value in file.items()}
        apply_lora(mine, renamed)
    else:
        apply_lora(mine, file)
    pipe.load_lora_weights(dict(file))
    check_fused(mine, {key: Source((key,)) for key in before}, before, pipe, "text_encoder")


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_the_unet_with_a_lora_is_diffusers(fused: bool) -> None:
    model, other = unets(SD)
    file = lora("kohya", "lora_unet", layers(other))
    plain = model(*_inputs())
    apply_lora(model, file, 0.6, fused=fused)
    pipe = pipeline(other)
    pipe.load_lora_weights(dict(file))
    pipe.set_adapters("default_0", 0.6)
    x, t, context = _inputs()
    right = copy.deepcopy(pipe.unet).double()(x.double(), t, context.double()).sample
    theirs = pipe.unet(x, t, context).sample
    assert_within_2x(model(x, t, context), right, theirs)
    assert (theirs - plain).abs().max() > 0.01


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    return x, torch.tensor([7, 600]), torch.randn(2, 5, 64, generator=generator)


# --- one parameter with everything in it ---------------------------------------------------------


class Toy(nn.Module):
    """Rows of three in one weight, two halves, a table and a weight that is read, not called."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(6, 12)
        self.modulation = nn.Linear(6, 8)
        self.conv = nn.Conv1d(6, 5, 1)
        self.table = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        conv = nn.functional.linear(x, self.conv.weight.squeeze(-1))
        return torch.cat([self.qkv(x), self.modulation(x), conv, x @ self.table.T], dim=-1)


def toy_layout(config: Any) -> dict[str, Source]:
    layout = {name: Source((name,)) for name in Toy().state_dict()}
    for kind in ("weight", "bias"):
        keys = tuple(f"attn.{part}.{kind}" for part in ("to_q", "to_k", "to_v"))
        layout[f"qkv.{kind}"] = Source(keys, "rows", (6, 2, 4))
        layout[f"modulation.{kind}"] = Source((f"norm.{kind}",), "swap")
    layout["conv.weight"] = Source(("proj.weight",))
    layout["table"] = Source(("embed.weight",), "transposed")
    return layout


TOY = Family("toy", {}, Toy, (), lambda shapes: None, diffusers=toy_layout)


def toy_file(alpha: float = 3.0) -> dict[str, Tensor]:
    torch.manual_seed(2)
    shapes = {"attn.to_q": (6, 6), "attn.to_v": (4, 6), "norm": (8, 6), "proj": (5, 6)}
    shapes |= {"embed": (6, 4)}
    file = {}
    for name, (rows, columns) in shapes.items():
        down, up, _ = spell("peft", "transformer", name)
        file[down], file[up] = torch.randn(2, columns), torch.randn(rows, 2)
        file[f"transformer.{name}.alpha"] = torch.tensor(alpha)
    return file


def toy_delta(file: dict[str, Tensor]) -> dict[str, Tensor]:
    def full(name: str) -> Tensor:
        down, up, _ = spell("peft", "transformer", name)
        return 1.5 * (file[up] @ file[down])

    qkv = torch.cat([full("attn.to_q"), torch.zeros(2, 6), full("attn.to_v")])
    norm = torch.cat(full("norm").chunk(2)[::-1])
    return {
        "qkv.weight": qkv,
        "modulation.weight": norm,
        "conv.weight": full("proj")[..., None],
        "table": full("embed").T,
    }


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_rows_halves_and_transposed_land_where_the_layout_says(fused: bool) -> None:
    model = Toy()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    file = toy_file()
    apply_lora(model, file, 0.5, family=TOY, fused=fused)
    delta = toy_delta(file)
    wanted = {k: v + 0.5 * delta[k] if k in delta else v for k, v in before.items()}
    right = Toy()
    right.load_state_dict(wanted)
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), right(x))
    state = model.state_dict()
    assert state.keys() == before.keys()
    for key, value in state.items():
        torch.testing.assert_close(value, wanted[key] if fused else before[key])
    # Another scale, and none.
    set_lora_scale(model, "lora", 2.0)
    right.load_state_dict({k: v + 2 * delta[k] if k in delta else v for k, v in before.items()})
    torch.testing.assert_close(model(x), right(x))
    assert loras(model) == {"lora": 2.0}
    remove_lora(model, "lora")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key])
    assert loras(model) == {}
    assert type(model.qkv) is nn.Linear
    assert type(model) is Toy
    assert not dict(model.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_fused_or_not_the_bits_are_the_same(dtype: torch.dtype) -> None:
    model = Toy().to(dtype)
    other = copy.deepcopy(model)
    x = torch.randn(3, 6).to(dtype)
    apply_lora(model, toy_file(), 0.7, family=TOY)
    apply_lora(other, toy_file(), 0.7, family=TOY, fused=False)
    assert torch.equal(model(x), other(x))
    assert torch.equal(model.qkv.weight, other.qkv.weight)
    # The factors keep their precision when the model is converted, and go with a copy.
    moved = copy.deepcopy(other).to(torch.float16)
    buffers = dict(moved.named_buffers())
    assert {b.dtype for k, b in buffers.items() if k.endswith("strength")} == {torch.float64}
    assert {b.dtype for k, b in buffers.items() if k.endswith("_up")} == {torch.float32}
    assert torch.equal(copy.deepcopy(other)(x), other(x))


@torch.no_grad()
def test_originals_come_back_in_any_order() -> None:
    model = Toy().bfloat16()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(3, 6).bfloat16()
    apply_lora(model, toy_file(), family=TOY, name="a", keep_originals=True)
    only_a = model(x)
    apply_lora(model, toy_file(1.0), -0.5, family=TOY, name="b")
    apply_lora(model, toy_file(2.0), 0.5, family=TOY, name="c", fused=False)
    assert loras(model) == {"a": 1.0, "b": -0.5, "c": 0.5}
    with_all = model(x)
    remove_lora(model, "b")
    remove_lora(model, "c")
    assert torch.equal(model(x), only_a)
    apply_lora(model, toy_file(1.0), -0.5, family=TOY, name="b")
    apply_lora(model, toy_file(2.0), 0.5, family=TOY, name="c", fused=False)
    assert torch.equal(model(x), with_all)
    set_lora_scale(model, "a", 3.0)
    set_lora_scale(model, "a", 1.0)
    assert torch.equal(model(x), with_all)
    for name in "acb":
        remove_lora(model, name)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@torch.no_grad()
def test_without_originals_the_weights_come_back_within_rounding() -> None:
    model = Toy()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    apply_lora(model, toy_file(), family=TOY, name="old")
    apply_lora(model, toy_file(1.0), family=TOY, name="new", keep_originals=True)
    remove_lora(model, "old")  # below what was kept
    remove_lora(model, "new")
    for key, value in model.state_dict().items():
        bound = 4 * torch.finfo(torch.float32).eps * (before[key].abs().max() + 10)
        assert (value - before[key]).abs().max() <= bound


def test_alpha_of_pefts_configuration_is_read(tmp_path) -> None:
    from safetensors.torch import save_file

    file = {k: v.contiguous() for k, v in toy_file().items() if not k.endswith("alpha")}
    config = {
        "transformer.r": 2,
        "transformer.lora_alpha": 3,
        "transformer.alpha_pattern": {"to_v": 8, "norm": 2},
    }
    path = tmp_path / "style.safetensors"
    save_file(file, path, {"lora_adapter_metadata": json.dumps(config)})
    model, plain = Toy(), Toy()
    plain.load_state_dict(model.state_dict())
    apply_lora(model, path, family=TOY)
    delta = toy_delta(file)
    delta["qkv.weight"][8:] *= 8 / 3
    delta["modulation.weight"] *= 2 / 3
    for key, value in delta.items():
        added = model.state_dict()[key] - plain.state_dict()[key]
        torch.testing.assert_close(added, value, atol=1e-5, rtol=1e-5)
    save_file(file, path, {"lora_adapter_metadata": json.dumps({"transformer.use_rslora": True})})
    apply_lora(plain, path, family=TOY)
    added = plain.table - model.table + delta["table"]
    torch.testing.assert_close(added, delta["table"] / 1.5 * 2**0.5, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_compiled_a_scale_costs_no_graph_and_a_step_no_lora() -> None:
    model = AUTOENCODER.build(AutoencoderConfig(widths=(32,), num_res_blocks=1)).eval()
    reference = copy.deepcopy(model)
    found = layers(model, r"decoder.*(conv|attn)")
    file = lora("kohya", "lora_unet", found)
    apply_lora(reference, file, 0.5)
    apply_lora(model, file, 0.5, name="style", fused=False)
    fastdiff.compile(model)
    latents = torch.randn(2, 4, 6, 6)

    def check() -> Tensor:
        result = model(latents)
        exact = copy.deepcopy(reference).double()(latents.double())
        assert_within_2x(result, exact, reference(latents))
        return result

    first = check()
    programs = fastdiff.report(model).graphs[0].programs
    assert programs["weights"]["flops"] > 0  # the sums are made there, not in the step
    set_lora_scale(model, "style", 1.25)
    set_lora_scale(reference, "lora", 1.25)
    assert (check() - first).abs().max() > 0.01
    assert fastdiff.report(model).captures == 1
    remove_lora(model, "style")
    remove_lora(reference, "lora")
    check()
    assert fastdiff.report(model).captures == 2


# --- what cannot be ------------------------------------------------------------------------------


def test_everything_that_does_not_fit_is_listed_and_nothing_changes() -> None:
    model, other = unets(SD)
    file = lora("kohya", "lora_unet", layers(other, ATTENTION))
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_"
    file[f"{stem}q.lora_up.weight"] = torch.zeros(64, 9)
    file[f"{stem}k.lora_down.weight"] = torch.zeros(file[f"{stem}k.lora_up.weight"].shape[1], 63)
    file[f"{stem}v.alpha"] = torch.tensor([1.0, 2.0])
    del file[f"{stem}out_0.lora_up.weight"]
    bad = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn9_to_q"
    file[f"{bad}.lora_down.weight"], file[f"{bad}.lora_up.weight"] = torch.zeros(2, 64), None
    file[f"{bad}.lora_up.weight"] = torch.zeros(64, 2)
    file[f"{stem}q.dora_scale"] = torch.zeros(64, 1)
    file["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.zeros(2, 64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="must fit the model, got 8 problems") as caught:
        apply_lora(model, file)
    message = str(caught.value)
    for part in (
        f"{stem}q.lora_up.weight must have rank",
        f"{stem}k.lora_down.weight",
        "must make a weight of shape [64, 64]",
        f"{stem}v.alpha must be one finite number",
        f"{stem}out_0.lora_down.weight has no up",
        f"{bad}.lora_down.weight matches nothing (did you mean",
        f"{bad}.lora_up.weight matches nothing",
        "attn1.to_q'",
        f"{stem}q.dora_scale is no LoRA's down, up or alpha",
        "1 modules of 'text_encoder', and the models given are unet",
    ):
        assert part in message, part
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert loras(model) == {}


def test_an_error_in_the_middle_takes_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdiff.checkpoints import lora as module

    for fused in (True, False):
        model = Toy()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        target, name = (module, "_shift") if fused else (module.lora_live, "add")
        real, calls = getattr(target, name), []

        def failing(*args: Any, real: Any = real, calls: list[int] = calls) -> Any:
            calls.append(1)
            if len(calls) == 4:
                raise MemoryError("full")
            return real(*args)

        with monkeypatch.context() as patched:
            patched.setattr(target, name, failing)
            with pytest.raises(MemoryError, match="full"):
                apply_lora(model, toy_file(), family=TOY, fused=fused, keep_originals=True)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert loras(model) == {}
        assert type(model.qkv) is nn.Linear


def test_bad_arguments_are_named(tmp_path) -> None:
    model = Toy()
    (tmp_path / "a.ckpt").write_bytes(b"\x80\x04")
    (tmp_path / "b.safetensors").write_bytes(b"\x80\x04" * 9)
    file = toy_file()
    for arguments, options, error, message in (
        ((model, file, float("nan")), {"family": TOY}, ValueError, "scale must be a finite number"),
        ((model, file, "1"), {"family": TOY}, ValueError, "scale must be a finite number, got '1'"),
        ((model, file), {}, ValueError, "model of the zoo or a text encoder .* name its family"),
        ((3, file), {"family": TOY}, TypeError, "model must be a module"),
        (({}, file), {}, ValueError, "one denoiser at most"),
        (({"a": model, "b": Toy()}, file), {"family": TOY}, ValueError, "one denoiser at most"),
        (
            (model, tmp_path / "a.ckpt"),
            {"family": TOY},
            ValueError,
            r"must be a \.safetensors file",
        ),
        ((model, tmp_path / "b.safetensors"), {"family": TOY}, ValueError, "whole safetensors"),
        ((model, {}), {"family": TOY}, ValueError, "no tensor of the models given"),
        ((Toy().to("meta"), file), {"family": TOY}, ValueError, "must have floating-point values"),
    ):
        with pytest.raises(error, match=message):
            apply_lora(*arguments, **options)
    assert apply_lora(model, file, family=TOY) == "lora"
    assert apply_lora(model, file, family=TOY) == "lora_2"
    with pytest.raises(ValueError, match=r"name must be one that no LoRA .* 'lora_2'"):
        apply_lora(model, file, family=TOY, name="lora_2")
    with pytest.raises(ValueError, match=r"\('lora', 'lora_2'\), got 'other'"):
        remove_lora(model, "other")


@torch.inference_mode()
def test_in_inference_mode_weights_stay_trainable() -> None:
    for fused in (True, False):
        with torch.inference_mode(False):
            model, x = Toy(), torch.randn(2, 6)
        apply_lora(model, toy_file(), family=TOY, fused=fused)
        set_lora_scale(model, "lora", 0.25)
        with torch.inference_mode(False), torch.enable_grad():
            model(x).sum().backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if n != "conv.bias")


def test_every_spelling_of_a_name_finds_its_model() -> None:
    from fastdiff.checkpoints.lora_files import Model, _component

    def models(*names: str, third: str = "t5") -> list[Model]:
        families = {"text_encoder_2": CLIPS["openclip_g"], "text_encoder_3": CLIPS[third]}
        return [Model(name, nn.Identity(), families.get(name, TOY), None) for name in names]

    sdxl = models("unet", "text_encoder", "text_encoder_2")
    flux = models("transformer", "text_encoder")
    flux.append(Model("text_encoder_2", nn.Identity(), CLIPS["t5"], None))
    for given, module, component, name in (
        (sdxl, "lora_unet_input_blocks_1_0", "unet", "input_blocks_1_0"),
        (sdxl, "lora_te1_text_model_x", "text_encoder", "text_model_x"),
        (sdxl, "lora_te2_text_model_x", "text_encoder_2", "text_model_x"),
        (sdxl, "lora_te_text_model_x", "text_encoder", "text_model_x"),
        (sdxl, "unet.mid_block.attn1.processor.to_q", "unet", "mid_block.attn1.to_q"),
        (sdxl, "text_encoder_2.a.self_attn.to_out", "text_encoder_2", "a.self_attn.out_proj"),
        (sdxl, "mid_block.proj", "unet", "mid_block.proj"),
        (sdxl, "base_model.model.mid_block.proj", "unet", "mid_block.proj"),
        (flux, "diffusion_model.double_blocks.0.img_attn.qkv", "transformer", None),
        (flux, "lora_unet_double_blocks_0_img_attn_qkv", "transformer", None),
        (flux, "lora_transformer_x_embedder", "transformer", "x_embedder"),
        (flux, "transformer.x_embedder", "transformer", "x_embedder"),
        (flux, "text_encoders.t5xxl.transformer.encoder.x", "text_encoder_2", "encoder.x"),
        (flux, "text_encoders.clip_l.transformer.x", "text_encoder", "x"),
        (models("text_encoder"), "unet.x", "unet", "x"),
        (models("text_encoder"), "transformer.x", "transformer", "x"),
        (models("text_encoder"), "text_model.x", "text_encoder", "text_model.x"),
    ):
        found = _component(module, given)
        assert found[0] == component, module
        assert name is None or found[1] == name, module


def test_other_families_take_them_too() -> None:
    """The autoencoder: 1x1 convolutions that are linear layers in diffusers."""
    model = AUTOENCODER.build(AutoencoderConfig(widths=(32,)))
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    stem = "transformer.decoder.mid_block.attentions.0.to_q"
    before = model.decoder.mid.attn_1.q.weight.detach().clone()
    apply_lora(model, {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up})
    added = model.decoder.mid.attn_1.q.weight - before
    torch.testing.assert_close(added, (up @ down)[..., None, None])
