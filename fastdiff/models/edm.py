"""EDM's networks: DDPM++, NCSN++ and ADM, with the parameter names of NVlabs/edm.

Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv
2206.00364; DDPM++ and NCSN++: Song et al., arXiv 2011.13456; ADM: Dhariwal and Nichol, arXiv
2105.05233. The networks take x and the noise label c_noise; ``build`` puts the preconditioning of
``preconditioning.py`` around them, which takes sigma and returns the clean sample.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.denoiser import Denoiser
from fastdiff.models.edm_blocks import (
    Conv2d,
    Filter,
    FourierEmbedding,
    UNetBlock,
    make_norm,
    wide,
    wide_linear,
)
from fastdiff.models.edm_config import EDM_CONFIGS as CONFIGS
from fastdiff.models.edm_config import EDMConfig
from fastdiff.models.layers import group_norm, sinusoid
from fastdiff.models.preconditioning import PRECONDITIONING, Preconditioned, class_vectors

__all__ = ["CONFIGS", "EDMConfig", "EDMNetwork", "build"]

HEAD = 64  # channels of one of ADM's heads


class EDMNetwork(Denoiser):
    """The U-Net of a configuration: ``network(x, c_noise, class_labels, augment_labels)``.

    x: [B, C, R, R]; c_noise: [B]. class_labels: [B] integers 0..label_dim (label_dim: no label),
    [B, label_dim] numbers, or None: no label. augment_labels: [B, augment_dim] or None.
    """

    def __init__(self, config: EDMConfig) -> None:
        if not isinstance(config, EDMConfig):
            raise TypeError(
                f"config must be an EDMConfig, as CONFIGS['edm-cifar10-32x32-cond-vp'], "
                f"got {config!r}"
            )
        super().__init__()
        self.config = config
        self.adm = config.network == "adm"
        channels = config.model_channels
        embedding, noise = channels * config.channel_mult_emb, channels * config.channel_mult_noise
        fourier = config.embedding_type == "fourier"
        self.map_noise = FourierEmbedding(noise) if fourier else None
        self.map_label: nn.Linear | None = None
        self.map_augment: nn.Linear | None = None
        if config.label_dim:
            width = embedding if self.adm else noise
            self.map_label = nn.Linear(config.label_dim, width, bias=not self.adm)
        if config.augment_dim:
            self.map_augment = nn.Linear(config.augment_dim, noise, bias=False)
        self.map_layer0 = nn.Linear(noise, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self._fill(embedding)

    def _fill(self, embedding: int) -> None:
        """The encoder and the decoder, level by level; R x R in a name is the level's size."""
        config = self.config
        taps, last = config.resample_filter, len(config.channel_mult) - 1
        kind: dict[str, Any] = {"adaptive": True} if self.adm else {}
        if not self.adm:
            kind = {"project": True, "skip_scale": math.sqrt(0.5), "eps": 1e-6, "taps": taps}

        def block(
            inputs: int, outputs: int, mode: str = "keep", attends: bool = False
        ) -> UNetBlock:
            heads = (outputs // HEAD if self.adm else 1) if attends else 0
            return UNetBlock(inputs, outputs, embedding, mode=mode, num_heads=heads, **kind)

        aux = config.img_channels
        width = config.model_channels * (config.channel_mult[0] if self.adm else 1)
        skips = []
        for level, mult in enumerate(config.channel_mult):
            res = config.img_resolution >> level
            at = f"{res}x{res}"
            if level == 0:
                self.enc[f"{at}_conv"] = Conv2d(config.img_channels, width, 3)
            else:
                self.enc[f"{at}_down"] = block(width, width, "down")
                if config.encoder_type == "skip":
                    self.enc[f"{at}_aux_down"] = Filter(taps, "down")
                    self.enc[f"{at}_aux_skip"] = Conv2d(aux, width, 1)
                elif config.encoder_type == "residual":
                    made = Conv2d(aux, width, 3, "down", taps, fused=True)
                    self.enc[f"{at}_aux_residual"] = made
                    aux = width
            skips.append(width)
            for i in range(config.num_blocks):
                inputs, width = width, config.model_channels * mult
                attends = res in config.attn_resolutions
                self.enc[f"{at}_block{i}"] = block(inputs, width, attends=attends)
                skips.append(width)
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            res = config.img_resolution >> level
            at = f"{res}x{res}"
            if level == last:
                self.dec[f"{at}_in0"] = block(width, width, attends=True)
                self.dec[f"{at}_in1"] = block(width, width)
            else:
                self.dec[f"{at}_up"] = block(width, width, "up")
            for i in range(config.num_blocks + 1):
                inputs, width = width + skips.pop(), config.model_channels * mult
                attends = res in config.attn_resolutions and (self.adm or i == config.num_blocks)
                self.dec[f"{at}_block{i}"] = block(inputs, width, attends=attends)
            if not self.adm and (config.decoder_type == "skip" or level == 0):
                if config.decoder_type == "skip" and level < last:
                    self.dec[f"{at}_aux_up"] = Filter(taps, "up")
                self.dec[f"{at}_aux_norm"] = make_norm(width, 1e-6)
                self.dec[f"{at}_aux_conv"] = Conv2d(width, config.out_channels, 3)
        if self.adm:
            self.out_norm = make_norm(width, 1e-5)
            self.out_conv = Conv2d(width, config.out_channels, 3)

    def prompt(
        self, class_labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The labels' parts of the embedding, [B or 1, E]; nothing for a network without them."""
        result = {}
        if self.map_label is not None:
            weight = self.map_label.weight
            labels = class_vectors(class_labels, self.config.label_dim, weight)
            if not self.adm:
                labels = labels * math.sqrt(self.config.label_dim)
            result["class_labels"] = wide_linear(self.map_label, labels)
        elif class_labels is not None:
            raise ValueError("class_labels must be None for a network without labels, got some")
        if augment_labels is not None:
            dim = self.config.augment_dim
            if self.map_augment is None:
                raise ValueError("augment_labels must be None for a network without them, got some")
            if augment_labels.dim() != 2 or augment_labels.shape[1] != dim:
                raise ValueError(
                    f"augment_labels must have shape [B, {dim}], got {list(augment_labels.shape)}"
                )
            augment = augment_labels.to(wide(self.map_augment.weight.dtype))
            result["augment_labels"] = wide_linear(self.map_augment, augment)
        return result

    def schedule(self, t: Tensor, prompt: dict[str, Tensor]) -> list[Tensor]:
        """Every block's affine of the embedding, [*t.shape, E], in the blocks' order."""
        dtype = wide(self.map_layer0.weight.dtype)
        for name, rows in prompt.items():
            if rows.shape[0] not in (1, t.shape[-1]):
                raise ValueError(
                    f"{name} must have the batch of t, {t.shape[-1]}, or 1, got {rows.shape[0]}"
                )
        embedding = self._noise(t.to(wide(t.dtype))).to(dtype)
        late = self.adm and "class_labels" in prompt
        for name, rows in prompt.items():
            if not (late and name == "class_labels"):
                embedding = embedding + rows
        embedding = wide_linear(self.map_layer1, F.silu(wide_linear(self.map_layer0, embedding)))
        if late:
            embedding = embedding + prompt["class_labels"]
        embedding = F.silu(embedding).to(self.map_layer0.weight.dtype)
        both = (*self.enc.values(), *self.dec.values())
        return [block.affine(embedding) for block in both if isinstance(block, UNetBlock)]

    def _noise(self, t: Tensor) -> Tensor:
        if self.map_noise is not None:
            return self.map_noise(t)
        width = self.map_layer0.in_features
        return sinusoid(t, width, cos_first=self.adm, shift=0.0 if self.adm else 1.0)

    def step(self, x: Tensor, schedule: list[Tensor], prompt: dict[str, Tensor]) -> Tensor:
        check_image(x, self.config.img_channels, self.config.img_resolution, schedule[0])
        affine = iter(schedule)
        skips: list[Tensor] = []
        aux = x
        for name, module in self.enc.items():
            if name.endswith("_aux_down"):
                aux = module(aux)
            elif name.endswith("_aux_skip"):
                x = skips[-1] = x + module(aux)
            elif name.endswith("_aux_residual"):
                x = skips[-1] = aux = (x + module(aux)) * math.sqrt(0.5)
            else:
                x = module(x, next(affine)) if isinstance(module, UNetBlock) else module(x)
                skips.append(x)
        out: Tensor | None = None
        normed = x
        for name, module in self.dec.items():
            if name.endswith("_aux_up"):
                out = module(out)
            elif name.endswith("_aux_norm"):
                normed = group_norm(module, x)  # type: ignore[arg-type]
            elif name.endswith("_aux_conv"):
                out = module(normed) if out is None else module(normed) + out
            else:
                if "_block" in name:
                    x = torch.cat([x, skips.pop()], 1)
                x = module(x, next(affine))
        if self.adm:
            return self.out_conv(group_norm(self.out_norm, x))
        assert out is not None
        return out


def check_image(x: Tensor, channels: int, size: int, rows: Tensor) -> None:
    """ValueError unless x is [B, C, S, S] with the batch of the schedule's ``rows`` [B, E]."""
    if x.dim() != 4 or list(x.shape[1:]) != [channels, size, size]:
        raise ValueError(f"x must have shape [B, {channels}, {size}, {size}], got {list(x.shape)}")
    if rows.dim() != 2 or rows.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"t must have shape [{x.shape[0]}], got {list(rows.shape[:-1])}")


def build(config: EDMConfig) -> Preconditioned:
    """The model of a configuration, network and preconditioning: model(x, sigma, class_labels)."""
    network = EDMNetwork(config)
    model = PRECONDITIONING[config.precond](network)
    shape = (config.img_channels, config.img_resolution, config.img_resolution)
    model.sampling = edm_sampling(shape, config.label_dim)
    return model


def edm_sampling(shape: tuple[int, int, int], num_classes: int) -> Any:
    """EDM's defaults for ``fastdiff.sample``: 0.002..80 on Karras' grid, the model gives x0."""
    from fastdiff.models.weights import Sampling

    return Sampling(
        schedule="edm", prediction="x0", grid="karras", shape=shape, num_classes=num_classes
    )
