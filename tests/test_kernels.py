"""Triton kernels against the eager forms and float64: interpreted on a CPU, compiled on a GPU."""
import csv
import json
import os
import subprocess
import sys

import pytest
import torch

import kernels
import train_cgn
from conftest import ROOT, run
from kernels import benchmark, composite_losses, composite_losses_and_copy, gram_matrix, sample_patch_images, style_loss

pytestmark = pytest.mark.skipif(kernels.gram is None, reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = torch.float32, torch.float16, torch.bfloat16
INTERPRETED = DEVICE == "cpu"


def tolerance(dtype):
    """One step of the dtype: Triton's interpreter cuts bfloat16 off where a GPU rounds."""
    return {torch.float32: 1e-5, torch.float16: 2 ** -10, torch.bfloat16: 2 ** -7, torch.float64: 1e-5}[dtype]


def close(actual, expected, relative, name=""):
    """Within `relative` of each element, or of the largest of all for what is nearly 0."""
    expected = expected.to(actual.dtype)
    scale = expected.abs().max().item() if expected.numel() else 0
    torch.testing.assert_close(actual, expected, rtol=relative, atol=relative * scale / 8 + 1e-30,
                               msg=lambda text: f"{name}: {text}")


def laid_out(x, layout):
    """The same values in another memory layout, as a leaf that records gradients."""
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "transposed":                           # no stride leads from pixel to pixel
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "slice":
        n, c, h, w = x.shape
        padded = x.new_full((n, c + 1, h + 2, w + 3), torch.nan)
        padded[:, 1:, 1:-1, 2:-1] = x
        x = padded[:, 1:, 1:-1, 2:-1]
    return x.detach().requires_grad_()


def composite_inputs(n, height, width, dtype):
    """Mask with all that it can hold, foreground, background and target, in dtype's values but float64."""
    torch.manual_seed(n * 100 + height)
    mask = torch.rand(n, 1, height, width).clamp(1e-4, 1 - 1e-4)
    mask[0] *= 0.05                                        # below the interval
    mask[-1, 0, 0, -1], mask[-1, 0, -1, 0] = 1e-4, 1 - 1e-4
    mask[-1, 0, 0, 0] = 0.0
    mask[-1, 0, -1, -1] = 1.0
    images = torch.randn(3, n, 3, height, width)
    images[2, :, 0] = images[1, :, 0]                      # where the mask is 0, the error is exactly 0
    return [x.to(dtype).double().to(DEVICE) for x in (mask, *images)]


def composite_run(inputs, dtype, layout, backend, gradients, copy_dtype=None):
    """All outputs and gradients of mask, foreground and background, for given gradients of the outputs."""
    *leaves, target = [laid_out(x.to(dtype), layout) for x in inputs]
    losses, copy = composite_losses_and_copy(*leaves, target, copy_dtype=copy_dtype, backend=backend)
    pairs = [(x, g.to(x.dtype)) for x, g in zip((*losses, copy), gradients) if g is not None and x is not None]
    torch.autograd.backward(*zip(*pairs))
    return [x.detach() for x in losses], copy, [leaf.grad for leaf in leaves]


def output_gradients(n, height, width, dtype=torch.float32):
    """Random gradients for composite, l1, binary, mask_mean, mask_interval and copy, of one size for each pixel."""
    torch.manual_seed(7)
    images, pixels = torch.randn(2, n, 3, height, width, device=DEVICE), n * height * width
    return [images[0].to(dtype).float(), *(torch.tensor([3.0, 2.0], device=DEVICE) * pixels),
            torch.randn(n, device=DEVICE) * pixels, torch.tensor(5.0 * pixels, device=DEVICE),
            images[1].bfloat16().float()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, height, width, layout", [
    (1, 1, 1, "contiguous"), (2, 1, 7, "channels last"), (5, 7, 1, "slice"), (3, 32, 32, "contiguous"),
    (2, 33, 32, "transposed"), (3, 32, 33, "channels last"), (1, 100, 100, "slice"), (5, 7, 100, "contiguous")])
