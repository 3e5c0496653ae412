"""ImageNet networks against known numbers and the published names, folding, training, generation, and several ranks."""
import copy
import csv
import json
import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, fixture_files, folder_from, run
from data.runs import UserError
from generate import class_number, draw_image, load_imagenet_generator
from train_cgn import (SMALL, BigGAN, DivideBySigma, ImageNetCGN, U2Net, fold, random_networks, spectral,
                       truncated_normal)


def close(actual, expected, relative=1e-4):
    assert (actual - expected).abs().max() <= relative * expected.abs().max()


@pytest.mark.parametrize("file", fixture_files("biggan_*.pt"))
def test_biggan_reproduces_published_outputs_also_folded(file):
    content = torch.load(file, weights_only=True)
    biggan = BigGAN(**content["config"]).eval()
    biggan.load_state_dict(content["state_dict"])
    for truncation, images in content["outputs"].items():
        folded = fold(copy.deepcopy(biggan), truncation)
        with torch.no_grad():
            close(biggan(content["z"], content["y"], truncation), images)
            close(folded(content["z"], content["y"], truncation), images)
            close(biggan(content["z"], biggan.class_vectors(content["y"]), truncation), images)
    assert not any("weight_orig" in name or "running" in name for name in folded.state_dict())


@pytest.mark.parametrize("file", fixture_files("u2netp*.pt"))
def test_u2net_reproduces_published_masks_also_folded(file):
    weights = folder_from("CGN_WEIGHTS")
    if weights is None or not (weights / "u2netp.pth").is_file():
        pytest.skip(f"no u2netp.pth in CGN_WEIGHTS={weights}")
    content = torch.load(file, weights_only=True)
    u2net = U2Net(small=True).eval()
    u2net.load_state_dict(torch.load(weights / "u2netp.pth", weights_only=True))
    with torch.no_grad():
        close(u2net(content["x"]), content["mask"])
        close(fold(copy.deepcopy(u2net))(content["x"]), content["mask"])


def test_parameters_and_names_of_the_full_size():
    with torch.device("meta"):
        biggan, cgn = BigGAN(), ImageNetCGN()
    assert sum(p.numel() for p in biggan.parameters()) == 55_880_833
    names = cgn.state_dict().keys()
    assert len(biggan.state_dict()) == 602 and len(names) == 4 * 602 + 798 == 3206
    assert {name.split(".")[0] for name in names} == {"biggan_GT", "f_shape", "f_text", "f_bg", "u2net"}
    spec = (folder_from("CGN_FIXTURES") or ROOT).parent / "spec"             # lists of the published files' names
    for network, file in ((biggan, "biggan_deep_256"), (cgn.u2net, "u2net"), (U2Net(small=True), "u2netp")):
        if (spec / f"{file}_keys.txt").is_file():
            lines = [f"{name} {list(x.shape)}" for name, x in network.state_dict().items()]
            assert lines == (spec / f"{file}_keys.txt").read_text().splitlines()


def test_statistics_between_grid_points_and_where_the_grid_is_inexact():
    norm = BigGAN(**SMALL).generator.bn
    norm.running_means[:] = torch.arange(51.0)[:, None]
    for truncation, row in ((0.14, 7), (0.28, 14), (0.56, 28), (0.58, 29), (0.94, 47), (1.0, 50), (0.5, 25), (0.01, 0.5)):
        assert norm.statistics(truncation)[0][0].item() == pytest.approx(row, abs=1e-4)


def test_spectral_norm_divides_by_the_largest_singular_value_with_its_gradient():
    torch.manual_seed(0)
    layer = spectral(torch.nn.Linear(6, 4, bias=False)).double()
    for _ in range(200):
        layer(torch.zeros(1, 6, dtype=torch.float64))
    close(layer.weight, layer.weight_orig / torch.linalg.svdvals(layer.weight_orig)[0], 1e-6)
    u, v = layer.weight_u, layer.weight_v
    weight = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: DivideBySigma.apply(w, u, v), (weight,))


