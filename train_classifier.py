"""Train a digit classifier on biased, counterfactual or both kinds of images, and test whether it kept the shortcut.

    python train_classifier.py --dataset colored_mnist --train original --out runs/biased
    python train_classifier.py --dataset colored_mnist --train counterfactual --counterfactual runs/cf --out runs/invariant

Sauer & Geiger, ICLR 2021, section 4.1. Two test sets tell: `decorrelated`, where colours and textures say nothing of
the digit, and `correlated`, the same digits drawn as in training. The figure to quote is the last epoch's.
"""
import argparse
import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.mnist import VARIANTS, load_variant, to_float
from data.runs import (DOWNLOADS, Log, UserError, claim_folder, describe_run, load_tensors, non_negative_float,
                       non_negative_int, pick_bf16, pick_device, positive_int, run_main, save_tensors, write_json)
from data.weights import check_state_dict


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
# Command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", required=True, choices=[*VARIANTS, "imagenet"], help="which digits to tell apart")
    data.add_argument("--train", choices=["original", "counterfactual", "both"], default="original",
                      help="images to train on: the biased data, generated ones, or both together")
    data.add_argument("--counterfactual", type=Path, help="folder that generate.py wrote")
    data.add_argument("--data-dir", type=Path, default=DOWNLOADS, help="folder with MNIST's files; fetched if missing")
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

    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, required=True, help="run folder; new, empty, or continued with --resume")
    run.add_argument("--resume", action="store_true", help="go on after the last whole epoch in --out")
    run.add_argument("--seeds", type=non_negative_int, nargs="+", default=[0], metavar="SEED",
                     help="classifiers to train, one for each seed: initial weights and order of the images")
    run.add_argument("--seed", type=non_negative_int, default=0, help="of the data: colours, crops and test images")
    run.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    if args.dataset == "imagenet":
        raise UserError("--dataset imagenet: not yet; this version classifies " + ", ".join(VARIANTS))
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
