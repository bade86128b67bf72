"""EDM2: the magnitude-preserving U-Net (Karras et al., arXiv 2312.02696), NVlabs/edm2's names.

Every weight has rows of unit magnitude times a gain over sqrt(fan-in) (equation 47), and sums,
concatenations and activations keep the magnitude of what goes in (appendix B.2); nothing has a
bias or a norm with weights. ``EDM2`` is network and preconditioning: ``model(x, sigma, labels)``.

The normalised weights depend on the stored ones alone. ``fastdiff.compile`` computes them once, in
its program of weights; eager code keeps them, one copy of the weights in their dtype, until a
weight changes, and computes them in every call while gradients are needed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastdiff.models.denoiser import Denoiser
from fastdiff.models.edm import check_image, edm_sampling
from fastdiff.models.edm2_blocks import Block, MPConv, MPFourier, mp_cat, mp_silu, mp_sum
from fastdiff.models.edm_blocks import wide
from fastdiff.models.edm_config import EDM2_CONFIGS as CONFIGS
from fastdiff.models.edm_config import EDM2Config
from fastdiff.models.preconditioning import EDMPrecond, class_vectors

__all__ = ["CONFIGS", "EDM2", "EDM2Config", "EDM2Network"]


class EDM2Network(Denoiser):
    """The U-Net: ``network(x, c_noise, class_labels)``; labels as ``preconditioning`` has them."""

    def __init__(self, config: EDM2Config) -> None:
        if not isinstance(config, EDM2Config):
            raise TypeError(
                f"config must be an EDM2Config, as CONFIGS['edm2-img512-s'], got {config!r}"
            )
        super().__init__()
        self.config = config
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(config.noise_channels)
        self.emb_noise = MPConv(config.noise_channels, config.emb_channels)
        labels = config.label_dim
        self.emb_label = MPConv(labels, config.emb_channels) if labels else None
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        widths = [config.model_channels * mult for mult in config.channel_mult]
        width, skips = widths[0], []
        for level, outputs in enumerate(widths):
            res = config.img_resolution >> level
            at, attends = f"{res}x{res}", res in config.attn_resolutions
            if level == 0:
                # One more channel, of ones, stands for the biases that there are none of.
                self.enc[f"{at}_conv"] = MPConv(config.img_channels + 1, width, 3)
            else:
                self.enc[f"{at}_down"] = Block(width, width, config, decoder=False, mode="down")
            skips.append(width)
            for i in range(config.num_blocks):
                made = Block(width, outputs, config, decoder=False, attends=attends)
                self.enc[f"{at}_block{i}"], width = made, outputs
                skips.append(width)
        for level, outputs in reversed(list(enumerate(widths))):
            res = config.img_resolution >> level
            at, attends = f"{res}x{res}", res in config.attn_resolutions
            if level == len(widths) - 1:
                self.dec[f"{at}_in0"] = Block(width, width, config, decoder=True, attends=True)
                self.dec[f"{at}_in1"] = Block(width, width, config, decoder=True)
            else:
                self.dec[f"{at}_up"] = Block(width, width, config, decoder=True, mode="up")
            for i in range(config.num_blocks + 1):
                inputs, width = width + skips.pop(), outputs
                made = Block(inputs, outputs, config, decoder=True, attends=attends)
                self.dec[f"{at}_block{i}"] = made
        self.out_conv = MPConv(width, config.img_channels, 3)

    def prompt(self, class_labels: Tensor | None = None) -> Tensor | None:
        """The labels' part of the embedding, [B or 1, E]."""
        if self.emb_label is None:
            if class_labels is not None:
                raise ValueError("class_labels must be None for a network without labels, got some")
            return None
        classes = self.config.label_dim
        rows = class_vectors(class_labels, classes, self.emb_label.weight) * math.sqrt(classes)
        return self.emb_label(rows)

    def schedule(self, t: Tensor, prompt: Tensor | None) -> list[Tensor]:
        """Every block's factors, [*t.shape, C], in the blocks' order."""
        if prompt is not None and prompt.shape[0] not in (1, t.shape[-1]):
            raise ValueError(
                f"class_labels must have the batch of t, {t.shape[-1]}, or 1, got {prompt.shape[0]}"
            )
        dtype = self.out_gain.dtype
        fourier = self.emb_fourier(t.to(wide(t.dtype))).to(wide(dtype))
        embedding = self.emb_noise(fourier)
        if prompt is not None:
            embedding = mp_sum(embedding, prompt, self.config.label_balance)
        embedding = mp_silu(embedding).to(dtype)
        both = (*self.enc.values(), *self.dec.values())
        blocks = [block for block in both if isinstance(block, Block)]
        return [block.emb_linear(embedding, block.emb_gain) + 1 for block in blocks]

    def step(self, x: Tensor, schedule: list[Tensor], prompt: Tensor | None) -> Tensor:
        check_image(x, self.config.img_channels, self.config.img_resolution, schedule[0])
        factors = iter(schedule)
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        skips = []
        for module in self.enc.values():
            x = module(x, next(factors)) if isinstance(module, Block) else module(x)
            skips.append(x)
        for name, module in self.dec.items():
            if "_block" in name:
                x = mp_cat(x, skips.pop(), self.config.concat_balance)
            x = module(x, next(factors))
        return self.out_conv(x, self.out_gain)


class EDM2(EDMPrecond):
    """``model(x, sigma, class_labels)``: EDM2 and its preconditioning, the clean sample.

    As ``Preconditioned``, with the network's parameters under ``unet.``. ``logvar(sigma)`` is
    u(sigma) of equation 21, the log of the loss's variance, which weighs it in training.
    """

    inner = "unet"

    def __init__(self, config: EDM2Config) -> None:
        super().__init__(EDM2Network(config), config.sigma_data)
        self.logvar_fourier = MPFourier(config.logvar_channels)
        self.logvar_linear = MPConv(config.logvar_channels, 1)
        shape = (config.img_channels, config.img_resolution, config.img_resolution)
        self.sampling = edm_sampling(shape, config.label_dim)

    def logvar(self, sigma: Tensor) -> Tensor:
        """u(sigma), of sigma's shape, float32 or wider."""
        noise = self.scales(sigma.double()).noise.to(wide(sigma.dtype))
        return self.logvar_linear(self.logvar_fourier(noise)).squeeze(-1)
