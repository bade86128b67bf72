"""fastdiff.compile on every model of diffusers' own test configurations.

    python tests/compiler/diffusers_suite.py CHECKOUT [--dtype float32] [--only NAME] [--json FILE]

CHECKOUT is a clone of diffusers; its tests are not part of its packages. Each configuration class
(``get_init_dict``, ``get_dummy_inputs``) is one case: the model is made with the same weights
every time, and run on its inputs, on the same inputs again (kept results are found) and on another
sample. The outcome is one of

    matches     within twice eager's own error against float64; where the model cannot run in
                float64, within the float32 tolerance of torch.testing
    refuses     fastdiff.compile left the model's own code running, and the report says why
    differs     anything else: what must not happen
    no eager    the installed diffusers lacks the model, or it does not run by itself
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import inspect
import json
import logging
import pathlib
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fastdiff import compiler
from fastdiff.testing import assert_within_2x


def configurations(checkout: pathlib.Path) -> Iterator[tuple[str, type | Exception]]:
    """(file:class, class) of every configuration, or what its file raised at import."""
    sys.path.insert(0, str(checkout))
    for name in ("parameterized", "requests_mock"):  # used by tests, which do not run here
        sys.modules.setdefault(name, mock.MagicMock())
    seen = set()
    for path in sorted((checkout / "tests" / "models").glob("*/test_models_*.py")):
        name = ".".join(path.relative_to(checkout).with_suffix("").parts)
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit) as error:
            yield path.stem, ImportError(f"{type(error).__name__}: {error}")
            continue
        for key, found in vars(module).items():
            if inspect.isclass(found) and found.__module__ == name and key.endswith("Config"):
                methods = [
                    getattr(found, name, None) for name in ("get_init_dict", "get_dummy_inputs")
                ]
                if None in methods:
                    continue
                code = tuple(inspect.getsource(method) for method in methods)
                if code not in seen:
                    seen.add(code)
                    yield f"{path.stem.removeprefix('test_models_')}:{key}", found


def cast(values: Any, dtype: torch.dtype) -> Any:
    """The same structure with every floating tensor in ``dtype``."""

    def one(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    return torch.utils._pytree.tree_map(one, values)


def make(config: Any) -> nn.Module:
    """The model; weights that start as zeros, which hide mistakes, are drawn."""
    torch.manual_seed(0)
    model = config.model_class(**config.get_init_dict()).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def steps(config: Any, model: nn.Module, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Three sets of inputs: the configuration's twice, and one with another sample.

    The same objects where they are the same, as in a sampling loop.
    """
    inputs = cast(dict(config.get_dummy_inputs()), dtype)
    sample = getattr(config, "main_input_name", None)
    if not isinstance(sample, str) or not isinstance(inputs.get(sample), Tensor):
        roles = compiler.compiled.roles_of(model, None)
        sample = next((n for n, role in roles.items() if role == "sample" and n in inputs), None)
    other = dict(inputs)
    if sample is not None and isinstance(inputs[sample], Tensor):
        value = inputs[sample]
        other[sample] = value.flip(-1) * 0.5 if value.is_floating_point() else value.clone()
    return [inputs, dict(inputs), other]


def tensors(output: Any) -> list[Tensor]:
    """Every tensor of an output."""
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    if type(output).__name__ == "DiagonalGaussianDistribution":
        output = [output.parameters]
    return [v for v in torch.utils._pytree.tree_leaves(output) if isinstance(v, Tensor)]


def run(model: nn.Module, inputs: list[dict[str, Any]]) -> list[list[Tensor]]:
    """The outputs of every step, with the same random numbers."""
    results = []
    with torch.no_grad():
        for values in inputs:
            torch.manual_seed(0)
            results.append([t.clone() for t in tensors(model(**values))])
    return results


def outcome(kind: type, dtype: torch.dtype) -> dict[str, Any]:
    """What happened to one configuration."""
    found: dict[str, Any] = {"outcome": "no eager", "why": "", "fused": {}}
    try:
        config = kind()
        model = make(config)
        found["model"] = type(model).__name__
        inputs = steps(config, model, dtype)
        model = model.to(dtype)
        eager = run(model, inputs)
    except Exception as error:
        return {**found, "why": f"{type(error).__name__}: {str(error)[:200]}"}
    try:
        wide = copy.deepcopy(model).double()
        exact = run(wide, [cast(values, torch.float64) for values in inputs])
        del wide
    except Exception:  # some models make float32 constants of their own
        exact = None
    found["oracle"] = exact is not None
    found["outcome"] = "differs"
    try:
        compiler.compile(model)
        mine = run(model, inputs)
        report = compiler.report(model)
        worst = 0.0
        for step, (results, theirs) in enumerate(zip(mine, eager, strict=True)):
            for number, (result, other) in enumerate(zip(results, theirs, strict=True)):
                if exact is None or not result.is_floating_point():
                    torch.testing.assert_close(result, other, equal_nan=True)
                else:
                    what = f"step {step}"
                    worst = max(worst, assert_within_2x(result, exact[step][number], other, what))
    except Exception as error:
        found["why"] = f"{type(error).__name__}: {str(error)[:300]}"
        if not isinstance(error, AssertionError):
            found["traceback"] = traceback.format_exc()
        return found
    found.update(outcome="matches", worst=worst, graphs=len(report.graphs))
    found["fused"] = dict(sum((Counter(g.fused) for g in report.graphs), Counter()))
    found["hoisted"] = [round(g.hoisted, 4) for g in report.graphs]
    whole = [graph.why_whole for graph in report.graphs if graph.why_whole]
    if report.eager or whole:
        found.update(outcome="refuses", why="; ".join([*report.eager, *whole]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=pathlib.Path)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--json", type=pathlib.Path, help="where the outcomes go")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, kind in configurations(options.checkout):
        if options.only not in name:
            continue
        if isinstance(kind, Exception):
            results[name] = {"outcome": "no eager", "why": str(kind)[:200]}
        else:
            results[name] = outcome(kind, getattr(torch, options.dtype))
        torch.compiler.reset()
        gc.collect()
        found = results[name]
        fused = sum(found.get("fused", {}).values())
        print(f"{found['outcome']:9} {name}: {fused} fused {found['why'][:160]}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    counts = Counter(found["outcome"] for found in results.values())
    tried = sum(counts.values()) - counts["no eager"]
    good = counts["matches"]
    print(f"{good} of {tried} match ({good / max(tried, 1):.1%}); {dict(counts)}")
    return 1 if counts["differs"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
