"""ControlNet (arXiv 2302.05543): a U-Net's encoder that reads a picture beside the state.

Parameters are named as in lllyasviel's checkpoints, without their prefix "control_model."; the
results agree with diffusers' ControlNetModel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.denoiser import Denoiser, Values
from fastdiff.models.unet import Encoder, UNet
from fastdiff.models.unet_blocks import conv
from fastdiff.models.unet_configs import CONTROLS, ControlNetConfig

__all__ = ["CONTROLS", "ControlNet", "ControlNetConfig", "ControlledUNet"]


class ControlNet(Encoder):
    """``net(x, t, context=None, hint=None, y=None, guidance=None)``: the residuals for a U-Net.

    x, t, context, y, guidance: as of the U-Net. hint: [B, hint_in, H', W'], the picture that
    controls, in 0..1; after one halving for each of ``hint_channels`` but the first it has x's
    size (SD: 8 H, 8 W). The hint and the text are read once for all steps, by ``prompt``.
    Returns a list: a tensor for each skip of the U-Net from the first on, and the middle's.
    """

    config: ControlNetConfig

    def __init__(self, config: ControlNetConfig) -> None:
        if not isinstance(config, ControlNetConfig):
            raise TypeError(
                f"config must be a ControlNetConfig, as CONTROLS['controlnet-sd1'], got {config!r}"
            )
        super().__init__(config)
        first, *others = config.hint_channels
        hint: list[nn.Module] = [conv(config.hint_in, first), nn.SiLU()]
        for width in others:
            hint += [conv(first, first), nn.SiLU(), conv(first, width, stride=2), nn.SiLU()]
            first = width
        self.input_hint_block = nn.Sequential(*hint, conv(first, config.channels[0]))
        self.zero_convs = nn.ModuleList(
            nn.Sequential(conv(width, width, 1)) for width in self.skip_channels
        )
        middle = config.channels[-1]
        self.middle_block_out = nn.Sequential(conv(middle, middle, 1))
        for layer in (self.input_hint_block[-1], *self.zero_convs, self.middle_block_out):
            for parameter in layer.parameters():  # a new one leaves the U-Net as it is
                nn.init.zeros_(parameter)

    def prompt(  # type: ignore[override]
        self,
        context: Tensor | None = None,
        hint: Tensor | None = None,
        y: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Values:
        channels = self.config.hint_in
        if hint is None or hint.dim() != 4 or hint.shape[1] != channels:
            got = None if hint is None else list(hint.shape)
            raise ValueError(f"hint must have shape [B, {channels}, H, W], got {got}")
        read = self.input_hint_block(hint.to(self.time_embed.dtype))
        return {**super().prompt(context, y, guidance), "hint": read}

    def step(self, x: Tensor, schedule: Values, prompt: Values) -> list[Tensor]:  # type: ignore[override]
        self._check_state(x, schedule)
        hint = prompt["hint"]
        if hint.shape[2:] != x.shape[2:] or hint.shape[0] != x.shape[0]:
            factor = 2 ** (len(self.config.hint_channels) - 1)
            raise ValueError(
                f"hint must be x's picture {list(x.shape)} times {factor}, "
                f"got one that gives {list(hint.shape)}"
            )
        h, skips = self.encode(x, iter(schedule), iter(prompt["kv"]), hint)
        out = [layer(skip) for layer, skip in zip(self.zero_convs, skips, strict=True)]
        out.append(self.middle_block_out(h))
        return [F.adaptive_avg_pool2d(r, 1) for r in out] if self.config.global_pool else out


Scales = Sequence[float | Sequence[float]]


class ControlledUNet(Denoiser):
    """A U-Net and its ControlNets: ``model(x, t, context=None, y=None, hints=..., guidance=None)``.

    hints: one for each ControlNet: a list, a tensor [B, N, C, H, W], or [B, C, H, W] for one alone.
    x may have more channels than the ControlNets' (inpainting): they see its first ones.
    scales: of each ControlNet's residuals: a number, or one for each residual; may be exchanged
    between steps. 0 leaves that ControlNet out. The residuals of all are added up.
    """

    def __init__(self, unet: UNet, controls: Sequence[ControlNet], scales: Scales = ()) -> None:
        super().__init__()
        if not controls:
            raise ValueError("controls must hold at least one ControlNet, got none")
        for control in controls:
            if control.skip_channels != unet.skip_channels:
                raise ValueError(
                    f"controls must have the U-Net's features {unet.skip_channels}, "
                    f"got {control.skip_channels}"
                )
        self.unet, self.controls = unet, nn.ModuleList(controls)
        self.train(unet.training)
        self.scales: Scales = scales or (1.0,) * len(controls)
        self._factors()

    def _factors(self) -> list[list[float]]:
        """One for each ControlNet and residual."""
        count = len(self.unet.skip_channels) + 1
        factors = [
            [float(scale)] * count if isinstance(scale, (int, float)) else [*map(float, scale)]
            for scale in self.scales
        ]
        if [len(each) for each in factors] != [count] * len(self.controls):
            raise ValueError(
                f"scales must be {len(self.controls)} numbers (or {count} numbers each), "
                f"got {self.scales!r}"
            )
        return factors

    def prompt(  # type: ignore[override]
        self,
        context: Tensor | None = None,
        y: Tensor | None = None,
        hints: Tensor | Sequence[Tensor] = (),
        guidance: Tensor | None = None,
    ) -> Values:
        if isinstance(hints, Tensor):
            hints = [hints] if hints.dim() == 4 else hints.unbind(1)
        if len(hints) != len(self.controls):
            raise ValueError(f"hints must be {len(self.controls)}, got {len(hints)}")
        # A ControlNet has no part in the guidance scale of a distilled U-Net unless made for it.
        controls = [
            control.prompt(context, hint, y, guidance if control.config.guidance_dim else None)
            for control, hint in zip(self._controls(), hints, strict=True)
        ]
        return {"unet": self.unet.prompt(context, y, guidance), "controls": controls}

    def schedule(self, t: Tensor, prompt: Values) -> Values:
        pairs = zip(self._controls(), prompt["controls"], strict=True)
        controls = [control.schedule(t, each) for control, each in pairs]
        return {"unet": self.unet.schedule(t, prompt["unet"]), "controls": controls}

    def step(self, x: Tensor, schedule: Values, prompt: Values) -> Tensor:
        total: list[Tensor] | None = None
        parts = zip(
            *(self._controls(), self._factors(), schedule["controls"], prompt["controls"]),
            strict=True,
        )
        state = x[:, : self.controls[0].config.in_channels]  # type: ignore[index, union-attr]
        for control, factors, own_schedule, own_prompt in parts:
            if not any(factors):
                continue
            residuals = control.step(state, own_schedule, own_prompt)
            scaled = [r if f == 1 else r * f for r, f in zip(residuals, factors, strict=True)]
            total = scaled if total is None else [a + b for a, b in zip(total, scaled, strict=True)]
        return self.unet.step(x, schedule["unet"], prompt["unet"], total)

    def _controls(self) -> list[ControlNet]:
        return cast(list[ControlNet], list(self.controls))
