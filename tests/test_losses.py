"""Composite, losses and generator against numbers of the published code, formulas and gradients."""

import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, fixture_files, folder_from
from torch.testing import assert_close

import generate
import train_cgn
from data import weights
from kernels import (
    InstanceNorm2d,
    PaddedConv2d,
    StyleLoss,
    UpsampleConv2d,
    attention,
    composite_losses,
    eager,
    enlarge,
    gram_matrix,
    shuffle_patches,
    style_loss,
)

# --------------------------------------------------------------------------------------------------
# Against the published code

STYLES = {
    "style_imagenet_4444": [4, 4, 4, 4],
    "style_text_0550": [0, 5, 5, 0],
    "style_colored": [0.05, 0.1, 0.01, 0.0],
    "style_double": [0.0, 0.05, 0.0, 0.05],
    "style_wildlife": [0.01, 0.05, 0.0, 0.01],
}
MECHANISMS = ("mask", "foreground", "background")


def fixture_loss(name, inputs, x_gt, backend):
    """The weighted loss that a fixture file calls `name`. inputs: the mechanisms' outputs."""
    mask, foreground, background = inputs
    if name in STYLES:
        folder = folder_from("CGN_WEIGHTS")
        if folder is None:
            pytest.skip("CGN_WEIGHTS names no folder with VGG-16 weights")
        vgg = weights.VGG16Features(weights.load_vgg16_features(folder, 10)).to(x_gt.device)
        composed = composite_losses(mask, foreground, background, backend=backend)
        return train_cgn.perceptual_loss(vgg, composed.composite, x_gt, STYLES[name], backend)
    if name == "mask_low_w500":
        mask = 0.05 * mask
    composed = composite_losses(mask, foreground, background, x_gt, backend=backend)
    losses = {
        "l1_w100": 100 * composed.l1,
        "binary_w300": 300 * composed.binary,
        "mask_w500": 500 * composed.mask_interval,
        "mask_low_w500": 500 * composed.mask_interval,
        "bg_w2000": 2000 * composed.mask_mean.mean(),
    }
    return losses[name]


def check_gradients(loss_name, leaves, expected):
    """Compare the gradients of the leaves with those of a fixture file; None means none."""
    for name, leaf in leaves.items():
        known = expected[f"grad_{name}"]
        where = f"{loss_name}, gradient of {name}"
        if known is None:
            assert leaf.grad is None or not leaf.grad.any(), where
            continue
        tolerance = 1e-3 * known.abs().max().item() + 1e-12
        difference = (leaf.grad - known).abs().max().item()
        assert difference <= tolerance, f"{where}: off by {difference}"


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("file", fixture_files("losses_*.pt"))
def test_losses_match_the_published_ones(file, backend):
    if backend == "triton" and eager.gram is None:
        pytest.skip("triton is not installed")
    on_gpu = backend == "triton" and torch.cuda.is_available()
    if backend == "triton" and not on_gpu and file and "64" in file.name:
        pytest.skip("in the interpreter, 32 x 32 says as much")

    content = torch.load(file, weights_only=True, map_location="cuda" if on_gpu else "cpu")
    inputs = {name: content[name] for name in MECHANISMS}
    composite = composite_losses(*inputs.values()).composite
    assert_close(composite, content["composite"], rtol=1e-4, atol=1e-6)

    losses = content["losses"]
    if backend == "triton" and not on_gpu:  # one style loss has all layers, and takes 9 s there
        losses = {
            name: losses[name] for name in losses.keys() - STYLES.keys() | {"style_imagenet_4444"}
        }
    for name, expected in losses.items():
        leaves = {key: value.clone().requires_grad_() for key, value in inputs.items()}
        loss = fixture_loss(name, leaves.values(), content["x_gt"], backend)
        known = torch.as_tensor(expected["value"]).to(loss)
        assert_close(loss.detach(), known, rtol=1e-4, atol=1e-7, msg=lambda text: f"{name}: {text}")
        if loss.requires_grad:
            loss.backward()
        check_gradients(name, leaves, expected)


