"""The definition, in plain PyTorch, of the operations that a CGN step needs beside its networks.

These are the mask composite with its losses, the style loss of Gram matrices, the patch images,
what stands before a ReLU (gain and shift of conditional norms, biases of frozen convolutions), and
changes of size. The Triton kernels of the other files are tested against what stands here, and run
on CUDA tensors. `backend="triton"` or `"eager"` asks for one of the two; `"auto"` takes Triton
wherever it can run.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.layers import ChannelsLastGradient, without_autocast

try:
    from kernels import affine, composite, gram, patches, pointwise, resize
except ImportError:  # no Triton for this platform
    affine = None
    composite = None
    gram = None
    patches = None
    pointwise = None
    resize = None

TINY = 2.0**-24  # 1 - TINY is a float32 number
FAST_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # those that the kernels take


# --------------------------------------------------------------------------------------------------
# The choice of backend


def use_triton(backend, *tensors):
    """Return whether the Triton kernels run for these tensors.

    ValueError: an unknown backend, or "triton" where it cannot run; the message says why.
    """
    if backend not in ("auto", "triton", "eager"):
        raise ValueError(f"backend {backend!r}: should be 'auto', 'triton' or 'eager'")
    if backend == "eager":
        return False

    installed = composite is not None
    fast_dtypes = all(x.dtype in FAST_DTYPES for x in tensors)
    on_gpu = all(x.is_cuda for x in tensors)
    one_device = len({x.device for x in tensors}) == 1
    if backend == "auto":  # the eager form tells what is wrong with several devices
        return installed and fast_dtypes and on_gpu and one_device

    if not installed:
        raise ValueError("backend 'triton': the package triton is not installed")
    if not fast_dtypes:
        dtypes = ", ".join(str(x.dtype) for x in tensors)
        raise ValueError(f"backend 'triton': takes float32, float16 and bfloat16, not {dtypes}")
    if not one_device:
        raise ValueError("backend 'triton': needs all tensors on one device")
    if not on_gpu and not gram.INTERPRETED.value:
        raise ValueError("backend 'triton': needs tensors on a GPU (or TRITON_INTERPRET=1, slowly)")
    return True


def accumulation_type(x):
    """Return x in a type that is fine enough to sum in: half precision becomes float32."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return x.float()
    return x


# --------------------------------------------------------------------------------------------------
# Mask composite and its losses


class CompositeLosses(NamedTuple):
    """What composite_losses returns; all but the composite is float32 or better."""

    composite: torch.Tensor  # (N, 3, H, W), the range and dtype of foreground
    l1: torch.Tensor | None  # scalar, mean absolute error to the target; None without a target
    binary: torch.Tensor  # scalar, mean binary entropy of the mask in bits, [0, 1]
    mask_mean: torch.Tensor  # (N,), mean mask value of each image
    mask_interval: torch.Tensor  # scalar, mean distance of mask_mean to the interval


class MaskEntropy(torch.autograd.Function):
    """Mean of -m log2 m - (1 - m) log2(1 - m), in bits.

    Forward's two logarithms are also all that the slope needs, so the slope is kept for backward.
    It is 0 where the mask is within TINY of 0 or 1, instead of infinite.
    """

    @staticmethod
    def forward(ctx, mask):
        inside = mask.clamp(TINY, 1 - TINY)
        uncut = inside == mask
        inside = inside.flatten()
        outside = 1 - inside
        log_inside = inside.log2()
        log_outside = outside.log2()
        total = torch.dot(inside, log_inside) + torch.dot(outside, log_outside)
        slope = (log_outside - log_inside).view_as(mask).mul_(uncut)
        ctx.save_for_backward(slope)
        return -total / mask.numel()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (slope,) = ctx.saved_tensors
        return gradient / slope.numel() * slope


def compose(mask, foreground, background):
    """Return mask * foreground + (1 - mask) * background (Sauer & Geiger 2021, section 3).

    mask in [0, 1], usually (N, 1, H, W) beside images (N, 3, H, W): shapes broadcast. All three
    share one dtype, and the images one range, which is that of the result. The result is exactly
    the background where the mask is 0 and exactly the foreground where it is 1.
    """
    return torch.lerp(background, foreground, mask)


