"""A diffusion model that is exact: data whose score is known in closed form."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastdiff.solvers import NoiseSchedule


class Mixture:
    """Every element of x0 is independently drawn from sum_k w_k N(mu_k, s_k^2).

    Then x_t = alpha x0 + sigma eps is a mixture with means alpha mu_k and variances
    alpha^2 s_k^2 + sigma^2, and E[x0 | x_t], E[eps | x_t] follow by Bayes' rule. As a model:
    ``mixture(x, t)`` returns what ``prediction`` says, computed in x's dtype.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: str = "eps",
        *,
        weights: tuple[float, ...] = (0.5, 0.3, 0.2),
        means: tuple[float, ...] = (-0.8, 0.3, 1.1),
        stds: tuple[float, ...] = (0.3, 0.2, 0.4),
    ) -> None:
        self.schedule = schedule
        self.prediction = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}.get(
            prediction, prediction
        )
        self.weights, self.means, self.stds = weights, means, stds

    @property
    def mean(self) -> float:
        return float(np.dot(self.weights, self.means))

    @property
    def variance(self) -> float:
        second = np.dot(self.weights, np.square(self.stds) + np.square(self.means))
        return float(second - self.mean**2)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        time = float(t.reshape(-1)[0])
        alpha, sigma = map(float, self.schedule.marginal(self.schedule.lambda_at(time)))
        return self.at(x, alpha, sigma)

    def at(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        gaps, variances, logits = [], [], []
        for w, mu, s in zip(self.weights, self.means, self.stds, strict=True):
            variance = alpha**2 * s**2 + sigma**2
            gap = x - alpha * mu
            gaps.append(gap)
            variances.append(variance)
            logits.append(np.log(w) - 0.5 * np.log(variance) - 0.5 * gap**2 / variance)
        share = torch.softmax(torch.stack(logits), dim=0)
        x0 = torch.zeros_like(x)
        eps = torch.zeros_like(x)
        for k, mu in enumerate(self.means):
            pull = gaps[k] / variances[k]
            x0 = x0 + share[k] * (mu + alpha * self.stds[k] ** 2 * pull)
            eps = eps + share[k] * (sigma * pull)
        if self.prediction == "x0":
            return x0
        return eps if self.prediction == "eps" else alpha * eps - sigma * x0