def test_truncated_normal_is_that():
    z = truncated_normal((100_000,), torch.Generator().manual_seed(0))
    assert z.abs().max() <= 2 and abs(z.mean()) < 0.01 and z.std().item() == pytest.approx(0.8796, abs=0.01)


def test_frozen_networks_stay_and_mechanisms_learn():
    cgn = ImageNetCGN(True, **SMALL)
    cgn.train()
    assert not cgn.biggan_GT.training and not cgn.u2net.training and cgn.f_shape.training
    assert {name.split(".")[0] for name, p in cgn.named_parameters() if p.requires_grad} == {"f_shape", "f_text", "f_bg"}
    y = torch.tensor([[1, 2, 3], [4, 5, 6]])
    outputs = cgn(torch.randn(2, 32), y, 1.0)
    assert [tuple(x.shape) for x in outputs] == [(2, c, 64, 64) for c in (3, 1, 3, 3, 1)]
    sum(x.sum() for x in outputs).backward()
    assert all(p.grad is not None for f in (cgn.f_shape, cgn.f_text, cgn.f_bg) for p in f.parameters())


def test_random_networks_are_seeded_and_have_contrast():
    before = torch.random.get_rng_state()
    (biggan, u2net), (again, _) = (random_networks(SMALL, True, seed=3) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(biggan[name], again[name]) for name in biggan)
    network, saliency = BigGAN(**SMALL).eval(), U2Net(True).eval()
    network.load_state_dict(biggan)
    saliency.load_state_dict(u2net)
    with torch.no_grad():
        images = network(truncated_normal((6, 32), torch.Generator().manual_seed(0)), torch.arange(6) * 150, 1.0)
        masks = saliency(images)
    assert images.std() > 0.3 and images.std((2, 3)).mean() > 0.1 and masks.std() > 0.2


# ---------------------------------------------------------------------------------------------------------------------
# The scripts


FLAGS = ["--dataset", "imagenet", "--preset", "small", "--offline", "--device", "cpu", "--amp", "off",
         "--batch-size", 2, "--style-weights", 1, 0, 0, 0, "--texture-weights", 1, 0, 0, 0]


