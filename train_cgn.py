"""Train a Counterfactual Generative Network (Sauer & Geiger, ICLR 2021, section 3).

Three independent mechanisms, shape mask, foreground texture and background, are composed by
x = mask * foreground + (1 - mask) * background, and trained without supervision of any of them.

    python train_cgn.py --dataset colored_mnist --offline --out runs/first     # nothing to download
    python train_cgn.py --dataset wildlife_mnist --textures dtd --out runs/wildlife
    python train_cgn.py --dataset colored_mnist --out runs/colored --resume    # go on after an interruption

The run folder gets args.json, log.jsonl, samples/*.png, checkpoint.pt (everything, to resume) and weights.pt (the
generator alone, for generate.py).
"""
import argparse
import contextlib
import functools
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

from data.checkpoints import FROZEN, finite_step, leave_out, restore_training, save_training, step_seed
from data.frozen import STYLE_CONVOLUTIONS, U2Net, VGG16Features, fold, random_networks
from data.mnist import SIZE, VARIANTS, load_variant, to_float
from data.runs import (DOWNLOADS, ROOT, Log, StopSignal, UserError, any_rank, claim_folder, describe_run, fraction,
                       join_ranks, load_tensors, mean_over_ranks, non_negative_float, non_negative_int, pick_bf16,
                       pick_device, positive_int, rank_and_ranks, refuse_group, run_main, save_png, truncation)
from data.sheets import imagenet_sheet, sample_sheet
from data.weights import bare_names, check_state_dict, load_network, load_vgg16_features, random_vgg16_features
from kernels import (UpsampleConv2d, composite_losses_and_copy, normalize_weight, power_iteration, sample_patch_images,
                     shuffle_patches, spectral, style_loss, use_triton)

# The published settings, except for what the README lists as different. A flag given on the command line wins.
PRESETS = {
    "colored_mnist": dict(init="orthogonal", init_gain=0.1, binary_weight=0.1, style_weights=[0.05, 0.1, 0.0, 0.0]),
    "double_colored_mnist": dict(init="orthogonal", init_gain=0.2, binary_weight=0.3, border_weight=20.0,
                                 style_weights=[0.0, 0.05, 0.0, 0.05]),
    "wildlife_mnist": dict(init="normal", init_gain=0.03, binary_weight=0.3, style_weights=[0.01, 0.05, 0.0, 0.01]),
    "imagenet": dict(binary_weight=300.0, style_weights=[4.0, 4.0, 4.0, 4.0], max_steps=300, ema=0.95, log_every=1,
                     sample_every=10, save_every=10, batch_size=16, accumulate=250),
    "imagenet small": dict(max_steps=400, ema=0.98, log_every=20, sample_every=100, save_every=100, batch_size=8,
                           accumulate=1, lr_shape=3e-4, lr_texture=1e-3, lr_background=1e-3,
                           style_weights=[1.0, 1.0, 1.0, 1.0], texture_weights=[0.0, 1.5, 1.5, 0.0]),
}
# Arguments that a resumed run may change.
FREE = {"epochs", "max_steps", "log_every", "sample_every", "save_every", "bad_steps", "out", "resume", "device",
        "kernels", "weights", "data_dir", "weights_dir", "biggan", "u2net", "recompute", "compile"}
# --preset small of ImageNet: 64 x 64, a hundredth of the weights, and the small U^2-Net; data/scenes.py made its cGAN.
STAND_INS = ROOT / "data" / "pretrained" / "small_imagenet.pt"
SMALL = dict(output_dim=64, z_dim=32, class_embed_dim=32, channel_width=8, attention_layer_position=4,
             layers=((True, 16, 16), (False, 16, 16), (True, 16, 8), (True, 8, 8), (False, 8, 8), (True, 8, 4)))
CLASSES = 10
LATENT = 32                                                # numbers in z, for each mechanism
EMBEDDING = 10                                             # numbers in a class's embedding


# ---------------------------------------------------------------------------------------------------------------------
# Networks


# Both mechanisms keep the numbering of the published state dicts, where the upsampling is a layer of its own.


