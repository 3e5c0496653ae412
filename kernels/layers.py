"""Layers of the generators in forms that cost less: upsampling within a convolution, spectral normalisation, shuffling."""
import functools

import torch
import torch.nn as nn
import torch.nn.functional as F


@functools.cache
@torch.inference_mode(False)
def upsampling_taps(device, dtype):
    """(9, 16): which of the 3 x 3 taps, mirrored, each of UpsampleConv2d's 4 x 4 sums."""
    taps = torch.eye(9).view(1, 9, 3, 3).flip(2, 3)
    return F.avg_pool2d(F.pad(taps, [1] * 4), 2, 1, divisor_override=1).view(9, 16).to(device, dtype)


class UpsampleConv2d(nn.Conv2d):
    """Nearest-neighbour upsampling by 2 and a 3 x 3 convolution (padding 1) in one, on the small image.

    Each output pixel sees only 2 x 2 different inputs, so a transposed 4 x 4 convolution with summed taps gives the
    same with 4/9 of the products, and the upsampled image is never written.
    """

    def forward(self, x):
        kernel = self.weight.flatten(2) @ upsampling_taps(self.weight.device, self.weight.dtype)
        return F.conv_transpose2d(x, kernel.unflatten(2, (4, 4)).transpose(0, 1), self.bias, stride=2, padding=1)


class DivideBySigma(torch.autograd.Function):
    """weight / sigma with sigma = u^T W v, and its derivative in three passes over the weight."""

    @staticmethod
    def forward(ctx, weight, u, v):
        sigma = torch.dot(u, torch.mv(weight.flatten(1), v))
        normal = weight / sigma
        ctx.save_for_backward(normal, u, v, sigma)
        return normal

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        normal, u, v, sigma = ctx.saved_tensors
        share = torch.dot(gradient.flatten(), normal.flatten())
        return torch.addr(gradient.flatten(1), -share * u, v).div_(sigma).view_as(normal), None, None


@torch.no_grad()
def power_iteration(network):
    """Bring each layer's estimate of its singular vectors nearer, once for a training step's forward pass."""
    for layer in network.modules():
        if hasattr(layer, "weight_u"):
            matrix, u, v = layer.weight_orig.flatten(1), layer.weight_u, layer.weight_v
            v.copy_(F.normalize(torch.mv(matrix.t(), u), dim=0, eps=1e-4))
            u.copy_(F.normalize(torch.mv(matrix, v), dim=0, eps=1e-4))


def normalize_weight(layer, inputs=None):
    """Set layer.weight to weight_orig divided by its largest singular value, before each use."""
    layer.weight = DivideBySigma.apply(layer.weight_orig, layer.weight_u.clone(), layer.weight_v.clone())


def spectral(layer):
    """Spectral normalisation (Miyato et al. 2018) with the names of the published files."""
    weight = layer._parameters.pop("weight")
    layer.register_parameter("weight_orig", weight)
    for name, size in (("weight_u", weight.shape[0]), ("weight_v", weight[0].numel())):
        layer.register_buffer(name, F.normalize(torch.randn(size, device=weight.device), dim=0))
    layer.register_forward_pre_hook(normalize_weight)
    return layer


def shuffle_patches(texture, offsets):
    """Move each texture (N, C, H, W) round by its offsets (N, 2), what leaves on one side enters on the other.

    It is a window of the texture tiled 2 x 2, so that no shape can hide in it (appendix B).
    """
    n, channels, height, width = texture.shape
    steps = torch.arange(height, device=texture.device)
    rows = (steps + offsets[:, :1]) % height                                                         # (N, H)
    columns = (steps + offsets[:, 1:]) % width                                                       # (N, W)
    texture = texture.gather(2, rows[:, None, :, None].expand(texture.shape))
    return texture.gather(3, columns[:, None, None, :].expand(texture.shape))
