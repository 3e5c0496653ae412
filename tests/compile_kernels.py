"""Compile every Triton kernel for sm_80, sm_90 and sm_100, without a GPU, and print registers and spills of each.

    python tests/compile_kernels.py           # the default configuration of each
    python tests/compile_kernels.py --all     # and those that tuning may choose

The kernels are called as training calls them, on CPU tensors of the sizes below, and what would have been launched is
compiled instead. Exit code 1 if a kernel spills at its default configuration or does not fit into shared memory.
"""
import contextlib
import io
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels import composite, gram  # noqa: E402

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}                     # bytes a program may use
DTYPES = torch.float32, torch.float16, torch.bfloat16
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8", torch.int64: "i64"}


def describe(kernel, args, kwargs, options):
    """What triton.compile needs to know of a launch: None and 1 are constants, multiples of 16 are known as such."""
    signature, constants, attributes = {}, {}, {}
    for index, (name, value) in enumerate((dict(zip(kernel.arg_names, args)) | kwargs).items()):
        if name in kwargs or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + NAMES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2 ** 31 else "i64"
        if isinstance(value, torch.Tensor) or signature[name][0] == "i" and value % 16 == 0:
            attributes[index,] = [["tt.divisibility", 16]]
    return kernel.__module__, kernel.__name__, signature, constants, attributes, options


def record_launches(function):
    """The launches that function() would make: one description each, of a tuned kernel one for every configuration."""
    launches = []

    def launch(kernel, *args, grid, warmup=False, **kwargs):
        options = {name: kwargs.pop(name) for name in ("num_warps",) if name in kwargs}
        launches.append(describe(kernel, args, kwargs, options))

    def launch_all(tuner, *args, grid, warmup=False, **kwargs):
        for config in tuner.configs if "--all" in sys.argv else tuner.configs[:1]:
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            launches.append(describe(tuner.fn, args, kwargs, options))

    triton.runtime.JITFunction.run, triton.runtime.Autotuner.run = launch, launch_all
    function()
    return launches


def train_step(dtype, channels_last=False, n=2, size=256, channels=(64, 128, 256, 512)):
    """Every kernel, as a step of training with n images of size x size calls it."""
    mask, target = torch.empty(n, 1, size, size, dtype=dtype), torch.empty(n, 3, size, size)
    inputs = [mask, *torch.empty(2, n, 3, size, size, dtype=dtype)]
    for x in inputs:
        x.requires_grad_()
    composed, copy, *scalars = composite.composite_losses(*inputs, target, copy_dtype=dtype)
    torch.autograd.backward([composed, copy, *scalars], [torch.ones_like(x) for x in (composed, copy, *scalars)])
    for number, c in enumerate(channels):
        side = max(1, size >> number)
        x = torch.empty(n, c, side, side, dtype=dtype)
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        for goal in [x.clone()] + [torch.empty(n, c, c)] * (number == 0):    # features, or a Gram matrix
            gram.style_loss(x.detach().requires_grad_(), goal).backward()
    gram.gather_patches(target.to(dtype), torch.empty(n, 36, dtype=torch.int64), 15, 6)


def compile_launch(job):
    """(launch, sm) -> sm, registers, spilled bytes, bytes of shared memory."""
    (module, name, signature, constants, attributes, options), sm = job
    kernel = getattr(sys.modules[module], name)
    kernel = kernel.fn if isinstance(kernel, triton.runtime.Autotuner) else kernel
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    with contextlib.redirect_stdout(io.StringIO()) as log:
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, GPUTarget("cuda", sm, 32), options)
    registers = int(re.search(r"Used (\d+) registers", log.getvalue())[1])
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log.getvalue())))
    return sm, registers, spilled, compiled.metadata.shared


def main():
    launches = {}
    for dtype in DTYPES:
        for channels_last in (False, True) if dtype != torch.float16 else (False,):       # as bfloat16
            for launch in record_launches(lambda: train_step(dtype, channels_last)):
                launches.setdefault(repr(launch), launch)
    for size, channels in ((1, (1,)), (7, (3,))):          # a size of 1 is a constant to the compiler
        for launch in record_launches(lambda: train_step(torch.float32, False, 1, size, channels)):
            launches.setdefault(repr(launch), launch)
    jobs = [(launch, sm) for launch in launches.values() for sm in SHARED_MEMORY]
    bad = 0
    print(f"triton {triton.__version__}; registers, spilled bytes and shared memory (KiB) per kernel")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for (launch, _), (sm, registers, spilled, shared) in zip(jobs, pool.map(compile_launch, jobs)):
            _, name, signature, constants, _, options = launch
            wrong = spilled or shared > SHARED_MEMORY[sm]
            bad += bool(wrong)
            types = " ".join(dict.fromkeys(t for t in signature.values() if t[0] == "*"))
            blocks = " ".join(f"{k}={v}" for k, v in constants.items() if k.isupper())
            tuning = " ".join(f"{k[4:]}={v}" for k, v in options.items())
            print(f"sm_{sm:<4}{name:22} regs {registers:4} spilled {spilled:5} shared {shared / 1024:6.1f}  {types}  "
                  f"{blocks} {tuning}{'   <-- BAD' if wrong else ''}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