def composite_losses(
    mask, foreground, background, target=None, *, mask_interval=(0.1, 0.9), backend="auto"
):
    """Compose images from the three mechanisms and rate them: a CompositeLosses.

    mask: (N, 1, H, W) in [0, 1]. foreground, background and the optional target: (N, 3, H, W) in
    any one range. The target carries no gradient. All scalars are unweighted means in float32 or
    better. mask_interval: bounds between which the mean mask of an image costs nothing. Source:
    Sauer & Geiger 2021, section 3 and appendix B.
    ValueError: shapes that do not fit together, or a backend that cannot run.
    """
    losses, _ = composite_losses_and_copy(
        mask, foreground, background, target, mask_interval=mask_interval, backend=backend
    )
    return losses


def composite_losses_and_copy(
    mask,
    foreground,
    background,
    target=None,
    *,
    copy_dtype=None,
    mask_interval=(0.1, 0.9),
    backend="auto",
):
    """Do what composite_losses does and give the composite once more, ready for the next network.

    Returns (CompositeLosses, copy). The copy is channels last in copy_dtype, or None without
    copy_dtype. Gradients flow through both. Arguments and errors are those of composite_losses.
    """
    images = [foreground, background]
    if target is not None:
        images.append(target)
    check_composite_shapes(mask, images)
    if use_triton(backend, mask, *images):
        image, copy, *losses = composite.fused_composite_losses(
            mask, foreground, background, target, mask_interval, copy_dtype
        )
        return CompositeLosses(image, *losses), copy

    mask = accumulation_type(mask)
    exact = compose(mask, accumulation_type(foreground), accumulation_type(background))
    l1 = None
    if target is not None:
        l1 = torch.linalg.vector_norm(exact - target.detach(), 1) / exact.numel()
    binary = MaskEntropy.apply(mask)
    mask_mean = mask.mean((1, 2, 3))  # (N,)
    low, high = mask_interval
    distance = (low - mask_mean).clamp(min=0) + (mask_mean - high).clamp(min=0)  # (N,)
    copy = None
    if copy_dtype is not None:
        copy = exact.to(copy_dtype, memory_format=torch.channels_last)
    image = exact.to(foreground.dtype)
    return CompositeLosses(image, l1, binary, mask_mean, distance.mean()), copy


def check_composite_shapes(mask, images):
    """Raise ValueError unless mask is (N, 1, H, W) and every image (N, 3, H, W)."""
    if mask.ndim == 4 and mask.numel():
        n, channels, height, width = mask.shape
        if channels == 1 and all(x.shape == (n, 3, height, width) for x in images):
            return
    shapes = ", ".join(str(tuple(x.shape)) for x in (mask, *images))
    raise ValueError(f"mask should be (N, 1, H, W) and images (N, 3, H, W), not {shapes}")


# --------------------------------------------------------------------------------------------------
# Style loss


def gram_matrix(features):
    """Return F F^T / (C H W), (N, C, C) in float32 or better, of features (N, C, H, W)."""
    flat = accumulation_type(features).flatten(2)  # (N, C, H W)
    with without_autocast(features):
        return torch.bmm(flat, flat.transpose(1, 2)) / features[0].numel()


class StyleLoss(torch.autograd.Function):
    """mean |F F^T / (C H W) - target| for features (N, C, H, W) and a Gram matrix (N, C, C).

    The derivative with respect to the Gram matrix is symmetric, so backward needs one product, not
    two.
    """

    @staticmethod
    def forward(ctx, features, target):
        flat = accumulation_type(features).flatten(2)  # (N, C, H W)
        scale = 1 / features[0].numel()
        with without_autocast(features):
            difference = torch.baddbmm(target, flat, flat.transpose(1, 2), beta=-1, alpha=scale)
        ctx.save_for_backward(features, difference)
        return difference.abs().mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        features, difference = ctx.saved_tensors
        # Signs times a power of two are exact in every dtype. This one is below 1 / C, so that a
        # sum of C products cannot overflow float16; `scale` takes it out again.
        power = 2.0 ** -len(difference[0]).bit_length()
        signs = difference.sign().mul_(power).to(features.dtype)  # (N, C, C)
        scale = 2 * gradient / (power * features[0].numel() * difference.numel())
        flat = features.flatten(2)  # (N, C, H W)
        with without_autocast(features):
            if features.is_contiguous(memory_format=torch.channels_last):
                # This order of the product leaves the gradient channels last, too.
                product = torch.bmm(flat.transpose(1, 2), signs)  # (N, H W, C)
                product = product.transpose(1, 2).unflatten(2, features.shape[2:])
            else:
                product = torch.bmm(signs, flat).view_as(features)
        return product.mul_(scale), None


