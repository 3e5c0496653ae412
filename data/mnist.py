"""Colored, double-colored and wildlife MNIST: digits whose colours or textures give their label away.

The digits lie on the device as uint8; a batch is coloured or textured there in a few vector operations. Each variant
is a row of `VARIANTS`; one function, `MnistVariant.images`, draws all of them. Sauer & Geiger 2021, section 4.1.
"""
import gzip
import json
import zlib
from pathlib import Path

import torch
import torchvision
from PIL import Image, ImageColor
from torchvision.transforms.functional import pil_to_tensor

from data.runs import UserError, load_tensors
from data.synthetic import synthetic_digits, synthetic_textures

SIZE = 32                  # images are SIZE x SIZE
TEXTURE_SIZE = 150         # textures are scaled to this, then padded by PADDING (reflected) and cropped to SIZE
PADDING = 3
OFFLINE_DIGITS = 60_000    # synthetic digits drawn when there is no MNIST: 50,000 to train and 10,000 to test

COLORS = ("#dc143c #008080 #fde910 #0095b6 #ed9121 #911ebc #46f0f0 #fac5bb #d2f53c #800000").split()
BACKGROUNDS = "darkgreen darkblue #b03060 orangered yellow burlywood lime aqua fuchsia #6495ed".split()
OBJECTS = [BACKGROUNDS[i - 6] for i in range(10)]
BLACK = ["black"] * 10

# objects/backgrounds: a colour name per class, or None for photographed or drawn textures; binary: digits are cut at
# 0.1 instead of keeping their grey values; jitter: standard deviation of the colour's noise per channel, colours in
# [0, 1]; fixed: a training image keeps its colour for good, instead of one drawn anew every time; official_test: test
# on MNIST's own test file, instead of the last sixth of the training file.
VARIANTS = {
    "colored_mnist": dict(objects=COLORS, backgrounds=BLACK, binary=False, jitter=0.02 ** 0.5, fixed=True,
                          official_test=True),
    "double_colored_mnist": dict(objects=OBJECTS, backgrounds=BACKGROUNDS, binary=True, jitter=0.01, fixed=False,
                                 official_test=False),
    "wildlife_mnist": dict(objects=None, backgrounds=None, binary=True, jitter=0.0, fixed=False, official_test=False),
}


# ---------------------------------------------------------------------------------------------------------------------
# Digits and textures


LARGEST = 10 ** 8                                          # bytes of a file of digits; MNIST's have 47 million


def read_idx(path):
    """One IDX file of MNIST, gzipped or not: uint8 images (n, 28, 28) or labels (n,). UserError if it is damaged."""
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else open(path, "rb") as file:
            raw = file.read(LARGEST + 1)                   # a small file may unpack to any size
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it and fetch it again") from None
    dimensions = raw[3] if len(raw) > 3 and raw[:3] == b"\x00\x00\x08" else 0
    shape = [int.from_bytes(raw[4 + 4 * i:8 + 4 * i], "big") for i in range(dimensions)]
    expected = 4 + 4 * dimensions + torch.Size(shape).numel()
    if dimensions not in (1, 3) or shape[0] < 1 or shape[1:] not in ([], [28, 28]):
        raise UserError(f"{path}: not an IDX file of MNIST images or labels (header {raw[:16].hex()})")
    if len(raw) != expected:
        raise UserError(f"{path}: {len(raw)} bytes where its header promises {expected}; delete it and fetch it again")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=4 + 4 * dimensions).view(shape)


def find_idx(data_dir, stem):
    """`stem` in data_dir, or where torchvision puts it, gzipped or not; None if it is nowhere."""
    names = [stem, stem + ".gz", stem.replace("-idx", ".idx"), stem.replace("-idx", ".idx") + ".gz"]
    for folder in (data_dir, data_dir / "MNIST" / "raw", data_dir / "raw"):
        for name in names:
            if (folder / name).is_file():
                return folder / name


def load_digits(data_dir, official_test):
    """MNIST's training or test file: uint8 (n, 28, 28), int64 (n,). Fetched by torchvision if `data_dir` lacks it."""
    part = "t10k" if official_test else "train"
    stems = [f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"]
    if not all(find_idx(data_dir, stem) for stem in stems):
        try:
            torchvision.datasets.MNIST(data_dir, download=True)
        except (RuntimeError, OSError) as error:
            mirrors = " or ".join(torchvision.datasets.MNIST.mirrors)
            raise UserError(f"{data_dir}: MNIST is not there and cannot be fetched ({str(error).splitlines()[0]}); put "
                            f"{stems[0]}.gz and {stems[1]}.gz from {mirrors} into that folder, or name another with "
                            "--data-dir, or use --offline") from None
    files = [find_idx(data_dir, stem) for stem in stems]
    digits, labels = map(read_idx, files)
    if digits.ndim != 3 or labels.ndim != 1 or len(digits) != len(labels) or labels.max() > 9:
        raise UserError(f"{files[0]} and {files[1]} do not belong together: {tuple(digits.shape)} images, "
                        f"{tuple(labels.shape)} labels up to {labels.max()}")
    return digits, labels.long()


def load_texture_folder(folder):
    """The ten images of `folder` in the order of their names: uint8 (10, 3, TEXTURE_SIZE, TEXTURE_SIZE)."""
    if not folder.is_dir():
        raise UserError(f"--textures: no folder {folder}; it takes a folder with object/ and background/ in it")
    endings = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in endings)
    if len(files) != 10:
        raise UserError(f"--textures: {folder} holds {len(files)} images, not one for each of the 10 classes")
    return torch.stack([read_texture(file) for file in files])


