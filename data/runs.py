"""A run: its flags, device, seeds and ranks, its folder and files, its log, and how it stops.

The three scripts share what stands here. A run folder belongs to one process, is described by
`args.json` and logged as JSON lines. A file is complete or absent: it is written under a temporary
name beside its place, then renamed. A user's mistake is a `UserError`: one line on standard error,
exit code 2, no traceback.
"""

import argparse
import contextlib
import csv
import ctypes
import hashlib
import importlib.util
import io
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.distributed as distributed

try:
    import fcntl
except ImportError:
    fcntl = None  # Windows has no such locks

ROOT = Path(__file__).resolve().parent.parent  # the repository, wherever a script is started from
DOWNLOADS = ROOT / "data" / "downloads"  # default of --data-dir and --weights-dir; git ignores it
LOCK = ".lock"  # the file in a run folder that its process holds
OFFLINE = (
    "OFFLINE: networks without a file are random, MNIST's digits and textures synthetic. Results "
    "say nothing about MNIST or ImageNet."
)


class UserError(Exception):
    """A mistake that the user can mend. The message says what was wrong, where, and what to do."""


class Stopped(Exception):
    """SIGTERM or Ctrl-C has stopped the run, and everything is saved. number: of the signal."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number


def run_main(main):
    """Call `main()`, and set the exit code.

    2, and one line on standard error, for a UserError, a file that the system refuses, or a full
    memory; 128 + the signal's number for a stopped run, so that neither `train && generate` nor a
    scheduler takes it for a complete one.
    """
    protect_output()
    try:
        main()
    except Stopped as stop:
        sys.exit(128 + stop.number)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        # A folder that may not be read, a name that is too long, a full disk.
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error) or "no memory left"
        print(f"error: out of memory ({reason[:200]}); try a smaller --batch-size", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


class Output:
    """A stream whose failures end no run: what cannot be written is dropped.

    The program that reads a pipe may have ended, a disk may be full, a terminal may be closed.
    """

    def __init__(self, stream):
        self.stream = stream
        # A name of the user's may have letters that the terminal's encoding lacks.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
        except OSError:
            self.drop()
        return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            self.drop()

    def drop(self):
        """Send what is still buffered, and all that follows, to nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)


def protect_output():
    """Let no failure of standard output or standard error end the run."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed when the program was started
            stream = open(os.devnull, "w")
        if not isinstance(stream, Output):
            setattr(sys, name, Output(stream))


def is_out_of_memory(error):
    """Whether an exception means a full memory, and not, say, an illegal memory access on a GPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # PyTorch's CPU allocator has no exception class of its own.
    return "DefaultCPUAllocator" in str(error) or "can't allocate memory" in str(error)


def first_line(error):
    """The first line of an exception's text; "" if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


# --------------------------------------------------------------------------------------------------
# Flags


def positive_int(text, low=1):
    """argparse type: an integer of at least 1 and below 2^31."""
    value = int(text)
    if not low <= value < 2**31:
        raise argparse.ArgumentTypeError(
            f"{text[:20]} is not a whole number from {low} to {2**31 - 1}"
        )
    return value


def non_negative_int(text):
    """argparse type: an integer of at least 0 and below 2^31."""
    return positive_int(text, low=0)


def finite_float(text, low, high):
    """A finite number within [low, high]."""
    value = float(text)
    if not low <= value <= high or math.isinf(value):
        raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
    return value


def non_negative_float(text):
    """argparse type: a finite number of at least 0."""
    return finite_float(text, 0.0, math.inf)


def fraction(text):
    """argparse type: a number from 0 to 1."""
    return finite_float(text, 0.0, 1.0)


def positive_float(text, high=math.inf):
    """argparse type: a finite number above 0."""
    value = finite_float(text, 0.0, high)
    if value == 0:
        raise argparse.ArgumentTypeError("should be above 0")
    return value


def truncation(text):
    """argparse type: a number above 0 and at most 1."""
    return positive_float(text, high=1.0)


def name_and_path(text):
    """The value NAME=PATH of a flag, as (name, path)."""
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{text}: should be NAME=PATH")
    return name, path


def look_ahead(argv, *flags):
    """The values of a few flags, read before the parser is built: which other flags it gets depends
    on them. None where a flag is not given; whatever is wrong is left for the parser to tell.
    """
    early = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    for flag in flags:
        early.add_argument(flag, nargs="?")
    known, _ = early.parse_known_args(argv)
    return [getattr(known, flag.removeprefix("--")) for flag in flags]


def refuse_flags(parser, group, args, why):
    """The parser's error if a flag of an argument group was changed, though nothing uses it."""
    for action in group._group_actions:
        if getattr(args, action.dest) != parser.get_default(action.dest):
            parser.error(f"{action.option_strings[0]}: {why}")


