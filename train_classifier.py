"""Train a digit classifier on biased, counterfactual or both kinds of images, and test whether it kept the shortcut.

    python train_classifier.py --dataset colored_mnist --train original --out runs/biased
    python train_classifier.py --dataset colored_mnist --train counterfactual --counterfactual runs/cf --out runs/invariant

    python train_classifier.py --dataset imagenet --data-dir IMAGENET --counterfactual runs/cf --out runs/ensemble

Sauer & Geiger, ICLR 2021, section 4. Two test sets tell: `decorrelated`, where colours and textures say nothing of
the digit, and `correlated`, the same digits drawn as in training. The figure to quote is the last epoch's.
"""
import argparse
import copy
import functools
import json
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from data.checkpoints import step_seed
from data.imagenet import (Images, batches, counterfactual_images, cue_conflict_images, facts, imagenet9_images,
                           normalized, transform, validation_images, wnid_images)
from data.mnist import VARIANTS, load_variant, to_float
from data.runs import (DOWNLOADS, Log, UserError, claim_folder, describe_run, fraction, join_ranks, load_tensors,
                       mean_over_ranks, non_negative_float, non_negative_int, pick_bf16, pick_device, positive_int,
                       rank_and_ranks, run_main, save_tensors, write_atomically, write_json)
from data.weights import add_torchvision_file, check_state_dict, load_network
from train_cgn import update_average


class MnistClassifier(nn.Module):
    """(N, 3, 32, 32) in [-1, 1] -> log-probabilities (N, 10). Keys and shapes are those of the published classifier."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            nn.BatchNorm2d(3), nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2, 1),      # 16 x 16
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),        # 8 x 8
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AvgPool2d(7))
        self.cls = nn.Sequential(nn.Linear(64, 10))

    def forward(self, x):
        return F.log_softmax(self.cls(self.model(x).flatten(1)), 1)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def load_counterfactuals(folder, args, device):
    """A data set of generate.py: uint8 (n, 3, 32, 32) on `device`, and the classes of the shapes (n,)."""
    try:
        facts = json.loads((folder / "dataset.json").read_text())
        n, chunks = facts["n"], facts["chunks"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"--counterfactual {folder}: no complete data set of generate.py (dataset.json is missing or "
                        "damaged); if it was interrupted, run it again with --resume") from None
    if facts["dataset"] not in (None, args.dataset):
        raise UserError(f"--counterfactual {folder}: made for {facts['dataset']}, not {args.dataset}")
    if facts["offline"] != args.offline:
        raise UserError(f"--counterfactual {folder}: made {'' if facts['offline'] else 'not '}from --offline weights; "
                        "synthetic digits and MNIST must not be mixed: use the same --offline everywhere")
    images = torch.empty(n, 3, 32, 32, dtype=torch.uint8, device=device)
    labels = torch.empty(n, dtype=torch.int64, device=device)
    start = 0
    for number in range(chunks):
        path = folder / f"chunk_{number:05d}.pt"
        chunk = load_tensors(path)
        try:
            stop = start + len(chunk["images"])
            images[start:stop], labels[start:stop] = chunk["images"], chunk["labels"][:, 0]
        except (KeyError, TypeError, IndexError, RuntimeError) as error:
            raise UserError(f"{path}: not a chunk of this data set ({error}); make it again") from None
        start = stop
    if start != n or labels.max() > 9:
        raise UserError(f"--counterfactual {folder}: {start} images where dataset.json promises {n}; make it again")
    return images, labels


def training_images(args, original, counterfactual, epoch):
    """The images of one epoch, uint8 (n, 3, 32, 32), and labels. Originals are drawn anew, where the variant does so."""
    parts = []
    if args.train in ("original", "both"):
        parts.append((original.all_images(args.seed + 1000 + epoch), original.labels))
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


def train_epoch(classifier, optimizer, images, labels, order, args):
    """One pass in the given order. Returns mean loss and accuracy in percent, while training."""
    classifier.train()
    loss_sum = correct = torch.zeros((), device=labels.device)
    for index in order.split(args.batch_size):
        x, y = to_float(images.index_select(0, index)).contiguous(memory_format=torch.channels_last), labels[index]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
            log_probabilities = classifier(x).float()
        loss = F.nll_loss(log_probabilities, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            loss_sum = loss_sum + loss * len(y)
            correct = correct + (log_probabilities.argmax(1) == y).sum()
    return loss_sum.item() / len(order), 100 * correct.item() / len(order)


def train_classifier(args, seed, out, data, tests, device):
    """One classifier, from its own seed. Returns the last epoch's numbers."""
    out.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    classifier = MnistClassifier()
    if args.weights:
        load_classifier(classifier, args.weights)
    classifier.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adadelta(classifier.parameters(), lr=args.lr)
    first, best, numbers = 0, -1.0, {}
    if args.resume and (out / "checkpoint.pt").is_file():
        state = load_tensors(out / "checkpoint.pt")
        classifier.load_state_dict(state["classifier"])
        optimizer.load_state_dict(state["optimizer"])
        first, best, numbers = state["epoch"], state["best"], state["numbers"]
    log = Log(out / "log.jsonl", first)
    for epoch in range(first, args.epochs):
        images, labels = training_images(args, *data, epoch)
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(len(labels), generator=generator).to(device)
        if args.max_steps:
            order = order[:args.max_steps * args.batch_size]
        optimizer.param_groups[0]["lr"] = args.lr * args.gamma ** epoch
        loss, train_accuracy = train_epoch(classifier, optimizer, images, labels, order, args)
        numbers = {"loss": loss, "train": train_accuracy} | {name: accuracy(classifier, *t) for name, t in tests.items()}
        log.write(step=epoch + 1, seed=seed, **numbers)
        print(f"seed {seed}  epoch {epoch + 1}/{args.epochs}  " +
              "  ".join(f"{name} {value:.4g}" for name, value in numbers.items()), flush=True)
        # Chosen without a look at the decorrelated test: that would be selecting on what is to be measured.
        if numbers["correlated"] > best:
            best = numbers["correlated"]
            save_tensors(out / "weights_best.pt", classifier.state_dict())
        save_tensors(out / "weights.pt", classifier.state_dict())
        save_tensors(out / "checkpoint.pt", {"classifier": classifier.state_dict(), "optimizer": optimizer.state_dict(),
                                             "epoch": epoch + 1, "best": best, "numbers": numbers})
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
    for name in ("train", "decorrelated", "correlated"):
        values = torch.tensor([numbers[name] for numbers in results.values()], dtype=torch.float64)
        table[name] = {"mean": values.mean().item(), "std": values.std(correction=len(values) > 1).item()}
        print(f"{name:>13} accuracy {table[name]['mean']:6.2f} +- {table[name]['std']:.2f} %  ({len(values)} seeds)")
    write_json(out / "results.json", {"dataset": args.dataset, "train": args.train, "offline": args.offline,
                                      "summary": table, "seeds": results})


