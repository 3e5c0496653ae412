"""The hot path of a CGN step outside the convolutions: mask composite with its losses, and the Gram-matrix style loss.

The eager forms below are the definition; any faster form is tested against them.
"""
import math
from typing import NamedTuple

import torch


class CompositeLosses(NamedTuple):
    composite: torch.Tensor            # (N, 3, H, W), the range of foreground and background
    l1: torch.Tensor | None            # scalar, mean absolute error to the target; None without a target
    binary: torch.Tensor               # scalar, mean binary entropy of the mask in bits, [0, 1]
    mask_mean: torch.Tensor            # (N,), mean mask value of each image
    mask_interval: torch.Tensor        # scalar, mean over images of the distance of mask_mean to the interval


def composite_losses(mask, foreground, background, target=None, *, mask_interval=(0.1, 0.9)):
    """Compose images from the three mechanisms, `mask * foreground + (1 - mask) * background`, and rate them.

    mask: (N, 1, H, W) in (0, 1). foreground, background and the optional target: (N, 3, H, W).
    All scalars are unweighted means. Source: Sauer & Geiger 2021, section 3 and appendix B.
    """
    composite = torch.lerp(background, foreground, mask)
    l1 = None if target is None else (composite - target).abs().mean()
    binary = (torch.special.entr(mask) + torch.special.entr(1 - mask)).mean() / math.log(2)
    mask_mean = mask.mean((1, 2, 3))
    low, high = mask_interval
    outside = (low - mask_mean).clamp(min=0) + (mask_mean - high).clamp(min=0)
    return CompositeLosses(composite, l1, binary, mask_mean, outside.mean())


def gram_matrix(features):
    """features: (N, C, H, W). Returns F F^T / (C H W) in float32 or better, (N, C, C)."""
    flat = accumulation_type(features).flatten(2)
    return torch.bmm(flat, flat.transpose(1, 2)) / features[0].numel()


def accumulation_type(features):
    """Half precision is too coarse to sum in."""
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features


class StyleLoss(torch.autograd.Function):
    """mean|F F^T / (C H W) - target|. Its derivative is symmetric, so that backward is one product and not two."""

    @staticmethod
    def forward(ctx, features, target):
        flat = accumulation_type(features).flatten(2)                                    # (N, C, H W)
        difference = torch.baddbmm(target, flat, flat.transpose(1, 2), beta=-1, alpha=1 / features[0].numel())
        ctx.save_for_backward(features, difference)
        return difference.abs().mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        features, difference = ctx.saved_tensors
        scale = 2 * gradient / (features[0].numel() * difference.numel())
        flat = accumulation_type(features).flatten(2)
        return torch.bmm(difference.sign(), flat).mul_(scale).view_as(features).to(features.dtype), None


def style_loss(features, target_features):
    """Mean absolute difference of the Gram matrices of one layer (Gatys et al. 2016, with an L1 norm).

    features: (N, C, H, W). target_features: the same shape, or a Gram matrix (N, C, C); it carries no gradient, and
    there is no second derivative.
    """
    target = target_features.detach() if target_features.ndim == 3 else gram_matrix(target_features.detach())
    return StyleLoss.apply(features, target)
