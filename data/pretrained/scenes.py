"""Stand-ins for BigGAN and U^2-Net at 64 x 64, trained on drawn scenes: an object and a background.

    python -m data.pretrained.scenes --out data/pretrained/small_imagenet.pt
    python -m data.pretrained.scenes --pictures 50 --out runs/scenes    # as photographs, in folders

A scene is a function of a class's code and a latent. The small BigGAN learns to draw scenes, the
small U^2-Net to find their objects. They say nothing of ImageNet: `train_cgn.py --dataset imagenet
--preset small --offline` shows with them, in minutes and without a download, how the three
mechanisms come apart.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import train_cgn
from data import imagenet, pictures, runs, weights
from kernels import compose, power_iteration


class Scenes(NamedTuple):
    """Drawn scenes and what is in them."""

    image: torch.Tensor  # (N, 3, size, size) in [-1, 1]
    background: torch.Tensor  # the same without their objects
    mask: torch.Tensor  # (N, 1, size, size) in [0, 1], of the objects


def draw_scenes(z, code, size=64):
    """Scenes of latents and class codes, both (N, 32) and about normal.

    The code determines form, colors and patterns; z determines place, size and rotation.
    """
    z = z[..., None, None].unbind(1)
    code = code[..., None, None].unbind(1)
    line = torch.linspace(-1, 1, size, device=z[0].device)
    column = line[:, None]

    x = line - 0.2 * z[0]  # about the object's center
    y = column - 0.2 * z[1]
    angle = torch.atan2(y, x) + 0.4 * z[2]
    lobes = 0
    for k, count in enumerate((2, 3, 4)):
        lobes = lobes + 0.12 * code[k] * torch.cos(count * angle)
    radius = 0.45 + 0.06 * z[3] + 0.05 * code[3]
    radius = radius * (1 + lobes)
    distance = (x**2 + y**2).sqrt()
    mask = torch.sigmoid((radius - distance) * size / 3)[:, None]

    stripes = [(10 * x).sin(), (10 * y).sin(), (14 * (x + y)).sin()]
    waves = [(4 * line + z[4]).sin(), (4 * column + z[5]).sin(), column]
    foreground = paint(code[10:16], z[6], mix(code[4:7], stripes))
    background = paint(code[16:22], z[6], mix(code[7:10], waves))
    background = background.expand(-1, -1, size, size)
    return Scenes(compose(mask, foreground, background), background, mask)


def mix(code, patterns):
    """A weighted sum of patterns."""
    total = 0
    for weight, pattern in zip(code, patterns):
        total = total + torch.tanh(weight) * pattern
    return total


def paint(code, light, pattern):
    """Three channels, (N, 3, ...) in [-1, 1]: code[:3] is the color, code[3:] the pattern's."""
    channels = []
    for color, contrast in zip(code[:3], code[3:]):
        channels.append(torch.tanh(color + 0.2 * light + contrast * pattern / 2))
    return torch.stack(channels, 1)


def draw_batch(biggan, count, generator):
    """Latents, classes, and their scenes."""
    z = train_cgn.truncated_normal((count, biggan.z_dim), generator)
    y = torch.randint(biggan.embeddings.in_features, (count,), generator=generator)
    return z, y, draw_scenes(z, biggan.class_vectors(y))


def make_optimizer(network, lr, steps):
    """Adam, and its schedule: a cosine from `lr` to 0."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr, betas=(0.5, 0.99), fused=True)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def update(optimizer, schedule, loss, derived=()):
    """One step down the gradient of the loss. derived: of train_cgn.derive."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    train_cgn.pass_gradients(derived)
    optimizer.step()
    schedule.step()


def train_biggan(biggan, steps, generator):
    """Let the BigGAN draw the scenes of its latents and classes."""
    optimizer, schedule = make_optimizer(biggan, 6e-3, steps)
    for step in range(1, steps + 1):
        z, y, scenes = draw_batch(biggan, 32, generator)
        power_iteration(biggan)
        derived = train_cgn.derive(biggan, 1.0)
        with torch.autocast("cpu", torch.bfloat16):
            image = biggan(z, y)
        error = (image - scenes.image).abs()
        loss = (error * (1 + 2 * scenes.mask)).mean()
        update(optimizer, schedule, loss, derived)
        if step % 100 == 0:
            print(f"BigGAN {step}/{steps}  loss {loss.item():.4f}", flush=True)
    train_cgn.derive(biggan, 1.0)


