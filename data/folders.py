"""Your own images: a folder for each class, read once into one uint8 tensor.

    FOLDER/train/CLASS/*.png        and, if it is there, FOLDER/test/CLASS/*.png
    FOLDER/CLASS/*.png              a tenth is held out as the test split

Images may be JPEG, PNG or WebP, of any size, gray, with a palette, transparent or of 16 bits.
Whatever is wrong with a folder is a UserError that names it.
"""

import itertools
import os
import sys
from pathlib import Path

import torch
from torchvision.transforms.v2 import functional

from data import imagenet, runs

MAX_CLASSES = 1000
SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
CHUNK = 250  # files that a worker process reads at a time
MAX_WORKERS = 16


class ImageFolder:
    """One split, read from its files onto a device. It is drawn from as a MnistVariant is.

    paths: the files. labels: int64 (n,). names: of the classes. size: S of pixels, uint8
    (n, 3, S, S). Damaged files are named and left out.
    """

    held_out = 0  # the test split is another folder, or was held out already

    def __init__(self, paths, labels, names, size, device):
        pixels, labels = read_split(paths, labels, size)
        self.size = size
        self.pixels = pixels.to(device)
        self.labels = labels.to(device)
        self.names = names

    def __len__(self):
        return len(self.labels)

    def images(self, index, generator=None):
        """The images of `index`, int64 (n,): uint8 (n, 3, S, S). Nothing is drawn at random."""
        return self.pixels.index_select(0, index)

    def all_images(self, seed=None):
        """Every image in order, uint8 (n, 3, S, S)."""
        return self.pixels


def load_folder(folder, size, device="cpu"):
    """The training and the test split of a folder, as (ImageFolder, ImageFolder).

    size: S; the middle square of each image is resized to S x S. UserError for a folder that is no
    such data set.
    """
    folder = Path(folder)
    top = class_folders(folder)
    if top == folder and folder.is_dir():
        check_splits(folder)
    names, paths, labels = find_images(top)
    check_classes(top, names, labels)
    # In random order from the start: the images are not moved in memory again.
    order = torch.randperm(len(paths), generator=runs.seeded_generator(0, "folder", 0))
    paths = [paths[index] for index in order.tolist()]
    labels = labels[order]
    if top != folder and (folder / "test").is_dir():
        test = read_test(folder / "test", names, size, device)
        told = f"{len(test)} test images in test/"
    else:
        # Always the same tenth, so that training, generation and classification agree.
        held_out = is_in_tenth(labels)
        test = ImageFolder(select(paths, held_out), labels[held_out], names, size, device)
        paths = select(paths, ~held_out)
        labels = labels[~held_out]
        told = f"{len(test)} held out as test images, because there is no test/ beside a train/"
    training = ImageFolder(paths, labels, names, size, device)
    check_classes(top, names, training.labels)
    print_manifest(top, training, told)
    return training, test


# --------------------------------------------------------------------------------------------------
# Finding


def class_folders(folder):
    """Where the folders of the training classes lie: in train/ if there is one, or in `folder`."""
    train = Path(folder) / "train"
    return train if train.is_dir() else Path(folder)


def check_splits(folder):
    """UserError if a folder of a data set without train/ looks like a split, not like a class."""
    for path in runs.entries(folder):
        if path.name.lower() not in SPLITS or not path.is_dir():
            continue
        has_folders = any(child.is_dir() for child in runs.entries(path))
        if has_folders and not imagenet.image_files(path):
            raise runs.UserError(
                f"{path}: holds folders alone, as a split of the data does, not a class; training "
                "images should lie in train/CLASS/, those of a test in test/CLASS/"
            )


def check_out(folder, out):
    """UserError if a run's folder would lie among the class folders, and be a class itself."""
    top = class_folders(folder)
    if top.resolve() in Path(out).resolve().parents:
        raise runs.UserError(f"--out {out}: lies among the classes in {top}; choose another folder")


def find_images(folder):
    """The names of the classes in `folder`, all their files, and the files' classes, (n,)."""
    classes = imagenet.subfolders(folder, "a folder for each class")
    paths = []
    labels = []
    for label, path in enumerate(classes):
        files = files_within(path)
        if not files:
            endings = ", ".join(sorted(imagenet.ENDINGS))
            raise runs.UserError(
                f"{path}: no images ({endings}) in this class; delete the folder or fill it"
            )
        paths += files
        labels += [label] * len(files)
    return [path.name for path in classes], paths, torch.tensor(labels)


