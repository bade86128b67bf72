"""What is sampled, as data: the public models, their sizes, schedulers and steps.

FLOPs are counted in the run (`pairs.Pair.flops`), multiply and add as two; ``call_tflop`` is what
the targets were set with, at batch 1, for comparison. CPU workloads keep the layout of the public
model and are smaller in what ``size`` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastdiff.models import autoencoder, dit, flux, mmdit, unet

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EULER = {
    "_class_name": "EulerDiscreteScheduler", **SD,
    "timestep_spacing": "leading", "steps_offset": 1,
}  # fmt: skip
DDIM = {
    "_class_name": "DDIMScheduler", "beta_schedule": "linear", "beta_start": 1e-4,
    "beta_end": 0.02, "clip_sample": False,
}  # fmt: skip
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
FLUX_DEV = {
    **FLOW, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15,
    "base_image_seq_len": 256, "max_image_seq_len": 4096,
}  # fmt: skip
FLUX_SCHNELL = {**FLOW, "shift": 1.0}


@dataclass(frozen=True)
class Workload:
    """One model, one picture size, one number of steps.

    family: a file of fastdiff/checkpoints/layouts; config: of that family's zoo model. latent:
    [C, h, w] of one picture. steps: 0 for a decoder alone. guidance: not 1: two evaluations a step,
    as one batch. embedded: the guidance scale that is an input of the model. tokens: of the text.
    vae: the autoencoder that makes pictures of the latents at the end of a run, or None.
    """

    name: str
    family: str
    config: Any
    latent: tuple[int, int, int]
    steps: int
    scheduler: Mapping[str, Any] = field(default_factory=dict, hash=False)
    guidance: float = 1.0
    embedded: float | None = None
    tokens: int = 77
    vae: Any = None
    cache: str = ""
    call_tflop: float | None = None
    size: str = ""

    @property
    def rows(self) -> int:
        """Of the batch that the model sees, for each picture."""
        return 1 if self.guidance == 1 else 2

    @property
    def convolutional(self) -> bool:
        return self.family in ("unet", "autoencoder")


# As diffusers runs the public weights of DiT.
_DIT: dict[str, Any] = {"frequency_shift": 1.0, "mlp_norm_eps": 1e-5}
_VAE = autoencoder.CONFIGS
GPU = (
    Workload(
        "SD1.5 512", "unet", unet.CONFIGS["sd1"], (4, 64, 64), 20, EULER, 7.5,
        vae=_VAE["sd1"], cache="deepcache", call_tflop=1.607,
    ),
    Workload(
        "SDXL 1024", "unet", unet.CONFIGS["sdxl"], (4, 128, 128), 30, EULER, 5.0,
        vae=_VAE["sdxl"], cache="deepcache", call_tflop=13.52,
    ),
    Workload(
        "FLUX.1-dev 1024", "flux", flux.CONFIGS["FLUX.1-dev"], (16, 128, 128), 28, FLUX_DEV,
        embedded=3.5, tokens=512, cache="first_block", call_tflop=74.4,
    ),
    Workload(
        "SD3-medium 1024", "mmdit", mmdit.CONFIGS["SD3-medium"], (16, 128, 128), 28, FLOW, 7.0,
        tokens=333, cache="first_block", call_tflop=17.81,
    ),
    Workload(
        "DiT-XL/2 256", "dit", replace(dit.CONFIGS["DiT-XL/2"], **_DIT), (4, 32, 32), 50, DDIM,
        4.0, cache="first_block", call_tflop=0.475,
    ),
    Workload(
        "DiT-XL/2 512", "dit", replace(dit.CONFIGS["DiT-XL/2-512"], **_DIT), (4, 64, 64), 50, DDIM,
        4.0, cache="first_block", call_tflop=2.098,
    ),
    Workload(
        "FLUX.1-schnell 1024", "flux", flux.CONFIGS["FLUX.1-schnell"], (16, 128, 128), 4,
        FLUX_SCHNELL, tokens=256, cache="",
    ),
    Workload(
        "VAE decode 512", "autoencoder", _VAE["sd1"], (4, 64, 64), 0, call_tflop=2.5,
    ),
    Workload(
        "VAE decode 1024", "autoencoder", _VAE["sdxl"], (4, 128, 128), 0, call_tflop=10.5,
    ),
)  # fmt: skip

_SMALL_VAE = autoencoder.AutoencoderConfig(widths=(32, 64), num_groups=8, sample_size=64)
_SMALL_UNET = unet.UNetConfig(
    channels=(32, 64), depths=(1, 1), num_heads=(4, 8), num_res_blocks=1, context_dim=64,
    num_groups=8,
)  # fmt: skip
_SMALL_FLUX = flux.FluxConfig(
    in_channels=4, out_channels=4, hidden_size=128, depth=2, single_depth=2, num_heads=4,
    context_size=64, pooled_size=32, axes=(8, 12, 12),
)  # fmt: skip
# Every family in seconds: the logic of the whole suite, on any machine.
SMALL = (
    Workload(
        "SD1.5 small", "unet", _SMALL_UNET, (4, 16, 16), 5, EULER, 7.5,
        tokens=7, vae=_SMALL_VAE, cache="deepcache", size="2 levels of 32 and 64, 16x16, 5 steps",
    ),
    Workload(
        "SDXL small", "unet",
        replace(
            _SMALL_UNET, depths=(0, 2), middle_depth=2, num_heads=(2, 4), vector_dim=32 + 6 * 8,
            size_dim=8, linear_projections=True,
        ),
        (4, 16, 16), 5, EULER, 5.0,
        tokens=7, vae=_SMALL_VAE, cache="deepcache", size="2 levels of 32 and 64, 16x16, 5 steps",
    ),
    Workload(
        "FLUX.1-dev small", "flux", _SMALL_FLUX, (4, 16, 16), 5, FLUX_DEV, embedded=3.5,
        tokens=12, cache="first_block", size="width 128, 2 + 2 blocks, 16x16, 5 steps",
    ),
    Workload(
        "SD3-medium small", "mmdit",
        mmdit.MMDiTConfig(
            sample_size=16, in_channels=4, hidden_size=128, depth=3, num_heads=4, context_size=64,
            pooled_size=32, position_size=24,
        ),
        (4, 16, 16), 5, FLOW, 7.0,
        tokens=12, cache="first_block", size="width 128, 3 blocks, 16x16, 5 steps",
    ),
    Workload(
        "DiT small", "dit",
        dit.DiTConfig(
            input_size=16, hidden_size=96, depth=3, num_heads=4, num_classes=10, **_DIT,
        ),
        (4, 16, 16), 5, DDIM, 4.0, cache="first_block",
        size="width 96, 3 blocks, 16x16, 5 steps",
    ),
    Workload(
        "FLUX.1-schnell small", "flux", replace(_SMALL_FLUX, guidance=False), (4, 16, 16), 4,
        FLUX_SCHNELL, tokens=12, size="width 128, 2 + 2 blocks, 16x16, 4 steps",
    ),
    Workload("VAE decode small", "autoencoder", _SMALL_VAE, (4, 16, 16), 0, size="widths 32, 64"),
)  # fmt: skip
# Two cores: half the widths of the public U-Net, one layer a level, a quarter of the picture.
HALF = Workload(
    "SD1.5 half", "unet", unet.UNetConfig(channels=(160, 320, 640, 640), num_res_blocks=1),
    (4, 32, 32), 4, EULER, 7.5,
    cache="deepcache", size="half the widths, 1 layer a level, 32x32, 4 steps",
)  # fmt: skip
CPU = (HALF, *SMALL)
BATCHES = (1, 4, 16)
