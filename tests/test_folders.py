"""Folders of images: what they may hold, what is refused, and the whole chain on one."""

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from PIL import Image, ImageOps, PngImagePlugin
from torchvision.transforms.functional import pil_to_tensor

import train_cgn
import train_classifier
from data import digit_folder, folders, imagenet, mnist, runs

RED = (250, 10, 20)
BUNDLED = ROOT / "data" / "pretrained" / "colored_mnist.pt"


def save(path, size=(40, 32), color=RED, mode="RGB", **options):
    """An image of one color. size: width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, color).convert(mode)
    image.save(path, **options)


def two_classes(root, count=3):
    """Two classes of so many images each."""
    for name in ("cat", "dog"):
        for index in range(count):
            save(root / name / f"{index}.png")


# --------------------------------------------------------------------------------------------------
# Folders that can be read: after the two classes of three images, each adds something to a folder,
# and says how many training images there are then.


def nested(root):
    save(root / "cat" / "more" / "deep" / "a.png")
    return 7


def unicode_and_spaces(root):
    save(root / "Höhle 洞 #1" / "ein Bild 'ü'.JPG")
    return 7


def one_pixel(root):
    save(root / "cat" / "small.png", (1, 1))
    return 7


def many_pixels(root):
    save(root / "cat" / "large.jpg", (4000, 3000))
    save(root / "cat" / "long.png", (5000, 2))
    return 8


def cmyk(root):
    save(root / "cat" / "print.jpg", mode="CMYK")
    return 7


def symbolic_links(root):
    (root / "wolf").symlink_to(root / "dog", target_is_directory=True)
    (root / "cat" / "link.png").symlink_to(root / "dog" / "0.png")
    return 10


def link_back_up(root):
    (root / "cat" / "again").symlink_to(root / "cat", target_is_directory=True)
    return 6


def dangling_link(root):
    (root / "cat" / "nowhere.png").symlink_to(root / "gone.png")
    return 6


def text_file(root):
    (root / "cat" / "text.png").write_text("no image")
    (root / "cat" / "notes.txt").write_text("no image, and not named as one")
    return 6


def empty_file(root):
    (root / "cat" / "empty.png").touch()
    return 6


def truncated(root):
    content = (root / "cat" / "0.png").read_bytes()
    (root / "cat" / "cut.png").write_bytes(content[: len(content) // 2])
    return 6


def read_only(root):
    for folder in (root / "cat", root / "dog", root):
        folder.chmod(0o555)
    return 6


def two_cases(root):
    save(root / "Cat" / "a.PNG")
    return 7


def hidden(root):
    save(root / "cat" / "._0.png")
    save(root / ".ipynb_checkpoints" / "0.png")
    save(root / "__MACOSX" / "0.png")
    (root / ".DS_Store").touch()
    (root / "cat" / ".DS_Store").touch()
    (root / "Thumbs.db").touch()
    return 6


def many_classes(root):
    for index in range(998):
        save(root / f"{index:04d}" / "a.png", (2, 2))
    return 1004


def webp(root):
    save(root / "cat" / "a.webp", lossless=True)
    return 7


def animation(root):
    frames = [Image.new("RGB", (32, 32), color) for color in (RED, (0, 0, 0))]
    frames[0].save(root / "cat" / "b.webp", save_all=True, append_images=frames[1:], lossless=True)
    return 7


def other_endings(root):
    for ending in ("bmp", "gif", "jfif", "tif"):
        save(root / "cat" / f"b.{ending}", format="JPEG" if ending == "jfif" else None)
    return 10


def underscores(root):
    save(root / "__background__" / "a.png")
    save(root / "__MACOSX" / "a.png")
    return 7


def train_alone(root):
    for name in ("cat", "dog"):
        (root / name).rename(root.parent / name)
        (root / "train").mkdir(exist_ok=True)
        (root.parent / name).rename(root / "train" / name)
    return 6


def a_class_named_test(root):
    count = train_alone(root)
    save(root / "train" / "test" / "deep" / "a.png")
    return count + 1


READABLE = [
    a_class_named_test,
    nested,
    unicode_and_spaces,
    one_pixel,
    many_pixels,
    cmyk,
    symbolic_links,
    link_back_up,
    dangling_link,
    text_file,
    empty_file,
    truncated,
    read_only,
    two_cases,
    hidden,
    many_classes,
    webp,
    animation,
    other_endings,
    underscores,
    train_alone,
]


@pytest.mark.parametrize("case", READABLE)
def test_odd_folders_are_read(case, tmp_path, capsys):
    root = tmp_path / "images"
    two_classes(root)
    expected = case(root)
    training, test = folders.load_folder(root, 32)
    shown = capsys.readouterr()
    assert len(training) == expected and len(test) == 0
    assert training.pixels.shape == (expected, 3, 32, 32)
    assert f"{expected} training images of {len(training.names)} classes" in shown.out
    assert training.labels.bincount(minlength=len(training.names)).min() > 0
    color = training.pixels.float().mean((2, 3))
    assert (color - torch.tensor(RED)).abs().max() < 30  # CMYK and JPEG are not exact
    damaged = case in (dangling_link, text_file, empty_file, truncated)
    assert shown.err.count("left out") == damaged


# --------------------------------------------------------------------------------------------------
# Folders that cannot


def empty_class(root):
    (root / "empty").mkdir()
    (root / "empty" / "a.txt").write_text("no image")
    return "empty: no images (.bmp, .gif, .jfif, .jpeg, .jpg, .png, .tif, .tiff, .webp) in this"


def damaged_class(root):
    (root / "broken").mkdir()
    (root / "broken" / "a.png").write_text("no image")
    return "broken: no intact images in this class"


def much_damaged(root):
    for index in range(30):
        (root / "cat" / f"broken{index}.png").write_text("no image")
    return "more than 20 damaged images"


def one_class(root):
    (root / "cat").rename(root.parent / "cat")
    return "dog is the only class folder; a data set has 2 to 1000"


def too_many_classes(root):
    for index in range(999):
        save(root / f"{index:04d}" / "a.png", (2, 2))
    return "1001 class folders"


def no_folder(root):
    root.rename(root.parent / "elsewhere")
    return "no such folder"


def no_classes(root):
    for name in ("cat", "dog"):
        (root / name).rename(root.parent / name)
    save(root / "a.png")
    return "holds no folders; it should hold a folder for each class"


def unknown_test_class(root):
    train_alone(root)
    save(root / "test" / "cow" / "a.png")
    return "cow: the training images have no such class"


def splits_of_other_names(root):
    for split in ("Train", "Test"):
        save(root / split / "cat" / "a.png")
    return "Test: holds folders alone, as a split of the data does, not a class"


def splits_within_classes(root):
    save(root / "dog" / "test" / "a.png")
    return "dog/test: a split within a class; training images should lie in train/CLASS/"


UNREADABLE = [
    splits_of_other_names,
    splits_within_classes,
    empty_class,
    damaged_class,
    much_damaged,
    one_class,
    too_many_classes,
    no_folder,
    no_classes,
    unknown_test_class,
]


@pytest.mark.parametrize("case", UNREADABLE)
def test_other_folders_are_refused(case, tmp_path):
    root = tmp_path / "images"
    two_classes(root)
    message = case(root)
    with pytest.raises(runs.UserError) as refused:
        folders.load_folder(root, 32)
    assert message in str(refused.value)


# --------------------------------------------------------------------------------------------------
# Pixels and splits


def test_kinds_of_pixels(tmp_path):
    """Gray, palette, transparent and 16-bit images have the values that they should have."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    gray = torch.from_numpy(noise).expand(3, -1, -1)
    kinds = {
        "gray.png": Image.fromarray(noise),
        "palette.png": Image.fromarray(noise).convert("P"),
        "alpha.png": Image.merge("LA", [Image.fromarray(noise), Image.new("L", (32, 32), 255)]),
        "rgba.png": Image.fromarray(noise).convert("RGBA"),
        "deep.png": Image.fromarray(noise.astype(np.uint16) * 257),
    }
    for name, image in kinds.items():
        image.save(tmp_path / name)
        found = folders.read_square(tmp_path / name, 32)
        assert torch.equal(found, gray), name


