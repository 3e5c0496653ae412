"""Digit classifiers: their network, the methods that the paper compares with, what they train on,
and how they resume.
"""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import contents, load, run, same
from torch.testing import assert_close

import train_classifier

# --------------------------------------------------------------------------------------------------
# The network and the two methods


@pytest.mark.parametrize("training", [True, False])
def test_the_classifier_is_its_layers_one_after_the_other(training):
    """The BatchNorm within the first convolution changes nothing: predictions, gradients, running
    statistics.
    """
    torch.manual_seed(0)
    fused = train_classifier.MnistClassifier().double().train(training)
    for parameter in fused.model[0].parameters():
        torch.nn.init.uniform_(parameter, 0.5, 2)
    layers = copy.deepcopy(fused)
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)

    predictions = fused(x)
    expected = layers.log_probabilities(layers.model[:-1](x))
    assert_close(predictions, expected)
    predictions[:, 0].sum().backward()
    expected[:, 0].sum().backward()
    for a, b in zip(fused.parameters(), layers.parameters()):
        assert_close(a.grad, b.grad)
    assert_close(fused.model[0].running_mean, layers.model[0].running_mean)
    assert_close(fused.model[0].running_var, layers.model[0].running_var)


def test_environments_mix_colors_more_and_more():
    x = torch.full((4000, 3, 2, 2), 0.0)
    generator = torch.Generator().manual_seed(0)
    mixed, environment = train_classifier.mix_colors(x, 4, generator)
    assert environment.tolist() == [0, 1, 2, 3] * 1000
    assert mixed.abs().max() <= 1
    spread = [mixed[environment == e].std().item() for e in range(4)]
    assert spread[0] == 0
    assert spread == sorted(spread)
    assert torch.equal(mixed[environment == 0], x[:1000])
    # One color stays one color.
    assert torch.equal(mixed.amax((2, 3)), mixed.amin((2, 3)))


def test_invariance_penalty_is_the_derivative_by_a_factor_of_the_logits():
    torch.manual_seed(0)
    logits = torch.randn(12, 10, dtype=torch.float64, requires_grad=True)
    y = torch.randint(10, (12,))
    environment = torch.arange(12) % 3

    expected = 0
    for e in range(3):
        factor = torch.ones((), dtype=torch.float64, requires_grad=True)
        members = environment == e
        risk = F.cross_entropy(factor * logits[members], y[members])
        (derivative,) = torch.autograd.grad(risk, factor, create_graph=True)
        expected = expected + derivative**2 / 3
    penalty = train_classifier.invariance_penalty(logits.log_softmax(1), y, environment, 3)
    assert_close(penalty, expected)
    assert_close(torch.autograd.grad(penalty, logits), torch.autograd.grad(expected, logits))


