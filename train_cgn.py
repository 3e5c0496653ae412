"""Train a Counterfactual Generative Network (Sauer & Geiger, ICLR 2021, section 3).

Three independent mechanisms draw a shape mask, a foreground texture and a background. They are
composed by x = mask * foreground + (1 - mask) * background, and trained without supervision of any
of them. This file has two parts, each whole without the other: MNIST variants at 32 x 32 (half an
hour on one CPU core), and ImageNet at 256 x 256 (one GPU, or several through torchrun).

    python train_cgn.py --dataset colored_mnist --offline --out runs/first      # no download
    python train_cgn.py --dataset wildlife_mnist --textures dtd --out runs/wildlife
    python train_cgn.py --dataset imagenet --preset small --offline --out runs/small
    python train_cgn.py --dataset imagenet --out runs/imagenet --resume
    torchrun --nproc-per-node 8 -- train_cgn.py --dataset imagenet --batch-size 128 \
        --accumulate 31 --out runs/imagenet --resume

`--dataset NAME --help` shows the flags and defaults of that data set. The run folder gets
args.json, log.jsonl, sheet.png, samples/, checkpoint.pt (everything, to resume) and weights.pt
(for generate.py); on MNIST also segmentation.png and segmenter/.
"""

import argparse
import copy
import functools
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

from data import checkpoints, download, folders, imagenet, mnist, pictures, runs, weights
from data.weights import ConvNormReLU, U2Net, VGG16Features
from kernels import (
    GraphedStep,
    InstanceNorm2d,
    PaddedConv2d,
    UpsampleConv2d,
    accumulation_type,
    affine_convolution,
    affine_relu,
    attention,
    compose,
    composite_losses_and_copy,
    draw_patch_windows,
    max_pool,
    normalized_weight,
    power_iteration,
    sample_patch_images,
    set_rate,
    shuffle_patches,
    spectral,
    style_loss,
    upsample_conv2d,
    upsampling_kernel,
    use_triton,
    without_autocast,
)

# ==================================================================================================
# What both parts share: the perceptual loss, the moving average, common flags


def load_vgg(args, device, bf16, layer_weights):
    """The frozen VGG-16 down to the last layer that has a weight; None if no layer has one."""
    layers = [layer for layer, weight in zip(weights.STYLE_CONVOLUTIONS, layer_weights) if weight]
    if not layers:
        return None
    if args.offline:
        state = weights.random_vgg16_features(max(layers))
    else:
        state = weights.load_vgg16_features(args.weights_dir, max(layers))
    vgg = VGG16Features(state).to(device, torch.bfloat16 if bf16 else torch.float32)
    vgg.kernels = args.kernels
    return vgg


def perceptual_loss(vgg, image, target, layer_weights, backend="auto"):
    """Style loss of image against target: the sum over layers of 5000 w^2 mean|G - G_target|.

    image, target: (N, 3, H, W) in [-1, 1]. layer_weights: w at relu1_2, relu2_2, relu3_3, relu4_3.
    G is the Gram matrix of VGG-16's features; the target carries no gradient. Appendix B.
    """
    layers = max((index for index, weight in enumerate(layer_weights, 1) if weight), default=0)
    with torch.no_grad():
        target_features = vgg(target, layers)
    features = vgg(image, layers)
    assert not any(layer_weights[len(features) :]), "a weight at a layer that VGG-16 does not reach"
    loss = 0
    for weight, layer, target_layer in zip(layer_weights, features, target_features):
        if weight:
            loss = loss + 5000 * weight**2 * style_loss(layer, target_layer, backend=backend)
    return loss


@torch.no_grad()
def update_average(average, network, decay):
    """Exponential moving average of all weights and BatchNorm statistics, in place.

    decay: a number or a tensor (). Singular vectors of the spectral norms are copied: their mean
    would be no singular vector.
    """
    current = network.state_dict()
    averages, values = [], []
    copies, vectors = [], []
    for key, value in average.state_dict().items():
        if not value.is_floating_point() or key.startswith(checkpoints.FROZEN):
            continue
        if key.endswith(("weight_u", "weight_v")):
            copies.append(value)
            vectors.append(current[key])
        else:
            averages.append(value)
            values.append(current[key])
    weight = 1 - decay
    if isinstance(weight, torch.Tensor):
        weight = [weight] * len(averages)
    torch._foreach_lerp_(averages, values, weight)
    if copies:
        torch._foreach_copy_(copies, vectors)


def common_flags(parser):
    """Flags of both parts. Each part sets its own defaults of some."""
    data = parser.add_argument_group("data and weights")
    data.add_argument(
        "--weights-dir", type=Path, default=runs.DOWNLOADS,
        help="folder with pretrained networks; downloaded if missing",
    )
    data.add_argument(
        "--weights", type=Path, help="start from these generator weights, ours or published ones"
    )
    data.add_argument(
        "--offline", action="store_true",
        help="download nothing: synthetic digits, random networks; results then say nothing about "
        "MNIST or ImageNet",
    )

    losses = parser.add_argument_group("losses")
    losses.add_argument(
        "--binary-weight", type=runs.non_negative_float, help="weight of the mask's entropy in bits"
    )
    losses.add_argument(
        "--style-weights", type=runs.non_negative_float, nargs=4, metavar="W",
        help="weights of the style loss at relu1_2, relu2_2, relu3_3, relu4_3 of VGG-16",
    )

    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, required=True, help="run folder; new, empty, or resumed")
    run.add_argument(
        "--resume", nargs="?", const="auto", metavar="FILE",
        help="continue from OUT/checkpoint.pt if it is there, or from FILE",
    )
    run.add_argument(
        "--max-steps", type=runs.non_negative_int,
        help="steps in total; 0 with --weights, not on ImageNet: train only their segmenter",
    )
    run.add_argument(
        "--batch-size", type=runs.positive_int, help="images in a batch, over all GPUs together"
    )
    run.add_argument("--ema", type=runs.fraction, help="decay of the generator's moving average")
    run.add_argument(
        "--seed", type=runs.non_negative_int, default=0, help="on a CPU: same seed, same run"
    )
    run.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one"
    )
    run.add_argument(
        "--amp", choices=["auto", "off", "bf16"], default="auto",
        help="bf16 arithmetic; auto: if the hardware has it",
    )
    run.add_argument(
        "--kernels", choices=["auto", "triton", "eager"], default="auto",
        help="how kernels/ computes; auto: Triton on a GPU, plain PyTorch elsewhere",
    )
    run.add_argument("--log-every", type=runs.positive_int, help="steps between lines of the log")
    run.add_argument(
        "--sample-every", type=runs.non_negative_int, help="steps between sheets; 0: none"
    )
    run.add_argument("--save-every", type=runs.positive_int, help="steps between checkpoints")
    run.add_argument(
        "--bad-steps", type=runs.positive_int, default=20,
        help="give up after so many steps in a row without finite losses or gradients, which are "
        "skipped",
    )


# ==================================================================================================
# MNIST, and folders of images

LATENT = 32  # numbers in the latent z of a mechanism
EMBEDDING = 10  # numbers in a class's embedding
WARMUP = 1000  # at most so many first steps of a new generator learn the background alone
PENALTY_EVERY = 8  # steps between gradient penalties of the discriminator

# Defaults of --preset tuned in which the data sets differ.
TUNED = {
    "colored_mnist": dict(
        init="orthogonal",
        init_gain=0.1,
        binary_weight=0.1,
        style_weights=[0.05, 0.1, 0.0, 0.0],
    ),
    "double_colored_mnist": dict(
        init="orthogonal",
        init_gain=0.2,
        binary_weight=0.3,
        border_weight=20.0,
        style_weights=[0.0, 0.05, 0.0, 0.05],
    ),
    "wildlife_mnist": dict(
        init="normal",
        init_gain=0.03,
        binary_weight=0.3,
        style_weights=[0.01, 0.05, 0.0, 0.01],
    ),
}
# An object may fill more of a photograph than a digit of its image. A folder may hold few images,
# or large ones: 128 x 128 takes 2.2 GB in batches of 32, and 5.8 in batches of 128.
TUNED["images"] = TUNED["wildlife_mnist"] | dict(
    mask_gain=2.0,
    batch_size=32,
    lr=1e-3,
    norm_lr=2e-3,
)
# Defaults of --preset published: the losses and settings of the published code.
PUBLISHED_COMMON = dict(
    texture_padding="zeros",
    mask_gain=1.0,
    adversarial="squares",
    r1=0.0,
    style_every=1,
    border_weight=0.0,
    frame_weight=0.0,
    warmup=0,
    segmenter_steps=0,
    labels="uniform",
    batch_size=16,
    epochs=15,
    lr=2e-4,
    norm_lr=2e-4,
    decay=0.0,
)
PUBLISHED = {
    "colored_mnist": dict(
        discriminator="linear",
        ndf=512,
        init_shape="orthogonal",
        style_weights=[0.05, 0.1, 0.01, 0.0],
    ),
    "double_colored_mnist": dict(discriminator="linear", ndf=512, init_shape="orthogonal"),
    "wildlife_mnist": dict(discriminator="conv", ndf=32, init_shape="normal"),
}
PUBLISHED["images"] = PUBLISHED["wildlife_mnist"]


# --------------------------------------------------------------------------------------------------
# MNIST: networks. The numbering of the layers is that of the published state dicts, where the
# upsampling is a layer of its own: nn.Identity stands in its place.


def upsampled(channels, width, padding="zeros"):
    """(N, channels, H, W) -> (N, width, 2 H, 2 W)."""
    return [
        nn.Identity(),
        UpsampleConv2d(channels, width, 3, padding=1, bias=False, padding_mode=padding),
        nn.BatchNorm2d(width),
        nn.LeakyReLU(0.2),
    ]


def texture_mechanism(ngf, size=32, padding="zeros"):
    """z and class -> texture in [-1, 1]: (N, 42) -> (N, 3, size, size).

    padding: at the borders, "zeros" as published. A texture is shifted cyclically before it is
    used, which brings its borders into the middle; with "circular" there is no seam.
    """
    layers = [
        nn.Linear(LATENT + EMBEDDING, 2 * ngf * 8 * 8),
        nn.Unflatten(1, (2 * ngf, 8, 8)),
    ]
    for _ in range(doublings(size) + 1):
        layers += upsampled(2 * ngf, 2 * ngf, padding)  # (N, 2 ngf, 16, 16), ...
    layers += upsampled(2 * ngf, ngf, padding)  # (N, ngf, size, size)
    layers += [
        PaddedConv2d(ngf, 3, 3, padding=1, padding_mode=padding),
        nn.BatchNorm2d(3),
        nn.Tanh(),
    ]
    return nn.Sequential(*layers)


