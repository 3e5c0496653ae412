"""Time the kernels beside PyTorch's own operations and torch.compile.

    python kernels/benchmark.py          # everything; a table here, CSV and Markdown in --out
    python kernels/benchmark.py --operations composite --shapes imagenet --dtypes float32

The variants take turns, so that a slow moment of the machine hits all of them. Before each call the
cache is filled with something else, and a GPU is kept waiting until Python has launched everything:
"median us" is the device's time, "host us" Python's. The result of every timed call is compared
with that of the eager form and then overwritten with NaN: a variant that leaves its output
unwritten finds NaN there the next time. Inputs are as in training: images channels last, the
composite with its copy for VGG-16.

"MB moved" is, for PyTorch, what its operations read and write one after the other; for
torch.compile, which fuses as it likes, inputs and outputs once; for Triton, what the kernels read
and write. GB/s follows from it, TFLOP/s from the multiplications and additions of the formula. Both
also stand as percent of a device copy and of a large matmul, measured in the same run.
"""

import argparse
import csv
import functools
import statistics
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels import (  # noqa: E402  (needs the path above)
    affine_convolution,
    affine_relu,
    composite_losses_and_copy,
    eager,
    enlarge,
    max_pool,
    sample_patch_images,
    style_loss,
)

OPERATIONS = ("composite", "style", "patches", "affine", "pointwise", "resize")
BATCHES = {"mnist": (32, (32, 512)), "imagenet": (256, (4, 16))}  # size, numbers of images
VGG_LAYERS = {  # channels, and how much smaller than the image
    "relu1_2": (64, 1),
    "relu2_2": (128, 2),
    "relu3_3": (256, 4),
    "relu4_3": (512, 8),
}
NORMS = ((128, 256), (512, 64))  # channels and side of some of BigGAN-deep-256's conditional norms
COPY_DTYPE = torch.bfloat16  # of the composite's copy
FLUSH = {"cuda": 2**28, "cpu": 2**26}  # bytes to write before a call: more than a cache holds
PAUSE = 4_000_000  # cycles that a GPU waits before a call, about 2 ms
PHASES = ("forward", "backward", "both")
COLUMNS = (
    "operation",
    "shape",
    "dtype",
    "variant",
    "phase",
    "median us",
    "spread %",
    "host us",
    "of eager",
    "of compile",
    "MB moved",
    "GB/s",
    "% of copy",
    "TFLOP/s",
    "% of matmul",
    "peak MB",
)


# --------------------------------------------------------------------------------------------------
# What is timed


class Case(NamedTuple):
    """One operation at one size and dtype."""

    operation: str
    shape: str  # as the table has it
    dtype: torch.dtype
    make_inputs: Callable  # () -> (leaves, others): lists of tensors with and without a gradient
    variants: dict  # name -> function(*leaves, *others) that returns a tuple of tensors
    triton_bytes: tuple | None  # moved forward and backward; None: inputs and outputs once
    flops: tuple = (0, 0)  # forward and backward


def composite_formula(mask, foreground, background, target):
    """The paper's formulas, term by term."""
    composite = mask * foreground + (1 - mask) * background
    l1 = torch.mean(torch.abs(composite - target))
    binary = torch.mean(-mask * torch.log2(mask) - (1 - mask) * torch.log2(1 - mask))
    mask_mean = mask.mean((1, 2, 3))
    below = torch.clamp(0.1 - mask_mean, min=0)
    above = torch.clamp(mask_mean - 0.9, min=0)
    copy = composite.to(COPY_DTYPE)
    return composite, l1, binary, mask_mean, (below + above).mean(), copy


def composite_eager(*inputs):
    losses, copy = composite_losses_and_copy(*inputs, copy_dtype=COPY_DTYPE, backend="eager")
    return *losses, copy


def composite_triton(*inputs):
    losses, copy = composite_losses_and_copy(*inputs, copy_dtype=COPY_DTYPE, backend="triton")
    return *losses, copy


