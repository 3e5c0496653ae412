"""The three scripts, run as a user runs them: the chain, resuming, seeds, kills, and mistakes."""
import importlib
import json
import os
import re
import shlex
import signal
import sys
import time

import pytest
import torch
from PIL import Image

from conftest import ROOT, folder_from, load, run, same, start, write_idx
from data.mnist import VARIANTS
from data.runs import HELD, run_main
from train_classifier import turned
from train_cgn import PRESETS, border_loss, load_generator, parse_args


def without_args(checkpoint):
    return {key: value for key, value in checkpoint.items() if key != "args"}


@pytest.fixture(scope="module")
def trained(digits_dir, tmp_path_factory):
    """A short training on the small MNIST: its run folder."""
    out = tmp_path_factory.mktemp("trained") / "run"
    run("train_cgn.py", "--dataset", "colored_mnist", "--data-dir", digits_dir, "--style-weights", 0, 0, 0, 0,
        "--warmup", 5, "--max-steps", 30, "--log-every", 10, "--device", "cpu", "--out", out)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# What a run writes


def test_offline_chain_from_nothing(tmp_path):
    common = ["--dataset", "colored_mnist", "--offline", "--device", "cpu"]
    done = run("train_cgn.py", *common, "--warmup", 1, "--max-steps", 3, "--style-every", 2, "--log-every", 1,
               "--out", tmp_path / "cgn")
    assert "OFFLINE" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "cgn" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0].keys() == {"step", "border", "frame", "mask"}                     # warm-up
    assert lines[1].keys() == lines[0].keys() | {"adversarial", "binary", "discriminator"}
    assert lines[2].keys() == lines[1].keys() | {"style"}                             # in every second step
    assert all(abs(value) < 100 for line in lines for value in line.values())
    facts = json.loads((tmp_path / "cgn" / "args.json").read_text())
    assert facts["args"]["offline"] and facts["args"]["discriminator"] == "strided" and facts["torch"]
    run("generate.py", "--weights", tmp_path / "cgn" / "weights.pt", "--n", 300, "--out", tmp_path / "cf")
    assert json.loads((tmp_path / "cf" / "dataset.json").read_text())["offline"]
    run("train_classifier.py", *common, "--train", "both", "--counterfactual", tmp_path / "cf", "--epochs", 1,
        "--max-steps", 20, "--seeds", 0, 1, "--out", tmp_path / "classifier")
    results = json.loads((tmp_path / "classifier" / "results.json").read_text())
    assert results["offline"] and set(results["seeds"]) == {"0", "1"}
    for name in ("train", "decorrelated", "correlated", "biased"):
        values = [seed[name] for seed in results["seeds"].values()]
        assert all(5 < value <= 100 for value in values)
        assert results["summary"][name]["mean"] == pytest.approx(sum(values) / 2)
        assert results["summary"][name]["std"] == pytest.approx(abs(values[0] - values[1]) / 2 ** 0.5)
    assert results["summary"]["correlated"]["mean"] > results["summary"]["decorrelated"]["mean"]      # the shortcut


