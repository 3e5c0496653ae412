"""Stand-ins for BigGAN and U^2-Net at 64 x 64, learnt from drawn scenes: an object in front of a background.

    python -m data.scenes --out data/pretrained/small_imagenet.pt

A scene is a function of a class's code and a latent. The small BigGAN learns to draw scenes, the small U^2-Net to find
their objects. They say nothing of ImageNet: `train_cgn.py --dataset imagenet --preset small --offline` shows with them,
in minutes and without a download, how the three mechanisms come apart.
"""
import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from data.runs import positive_int, run_main, save_png, save_tensors, tile_sheet
from data.frozen import U2Net, random_networks
from train_cgn import SMALL, BigGAN, truncated_normal


def draw_scenes(z, code, size=64):
    """z, code: (N, 32), about normal. Returns images (N, 3, size, size) in [-1, 1], the same without their objects, and
    the objects' masks (N, 1, size, size) in [0, 1]. The code says form, colours and patterns; z place, size and turn.
    """
    line = torch.linspace(-1, 1, size, device=z.device)
    z, code = z[..., None, None].unbind(1), code[..., None, None].unbind(1)
    x, y = line - 0.2 * z[0], line[:, None] - 0.2 * z[1]
    angle, distance = torch.atan2(y, x) + 0.4 * z[2], (x ** 2 + y ** 2).sqrt()
    lobes = sum(0.12 * code[k] * torch.cos(n * angle) for k, n in enumerate((2, 3, 4)))
    radius = (0.45 + 0.06 * z[3] + 0.05 * code[3]) * (1 + lobes)
    mask = torch.sigmoid((radius - distance) * size / 3)
    stripes = sum(torch.tanh(code[4 + k]) * wave for k, wave in enumerate(
        ((10 * x).sin(), (10 * y).sin(), (14 * (x + y)).sin())))
    waves = sum(torch.tanh(code[7 + k]) * wave for k, wave in enumerate(
        ((4 * line + z[4]).sin(), (4 * line[:, None] + z[5]).sin(), line[:, None])))
    foreground, background = (torch.stack([torch.tanh(code[first + k] + 0.2 * z[6] + code[first + 3 + k] * pattern / 2)
                                           for k in range(3)], 1) for first, pattern in ((10, stripes), (16, waves)))
    mask = mask[:, None]
    return torch.lerp(background, foreground, mask), background.expand(-1, -1, size, size), mask


def learn(network, steps, loss_of, rate, name):
    """Adam with a cosine from `rate` to 0; loss_of() is to be made small."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, rate, betas=(0.5, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        loss = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"{name} {step + 1}/{steps}  loss {loss.item():.4f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="file for the weights; OUT.png shows what they do")
    parser.add_argument("--steps", type=positive_int, default=5000, help="of the BigGAN; a fifth of it for the U^2-Net")
    args = parser.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    biggan, u2net = BigGAN(**SMALL), U2Net(small=True)
    for network, state in zip((biggan, u2net), random_networks(lambda: BigGAN(**SMALL), True)):
        network.load_state_dict(state)
    biggan.embeddings.weight.data = torch.randn(biggan.embeddings.weight.shape, generator=generator)
    biggan.embeddings.requires_grad_(False)

    def draw(count):
        z = truncated_normal((count, biggan.z_dim), generator)
        y = torch.randint(biggan.embeddings.in_features, (count,), generator=generator)
        return z, y, draw_scenes(z, biggan.class_vectors(y))

    def difference():
        z, y, (scene, _, mask) = draw(32)
        with torch.autocast("cpu", torch.bfloat16):
            image = biggan(z, y, 1.0)
        return ((image - scene).abs() * (1 + 2 * mask)).mean()

    def wrong_saliency():
        z, y, (scene, background, mask) = draw(16)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            scene[8:] = biggan(z[8:], y[8:], 1.0)          # as the drawn ones, and as the BigGAN draws
        empty = torch.rand(16, generator=generator) < 0.3
        scene[empty], mask[empty] = background[empty], 0.0
        scene = scene + 0.05 * torch.randn(scene.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            saliency = u2net(scene)
        return F.binary_cross_entropy(saliency, mask)

    learn(biggan.train(), args.steps, difference, 6e-3, "BigGAN")
    biggan.eval()
    learn(u2net.train(), args.steps // 5, wrong_saliency, 1e-3, "U^2-Net")
    u2net.eval()
    with torch.no_grad():
        z, y, (scene, background, mask) = draw(8)
        image = biggan(z, y, 1.0)
        columns = [scene, image, *(m.expand(-1, 3, -1, -1) * 2 - 1 for m in (mask, u2net(image), u2net(background)))]
    save_png(args.out.with_suffix(".png"), tile_sheet(torch.stack(columns, 1) / 2 + 0.5, scale=1))
    half = {name: {key: value.half() if value.is_floating_point() else value
                   for key, value in network.state_dict().items()}
            for name, network in (("biggan", biggan), ("u2net", u2net))}
    save_tensors(args.out, half)


if __name__ == "__main__":
    run_main(main)
