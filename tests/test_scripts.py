"""The three scripts, run as a user runs them: the chain, resuming, seeds, and mistakes."""

import importlib
import json
import os
import re
import runpy
import shlex
import signal
import sys
import time

import pytest
import torch
from conftest import (
    ROOT,
    SMALL_IMAGENET,
    folder_from,
    load,
    processes,
    run,
    run_ranks,
    same,
    start,
    write_idx,
)
from PIL import Image, ImageColor

import train_classifier
from data import runs
from data.mnist import COLORS, VARIANTS
from train_cgn import PUBLISHED, TUNED, border_loss, load_generator, parse_args
from train_classifier import random_affine


def without_args(checkpoint):
    return {key: value for key, value in checkpoint.items() if key != "args"}


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(digits_dir, tmp_path_factory):
    """A short training on the small MNIST: its run folder."""
    out = tmp_path_factory.mktemp("trained") / "run"
    flags = "--style-weights 0 0 0 0 --warmup 5 --max-steps 30 --log-every 10 --device cpu".split()
    flags += ["--segmenter-steps", 0]
    dataset = ["--dataset", "colored_mnist", "--data-dir", digits_dir]
    run("train_cgn.py", *dataset, *flags, "--out", out)
    return out


# --------------------------------------------------------------------------------------------------
# What a run writes


def test_offline_chain_from_nothing(tmp_path):
    common = "--dataset colored_mnist --offline --device cpu".split()
    flags = "--warmup 1 --max-steps 3 --segmenter-steps 0 --style-every 2 --log-every 1".split()
    done = run("train_cgn.py", *common, *flags, "--out", tmp_path / "cgn")
    assert "OFFLINE" in done.stdout
    lines = read_log(tmp_path / "cgn")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0].keys() == {"step", "border", "frame", "mask"}  # warm-up
    assert lines[1].keys() == lines[0].keys() | {"adversarial", "binary", "discriminator"}
    assert lines[2].keys() == lines[1].keys() | {"style"}  # in every second step
    assert all(abs(value) < 100 for line in lines for value in line.values())
    description = json.loads((tmp_path / "cgn" / "args.json").read_text())
    assert description["args"]["offline"] and description["torch"]
    assert description["args"]["discriminator"] == "strided"

    weights = tmp_path / "cgn" / "weights.pt"
    done = run("generate.py", "--weights", weights, "--n", 300, "--out", tmp_path / "cf")
    assert json.loads((tmp_path / "cf" / "dataset.json").read_text())["offline"]
    hint = shlex.split(done.stdout.rpartition("python train_classifier.py")[2])
    assert train_classifier.parse_args(hint).offline

    flags = "--train both --epochs 1 --epoch-steps 20".split()
    data = ["--counterfactual", tmp_path / "cf"]
    run("train_classifier.py", *common, *flags, *data, "--out", tmp_path / "classifier")
    results = json.loads((tmp_path / "classifier" / "results.json").read_text())
    assert results["offline"] and results["seeds"].keys() == {"0"}
    summary = results["summary"]
    for name in ("train", "decorrelated", "correlated", "biased"):
        assert 5 < summary[name]["mean"] <= 100
    assert summary["correlated"]["mean"] > summary["decorrelated"]["mean"]  # the shortcut


def test_a_run_folder_holds_weights_and_pictures(trained):
    assert {file.name for file in trained.iterdir()} == {
        "args.json",
        "train_cgn.py",
        "log.jsonl",
        "samples",
        "sheet.png",
        "weights.pt",
        "checkpoint.pt",
        ".lock",
    }
    content = load(trained / "weights.pt")
    assert content.keys() == {"generator", "average", "args", "step"} and content["step"] == 30
    assert not same(content["generator"], content["average"])
    picture = Image.open(trained / "sheet.png")
    assert picture.width > 600 and picture.height > 600
    assert len(picture.getcolors(1 << 20)) > 100
    losses = [line["border"] for line in read_log(trained)]
    assert losses[-1] < losses[0]  # it learns something


