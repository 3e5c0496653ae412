"""ImageNet's CGN: networks against known numbers and the published names, training, generation,
several ranks.
"""

import copy
import csv
import json
import math
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    SMALL_IMAGENET,
    fixture_files,
    folder_from,
    load,
    run,
    run_ranks,
    same,
    start,
)
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import generate
import train_cgn
from data import imagenet, runs
from data.pretrained.scenes import draw_scenes
from data.weights import U2Net
from kernels import benchmark_imagenet, layers, sample_patch_images
from train_cgn import SMALL, BigGAN, ImageNetCGN, derive, fold, truncated_normal


def close(actual, expected, relative=1e-4):
    """Within `relative` of the largest value."""
    assert (actual - expected).abs().max() <= relative * expected.abs().max()


# --------------------------------------------------------------------------------------------------
# Networks


@pytest.mark.parametrize("file", fixture_files("biggan_*.pt"))
def test_biggan_reproduces_published_outputs_also_folded(file):
    content = load(file)
    z = content["z"]
    y = content["y"]
    biggan = BigGAN(**content["config"]).eval()
    biggan.load_state_dict(content["state_dict"])
    for truncation, images in content["outputs"].items():
        folded = fold(copy.deepcopy(biggan), truncation)
        derive(biggan, truncation)
        with torch.no_grad():
            close(biggan(z, y), images)
            close(folded(z, y), images)
            close(biggan(z, biggan.class_vectors(y)), images)
    names = folded.state_dict()
    assert not any("weight_orig" in name or "running" in name for name in names)


def small_attentive_cgn():
    """Without pretrained weights. Its biases and gamma, which we add elsewhere, are not zero."""
    cgn = ImageNetCGN(small_u2net=True, **SMALL)
    for layer in cgn.modules():
        if isinstance(layer, train_cgn.SelfAttention):
            torch.nn.init.constant_(layer.gamma, 0.5)
    return cgn


def patches_of_fixed_windows(images, mask, windows, backend):
    """An untrained mask is so flat that rounding decides which windows it covers most."""
    ramp = torch.linspace(0, 1, mask.numel()).view_as(mask)
    return sample_patch_images(images, ramp, windows, backend=backend)


def test_levels_of_the_benchmark_compute_the_same(monkeypatch):
    """Images, and gradients in float32; at 64 x 64, where all levels take seconds."""
    monkeypatch.setattr(train_cgn, "ImageNetCGN", small_attentive_cgn)
    monkeypatch.setattr(train_cgn, "sample_patch_images", patches_of_fixed_windows)
    images = []
    for level in range(benchmark_imagenet.BF16 + 1):
        state = benchmark_imagenet.make_generation(level)
        images.append(benchmark_imagenet.draw_image(state, level).float())
    assert images[0].std() > 0.1
    for other in images[1:-1]:
        close(other, images[0])
    close(images[-1], images[0], 0.1)

    gradients = []
    for level in range(benchmark_imagenet.BF16):
        state = benchmark_imagenet.make_training(level)
        benchmark_imagenet.train_imagenet_batch(state, level)
        gradients.append(state.cgn.f_text.generator.gen_z.weight_orig.grad)
    assert gradients[0].abs().max() > 0
    for other in gradients[1:]:
        # Where two Gram matrices are nearly equal, rounding gives the style loss another sign: a
        # few entries then deviate by more, of the whole at most 5e-4 was seen.
        assert (other - gradients[0]).norm() < 2e-3 * gradients[0].norm()

    # From here on gradients gather at what is derived, for the step.
    state = benchmark_imagenet.make_training(benchmark_imagenet.RECOMPUTE)
    benchmark_imagenet.train_imagenet_batch(state, benchmark_imagenet.RECOMPUTE)
    assert state.cgn.f_text.generator.gen_z.weight.gathered.isfinite().all()


