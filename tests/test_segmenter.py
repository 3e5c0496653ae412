"""The segmenter, and counterfactuals of the shapes that it finds in real images."""

import json

import pytest
import torch
from PIL import Image

import generate
import train_cgn
from conftest import contents, load, run, same
from data import mnist, pictures, runs


BUNDLED = runs.ROOT / "data" / "pretrained" / "colored_mnist.pt"


@pytest.fixture(scope="module")
def segmented(tiny, tmp_path_factory):
    """The folder of a run that trained a segmenter for the bundled generator."""
    out = tmp_path_factory.mktemp("segmented") / "run"
    flags = ["--dataset", "colored_mnist", *tiny, "--weights", BUNDLED, "--max-steps", 0]
    run("train_cgn.py", *flags, "--segmenter-steps", 40, "--log-every", 20, "--out", out)
    return out


@pytest.fixture
def digit_masks(monkeypatch):
    """A segmenter without fault on colored MNIST: what is not black is the digit."""

    def find(segmenter, images):
        return 255 * (images.amax(1, keepdim=True) > 20).to(torch.uint8)

    monkeypatch.setattr(train_cgn, "find_masks", find)


# --------------------------------------------------------------------------------------------------
# Training


def test_pairs_are_the_generators_images_and_their_masks():
    cgn, _ = train_cgn.load_generator(BUNDLED)
    pairs = train_cgn.segmenter_pairs(cgn, 16, runs.seeded_generator(1, 0))
    again = train_cgn.segmenter_pairs(cgn, 16, runs.seeded_generator(1, 0))
    other = train_cgn.segmenter_pairs(cgn, 16, runs.seeded_generator(2, 0))
    assert same(pairs, again) and not torch.equal(pairs[0], other[0])
    x, mask = pairs
    assert x.shape == (16, 3, 32, 32) and mask.shape == (16, 1, 32, 32)
    assert x.min() >= -1 and x.max() <= 1 and 0 < mask.min() and mask.max() < 1
    # The background is black and the digit is not: inside the mask it is brighter.
    bright = x.amax(1, keepdim=True)
    assert bright[mask > 0.9].mean() > bright[mask < 0.1].mean() + 0.5


def test_it_learns_to_find_masks(segmented):
    content = load(segmented / "weights.pt")
    assert content.keys() == {"generator", "average", "segmenter", "args", "step"}
    assert same(content["average"], load_average(BUNDLED)), "given weights stay as they are"
    measured = json.loads((segmented / "segmenter.json").read_text())
    assert 0.6 < measured["generated IoU"] < 1
    assert 0.6 < measured["digit IoU"] < 1
    lines = (segmented / "segmenter" / "log.jsonl").read_text().splitlines()
    losses = {json.loads(line)["step"]: json.loads(line)["segmenter"] for line in lines}
    assert losses.keys() == {20, 40} and losses[40] < 0.9 * losses[20]
    with Image.open(segmented / "segmentation.png") as sheet:
        assert sheet.size[0] > 12 * 96 and sheet.size[1] > 10 * 96


def load_average(path):
    """A file's moving average in single precision."""
    return {
        key: value.float() if value.is_floating_point() else value
        for key, value in load(path)["average"].items()
    }


def test_the_bundled_segmenter_finds_digits(digits_dir):
    data, _ = mnist.load_variant("colored_mnist", digits_dir)
    masks = train_cgn.find_masks(train_cgn.load_segmenter(BUNDLED), data.all_images(0)[:100])
    truth = data.digits[:100] > 127
    assert pictures.intersection_over_union(masks / 255, truth).mean() > 0.9
    assert generate.is_object(masks).all()


def test_agreement_of_masks():
    truth = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    truth[:, :, :2] = True
    found = torch.zeros(3, 1, 4, 4)
    found[0, :, :2] = 1
    found[1, :, 1:3] = 1
    iou = pictures.intersection_over_union(found, truth)
    assert torch.allclose(iou, torch.tensor([1, 1 / 3, 0]))


