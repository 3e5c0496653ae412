"""Train a classifier on biased or counterfactual images, and test whether it kept the shortcut.

Sauer & Geiger, ICLR 2021, section 4. This file has two parts, each whole without the other. Digits:

    python train_classifier.py --dataset colored_mnist --train original --out runs/biased
    python train_classifier.py --dataset colored_mnist --train counterfactual \
        --counterfactual runs/cf --out runs/invariant

Two test sets tell: in `decorrelated`, colors and textures say nothing of the digit; `correlated`
has the same digits, drawn as in training. The figure to quote is the last epoch's. To choose
settings, there is `biased`: the last 5,000 training images. ImageNet, an ensemble of three heads:

    python train_classifier.py --dataset imagenet --data-dir IMAGENET \
        --counterfactual runs/counterfactuals --out runs/ensemble
    torchrun --nproc-per-node 8 -- train_classifier.py --dataset imagenet --data-dir IMAGENET \
        --counterfactual 'runs/counterfactuals*' --out runs/ensemble --resume
"""

import argparse
import copy
import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from data import checkpoints, download, folders, imagenet, mnist, pictures, runs, weights
from kernels import GraphedStep, normalized_conv2d, set_rate

# ==================================================================================================
# What both parts share: common flags


def shared_flags(parser):
    """Flags of both parts. Returns the group of those that only training uses."""
    parser.add_argument(
        "--weights", type=Path, help="start from, or evaluate, these classifier weights"
    )
    parser.add_argument(
        "--offline", action="store_true",
        help="download nothing: synthetic digits, random networks",
    )
    parser.add_argument(
        "--counterfactual", type=Path, nargs="+", metavar="FOLDER",
        help="data sets of generate.py, one or several",
    )
    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, required=True, help="run folder; new, empty, or resumed")
    run.add_argument(
        "--resume", nargs="?", const="auto", choices=["auto"],
        help="continue the run in --out where it was interrupted; begin if nothing was saved",
    )
    run.add_argument("--evaluate", action="store_true", help="no training: test --weights")
    run.add_argument(
        "--explain", type=runs.non_negative_int, default=0, metavar="N",
        help="Grad-CAM heat maps of N test images",
    )
    run.add_argument(
        "--seed", type=runs.non_negative_int, default=0,
        help="of the data: colors, crops, tests; on ImageNet also of the heads and of dropout",
    )
    run.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one"
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs", type=runs.positive_int, help="passes over the training images"
    )
    training.add_argument(
        "--epoch-steps", type=runs.positive_int,
        help="steps in an epoch; default, and on ImageNet the maximum: all images once",
    )
    training.add_argument("--max-steps", type=runs.positive_int, help="steps in total")
    training.add_argument("--lr", type=runs.non_negative_float, help="in the first epoch")
    training.add_argument(
        "--log-every", type=runs.positive_int, default=100, help="steps between lines of the log"
    )
    training.add_argument(
        "--save-every", type=runs.positive_int, default=1000, help="steps between checkpoints"
    )
    training.add_argument(
        "--bad-steps", type=runs.positive_int, default=20,
        help="give up after so many steps in a row without finite losses or gradients, which are "
        "skipped",
    )
    return training


def check_common(parser, args, training):
    """The parser's error if flags contradict each other."""
    if args.evaluate:
        runs.refuse_flags(parser, training, args, "has no meaning with --evaluate")
        if not args.weights and not getattr(args, "baseline", False):
            parser.error("--evaluate needs --weights, a classifier's weights.pt")


def check_arch(parser, args):
    """The parser's error if --arch is no classifier of torchvision."""
    if args.arch not in torchvision.models.list_models(torchvision.models):
        parser.error(f"--arch {args.arch}: not a classifier of torchvision, such as resnet18")


def check_names(parser, flag, pairs, taken):
    """The parser's error for test sets NAME=PATH with a name that means something else, or is given
    twice.
    """
    names = [name for name, _ in pairs]
    for name in names:
        if name.partition(" ")[0] in taken or names.count(name) > 1:
            parser.error(f"{flag} {name}=...: the name is taken; choose another")


FACTORS = ("shape", "texture", "background", "none")


def followed_factors(predictions, labels):
    """How many counterfactuals are called by the class of their shape, texture, background, or by
    none of these. Only those count whose three classes differ.

    predictions: classes (N, heads, k), of which one has to be right. labels: (N, 3). Returns
    (heads, 4).
    """
    differ = labels != labels.roll(1, 1)
    found = (predictions[..., None] == labels[:, None, None]).any(2)  # (N, heads, 3)
    found = torch.cat([found, ~found.any(2, keepdim=True)], 2)
    return (found & differ.all(1)[:, None, None]).sum(0)


def percent(hits, total):
    """100 hits / total; NaN for none."""
    return 100 * hits / total if total else math.nan


# ==================================================================================================
# MNIST, and folders of images


class MnistClassifier(nn.Module):
    """(N, 3, S, S) in [-1, 1] -> log-probabilities (N, classes).

    At 32 x 32, for digits, keys are the published ones.
    """

    def __init__(self, classes=10, size=32):
        super().__init__()
        layers = [
            nn.BatchNorm2d(3),
            nn.Conv2d(3, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),  # (N, 32, 16, 16)
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1),  # (N, 64, 8, 8)
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
        ]
        while size > 32:  # again to (N, 64, 8, 8)
            layers += [nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU()]
            size = size // 2
        layers.append(nn.AvgPool2d(7))  # (N, 64, 1, 1)
        self.model = nn.Sequential(*layers)
        self.cls = nn.Sequential(nn.Linear(64, classes))

    def features(self, x):
        """What the last convolution gives: (N, 64, 8, 8)."""
        x = normalized_conv2d(x, self.model[0], self.model[1])
        return self.model[2:-1](x)

    def log_probabilities(self, features):
        """Features (N, 64, 8, 8) -> log-probabilities (N, classes)."""
        return F.log_softmax(self.cls(self.model[-1](features).flatten(1)), 1)

    def forward(self, x):
        return self.log_probabilities(self.features(x))


class TorchvisionClassifier(nn.Module):
    """Any classifier of torchvision, untrained, in place of a MnistClassifier."""

    def __init__(self, arch, classes):
        super().__init__()
        self.features = torchvision.models.get_model(arch, weights=None, num_classes=classes)

    def log_probabilities(self, logits):
        """Logits (N, classes) -> log-probabilities (N, classes)."""
        return F.log_softmax(logits, 1)

    def forward(self, x):
        return self.log_probabilities(self.features(x))


def make_classifier(args, data):
    """The classifier of --arch, with the weights of --weights if they are given.

    UserError if --arch cannot take images of this size, or batches of one.
    """
    classes, size = len(data.original.names), data.original.size
    if getattr(args, "arch", "digits") == "digits":
        classifier = MnistClassifier(classes, size)
    else:
        classifier = TorchvisionClassifier(args.arch, classes)
        images = torch.zeros(min(args.batch_size, 2), 3, size, size)
        try:  # a copy, in training mode: there some networks return a tuple
            copy.deepcopy(classifier).train()(images)
        except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError) as error:
            raise runs.UserError(
                f"--arch {args.arch}: does not take images of {size} x {size} pixels in batches of "
                f"{args.batch_size}, or does not return logits alone ({runs.first_line(error)})"
            ) from None
    if args.weights:
        load_classifier(classifier, args.weights)
    return classifier


# --------------------------------------------------------------------------------------------------
# MNIST: the two methods that the paper compares with. Both are told what the shortcut is, the
# color: invariant risk minimization by environments whose colors are mixed by different amounts,
# learning not to learn by the colors themselves, which the features must not reveal.

