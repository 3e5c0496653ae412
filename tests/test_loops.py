"""What the training loops hand to a step, what a step does with it, and what generate.py draws.

Steps and networks are replaced by ones that tell what they were given.
"""

import json
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL_IMAGENET, load
from torch.testing import assert_close

import generate
import train_cgn
import train_classifier
from data import checkpoints, imagenet, weights
from data.mnist import to_float
from kernels import composite_losses

CPU = torch.device("cpu")


def parsed(module, out, *flags):
    """Arguments of a run in the folder `out`, which is there."""
    out.mkdir(exist_ok=True)
    return module.parse_args([*map(str, flags), "--out", str(out)])


def noting(monkeypatch, module, name):
    """Let a function note its arguments and its result. Returns the list of notes."""
    original = getattr(module, name)
    notes = []

    def noted(*args, **kinds):
        result = original(*args, **kinds)
        notes.append((args, result))
        return result

    monkeypatch.setattr(module, name, noted)
    return notes


def rates_of(*optimizers):
    """The learning rate of each parameter group."""
    return [float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]


NO_LOSS = {"skipped": torch.zeros(())}

# --------------------------------------------------------------------------------------------------
# MNIST: the generator


def test_what_each_step_of_mnist_is_given(tiny, tmp_path, monkeypatch):
    """Rates, moving average, kind of the step, its images and its noise."""
    found = []

    def step(args, training, data, vgg, bf16, index, decay, **kinds):
        others, norms = training.optimizers[0].param_groups
        assert all(p.ndim == 1 for p in norms["params"])
        weights = [p for p in training.networks["generator"].parameters() if p.ndim > 1]
        assert {id(p) for p in weights} <= {id(p) for p in others["params"]}
        assert {o.defaults["betas"] for o in training.optimizers} == {(0.5, 0.999)}
        rates = rates_of(*training.optimizers)
        found.append((rates, decay.item(), index.tolist(), torch.rand(()).item(), kinds))
        return {"mask": torch.tensor(0.5), **NO_LOSS}

    monkeypatch.setattr(train_cgn, "mnist_step", step)
    monkeypatch.setattr(train_cgn, "load_vgg", lambda *_: None)
    flags = "--lr 0.25 --norm-lr 0.5 --decay 0.4 --ema 0.2 --style-every 3 --style-weights 1 0 0 0"
    flags += " --dataset colored_mnist --max-steps 10 --batch-size 120"
    args = parsed(train_cgn, tmp_path / "run", *tiny, *flags.split())
    train_cgn.train_mnist(args, CPU)
    rates, decays, indices, noise, kinds = zip(*found)

    falling = [1.0] * 7 + [0.75, 0.5, 0.25]
    for step in range(10):
        plain = 0.25 * falling[step]
        assert rates[step] == [plain * (step >= 2), 0.5 * falling[step], plain]
        assert decays[step] == pytest.approx(min(0.2, (step + 1) / (step + 10)))
        assert kinds[step] == {
            "warming_up": step < 2,
            "style": step in (3, 6, 9),
            "penalty": step == 8,
        }
    first, second = sum(indices[:5], []), sum(indices[5:], [])
    assert sorted(first) == sorted(second) == list(range(600)) and first != second
    assert len(set(noise)) == 10


def test_a_step_of_mnist_takes_classes_and_shifts_of_its_own(
    tiny, untrained, tmp_path, monkeypatch
):
    """The discriminator is told the classes that were drawn; the average is of the new weights."""
    shuffled = noting(monkeypatch, train_cgn, "shuffle_patches")
    generator = noting(monkeypatch, train_cgn, "generator_losses")
    discriminator = noting(monkeypatch, train_cgn, "discriminator_loss")
    flags = ["--dataset", "colored_mnist", *tiny, "--max-steps", 1, "--warmup", 0]
    flags += ["--weights", untrained]
    for labels in ("uniform", "batch"):
        args = parsed(train_cgn, tmp_path / labels, *flags, "--labels", labels)
        train_cgn.train_mnist(args, CPU)
        (foreground, background), (losses, _), (judged, _) = (
            shuffled[-2:],
            generator[-1],
            discriminator[-1],
        )
        assert not torch.equal(foreground[0][1], background[0][1])
        mechanisms, x_gt, drawn = losses[3:6]
        assert mechanisms[1] is foreground[1] and mechanisms[2] is background[1]
        assert judged[2] is x_gt and judged[5] is drawn and not judged[4].requires_grad
        assert torch.equal(judged[3], drawn) == (labels == "batch")

    content = load(tmp_path / "batch" / "checkpoint.pt")
    before = load(untrained)["generator"]
    for name, value in content["generator"].items():
        if value.is_floating_point():
            assert not torch.equal(value, before[name]), name
            expected = torch.lerp(before[name], value, 0.9)
            assert_close(content["average"][name], expected, msg=name)


