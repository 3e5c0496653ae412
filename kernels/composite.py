"""Mask composite and its losses as Triton kernels, one pass over memory each way. Needs torch and triton alone.

    composite = mask * foreground + (1 - mask) * background

Forward reads mask, foreground, background and target once and writes the composite: 13 elements per pixel. Backward
reads them and the composite's gradient and writes three gradients: 20. The composite is computed again and not kept.
Sums are float32, in two stages of fixed order: the same bits in every run.
"""
import torch
import triton
import triton.language as tl

TINY = tl.constexpr(2.0 ** -24)        # the entropy sees masks cut to [TINY, 1 - TINY]: both are float32 numbers
BLOCK = 1024                           # pixels of a program


@triton.jit
def blend(foreground, background, m):
    """torch.lerp's formula: exact at both ends."""
    return tl.where(m < 0.5, background + m * (foreground - background),
                    foreground - (foreground - background) * (1 - m))


@triton.jit
def cut(m):
    """The mask in [TINY, 1 - TINY]; NaN stays NaN."""
    return tl.where(m < TINY, TINY, tl.where(m > 1 - TINY, 1 - TINY, m))


@triton.jit
def forward_kernel(mask, foreground, background, target, composite, copy, partial, pixels, splits,
                   mask_n, mask_p, foreground_n, foreground_c, foreground_p, background_n, background_c, background_p,
                   target_n, target_c, target_p, composite_n, composite_c, composite_p, BLOCK: tl.constexpr):
    """Writes the composite and, per program, sums of |composite - target|, entropy and mask: partial (3, N, splits).

    target and copy, the composite in a second dtype and channels last, may be None. x_n, x_c, x_p: strides in elements.
    """
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    image, split = program // splits, program % splits
    pixel = split * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    m = tl.load(mask + image * mask_n + pixel * mask_p, mask=inside, other=0.0).to(tl.float32)
    q = cut(m)
    entropy = tl.where(inside, -q * tl.log2(q) - (1 - q) * tl.log2(1 - q), 0.0)
    error = tl.zeros([BLOCK], tl.float32)
    foreground += image * foreground_n + pixel * foreground_p
    background += image * background_n + pixel * background_p
    composite += image * composite_n + pixel * composite_p
    for c in tl.static_range(3):
        f = tl.load(foreground, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(background, mask=inside, other=0.0).to(tl.float32)
        x = blend(f, b, m)
        tl.store(composite, x, mask=inside)
        if copy is not None:
            tl.store(copy + (image * pixels + pixel) * 3 + c, x, mask=inside)
        if target is not None:
            t = tl.load(target + image * target_n + pixel * target_p, mask=inside, other=0.0)
            error += tl.abs(x - t.to(tl.float32))
            target += target_c                             # to the next channel: a pointer holds 64 bits
        foreground += foreground_c
        background += background_c
        composite += composite_c
    tl.store(partial + program, tl.sum(error))
    tl.store(partial + programs + program, tl.sum(entropy))
    tl.store(partial + 2 * programs + program, tl.sum(m))


@triton.jit
def finish_kernel(partial, l1, binary, mask_mean, mask_interval, images, splits, pixels, low, high,
                  IMAGES: tl.constexpr, SPLITS: tl.constexpr):
    """Sums of forward_kernel -> means. One program, which walks the partial sums in a fixed order."""
    error = 0.0
    entropy = 0.0
    outside = 0.0
    for first in range(0, images, IMAGES):
        image = first + tl.arange(0, IMAGES)[:, None]
        row_error = tl.zeros([IMAGES, SPLITS], tl.float32)
        row_entropy = tl.zeros([IMAGES, SPLITS], tl.float32)
        row_mask = tl.zeros([IMAGES, SPLITS], tl.float32)
        for start in range(0, splits, SPLITS):
            split = start + tl.arange(0, SPLITS)[None, :]
            valid = (image < images) & (split < splits)
            place = partial + image * splits + split
            row_error += tl.load(place, mask=valid, other=0.0)
            row_entropy += tl.load(place + images * splits, mask=valid, other=0.0)
            row_mask += tl.load(place + 2 * images * splits, mask=valid, other=0.0)
        mean = tl.sum(row_mask, 1, keep_dims=True) / pixels
        tl.store(mask_mean + image, mean, mask=image < images)
        distance = tl.where(mean < low, low - mean, tl.where(mean > high, mean - high, mean * 0))  # NaN stays
        outside += tl.sum(tl.where(image < images, distance, 0.0))
        error += tl.sum(row_error)
        entropy += tl.sum(row_entropy)
    count = 1.0 * images * pixels
    if l1 is not None:
        tl.store(l1, error / (3 * count))
    tl.store(binary, entropy / count)
    tl.store(mask_interval, outside / images)


@triton.jit
def backward_kernel(mask, foreground, background, target, mask_mean, grad, grad_copy, grad_l1, grad_binary,
                    grad_mean, grad_interval, mask_out, foreground_out, background_out,
                    images, pixels, splits, low, high,
                    mask_n, mask_p, foreground_n, foreground_c, foreground_p, background_n, background_c, background_p,
                    target_n, target_c, target_p, grad_n, grad_c, grad_p, copy_n, copy_c, copy_p,
                    mask_out_n, mask_out_p, foreground_out_n, foreground_out_c, foreground_out_p,
                    background_out_n, background_out_c, background_out_p, BLOCK: tl.constexpr):
    """Gradients of mask, foreground and background from those of all outputs; any of them may be None."""
    program = tl.program_id(0).to(tl.int64)
    image, split = program // splits, program % splits
    count = 1.0 * images * pixels
    level = 0.0                                            # what every pixel of this image's mask gets
    if grad_mean is not None:
        level += tl.load(grad_mean + image).to(tl.float32) / pixels
    if grad_interval is not None:
        mean = tl.load(mask_mean + image)
        side = tl.where(mean >= high, 1.0, 0.0) - tl.where(mean <= low, 1.0, 0.0)
        level += tl.load(grad_interval).to(tl.float32) * side / count
    pixel = split * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    m = tl.load(mask + image * mask_n + pixel * mask_p, mask=inside, other=0.5).to(tl.float32)
    dm = tl.zeros([BLOCK], tl.float32) + level
    if grad_binary is not None:
        q = cut(m)
        slope = tl.where((m < TINY) | (m > 1 - TINY), 0.0, tl.log2(1 - q) - tl.log2(q))
        dm += tl.load(grad_binary).to(tl.float32) / count * slope
    foreground += image * foreground_n + pixel * foreground_p
    background += image * background_n + pixel * background_p
    for c in tl.static_range(3):
        f = tl.load(foreground, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(background, mask=inside, other=0.0).to(tl.float32)
        dx = tl.zeros([BLOCK], tl.float32)
        if grad is not None:
            dx += tl.load(grad + image * grad_n + pixel * grad_p, mask=inside, other=0.0).to(tl.float32)
            grad += grad_c
        if grad_copy is not None:
            dx += tl.load(grad_copy + image * copy_n + pixel * copy_p, mask=inside, other=0.0).to(tl.float32)
            grad_copy += copy_c
        if grad_l1 is not None:
            t = tl.load(target + image * target_n + pixel * target_p, mask=inside, other=0.0).to(tl.float32)
            error = blend(f, b, m) - t
            sign = tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, error))
            dx += tl.load(grad_l1).to(tl.float32) / (3 * count) * sign
            target += target_c
        dm += dx * (f - b)
        if foreground_out is not None:
            tl.store(foreground_out + image * foreground_out_n + pixel * foreground_out_p, dx * m, mask=inside)
            foreground_out += foreground_out_c
        if background_out is not None:
            tl.store(background_out + image * background_out_n + pixel * background_out_p, dx * (1 - m), mask=inside)
            background_out += background_out_c
        foreground += foreground_c
        background += background_c
    if mask_out is not None:
        tl.store(mask_out + image * mask_out_n + pixel * mask_out_p, dm, mask=inside)


