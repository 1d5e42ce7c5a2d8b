"""How near two roads to one number must come. Loosened only with a decision note."""

from __future__ import annotations

import torch

# Sums taken in another order: relative to the largest entry of the tensor.
SAME_SUM = {torch.float64: 1e-9, torch.float32: 1e-5}

# Losses of three steps under a layout against one rank: relative. AdamW's quotient widens rounding of the first step.
LOSS = 1e-4

# Gradients under a layout against one rank, float32: each tensor's largest difference over its largest entry.
GRADIENT = 1e-5

# bfloat16 keeps 8 bits of a number; losses are means over hundreds of terms.
BFLOAT16_LOSS = 0.02

# The same in float64 through megatron's schedule alone.
DOUBLE_GRADIENT = 1e-10

# Weights after three steps under a layout against one rank, float32: each tensor's largest difference over its largest.
WEIGHT = 1e-5