def test_photographs_are_turned_upright(tmp_path):
    image = Image.new("RGB", (32, 32))
    image.paste(RED, (0, 0, 32, 16))  # the upper half
    exif = image.getexif()
    exif[0x0112] = 3  # the camera was held upside down
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    found = folders.read_square(tmp_path / "a.jpg", 32)
    assert found[0, :14].max() < 50 and found[0, 18:].min() > 200
    # ImageNet's protocols do not turn them.
    seen, _, _ = imagenet.Images([tmp_path / "a.jpg"], torch.zeros(1), lambda image: image)[0]
    assert seen[0, :14].min() > 200 and seen[0, 18:].max() < 50


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_all_orientations(ending, tmp_path):
    image = Image.effect_noise((40, 30), 80).convert("RGB")
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / f"a.{ending}", exif=exif)
        found = imagenet.read_image(tmp_path / f"a.{ending}", upright=True)
        with Image.open(tmp_path / f"a.{ending}") as saved:
            upright = ImageOps.exif_transpose(saved).convert("RGB")
        assert torch.equal(found, pil_to_tensor(upright))


def test_an_image_with_odd_tags_is_read(tmp_path):
    """The second is a number that is said to be a text: Pillow fails to write the tags anew."""
    exif = Image.Exif()
    exif[0x0112] = 3
    exif[0x0132] = "2026"
    damaged = exif.tobytes().replace(b"\x01\x32\x00\x02", b"\x01\x19\x00\x02")
    image = Image.new("RGB", (32, 32))
    image.paste(RED, (0, 0, 32, 16))
    image.save(tmp_path / "a.jpg", exif=damaged, quality=95)
    found = folders.read_square(tmp_path / "a.jpg", 32)
    assert found[0, :14].max() < 50 and found[0, 18:].min() > 200


