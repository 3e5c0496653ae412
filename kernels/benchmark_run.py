"""Time whole training steps and generated images as the scripts run them, by kind of kernels.

    python kernels/benchmark_run.py --dataset colored_mnist
    python kernels/benchmark_run.py --dataset imagenet --variants eager triton graph
    python kernels/benchmark_run.py --dataset imagenet --preset small --device cpu --rounds 1

Random networks and synthetic digits, at the sizes that training has. train_cgn.py itself is run,
each variant in a process of its own, and a clock is read where a step ends. "of matmul" is the
share of what a large matrix product reaches in the same run. A variant that fails gets a row that
says why.
"""

import argparse
import concurrent.futures
import contextlib
import io
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import generate  # noqa: E402  (needs the path above)
import train_cgn  # noqa: E402
from data import checkpoints, mnist, runs  # noqa: E402
from kernels import GraphedStep, graphs, power_iteration  # noqa: E402

VARIANTS = {
    "eager": ["--kernels", "eager"],
    "triton": ["--kernels", "triton"],
    "graph": ["--kernels", "auto", "--graph", "auto"],
    "compile": ["--kernels", "auto", "--graph", "auto", "--compile"],  # ImageNet's mechanisms
}
WARMUP = graphs.EAGER_CALLS + 1  # rounds before timing begins: in the last, graphs are recorded
COLUMNS = ("what", "variant", "images/s", "ms a batch", "peak GB", "TFLOP/s", "of matmul")


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_speed(device, dtype):
    """FLOP/s of a large matrix product."""
    side = 8192 if device.type == "cuda" else 1536
    a = torch.randn(side, side, device=device).to(dtype)
    seconds = []
    for _ in range(10):
        synchronize(device)
        begun = time.perf_counter()
        a @ a
        synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return 2 * side**3 / min(seconds)


def peak_memory(device):
    """Bytes, or None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


# --------------------------------------------------------------------------------------------------
# What is timed


def steps_in_a_round(args):
    """MNIST's style loss comes in every eighth step."""
    return 1 if args.dataset == "imagenet" else 8


def training_flags(args, variant, out):
    steps = (WARMUP + args.rounds) * steps_in_a_round(args)
    flags = ["--dataset", args.dataset, "--offline", "--out", out, "--device", args.device]
    flags += ["--max-steps", steps, "--sample-every", 0, "--graph", "off", *VARIANTS[variant]]
    if args.dataset == "imagenet":
        flags += ["--preset", args.preset, "--accumulate", args.accumulate]
    else:
        flags += ["--warmup", 0, "--segmenter-steps", 0, "--style-every", steps_in_a_round(args)]
    if args.batch_size:
        flags += ["--batch-size", args.batch_size]
    return list(map(str, flags))


def time_training(args, variant):
    """Images in a round, batches in a round, seconds of a round, peak bytes, FLOP of a round."""
    device = torch.device(args.device)
    steps = steps_in_a_round(args)
    moments = []
    end_step = checkpoints.Training.end_step
    counter = FlopCounterMode(display=False)
    flops = []  # counted up to the end of the first round, and of the second

    def note(training, *rest):
        synchronize(device)
        moments.append(time.perf_counter())
        if variant == "eager" and len(moments) in (steps, 2 * steps):
            flops.append(counter.get_total_flops())
            if len(flops) == 2:
                counter.__exit__(None, None, None)
        return end_step(training, *rest)

    checkpoints.Training.end_step = note
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["train_cgn.py", *training_flags(args, variant, Path(folder) / "run")]
        given = train_cgn.parse_args()
        if variant == "eager":
            counter.__enter__()
        with contextlib.redirect_stdout(io.StringIO()):
            train_cgn.main()
    seconds = (moments[-1] - moments[WARMUP * steps - 1]) / args.rounds
    batches = steps * getattr(given, "accumulate", 1)
    images = given.batch_size * batches
    flops_of_round = flops[1] - flops[0] if flops else None
    return images, batches, seconds, peak_memory(device), flops_of_round