@pytest.fixture(scope="module")
def published_u2net():
    """The small U^2-Net with its published weights, in eval mode."""
    folder = folder_from("CGN_WEIGHTS")
    if folder is None or not (folder / "u2netp.pth").is_file():
        pytest.skip(f"no u2netp.pth in CGN_WEIGHTS={folder}")
    u2net = U2Net(small=True).eval()
    u2net.load_state_dict(load(folder / "u2netp.pth"))
    return u2net


@pytest.mark.parametrize("file", fixture_files("u2netp*.pt"))
def test_u2net_reproduces_published_masks_also_folded(published_u2net, file):
    content = load(file)
    folded = fold(copy.deepcopy(published_u2net))
    with torch.no_grad():
        # CPUs with AVX2 and with AVX-512 differ by as much as 1e-4.
        close(published_u2net(content["x"]), content["mask"], 3e-4)
        close(folded(content["x"]), content["mask"], 3e-4)


def test_published_saliency_finds_drawn_objects_also_in_bf16(published_u2net):
    generator = torch.Generator().manual_seed(3)
    z = truncated_normal((2, 32), generator)
    image, _, truth = draw_scenes(z, torch.randn(2, 32, generator=generator), 256)
    folded = fold(copy.deepcopy(published_u2net))
    with torch.no_grad():
        mask = folded(image)
        coarse = folded.bfloat16()(image.bfloat16())
    assert (mask - truth).abs().mean() < 0.02
    assert (coarse - mask).abs().mean() < 0.01


def test_bundled_small_networks_show_objects_and_find_them():
    states = runs.load_tensors(train_cgn.SMALL_WEIGHTS)
    biggan = BigGAN(**SMALL).eval()
    u2net = U2Net(small=True).eval()
    biggan.load_state_dict(states["biggan"])
    u2net.load_state_dict(states["u2net"])
    z = truncated_normal((16, 32), torch.Generator().manual_seed(5))
    y = torch.arange(16) * 60
    derive(biggan, 1.0)
    with torch.no_grad():
        image = biggan(z, y)
        scene, background, truth = draw_scenes(z, biggan.class_vectors(y))
        mask = u2net(image)
        empty = u2net(background)
    assert (image - scene).abs().mean() < 0.3 * scene.std()
    intersection = (mask > 0.5) & (truth > 0.5)
    union = (mask > 0.5) | (truth > 0.5)
    assert intersection.sum() > 0.6 * union.sum()
    assert empty.mean() < 0.05


def test_parameters_and_names_of_the_full_size():
    with torch.device("meta"):
        biggan = BigGAN()
        cgn = ImageNetCGN()
        u2netp = U2Net(small=True)
    assert sum(parameter.numel() for parameter in biggan.parameters()) == 55_880_833
    assert len(biggan.state_dict()) == 602
    names = cgn.state_dict().keys()
    assert len(names) == 4 * 602 + 798 == 3206
    parts = {name.split(".")[0] for name in names}
    assert parts == {"biggan_GT", "f_shape", "f_text", "f_bg", "u2net"}

    # Lists of the published files' names.
    spec = (folder_from("CGN_FIXTURES") or ROOT).parent / "spec"
    networks = {"biggan_deep_256": biggan, "u2net": cgn.u2net, "u2netp": u2netp}
    for file, network in networks.items():
        path = spec / f"{file}_keys.txt"
        if path.is_file():
            state = network.state_dict()
            lines = [f"{name} {list(value.shape)}" for name, value in state.items()]
            assert lines == path.read_text().splitlines()


@pytest.mark.parametrize(
    "truncation, row",
    [(0.14, 7), (0.28, 14), (0.56, 28), (0.58, 29), (0.94, 47), (1.0, 50), (0.5, 25), (0.01, 0.5)],
)
def test_statistics_between_grid_points_and_where_the_grid_is_inexact(truncation, row):
    norm = BigGAN(**SMALL).generator.bn
    norm.running_means[:] = torch.arange(51.0)[:, None]
    mean, _ = norm.statistics(truncation)
    assert mean[0].item() == pytest.approx(row, abs=1e-4)


