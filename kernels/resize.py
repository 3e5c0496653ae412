"""Enlarged and pooled activations, as Triton kernels.

    enlarge   the derivative of bilinear enlargement, which itself is PyTorch's
    max_pool  the largest of each 2 x 2 pixels

The derivative of the bilinear enlargement goes along one side after the other. Each small pixel
gathers from the large ones that it was spread over, where PyTorch adds each large pixel atomically,
in any order. max_pool keeps one byte for each result, in which of the four pixels it was found:
PyTorch keeps eight.

All sums are float32 in a fixed order, so that every run gives the same bits. Any strides; float32,
float16 and bfloat16. This file needs only torch and triton and can be copied alone.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

TILE = 1024  # elements that a program works on at a time


# --------------------------------------------------------------------------------------------------
# Kernels. A position is a pixel, there are H W of them. A name such as x_n, x_c, x_h, x_w, x_p is
# the stride of `x` from one image, channel, row, column or position to the next, in elements.
# Programs are numbered by block of positions, block of channels, and image.


@triton.jit
def tile_of_pixels(width, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Image, row of channels, and columns of positions, their y and their x, of a program."""
    image = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    position = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    row = (position // width).to(tl.int64)  # divided in 32 bits, which is faster
    column = (position % width).to(tl.int64)
    return image, channel, position.to(tl.int64), row, column


@triton.jit
def gather_line_kernel(
    grad,  # (outer, size, inner)
    out,  # out: (outer, length, inner), contiguous
    size, length, inner,
    reach,  # large pixels that a small one may be spread over
    grad_outer, grad_size, grad_inner,
    BLOCK_L: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_L pixels of a line, BLOCK_I numbers each: the derivative along this line.

    Large pixel `place` lies at place * (length - 1) / (size - 1) among the small ones, and takes a
    share of the two beside it.
    """
    pixel = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    element = tl.program_id(2).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    line = tl.program_id(0).to(tl.int64)
    inside = (pixel < length) & (element < inner)
    grad += line * grad_outer + element * grad_inner

    # A small pixel gets shares of the large ones less than one small pixel away from it. `first` is
    # the first of them, or one before, and `reach` as many as there can be; others have share 0.
    first = tl.maximum((pixel - 1) * (size - 1) // tl.maximum(length - 1, 1), 0)
    total = tl.zeros([BLOCK_L, BLOCK_I], tl.float32)
    for step in range(reach):
        place = first + step
        distance = (place * (length - 1)).to(tl.float32) / tl.maximum(size - 1, 1) - pixel
        share = tl.maximum(1 - tl.abs(distance), 0)
        offset = place.to(tl.int64) * grad_size
        value = tl.load(grad + offset, mask=inside & (place < size), other=0.0)
        total += share * value.to(tl.float32)
    tl.store(out + (line * length + pixel) * inner + element, total, mask=inside)


@triton.jit
def max_pool_forward_kernel(
    x,  # (N, C, H, W)
    y,  # out: (N, C, positions)
    found,  # out: uint8, as y: 0 to 3, where the largest was found
    channels, height, width, y_height, y_width,
    x_n, x_c, x_h, x_w,
    y_n, y_c, y_p,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write y for BLOCK_P positions and BLOCK_C channels of one image."""
    image, channel, position, row, column = tile_of_pixels(y_width, BLOCK_P, BLOCK_C)
    inside = (channel < channels) & (row < y_height)
    x += image * x_n + channel * x_c

    best = tl.full([BLOCK_P, BLOCK_C], float("-inf"), tl.float32)
    best_part = tl.zeros([BLOCK_P, BLOCK_C], tl.int32)
    for part in tl.static_range(4):
        y_in = 2 * row + part // 2
        x_in = 2 * column + part % 2
        there = inside & (y_in < height) & (x_in < width)
        value = tl.load(x + y_in * x_h + x_in * x_w, mask=there, other=float("-inf"))
        value = value.to(tl.float32)
        better = (value > best) | (value != value)  # NaN is found
        best = tl.where(better, value, best)
        best_part = tl.where(better, part, best_part)

    place = image * y_n + channel * y_c + position * y_p
    tl.store(y + place, best, mask=inside)
    tl.store(found + place, best_part, mask=inside)


@triton.jit
def max_pool_backward_kernel(
    grad,  # (N, C, H / 2, W / 2), of y
    found,  # uint8 (N, C, H / 2, W / 2)
    out,  # out: (N, C, H, W)
    channels, height, width, y_height, y_width,
    grad_n, grad_c, grad_h, grad_w,
    found_n, found_c, found_h, found_w,
    out_n, out_c, out_h, out_w,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the four pixels of BLOCK_P results, and what a last odd row or column holds, for
    BLOCK_C channels of one image.
    """
    windows = (width + 1) // 2
    image, channel, position, row, column = tile_of_pixels(windows, BLOCK_P, BLOCK_C)
    inside = (channel < channels) & (row < y_height) & (column < y_width)
    place = grad + image * grad_n + channel * grad_c + row * grad_h + column * grad_w
    value = tl.load(place, mask=inside, other=0.0)
    place = found + image * found_n + channel * found_c + row * found_h + column * found_w
    part_found = tl.load(place, mask=inside, other=4).to(tl.int32)

    out += image * out_n + channel * out_c
    for part in tl.static_range(4):
        y_out = 2 * row + part // 2
        x_out = 2 * column + part % 2
        there = (channel < channels) & (y_out < height) & (x_out < width)
        part_value = tl.where(part_found == part, value, 0.0)
        tl.store(out + y_out * out_h + x_out * out_w, part_value, mask=there)


# --------------------------------------------------------------------------------------------------
# Launching


def on_device(x):
    """Make x's device the current one, on which Triton launches; no change for a CPU tensor."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


def is_channels_last(x):
    """Whether channels are what lies side by side in memory; in a slice of channels, too."""
    return x.stride(1) == 1 and x.shape[1] > 1


def unfilled(like, shape, dtype=None):
    """Return a tensor of this shape that is not filled: channels last if `like` is."""
    memory_format = torch.contiguous_format
    if is_channels_last(like):
        memory_format = torch.channels_last
    dtype = dtype or like.dtype
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format)


def launch_sizes(x, positions):
    """The grid for so many positions of all channels of x, and the sizes of a tile: long where
    memory runs on, so that loads are wide.
    """
    n, channels, _, _ = x.shape
    if is_channels_last(x):
        block_c = min(triton.next_power_of_2(channels), 64)
        block_p = TILE // block_c
    else:
        block_c = 1
        block_p = min(triton.next_power_of_2(positions), TILE)
    grid = (triton.cdiv(positions, block_p), triton.cdiv(channels, block_c), n)
    return grid, {"BLOCK_P": block_p, "BLOCK_C": block_c}


Tensor = torch.Tensor


def gather_line(grad, length):
    """The gradient of a line of `length` pixels, (outer, length, inner), from that of the line that
    it was enlarged to, (outer, size, inner).
    """
    outer, size, inner = grad.shape
    out = grad.new_empty(outer, length, inner)
    block_i = min(triton.next_power_of_2(inner), TILE)
    block_l = min(triton.next_power_of_2(length), TILE // block_i)
    reach = size
    if length > 1:
        reach = 2 * (size - 1) // (length - 1) + 2
    with on_device(grad):
        gather_line_kernel[outer, triton.cdiv(length, block_l), triton.cdiv(inner, block_i)](
            grad, out, size, length, inner, reach, *grad.stride(),
            BLOCK_L=block_l, BLOCK_I=block_i,
        )  # fmt: skip
    return out


def unfilled_enlarged_gradient(grad, height, width):
    """Return the output of enlarge_backward, not filled."""
    return unfilled(grad, (*grad.shape[:2], height, width))


@torch.library.custom_op("cgn::enlarge_backward", mutates_args=())
def enlarge_backward(grad: Tensor, height: int, width: int) -> Tensor:
    """Return the gradient of images (N, C, height, width), from that (N, C, H, W) of their bilinear
    enlargement, corners on corners.
    """
    n, channels, large_height, _ = grad.shape
    if is_channels_last(grad):
        grad = gather_line(grad.permute(0, 2, 3, 1).flatten(0, 1), width)  # (N H, width, C)
        grad = grad.view(n, large_height, width * channels)
        grad = gather_line(grad, height)  # (N, height, width C)
        return grad.view(n, height, width, channels).permute(0, 3, 1, 2)
    grad = gather_line(grad.flatten(0, 2)[..., None], width)  # (N C H, width, 1)
    grad = grad.view(n * channels, large_height, width)
    return gather_line(grad, height).view(n, channels, height, width)


enlarge_backward.register_fake(unfilled_enlarged_gradient)


class Enlarge(torch.autograd.Function):
    """PyTorch's bilinear enlargement, corners on corners, with our derivative."""

    @staticmethod
    def forward(ctx, x, size):
        ctx.size = x.shape[2:]
        return F.interpolate(x, size, mode="bilinear", align_corners=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return enlarge_backward(grad, *ctx.size), None


def unfilled_pooled(x, ceil_mode):
    """Return the outputs of max_pool_forward, not filled."""
    n, channels, height, width = x.shape
    odd = int(ceil_mode)
    shape = (n, channels, (height + odd) // 2, (width + odd) // 2)
    return unfilled(x, shape), unfilled(x, shape, torch.uint8)


@torch.library.custom_op("cgn::max_pool_forward", mutates_args=())
def max_pool_forward(x: Tensor, ceil_mode: bool) -> tuple[Tensor, Tensor]:
    """Return the largest of each 2 x 2 pixels of x (N, C, H, W), and in which of the four, 0 to 3,
    it was found. ceil_mode: whether the last of an odd number of rows or columns has results.
    """
    y, found = unfilled_pooled(x, ceil_mode)
    _, channels, height, width = x.shape
    y_height, y_width = y.shape[2:]
    grid, sizes = launch_sizes(y, y_height * y_width)
    flat_y = y.flatten(2)  # a view
    with on_device(x):
        max_pool_forward_kernel[grid](
            x, flat_y, found,
            channels, height, width, y_height, y_width,
            *x.stride(),
            *flat_y.stride(),
            **sizes,
        )  # fmt: skip
    return y, found


max_pool_forward.register_fake(unfilled_pooled)


def unfilled_pooling_gradient(grad, found, height, width):
    """Return the output of max_pool_backward, not filled."""
    return unfilled(grad, (*grad.shape[:2], height, width))


@torch.library.custom_op("cgn::max_pool_backward", mutates_args=())
def max_pool_backward(grad: Tensor, found: Tensor, height: int, width: int) -> Tensor:
    """Return the gradient of x, (N, C, height, width), for that of the results."""
    out = unfilled_pooling_gradient(grad, found, height, width)
    positions = (height + 1) // 2 * ((width + 1) // 2)
    grid, sizes = launch_sizes(out, positions)
    with on_device(grad):
        max_pool_backward_kernel[grid](
            grad, found, out,
            grad.shape[1], height, width, *grad.shape[2:],
            *grad.stride(),
            *found.stride(),
            *out.stride(),
            **sizes,
        )  # fmt: skip
    return out


max_pool_backward.register_fake(unfilled_pooling_gradient)


def keep_found(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.size = inputs[0].shape[2:]


def gradient_of_pool(ctx, grad, _):
    return max_pool_backward(grad, *ctx.saved_tensors, *ctx.size), None


max_pool_forward.register_autograd(gradient_of_pool, setup_context=keep_found)