def shape_mechanism(ngf, size=32):
    """z and class -> mask before clamping: (N, 42) -> (N, 1, size, size), of mean 0 and variance 1.
    """
    layers = [
        nn.Linear(LATENT + EMBEDDING, 2 * ngf * 8 * 8),
        nn.Unflatten(1, (2 * ngf, 8, 8)),
        nn.InstanceNorm2d(2 * ngf),
    ]
    for _ in range(doublings(size)):
        layers += [*upsampled(2 * ngf, 2 * ngf), InstanceNorm2d(2 * ngf)]
    layers += [*upsampled(2 * ngf, ngf), InstanceNorm2d(ngf)]  # (N, ngf, size / 2, size / 2)
    layers += [*upsampled(ngf, 1), InstanceNorm2d(1)]  # (N, 1, size, size)
    return nn.Sequential(*layers)


def doublings(size):
    """How many levels more than at 32 x 32 the networks have: 1 for 64 x 64, 2 for 128 x 128."""
    return (size // 32).bit_length() - 1


class MnistCGN(nn.Module):
    """The three mechanisms. At 32 x 32, keys and shapes are those of the published state dicts."""

    def __init__(
        self,
        ngf=32,
        init="orthogonal",
        init_gain=0.1,
        init_shape="orthogonal",
        names=mnist.NAMES,
        size=32,
        texture_padding="zeros",
        mask_gain=1.0,
    ):
        super().__init__()
        self.config = {  # makes another of the same shape: MnistCGN(**config)
            "ngf": ngf,
            "names": names,
            "size": size,
            "texture_padding": texture_padding,
            "mask_gain": mask_gain,
        }
        self.names = names  # of the classes
        self.size = size
        self.texture_padding = texture_padding
        self.mask_gain = mask_gain
        self.z_dim = LATENT
        self.label_emb = nn.Embedding(len(names), EMBEDDING)
        self.f_shape = shape_mechanism(ngf, size)
        self.f_text1 = texture_mechanism(ngf, size, texture_padding)  # foreground
        self.f_text2 = texture_mechanism(ngf, size, texture_padding)  # background
        initialize(self, init, init_gain)
        if init_shape != init:
            initialize(self.f_shape, init_shape, init_gain)

    def inputs(self, z, y):
        """z: (N, 32). y: classes (N,), or embeddings (N, 10) to go between classes -> (N, 42)."""
        embedding = y if y.is_floating_point() else self.label_emb(y)
        return torch.cat([z, embedding], 1)

    def mask(self, z, y):
        """(N, 1, size, size) in [0.0001, 0.9999]."""
        # No sigmoid, as published: the last InstanceNorm spreads the mask, and the clamp cuts it.
        # Its variance is 1: an object that fills the share p of an image has at most the value
        # gain * sqrt((1 - p) / p) everywhere, so that without a gain one of p > 1/2 is transparent.
        mask = self.mask_gain * self.f_shape(self.inputs(z, y)).float()
        return mask.clamp(1e-4, 1 - 1e-4)

    def foreground(self, z, y):
        """(N, 3, size, size) in [-1, 1], before shuffling."""
        return self.f_text1(self.inputs(z, y)).float()

    def background(self, z, y):
        """(N, 3, size, size) in [-1, 1], before shuffling."""
        return self.f_text2(self.inputs(z, y)).float()

    def forward(self, z, y):
        """Mask, foreground and background of one latent and one class, as in training."""
        return self.mask(z, y), self.foreground(z, y), self.background(z, y)


class LinearDiscriminator(nn.Module):
    """Image (N, 3, size, size) and class (N,) -> realness (N, 1)."""

    def __init__(self, ndf, classes=10, size=32):
        super().__init__()
        self.label_embedding = nn.Embedding(classes, EMBEDDING)
        self.model = nn.Sequential(
            nn.Linear(3 * size * size + EMBEDDING, ndf),
            nn.LeakyReLU(0.2),
            nn.Linear(ndf, ndf),
            nn.Dropout(0.4),
            nn.LeakyReLU(0.2),
            nn.Linear(ndf, ndf),
            nn.Dropout(0.4),
            nn.LeakyReLU(0.2),
            nn.Linear(ndf, 1),
        )

    def forward(self, x, y):
        return self.model(torch.cat([x.flatten(1), self.label_embedding(y)], 1))


class ConvDiscriminator(nn.Module):
    """Image and class -> realness (N, 1). The class enters as a fourth channel of one value."""

    def __init__(self, ndf, classes=10, size=32):
        super().__init__()
        self.label_embedding = nn.Embedding(classes, 1)
        convolutions = [
            nn.Conv2d(4, ndf, 3, bias=False),  # (N, ndf, 30, 30) at 32 x 32
            nn.Conv2d(ndf, 2 * ndf, 3, bias=False),  # (N, 2 ndf, 28, 28)
            nn.Conv2d(2 * ndf, 4 * ndf, 4, 2, bias=False),  # (N, 4 ndf, 13, 13)
        ]
        for _ in range(doublings(size) + 1):
            convolutions.append(nn.Conv2d(4 * ndf, 4 * ndf, 4, 2, bias=False))  # (N, 4 ndf, 5, 5)
        layers = []
        for convolution in convolutions:
            layers += [convolution, nn.BatchNorm2d(convolution.out_channels), nn.LeakyReLU(0.2)]
        layers += [nn.AvgPool2d(3), nn.Conv2d(4 * ndf, 1, 1, bias=False)]  # (N, 1, 1, 1)
        self.model = nn.Sequential(*layers)
        initialize(self, "normal", 0.02)

    def forward(self, x, y):
        classes = self.label_embedding(y)[:, :, None, None].expand(-1, 1, *x.shape[2:])
        return self.model(torch.cat([x, classes], 1)).flatten(1)


class StridedDiscriminator(nn.Module):
    """Image and class -> realness (N, 1): strided convolutions, no norms, an output for each class.

    Not in the paper: a tenth of ConvDiscriminator's arithmetic, for the logistic loss with --r1.
    """

    def __init__(self, ndf, classes=10, size=32):
        super().__init__()
        layers = [
            nn.Conv2d(3, ndf, 4, 2, 1),  # (N, ndf, size / 2, size / 2)
            nn.LeakyReLU(0.2),
            nn.Conv2d(ndf, 2 * ndf, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * ndf, 4 * ndf, 4, 2, 1),
            nn.LeakyReLU(0.2),
        ]
        for _ in range(doublings(size)):
            layers += [nn.Conv2d(4 * ndf, 4 * ndf, 4, 2, 1), nn.LeakyReLU(0.2)]
        layers += [
            nn.Flatten(),  # of (N, 4 ndf, 4, 4)
            nn.Linear(64 * ndf, 256),
            nn.LeakyReLU(0.2),
            nn.Linear(256, classes),
        ]
        self.model = nn.Sequential(*layers)

    def forward(self, x, y):
        return self.model(x).gather(1, y[:, None])


class Segmenter(nn.Module):
    """Image (N, 3, S, S) in [-1, 1] -> logits of its mask (N, 1, S, S): a small U-Net.

    Not in the paper: it learns from the generator's images, whose masks are known, and then finds
    the object in real ones.
    """

    def __init__(self, size=32, width=16):
        super().__init__()
        widths = [width, 2 * width] + [4 * width] * (doublings(size) + 1)
        self.down = nn.ModuleList()  # at S, S / 2, ..., 8
        for channels, out in zip([3, *widths], widths):
            self.down.append(two_convolutions(channels, out))
        self.up = nn.ModuleList()  # at 16, ..., S
        for level in reversed(range(len(widths) - 1)):
            fine = widths[level]
            self.up.append(two_convolutions(fine + widths[level + 1], fine))
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x):
        levels = []
        for block in self.down:
            if levels:
                x = F.max_pool2d(x, 2)
            x = block(x)
            levels.append(x)
        x = levels.pop()
        for block in self.up:
            x = block(torch.cat([levels.pop(), F.interpolate(x, scale_factor=2)], 1))
        return self.out(x)


def two_convolutions(channels, width):
    """(N, channels, H, W) -> (N, width, H, W)."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )


DISCRIMINATORS = {
    "linear": LinearDiscriminator,
    "conv": ConvDiscriminator,
    "strided": StridedDiscriminator,
}


def initialize(network, init, gain):
    """Draw weights of convolutions and linear layers by `init`, BatchNorm's by N(1, gain).

    Biases become 0.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            if init == "normal":
                nn.init.normal_(module.weight, 0.0, gain)
            elif init == "orthogonal":
                nn.init.orthogonal_(module.weight, gain)
            else:
                nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, gain)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


def load_generator(path, *, raw=False):
    """A generator from our weights.pt or checkpoint, or from a published state dict.

    raw: the trained weights themselves instead of their moving average. Returns the MnistCGN in
    eval mode, of as many classes and pixels as the file's, and the arguments of its training, {}
    for a published file. UserError for a file that is missing, damaged or of another network.
    """
    content = runs.load_tensors(path)
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise runs.UserError(f"{path}: holds a {kind}, not the weights of a generator")
    state = content.get("generator" if raw else "average", content)
    args = content.get("args", {})
    args = args if isinstance(args, dict) else {}
    names = list(args.get("class_counts", mnist.NAMES))  # --dataset images counts its classes
    cgn = MnistCGN(
        names=names,
        size=args.get("image_size", 32),
        texture_padding=args.get("texture_padding", "zeros"),
        mask_gain=args.get("mask_gain", 1.0),
    )
    cgn.load_state_dict(weights.check_state_dict(state, cgn.state_dict(), path))
    return cgn.eval(), args


def load_segmenter(path):
    """The segmenter in a weights.pt, in eval mode. UserError if there is none."""
    content = runs.load_tensors(path)
    if not isinstance(content, dict) or "segmenter" not in content:
        raise runs.UserError(
            f"{path}: holds no segmenter, which finds the shapes of real images; train one: python "
            f"train_cgn.py --dataset NAME --weights {path} --max-steps 0 --out FOLDER"
        )
    segmenter = Segmenter(content.get("args", {}).get("image_size", 32))
    state = weights.check_state_dict(content["segmenter"], segmenter.state_dict(), path)
    segmenter.load_state_dict(state)
    return segmenter.eval()


# --------------------------------------------------------------------------------------------------
# MNIST: losses


def frame_pixels(image):
    """The frame of (N, C, S, S), 3 pixels wide at 32 x 32: (N, C, number of pixels)."""
    width = 3 * image.shape[-1] // 32
    middle = image[..., width:-width, :]
    parts = [
        image[..., :width, :],
        image[..., -width:, :],
        middle[..., :width],
        middle[..., -width:],
    ]
    return torch.cat([part.flatten(2) for part in parts], 2)


