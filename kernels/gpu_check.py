"""The first hour on a GPU: what only a GPU can tell, in order of worth, as one report.

    python kernels/gpu_check.py --out runs/gpu                # all six checks
    python kernels/gpu_check.py --only 1 2 --out runs/gpu12   # each takes at most ten minutes
    python kernels/gpu_check.py --device cpu --small          # a rehearsal, in minutes

Needs no network: networks are random and digits synthetic, but for MNIST files and VGG-16 where
--data-dir and --weights-dir name them. Each check is some commands; report.md has for each the
command, its time, what must show, and the end of its output.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
TAIL = 40  # lines of output that the report keeps


class Command(NamedTuple):
    words: list  # after "python"
    limit: int  # seconds
    stop_after: float = 0.0  # seconds until SIGTERM; 0: none
    before: tuple = ()  # words in front of "python"


class Check(NamedTuple):
    title: str
    must_show: str
    commands: list


def list_checks(args):
    """The six checks; the small ones have the same commands at sizes for a CPU."""

    def sized(small, full):
        return (small if args.small else full).split()

    device = ["--device", args.device]
    out = args.out
    data = ["--offline"]
    weights = []
    if args.data_dir:
        data = ["--data-dir", args.data_dir]
        weights = ["--weights-dir", args.weights_dir]

    tests = "-m pytest -q -rs tests/test_kernels.py".split()
    tests += sized("-k keeps_nan", "tests/test_losses.py tests/test_graphs.py")
    correct = [Command(tests, 400)]
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9")
    if shutil.which(sanitizer[0]) and not args.small:
        few = "-m pytest -q --processes 1 tests/test_kernels.py -k".split()
        correct.append(Command([*few, "single or nan"], 180, before=sanitizer))

    batch = ["kernels/benchmark_run.py", "--dataset", "imagenet", *device]
    batch += sized(
        "--preset small --accumulate 1 --rounds 1 --variants eager",
        "--variants triton graph eager compile",
    )
    times = ["kernels/benchmark.py", *device, "--out", out / "kernels"]
    times += sized(
        "--shapes mnist --operations composite --seconds 0 --no-compile --dtypes float32", ""
    )

    cgn = out / "imagenet"
    train = ["train_cgn.py", *"--dataset imagenet --preset small --offline".split(), *device]
    train += ["--out", cgn, *sized("--max-steps 40 --batch-size 2", "--max-steps 300")]
    draw = ["generate.py", "--dataset", "imagenet", "--weights", cgn / "weights.pt", *device]
    draw += ["--truncation", 1, "--n", *sized("2", "512"), "--out", out / "imagenet-pictures"]

    steps = ["kernels/benchmark_run.py", "--dataset", "colored_mnist", *device]
    steps += sized("--rounds 1 --variants eager", "--rounds 40 --variants triton eager graph")

    digits = ["--dataset", "colored_mnist", *data, *device]
    learn = ["train_cgn.py", *digits, *weights, "--sample-every", 0, "--out", out / "colored"]
    learn += sized("--max-steps 4 --segmenter-steps 2", "")
    dress = ["generate.py", "--weights", out / "colored" / "weights.pt", *device]
    dress += ["--n", *sized("200", "100000"), "--out", out / "colored-cf"]
    classify = ["train_classifier.py", *digits, "--train", "counterfactual", "--augment", 0.5]
    classify += ["--counterfactual", out / "colored-cf", "--out", out / "colored-classifier"]
    classify += sized("--epochs 1 --max-steps 2", "")

    return [
        Check("Correctness", "no test fails, no error of the sanitizer", correct),
        Check(
            "An ImageNet batch",
            "images/s of each kind: Triton above eager, with graphs twice as many; its peak memory",
            [Command(batch, 590)],
        ),
        Check(
            "The kernels",
            "composite at 85 % of a copy; style loss twice as fast as eager, 1.3 times as compiled",
            [Command(times, 590)],
        ),
        Check(
            "Interrupted and resumed, then pictures",
            "the first ends with 143, the second goes on where it stopped; images/s",
            [
                Command(train, 120, stop_after=8 if args.small else 25),
                Command([*train, "--resume"], 300),
                Command(draw, 150),
            ],
        ),
        Check(
            "Steps of colored MNIST",
            "images/s with either kernels, and with CUDA graphs: a step of 128 in 3 ms",
            [Command(steps, 590)],
        ),
        Check(
            "A whole experiment: colored MNIST",
            "accuracy on decorrelated digits; the sum of the three times",
            [Command(learn, 400), Command(dress, 120), Command(classify, 300)],
        ),
    ]


def run_command(command):
    """Run it from the root. Returns exit code, seconds, and the last lines of its output."""
    words = [*command.before, sys.executable, *map(str, command.words)]
    begun = time.monotonic()
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its own processes can be stopped with it
    )
    output = None
    try:
        if command.stop_after:
            output = output_within(process, command.stop_after)
            if output is None:
                process.send_signal(signal.SIGTERM)
        if output is None:
            output = output_within(process, command.limit)
    finally:
        if output is None:  # too long, or Ctrl-C
            os.killpg(process.pid, signal.SIGKILL)
    if output is None:
        output, _ = process.communicate()
        output = output.rstrip() + f"\nstopped after {command.limit} s"
    return process.returncode, time.monotonic() - begun, last_lines(output)


def output_within(process, seconds):
    """What a process has written when it ends; None if it has not ended by then."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        return None


def last_lines(text):
    return "\n".join(text.replace("\r", "\n").splitlines()[-TAIL:])


def describe_versions():
    name = "no GPU"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    return f"{name}; torch {torch.__version__}, triton {version}, Python {sys.version.split()[0]}"


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help="where to run")
    parser.add_argument("--small", action="store_true", help="sizes for a rehearsal on a CPU")
    parser.add_argument(
        "--only", type=int, nargs="+", choices=range(1, 7), metavar="N", help="numbers of checks"
    )
    parser.add_argument("--data-dir", help="MNIST's files; synthetic digits if not given")
    parser.add_argument("--weights-dir", help="folder with VGG-16, needed with --data-dir")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder; is emptied")
    args = parser.parse_args()
    if bool(args.data_dir) != bool(args.weights_dir):
        parser.error("--data-dir and --weights-dir belong together")
    args.out = args.out.resolve()
    if args.out.is_dir() and any(args.out.iterdir()) and not (args.out / "report.md").is_file():
        parser.error(f"--out {args.out}: is emptied, and holds something else than a report")
    return args


def main():
    args = parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    report = [describe_versions()]
    for number, check in enumerate(list_checks(args), 1):
        if args.only and number not in args.only:
            continue
        report += ["", f"## {number}. {check.title}", "", f"Must show: {check.must_show}."]
        for command in check.commands:
            shown = " ".join(map(str, (*command.before, "python", *command.words)))
            print(f"{number}. {shown}", flush=True)
            code, seconds, output = run_command(command)
            print(f"   exit code {code}, {seconds:.0f} s", flush=True)
            report += ["", f"`{shown}`", "", f"Exit code {code}, {seconds:.1f} s.", ""]
            report += ["```", output, "```"]
            (args.out / "report.md").write_text("\n".join(report) + "\n")
    print(f"{args.out / 'report.md'} has it all")


if __name__ == "__main__":
    main()
