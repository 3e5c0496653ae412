"""Training steps as CUDA graphs, recorded and replayed here by a stand-in for a GPU's.

A recording holds operators and the very tensors that they had, so that a replay shows what a graph
would get wrong: a number of Python's that should change from step to step, a tensor that the next
step no longer uses, a value that is read in between.
"""

import copy
import functools
import json
import sys

import pytest
import torch
from conftest import load, run, same
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import generate
import train_cgn
import train_classifier
from data import imagenet, mnist
from kernels import GraphedStep, graphs, set_rate


class Recording(TorchDispatchMode):
    """A stand-in for torch.cuda.CUDAGraph and torch.cuda.graph.

    Recording runs the operators, too: it counts as the first replay.
    """

    def __init__(self):
        super().__init__()
        self.calls = []
        self.replays = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value is read while the step is recorded")
        result = operator(*args, **kwargs)
        self.calls.append((operator, args, kwargs, result))
        return result

    @torch.inference_mode()
    def replay(self):
        self.replays += 1
        if self.replays == 1:
            return
        for operator, args, kwargs, result in self.calls:
            again = operator(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def recordings(monkeypatch):
    """All recordings made in a test; CUDA's functions are replaced by them."""
    made = []

    def make():
        made.append(Recording())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    monkeypatch.setattr(torch.cuda, "graph", lambda recording, **_: recording)
    return made


def graph_or_not(monkeypatch, script, graphed):
    """Let a script's steps be graphs, or not, whatever its device."""

    def step(function, optimizers, enabled):
        return GraphedStep(function, optimizers, graphed)

    monkeypatch.setattr(script, "GraphedStep", step)


def fit_line(enabled, bad=()):
    """Weight and losses of 12 steps, two kinds of them, with a rate and an input that change."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 1)
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    noise = torch.empty(4, 3)

    def function(x, *, squared):
        noise.normal_()
        error = layer(x + 0.1 * noise) - 1
        loss = error.square().mean() if squared else error.abs().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach(), "largest": error.detach().max()}

    step = GraphedStep(function, [optimizer], enabled)
    found = []
    for number in range(12):
        torch.manual_seed(number)
        set_rate(optimizer.param_groups[0], 0.1 / (1 + number))
        found.append(step(torch.full((4, 3), float(number)), squared=number % 2 == 0))
    return layer.weight.detach(), found


def test_replayed_steps_are_those_of_the_function(recordings):
    weight, found = fit_line(enabled=False)
    assert not recordings
    graphed_weight, graphed = fit_line(enabled=True)
    assert [recording.replays for recording in recordings] == [3, 3]  # of six calls of a kind
    torch.testing.assert_close(graphed_weight, weight)
    torch.testing.assert_close(graphed, found)  # also those of earlier steps: none is overwritten


def test_the_stand_in_shows_a_number_that_should_change(recordings):
    """What a step computes with Python's numbers is fixed once it is recorded."""
    count = 0

    def function(x):
        nonlocal count
        count += 1
        return {"sum": x.sum() * count}

    step = GraphedStep(function, [], enabled=True)
    sums = [step(torch.ones(2))["sum"].item() for _ in range(6)]
    assert sums == [2, 4, 6, 8, 8, 8]


def test_a_value_that_is_read_is_an_error(recordings):
    step = GraphedStep(lambda x: {"sum": x.sum() * x.max().item()}, [], enabled=True)
    for _ in range(3):
        step(torch.ones(2))
    with pytest.raises(RuntimeError, match="a value is read"):
        step(torch.ones(2))


# Rates that are the same numbers in Python's precision and as float32 tensors.
FLAGS = f"--lr {2**-10} --norm-lr {2**-9} --warmup 6 --style-every 2 --batch-size 4 --log-every 4 "
FLAGS += "--amp off --sample-every 0 --segmenter-steps 0 --device cpu --offline"


@pytest.fixture
def train(recordings, monkeypatch, tmp_path, digits_dir):
    """A training of so many steps, graphed or not, and its checkpoint."""

    def train(name, graphed, steps, dataset, *more):
        def data(args, device):
            return mnist.load_variant(dataset, digits_dir, seed=0, device=device)[0]

        monkeypatch.setattr(graphs, "EAGER_CALLS", 1)
        graph_or_not(monkeypatch, train_cgn, graphed)
        monkeypatch.setattr(train_cgn, "load_training_images", data)
        flags = ["--dataset", dataset, *FLAGS.split(), "--max-steps", str(steps)]
        args = train_cgn.parse_args([*flags, "--out", str(tmp_path / name), *more])
        args.out.mkdir(exist_ok=True)
        train_cgn.train_mnist(args, torch.device("cpu"))
        return load(tmp_path / name / "checkpoint.pt")

    return train


def losses(folder):
    """The lines of a run's log."""
    return [json.loads(line) for line in open(folder / "log.jsonl")]


@pytest.mark.parametrize("dataset", ["colored_mnist", "wildlife_mnist"])
def test_a_graphed_training_is_the_eager_one(train, recordings, tmp_path, dataset):
    """Warm-up, plain steps, style losses and penalties, rates that fall: to the last bit."""
    eager = train("eager", False, 32, dataset)
    assert not recordings
    graphed = train("graphed", True, 32, dataset)
    assert [recording.replays for recording in recordings] == [5, 12, 9, 2]
    for part in ("generator", "average", "discriminator"):
        assert same(graphed[part], eager[part])
    assert losses(tmp_path / "graphed") == losses(tmp_path / "eager")


@pytest.mark.parametrize("first", [False, True])
def test_a_run_may_change_to_graphs_and_back(train, recordings, first):
    """With the rates and moments of its checkpoint, whichever form that has."""
    whole = train("whole", False, 28, "colored_mnist", "--decay", "0")
    train("halves", first, 16, "colored_mnist", "--decay", "0")
    resumed = train("halves", not first, 28, "colored_mnist", "--decay", "0", "--resume")
    assert recordings
    for part in ("generator", "average", "discriminator"):
        assert same(resumed[part], whole[part])


def test_graphed_batches_of_imagenet_are_eager_ones(recordings, monkeypatch, tmp_path):
    """Gradients gather over a step's batches, and begin at zero in the next step."""
    monkeypatch.setattr(graphs, "EAGER_CALLS", 1)
    flags = "--dataset imagenet --preset small --offline --amp off --device cpu --batch-size 1"
    flags += " --accumulate 2 --max-steps 2 --sample-every 0"
    args = train_cgn.parse_args([*flags.split(), "--out", str(tmp_path)])
    networks = train_cgn.load_imagenet_networks(args)
    monkeypatch.setattr(train_cgn, "load_imagenet_networks", lambda _: copy.deepcopy(networks))
    found = []
    for graphed in (False, True):
        graph_or_not(monkeypatch, train_cgn, graphed)
        args.out = tmp_path / str(graphed)
        args.out.mkdir()
        train_cgn.train_imagenet(args, torch.device("cpu"))
        found.append(load(args.out / "checkpoint.pt"))
    assert [recording.replays for recording in recordings] == [3]
    for part in ("generator", "average"):
        assert same(found[0][part], found[1][part])
    assert losses(tmp_path / "True") == losses(tmp_path / "False")


def test_graphed_segmenter_steps_are_eager_ones(recordings, monkeypatch):
    monkeypatch.setattr(graphs, "EAGER_CALLS", 1)
    cgn = train_cgn.MnistCGN().eval()
    found = []
    for graphed in (False, True):
        torch.manual_seed(0)
        segmenter = train_cgn.Segmenter(32)
        optimizer = torch.optim.Adam(segmenter.parameters(), fused=True)
        function = functools.partial(train_cgn.segmenter_step, cgn, segmenter, optimizer, False)
        step = GraphedStep(function, [optimizer], graphed)
        for number in range(4):
            torch.manual_seed(number)
            set_rate(optimizer.param_groups[0], 2.0 ** -(9 + number))
            step()
        found.append(segmenter.state_dict())
    assert [recording.replays for recording in recordings] == [3]
    assert same(*found)


def test_a_graphed_classifier_is_the_eager_one(recordings, monkeypatch, tmp_path, digits_dir):
    """Adadelta, with a rate for each epoch and a shorter last batch in each."""
    flags = ["--dataset", "colored_mnist", "--data-dir", str(digits_dir), "--device", "cpu"]
    flags += "--augment 0.5 --batch-size 128 --epochs 3 --amp off --lr 1 --gamma 0.5".split()
    several = functools.partial(torch.optim.Adadelta, foreach=True)
    monkeypatch.setattr(torch.optim, "Adadelta", several)  # as on a GPU
    module = sys.modules["torch.optim.adadelta"]
    monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])
    monkeypatch.setattr(graphs, "EAGER_CALLS", 1)
    found = []
    for graphed in (False, True):
        graph_or_not(monkeypatch, train_classifier, graphed)
        out = tmp_path / str(graphed)
        args = train_classifier.parse_args([*flags, "--out", str(out)])
        out.mkdir()
        train_classifier.classify_digits(args, torch.device("cpu"))
        found.append(load(out / "seed_0" / "checkpoint.pt"))
    assert [recording.replays for recording in recordings] == [11, 2]
    assert same(found[0]["classifier"], found[1]["classifier"])
    assert found[0]["metrics"] == found[1]["metrics"]