# The paper's losses leave open which of the two textures is the foreground, and the masks of some
# classes end inverted. Objects seldom touch the border: the next two losses settle it with that.
# They are not in the paper.


def border_loss(mask):
    """Mean mask value in the frame, which objects do not reach."""
    return frame_pixels(mask).mean()


def frame_loss(background, x_gt):
    """Difference of the background's colors to those in the frame of real images.

    background, x_gt: (N, 3, H, W). The frame of a real image shows its background: mean and spread
    of each color channel should agree, image by image (of one class if --labels is batch). An
    object may fill a part of the frame, so only the two corners that agree best count.
    """
    real = corner_pixels(x_gt)
    fake = background.flatten(2)[:, :, None]  # (N, 3, 1, number of pixels)
    # Squared: BatchNorm keeps the variance over a batch, and an absolute difference is smallest
    # with nine classes right and the tenth far off.
    mean_loss = (real.mean(3) - fake.mean(3)).square()
    # The slope of a square root is infinite at 0: 1e-4 keeps it finite for a flat background.
    real_spread = (real.var(3) + 1e-4).sqrt()
    fake_spread = (fake.var(3) + 1e-4).sqrt()
    loss = mean_loss + (real_spread - fake_spread).square()  # (N, 3, 4)
    return loss.mean(1).topk(2, largest=False).values.mean()


def corner_pixels(image):
    """The pixels of the frame that are near a corner, (N, C, 4, pixels); of (N, C, S, S).

    At 32 x 32 the frame is 3 pixels wide, and a corner 10 long.
    """
    width = 3 * image.shape[-1] // 32
    length = 10 * image.shape[-1] // 32
    corners = []
    for dims in ((), (2,), (3,), (2, 3)):
        # Flipped, so that each of the four corners lies at the upper left.
        corner = image.flip(dims)[..., :length, :length]
        across = corner[..., :width, :].flatten(2)
        down = corner[..., width:, :width].flatten(2)
        corners.append(torch.cat([across, down], 2))
    return torch.stack(corners, 2)


def adversarial_loss(args, realness, target):
    """Realness (N, 1) against the target 1 or 0: least squares (Mao et al. 2017), as published, or
    logistic (Goodfellow et al. 2014).
    """
    realness = realness.float()  # autocast leaves bfloat16
    targets = torch.full_like(realness, target)
    if args.adversarial == "squares":
        return F.mse_loss(realness, targets)
    return F.binary_cross_entropy_with_logits(realness, targets)


def generator_losses(args, vgg, discriminator, mechanisms, x_gt, y_gen, warming_up, style):
    """Weighted losses by name, the composite (N, 3, S, S), and the mean mask value.

    warming_up: only the losses that settle the background act. style: the style loss acts. It takes
    most of the time, so it is computed in every --style-every-th step and counts as many times as
    much.
    """
    mask, foreground, background = mechanisms
    composed, copy = composite_losses_and_copy(
        mask,
        foreground,
        background,
        copy_dtype=vgg.convolutions[0].weight.dtype if style else None,  # as VGG-16 wants it
        backend=args.kernels,
    )
    losses = {}
    if not warming_up:
        realness = discriminator(composed.composite, y_gen)
        losses["adversarial"] = adversarial_loss(args, realness, 1)
        losses["binary"] = args.binary_weight * composed.binary
    if style:
        loss = perceptual_loss(vgg, copy, x_gt, args.style_weights, args.kernels)
        losses["style"] = args.style_every * loss
    if args.border_weight:
        losses["border"] = args.border_weight * border_loss(mask)
    if args.frame_weight:
        losses["frame"] = args.frame_weight * frame_loss(background, x_gt)
    return losses, composed.composite, composed.mask_mean.mean()


def discriminator_loss(args, discriminator, x_gt, y_gt, x_gen, y_gen, penalty):
    """Real images to 1, generated ones to 0, and with `penalty` a gradient penalty at real images.

    That is --r1 times half the squared gradient (Mescheder et al. 2018), computed in every 8th step
    and 8-fold.
    """
    x_gt = x_gt.detach().requires_grad_(penalty)
    if args.discriminator == "conv":  # its BatchNorm should see each kind of image alone
        real = discriminator(x_gt, y_gt)
        fake = discriminator(x_gen, y_gen)
    else:
        both = discriminator(torch.cat([x_gt, x_gen]), torch.cat([y_gt, y_gen]))
        real, fake = both.chunk(2)
    loss = (adversarial_loss(args, real, 1) + adversarial_loss(args, fake, 0)) / 2
    if penalty:
        (gradient,) = torch.autograd.grad(real.sum(), x_gt, create_graph=True)
        loss = loss + PENALTY_EVERY * args.r1 / 2 * gradient.square().sum((1, 2, 3)).mean()
    return loss


# --------------------------------------------------------------------------------------------------
# MNIST: flags


def mnist_flags(parser, variant, preset):
    """Flags of the MNIST variants, with the defaults of the variant and the preset.

    Returns two groups: of those that --max-steps replaces, and of those that --weights do.
    """
    common_flags(parser)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--preset", choices=["tuned", "published"], default="tuned",
        help="sets the defaults of the other flags: ours, or those of the published code",
    )
    if variant == "images":
        group.add_argument(
            "--data-dir", type=Path, required=True,
            help="folder with train/CLASS/*.png and, if there is one, test/; or with CLASS/*.png",
        )
        group.add_argument(
            "--image-size", type=int, choices=[32, 64, 128], default=32,
            help="the middle square of each image is resized to this",
        )
    else:
        group.add_argument(
            "--data-dir", type=Path, default=runs.DOWNLOADS,
            help="folder with MNIST's files; downloaded if missing",
        )
    if variant == "wildlife_mnist":
        group.add_argument(
            "--textures",
            help="folder with object/ and background/, 10 images each, or 'dtd' to download the "
            "published photographs; synthetic textures if not given",
        )

    group = parser.add_argument_group("networks")
    group.add_argument(
        "--discriminator", choices=list(DISCRIMINATORS), default="strided",
        help="the discriminator's layers",
    )
    group.add_argument(
        "--ndf", type=runs.positive_int, default=32, help="the discriminator's width"
    )
    new = parser.add_argument_group("generator, without --weights")
    inits = ["orthogonal", "normal", "kaiming"]
    new.add_argument(
        "--init", choices=inits, default="orthogonal", help="how the weights start",
    )
    new.add_argument(
        "--init-shape", choices=inits, default="kaiming",
        help="the same for the shape mechanism: if its weights start small, each class ends with "
        "one shape",
    )
    new.add_argument(
        "--init-gain", type=runs.non_negative_float, default=0.1,
        help="scale of the weights of --init, of BatchNorm's with kaiming",
    )
    new.add_argument(
        "--texture-padding", choices=["circular", "zeros"], default="circular",
        help="padding in the texture mechanisms; textures are shifted cyclically, so circular "
        "leaves no seam",
    )
    new.add_argument(
        "--mask-gain", type=runs.positive_float, default=1.0,
        help="factor of masks before they are clipped to [0, 1]; with 1, objects that fill more "
        "than half of an image stay transparent",
    )

    group = parser.add_argument_group("adversarial and border losses")
    group.add_argument(
        "--adversarial", choices=["squares", "logistic"], default="logistic",
        help="kind of the adversarial loss",
    )
    group.add_argument(
        "--r1", type=runs.non_negative_float, default=0.15,
        help="weight of the discriminator's gradient penalty at real images",
    )
    group.add_argument(
        "--style-every", type=runs.positive_int, default=8, metavar="N",
        help="compute the style loss in every Nth step, weighted by N",
    )
    group.add_argument(
        "--border-weight", type=runs.non_negative_float, default=5.0,
        help="weight of the mean mask in the outer 3 of 32 pixels",
    )
    group.add_argument(
        "--frame-weight", type=runs.non_negative_float, default=10.0,
        help="weight of the background's colors against those in corners of the real image",
    )
    group.add_argument(
        "--labels", choices=["batch", "uniform"], default="batch",
        help="classes to generate: those of the real batch, so that the style loss compares images "
        "of one class, or any",
    )

    length = parser.add_argument_group("length of the run, without --max-steps")
    length.add_argument(
        "--epochs", type=runs.positive_int, default=None if variant == "images" else 12,
        help="passes over the training images; default with --dataset images: 12, or more to reach "
        "18,000 steps",
    )

    group = parser.add_argument_group("optimization")
    group.add_argument(
        "--lr", type=runs.non_negative_float, default=2e-3, help="learning rate of both networks"
    )
    group.add_argument(
        "--norm-lr", type=runs.non_negative_float, default=4e-3,
        help="learning rate of the generator's BatchNorm weights and biases",
    )
    group.add_argument(
        "--decay", type=runs.fraction, default=0.5,
        help="learning rates fall to 0 over this last part of the steps",
    )
    group.add_argument(
        "--warmup", type=runs.non_negative_int,
        help="first steps, in which only --border-weight and --frame-weight act, on BatchNorm "
        "weights and biases: the background is learned first; default: 2 / --norm-lr, at most "
        "1000, but 0 with --weights or if one of the two is 0",
    )

    group = parser.add_argument_group("segmenter, for generate.py --shapes real")
    group.add_argument(
        "--segmenter-steps", type=runs.non_negative_int, default=2000,
        help="its steps, after the generator's, on the generator's images; 0: no segmenter",
    )

    group = parser.add_argument_group("CUDA graphs")
    group.add_argument(
        "--graph", choices=["auto", "off"], default="auto",
        help="record each kind of step as a CUDA graph; auto: on a GPU",
    )

    parser.set_defaults(ema=0.999, batch_size=128, log_every=50, sample_every=500, save_every=500)
    # A variant of your own begins with the settings of wildlife MNIST.
    parser.set_defaults(**TUNED.get(variant, TUNED["wildlife_mnist"]))
    if preset == "published":
        parser.set_defaults(**PUBLISHED_COMMON)
        parser.set_defaults(**PUBLISHED.get(variant, PUBLISHED["wildlife_mnist"]))
    return length, new