BINS = 8  # of each channel's mean color


def mix_colors(x, environments, generator=None):
    """Mix the color channels of each image at random: not in environment 0, most in the last.

    x: (N, 3, H, W) in [-1, 1]. Returns as many, and the environment of each image, (N,): they are
    dealt out in turn. generator: on the device of x, or None for the default one.
    """
    environment = torch.arange(len(x), device=x.device) % environments
    strength = 0.5 * environment / max(environments - 1, 1)
    noise = torch.randn(len(x), 3, 3, generator=generator, device=x.device)
    mix = torch.eye(3, device=x.device) + strength[:, None, None] * noise
    mixed = torch.einsum("nij,njhw->nihw", mix, x / 2 + 0.5)
    return mixed.clamp(0, 1) * 2 - 1, environment


def invariance_penalty(log_probabilities, y, environment, environments):
    """IRMv1 (Arjovsky et al. 2019): each environment's loss is differentiated by a factor of the
    logits; the squares' mean.

    log_probabilities: (N, 10). The derivative at factor 1 is the mean of sum_k p_k l_k - l_y.
    """
    expected = (log_probabilities.exp() * log_probabilities).sum(1)
    excess = expected - log_probabilities.gather(1, y[:, None])[:, 0]
    members = F.one_hot(environment, environments).to(excess.dtype)
    derivatives = (excess @ members) / members.sum(0).clamp(min=1)
    return derivatives.square().mean()


class ReverseGradient(torch.autograd.Function):
    """x as it is; its derivative times -weight."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.weight * gradient, None


class ColorHead(nn.Module):
    """Predicts the image's mean color from features (N, 64, H, W): logits (N, BINS, 3)."""

    def __init__(self, channels=64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 32, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 3 * BINS),
            nn.Unflatten(1, (BINS, 3)),
        )

    def loss(self, features, x, weight):
        """Learning not to learn (Kim et al. 2019): a cross-entropy that trains the head, and with
        its gradient reversed the features, which also raise the entropy of the prediction.

        Colors are the ranks of the channels' means in the batch.
        """
        ranks = x.mean((2, 3)).argsort(0).argsort(0)
        colors = ranks * BINS // len(x)
        logits = self.layers(ReverseGradient.apply(features, weight))
        # The entropy is the features' business: the head's weights get no gradient of it.
        detached = {name: p.detach() for name, p in self.layers.named_parameters()}
        prediction = torch.func.functional_call(self.layers, detached, features)
        negative_entropy = (prediction.softmax(1) * prediction.log_softmax(1)).sum(1).mean()
        return F.cross_entropy(logits, colors) + 0.1 * weight * negative_entropy


# --------------------------------------------------------------------------------------------------
# MNIST: data


class DigitData(NamedTuple):
    """What the classifiers of all seeds share."""

    original: mnist.MnistVariant | folders.ImageFolder  # the biased training images
    counterfactual: tuple | None  # images uint8 (n, 3, S, S) and labels (n, 3)
    test: mnist.MnistVariant | folders.ImageFolder
    test_sets: dict  # name -> images uint8 (n, 3, S, S) and labels (n,)
    # Decorrelated images whose object and background share a class, (n,) bool; None if all
    # backgrounds are black.
    one_class: torch.Tensor | None


def load_folder_data(args, device):
    """A folder's images, counterfactuals, and test sets: `test`, of the folder, and those of
    --test. UserError for missing files.
    """
    original, test = folders.load_folder(args.data_dir, args.image_size, device)
    args.class_counts = original.class_counts()
    if args.evaluate:
        check_class_names(args.weights, original.names)
    if not len(test):
        raise runs.UserError(
            f"--data-dir {args.data_dir}: no test images; put some into test/ beside train/, or "
            "add images: of a class of ten or more, about a tenth is held out"
        )
    counterfactual = None
    if args.counterfactual:
        counterfactual = mnist.load_counterfactuals(
            args.counterfactual, args.dataset, args.offline, original, device
        )
    test_sets = {"test": (test.pixels, test.labels)}
    for name, folder in args.test:
        part = folders.read_test(folder, original.names, original.size, device)
        test_sets[name] = (part.pixels, part.labels)
    return DigitData(original, counterfactual, test, test_sets, None)


