"""Time the composite, the style loss and the patch sampler: plain PyTorch, torch.compile and the Triton kernels.

    python kernels/benchmark.py                                   # everything; one table, and CSV and Markdown in --out
    python kernels/benchmark.py --operations composite --shapes imagenet --dtypes float32

Every form is timed in turns, so that a slow moment hits all. Inputs rotate through more memory than the cache holds.
The result of every timed call is checked against plain PyTorch, then overwritten with NaN, so that a form which leaves
its output unwritten finds NaN there the next time. MB moved: for plain PyTorch what its operations read and write one
after the other; for torch.compile, which fuses as it likes, inputs and outputs once; for Triton what the kernels read
and write. GB/s follows from it, TFLOP/s from the products of the formula; both are also given as percent of a device
copy and a large matmul measured in the same run.
"""
import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kernels  # noqa: E402  (needs the path above)

BATCHES = {"mnist": (32, (16, 64, 512)), "imagenet": (256, (1, 4, 16))}     # size, images
VGG_LAYERS = {"relu1_2": (64, 1), "relu2_2": (128, 2), "relu3_3": (256, 4), "relu4_3": (512, 8)}  # channels, reduction
PHASES = "forward", "backward", "both"
COLUMNS = ("operation", "shape", "dtype", "form", "phase", "median us", "spread %", "of eager", "of compile",
           "MB moved", "GB/s", "% of copy", "TFLOP/s", "% of matmul", "peak MB")


# ---------------------------------------------------------------------------------------------------------------------
# What is timed: for each operation its inputs, its forms, and what they must move and multiply


def formula_composite(mask, foreground, background, target):
    """The paper's formulas, term by term."""
    composite = mask * foreground + (1 - mask) * background
    l1 = torch.mean(torch.abs(composite - target))
    binary = torch.mean(-mask * torch.log2(mask) - (1 - mask) * torch.log2(1 - mask))
    mask_mean = mask.mean((1, 2, 3))
    low, high = (torch.clamp(x, min=0) for x in (0.1 - mask_mean, mask_mean - 0.9))
    return composite, l1, binary, mask_mean, (low + high).mean()


def composite_case(n, size, dtype, device):
    def inputs():
        images = torch.randn(3, n, 3, size, size, device=device).to(dtype)
        mask = torch.rand(n, 1, size, size, device=device).clamp(1e-4, 1 - 1e-4).to(dtype)
        return [mask.clamp(max=1 - 2 ** -8) if dtype == torch.bfloat16 else mask, *images[:2]], [images[2]]

    def form(backend):
        return lambda m, f, b, t: tuple(kernels.composite_losses(m, f, b, t, backend=backend))

    forms = {"formula": formula_composite, "eager": form("eager"), "triton": form("triton")}
    triton_bytes = [elements * n * size ** 2 * dtype.itemsize for elements in (13, 20)]
    return f"{n} x {size}^2", inputs, forms, triton_bytes, (0, 0)


def style_case(n, size, layer, dtype, device):
    channels, reduction = VGG_LAYERS[layer]
    side = size // reduction

    def inputs():
        a, b = torch.randn(2, n, channels, side, side, device=device).relu_().to(dtype)
        return [a.contiguous(memory_format=torch.channels_last)], [b.contiguous(memory_format=torch.channels_last)]

    def form(backend):
        return lambda features, target: (kernels.style_loss(features, target, backend=backend),)

    forms = {"eager": form("eager"), "triton": form("triton")}
    elements, gram = n * channels * side ** 2, n * channels ** 2
    splits = 1
    if kernels.gram is not None:
        probe = torch.empty(1, dtype=dtype, device=device).expand(n, channels, side, side)
        splits, _ = kernels.gram.split_positions(probe, *kernels.gram.blocks(probe))
    both = 2 * elements * dtype.itemsize                   # two sides forward; features and their gradient backward
    triton_bytes = both + gram * (4 * splits + 1), both + gram             # half of the sums, there and back; signs
    return (f"{layer} {n} x {channels} x {side}^2", inputs, forms, triton_bytes,
            (4 * elements * channels, 2 * elements * channels))


def patches_case(n, size, dtype, device):
    def inputs():
        return [], [torch.rand(n, 3, size, size, device=device).to(dtype), torch.rand(n, 1, size, size, device=device)]

    def form(backend):
        def sample(image, mask):
            torch.manual_seed(0)                           # the same windows in every form
            return kernels.sample_patch_images(image, mask, backend=backend),
        return sample

    return f"{n} x {size}^2", inputs, {"eager": form("eager"), "triton": form("triton")}, None, (0, 0)


