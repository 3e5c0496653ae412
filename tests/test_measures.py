"""The measures that go into papers, against plain loops over 200 random answers.

The loops know nothing of the code but what its measures mean. Random answers have no ties; with
ties, which of the equal classes counts is left open, and the hits have to lie between the least and
the most that is possible.
"""

import math
import random

import pytest
import torch

import train_classifier
from data import imagenet

COUNT = 200
CLASSES = 1000
INFORMATION = imagenet.imagenet_metadata()
CATEGORIES = list(INFORMATION["cue_conflict"]["categories"].values())
GROUPS = INFORMATION["in9"]["imagenet_to_in9"]
HEADS = {  # what is averaged for each of the five predictions
    "shape": (0,),
    "texture": (1,),
    "background": (2,),
    "mean": (0, 1, 2),
    "shape and texture": (0, 1),
}


def random_logits(heads, seed, count=COUNT):
    """Logits (count, heads, 1000), in float64 as lists, too."""
    logits = torch.randn(count, heads, CLASSES, generator=torch.Generator().manual_seed(seed))
    return logits.double(), logits.double().tolist()


def predictions(image, heads):
    """The logits of each prediction for one image, as lists: three heads give five."""
    if heads == 1:
        return [image[0]]
    found = []
    for averaged in HEADS.values():
        values = [sum(image[head][k] for head in averaged) / len(averaged) for k in range(CLASSES)]
        found.append(values)
    return found


def best(values, k, among=range(CLASSES)):
    """The k classes with the largest values, the largest first."""
    return sorted(among, key=lambda label: -values[label])[:k]


def sums(rows):
    """Column sums of nested lists: images x heads x numbers -> heads x numbers."""
    totals = [[0] * len(numbers) for numbers in rows[0]]
    for row in rows:
        for head, numbers in enumerate(row):
            for index, number in enumerate(numbers):
                totals[head][index] += number
    return totals


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("absent", [False, True])
def test_top_1_and_top_5(heads, absent):
    logits, lists = random_logits(heads, seed=0)
    chosen = random.Random(1)
    present = sorted(chosen.sample(range(CLASSES), 20)) if absent else range(CLASSES)
    labels = [chosen.choice(best(image[0], 10, present)) for image in lists]
    rows = []
    for image, label in zip(lists, labels):
        row = []
        for values in predictions(image, heads):
            five = best(values, 5, present)
            row.append([five[0] == label, label in five])
        rows.append(row)
    hits = train_classifier.top_hits(
        logits, torch.tensor(labels), present=torch.tensor(present) if absent else None
    )
    assert hits.tolist() == sums(rows)
    assert hits.sum() > 0


def test_top_1_with_ties():
    """Answers of few values: many classes are the best."""
    logits = torch.randint(3, (COUNT, 1, 8), generator=torch.Generator().manual_seed(2)).double()
    labels = torch.randint(8, (COUNT,), generator=torch.Generator().manual_seed(3))
    least, most = [0, 0], [0, 0]
    for image, label in zip(logits[:, 0].tolist(), labels.tolist()):
        larger = sum(value > image[label] for value in image)
        equal = sum(value == image[label] for value in image)
        for index, k in enumerate((1, 5)):
            least[index] += larger + equal <= k
            most[index] += larger < k
    hits = train_classifier.top_hits(logits, labels)[0].tolist()
    assert least[0] <= hits[0] <= most[0]
    assert least[1] <= hits[1] <= most[1]
    assert least != most


@pytest.mark.parametrize("heads", [1, 3])
def test_shape_bias_and_its_counts(heads):
    logits, lists = random_logits(heads, seed=4)
    chosen = random.Random(5)
    labels = [chosen.sample(range(len(CATEGORIES)), 2) for _ in range(COUNT)]
    rows = []
    for image, (shape, texture) in zip(lists, labels):
        row = []
        for values in predictions(image, heads):
            largest = max(values)
            exponentials = [math.exp(value - largest) for value in values]
            total = sum(exponentials)
            means = []
            for classes in CATEGORIES:
                means.append(sum(exponentials[label] / total for label in classes) / len(classes))
            category = means.index(max(means))
            row.append([category == shape, category == texture])
        rows.append(row)
    hits = train_classifier.conflict_hits(logits, torch.tensor(labels)).tolist()
    assert hits == sums(rows)
    by_shape, by_texture = hits[0]
    found = train_classifier.rows_of_head("cue", "mean", "conflict", hits[0], COUNT)
    decided = by_shape + by_texture
    assert found == [
        ("cue", "mean", "shape bias", pytest.approx(100 * by_shape / decided), by_shape, decided),
        ("cue", "mean", "right shape", pytest.approx(100 * by_shape / COUNT), by_shape, COUNT),
    ]


