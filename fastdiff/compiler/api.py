"""``fastdiff.compile(model)`` and its opposite."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from fastdiff.compiler.compiled import Compiled
from fastdiff.compiler.cuda_graphs import MAX_BYTES
from fastdiff.compiler.options import CacheOptions, Options
from fastdiff.compiler.passes.quantize import check

Model = TypeVar("Model")


def compile(
    model: Model,
    *,
    roles: Mapping[str, str] | None = None,
    mode: str = "default",
    freeze: bool = False,
    max_graphs: int = 8,
    cuda_graphs: bool = True,
    max_graph_bytes: int = MAX_BYTES,
    quantize: str | None = None,
    skip: Iterable[str] = (),
    dtype: torch.dtype | str | None = None,
    disk_cache: bool = True,
    layout: str = "auto",
    components: Iterable[str] | None = None,
    cache: str | Mapping[str, Any] | None = None,
) -> Model:
    """The same model, whose calls run fused and without repeating what a step does not change.

    The model is changed in place and returned: its class, attributes, weights, ``state_dict``,
    ``save_pretrained`` and ``.to()`` stay what they were; in-place changes of weights are seen.
    The first call with a new set of shapes captures a graph (``torch.compile``'s front end, without
    Inductor). Calls that need gradients, and training mode, run the model's own code.

    A pipeline of diffusers is changed in place, too: its denoisers, ControlNets, and the encoder
    and decoder of its autoencoder are compiled, and its scheduler becomes the class of
    ``fastdiff.integrations.diffusers`` that gives the same results. Text encoders, which run once
    per prompt, stay as they are unless ``components`` names them.

    roles: for arguments of ``forward`` that do not have a usual name: "sample" (different in every
        step), "time", or "condition" (the same over a run, the default).
    mode: "default", or "max": what is left between fastdiff's ops is compiled by Inductor, which
        takes minutes for a large model.
    freeze: on a CPU with bf16 products, keep the weights a second time, in the order that those
        take (the report counts them), and images channels last. Writes to weights are still seen,
        but for those through ``weight.data`` (fusing a LoRA): compile again after them.
    max_graphs: how many sets of shapes are kept (of each part of a pipeline), and how many recorded
        steps of ``fastdiff.sample``.
    cuda_graphs: on a CUDA device, replay the programs as CUDA graphs, from the second call on; the
        results have memory of their own. Runs of ``fastdiff.sample`` are replays of one recorded
        step, solver and noise included, where nothing looks between the steps; the report says why
        a run was none.
    max_graph_bytes: what the CUDA graphs of the model may take together; the least recently used
        are recorded again when they are needed.
    quantize: "int8" (weights of one byte) or "fp8" (inputs too; sm_89 or newer): linear layers in
        blocks run through ``linear_quantized``. The weights stay as they are, too, and are watched:
        this saves reading them, not memory. Embeddings, first and last layers, layers with less
        than 64 features, and what no step repeats stay; on CUDA so does what the kernel cannot run
        (float32). On a CPU "int8" runs in plain PyTorch, slower than the layers. The report has
        the error of each layer. Calls with gradients run the model's own layers.
    skip: names of modules that are not quantised, with all that is in them, or patterns (``*``).
    dtype: bfloat16, float16 or float32: the model is cast in place, but for what a model of
        diffusers keeps in float32; :func:`uncompile` does not undo it. Inputs in the dtype that
        it had are cast on the way in (not times, and not what is called ``...ids``), and results
        back to the dtype of the sample. Of a pipeline, all models are cast, as ``pipe.to(dtype)``
        does; ``quantize`` does not concern its autoencoder. None: the model's own. "auto": bfloat16
        for a float32 model on a CPU with AMX or AVX512_BF16 (that oneDNN may use), else its own;
        the report says which.
    disk_cache: store captured graphs (not weights) in the folder ``graphs`` of
        ``fastdiff.environment.cache_folder()``, and use those that an earlier process stored for
        the same code, settings and shapes. At most 512 MiB; the report says what was not stored.
    layout: of the images that 2-D convolutions take. "channels_last": their weights are kept a
        second time in that order (the report counts them; writes are seen as with ``freeze``);
        results keep the strides that the model gives them. "contiguous": as the model's own code
        has them, but for what ``freeze`` packs. "auto": channels last on CUDA in half precision.
        ``mode="max"`` leaves it to Inductor.
    components: of a pipeline, the names of those to change; None: all of the above.
    cache: changes results. Some steps of a sampling run are computed in part, the rest comes from
        an earlier step: "deepcache" or "first_block", or a dictionary with one of them as "kind"
        and

        - deepcache, for U-Nets (https://arxiv.org/abs/2312.00858): "interval" (3): every so many
          steps one is computed whole; "branch" (0): the skip connection, from the outside, at
          which the steps between take what comes from below from the last whole step.
        - first_block, for transformers (the first-block cache of ParaAttention): "threshold"
          (0.05; 0.05 to 0.12 are in use): the first block always runs; where its residual differs
          by less from the last whole step's (mean|new - old| / mean|old|), what the other blocks
          added then is added again. The host waits for the device once per step to compare.
        - "first" (1) and "last" (0): how many steps of a run are whole in any case; "steps": how
          many a run has, which "last" needs and a pipeline knows.
        - "measure" (False): steps computed in part are computed whole, too, for the deviation in
          the report. That costs what the cache saves.

        A run begins, whole, with another condition (by identity), where the time turns round, in
        another thread or call of a pipeline, and after a change of weights. Where a time comes
        twice in a row, two samples may take turns, and steps are whole until it moves on alone.
        Outside of a pipeline a time on another device than the CPU is waited for in each step.
        Where a model cannot be cut, it runs whole and the report has the reason.

    Raises TypeError for something else than a module or a pipeline, ValueError for bad options.
    ``report(model)`` says what was done.
    """
    if isinstance(skip, str):
        raise TypeError(f"skip must be a list of names or patterns, got {skip!r}")
    options = Options(
        mode=mode,
        freeze=freeze,
        max_graphs=max_graphs,
        cuda_graphs=cuda_graphs,
        max_graph_bytes=max_graph_bytes,
        quantize=quantize,
        skip=tuple(skip),
        dtype=dtype,
        layout=layout,
        cache=CacheOptions.of(cache),
        disk_cache=disk_cache,
    )
    if is_pipeline(model):
        from fastdiff.integrations.diffusers import pipeline

        if roles is not None:
            raise ValueError(f"roles must be None for a pipeline, got {roles}")
        pipeline.compile_pipeline(model, options, components)
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module or a pipeline of diffusers, got "
            f"{type(model).__name__}"
        )
    if components is not None:
        raise ValueError(f"components must be None for a module, got {components}")
    if options.cache is not None and options.cache.last and options.cache.steps is None:
        raise ValueError(
            "cache['steps'] must be the number of steps of a run where cache['last'] is given, "
            "got None"
        )
    check((model,), options)
    install(model, options, roles)
    return model


def install(model: nn.Module, options: Options, roles: Mapping[str, str] | None = None) -> Compiled:
    """Puts a :class:`Compiled` in the place of the module's call."""
    made = Compiled(model, options, roles)
    # nn.Module keeps this out of copies and pickles.
    model._compiled_call_impl = made  # type: ignore[assignment]
    return made


def uncompile(model: Model) -> Model:
    """Undoes :func:`compile`; the model's own code, and a pipeline's own scheduler, run again.

    A model that ``dtype`` cast keeps the new precision.
    """
    if is_pipeline(model):
        from fastdiff.integrations.diffusers import pipeline

        pipeline.uncompile_pipeline(model)
    elif (found := compiled(model)) is not None:
        found.close()
        model._compiled_call_impl = None  # type: ignore[attr-defined]
    return model


def is_pipeline(model: Any) -> bool:
    """Whether it is a pipeline of diffusers; diffusers is not imported to find out."""
    loaded = sys.modules.get("diffusers.pipelines.pipeline_utils")
    return loaded is not None and isinstance(model, loaded.DiffusionPipeline)


def compiled(model: Any) -> Compiled | None:
    """What :func:`compile` put in the model."""
    found = getattr(model, "_compiled_call_impl", None)
    return found if isinstance(found, Compiled) else None


def report(model: Any) -> Any:
    """What was captured, fused and hoisted so far, and why calls ran the model's own code.

    A ``Report``; of a pipeline a ``PipelineReport``, with one line for each component. Raises
    ValueError for what is not compiled.
    """
    if is_pipeline(model):
        from fastdiff.integrations.diffusers import pipeline

        return pipeline.report_pipeline(model)
    found = compiled(model)
    if found is None:
        raise ValueError(f"model must be compiled by fastdiff.compile, got {type(model).__name__}")
    return found.report()