def test_composite(n, height, width, layout, dtype):
    inputs, gradients = composite_inputs(n, height, width, dtype), output_gradients(n, height, width, dtype)
    gradients[0] = gradients[0].to(memory_format=torch.channels_last)
    runs = [composite_run(inputs, dtype if backend == "triton" else other, layout, backend, gradients, torch.bfloat16)
            for backend, other in (("triton", dtype), ("eager", dtype), ("eager", torch.float64))]
    (outputs, copy, grads), *others = runs
    for reference, reference_copy, reference_grads in others:
        for name, x, y in zip(kernels.CompositeLosses._fields, outputs, reference):
            close(x, y, max(tolerance(x.dtype), 2e-6), name)
        close(copy, reference_copy, tolerance(torch.bfloat16), "copy")
        for name, x, y in zip(("mask", "foreground", "background"), grads, reference_grads):
            close(x, y, tolerance(dtype), f"gradient of {name}")
    assert copy.is_contiguous(memory_format=torch.channels_last) and copy.dtype == torch.bfloat16
    assert outputs[0].dtype == dtype and all(x.dtype == torch.float32 for x in outputs[1:])


@pytest.mark.parametrize("which", range(6))
def test_gradients_of_single_outputs(which):
    inputs, gradients = composite_inputs(2, 9, 5, torch.float32), [None] * 6
    gradients[which] = output_gradients(2, 9, 5)[which]
    _, _, grads = composite_run(inputs, torch.float32, "contiguous", "triton", gradients, torch.float16)
    _, _, expected = composite_run(inputs, torch.float32, "contiguous", "eager", gradients, torch.float16)
    for x, y in zip(grads, expected):
        close(x, torch.zeros_like(x) if y is None else y, 2e-5)


@pytest.mark.parametrize("recording", [(True, False, False), (False, True, False), (False, False, True)])
def test_inputs_without_gradient_get_none(recording):
    *inputs, target = [x.float() for x in composite_inputs(2, 5, 6, torch.float32)]
    results = []
    for backend in ("triton", "eager"):
        leaves = [x.clone().requires_grad_(r) for x, r in zip(inputs, recording)]
        losses = composite_losses(*leaves, target.requires_grad_(), mask_interval=(0.4, 0.45), backend=backend)
        (losses.composite.square().sum() + losses.l1 + losses.binary + losses.mask_interval).backward()
        assert [leaf.grad is not None for leaf in leaves] == list(recording) and target.grad is None
        results.append(leaves[recording.index(True)].grad)
    close(*results, 1e-5)
    assert not composite_losses(*inputs, target.detach(), backend="triton").composite.requires_grad
    assert composite_losses(*inputs, backend="triton").l1 is None


def test_mixed_dtypes_and_expanded_inputs():
    mask, foreground, background, target = composite_inputs(2, 6, 5, torch.bfloat16)
    args = mask.float(), foreground.bfloat16(), background[:1].half().expand(2, -1, -1, -1), target.float()
    fast, slow = (composite_losses(*args, backend=backend) for backend in ("triton", "eager"))
    for x, y in zip(fast, slow):
        assert x.dtype == y.dtype
        close(x, y, tolerance(x.dtype))


def test_nan_is_not_hidden():
    mask, foreground, background, target = [x.float() for x in composite_inputs(2, 4, 4, torch.float32)]
    mask[1, 0, 1, 1] = torch.nan
    for backend in ("triton", "eager"):
        losses = composite_losses(mask, foreground, background, target, backend=backend)
        assert losses.composite[1, :, 1, 1].isnan().all() and losses.composite.isnan().sum() == 3
        assert losses.l1.isnan() and losses.binary.isnan() and losses.mask_interval.isnan()
        assert losses.mask_mean.isnan().tolist() == [False, True]


def style_run(features, target, dtype, layout, backend):
    leaf = laid_out(features.to(dtype), layout)
    loss = style_loss(leaf, target.to(dtype) if target.ndim == 4 else target.to(loss_dtype(dtype)), backend=backend)
    (loss * 1000).backward()
    return loss.detach(), leaf.grad


def loss_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, channels, height, width, layout", [
    (1, 3, 1, 1, "contiguous"), (5, 3, 7, 33, "slice"), (2, 17, 33, 7, "channels last"), (3, 64, 32, 32, "contiguous"),
    (1, 64, 100, 100, "channels last"), (2, 130, 7, 32, "transposed"), (1, 512, 7, 7, "contiguous"),
    (2, 512, 1, 7, "channels last")])