def check_class_names(path, names):
    """UserError if weights are of other classes, as far as the run that wrote them tells."""
    try:
        description = json.loads((path.parent.parent / "args.json").read_text())
        written = description["args"]["class_counts"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if list(written) != names:
        raise runs.UserError(
            f"--weights {path}: a classifier of the classes {', '.join(written)}; --data-dir has "
            f"{', '.join(names)}"
        )


def load_digit_data(args, device):
    """Training digits, counterfactuals, and the three test sets. UserError for missing files."""
    original, test = mnist.load_variant(
        args.dataset,
        args.data_dir,
        textures=getattr(args, "textures", None),
        offline=args.offline,
        seed=args.seed,
        device=device,
    )
    counterfactual = None
    if args.counterfactual:
        counterfactual = mnist.load_counterfactuals(
            args.counterfactual, args.dataset, args.offline, original, device
        )
    decorrelated, (objects, backgrounds) = test.decorrelated_images(args.seed)
    first = len(original) - original.held_out
    test_sets = {
        "decorrelated": (decorrelated, test.labels),
        "correlated": (test.all_images(args.seed), test.labels),
        "biased": (original.all_images(args.seed)[first:], original.labels[first:]),
    }
    black = mnist.VARIANTS[args.dataset]["backgrounds"] == mnist.BLACK
    one_class = None if black else objects == backgrounds
    return DigitData(original, counterfactual, test, test_sets, one_class)


def training_images(args, data, turn):
    """All training images, uint8 (n, 3, S, S), and labels (n,).

    turn: counts how often all were taken. The colors of original digits are drawn anew in each,
    where the variant does so.
    """
    images, labels = [], []
    seed = args.seed + 1000 + turn
    if args.train == "decorrelated":
        images.append(data.original.decorrelated_images(seed)[0])
        labels.append(data.original.labels)
    elif args.train in ("original", "both"):
        images.append(data.original.all_images(seed))
        labels.append(data.original.labels)
    if args.train in ("counterfactual", "both"):
        images.append(data.counterfactual[0])
        labels.append(data.counterfactual[1][:, 0])
    if len(images) == 1:
        return images[0], labels[0]
    return torch.cat(images), torch.cat(labels)


def count_training_images(args, data):
    """How many images training_images returns in a turn."""
    count = 0
    if args.train != "counterfactual":
        count += len(data.original)
    if args.train in ("counterfactual", "both"):
        count += len(data.counterfactual[1])
    return count


def random_affine(images, strength, generator=None):
    """Rotate, shear, stretch and shift images at random: at strength 1 by up to 0.25 rad, 0.25,
    20 % and 2.5 of 32 pixels.

    images: (N, 3, S, S). generator: on their device, or None for the default one.
    """
    drawn = torch.rand(6, len(images), generator=generator, device=images.device)
    angle, shear, width, height, right, down = strength * (2 * drawn - 1)
    cosine = (0.25 * angle).cos()
    sine = (0.25 * angle).sin()
    shear = 0.25 * shear
    width = 1 + 0.2 * width
    height = 1 + 0.2 * height
    pixel = 5 / 32  # 2.5 of 32 pixels, in units where the image is 2 wide
    # The product of rotation, shear and scale, written out; the last column is the shift.
    row_x = [width * cosine, shear * cosine - height * sine, pixel * right]
    row_y = [width * sine, shear * sine + height * cosine, pixel * down]
    matrix = torch.stack(row_x + row_y, 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, images.shape, align_corners=False)
    return F.grid_sample(images, grid, "nearest", "reflection", align_corners=False)


# --------------------------------------------------------------------------------------------------
# MNIST: training and testing


def correct_predictions(classifier, images, labels):
    """Which predictions are correct in eval mode, bool (n,). images: uint8 (n, 3, S, S)."""
    return predict_classes(classifier, images) == labels


@torch.no_grad()
def predict_classes(classifier, images):
    """Predictions in eval mode, int64 (n,). images: uint8 (n, 3, S, S)."""
    classifier.eval()
    parts = images.split(250)  # small enough for a CPU's cache
    return torch.cat([classifier(mnist.to_float(x)).argmax(1) for x in parts])


def measure_factors(classifier, data, out):
    """By which of their factors the classifier calls counterfactuals, in percent; factors.png."""
    images, labels = data.counterfactual
    predictions = predict_classes(classifier, images)
    (hits,) = followed_factors(predictions[:, None, None], labels).tolist()
    shares = [percent(hit, sum(hits)) for hit in hits]
    pictures.save_picture(out / "factors.png", pictures.factor_chart({"classifier": shares}))
    return {f"follows {factor}": share for factor, share in zip(FACTORS, shares)}


def measure_digits(classifier, data):
    """Accuracy in percent on each test set, by name, and on two parts of the decorrelated one.

    Where object and background share a class, as in all biased images, a classifier that has seen
    biased images may follow it; where they differ, that does not help.
    """
    correct = {}
    for name, (images, labels) in data.test_sets.items():
        correct[name] = correct_predictions(classifier, images, labels)
    if data.one_class is not None:
        correct["one class"] = correct["decorrelated"][data.one_class]
        correct["two classes"] = correct["decorrelated"][~data.one_class]
    return {name: 100 * values.sum().item() / len(values) for name, values in correct.items()}


def load_classifier(classifier, path):
    """Load weights of this script or published ones. UserError if they do not fit."""
    state = runs.load_tensors(path)
    if not isinstance(state, dict):
        kind = type(state).__name__
        raise runs.UserError(f"{path}: holds a {kind}, not the weights of a classifier")
    classifier.load_state_dict(weights.check_state_dict(state, classifier.state_dict(), path))


def classifier_step(args, training, bf16, images, labels):
    """A step on images, uint8 (N, 3, S, S), and labels (N,).

    Returns the loss, detached, and "skipped", above 0 if numbers were not finite. It may be
    recorded as a CUDA graph, see GraphedStep.
    """
    classifier = training.networks["classifier"]
    color_head = training.networks["color_head"]
    (optimizer,) = training.optimizers
    x = mnist.to_float(images)  # (N, 3, S, S) in [-1, 1]
    if args.augment:
        x = random_affine(x, args.augment)
    if args.method == "irm":
        x, environment = mix_colors(x, args.environments)

    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        features = classifier.features(x)
        log_probabilities = classifier.log_probabilities(features).float()
    loss = F.nll_loss(log_probabilities, labels)
    if args.method == "irm":
        penalty = invariance_penalty(log_probabilities, labels, environment, args.environments)
        loss = loss + args.penalty * penalty
    elif args.method == "lnl":
        loss = loss + color_head.loss(features.float(), x, args.penalty)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    skipped = checkpoints.finite_step(optimizer, loss)
    checkpoints.mend_statistics(classifier)

    loss = loss.detach()
    correct = (log_probabilities.detach().argmax(1) == labels).sum()
    seen = torch.stack([loss * len(x), correct.float(), torch.full_like(loss, len(x))])
    sums = training.extra["sums"]
    sums.copy_(torch.where(skipped > 0, sums, sums + seen))
    return {"loss": loss, "skipped": skipped}


def count_images_of_turn(args):
    """How many training images a turn takes: all of them but for a last batch of one image, which
    some networks of torchvision cannot normalize.
    """
    count = args.training_images
    if getattr(args, "arch", "digits") != "digits" and count > 1 and count % args.batch_size == 1:
        count -= 1
    return count


def digit_batches(args, seed, data, epoch, steps_per_epoch, first, device):
    """Yields the batches of an epoch from its step `first` on, without end: images, uint8
    (N, 3, S, S), and labels (N,).

    A turn takes all training images once, in random order. An epoch begins with a new turn.
    """
    count = count_images_of_turn(args)
    steps_per_turn = math.ceil(count / args.batch_size)
    turn = epoch * math.ceil(steps_per_epoch / steps_per_turn) + first // steps_per_turn
    position = first % steps_per_turn
    while True:
        images, labels = training_images(args, data, turn)
        shuffle = runs.seeded_generator(seed, "classifier order", turn)
        order = torch.randperm(len(labels), generator=shuffle)[:count].to(device)
        for index in order.split(args.batch_size)[position:]:
            yield images.index_select(0, index), labels[index]
        turn += 1
        position = 0


def train_digits(args, seed, out, data, device, stop):
    """Train one classifier from its own seed. Returns its metrics."""
    torch.manual_seed(seed)
    bf16 = runs.pick_bf16(args.amp, device)
    classifier = make_classifier(args, data)
    classifier.to(device, memory_format=torch.channels_last)
    color_head = ColorHead().to(device)  # of --method lnl
    parameters = [*classifier.parameters(), *color_head.parameters()]
    optimizer = torch.optim.Adadelta(parameters, lr=args.lr)

    steps_per_epoch = args.epoch_steps or math.ceil(count_images_of_turn(args) / args.batch_size)
    last_step = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
    training = checkpoints.Training(
        out,
        args,
        {"classifier": classifier, "color_head": color_head},
        [optimizer],
        last_step,
        device,
        # epoch: epochs evaluated. sums: of losses, correct predictions and images in this epoch.
        extra={"epoch": 0, "sums": torch.zeros(3), "best": -1.0, "metrics": {}},
        stop=stop,
    )
    extra = training.extra

    function = functools.partial(classifier_step, args, training, bf16)
    graphed = args.graph == "auto" and device.type == "cuda"
    train_step = GraphedStep(function, training.optimizers, graphed)
    for epoch in range(extra["epoch"], math.ceil(last_step / steps_per_epoch)):
        set_rate(optimizer.param_groups[0], args.lr * args.gamma**epoch)
        first_step = epoch * steps_per_epoch
        steps = range(training.step - first_step, min(steps_per_epoch, last_step - first_step))
        classifier.train()
        batches = digit_batches(args, seed, data, epoch, steps_per_epoch, steps.start, device)
        for step_of_epoch, (images, labels) in zip(steps, batches):
            # Every step seeds its own random numbers, so that a resumed run draws the same.
            key = step_of_epoch * args.batch_size
            torch.manual_seed(runs.derived_seed(1_000 * seed + epoch, "step", key))
            results = train_step(images, labels)
            skipped = results.pop("skipped")
            training.end_step(results, skipped)  # log, checkpoint, stop

        # An epoch that --max-steps cuts does not count as one: it may be resumed.
        whole = training.step == first_step + steps_per_epoch
        finish_epoch(args, seed, training, data, epoch, whole)
    return extra["metrics"] | measure_heat_maps(args, classifier, data, out)


def finish_epoch(args, seed, training, data, epoch, whole):
    """Test the classifier, write its metrics and weights, and a checkpoint.

    whole: whether all steps of the epoch, counted from 0, were taken.
    """
    classifier = training.networks["classifier"]
    extra = training.extra
    mean_loss, train_accuracy = (extra["sums"][:2] / extra["sums"][2]).tolist()
    metrics = {"loss": mean_loss, "train": 100 * train_accuracy}
    metrics |= measure_digits(classifier, data)
    training.log.write(training.step, epoch=epoch + 1, seed=seed, **metrics)
    words = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    print(f"seed {seed}  epoch {epoch + 1}/{args.epochs}  {words}", flush=True)

    extra["metrics"] = metrics
    # Chosen without a look at the test digits: that would be selecting on what is measured.
    score = metrics["test" if args.dataset == "images" else "biased"]
    if training.end_epoch(epoch, whole, score):
        runs.save_tensors(training.out / "weights_best.pt", classifier.state_dict())
    runs.save_tensors(training.out / "weights.pt", classifier.state_dict())
    training.save()


def evaluate_digits(args, out, data, device):
    """The metrics of the classifier in --weights."""
    classifier = make_classifier(args, data)
    classifier.to(device, memory_format=torch.channels_last)
    metrics = measure_digits(classifier, data)
    if data.counterfactual:
        metrics |= measure_factors(classifier, data, out)
    return metrics | measure_heat_maps(args, classifier, data, out)


def measure_heat_maps(args, classifier, data, out):
    """Heat maps of --explain test images in explain.png, and their metrics; {} for none."""
    if not args.explain:
        return {}
    if args.dataset == "images":
        images, labels = data.test_sets["test"]
        index = torch.linspace(0, len(images) - 1, min(args.explain, len(images))).long()
        scores = pictures.digit_scores if args.arch == "digits" else None
        names = data.original.names
        pictures.explain_images(
            classifier, images[index], labels[index], names, scores, out / "explain.png"
        )
        return {}
    images, _ = data.test_sets["decorrelated"]
    return pictures.explain_digits(
        classifier, images, data.test.digits, data.test.labels, args.explain, out / "explain.png"
    )


def summarize(args, results):
    """Print and write mean and standard deviation of each metric over seeds."""
    summary = {}
    names = [name for name in next(iter(results.values())) if name != "loss"]
    for name in names:
        # A seed that was trained before there was a metric does not have it.
        values = [metrics[name] for metrics in results.values() if name in metrics]
        values = torch.tensor(values, dtype=torch.float64)
        mean = values.mean().item()
        deviation = values.std(correction=len(values) > 1).item()
        summary[name] = {"mean": mean, "std": deviation}
        print(f"{name:>15} {mean:6.2f} +- {deviation:.2f} %  ({len(values)} seeds)")
    description = {
        "dataset": args.dataset,
        "train": args.train,
        "offline": args.offline,
        "summary": summary,
        "seeds": results,
    }
    runs.write_json(args.out / "results.json", description)


def classify_digits(args, device):
    """Train, or evaluate, a classifier for each seed. Everything is written into args.out."""
    if args.offline:
        print(runs.OFFLINE)
    if args.dataset == "images":
        folders.check_out(args.data_dir, args.out)
    with runs.claim_folder(args.out, __file__, args.resume):
        load = load_folder_data if args.dataset == "images" else load_digit_data
        data = load(args, device)
        make_classifier(args, data)  # --arch and --weights are refused before anything is written
        if not args.evaluate:
            args.training_images = count_training_images(args, data)
        checkpoints.check_resumed(args.out, vars(args))
        runs.describe_run(args.out, __file__, vars(args))
        stop = runs.StopSignal()
        results = {}
        for seed in args.seeds:
            out = args.out / f"seed_{seed}"
            out.mkdir(exist_ok=True)
            if args.evaluate:
                metrics = evaluate_digits(args, out, data, device)
            else:
                metrics = train_digits(args, seed, out, data, device, stop)
            results[seed] = metrics
        summarize(args, results)


# --------------------------------------------------------------------------------------------------
# MNIST: flags


def parse_digits(parser, argv, variant):
    """The arguments of a MNIST variant."""
    training = shared_flags(parser)
    training.add_argument(
        "--train", choices=["original", "counterfactual", "both", "decorrelated"],
        default="original",
        help="images to train on: the biased data, --counterfactual, or both together; or the "
        "ceiling, what a perfect generator would make: training digits in colors and textures of "
        "any class",
    )
    training.add_argument(
        "--batch-size", type=runs.positive_int, default=64, help="images in a batch"
    )
    training.add_argument(
        "--amp", choices=["auto", "off", "bf16"], default="auto",
        help="bf16 arithmetic in training; auto: if the hardware has it",
    )
    training.add_argument(
        "--graph", choices=["auto", "off"], default="auto", help="CUDA graphs, as in train_cgn.py"
    )
    training.add_argument(
        "--gamma", type=runs.non_negative_float, default=0.7,
        help="factor of the learning rate in each epoch",
    )
    training.add_argument(
        "--augment", type=runs.non_negative_float, default=0.0, metavar="S",
        help="rotate, shear, stretch and shift training images at random; 1: by up to 14 degrees, "
        "0.25, 20 %% and 2.5 pixels",
    )
    training.add_argument(
        "--method", choices=["plain", "irm", "lnl"], default="plain",
        help="what the paper compares with: invariant risk minimization over environments of mixed "
        "colors, learning not to learn",
    )
    irm = parser.add_argument_group("--method irm")
    irm.add_argument("--environments", type=runs.positive_int, default=2, help="how many")
    penalties = parser.add_argument_group("--method irm and lnl")
    penalties.add_argument(
        "--penalty", type=runs.non_negative_float, default=1.0, help="weight of what they add"
    )
    data = parser.add_argument_group("images")
    if variant == "images":
        data.add_argument(
            "--data-dir", type=Path, required=True, help="folder, as in train_cgn.py"
        )
        data.add_argument(
            "--image-size", type=int, choices=[32, 64, 128], default=32,
            help="as in train_cgn.py",
        )
        data.add_argument(
            "--test", type=runs.name_and_path, nargs="+", default=[], metavar="NAME=PATH",
            help="further test sets, each a folder with a folder for each class",
        )
        data.add_argument(
            "--arch", default="digits",
            help="the digits' classifier, or one of torchvision, untrained, such as resnet18",
        )
    else:
        data.add_argument(
            "--data-dir", type=Path, default=runs.DOWNLOADS,
            help="folder with MNIST's files; downloaded if missing",
        )
    if variant == "wildlife_mnist":
        data.add_argument(
            "--textures", help="folder with object/ and background/, or 'dtd', as in train_cgn.py"
        )
    training.add_argument(
        "--seeds", type=runs.non_negative_int, nargs="+", default=[0], metavar="SEED",
        help="classifiers to train, one for each seed: initial weights and order of the images",
    )
    parser.set_defaults(epochs=10, lr=1.0)

    args = parser.parse_args(argv)
    check_common(parser, args, training)
    if variant == "images":
        check_images(parser, args)
    elif args.offline and args.data_dir != runs.DOWNLOADS:
        parser.error("--data-dir: has no meaning with --offline, whose digits are synthetic")
    if args.method != "irm":
        runs.refuse_flags(parser, irm, args, "needs --method irm")
    if args.method == "plain":
        runs.refuse_flags(parser, penalties, args, "needs --method irm or lnl")
    elif args.environments > args.batch_size:
        parser.error(
            f"--environments {args.environments}: a batch of {args.batch_size} cannot hold an "
            "image of each"
        )
    generated = args.train in ("counterfactual", "both")
    if args.counterfactual and not generated and not args.evaluate:
        parser.error(f"--counterfactual: --train {args.train} takes none")
    if generated and not args.counterfactual:
        parser.error(f"--train {args.train}: needs --counterfactual, a data set of generate.py")
    return args


def check_images(parser, args):
    """The parser's error for what a folder of images does not have."""
    if args.train == "decorrelated":
        parser.error("--train decorrelated: only of the MNIST variants, whose colors are drawn")
    taken = ("test", "loss", "train", "follows", "step", "epoch", "seed")
    check_names(parser, "--test", args.test, taken)
    if args.arch != "digits":
        check_arch(parser, args)
        if args.method == "lnl":
            parser.error("--method lnl: needs the digits' classifier")


# ==================================================================================================
# ImageNet: the invariant ensemble (section 4.2)

HEADS = imagenet.HEADS  # shape, texture, background
PREDICTIONS = (*HEADS, "mean", "shape and texture")  # of an ensemble, see with_means


def untrained_classifier(arch):
    """A classifier of torchvision, for images with ImageNet's normalization."""
    classifier = torchvision.models.get_model(arch, weights=None)
    if hasattr(classifier, "transform_input"):
        classifier.transform_input = True  # inception_v3 and googlenet: to the one of their files
    return classifier


def check_image_size(args, network):
    """UserError for a network that cannot take images of --image-size."""
    size = args.image_size
    device = next(network.parameters()).device
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, size, size, device=device))
    except (RuntimeError, AssertionError) as error:
        raise runs.UserError(
            f"--arch {args.arch}: takes no images of {size} pixels ({runs.first_line(error)}); "
            "give another --image-size"
        ) from None


