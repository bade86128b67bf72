"""Prompts to pictures: the one pipeline, over a denoiser, an autoencoder and text encoders.

Text-to-image, image-to-image (SDEdit, arXiv 2108.01073), inpainting and ControlNet are one call
with other arguments. Latents and noise are drawn in the order diffusers' pipelines draw them, so
that with the same ``generator``, weights and solver the latents are theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fastdiff import images as pictures
from fastdiff.checkpoints.lora import apply_lora, remove_lora, set_lora_scale
from fastdiff.compiler import compile as compile_model
from fastdiff.models.autoencoder import Gaussian
from fastdiff.models.unet import Encoder
from fastdiff.pipelines.control import Concatenated, scales_of
from fastdiff.pipelines.job import Job
from fastdiff.pipelines.prompts import Conditioner
from fastdiff.pipelines.recipes import Recipe
from fastdiff.sampling import Inpaint, Preview, sample
from fastdiff.sampling.api import noise_of
from fastdiff.solvers.engine import state_dtype
from fastdiff.solvers.noise import PhiloxNoise

# Philox draws of the autoencoder's sample: beyond any draw of a run.
ENCODING = 2**32 - 2


@dataclass(frozen=True)
class Defaults:
    """What a call of a pipeline does when not told: as the models' authors recommend.

    size: (height, width) in pixels. multiple: what sizes must be multiples of. embedded: the model
    takes the guidance scale as an argument (FLUX.1-dev, LCM) instead of a second evaluation.
    solver: "best_linear" where the weights were not distilled for another, else None: the recipe's.
    """

    size: tuple[int, int] = (512, 512)
    multiple: int = 8
    steps: int = 20
    guidance_scale: float = 7.5
    embedded: bool = False
    solver: str | None = None


@dataclass(frozen=True)
class Result:
    """What a call gives, image by image.

    images: PIL pictures; None for ``output="latent"``. latents: [B, C, h, w] as the denoiser has
    them. settings: what makes the picture again, image by image; :meth:`save` writes it into PNGs.
    """

    images: list[Image.Image] | None
    latents: Tensor
    settings: list[dict[str, Any]] = field(default_factory=list)

    def save(self, path: str) -> list[str]:
        """Writes PNGs with their settings; ``path`` for one image, else path with -000, -001..."""
        if self.images is None:
            raise ValueError("output must be 'pil' for save, got latents")
        return [
            str(pictures.save_with_settings(image, name, settings))
            for image, name, settings in zip(
                self.images,
                pictures.numbered(path, len(self.images)),
                self.settings,
                strict=True,
            )
        ]


class Pipeline:
    """``pipe("a prompt")``: a :class:`Result`; ``fastdiff.load`` makes one of a checkpoint.

    denoiser: a model of the zoo. autoencoder: an AutoencoderKL, or None for models of pixels.
    conditioner: prompts to the denoiser's arguments. recipe: how the weights are sampled.
    name: of the weights, for the settings in the PNG. missing: what prompts need and is not there,
    where there is no conditioner. controlnets: those that came with the weights; a call is given
    them as :class:`Control`.
    """

    def __init__(
        self,
        denoiser: Any,
        autoencoder: Any,
        conditioner: Conditioner | None,
        recipe: Recipe,
        defaults: Defaults | None = None,
        *,
        name: str = "",
        missing: str = "",
        controlnets: Sequence[Any] = (),
    ) -> None:
        self.denoiser, self.autoencoder = denoiser, autoencoder
        self.conditioner, self.recipe = conditioner, recipe
        self.defaults = defaults or Defaults()
        self.name, self.missing = name, missing
        self.controlnets = list(controlnets)
        self._wrapped: dict[Any, nn.Module] = {}
        self._options: dict[str, Any] | None = None

    def modules(self) -> dict[str, nn.Module]:
        """The modules by name."""
        found = {"denoiser": self.denoiser, "autoencoder": self.autoencoder}
        if self.conditioner is not None:
            found |= {name: e.model for name, e in self.conditioner.encoders.items()}
        return {name: module for name, module in found.items() if module is not None}

    def to(self, *args: Any, **kwargs: Any) -> Pipeline:
        """Moves or converts every module, as ``nn.Module.to``."""
        for module in self.modules().values():
            module.to(*args, **kwargs)
        return self

    def load_lora(self, file: Any, scale: float = 1.0, **options: Any) -> str:
        """A LoRA into the denoiser and the text encoders; returns its name for ``remove_lora``.

        See :func:`fastdiff.checkpoints.lora.apply_lora` for the options and what is read.
        """
        return apply_lora(self._adapted(), file, scale, **options)

    def remove_lora(self, name: str) -> None:
        """Takes a LoRA out again."""
        remove_lora(self._adapted(), name)

    def set_lora_scale(self, name: str, scale: float) -> None:
        """Another scale for a LoRA that is in."""
        set_lora_scale(self._adapted(), name, scale)

    def _adapted(self) -> dict[str, nn.Module]:
        """The modules that LoRA files are for, by the names these have for them."""
        kind = "unet" if isinstance(self.denoiser, Encoder) else "transformer"
        encoders = {} if self.conditioner is None else self.conditioner.encoders
        return {kind: self.denoiser, **{name: e.model for name, e in encoders.items()}}

    def compile(self, **options: Any) -> Pipeline:
        """``fastdiff.compile`` of the denoiser with these options, and of the autoencoder."""
        compile_model(self.denoiser, **options)
        self._options = options
        self._wrapped.clear()
        for half in ("encoder", "decoder"):
            part = getattr(self.autoencoder, half, None)
            if part is not None:
                compile_model(part)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's."""
        return next(self.denoiser.parameters()).dtype

    def __call__(self, prompt: Any = None, **arguments: Any) -> Result:
        """Draws ``images_per_prompt`` pictures of every prompt.

        prompt: one or a list. negative: what the guidance leads away from, one for all or one each.
        image: image-to-image: a PIL picture, a list, or a tensor [B, 3, H, W] in -1..1; resized to
            the size asked for, or cut to its own rounded down. strength: 0..1, how much of the
            noise it is given (0.8; 1 with a mask). mask: inpainting: white (1) where the model
            draws; PIL, or a tensor [B or 1, 1, H, W] in 0..1.
        control: ControlNets with their pictures, see :class:`Control`.
        height, width: in pixels. steps, solver, grid, solver_options: as ``fastdiff.sample``'s; the
            default solver is best_linear, and for distilled and flow models the recipe's own.
        guidance_scale: 1 for none; embedded in the model where it takes it (FLUX.1-dev, LCM), where
            ``true_cfg_scale`` is the ordinary one. guidance: other forms of it.
        seed: image i draws its own stream seed + i, or seed[i]: the same picture in any batch.
            generator: torch.Generator or one per image, in diffusers' order. Neither: a new seed,
            which the settings tell. latents: the noise to start from, of unit variance.
        cond, uncond: the denoiser's arguments instead of prompts.
        part: the (first, last) fraction of the noise levels to run; what starts above 0 needs
            ``latents`` as such a run leaves them (a refiner's).
        long: prompts of more tokens than a window: "windows", "cut" (with a warning) or "error".
        clip_skip: layers of CLIP left out. conditions: the family's own (SDXL's sizes).
        hooks: ``fastdiff.sampling``'s. preview: called with small pictures of what is predicted and
            the number of the step. progress: a bar. batch_size: pictures at once (all).
        tiled: the autoencoder in tiles. output: "pil", or "latent", which decodes nothing.

        Raises ValueError or TypeError naming the argument for what does not fit, before any work.
        """
        job = Job.of(self, prompt, **arguments)
        results = [self._run(piece) for piece in job.pieces()]
        images = None
        if job.output == "pil":
            images = [image for result in results for image in result.images or []]
        return Result(
            images,
            torch.cat([result.latents for result in results]),
            [settings for result in results for settings in result.settings],
        )

    def batches(self, prompt: Any = None, **arguments: Any) -> Iterator[Result]:
        """The results of a call batch by batch, so that what is done is kept; see ``__call__``."""
        job = Job.of(self, prompt, **arguments)
        for piece in job.pieces():
            yield self._run(piece)

    def _run(self, job: Job) -> Result:
        with torch.no_grad():
            latents = self._sample(job)
            images = None
            if job.output == "pil":
                images = self.pictures(latents, tiled=job.tiled)
        return Result(images, latents, job.settings(self.name))

    def _sample(self, job: Job) -> Tensor:
        """The final latents, [B, C, h, w] in the denoiser's dtype."""
        cond, uncond = self.conditions(job)
        model, hooks = self.denoiser, [*self.recipe.hooks, *job.hooks]
        shape = self.shape(job.count, job.size)
        if job.control:
            model, cond, uncond = self._controlled(job, cond, uncond)
            hooks += scales_of(model, job.control, len(job.table))
        inpaints = job.mask is not None
        extra_channels = inpaints and self.inpaints
        known = None
        if job.image is not None and not (extra_channels and job.strength == 1):
            known = self.encode(job.image, job)
        z = self.noise(job)
        if inpaints:
            assert job.image is not None
            assert job.mask is not None
            small = nn.functional.interpolate(job.mask, size=shape[2:]).to(self.device)
            if extra_channels:
                masked = self.encode(job.image * (job.mask < 0.5), job)
                small = small.to(self.dtype).expand(job.count, -1, -1, -1)
                more = {"extra": torch.cat([small, masked], dim=1)}
                cond, uncond = {**cond, **more}, None if uncond is None else {**uncond, **more}
                inner = model
                model = self.wrapped(("extra", id(inner)), lambda: Concatenated(inner))
            else:
                assert known is not None
                clean = job.part[1] == 1
                hooks.append(Inpaint(known=known, mask=small, noise=z, clean_end=clean))
                if job.generator is not None and job.table.num_draws:
                    # diffusers encodes the masked picture for this U-Net, too, and drops it.
                    Gaussian(*[torch.zeros_like(known[: len(job.image)])] * 2).sample(job.generator)
        if job.preview is not None:
            hooks.append(self._preview(job.preview))
        return sample(
            model,
            x=self._start(job, known, z),
            solver=job.table,
            cond=cond,
            uncond=uncond,
            guidance=job.guidance,
            hooks=hooks,
            seed=job.seeds,
            generator=job.generator,
            dtype=self.dtype,
            progress=job.progress,
            drop_variance=getattr(self.denoiser.config, "learn_sigma", False),
        )

    def _start(self, job: Job, known: Tensor | None, z: Tensor) -> Tensor:
        """The state before the first row, in the state's dtype."""
        z = z.to(state_dtype(self.dtype))
        if job.part[0] > 0:
            return z  # a state already
        if known is None or (job.mask is not None and job.strength == 1):
            return z * job.table.init_scale
        level = job.table.rows[0].level
        assert level is not None
        return known.to(z.dtype) * level[0] + z * level[1]

    @property
    def inpaints(self) -> bool:
        """Whether the denoiser is given a mask and the masked latents, besides the state."""
        state = self.shape(1, self.defaults.size)[1]
        return bool(getattr(self.denoiser.config, "in_channels", state) == 2 * state + 1)

    def wrapped(self, key: Any, make: Callable[[], nn.Module]) -> nn.Module:
        """A denoiser around the pipeline's, made once, and compiled where the pipeline is."""
        if key not in self._wrapped:
            made = make().eval().requires_grad_(False)
            if self._options is not None:
                made = compile_model(made, **self._options)
            self._wrapped[key] = made
        return self._wrapped[key]

    def conditions(self, job: Job) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The denoiser's arguments with and without the prompt."""
        if job.cond is not None:
            cond = dict(job.cond)
            uncond = None if job.uncond is None else dict(job.uncond)
        else:
            assert self.conditioner is not None
            cond, uncond = self.conditioner(
                job.prompts,
                job.negative,
                size=job.size,
                guided=job.guided,
                long=job.long,
                clip_skip=job.clip_skip,
                **job.conditions,
            )
        if job.embedded is not None:
            scale = torch.full((job.count,), job.embedded, device=self.device, dtype=torch.float32)
            cond["guidance"] = scale
            if uncond is not None:
                uncond["guidance"] = scale
        as_model = lambda made: {  # noqa: E731
            name: value.to(self.device, self.dtype)
            if isinstance(value, Tensor) and value.is_floating_point() and name != "guidance"
            else value
            for name, value in made.items()
        }
        return as_model(cond), None if uncond is None else as_model(uncond)

    @property
    def factor(self) -> int:
        """Pixels for one entry of the state, in each direction."""
        return 1 if self.autoencoder is None else int(self.autoencoder.config.factor)

    def shape(self, count: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """[B, C, h, w] of the state for pictures of ``size``."""
        if self.autoencoder is None:
            return (count, self.denoiser.config.in_channels, *size)
        config = self.autoencoder.config
        return (count, config.latent_channels, size[0] // self.factor, size[1] // self.factor)

    def noise(self, job: Job) -> Tensor:
        """The noise a job starts from, [B, C, h, w]."""
        if job.latents is not None:
            return job.latents.to(self.device)
        shape = self.shape(job.count, job.size)
        return noise_of(shape, job.seeds, job.generator, self.dtype, self.device).initial()

    def encode(self, image: Tensor, job: Job, *, mean: bool = False) -> Tensor:
        """Pictures [B, 3, H, W] in -1..1 as the denoiser's latents, drawn from their Gaussian, or
        its mean."""
        if self.autoencoder is None:
            return image.to(self.device, self.dtype).expand(job.count, -1, -1, -1)
        moved = image.to(self.device, self.autoencoder.dtype)
        found = self.autoencoder.encode(moved, tiled=job.tiled)
        if mean:
            drawn = found.mode()
        elif job.seeds is not None:
            every = Gaussian(*(v.expand(job.count, -1, -1, -1) for v in (found.mean, found.logvar)))
            shape, kind = every.mean.shape, torch.float32
            noise = PhiloxNoise(shape, job.seeds, state_dtype=kind, device=self.device)
            drawn = every.sample(noise=noise.draw(ENCODING))
        else:
            drawn = found.sample(job.generator)
        latents = self.autoencoder.scale(drawn).to(self.dtype)
        return latents.repeat(job.count // len(latents), 1, 1, 1)

    def decode(self, latents: Tensor, *, tiled: bool = False) -> Tensor:
        """The denoiser's latents as pictures [B, 3, H, W] around -1..1."""
        if self.autoencoder is None:
            return latents
        ready = self.autoencoder.unscale(latents.to(self.autoencoder.dtype))
        return self.autoencoder.decode(ready, tiled=tiled, sliced=len(latents) > 1)

    def pictures(self, latents: Tensor, *, tiled: bool = False) -> list[Image.Image]:
        """The denoiser's latents as PIL pictures."""
        with torch.no_grad():
            return pictures.to_pil(self.decode(latents, tiled=tiled))

    def _preview(self, show: Callable[[list[Image.Image], int], Any]) -> Preview:
        def call(x0: Tensor, index: int) -> None:
            small = x0 if self.autoencoder is None else self.autoencoder.preview(x0)
            show(pictures.to_pil(small), index)

        return Preview(call)

    def _controlled(
        self, job: Job, cond: dict[str, Any], uncond: dict[str, Any] | None
    ) -> tuple[Any, dict[str, Any], dict[str, Any] | None]:
        """The denoiser with the ControlNets of a job, and their pictures in its conditions."""
        from fastdiff.models.controlnet import ControlledUNet

        nets = [one.model for one in job.control]
        model = self.wrapped(tuple(map(id, nets)), lambda: ControlledUNet(self.denoiser, nets))
        hints = [
            one.hint(job.size).to(self.device, self.dtype).expand(job.count, -1, -1, -1)
            for one in job.control
        ]
        more = {"hints": torch.stack(hints, dim=1)}
        return model, {**cond, **more}, None if uncond is None else {**uncond, **more}
