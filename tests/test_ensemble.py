"""ImageNet's ensemble: folders, images, metrics against numbers by hand, and the whole chain on a
miniature.
"""

import csv
import functools
import hashlib
import http.server
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import SOAK, check_kills, contents, load, run, run_ranks, same, start, torchrun
from PIL import Image

import train_classifier
from data import download, imagenet, runs

CLASSES = [0, 1, 400, 999]
CPU = torch.device("cpu")
NETWORK = (
    "--dataset imagenet --offline --arch resnet18 --image-size 32 --batch-size 4 --workers 0"
    " --device cpu --amp off"
).split()
TRAINING = [*NETWORK, "--lr", 0.01]
EVALUATE = ["--evaluate", "--weights"]


def write_image(path, color=(200, 30, 30), size=(40, 36)):
    """An image of one color. Returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """A folder with imagenet/ (4 classes, 3 images each to train, 7 in val), cue/ and in9/."""
    root = tmp_path_factory.mktemp("miniature")
    generator = torch.Generator().manual_seed(0)
    for label in CLASSES:
        wnid = imagenet.imagenet_metadata()["wnids"][label]
        for i in range(3):
            color = tuple(torch.randint(256, (3,), generator=generator).tolist())
            write_image(root / "imagenet" / "train" / wnid / f"{i}.JPEG", color)
            if i < 2 and (label, i) != (999, 1):
                write_image(root / "imagenet" / "val" / wnid / f"{i}.JPEG", color, (50, 40))
    for name in ("cat/cat1-dog2", "cat/cat3-cat1", "dog/dog10-truck2"):
        write_image(root / "cue" / f"{name}.png")
    for variant in ("original", "mixed_same", "mixed_rand"):
        for name in ("00_dog", "02_wheeled vehicle", "08_fish"):
            write_image(root / "in9" / variant / "val" / name / "a.JPEG", (20, 200, 90))
    return root


@pytest.fixture(scope="module")
def counterfactuals(small_cgn, tmp_path_factory):
    """A folder of nine counterfactuals."""
    out = tmp_path_factory.mktemp("counterfactuals") / "set"
    flags = (
        "--dataset imagenet --device cpu --n 9 --batch-size 3 --save counterfactual mask".split()
    )
    run("generate.py", *flags, "--weights", small_cgn / "weights.pt", "--out", out)
    return out


def parse_args(*flags):
    """Arguments of the ensemble."""
    argv = ["--dataset", "imagenet", "--out", "unused", *flags]
    return train_classifier.parse_args([str(flag) for flag in argv])


# --------------------------------------------------------------------------------------------------
# Folders


def test_folders_by_wnid(miniature, tmp_path):
    paths, labels = imagenet.wnid_images(miniature / "imagenet" / "train")
    assert len(paths) == 12
    assert labels.tolist() == [label for label in CLASSES for _ in range(3)]
    paths, _ = imagenet.validation_images(miniature / "imagenet")
    assert len(paths) == 7


def test_mistakes_in_folders_by_wnid(tmp_path):
    (tmp_path / "odd" / "n01440764").mkdir(parents=True)
    (tmp_path / "other" / "cats").mkdir(parents=True)
    for folder, words in {
        "odd": "n01440764: no images in this class",
        "other": "not the WNID",
        "nowhere": "no such folder",
        "odd/n01440764": "holds no folders",
    }.items():
        with pytest.raises(runs.UserError, match=words):
            imagenet.wnid_images(tmp_path / folder)


def test_a_flat_folder_needs_a_table(tmp_path):
    for name in "abc":
        write_image(tmp_path / "val" / f"{name}.JPEG")
    with pytest.raises(runs.UserError, match="meta.bin"):
        imagenet.validation_images(tmp_path)
    wnids = imagenet.imagenet_metadata()["wnids"]
    labels = [wnids[5], wnids[3], wnids[5]]
    torch.save(({}, labels), tmp_path / "meta.bin")
    assert imagenet.validation_images(tmp_path)[1].tolist() == [5, 3, 5]
    torch.save(({}, labels[:2]), tmp_path / "meta.bin")
    with pytest.raises(runs.UserError, match="meta.bin: does not tell the classes"):
        imagenet.validation_images(tmp_path)


def test_robustness_folders(miniature, tmp_path):
    paths, labels = imagenet.cue_conflict_images(miniature / "cue")
    names = list(imagenet.imagenet_metadata()["cue_conflict"]["categories"])
    # cat3-cat1 tells nothing.
    assert [path.stem for path in paths] == ["cat1-dog2", "dog10-truck2"]
    cat, dog, truck = (names.index(name) for name in ("cat", "dog", "truck"))
    assert labels.tolist() == [[cat, dog], [dog, truck]]
    write_image(tmp_path / "cue" / "cat" / "mouse1-cat2.png")
    with pytest.raises(runs.UserError, match="mouse1-cat2.png: not named"):
        imagenet.cue_conflict_images(tmp_path / "cue")

    found = imagenet.imagenet9_images(miniature / "in9")
    assert set(found) == {"original", "mixed_same", "mixed_rand"}
    assert found["original"][1].tolist() == [0, 2, 8]
    with pytest.raises(runs.UserError, match="no variant of ImageNet-9"):
        imagenet.imagenet9_images(miniature / "imagenet")


def test_counterfactual_folders(counterfactuals):
    # The same one twice counts once.
    patterns = [counterfactuals, counterfactuals.parent / "s*"]
    paths, labels = imagenet.counterfactual_images(patterns)
    assert len(paths) == 9
    assert all(path.is_file() for path in paths)
    with open(counterfactuals / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, label in zip(rows, labels.tolist()):
        assert [int(row[head]) for head in imagenet.HEADS] == label


def remove_row(text):
    """labels.csv without the row of image 0."""
    return "\n".join(line for line in text.splitlines() if "0000000" not in line)


def wrong_class(text):
    """labels.csv with a shape that does not exist."""
    return re.sub(r"(0000008\.jpg),\d+", r"\1,1000", text)


def remove_name(text):
    """labels.csv without the name of a column."""
    return text.replace("texture,", "", 1)


def no_rows(text):
    """labels.csv with the names of its columns alone."""
    return text.splitlines()[0] + "\n"


def repeat_row(text):
    """labels.csv with its last row twice."""
    return text + text.splitlines()[-1] + "\n"


@pytest.mark.parametrize(
    "change, words",
    [
        (remove_row, "0000000.jpg and 0 more: a file without its row"),
        (wrong_class, "0 to 999 exist"),
        (remove_name, "no readable labels.csv"),
        (no_rows, "labels.csv has no rows"),
        (repeat_row, "10 rows for 9 files"),
    ],
)
def test_mistakes_in_the_table_of_counterfactuals(counterfactuals, tmp_path, change, words):
    shutil.copytree(counterfactuals, tmp_path / "copy")
    table = tmp_path / "copy" / "labels.csv"
    table.write_text(change(table.read_text()))
    with pytest.raises(runs.UserError, match=words):
        imagenet.counterfactual_images([tmp_path / "copy"])


@pytest.mark.parametrize(
    "file, words",
    [
        ("counterfactual/0000004.jpg", "0000004.jpg and 0 more: a row without its file"),
        ("labels.csv", "no readable labels.csv"),
    ],
)
def test_missing_files_of_counterfactuals(counterfactuals, tmp_path, file, words):
    shutil.copytree(counterfactuals, tmp_path / "copy")
    (tmp_path / "copy" / file).unlink()
    with pytest.raises(runs.UserError, match=words):
        imagenet.counterfactual_images([tmp_path / "copy"])
    with pytest.raises(runs.UserError, match="no such folder"):
        imagenet.counterfactual_images([tmp_path / "no*"])


# --------------------------------------------------------------------------------------------------
# Images


def test_damaged_images_are_named_and_left_out(tmp_path, capsys, monkeypatch):
    paths = [write_image(tmp_path / f"{i}.jpg") for i in range(6)]
    paths[2].write_bytes(b"")
    paths[4].write_bytes(paths[0].read_bytes()[:300])
    images = imagenet.Images(paths, torch.arange(6), imagenet.make_transform(False, 32))
    found = list(imagenet.batches(images, range(6), 4, 0, CPU))
    assert [labels.tolist() for _, labels in found] == [[0, 1, 3], [5]]
    assert found[0][0].dtype == torch.uint8
    assert "2.jpg: damaged" in capsys.readouterr().err
    monkeypatch.setattr(imagenet, "MAX_DAMAGED", 1)
    with pytest.raises(runs.UserError, match="more than 1 damaged images"):
        list(imagenet.batches(images, range(6), 4, 0, CPU))


def gradient_image():
    """An image in which all pixels differ from their neighbors."""
    pixels = torch.arange(50 * 60 * 3).view(50, 60, 3).remainder(251).byte()
    return Image.fromarray(pixels.numpy())


def test_images_of_all_kinds_are_decoded(tmp_path, capsys):
    """JPEG in RGB and CMYK, PNG with 16 bits and with a palette, damaged and missing files."""
    kinds = {
        "a.jpg": gradient_image(),
        "b.jpg": Image.new("CMYK", (30, 40), (10, 50, 90, 0)),
        "c.png": Image.new("I;16", (40, 30), 0x8080),
        "d.png": Image.new("P", (40, 30), 3),
    }
    for name, image in kinds.items():
        image.save(tmp_path / name)
    (tmp_path / "e.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:300])
    paths = [tmp_path / name for name in (*kinds, "e.jpg", "f.jpg")]
    images = imagenet.Images(paths, torch.arange(6), imagenet.make_transform(True, 32), seed=3)
    ((x, y),) = imagenet.batches(images, range(6), 4, 0, CPU)
    assert capsys.readouterr().err.count("damaged") == 2
    assert y.tolist() == [0, 1, 2, 3]
    color = x[1].float().mean((1, 2))
    assert color.round().tolist() == [245, 205, 165]
    assert (x[2] == 128).all()
    (tmp_path / "f.jpg").touch()
    assert imagenet.read_image(tmp_path / "f.jpg") is None


def test_normalization_and_what_tests_see_of_an_image():
    image = torch.arange(224 * 224 * 3).remainder(256).byte().view(3, 224, 224)
    # ImageNet-9 comes as it is to be seen.
    assert torch.equal(imagenet.make_transform(False, 224, margin=False)(image), image)
    larger = torch.arange(256 * 256 * 3).remainder(251).byte().view(3, 256, 256)
    seen = imagenet.make_transform(False, 224)(larger)
    assert torch.equal(seen, larger[:, 16:-16, 16:-16])
    batch = torch.stack([image] * 5)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    found = imagenet.normalized(batch)
    assert torch.allclose(found, (batch / 255 - mean) / std, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_half_of_the_training_images_are_flipped():
    torch.manual_seed(0)
    image = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64)
    transform = imagenet.make_transform(True, 32)
    seen = torch.stack([transform(image)[0, 0] for _ in range(100)]).int()
    rises = seen[:, -1] - seen[:, 0]
    assert 35 < (rises > 0).sum() < 65
    assert rises.abs().min() < 20 and rises.abs().max() > 50  # crops of all sizes, in one size


def test_augmentation_depends_on_seed_epoch_and_index_alone(tmp_path):
    gradient_image().save(tmp_path / "a.png")

    def images(seed, epoch):
        transform = imagenet.make_transform(True, 32)
        paths = [tmp_path / "a.png"] * 3
        return imagenet.Images(paths, torch.arange(3), transform, seed, epoch)

    torch.manual_seed(7)
    first, label, damaged = images(1, 0)[1]
    torch.rand(3)
    assert label == 1 and damaged == []
    assert torch.equal(images(1, 0)[1][0], first)
    others = [
        images(1, 0)[2],
        images(1, 1)[1],
        images(2, 0)[1],
    ]
    for other, _, _ in others:
        assert not torch.equal(other, first)


def test_batches_follow_whole_permutations():
    order = train_classifier.batch_order(5, 3, 4, 0, 0)
    assert len(order) == 12
    assert all(order.count(index) >= 2 for index in range(5))
    assert order != train_classifier.batch_order(5, 3, 4, 0, 1)
    # Fewer steps are the first ones: a run that --max-steps cuts sees the same images.
    assert train_classifier.batch_order(5, 2, 4, 0, 0) == order[:8]


def test_epoch_batches_go_on_where_an_epoch_was_left(miniature):
    """Also with counterfactuals, of which there are twice as many in a batch."""
    real = imagenet.wnid_images(miniature / "imagenet" / "train")
    counterfactual = (real[0][:5], torch.arange(15).view(5, 3))
    flags = "--image-size 32 --batch-size 4 --cf-ratio 2 --workers 0".split()
    args = parse_args("--data-dir", miniature, "--counterfactual", "unused", *flags)

    def batches(epoch, first):
        found = train_classifier.epoch_batches(args, real, counterfactual, epoch, 3, first, CPU)
        return list(found)

    whole = batches(1, 0)
    assert len(whole) == 3
    assert same(batches(1, 1), whole[1:])
    assert batches(1, 3) == []
    assert not same(batches(2, 0), whole)
    labels = torch.cat([part[0][1] for part in whole])
    assert labels.sort().values.tolist() == real[1].tolist()
    for _, (pixels, labels) in whole:
        assert pixels.shape == (8, 3, 32, 32)
        assert labels.shape == (8, 3)


# --------------------------------------------------------------------------------------------------
# Metrics, of predictions that are made up


def made_up_logits(*rows):
    """Logits (N, 3, 1000) whose heads predict the given classes, then 0, 1, 2, ...: the first head
    is the surest.
    """
    logits = (-1e-3 * torch.arange(1000.0)).repeat(len(rows), 3, 1)
    for n, row in enumerate(rows):
        for head, prediction in enumerate(row):
            logits[n, head, prediction] = 10.0 - head
    return logits


def test_top_hits_by_hand():
    logits = made_up_logits((101, 102, 103), (104, 104, 105), (107, 107, 107))

    def hits(*labels, column):
        return train_classifier.top_hits(logits, torch.tensor(labels))[:, column].tolist()

    # Heads: shape, texture, background, mean (the surest one's prediction), shape and texture.
    assert hits(101, 105, 107, column=0) == [2, 1, 2, 2, 2]
    # Among the best five: shape none, 102, none; then 105; 0 is among everyone's.
    assert hits(102, 105, 0, column=1) == [1, 2, 2, 3, 2]
    # Each head has its own label.
    own = [[101, 102, 109], [109, 104, 105], [107, 109, 109]]
    assert hits(*own, column=0)[:3] == [2, 2, 1]


def test_predictions_can_be_restricted_to_the_classes_present():
    logits = made_up_logits((101, 101, 101))
    logits[..., 6] = 0.5
    label = torch.tensor([6])
    present = torch.tensor([6, 8, 9, 10, 11])
    assert train_classifier.top_hits(logits, label)[:, 0].tolist() == [0] * 5
    restricted = train_classifier.top_hits(logits, label, present=present)
    assert restricted[:, 0].tolist() == [1] * 5


def test_shape_bias_by_hand():
    categories = imagenet.imagenet_metadata()["cue_conflict"]["categories"]
    names = list(categories)
    cat, dog, truck, airplane = map(names.index, ("cat", "dog", "truck", "airplane"))
    logits = torch.zeros(4, 1, 1000)
    for n, name in enumerate(("cat", "dog", "truck", "boat")):
        logits[n, 0, categories[name]] = 20.0
    labels = torch.tensor([[cat, dog], [cat, dog], [dog, truck], [cat, dog]])
    # The bias is 1 / 3: the boat counts for neither.
    assert train_classifier.conflict_hits(logits, labels).tolist() == [[1, 2]]

    # The mean over classes, not the sum: one sure class of many is less than one of one.
    logits = torch.zeros(1, 1, 1000)
    logits[0, 0, categories["airplane"][0]] = 5.0
    logits[0, 0, categories["dog"][0]] = 5.0
    labels = torch.tensor([[airplane, dog]])
    assert train_classifier.conflict_hits(logits, labels).tolist() == [[1, 0]]


def first_class(group):
    """The first of ImageNet's classes in a class of ImageNet-9; -1: in none."""
    return imagenet.imagenet_metadata()["in9"]["imagenet_to_in9"].index(group)