class Ensemble(nn.Module):
    """A torchvision classifier with three heads in place of its last linear layer.

    (N, 3, H, W) -> logits (N, 3, 1000). classifier: an untrained one if None.
    """

    def __init__(self, arch, classifier=None):
        super().__init__()
        self.backbone = classifier or untrained_classifier(arch)
        modules = self.backbone.named_modules()
        linear = [(name, module) for name, module in modules if isinstance(module, nn.Linear)]
        name, last = linear[-1] if linear else ("", None)
        if last is None or last.out_features != 1000:
            raise runs.UserError(f"--arch {arch}: does not end in a linear layer of 1000 classes")
        parent, _, child = name.rpartition(".")
        setattr(self.backbone.get_submodule(parent), child, nn.Identity())
        self.heads = nn.ModuleList(nn.Linear(last.in_features, 1000) for _ in HEADS)

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():  # BatchNorm keeps the statistics of the pretrained network
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, x):
        features = self.backbone(x)
        if isinstance(features, tuple):
            features = features[0]  # inception_v3 and googlenet add auxiliary logits in training
        return torch.stack([head(features) for head in self.heads], 1)


def ensemble_loss(logits, labels, counterfactual_labels):
    """Cross-entropy of the heads' mean on real images, plus each head's with its own label on
    counterfactuals.

    logits: (R + C, 3, 1000), real images first. labels: (R,). counterfactual_labels: (C, 3).
    """
    real, counterfactual = logits.float().split([len(labels), len(logits) - len(labels)])
    loss = F.cross_entropy(real.mean(1), labels)
    if len(counterfactual):
        for head in range(len(HEADS)):
            loss = loss + F.cross_entropy(counterfactual[:, head], counterfactual_labels[:, head])
    return loss


