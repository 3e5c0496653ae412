"""Time the composite, the style loss and the patch images: PyTorch, torch.compile and Triton.

    python kernels/benchmark.py          # everything; a table here, CSV and Markdown in --out
    python kernels/benchmark.py --operations composite --shapes imagenet --dtypes float32

The variants take turns, so that a slow moment of the machine hits all of them. Inputs rotate
through more memory than the cache holds. The result of every timed call is compared with that of
the eager form and then overwritten with NaN: a variant that leaves its output unwritten finds NaN
there the next time.

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
    composite_losses,
    eager,
    sample_patch_images,
    style_loss,
)

OPERATIONS = ("composite", "style", "patches")
BATCHES = {"mnist": (32, (16, 64, 512)), "imagenet": (256, (1, 4, 16))}  # size, numbers of images
VGG_LAYERS = {  # channels, and how much smaller than the image
    "relu1_2": (64, 1),
    "relu2_2": (128, 2),
    "relu3_3": (256, 4),
    "relu4_3": (512, 8),
}
PHASES = ("forward", "backward", "both")
COLUMNS = (
    "operation",
    "shape",
    "dtype",
    "variant",
    "phase",
    "median us",
    "spread %",
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
    return composite, l1, binary, mask_mean, (below + above).mean()


def composite_eager(mask, foreground, background, target):
    return tuple(composite_losses(mask, foreground, background, target, backend="eager"))


def composite_triton(mask, foreground, background, target):
    return tuple(composite_losses(mask, foreground, background, target, backend="triton"))


def composite_inputs(n, size, dtype, device):
    images = torch.randn(3, n, 3, size, size, device=device).to(dtype)
    foreground, background, target = images
    mask = torch.rand(n, 1, size, size, device=device)
    mask = mask.clamp(1e-4, 1 - 1e-4).to(dtype)
    if dtype == torch.bfloat16:
        mask = mask.clamp(max=1 - 2**-8)  # 1 - 1e-4 rounds to 1, where the formula gives NaN
    return [mask, foreground, background], [target]


def composite_case(n, size, dtype, device):
    elements = n * size**2 * dtype.itemsize
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
        triton_bytes=(13 * elements, 20 * elements),
    )


def style_eager(features, target):
    return (style_loss(features, target, backend="eager"),)


def style_triton(features, target):
    return (style_loss(features, target, backend="triton"),)


def style_inputs(n, channels, side, dtype, device):
    both = torch.randn(2, n, channels, side, side, device=device)
    features, target = both.relu_().to(dtype)
    features = features.contiguous(memory_format=torch.channels_last)
    target = target.contiguous(memory_format=torch.channels_last)
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
    return Case(
        operation="style",
        shape=f"{layer} {n} x {channels} x {side}^2",
        dtype=dtype,
        make_inputs=functools.partial(style_inputs, n, channels, side, dtype, device),
        variants={"eager": style_eager, "triton": style_triton},
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


def all_cases(args, dtypes, device):
    for dtype in dtypes:
        for shapes in args.shapes:
            size, batches = BATCHES[shapes]
            for n in batches:
                if "composite" in args.operations:
                    yield composite_case(n, size, dtype, device)
                if "patches" in args.operations and shapes == "imagenet":
                    yield patches_case(n, size, dtype, device)
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
        if name != "triton":
            leaves, others = case.make_inputs()
            moved[name], least = count_bytes(function, leaves, others)
            if name == "eager":
                moved["compile"] = least
    moved["triton"] = case.triton_bytes or moved["compile"]
    return moved


# --------------------------------------------------------------------------------------------------
# How long it takes


def stopwatch(device, function, *args):
    """Seconds that function(*args) takes on the device, and its result."""
    if device.type == "cuda":
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        result = function(*args)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000, result
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def shortest_time(repeats, device, function, *args):
    return min(stopwatch(device, function, *args)[0] for _ in range(repeats))


def copy_speed(device):
    """Bytes/s of a device copy, counted there and back."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    return 2 * size / shortest_time(10, device, copy.copy_, source)


