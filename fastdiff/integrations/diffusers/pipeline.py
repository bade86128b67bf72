"""``fastdiff.compile`` for a whole pipeline of diffusers."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import diffusers
from torch import nn

from fastdiff.compiler import api
from fastdiff.compiler.compiled import SAMPLE_NAMES, TIME_NAMES
from fastdiff.compiler.options import Options
from fastdiff.compiler.passes.quantize import check
from fastdiff.compiler.precision import cast
from fastdiff.compiler.reports import Report
from fastdiff.integrations import diffusers as adapters
from fastdiff.integrations.diffusers.base import TableStep

# Their encoder and decoder are pure functions of a tensor; those of videos carry caches.
AUTOENCODERS = (
    "AsymmetricAutoencoderKL",
    "AutoencoderDC",
    "AutoencoderKL",
    "AutoencoderTiny",
    "VQModel",
)


@dataclass
class _Swap:
    """What :func:`compile_pipeline` did to a pipeline's scheduler."""

    before: Any
    after: Any


# By pipeline: it must not be copied or saved with the pipeline.
_SWAPS: weakref.WeakKeyDictionary[Any, _Swap] = weakref.WeakKeyDictionary()


def parts(name: str, component: Any) -> tuple[dict[str, nn.Module], str]:
    """The modules of a component that are worth compiling, by name, or why there are none."""
    if not isinstance(component, nn.Module):
        return {}, "it is no module"
    nets = getattr(component, "nets", None)
    if isinstance(nets, nn.ModuleList):  # several ControlNets
        return {f"{name}.nets.{i}": net for i, net in enumerate(nets)}, ""
    if hasattr(component, "decode") and hasattr(component, "decoder"):
        if type(component).__name__ not in AUTOENCODERS:
            return {}, "only autoencoders of images are compiled"
        # Users call encode and decode, which are no forward; these two modules do the work.
        halves = {half: getattr(component, half, None) for half in ("encoder", "decoder")}
        return {f"{name}.{h}": m for h, m in halves.items() if isinstance(m, nn.Module)}, ""
    arguments = inspect.signature(component.forward).parameters
    if not set(arguments) & set(TIME_NAMES) or not set(arguments) & set(SAMPLE_NAMES):
        return {}, "it runs once per call"
    return {name: component}, ""


def compile_pipeline(pipe: Any, options: Options, components: Iterable[str] | None) -> Any:
    """``fastdiff.compile`` of a pipeline; see there."""
    present = pipe.components
    chosen = None if components is None else set(components)
    for name in sorted((chosen or set()) - set(present)):
        raise ValueError(
            f"components must name parts of the pipeline ({', '.join(present)}), got {name!r}"
        )
    work: list[tuple[nn.Module, Options]] = []
    # The autoencoder is cast as a whole, its few linear layers are no work, and it has no steps.
    plain = replace(options, quantize=None, skip=(), dtype=None, cache=None)
    for name, component in present.items():
        if chosen is not None and name not in chosen:
            continue
        found, _ = parts(name, component)
        if chosen is not None and not found and isinstance(component, nn.Module):
            found = {name: component}  # by the user's word
        denoiser = not hasattr(component, "decoder")
        work += [(part, options if denoiser else plain) for part in found.values()]
    check([part for part, asked in work if asked is options], options)
    for part, asked in work:
        # Pipelines share components.
        made = api.compiled(part)
        if made is None or made.options != asked:
            made = api.install(part, asked)
        if made.token is None:
            made.token, made.length = _run_of(pipe), _length_of(pipe)
    # The rest is cast, too, as `pipe.to(dtype)` does: parts hand their dtype on to each other.
    done = {part for part, asked in work if asked is options}
    for name, component in present.items():
        if not isinstance(component, nn.Module) or (chosen is not None and name not in chosen):
            continue
        if not done & set(component.modules()) and not getattr(component, "is_quantized", False):
            cast(component, options.dtype, {}, None)
    scheduler = present.get("scheduler")
    if scheduler is not None and (chosen is None or "scheduler" in chosen):
        adapter, _ = adapter_of(scheduler)
        if adapter is not None:
            _SWAPS[pipe] = _Swap(scheduler, adapter)
            _set_scheduler(pipe, adapter)
    return pipe


def _run_of(pipe: Any) -> Callable[[], Any]:
    """Gives an object that is another one in each call of the pipeline: its list of timesteps."""
    reference = weakref.ref(pipe)

    def token() -> Any:
        return getattr(getattr(reference(), "scheduler", None), "timesteps", None)

    return token


