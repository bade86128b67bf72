"""A model of the zoo and diffusers' own, with the same random weights, and what they are given.

The weights are drawn on the device, of a variance that keeps the signal; diffusers' module is built
from the ``config.json`` that `fastdiff.checkpoints` writes for the same configuration and is given
the tensors in its own layout, so that the two compute the same function.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from workloads import Workload

from fastdiff.checkpoints.empty import build_empty
from fastdiff.checkpoints.family import Family, written

DTYPE = torch.bfloat16


def family_of(name: str) -> Family:
    found = importlib.import_module(f"fastdiff.checkpoints.layouts.{name}").FAMILY
    assert isinstance(found, Family)
    return found


def draw(
    model: nn.Module, device: torch.device, dtype: torch.dtype, stored: Collection[str], seed: int
) -> nn.Module:
    """Random parameters, and computed tensors as they are; stored: the names of what is in files,
    which has the dtype of the file."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, owner in model.named_modules():
        for key, value in owner._parameters.items():
            if value is not None:
                made = _drawn(f"{name}.{key}", value, generator, dtype)
                owner._parameters[key] = nn.Parameter(made, requires_grad=False)
        for key, held in owner._buffers.items():
            if held is None:
                continue
            if held.is_meta:
                held = torch.zeros(held.shape, dtype=held.dtype, device=device)
            kind = dtype if f"{name}.{key}".lstrip(".") in stored else held.dtype
            owner._buffers[key] = held.to(device, kind)
    return model.eval()


