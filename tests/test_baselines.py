"""What the digit classifiers are compared with: penalties against numbers by hand, and what they do to a shortcut."""
import copy
import json

import pytest
import torch

from conftest import load, run, same
from data.baselines import ColourHead, ReverseGradient, invariance_penalty, shaken_colours
from train_classifier import MnistClassifier


def test_environments_shake_colours_more_and_more():
    x = torch.full((4000, 3, 2, 2), 0.0)
    shaken, environment = shaken_colours(x, 4, torch.Generator().manual_seed(0))
    assert environment.tolist() == [0, 1, 2, 3] * 1000 and shaken.abs().max() <= 1
    spread = [shaken[environment == e].std().item() for e in range(4)]
    assert spread[0] == 0 and spread == sorted(spread) and torch.equal(shaken[environment == 0], x[:1000])
    assert (shaken.amax((2, 3)) == shaken.amin((2, 3))).all()                    # one colour stays one colour


def test_invariance_penalty_is_the_derivative_by_a_factor_of_the_logits():
    torch.manual_seed(0)
    logits, y = torch.randn(12, 10, dtype=torch.float64, requires_grad=True), torch.randint(10, (12,))
    environment, want = torch.arange(12) % 3, 0
    for e in range(3):
        factor, mine = torch.ones((), dtype=torch.float64, requires_grad=True), environment == e
        risk = torch.nn.functional.cross_entropy(factor * logits[mine], y[mine])
        want = want + torch.autograd.grad(risk, factor, create_graph=True)[0] ** 2 / 3
    got = invariance_penalty(logits.log_softmax(1), y, environment, 3)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, logits), torch.autograd.grad(want, logits))


def test_learning_not_to_learn_trains_the_head_and_misleads_the_features():
    torch.manual_seed(0)
    head, features, x = ColourHead(4).double(), torch.randn(16, 4, 8, 8, dtype=torch.float64, requires_grad=True), torch.rand(16, 3, 8, 8)
    ranks = torch.tensor([[sum(other < mine for other in column) for mine in column] for column in x.mean((2, 3)).t().tolist()])
    logits, parameters = head.layers(features), list(head.parameters())
    truth = torch.nn.functional.cross_entropy(logits, ranks.t() // 2)            # 16 ranks in 8 bins
    negative_entropy = (logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    loss = head.loss(features, x, 0.5)
    torch.testing.assert_close(loss, truth + 0.05 * negative_entropy)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters, retain_graph=True),
                               torch.autograd.grad(truth, parameters, retain_graph=True))
    torch.testing.assert_close(torch.autograd.grad(loss, features)[0],
                               torch.autograd.grad(-0.5 * truth + 0.05 * negative_entropy, features)[0])


def test_the_gradient_is_reversed():
    x = torch.ones(3, requires_grad=True)
    ReverseGradient.apply(x, 0.5).sum().backward()
    assert x.grad.tolist() == [-0.5] * 3


@pytest.mark.parametrize("training", [True, False])
def test_the_classifier_is_its_layers_one_after_the_other(training):
    """The BatchNorm within the first convolution changes nothing: answers, gradients, running statistics."""
    torch.manual_seed(0)
    fused = MnistClassifier().double().train(training)
    for p in fused.model[0].parameters():
        torch.nn.init.uniform_(p, 0.5, 2)
    layers, x = copy.deepcopy(fused), torch.randn(8, 3, 32, 32, dtype=torch.float64)
    answers = fused(x), layers.answer(layers.model[:-1](x))
    torch.testing.assert_close(*answers)
    for answer in answers:
        answer[:, 0].sum().backward()
    for a, b in zip(fused.parameters(), layers.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(fused.model[0], name), getattr(layers.model[0], name))


@pytest.mark.parametrize("flags", [["--method", "irm", "--environments", 5], ["--method", "lnl"]], ids=str)
def test_baselines_train_and_resume(digits_dir, tmp_path, flags):
    common = ["--dataset", "colored_mnist", "--data-dir", digits_dir, "--device", "cpu", *flags]
    run("train_classifier.py", *common, "--epochs", 2, "--out", tmp_path / "whole")
    run("train_classifier.py", *common, "--epochs", 1, "--out", tmp_path / "halves")
    run("train_classifier.py", *common, "--epochs", 2, "--resume", "--out", tmp_path / "halves")
    whole, halves = (load(tmp_path / name / "seed_0" / "checkpoint.pt") for name in ("whole", "halves"))
    assert same(whole["classifier"], halves["classifier"]) and same(whole["colour_head"], halves["colour_head"])


@pytest.mark.parametrize("flags, better", [(["--train", "decorrelated"], True), (["--train", "both", "--n", 700], None)], ids=str)
def test_other_training_sets(digits_dir, tmp_path, flags, better):
    run("train_classifier.py", "--dataset", "colored_mnist", "--data-dir", digits_dir, "--device", "cpu", *flags, "--epochs", 4,
        "--out", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "results.json").read_text())["summary"]
    assert summary["decorrelated"]["mean"] > 10 and summary["biased"]["mean"] > 10
    if better:                                             # colours that say nothing: the tests do not differ much
        assert abs(summary["decorrelated"]["mean"] - summary["correlated"]["mean"]) < 15