def test_imagenet9_by_hand():
    logits = torch.zeros(3, 1, 1000)
    for n, group in enumerate((0, 8, -1)):
        logits[n, 0, first_class(group)] = 1.0
    hits = train_classifier.imagenet9_hits(logits, torch.tensor([0, 8, 0]))
    assert hits.tolist() == [[2]]


class Constant(torch.nn.Module):
    """A classifier that always predicts the same class. Keeps what it has seen."""

    def __init__(self, prediction):
        super().__init__()
        self.logits = F.one_hot(torch.tensor(prediction), 1000).float()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return self.logits.expand(len(x), 1000)


def test_background_gap_and_uneven_batches(miniature):
    """Always a dog: right on mixed_same, whose labels are made so, wrong on two of mixed_rand."""
    args = parse_args(*"--image-size 32 --batch-size 2 --workers 0".split(), *EVALUATE, "unused")
    constant = Constant(first_class(0))
    tests = {}
    for name, images in imagenet.imagenet9_images(miniature / "in9").items():
        tests[f"in9 {name}"] = "in9", images
    paths, _ = tests["in9 mixed_same"][1]
    tests["in9 mixed_same"] = "in9", (paths, torch.zeros(3, dtype=torch.int64))
    rows = train_classifier.evaluate(constant, ["baseline"], tests, args, CPU)
    rows = {row[:3]: row[3:] for row in rows}
    assert rows["in9 original", "baseline", "top-1"][1:] == (1, 3)
    gap, *_ = rows["in9", "baseline", "background gap"]
    assert gap == pytest.approx(100 - 100 / 3)

    val = imagenet.validation_images(miniature / "imagenet")
    hits, count = train_classifier.count_hits(
        constant, 1, "val", val, train_classifier.top_hits, args, CPU
    )
    assert count == 7
    assert hits[0][0] == 0
    # A rank without images adds zeros of the right shape.
    nothing = [], torch.zeros(0, dtype=torch.int64)
    hits, count = train_classifier.count_hits(
        constant, 1, "val", nothing, train_classifier.top_hits, args, CPU
    )
    assert (hits, count) == ([[0, 0]], 0)