# ---------------------------------------------------------------------------------------------------------------------
# ImageNet: the invariant ensemble (section 4.2)

HEADS = "shape", "texture", "background"


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


def with_means(logits):
    """Logits (N, 3, 1000) by head, and of the mean of all three, and of shape and texture: (N, 5, 1000)."""
    means = [logits.mean(1), logits[:, :2].mean(1)]
    return torch.cat([logits, torch.stack(means, 1)], 1) if logits.shape[1] == 3 else logits


def top_hits(logits, labels, present=None):
    """Top-1 and top-5 hits by head, (heads, 2). labels: (N,), or (N, heads). present: the only classes to choose from."""
    logits = with_means(logits)
    if present is not None:
        logits = logits.masked_fill(~torch.isin(torch.arange(1000, device=logits.device), present), -torch.inf)
    labels = labels[:, None] if labels.ndim == 1 else torch.cat([labels, labels[:, :1], labels[:, :1]], 1)
    hits = logits.topk(5).indices == labels[..., None]                                               # (N, heads, 5)
    return torch.stack([hits[..., 0].sum(0), hits.any(2).sum(0)], 1)


def conflict_hits(logits, labels):
    """Images that each head puts into the category of their shape, and of their texture: (heads, 2). labels: (N, 2).

    A category's probability is the mean over its classes (Geirhos et al. 2019).
    """
    probabilities = with_means(logits).softmax(2)
    categories = torch.stack([probabilities[..., classes].mean(2)
                              for classes in facts()["cue_conflict"]["categories"].values()], 2)
    answers = categories.argmax(2)
    return torch.stack([(answers == labels[:, :1]).sum(0), (answers == labels[:, 1:]).sum(0)], 1)


