"""The mask composite and its losses as Triton kernels: one pass over memory in each direction.

    composite = mask * foreground + (1 - mask) * background

The forward kernel reads mask, foreground, background and target once and writes the composite: 13
elements per pixel. The backward kernel reads them and the gradient of the composite and writes
three gradients: 20 elements per pixel. The composite is computed again there instead of being kept.
Sums are float32 and run in two stages of fixed order, so that every run gives the same bits.

Any sizes and strides; float32, float16 and bfloat16. This file needs only torch and triton and can
be copied alone.
"""

import torch
import triton
import triton.language as tl

# The entropy sees masks clipped to [TINY, 1 - TINY]; both are float32 numbers.
TINY = tl.constexpr(2.0**-24)
BLOCK = 1024  # pixels of a program


# --------------------------------------------------------------------------------------------------
# Kernels. A name such as mask_n, mask_c, mask_p is the stride of `mask` from one image, channel or
# pixel to the next, in elements. A program works on BLOCK pixels of one image; `splits` programs
# share an image.
#
# What is done to an element of an image does not depend on its channel. So a program takes its
# 3 * BLOCK elements in three parts: where all images are channels last without gaps (PACKED), in
# the order of memory, which makes loads and stores wide; else, channel by channel.


@triton.jit
def blend(foreground, background, m):
    """torch.lerp's formula: exact at both ends."""
    return tl.where(
        m < 0.5,
        background + m * (foreground - background),
        foreground - (foreground - background) * (1 - m),
    )


@triton.jit
def cut(m):
    """The mask cut to [TINY, 1 - TINY]; NaN stays NaN."""
    return tl.where(m < TINY, TINY, tl.where(m > 1 - TINY, 1 - TINY, m))