def test_spectral_norm_divides_by_the_largest_singular_value():
    torch.manual_seed(0)
    layer = layers.spectral(torch.nn.Linear(6, 4, bias=False)).double()
    for _ in range(200):
        layers.power_iteration(layer)
    largest = torch.linalg.svdvals(layer.weight_orig)[0]
    close(layers.normalized_weight(layer), layer.weight_orig / largest, 1e-6)


def test_truncated_normal_is_that():
    z = truncated_normal((100_000,), torch.Generator().manual_seed(0))
    assert z.abs().max() <= 2
    assert abs(z.mean()) < 0.01
    assert z.std().item() == pytest.approx(0.8796, abs=0.01)


def test_frozen_networks_stay_and_mechanisms_learn():
    cgn = ImageNetCGN(True, **SMALL)
    cgn.train()
    assert not cgn.biggan_GT.training
    assert not cgn.u2net.training
    assert cgn.f_shape.training
    trainable = {name.split(".")[0] for name, p in cgn.named_parameters() if p.requires_grad}
    assert trainable == {"f_shape", "f_text", "f_bg"}

    derived = derive(cgn, 1.0)
    outputs = cgn(torch.randn(2, 32), torch.tensor([[1, 2, 3], [4, 5, 6]]))
    channels = [3, 1, 3, 3, 1]
    assert [tuple(x.shape) for x in outputs] == [(2, c, 64, 64) for c in channels]
    sum(x.sum() for x in outputs).backward()
    train_cgn.pass_gradients(derived)
    for mechanism in (cgn.f_shape, cgn.f_text, cgn.f_bg):
        assert all(parameter.grad is not None for parameter in mechanism.parameters())


def attach(layer, name, tensor, dtype=None):
    """In place of set_leaf: autograd goes all the way."""
    setattr(layer, name, tensor)
    return tensor, tensor


def test_gradients_pass_through_what_was_derived(monkeypatch):
    """Two batches gather in the leaves; the sum is as if every batch had derived its own."""
    torch.manual_seed(0)
    biggan = BigGAN(**SMALL).double()
    biggan.generator.layers[4].gamma.data += 0.5  # attention, which is off at first
    layers.power_iteration(biggan)
    apart = copy.deepcopy(biggan)
    batches = [(torch.randn(2, 32, dtype=torch.float64), torch.tensor([k, k + 1])) for k in (1, 5)]

    derived = derive(biggan, 0.5)
    for z, y in batches:
        biggan(z, y).square().mean().backward()
    train_cgn.pass_gradients(derived)

    monkeypatch.setattr(train_cgn, "set_leaf", attach)
    for z, y in batches:
        derive(apart, 0.5)
        apart(z, y).square().mean().backward()
    for (name, one), two in zip(biggan.named_parameters(), apart.parameters()):
        assert two.grad.abs().max() > 0, name
        close(one.grad, two.grad, 1e-9)


def test_weights_in_bfloat16_are_what_autocast_makes_of_them():
    """Gradients of several batches are summed in float32, to the same bits."""
    torch.manual_seed(0)
    biggan = BigGAN(**SMALL)
    layers.power_iteration(biggan)
    gradients = []
    for dtype in (None, torch.bfloat16):
        network = copy.deepcopy(biggan)
        for _ in range(2):  # steps
            derived = derive(network, 0.5, dtype)
            for k in range(3):
                z = torch.randn(2, 32, generator=torch.Generator().manual_seed(k))
                with torch.autocast("cpu", torch.bfloat16):
                    network(z, torch.tensor([k, k + 1])).square().mean().backward()
            train_cgn.pass_gradients(derived)
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert network.generator.layers[0].conv_0.weight.dtype == torch.bfloat16
    assert gradients[0][0].dtype == torch.float32
    assert same(*gradients)