# ---------------------------------------------------------------------------------------------------------------------
# Launching, and the operators that torch.compile and autograd see


def strides(*tensors):
    """Strides (n, c, pixel) in elements, of each (N, C, H W); zeros for None."""
    return [x.stride() if x is not None else (0, 0, 0) for x in tensors]


def flat(*tensors):
    """Each (N, C, H, W) as (N, C, H W), a copy only where no one stride leads from pixel to pixel; None stays None."""
    return [x if x is None else x.flatten(2) for x in tensors]


def empty_like(x):
    """Not filled; contiguous, or channels last if x is."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(x, memory_format=torch.channels_last if last else torch.contiguous_format)


def on_device(x):
    """Triton launches on the current device, which need not be that of x."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


def split(x):
    """Pixels per image and programs per image."""
    pixels = x.shape[2] * x.shape[3]
    return pixels, triton.cdiv(pixels, BLOCK)


Tensor, Tensors = torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def forward_outputs(mask, foreground, background, target, low, high, copy_dtype):
    """Empty outputs of the forward operator; one that is not asked for has no elements."""
    composite = empty_like(foreground)
    copy = torch.empty(foreground.shape if copy_dtype else (0, 3, 1, 1), dtype=copy_dtype, device=mask.device,
                       memory_format=torch.channels_last)
    scalars = [mask.new_empty((), dtype=torch.float32) for _ in range(3)]
    if target is None:
        scalars[0] = scalars[0].new_empty(0)
    return composite, copy, *scalars[:2], mask.new_empty(len(mask), dtype=torch.float32), scalars[2]