def _drawn(name: str, like: Tensor, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    made = torch.empty(like.shape, dtype=dtype, device=generator.device)
    if not like.is_meta and name.endswith("pos_embed"):
        return made.copy_(like)  # computed, though a parameter
    if like.dim() > 1:
        return made.normal_(0, 0.7 * like[0].numel() ** -0.5, generator=generator)
    made.normal_(0, 0.1, generator=generator)
    return made.add_(1) if name.endswith(("weight", "scale")) else made


def diffusers_model(family: Family, config: Any, state: Mapping[str, Tensor]) -> nn.Module:
    """diffusers' module of a zoo configuration, holding the zoo model's tensors where they fit."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()  # it warns of every `.to`
    assert family.to_diffusers is not None
    assert family.diffusers is not None
    entries = dict(family.to_diffusers(config))
    kind = getattr(diffusers, entries.pop("_class_name"))
    model: nn.Module = build_empty(lambda e: kind(**e), entries)
    file = written(family.diffusers(config), state)
    found = model.load_state_dict(file, strict=False, assign=True)
    empty = [name for name, value in model.state_dict().items() if value.is_meta]
    if found.unexpected_keys or empty:
        raise RuntimeError(f"{kind.__name__}: unknown {found.unexpected_keys}, without {empty}")
    return model.eval().requires_grad_(False)


class Pair:
    """The two models of a workload, their autoencoders, and the inputs of one batch.

    dtype: of the zoo's models; ``to`` moves diffusers' ones between precisions: the bf16 weights
    are exact in float32, which is what the reference is computed in.
    """

    def __init__(
        self,
        workload: Workload,
        batch: int,
        device: str,
        dtype: torch.dtype = DTYPE,
        config: Any = None,
    ) -> None:
        self.workload, self.batch, self.dtype = workload, batch, dtype
        self.device = torch.device(device)
        self.zoo, self.peer = self._both(workload.family, config or workload.config, 0)
        self.zoo_vae: Any = None
        self.peer_vae: Any = None
        if workload.vae is not None:
            self.zoo_vae, self.peer_vae = self._both("autoencoder", workload.vae, 1)
        generator = torch.Generator("cpu").manual_seed(2)
        self.noise = torch.randn(batch, *workload.latent, generator=generator).to(self.device)
        self._draw = lambda *shape: torch.randn(shape, generator=generator).to(self.device, dtype)
        self.given = self._inputs()

    def _both(self, name: str, config: Any, seed: int) -> tuple[Any, Any]:
        family = family_of(name)
        assert family.diffusers is not None
        stored = family.diffusers(config)
        zoo = draw(build_empty(family.build, config), self.device, self.dtype, stored, seed)
        peer = diffusers_model(family, config, zoo.state_dict()).to(self.device)
        return zoo, peer

    def to(self, dtype: torch.dtype) -> Pair:
        """diffusers' models in this precision."""
        for model in (self.peer, self.peer_vae):
            if model is not None:
                model.to(dtype)
        return self

    def _inputs(self) -> dict[str, Any]:
        """The condition, as (uncond, cond) along the batch where there is guidance."""
        work, rows = self.workload, self.workload.rows * self.batch
        if work.family == "autoencoder":
            return {}
        if work.family == "dit":
            count = work.config.num_classes
            labels = torch.arange(self.batch, device=self.device) % count
            null = torch.full_like(labels, work.config.null_label)
            return {"y": torch.cat([null, labels])}
        config = work.config
        if work.family == "unet":
            found = {"context": self._draw(rows, work.tokens, config.context_dim)}
            if config.vector_dim is not None:
                side = float(8 * work.latent[1])
                sizes = torch.tensor([[side, side, 0, 0, side, side]], device=self.device)
                found["pooled"] = self._draw(rows, config.vector_dim - 6 * config.size_dim)
                found["sizes"] = sizes.expand(rows, 6).to(self.dtype)
            return found
        return {
            "context": self._draw(rows, work.tokens, config.context_size),
            "pooled": self._draw(rows, config.pooled_size),
        }

    def zoo_conditions(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What ``fastdiff.sample`` is given with and without the condition."""
        given, work = dict(self.given), self.workload
        if work.family == "unet" and "pooled" in given:
            given["y"] = self.zoo.vector(given.pop("pooled"), given.pop("sizes").float())
        elif work.family in ("mmdit", "flux"):
            given["y"] = given.pop("pooled")
        if work.rows == 2:
            halves = {name: value.chunk(2) for name, value in given.items()}
            cond = {name: half[1].contiguous() for name, half in halves.items()}
            return cond, {name: half[0].contiguous() for name, half in halves.items()}
        if work.embedded is not None:
            given["guidance"] = torch.full((self.batch,), work.embedded, device=self.device)
        return given, None

    def peer_call(self, model: Callable[..., Any]) -> Callable[[Tensor, Tensor], Tensor]:
        """model(x, t) -> the prediction; the condition is the same objects in every step.

        x: as diffusers' pipelines hold it (FLUX: packed), in the dtype of the run.
        """
        given, work = self.given, self.workload
        dtype = next(self.peer.parameters()).dtype
        as_model = {n: v.to(dtype) if v.is_floating_point() else v for n, v in given.items()}
        if work.family == "unet":
            named: dict[str, Any] = {"encoder_hidden_states": as_model["context"]}
            if "pooled" in given:
                extra = {"text_embeds": as_model["pooled"], "time_ids": as_model["sizes"]}
                named["added_cond_kwargs"] = extra
            return lambda x, t: model(x, t, **named, return_dict=False)[0]
        if work.family == "dit":
            channels = work.latent[0]

            def labelled(x: Tensor, t: Tensor) -> Tensor:
                t = t.expand(len(x))
                out = model(x, timestep=t, class_labels=given["y"], return_dict=False)[0]
                return out[:, :channels]

            return labelled
        named = {
            "encoder_hidden_states": as_model["context"],
            "pooled_projections": as_model["pooled"],
            "return_dict": False,
        }
        if work.family == "mmdit":
            return lambda x, t: model(hidden_states=x, timestep=t.expand(len(x)), **named)[0]
        h, w = work.latent[1] // 2, work.latent[2] // 2
        places = torch.zeros(h, w, 3, device=self.device, dtype=dtype)
        places[..., 1] = torch.arange(h, device=self.device)[:, None]
        places[..., 2] = torch.arange(w, device=self.device)
        named["img_ids"] = places.flatten(0, 1)
        named["txt_ids"] = torch.zeros(work.tokens, 3, device=self.device, dtype=dtype)
        named["guidance"] = None
        if work.embedded is not None:
            named["guidance"] = torch.full((self.batch,), work.embedded, device=self.device)

        def packed(x: Tensor, t: Tensor) -> Tensor:
            return model(hidden_states=x, timestep=t.expand(len(x)).to(x.dtype) / 1000, **named)[0]

        return packed

    def flops(self) -> int:
        """Of one call of the model, by PyTorch's counter over diffusers' module."""
        return self.batch * self._of_one()._flops()

    def _of_one(self) -> Pair:
        """The same models for one picture: counting keeps whole matrices of attention."""
        one, rows = copy.copy(self), self.workload.rows
        one.batch, one.noise = 1, self.noise[:1]
        one.given = {name: value[:rows] for name, value in self.given.items()}
        return one

    def _flops(self) -> int:
        work = self.workload
        dtype = next(self.peer.parameters()).dtype
        x = self.noise.repeat(work.rows, 1, 1, 1).to(dtype)
        with _counting() as counter:
            if work.family == "autoencoder":
                self.peer.decode(x)
            else:
                t = torch.tensor(500.0, device=self.device)
                self.peer_call(self.peer)(pack(x) if work.family == "flux" else x, t)
        return counter.get_total_flops()

    def decode_flops(self) -> int:
        if self.peer_vae is None:
            return 0
        dtype = next(self.peer_vae.parameters()).dtype
        with _counting() as counter:
            self.peer_vae.decode(self.noise[:1].to(dtype))
        return self.batch * counter.get_total_flops()


@contextlib.contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    """Attention as products of matrices: the counter does not know every kernel for it."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def pack(image: Tensor) -> Tensor:
    """[B, C, 2 h, 2 w] to [B, h w, 4 C], as FLUX's pipelines in diffusers do it."""
    b, c, h, w = image.shape
    parts = image.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return parts.reshape(b, h * w // 4, c * 4)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `pack`, for an image of h x w."""
    b, _, c = tokens.shape
    parts = tokens.view(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return parts.reshape(b, c // 4, h, w)
