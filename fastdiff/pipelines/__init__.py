"""Pipelines: short programs over ``fastdiff.load`` and ``fastdiff.sample``."""

from fastdiff.pipelines.class_conditional import sample_classes

__all__ = ["sample_classes"]
