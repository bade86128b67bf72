"""``fastdiff.load`` and ``inspect`` on files and folders of real families, in tiny sizes."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastdiff
from fastdiff.checkpoints import hub
from fastdiff.checkpoints.family import written
from fastdiff.checkpoints.inspection import inspect
from fastdiff.checkpoints.layouts import families
from fastdiff.models.autoencoder import CONFIGS as AUTOENCODERS
from fastdiff.models.autoencoder import AutoencoderKL
from fastdiff.models.unet import UNet
from fastdiff.models.unet_configs import UNetConfig
from fastdiff.pipelines import Pipeline

UNET = UNetConfig(
    channels=(32, 64), depths=(1, 0), num_heads=(8, 8), context_dim=32, num_res_blocks=1
)
VAE = replace(AUTOENCODERS["sd1"], widths=(32, 64))
FAMILIES = {family.name: family for family in families()}


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1
    return model


def same(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def clip() -> tuple[nn.Module, Any]:
    pytest.importorskip("transformers")
    from fastdiff.checkpoints.layouts.text import ClipConfig, build_clip

    config = ClipConfig(width=64, inner=64, layers=2, heads=1, vocab_size=99)
    return randomised(build_clip(config)), config


def single(path: Path, *parts: tuple[str, dict[str, Tensor]], dtype: Any = None) -> Path:
    tensors = {
        prefix + name: value.to(dtype or value.dtype).contiguous().clone()
        for prefix, state in parts
        for name, value in state.items()
    }
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    text, config = clip()
    layout = FAMILIES["clip"].layout("official", config)
    return {
        "unet": randomised(UNet(UNET)),
        "vae": randomised(AutoencoderKL(VAE)),
        "text_encoder": text,
        "official_text": written(layout, text.state_dict()),
    }


def parts_of(models: dict[str, Any]) -> list[tuple[str, dict[str, Tensor]]]:
    return [
        ("model.diffusion_model.", models["unet"].state_dict()),
        ("first_stage_model.", models["vae"].state_dict()),
        ("cond_stage_model.transformer.", models["official_text"]),
    ]


LEFT = {
    "betas": torch.zeros(9),
    "model_ema.decay": torch.zeros(1),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
}


def parts(path: Path, *names: str) -> dict[str, Any]:
    """Models of a pipeline, each loaded by itself."""
    return {name: fastdiff.load(path, component=name) for name in names}


def test_single_file(tmp_path: Path, models: dict[str, Any]) -> None:
    path = single(tmp_path / "sd.safetensors", *parts_of(models), ("", LEFT))
    assert isinstance(fastdiff.load(path), Pipeline)
    found = parts(path, "unet", "vae", "text_encoder")
    for name, model in found.items():
        same(models[name], model)
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
    assert found["unet"].config == UNET
    sampling = found["unet"].sampling
    assert (sampling.schedule, sampling.prediction, sampling.shape) == (
        *("scaled_linear", "eps"),
        (4, 64, 64),
    )
    assert fastdiff.load(path, component="unet", prediction="v").sampling.prediction == "v"
    report = inspect(path)
    assert report.ok
    assert report.ignored == 2
    assert "unet: unet (no public size), official names after model.diffusion_model." in str(report)
    with pytest.raises(ValueError, match="component must be one of unet, vae, text_encoder, got"):
        fastdiff.load(path, component="tokenizer")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_is_the_files_own_unless_asked(tmp_path, models, dtype) -> None:
    path = single(tmp_path / "unet.safetensors", parts_of(models)[0], dtype=dtype)
    assert {p.dtype for p in fastdiff.load(path).parameters()} == {dtype}
    model = fastdiff.load(path, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.out[2].weight, models["unet"].out[2].weight.to(dtype).float())


def test_one_error_for_each_component_and_for_names_of_none(tmp_path, models) -> None:
    parts = parts_of(models)
    tensors = {prefix + name: value for prefix, state in parts for name, value in state.items()}
    path = single(
        tmp_path / "sd.safetensors", ("", tensors), ("", {"stranger.weight": LEFT["betas"]})
    )
    with pytest.raises(ValueError, match=r"nothing else, got:\n  unknown stranger\.weight"):
        fastdiff.load(path)
    assert not inspect(path).ok
    gone = "model.diffusion_model.middle_block.0.in_layers.2.bias"
    single(path, ("", {name: value for name, value in tensors.items() if name != gone}))
    with pytest.raises(ValueError, match=r"missing middle_block\.0\.in_layers\.2\.bias"):
        fastdiff.load(path)
    report = inspect(path)
    assert report.parts[0].differences.missing == ("middle_block.0.in_layers.2.bias",)
    assert "1 missing, 0 unknown, 0 wrong:" in str(report)


def test_the_autoencoder_has_the_scale_of_the_denoiser_it_is_with(tmp_path: Path) -> None:
    xl = randomised(UNet(replace(UNET, vector_dim=80, size_dim=8)))
    vae = randomised(AutoencoderKL(VAE)).state_dict()
    path = single(
        tmp_path / "sdxl.safetensors",
        ("model.diffusion_model.", xl.state_dict()),
        ("first_stage_model.", vae),
    )
    found = parts(path, "unet", "vae")
    assert found["vae"].config.scaling == AUTOENCODERS["sdxl"].scaling
    assert found["unet"].sampling.shape == (4, 128, 128)
    alone = fastdiff.load(single(tmp_path / "vae.safetensors", ("", vae)))
    assert alone.config.scaling == AUTOENCODERS["sd1"].scaling


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that diffusers and transformers write."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipeline")
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        layers_per_block=1,
        norm_num_groups=8,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=[16, 32],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=8,
    )
    config = transformers.CLIPTextConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=99,
    )
    pipe = diffusers.StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=transformers.CLIPTextModel(config),
        tokenizer=None,
        scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    pipe.save_pretrained(folder, variant="fp16")
    unet.save_pretrained(folder / "sharded", max_shard_size="500KB")
    return folder


def test_diffusers_pipeline(pipeline: Path) -> None:
    assert isinstance(fastdiff.load(pipeline), Pipeline)
    found = parts(pipeline, "unet", "vae", "text_encoder")
    assert found["unet"].sampling.prediction == "v"  # the scheduler says it
    theirs = load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    layout = FAMILIES["unet"].layout("diffusers", found["unet"].config)
    ours = written(layout, found["unet"].state_dict())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    report = inspect(pipeline)
    assert report.ok
    assert report.kind == "pipeline"
    assert report.others == ("scheduler",)


def test_component_folders_variants_and_shards(pipeline: Path) -> None:
    unet = fastdiff.load(pipeline / "unet")
    same(unet, fastdiff.load(pipeline / "unet", variant="fp16"))
    same(unet, fastdiff.load(pipeline / "sharded"))
    same(unet, fastdiff.load(pipeline / "unet" / "diffusion_pytorch_model.safetensors"))
    assert isinstance(fastdiff.load(pipeline / "vae"), AutoencoderKL)
    assert type(fastdiff.load(pipeline / "text_encoder")).__name__ == "CLIPTextModel"
    assert fastdiff.load(pipeline, component="vae").config.scaling == 0.18215


def test_folders_of_unknown_models_are_named(pipeline: Path, tmp_path: Path) -> None:
    index = (pipeline / "model_index.json").read_text()
    for file in pipeline.iterdir():
        if file.name != "model_index.json":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "model_index.json").write_text(index.replace("UNet2DConditionModel", "PriorModel"))
    with pytest.raises(
        ValueError, match=r"unet must be one of .*UNet2DConditionModel.* PriorModel"
    ):
        fastdiff.load(tmp_path)
    assert fastdiff.load(tmp_path, component="vae") is not None


@pytest.mark.parametrize("name", ["dit", "mmdit", "flux", "edm", "video_dit", "controlnet"])
def test_every_other_family_is_recognised_by_its_own_names(name: str, tmp_path: Path) -> None:
    """The largest public configuration on the meta device: names and shapes alone."""
    family = FAMILIES[name]
    for config in list(family.configs.values())[:2]:
        with torch.device("meta"):
            state = family.build(config).state_dict()
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        first = [f.name for f in families() if f.recognise(shapes) is not None]
        assert first == [name]


class FakeHub(types.ModuleType):
    """huggingface_hub with one repository, whose files are in a folder."""

    def __init__(self, folder: Path, error: Exception | None = None) -> None:
        super().__init__("huggingface_hub")
        self.folder, self.error, self.asked = folder, error, []
        self.errors = types.ModuleType("huggingface_hub.errors")
        self.errors.RepositoryNotFoundError = type("NotFound", (Exception,), {})

    def HfApi(self) -> Any:
        def model_info(repository: str, revision: str | None, timeout: float) -> Any:
            if self.error is not None:
                raise self.error
            names = [str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file()]
            files = [types.SimpleNamespace(rfilename=name) for name in names]
            return types.SimpleNamespace(siblings=files)

        return types.SimpleNamespace(model_info=model_info)

    def snapshot_download(self, repository: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise FileNotFoundError(repository)
        self.asked = options["allow_patterns"]
        return str(self.folder)


@pytest.fixture
def fake_hub(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(pipeline)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", fake.errors)
    return fake


def test_repository(fake_hub: FakeHub) -> None:
    assert set(fastdiff.load("owner/name").modules()) == {"denoiser", "autoencoder"}
    assert "unet/diffusion_pytorch_model.safetensors" in fake_hub.asked
    assert "unet/config.json" in fake_hub.asked
    assert not [name for name in fake_hub.asked if "fp16" in name and name.endswith(".safetensors")]


def test_repository_that_is_not_there(fake_hub: FakeHub) -> None:
    fake_hub.error = fake_hub.errors.RepositoryNotFoundError("404")
    with pytest.raises(ValueError, match=r"must be a path, or a repository .* got 'owner/name'"):
        fastdiff.load("owner/name")
    fake_hub.error = RuntimeError("no network")
    with pytest.raises(ConnectionError, match=r"does not answer \(no network\)"):
        fastdiff.load("owner/name")


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        fastdiff.load("owner/name")


def test_which_files_of_a_repository() -> None:
    files = [
        *("model_index.json", "v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "README.md", "run.py"),
        *("unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        *("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin"),
        *("unet/diffusion_pytorch_model.non_ema.safetensors", "tokenizer/merges.txt"),
        *("tokenizer_2/spiece.model", "transformer/model-00001-of-00002.safetensors"),
    ]
    assert set(hub.wanted(files)) == {
        *("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        *("tokenizer/merges.txt", "tokenizer_2/spiece.model"),
        "transformer/model-00001-of-00002.safetensors",
    }
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in hub.wanted(files, "fp16")
    assert hub.wanted(["a.safetensors", "config.json"]) == ["config.json", "a.safetensors"]


def test_without_transformers_a_file_is_inspected_but_for_its_text_encoder(
    tmp_path: Path, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = single(tmp_path / "sd.safetensors", *parts_of(models))
    monkeypatch.setitem(sys.modules, "transformers", None)
    report = inspect(path)
    assert not report.ok
    assert str(report).count("complete: every tensor is there, and fits") == 2
    assert "not checked: text encoders need transformers" in str(report)
    same(models["unet"], fastdiff.load(path, component="unet"))