def test_style_loss(n, channels, height, width, layout, dtype):
    torch.manual_seed(0)
    features, target = torch.rand(2, n, channels, height, width).to(dtype).to(DEVICE).double()
    for goal in (target, gram_matrix(target)):
        loss, grad = style_run(features, goal, dtype, layout, "triton")
        assert loss.dtype == torch.float32 and grad.dtype == dtype
        for other in (dtype, torch.float64):
            reference, reference_grad = style_run(features, goal, other, layout, "eager")
            close(loss, reference, 1e-4)
            # a difference near 0 may have another sign, and a gradient is a sum of signs
            relative = max(tolerance(dtype), 1e-3)
            flips = ((grad.double() - reference_grad.double()).abs() > relative * reference_grad.abs().max()).sum()
            assert flips <= 0.001 * grad.numel(), flips
    assert layout != "channels last" or grad.is_contiguous(memory_format=torch.channels_last)


def test_style_loss_of_equal_features_is_zero_but_for_rounding():
    features = torch.randn(2, 20, 40, 11, device=DEVICE)
    assert style_loss(features, features.clone(), backend="triton") < 1e-6 * gram_matrix(features).abs().mean()


def test_splits_stay_within_the_workspace():
    """Few positions to split, many to split, and so many bytes of sums that there is room for no split."""
    for n, channels, side in [(1, 64, 256), (16, 64, 256), (1, 512, 4), (64, 512, 64), (512, 512, 32), (16, 128, 128)]:
        features = torch.empty(1, 1, 1, 1, device=DEVICE, dtype=torch.bfloat16).expand(n, channels, side, side)
        block_c, block_p = kernels.gram.blocks(features)
        splits, chunk = kernels.gram.split_positions(features, block_c, block_p)
        assert splits == 1 or splits * n * channels ** 2 * 4 <= kernels.gram.WORKSPACE
        assert chunk % block_p == 0 and (splits - 1) * chunk < side ** 2 <= splits * chunk