@pytest.mark.parametrize("heads", [1, 3])
def test_imagenet9(heads):
    logits, lists = random_logits(heads, seed=6)
    chosen = random.Random(7)
    labels = [chosen.randrange(9) for _ in range(COUNT)]
    rows = []
    for image, label in zip(lists, labels):
        row = []
        for values in predictions(image, heads):
            row.append([GROUPS[best(values, 1)[0]] == label])
        rows.append(row)
    hits = train_classifier.imagenet9_hits(logits, torch.tensor(labels))
    assert hits.tolist() == sums(rows)


@pytest.mark.parametrize("heads", [1, 3])
def test_which_factor_is_followed(heads):
    """Few classes, so that there are hits; of a tenth of the images two classes are the same."""
    logits, lists = random_logits(heads, seed=8)
    chosen = random.Random(9)
    labels = []
    for image in lists:
        five = best(image[0], 20)
        shape, texture, background = chosen.sample(five, 3)
        if chosen.random() < 0.1:
            texture = shape
        labels.append((shape, texture, background))
    rows = []
    for image, row_labels in zip(lists, labels):
        row = []
        own = (*row_labels, row_labels[0], row_labels[0])
        for values, own_label in zip(predictions(image, heads), own):
            five = best(values, 5)
            counts = [five[0] == own_label]
            for answers in (five[:1], five):
                followed = [label in answers for label in row_labels]
                followed.append(not any(followed))
                if len(set(row_labels)) < 3:  # such an image tells nothing
                    followed = [False] * 4
                counts += followed
            row.append(counts)
        rows.append(row)
    hits = train_classifier.counterfactual_hits(logits, torch.tensor(labels)).tolist()
    assert hits == sums(rows)
    differ = sum(len(set(row)) == 3 for row in labels)
    assert sum(hits[0][1:5]) == differ < COUNT
    shares = train_classifier.factor_rows("cf", "baseline", hits[0], COUNT)
    assert [row[3] for row in shares[:4]] == [100 * hit / differ for hit in hits[0][1:5]]


def test_mean_corruption_error():
    """Two sets of corruptions with three severities, one of them without hits."""
    chosen = random.Random(10)
    tests, rows, errors = {}, [], {}
    for name in ("A", "B"):
        for corruption in ("fog", "snow", "blur"):
            for severity in range(1, 4):
                test = f"{name}/{corruption}/{severity}"
                tests[test] = ("corruption", None)
                for head in ("shape", "baseline"):
                    hits = 0 if corruption == "blur" else chosen.randrange(COUNT)
                    share = 100 * hits / COUNT
                    rows.append((test, head, "top-1", share, hits, COUNT))
                    errors[name, head, corruption, severity] = (COUNT - hits) / COUNT
    found = {row[:3]: row[3] for row in train_classifier.corruption_rows(rows, tests)}
    assert len(found) == 2 * 3  # two means and one error for each set
    for name in ("A", "B"):
        ratios, accuracies = [], {"shape": [], "baseline": []}
        for corruption in ("fog", "snow", "blur"):
            totals = {"shape": 0, "baseline": 0}
            for severity in range(1, 4):
                for head in totals:
                    error = errors[name, head, corruption, severity]
                    totals[head] += error
                    accuracies[head].append(100 - 100 * error)
            ratios.append(totals["shape"] / totals["baseline"])
        for head, values in accuracies.items():
            mean = sum(values) / len(values)
            assert found[name, head, "mean top-1"] == pytest.approx(mean)
        error = 100 * sum(ratios) / len(ratios)
        assert found[name, "shape", "mean corruption error"] == pytest.approx(error)


def test_no_images_at_all():
    """Counts of zero, and no division by them."""
    logits = torch.empty(0, 3, CLASSES)
    one = torch.empty(0, dtype=torch.int64)
    assert train_classifier.top_hits(logits, one).tolist() == [[0, 0]] * 5
    assert train_classifier.imagenet9_hits(logits, one).tolist() == [[0]] * 5
    pairs = torch.empty(0, 2, dtype=torch.int64)
    assert train_classifier.conflict_hits(logits, pairs).tolist() == [[0, 0]] * 5
    triples = torch.empty(0, 3, dtype=torch.int64)
    hits = train_classifier.counterfactual_hits(logits, triples).tolist()
    assert hits == [[0] * 9] * 5
    (top1,) = train_classifier.factor_rows("cf", "shape", hits[0], 0)
    assert math.isnan(top1[3])
    bias, _ = train_classifier.rows_of_head("cue", "mean", "conflict", [0, 0], 0)
    assert math.isnan(bias[3])