def texture_mechanism(ngf):
    """z and class -> texture in [-1, 1]: (N, 42) -> (N, 3, 32, 32)."""
    return nn.Sequential(
        nn.Linear(LATENT + EMBEDDING, 2 * ngf * 8 * 8), nn.Unflatten(1, (2 * ngf, 8, 8)),
        nn.Identity(), UpsampleConv2d(2 * ngf, 2 * ngf, 3, padding=1, bias=False),                   # 16 x 16
        nn.BatchNorm2d(2 * ngf), nn.LeakyReLU(0.2),
        nn.Identity(), UpsampleConv2d(2 * ngf, ngf, 3, padding=1, bias=False),                       # 32 x 32
        nn.BatchNorm2d(ngf), nn.LeakyReLU(0.2),
        nn.Conv2d(ngf, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh())


def shape_mechanism(ngf):
    """z and class -> mask before clamping: (N, 42) -> (N, 1, 32, 32), mean 0 and variance 1 per image."""
    return nn.Sequential(
        nn.Linear(LATENT + EMBEDDING, 2 * ngf * 8 * 8), nn.Unflatten(1, (2 * ngf, 8, 8)), nn.InstanceNorm2d(2 * ngf),
        nn.Identity(), UpsampleConv2d(2 * ngf, ngf, 3, padding=1, bias=False),                       # 16 x 16
        nn.BatchNorm2d(ngf), nn.LeakyReLU(0.2), nn.InstanceNorm2d(ngf),
        nn.Identity(), UpsampleConv2d(ngf, 1, 3, padding=1, bias=False),                             # 32 x 32
        nn.BatchNorm2d(1), nn.LeakyReLU(0.2), nn.InstanceNorm2d(1))


class MnistCGN(nn.Module):
    """The three mechanisms at 32 x 32. Keys and shapes are those of the published state dicts."""

    def __init__(self, ngf=32, init="orthogonal", init_gain=0.1, init_shape="orthogonal"):
        super().__init__()
        self.label_emb = nn.Embedding(CLASSES, EMBEDDING)
        self.f_shape = shape_mechanism(ngf)
        self.f_text1 = texture_mechanism(ngf)              # foreground
        self.f_text2 = texture_mechanism(ngf)              # background
        initialize(self, init, init_gain)
        if init_shape != init:
            initialize(self.f_shape, init_shape, init_gain)

    def inputs(self, z, y):
        """z: (N, 32); y: classes (N,), or rows of the embedding (N, 10) to go between classes. Returns (N, 42)."""
        return torch.cat([z, y if y.is_floating_point() else self.label_emb(y)], 1)

    def mask(self, z, y):
        """(N, 1, 32, 32) in [0.0001, 0.9999]."""
        # No sigmoid, as published: the last InstanceNorm spreads the mask, and the clamp cuts it.
        return self.f_shape(self.inputs(z, y)).float().clamp(1e-4, 1 - 1e-4)

    def foreground(self, z, y):
        """(N, 3, 32, 32) in [-1, 1], before shuffling."""
        return self.f_text1(self.inputs(z, y)).float()

    def background(self, z, y):
        """(N, 3, 32, 32) in [-1, 1], before shuffling."""
        return self.f_text2(self.inputs(z, y)).float()

    def forward(self, z, y):
        """Mask, foreground and background of one latent and one class, as in training."""
        return self.mask(z, y), self.foreground(z, y), self.background(z, y)


class LinearDiscriminator(nn.Module):
    """Image and class -> realness, (N, 1)."""

    def __init__(self, ndf):
        super().__init__()
        self.label_embedding = nn.Embedding(CLASSES, EMBEDDING)
        self.model = nn.Sequential(
            nn.Linear(3 * SIZE * SIZE + EMBEDDING, ndf), nn.LeakyReLU(0.2),
            nn.Linear(ndf, ndf), nn.Dropout(0.4), nn.LeakyReLU(0.2),
            nn.Linear(ndf, ndf), nn.Dropout(0.4), nn.LeakyReLU(0.2), nn.Linear(ndf, 1))

    def forward(self, x, y):
        return self.model(torch.cat([x.flatten(1), self.label_embedding(y)], 1))


class ConvDiscriminator(nn.Module):
    """Image and class -> realness, (N, 1). The class enters as a fourth channel of one value."""

    def __init__(self, ndf):
        super().__init__()
        self.label_embedding = nn.Embedding(CLASSES, 1)
        widths = [(4, ndf, 3, 1), (ndf, 2 * ndf, 3, 1), (2 * ndf, 4 * ndf, 4, 2), (4 * ndf, 4 * ndf, 4, 2)]
        layers = []
        for inputs, outputs, kernel, stride in widths:
            layers += [nn.Conv2d(inputs, outputs, kernel, stride, bias=False), nn.BatchNorm2d(outputs),
                       nn.LeakyReLU(0.2)]                                                            # 30, 28, 13, 5
        self.model = nn.Sequential(*layers, nn.AvgPool2d(3), nn.Conv2d(4 * ndf, 1, 1, bias=False))
        initialize(self, "normal", 0.02)

    def forward(self, x, y):
        classes = self.label_embedding(y)[:, :, None, None].expand(-1, 1, SIZE, SIZE)
        return self.model(torch.cat([x, classes], 1)).flatten(1)


class StridedDiscriminator(nn.Module):
    """Image and class -> realness, (N, 1): strided convolutions without norms, an output for each class. A tenth of
    ConvDiscriminator's arithmetic; for the logistic loss with --r1."""

    def __init__(self, ndf):
        super().__init__()
        widths, layers = (3, ndf, 2 * ndf, 4 * ndf), []
        for inputs, outputs in zip(widths, widths[1:]):
            layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.LeakyReLU(0.2)]                       # 16, 8, 4
        self.model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * ndf, 256), nn.LeakyReLU(0.2),
                                   nn.Linear(256, CLASSES))

    def forward(self, x, y):
        return self.model(x).gather(1, y[:, None])


def initialize(network, init, gain):
    """Weights of convolutions and linear layers by `init`, BatchNorm weights N(1, gain), biases 0."""
    draw = {"normal": lambda w: nn.init.normal_(w, 0.0, gain), "xavier": lambda w: nn.init.xavier_normal_(w, gain),
            "kaiming": nn.init.kaiming_normal_, "orthogonal": lambda w: nn.init.orthogonal_(w, gain)}[init]
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            draw(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, gain)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------------------------------------------------
# Networks for ImageNet. Attributes have the names of the published state dicts.


class ConditionalNorm(nn.Module):
    """Normalise by stored statistics, scale and shift by the condition, ReLU. Batch statistics are never used.

    The tables have a row for truncation 0, 0.02, ..., 1. Without a condition, weight and bias are learnt directly.
    """

    def __init__(self, channels, condition):
        super().__init__()
        if not condition:
            self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_means", torch.zeros(51, channels))
        self.register_buffer("running_vars", torch.ones(51, channels))
        if condition:
            self.scale = spectral(nn.Linear(condition, channels, bias=False))
            self.offset = spectral(nn.Linear(condition, channels, bias=False))

    def statistics(self, truncation):
        """Mean and 1 / standard deviation of each channel, (C,), between the two nearest rows.

        Published code gives the two rows each other's weights, and takes a wrong row where truncation / 0.02 is not
        exact in floating point, as at 0.14. On the grid, as at 0.5 and 1, both agree.
        """
        row = min(int(truncation * 50), 49)
        mean, variance = (torch.lerp(table[row], table[row + 1], truncation * 50 - row)
                          for table in (self.running_means, self.running_vars))
        return mean, (variance + 1e-4).rsqrt()

    def forward(self, x, condition, truncation):
        """x: (N, C, H, W). condition: (N, condition). One product and sum per element, then the ReLU."""
        if hasattr(self, "folded"):
            gain, shift = self.folded(condition).chunk(2, 1)
        else:
            mean, scale = self.statistics(truncation)
            gain = scale * (1 + self.scale(condition) if hasattr(self, "scale") else self.weight[None])
            shift = (self.offset(condition) if hasattr(self, "offset") else self.bias[None]) - mean * gain
        return torch.addcmul(shift[..., None, None].to(x.dtype), x, gain[..., None, None].to(x.dtype)).relu_()

    def fold(self, truncation):
        """Gain and shift become one linear layer of the condition, for this truncation only."""
        mean, scale = self.statistics(truncation)
        if hasattr(self, "scale"):
            weight, gain, shift = scale[:, None] * self.scale.weight, scale, -mean * scale
            weight = torch.cat([weight, self.offset.weight - mean[:, None] * weight])
            del self.scale, self.offset
        else:                                              # the last norm does not see the condition
            weight, gain = mean.new_zeros(2 * len(mean), 0), scale * self.weight
            shift = self.bias - mean * gain
        self.folded = nn.Linear(1, 1)                      # its size comes with the weights
        self.folded.weight, self.folded.bias = nn.Parameter(weight), nn.Parameter(torch.cat([gain, shift]))
        self.running_means = self.running_vars = None