def test_a_run_folder_holds_weights_and_pictures(trained):
    assert {file.name for file in trained.iterdir()} == {
        "args.json", "train_cgn.py", "log.jsonl", "samples", "sheet.png", "weights.pt", "checkpoint.pt", ".lock"}
    content = load(trained / "weights.pt")
    assert content.keys() == {"generator", "average", "args", "step"} and content["step"] == 30
    assert not same(content["generator"], content["average"])
    picture = Image.open(trained / "sheet.png")
    assert picture.width > 600 and picture.height > 600 and len(picture.getcolors(1 << 20)) > 100
    losses = [json.loads(line)["border"] for line in (trained / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]                                                     # it learns something


def test_generated_data_set(trained, tmp_path):
    run("generate.py", "--weights", trained / "weights.pt", "--n", 2_050, "--per-shape", 4, "--batch-size", 333,
        "--out", tmp_path / "a")
    chunks = [load(tmp_path / "a" / f"chunk_{number:05d}.pt") for number in (0, 1)]
    assert [len(chunk["images"]) for chunk in chunks] == [2_000, 50]
    images, labels = (torch.cat([chunk[name] for chunk in chunks]) for name in ("images", "labels"))
    assert images.shape == (2_050, 3, 32, 32) and images.dtype == labels.dtype == torch.uint8
    shapes = labels[:2_048, 0].view(-1, 4)
    assert (shapes == shapes[:, :1]).all() and len(shapes[:, 0].unique()) == 10
    for a, b in ((0, 1), (0, 2), (1, 2)):                                             # independent: equal by chance
        assert 0.06 < (labels[:, a] == labels[:, b]).float().mean() < 0.14
    # The same numbers with another batch size, from the generator itself, and in a shorter data set.
    run("generate.py", "--weights", trained / "weights.pt", "--n", 60, "--per-shape", 4, "--batch-size", 7,
        "--out", tmp_path / "b")
    short = load(tmp_path / "b" / "chunk_00000.pt")
    assert torch.equal(short["images"], images[:60]) and torch.equal(short["labels"], labels[:60])


def test_jitter_shifts_each_texture_and_each_background(trained, tmp_path):
    for strength in (0, 0.1):
        run("generate.py", "--weights", trained / "weights.pt", "--n", 200, "--jitter", strength, "--out", tmp_path / f"{strength}")
    plain, shifted = (load(tmp_path / f"{strength}" / "chunk_00000.pt") for strength in (0, 0.1))
    assert torch.equal(plain["labels"], shifted["labels"])
    moved = shifted["images"].float() - plain["images"].float()
    within = (plain["images"] > 80) & (plain["images"] < 175)                         # three spreads from the ends
    assert 0.07 < (moved[within] / 255).std() < 0.13 and abs(moved[within].mean()) < 5
    corner, middle = moved[:, :, 0, 0], moved[:, :, 16, 16]                           # background and, often, foreground
    assert (corner - middle).abs().max() > 20


def test_factual_images_have_one_label(trained, tmp_path):
    run("generate.py", "--weights", trained / "weights.pt", "--n", 200, "--factual", "--out", tmp_path / "a")
    chunk = load(tmp_path / "a" / "chunk_00000.pt")
    assert (chunk["labels"] == chunk["labels"][:, :1]).all() and len(chunk["labels"].unique()) == 10
    assert len(chunk["images"].flatten(1).unique(dim=0)) == 200


def test_average_is_the_default_and_raw_weights_differ(trained, tmp_path):
    for name, flags in (("average", []), ("raw", ["--raw-weights"])):
        run("generate.py", "--weights", trained / "weights.pt", "--n", 20, *flags, "--out", tmp_path / name)
    images = [load(tmp_path / name / "chunk_00000.pt")["images"] for name in ("average", "raw")]
    assert not torch.equal(*images)
    weights = load(trained / "weights.pt")
    assert same(dict(load_generator(trained / "weights.pt")[0].state_dict()), dict(weights["average"]))
    assert same(dict(load_generator(trained / "weights.pt", raw=True)[0].state_dict()), dict(weights["generator"]))


def test_sheets(trained, tmp_path):
    run("generate.py", "--weights", trained / "weights.pt", "--out", tmp_path / "a")
    names = {"mechanisms", "counterfactuals", *(f"interpolation_{m}" for m in ("shape", "texture", "background", "all"))}
    pictures = {file.stem: Image.open(file) for file in (tmp_path / "a").glob("*.png")}
    assert pictures.keys() == names
    assert len({picture.tobytes() for picture in pictures.values()}) == len(names)
    assert not list((tmp_path / "a").glob("chunk*"))


@pytest.mark.parametrize("dataset", VARIANTS)
def test_generators_that_come_along(dataset, tmp_path):
    path = ROOT / "data" / "pretrained" / f"{dataset}.pt"
    content = load(path)
    assert content["args"]["dataset"] == dataset and path.stat().st_size < 1.5e6
    assert {value.dtype for value in content["average"].values() if value.is_floating_point()} == {torch.float16}
    cgn, y = load_generator(path)[0], torch.arange(10).repeat_interleave(50)
    with torch.no_grad():
        mask = cgn.mask(torch.randn(500, 32, generator=torch.Generator().manual_seed(0)), y)
    for digit in mask.view(10, 50, 32, 32):                # objects within the frame, crisp, and not one shape for all
        assert 0.03 < digit.mean() < 0.4 and border_loss(digit[:, None]) < 0.1
        assert ((digit < 0.05) | (digit > 0.95)).float().mean() > 0.8 and digit.std(0).mean() > 0.05
    run("generate.py", "--dataset", dataset, "--out", tmp_path / "pictures")
    assert (tmp_path / "pictures" / "counterfactuals.png").is_file()


def test_published_weights_serve_every_script(tmp_path, tiny):
    folder = folder_from("CGN_WEIGHTS")
    path = folder and folder / "authors_cgn_colored_mnist.pth"
    if not path or not path.is_file():
        pytest.skip(f"no authors_cgn_colored_mnist.pth in CGN_WEIGHTS={folder}")
    run("generate.py", "--weights", path, "--n", 20, "--dataset", "colored_mnist", "--out", tmp_path / "cf")
    run("train_cgn.py", "--dataset", "colored_mnist", *tiny, "--weights", path, "--out", tmp_path / "cgn")
    before, after = load_generator(path)[0], load_generator(tmp_path / "cgn" / "weights.pt", raw=True)[0]
    moved = (before.f_text1[7].weight - after.f_text1[7].weight).abs().max()
    assert 0 < moved < 0.01                                                           # six steps of 2e-4


# ---------------------------------------------------------------------------------------------------------------------
# The same answer twice, and after an interruption


@pytest.mark.parametrize("dataset", VARIANTS)
def test_resumed_training_equals_an_uninterrupted_one(tmp_path, tiny, dataset):
    common = ["train_cgn.py", "--dataset", dataset, *tiny]
    run(*common, "--out", tmp_path / "whole")
    run(*common, "--max-steps", 4, "--out", tmp_path / "halves")
    run(*common, "--resume", "--out", tmp_path / "halves")
    whole, halves = (load(tmp_path / name / "checkpoint.pt") for name in ("whole", "halves"))
    assert whole["step"] == 6 and same(without_args(whole), without_args(halves))
    steps = [json.loads(line)["step"] for line in (tmp_path / "halves" / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]


def test_seeds_train_one_after_the_other(tmp_path, tiny):
    flags = ["train_cgn.py", "--dataset", "double_colored_mnist", *tiny]
    run(*flags, "--seeds", 4, 4, 7, "--out", tmp_path / "both")
    run(*flags, "--seed", 7, "--out", tmp_path / "one")
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"seed_4", "seed_7"}
    four, seven, one = (load(tmp_path / name / "weights.pt")["average"] for name in ("both/seed_4", "both/seed_7", "one"))
    assert same(seven, one) and not same(four, one)
    run(*flags, "--seeds", 4, 9, "--resume", "--out", tmp_path / "both")              # 4 is there already
    assert same(load(tmp_path / "both/seed_4/weights.pt")["average"], four) and (tmp_path / "both/seed_9/weights.pt").is_file()
    failed = run(*flags, "--seeds", 4, 9, "--resume", tmp_path / "one/checkpoint.pt", "--out", tmp_path / "x", expect=2)
    assert "--seeds" in failed.stderr


def test_published_settings_and_other_forms_train(tmp_path, tiny):
    flags = ["--dataset", "colored_mnist", *tiny, "--max-steps", 9, "--warmup", 0, "--log-every", 1]
    published = ["--adversarial", "squares", "--r1", 0, "--style-every", 1, "--init-shape", "orthogonal", "--labels", "uniform"]
    logs = {}
    for name, more in {"linear": [*published, "--discriminator", "linear"], "conv": [*published, "--discriminator", "conv"],
                       "strided": [], "no penalty": ["--r1", 0]}.items():
        run("train_cgn.py", *flags, *more, "--out", tmp_path / name)
        logs[name] = [json.loads(line)["discriminator"] for line in open(tmp_path / name / "log.jsonl")]
    assert logs["strided"][0] != logs["no penalty"][0]                           # the penalty acts in steps 0, 8, ...
    assert len({tuple(log) for log in logs.values()}) == 4


def test_style_loss_in_every_other_step(tmp_path, digits_dir, tiny):
    """Offline, so that there are features: logged in the steps that have it, and twice as much."""
    flags = ["--dataset", "colored_mnist", *tiny, "--offline", "--style-weights", 1, 0, 0, 0, "--warmup", 0, "--lr", 0,
             "--norm-lr", 0, "--max-steps", 4, "--log-every", 1]
    logs = []
    for number in (1, 2):
        run("train_cgn.py", *flags, "--style-every", number, "--out", tmp_path / str(number))
        logs.append([json.loads(line).get("style") for line in open(tmp_path / str(number) / "log.jsonl")])
    assert None not in logs[0] and logs[1][1] is logs[1][3] is None
    assert [logs[1][0], logs[1][2]] == pytest.approx([2 * logs[0][0], 2 * logs[0][2]], rel=0.02)


def test_other_seed_other_weights(tmp_path, tiny):
    for seed in (0, 1):
        run("train_cgn.py", "--dataset", "colored_mnist", *tiny, "--max-steps", 1, "--seed", seed, "--out", tmp_path / str(seed))
    assert not same(*(load(tmp_path / str(seed) / "checkpoint.pt")["generator"] for seed in (0, 1)))


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """Flags of a training of 80 steps, and its last checkpoint."""
    flags = ["--dataset", "colored_mnist", *map(str, tiny), "--max-steps", "80", "--log-every", "1", "--save-every", "5"]
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run("train_cgn.py", *flags, "--out", out)
    return flags, load(out / "checkpoint.pt")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_training_resumes_to_the_same_end(tmp_path, undisturbed, number):
    flags, whole = undisturbed
    log, output = tmp_path / "cut" / "log.jsonl", (tmp_path / "stdout", tmp_path / "stderr")
    process = start("train_cgn.py", *flags, "--out", tmp_path / "cut", output=output)
    while process.is_alive() and not (log.is_file() and log.read_text().count("\n") > 12):
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.join()
    step = load(tmp_path / "cut" / "checkpoint.pt")["step"]
    assert 10 <= step < 80 and process.exitcode == 0
    assert f"stopped after step {step}; go on with the same command and --resume" in output[0].read_text()
    run("train_cgn.py", *flags, "--resume", "--out", tmp_path / "cut")
    assert same(without_args(whole), without_args(load(tmp_path / "cut" / "checkpoint.pt")))
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 81))


