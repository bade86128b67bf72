"""From prompts to what a denoiser is conditioned on; one class for each family of models.

The text encoders and tokenizers are transformers'. The numbers are those of diffusers' pipelines
for prompts of one window of tokens. A longer prompt is encoded in windows one behind the other,
each with its own start and end token, and the contexts are joined along the tokens; the pooled
vector is the first window's. (diffusers cuts the prompt off instead: ``long="cut"``.)
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.solvers.grids import check_choice

LONG = ("windows", "cut", "error")
Cond = dict[str, Tensor]


class TextEncoder:
    """A text encoder of transformers with its tokenizer.

    max_tokens: the length of a window; default the tokenizer's, at most the encoder's positions.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, max_tokens: int | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        config: Any = model.config
        positions = getattr(config, "max_position_embeddings", None)
        known = [int(tokenizer.model_max_length), *([positions] if positions else [])]
        self.max_tokens = max_tokens or min(known)
        # What the tokenizer puts before and behind the tokens of a text.
        inner = tokenizer("a", add_special_tokens=False).input_ids
        whole = tokenizer("a").input_ids
        first = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
        self._before, self._after = whole[:first], whole[first + len(inner) :]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def windows(self, prompts: Sequence[str], long: str) -> list[list[list[int]]]:
        """Of each prompt, its tokens in windows without start and end."""
        check_choice("long", long, LONG)
        room = self.max_tokens - len(self._before) - len(self._after)
        made = []
        for prompt in prompts:
            ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
            if len(ids) > room and long != "windows":
                rest = self.tokenizer.decode(ids[room:])
                message = f"prompt must be of at most {room} tokens, got {len(ids)}: {rest!r} is"
                if long == "error":
                    raise ValueError(f"{message} too much")
                warnings.warn(f"{message} cut off", stacklevel=3)
                ids = ids[:room]
            made.append([ids[i : i + room] for i in range(0, len(ids), room)] or [[]])
        return made

    def tokens(self, windows: Sequence[Sequence[int]]) -> Tensor:
        """int64 [B, max_tokens]: windows with start and end, padded."""
        rows = [[*self._before, *ids, *self._after] for ids in windows]
        pad = self.tokenizer.pad_token_id
        padded = [[*row, *[pad] * (self.max_tokens - len(row))] for row in rows]
        return torch.tensor(padded, device=self.device)

    def __call__(
        self, prompts: Sequence[str], *, layer: int | None, long: str, count: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(context [B, S, D], pooled [B, D]).

        layer: of ``hidden_states``, or None for the encoder's own result. count: windows to encode,
        at least (empty ones are added); S is their number times max_tokens.
        """
        split = self.windows(prompts, long)
        count = max([count or 1, *map(len, split)])
        contexts, pooled = [], None
        for index in range(count):
            ids = self.tokens([part[index] if index < len(part) else [] for part in split])
            out = self.model(ids, output_hidden_states=layer is not None)
            contexts.append(out.last_hidden_state if layer is None else out.hidden_states[layer])
            if pooled is None:
                pooled = getattr(out, "text_embeds", None)
                pooled = getattr(out, "pooler_output", None) if pooled is None else pooled
        if pooled is None:
            pooled = contexts[0][:, 0]
        return torch.cat(contexts, dim=1), pooled

    def count(self, prompts: Sequence[str], long: str) -> int:
        """How many windows the longest of the prompts takes."""
        if long != "windows":
            return 1
        return max(map(len, self.windows(prompts, long)))


def as_cut(long: str) -> str:
    """For encoders whose model takes one window: a long prompt is cut, with a warning."""
    check_choice("long", long, LONG)
    return "error" if long == "error" else "cut"


class Conditioner:
    """Prompts of one family to the arguments of its denoiser.

    encoders: by the name of the folder they come in. What every family shares is here: prompts with
    and without guidance are encoded with as many windows.
    """

    names: tuple[str, ...] = ()
    # Whether an absent negative prompt is zeros rather than the empty prompt's encoding.
    zeros: bool = False

    def __init__(self, encoders: dict[str, TextEncoder]) -> None:
        self.encoders = encoders

    def __call__(
        self,
        prompts: Sequence[str],
        negative: Sequence[str] | None,
        *,
        size: tuple[int, int],
        guided: bool,
        long: str = "windows",
        clip_skip: int = 0,
        **more: Any,
    ) -> tuple[Cond, Cond | None]:
        """(cond, uncond) for ``fastdiff.sample``; uncond is None without guidance.

        prompts, negative: [B] texts. size: (height, width) in pixels. clip_skip: layers of CLIP
        left out at its end. more: the family's own, see ``describe``.
        """
        count = self.windows([*prompts, *(negative or [])], long) if guided else None
        cond = self.encode(prompts, long, count, clip_skip)
        uncond = None
        if guided and negative is None and self.zeros:
            uncond = {name: torch.zeros_like(value) for name, value in cond.items()}
        elif guided:
            # As diffusers' pipelines, which skip layers of the prompt alone.
            uncond = self.encode(negative or [""] * len(prompts), long, count, 0)
        return self.describe(cond, uncond, size, **more)

    def windows(self, prompts: Sequence[str], long: str) -> int:
        """The windows of the longest prompt."""
        return max(encoder.count(prompts, long) for encoder in self.encoders.values())

    def encode(self, prompts: Sequence[str], long: str, count: int | None, skip: int) -> Cond:
        raise NotImplementedError

    def describe(
        self, cond: Cond, uncond: Cond | None, size: tuple[int, int]
    ) -> tuple[Cond, Cond | None]:
        """With what the picture's size says."""
        return cond, uncond


class StableDiffusionText(Conditioner):
    """SD 1 and 2: the context is CLIP's last layer, behind its final norm."""

    names = ("text_encoder",)

    def encode(self, prompts: Sequence[str], long: str, count: int | None, skip: int) -> Cond:
        encoder = self.encoders["text_encoder"]
        layer = -(skip + 1) if skip else None
        context, _ = encoder(prompts, layer=layer, long=long, count=count)
        if skip:
            context = final_norm(encoder.model)(context)
        return {"context": context}


def final_norm(model: nn.Module) -> nn.Module:
    """CLIP's ``final_layer_norm``, wherever transformers keeps it."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "final_layer_norm":
            return module
    raise TypeError(f"model must be a CLIP text encoder, got {type(model).__name__}")


class StableDiffusionXLText(Conditioner):
    """SDXL: both encoders' last layer but one; ``y`` is the second's pooled vector, then the sizes.

    vector: ``UNet.vector`` of the denoiser, which joins those two. zeros:
    ``force_zeros_for_empty_prompt``. refiner: it is told an aesthetic score in place of the target
    size; its files have the second encoder alone.
    """

    names = ("text_encoder", "text_encoder_2")

    def __init__(
        self,
        encoders: dict[str, TextEncoder],
        vector: Callable[[Tensor, Tensor], Tensor],
        *,
        zeros: bool = True,
        refiner: bool = False,
    ) -> None:
        super().__init__(encoders)
        self.vector, self.zeros, self.refiner = vector, zeros, refiner

    def encode(self, prompts: Sequence[str], long: str, count: int | None, skip: int) -> Cond:
        contexts, pooled = [], None
        for name in self.names:
            if name in self.encoders:
                encoder = self.encoders[name]
                made, pooled = encoder(prompts, layer=-(skip + 2), long=long, count=count)
                contexts.append(made)
        assert pooled is not None
        return {"context": torch.cat(contexts, dim=-1), "y": pooled}

    def describe(
        self,
        cond: Cond,
        uncond: Cond | None,
        size: tuple[int, int],
        *,
        original_size: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
    ) -> tuple[Cond, Cond | None]:
        """original_size, crop, target_size: (height, width) or (top, left), in pixels."""
        first: list[float] = [*(original_size or size), *crop]
        for made, score in ((cond, aesthetic_score), (uncond, negative_aesthetic_score)):
            if made is not None:
                last = [score] if self.refiner else [*(target_size or size)]
                numbers = torch.tensor([*first, *last], device=made["y"].device)
                made["y"] = self.vector(made["y"], numbers.expand(len(made["y"]), -1))
        return cond, uncond


class StableDiffusion3Text(Conditioner):
    """SD3: both CLIPs side by side, padded to T5's width, then T5's tokens; ``y``: both pooled.

    width: of the context. t5_tokens: T5's window, where there is none, of the zeros in its place.
    """

    names = ("text_encoder", "text_encoder_2", "text_encoder_3")

    def __init__(
        self, encoders: dict[str, TextEncoder], *, width: int, t5_tokens: int = 256
    ) -> None:
        super().__init__(encoders)
        self.width, self.t5_tokens = width, t5_tokens

    def windows(self, prompts: Sequence[str], long: str) -> int:
        """T5's window is long enough for what two or three of CLIP's hold."""
        clips = [self.encoders[name] for name in self.names[:2]]
        return max(encoder.count(prompts, long) for encoder in clips)

    def encode(self, prompts: Sequence[str], long: str, count: int | None, skip: int) -> Cond:
        clips = [
            self.encoders[name](prompts, layer=-(skip + 2), long=long, count=count)
            for name in self.names[:2]
        ]
        context = torch.cat([made for made, _ in clips], dim=-1)
        context = nn.functional.pad(context, (0, self.width - context.shape[-1]))
        if "text_encoder_3" in self.encoders:
            tail, _ = self.encoders["text_encoder_3"](prompts, layer=None, long=as_cut(long))
        else:
            tail = context.new_zeros(len(prompts), self.t5_tokens, self.width)
        context = torch.cat([context, tail.to(context.dtype)], dim=1)
        return {"context": context, "y": torch.cat([pooled for _, pooled in clips], dim=-1)}


class FluxText(Conditioner):
    """FLUX: the context is T5's, ``y`` CLIP's pooled vector."""

    names = ("text_encoder", "text_encoder_2")

    def windows(self, prompts: Sequence[str], long: str) -> int:
        """One: a long prompt is T5's to read; CLIP's pooled vector is of its first window."""
        return 1

    def encode(self, prompts: Sequence[str], long: str, count: int | None, skip: int) -> Cond:
        clip, t5 = (self.encoders[name] for name in self.names)
        _, pooled = clip(prompts, layer=None, long="windows")
        context, _ = t5(prompts, layer=None, long=as_cut(long))
        return {"context": context, "y": pooled}


class ClassLabels(Conditioner):
    """Class-conditional models: a prompt is a class number; ``name`` is the denoiser's argument.

    null: the label that means none, for guidance; None where the model has no such label.
    one_hot: the argument is [B, num_classes] (EDM), and no class is zeros.
    """

    def __init__(
        self, num_classes: int, null: int | None, *, name: str = "y", one_hot: bool = False
    ) -> None:
        super().__init__({})
        self.num_classes, self.null, self.name, self.one_hot = num_classes, null, name, one_hot

    def windows(self, prompts: Sequence[Any], long: str) -> int:
        return 1

    def encode(self, prompts: Sequence[Any], long: str, count: int | None, skip: int) -> Cond:
        labels = []
        for prompt in prompts:
            if prompt == "":
                if self.null is None and not self.one_hot:
                    raise ValueError("guidance_scale must be 1 for a model without a null label")
                labels.append(self.num_classes if self.null is None else self.null)
                continue
            try:
                label = operator.index(prompt) if not isinstance(prompt, str) else int(prompt)
            except (TypeError, ValueError):
                raise ValueError(f"prompt must be a class number, got {prompt!r}") from None
            if not 0 <= label < self.num_classes:
                raise ValueError(f"prompt must be in 0..{self.num_classes - 1}, got {label}")
            labels.append(label)
        y = torch.tensor(labels)
        if self.one_hot:
            y = nn.functional.one_hot(y, self.num_classes + 1)[:, :-1].float()
        return {self.name: y}


class Unconditional(Conditioner):
    """Models without a condition: a prompt is the empty text, or None."""

    def windows(self, prompts: Sequence[Any], long: str) -> int:
        return 1

    def encode(self, prompts: Sequence[Any], long: str, count: int | None, skip: int) -> Cond:
        if any(prompts):
            raise ValueError(f"prompt must be None for an unconditional model, got {prompts[0]!r}")
        return {}
