"""Generate counterfactual images with a trained CGN (Sauer & Geiger, ICLR 2021, section 3.3).

    python generate.py                                            # pictures to look at, of the weights that come along
    python generate.py --dataset wildlife_mnist --n 100000 --out runs/wildlife-cf                           # a data set
    python generate.py --weights runs/first/weights.pt --n 100000 --factual --out runs/first-factual   # one label for all

A data set is a folder of chunk_00000.pt, chunk_00001.pt, ..., each with `images`, uint8 (n, 3, 32, 32), and `labels`,
uint8 (n, 3): the classes of shape, texture and background. dataset.json is written last, when all chunks are there.
Image i depends on the seed, --per-shape, --jitter and i alone, so an interrupted run goes on with --resume.

    python generate.py --dataset imagenet --n 50000 --out runs/counterfactuals          # the authors' weights, fetched
    python generate.py --dataset imagenet --shape tabby --texture zebra --n 8 --out runs/cats
    python generate.py --dataset imagenet --interpolate all --to zebra --out runs/morph

ImageNet's are files, counterfactual/0000000.jpg, ..., and labels.csv, a row for each that is there.
"""
import argparse
import concurrent.futures
import csv
import difflib
import hashlib
import io
import json
import sys
from pathlib import Path

import torch
import torchvision
from PIL import Image

from data.frozen import fold
from data.mnist import SIZE, VARIANTS
from data.runs import (DOWNLOADS, ROOT, StopSignal, UserError, append_text, claim_folder, describe_run, file_sha256,
                       intact_archive, join_ranks, load_tensors, non_negative_float, non_negative_int, pick_bf16,
                       pick_device, positive_int, rank_and_ranks, refuse_group, run_main, save_png, save_tensors,
                       tile_sheet, truncation, wait_for_ranks, write_atomically, write_json)
from data.sheets import sample_sheet
from data.weights import find_file, find_or_download
from kernels import shuffle_patches
from train_cgn import (CLASSES, LATENT, load_generator, load_imagenet_generator, truncated_normal)

CHUNK = 2_000                                              # images in a file
BLOCK = 1_000                                              # random numbers are drawn for so many images at a time
LAST = 10 ** 7                                             # ImageNet's images are numbered with seven digits
SLICE = 100                                                # latents that a network sees at a time
SHAPE, TEXTURE, BACKGROUND = range(3)                      # mechanisms, each with a stream of random numbers


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers that depend on the seed and the image's number alone


def draw_block(seed, stream, number):
    """Of one block of one mechanism: latents (BLOCK, 32), classes (BLOCK,), shuffling offsets (BLOCK, 2), and shifts of
    the colour (BLOCK, 3), N(0, 1)."""
    digest = hashlib.sha256(f"{seed} {stream} {number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return (torch.randn(BLOCK, LATENT, generator=generator), torch.randint(CLASSES, (BLOCK,), generator=generator),
            torch.randint(SIZE, (BLOCK, 2), generator=generator), torch.randn(BLOCK, 3, generator=generator))


