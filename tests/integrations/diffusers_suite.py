"""diffusers' own scheduler tests, run on fastdiff's classes.

``python tests/integrations/diffusers_suite.py CHECKOUT`` with a checkout of diffusers at the
installed version: every test file of a class of fastdiff.integrations.diffusers runs with that
class in the place of diffusers'. With ``--theirs`` after it, diffusers' own classes run instead, to
compare with. Prints the count per file; the exit status is pytest's. (The flow-matching classes
have no test file there.)
"""

from __future__ import annotations

import sys
from pathlib import Path

import diffusers
import pytest

from fastdiff.integrations import diffusers as ours

FILES = {
    "CMStochasticIterativeScheduler": "consistency_model",
    "DDIMInverseScheduler": "ddim_inverse",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "deis",
    "DPMSolverMultistepInverseScheduler": "dpm_multi_inverse",
    "DPMSolverMultistepScheduler": "dpm_multi",
    "DPMSolverSinglestepScheduler": "dpm_single",
    "EDMDPMSolverMultistepScheduler": "edm_dpmsolver_multistep",
    "EDMEulerScheduler": "edm_euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": "kdpm2_ancestral",
    "KDPM2DiscreteScheduler": "kdpm2_discrete",
    "LCMScheduler": "lcm",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "pndm",
    "TCDScheduler": "tcd",
    "UniPCMultistepScheduler": "unipc",
}


class Count:
    """Passed and failed tests of each file."""

    def __init__(self) -> None:
        self.outcomes: dict[str, dict[str, int]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.split("::")[0]
            counts = self.outcomes.setdefault(name, {})
            counts[report.outcome] = counts.get(report.outcome, 0) + 1


def main(checkout: Path, *arguments: str) -> int:
    if "--theirs" in arguments:
        arguments = tuple(argument for argument in arguments if argument != "--theirs")
    else:
        for name in FILES:
            setattr(diffusers, name, getattr(ours, name))
    sys.path.insert(0, str(checkout))
    folder = checkout / "tests" / "schedulers"
    files = [str(folder / f"test_scheduler_{name}.py") for name in FILES.values()]
    count = Count()
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(checkout), "-W", "ignore"]
    status = pytest.main([*options, *files, *arguments], plugins=[count])
    for name, counts in sorted(count.outcomes.items()):
        print(name, ", ".join(f"{number} {outcome}" for outcome, number in counts.items()))
    return int(status)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
