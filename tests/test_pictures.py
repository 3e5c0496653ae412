"""Heat maps of networks whose maps are known, and the sheets that explain classifiers."""

import json

import pytest
import torch
from conftest import run
from PIL import Image, ImageColor
from torch.testing import assert_close

from data import mnist, pictures
from train_cgn import MnistCGN
from train_classifier import Ensemble, MnistClassifier


class Colors(torch.nn.Module):
    """Three heads of two classes: class 1 of head h has the mean of color h as its score."""

    def __init__(self):
        super().__init__()
        self.same = torch.nn.Conv2d(3, 3, 1, bias=False)
        torch.nn.init.dirac_(self.same.weight)
        self.pool = torch.nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        score = self.pool(self.same(x)).flatten(1)
        return torch.stack([-score, score], 2)  # (N, 3, 2)


def scaled(x):
    """Each map of (N, C, H, W) with a maximum of 1."""
    return x / x.amax((2, 3), keepdim=True)


def test_heat_maps_of_a_network_whose_map_is_known():
    """The map of each head is its color, scaled to a maximum of 1."""
    x = torch.rand(2, 3, 8, 8) + 0.1
    maps, predictions = pictures.heat_maps(Colors(), x)
    assert (predictions == 1).all()
    assert_close(maps, scaled(x), rtol=0, atol=1e-6)


def test_heat_maps_of_scores_that_calling_the_network_does_not_give():
    """One head without a dimension of its own: the sum of the colors."""

    def scores(network, x):
        return network(x).sum(1)

    x = torch.rand(2, 3, 8, 8) + 0.1
    maps, predictions = pictures.heat_maps(Colors(), x, scores)
    assert predictions.tolist() == [[1], [1]]
    assert_close(maps, scaled(x.sum(1, keepdim=True)), rtol=0, atol=1e-6)


def test_titles_have_the_letters_of_the_font():
    assert pictures.printable(["cat", "\u00fcb\u00e9r", "\u65e5\u672c"]) == ["cat", "uber", "2"]


def test_a_channel_counts_by_its_mean_gradient():
    activation = torch.rand(2, 3, 4, 4, requires_grad=True)
    slope = torch.randn(2, 3, 4, 4)
    heat = pictures.grad_cam((slope * activation).sum(), [activation])
    weighted = slope.mean((2, 3), keepdim=True) * activation.detach()
    assert_close(heat, weighted.sum(1, keepdim=True).relu())


def test_bars_are_as_long_as_their_shares():
    shares = (50.0, 25.0, 20.0, 5.0)
    line = pictures.factor_chart({"a network": shares})[:, 44].T
    for color, share in zip(pictures.FACTOR_COLORS.values(), shares, strict=True):
        found = (line == torch.tensor(ImageColor.getrgb(color))).all(1).sum()
        assert found == pytest.approx(4.4 * share, abs=1)


def test_heat_is_shown_from_blue_to_red():
    shown = pictures.overlay(torch.zeros(1, 3, 1, 3), torch.tensor([[[0.25, 0.5, 0.75]]]))
    assert shown[0, :, 0].argmax(0).tolist() == [2, 1, 0]
    assert shown.max() == 0.5


def test_intersection_over_union_by_hand():
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :2] = True
    hot = torch.zeros(2, 8, 8)
    hot[0, 1:4] = 0.6
    hot[1, 0, 0] = 0.4
    assert pictures.intersection_over_union(hot, masks).tolist() == [8 / 32, 0]


@pytest.mark.parametrize("arch, size", [("resnet18", 64), ("convnext_tiny", 64), ("vit_b_16", 224)])
def test_heat_maps_of_backbones(arch, size):
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size)
    maps, predictions = pictures.heat_maps(Ensemble(arch), x)
    assert maps.shape == (2, 3, size, size)
    assert predictions.shape == (2, 3)
    assert maps.min() >= 0
    assert maps.max() == 1
    assert maps[0, 0].std() > 0
    shape, texture, background = maps[0]
    assert not torch.equal(shape, texture)
    assert not torch.equal(shape, background)
    assert not torch.equal(texture, background)


def test_scores_of_the_digit_classifier_are_its_logits():
    torch.manual_seed(0)
    classifier = MnistClassifier().eval()
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        logits = pictures.digit_scores(classifier, x)
        assert_close(logits.log_softmax(1), classifier(x))


def test_explained_digits_are_measured_one_by_one(tmp_path):
    """Over more images than are in one part, and on a sheet of the first ones."""
    torch.manual_seed(0)
    classifier = MnistClassifier().eval()
    images = torch.randint(256, (501, 3, 32, 32), dtype=torch.uint8)
    digits = torch.randint(256, (501, 1, 32, 32), dtype=torch.uint8)
    digits[:, :, :, 16:] = 0
    digits[0, 0, 0, 0] = 255
    labels = torch.zeros(501, dtype=torch.int64)
    found = pictures.explain_digits(classifier, images, digits, labels, 2, tmp_path / "a.png")

    masks = digits[:, 0] > 25.5
    overlaps = []
    for image, mask in zip(images, masks):
        x = mnist.to_float(image[None])
        maps, _ = pictures.heat_maps(classifier, x, pictures.digit_scores)
        hot = maps[0, 0] > 0.5
        overlaps.append((hot & mask).sum() / (hot | mask).sum())
    expected = 100 * torch.stack(overlaps).mean().item()
    assert found["heat map IoU"] == pytest.approx(expected, abs=0.1)
    assert found["whole image IoU"] == pytest.approx(100 * masks.float().mean().item())
    assert 2 * 96 < Image.open(tmp_path / "a.png").height < 3 * 96


def read_metrics(out):
    """The metrics of a run's first classifier."""
    content = json.loads((out / "results.json").read_text())
    return content["seeds"]["0"]


def test_the_digit_classifier_explains_itself(digits_dir, tmp_path):
    flags = f"--dataset colored_mnist --data-dir {digits_dir} --device cpu --explain 5".split()
    training = "--epochs 1 --epoch-steps 3".split()
    run("train_classifier.py", *flags, *training, "--out", tmp_path / "run")
    metrics = read_metrics(tmp_path / "run")
    assert 0 <= metrics["heat map IoU"] <= 100
    assert 5 < metrics["whole image IoU"] < 40

    weights = tmp_path / "run" / "seed_0" / "weights.pt"
    out = tmp_path / "tested"
    done = run("train_classifier.py", *flags, "--evaluate", "--weights", weights, "--out", out)
    again = read_metrics(out)
    assert all(again[name] == metrics[name] for name in again)
    assert {"heat map IoU", "decorrelated", "correlated", "biased"} <= again.keys()
    assert "heat map IoU" in done.stdout
    assert Image.open(out / "seed_0" / "explain.png").height > 5 * 32


def test_few_images_of_a_class_are_shown_again(monkeypatch):
    """A row of the segmenter's sheet shows its own class alone."""
    monkeypatch.setattr(pictures, "tile_sheet", lambda images, *rest: images)
    cgn = MnistCGN(names=["cat", "dog"]).eval()
    images = torch.tensor([200, 10, 20, 30], dtype=torch.uint8)[:, None, None, None]
    images = images.expand(4, 3, 32, 32)
    labels = torch.tensor([0, 1, 1, 1])
    columns = pictures.segmentation_sheet(cgn, images, images[:, :1], labels)
    shown = (255 * columns[:, ::3, 0, 0, 0]).round().tolist()
    assert shown == [[200, 200, 200, 200], [10, 20, 30, 10]]
