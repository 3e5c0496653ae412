"""Checks of weights files, VGG-16's features, and its random stand-in.

The tests on the real VGG-16 need the folder of `vgg16_features.pth` in the environment variable
CGN_WEIGHTS.
"""

import functools
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import folder_from

from data import download, weights
from data.runs import UserError

INDICES = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
POOLED = [2, 7, 14, 21, 28]


def run_convolutions(state, x):
    """Output (N, C, H, W) of the convolutions in `state` on x (N, 3, H, W), as VGG-16 runs them,
    and the means after each.
    """
    means = []
    for index in INDICES[: len(state) // 2]:
        weight = state[f"features.{index}.weight"]
        bias = state[f"features.{index}.bias"]
        x = F.conv2d(x, weight, bias, padding=1).relu()
        means.append(x.mean().item())
        if index in POOLED:
            x = F.max_pool2d(x, 2)
    return x, means


def names(count):
    """The names of the first convolutions."""
    kinds = ("weight", "bias")
    return [f"features.{index}.{kind}" for index in INDICES[:count] for kind in kinds]


# --------------------------------------------------------------------------------------------------
# The real VGG-16


@pytest.fixture(scope="session")
def real():
    """The real VGG-16's folder, and what its file holds."""
    folder = folder_from("CGN_WEIGHTS")
    if folder is None or not (folder / "vgg16_features.pth").is_file():
        pytest.skip("CGN_WEIGHTS is not the folder of vgg16_features.pth")
    return folder, torch.load(folder / "vgg16_features.pth", weights_only=True, mmap=True)


@pytest.mark.parametrize("count", [2, 7, 10, 13])
def test_real_vgg16_agrees_with_torchvision(real, count):
    folder, held = real
    state = weights.load_vgg16_features(folder, count)
    assert list(state) == names(count)
    for name, value in state.items():
        assert torch.equal(value, held[name])
        assert value.dtype == torch.float32
    with torch.device("meta"):  # the network's shape, without 528 MB of random weights
        features = torchvision.models.vgg16(weights=None).features
    whole = {name.removeprefix("features."): held[name] for name in names(13)}
    features.load_state_dict(whole, assign=True)
    # Up to the ReLU after the last convolution, and the pooling that may follow it.
    last = INDICES[count - 1]
    stop = last + 3 if last in POOLED else last + 2
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = features[:stop](x)
        output, _ = run_convolutions(state, x)
    assert expected.std() > 0.01
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_real_features_of_the_style_losses(real):
    folder, _ = real
    state = weights.load_vgg16_features(folder, 10)
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = weights.VGG16Features(state)(image)
    assert [x.shape[1:] for x in features] == [
        (64, 32, 32),
        (128, 16, 16),
        (256, 8, 8),
        (512, 4, 4),
    ]
    for count, found in zip(weights.STYLE_CONVOLUTIONS, features):
        x, _ = run_convolutions({name: state[name] for name in names(count)[:-2]}, image)
        index = INDICES[count - 1]
        weight = state[f"features.{index}.weight"]
        bias = state[f"features.{index}.bias"]
        expected = F.conv2d(x, weight, bias, padding=1).relu()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_real_vgg16_with_its_classifier_by_the_path_of_the_file(real, tmp_path):
    _, held = real
    layers = {}
    for index in (0, 3, 6):
        for kind in ("weight", "bias"):
            layers[f"classifier.{index}.{kind}"] = torch.zeros(3)
    torch.save({**held, **layers}, tmp_path / "whole.pth")
    state = weights.load_vgg16_features(tmp_path / "whole.pth", 13)
    assert list(state) == names(13)
    assert torch.equal(state["features.28.weight"], held["features.28.weight"])


# --------------------------------------------------------------------------------------------------
# State dicts


@pytest.fixture
def small(tmp_path):
    """`small(changes)` writes a file of two right convolutions and `changes`; None removes."""
    path = tmp_path / "small.pth"

    def write(changes):
        state = {**weights.random_vgg16_features(2), **changes}
        torch.save({name: value for name, value in state.items() if value is not None}, path)
        return path

    return write


def test_only_the_convolutions_used_are_needed(small):
    nans = torch.full((2,), torch.nan)
    path = small({"features.5.weight": nans, "classifier.0.bias": torch.zeros(1)})
    state = weights.load_vgg16_features(path, 2)
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "features.0.weight": (64, 3, 3, 3),
        "features.0.bias": (64,),
        "features.2.weight": (64, 64, 3, 3),
        "features.2.bias": (64,),
    }
    for count in (0, 14):
        with pytest.raises(UserError, match=f"13 convolutions to choose, not {count}"):
            weights.load_vgg16_features(path, count)