def style_loss(features, target_features, *, backend="auto"):
    """Return the mean absolute difference of one layer's Gram matrices, a scalar in float32.

    features: (N, C, H, W). target_features: the same shape, or a Gram matrix (N, C, C); it carries
    no gradient, and there is no second derivative. Source: Gatys et al. 2016, with an L1 norm.
    ValueError: other shapes, or a backend that cannot run.
    """
    n, channels = (*features.shape, 0, 0)[:2]
    shapes = (features.shape, (n, channels, channels))
    if features.ndim != 4 or not features.numel() or target_features.shape not in shapes:
        raise ValueError(
            "features should be (N, C, H, W), and the target the same or (N, C, C), not "
            f"{tuple(features.shape)} and {tuple(target_features.shape)}"
        )
    target = target_features.detach()
    if use_triton(backend, features, target):
        return gram.fused_style_loss(features, target)
    if target.ndim == 3:
        target = accumulation_type(target)
    else:
        target = gram_matrix(target)
    return StyleLoss.apply(features, target)


# --------------------------------------------------------------------------------------------------
# Patch images


def draw_patch_windows(count, generator=None, *, top=100, grid=6, device="cpu"):
    """Draw which windows the patch images of `count` images are made of.

    Returns int64 (count, grid^2), ranks from 0 to top - 1 in the order of the mean mask, drawn with
    replacement. They are drawn on the generator's device, or on `device` with torch's own generator
    if there is none. Several GPUs can draw the windows of the whole batch from equal generators and
    take a slice each: the images are then those that one GPU would make.
    """
    if generator is not None:
        device = generator.device
    return torch.randint(top, (count, grid**2), generator=generator, device=device)


@torch.no_grad()
def sample_patch_images(
    image,
    mask,
    windows=None,
    *,
    patch_size=15,
    top=100,
    grid=6,
    work_size=128,
    generator=None,
    backend="auto",
):
    """Make images of the foreground's texture alone: windows from where the mask is highest.

    Image and mask are resized to work_size x work_size. Of the `top` windows (patch_size x
    patch_size) with the highest mean mask, grid^2 are tiled grid x grid, and the tiling is resized
    to the image's size. Only these windows are read.

    image: (N, 3, H, W). mask: (N, 1, H, W). windows: int64 (N, grid^2), ranks among the `top` best
    windows, 0 the best; drawn by draw_patch_windows with `generator` if None. Returns (N, 3, H, W)
    in the image's dtype and range (bicubic resizing may overshoot), without a gradient. Source:
    Sauer & Geiger 2021, appendix B.
    ValueError: fewer than `top` windows, shapes that do not fit together, or a backend that cannot
    run.
    """
    check_patch_arguments(image, mask, windows, patch_size, top, grid, work_size)
    triton = use_triton(backend, image, mask)
    size = image.shape[2:]
    small_image = resize_bicubic(accumulation_type(image), (work_size, work_size))
    small_mask = resize_bicubic(accumulation_type(mask), (work_size, work_size))

    best = best_windows(small_mask, patch_size, top)  # (N, top)
    if windows is None:
        windows = draw_patch_windows(len(image), generator, top=top, grid=grid, device=image.device)
    corners = best.gather(1, windows.to(image.device))  # (N, grid^2)

    if triton:
        tiled = patches.gather_patches(small_image, corners, patch_size, grid)
    else:
        tiled = tile_windows(small_image, corners, patch_size, grid)
    return resize_bicubic(tiled, size).to(image.dtype)


def check_patch_arguments(image, mask, windows, patch_size, top, grid, work_size):
    """Raise ValueError for arguments that sample_patch_images cannot take."""
    n = len(image)
    height, width = image.shape[-2:]
    if image.shape != (n, 3, height, width) or mask.shape != (n, 1, height, width):
        raise ValueError(
            "image should be (N, 3, H, W) and mask (N, 1, H, W), not "
            f"{tuple(image.shape)} and {tuple(mask.shape)}"
        )
    steps = work_size - patch_size + 1  # windows along one side
    if min(patch_size, top, grid, steps) < 1 or top > steps**2:
        raise ValueError(
            f"no {top} windows of {patch_size} x {patch_size} in {work_size} x {work_size}"
        )
    if windows is not None and windows.shape != (n, grid**2):
        raise ValueError(
            f"windows should be (N, grid^2), here {(n, grid**2)}, not {tuple(windows.shape)}"
        )