def channels_last(*tensors):
    return [x.contiguous(memory_format=torch.channels_last) for x in tensors]


def composite_inputs(n, size, dtype, device):
    images = torch.randn(3, n, 3, size, size, device=device).to(dtype)
    foreground, background, target = channels_last(*images)
    mask = torch.rand(n, 1, size, size, device=device)
    mask = mask.clamp(1e-4, 1 - 1e-4).to(dtype)
    if dtype == torch.bfloat16:
        mask = mask.clamp(max=1 - 2**-8)  # 1 - 1e-4 rounds to 1, where the formula gives NaN
    return [mask, foreground, background], [target]


def composite_case(n, size, dtype, device):
    image = n * size**2 * dtype.itemsize
    copy = 3 * n * size**2 * COPY_DTYPE.itemsize
    return Case(
        operation="composite",
        shape=f"{n} x {size}^2",
        dtype=dtype,
        make_inputs=functools.partial(composite_inputs, n, size, dtype, device),
        variants={
            "formula": composite_formula,
            "eager": composite_eager,
            "triton": composite_triton,
        },
        triton_bytes=(13 * image + copy, 20 * image + copy),
    )


def style_eager(features, target):
    return (style_loss(features, target, backend="eager"),)


def style_triton(features, target):
    return (style_loss(features, target, backend="triton"),)


class ProductsInHalf(torch.autograd.Function):
    """The style loss by PyTorch's matrix products of half-precision numbers, summed in float32."""

    @staticmethod
    def forward(ctx, features, target):
        grams = []
        for x in (features, target):
            flat = x.flatten(2)  # (N, C, H W)
            grams.append(torch.bmm(flat, flat.transpose(1, 2), out_dtype=torch.float32))
        difference = (grams[0] - grams[1]) / features[0].numel()
        ctx.save_for_backward(features, difference)
        return difference.abs().mean()

    @staticmethod
    def backward(ctx, gradient):
        features, difference = ctx.saved_tensors
        scale = 2 * gradient / (features[0].numel() * difference.numel())
        signs = difference.sign().to(features.dtype)
        product = torch.bmm(features.flatten(2).transpose(1, 2), signs)  # (N, H W, C)
        product = product.transpose(1, 2).unflatten(2, features.shape[2:])
        return product * scale.to(features.dtype), None


def style_products(features, target):
    return (ProductsInHalf.apply(features, target),)


def style_inputs(n, channels, side, dtype, device):
    both = torch.randn(2, n, channels, side, side, device=device)
    features, target = channels_last(*both.relu_().to(dtype))
    return [features], [target]


def style_case(n, size, layer, dtype, device):
    channels, reduction = VGG_LAYERS[layer]
    side = size // reduction
    splits = 1
    if eager.gram is not None:
        features = torch.empty(1, dtype=dtype, device=device).expand(n, channels, side, side)
        block_c, block_p = eager.gram.block_sizes(features)
        splits, _ = eager.gram.split_positions(features, block_c, block_p)

    elements = n * channels * side**2
    gram = n * channels**2
    # Forward reads features and target, backward reads features and writes their gradient.
    two_features = 2 * elements * dtype.itemsize
    # Half of each float32 matrix of sums is written and read, and the int8 signs are written.
    forward = two_features + gram * (4 * splits + 1)
    backward = two_features + gram
    variants = {"eager": style_eager, "triton": style_triton}
    if device.type == "cuda" and dtype != torch.float32:
        variants["products"] = style_products
    return Case(
        operation="style",
        shape=f"{layer} {n} x {channels} x {side}^2",
        dtype=dtype,
        make_inputs=functools.partial(style_inputs, n, channels, side, dtype, device),
        variants=variants,
        triton_bytes=(forward, backward),
        flops=(4 * elements * channels, 2 * elements * channels),
    )