def load_pretrained(args):
    """A torchvision classifier with its pretrained weights, which are fetched if need be; with
    random ones if --offline or --pretrained none.
    """
    classifier = untrained_classifier(args.arch)
    if args.offline or args.pretrained == "none":
        return classifier
    file = download.torchvision_file(args.arch)
    path = Path(args.pretrained) if args.pretrained else None
    state = weights.load_network(file, args.weights_dir, path, classifier.state_dict())
    weights.load_into(classifier, state)
    return classifier


def load_ensemble(args):
    """A new ensemble on pretrained weights, or the one of --weights."""
    if not args.weights:
        return Ensemble(args.arch, load_pretrained(args))
    content = runs.load_tensors(args.weights)
    if not isinstance(content, dict) or content.get("arch") != args.arch:
        raise runs.UserError(
            f"--weights {args.weights}: not an ensemble on {args.arch}; give its --arch, or "
            "another file"
        )
    ensemble = Ensemble(args.arch)
    state = content.get("average", content.get("ensemble"))  # older files may have an average
    state = weights.check_state_dict(state, ensemble.state_dict(), args.weights)
    weights.load_into(ensemble, state)
    return ensemble


# --------------------------------------------------------------------------------------------------
# ImageNet: metrics. Hits are counted on every rank over its share of the images, then summed: what
# is reported is exact, whatever the batch size and the number of GPUs.


def with_means(logits):
    """Logits of the heads, of the mean of all three, and of shape and texture.

    (N, 3, 1000) -> (N, 5, 1000); those of a plain classifier, (N, 1, 1000), stay.
    """
    if logits.shape[1] != 3:
        return logits
    mean = logits.mean(1, keepdim=True)
    shape_and_texture = logits[:, :2].mean(1, keepdim=True)
    return torch.cat([logits, mean, shape_and_texture], 1)


def only_classes(logits, classes):
    """Logits (..., 1000) with those of all other classes at minus infinity."""
    kept = torch.full_like(logits, -torch.inf)
    kept[..., classes] = logits[..., classes]
    return kept


def top_hits(logits, labels, present=None):
    """Top-1 and top-5 hits of each head: (heads, 2).

    labels: (N,), or (N, heads). present: the only classes to which predictions are restricted.
    """
    logits = with_means(logits)
    if present is not None:
        logits = only_classes(logits, present)
    if labels.ndim == 1:
        labels = labels[:, None]
    else:  # both means are compared with the shape's class
        labels = torch.cat([labels, labels[:, :1], labels[:, :1]], 1)
    hits = logits.topk(5).indices == labels[..., None]  # (N, heads, 5)
    return torch.stack([hits[..., 0].sum(0), hits.any(2).sum(0)], 1)


def counterfactual_hits(logits, labels):
    """Of each head, (heads, 9): top-1 hits of its own label, then followed_factors of the best
    prediction, and of the best five. labels: (N, 3).
    """
    own = top_hits(logits, labels if logits.shape[1] == 3 else labels[:, 0])[:, :1]
    best = with_means(logits).topk(5).indices
    top1 = followed_factors(best[..., :1], labels)
    return torch.cat([own, top1, followed_factors(best, labels)], 1)


def conflict_hits(logits, labels):
    """Images that each head puts into the category of their shape, and of their texture.

    Returns (heads, 2).
    labels: (N, 2). A category's probability is the mean over its classes (Geirhos et al. 2019).
    """
    probabilities = with_means(logits).softmax(2)
    categories = imagenet.imagenet_metadata()["cue_conflict"]["categories"].values()
    means = [probabilities[..., classes].mean(2) for classes in categories]
    predictions = torch.stack(means, 2).argmax(2)  # (N, heads)
    by_shape = (predictions == labels[:, :1]).sum(0)
    by_texture = (predictions == labels[:, 1:]).sum(0)
    return torch.stack([by_shape, by_texture], 1)


def imagenet9_hits(logits, labels):
    """Images whose best of all 1000 classes belongs to the right one of nine: (heads, 1)."""
    mapping = imagenet.imagenet_metadata()["in9"]["imagenet_to_in9"]
    groups = torch.tensor(mapping, device=logits.device)
    predictions = groups[with_means(logits).argmax(2)]  # (N, heads)
    return (predictions == labels[:, None]).sum(0)[:, None]


