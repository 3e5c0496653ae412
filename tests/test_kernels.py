"""Triton kernels against the eager forms and float64: interpreted on a CPU, compiled on a GPU."""

import ast
import copy
import csv
import functools
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, run

import kernels
import train_cgn
from data import weights
from kernels import (
    affine_convolution,
    affine_relu,
    benchmark,
    compose,
    composite_losses,
    composite_losses_and_copy,
    convolution_relu,
    draw_patch_windows,
    eager,
    enlarge,
    gram_matrix,
    max_pool,
    normalized_conv2d,
    sample_patch_images,
    style_loss,
)

pytestmark = pytest.mark.skipif(eager.gram is None, reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.allow_tf32 = False  # float32 is compared with float64
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED = DEVICE == "cpu"
TOLERANCES = {  # one step of the dtype: the interpreter cuts bfloat16 off where a GPU rounds
    torch.float64: 1e-5,
    torch.float32: 1e-5,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}


def close(actual, expected, relative, name=""):
    """Within `relative` of each element, or of the largest of all for what is nearly 0."""
    expected = expected.to(actual.dtype)
    scale = 0
    if expected.numel():
        scale = expected.abs().max().item()
    torch.testing.assert_close(
        actual,
        expected,
        rtol=relative,
        atol=relative * scale / 8 + 1e-30,
        msg=lambda text: f"{name}: {text}",
    )


def laid_out(x, layout):
    """The same values in another memory layout, as a leaf that records gradients."""
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "transposed":  # no single stride leads from pixel to pixel
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "slice":
        n, channels, height, width = x.shape
        larger = (n, channels + 1, height + 2, width + 3)
        padded = x.new_full(larger, torch.nan)
        padded[:, 1:, 1:-1, 2:-1] = x
        x = padded[:, 1:, 1:-1, 2:-1]
    return x.detach().requires_grad_()


# --------------------------------------------------------------------------------------------------
# The standing of the files


TRITON_FILES = [
    "affine.py",
    "composite.py",
    "gram.py",
    "patches.py",
    "pointwise.py",
    "resize.py",
]


@pytest.mark.parametrize("name", TRITON_FILES)
def test_triton_files_can_be_copied_alone(name):
    """They import nothing but torch, triton and the standard library."""
    allowed = sys.stdlib_module_names | {"torch", "triton"}
    source = (ROOT / "kernels" / name).read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            modules = [node.module]
        else:
            continue
        for module in modules:
            assert module.split(".")[0] in allowed, module


def test_every_exported_name_is_there():
    for name in kernels.__all__:
        assert hasattr(kernels, name)
    assert len(set(kernels.__all__)) == len(kernels.__all__)


# --------------------------------------------------------------------------------------------------
# Mask composite


def composite_inputs(n, height, width, dtype):
    """Mask with all that it can hold, foreground, background and target: float64 tensors whose
    values dtype can hold.
    """
    torch.manual_seed(n * 100 + height)
    mask = torch.rand(n, 1, height, width)
    mask = mask.clamp(1e-4, 1 - 1e-4)
    mask[0] *= 0.05  # below the interval
    mask[-1, 0, 0, -1] = 1e-4
    mask[-1, 0, -1, 0] = 1 - 1e-4
    mask[-1, 0, 0, 0] = 0.0
    mask[-1, 0, -1, -1] = 1.0
    foreground, background, target = torch.randn(3, n, 3, height, width)
    target[:, 0] = background[:, 0]  # where the mask is 0, the error is exactly 0
    inputs = (mask, foreground, background, target)
    inputs = [x.to(dtype) for x in inputs]
    return [x.double().to(DEVICE) for x in inputs]


def float_inputs(n, height, width):
    return [x.float() for x in composite_inputs(n, height, width, torch.float32)]


def composite_run(inputs, dtype, layout, backend, gradients, copy_dtype=None):
    """Losses, the composite's copy, and gradients of mask, foreground and background, for given
    gradients of the outputs.
    """
    inputs = [x.to(dtype) for x in inputs]
    *leaves, target = [laid_out(x, layout) for x in inputs]
    losses, image = composite_losses_and_copy(
        *leaves, target, copy_dtype=copy_dtype, backend=backend
    )
    outputs = []
    output_grads = []
    for output, gradient in zip((*losses, image), gradients):
        if output is not None and gradient is not None:
            outputs.append(output)
            output_grads.append(gradient.to(output.dtype))
    torch.autograd.backward(outputs, output_grads)
    losses = [x.detach() for x in losses]
    grads = [leaf.grad for leaf in leaves]
    return losses, image, grads


def output_gradients(n, height, width, dtype=torch.float32):
    """Random gradients for composite, l1, binary, mask_mean, mask_interval and copy, of one size
    for each pixel.
    """
    torch.manual_seed(7)
    pixels = n * height * width
    images = torch.randn(2, n, 3, height, width, device=DEVICE)
    composite = images[0].to(dtype).float()
    second = images[1].bfloat16().float()
    l1 = torch.tensor(3.0 * pixels, device=DEVICE)
    binary = torch.tensor(2.0 * pixels, device=DEVICE)
    mask_mean = torch.randn(n, device=DEVICE) * pixels
    mask_interval = torch.tensor(5.0 * pixels, device=DEVICE)
    return [composite, l1, binary, mask_mean, mask_interval, second]


COMPOSITE_SHAPES = [
    (1, 1, 1, "contiguous"),  # a single pixel
    (2, 1, 7, "channels last"),  # one row
    (5, 7, 1, "slice"),  # one column
    (3, 32, 32, "contiguous"),  # exactly one block of pixels
    (2, 33, 32, "transposed"),  # more than one block
    (3, 32, 33, "channels last"),
    (1, 100, 100, "slice"),  # ten blocks, a single image
    (5, 7, 100, "contiguous"),  # less than a block
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, height, width, layout", COMPOSITE_SHAPES)
def test_composite(n, height, width, layout, dtype):
    inputs = composite_inputs(n, height, width, dtype)
    gradients = output_gradients(n, height, width, dtype)
    gradients[0] = gradients[0].to(memory_format=torch.channels_last)
    outputs, second, grads = composite_run(
        inputs, dtype, layout, "triton", gradients, torch.bfloat16
    )
    fields = kernels.CompositeLosses._fields
    leaves = ("mask", "foreground", "background")
    for other in (dtype, torch.float64):
        expected, expected_second, expected_grads = composite_run(
            inputs, other, layout, "eager", gradients, torch.bfloat16
        )
        for name, x, y in zip(fields, outputs, expected, strict=True):
            relative = max(TOLERANCES[x.dtype], 2e-6)
            close(x, y, relative, name)
        close(second, expected_second, TOLERANCES[torch.bfloat16], "copy")
        for name, x, y in zip(leaves, grads, expected_grads, strict=True):
            close(x, y, TOLERANCES[dtype], f"gradient of {name}")
    assert second.is_contiguous(memory_format=torch.channels_last)
    assert second.dtype == torch.bfloat16
    assert outputs[0].dtype == dtype
    assert all(x.dtype == torch.float32 for x in outputs[1:])


@pytest.mark.parametrize("which", range(6))
def test_gradients_of_single_outputs(which):
    inputs = composite_inputs(2, 9, 5, torch.float32)
    gradients = [None] * 6
    gradients[which] = output_gradients(2, 9, 5)[which]
    results = []
    for backend in ("triton", "eager"):
        _, _, grads = composite_run(
            inputs, torch.float32, "contiguous", backend, gradients, torch.float16
        )
        results.append(grads)
    for x, y in zip(*results, strict=True):
        close(x, torch.zeros_like(x) if y is None else y, 2e-5)


def test_gradients_of_sums():
    """They are one number for all images, of stride 0."""
    results = []
    for backend in ("triton", "eager"):
        *leaves, target = [x.requires_grad_() for x in float_inputs(3, 5, 4)]
        losses = composite_losses(*leaves, target, backend=backend)
        total = losses.composite.sum() + 7 * losses.mask_mean.sum()
        results.append(torch.autograd.grad(total, leaves))
    for x, y in zip(*results, strict=True):
        close(x, y, 1e-5)


@pytest.mark.parametrize("recorded", range(3))
def test_inputs_without_gradient_get_none(recorded):
    *inputs, target = float_inputs(2, 5, 6)
    target.requires_grad_()
    results = []
    for backend in ("triton", "eager"):
        leaves = [x.clone() for x in inputs]
        leaves[recorded].requires_grad_()
        losses = composite_losses(*leaves, target, mask_interval=(0.4, 0.45), backend=backend)
        squares = losses.composite.square().sum()
        loss = squares + losses.l1 + losses.binary + losses.mask_interval
        loss.backward()
        for index, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (index == recorded)
        assert target.grad is None
        results.append(leaves[recorded].grad)
    close(*results, 1e-5)
    losses = composite_losses(*inputs, target.detach(), backend="triton")
    assert not losses.composite.requires_grad
    assert composite_losses(*inputs, backend="triton").l1 is None


def test_mixed_dtypes_and_expanded_inputs():
    mask, foreground, background, target = composite_inputs(2, 6, 5, torch.bfloat16)
    mask = mask.float()
    foreground = foreground.bfloat16()
    background = background[:1].half()
    background = background.expand(2, -1, -1, -1)
    target = target.float()
    fast = composite_losses(mask, foreground, background, target, backend="triton")
    slow = composite_losses(mask, foreground, background, target, backend="eager")
    for x, y in zip(fast, slow, strict=True):
        assert x.dtype == y.dtype
        close(x, y, TOLERANCES[x.dtype])


def test_sums_of_more_programs_and_images_than_are_added_at_a_time():
    torch.manual_seed(0)
    images, splits, pixels = 5, 7, 50
    partial = pixels / splits * torch.rand(3, images, splits, device=DEVICE)
    l1, binary, interval = torch.empty(3, device=DEVICE)
    mean = torch.empty(images, device=DEVICE)
    bounds = (0.45, 0.5)
    eager.composite.finish_kernel[(1,)](
        partial, l1, binary, mean, interval, images, splits, pixels, *bounds, IMAGES=2, SPLITS=4
    )
    exact = partial.double()
    means = exact[2].sum(1) / pixels
    close(l1, exact[0].sum() / (3 * images * pixels), 1e-6)
    close(binary, exact[1].sum() / (images * pixels), 1e-6)
    close(mean, means, 1e-6)
    close(interval, (means - means.clamp(*bounds)).abs().mean(), 1e-6)


def test_nan_is_not_hidden():
    mask, foreground, background, target = float_inputs(2, 4, 4)
    mask[1, 0, 1, 1] = torch.nan
    for backend in ("triton", "eager"):
        losses = composite_losses(mask, foreground, background, target, backend=backend)
        assert losses.composite[1, :, 1, 1].isnan().all()
        assert losses.composite.isnan().sum() == 3
        assert losses.l1.isnan()
        assert losses.binary.isnan()
        assert losses.mask_interval.isnan()
        assert losses.mask_mean.isnan().tolist() == [False, True]


def test_compose_is_the_formula_and_exact_at_both_ends():
    torch.manual_seed(0)
    mask = torch.rand(2, 1, 5, 4, dtype=torch.float64)
    images = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64)
    foreground, background = images
    expected = mask * foreground + (1 - mask) * background
    torch.testing.assert_close(compose(mask, foreground, background), expected)
    one = torch.ones_like(mask)
    zero = torch.zeros_like(mask)
    assert torch.equal(compose(one, foreground, background), foreground)
    assert torch.equal(compose(zero, foreground, background), background)


# --------------------------------------------------------------------------------------------------
# Style loss


def style_run(features, target, dtype, layout, backend):
    leaf = laid_out(features.to(dtype), layout)
    target_dtype = dtype
    if target.ndim == 3:  # a Gram matrix
        target_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    loss = style_loss(leaf, target.to(target_dtype), backend=backend)
    (loss * 32_000).backward()  # float16 has few digits of smaller gradients
    return loss.detach(), leaf.grad


STYLE_SHAPES = [
    (1, 3, 1, 1, "contiguous"),  # one position
    (5, 3, 7, 33, "slice"),  # fewer channels than a tile has
    (2, 17, 33, 7, "channels last"),  # one more channel than the smallest tile
    (2, 64, 16, 32, "contiguous"),  # one tile, whole blocks of positions
    (1, 40, 50, 50, "channels last"),  # positions split over ten programs, more than fit at a time
    (2, 130, 7, 5, "transposed"),  # a tile and two channels
    (1, 257, 7, 7, "contiguous"),  # many tiles
    (2, 257, 1, 7, "channels last"),
]
if not INTERPRETED:  # it would take seconds for each
    STYLE_SHAPES += [(3, 64, 100, 100, "channels last"), (2, 512, 28, 28, "contiguous")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, channels, height, width, layout", STYLE_SHAPES)
def test_style_loss(n, channels, height, width, layout, dtype):
    torch.manual_seed(0)
    both = torch.rand(2, n, channels, height, width)
    features, target = both.to(dtype).to(DEVICE).double()
    for goal in (target, gram_matrix(target)):
        loss, grad = style_run(features, goal, dtype, layout, "triton")
        assert loss.dtype == torch.float32
        assert grad.dtype == dtype
        for other in (dtype, torch.float64):
            reference, reference_grad = style_run(features, goal, other, layout, "eager")
            close(loss, reference, 1e-4)
            # A difference near 0 may have another sign, and a gradient is a sum of signs.
            relative = max(TOLERANCES[dtype], 1e-3)
            distance = (grad.double() - reference_grad.double()).abs()
            largest = reference_grad.abs().max()
            flips = (distance > relative * largest).sum()
            share = 0.001 if channels < 512 else 0.006  # three of 262,144 signs
            assert flips <= share * grad.numel(), flips
    if layout == "channels last":
        assert grad.is_contiguous(memory_format=torch.channels_last)


def test_one_gram_matrix_for_all_images():
    features, target = torch.rand(2, 3, 20, 6, 6, device=DEVICE)
    goal = gram_matrix(target[:1]).expand(3, -1, -1)
    results = [style_loss(features, goal, backend=backend) for backend in ("triton", "eager")]
    close(*results, 1e-4)


def test_style_loss_of_equal_features_is_zero_but_for_rounding():
    features = torch.randn(2, 20, 40, 11, device=DEVICE)
    loss = style_loss(features, features.clone(), backend="triton")
    assert loss < 1e-6 * gram_matrix(features).abs().mean()


def test_eager_style_loss_is_the_same_within_autocast():
    features = torch.randn(2, 8, 6, 6, requires_grad=True)
    target = torch.randn(2, 8, 6, 6)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = style_loss(features, target, backend="eager")
            (gradient,) = torch.autograd.grad(loss, features)
            results.append((loss.detach(), gradient, gram_matrix(target)))
    assert all(map(torch.equal, *results))


def test_small_features_are_not_tuned():
    configs = eager.gram.CONFIGS
    for images, channels, side, count in ((32, 64, 32, 1), (32, 128, 16, 1), (16, 512, 32, 3)):
        features = torch.empty(1).expand(images, channels, side**2)
        arguments = {"channels": channels, "positions_class": eager.gram.tuning_class(features)}
        assert len(eager.gram.configs_to_try(configs, arguments, num_warps=8)) == count


def test_products_are_exact_unless_tf32_is_allowed():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert eager.gram.dot_precision() == "tf32x3"
        torch.set_float32_matmul_precision("high")
        assert eager.gram.dot_precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


def test_splits_stay_within_the_workspace():
    """Few positions to split, many to split, and so many bytes of sums that no split has room."""
    shapes = [
        (1, 64, 256),
        (16, 64, 256),
        (1, 512, 4),
        (64, 512, 64),
        (512, 512, 32),
        (16, 128, 128),
    ]
    for n, channels, side in shapes:
        one = torch.empty(1, 1, 1, 1, device=DEVICE, dtype=torch.bfloat16)
        features = one.expand(n, channels, side, side)
        block_c, block_p = eager.gram.block_sizes(features)
        splits, chunk = eager.gram.split_positions(features, block_c, block_p)
        assert splits == 1 or splits * n * channels**2 * 4 <= eager.gram.WORKSPACE
        assert chunk % block_p == 0
        assert (splits - 1) * chunk < side**2 <= splits * chunk


# --------------------------------------------------------------------------------------------------
# Patch images


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def resize(x, size):
    return torch.nn.functional.interpolate(x, size, mode="bicubic")


def slow_patches(image, mask, windows, patch_size, top, grid, work_size):
    """The definition, window by window."""
    size = image.shape[2:]
    image = resize(image, (work_size, work_size))
    mask = resize(mask, (work_size, work_size))
    steps = work_size - patch_size + 1
    results = []
    for n in range(len(image)):
        candidates = []
        for y in range(steps):
            for x in range(steps):
                window = mask[n, 0, y : y + patch_size, x : x + patch_size]
                mean = window.mean().item()
                candidates.append((-mean, y, x))
        best = sorted(candidates)[:top]
        rows = []
        for ranks in windows[n].view(grid, grid).tolist():
            row = []
            for rank in ranks:
                _, y, x = best[rank]
                patch = image[n, :, y : y + patch_size, x : x + patch_size]
                row.append(patch)
            rows.append(torch.cat(row, 2))
        results.append(torch.cat(rows, 1))
    return resize(torch.stack(results), size)


PATCH_SETTINGS = dict(patch_size=5, top=9, grid=3, work_size=24)


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_patch_images(backend):
    torch.manual_seed(0)
    image = torch.rand(2, 3, 40, 30)
    mask = torch.rand(2, 1, 40, 30).requires_grad_()
    windows = torch.randint(9, (2, 9), generator=seeded(3))
    expected = slow_patches(image, mask.detach(), windows, **PATCH_SETTINGS)
    images = sample_patch_images(
        image.to(DEVICE),
        mask.to(DEVICE),
        **PATCH_SETTINGS,
        backend=backend,
        generator=seeded(3),
    )
    assert images.shape == image.shape
    assert not images.requires_grad
    torch.testing.assert_close(images.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_parts_of_a_batch_take_their_slices_of_the_windows(backend):
    """Two GPUs that draw the windows of all images make the images that one would make."""
    torch.manual_seed(0)
    image = torch.rand(4, 3, 40, 30, device=DEVICE)
    mask = torch.rand(4, 1, 40, 30, device=DEVICE)
    settings = dict(PATCH_SETTINGS, backend=backend)
    whole = sample_patch_images(image, mask, **settings, generator=seeded(3))

    windows = draw_patch_windows(4, seeded(3), top=9, grid=3)
    assert windows.shape == (4, 9)
    assert windows.dtype == torch.int64
    assert 0 <= windows.min() <= windows.max() < 9
    assert torch.equal(whole, sample_patch_images(image, mask, windows, **settings))
    for part in (slice(0, 2), slice(2, 4)):
        inputs = (image[part], mask[part], windows[part])
        images = sample_patch_images(*inputs, **settings)
        close(images, whole[part], 1e-6)  # resizing may sum in another order


def test_drawing_windows_is_one_draw_of_integers():
    """Whoever draws without using the windows leaves a generator as sampling would."""
    first = seeded(1)
    second = seeded(1)
    windows = draw_patch_windows(5, first)
    expected = torch.randint(100, (5, 36), generator=second)
    assert torch.equal(windows, expected)
    assert torch.equal(first.get_state(), second.get_state())
    assert draw_patch_windows(5, device=DEVICE).device.type == DEVICE


def test_patch_images_as_published_come_from_the_mask():
    """15 x 15 windows, 100 best, 6 x 6: texture of the right half only, where the mask is."""
    image = torch.zeros(1, 3, 256, 256)
    image[..., 128:] = torch.rand(256, 128)
    mask = torch.zeros(1, 1, 256, 256)
    mask[..., 160:] = 1
    patches = sample_patch_images(image, mask)
    assert patches.shape == (1, 3, 256, 256)
    assert patches.std() > 0.1
    assert not torch.equal(patches, sample_patch_images(image, mask))  # drawn anew
    image[..., 128:] = 0
    assert sample_patch_images(image, mask).abs().max() < 1e-5


# --------------------------------------------------------------------------------------------------
# Conditional norms


def affine_run(inputs, dtype, layout, backend):
    """The result, and the gradients of x and of gains and shifts, which are float32 at least."""
    x, gain_and_shift, gradient = inputs
    x = laid_out(x.to(dtype), layout)
    gain_and_shift = gain_and_shift.to(torch.promote_types(dtype, torch.float32))
    leaf = gain_and_shift.clone().requires_grad_()
    y = affine_relu(x, leaf, backend=backend)
    y.backward(gradient.to(dtype))
    return y.detach(), x.grad, leaf.grad


AFFINE_SHAPES = [
    (1, 1, 1, 1, "contiguous"),
    (5, 3, 7, 33, "slice"),
    (2, 17, 33, 7, "channels last"),  # fewer channels than a tile has
    (2, 130, 7, 32, "channels last"),  # two blocks of channels and two channels
    (1, 64, 50, 50, "channels last"),  # programs share the positions
    (2, 5, 50, 50, "contiguous"),  # more than a tile of positions
    (2, 6, 9, 8, "transposed"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, channels, height, width, layout", AFFINE_SHAPES)
def test_affine_relu(n, channels, height, width, layout, dtype):
    torch.manual_seed(0)
    images = torch.randn(2, n, channels, height, width).to(dtype)
    x, gradient = images.to(DEVICE).double()
    gain_and_shift = torch.randn(n, 2 * channels, device=DEVICE).double()
    inputs = (x, gain_and_shift, gradient)
    results = affine_run(inputs, dtype, layout, "triton")
    expected = affine_run(inputs, torch.float64, layout, "eager")
    for name, actual, exact in zip(("y", "x", "gains and shifts"), results, expected):
        close(actual, exact, TOLERANCES[dtype], name)
    y, grad_x, grad_affine = results
    assert y.dtype == grad_x.dtype == dtype
    assert grad_affine.dtype == torch.float32
    if layout == "channels last":
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert grad_x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels, side, dilation", [(3, 6, 1), (70, 33, 2)])
@pytest.mark.parametrize("uses", [(0,), (1,), (0, 1)])
def test_convolution_relu(channels, side, dilation, channels_last, uses, dtype):
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    convolution = torch.nn.Conv2d(5, channels, 3, padding=dilation, dilation=dilation)
    convolution.bias.data *= 10
    convolution.requires_grad_(False).to(DEVICE, dtype)
    x = torch.randn(2, 5, side, side + 1, device=DEVICE).to(dtype, memory_format=layout)
    gradients = torch.randn(2, 2, channels + 1, side, side + 1, device=DEVICE).to(dtype)
    gradients = [gradients[0, :, 1:], gradients[1, :, 1:].to(memory_format=layout)]  # a slice
    results = []
    for backend, kind in (("triton", dtype), ("eager", torch.float64)):
        leaf = x.detach().to(kind).requires_grad_()
        both = convolution_relu(leaf, convolution.to(kind), backend=backend)
        assert torch.equal(*both)
        outputs = [both[use] for use in uses]
        torch.autograd.backward(outputs, [gradients[use].to(kind) for use in uses])
        results.append((both[0].detach(), leaf.grad))
    (y, grad_x), (exact, exact_grad) = results
    assert y.dtype == dtype and y.min() == 0
    # Twice: the convolution has rounded once before. Where the ReLU was open may differ at 0.
    close(y, exact, 2 * TOLERANCES[dtype])
    assert (grad_x - exact_grad).abs().mean() < 2 * TOLERANCES[dtype] * exact_grad.abs().max()


def test_convolution_relu_keeps_stride_and_groups():
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2, device=DEVICE)
    convolution.requires_grad_(False)
    x = torch.randn(2, 6, 7, 8, device=DEVICE)
    y, _ = convolution_relu(x, convolution, backend="triton")
    close(y, convolution(x).relu(), 1e-5)


def test_the_derivative_of_relu_is_one_pass_for_two_users():
    torch.manual_seed(0)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y, grad, other = torch.randn(3, 2, 70, 5, 6, device=DEVICE)
        y = y.relu().to(memory_format=memory_format)
        y[1, 2, 3, 4] = torch.nan  # there gradients pass, as in PyTorch
        grad = grad.to(memory_format=memory_format)
        result = eager.affine.relu_backward(y, grad, other)
        expected = torch.ops.aten.threshold_backward(grad + other, y, 0)
        assert torch.equal(result, expected)
        assert result.is_contiguous(memory_format=memory_format)


def test_convolution_relu_keeps_nan_and_refuses_training():
    convolution = torch.nn.Conv2d(2, 3, 1, device=DEVICE)
    x = torch.randn(1, 2, 4, 4, device=DEVICE)
    frozen = torch.nn.Conv2d(2, 3, 1, bias=False).requires_grad_(False)
    circular = torch.nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular").requires_grad_(False)
    for refused in (convolution, frozen, circular):
        with pytest.raises(ValueError, match="should be a frozen nn.Conv2d"):
            convolution_relu(x, refused)
    x[0, 1, 2, 3] = torch.nan
    convolution.requires_grad_(False)
    for backend in ("triton", "eager"):
        y, _ = convolution_relu(x, convolution, backend=backend)
        assert y.isnan().sum() == 3 and y[0, :, 2, 3].isnan().all()


def test_eager_affine_relu_is_the_formula_with_its_gradient():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    gain_and_shift = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    gain, shift = gain_and_shift[..., None, None].chunk(2, 1)
    torch.testing.assert_close(affine_relu(x, gain_and_shift), (x * gain + shift).relu())
    assert torch.autograd.gradcheck(affine_relu, (x, gain_and_shift))


def test_gains_and_shifts_may_have_any_strides():
    x = torch.randn(2, 3, 4, 5, device=DEVICE)
    gain_and_shift = torch.randn(6, 2, device=DEVICE).t()
    y = affine_relu(x, gain_and_shift, backend="triton")
    close(y, affine_relu(x, gain_and_shift, backend="eager"), 1e-6)


def test_affine_relu_keeps_nan():
    x = torch.randn(2, 3, 4, 4, device=DEVICE)
    x[1, 2, 3, 3] = torch.nan
    gain_and_shift = torch.randn(2, 6, device=DEVICE)
    for backend in ("triton", "eager"):
        y = affine_relu(x, gain_and_shift, backend=backend)
        assert y.isnan().sum() == 1 and y[1, 2, 3, 3].isnan()


CONVOLVED = [  # n, channels, outputs, height, width, (channels, reduction) of a residual, layout
    (1, 1, 1, 1, 1, None, "contiguous"),
    (2, 5, 18, 3, 7, (18, 1), "slice"),
    (2, 70, 20, 6, 8, (20, 1), "channels last"),  # two blocks of the sum over channels
    (2, 20, 150, 4, 6, (155, 2), "channels last"),  # two blocks of outputs, channels left out
    (3, 17, 9, 9, 11, (12, 1), "channels last"),  # two blocks of positions, channels left out
    (2, 33, 3, 10, 8, (3, 2), "contiguous"),
    (2, 6, 40, 8, 6, (41, 2), "transposed"),
]


def convolution_inputs(n, channels, outputs, height, width, residual, dtype):
    """x, gains and shifts, weight and residual (or None) in float64, of values that dtype has."""
    torch.manual_seed(0)
    inputs = [
        torch.randn(n, channels, height, width),
        torch.randn(n, 2 * channels),
        torch.randn(outputs, channels, 1, 1),
    ]
    if residual:
        residual_channels, ratio = residual
        inputs.append(torch.randn(n, residual_channels, height // ratio, width // ratio))
    return [x.to(DEVICE, dtype).double() for x in inputs]


def convolution_run(inputs, dtype, layout, backend, uses=2):
    """The result and the gradients of all inputs, where x is used once or twice."""
    leaves = []
    for x in inputs:
        x = x.to(dtype)
        if x.dim() == 4:
            x = laid_out(x, layout)
        else:  # columns of a larger tensor, as in BigGAN
            x = torch.cat([x, x], 1)[:, : x.shape[1]].detach().requires_grad_()
        leaves.append(x)
    y, x = affine_convolution(*leaves, backend=backend)
    assert torch.equal(x, leaves[0])
    seeded = torch.Generator().manual_seed(1)
    outputs = [y, x][:uses]
    gradients = [torch.randn(out.shape, generator=seeded).to(DTYPES[2]) for out in outputs]
    gradients = [torch.empty_like(out).copy_(g) for out, g in zip(outputs, gradients)]
    torch.autograd.backward(outputs, gradients)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, channels, outputs, height, width, residual, layout", CONVOLVED)
def test_affine_convolution(n, channels, outputs, height, width, residual, layout, dtype):
    inputs = convolution_inputs(n, channels, outputs, height, width, residual, dtype)
    results = convolution_run(inputs, dtype, layout, "triton")
    expected = convolution_run(inputs, torch.float64, layout, "eager")
    for name, actual, exact in zip(("y", "x", "affine", "weight", "residual"), results, expected):
        assert actual.dtype == dtype and actual.shape == exact.shape
        close(actual, exact, 2 * TOLERANCES[dtype], name)  # what the ReLU gives is rounded, too
    if layout == "channels last":
        for x in (results[0], results[1], results[-1]):
            assert x.is_contiguous(memory_format=torch.channels_last)


def test_the_gradient_of_a_weight_from_few_programs(monkeypatch):
    """Each takes four tiles of positions, the last one what is left."""
    monkeypatch.setattr(eager.pointwise, "PROGRAMS", 3)
    inputs = convolution_inputs(2, 3, 5, 9, 15, None, torch.float32)  # ten tiles
    results = convolution_run(inputs, torch.float32, "contiguous", "triton")
    expected = convolution_run(inputs, torch.float64, "contiguous", "eager")
    for actual, exact in zip(results, expected, strict=True):
        close(actual, exact, 1e-5)


def test_affine_convolution_sums_in_float32():
    """Of 2048 + 1 - 2048, taken in three blocks of channels, float16 would keep 0."""
    x = torch.ones(1, 192, 1, 1, device=DEVICE, dtype=torch.float16)
    weight = torch.zeros(1, 192, 1, 1, device=DEVICE, dtype=torch.float16)
    weight[0, [0, 64, 128], 0, 0] = torch.tensor([2048.0, 1, -2048], device=DEVICE).half()
    norm = torch.cat([torch.ones(1, 192), torch.zeros(1, 192)], 1).to(DEVICE)
    y, _ = affine_convolution(x, norm, weight, backend="triton")
    assert y.item() == 1


def test_affine_convolution_whose_input_is_used_once():
    inputs = convolution_inputs(2, 7, 5, 4, 4, None, torch.float32)
    results = convolution_run(inputs, torch.float32, "contiguous", "triton", uses=1)
    expected = convolution_run(inputs, torch.float64, "contiguous", "eager", uses=1)
    for actual, exact in zip(results, expected, strict=True):
        close(actual, exact, 1e-5)


def test_eager_affine_convolution_is_the_formula():
    x, gain_and_shift, weight, residual = convolution_inputs(2, 3, 4, 6, 8, (5, 2), torch.float32)
    gain, shift = gain_and_shift[..., None, None].chunk(2, 1)
    active = (x * gain + shift).relu()
    expected = torch.einsum("dc,nchw->ndhw", weight[:, :, 0, 0], active)
    enlarged = residual[:, :4].repeat_interleave(2, 2).repeat_interleave(2, 3)
    y, again = affine_convolution(x, gain_and_shift, weight, residual)
    torch.testing.assert_close(y, expected + enlarged)
    assert again is x


def test_the_gradient_of_a_residual_is_channels_last():
    """Of a slice of channels, PyTorch's is not, and all that is added to it is slow from there."""
    x, *others, residual = convolution_inputs(2, 3, 4, 6, 8, (5, 1), torch.float32)
    x, residual = (image.to(memory_format=torch.channels_last) for image in (x, residual))
    layouts = []

    def note(gradient):
        layouts.append(gradient.is_contiguous(memory_format=torch.channels_last))

    residual = residual.requires_grad_() * 1
    residual.register_hook(note)
    y, _ = affine_convolution(x, *others, residual)
    y.backward(torch.ones_like(y))
    assert layouts == [True]


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_affine_convolution_of_which_one_result_is_used(backend):
    """The second result alone is x itself, whose gradient passes; autocast changes no dtype."""
    x = torch.randn(2, 4, 3, 5, device=DEVICE, requires_grad=True)
    norm = torch.randn(2, 8, device=DEVICE, requires_grad=True)
    weight = torch.randn(6, 4, 1, 1, device=DEVICE, requires_grad=True)
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        y, again = affine_convolution(x, norm, weight, backend=backend)
    assert y.dtype == torch.float32
    again.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert norm.grad is None and weight.grad is None


def test_nothing_passes_where_a_relu_is_just_closed():
    """At exactly 0, as in PyTorch."""
    for backend in ("triton", "eager"):
        x = torch.zeros(1, 2, 3, 3, device=DEVICE, requires_grad=True)
        norm = torch.tensor([[1.0, 2, 0, 0]], device=DEVICE, requires_grad=True)
        weight = torch.ones(2, 2, 1, 1, device=DEVICE)
        y, _ = affine_convolution(x, norm, weight, backend=backend)
        (y + affine_relu(x, norm, backend=backend)).sum().backward()
        assert not x.grad.any() and not norm.grad.any()


def test_affine_convolution_keeps_nan():
    x, gain_and_shift, weight, residual = convolution_inputs(2, 3, 4, 6, 8, (4, 1), torch.float32)
    x[1, 2, 3, 4] = torch.nan
    residual[0, 1, 2, 3] = torch.nan
    for backend in ("triton", "eager"):
        inputs = [value.float() for value in (x, gain_and_shift, weight, residual)]
        y, _ = affine_convolution(*inputs, backend=backend)
        assert y.isnan().sum() == 5
        assert y[1, :, 3, 4].isnan().all() and y[0, 1, 2, 3].isnan()


# --------------------------------------------------------------------------------------------------
# Changes of size


RESIZED = [  # n, channels, height, width, layout
    (2, 3, 5, 7, "slice"),
    (2, 70, 3, 4, "channels last"),  # two blocks of channels
    (1, 17, 9, 11, "channels last"),  # more than a tile of positions
    (1, 2, 33, 19, "contiguous"),  # so, too
    (2, 3, 4, 6, "transposed"),
]
ENLARGED = [  # n, channels, height, width, the larger size, layout
    (1, 1, 1, 1, (5, 7), "contiguous"),
    (2, 3, 5, 2, (8, 4), "slice"),
    (1, 70, 2, 3, (4, 6), "channels last"),
    (1, 5, 4, 2, (30, 5), "channels last"),  # many large pixels for a small one
    (1, 260, 2, 5, (3, 7), "channels last"),  # more pixels in a line than a tile has
    (2, 2, 3, 4, (6, 8), "transposed"),
]


def run_and_differentiate(function, inputs, dtype, layout, backend):
    """The result of function(*inputs), and the inputs' gradients for a seeded gradient of it."""
    leaves = [laid_out(x.to(dtype), layout) for x in inputs]
    y = function(*leaves, backend=backend)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DTYPES[2])
    y.backward(torch.empty_like(y).copy_(gradient))  # in its layout
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def compare_backends(function, inputs, dtype, layout, roundings=1):
    """Triton against the eager form in float64."""
    results = run_and_differentiate(function, inputs, dtype, layout, "triton")
    expected = run_and_differentiate(function, inputs, torch.float64, layout, "eager")
    for actual, exact in zip(results, expected):
        assert actual.dtype == dtype
        close(actual, exact, roundings * TOLERANCES[dtype])
        if layout == "channels last":
            assert actual.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, channels, height, width, size, layout", ENLARGED)
def test_enlarge(n, channels, height, width, size, layout, dtype):
    torch.manual_seed(0)
    x = torch.randn(n, channels, height, width).to(DEVICE, dtype).double()

    def function(x, backend):
        return enlarge(x, size, backend=backend)

    # PyTorch rounds more than once on the way to the larger image.
    compare_backends(function, [x], dtype, layout, roundings=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, channels, height, width, layout", RESIZED)
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_max_pool(n, channels, height, width, layout, ceil_mode, dtype):
    torch.manual_seed(0)
    x = torch.randn(n, channels, height, width).relu()  # with ties: the first one is taken
    x = x.to(DEVICE, dtype).double()
    compare_backends(functools.partial(max_pool, ceil_mode=ceil_mode), [x], dtype, layout)


def test_pooled_parts_of_a_concatenation():
    """Gradients of such parts are slices of channels, and of any layout."""
    torch.manual_seed(0)
    gradient = torch.randn(2, 9, 4, 3, device=DEVICE)
    gradients = []
    for backend in ("triton", "eager"):
        leaf = torch.randn(2, 5, 8, 6, generator=torch.Generator().manual_seed(0))
        leaf = leaf.to(DEVICE, memory_format=torch.channels_last).requires_grad_()
        torch.cat([gradient[:, :4], max_pool(leaf, backend=backend)], 1).backward(gradient)
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_enlarged_parts_of_a_concatenation():
    """Gradients of such parts are slices of channels."""
    torch.manual_seed(0)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        gradients = []
        gradient = torch.randn(2, 9, 8, 6, device=DEVICE).to(memory_format=memory_format)
        for backend in ("triton", "eager"):
            leaf = torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(0))
            leaf = leaf.to(DEVICE, memory_format=memory_format).requires_grad_()
            large = enlarge(leaf, (8, 6), backend=backend)
            torch.cat([gradient[:, :4], large], 1).backward(gradient)
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients)
        assert gradients[0].is_contiguous(memory_format=memory_format)


def test_max_pool_keeps_nan():
    x = torch.randn(1, 2, 6, 6, device=DEVICE)
    x[0, 1, 3, 2] = torch.nan
    for backend in ("triton", "eager"):
        y = max_pool(x, backend=backend)
        assert y.isnan().sum() == 1 and y[0, 1, 1, 1].isnan()


# --------------------------------------------------------------------------------------------------
# BatchNorm within a convolution


@pytest.mark.parametrize("training", [True, False])
def test_normalized_convolution_is_batch_norm_then_convolution(training):
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(3, eps=0.1, momentum=0.3).double()
    norm.train(training)
    convolution = torch.nn.Conv2d(3, 4, 5, stride=2, padding=2)
    convolution.double()
    with torch.no_grad():
        for x in (norm.weight, norm.bias, norm.running_mean):
            x.normal_()
        norm.running_var.uniform_(0.5, 2)
    start = copy.deepcopy(norm.state_dict())
    x = torch.randn(6, 3, 9, 8, dtype=torch.float64)
    x.requires_grad_()
    leaves = [x, *norm.parameters(), *convolution.parameters()]

    expected = convolution(norm(x))
    gradient = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, leaves, gradient)
    statistics = [norm.running_mean.clone(), norm.running_var.clone()]

    norm.load_state_dict(start)
    output = normalized_conv2d(x, norm, convolution)
    torch.testing.assert_close(output, expected)
    grads = torch.autograd.grad(output, leaves, gradient)
    torch.testing.assert_close(grads, expected_grads)
    torch.testing.assert_close([norm.running_mean, norm.running_var], statistics)


# --------------------------------------------------------------------------------------------------
# The operators


def test_operators_are_registered_properly():
    mask, foreground, background, target = float_inputs(2, 5, 4)
    leaves = [x.requires_grad_() for x in (mask, foreground, background)]
    features, target_features = torch.randn(2, 2, 5, 3, 4, device=DEVICE)
    corners = torch.zeros(2, 4, dtype=torch.int64, device=DEVICE)
    operators = torch.ops.cgn
    check = torch.library.opcheck
    check(operators.composite_forward.default, (*leaves, target, 0.1, 0.9, torch.bfloat16))
    check(operators.composite_forward.default, (*leaves, None, 0.1, 0.9, None))
    leaf = features.clone().requires_grad_()
    check(operators.style_forward.default, (leaf, target_features))
    check(operators.style_forward.default, (features, gram_matrix(target_features)))
    check(operators.gather_patches.default, (target, corners, 2, 2))

    inputs = [x.detach() for x in leaves]
    one = mask.new_ones(())
    grads = [torch.ones_like(target), None, None, one, None, None]
    wanted = [True, False, True]
    mask_mean = mask.new_zeros(2)
    check(
        operators.composite_backward.default,
        (*inputs, target, mask_mean, grads, 0.1, 0.9, wanted),
    )
    signs = torch.ones(2, 5, 5, dtype=torch.int8, device=DEVICE)
    check(operators.style_backward.default, (signs, features, one))
    gain_and_shift = torch.randn(2, 10, device=DEVICE, requires_grad=True)
    check(operators.affine_forward.default, (leaf, gain_and_shift))
    check(operators.affine_backward.default, (features, gain_and_shift.detach(), features))
    check(operators.bias_relu.default, (features.clone(), gain_and_shift[0, :5].detach()))
    check(operators.relu_backward.default, (features, target_features, features))
    weight = torch.randn(4, 5, device=DEVICE)
    larger = torch.randn(2, 4, 6, 8, device=DEVICE)
    inputs = (features, gain_and_shift.detach(), weight)
    check(operators.pointwise_forward.default, (*inputs, features[:, :, ::3, ::4]))
    gradient = torch.randn(2, 4, 3, 4, device=DEVICE)
    check(operators.pointwise_backward.default, (*inputs, gradient, features))
    check(operators.sum_of_four.default, (larger, 5))
    check(operators.enlarge_backward.default, (features[:1, :2].clone(), 2, 3))
    check(operators.max_pool_forward.default, (leaf, True))
    pooled, found = operators.max_pool_forward(features, False)
    check(operators.max_pool_backward.default, (pooled, found, 3, 4))


def hot_path(mask, foreground, background, target):
    losses, copy = composite_losses_and_copy(
        mask, foreground, background, target, copy_dtype=torch.float32, backend="triton"
    )
    style = style_loss(copy, target, backend="triton")
    return losses.l1 + losses.binary + losses.mask_interval + style


def test_compiled_whole_and_no_second_derivative():
    mask, foreground, background, target = float_inputs(2, 8, 8)
    mask.requires_grad_()
    loss = hot_path(mask, foreground, background, target)
    (expected,) = torch.autograd.grad(loss, mask)
    torch._dynamo.reset()
    # With fullgraph, a graph break would be an error.
    compiled = torch.compile(hot_path, fullgraph=True, backend="aot_eager")
    loss = compiled(mask, foreground, background, target)
    (gradient,) = torch.autograd.grad(loss, mask)
    torch.testing.assert_close(gradient, expected)

    binary = composite_losses(mask, foreground, background, target, backend="triton").binary
    features = mask.expand(-1, 3, -1, -1)
    style = style_loss(features, target, backend="triton")
    for loss in (binary, style):
        (first,) = torch.autograd.grad(loss, mask, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula|differentiate twice"):
            first.sum().backward()


def network_path(x, gain_and_shift, weight, convolution):
    """A residual block, and frozen layers with two users each."""
    h, again = affine_convolution(x, gain_and_shift, weight, x[:, :4, ::2, ::2], backend="triton")
    y, other = convolution_relu(h, convolution, backend="triton")
    y = enlarge(max_pool(y, backend="triton"), (8, 6), backend="triton")
    return affine_relu(again, gain_and_shift, backend="triton")[:, :5] * y + other


def test_networks_are_compiled_whole():
    torch.manual_seed(0)
    leaves = [torch.randn(2, 6, 8, 6), torch.randn(2, 12), torch.randn(4, 6, 1, 1)]
    leaves = [leaf.to(DEVICE).requires_grad_() for leaf in leaves]
    convolution = torch.nn.Conv2d(4, 5, 3, padding=1).requires_grad_(False).to(DEVICE)
    expected = network_path(*leaves, convolution)
    gradient = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, leaves, gradient)
    torch._dynamo.reset()
    compiled = torch.compile(network_path, fullgraph=True, backend="aot_eager")
    y = compiled(*leaves, convolution)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, gradient), expected_grads)


def test_offsets_past_31_bits():
    """Images and channels 2^31 elements apart. The memory between them is never touched."""
    size = 2**32 + 1000
    big = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
    images = torch.randn(2, 2, 3, 4, 5, device=DEVICE)
    near, other = images.bfloat16()
    mask = torch.rand(2, 1, 4, 5, device=DEVICE)
    far_images = (2**31, 20, 5, 1)
    far_channels = (60, 2**30, 5, 1)
    for strides in (far_images, far_channels):
        far = big.as_strided((2, 3, 4, 5), strides)
        far.copy_(near)
        losses = composite_losses(mask, far, other, other, backend="triton")
        expected = composite_losses(mask, near, other, other, backend="eager")
        for x, y in zip(losses, expected, strict=True):
            close(x, y, TOLERANCES[x.dtype])
        style = style_loss(far, other, backend="triton")
        close(style, style_loss(near, other, backend="eager"), 1e-4)
        ones = torch.ones(2, 6, device=DEVICE)
        close(affine_relu(far, ones, backend="triton"), affine_relu(near, ones), 2**-7)
        close(max_pool(far, backend="triton"), max_pool(near), 0)
        weight = torch.ones(4, 3, dtype=torch.bfloat16, device=DEVICE)
        forward = eager.pointwise.pointwise_forward
        close(forward(far, ones, weight, None), forward(near, ones, weight, None), 0)
        grad = torch.ones(2, 4, 4, 5, dtype=torch.bfloat16, device=DEVICE)
        backward = eager.pointwise.pointwise_backward
        results = backward(far, ones, weight, grad, far)
        for x, y in zip(results, backward(near, ones, weight, grad, near), strict=True):
            close(x, y, 0)
        close(eager.pointwise.sum_of_four(far, 4), eager.pointwise.sum_of_four(near, 4), 0)
        enlarge_backward = eager.resize.enlarge_backward
        close(enlarge_backward(far, 2, 3), enlarge_backward(near, 2, 3), 0)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs programs one by one")
def test_same_bits_in_every_run():
    inputs = composite_inputs(3, 33, 40, torch.float32)
    gradients = output_gradients(3, 33, 40)
    features, target = torch.randn(2, 2, 70, 20, 20, device=DEVICE)  # positions of two programs
    gain_and_shift = torch.randn(2, 140, device=DEVICE)
    weight = torch.randn(30, 70, 1, 1, device=DEVICE)
    convolved = [features, gain_and_shift, weight, target]
    results = []
    for _ in range(2):
        outputs, _, grads = composite_run(inputs, torch.float32, "contiguous", "triton", gradients)
        style = style_run(features, target, torch.float32, "contiguous", "triton")
        norm = affine_run((features, gain_and_shift, target), torch.float32, "slice", "triton")
        block = convolution_run(convolved, torch.float32, "channels last", "triton")
        results.append([*outputs, *grads, *style, *norm, *block])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@pytest.fixture
def moved(monkeypatch):
    """A list of how many elements each load and store of a kernel moves."""
    from triton.runtime.interpreter import InterpreterBuilder

    moved = []
    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        original = getattr(InterpreterBuilder, name)

        def counting(self, *args, original=original, place=place):
            if args[place].data.size > 1:  # not a single scalar
                moved.append(int(args[place].data.sum()))
            return original(self, *args)

        monkeypatch.setattr(InterpreterBuilder, name, counting)
    return moved


@pytest.fixture
def bounded(monkeypatch):
    """Loads and stores outside the memory of a kernel's tensors are errors."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    spans = []
    original_arguments = GridExecutor._init_args_hst

    def note(self, *args):
        found = original_arguments(self, *args)
        storages = [x.untyped_storage() for x in found[0] if isinstance(x, torch.Tensor)]
        spans[:] = [(x.data_ptr(), x.data_ptr() + x.nbytes()) for x in storages]
        return found

    monkeypatch.setattr(GridExecutor, "_init_args_hst", note)
    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        original = getattr(InterpreterBuilder, name)

        def checked(self, *args, original=original, place=place):
            addresses = args[0].data[args[place].data.astype(bool)]
            outside = [(addresses < first) | (addresses >= last) for first, last in spans]
            assert not np.logical_and.reduce(outside).any(), "outside the tensors"
            return original(self, *args)

        monkeypatch.setattr(InterpreterBuilder, name, checked)


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter knows each address")
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_kernels_stay_within_their_tensors(bounded, layout):
    """With sizes that fill no block: masks that are missing often change no result."""
    float32 = torch.float32
    gradients = output_gradients(1, 3, 5)
    composite_run(composite_inputs(1, 3, 5, float32), float32, layout, "triton", gradients)
    features, target = torch.randn(2, 1, 17, 3, 5)
    style_run(features, target, float32, layout, "triton")
    style_run(features, gram_matrix(target), float32, layout, "triton")
    affine_run((features, torch.randn(1, 34), target), float32, layout, "triton")
    for residual in (None, (19, 1), (19, 2)):
        inputs = convolution_inputs(1, 17, 18, 2, 6, residual, float32)
        convolution_run(inputs, float32, layout, "triton")
    x = laid_out(features, layout)
    convolution = torch.nn.Conv2d(17, 17, 1).requires_grad_(False)
    torch.autograd.backward(convolution_relu(x, convolution, backend="triton"), [x, x])
    for mode in (False, True):
        y = max_pool(x, ceil_mode=mode, backend="triton")
        y.backward(y)
    y = enlarge(x, (5, 7), backend="triton")
    y.backward(y)
    sample_patch_images(
        torch.rand(1, 3, 9, 9), torch.rand(1, 1, 9, 9), **PATCH_SETTINGS, backend="triton"
    )


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter counts what a kernel moves")
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_composite_moves_13_elements_per_pixel_and_20_back(moved, layout):
    n = 2
    side = 64
    leaves = [laid_out(x, layout) for x in float_inputs(n, side, side)]
    target = leaves.pop().detach()
    losses = composite_losses(*leaves, target, backend="triton")
    forward = sum(moved)
    moved.clear()
    gradient, *others = output_gradients(n, side, side)
    torch.autograd.backward(list(losses), [laid_out(gradient, layout), *others[:4]])
    pixels = n * side * side
    partial = 3 * pixels // eager.composite.BLOCK
    cached = 3 * pixels if layout == "channels last" else 0  # the mask, once more for each channel
    # The sums of each program, and the mean masks.
    assert forward == 13 * pixels + cached + partial + n
    assert sum(moved) == 20 * pixels + cached


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter counts what a kernel moves")
def test_affine_relu_moves_2_elements_and_3_back(moved):
    x = torch.randn(2, 64, 48, 48).to(memory_format=torch.channels_last).requires_grad_()
    y = affine_relu(x, torch.randn(2, 128), backend="triton")
    block_p, _ = eager.affine.tile_sizes(x)
    tiles = 48 * 48 // block_p
    assert sum(moved) == 2 * x.numel() + tiles * 2 * 128  # gains and shifts for each tile
    moved.clear()
    y.backward(y.detach())
    _, shares = eager.affine.count_shares(x)
    assert shares > 1
    assert sum(moved) == 3 * x.numel() + shares * 2 * 128 * 2  # and their sums


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter counts what a kernel moves")
def test_bias_relu_moves_2_elements_and_4_back(moved):
    x = torch.randn(2, 64, 48, 48).to(memory_format=torch.channels_last)
    block_p, _ = eager.affine.tile_sizes(x)
    eager.affine.bias_relu(x, torch.randn(64))
    assert sum(moved) == 2 * x.numel() + 2 * 64 * (48 * 48 // block_p)  # biases for each tile
    moved.clear()
    eager.affine.relu_backward(x, x, x)
    assert sum(moved) == 4 * x.numel()


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter counts what a kernel moves")
def test_affine_convolution_moves_each_number_once(moved):
    """But x and the gradient of y twice, for the gradients of x and of the weight, as any
    convolution does. Weights, gains and shifts, and sums for their gradients, are moved once for
    each tile of positions.
    """
    n, channels, outputs, side = 2, 64, 16, 32
    x = torch.randn(n, channels, side, side).to(torch.float16, memory_format=torch.channels_last)
    leaf = x.clone().requires_grad_()
    norm = torch.randn(n, 2 * channels)
    weight = torch.randn(outputs, channels, 1, 1, dtype=torch.float16, requires_grad=True)
    residual = x[:, :, ::2, ::2]
    y, again = affine_convolution(leaf, norm, weight, residual, backend="triton")
    tiles = n * side**2 // 64
    of_tile = weight.numel() + 2 * channels
    # The residual's numbers are read once for each of four of y: from the cache.
    assert sum(moved) == x.numel() + 2 * y.numel() + tiles * of_tile
    moved.clear()
    torch.autograd.backward([y, again], [y.detach(), x])
    of_tile += 2 * channels + 2 * channels + weight.numel()
    assert sum(moved) == 4 * x.numel() + 2 * y.numel() + tiles * of_tile


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter counts what a kernel moves")
def test_changes_of_size_move_what_they_have_to(moved):
    h = torch.randn(1, 64, 32, 32).to(memory_format=torch.channels_last).requires_grad_()
    y = max_pool(h, backend="triton")
    assert sum(moved) == 1.5 * h.numel()
    moved.clear()
    y.backward(y.detach())
    assert sum(moved) == 1.5 * h.numel()


# --------------------------------------------------------------------------------------------------
# What cannot run


def test_auto_takes_triton_for_fast_dtypes_on_one_gpu():
    def tensor(dtype, device):
        return types.SimpleNamespace(dtype=dtype, device=device, is_cuda=device.startswith("cuda"))

    single = tensor(torch.float32, "cuda:0")
    assert kernels.use_triton("auto", single, tensor(torch.bfloat16, "cuda:0"))
    for other in (("float64", "cuda:0"), ("float32", "cuda:1"), ("float32", "cpu")):
        other = tensor(getattr(torch, other[0]), other[1])
        assert not kernels.use_triton("auto", single, other)
    assert not kernels.use_triton("eager", single)


def test_what_cannot_run_says_why():
    mask = torch.rand(2, 1, 4, 4)
    image = torch.rand(2, 3, 4, 4)
    with pytest.raises(ValueError, match="'auto', 'triton' or 'eager'"):
        composite_losses(mask, image, image, backend="cuda")
    shapes = r"mask should be \(N, 1, H, W\).*\(2, 1, 4, 4\), \(2, 3, 4, 5\)"
    with pytest.raises(ValueError, match=shapes):
        composite_losses(mask, torch.rand(2, 3, 4, 5), image)
    with pytest.raises(ValueError, match="images"):
        composite_losses(mask, image[:1], image, image)
    with pytest.raises(ValueError, match="not torch.float64"):
        style_loss(image.double(), image.double(), backend="triton")
    with pytest.raises(ValueError, match=r"\(N, C, C\)"):
        style_loss(image, torch.rand(2, 3, 5, 4))
    with pytest.raises(ValueError, match="no 100 windows of 15 x 15 in 20 x 20"):
        sample_patch_images(image, mask, work_size=20)
    with pytest.raises(ValueError, match="image should be"):
        sample_patch_images(image[:, :2], mask)
    windows = torch.zeros(3, 36, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"windows should be .*\(2, 36\), not \(3, 36\)"):
        sample_patch_images(image, mask, windows)
    with pytest.raises(ValueError, match=r"gain_and_shift \(N, 2 C\), not .* \(2, 3\)"):
        affine_relu(image, torch.rand(2, 3))
    weight = torch.rand(3, 3, 1, 1)
    for wrong in ((weight[:, :2], None), (weight, image[:, :2]), (weight, image[:, :, 1:, 1:])):
        with pytest.raises(ValueError, match=r"half the size, not \(2, 3, 4, 4\), \(2, 6\), "):
            affine_convolution(image, torch.rand(2, 6), *wrong)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) cannot be enlarged to \(8, 2\)"):
        enlarge(image, (8, 2))
    empty = image[:0]
    line = torch.rand(5)
    for wrong, call in (
        (r"\(0, 1, 4, 4\)", lambda: composite_losses(mask[:0], empty, empty)),
        (r"\(5,\)", lambda: composite_losses(line, image, image)),
        (r"\(0, 3, 4, 4\)", lambda: style_loss(empty, empty)),
        (r"\(5,\)", lambda: style_loss(line, line)),
        (r"\(5,\)", lambda: affine_relu(line, line)),
        (r"\(5,\)", lambda: affine_convolution(line, line, weight)),
        (r"\(2, 3, 1, 4\)", lambda: max_pool(image[:, :, :1])),
        (r"\(3, 4, 4\)", lambda: max_pool(image[0])),
    ):
        with pytest.raises(ValueError, match=f"should be .*{wrong}"):
            call()
    mask = mask.double()
    image = image.double()
    losses = composite_losses(mask, image, image)
    assert losses.binary.dtype == torch.float64  # eager


def without_interpreter():
    """The environment in which Triton compiles its kernels instead of interpreting them."""
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    return environment


def test_kernels_compile_for_gpus_of_three_generations():
    pytest.importorskip("triton.backends.nvidia")
    script = str(ROOT / "kernels" / "compile_check.py")
    done = subprocess.run(
        [sys.executable, script],
        env=without_interpreter(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "BAD" not in done.stdout
    names = (
        "forward",
        "finish",
        "backward",
        "difference",
        "absolute",
        "style_backward",
        "gather",
        "affine_forward",
        "affine_backward",
        "bias_relu",
        "relu_backward",
        "pointwise_forward",
        "pointwise_input",
        "pointwise_weight",
        "sum_of_four",
        "gather_line",
        "max_pool_forward",
        "max_pool_backward",
    )
    lines = done.stdout.splitlines()
    for name in names:
        for generation in ("sm_80", "sm_90", "sm_100"):
            found = [x for x in lines if x.startswith(generation) and f" {name}_kernel" in x]
            assert found, f"{name}_kernel for {generation}"


def test_training_with_either_kernels_logs_the_same_losses(tmp_path, few_digits, monkeypatch):
    torch.save(weights.random_vgg16_features(4), tmp_path / "vgg16_features.pth")
    flags = (
        f"--dataset colored_mnist --data-dir {few_digits} --weights-dir {tmp_path}"
        f" --device {DEVICE} --style-weights 1 1 0 0 --style-every 1 --warmup 1 --max-steps 2"
        " --log-every 1 --sample-every 0 --batch-size 3 --amp off --segmenter-steps 0"
    )
    logs = []
    for backend in ("triton", "eager"):
        out = tmp_path / backend
        command = ["train_cgn.py", *flags.split(), "--kernels", backend, "--out", str(out)]
        monkeypatch.setattr(sys, "argv", command)
        train_cgn.main()
        values = {}
        for line in (out / "log.jsonl").read_text().splitlines():
            row = json.loads(line)
            for name, value in row.items():
                values[f"{name} {row['step']}"] = value
        logs.append(values)
    assert logs[0] == pytest.approx(logs[1], rel=1e-3)
    assert "style 2" in logs[0]


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_kernels_that_need_a_gpu_say_so(tmp_path):
    flags = "--dataset colored_mnist --offline --kernels triton"
    script = str(ROOT / "train_cgn.py")
    out = str(tmp_path / "x")
    done = subprocess.run(
        [sys.executable, script, *flags.split(), "--out", out],
        env=without_interpreter(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert "--kernels triton" in done.stderr
    assert "needs tensors on a GPU" in done.stderr
    assert "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------------------
# The benchmark


def test_benchmark_writes_its_table(tmp_path):
    flags = (
        "--operations composite --shapes mnist --no-compile --seconds 0 --warmup 0 "
        "--device cpu --dtypes float32"
    )
    run("kernels/benchmark.py", *flags.split(), "--out", tmp_path)
    with (tmp_path / "benchmark.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3
    assert {row["phase"] for row in rows} == set(benchmark.PHASES)
    for row in rows:
        assert float(row["median us"]) > 0
        assert float(row["MB moved"]) > 0
    text = (tmp_path / "benchmark.md").read_text()
    assert text.count("\n|") == len(rows) + 2
    assert "Not timed" in text


def test_benchmark_times_convolutions_and_changes_of_size():
    args = types.SimpleNamespace(no_compile=True, warmup=0, seconds=0)
    device = torch.device(DEVICE)
    cases = [
        *benchmark.pointwise_cases(1, 8, torch.float32, device),
        *benchmark.resize_cases(1, 8, torch.float32, device),
    ]
    for case in cases:
        rows = benchmark.time_case(case, args, device)
        assert {phase for _, phase, *_ in rows} == set(benchmark.PHASES)


def test_benchmark_stops_at_a_wrong_result():
    right = [torch.ones(10), torch.tensor(2.0)]
    benchmark.check_results(right, right, torch.float32, "same")
    not_a_number = [right[0] * torch.nan, right[1]]
    half_a_percent = [right[0], right[1] * 1.005]
    for wrong in (not_a_number, half_a_percent):
        with pytest.raises(SystemExit, match="a form: result"):
            benchmark.check_results(wrong, right, torch.float32, "a form")


def test_bytes_of_every_case_of_the_benchmark():
    """The forms run on device "meta", where tensors have no numbers."""
    args = types.SimpleNamespace(operations=benchmark.OPERATIONS, shapes=list(benchmark.BATCHES))
    operations = set()
    for case in benchmark.all_cases(args, [torch.float32, torch.bfloat16], torch.device("meta")):
        operations.add(case.operation)
        moved = benchmark.bytes_by_variant(case)
        assert all(number > 0 for phases in moved.values() for number in phases), case.shape
    assert operations == set(benchmark.OPERATIONS)


def multiply_images(mask, image):
    return (mask * image,)


def test_bytes_are_counted_as_operations_move_them():
    mask = torch.rand(2, 1, 4, 4)
    image = torch.rand(2, 3, 4, 4)
    moved, least = benchmark.count_bytes(multiply_images, [mask], [image])
    forward, backward = moved
    channel = 4 * 2 * 16  # bytes
    assert forward == channel * (1 + 3 + 3)  # mask and image in, product out
    assert backward == channel * (3 + 3 + 3 + 3 + 1)
    assert least == [forward, channel * (1 + 3 + 3 + 1)]