def test_the_segmenter_learns_from_the_moving_average(tiny, tmp_path, monkeypatch):
    """With new noise in each step, and a rate that falls over the second half."""
    found = []

    def step(cgn, segmenter, optimizer, bf16):
        found.append((cgn, *rates_of(optimizer), torch.rand(()).item()))
        return {"segmenter": torch.zeros(()), **NO_LOSS}

    monkeypatch.setattr(train_cgn, "segmenter_step", step)
    monkeypatch.setattr(train_cgn, "measure_segmenter", lambda *_: None)
    flags = ["--dataset", "colored_mnist", *tiny, "--warmup", 0, "--max-steps", 2]
    flags += ["--segmenter-steps", 4]
    train_cgn.train_mnist(parsed(train_cgn, tmp_path / "run", *flags), CPU)
    networks, rates, noise = zip(*found)
    content = load(tmp_path / "run" / "weights.pt")
    bias = networks[0].state_dict()["f_text1.0.weight"]
    assert torch.equal(bias, content["average"]["f_text1.0.weight"])
    assert not torch.equal(bias, content["generator"]["f_text1.0.weight"])
    assert not networks[0].training
    assert rates == pytest.approx((2e-3, 2e-3, 2e-3, 1e-3))
    assert len(set(noise)) == 4


def test_pairs_of_the_segmenter_are_shifted_in_place_and_color(monkeypatch):
    """Each foreground and each background by itself."""
    cgn = train_cgn.MnistCGN().eval()
    shuffled = noting(monkeypatch, train_cgn, "shuffle_patches")
    composed = noting(monkeypatch, train_cgn, "compose")
    train_cgn.segmenter_pairs(cgn, 50)
    (foreground, background), ((_, *textures), _) = shuffled, composed[0]
    assert not torch.equal(foreground[0][1], background[0][1])
    shifts = []
    for texture, (_, plain) in zip(textures, shuffled):
        inside = texture.abs() < 1
        moved = torch.where(inside, texture - plain, torch.nan).flatten(2)
        shifts.append(moved.nanmean(2))  # (50, 3): one shift for each channel of each image
        assert (moved - shifts[-1][..., None]).nan_to_num().abs().max() < 1e-5
        assert 0.07 < shifts[-1][shifts[-1].isfinite()].std() < 0.13
    assert not torch.equal(*shifts)


# --------------------------------------------------------------------------------------------------
# ImageNet: the generator


@pytest.fixture(scope="module")
def random_cgn():
    """The small networks of ImageNet with random weights, each with others."""
    cgn = train_cgn.ImageNetCGN(True, cgan=False, **train_cgn.SMALL).eval()
    for seed, part in enumerate((cgn.f_shape, cgn.f_text, cgn.f_bg)):
        biggan, u2net = train_cgn.random_networks(train_cgn.SMALL, True, seed)
        part.load_state_dict(biggan)
    cgn.u2net.load_state_dict(u2net)
    return cgn


@pytest.fixture(scope="module")
def weights_file(random_cgn, tmp_path_factory):
    """A weights.pt whose moving average has other weights than the trained networks."""
    average = random_cgn.state_dict()
    trained = {}
    for name, value in average.items():
        if name.startswith("f_"):
            trained[name] = value + 1 if value.is_floating_point() else value
    path = tmp_path_factory.mktemp("random") / "weights.pt"
    args = {"dataset": "imagenet", "preset": "small"}
    torch.save({"generator": trained, "average": average, "step": 0, "args": args}, path)
    return path