def batches_of_test(kind, test, args, device):
    """Yields this rank's share of a test (paths, labels), in batches as the network wants them:
    images (n, 3, S, S) and labels.
    """
    rank, world_size = runs.rank_and_world_size()
    paths, labels = test
    # ImageNet-9 and Cue-Conflict come ready cropped, as do the images of ImageNet-C.
    cropped = kind in ("conflict", "in9") or imagenet.come_cropped(paths)
    transform = imagenet.make_transform(False, args.image_size, margin=not cropped)
    statistics = (imagenet.MEAN, imagenet.STD)
    if kind == "in9" and args.in9_normalization == "in9":
        statistics = (imagenet.IN9_MEAN, imagenet.IN9_STD)
    images = imagenet.Images(paths, labels, transform)
    share = range(rank, len(images), world_size)
    batch_size = args.batch_size // world_size
    for pixels, truth in imagenet.batches(images, share, batch_size, args.workers, device):
        yield imagenet.normalized(pixels, *statistics), truth


@torch.inference_mode()
def count_hits(model, heads, kind, test, hits, args, device):
    """The sum of `hits` over a test (paths, labels), and how many images it has.

    With --classes, the logits of all others are as low as can be.
    """
    bf16 = runs.pick_bf16(args.amp, device)
    classes = imagenet.class_indices(args.classes) if args.classes else None
    # Of no images: zeros of the right shape, also on a rank that has none.
    nothing = torch.empty(0, heads, 1000, device=device)
    sums = hits(nothing, test[1][:0].to(device))
    count = 0
    for x, truth in batches_of_test(kind, test, args, device):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(x).float()
        if logits.ndim == 2:
            logits = logits[:, None]
        if classes:
            logits = only_classes(logits, classes)
        sums = sums + hits(logits, truth)
        count += len(x)
    total = torch.cat([sums.flatten(), sums.new_tensor([count])]).double()
    total = runs.sum_over_ranks(total).round().long()
    return total[:-1].view(sums.shape).tolist(), int(total[-1])


def evaluate(model, names, tests, args, device):
    """Rows (test, head, measure, percent, hits, images) of all tests.

    names: of the model's heads, then of their means. tests: see load_tests.
    """
    model.eval()
    rows = []
    top1 = {}  # test -> top-1 accuracy of each head
    for test, (kind, images) in tests.items():
        if kind == "conflict":
            score = conflict_hits
        elif kind == "counterfactual":
            score = counterfactual_hits
        elif kind == "in9":
            score = imagenet9_hits
        else:
            present = None if kind == "val" else images[1].unique().to(device)
            score = functools.partial(top_hits, present=present)
        hits, count = count_hits(model, min(len(names), 3), kind, images, score, args, device)
        for name, head_hits in zip(names, hits):
            rows += rows_of_head(test, name, kind, head_hits, count)
        top1[test] = [percent(head_hits[0], count) for head_hits in hits]
    if {"in9 mixed_same", "in9 mixed_rand"} <= top1.keys():
        pairs = zip(names, top1["in9 mixed_same"], top1["in9 mixed_rand"])
        for name, same, rand in pairs:
            rows.append(("in9", name, "background gap", same - rand, None, None))
    return rows


def rows_of_head(test, name, kind, hits, count):
    """The rows of one head in one test."""
    first = hits[0]
    if kind == "conflict":
        decided = sum(hits)  # by shape or by texture
        return [
            (test, name, "shape bias", percent(first, decided), first, decided),
            (test, name, "right shape", percent(first, count), first, count),
        ]
    if kind == "counterfactual":
        return factor_rows(test, name, hits, count)
    rows = [(test, name, "top-1", percent(first, count), first, count)]
    if kind in ("val", "ood", "corruption"):
        rows.append((test, name, "top-5", percent(hits[1], count), hits[1], count))
    return rows


def corruption_rows(rows, tests):
    """Rows of each head's mean over all corruptions of a set such as ImageNet-C and, if there is a
    baseline, of its mean corruption error: of errors summed over severities, as a share of the
    baseline's, the mean over corruptions (Hendrycks & Dietterich 2019, section 3.4).
    """
    errors = {}  # (set, head) -> corruption -> errors in percent, one for each severity
    for test, head, measure, accuracy, _, _ in rows:
        if measure == "top-1" and test in tests and tests[test][0] == "corruption":
            name, corruption, _ = test.rsplit("/", 2)
            of_head = errors.setdefault((name, head), {})
            of_head.setdefault(corruption, []).append(100 - accuracy)
    added = []
    for (name, head), of_head in errors.items():
        every = sum(of_head.values(), [])
        added.append((name, head, "mean top-1", 100 - sum(every) / len(every), None, None))
        baseline = errors.get((name, "baseline"))
        if baseline is None or head == "baseline":
            continue
        shares = []
        for corruption, of_severities in of_head.items():
            shares.append(sum(of_severities) / max(sum(baseline[corruption]), 1e-9))
        error = 100 * sum(shares) / len(shares)
        added.append((name, head, "mean corruption error", error, None, None))
    return added


def factor_rows(test, name, hits, count):
    """The rows of one head on counterfactuals. hits: see counterfactual_hits."""
    rows = []
    if name in HEADS:
        rows.append((test, name, "top-1", percent(hits[0], count), hits[0], count))
    differ = sum(hits[1:5])  # images whose three classes differ
    if not differ:
        return rows
    for factor, hit in zip(FACTORS, hits[1:5]):
        rows.append((test, name, f"follows {factor}", percent(hit, differ), hit, differ))
    for factor, hit in zip(FACTORS, hits[5:]):
        rows.append((test, name, f"{factor} in top 5", percent(hit, differ), hit, differ))
    return rows


def write_chart(path, rows):
    """A bar for each head that was tested on counterfactuals; no file if none was."""
    bars = {}
    for _, name, measure, share, _, _ in rows:
        if measure.startswith("follows"):
            bars.setdefault(name, []).append(share)
    if bars:
        pictures.save_picture(path, pictures.factor_chart(bars))


def write_table(out, rows):
    """results.json and results.md; the table on the screen."""
    columns = ("test", "head", "measure", "percent", "hits", "images")
    lines = ["| test | head | measure | percent | of |", "|---|---|---|---|---|"]
    for test, head, measure, value, hits, count in rows:
        of = "" if count is None else f"{hits} / {count}"
        lines.append(f"| {test} | {head} | {measure} | {value:.2f} | {of} |")
    runs.write_json(out / "results.json", [dict(zip(columns, row)) for row in rows])
    with runs.atomic(out / "results.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


# --------------------------------------------------------------------------------------------------
# ImageNet: data


def load_tests(args, counterfactual):
    """What is to be evaluated: name -> (kind, (paths, labels)).

    counterfactual: paths and labels of those held out, or empty ones.
    """
    tests = {}
    if args.data_dir:
        root = imagenet.imagenet_root(args.data_dir)
        tests["val"] = "val", of_classes(args, *imagenet.validation_images(root))
    if len(counterfactual[0]):
        tests["counterfactual"] = "counterfactual", counterfactual
    if args.cue_conflict:
        tests["cue-conflict"] = "conflict", imagenet.cue_conflict_images(args.cue_conflict)
    if args.imagenet9:
        for name, images in imagenet.imagenet9_images(args.imagenet9).items():
            tests[f"in9 {name}"] = "in9", images
    for name, path in args.ood:
        corruptions = imagenet.corruption_folders(path)
        for (corruption, severity), folder in corruptions.items():
            images = of_classes(args, *imagenet.wnid_images(folder))
            tests[f"{name}/{corruption}/{severity}"] = "corruption", images
        if corruptions:
            print(f"{name}: {len(corruptions)} corruptions and severities")
            continue
        paths, labels = of_classes(args, *imagenet.wnid_images(path))
        tests[name] = "ood", (paths, labels)
        classes = len(labels.unique())
        print(f"{name}: {classes} of 1000 classes; predictions are restricted to them")
    if not tests:
        raise runs.UserError(
            "nothing to evaluate: give --data-dir, --counterfactual, --cue-conflict, --imagenet9 "
            "or --ood"
        )
    kinds = {kind for kind, _ in tests.values()}
    if args.explain and kinds <= {"conflict", "in9", "corruption"}:
        raise runs.UserError(
            "--explain: needs images with classes of ImageNet: give --data-dir, --counterfactual "
            "or --ood"
        )
    return tests


def batch_order(count, steps, batch_size, seed, epoch):
    """Indices below `count` for all steps of an epoch, in random order, whole permutations first.

    Returns this rank's share of each batch.
    """
    generator = runs.seeded_generator(seed, "step", epoch)
    rounds = math.ceil(steps * batch_size / count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])
    batches = order[: steps * batch_size].view(steps, batch_size)
    rank, world_size = runs.rank_and_world_size()
    return batches[:, rank::world_size].flatten().tolist()


