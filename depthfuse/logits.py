"""What a classifier of Hugging Face's gives, without what stands around it."""

from __future__ import annotations

from torch import Tensor, nn


class Logits(nn.Module):
    """A classifier of Hugging Face's that gives its logits alone: [N, C, H, W] -> [N, classes]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits
