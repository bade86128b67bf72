"""The oracle most solver tests use, under the short name they use."""

from fastdiff.solvers.oracle import GaussianMixture as Mixture

__all__ = ["Mixture"]