def epoch_batches(args, real, counterfactual, epoch, steps, first, device):
    """Yields the batches of an epoch's steps from step `first` on: a list with the real images, and
    if there are any, their counterfactuals; each is (uint8 images, labels).
    """
    _, world_size = runs.rank_and_world_size()
    transform = imagenet.make_transform(True, args.image_size)
    kinds = [(real, args.batch_size, args.seed)]
    if counterfactual:
        kinds.append((counterfactual, round(args.cf_ratio * args.batch_size), args.seed + 1))
    loaders = []
    for (paths, labels), batch_size, seed in kinds:
        images = imagenet.Images(paths, labels, transform, seed, epoch, replace=True)
        order = batch_order(len(paths), steps, batch_size, seed, epoch)
        share = batch_size // world_size
        order = order[first * share :]
        loaders.append(imagenet.batches(images, order, share, args.workers, device))
    return zip(*loaders)


# --------------------------------------------------------------------------------------------------
# ImageNet: training


def train_ensemble(args, ensemble, tests, real, counterfactual, device):
    """Train in epochs, each with its evaluation. Returns the rows of the last one.

    real, counterfactual: paths and labels; counterfactual may be None.
    """
    rank, world_size = runs.rank_and_world_size()
    bf16 = runs.pick_bf16(args.amp, device)
    if not round(args.cf_ratio * args.batch_size):
        counterfactual = None
    steps_per_epoch = len(real[0]) // args.batch_size
    steps_per_epoch = min(steps_per_epoch, args.epoch_steps or steps_per_epoch)
    last_step = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
    if counterfactual and rank == 0:
        needed = round(args.cf_ratio * args.batch_size) * steps_per_epoch
        there = len(counterfactual[0])
        if needed > there:
            print(
                f"{there} counterfactuals for {needed} in each epoch: they are drawn more than once"
            )
    optimizer = torch.optim.SGD(
        ensemble.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True
    )
    training = checkpoints.Training(
        args.out,
        args,
        {"ensemble": ensemble},
        [optimizer],
        last_step,
        device,
        written=("ensemble",),
        # epoch: epochs evaluated. sums: of the losses of this epoch's good steps, on this rank, and
        # how many those are.
        extra={"arch": args.arch, "epoch": 0, "best": -1.0, "sums": torch.zeros(2)},
    )
    extra = training.extra
    model = ensemble
    if world_size > 1:
        model = nn.parallel.DistributedDataParallel(ensemble, broadcast_buffers=False)
    if args.compile:
        runs.check_compiler()
        ensemble.compile()

    rows = None
    for epoch in range(extra["epoch"], math.ceil(last_step / steps_per_epoch)):
        model.train()
        optimizer.param_groups[0]["lr"] = args.lr * 0.1 ** (epoch // args.lr_step)
        first_step = epoch * steps_per_epoch
        steps = min(steps_per_epoch, last_step - first_step)
        done = training.step - first_step
        batches = epoch_batches(args, real, counterfactual, epoch, steps, done, device)
        for batch in batches:
            # Data: both kinds of images in one forward pass.
            torch.manual_seed(runs.derived_seed(args.seed + 101 * rank, "step", training.step))
            pixels = torch.cat([pixels for pixels, _ in batch])
            labels = batch[0][1]
            counterfactual_labels = batch[1][1] if counterfactual else None

            # Ensemble
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(imagenet.normalized(pixels))
            loss = ensemble_loss(logits, labels, counterfactual_labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            skipped = checkpoints.finite_step(optimizer, loss)

            # Log, checkpoint, stop
            seen = torch.stack([loss.detach(), torch.ones_like(loss)])
            extra["sums"] = torch.where(skipped > 0, extra["sums"], extra["sums"] + seen)
            rate = optimizer.param_groups[0]["lr"]
            training.end_step({"loss": loss, "lr": rate}, skipped)

        training.save()  # evaluating takes time, and a kill may come
        rows = evaluate(ensemble, PREDICTIONS, tests, args, device)
        # An epoch that --max-steps cuts does not count as one: it may be resumed.
        finish_ensemble_epoch(args, training, rows, epoch, whole=steps == steps_per_epoch)
    if rows is None:  # resumed when all was done
        rows = evaluate(ensemble, PREDICTIONS, tests, args, device)
    return rows


def finish_ensemble_epoch(args, training, rows, epoch, whole):
    """Log an epoch's loss and its rows; keep the weights if they are the best on `val`.

    whole: whether all steps of the epoch, counted from 0, were taken.
    """
    extra = training.extra
    measured = {row[:3]: row[3] for row in rows}
    accuracy = measured.get(("val", "mean", "top-1"), 0.0)
    loss_sum, good_steps = runs.mean_over_ranks(extra["sums"]).tolist()
    mean_loss = loss_sum / max(good_steps, 1)
    if runs.is_main_rank():
        metrics = {" ".join(names): value for names, value in measured.items()}
        training.log.write(training.step, epoch=epoch + 1, epoch_loss=mean_loss, **metrics)
        print(
            f"epoch {epoch + 1}/{args.epochs}  loss {mean_loss:.4g}  val top-1 {accuracy:.2f}",
            flush=True,
        )
    better = training.end_epoch(epoch, whole, accuracy)
    if better:
        training.save_weights("weights_best.pt", training.content())
    training.save()


def check_batch_sizes(args):
    """UserError if a batch cannot be shared out evenly over the GPUs."""
    _, world_size = runs.rank_and_world_size()
    sizes = {
        "--batch-size": args.batch_size,
        "--batch-size x --cf-ratio": round(args.cf_ratio * args.batch_size),
    }
    for name, size in sizes.items():
        if size % world_size:
            raise runs.UserError(
                f"{name}: {size} images cannot be shared out evenly over {world_size} GPUs"
            )


def of_classes(args, paths, labels):
    """The part of a list that is of --classes; all of it without. UserError if there is none."""
    if not args.classes:
        return paths, labels
    classes = imagenet.class_indices(args.classes)
    found = imagenet.images_of_classes(paths, labels, classes)
    folder = Path(paths[0]).parent.parent
    if not found[0]:
        raise runs.UserError(f"--classes: {folder} has no image of these {len(classes)} classes")
    if runs.is_main_rank():
        print(f"{folder}: {len(found[0])} of {len(paths)} images are of --classes")
    return found


def split_counterfactuals(args):
    """Counterfactuals to test the heads on, and those to train on (None if there are none)."""
    if not args.counterfactual:
        return ([], []), None
    paths, labels = of_classes(args, *imagenet.counterfactual_images(args.counterfactual))
    cut = args.cf_test or 5000
    # --weights may have been trained on all but the first tenth.
    if not args.evaluate or (args.weights and not args.cf_test):
        cut = min(cut, math.ceil(len(paths) / 10))
    if args.evaluate:
        return (paths[:cut], labels[:cut]), None
    if cut == len(paths):
        raise runs.UserError(
            f"--counterfactual: {len(paths)} image is too few to train on and to test with"
        )
    return (paths[:cut], labels[:cut]), (paths[cut:], labels[cut:])


def classify_imagenet(args, device):
    """Train, or evaluate, an ensemble. Everything is written into args.out."""
    check_batch_sizes(args)
    held_out, counterfactual = split_counterfactuals(args)
    tests = load_tests(args, held_out)
    if not args.evaluate:
        root = imagenet.imagenet_root(args.data_dir)
        real = of_classes(args, *imagenet.wnid_images(root / "train"))
        if len(real[0]) < args.batch_size:
            raise runs.UserError(
                f"--batch-size {args.batch_size}: larger than the {len(real[0])} training images"
            )
        args.training_images = len(real[0])
        args.training_counterfactuals = len(counterfactual[0]) if counterfactual else 0
    torch.manual_seed(args.seed)
    ensemble = None
    if args.weights or not args.evaluate:
        ensemble = load_ensemble(args).to(device, memory_format=torch.channels_last)
        check_image_size(args, ensemble.backbone)
    if args.baseline:
        baseline = load_pretrained(args).to(device, memory_format=torch.channels_last)
        check_image_size(args, baseline)

    with runs.claim_folder(args.out, __file__, args.resume):
        if runs.is_main_rank():
            checkpoints.check_resumed(args.out, vars(args))
            runs.describe_run(args.out, __file__, vars(args))
            if args.offline:
                print(runs.OFFLINE)
        runs.wait_for_ranks()
        if args.evaluate:
            rows = evaluate(ensemble, PREDICTIONS, tests, args, device) if ensemble else []
        else:
            rows = train_ensemble(args, ensemble, tests, real, counterfactual, device)
        if args.baseline:
            rows += evaluate(baseline, ["baseline"], tests, args, device)
        rows += corruption_rows(rows, tests)
        if runs.is_main_rank():
            write_table(args.out, rows)
            write_chart(args.out / "factors.png", rows)
            if args.explain:
                pictures.explain_ensemble(
                    ensemble,
                    tests,
                    args.explain,
                    args.image_size,
                    args.batch_size,
                    device,
                    args.out / "explain.png",
                )


# --------------------------------------------------------------------------------------------------
# ImageNet: flags


def parse_ensemble(parser, argv):
    """The arguments of the ensemble. The defaults are the published settings."""
    training = shared_flags(parser)
    training.add_argument(
        "--lr-step", type=runs.positive_int, default=15,
        help="epochs between tenfold cuts of the learning rate",
    )
    training.add_argument(
        "--weight-decay", type=runs.non_negative_float, default=1e-4,
        help="SGD's; its momentum is 0.9",
    )
    training.add_argument("--compile", action="store_true", help="torch.compile the ensemble")
    mixing = parser.add_argument_group("with --counterfactual")
    mixing.add_argument(
        "--cf-ratio", type=runs.non_negative_float, default=1.0,
        help="counterfactuals for each real image in training",
    )
    mixing.add_argument(
        "--cf-test", type=runs.positive_int,
        help="first counterfactuals, held out to test the heads on; default: 5000; in training, "
        "and by default of a trained ensemble, at most a tenth",
    )
    network = parser.add_argument_group("network")
    network.add_argument(
        "--arch", default="resnet50", help="a torchvision classifier that ends in a linear layer"
    )
    network.add_argument(
        "--pretrained", help="file of its weights, or 'none'; torchvision's if not given"
    )
    network.add_argument(
        "--weights-dir", type=Path, default=runs.DOWNLOADS, help="folder for downloads"
    )
    network.add_argument(
        "--image-size", type=runs.positive_int, default=224, help="pixels that the network sees"
    )
    network.add_argument(
        "--batch-size", type=runs.positive_int, default=256,
        help="real images in a batch, over all GPUs together",
    )
    network.add_argument(
        "--amp", choices=["auto", "off", "bf16"], default="auto",
        help="bf16 arithmetic; auto: if the hardware has it",
    )

    data = parser.add_argument_group("data and tests")
    data.add_argument("--data-dir", type=Path, help="ImageNet's folder, with train/ and val/")
    data.add_argument(
        "--classes", nargs="+", metavar="CLASS",
        help="train on and test with images of these alone; no other is predicted: numbers, WNIDs, "
        "(parts of) English names, files with one per line, imagenette, imagenet-a",
    )
    data.add_argument(
        "--workers", type=runs.non_negative_int, default=4, help="processes that decode, per GPU"
    )
    data.add_argument(
        "--baseline", action="store_true",
        help="evaluate the pretrained classifier as well; with --evaluate and no --weights, alone",
    )
    data.add_argument(
        "--cue-conflict", type=Path, metavar="FOLDER", help="Cue-Conflict's 16 folders: shape bias"
    )
    data.add_argument(
        "--imagenet9", type=Path, metavar="FOLDER", help="ImageNet-9's bg_challenge folder"
    )
    data.add_argument(
        "--in9-normalization", choices=["imagenet", "in9"], default="imagenet",
        help="of ImageNet-9's images: the network's own, or the other one of the published code",
    )
    data.add_argument(
        "--ood", type=runs.name_and_path, nargs="+", default=[], metavar="NAME=PATH",
        help="folders by WNID, of all classes or some; all of 0 to 999; or those of ImageNet-C",
    )
    parser.set_defaults(epochs=45, lr=0.001)

    args = parser.parse_args(argv)
    check_common(parser, args, training)
    check_arch(parser, args)
    if not args.counterfactual:
        runs.refuse_flags(parser, mixing, args, "needs --counterfactual")
    if args.explain and args.evaluate and not args.weights:
        parser.error("--explain: shows an ensemble's heads; give its --weights")
    if args.classes and (args.cue_conflict or args.imagenet9):
        parser.error("--classes: Cue-Conflict and ImageNet-9 have categories of their own")
    check_names(parser, "--ood", args.ood, ("val", "counterfactual", "cue-conflict", "in9"))
    if args.in9_normalization == "in9" and not args.imagenet9:
        parser.error("--in9-normalization: needs --imagenet9")
    if not args.evaluate and not args.data_dir:
        parser.error("training needs --data-dir, ImageNet's folder; or give --evaluate")
    return args


# ==================================================================================================
# Command line


def parse_args(argv=None):
    """The arguments of one run. --dataset chooses the flags and their defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--dataset", required=True, choices=[*mnist.VARIANTS, "images", "imagenet"],
        help="chooses the other flags and their defaults: --dataset NAME --help shows them; images "
        "is a folder of your own",
    )
    (dataset,) = runs.look_ahead(argv, "--dataset")
    if dataset == "imagenet":
        return parse_ensemble(parser, argv)
    if dataset in mnist.VARIANTS or dataset == "images":
        return parse_digits(parser, argv, dataset)
    return parser.parse_args(argv)


def main():
    args = parse_args()
    runs.check_one_process(args.dataset)
    device = runs.join_ranks(runs.pick_device(args.device))
    if args.dataset == "imagenet":
        classify_imagenet(args, device)
    else:
        classify_digits(args, device)


if __name__ == "__main__":
    runs.run_main(main)
