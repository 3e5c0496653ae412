"""Time a training step of colored MNIST as it is against a plain one, adding one change at a time.

    python kernels/benchmark_step.py

The plain form: float32, channels first, all 13 convolutions of VGG-16 for both images with
gradients recorded for both, upsampling as a layer of its own, Gram matrices by plain autograd, and
the discriminator run on real and generated images apart. Level n has the first n changes. The
levels take turns, round after round, so that a slow moment of the machine hits all of them.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_cgn  # noqa: E402  (needs the path above)
from data import mnist, runs, weights  # noqa: E402
from kernels import UpsampleConv2d, gram_matrix, shuffle_patches, style_loss  # noqa: E402

# The level from which on each change is in.
FIXED_TARGET = 1
SHORT_VGG = 2
CHANNELS_LAST = 3
GRAM_BACKWARD = 4
FUSED_UPSAMPLING = 5
ONE_PASS = 6
BF16 = 7

LEVELS = {
    0: "plain",
    FIXED_TARGET: "no gradient of the target",
    SHORT_VGG: "VGG-16 up to the last used layer",
    CHANNELS_LAST: "VGG-16 channels last",
    GRAM_BACKWARD: "one product in the Gram backward",
    FUSED_UPSAMPLING: "upsampling inside the convolution",
    ONE_PASS: "one discriminator pass",
    BF16: "bf16",
}
WARMUP = 2  # rounds before timing begins


# --------------------------------------------------------------------------------------------------
# Networks and data of a level


class PlainUpsample(nn.Module):
    """The published order: upsample, then convolve."""

    def __init__(self, convolution):
        super().__init__()
        self.weight = convolution.weight

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2)
        return F.conv2d(x, self.weight, padding=1)


class State(NamedTuple):
    """What a training step needs."""

    args: argparse.Namespace  # of train_cgn.py, with the style loss off: train_step has its own
    style_weights: list
    vgg: nn.Module
    cgn: nn.Module
    discriminator: nn.Module
    optimizer: torch.optim.Optimizer
    discriminator_optimizer: torch.optim.Optimizer
    x_gt: torch.Tensor  # (N, 3, 32, 32) in [-1, 1]
    y: torch.Tensor  # (N,), the classes of real and generated images
    z: torch.Tensor  # (N, 32)
    offsets: torch.Tensor  # (2, N, 2), of the two textures


def make_state(level, batch_size):
    """The State of a level, with the same weights and data for every level."""
    flags = "--dataset colored_mnist --discriminator linear --ndf 512 --adversarial squares --r1 0"
    args = train_cgn.parse_args([*flags.split(), "--out", "unused"])
    style_weights = args.style_weights
    args.style_weights = [0.0] * len(style_weights)

    vgg = make_vgg(level, style_weights)
    torch.manual_seed(0)
    cgn = train_cgn.MnistCGN()
    if level < FUSED_UPSAMPLING:
        unfuse_upsampling(cgn)
    discriminator = train_cgn.LinearDiscriminator(args.ndf)
    betas = (0.5, 0.999)
    return State(
        args=args,
        style_weights=style_weights,
        vgg=vgg,
        cgn=cgn,
        discriminator=discriminator,
        optimizer=torch.optim.Adam(cgn.parameters(), 2e-4, betas, fused=True),
        discriminator_optimizer=torch.optim.Adam(
            discriminator.parameters(), 2e-4, betas, fused=True
        ),
        x_gt=torch.rand(batch_size, 3, mnist.SIZE, mnist.SIZE) * 2 - 1,
        y=torch.randint(len(mnist.NAMES), (batch_size,)),
        z=torch.randn(batch_size, train_cgn.LATENT),
        offsets=torch.randint(mnist.SIZE, (2, batch_size, 2)),
    )


def make_vgg(level, style_weights):
    """VGG-16 with random weights, as deep and in the layout and dtype of a level."""
    depth = len(weights.VGG16_CONVOLUTIONS)
    if level >= SHORT_VGG:
        pairs = zip(weights.STYLE_CONVOLUTIONS, style_weights)
        depth = max(layer for layer, weight in pairs if weight)
    state = weights.random_vgg16_features(depth)
    if level < CHANNELS_LAST:
        return weights.VGG16Features(state, memory_format=torch.contiguous_format)
    vgg = weights.VGG16Features(state)
    return vgg.bfloat16() if level >= BF16 else vgg


def unfuse_upsampling(cgn):
    """Replace the layers that upsample within the convolution, in place."""
    for mechanism in (cgn.f_shape, cgn.f_text1, cgn.f_text2):
        for index, layer in enumerate(mechanism):
            if isinstance(layer, UpsampleConv2d):
                mechanism[index] = PlainUpsample(layer)


# --------------------------------------------------------------------------------------------------
# The step


def train_step(state, level):
    """One step of the generator and of the discriminator, in the form of a level."""
    args = state.args
    y = state.y

    # Generator
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=level >= BF16)
    judge = autocast(state.discriminator.forward)
    state.discriminator.requires_grad_(False)
    with autocast:
        mask, foreground, background = state.cgn(state.z, y)
    foreground = shuffle_patches(foreground, state.offsets[0])
    background = shuffle_patches(background, state.offsets[1])
    losses, x_gen, _ = train_cgn.generator_losses(
        args,
        None,
        judge,
        (mask, foreground, background),
        state.x_gt,
        y,
        warming_up=False,
        style=False,
    )
    loss = sum(losses.values()) + plain_perceptual_loss(state, level, x_gen)
    state.optimizer.zero_grad()
    loss.backward()
    state.optimizer.step()

    # Discriminator
    state.discriminator.requires_grad_(True)
    x_gen = x_gen.detach()
    state.discriminator_optimizer.zero_grad()
    if level >= ONE_PASS:
        loss = train_cgn.discriminator_loss(
            args, judge, state.x_gt, y, x_gen, y, penalty=False
        )
    else:
        real = judge(state.x_gt, y)
        fake = judge(x_gen, y)
        loss = ((real - 1).square().mean() + fake.square().mean()) / 2
    loss.backward()
    state.discriminator_optimizer.step()


def plain_perceptual_loss(state, level, image):
    """The style loss of image (N, 3, 32, 32) against the real images."""
    if level >= FIXED_TARGET:
        with torch.no_grad():
            target_features = state.vgg(state.x_gt)
    else:
        target = state.x_gt.clone().requires_grad_()
        target_features = state.vgg(target)
    features = state.vgg(image)

    loss = 0
    for weight, layer, target_layer in zip(state.style_weights, features, target_features):
        if not weight:
            continue
        if level >= GRAM_BACKWARD:
            distance = style_loss(layer, target_layer)
        else:
            distance = (gram_matrix(layer) - gram_matrix(target_layer)).abs().mean()
        loss = loss + 5000 * weight**2 * distance
    return loss


# --------------------------------------------------------------------------------------------------
# Command line


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--rounds", type=runs.positive_int, default=12, help="timed steps of each level"
    )
    parser.add_argument(
        "--batch-size", type=runs.positive_int, default=16, help="real images in a step"
    )
    return parser.parse_args()


def timed_levels():
    """The levels; without bf16 where --amp auto takes float32, which is nine times faster there."""
    levels = dict(LEVELS)
    if not runs.pick_bf16("auto", torch.device("cpu")):
        del levels[BF16]
    return levels


def main():
    args = parse_args()
    levels = timed_levels()
    states = {level: make_state(level, args.batch_size) for level in levels}
    seconds = {level: [] for level in levels}
    for round_index in range(WARMUP + args.rounds):
        for level, state in states.items():
            train_step(state, level)  # brings the level's own data into the cache
            start = time.perf_counter()
            train_step(state, level)
            taken = time.perf_counter() - start
            if round_index >= WARMUP:
                seconds[level].append(taken)

    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"batch {args.batch_size}, median of {args.rounds} rounds"
    )
    plain = statistics.median(seconds[0])
    for level, name in levels.items():
        median = statistics.median(seconds[level])
        plus = "+ " if level else ""
        print(f"{plus + name:42}{1000 * median:8.1f} ms {100 * median / plain:6.0f} %")


if __name__ == "__main__":
    main()
