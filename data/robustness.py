"""Tests of the ImageNet classifiers: hits by head on val, counterfactuals, Cue-Conflict, ImageNet-9 and other folders.

A test is (kind, (paths, labels)). Hits are counted on every rank over its share of the images, then summed: what is
reported is exact, whatever the batch size and the number of ranks.
"""
import functools

import torch

from data.imagenet import (IN9_MEAN, IN9_STD, MEAN, STD, Images, batches, cue_conflict_images, facts, imagenet9_images,
                           normalized, transform, validation_images, wnid_images)
from data.runs import UserError, mean_over_ranks, rank_and_ranks, write_atomically, write_json

HEADS = "shape", "texture", "background"
ANSWERS = *HEADS, "mean", "shape and texture"              # of an ensemble, see with_means


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
def count_hits(model, heads, kind, test, hits, args, device):
    """Sum of `hits` over a test (paths, labels), shared out over ranks, and how many images it has."""
    rank, ranks = rank_and_ranks()
    change = transform(False, args.image_size, margin=kind not in ("conflict", "in9"))
    statistics = (IN9_MEAN, IN9_STD) if kind == "in9" and args.in9_normalization == "in9" else (MEAN, STD)
    images = Images(*test, change, device=device if args.decode == "device" else None)
    order, count = range(rank, len(images), ranks), torch.zeros(1, device=device)
    sums = hits(torch.empty(0, heads, 1000, device=device), test[1][:0].to(device))          # zeros, for what has no image
    for pixels, labels in batches(images, order, args.batch_size // ranks, args.workers, device):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            logits = model(normalized(pixels, *statistics)).float()
        sums, count = sums + hits(logits if logits.ndim == 3 else logits[:, None], labels), count + len(pixels)
    sums, count = (ranks * mean_over_ranks(x.double()) for x in (sums, count))
    return sums.round().long().tolist(), round(count.item())


def evaluate(model, names, tests, args, device):
    """Rows (test, head, measure, percent, hits, images) of all tests. names: of the model's heads, then of their means."""
    model.eval()
    rows = []

    def add(test, names, measure, hits, totals):
        rows.extend((test, name, measure, 100 * hit / total if total else float("nan"), hit, total)
                    for name, hit, total in zip(names, hits, totals))

    gaps = {}
    for name, (kind, test) in tests.items():
        if kind == "counterfactual" and len(names) == 1:     # no heads for the three labels
            continue
        present = test[1].unique().to(device) if kind == "ood" else None
        score = {"conflict": conflict_hits, "in9": imagenet9_hits}.get(kind, functools.partial(top_hits, present=present))
        hits, count = count_hits(model, min(len(names), 3), kind, test, score, args, device)
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
    """Name -> (kind, (paths, labels)) of everything to be evaluated. counterfactual: paths and labels, or empty ones."""
    tests = {"val": ("val", validation_images(args.data_dir))} if args.data_dir else {}
    if len(counterfactual[0]):
        tests["counterfactual"] = "counterfactual", counterfactual
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