def test_what_each_step_of_imagenet_does(tmp_path, monkeypatch):
    """Rates by mechanism, truncation, power iterations, the moving average, means in the log."""
    numbers = iter(range(100))
    batches, rates, decays = [], [], []

    def batch(args, cgn, vgg, bf16, z, y, windows):
        batches.append((z, y, windows))
        return {"mask_mean": torch.tensor(0.5), "binary": torch.tensor(float(next(numbers)))}

    def finite_step(optimizer, loss):
        rates.append(rates_of(optimizer))
        names = {id(p): n for n, p in networks[0].named_parameters()}
        for group, part in zip(optimizer.param_groups, ("f_shape", "f_text", "f_bg")):
            assert {names[id(p)].split(".")[0] for p in group["params"]} == {part}
        return torch.zeros(())

    monkeypatch.setattr(train_cgn, "imagenet_batch", batch)
    monkeypatch.setattr(train_cgn, "pass_gradients", lambda _: None)
    monkeypatch.setattr(checkpoints, "finite_step", finite_step)
    monkeypatch.setattr(train_cgn, "update_average", lambda *args: decays.append(args))
    iterations = noting(monkeypatch, train_cgn, "power_iteration")
    folded = noting(monkeypatch, train_cgn, "fold")
    derived = noting(monkeypatch, train_cgn, "derive")
    load_networks = train_cgn.load_imagenet_networks
    networks = []

    def load_and_keep(args):
        networks.extend(load_networks(args))
        return networks

    monkeypatch.setattr(train_cgn, "load_imagenet_networks", load_and_keep)
    flags = "--lr-shape 0.1 --lr-texture 0.2 --lr-background 0.3 --truncation 0.5 --ema 0.15"
    flags += " --accumulate 2 --max-steps 3 --log-every 1 --sample-every 0 --classes 5 7"
    flags += " --kernels eager"
    args = parsed(train_cgn, tmp_path / "run", *SMALL_IMAGENET, *flags.split())
    monkeypatch.setattr(checkpoints.Training, "save", lambda _: None)
    train_cgn.train_imagenet(args, CPU)

    assert rates == [[0.1, 0.2, 0.3]] * 3
    cgn, average = networks
    for network in networks:
        backends = {m.kernels for m in network.modules() if hasattr(m, "kernels")}
        assert backends == {"eager"}
    assert [call[:2] for call in decays] == [(average, cgn)] * 3
    assert [call[2] for call in decays] == pytest.approx([0.1, 0.15, 0.15])
    assert [call[0] for call, _ in iterations] == [cgn] * 3
    assert folded[0][0] == (cgn.biggan_GT, 0.5)
    assert [call[:2] for call, _ in derived if call[0] is cgn] == [(cgn, 0.5)] * 3
    assert len({z.sum().item() for z, _, _ in batches}) == 6
    assert max(z.abs().max() for z, _, _ in batches) <= 1  # two, truncated to a half
    assert {label for _, y, _ in batches for label in y.tolist()} == {5, 7}
    lines = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    assert [line["binary"] for line in lines] == [0.5, 2.5, 4.5]


def test_the_moving_average_copies_singular_vectors():
    """Their mean would be none."""
    names = ("weight_orig", "weight_u", "weight_v")
    average, network = torch.nn.Module(), torch.nn.Module()
    for value, module in ((0.0, average), (1.0, network)):
        for name in names:
            module.register_buffer(name, torch.full((2,), value))
    train_cgn.update_average(average, network, 0.75)
    assert [average.get_buffer(name)[0].item() for name in names] == [0.25, 1, 1]


def test_losses_of_imagenet_have_their_own_weights_and_targets():
    torch.manual_seed(0)
    args = types.SimpleNamespace(
        reconstruction_weight=2.0,
        binary_weight=3.0,
        mask_weight=5.0,
        background_weight=7.0,
        style_weights=[0.1, 0.0, 0.0, 0.0],
        texture_weights=[0.2, 0.0, 0.0, 0.0],
        kernels="eager",
    )
    vgg = weights.VGG16Features(weights.random_vgg16_features(2))
    mask = torch.rand(2, 1, 64, 64) * 0.05
    foreground, background, x_gt = torch.rand(3, 2, 3, 64, 64) * 2 - 1
    saliency = torch.rand(2, 1, 64, 64)
    windows = torch.arange(36).repeat(2, 1)
    outputs = (None, mask, foreground, background, saliency)
    found, mask_mean = train_cgn.imagenet_losses(args, vgg, outputs, x_gt, windows)
    composed = composite_losses(mask, foreground, background, x_gt)
    patches = train_cgn.sample_patch_images(x_gt, mask, windows, backend="eager")

    def style(image, target, layer_weights):
        return train_cgn.perceptual_loss(vgg, image, target, layer_weights, "eager")

    expected = {
        "reconstruction": 2 * composed.l1,
        "binary": 3 * composed.binary,
        "mask": 5 * composed.mask_interval,
        "background": 7 * saliency.mean(),
        "style": style(composed.composite, x_gt, args.style_weights),
        "texture": style(foreground, patches, args.texture_weights),
    }
    assert_close(found, expected)
    assert all(value > 0 for value in found.values())
    assert_close(mask_mean, composed.mask_mean)