def matmul_speeds(device):
    """Dtype -> FLOP/s of a large matmul."""
    side = 1536
    repeats = 3
    if device.type == "cuda":
        side = 8192
        repeats = 10
    speeds = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a = torch.randn(side, side, device=device).to(dtype)
        speeds[dtype] = 2 * side**3 / shortest_time(repeats, device, torch.matmul, a, a)
    return speeds


def forward_and_backward(function, leaves, others, gradients):
    outputs = function(*leaves, *others)
    return torch.autograd.grad(outputs, leaves, gradients)


def run_phase(function, leaves, others, gradients, phase, device):
    """Seconds of one phase, and what to check: outputs after forward, else gradients."""
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


class Sample(NamedTuple):
    """One of the inputs that the calls of a phase rotate through."""

    leaves: list
    others: list
    gradients: list  # random, of the outputs
    references: list  # what a variant should give


def make_input_sets(case, megabytes):
    """At most 64 sets of inputs, of `megabytes` MiB in all."""
    sets = [case.make_inputs()]
    leaves, others = sets[0]
    size = sum(x.numel() * x.element_size() for x in leaves + others)
    for _ in range(min(63, megabytes * 2**20 // size)):
        sets.append(case.make_inputs())
    for leaves, _ in sets:
        for leaf in leaves:
            leaf.requires_grad_()
    return sets


def make_sample(function, leaves, others, phase, device):
    torch.manual_seed(1)
    outputs = function(*leaves, *others)
    gradients = [torch.rand_like(x) for x in outputs]
    _, results = run_phase(function, leaves, others, gradients, phase, device)
    references = [x.detach().clone() for x in results]
    return Sample(leaves, others, gradients, references)


def timed_call(function, sample, phase, dtype, what, device):
    """Seconds of one checked call, and its peak of memory in bytes (None on a CPU)."""
    cuda = device.type == "cuda"
    peak = None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    leaves, others, gradients, references = sample
    seconds, results = run_phase(function, leaves, others, gradients, phase, device)
    if cuda:
        peak = torch.cuda.max_memory_allocated() - before
    check_results(results, references, dtype, what)
    for x in results:
        x.detach().fill_(torch.nan)  # poison for whoever gets this memory next
    return seconds, peak


def time_phase(case, variants, sets, phase, args, device):
    """Rows (variant, phase, seconds of every call, peak bytes)."""
    eager_form = variants["eager"]
    samples = [make_sample(eager_form, *inputs, phase, device) for inputs in sets]
    seconds = {name: [] for name in variants}
    peaks = {}
    spent = 0.0
    rounds = 0
    while rounds < args.warmup + 5 or (spent < args.seconds and rounds < args.warmup + 200):
        sample = samples[rounds % len(samples)]
        for name, function in variants.items():
            what = f"{case.operation} {case.shape} {case.dtype} {name} {phase}"
            taken, peaks[name] = timed_call(function, sample, phase, case.dtype, what, device)
            if rounds >= args.warmup:
                seconds[name].append(taken)
                spent += taken
        rounds += 1
    return [(name, phase, taken, peaks[name]) for name, taken in seconds.items()]


def time_case(case, args, device):
    """Rows (variant, phase, seconds of every call, peak bytes) of all phases."""
    variants = dict(case.variants)
    if not args.no_compile:
        torch._dynamo.reset()
        variants["compile"] = torch.compile(variants["eager"], dynamic=False)
    if device.type != "cuda":
        del variants["triton"]
    sets = make_input_sets(case, args.rotate)
    leaves, _ = sets[0]
    phases = PHASES if leaves else PHASES[:1]
    rows = []
    for phase in phases:
        rows += time_phase(case, variants, sets, phase, args, device)
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
    for variant, phase, seconds, _ in rows:
        medians[variant, phase] = statistics.median(seconds)

    table = []
    for variant, phase, seconds, peak in rows:
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
        "--seconds", type=float, default=1.0, help="timed seconds for each shape and phase"
    )
    parser.add_argument("--warmup", type=int, default=3, help="rounds before timing begins")
    parser.add_argument("--rotate", type=int, default=256, help="MiB of inputs to rotate through")
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
    names = args.dtypes
    if names is None:
        names = ["float32", "bfloat16"] if device.type == "cuda" else ["float32"]
    dtypes = [getattr(torch, name) for name in names]

    copy = copy_speed(device)
    matmul = matmul_speeds(device)
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
