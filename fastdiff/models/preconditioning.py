"""Preconditioning: from a network F and a noise level sigma to the clean sample.

D(x, sigma) = c_skip x + c_out F(c_in x, c_noise), for x = x0 + sigma eps (Karras et al., arXiv
2206.00364, equation 7 and table 1). ``Preconditioned`` is that over any Denoiser, its parameters
under ``model.`` as in NVlabs' checkpoints; the classes below are the four functions of sigma::

    class               c_skip              c_out                c_in               c_noise
    VPPrecond           1                   -sigma               1/sqrt(sigma^2+1)  (M - 1) t(sigma)
    VEPrecond           1                   sigma                1                  ln(sigma/2)
    IDDPMPrecond        1                   -sigma               1/sqrt(sigma^2+1)  M - 1 - j(sigma)
    EDMPrecond          d^2/(sigma^2+d^2)   sigma d/n            1/n                ln(sigma)/4
    ConsistencyPrecond  d^2/((sigma-e)^2+d^2)  (sigma-e) d/n     1/n                250 ln(sigma)

with n = sqrt(sigma^2 + d^2) and d the data's deviation. They are computed in float64, F's part in
the network's dtype, and D in x's dtype, float32 or wider inside. ``fastdiff.sample`` hands such a
model sigma on every sigma schedule ("edm", "cm", "ve"): see ``Preconditioned.time``.

LCM's head (arXiv 2310.04378) is not here: c_skip and c_out of timestep_scaling * t are folded into
the table of the solver "lcm", over any eps, v or x0 model. The solver "consistency" folds the same
boundary condition as ``ConsistencyPrecond`` for ``prediction="edm"``; wrapped, a model is sampled
with ``prediction="x0"``, and works with every other solver, too.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastdiff.models.denoiser import Denoiser
from fastdiff.models.edm_blocks import Exact, complete, wide


class Scales(NamedTuple):
    """The four functions of sigma, each of its shape, float64."""

    skip: Tensor
    out: Tensor
    input: Tensor
    noise: Tensor


class Preconditioned(Denoiser):
    """``model(x, sigma, *cond)``: the clean sample, of x's shape and dtype.

    x: [B, ...] = x0 + sigma eps; sigma: [B], positive; the condition is the network's. Of a
    network with more channels than x, the first count. Where the network is in half precision,
    EDM's code keeps x and the clean sample in float32: ``fastdiff.sample(..., dtype=float32)``.

    time: "sigma": the model's time is the noise level; ``fastdiff.sample`` asks for it.
    levels: (least, most) noise of the network; ``fastdiff.sample`` stays within them.
    """

    time = "sigma"
    inner = "model"  # the network's name among the parameters
    levels: tuple[float, float] = (0.0, math.inf)

    def __init__(self, model: Denoiser) -> None:
        if not isinstance(model, Denoiser):
            raise TypeError(f"model must be a Denoiser, got {type(model).__name__}")
        super().__init__()
        self.add_module(self.inner, model)

    @property
    def network(self) -> Denoiser:
        return cast(Denoiser, self.get_submodule(self.inner))

    @property
    def config(self) -> Any:
        """The network's."""
        return self.network.config

    def scales(self, sigma: Tensor) -> Scales:
        """The row of the table above for sigma of any shape, float64."""
        raise NotImplementedError

    def prompt(self, *cond: Any, **named: Any) -> Any:
        return self.network.prompt(*cond, **named)

    def schedule(self, t: Tensor, prompt: Any) -> dict[str, Any]:
        if t.dim() not in (1, 2):
            raise ValueError(f"t must have shape [B] or [S, B], got {list(t.shape)}")
        scales = self.scales(t.double())
        held = torch.float64 if t.dtype == torch.float64 else torch.float32
        return {
            "scales": torch.stack(scales[:3], -1).to(held),
            "network": self.network.schedule(scales.noise.to(held), prompt),
        }

    def step(self, x: Tensor, schedule: dict[str, Any], prompt: Any) -> Tensor:
        rows = schedule["scales"]
        if rows.dim() != 2 or rows.shape[0] != x.shape[0]:
            raise ValueError(f"t must have shape [{x.shape[0]}], got {list(rows.shape[:-1])}")
        inner = wide(x.dtype)
        rows = rows.to(inner).reshape(-1, 3, *[1] * (x.dim() - 1))
        skip, out, scale = rows.unbind(1)
        held = x.to(inner)
        network = self.network
        given = (scale * held).to(next(network.parameters()).dtype)
        f = network.step(given, schedule["network"], prompt)[:, : x.shape[1]]
        return (skip * held + out * f.to(inner)).to(x.dtype)


class EDMPrecond(Preconditioned):
    """EDM's own. sigma_data: the deviation of the data, d."""

    def __init__(self, model: Denoiser, sigma_data: float = 0.5) -> None:
        super().__init__(model)
        self.sigma_data = _positive("sigma_data", sigma_data)

    def scales(self, sigma: Tensor) -> Scales:
        d = self.sigma_data
        n = torch.hypot(sigma, torch.full_like(sigma, d))
        return Scales((d / n).square(), sigma * d / n, 1 / n, sigma.log() / 4)


