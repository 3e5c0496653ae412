"""Time an ImageNet counterfactual and a batch of training, one change to a plain form at a time.

    python kernels/benchmark_imagenet.py
    python kernels/benchmark_imagenet.py --tasks training --levels 0 5 --calls 1

Full size, 256 x 256, batch 1, random weights. The plain form: nothing folded, float32, channels
first, upsampling before the convolution, all 128 channels of the last one, all of VGG-16, spectral
norms computed in every batch, and in generation the cGAN and the background's saliency, too. Level
n has the first n changes. What training does once in 250 batches (Adam's step; from its level on,
the spectral norms) is left out. Each level runs in a process of its own, for its peak memory; the
first call warms up, and the median of the next ones is printed.
"""

import argparse
import concurrent.futures
import multiprocessing
import resource
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
from data import runs, weights  # noqa: E402
from kernels import (  # noqa: E402
    UpsampleConv2d,
    compose,
    draw_patch_windows,
    power_iteration,
    upsample_conv2d,
)

# The level from which on each change is in. The first one is not the same in the two tasks.
FEWER_NETWORKS = 1
SHORT_VGG = 1
CHEAPER_CONVOLUTIONS = 2
CHANNELS_LAST = 3
FOLDED = 4
BF16 = 5
ONCE_PER_STEP = 6
KEPT_MEMORY = 7
RECOMPUTE = 8

GENERATION = {
    0: "plain",
    FEWER_NETWORKS: "only the three mechanisms and one mask",
    CHEAPER_CONVOLUTIONS: "upsampling inside the convolution, 3 channels of the last",
    CHANNELS_LAST: "channels last, one product and sum for each norm",
    FOLDED: "folded weights",
    BF16: "bf16",
    KEPT_MEMORY: "memory of large tensors kept for the next ones",
}
TRAINING = {
    0: "plain",
    SHORT_VGG: "VGG-16 up to the last used layer",
    CHEAPER_CONVOLUTIONS: "upsampling inside the convolution, 3 channels of the last",
    CHANNELS_LAST: "channels last, one product and sum for each norm",
    FOLDED: "frozen networks folded",
    BF16: "bf16",
    ONCE_PER_STEP: "what depends on weights alone, once per step",
    KEPT_MEMORY: "memory of large tensors kept for the next ones",
    RECOMPUTE: "--recompute: less memory, not less time",
}
TASKS = {"generation": GENERATION, "training": TRAINING}
TRUNCATION = 0.5
# As --amp auto decides: without instructions for bf16 a CPU takes nine times as long in it. Its
# level is left out there, and later ones are in float32.
HAS_BF16 = runs.pick_bf16("auto", torch.device("cpu"))


# --------------------------------------------------------------------------------------------------
# Plain forms


def plain_norm(norm, x, condition):
    """ConditionalNorm.forward step by step: normalize, then scale and shift, then ReLU."""
    mean, inverse_deviation = norm.statistics(TRUNCATION)
    x = (x - mean[None, :, None, None]) * inverse_deviation[None, :, None, None]
    if norm.conditional:
        gain = 1 + norm.scale(condition)  # (N, C)
        shift = norm.offset(condition)
    else:
        gain = norm.weight[None]  # (1, C)
        shift = norm.bias[None]
    return F.relu(x * gain[..., None, None] + shift[..., None, None])


def plain_block(block, x, condition, level):
    """GenBlock.forward with plain norms, and plain upsampling below CHEAPER_CONVOLUTIONS."""
    h = block.conv_0(plain_norm(block.bn_0, x, condition))
    h = plain_norm(block.bn_1, h, condition)
    if not block.up:
        h = block.conv_1(h)
    elif level < CHEAPER_CONVOLUTIONS:
        h = block.conv_1(F.interpolate(h, scale_factor=2))
    else:
        h = upsample_conv2d(h, block.conv_1.weight, block.conv_1.bias)
    h = block.conv_2(plain_norm(block.bn_2, h, condition))
    h = block.conv_3(plain_norm(block.bn_3, h, condition))
    skip = x[:, : block.outputs]
    if block.up:
        skip = F.interpolate(skip, scale_factor=2)
    return h + skip


