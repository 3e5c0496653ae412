"""Every flag of every script with wrong values, extremes and contradictions: one line and exit code 2, or a run that works."""
import argparse
import importlib
import math
import shlex
import sys

import pytest
import torch

import train_cgn
from data.runs import HELD, run_main, save_tensors

SCRIPTS = ["train_cgn", "generate", "train_classifier"]
WRONG = ["", " ", "x", "-1", "-0.5", "nan", "inf", "-inf", "1e400", "9" * 30, "9" * 5_000, "0x10", "1e", "1,5", "\0", "--", "é"]


def options(script, monkeypatch):
    """The options of a script's parser."""
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda parser, argv: found.append(parser) or sys.exit(0))
        with pytest.raises(SystemExit):
            importlib.import_module(script).parse_args(["--dataset", "colored_mnist"])
    return [action for action in found[0]._actions if action.option_strings and action.nargs != 0]


@pytest.mark.parametrize("dataset", ["colored_mnist", "imagenet"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_values_of_every_flag(script, dataset, monkeypatch, capsys):
    parse = importlib.import_module(script).parse_args
    actions = options(script, monkeypatch)
    assert len(actions) > 20
    for action in actions:
        for value in WRONG:
            flags = [action.option_strings[0], *[value] * (action.nargs if isinstance(action.nargs, int) else 1)]
            try:
                args = parse(["--dataset", dataset, "--out", "x", *flags])
            except SystemExit as stop:
                error = capsys.readouterr().err
                assert stop.code == 2 and error.count("error: ") == 1 and "Traceback" not in error, flags
            else:
                found = getattr(args, action.dest)
                numbers = [x for x in (found if isinstance(found, list) else [found]) if isinstance(x, (int, float))]
                assert all(math.isfinite(x) and 0 <= x < 2 ** 31 or isinstance(x, float) for x in numbers), flags
                assert action.type in (None,) or not isinstance(found, str) or action.type is str, flags


# A dot before a command: a run that works. Else: one line and exit code 2.
RUNS = """
. train_cgn TINY --batch-size 1
. train_cgn TINY --batch-size 600 --max-steps 1
. train_cgn TINY --ema 0
. train_cgn TINY --ema 1
. train_cgn TINY --lr 0 --norm-lr 0
. train_cgn TINY --init-gain 0
. train_cgn TINY --init kaiming --init-gain 1e30
. train_cgn TINY --binary-weight 1e30
. train_cgn TINY --binary-weight 0 --border-weight 0 --frame-weight 0 --warmup 2147483647
. train_cgn TINY --warmup 2147483647
. train_cgn TINY --frame-weight 0
. train_cgn TINY --ndf 1 --discriminator conv
. train_cgn TINY --ndf 1 --discriminator linear
. train_cgn TINY --seed 2147483647
. train_cgn TINY --log-every 2147483647 --save-every 2147483647
. train_cgn TINY --sample-every 1 --max-steps 2
. train_cgn TINY --labels uniform --style-every 2147483647
. train_cgn TINY --epochs 2147483647 --max-steps 1
. train_cgn TINY --bad-steps 1
. train_cgn TINY --amp bf16
. train_cgn TINY --textures NOWHERE
. train_cgn TINY --resume
train_cgn TINY --batch-size 2147483647
train_cgn TINY --ndf 2147483647
train_cgn TINY --ndf 100000 --discriminator conv
train_cgn TINY --preset small
train_cgn TINY --accumulate 3
train_cgn TINY --compile
train_cgn TINY --weights DIGITS
train_cgn TINY --kernels triton --device meta
train_cgn TINY --device banana
train_cgn TINY --resume OUT
train_cgn --dataset wildlife_mnist --data-dir DIGITS --textures NOWHERE --out OUT
train_cgn --dataset imagenet --preset small --offline --truncation 0 --out OUT
train_cgn --dataset imagenet --preset small --offline --style-every 3 --out OUT
train_cgn --dataset imagenet --preset small --offline --lr 1e-4 --out OUT
. generate GENERATOR --n 1 --per-shape 2147483647
. generate GENERATOR --n 3 --batch-size 2147483647
. generate GENERATOR --n 3 --seed 2147483647
. generate GENERATOR --n 3 --factual --raw-weights
. generate GENERATOR --factual --n 5
. generate GENERATOR --n 3 --jitter 1e30
. generate GENERATOR --n 3 --resume auto
generate GENERATOR --n 3 --resume other
generate GENERATOR --n 3 --start 2
generate GENERATOR --n 3 --truncation 0.3
generate GENERATOR --n 3 --save mask
generate GENERATOR --n 3 --dataset cifar
generate GENERATOR --n 3 --dataset imagenet
generate --n 3 --dataset imagenet --factual --out OUT
. generate --n 3 --out OUT
generate --n 3 --dataset cifar --out OUT
. train_classifier DIGIT --batch-size 2147483647
. train_classifier DIGIT --lr 0 --gamma 0
. train_classifier DIGIT --gamma 1e30 --epochs 2
. train_classifier DIGIT --seeds 1 1
. train_classifier DIGIT --seeds 2147483647 --seed 2147483647
. train_classifier DIGIT --explain 2147483647
. train_classifier DIGIT --bad-steps 1
. train_classifier DIGIT --train both --n 50
train_classifier DIGIT --train both --offline
. train_classifier DIGIT --method irm --environments 64 --penalty 1e30
. train_classifier DIGIT --method lnl --penalty 0 --augment 1
train_classifier DIGIT --method irm --environments 65
train_classifier DIGIT --method erm
train_classifier DIGIT --counterfactual NOWHERE
train_classifier DIGIT --train counterfactual --counterfactual DIGITS
train_classifier DIGIT --weights GENERATORFILE
train_classifier DIGIT --evaluate
train_classifier DIGIT --arch resnet18
train_classifier DIGIT --workers 2
train_classifier --dataset imagenet --data-dir NOWHERE --offline --batch-size 2147483647 --out OUT
train_classifier --dataset imagenet --evaluate --weights NOWHERE --out OUT
"""


@pytest.fixture(scope="module")
def words(digits_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    cgn = train_cgn.MnistCGN()
    save_tensors(folder / "weights.pt", {"generator": cgn.state_dict(), "average": cgn.state_dict(), "step": 0,
                                         "args": {"dataset": "colored_mnist", "offline": False}})
    train = (f"--dataset colored_mnist --data-dir {digits_dir} --style-weights 0 0 0 0 --device cpu --ndf 16 --max-steps 3 "
             "--warmup 1 --out OUT")
    return {"TINY": train, "DIGITS": str(digits_dir), "NOWHERE": str(folder / "nowhere"), "GENERATORFILE": str(folder / "weights.pt"),
            "GENERATOR": f"--weights {folder / 'weights.pt'} --device cpu --out OUT",
            "DIGIT": f"--dataset colored_mnist --data-dir {digits_dir} --device cpu --epochs 1 --max-steps 2 --out OUT"}


@pytest.mark.parametrize("command", RUNS.strip().splitlines())
def test_extremes_and_contradictions(command, words, tmp_path, monkeypatch, capsys):
    works, command = command.startswith(". "), command.removeprefix(". ")
    script, *flags = [words.get(word, word) for word in command.split(" ")]
    flags = shlex.split(" ".join(flags).replace("OUT", str(tmp_path / "out")))
    monkeypatch.setattr(sys, "argv", [script, *flags])
    code = 0
    try:
        run_main(importlib.import_module(script).main)
    except SystemExit as stop:
        code = stop.code
    finally:
        HELD.clear()
    error = capsys.readouterr().err
    assert code == (0 if works else 2), error
    assert works or error.count("error: ") == 1 and len([line for line in error.splitlines() if "error: " in line]) == 1
    if works and script == "train_cgn":
        state = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
        assert all(value.isfinite().all() for value in state["average"].values())