def test_generated_data_set(trained, tmp_path):
    common = ["--weights", trained / "weights.pt", "--per-shape", 4]
    run("generate.py", *common, "--n", 2_050, "--batch-size", 333, "--out", tmp_path / "a")
    chunks = [load(tmp_path / "a" / f"chunk_{index:05d}.pt") for index in (0, 1)]
    assert [len(chunk["images"]) for chunk in chunks] == [2_000, 50]
    images = torch.cat([chunk["images"] for chunk in chunks])
    labels = torch.cat([chunk["labels"] for chunk in chunks])
    assert images.shape == (2_050, 3, 32, 32) and images.dtype == labels.dtype == torch.uint8
    shapes = labels[:2_048, 0].view(-1, 4)
    assert (shapes == shapes[:, :1]).all() and len(shapes[:, 0].unique()) == 10
    for a, b in ((0, 1), (0, 2), (1, 2)):  # independent: equal by chance
        assert 0.06 < (labels[:, a] == labels[:, b]).float().mean() < 0.14

    # The same images with another batch size, and in a shorter data set.
    run("generate.py", *common, "--n", 60, "--batch-size", 7, "--out", tmp_path / "b")
    short = load(tmp_path / "b" / "chunk_00000.pt")
    assert torch.equal(short["images"], images[:60])
    assert torch.equal(short["labels"], labels[:60])


def test_jitter_shifts_each_texture_and_each_background(trained, tmp_path):
    chunks = []
    for strength in (0, 0.1):
        out = tmp_path / f"{strength}"
        flags = ["--n", 200, "--jitter", strength, "--out", out]
        run("generate.py", "--weights", trained / "weights.pt", *flags)
        chunks.append(load(out / "chunk_00000.pt"))
    plain, shifted = chunks
    assert torch.equal(plain["labels"], shifted["labels"])
    moved = shifted["images"].float() - plain["images"].float()
    # Three spreads from the ends.
    within = (plain["images"] > 80) & (plain["images"] < 175)
    assert 0.07 < (moved[within] / 255).std() < 0.13 and abs(moved[within].mean()) < 5
    corner = moved[:, :, 0, 0]  # background
    middle = moved[:, :, 16, 16]  # foreground, often
    assert (corner - middle).abs().max() > 20


def test_factual_images_have_one_label(trained, tmp_path):
    flags = ["--n", 200, "--factual", "--out", tmp_path / "a"]
    run("generate.py", "--weights", trained / "weights.pt", *flags)
    chunk = load(tmp_path / "a" / "chunk_00000.pt")
    assert (chunk["labels"] == chunk["labels"][:, :1]).all()
    assert len(chunk["labels"].unique()) == 10
    assert len(chunk["images"].flatten(1).unique(dim=0)) == 200


def test_average_is_the_default_and_raw_weights_differ(trained, tmp_path):
    path = trained / "weights.pt"
    for name, flags in (("average", []), ("raw", ["--raw-weights"])):
        run("generate.py", "--weights", path, "--n", 20, *flags, "--out", tmp_path / name)
    images = [load(tmp_path / name / "chunk_00000.pt")["images"] for name in ("average", "raw")]
    assert not torch.equal(*images)
    weights = load(path)
    average, _ = load_generator(path)
    raw, _ = load_generator(path, raw=True)
    assert same(dict(average.state_dict()), dict(weights["average"]))
    assert same(dict(raw.state_dict()), dict(weights["generator"]))


def test_sheets(trained, tmp_path):
    run("generate.py", "--weights", trained / "weights.pt", "--out", tmp_path / "a")
    moving = ("shape", "texture", "background", "all")
    names = {"mechanisms", "counterfactuals", *(f"interpolation_{name}" for name in moving)}
    pictures = {file.stem: Image.open(file) for file in (tmp_path / "a").glob("*.png")}
    assert pictures.keys() == names
    assert len({picture.tobytes() for picture in pictures.values()}) == len(names)
    assert not list((tmp_path / "a").glob("chunk*"))


