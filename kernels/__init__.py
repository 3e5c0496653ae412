"""The hot path of a CGN step outside the convolutions: mask composite with its losses, and the Gram-matrix style loss.

The eager forms below are the definition. The Triton forms, in composite.py and gram.py, are tested against them and
run on CUDA tensors; backend "triton" or "eager" asks for one of the two, "auto" takes what the tensors allow. The
layers of layers.py have one form, for every device.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.layers import (UpsampleConv2d, normalize_weight, power_iteration, shuffle_patches,  # noqa: F401
                            spectral)

try:
    from kernels import composite, gram
except ImportError:                                        # no Triton for this platform
    composite = gram = None

TINY = 2.0 ** -24                                          # 1 - TINY is a float32 number
FAST_DTYPES = torch.float32, torch.float16, torch.bfloat16


def use_triton(backend, *tensors):
    """Whether the Triton form runs. ValueError if it is asked for and cannot, or for an unknown backend."""
    if backend not in ("auto", "triton", "eager"):
        raise ValueError(f"backend {backend!r}: should be 'auto', 'triton' or 'eager'")
    dtypes = all(x.dtype in FAST_DTYPES for x in tensors)
    if backend == "triton":
        if composite is None:
            raise ValueError("backend 'triton': the package triton is not installed")
        if not dtypes:
            raise ValueError("backend 'triton': takes float32, float16 and bfloat16, not "
                             + ", ".join(str(x.dtype) for x in tensors))
        if not gram.INTERPRETED.value and not all(x.is_cuda for x in tensors):
            raise ValueError("backend 'triton': needs tensors on a GPU (or TRITON_INTERPRET=1, slowly)")
        return True
    return backend == "auto" and composite is not None and dtypes and all(x.is_cuda for x in tensors)


def accumulation_type(x):
    """Half precision is too coarse to sum in."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class CompositeLosses(NamedTuple):
    composite: torch.Tensor            # (N, 3, H, W), the range and dtype of foreground
    l1: torch.Tensor | None            # scalar, mean absolute error to the target; None without a target
    binary: torch.Tensor               # scalar, mean binary entropy of the mask in bits, [0, 1]
    mask_mean: torch.Tensor            # (N,), mean mask value of each image
    mask_interval: torch.Tensor        # scalar, mean over images of the distance of mask_mean to the interval


class MaskEntropy(torch.autograd.Function):
    """Mean of -m log2 m - (1 - m) log2(1 - m). The logarithms of forward are the slope in backward."""

    @staticmethod
    def forward(ctx, mask):
        inside = mask.clamp(TINY, 1 - TINY).flatten()
        outside = 1 - inside
        log_inside, log_outside = inside.log2(), outside.log2()
        entropy = -(torch.dot(inside, log_inside) + torch.dot(outside, log_outside)) / mask.numel()
        ctx.save_for_backward((log_outside - log_inside).view_as(mask).mul_(inside.view_as(mask) == mask))
        return entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        slope, = ctx.saved_tensors
        return gradient / slope.numel() * slope


def composite_losses(mask, foreground, background, target=None, *, mask_interval=(0.1, 0.9), backend="auto"):
    """Compose images from the three mechanisms, `mask * foreground + (1 - mask) * background`, and rate them.

    mask: (N, 1, H, W) in [0, 1]. foreground, background and the optional target: (N, 3, H, W); the target carries no
    gradient. All scalars are unweighted means in float32 or better. The entropy has no slope where a mask is within
    2^-24 of 0 or 1, instead of an infinite one. Source: Sauer & Geiger 2021, section 3 and appendix B.
    ValueError: shapes that do not fit together, or a backend that cannot run.
    """
    return composite_losses_and_copy(mask, foreground, background, target, mask_interval=mask_interval,
                                     backend=backend)[0]


def composite_losses_and_copy(mask, foreground, background, target=None, *, copy_dtype=None, mask_interval=(0.1, 0.9),
                              backend="auto"):
    """As composite_losses, and the composite once more in the dtype of the next network and channels last.

    Returns (CompositeLosses, copy); the copy is None without copy_dtype. Gradients flow through both.
    """
    images = [foreground, background] if target is None else [foreground, background, target]
    n, height, width = len(mask), *mask.shape[-2:]
    if mask.shape != (n, 1, height, width) or any(x.shape != (n, 3, height, width) for x in images):
        raise ValueError("mask should be (N, 1, H, W) and images (N, 3, H, W), not "
                         + ", ".join(str(tuple(x.shape)) for x in (mask, *images)))
    if use_triton(backend, mask, *images):
        image, copy, *losses = composite.composite_losses(mask, foreground, background, target, mask_interval,
                                                          copy_dtype)
        return CompositeLosses(image, *losses), copy
    mask = accumulation_type(mask)
    exact = torch.lerp(accumulation_type(background), accumulation_type(foreground), mask)
    l1 = None if target is None else torch.linalg.vector_norm(exact - target.detach(), 1) / exact.numel()
    binary = MaskEntropy.apply(mask)
    mask_mean = mask.mean((1, 2, 3))
    low, high = mask_interval
    outside = (low - mask_mean).clamp(min=0) + (mask_mean - high).clamp(min=0)
    copy = None if copy_dtype is None else exact.to(copy_dtype, memory_format=torch.channels_last)
    return CompositeLosses(exact.to(foreground.dtype), l1, binary, mask_mean, outside.mean()), copy