def test_the_weights_outlive_their_file(small):
    path = small({})
    state = weights.load_vgg16_features(path, 2)
    with open(path, "r+b") as file:  # in place: a memory map would see it
        file.write(bytes(path.stat().st_size))
    right = weights.random_vgg16_features(2)
    assert all(torch.equal(state[name], right[name]) for name in right)


def test_half_precision_of_a_state_dict():
    """Integers stay; numbers above 65504 are refused."""
    half = weights.to_half({"w": torch.tensor([1.5]), "steps": torch.tensor(70_000)})
    assert half["w"].dtype == torch.float16 and half["steps"] == 70_000
    with pytest.raises(UserError, match="w: holds numbers too large"):
        weights.to_half({"w": torch.tensor([7e4])})


def test_half_precision_and_a_common_prefix(tmp_path):
    right = weights.random_vgg16_features(2)
    halves = {}
    for name, value in right.items():
        halves[f"module.{name}"] = torch.nn.Parameter(value.half())
    torch.save(halves, tmp_path / "f.pth")
    state = weights.load_vgg16_features(tmp_path / "f.pth", 2)
    assert list(state) == list(right)
    for name, value in state.items():
        assert torch.equal(value, right[name].half().float())
        assert value.dtype == torch.float32
        assert not value.requires_grad


MANY = {f"features.{index}.weight": torch.zeros(1) for index in (1, 3, 4, 6, 8)}
WITH_NAN = torch.tensor([float("nan")] + [0.0] * 63)
WITH_INF = torch.tensor([0.0] * 63 + [float("-inf")])


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"features.2.bias": None}, ["1 missing", "features.2.bias"]),
        (
            {"features.2.weight": torch.zeros(64, 3, 3, 3)},
            ["wrong shape", "(64, 3, 3, 3) instead of (64, 64, 3, 3)"],
        ),
        (MANY, ["5 unexpected", "features.1.weight", "..."]),
        ({"classifier.1.weight": torch.zeros(1)}, ["1 unexpected", "classifier.1.weight"]),
        (
            {"module.features.2.bias": torch.zeros(64)},
            ["1 unexpected", "module.features.2.bias"],
        ),
        ({"features.0.bias": WITH_NAN}, ["1 not finite", "features.0.bias"]),
        ({"features.0.bias": WITH_INF}, ["1 not finite", "features.0.bias"]),
        (
            {"features.0.bias": torch.zeros(64, dtype=torch.int64)},
            ["1 not floating-point", "features.0.bias"],
        ),
        ({"features.0.bias": [0.0] * 64}, ["1 not a tensor", "features.0.bias"]),
        ({"features.0.bias": torch.zeros(64).to_sparse()}, ["1 not a tensor", "features.0.bias"]),
        (
            {"features.0.bias": torch.zeros(64, device="meta")},
            ["1 not a tensor", "features.0.bias"],
        ),
        ({3: torch.zeros(1)}, ["not tensors by name"]),
    ],
)
def test_wrong_state_dicts(small, changes, words):
    path = small(changes)
    with pytest.raises(UserError) as caught:
        weights.load_vgg16_features(path, 2)
    message = str(caught.value)
    for word in [str(path), *words]:
        assert word in message
    assert "features.8.weight" not in message  # a long list is cut short
    assert "\n" not in message


class RunsCode:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def save_plain_pickle(value, path):
    path.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize(
    "save",
    [
        torch.save,
        functools.partial(torch.save, _use_new_zipfile_serialization=False),
        save_plain_pickle,
    ],
)
def test_a_file_that_would_run_code(tmp_path, save):
    save({"features.0.weight": RunsCode(tmp_path / "ran")}, tmp_path / "f.pth")
    with pytest.raises(UserError, match="f.pth"):
        weights.load_vgg16_features(tmp_path / "f.pth", 2)
    assert not (tmp_path / "ran").exists()


