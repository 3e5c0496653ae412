"""Gain, shift and ReLU of a conditional norm, bias and ReLU of a convolution, as Triton kernels.

    y = max(x * gain + shift, 0)    gain and shift: a number for each image and channel
    x becomes max(x + bias, 0)      bias: a number for each channel, frozen

The forward kernel reads x and writes y. The backward kernel reads x and the gradient of y, finds
out again where the ReLU was open, and writes the gradient of x and sums for those of gain and
shift: three elements moved for each of x, where plain PyTorch moves about sixteen. Sums are float32
and run in two stages of fixed order, so that every run gives the same bits.

Bias and ReLU read and write x once. PyTorch on a GPU adds a convolution's bias in a pass of its
own, one element at a time. Their derivative adds the gradients of two users of the result.

Any sizes and strides; float32, float16 and bfloat16. This file needs only torch and triton and can
be copied alone.
"""

import torch
import triton
import triton.language as tl

TILE = 2048  # elements that a program works on at a time
LOOPS = 8  # tiles of a program in the backward pass, at most


# --------------------------------------------------------------------------------------------------
# Kernels. A position is a pixel, there are H W of them. A name such as x_n, x_c, x_p is the stride
# of `x` from one image, channel or position to the next, in elements. Programs are numbered by
# share of the positions, block of channels, and image.


@triton.jit
def tile_of_program(channels, positions, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Image, row of channels and column of positions of a program, and which of them there are."""
    image = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    position = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    inside = (channel < channels) & (position < positions)
    return image, channel, position, inside


@triton.jit
def gain_and_shift(affine, affine_n, image, channel, channels):
    """Those of one image, for a row of channels, in float32."""
    affine += image * affine_n + channel
    gain = tl.load(affine, mask=channel < channels, other=0.0)
    shift = tl.load(affine + channels, mask=channel < channels, other=0.0)
    return gain.to(tl.float32), shift.to(tl.float32)


@triton.jit
def affine_forward_kernel(
    x,  # (N, C, H W)
    affine,  # (N, 2 C): gains, then shifts
    y,  # out: (N, C, H W)
    channels, positions,
    affine_n,
    x_n, x_c, x_p,
    y_n, y_c, y_p,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write y for BLOCK_P positions and BLOCK_C channels of one image."""
    image, channel, position, inside = tile_of_program(channels, positions, BLOCK_P, BLOCK_C)
    gain, shift = gain_and_shift(affine, affine_n, image, channel, channels)

    place = x + image * x_n + channel * x_c + position * x_p
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32) * gain + shift
    value = tl.where(value < 0, 0.0, value)  # NaN stays NaN
    tl.store(y + image * y_n + channel * y_c + position * y_p, value, mask=inside)


@triton.jit
def affine_backward_kernel(
    x,  # (N, C, H W)
    affine,  # (N, 2 C)
    grad,  # (N, C, H W), of y
    grad_x,  # out: (N, C, H W)
    partial,  # out: float32 (shares, N, 2 C), sums for the gradient of affine
    channels, positions, images,
    affine_n,
    x_n, x_c, x_p,
    grad_n, grad_c, grad_p,
    out_n, out_c, out_p,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x for LOOPS * BLOCK_P positions, and their sums."""
    image = tl.program_id(2).to(tl.int64)
    share = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    gain, shift = gain_and_shift(affine, affine_n, image, channel, channels)
    x += image * x_n + channel * x_c
    grad += image * grad_n + channel * grad_c
    grad_x += image * out_n + channel * out_c

    gain_sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    shift_sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for loop in range(LOOPS):
        position = (share * LOOPS + loop) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
        inside = (channel < channels) & (position < positions)
        value = tl.load(x + position * x_p, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + position * grad_p, mask=inside, other=0.0).to(tl.float32)
        g = tl.where(value * gain + shift <= 0, 0.0, g)
        tl.store(grad_x + position * out_p, g * gain, mask=inside)
        gain_sums += g * value
        shift_sums += g

    partial += (share * images + image) * 2 * channels + channel
    is_channel = channel < channels
    tl.store(partial, tl.sum(gain_sums, 0, keep_dims=True), mask=is_channel)
    tl.store(partial + channels, tl.sum(shift_sums, 0, keep_dims=True), mask=is_channel)


@triton.jit
def bias_relu_kernel(
    x,  # (N, C, H W), in place
    bias,  # (C,)
    channels, positions,
    x_n, x_c, x_p,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add the bias and cut at 0, for BLOCK_P positions and BLOCK_C channels of one image."""
    image, channel, position, inside = tile_of_program(channels, positions, BLOCK_P, BLOCK_C)
    shift = tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)

    place = x + image * x_n + channel * x_c + position * x_p
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32) + shift
    value = tl.where(value < 0, 0.0, value)  # NaN stays NaN
    tl.store(place, value, mask=inside)


