"""Pretrained weights, found on disk or downloaded: a table of files, HTTP, checksums, Google Drive.

A file gets its final name only when its size and SHA-256 are right. A download that breaks off is
resumed next time. Two processes never download one file at the same time: the second one waits.
Everything goes over HTTPS, with certificates and redirects checked.
"""

import contextlib
import hashlib
import html.parser
import http.client
import math
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit

import torchvision

from data import runs

DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="
S3 = "https://s3.amazonaws.com/models.huggingface.co/"
HUGGING_FACE = "https://huggingface.co/"

# What can be downloaded. Sources are tried in order. A file of "also" is taken just as well if it
# is in the folder of the weights. None: neither the size nor the SHA-256 is published.
FILES = {
    "vgg16": {
        "file": "vgg16-397923af.pth",
        "size": 553433881,
        "sha256": "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        "sources": ["https://download.pytorch.org/models/vgg16-397923af.pth"],
        "also": ["vgg16_features.pth"],  # the same without its fully connected layers, 59 MB
    },
    "biggan": {
        "file": "biggan-deep-256-pytorch_model.bin",
        "size": 234411737,
        "sha256": "5900ef4065047e3aa0d1b66197b7f2664dceb59b27080e414ad57e203c485bc5",
        "sources": [S3 + "biggan/biggan-deep-256-pytorch_model.bin"],
    },
    "u2net": {
        "file": "u2net.pth",
        "size": 176290937,
        "sha256": "10025a17f49cd3208afc342b589890e402ee63123d6f2d289a4a0903695cce58",
        "sources": [
            HUGGING_FACE + "netradrishti/u2net-saliency/resolve/main/models/u2net.pth",
            HUGGING_FACE + "damli/u2net/resolve/main/u2net.pth",
            DRIVE + "1ao1ovG1Qtx4b7EoskHXmi2E9rp5CHLcZ",
        ],
    },
    "u2netp": {
        "file": "u2netp.pth",
        "size": 4683258,
        "sha256": "e7567cde013fb64813973ce6e1ecc25a80c05c3ca7adbc5a54f3c3d90991b854",
        "sources": [
            HUGGING_FACE + "netradrishti/u2net-saliency/resolve/main/models/u2netp.pth",
            DRIVE + "1rbSTGKAE-MTxBYHd-51l2hMOQPT_7EPy",
        ],
    },
    "cgn": {  # the authors' trained ImageNet CGN, about 1.1 GB
        "file": "cgn.pth",
        "size": None,
        "sha256": None,
        "sources": [DRIVE + "12yVFHPUjKmUFGnO2D4xVlTSpF8CUj136"],
    },
}

ATTEMPTS = 4  # tries before a source is given up
BACKOFF = 1.0  # seconds before the second try, doubled for each further one
TIMEOUT = 30.0  # seconds without a byte before a connection counts as dead
BLOCK = 2**16  # bytes read, written and hashed at once


def torchvision_file(arch):
    """The entry of a torchvision classifier's first ImageNet weights, in the form of `FILES`.

    Their file names end in the first eight digits of the SHA-256; the size is not published.
    """
    weights = torchvision.models.get_model_weights(arch)
    url = getattr(weights, "IMAGENET1K_V1", weights.DEFAULT).url
    file = url.rpartition("/")[2]
    digits = file.rpartition("-")[2].partition(".")[0]
    return {"file": file, "size": None, "sha256": digits, "sources": [url]}


def find_file(entry, folder):
    """The path of an entry's file in `folder` (or below it, as in torch's own cache), or None.

    entry: a row of `FILES`, or what `torchvision_file` returns. UserError if the file has the wrong
    size. Its SHA-256 was checked when it was downloaded; it is not checked again.
    """
    folder = Path(folder)
    for path in (folder / entry["file"], folder / "hub" / "checkpoints" / entry["file"]):
        if not path.is_file():
            continue
        size = path.stat().st_size
        if entry["size"] not in (None, size):
            raise runs.UserError(
                f"{path}: {size} bytes instead of {entry['size']}, a damaged or another file; "
                "delete it, and it will be downloaded again"
            )
        return path
    for other in entry.get("also", ()):
        if (folder / other).is_file():
            return folder / other
    return None


def find_or_download(entry, folder, *, sources=None):
    """The path of an entry's file, downloaded into `folder` if it is not there.

    entry: a row of `FILES`, or what `torchvision_file` returns. sources: URLs to try in order
    instead of the entry's; HTTPS only (plain HTTP to this very machine is for tests). What has come
    of a download that breaks off stays as `NAME.part`. UserError if no source helps.
    """
    found = find_file(entry, folder)
    if found:
        return found
    with wait_for_lock(entry, Path(folder)):
        found = find_file(entry, folder)  # another process may have fetched it meanwhile
        if found:
            return found
        return fetch(entry, Path(folder), entry["sources"] if sources is None else sources)


