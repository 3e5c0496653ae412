"""Time a generated ImageNet counterfactual and a training step (batch 1) against a plain form, change by change.

    python tests/benchmark_imagenet.py

Full size, 256 x 256, random weights. The plain form: nothing folded, float32, channels first, upsampling before the
convolution, all 128 channels of the last one, all of VGG-16, and in generation the cGAN and the background's saliency,
too. Each form runs in a process of its own, for its peak memory; the first call warms up, the median of the next is
told.
"""
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_cgn  # noqa: E402  (needs the path above)
from data.frozen import fold  # noqa: E402
from kernels import layers  # noqa: E402
from data.weights import random_vgg16_features  # noqa: E402

GENERATION = ["plain", "only the three mechanisms and one mask",
              "upsampling inside the convolution, 3 channels of the last",
              "channels last, one product and sum for each norm", "folded weights", "bf16"]
TRAINING = ["plain", "VGG-16 up to the last used layer", "upsampling inside the convolution, 3 channels of the last",
            "channels last, one product and sum for each norm", "frozen networks folded", "bf16",
            "derivative of the spectral norms in three passes", "--recompute: less memory, not less time"]
CALLS = 3


def plain_norm(norm, x, condition, truncation):
    mean, scale = norm.statistics(truncation)
    x = (x - mean[None, :, None, None]) * scale[None, :, None, None]
    gain, shift = ((1 + norm.scale(condition), norm.offset(condition)) if hasattr(norm, "scale")
                   else (norm.weight[None], norm.bias[None]))
    return F.relu(x * gain[..., None, None] + shift[..., None, None])


def plain_biggan(biggan, z, y, truncation, level):
    """BigGAN.forward as published; from level 2 on with the cheaper convolutions."""
    generator = biggan.generator
    if biggan.training:
        train_cgn.power_iteration(biggan)
    condition = torch.cat([z, biggan.class_vectors(y)], 1)
    h = generator.gen_z(condition).unflatten(1, (4, 4, -1)).permute(0, 3, 1, 2).contiguous()
    for layer in generator.layers:
        if not isinstance(layer, train_cgn.GenBlock):
            h = layer(h, condition, truncation)
            continue
        x = h
        for k in range(4):
            convolution = getattr(layer, f"conv_{k}")
            h = plain_norm(getattr(layer, f"bn_{k}"), h, condition, truncation)
            if layer.up and k == 1 and level < 2:
                train_cgn.normalize_weight(convolution)
                h = F.conv2d(F.interpolate(h, scale_factor=2), convolution.weight, convolution.bias, padding=1)
            else:
                h = convolution(h)
        x = x[:, :layer.outputs]
        h = h + (F.interpolate(x, scale_factor=2) if layer.up else x)
    h = plain_norm(generator.bn, h, condition, truncation)
    if level < 2:
        return generator.conv_to_rgb(h)[:, :3].tanh()
    train_cgn.normalize_weight(generator.conv_to_rgb)
    return F.conv2d(h, generator.conv_to_rgb.weight[:3], generator.conv_to_rgb.bias[:3], padding=1).tanh()


def networks(level, training):
    """The CGN of a level, and a function that runs one of its BigGANs."""
    torch.manual_seed(0)
    cgn = train_cgn.ImageNetCGN()
    cgn.train(training)
    if training:
        cgn.requires_grad_(True)
        cgn.biggan_GT.requires_grad_(False)
        cgn.u2net.requires_grad_(False)
        for mechanism in (cgn.f_shape, cgn.f_text, cgn.f_bg):
            mechanism.recompute = level >= 7
    if level >= 4:
        for network in (cgn.biggan_GT, cgn.u2net) if training else [cgn]:
            fold(network.eval() if training else network, 0.5)
    if level >= 5:
        (nn.ModuleList([cgn.biggan_GT, cgn.u2net]) if training else cgn).bfloat16()
    if level >= 3:
        return cgn, lambda network, z, y: network(z, y, 0.5)
    return cgn, lambda network, z, y: plain_biggan(network, z, y, 0.5, level)


def make_generation(level):
    cgn, run = networks(level, False)
    dtype = torch.bfloat16 if level >= 5 else torch.float32
    z, y = torch.randn(1, 128).to(dtype), torch.tensor([1])

    @torch.inference_mode()
    def image():
        premask, foreground, background = (run(f, z, y) for f in (cgn.f_shape, cgn.f_text, cgn.f_bg))
        mask = cgn.u2net(premask.to(dtype)).clamp(1e-4, 1 - 1e-4)
        if level < 1:
            run(cgn.biggan_GT, z, y)
            cgn.u2net(background)
        return torch.lerp(background, foreground, mask)

    return image


def make_training(level):
    cgn, run = networks(level, True)
    if level < 6:                                          # by autograd
        layers.DivideBySigma.apply = lambda weight, u, v: weight / torch.dot(u, torch.mv(weight.flatten(1), v))
    args = train_cgn.parse_args(["--dataset", "imagenet", "--out", "unused"])
    dtype = torch.bfloat16 if level >= 5 else torch.float32
    vgg = train_cgn.VGG16Features(random_vgg16_features(10 if level >= 1 else 13)).to(dtype)
    if level < 3:
        vgg.to(memory_format=torch.contiguous_format)
        vgg.forward = lambda image: channels_first_features(vgg, image)
    optimizer = torch.optim.Adam([p for p in cgn.parameters() if p.requires_grad], 1e-5, fused=level >= 3)
    z, y = torch.randn(1, 128), torch.tensor([1])

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=level >= 5):
            with torch.no_grad():
                x_gt = run(cgn.biggan_GT, z.to(dtype), y)
            premask, foreground, background = (run(f, z, y) for f in (cgn.f_shape, cgn.f_text, cgn.f_bg))
            if level >= 3:
                masks, saliency = cgn.u2net(torch.cat([premask, background])).chunk(2)
            else:
                masks, saliency = cgn.u2net(premask), cgn.u2net(background)
        outputs = premask, masks.clamp(1e-4, 1 - 1e-4), foreground, background, saliency
        losses, _ = train_cgn.imagenet_losses(args, vgg, outputs, x_gt, torch.Generator().manual_seed(0))
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        optimizer.step()

    return step


def channels_first_features(vgg, image):
    x, features = image, []
    for number, convolution in enumerate(vgg.convolutions, 1):
        x = F.relu(convolution(x))
        if number in train_cgn.STYLE_CONVOLUTIONS:
            features.append(x)
            x = F.max_pool2d(x, 2)
    return features


def measure(make, level):
    """Median seconds of a call, and the peak memory of the process in GB."""
    call = make(level)
    call()
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main():
    context = multiprocessing.get_context("spawn")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, 256 x 256, batch 1, median of {CALLS} calls")
    for title, names, make in (("a generated image", GENERATION, make_generation),
                               ("a training step", TRAINING, make_training)):
        first = None
        for level, name in enumerate(names):
            with context.Pool(1) as pool:
                seconds, memory = pool.apply(measure, (make, level))
            first = first or seconds
            print(f"{title:18} {'+ ' * (level > 0)}{name:62} {seconds:7.2f} s {100 * seconds / first:5.0f} %  "
                  f"{memory:5.1f} GB", flush=True)


if __name__ == "__main__":
    main()