def test_generation_resumes(trained, tmp_path):
    flags = ["--weights", trained / "weights.pt", "--n", 2_020, "--out", tmp_path / "a"]
    run("generate.py", *flags)
    chunk, last = tmp_path / "a" / "chunk_00000.pt", tmp_path / "a" / "chunk_00001.pt"
    before, stamp = load(last), chunk.stat().st_mtime_ns
    last.unlink(), (tmp_path / "a" / "dataset.json").unlink()
    run("generate.py", *flags, "--resume")
    assert same(load(last), before) and chunk.stat().st_mtime_ns == stamp
    done = run("generate.py", *flags, "--resume", "--seed", 1, expect=2)
    assert "other settings" in done.stderr


def test_classifier_resumes_and_repeats(digits_dir, tmp_path):
    flags = ["--dataset", "double_colored_mnist", "--data-dir", digits_dir, "--device", "cpu", "--seeds", 3]
    run("train_classifier.py", *flags, "--epochs", 3, "--out", tmp_path / "whole")
    run("train_classifier.py", *flags, "--epochs", 1, "--out", tmp_path / "halves")
    run("train_classifier.py", *flags, "--epochs", 3, "--out", tmp_path / "halves", "--resume")
    whole, halves = (load(tmp_path / name / "seed_3" / "checkpoint.pt") for name in ("whole", "halves"))
    assert same(without_args(whole), without_args(halves)) and whole["epoch"] == 3
    logs = [(tmp_path / name / "seed_3" / "log.jsonl").read_text() for name in ("whole", "halves")]
    assert logs[0] == logs[1] and logs[0].count("\n") == 3
    assert {f.name for f in (tmp_path / "whole" / "seed_3").iterdir()} == {"log.jsonl", "weights.pt", "weights_best.pt",
                                                                          "checkpoint.pt", "checkpoint_before.pt"}