def read_texture(file):
    try:
        image = Image.open(file).convert("RGB").resize((TEXTURE_SIZE, TEXTURE_SIZE), Image.Resampling.NEAREST)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{file}: cannot be read as an image ({error})") from None
    return pil_to_tensor(image)


def load_dtd(data_dir):
    """The twenty photographs of the published data set, out of DTD (625 MB, fetched by torchvision)."""
    numbers = {"striped": "0001 0091 0008 0043 0092 0028 0097 0004 0125 0033",
               "veined": "0066 0067 0073 0180 0131 0157 0158 0104 0188 0189"}
    folder = data_dir / "dtd" / "dtd" / "images"
    files = [[folder / kind / f"{kind}_{n}.jpg" for n in row.split()] for kind, row in numbers.items()]
    if not all(file.is_file() for row in files for file in row):
        try:
            torchvision.datasets.DTD(data_dir, download=True)
        except (RuntimeError, OSError) as error:
            raise UserError(f"--textures dtd: {folder} is not there and DTD cannot be fetched "
                            f"({str(error).splitlines()[0]}); unpack dtd-r1.0.1.tar.gz from "
                            f"{torchvision.datasets.dtd.DTD._URL} into {data_dir / 'dtd'}") from None
    return tuple(torch.stack([read_texture(file) for file in row]) for row in files)


def load_textures(textures, data_dir):
    """`textures`: None (drawn), "dtd", or a folder. Returns object and background textures, uint8 (10, 3, 150, 150)."""
    if textures is None:
        return synthetic_textures(seed=0, size=TEXTURE_SIZE)
    if textures == "dtd":
        return load_dtd(data_dir)
    return tuple(load_texture_folder(Path(textures) / kind) for kind in ("object", "background"))


# ---------------------------------------------------------------------------------------------------------------------
# The variants


def jittered(colors, std, generator, redraw):
    """Add N(0, std) to colours (n, 3) in [0, 1]. What leaves [0, 1] is cut off, or drawn again with `redraw`."""
    noisy = colors + std * torch.randn(colors.shape, generator=generator, device=colors.device)
    while redraw:                                         # a colour lies in [0, 1], so a round settles half or more
        outside = (noisy < 0) | (noisy > 1)
        if not outside.any():
            break
        again = colors + std * torch.randn(colors.shape, generator=generator, device=colors.device)
        noisy = torch.where(outside, again, noisy)
    return noisy.clamp(0, 1)


def to_float(images):
    """uint8 0..255 -> float32 [-1, 1]."""
    return images.float().mul_(2 / 255).sub_(1)


