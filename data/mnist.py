"""Colored, double-colored and wildlife MNIST: colors or textures give the label of a digit away.

The digits lie on the device as uint8; a batch is colored or textured there in a few vector
operations. Each variant is a row of `VARIANTS`; one function, `MnistVariant.images`, draws all of
them. Sauer & Geiger 2021, section 4.1.
"""

import gzip
import json
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageColor
from torchvision.transforms.functional import pil_to_tensor

from data import imagenet, runs, synthetic
from kernels import compose

SIZE = 32  # images are SIZE x SIZE
NAMES = list("0123456789")  # of the classes
TEXTURE_SIZE = 150  # textures are scaled to this, then padded and cropped to SIZE
PADDING = 3  # pixels of a texture reflected at each border
OFFLINE_DIGITS = 60_000  # synthetic digits in place of MNIST: 50,000 to train and 10,000 to test
MAX_IDX_BYTES = 10**8  # of a file of digits; MNIST's have 47 million

COLORS = ("#dc143c #008080 #fde910 #0095b6 #ed9121 #911ebc #46f0f0 #fac5bb #d2f53c #800000").split()
BACKGROUNDS = (
    "darkgreen darkblue #b03060 orangered yellow burlywood lime aqua fuchsia #6495ed"
).split()
OBJECTS = [BACKGROUNDS[i - 6] for i in range(10)]
BLACK = ["black"] * 10

# objects, backgrounds: a color name per class, or None for textures.
# binary: digits are cut at 0.1 instead of keeping their gray values.
# jitter: standard deviation of the color's noise per channel, colors in [0, 1].
# fixed: a training image keeps its color for good, instead of one drawn anew every time.
# official_test: test on MNIST's own test file, instead of the last sixth of the training file.
VARIANTS = {
    "colored_mnist": dict(
        objects=COLORS,
        backgrounds=BLACK,
        binary=False,
        jitter=0.02**0.5,
        fixed=True,
        official_test=True,
    ),
    "double_colored_mnist": dict(
        objects=OBJECTS,
        backgrounds=BACKGROUNDS,
        binary=True,
        jitter=0.01,
        fixed=False,
        official_test=False,
    ),
    "wildlife_mnist": dict(
        objects=None,
        backgrounds=None,
        binary=True,
        jitter=0.0,
        fixed=False,
        official_test=False,
    ),
}

# The photographs of the published wildlife data set, by class: their numbers in DTD.
DTD_IMAGES = {
    "striped": "0001 0091 0008 0043 0092 0028 0097 0004 0125 0033",
    "veined": "0066 0067 0073 0180 0131 0157 0158 0104 0188 0189",
}


# --------------------------------------------------------------------------------------------------
# Digits


def read_idx(path):
    """One IDX file of MNIST, gzipped or not: uint8 images (n, 28, 28) or labels (n,).

    UserError if the file is damaged.
    """
    raw = read_gzipped(path)
    dimensions = 0
    if len(raw) > 3 and raw[:3] == b"\x00\x00\x08":
        dimensions = raw[3]
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    if dimensions not in (1, 3) or shape[0] < 1 or shape[1:] not in ([], [28, 28]):
        raise runs.UserError(
            f"{path}: not an IDX file of MNIST images or labels (header {raw[:16].hex()})"
        )
    if len(raw) != start + torch.Size(shape).numel():
        raise runs.UserError(
            f"{path}: {len(raw)} bytes where its header promises "
            f"{start + torch.Size(shape).numel()}; delete it and fetch it again"
        )
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=start).view(shape)


def read_gzipped(path):
    """The bytes of a file, unpacked if it is gzipped; no more than MAX_IDX_BYTES + 1 of them."""
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else open(path, "rb") as file:
            return file.read(MAX_IDX_BYTES + 1)  # a small file may unpack to any size
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise runs.UserError(
            f"{path}: cannot be read ({error}); delete it and fetch it again"
        ) from None


def find_idx(data_dir, stem):
    """A file in data_dir, or where torchvision puts it, gzipped or not; None if it is nowhere."""
    dotted = stem.replace("-idx", ".idx")
    for folder in (data_dir, data_dir / "MNIST" / "raw", data_dir / "raw"):
        for name in (stem, stem + ".gz", dotted, dotted + ".gz"):
            if (folder / name).is_file():
                return folder / name
    return None