def command_line(*words):
    """A command to copy into a shell, whatever its paths are named."""
    return "python " + shlex.join(map(str, words))


# --------------------------------------------------------------------------------------------------
# Device and seeds


def pick_device(name):
    """`auto` is the GPU if there is one, else the CPU. UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device == torch.device("cuda"):  # under torchrun a GPU for each rank, from the first use
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"--device {name}: not usable here ({first_line(error)}); try --device cpu"
        ) from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # CUDA graphs are recorded on the current device
    if device.type == "cpu":
        keep_freed_memory()
    return device


def cpu_count():
    """The CPU cores that this process may use: a scheduler may lend it some of the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def keep_freed_memory():
    """Let this process keep the memory of large tensors for the next ones, where it runs on glibc.

    By default, tensors above 32 MB are taken from the system and given back one by one, and each
    page of 4 KB is a fault at its first use. On a CPU this was a tenth of an ImageNet training
    step, and a third of one of a ResNet-50 with 64 images.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    glibc = ctypes.CDLL(None)
    glibc.mallopt(-4, 0)  # M_MMAP_MAX: no tensor gets pages of its own
    glibc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and none of the others go back


def check_compiler():
    """UserError without the C++ compiler that torch.compile needs."""
    compilers = (os.environ.get("CXX"), "c++", "g++", "clang++", "cl")
    if not any(shutil.which(compiler) for compiler in compilers if compiler):
        raise UserError("--compile: needs a C++ compiler, such as g++, on the PATH")


def pick_bf16(amp, device):
    """`auto` is bf16 where the hardware multiplies it: most GPUs, CPUs with AVX-512 BF16 or AMX.

    `off` is float32 in convolutions as well, which cuDNN would round to the 10 bits of TF32.
    """
    if amp == "off":
        torch.backends.cudnn.allow_tf32 = False
    if amp != "auto":
        return amp == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and supported is not None and supported()


def derived_seed(*key):
    """The seed of one random stream of a run, from the run's seed, the stream's name and the index
    of a step, an epoch or an image in it.

    A stream that is seeded at each index draws the same after an interruption, on several ranks and
    with another batch size. The formulas of three streams are older than the hash; they stay, so
    that the bundled weights and the results in the READMEs can be repeated.
    """
    seed, *stream, index = key
    if stream == ["step"]:
        return (seed * 1_000_003 + index * 7_919 + 17) % 2**32
    if stream == ["order"]:
        return derived_seed(seed, "step", index) ^ 0x5EED
    if stream == ["classifier order"]:
        return 1_000_003 * seed + index
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def seeded_generator(*key, device="cpu"):
    """A random generator whose numbers depend on the key alone, see `derived_seed`."""
    return torch.Generator(device).manual_seed(derived_seed(*key))


# --------------------------------------------------------------------------------------------------
# Several processes, started by torchrun


def join_ranks(device):
    """Meet the other processes that torchrun started. Returns this one's device: a GPU for each."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def check_one_process(dataset):
    """UserError if torchrun started several processes for a data set that needs only one."""
    if dataset != "imagenet" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("several GPUs: only for --dataset imagenet; others fit one")


def rank_and_world_size():
    """This process's index and the number of processes: (0, 1) without torchrun."""
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def is_main_rank():
    """Whether this process writes files and prints."""
    return rank_and_world_size()[0] == 0


def wait_for_ranks():
    """Return once every rank has come here."""
    if distributed.is_initialized():
        distributed.barrier()


def sum_over_ranks(value):
    """The sum of a tensor over all ranks; the tensor itself stays as it is."""
    if distributed.is_initialized():
        value = value.clone()
        distributed.all_reduce(value)
    return value


def mean_over_ranks(value):
    """The mean of a tensor over all ranks; the tensor itself stays as it is."""
    _, world_size = rank_and_world_size()
    return value if world_size == 1 else sum_over_ranks(value) / world_size


