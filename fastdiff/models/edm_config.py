"""The configurations of EDM's and EDM2's networks, and their tables of public checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

CHOICES = {
    "network": ("song", "adm"),
    "precond": ("edm", "vp", "ve", "iddpm"),
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "skip", "residual"),
    "decoder_type": ("standard", "skip"),
}


@dataclass(frozen=True)
class EDMConfig:
    """A network and its preconditioning.

    network: "song" (DDPM++, NCSN++) or "adm". precond: "edm", "vp", "ve" or "iddpm" (twice the
    output channels, of which the first half counts). label_dim, augment_dim: 0 for none.
    attn_resolutions: sides of the feature maps with self-attention (the smallest map's first
    decoder block always has it). embedding_type to resample_filter: DDPM++ is positional,
    standard, standard, noise 1, (1, 1); NCSN++ is fourier, residual, standard, noise 2,
    (1, 3, 3, 1); ADM has none of these choices.
    """

    network: str = "song"
    precond: str = "edm"
    img_resolution: int = 32
    img_channels: int = 3
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    embedding_type: str = "positional"
    channel_mult_noise: int = 1
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: tuple[int, ...] = (1, 1)

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        check_sizes(self, at_least_0=("label_dim", "augment_dim"))
        if self.model_channels % 4:
            raise ValueError(f"model_channels must be a multiple of 4, got {self.model_channels}")
        if len(self.resample_filter) % 2:
            raise ValueError(
                f"resample_filter must have an even length, got {self.resample_filter}"
            )
        if self.network == "adm":
            plain = EDMConfig.__dataclass_fields__
            for name in (*list(CHOICES)[2:], "channel_mult_noise", "resample_filter"):
                if getattr(self, name) != plain[name].default:
                    raise ValueError(
                        f"{name} must be {plain[name].default!r} for network 'adm', "
                        f"got {getattr(self, name)!r}"
                    )

    @property
    def out_channels(self) -> int:
        """Of the network; iDDPM's second half is the variance, which nothing here uses."""
        return self.img_channels * (2 if self.precond == "iddpm" else 1)


def check_sizes(config: Any, at_least_0: tuple[str, ...] = ()) -> None:
    """ValueError unless the integers of a configuration are positive, or at least 0, and the
    resolution can be halved for every level after the first."""
    for field in fields(config):
        value = getattr(config, field.name)
        least = 0 if field.name in (*at_least_0, "attn_resolutions") else 1
        if field.type in ("tuple[int, ...]", "int"):
            many = field.type != "int"
            numbers = value if many and isinstance(value, tuple) else (value,)
            if not all(type(number) is int and number >= least for number in numbers):
                kind = "a tuple of integers" if many else "an integer"
                raise ValueError(f"{field.name} must be {kind} from {least} up, got {value!r}")
            if many and not value and field.name != "attn_resolutions":
                raise ValueError(f"{field.name} must not be empty, got {value!r}")
    halvings = len(config.channel_mult) - 1
    if config.img_resolution % 2**halvings:
        raise ValueError(
            f"img_resolution must be a multiple of {2**halvings} for {halvings + 1} levels, "
            f"got {config.img_resolution}"
        )


def _edm_configs() -> dict[str, EDMConfig]:
    """The public checkpoints. "edm" ones: the training options in the repository's README;
    "baseline" ones: the networks of arXiv 2011.13456 and 2105.05233 they were converted from."""
    vp: dict[str, Any] = {}
    ve: dict[str, Any] = {
        "embedding_type": "fourier",
        "encoder_type": "residual",
        "channel_mult_noise": 2,
        "resample_filter": (1, 3, 3, 1),
    }
    adm: dict[str, Any] = {
        "network": "adm",
        "img_resolution": 64,
        "label_dim": 1000,
        "model_channels": 192,
        "channel_mult": (1, 2, 3, 4),
        "num_blocks": 3,
        "attn_resolutions": (32, 16, 8),
    }
    table = {}
    for name, kind in (("vp", vp), ("ve", ve)):
        for cond, labels in (("cond", 10), ("uncond", 0)):
            table[f"edm-cifar10-32x32-{cond}-{name}"] = EDMConfig(
                **kind, label_dim=labels, augment_dim=9
            )
        small = EDMConfig(**kind, img_resolution=64, channel_mult=(1, 2, 2, 2), augment_dim=9)
        for data in ("ffhq", "afhqv2"):
            table[f"edm-{data}-64x64-uncond-{name}"] = small
        table[f"baseline-cifar10-32x32-uncond-{name}"] = EDMConfig(
            **kind, precond=name, channel_mult=(1, 2, 2, 2)
        )
    table["edm-imagenet-64x64-cond-adm"] = EDMConfig(**adm)
    table["baseline-imagenet-64x64-cond-adm"] = EDMConfig(**adm, precond="iddpm")
    return table


EDM_CONFIGS = _edm_configs()


@dataclass(frozen=True)
class EDM2Config:
    """An EDM2 network; those for 512x512 see Stable Diffusion's latents.

    The latents z, before Stable Diffusion's own factor, as (z - m)/(2 s) with m = (5.81, 3.25,
    0.12, -2.15) and s = (4.17, 4.62, 3.71, 3.28).

    channel_mult_noise, channel_mult_emb: of the embeddings; 0: the first and the largest of
    channel_mult. Balances: t of the magnitude-preserving sums, 0 for the first operand alone.
    clip_act: bound on a block's result; 0 for none. sigma_data: of the preconditioning.
    """

    img_resolution: int = 64
    img_channels: int = 4
    label_dim: int = 1000
    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    channel_mult_noise: int = 0
    channel_mult_emb: int = 0
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (16, 8)
    channels_per_head: int = 64
    label_balance: float = 0.5
    concat_balance: float = 0.5
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float = 256.0
    logvar_channels: int = 128
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_sizes(self, at_least_0=("label_dim", "channel_mult_noise", "channel_mult_emb"))
        for name in ("label_balance", "concat_balance", "res_balance", "attn_balance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)!r}")
        for name, least in (("clip_act", 0), ("sigma_data", 1e-6)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= least):
                raise ValueError(f"{name} must be finite and at least {least}, got {value!r}")

    @property
    def noise_channels(self) -> int:
        return self.model_channels * (self.channel_mult_noise or self.channel_mult[0])

    @property
    def emb_channels(self) -> int:
        return self.model_channels * (self.channel_mult_emb or max(self.channel_mult))


WIDTHS = {"xxs": 64, "xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}


def _edm2_configs() -> dict[str, EDM2Config]:
    """Table 2 of the paper; "-uncond": the unconditional models that guide the others."""
    table = {}
    for size, width in WIDTHS.items():
        table[f"edm2-img512-{size}"] = EDM2Config(model_channels=width)
        if size not in ("xxs", "xxl"):
            table[f"edm2-img64-{size}"] = EDM2Config(model_channels=width, img_channels=3)
    for size in ("xs", "s"):
        name = f"edm2-img512-{size}-uncond"
        table[name] = EDM2Config(model_channels=WIDTHS[size], label_dim=0)
    return table


EDM2_CONFIGS = _edm2_configs()
