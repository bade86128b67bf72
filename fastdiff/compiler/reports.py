"""What ``fastdiff.compile`` did to a model, in words and as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from fastdiff.compiler.waterfall import svg
from fastdiff.hardware import GPUS, roofline

# What a pass is called in the report, and what it counts.
LEFT = (
    *("group_norm", "layer_norm", "rms_norm", "rsqrt", "scaled_dot_product_attention", "softmax"),
    *("gelu", "silu"),
)

WORST = 10  # layers whose errors are printed


@dataclass
class GraphReport:
    """One captured graph: one set of input shapes.

    shapes: of the inputs. fused: places changed, by op. unfused: calls of PyTorch functions that
    a fusion looks for and that are still there. why_unfused: "call: reason" -> how many of them.
    programs: name -> {"nodes", "flops", "bytes"} (of what it reads and gives, once). half: whether
    products are of half precision. calls: stage of compiling -> calls that launch something, an
    estimate. seconds: from the call to the captured graph. why_whole:
    why it was left as it was, or "". why_piece: why it is not the whole model, or "".
    stored: whether it was read from the disk, where an earlier process had stored it.
    images: how convolutions take them.
    cuda_graphs: program, or "trajectory" (a whole step of ``fastdiff.sample``, with its solver) ->
    {"recordings", "replays", "bytes", "why_not"}. schedule: {"together", "alone", "why_not"}: for
    how many steps of ``fastdiff.sample`` the programs of the time ran all at once, before the first
    step, and for how many one by one, with the reason.
    cache: {} without a step
    cache; {"kind", "why_not"} where it cannot be; else also {"whole": why -> steps, "part": steps,
    "flops_whole", "flops_part": of one step, "saved": of the FLOPs of all steps so far, "bytes":
    kept now, "measured", "runs": the last runs, the newest first, {"error": relative errors in the
    L2 norm of the model's results, "psnr": in dB} by step computed in part, if measured}.
    """

    shapes: dict[str, tuple[int, ...]]
    fused: dict[str, int]
    unfused: dict[str, int]
    nodes_before: int
    nodes_after: int
    programs: dict[str, dict[str, int]]
    seconds: float
    why_whole: str = ""
    cuda_graphs: dict[str, dict[str, Any]] = field(default_factory=dict)
    why_piece: str = ""
    why_unfused: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    half: bool = False
    stored: bool = False
    schedule: dict[str, Any] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict)
    images: str = ""

    @property
    def hoisted(self) -> float:
        """The share of the FLOPs that steps do not repeat."""
        total = sum(program["flops"] for program in self.programs.values())
        return 1 - self.programs["step"]["flops"] / total if total else 0.0

    def limits(self) -> dict[str, float]:
        """Milliseconds that a step takes at least, by GPU: its products at the published rate, or
        its inputs and outputs at the published bandwidth, whichever is more."""
        step = self.programs["step"]
        rate = "half" if self.half else "tf32"
        return {
            gpu.name: 1e3 * roofline(gpu, step["bytes"], step["flops"], rate).seconds
            for gpu in GPUS
        }

    def svg(self, title: str = "calls of a step") -> str:
        """A picture of how the calls of a step become fewer, as SVG."""
        return svg(title, self.calls)


@dataclass
class Report:
    """graphs: the captured ones. eager: why calls ran the model's own code, with counts.

    kept_bytes: of the results of the programs that steps do not repeat. hits, misses: of those.
    captures: how often a graph was captured, those no longer kept included.
    stepwise: why runs of ``fastdiff.sample`` were no replay of a trajectory, with counts.
    dtype: of the weights. instructions: that kernels use, for a model on a CPU, or "".
    cast: from what dtype to what, or "". quantize: "int8", "fp8" or "". quantized: layer ->
    {"weight", "output"}, the relative errors in the Frobenius norm (see `passes.quantize.errors`),
    the worst first; for the weights as they are now. unquantized: other layers -> why. cache: the
    kind of the step cache or "". unstored: why graphs are not on the disk for the next process.
    """

    model: str
    graphs: list[GraphReport] = field(default_factory=list)
    eager: dict[str, int] = field(default_factory=dict)
    kept_bytes: int = 0
    hits: int = 0
    misses: int = 0
    captures: int = 0
    cast: str = ""
    quantize: str = ""
    quantized: dict[str, dict[str, float]] = field(default_factory=dict)
    unquantized: dict[str, str] = field(default_factory=dict)
    unstored: list[str] = field(default_factory=list)
    stepwise: dict[str, int] = field(default_factory=dict)
    cache: str = ""
    dtype: str = ""
    instructions: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.graphs)} graphs"]
        lines += [f"not stored: {reason}" for reason in self.unstored]
        if self.cast:
            lines.append(f"cast from {self.cast}")
        if self.dtype:
            lines.append(f"weights: {self.dtype}")
        if self.instructions:
            lines.append(f"CPU: {self.instructions}")
        lines += self._layers()
        for i, graph in enumerate(self.graphs):
            shapes = ", ".join(f"{name} {list(shape)}" for name, shape in graph.shapes.items())
            lines.append(f"graph {i}: {shapes}")
            made = "read from the disk" if graph.stored else "captured"
            lines.append(
                f"  {made} in {graph.seconds:.1f} s; {graph.nodes_before} nodes, "
                f"{graph.nodes_after} after fusion"
            )
            if graph.why_piece:
                lines.append(f"  a piece of the model: {graph.why_piece}")
            if graph.why_whole:
                lines.append(f"  left as it was: {graph.why_whole}")
            fused = ", ".join(f"{count} {name}" for name, count in graph.fused.items() if count)
            lines.append(f"  fused: {fused or 'nothing'}")
            left = ", ".join(f"{count} {name}" for name, count in graph.unfused.items() if count)
            lines.append(f"  not fused: {left or 'nothing'}")
            lines += [f"    {count} {reason}" for reason, count in graph.why_unfused.items()]
            if graph.images:
                lines.append(f"  images: {graph.images}")
            for name, facts in graph.programs.items():
                lines.append(f"  {name}: {facts['nodes']} calls, {facts['flops'] / 1e9:.3g} GFLOP")
            for name, facts in graph.cuda_graphs.items():
                lines.append(f"  CUDA graph of {name}: {_cuda_graph(facts)}")
            if any(graph.schedule.values()):
                lines.append(f"  {_schedule(graph.schedule)}")
            lines += _step_cache(graph.cache)
            stages = list(graph.calls.items())
            if stages:
                (_, first), (_, last) = stages[0], stages[-1]
                lines.append(f"  calls of a step that launch something: {first} before, {last} now")
            limits = ", ".join(f"{name} {ms:.3g} ms" for name, ms in graph.limits().items())
            lines.append(f"  a step takes at least: {limits}")
            lines.append(f"  {graph.hoisted:.1%} of the FLOPs are not repeated in every step")
        for reason, count in self.eager.items():
            without = f", without {self.cache}" if self.cache else ""
            lines.append(f"ran as it is {count} times{without}: {reason}")
        for reason, count in self.stepwise.items():
            lines.append(f"sampled step by step {count} times: {reason}")
        lines.append(
            f"kept results: {self.kept_bytes / 2**20:.1f} MiB, found {self.hits} times, "
            f"computed {self.misses} times"
        )
        return "\n".join(lines)

    def _layers(self) -> list[str]:
        if not self.quantize:
            return []
        lines = [
            f"{self.quantize}: {len(self.quantized)} layers, {len(self.unquantized)} stay; "
            "relative errors of weight and output:"
        ]
        for name, error in list(self.quantized.items())[:WORST]:
            lines.append(f"  {error['weight']:.2%} {error['output']:.2%} {name}")
        if len(self.quantized) > WORST:
            lines.append(f"  and {len(self.quantized) - WORST} with smaller ones")
        return lines


def _schedule(facts: dict[str, Any]) -> str:
    line = f"of the schedule, {facts['together']} steps ran together"
    if facts["alone"] or facts["why_not"]:
        line += f", {facts['alone']} alone"
    return line + (f": {facts['why_not']}" if facts["why_not"] else "")


def _cuda_graph(facts: dict[str, Any]) -> str:
    if facts["why_not"]:
        return f"none, {facts['why_not']}"
    return (
        f"recorded {facts['recordings']} times, replayed {facts['replays']} times, "
        f"{facts['bytes'] / 2**20:.1f} MiB"
    )


def _step_cache(facts: dict[str, Any]) -> list[str]:
    if not facts:
        return []
    kind = facts["kind"]
    if facts["why_not"]:
        return [f"  {kind}: all steps are whole: {facts['why_not']}"]
    share = facts["flops_part"] / facts["flops_whole"] if facts["flops_whole"] else 1.0
    lines = [
        f"  {kind}: {sum(facts['whole'].values())} steps whole, {facts['part']} in part, with "
        f"{share:.1%} of the FLOPs; {facts['saved']:.1%} of the FLOPs of all steps saved"
    ]
    lines += [f"    {count} whole: {why}" for why, count in facts["whole"].items()]
    if not facts["measured"]:
        lines.append("    deviation: not measured ('measure' of cache)")
    elif not facts["runs"]:
        lines.append("    deviation: no step in part so far")
    else:
        run = facts["runs"][0]
        lines.append(
            f"    deviation, last run: relative L2 {max(run['error']):.2e} at most, "
            f"{sum(run['error']) / len(run['error']):.2e} on average, PSNR {min(run['psnr']):.1f} "
            f"dB at least, over {len(run['error'])} steps in part"
        )
    return lines
