"""Folders of ImageNet and its robustness tests: lists of files with their classes, decoded and augmented by torchvision.

A list is (paths, labels): labels is an integer tensor, (n,) or, for counterfactuals and Cue-Conflict, (n, columns).
Whatever is wrong with a folder is a UserError that names it.
"""
import csv
import functools
import glob
import io
import json
import math
import re
import signal
import sys
from pathlib import Path

import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image, decode_jpeg, read_file
from torchvision.transforms import v2

from data.runs import ROOT, UserError, load_tensors

ENDINGS = {".jpg", ".jpeg", ".png", ".webp"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)   # of ImageNet, as torchvision's weights expect
IN9_MEAN, IN9_STD = (0.4717, 0.4499, 0.3837), (0.2600, 0.2516, 0.2575)   # of ImageNet-9, as the published CGN code has it
LARGEST = 90_000_000                                       # pixels of an image; the largest of ImageNet has 61 million
DAMAGED = 20                                               # images that are skipped before it is an error


@functools.cache
def facts():
    """WNIDs in class order, Cue-Conflict's categories, ImageNet-9's map, and the authors' lists of good classes."""
    return json.loads((ROOT / "data" / "imagenet.json").read_text())


def pictures(folder):
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)


def subfolders(folder, what):
    """The folders in `folder`, sorted. UserError if it is not there or has none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; it should hold {what}")
    found = sorted(path for path in folder.iterdir() if path.is_dir())
    if not found:
        raise UserError(f"{folder}: holds no folders; it should hold {what}")
    return found


def listed(folders, class_of):
    """All pictures of some folders, each with the class of its folder."""
    paths, labels = [], []
    for folder in folders:
        label, found = class_of(folder), pictures(folder)
        if not found:
            raise UserError(f"{folder}: no images in this class; delete the folder or fill it")
        paths += found
        labels += [label] * len(found)
    return paths, torch.tensor(labels)


def wnid_images(folder):
    """Images in folders named by WNID, or 0 to 999 as in ImageNet-V2; of all 1000 classes or of some."""
    classes = {name: number for number, wnid in enumerate(facts()["wnids"]) for name in (wnid, str(number))}

    def class_of(path):
        if path.name not in classes:
            raise UserError(f"{path}: not the WNID of one of ImageNet's 1000 classes, such as n01440764")
        return classes[path.name]

    return listed(subfolders(Path(folder), "a folder for each class, named by WNID"), class_of)


def validation_images(root):
    """ImageNet's val: in folders by WNID, or flat beside the meta.bin that torchvision's ImageNet makes."""
    folder = Path(root) / "val"
    flat = pictures(folder) if folder.is_dir() else []
    if not flat:
        return wnid_images(folder)
    meta = Path(root) / "meta.bin"
    if not meta.is_file():
        raise UserError(f"{folder}: images without folders need {meta}, which torchvision.datasets.ImageNet makes of the "
                        "development kit; or sort them into folders by WNID")
    wnids = load_tensors(meta)[1]
    if len(wnids) != len(flat):
        raise UserError(f"{folder}: {len(flat)} images, {meta} tells the classes of {len(wnids)}")
    classes = {wnid: number for number, wnid in enumerate(facts()["wnids"])}
    return flat, torch.tensor([classes[wnid] for wnid in wnids])


def counterfactual_images(patterns):
    """What generate.py wrote into one or many folders. labels: (n, 3), classes of shape, texture and background."""
    folders = sorted({Path(name) for pattern in patterns for name in glob.glob(str(pattern))})
    if not folders:
        raise UserError(f"--counterfactual {' '.join(map(str, patterns))}: no such folder")
    paths, labels = [], []
    for folder in folders:
        table = folder / "labels.csv"
        try:
            with open(table, newline="", encoding="utf-8-sig") as file:
                rows = [(row["file"], [int(row[name]) for name in ("shape", "texture", "background")])
                        for row in csv.DictReader(file)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--counterfactual {folder}: no readable labels.csv of generate.py ({error!r})") from None
        if not rows:
            raise UserError(f"--counterfactual {folder}: labels.csv has no rows")
        present = {f"{sub.name}/{path.name}" for sub in {folder / Path(name).parent for name, _ in rows}
                   if sub.is_dir() for path in pictures(sub)}
        named = {name for name, _ in rows}
        if len(named) != len(rows):
            raise UserError(f"--counterfactual {table}: {len(rows)} rows for {len(named)} files; one each is needed")
        for odd, words in ((named - present, "a row without its file"), (present - named, "a file without its row")):
            if odd:
                raise UserError(f"--counterfactual {folder}: {min(odd)} and {len(odd) - 1} more: {words}; run generate.py "
                                "again with --resume")
        for name, classes in rows:
            if not all(0 <= c < 1000 for c in classes):
                raise UserError(f"--counterfactual {table}: {name} has the classes {classes}; 0 to 999 exist")
        paths += [folder / name for name, _ in rows]
        labels += [classes for _, classes in rows]
    return paths, torch.tensor(labels)


def cue_conflict_images(folder):
    """Cue-Conflict (Geirhos et al. 2019): labels (n, 2), categories of shape and texture, of images where they differ."""
    names = list(facts()["cue_conflict"]["categories"])
    paths, labels = [], []
    for sub in subfolders(Path(folder), "Cue-Conflict's 16 categories"):
        for path in pictures(sub):
            match = re.fullmatch(r"([a-z]+)\d+-([a-z]+)\d+", path.stem)
            if not match or not set(match.groups()) <= set(names):
                raise UserError(f"{path}: not named like Cue-Conflict's images, such as cat3-truck1.png")
            if match[1] != match[2]:
                paths.append(path)
                labels.append([names.index(match[1]), names.index(match[2])])
    if not paths:
        raise UserError(f"{folder}: no images whose shape and texture differ")
    return paths, torch.tensor(labels)


def imagenet9_images(folder):
    """The variants of ImageNet-9 (Xiao et al. 2020) found: name -> images with classes 0 to 8."""
    def class_of(path):
        if not re.match(r"0[0-8]_", path.name):
            raise UserError(f"{path}: not a class of ImageNet-9, such as 00_dog")
        return int(path.name[:2])

    found = {sub.name: listed(subfolders(sub / "val", "ImageNet-9's nine classes"), class_of)
             for sub in subfolders(Path(folder), "original/, mixed_same/, mixed_rand/, ...") if (sub / "val").is_dir()}
    if not found:
        raise UserError(f"{folder}: no variant of ImageNet-9, such as original/val/00_dog/")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Decoding and augmentation


def transform(training, size=224, margin=True):
    """uint8 (3, H, W) -> uint8 (3, size, size), as published; the numbers' scale is changed on the device, by batch.

    margin: tests see the middle seven eighths; without it all of a square image, for those that come ready cropped.
    """
    if training:
        return v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
    return v2.Compose([v2.Resize(size * 256 // 224 if margin else size, antialias=True), v2.CenterCrop(size)])


def declared_pixels(data):
    """Width times height in the header of an image file (uint8 tensor), or 0: to be looked at before memory is taken."""
    head, place = memoryview(data.numpy()), 2
    while head[:2] == b"\xff\xd8" and place + 9 < len(head) and head[place] == 0xff:      # segments of a JPEG
        if 0xc0 <= head[place + 1] <= 0xcf and head[place + 1] not in (0xc4, 0xc8, 0xcc):
            return int.from_bytes(head[place + 5:place + 7], "big") * int.from_bytes(head[place + 7:place + 9], "big")
        place += 2 + int.from_bytes(head[place + 2:place + 4], "big")
    try:
        return math.prod(Image.open(io.BytesIO(head)).size)
    except Image.DecompressionBombError:
        return LARGEST + 1
    except (OSError, ValueError, SyntaxError):
        return 0


def decode(data, device="cpu"):
    """Bytes of image files (uint8 tensors) -> uint8 (3, H, W) each on `device`, None where damaged. Together if possible."""
    try:
        return decode_jpeg(data, ImageReadMode.RGB, device=device)
    except RuntimeError:
        if len(data) > 1:
            return [image for one in data for image in decode([one], device)]
    try:                                                   # a GPU decodes neither CMYK nor PNG
        image = v2.functional.to_dtype(decode_image(data[0], ImageReadMode.RGB), torch.uint8, scale=True)
        return [(image if image.ndim == 3 else image[0]).to(device)]       # of an animation, the first
    except RuntimeError:
        return [None]


class Images(torch.utils.data.Dataset):
    """Images of a list. Item i is (image or, if it is damaged, None; label; i).

    Augmentation depends on the seed, the epoch and i alone: not on the workers, ranks or an interruption.
    device: decode and augment there, by batch; workers then only read files, and an item's image is the file's bytes.
    """

    def __init__(self, paths, labels, change, seed=0, device=None):
        self.paths, self.labels, self.change, self.seed, self.epoch = paths, labels, change, seed, 0
        self.device = device

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, number):
        try:
            data = read_file(str(self.paths[number]))
            too_large = declared_pixels(data) > LARGEST
        except RuntimeError:
            too_large = True                               # not readable at all
        if too_large:
            return None, self.labels[number], number
        return data if self.device else self.augmented(*decode([data]), number), self.labels[number], number

    def augmented(self, image, number):
        """The changed image; None stays None."""
        if image is None:
            return None
        state = torch.default_generator.get_state()
        torch.default_generator.manual_seed(((self.seed * 1_000_003 + self.epoch) * 10_000_019 + number) % 2 ** 63)
        image = self.change(image)
        torch.default_generator.set_state(state)
        return image

    def decoded(self, items):
        """Items whose image is a file's bytes -> items as they are without a `device`."""
        whole = [item for item in items if item[0] is not None]
        images = decode([data for data, _, _ in whole], self.device) if whole else []
        done = [(self.augmented(image, number), label, number) for image, (_, label, number) in zip(images, whole)]
        return done + [item for item in items if item[0] is None]