class GenBlock(nn.Module):
    """BigGAN-deep's residual block with a bottleneck: (N, inputs, H, W) -> (N, outputs, H or 2 H, W or 2 W)."""

    def __init__(self, inputs, outputs, condition, up):
        super().__init__()
        middle, self.outputs, self.up = inputs // 4, outputs, up
        for k, (a, b, size) in enumerate([(inputs, middle, 1), (middle, middle, 3), (middle, middle, 3),
                                          (middle, outputs, 1)]):
            form = UpsampleConv2d if up and k == 1 else nn.Conv2d
            self.add_module(f"bn_{k}", ConditionalNorm(a, condition))
            self.add_module(f"conv_{k}", spectral(form(a, b, size, padding=size // 2)))

    def forward(self, x, condition, truncation):
        h = x
        for k in range(4):
            h = getattr(self, f"conv_{k}")(getattr(self, f"bn_{k}")(h, condition, truncation))
        x = x[:, :self.outputs]                            # the second half is dropped where they become fewer
        return h + (F.interpolate(x, scale_factor=2) if self.up else x)


class SelfAttention(nn.Module):
    """Each position looks at all positions of the half-sized image (Zhang et al. 2019, as in BigGAN)."""

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))
        for name, a, b in (("theta", channels, channels // 8), ("phi", channels, channels // 8),
                           ("g", channels, channels // 2), ("o_conv", channels // 2, channels)):
            self.add_module(f"snconv1x1_{name}", spectral(nn.Conv2d(a, b, 1, bias=False)))

    def forward(self, x, condition, truncation):
        query, key, value = self.snconv1x1_theta(x), self.snconv1x1_phi(x), self.snconv1x1_g(x)
        key, value = F.max_pool2d(key, 2), F.max_pool2d(value, 2)
        query, key, value = (t.flatten(2).transpose(1, 2) for t in (query, key, value))                # (N, H W, C)
        seen = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        seen = seen.transpose(1, 2).unflatten(2, x.shape[2:])
        return torch.addcmul(x, self.gamma.to(x.dtype), self.snconv1x1_o_conv(seen))


class BigGAN(nn.Module):
    """The generator of BigGAN-deep (Brock et al. 2019). Without arguments, the one for 256 x 256.

    layers: (doubles the size, inputs, outputs) of each block, in units of channel_width. Self-attention comes before
    the block at attention_layer_position.
    """
    LAYERS = ((False, 16, 16), (True, 16, 16), (False, 16, 16), (True, 16, 8), (False, 8, 8), (True, 8, 8),
              (False, 8, 8), (True, 8, 4), (False, 4, 4), (True, 4, 2), (False, 2, 2), (True, 2, 1))

    def __init__(self, output_dim=256, z_dim=128, class_embed_dim=128, channel_width=128, num_classes=1000,
                 layers=LAYERS, attention_layer_position=8):
        super().__init__()
        assert 4 * 2 ** sum(up for up, _, _ in layers) == output_dim, "blocks that double the size make it output_dim"
        self.z_dim, condition = z_dim, z_dim + class_embed_dim
        self.recompute = False                             # blocks keep no activations for their derivative
        self.embeddings = nn.Linear(num_classes, class_embed_dim, bias=False)
        self.generator = generator = nn.Module()
        generator.gen_z = spectral(nn.Linear(condition, 4 * 4 * layers[0][1] * channel_width))
        generator.layers = nn.ModuleList()
        for position, (up, inputs, outputs) in enumerate(layers):
            if position == attention_layer_position:
                generator.layers.append(SelfAttention(inputs * channel_width))
            generator.layers.append(GenBlock(inputs * channel_width, outputs * channel_width, condition, up))
        generator.bn = ConditionalNorm(layers[-1][2] * channel_width, 0)
        generator.conv_to_rgb = spectral(nn.Conv2d(layers[-1][2] * channel_width, layers[-1][2] * channel_width, 3,
                                                   padding=1))

    def class_vectors(self, y):
        """y: classes (N,). Returns their embeddings (N, class_embed_dim), which can be mixed to go between classes."""
        return F.embedding(y, self.embeddings.weight.t())

    def forward(self, z, y, truncation):
        """z: (N, z_dim), truncated normal times truncation. y: classes (N,), or class vectors. (N, 3, H, W) in [-1, 1].

        truncation: in (0, 1], chooses the statistics. Activations are channels last, as the first layer makes them.
        """
        generator, recompute = self.generator, self.recompute and torch.is_grad_enabled()
        if self.training:
            power_iteration(self)
        condition = torch.cat([z, y if y.is_floating_point() else self.class_vectors(y)], 1)
        h = generator.gen_z(condition).unflatten(1, (4, 4, -1)).permute(0, 3, 1, 2)
        for layer in generator.layers:
            inputs = h, condition, truncation
            h = torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)
        h = generator.bn(h, condition[:, :0], truncation)
        rgb = generator.conv_to_rgb
        if hasattr(rgb, "weight_orig"):
            normalize_weight(rgb)                          # not called: only 3 of its outputs are computed
        return F.conv2d(h, rgb.weight[:3], rgb.bias[:3], padding=1).float().tanh()


class ImageNetCGN(nn.Module):
    """A frozen BigGAN as the source of targets, three trainable ones as mechanisms, and a frozen U^2-Net for masks."""

    def __init__(self, small_u2net=False, cgan=True, **config):
        super().__init__()
        if cgan:                                           # needed in training alone
            self.biggan_GT = BigGAN(**config).requires_grad_(False)
        self.f_shape, self.f_text, self.f_bg = (BigGAN(**config) for _ in range(3))
        self.u2net = U2Net(small_u2net).requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        for frozen in self.children():                     # no power iterations, no batch statistics
            frozen.train(mode and any(p.requires_grad for p in frozen.parameters()))
        return self

    def forward(self, z, y, truncation):
        """z: (N, z_dim). y: classes (N, 3) of shape, texture and background.

        Returns premask, mask (N, 1, H, W), foreground, background, and the saliency of the background (N, 1, H, W).
        """
        mechanisms = (self.f_shape, self.f_text, self.f_bg)
        premask, foreground, background = (f(z, c, truncation) for f, c in zip(mechanisms, y.unbind(1)))
        masks, saliency = self.u2net(torch.cat([premask, background])).chunk(2)
        return premask, masks.clamp(1e-4, 1 - 1e-4), foreground, background, saliency


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def perceptual_loss(vgg, image, target, weights, backend="auto"):
    """Style loss of image against target, (N, 3, H, W) in [-1, 1]: sum over layers of 5000 w^2 mean|G - G_target|."""
    with torch.no_grad():
        target_features = vgg(target)
    layers = zip(vgg(image), target_features, weights)
    return sum(5000 * w ** 2 * style_loss(features, target, backend=backend) for features, target, w in layers if w)


# Not in the paper. Its losses leave open which of the two textures is the foreground, and masks of some classes end
# inverted. Objects seldom touch the border, and the two losses below settle it with that.


def frame_pixels(image, width=3):
    """The outer `width` pixels of (N, C, H, W): (N, C, number of pixels)."""
    sides = image[..., width:-width, :width], image[..., width:-width, -width:]
    return torch.cat([part.flatten(2) for part in (image[..., :width, :], image[..., -width:, :], *sides)], 2)


def border_loss(mask):
    """Mean mask value in the frame: objects do not reach it."""
    return frame_pixels(mask).mean()


def frame_loss(background, x_gt):
    """The frame of a real image shows its background: mean and spread of each colour channel should agree.

    background, x_gt: (N, 3, H, W). Per image: of one class if --labels is batch. Squared, because BatchNorm keeps the
    variance over a batch: an absolute difference is smallest with nine classes right and the tenth far off.
    """
    real, fake = frame_pixels(x_gt), background.flatten(2)
    spread = [(pixels.var(2) + 1e-4).sqrt() for pixels in (real, fake)]    # a flat background has a gradient, too
    return (real.mean(2) - fake.mean(2)).square().mean() + (spread[0] - spread[1]).square().mean()


def adversarial_loss(args, realness, target):
    """Realness (N, 1) to target, 1 or 0: least squares (Mao et al. 2017), or logistic (Goodfellow et al. 2014)."""
    loss = F.mse_loss if args.adversarial == "squares" else F.binary_cross_entropy_with_logits
    return loss(realness, torch.full_like(realness, target))


def generator_losses(args, vgg, discriminator, mechanisms, x_gt, y_gen, step):
    """Weighted losses by name, the composite, and the mean mask value. In warm-up, only what settles the background.

    The style loss, which takes most of the time, counts --style-every times as much in one of so many steps.
    """
    mask, foreground, background = mechanisms
    warmup = step < args.warmup
    style, losses = vgg is not None and not warmup and step % args.style_every == 0, {}
    copy_dtype = vgg.convolutions[0].weight.dtype if style else None       # the composite as VGG wants it
    composed, copy = composite_losses_and_copy(mask, foreground, background, copy_dtype=copy_dtype,
                                               backend=args.kernels)
    if not warmup:
        losses["adversarial"] = adversarial_loss(args, discriminator(composed.composite, y_gen), 1)
        losses["binary"] = args.binary_weight * composed.binary
    if style:
        losses["style"] = args.style_every * perceptual_loss(vgg, copy, x_gt, args.style_weights, args.kernels)
    if args.border_weight:
        losses["border"] = args.border_weight * border_loss(mask)
    if args.frame_weight:
        losses["frame"] = args.frame_weight * frame_loss(background, x_gt)
    return losses, composed.composite, composed.mask_mean.mean()


def imagenet_losses(args, vgg, outputs, x_gt, generator):
    """Weighted losses by name (section 3.2 and appendix), and the mean mask value of each image.

    outputs: of ImageNetCGN. x_gt: the cGAN's images (N, 3, H, W) of the same latents and classes.
    """
    _, mask, foreground, background, saliency = outputs
    composed, copy = composite_losses_and_copy(mask, foreground, background, x_gt, backend=args.kernels,
                                               copy_dtype=vgg.convolutions[0].weight.dtype if vgg else None)
    losses = {"reconstruction": args.reconstruction_weight * composed.l1,
              "binary": args.binary_weight * composed.binary,
              "mask": args.mask_weight * composed.mask_interval, "background": args.background_weight * saliency.mean()}
    if any(args.style_weights):
        losses["style"] = perceptual_loss(vgg, copy, x_gt, args.style_weights, args.kernels)
    if any(args.texture_weights):
        patches = sample_patch_images(x_gt, mask.detach(), generator=generator, backend=args.kernels)
        losses["texture"] = perceptual_loss(vgg, foreground, patches, args.texture_weights, args.kernels)
    return losses, composed.mask_mean.detach()


def discriminator_loss(args, discriminator, x_gt, y_gt, x_gen, y_gen, step):
    """Real images to 1, generated ones to 0; and --r1 times half the squared gradient at real images (Mescheder et al.
    2018), in every 8th step, 8-fold."""
    penalize = args.r1 > 0 and step % 8 == 0
    x_gt = x_gt.requires_grad_(penalize)
    if isinstance(discriminator, ConvDiscriminator):       # batch statistics of each kind
        real, fake = discriminator(x_gt, y_gt), discriminator(x_gen, y_gen)
    else:                                                  # one pass gives the same, for half
        real, fake = discriminator(torch.cat([x_gt, x_gen]), torch.cat([y_gt, y_gen])).chunk(2)
    loss = (adversarial_loss(args, real, 1) + adversarial_loss(args, fake, 0)) / 2
    if penalize:
        gradient, = torch.autograd.grad(real.sum(), x_gt, create_graph=True)
        loss = loss + 8 * args.r1 / 2 * gradient.square().sum((1, 2, 3)).mean()
    return loss


# ---------------------------------------------------------------------------------------------------------------------
# Weights and averages


def load_generator(path, *, raw=False):
    """A generator from our weights.pt or checkpoint, or a published state dict: (MnistCGN in eval mode, arguments).

    raw: the trained weights themselves instead of their moving average. Arguments are {} for a published file.
    Raises UserError for a file that is missing, damaged or of another network.
    """
    content = load_tensors(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not the weights of a generator")
    state = content.get("generator" if raw else "average", content)
    cgn = MnistCGN()
    cgn.load_state_dict(check_state_dict(state, cgn.state_dict(), path))
    args = content.get("args", {})
    return cgn.eval(), args if isinstance(args, dict) else {}


def load_imagenet_generator(path, raw=False):
    """The mechanisms and U^2-Net from our weights.pt or the published cgn.pth, as ImageNetCGN in eval mode, and args.

    The frozen cGAN is left out. Raises UserError for a file that is missing, damaged or of another network.
    """
    content = load_tensors(path)
    args = content.get("args") if isinstance(content, dict) else None
    args = args if isinstance(args, dict) else {}
    small = args.get("preset") == "small"
    state = bare_names(content.get("average", content) if isinstance(content, dict) else content, path)
    if raw and "generator" in content:
        state |= bare_names(content["generator"], path)
    with torch.device("meta"):
        cgn = ImageNetCGN(small, cgan=False, **(SMALL if small else {}))
    state = {name: value for name, value in state.items() if not name.startswith("biggan_GT.")}
    state = check_state_dict(state, cgn.state_dict(), path)
    cgn.load_state_dict({name: value.float() if value.is_floating_point() else value for name, value in state.items()},
                        assign=True)
    return cgn.eval(), args


@torch.no_grad()
def update_average(average, network, decay):
    """Exponential moving average of all weights and BatchNorm statistics; singular vectors are taken over."""
    new, vectors = network.state_dict(), ("weight_u", "weight_v")
    pairs = [(a, new[key], key.endswith(vectors)) for key, a in average.state_dict().items()
             if a.is_floating_point() and not key.startswith(FROZEN)]
    torch._foreach_lerp_([a for a, _, v in pairs if not v], [b for _, b, v in pairs if not v], 1 - decay)
    if any(v for *_, v in pairs):
        torch._foreach_copy_([a for a, _, v in pairs if v], [b for _, b, v in pairs if v])


# ---------------------------------------------------------------------------------------------------------------------
# Training


def truncated_normal(shape, generator):
    """Standard normal on [-2, 2]: what lies outside is drawn again, by inversion of the distribution."""
    low = 0.5 * (1 + math.erf(-2 / math.sqrt(2)))
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return torch.special.ndtri(low + (1 - 2 * low) * uniform).float()


def load_imagenet_networks(args, config, small):
    """ImageNetCGN on the CPU, its four BigGANs alike, and a copy without the cGAN for the moving average."""
    if args.weights:
        given, trained = load_imagenet_generator(args.weights)
        if (trained.get("preset") == "small") != small:
            raise UserError(f"--weights {args.weights}: of another --preset")
    with torch.device("meta"):
        cgn, average = ImageNetCGN(small, **config), ImageNetCGN(small, cgan=False, **config)
    states = {}
    if small:
        states = load_tensors(STAND_INS)
    elif args.offline:
        states["biggan"], states["u2net"] = random_networks(functools.partial(BigGAN, **config), small, seed=1)
    for name, file, path, want in (("biggan", "biggan", args.biggan, cgn.f_shape),
                                   ("u2net", "u2netp" if small else "u2net", args.u2net, cgn.u2net)):
        if path or not (args.offline or small and name == "biggan"):
            states[name] = load_network(file, args.weights_dir, path, want.state_dict())
    for network in (cgn, average):
        network.load_state_dict({
            f"{name}.{key}": value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)
            for name, part in network.named_children()
            for key, value in states["u2net" if name == "u2net" else "biggan"].items()}, assign=True)
    if args.weights:
        cgn.load_state_dict(given.state_dict(), strict=False)                 # all but the cGAN
    return cgn, given if args.weights else average


def epoch_order(count, seed, epoch, device):
    """The permutation of the training images in this epoch."""
    generator = torch.Generator().manual_seed(step_seed(seed, epoch) ^ 0x5eed)
    return torch.randperm(count, generator=generator).to(device)


def load_vgg(args, device, bf16, weights):
    """The frozen VGG-16 down to the last layer that has a weight; None if none has."""
    depth = max([n for n, w in zip(STYLE_CONVOLUTIONS, weights) if w], default=0)
    if not depth:
        return None
    state = random_vgg16_features(depth) if args.offline else load_vgg16_features(args.weights_dir, depth)
    return VGG16Features(state).to(device, torch.bfloat16 if bf16 else torch.float32)


def generator_groups(cgn, args):
    """Parameter groups for Adam: BatchNorm's weights and biases apart, with their own learning rate.

    A texture's colour is the tanh of a BatchNorm's output, and black is a bias near -2: at 2e-4 a step, 10,000 steps
    away.
    """
    norms = [p for module in cgn.modules() if isinstance(module, nn.BatchNorm2d) for p in module.parameters()]
    others = [p for p in cgn.parameters() if not any(p is norm for norm in norms)]
    return [{"params": others, "lr": args.lr}, {"params": norms, "lr": args.norm_lr}]


def prepare_mnist(args, device, bf16):
    """Networks by name, their optimizers, a function for sheets, and one that makes step n.

    It returns the losses by name, and whether one or a gradient was not finite, and the update left out.
    """
    data, _ = load_variant(args.dataset, args.data_dir, textures=args.textures, offline=args.offline, seed=args.seed,
                           device=device)
    vgg = load_vgg(args, device, bf16, args.style_weights)
    cgn = (load_generator(args.weights)[0].train() if args.weights
           else MnistCGN(32, args.init, args.init_gain, args.init_shape))
    average = MnistCGN().requires_grad_(False)
    average.load_state_dict(cgn.state_dict())
    cgn, average = cgn.to(device), average.to(device)
    discriminator = {"linear": LinearDiscriminator, "conv": ConvDiscriminator,
                     "strided": StridedDiscriminator}[args.discriminator](args.ndf).to(device)
    optimizers = [torch.optim.Adam(groups, betas=(0.5, 0.999), fused=True) for groups in (
        generator_groups(cgn, args), [{"params": list(discriminator.parameters()), "lr": args.lr}])]
    per_epoch = len(data) // args.batch_size
    if not per_epoch:
        raise UserError(f"--batch-size {args.batch_size}: larger than the {len(data)} training images")
    args.last_step = last = args.max_steps or args.epochs * per_epoch
    order = functools.lru_cache(1)(lambda epoch: epoch_order(len(data), args.seed, epoch, device))

    def make_step(step):
        torch.manual_seed(step_seed(args.seed, step))
        index = order(step // per_epoch)[step % per_epoch * args.batch_size:][:args.batch_size]
        x_gt, y_gt = to_float(data.images(index, None)), data.labels[index]
        y_gen = y_gt if args.labels == "batch" else torch.randint(CLASSES, (args.batch_size,), device=device)
        z = torch.randn(args.batch_size, LATENT, device=device)
        offsets = torch.randint(SIZE, (2, args.batch_size, 2), device=device)

        warmup = step < args.warmup
        falling = min(1.0, (last - step) / max(args.decay * last, 1))
        for optimizer, rates in zip(optimizers, ((0.0 if warmup else args.lr, args.norm_lr), (args.lr,))):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = falling * rate
        discriminator.requires_grad_(False)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            mask, *textures = cgn(z, y_gen)
        textures = [shuffle_patches(texture, offset) for texture, offset in zip(textures, offsets)]
        losses, x_gen, mask_mean = generator_losses(args, vgg, discriminator, (mask, *textures), x_gt, y_gen, step)
        optimizers[0].zero_grad(set_to_none=True)
        total = sum(losses.values())
        total.backward()
        bad = finite_step(optimizers[0], total)

        if not warmup:
            discriminator.requires_grad_(True)
            losses["discriminator"] = discriminator_loss(args, discriminator, x_gt, y_gt, x_gen.detach(), y_gen, step)
            optimizers[1].zero_grad(set_to_none=True)
            losses["discriminator"].backward()
            bad = bad + finite_step(optimizers[1], losses["discriminator"])
        return losses | {"mask": mask_mean}, bad

    parts = {"generator": cgn, "average": average, "discriminator": discriminator}
    return parts, optimizers, make_step, lambda: sample_sheet(average.eval())


def prepare_imagenet(args, device, bf16):
    """As prepare_mnist. A step is one update: args.accumulate batches on each rank, the mean of their gradients."""
    config, small = (SMALL, True) if args.preset == "small" else ({}, False)
    dtype, (rank, ranks) = torch.bfloat16 if bf16 else torch.float32, rank_and_ranks()
    vgg = load_vgg(args, device, bf16, [max(pair) for pair in zip(args.style_weights, args.texture_weights)])
    cgn, average = load_imagenet_networks(args, config, small)
    for frozen in (cgn.biggan_GT, cgn.u2net):              # the average's U^2-Net stays as published, to be saved
        fold(frozen.eval(), args.truncation).to(dtype)
    cgn, average = cgn.to(device).train(), average.to(device).requires_grad_(False).eval()
    rates = {cgn.f_shape: args.lr_shape, cgn.f_text: args.lr_texture, cgn.f_bg: args.lr_background}
    optimizers = [torch.optim.Adam([{"params": list(f.parameters()), "lr": lr} for f, lr in rates.items()], fused=True)]
    for mechanism in rates:
        mechanism.recompute = args.recompute
        if args.compile:
            mechanism.compile()
    model = torch.nn.parallel.DistributedDataParallel(cgn, broadcast_buffers=False) if ranks > 1 else cgn
    args.last_step, classes = args.max_steps, cgn.f_shape.embeddings.in_features

    def make_step(step):
        optimizers[0].zero_grad(set_to_none=True)
        totals = {}
        for part in range(args.accumulate):
            # Drawn for all ranks together, on the CPU: the same images whatever the number of ranks.
            generator = torch.Generator().manual_seed(step_seed(args.seed, step * args.accumulate + part))
            total = args.batch_size * ranks
            z = args.truncation * truncated_normal((total, cgn.f_shape.z_dim), generator)
            y = torch.randint(classes, (total,), generator=generator)
            z, y = (t.chunk(ranks)[rank].to(device) for t in (z, y))
            torch.randint(100, (rank * args.batch_size, 36), generator=generator)       # the patches of ranks before
            last = part + 1 == args.accumulate
            with contextlib.nullcontext() if last or ranks == 1 else model.no_sync(), \
                    torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                with torch.no_grad():
                    x_gt = cgn.biggan_GT(z.to(dtype), y, args.truncation)
                outputs = model(z, y[:, None].expand(-1, 3), args.truncation)
                with torch.autocast(device.type, enabled=False):
                    losses, mask_mean = imagenet_losses(args, vgg, outputs, x_gt, generator)
                    (sum(losses.values()) / args.accumulate).backward()
            losses |= {"mask_mean": mask_mean.mean(), "mask_spread": mask_mean.std(correction=0)}
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value.detach() / args.accumulate
        return totals, finite_step(optimizers[0], sum(totals.values()))

    def make_sheet():
        y = torch.linspace(0, classes - 1, 6).long()
        z = args.truncation * truncated_normal((6, cgn.f_shape.z_dim), torch.Generator().manual_seed(0))
        return imagenet_sheet(average, cgn.biggan_GT, z.to(device), y.to(device), args.truncation)

    parts = {"generator": cgn, "average": average}
    return parts, optimizers, make_step, make_sheet


def train(args, out, device):
    """The loop: steps, log, sheets, checkpoints; rank 0 writes. Returns whether it was not stopped: another may follow."""
    torch.manual_seed(args.seed)
    bf16, (rank, ranks) = pick_bf16(args.amp, device), rank_and_ranks()
    prepare = prepare_imagenet if args.dataset == "imagenet" else prepare_mnist
    parts, optimizers, make_step, make_sheet = prepare(args, device, bf16)
    last = args.__dict__.pop("last_step")
    start = restore_training(out, args, parts, optimizers, FREE).get("step", 0)
    stop, totals, bad_steps, log = StopSignal(), {}, 0, None
    if rank == 0:
        describe_run(out, __file__, args)
        log = Log(out / "log.jsonl", start)
        print(f"{args.dataset} on {ranks} x {device}, {'bf16' if bf16 else 'float32'}, steps {start} to {last}")

    for step in range(start, last):
        losses, bad = make_step(step)
        done, stopping, bad_steps = step + 1, any_rank(stop, device), bad_steps + 1 if bad else 0
        if bad_steps:
            leave_out(done, losses, bad_steps, args, parts.values(), log)
        else:
            update_average(parts["average"], parts["generator"], min(args.ema, done / (9 + done)))
            for name, value in losses.items():
                totals.setdefault(name, []).append(value.detach())
        if done % args.log_every == 0 or done == last:
            means = {name: mean_over_ranks(torch.stack(values).mean()).item() for name, values in totals.items()}
            totals = {}
            if rank == 0:
                log.write(step=done, **means)
                log.progress(done, last, means)
                mask_mean = means.get("mask_mean", means.get("mask", 0.5))
                if not 0.02 < mask_mean < 0.98:
                    print(f"warning: the mean mask is {mask_mean:.3f}: it has collapsed", file=sys.stderr)
        if rank == 0 and args.sample_every and (done % args.sample_every == 0 or done == last):
            (out / "samples").mkdir(exist_ok=True)
            save_png(out / "samples" / f"{done:07d}.png", make_sheet())
        if rank == 0 and (done % args.save_every == 0 or done == last or stopping):
            save_training(out, done, args, parts, optimizers)
            save_png(out / "sheet.png", make_sheet())
        if stopping and done < last:
            if rank == 0:
                print(f"\nstopped after step {done}; go on with the same command and --resume")
            return False
    if rank == 0:
        print(f"{out / 'sheet.png'} shows the mechanisms; next: python generate.py --weights {out / 'weights.pt'}")
    return not any_rank(stop, device)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    data = parser.add_argument_group("data and weights")
    data.add_argument("--dataset", required=True, choices=[*VARIANTS, "imagenet"], help="sets the defaults below too")
    data.add_argument("--weights-dir", type=Path, default=DOWNLOADS, help="folder with VGG-16; fetched if missing")
    data.add_argument("--weights", type=Path, help="start from these generator weights (ours or the published ones)")
    data.add_argument("--offline", action="store_true", help="synthetic digits and a random-feature VGG: no number "
                      "from such a run says anything about MNIST")

    steps = parser.add_argument_group("losses and steps")
    steps.add_argument("--binary-weight", type=non_negative_float, default=0.1, help="mask entropy, in bits; 0: none")
    steps.add_argument("--style-weights", type=non_negative_float, nargs=4, default=[0.05, 0.1, 0.0, 0.0],
                       metavar="W", help="style loss at relu1_2, relu2_2, relu3_3, relu4_3 of VGG-16; 0: none")
    steps.add_argument("--max-steps", "--steps", type=positive_int, help="stop at this step, whatever --epochs says")
    steps.add_argument("--batch-size", type=positive_int, default=32, help="images per step")
    steps.add_argument("--ema", type=fraction, default=0.999, help="decay of the generator's moving average")
    steps.add_argument("--amp", choices=["auto", "off", "bf16"], default="auto",
                       help="bf16 arithmetic; auto: where the hardware multiplies it")

    mnist = parser.add_argument_group("MNIST")
    mnist.add_argument("--data-dir", type=Path, default=DOWNLOADS, help="folder with MNIST's files; fetched if missing")
    mnist.add_argument("--textures", help="wildlife: folder with object/ and background/, 10 images each, or 'dtd' to "
                       "fetch the published photographs; ours are drawn if not given")
    mnist.add_argument("--discriminator", choices=["linear", "conv", "strided"], default="strided", help="its form")
    mnist.add_argument("--ndf", type=positive_int, default=32, help="width of the discriminator")
    forms = ["orthogonal", "normal", "xavier", "kaiming"]
    mnist.add_argument("--init", choices=forms, default="orthogonal", help="how the generator's weights are drawn")
    mnist.add_argument("--init-shape", choices=forms, default="kaiming", help="those of the shape mechanism: if they "
                       "are small, each class ends with one shape; as --init in the published settings")
    mnist.add_argument("--init-gain", type=non_negative_float, default=0.1, help="scale of --init")
    mnist.add_argument("--adversarial", choices=["squares", "logistic"], default="logistic",
                       help="form of the GAN's loss; squares as published")
    mnist.add_argument("--r1", type=non_negative_float, default=0.15,
                       help="gradient penalty of the discriminator at real images; 0 as published")
    mnist.add_argument("--style-every", type=positive_int, default=8, metavar="N",
                       help="compute the style loss in every Nth step only, and count it N times as much")
    mnist.add_argument("--border-weight", type=non_negative_float, default=5.0,
                       help="mean mask in the outer 3 pixels; 0 as published")
    mnist.add_argument("--frame-weight", type=non_negative_float, default=10.0,
                       help="colours of the background against those in the real image's outer 3 pixels; 0 as published")
    mnist.add_argument("--warmup", type=non_negative_int, default=1000,
                       help="first steps, in which the two losses above alone act, on BatchNorm weights and biases: they "
                       "settle the background first; 0 as published")
    mnist.add_argument("--labels", choices=["batch", "uniform"], default="batch", help="classes to generate: those of "
                       "the real batch, so that the style loss compares images of one class; or any, as published")
    mnist.add_argument("--epochs", type=positive_int, default=12, help="passes over the training images")
    mnist.add_argument("--lr", type=non_negative_float, default=1e-3, help="Adam's, both networks; 2e-4 as published")
    mnist.add_argument("--norm-lr", type=non_negative_float, default=2e-3,
                       help="of the generator's BatchNorm weights and biases; 2e-4 as published")
    mnist.add_argument("--decay", type=fraction, default=0.5,
                       help="last part of the steps, in which learning rates fall to 0; 0 as published")

    net = parser.add_argument_group("ImageNet")
    net.add_argument("--preset", choices=["full", "small"], default="full", help="256 x 256 with published weights, or "
                     "64 x 64 with few channels and a cGAN of drawn scenes: minutes on a CPU")
    net.add_argument("--biggan", type=Path, help="BigGAN-deep-256's file, if not in --weights-dir")
    net.add_argument("--u2net", type=Path, help="U^2-Net's file, if not in --weights-dir")
    net.add_argument("--truncation", type=truncation, default=1.0, help="of the latents and their statistics, (0, 1]")
    net.add_argument("--accumulate", type=positive_int, default=1, help="batches averaged in a step, for gradients")
    for name, weight, what in (("reconstruction", 100.0, "mean absolute error of the composite to the cGAN's image"),
                               ("mask", 500.0, "mean masks outside [0.1, 0.9]"),
                               ("background", 2000.0, "saliency of the background")):
        net.add_argument(f"--{name}-weight", type=non_negative_float, default=weight, help=what)
    net.add_argument("--texture-weights", type=non_negative_float, nargs=4, default=[0.0, 5.0, 5.0, 0.0], metavar="W",
                     help="style loss of the foreground against patches of the object, as --style-weights")
    for name, rate in (("shape", 8e-6), ("texture", 3e-5), ("background", 1e-5)):
        net.add_argument(f"--lr-{name}", type=non_negative_float, default=rate, help=f"learning rate of the {name}")
    net.add_argument("--recompute", action="store_true", help="activation checkpointing: blocks run again for their "
                     "derivative, for less memory")
    net.add_argument("--compile", action="store_true", help="torch.compile the mechanisms")

    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, required=True, help="run folder; new, empty, or continued with --resume")
    run.add_argument("--resume", nargs="?", const="auto", metavar="FILE",
                     help="continue from OUT/checkpoint.pt if it is there, or from FILE")
    run.add_argument("--seed", type=non_negative_int, default=0, help="same seed, same device: same run")
    run.add_argument("--seeds", type=non_negative_int, nargs="+", metavar="SEED",
                     help="a run for each, one after the other, in OUT/seed_0, ...")
    run.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one")
    run.add_argument("--kernels", choices=["auto", "triton", "eager"], default="auto",
                     help="composite and style loss; auto: Triton on a GPU, plain PyTorch elsewhere")
    run.add_argument("--log-every", type=positive_int, default=100, help="steps between lines of the log")
    run.add_argument("--sample-every", type=non_negative_int, default=1000, help="steps between sheets; 0: none")
    run.add_argument("--save-every", type=positive_int, default=1000, help="steps between checkpoints")
    run.add_argument("--bad-steps", type=positive_int, default=20,
                     help="steps in a row without finite losses or gradients, which are left out, before giving up")

    # --dataset and --preset settle the other defaults.
    early = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    early.add_argument("--dataset", nargs="?")
    early.add_argument("--preset", nargs="?")
    known = early.parse_known_args(argv)[0]
    parser.set_defaults(**PRESETS.get(known.dataset, {}))
    if (known.dataset, known.preset) == ("imagenet", "small"):
        parser.set_defaults(**PRESETS["imagenet small"])
    args = parser.parse_args(argv)
    refuse_group(parser, mnist if args.dataset == "imagenet" else net, args)
    if args.seeds and args.resume not in (None, "auto"):
        parser.error(f"--resume {args.resume}: one checkpoint cannot continue several --seeds; give --resume alone")
    return args


def main():
    args = parse_args()
    if args.warmup and not (args.border_weight and args.frame_weight):
        args.warmup = 0                                    # nothing to warm up with
    device = join_ranks(pick_device(args.device))
    try:
        use_triton(args.kernels, torch.empty(0, device=device))
    except ValueError as error:
        raise UserError(f"--kernels {args.kernels}: {error}")
    if rank_and_ranks()[1] > 1 and args.dataset != "imagenet":
        raise UserError("several GPUs: only for --dataset imagenet; MNIST fits one")
    if args.offline:
        print("OFFLINE: synthetic digits, drawn textures, random networks. No number of this run says anything of "
              "MNIST or ImageNet.")
    folder, seeds = args.out, args.__dict__.pop("seeds")
    for seed in dict.fromkeys(seeds or [args.seed]):
        args.seed, args.out = seed, folder / f"seed_{seed}" if seeds else folder
        out = claim_folder(args.out, __file__, args.resume) if rank_and_ranks()[0] == 0 else args.out
        if not train(args, out, device):
            break


if __name__ == "__main__":
    run_main(main)