def test_targets_and_mechanisms_have_their_latents_and_classes(random_cgn, monkeypatch):
    seen = []

    def losses(args, vgg, outputs, x_gt, windows):
        seen.append((outputs, x_gt))
        return {"one": sum(x.sum() for x in outputs)}, torch.ones(2)

    monkeypatch.setattr(train_cgn, "imagenet_losses", losses)
    cgn = train_cgn.ImageNetCGN(True, **train_cgn.SMALL).train()
    cgn.load_state_dict(random_cgn.state_dict(), strict=False)
    cgn.biggan_GT.load_state_dict(cgn.f_shape.state_dict())
    train_cgn.derive(cgn, 1.0)
    z, y = torch.randn(2, 32), torch.tensor([3, 900])
    args = types.SimpleNamespace(accumulate=1)
    train_cgn.imagenet_batch(args, cgn, None, False, z, y, None)
    ((premask, *_), x_gt) = seen[0]
    assert_close(premask, x_gt)  # as the two networks are alike

    y = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.no_grad():
        premask, mask, foreground, background, saliency = cgn(z, y)
        for image, part, classes in (
            (premask, cgn.f_shape, y[:, 0]),
            (foreground, cgn.f_text, y[:, 1]),
            (background, cgn.f_bg, y[:, 2]),
        ):
            assert_close(image, part(z, classes))
        assert_close(mask, cgn.u2net(premask).clamp(1e-4, 1 - 1e-4))
        assert_close(saliency, cgn.u2net(background))


# --------------------------------------------------------------------------------------------------
# Counterfactuals of MNIST


class Painter(torch.nn.Module):
    """A generator whose foreground and background have the gray of their class: 0.2 for class 2.

    The mask is 1 in the upper half for even classes, in the lower half for odd ones.
    """

    size, z_dim, names = 32, 32, list("0123456789")

    def __init__(self):
        super().__init__()
        self.label_emb = torch.nn.Embedding(10, 10)

    def mask(self, z, y):
        upper = torch.arange(32)[:, None] < 16
        rows = upper == (y % 2 == 0)[:, None, None, None]
        return rows.expand(-1, 1, 32, 32).float()

    def foreground(self, z, y):
        return y.view(-1, 1, 1, 1).expand(-1, 3, 32, 32) / 10

    def background(self, z, y):
        return -self.foreground(z, y)


def test_labels_are_the_classes_that_are_seen():
    """Of shape, texture and background, also where masks serve for several images."""
    settings = generate.Settings(0, 3, 0.0, False, "")
    images, labels = generate.generate_batch(Painter(), settings, 10, 100, CPU)
    values = (to_float(images).mean(1) * 10).round()  # (90, 32, 32)
    odd = labels[:, 0] % 2 == 1
    upper, lower = values[:, 5, 5], values[:, 25, 25]
    assert torch.equal(torch.where(odd, lower, upper), labels[:, 1].float())
    assert torch.equal(torch.where(odd, upper, lower), -labels[:, 2].float())
    assert (labels[:, 1] != labels[:, 2]).any()


class Ramp(Painter):
    """Its textures are red at the top and green at the left, and never clipped."""

    def foreground(self, z, y):
        ramp = torch.linspace(-0.1, 0.1, 32)
        red, green = ramp[:, None].expand(32, 32), ramp.expand(32, 32)
        return torch.stack([red, green, 0 * red]).repeat(len(y), 1, 1, 1)


def test_textures_are_shuffled_mixed_and_shifted():
    plain, latents = Ramp().foreground(None, torch.zeros(5)), None
    latents = generate.sample_latents(Ramp(), 0, generate.TEXTURE, 0, 5)
    settings = generate.Settings(0, 1, 0.02, False, "", mix=0.1)
    found, _ = generate.generate_texture(
        Ramp(), Ramp().foreground, settings, generate.TEXTURE, 0, 5
    )
    for index in range(5):
        down, right = latents.offset[index].tolist()
        rolled = plain[index].roll((-down, -right), (1, 2))
        matrix = torch.eye(3) + 0.1 * latents.mix[index]
        mixed = (matrix @ rolled.flatten(1)).view(3, 32, 32)
        assert_close(found[index], mixed + 2 * 0.02 * latents.shift[index][:, None, None])


def test_factual_images_are_neither_mixed_nor_shifted(untrained, tmp_path, monkeypatch):
    made = noting(monkeypatch, generate, "generate_batch")
    flags = ["--weights", untrained, "--n", 3, "--device", "cpu", "--factual"]
    generate.generate_mnist(parsed(generate, tmp_path / "out", *flags), CPU)
    settings = made[0][0][1]
    assert settings.factual and settings.per_shape == 1
    assert settings.jitter == settings.mix == 0