def _length_of(pipe: Any) -> Callable[[], int | None]:
    """Gives the number of steps of the pipeline's present run, where it has one."""
    reference = weakref.ref(pipe)

    def length() -> int | None:
        scheduler = getattr(reference(), "scheduler", None)
        times = getattr(scheduler, "timesteps", None)
        return None if times is None else len(times) - (getattr(scheduler, "begin_index", 0) or 0)

    return length


def uncompile_pipeline(pipe: Any) -> Any:
    """Undoes :func:`compile_pipeline`. A scheduler set after it stays."""
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            for part in (component, *parts(name, component)[0].values()):
                api.uncompile(part)
    scheduler = getattr(pipe, "scheduler", None)
    swap = _SWAPS.pop(pipe, None)
    if swap is not None and swap.after is scheduler:
        _set_scheduler(pipe, swap.before)
    elif isinstance(scheduler, TableStep):  # a copy, or one that shares its components
        theirs = getattr(diffusers, type(scheduler).__name__)
        _set_scheduler(pipe, _as(theirs, scheduler))
    return pipe


def adapter_of(scheduler: Any) -> tuple[Any, str]:
    """(the same scheduler with fastdiff's step, or None; why not)."""
    name = type(scheduler).__name__
    if isinstance(scheduler, TableStep):
        return None, "its step is fastdiff's"
    if getattr(diffusers, name, None) is not type(scheduler):
        return None, "its class is none of diffusers' own"
    if name not in adapters.__all__:
        return None, "no table covers its class"
    adapter = _as(getattr(adapters, name), scheduler)
    if reason := TableStep._unsupported(adapter):
        return None, reason
    return adapter, ""


def _as(cls: Any, scheduler: Any) -> Any:
    """A scheduler of another class in the same state, its step aside."""
    made = cls.from_config(scheduler.config)
    for name, value in vars(scheduler).items():
        # from_config alone loses what was set beside the configuration (set_shift), and what
        # pipelines have corrected in it (steps_offset).
        if not hasattr(TableStep, name):
            setattr(made, name, value if name == "_internal_dict" else copy.deepcopy(value))
    return made


def _set_scheduler(pipe: Any, scheduler: Any) -> None:
    pipe.scheduler = scheduler
    # model_index.json: whoever loads it may not have fastdiff.
    if isinstance(scheduler, TableStep):
        pipe.register_to_config(scheduler=("diffusers", type(scheduler).__name__))


@dataclass
class ComponentReport:
    """status: "compiled", "swapped" (the scheduler) or "kept". why: the reason, or "".

    parts: what was compiled, by name.
    """

    status: str
    why: str = ""
    parts: dict[str, Report] = field(default_factory=dict)


@dataclass
class PipelineReport:
    """What ``fastdiff.compile`` did to each component of a pipeline."""

    pipeline: str
    components: dict[str, ComponentReport]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def captures(self) -> int:
        """Graphs captured so far, of all parts; those no longer kept count, too."""
        every = (r for c in self.components.values() for r in c.parts.values())
        return sum(report.captures for report in every)

    def __str__(self) -> str:
        lines = [self.pipeline]
        for name, found in self.components.items():
            lines.append(f"{name}: {found.status}{f' ({found.why})' if found.why else ''}")
            for part, report in found.parts.items():
                text = str(report).splitlines()
                lines.append(f"  {part}: {text[0]}")
                lines += [f"    {line}" for line in text[1:]]
        return "\n".join(lines)


def report_pipeline(pipe: Any) -> PipelineReport:
    """ValueError where nothing of the pipeline is compiled."""
    found = {name: _of(name, component) for name, component in pipe.components.items()}
    if all(component.status == "kept" for component in found.values()):
        raise ValueError(f"model must be compiled by fastdiff.compile, got {type(pipe).__name__}")
    return PipelineReport(type(pipe).__name__, found)


def _of(name: str, component: Any) -> ComponentReport:
    if component is None:
        return ComponentReport("kept", "there is none")
    if isinstance(component, TableStep):
        reason = component._reason
        return ComponentReport("swapped", f"diffusers' own step runs: {reason}" if reason else "")
    if hasattr(component, "set_timesteps"):
        _, why = adapter_of(component)
        return ComponentReport("kept", why or "it was set after the pipeline was compiled")
    if not isinstance(component, nn.Module):
        return ComponentReport("kept", "it is no module")
    wanted, why = parts(name, component)
    wanted = wanted or {name: component}
    reports = {part: c.report() for part, m in wanted.items() if (c := api.compiled(m)) is not None}
    if not reports:
        return ComponentReport("kept", why or "it was not chosen, or set after compiling")
    missing = sorted(set(wanted) - set(reports))
    return ComponentReport("compiled", f"without {', '.join(missing)}" if missing else "", reports)