def resize_bicubic(x, size):
    """Resize (N, C, H, W) to `size`, bicubic."""
    return F.interpolate(x, size, mode="bicubic")


def best_windows(mask, patch_size, top):
    """Return the `top` windows of each mask (N, 1, S, S) with the highest mean, the best first.

    int64 (N, top); a window is y * (S - patch_size + 1) + x of its upper left corner.
    """
    # One side after the other: the same means as with a square filter, and fewer sums.
    means = F.avg_pool2d(mask, (patch_size, 1), stride=1)
    means = F.avg_pool2d(means, (1, patch_size), stride=1)
    return means.flatten(1).topk(top).indices


def tile_windows(image, corners, patch_size, grid):
    """Tile grid x grid windows of each image (N, 3, S, S), row by row.

    corners: int64 (N, grid^2), windows as best_windows returns them. Returns (N, 3, side, side)
    with side = grid * patch_size.
    """
    n = len(image)
    steps = image.shape[3] - patch_size + 1
    windows = image.unfold(2, patch_size, 1).unfold(3, patch_size, 1)  # a view of all windows
    index = torch.arange(n, device=image.device)[:, None]
    y = corners // steps
    x = corners % steps
    chosen = windows[index, :, y, x]  # (N, grid^2, 3, patch, patch)
    chosen = chosen.unflatten(1, (grid, grid))  # (N, row, column, 3, patch, patch)
    tiled = chosen.permute(0, 3, 1, 4, 2, 5)  # (N, 3, row, patch, column, patch)
    return tiled.reshape(n, 3, grid * patch_size, grid * patch_size)


# --------------------------------------------------------------------------------------------------
# Conditional norms, and frozen convolutions with a ReLU