def test_real_shapes_without_an_object_are_left_out_with_their_labels(monkeypatch):
    images = torch.zeros(6, 3, 32, 32, dtype=torch.uint8)
    images[[0, 2, 5], :, 10:20, 10:20] = torch.tensor([50, 150, 250]).byte().view(3, 1, 1, 1)

    class Data:
        held_out = 0
        labels = torch.arange(6) + 3

        def __len__(self):
            return 6

        def all_images(self, seed):
            return images

    monkeypatch.setattr(generate, "load_biased_images", lambda *_: Data())
    monkeypatch.setattr(train_cgn, "load_segmenter", lambda _: torch.nn.Identity())
    monkeypatch.setattr(train_cgn, "find_masks", lambda _, part: 255 * (part[:, :1] > 0).byte())
    args = types.SimpleNamespace(dataset="colored_mnist", textures=None, seed=0, n=9, per_shape=1)
    real = generate.find_real_shapes(args, "weights.pt", {}, CPU)
    assert real.labels.tolist() == [3, 5, 8] and real.left_out == 3
    assert real.images[:, 0, 15, 15].tolist() == [50, 150, 250]
    assert (real.masks[:, 0, 15, 15] == 255).all() and len(real.masks) == 3


def test_pictures_of_a_later_chunk_have_later_numbers(tmp_path):
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    generate.write_png_files(tmp_path, 2000, images)
    files = sorted(file.name for file in (tmp_path / "counterfactual").iterdir())
    assert files == ["0002000.png", "0002001.png"]


# --------------------------------------------------------------------------------------------------
# Counterfactuals of ImageNet


def test_each_part_of_a_picture_has_the_class_of_its_mechanism(random_cgn):
    """Latents are truncated, a composite has the shape's class everywhere."""
    cgn = random_cgn
    train_cgn.derive(cgn, 0.5)
    z, y = torch.randn(2, 32), torch.tensor([[1, 200, 300], [400, 500, 600]])
    found = generate.imagenet_images(cgn, z, y, 0.5, generate.PARTS)
    shape, texture, background = y.unbind(1)
    with torch.no_grad():
        premask = cgn.f_shape(z / 2, shape)
        mask = cgn.u2net(premask).clamp(1e-4, 1 - 1e-4)
        expected = {
            "premask": premask,
            "mask": 2 * mask - 1,
            "foreground": cgn.f_text(z / 2, texture),
            "background": cgn.f_bg(z / 2, background),
            "composite": mask * cgn.f_text(z / 2, shape) + (1 - mask) * cgn.f_bg(z / 2, shape),
        }
        front, back = expected["foreground"], expected["background"]
        expected["counterfactual"] = mask * front + (1 - mask) * back
    for part in generate.PARTS:
        difference = found[part].float() - (expected[part] + 1) * 127.5
        assert difference.abs().max() < 0.6, part
        assert found[part].float().std() > 1


def test_an_interpolation_moves_the_mechanisms_that_it_should(weights_file, tmp_path, monkeypatch):
    """A tour moves texture, background and shape one after the other, and does not go back."""
    positions = []

    def draw(cgn, z, between, *rest):
        positions.append(between[0])
        return {"counterfactual": torch.zeros(1, 3, 64, 64, dtype=torch.uint8)}

    monkeypatch.setattr(generate, "imagenet_images", draw)
    flags = ["--dataset", "imagenet", "--weights", weights_file, "--frames", 2, "--amp", "off"]
    flags += ["--shape", 1, "--texture", 2, "--background", 3, "--to", 4]
    for name in ("texture", "tour"):
        args = parsed(generate, tmp_path / name, *flags, "--interpolate", name)
        generate.generate_imagenet(args, CPU)
    cgn, _ = train_cgn.load_imagenet_generator(weights_file)

    def vectors(*classes):
        return generate.class_vectors(cgn, torch.tensor([classes]))[0]

    texture, tour = positions[:2], positions[2:]
    assert_close(torch.stack(texture), torch.stack([vectors(1, 2, 3), vectors(1, 4, 3)]))
    ends = [(1, 2, 3), (1, 4, 3), (1, 4, 3), (1, 4, 4), (1, 4, 4), (4, 4, 4)]
    assert_close(torch.stack(tour), torch.stack([vectors(*classes) for classes in ends]))


def test_the_truncation_of_pictures_is_that_of_the_norms(weights_file, tmp_path, monkeypatch):
    folded = noting(monkeypatch, train_cgn, "fold")
    monkeypatch.setattr(generate, "write_parts_sheet", lambda *_: None)
    flags = ["--dataset", "imagenet", "--weights", weights_file, "--truncation", 0.3]
    generate.generate_imagenet(parsed(generate, tmp_path / "out", *flags), CPU)
    assert folded[0][0][1] == 0.3


