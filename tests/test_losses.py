"""Composite, losses and generator against known numbers of the published implementation, and gradients."""
import types

import pytest
import torch

import kernels
from conftest import fixture_files, folder_from
from data.frozen import VGG16Features
from data.weights import load_vgg16_features
from kernels import StyleLoss, UpsampleConv2d, composite_losses, gram_matrix, shuffle_patches, style_loss
from train_cgn import (LinearDiscriminator, StridedDiscriminator, adversarial_loss, border_loss, discriminator_loss,
                       load_generator, perceptual_loss)

STYLES = {"style_imagenet_4444": [4, 4, 4, 4], "style_text_0550": [0, 5, 5, 0],
          "style_colored": [0.05, 0.1, 0.01, 0.0],
          "style_double": [0.0, 0.05, 0.0, 0.05], "style_wildlife": [0.01, 0.05, 0.0, 0.01]}


def fixture_loss(name, mask, foreground, background, x_gt, backend):
    """The weighted loss that a fixture file calls `name`; None for the ones that need no code of ours."""
    if name in STYLES:
        weights = folder_from("CGN_WEIGHTS")
        if weights is None:
            pytest.skip("CGN_WEIGHTS names no folder with VGG-16 weights")
        vgg = VGG16Features(load_vgg16_features(weights, 10)).to(x_gt.device)
        composite = composite_losses(mask, foreground, background, backend=backend).composite
        return perceptual_loss(vgg, composite, x_gt, STYLES[name], backend)
    mask = 0.05 * mask if name == "mask_low_w500" else mask
    losses = composite_losses(mask, foreground, background, x_gt, backend=backend)
    return {"l1_w100": 100 * losses.l1, "binary_w300": 300 * losses.binary, "mask_w500": 500 * losses.mask_interval,
            "mask_low_w500": 500 * losses.mask_interval, "bg_w2000": 2000 * losses.mask_mean.mean()}[name]


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("file", fixture_files("losses_*.pt"))
def test_losses_match_the_published_ones(file, backend):
    if backend == "triton" and kernels.gram is None:
        pytest.skip("triton is not installed")
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    if backend == "triton" and device == "cpu" and file and "64" in file.name:
        pytest.skip("in the interpreter, 32 x 32 says as much")
    content = torch.load(file, weights_only=True, map_location=device)
    inputs = {name: content[name] for name in ("mask", "foreground", "background")}
    composite = composite_losses(*inputs.values()).composite
    torch.testing.assert_close(composite, content["composite"], rtol=1e-4, atol=1e-6)
    for name, expected in content["losses"].items():
        leaves = {key: value.clone().requires_grad_() for key, value in inputs.items()}
        loss = fixture_loss(name, *leaves.values(), content["x_gt"], backend)
        torch.testing.assert_close(loss.detach(), torch.as_tensor(expected["value"]).to(loss), rtol=1e-4,
                                   atol=1e-7, msg=lambda text: f"{name}: {text}")
        if loss.requires_grad:
            loss.backward()
        for key, leaf in leaves.items():
            gradient, known = leaf.grad, expected[f"grad_{key}"]
            if known is None:
                assert gradient is None or not gradient.any(), (name, key)
                continue
            tolerance = 1e-3 * known.abs().max().item()
            torch.testing.assert_close(gradient, known, rtol=0, atol=tolerance + 1e-12,
                                       msg=lambda text: f"{name}, gradient of {key}: {text}")


@pytest.mark.parametrize("file", fixture_files("mnist_cgn_*.pt"))
def test_published_generator_reproduces_its_outputs(file):
    weights = folder_from("CGN_WEIGHTS")
    path = weights and weights / f"authors_cgn_{file.stem.removeprefix('mnist_cgn_')}_mnist.pth"
    if not path or not path.is_file():
        pytest.skip(f"no {path and path.name} in CGN_WEIGHTS={weights}")
    content = torch.load(file, weights_only=True)
    cgn, args = load_generator(path)
    with torch.no_grad():
        outputs = cgn(content["z"], content["y"])
    assert args == {}
    for output, name in zip(outputs, ("mask", "texture_foreground", "texture_background")):
        torch.testing.assert_close(output, content[name], rtol=1e-4, atol=1e-4)      # of a range of 2


def test_composite_is_the_formula_term_by_term():
    torch.manual_seed(0)
    mask = torch.rand(3, 1, 5, 7, dtype=torch.float64).clamp(1e-4, 1 - 1e-4)
    mask[0], mask[1] = 0.01, 0.97                                                     # outside the interval
    foreground, background, target = torch.rand(3, 3, 3, 5, 7, dtype=torch.float64) * 2 - 1
    losses = composite_losses(mask, foreground, background, target)
    composite = mask * foreground + (1 - mask) * background
    torch.testing.assert_close(losses.composite, composite)
    torch.testing.assert_close(losses.l1, (composite - target).abs().mean())
    entropy = -mask * mask.log2() - (1 - mask) * (1 - mask).log2()
    torch.testing.assert_close(losses.binary, entropy.mean())
    means = [image.mean().item() for image in mask]
    distance = sum(max(0, 0.1 - m) + max(0, m - 0.9) for m in means) / 3
    assert losses.mask_mean.tolist() == pytest.approx(means)
    assert losses.mask_interval.item() == pytest.approx(distance) and distance > 0.05
    assert composite_losses(mask, foreground, background).l1 is None