def test_recomputed_activations_give_the_same_gradients():
    torch.manual_seed(0)
    cgn = ImageNetCGN(True, **SMALL).train()
    z = torch.randn(2, 32)
    y = torch.tensor([[1, 2, 3], [4, 5, 6]])
    gradients = []
    for recompute in (False, True):
        network = copy.deepcopy(cgn)
        for mechanism in (network.f_shape, network.f_text, network.f_bg):
            mechanism.recompute = recompute
        layers.power_iteration(network)
        derived = derive(network, 1.0)
        sum(x.square().mean() for x in network(z, y)).backward()
        train_cgn.pass_gradients(derived)
        gradients.append([p.grad for p in network.parameters() if p.requires_grad])
    assert len(gradients[0]) > 0
    assert same(*gradients)


def test_random_networks_are_seeded_and_have_contrast():
    before = torch.random.get_rng_state()
    biggan, u2net = train_cgn.random_networks(SMALL, True, seed=3)
    again, _ = train_cgn.random_networks(SMALL, True, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(biggan, again)

    network = BigGAN(**SMALL).eval()
    network.load_state_dict(biggan)
    saliency = U2Net(small=True).eval()
    saliency.load_state_dict(u2net)
    z = truncated_normal((6, 32), torch.Generator().manual_seed(0))
    derive(network, 1.0)
    with torch.no_grad():
        images = network(z, torch.arange(6) * 150)
        masks = saliency(images)
    assert images.std() > 0.3
    assert images.std((2, 3)).mean() > 0.1
    assert masks.std() > 0.2


# --------------------------------------------------------------------------------------------------
# Weights


def test_published_form_of_weights(tmp_path):
    with torch.device("meta"):
        shapes = ImageNetCGN().state_dict()
    state = {}
    for name, value in shapes.items():
        dtype = torch.half if value.is_floating_point() else value.dtype
        state[f"module.{name}"] = torch.zeros(value.shape, dtype=dtype)
    state["module.f_bg.generator.gen_z.bias"] += 0.5
    torch.save(state, tmp_path / "cgn.pth")
    loaded, args = train_cgn.load_imagenet_generator(tmp_path / "cgn.pth")
    assert args == {}
    assert not hasattr(loaded, "biggan_GT")
    assert not loaded.training
    bias = loaded.f_bg.generator.gen_z.bias
    assert bias.dtype == torch.float32
    assert (bias == 0.5).all()


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(U2Net(small=True).state_dict(), tmp_path / "other.pth")
    with pytest.raises(runs.UserError, match="other.pth: not the weights needed here"):
        train_cgn.load_imagenet_generator(tmp_path / "other.pth")


def test_a_large_file_is_mapped_and_not_read(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"x": torch.zeros(10_000_000)}, path)
    x = runs.load_tensors(path)["x"]
    assert x.shape == (10_000_000,)
    assert str(path) in Path("/proc/self/maps").read_text()


# --------------------------------------------------------------------------------------------------
# Training

# Without the losses that compare with the cGAN's image by absolute differences: before the first
# step the composite is that image, and the signs of the differences would be those of rounding
# errors. The foreground differs from the texture of patches.
SMOOTH = "--reconstruction-weight 0 --style-weights 0 0 0 0 --accumulate 2".split()
STILL = "--lr-shape 0 --lr-texture 0 --lr-background 0 --max-steps 1".split()
TRAINING = ["train_cgn.py", *SMALL_IMAGENET]


def mean_gradients(path):
    """Adam's mean gradients in a checkpoint: one vector for shape, texture and background each.

    After one step they are a tenth of the gradient. In float64.
    """
    optimizer = load(path)["optimizers"][0]
    vectors = []
    for group in optimizer["param_groups"]:
        moments = [optimizer["state"][index]["exp_avg"].flatten() for index in group["params"]]
        vectors.append(torch.cat(moments).double())
    return vectors


