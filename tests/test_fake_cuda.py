"""Training steps on fake CUDA tensors, with shapes and types but no numbers: no GPU is needed.

They show tensors on two devices, values that the device is asked for, and float32 where bfloat16
was meant, because CUDA's autocast is not the CPU's. Derivatives ask a driver for a context: they
run where there is one, or with the development data's driver that does nothing.
"""

import collections
import os
import shutil
import subprocess
import sys
import types

import pytest
import torch
from conftest import folder_from
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_cgn
import train_classifier
from data import mnist, weights
from data.synthetic import synthetic_digits
from kernels import draw_patch_windows, layers, shuffle_patches

pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.11", reason="fake tensors of older PyTorch need a GPU"
)
CUDA = torch.device("cuda")
# What moves no memory.
FREE = {
    "aten::detach",
    "aten::empty.memory_format",
    "aten::empty_like",
    "aten::_unsafe_view",
    "prim::device",
}
READS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"}
WITH_DRIVER = torch.cuda.is_available() or bool(os.environ.get("CGN_NO_DRIVER"))


class Tally(TorchDispatchMode):
    """Counts operators and the bytes that they move, values read, and float32 results by shape."""

    def __init__(self):
        super().__init__()
        self.operators = 0
        self.bytes = 0
        self.reads = collections.Counter()  # and uploads, for which a GPU is waited for as well
        self.float32 = collections.Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        name = operator.name()
        uploaded = any(x.dim() and x.device.type == "cpu" for x in inputs)
        if name in READS or uploaded and any(x.device.type == "cuda" for x in outputs):
            self.reads[name] += 1
        if operator.is_view or name in FREE:
            return result
        self.operators += 1
        self.bytes += sum(x.numel() * x.element_size() for x in inputs + outputs)
        for x in outputs:
            if x.dtype == torch.float32:
                self.float32[tuple(x.shape)] += 1
        return result


@pytest.fixture
def fake_cuda(monkeypatch):
    """Tensors on CUDA are fake, on a GPU that has bfloat16."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch.nn.Module, "_apply", replace_tensors)
    taps = layers.upsampling_taps  # uploaded once in a run
    taps.cache_clear()
    device = torch.device("cuda", 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for dtype in (torch.float32, torch.bfloat16):
            taps(device, dtype)
        yield
    taps.cache_clear()


def replace_tensors(module, function, recurse=True):
    """What `module.to` does, without the exchange of contents, which fake tensors do not take."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                value = torch.nn.Parameter(function(value.detach()), value.requires_grad)
                part._parameters[name] = value
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = function(value)
    return module


def make_vgg(convolutions):
    """VGG-16 without numbers."""
    blank = weights.vgg16_blank(convolutions)
    vgg = weights.VGG16Features({name: torch.empty(x.shape) for name, x in blank.items()})
    return vgg.to(CUDA, torch.bfloat16)


def is_activation(shape, n):
    """Whether a shape is that of many channels of n images, or of twice as many: not of images."""
    return len(shape) == 4 and shape[0] in (n, 2 * n) and shape[1] > 6


def imagenet_batch(derivatives):
    """A Tally of one batch of 16 images of 256 x 256: targets, mechanisms, losses."""
    n = 16
    args = train_cgn.parse_args("--dataset imagenet --out x --offline".split())
    with CUDA:
        cgn = train_cgn.ImageNetCGN().train()
        train_cgn.fold(cgn.biggan_GT).to(torch.bfloat16)
        cgn.u2net.to(torch.bfloat16)
        for layer in cgn.u2net.modules():
            if isinstance(layer, weights.ConvNormReLU):
                layer.bn_s1 = torch.nn.Identity()  # as if folded: fusing takes no fake tensors
        vgg = make_vgg(10)
        z = torch.randn(n, cgn.f_shape.z_dim)
        y = torch.zeros(n, dtype=torch.int64)
        windows = draw_patch_windows(n, device=CUDA)
        cgn.to(memory_format=torch.channels_last)
        derived = train_cgn.derive(cgn, args.truncation, torch.bfloat16)
    with Tally() as tally:
        with torch.no_grad():
            x_gt = cgn.biggan_GT(z.bfloat16(), y)
        with torch.autocast("cuda", torch.bfloat16):
            outputs = cgn(z, y[:, None].expand(-1, 3))
        losses, mask_mean = train_cgn.imagenet_losses(args, vgg, outputs, x_gt, windows)
        if derivatives:
            sum(losses.values()).backward()
    assert x_gt.dtype == torch.float32 and mask_mean.shape == (n,)
    assert set(losses) >= {"reconstruction", "style", "texture"}
    assert not tally.reads
    assert [shape for shape in tally.float32 if is_activation(shape, n)] == []
    if derivatives:
        train_cgn.pass_gradients(derived)
        trainable = [p for p in cgn.parameters() if p.requires_grad]
        assert all(p.grad.device == p.device and p.grad.dtype == p.dtype for p in trainable)
    return tally


def test_imagenet_stays_in_bfloat16(fake_cuda):
    tally = imagenet_batch(derivatives=False)
    # A little above what was counted: 900 operators and 57 GB without a driver; one brings fused
    # attention. What depends on the weights alone is computed once per step, and not counted.
    assert tally.operators < 950
    assert tally.bytes < 60e9