@pytest.mark.parametrize("dataset", VARIANTS)
def test_bundled_generators(dataset, tmp_path):
    path = ROOT / "data" / "pretrained" / f"{dataset}.pt"
    content = load(path)
    assert content["args"]["dataset"] == dataset and path.stat().st_size < 1.7e6
    floats = [value for value in content["average"].values() if value.is_floating_point()]
    assert {value.dtype for value in floats} == {torch.float16}
    cgn, _ = load_generator(path)
    y = torch.arange(10).repeat_interleave(50)
    with torch.no_grad():
        mask = cgn.mask(torch.randn(500, 32, generator=torch.Generator().manual_seed(0)), y)
    for digit in mask.view(10, 50, 32, 32):
        # Objects lie within the frame, are crisp, and not of one shape for all.
        assert 0.03 < digit.mean() < 0.4 and border_loss(digit[:, None]) < 0.1
        assert ((digit < 0.05) | (digit > 0.95)).float().mean() > 0.8
        assert digit.std(0).mean() > 0.05
    for part, draw in (("objects", cgn.foreground), ("backgrounds", cgn.background)):
        names = VARIANTS[dataset][part]
        if names is None or len(set(names)) == 1:  # textures, or black
            continue
        palette = torch.tensor([ImageColor.getrgb(name) for name in names]) / 127.5 - 1
        with torch.no_grad():
            images = draw(torch.randn(500, 32, generator=torch.Generator().manual_seed(0)), y)
        colors = images.view(10, 50, 3, -1).mean((1, 3))
        assert torch.cdist(colors, palette).argmin(1).tolist() == list(range(10))
    run("generate.py", "--dataset", dataset, "--out", tmp_path / "pictures")
    assert (tmp_path / "pictures" / "counterfactuals.png").is_file()


def test_published_weights_serve_every_script(tmp_path, tiny):
    folder = folder_from("CGN_WEIGHTS")
    path = folder and folder / "authors_cgn_colored_mnist.pth"
    if not path or not path.is_file():
        pytest.skip(f"no authors_cgn_colored_mnist.pth in CGN_WEIGHTS={folder}")
    flags = ["--n", 20, "--dataset", "colored_mnist", "--out", tmp_path / "cf"]
    run("generate.py", "--weights", path, *flags)
    flags = ["--dataset", "colored_mnist", *tiny, "--weights", path, "--out", tmp_path / "cgn"]
    run("train_cgn.py", *flags)
    before, _ = load_generator(path)
    after, _ = load_generator(tmp_path / "cgn" / "weights.pt", raw=True)
    assert before.texture_padding == after.texture_padding == "zeros"  # theirs, not the default
    moved = (before.f_text1[7].weight - after.f_text1[7].weight).abs().max()
    assert 0 < moved < 0.01  # six steps


# --------------------------------------------------------------------------------------------------
# The same answer twice, and after an interruption


@pytest.mark.parametrize("dataset", VARIANTS)
def test_resumed_training_equals_an_uninterrupted_one(tmp_path, tiny, dataset):
    common = ["train_cgn.py", "--dataset", dataset, *tiny]
    run(*common, "--out", tmp_path / "whole")
    run(*common, "--max-steps", 4, "--out", tmp_path / "halves")
    run(*common, "--resume", "--out", tmp_path / "halves")
    whole = load(tmp_path / "whole" / "checkpoint.pt")
    halves = load(tmp_path / "halves" / "checkpoint.pt")
    assert whole["step"] == 6 and same(without_args(whole), without_args(halves))
    cgn, args = load_generator(tmp_path / "halves" / "weights.pt")
    assert cgn.texture_padding == args["texture_padding"] == "circular"
    assert [line["step"] for line in read_log(tmp_path / "halves")] == [2, 4, 6]


def test_a_mean_that_an_interruption_cuts_in_two_is_the_same(tmp_path, tiny):
    """The mean of steps 1 to 4 is logged after step 4, though the run is resumed after step 3."""
    flags = ["train_cgn.py", "--dataset", "colored_mnist", *tiny, "--log-every", 4]
    run(*flags, "--out", tmp_path / "run")
    whole = read_log(tmp_path / "run")
    before = tmp_path / "run" / "checkpoint_before.pt"
    assert load(before)["step"] == 3 and len(load(before)["window"]["mask"]) == 3
    before.rename(tmp_path / "run" / "checkpoint.pt")
    run(*flags, "--out", tmp_path / "run", "--resume")
    assert read_log(tmp_path / "run") == whole and [line["step"] for line in whole] == [4, 6]


