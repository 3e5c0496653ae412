"""Every flag of every script: wrong values, extremes, contradictions; each is used or refused."""

import argparse
import functools
import importlib
import math
import shlex
import sys

import pytest
import torch
from PIL import Image

import generate
import train_cgn
import train_classifier
from conftest import SMALL_IMAGENET, load, run
from data import imagenet, mnist, runs, weights

SCRIPTS = ["train_cgn", "generate", "train_classifier"]
WRONG = ["", " ", "x", "-1", "-0.5", "nan", "inf", "-inf", "1e400", "9" * 30, "9" * 5_000]
WRONG += ["0x10", "1e", "1,5", "\0", "--", "é"]
# What a script needs to be told, whatever the flag under test.
REQUIRED = {
    ("train_classifier", "imagenet"): ["--data-dir", "x"],
    ("train_classifier", "images"): ["--data-dir", "x"],
    ("train_cgn", "images"): ["--data-dir", "x"],
}


def actions_of(script, dataset, monkeypatch):
    """The flags of a script's parser for a data set, without those that take no value."""
    parsers = []

    def note(parser, argv):
        parsers.append(parser)
        sys.exit(0)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", note)
        with pytest.raises(SystemExit):
            importlib.import_module(script).parse_args(["--dataset", dataset])
    return [action for action in parsers[0]._actions if action.option_strings]


