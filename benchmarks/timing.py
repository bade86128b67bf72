"""How everything here is timed; the tuner of launches times the same way."""

from __future__ import annotations

from typing import Any

import torch

from fastdiff._timing import MAX_ROUNDS, MIN_ROUNDS, Function, Timing, interleaved

__all__ = ["MAX_ROUNDS", "MIN_ROUNDS", "Function", "Timing", "graphed", "interleaved"]

WARM_UPS = 3


def graphed(function: Function) -> tuple[Function, Any]:
    """(what replays the call as a CUDA graph, the result that every replay writes).

    Launching is not in the time of a replay: what is compared is what the GPU does. Raises what
    the capture raises, for a function that synchronises, say.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compilation, autotuning and workspaces, before the capture
        for _ in range(WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = function()
    except Exception:
        torch.cuda.synchronize()  # what the failed capture has left behind
        raise
    graph.replay()
    return graph.replay, result
