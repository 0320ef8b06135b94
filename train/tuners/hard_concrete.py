"""HardConcrete gates: random numbers in 0..1 that are exactly 0 or 1 much of the time, and still have a gradient.

    u ~ U(0, 1)        s = sigmoid((log u - log(1 - u) + log_alpha) / BETA)
    sampled gate       clamp(s * (HIGH - LOW) + LOW, 0, 1)
    gate without noise clamp(sigmoid(log_alpha) * (HIGH - LOW) + LOW, 0, 1)
    P(gate > 0)        sigmoid(log_alpha - BETA * log(-LOW / HIGH))

(Louizos et al. 2018, arXiv 1712.01312, section 3; BETA, LOW and HIGH as in JoLA.) Everything is computed in float32 and
has the shape of `log_alpha`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BETA = 0.33
LOW, HIGH = -0.1, 1.1

# Where gates start. Without noise they are exactly 1 from log(11) = 2.398 on, so a fresh gate changes nothing that is
# evaluated or merged. No higher than that: here 17% of the samples lie below 1 (4% at 0) and carry a gradient to
# log_alpha; each unit more would divide both by about 2.7.
OPEN = 2.4


def sampled(log_alpha: Tensor) -> Tensor:
    """One draw per gate, with the gradient of the draw; uses the random state of `log_alpha`'s device."""
    log_alpha = log_alpha.float()
    u = torch.rand_like(log_alpha)
    return _stretched(torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / BETA))


def without_noise(log_alpha: Tensor) -> Tensor:
    """The gate to evaluate and to merge with."""
    return _stretched(torch.sigmoid(log_alpha.float()))


def probability_open(log_alpha: Tensor) -> Tensor:
    """The probability that a sampled gate is above 0: the gate's share of the expected L0 norm."""
    return torch.sigmoid(log_alpha.float() - BETA * math.log(-LOW / HIGH))


def _stretched(s: Tensor) -> Tensor:
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)
