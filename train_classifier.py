"""Train a digit classifier on biased, counterfactual or both kinds of images, and test whether it kept the shortcut.

    python train_classifier.py --dataset colored_mnist --train original --out runs/biased
    python train_classifier.py --dataset colored_mnist --train counterfactual --counterfactual runs/cf --out runs/invariant

    python train_classifier.py --dataset imagenet --data-dir IMAGENET --counterfactual runs/cf --out runs/ensemble

Sauer & Geiger, ICLR 2021, section 4. Two test sets tell: `decorrelated`, where colours and textures say nothing of
the digit, and `correlated`, the same digits drawn as in training. The figure to quote is the last epoch's. To choose
settings, there is `biased`: the last 5,000 training images, which --train counterfactual never sees.
"""
import argparse
import copy
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from data.baselines import ColourHead, invariance_penalty, shaken_colours
from data.checkpoints import (check_settings, find_checkpoint, finite_step, leave_out, restore_training,
                              save_checkpoint, save_training, step_seed)
from data.explain import explain_digits, explain_imagenet
from data.imagenet import Images, batches, counterfactual_images, normalized, transform, wnid_images
from data.mnist import VARIANTS, load_counterfactuals, load_variant, to_float
from data.robustness import ANSWERS, HEADS, evaluate, load_tests, write_table
from data.runs import (DOWNLOADS, Log, StopSignal, UserError, any_rank, claim_folder, describe_run, fraction, join_ranks,
                       load_tensors, mean_over_ranks, non_negative_float, non_negative_int, pick_bf16, pick_device,
                       plain, positive_int, rank_and_ranks, refuse_group, run_main, save_tensors, write_json)
from data.weights import add_torchvision_file, check_state_dict, load_network
from generate import generate_batch, pretrained
from generate import parse_args as generate_flags
from train_cgn import load_generator, update_average

# What a resumed run must share with the run that it continues.
SETTINGS = {"dataset", "offline", "batch_size", "max_steps", "lr", "seed", "train", "textures", "gamma", "augment", "n",
            "method", "environments", "penalty", "arch", "steps", "cf_ratio", "schedule", "lr_step", "warmup", "weight_decay", "ema", "image_size"}


