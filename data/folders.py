"""Your own images: a folder for each class, read once into one uint8 tensor.

    FOLDER/train/CLASS/*.png        and, if it is there, FOLDER/test/CLASS/*.png
    FOLDER/CLASS/*.png              about a tenth is held out as the test split

Images may be JPEG, PNG, WebP, BMP, GIF or TIFF, of any size, gray, with a palette, transparent or
of 16 bits.
Whatever is wrong with a folder is a UserError that names it.
"""

import collections
import hashlib
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

    def class_counts(self):
        """How many images each class has: name -> number."""
        counts = self.labels.bincount(minlength=len(self.names))
        return dict(zip(self.names, counts.tolist()))

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
    hashes = torch.tensor([name_hash(path, top) for path in paths], dtype=torch.float64)
    hashes, order = hashes.sort(stable=True)
    paths = [paths[index] for index in order.tolist()]
    labels = labels[order]
    if top != folder and (folder / "test").is_dir():
        test = read_test(folder / "test", names, size, device)
        told = f"{len(test)} test images in test/"
    else:
        held_out = is_in_tenth(hashes, labels)
        test = ImageFolder(select(paths, held_out), labels[held_out], names, size, device)
        paths = select(paths, ~held_out)
        labels = labels[~held_out]
        told = f"{len(test)} held out as test images, because there is no test/ beside a train/"
    training = ImageFolder(paths, labels, names, size, device)
    check_classes(top, names, training.labels)
    print_manifest(top, training, told)
    print_unread(folder, top)
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
        for inner in runs.entries(path):
            if inner.name.lower() in SPLITS and inner.is_dir():
                raise runs.UserError(
                    f"{inner}: a split within a class; training images should lie in train/CLASS/, "
                    "those of a test in test/CLASS/"
                )
        files = [file for file in files_within(path) if file.suffix.lower() in imagenet.ENDINGS]
        if not files:
            endings = ", ".join(sorted(imagenet.ENDINGS))
            raise runs.UserError(
                f"{path}: no images ({endings}) in this class; delete the folder or fill it"
            )
        paths += files
        labels += [label] * len(files)
    return [path.name for path in classes], paths, torch.tensor(labels)


def files_within(folder, above=()):
    """The files in a folder and in the folders within it, sorted in each.

    above: the folders that it lies in; a link may lead back to one, and is not followed there.
    """
    place = folder.resolve()
    if place in above:
        return []
    files = []
    for path in runs.entries(folder):
        if path.is_dir():
            files += files_within(path, (*above, place))
        else:
            files.append(path)
    return files


def check_classes(folder, names, labels):
    """UserError for too few or too many classes, or a class all of whose files are damaged."""
    if len(names) == 1:
        raise runs.UserError(
            f"{folder}: {names[0]} is the only class folder; a data set has 2 to {MAX_CLASSES} "
            f"(or is it {folder / names[0]}?)"
        )
    if len(names) > MAX_CLASSES:
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


def name_hash(path, folder):
    """A hash of a file's path within a folder, uniform in [0, 1)."""
    name = os.fsencode(path.relative_to(folder).as_posix())
    digest = hashlib.sha256(name).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def is_in_tenth(hashes, labels):
    """Which of the files are held out, bool (n,): those of the lowest hashes, about a tenth of each
    class; none of a class of fewer than ten. So training, generation and classification agree, and
    in a class of ten or more no file changes sides when others are added.
    """
    large = labels.bincount() >= 10
    return (hashes < 0.1) & large[labels]


def select(paths, chosen):
    """The paths where `chosen`, bool (n,), holds."""
    return list(itertools.compress(paths, chosen.tolist()))


def print_manifest(folder, training, told):
    """What was found: classes and their counts, the twenty smallest if there are more."""
    counts = training.class_counts()
    print(
        f"{folder}: {len(training)} training images of {len(counts)} classes, at "
        f"{training.size} x {training.size}; {told}"
    )
    rows = sorted((count, name) for name, count in counts.items())[:20]
    width = max(len(name) for _, name in rows)
    for count, name in rows:
        print(f"  {name:<{width}} {count}")
    if len(counts) > len(rows):
        largest = max(counts.values())
        print(f"  and {len(counts) - len(rows)} larger classes of up to {largest}")


def print_unread(folder, top):
    """What lies in a data set's folder and is not read. top: where its training classes lie."""
    unread = collections.Counter()
    others = []
    entries = runs.entries(top)
    if top != folder:
        others = [path for path in runs.entries(folder) if path.name not in ("train", "test")]
        if (folder / "test").is_dir():
            entries += runs.entries(folder / "test")
    for path in entries:
        if not path.is_dir():
            unread["files beside the class folders"] += 1
            continue
        for file in files_within(path):
            ending = file.suffix.lower()
            if ending not in imagenet.ENDINGS:
                unread[f"files {ending}" if ending else "files without an ending"] += 1
    found = [f"{count} {kind}" for kind, count in unread.items()]
    found += [f"{path.name}/" if path.is_dir() else path.name for path in others]
    if found:
        print(f"  not read: {', '.join(found)}")


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
    workers = min(runs.cpu_count(), MAX_WORKERS) if len(paths) > 4 * CHUNK else 0
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