def plain_attention(attention, x):
    """SelfAttention.forward with a convolution for each of theta, phi and g."""
    size = x.shape[2:]
    query = attention.snconv1x1_theta(x).flatten(2)  # (N, C / 8, H W)
    key = F.max_pool2d(attention.snconv1x1_phi(x), 2).flatten(2)  # (N, C / 8, H W / 4)
    value = F.max_pool2d(attention.snconv1x1_g(x), 2).flatten(2)  # (N, C / 2, H W / 4)
    shares = torch.bmm(query.transpose(1, 2), key).softmax(2)  # (N, H W, H W / 4)
    seen = torch.bmm(value, shares.transpose(1, 2)).unflatten(2, size)
    return x + attention.gamma * attention.snconv1x1_o_conv(seen)


def plain_biggan(biggan, z, y, level):
    """BigGAN.forward as published; from CHEAPER_CONVOLUTIONS on with these."""
    generator = biggan.generator
    condition = torch.cat([z, biggan.class_vectors(y)], 1)
    h = generator.gen_z(condition).unflatten(1, (4, 4, -1))
    h = h.permute(0, 3, 1, 2).contiguous()  # (N, C, 4, 4)
    for layer in generator.layers:
        if isinstance(layer, train_cgn.GenBlock):
            h = plain_block(layer, h, condition, level)
        else:
            h = plain_attention(layer, h)
    h = plain_norm(generator.bn, h, condition)
    rgb = generator.conv_to_rgb
    if level < CHEAPER_CONVOLUTIONS:
        return rgb(h)[:, :3].tanh()
    return F.conv2d(h, rgb.weight[:3], rgb.bias[:3], padding=1).tanh()


def run_biggan(biggan, z, y, level):
    """Images of a BigGAN (N, 3, 256, 256), in the form of a level."""
    if level < CHANNELS_LAST:
        return plain_biggan(biggan, z, y, level)
    return biggan(z, y)


def in_bf16(level):
    """Whether a level computes in bf16."""
    return HAS_BF16 and level >= BF16


def random_cgn(level):
    """The networks at full size, with random weights that keep activations finite."""
    torch.manual_seed(0)
    cgn = train_cgn.ImageNetCGN()
    for layer in cgn.modules():
        if level < CHEAPER_CONVOLUTIONS and isinstance(layer, UpsampleConv2d):
            layer.__class__ = nn.Conv2d  # which plain_block calls behind the upsampling
    if level >= CHANNELS_LAST:
        cgn.to(memory_format=torch.channels_last)
    # Spectral norms divide by estimates, which at first are far too small: images would be NaN.
    for _ in range(10):
        power_iteration(cgn)
    return cgn


# --------------------------------------------------------------------------------------------------
# A generated image


class Generation(NamedTuple):
    """What drawing a counterfactual needs."""

    cgn: nn.Module
    z: torch.Tensor  # (1, 128)
    y: torch.Tensor  # (1,)


def make_generation(level):
    cgn = random_cgn(level).eval()
    z = torch.randn(1, cgn.f_shape.z_dim)
    if level >= FOLDED:
        train_cgn.fold(cgn, TRUNCATION)
    if in_bf16(level):
        cgn.bfloat16()
        z = z.bfloat16()
    return Generation(cgn, z, torch.tensor([1]))


@torch.inference_mode()
def draw_image(state, level):
    """Draw one counterfactual in the form of a level."""
    cgn, z, y = state
    train_cgn.derive(cgn, TRUNCATION)
    premask = run_biggan(cgn.f_shape, z, y, level)
    foreground = run_biggan(cgn.f_text, z, y, level)
    background = run_biggan(cgn.f_bg, z, y, level)
    mask = cgn.u2net(premask.to(z.dtype)).clamp(1e-4, 1 - 1e-4)
    if level < FEWER_NETWORKS:
        run_biggan(cgn.biggan_GT, z, y, level)
        cgn.u2net(background)
    return compose(mask, foreground, background)


# --------------------------------------------------------------------------------------------------
# A batch of training


class ImageNetState(NamedTuple):
    """What a batch of training needs."""

    args: argparse.Namespace  # of train_cgn.py
    cgn: nn.Module
    vgg: nn.Module
    z: torch.Tensor  # (1, 128)
    y: torch.Tensor  # (1,)
    windows: torch.Tensor  # (1, 36), see draw_patch_windows