class MnistClassifier(nn.Module):
    """(N, 3, 32, 32) in [-1, 1] -> log-probabilities (N, 10). Keys and shapes are those of the published classifier."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            nn.BatchNorm2d(3), nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2, 1),      # 16 x 16
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),        # 8 x 8
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AvgPool2d(7))
        self.cls = nn.Sequential(nn.Linear(64, 10))

    def features(self, x):
        """What the last convolution gives, (N, 64, 8, 8). The first BatchNorm's weight and bias go into the convolution
        behind it, as a fourth channel of ones: without a gradient of its input, a step takes 15 % less on a CPU."""
        norm, first = self.model[:2]
        x = F.batch_norm(x, norm.running_mean, norm.running_var, training=self.training, eps=norm.eps)
        weight = torch.cat([first.weight * norm.weight[:, None, None],
                            (first.weight * norm.bias[:, None, None]).sum(1, keepdim=True)], 1)
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1).contiguous(memory_format=torch.channels_last)
        return self.model[2:-1](F.conv2d(x, weight, first.bias, padding=2))

    def answer(self, features):
        return F.log_softmax(self.cls(self.model[-1](features).flatten(1)), 1)

    def forward(self, x):
        return self.answer(self.features(x))


# ---------------------------------------------------------------------------------------------------------------------
# Data


def draw_counterfactuals(args, device):
    """As load_counterfactuals, drawn now by the generator that comes along: what generate.py makes by default."""
    if args.offline:
        raise UserError(f"--offline --train {args.train}: needs --counterfactual, made by a generator of --offline")
    cgn, _ = load_generator(pretrained(args.dataset))
    settings = generate_flags(["--seed", str(args.seed)])
    parts = [generate_batch(cgn.to(device), settings, start, min(start + 500, args.n), device)
             for start in range(0, args.n, 500)]
    images, labels = (torch.cat(column) for column in zip(*parts))
    return images.to(device), labels[:, 0].long().to(device)


def training_images(args, original, counterfactual, epoch):
    """The images of one epoch, uint8 (n, 3, 32, 32), and labels. Originals are drawn anew, where the variant does so."""
    parts = []
    if args.train != "counterfactual":
        parts.append((original.all_images(args.seed + 1000 + epoch, decorrelated=args.train == "decorrelated"),
                      original.labels))
    if args.train in ("counterfactual", "both"):
        parts.append(counterfactual)
    return tuple(torch.cat(column) if len(column) > 1 else column[0] for column in zip(*parts))


# ---------------------------------------------------------------------------------------------------------------------
# Training and testing


@torch.no_grad()
def accuracy(classifier, images, labels):
    """Percent of correct answers in eval mode. images: uint8."""
    classifier.eval()
    correct = sum((classifier(to_float(x)).argmax(1) == y).sum()
                  for x, y in zip(images.split(1000), labels.split(1000)))
    return 100 * correct.item() / len(labels)


def turned(images, strength, generator):
    """Images turned, sheared, stretched and moved at random: by up to 0.25 rad, 0.25, 20 % and 2.5 pixels at strength 1.

    images: (N, 3, H, W). The random numbers come from a CPU generator, so that every device agrees.
    """
    numbers = strength * (2 * torch.rand(6, len(images), generator=generator) - 1)
    angle, shear, wide, high, right, down = numbers.to(images.device)
    cosine, sine = (0.25 * angle).cos(), (0.25 * angle).sin()
    wide, high, shear, move = 1 + 0.2 * wide, 1 + 0.2 * high, 0.25 * shear, 5 / images.shape[3]
    rows = [wide * cosine, shear * cosine - high * sine, move * right, wide * sine, shear * sine + high * cosine, move * down]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), images.shape, align_corners=False)
    return F.grid_sample(images, grid, "nearest", "reflection", align_corners=False)


def train_step(classifier, colour_head, optimizer, x, y, args, seed):
    """One update. Returns the loss, how many answers were right, and whether the update was left out."""
    x, generator = to_float(x), torch.Generator().manual_seed(seed)
    if args.augment:
        x = turned(x, args.augment, generator)
    if args.method == "irm":
        x, environment = shaken_colours(x, args.environments, generator)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
        features = classifier.features(x)
        log_probabilities = classifier.answer(features).float()
    loss = F.nll_loss(log_probabilities, y)
    if args.method == "irm":
        loss = loss + args.penalty * invariance_penalty(log_probabilities, y, environment, args.environments)
    elif args.method == "lnl":
        loss = loss + colour_head.loss(features.float(), x, args.penalty)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    bad = finite_step(optimizer, loss)
    return loss.detach(), (log_probabilities.detach().argmax(1) == y).sum(), bad


def train_classifier(args, seed, out, data, tests, device, stop):
    """One classifier, from its own seed. Returns the last epoch's numbers; None if it was stopped.

    data: original and counterfactual training images, and the test's digits. tests: name -> (images, labels).
    """
    out.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    classifier = MnistClassifier()
    if args.weights:
        load_classifier(classifier, args.weights)
    classifier.to(device, memory_format=torch.channels_last)
    colour_head = ColourHead().to(device)                                  # of --method lnl
    optimizer = torch.optim.Adadelta([*classifier.parameters(), *colour_head.parameters()], lr=args.lr)
    # Position: images of the epoch that were seen. Sums: of their losses, and right answers.
    state = {"epoch": 0, "position": 0, "sums": torch.zeros(2), "best": -1.0, "numbers": {}}
    path, saved = find_checkpoint(out) if args.resume else (None, None)
    if saved:
        check_settings(path, saved["args"], args, vars(args).keys() - SETTINGS)
        classifier.load_state_dict(saved["classifier"])
        colour_head.load_state_dict(saved["colour_head"])
        optimizer.load_state_dict(saved["optimizer"])
        state = {name: saved[name] for name in state}

    def save():
        save_checkpoint(out, state | {"classifier": classifier.state_dict(), "colour_head": colour_head.state_dict(),
                                      "optimizer": optimizer.state_dict(), "args": plain(args)})

    log, bad_steps = Log(out / "log.jsonl", state["epoch"]), 0
    for epoch in range(state["epoch"], 0 if args.evaluate else args.epochs):
        images, labels = training_images(args, *data[:2], epoch)
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(len(labels), generator=generator).to(device)
        if args.max_steps:
            order = order[:args.max_steps * args.batch_size]
        optimizer.param_groups[0]["lr"] = args.lr * args.gamma ** epoch
        state["sums"] = state["sums"].to(device)
        classifier.train()
        for index in order[state["position"]:].split(args.batch_size):
            step = step_seed(1_000 * seed + epoch, state["position"])
            loss, correct, bad = train_step(classifier, colour_head, optimizer, images.index_select(0, index),
                                            labels[index], args, step)
            bad_steps = bad_steps + 1 if bad else 0
            state["position"] += len(index)
            if bad_steps:
                leave_out(epoch + 1, {"loss": loss}, bad_steps, args, [classifier], log)
            else:
                state["sums"] = state["sums"] + torch.stack([loss * len(index), correct])
            if stop:
                save()
                print(f"stopped in epoch {epoch + 1} of seed {seed}; go on with the same command and --resume")
                return None
        loss, train_accuracy = (state["sums"] / len(order)).tolist()
        numbers = {"loss": loss, "train": 100 * train_accuracy}
        numbers |= {name: accuracy(classifier, *test) for name, test in tests.items()}
        log.write(epoch + 1, seed=seed, **numbers)
        print(f"seed {seed}  epoch {epoch + 1}/{args.epochs}  " +
              "  ".join(f"{name} {value:.4g}" for name, value in numbers.items()), flush=True)
        # Chosen without a look at the test digits: that would be selecting on what is to be measured.
        if numbers["biased"] > state["best"]:
            save_tensors(out / "weights_best.pt", classifier.state_dict())
        save_tensors(out / "weights.pt", classifier.state_dict())
        state = {"epoch": epoch + 1, "position": 0, "sums": torch.zeros(2), "numbers": numbers,
                 "best": max(state["best"], numbers["biased"])}
        save()
    numbers = state["numbers"] or {name: accuracy(classifier, *test) for name, test in tests.items()}
    if args.explain:
        digits = data[2].digits, data[2].labels
        numbers |= explain_digits(classifier, tests["decorrelated"][0], *digits, args.explain, out / "explain.png")
    return numbers


def load_classifier(classifier, path):
    """Weights of this script, or published ones, into `classifier`. UserError if they do not fit."""
    state = load_tensors(path)
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not the weights of a classifier")
    classifier.load_state_dict(check_state_dict(state, classifier.state_dict(), path))


def summarize(args, results, out):
    """Print and write mean and spread (standard deviation) over seeds."""
    table = {}
    for name in [name for name in next(iter(results.values())) if name != "loss"]:
        values = torch.tensor([numbers[name] for numbers in results.values()], dtype=torch.float64)
        table[name] = {"mean": values.mean().item(), "std": values.std(correction=len(values) > 1).item()}
        print(f"{name:>15} {table[name]['mean']:6.2f} +- {table[name]['std']:.2f} %  ({len(values)} seeds)")
    write_json(out / "results.json", {"dataset": args.dataset, "train": args.train, "offline": args.offline,
                                      "summary": table, "seeds": results})


# ---------------------------------------------------------------------------------------------------------------------
# ImageNet: the invariant ensemble (section 4.2)

class Ensemble(nn.Module):
    """A torchvision classifier whose last linear layer is replaced by three: (N, 3, H, W) -> logits (N, 3, 1000)."""

    def __init__(self, arch, state=None, keep_head=False):
        """state: of the pretrained classifier, or None. keep_head: all three heads begin as its last layer."""
        super().__init__()
        self.backbone = torchvision.models.get_model(arch, weights=None)
        if state is not None:
            self.backbone.load_state_dict(state)
        name, last = [(n, m) for n, m in self.backbone.named_modules() if isinstance(m, nn.Linear)][-1]
        if last.out_features != 1000:
            raise UserError(f"--arch {arch}: does not end in a linear layer of 1000 classes")
        parent, _, child = name.rpartition(".")
        setattr(self.backbone.get_submodule(parent), child, nn.Identity())
        self.heads = nn.ModuleList(nn.Linear(last.in_features, 1000) for _ in HEADS)
        if keep_head:
            for head in self.heads:
                head.load_state_dict(last.state_dict())

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():                      # statistics stay those of the pretrained network
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, x):
        features = self.backbone(x)
        return torch.stack([head(features) for head in self.heads], 1)


def ensemble_loss(logits, labels, counterfactual_labels):
    """Real images first: cross-entropy of the heads' mean; then counterfactuals: each head's with its own label, summed.

    logits: (R + C, 3, 1000). labels: (R,). counterfactual_labels: (C, 3).
    """
    real, counterfactual = logits.float().split([len(labels), len(logits) - len(labels)])
    loss = F.cross_entropy(real.mean(1), labels)
    if len(counterfactual):
        loss = loss + sum(F.cross_entropy(counterfactual[:, head], counterfactual_labels[:, head]) for head in range(3))
    return loss


def pretrained_state(args):
    """The weights of a torchvision classifier, fetched if need be; None with --offline or --pretrained none."""
    if args.offline or args.pretrained == "none":
        return None
    with torch.device("meta"):
        expected = torchvision.models.get_model(args.arch, weights=None).state_dict()
    add_torchvision_file(args.arch)
    return load_network(args.arch, args.weights_dir, args.pretrained and Path(args.pretrained), expected)


def learning_rate(args, epoch):
    """Of this moment, in epochs with fractions: linear warm-up, then steps of a tenth, or a cosine."""
    if epoch < args.warmup:
        return args.lr * (epoch + 1e-3) / args.warmup
    if args.schedule == "cosine":
        return args.lr * (1 + math.cos(math.pi * (epoch - args.warmup) / (args.epochs - args.warmup))) / 2
    return args.lr * 0.1 ** (int(epoch) // args.lr_step)


def epoch_order(count, steps, batch, seed, epoch):
    """Numbers below count for all steps, in random order, whole permutations first; this rank's share of each batch."""
    generator = torch.Generator().manual_seed(step_seed(seed, epoch))
    rounds = -(-steps * batch // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[:steps * batch]
    rank, ranks = rank_and_ranks()
    return order.view(steps, batch)[:, rank::ranks].flatten().tolist()


def imagenet_batches(real, counterfactual, args, epoch, first, device):
    """Batches of an epoch from step `first` on: real images, each with its counterfactuals, if there are any."""
    _, ranks = rank_and_ranks()
    parts = []
    for images, size in ((real, args.batch_size), (counterfactual, round(args.cf_ratio * args.batch_size))):
        if images is not None and size:
            images.epoch = epoch
            order = epoch_order(len(images), args.steps, size, images.seed, epoch)[first * size // ranks:]
            parts.append(batches(images, order, size // ranks, args.workers, device))
    return zip(*parts)


def imagenet_step(model, optimizer, batch, args):
    """One update; both kinds of images in the same forward. Returns the loss, and whether the update was left out."""
    pixels, labels = torch.cat([pixels for pixels, _ in batch]), batch[0][1]
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=args.bf16):
        logits = model(normalized(pixels))
    loss = ensemble_loss(logits, labels, batch[1][1] if len(batch) > 1 else None)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    return loss.detach(), finite_step(optimizer, loss)


def train_imagenet(args, ensemble, tests, real, counterfactual, out, device):
    """Epochs, each with its evaluation; rank 0 writes. Returns the last evaluation's rows and what was evaluated."""
    rank, ranks = rank_and_ranks()
    parts = {"ensemble": ensemble}
    if args.ema:
        parts["average"] = copy.deepcopy(ensemble).requires_grad_(False)
    tested = parts.get("average", ensemble)
    optimizer = torch.optim.SGD(ensemble.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    step, epoch, best, loss_sum, rows = 0, 0, -1.0, torch.zeros((), device=device), []
    if state := restore_training(out, args, parts, [optimizer], vars(args).keys() - SETTINGS):
        step, epoch, best, loss_sum = state["step"], state["epoch"], state["best"], state["loss_sum"].to(device)
    model = nn.parallel.DistributedDataParallel(ensemble, broadcast_buffers=False) if ranks > 1 else ensemble
    if args.compile:
        ensemble.compile()
    log, stop = Log(out / "log.jsonl", step, epoch) if rank == 0 else None, StopSignal()
    last, bad_steps = args.epochs * args.steps, 0

    def save(**more):
        if rank == 0:
            save_training(out, step, args, parts, [optimizer], arch=args.arch, epoch=epoch, best=best, **more)

    while epoch < args.epochs:
        model.train()
        for batch in imagenet_batches(real, counterfactual, args, epoch, step - epoch * args.steps, device):
            torch.manual_seed(step_seed(args.seed + 101 * rank, step))     # of dropout
            optimizer.param_groups[0]["lr"] = learning_rate(args, step / args.steps)
            loss, bad = imagenet_step(model, optimizer, batch, args)
            step, stopping, bad_steps = step + 1, any_rank(stop, device), bad_steps + 1 if bad else 0
            if bad_steps:
                leave_out(step, {"loss": loss}, bad_steps, args, [], log)
            else:
                loss_sum = loss_sum + loss
                if args.ema:
                    update_average(parts["average"], ensemble, args.ema)
            if rank == 0 and step % args.log_every == 0:
                loss = loss_sum.item() / (step - epoch * args.steps)       # of this epoch so far, on this rank
                log.write(step, loss=loss, lr=optimizer.param_groups[0]["lr"])
                log.progress(step, last, {"epoch": epoch + 1, "loss": loss})
            if stopping or step % args.save_every == 0:
                save(loss_sum=mean_over_ranks(loss_sum.clone()))
            if stopping:
                if rank == 0:
                    print(f"\nstopped after step {step}; go on with the same command and --resume")
                return None, None
        step = (epoch + 1) * args.steps                                    # if a batch was nothing but damaged images
        save(loss_sum=mean_over_ranks(loss_sum.clone()))                   # in case of a kill while evaluating
        rows = evaluate(tested, ANSWERS, tests, args, device)
        measure = next((row[3] for row in rows if row[:3] == ("val", "mean", "top-1")), 0.0)
        loss, epoch = mean_over_ranks(loss_sum).item() / args.steps, epoch + 1
        loss_sum = torch.zeros((), device=device)
        better, best = measure > best, max(best, measure)
        if rank == 0:
            log.write(step, epoch=epoch, epoch_loss=loss, **{" ".join(row[:3]): row[3] for row in rows})
            print(f"epoch {epoch}/{args.epochs}  loss {loss:.4g}  val top-1 {measure:.2f}", flush=True)
        save(loss_sum=loss_sum, best_too=better)
    return rows or evaluate(tested, ANSWERS, tests, args, device), tested        # resumed when all was done


def load_ensemble(args):
    """A new ensemble on pretrained weights, or the one of --weights."""
    if args.arch not in torchvision.models.list_models(torchvision.models):
        raise UserError(f"--arch {args.arch}: not a classifier of torchvision, such as resnet50")
    if not args.weights:
        return Ensemble(args.arch, pretrained_state(args), args.heads == "pretrained")
    content = load_tensors(args.weights)
    if not isinstance(content, dict) or content.get("arch") != args.arch:
        raise UserError(f"--weights {args.weights}: not an ensemble on {args.arch}; give its --arch, or another file")
    ensemble, name = Ensemble(args.arch), "average" if "average" in content else "ensemble"
    ensemble.load_state_dict(check_state_dict(content.get(name), ensemble.state_dict(), args.weights))
    return ensemble


def load_baseline(args):
    """The plain classifier, as it was pretrained."""
    classifier = torchvision.models.get_model(args.arch, weights=None)
    classifier.load_state_dict(pretrained_state(args) or classifier.state_dict())
    return classifier


def main_imagenet(args):
    device = join_ranks(pick_device(args.device))
    rank, ranks = rank_and_ranks()
    args.bf16 = pick_bf16(args.amp, device)
    if not args.evaluate and not args.data_dir:
        raise UserError("training needs --data-dir, ImageNet's folder; or give --evaluate")
    for name, size in (("--batch-size", args.batch_size), ("--batch-size x --cf-ratio", args.cf_ratio * args.batch_size)):
        if round(size) % ranks:
            raise UserError(f"{name}: {size} images cannot be shared out evenly over {ranks} ranks")
    (paths, labels), cut = counterfactual_images(args.counterfactual) if args.counterfactual else ([], []), args.cf_test
    if not args.evaluate:
        cut = min(cut, -(-len(paths) // 10))               # the others are for training
    tests = load_tests(args, (paths[:cut], labels[:cut]))
    if not tests:
        raise UserError("nothing to evaluate: give --data-dir, --counterfactual, --cue-conflict, --imagenet9 or --ood")
    if args.explain and all(kind in ("conflict", "in9") for kind, _ in tests.values()):
        raise UserError("--explain: needs images with classes of ImageNet: give --data-dir, --counterfactual or --ood")
    counterfactual, settings = None, {"device": device if args.decode == "device" else None}
    if not args.evaluate:
        change = transform(True, args.image_size)
        real = Images(*wnid_images(args.data_dir / "train"), change, args.seed, **settings)
        args.steps = min(len(real) // args.batch_size, args.max_steps or len(real))
        if not args.steps:
            raise UserError(f"--batch-size {args.batch_size}: larger than the {len(real)} training images")
        if len(paths) > cut:
            counterfactual = Images(paths[cut:], labels[cut:], change, args.seed + 1, **settings)
        elif args.counterfactual:
            raise UserError(f"--counterfactual: {len(paths)} image is too few to train on and to test with")
    torch.manual_seed(args.seed)
    ensemble = load_ensemble(args).to(device, memory_format=torch.channels_last)
    baseline = load_baseline(args).to(device, memory_format=torch.channels_last) if args.baseline else None
    out = claim_folder(args.out, __file__, args.resume) if rank == 0 else args.out
    if rank == 0:
        describe_run(out, __file__, args)
        if args.offline:
            print("OFFLINE: random weights. No number of this run is about ImageNet.")
        wanted = 0 if args.evaluate else round(args.cf_ratio * args.batch_size) * args.steps
        if counterfactual and wanted > len(counterfactual):
            print(f"{len(counterfactual)} counterfactuals for {wanted} in each epoch: they are drawn more than once")
    if args.evaluate:
        rows = evaluate(ensemble, ANSWERS, tests, args, device)
    else:
        rows, ensemble = train_imagenet(args, ensemble, tests, real, counterfactual, out, device)
        if rows is None:
            return
    if baseline:
        rows += evaluate(baseline, ["baseline"], tests, args, device)
    if rank == 0:
        write_table(out, rows)
        if args.explain:
            explain_imagenet(ensemble, tests, args, device, out / "explain.png")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", required=True, choices=[*VARIANTS, "imagenet"], help="which digits to tell apart")
    data.add_argument("--counterfactual", type=Path, nargs="+", metavar="FOLDER",
                      help="folder that generate.py wrote; for ImageNet one or many, or patterns")
    data.add_argument("--data-dir", type=Path, help="folder with MNIST's files (data/downloads if not given; fetched if "
                      "missing), or ImageNet's folder, with train/ and val/")
    data.add_argument("--offline", action="store_true", help="synthetic digits, or random networks: nothing is fetched")

    steps = parser.add_argument_group("optimisation")
    steps.add_argument("--weights", type=Path, help="start from these classifier weights")
    steps.add_argument("--epochs", type=positive_int, default=10, help="passes over the training images")
    steps.add_argument("--max-steps", type=positive_int, help="steps in each epoch at most, for a short trial")
    steps.add_argument("--batch-size", type=positive_int, default=64, help="images per step")
    steps.add_argument("--lr", type=non_negative_float, default=1.0,
                       help="learning rate in the first epoch: of Adadelta, for ImageNet of SGD")
    steps.add_argument("--amp", choices=["auto", "off", "bf16"], default="auto",
                       help="bf16 arithmetic in training; tests are in float32; auto: where the hardware multiplies it")

    digits = parser.add_argument_group("MNIST")
    digits.add_argument("--train", choices=["original", "counterfactual", "both", "decorrelated"], default="original",
                        help="images to train on: the biased data, generated ones, or both together; or what a perfect "
                        "generator would make, the ceiling: training digits in colours and textures of any class")
    digits.add_argument("--n", type=positive_int, default=100_000, help="counterfactuals to draw from "
                        "data/pretrained/DATASET.pt if no --counterfactual is given")
    digits.add_argument("--method", choices=["plain", "irm", "lnl"], default="plain", help="or what the paper compares "
                        "with: invariant risk minimisation over environments of shaken colours, learning not to learn")
    digits.add_argument("--environments", type=positive_int, default=2, help="of irm")
    digits.add_argument("--penalty", type=non_negative_float, default=1.0, help="weight of what irm and lnl add")
    digits.add_argument("--textures", help="wildlife: folder with object/ and background/, or 'dtd'; as in train_cgn.py")
    digits.add_argument("--gamma", type=non_negative_float, default=0.7, help="factor of the learning rate per epoch")
    digits.add_argument("--augment", type=non_negative_float, default=0.0, metavar="S",
                        help="turn, shear, stretch and move training images at random; 1: by up to 14 degrees, 20 %%, and "
                        "2.5 pixels")
    digits.add_argument("--seeds", type=non_negative_int, nargs="+", default=[0], metavar="SEED",
                        help="classifiers to train, one for each seed: initial weights and order of the images")

    net = parser.add_argument_group("ImageNet")
    net.add_argument("--arch", default="resnet50", help="a torchvision classifier that ends in a linear layer")
    net.add_argument("--pretrained", help="file of its weights, or 'none'; torchvision's are fetched if not given")
    net.add_argument("--weights-dir", type=Path, default=DOWNLOADS, help="folder for fetched weights")
    net.add_argument("--heads", choices=["fresh", "pretrained"], default="fresh", help="where the three heads begin")
    net.add_argument("--cf-ratio", type=non_negative_float, default=1.0, help="counterfactuals for each real image")
    net.add_argument("--cf-test", type=positive_int, default=5000,
                     help="first counterfactuals, to test the heads on; at most a tenth, and not trained on")
    net.add_argument("--schedule", choices=["step", "cosine"], default="step", help="of the learning rate")
    net.add_argument("--lr-step", type=positive_int, default=15, help="epochs to the next tenth of the learning rate")
    net.add_argument("--warmup", type=non_negative_int, default=0, help="epochs of linear warm-up")
    net.add_argument("--weight-decay", type=non_negative_float, default=1e-4, help="SGD's; its momentum is 0.9")
    net.add_argument("--ema", type=fraction, default=0.0, help="decay of a moving average, evaluated and saved; 0: none")
    net.add_argument("--image-size", type=positive_int, default=224, help="pixels that the network sees")
    net.add_argument("--workers", type=non_negative_int, default=4, help="processes that decode, for each rank")
    net.add_argument("--decode", choices=["workers", "device"], default="workers",
                     help="where images are decoded and cropped; device: nvJPEG, for machines with few CPU cores")
    net.add_argument("--compile", action="store_true", help="torch.compile the ensemble")
    net.add_argument("--log-every", type=positive_int, default=100, help="steps between lines of the log")
    net.add_argument("--save-every", type=positive_int, default=1000, help="steps between checkpoints within an epoch")
    net.add_argument("--baseline", action="store_true", help="evaluate the pretrained classifier as well")
    net.add_argument("--cue-conflict", type=Path, metavar="FOLDER", help="Cue-Conflict's 16 folders: shape bias")
    net.add_argument("--imagenet9", type=Path, metavar="FOLDER", help="ImageNet-9's bg_challenge folder")
    net.add_argument("--in9-normalization", choices=["imagenet", "in9"], default="imagenet",
                     help="of ImageNet-9's images: the networks' own, or the other one of the published CGN code")
    net.add_argument("--ood", nargs="+", default=[], metavar="NAME=PATH", help="folders by WNID, of all classes or some")

    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, required=True, help="run folder; new, empty, or continued with --resume")
    run.add_argument("--resume", nargs="?", const="auto", choices=["auto"],
                     help="go on where the run in --out was interrupted; begin if nothing was saved")
    run.add_argument("--bad-steps", type=positive_int, default=20,
                     help="steps in a row without finite losses or gradients, which are left out, before giving up")
    run.add_argument("--evaluate", action="store_true", help="no training: test --weights")
    run.add_argument("--explain", type=non_negative_int, default=0, metavar="N", help="Grad-CAM heat maps of N test images")
    run.add_argument("--seed", type=non_negative_int, default=0, help="of the data: colours, crops and test images")
    run.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one")
    early = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    early.add_argument("--dataset", nargs="?")
    imagenet = early.parse_known_args(argv)[0].dataset == "imagenet"
    if imagenet:                                                           # the published settings
        parser.set_defaults(epochs=45, batch_size=256, lr=0.001)
    args = parser.parse_args(argv)
    refuse_group(parser, digits if imagenet else net, args)
    if args.environments > args.batch_size:
        parser.error(f"--environments {args.environments}: a batch of {args.batch_size} cannot hold an image of each")
    if args.evaluate and not args.weights:
        parser.error("--evaluate needs --weights, a classifier's weights.pt")
    return args


def main():
    args = parse_args()
    if args.dataset == "imagenet":
        return main_imagenet(args)
    args.counterfactual, args.data_dir = (args.counterfactual or [None])[0], args.data_dir or DOWNLOADS
    generated = args.train in ("counterfactual", "both")
    if args.counterfactual and not generated:
        raise UserError(f"--train {args.train} takes no --counterfactual")
    device = pick_device(args.device)
    args.bf16 = pick_bf16(args.amp, device)
    out = claim_folder(args.out, __file__, args.resume)
    if args.offline:
        print("OFFLINE: synthetic digits and drawn textures. No number of this run is about MNIST.")
    original, test = load_variant(args.dataset, args.data_dir, textures=args.textures, offline=args.offline,
                                  seed=args.seed, device=device)
    counterfactual = None
    if generated:
        counterfactual = (draw_counterfactuals(args, device) if not args.counterfactual else
                          load_counterfactuals(args.counterfactual, args.dataset, args.offline, device))
    tests = {"decorrelated": (test.all_images(args.seed, decorrelated=True), test.labels),
             "correlated": (test.all_images(args.seed), test.labels),
             "biased": (original.all_images(args.seed)[-5000:], original.labels[-5000:])}
    describe_run(out, __file__, args)
    results, stop = {}, StopSignal()
    for seed in args.seeds:
        numbers = train_classifier(args, seed, out / f"seed_{seed}", (original, counterfactual, test), tests, device, stop)
        if numbers is None:
            return
        results[seed] = numbers
    summarize(args, results, out)


if __name__ == "__main__":
    run_main(main)