def test_damaged_and_missing_files(small, tmp_path):
    path = small({})
    assert len(weights.load_vgg16_features(path, 2)) == 4
    whole = path.read_bytes()
    for length in (0, 1000, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="small.pth"):
            weights.load_vgg16_features(path, 2)
    with pytest.raises(UserError, match="no such file"):
        weights.load_vgg16_features(tmp_path / "none.pth", 2)
    torch.save(["features.0.weight"], path)
    with pytest.raises(UserError, match="holds a list"):
        weights.load_vgg16_features(path, 2)
    assert os.listdir(tmp_path) == ["small.pth"]


def test_check_state_dict_with_a_module():
    module = torch.nn.BatchNorm1d(3)  # has an integer among its buffers
    state = module.state_dict()
    wrapped = {f"module.{name}": value for name, value in state.items()}
    module.load_state_dict(weights.check_state_dict(wrapped, state, "f.pth"))
    integers = {"a": torch.zeros(2, dtype=torch.int32)}
    assert list(weights.check_state_dict(integers, {"a": (2,)}, "f.pth")) == ["a"]
    with pytest.raises(UserError) as caught:
        weights.check_state_dict({"weight": torch.zeros(4), "other": 1}, state, "f.pth")
    message = str(caught.value)
    for words in [
        "f.pth",
        "4 missing: bias",
        "1 unexpected: other",
        "1 of wrong shape: weight (4,) instead of (3,)",
    ]:
        assert words in message


def test_networks_from_a_path_or_the_folder_of_downloads(tmp_path):
    network = weights.U2Net(small=True)
    expected = network.state_dict()
    torch.save({f"module.{name}": value for name, value in expected.items()}, tmp_path / "u.pth")
    entry = download.FILES["u2netp"] | {"file": "u.pth", "size": None}
    for path in (tmp_path / "u.pth", None):
        state = weights.load_network(entry, tmp_path, path, expected)
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], expected[name]) for name in state)
    half = weights.to_half(expected)
    assert half["outconv.bias"].dtype == torch.float16
    torch.save(half, tmp_path / "u.pth")
    state = weights.load_network(entry, tmp_path, None, expected)
    for name, value in state.items():
        assert value.dtype == expected[name].dtype
    with pytest.raises(UserError, match="u.pth: not the weights needed here"):
        weights.load_network(entry, tmp_path, None, weights.vgg16_blank(2))


# --------------------------------------------------------------------------------------------------
# The random stand-in


def test_random_features_are_the_same_for_the_same_seed_only():
    torch.manual_seed(1)
    first = weights.random_vgg16_features(10)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = weights.random_vgg16_features(10)
    other = weights.random_vgg16_features(10, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(first) == names(10)
    for name, value in first.items():
        assert torch.equal(value, second[name])
        if name.endswith("weight"):
            assert not torch.equal(value, other[name])
    for name, value in weights.random_vgg16_features(2).items():
        assert torch.equal(first[name], value)


@pytest.mark.parametrize("seed", [0, 1])
def test_random_features_have_a_sensible_scale_and_tell_pictures_apart(seed):
    state = weights.random_vgg16_features(13, seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    pictures = weights.blob_pictures(generator, count=64)
    assert pictures.shape == (64, 3, 32, 32)
    assert pictures.min() >= -1 and pictures.max() <= 1
    assert pictures.std() > 0.2
    for name, value in state.items():
        assert value.isfinite().all()
        assert value.dtype == torch.float32
        if name.endswith("bias"):
            assert not value.any()
    _, means = run_convolutions(state, pictures)  # not the pictures that set the scale
    assert all(0.8 < mean < 1.25 for mean in means), means
    features, _ = run_convolutions({name: state[name] for name in names(10)}, pictures)
    features = F.normalize(features.flatten(1))
    assert (features @ features.T).mean() < 0.9  # filters with their means: 0.97 and more


def test_random_features_match_the_layout_of_the_real_ones(real):
    _, held = real
    state = weights.random_vgg16_features(13)
    shapes = {name: value.shape for name, value in state.items()}
    assert shapes == {name: held[name].shape for name in names(13)}
