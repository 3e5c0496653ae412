"""Compile every Triton kernel for sm_80, sm_90 and sm_100, without a GPU, and print what it takes.

    python kernels/compile_check.py          # the default configuration of each kernel
    python kernels/compile_check.py --all    # and those that tuning may choose

The kernels are called as training calls them, on CPU tensors, and what would have been launched is
compiled instead. Exit code 1 if a kernel spills more than a few registers or does not fit into
shared memory; the line of such a kernel ends in BAD.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # it would keep the kernels from being compiled
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels import affine, composite, gram, patches, pointwise, resize  # noqa: E402

SPILLED = 16  # bytes at most: what is put aside before a loop and taken up again after it
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may use
TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int64: "i64",
}


class Launch(NamedTuple):
    """What triton.compile needs to know of a launch."""

    module: str
    kernel: str
    signature: dict  # argument -> type
    constants: dict  # argument -> value
    attributes: dict  # (position of an argument,) -> what is known of its value
    options: dict  # num_warps, num_stages


# --------------------------------------------------------------------------------------------------
# What training launches


def describe_launch(kernel, args, kwargs, options):
    """As Triton does: None and 1 are constants, and multiples of 16 are known to be such."""
    signature = {}
    constants = {}
    attributes = {}
    values = dict(zip(kernel.arg_names, args)) | kwargs
    for index, (name, value) in enumerate(values.items()):
        divisible = False
        if name in kwargs or value is None or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            divisible = value % 16 == 0
        else:
            signature[name] = "*" + TYPE_NAMES[value.dtype]
            divisible = True  # memory is allocated at such addresses
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return Launch(kernel.__module__, kernel.__name__, signature, constants, attributes, options)


def record_launches(every_config, **settings):
    """Return the launches of call_every_kernel(**settings), without running any.

    A tuned kernel gives its default configuration, or all of them with `every_config`.
    """
    launches = []

    def record(kernel, *args, grid, warmup=False, **kwargs):
        options = {}
        for name in ("num_warps", "num_stages"):
            if name in kwargs:
                options[name] = kwargs.pop(name)
        launches.append(describe_launch(kernel, args, kwargs, options))

    def record_tuned(tuner, *args, grid, warmup=False, **kwargs):
        configs = tuner.configs if every_config else tuner.configs[:1]
        for config in configs:
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            launches.append(describe_launch(tuner.fn, args, kwargs, options))

    triton.runtime.JITFunction.run = record
    triton.runtime.Autotuner.run = record_tuned
    call_every_kernel(**settings)
    return launches


def call_every_kernel(dtype, channels_last=False, n=2, size=256, channels=(64, 128, 256, 512)):
    """Call every kernel as a training step with n images of size x size calls it."""
    composite_step(dtype, channels_last, n, size)
    for index, count in enumerate(channels):
        side = max(1, size >> index)
        features = torch.empty(n, count, side, side, dtype=dtype)
        if channels_last:
            features = features.to(memory_format=torch.channels_last)
        style_step(features, features.clone())
        affine_step(features)
        resize_step(features)
        if channels_last and count == 256:  # as in training, and one size: they compile longest
            pointwise_step(features)
        if index == 0:
            style_step(features, torch.empty(n, count, count))  # a Gram matrix
    corners = torch.empty(n, 36, dtype=torch.int64)
    image = torch.empty(n, 3, size, size, dtype=dtype)
    patches.gather_patches(image, corners, 15, 6)


def composite_step(dtype, channels_last, n, size):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.empty(3, n, 3, size, size, dtype=dtype)
    foreground, background, target = (x.to(memory_format=layout) for x in images)
    mask = torch.empty(n, 1, size, size, dtype=dtype, requires_grad=True)
    outputs = composite.fused_composite_losses(
        mask,
        foreground.requires_grad_(),
        background.requires_grad_(),
        target.float(),
        copy_dtype=dtype,
    )
    torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])


def style_step(features, target):
    features = features.detach().requires_grad_()
    gram.fused_style_loss(features, target).backward()


def affine_step(x):
    gain_and_shift = torch.empty(len(x), 2 * x.shape[1], requires_grad=True)
    y = affine.affine_forward(x.detach().requires_grad_(), gain_and_shift)
    y.backward(torch.empty_like(y))
    affine.bias_relu(x, torch.empty(x.shape[1], dtype=x.dtype))
    affine.relu_backward(x, x, x)


def resize_step(x):
    n, channels, height, width = x.shape
    size = (2 * height, 2 * width)
    leaf = x.detach().requires_grad_()
    larger = resize.Enlarge.apply(leaf, size)
    y, _ = resize.max_pool_forward(larger, True)
    y.backward(torch.empty_like(y))


def pointwise_step(x):
    """BigGAN's two: to a quarter of the channels, and back with a residual of either size."""
    n, channels, height, width = x.shape
    middle = max(1, channels // 4)
    leaf = x.detach().requires_grad_()
    h, again = convolve_empty(leaf, middle)
    same, _ = convolve_empty(h, channels, again)
    torch.autograd.backward(same, torch.empty_like(same))
    if height % 2 == 0:
        y, _ = convolve_empty(x[:, :middle], channels, leaf[:, :, ::2, ::2])
        y.backward(torch.empty_like(y))


def convolve_empty(x, outputs, residual=None):
    n, channels, _, _ = x.shape
    affine = torch.empty(n, 2 * channels, requires_grad=True)
    weight = torch.empty(outputs, channels, 1, 1, dtype=x.dtype, requires_grad=True)
    return pointwise.AffineConvolution.apply(x, affine, weight, residual)


def all_launches(every_config):
    """Every launch once, of all dtypes, memory layouts and smallest sizes."""
    layouts = [
        dict(dtype=torch.float32, channels_last=False),
        dict(dtype=torch.float32, channels_last=True),
        dict(dtype=torch.float16, channels_last=False),  # channels last is as with bfloat16
        dict(dtype=torch.bfloat16, channels_last=False),
        dict(dtype=torch.bfloat16, channels_last=True),
        dict(dtype=torch.float32, n=1, size=1, channels=(1,)),  # 1 is a constant to the compiler
        dict(dtype=torch.float32, n=1, size=7, channels=(3,)),
    ]
    launches = {}
    for settings in layouts:
        for launch in record_launches(every_config, **settings):
            launches.setdefault(repr(launch), launch)
    return list(launches.values())


# --------------------------------------------------------------------------------------------------
# Compiling them


def compile_launch(launch, sm):
    """Compile for one GPU generation. Returns registers, spilled bytes, bytes of shared memory."""
    kernel = getattr(sys.modules[launch.module], launch.kernel)
    if isinstance(kernel, triton.runtime.Autotuner):
        kernel = kernel.fn
    source = ASTSource(kernel, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, GPUTarget("cuda", sm, 32), launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    spilled = int(re.search(r"STACK:(\d+)", usage)[1])  # these kernels have no arrays of their own
    return registers, spilled, compiled.metadata.shared


def print_result(launch, sm, registers, spilled, shared, bad):
    pointers = [kind for kind in launch.signature.values() if kind.startswith("*")]
    types = " ".join(dict.fromkeys(pointers))
    blocks = " ".join(f"{k}={v}" for k, v in launch.constants.items() if k.isupper())
    tuning = " ".join(f"{k.removeprefix('num_')}={v}" for k, v in launch.options.items())
    mark = "   <-- BAD" if bad else ""
    print(
        f"sm_{sm:<4}{launch.kernel:22} regs {registers:4} spilled {spilled:5} "
        f"shared {shared / 1024:6.1f}  {types}  {blocks} {tuning}{mark}"
    )


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="compile every configuration that tuning may choose, not the default one alone, and "
        "every dtype and layout, not bf16 channels last alone for sm_80 and sm_100",
    )
    return parser.parse_args()


def main():
    args = parse_args()
    launches = all_launches(every_config=args.all)
    print(f"triton {triton.__version__}; registers, spilled bytes and shared memory in KiB")
    failed = False
    typical = record_launches(args.all, dtype=torch.bfloat16, channels_last=True)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = []
        for launch in launches:
            for sm in SHARED_MEMORY:
                if args.all or sm == 90 or launch in typical:
                    jobs.append((launch, sm, pool.submit(compile_launch, launch, sm)))
        for launch, sm, job in jobs:
            registers, spilled, shared = job.result()
            bad = spilled > SPILLED or shared > SHARED_MEMORY[sm]
            failed = failed or bad
            print_result(launch, sm, registers, spilled, shared, bad)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
