"""Generate counterfactual images with a trained CGN (Sauer & Geiger, ICLR 2021, section 3.3).

This file has two parts, each whole without the other. MNIST variants:

    python generate.py                                    # pictures, of the bundled weights
    python generate.py --dataset wildlife_mnist --n 100000 --out runs/wildlife-cf     # a data set
    python generate.py --weights runs/first/weights.pt --n 100000 --out runs/first-cf
    python generate.py --shapes real --n 450000 --out runs/real-cf         # shapes of real digits

A data set is a folder of chunk_00000.pt, chunk_00001.pt, ..., each with `images`, uint8 (n, 3, S,
S), S being 32 but for your own images, and `labels`, integers (n, 3): the classes of shape, texture
and background. dataset.json is written last, when all chunks are there. ImageNet:

    python generate.py --dataset imagenet --n 50000 --out runs/counterfactuals   # authors' weights
    python generate.py --dataset imagenet --shape tabby --texture zebra --n 8 --out runs/cats
    python generate.py --dataset imagenet --interpolate all --to zebra --out runs/morph
    python generate.py --dataset imagenet --shapes real --images FOLDER --n 50000 --out runs/real

writes pictures, counterfactual/0000000.jpg, ..., and labels.csv, a row for each. In both parts
image i depends on the seed, the settings and i alone: an interrupted run continues with --resume.
"""

import argparse
import concurrent.futures
import csv
import hashlib
import io
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import train_cgn
from data import checkpoints, download, folders, imagenet, mnist, pictures, runs
from data.weights import load_network
from kernels import GraphedStep, compose, shuffle_patches

# ==================================================================================================
# MNIST

CHUNK = 2_000  # images in a file
BLOCK = 1_000  # random numbers are drawn for so many images at a time
SLICE = 100  # latents that a network sees at a time
SHAPE, TEXTURE, BACKGROUND = range(3)  # the mechanisms, each with a random stream of its own


# --------------------------------------------------------------------------------------------------
# MNIST: random numbers that depend on the seed and the image's index alone


class Latents(NamedTuple):
    """What a mechanism draws from, for n images."""

    z: torch.Tensor  # (n, 32), N(0, 1)
    y: torch.Tensor  # (n,), classes
    offset: torch.Tensor  # (n, 2), of the patch shuffling
    shift: torch.Tensor  # (n, 3), N(0, 1), of the color channels
    mix: torch.Tensor  # (n, 3, 3), N(0, 1), of each channel into each