def test_the_other_normalization_of_imagenet9(miniature):
    args = parse_args(*"--image-size 32 --batch-size 2 --workers 0".split(), *EVALUATE, "unused")
    constant = Constant(0)
    original = imagenet.imagenet9_images(miniature / "in9")["original"]
    for args.in9_normalization in ("imagenet", "in9"):
        tests = {"in9 original": ("in9", original)}
        train_classifier.evaluate(constant, ["baseline"], tests, args, CPU)
    own, _, other, _ = constant.seen  # three images in two batches
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    pixels = own[0] * std + mean
    mean, std = torch.tensor([[0.4717, 0.4499, 0.3837], [0.26, 0.2516, 0.2575]])[..., None, None]
    assert torch.allclose((pixels - mean) / std, other[0], atol=1e-5)


# --------------------------------------------------------------------------------------------------
# The network


def test_one_forward_has_the_gradients_of_two():
    torch.manual_seed(0)
    ensemble = train_classifier.Ensemble("resnet18").double().train()
    norms = [m for m in ensemble.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not any(norm.training for norm in norms)
    x = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    y = torch.tensor([1, 2])
    labels = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])

    def gradients(logits):
        ensemble.zero_grad()
        train_classifier.ensemble_loss(logits, y, labels).backward()
        return torch.cat([parameter.grad.flatten() for parameter in ensemble.parameters()])

    together = gradients(ensemble(x))
    logits = [ensemble(x[:2]), ensemble(x[2:])]
    separate = gradients(torch.cat(logits))
    assert (together - separate).abs().max() < 1e-12 * together.abs().max()

    logits = ensemble(x).detach()
    expected = F.cross_entropy(logits[:2].float().mean(1), y)
    for head in range(3):
        expected += F.cross_entropy(logits[2:, head].float(), labels[:, head])
    loss = train_classifier.ensemble_loss(logits, y, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


BACKBONES = ["resnext50_32x4d", "wide_resnet50_2", "convnext_tiny", "efficientnet_b0", "vit_b_16"]


@pytest.mark.parametrize("arch", BACKBONES)
def test_backbones(arch):
    with torch.device("meta"):
        ensemble = train_classifier.Ensemble(arch)
        assert ensemble(torch.randn(2, 3, 224, 224)).shape == (2, 3, 1000)


@pytest.mark.parametrize(
    "arch, size", [("mnasnet0_5", 32), ("regnet_y_400mf", 32), ("googlenet", 32)]
)
def test_unusual_classifiers_are_loaded_and_trained(arch, size, tmp_path):
    """Those that tell a version of their weights, or have auxiliary logits."""
    file = tmp_path / "weights.pth"
    torch.save(torchvision.models.get_model(arch, weights=None).state_dict(), file)
    args = parse_args("--data-dir", "x", "--arch", arch, "--pretrained", file)
    ensemble = train_classifier.load_ensemble(args).train()
    assert ensemble(torch.randn(2, 3, size, size)).shape == (2, 3, 1000)
    assert getattr(ensemble.backbone, "transform_input", True)

    content = {"ensemble": dict(ensemble.state_dict()), "arch": arch}
    torch.save(content, tmp_path / "ensemble.pt")
    args = parse_args("--data-dir", "x", "--arch", arch, "--weights", tmp_path / "ensemble.pt")
    again = train_classifier.load_ensemble(args)
    assert same(dict(again.state_dict()), content["ensemble"])
    assert getattr(again.backbone, "transform_input", True)


def test_a_transformer_of_another_size_is_refused():
    args = parse_args("--data-dir", "x", "--arch", "vit_b_16", "--image-size", 32)
    with torch.device("meta"):
        ensemble = train_classifier.Ensemble("vit_b_16")
    with pytest.raises(runs.UserError, match="takes no images of 32 pixels .*Expected 224"):
        train_classifier.check_image_size(args, ensemble.backbone)


def test_a_classifier_without_a_linear_layer_is_refused():
    with pytest.raises(runs.UserError, match="squeezenet1_0: does not end in a linear layer"):
        train_classifier.Ensemble("squeezenet1_0")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server on this machine. Returns its folder and its address."""
    folder = tmp_path / "server"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("intact", [True, False])
def test_pretrained_weights_are_fetched_and_checked(server, tmp_path, monkeypatch, intact):
    """Under a name like torchvision's, which ends in eight digits of the file's hash."""
    folder, address = server
    plain = torchvision.models.resnet18()
    torch.save(plain.state_dict(), folder / "unnamed")
    digits = hashlib.sha256((folder / "unnamed").read_bytes()).hexdigest()[:8]
    name = f"resnet18-{digits if intact else '01234567'}.pth"
    (folder / "unnamed").rename(folder / name)
    entry = types.SimpleNamespace(url=f"{address}/{name}")
    weights = types.SimpleNamespace(DEFAULT=entry)
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda arch: weights)
    monkeypatch.setattr(download, "FILES", {})

    args = parse_args("--data-dir", "x", "--arch", "resnet18", "--weights-dir", tmp_path / "files")
    if not intact:
        with pytest.raises(runs.UserError, match="resnet18-01234567.pth"):
            train_classifier.load_pretrained(args)
        return
    baseline = train_classifier.load_pretrained(args)
    assert torch.equal(baseline.fc.weight, plain.fc.weight)
    ensemble = train_classifier.load_ensemble(args)
    assert torch.equal(ensemble.backbone.conv1.weight, plain.conv1.weight)


def test_held_out_counterfactuals_stay_held_out(counterfactuals):
    """What is tested on may not have been trained on, unless --cf-test says so."""
    flags = ["--data-dir", "x", "--counterfactual", counterfactuals]
    trained = [*EVALUATE, "x"]
    for more, tested in (
        ([], 1),
        (["--cf-test", 5], 1),
        (trained, 1),
        ([*trained, "--cf-test", 5], 5),
        (["--evaluate", "--baseline"], 9),
    ):
        (paths, labels), rest = train_classifier.split_counterfactuals(parse_args(*flags, *more))
        assert len(paths) == len(labels) == tested
        assert rest is None if "--evaluate" in more else len(rest[0]) == 9 - tested


# --------------------------------------------------------------------------------------------------
# Training


def test_published_settings_are_the_defaults():
    args = parse_args("--data-dir", "x")
    assert (args.epochs, args.batch_size, args.lr) == (45, 256, 0.001)
    assert (args.lr_step, args.weight_decay, args.cf_ratio) == (15, 1e-4, 1.0)


def training_folders(miniature, counterfactuals):
    """Flags of the two folders to train on."""
    return ["--data-dir", miniature / "imagenet", "--counterfactual", counterfactuals]


@pytest.fixture(scope="module")
def folders(miniature, counterfactuals):
    """Flags of all folders, to train on and to test with."""
    flags = [*training_folders(miniature, counterfactuals), "--cue-conflict", miniature / "cue"]
    flags += ["--imagenet9", miniature / "in9"]
    return [*flags, "--ood", f"subset={miniature / 'imagenet' / 'val'}"]


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """The folder of a run of two epochs of three steps, and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    flags = [*TRAINING, *folders, *"--epochs 2 --log-every 2 --baseline --explain 4".split()]
    done = run("train_classifier.py", *flags, "--out", out)
    return out, done.stdout


def check_same(whole, found, names=None):
    """The folders of two runs hold the same, in these files or in all."""
    whole = contents(whole)
    found = contents(found)
    if names is None:
        assert whole.keys() == found.keys()
    for name in names or whole:
        assert same(whole[name], found[name]), name


def results(out):
    """The rows of a run's results."""
    return json.loads((out / "results.json").read_text())


def without_baseline(rows):
    """Those of the ensemble."""
    return [row for row in rows if row["head"] != "baseline"]


def cells(rows, column):
    """(test, head, measure) -> a column."""
    return {(row["test"], row["head"], row["measure"]): row[column] for row in rows}


def log_lines(out):
    """The lines of a run's log."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def epoch_lines(out):
    """Those that end an epoch."""
    return [line for line in log_lines(out) if "epoch" in line]


def factor_images(path, labels):
    """Images whose red, green and blue tell the classes of shape, texture and background."""
    path.mkdir()
    files = []
    for index, row in enumerate(labels):
        files.append(path / f"{index}.png")
        Image.new("RGB", (32, 32), tuple(20 * label for label in row)).save(files[-1])
    return files, torch.tensor(labels)


def test_which_factor_a_network_follows(tmp_path):
    """Of networks that read one factor, of one that reads none, and of heads that differ."""
    labels = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 9, 1], [2, 3, 4]]  # one has two of one class
    test = factor_images(tmp_path / "images", labels)
    args = parse_args(*NETWORK[2:], "--data-dir", tmp_path)
    tests = {"counterfactual": ("counterfactual", test)}

    def reader(*channels, offset=0):
        def read(x):
            std = torch.tensor(imagenet.STD)
            values = (x.mean((2, 3)) * std + torch.tensor(imagenet.MEAN)) * 255 / 20
            classes = values[:, list(channels)].round().long() + offset
            logits = 10.0 * F.one_hot(classes, 1000) - 0.01 * torch.arange(1000)
            return logits[:, 0] if len(channels) == 1 else logits

        network = nn.Module()
        network.forward = read
        return network

    def shares(network, names):
        rows = train_classifier.evaluate(network, names, tests, args, CPU)
        train_classifier.write_table(tmp_path, rows)
        return cells(results(tmp_path), "hits"), cells(results(tmp_path), "images")

    kinds = [f"follows {factor}" for factor in train_classifier.FACTORS]
    for channel in range(3):
        hits, images = shares(reader(channel), ["baseline"])
        found = [hits["counterfactual", "baseline", kind] for kind in kinds]
        assert found == [4 * (factor == channel) for factor in (0, 1, 2, 3)]
        assert set(images.values()) == {4}
    hits, _ = shares(reader(0, offset=500), ["baseline"])
    assert hits["counterfactual", "baseline", "follows none"] == 4
    # The best five are 500 + the shape, then 0 to 3.
    assert hits["counterfactual", "baseline", "shape in top 5"] == 3
    assert hits["counterfactual", "baseline", "none in top 5"] == 1
    hits, images = shares(reader(1, 1, 2), train_classifier.PREDICTIONS)
    assert hits["counterfactual", "shape", "follows texture"] == 4
    assert hits["counterfactual", "background", "follows background"] == 4
    assert hits["counterfactual", "shape and texture", "follows texture"] == 4
    assert images["counterfactual", "texture", "top-1"] == 5
    assert hits["counterfactual", "shape", "top-1"] == 1


def test_a_pretrained_network_alone(miniature, counterfactuals, tmp_path):
    """With --classes it predicts no others, and sees images of these alone."""
    flags = ["train_classifier.py", *NETWORK, "--evaluate", "--baseline"]
    run(*flags, "--counterfactual", counterfactuals, "--out", tmp_path / "run")
    rows = results(tmp_path / "run")
    assert {row["head"] for row in rows} == {"baseline"}
    assert Image.open(tmp_path / "run" / "factors.png").width == 640

    names = tmp_path / "names.txt"
    names.write_text("goldfish\n999\n")
    flags += ["--data-dir", miniature / "imagenet", "--classes", names, "n01440764"]
    done = run(*flags, "--out", tmp_path / "three")
    assert "5 of 7 images are of --classes" in done.stdout
    hits = cells(results(tmp_path / "three"), "hits")
    assert hits["val", "baseline", "top-5"] == 5  # three classes are among the best five
    done = run(*flags, "--classes", 5, "--out", tmp_path / "none", expect=2)
    assert "val has no image of these 1 classes" in done.stderr


def test_labels_are_those_of_shape_texture_and_background(tmp_path):
    """Whatever the order of the columns."""
    write_image(tmp_path / "counterfactual" / "a.png")
    table = "background,file,texture,shape\n3,counterfactual/a.png,2,1\n"
    (tmp_path / "labels.csv").write_text(table)
    assert imagenet.counterfactual_images([tmp_path])[1].tolist() == [[1, 2, 3]]


def test_counterfactuals_are_of_classes_with_all_three_labels():
    labels = torch.tensor([[1, 2, 1], [1, 3, 1], [3, 3, 3]])
    paths, kept = imagenet.images_of_classes(list("abc"), labels, [1, 2])
    assert paths == ["a"] and kept.tolist() == [[1, 2, 1]]
    assert imagenet.images_of_classes(list("abc"), labels[:, 1], [3])[0] == ["b", "c"]


def test_lists_of_classes(tmp_path):
    metadata = imagenet.imagenet_metadata()
    assert [len(imagenet.class_indices([name])) for name in metadata["class_lists"]] == [10, 200]
    found = imagenet.class_indices(["imagenette", "tench", "n01440764", "999"])
    assert found == [0, 217, 482, 491, 497, 566, 569, 571, 574, 701, 999]
    with pytest.raises(runs.UserError, match="class 'no such': no class of that name"):
        imagenet.class_indices(["imagenette", "no such"])
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(runs.UserError, match="empty: holds no class"):
        imagenet.class_indices([tmp_path / "empty"])
    logits = torch.arange(1000.0).expand(2, 3, -1)
    kept = train_classifier.only_classes(logits, [3, 7])
    assert kept.argmax(2).unique().tolist() == [7] and kept.isfinite().sum() == 2 * 3 * 2


def test_the_whole_chain_tests_everything(whole):
    out, stdout = whole
    assert "8 counterfactuals for 12 in each epoch" in stdout
    assert "subset: 4 of 1000 classes; predictions are restricted to them" in stdout
    assert Image.open(out / "explain.png").height > 3 * 32
    rows = results(out)
    counts = cells(rows, "images")
    assert counts["val", "mean", "top-5"] == 7
    assert counts["counterfactual", "texture", "top-1"] == 1  # a tenth
    assert counts["cue-conflict", "shape", "right shape"] == 2
    assert counts["in9 mixed_rand", "mean", "top-1"] == 3
    assert counts["val", "baseline", "top-1"] == 7
    assert ("in9", "shape and texture", "background gap") in counts
    assert (out / "results.md").read_text().count("\n|") == len(rows) + 1


def test_a_checkpoint_and_a_log_hold_what_they_should(whole):
    out, _ = whole
    checkpoint = load(out / "checkpoint.pt")
    parts = {"ensemble", "args", "step", "arch", "epoch", "best", "sums"}
    assert checkpoint.keys() == parts | {"optimizers", "window"}
    assert load(out / "weights.pt").keys() == parts
    assert checkpoint["step"] == 6
    assert checkpoint["epoch"] == 2
    assert checkpoint["arch"] == "resnet18"

    lines = log_lines(out)
    assert [(line["step"], line.get("epoch")) for line in lines] == [
        *((2, None), (3, 1)),
        *((4, None), (6, None), (6, 2)),
    ]
    first, _, _, _, last = lines
    assert first.keys() == {"step", "loss", "lr"}
    percent = cells(results(out), "percent")
    assert last["val mean top-1"] == percent["val", "mean", "top-1"]
    assert last["epoch_loss"] > 0


def test_a_finished_run_resumes_to_the_same_results(whole, folders, tmp_path):
    out, _ = whole
    shutil.copytree(out, tmp_path / "before")
    flags = [*TRAINING, *folders, *"--epochs 2 --log-every 2 --baseline --explain 4".split()]
    run("train_classifier.py", *flags, "--resume", "--out", out)
    check_same(tmp_path / "before", out)


@pytest.mark.parametrize("cut", ["--max-steps 2", "--epochs 1", "--max-steps 4"])
def test_a_run_that_was_cut_ends_like_a_whole_one(whole, folders, tmp_path, cut):
    """Cut within the first epoch of three steps, after it, or within the second one."""
    out = tmp_path / "run"
    flags = ["train_classifier.py", *TRAINING, *folders, "--log-every", 2, "--out", out]
    run(*flags, *cut.split())
    checkpoint = load(out / "checkpoint.pt")
    steps = {"--max-steps 2": 2, "--epochs 1": 3, "--max-steps 4": 4}
    assert checkpoint["step"] == steps[cut]
    assert checkpoint["epoch"] == checkpoint["step"] // 3
    run(*flags, "--epochs", 2, "--resume")

    check_same(whole[0], out, ["checkpoint.pt", "weights.pt", "weights_best.pt"])
    assert results(out) == without_baseline(results(whole[0]))
    # A run that ends writes what its last steps lost; the epochs' lines are the same.
    assert epoch_lines(out) == epoch_lines(whole[0])

    done = run(*flags, "--lr", 0.1, "--resume", expect=2)
    assert "made with lr = 0.01, not 0.1" in done.stderr


def test_an_epoch_that_was_cut_is_not_the_best(miniature, tmp_path):
    """With a learning rate of 0, the first whole epoch is, and none is better."""
    flags = ["train_classifier.py", *NETWORK, "--lr", 0, "--data-dir", miniature / "imagenet"]
    run(*flags, "--epochs", 1, "--out", tmp_path / "whole")
    run(*flags, "--epochs", 1, "--max-steps", 2, "--out", tmp_path / "cut")
    run(*flags, "--epochs", 1, "--max-steps", 1, "--resume", "--out", tmp_path / "cut")
    assert load(tmp_path / "cut" / "checkpoint.pt")["step"] == 2  # too late to stop after one
    run(*flags, "--epochs", 1, "--resume", "--out", tmp_path / "cut")
    check_same(tmp_path / "whole", tmp_path / "cut", ["weights_best.pt", "checkpoint.pt"])
    assert load(tmp_path / "cut" / "weights_best.pt")["step"] == 3
    # A kill between the two files loses nothing if the checkpoint is the later one.
    best = (tmp_path / "whole" / "weights_best.pt").stat()
    checkpoint = (tmp_path / "whole" / "checkpoint.pt").stat()
    assert best.st_mtime_ns <= checkpoint.st_mtime_ns


def test_two_ranks_train_and_test_like_one(miniature, folders, tmp_path):
    """Even where the two ranks are interrupted within the epoch, and images are damaged."""
    shutil.copytree(miniature / "imagenet", tmp_path / "imagenet")
    for split in ("train", "val"):
        damaged = min((tmp_path / "imagenet" / split).rglob("*.JPEG"))
        damaged.write_bytes(damaged.read_bytes()[:100])
    folders = [tmp_path / "imagenet" if x == miniature / "imagenet" else x for x in folders]
    flags = ["train_classifier.py", *TRAINING, *folders, "--epochs", 1, "--log-every", 1]
    run(*flags, "--out", tmp_path / "one")
    torchrun(2, *flags, "--max-steps", 2, "--out", tmp_path / "two")
    run_ranks(2, *flags, "--resume", "--out", tmp_path / "two")

    # Trained alike, up to rounding errors, so that a prediction may differ; tested the same.
    one = results(tmp_path / "one")
    two = results(tmp_path / "two")
    assert cells(one, "images") == cells(two, "images")
    evaluate = ["train_classifier.py", *NETWORK, *folders, *EVALUATE, tmp_path / "one/weights.pt"]
    run_ranks(2, *evaluate, "--out", tmp_path / "tested")
    tested = cells(results(tmp_path / "tested"), "hits")
    hits = cells(one, "hits")  # of counterfactuals in training: those that were held out
    assert len(tested) > 20
    for key, number in tested.items():
        assert key[0] == "counterfactual" or number == hits[key], key
    one = log_lines(tmp_path / "one")
    two = log_lines(tmp_path / "two")
    assert len(one) == len(two) == 3 + 1
    for name, line, other in zip(("loss", "loss", "loss", "epoch_loss"), one, two):
        assert other[name] == pytest.approx(line[name], rel=1e-4)

    a = load(tmp_path / "one" / "weights.pt")["ensemble"]
    b = load(tmp_path / "two" / "weights.pt")["ensemble"]
    deviations = {}
    for name in a:
        if "weight" in name:
            deviations[name] = ((a[name] - b[name]).abs().max() / a[name].abs().max()).item()
    # A rounding error can open a ReLU: the heads deviate by up to 1.4e-4 then, the layers before
    # it by 2e-3. Twice the rate makes 0.8 in the heads and 0.2 in the first layer.
    assert all(deviations[f"heads.{index}.weight"] <= 5e-4 for index in range(3))
    ordered = sorted(deviations.values())
    assert ordered[len(ordered) * 3 // 4] <= 5e-4
    assert ordered[-1] <= 4e-3


def test_saved_weights_are_evaluated_to_the_same_results(whole, folders, tmp_path):
    evaluate = [*NETWORK, *folders, *EVALUATE, whole[0] / "weights.pt"]
    done = run("train_classifier.py", *evaluate, "--out", tmp_path / "again")
    assert "| val | mean | top-1 |" in done.stdout
    again = [row for row in results(tmp_path / "again") if row["test"] != "counterfactual"]
    trained = [row for row in results(whole[0]) if row["test"] != "counterfactual"]
    assert again == without_baseline(trained)

    flags = [*evaluate, "--arch", "resnet34", "--out", tmp_path / "x"]
    done = run("train_classifier.py", *flags, expect=2)
    assert "not an ensemble on resnet34" in done.stderr


def test_sigterm_within_an_epoch_and_resume_give_the_same_bits(
    miniature, counterfactuals, tmp_path
):
    """With a network that has dropout and stochastic depth."""
    flags = [*TRAINING, *training_folders(miniature, counterfactuals)]
    flags += "--arch efficientnet_b0 --epochs 3 --lr-step 2 --log-every 1".split()
    run("train_classifier.py", *flags, "--out", tmp_path / "whole")

    flags += ["--workers", 1, "--resume", "--out", tmp_path / "cut"]
    output = tmp_path / "stdout", tmp_path / "stderr"
    process = start("train_classifier.py", *flags, output=output)
    # One step of three in the second epoch.
    while not (output[0].exists() and "\n4/9 " in output[0].read_text()):
        assert process.is_alive()
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in [*map(int, workers), process.pid]:  # as a scheduler does
        os.kill(pid, signal.SIGTERM)
    process.join(120)
    assert process.exitcode == 128 + signal.SIGTERM, output[1].read_text()
    assert "resume with the same command and --resume" in output[0].read_text()
    cut = load(tmp_path / "cut" / "checkpoint.pt")
    assert cut["epoch"] == 1
    assert 4 <= cut["step"] <= 6

    run("train_classifier.py", *flags)
    check_same(tmp_path / "whole", tmp_path / "cut")
    lines = log_lines(tmp_path / "cut")
    assert len(lines) == 9 + 3
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == pytest.approx([0.01] * 6 + [0.001] * 3)


@SOAK
def test_killed_ensembles_end_the_same(miniature, counterfactuals, tmp_path):
    flags = [*TRAINING, *training_folders(miniature, counterfactuals)]
    flags += "--arch efficientnet_b0 --epochs 20 --log-every 1".split()
    check_kills("train_classifier.py", flags, tmp_path, 20)


class SummaryWriter:
    """In place of TensorBoard's: keeps what it is given."""

    seen = []

    def __init__(self, folder, purge_step):
        self.seen.append((folder, purge_step))

    def add_scalar(self, *scalar):
        self.seen.append(scalar)

    def flush(self):
        pass


def test_metrics_reach_tensorboard_if_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(SummaryWriter, "seen", [])
    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorboard")
    runs.Log(tmp_path / "log.jsonl", 4).write(5, loss=0.5)
    assert SummaryWriter.seen == [(tmp_path, 5), ("loss", 0.5, 5)]
    assert log_lines(tmp_path) == [{"step": 5, "loss": 0.5}]


def test_mistakes(miniature, tmp_path, refused):
    data = ["--data-dir", miniature / "imagenet"]
    for flags, words in (
        ([*data, "--arch", "resnet19"], "not a classifier of torchvision"),
        (["--data-dir", tmp_path / "none"], "no such folder"),
        ([], "training needs --data-dir"),
        (["--imagenet9", miniature / "in9", "--evaluate"], "needs --weights"),
        ([*data, "--evaluate", "--baseline", "--explain", 3], "give its --weights"),
        ([*EVALUATE, "x"], "nothing to evaluate"),
        ([*EVALUATE, "x", "--lr", 0.1], "--lr: has no meaning with --evaluate"),
        ([*data, "--cf-ratio", 2], "--cf-ratio: needs --counterfactual"),
        ([*data, "--seeds", 1, 2], "unrecognized arguments: --seeds"),
        ([*data, "--batch-size", 16], "larger than the 12"),
        ([*data, "--ood", "name"], "should be NAME=PATH"),
        ([*data, "--ood", "val=x"], "--ood val=...: the name is taken"),
        ([*data, "--ood", "in9 original=x"], "--ood in9 original=...: the name is taken"),
        ([*data, "--ood", "A=x", "B=x", "A=y"], "--ood A=...: the name is taken"),
        ([*data, "--counterfactual", tmp_path / "none"], "none: no such folder"),
        (["--evaluate", "--baseline", "--arch", "deeplabv3_resnet50"], "not a classifier"),
    ):
        refused(words, "train_classifier.py", *NETWORK, *flags)
