"""Helpers for all tests: scripts run as a user runs them, and a small MNIST in IDX files."""

import gzip
import importlib
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SOAK = pytest.mark.soak
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    # The Triton kernels run as Python; to be set before they are imported.
    os.environ["TRITON_INTERPRET"] = "1"

from data import runs  # noqa: E402  (needs the path above)
from data.synthetic import synthetic_digits  # noqa: E402
from parallel import pytest_addoption, pytest_runtestloop  # noqa: E402, F401  (hooks of pytest)


def repair_interpreter():
    """Triton 3.4's and 3.6's interpreters take int() of arrays of one element, which numpy 2.4
    refuses.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    original = interpreter._patch_lang_tensor

    def patch(tensor, *scope):
        original(tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr  # Triton 3.4 has no scopes
        set_attribute(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


repair_interpreter()


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "soak: long forms of the reliability tests; run with -m soak"
    )


def pytest_collection_modifyitems(config, items):
    if "soak" in config.getoption("-m"):
        return
    long = [item for item in items if item.get_closest_marker("soak")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


@pytest.fixture(autouse=True)
def signal_handlers():
    """A loop that ran within a test leaves its StopSignal behind: pytest would not stop either."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------
# Comparing


def same(a, b):
    """Equal to the last bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def load(path):
    return torch.load(path, weights_only=True)


def contents(folder):
    """File name -> tensors, lines or bytes of all that a run wrote.

    Without what names the folder or the moment.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        unlike = ("args.json", ".lock", "checkpoint_before.pt")
        if path.is_dir() or path.name in unlike or path.suffix == ".py":
            continue
        name = str(path.relative_to(folder))
        found[name] = load(path) if path.suffix == ".pt" else path.read_bytes()
        if isinstance(found[name], dict):
            found[name].pop("args", None)
    return found


# --------------------------------------------------------------------------------------------------
# Mistakes


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Call with words and a command: one line with these words, exit code 2, nothing written."""

    def check(words, script, *flags):
        out = tmp_path / "out"
        command = [script, *flags, "--out", out]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        with pytest.raises(SystemExit) as stop:  # in this process, which saves two seconds
            runs.run_main(importlib.import_module(script.removesuffix(".py")).main)
        errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert stop.value.code == 2 and len(errors) == 1 and words in errors[0]
        # The folder is free for the next try.
        assert not out.exists() or {file.name for file in out.iterdir()} <= {".lock"}

    return check


# --------------------------------------------------------------------------------------------------
# Development data, named by environment variables


def folder_from(variable):
    """The folder that an environment variable names, or None."""
    return Path(os.environ[variable]) if os.environ.get(variable) else None


def fixture_files(pattern):
    """Fixture files as test parameters; one skipped parameter that says why if there are none."""
    folder = folder_from("CGN_FIXTURES")
    files = sorted(folder.glob(pattern)) if folder else []
    if not files:
        reason = f"CGN_FIXTURES names no folder with {pattern}"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
    return [pytest.param(file, id=file.name) for file in files]


# --------------------------------------------------------------------------------------------------
# Running scripts. Their processes are forked from one that has imported torch and nothing else:
# importing it takes most of the time of a small run.

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["torch", "torchvision", "torch.distributed", "kernels"])


def as_main(command, output, bytes_per_file, environment):
    """In a process of its own: what `python script.py --flags` does, with its output in files."""
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # what python starts with, not forkserver
    for number, path in enumerate(output, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    if bytes_per_file:  # what stands in for a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_per_file, bytes_per_file))
    sys.argv = command
    code = 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    sys.exit(code)  # here all frames of the script are gone, and with them the workers they hold


def start(script, *flags, output=("/dev/null", "/dev/null"), bytes_per_file=None, environment=()):
    """A process that runs a script of the repository."""
    command = [str(ROOT / script), *map(str, flags)]
    args = (command, output, bytes_per_file, dict(environment))
    process = processes.Process(target=as_main, args=args, name=" ".join(command))
    process.start()
    return process


def run(script, *flags, expect=0, bytes_per_file=None):
    """Run a script of the repository in a process of its own. Returns its output, which shows on
    failure.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = output_files(folder)
        process = start(script, *flags, output=output, bytes_per_file=bytes_per_file)
        return finish(process, output, expect)


def run_ranks(ranks, script, *flags, expect=0):
    """Run a script on several ranks of this CPU, with what it reads of torchrun's environment.

    Returns what each rank wrote.
    """
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in map(str, range(ranks)):
            output = output_files(folder, rank)
            environment = common | {"RANK": rank, "LOCAL_RANK": rank}
            process = start(script, *flags, output=output, environment=environment)
            started.append((process, output))
        try:
            return [finish(process, output, expect) for process, output in started]
        finally:
            for process, _ in started:
                process.kill()