@triton.jit
def pixels_of_part(first, pixels, part, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """To which pixels the elements of a part belong, and which of them there are."""
    element = tl.arange(0, BLOCK)
    if PACKED:
        element += part * BLOCK
        pixel = first + element // 3
        inside = element < 3 * (pixels - first)  # the same for neighbors: loads can be wide
    else:
        pixel = first + element
        inside = pixel < pixels
    return pixel, inside


@triton.jit
def image_place(x, first, pixel, part, x_c, x_p, PACKED: tl.constexpr):
    """Where the elements of a part are in an image x, (3, H W)."""
    if PACKED:
        block: tl.constexpr = pixel.shape[0]
        offset = 3 * first + part * block + tl.arange(0, block)
    else:
        channel = part + 0 * first  # in 64 bits, as `first` is
        offset = pixel * x_p + channel * x_c
    return x + offset


@triton.jit
def load_part(x, first, pixel, inside, part, x_c, x_p, PACKED: tl.constexpr):
    """The elements of a part of an image x, in float32."""
    place = image_place(x, first, pixel, part, x_c, x_p, PACKED)
    return tl.load(place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def sum_of_channels(part_0, part_1, part_2, BLOCK: tl.constexpr):
    """For each pixel, the sum of its three elements, which lie in three packed parts."""
    even = tl.join(part_0, part_2)
    odd = tl.join(part_1, tl.zeros_like(part_1))
    # Place 4 * i + k holds element i of part k, and zeros for k = 3. Packed element e, counted over
    # the three parts, is element e % BLOCK of part e // BLOCK.
    elements = tl.reshape(tl.join(even, odd), [4 * BLOCK])
    first = 3 * tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for channel in tl.static_range(3):
        element = first + channel
        total += tl.gather(elements, element % BLOCK * 4 + element // BLOCK, 0)
    return total


@triton.jit
def forward_kernel(
    mask,  # (N, 1, H W)
    foreground, background,  # (N, 3, H W)
    target,  # (N, 3, H W) or None
    composite,  # out: (N, 3, H W)
    copy,  # out: (N, 3, H W) channels last in a dtype of its own, or None
    partial,  # out: float32 (3, N, splits)
    pixels, splits,
    mask_n, mask_p,
    foreground_n, foreground_c, foreground_p,
    background_n, background_c, background_p,
    target_n, target_c, target_p,
    composite_n, composite_c, composite_p,
    BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write the composite and, for each program, three sums over its pixels.

    They are the sums of |composite - target|, of the entropy and of the mask.
    """
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    image = program // splits
    first = program % splits * BLOCK
    mask += image * mask_n
    foreground += image * foreground_n
    background += image * background_n
    composite += image * composite_n
    if copy is not None:
        copy += image * pixels * 3
    if target is not None:
        target += image * target_n

    pixel = first + tl.arange(0, BLOCK)
    m = tl.load(mask + pixel * mask_p, mask=pixel < pixels, other=0.0).to(tl.float32)
    q = cut(m)
    entropy = tl.where(pixel < pixels, -q * tl.log2(q) - (1 - q) * tl.log2(1 - q), 0.0)
    mask_sum = tl.sum(m)
    error = tl.zeros([BLOCK], tl.float32)

    for part in tl.static_range(3):
        pixel, inside = pixels_of_part(first, pixels, part, BLOCK, PACKED)
        if PACKED:
            m = tl.load(mask + pixel * mask_p, mask=inside, other=0.0).to(tl.float32)
        f = load_part(foreground, first, pixel, inside, part, foreground_c, foreground_p, PACKED)
        b = load_part(background, first, pixel, inside, part, background_c, background_p, PACKED)
        x = blend(f, b, m)
        place = image_place(composite, first, pixel, part, composite_c, composite_p, PACKED)
        tl.store(place, x, mask=inside)
        if copy is not None:
            place = image_place(copy, first, pixel, part, 1, 3, PACKED)
            tl.store(place, x, mask=inside)
        if target is not None:
            t = load_part(target, first, pixel, inside, part, target_c, target_p, PACKED)
            error += tl.abs(x - t)

    tl.store(partial + program, tl.sum(error))
    tl.store(partial + programs + program, tl.sum(entropy))
    tl.store(partial + 2 * programs + program, mask_sum)


@triton.jit
def finish_kernel(
    partial,  # float32 (3, N, splits)
    l1,  # out: scalar, or None without a target
    binary,  # out: scalar
    mask_mean,  # out: (N,)
    mask_interval,  # out: scalar
    images, splits, pixels,
    low, high,
    IMAGES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Turn the sums of forward_kernel into means. One program adds them up in a fixed order."""
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
        # mean * 0 keeps a NaN.
        distance = tl.where(mean < low, low - mean, tl.where(mean > high, mean - high, mean * 0))
        outside += tl.sum(tl.where(image < images, distance, 0.0))
        error += tl.sum(row_error)
        entropy += tl.sum(row_entropy)

    count = 1.0 * images * pixels
    if l1 is not None:
        tl.store(l1, error / (3 * count))
    tl.store(binary, entropy / count)
    tl.store(mask_interval, outside / images)


@triton.jit
def mask_level(grad_mean, grad_interval, mask_mean, image, images, pixels, low, high):
    """The gradient that every pixel of this image's mask gets from its mean."""
    level = 0.0
    if grad_mean is not None:
        level += tl.load(grad_mean + image).to(tl.float32) / pixels
    if grad_interval is not None:
        mean = tl.load(mask_mean + image)
        side = tl.where(mean >= high, 1.0, 0.0) - tl.where(mean <= low, 1.0, 0.0)
        count = 1.0 * images * pixels
        level += tl.load(grad_interval).to(tl.float32) * side / count
    return level


@triton.jit
def backward_kernel(
    mask,  # (N, 1, H W)
    foreground, background,  # (N, 3, H W)
    target,  # (N, 3, H W) or None
    mask_mean,  # (N,)
    grad, grad_copy,  # (N, 3, H W); like all gradients of outputs, None if nothing comes from there
    grad_l1, grad_binary,  # scalars
    grad_mean,  # (N,)
    grad_interval,  # scalar
    mask_out, foreground_out, background_out,  # out: like the inputs, None if not wanted
    images, pixels, splits,
    low, high,
    mask_n, mask_p,
    foreground_n, foreground_c, foreground_p,
    background_n, background_c, background_p,
    target_n, target_c, target_p,
    grad_n, grad_c, grad_p,
    copy_n, copy_c, copy_p,
    mask_out_n, mask_out_p,
    foreground_out_n, foreground_out_c, foreground_out_p,
    background_out_n, background_out_c, background_out_p,
    BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write the gradients of mask, foreground and background from those of all outputs."""
    program = tl.program_id(0).to(tl.int64)
    image = program // splits
    first = program % splits * BLOCK
    count = 1.0 * images * pixels
    level = mask_level(grad_mean, grad_interval, mask_mean, image, images, pixels, low, high)
    mask += image * mask_n
    foreground += image * foreground_n
    background += image * background_n

    own_pixel = first + tl.arange(0, BLOCK)
    m = tl.load(mask + own_pixel * mask_p, mask=own_pixel < pixels, other=0.5).to(tl.float32)
    dm = tl.zeros([BLOCK], tl.float32) + level
    if grad_binary is not None:
        q = cut(m)
        slope = tl.where((m < TINY) | (m > 1 - TINY), 0.0, tl.log2(1 - q) - tl.log2(q))
        dm += tl.load(grad_binary).to(tl.float32) / count * slope

    products = ()  # of each part, dx * (f - b)
    for part in tl.static_range(3):
        pixel, inside = pixels_of_part(first, pixels, part, BLOCK, PACKED)
        if PACKED:
            m = tl.load(mask + pixel * mask_p, mask=inside, other=0.5).to(tl.float32)
        f = load_part(foreground, first, pixel, inside, part, foreground_c, foreground_p, PACKED)
        b = load_part(background, first, pixel, inside, part, background_c, background_p, PACKED)

        dx = tl.zeros([BLOCK], tl.float32)  # the gradient of the composite
        if grad is not None:
            x = grad + image * grad_n
            dx += load_part(x, first, pixel, inside, part, grad_c, grad_p, PACKED)
        if grad_copy is not None:
            x = grad_copy + image * copy_n
            dx += load_part(x, first, pixel, inside, part, copy_c, copy_p, PACKED)
        if grad_l1 is not None:
            x = target + image * target_n
            t = load_part(x, first, pixel, inside, part, target_c, target_p, PACKED)
            error = blend(f, b, m) - t
            sign = tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, error))  # 0 and NaN stay
            dx += tl.load(grad_l1).to(tl.float32) / (3 * count) * sign

        products = products + (dx * (f - b),)
        if foreground_out is not None:
            x = foreground_out + image * foreground_out_n
            place = image_place(x, first, pixel, part, foreground_out_c, foreground_out_p, PACKED)
            tl.store(place, dx * m, mask=inside)
        if background_out is not None:
            x = background_out + image * background_out_n
            place = image_place(x, first, pixel, part, background_out_c, background_out_p, PACKED)
            tl.store(place, dx * (1 - m), mask=inside)

    if mask_out is not None:
        if PACKED:
            dm += sum_of_channels(products[0], products[1], products[2], BLOCK)
        else:
            dm += products[0] + products[1] + products[2]
        place = mask_out + image * mask_out_n + own_pixel * mask_out_p
        tl.store(place, dm, mask=own_pixel < pixels)


# --------------------------------------------------------------------------------------------------
# Launching


def on_device(x):
    """Make x's device the current one, on which Triton launches; no change for a CPU tensor."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


def empty_like(x):
    """Return a tensor like x that is not filled: channels last if x is, else contiguous."""
    memory_format = torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        memory_format = torch.channels_last
    return torch.empty_like(x, memory_format=memory_format)


def flatten_pixels(x):
    """View (N, C, H, W) as (N, C, H W); None stays None.

    It is a copy only where no single stride leads from pixel to pixel.
    """
    return None if x is None else x.flatten(2)


def image_strides(x):
    """Strides (n, c, pixel) in elements of (N, C, H W); zeros for None."""
    return (0, 0, 0) if x is None else x.stride()


def mask_strides(x):
    """Strides (n, pixel) in elements of (N, 1, H W); zeros for None."""
    return (0, 0) if x is None else (x.stride(0), x.stride(2))


def all_packed(*images):
    """Whether all images (N, 3, H, W) are channels last without gaps; None is not asked."""
    images = [x for x in images if x is not None]
    return all(x.is_contiguous(memory_format=torch.channels_last) for x in images)


def count_splits(x):
    """Pixels of an image, and programs that share it."""
    pixels = x.shape[2] * x.shape[3]
    return pixels, triton.cdiv(pixels, BLOCK)


def launch_forward(mask, foreground, background, target, low, high, outputs):
    """Fill the outputs of composite_forward; copy and l1 may be None."""
    composite, copy, l1, binary, mask_mean, mask_interval = outputs
    images = len(mask)
    pixels, splits = count_splits(mask)
    partial = binary.new_empty(3, images, splits)
    packed = all_packed(foreground, background, target, composite)
    mask = flatten_pixels(mask)
    foreground = flatten_pixels(foreground)
    background = flatten_pixels(background)
    target = flatten_pixels(target)
    composite = flatten_pixels(composite)  # a view: empty_like made it
    with on_device(mask):
        forward_kernel[(images * splits,)](
            mask, foreground, background, target,
            composite, copy, partial,
            pixels, splits,
            *mask_strides(mask),
            *image_strides(foreground),
            *image_strides(background),
            *image_strides(target),
            *image_strides(composite),
            BLOCK=BLOCK, PACKED=packed, num_warps=8,
        )  # fmt: skip
        columns = min(triton.next_power_of_2(splits), 64)
        rows = min(triton.next_power_of_2(images), 2048 // columns)
        finish_kernel[(1,)](
            partial, l1, binary, mask_mean, mask_interval,
            images, splits, pixels,
            low, high,
            IMAGES=rows, SPLITS=columns,
        )  # fmt: skip


def launch_backward(mask, foreground, background, target, mask_mean, grads, low, high, outputs):
    """Fill the outputs of composite_backward; the unwanted ones are None."""
    images = len(mask)
    pixels, splits = count_splits(mask)
    packed = all_packed(foreground, background, target, *grads[:2], *outputs[1:])
    mask = flatten_pixels(mask)
    foreground = flatten_pixels(foreground)
    background = flatten_pixels(background)
    target = flatten_pixels(target)
    grad = flatten_pixels(grads[0])
    grad_copy = flatten_pixels(grads[1])
    small_grads = [None if g is None else g.contiguous() for g in grads[2:]]
    mask_out, foreground_out, background_out = [flatten_pixels(x) for x in outputs]  # views
    with on_device(mask):
        backward_kernel[(images * splits,)](
            mask, foreground, background, target, mask_mean,
            grad, grad_copy, *small_grads,
            mask_out, foreground_out, background_out,
            images, pixels, splits,
            low, high,
            *mask_strides(mask),
            *image_strides(foreground),
            *image_strides(background),
            *image_strides(target),
            *image_strides(grad),
            *image_strides(grad_copy),
            *mask_strides(mask_out),
            *image_strides(foreground_out),
            *image_strides(background_out),
            BLOCK=BLOCK, PACKED=packed, num_warps=8,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# The operators that torch.compile and autograd see. An operator cannot return None: in place of a
# tensor that is not asked for it returns one without elements.

Tensor = torch.Tensor


def forward_outputs(mask, foreground, background, target, low, high, copy_dtype):
    """Return the outputs of composite_forward, not filled."""
    composite = empty_like(foreground)
    copy = torch.empty(
        foreground.shape if copy_dtype else (0, 3, 1, 1),
        dtype=copy_dtype,
        device=mask.device,
        memory_format=torch.channels_last,
    )
    l1 = mask.new_empty(() if target is not None else 0, dtype=torch.float32)
    binary = mask.new_empty((), dtype=torch.float32)
    mask_mean = mask.new_empty(len(mask), dtype=torch.float32)
    mask_interval = mask.new_empty((), dtype=torch.float32)
    return composite, copy, l1, binary, mask_mean, mask_interval


@torch.library.custom_op("cgn::composite_forward", mutates_args=())
def composite_forward(
    mask: Tensor,
    foreground: Tensor,
    background: Tensor,
    target: Tensor | None,
    low: float,
    high: float,
    copy_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return composite, copy, l1, binary, mask_mean and mask_interval."""
    outputs = forward_outputs(mask, foreground, background, target, low, high, copy_dtype)
    composite, copy, l1, *others = outputs
    if copy_dtype is None:
        copy = None
    if target is None:
        l1 = None
    wanted = (composite, copy, l1, *others)
    launch_forward(mask, foreground, background, target, low, high, wanted)
    return outputs


composite_forward.register_fake(forward_outputs)


def backward_outputs(mask, foreground, background, target, mask_mean, grads, low, high, wanted):
    """Return the gradients of mask, foreground and background, not filled."""
    outputs = []
    for x, is_wanted in zip((mask, foreground, background), wanted):
        outputs.append(empty_like(x) if is_wanted else x.new_empty(0))
    return tuple(outputs)


@torch.library.custom_op("cgn::composite_backward", mutates_args=())
def composite_backward(
    mask: Tensor,
    foreground: Tensor,
    background: Tensor,
    target: Tensor | None,
    mask_mean: Tensor,
    grads: list[Tensor | None],
    low: float,
    high: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of mask, foreground and background that are wanted.

    grads: those of composite, copy, l1, binary, mask_mean and mask_interval.
    """
    outputs = backward_outputs(
        mask, foreground, background, target, mask_mean, grads, low, high, wanted
    )
    filled = only_wanted(outputs, wanted)
    launch_backward(mask, foreground, background, target, mask_mean, grads, low, high, filled)
    return outputs


composite_backward.register_fake(backward_outputs)


def only_wanted(tensors, wanted):
    """Return the tensors, with None in place of those that are not wanted."""
    return [x if is_wanted else None for x, is_wanted in zip(tensors, wanted)]


def save_composite(ctx, inputs, output):
    mask, foreground, background, target, low, high, _ = inputs
    mask_mean = output[4]
    ctx.low = low
    ctx.high = high
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mask, foreground, background, target, mask_mean)


def composite_gradients(ctx, *grads):
    mask, foreground, background, target, mask_mean = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    grads = [None if g is None or not g.numel() else g for g in grads]  # no elements: no output
    outputs = composite_backward(
        mask, foreground, background, target, mask_mean, grads, ctx.low, ctx.high, wanted
    )
    return *only_wanted(outputs, wanted), None, None, None, None


composite_forward.register_autograd(composite_gradients, setup_context=save_composite)


def fused_composite_losses(
    mask, foreground, background, target=None, mask_interval=(0.1, 0.9), copy_dtype=None
):
    """Compose images and rate them in one pass.

    mask: (N, 1, H, W) in [0, 1]. foreground, background and the optional target: (N, 3, H, W).
    float32, float16 or bfloat16. The target gets no gradient, and there is no second derivative.

    Returns the composite (N, 3, H, W) in foreground's dtype and layout; its copy in copy_dtype,
    channels last; l1, binary (bits), mask_mean (N,) and mask_interval in float32. Without
    copy_dtype or target, None stands for the copy or l1.
    """
    if target is not None:
        target = target.detach()
    low, high = mask_interval
    composite, copy, l1, *others = composite_forward(
        mask, foreground, background, target, low, high, copy_dtype
    )
    if copy_dtype is None:
        copy = None
    if target is None:
        l1 = None
    return composite, copy, l1, *others