@pytest.mark.skipif(not WITH_DRIVER, reason="derivatives on CUDA need a driver")
def test_imagenet_with_derivatives(fake_cuda):
    tally = imagenet_batch(derivatives=True)
    # Counted: 1,795 operators, 107 GB.
    assert tally.operators < 1_850
    assert tally.bytes < 110e9


def to_cuda(value):
    """Tensors, also in lists, on CUDA; anything else as it is."""
    if isinstance(value, list):
        return [to_cuda(part) for part in value]
    return value.to(CUDA) if isinstance(value, torch.Tensor) else value


def fake_variant(name):
    """A MnistVariant on fake CUDA: made on the CPU, where its colors can be drawn."""
    with unset_fake_temporarily():
        digits, labels = synthetic_digits(100, seed=0)
        textures = [torch.zeros(10, 3, 150, 150, dtype=torch.uint8)] * 2
        data = mnist.MnistVariant(name, digits, labels, textures, 0, torch.device("cpu"))
    for key, value in vars(data).items():
        setattr(data, key, to_cuda(value))
    return data


def mnist_step(dataset, warming_up, derivatives):
    """A Tally of a step with all that may be in it, or of its forward part."""
    args = train_cgn.parse_args(["--dataset", dataset, "--out", "x"])
    data = fake_variant(dataset)
    n = args.batch_size
    with CUDA:
        cgn = train_cgn.MnistCGN(texture_padding=args.texture_padding)
        average = train_cgn.MnistCGN(texture_padding=args.texture_padding).requires_grad_(False)
        discriminator = train_cgn.DISCRIMINATORS[args.discriminator](args.ndf, 10, 32)
        vgg = make_vgg(10)
        index = torch.arange(n, device=CUDA)
    due = {"warming_up": warming_up, "style": not warming_up}
    if derivatives:
        networks = {"generator": cgn, "average": average, "discriminator": discriminator}
        optimizers = [make_adam(cgn), make_adam(discriminator)]
        training = types.SimpleNamespace(networks=networks, optimizers=optimizers)
        decay = torch.full((), 0.9, device=CUDA)
        with Tally() as tally:
            losses = train_cgn.mnist_step(
                args, training, data, vgg, True, index, decay, penalty=True, **due
            )
    else:
        with Tally() as tally:
            x_gt = mnist.to_float(data.images(index, None))
            y = data.labels[index]
            with torch.autocast("cuda", torch.bfloat16):
                mask, foreground, background = cgn(torch.randn(n, 32, device=CUDA), y)
            offsets = torch.randint(32, (2, n, 2), device=CUDA)
            mechanisms = (mask, *map(shuffle_patches, (foreground, background), offsets))
            losses, composite, _ = train_cgn.generator_losses(
                args, vgg, discriminator, mechanisms, x_gt, y, **due
            )
        assert composite.device.type == "cuda"
    assert ("style" in losses) == (not warming_up)
    assert not tally.reads
    return tally


def make_adam(network):
    """Adam as in training, after a first step, which reads a value."""
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("dataset", mnist.VARIANTS)
@pytest.mark.parametrize("warming_up", [True, False])
def test_mnist_reads_nothing_back(fake_cuda, dataset, warming_up):
    assert mnist_step(dataset, warming_up, derivatives=False).operators < 400


@pytest.mark.skipif(not WITH_DRIVER, reason="derivatives on CUDA need a driver")
@pytest.mark.parametrize("dataset", mnist.VARIANTS)
def test_mnist_with_derivatives(fake_cuda, dataset):
    assert mnist_step(dataset, False, derivatives=True).operators < 700


@pytest.mark.skipif(WITH_DRIVER, reason="they ran above")
def test_derivatives_with_a_driver_that_does_nothing(tmp_path):
    """The tests with derivatives, in a process that takes the driver for a GPU's."""
    folder = folder_from("CGN_FIXTURES")
    source = folder and folder.parent / "gpu" / "no_driver.c"
    if not source or not source.is_file() or not shutil.which("gcc"):
        pytest.skip("no gcc, or no gpu/no_driver.c beside CGN_FIXTURES")
    library = tmp_path / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-w", "-o", library, source, "-ldl"]
    subprocess.run(["gcc", *map(str, options)], check=True)
    environment = {"CGN_NO_DRIVER": "1", "LD_PRELOAD": str(library)}
    environment["LD_LIBRARY_PATH"] = str(tmp_path)
    tests = ["-m", "pytest", "-q", "--processes", "1", __file__, "-k", "with_derivatives"]
    done = subprocess.run(
        [sys.executable, *tests],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert "4 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


def test_the_digit_classifier_reads_nothing_back(fake_cuda):
    with CUDA:
        classifier = train_classifier.MnistClassifier()
        x = torch.zeros(64, 3, 32, 32)
    with Tally() as tally, torch.autocast("cuda", torch.bfloat16):
        classifier.log_probabilities(classifier.features(x))
    assert not tally.reads
    assert tally.operators < 40
