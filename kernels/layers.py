"""Layers that give what plain PyTorch gives at a lower cost, without kernels of their own.

Circular padding, upsampling within the convolution behind it, BatchNorm within the convolution
behind it, attention, spectral normalization, and the shuffling of textures. This file needs only
torch and can be copied alone.
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
    if x.device.type == "meta":  # has no autocast
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


class ChannelsLastGradient(torch.autograd.Function):
    """x (N, C, H, W) itself, whose gradient is made channels last.

    On a CPU the derivative of a channels-last operation is slow if its gradient is a slice, such as
    torch.cat gives back, or in another layout, such as InstanceNorm's: that of enlargement takes
    ten times as long, that of a LeakyReLU thirty times.
    """

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.contiguous(memory_format=torch.channels_last)


class InstanceNorm2d(nn.InstanceNorm2d):
    """nn.InstanceNorm2d behind channels-last layers."""

    def forward(self, x):
        return super().forward(ChannelsLastGradient.apply(x))


@functools.cache
@torch.inference_mode(False)
def upsampling_taps(device, dtype):
    """Which of the 3 x 3 taps are summed for each tap of the 4 x 4 kernel: zeros and ones, (16, 9).

    The taps are mirrored, because a transposed convolution walks its kernel the other way round.
    """
    taps = torch.eye(9).view(1, 9, 3, 3).flip(2, 3)
    taps = F.pad(taps, [1, 1, 1, 1])  # (1, 9, 5, 5)
    sums = F.avg_pool2d(taps, 2, stride=1, divisor_override=1)  # (1, 9, 4, 4)
    return sums.view(9, 16).t().contiguous().to(device, dtype)


def upsampling_kernel(weight):
    """The kernel (C, out, 4, 4) of upsample_conv2d, of a weight (out, C, 3, 3).

    It is channels last: convolutions of few pixels and many channels are up to five times as fast
    on a CPU as with a kernel in any other order.
    """
    taps = upsampling_taps(weight.device, weight.dtype)
    weight = weight.permute(1, 2, 3, 0)  # (C, 3, 3, out)
    kernel = taps @ weight.flatten(1, 2)  # (C, 16, out)
    return kernel.unflatten(1, (4, 4)).permute(0, 3, 1, 2)


def pad_borders(x):
    """F.pad(x, [1, 1, 1, 1], mode="circular"), but channels last: (N, C, H + 2, W + 2)."""
    x = x.permute(0, 2, 3, 1)  # (N, H, W, C), which torch.cat leaves in this order
    x = torch.cat([x[:, -1:], x, x[:, :1]], 1)
    x = torch.cat([x[:, :, -1:], x, x[:, :, :1]], 2)
    return x.permute(0, 3, 1, 2)


def fold_borders(x):
    """Add each border of x, 1 wide, where circular padding takes it from: on the other side.

    (N, C, H + 2, W + 2) -> (N, C, H, W). It is what gradients of circular padding go through.
    """
    x = x.clone()
    x[..., 1, :].add_(x[..., -1, :])
    x[..., -2, :].add_(x[..., 0, :])
    x[..., 1].add_(x[..., -1])
    x[..., -2].add_(x[..., 0])
    return x[..., 1:-1, 1:-1].clone()  # what follows is slow if there are gaps between rows


class CircularPad(torch.autograd.Function):
    """pad_borders(x), whose derivative is fold_borders.

    PyTorch's derivative fills a whole image with zeros for each border, and made the training of
    textures take 1.4 times as long on a CPU.
    """

    @staticmethod
    def forward(ctx, x):
        return pad_borders(x)

    @staticmethod
    def backward(ctx, gradient):
        return fold_borders(gradient)


class CircularFold(torch.autograd.Function):
    """fold_borders(x), whose derivative is pad_borders."""

    @staticmethod
    def forward(ctx, x):
        return fold_borders(x)

    @staticmethod
    def backward(ctx, gradient):
        return pad_borders(gradient)


class PaddedConv2d(nn.Conv2d):
    """nn.Conv2d with a kernel of 3 and padding 1, of padding_mode "zeros" or "circular"."""

    def forward(self, x):
        if self.padding_mode == "zeros":
            return super().forward(x)
        return F.conv2d(CircularPad.apply(x), self.weight, self.bias)


def upsample_conv2d(x, kernel, bias=None, padding_mode="zeros"):
    """Nearest-neighbor upsampling by 2 and a 3 x 3 convolution (padding 1), computed in one.

    x: (N, C, H, W). kernel: of upsampling_kernel. bias: (out,). padding_mode: "zeros" or
    "circular", as nn.Conv2d's. Returns (N, out, 2 H, 2 W). An output pixel sees only 2 x 2
    different input pixels, so a transposed 4 x 4 convolution with summed taps gives the same result
    with 4/9 of the multiplications, and the upsampled image is never written to memory.
    """
    x = x.contiguous(memory_format=torch.channels_last)  # up to three times as fast on a CPU
    if padding_mode == "zeros":
        return F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)
    # Uncut, the result has a border that belongs on the other side. Padding x instead would take
    # twice the time on a CPU: there are more pixels, and what they make in vain has to be cut.
    y = CircularFold.apply(F.conv_transpose2d(x, kernel, stride=2))
    return y if bias is None else y + bias[:, None, None]


class UpsampleConv2d(nn.Conv2d):
    """upsample_conv2d as a layer: (N, C, H, W) -> (N, out_channels, 2 H, 2 W)."""

    def forward(self, x):
        kernel = upsampling_kernel(self.weight)
        return upsample_conv2d(x, kernel, self.bias, self.padding_mode)


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


def attention(query, key, value):
    """Means of the values, weighted by softmax(query key^T), unscaled: (N, L, E).

    query: (N, L, D). key: (N, S, D). value: (N, S, E), all of one dtype.
    """
    if query.device.type != "cpu":
        # With a dimension for the one head, a GPU takes its fast path.
        query, key, value = (x[:, None] for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, scale=1.0).squeeze(1)
    # On a CPU, PyTorch turns all of it into float32 if E is not D, and takes three times as long.
    # The logits need it, the product with the values, which has most of the arithmetic, does not.
    dtype = torch.promote_types(query.dtype, torch.float32)
    with without_autocast(query):
        logits = torch.bmm(query.to(dtype), key.to(dtype).transpose(1, 2))  # (N, L, S)
        return torch.bmm(logits.softmax(2).to(value.dtype), value)


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

    layer.register_buffer("weight_u", random_unit_vector(weight.shape[0], weight.device))
    layer.register_buffer("weight_v", random_unit_vector(weight[0].numel(), weight.device))
    return layer


def random_unit_vector(size, device):
    """A vector (size,) of length 1; on the meta device, where arithmetic is slow, its shape."""
    vector = torch.randn(size, device=device)
    return vector if vector.is_meta else F.normalize(vector, dim=0)


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
    texture = ChannelsLastGradient.apply(texture)
    texture = texture.gather(2, row_index.expand(texture.shape))
    return texture.gather(3, column_index.expand(texture.shape))