@pytest.mark.parametrize("file", fixture_files("mnist_cgn_*.pt"))
def test_published_generator_reproduces_its_outputs(file):
    variant = file.stem.removeprefix("mnist_cgn_")
    folder = folder_from("CGN_WEIGHTS")
    path = folder and folder / f"authors_cgn_{variant}_mnist.pth"
    if not path or not path.is_file():
        pytest.skip(f"no {path and path.name} in CGN_WEIGHTS={folder}")
    content = torch.load(file, weights_only=True)
    cgn, args = train_cgn.load_generator(path)
    with torch.no_grad():
        outputs = cgn(content["z"], content["y"])
    assert args == {}
    for output, name in zip(outputs, ("mask", "texture_foreground", "texture_background")):
        # The images have a range of 2.
        assert_close(output, content[name], rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Composite and style loss against their formulas


def test_a_generator_in_bf16_draws_nearly_the_same():
    """But for the edges of a few masks."""
    cgn, _ = train_cgn.load_generator(ROOT / "data" / "pretrained" / "wildlife_mnist.pt")
    settings = generate.Settings(0, 1, 0.05, False, "")
    cpu = torch.device("cpu")
    images, labels = generate.generate_batch(cgn, settings, 0, 100, cpu)
    rounded, same_labels = generate.generate_batch(cgn.bfloat16(), settings, 0, 100, cpu)
    assert torch.equal(labels, same_labels)
    distance = (rounded.int() - images.int()).abs()
    assert (distance > 1).float().mean() < 0.05 and 0 < distance.float().mean() < 0.5


def test_composite_is_the_formula_term_by_term():
    torch.manual_seed(0)
    mask = torch.rand(3, 1, 5, 7, dtype=torch.float64).clamp(1e-4, 1 - 1e-4)
    mask[0] = 0.01  # outside the interval, as the next one
    mask[1] = 0.97
    foreground, background, target = torch.rand(3, 3, 3, 5, 7, dtype=torch.float64) * 2 - 1
    losses = composite_losses(mask, foreground, background, target)

    composite = mask * foreground + (1 - mask) * background
    assert_close(losses.composite, composite)
    assert_close(losses.l1, (composite - target).abs().mean())
    entropy = -mask * mask.log2() - (1 - mask) * (1 - mask).log2()
    assert_close(losses.binary, entropy.mean())

    means = [image.mean().item() for image in mask]
    distance = sum(max(0, 0.1 - mean) + max(0, mean - 0.9) for mean in means) / 3
    assert losses.mask_mean.tolist() == pytest.approx(means)
    assert losses.mask_interval.item() == pytest.approx(distance)
    assert distance > 0.05
    assert composite_losses(mask, foreground, background).l1 is None


def test_gradients_in_float64():
    torch.manual_seed(0)
    mask = torch.rand(2, 1, 4, 3, dtype=torch.float64).clamp(0.05, 0.95).requires_grad_()
    images = torch.randn(2, 2, 3, 4, 3, dtype=torch.float64).requires_grad_()
    target = torch.randn(2, 3, 4, 3, dtype=torch.float64)

    def composite(mask, images):
        return tuple(composite_losses(mask, *images, target, mask_interval=(0.45, 0.46)))

    assert torch.autograd.gradcheck(composite, (mask, images))

    features = torch.randn(2, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    gram = gram_matrix(torch.randn(2, 5, 4, 3, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x: StyleLoss.apply(x, gram), (features,))


def test_style_loss_is_the_formula_and_takes_a_gram_matrix():
    torch.manual_seed(0)
    a, b = torch.randn(2, 2, 6, 5, 4)
    grams = []
    for features in (a, b):
        flat = features.reshape(2, 6, 20)
        grams.append(torch.einsum("nip,njp->nij", flat, flat) / (6 * 5 * 4))
    expected = (grams[0] - grams[1]).abs().mean()
    assert_close(style_loss(a, b), expected)
    assert_close(style_loss(a, grams[1]), expected)
    half = style_loss(a.bfloat16(), b.bfloat16())
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_style_loss_in_half_precision_has_the_gradient_of_float64(dtype):
    """Features so large and so many that a sum over channels in float16 would be infinite."""
    torch.manual_seed(0)
    features = (1000 + torch.rand(1, 96, 4, 4)).to(dtype).requires_grad_()
    target = torch.zeros(1, 96, 96)
    (2e5 * style_loss(features, target)).backward()
    exact = features.detach().double().requires_grad_()
    (2e5 * style_loss(exact, target.double())).backward()
    assert_close(features.grad.double(), exact.grad, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_features_stop_at_the_last_layer_with_a_weight():
    torch.manual_seed(0)
    state = {}
    for index, (inputs, outputs) in enumerate([(3, 4), (4, 4), (4, 6), (6, 6)]):
        state[f"{index}.weight"] = torch.randn(outputs, inputs, 3, 3)
        state[f"{index}.bias"] = torch.zeros(outputs)
    vgg = weights.VGG16Features(state)
    features = vgg(torch.rand(2, 3, 16, 16))
    assert [tuple(x.shape) for x in features] == [(2, 4, 16, 16), (2, 6, 8, 8)]
    assert all((x >= 0).all() for x in features)
    assert not any(parameter.requires_grad for parameter in vgg.parameters())


# --------------------------------------------------------------------------------------------------
# Layers


@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_upsampling_convolution_equals_upsampling_then_convolution(padding):
    torch.manual_seed(0)
    layer = UpsampleConv2d(5, 4, 3, padding=1, padding_mode=padding).double()
    convolution = nn.Conv2d(5, 4, 3, padding=1, padding_mode=padding).double()
    convolution.load_state_dict(layer.state_dict())
    for height, width in ((1, 2), (6, 3)):
        x = torch.randn(2, 5, height, width, dtype=torch.float64, requires_grad=True)
        upsampled = F.interpolate(x, scale_factor=2, mode="nearest")
        assert_close(layer(x), convolution(upsampled))

        weight = torch.randn(2, 4, 2 * height, 2 * width, dtype=torch.float64)
        gradients = torch.autograd.grad(layer(x), (x, *layer.parameters()), weight)
        inputs = (x, *convolution.parameters())
        expected = torch.autograd.grad(convolution(upsampled), inputs, weight)
        for gradient, other in zip(gradients, expected):
            assert_close(gradient, other)


def test_circular_layers_keep_channels_last():
    """In any other layout the norms and activations between them take several times as long."""
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    convolution = PaddedConv2d(4, 4, 3, padding=1, padding_mode="circular")
    upsampling = UpsampleConv2d(4, 4, 3, padding=1, padding_mode="circular")
    layouts = []

    def note(tensor):
        layouts.append(tensor.is_contiguous(memory_format=torch.channels_last))

    for layer in (convolution, upsampling):
        h = x * 1
        h.register_hook(note)
        y = layer(h)
        note(y)
        y.backward(torch.ones_like(y))
    assert layouts == [True] * 4


def test_gradients_become_channels_last_again():
    """Behind what is contiguous, the derivatives of channels-last layers would be slow on a CPU."""
    offsets = torch.zeros(2, 2, dtype=torch.int64)
    functions = {
        "norm": InstanceNorm2d(4),
        "shuffling": lambda x: shuffle_patches(x, offsets),
        "enlargement": lambda x: enlarge(x, (12, 12)),
    }
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    layouts = {}
    for name, function in functions.items():

        def note(gradient, name=name):
            layouts[name] = gradient.is_contiguous(memory_format=torch.channels_last)

        h = x * 1
        h.register_hook(note)
        y = function(h)
        y.backward(torch.ones(y.shape))
    assert layouts == dict.fromkeys(functions, True)


@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_padded_convolution_and_its_gradients_are_pytorchs(padding):
    torch.manual_seed(0)
    layer = PaddedConv2d(3, 4, 3, padding=1, padding_mode=padding).double()
    plain = nn.Conv2d(3, 4, 3, padding=1, padding_mode=padding).double()
    plain.load_state_dict(layer.state_dict())
    for height, width in ((1, 2), (5, 4)):
        x = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(2, 4, height, width, dtype=torch.float64)
        assert_close(layer(x), plain(x))
        (gradient,) = torch.autograd.grad((layer(x) * weight).sum(), x)
        (expected,) = torch.autograd.grad((plain(x) * weight).sum(), x)
        assert_close(gradient, expected)


@pytest.mark.parametrize("size", [32, 64])
def test_circular_padding_leaves_no_seam(size):
    """A cyclic shift of a texture's first activations shifts the texture, borders and all."""
    torch.manual_seed(0)
    _, _, *layers = train_cgn.texture_mechanism(4, size, "circular").double()
    h = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    texture = nn.Sequential(*layers)
    step = size // 8
    expected = texture(h).roll((3 * step, 2 * step), (2, 3))
    assert_close(texture(h.roll((3, 2), (2, 3))), expected)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_attention_and_its_gradients_are_the_formula(dtype, tolerance):
    """Logits of some 100, which bfloat16 would round by up to 0.25, as autocast does elsewhere."""
    torch.manual_seed(0)
    query = 10 * torch.rand(3, 9, 4)
    key = 10 * torch.rand(3, 5, 4)
    value = torch.randn(3, 5, 7)
    parts = [part.to(dtype).requires_grad_() for part in (query, key, value)]
    exact = [part.detach().double().requires_grad_() for part in parts]
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(*parts)
    expected = (exact[0] @ exact[1].transpose(1, 2)).softmax(2) @ exact[2]
    weights = torch.randn(3, 9, 7).to(dtype)
    found_gradients = torch.autograd.grad(found, parts, weights)
    expected_gradients = torch.autograd.grad(expected, exact, weights.double())
    for one, other in zip((found, *found_gradients), (expected, *expected_gradients)):
        assert one.dtype == dtype
        assert (one - other).abs().max() < tolerance * other.abs().max()


def test_shuffling_rolls_each_image_by_its_own_offsets():
    images = torch.arange(2 * 3 * 32 * 32).view(2, 3, 32, 32).float().requires_grad_()
    shuffled = shuffle_patches(images, torch.tensor([[5, 31], [0, 7]]))
    assert_close(shuffled[0], images[0].roll((-5, -31), (1, 2)))
    assert_close(shuffled[1], images[1].roll((0, -7), (1, 2)))
    shuffled.sum().backward()
    assert (images.grad == 1).all()


@pytest.mark.parametrize("gain", [1, 2])
def test_large_objects_are_opaque_with_a_mask_gain(gain):
    """The last norm of the shape mechanism gives a mask the mean 0 and the variance 1."""
    share = 0.6
    premask = torch.zeros(1, 1, 40, 40)
    premask[..., : int(share * 40), :] = 1
    cgn = train_cgn.MnistCGN(mask_gain=gain)
    norm = cgn.f_shape[-1]
    cgn.f_shape.forward = lambda _: norm(premask)
    mask = cgn.mask(torch.zeros(1, 32), torch.zeros(1, dtype=torch.int64))
    expected = min(gain * ((1 - share) / share) ** 0.5, 1 - 1e-4)
    assert_close(mask[premask > 0], torch.full((960,), expected), rtol=0, atol=1e-4)
    assert (mask[premask == 0] == 1e-4).all()


# --------------------------------------------------------------------------------------------------
# Losses of MNIST


def test_frame_loss_takes_the_two_corners_that_agree_best():
    """An object may fill the others, whatever its color; the middle never counts."""
    torch.manual_seed(0)
    background = torch.rand(4, 3, 1, 1).expand(4, 3, 32, 32)
    x_gt = background.clone()
    assert train_cgn.frame_loss(background, x_gt) < 1e-12
    x_gt[..., 3:-3, 3:-3] = -1
    x_gt[..., 16:, :] = 1
    assert train_cgn.frame_loss(background, x_gt) < 1e-12
    x_gt[..., :16, :16] = 1  # a third corner: of the two best, one is 1 instead of the background
    expected = (1 - background).square().mean() / 2
    assert torch.allclose(train_cgn.frame_loss(background, x_gt), expected)
    corners = train_cgn.corner_pixels(torch.arange(1024.0).view(1, 1, 32, 32))
    assert corners.shape == (1, 1, 4, 51)
    assert corners[0, 0].amin(1).tolist() == [0, 22 * 32, 22, 22 * 32 + 29]


def test_border_loss_is_the_mean_of_the_frame():
    mask = torch.zeros(2, 1, 32, 32)
    mask[..., 3:-3, 3:-3] = 1  # fills all but the frame
    assert train_cgn.border_loss(mask) == 0
    assert_close(train_cgn.border_loss(1 - mask), torch.tensor(1.0))
    mask[0, 0, 0, :16] = 1
    share = 16 / (2 * (32 * 32 - 26 * 26))
    assert_close(train_cgn.border_loss(mask), torch.tensor(share))


@pytest.mark.parametrize(
    "adversarial, target, expected",
    [
        ("squares", 1, (1 + 1) / 2),
        ("squares", 0, (0 + 4) / 2),
        ("logistic", 1, (0.693147 + 0.126928) / 2),
        ("logistic", 0, (0.693147 + 2.126928) / 2),
    ],
)
def test_adversarial_losses_are_the_formulas(adversarial, target, expected):
    args = types.SimpleNamespace(adversarial=adversarial)
    realness = torch.tensor([[0.0], [2.0]])
    loss = train_cgn.adversarial_loss(args, realness, target)
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("discriminator", ["linear", "conv", "strided"])
def test_gradient_penalty_of_a_linear_function_is_its_weight(discriminator):
    """D(x) = <w, x>: the penalty adds 8 r1 / 2 |w|^2, with gradient 8 r1 w."""
    weight = torch.rand(3, 32, 32, requires_grad=True)
    x = torch.rand(4, 3, 32, 32)
    y = torch.zeros(4)

    def project(x, y):
        return (x * weight).sum((1, 2, 3))[:, None]

    def loss(penalty):
        args = types.SimpleNamespace(adversarial="logistic", r1=0.5, discriminator=discriminator)
        return train_cgn.discriminator_loss(args, project, x, y, x / 2, y, penalty)

    added = loss(True) - loss(False)
    assert_close(added, 2 * weight.square().sum())
    assert_close(torch.autograd.grad(added, weight)[0], 4 * weight)


@pytest.mark.parametrize("name", ["linear", "conv", "strided"])
def test_a_discriminator_looks_at_the_class(name):
    discriminator = train_cgn.DISCRIMINATORS[name](8).eval()
    x = torch.rand(2, 3, 32, 32)
    one = discriminator(x, torch.tensor([3, 3]))
    other = discriminator(x, torch.tensor([3, 4]))
    assert one.shape == (2, 1)
    assert one[0] == other[0]
    assert one[1] != other[1]


class Realness(torch.nn.Module):
    """The mean of an image, whatever its class."""

    def forward(self, x, y):
        return x.mean((1, 2, 3))[:, None]


def test_generator_losses_act_when_they_should(tmp_path):
    """All but the border's and the frame's wait for the end of the warm-up; the style loss is
    --style-every times as heavy.
    """
    torch.manual_seed(0)
    flags = "--dataset colored_mnist --adversarial squares --binary-weight 0.5 --border-weight 2"
    flags += " --frame-weight 3 --style-weights 0.1 0 0 0 --style-every 4 --kernels eager"
    args = train_cgn.parse_args([*flags.split(), "--out", str(tmp_path)])
    vgg = weights.VGG16Features(weights.random_vgg16_features(2))
    mask = torch.rand(2, 1, 32, 32).clamp(0.1, 0.9)
    foreground, background, x_gt = torch.rand(3, 2, 3, 32, 32) * 2 - 1
    y = torch.zeros(2, dtype=torch.int64)

    def losses(warming_up, style):
        return train_cgn.generator_losses(
            args, vgg, Realness(), (mask, foreground, background), x_gt, y, warming_up, style
        )

    found, composite, mask_mean = losses(False, True)
    assert_close(composite, mask * foreground + (1 - mask) * background)
    assert_close(mask_mean, mask.mean())
    realness = composite.mean((1, 2, 3))
    style = train_cgn.perceptual_loss(vgg, composite, x_gt, args.style_weights, "eager")
    expected = {
        "adversarial": (realness - 1).square().mean(),
        "binary": 0.5 * composite_losses(mask, foreground, background).binary,
        "style": 4 * style,
        "border": 2 * train_cgn.border_loss(mask),
        "frame": 3 * train_cgn.frame_loss(background, x_gt),
    }
    assert_close(found, expected)
    assert losses(False, False)[0].keys() == expected.keys() - {"style"}
    assert losses(True, False)[0].keys() == {"border", "frame"}


@pytest.mark.parametrize("discriminator", ["linear", "conv"])
def test_real_images_are_to_be_1_and_generated_ones_0(discriminator):
    args = types.SimpleNamespace(adversarial="squares", discriminator=discriminator)
    y = torch.zeros(2, dtype=torch.int64)
    real, fake = torch.full((2, 3, 4, 4), 0.75), torch.full((2, 3, 4, 4), 0.5)
    loss = train_cgn.discriminator_loss(args, Realness(), real, y, fake, y, False)
    assert loss.item() == (0.25**2 + 0.5**2) / 2


def test_frame_loss_compares_the_spread_of_colors_as_well():
    """A checkerboard has the mean of a plain image, but not its spread."""
    rows = torch.arange(32)
    board = torch.where((rows[:, None] + rows) % 2 == 0, 0.5, -0.5).expand(1, 3, 32, 32)
    plain = torch.zeros(1, 3, 32, 32)
    assert train_cgn.frame_loss(board, board) < 1e-3
    assert train_cgn.frame_loss(board, plain).item() == pytest.approx(0.49**2, rel=0.02)