def test_large_notes_and_pixels_of_32_bits(tmp_path):
    notes = PngImagePlugin.PngInfo()
    notes.add_text("notes", "a" * 2**21, zip=True)
    Image.new("RGB", (32, 32), RED).save(tmp_path / "a.png", pnginfo=notes)
    assert folders.read_square(tmp_path / "a.png", 32) is not None
    Image.new("I", (32, 32), 2**20).save(tmp_path / "a.tif")
    assert folders.read_square(tmp_path / "a.tif", 32) is None
    Image.new("F", (32, 32), 0.5).save(tmp_path / "a.tif")
    assert folders.read_square(tmp_path / "a.tif", 32) is None


def test_the_middle_square_is_taken(tmp_path):
    image = Image.new("RGB", (96, 32))
    image.paste(RED, (32, 0, 64, 32))
    image.save(tmp_path / "a.png")
    assert folders.read_square(tmp_path / "a.png", 32)[0].unique().tolist() == [RED[0]]


def test_large_images_are_averaged(tmp_path):
    """Of single pixels, 64 of them would leave a deviation of 37."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    assert folders.read_square(tmp_path / "a.png", 32).float().std() < 15
    seen = imagenet.make_transform(False, 32)(torch.from_numpy(noise).permute(2, 0, 1))
    assert seen.float().std() < 15


def test_far_too_large_images_are_left_out(tmp_path, monkeypatch):
    save(tmp_path / "a.png", (100, 100))
    monkeypatch.setattr(imagenet, "MAX_PIXELS", 9_999)
    assert folders.read_square(tmp_path / "a.png", 32) is None


def test_a_run_within_the_folder_of_classes_is_refused(tmp_path):
    two_classes(tmp_path / "flat")
    save(tmp_path / "split" / "train" / "cat" / "a.png")
    with pytest.raises(runs.UserError, match="lies among the classes"):
        folders.check_out(tmp_path / "flat", tmp_path / "flat" / "runs" / "a")
    with pytest.raises(runs.UserError, match="lies among the classes"):
        folders.check_out(tmp_path / "split", tmp_path / "split" / "train" / "a")
    folders.check_out(tmp_path / "split", tmp_path / "split" / "runs")


def test_a_tenth_is_held_out(tmp_path):
    for name, count in (("many", 40), ("few", 9)):
        for index in range(count):
            save(tmp_path / name / f"{index}.png", (8, 8), (index, 0, 0))
    training, test = folders.load_folder(tmp_path, 32)
    assert training.names == ["few", "many"]
    assert training.labels.bincount().tolist() == [9, 36]
    assert test.labels.tolist() == [1] * 4
    again, _ = folders.load_folder(tmp_path, 32)
    assert torch.equal(training.pixels, again.pixels)
    values = [part.pixels[part.labels == 1][:, 0, 0, 0].tolist() for part in (training, test)]
    assert sorted(values[0] + values[1]) == list(range(40))
    assert training.labels.tolist() != sorted(training.labels.tolist())  # in random order

    for index in range(40, 200):
        save(tmp_path / "many" / f"{index}.png", (8, 8), (index, 0, 0))
    training, test = folders.load_folder(tmp_path, 32)
    more = [part.pixels[part.labels == 1][:, 0, 0, 0].tolist() for part in (training, test)]
    assert set(values[0]) < set(more[0]) and set(values[1]) < set(more[1])
    assert 10 < len(more[1]) < 30


def test_what_is_not_read_is_told(tmp_path, capsys):
    two_classes(tmp_path / "train")
    (tmp_path / "train" / "cat" / "deep").mkdir()
    (tmp_path / "train" / "cat" / "deep" / "a.avif").touch()
    (tmp_path / "train" / "dog" / "notes").touch()
    save(tmp_path / "train" / "a.png")
    save(tmp_path / "val" / "cat" / "a.png")
    save(tmp_path / "test" / "cat" / "a.png")
    (tmp_path / "test" / "cat" / "b.avif").touch()
    folders.load_folder(tmp_path, 32)
    told = "not read: 2 files .avif, 1 files without an ending, 1 files beside the class folders"
    found = capsys.readouterr().out.splitlines()[-1]
    parts = set(found.strip().removeprefix("not read: ").split(", "))
    assert parts == {*told.removeprefix("not read: ").split(", "), "val/"}


def test_a_test_of_some_of_the_classes(tmp_path):
    for name in ("cat", "cow", "dog"):
        save(tmp_path / "train" / name / "a.png")
    save(tmp_path / "test" / "dog" / "a.png")
    save(tmp_path / "test" / "cow" / "a.png")
    _, test = folders.load_folder(tmp_path, 32)
    assert test.labels.tolist() == [1, 2]


def test_workers_read_the_same(tmp_path, monkeypatch):
    two_classes(tmp_path, 40)
    for index in range(40):
        save(tmp_path / "dog" / f"{index}.png", (9, 9), (index, index, index))
    (tmp_path / "cat" / "7.png").write_text("no image")
    _, paths, labels = folders.find_images(tmp_path)
    pixels, found = folders.read_split(paths, labels, 32)
    monkeypatch.setattr(folders, "CHUNK", 10)  # more than four chunks are for workers
    again, again_found = folders.read_split(paths, labels, 32)
    assert len(pixels) == 79
    assert torch.equal(pixels, again) and torch.equal(found, again_found)


# --------------------------------------------------------------------------------------------------
# The whole chain


@pytest.fixture(scope="module")
def png_digits(digits_dir, tmp_path_factory):
    """The development digits as a folder of PNG files."""
    out = tmp_path_factory.mktemp("folder") / "digits"
    flags = ["--dataset", "double_colored_mnist", "--data-dir", str(digits_dir), "--out", str(out)]
    digit_folder.main(flags)
    return out


def in_order(pixels, labels):
    """Rows of label and pixels, sorted."""
    return torch.cat([labels[:, None].to(torch.uint8), pixels.flatten(1)], 1).unique(dim=0)


def test_a_folder_holds_what_the_variant_draws(png_digits, digits_dir):
    training, test = folders.load_folder(png_digits, 32)
    variant, other = mnist.load_variant("double_colored_mnist", digits_dir)
    images = variant.all_images(0)
    assert len(training) == len(variant) - variant.held_out and len(test) == variant.held_out
    cut = len(training)
    splits = [(training, images[:cut], variant.labels[:cut])]
    splits.append((test, images[cut:], variant.labels[cut:]))
    drawn = (other.all_images(0), other.decorrelated_images(0)[0])
    for name, own in zip(("correlated", "decorrelated"), drawn):
        found = folders.read_test(png_digits / name, mnist.NAMES, 32, "cpu")
        splits.append((found, own, other.labels))
    for split, own, labels in splits:
        assert torch.equal(in_order(split.pixels, split.labels), in_order(own, labels))


@pytest.mark.parametrize("size", [32, 64, 128])
def test_networks_of_all_sizes(size):
    names = ["cat", "dog", "cow"]
    z, y = torch.randn(4, 32), torch.tensor([0, 1, 2, 0])
    mask, foreground, background = train_cgn.MnistCGN(names=names, size=size)(z, y)
    assert mask.shape == (4, 1, size, size)
    assert foreground.shape == background.shape == (4, 3, size, size)
    for discriminator in train_cgn.DISCRIMINATORS.values():
        assert discriminator(8, len(names), size)(foreground, y).shape == (4, 1)
    assert train_cgn.Segmenter(size)(foreground).shape == mask.shape
    classifier = train_classifier.MnistClassifier(len(names), size)
    assert classifier(foreground).shape == (4, 3)
    frame = train_cgn.frame_pixels(foreground).shape[2]
    assert frame == (32**2 - 26**2) * (size // 32) ** 2


def test_chain(png_digits, tmp_path):
    own = ["--data-dir", png_digits, "--device", "cpu"]
    sized = ["--dataset", "images", *own, "--image-size", 64]
    training = ["--offline", "--max-steps", 3, "--segmenter-steps", 2, "--warmup", 1]
    training += ["--batch-size", 8, "--style-every", 2]
    run("train_cgn.py", *sized, *training, "--out", tmp_path / "cgn")
    for name in ("weights.pt", "sheet.png", "segmentation.png", "segmenter.json"):
        assert (tmp_path / "cgn" / name).is_file()
    cgn, args = train_cgn.load_generator(tmp_path / "cgn" / "weights.pt")
    assert cgn.mask_gain == args["mask_gain"] == 2  # of the preset

    weights = ["--weights", tmp_path / "cgn" / "weights.pt"]
    run("generate.py", *weights, "--n", 20, "--format", "png", "--out", tmp_path / "cf")
    chunk = runs.load_tensors(tmp_path / "cf" / "chunk_00000.pt")
    assert chunk["images"].shape == (20, 3, 64, 64)
    files = sorted((tmp_path / "cf" / "counterfactual").iterdir())
    assert torch.equal(folders.read_square(files[7], 64), chunk["images"][7])
    rows = (tmp_path / "cf" / "labels.csv").read_text().splitlines()
    assert rows[8].split(",")[:4] == [
        "counterfactual/0000007.png",
        *map(str, chunk["labels"][7].tolist()),
    ]

    classifier = [*sized, "--offline", "--train", "both", "--counterfactual", tmp_path / "cf"]
    classifier += ["--test", f"decorrelated={png_digits / 'decorrelated'}"]
    classifier += ["--epochs", 1, "--epoch-steps", 2, "--batch-size", 8]
    classifier += ["--arch", "mobilenet_v3_small", "--explain", 4]
    run("train_classifier.py", *classifier, "--out", tmp_path / "classifier")
    results = (tmp_path / "classifier" / "results.json").read_text()
    assert '"test"' in results and '"decorrelated"' in results
    sheet = Image.open(tmp_path / "classifier" / "seed_0" / "explain.png")
    assert 4 * 64 < sheet.height < 5 * 64

    small = [32 if flag == 64 else flag for flag in classifier]
    done = run("train_classifier.py", *small, "--out", tmp_path / "small", expect=2)
    assert "chunk_00000.pt: images of 64 x 64 pixels; give --image-size 64" in done.stderr


def test_a_classifier_explains_itself_and_is_of_its_classes(tmp_path):
    root = tmp_path / "images"
    two_classes(root, 20)
    flags = ["--dataset", "images", "--device", "cpu", "--explain", 9]
    training = ["--data-dir", root, "--epochs", 1, "--epoch-steps", 1, "--batch-size", 4]
    run("train_classifier.py", *flags, *training, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "seed_0" / "explain.png").is_file()
    (root / "cat").rename(root / "horse")
    test = ["--data-dir", root, "--evaluate", "--out", tmp_path / "tested"]
    weights = ["--weights", tmp_path / "run" / "seed_0" / "weights.pt"]
    done = run("train_classifier.py", *flags, *test, *weights, expect=2)
    assert "a classifier of the classes cat, dog; --data-dir has dog, horse" in done.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        ("train_classifier.py --train decorrelated", "only of the MNIST variants"),
        ("train_classifier.py --arch resnet1", "not a classifier of torchvision"),
        ("train_classifier.py --arch vit_b_16", "does not take images of 32 x 32 pixels"),
        ("train_classifier.py --arch resnet18 --batch-size 1", "in batches of 1"),
        ("train_classifier.py --arch googlenet", "or does not return logits alone"),
        ("train_classifier.py --test test=x", "--test test=...: the name is taken"),
        ("train_cgn.py --image-size 48", "argument --image-size: invalid choice: 48"),
        ("train_cgn.py --offline --batch-size 9999", "larger than the 537 training images"),
        ("train_cgn.py --offline --weights BUNDLED", "not those of the training images"),
        ("generate.py --weights BUNDLED", "was trained on colored_mnist"),
    ],
)
def test_bad_flags(flags, message, refused, tmp_path):
    root = tmp_path / "images"
    two_classes(root, 300)
    script, *flags = flags.replace("BUNDLED", str(BUNDLED)).split()
    own = [] if script == "generate.py" else ["--data-dir", root]
    refused(message, script, *own, "--dataset", "images", "--device", "cpu", *flags)


def test_a_last_batch_of_one_image_is_left_out(tmp_path):
    """ResNet-18's BatchNorm sees one value of each channel of an image of 32 x 32 pixels."""
    two_classes(tmp_path / "images", 20)
    flags = ["--dataset", "images", "--data-dir", tmp_path / "images", "--device", "cpu"]
    flags += ["--arch", "resnet18", "--batch-size", 5, "--epochs", 1, "--log-every", 1]
    run("train_classifier.py", *flags, "--out", tmp_path / "run")
    lines = (tmp_path / "run" / "seed_0" / "log.jsonl").read_text().splitlines()
    assert '"step": 7, "epoch": 1' in lines[-1]  # 36 images


def test_the_generator_of_other_classes_is_refused(png_digits, tmp_path):
    """A folder whose classes changed since the training, for --shapes real and for --resume."""
    root = tmp_path / "images"
    two_classes(root, 20)
    flags = ["--dataset", "images", "--data-dir", root, "--device", "cpu", "--offline"]
    flags += ["--batch-size", 4, "--max-steps", 1, "--segmenter-steps", 1]
    run("train_cgn.py", *flags, "--out", tmp_path / "cgn")
    save(root / "cow" / "a.png")
    done = run("train_cgn.py", *flags, "--out", tmp_path / "cgn", "--resume", expect=2)
    assert "the images in --data-dir have changed since" in done.stderr
    weights = ["--weights", tmp_path / "cgn" / "weights.pt", "--shapes", "real"]
    done = run("generate.py", *weights, "--data-dir", root, "--out", tmp_path / "cf", expect=2)
    assert "its classes are not the generator's" in done.stderr