def check_mnist_flags(parser, args, length, new):
    """The parser's error for flags that nothing would use; --warmup gets its default.

    length, new: the groups that mnist_flags returns.
    """
    if args.max_steps is not None:
        runs.refuse_flags(parser, length, args, "has no meaning with --max-steps")
    if args.weights:
        runs.refuse_flags(parser, new, args, "has no meaning with --weights, which keep theirs")
    elif args.max_steps == 0:
        parser.error("--max-steps 0: trains the segmenter of --weights alone; give them")
    if args.offline and args.dataset != "images" and args.data_dir != runs.DOWNLOADS:
        parser.error("--data-dir: has no meaning with --offline, whose digits are synthetic")
    settles = args.border_weight and args.frame_weight  # the losses that act during warm-up
    if args.warmup is None:
        # Black is a BatchNorm's bias near -2, and a step moves it by --norm-lr.
        steps = math.ceil(2 / max(args.norm_lr, 2 / WARMUP))
        args.warmup = 0 if args.weights or not settles else steps
    elif args.warmup and not settles:
        parser.error("--warmup: needs --border-weight and --frame-weight, which act in it")


# --------------------------------------------------------------------------------------------------
# MNIST: training


def generator_groups(cgn, args):
    """Parameter groups for Adam: BatchNorm's weights and biases have a learning rate of their own.

    A texture's color is the tanh of a BatchNorm's output, and black is a bias near -2: at the
    published 2e-4 a step, 10,000 steps away.
    """
    norms = []
    for module in cgn.modules():
        if isinstance(module, nn.BatchNorm2d):
            norms += module.parameters()
    is_norm = {id(parameter) for parameter in norms}
    others = [parameter for parameter in cgn.parameters() if id(parameter) not in is_norm]
    return [{"params": others, "lr": args.lr}, {"params": norms, "lr": args.norm_lr}]


def mnist_sheet(networks, args):
    """What the moving average draws now, class by class."""
    return pictures.mechanism_sheet(networks["average"].eval())


def load_training_images(args, device):
    """The biased training images: a MnistVariant, or an ImageFolder, whose classes are added to
    args.
    """
    if args.dataset == "images":
        data, _ = folders.load_folder(args.data_dir, args.image_size, device)
        args.class_counts = data.class_counts()
    else:
        data, _ = mnist.load_variant(
            args.dataset,
            args.data_dir,
            textures=getattr(args, "textures", None),
            offline=args.offline,
            seed=args.seed,
            device=device,
        )
    return data


def start_generator(args, data):
    """The MnistCGN that training begins with: new, or of --weights, whose settings args get."""
    if not args.weights:
        return MnistCGN(
            init=args.init,
            init_gain=args.init_gain,
            init_shape=args.init_shape,
            names=data.names,
            size=data.size,
            texture_padding=args.texture_padding,
            mask_gain=args.mask_gain,
        )
    cgn, _ = load_generator(args.weights)
    if (cgn.size, cgn.names) != (data.size, data.names):
        raise runs.UserError(
            f"--weights {args.weights}: of {len(cgn.names)} classes at {cgn.size} x {cgn.size} "
            f"pixels ({', '.join(cgn.names[:10])}), not those of the training images"
        )
    args.texture_padding = cgn.texture_padding
    args.mask_gain = cgn.mask_gain
    return cgn.train()


def count_steps(args, steps_per_epoch):
    """All steps of the run: so many epochs, and with --dataset images, unless told how many, 18,000
    steps at least, in which their smaller batches show about as many images as MNIST's.
    """
    if args.max_steps is not None:
        return args.max_steps
    epochs = args.epochs or max(12, math.ceil(18_000 / steps_per_epoch))
    return epochs * steps_per_epoch


def mnist_step(args, training, data, vgg, bf16, index, decay, *, warming_up, style, penalty):
    """A step of the generator and of the discriminator on the training images `index` (N,).

    decay: tensor (), of the moving average. warming_up, style, penalty: see `generator_losses` and
    `discriminator_loss`. Returns losses by name, detached, and "skipped", above 0 if numbers were
    not finite. It may be recorded as a CUDA graph, see GraphedStep.
    """
    cgn = training.networks["generator"]
    average = training.networks["average"]
    discriminator = training.networks["discriminator"]
    optimizer, discriminator_optimizer = training.optimizers
    device = index.device
    n = len(index)

    # Data
    x_gt = mnist.to_float(data.images(index, None))  # (N, 3, S, S) in [-1, 1]
    y_gt = data.labels[index]
    y_gen = y_gt
    if args.labels == "uniform":
        y_gen = torch.randint(len(data.names), (n,), device=device)
    z = torch.randn(n, LATENT, device=device)
    offsets = torch.randint(cgn.size, (2, n, 2), device=device)

    # Generator
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    judge = autocast(discriminator.forward)
    discriminator.requires_grad_(False)
    with autocast:
        mask, foreground, background = cgn(z, y_gen)
    foreground = shuffle_patches(foreground, offsets[0])
    background = shuffle_patches(background, offsets[1])
    mechanisms = (mask, foreground, background)
    losses, x_gen, mask_mean = generator_losses(
        args, vgg, judge, mechanisms, x_gt, y_gen, warming_up, style
    )
    loss = sum(losses.values())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    skipped = checkpoints.finite_step(optimizer, loss)

    # Discriminator
    if not warming_up:
        discriminator.requires_grad_(True)
        loss = discriminator_loss(args, judge, x_gt, y_gt, x_gen.detach(), y_gen, penalty)
        discriminator_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        skipped = skipped + checkpoints.finite_step(discriminator_optimizer, loss)
        losses["discriminator"] = loss
    losses["mask"] = mask_mean

    # Moving average
    checkpoints.mend_statistics(cgn, discriminator)
    update_average(average, cgn, decay)
    return {name: loss.detach() for name, loss in losses.items()} | {"skipped": skipped}


def train_mnist(args, device):
    """Train a generator on a MNIST variant or a folder of images. Everything is written into
    args.out.
    """
    torch.manual_seed(args.seed)
    bf16 = runs.pick_bf16(args.amp, device)

    # Data: all images lie on the device as uint8.
    data = load_training_images(args, device)
    steps_per_epoch = len(data) // args.batch_size
    if not steps_per_epoch:
        raise runs.UserError(
            f"--batch-size {args.batch_size}: larger than the {len(data)} training images"
        )
    last_step = count_steps(args, steps_per_epoch)
    if 0 < last_step <= args.warmup:
        print(
            f"warning: all {last_step} steps are warm-up, in which no shape is learned; give more "
            "steps, or --warmup 0",
            file=sys.stderr,
        )

    # Networks
    vgg = load_vgg(args, device, bf16, args.style_weights) if last_step else None
    cgn = start_generator(args, data).to(device)
    average = MnistCGN(**cgn.config).requires_grad_(False).to(device)
    average.load_state_dict(cgn.state_dict())
    discriminator = DISCRIMINATORS[args.discriminator](args.ndf, len(data.names), data.size)
    discriminator.to(device, memory_format=torch.channels_last)

    # Optimizers
    optimizer = torch.optim.Adam(generator_groups(cgn, args), betas=(0.5, 0.999), fused=True)
    discriminator_optimizer = torch.optim.Adam(
        discriminator.parameters(), args.lr, betas=(0.5, 0.999), fused=True
    )
    training = checkpoints.Training(
        args.out,
        args,
        {"generator": cgn, "average": average, "discriminator": discriminator},
        [optimizer, discriminator_optimizer],
        last_step,
        device,
        written=("generator", "average"),
        draw_sheet=mnist_sheet,
    )
    runs.describe_run(args.out, __file__, vars(args))
    print(f"{args.dataset}, {'bf16' if bf16 else 'float32'}, steps {training.step} to {last_step}")
    if not last_step:
        training.save()  # --weights as they are, for their segmenter

    function = functools.partial(mnist_step, args, training, data, vgg, bf16)
    graphed = args.graph == "auto" and device.type == "cuda"
    train_step = GraphedStep(function, training.optimizers, graphed)
    order = None
    for step in range(training.step, last_step):
        # Every step seeds its own random numbers, so that a resumed run draws the same.
        torch.manual_seed(runs.derived_seed(args.seed, "step", step))
        warming_up = step < args.warmup
        style = any(args.style_weights) and step % args.style_every == 0 and not warming_up
        penalty = args.r1 > 0 and step % PENALTY_EVERY == 0 and not warming_up
        # 1, then in a straight line to 0 over the last part of the steps.
        falling = min(1.0, (last_step - step) / max(args.decay * last_step, 1))
        set_rate(optimizer.param_groups[0], 0.0 if warming_up else falling * args.lr)
        set_rate(optimizer.param_groups[1], falling * args.norm_lr)
        set_rate(discriminator_optimizer.param_groups[0], falling * args.lr)

        # Data
        epoch, position = divmod(step, steps_per_epoch)
        if order is None or position == 0:
            shuffle = runs.seeded_generator(args.seed, "order", epoch)
            order = torch.randperm(len(data), generator=shuffle).to(device)
        index = order[position * args.batch_size : (position + 1) * args.batch_size]

        # Generator, discriminator, moving average
        decay = torch.full((), min(args.ema, (step + 1) / (step + 10)), device=device)
        metrics = train_step(index, decay, warming_up=warming_up, style=style, penalty=penalty)
        skipped = metrics.pop("skipped")

        # Log, sheet, checkpoint, stop
        training.end_step(metrics, skipped)
    print(f"{args.out / 'sheet.png'} shows the mechanisms")
    if args.segmenter_steps:
        train_segmenter(args, training, data, bf16, device)
    print("next:", runs.command_line("generate.py", "--weights", args.out / "weights.pt"))


# --------------------------------------------------------------------------------------------------
# MNIST: the segmenter. The generator makes images whose masks are known, without end. What finds
# the masks of those finds them in real images, too: their shapes are more varied than those of the
# generator, and counterfactuals of them are better.


@torch.no_grad()
def segmenter_pairs(cgn, n, generator=None):
    """Images (n, 3, S, S) in [-1, 1] and their masks (n, 1, S, S), of a trained generator.

    One latent and one class for all mechanisms, as in the biased images that are to be segmented;
    colors are shifted a little more than theirs vary. generator: on the device of cgn, or None for
    the default one.
    """
    drawn = {"generator": generator, "device": cgn.label_emb.weight.device}
    z = torch.randn(n, LATENT, **drawn)
    y = torch.randint(len(cgn.names), (n,), **drawn)
    offsets = torch.randint(cgn.size, (2, n, 2), **drawn)
    shifts = 0.1 * torch.randn(2, n, 3, 1, 1, **drawn)
    mask, foreground, background = cgn(z, y)
    foreground = shuffle_patches(foreground, offsets[0]) + shifts[0]
    background = shuffle_patches(background, offsets[1]) + shifts[1]
    return compose(mask, foreground.clamp_(-1, 1), background.clamp_(-1, 1)), mask