def make_training(level):
    args = train_cgn.parse_args(["--dataset", "imagenet", "--out", "unused"])
    cgn = random_cgn(level).train()
    z = torch.randn(1, cgn.f_shape.z_dim)
    for mechanism in (cgn.f_shape, cgn.f_text, cgn.f_bg):
        mechanism.recompute = level >= RECOMPUTE
    for frozen in (cgn.biggan_GT, cgn.u2net):
        if level >= FOLDED:
            train_cgn.fold(frozen.eval(), TRUNCATION)
        if in_bf16(level):
            frozen.bfloat16()
    derive_all(cgn, level)
    windows = draw_patch_windows(1, torch.Generator().manual_seed(0))
    return ImageNetState(args, cgn, make_imagenet_vgg(level), z, torch.tensor([1]), windows)


def derive_all(cgn, level):
    """The pairs of train_cgn.derive, in the dtype of a level."""
    dtype = torch.bfloat16 if HAS_BF16 and level >= ONCE_PER_STEP else torch.float32
    return train_cgn.derive(cgn, TRUNCATION, dtype)


def make_imagenet_vgg(level):
    """VGG-16 with random weights, as deep and in the layout and dtype of a level."""
    depth = len(weights.VGG16_CONVOLUTIONS)
    if level >= SHORT_VGG:
        depth = max(weights.STYLE_CONVOLUTIONS)
    state = weights.random_vgg16_features(depth)
    if level < CHANNELS_LAST:
        return weights.VGG16Features(state, memory_format=torch.contiguous_format)
    vgg = weights.VGG16Features(state)
    return vgg.bfloat16() if in_bf16(level) else vgg


def train_imagenet_batch(state, level):
    """The gradients of one batch, in the form of a level."""
    cgn = state.cgn
    if level < ONCE_PER_STEP:
        for mechanism in (cgn.f_shape, cgn.f_text, cgn.f_bg):
            power_iteration(mechanism)
        derived = derive_all(cgn, level)
    z = state.z
    y = state.y
    z_gt = z.bfloat16() if in_bf16(level) else z
    with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16(level)):
        with torch.no_grad():
            x_gt = run_biggan(cgn.biggan_GT, z_gt, y, level)
        premask = run_biggan(cgn.f_shape, z, y, level)
        foreground = run_biggan(cgn.f_text, z, y, level)
        background = run_biggan(cgn.f_bg, z, y, level)
        if level >= CHANNELS_LAST:
            both = torch.cat([premask, background])
            mask, saliency = cgn.u2net(both).chunk(2)
        else:
            mask = cgn.u2net(premask)
            saliency = cgn.u2net(background)
    mask = mask.clamp(1e-4, 1 - 1e-4)
    outputs = (premask, mask, foreground, background, saliency)
    losses, _ = train_cgn.imagenet_losses(state.args, state.vgg, outputs, x_gt, state.windows)
    sum(losses.values()).backward()
    if level < ONCE_PER_STEP:
        train_cgn.pass_gradients(derived)


# --------------------------------------------------------------------------------------------------
# Command line


def measure(task, level, calls):
    """Median seconds of a call, and the peak memory of the process in GB."""
    if level >= KEPT_MEMORY:
        runs.keep_freed_memory()
    training = task == "training"
    state = make_training(level) if training else make_generation(level)
    call = train_imagenet_batch if training else draw_image
    call(state, level)
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        call(state, level)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    return statistics.median(seconds), peak * 1024 / 1e9


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="what to time"
    )
    parser.add_argument(
        "--levels",
        type=int,
        nargs="+",
        choices=list(TRAINING),
        default=list(TRAINING),
        metavar="N",
        help="numbers of changes; 6 and 8 are of training alone",
    )
    parser.add_argument("--calls", type=runs.positive_int, default=3, help="timed calls of a level")
    return parser.parse_args()


def main():
    args = parse_args()
    context = multiprocessing.get_context("spawn")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, 256 x 256, batch 1, "
        f"median of {args.calls} calls; % of the first line of a task"
    )
    for task in args.tasks:
        first = None
        for level, name in TASKS[task].items():
            if level not in args.levels or (level == BF16 and not HAS_BF16):
                continue
            with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
                seconds, memory = pool.submit(measure, task, level, args.calls).result()
            first = first or seconds
            plus = "+ " if level else ""
            percent = 100 * seconds / first
            print(
                f"{task:11} {plus + name:60} {seconds:7.2f} s {percent:5.0f} %  {memory:5.1f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