def test_raw_weights_of_imagenet_are_the_trained_ones(weights_file):
    content = load(weights_file)
    for raw, part in ((False, "average"), (True, "generator")):
        cgn, _ = train_cgn.load_imagenet_generator(weights_file, raw)
        name = "f_text.generator.gen_z.weight_orig"
        assert torch.equal(cgn.state_dict()[name], content[part][name])
    assert not torch.equal(content["average"][name], content["generator"][name])


def test_each_mechanism_draws_from_its_own_classes(tmp_path):
    best = imagenet.imagenet_metadata()["best_classes"]
    own = [best[name] for name in imagenet.HEADS]
    assert own[0] != own[1] != own[2] != own[0]
    for words, expected in (
        ("", [list(range(1000))] * 3),
        ("--mode best", own),
        ("--mode best --texture 5", [own[0], [5], own[2]]),
        ("--classes 3 4 --background 6", [[3, 4], [3, 4], [6]]),
    ):
        flags = ["--dataset", "imagenet", *words.split()]
        assert generate.allowed_classes(parsed(generate, tmp_path, *flags)) == expected


# --------------------------------------------------------------------------------------------------
# The classifier of digits


def fill_(network, value):
    """Set all parameters of a network."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(value)


def test_what_each_step_of_the_digit_classifier_is_given(few_digits, tmp_path, monkeypatch):
    """Its rate, its images and its noise; the best weights are those of the best biased epoch."""
    found = []
    measured = iter(
        [
            {"biased": 10.0, "decorrelated": 90.0},
            {"biased": 30.0, "decorrelated": 20.0},
            {"biased": 20.0, "decorrelated": 95.0},
        ]
    )

    def step(args, training, bf16, images, labels):
        classifier = training.networks["classifier"]
        assert classifier.training
        (group,) = training.optimizers[0].param_groups
        optimized = {id(p) for p in group["params"]}
        for network in training.networks.values():
            assert {id(p) for p in network.parameters()} <= optimized
        found.append((*rates_of(*training.optimizers), images, torch.rand(()).item()))
        fill_(classifier, len(found))
        training.extra["sums"] += torch.tensor([2 * len(found), 1, 2])  # the loss: len(found)
        return {"loss": torch.zeros(()), **NO_LOSS}

    def measure(classifier, data):
        classifier.eval()
        return next(measured)

    monkeypatch.setattr(train_classifier, "classifier_step", step)
    monkeypatch.setattr(train_classifier, "measure_digits", measure)
    flags = "--dataset colored_mnist --device cpu --batch-size 40 --lr 1 --gamma 0.5 --epochs 3"
    flags = [*flags.split(), "--data-dir", few_digits]
    out = tmp_path / "run"
    train_classifier.classify_digits(parsed(train_classifier, out, *flags), CPU)

    rates, images, noise = zip(*found)
    assert rates == (1.0,) * 3 + (0.5,) * 3 + (0.25,) * 3
    assert len(set(noise)) == 9
    epochs = [torch.cat(images[first : first + 3]).flatten(1) for first in (0, 3, 6)]
    assert len(epochs[0].unique(dim=0)) == 96
    for other in epochs[1:]:
        assert not torch.equal(other, epochs[0])
        assert torch.equal(other.unique(dim=0), epochs[0].unique(dim=0))
    folder = out / "seed_0"
    assert (load(folder / "weights_best.pt")["cls.0.bias"] == 6).all()
    assert (load(folder / "weights.pt")["cls.0.bias"] == 9).all()
    lines = [json.loads(line) for line in open(folder / "log.jsonl")]
    lines = [line for line in lines if "epoch" in line]
    assert [line["loss"] for line in lines] == [2, 5, 8]
    assert [line["train"] for line in lines] == [50] * 3


def test_digit_classifiers_of_two_seeds_start_from_other_weights(few_digits, tmp_path, monkeypatch):
    starts = []

    def step(args, training, bf16, images, labels):
        starts.append(training.networks["classifier"].cls[0].weight.clone())
        training.extra["sums"] += 1
        return {"loss": torch.zeros(()), **NO_LOSS}

    monkeypatch.setattr(train_classifier, "classifier_step", step)
    flags = ["--dataset", "colored_mnist", "--data-dir", few_digits, "--device", "cpu"]
    flags += ["--max-steps", 1, "--seeds", 3, 4]
    train_classifier.classify_digits(parsed(train_classifier, tmp_path / "run", *flags), CPU)
    assert len(starts) == 2 and not torch.equal(*starts)


def test_a_metric_that_one_seed_lacks_is_that_of_the_others(tmp_path):
    """It was trained before there was the metric, and is not trained again when resumed."""
    flags = ["--dataset", "colored_mnist"]
    args = parsed(train_classifier, tmp_path / "run", *flags)
    results = {0: {"train": 1.0, "new": 4.0}, 1: {"train": 2.0}}
    train_classifier.summarize(args, results)
    summary = json.loads((tmp_path / "run" / "results.json").read_text())["summary"]
    assert summary["train"]["mean"] == 1.5 and summary["new"]["mean"] == 4


@pytest.mark.parametrize("method", ["plain", "irm", "lnl"])
def test_a_step_of_the_digit_classifier_has_the_loss_of_its_method(method, monkeypatch):
    """Of images that were turned, and for irm mixed; sums are of losses, hits and images."""
    torch.manual_seed(0)
    turned = noting(monkeypatch, train_classifier, "random_affine")
    mixed = noting(monkeypatch, train_classifier, "mix_colors")
    classifier = train_classifier.MnistClassifier().eval()
    head = train_classifier.ColorHead()
    before = {}
    for network in (classifier, head):
        before |= {id(network): {k: v.clone() for k, v in network.state_dict().items()}}
    optimizer = torch.optim.Adadelta([*classifier.parameters(), *head.parameters()])
    training = types.SimpleNamespace(
        networks={"classifier": classifier, "color_head": head},
        optimizers=[optimizer],
        extra={"sums": torch.zeros(3)},
    )
    args = types.SimpleNamespace(augment=0.5, method=method, environments=2, penalty=3.0)
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(8)
    loss = train_classifier.classifier_step(args, training, False, images, labels)["loss"]

    for network in (classifier, head):
        network.load_state_dict(before[id(network)])
    ((given, strength), x) = turned[0]
    assert strength == 0.5 and torch.equal(given, to_float(images))
    if method == "irm":
        ((given, count), (mixed_x, environment)) = mixed[0]
        assert given is x and count == 2
        x = mixed_x
    answers = classifier(x)
    expected = F.nll_loss(answers, labels)
    if method == "irm":
        penalty = train_classifier.invariance_penalty(answers, labels, environment, 2)
        expected = expected + 3 * penalty
    elif method == "lnl":
        expected = expected + head.loss(classifier.features(x), x, 3.0)
    assert_close(loss, expected.detach())
    hits = (answers.argmax(1) == labels).sum()
    assert_close(training.extra["sums"], torch.stack([8 * loss, hits.float(), torch.tensor(8.0)]))


def test_digit_classifiers_are_tested_in_eval_mode_on_images_as_they_are():
    seen = []

    class Seeing(torch.nn.Module):
        def forward(self, x):
            seen.append((self.training, x))
            return x[:, :, 0, 0]

    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    train_classifier.predict_classes(Seeing().train(), images)
    ((training, x),) = seen
    assert not training and torch.equal(x, to_float(images))


def test_given_digit_weights_are_evaluated_on_what_was_held_out(few_digits, tmp_path, monkeypatch):
    """The biased test images are the last of the training images."""
    classifier = train_classifier.MnistClassifier()
    torch.save(classifier.state_dict(), tmp_path / "weights.pt")
    measured = noting(monkeypatch, train_classifier, "measure_digits")
    flags = ["--dataset", "colored_mnist", "--data-dir", few_digits, "--evaluate"]
    flags += ["--weights", tmp_path / "weights.pt"]
    train_classifier.classify_digits(parsed(train_classifier, tmp_path / "run", *flags), CPU)
    (found, data), _ = measured[0]
    for name, value in classifier.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    held_out = data.original.held_out
    images, labels = data.test_sets["biased"]
    assert len(labels) == held_out < len(data.original)
    assert torch.equal(labels, data.original.labels[-held_out:])
    assert torch.equal(images, data.original.all_images(0)[-held_out:])


@pytest.mark.parametrize("factor", [0, 1, 2])
def test_which_factor_a_digit_classifier_follows(factor, monkeypatch, tmp_path):
    labels = torch.tensor([[0, 1, 2], [3, 4, 5]])
    monkeypatch.setattr(train_classifier, "predict_classes", lambda *_: labels[:, factor])
    data = types.SimpleNamespace(counterfactual=(None, labels))
    shares = train_classifier.measure_factors(None, data, tmp_path)
    name = f"follows {train_classifier.FACTORS[factor]}"
    assert shares[name] == 100 and sum(shares.values()) == 100


# --------------------------------------------------------------------------------------------------
# The ensemble


class Heads(torch.nn.Module):
    """The same logits for every image; notes its mode and noise."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(3, 1000))
        self.seen = []

    def forward(self, x):
        self.seen.append((self.training, torch.rand(()).item()))
        return self.logits.expand(len(x), 3, 1000)


