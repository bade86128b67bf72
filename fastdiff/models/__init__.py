"""The model zoo: DiT, its configurations, and the loading and saving of weights."""

from fastdiff.models.dit import CONFIGS, DiT, DiTConfig
from fastdiff.models.weights import EMBEDDED, Sampling, load, save

__all__ = ["CONFIGS", "EMBEDDED", "DiT", "DiTConfig", "Sampling", "load", "save"]
