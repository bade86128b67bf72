"""Pipelines: from prompts, pictures or classes to pictures, over models, solvers and ``sample``."""

from fastdiff.pipelines.cascade import enlarge
from fastdiff.pipelines.class_conditional import sample_classes
from fastdiff.pipelines.components import assemble
from fastdiff.pipelines.control import Control
from fastdiff.pipelines.pipeline import Defaults, Pipeline, Result
from fastdiff.pipelines.recipes import Recipe, from_scheduler
from fastdiff.pipelines.tasks import interpolate, invert, refine, slerp

__all__ = [
    "Control",
    "Defaults",
    "Pipeline",
    "Recipe",
    "Result",
    "assemble",
    "enlarge",
    "from_scheduler",
    "interpolate",
    "invert",
    "refine",
    "sample_classes",
    "slerp",
]