def test_training_resumes_to_the_same_bits(small_cgn, tmp_path):
    out = tmp_path / "run"
    flags = [*TRAINING, *"--accumulate 2 --log-every 1 --save-every 2".split(), "--out", out]
    run(*flags, "--max-steps", 1)
    run(*flags, "--max-steps", 3, "--resume")
    whole = load(small_cgn / "checkpoint.pt")
    halves = load(out / "checkpoint.pt")
    assert whole["step"] == halves["step"] == 3
    for name in ("generator", "average", "optimizers"):
        assert same(whole[name], halves[name]), name
    assert not any(name.startswith(("biggan_GT", "u2net")) for name in whole["generator"])
    assert (small_cgn / "log.jsonl").read_text() == (out / "log.jsonl").read_text()


def test_accumulated_gradients_are_the_mean_of_the_batches(tmp_path):
    flags = [*TRAINING, *SMOOTH, *STILL]
    one = "--accumulate 1 --max-steps 2 --save-every 1".split()
    run(*flags, *one, "--out", tmp_path / "one")
    run(*flags, "--out", tmp_path / "two")
    first_steps = mean_gradients(tmp_path / "one" / "checkpoint_before.pt")
    second_steps = mean_gradients(tmp_path / "one" / "checkpoint.pt")
    both_batches = mean_gradients(tmp_path / "two" / "checkpoint.pt")
    for first, mean, both in zip(first_steps, second_steps, both_batches):
        second = mean - 0.9 * first
        assert (first - second).norm() > 0.1 * first.norm() > 0
        # Two steps have one power iteration more than one.
        close(both, (first + second) / 2, 2e-3)


def test_two_ranks_have_the_gradients_of_their_joint_batch(tmp_path):
    flags = [*TRAINING, *SMOOTH, *STILL, "--batch-size", 4]
    run(*flags, "--out", tmp_path / "one")
    run_ranks(2, *flags, "--out", tmp_path / "two")
    ones = mean_gradients(tmp_path / "one" / "checkpoint.pt")
    twos = mean_gradients(tmp_path / "two" / "checkpoint.pt")
    for one, two in zip(ones, twos):
        # Batches of other sizes round differently. A missing rank would be most of the gradient.
        assert one.norm() > 0
        assert (one - two).norm() < 0.01 * one.norm()


class FirstLosses(Exception):
    """Raised in place of computing the first losses of a training, with their arguments."""


def first_batch(monkeypatch, out, rank, world_size):
    """The cGAN's images and the windows of the patches in the first batch of one rank."""

    def losses(args, vgg, outputs, x_gt, windows):
        raise FirstLosses(x_gt, windows)

    started = types.SimpleNamespace(step=0)
    monkeypatch.setattr(train_cgn, "imagenet_losses", losses)
    monkeypatch.setattr(train_cgn.checkpoints, "Training", lambda *args, **settings: started)
    monkeypatch.setattr(runs, "rank_and_world_size", lambda: (rank, world_size))
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda cgn, **settings: cgn)
    args = train_cgn.parse_args([*SMALL_IMAGENET, "--batch-size", "4", "--out", str(out)])
    with pytest.raises(FirstLosses) as caught:
        train_cgn.train_imagenet(args, torch.device("cpu"))
    return caught.value.args


def test_two_ranks_draw_what_one_rank_draws(monkeypatch, tmp_path):
    images, windows = first_batch(monkeypatch, tmp_path, 0, 1)
    first_images, first_windows = first_batch(monkeypatch, tmp_path, 0, 2)
    second_images, second_windows = first_batch(monkeypatch, tmp_path, 1, 2)
    assert windows.shape == (4, 36)
    assert torch.equal(torch.cat([first_windows, second_windows]), windows)
    close(torch.cat([first_images, second_images]), images)
    assert not torch.equal(first_windows, second_windows)