def output_files(folder, rank=""):
    return [Path(folder, name + rank) for name in ("stdout", "stderr")]


def finish(process, output, expect=0):
    """Wait for a process that `start` began. Returns what it wrote."""
    process.join(300)
    process.kill()  # if it is still there
    stdout, stderr = (path.read_text() if path.exists() else "" for path in output)
    shown = f"{process.exitcode}: {process.name}\n{stdout[-2000:]}\n{stderr[-3000:]}"
    assert process.exitcode == expect, shown
    return types.SimpleNamespace(stdout=stdout, stderr=stderr)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def kill_and_finish(script, flags, out, kills, seconds):
    """Start, kill -9 at a random moment and start again, `kills` times; then run to the end.

    Returns how many kills hit a running process.
    """
    moments = random.Random(kills)
    hits = 0
    for _ in range(kills):
        process = start(script, *flags, "--resume", "auto", "--out", out)
        process.join(moments.uniform(0.3, 0.3 + 2 * seconds / kills))
        hits += process.exitcode is None
        process.kill()
        process.join()
    run(script, *flags, "--resume", "auto", "--out", out)
    assert not list(out.rglob("*.tmp"))
    return hits


def check_kills(script, flags, tmp_path, kills):
    """A run that was killed again and again writes the same as one that was not."""
    begun = time.time()
    run(script, *flags, "--out", tmp_path / "whole")
    hits = kill_and_finish(script, flags, tmp_path / "killed", kills, time.time() - begun)
    whole = contents(tmp_path / "whole")
    killed = contents(tmp_path / "killed")
    assert hits and whole.keys() == killed.keys()
    assert [name for name in whole if not same(whole[name], killed[name])] == []


def torchrun(ranks, script, *flags):
    """What `torchrun` does, which takes longer than `run_ranks`: it imports torch again."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--master-port", free_port(), "--", str(ROOT / script), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


# --------------------------------------------------------------------------------------------------
# Small runs


SMALL_IMAGENET = (
    "--dataset imagenet --preset small --offline --device cpu --amp off --batch-size 2"
    " --style-weights 1 0 0 0 --texture-weights 1 0 0 0"
).split()


@pytest.fixture(scope="session", autouse=True)
def remove_temporary_files(request, tmp_path_factory):
    """They are 6 GB, which pytest would keep for three runs. Kept if a test has failed."""
    yield
    if not request.session.testsfailed:
        shutil.rmtree(tmp_path_factory.getbasetemp(), ignore_errors=True)


@pytest.fixture(scope="session")
def small_cgn(tmp_path_factory):
    """The run folder of an ImageNet CGN of the small preset, after three steps."""
    out = tmp_path_factory.mktemp("imagenet") / "run"
    flags = "--accumulate 2 --max-steps 3 --log-every 1 --save-every 2".split()
    run("train_cgn.py", *SMALL_IMAGENET, *flags, "--out", out)
    return out


def write_idx(path, values):
    """A uint8 tensor as an IDX file, gzipped if the name says so."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    raw = bytes([0, 0, 8, values.ndim]) + sizes + values.numpy().tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_mnist(folder, training, test):
    """A folder like MNIST's: synthetic digits to train and to test, gzipped under MNIST/raw."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count, seed in (("train", training, 1), ("t10k", test, 2)):
        images, labels = synthetic_digits(count, seed=seed)
        write_idx(raw / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte.gz", labels.to(torch.uint8))
    return folder


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """600 digits to train, 200 to test."""
    return write_mnist(tmp_path_factory.mktemp("mnist"), 600, 200)


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory):
    """96 digits to train, 40 to test."""
    return write_mnist(tmp_path_factory.mktemp("few"), 96, 40)


@pytest.fixture(scope="session")
def tiny(digits_dir):
    """Flags of a training that takes a second: few digits, no VGG."""
    flags = (
        "--style-weights 0 0 0 0 --device cpu --ndf 16 --max-steps 6 --decay 0 --warmup 2"
        " --log-every 2 --sample-every 0 --save-every 3 --segmenter-steps 0 --batch-size 8"
    )
    return ["--data-dir", str(digits_dir), *flags.split()]


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """An untrained MNIST generator's weights.pt."""
    import train_cgn

    path = tmp_path_factory.mktemp("untrained") / "weights.pt"
    state = train_cgn.MnistCGN().state_dict()
    args = {"dataset": "colored_mnist", "offline": False}
    torch.save({"generator": state, "average": state, "step": 0, "args": args}, path)
    return path
