"""What a call of a pipeline asks for, checked before any work."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastdiff import images as pictures
from fastdiff._version import __version__
from fastdiff.pipelines.control import Control
from fastdiff.pipelines.recipes import DISTILLED
from fastdiff.sampling import Guidance, Hook
from fastdiff.solvers import SolverTable
from fastdiff.solvers.grids import check_choice

if TYPE_CHECKING:
    from fastdiff.pipelines.pipeline import Pipeline

OUTPUTS = ("pil", "latent")
EACH = ("prompt", "negative", "seed")  # of the settings: one for every picture


@dataclass(frozen=True)
class Job:
    """One batch of a call, or all of it before :meth:`pieces`.

    prompts, negative, seeds: one each. image, mask: [B or 1, ...]. guided: two evaluations.
    embedded: the guidance scale as an argument of the model. asked: what the settings repeat.
    """

    prompts: list[Any]
    negative: list[Any] | None
    size: tuple[int, int]
    table: SolverTable
    guidance: Guidance
    guided: bool
    embedded: float | None = None
    seeds: list[int] | None = None
    generator: Any = None
    latents: Tensor | None = None
    cond: Mapping[str, Tensor] | None = None
    uncond: Mapping[str, Tensor] | None = None
    image: Tensor | None = None
    mask: Tensor | None = None
    strength: float = 1.0
    part: tuple[float, float] = (0.0, 1.0)
    control: tuple[Control, ...] = ()
    long: str = "windows"
    clip_skip: int = 0
    conditions: Mapping[str, Any] = field(default_factory=dict)
    hooks: tuple[Hook, ...] = ()
    preview: Callable[..., Any] | None = None
    progress: bool = False
    tiled: bool = False
    output: str = "pil"
    batch_size: int | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many pictures."""
        return len(self.prompts)

    @staticmethod
    def of(
        pipe: Pipeline,
        prompt: Any = None,
        *,
        negative: Any = None,
        image: Any = None,
        mask: Any = None,
        strength: float | None = None,
        control: Control | Sequence[Control] = (),
        height: int | None = None,
        width: int | None = None,
        images_per_prompt: int = 1,
        steps: int | None = None,
        solver: str | SolverTable | None = None,
        grid: Any = None,
        solver_options: Mapping[str, Any] | None = None,
        guidance_scale: float | None = None,
        guidance: Guidance | None = None,
        true_cfg_scale: float = 1.0,
        seed: int | Sequence[int] | None = None,
        generator: Any = None,
        latents: Tensor | None = None,
        cond: Mapping[str, Tensor] | None = None,
        uncond: Mapping[str, Tensor] | None = None,
        part: tuple[float, float] = (0.0, 1.0),
        long: str = "windows",
        clip_skip: int = 0,
        conditions: Mapping[str, Any] | None = None,
        hooks: Sequence[Hook] = (),
        preview: Callable[..., Any] | None = None,
        progress: bool = False,
        batch_size: int | None = None,
        tiled: bool = False,
        output: str = "pil",
    ) -> Job:
        """The arguments are those of ``Pipeline.__call__``."""
        check_choice("output", output, OUTPUTS)
        _check_whole("images_per_prompt", images_per_prompt, 1)
        steps = pipe.defaults.steps if steps is None else steps
        _check_whole("steps", steps, 1)
        if batch_size is not None:
            _check_whole("batch_size", batch_size, 1)
        _check_whole("clip_skip", clip_skip, 0)
        prompts, wrong = _prompts(pipe, prompt, negative, cond, images_per_prompt)
        count = len(prompts)
        size = _size(pipe, height, width, image, latents)
        if image is not None:
            image = _batched("image", pictures.to_tensor(image, size), count)
        if mask is not None:
            if image is None:
                raise ValueError("image must be given with a mask, got None")
            mask = _batched("mask", pictures.to_mask(mask, size), count)
        if mask is None and pipe.inpaints:
            raise ValueError("image and mask must be given for an inpainting model, got none")
        if strength is None:
            strength = 1.0 if mask is not None or image is None else 0.8
        if image is None and strength != 1:
            raise ValueError(f"strength must be 1 unless image is given, got {strength}")
        scale = pipe.defaults.guidance_scale if guidance_scale is None else guidance_scale
        embedded = None
        if pipe.defaults.embedded:
            embedded, scale = float(scale), true_cfg_scale
        elif true_cfg_scale != 1:
            raise ValueError(
                f"true_cfg_scale must be 1 for a model without embedded guidance, "
                f"got {true_cfg_scale}"
            )
        if guidance is None:
            guidance = Guidance(scale)
        elif guidance_scale is not None and embedded is None:
            raise ValueError(f"guidance_scale must be None with guidance, got {guidance_scale}")
        guided = guidance.scale != 1
        if guided and cond is not None and uncond is None and guidance.guide is None:
            raise ValueError("uncond must be given with cond and guidance, got None")
        seeds = _seeds(seed, generator, count)
        table = _table(pipe, steps, solver, grid, solver_options, strength, part, size)
        if part[0] > 0 and latents is None:
            raise ValueError("latents must be given for a part that starts above 0, got None")
        if latents is not None:
            expected = pipe.shape(count, size)
            if tuple(latents.shape) != expected:
                raise ValueError(f"latents must have shape {expected}, got {tuple(latents.shape)}")
        controls = (control,) if isinstance(control, Control) else tuple(control)
        for one in controls:
            if not isinstance(one, Control):
                raise TypeError(f"control must be of Control, got {type(one).__name__}")
        asked = {
            "prompt": prompts,
            "negative": wrong,
            "seed": seeds,
            "steps": steps,
            "solver": table.name,
            "grid": grid if isinstance(grid, str) else None,
            "guidance_scale": embedded if embedded is not None else guidance.scale,
            "width": size[1],
            "height": size[0],
            "strength": strength if image is not None else None,
            "clip_skip": clip_skip or None,
            "solver_options": dict(solver_options or {}) or None,
            "true_cfg_scale": true_cfg_scale if true_cfg_scale != 1 else None,
            "long": long if long != "windows" else None,
        }
        return Job(
            prompts=prompts,
            negative=wrong,
            size=size,
            table=table,
            guidance=guidance,
            guided=guided,
            embedded=embedded,
            seeds=seeds,
            generator=generator,
            latents=latents,
            cond=cond,
            uncond=uncond,
            image=image,
            mask=mask,
            strength=float(strength),
            part=part,
            control=controls,
            long=long,
            clip_skip=clip_skip,
            conditions=dict(conditions or {}),
            hooks=tuple(hooks),
            preview=preview,
            progress=progress,
            tiled=tiled,
            output=output,
            batch_size=batch_size,
            asked=asked,
        )

    def pieces(self) -> Iterator[Job]:
        """Jobs of at most ``batch_size`` pictures."""
        size = self.batch_size or self.count
        for start in range(0, self.count, size):
            yield self._piece(slice(start, start + size))

    def _piece(self, part: slice) -> Job:
        if part.start == 0 and part.stop >= self.count:
            return self

        def cut(value: Any) -> Any:
            if isinstance(value, (list, tuple)) and len(value) == self.count:
                return value[part]
            whole = isinstance(value, Tensor) and value.dim() and value.shape[0] == self.count
            return value[part] if whole else value

        def cut_all(values: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
            return None if values is None else {k: cut(v) for k, v in values.items()}

        names = ("prompts", "negative", "seeds", "generator", "latents", "image", "mask")
        return replace(
            self,
            **{name: cut(getattr(self, name)) for name in names},
            cond=cut_all(self.cond),
            uncond=cut_all(self.uncond),
            control=tuple(one.part(part, self.count) for one in self.control),
            asked={k: cut(v) if k in EACH else v for k, v in self.asked.items()},
        )

    def settings(self, model: str) -> list[dict[str, Any]]:
        """What makes each picture again, as JSON has it."""
        made = []
        for index in range(self.count):
            entry: dict[str, Any] = {"fastdiff": __version__, "model": model}
            for name, value in self.asked.items():
                one = value[index] if name in EACH and value else value
                if one is not None and one != []:
                    entry[name] = one
            if self.generator is not None or self.seeds is None:
                entry.pop("seed", None)
            made.append(entry)
        return made


def _check_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _prompts(
    pipe: Pipeline, prompt: Any, negative: Any, cond: Any, each: int
) -> tuple[list[Any], list[Any] | None]:
    """One prompt and one negative prompt for every picture."""
    if cond is not None:
        if prompt is not None or negative is not None:
            raise ValueError("prompt and negative must be None when cond is given")
        counts = {len(v) for v in cond.values() if isinstance(v, Tensor) and v.dim()}
        if len(counts) != 1:
            raise ValueError(f"cond must hold tensors of one batch size, got {sorted(counts)}")
        if each != 1:
            raise ValueError(f"images_per_prompt must be 1 when cond is given, got {each}")
        return [None] * counts.pop(), None
    if pipe.conditioner is None:
        needed = f"; prompts need {pipe.missing}" if pipe.missing else ""
        raise ValueError(f"cond must be given for a pipeline without text encoders{needed}")
    single = isinstance(prompt, (str, int)) or prompt is None
    prompts = ["" if prompt is None else prompt] if single else list(prompt)
    if not prompts:
        raise ValueError("prompt must hold at least one prompt, got none")
    if negative is None:
        wrong = None
    elif isinstance(negative, (str, int)):
        wrong = [negative] * len(prompts)
    else:
        wrong = list(negative)
        if len(wrong) != len(prompts):
            raise ValueError(
                f"negative must be one or one per prompt ({len(prompts)}), got {len(wrong)}"
            )
    repeat = lambda items: [item for item in items for _ in range(each)]  # noqa: E731
    return repeat(prompts), None if wrong is None else repeat(wrong)


def _size(
    pipe: Pipeline, height: Any, width: Any, image: Any, latents: Tensor | None
) -> tuple[int, int]:
    """(height, width) in pixels, checked."""
    multiple = pipe.defaults.multiple
    own: tuple[int, int] = pipe.defaults.size
    if image is not None:
        high, wide = pictures.size_of(image)
        own = (max(high - high % multiple, multiple), max(wide - wide % multiple, multiple))
    elif latents is not None and latents.dim() == 4:
        factor = pipe.factor
        own = (latents.shape[2] * factor, latents.shape[3] * factor)
    size = (own[0] if height is None else height, own[1] if width is None else width)
    for name, value in zip(("height", "width"), size, strict=True):
        _check_whole(name, value, multiple)
        if value % multiple:
            low = value - value % multiple
            raise ValueError(
                f"{name} must be a multiple of {multiple}, got {value} "
                f"({low} and {low + multiple} are the nearest)"
            )
    return size


def _batched(name: str, value: Tensor, count: int) -> Tensor:
    if value.shape[0] not in (1, count):
        raise ValueError(f"{name} must be one or one per picture ({count}), got {value.shape[0]}")
    return value


def _seeds(seed: Any, generator: Any, count: int) -> list[int] | None:
    if generator is not None:
        if seed is not None:
            raise ValueError("seed and generator must not both be given")
        if isinstance(generator, Sequence) and len(generator) != count:
            raise ValueError(
                f"generator must be one or one per picture ({count}), got {len(generator)}"
            )
        return None
    if seed is None:
        seed = secrets.randbits(32)
    if isinstance(seed, bool) or not isinstance(seed, (int, Sequence)) or isinstance(seed, str):
        raise TypeError(f"seed must be an integer or one per picture, got {seed!r}")
    if isinstance(seed, int):
        return [seed + i for i in range(count)]
    if len(seed) != count:
        raise ValueError(f"seed must be one or one per picture ({count}), got {len(seed)}")
    return list(seed)


def _table(
    pipe: Pipeline,
    steps: int,
    solver: str | SolverTable | None,
    grid: Any,
    options: Mapping[str, Any] | None,
    strength: float,
    part: tuple[float, float],
    size: tuple[int, int],
) -> SolverTable:
    """The run's table: all of it, the end of it (strength), or a part of its noise levels."""
    if isinstance(strength, bool) or not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength}")
    first, last = part
    if not 0 <= first < last <= 1:
        raise ValueError(f"part must be (first, last) with 0 <= first < last <= 1, got {part}")
    if solver is None and pipe.recipe.solver not in DISTILLED:
        solver = pipe.defaults.solver
    tokens = size[0] * size[1] // pipe.defaults.multiple**2
    make = lambda strength: pipe.recipe.table(  # noqa: E731
        steps, solver=solver, grid=grid, strength=strength, tokens=tokens, **(options or {})
    )
    if part == (0.0, 1.0):
        return make(strength)
    if strength != 1:
        raise ValueError(f"strength must be 1 with a part of the levels, got {strength}")
    whole = make(1.0)
    # As diffusers: the timesteps from this one down belong to what comes after.
    span = getattr(pipe.recipe.schedule, "num_timesteps", 1000)
    cut = [round(span - fraction * span) for fraction in part]
    begin = sum(row.time >= cut[0] for row in whole.rows) if first else 0
    end = sum(row.time >= cut[1] for row in whole.rows) if last < 1 else len(whole)
    if begin >= end:
        raise ValueError(f"part must hold at least one of {steps} steps, got {part}")
    table = make((len(whole) - begin + 0.5) / len(whole)) if begin else whole
    return table.until(end - begin)
