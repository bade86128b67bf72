"""The sizes of U-Nets and ControlNets, and the public models as a table.

Sources: the configuration files of CompVis/stable-diffusion, Stability-AI/stablediffusion and
Stability-AI/generative-models; the run flags in the READMEs of openai/guided-diffusion and
openai/improved-diffusion (tuples there are resolutions, here levels); SimianLuo/LCM_Dreamshaper_v7.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

LEVELS = ("depths", "num_heads")


@dataclass(frozen=True)
class EncoderConfig:
    """The half that a U-Net and its ControlNet share.

    channels: features of each level, the largest picture first. model_channels: width of the
        sinusoid of the time, the first level's features by default.
    depths: transformer blocks after each resblock of a level; 0: no attention there. With
        AttentionBlocks (no context) at most 1. middle_depth: in the middle, after whose attention
        there is a second resblock; 0: one resblock alone.
    num_heads: heads of each level; the middle has the last level's.
    context_dim: features of the text; None: AttentionBlocks instead of transformers.
    cross_only: levels whose first attention, too, looks at the text.
    linear_projections: a transformer's outer projections are linear layers, not convolutions.
    num_classes: rows of the table of labels (y: [B] integers). vector_dim: features of a vector
        (y: [B, vector_dim]) instead. size_dim: features of each number in that vector (SDXL).
    guidance_dim: features of the sinusoid of a guidance scale (LCM).
    scale_shift: the time scales and shifts the second norm instead of being added before it.
    resblock_updown: resblocks, not convolutions, halve and double the picture.
    split_first: qkv is split before the heads, not after ("new attention order").
    """

    in_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    model_channels: int | None = None
    num_res_blocks: int = 2
    depths: tuple[int, ...] = (1, 1, 1, 0)
    middle_depth: int = 1
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    context_dim: int | None = 768
    cross_only: tuple[int, ...] = ()
    linear_projections: bool = False
    num_classes: int | None = None
    vector_dim: int | None = None
    size_dim: int = 256
    guidance_dim: int | None = None
    num_groups: int = 32
    scale_shift: bool = False
    resblock_updown: bool = False
    split_first: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind = str(field.type)
            if kind.startswith("tuple"):
                least = 0 if field.name in ("depths", "cross_only") else 1
                if not isinstance(value, tuple) or not all(_whole(v, least) for v in value):
                    raise ValueError(
                        f"{field.name} must be a tuple of integers of at least {least}, "
                        f"got {value!r}"
                    )
            elif kind == "bool":
                if not isinstance(value, bool):
                    raise ValueError(f"{field.name} must be True or False, got {value!r}")
            elif not (value is None and "None" in kind):
                least = 0 if field.name == "middle_depth" else 1
                if not _whole(value, least):
                    raise ValueError(
                        f"{field.name} must be an integer of at least {least}, got {value!r}"
                    )
        self._check()
        if self.model_channels == self.channels[0]:
            object.__setattr__(self, "model_channels", None)

    def _check(self) -> None:
        levels = len(self.channels)
        if not levels:
            raise ValueError("channels must name at least one level, got ()")
        for name in LEVELS:
            if len(getattr(self, name)) != levels:
                raise ValueError(f"{name} must have {levels} levels, got {getattr(self, name)}")
        if any(level >= levels or not self.depths[level] for level in self.cross_only):
            raise ValueError(f"cross_only must name levels that attend, got {self.cross_only}")
        for features, heads, depth in zip(self.channels, self.num_heads, self.depths, strict=True):
            if features % self.num_groups:
                raise ValueError(
                    f"channels must be multiples of num_groups {self.num_groups}, got {features}"
                )
            if depth and features % heads:
                raise ValueError(f"channels must be multiples of num_heads {heads}, got {features}")
        if self.middle_depth and self.channels[-1] % self.num_heads[-1]:
            raise ValueError(
                f"channels must be multiples of num_heads {self.num_heads[-1]}, "
                f"got {self.channels[-1]}"
            )
        if self.context_dim is None and max(*self.depths, self.middle_depth) > 1:
            raise ValueError(f"depths must be 0 or 1 without a context_dim, got {self.depths}")
        if self.num_classes is not None and self.vector_dim is not None:
            raise ValueError(f"vector_dim must be None with num_classes, got {self.vector_dim}")
        if self.time_channels % 2:
            raise ValueError(f"model_channels must be even, got {self.time_channels}")
        if self.guidance_dim is not None and (self.guidance_dim % 2 or self.guidance_dim < 4):
            raise ValueError(f"guidance_dim must be even and at least 4, got {self.guidance_dim}")

    @property
    def time_channels(self) -> int:
        return self.model_channels or self.channels[0]

    @property
    def embed_dim(self) -> int:
        """Features of the embedded time."""
        return 4 * self.time_channels


@dataclass(frozen=True)
class UNetConfig(EncoderConfig):
    """A U-Net; out_channels is twice the picture's where the variance is learned."""

    out_channels: int = 4


