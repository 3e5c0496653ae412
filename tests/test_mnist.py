"""The three variants: what colors and textures tell of the label, seeds, files, damaged files."""

import gzip
import json

import pytest
import torch
from conftest import write_idx
from PIL import Image, ImageColor

from data import mnist
from data.mnist import BACKGROUNDS, COLORS, OBJECTS, VARIANTS, load_variant, to_float
from data.runs import UserError
from data.synthetic import synthetic_digits, synthetic_textures


def rgb(names):
    return torch.tensor([ImageColor.getrgb(name) for name in names]).float()


@pytest.fixture(scope="module")
def variants(digits_dir):
    return {name: load_variant(name, digits_dir, seed=3) for name in VARIANTS}


# --------------------------------------------------------------------------------------------------
# Images


@pytest.mark.parametrize("name", VARIANTS)
def test_images_are_seeded_and_shaped(variants, name):
    train, test = variants[name]
    sizes = (600, 200) if name == "colored_mnist" else (500, 100)
    assert (len(train), len(test)) == sizes
    assert train.held_out == sizes[0] // 10
    assert mnist.MnistVariant.held_out.fget(range(60_000)) == 5_000
    index = torch.tensor([5, 0, 499])
    first = train.images(index, torch.Generator().manual_seed(1))
    again = train.images(index, torch.Generator().manual_seed(1))
    other = train.images(index, torch.Generator().manual_seed(2))
    assert first.shape == (3, 3, 32, 32)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    # In colored MNIST, each image keeps its color.
    assert torch.equal(first, other) == (name == "colored_mnist")
    drawn = train.all_images(7)
    assert torch.equal(drawn, train.all_images(7))
    assert torch.equal(drawn, train.all_images(8)) == (name == "colored_mnist")
    fixed, _ = test.decorrelated_images(7)
    assert torch.equal(fixed, test.decorrelated_images(7)[0])
    assert not torch.equal(fixed, test.decorrelated_images(8)[0])
    floats = to_float(first)
    assert floats.min() >= -1
    assert 0 < floats.max() <= 1


def test_colors_follow_the_seed_and_differ_between_the_splits(few_digits):
    train, test = load_variant("colored_mnist", few_digits, seed=1)
    again, _ = load_variant("colored_mnist", few_digits, seed=1)
    other, _ = load_variant("colored_mnist", few_digits, seed=5)
    assert torch.equal(train.fixed[0], again.fixed[0])
    noise = []
    for split in (train, other, test):
        noise.append(split.fixed[0][:20, :, 0, 0] - rgb(COLORS)[split.labels[:20]])
    for drawn in noise[1:]:
        assert (noise[0] - drawn).abs().median() > 5


def test_colored_digits_have_their_labels_mean_color_on_black(variants):
    train, test = variants["colored_mnist"]
    digits = train.digits[:, 0]
    images = train.all_images(0).float()
    exact = (digits[:, None] / 255 * train.fixed[0]).round()
    assert (images == exact).float().mean() > 0.999
    # Colors that leave the range are drawn again, not cut off at its ends.
    assert (train.fixed[0] % 255 == 0).float().mean() < 0.02
    full = digits > 220
    assert images.permute(0, 2, 3, 1)[digits == 0].max() == 0
    assert full.flatten(1).any(1).float().mean() > 0.99
    colors = []
    for image, inside, digit in zip(images, full, digits):
        colors.append((image[:, inside] * 255 / digit[inside]).mean(1))
    colors = torch.stack(colors)
    means = torch.stack([colors[train.labels == label].mean(0) for label in range(10)])
    # About 60 images of each class, std 36 of 255: 5 in the mean; redrawing pulls values at the
    # ends inwards by up to 29.
    assert (means - rgb(COLORS)).abs().max() < 45
    assert (means - rgb(COLORS)).abs().median() < 10
    expected = rgb(COLORS)[train.labels]
    inner = (expected > 100) & (expected < 155)
    deviation = (colors - expected)[inner].std().item()
    assert deviation == pytest.approx(255 * 0.02**0.5, rel=0.15)
    mixed = test.decorrelated_images(0)[0].float().amax((2, 3))
    nearest = torch.cdist(mixed, rgb(COLORS)).argmin(1)
    assert (nearest == test.labels).float().mean() < 0.25  # 0.1 by chance