class MnistVariant:
    """One split of a variant, on `device`.

    digits: uint8 (n, 28, 28); labels: int64 (n,); textures: (object, background), uint8 (10, 3, 150, 150) each, for
    variants that have them. `seed` settles the colours that images keep for good.
    """

    def __init__(self, name, digits, labels, textures, seed, device):
        row = VARIANTS[name]
        # Nearest neighbour by pixel centres, as PIL does it: the published data went through PIL.
        source = ((torch.arange(SIZE) + 0.5) * digits.shape[1] / SIZE).long()
        self.digits = digits[:, source][:, :, source].unsqueeze(1).to(device)                  # (n, 1, 32, 32)
        self.labels = labels.to(device)
        self.binary, self.jitter, self.redraw = row["binary"], row["jitter"], row["fixed"]
        if self.binary:
            self.digits = (self.digits > 0.1 * 255).to(torch.uint8)
        self.palettes = [self.make_palette(row[part], device) for part in ("objects", "backgrounds")]
        self.crops = [self.make_crops(texture, device) for texture in textures] if row["objects"] is None else None
        self.fixed = None
        if row["fixed"]:
            generator = torch.Generator(device).manual_seed(seed)
            self.fixed = [self.colors(part, self.labels, generator) for part in (0, 1)]        # (n, 3, 1, 1) each

    def __len__(self):
        return len(self.labels)

    @staticmethod
    def make_palette(names, device):
        """Colours by class, (10, 3) in [0, 1]."""
        return names and torch.tensor([ImageColor.getrgb(name) for name in names], device=device) / 255

    @staticmethod
    def make_crops(textures, device):
        """Every row of every possible crop, contiguous: (10, 3, 156, 125, 32). 19 MB, and a crop is 96 short copies."""
        padded = torch.nn.functional.pad(textures.float(), [PADDING] * 4, mode="reflect").to(torch.uint8)
        return padded.unfold(3, SIZE, 1).to(device).contiguous()

    def colors(self, part, classes, generator):
        """Jittered colours of the object (part 0) or background (1), 0..255 in float: (n, 3, 1, 1)."""
        palette = self.palettes[part]
        jitter = self.jitter if palette.any() else 0          # a black background stays exactly black
        return jittered(palette[classes], jitter, generator, self.redraw)[..., None, None].mul(255).round_()

    def crop(self, part, classes, generator):
        """A new crop of each class's texture: uint8 (n, 3, 32, 32)."""
        crops, device = self.crops[part], self.labels.device
        _, _, height, last, _ = crops.shape
        y, x = torch.randint(last, (2, len(classes), 1, 1), generator=generator, device=device)
        channels, rows = torch.arange(3, device=device)[:, None], torch.arange(SIZE, device=device)
        number = ((classes[:, None, None] * 3 + channels) * height + y + rows) * last + x              # (n, 3, 32)
        return crops.view(-1, SIZE).index_select(0, number.flatten()).view(-1, 3, SIZE, SIZE)

    def images(self, index, generator, *, decorrelated=False):
        """Draw the images of `index`, int64 (n,): uint8 (n, 3, 32, 32).

        decorrelated: classes of object and background are drawn uniformly, instead of following the digit's label.
        """
        digits, n = self.digits.index_select(0, index), len(index)
        classes = [self.labels[index]] * 2
        if decorrelated:
            classes = torch.randint(10, (2, n), generator=generator, device=digits.device)
        if self.crops:
            foreground, background = (self.crop(part, classes[part], generator) for part in (0, 1))
        elif self.fixed and not decorrelated:
            foreground, background = (colors[index] for colors in self.fixed)
        else:
            foreground, background = (self.colors(part, classes[part], generator) for part in (0, 1))
        if self.binary:
            # Bytes wrap round, so this is exact; torch.where is 14 times slower on bytes.
            foreground, background = foreground.to(torch.uint8), background.to(torch.uint8)
            return (foreground - background) * digits + background
        return torch.lerp(background, foreground, digits / 255).round_().to(torch.uint8)

    def all_images(self, seed, *, decorrelated=False):
        """Every image of the split in order, uint8 (n, 3, 32, 32): the same for the same seed."""
        generator = torch.Generator(self.labels.device).manual_seed(seed)
        index = torch.arange(len(self), device=self.labels.device)
        return torch.cat([self.images(part, generator, decorrelated=decorrelated) for part in index.split(1000)])


def load_variant(name, data_dir, *, textures=None, offline=False, seed=0, device="cpu"):
    """The training and the test split of a variant, as (MnistVariant, MnistVariant).

    textures: None (ours, drawn), "dtd", or a folder with object/ and background/. offline: synthetic digits, nothing
    is read or fetched. Raises UserError for missing or damaged files.
    """
    row, data_dir = VARIANTS[name], Path(data_dir)
    pair = load_textures(textures, data_dir) if row["objects"] is None else None
    if offline:
        digits, labels = synthetic_digits(OFFLINE_DIGITS, seed=0)
    else:
        digits, labels = load_digits(data_dir, official_test=False)
    cut = len(labels) * 5 // 6                                                                  # 50,000 of 60,000
    parts = [(digits[:cut], labels[:cut]), (digits[cut:], labels[cut:])]
    if row["official_test"] and not offline:
        parts = [(digits, labels), load_digits(data_dir, official_test=True)]
    return tuple(MnistVariant(name, *part, pair, seed + i, device) for i, part in enumerate(parts))


def load_counterfactuals(folder, dataset, offline, device):
    """A data set of generate.py: uint8 (n, 3, 32, 32) on `device`, and the classes of the shapes (n,)."""
    try:
        facts = json.loads((folder / "dataset.json").read_text())
        n, chunks = facts["n"], facts["chunks"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"--counterfactual {folder}: no complete data set of generate.py (dataset.json is missing or "
                        "damaged); if it was interrupted, run it again with --resume") from None
    if facts["dataset"] not in (None, dataset):
        raise UserError(f"--counterfactual {folder}: made for {facts['dataset']}, not {dataset}")
    if facts["offline"] != offline:
        raise UserError(f"--counterfactual {folder}: made {'' if facts['offline'] else 'not '}from --offline weights; "
                        "synthetic digits and MNIST must not be mixed: use the same --offline everywhere")
    images = torch.empty(n, 3, 32, 32, dtype=torch.uint8, device=device)
    labels = torch.empty(n, dtype=torch.int64, device=device)
    start = 0
    for number in range(chunks):
        path = folder / f"chunk_{number:05d}.pt"
        chunk = load_tensors(path)
        try:
            stop = start + len(chunk["images"])
            images[start:stop], labels[start:stop] = chunk["images"], chunk["labels"][:, 0]
        except (KeyError, TypeError, IndexError, RuntimeError) as error:
            raise UserError(f"{path}: not a chunk of this data set ({error}); make it again") from None
        start = stop
    if start != n or labels.max() > 9:
        raise UserError(f"--counterfactual {folder}: {start} images where dataset.json promises {n}; make it again")
    return images, labels