@torch.inference_mode()
def find_masks(segmenter, images):
    """The masks of images, uint8 (n, 3, S, S): uint8 (n, 1, S, S), 255 where the object is."""
    parts = images.split(100)  # small enough for a CPU's cache
    masks = [segmenter(mnist.to_float(part)).float().sigmoid() for part in parts]
    return torch.cat(masks).mul_(255).round_().to(torch.uint8)


def segmenter_step(cgn, segmenter, optimizer, bf16):
    """A step on 64 new pairs. Returns the loss, detached, and "skipped", as mnist_step does."""
    device = cgn.label_emb.weight.device
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        x, mask = segmenter_pairs(cgn, 64)
        logits = segmenter(x)
    loss = F.binary_cross_entropy_with_logits(logits.float(), mask)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    skipped = checkpoints.finite_step(optimizer, loss)
    checkpoints.mend_statistics(segmenter)
    return {"segmenter": loss.detach(), "skipped": skipped}


def train_segmenter(args, trained, data, bf16, device):
    """Train the segmenter, add it to weights.pt, and draw segmentation.png.

    trained: the generator's Training. The segmenter's checkpoint and log lie in the folder
    segmenter/.
    """
    out = args.out / "segmenter"
    out.mkdir(exist_ok=True)
    cgn = trained.networks["average"].eval()
    torch.manual_seed(runs.derived_seed(args.seed, "segmenter start", 0))
    segmenter = Segmenter(cgn.size).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(segmenter.parameters(), fused=True)
    path, content = checkpoints.read_checkpoint(out, "auto" if args.resume else None)
    if content.get("generator_step") != trained.step:  # the generator was trained on since
        content = {}
    training = checkpoints.Training(
        out,
        args,
        {"segmenter": segmenter},
        [optimizer],
        args.segmenter_steps,
        device,
        extra={"generator_step": trained.step},
        saved=(path, content),
        stop=trained.stop,
    )

    function = functools.partial(segmenter_step, cgn, segmenter, optimizer, bf16)
    graphed = args.graph == "auto" and device.type == "cuda"
    train_step = GraphedStep(function, training.optimizers, graphed)
    for step in range(training.step, args.segmenter_steps):
        torch.manual_seed(runs.derived_seed(args.seed, "segmenter", step))
        remaining = (args.segmenter_steps - step) / args.segmenter_steps
        set_rate(optimizer.param_groups[0], 2e-3 * min(1.0, 2 * remaining))
        losses = train_step()
        skipped = losses.pop("skipped")
        training.end_step(losses, skipped)

    content = trained.content() | {"segmenter": segmenter.state_dict()}
    trained.save_weights("weights.pt", content)
    measure_segmenter(args, segmenter.eval(), cgn, data)


def measure_segmenter(args, segmenter, cgn, data):
    """Write segmenter.json and segmentation.png.

    The segmenter is measured on images of the generator that it has not seen, and, for the report
    alone, against the digits of the training images: nothing is chosen by the latter.
    """
    torch.manual_seed(runs.derived_seed(args.seed, "segmenter test", 0))
    pairs = [segmenter_pairs(cgn, 100) for _ in range(5)]  # at once they take gigabytes
    x, truth = map(torch.cat, zip(*pairs))
    images = x.add(1).mul(127.5).round().to(torch.uint8)
    found = find_masks(segmenter, images) / 255
    generated = pictures.intersection_over_union(found, truth > 0.5).mean().item()

    index = torch.arange(min(5000, len(data)), device=data.labels.device)
    real = data.images(index, torch.Generator(index.device).manual_seed(args.seed))
    masks = find_masks(segmenter, real)
    found = {"generated IoU": generated}
    if args.dataset != "images":
        truth = data.digits[index] > data.digits.max() / 2
        found["digit IoU"] = pictures.intersection_over_union(masks / 255, truth).mean().item()
    runs.write_json(args.out / "segmenter.json", found)

    sheet = pictures.segmentation_sheet(cgn, real, masks, data.labels[index])
    pictures.save_picture(args.out / "segmentation.png", sheet)
    words = "  ".join(f"{name} {value:.3f}" for name, value in found.items())
    print(f"{args.out / 'segmentation.png'} shows masks found in real images  {words}")


# ==================================================================================================
# ImageNet

# --preset small: 64 x 64 and a hundredth of the weights. Its cGAN was trained to draw synthetic
# scenes, its U^2-Net to find their objects, see data/pretrained.
SMALL = dict(
    output_dim=64,
    z_dim=32,
    class_embed_dim=32,
    channel_width=8,
    attention_layer_position=4,
    layers=(
        (True, 16, 16),
        (False, 16, 16),
        (True, 16, 8),
        (True, 8, 8),
        (False, 8, 8),
        (True, 8, 4),
    ),
)
SMALL_WEIGHTS = runs.ROOT / "data" / "pretrained" / "small_imagenet.pt"

FULL_DEFAULTS = dict(
    binary_weight=300.0,
    style_weights=[4.0, 4.0, 4.0, 4.0],
    texture_weights=[0.0, 5.0, 5.0, 0.0],
    lr_shape=8e-6,
    lr_texture=3e-5,
    lr_background=1e-5,
    batch_size=16,
    accumulate=250,
    max_steps=300,
    ema=0.95,
    log_every=1,
    sample_every=10,
    save_every=10,
)
SMALL_DEFAULTS = dict(
    style_weights=[1.0, 1.0, 1.0, 1.0],
    texture_weights=[0.0, 1.5, 1.5, 0.0],
    lr_shape=3e-4,
    lr_texture=1e-3,
    lr_background=1e-3,
    batch_size=8,
    accumulate=1,
    max_steps=400,
    ema=0.98,
    log_every=20,
    sample_every=100,
    save_every=100,
)


# --------------------------------------------------------------------------------------------------
# ImageNet: networks. Attributes have the names of the published state dicts.


class ConditionalNorm(nn.Module):
    """Normalize by stored statistics, scale and shift by the condition, ReLU.

    Batch statistics are never used: the tables have a row for truncation 0, 0.02, ..., 1. With
    `condition` 0, weight and bias are learned directly.
    """

    def __init__(self, channels, condition):
        super().__init__()
        self.conditional = condition > 0
        self.kernels = "auto"  # backend of its kernels
        if not self.conditional:
            self.weight = nn.Parameter(torch.ones(channels))
            self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_means", torch.zeros(51, channels))
        self.register_buffer("running_vars", torch.ones(51, channels))
        if self.conditional:
            self.scale = spectral(nn.Linear(condition, channels, bias=False))
            self.offset = spectral(nn.Linear(condition, channels, bias=False))

    def statistics(self, truncation):
        """Mean and 1 / standard deviation of each channel, (C,), between the two nearest rows.

        Published code gives the two rows each other's weights, and takes a wrong row where
        truncation / 0.02 is not exact in floating point, as at 0.14. On the grid, as at 0.5 and 1,
        both agree.
        """
        row = min(int(truncation * 50), 49)
        between = truncation * 50 - row
        mean = torch.lerp(self.running_means[row], self.running_means[row + 1], between)
        variance = torch.lerp(self.running_vars[row], self.running_vars[row + 1], between)
        return mean, (variance + 1e-4).rsqrt()

    def affine(self, truncation, missing=0.0):
        """The norm as one product and one sum, which a linear layer of the condition gives: its
        weight (2 C, condition) and its bias (2 C,), for the gain and the shift of each channel.

        missing: (C,), what the input lacks and the norm has to add: the bias of a convolution.
        """
        mean, inverse_deviation = self.statistics(truncation)
        mean = mean - missing
        if self.conditional:
            gain = inverse_deviation
            shift = -mean * inverse_deviation
            weight = inverse_deviation[:, None] * self.scale.weight
            weight = torch.cat([weight, self.offset.weight - mean[:, None] * weight])
        else:  # there is no condition: a layer of no inputs, which returns its bias
            gain = inverse_deviation * self.weight
            shift = self.bias - mean * gain
            weight = mean.new_zeros(2 * len(mean), 0)
        return weight, torch.cat([gain, shift])

    def forward(self, x, gain_and_shift, weight=None, residual=None):
        """x: (N, C, H, W). gain_and_shift: (N, 2 C), what `affine`'s layer gives.

        weight: of the 1 x 1 convolution that comes next, if one does, which is then computed along
        with a residual sum. Returns its result and x for another use, see affine_convolution.
        """
        if weight is None:
            return affine_relu(x, gain_and_shift, backend=self.kernels)
        return affine_convolution(x, gain_and_shift, weight, residual, backend=self.kernels)


def derive(network, truncation, dtype=None):
    """Compute what layers use from their parameters: weights divided by their spectral norm, of
    upsampling layers the kernel, and all conditional norms as one linear layer, for this
    truncation.

    To be called whenever parameters have changed. dtype: of the weights, if not the parameters'
    own; what autocast would make of them in every batch. Returns pairs (derived tensor, the leaf
    that the layer uses): gradients gather at the leaves, over any number of batches, and
    pass_gradients hands them on. The next call keeps the leaves, as a CUDA graph knows their
    addresses, and sets their gradients to zero. Folded networks have nothing to derive.
    """
    pairs = []
    for name, layer in network.named_modules():
        if not hasattr(layer, "weight_orig"):
            continue
        weight = normalized_weight(layer)
        if isinstance(layer, UpsampleConv2d):
            weight = upsampling_kernel(weight)
        # Those of norms and self-attention become parts of other tensors below: at full precision.
        is_part = name.endswith(("scale", "offset")) or "snconv" in name
        pairs.append(set_leaf(layer, "weight", weight, None if is_part else dtype))
    for biggan in network.modules():
        if isinstance(biggan, BigGAN) and biggan.generator.bn.running_means is not None:
            pairs += derive_norms(biggan, truncation, dtype)
    return pairs


def derive_norms(biggan, truncation, dtype):
    """The conditional norms' part of `derive`: one layer gives the gains and shifts of all.

    A GPU adds a convolution's bias in a pass over the whole image, and sums the gradient over it in
    another. So the blocks leave biases out, and the next norm makes up for them. Those of conv_3
    stay missing in the residual stream, until the last norm.
    """
    generator = biggan.generator
    pairs = []
    norms = []  # with what their inputs lack
    missing = torch.zeros_like(generator.layers[0].bn_0.running_means[0])
    for layer in generator.layers:
        if isinstance(layer, SelfAttention):
            pairs += derive_attention(layer, missing, dtype)
            continue
        pairs.append(set_leaf(layer, "missing", missing))
        missing = layer.missing
        norms.append((layer.bn_0, missing))
        norms.append((layer.bn_1, layer.conv_0.bias))
        norms.append((layer.bn_2, layer.conv_1.bias))
        norms.append((layer.bn_3, layer.conv_2.bias))
        missing = missing[: layer.outputs] + layer.conv_3.bias
    norms.append((generator.bn, missing))

    width = generator.gen_z.in_features
    affine_weights = []
    affine_biases = []
    for norm, lacking in norms:
        weight, bias = norm.affine(truncation, lacking)
        weight = F.pad(weight, (0, width - weight.shape[1]))  # the last norm has no condition
        affine_weights.append(weight)
        affine_biases.append(bias)
    pairs.append(set_leaf(biggan, "affine_weight", torch.cat(affine_weights)))
    pairs.append(set_leaf(biggan, "affine_bias", torch.cat(affine_biases)))
    return pairs


