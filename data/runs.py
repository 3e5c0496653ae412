"""Run folders and the command line's manners, shared by the three scripts.

A run folder is claimed once, described by `args.json`, logged as JSON lines and never half-written: every file is
written under a temporary name beside its place and then renamed. A user's mistake is a `UserError`: one line on
standard error, exit code 2, no traceback.
"""
import argparse
import hashlib
import importlib.util
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.distributed as distributed
from PIL import Image, ImageDraw

try:
    import fcntl
except ImportError:
    fcntl = None                                           # Windows: no locks

ROOT = Path(__file__).resolve().parent.parent          # the repository, wherever the script is started from
DOWNLOADS = ROOT / "data" / "downloads"                # default of --data-dir and --weights-dir; ignored by git
LOCK, HELD = ".lock", []                               # the lock file in a run folder; open files whose locks are held


class UserError(Exception):
    """A mistake the user can mend. The message says what was wrong, which file or flag, and what to do."""


def run_main(main):
    """Call `main()`; a UserError ends in one line and exit code 2, Ctrl-C in exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:           # torch has a class of its own for GPUs alone
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else "no memory left"
        print(f"error: out of memory ({reason}); try a smaller --batch-size", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def positive_int(text, low=1):
    """argparse type: an integer of at least 1, and below 2^31."""
    value = int(text)
    if not low <= value < 2 ** 31:
        raise argparse.ArgumentTypeError(f"{text[:20]} is not a whole number from {low} to {2 ** 31 - 1}")
    return value


def non_negative_int(text):
    """argparse type: an integer of at least 0, and below 2^31."""
    return positive_int(text, low=0)


def finite_float(text, low=float("-inf"), high=float("inf")):
    """A finite float within [low, high], for argparse types made with `functools.partial` or as it is."""
    value = float(text)
    if not (low <= value <= high) or value in (float("inf"), float("-inf")):
        raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
    return value


def non_negative_float(text):
    """argparse type: a finite number of at least 0."""
    return finite_float(text, low=0.0)


def fraction(text):
    """argparse type: a number from 0 to 1."""
    return finite_float(text, low=0.0, high=1.0)


def truncation(text):
    """argparse type: above 0, at most 1."""
    value = finite_float(text, low=0.0, high=1.0)
    if value == 0:
        raise argparse.ArgumentTypeError("should be above 0")
    return value


def refuse_group(parser, group, args):
    """A parser's error if a flag of the argument group was given, though it has no meaning for this --dataset."""
    for action in group._group_actions:
        if getattr(args, action.dest) != parser.get_default(action.dest):
            where = f"for --dataset {args.dataset}" if args.dataset else "without --dataset imagenet"
            parser.error(f"{action.option_strings[0]}: has no meaning {where}")


def pick_device(name):
    """`auto` is the GPU if there is one, else the CPU. Raises UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: not usable here ({str(error).splitlines()[0]}); try --device cpu") from None
    return device


def pick_bf16(amp, device):
    """`auto` means bf16 where the hardware multiplies it: most GPUs, and CPUs with AVX-512 BF16 or AMX."""
    if amp != "auto":
        return amp == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


# ---------------------------------------------------------------------------------------------------------------------
# Files: complete or absent


def write_atomically(path, write):
    """`write(temporary_path)`, flush to disk, rename to `path`. A reader sees the old file or the new one, whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def cannot_write(path, error):
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return UserError(f"cannot write {path}: {reason}; free some space, or choose another --out")


def append_text(path, text):
    """Append lines; the last one may be cut by a kill."""
    try:
        with open(path, "a") as file:
            file.write(text)
    except OSError as error:
        raise cannot_write(path, error) from None


def file_sha256(path):
    """The hash of a file, in hexadecimal. UserError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(2 ** 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    return digest.hexdigest()


def write_json(path, value):
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n"))


def save_tensors(path, value):
    """`torch.save` of tensors and plain values, so that `weights_only=True` can read it back."""
    def write(temporary):
        try:
            torch.save(value, temporary)
        except RuntimeError as error:                      # torch's writer has no OSError for a full disk
            raise cannot_write(path, error) from None

    write_atomically(path, write)


def load_tensors(path, device="cpu"):
    """`torch.load(weights_only=True)`, memory-mapped if the format allows. UserError if missing, damaged or unsafe."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        refuse_compressed(path)
        try:
            return torch.load(path, map_location=device, weights_only=True, mmap=True)
        except RuntimeError as error:                  # files older than torch 1.6 are not zip archives
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:                         # damaged files raise nearly anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: not a readable weights file, damaged or of a foreign kind ({reason[:160]})") from None


def refuse_compressed(path):
    """ValueError for an archive with compressed parts: torch writes none, and a small one may unpack to any size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise ValueError("a compressed archive, which torch never writes")


def intact_archive(path):
    """Whether the checksums within a zip archive are right, as torch writes it since 2020. Older forms have none."""
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return True
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:                                      # damaged ones raise nearly anything
        return False


def save_png(path, image):
    """`image`: uint8 tensor (3, H, W)."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))