def train_u2net(u2net, biggan, steps, generator):
    """Let the U^2-Net find the objects, in drawn scenes and in the BigGAN's."""
    u2net.train()
    optimizer, schedule = make_optimizer(u2net, 1e-3, steps)
    for step in range(1, steps + 1):
        z, y, scenes = draw_batch(biggan, 16, generator)
        image, background, mask = scenes
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            image[8:] = biggan(z[8:], y[8:])
        empty = torch.rand(16, generator=generator) < 0.3  # scenes without an object
        image[empty] = background[empty]
        mask[empty] = 0.0
        image = image + 0.05 * torch.randn(image.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            saliency = u2net(image)
        loss = F.binary_cross_entropy(saliency, mask)
        update(optimizer, schedule, loss)
        if step % 100 == 0:
            print(f"U^2-Net {step}/{steps}  loss {loss.item():.4f}", flush=True)
    u2net.eval()


@torch.no_grad()
def make_sheet(biggan, u2net, generator):
    """Rows are latents: scene, the BigGAN's image, the true mask, the U^2-Net's of the image, and
    the U^2-Net's of the background alone.
    """
    z, y, scenes = draw_batch(biggan, 8, generator)
    image = biggan(z, y)
    columns = [
        pictures.to_unit(scenes.image),
        pictures.to_unit(image),
        pictures.as_rgb(scenes.mask),
        pictures.as_rgb(u2net(image)),
        pictures.as_rgb(u2net(scenes.background)),
    ]
    return pictures.tile_sheet(torch.stack(columns, 1), scale=1)


@torch.no_grad()
def write_scenes(folder, count, generator):
    """Write scenes as folder/WNID/0000.png, with the codes of classes in the bundled weights."""
    wnids = imagenet.imagenet_metadata()["wnids"]
    biggan = train_cgn.BigGAN(**train_cgn.SMALL)
    biggan.load_state_dict(runs.load_tensors(train_cgn.SMALL_WEIGHTS)["biggan"])
    _, y, scenes = draw_batch(biggan, count, generator)
    images = pictures.to_unit(scenes.image).mul(255).round().to(torch.uint8)
    for index, (label, image) in enumerate(zip(y.tolist(), images)):
        path = folder / wnids[label] / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures.save_picture(path, image)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="file for the weights; a picture of the same name shows what they do; a folder with "
        "--pictures",
    )
    parser.add_argument(
        "--pictures",
        type=runs.positive_int,
        metavar="N",
        help="train nothing: draw N scenes of the bundled weights' classes, in folders by class",
    )
    parser.add_argument(
        "--steps",
        type=runs.positive_int,
        default=5000,
        help="steps of the BigGAN; the U^2-Net takes a fifth",
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    if args.pictures:
        write_scenes(args.out, args.pictures, generator)
        return
    biggan = train_cgn.BigGAN(**train_cgn.SMALL)
    u2net = weights.U2Net(small=True)
    biggan_state, u2net_state = train_cgn.random_networks(train_cgn.SMALL, small_u2net=True)
    biggan.load_state_dict(biggan_state)
    u2net.load_state_dict(u2net_state)
    codes = torch.randn(biggan.embeddings.weight.shape, generator=generator)
    biggan.embeddings.weight.data = codes
    biggan.embeddings.requires_grad_(False)

    train_biggan(biggan, args.steps, generator)
    train_u2net(u2net, biggan, args.steps // 5, generator)
    sheet = make_sheet(biggan, u2net, generator)
    pictures.save_picture(args.out.with_suffix(".png"), sheet)
    states = {
        "biggan": weights.to_half(biggan.state_dict()),
        "u2net": weights.to_half(u2net.state_dict()),
    }
    runs.save_tensors(args.out, states)


if __name__ == "__main__":
    runs.run_main(main)