@triton.jit
def relu_backward_kernel(
    y,  # (N, C, H W), the result
    grad,  # (N, C, H W), of one use of it
    other,  # (N, C, H W), of another
    out,  # out: (N, C, H W)
    channels, positions,
    y_n, y_c, y_p,
    grad_n, grad_c, grad_p,
    other_n, other_c, other_p,
    out_n, out_c, out_p,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the sum of both gradients where the ReLU was open, and 0 elsewhere."""
    image, channel, position, inside = tile_of_program(channels, positions, BLOCK_P, BLOCK_C)
    place = y + image * y_n + channel * y_c + position * y_p
    value = tl.load(place, mask=inside, other=0.0)
    place = grad + image * grad_n + channel * grad_c + position * grad_p
    total = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    place = other + image * other_n + channel * other_c + position * other_p
    total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    total = tl.where(value <= 0, 0.0, total)
    tl.store(out + image * out_n + channel * out_c + position * out_p, total, mask=inside)


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


def tile_sizes(x):
    """Positions and channels of a tile: long where memory runs on, so that loads are wide."""
    _, channels, height, width = x.shape
    if x.stride(1) == 1:
        block_c = min(triton.next_power_of_2(channels), 64)
        return TILE // block_c, block_c
    return min(triton.next_power_of_2(height * width), TILE), 1


def dense_rows(affine):
    """Gains and shifts (N, 2 C) with those of an image side by side: the columns of a larger tensor
    are taken as they are.
    """
    return affine if affine.stride(1) == 1 else affine.contiguous()


def count_shares(x):
    """Tiles that a program of the backward pass takes, and programs that share the positions."""
    block_p, _ = tile_sizes(x)
    tiles = triton.cdiv(x.shape[2] * x.shape[3], block_p)
    loops = min(LOOPS, triton.next_power_of_2(tiles))
    return loops, triton.cdiv(tiles, loops)


Tensor = torch.Tensor


def unfilled_output(x, affine):
    """Return the output of affine_forward, not filled."""
    return empty_like(x)


@torch.library.custom_op("cgn::affine_forward", mutates_args=())
def affine_forward(x: Tensor, affine: Tensor) -> Tensor:
    """Return max(x * gain + shift, 0); affine (N, 2 C) holds gains, then shifts."""
    y = unfilled_output(x, affine)
    n, channels, height, width = x.shape
    block_p, block_c = tile_sizes(x)
    grid = (triton.cdiv(height * width, block_p), triton.cdiv(channels, block_c), n)
    affine = dense_rows(affine)
    flat_x = x.flatten(2)
    flat_y = y.flatten(2)  # a view: empty_like made it
    with on_device(x):
        affine_forward_kernel[grid](
            flat_x, affine, flat_y,
            channels, height * width,
            affine.stride(0),
            *flat_x.stride(),
            *flat_y.stride(),
            BLOCK_P=block_p, BLOCK_C=block_c, num_warps=8,
        )  # fmt: skip
    return y


affine_forward.register_fake(unfilled_output)


def unfilled_gradients(x, affine, grad):
    """Return the gradients of x and affine, not filled."""
    return empty_like(x), torch.empty_like(affine, memory_format=torch.contiguous_format)


@torch.library.custom_op("cgn::affine_backward", mutates_args=())
def affine_backward(x: Tensor, affine: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and affine."""
    grad_x, _ = unfilled_gradients(x, affine, grad)
    n, channels, height, width = x.shape
    block_p, block_c = tile_sizes(x)
    loops, shares = count_shares(x)
    partial = affine.new_empty(shares, n, 2 * channels, dtype=torch.float32)
    affine = dense_rows(affine)
    flat_x = x.flatten(2)
    flat_grad = grad.flatten(2)
    flat_out = grad_x.flatten(2)  # a view: empty_like made it
    with on_device(x):
        affine_backward_kernel[shares, triton.cdiv(channels, block_c), n](
            flat_x, affine, flat_grad, flat_out, partial,
            channels, height * width, n,
            affine.stride(0),
            *flat_x.stride(),
            *flat_grad.stride(),
            *flat_out.stride(),
            BLOCK_P=block_p, BLOCK_C=block_c, LOOPS=loops, num_warps=8,
        )  # fmt: skip
    return grad_x, partial.sum(0).to(affine.dtype)


affine_backward.register_fake(unfilled_gradients)


def save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def gradients(ctx, grad):
    return affine_backward(*ctx.saved_tensors, grad)


affine_forward.register_autograd(gradients, setup_context=save_inputs)


@torch.library.custom_op("cgn::bias_relu", mutates_args=["x"])
def bias_relu(x: Tensor, bias: Tensor) -> None:
    """Make x, (N, C, H, W), max(x + bias, 0); bias (C,)."""
    n, channels, height, width = x.shape
    block_p, block_c = tile_sizes(x)
    grid = (triton.cdiv(height * width, block_p), triton.cdiv(channels, block_c), n)
    flat_x = x.view(n, channels, height * width)
    with on_device(x):
        bias_relu_kernel[grid](
            flat_x, bias.contiguous(), channels, height * width, *flat_x.stride(),
            BLOCK_P=block_p, BLOCK_C=block_c, num_warps=8,
        )  # fmt: skip


def unfilled_sum(y, grad, other):
    """Return the output of relu_backward, not filled."""
    return empty_like(y)


@torch.library.custom_op("cgn::relu_backward", mutates_args=())
def relu_backward(y: Tensor, grad: Tensor, other: Tensor) -> Tensor:
    """Return grad + other where y > 0, and 0 elsewhere: all (N, C, H, W)."""
    out = unfilled_sum(y, grad, other)
    n, channels, height, width = y.shape
    block_p, block_c = tile_sizes(y)
    grid = (triton.cdiv(height * width, block_p), triton.cdiv(channels, block_c), n)
    flat_y, flat_grad, flat_other = (x.flatten(2) for x in (y, grad, other))
    flat_out = out.flatten(2)  # a view: empty_like made it
    with on_device(y):
        relu_backward_kernel[grid](
            flat_y, flat_grad, flat_other, flat_out,
            channels, height * width,
            *flat_y.stride(),
            *flat_grad.stride(),
            *flat_other.stride(),
            *flat_out.stride(),
            BLOCK_P=block_p, BLOCK_C=block_c, num_warps=8,
        )  # fmt: skip
    return out


relu_backward.register_fake(unfilled_sum)


class BiasRelu(torch.autograd.Function):
    """bias_relu with the derivative of x, which looks at the result for where the ReLU was open.

    Returns the result twice, for two users of it: PyTorch would add their gradients in a pass of
    its own.
    """

    @staticmethod
    def forward(ctx, x, bias):
        ctx.set_materialize_grads(False)  # None for a user that there is not
        bias_relu(x, bias)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x, x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, other):
        (y,) = ctx.saved_tensors
        if grad is not None and other is not None:
            return relu_backward(y, grad, other), None
        grad = other if grad is None else grad
        return torch.ops.aten.threshold_backward(grad, y, 0), None
