"""A conditional norm with its ReLU, the 1 x 1 convolution behind it and a residual sum, as Triton
kernels.

    y = weight max(x * gain + shift, 0) + residual    in every pixel

gain and shift: a number for each image and channel. The residual may have more channels than y, of
which the last ones are left out, and half the size, enlarged to nearest neighbors.

Such a convolution has few multiplications for the memory that it moves. These kernels read x and
the residual and write y; norm, convolution and sum of their own move x and y three times each. The
activations between are never in memory: backward finds them out again from x. It also adds to x's
gradient the one that comes from x's other use, the residual connection.

Sums are float32 in a fixed order, so that every run gives the same bits. Any sizes and strides;
float32, float16 and bfloat16. This file needs only torch and triton and can be copied alone.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

PROGRAMS = 512  # for the gradient of the weight, about
TILE = 1024  # elements that a program for the gradient of the residual works on
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# --------------------------------------------------------------------------------------------------
# Kernels. A position is a pixel, there are H W of them; C channels go in and D come out. A name
# such as x_n, x_c, x_h, x_w, x_p is the stride of `x` from one image, channel, row, column or
# position to the next, in elements.


@triton.jit
def add_product(a, b, total):
    """total + a b."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        # Triton's interpreter would multiply the bits as integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def load_tile(x, position, channel, positions, channels, x_p, x_c):
    """Of one image x, (C, H W): (positions, channels), zeros outside."""
    place = x + position[:, None] * x_p + channel[None, :] * x_c
    inside = (position < positions)[:, None] & (channel < channels)[None, :]
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def load_affine(affine, channel, channels, affine_c):
    """Gain and shift of one image's channels, in float32, as rows."""
    gain = tl.load(affine + channel * affine_c, mask=channel < channels, other=0.0)
    channel += channels
    shift = tl.load(affine + channel * affine_c, mask=channel < 2 * channels, other=0.0)
    return gain.to(tl.float32)[None, :], shift.to(tl.float32)[None, :]


@triton.jit
def activate(value, gain, shift):
    """max(value * gain + shift, 0), in the dtype of value."""
    active = value.to(tl.float32) * gain + shift
    active = tl.where(active < 0, 0.0, active)  # NaN stays NaN
    return active.to(value.dtype)


@triton.jit
def pointwise_forward_kernel(
    x,  # (N, C, H W)
    affine,  # (N, 2 C): gains, then shifts
    weight,  # (D, C)
    residual,  # (N, D or more, H / RATIO, W / RATIO) or None
    y,  # out: (N, D, H W)
    channels, outputs, width, positions,
    affine_n, affine_c,
    weight_d, weight_c,
    x_n, x_c, x_p,
    residual_n, residual_c, residual_h, residual_w,
    y_n, y_c, y_p,
    RATIO: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write y for BLOCK_P positions and BLOCK_D outputs of one image."""
    blocks = tl.cdiv(outputs, BLOCK_D)
    image = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) // blocks * BLOCK_P
    # Neighboring programs work on the same positions, which are in the cache by then.
    output = (tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    pixel = first + tl.arange(0, BLOCK_P)
    position = pixel.to(tl.int64)
    x += image * x_n
    affine += image * affine_n

    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(0, channels, BLOCK_C):
        channel = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
        value = load_tile(x, position, channel, positions, channels, x_p, x_c)
        gain, shift = load_affine(affine, channel, channels, affine_c)
        w = load_tile(weight, channel, output, channels, outputs, weight_c, weight_d)
        total = add_product(activate(value, gain, shift), w.to(value.dtype), total)

    inside = (pixel < positions)[:, None] & (output < outputs)[None, :]
    if residual is not None:
        row = (pixel // width // RATIO).to(tl.int64)
        column = (pixel % width // RATIO).to(tl.int64)
        place = residual + image * residual_n + output[None, :] * residual_c
        place += (row * residual_h + column * residual_w)[:, None]
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    place = y + image * y_n + position[:, None] * y_p + output[None, :] * y_c
    tl.store(place, total, mask=inside)


@triton.jit
def pointwise_input_kernel(
    x,  # (N, C, H W)
    affine,  # (N, 2 C)
    weight,  # (D, C)
    grad,  # (N, D, H W), of y
    other,  # (N, C, H W) or None: the gradient of x's other use
    grad_x,  # out: (N, C, H W)
    partial,  # out: float32 (shares, N, 2 C), sums for the gradient of affine
    channels, outputs, positions, images,
    affine_n, affine_c,
    weight_d, weight_c,
    x_n, x_c, x_p,
    grad_n, grad_c, grad_p,
    other_n, other_c, other_p,
    out_n, out_c, out_p,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x for BLOCK_P positions and BLOCK_C channels, and their sums."""
    blocks = tl.cdiv(channels, BLOCK_C)
    image = tl.program_id(1).to(tl.int64)
    share = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    position = share * BLOCK_P + tl.arange(0, BLOCK_P)
    grad += image * grad_n

    g = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)  # the gradient of the ReLU's result
    for start in range(0, outputs, BLOCK_D):
        output = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        part = load_tile(grad, position, output, positions, outputs, grad_p, grad_c)
        w = load_tile(weight, output, channel, outputs, channels, weight_d, weight_c)
        g = add_product(part, w.to(part.dtype), g)

    gain, shift = load_affine(affine + image * affine_n, channel, channels, affine_c)
    value = load_tile(x + image * x_n, position, channel, positions, channels, x_p, x_c)
    value = value.to(tl.float32)
    g = tl.where(value * gain + shift <= 0, 0.0, g)
    partial += (share * images + image) * 2 * channels + channel
    tl.store(partial, tl.sum(g * value, 0), mask=channel < channels)
    tl.store(partial + channels, tl.sum(g, 0), mask=channel < channels)

    g *= gain
    if other is not None:
        other += image * other_n
        added = load_tile(other, position, channel, positions, channels, other_p, other_c)
        g += added.to(tl.float32)
    place = grad_x + image * out_n + position[:, None] * out_p + channel[None, :] * out_c
    tl.store(place, g, mask=(position < positions)[:, None] & (channel < channels)[None, :])