class AffineRelu(torch.autograd.Function):
    """relu(x * gain + shift); the derivative looks at the result for where the ReLU was open."""

    @staticmethod
    def forward(ctx, x, gain, shift):
        y = torch.addcmul(shift, x, gain).relu_()
        ctx.save_for_backward(x, gain, y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, gain, y = ctx.saved_tensors
        gradient = torch.ops.aten.threshold_backward(gradient, y, 0)
        gain_gradient = (gradient * x).sum((2, 3), keepdim=True)
        shift_gradient = gradient.sum((2, 3), keepdim=True)
        return gradient.mul_(gain), gain_gradient, shift_gradient


def affine_relu(x, gain_and_shift, *, backend="auto"):
    """Return relu(x * gain + shift), in x's dtype and layout: all that a conditional norm does.

    x: (N, C, H, W). gain_and_shift: (N, 2 C), the gains of each image's channels, then the shifts,
    in x's dtype or float32. There is no second derivative.
    ValueError: shapes that do not fit together, or a backend that cannot run.
    """
    n, channels = (*x.shape, 0, 0)[:2]
    if x.ndim != 4 or gain_and_shift.shape != (n, 2 * channels):
        raise ValueError(
            "x should be (N, C, H, W) and gain_and_shift (N, 2 C), not "
            f"{tuple(x.shape)} and {tuple(gain_and_shift.shape)}"
        )
    if use_triton(backend, x, gain_and_shift):
        return affine.affine_forward(x, gain_and_shift)
    gain, shift = gain_and_shift.to(x.dtype)[..., None, None].chunk(2, 1)
    return AffineRelu.apply(x, gain, shift)


def affine_convolution(x, gain_and_shift, weight, residual=None, *, backend="auto"):
    """Return (weight relu(x * gain + shift) + residual, x): a conditional norm with the 1 x 1
    convolution behind it.

    x: (N, C, H, W). gain_and_shift: (N, 2 C), as for affine_relu. weight: (D, C, 1, 1). residual:
    (N, D or more, H, W), of which the first D channels are added, or (N, D or more, H / 2, W / 2),
    enlarged to nearest neighbors. The first result is (N, D, H, W), in x's dtype and layout. The
    second is x itself: if x is used again, use this one, whose gradient joins the norm's in the
    same kernel. There is no second derivative.
    ValueError: shapes that do not fit together, or a backend that cannot run.
    """
    check_convolution_shapes(x, gain_and_shift, weight, residual)
    tensors = [x, gain_and_shift, weight]
    if residual is not None:
        tensors.append(residual)
    if use_triton(backend, *tensors):
        return pointwise.AffineConvolution.apply(x, gain_and_shift, weight, residual)

    y = affine_relu(x, gain_and_shift, backend="eager")
    weight = weight.to(x.dtype)
    with without_autocast(x):
        if y.is_contiguous(memory_format=torch.channels_last):
            # On a CPU a product is up to seven times as fast as a convolution of few pixels.
            y = F.linear(y.permute(0, 2, 3, 1), weight.flatten(1)).permute(0, 3, 1, 2)
        else:
            y = F.conv2d(y, weight)
    if residual is not None:
        # In this order of dimensions, the gradient is channels last as well.
        residual = residual.permute(0, 2, 3, 1)[..., : len(weight)].permute(0, 3, 1, 2)
        if residual.shape[2] < x.shape[2]:
            with without_autocast(residual):
                residual = F.interpolate(residual, scale_factor=2)
        y = y + residual
    return y, x


def check_convolution_shapes(x, gain_and_shift, weight, residual):
    """Raise ValueError for shapes that affine_convolution cannot take."""
    n, channels, height, width = x.shape if x.ndim == 4 else (0, 0, 0, 0)
    outputs = len(weight)
    fits = x.ndim == 4 and gain_and_shift.shape == (n, 2 * channels)
    fits = fits and weight.shape == (outputs, channels, 1, 1)
    shapes = [tuple(tensor.shape) for tensor in (x, gain_and_shift, weight)]
    if residual is not None:
        shapes.append(tuple(residual.shape))
        images, residual_channels, *size = residual.shape
        doubled = [2 * side for side in size]
        fits = fits and images == n and residual_channels >= outputs
        fits = fits and (size == [height, width] or doubled == [height, width])
    if not fits:
        raise ValueError(
            "x should be (N, C, H, W), gain_and_shift (N, 2 C), weight (D, C, 1, 1) and a residual "
            f"(N, D or more, H, W) or of half the size, not {', '.join(map(str, shapes))}"
        )


def convolution_relu(x, convolution, *, backend="auto"):
    """Return relu(convolution(x)) of a frozen Conv2d, (N, out_channels, H, W) in x's dtype, twice.

    x: (N, in_channels, H, W), in the dtype of the weights. Two users of the result should take one
    each: their gradients are then added in the kernel of the ReLU's. There is no second derivative.
    ValueError: a convolution that is trained, has no bias or pads with anything but zeros, or a
    backend that cannot run.
    """
    bias = convolution.bias
    plain = type(convolution) is torch.nn.Conv2d and convolution.padding_mode == "zeros"
    if bias is None or bias.requires_grad or convolution.weight.requires_grad or not plain:
        raise ValueError("convolution should be a frozen nn.Conv2d, with a bias and zero padding")
    if not use_triton(backend, x, bias):
        y = F.relu_(convolution(x))
        return y, y
    x = F.conv2d(
        x,
        convolution.weight,
        stride=convolution.stride,
        padding=convolution.padding,
        dilation=convolution.dilation,
        groups=convolution.groups,
    )
    return affine.BiasRelu.apply(x, bias)


# --------------------------------------------------------------------------------------------------
# Changes of size


def enlarge(x, size, *, backend="auto"):
    """Return images (N, C, h, w) bilinearly enlarged to `size` (H, W), corners on corners.

    On a GPU, PyTorch's derivative of it is a sum for each large pixel in any order, and slow.
    ValueError: a size below that of x, or a backend that cannot run.
    """
    if size[0] < x.shape[2] or size[1] < x.shape[3]:
        raise ValueError(f"{tuple(x.shape)} cannot be enlarged to {tuple(size)}")
    if x.shape[2:] == size:
        return x
    with without_autocast(x):
        if use_triton(backend, x):
            return resize.Enlarge.apply(x, size)
        large = F.interpolate(x, size, mode="bilinear", align_corners=True)
        return ChannelsLastGradient.apply(large)


def max_pool(x, *, ceil_mode=False, backend="auto"):
    """Return the largest of each 2 x 2 pixels of x (N, C, H, W): (N, C, H / 2, W / 2).

    ceil_mode: whether the last of an odd number of rows or columns has results of its own.
    ValueError: images without a result, or a backend that cannot run.
    """
    if x.ndim != 4 or min(x.shape[2:]) < 2 - ceil_mode:
        raise ValueError(f"x should be (N, C, H, W), of 2 x 2 pixels or more, not {tuple(x.shape)}")
    if use_triton(backend, x):
        return resize.max_pool_forward(x, ceil_mode)[0]
    return F.max_pool2d(x, 2, ceil_mode=ceil_mode)
