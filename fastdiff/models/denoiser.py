"""What every denoiser of the zoo is: three programs, one behind the other.

A sampling run calls ``prompt`` once, ``schedule`` once for all steps, and ``step`` in every step;
``forward`` is the three of them, so that a model is also an ordinary module. ``fastdiff.sample``
runs a model of this kind in that way, and ``fastdiff.compile`` finds the same three by itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

# Tensors in any nest of tuples, lists and dicts; None where there is nothing.
Values = Any


class Denoiser(nn.Module):
    """``model(x, t, **cond)``: x [B, C, H, W] or [B, C, F, H, W], t [B], the condition's tensors.

    A subclass gives the three methods and, in its docstring, the condition's arguments.

    sampling: a ``fastdiff.models.Sampling`` or None; tells ``fastdiff.sample`` the schedule, the
    prediction and the shape the weights were trained for. ``fastdiff.load`` sets it.
    """

    sampling: Any = None

    def prompt(self, *cond: Any, **named: Any) -> Values:
        """What depends on the condition alone; its tensors have the batch first."""
        raise NotImplementedError

    def schedule(self, t: Tensor, prompt: Values) -> Values:
        """What depends on the time, and not on the state.

        t: [B], or [S, B] for S steps at once. Every tensor of the result has t's dimensions first,
        so that the values of step s are those at index s.
        """
        raise NotImplementedError

    def step(self, x: Tensor, schedule: Values, prompt: Values) -> Tensor:
        """The prediction; ``schedule`` as for t [B]."""
        raise NotImplementedError

    def forward(self, x: Tensor, t: Tensor, *cond: Any, **named: Any) -> Tensor:
        prompt = self.prompt(*cond, **named)
        return self.step(x, self.schedule(t, prompt), prompt)
