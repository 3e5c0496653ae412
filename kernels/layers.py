"""Layers that give what plain PyTorch gives at a lower cost, in one form for every device.

Upsampling within the convolution behind it, BatchNorm within the convolution behind it, enlarged
maps, spectral normalization, and the shuffling of textures. This file needs only torch and can be
copied alone.
"""

import contextlib
import functools

import torch
import torch.nn as nn
import torch.nn.functional as F


def without_autocast(x):
    """`with without_autocast(x):` operations keep their types, whatever a caller has set.

    CUDA's autocast makes resized images float32, and the vectors of a power iteration bfloat16.
    """
    if not torch.amp.is_autocast_available(x.device.type):  # device "meta"
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def upsample(x):
    """Nearest-neighbor upsampling by 2: (N, C, H, W) -> (N, C, 2 H, 2 W) of the same type."""
    with without_autocast(x):
        return F.interpolate(x, scale_factor=2)


@functools.cache
@torch.inference_mode(False)
def upsampling_taps(device, dtype):
    """Which of the 3 x 3 taps are summed for each tap of the 4 x 4 kernel: zeros and ones, (9, 16).

    The taps are mirrored, because a transposed convolution walks its kernel the other way round.
    """
    taps = torch.eye(9).view(1, 9, 3, 3).flip(2, 3)
    taps = F.pad(taps, [1, 1, 1, 1])  # (1, 9, 5, 5)
    sums = F.avg_pool2d(taps, 2, stride=1, divisor_override=1)  # (1, 9, 4, 4)
    return sums.view(9, 16).to(device, dtype)


def upsample_conv2d(x, weight, bias=None):
    """Nearest-neighbor upsampling by 2 and a 3 x 3 convolution (padding 1), computed in one.

    x: (N, C, H, W). weight: (out, C, 3, 3). bias: (out,). Returns (N, out, 2 H, 2 W). An output
    pixel sees only 2 x 2 different input pixels, so a transposed 4 x 4 convolution with summed taps
    gives the same result with 4/9 of the multiplications, and the upsampled image is never written
    to memory.
    """
    taps = upsampling_taps(weight.device, weight.dtype)
    kernel = weight.flatten(2) @ taps  # (out, in, 16)
    kernel = kernel.unflatten(2, (4, 4)).transpose(0, 1)  # (in, out, 4, 4)
    x = x.contiguous(memory_format=torch.channels_last)  # up to three times as fast on a CPU
    return F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)


class UpsampleConv2d(nn.Conv2d):
    """upsample_conv2d as a layer: (N, C, H, W) -> (N, out_channels, 2 H, 2 W)."""

    def forward(self, x):
        return upsample_conv2d(x, self.weight, self.bias)


def normalized_conv2d(x, norm, convolution):
    """The BatchNorm2d `norm` and the Conv2d `convolution` (groups=1) behind it, computed in one.

    x: (N, C, H, W). Returns convolution(norm(x)), channels last. While norm.training is true, the
    statistics are those of the batch and the running ones are updated; norm.num_batches_tracked is
    left alone.

    The norm's weight is multiplied into the convolution's, and its bias becomes the weight of one
    more input channel, which is 1 inside the image and 0 in the padding. For a first layer this
    pays: its input then needs no gradient, and a training step takes 15 % less time on a CPU.
    """
    x = F.batch_norm(
        x,
        norm.running_mean,
        norm.running_var,
        training=norm.training,
        momentum=norm.momentum,
        eps=norm.eps,
    )
    ones = torch.ones_like(x[:, :1])
    x = torch.cat([x, ones], 1)  # (N, C + 1, H, W)
    x = x.contiguous(memory_format=torch.channels_last)

    scale = norm.weight[:, None, None]  # (C, 1, 1)
    shift = norm.bias[:, None, None]  # (C, 1, 1)
    scaled = convolution.weight * scale  # (out, C, kernel, kernel)
    shifted = convolution.weight * shift  # (out, C, kernel, kernel)
    weight = torch.cat([scaled, shifted.sum(1, keepdim=True)], 1)  # (out, C + 1, kernel, kernel)
    return F.conv2d(
        x,
        weight,
        convolution.bias,
        convolution.stride,
        convolution.padding,
        convolution.dilation,
    )