def test_the_small_preset_learns(tmp_path):
    flags = "--batch-size 4 --max-steps 24 --log-every 1".split()
    run(*TRAINING, *flags, "--out", tmp_path / "run")
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert len(steps) == 24

    def mean(some):
        return {name: sum(step[name] for step in some) / len(some) for name in some[0]}

    first = mean(steps[:4])
    last = mean(steps[-4:])
    assert last["background"] < 0.5 * first["background"]
    assert last["texture"] < 0.8 * first["texture"]
    assert last["binary"] < first["binary"]
    assert 0.05 < last["mask_mean"] < 0.4


def test_training_starts_from_given_weights(small_cgn, tmp_path):
    weights = small_cgn / "weights.pt"
    flags = [*SMALL_IMAGENET, "--weights", weights, "--out", "unused"]
    args = train_cgn.parse_args([str(flag) for flag in flags])
    networks = train_cgn.load_imagenet_networks(args)
    expected = load(weights)["average"]
    for network in networks:
        state = network.state_dict()
        for name, value in expected.items():
            if name.startswith("f_"):
                assert torch.equal(state[name], value)

    flags = "--dataset imagenet --offline --device cpu".split()
    out = tmp_path / "run"
    done = run("train_cgn.py", *flags, "--weights", weights, "--out", out, expect=2)
    assert "of another --preset" in done.stderr


def test_what_a_run_depends_on_cannot_change_when_it_is_resumed(tmp_path):
    u2net = load(train_cgn.SMALL_WEIGHTS)["u2net"]
    torch.save(u2net, tmp_path / "u2net.pth")
    (tmp_path / "classes.txt").write_text("tabby\nzebra\n")
    flags = [*SMALL_IMAGENET, "--u2net", tmp_path / "u2net.pth"]
    flags += ["--classes", tmp_path / "classes.txt", "--accumulate", 1, "--out", tmp_path / "run"]
    run("train_cgn.py", *flags, "--max-steps", 1)
    assert load(tmp_path / "run" / "weights.pt")["args"]["class_indices"] == [281, 340]

    (tmp_path / "classes.txt").write_text("goldfish\n")
    done = run("train_cgn.py", *flags, "--max-steps", 2, "--resume", expect=2)
    assert "made with class_indices = [281, 340], not [1]" in done.stderr
    (tmp_path / "classes.txt").write_text("zebra\ntabby\n")
    changed = {name: value + 1 for name, value in u2net.items()}
    torch.save(changed, tmp_path / "u2net.pth")
    done = run("train_cgn.py", *flags, "--max-steps", 2, "--resume", expect=2)
    assert "U^2-Net is not the one that this run began with" in done.stderr


# --------------------------------------------------------------------------------------------------
# Generation


def read_rows(folder):
    """The rows of labels.csv."""
    with open(folder / "labels.csv", newline="") as file:
        return list(csv.DictReader(file))


def read_pictures(folder):
    """Name -> bytes of all pictures that are complete."""
    found = {}
    for file in sorted(folder.rglob("*.png")):
        if not file.name.startswith("."):
            found[str(file.relative_to(folder))] = file.read_bytes()
    return found


@pytest.fixture(scope="module")
def generation(small_cgn):
    """A command that makes three pictures of each image in batches of 4, without --n and --out."""
    flags = "--dataset imagenet --device cpu --batch-size 4 --format png".split()
    flags += "--save counterfactual mask composite".split()
    return ["generate.py", *flags, "--weights", small_cgn / "weights.pt"]


@pytest.fixture(scope="module")
def whole(generation, tmp_path_factory):
    """24 images in one go: their files and rows."""
    out = tmp_path_factory.mktemp("generation") / "whole"
    run(*generation, "--n", 24, "--out", out)
    return read_pictures(out), read_rows(out)


def check_whole(out, whole):
    """A folder holds the files and rows of the whole."""
    assert read_pictures(out) == whole[0]
    assert read_rows(out) == whole[1]


def test_a_row_names_the_counterfactual_first_of_all():
    for save, part in ((["mask", "counterfactual"], "counterfactual"), (["mask"], "mask")):
        args = types.SimpleNamespace(save=save, format="png", seed=0)
        assert generate.label_row(args, None, 7, [1, 2, 3])[0] == f"{part}/0000007.png"