def mean_colors(images, masks):
    """The mean color of each image within its mask: (n, 3)."""
    return torch.stack([image[:, mask].mean(1) for image, mask in zip(images, masks)])


def test_double_colored_pixels_are_the_two_colors_of_the_label(variants):
    train, test = variants["double_colored_mnist"]
    images = train.all_images(0).float()
    masks = train.digits[:, 0].bool()
    difference = mean_colors(images, masks) - rgb(OBJECTS)[train.labels]
    assert difference.abs().max() < 0.05 * 255
    inner = rgb(OBJECTS)[train.labels].sub(127).abs() < 100
    assert difference[inner].std().item() == pytest.approx(0.01 * 255, rel=0.15)
    difference = mean_colors(images, ~masks) - rgb(BACKGROUNDS)[train.labels]
    assert difference.abs().max() < 0.05 * 255
    assert OBJECTS[0] == "yellow" and OBJECTS[6] == "darkgreen"  # entry i - 6 of the list

    images, classes = test.decorrelated_images(0)
    images = images.float()
    masks = test.digits[:, 0].bool()
    drawn_object = torch.cdist(mean_colors(images, masks), rgb(OBJECTS)).argmin(1)
    drawn_background = torch.cdist(mean_colors(images, ~masks), rgb(BACKGROUNDS)).argmin(1)
    assert torch.equal(classes, torch.stack([drawn_object, drawn_background]))
    assert drawn_object.unique().tolist() == drawn_background.unique().tolist() == list(range(10))
    assert (drawn_object == drawn_background).float().mean() < 0.25
    assert (drawn_object == test.labels).float().mean() < 0.25
    assert (drawn_background == test.labels).float().mean() < 0.25


def test_wildlife_pixels_are_crops_of_the_labels_textures(variants):
    train, _ = variants["wildlife_mnist"]
    objects, backgrounds = synthetic_textures(seed=0)
    images = train.images(torch.arange(12), torch.Generator().manual_seed(0))
    digits = train.digits[:12, 0].bool()
    for image, label, digit in zip(images, train.labels, digits):
        for texture, part in ((objects[label], digit), (backgrounds[label], ~digit)):
            texture = texture[None].float()
            padded = torch.nn.functional.pad(texture, [3] * 4, mode="reflect")[0].to(torch.uint8)
            windows = padded.unfold(1, 32, 1).unfold(2, 32, 1)  # (3, 125, 125, 32, 32)
            equal = windows[..., part] == image[:, part][:, None, None]
            assert equal.all(-1).all(0).any()


def test_crops_come_from_everywhere_in_a_texture():
    """Their first pixel tells its row and column, of which three more are mirrored at the ends."""
    steps = torch.arange(150, dtype=torch.uint8)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    texture = torch.stack([y, x, y]).expand(10, -1, -1, -1)
    nothing = torch.zeros(1, 28, 28, dtype=torch.uint8)
    label = torch.zeros(1, dtype=torch.int64)
    variant = mnist.MnistVariant("wildlife_mnist", nothing, label, (texture, texture), 0, "cpu")
    index = torch.zeros(4000, dtype=torch.int64)
    corners = variant.images(index, torch.Generator().manual_seed(0))[:, :2, 0, 0]
    for line in corners.unbind(1):
        assert line.unique().tolist() == list(range(122))
    assert len(corners.unique(dim=0)) > 2500  # rows and columns are drawn apart


def test_resize_is_pils_nearest_neighbor(variants, digits_dir):
    train, _ = variants["colored_mnist"]
    raw = digits_dir / "MNIST" / "raw"
    digit = mnist.read_idx(raw / "train-images-idx3-ubyte.gz")[4]
    image = Image.fromarray(digit.numpy()).resize((32, 32), Image.Resampling.NEAREST)
    resized = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(32, 32)
    assert torch.equal(train.digits[4, 0], resized)
    binary, _ = variants["double_colored_mnist"]
    assert torch.equal(binary.digits[4, 0], (resized > 25).to(torch.uint8))  # a tenth of 255


def test_offline_needs_no_folder(tmp_path):
    train, test = load_variant("colored_mnist", tmp_path / "nowhere", offline=True)
    assert len(train) == 5 * len(test) >= 20_000
    assert train.labels.bincount().min() > 0.08 * len(train)


# --------------------------------------------------------------------------------------------------
# Files of digits


