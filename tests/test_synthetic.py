"""The synthetic digits and textures: repeatable, like MNIST, varied within a class, told apart."""

import pytest
import torch
import torch.nn.functional as F

from data.synthetic import synthetic_digits, synthetic_textures


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """One thread: the arrays are small, and on a busy machine threads that wait for one another
    take longer than one alone.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    """2,500 images (n, 784) float in 0..255 and their labels (n,)."""
    images, labels = synthetic_digits(2500, seed=1)
    return images.flatten(1).float(), labels


@pytest.fixture(scope="module")
def textures():
    return synthetic_textures(seed=1)


# --------------------------------------------------------------------------------------------------
# Digits


def test_digits_shapes_and_types():
    images, labels = synthetic_digits(7, seed=0)
    assert images.shape == (7, 28, 28)
    assert images.dtype == torch.uint8
    assert labels.shape == (7,)
    assert labels.dtype == torch.int64


def test_digits_repeat_and_do_not_depend_on_how_many_are_drawn():
    images, labels = synthetic_digits(600, seed=3)
    again, labels_again = synthetic_digits(600, seed=3)
    assert torch.equal(images, again)
    assert torch.equal(labels, labels_again)
    few, few_labels = synthetic_digits(301, seed=3)  # ends inside a chunk
    assert torch.equal(few, images[:301])
    assert torch.equal(few_labels, labels[:301])


def test_digits_leave_the_global_generator_and_threads_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    torch.set_num_threads(2)
    synthetic_digits(3, seed=9)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert threads == 2
    assert torch.equal(torch.rand(3), expected)


def test_no_digit_is_drawn_twice():
    images = torch.cat([synthetic_digits(600, seed)[0] for seed in (0, 1)])
    unique = images.flatten(1).unique(dim=0)
    assert len(unique) == 1200  # between seeds and between chunks of one seed


def test_labels_are_balanced(digits):
    _, labels = digits
    counts = labels.bincount(minlength=10)
    assert len(counts) == 10
    assert counts.min() > 190 and counts.max() < 310  # 250 each, with a standard deviation of 15


def test_digits_have_the_statistics_of_mnist(digits):
    pixels, _ = digits
    assert 30 < pixels.mean() < 37  # MNIST: 33
    assert 0.15 < (pixels > 25).float().mean() < 0.20  # MNIST: 0.17
    assert 0.11 < (pixels > 128).float().mean() < 0.15  # MNIST: 0.13
    assert 0.78 < (pixels == 0).float().mean() < 0.85  # MNIST: 0.81
    assert pixels.amax(1).min() > 200  # no faint or empty image


def test_digits_sit_like_mnist(digits):
    pixels, _ = digits
    images = pixels.view(-1, 28, 28)
    border = torch.ones(28, 28, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    assert (images[:, border] > 0).any(1).float().mean() < 0.25  # MNIST: 0.13
    inked = images > 25
    height = inked.any(2).sum(1)
    width = inked.any(1).sum(1)
    longest = torch.maximum(height, width).float()
    # MNIST scales the longer side to 20 pixels.
    assert 19 < longest.mean() < 22
    assert longest.std() < 0.9
    axis = torch.arange(28.0)
    mass = images.sum((1, 2))
    down = (images.sum(2) @ axis) / mass - 14
    right = (images.sum(1) @ axis) / mass - 14
    for offset in (down, right):
        assert abs(offset.mean()) < 0.2
        assert offset.abs().max() < 2


@pytest.mark.parametrize("digit", range(10))
def test_writers_differ(digits, digit):
    pixels, labels = digits
    own = pixels[labels == digit]
    distance = torch.pdist(own).mean() / 28  # root mean square difference in gray levels
    # MNIST: 60 for the digit 1, 77 to 92 for the others.
    assert distance > (52 if digit == 1 else 70)


def test_pens_differ(digits):
    pixels, labels = digits
    for digit in range(10):
        ink = (pixels[labels == digit] > 128).sum(1).float()
        assert 0.17 < ink.std() / ink.mean() < 0.4  # MNIST: 0.24 to 0.29


def test_slants_differ(digits):
    pixels, labels = digits
    axis = torch.arange(28.0)
    for digit in range(10):
        images = pixels[labels == digit].view(-1, 28, 28)
        mass = images.sum((1, 2))
        right = axis - (images.sum(1) @ axis / mass)[:, None]
        down = axis - (images.sum(2) @ axis / mass)[:, None]
        covariance = torch.einsum("nyx,nx,ny->n", images, right, down)
        variance = torch.einsum("nyx,ny->n", images, down.square())
        slant = -covariance / variance
        assert 0.18 < slant.std() < 0.4  # MNIST: 0.20 to 0.35


def test_digits_can_be_told_apart_but_not_trivially(digits):
    pixels, labels = digits
    small = F.avg_pool2d(pixels.view(-1, 1, 28, 28), 2).flatten(1) / 255
    inputs = torch.cat([small, torch.ones(len(pixels), 1)], 1)
    train = inputs[:2000]
    test = inputs[2000:]
    targets = F.one_hot(labels[:2000], 10).float()
    ridge = 3 * torch.eye(train.shape[1])
    weights = torch.linalg.solve(train.T @ train + ridge, train.T @ targets)
    accuracy = ((test @ weights).argmax(1) == labels[2000:]).float().mean()
    assert 0.80 < accuracy < 0.96  # MNIST: 0.87; a font would be solved outright


# --------------------------------------------------------------------------------------------------
# Textures


def test_textures_shapes_and_types(textures):
    for pictures in textures:
        assert pictures.shape == (10, 3, 150, 150)
        assert pictures.dtype == torch.uint8
    for pictures in synthetic_textures(seed=1, size=64):
        assert pictures.shape == (10, 3, 64, 64)


def test_textures_repeat_and_follow_the_seed(textures):
    repeated = synthetic_textures(seed=1)
    others = synthetic_textures(seed=2)
    for pictures, again, other, floor in zip(textures, repeated, others, (15, 8)):
        assert torch.equal(pictures, again)
        # Not the grain alone: the stripes and veins themselves run elsewhere.
        difference = F.avg_pool2d(pictures.float(), 5) - F.avg_pool2d(other.float(), 5)
        assert (difference.abs().mean((1, 2, 3)) > floor).all()


def test_textures_use_the_range_without_clipping_flat(textures):
    for pictures in textures:
        assert pictures.min() < 20
        assert pictures.max() > 235
        # Every texture has a pattern, and none is so dark that a digit in it would be lost.
        assert (pictures.float().std((2, 3)).amax(1) > 15).all()
        assert (pictures.float().mean((1, 2, 3)) > 30).all()


def random_crops(pictures, count, generator):
    """`count` random 32 x 32 crops of each picture: (pictures * count, 3, 32, 32) float, and its
    row.
    """
    crops = []
    side = pictures.shape[-1] - 31
    for picture in pictures:
        corners = torch.randint(side, (count, 2), generator=generator)
        for top, left in corners.tolist():
            crops.append(picture[:, top : top + 32, left : left + 32].float())
    return torch.stack(crops), torch.arange(len(pictures)).repeat_interleave(count)


def color_features(crops):
    return torch.cat([crops.mean((2, 3)), crops.std((2, 3))], 1)


def pattern_features(crops):
    """What is left without color and contrast: the distribution of brightness, and how it is spread
    over frequencies.

    Deciles tell light veins on dark from dark on light and thin lines from broad; the spectrum's
    amplitude, averaged over blocks of 4 x 3 frequencies, tells direction and period.
    """
    gray = crops.mean(1)
    gray = gray - gray.mean((1, 2), keepdim=True)
    gray = gray / gray.std((1, 2), keepdim=True)
    deciles = gray.flatten(1).quantile(torch.linspace(0.05, 0.95, 10), dim=1).T
    window = torch.hann_window(32)  # the crop's edges are no part of the pattern
    spectrum = torch.fft.rfft2(gray * window.outer(window)).abs()
    low = spectrum.roll(8, 1)[:, :16, :9]
    blocks = F.avg_pool2d(low[:, None], (4, 3))
    return torch.cat([deciles, blocks.flatten(1)], 1)


def nearest_class_mean(features, train, classes):
    """Accuracy of naming each crop after the class whose mean features, over the crops in train,
    are nearest.
    """
    features = (features - features[train].mean(0)) / features[train].std(0)
    means = []
    for index in range(10):
        means.append(features[train & (classes == index)].mean(0))
    nearest = torch.cdist(features[~train], torch.stack(means)).argmin(1)
    return (nearest == classes[~train]).float().mean()


@pytest.mark.parametrize("which", (0, 1), ids=("object", "background"))
def test_a_crop_tells_the_class(textures, which):
    generator = torch.Generator().manual_seed(0)
    crops, classes = random_crops(textures[which], 40, generator)
    train = torch.arange(len(crops)) % 2 == 0
    assert nearest_class_mean(color_features(crops), train, classes) > 0.95


@pytest.mark.parametrize("which, floor", ((0, 0.65), (1, 0.45)), ids=("object", "background"))
def test_the_pattern_differs_and_not_the_color_alone(textures, which, floor):
    generator = torch.Generator().manual_seed(0)
    crops, classes = random_crops(textures[which], 40, generator)
    train = torch.arange(len(crops)) % 2 == 0
    accuracy = nearest_class_mean(pattern_features(crops), train, classes)
    assert accuracy > floor  # by chance: 0.1


def test_classes_keep_their_looks_from_seed_to_seed(textures):
    for pictures, others in zip(textures, synthetic_textures(seed=2)):
        generator = torch.Generator().manual_seed(0)
        crops, rows = random_crops(torch.cat([pictures, others]), 10, generator)
        classes = rows % 10  # rows 0..9 are one seed's classes, 10..19 another's
        train = torch.arange(200) < 100
        assert nearest_class_mean(color_features(crops), train, classes) > 0.9
