"""EDM and EDM2: NVlabs' checkpoints, converted from their pickles.

The public files (``edm-cifar10-32x32-cond-vp.pkl``, ``edm2-img512-s-2147483-0.130.pkl``, ...) are
pickles that carry Python source, which fastdiff never opens. Who trusts a file converts it once, in
a checkout of the repository it is from::

    import pickle
    from safetensors.torch import save_file

    with open("edm-cifar10-32x32-cond-vp.pkl", "rb") as file:
        network = pickle.load(file)["ema"]
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(state, "edm-cifar10-32x32-cond-vp.safetensors")

Names and shapes do not say which preconditioning a network has (but for iDDPM's twice the output
channels), nor EDM2's balances and sigma_data: a file with the shapes of a public model is read as
that, any other one with EDM's own preconditioning and EDM2's defaults.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

from fastdiff.checkpoints.family import Family, Shapes
from fastdiff.models import edm, edm2
from fastdiff.models.edm import EDMConfig
from fastdiff.models.edm2 import EDM2Config

HEAD = 64  # channels of a head, where the narrowest level with attention has as many
SIZES = [2**k for k in range(12)]
# Computed buffers, which a file may leave out.
FILTERS = frozenset(
    f"model.{place}.resample_filter"
    for size in SIZES
    for place in (
        *(f"enc.{size}x{size}_down.{part}" for part in ("conv0", "skip")),
        *(f"dec.{size}x{size}_up.{part}" for part in ("conv0", "skip")),
        f"enc.{size}x{size}_aux_down",
        f"enc.{size}x{size}_aux_residual",
        f"dec.{size}x{size}_aux_up",
    )
)


def _levels(shapes: Shapes, prefix: str) -> list[tuple[int, int, int, bool]]:
    """(side, blocks, their width, whether they attend) of each level of an encoder, largest first.

    The width is that of the first convolution of a level's last block.
    """
    sides: dict[int, int] = {}
    attending = set()
    for name in shapes:
        found = re.match(re.escape(prefix) + r"enc\.(\d+)x\1_block(\d+)\.(.*)", name)
        if found:
            side, index = int(found[1]), int(found[2])
            sides[side] = max(sides.get(side, 0), index + 1)
            if found[3].startswith(("qkv", "attn_qkv")):
                attending.add(side)
    result = []
    for side in sorted(sides, reverse=True):
        block = f"{prefix}enc.{side}x{side}_block{sides[side] - 1}"
        shape = shapes.get(f"{block}.conv1.weight") or shapes.get(f"{block}.conv_res1.weight")
        if shape is None:
            return []
        result.append((side, sides[side], shape[0], side in attending))
    return result


def _common(
    shapes: Shapes, levels: list[tuple[int, int, int, bool]], channels: int
) -> dict[str, Any]:
    """The fields that both families read from their levels; channels: the base width."""
    return {
        "img_resolution": levels[0][0],
        "model_channels": channels,
        "channel_mult": tuple(width // channels for _, _, width, _ in levels),
        "num_blocks": levels[0][1],
        "attn_resolutions": tuple(side for side, _, _, attends in levels if attends),
    }


def _recognise_edm(shapes: Shapes) -> EDMConfig | None:
    layers = [shapes.get(f"model.map_layer{i}.weight") for i in (0, 1)]
    levels = _levels(shapes, "model.")
    if not levels or layers[0] is None or layers[1] is None:
        return None
    side = levels[0][0]
    adm = "model.out_conv.weight" in shapes
    first = shapes.get(f"model.enc.{side}x{side}_conv.weight")
    out = shapes.get("model.out_conv.weight" if adm else f"model.dec.{side}x{side}_aux_conv.weight")
    if first is None or out is None:
        return None
    noise, emb = layers[0][1], layers[0][0]
    # The first convolution of ADM is as wide as its first level, its noise embedding as the base.
    channels = noise if adm else first[0]
    label, augment = (shapes.get(f"model.map_{kind}.weight") for kind in ("label", "augment"))
    config: dict[str, Any] = {
        **_common(shapes, levels, channels),
        "network": "adm" if adm else "song",
        "precond": "iddpm" if out[0] == 2 * first[1] else "edm",
        "img_channels": first[1],
        "label_dim": label[1] if label else 0,
        "augment_dim": augment[1] if augment else 0,
        "channel_mult_emb": emb // channels,
    }
    if not adm:
        names = "\n".join(shapes)
        fourier = "model.map_noise.freqs" in shapes
        encoder = "standard"
        for kind, part in (("skip", "aux_skip"), ("residual", "aux_residual")):
            encoder = kind if f"_{part}." in names else encoder
        heads = len(re.findall(r"model\.dec\.\d+x\d+_aux_conv\.weight", names))
        filters = [s for n, s in shapes.items() if n.endswith("resample_filter")]
        taps = (1, 3, 3, 1) if (filters[0][-1] == 4 if filters else fourier) else (1, 1)
        config.update(
            embedding_type="fourier" if fourier else "positional",
            channel_mult_noise=noise // channels,
            encoder_type=encoder,
            decoder_type="skip" if heads > 1 else "standard",
            resample_filter=taps,
        )
    recognised = EDMConfig(**config)
    for public in edm.CONFIGS.values():
        same = replace(public, precond=recognised.precond) == recognised
        if same and public.out_channels == recognised.out_channels:
            return public
    return recognised


def _recognise_edm2(shapes: Shapes) -> EDM2Config | None:
    noise = shapes.get("unet.emb_noise.weight")
    logvar = shapes.get("logvar_linear.weight")
    levels = _levels(shapes, "unet.")
    if not levels or noise is None or logvar is None:
        return None
    side = levels[0][0]
    first = shapes.get(f"unet.enc.{side}x{side}_conv.weight")
    if first is None:
        return None
    label = shapes.get("unet.emb_label.weight")
    channels = math.gcd(*(width for _, _, width, _ in levels))
    common = _common(shapes, levels, channels)
    mults = common["channel_mult"]
    ratios = noise[1] // channels, noise[0] // channels
    # The smallest level's first decoder block always attends.
    attending = [
        width for _, _, width, attends in (*levels, (0, 0, levels[-1][2], True)) if attends
    ]
    return EDM2Config(
        **common,
        img_channels=first[1] - 1,
        label_dim=label[1] if label else 0,
        channel_mult_noise=0 if ratios[0] == mults[0] else ratios[0],
        channel_mult_emb=0 if ratios[1] == max(mults) else ratios[1],
        channels_per_head=min(HEAD, *attending),
        logvar_channels=logvar[1],
    )


EDM = Family(
    name="edm",
    configs=edm.CONFIGS,
    build=edm.build,
    prefixes=("",),
    recognise=_recognise_edm,
    optional=FILTERS | {"u"},
)
EDM2 = Family(
    name="edm2",
    configs=edm2.CONFIGS,
    build=edm2.EDM2,
    prefixes=("",),
    recognise=_recognise_edm2,
)
FAMILIES = (EDM, EDM2)