def sample_latents(cgn, seed, stream, start, stop):
    """Latents of images start to stop - 1, drawn on the CPU, so that all devices agree."""
    device = cgn.label_emb.weight.device
    blocks = []
    for block in range(start // BLOCK, math.ceil(stop / BLOCK)):
        generator = runs.seeded_generator(seed, stream, block)
        latents = Latents(
            torch.randn(BLOCK, cgn.z_dim, generator=generator),
            torch.randint(len(cgn.names), (BLOCK,), generator=generator),
            torch.randint(cgn.size, (BLOCK, 2), generator=generator),
            torch.randn(BLOCK, 3, generator=generator),
            torch.randn(BLOCK, 3, 3, generator=generator),
        )
        blocks.append(latents)
    first = start // BLOCK * BLOCK
    joined = [torch.cat(parts)[start - first : stop - first] for parts in zip(*blocks)]
    return Latents(*(part.to(device) for part in joined))


def run_mechanism(cgn, mechanism, seed, stream, start, stop):
    """A mechanism's outputs (n, C, S, S) and classes (n,) for images start to stop - 1.

    mechanism: cgn.mask, cgn.foreground or cgn.background.

    The network always sees whole slices, which begin at multiples of SLICE: kernels round
    differently for other batch sizes, and some pixel would get the next of its 256 values.
    """
    first = start // SLICE * SLICE
    last = math.ceil(stop / SLICE) * SLICE
    latents = sample_latents(cgn, seed, stream, first, last)
    z = latents.z.to(cgn.label_emb.weight.dtype)
    slices = zip(z.split(SLICE), latents.y.split(SLICE))
    outputs = torch.cat([mechanism(z, y) for z, y in slices])
    return outputs[start - first : stop - first], latents.y[start - first : stop - first]


# --------------------------------------------------------------------------------------------------
# MNIST: data sets


class Settings(NamedTuple):
    """What the images of a data set depend on, beside their index."""

    seed: int
    per_shape: int  # texture and background pairs for each mask
    jitter: float  # standard deviation of the shift of a texture's color, colors from 0 to 1
    factual: bool  # one latent and one class for all three mechanisms
    weights_sha256: str
    # Defaults for chunks that are older than these fields.
    mix: float = 0.0  # standard deviation of the channels' mixing
    images_sha256: str = ""  # of the real images whose shapes are used; empty for generated shapes


class RealShapes(NamedTuple):
    """Masks that the segmenter found in real images."""

    masks: torch.Tensor  # uint8 (n, 1, S, S), 255 where the object is
    labels: torch.Tensor  # (n,), classes
    images: torch.Tensor  # uint8 (n, 3, S, S), on the CPU
    left_out: int  # images without an object
    sha256: str  # of all training images


def check_real_shapes(args, file, trained):
    """The data set whose training images give the shapes. UserError if the flags name others than
    the generator saw.

    file, trained: the generator's file and the arguments of its training, {} if it is published.
    """
    dataset = args.dataset or trained.get("dataset")
    if not dataset:
        raise runs.UserError(f"--shapes real: {file} does not say its --dataset; give it")
    if args.textures and dataset != "wildlife_mnist":
        raise runs.UserError(f"--textures: {dataset} has none")
    textures = trained.get("textures")
    if trained and bool(textures) != bool(args.textures):
        told = f"--textures {textures}" if textures else "no --textures"
        raise runs.UserError(
            f"--shapes real: {file} was trained with {told}; generate with the same"
        )
    return dataset


def find_real_shapes(args, file, trained, device):
    """The shapes of as many biased training images as args.n needs, none of them held out.

    file, trained: see check_real_shapes. Masks that cannot be an object are left out.
    """
    dataset = check_real_shapes(args, file, trained)
    segmenter = train_cgn.load_segmenter(file).to(device)
    data = load_biased_images(args, dataset, trained)
    count = len(data) - data.held_out
    images = data.all_images(args.seed)[:count]
    needed = math.ceil((args.n or 1) / args.per_shape)  # a sheet shows some of the first
    masks, good = find_objects(segmenter, images, needed, device)
    if not good.any():
        raise runs.UserError(
            "--shapes real: the segmenter found no object in any training image; look at the "
            "training's segmentation.png"
        )
    index = good.nonzero()[:, 0].cpu()
    return RealShapes(
        masks[good],
        data.labels[index].to(device),
        images[index],
        left_out=int((~good).sum()),
        sha256=hashlib.sha256(images.numpy()).hexdigest(),
    )


def load_biased_images(args, dataset, trained):
    """The training images of a generator, on the CPU, so that all devices see the same."""
    if dataset != "images":
        if trained.get("offline") and args.data_dir != runs.DOWNLOADS:
            raise runs.UserError("--data-dir: has no meaning, as these weights never saw MNIST")
        data, _ = mnist.load_variant(
            dataset,
            args.data_dir,
            textures=args.textures,
            offline=bool(trained.get("offline")),
            seed=args.seed,
        )
        return data
    if args.data_dir == runs.DOWNLOADS:
        raise runs.UserError("--shapes real: give the training images as --data-dir")
    data, _ = folders.load_folder(args.data_dir, trained["image_size"])
    if data.names != list(trained["class_counts"]):
        raise runs.UserError(f"--data-dir {args.data_dir}: its classes are not the generator's")
    return data


def find_objects(segmenter, images, needed, device):
    """Find masks in the first m images, so many that `needed` of the masks may be an object.

    images: uint8 (n, 3, S, S). Returns masks, uint8 (m, 1, S, S), and which may be an object, bool
    (m,).
    """
    masks, good = [], []
    seen = 0
    left_out = 0
    for part in images.split(5000):
        masks.append(train_cgn.find_masks(segmenter, part.to(device)))
        good.append(is_object(masks[-1]))
        seen += len(part)
        left_out += int((~good[-1]).sum())
        print(
            f"{seen} of {len(images)} real images searched; {left_out} left out, without an object",
            flush=True,
        )
        if seen - left_out >= needed:
            break
    return torch.cat(masks), torch.cat(good)


def is_object(masks):
    """Which masks, uint8 (n, 1, S, S), may be an object: neither empty, nor nearly full, nor a
    background, whose frame is filled. Returns bool (n,).
    """
    masks = masks / 255
    mean = masks.mean((1, 2, 3))
    frame = train_cgn.frame_pixels(masks).mean((1, 2))
    return (mean > 0.01) & (mean < 0.9) & (frame < 0.5)


@torch.inference_mode()
def generate_batch(cgn, settings, start, stop, device, real=None):
    """Images start to stop - 1 of a data set, uint8 (n, 3, S, S), and labels, (n, 3), which are
    uint8 if there are no more than 256 classes.

    real: RealShapes to take in turn, in place of the generator's. Images and labels lie on the CPU.
    """
    per_shape = settings.per_shape
    shape_index = torch.arange(start, stop, device=device) // per_shape
    first = start // per_shape
    last = (stop - 1) // per_shape + 1
    if real:
        index = torch.arange(first, last, device=device) % len(real.labels)
        masks = real.masks[index] / 255
        shapes = real.labels[index]
    else:
        masks, shapes = run_mechanism(cgn, cgn.mask, settings.seed, SHAPE, first, last)
    mask = masks[shape_index - first]  # (n, 1, S, S)
    foreground, textures = generate_texture(cgn, cgn.foreground, settings, TEXTURE, start, stop)
    background, backgrounds = generate_texture(
        cgn, cgn.background, settings, BACKGROUND, start, stop
    )
    images = compose(mask, foreground, background)  # (n, 3, S, S) in [-1, 1]
    images = images.add_(1).mul_(127.5).round_().to(torch.uint8)
    labels = torch.stack([shapes[shape_index - first], textures, backgrounds], 1)
    dtype = torch.uint8 if len(cgn.names) <= 256 else torch.int16
    return images.cpu(), labels.to(dtype).cpu()


def generate_texture(cgn, mechanism, settings, stream, start, stop):
    """Textures (n, 3, S, S) in [-1, 1], shuffled, mixed and shifted, and their classes (n,)."""
    # Factual images are as in training: one latent and one class for all three mechanisms.
    source = SHAPE if settings.factual else stream
    texture, y = run_mechanism(cgn, mechanism, settings.seed, source, start, stop)
    latents = sample_latents(cgn, settings.seed, stream, start, stop)
    texture = shuffle_patches(texture, latents.offset)
    if settings.mix:
        mix = torch.eye(3, device=texture.device) + settings.mix * latents.mix
        texture = torch.einsum("nij,njhw->nihw", mix, texture)
    texture = texture + 2 * settings.jitter * latents.shift[..., None, None]
    return texture.clamp_(-1, 1), y


def generate_dataset(cgn, args, settings, description, device, real=None):
    """Write the chunks that are missing, then dataset.json. Memory stays that of one chunk.

    description: further entries of dataset.json. real: see generate_batch.
    """
    stop_signal = runs.StopSignal()
    starts = range(0, args.n, CHUNK)
    for chunk, start in enumerate(starts):
        stop = min(start + CHUNK, args.n)
        path = args.out / f"chunk_{chunk:05d}.pt"
        own = settings._asdict() | {"start": start, "stop": stop}
        if is_there(path, own) and has_png_files(args, start, stop):
            continue
        (args.out / "dataset.json").unlink(missing_ok=True)  # until it is complete again
        if stop_signal:
            print(
                f"\n{args.out}: stopped after {start} of {args.n} images; resume with the same "
                "command and --resume"
            )
            raise stop_signal.stopped()
        images, labels = [], []
        for first in range(start, stop, args.batch_size):
            last = min(first + args.batch_size, stop)
            batch_images, batch_labels = generate_batch(cgn, settings, first, last, device, real)
            images.append(batch_images)
            labels.append(batch_labels)
        content = {"images": torch.cat(images), "labels": torch.cat(labels), "settings": own}
        if args.format == "png":
            write_png_files(args.out, start, content["images"])
        runs.save_tensors(path, content)
        print(f"\r{stop}/{args.n} images", end="", flush=True)
    if args.format == "png":
        write_png_labels(args.out, cgn.names, len(starts))
    summary = settings._asdict() | {"n": args.n, "chunks": len(starts)} | description
    runs.write_json(args.out / "dataset.json", summary)
    dataset = description["dataset"] or "NAME"  # published weights do not say
    words = ["train_classifier.py", "--dataset", dataset]
    if dataset == "images":
        folder = args.data_dir if args.shapes == "real" else "FOLDER"
        words += ["--data-dir", folder, "--image-size", cgn.size]
    if description["textures"]:
        words += ["--textures", description["textures"]]
    if description["offline"]:
        words.append("--offline")
    words += ["--train", "counterfactual", "--counterfactual", args.out, "--out", "runs/classifier"]
    print(f"\n{args.out}: {args.n} images; next: {runs.command_line(*words)}")


def png_file(folder, index):
    """The PNG file of an image in a data set's folder."""
    return folder / "counterfactual" / f"{index:07d}.png"


def has_png_files(args, start, stop):
    """Whether the PNG files of images start to stop - 1 are there, if --format asks for them."""
    if args.format != "png":
        return True
    return all(png_file(args.out, index).is_file() for index in range(start, stop))


def write_png_files(folder, start, images):
    """Images uint8 (n, 3, S, S), the first of which is number `start`, as PNG files."""
    paths = [png_file(folder, index) for index in range(start, start + len(images))]
    paths[0].parent.mkdir(exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(pictures.save_picture, paths, images))


def write_png_labels(out, names, chunks):
    """labels.csv of all PNG files: classes of shape, texture and background, and their names."""
    rows = [["file", *imagenet.HEADS, *(f"{head}_name" for head in imagenet.HEADS)]]
    for chunk in range(chunks):
        for y in runs.load_tensors(out / f"chunk_{chunk:05d}.pt")["labels"].tolist():
            file = png_file(out, len(rows) - 1).relative_to(out)
            rows.append([file, *y, *(names[label] for label in y)])
    runs.write_csv(out / "labels.csv", rows)


def is_there(path, settings):
    """Whether a chunk with these settings is there. A shorter one, which ended a smaller data set,
    counts as missing: it is made again. UserError for a chunk with other settings.
    """
    before = read_settings(path)
    if before is None:
        return False
    stop = before["stop"]
    before["stop"] = settings["stop"]
    if before != settings:
        raise runs.UserError(
            f"--resume: {path} was made with other settings or weights; give the same ones, or "
            "choose another --out"
        )
    if stop > settings["stop"]:
        raise runs.UserError(
            f"--n: {path} goes on to image {stop}; give at least as many, or choose another --out"
        )
    return stop == settings["stop"]


def read_settings(path):
    """The settings in a chunk, with "start" and "stop"; None if it is missing or damaged."""
    if not path.is_file():
        return None
    try:
        if not runs.is_intact_archive(path):
            raise runs.UserError(f"{path}: its checksums are wrong")
        settings = runs.load_tensors(path)["settings"]
        return {**Settings._field_defaults, **settings, "stop": settings["stop"]}
    except (runs.UserError, KeyError, TypeError):
        print(f"warning: {path} is damaged; made again", file=sys.stderr)
        return None


# --------------------------------------------------------------------------------------------------
# MNIST: pictures


@torch.inference_mode()
def write_sheets(cgn, args):
    """Sheets of the mechanisms, of counterfactuals, and of interpolations between classes."""
    pictures.save_picture(args.out / "mechanisms.png", pictures.mechanism_sheet(cgn))
    sheet = draw_counterfactuals(cgn, args.seed)
    pictures.save_picture(args.out / "counterfactuals.png", sheet)
    moving = {
        "shape": [SHAPE],
        "texture": [TEXTURE],
        "background": [BACKGROUND],
        "all": [SHAPE, TEXTURE, BACKGROUND],
    }
    for name, mechanisms in moving.items():
        sheet = draw_interpolation(cgn, mechanisms, args.seed)
        pictures.save_picture(args.out / f"interpolation_{name}.png", sheet)
    files = sorted(file.name for file in args.out.glob("*.png"))
    print(f"{args.out}: {', '.join(files)}")


def draw_counterfactuals(cgn, seed):
    """A sheet: one shape in each row, one pair of textures in each column."""
    y = pictures.shown_classes(cgn)
    other = (y + 1 + len(cgn.names) // 4) % len(cgn.names)  # any other class
    shape = sample_latents(cgn, seed, SHAPE, 0, len(y))
    texture = sample_latents(cgn, seed, TEXTURE, 0, len(y))
    scene = sample_latents(cgn, seed, BACKGROUND, 0, len(y))
    mask = cgn.mask(shape.z, y)
    foreground = shuffle_patches(cgn.foreground(texture.z, y), texture.offset)
    background = shuffle_patches(cgn.background(scene.z, other), scene.offset)
    titles = [f"f{a} b{b}" for a, b in zip(y.tolist(), other.tolist())]
    rows = [cgn.names[label] for label in y.tolist()]
    return pictures.counterfactual_sheet(mask, foreground, background, titles, rows)


def draw_interpolation(cgn, mechanisms, seed, steps=11):
    """A sheet whose row c goes from class c to class c + 1 in the given mechanisms.

    The class embedding is interpolated, the latents are fixed.
    """
    y = pictures.shown_classes(cgn)
    other = (y + 1) % len(cgn.names)
    latents = sample_latents(cgn, seed, SHAPE, 0, len(y))
    start = cgn.label_emb(y)
    end = cgn.label_emb(other)
    columns = []
    for position in torch.linspace(0, 1, steps, device=y.device):
        classes = [start] * 3
        for mechanism in mechanisms:
            classes[mechanism] = torch.lerp(start, end, position)
        mask = cgn.mask(latents.z, classes[SHAPE])
        foreground = cgn.foreground(latents.z, classes[TEXTURE])
        background = cgn.background(latents.z, classes[BACKGROUND])
        foreground = shuffle_patches(foreground, latents.offset)
        background = shuffle_patches(background, latents.offset)
        columns.append(compose(mask, foreground, background))
    titles = [f"{cgn.names[a]} to {cgn.names[b]}" for a, b in zip(y.tolist(), other.tolist())]
    return pictures.interpolation_sheet(columns, titles)


def bundled_weights(dataset):
    """The path of the bundled weights of a variant. UserError if there are none."""
    path = runs.ROOT / "data" / "pretrained" / f"{dataset}.pt"
    if not path.is_file():
        raise runs.UserError(
            f"--dataset {dataset}: no weights in {path.parent}; give --weights, a training's "
            "weights.pt"
        )
    return path


def generate_mnist(args, device):
    """Write a data set of --n images, or without --n sheets to look at, into args.out."""
    weights = args.weights or bundled_weights(args.dataset or "colored_mnist")
    cgn, trained = train_cgn.load_generator(weights, raw=args.raw_weights)
    if args.dataset and trained.get("dataset", args.dataset) != args.dataset:
        raise runs.UserError(
            f"--dataset {args.dataset}: {weights} was trained on {trained['dataset']}"
        )
    offline = bool(trained.get("offline"))
    if offline:
        print("weights of a run with --offline:", runs.OFFLINE)
    if args.shapes == "real" and trained.get("dataset") == "images":
        folders.check_out(args.data_dir, args.out)
    cgn.to(device)
    sha256 = runs.file_sha256(weights)
    with runs.claim_folder(args.out, __file__, args.resume):
        real = None
        if args.shapes == "real":
            real = find_real_shapes(args, weights, trained, device)
        description = {
            "shapes": args.shapes,
            "left_out": real.left_out if real else 0,
            "dataset": args.dataset or trained.get("dataset"),
            "classes": cgn.names,
            "offline": offline,
            "textures": args.textures or trained.get("textures"),
            "weights": str(weights),
        }
        arguments = vars(args) | description | {"weights_sha256": sha256}
        # Textures and images are compared by their SHA-256, and that of the weights.
        free = checkpoints.FREE | {"batch_size", "format", "left_out", "textures"}
        checkpoints.check_resumed(args.out, arguments, free)
        runs.describe_run(args.out, __file__, arguments)
        if args.n:
            settings = Settings(
                seed=args.seed,
                per_shape=1 if args.factual else args.per_shape,
                jitter=0.0 if args.factual else args.jitter,
                mix=0.0 if args.factual else args.mix,
                factual=args.factual,
                weights_sha256=sha256,
                images_sha256=real.sha256 if real else "",
            )
            # bf16 moves a pixel in five by one of 256 levels, and one in 250 by more than four, at
            # the edges of masks.
            bf16 = runs.pick_bf16("auto", device)
            cgn.to(device, torch.bfloat16 if bf16 else torch.float32)
            generate_dataset(cgn, args, settings, description, device, real)
        elif real:
            images = real.images.to(device)
            sheet = pictures.segmentation_sheet(cgn, images, real.masks, real.labels)
            pictures.save_picture(args.out / "segmentation.png", sheet)
            print(f"{args.out}: segmentation.png")
        else:
            write_sheets(cgn, args)


# --------------------------------------------------------------------------------------------------
# MNIST: flags


def parse_mnist(parser, argv):
    """The arguments of a MNIST variant."""
    parser.add_argument(
        "--shapes", choices=["generated", "real"], default="generated",
        help="shapes of the counterfactuals: the generator's, or those that its segmenter finds in "
        "the biased training images",
    )
    source = parser.add_argument_group("training images (with --shapes real)")
    source.add_argument(
        "--data-dir", type=Path, default=runs.DOWNLOADS,
        help="folder with MNIST's files, downloaded if missing; or with a generator's images",
    )
    source.add_argument(
        "--textures", help="of wildlife MNIST: folder with object/ and background/, or 'dtd'"
    )
    data = parser.add_argument_group("data set (with --n)")
    data.add_argument(
        "--n", type=runs.positive_int, help="images in the data set; without, sheets to look at"
    )
    data.add_argument(
        "--batch-size", type=runs.positive_int, default=500,
        help="images in a batch; changes no image",
    )
    data.add_argument(
        "--format", choices=["chunks", "png"], default="chunks",
        help="png: PNG files and labels.csv beside the chunks, which train_classifier.py reads",
    )
    data.add_argument(
        "--factual", action="store_true",
        help="one latent and one class for all three mechanisms: the generator's idea of the "
        "training data",
    )
    mixing = parser.add_argument_group("counterfactuals (with --n, without --factual)")
    mixing.add_argument(
        "--per-shape", type=runs.positive_int, default=1,
        help="texture and background pairs for each mask",
    )
    mixing.add_argument(
        "--jitter", type=runs.non_negative_float, default=0.05, metavar="S",
        help="shift the colors of each foreground and each background by N(0, S); they are 0 to 1",
    )
    mixing.add_argument(
        "--mix", type=runs.non_negative_float, default=0.0, metavar="S",
        help="mix the color channels of each foreground and each background, -1 to 1, by "
        "I + N(0, S)",
    )
    args = parser.parse_args(argv)
    if not args.n:
        runs.refuse_flags(parser, data, args, "needs --n")
        runs.refuse_flags(parser, mixing, args, "needs --n")
    if args.factual:
        runs.refuse_flags(parser, mixing, args, "has no meaning with --factual")
    if args.shapes == "generated":
        runs.refuse_flags(parser, source, args, "needs --shapes real")
    elif args.factual:
        parser.error("--factual: has no meaning with --shapes real")
    return args


# ==================================================================================================
# ImageNet

LARGEST_INDEX = 10**7  # pictures are numbered with seven digits
PARTS = ("premask", "mask", "foreground", "background", "counterfactual", "composite")
COLUMNS = (
    "file",
    "shape",
    "texture",
    "background",
    "shape_name",
    "texture_name",
    "background_name",
    "seed",
)
LEFT_OUT_COLUMNS = ("index", "source", "reason")
# The mechanisms that move in each leg of an interpolation.
LEGS = {
    "shape": [[0]],
    "texture": [[1]],
    "background": [[2]],
    "all": [[0, 1, 2]],
    "tour": [[1], [2], [0]],
}


# --------------------------------------------------------------------------------------------------
# ImageNet: latents and images


def allowed_classes(args):
    """The classes that each mechanism may draw: three lists. UserError for an unknown class."""
    best = imagenet.imagenet_metadata()["best_classes"]
    allowed = []
    for name in imagenet.HEADS:
        given = getattr(args, name) or args.classes
        if given:
            allowed.append(imagenet.class_indices(given))
        elif args.mode == "best":
            allowed.append(best[name])
        else:
            allowed.append(list(range(1000)))
    return allowed


def sample_image(seed, index, z_dim, allowed, photos=None):
    """Latent (z_dim,), before truncation, and the three classes (3,) of an image.

    With photos, Photographs, the shape's class is that of the image's photograph.
    """
    generator = runs.seeded_generator(seed, index)
    z = train_cgn.truncated_normal((z_dim,), generator)
    if photos:
        shape = photos.images.labels[index % len(photos.images)]
        allowed = [[int(shape)], *allowed[1:]]
    y = []
    for classes in allowed:
        drawn = torch.randint(len(classes), (), generator=generator)
        y.append(classes[int(drawn)])
    return z, torch.tensor(y)


def sample_images(seed, indices, z_dim, allowed, photos=None):
    """Latents (N, z_dim) and classes (N, 3) of several images."""
    samples = [sample_image(seed, index, z_dim, allowed, photos) for index in indices]
    z, y = zip(*samples)
    return torch.stack(z), torch.stack(y)


@torch.inference_mode()
def imagenet_images(cgn, z, y, truncation, parts=("counterfactual",), photographs=None):
    """Images by name, uint8 (N, 1 or 3, H, W).

    z: (N, z_dim), before truncation. y: classes (N, 3), or class vectors (N, 3, class_embed_dim).
    A counterfactual has the three classes given, a composite that of the shape everywhere. Only the
    networks that the wanted parts need are run. photographs: (N, 3, H, W) in [-1, 1], instead of
    the premasks.
    """
    dtype = cgn.u2net.outconv.weight.dtype
    z = (truncation * z).to(dtype)
    if y.is_floating_point():
        y = y.to(dtype)
    shape, texture, background = y.unbind(1)
    wanted = set(parts)
    images = {}
    if wanted & {"premask", "mask", "composite", "counterfactual"}:
        if photographs is None:
            images["premask"] = cgn.f_shape(z, shape)
        else:
            images["premask"] = photographs
    if wanted & {"mask", "composite", "counterfactual"}:
        images["mask"] = cgn.u2net(images["premask"].to(dtype)).clamp(1e-4, 1 - 1e-4)
    if wanted & {"foreground", "counterfactual"}:
        images["foreground"] = cgn.f_text(z, texture)
    if wanted & {"background", "counterfactual"}:
        images["background"] = cgn.f_bg(z, background)
    if "counterfactual" in wanted:
        images["counterfactual"] = compose(
            images["mask"], images["foreground"], images["background"]
        )
    if "composite" in wanted:
        foreground = cgn.f_text(z, shape)
        images["composite"] = compose(images["mask"], foreground, cgn.f_bg(z, shape))
    bytes_of = {}
    for name in parts:
        unit = images[name] if name == "mask" else images[name] / 2 + 0.5
        bytes_of[name] = unit.mul(255).round().to(torch.uint8)
    return bytes_of


# --------------------------------------------------------------------------------------------------
# ImageNet: photographs, whose objects are real shapes


class Photographs(NamedTuple):
    """Real images that give the shapes: picture i has number i, modulo their count."""

    images: imagenet.Images
    folder: Path  # which their names in the tables start from
    size: int  # they are cropped to squares of this


def photograph_name(photos, index):
    """The name of picture `index`'s photograph, from the folder on."""
    path = photos.images.paths[index % len(photos.images)]
    name = path.relative_to(photos.folder).as_posix()
    return name.encode(errors="replace").decode()  # a name need not be valid UTF-8, a table does


def load_photograph(photos, index):
    """Picture `index`'s photograph, uint8 (3, size, size). None if it is damaged or too large."""
    return photos.images.load(index % len(photos.images))


def stack_photographs(photos, loaded, device):
    """A list of what load_photograph returned -> (N, 3, size, size) in [-1, 1].

    None without `photos`. Damaged ones become gray: a batch is always full.
    """
    if not photos:
        return None
    gray = torch.full((3, photos.size, photos.size), 128, dtype=torch.uint8)
    pixels = torch.stack([gray if image is None else image for image in loaded])
    return pixels.to(device).float().div_(127.5).sub_(1)


def photographs_sha256(photos):
    """A SHA-256 over the names and sizes of the files, wherever their folder is."""
    digest = hashlib.sha256()
    for index, path in enumerate(photos.images.paths):
        size = path.stat().st_size if path.is_file() else 0  # a link to nowhere is a damaged image
        digest.update(f"{photograph_name(photos, index)} {size}\n".encode())
    return digest.hexdigest()


def reason_to_leave_out(loaded, mask, mask_range):
    """Why a picture cannot be used, in words, or None.

    loaded: what load_photograph returned. mask: uint8 (1, H, W).
    """
    if loaded is None:
        return "damaged, too large or no image"
    low, high = mask_range
    mean = mask.float().mean().item() / 255
    return None if low <= mean <= high else f"mean mask {mean:.3f}"


# --------------------------------------------------------------------------------------------------
# ImageNet: data sets


def picture_files(args, index):
    """The files of one image, one for each part that is saved."""
    return [args.out / part / f"{index:07d}.{args.format}" for part in args.save]


def label_row(args, photos, index, y):
    """An image's row of labels.csv. y: its three classes."""
    names = imagenet.class_names()
    part = "counterfactual" if "counterfactual" in args.save else args.save[0]
    file = f"{part}/{index:07d}.{args.format}"
    source = [photograph_name(photos, index)] if photos else []
    return [file, *y, *(names[c] for c in y), args.seed, *source]


def write_labels(args, z_dim, allowed, photos):
    """labels.csv anew: a row for each image that has all its files. Returns their indices."""
    present = []
    for part in args.save:
        files = (args.out / part).glob(f"[0-9]*.{args.format}")
        present.append({int(file.stem) for file in files if file.stem.isdecimal()})
    complete = sorted(set.intersection(*present))
    rows = [[*COLUMNS, "source"] if photos else COLUMNS]
    for index in complete:
        _, y = sample_image(args.seed, index, z_dim, allowed, photos)
        rows.append(label_row(args, photos, index, y.tolist()))
    runs.write_csv(args.out / "labels.csv", rows)
    return complete


def read_left_out(args):
    """The rows of left_out.csv by their pictures' indices. A kill may have cut the last line."""
    rows = {}
    path = args.out / "left_out.csv"
    if path.is_file():
        lines = path.read_text("utf-8", errors="replace").rpartition("\n")[0]
        for row in csv.reader(io.StringIO(lines)):
            if len(row) == len(LEFT_OUT_COLUMNS) and row[0].isdigit():
                rows[int(row[0])] = row
    return rows


def write_left_out(args):
    """left_out.csv anew: a row for each picture, in order. Returns their indices."""
    rows = read_left_out(args)
    indices = sorted(rows)
    table = [LEFT_OUT_COLUMNS, *(rows[index] for index in indices)]
    runs.write_csv(args.out / "left_out.csv", table)
    return indices


def leave_out(args, photos, first, missing, loaded, masks):
    """The indices in `missing` whose pictures can be used; the others get rows in left_out.csv.

    first: the index of the batch's first picture. loaded, masks: of the whole batch, as in
    reason_to_leave_out.
    """
    kept, rows = [], []
    for index in missing:
        place = index - first
        reason = reason_to_leave_out(loaded[place], masks[place], args.mask_range)
        if reason:
            rows.append([index, photograph_name(photos, index), reason])
        else:
            kept.append(index)
    runs.append_text(args.out / "left_out.csv", runs.csv_text(rows))
    return kept


def finish_pictures(args, pending):
    """Wait until the pictures of a batch are written; append the rows of those that are complete.

    pending: (row, futures of its files) of each image. Raises the first error in writing.
    """
    rows, errors = [], []
    for row, futures in pending:
        failed = [future.exception() for future in futures if future.exception()]
        if failed:
            errors += failed
        else:
            rows.append(row)
    runs.append_text(args.out / "labels.csv", runs.csv_text(rows))
    if errors:
        raise errors[0]


def missing_batches(args):
    """Yields this rank's batches: the indices of a whole one, and of its pictures to be made.

    Those that are there, or were left out before, are not.
    """
    rank, world_size = runs.rank_and_world_size()
    left_out = read_left_out(args)
    end = args.start + args.n
    batches = range(args.start // args.batch_size, math.ceil(end / args.batch_size))
    for batch in batches[rank::world_size]:
        first = batch * args.batch_size
        indices = range(first, first + args.batch_size)
        missing = []
        for index in indices:
            wanted = args.start <= index < end and index not in left_out
            if wanted and not all(file.is_file() for file in picture_files(args, index)):
                missing.append(index)
        if missing:
            yield indices, missing


class Batch(NamedTuple):
    """A drawn batch. Image `index` is at position index - indices[0]."""

    indices: range  # of all its images
    missing: list  # of those, the ones to be written
    y: torch.Tensor  # classes (N, 3)
    loaded: list  # what load_photograph returned; empty without photographs
    images: dict  # part -> uint8 (N, 1 or 3, H, W), on the CPU


def drawn_batches(cgn, args, allowed, photos, pool, device):
    """Yields each of this rank's batches as a Batch. Threads of the pool decode the photographs of
    the next one while the device draws.
    """
    z_dim = cgn.f_shape.z_dim
    parts = [*args.save, "mask"] if photos else args.save

    def draw_batch(z, y, photographs=None):
        return imagenet_images(cgn, z, y, args.truncation, parts, photographs)

    draw = GraphedStep(draw_batch, [], args.graph == "auto" and device.type == "cuda")
    for indices, missing, reading in read_ahead(missing_batches(args), photos, pool):
        z, y = sample_images(args.seed, indices, z_dim, allowed, photos)
        loaded = [future.result() for future in reading]
        inputs = [z.to(device), y.to(device)]
        if photos:
            inputs.append(stack_photographs(photos, loaded, device))
        images = {part: values.cpu() for part, values in draw(*inputs).items()}
        yield Batch(indices, missing, y, loaded, images)


def read_ahead(batches, photos, pool):
    """Yields batches with futures of their photographs, none without `photos`; those of the next
    batch are begun before one is yielded.
    """
    before = None
    for indices, missing in batches:
        reading = [pool.submit(load_photograph, photos, index) for index in indices if photos]
        if before:
            yield before
        before = (indices, missing, reading)
    if before:
        yield before


def submit_pictures(args, photos, batch, kept, pool):
    """Let threads write the pictures `kept` of a batch. Returns for each its row of labels.csv and
    the futures of its files.
    """
    pending = []
    for index in kept:
        place = index - batch.indices[0]
        futures = []
        for part, file in zip(args.save, picture_files(args, index)):
            futures.append(pool.submit(pictures.save_picture, file, batch.images[part][place]))
        pending.append((label_row(args, photos, index, batch.y[place].tolist()), futures))
    return pending


def write_pictures(cgn, args, allowed, photos, device):
    """Write the pictures that are missing, and a row of labels.csv for each complete image.

    Batches begin at multiples of --batch-size and are always full: a network rounds differently for
    other sizes. Batches are dealt out over ranks. Pictures are encoded and written by threads while
    the device makes the next batch.
    """
    stop = runs.StopSignal()
    z_dim = cgn.f_shape.z_dim
    if runs.is_main_rank():
        for part in args.save:
            (args.out / part).mkdir(exist_ok=True)
        write_labels(args, z_dim, allowed, photos)  # rows that an interruption left out
        if photos:
            write_left_out(args)  # without a line that it cut
    runs.wait_for_ranks()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        pending = []
        for batch in drawn_batches(cgn, args, allowed, photos, pool, device):
            finish_pictures(args, pending)  # of the batch before, written meanwhile
            pending = []
            kept = batch.missing
            if photos:
                first = batch.indices[0]
                kept = leave_out(args, photos, first, kept, batch.loaded, batch.images["mask"])
            pending = submit_pictures(args, photos, batch, kept, pool)
            if runs.is_main_rank():
                done = min(batch.indices[-1] + 1, args.start + args.n) - args.start
                print(f"\r{done}/{args.n} images", end="", flush=True)
            if stop:
                break
        finish_pictures(args, pending)
    runs.wait_for_ranks()
    if runs.is_main_rank():
        complete = write_labels(args, z_dim, allowed, photos)  # in order, whichever rank was first
        left_out = write_left_out(args) if photos else []
        print_summary(args, complete, left_out, stop)
    if stop:
        raise stop.stopped()


def print_summary(args, complete, left_out, stopped):
    """Say how many of the images are there. UserError if no photograph could be used.

    complete, left_out: indices, also of other ranges.
    """
    print()  # below the progress
    wanted = range(args.start, args.start + args.n)
    left = sum(index in wanted for index in left_out)
    if left == args.n:
        raise runs.UserError(
            f"--images {args.images}: none of {args.n} images could be used, see "
            f"{args.out / 'left_out.csv'}; give other photographs, or another --mask-range"
        )
    count = sum(index in wanted for index in complete)
    note = f" ({left} left out, see left_out.csv)" if left else ""
    hint = "; resume with the same command and --resume" if stopped else ""
    print(f"{args.out}: {count} of {args.n} images{note}, labels.csv{hint}")


# --------------------------------------------------------------------------------------------------
# ImageNet: the quality of the images, as the loss ablation measures it (appendix C)

SPLITS = 2  # parts of the images of which the Inception Score is taken


def inception_score(probabilities, splits=SPLITS):
    """Inception Score (Salimans et al. 2016): the exponential of the mean Kullback-Leibler
    divergence of predictions to their mean.

    probabilities: (N, classes). Returns mean and standard deviation over parts of the images.
    """
    scores = []
    for part in probabilities.double().chunk(splits):
        marginal = part.mean(0, keepdim=True)
        divergence = torch.xlogy(part, part) - torch.xlogy(part, marginal)
        scores.append(divergence.sum(1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def load_inception(args, device):
    """Torchvision's Inception v3, for images in [-1, 1]; with random weights if --offline."""
    inception = torchvision.models.inception_v3(weights=None, init_weights=False)
    if not args.offline:
        entry = download.torchvision_file("inception_v3")
        state = load_network(entry, args.weights_dir, None, inception.state_dict())
        inception.load_state_dict(state)
    return inception.eval().to(device, memory_format=torch.channels_last)


@torch.inference_mode()
def write_score(cgn, args, allowed, device):
    """Write score.json: Inception Score and mean mask of --score images, 8 bits each, of one class
    for all mechanisms.
    """
    inception = load_inception(args, device)
    probabilities = []
    masks = []
    end = args.start + args.score
    for start in range(args.start, end, args.batch_size):
        indices = range(start, min(start + args.batch_size, end))
        z, y = sample_images(args.seed, indices, cgn.f_shape.z_dim, allowed)
        z, y = z.to(device), y.to(device)
        images = imagenet_images(cgn, z, y, args.truncation, ("mask", "composite"))
        x = images["composite"].float() / 127.5 - 1
        x = F.interpolate(x, (299, 299), mode="bilinear")
        probabilities.append(inception(x).softmax(1).cpu())
        masks.append(images["mask"].float().mean((1, 2, 3)).cpu() / 255)
        print(f"\r{indices.stop - args.start}/{args.score} images", end="", flush=True)
    score, spread = inception_score(torch.cat(probabilities))
    content = {
        "inception score": score,
        "standard deviation over parts": spread,
        "parts": SPLITS,
        "mean mask": torch.cat(masks).mean().item(),
        "images": args.score,
        "truncation": args.truncation,
    }
    runs.write_json(args.out / "score.json", content)
    print(
        f"\nInception Score {score:.1f} +- {spread:.1f} ({SPLITS} parts of {args.score} images, "
        f"torchvision's Inception v3), mean mask {content['mean mask']:.3f}"
    )


# --------------------------------------------------------------------------------------------------
# ImageNet: pictures


def class_vectors(cgn, y):
    """Classes (N, 3) -> class vectors (N, 3, class_embed_dim), by each mechanism's embedding."""
    shape, texture, background = y.unbind(1)
    vectors = [
        cgn.f_shape.class_vectors(shape),
        cgn.f_text.class_vectors(texture),
        cgn.f_bg.class_vectors(background),
    ]
    return torch.stack(vectors, 1)


def write_interpolation(cgn, args, allowed, photos, device):
    """Go to class --to by class vectors with z fixed: frames, a sheet, and a GIF there and back."""
    z, y = sample_images(args.seed, [args.start], cgn.f_shape.z_dim, allowed, photos)
    z, y = z.to(device), y.to(device)
    loaded = [load_photograph(photos, args.start)] if photos else []
    photographs = stack_photographs(photos, loaded, device)
    goal = class_vectors(cgn, torch.full_like(y, imagenet.class_index(args.to)))
    position = class_vectors(cgn, y)
    frames = []
    for mechanisms in LEGS[args.interpolate]:
        target = position.clone()
        target[:, mechanisms] = goal[:, mechanisms]
        for t in torch.linspace(0, 1, args.frames).tolist():
            between = torch.lerp(position, target, t)
            images = imagenet_images(
                cgn, z, between, args.truncation, ("counterfactual", "mask"), photographs
            )
            frames.append(images["counterfactual"].cpu())
        position = target
    if photos:
        reason = reason_to_leave_out(loaded[0], images["mask"][0], args.mask_range)
        if reason:
            raise runs.UserError(
                f"--images {args.images}: {photograph_name(photos, args.start)}: {reason}; choose "
                "another with --start, or another --mask-range"
            )
    images = torch.cat(frames)  # (frames, 3, H, W)
    for index, image in enumerate(images):
        pictures.save_picture(args.out / f"frame_{index:03d}.png", image)
    rows = images.unflatten(0, (-1, args.frames)) / 255
    pictures.save_picture(args.out / "sheet.png", pictures.tile_sheet(rows, scale=1))
    there_and_back = torch.cat([images, images.flip(0)])
    first, *rest = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in there_and_back]
    with runs.atomic(args.out / "animation.gif") as temporary:
        first.save(temporary, format="GIF", save_all=True, append_images=rest, duration=80, loop=0)
    print(f"{args.out}: {len(images)} frames, sheet.png, animation.gif")


def write_parts_sheet(cgn, args, allowed, photos, device):
    """A sheet with all parts of the 8 images from --start on, also of those that are left out of a
    data set: their titles say why.
    """
    indices = range(args.start, args.start + 8)
    z, y = sample_images(args.seed, indices, cgn.f_shape.z_dim, allowed, photos)
    loaded = [load_photograph(photos, index) for index in indices if photos]
    photographs = stack_photographs(photos, loaded, device)
    images = imagenet_images(cgn, z.to(device), y.to(device), args.truncation, PARTS, photographs)
    columns = torch.stack([images[part].expand(-1, 3, -1, -1) for part in PARTS], 1)
    names = ["photograph", *PARTS[1:]] if photos else PARTS
    titles = ["/".join(map(str, classes)) for classes in y.tolist()]
    for row, image in enumerate(loaded):
        reason = reason_to_leave_out(image, images["mask"][row], args.mask_range)
        titles[row] += f"\nleft out:\n{reason}" if reason else ""
    sheet = pictures.tile_sheet(columns.float() / 255, names, titles, scale=1)
    pictures.save_picture(args.out / "sheet.png", sheet)
    print(f"{args.out}: sheet.png")


def find_weights(args):
    """The file of --weights, or the authors' cgn.pth, downloaded if need be and allowed."""
    if args.weights:
        return args.weights
    file = download.FILES["cgn"]
    if runs.is_main_rank() and not args.offline:
        download.find_or_download(file, args.weights_dir)
    runs.wait_for_ranks()
    weights = download.find_file(file, args.weights_dir)
    if not weights:
        raise runs.UserError(
            f"--offline: no cgn.pth in {args.weights_dir}; give --weights, or let it be downloaded"
        )
    return weights


def generate_imagenet(args, device):
    """Write pictures, an interpolation, or a sheet to look at, into args.out."""
    allowed = allowed_classes(args)  # unknown classes show before anything is loaded
    if args.to:
        imagenet.class_index(args.to)
    if args.shapes == "real":
        chosen = allowed[0] if args.shape or args.classes else None
        files = imagenet.photograph_images(args.images, chosen)
    weights = find_weights(args)
    cgn, trained = train_cgn.load_imagenet_generator(weights, args.raw_weights)
    if trained.get("dataset", "imagenet") != "imagenet":
        raise runs.UserError(f"--dataset imagenet: {weights} was trained on {trained['dataset']}")
    if trained.get("offline") and runs.is_main_rank():
        print("weights of a run with --offline:", runs.OFFLINE)
    bf16 = runs.pick_bf16(args.amp, device)
    cgn = train_cgn.fold(cgn, args.truncation).to(device, torch.bfloat16 if bf16 else torch.float32)
    photos = None
    if args.shapes == "real":
        size = train_cgn.SMALL["output_dim"] if trained.get("preset") == "small" else 256
        transform = imagenet.make_transform(False, size, margin=False)
        images = imagenet.Images(*files, transform, upright=True)
        photos = Photographs(images, args.images, size)

    with runs.claim_folder(args.out, __file__, args.resume):
        if runs.is_main_rank():
            arguments = vars(args) | {"weights_sha256": runs.file_sha256(weights)}
            if photos:
                arguments["images_sha256"] = photographs_sha256(photos)
            free = checkpoints.FREE | {"offline", "images"}  # moved images have the same SHA-256
            checkpoints.check_resumed(args.out, arguments, free)
            runs.describe_run(args.out, __file__, arguments)
        runs.wait_for_ranks()
        if args.score:
            write_score(cgn, args, allowed, device)
        elif args.interpolate:
            write_interpolation(cgn, args, allowed, photos, device)
        elif args.n:
            write_pictures(cgn, args, allowed, photos, device)
        else:
            write_parts_sheet(cgn, args, allowed, photos, device)


# --------------------------------------------------------------------------------------------------
# ImageNet: flags


def parse_imagenet(parser, argv):
    """The arguments of ImageNet."""
    group = parser.add_argument_group("ImageNet")
    group.add_argument(
        "--weights-dir", type=Path, default=runs.DOWNLOADS,
        help="folder with cgn.pth; downloaded if missing",
    )
    group.add_argument("--offline", action="store_true", help="download nothing")
    group.add_argument(
        "--start", type=runs.non_negative_int, default=0,
        help="index of the first image, to split a data set",
    )
    group.add_argument(
        "--mode", choices=["random", "best"], default="random",
        help="draw from all classes, or from the authors' lists of good ones for each mechanism",
    )
    group.add_argument(
        "--shapes", choices=["generated", "real"], default="generated",
        help="the generator's shapes, or objects cut out of the photographs in --images",
    )
    group.add_argument(
        "--classes", nargs="+", metavar="CLASS",
        help="draw from these alone: numbers, WNIDs, (parts of) English names, files with one per "
        "line, imagenette, imagenet-a; with --shapes real, take photographs of these alone",
    )
    group.add_argument(
        "--shape", nargs="+", metavar="CLASS", help="draw the shape from these instead"
    )
    group.add_argument("--texture", nargs="+", metavar="CLASS", help="the same for the texture")
    group.add_argument(
        "--background", nargs="+", metavar="CLASS", help="the same for the background"
    )
    group.add_argument(
        "--truncation", type=runs.truncation, default=0.5,
        help="truncation of the latents, (0, 1]: less is less varied",
    )
    group.add_argument(
        "--amp", choices=["auto", "off", "bf16"], default="auto",
        help="bf16 arithmetic; auto: if the hardware has it",
    )

    data = parser.add_argument_group("data set (with --n)")
    data.add_argument(
        "--n", type=runs.positive_int,
        help="images in the data set; without, or --interpolate, a sheet to look at",
    )
    data.add_argument(
        "--save", nargs="+", choices=PARTS, default=["counterfactual"],
        help="pictures to write; composite has the shape's class everywhere; premask is, with "
        "--shapes real, the photograph as cropped",
    )
    data.add_argument("--format", choices=["jpg", "png"], default="jpg", help="of the pictures")
    data.add_argument(
        "--graph", choices=["auto", "off"], default="auto",
        help="record a batch as a CUDA graph; auto: on a GPU",
    )

    batches = parser.add_argument_group("batches (with --n or --score)")
    batches.add_argument(
        "--batch-size", type=runs.positive_int, default=16,
        help="images in a batch; batches are dealt out over GPUs; another size rounds differently",
    )

    morph = parser.add_argument_group("interpolation (with --interpolate)")
    morph.add_argument(
        "--interpolate", choices=list(LEGS),
        help="go to class --to in one mechanism, in all, or in one after the other",
    )
    morph.add_argument("--to", metavar="CLASS", help="the class to go to")
    morph.add_argument("--frames", type=runs.positive_int, default=9, help="frames of each leg")

    parser.add_argument(
        "--score", type=int, metavar="N",
        help="Inception Score and mean mask of N images of one class for all mechanisms; 2000 in "
        "the published comparison",
    )

    real = parser.add_argument_group("photographs (with --shapes real)")
    real.add_argument(
        "--images", type=Path, metavar="FOLDER",
        help="class folders named by WNID, or images of the one class that --shape "
        "names; picture i has the shape of photograph i, modulo their count",
    )
    real.add_argument(
        "--mask-range", nargs=2, type=runs.fraction, default=[0.05, 0.9], metavar=("LOW", "HIGH"),
        help="pictures whose mean mask lies outside are left out, and named in left_out.csv",
    )

    args = parser.parse_args(argv)
    args.save = list(dict.fromkeys(args.save))  # each part once
    check_shapes(parser, real, args)
    if args.classes and args.mode == "best":
        parser.error("--mode best: has lists of classes of its own; leave out --classes")
    if args.score is not None:
        check_score(parser, data, args)
    elif not args.n:
        runs.refuse_flags(parser, data, args, "needs --n")
        runs.refuse_flags(parser, batches, args, "needs --n or --score")
    elif args.interpolate:
        parser.error("--n: has no meaning with --interpolate")
    if not args.interpolate:
        runs.refuse_flags(parser, morph, args, "needs --interpolate")
    elif not args.to:
        parser.error("--interpolate: needs --to, the class to go to")
    last = args.start + (args.n or 1)
    if last > LARGEST_INDEX:
        parser.error(
            f"--start {args.start} --n {args.n}: images are numbered 0 to {LARGEST_INDEX - 1}; "
            "choose a range within"
        )
    return args


def check_score(parser, data, args):
    """The parser's error for flags that contradict --score. data: the group of --n."""
    if not 10 <= args.score < LARGEST_INDEX:
        parser.error(f"--score {args.score}: should be 10 images or more; 2000 are usual")
    runs.refuse_flags(parser, data, args, "has no meaning with --score")
    if args.interpolate or args.shapes == "real" or args.texture or args.background:
        parser.error(
            "--score: not with --interpolate, --shapes real, --texture or --background; the class "
            "of --shape or --classes is that of all mechanisms"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("--score: runs on one GPU")


def check_shapes(parser, real, args):
    """The parser's error for flags that contradict --shapes. real: the group of photographs."""
    if args.shapes == "generated":
        runs.refuse_flags(parser, real, args, "needs --shapes real")
    elif not args.images:
        parser.error("--shapes real: needs --images, a folder of photographs")
    elif args.interpolate and [0] in LEGS[args.interpolate]:
        parser.error(
            f"--interpolate {args.interpolate}: moves the shape, which is the photograph's with "
            "--shapes real; choose texture, background or all"
        )
    low, high = args.mask_range
    if low >= high:
        parser.error(f"--mask-range {low} {high}: LOW should be below HIGH")


# ==================================================================================================
# Command line


def parse_args(argv=None):
    """The arguments of one run. --dataset chooses the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--dataset", choices=[*mnist.VARIANTS, "images", "imagenet"],
        help="colored_mnist if neither this nor --weights is given; weights that were trained on "
        "another are refused; imagenet has other flags: --dataset imagenet --help shows them",
    )
    parser.add_argument(
        "--weights", type=Path,
        help="weights.pt of a training, or published weights; if not given, the bundled ones, for "
        "ImageNet the authors' cgn.pth",
    )
    parser.add_argument(
        "--raw-weights", action="store_true", help="use the weights, not their moving average"
    )
    parser.add_argument(
        "--out", type=Path, default="runs/generated", help="folder; new, empty, or resumed"
    )
    parser.add_argument(
        "--resume", nargs="?", const="auto", choices=["auto"],
        help="make only what --out does not hold yet",
    )
    parser.add_argument(
        "--seed", type=runs.non_negative_int, default=0, help="same seed, same images"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one"
    )
    (dataset,) = runs.look_ahead(argv, "--dataset")
    if dataset == "imagenet":
        return parse_imagenet(parser, argv)
    return parse_mnist(parser, argv)


def main():
    args = parse_args()
    runs.check_one_process(args.dataset)
    device = runs.join_ranks(runs.pick_device(args.device))
    if args.dataset == "imagenet":
        generate_imagenet(args, device)
    else:
        generate_mnist(args, device)


if __name__ == "__main__":
    runs.run_main(main)