def any_across_ranks(flag, device):
    """Whether the flag is set on any rank: they have to stop together."""
    if not distributed.is_initialized():
        return bool(flag)
    return mean_over_ranks(torch.tensor(float(bool(flag)), device=device)).item() > 0


# --------------------------------------------------------------------------------------------------
# Files: complete or absent


@contextlib.contextmanager
def atomic(path):
    """`with atomic(path) as temporary:` write to `temporary`. It is flushed to disk and renamed to
    `path` at the end, so that a reader sees the old file or the new one, whole.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:  # Windows flushes no file that is only read
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def cannot_write(path, error):
    """The UserError of a file that could not be written."""
    reason = getattr(error, "strerror", None) or first_line(error)
    return UserError(f"cannot write {path}: {reason}; free some space, or choose another --out")


def entries(folder):
    """What lies in a folder of data, sorted. Every such folder is listed here, without what is
    never data: .DS_Store, ._0.png, .ipynb_checkpoints, and what archives and servers add.
    """
    return sorted(
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and path.name not in ("__MACOSX", "__pycache__", "@eaDir")
    )


# How text is read and written: names of files need not be UTF-8, and stay what they are.
AS_BYTES = {"encoding": "utf-8", "errors": "surrogateescape"}


def csv_text(rows):
    """Rows as the text of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_csv(path, rows):
    """Write rows as a CSV file, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(csv_text(rows), **AS_BYTES)


def append_text(path, text):
    """Append lines. A kill may cut the last one."""
    try:
        with open(path, "a", **AS_BYTES) as file:
            file.write(text)
    except OSError as error:
        raise cannot_write(path, error) from None


def file_sha256(path):
    """The SHA-256 of a file in hexadecimal. UserError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    return digest.hexdigest()


def write_json(path, value):
    """Write a value as JSON, atomically. Paths become strings."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, default=str) + "\n")


def save_tensors(path, value):
    """Write tensors and plain values, atomically, so that `weights_only=True` can read them."""
    with atomic(path) as temporary:
        try:
            torch.save(value, temporary)
        except RuntimeError as error:  # torch's writer has no OSError for a full disk
            raise cannot_write(path, error) from None


def load_tensors(path, device="cpu"):
    """What a file of tensors holds, read with `weights_only=True` and memory-mapped if possible:
    Windows replaces no file that is mapped, and a resumed run replaces its checkpoint.

    UserError if the file is missing, damaged, or holds anything that could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        refuse_compressed(path)
        # Files older than torch 1.6 are not zip archives and cannot be mapped.
        mapped = os.name != "nt" and zipfile.is_zipfile(path)
        return torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except Exception as error:  # damaged files raise nearly anything
        reason = first_line(error) or type(error).__name__
        raise UserError(
            f"{path}: not a readable weights file, damaged or of a foreign kind ({reason[:160]})"
        ) from None


def refuse_compressed(path):
    """ValueError for an archive with compressed parts: torch writes none, and a small one may
    unpack to any size.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise ValueError("a compressed archive, which torch never writes")


def is_intact_archive(path):
    """Whether the checksums within a zip archive, which torch writes since 2020, are right. Older
    formats have none and pass.
    """
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return True
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # damaged archives raise nearly anything
        return False


# --------------------------------------------------------------------------------------------------
# Run folders


@contextlib.contextmanager
def claim_folder(out, script, resuming):
    """`with claim_folder(...):` make the run folder and hold it; a second process is refused.

    A folder that is not empty is taken only if `script` made it and it is to be resumed. With
    several ranks, rank 0 holds it for all. UserError for any other folder.
    """
    if not is_main_rank():
        yield
        return
    out = Path(out)
    check_folder(out, Path(script).name, resuming)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot make the folder ({error.strerror})") from None
    try:
        lock = lock_file(out / LOCK)
    except OSError as error:
        raise cannot_write(out / LOCK, error) from None
    if not lock:
        raise UserError(
            f"--out {out}: another process is at work in this folder; wait for it, or choose "
            "another folder"
        )
    with lock:
        for left in out.glob("**/.*.tmp"):  # of a run that was killed while writing
            left.unlink(missing_ok=True)
        yield


def check_folder(out, script, resuming):
    """UserError if `out` cannot be this run's folder."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file of that name exists; choose another folder")
    # A run that was cut short before its args.json left no more than a lock and an empty log.
    if not out.is_dir() or all(path.name in (LOCK, "log.jsonl") for path in out.iterdir()):
        return
    try:
        ours = json.loads((out / "args.json").read_text())["script"] == script
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"--out {out}: the folder holds other files; choose another folder")
    if not resuming:
        raise UserError(
            f"--out {out}: the folder holds another run; continue it with --resume, or choose "
            "another folder"
        )