@torch.inference_mode()
def time_generation(args):
    """As time_training, of images that are generated."""
    device = torch.device(args.device)
    bf16 = runs.pick_bf16("auto", device)
    if args.dataset == "imagenet":
        config = train_cgn.SMALL if args.preset == "small" else {}
        cgn = train_cgn.ImageNetCGN(args.preset == "small", cgan=False, **config).eval()
        for _ in range(5):  # singular values far too small would make NaN
            power_iteration(cgn)
        cgn = train_cgn.fold(cgn, 0.5).to(device, torch.bfloat16 if bf16 else torch.float32)
        n = args.batch_size or 16
        z = torch.randn(n, cgn.f_shape.z_dim, device=device)
        y = torch.randint(1000, (n, 3), device=device)

        def draw_batch(z, y):
            return generate.imagenet_images(cgn, z, y, 0.5)

        graphed = GraphedStep(draw_batch, [], device.type == "cuda")

        def draw():
            graphed(z, y)["counterfactual"].cpu()
    else:
        cgn = train_cgn.MnistCGN(texture_padding="circular").eval()
        cgn = cgn.to(device, memory_format=torch.channels_last)
        settings = generate.Settings(0, 1, 0.05, False, "")
        n = args.batch_size or 2000

        def draw():
            generate.generate_batch(cgn, settings, 0, n, device)

    for _ in range(WARMUP):
        draw()
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(args.rounds):
        draw()
    synchronize(device)
    return n, 1, (time.perf_counter() - begun) / args.rounds, peak_memory(device), None


# --------------------------------------------------------------------------------------------------
# The table


def measure_job(args, what, variant):
    """time_training or time_generation in this process, or the first line of an error."""
    try:
        return time_training(args, variant) if what == "training" else time_generation(args)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def make_row(what, variant, result, flops, speed):
    if isinstance(result, str):
        return [what, variant, result, *["-"] * (len(COLUMNS) - 3)]
    images, batches, seconds, peak, _ = result
    row = [what, variant, f"{images / seconds:.1f}", f"{seconds / batches * 1e3:.1f}"]
    row.append(f"{peak / 1e9:.1f}" if peak else "-")
    if flops and what == "training":
        return [*row, f"{flops / seconds / 1e12:.3g}", f"{100 * flops / seconds / speed:.0f} %"]
    return [*row, "-", "-"]


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--dataset", choices=[*mnist.VARIANTS, "imagenet"], default="colored_mnist", help="to train"
    )
    parser.add_argument(
        "--preset", choices=["full", "small"], default="full", help="size of ImageNet's networks"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=["eager", "triton"],
        help="kernels to train with",
    )  # fmt: skip
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help="where to run")
    parser.add_argument("--batch-size", type=runs.positive_int, help="if not given, the script's")
    parser.add_argument(
        "--accumulate", type=runs.positive_int, default=8, help="batches in a step of ImageNet's"
    )
    parser.add_argument(
        "--rounds", type=runs.positive_int, default=5, help="timed steps; of MNIST eight each"
    )
    return parser.parse_args()


def main():
    args = parse_args()
    device = torch.device(args.device)
    bf16 = runs.pick_bf16("auto", device)
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        name = torch.cuda.get_device_name(device)
    speed = matmul_speed(device, torch.bfloat16 if bf16 else torch.float32)
    print(
        f"{name}, torch {torch.__version__}, {'bf16' if bf16 else 'float32'}, "
        f"matmul {speed / 1e12:.2f} TFLOP/s; {args.dataset}\n"
    )
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS), flush=True)
    context = multiprocessing.get_context("spawn")
    flops = None
    jobs = [("training", variant) for variant in args.variants] + [("generation", "-")]
    for what, variant in jobs:
        with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
            try:
                result = pool.submit(measure_job, args, what, variant).result()
            except concurrent.futures.process.BrokenProcessPool:
                result = "its process was ended, perhaps for want of memory"
        if not isinstance(result, str):
            flops = result[-1] or flops
        print("| " + " | ".join(make_row(what, variant, result, flops, speed)) + " |", flush=True)


if __name__ == "__main__":
    main()
