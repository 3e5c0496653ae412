"""Generate counterfactual images with a trained CGN (Sauer & Geiger, ICLR 2021, section 3.3).

    python generate.py --weights runs/first/weights.pt --n 100000 --per-shape 10 --out runs/first-counterfactuals
    python generate.py --weights runs/first/weights.pt --factual --out runs/first-factual    # one label for all three
    python generate.py --weights runs/first/weights.pt --sheet --out runs/first-pictures     # PNGs to look at

A data set is a folder of chunk_00000.pt, chunk_00001.pt, ..., each with `images`, uint8 (n, 3, 32, 32), and `labels`,
uint8 (n, 3): the classes of shape, texture and background. dataset.json is written last, when all chunks are there.
Image i depends on the seed, --per-shape and i alone, so an interrupted run goes on with --resume.
"""
import argparse
import hashlib
from pathlib import Path

import torch

from data.mnist import SIZE
from data.runs import (UserError, claim_folder, describe_run, load_tensors, non_negative_int, pick_device,
                       positive_int, run_main, save_png, save_tensors, tile_sheet, write_json)
from train_cgn import CLASSES, LATENT, load_generator, sample_sheet, shuffle_patches

CHUNK = 2_000                                              # images in a file
BLOCK = 1_000                                              # random numbers are drawn for so many images at a time
SLICE = 100                                                # latents that a network sees at a time
SHAPE, TEXTURE, BACKGROUND = range(3)                      # mechanisms, each with a stream of random numbers


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers that depend on the seed and the image's number alone


def draw_block(seed, stream, number):
    """Latents (BLOCK, 32), classes (BLOCK,) and shuffling offsets (BLOCK, 2) of one block of one mechanism."""
    digest = hashlib.sha256(f"{seed} {stream} {number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return (torch.randn(BLOCK, LATENT, generator=generator), torch.randint(CLASSES, (BLOCK,), generator=generator),
            torch.randint(SIZE, (BLOCK, 2), generator=generator))