def test_what_each_step_of_the_ensemble_does(tmp_path, monkeypatch):
    """Rates and decay of weights; the best weights are those of the best epoch on val."""
    ensemble = Heads()
    accuracies = iter([50.0, 70.0, 60.0, 65.0])
    found = []

    def evaluate(model, *rest):
        model.eval()
        share = next(accuracies)
        others = [("counterfactual", "shape", "top-1", 100 - share, 1, 1)]
        return [("val", "mean", "top-1", share, 1, 1), *others]

    def finite_step(optimizer, loss):
        (group,) = optimizer.param_groups
        found.append((group["lr"], group["momentum"], group["weight_decay"]))
        fill_(ensemble, len(found))
        return torch.tensor(float(len(found) == 1))  # the first one is skipped

    def batches(args, real, counterfactual, epoch, steps, first, device):
        images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        for step in range(first, steps):
            loss.fill_(10 * epoch + step)
            yield [(images, torch.zeros(2, dtype=torch.int64))]

    loss = torch.zeros((), requires_grad=False)
    monkeypatch.setattr(train_classifier, "evaluate", evaluate)
    monkeypatch.setattr(train_classifier, "epoch_batches", batches)
    monkeypatch.setattr(checkpoints, "finite_step", finite_step)
    monkeypatch.setattr(
        train_classifier, "ensemble_loss", lambda logits, *_: logits.sum() * 0 + loss.clone()
    )
    flags = "--dataset imagenet --data-dir x --batch-size 2 --epochs 4 --lr 0.5 --lr-step 2"
    flags += " --weight-decay 0.25 --amp off"
    args = parsed(train_classifier, tmp_path / "run", *flags.split())
    real = (["image"] * 6, torch.zeros(6, dtype=torch.int64))
    train_classifier.train_ensemble(args, ensemble, {}, real, None, CPU)

    rates, momenta, decays = zip(*found)
    assert rates == pytest.approx([0.5] * 6 + [0.05] * 6)
    assert set(momenta) == {0.9} and set(decays) == {0.25}
    modes, noise = zip(*ensemble.seen)
    assert all(modes) and len(set(noise)) == 12
    content = load(tmp_path / "run" / "weights_best.pt")
    assert content["step"] == 6 and (content["ensemble"]["logits"] == 6).all()
    assert load(tmp_path / "run" / "weights.pt")["step"] == 12
    lines = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    means = [line["epoch_loss"] for line in lines if "epoch" in line]
    assert means == pytest.approx([1.5, 11, 21, 31])  # 1 and 2; 10, 11 and 12; ...


