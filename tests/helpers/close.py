"""Equal but for rounding."""

from __future__ import annotations

from typing import Any

import torch


def close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Within `tolerance`, and within that share of what is expected."""
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