def test_augmentation_turns_and_moves_but_keeps_the_digit():
    x = torch.full((200, 3, 32, 32), -1.0)
    x[:, :, 8:24, 12:20] = 1
    same_seed = [turned(x, 1.0, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*same_seed) and torch.equal(turned(x, 0.0, torch.Generator()), x)
    inside = same_seed[0][:, 0] > 0
    assert set(same_seed[0].unique().tolist()) == {-1.0, 1.0}                    # no new colours
    area, rows = inside.sum((1, 2)).float(), inside.any(2).float() @ torch.arange(32.0) / inside.any(2).sum(1)
    assert 0.5 * 128 < area.min() and area.max() < 2 * 128 and area.std() > 5
    assert (rows - 15.5).abs().max() < 4 and rows.std() > 0.5                     # moved, by 2.5 pixels and what it turns


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def test_presets_are_defaults_and_flags_win():
    for name, preset in PRESETS.items():
        dataset, *small = name.split()                     # "imagenet small": --dataset imagenet --preset small
        args = vars(parse_args(["--dataset", dataset, "--out", "x", *(["--preset", "small"] if small else [])]))
        assert preset.items() <= args.items()
        args = vars(parse_args(["--dataset", dataset, "--out", "x", "--ema", "0.5", "--binary-weight", "7"]))
        assert args["ema"] == 0.5 and args["binary_weight"] == 7 and args["ndf"] == preset.get("ndf", 32)
    assert parse_args(["--out", "x", "--ndf", "5", "--dataset=wildlife_mnist"]).init == "normal"


MISTAKES = {
    "unknown dataset": ("train_cgn.py --dataset cifar --out OUT", "invalid choice"),
    "unknown flag": ("train_cgn.py --dataset colored_mnist --out OUT --nonsense", "--nonsense"),
    "no dataset": ("train_cgn.py --out OUT", "--dataset"),
    "dataset without a value": ("train_cgn.py --out OUT --dataset", "--dataset"),
    "imagenet, no U^2-Net": ("train_cgn.py --dataset imagenet --preset small --u2net NOWHERE --style-weights 0 0 0 0 "
                             "--texture-weights 0 0 0 0 --out OUT", "no such file"),
    "imagenet, another network": ("train_cgn.py --dataset imagenet --preset small --u2net FOREIGN --style-weights 0 0 0 0 "
                                  "--texture-weights 0 0 0 0 --out OUT", "not the weights needed"),
    "imagenet, truncation": ("train_cgn.py --dataset imagenet --truncation 1.5 --out OUT", "--truncation"),
    "imagenet, unknown class": ("generate.py --dataset imagenet --weights FOREIGN --shape unicorns --out OUT", "unicorns"),
    "imagenet, class out of range": ("generate.py --dataset imagenet --weights FOREIGN --texture 1000 --out OUT",
                                     "0 to 999"),
    "imagenet, weights foreign": ("generate.py --dataset imagenet --weights FOREIGN --out OUT", "FOREIGN"),
    "imagenet, MNIST weights": ("generate.py --dataset imagenet --weights TRAINED/weights.pt --out OUT", "weights needed"),
    "imagenet, no goal": ("generate.py --dataset imagenet --weights FOREIGN --interpolate all --out OUT", "--to"),
    "imagenet classifier": ("train_classifier.py --dataset imagenet --out OUT", "needs --data-dir"),
    "zero batch": ("train_cgn.py --dataset colored_mnist --out OUT --batch-size 0", "--batch-size"),
    "batch larger than the data": ("train_cgn.py --dataset colored_mnist --data-dir DIGITS --style-weights 0 0 0 0 "
                                   "--out OUT --batch-size 601", "--batch-size 601"),
    "negative steps": ("train_cgn.py --dataset colored_mnist --out OUT --max-steps -3", "--max-steps"),
    "negative weight": ("train_cgn.py --dataset colored_mnist --out OUT --border-weight -1", "--border-weight"),
    "weight is not a number": ("train_cgn.py --dataset colored_mnist --out OUT --binary-weight nan", "--binary-weight"),
    "three style weights": ("train_cgn.py --dataset colored_mnist --out OUT --style-weights 1 2 3", "--style-weights"),
    "no such device": ("train_cgn.py --dataset colored_mnist --out OUT --device cuda:77", "--device cuda:77"),
    "no texture folder": ("train_cgn.py --dataset wildlife_mnist --data-dir DIGITS --textures NOWHERE --out OUT", "NOWHERE"),
    "truncated digits": ("train_cgn.py --dataset wildlife_mnist --data-dir TRUNCATED --out OUT", "train-images-idx3-ubyte"),
    "no digits": ("train_cgn.py --dataset colored_mnist --data-dir NOWHERE --out OUT", "--offline"),
    "no VGG": ("train_cgn.py --dataset colored_mnist --data-dir DIGITS --weights-dir NOWHERE/vgg.pth --out OUT", "vgg.pth"),
    "checkpoint of another kind": ("train_cgn.py --dataset colored_mnist --data-dir DIGITS --style-weights 0 0 0 0 "
                                   "--resume FOREIGN --out OUT", "not a checkpoint"),
    "checkpoint missing": ("train_cgn.py --dataset colored_mnist --data-dir DIGITS --style-weights 0 0 0 0 "
                           "--resume NOWHERE --out OUT", "no such file"),
    "checkpoint of other settings": ("train_cgn.py --dataset colored_mnist --data-dir DIGITS --style-weights 0 0 0 0 "
                                     "--lr 1 --warmup 5 --resume TRAINED/checkpoint.pt --out OUT", "lr = 0.001"),
    "weights truncated": ("generate.py --weights CUT --out OUT", "CUT"),
    "weights foreign": ("generate.py --weights FOREIGN --out OUT", "FOREIGN"),
    "weights missing": ("generate.py --weights NOWHERE --out OUT", "NOWHERE"),
    "weights of another variant": ("generate.py --weights TRAINED/weights.pt --dataset wildlife_mnist --out OUT",
                                   "was trained on colored_mnist"),
    "zero images": ("generate.py --weights TRAINED/weights.pt --n 0 --out OUT", "--n"),
    "negative per shape": ("generate.py --weights TRAINED/weights.pt --per-shape -1 --out OUT", "--per-shape"),
    "counterfactuals not given": ("train_classifier.py --dataset colored_mnist --offline --train both --out OUT",
                                  "needs --counterfactual"),
    "counterfactuals not wanted": ("train_classifier.py --dataset colored_mnist --counterfactual X --out OUT",
                                   "--counterfactual"),
    "counterfactuals missing": ("train_classifier.py --dataset colored_mnist --data-dir DIGITS --train both "
                                "--counterfactual NOWHERE --out OUT", "NOWHERE"),
    "no seeds": ("train_classifier.py --dataset colored_mnist --out OUT --seeds", "--seeds"),
    "folder of another run": ("train_cgn.py --dataset colored_mnist --out TRAINED", "--resume"),
    "folder of something else": ("train_cgn.py --dataset colored_mnist --resume --out DIGITS", "other files"),
    "out is a file": ("train_cgn.py --dataset colored_mnist --out CUT", "a file"),
}


@pytest.fixture(scope="module")
def places(digits_dir, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    (folder / "CUT").write_bytes((trained / "weights.pt").read_bytes()[:100_000])
    torch.save({"linear.weight": torch.zeros(3, 3)}, folder / "FOREIGN")
    (folder / "TRUNCATED").mkdir()
    write_idx(folder / "TRUNCATED" / "train-images-idx3-ubyte", torch.zeros(10, 28, 28, dtype=torch.uint8))
    write_idx(folder / "TRUNCATED" / "train-labels-idx1-ubyte", torch.zeros(10, dtype=torch.uint8))
    images = folder / "TRUNCATED" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    return {"DIGITS": digits_dir, "TRAINED": trained, "OUT": folder / "OUT",
            **{name: folder / name for name in ("CUT", "FOREIGN", "TRUNCATED", "NOWHERE")}}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(name, places, trained, monkeypatch, capsys):
    command, message = MISTAKES[name]
    for word, path in places.items():
        command = re.sub(rf"\b{word}\b", str(path), command)
    before = {file: file.stat().st_mtime_ns for file in trained.rglob("*")}
    script, *flags = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit) as stop:                # in this process, which saves two seconds each
        run_main(importlib.import_module(script.removesuffix(".py")).main)
    HELD.clear()                                           # this process lives on, but its folder should be free
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(errors) == 1 and message in errors[0]
    assert {file: file.stat().st_mtime_ns for file in trained.rglob("*")} == before
    assert not places["OUT"].exists() or {file.name for file in places["OUT"].iterdir()} <= {".lock"}  # free for the next try


def test_a_mistake_has_no_traceback(places):
    for command, message in (("train_cgn.py --dataset cifar --out OUT", "invalid choice"),
                             ("generate.py --weights FOREIGN --out OUT", "FOREIGN"),
                             ("train_classifier.py --dataset wildlife_mnist --data-dir TRUNCATED --out OUT", "bytes")):
        script, *flags = [str(places.get(word, word)) for word in command.split()]
        done = run(script, *flags, expect=2)
        assert message in done.stderr and "Traceback" not in done.stderr


def test_readme_commands_parse():
    """Every command line that the README shows for the three scripts uses flags that exist."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"python (train_cgn|generate|train_classifier)\.py ([^\n`|#]*)", text)
    assert len(commands) >= 8
    for script, flags in commands:
        __import__(script).parse_args(shlex.split(flags.split("&&")[0]))