def test_images_to_train_on_are_cropped_anew_in_each_epoch(monkeypatch):
    found = []

    def transform(*settings, **kinds):
        return settings, kinds

    def batches(images, order, batch_size, workers, device):
        found.append((images, order, batch_size))
        return []

    monkeypatch.setattr(imagenet, "make_transform", transform)
    monkeypatch.setattr(imagenet, "batches", batches)
    args = types.SimpleNamespace(image_size=32, batch_size=4, cf_ratio=1.0, seed=3, workers=0)
    real = list("abcdefgh"), torch.arange(8)
    train_classifier.epoch_batches(args, real, real, 5, 2, 0, CPU)
    for images, _, batch_size in found:
        assert images.transform == ((True, 32), {})
        assert images.epoch == 5 and images.replace and batch_size == 4
    (first, order, _), (second, other, _) = found
    assert first.seed != second.seed and order != other


def test_only_val_may_be_called_by_any_class(monkeypatch):
    """In other sets predictions are restricted to the classes that are there."""
    restricted = {}

    def count_hits(model, heads, kind, test, hits, args, device):
        present = hits.keywords["present"]
        restricted[kind] = None if present is None else present.tolist()
        return [[0, 0]], 1

    monkeypatch.setattr(train_classifier, "count_hits", count_hits)
    tests = {kind: (kind, (["a"] * 3, torch.tensor([7, 5, 7]))) for kind in ("val", "ood")}
    model = torch.nn.Dropout().train()
    train_classifier.evaluate(model, ["baseline"], tests, None, CPU)
    assert restricted == {"val": None, "ood": [5, 7]} and not model.training