def wait_for_lock(entry, folder):
    """The open lock file of one download, in a folder that is made if need be."""
    path = folder / f".{entry['file']}.lock"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = runs.lock_file(path)
        if not lock:
            say(f"{entry['file']}: another process is fetching it; waiting")
            lock = runs.lock_file(path, wait=True)
    return lock


def fetch(entry, folder, sources):
    """Download an entry's file from the first source that has it. Returns its path."""
    path = folder / entry["file"]
    part = folder / (entry["file"] + ".part")
    failures = []
    for url in sources:
        try:
            download_from(url, entry, part)
        except ValueError as error:
            failures.append(f"{url}: {error}")
            continue
        with disk_errors(path):
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
        return path
    raise runs.UserError(
        f"cannot download {entry['file']} ({'; '.join(failures)}); try again later, put the file "
        f"into {folder} yourself, or go on without it with --offline"
    )


# --------------------------------------------------------------------------------------------------
# One source


class PartialFile:
    """The beginning of a file that is being downloaded: its path, size in bytes and SHA-256."""

    def __init__(self, path):
        self.path = path
        self.restart()
        if path.is_file():
            with disk_errors(path), open(path, "rb") as file:
                while block := file.read(BLOCK):
                    self.digest.update(block)
                    self.size += len(block)

    def restart(self):
        """Begin with no bytes. Those on disk stay until the first block is appended."""
        self.size = 0
        self.digest = hashlib.sha256()

    def append(self, block):
        """Write one more block."""
        # Opened for each block: a full disk may show only when the file is closed, and must not be
        # taken for an error of the network.
        with disk_errors(self.path), open(self.path, "ab" if self.size else "wb") as file:
            file.write(block)
        self.digest.update(block)
        self.size += len(block)


def download_from(url, entry, path):
    """Complete the partial file `path` from one URL and check it. ValueError if that fails."""
    check_url(url)
    part = PartialFile(path)
    resumed = part.size > 0
    for attempt in range(ATTEMPTS):
        problem = try_once(url, entry, part)
        if problem is None and is_entry(entry, part):
            return
        if problem is None:
            part.path.unlink(missing_ok=True)
            if not resumed:
                raise ValueError("what came has the wrong size or SHA-256 and was deleted")
            # A power cut may have damaged what was there before.
            problem = f"{path.name} was damaged and is deleted"
            part.restart()
            resumed = False
        if attempt + 1 < ATTEMPTS:
            say(f"{entry['file']}: {problem}; trying again")
            time.sleep(BACKOFF * 2**attempt)
    raise ValueError(f"{problem}, given up after {ATTEMPTS} tries")


def try_once(url, entry, part):
    """None once the file is complete, else what went wrong and may go better next time.

    ValueError for what will be the same next time.
    """
    try:
        expected = receive(url, entry, part)
    except urllib.error.HTTPError as error:
        problem = f"HTTP {error.code} {' '.join(str(error.reason).split())}"
        if error.code < 500 and error.code != 429:  # 429: too many requests just now
            raise ValueError(problem) from None
        return problem
    except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, no such host
        return getattr(error, "reason", error)
    if part.size < expected:
        return f"connection cut after {part.size} of {expected} bytes"
    return None


def receive(url, entry, part):
    """One try: append to `part` what `url` sends. Returns how many bytes the file should have."""
    expected = entry["size"] or math.inf
    if part.size >= expected:
        return expected
    response, start = open_file(url, part.size)
    with response:
        block = response.read1(BLOCK)
        # Error and login pages may pass for a file. Nothing is written yet, so `part` stays whole.
        if start == 0 and block.lstrip()[:1] == b"<":
            raise ValueError("a web page came instead of the file")
        announced = announced_size(response, start, entry["size"])
        if announced is not None:
            expected = announced
        if start == 0:
            part.restart()
        progress = Progress(entry["file"], part.size, expected)
        while block and part.size <= expected:
            part.append(block)
            progress.show(part.size)
            block = response.read1(BLOCK)
    return part.size if expected == math.inf else expected


def announced_size(response, start, size):
    """The bytes of the whole file as a response announces them, None if it does not.

    start: where the response begins in the file. size: what it should be, or None. ValueError if
    the two differ.
    """
    header = "Content-Range" if start else "Content-Length"  # "bytes 100-999/1000" or "1000"
    total = response.headers.get(header, "").rpartition("/")[2]
    if not total.isdigit():
        return None
    if size not in (None, int(total)):
        raise ValueError(f"the file there has {total} bytes instead of {size}")
    return int(total)


def is_entry(entry, part):
    """Whether a downloaded file is the entry's, by its SHA-256; if none is published, whether it
    holds tensors and its own checksums are right.
    """
    digest = part.digest.hexdigest()
    if entry["sha256"]:
        return digest.startswith(entry["sha256"])
    try:
        runs.load_tensors(part.path)
    except runs.UserError:
        return False
    say(f"{entry['file']}: SHA-256 {digest}; none is published to compare it with")
    return runs.is_intact_archive(part.path)


# --------------------------------------------------------------------------------------------------
# HTTP