def files_within(folder):
    """The images in a folder and in the folders within it, sorted in each."""
    files = imagenet.image_files(folder)
    for path in runs.entries(folder):
        if path.is_dir() and not path.is_symlink():  # a link may lead back up
            files += files_within(path)
    return files


def check_classes(folder, names, labels):
    """UserError for too few or too many classes, or a class all of whose files are damaged."""
    if not 2 <= len(names) <= MAX_CLASSES:
        raise runs.UserError(
            f"{folder}: {len(names)} class folders; a data set has 2 to {MAX_CLASSES}"
        )
    counts = labels.bincount(minlength=len(names))
    if not counts.all():
        raise runs.UserError(f"{folder / names[counts.argmin()]}: no intact images in this class")


def read_test(folder, names, size, device):
    """A folder of test images, as an ImageFolder. UserError for a class that is not in `names`."""
    found, paths, labels = find_images(Path(folder))
    for name in found:
        if name not in names:
            raise runs.UserError(f"{Path(folder) / name}: the training images have no such class")
    classes = torch.tensor([names.index(name) for name in found])
    return ImageFolder(paths, classes[labels], names, size, device)


def is_in_tenth(labels):
    """Which are among the first tenth of their class, bool (n,); none of fewer than ten."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        of_class = (labels == label).nonzero()[:, 0]
        chosen[of_class[: len(of_class) // 10]] = True
    return chosen


def select(paths, chosen):
    """The paths where `chosen`, bool (n,), holds."""
    return list(itertools.compress(paths, chosen.tolist()))


def print_manifest(folder, training, told):
    """What was found: classes and their counts, the twenty smallest if there are more."""
    names = training.names
    counts = training.labels.bincount(minlength=len(names)).tolist()
    print(
        f"{folder}: {len(training)} training images of {len(names)} classes, at "
        f"{training.size} x {training.size}; {told}"
    )
    rows = sorted(zip(counts, names))[:20]
    width = max(len(name) for _, name in rows)
    for count, name in rows:
        print(f"  {name:<{width}} {count}")
    if len(names) > len(rows):
        print(f"  and {len(names) - len(rows)} larger classes of up to {max(counts)}")


# --------------------------------------------------------------------------------------------------
# Reading


class Chunks(torch.utils.data.Dataset):
    """Item i is CHUNK files, read: uint8 (n, 3, size, size), and which are intact, bool (n,)."""

    def __init__(self, paths, size):
        self.paths = paths
        self.size = size

    def __len__(self):
        return -(-len(self.paths) // CHUNK)

    def __getitem__(self, index):
        paths = self.paths[index * CHUNK : (index + 1) * CHUNK]
        pixels = torch.zeros(len(paths), 3, self.size, self.size, dtype=torch.uint8)
        intact = torch.zeros(len(paths), dtype=torch.bool)
        for i, path in enumerate(paths):
            image = read_square(path, self.size)
            if image is not None:
                pixels[i] = image
                intact[i] = True
        return pixels, intact


def read_square(path, size):
    """An image file as uint8 (3, size, size). None if it is damaged or far too large."""
    image = imagenet.read_image(path, upright=True)
    if image is None or image.shape[1:] == (size, size):
        return image
    image = functional.center_crop(image, [min(image.shape[1:])])
    return functional.resize(image, [size, size], antialias=True)


def read_split(paths, labels, size):
    """Pixels, uint8 (n, 3, size, size), and labels of all intact images. The others are named."""
    pixels = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    intact = torch.empty(len(paths), dtype=torch.bool)
    workers = min(os.cpu_count(), MAX_WORKERS) if len(paths) > 4 * CHUNK else 0
    loader = torch.utils.data.DataLoader(
        Chunks(paths, size),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=imagenet.start_worker,
    )
    start = 0
    for part, good in loader:
        stop = start + len(part)
        pixels[start:stop] = part
        intact[start:stop] = good
        start = stop
        if workers:
            print(f"\r{stop}/{len(paths)} images read", end="", flush=True)
    if workers:
        print()
    damaged = (~intact).nonzero()[:, 0].tolist()
    for index in damaged[: imagenet.MAX_DAMAGED]:
        print(f"warning: {paths[index]}: {imagenet.DAMAGED}", file=sys.stderr)
    if len(damaged) > imagenet.MAX_DAMAGED:
        raise runs.UserError(
            f"more than {imagenet.MAX_DAMAGED} damaged images, see above; mend or delete them"
        )
    if damaged:
        return pixels[intact], labels[intact]
    return pixels, labels
