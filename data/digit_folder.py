"""Write a MNIST variant as a folder of PNG files, for --dataset images to be tried with.

    python -m data.digit_folder --dataset wildlife_mnist --textures dtd --out runs/digits
    python train_cgn.py --dataset images --data-dir runs/digits --out runs/digits-cgn

--data-dir takes any files of MNIST's format, such as Fashion-MNIST's. OUT gets train/CLASS/*.png,
biased as in training; test/, of the last training images of the variant, which are never trained
on; and two more test sets for train_classifier.py --test: correlated/ and decorrelated/.
"""

import argparse
from pathlib import Path

import torch
from torchvision.transforms.v2 import functional

from data import mnist, pictures, runs


def write_split(folder, images, labels, size):
    """PNG files in a folder for each class. images: uint8 (n, 3, 32, 32). labels: (n,)."""
    for name in mnist.NAMES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    if size != mnist.SIZE:
        images = functional.resize(images, [size, size], antialias=True)
    for index, (image, label) in enumerate(zip(images, labels.tolist())):
        pictures.save_picture(folder / mnist.NAMES[label] / f"{index:05d}.png", image)
    print(f"{folder}: {len(images)} images")


def parse_args(argv=None):
    """The program's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--dataset", choices=list(mnist.VARIANTS), required=True, help="the variant to write"
    )
    parser.add_argument(
        "--data-dir", type=Path, default=runs.DOWNLOADS, help="folder with files of MNIST's format"
    )
    parser.add_argument("--textures", help="of wildlife MNIST, as in train_cgn.py")
    parser.add_argument("--offline", action="store_true", help="synthetic digits")
    parser.add_argument(
        "--image-size", type=int, choices=[32, 64, 128], default=32, help="enlarged from 32"
    )
    parser.add_argument("--seed", type=runs.non_negative_int, default=0, help="of the colors")
    parser.add_argument("--out", type=Path, required=True, help="folder; new, or empty")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    train, test = mnist.load_variant(
        args.dataset, args.data_dir, textures=args.textures, offline=args.offline, seed=args.seed
    )
    with runs.claim_folder(args.out, __file__, None):
        runs.describe_run(args.out, __file__, vars(args))
        cut = len(train) - train.held_out
        images = train.all_images(args.seed)
        decorrelated, _ = test.decorrelated_images(args.seed)
        splits = {
            "train": (images[:cut], train.labels[:cut]),
            "test": (images[cut:], train.labels[cut:]),
            "correlated": (test.all_images(args.seed), test.labels),
            "decorrelated": (decorrelated, test.labels),
        }
        for name, (images, labels) in splits.items():
            write_split(args.out / name, images, labels, args.image_size)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    runs.run_main(main)