def test_a_longer_training_trains_its_segmenter_anew(tiny, tmp_path):
    flags = ["--dataset", "colored_mnist", *tiny, "--segmenter-steps", 1]
    run("train_cgn.py", *flags, "--max-steps", 2, "--out", tmp_path / "run")
    run("train_cgn.py", *flags, "--max-steps", 4, "--resume", "--out", tmp_path / "run")
    run("train_cgn.py", *flags, "--max-steps", 4, "--out", tmp_path / "whole")
    names = ("weights.pt", "segmentation.png", "segmenter/log.jsonl")
    longer = contents(tmp_path / "run")
    whole = contents(tmp_path / "whole")
    assert [name for name in names if not same(longer[name], whole[name])] == []


# --------------------------------------------------------------------------------------------------
# Counterfactuals of real shapes


def test_counterfactuals_have_the_shapes_of_real_digits(
    segmented, digits_dir, digit_masks, tmp_path, monkeypatch
):
    """Image i has the mask and the label of a training image, whatever the batch size."""
    weights = segmented / "weights.pt"
    flags = ["--shapes", "real", "--dataset", "colored_mnist", "--weights", str(weights)]
    monkeypatch.setattr(train_cgn, "load_generator", load_as("colored_mnist"))
    for out, n, batch_size in (("many", 1200, 500), ("few", 70, 7)):
        argv = [*flags, "--data-dir", str(digits_dir), "--n", str(n), "--jitter", "0"]
        argv += ["--batch-size", str(batch_size), "--device", "cpu", "--out", str(tmp_path / out)]
        generate.generate_mnist(generate.parse_args(argv), torch.device("cpu"))
    many = load(tmp_path / "many" / "chunk_00000.pt")
    few = load(tmp_path / "few" / "chunk_00000.pt")
    assert torch.equal(few["images"], many["images"][:70])
    assert torch.equal(few["labels"], many["labels"][:70])

    data, _ = mnist.load_variant("colored_mnist", digits_dir)
    used = len(data) - data.held_out
    assert (used, data.held_out) == (540, 60)
    assert torch.equal(many["labels"][:used, 0].long(), data.labels[:used])
    assert torch.equal(many["labels"][used : 2 * used, 0], many["labels"][:used, 0])
    assert not torch.equal(many["labels"][used : 2 * used, 1:], many["labels"][:used, 1:])
    masks = data.all_images(0)[:70].amax(1, keepdim=True) > 20
    settings = generate.Settings(0, 1, 0.0, False, "")
    cgn, _ = load_as("colored_mnist")(weights)
    cgn.to(torch.bfloat16 if runs.pick_bf16("auto", torch.device("cpu")) else torch.float32)
    with torch.inference_mode():
        background = generate.generate_texture(
            cgn, cgn.background, settings, generate.BACKGROUND, 0, 70
        )[0]
    background = background.add(1).mul(127.5).round().to(torch.uint8)
    outside = ~masks.expand_as(background)
    assert torch.equal(few["images"][outside], background[outside])
    summary = json.loads((tmp_path / "many" / "dataset.json").read_text())
    assert summary["shapes"] == "real" and summary["left_out"] == 0


def load_as(dataset):
    """`load_generator` of weights that say nothing of their data set, with other colors a class."""
    torch.manual_seed(0)
    cgn = train_cgn.MnistCGN(init="kaiming").eval()
    return lambda path, raw=False: (cgn, {"dataset": dataset})