def write_digits(folder, images, labels):
    """A folder's training files, not gzipped."""
    write_idx(folder / "train-images-idx3-ubyte", images)
    write_idx(folder / "train-labels-idx1-ubyte", labels.to(torch.uint8))


def test_offline_downloads_no_photographs(tmp_path):
    with pytest.raises(UserError, match="--offline downloads nothing"):
        load_variant("wildlife_mnist", tmp_path, textures="dtd", offline=True)


def test_plain_files_in_the_folder_itself_are_used_too(tmp_path):
    images, labels = synthetic_digits(12, seed=0)
    write_digits(tmp_path, images, labels)
    train, test = load_variant("wildlife_mnist", tmp_path)
    assert (len(train), len(test)) == (10, 2)
    assert torch.equal(test.labels, labels[10:])


DAMAGE = ["truncated", "longer", "empty", "magic", "dimensions", "count", "size", "html", "bomb"]
DAMAGE += ["cut gzip", "bad gzip"]


def damage(raw, kind):
    """The bytes of a damaged file."""
    if kind == "truncated":
        return raw[:-5]
    if kind == "longer":
        return raw + b"0"
    if kind == "empty":
        return b""
    if kind == "magic":
        return b"\x00\x00\x0d" + raw[3:]
    if kind == "dimensions":
        return raw[:3] + b"\x02" + raw[4:]
    if kind == "count":
        return raw[:4] + b"\xff\xff\xff\xff" + raw[8:]
    if kind == "size":
        return raw[:8] + b"\x00\x00\x00\x1d" + raw[12:]
    if kind == "html":
        return b"<html>not found</html>"
    if kind == "bomb":
        return gzip.compress(raw + bytes(2 * 10**8), 1)
    if kind == "cut gzip":
        return gzip.compress(raw)[:-20]
    return gzip.compress(raw)[:30] + b"x" * 40  # bad gzip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_idx_file_is_named(tmp_path, kind):
    images, labels = synthetic_digits(12, seed=0)
    write_digits(tmp_path, images, labels)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes(), kind))
    with pytest.raises(UserError, match="train-images-idx3-ubyte"):
        load_variant("wildlife_mnist", tmp_path)


def test_images_and_labels_that_do_not_belong_together(tmp_path):
    images, labels = synthetic_digits(12, seed=0)
    for wrong in (labels[:11], labels + 5):
        write_digits(tmp_path, images, wrong)
        with pytest.raises(UserError, match="do not belong together"):
            load_variant("wildlife_mnist", tmp_path)


# --------------------------------------------------------------------------------------------------
# Textures


def make_textures(folder, count=10):
    for kind, images in zip(("object", "background"), synthetic_textures(seed=1, size=50)):
        (folder / kind).mkdir(parents=True)
        for index, image in enumerate(images[:count]):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            picture.save(folder / kind / f"{index}.png")