@functools.cache
@torch.inference_mode(False)
def interpolation_matrix(length, size, device):
    """What linear interpolation multiplies a line of `length` values by: float32 (size, length).

    The first and last values stay where they are (align_corners).
    """
    lines = torch.eye(length)[None]  # one for each value
    lines = F.interpolate(lines, size, mode="linear", align_corners=True)  # (1, length, size)
    return lines[0].t().contiguous().to(device)


def enlarge_map(x, size):
    """Bilinear interpolation (align_corners) of maps of one channel, as two products of matrices.

    x: (N, 1, h, w). size: (H, W). Returns (N, 1, H, W) in x's dtype. A GPU takes the derivative of
    F.interpolate with one atomic sum for each large pixel: slow where one small pixel gets many.
    """
    rows = interpolation_matrix(x.shape[2], size[0], x.device)
    columns = interpolation_matrix(x.shape[3], size[1], x.device)
    with without_autocast(x):
        return (rows @ x.float() @ columns.t()).to(x.dtype)


@torch.no_grad()
def power_iteration(network):
    """Improve the estimated singular vectors of every spectral layer; once per training step."""
    with without_autocast(next(network.parameters())):
        for layer in network.modules():
            if not hasattr(layer, "weight_orig"):
                continue
            matrix = layer.weight_orig.flatten(1)  # (out, in * kernel * kernel)
            u = layer.weight_u
            v = layer.weight_v
            new_v = torch.mv(matrix.t(), u)
            v.copy_(F.normalize(new_v, dim=0, eps=1e-4))
            new_u = torch.mv(matrix, v)
            u.copy_(F.normalize(new_u, dim=0, eps=1e-4))


def normalized_weight(layer):
    """A spectral layer's weight_orig divided by its estimated largest singular value u^T W v.

    The vectors are constants to its derivative, which power_iteration must not come before.
    """
    matrix = layer.weight_orig.flatten(1)  # (out, in * kernel * kernel)
    with without_autocast(matrix):
        sigma = torch.dot(layer.weight_u, torch.mv(matrix, layer.weight_v))
    return layer.weight_orig / sigma


def spectral(layer):
    """Give a layer spectral normalization (Miyato et al. 2018) and return it.

    Its state has the names of the published files: weight_orig, weight_u (rows) and weight_v
    (columns). The singular vectors move only when power_iteration is called, and layer.weight is
    for the caller to set to normalized_weight(layer): once for each change of weight_orig.
    """
    weight = layer._parameters.pop("weight")
    layer.register_parameter("weight_orig", weight)

    u = torch.randn(weight.shape[0], device=weight.device)
    layer.register_buffer("weight_u", F.normalize(u, dim=0))
    v = torch.randn(weight[0].numel(), device=weight.device)
    layer.register_buffer("weight_v", F.normalize(v, dim=0))
    return layer


def shuffle_patches(texture, offsets):
    """Shift each texture cyclically by its own offsets, so that no shape can hide in it.

    texture: (N, C, S, S), square. offsets: integers (N, 2), rows and columns; output pixel (y, x)
    is input pixel ((y + rows) mod S, (x + columns) mod S). Returns (N, C, S, S): a window of the
    texture tiled 2 x 2. Source: Sauer & Geiger 2021, appendix B.
    """
    size = texture.shape[2]
    steps = torch.arange(size, device=texture.device)
    rows = (steps + offsets[:, :1]) % size  # (N, S)
    columns = (steps + offsets[:, 1:]) % size  # (N, S)
    row_index = rows[:, None, :, None]
    column_index = columns[:, None, None, :]
    texture = texture.gather(2, row_index.expand(texture.shape))
    return texture.gather(3, column_index.expand(texture.shape))