def draw(seed, stream, start, stop):
    """Latents, classes and offsets of numbers start..stop-1, drawn on the CPU, so that every device agrees."""
    first = start // BLOCK
    blocks = [draw_block(seed, stream, number) for number in range(first, (stop - 1) // BLOCK + 1)]
    return [torch.cat(parts)[start - first * BLOCK:stop - first * BLOCK] for parts in zip(*blocks)]


# ---------------------------------------------------------------------------------------------------------------------
# Data sets


def make(mechanism, seed, stream, start, stop, device):
    """Outputs, classes and offsets of numbers start..stop-1 of a stream.

    The network always sees whole slices of SLICE latents that begin at multiples of SLICE: kernels round differently
    for other batch sizes, and some pixel would tip over to the next of its 256 values.
    """
    first, last = start // SLICE * SLICE, -(-stop // SLICE) * SLICE
    z, y, offsets = draw(seed, stream, first, last)
    outputs = [mechanism(*part) for part in zip(z.to(device).split(SLICE), y.to(device).split(SLICE))]
    return [x[start - first:stop - first] for x in (torch.cat(outputs), y, offsets)]


@torch.inference_mode()
def generate_batch(cgn, args, start, stop, device):
    """Images start..stop-1 of the data set: uint8 (n, 3, 32, 32), labels uint8 (n, 3), both on the CPU."""
    shape_of = torch.arange(start, stop) // args.per_shape                                # each mask serves per_shape
    first = start // args.per_shape
    mask, y, _ = make(cgn.mask, args.seed, SHAPE, first, (stop - 1) // args.per_shape + 1, device)
    mask, classes, textures = mask[(shape_of - first).to(device)], [y[shape_of - first]], []
    for stream, mechanism in ((TEXTURE, cgn.foreground), (BACKGROUND, cgn.background)):
        offsets = draw(args.seed, stream, start, stop)[2]
        # Factual images are as in training: one latent and one class for all three mechanisms.
        texture, y, _ = make(mechanism, args.seed, SHAPE if args.factual else stream, start, stop, device)
        textures.append(shuffle_patches(texture, offsets.to(device)))
        classes.append(y)
    images = torch.lerp(textures[1], textures[0], mask).add_(1).mul_(127.5).round_().to(torch.uint8)
    return images.cpu(), torch.stack(classes, 1).to(torch.uint8)


def generate_dataset(cgn, args, out, device):
    """Write the chunks that are missing, then dataset.json. Memory stays that of one chunk."""
    settings = {"seed": args.seed, "per_shape": args.per_shape, "factual": args.factual,
                "weights_sha256": hashlib.sha256(args.weights.read_bytes()).hexdigest()}
    starts = range(0, args.n, CHUNK)
    for number, start in enumerate(starts):
        stop = min(start + CHUNK, args.n)
        path = out / f"chunk_{number:05d}.pt"
        if path.is_file():
            if chunk_settings(path) != settings | {"start": start, "stop": stop}:
                raise UserError(f"--resume: {path} was made with other settings or weights; give the same ones, or "
                                "choose another --out")
            continue
        parts = [generate_batch(cgn, args, i, min(i + args.batch_size, stop), device)
                 for i in range(start, stop, args.batch_size)]
        images, labels = (torch.cat(column) for column in zip(*parts))
        save_tensors(path, {"images": images, "labels": labels, "settings": settings | {"start": start, "stop": stop}})
        print(f"\r{stop}/{args.n} images", end="", flush=True)
    write_json(out / "dataset.json", settings | {"n": args.n, "chunks": len(starts), "dataset": args.dataset,
                                                 "offline": args.offline, "weights": str(args.weights)})
    print(f"\n{out}: {args.n} images; next: python train_classifier.py --train counterfactual --counterfactual {out}")


def chunk_settings(path):
    content = load_tensors(path)
    return content.get("settings") if isinstance(content, dict) else None


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
        z, _, offsets = (x.to(device) for x in draw(seed, stream, 0, CLASSES))
        textures.append(shuffle_patches(mechanism(z, (y + 3 * (stream == BACKGROUND)) % CLASSES), offsets))
    foreground, background = textures
    composites = torch.lerp(background[None], foreground[None], mask[:, None])                       # (10, 10, 3, ...)
    images = torch.cat([mask.expand(-1, 3, -1, -1)[:, None] * 2 - 1, composites], 1) / 2 + 0.5
    titles = ["mask", *(f"f{c} b{(c + 3) % CLASSES}" for c in range(CLASSES))]
    return tile_sheet(images, titles, [str(c) for c in range(CLASSES)])


@torch.inference_mode()
def interpolation_sheet(cgn, mechanisms, seed, device, steps=11):
    """Row c goes from class c to c + 1 in the given mechanisms, by its class embedding, with the latents fixed."""
    z, _, offsets = (x.to(device) for x in draw(seed, SHAPE, 0, CLASSES))
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
# Command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="weights.pt of a training, or published weights")
    parser.add_argument("--dataset", help="refuse weights that were trained on another; published weights do not tell")
    parser.add_argument("--n", type=positive_int, default=100_000, help="images in the data set")
    parser.add_argument("--per-shape", type=positive_int, default=10, help="texture and background pairs per mask")
    parser.add_argument("--factual", action="store_true", help="one latent and one class for all three mechanisms: "
                        "the generator's idea of the training data (sets --per-shape 1)")
    parser.add_argument("--sheet", action="store_true", help="write pictures to look at, and no data set")
    parser.add_argument("--raw-weights", action="store_true", help="use the weights, not their moving average")
    parser.add_argument("--out", type=Path, required=True, help="folder; new, empty, or continued with --resume")
    parser.add_argument("--resume", action="store_true", help="make only the chunks that --out does not hold yet")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="same seed, same images")
    parser.add_argument("--batch-size", type=positive_int, default=500, help="images at a time; changes no image")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one")
    parser.add_argument("--offline", action="store_true", help="for symmetry with the other scripts: nothing is ever "
                        "fetched here")
    args = parser.parse_args(argv)
    if args.factual:
        args.per_shape = 1
    return args


def main():
    args = parse_args()
    if args.dataset == "imagenet":
        raise UserError("--dataset imagenet: not yet; this version generates the MNIST variants")
    device = pick_device(args.device)
    cgn, trained = load_generator(args.weights, raw=args.raw_weights)
    if args.dataset and trained.get("dataset", args.dataset) != args.dataset:
        raise UserError(f"--dataset {args.dataset}: {args.weights} was trained on {trained['dataset']}")
    args.dataset = args.dataset or trained.get("dataset")
    args.offline = bool(args.offline or trained.get("offline"))
    if args.offline:
        print("OFFLINE weights: trained on synthetic digits. No number from these images is about MNIST.")
    out = claim_folder(args.out, __file__, args.resume)
    describe_run(out, __file__, args)
    cgn = cgn.to(device)
    (write_sheets if args.sheet else generate_dataset)(cgn, args, out, device)


if __name__ == "__main__":
    run_main(main)