def torchrun(ranks, script, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "29541",
               "--", str(ROOT / script), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("imagenet") / "run"
    run("train_cgn.py", *FLAGS, "--accumulate", 2, "--steps", 3, "--log-every", 1, "--save-every", 2, "--out", out)
    return out


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def test_training_resumes_to_the_same_bits(trained, tmp_path):
    common = ["train_cgn.py", *FLAGS, "--accumulate", 2, "--log-every", 1, "--save-every", 2, "--out", tmp_path / "run"]
    run(*common, "--steps", 1)
    run(*common, "--steps", 3, "--resume")
    whole, halves = checkpoint(trained), checkpoint(tmp_path / "run")
    assert whole["step"] == halves["step"] == 3
    for part in ("generator", "average"):
        assert whole[part].keys() == halves[part].keys()
        assert all(torch.equal(whole[part][name], halves[part][name]) for name in whole[part])
    assert not any(name.startswith(("biggan_GT", "u2net")) for name in whole["generator"])


def test_two_ranks_and_accumulation_have_the_gradients_of_one_large_batch(tmp_path):
    """With the reconstruction loss alone: a random U^2-Net magnifies rounding, and signs in Gram matrices turn over."""
    results = []
    for name, ranks, batch, accumulate in (("one", 1, 4, 1), ("two", 2, 2, 1)):
        flags = [*FLAGS, "--steps", 1, "--accumulate", accumulate, "--binary-weight", 0, "--mask-weight", 0,
                 "--background-weight", 0, "--style-weights", 0, 0, 0, 0, "--texture-weights", 0, 0, 0, 0,
                 "--out", tmp_path / name]
        flags[flags.index("--batch-size") + 1] = batch
        torchrun(ranks, "train_cgn.py", *flags)
        state = checkpoint(tmp_path / name)["optimizers"][0]["state"]
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        # After one step of Adam, exp_avg is a tenth of the gradient.
        results.append((torch.cat([state[number]["exp_avg"].flatten() for number in sorted(state)]), log))
    (one, log), (two, other) = results
    assert len(log) == len(other) == 1 and one.norm() > 0
    assert (one - two).norm() < 1e-3 * one.norm()
    assert log[0]["reconstruction"] == pytest.approx(other[0]["reconstruction"], rel=1e-4)


def rows(folder):
    with open(folder / "labels.csv", newline="") as file:
        return list(csv.DictReader(file))


def pictures(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.png"))}


def test_generation_is_the_same_resumed_sharded_and_split(trained, tmp_path):
    common = ["--dataset", "imagenet", "--weights", trained / "weights.pt", "--device", "cpu", "--batch-size", 4,
              "--format", "png", "--save", "counterfactual", "mask", "composite"]
    run("generate.py", *common, "--n", 10, "--out", tmp_path / "whole")
    whole, table = pictures(tmp_path / "whole"), rows(tmp_path / "whole")
    assert len(whole) == 30 and [row["file"] for row in table] == [f"counterfactual/{n:07d}.png" for n in range(10)]
    _, classes = draw_image(0, 7, 32, [list(range(1000))] * 3)
    assert [int(table[7][name]) for name in ("shape", "texture", "background")] == classes.tolist()

    torchrun(2, "generate.py", *common, "--n", 10, "--out", tmp_path / "ranks")
    assert pictures(tmp_path / "ranks") == whole and rows(tmp_path / "ranks") == table

    run("generate.py", *common, "--n", 10, "--out", tmp_path / "broken")
    for number in (3, 8):                                  # as a kill would leave it
        (tmp_path / "broken" / "mask" / f"{number:07d}.png").unlink()
    (tmp_path / "broken" / "labels.csv").unlink()
    run("generate.py", *common, "--n", 10, "--resume", "--out", tmp_path / "broken")
    assert pictures(tmp_path / "broken") == whole and rows(tmp_path / "broken") == table

    run("generate.py", *common, "--start", 5, "--n", 5, "--out", tmp_path / "split")
    assert rows(tmp_path / "split") == table[5:]
    assert all(whole[name] == data for name, data in pictures(tmp_path / "split").items())
    done = run("generate.py", *common, "--n", 10, "--seed", 1, "--resume", "--out", tmp_path / "split", expect=2)
    assert "seed = 0, not 1" in done.stderr


def test_interpolation_and_sheet(trained, tmp_path):
    common = ["--dataset", "imagenet", "--weights", trained / "weights.pt", "--device", "cpu"]
    run("generate.py", *common, "--interpolate", "tour", "--to", "zebra", "--shape", "tabby", "--texture", 3, "--frames",
        3, "--out", tmp_path / "tour")
    assert len(list((tmp_path / "tour").glob("frame_*.png"))) == 9
    from PIL import Image
    animation = Image.open(tmp_path / "tour" / "animation.gif")
    assert animation.n_frames > 9 and animation.size == (64, 64)
    run("generate.py", *common, "--sheet", "--mode", "best", "--out", tmp_path / "sheet")
    assert (tmp_path / "sheet" / "sheet.png").is_file()


def test_published_form_of_weights_and_weights_of_another_network(trained, tmp_path):
    cgn = ImageNetCGN()
    state = {f"module.{name}": value.half() if value.is_floating_point() else value
             for name, value in cgn.state_dict().items()}
    torch.save(state, tmp_path / "cgn.pth")
    loaded, args = load_imagenet_generator(tmp_path / "cgn.pth")
    assert args == {} and not hasattr(loaded, "biggan_GT")
    close(loaded.f_bg.generator.gen_z.weight_orig, cgn.f_bg.generator.gen_z.weight_orig, 1e-3)
    torch.save(U2Net(True).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth: not the weights needed here"):
        load_imagenet_generator(tmp_path / "other.pth")


def test_class_names():
    assert class_number("281") == class_number("tabby") == 281 and class_number("African elephant") == 386
    for text, message in (("1000", "0 to 999"), ("-1", "0 to 999"), ("terrier", "more than one"), ("zzz", "no class")):
        with pytest.raises(UserError, match=message):
            class_number(text)