def imagenet9_hits(logits, labels):
    """Images whose best of all 1000 classes belongs to the right one of nine: (heads, 1)."""
    groups = torch.tensor(facts()["in9"]["imagenet_to_in9"], device=logits.device)
    return (groups[with_means(logits).argmax(2)] == labels[:, None]).sum(0)[:, None]


@torch.inference_mode()
def count_hits(model, test, hits, args, device):
    """Sum of `hits` over a test (paths, labels), shared out over ranks, and how many images it has."""
    rank, ranks = rank_and_ranks()
    images, sums, count = Images(*test, transform(False, args.image_size)), 0, torch.zeros(1, device=device)
    order = range(rank, len(images), ranks)
    for pixels, labels in batches(images, order, args.batch_size // ranks, args.workers, device):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            logits = model(normalized(pixels)).float()
        sums, count = sums + hits(logits if logits.ndim == 3 else logits[:, None], labels), count + len(pixels)
    if not isinstance(sums, torch.Tensor):                 # more ranks than images
        raise UserError(f"{test[0][0]} and others: fewer images than ranks")
    sums, count = (ranks * mean_over_ranks(x.double()) for x in (sums, count))
    return sums.round().long().tolist(), round(count.item())


def evaluate(model, tests, args, device):
    """Rows (test, head, measure, percent, hits, images) of all tests."""
    model.eval()
    rows = []

    def add(test, names, measure, hits, totals):
        rows.extend((test, name, measure, 100 * hit / total if total else float("nan"), hit, total)
                    for name, hit, total in zip(names, hits, totals))

    single = not isinstance(getattr(model, "module", model), Ensemble)
    names = ["baseline"] if single else [*HEADS, "mean", "shape and texture"]
    gaps = {}
    for name, (kind, test) in tests.items():
        if kind == "counterfactual" and single:
            continue
        present = test[1].unique().to(device) if kind == "ood" else None
        score = {"conflict": conflict_hits, "in9": imagenet9_hits}.get(kind, functools.partial(top_hits, present=present))
        hits, count = count_hits(model, test, score, args, device)
        first = [row[0] for row in hits]
        if kind == "conflict":
            add(name, names, "shape bias", first, [sum(row) for row in hits])
            add(name, names, "right shape", first, [count] * len(first))
        else:
            rows_of = 3 if kind == "counterfactual" else len(names)
            add(name, names[:rows_of], "top-1", first, [count] * len(first))
            if kind in ("val", "ood"):
                add(name, names, "top-5", [row[1] for row in hits], [count] * len(first))
            gaps[name] = [100 * hit / count for hit in first]
    if {"in9 mixed_same", "in9 mixed_rand"} <= gaps.keys():
        rows += [("in9", name, "background gap", same - rand, None, None)
                 for name, same, rand in zip(names, gaps["in9 mixed_same"], gaps["in9 mixed_rand"])]
    return rows


def write_table(out, rows):
    """results.json and results.md; the table on the screen."""
    lines = ["| test | head | measure | percent | of |", "|---|---|---|---|---|"]
    for test, head, measure, percent, hits, total in rows:
        lines.append(f"| {test} | {head} | {measure} | {percent:.2f} | {'' if total is None else f'{hits} / {total}'} |")
    names = ("test", "head", "measure", "percent", "hits", "images")
    write_json(out / "results.json", [dict(zip(names, row)) for row in rows])
    write_atomically(out / "results.md", lambda temporary: temporary.write_text("\n".join(lines) + "\n"))
    print("\n".join(lines), flush=True)


def load_tests(args, counterfactual):
    """Name -> (kind, (paths, labels)) of everything to be evaluated."""
    tests = {"val": ("val", validation_images(args.data_dir))} if args.data_dir else {}
    if counterfactual:
        paths, labels = counterfactual
        tests["counterfactual"] = "counterfactual", (paths[:args.cf_test], labels[:args.cf_test])
    if args.cue_conflict:
        tests["cue-conflict"] = "conflict", cue_conflict_images(args.cue_conflict)
    if args.imagenet9:
        tests |= {f"in9 {name}": ("in9", images) for name, images in imagenet9_images(args.imagenet9).items()}
    for name, path in (pair.partition("=")[::2] for pair in args.ood):
        if not path:
            raise UserError(f"--ood {name}: should be NAME=PATH")
        tests[name] = "ood", wnid_images(path)
        print(f"{name}: {len(tests[name][1][1].unique())} of 1000 classes; the others are left out of the choice")
    return tests


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


def imagenet_epoch(model, optimizer, average, real, counterfactual, args, epoch, device):
    """One pass over the real images, each batch with its counterfactuals in the same forward. Returns the mean loss."""
    _, ranks = rank_and_ranks()
    parts, steps = [], len(real) // args.batch_size
    for images, size in ((real, args.batch_size), (counterfactual, round(args.cf_ratio * args.batch_size))):
        if images is not None and size:
            images.epoch = epoch
            order = epoch_order(len(images), steps, size, images.seed, epoch)
            parts.append(batches(images, order, size // ranks, args.workers, device))
    model.train()
    losses = []
    for step, batch in enumerate(zip(*parts)):
        optimizer.param_groups[0]["lr"] = learning_rate(args, epoch + step / steps)
        pixels, labels = torch.cat([pixels for pixels, _ in batch]), batch[0][1]
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            logits = model(normalized(pixels))
        loss = ensemble_loss(logits, labels, batch[1][1] if len(batch) > 1 else None)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if average:
            update_average(average, getattr(model, "module", model), args.ema)
        losses.append(loss.detach())
        if args.max_steps and step + 1 == args.max_steps:
            break
    return mean_over_ranks(torch.stack(losses).mean()).item()


def train_imagenet(args, ensemble, tests, real, counterfactual, out, device):
    """Epochs, each with evaluation and checkpoint; rank 0 writes. Returns the last evaluation's rows."""
    rank, ranks = rank_and_ranks()
    average = copy.deepcopy(ensemble).requires_grad_(False) if args.ema else None
    optimizer = torch.optim.SGD(ensemble.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    first, best, rows = 0, -1.0, []
    if args.resume and (out / "checkpoint.pt").is_file():
        state = load_tensors(out / "checkpoint.pt")
        for module, name in ((ensemble, "model"), (average, "average")):
            if module:
                module.load_state_dict(check_state_dict(state[name], module.state_dict(), out / "checkpoint.pt"))
        optimizer.load_state_dict(state["optimizer"])
        first, best = state["epoch"], state["best"]
    model = nn.parallel.DistributedDataParallel(ensemble, broadcast_buffers=False) if ranks > 1 else ensemble
    if args.compile:
        ensemble.compile()
    log = Log(out / "log.jsonl", first) if rank == 0 else None
    for epoch in range(first, args.epochs):
        loss = imagenet_epoch(model, optimizer, average, real, counterfactual, args, epoch, device)
        rows = evaluate(average or ensemble, tests, args, device)
        measure = next((row[3] for row in rows if row[:3] == ("val", "mean", "top-1")), 0.0)
        if rank == 0:
            log.write(step=epoch + 1, loss=loss, **{" ".join(row[:3]): row[3] for row in rows})
            print(f"epoch {epoch + 1}/{args.epochs}  loss {loss:.4g}  val top-1 {measure:.2f}", flush=True)
            weights = (average or ensemble).state_dict()
            save_tensors(out / "weights.pt", {"arch": args.arch, "ensemble": weights})
            if measure > best:
                save_tensors(out / "weights_best.pt", {"arch": args.arch, "ensemble": weights})
            save_tensors(out / "checkpoint.pt", {
                "model": ensemble.state_dict(), "average": average.state_dict() if average else {},
                "optimizer": optimizer.state_dict(), "epoch": epoch + 1, "best": max(best, measure)})
        best = max(best, measure)
    return rows or evaluate(average or ensemble, tests, args, device)      # resumed when all was done


def load_ensemble(args):
    """A new ensemble on pretrained weights, or the one of --weights."""
    if args.arch not in torchvision.models.list_models(torchvision.models):
        raise UserError(f"--arch {args.arch}: not a classifier of torchvision, such as resnet50")
    if not args.weights:
        return Ensemble(args.arch, pretrained_state(args), args.heads == "pretrained")
    content = load_tensors(args.weights)
    if not isinstance(content, dict) or content.get("arch") != args.arch:
        raise UserError(f"--weights {args.weights}: not an ensemble on {args.arch}; give its --arch, or another file")
    ensemble = Ensemble(args.arch)
    ensemble.load_state_dict(check_state_dict(content["ensemble"], ensemble.state_dict(), args.weights))
    return ensemble


def main_imagenet(args):
    device = join_ranks(pick_device(args.device))
    rank, ranks = rank_and_ranks()
    args.bf16 = pick_bf16(args.amp, device)
    if args.evaluate and not args.weights:
        raise UserError("--evaluate: needs --weights, an ensemble's weights.pt")
    if not args.evaluate and not args.data_dir:
        raise UserError("training needs --data-dir, ImageNet's folder; or give --evaluate")
    for name, size in (("--batch-size", args.batch_size), ("--batch-size x --cf-ratio", args.cf_ratio * args.batch_size)):
        if round(size) % ranks:
            raise UserError(f"{name}: {size} images cannot be shared out evenly over {ranks} ranks")
    found = counterfactual_images(args.counterfactual) if args.counterfactual else None
    tests = load_tests(args, found)
    if not tests:
        raise UserError("nothing to evaluate: give --data-dir, --counterfactual, --cue-conflict, --imagenet9 or --ood")
    if not args.evaluate:
        real = Images(*wnid_images(args.data_dir / "train"), transform(True, args.image_size), args.seed)
        if len(real) < args.batch_size:
            raise UserError(f"--batch-size {args.batch_size}: larger than the {len(real)} training images")
    torch.manual_seed(args.seed)
    ensemble = load_ensemble(args).to(device, memory_format=torch.channels_last)
    out = claim_folder(args.out, __file__, args.resume) if rank == 0 else args.out
    if rank == 0:
        describe_run(out, __file__, args)
        if args.offline:
            print("OFFLINE: random weights. No number of this run is about ImageNet.")
    rows = []
    if args.baseline:
        baseline = torchvision.models.get_model(args.arch, weights=None)
        baseline.load_state_dict(pretrained_state(args) or baseline.state_dict())
        rows = evaluate(baseline.to(device, memory_format=torch.channels_last), tests, args, device)
    if args.evaluate:
        rows = evaluate(ensemble, tests, args, device) + rows
    else:
        wanted = round(args.cf_ratio * len(real))
        if found and rank == 0 and wanted > len(found[0]):
            print(f"{len(found[0])} counterfactuals for {wanted} in each epoch: they are drawn more than once")
        counterfactual = Images(*found, transform(True, args.image_size), args.seed + 1) if found else None
        rows = train_imagenet(args, ensemble, tests, real, counterfactual, out, device) + rows
    if rank == 0:
        write_table(out, rows)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", required=True, choices=[*VARIANTS, "imagenet"], help="which digits to tell apart")
    data.add_argument("--train", choices=["original", "counterfactual", "both"], default="original",
                      help="images to train on: the biased data, generated ones, or both together")
    data.add_argument("--counterfactual", type=Path, nargs="+", metavar="FOLDER",
                      help="folder that generate.py wrote; for ImageNet one or many, or patterns")
    data.add_argument("--data-dir", type=Path, help="folder with MNIST's files (data/downloads if not given; fetched if "
                      "missing), or ImageNet's folder, with train/ and val/")
    data.add_argument("--textures", help="wildlife: folder with object/ and background/, or 'dtd'; as in train_cgn.py")
    data.add_argument("--offline", action="store_true", help="synthetic digits: no number of such a run is about MNIST")

    steps = parser.add_argument_group("optimisation")
    steps.add_argument("--weights", type=Path, help="start from these classifier weights")
    steps.add_argument("--epochs", type=positive_int, default=10, help="passes over the training images")
    steps.add_argument("--max-steps", type=positive_int, help="steps in each epoch at most, for a short trial")
    steps.add_argument("--batch-size", type=positive_int, default=64, help="images per step")
    steps.add_argument("--lr", type=non_negative_float, default=1.0, help="Adadelta's learning rate in the first epoch")
    steps.add_argument("--gamma", type=non_negative_float, default=0.7, help="factor of the learning rate per epoch")
    steps.add_argument("--amp", choices=["auto", "off", "bf16"], default="auto",
                       help="bf16 arithmetic in training; tests are in float32; auto: where the hardware multiplies it")

    net = parser.add_argument_group("ImageNet")
    net.add_argument("--arch", default="resnet50", help="a torchvision classifier that ends in a linear layer")
    net.add_argument("--pretrained", help="file of its weights, or 'none'; torchvision's are fetched if not given")
    net.add_argument("--weights-dir", type=Path, default=DOWNLOADS, help="folder for fetched weights")
    net.add_argument("--heads", choices=["fresh", "pretrained"], default="fresh", help="where the three heads begin")
    net.add_argument("--cf-ratio", type=non_negative_float, default=1.0, help="counterfactuals for each real image")
    net.add_argument("--cf-test", type=positive_int, default=5000, help="first counterfactuals, to test the heads on")
    net.add_argument("--schedule", choices=["step", "cosine"], default="step", help="of the learning rate")
    net.add_argument("--lr-step", type=positive_int, default=15, help="epochs to the next tenth of the learning rate")
    net.add_argument("--warmup", type=non_negative_int, default=0, help="epochs of linear warm-up")
    net.add_argument("--weight-decay", type=non_negative_float, default=1e-4, help="SGD's; its momentum is 0.9")
    net.add_argument("--ema", type=fraction, default=0.0, help="decay of a moving average, evaluated and saved; 0: none")
    net.add_argument("--image-size", type=positive_int, default=224, help="pixels that the network sees")
    net.add_argument("--workers", type=non_negative_int, default=4, help="processes that decode, for each rank")
    net.add_argument("--compile", action="store_true", help="torch.compile the ensemble")
    net.add_argument("--evaluate", action="store_true", help="no training: evaluate --weights")
    net.add_argument("--baseline", action="store_true", help="evaluate the pretrained classifier as well")
    net.add_argument("--cue-conflict", type=Path, metavar="FOLDER", help="Cue-Conflict's 16 folders: shape bias")
    net.add_argument("--imagenet9", type=Path, metavar="FOLDER", help="ImageNet-9's bg_challenge folder")
    net.add_argument("--ood", nargs="+", default=[], metavar="NAME=PATH", help="folders by WNID, of all classes or some")

    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, required=True, help="run folder; new, empty, or continued with --resume")
    run.add_argument("--resume", action="store_true", help="go on after the last whole epoch in --out")
    run.add_argument("--seeds", type=non_negative_int, nargs="+", default=[0], metavar="SEED",
                     help="classifiers to train, one for each seed: initial weights and order of the images")
    run.add_argument("--seed", type=non_negative_int, default=0, help="of the data: colours, crops and test images")
    run.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one")
    early = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    early.add_argument("--dataset", nargs="?")
    if early.parse_known_args(argv)[0].dataset == "imagenet":              # the published settings
        parser.set_defaults(epochs=45, batch_size=256, lr=0.001)
    return parser.parse_args(argv)


def main():
    args = parse_args()
    if args.dataset == "imagenet":
        return main_imagenet(args)
    args.counterfactual, args.data_dir = (args.counterfactual or [None])[0], args.data_dir or DOWNLOADS
    if (args.train == "original") != (args.counterfactual is None):
        raise UserError(f"--train {args.train} {'takes no' if args.train == 'original' else 'needs'} --counterfactual")
    device = pick_device(args.device)
    args.bf16 = pick_bf16(args.amp, device)
    out = claim_folder(args.out, __file__, args.resume)
    if args.offline:
        print("OFFLINE: synthetic digits and drawn textures. No number of this run is about MNIST.")
    original, test = load_variant(args.dataset, args.data_dir, textures=args.textures, offline=args.offline,
                                  seed=args.seed, device=device)
    counterfactual = args.counterfactual and load_counterfactuals(args.counterfactual, args, device)
    tests = {"decorrelated": (test.all_images(args.seed, decorrelated=True), test.labels),
             "correlated": (test.all_images(args.seed), test.labels)}
    describe_run(out, __file__, args)
    results = {seed: train_classifier(args, seed, out / f"seed_{seed}", (original, counterfactual), tests, device)
               for seed in args.seeds}
    summarize(args, results, out)


if __name__ == "__main__":
    run_main(main)