def cases(args, dtypes, device):
    for dtype in dtypes:
        for shapes in args.shapes:
            size, batches = BATCHES[shapes]
            for n in batches:
                if "composite" in args.operations:
                    yield "composite", dtype, composite_case(n, size, dtype, device)
                if "patches" in args.operations and shapes == "imagenet":
                    yield "patches", dtype, patches_case(n, size, dtype, device)
                for layer in VGG_LAYERS if "style" in args.operations else ():
                    yield "style", dtype, style_case(n, size, layer, dtype, device)


class CountBytes(TorchDispatchMode):
    """Adds up the bytes of all tensors that the operations within read and write; views are free."""
    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and "empty" not in function.name():
            self.total += size_of(args, result)
        return result


def size_of(*values):
    """Bytes of all tensors in values; an expanded one counts what is in memory."""
    return sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
               for x in tree_leaves(values) if isinstance(x, torch.Tensor))


def count_bytes(form, leaves, others):
    """Bytes that a form of plain PyTorch moves (forward, backward), and the least possible, found without computing."""
    leaves, others = ([torch.empty_like(x, device="meta") for x in part] for part in (leaves, others))
    leaves = [x.requires_grad_() for x in leaves]
    with CountBytes() as forward:
        outputs = form(*leaves, *others)
    least = [size_of(leaves, others, outputs)]
    moved = [forward.total]
    if leaves:
        gradients = [torch.empty_like(x) for x in outputs]
        with CountBytes() as backward:
            results = torch.autograd.grad(outputs, leaves, gradients)
        least.append(size_of(leaves, others, gradients, results))
        moved.append(backward.total)
    return moved, least


# ---------------------------------------------------------------------------------------------------------------------
# How it is timed