@dataclass(frozen=True)
class ControlNetConfig(EncoderConfig):
    """A ControlNet: hint_in, channels of the picture that controls; hint_channels: features at 1,
    1/2, 1/4 and 1/8 of its size. global_pool: the residuals are means over the picture."""

    hint_in: int = 3
    hint_channels: tuple[int, ...] = (16, 32, 96, 256)
    global_pool: bool = False


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _adm(
    channels: int,
    multiples: tuple[float, ...],
    attention: tuple[int, ...],
    *,
    heads: int = 0,
    head_channels: int = 0,
    **more: bool | int | None,
) -> UNetConfig:
    """Of guided-diffusion; attention: the levels that attend. Its variance is learned."""
    features = tuple(int(channels * multiple) for multiple in multiples)
    settings = {
        "in_channels": 3,
        "out_channels": 6,
        "model_channels": channels,
        "channels": features,
        "depths": tuple(int(level in attention) for level in range(len(features))),
        "num_heads": tuple(heads or max(1, width // head_channels) for width in features),
        "context_dim": None,
        "scale_shift": True,
        "resblock_updown": True,
    }
    return UNetConfig(**{**settings, **more})  # type: ignore[arg-type]


def _unets() -> dict[str, UNetConfig]:
    sd1 = UNetConfig()
    sd2 = replace(sd1, num_heads=(5, 10, 20, 20), context_dim=1024, linear_projections=True)
    sdxl = UNetConfig(
        channels=(320, 640, 1280),
        depths=(0, 2, 10),
        middle_depth=10,
        num_heads=(5, 10, 20),
        context_dim=2048,
        linear_projections=True,
        vector_dim=2816,
    )
    refiner = UNetConfig(
        channels=(384, 768, 1536, 1536),
        depths=(0, 4, 4, 0),
        middle_depth=4,
        num_heads=(6, 12, 24, 24),
        context_dim=1280,
        linear_projections=True,
        vector_dim=2560,
    )
    upscaler = UNetConfig(
        in_channels=7,
        channels=(256, 512, 512, 1024),
        depths=(0, 1, 1, 1),
        context_dim=1024,
        cross_only=(1, 2),
        linear_projections=True,
        num_classes=1000,
    )
    table = {
        "sd1": sd1,
        "sd1-inpainting": replace(sd1, in_channels=9),
        "sd2": sd2,
        "sd2-inpainting": replace(sd2, in_channels=9),
        "sd-x4-upscaler": upscaler,
        "sdxl": sdxl,
        "sdxl-inpainting": replace(sdxl, in_channels=9),
        "sdxl-refiner": refiner,
        "lcm-sd1": replace(sd1, guidance_dim=256),
        "lcm-sdxl": replace(sdxl, guidance_dim=256),
    }
    small, large = (1, 2, 3, 4), (1, 1, 2, 2, 4, 4)
    classes = {"num_classes": 1000}
    more = {"num_res_blocks": 3, "split_first": True}
    table["adm-64"] = _adm(192, small, (1, 2, 3), head_channels=64, **more, **classes)
    table["adm-128"] = _adm(256, (1, 1, 2, 3, 4), (2, 3, 4), heads=4, **classes)
    table["adm-256-uncond"] = _adm(256, large, (3, 4, 5), head_channels=64)
    table["adm-256"] = replace(table["adm-256-uncond"], num_classes=1000)
    table["adm-512"] = _adm(256, (0.5, 1, 1, 2, 2, 4, 4), (4, 5, 6), head_channels=64, **classes)
    table["adm-lsun"] = table["adm-256-uncond"]
    table["adm-64-256-upsampler"] = _adm(192, large, (3, 4, 5), heads=4, in_channels=6, **classes)
    table["adm-128-512-upsampler"] = _adm(
        192, large, (4, 5), head_channels=64, in_channels=6, **classes
    )
    plain = {"resblock_updown": False, "heads": 4}
    improved = {"num_res_blocks": 3, **plain}
    table["improved-cifar10"] = _adm(128, (1, 2, 2, 2), (1, 2), **improved)
    table["improved-imagenet64"] = _adm(128, small, (2, 3), **improved)
    table["improved-imagenet64-cond"] = _adm(192, small, (2, 3), **improved, **classes)
    table["improved-64-256-upsampler"] = _adm(192, large, (4, 5), in_channels=6, **plain, **classes)
    table["improved-lsun"] = _adm(
        128, large, (4,), resblock_updown=False, scale_shift=False, heads=1
    )
    return table


def _controls() -> dict[str, ControlNetConfig]:
    def control(unet: UNetConfig) -> ControlNetConfig:
        shared = {field.name: getattr(unet, field.name) for field in fields(EncoderConfig)}
        return ControlNetConfig(**shared)

    return {f"controlnet-{name}": control(CONFIGS[name]) for name in ("sd1", "sd2", "sdxl")}


CONFIGS = _unets()
CONTROLS = _controls()