def test_published_settings_and_other_discriminators_train(tmp_path, tiny):
    flags = ["--dataset", "colored_mnist", *tiny, "--max-steps", 9, "--warmup", 0, "--log-every", 1]
    published = [*flags, "--preset", "published"]
    settings = {
        "linear": published,
        "conv": [*published, "--discriminator", "conv"],
        "strided": flags,
        "no penalty": [*flags, "--r1", 0],
    }
    logs = {}
    for name, flags in settings.items():
        run("train_cgn.py", *flags, "--out", tmp_path / name)
        logs[name] = [line["discriminator"] for line in read_log(tmp_path / name)]
    assert logs["strided"][0] != logs["no penalty"][0]  # the penalty acts in steps 0, 8, ...
    assert len({tuple(log) for log in logs.values()}) == 4


def test_streams_of_random_numbers_stay_as_they_are():
    """Bundled weights and published results were drawn from them."""
    assert runs.derived_seed(1, "step", 2) == 1_015_858
    assert runs.derived_seed(1, "order", 2) == 1_040_095
    assert runs.derived_seed(1, "classifier order", 2) == 1_000_005
    assert runs.derived_seed(1, "another", 2) == 66_995_012_649_604_908


def test_the_mean_over_ranks_is_no_sum(monkeypatch):
    monkeypatch.setattr(runs.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(runs, "rank_and_world_size", lambda: (0, 3))
    monkeypatch.setattr(runs.distributed, "all_reduce", lambda value: value.mul_(3))
    value = torch.tensor(5.0)
    assert runs.mean_over_ranks(value) == 5 and runs.sum_over_ranks(value) == 15
    assert value == 5  # stays as it is


def test_float32_is_not_cut_to_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert not runs.pick_bf16("off", torch.device("cpu"))
    assert not torch.backends.cudnn.allow_tf32


def test_other_seed_other_weights(tmp_path, tiny):
    common = ["train_cgn.py", "--dataset", "colored_mnist", *tiny, "--max-steps", 1]
    generators = []
    for seed in (0, 1):
        run(*common, "--seed", seed, "--out", tmp_path / str(seed))
        generators.append(load(tmp_path / str(seed) / "checkpoint.pt")["generator"])
    assert not same(*generators)


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """Flags of a training of 50 steps, and its last checkpoint."""
    flags = ["--dataset", "colored_mnist", *tiny]
    flags += "--max-steps 50 --log-every 1 --save-every 5".split()
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run("train_cgn.py", *flags, "--out", out)
    return flags, load(out / "checkpoint.pt")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_training_resumes_to_the_same_end(tmp_path, undisturbed, number):
    flags, whole = undisturbed
    log = tmp_path / "cut" / "log.jsonl"
    output = (tmp_path / "stdout", tmp_path / "stderr")
    process = start("train_cgn.py", *flags, "--out", tmp_path / "cut", output=output)
    while process.is_alive() and not (log.is_file() and log.read_text().count("\n") > 12):
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.join()
    step = load(tmp_path / "cut" / "checkpoint.pt")["step"]
    assert 10 <= step < 50 and process.exitcode == 128 + number
    message = f"stopped after step {step}; resume with the same command and --resume"
    assert message in output[0].read_text()
    run("train_cgn.py", *flags, "--resume", "--out", tmp_path / "cut")
    assert same(without_args(whole), without_args(load(tmp_path / "cut" / "checkpoint.pt")))
    steps = [line["step"] for line in read_log(tmp_path / "cut")]
    assert steps == list(range(1, 51))


def test_generation_resumes(trained, tmp_path):
    flags = ["--weights", trained / "weights.pt", "--n", 2_020, "--out", tmp_path / "a"]
    run("generate.py", *flags)
    first = tmp_path / "a" / "chunk_00000.pt"
    last = tmp_path / "a" / "chunk_00001.pt"
    before = load(last)
    stamp = first.stat().st_mtime_ns
    last.unlink()
    (tmp_path / "a" / "dataset.json").unlink()
    run("generate.py", *flags, "--resume")
    assert same(load(last), before) and first.stat().st_mtime_ns == stamp
    done = run("generate.py", *flags, "--resume", "--seed", 1, expect=2)
    assert "made with seed = 0, not 1" in done.stderr
    (tmp_path / "a" / "args.json").write_text('{"script": "generate.py", "args": {}}')
    done = run("generate.py", *flags, "--resume", "--seed", 1, expect=2)
    assert "chunk_00000.pt was made with other settings" in done.stderr


def test_pictures_of_a_data_set_can_be_added(trained, tmp_path):
    flags = ["--weights", trained / "weights.pt", "--n", 5, "--out", tmp_path, "--resume"]
    run("generate.py", *flags)
    run("generate.py", *flags, "--format", "png")
    assert len(list((tmp_path / "counterfactual").iterdir())) == 5
    (tmp_path / "counterfactual" / "0000003.png").unlink()
    run("generate.py", *flags, "--format", "png")
    assert len(list((tmp_path / "counterfactual").iterdir())) == 5


def test_classifier_resumes_and_repeats(digits_dir, tmp_path):
    flags = ["--dataset", "double_colored_mnist", "--data-dir", digits_dir, "--device", "cpu"]
    flags += ["--seeds", 3, "--log-every", 4]
    run("train_classifier.py", *flags, "--epochs", 3, "--out", tmp_path / "whole")
    run("train_classifier.py", *flags, "--epochs", 1, "--out", tmp_path / "halves")
    run("train_classifier.py", *flags, "--epochs", 3, "--out", tmp_path / "halves", "--resume")
    folders = [tmp_path / name / "seed_3" for name in ("whole", "halves")]
    whole, halves = (load(folder / "checkpoint.pt") for folder in folders)
    assert same(without_args(whole), without_args(halves)) and whole["epoch"] == 3
    logs = [read_log(folder) for folder in folders]
    epochs = [[line for line in log if "epoch" in line] for log in logs]
    assert epochs[0] == epochs[1] and len(epochs[0]) == 3
    assert {file.name for file in folders[0].iterdir()} == {
        "log.jsonl",
        "weights.pt",
        "weights_best.pt",
        "checkpoint.pt",
        "checkpoint_before.pt",
    }


def test_augmentation_turns_and_moves_but_keeps_the_digit():
    x = torch.full((200, 3, 32, 32), -1.0)
    x[:, :, 8:24, 12:20] = 1
    first = random_affine(x, 1.0, torch.Generator().manual_seed(7))
    assert torch.equal(first, random_affine(x, 1.0, torch.Generator().manual_seed(7)))
    assert torch.equal(random_affine(x, 0.0, torch.Generator()), x)
    assert set(first.unique().tolist()) == {-1.0, 1.0}  # no new colors
    inside = first[:, 0] > 0
    area = inside.sum((1, 2)).float()
    assert 0.5 * 128 < area.min() and area.max() < 2 * 128 and area.std() > 5
    # Moved, by 2.5 pixels and by what it turns.
    rows = inside.any(2).float() @ torch.arange(32.0) / inside.any(2).sum(1)
    assert (rows - 15.5).abs().max() < 4 and rows.std() > 0.5


# --------------------------------------------------------------------------------------------------
# Presets and mistakes


@pytest.mark.parametrize("variant", VARIANTS)
def test_presets_are_defaults_and_flags_win(variant):
    flags = ["--dataset", variant, "--out", "x"]
    assert TUNED[variant].items() <= vars(parse_args(flags)).items()
    published = vars(parse_args([*flags, "--preset", "published"]))
    assert PUBLISHED[variant].items() <= published.items()
    assert published["texture_padding"] == "zeros"
    assert published["epochs"] == 15 and published["lr"] == published["norm_lr"] == 2e-4
    args = parse_args([*flags, "--preset", "published", "--ema", "0.5", "--lr", "7"])
    assert args.ema == 0.5 and args.lr == 7 and args.r1 == 0


def test_warm_up_is_for_new_generators(tmp_path, tiny):
    argv = "--dataset colored_mnist --out x".split()
    for more, steps in (
        ([], 500),
        (["--norm-lr", "2e-3"], 1000),
        (["--norm-lr", "0"], 1000),
        (["--weights", "x"], 0),
        (["--weights", "x", "--warmup", "7"], 7),
        (["--preset", "published"], 0),
    ):
        assert parse_args([*argv, *more]).warmup == steps
    flags = ["--dataset", "colored_mnist", *tiny, "--max-steps", 2, "--out", tmp_path]
    assert "all 2 steps are warm-up" in run("train_cgn.py", *flags).stderr


def test_presets_of_imagenet():
    flags = ["--dataset", "imagenet", "--out", "x"]
    full = parse_args(flags)
    assert full.max_steps * full.accumulate * full.batch_size == 1_200_000
    assert full.style_weights == [4.0] * 4 and full.lr_texture == 3e-5
    small = parse_args([*flags, "--preset", "small", "--ema", "0.5"])
    assert small.max_steps == 400 and small.binary_weight == 300 and small.ema == 0.5
    assert parse_args(["--out", "x", "--ndf", "5", "--dataset=wildlife_mnist"]).init == "normal"


NO_STYLE = "--style-weights 0 0 0 0"
COLORED = "train_cgn.py --dataset colored_mnist --out OUT"
DIGITS = f"{COLORED} --data-dir DIGITS {NO_STYLE}"
IMAGENET = "train_cgn.py --dataset imagenet --out OUT"
NO_VGG = f"--preset small {NO_STYLE} --texture-weights 0 0 0 0"
GENERATE_IMAGENET = "generate.py --dataset imagenet --out OUT"
GENERATE = "generate.py --weights TRAINED/weights.pt --out OUT"
CLASSIFY = "train_classifier.py --dataset colored_mnist --out OUT"

MISTAKES = {
    "unknown dataset": ("train_cgn.py --dataset cifar --out OUT", "invalid choice"),
    "unknown flag": (f"{COLORED} --nonsense", "--nonsense"),
    "no dataset": ("train_cgn.py --out OUT", "--dataset"),
    "dataset without a value": ("train_cgn.py --out OUT --dataset", "--dataset"),
    "imagenet, no U^2-Net": (f"{IMAGENET} {NO_VGG} --u2net NOWHERE", "no such file"),
    "imagenet, foreign": (f"{IMAGENET} {NO_VGG} --u2net FOREIGN", "not the weights needed"),
    "imagenet, truncation": (f"{IMAGENET} --truncation 1.5", "--truncation"),
    "unknown class": (f"{GENERATE_IMAGENET} --weights FOREIGN --shape unicorns", "unicorns"),
    "class out of range": (f"{GENERATE_IMAGENET} --weights FOREIGN --texture 1000", "0 to 999"),
    "imagenet, weights foreign": (f"{GENERATE_IMAGENET} --weights FOREIGN", "FOREIGN"),
    "imagenet, MNIST weights": (
        f"{GENERATE_IMAGENET} --weights TRAINED/weights.pt",
        "weights needed",
    ),
    "no goal": (f"{GENERATE_IMAGENET} --weights FOREIGN --interpolate all", "--to"),
    "imagenet classifier": (
        "train_classifier.py --dataset imagenet --out OUT",
        "needs --data-dir",
    ),
    "zero batch": (f"{COLORED} --batch-size 0", "--batch-size"),
    "batch larger than the data": (f"{DIGITS} --batch-size 601", "--batch-size 601"),
    "negative steps": (f"{COLORED} --max-steps -3", "--max-steps"),
    "negative weight": (f"{COLORED} --border-weight -1", "--border-weight"),
    "warm-up without its losses": (f"{COLORED} --frame-weight 0 --warmup 9", "--warmup: needs"),
    "weight is not a number": (f"{COLORED} --binary-weight nan", "--binary-weight"),
    "three style weights": (f"{COLORED} --style-weights 1 2 3", "--style-weights"),
    "no such device": (f"{COLORED} --device cuda:77", "--device cuda:77"),
    "no texture folder": (
        "train_cgn.py --dataset wildlife_mnist --data-dir DIGITS --textures NOWHERE --out OUT",
        "NOWHERE",
    ),
    "truncated digits": (
        "train_cgn.py --dataset wildlife_mnist --data-dir TRUNCATED --out OUT",
        "train-images-idx3-ubyte",
    ),
    "no digits": (f"{COLORED} --data-dir NOWHERE", "name another with --data-dir"),
    "no VGG": (f"{COLORED} --data-dir DIGITS --weights-dir NOWHERE/vgg.pth", "vgg.pth"),
    "foreign checkpoint": (f"{DIGITS} --resume FOREIGN", "not a checkpoint"),
    "checkpoint missing": (f"{DIGITS} --resume NOWHERE", "no such file"),
    "checkpoint of other settings": (
        f"{DIGITS} --lr 1 --warmup 5 --resume TRAINED/checkpoint.pt",
        "lr = 0.002",
    ),
    "weights truncated": ("generate.py --weights CUT --out OUT", "CUT"),
    "weights foreign": ("generate.py --weights FOREIGN --out OUT", "FOREIGN"),
    "weights missing": ("generate.py --weights NOWHERE --out OUT", "NOWHERE"),
    "weights of another variant": (
        f"{GENERATE} --dataset wildlife_mnist",
        "was trained on colored_mnist",
    ),
    "zero images": (f"{GENERATE} --n 0", "--n"),
    "negative per shape": (f"{GENERATE} --per-shape -1", "--per-shape"),
    "counterfactuals not given": (f"{CLASSIFY} --train both", "needs --counterfactual"),
    "counterfactuals not wanted": (f"{CLASSIFY} --counterfactual X", "--counterfactual"),
    "counterfactuals missing": (
        f"{CLASSIFY} --data-dir DIGITS --train both --counterfactual NOWHERE",
        "NOWHERE",
    ),
    "no seeds": (f"{CLASSIFY} --seeds", "--seeds"),
    "folder of another run": ("train_cgn.py --dataset colored_mnist --out TRAINED", "--resume"),
    "folder of something else": (
        "train_cgn.py --dataset colored_mnist --resume --out DIGITS",
        "other files",
    ),
    "out is a file": ("train_cgn.py --dataset colored_mnist --out CUT", "a file"),
}


@pytest.fixture(scope="module")
def places(digits_dir, trained, tmp_path_factory):
    """What the words in capitals of MISTAKES stand for."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "CUT").write_bytes((trained / "weights.pt").read_bytes()[:100_000])
    torch.save({"linear.weight": torch.zeros(3, 3)}, folder / "FOREIGN")
    (folder / "TRUNCATED").mkdir()
    images = folder / "TRUNCATED" / "train-images-idx3-ubyte"
    labels = folder / "TRUNCATED" / "train-labels-idx1-ubyte"
    write_idx(images, torch.zeros(10, 28, 28, dtype=torch.uint8))
    write_idx(labels, torch.zeros(10, dtype=torch.uint8))
    images.write_bytes(images.read_bytes()[:-1])
    names = ("OUT", "CUT", "FOREIGN", "TRUNCATED", "NOWHERE")
    return {"DIGITS": digits_dir, "TRAINED": trained} | {name: folder / name for name in names}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(name, places, trained, monkeypatch, capsys):
    command, message = MISTAKES[name]
    for word, path in places.items():
        command = re.sub(rf"\b{word}\b", str(path), command)
    before = {file: file.stat().st_mtime_ns for file in trained.rglob("*")}
    script, *flags = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit) as stop:  # in this process, which saves two seconds each
        runs.run_main(importlib.import_module(script.removesuffix(".py")).main)
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(errors) == 1 and message in errors[0]
    assert {file: file.stat().st_mtime_ns for file in trained.rglob("*")} == before
    # The folder is free for the next try.
    out = places["OUT"]
    assert not out.exists() or {file.name for file in out.iterdir()} <= {".lock"}


def test_a_mistake_has_no_traceback(places):
    commands = {
        "train_cgn.py --dataset cifar --out OUT": "invalid choice",
        "generate.py --weights FOREIGN --out OUT": "FOREIGN",
        "train_classifier.py --dataset wildlife_mnist --data-dir TRUNCATED --out OUT": "bytes",
    }
    for command, message in commands.items():
        script, *flags = [str(places.get(word, word)) for word in command.split()]
        done = run(script, *flags, expect=2)
        assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["train_cgn.py", "generate.py", "train_classifier.py"])
def test_small_data_sets_are_refused_on_several_ranks(script, tmp_path):
    device = ["--device", "cpu", "--out", tmp_path / "out"]
    for output in run_ranks(2, script, "--dataset", "colored_mnist", *device, expect=2):
        assert "several GPUs: only for --dataset imagenet" in output.stderr
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# Each part is whole, and the documents are right


def cut_scripts(part, folder):
    """Copies of the scripts in `folder` without one part, whose banners say where it begins."""
    for script in ("train_cgn.py", "generate.py", "train_classifier.py"):
        sections = (ROOT / script).read_text().split("# " + "=" * 98 + "\n")
        kept = [section for section in sections if not section.startswith(f"# {part}")]
        assert len(kept) == len(sections) - 1, script
        (folder / script).write_text("".join(kept))
    for name in ("data", "kernels"):
        (folder / name).symlink_to(ROOT / name)


def run_all(folder, commands):
    """In a process of its own: commands one after the other, with the modules of `folder`."""
    sys.path.insert(0, str(folder))
    for command in commands:
        sys.argv = [str(word) for word in command]
        runpy.run_path(str(folder / sys.argv[0]), run_name="__main__")


@pytest.mark.parametrize("part", ["MNIST", "ImageNet"])
def test_scripts_work_without_their_other_part(part, tmp_path, tiny, digits_dir):
    cut_scripts(part, tmp_path)
    cgn = tmp_path / "cgn"
    weights = ["--weights", cgn / "weights.pt", "--n", 2, "--out", tmp_path / "cf"]
    if part == "ImageNet":
        mnist = ["--dataset", "colored_mnist"]
        data = ["--data-dir", digits_dir, "--out", tmp_path / "c"]
        commands = [
            ["train_cgn.py", *mnist, *tiny, "--max-steps", 1, "--out", cgn],
            ["generate.py", *weights],
            ["train_classifier.py", *mnist, *data, "--epochs", 1, "--epoch-steps", 1],
        ]
    else:
        imagenet = ["--dataset", "imagenet"]
        flags = ["--offline", "--arch", "resnet18", "--workers", 0, "--amp", "off"]
        data = ["--data-dir", tmp_path / "imagenet", "--out", tmp_path / "c"]
        for split in ("train", "val"):
            for name in ("n01440764", "n01443537"):
                folder = tmp_path / "imagenet" / split / name
                folder.mkdir(parents=True)
                Image.new("RGB", (40, 30)).save(folder / "a.jpg")
        sizes = ["--image-size", 32, "--batch-size", 2, "--epochs", 1]
        commands = [
            ["train_cgn.py", *SMALL_IMAGENET, "--max-steps", 1, "--out", cgn],
            ["generate.py", *imagenet, *weights, "--batch-size", 2],
            ["train_classifier.py", *imagenet, *flags, *data, *sizes],
        ]
    process = processes.Process(target=run_all, args=(tmp_path, commands))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    assert (tmp_path / "cf" / "args.json").is_file() and (tmp_path / "c" / "args.json").is_file()


COMMAND = r"python (?:-m )?(train_cgn|generate|train_classifier)\.py([^\n`|#]*)"


def test_commands_of_the_documents_parse():
    """Every command line that a README shows for the three scripts uses flags that exist."""
    count = 0
    for path in [ROOT / "README.md", *ROOT.glob("*/README.md"), *ROOT.glob("data/*/README.md")]:
        text = path.read_text().replace("\\\n", " ")
        for script, flags in re.findall(COMMAND, text):
            importlib.import_module(script).parse_args(shlex.split(flags.split("&&")[0]))
            count += 1
    assert count >= 30


def test_the_program_of_the_documents_runs(monkeypatch):
    """A generator in a user's own program."""
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "data" / "README.md").read_text(), re.S)
    found = {}
    exec(code, found)
    assert found["image"].shape == (8, 3, 32, 32)


def test_the_readme_is_one_page_and_names_the_colors_right():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 170 and len(text.encode()) <= 11 * 1024
    digit, color = re.search(r"every (\d) .{0,40}?is (\w+)", text.replace("\n", " ")).groups()
    names = [
        "crimson",
        "teal",
        "lemon",
        "blue",
        "orange",
        "violet",
        "cyan",
        "pink",
        "lime",
        "maroon",
    ]
    assert len(COLORS) == 10 and names[int(digit)] == color