def test_real_shapes_end_to_end(segmented, digits_dir, tmp_path):
    """As a user runs it: a sheet, a data set that is resumed, a classifier on both kinds."""
    flags = ["--weights", segmented / "weights.pt", "--device", "cpu"]
    real = [*flags, "--shapes", "real", "--data-dir", digits_dir]
    run("generate.py", *flags, "--n", 30, "--out", tmp_path / "generated")
    run("generate.py", *real, "--out", tmp_path / "sheet")
    assert (tmp_path / "sheet" / "segmentation.png").is_file()
    run("generate.py", *real, "--n", 2_100, "--out", tmp_path / "real")
    whole = contents(tmp_path / "real")
    (tmp_path / "real" / "chunk_00001.pt").unlink()
    run("generate.py", *real, "--n", 2_100, "--resume", "--out", tmp_path / "real")
    assert same(whole, contents(tmp_path / "real"))
    done = run(
        "generate.py",
        *real,
        "--n",
        2_100,
        "--seed",
        1,
        "--resume",
        "--out",
        tmp_path / "real",
        expect=2,
    )
    assert "made with seed = 0, not 1" in done.stderr

    flags = ["--dataset", "colored_mnist", "--data-dir", digits_dir, "--device", "cpu"]
    flags += ["--train", "counterfactual", "--epochs", 1, "--epoch-steps", 2]
    flags += ["--counterfactual", tmp_path / "generated", tmp_path / "real"]
    run("train_classifier.py", *flags, "--out", tmp_path / "classifier")


def test_masks_that_are_no_objects_are_left_out():
    masks = torch.zeros(5, 1, 32, 32, dtype=torch.uint8)
    masks[1] = 255
    masks[2, :, 10:20, 10:20] = 255  # the only object
    masks[3] = 255
    masks[3, :, 8:24, 8:24] = 0  # inverted
    masks[4, :, 16, 16] = 255  # a dot
    assert generate.is_object(masks).tolist() == [False, False, True, False, False]


def test_no_more_images_are_segmented_than_needed(monkeypatch):
    images = torch.zeros(12_000, 3, 32, 32, dtype=torch.uint8)
    images[:4_000, :, 10:20, 10:20] = 255
    images[7_000:, :, 10:20, 10:20] = 255
    monkeypatch.setattr(train_cgn, "find_masks", lambda segmenter, images: images[:, :1])
    for needed, seen in ((4_000, 5_000), (4_001, 10_000), (9_001, 12_000)):
        masks, good = generate.find_objects(None, images, needed, torch.device("cpu"))
        assert len(masks) == len(good) == seen
        assert not good[4_000:7_000].any() and good[:4_000].all() and good[7_000:].all()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--shapes real --data-dir DIGITS", "holds no segmenter"),
        ("--shapes real --textures dtd", "--textures: colored_mnist has none"),
        ("--data-dir DIGITS", "--data-dir: needs --shapes real"),
        ("--shapes real --n 3 --factual", "--factual: has no meaning with --shapes real"),
    ],
)
def test_bad_input(flags, message, untrained, digits_dir, refused):
    flags = flags.replace("DIGITS", str(digits_dir)).split()
    refused(message, "generate.py", "--weights", untrained, *flags)


@pytest.mark.parametrize("trained, given", [("dtd", None), (None, "dtd")])
def test_other_textures_than_in_training_are_refused(trained, given, untrained, tmp_path):
    content = load(untrained)
    content["args"] |= {"dataset": "wildlife_mnist", "textures": trained}
    torch.save(content, tmp_path / "weights.pt")
    argv = ["--weights", str(tmp_path / "weights.pt"), "--shapes", "real"]
    argv += ["--textures", given] if given else []
    args = generate.parse_args([*argv, "--out", str(tmp_path / "out")])
    with pytest.raises(runs.UserError, match="was trained with (no )?--textures"):
        generate.generate_mnist(args, torch.device("cpu"))


def test_no_object_anywhere(untrained, digits_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(train_cgn, "load_segmenter", lambda path: train_cgn.Segmenter())
    monkeypatch.setattr(train_cgn, "find_masks", lambda segmenter, images: 0 * images[:, :1])
    argv = ["--weights", str(untrained), "--shapes", "real", "--data-dir", str(digits_dir)]
    args = generate.parse_args([*argv, "--n", "3", "--out", str(tmp_path / "out")])
    with pytest.raises(runs.UserError, match="found no object in any training image"):
        generate.generate_mnist(args, torch.device("cpu"))
