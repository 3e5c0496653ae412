"""ImageNet and its robustness tests: lists of files with their classes, decoded and augmented.

A list is (paths, labels): labels is an integer tensor, (n,) or, for counterfactuals and
Cue-Conflict, (n, columns). Whatever is wrong with a folder is a UserError that names it.
"""

import csv
import difflib
import functools
import glob
import itertools
import json
import math
import re
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import ExifTags, Image, PngImagePlugin
from torchvision.transforms import v2

from data import runs

HEADS = ("shape", "texture", "background")  # the three labels of a counterfactual
ENDINGS = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
MAX_PIXELS = 90_000_000  # of an image; the largest of ImageNet has 61 million
MAX_DAMAGED = 20  # images that are skipped before it is an error
DAMAGED = "damaged, too large or no image; left out"

# Mean and standard deviation of RGB in [0, 1]: of ImageNet, as torchvision's weights expect, and of
# ImageNet-9, as the published CGN code has it.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
IN9_MEAN = (0.4717, 0.4499, 0.3837)
IN9_STD = (0.2600, 0.2516, 0.2575)

TURNS = {  # EXIF orientation -> what turns an image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes; editors of photographs write more than Pillow's 1 MB
warnings.filterwarnings("ignore", module=r"PIL\.")  # they name no file, and what matters is told


# --------------------------------------------------------------------------------------------------
# Classes


@functools.cache
def imagenet_metadata():
    """What data/imagenet.json holds: "wnids" in class order, "cue_conflict" (its categories), "in9"
    (its map from ImageNet's classes), "best_classes" (the authors' lists of good ones),
    "class_lists" (classes of Imagenette and of ImageNet-A).
    """
    return json.loads((runs.ROOT / "data" / "imagenet.json").read_text())


def class_names():
    """The 1000 English names in class order."""
    return torchvision.models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"]


def class_index(text):
    """A class by its index, its WNID, or (part of) its English name.

    UserError if there is none or more than one, with suggestions.
    """
    names = class_names()
    if re.fullmatch(r"-?[0-9]+", text):
        if text in map(str, range(len(names))):
            return int(text)
        raise runs.UserError(f"class {text}: ImageNet has classes 0 to {len(names) - 1}")
    for known in (imagenet_metadata()["wnids"], names):
        if text in known:  # "cardigan" is a garment, "Cardigan" a dog
            return known.index(text)
    lower = [name.lower() for name in names]
    found = [index for index, name in enumerate(lower) if name == text.lower()]
    found = found or [index for index, name in enumerate(lower) if text.lower() in name]
    if len(found) == 1:
        return found[0]
    close = [f"{names[index]} ({index})" for index in found]
    close = close or difflib.get_close_matches(text.lower(), lower, 4)
    problem = "more than one class" if found else "no class"
    suggestions = f"; meant {', '.join(close[:6])}?" if close else ""
    raise runs.UserError(f"class {text!r}: {problem} of that name{suggestions}")


def class_indices(texts):
    """Classes, sorted, each once: single ones as above, "imagenette", "imagenet-a", or files with a
    class in each line. UserError for what is none of these.
    """
    lists = imagenet_metadata()["class_lists"]
    found = set()
    for text in texts:
        if text in lists:
            found.update(lists[text])
        elif Path(text).is_file():
            lines = Path(text).read_text(encoding="utf-8-sig", errors="replace").splitlines()
            listed = {class_index(line.strip()) for line in lines if line.strip()}
            if not listed:
                raise runs.UserError(f"class file {text}: holds no class")
            found.update(listed)
        else:
            found.add(class_index(text))
    return sorted(found)


# --------------------------------------------------------------------------------------------------
# Folders


def image_files(folder):
    """The images in a folder, sorted."""
    return [path for path in runs.entries(folder) if path.suffix.lower() in ENDINGS]


def subfolders(folder, content):
    """The folders in `folder`, sorted. UserError if it is not there or has none.

    content: what it should hold, in words.
    """
    if not folder.is_dir():
        raise runs.UserError(f"{folder}: no such folder; it should hold {content}")
    found = [path for path in runs.entries(folder) if path.is_dir()]
    if not found:
        raise runs.UserError(f"{folder}: holds no folders; it should hold {content}")
    return found


def images_of_classes(paths, labels, classes):
    """The part of a list whose labels, (n,) or (n, columns), are all of these classes."""
    wanted = torch.isin(labels, torch.tensor(classes))
    if labels.ndim == 2:
        wanted = wanted.all(1)
    return list(itertools.compress(paths, wanted)), labels[wanted]


def labeled_images(folders, classes):
    """All images of some folders, each with the class of its folder."""
    paths = []
    labels = []
    for folder, label in zip(folders, classes):
        found = image_files(folder)
        if not found:
            raise runs.UserError(f"{folder}: no images in this class; delete the folder or fill it")
        paths += found
        labels += [label] * len(found)
    return paths, torch.tensor(labels)


def wnid_images(folder):
    """Images in folders by WNID, of all classes or of some, or by 0 to 999 as in ImageNet-V2.

    labels: (n,).
    """
    folders = subfolders(Path(folder), "a folder for each class, named by WNID")
    index_of = {wnid: index for index, wnid in enumerate(imagenet_metadata()["wnids"])}
    numbers = {str(index): index for index in range(1000)}
    if numbers.keys() == {path.name for path in folders}:
        index_of = numbers
    for path in folders:
        if path.name.isdecimal() and path.name not in index_of:
            raise runs.UserError(
                f"{path}: numbers name classes only if there are all of 0 to 999, as in "
                "ImageNet-V2; the development kit counts in another order, from 1: name folders "
                "by WNID"
            )
        if path.name not in index_of:
            raise runs.UserError(
                f"{path}: not the WNID of one of ImageNet's 1000 classes, such as n01440764"
            )
    return labeled_images(folders, [index_of[path.name] for path in folders])


def photograph_images(folder, classes=None):
    """The images of generate.py --shapes real: in folders as above, or directly in the folder.

    classes: those wanted, of --shape, or None for all; of images without folders, their one class.
    labels: (n,).
    """
    folder = Path(folder)
    content = "class folders named by WNID, or else images of one class"
    if not folder.is_dir():
        raise runs.UserError(f"--images {folder}: no such folder; it should hold {content}")
    flat = image_files(folder)
    has_folders = any(path.is_dir() for path in runs.entries(folder))
    if has_folders == bool(flat):
        problem = "both images and folders" if flat else "neither images nor folders"
        raise runs.UserError(f"--images {folder}: holds {problem}; it should hold {content}")
    if flat:
        if not classes or len(set(classes)) > 1:
            raise runs.UserError(
                f"--images {folder}: images without class folders need --shape, their one class"
            )
        return flat, torch.tensor(classes[:1] * len(flat))
    paths, labels = wnid_images(folder)
    if classes:
        paths, labels = images_of_classes(paths, labels, classes)
        if not paths:
            raise runs.UserError(
                f"--images {folder}: no folder of --shape {' '.join(map(str, classes))}"
            )
    return paths, labels


KAGGLE = Path("ILSVRC", "Data", "CLS-LOC")  # where Kaggle's archive has train/ and val/
SOLUTION = "LOC_val_solution.csv"  # beside ILSVRC


def imagenet_root(folder):
    """The folder with train/ and val/: this one, or a folder within it, as Kaggle unpacks it."""
    folder = Path(folder)
    return folder / KAGGLE if (folder / KAGGLE).is_dir() else folder


def validation_images(root):
    """ImageNet's val: in folders by WNID; or flat, with Kaggle's table of solutions or the meta.bin
    of torchvision's ImageNet, which is told.

    labels: (n,).
    """
    folder = Path(root) / "val"
    flat = image_files(folder) if folder.is_dir() else []
    if not flat:
        return wnid_images(folder)
    solution = Path(root).joinpath(*[".."] * len(KAGGLE.parts), SOLUTION)
    meta = Path(root) / "meta.bin"
    if solution.is_file():
        source = solution
        wnid_of = read_solution(solution)
        wnids = [wnid_of.get(path.stem) for path in flat]
    elif meta.is_file():
        source = meta
        wnids = runs.load_tensors(meta)[1]
    else:
        raise runs.UserError(
            f"{folder}: images without folders need Kaggle's {SOLUTION}, beside ILSVRC, or "
            f"{meta}, which torchvision.datasets.ImageNet makes of the development kit; or sort "
            "them into folders by WNID"
        )
    index_of = {wnid: index for index, wnid in enumerate(imagenet_metadata()["wnids"])}
    if len(wnids) != len(flat) or not set(wnids) <= index_of.keys():
        raise runs.UserError(f"{source}: does not tell the classes of the images in {folder}")
    if runs.is_main_rank():
        print(f"{folder}: {len(flat)} images, their classes from {source.resolve()}")
    return flat, torch.tensor([index_of[wnid] for wnid in wnids])


def read_solution(path):
    """Kaggle's table of the validation images: their names without ending -> WNID."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    except (OSError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise runs.UserError(f"{path}: not Kaggle's table of solutions ({error!r})") from None


def corruption_folders(folder):
    """The folders of ImageNet-C (Hendrycks & Dietterich 2019), with a folder for each class in
    them: (corruption, severity) -> path. {} if the folder is not laid out so.
    """
    folder = Path(folder)
    # Its archives are noise, blur and so on, with several corruptions each.
    levels = [*folder.glob("*/[1-5]"), *folder.glob("*/*/[1-5]")]
    return {(path.parent.name, path.name): path for path in sorted(levels) if path.is_dir()}


def come_cropped(paths):
    """Whether images are ready to be seen whole: the first of them are all of 224 x 224 pixels."""
    try:
        return all(Image.open(path).size == (224, 224) for path in paths[:10])
    except Exception:  # see read_image
        return False


def cue_conflict_images(folder):
    """Cue-Conflict (Geirhos et al. 2019): the images whose shape and texture differ.

    labels: (n, 2), the categories of shape and texture.
    """
    names = list(imagenet_metadata()["cue_conflict"]["categories"])
    paths = []
    labels = []
    for sub in subfolders(Path(folder), "Cue-Conflict's 16 categories"):
        for path in image_files(sub):
            match = re.fullmatch(r"([a-z]+)\d+-([a-z]+)\d+", path.stem)
            if not match or not set(match.groups()) <= set(names):
                raise runs.UserError(
                    f"{path}: not named like Cue-Conflict's images, such as cat3-truck1.png"
                )
            shape, texture = match.groups()
            if shape != texture:
                paths.append(path)
                labels.append([names.index(shape), names.index(texture)])
    if not paths:
        raise runs.UserError(f"{folder}: no images whose shape and texture differ")
    return paths, torch.tensor(labels)


def imagenet9_images(folder):
    """The variants of ImageNet-9 (Xiao et al. 2020) that are there: name -> (paths, labels).

    labels: (n,), classes 0 to 8.
    """
    found = {}
    for sub in subfolders(Path(folder), "original/, mixed_same/, mixed_rand/, ..."):
        if not (sub / "val").is_dir():
            continue
        folders = subfolders(sub / "val", "ImageNet-9's nine classes")
        if not any(image_files(path) for path in folders):
            continue  # such as fg_mask, whose masks are arrays
        for path in folders:
            if not re.match(r"0[0-8]_", path.name):
                raise runs.UserError(f"{path}: not a class of ImageNet-9, such as 00_dog")
        found[sub.name] = labeled_images(folders, [int(path.name[:2]) for path in folders])
    if not found:
        raise runs.UserError(f"{folder}: no variant of ImageNet-9, such as original/val/00_dog/")
    return found


# --------------------------------------------------------------------------------------------------
# Counterfactuals


def counterfactual_images(patterns):
    """What generate.py wrote into one or many folders; patterns such as runs/cf* are expanded.

    labels: (n, 3), the classes of shape, texture and background.
    """
    folders = set()
    for pattern in map(str, patterns):
        # A name may look like a pattern.
        found = [pattern] if Path(pattern).is_dir() else glob.glob(pattern)
        if not found:
            raise runs.UserError(f"--counterfactual {pattern}: no such folder")
        folders.update(map(Path, found))
    folders = sorted(folders)
    paths = []
    labels = []
    for folder in folders:
        rows = read_label_table(folder)
        check_label_table(folder, rows)
        paths += [folder / name for name, _ in rows]
        labels += [classes for _, classes in rows]
    return paths, torch.tensor(labels)


def read_label_table(folder):
    """The rows of a folder's labels.csv: (file, [class of shape, of texture, of background])."""
    rows = []
    try:
        with open(
            folder / "labels.csv", newline="", encoding="utf-8-sig", errors="surrogateescape"
        ) as file:
            for row in csv.DictReader(file):
                rows.append((row["file"], [int(row[head]) for head in HEADS]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise runs.UserError(
            f"--counterfactual {folder}: no readable labels.csv of generate.py ({error!r})"
        ) from None
    if not rows:
        raise runs.UserError(f"--counterfactual {folder}: labels.csv has no rows")
    return rows


def check_label_table(folder, rows):
    """UserError unless each file has one row, each row its file, and all classes exist."""
    table = folder / "labels.csv"
    named = {name for name, _ in rows}
    if len(named) != len(rows):
        raise runs.UserError(
            f"--counterfactual {table}: {len(rows)} rows for {len(named)} files; one each is needed"
        )
    present = set()
    for sub in {(folder / name).parent for name in named}:
        if sub.is_dir():
            present |= {f"{sub.name}/{path.name}" for path in image_files(sub)}
    for odd, problem in (
        (named - present, "a row without its file"),
        (present - named, "a file without its row"),
    ):
        if odd:
            raise runs.UserError(
                f"--counterfactual {folder}: {min(odd)} and {len(odd) - 1} more: {problem}; "
                "run generate.py again with --resume"
            )
    for name, classes in rows:
        if not all(0 <= index < 1000 for index in classes):
            raise runs.UserError(
                f"--counterfactual {table}: {name} has the classes {classes}; 0 to 999 exist"
            )


# --------------------------------------------------------------------------------------------------
# Decoding and augmentation


def make_transform(training, size=224, margin=True):
    """uint8 (3, H, W) -> uint8 (3, size, size), as published.

    training: random crops and flips. margin: tests see the middle seven eighths; without it all of
    a square image, for those that come ready cropped. Values are scaled later, by `normalized`.
    """
    if training:
        crop = v2.RandomResizedCrop(size, antialias=True)
        return v2.Compose([crop, v2.RandomHorizontalFlip()])
    resized = size * 256 // 224 if margin else size
    return v2.Compose([v2.Resize(resized, antialias=True), v2.CenterCrop(size)])


def augmentation_seed(seed, epoch, index):
    """The seed of one image's augmentation: whatever the workers, the ranks or an interruption."""
    return ((seed * 1_000_003 + epoch) * 10_000_019 + index) % 2**63


def read_image(path, upright=False):
    """An image file as uint8 (3, H, W). None if it is damaged, far too large or not there.

    upright: turn a photograph by its EXIF orientation, which ImageNet's protocols do not. Of an
    animation, the first frame.
    """
    try:
        with Image.open(path) as image:
            if math.prod(image.size) > MAX_PIXELS:  # as its header says, before memory is taken
                return None
            image.load()  # turns a TIFF by itself
            turn = turn_of(image) if upright else None
            image = to_rgb(image)
    except Exception:  # a damaged file lets Pillow raise a dozen kinds
        return None
    if turn is not None:
        image = image.transpose(turn)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def turn_of(image):
    """How a PIL image has to be turned by its EXIF orientation. None if not, or if that is
    damaged: the pixels may be intact.
    """
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:
        return None


def to_rgb(image):
    """A PIL image in RGB. Alpha is ignored. ValueError for pixels of unknown range."""
    if image.mode == "F":
        raise ValueError("its pixels are real numbers, of unknown range")
    if image.mode.startswith("I"):  # gray, of 16 bits
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() >= 2**16:
            raise ValueError("its pixels have 32 bits, of unknown range")
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image


class Images(torch.utils.data.Dataset):
    """The images of a list in one epoch. Item i is (image; label; indices of damaged images).

    The image is None if it is damaged; with `replace`, the next intact one takes its place, so that
    all ranks have batches of one size. Augmentation depends on the seed, the epoch and i alone.
    """

    def __init__(self, paths, labels, transform, seed=0, epoch=0, replace=False, upright=False):
        self.paths = paths
        self.replace = replace
        self.upright = upright
        self.labels = labels
        self.transform = transform
        self.seed = seed
        self.epoch = epoch

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        damaged = []
        image = self.load(index)
        while image is None:
            damaged.append(index)
            if not self.replace or len(damaged) > MAX_DAMAGED:
                break
            index = (index + 1) % len(self)
            image = self.load(index)
        return image, self.labels[index], damaged

    def load(self, index):
        """The transformed image, uint8 (3, size, size). None if it is damaged or far too large."""
        image = read_image(self.paths[index], self.upright)
        if image is None:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(augmentation_seed(self.seed, self.epoch, index))
            return self.transform(image)


def collate(items):
    """Items of Images -> images and labels as tensors, and the indices of damaged images, which are
    left out.
    """
    intact = [item for item in items if item[0] is not None]
    damaged = [index for _, _, indices in items for index in indices]
    if not intact:
        return torch.empty(0), torch.empty(0), damaged
    images = torch.stack([image for image, _, _ in intact])
    labels = torch.stack([label for _, label, _ in intact])
    return images, labels, damaged


def start_worker(number):
    """Ignore what stops a run: Ctrl-C and many schedulers signal to all processes at once, but the
    main one alone decides when to stop, and needs its workers until then.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def batches(images, order, batch_size, num_workers, device):
    """Yields batches of Images in this order: uint8 (n, 3, size, size) and labels, on the device.

    Damaged files are named; UserError if there are more than MAX_DAMAGED.
    """
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(images, order),
        batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=start_worker,
    )
    told = set()
    for pixels, labels, damaged in loader:
        for index in damaged:
            if index not in told:
                print(f"warning: {images.paths[index]}: {DAMAGED}", file=sys.stderr)
            told.add(index)
        if len(told) > MAX_DAMAGED:
            raise runs.UserError(
                f"more than {MAX_DAMAGED} damaged images, see above; mend or delete them"
            )
        if len(pixels):
            yield pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def normalized(images, mean=MEAN, std=STD):
    """uint8 (N, 3, H, W) -> float32, channels last, (image / 255 - mean) / std."""
    mean = images.new_tensor(mean, dtype=torch.float32).view(1, 3, 1, 1)
    std = images.new_tensor(std, dtype=torch.float32).view(1, 3, 1, 1)
    result = torch.empty(images.shape, device=images.device, memory_format=torch.channels_last)
    # On a CPU, parts of the size of its cache take half the time.
    part = len(images) if images.is_cuda else 4
    for pixels, out in zip(images.split(part), result.split(part)):
        out.copy_(pixels.float().mul_(1 / (255 * std)).sub_(mean / std))
    return result
