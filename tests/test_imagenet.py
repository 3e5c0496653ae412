"""ImageNet networks against known numbers and the published names, folding, training, generation, and several ranks."""
import copy
import csv
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import generate
from conftest import ROOT, SMALL_IMAGENET, fixture_files, folder_from, run, torchrun
from data.scenes import draw_scenes
from data.runs import UserError, load_tensors, run_main
from generate import class_number, draw_image
from data.frozen import U2Net, fold, random_networks
from kernels.layers import DivideBySigma, power_iteration, spectral
from train_cgn import (SMALL, STAND_INS, BigGAN, ImageNetCGN, load_imagenet_generator, parse_args,
                       prepare_imagenet, truncated_normal)


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


def scenes(count, size=64):
    generator = torch.Generator().manual_seed(3)
    return draw_scenes(truncated_normal((count, 32), generator), torch.randn(count, 32, generator=generator), size)


def test_published_saliency_finds_drawn_objects_also_in_bf16():
    weights = folder_from("CGN_WEIGHTS")
    if weights is None or not (weights / "u2netp.pth").is_file():
        pytest.skip(f"no u2netp.pth in CGN_WEIGHTS={weights}")
    u2net = U2Net(small=True).eval()
    u2net.load_state_dict(torch.load(weights / "u2netp.pth", weights_only=True))
    image, _, truth = scenes(6, 256)
    with torch.no_grad():
        mask = fold(u2net)(image)
        coarse = u2net.bfloat16()(image.bfloat16())
    assert (mask - truth).abs().mean() < 0.02 and (coarse - mask).abs().mean() < 0.01


def test_stand_ins_show_objects_and_find_them():
    states, biggan, u2net = load_tensors(STAND_INS), BigGAN(**SMALL).eval(), U2Net(True).eval()
    biggan.load_state_dict(states["biggan"])
    u2net.load_state_dict(states["u2net"])
    z, y = truncated_normal((16, 32), torch.Generator().manual_seed(5)), torch.arange(16) * 60
    with torch.no_grad():
        image, (scene, background, truth) = biggan(z, y, 1.0), draw_scenes(z, biggan.class_vectors(y))
        mask, empty = u2net(image), u2net(background)
    assert (image - scene).abs().mean() < 0.3 * scene.std()
    assert ((mask > 0.5) & (truth > 0.5)).sum() > 0.6 * ((mask > 0.5) | (truth > 0.5)).sum()
    assert empty.mean() < 0.05


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
        power_iteration(layer)
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


def test_recomputed_activations_give_the_same_gradients_and_singular_vectors():
    torch.manual_seed(0)
    cgn = ImageNetCGN(True, **SMALL).train()
    z, y, gradients, vectors = torch.randn(2, 32), torch.tensor([[1, 2, 3], [4, 5, 6]]), [], []
    for recompute in (False, True):
        network = copy.deepcopy(cgn)
        for mechanism in (network.f_shape, network.f_text, network.f_bg):
            mechanism.recompute = recompute
        sum(x.square().mean() for x in network(z, y, 1.0)).backward()
        gradients.append([p.grad for p in network.parameters() if p.requires_grad])
        vectors.append([value for name, value in network.state_dict().items() if name.endswith("weight_u")])
    assert all(torch.equal(a, b) for pair in (gradients, vectors) for a, b in zip(*pair))


def test_random_networks_are_seeded_and_have_contrast():
    before = torch.random.get_rng_state()
    (biggan, u2net), (again, _) = (random_networks(lambda: BigGAN(**SMALL), True, seed=3) for _ in range(2))
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


FLAGS = SMALL_IMAGENET


@pytest.fixture(scope="module")
def trained(small_cgn):
    return small_cgn


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


# Without the losses that compare by absolute differences. Composite and cGAN's image are alike before the first step,
# Gram matrices nearly so: the signs of their differences would be those of rounding errors.
SMOOTH = [*FLAGS, "--reconstruction-weight", 0, "--style-weights", 0, 0, 0, 0, "--texture-weights", 0, 0, 0, 0]


def gradients(*flags, steps=1):
    """The gradient of all mechanisms in each step, as one vector, without moving the weights."""
    rates = [part for name in ("shape", "texture", "background") for part in (f"--lr-{name}", 0)]
    args = parse_args([str(flag) for flag in [*SMOOTH, *flags, *rates, "--out", "unused"]])
    parts, _, make_step, _ = prepare_imagenet(args, torch.device("cpu"), False)
    vectors = []
    for step in range(steps):
        make_step(step)
        vectors.append(torch.cat([p.grad.flatten() for p in parts["generator"].parameters() if p.requires_grad]))
    return vectors


def test_accumulated_gradients_are_the_mean_of_the_batches():
    first, second = gradients("--accumulate", 1, steps=2)
    both, = gradients("--accumulate", 2)
    assert (first - second).norm() > 0.1 * first.norm()
    close(both, (first + second) / 2, 1e-5)