def derive_attention(layer, missing, dtype):
    """Self-attention's part of `derive`: theta, phi and g in one linear layer, gamma in a weight
    instead of in a pass over the activations.

    missing: (C,), the biases that its input lacks.
    """
    convolutions = (layer.snconv1x1_theta, layer.snconv1x1_phi, layer.snconv1x1_g)
    weight = torch.cat([convolution.weight.flatten(1) for convolution in convolutions])
    output_weight = layer.gamma * layer.snconv1x1_o_conv.weight.flatten(1)
    return [
        set_leaf(layer, "weight", weight, dtype),  # (3 C / 4, C)
        set_leaf(layer, "bias", weight @ missing, dtype),  # (3 C / 4,)
        set_leaf(layer, "output_weight", output_weight, dtype),  # (C, C / 2)
    ]


@torch.no_grad()
def set_leaf(layer, name, tensor, dtype=None):
    """Give a layer a leaf with the tensor's values, in its dtype or another one.

    Returns (tensor, leaf). Gradients of the leaf gather in leaf.gathered, None before the first.
    """
    leaf = getattr(layer, name, None)
    dtype = dtype or tensor.dtype
    trained = leaf is not None and leaf.requires_grad and tensor.requires_grad
    if trained and (leaf.dtype, leaf.device) == (dtype, tensor.device):
        leaf.copy_(tensor)
        if leaf.gathered is not None:
            leaf.gathered.zero_()
        return tensor, leaf

    leaf = tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
    leaf.gathered = None
    if leaf.requires_grad:
        leaf.register_post_accumulate_grad_hook(gather_gradient)
    setattr(layer, name, leaf)
    return tensor, leaf


@torch.no_grad()
def gather_gradient(leaf):
    """Add a batch's gradient to those of the step, in float32 or better: a sum of hundreds."""
    if leaf.gathered is None:
        leaf.gathered = accumulation_type(leaf.grad)
    else:
        leaf.gathered += leaf.grad
    leaf.grad = None


def pass_gradients(pairs):
    """Hand the gradients of derived leaves on to the parameters that they come from, last first."""
    for tensor, leaf in reversed(pairs):
        if leaf.gathered is not None:
            # A copy: what PyTorch keeps as a gradient may be a part of what it is handed.
            tensor.backward(leaf.gathered.clone())


@torch.no_grad()
def fold(network, truncation=1.0):
    """Fold constants into weights, in place: spectral norms, BatchNorms, and conditional norms for
    this truncation. The network can be used, but no longer trained.
    """
    derive(network, truncation)
    for module in list(network.modules()):
        if isinstance(module, BigGAN):
            module.affine_weight = nn.Parameter(module.affine_weight)
            module.affine_bias = nn.Parameter(module.affine_bias)
        elif isinstance(module, ConditionalNorm):
            module.scale = module.offset = module.weight = module.bias = None
            module.running_means = module.running_vars = None
        elif isinstance(module, SelfAttention):
            module.weight = nn.Parameter(module.weight)
            module.bias = nn.Parameter(module.bias)
            module.output_weight = nn.Parameter(module.output_weight)
        elif hasattr(module, "weight_orig"):
            weight = module.__dict__.pop("weight")
            del module.weight_orig, module.weight_u, module.weight_v
            module.weight = nn.Parameter(weight)
        elif isinstance(module, ConvNormReLU):
            module.conv_s1 = nn.utils.fuse_conv_bn_eval(module.conv_s1, module.bn_s1)
            module.bn_s1 = nn.Identity()
    return network.requires_grad_(False).to(memory_format=torch.channels_last)


class GenBlock(nn.Module):
    """BigGAN-deep's residual block: (N, inputs, H, W) -> (N, outputs, H or 2 H, W or 2 W).

    Without the biases of its convolutions, see derive_norms.
    """

    def __init__(self, inputs, outputs, condition, up):
        super().__init__()
        middle = inputs // 4
        self.outputs = outputs
        self.up = up
        self.affine_sizes = [2 * inputs, 2 * middle, 2 * middle, 2 * middle]  # of its norms
        self.bn_0 = ConditionalNorm(inputs, condition)
        self.conv_0 = spectral(nn.Conv2d(inputs, middle, 1))
        self.bn_1 = ConditionalNorm(middle, condition)
        convolution = UpsampleConv2d if up else nn.Conv2d
        self.conv_1 = spectral(convolution(middle, middle, 3, padding=1))
        self.bn_2 = ConditionalNorm(middle, condition)
        self.conv_2 = spectral(nn.Conv2d(middle, middle, 3, padding=1))
        self.bn_3 = ConditionalNorm(middle, condition)
        self.conv_3 = spectral(nn.Conv2d(middle, outputs, 1))

    def forward(self, x, affine):
        """affine: (N, 2 inputs + 6 middle), the gains and shifts of its norms."""
        affine_0, affine_1, affine_2, affine_3 = affine.split(self.affine_sizes, 1)
        h, x = self.bn_0(x, affine_0, self.conv_0.weight)  # (N, middle, H, W), and x as it was
        h = self.bn_1(h, affine_1)
        if self.up:
            h = upsample_conv2d(h, self.conv_1.weight)  # (N, middle, 2 H, 2 W)
        else:
            h = F.conv2d(h, self.conv_1.weight, padding=1)
        h = F.conv2d(self.bn_2(h, affine_2), self.conv_2.weight, padding=1)
        # Where the channels become fewer, the last ones of x are left out.
        y, _ = self.bn_3(h, affine_3, self.conv_3.weight, x)
        return y