def patches_eager(image, mask):
    torch.manual_seed(0)  # the same windows in every variant
    return (sample_patch_images(image, mask, backend="eager"),)


def patches_triton(image, mask):
    torch.manual_seed(0)
    return (sample_patch_images(image, mask, backend="triton"),)


def patches_inputs(n, size, dtype, device):
    image = torch.rand(n, 3, size, size, device=device).to(dtype)
    mask = torch.rand(n, 1, size, size, device=device)
    return [], [image, mask]


def patches_case(n, size, dtype, device):
    return Case(
        operation="patches",
        shape=f"{n} x {size}^2",
        dtype=dtype,
        make_inputs=functools.partial(patches_inputs, n, size, dtype, device),
        variants={"eager": patches_eager, "triton": patches_triton},
        triton_bytes=None,
    )


def both_backends(function, *args):
    """The variants of a function of tensors and a backend."""
    variants = {}
    for backend in ("eager", "triton"):
        call = functools.partial(function, backend=backend)
        variants[backend] = lambda *inputs, call=call: (call(*inputs, *args),)
    return variants


def affine_inputs(n, channels, side, dtype, device):
    (x,) = channels_last(torch.randn(n, channels, side, side, device=device).to(dtype))
    return [x, torch.randn(n, 2 * channels, device=device).to(dtype)], []


def affine_case(n, channels, side, dtype, device):
    elements = n * channels * side**2 * dtype.itemsize
    return Case(
        operation="affine",
        shape=f"{n} x {channels} x {side}^2",
        dtype=dtype,
        make_inputs=functools.partial(affine_inputs, n, channels, side, dtype, device),
        variants=both_backends(affine_relu),
        triton_bytes=(2 * elements, 3 * elements),
    )


def convolved(*inputs, backend):
    """affine_convolution's first result; the second is its input."""
    return affine_convolution(*inputs, backend=backend)[0]


def pointwise_cases(n, size, dtype, device):
    """The first and the last convolution of BigGAN's last block, with their norms."""
    small = size // 2
    for name, channels, outputs, side, residual in (
        ("first", 256, 64, small, []),
        ("last", 64, 128, size, [(n, 256, small, small)]),
    ):
        x = n * channels * side**2
        y = n * outputs * side**2
        added = n * outputs * small**2 if residual else 0
        # Backward reads x and the gradient of y twice, for the gradients of x and the weight.
        forward = x + y + added
        backward = 3 * x + 2 * y
        if residual:  # its gradient has zeros for the channels left out
            backward += y + 2 * added
        shapes = [(n, channels, side, side), (n, 2 * channels), (outputs, channels, 1, 1)]
        yield Case(
            operation="pointwise",
            shape=f"{name} {n} x {channels} x {side}^2 to {outputs}",
            dtype=dtype,
            make_inputs=functools.partial(random_leaves, shapes + residual, dtype, device),
            variants=both_backends(convolved),
            triton_bytes=(forward * dtype.itemsize, backward * dtype.itemsize),
            flops=(2 * x * outputs, 4 * x * outputs),
        )


def random_leaves(shapes, dtype, device):
    leaves = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    return [channels_last(x)[0] if x.dim() == 4 else x for x in leaves], []


