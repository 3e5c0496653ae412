"""The three variants: what colours and textures say of the label, seeds, files, and damaged files."""
import gzip

import pytest
import torch
from PIL import Image, ImageColor

from conftest import write_idx
from data.mnist import BACKGROUNDS, COLORS, OBJECTS, VARIANTS, load_variant, read_idx, to_float
from data.runs import UserError
from data.synthetic import synthetic_digits, synthetic_textures


def rgb(names):
    return torch.tensor([ImageColor.getrgb(name) for name in names]).float()


@pytest.fixture(scope="module")
def variants(digits_dir):
    return {name: load_variant(name, digits_dir, seed=3) for name in VARIANTS}


@pytest.mark.parametrize("name", VARIANTS)
def test_images_are_seeded_and_shaped(variants, name):
    train, test = variants[name]
    assert (len(train), len(test)) == ((600, 200) if name == "colored_mnist" else (500, 100))
    index = torch.tensor([5, 0, 499])
    first, again, other = (train.images(index, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.shape == (3, 3, 32, 32) and first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name == "colored_mnist")          # there, each image keeps its colour
    fixed = test.all_images(7, decorrelated=True)
    assert torch.equal(fixed, test.all_images(7, decorrelated=True))
    assert not torch.equal(fixed, test.all_images(8, decorrelated=True))
    floats = to_float(first)
    assert floats.min() >= -1 and floats.max() <= 1 and floats.max() > 0


def test_colored_digits_have_their_labels_mean_colour_on_black(variants):
    train, test = variants["colored_mnist"]
    images, full = train.all_images(0).float(), train.digits[:, 0] > 220
    assert images.permute(0, 2, 3, 1)[train.digits[:, 0] == 0].max() == 0
    assert full.flatten(1).any(1).float().mean() > 0.99
    colours = torch.stack([(image[:, m] * 255 / d[m]).mean(1) for image, m, d in zip(images, full, train.digits[:, 0])])
    means = torch.stack([colours[train.labels == c].mean(0) for c in range(10)])
    # About 60 images of each class, std 36 of 255: 5 in the mean; redrawing pulls values at the ends inwards by up to 29.
    assert (means - rgb(COLORS)).abs().max() < 45
    assert (means - rgb(COLORS)).abs().median() < 10
    inner = (rgb(COLORS)[train.labels] > 100) & (rgb(COLORS)[train.labels] < 155)
    assert (colours - rgb(COLORS)[train.labels])[inner].std().item() == pytest.approx(255 * 0.02 ** 0.5, rel=0.15)
    mixed = test.all_images(0, decorrelated=True).float().amax((2, 3))
    nearest = torch.cdist(mixed, rgb(COLORS)).argmin(1)
    assert (nearest == test.labels).float().mean() < 0.25                   # 0.1 by chance


def test_double_colored_pixels_are_the_two_colours_of_the_label(variants):
    train, test = variants["double_colored_mnist"]
    images, mask = train.all_images(0).float(), train.digits[:, 0].bool()
    object_, background = (torch.stack([i[:, m].mean(1) for i, m in zip(images, part)]) for part in (mask, ~mask))
    assert (object_ - rgb(OBJECTS)[train.labels]).abs().max() < 0.05 * 255
    assert (background - rgb(BACKGROUNDS)[train.labels]).abs().max() < 0.05 * 255
    assert OBJECTS[0] == "yellow" and OBJECTS[6] == "darkgreen"             # entry i - 6 of the list
    images = test.all_images(0, decorrelated=True).float()
    drawn = torch.stack([torch.cdist(torch.stack([i[:, m].mean(1) for i, m in zip(images, part)]), rgb(names)).argmin(1)
                         for part, names in ((test.digits[:, 0].bool(), OBJECTS), (~test.digits[:, 0].bool(), BACKGROUNDS))])
    agree = [(drawn[0] == drawn[1]), (drawn[0] == test.labels), (drawn[1] == test.labels)]
    assert all(pair.float().mean() < 0.25 for pair in agree)


def test_wildlife_pixels_are_crops_of_the_labels_textures(variants):
    train, _ = variants["wildlife_mnist"]
    object_, background = synthetic_textures(seed=0)
    images, labels = train.images(torch.arange(40), torch.Generator().manual_seed(0)), train.labels
    for image, label, digit in zip(images, labels, train.digits[:40, 0].bool()):
        for texture, part in ((object_[label], digit), (background[label], ~digit)):
            padded = torch.nn.functional.pad(texture[None].float(), [3] * 4, mode="reflect")[0].to(torch.uint8)
            windows = padded.unfold(1, 32, 1).unfold(2, 32, 1)              # (3, 125, 125, 32, 32)
            matches = (windows[..., part] == image[:, part][:, None, None]).all(-1).all(0)
            assert matches.any()


def test_resize_is_pils_nearest_neighbour(variants, digits_dir):
    train, _ = variants["colored_mnist"]
    digit = read_idx(digits_dir / "MNIST" / "raw" / "train-images-idx3-ubyte.gz")[4]
    resized = Image.fromarray(digit.numpy()).resize((32, 32), Image.Resampling.NEAREST)
    assert torch.equal(train.digits[4, 0], torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(32, 32))


def test_plain_files_in_the_folder_itself_are_used_too(tmp_path):
    images, labels = synthetic_digits(12, seed=0)
    write_idx(tmp_path / "train-images-idx3-ubyte", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte", labels.to(torch.uint8))
    train, test = load_variant("wildlife_mnist", tmp_path)
    assert (len(train), len(test)) == (10, 2) and torch.equal(test.labels, labels[10:])


def damaged(raw, kind):
    return {"truncated": lambda: raw[:-5], "longer": lambda: raw + b"0", "empty": bytes,
            "magic": lambda: b"\x00\x00\x0d" + raw[3:], "dimensions": lambda: raw[:3] + b"\x02" + raw[4:],
            "count": lambda: raw[:4] + b"\xff\xff\xff\xff" + raw[8:], "html": lambda: b"<html>not found</html>",
            "size": lambda: raw[:8] + b"\x00\x00\x00\x1d" + raw[12:], "cut gzip": lambda: gzip.compress(raw)[:-20],
            "bomb": lambda: gzip.compress(raw + bytes(2 * 10 ** 8), 1),
            "bad gzip": lambda: gzip.compress(raw)[:30] + b"x" * 40}[kind]()


@pytest.mark.parametrize("kind", ["truncated", "longer", "empty", "magic", "dimensions", "count", "size", "html",
                                  "bomb", "cut gzip", "bad gzip"])
def test_a_damaged_idx_file_is_named(tmp_path, kind):
    images, labels = synthetic_digits(12, seed=0)
    write_idx(tmp_path / "train-images-idx3-ubyte", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte", labels.to(torch.uint8))
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damaged(path.read_bytes(), kind))
    with pytest.raises(UserError, match="train-images-idx3-ubyte"):
        load_variant("wildlife_mnist", tmp_path)


def test_images_and_labels_that_do_not_belong_together(tmp_path):
    images, labels = synthetic_digits(12, seed=0)
    write_idx(tmp_path / "train-images-idx3-ubyte", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte", labels[:11].to(torch.uint8))
    with pytest.raises(UserError, match="do not belong together"):
        load_variant("wildlife_mnist", tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", (labels + 5).to(torch.uint8))
    with pytest.raises(UserError, match="do not belong together"):
        load_variant("wildlife_mnist", tmp_path)


def make_textures(folder, count=10):
    for kind, images in zip(("object", "background"), synthetic_textures(seed=1, size=40)):
        (folder / kind).mkdir(parents=True)
        for number, image in enumerate(images[:count]):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / kind / f"{number}.png")


def test_a_folder_of_textures(tmp_path, digits_dir):
    make_textures(tmp_path / "ten")
    train, _ = load_variant("wildlife_mnist", digits_dir, textures=str(tmp_path / "ten"))
    ours, _ = load_variant("wildlife_mnist", digits_dir)
    assert not torch.equal(train.all_images(0)[:9], ours.all_images(0)[:9])
    make_textures(tmp_path / "nine", count=9)
    (tmp_path / "ten" / "object" / "3.png").write_bytes(b"not a picture")
    for folder, message in (("nine", "9 images"), ("none", "no folder"), ("ten", "3.png")):
        with pytest.raises(UserError, match=message):
            load_variant("wildlife_mnist", digits_dir, textures=str(tmp_path / folder))


def test_offline_needs_no_folder(tmp_path):
    train, test = load_variant("colored_mnist", tmp_path / "nowhere", offline=True)
    assert len(train) == 5 * len(test) >= 20_000 and train.labels.bincount().min() > 0.08 * len(train)