def lock_file(path, wait=False):
    """Lock the file `path` until what is returned is closed. None if another process has it."""
    file = open(path, "a")
    try:
        # Locks of this kind are not inherited by forked processes such as data loaders.
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except OSError:  # a file system without locks
        pass
    return file


def describe_run(out, script, args):
    """Write args.json (arguments, versions, device, git revision) and a copy of the script.

    args: a dict. Only rank 0 writes.
    """
    if not is_main_rank():
        return
    script = Path(script)
    device = platform.processor() or "cpu"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    description = {
        "script": script.name,
        "args": to_jsonable(args),
        "revision": git_revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": device,
    }
    write_json(out / "args.json", description)
    with atomic(out / script.name) as temporary:
        temporary.write_bytes(script.read_bytes())


def git_revision():
    """The commit of this code. None without git, or if the code lies in another repository."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        done = subprocess.run(git, capture_output=True, text=True)
    except OSError:
        return None
    top, _, revision = done.stdout.strip().partition("\n")
    return revision if done.returncode == 0 and Path(top).resolve() == ROOT else None


def to_jsonable(args):
    """Arguments (a dict) as they read back from JSON: paths become strings."""
    return json.loads(json.dumps(args, default=str))


# --------------------------------------------------------------------------------------------------
# Log and stop


class Log:
    """JSON lines in `path`, and a progress line on the screen, which renews itself on a terminal.

    When a run resumes at `step` with `epoch` epochs evaluated, later lines are dropped: they will
    be written again. Values go to TensorBoard, too, into the folder of `path`, if it is installed.
    """

    def __init__(self, path, step=0, epoch=math.inf):
        lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
        kept = [line for line in lines if is_earlier(line, step, epoch)]
        with atomic(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))
        self.path = path
        self.first_step = step
        self.start_time = time.monotonic()  # a clock may be set
        self.live = sys.stdout.isatty()
        self.board = open_board(path.parent, step)

    def write(self, step, /, **values):
        """Append one line of named numbers."""
        append_text(self.path, json.dumps({"step": step} | values) + "\n")
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()

    def progress(self, step, last_step, values):
        """Print the step, the rate, the time left, and values by name."""
        seconds = max(time.monotonic() - self.start_time, 1e-9)
        rate = max(step - self.first_step, 1e-9) / seconds
        left = int((last_step - step) / rate)
        pace = f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s/step"
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        line = f"{step}/{last_step}  {pace}  {left // 60}:{left % 60:02d} left  {numbers}"
        if not self.live:
            print(line, flush=True)
            return
        end = "" if step < last_step else "\n"
        print(f"\r\x1b[K{line}", end=end, flush=True)


def open_board(folder, step):
    """TensorBoard's writer for a run that goes on after `step`. None if it is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as error:  # a folder of that name is found, too
        print(f"no TensorBoard: it cannot be imported ({first_line(error)})", file=sys.stderr)
        return None
    return SummaryWriter(folder, purge_step=step + 1)


def is_earlier(line, step, epoch):
    """Whether a line of a log belongs to what was done by this step and epoch."""
    try:
        values = json.loads(line)
        return values["step"] <= step and values.get("epoch", 0) <= epoch
    except (ValueError, KeyError, TypeError, AttributeError):  # a kill may have cut the last one
        return False


class StopSignal:
    """True once SIGTERM or Ctrl-C has come, or the terminal was closed: finish the step, save,
    raise `stopped()`. A second signal ends the run at once.
    """

    def __init__(self):
        self.number = None  # of the signal
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)
        # A closed terminal, unless nohup has the run go on without one.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self.receive)

    def receive(self, number, frame):
        if self:
            raise KeyboardInterrupt
        self.number = number

    def __bool__(self):
        return self.number is not None

    def stopped(self):
        """The exception to raise once all is saved. Another rank may have had the signal."""
        return Stopped(self.number or signal.SIGTERM)