class SelfAttention(nn.Module):
    """Each position looks at all positions of the half-sized image (Zhang et al. 2019).

    Its first three convolutions are computed in one, see derive_attention.
    """

    def __init__(self, channels):
        super().__init__()
        self.affine_sizes = []  # it has no norms
        self.kernels = "auto"  # backend of its pooling
        self.gamma = nn.Parameter(torch.zeros(1))
        self.snconv1x1_theta = spectral(nn.Conv2d(channels, channels // 8, 1, bias=False))
        self.snconv1x1_phi = spectral(nn.Conv2d(channels, channels // 8, 1, bias=False))
        self.snconv1x1_g = spectral(nn.Conv2d(channels, channels // 2, 1, bias=False))
        self.snconv1x1_o_conv = spectral(nn.Conv2d(channels // 2, channels, 1, bias=False))

    def forward(self, x, _):
        _, channels, height, width = x.shape
        h = F.linear(x.permute(0, 2, 3, 1), self.weight, self.bias)  # (N, H, W, 3 C / 4)
        query, h = h.split([channels // 8, channels * 5 // 8], 3)
        h = max_pool(h.permute(0, 3, 1, 2), backend=self.kernels).permute(0, 2, 3, 1)
        query = query.flatten(1, 2)  # (N, H W, C / 8)
        key, value = h.flatten(1, 2).split([channels // 8, channels // 2], 2)  # (N, H W / 4, ...)
        seen = attention(query, key, value)  # (N, H W, C / 2)
        seen = F.linear(seen, self.output_weight)  # (N, H W, C)
        return x + seen.transpose(1, 2).unflatten(2, (height, width))


# (doubles the size, inputs, outputs) of each block of BigGAN-deep-256, in units of channel_width.
LAYERS_256 = (
    (False, 16, 16),
    (True, 16, 16),
    (False, 16, 16),
    (True, 16, 8),
    (False, 8, 8),
    (True, 8, 8),
    (False, 8, 8),
    (True, 8, 4),
    (False, 4, 4),
    (True, 4, 2),
    (False, 2, 2),
    (True, 2, 1),
)


class BigGAN(nn.Module):
    """The generator of BigGAN-deep (Brock et al. 2019). Without arguments, the one for 256 x 256.

    layers: as LAYERS_256. Self-attention comes before the block at attention_layer_position.
    """

    def __init__(
        self,
        output_dim=256,
        z_dim=128,
        class_embed_dim=128,
        channel_width=128,
        num_classes=1000,
        layers=LAYERS_256,
        attention_layer_position=8,
    ):
        super().__init__()
        doublings = sum(up for up, _, _ in layers)
        assert 4 * 2**doublings == output_dim, "blocks that double the size make it output_dim"
        condition = z_dim + class_embed_dim
        last_width = layers[-1][2] * channel_width
        self.z_dim = z_dim
        self.recompute = False  # whether blocks keep no activations for their derivative
        self.embeddings = nn.Linear(num_classes, class_embed_dim, bias=False)
        self.generator = nn.Module()
        self.generator.gen_z = spectral(nn.Linear(condition, 4 * 4 * layers[0][1] * channel_width))
        self.generator.layers = nn.ModuleList()
        for position, (up, inputs, outputs) in enumerate(layers):
            inputs *= channel_width
            outputs *= channel_width
            if position == attention_layer_position:
                self.generator.layers.append(SelfAttention(inputs))
            self.generator.layers.append(GenBlock(inputs, outputs, condition, up))
        # How many gains and shifts each layer has, and the last norm.
        self.affine_sizes = [sum(layer.affine_sizes) for layer in self.generator.layers]
        self.affine_sizes.append(2 * last_width)
        self.generator.bn = ConditionalNorm(last_width, 0)
        self.generator.conv_to_rgb = spectral(nn.Conv2d(last_width, last_width, 3, padding=1))

    def class_vectors(self, y):
        """Classes (N,) -> embeddings (N, class_embed_dim), which can be mixed between classes."""
        return F.embedding(y, self.embeddings.weight.t())

    def forward(self, z, y):
        """Images (N, 3, H, W) in [-1, 1], for the truncation that `derive` or `fold` was given.

        z: (N, z_dim), truncated normal times truncation. y: classes (N,), or class vectors.
        """
        generator = self.generator
        vectors = y if y.is_floating_point() else self.class_vectors(y)
        condition = torch.cat([z, vectors], 1)
        # Channels last, as in the published code: so are all activations.
        h = generator.gen_z(condition).unflatten(1, (4, 4, -1)).permute(0, 3, 1, 2)  # (N, C, 4, 4)
        with without_autocast(condition):
            affine = F.linear(condition, self.affine_weight, self.affine_bias)
        *affines, last_affine = affine.split(self.affine_sizes, 1)
        for layer, affine in zip(generator.layers, affines):
            if self.recompute and torch.is_grad_enabled():
                h = torch.utils.checkpoint.checkpoint(
                    layer, h, affine, use_reentrant=False, preserve_rng_state=False
                )
            else:
                h = layer(h, affine)
        h = generator.bn(h, last_affine)
        # Only the first 3 of the last convolution's outputs are used: no others are computed.
        rgb = generator.conv_to_rgb
        return F.conv2d(h, rgb.weight[:3], rgb.bias[:3], padding=1).float().tanh()


class ImageNetCGN(nn.Module):
    """Three trainable BigGANs as mechanisms, a frozen one as the source of targets, and a frozen
    U^2-Net for masks. cgan: with the source of targets, which only training needs.
    """

    def __init__(self, small_u2net=False, cgan=True, **config):
        super().__init__()
        if cgan:
            self.biggan_GT = BigGAN(**config).requires_grad_(False)
        self.f_shape = BigGAN(**config)
        self.f_text = BigGAN(**config)
        self.f_bg = BigGAN(**config)
        self.u2net = U2Net(small_u2net).requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        for network in self.children():
            # Frozen networks use no batch statistics.
            trainable = any(parameter.requires_grad for parameter in network.parameters())
            network.train(mode and trainable)
        return self

    def forward(self, z, y):
        """z: (N, z_dim). y: classes (N, 3) of shape, texture and background.

        Returns premask (N, 3, H, W), mask (N, 1, H, W), foreground, background (N, 3, H, W), and
        the saliency of the background (N, 1, H, W).
        """
        shape, texture, scene = y.unbind(1)
        premask = self.f_shape(z, shape)
        foreground = self.f_text(z, texture)
        background = self.f_bg(z, scene)
        dtype = self.u2net.outconv.weight.dtype
        with without_autocast(premask):
            mask, saliency = self.u2net(torch.cat([premask, background]).to(dtype)).chunk(2)
        return premask, mask.clamp(1e-4, 1 - 1e-4), foreground, background, saliency


def truncated_normal(shape, generator):
    """Standard normal numbers on [-2, 2], float32, by inversion of the distribution."""
    low = 0.5 * (1 + math.erf(-2 / math.sqrt(2)))  # what lies below -2
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return torch.special.ndtri(low + (1 - 2 * low) * uniform).float()


# --------------------------------------------------------------------------------------------------
# ImageNet: weights of the networks


@torch.no_grad()
def random_networks(config, small_u2net, seed=0):
    """State dicts of a BigGAN and a U^2-Net with random weights, and statistics that keep the
    variance in every layer. The same seed gives the same weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        biggan = BigGAN(**config).eval()
        u2net = U2Net(small_u2net).eval()
        hooks = []
        for module in [*biggan.modules(), *u2net.modules()]:
            if isinstance(module, (ConditionalNorm, nn.BatchNorm2d)):
                hooks.append(module.register_forward_pre_hook(set_statistics))
        # At first far from the ends of tanh and sigmoid, to measure what goes into them.
        biggan.generator.conv_to_rgb.bias.zero_()
        biggan.generator.bn.weight *= 0.01
        for layer in biggan.generator.layers.modules():
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                layer.bias.zero_()  # blocks leave them out, and what norms see has to be measured
        u2net.outconv.weight *= 0.01
        z = torch.randn(8, biggan.z_dim)
        y = torch.randint(biggan.embeddings.in_features, (8,))
        for _ in range(10):
            power_iteration(biggan)
        derive(biggan, 1.0)
        images = biggan(z, y)
        biggan.generator.bn.weight /= images.atanh().std()
        logits = u2net(images / images.std()).logit()
        for hook in hooks:
            hook.remove()
        factor = 4 / logits.std()  # masks that are decided, as a trained network's are
        u2net.outconv.weight *= factor
        u2net.outconv.bias.copy_((u2net.outconv.bias - logits.mean()) * factor)
    return biggan.state_dict(), u2net.state_dict()


def set_statistics(norm, inputs):
    """A forward hook: the statistics of a norm become those of its input within each image.

    Gains and shifts that go into a conditional norm are of mean 0 and variance 1: new ones are
    returned.
    """
    x, *others = inputs
    mean = x.mean((0, 2, 3))
    variance = x.var((2, 3)).mean(0)  # within images only: what differs between them stays
    if not others:
        norm.running_mean[:] = mean
        norm.running_var[:] = variance
        return None
    norm.running_means[:] = mean
    norm.running_vars[:] = variance
    affine, *others = others
    gain, shift = affine.chunk(2, 1)
    gain = gain * ((1 + 1e-4) / (variance + 1e-4)).sqrt()
    return x, torch.cat([gain, shift - mean * gain], 1), *others


def load_imagenet_generator(path, raw=False):
    """The mechanisms and U^2-Net from our weights.pt or the published cgn.pth, without the cGAN.

    raw: the trained weights themselves instead of their moving average. Returns the ImageNetCGN in
    eval mode, and the arguments of its training. UserError for a file that is missing, damaged or
    of another network.
    """
    content = runs.load_tensors(path)
    args = content.get("args") if isinstance(content, dict) else None
    args = args if isinstance(args, dict) else {}
    small = args.get("preset") == "small"
    state = content.get("average", content) if isinstance(content, dict) else content
    state = weights.strip_module_prefix(state, path)
    if raw and "generator" in content:
        state |= weights.strip_module_prefix(content["generator"], path)
    state = {name: value for name, value in state.items() if not name.startswith("biggan_GT.")}
    with torch.device("meta"):
        cgn = ImageNetCGN(small, cgan=False, **(SMALL if small else {}))
    state = weights.check_state_dict(state, cgn.state_dict(), path)
    cgn.load_state_dict({name: to_float32(value) for name, value in state.items()}, assign=True)
    return cgn.eval(), args


def to_float32(value):
    """A tensor of a file: floating-point numbers in float32, integers as they are."""
    return value.float() if value.is_floating_point() else value


def load_cgan_and_u2net(args, given):
    """State dicts of the BigGAN that the four begin as, and of U^2-Net.

    given: the generator of --weights, which brings its U^2-Net, or None.
    """
    small = args.preset == "small"
    with torch.device("meta"):  # what their files should hold
        empty_biggan = BigGAN(**(SMALL if small else {}))
        empty_u2net = U2Net(small)
    biggan = u2net = None
    if small:
        bundled = runs.load_tensors(SMALL_WEIGHTS)
        biggan, u2net = bundled["biggan"], bundled["u2net"]
    elif args.offline:
        biggan, u2net = random_networks({}, small_u2net=False, seed=1)
    if args.biggan or biggan is None:
        entry = download.FILES["biggan"]
        expected = empty_biggan.state_dict()
        biggan = weights.load_network(entry, args.weights_dir, args.biggan, expected)
    if given:
        u2net = given.u2net.state_dict()
    elif args.u2net or not args.offline:
        entry = download.FILES["u2netp" if small else "u2net"]
        expected = empty_u2net.state_dict()
        u2net = weights.load_network(entry, args.weights_dir, args.u2net, expected)
    return biggan, u2net


def load_imagenet_networks(args):
    """An ImageNetCGN whose four BigGANs are alike, and one without the cGAN for the moving average.

    Both on the CPU. With --weights, both begin as those. UserError for files that do not fit.
    """
    small = args.preset == "small"
    config = SMALL if small else {}
    given = None
    if args.weights:
        given, arguments = load_imagenet_generator(args.weights)
        if (arguments.get("preset") == "small") != small:
            raise runs.UserError(f"--weights {args.weights}: of another --preset")
    biggan, u2net = load_cgan_and_u2net(args, given)
    with torch.device("meta"):
        cgn = ImageNetCGN(small, **config)
        average = ImageNetCGN(small, cgan=False, **config)
    for network in (cgn, average):
        for name, part in network.named_children():
            state = u2net if name == "u2net" else biggan
            copied = {key: to_float32(value).clone() for key, value in state.items()}
            part.load_state_dict(copied, assign=True)
    if given:
        cgn.load_state_dict(given.state_dict(), strict=False)  # all but the cGAN
        average = given
    return cgn, average


# --------------------------------------------------------------------------------------------------
# ImageNet: losses


def imagenet_losses(args, vgg, outputs, x_gt, windows):
    """Weighted losses by name (section 3.2 and appendix B), and the mean mask of each image (N,).

    outputs: of ImageNetCGN. x_gt: the cGAN's images (N, 3, H, W) of the same latents and classes.
    windows: (N, 36), which windows of x_gt show the object's texture, see draw_patch_windows.
    """
    _, mask, foreground, background, saliency = outputs
    composed, copy = composite_losses_and_copy(
        mask,
        foreground,
        background,
        x_gt,
        copy_dtype=vgg.convolutions[0].weight.dtype if vgg else None,  # as VGG-16 wants it
        backend=args.kernels,
    )
    losses = {
        "reconstruction": args.reconstruction_weight * composed.l1,
        "binary": args.binary_weight * composed.binary,
        "mask": args.mask_weight * composed.mask_interval,
        "background": args.background_weight * saliency.mean(),
    }
    if any(args.style_weights):
        losses["style"] = perceptual_loss(vgg, copy, x_gt, args.style_weights, args.kernels)
    if any(args.texture_weights):
        patches = sample_patch_images(x_gt, mask.detach(), windows, backend=args.kernels)
        losses["texture"] = perceptual_loss(
            vgg, foreground, patches, args.texture_weights, args.kernels
        )
    return losses, composed.mask_mean.detach()


# --------------------------------------------------------------------------------------------------
# ImageNet: flags


def imagenet_flags(parser, preset):
    """Flags of ImageNet, with the defaults of the preset."""
    common_flags(parser)
    group = parser.add_argument_group("networks")
    group.add_argument(
        "--preset", choices=["full", "small"], default="full",
        help="256 x 256 with published weights, or 64 x 64 with few channels and a cGAN of drawn "
        "scenes: minutes on a CPU",
    )
    group.add_argument(
        "--biggan", type=Path, help="BigGAN-deep-256's file, if not in --weights-dir"
    )
    group.add_argument("--u2net", type=Path, help="U^2-Net's file, if not in --weights-dir")
    group.add_argument(
        "--truncation", type=runs.truncation, default=1.0,
        help="truncation of the latents and of the norms' statistics, (0, 1]",
    )

    group.add_argument(
        "--classes", nargs="+", metavar="CLASS",
        help="train on these alone: numbers, WNIDs, (parts of) English names, files with one per "
        "line, imagenette, imagenet-a",
    )

    group = parser.add_argument_group("losses of ImageNet")
    group.add_argument(
        "--reconstruction-weight", type=runs.non_negative_float, default=100.0,
        help="weight of the mean absolute error of the composite against the cGAN's image",
    )
    group.add_argument(
        "--mask-weight", type=runs.non_negative_float, default=500.0,
        help="weight of mean masks outside [0.1, 0.9]",
    )
    group.add_argument(
        "--background-weight", type=runs.non_negative_float, default=2000.0,
        help="weight of the background's saliency",
    )
    group.add_argument(
        "--texture-weights", type=runs.non_negative_float, nargs=4, metavar="W",
        help="the same as --style-weights, of the foreground against patches of the object",
    )

    group = parser.add_argument_group("optimization")
    group.add_argument(
        "--accumulate", type=runs.positive_int,
        help="batches in a step, whose gradients are averaged",
    )
    group.add_argument(
        "--lr-shape", type=runs.non_negative_float, help="learning rate of the shape mechanism"
    )
    group.add_argument(
        "--lr-texture", type=runs.non_negative_float, help="the same of the texture mechanism"
    )
    group.add_argument(
        "--lr-background", type=runs.non_negative_float, help="the same of the background mechanism"
    )
    group.add_argument(
        "--recompute", action="store_true",
        help="activation checkpointing: less memory, blocks run again in the backward pass",
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the mechanisms")
    group.add_argument(
        "--graph", choices=["auto", "off"], default="auto",
        help="record a batch as a CUDA graph; auto: on a GPU",
    )

    parser.set_defaults(**FULL_DEFAULTS)
    if preset == "small":
        parser.set_defaults(**SMALL_DEFAULTS)


# --------------------------------------------------------------------------------------------------
# ImageNet: training


def imagenet_classes(args, cgn):
    """The classes to train on, int64 (n,): args.class_indices, or all of the network's."""
    return torch.tensor(args.class_indices or range(cgn.f_shape.embeddings.in_features))


def draw_inputs(args, classes, z_dim, step):
    """Latents (A, N, z_dim), classes (A, N) and windows (A, N, 36) of A batches of N images.

    Drawn on the CPU, for all ranks together, so that images are the same on any number of GPUs.
    """
    z, y, windows = [], [], []
    for part in range(args.accumulate):
        generator = runs.seeded_generator(args.seed, "step", step * args.accumulate + part)
        z.append(args.truncation * truncated_normal((args.batch_size, z_dim), generator))
        y.append(classes[torch.randint(len(classes), (args.batch_size,), generator=generator)])
        windows.append(draw_patch_windows(args.batch_size, generator))
    return torch.stack(z), torch.stack(y), torch.stack(windows)


def average_gradients(optimizer, world_size):
    """Make each gradient its mean over all GPUs."""
    if world_size == 1:
        return
    for group in optimizer.param_groups:
        gradients = [parameter.grad for parameter in group["params"]]
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
        torch._foreach_div_(gradients, world_size)


def imagenet_sheet(networks, args):
    """What the moving average draws now, for six classes."""
    average = networks["average"]
    derive(average, args.truncation)
    device = next(average.parameters()).device
    classes = imagenet_classes(args, average)
    y = classes[torch.linspace(0, len(classes) - 1, 6).long()]
    fixed = torch.Generator().manual_seed(0)  # the same latents every time, so that sheets compare
    z = args.truncation * truncated_normal((6, average.f_shape.z_dim), fixed)
    cgan = networks["generator"].biggan_GT
    return pictures.imagenet_mechanism_sheet(average, cgan, z.to(device), y.to(device))


def imagenet_batch(args, cgn, vgg, bf16, z, y, windows):
    """Losses of a batch, () each by name; their gradients are added to those of the step.

    z: (N, z_dim). y: (N,) classes. windows: (N, 36), which of the best windows make a patch image.
    """
    with torch.no_grad():
        x_gt = cgn.biggan_GT(z.to(torch.bfloat16 if bf16 else torch.float32), y)
    with torch.autocast(z.device.type, torch.bfloat16, enabled=bf16):
        outputs = cgn(z, y[:, None].expand(-1, 3))
    losses, mask_mean = imagenet_losses(args, vgg, outputs, x_gt, windows)
    loss = sum(losses.values()) / args.accumulate
    loss.backward()

    losses["mask_mean"] = mask_mean.mean()
    losses["mask_spread"] = mask_mean.std(correction=0)
    return {name: value.detach() for name, value in losses.items()}


def train_imagenet(args, device):
    """Train the mechanisms on the cGAN's images. Everything is written into args.out."""
    torch.manual_seed(args.seed)
    if args.compile:
        runs.check_compiler()
    args.class_indices = None
    if args.classes:  # once and for all: a file of classes may change later
        args.class_indices = imagenet.class_indices(args.classes)
    bf16 = runs.pick_bf16(args.amp, device)
    dtype = torch.bfloat16 if bf16 else torch.float32
    rank, world_size = runs.rank_and_world_size()
    if args.batch_size % world_size:
        raise runs.UserError(
            f"--batch-size {args.batch_size}: cannot be shared out evenly over {world_size} GPUs"
        )

    # Networks
    vgg_weights = [max(pair) for pair in zip(args.style_weights, args.texture_weights)]
    vgg = load_vgg(args, device, bf16, vgg_weights)
    cgn, average = load_imagenet_networks(args)
    # cgn's U^2-Net is folded below, for speed; weights.pt holds the average's, as published.
    u2net_before = copy.deepcopy(average.u2net.state_dict())
    fold(cgn.biggan_GT.eval(), args.truncation).to(dtype)
    fold(cgn.u2net.eval()).to(dtype)
    # Convolutions of images that are channels last want their weights so, too.
    cgn.to(device, memory_format=torch.channels_last).train()
    average.to(device).requires_grad_(False).eval()
    for module in [*cgn.modules(), *average.modules()]:
        if hasattr(module, "kernels"):
            module.kernels = args.kernels
    for mechanism in (cgn.f_shape, cgn.f_text, cgn.f_bg):
        mechanism.recompute = args.recompute
        if args.compile:
            mechanism.compile()
    classes = imagenet_classes(args, cgn)

    # Optimizer
    groups = [
        {"params": list(cgn.f_shape.parameters()), "lr": args.lr_shape},
        {"params": list(cgn.f_text.parameters()), "lr": args.lr_texture},
        {"params": list(cgn.f_bg.parameters()), "lr": args.lr_background},
    ]
    optimizer = torch.optim.Adam(groups, fused=True)
    training = checkpoints.Training(
        args.out,
        args,
        {"generator": cgn, "average": average},
        [optimizer],
        args.max_steps,
        device,
        written=("generator", "average"),
        draw_sheet=imagenet_sheet,
    )
    for key, value in average.u2net.state_dict().items():
        if not torch.equal(value.cpu(), u2net_before[key]):
            raise runs.UserError(
                "--resume: U^2-Net is not the one that this run began with; give the same --u2net "
                "or --weights"
            )
    del u2net_before
    runs.describe_run(args.out, __file__, vars(args))
    if rank == 0:
        print(
            f"imagenet on {world_size} x {device}, {'bf16' if bf16 else 'float32'}, "
            f"steps {training.step} to {args.max_steps}"
        )

    function = functools.partial(imagenet_batch, args, cgn, vgg, bf16)
    graphed = args.graph == "auto" and device.type == "cuda"
    train_batch = GraphedStep(function, [], graphed)
    for step in range(training.step, args.max_steps):
        # Data: each rank takes its share of each batch.
        z, y, windows = draw_inputs(args, classes, cgn.f_shape.z_dim, step)
        z = z.chunk(world_size, 1)[rank].to(device)
        y = y.chunk(world_size, 1)[rank].to(device)
        windows = windows.chunk(world_size, 1)[rank].to(device)

        # Mechanisms: what depends on weights alone is computed once for all batches of the step.
        # Gradients stay where they are, as a graph adds to them there.
        optimizer.zero_grad(set_to_none=False)
        power_iteration(cgn)
        derived = derive(cgn, args.truncation, dtype)
        metrics = {}
        for inputs in zip(z, y, windows):
            for name, value in train_batch(*inputs).items():
                metrics[name] = metrics.get(name, 0) + value / args.accumulate
        pass_gradients(derived)
        average_gradients(optimizer, world_size)
        skipped = checkpoints.finite_step(optimizer, sum(metrics.values()))

        # Moving average
        update_average(average, cgn, min(args.ema, (step + 1) / (step + 10)))

        # Log, sheet, checkpoint, stop
        training.end_step(metrics, skipped)
    if rank == 0:
        words = ("generate.py", "--dataset", "imagenet", "--weights", args.out / "weights.pt")
        print(f"{args.out / 'sheet.png'} shows the mechanisms; next: {runs.command_line(*words)}")


# ==================================================================================================
# Command line


def parse_args(argv=None):
    """The arguments of one run. --dataset and --preset choose the flags and their defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    small = [*mnist.VARIANTS, "images"]
    parser.add_argument(
        "--dataset", required=True, choices=[*small, "imagenet"],
        help="chooses the other flags and their defaults: --dataset NAME --help shows them; images "
        "is a folder of your own",
    )
    dataset, preset = runs.look_ahead(argv, "--dataset", "--preset")
    if dataset == "imagenet":
        imagenet_flags(parser, preset)
    elif dataset in small:
        groups = mnist_flags(parser, dataset, preset)
    args = parser.parse_args(argv)
    if dataset in small:
        check_mnist_flags(parser, args, *groups)
    elif args.max_steps == 0:
        parser.error("--max-steps 0: not on ImageNet")
    elif args.weights and args.u2net:
        parser.error("--u2net: has no meaning with --weights, which hold theirs")
    return args


def main():
    args = parse_args()
    runs.check_one_process(args.dataset)
    device = runs.join_ranks(runs.pick_device(args.device))
    try:
        use_triton(args.kernels, torch.empty(0, device=device))
    except ValueError as error:
        raise runs.UserError(f"--kernels {args.kernels}: {error}") from None
    if args.dataset == "images":
        folders.check_out(args.data_dir, args.out)
    if args.offline and runs.is_main_rank():
        print(runs.OFFLINE)
    with runs.claim_folder(args.out, __file__, args.resume):
        if args.dataset == "imagenet":
            train_imagenet(args, device)
        else:
            train_mnist(args, device)


if __name__ == "__main__":
    runs.run_main(main)
