"""Time a colored-MNIST training step as it is against a plain form of it, adding one change at a time.

    python tests/benchmark_step.py

The plain form: float32, channels first, all 13 convolutions of VGG-16 for both images with gradients recorded for both,
upsampling as a layer of its own, Gram matrices by plain autograd, and the discriminator run on real and generated
images apart. Changes are timed in turns, round after round, so that a slow moment of the machine hits all of them.
"""
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_cgn  # noqa: E402  (needs the path above)
from data.weights import random_vgg16_features  # noqa: E402
from kernels import gram_matrix, style_loss  # noqa: E402

CHANGES = ["plain", "no gradient of the target", "VGG-16 up to the last used layer", "VGG-16 channels last",
           "one product in the Gram backward", "upsampling inside the convolution", "one discriminator pass", "bf16"]
ROUNDS, BATCH = 12, 16


class PlainUpsample(nn.Module):
    """The published order: upsample, then convolve."""

    def __init__(self, convolution):
        super().__init__()
        self.weight = convolution.weight

    def forward(self, x):
        return F.conv2d(F.interpolate(x, scale_factor=2), self.weight, padding=1)


def make_step(level):
    """A training step with the first `level` changes: a function without arguments."""
    torch.manual_seed(0)
    args = train_cgn.parse_args("--dataset colored_mnist --discriminator linear --ndf 512 --adversarial squares --r1 0 "
                                "--out unused".split())
    dtype = torch.bfloat16 if level >= 7 else torch.float32
    depth = max(n for n, w in zip(train_cgn.STYLE_CONVOLUTIONS, args.style_weights) if w) if level >= 2 else 13
    vgg = train_cgn.VGG16Features(random_vgg16_features(depth)).to(dtype)
    if level < 3:
        vgg.to(memory_format=torch.contiguous_format)
    cgn, discriminator = train_cgn.MnistCGN(), train_cgn.LinearDiscriminator(args.ndf)
    if level < 5:
        for mechanism in (cgn.f_shape, cgn.f_text1, cgn.f_text2):
            for index, layer in enumerate(mechanism):
                if isinstance(layer, train_cgn.UpsampleConv2d):
                    mechanism[index] = PlainUpsample(layer)
    optimizers = [torch.optim.Adam(network.parameters(), 2e-4, (0.5, 0.999), fused=True) for network in (cgn, discriminator)]
    x_gt, y, z = torch.rand(BATCH, 3, 32, 32) * 2 - 1, torch.randint(10, (BATCH,)), torch.randn(BATCH, 32)
    offsets = torch.randint(32, (2, BATCH, 2))

    def features(image):
        if level >= 3:
            return vgg(image)
        x, found = image, []                               # channels first
        for number, convolution in enumerate(vgg.convolutions, 1):
            x = F.relu(convolution(x))
            if number in train_cgn.STYLE_CONVOLUTIONS:
                found.append(x)
                x = F.max_pool2d(x, 2) if number < len(vgg.convolutions) else x
        return found

    def style(image, target):
        with torch.set_grad_enabled(level < 1):
            target = features(target)
        one_layer = style_loss if level >= 4 else lambda a, b: (gram_matrix(a) - gram_matrix(b)).abs().mean()
        return sum(5000 * w ** 2 * one_layer(a, b) for a, b, w in zip(features(image), target, args.style_weights) if w)

    def step():
        discriminator.requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16, enabled=level >= 7):
            mask, *textures = cgn(z, y)
        textures = [train_cgn.shuffle_patches(t, o) for t, o in zip(textures, offsets)]
        losses, x_gen, _ = train_cgn.generator_losses(args, None, discriminator, (mask, *textures), x_gt, y, args.warmup)
        real = x_gt if level >= 1 else x_gt.clone().requires_grad_()
        optimizers[0].zero_grad()
        (sum(losses.values()) + style(x_gen, real)).backward()
        optimizers[0].step()
        discriminator.requires_grad_(True)
        optimizers[1].zero_grad()
        x_gen = x_gen.detach()
        if level >= 6:
            loss = train_cgn.discriminator_loss(args, discriminator, x_gt, y, x_gen, y, 0)
        else:
            loss = ((discriminator(x_gt, y) - 1).square().mean() + discriminator(x_gen, y).square().mean()) / 2
        loss.backward()
        optimizers[1].step()

    return step


def main():
    steps = [make_step(level) for level in range(len(CHANGES))]
    times = [[] for _ in steps]
    for round_number in range(ROUNDS + 2):                 # the first two warm up
        for step, taken in zip(steps, times):
            step()                                         # and this one brings its own data into the cache
            start = time.perf_counter()
            step()
            if round_number >= 2:
                taken.append(time.perf_counter() - start)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {BATCH}, median of {ROUNDS} rounds")
    medians = [statistics.median(taken) for taken in times]
    for name, median in zip(CHANGES, medians):
        print(f"{'' if name == 'plain' else '+ '}{name:40}{1000 * median:8.1f} ms {100 * median / medians[0]:6.0f} %")


if __name__ == "__main__":
    main()