def test_a_row_tells_what_is_drawn(whole):
    files, rows = whole
    assert len(files) == 3 * 24
    expected = [f"counterfactual/{index:07d}.png" for index in range(24)]
    assert [row["file"] for row in rows] == expected
    everything = list(range(1000))
    _, classes = generate.sample_image(0, 7, 32, [everything] * 3)
    found = [int(rows[7][head]) for head in imagenet.HEADS]
    assert found == classes.tolist()
    assert rows[7]["shape_name"] == imagenet.class_names()[found[0]]


def test_two_ranks_and_a_resumed_run_make_the_same_pictures(generation, whole, tmp_path):
    flags = [*generation, "--n", 24, "--out", tmp_path]
    run_ranks(2, *flags)
    check_whole(tmp_path, whole)
    for index in (3, 8):  # as a kill would leave it
        (tmp_path / "mask" / f"{index:07d}.png").unlink()
    (tmp_path / "labels.csv").unlink()
    run(*flags, "--resume")
    check_whole(tmp_path, whole)


def test_a_data_set_can_be_split(generation, whole, tmp_path):
    files, rows = whole
    flags = [*generation, "--out", tmp_path]
    run(*flags, "--start", 5, "--n", 19)
    assert read_rows(tmp_path) == rows[5:]
    found = read_pictures(tmp_path)
    assert len(found) == 3 * 19
    assert all(files[name] == data for name, data in found.items())
    # Those that were there before keep their rows.
    run(*flags, "--start", 2, "--n", 3, "--resume")
    assert read_rows(tmp_path) == rows[2:]
    done = run(*flags, "--n", 10, "--seed", 1, "--resume", expect=2)
    assert "made with seed = 0, not 1" in done.stderr


def test_killed_generation_resumes_to_the_same_set(generation, whole, tmp_path):
    files, rows = whole
    out = tmp_path / "out"
    flags = [*generation, "--n", 24, "--out", out]
    process = start(*flags)
    while len(list(out.glob("mask/[0-9]*.png"))) < 9:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    left = read_pictures(out)
    assert 9 <= len(left) < 72
    assert all(files[name] == data for name, data in left.items())
    # Every row has its files; the kill may have cut the last row.
    found = (out / "labels.csv").read_text().splitlines()[1:]
    expected = [",".join(row.values()) for row in rows]
    assert found
    for line in found[:-1]:
        assert line in expected
        assert line.split(",")[0] in left
    run(*flags, "--resume")
    check_whole(out, whole)


# Runs generate.py, which can write no larger files once it begins with the pictures.
LIMITED = """
import resource, sys, generate
limit = int(sys.argv.pop(1))
unlimited = generate.write_pictures
def write_pictures(*args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    unlimited(*args)
generate.write_pictures = write_pictures
generate.runs.run_main(generate.main)
"""


