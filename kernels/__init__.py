"""Operations and layers outside plain PyTorch: mask composite, style loss, patch images, norms.

`eager.py` holds the definitions and chooses the backend; `composite.py`, `gram.py`, `patches.py`,
`affine.py`, `pointwise.py` and `resize.py` hold the same operations as Triton kernels; `layers.py`
holds layers that have one form for every device, `graphs.py` training steps as CUDA graphs. This
file only gathers the names.
"""

from kernels.eager import (
    CompositeLosses,
    MaskEntropy,
    StyleLoss,
    accumulation_type,
    affine_convolution,
    affine_relu,
    compose,
    composite_losses,
    composite_losses_and_copy,
    convolution_relu,
    draw_patch_windows,
    enlarge,
    gram_matrix,
    max_pool,
    sample_patch_images,
    style_loss,
    use_triton,
)
from kernels.graphs import GraphedStep, set_rate
from kernels.layers import (
    InstanceNorm2d,
    PaddedConv2d,
    UpsampleConv2d,
    attention,
    normalized_conv2d,
    normalized_weight,
    power_iteration,
    shuffle_patches,
    spectral,
    upsample_conv2d,
    upsampling_kernel,
    without_autocast,
)

__all__ = [
    "CompositeLosses",
    "GraphedStep",
    "InstanceNorm2d",
    "MaskEntropy",
    "PaddedConv2d",
    "StyleLoss",
    "UpsampleConv2d",
    "accumulation_type",
    "affine_convolution",
    "affine_relu",
    "attention",
    "compose",
    "composite_losses",
    "composite_losses_and_copy",
    "convolution_relu",
    "draw_patch_windows",
    "enlarge",
    "gram_matrix",
    "max_pool",
    "normalized_conv2d",
    "normalized_weight",
    "power_iteration",
    "sample_patch_images",
    "set_rate",
    "shuffle_patches",
    "spectral",
    "style_loss",
    "upsample_conv2d",
    "upsampling_kernel",
    "use_triton",
    "without_autocast",
]