class ConsistencyPrecond(EDMPrecond):
    """Consistency models' (arXiv 2303.01469, appendix C): D is x at sigma_min, the boundary.

    Of openai/consistency_models; time_scale 1000 as there. Their U-Net is guided-diffusion's.
    """

    def __init__(
        self,
        model: Denoiser,
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        time_scale: float = 1000.0,
    ) -> None:
        super().__init__(model, sigma_data)
        self.sigma_min = _positive("sigma_min", sigma_min)
        self.time_scale = _positive("time_scale", time_scale)
        self.levels = (sigma_min, math.inf)

    def scales(self, sigma: Tensor) -> Scales:
        _, out, scale, noise = super().scales(sigma)
        d, above = self.sigma_data, sigma - self.sigma_min
        skip = d**2 / (above.square() + d**2)
        return Scales(skip, above / sigma * out, scale, self.time_scale * noise)


class VEPrecond(Preconditioned):
    """The VE SDE's (arXiv 2011.13456)."""

    levels = (0.02, 100.0)

    def scales(self, sigma: Tensor) -> Scales:
        one = torch.ones_like(sigma)
        return Scales(one, sigma, one, (sigma / 2).log())


class VPPrecond(Preconditioned):
    """The VP SDE's (arXiv 2011.13456): sigma(t)^2 = exp(beta_d t^2/2 + beta_min t) - 1.

    steps: M, the timesteps the network's time counts; least_time: the t that ``levels`` begins at.
    """

    def __init__(
        self,
        model: Denoiser,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        steps: int = 1000,
        least_time: float = 1e-5,
    ) -> None:
        super().__init__(model)
        self.beta_d = _positive("beta_d", beta_d)
        self.beta_min = _positive("beta_min", beta_min)
        self.steps = steps
        ends = [math.sqrt(math.expm1(t * (beta_d * t / 2 + beta_min))) for t in (least_time, 1.0)]
        self.levels = (ends[0], ends[1])

    def scales(self, sigma: Tensor) -> Scales:
        # The positive root of beta_d t^2/2 + beta_min t = ln(1 + sigma^2), without cancellation.
        log = torch.log1p(sigma.square())
        t = 2 * log / ((self.beta_min**2 + 2 * self.beta_d * log).sqrt() + self.beta_min)
        scale = torch.rsqrt(sigma.square() + 1)
        return Scales(torch.ones_like(sigma), -sigma, scale, (self.steps - 1) * t)


class IDDPMPrecond(Preconditioned, Exact):
    """Improved DDPM's (arXiv 2102.09672), with EDM's sigma of its timesteps (table 1).

    u_{j-1}^2 = (u_j^2 + 1)/max(a_{j-1}/a_j, c1) - 1, a_j = sin^2(pi/2 j/(M (c2 + 1))), u_M = 0;
    the network is given the timestep of the nearest u. u is a buffer of the checkpoints. (EDM's
    own code also rounds a sampler's levels to u: give ``fastdiff.sample`` those as ``sigmas``.)
    """

    u: Tensor

    def __init__(
        self, model: Denoiser, c1: float = 0.001, c2: float = 0.008, steps: int = 1000
    ) -> None:
        super().__init__(model)
        self.c1, self.c2, self.steps = c1, c2, steps
        u = self._levels()
        self.register_buffer("u", torch.tensor(u, dtype=torch.float32))
        self.register_load_state_dict_pre_hook(complete)
        self.levels = (u[steps - 1], u[0])

    def _levels(self) -> list[float]:
        steps, c1, c2 = self.steps, self.c1, self.c2
        u = [0.0] * (steps + 1)
        for j in range(steps, 0, -1):
            before, here = (math.sin(math.pi / 2 * i / steps / (c2 + 1)) ** 2 for i in (j - 1, j))
            u[j - 1] = math.sqrt((u[j] ** 2 + 1) / max(before / here, c1) - 1)
        return u

    def computed(self) -> dict[str, Tensor]:
        return {"u": torch.tensor(self._levels(), dtype=torch.float32)}

    def scales(self, sigma: Tensor) -> Scales:
        nearest = (sigma[..., None] - self.u.to(sigma.dtype)).abs().argmin(-1)
        scale = torch.rsqrt(sigma.square() + 1)
        noise = self.steps - 1 - nearest.to(sigma.dtype)
        return Scales(torch.ones_like(sigma), -sigma, scale, noise)


PRECONDITIONING: dict[str, type[Preconditioned]] = {
    "edm": EDMPrecond,
    "vp": VPPrecond,
    "ve": VEPrecond,
    "iddpm": IDDPMPrecond,
}


def class_vectors(labels: Tensor | None, classes: int, like: Tensor) -> Tensor:
    """Labels as rows [B, classes], or [1, classes] of zeros (no label) for None; float32 or wider.

    labels: [B] integers 0..classes, the last for no label, or the rows themselves.
    """
    dtype = wide(like.dtype)
    if labels is None:
        return torch.zeros(1, classes, dtype=dtype, device=like.device)
    if labels.is_floating_point():
        if labels.dim() != 2 or labels.shape[1] != classes:
            raise ValueError(
                f"class_labels must have shape [B, {classes}] or be [B] integers, "
                f"got {list(labels.shape)}"
            )
        return labels.to(dtype)
    if labels.dim() != 1 or labels.dtype == torch.bool:
        raise ValueError(
            f"class_labels must be [B] integers or [B, {classes}] numbers, "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    # Reading the values would synchronise a GPU and break a graph.
    if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high > classes:
            wrong = low if low < 0 else high
            raise ValueError(
                f"class_labels must be in 0..{classes} ({classes}: no label), got {wrong}"
            )
    return (labels[:, None] == torch.arange(classes, device=labels.device)).to(dtype)


def _positive(name: str, value: float) -> float:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return float(value)
