"""What a model predicts, and how a solver gets x0 from it.

With ``x = alpha x0 + sigma eps``:

======  ==========================  ===================================
name    the model's output          x0
======  ==========================  ===================================
"eps"   eps                         (x - sigma output)/alpha
"v"     alpha eps - sigma x0        alpha x - sigma output
"x0"    x0                          output
======  ==========================  ===================================

"v" is from arXiv 2202.00512 (appendix D) and needs alpha^2 + sigma^2 = 1.
"""

from __future__ import annotations

from fastdiff.solvers.schedules import unknown

_NAMES = {
    "eps": "eps",
    "epsilon": "eps",
    "v": "v",
    "v_prediction": "v",
    "x0": "x0",
    "sample": "x0",
}


def canonical(prediction: str) -> str:
    """ "eps", "v" or "x0"; takes diffusers' names too; ValueError for any other."""
    if not isinstance(prediction, str):
        raise TypeError(f"prediction must be a string, got {type(prediction).__name__}")
    if prediction not in _NAMES:
        raise ValueError(unknown("prediction", prediction, list(_NAMES)))
    return _NAMES[prediction]


def to_x0(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """(from_state, from_output) such that ``x0 = from_state*x + from_output*output``.

    Raises ValueError for an eps model where alpha is 0 (zero terminal SNR): the noise alone says
    nothing about x0.
    """
    kind = canonical(prediction)
    if kind == "x0":
        return 0.0, 1.0
    if kind == "v":
        return alpha, -sigma
    if alpha == 0:
        raise ValueError(
            "prediction must be v or x0 for a schedule with zero terminal SNR (alpha = 0 at the "
            "first step), got eps"
        )
    return 1.0 / alpha, -sigma / alpha