def draw(seed, stream, start, stop):
    """Latents, classes, offsets and shifts of numbers start..stop-1, drawn on the CPU, so that every device agrees."""
    first = start // BLOCK
    blocks = [draw_block(seed, stream, number) for number in range(first, (stop - 1) // BLOCK + 1)]
    return [torch.cat(parts)[start - first * BLOCK:stop - first * BLOCK] for parts in zip(*blocks)]


# ---------------------------------------------------------------------------------------------------------------------
# Data sets


def make(mechanism, seed, stream, start, stop, device):
    """Outputs and classes of numbers start..stop-1 of a stream.

    The network always sees whole slices of SLICE latents that begin at multiples of SLICE: kernels round differently
    for other batch sizes, and some pixel would tip over to the next of its 256 values.
    """
    first, last = start // SLICE * SLICE, -(-stop // SLICE) * SLICE
    z, y = draw(seed, stream, first, last)[:2]
    outputs = [mechanism(*part) for part in zip(z.to(device).split(SLICE), y.to(device).split(SLICE))]
    return [x[start - first:stop - first] for x in (torch.cat(outputs), y)]


@torch.inference_mode()
def generate_batch(cgn, args, start, stop, device):
    """Images start..stop-1 of the data set: uint8 (n, 3, 32, 32), labels uint8 (n, 3), both on the CPU."""
    shape_of = torch.arange(start, stop) // args.per_shape                                # each mask serves per_shape
    first = start // args.per_shape
    mask, y = make(cgn.mask, args.seed, SHAPE, first, (stop - 1) // args.per_shape + 1, device)
    mask, classes, textures = mask[(shape_of - first).to(device)], [y[shape_of - first]], []
    for stream, mechanism in ((TEXTURE, cgn.foreground), (BACKGROUND, cgn.background)):
        offsets, shifts = (x.to(device) for x in draw(args.seed, stream, start, stop)[2:])
        # Factual images are as in training: one latent and one class for all three mechanisms.
        texture, y = make(mechanism, args.seed, SHAPE if args.factual else stream, start, stop, device)
        texture = shuffle_patches(texture, offsets) + 2 * args.jitter * shifts[..., None, None]
        textures.append(texture.clamp_(-1, 1))
        classes.append(y)
    images = torch.lerp(textures[1], textures[0], mask).add_(1).mul_(127.5).round_().to(torch.uint8)
    return images.cpu(), torch.stack(classes, 1).to(torch.uint8)


def generate_dataset(cgn, args, out, device):
    """Write the chunks that are missing, then dataset.json. Memory stays that of one chunk."""
    settings = {name: getattr(args, name) for name in ("seed", "per_shape", "jitter", "factual", "weights_sha256")}
    starts, signal = range(0, args.n, CHUNK), StopSignal()
    for number, start in enumerate(starts):
        stop = min(start + CHUNK, args.n)
        path = out / f"chunk_{number:05d}.pt"
        if path.is_file() and (before := chunk_settings(path)):
            if before != settings | {"start": start, "stop": stop}:
                raise UserError(f"--resume: {path} was made with other settings or weights; give the same ones, or "
                                "choose another --out")
            continue
        if signal:
            print(f"\n{out}: stopped after {start} of {args.n} images; go on with the same command and --resume")
            return
        parts = [generate_batch(cgn, args, i, min(i + args.batch_size, stop), device)
                 for i in range(start, stop, args.batch_size)]
        images, labels = (torch.cat(column) for column in zip(*parts))
        save_tensors(path, {"images": images, "labels": labels, "settings": settings | {"start": start, "stop": stop}})
        print(f"\r{stop}/{args.n} images", end="", flush=True)
    write_json(out / "dataset.json", settings | {"n": args.n, "chunks": len(starts), "dataset": args.dataset,
                                                 "offline": args.offline, "weights": str(args.weights)})
    print(f"\n{out}: {args.n} images; next: python train_classifier.py --train counterfactual --counterfactual {out}")


def pretrained(dataset):
    """The weights of a variant that come with the project, or UserError."""
    path = ROOT / "data" / "pretrained" / f"{dataset}.pt"
    if dataset not in VARIANTS or not path.is_file():
        raise UserError(f"--dataset {dataset}: no weights in {path.parent}; give --weights, a training's weights.pt")
    return path


def chunk_settings(path):
    """What a chunk was made with; None if it is damaged, to be made again."""
    try:
        content = load_tensors(path) if intact_archive(path) else None
        return content["settings"]
    except (UserError, KeyError, TypeError):
        print(f"warning: {path} is damaged; made again", file=sys.stderr)
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


@torch.inference_mode()
def counterfactual_sheet(cgn, seed, device):
    """One shape per row, one pair of textures per column. The left column shows the row's mask."""
    z, y = (x.to(device) for x in draw(seed, SHAPE, 0, CLASSES)[:2])
    y = torch.arange(CLASSES, device=device)
    mask = cgn.mask(z, y)
    textures = []
    for stream, mechanism in ((TEXTURE, cgn.foreground), (BACKGROUND, cgn.background)):
        z, _, offsets = (x.to(device) for x in draw(seed, stream, 0, CLASSES)[:3])
        textures.append(shuffle_patches(mechanism(z, (y + 3 * (stream == BACKGROUND)) % CLASSES), offsets))
    foreground, background = textures
    composites = torch.lerp(background[None], foreground[None], mask[:, None])                       # (10, 10, 3, ...)
    images = torch.cat([mask.expand(-1, 3, -1, -1)[:, None] * 2 - 1, composites], 1) / 2 + 0.5
    titles = ["mask", *(f"f{c} b{(c + 3) % CLASSES}" for c in range(CLASSES))]
    return tile_sheet(images, titles, [str(c) for c in range(CLASSES)])


@torch.inference_mode()
def interpolation_sheet(cgn, mechanisms, seed, device, steps=11):
    """Row c goes from class c to c + 1 in the given mechanisms, by its class embedding, with the latents fixed."""
    z, _, offsets = (x.to(device) for x in draw(seed, SHAPE, 0, CLASSES)[:3])
    y = torch.arange(CLASSES, device=device)
    start, end = cgn.label_emb(y), cgn.label_emb((y + 1) % CLASSES)
    columns = []
    for position in torch.linspace(0, 1, steps, device=device):
        between = torch.lerp(start, end, position)
        mask, foreground, background = (
            draw_one(z, between if mechanism in mechanisms else start)
            for mechanism, draw_one in enumerate((cgn.mask, cgn.foreground, cgn.background)))
        columns.append(torch.lerp(shuffle_patches(background, offsets), shuffle_patches(foreground, offsets), mask))
    rows = [f"{c} to {(c + 1) % CLASSES}" for c in range(CLASSES)]
    return tile_sheet(torch.stack(columns, 1) / 2 + 0.5, [], rows)


def write_sheets(cgn, args, out, device):
    save_png(out / "mechanisms.png", sample_sheet(cgn))
    save_png(out / "counterfactuals.png", counterfactual_sheet(cgn, args.seed, device))
    choices = {"shape": [SHAPE], "texture": [TEXTURE], "background": [BACKGROUND], "all": [SHAPE, TEXTURE, BACKGROUND]}
    for name, mechanisms in choices.items():
        save_png(out / f"interpolation_{name}.png", interpolation_sheet(cgn, mechanisms, args.seed, device))
    print(f"{out}: " + ", ".join(sorted(file.name for file in out.glob("*.png"))))


# ---------------------------------------------------------------------------------------------------------------------
# ImageNet


def class_number(text):
    """A class by its number or by (part of) its English name. Raises UserError, with suggestions."""
    names = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
    if text.isdigit() or text[:1] == "-":
        if text.isdigit() and int(text) < len(names):
            return int(text)
        raise UserError(f"class {text}: ImageNet has classes 0 to {len(names) - 1}")
    lower = [name.lower() for name in names]
    exact = [number for number, name in enumerate(lower) if name == text.lower()]
    found = exact or [number for number, name in enumerate(lower) if text.lower() in name]
    if len(found) == 1 or exact:
        return found[0]
    close = [names[number] for number in found] or difflib.get_close_matches(text.lower(), lower, 4)
    raise UserError(f"class {text!r}: {'more than one class' if found else 'no class'} of that name"
                    + (f"; meant {', '.join(close[:6])}?" if close else ""))


def choices_of(args):
    """The classes that each mechanism may draw: three lists."""
    best = json.loads((ROOT / "data" / "imagenet.json").read_text())["best_classes"]
    given = [args.shape, args.texture, args.background]
    lists = [best[name] if args.mode == "best" else list(range(1000)) for name in ("shape", "texture", "background")]
    return [[class_number(text) for text in some] if some else every for some, every in zip(given, lists)]


def draw_image(seed, number, z_dim, choices):
    """Latent (z_dim,) before truncation, and the classes (3,) of image `number`: a stream of its own for each."""
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    z = truncated_normal((z_dim,), generator)
    return z, torch.tensor([some[int(torch.randint(len(some), (), generator=generator))] for some in choices])


@torch.inference_mode()
def imagenet_images(cgn, z, y, args, save=("counterfactual",)):
    """Images by name, uint8 (N, 1 or 3, H, W), of latents (N, z_dim) and three classes or class vectors each.

    Counterfactual: with the three classes given. Composite: with the class of the shape everywhere.
    """
    dtype = cgn.u2net.outconv.weight.dtype
    z = (args.truncation * z).to(dtype)
    shape, texture, background = (c.to(dtype) if c.is_floating_point() else c for c in y.unbind(1))
    images, wanted = {}, set(save)
    if wanted & {"premask", "mask", "composite", "counterfactual"}:
        images["premask"] = cgn.f_shape(z, shape, args.truncation)
    if wanted & {"mask", "composite", "counterfactual"}:
        images["mask"] = cgn.u2net(images["premask"].to(dtype)).clamp(1e-4, 1 - 1e-4)
    if wanted & {"foreground", "counterfactual"}:
        images["foreground"] = cgn.f_text(z, texture, args.truncation)
    if wanted & {"background", "counterfactual"}:
        images["background"] = cgn.f_bg(z, background, args.truncation)
    if "counterfactual" in wanted:
        images["counterfactual"] = torch.lerp(images["background"], images["foreground"], images["mask"])
    if "composite" in wanted:
        textures = (f(z, shape, args.truncation) for f in (cgn.f_bg, cgn.f_text))
        images["composite"] = torch.lerp(*textures, images["mask"])
    return {name: (images[name] if name == "mask" else images[name] / 2 + 0.5).mul(255).round().to(torch.uint8)
            for name in save}


def write_picture(path, image):
    """Encode a uint8 (1 or 3, H, W) by the file's ending and write it, whole or not at all."""
    encode = torchvision.io.encode_png if path.suffix == ".png" else torchvision.io.encode_jpeg
    data = encode(image, **({} if path.suffix == ".png" else {"quality": 95})).numpy().tobytes()
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


COLUMNS = ("file", "shape", "texture", "background", "shape_name", "texture_name", "background_name", "seed")


def label_row(args, number, classes):
    names = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
    return [f"{args.save[0]}/{number:07d}.{args.format}", *classes, *(names[c] for c in classes), args.seed]


def write_labels(out, args, classes_of):
    """labels.csv, a row for each image that has all its files. Returns their numbers."""
    present = [{file.stem for file in (out / name).glob(f"[0-9]*.{args.format}")} for name in args.save]
    complete, text = sorted(map(int, set.intersection(*present))), io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *(label_row(args, n, classes_of(n)) for n in complete)])
    write_atomically(out / "labels.csv", lambda temporary: temporary.write_text(text.getvalue()))
    return complete


def generate_imagenet(cgn, args, out, device):
    """Write the pictures that are missing, and a row of labels.csv for each one that is complete.

    Batches begin at multiples of --batch-size and are always full: a network rounds differently for other sizes. Ranks
    take turns. Pictures are encoded and written by threads while the device makes the next batch.
    """
    (rank, ranks), choices, stop = rank_and_ranks(), choices_of(args), StopSignal()
    z_dim, size, end = cgn.f_shape.z_dim, args.batch_size, args.start + args.n
    for name in args.save:
        (out / name).mkdir(exist_ok=True)

    def drawn(number):
        return draw_image(args.seed, number, z_dim, choices)

    def files(number):
        return [out / name / f"{number:07d}.{args.format}" for name in args.save]

    def classes_of(number):
        return drawn(number)[1].tolist()

    complete = {n for n in range(args.start, end) if all(file.is_file() for file in files(n))}
    wait_for_ranks()
    if rank == 0:                                          # what an interruption left without a row gets one now
        write_labels(out, args, classes_of)
    wait_for_ranks()
    batches = range(args.start // size, -(-end // size))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        pending = []

        def finish():
            rows, failures = io.StringIO(), []
            for number, classes, writes in pending:
                if errors := [write.exception() for write in writes if write.exception()]:
                    failures += errors
                else:
                    csv.writer(rows, lineterminator="\n").writerow(label_row(args, number, classes))
            append_text(out / "labels.csv", rows.getvalue())
            pending.clear()
            if failures:
                raise failures[0]

        for batch in batches[rank::ranks]:
            numbers = range(batch * size, (batch + 1) * size)
            missing = [n for n in numbers if args.start <= n < end and n not in complete]
            if not missing:
                continue
            z, y = (torch.stack(column) for column in zip(*map(drawn, numbers)))
            images = {name: x.cpu() for name, x in
                      imagenet_images(cgn, z.to(device), y.to(device), args, args.save).items()}
            finish()                                       # the batch before, written meanwhile
            for n in missing:
                writes = [pool.submit(write_picture, file, images[name][n - batch * size])
                          for name, file in zip(args.save, files(n))]
                pending.append((n, y[n - batch * size].tolist(), writes))
            if rank == 0:
                print(f"\r{min(numbers[-1] + 1, end) - args.start}/{args.n} images", end="", flush=True)
            if stop:
                break
        finish()
    wait_for_ranks()
    if rank == 0:                                          # in order, whatever rank was first
        complete = [n for n in write_labels(out, args, classes_of) if args.start <= n < end]
        print(f"\n{out}: {len(complete)} of {args.n} images, labels.csv"
              + ("; go on with the same command and --resume" if stop else ""))


LEGS = {"shape": [[0]], "texture": [[1]], "background": [[2]], "all": [[0, 1, 2]], "tour": [[1], [2], [0]]}


def class_vectors(cgn, y):
    """Classes (N, 3) -> class vectors (N, 3, class_embed_dim), of each mechanism's own embedding."""
    return torch.stack([f.class_vectors(c) for f, c in zip((cgn.f_shape, cgn.f_text, cgn.f_bg), y.unbind(1))], 1)


def interpolate_imagenet(cgn, args, out, device):
    """To the class --to, by class vectors with z fixed: frames, a sheet with a row for each leg, and a GIF and back."""
    z, y = (x[None].to(device) for x in draw_image(args.seed, args.start, cgn.f_shape.z_dim, choices_of(args)))
    goal, points = class_vectors(cgn, torch.full_like(y, class_number(args.to))), [class_vectors(cgn, y)]
    for leg in LEGS[args.interpolate]:
        points.append(points[-1].clone())
        points[-1][:, leg] = goal[:, leg]
    path = [torch.lerp(a, b, t) for a, b in zip(points, points[1:]) for t in torch.linspace(0, 1, args.frames).tolist()]
    images = torch.cat([imagenet_images(cgn, z, y, args)["counterfactual"].cpu() for y in path])
    for number, image in enumerate(images):
        write_picture(out / f"frame_{number:03d}.png", image)
    save_png(out / "sheet.png", tile_sheet(images.unflatten(0, (-1, args.frames)) / 255, scale=1))
    frames = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in torch.cat([images, images.flip(0)])]
    write_atomically(out / "animation.gif", lambda temporary: frames[0].save(
        temporary, format="GIF", save_all=True, append_images=frames[1:], duration=80, loop=0))
    print(f"{out}: {len(images)} frames, sheet.png, animation.gif")


def imagenet_sheet(cgn, args, out, device):
    """Rows are images --start, ...: premask, mask, foreground, background, counterfactual and composite."""
    save, choices = SAVED, choices_of(args)
    z, y = (torch.stack(column).to(device) for column in
            zip(*(draw_image(args.seed, args.start + row, cgn.f_shape.z_dim, choices) for row in range(8))))
    images = imagenet_images(cgn, z, y, args, save)
    columns = torch.stack([images[name].expand(-1, 3, -1, -1) for name in save], 1).float() / 255
    save_png(out / "sheet.png", tile_sheet(columns, save, ["/".join(map(str, row)) for row in y.tolist()], scale=1))
    print(f"{out}: sheet.png")


SAVED = ("premask", "mask", "foreground", "background", "counterfactual", "composite")


def check_settings(out, args):
    """Refuse to mix pictures of different settings in one folder."""
    if (out / "args.json").is_file():
        before = json.loads((out / "args.json").read_text())["args"]
        for name in ("weights_sha256", "seed", "truncation", "mode", "shape", "texture", "background", "save", "format",
                     "amp", "raw_weights", "batch_size"):
            now = getattr(args, name)
            if before.get(name) != now:
                raise UserError(f"--resume: {out} was made with {name} = {before.get(name)}, not {now}; give the same "
                                "flags, or choose another --out")


def main_imagenet(args):
    if args.interpolate and not args.to:
        raise UserError("--interpolate: needs --to, the class to go to")
    if args.start + (args.n or 0) > LAST:
        raise UserError(f"--start {args.start} --n {args.n}: images are numbered 0 to {LAST - 1}; choose a range within")
    choices_of(args)                                       # unknown classes show now
    device = join_ranks(pick_device(args.device))
    if not args.weights:
        if rank_and_ranks()[0] == 0 and not args.offline:  # one rank fetches
            find_or_download("cgn", args.weights_dir)
        wait_for_ranks()
        args.weights = find_file("cgn", args.weights_dir)
    if not args.weights:
        raise UserError(f"--offline: no cgn.pth in {args.weights_dir}; give --weights, or let it be fetched")
    args.weights_sha256 = file_sha256(args.weights)
    cgn, trained = load_imagenet_generator(args.weights, args.raw_weights)
    if trained.get("dataset", "imagenet") != "imagenet":
        raise UserError(f"--dataset imagenet: {args.weights} was trained on {trained['dataset']}")
    if trained.get("offline"):
        print("OFFLINE weights: random networks. These images say nothing of ImageNet.")
    dtype = torch.bfloat16 if pick_bf16(args.amp, device) else torch.float32
    cgn = fold(cgn, args.truncation).to(device, dtype)
    if rank_and_ranks()[0] == 0:
        out = claim_folder(args.out, __file__, args.resume)
        check_settings(out, args)
        describe_run(out, __file__, args)
    wait_for_ranks()
    do = interpolate_imagenet if args.interpolate else generate_imagenet if args.n else imagenet_sheet
    do(cgn, args, args.out, device)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--weights", type=Path, help="weights.pt of a training, or published weights; if not given, "
                        "data/pretrained/DATASET.pt, and for ImageNet the authors' cgn.pth")
    parser.add_argument("--weights-dir", type=Path, default=DOWNLOADS, help="folder with cgn.pth; fetched if missing")
    parser.add_argument("--dataset", help="colored_mnist if neither this nor --weights is given; weights that were "
                        "trained on another are refused; published weights do not tell")
    parser.add_argument("--n", type=positive_int, help="images in the data set; if not given, pictures to look at")
    parser.add_argument("--raw-weights", action="store_true", help="use the weights, not their moving average")
    parser.add_argument("--out", type=Path, default="runs/generated", help="folder; new, empty, or continued with --resume")
    parser.add_argument("--resume", nargs="?", const="auto", choices=["auto"],
                        help="make only what --out does not hold yet")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="same seed, same images")
    parser.add_argument("--batch-size", type=positive_int, default=500, help="images at a time; changes no image")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one")
    parser.add_argument("--offline", action="store_true", help="never fetch anything")
    digits = parser.add_argument_group("MNIST")
    digits.add_argument("--per-shape", type=positive_int, default=1, help="texture and background pairs per mask")
    digits.add_argument("--jitter", type=non_negative_float, default=0.05, metavar="S",
                        help="shift the colours of each foreground and each background by N(0, S); they are 0 to 1")
    digits.add_argument("--factual", action="store_true", help="one latent and one class for all three mechanisms: "
                        "the generator's idea of the training data (sets --per-shape 1 --jitter 0)")
    net = parser.add_argument_group("ImageNet")
    net.add_argument("--start", type=non_negative_int, default=0, help="number of the first image, to split a data set")
    net.add_argument("--mode", choices=["random", "best"], default="random", help="draw from all classes, or from the "
                     "authors' lists of good ones for each mechanism")
    for name in ("shape", "texture", "background"):
        net.add_argument(f"--{name}", nargs="+", metavar="CLASS",
                         help=f"draw the {name} from these instead: numbers, or (parts of) English names")
    net.add_argument("--truncation", type=truncation, default=0.5, help="of the latents, (0, 1]: less is less varied")
    net.add_argument("--save", nargs="+", choices=SAVED, default=["counterfactual"],
                     help="pictures to write; composite has the shape's class everywhere")
    net.add_argument("--format", choices=["jpg", "png"], default="jpg", help="of the pictures")
    net.add_argument("--interpolate", choices=list(LEGS),
                     help="frames to class --to in one mechanism, in all, or in one after the other")
    net.add_argument("--to", metavar="CLASS", help="where --interpolate goes")
    net.add_argument("--frames", type=positive_int, default=9, help="of each leg of --interpolate")
    net.add_argument("--amp", choices=["auto", "off", "bf16"], default="auto", help="bf16 arithmetic")
    args = parser.parse_args(argv)
    refuse_group(parser, digits if args.dataset == "imagenet" else net, args)
    if args.factual:
        args.per_shape, args.jitter = 1, 0.0
    if args.dataset == "imagenet" and args.batch_size == parser.get_default("batch_size"):
        args.batch_size = 16
    return args


def main():
    args = parse_args()
    if args.dataset == "imagenet":
        return main_imagenet(args)
    args.weights, device = args.weights or pretrained(args.dataset or "colored_mnist"), pick_device(args.device)
    cgn, trained = load_generator(args.weights, raw=args.raw_weights)
    args.weights_sha256 = file_sha256(args.weights)
    if args.dataset and trained.get("dataset", args.dataset) != args.dataset:
        raise UserError(f"--dataset {args.dataset}: {args.weights} was trained on {trained['dataset']}")
    args.dataset = args.dataset or trained.get("dataset")
    args.offline = bool(args.offline or trained.get("offline"))
    if args.offline:
        print("OFFLINE weights: trained on synthetic digits. No number from these images is about MNIST.")
    out = claim_folder(args.out, __file__, args.resume)
    describe_run(out, __file__, args)
    cgn = cgn.to(device)
    (generate_dataset if args.n else write_sheets)(cgn, args, out, device)


if __name__ == "__main__":
    run_main(main)