def slow_patches(image, mask, patch_size, top, grid, work_size, generator):
    """The definition, window by window."""
    size = image.shape[2:]
    image, mask = (torch.nn.functional.interpolate(x, (work_size, work_size), mode="bicubic") for x in (image, mask))
    steps, results = work_size - patch_size + 1, []
    drawn = torch.randint(top, (len(image), grid ** 2), generator=generator)
    for n in range(len(image)):
        corners = [(mask[n, 0, y:y + patch_size, x:x + patch_size].mean().item(), -y, -x)
                   for y in range(steps) for x in range(steps)]
        best = sorted(corners, reverse=True)[:top]
        rows = []
        for row in drawn[n].view(grid, grid).tolist():
            corners = [(-best[k][1], -best[k][2]) for k in row]
            rows.append(torch.cat([image[n, :, y:y + patch_size, x:x + patch_size] for y, x in corners], 2))
        results.append(torch.cat(rows, 1))
    return torch.nn.functional.interpolate(torch.stack(results), size, mode="bicubic")


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_patch_images(backend):
    torch.manual_seed(0)
    image, mask = torch.rand(2, 3, 40, 30), torch.rand(2, 1, 40, 30).requires_grad_()
    settings = dict(patch_size=5, top=9, grid=3, work_size=24)
    expected = slow_patches(image, mask.detach(), **settings, generator=torch.Generator().manual_seed(3))
    images = sample_patch_images(image.to(DEVICE), mask.to(DEVICE), **settings, backend=backend,
                                 generator=torch.Generator().manual_seed(3))
    assert images.shape == image.shape and not images.requires_grad
    torch.testing.assert_close(images.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_patch_images_as_published_come_from_the_mask():
    """15 x 15 windows, 100 best, 6 x 6: all texture of the right half, where the mask is, and none of the left."""
    image = torch.zeros(1, 3, 256, 256)
    image[..., 128:] = torch.rand(256, 128)
    mask = torch.zeros(1, 1, 256, 256)
    mask[..., 160:] = 1
    patches = sample_patch_images(image, mask)
    assert patches.shape == (1, 3, 256, 256) and patches.std() > 0.1
    assert not torch.equal(patches, sample_patch_images(image, mask))                # drawn anew
    image[..., 128:] = 0
    assert sample_patch_images(image, mask).abs().max() < 1e-5


def test_operators_are_registered_properly():
    mask, foreground, background, target = [x.float() for x in composite_inputs(2, 5, 4, torch.float32)]
    leaves = [x.requires_grad_() for x in (mask, foreground, background)]
    features, corners = torch.randn(2, 2, 20, 3, 4, device=DEVICE), torch.zeros(2, 4, dtype=torch.int64, device=DEVICE)
    operators = torch.ops.cgn
    torch.library.opcheck(operators.composite_forward.default, (*leaves, target, 0.1, 0.9, torch.bfloat16))
    torch.library.opcheck(operators.composite_forward.default, (*leaves, None, 0.1, 0.9, None))
    torch.library.opcheck(operators.style_forward.default, (features[0].clone().requires_grad_(), features[1]))
    torch.library.opcheck(operators.style_forward.default, (features[0], gram_matrix(features[1])))
    torch.library.opcheck(operators.gather_patches.default, (target, corners, 2, 2))
    grads = [torch.ones_like(target), None, None, mask.new_ones(()), None, None]
    torch.library.opcheck(operators.composite_backward.default, (
        *[x.detach() for x in leaves], target, mask.new_zeros(2), grads, 0.1, 0.9, [True, False, True]))
    signs = torch.ones(2, 20, 20, dtype=torch.int8, device=DEVICE)
    torch.library.opcheck(operators.style_backward.default, (signs, features[0], features.new_ones(())))


def hot_path(mask, foreground, background, target):
    losses, copy = composite_losses_and_copy(mask, foreground, background, target, copy_dtype=torch.float32,
                                             backend="triton")
    return losses.l1 + losses.binary + losses.mask_interval + style_loss(copy, target, backend="triton")


def test_compiled_whole_and_no_second_derivative():
    mask, foreground, background, target = [x.float() for x in composite_inputs(2, 8, 8, torch.float32)]
    mask.requires_grad_()
    expected, = torch.autograd.grad(hot_path(mask, foreground, background, target), mask)
    torch._dynamo.reset()
    compiled = torch.compile(hot_path, fullgraph=True, backend="aot_eager")          # a graph break would be an error
    torch.testing.assert_close(torch.autograd.grad(compiled(mask, foreground, background, target), mask)[0], expected)
    for loss in (composite_losses(mask, foreground, background, target, backend="triton").binary,
                 style_loss(mask.expand(-1, 3, -1, -1), target, backend="triton")):
        first, = torch.autograd.grad(loss, mask, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula|differentiate twice"):
            first.sum().backward()


def test_offsets_past_31_bits():
    """Images and channels 2^31 elements apart. The memory between them is never touched."""
    big = torch.empty(2 ** 32 + 1000, dtype=torch.bfloat16, device=DEVICE)
    small = torch.randn(2, 2, 3, 4, 5, device=DEVICE).bfloat16()
    mask = torch.rand(2, 1, 4, 5, device=DEVICE)
    for strides in ((2 ** 31, 20, 5, 1), (60, 2 ** 30, 5, 1)):
        far = big.as_strided((2, 3, 4, 5), strides)
        far.copy_(small[0])
        loss = composite_losses(mask, far, small[1], small[1], backend="triton")
        for x, y in zip(loss, composite_losses(mask, small[0], small[1], small[1], backend="eager")):
            close(x, y, tolerance(x.dtype))
        close(style_loss(far, small[1], backend="triton"), style_loss(small[0], small[1], backend="eager"), 1e-4)


def test_same_bits_in_every_run():
    inputs = composite_inputs(3, 33, 40, torch.float32)
    gradients, features = output_gradients(3, 33, 40), torch.randn(2, 2, 70, 20, 20, device=DEVICE)
    first, again = ([*outputs, *grads, *style_run(*features, torch.float32, "contiguous", "triton")] for
                    outputs, _, grads in (composite_run(inputs, torch.float32, "contiguous", "triton", gradients)
                                          for _ in range(2)))
    assert all(torch.equal(x, y) for x, y in zip(first, again))


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter counts what a kernel moves")
def test_composite_moves_13_elements_per_pixel_and_20_back(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder
    moved = []
    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        original = getattr(InterpreterBuilder, name)

        def counting(self, *args, original=original, place=place):
            if args[place].data.size > 1:                                             # not a single scalar
                moved.append(int(args[place].data.sum()))
            return original(self, *args)

        monkeypatch.setattr(InterpreterBuilder, name, counting)
    n, side = 2, 64
    *leaves, target = [x.float() for x in composite_inputs(n, side, side, torch.float32)]
    losses = composite_losses(*[x.requires_grad_() for x in leaves], target, backend="triton")
    forward = sum(moved)
    moved.clear()
    torch.autograd.backward([*losses], output_gradients(n, side, side)[:5])
    pixels, partial = n * side * side, 3 * n * side * side // kernels.composite.BLOCK
    assert forward == 13 * pixels + partial + n           # the sums of each program, and the mean masks
    assert sum(moved) == 20 * pixels


def test_what_cannot_run_says_why():
    mask, image = torch.rand(2, 1, 4, 4), torch.rand(2, 3, 4, 4)
    with pytest.raises(ValueError, match="'auto', 'triton' or 'eager'"):
        composite_losses(mask, image, image, backend="cuda")
    with pytest.raises(ValueError, match=r"mask should be \(N, 1, H, W\).*\(2, 1, 4, 4\), \(2, 3, 4, 5\)"):
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
    assert composite_losses(mask.double(), image.double(), image.double()).binary.dtype == torch.float64   # eager


def compiled():
    """The environment in which Triton compiles its kernels instead of interpreting them."""
    return {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def test_kernels_compile_for_gpus_of_three_generations_without_spilling():
    pytest.importorskip("triton.backends.nvidia")
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "compile_kernels.py")], env=compiled(),
                          capture_output=True, text=True, timeout=400)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in ("forward", "finish", "backward", "difference", "absolute", "style_backward", "gather"):
        for generation in ("sm_80", "sm_90", "sm_100"):
            assert any(line.startswith(generation) and f" {name}_kernel" in line for line in done.stdout.splitlines())


def test_training_with_either_kernels_logs_the_same_losses(tmp_path, monkeypatch):
    logs = []
    for backend in ("triton", "eager"):
        monkeypatch.setattr(sys, "argv", [
            "train_cgn.py", "--dataset", "colored_mnist", "--offline", "--warmup", "1", "--max-steps", "2", "--style-every", "1",
            "--log-every", "1", "--sample-every", "0", "--batch-size", "3", "--device", DEVICE, "--amp", "off",
            "--kernels", backend, "--out", str(tmp_path / backend)])
        train_cgn.main()
        lines = [json.loads(line) for line in (tmp_path / backend / "log.jsonl").read_text().splitlines()]
        logs.append({f"{name} {line['step']}": value for line in lines for name, value in line.items()})
    assert logs[0] == pytest.approx(logs[1], rel=1e-3) and "style 2" in logs[0]


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_kernels_that_need_a_gpu_say_so(tmp_path):
    command = [sys.executable, str(ROOT / "train_cgn.py"), "--dataset", "colored_mnist", "--offline", "--kernels", "triton",
               "--out", str(tmp_path / "x")]
    done = subprocess.run(command, env=compiled(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "--kernels triton" in done.stderr and "needs tensors on a GPU" in done.stderr
    assert "Traceback" not in done.stderr


def test_benchmark_writes_its_table(tmp_path):
    run("kernels/benchmark.py", "--operations", "composite", "--shapes", "mnist", "--no-compile", "--seconds", 0,
        "--rotate", 4, "--warmup", 0, "--device", "cpu", "--dtypes", "float32", "--out", tmp_path)
    rows = list(csv.DictReader((tmp_path / "benchmark.csv").open()))
    assert len(rows) == 3 * 2 * 3 and {row["phase"] for row in rows} == set(benchmark.PHASES)
    assert all(float(row["median us"]) > 0 and float(row["MB moved"]) > 0 for row in rows)
    assert (tmp_path / "benchmark.md").read_text().count("\n|") == len(rows) + 2
    assert "Not timed" in (tmp_path / "benchmark.md").read_text()


def test_benchmark_stops_at_a_wrong_result():
    right = [torch.ones(10), torch.tensor(2.0)]
    benchmark.check(right, right, torch.float32, "same")
    for wrong in ([torch.full((10,), torch.nan), right[1]], [right[0], torch.tensor(2.01)]):
        with pytest.raises(SystemExit, match="a form: result"):
            benchmark.check(wrong, right, torch.float32, "a form")


def test_bytes_are_counted_as_operations_move_them():
    mask, image = torch.rand(2, 1, 4, 4), torch.rand(2, 3, 4, 4)
    moved, least = benchmark.count_bytes(lambda m, f: (m * f,), [mask], [image])
    assert moved[0] == 4 * 2 * 16 * (1 + 3 + 3) == least[0]                           # mask and image in, product out
    assert moved[1] == 4 * 2 * 16 * (3 + 3 + 3 + 3 + 1) and least[1] == 4 * 2 * 16 * (1 + 3 + 3 + 1)