def test_graphed_pictures_are_eager_ones(recordings, monkeypatch, tmp_path, small_cgn):
    monkeypatch.setattr(graphs, "EAGER_CALLS", 1)
    flags = "--dataset imagenet --device cpu --n 8 --batch-size 2 --format png"
    flags += f" --save counterfactual mask --weights {small_cgn / 'weights.pt'}"
    found = []
    for graphed in (False, True):
        graph_or_not(monkeypatch, generate, graphed)
        out = tmp_path / str(graphed)
        args = generate.parse_args([*flags.split(), "--out", str(out)])
        generate.generate_imagenet(args, torch.device("cpu"))
        files = sorted(out.glob("*/*.png"))
        found.append({file.relative_to(out): file.read_bytes() for file in files})
    assert [recording.replays for recording in recordings] == [3]
    assert found[0] == found[1] and len(found[0]) == 16
    assert len(set(found[0].values())) == 16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    "flags",
    [
        "--dataset colored_mnist --warmup 20 --max-steps 60 --segmenter-steps 0",
        "--dataset imagenet --preset small --max-steps 6 --accumulate 2",
        "--dataset imagenet --preset small --max-steps 6 --accumulate 2 --recompute",
    ],
)
def test_graphs_of_a_gpu(tmp_path, flags):
    """Losses of a training with graphs are those of one without."""
    found = []
    for graph in ("off", "auto"):
        out = tmp_path / graph
        run("train_cgn.py", *flags.split(), "--offline", "--graph", graph, "--out", out)
        found.append(losses(out)[-1])
    assert found[0] == pytest.approx(found[1], rel=0.02, abs=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_graphed_pictures_of_a_gpu(tmp_path, small_cgn):
    flags = ["--dataset", "imagenet", "--weights", small_cgn / "weights.pt", "--format", "png"]
    found = []
    for graph in ("off", "auto"):
        out = tmp_path / graph
        run("generate.py", *flags, "--n", 40, "--batch-size", 8, "--graph", graph, "--out", out)
        files = sorted((out / "counterfactual").iterdir())
        found.append(torch.stack([imagenet.read_image(file).float() for file in files]))
    assert len(found[0]) == 40
    assert (found[0] - found[1]).abs().mean() < 0.1  # of 255 levels