def open_file(url, offset):
    """As `open_at`, past the page on which Google Drive asks to confirm a large download.

    ValueError for any other page.
    """
    for _ in range(3):
        response, start = open_at(url, offset)
        if response.headers.get_content_type() != "text/html":
            return response, start
        with response:
            page = DrivePage(response.read(200_000).decode(errors="replace"))
        if page.action is None:
            reason = f": {page.reason}" if page.reason else ""
            raise ValueError(f"a web page came instead of the file{reason}")
        confirmed = urljoin(response.url, page.action)
        check_url(confirmed, origin=url)
        query = dict(parse_qsl(urlsplit(confirmed).query)) | page.fields
        url = urlsplit(confirmed)._replace(query=urlencode(query)).geturl()
    raise ValueError("Google Drive asked for confirmation again and again")


class DrivePage(html.parser.HTMLParser):
    """What a page of Google Drive says.

    action: the address of its download form, None without one. fields: the form's hidden fields.
    reason: why the download is refused, or "".
    """

    def __init__(self, page):
        super().__init__()
        self.action = None
        self.fields = {}
        self.reason = ""
        self.in_reason = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "form" and attributes.get("id") == "download-form":
            self.action = attributes.get("action") or ""
        elif tag == "input" and attributes.get("type") == "hidden" and attributes.get("name"):
            self.fields[attributes["name"]] = attributes.get("value") or ""
        elif tag == "p":
            self.in_reason = "uc-error-subcaption" in (attributes.get("class") or "")

    def handle_endtag(self, tag):
        if tag == "p":
            self.in_reason = False

    def handle_data(self, text):
        if self.in_reason:
            self.reason = " ".join([*self.reason.split(), *text.split()])[:200]


def open_at(url, offset):
    """Ask for the bytes from `offset` on. Returns the response and its start: `offset` or 0."""
    request = urllib.request.Request(url)
    request.add_header("User-Agent", "counterfactual-generative-networks")
    if offset:
        request.add_header("Range", f"bytes={offset}-")
    try:
        response = urllib.request.build_opener(CheckedRedirects).open(request, timeout=TIMEOUT)
        piece = response.headers.get("Content-Range", "")
        if response.status == 200:  # the whole file, asked for or not: some servers ignore ranges
            return response, 0
        if response.status == 206 and piece.startswith(f"bytes {offset}-"):
            return response, offset
    except urllib.error.HTTPError as error:
        if error.code != 416:  # "there is nothing beyond your offset"
            raise
    if offset:  # what came does not continue our part: ask for the whole file
        return open_at(url, 0)
    raise ValueError("asked for the whole file, the server sent something else")


def check_url(url, origin=None):
    """ValueError unless `url` is HTTPS, or plain HTTP that never leaves this machine.

    origin: the address that led to `url`. If it is not on this machine, `url` may not be, either.
    """
    scheme = urlsplit(url).scheme
    hosts = {urlsplit(url).hostname, urlsplit(origin or url).hostname}
    local = hosts <= {"127.0.0.1", "::1", "localhost"}
    if scheme == "https" or (scheme == "http" and local):
        return
    if origin:
        raise ValueError(f"redirected to {url}, which is not HTTPS")
    raise ValueError("not an HTTPS address")


class CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects only to addresses that `check_url` allows."""

    def redirect_request(self, request, response, code, message, headers, url):
        check_url(url, origin=request.full_url)
        return super().redirect_request(request, response, code, message, headers, url)


# --------------------------------------------------------------------------------------------------
# Screen and disk


class Progress:
    """The line that says how far a download is. It renews itself on a terminal."""

    def __init__(self, name, size, expected):
        self.name = name
        self.first_size = size
        self.expected = expected
        self.begun = time.monotonic()
        self.shown = self.begun
        self.interval = 0.2 if sys.stderr.isatty() else 10  # seconds

    def show(self, size):
        """Print the line if it is time to, and at the end."""
        now = time.monotonic()
        finished = size >= self.expected
        if not finished and now - self.shown <= self.interval:
            return
        self.shown = now
        rate = (size - self.first_size) / max(now - self.begun, 1e-3)
        left = 0
        if self.expected < math.inf:
            left = int(max(self.expected - size, 0) / rate)
        say(
            f"{self.name}  {size / 1e6:.1f}/{self.expected / 1e6:.1f} MB  {rate / 1e6:.1f} MB/s  "
            f"{left // 60}:{left % 60:02d} left",
            stay=not finished,
        )


def say(line, stay=False):
    """Print a line on standard error. On a terminal it replaces one printed with `stay`."""
    if not sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)
        return
    print(f"\r\x1b[K{line}", end="" if stay else "\n", file=sys.stderr, flush=True)


@contextlib.contextmanager
def disk_errors(path):
    """Turn errors of the file system into a UserError: those of the network are tried again."""
    try:
        yield
    except OSError as error:
        raise runs.UserError(
            f"cannot use {path}: {error.strerror or error}; free some space or choose another "
            "--weights-dir"
        ) from None