def test_a_texture_of_16_bits(tmp_path):
    Image.new("I;16", (30, 20), 40_000).save(tmp_path / "a.png")
    assert mnist.read_texture(tmp_path / "a.png").unique().tolist() == [40_000 // 256]


def test_photographs_of_dtd(tmp_path):
    """Striped ones are objects, veined ones backgrounds, in the order of the list."""
    for kind, numbers in mnist.DTD_IMAGES.items():
        folder = tmp_path / "dtd" / "dtd" / "images" / kind
        folder.mkdir(parents=True)
        for index, number in enumerate(numbers.split()):
            color = (20 * index, 200 if kind == "veined" else 0, 0)
            Image.new("RGB", (30, 20), color).save(folder / f"{kind}_{number}.jpg")
    for textures, green in zip(mnist.load_textures("dtd", tmp_path), (0, 200)):
        assert textures.shape == (10, 3, 150, 150)
        expected = torch.tensor([[20.0 * index, green] for index in range(10)])
        assert (textures[:, :2].float().mean((2, 3)) - expected).abs().max() < 3


def test_a_folder_of_textures(tmp_path, digits_dir):
    make_textures(tmp_path / "ten")
    pair = mnist.load_textures(tmp_path / "ten", None)
    for found, drawn in zip(pair, synthetic_textures(seed=1, size=50), strict=True):
        assert torch.equal(found, drawn.repeat_interleave(3, 2).repeat_interleave(3, 3))
    train, _ = load_variant("wildlife_mnist", digits_dir, textures=str(tmp_path / "ten"))
    ours, _ = load_variant("wildlife_mnist", digits_dir)
    assert not torch.equal(train.all_images(0)[:9], ours.all_images(0)[:9])
    make_textures(tmp_path / "nine", count=9)
    (tmp_path / "ten" / "object" / "3.png").write_bytes(b"not a picture")
    for folder, message in (("nine", "9 images"), ("none", "no folder"), ("ten", "3.png")):
        with pytest.raises(UserError, match=message):
            load_variant("wildlife_mnist", digits_dir, textures=str(tmp_path / folder))


# --------------------------------------------------------------------------------------------------
# Counterfactuals


def chunk_labels(index, size):
    """Labels of a chunk, all of one row different."""
    return (index + torch.arange(3 * size, dtype=torch.uint8)).remainder(10).view(size, 3)


def write_counterfactuals(folder, sizes, *, value=0, **changes):
    """A data set of generate.py whose chunks have these sizes; all pixels are `value`."""
    folder.mkdir()
    for index, size in enumerate(sizes):
        chunk = {
            "images": torch.full((size, 3, 32, 32), value, dtype=torch.uint8),
            "labels": chunk_labels(index, size),
        }
        torch.save(chunk, folder / f"chunk_{index:05d}.pt")
    description = {
        "n": sum(sizes),
        "chunks": len(sizes),
        "dataset": "colored_mnist",
        "offline": False,
    }
    (folder / "dataset.json").write_text(json.dumps(description | changes))
    return folder


def load_folders(*folders):
    cpu = torch.device("cpu")
    return mnist.load_counterfactuals(folders, "colored_mnist", False, mnist.MnistVariant, cpu)


def test_counterfactuals_of_several_folders_are_joined(tmp_path):
    first = write_counterfactuals(tmp_path / "first", [3, 2], value=1)
    second = write_counterfactuals(tmp_path / "second", [4], value=2, dataset=None)
    images, labels = load_folders(first, str(second))
    assert images.dtype == torch.uint8
    assert images.shape == (9, 3, 32, 32)
    assert images[:, 0, 0, 0].tolist() == [1] * 5 + [2] * 4
    assert labels.dtype == torch.int64
    expected = [chunk_labels(0, 3), chunk_labels(1, 2), chunk_labels(0, 4)]
    assert torch.equal(labels, torch.cat(expected).long())


@pytest.mark.parametrize(
    "sizes, changes, message",
    [
        ([3], {"dataset": "wildlife_mnist"}, "made for wildlife_mnist, not colored_mnist"),
        ([3], {"offline": True}, "made by weights of a run with --offline"),
        ([3], {"n": "three"}, "no complete data set"),
        ([3], {"n": 4}, "3 images where dataset.json promises 4"),
        ([3, 2], {"n": 4}, "chunk_00001.pt: not a chunk of this data set"),
        ([3], {"chunks": 2}, "chunk_00001.pt: no such file"),
        ([3], {"classes": list("abcdefghij")}, "its classes are not the data's"),
    ],
)
def test_a_wrong_folder_of_counterfactuals_is_named(tmp_path, sizes, changes, message):
    right = write_counterfactuals(tmp_path / "right", [2])
    wrong = write_counterfactuals(tmp_path / "wrong", sizes, **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_folders(right, wrong)
    assert str(wrong) in str(caught.value)


def test_damaged_counterfactuals(tmp_path):
    folder = write_counterfactuals(tmp_path / "cf", [3])
    labels = torch.tensor([[0, 1, 2], [3, 10, 4], [5, 6, 7]])
    torch.save({"images": torch.zeros(3, 3, 32, 32), "labels": labels}, folder / "chunk_00000.pt")
    with pytest.raises(UserError, match="cf: its classes are not the data's"):
        load_folders(folder)
    torch.save({"images": torch.zeros(3, 3, 32, 32)}, folder / "chunk_00000.pt")
    with pytest.raises(UserError, match="chunk_00000.pt: not a chunk"):
        load_folders(folder)
    for text in ("[]", "{", "{}", '{"n": 0, "chunks": 0}'):
        (folder / "dataset.json").write_text(text)
        with pytest.raises(UserError, match="cf: no complete data set"):
            load_folders(folder)
    (folder / "dataset.json").unlink()
    with pytest.raises(UserError, match="cf: no complete data set"):
        load_folders(folder)