@torch.library.custom_op("cgn::composite_forward", mutates_args=())
def composite_forward(mask: Tensor, foreground: Tensor, background: Tensor, target: Tensor | None, low: float,
                      high: float, copy_dtype: torch.dtype | None
                      ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Composite, copy, l1, binary, mask_mean, mask_interval."""
    outputs = forward_outputs(mask, foreground, background, target, low, high, copy_dtype)
    composite, copy, l1, binary, mask_mean, mask_interval = outputs
    images, (pixels, splits) = len(mask), split(mask)
    inputs = flat(mask, foreground, background, target)
    partial = binary.new_empty(3, images, splits)
    mask_s, *image_s = strides(*inputs, *flat(composite))
    with on_device(mask):
        forward_kernel[(images * splits,)](
            *inputs, composite, copy if copy_dtype else None, partial, pixels, splits, mask_s[0], mask_s[2],
            *sum(image_s, ()), BLOCK=BLOCK, num_warps=8)
        columns = min(triton.next_power_of_2(splits), 64)
        finish_kernel[(1,)](partial, None if target is None else l1, binary, mask_mean, mask_interval, images, splits,
                            pixels, low, high, IMAGES=min(triton.next_power_of_2(images), 2048 // columns),
                            SPLITS=columns)
    return outputs


composite_forward.register_fake(forward_outputs)


def backward_outputs(mask, foreground, background, target, mask_mean, grads, low, high, wanted):
    """Empty gradients of mask, foreground and background; one that is not wanted has no elements."""
    return tuple(empty_like(x) if want else x.new_empty(0)
                 for x, want in zip((mask, foreground, background), wanted))


@torch.library.custom_op("cgn::composite_backward", mutates_args=())
def composite_backward(mask: Tensor, foreground: Tensor, background: Tensor, target: Tensor | None, mask_mean: Tensor,
                       grads: list[Tensor | None], low: float, high: float, wanted: list[bool]) -> Tensors:
    """grads: of composite, copy, l1, binary, mask_mean and mask_interval."""
    outputs = backward_outputs(mask, foreground, background, target, mask_mean, grads, low, high, wanted)
    images, (pixels, splits) = len(mask), split(mask)
    grad, copy, *others = grads
    inputs = flat(mask, foreground, background, target)
    image_grads = flat(grad, copy)
    outs = flat(*(out if want else None for out, want in zip(outputs, wanted)))
    mask_s, *image_s = strides(*inputs, *image_grads)
    mask_out_s, *out_s = strides(*outs)
    with on_device(mask):
        backward_kernel[(images * splits,)](
            *inputs, mask_mean, *image_grads, *(g if g is None else g.contiguous() for g in others), *outs, images,
            pixels, splits, low, high, mask_s[0], mask_s[2], *sum(image_s, ()), mask_out_s[0], mask_out_s[2],
            *sum(out_s, ()), BLOCK=BLOCK, num_warps=8)
    return outputs


composite_backward.register_fake(backward_outputs)


def keep_for_backward(ctx, inputs, output):
    mask, foreground, background, target, ctx.low, ctx.high, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mask, foreground, background, target, output[4])


def backward(ctx, *grads):
    mask, foreground, background, target, mask_mean = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    grads = [None if g is None or not g.numel() else g for g in grads]     # outputs that were not asked for are empty
    outputs = composite_backward(mask, foreground, background, target, mask_mean, grads, ctx.low, ctx.high, wanted)
    return *(out if want else None for out, want in zip(outputs, wanted)), None, None, None, None


composite_forward.register_autograd(backward, setup_context=keep_for_backward)


def composite_losses(mask, foreground, background, target=None, mask_interval=(0.1, 0.9), copy_dtype=None):
    """mask: (N, 1, H, W); foreground, background and the optional target (N, 3, H, W); float32, float16 or bfloat16.

    Returns composite (N, 3, H, W) in foreground's dtype and layout; its copy in copy_dtype, channels last; l1, binary
    (bits), mask_mean (N,) and mask_interval in float32. Without target or copy_dtype, None stands for l1 or the copy.
    The target gets no gradient, and there is no second derivative.
    """
    target = None if target is None else target.detach()
    composite, copy, l1, *rest = composite_forward(mask, foreground, background, target, *mask_interval, copy_dtype)
    return composite, copy if copy_dtype else None, None if target is None else l1, *rest