def test_the_small_preset_learns():
    args = parse_args([str(flag) for flag in [*FLAGS, "--batch-size", 4, "--out", "unused"]])
    _, _, make_step, _ = prepare_imagenet(args, torch.device("cpu"), False)
    steps = [make_step(step)[0] for step in range(24)]
    first, last = ({name: torch.stack([s[name] for s in some]).mean() for name in some[0]}
                   for some in (steps[:4], steps[-4:]))
    assert last["background"] < 0.5 * first["background"] and last["texture"] < 0.8 * first["texture"]
    assert last["binary"] < first["binary"] and 0.05 < last["mask_mean"] < 0.4


def test_two_ranks_have_the_gradients_of_their_joint_batch(tmp_path):
    torchrun(2, "train_cgn.py", *SMOOTH, "--accumulate", 2, "--steps", 1, "--out", tmp_path / "run")
    state = checkpoint(tmp_path / "run")["optimizers"][0]["state"]
    two = torch.cat([state[number]["exp_avg"].flatten() for number in sorted(state)]) * 10     # after one step of Adam
    one, = gradients("--accumulate", 2, "--batch-size", 4)
    # Rounding: one process with one thread and with two differ by 0.3 %. A missing rank would be most of it.
    assert one.norm() > 0 and (one - two).norm() < 0.01 * one.norm()


def test_training_starts_from_given_weights(trained, tmp_path):
    args = parse_args([str(flag) for flag in [*FLAGS, "--weights", trained / "weights.pt", "--out", "unused"]])
    parts = prepare_imagenet(args, torch.device("cpu"), False)[0]
    average = torch.load(trained / "weights.pt", weights_only=True)["average"]
    for name in ("generator", "average"):
        state = parts[name].state_dict()
        assert all(torch.equal(state[key], value) for key, value in average.items() if key.startswith("f_"))
    done = run("train_cgn.py", "--dataset", "imagenet", "--offline", "--device", "cpu", "--weights",
               trained / "weights.pt", "--out", tmp_path / "run", expect=2)
    assert "of another --preset" in done.stderr


def rows(folder):
    with open(folder / "labels.csv", newline="") as file:
        return list(csv.DictReader(file))