def gram_matrix(features):
    """features: (N, C, H, W). Returns F F^T / (C H W) in float32 or better, (N, C, C)."""
    flat = accumulation_type(features).flatten(2)
    return torch.bmm(flat, flat.transpose(1, 2)) / features[0].numel()


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
        signs = difference.sign().mul_(2 * gradient / (features[0].numel() * difference.numel()))
        flat = accumulation_type(features).flatten(2)
        if features.is_contiguous(memory_format=torch.channels_last):                    # and so is the gradient
            product = torch.bmm(flat.transpose(1, 2), signs).transpose(1, 2).unflatten(2, features.shape[2:])
        else:
            product = torch.bmm(signs, flat).view_as(features)
        return product.to(features.dtype), None


def style_loss(features, target_features, *, backend="auto"):
    """Mean absolute difference of the Gram matrices of one layer (Gatys et al. 2016, with an L1 norm), in float32.

    features: (N, C, H, W). target_features: the same shape, or a Gram matrix (N, C, C); it carries no gradient, and
    there is no second derivative. ValueError: other shapes, or a backend that cannot run.
    """
    n, channels = features.shape[:2]
    if features.ndim != 4 or target_features.shape not in (features.shape, (n, channels, channels)):
        raise ValueError("features should be (N, C, H, W), and the target the same or (N, C, C), not "
                         f"{tuple(features.shape)} and {tuple(target_features.shape)}")
    target = target_features.detach()
    if use_triton(backend, features, target):
        return gram.style_loss(features, target)
    return StyleLoss.apply(features, accumulation_type(target) if target.ndim == 3 else gram_matrix(target))


@torch.no_grad()
def sample_patch_images(image, mask, *, patch_size=15, top=100, grid=6, work_size=128, generator=None, backend="auto"):
    """Images of the foreground's texture alone: windows of the image where the mask is highest, tiled grid x grid.

    Image and mask are resized to work_size; grid^2 of the `top` windows with the highest mean mask are drawn with
    replacement; the tiling is resized to the image's size. image: (N, 3, H, W). mask: (N, 1, H, W). Returns
    (N, 3, H, W) without a gradient. Only the drawn windows are read. Source: Sauer & Geiger 2021, appendix B.
    ValueError: fewer than `top` windows, shapes that do not fit together, or a backend that cannot run.
    """
    n, height, width = len(image), *image.shape[-2:]
    steps = work_size - patch_size + 1                     # windows along one side
    if image.shape != (n, 3, height, width) or mask.shape != (n, 1, height, width):
        raise ValueError(f"image should be (N, 3, H, W) and mask (N, 1, H, W), not {tuple(image.shape)} and "
                         f"{tuple(mask.shape)}")
    if min(patch_size, top, grid, steps) < 1 or top > steps ** 2:
        raise ValueError(f"no {top} windows of {patch_size} x {patch_size} in {work_size} x {work_size}")
    triton = use_triton(backend, image, mask)
    small, mask = (F.interpolate(accumulation_type(x), (work_size, work_size), mode="bicubic") for x in (image, mask))
    means = F.avg_pool2d(F.avg_pool2d(mask, (patch_size, 1), 1), (1, patch_size), 1)     # a box filter, side by side
    best = means.flatten(1).topk(top).indices                                            # y * steps + x
    drawn = torch.randint(top, (n, grid ** 2), generator=generator,
                          device=image.device if generator is None else generator.device)
    corners = best.gather(1, drawn.to(image.device))
    if triton:
        patches = gram.gather_patches(small, corners, patch_size, grid)
    else:
        windows = small.unfold(2, patch_size, 1).unfold(3, patch_size, 1)                # a view
        numbers = torch.arange(n, device=image.device)[:, None]
        chosen = windows[numbers, :, corners // steps, corners % steps]                  # (N, grid^2, 3, patch, patch)
        patches = chosen.unflatten(1, (grid, grid)).permute(0, 3, 1, 4, 2, 5).reshape(n, 3, grid * patch_size, -1)
    return F.interpolate(patches, (height, width), mode="bicubic").to(image.dtype)