def test_gradients_in_float64():
    torch.manual_seed(0)
    mask = torch.rand(2, 1, 4, 3, dtype=torch.float64).clamp(0.05, 0.95).requires_grad_()
    foreground, background = torch.randn(2, 2, 3, 4, 3, dtype=torch.float64).requires_grad_()
    target = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: tuple(composite_losses(*x, target, mask_interval=(0.45, 0.46))),
                                    (mask, foreground, background))
    features = torch.randn(2, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    gram = gram_matrix(torch.randn(2, 5, 4, 3, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x: StyleLoss.apply(x, gram), (features,))


def test_style_loss_is_the_formula_and_takes_a_gram_matrix():
    torch.manual_seed(0)
    a, b = torch.randn(2, 2, 6, 5, 4)
    flat = [x.reshape(2, 6, 20) for x in (a, b)]
    grams = [torch.einsum("nip,njp->nij", x, x) / (6 * 5 * 4) for x in flat]
    expected = (grams[0] - grams[1]).abs().mean()
    torch.testing.assert_close(style_loss(a, b), expected)
    torch.testing.assert_close(style_loss(a, grams[1]), expected)
    half = style_loss(a.bfloat16(), b.bfloat16())
    assert half.dtype == torch.float32 and half.item() == pytest.approx(expected.item(), rel=0.02)


def test_upsampling_convolution_equals_upsampling_then_convolution():
    torch.manual_seed(0)
    layer = UpsampleConv2d(5, 4, 3, padding=1, bias=False).double()
    x = torch.randn(2, 5, 6, 3, dtype=torch.float64)
    upsampled = torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest")
    torch.testing.assert_close(layer(x), torch.nn.functional.conv2d(upsampled, layer.weight, padding=1))


def test_shuffling_rolls_each_image_by_its_own_offsets():
    images = torch.arange(2 * 3 * 32 * 32).view(2, 3, 32, 32).float().requires_grad_()
    shuffled = shuffle_patches(images, torch.tensor([[5, 31], [0, 7]]))
    torch.testing.assert_close(shuffled[0], images[0].roll((-5, -31), (1, 2)))
    torch.testing.assert_close(shuffled[1], images[1].roll((0, -7), (1, 2)))
    shuffled.sum().backward()
    assert (images.grad == 1).all()


def test_border_loss_is_the_mean_of_the_frame():
    mask = torch.zeros(2, 1, 32, 32)
    mask[..., 3:-3, 3:-3] = 1                                                         # fills all but the frame
    assert border_loss(mask) == 0
    torch.testing.assert_close(border_loss(1 - mask), torch.tensor(1.0))
    mask[0, 0, 0, :16] = 1
    torch.testing.assert_close(border_loss(mask), torch.tensor(16 / (2 * (32 * 32 - 26 * 26))))


def test_adversarial_losses_are_the_formulas():
    realness = torch.tensor([[0.0], [2.0]])
    for form, target, want in (("squares", 1, (1 + 1) / 2), ("squares", 0, (0 + 4) / 2),
                               ("logistic", 1, (0.693147 + 0.126928) / 2), ("logistic", 0, (0.693147 + 2.126928) / 2)):
        assert adversarial_loss(types.SimpleNamespace(adversarial=form), realness, target).item() == pytest.approx(want)


def test_gradient_penalty_of_a_linear_function_is_its_weight():
    """D(x) = <w, x>: --r1 adds 8 r1 / 2 |w|^2 in every 8th step, with gradient 8 r1 w."""
    weight, x = torch.rand(3, 32, 32, requires_grad=True), torch.rand(4, 3, 32, 32)
    def loss(r1, step):
        args = types.SimpleNamespace(adversarial="logistic", r1=r1)
        return discriminator_loss(args, lambda x, y: (x * weight).sum((1, 2, 3))[:, None], x, torch.zeros(4), x / 2,
                                  torch.zeros(4), step)
    added = loss(0.5, 16) - loss(0.0, 16)
    torch.testing.assert_close(added, 2 * weight.square().sum())
    torch.testing.assert_close(torch.autograd.grad(added, weight)[0], 4 * weight)
    assert loss(0.5, 15) == loss(0.0, 15)


@pytest.mark.parametrize("form", [LinearDiscriminator, StridedDiscriminator])
def test_a_discriminator_looks_at_the_class(form):
    discriminator, x = form(8).eval(), torch.rand(2, 3, 32, 32)
    one, other = discriminator(x, torch.tensor([3, 3])), discriminator(x, torch.tensor([3, 4]))
    assert one.shape == (2, 1) and one[0] == other[0] and one[1] != other[1]


def test_features_stop_at_the_last_layer_with_a_weight():
    torch.manual_seed(0)
    state = {}
    for i, (inputs, outputs) in enumerate([(3, 4), (4, 4), (4, 6), (6, 6)]):
        state |= {f"{i}.weight": torch.randn(outputs, inputs, 3, 3), f"{i}.bias": torch.zeros(outputs)}
    vgg = VGG16Features(state)
    features = vgg(torch.rand(2, 3, 16, 16))
    assert [tuple(f.shape) for f in features] == [(2, 4, 16, 16), (2, 6, 8, 8)]
    assert all((f >= 0).all() for f in features)
    assert not any(p.requires_grad for p in vgg.parameters())