def collate(items):
    """Images and labels as tensors, and the numbers of damaged images, which are left out."""
    whole = [item for item in items if item[0] is not None]
    damaged = [number for image, _, number in items if image is None]
    if not whole:
        return torch.empty(0), torch.empty(0), damaged
    images, labels, _ = zip(*whole)
    return torch.stack(images), torch.stack(labels), damaged


def start_worker(number):
    """The main process decides when to stop: Ctrl-C reaches workers, too, and they inherit its handlers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def batches(images, order, size, workers, device):
    """Batches of (uint8 images, labels) on the device in this order. Damaged files are named and left out, up to a limit."""
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(images, order), size, num_workers=workers, collate_fn=list if images.device else collate,
        pin_memory=device.type == "cuda" and not images.device, prefetch_factor=4 if workers else None,
        worker_init_fn=start_worker)
    skipped = 0
    for batch in loader:
        pixels, labels, damaged = collate(images.decoded(batch)) if images.device else batch
        for number in damaged:
            skipped += 1
            print(f"warning: {images.paths[number]}: damaged, too large or no image; left out", file=sys.stderr)
        if skipped > DAMAGED:
            raise UserError(f"more than {DAMAGED} damaged images, see above; mend or delete them")
        if len(pixels):
            yield pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def normalized(images, mean=MEAN, std=STD):
    """uint8 (N, 3, H, W) -> float32, standardised as torchvision's weights expect, channels last."""
    mean, std = (images.new_tensor(x, dtype=torch.float32).view(1, 3, 1, 1) for x in (mean, std))
    out = torch.empty(images.shape, device=images.device, memory_format=torch.channels_last)
    part = len(images) if images.is_cuda else 4            # of the size of a CPU's cache: half the time
    for pixels, result in zip(images.split(part), out.split(part)):
        result.copy_(pixels.float().mul_(1 / (255 * std)).sub_(mean / std))
    return out