def test_full_disk_ends_in_an_error_and_nothing_is_lost(generation, whole, tmp_path):
    """Stood in for by a limit on the size of a file, which some pictures pass."""
    files, rows = whole
    sizes = sorted(len(data) for name, data in files.items() if "counterfactual" in name)
    script, *flags = [*generation, "--n", 24, "--out", tmp_path]
    command = [sys.executable, "-c", LIMITED, str(sizes[12]), *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write ")
    assert "Traceback" not in done.stderr
    left = read_pictures(tmp_path)
    assert len(left) < 72
    assert all(files[name] == data for name, data in left.items())
    assert all(row in rows and row["file"] in left for row in read_rows(tmp_path))
    run(script, *flags, "--resume")
    check_whole(tmp_path, whole)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--start 9999990 --n 11", "numbered 0 to 9999999"),
        ("--shape 1000", "0 to 999"),
        ("--texture zzz", "no class"),
        ("--interpolate all", "needs --to"),
        ("--interpolate all --to zebra --n 4", "has no meaning with --interpolate"),
        ("--to zebra", "--to: needs --interpolate"),
        ("--batch-size 4", "--batch-size: needs --n"),
        ("--truncation 0", "above 0"),
        ("--truncation 1.1", "not a number from 0.0 to 1.0"),
        ("--weights-dir .", "no cgn.pth in ."),
    ],
)
def test_wrong_arguments_of_generation(flags, words, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(words, "generate.py", "--dataset", "imagenet", "--offline", *flags.split())


def test_interpolation_and_sheet(small_cgn, tmp_path):
    flags = "generate.py --dataset imagenet --device cpu".split()
    flags += ["--weights", small_cgn / "weights.pt"]
    tour = "--interpolate tour --to zebra --shape tabby --texture 3 --frames 3".split()
    run(*flags, *tour, "--out", tmp_path / "tour")
    assert len(list((tmp_path / "tour").glob("frame_*.png"))) == 9
    animation = Image.open(tmp_path / "tour" / "animation.gif")
    assert animation.n_frames > 9
    assert animation.size == (64, 64)
    run(*flags, "--mode", "best", "--out", tmp_path / "sheet")
    assert (tmp_path / "sheet" / "sheet.png").is_file()


def test_class_names():
    assert imagenet.class_index("281") == imagenet.class_index("tabby") == 281
    assert imagenet.class_index("African elephant") == imagenet.class_index("n02504458") == 386
    assert imagenet.class_index("cardigan") == 474  # a garment
    assert imagenet.class_index("Cardigan") == 264  # a dog
    assert imagenet.class_index("DRUM") == 541  # no drumstick


@pytest.mark.parametrize(
    "text, words",
    [
        ("1000", "0 to 999"),
        ("-1", "0 to 999"),
        ("terrier", "more than one"),
        ("CARDIGAN", "Cardigan \\(264\\), cardigan \\(474\\)"),
        ("zzz", "no class"),
        ("²", "no class"),
    ],
)
def test_wrong_class_names(text, words):
    with pytest.raises(runs.UserError, match=words):
        imagenet.class_index(text)


# --------------------------------------------------------------------------------------------------
# The Inception Score


def test_inception_score_by_hand():
    score = generate.inception_score
    assert score(torch.full((8, 5), 0.2)) == (pytest.approx(1), pytest.approx(0))  # says nothing
    certain = torch.eye(4).repeat(3, 1)  # each of the parts has all four classes
    assert score(certain, 3) == (pytest.approx(4), pytest.approx(0))
    # Two predictions (0.9, 0.1) and (0.1, 0.9): their mean is even, the divergence
    # 0.9 log 1.8 + 0.1 log 0.2.
    pair = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)
    divergence = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert score(pair, 1)[0] == pytest.approx(math.exp(divergence))
    mean, spread = score(torch.cat([pair, torch.eye(2).double()]))
    assert mean == pytest.approx((math.exp(divergence) + 2) / 2)
    assert spread == pytest.approx((2 - math.exp(divergence)) / 2)


def test_score_of_a_generator(small_cgn, tmp_path):
    weights = ["--weights", small_cgn / "weights.pt", "--device", "cpu"]
    flags = ["--dataset", "imagenet", *weights, "--offline", "--score", 10]
    run("generate.py", *flags, "--classes", "tench", 400, "--out", tmp_path / "score")
    content = json.loads((tmp_path / "score" / "score.json").read_text())
    assert content["images"] == 10 and content["inception score"] >= 1
    # The mean mask is that of the pictures that a data set of these settings has.
    flags = ["--dataset", "imagenet", *weights, "--n", 10, "--save", "mask", "--format", "png"]
    run("generate.py", *flags, "--classes", "tench", 400, "--out", tmp_path / "set")
    masks = [pil_to_tensor(Image.open(file)) for file in (tmp_path / "set" / "mask").iterdir()]
    mean = torch.stack(masks).double().mean().item() / 255
    assert content["mean mask"] == pytest.approx(mean, abs=1e-4)