def load_digits(data_dir, official_test):
    """MNIST's training or test file: uint8 (n, 28, 28), int64 (n,).

    Fetched by torchvision if `data_dir` lacks it. UserError if that fails or a file is damaged.
    """
    part = "t10k" if official_test else "train"
    stems = [f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"]
    if not all(find_idx(data_dir, stem) for stem in stems):
        try:
            torchvision.datasets.MNIST(data_dir, download=True)
        except (RuntimeError, OSError) as error:
            mirrors = " or ".join(torchvision.datasets.MNIST.mirrors)
            raise runs.UserError(
                f"{data_dir}: MNIST is not there and cannot be downloaded "
                f"({runs.first_line(error)}); put {stems[0]}.gz and {stems[1]}.gz "
                f"from {mirrors} into that folder, or name another with --data-dir"
            ) from None
    image_file, label_file = [find_idx(data_dir, stem) for stem in stems]
    digits = read_idx(image_file)
    labels = read_idx(label_file)
    shaped = digits.ndim == 3 and labels.ndim == 1
    if not shaped or len(digits) != len(labels) or labels.max() > 9:
        raise runs.UserError(
            f"{image_file} and {label_file} do not belong together: {tuple(digits.shape)} images, "
            f"{tuple(labels.shape)} labels up to {labels.max()}"
        )
    return digits, labels.long()


# --------------------------------------------------------------------------------------------------
# Textures


def load_textures(textures, data_dir, offline=False):
    """Object and background textures, uint8 (10, 3, TEXTURE_SIZE, TEXTURE_SIZE) each.

    textures: None (drawn ones), "dtd", or a folder with object/ and background/ in it.
    """
    if textures is None:
        return synthetic.synthetic_textures(seed=0, size=TEXTURE_SIZE)
    if textures == "dtd":
        return load_dtd(data_dir, offline)
    folder = Path(textures)
    return load_texture_folder(folder / "object"), load_texture_folder(folder / "background")


def load_texture_folder(folder):
    """The ten images of `folder` in the order of their names, as `load_textures` returns them."""
    if not folder.is_dir():
        raise runs.UserError(
            f"--textures: no folder {folder}; it takes a folder with object/ and background/ in it"
        )
    files = imagenet.image_files(folder)
    if len(files) != 10:
        raise runs.UserError(
            f"--textures: {folder} holds {len(files)} images, not one for each of the 10 classes"
        )
    return torch.stack([read_texture(file) for file in files])


def load_dtd(data_dir, offline=False):
    """The photographs of the published data set, out of DTD (625 MB, downloaded by torchvision).

    offline: UserError in place of a download.
    """
    folder = data_dir / "dtd" / "dtd" / "images"
    files = {}
    for kind, numbers in DTD_IMAGES.items():
        files[kind] = [folder / kind / f"{kind}_{number}.jpg" for number in numbers.split()]
    if not all(file.is_file() for file in files["striped"] + files["veined"]):
        if offline:
            raise runs.UserError(
                f"--textures dtd: {folder} is not there, and --offline downloads nothing; leave "
                "one of the two out"
            )
        try:
            torchvision.datasets.DTD(data_dir, download=True)
        except (RuntimeError, OSError) as error:
            raise runs.UserError(
                f"--textures dtd: {folder} is not there and DTD cannot be downloaded "
                f"({runs.first_line(error)}); unpack dtd-r1.0.1.tar.gz from "
                f"{torchvision.datasets.dtd.DTD._URL} into {data_dir / 'dtd'}"
            ) from None
    objects = torch.stack([read_texture(file) for file in files["striped"]])
    backgrounds = torch.stack([read_texture(file) for file in files["veined"]])
    return objects, backgrounds


def read_texture(file):
    """An image file as uint8 (3, TEXTURE_SIZE, TEXTURE_SIZE). UserError if it is none."""
    try:
        image = imagenet.to_rgb(Image.open(file))
        image = image.resize((TEXTURE_SIZE, TEXTURE_SIZE), Image.Resampling.NEAREST)
    except Exception as error:  # see imagenet.read_image
        raise runs.UserError(f"{file}: cannot be read as an image ({error})") from None
    return pil_to_tensor(image)


# --------------------------------------------------------------------------------------------------
# The variants


def to_float(images):
    """uint8 0..255 -> float32 [-1, 1]."""
    return images.float().mul_(2 / 255).sub_(1)


def jittered(colors, std, generator, redraw):
    """Add N(0, std) to colors (n, 3) in [0, 1].

    What leaves [0, 1] is cut off, or drawn again with `redraw`.
    """
    noisy = add_noise(colors, std, generator)
    while redraw:  # a color lies in [0, 1], so each round settles half or more
        outside = (noisy < 0) | (noisy > 1)
        if not outside.any():
            break
        noisy = torch.where(outside, add_noise(colors, std, generator), noisy)
    return noisy.clamp(0, 1)


def add_noise(colors, std, generator):
    """Colors (n, 3) plus N(0, std)."""
    return colors + std * torch.randn(colors.shape, generator=generator, device=colors.device)


def make_palette(names, device):
    """Colors by class, (10, 3) in [0, 1]. None for textures."""
    if names is None:
        return None
    return torch.tensor([ImageColor.getrgb(name) for name in names], device=device) / 255


def make_crops(textures, device):
    """Every row of every possible crop, contiguous: (10, 3, 156, 125, 32).

    That is 19 MB, and a crop is 96 short copies.
    """
    padded = F.pad(textures.float(), [PADDING] * 4, mode="reflect").to(torch.uint8)
    return padded.unfold(3, SIZE, 1).to(device).contiguous()


class MnistVariant:
    """One split of a variant, on `device`.

    digits: uint8 (n, 28, 28). labels: int64 (n,). textures: (object, background), uint8
    (10, 3, 150, 150) each, for variants that have them. seed: settles the colors that images keep
    for good.
    """

    size = SIZE
    names = NAMES

    def __init__(self, name, digits, labels, textures, seed, device):
        row = VARIANTS[name]
        # Nearest neighbor by pixel centers, as PIL does it: the published data went through PIL.
        source = ((torch.arange(SIZE) + 0.5) * digits.shape[1] / SIZE).long()
        digits = digits[:, source][:, :, source]
        self.digits = digits.unsqueeze(1).to(device)  # (n, 1, 32, 32)
        self.labels = labels.to(device)
        self.binary = row["binary"]
        self.redraw = row["fixed"]
        if self.binary:
            self.digits = (self.digits > 0.1 * 255).to(torch.uint8)
        # Each of these is a pair: of the object and of the background.
        self.palettes = [make_palette(row[part], device) for part in ("objects", "backgrounds")]
        # A black background stays exactly black.
        self.jitters = [row["jitter"] * (row[part] != BLACK) for part in ("objects", "backgrounds")]
        self.crops = None
        if row["objects"] is None:
            self.crops = [make_crops(texture, device) for texture in textures]
        self.fixed = None
        if row["fixed"]:
            generator = torch.Generator(device).manual_seed(seed)
            self.fixed = [self.draw_colors(part, self.labels, generator) for part in (0, 1)]

    def __len__(self):
        return len(self.labels)

    @property
    def held_out(self):
        """How many of the last training images are kept to choose settings with, see data/README.

        Counterfactuals of real images leave them out.
        """
        return min(5_000, len(self) // 10)

    def draw_colors(self, part, classes, generator):
        """Jittered colors of the object (part 0) or background (1).

        classes: (n,). Returns float 0..255, (n, 3, 1, 1).
        """
        colors = self.palettes[part][classes]
        colors = jittered(colors, self.jitters[part], generator, self.redraw)
        return colors[..., None, None].mul(255).round_()

    def draw_crops(self, part, classes, generator):
        """A new crop of each class's texture, of the object (part 0) or background (1).

        classes: (n,). Returns uint8 (n, 3, 32, 32).
        """
        crops = self.crops[part]
        device = self.labels.device
        _, _, height, last, _ = crops.shape
        size = (2, len(classes), 1, 1)
        y, x = torch.randint(last, size, generator=generator, device=device)
        channels = torch.arange(3, device=device)[:, None]
        rows = torch.arange(SIZE, device=device)
        row = (classes[:, None, None] * 3 + channels) * height + y + rows  # (n, 3, 32)
        index = row * last + x
        pixels = crops.view(-1, SIZE).index_select(0, index.flatten())
        return pixels.view(-1, 3, SIZE, SIZE)

    def images(self, index, generator, classes=None):
        """Draw the images of `index`, int64 (n,): uint8 (n, 3, 32, 32).

        classes: of the objects' and the backgrounds' colors or textures, int64 (2, n). None: those
        of the labels, in which the training images are drawn.
        """
        digits = self.digits.index_select(0, index)
        own = self.labels[index]
        object_class, background_class = (own, own) if classes is None else classes
        if self.crops:
            foreground = self.draw_crops(0, object_class, generator)
            background = self.draw_crops(1, background_class, generator)
        elif self.fixed and classes is None:
            foreground = self.fixed[0][index]
            background = self.fixed[1][index]
        else:
            foreground = self.draw_colors(0, object_class, generator)
            background = self.draw_colors(1, background_class, generator)
        if self.binary:
            # Bytes wrap round, so this is exact; torch.where is 14 times slower on bytes.
            foreground = foreground.to(torch.uint8)
            background = background.to(torch.uint8)
            return (foreground - background) * digits + background
        return compose(digits / 255, foreground, background).round_().to(torch.uint8)

    def all_images(self, seed):
        """Every image of the split in order, uint8 (n, 3, 32, 32): the same for the same seed."""
        generator = torch.Generator(self.labels.device).manual_seed(seed)
        index = torch.arange(len(self), device=self.labels.device)
        return torch.cat([self.images(part, generator) for part in index.split(1000)])

    def decorrelated_images(self, seed):
        """As all_images, but the classes of colors or textures are drawn uniformly, whatever the
        digit's label. Returns those of object and background as well, int64 (2, n).
        """
        device = self.labels.device
        generator = torch.Generator(device).manual_seed(seed)
        images, classes = [], []
        for part in torch.arange(len(self), device=device).split(1000):
            drawn = torch.randint(10, (2, len(part)), generator=generator, device=device)
            images.append(self.images(part, generator, drawn))
            classes.append(drawn)
        return torch.cat(images), torch.cat(classes, 1)


def load_variant(name, data_dir, *, textures=None, offline=False, seed=0, device="cpu"):
    """The training and the test split of a variant, as (MnistVariant, MnistVariant).

    textures: None (drawn ones), "dtd", or a folder with object/ and background/. offline: synthetic
    digits, nothing is read or fetched. UserError for missing or damaged files.
    """
    row = VARIANTS[name]
    data_dir = Path(data_dir)
    pair = load_textures(textures, data_dir, offline) if row["objects"] is None else None
    if offline:
        digits, labels = synthetic.synthetic_digits(OFFLINE_DIGITS, seed=0)
    else:
        digits, labels = load_digits(data_dir, official_test=False)
    if row["official_test"] and not offline:
        train = digits, labels
        test = load_digits(data_dir, official_test=True)
    else:
        cut = len(labels) * 5 // 6  # 50,000 of 60,000
        train = digits[:cut], labels[:cut]
        test = digits[cut:], labels[cut:]
    return (
        MnistVariant(name, *train, pair, seed, device),
        MnistVariant(name, *test, pair, seed + 1, device),
    )


# --------------------------------------------------------------------------------------------------
# Counterfactuals


def load_counterfactuals(folders, dataset, offline, original, device):
    """The data sets of generate.py in some folders, one after the other.

    dataset, offline: what they must have been made for. original: the biased images, of the same
    size and classes. Returns uint8 (n, 3, S, S) on `device` and the classes of shape, texture and
    background, int64 (n, 3). UserError, naming the folder, for one that is not
    complete, damaged, or made for something else.
    """
    folders = [Path(folder) for folder in folders]
    descriptions = [read_description(folder, dataset, offline) for folder in folders]
    n = sum(description["n"] for description in descriptions)
    size = original.size
    images = torch.empty(n, 3, size, size, dtype=torch.uint8, device=device)
    labels = torch.empty(n, 3, dtype=torch.int64, device=device)
    start = 0
    for folder, description in zip(folders, descriptions):
        stop = start + description["n"]
        read_chunks(folder, description["chunks"], images[start:stop], labels[start:stop])
        names = description.get("classes", NAMES)
        if names != original.names or labels[start:stop].max() >= len(names):
            raise runs.UserError(f"--counterfactual {folder}: its classes are not the data's")
        start = stop
    return images, labels


def read_description(folder, dataset, offline):
    """The dataset.json of a data set of generate.py. UserError if it does not fit."""
    try:
        description = json.loads((folder / "dataset.json").read_text())
        complete = description["n"] > 0 and description["chunks"] > 0
        complete = complete and {"dataset", "offline"} <= description.keys()
    except (OSError, ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise runs.UserError(
            f"--counterfactual {folder}: no complete data set of generate.py (dataset.json is "
            "missing or damaged); if it was interrupted, run it again with --resume"
        )
    if description["dataset"] not in (None, dataset):
        raise runs.UserError(
            f"--counterfactual {folder}: made for {description['dataset']}, not {dataset}"
        )
    if description["offline"] != offline:
        negation = "" if description["offline"] else "not "
        raise runs.UserError(
            f"--counterfactual {folder}: {negation}made by weights of a run with --offline; use "
            "the same --offline everywhere"
        )
    return description


def read_chunks(folder, chunks, images, labels):
    """Fill images (n, 3, S, S) and labels (n, 3) from a data set's chunks. UserError if they do not
    fill them.
    """
    n = len(images)
    start = 0
    for index in range(chunks):
        path = folder / f"chunk_{index:05d}.pt"
        chunk = runs.load_tensors(path)
        try:
            size = chunk["images"].shape[2]
            if size != images.shape[2]:
                raise runs.UserError(
                    f"{path}: images of {size} x {size} pixels; give --image-size {size}"
                )
            stop = start + len(chunk["images"])
            images[start:stop] = chunk["images"]
            labels[start:stop] = chunk["labels"]
        except (KeyError, TypeError, IndexError, RuntimeError) as error:
            raise runs.UserError(
                f"{path}: not a chunk of this data set ({error}); make it again"
            ) from None
        start = stop
    if start != n:
        raise runs.UserError(
            f"--counterfactual {folder}: {start} images where dataset.json promises {n}; "
            "make it again"
        )