@triton.jit
def pointwise_weight_kernel(
    x,  # (N, C, H W)
    affine,  # (N, 2 C)
    grad,  # (N, D, H W), of y
    partial,  # out: float32 (shares, D, C), sums for the gradient of weight
    channels, outputs, positions,
    tiles, loops,  # tiles of positions of all images, and of a share
    affine_n, affine_c,
    x_n, x_c, x_p,
    grad_n, grad_c, grad_p,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write sums over one share of all positions, for BLOCK_D outputs and BLOCK_C channels."""
    blocks = tl.cdiv(channels, BLOCK_C)
    output = (tl.program_id(0) // blocks * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    channel = (tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    share = tl.program_id(1)
    image_tiles = tl.cdiv(positions, BLOCK_P)

    total = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    for tile in range(share * loops, tl.minimum((share + 1) * loops, tiles)):
        image = (tile // image_tiles).to(tl.int64)
        position = (tile % image_tiles * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
        gain, shift = load_affine(affine + image * affine_n, channel, channels, affine_c)
        value = load_tile(x + image * x_n, position, channel, positions, channels, x_p, x_c)
        g = load_tile(grad + image * grad_n, position, output, positions, outputs, grad_p, grad_c)
        total = add_product(tl.trans(g), activate(value, gain, shift).to(g.dtype), total)

    place = (share.to(tl.int64) * outputs + output[:, None]) * channels + channel[None, :]
    inside = (output < outputs)[:, None] & (channel < channels)[None, :]
    tl.store(partial + place, total, mask=inside)


@triton.jit
def sum_of_four_kernel(
    grad,  # (N, C, 2 H, 2 W)
    out,  # out: (N, C or more, H W)
    channels, all_channels, height, width,  # of grad; the others of out
    grad_n, grad_c, grad_h, grad_w,
    out_n, out_c, out_p,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the gradient of an enlarged residual, for BLOCK_P positions and BLOCK_C channels."""
    image = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    position = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    row = (position // width).to(tl.int64)  # divided in 32 bits, which is faster
    column = (position % width).to(tl.int64)
    inside = (channel < channels) & (row < height)

    place = grad + image * grad_n + channel * grad_c + 2 * row * grad_h + 2 * column * grad_w
    total = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(place + grad_w, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(place + grad_h, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(place + grad_h + grad_w, mask=inside, other=0.0).to(tl.float32)

    inside = (channel < all_channels) & (row < height)
    place = out + image * out_n + channel * out_c + position.to(tl.int64) * out_p
    tl.store(place, total, mask=inside)


# --------------------------------------------------------------------------------------------------
# Launching


def on_device(x):
    """Make x's device the current one, on which Triton launches; no change for a CPU tensor."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


def output_like(like, *shape):
    """Return a tensor of this shape that is not filled: channels last if `like` is."""
    memory_format = torch.contiguous_format
    if like.stride(1) == 1 and like.shape[1] > 1:
        memory_format = torch.channels_last
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def block_size(size, most):
    """A power of two for so many elements; matrix products take 16 at least."""
    return max(16, min(triton.next_power_of_2(size), most))


def strides_or_zeros(x, count):
    """The strides of a tensor, or zeros for one that is not there."""
    return (0,) * count if x is None else x.stride()


Tensor = torch.Tensor


def unfilled_outputs(x, affine, weight, residual):
    """Return the output of pointwise_forward, not filled."""
    return output_like(x, len(x), len(weight), *x.shape[2:])


@torch.library.custom_op("cgn::pointwise_forward", mutates_args=())
def pointwise_forward(
    x: Tensor, affine: Tensor, weight: Tensor, residual: Tensor | None
) -> Tensor:
    """Return weight max(x * gain + shift, 0) + residual, (N, D, H, W).

    x: (N, C, H, W). affine: (N, 2 C), gains, then shifts. weight: (D, C). residual: (N, D or more,
    H, W) or (N, D or more, H / 2, W / 2).
    """
    y = unfilled_outputs(x, affine, weight, residual)
    n, channels, height, width = x.shape
    outputs = len(weight)
    half = x.dtype != torch.float32
    block_p = block_size(height * width, 64)
    block_c = block_size(channels, 64 if half else 32)
    block_d = block_size(outputs, 128 if half else 64)
    tiles = triton.cdiv(height * width, block_p)
    flat_x = x.flatten(2)
    flat_y = y.flatten(2)  # a view
    ratio = 1 if residual is None else height // residual.shape[2]
    with on_device(x):
        pointwise_forward_kernel[tiles * triton.cdiv(outputs, block_d), n](
            flat_x, affine, weight, residual, flat_y,
            channels, outputs, width, height * width,
            *affine.stride(),
            *weight.stride(),
            *flat_x.stride(),
            *strides_or_zeros(residual, 4),
            *flat_y.stride(),
            RATIO=ratio, BLOCK_P=block_p, BLOCK_C=block_c, BLOCK_D=block_d,
            num_warps=8, num_stages=2,
        )  # fmt: skip
    return y


pointwise_forward.register_fake(unfilled_outputs)


def unfilled_results(x, affine, weight, grad, other):
    """Return the gradients of x, affine and weight, not filled."""
    dense = torch.contiguous_format
    grad_affine = torch.empty_like(affine, memory_format=dense)
    return output_like(x, *x.shape), grad_affine, torch.empty_like(weight, memory_format=dense)


@torch.library.custom_op("cgn::pointwise_backward", mutates_args=())
def pointwise_backward(
    x: Tensor, affine: Tensor, weight: Tensor, grad: Tensor, other: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, to which `other` is added, affine and weight."""
    grad_x, grad_affine = input_gradients(x, affine, weight, grad, other)
    return grad_x, grad_affine, weight_gradient(x, affine, grad).to(weight.dtype)


pointwise_backward.register_fake(unfilled_results)


def input_gradients(x, affine, weight, grad, other):
    """Return the gradients of x, to which `other` is added, and affine."""
    grad_x = output_like(x, *x.shape)
    n, channels, height, width = x.shape
    outputs = len(weight)
    positions = height * width
    half = x.dtype != torch.float32
    block_p = block_size(positions, 64)
    block_c = block_size(channels, 64 if half else 32)
    block_d = block_size(outputs, 64 if half else 32)
    shares = triton.cdiv(positions, block_p)
    partial = affine.new_empty(shares, n, 2 * channels, dtype=torch.float32)
    flat_x = x.flatten(2)
    flat_grad = grad.flatten(2)
    flat_other = None if other is None else other.flatten(2)
    flat_out = grad_x.flatten(2)  # a view
    with on_device(x):
        pointwise_input_kernel[shares * triton.cdiv(channels, block_c), n](
            flat_x, affine, weight, flat_grad, flat_other, flat_out, partial,
            channels, outputs, positions, n,
            *affine.stride(),
            *weight.stride(),
            *flat_x.stride(),
            *flat_grad.stride(),
            *strides_or_zeros(flat_other, 3),
            *flat_out.stride(),
            BLOCK_P=block_p, BLOCK_C=block_c, BLOCK_D=block_d, num_warps=8,
        )  # fmt: skip
    return grad_x, partial.sum(0).to(affine.dtype)


def weight_gradient(x, affine, grad):
    """Return the gradient of the weight, float32 (D, C)."""
    n, channels, height, width = x.shape
    outputs = grad.shape[1]
    positions = height * width
    half = x.dtype != torch.float32
    block_p = block_size(positions, 64 if half else 32)
    sizes = (128, 64) if half else (64, 32)  # the larger one for the larger side
    if channels < outputs:
        sizes = sizes[::-1]
    block_c = block_size(channels, sizes[0])
    block_d = block_size(outputs, sizes[1])
    blocks = triton.cdiv(channels, block_c) * triton.cdiv(outputs, block_d)
    tiles = n * triton.cdiv(positions, block_p)
    loops = triton.cdiv(tiles, triton.cdiv(PROGRAMS, blocks))
    shares = triton.cdiv(tiles, loops)
    partial = x.new_empty(shares, outputs, channels, dtype=torch.float32)
    flat_x = x.flatten(2)
    flat_grad = grad.flatten(2)
    with on_device(x):
        pointwise_weight_kernel[blocks, shares](
            flat_x, affine, flat_grad, partial,
            channels, outputs, positions,
            tiles, loops,
            *affine.stride(),
            *flat_x.stride(),
            *flat_grad.stride(),
            BLOCK_P=block_p, BLOCK_C=block_c, BLOCK_D=block_d, num_warps=8,
        )  # fmt: skip
    return partial.sum(0)


def unfilled_small_gradient(grad, channels):
    """Return the output of sum_of_four, not filled."""
    n, _, height, width = grad.shape
    return output_like(grad, n, channels, height // 2, width // 2)


@torch.library.custom_op("cgn::sum_of_four", mutates_args=())
def sum_of_four(grad: Tensor, channels: int) -> Tensor:
    """Return the gradient of a residual of so many channels, for that of its enlargement."""
    out = unfilled_small_gradient(grad, channels)
    n, _, height, width = out.shape
    positions = height * width
    block_c = 1
    if out.stride(1) == 1:  # long where memory runs on, so that loads are wide
        block_c = min(triton.next_power_of_2(channels), 64)
    block_p = min(triton.next_power_of_2(positions), TILE // block_c)
    flat_out = out.flatten(2)  # a view
    with on_device(grad):
        sum_of_four_kernel[triton.cdiv(positions, block_p), triton.cdiv(channels, block_c), n](
            grad, flat_out,
            grad.shape[1], channels, height, width,
            *grad.stride(),
            *flat_out.stride(),
            BLOCK_P=block_p, BLOCK_C=block_c,
        )  # fmt: skip
    return out


sum_of_four.register_fake(unfilled_small_gradient)


class AffineConvolution(torch.autograd.Function):
    """pointwise_forward with its derivative; returns y, and x for its other use.

    So x has one gradient, not two that PyTorch would add in a pass of its own.
    """

    @staticmethod
    def forward(ctx, x, affine, weight, residual):
        ctx.set_materialize_grads(False)  # None if x is not used again
        ctx.save_for_backward(x, affine, weight)
        ctx.residual_shape = None if residual is None else residual.shape
        y = pointwise_forward(x, affine, weight.flatten(1), residual)
        return y, x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, other):
        if grad is None:  # only the second result was used
            return other, None, None, None
        x, affine, weight = ctx.saved_tensors
        grads = pointwise_backward(x, affine, weight.flatten(1), grad, other)
        grad_residual = None
        if ctx.needs_input_grad[3]:
            _, channels, height, _ = ctx.residual_shape
            grad_residual = grad
            if height < grad.shape[2]:
                grad_residual = sum_of_four(grad, channels)
            elif channels > grad.shape[1]:
                grad_residual = F.pad(grad, [0, 0, 0, 0, 0, channels - grad.shape[1]])
        return grads[0], grads[1], grads[2].view_as(weight), grad_residual