@pytest.mark.parametrize("dataset", ["wildlife_mnist", "images", "imagenet"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_values_of_every_flag(script, dataset, monkeypatch, capsys):
    parse = importlib.import_module(script).parse_args
    actions = actions_of(script, dataset, monkeypatch)
    assert len(actions) > 12
    common = ["--dataset", dataset, "--out", "x", *REQUIRED.get((script, dataset), [])]
    for action in actions:
        if action.nargs == 0:
            continue
        for value in WRONG:
            repeats = action.nargs if isinstance(action.nargs, int) else 1
            flags = [action.option_strings[0], *[value] * repeats]
            try:
                args = parse([*common, *flags])
            except SystemExit as stop:
                error = capsys.readouterr().err
                assert stop.code == 2 and error.count("error: ") == 1, flags
                assert "Traceback" not in error, flags
                continue
            found = getattr(args, action.dest)
            values = found if isinstance(found, list) else [found]
            for number in values:
                if isinstance(number, float):
                    assert math.isfinite(number), flags
                elif isinstance(number, int):
                    assert 0 <= number < 2**31, flags
            assert action.type in (None, str) or not isinstance(found, str), flags


@pytest.mark.parametrize("dataset", ["wildlife_mnist", "images", "imagenet"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_abbreviations_are_refused(script, dataset, monkeypatch, capsys):
    """--datase imagenet was taken once, without ImageNet's defaults."""
    parse = importlib.import_module(script).parse_args
    common = ["--dataset", dataset, "--out", "x", *REQUIRED.get((script, dataset), [])]
    parse(common)
    actions = actions_of(script, dataset, monkeypatch)
    flags = [flag for action in actions for flag in action.option_strings]
    for action in actions:
        for flag in action.option_strings:
            short = flag[:-1]
            if len(short) < 4 or short in flags:  # --seeds and --seed are two flags
                continue
            with pytest.raises(SystemExit) as stop:
                parse([*common, short, *["1"] * (action.nargs != 0)])
            assert stop.value.code == 2, short
    with pytest.raises(SystemExit):
        parse(["--datase", dataset, "--out", "x"])


# --------------------------------------------------------------------------------------------------
# Every flag is used, or refused


class Recorder(argparse.Namespace):
    """Arguments that note which of them are read."""

    def __getattribute__(self, name):
        if not name.startswith("_"):
            object.__getattribute__(self, "__dict__").setdefault("_read", set()).add(name)
        return super().__getattribute__(name)


def recorded(function):
    """`parse_args` whose result is a Recorder."""

    @functools.wraps(function)
    def parse(argv=None):
        args = Recorder(**vars(function(argv)))
        vars(args).pop("_read", None)
        recorders.append(args)
        return args

    return parse


recorders = []


@pytest.fixture(scope="module")
def small_world(few_digits, small_cgn, tmp_path_factory):
    """Files for runs that take a second each: by name."""
    root = tmp_path_factory.mktemp("world")
    pretrained = root / "pretrained"
    pretrained.mkdir()
    torch.save(weights.random_vgg16_features(10), pretrained / "vgg16_features.pth")
    (pretrained / "cgn.pth").symlink_to(small_cgn / "weights.pt")
    states = load(train_cgn.SMALL_WEIGHTS)
    torch.save(states["u2net"], root / "u2net.pth")
    for split in ("train", "val"):
        for index in (0, 400):
            folder = root / "imagenet" / split / imagenet.imagenet_metadata()["wnids"][index]
            folder.mkdir(parents=True)
            for picture in range(2):
                Image.new("RGB", (40, 30), (index // 2, 99, 0)).save(folder / f"{picture}.jpg")
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = root / "folder" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (40, 30), (200, 99, 0)).save(folder / "a.png")
    for variant in ("mixed_same", "mixed_rand"):
        folder = root / "in9" / variant / "val" / "00_dog"
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(folder / "a.jpg")
    cue = root / "cue" / "cat"
    cue.mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(cue / "cat1-dog2.png")
    for kind in ("object", "background"):
        folder = root / "textures" / kind
        folder.mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (40, 40), (20 * index, 99, 0)).save(folder / f"{index}.png")
    places = {"ROOT": root, "PRETRAINED": pretrained, "DIGITS": few_digits}
    flags = f"--dataset imagenet --weights {small_cgn / 'weights.pt'} --device cpu".split()
    run("generate.py", *flags, "--n", 4, "--batch-size", 4, "--out", root / "imagenet-cf")
    flags = "--dataset colored_mnist --device cpu --n 80".split()
    run("generate.py", *flags, "--out", root / "digits-cf")
    return places


TRAIN = "train_cgn --out OUT --device cpu --weights-dir PRETRAINED --log-every 3 --save-every 9"
CLASSIFY = "train_classifier --out OUT --device cpu --data-dir DIGITS"
ENSEMBLE = (
    "train_classifier --dataset imagenet --out OUT --device cpu --data-dir ROOT/imagenet --arch"
    " resnet18 --workers 0 --image-size 32 --batch-size 2"
)
SMALL = " ".join(SMALL_IMAGENET).replace("--offline", "--u2net ROOT/u2net.pth")
# One run for each mode of each script: between them, everything that can be asked for.
MODES = {
    "variant": f"{TRAIN} --dataset colored_mnist --data-dir DIGITS --warmup 1 --max-steps 9"
    " --batch-size 16 --segmenter-steps 2",
    "textures": f"{TRAIN} --dataset wildlife_mnist --data-dir DIGITS --warmup 1 --max-steps 9"
    " --batch-size 16 --segmenter-steps 2 --textures ROOT/textures",
    "folder": f"{TRAIN} --dataset images --data-dir ROOT/folder --batch-size 2 --warmup 1"
    " --max-steps 9 --segmenter-steps 2",
    "imagenet": f"{TRAIN} {SMALL} --max-steps 2 --sample-every 1",
    "sheets": "generate --out OUT --device cpu",
    "data set": "generate --out OUT --device cpu --n 3",
    "factual": "generate --out OUT --device cpu --n 3 --factual",
    "shapes": "generate --out OUT --device cpu --n 3 --shapes real --data-dir DIGITS",
    "parts": "generate --dataset imagenet --weights-dir PRETRAINED --out OUT --device cpu",
    "pictures": "generate --dataset imagenet --weights-dir PRETRAINED --out OUT --device cpu --n 2"
    " --batch-size 2",
    "real": "generate --dataset imagenet --weights-dir PRETRAINED --out OUT --device cpu --n 2"
    " --batch-size 2 --shapes real --images ROOT/imagenet/val --mask-range 0 1",
    "score": "generate --dataset imagenet --weights-dir PRETRAINED --out OUT --device cpu --offline"
    " --score 10",
    "morph": "generate --dataset imagenet --weights-dir PRETRAINED --out OUT --device cpu"
    " --interpolate all --to zebra --frames 2",
    "original": f"{CLASSIFY} --dataset colored_mnist --epochs 1",
    "irm": f"{CLASSIFY} --dataset wildlife_mnist --epochs 1 --method irm",
    "lnl": f"{CLASSIFY} --dataset colored_mnist --epochs 1 --method lnl",
    "both": f"{CLASSIFY} --dataset colored_mnist --epochs 1 --train both"
    " --counterfactual ROOT/digits-cf",
    "evaluate": f"{CLASSIFY} --dataset colored_mnist --evaluate --weights ROOT/digit.pt"
    " --counterfactual ROOT/digits-cf",
    "classify folder": "train_classifier --out OUT --device cpu --dataset images --data-dir"
    " ROOT/folder --epochs 2 --batch-size 2 --test B=ROOT/folder/test",
    "ensemble": f"{ENSEMBLE} --offline --epochs 1 --counterfactual ROOT/imagenet-cf --baseline"
    " --imagenet9 ROOT/in9 --cue-conflict ROOT/cue --ood A=ROOT/imagenet/val --explain 2",
    "tests": f"{ENSEMBLE} --offline --evaluate --weights ROOT/ensemble.pt --baseline"
    " --imagenet9 ROOT/in9 --counterfactual ROOT/imagenet-cf",
}
# Flags that a run of such a mode does not read, and need not.
SELDOM_READ = {"bad_steps", "preset"}  # when a step is skipped; before the parser is built
NOT_READ = {  # where files are looked for that the run does not need
    "imagenet": {"biggan"},
    "ensemble": {"weights_dir", "pretrained"},
    "tests": {"weights_dir", "pretrained"},
}


def changed_value(action):
    """Words for a flag's value that are not its default."""
    if action.nargs == 0:
        return []
    if action.choices:
        return [next(str(c) for c in action.choices if c not in (action.default, [action.default]))]
    repeats = action.nargs if isinstance(action.nargs, int) else 1
    if action.type in (runs.fraction, runs.truncation):
        return ["0.25", "0.75"][:repeats]
    if action.dest in ("ood", "test"):
        return ["B=x"]
    return ["7"] * repeats


def test_a_variant_needs_no_settings_of_its_own(monkeypatch, tmp_path):
    """A new row of VARIANTS is enough for all three scripts."""
    monkeypatch.setitem(mnist.VARIANTS, "striped_mnist", mnist.VARIANTS["colored_mnist"])
    for preset in ([], ["--preset", "published"]):
        args = train_cgn.parse_args(["--dataset", "striped_mnist", "--out", str(tmp_path), *preset])
        assert args.style_weights
    for module in (generate, train_classifier):
        assert module.parse_args(["--dataset", "striped_mnist", "--out", str(tmp_path)])


@pytest.mark.parametrize("mode", MODES)
def test_every_flag_is_used_or_refused(mode, small_world, tmp_path, monkeypatch, capsys):
    """A flag that a mode accepts is read in a run of that mode; any other is refused there."""
    script, *flags = MODES[mode].split()
    for word, path in small_world.items():
        flags = [flag.replace(word, str(path)) for flag in flags]
    flags = [flag.replace("OUT", str(tmp_path / "out")) for flag in flags]
    module = importlib.import_module(script)
    if "evaluate" in MODES[mode]:
        save_weights_to_evaluate(small_world["ROOT"])
    plain_parse = module.parse_args
    monkeypatch.setattr(module, "parse_args", recorded(plain_parse))
    monkeypatch.setattr(sys, "argv", [script, *flags])
    runs.run_main(module.main)
    capsys.readouterr()
    args = recorders.pop()
    read = vars(args)["_read"] | SELDOM_READ | NOT_READ.get(mode, set())

    unread = []
    for action in actions_of(script, args.dataset or "colored_mnist", monkeypatch):
        if action.dest in read or action.dest == "help":
            continue
        try:
            plain_parse([*flags, action.option_strings[0], *changed_value(action)])
            unread.append(action.option_strings[0])
        except SystemExit as stop:
            assert stop.code == 2
            assert action.option_strings[0] in capsys.readouterr().err
    assert unread == [], "accepted, but nothing uses them"


def save_weights_to_evaluate(root):
    """Weights of a digit classifier and of an ensemble."""
    from train_classifier import Ensemble, MnistClassifier

    torch.save(MnistClassifier().state_dict(), root / "digit.pt")
    content = {"ensemble": Ensemble("resnet18").state_dict(), "arch": "resnet18"}
    torch.save(content, root / "ensemble.pt")


# --------------------------------------------------------------------------------------------------
# A dot before a command: a run that works. Else: one line and exit code 2.

RUNS = """
. train_cgn TINY --batch-size 1
. train_cgn TINY --batch-size 96 --max-steps 1
. train_cgn TINY --ema 0
. train_cgn TINY --ema 1
. train_cgn TINY --lr 0 --norm-lr 0
. train_cgn TINY --init-gain 0
. train_cgn TINY --init kaiming --init-gain 1e30
. train_cgn TINY --binary-weight 1e30
. train_cgn TINY --binary-weight 0 --border-weight 0 --frame-weight 0 --warmup 0
. train_cgn TINY --warmup 2147483647
. train_cgn TINY --frame-weight 0 --warmup 0
. train_cgn TINY --ndf 1 --discriminator conv
. train_cgn TINY --ndf 1 --discriminator linear
. train_cgn TINY --seed 2147483647
. train_cgn TINY --log-every 2147483647 --save-every 2147483647
. train_cgn TINY --sample-every 1 --max-steps 2
. train_cgn TINY --labels uniform --style-every 2147483647
. train_cgn TINY --bad-steps 1
. train_cgn TINY --amp bf16
. train_cgn TINY --resume
. train_cgn TINY --max-steps 0 --weights GENERATORFILE --segmenter-steps 1
train_cgn TINY --max-steps 0
train_cgn TINY --weights GENERATORFILE --init normal
train_cgn TINY --weights GENERATORFILE --mask-gain 2
train_cgn TINY --offline
train_cgn TINY --mask-gain 0
train_cgn --dataset imagenet --preset small --offline --weights NOWHERE --u2net NOWHERE --out OUT
train_cgn --dataset imagenet --preset small --offline --max-steps 0 --out OUT
train_cgn TINY --epochs 2147483647 --max-steps 1
train_cgn TINY --textures NOWHERE
train_cgn TINY --batch-size 2147483647
train_cgn TINY --ndf 2147483647
train_cgn TINY --ndf 100000 --discriminator conv
train_cgn TINY --preset small
train_cgn TINY --accumulate 3
train_cgn TINY --compile
train_cgn TINY --seeds 1 2
train_cgn TINY --steps 3
train_cgn TINY --init xavier
train_cgn TINY --weights DIGITS
train_cgn TINY --kernels triton --device meta
train_cgn TINY --device banana
train_cgn TINY --resume OUT
train_cgn --dataset wildlife_mnist --data-dir DIGITS --textures NOWHERE --out OUT
train_cgn --dataset imagenet --preset small --offline --truncation 0 --out OUT
train_cgn --dataset imagenet --preset small --offline --style-every 3 --out OUT
train_cgn --dataset imagenet --preset small --offline --lr 1e-4 --out OUT
train_cgn --dataset imagenet --preset published --offline --out OUT
. generate GENERATOR --n 1 --per-shape 2147483647
. generate GENERATOR --n 3 --batch-size 2147483647
. generate GENERATOR --n 3 --seed 2147483647
. generate GENERATOR --n 3 --factual --raw-weights
. generate GENERATOR --factual --n 5
. generate GENERATOR --n 3 --jitter 1e30
. generate GENERATOR --n 3 --mix 1e30
. generate GENERATOR --n 3 --resume auto
generate GENERATOR --n 3 --resume other
generate GENERATOR --n 3 --start 2
generate GENERATOR --n 3 --truncation 0.3
generate GENERATOR --n 3 --save mask
generate GENERATOR --n 3 --dataset cifar
generate GENERATOR --n 3 --dataset imagenet
generate GENERATOR --n 3 --factual --jitter 0.3
generate GENERATOR --per-shape 3
generate GENERATOR --mix 0.2
generate GENERATOR --shapes real --data-dir DIGITS --n 3
generate GENERATOR --images DIGITS
generate --n 3 --dataset imagenet --factual --out OUT
. generate --n 3 --out OUT
generate --n 3 --dataset cifar --out OUT
generate --dataset imagenet --mode best --classes imagenette --out OUT
. train_classifier DIGIT --batch-size 2147483647
. train_classifier DIGIT --batch-size 1
. train_classifier DIGIT --epoch-steps 2147483647 --max-steps 1
. train_classifier DIGIT --lr 0 --gamma 0
. train_classifier DIGIT --gamma 1e30 --epochs 2
. train_classifier DIGIT --seeds 1 1
. train_classifier DIGIT --seeds 2147483647 --seed 2147483647
. train_classifier DIGIT --explain 2147483647
. train_classifier DIGIT --bad-steps 1
. train_classifier DIGIT --max-steps 1
. train_classifier DIGIT --method irm --environments 64 --penalty 1e30
. train_classifier DIGIT --method lnl --penalty 0 --augment 1
train_classifier DIGIT --train both
train_classifier DIGIT --train both --offline
train_classifier DIGIT --method irm --environments 65
train_classifier DIGIT --method erm
train_classifier DIGIT --penalty 3
train_classifier DIGIT --counterfactual NOWHERE
train_classifier DIGIT --train counterfactual --counterfactual DIGITS
train_classifier DIGIT --weights GENERATORFILE
train_classifier DIGIT --evaluate
train_classifier DIGIT --offline
train_classifier DIGIT --arch resnet18
train_classifier DIGIT --workers 2
train_classifier --dataset imagenet --data-dir NOWHERE --offline --batch-size 2147483647 --out OUT
train_classifier --dataset imagenet --evaluate --weights NOWHERE --out OUT
"""


@pytest.fixture(scope="module")
def words(few_digits, untrained, tmp_path_factory):
    """What the words in capitals stand for."""
    train = (
        f"--dataset colored_mnist --data-dir {few_digits} --style-weights 0 0 0 0 --device cpu"
        " --ndf 16 --batch-size 8 --max-steps 3 --warmup 1 --segmenter-steps 0 --out OUT"
    )
    digit = (
        f"--dataset colored_mnist --data-dir {few_digits} --device cpu --epochs 1 --epoch-steps 2"
        " --out OUT"
    )
    return {
        "TINY": train,
        "DIGIT": digit,
        "DIGITS": str(few_digits),
        "NOWHERE": str(tmp_path_factory.mktemp("words") / "nowhere"),
        "GENERATORFILE": str(untrained),
        "GENERATOR": f"--weights {untrained} --device cpu --out OUT",
    }


@pytest.mark.parametrize("command", RUNS.strip().splitlines())
def test_extremes_and_contradictions(command, words, tmp_path, monkeypatch, capsys):
    works = command.startswith(". ")
    script, *flags = [words.get(word, word) for word in command.removeprefix(". ").split(" ")]
    flags = shlex.split(" ".join(flags).replace("OUT", str(tmp_path / "out")))
    monkeypatch.setattr(sys, "argv", [script, *flags])
    code = 0
    try:
        runs.run_main(importlib.import_module(script).main)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == (0 if works else 2), error
    assert works or [line.count("error: ") for line in error.splitlines()].count(1) == 1
    if works and script == "train_cgn":
        state = load(tmp_path / "out" / "checkpoint.pt")
        assert all(value.isfinite().all() for value in state["average"].values())