def tile_sheet(images, column_titles=(), row_titles=(), scale=3, gap=2):
    """A labelled contact sheet.

    images: (rows, columns, 1 or 3, H, W) in [0, 1]. Titles are drawn above the columns and left of the rows.
    Returns a uint8 tensor (3, height, width).
    """
    rows, columns, _, height, width = images.shape
    images = images.expand(rows, columns, 3, height, width).mul(255).round().clamp(0, 255).to(torch.uint8).cpu()
    images = images.repeat_interleave(scale, 3).repeat_interleave(scale, 4)
    height, width = height * scale + gap, width * scale + gap
    longest = max((len(line) for title in row_titles for line in title.split("\n")), default=0)
    left, top = (8 + 7 * longest if row_titles else gap), (16 if column_titles else gap)
    sheet = torch.full((3, top + rows * height, left + columns * width), 255, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            y, x = top + row * height, left + column * width
            sheet[:, y:y + height - gap, x:x + width - gap] = images[row, column]
    picture = Image.fromarray(sheet.permute(1, 2, 0).contiguous().numpy())
    draw = ImageDraw.Draw(picture)
    for column, title in enumerate(column_titles):
        draw.text((left + column * width + width // 2, top // 2), title, fill="black", anchor="mm")
    for row, title in enumerate(row_titles):
        draw.text((left - 5, top + row * height + height // 2), title, fill="black", anchor="rm")
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(*sheet.shape[1:], 3).permute(2, 0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Run folders


def claim_folder(out, script, resuming):
    """Make the run folder `out`, and hold it until this process ends: a second one is refused.

    A folder that is not empty is taken only if `script` made it and it is to be resumed.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file of that name exists; choose another folder")
    if out.is_dir() and any(path.name != LOCK for path in out.iterdir()):
        try:
            ours = json.loads((out / "args.json").read_text())["script"] == Path(script).name
        except (OSError, ValueError, KeyError, TypeError):
            ours = False
        if not (ours and resuming):
            hint = "continue it with --resume, or choose another folder" if ours else "choose another folder"
            raise UserError(f"--out {out}: the folder holds {'another run' if ours else 'other files'}; {hint}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot make the folder ({error.strerror})") from None
    if not hold(out / LOCK):
        raise UserError(f"--out {out}: another process is at work in this folder; wait for it, or choose another folder")
    for left in out.glob("**/.*.tmp"):                     # of a run that was killed while writing
        left.unlink(missing_ok=True)
    return out


def hold(path, wait=False):
    """Lock the file `path` until this process ends, or what is returned is closed. None if another process has it."""
    file = open(path, "a")
    try:
        # Of this kind because processes forked from this one, such as data loaders, do not inherit it.
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except OSError:                                        # a file system without locks
        pass
    HELD.append(file)
    return file


def describe_run(out, script, args):
    """Write `args.json` (arguments, versions, device, git revision) and a copy of the script into the run folder."""
    revision = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    facts = {"script": Path(script).name, "args": plain(args), "revision": revision.stdout.strip() or None,
             "python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads(),
             "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"}
    write_json(out / "args.json", facts)
    write_atomically(out / Path(script).name, lambda temporary: temporary.write_bytes(Path(script).read_bytes()))


def plain(args):
    """Arguments as JSON can hold them."""
    def text(value):
        return [*map(text, value)] if isinstance(value, list) else str(value) if isinstance(value, Path) else value

    return {key: text(value) for key, value in vars(args).items()}


class Log:
    """JSON lines in `path`, and a progress line on the screen (one that renews itself on a terminal).

    On resuming at `step`, with `epoch` epochs evaluated, later lines are dropped: they will be written again. Numbers go
    to TensorBoard, too, into the folder of `path`, if its package is installed.
    """

    def __init__(self, path, step=0, epoch=math.inf):
        def earlier(line):
            try:
                values = json.loads(line)
                return values["step"] <= step and values.get("epoch", 0) <= epoch
            except (ValueError, KeyError, TypeError):      # the last one may be cut
                return False

        lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
        kept = [line for line in lines if earlier(line)]
        write_atomically(path, lambda temporary: temporary.write_text("".join(line + "\n" for line in kept)))
        self.file = open(path, "a", buffering=1)
        self.start, self.first, self.live = time.time(), step, sys.stdout.isatty()
        self.board = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(path.parent, purge_step=step + 1)

    def write(self, step, **values):
        self.file.write(json.dumps({"step": step} | values) + "\n")
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()

    def progress(self, step, last, values):
        """Print step, rate, time left and `values` (name -> number)."""
        rate = (step - self.first) / max(time.time() - self.start, 1e-9)
        left = (last - step) / max(rate, 1e-9)
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        line = f"{step}/{last}  {rate:.1f} steps/s  {int(left) // 60}:{int(left) % 60:02d} left  {text}"
        print(f"\r\x1b[K{line}" if self.live else line, end="" if self.live and step < last else "\n", flush=True)


class StopSignal:
    """Truthy once SIGTERM or Ctrl-C has come: finish the step, save, leave. A second Ctrl-C ends at once."""

    def __init__(self):
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.received:
            raise KeyboardInterrupt
        self.received = True

    def __bool__(self):
        return self.received


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, started by torchrun


def join_ranks(device):
    """Meet the other processes that torchrun started. Returns this one's device: on GPUs, one for each."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def rank_and_ranks():
    """This process's number and how many there are."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def wait_for_ranks():
    if distributed.is_initialized():
        distributed.barrier()


def mean_over_ranks(value):
    """The mean of a tensor over all ranks."""
    if distributed.is_initialized():
        distributed.all_reduce(value)
        value = value / distributed.get_world_size()
    return value


def any_rank(flag, device):
    """Whether the flag is set on any rank: they have to stop together."""
    if not distributed.is_initialized():
        return bool(flag)
    return mean_over_ranks(torch.tensor(float(bool(flag)), device=device)).item() > 0
