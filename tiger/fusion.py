"""Attentional fusion of the residuals of the FG-Encoder and the BG-Encoder (paper eq. 2-3 and 11-12)."""

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

KINDS = ("aff", "iaff", "sum")


class ChannelAttention(nn.Module):
    """`W = sigmoid(Conv1(S) + Conv2(GAP(S)))`: MS-CAM of Dai et al. 2021, https://arxiv.org/abs/2009.14082, fig. 2.

    No BatchNorm: the global branch is 1×1 and batches are small. The last convolutions start at zero, so W starts at
    exactly 0.5 and the two encoders start as equals.
    """

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        self.local = _pointwise(channels, reduction)
        self.context = _pointwise(channels, reduction)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, C, h, w) in (0, 1)"""
        pooled = features.mean(dim=(2, 3), keepdim=True)  # (B, C, h, w) -> (B, C, 1, 1)
        return torch.sigmoid(self.local(features) + self.context(pooled))


def _pointwise(channels: int, reduction: int) -> nn.Sequential:
    hidden = max(channels // reduction, 1)
    last = nn.Conv2d(hidden, channels, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]  # Conv2d has a bias unless told otherwise
    return nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), last)


class AFF(nn.Module):
    """`F = W·F_FG + (1−W)·F_BG` with `W` from `F_FG + F_BG` (eq. 2-3)."""

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        self.attention = ChannelAttention(channels, reduction)

    def forward(self, fg: torch.Tensor, bg: torch.Tensor) -> torch.Tensor:
        return torch.lerp(bg, fg, self.attention(fg + bg))


class IAFF(nn.Module):
    """Iterative AFF (Dai et al. 2021, eq. 4): the sum that gives W is itself fused by a first attention."""

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        self.initial = AFF(channels, reduction)
        self.attention = ChannelAttention(channels, reduction)

    def forward(self, fg: torch.Tensor, bg: torch.Tensor) -> torch.Tensor:
        return torch.lerp(bg, fg, self.attention(self.initial(fg, bg)))


class AttentionalFusion(ModelMixin, ConfigMixin):
    """One fusion for each residual of a ControlNet: 12 + 1 for Stable Diffusion.

    kind: "aff" | "iaff" | "sum" (`F_FG + F_BG`, nothing to train).
    gain: factor on the fused residual. For aff, 1 is eq. 3; 2 is the AFF authors' code, which starts as a plain sum.
    """

    @register_to_config
    def __init__(self, channels: Sequence[int], kind: str = "aff", gain: float = 1.0, reduction: int = 4):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"fusion is one of {', '.join(KINDS)}, not {kind!r}")
        layer = IAFF if kind == "iaff" else AFF
        self.layers = nn.ModuleList() if kind == "sum" else nn.ModuleList(layer(c, reduction) for c in channels)
        # A buffer, so that "sum" too has a weights file, which diffusers wants for loading.
        self.register_buffer("factor", torch.tensor(float(gain)))

    def forward(self, fg: Sequence[torch.Tensor], bg: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Two lists of (B, C_i, h_i, w_i), the middle block's last -> one such list."""
        if not self.layers:
            return [self.factor * (f + b) for f, b in zip(fg, bg, strict=True)]
        return [self.factor * layer(f, b) for layer, f, b in zip(self.layers, fg, bg, strict=True)]