def test_learning_not_to_learn_trains_the_head_and_misleads_the_features():
    torch.manual_seed(0)
    head = train_classifier.ColorHead(4).double()
    features = torch.randn(16, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    x = torch.rand(16, 3, 8, 8)
    ranks = []
    for column in x.mean((2, 3)).t().tolist():
        ranks.append([sum(other < own for other in column) for own in column])
    colors = torch.tensor(ranks).t() // 2  # 16 ranks in 8 bins

    logits = head.layers(features)
    truth = F.cross_entropy(logits, colors)
    negative_entropy = (logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    loss = head.loss(features, x, 0.5)
    assert_close(loss, truth + 0.05 * negative_entropy)

    parameters = list(head.parameters())
    of_head = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert_close(of_head, torch.autograd.grad(truth, parameters, retain_graph=True))
    reversed_loss = -0.5 * truth + 0.05 * negative_entropy
    (of_features,) = torch.autograd.grad(loss, features)
    assert_close(of_features, torch.autograd.grad(reversed_loss, features)[0])


# --------------------------------------------------------------------------------------------------
# What they train on


@pytest.fixture(scope="module")
def colored(few_digits):
    """Flags of a classifier of colored digits. An epoch of the 96 has ten steps."""
    flags = f"--dataset colored_mnist --data-dir {few_digits} --device cpu --batch-size 10"
    return flags.split()


@pytest.fixture(scope="module")
def counterfactuals(tmp_path_factory):
    """Two data sets of the bundled generator: folders with 700 and 300 images."""
    folder = tmp_path_factory.mktemp("counterfactuals")
    for n, seed in ((700, 0), (300, 1)):
        flags = ["--n", n, "--seed", seed, "--device", "cpu"]
        run("generate.py", *flags, "--out", folder / str(n))
    return folder / "700", folder / "300"


def test_other_training_sets(digits_dir, counterfactuals, tmp_path):
    flags = f"--dataset colored_mnist --data-dir {digits_dir} --device cpu --batch-size 32"
    flags = [*flags.split(), "--epochs", 4, "--epoch-steps", 20]
    generated = ["both", "--counterfactual", counterfactuals[0]]
    for train in (["decorrelated"], generated):
        out = tmp_path / train[0]
        run("train_classifier.py", *flags, "--train", *train, "--out", out)
        content = json.loads((out / "results.json").read_text())
        summary = content["summary"]
        decorrelated = summary["decorrelated"]["mean"]
        assert decorrelated > 10
        assert summary["biased"]["mean"] > 10
        if train == ["decorrelated"]:
            # The colors say nothing: the two test sets do not differ much.
            assert abs(decorrelated - summary["correlated"]["mean"]) < 15


def test_decorrelated_accuracy_in_two_parts(digits_dir, tmp_path):
    """A classifier that follows the background is right where it tells the digit, and there alone
    if the object has its class as well.
    """
    flags = f"--dataset double_colored_mnist --data-dir {digits_dir} --out {tmp_path}".split()
    args = train_classifier.parse_args(flags)
    data = train_classifier.load_digit_data(args, torch.device("cpu"))
    assert 0 < data.one_class.sum() < len(data.one_class) / 4
    palette = data.original.palettes[1] * 2 - 1  # (10, 3) in [-1, 1]

    class Background(torch.nn.Module):
        def forward(self, x):
            distance = (x[:, None, :, 0, 0] - palette).square().sum(2)
            return -distance

    metrics = train_classifier.measure_digits(Background(), data)
    assert metrics["biased"] > 95 and metrics["correlated"] > 95
    right = train_classifier.correct_predictions(Background(), *data.test_sets["decorrelated"])
    assert metrics["decorrelated"] == 100 * right.double().mean()
    for name, part in (("one class", data.one_class), ("two classes", ~data.one_class)):
        assert metrics[name] == pytest.approx(100 * right[part].double().mean().item())
    black = train_classifier.parse_args(["--dataset", "colored_mnist", *flags[2:]])
    assert train_classifier.load_digit_data(black, torch.device("cpu")).one_class is None


def test_epochs_longer_than_the_data(few_digits, tmp_path):
    """The images are taken again, in colors drawn anew; resuming between gives the same bits."""
    flags = f"--dataset double_colored_mnist --data-dir {few_digits} --device cpu".split()
    # The 80 images are 9 batches of 9: 20 steps are two turns and the first two of a third.
    flags += ["--train", "decorrelated", "--epochs", "2", "--epoch-steps", "20"]
    flags += ["--batch-size", "9"]
    run("train_classifier.py", *flags, "--out", tmp_path / "run")
    lines = epoch_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [20, 40]
    assert all(line["loss"] > 0 for line in lines)
    run("train_classifier.py", *flags, "--out", tmp_path / "parts", "--max-steps", 13)
    run("train_classifier.py", *flags, "--out", tmp_path / "parts", "--resume")
    whole, parts = (load(tmp_path / name / "seed_0" / "weights.pt") for name in ("run", "parts"))
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name

    args = train_classifier.parse_args([*flags, "--out", str(tmp_path / "run")])
    data = train_classifier.load_digit_data(args, torch.device("cpu"))
    images, labels = train_classifier.training_images(args, data, 0)
    others, other_labels = train_classifier.training_images(args, data, 1)
    assert torch.equal(labels, other_labels) and not torch.equal(images, others)


def test_several_counterfactual_sets_are_used_together(colored, counterfactuals, tmp_path):
    content = [load(folder / "chunk_00000.pt") for folder in counterfactuals]
    images = torch.cat([part["images"] for part in content])
    labels = torch.cat([part["labels"] for part in content])
    shapes = labels[:, 0].long()
    flags = [*colored, "--counterfactual", *counterfactuals, "--out", tmp_path / "run"]
    for train, count in (("counterfactual", 1000), ("both", 1096)):
        argv = [str(flag) for flag in (*flags, "--train", train)]
        args = train_classifier.parse_args(argv)
        data = train_classifier.load_digit_data(args, torch.device("cpu"))
        found, y = train_classifier.training_images(args, data, 0)
        assert len(found) == len(y) == count
        assert train_classifier.count_training_images(args, data) == count
        assert torch.equal(found[-1000:], images)
        assert torch.equal(y[-1000:], shapes)

    run("train_classifier.py", *flags, "--train", "both", "--epochs", 1)
    (line,) = epoch_lines(tmp_path / "run")
    assert line["step"] == 1096 // 10 + 1


# --------------------------------------------------------------------------------------------------
# Resuming


def test_a_run_with_other_images_is_refused_and_keeps_its_description(
    colored, counterfactuals, tmp_path
):
    flags = ["train_classifier.py", *colored, "--train", "counterfactual", "--epochs", 1]
    flags += ["--epoch-steps", 2, "--out", tmp_path]
    run(*flags, "--counterfactual", *counterfactuals)
    before = (tmp_path / "args.json").read_text()
    one = ["--counterfactual", counterfactuals[0], "--resume"]
    done = run(*flags, *one, expect=2)
    assert "made with training_images = 1000, not 700" in done.stderr
    evaluate = ["--evaluate", "--weights", tmp_path / "seed_0" / "weights.pt", "--resume"]
    done = run("train_classifier.py", *colored[:6], *evaluate, "--out", tmp_path, expect=2)
    assert "made with evaluate = False, not True" in done.stderr
    assert (tmp_path / "args.json").read_text() == before


def epoch_lines(out):
    """The lines of a run's first log that end an epoch."""
    lines = (out / "seed_0" / "log.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    return [line for line in lines if "epoch" in line]


@pytest.fixture(scope="module")
def whole(colored, tmp_path_factory):
    """A run folder after three epochs."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run("train_classifier.py", *colored, "--epochs", 3, "--log-every", 1, "--out", out)
    return out


def check_same(whole, found):
    """The folders of two runs hold the same."""
    whole = contents(whole)
    found = contents(found)
    assert whole.keys() == found.keys()
    for name in whole:
        assert same(whole[name], found[name]), name


def test_a_run_that_was_cut_ends_like_a_whole_one(colored, whole, tmp_path):
    """Cut in the middle of the second epoch, and after it."""
    out = tmp_path / "run"
    flags = ["train_classifier.py", *colored, "--log-every", 1, "--out", out]
    run(*flags, "--max-steps", 14)
    checkpoint = load(out / "seed_0" / "checkpoint.pt")
    parts = {"classifier", "color_head", "optimizers", "args", "step", "window"}
    assert checkpoint.keys() == parts | {"epoch", "sums", "best", "metrics"}
    assert checkpoint["step"] == 14
    assert checkpoint["epoch"] == 1
    first, cut = epoch_lines(out)
    assert first["step"] == 10
    assert cut["step"] == 14
    assert checkpoint["best"] == first["biased"]  # the cut epoch does not count

    run(*flags, "--epochs", 2, "--resume")
    checkpoint = load(out / "seed_0" / "checkpoint.pt")
    assert checkpoint["step"] == 20
    assert checkpoint["epoch"] == 2
    run(*flags, "--epochs", 3, "--resume")
    steps = [line["step"] for line in epoch_lines(out)]
    assert steps == [10, 20, 30]
    check_same(whole, out)


@pytest.mark.parametrize("method", ["irm --environments 5", "lnl"])
def test_the_methods_resume_with_several_seeds(colored, tmp_path, method):
    flags = f"--method {method} --log-every 1 --seeds 0 3".split()
    flags = [*colored, *flags]
    run("train_classifier.py", *flags, "--epochs", 2, "--out", tmp_path / "whole")
    run("train_classifier.py", *flags, "--max-steps", 14, "--out", tmp_path / "cut")
    run("train_classifier.py", *flags, "--epochs", 2, "--resume", "--out", tmp_path / "cut")
    check_same(tmp_path / "whole", tmp_path / "cut")

    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["seeds"].keys() == {"0", "3"}
    for name in ("train", "decorrelated", "correlated", "biased"):
        summary = results["summary"][name]
        a, b = (seed[name] for seed in results["seeds"].values())
        assert summary["mean"] == pytest.approx((a + b) / 2)
        assert summary["std"] == pytest.approx(abs(a - b) / 2**0.5)