def pictures(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.png"))}


def generation(trained, out, *flags):
    return ["generate.py", "--dataset", "imagenet", "--weights", trained / "weights.pt", "--device", "cpu",
            "--batch-size", 4, "--format", "png", "--save", "counterfactual", "mask", "composite", "--out", out, *flags]


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """24 images in one go: their files and rows."""
    out = tmp_path_factory.mktemp("generation") / "whole"
    run(*generation(trained, out, "--n", 24))
    return pictures(out), rows(out)


def test_generation_is_the_same_resumed_sharded_and_split(trained, whole, tmp_path):
    files, table = whole
    assert len(files) == 72 and [row["file"] for row in table] == [f"counterfactual/{n:07d}.png" for n in range(24)]
    _, classes = draw_image(0, 7, 32, [list(range(1000))] * 3)
    assert [int(table[7][name]) for name in ("shape", "texture", "background")] == classes.tolist()

    torchrun(2, *generation(trained, tmp_path / "out", "--n", 24))
    assert pictures(tmp_path / "out") == files and rows(tmp_path / "out") == table

    for number in (3, 8):                                  # as a kill would leave it
        (tmp_path / "out" / "mask" / f"{number:07d}.png").unlink()
    (tmp_path / "out" / "labels.csv").unlink()
    run(*generation(trained, tmp_path / "out", "--n", 24, "--resume"))
    assert pictures(tmp_path / "out") == files and rows(tmp_path / "out") == table

    run(*generation(trained, tmp_path / "split", "--start", 5, "--n", 19))
    assert rows(tmp_path / "split") == table[5:]
    assert all(files[name] == data for name, data in pictures(tmp_path / "split").items())
    run(*generation(trained, tmp_path / "split", "--start", 2, "--n", 3, "--resume"))
    assert rows(tmp_path / "split") == table[2:]           # those that were there before keep their rows
    done = run(*generation(trained, tmp_path / "split", "--n", 10, "--seed", 1, "--resume"), expect=2)
    assert "seed = 0, not 1" in done.stderr


def test_killed_generation_goes_on_to_the_same_set(trained, whole, tmp_path):
    files, table = whole
    process = subprocess.Popen([sys.executable, *map(str, generation(trained, tmp_path / "out", "--n", 24))], cwd=ROOT,
                               stdout=subprocess.DEVNULL)
    while len(list((tmp_path / "out").glob("mask/[0-9]*.png"))) < 9:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    left = {name: data for name, data in pictures(tmp_path / "out").items() if not Path(name).name.startswith(".")}
    assert 9 <= len(left) < 72 and all(files[name] == data for name, data in left.items())
    # Every row has its files; the kill may have cut the last row.
    found = (tmp_path / "out" / "labels.csv").read_text().splitlines()[1:]
    lines = [",".join(row.values()) for row in table]
    assert found and all(line in lines and line.split(",")[0] in left for line in found[:-1])
    run(*generation(trained, tmp_path / "out", "--n", 24, "--resume"))
    assert pictures(tmp_path / "out") == files and rows(tmp_path / "out") == table


def test_full_disk_ends_in_an_error_and_nothing_is_lost(trained, whole, tmp_path):
    """Stood in for by a limit on the size of a file, which some pictures pass."""
    files, table = whole
    sizes = sorted(len(data) for name, data in files.items() if "counterfactual" in name)
    code = f"""
import resource, sys, generate
sys.argv = sys.argv[1:]
unlimited = generate.generate_imagenet
def limited(*args):
    resource.setrlimit(resource.RLIMIT_FSIZE, ({sizes[12]}, {sizes[12]}))
    unlimited(*args)
generate.generate_imagenet = limited
generate.run_main(generate.main)"""
    command = map(str, generation(trained, tmp_path / "out", "--n", 24))
    done = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: cannot write ") and "Traceback" not in done.stderr
    left = pictures(tmp_path / "out")
    assert len(left) < 72 and all(files[name] == data for name, data in left.items())
    assert all(row in table and row["file"] in left for row in rows(tmp_path / "out"))
    run(*generation(trained, tmp_path / "out", "--n", 24, "--resume"))
    assert pictures(tmp_path / "out") == files and rows(tmp_path / "out") == table


def test_wrong_arguments_of_generation(trained, tmp_path, monkeypatch, capsys):
    def message(*flags):
        monkeypatch.setattr(sys, "argv", [str(flag) for flag in flags])
        with pytest.raises(SystemExit, match="2"):
            run_main(generate.main)
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    for flags, words in ((["--start", 9_999_990, "--n", 11], "numbered 0 to 9999999"), (["--shape", 1000], "0 to 999"),
                         (["--texture", "zzz"], "no class"), (["--interpolate", "all"], "needs --to"),
                         (["--truncation", 0], "above 0"), (["--truncation", 1.1], "not a number from 0.0 to 1.0")):
        assert words in message(*generation(trained, tmp_path / "out", *flags))
    assert f"no cgn.pth in {tmp_path}" in message("generate.py", "--dataset", "imagenet", "--offline", "--weights-dir",
                                                  tmp_path, "--out", tmp_path / "out")


def test_interpolation_and_sheet(trained, tmp_path):
    common = ["--dataset", "imagenet", "--weights", trained / "weights.pt", "--device", "cpu"]
    run("generate.py", *common, "--interpolate", "tour", "--to", "zebra", "--shape", "tabby", "--texture", 3, "--frames",
        3, "--out", tmp_path / "tour")
    assert len(list((tmp_path / "tour").glob("frame_*.png"))) == 9
    from PIL import Image
    animation = Image.open(tmp_path / "tour" / "animation.gif")
    assert animation.n_frames > 9 and animation.size == (64, 64)
    run("generate.py", *common, "--mode", "best", "--out", tmp_path / "sheet")
    assert (tmp_path / "sheet" / "sheet.png").is_file()


def test_published_form_of_weights_and_weights_of_another_network(tmp_path):
    with torch.device("meta"):
        shapes = {f"module.{name}": value for name, value in ImageNetCGN().state_dict().items()}
    state = {name: torch.zeros(value.shape, dtype=torch.half if value.is_floating_point() else value.dtype)
             for name, value in shapes.items()}
    state["module.f_bg.generator.gen_z.bias"] += 0.5
    torch.save(state, tmp_path / "cgn.pth")
    loaded, args = load_imagenet_generator(tmp_path / "cgn.pth")
    assert args == {} and not hasattr(loaded, "biggan_GT") and not loaded.training
    assert (loaded.f_bg.generator.gen_z.bias == 0.5).all() and loaded.f_bg.generator.gen_z.bias.dtype == torch.float32
    torch.save(U2Net(True).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth: not the weights needed here"):
        load_imagenet_generator(tmp_path / "other.pth")


def test_a_large_file_is_mapped_and_not_read(tmp_path):
    torch.save({"x": torch.zeros(10_000_000)}, tmp_path / "weights.pt")
    x = load_tensors(tmp_path / "weights.pt")["x"]
    assert x.shape == (10_000_000,) and str(tmp_path / "weights.pt") in Path("/proc/self/maps").read_text()


def test_class_names():
    assert class_number("281") == class_number("tabby") == 281 and class_number("African elephant") == 386
    for text, message in (("1000", "0 to 999"), ("-1", "0 to 999"), ("terrier", "more than one"), ("zzz", "no class")):
        with pytest.raises(UserError, match=message):
            class_number(text)