def stopwatch(function, device):
    """Seconds that function() takes on the device, and its result."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        result = function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000, result
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def ceilings(device):
    """Bytes/s of a device copy, counted there and back, and FLOP/s of a large matmul by dtype: best of 10."""
    cuda = device.type == "cuda"
    source = torch.ones(2 ** (30 if cuda else 26), dtype=torch.uint8, device=device)
    goal = torch.empty_like(source)
    copy = 2 * source.numel() / min(stopwatch(lambda: goal.copy_(source), device)[0] for _ in range(10))
    matmul, side = {}, 8192 if cuda else 1536
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a = torch.randn(side, side, device=device).to(dtype)
        matmul[dtype] = 2 * side ** 3 / min(stopwatch(lambda: a @ a, device)[0] for _ in range(10 if cuda else 3))
    return copy, matmul


def run_phase(form, leaves, others, gradients, phase, device):
    """Seconds, and the tensors to check: outputs after forward, gradients else."""
    if phase == "forward":
        return stopwatch(lambda: form(*leaves, *others), device)
    if phase == "both":
        return stopwatch(lambda: torch.autograd.grad(form(*leaves, *others), leaves, gradients), device)
    outputs = form(*leaves, *others)
    return stopwatch(lambda: torch.autograd.grad(outputs, leaves, gradients), device)


def check(results, references, dtype, what):
    """Exit if a result is not that of plain PyTorch: distance in the Euclidean norm, as single signs may flip."""
    for number, (x, y) in enumerate(zip(results, references, strict=True)):
        error = ((x.float() - y.float()).norm() / (y.float().norm() + 1e-20)).item()
        if not error < (1e-3 if dtype == torch.float32 else 2e-2):
            sys.exit(f"benchmark.py: {what}: result {number} is off by {error:.2g} of its norm")


def time_case(operation, dtype, case, args, device):
    """Rows (form, phase, seconds of every call, peak bytes) of one case."""
    shape, inputs, forms, _, _ = case
    if not args.no_compile:
        torch._dynamo.reset()
        forms = forms | {"compile": torch.compile(forms["eager"], dynamic=False)}
    if device.type != "cuda":
        forms = {name: form for name, form in forms.items() if name != "triton"}
    sets = [inputs()]
    size = sum(x.numel() * x.element_size() for part in sets[0] for x in part)
    sets += [inputs() for _ in range(min(63, args.rotate * 2 ** 20 // size))]
    rows = []
    for phase in PHASES if sets[0][0] else PHASES[:1]:
        references, gradients = [], []
        for leaves, others in sets:
            for leaf in leaves:
                leaf.requires_grad_()
            torch.manual_seed(1)
            outputs = forms["eager"](*leaves, *others)
            gradients.append([torch.rand_like(x) for x in outputs])
            references.append([x.detach().clone() for x in
                               run_phase(forms["eager"], leaves, others, gradients[-1], phase, device)[1]])
        seconds, peaks = {name: [] for name in forms}, {}
        spent, rounds = 0.0, 0
        while rounds < args.warmup + 5 or spent < args.seconds and rounds < args.warmup + 200:
            for name, form in forms.items():
                index = rounds % len(sets)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                taken, results = run_phase(form, *sets[index], gradients[index], phase, device)
                if device.type == "cuda":
                    peaks[name] = torch.cuda.max_memory_allocated() - before
                check(results, references[index], dtype, f"{operation} {shape} {dtype} {name} {phase}")
                for x in results:
                    x.detach().fill_(torch.nan)            # poison for whoever gets this memory next
                if rounds >= args.warmup:
                    seconds[name].append(taken)
                    spent += taken
            rounds += 1
        rows += [(name, phase, taken, peaks.get(name)) for name, taken in seconds.items()]
    return rows


def describe(operation, dtype, case, rows, copy, matmul):
    """Rows of the table: COLUMNS."""
    shape, inputs, forms, triton_bytes, flops = case
    counts = {name: count_bytes(form, *inputs()) for name, form in forms.items() if name != "triton"}
    bytes_moved = {name: moved for name, (moved, _) in counts.items()}
    bytes_moved["compile"] = counts["eager"][1]
    bytes_moved["triton"] = triton_bytes or counts["eager"][1]
    medians = {(form, phase): statistics.median(taken) for form, phase, taken, _ in rows}
    table = []
    for form, phase, taken, peak in rows:
        median, quarters = medians[form, phase], statistics.quantiles(taken, n=4)
        moved, products = (sum(x) if phase == "both" else x[PHASES.index(phase)] for x in (bytes_moved[form], flops))

        def ratio(other):
            return f"{median / medians[other, phase]:.2f}" if (other, phase) in medians else "-"

        table.append((
            operation, shape, str(dtype)[6:], form, phase, f"{median * 1e6:.1f}",
            f"{100 * (quarters[2] - quarters[0]) / median:.0f}", ratio("eager"), ratio("compile"), f"{moved / 1e6:.2f}",
            f"{moved / median / 1e9:.1f}", f"{100 * moved / median / copy:.0f}",
            f"{products / median / 1e12:.2f}" if products else "-",
            f"{100 * products / median / matmul[dtype]:.0f}" if products else "-",
            f"{peak / 1e6:.1f}" if peak is not None else "-"))
    return table


def write_tables(folder, table, notes):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "benchmark.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *table])
    rows = ["| " + " | ".join(row) + " |" for row in (COLUMNS, ["---"] * len(COLUMNS), *table)]
    (folder / "benchmark.md").write_text("\n".join([*notes, "", *rows]) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--operations", nargs="+", choices=["composite", "style", "patches"],
                        default=["composite", "style", "patches"], help="what to time")
    parser.add_argument("--shapes", nargs="+", choices=list(BATCHES), default=list(BATCHES), help="of which data sets")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "float16", "bfloat16"],
                        help="of inputs; float32 and, on a GPU, bfloat16 if not given")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timed calls for each shape and phase")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before timing")
    parser.add_argument("--rotate", type=int, default=256, help="MiB of inputs to go through")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it compiles every shape")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="folder for benchmark.csv and .md")
    args = parser.parse_args()
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    names = args.dtypes or (["float32", "bfloat16"] if cuda else ["float32"])
    copy, matmul = ceilings(device)
    notes = [f"{torch.cuda.get_device_name(device) if cuda else f'CPU, {torch.get_num_threads()} threads'}, torch "
             f"{torch.__version__}; device copy {copy / 1e9:.0f} GB/s; matmul in TFLOP/s: "
             + ", ".join(f"{name} {matmul[getattr(torch, name)] / 1e12:.2f}" for name in names)]
    if not cuda:
        notes.append("Not timed: the Triton kernels and peak memory, which need a GPU.")
    print(*notes, sep="\n")
    print(("{:>10}" * len(COLUMNS)).format(*COLUMNS))
    table = []
    for operation, dtype, case in cases(args, [getattr(torch, name) for name in names], device):
        rows = describe(operation, dtype, case, time_case(operation, dtype, case, args, device), copy, matmul)
        for row in rows:
            print("{:9} {:22} {:8} {:8} {:8} ".format(*row[:5]) + ("{:>10}" * (len(COLUMNS) - 5)).format(*row[5:]),
                  flush=True)
        table += rows
        write_tables(args.out, table, notes)
    print(f"{args.out / 'benchmark.md'} and .csv have the table")


if __name__ == "__main__":
    main()