def resize_cases(n, size, dtype, device):
    """The largest enlargement and pooling of U^2-Net."""
    elements = n * 64 * size**2  # of the large images
    image = elements * dtype.itemsize
    small = (n, 64, size // 2, size // 2)
    shapes_and_bytes = {
        "enlarge": (
            [small],
            both_backends(enlarge, (size, size)),
            (1.25 * image, 2.25 * image),
        ),
        "max_pool": (
            [(n, 64, size, size)],
            both_backends(max_pool),
            (1.25 * image + elements / 4, 1.25 * image + elements / 4),
        ),
    }
    for name, (shapes, variants, triton_bytes) in shapes_and_bytes.items():
        yield Case(
            operation="resize",
            shape=f"{name} {n} x {shapes[0][1]} x {shapes[0][2]}^2",
            dtype=dtype,
            make_inputs=functools.partial(random_leaves, shapes, dtype, device),
            variants=variants,
            triton_bytes=triton_bytes,
        )


def all_cases(args, dtypes, device):
    for dtype in dtypes:
        for shapes in args.shapes:
            size, batches = BATCHES[shapes]
            for n in batches:
                if "composite" in args.operations:
                    yield composite_case(n, size, dtype, device)
                if "patches" in args.operations and shapes == "imagenet":
                    yield patches_case(n, size, dtype, device)
                if "affine" in args.operations and shapes == "imagenet":
                    for channels, side in NORMS:
                        yield affine_case(n, channels, side, dtype, device)
                if "pointwise" in args.operations and shapes == "imagenet":
                    yield from pointwise_cases(n, size, dtype, device)
                if "resize" in args.operations and shapes == "imagenet":
                    yield from resize_cases(n, size, dtype, device)
                if "style" in args.operations:
                    for layer in VGG_LAYERS:
                        yield style_case(n, size, layer, dtype, device)


# --------------------------------------------------------------------------------------------------
# How many bytes it moves


class CountBytes(TorchDispatchMode):
    """Add up the bytes of all tensors that operations read and write; views are free."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and "empty" not in function.name():
            self.total += count_tensor_bytes(args, result)
        return result


def count_tensor_bytes(*values):
    """Bytes of all tensors in nested values; an expanded tensor counts what is in memory."""
    total = 0
    for x in tree_leaves(values):
        if isinstance(x, torch.Tensor):
            total += min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
    return total


def count_bytes(function, leaves, others):
    """Bytes that a function of plain PyTorch moves, and the least possible, without computing.

    Returns two lists, each with forward and, if there are leaves, backward.
    """
    leaves = [torch.empty_like(x, device="meta").requires_grad_() for x in leaves]
    others = [torch.empty_like(x, device="meta") for x in others]
    with CountBytes() as forward:
        outputs = function(*leaves, *others)
    moved = [forward.total]
    least = [count_tensor_bytes(leaves, others, outputs)]
    if leaves:
        gradients = [torch.empty_like(x) for x in outputs]
        with CountBytes() as backward:
            results = torch.autograd.grad(outputs, leaves, gradients)
        moved.append(backward.total)
        least.append(count_tensor_bytes(leaves, others, gradients, results))
    return moved, least


def bytes_by_variant(case):
    """Variant -> bytes moved in each phase."""
    moved = {}
    for name, function in case.variants.items():
        if name not in ("triton", "products"):
            leaves, others = case.make_inputs()
            moved[name], least = count_bytes(function, leaves, others)
            if name == "eager":
                moved["compile"] = least
    moved["triton"] = case.triton_bytes or moved["compile"]
    moved["products"] = moved["compile"]
    return moved


# --------------------------------------------------------------------------------------------------
# How long it takes


@functools.cache
def cache_filler(device):
    return torch.empty(FLUSH[device.type], dtype=torch.uint8, device=device)


def stopwatch(device, function, *args):
    """Seconds that function(*args) takes on the device, and Python's; and its result."""
    cache_filler(device).zero_()
    if device.type == "cuda":
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(PAUSE)
        start.record()
    begun = time.perf_counter()
    result = function(*args)
    host = time.perf_counter() - begun
    if device.type == "cuda":
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000, host, result
    return host, host, result


def shortest_time(repeats, device, function, *args):
    return min(stopwatch(device, function, *args)[0] for _ in range(repeats))


def copy_speed(device):
    """Bytes/s of a device copy, counted there and back."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    return 2 * size / shortest_time(10, device, copy.copy_, source)


def matmul_speeds(device, dtypes):
    """Dtype -> FLOP/s of a large matmul."""
    side = 1536
    repeats = 3
    if device.type == "cuda":
        side = 8192
        repeats = 10
    speeds = {}
    for dtype in dtypes:
        a = torch.randn(side, side, device=device).to(dtype)
        speeds[dtype] = 2 * side**3 / shortest_time(repeats, device, torch.matmul, a, a)
    return speeds


def forward_and_backward(function, leaves, others, gradients):
    outputs = function(*leaves, *others)
    return torch.autograd.grad(outputs, leaves, gradients)


def run_phase(function, leaves, others, gradients, phase, device):
    """Two times, see stopwatch, and what to check: outputs after forward, else gradients."""
    if phase == "forward":
        return stopwatch(device, function, *leaves, *others)
    if phase == "both":
        return stopwatch(device, forward_and_backward, function, leaves, others, gradients)
    outputs = function(*leaves, *others)
    return stopwatch(device, torch.autograd.grad, outputs, leaves, gradients)


def check_results(results, references, dtype, what):
    """Exit if a result is not the eager form's: distance by norm, as single signs may flip."""
    limit = 1e-3 if dtype == torch.float32 else 2e-2
    for index, (x, y) in enumerate(zip(results, references, strict=True)):
        distance = (x.float() - y.float()).norm()
        error = (distance / (y.float().norm() + 1e-20)).item()
        if not error < limit:  # NaN ends here, too
            sys.exit(f"benchmark.py: {what}: result {index} is off by {error:.2g} of its norm")


def timed_call(function, inputs, gradients, references, case, phase, what, device):
    """Seconds of one checked call, Python's seconds, and its peak of memory (None on a CPU)."""
    cuda = device.type == "cuda"
    peak = None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    seconds, host, results = run_phase(function, *inputs, gradients, phase, device)
    if cuda:
        peak = torch.cuda.max_memory_allocated() - before
    check_results(results, references, case.dtype, what)
    for x in results:
        x.detach().fill_(torch.nan)  # poison for whoever gets this memory next
    return seconds, host, peak


def time_phase(case, variants, inputs, phase, args, device):
    """Rows (variant, phase, seconds of every call, Python's seconds of every call, peak bytes)."""
    torch.manual_seed(1)
    gradients = [torch.rand_like(x) for x in variants["eager"](*inputs[0], *inputs[1])]
    _, _, results = run_phase(variants["eager"], *inputs, gradients, phase, device)
    references = [x.detach().clone() for x in results]
    times = {name: [] for name in variants}
    peaks = {}
    begun = time.perf_counter()
    rounds = 0
    while rounds < args.warmup + 5 or time.perf_counter() < begun + args.seconds:
        for name, function in variants.items():
            what = f"{case.operation} {case.shape} {case.dtype} {name} {phase}"
            *taken, peaks[name] = timed_call(
                function, inputs, gradients, references, case, phase, what, device
            )
            if rounds >= args.warmup:
                times[name].append(taken)
        rounds += 1
    return [(name, phase, *zip(*taken), peaks[name]) for name, taken in times.items()]


def time_case(case, args, device):
    """Rows of all phases, see time_phase."""
    variants = dict(case.variants)
    if not args.no_compile:
        torch._dynamo.reset()
        variants["compile"] = torch.compile(variants["eager"], dynamic=False)
    if device.type != "cuda":
        del variants["triton"]
    leaves, others = case.make_inputs()
    for leaf in leaves:
        leaf.requires_grad_()
    rows = []
    for phase in PHASES if leaves else PHASES[:1]:
        rows += time_phase(case, variants, (leaves, others), phase, args, device)
    return rows


# --------------------------------------------------------------------------------------------------
# The table


def phase_value(values, phase):
    """The entry of (forward, backward) for a phase; their sum for "both"."""
    if phase == "both":
        return sum(values)
    return values[PHASES.index(phase)]


def table_rows(case, rows, copy, matmul):
    """Rows of the table, as strings in the order of COLUMNS."""
    moved_by = bytes_by_variant(case)
    medians = {}
    for variant, phase, seconds, *_ in rows:
        medians[variant, phase] = statistics.median(seconds)

    table = []
    for variant, phase, seconds, host, peak in rows:
        median = medians[variant, phase]
        lower, _, upper = statistics.quantiles(seconds, n=4)
        moved = phase_value(moved_by[variant], phase)
        flops = phase_value(case.flops, phase)
        row = dict.fromkeys(COLUMNS, "-")
        row["operation"] = case.operation
        row["shape"] = case.shape
        row["dtype"] = str(case.dtype).removeprefix("torch.")
        row["variant"] = variant
        row["phase"] = phase
        row["median us"] = f"{median * 1e6:.1f}"
        row["spread %"] = f"{100 * (upper - lower) / median:.0f}"
        row["host us"] = f"{statistics.median(host) * 1e6:.1f}"
        for other in ("eager", "compile"):
            if (other, phase) in medians:
                row[f"of {other}"] = f"{median / medians[other, phase]:.2f}"
        row["MB moved"] = f"{moved / 1e6:.2f}"
        row["GB/s"] = f"{moved / median / 1e9:.1f}"
        row["% of copy"] = f"{100 * moved / median / copy:.0f}"
        if flops:
            row["TFLOP/s"] = f"{flops / median / 1e12:.2f}"
            row["% of matmul"] = f"{100 * flops / median / matmul[case.dtype]:.0f}"
        if peak is not None:
            row["peak MB"] = f"{peak / 1e6:.1f}"
        table.append(tuple(row.values()))
    return table


def print_row(row):
    names = "{:10} {:24} {:8} {:8} {:8}".format(*row[:5])
    numbers = "".join(f"{value:>12}" for value in row[5:])
    print(names + numbers, flush=True)


def write_tables(folder, table, notes):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "benchmark.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *table])
    lines = [*notes, ""]
    for row in (COLUMNS, ["---"] * len(COLUMNS), *table):
        lines.append("| " + " | ".join(row) + " |")
    (folder / "benchmark.md").write_text("\n".join(lines) + "\n")


def describe_machine(device, copy, matmul, names):
    """Lines above the table."""
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    speeds = ", ".join(f"{name} {matmul[getattr(torch, name)] / 1e12:.2f}" for name in names)
    notes = [
        f"{name}, torch {torch.__version__}; device copy {copy / 1e9:.0f} GB/s; "
        f"matmul in TFLOP/s: {speeds}"
    ]
    if device.type != "cuda":
        notes.append("Not timed: the Triton kernels and peak memory, which need a GPU.")
    return notes


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), help="what to time"
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=list(BATCHES),
        default=list(BATCHES),
        help="data sets whose image and batch sizes are timed",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["float32", "float16", "bfloat16"],
        help="types of the inputs; if not given, float32 and, on a GPU, bfloat16",
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help="where to run")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="for each shape and phase, warmup included"
    )
    parser.add_argument("--warmup", type=int, default=3, help="rounds before timing begins")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which is slow to start"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/benchmark"),
        help="folder for benchmark.csv and benchmark.md",
    )
    return parser.parse_args()


def main():
    args = parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # events are recorded on the current one
    names = args.dtypes
    if names is None:
        names = ["float32", "bfloat16"] if device.type == "cuda" else ["float32"]
    dtypes = [getattr(torch, name) for name in names]

    copy = copy_speed(device)
    matmul = matmul_speeds(device, dtypes)
    notes = describe_machine(device, copy, matmul, names)
    print(*notes, sep="\n")
    print_row(COLUMNS)
    table = []
    for case in all_cases(args, dtypes, device):
        rows = table_rows(case, time_case(case, args, device), copy, matmul)
        for row in rows:
            print_row(row)
        table += rows
        write_tables(args.out, table, notes)
    print(f"{args.out / 'benchmark.md'} and .csv have the table")


if __name__ == "__main__":
    main()
