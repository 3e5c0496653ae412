"""Pretrained weights: found on disk or downloaded, checked name by name, and a random stand-in for offline use.

Nothing is kept under its final name before its size and SHA-256 are right, and no file is loaded in a way that could
run code. Two processes must not download one file at the same time: the check fails, and both have to start over.
"""
import contextlib
import hashlib
import html.parser
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit

import torch
import torch.nn.functional as F
import torchvision

from data.runs import UserError, hold, intact_archive, load_tensors, write_atomically

DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="

# What can be downloaded. "sources" are tried in order; a file of "also" in the weights folder is taken just as well.
FILES = {
    "vgg16": {"file": "vgg16-397923af.pth", "size": 553433881,
              "sha256": "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
              "sources": ["https://download.pytorch.org/models/vgg16-397923af.pth"],
              "also": ["vgg16_features.pth"]},         # the same without its fully connected layers, 59 MB
    "biggan": {"file": "biggan-deep-256-pytorch_model.bin", "size": 234411737,
               "sha256": "5900ef4065047e3aa0d1b66197b7f2664dceb59b27080e414ad57e203c485bc5",
               "sources": ["https://s3.amazonaws.com/models.huggingface.co/biggan/biggan-deep-256-pytorch_model.bin"]},
    "u2net": {"file": "u2net.pth", "size": 176290937,
              "sha256": "10025a17f49cd3208afc342b589890e402ee63123d6f2d289a4a0903695cce58",
              "sources": ["https://huggingface.co/netradrishti/u2net-saliency/resolve/main/models/u2net.pth",
                          "https://huggingface.co/damli/u2net/resolve/main/u2net.pth",
                          DRIVE + "1ao1ovG1Qtx4b7EoskHXmi2E9rp5CHLcZ"]},
    "u2netp": {"file": "u2netp.pth", "size": 4683258,
               "sha256": "e7567cde013fb64813973ce6e1ecc25a80c05c3ca7adbc5a54f3c3d90991b854",
               "sources": ["https://huggingface.co/netradrishti/u2net-saliency/resolve/main/models/u2netp.pth",
                          DRIVE + "1rbSTGKAE-MTxBYHd-51l2hMOQPT_7EPy"]},
    # The authors' trained ImageNet CGN, about 1.1 GB. Neither its size nor its hash is published.
    "cgn": {"file": "cgn.pth", "size": None, "sha256": None, "sources": [DRIVE + "12yVFHPUjKmUFGnO2D4xVlTSpF8CUj136"]},
}
ATTEMPTS = 4                                           # tries before a source is given up
BACKOFF = 1.0                                          # seconds before the second try, doubled for each further one
TIMEOUT = 30.0                                         # seconds without a byte before a connection counts as dead
BLOCK = 2 ** 16                                        # bytes read, written and hashed at once

# VGG-16: index in `features` -> output channels of the 3 x 3 convolutions; POOLED ones precede a 2 x 2 max-pooling.
CONVOLUTIONS = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256,
                17: 512, 19: 512, 21: 512, 24: 512, 26: 512, 28: 512}
POOLED = {2, 7, 14, 21, 28}


# ---------------------------------------------------------------------------------------------------------------------
# Finding and downloading


def find_file(name, weights_dir):
    """The path of `FILES[name]` in `weights_dir` (or below it, as torch's own cache has it), None if it is not there.

    Raises UserError if the file has the wrong size. Its hash was checked when it came; it is not checked again.
    """
    entry, folder = FILES[name], Path(weights_dir)
    for path in (folder / entry["file"], folder / "hub" / "checkpoints" / entry["file"]):
        if path.is_file():
            if entry["size"] and path.stat().st_size != entry["size"]:
                raise UserError(f"{path}: {path.stat().st_size} bytes instead of {entry['size']}, a damaged or another "
                                "file; delete it, and it will be downloaded again")
            return path
    return next((folder / other for other in entry.get("also", ()) if (folder / other).is_file()), None)


def find_or_download(name, weights_dir, *, sources=None):
    """The path of `FILES[name]`, downloaded into `weights_dir` if `find_file` does not know it.

    sources: URLs to try in order instead of the table's. HTTPS only (plain HTTP to this very machine is for tests).
    A download that breaks off stays as `NAME.part` and is continued next time. Raises UserError if no source helps.
    """
    if found := find_file(name, weights_dir):
        return found
    entry, folder = FILES[name], Path(weights_dir)
    path, part = folder / entry["file"], folder / (entry["file"] + ".part")
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = hold(folder / f".{entry['file']}.lock")
        if not lock:
            say(f"{entry['file']}: another process is fetching it; waiting")
            lock = hold(folder / f".{entry['file']}.lock", wait=True)
    failures = []
    with lock:
        if found := find_file(name, weights_dir):
            return found
        for url in entry["sources"] if sources is None else sources:
            try:
                download(url, entry, part)
                write_atomically(path, lambda temporary: os.replace(part, temporary))
                return path
            except ValueError as error:
                failures.append(f"{url}: {error}")
    raise UserError(f"cannot download {entry['file']} ({'; '.join(failures)}); try again later, put the file into "
                    f"{folder} yourself, or go on without it with --offline")


def download(url, entry, part):
    """Complete the file `part` from `url` and check it. Raises ValueError if that source does not have it."""
    check_url(url)
    for attempt in range(ATTEMPTS):
        try:
            have, size, digest = receive(url, entry, part)
            if have >= size:
                break
            reason = f"connection cut after {have} of {size} bytes"
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {' '.join(str(error.reason).split())}"
            if error.code < 500 and error.code != 429:             # all but "busy" will be the same a second later
                raise ValueError(reason) from None
        except (OSError, http.client.HTTPException) as error:      # refused, reset, timed out, cut, no such host
            reason = getattr(error, "reason", error)
        if attempt + 1 < ATTEMPTS:
            say(f"{entry['file']}: {reason}; trying again")
            time.sleep(BACKOFF * 2 ** attempt)
    else:
        raise ValueError(f"{reason}, given up after {ATTEMPTS} tries")
    if not (digest.hexdigest().startswith(entry["sha256"]) if entry["sha256"] else intact_archive(part)):
        part.unlink(missing_ok=True)
        raise ValueError("what came has the wrong size or SHA-256 and was deleted")
    if not entry["sha256"]:
        say(f"{entry['file']}: SHA-256 {digest.hexdigest()}; none is published to compare it with")


def receive(url, entry, part):
    """One try: append to `part` what `url` sends.

    Returns how many bytes it has then, how many it should have, and its SHA-256 (a hashlib object).
    """
    have, digest, size = 0, hashlib.sha256(), entry["size"] or float("inf")
    if part.is_file():
        with disk(part), open(part, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                have += len(block)
    if have >= size:
        return have, size, digest
    response, start = open_file(url, have)
    with response:
        if start == 0:
            have, digest = 0, hashlib.sha256()
        total = response.headers.get("Content-Range" if start else "Content-Length", "").rpartition("/")[2]
        block = response.read1(BLOCK)
        # Error and login pages may pass for a file. Nothing was written so far: `part` is still whole.
        if start == 0 and block.lstrip()[:1] == b"<":
            raise ValueError("a web page came instead of the file")
        if total.isdigit() and entry["size"] not in (None, int(total)):
            raise ValueError(f"the file there has {total} bytes instead of {size}")
        size = int(total) if total.isdigit() else size
        begun = shown = time.monotonic()
        first = have
        while block and have <= size:
            # Opened for each block: a full disk may show on closing only, and must not be taken for a network error.
            with disk(part), open(part, "ab" if have else "wb") as file:
                file.write(block)
            digest.update(block)
            have += len(block)
            now = time.monotonic()
            if have >= size or now - shown > (0.2 if sys.stderr.isatty() else 10):
                rate, shown = (have - first) / max(now - begun, 1e-3), now
                left = int(max(size - have, 0) / rate) if size < float("inf") else 0
                say(f"{entry['file']}  {have / 1e6:.1f}/{size / 1e6:.1f} MB  {rate / 1e6:.1f} MB/s  "
                    f"{left // 60}:{left % 60:02d} left", stay=have < size)
            block = response.read1(BLOCK)
    return have, have if size == float("inf") else size, digest


def open_file(url, offset):
    """As `open_at`, past the form in which Google Drive asks to confirm a large file. ValueError for any other page."""
    for _ in range(3):
        response, start = open_at(url, offset)
        if response.headers.get_content_type() != "text/html":
            return response, start
        with response:
            page = DrivePage(response.read(200_000).decode(errors="replace"))
        if page.action is None:
            raise ValueError(f"a web page came instead of the file{page.reason and ': '}{page.reason}")
        confirmed = urljoin(response.url, page.action)
        check_url(confirmed, origin=url)
        query = dict(parse_qsl(urlsplit(confirmed).query)) | page.fields
        url = urlsplit(confirmed)._replace(query=urlencode(query)).geturl()
    raise ValueError("Google Drive asked for confirmation again and again")


class DrivePage(html.parser.HTMLParser):
    """The download form of a page: its action (None without one) and hidden fields. And the reason of a refusal."""

    def __init__(self, page):
        super().__init__()
        self.action, self.fields, self.reason, self.telling = None, {}, "", False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "form" and attributes.get("id") == "download-form":
            self.action = attributes.get("action") or ""
        elif tag == "input" and attributes.get("type") == "hidden" and attributes.get("name"):
            self.fields[attributes["name"]] = attributes.get("value") or ""
        elif tag == "p":
            self.telling = "uc-error-subcaption" in (attributes.get("class") or "")

    def handle_endtag(self, tag):
        self.telling = self.telling and tag != "p"

    def handle_data(self, text):
        if self.telling:
            self.reason = " ".join([*self.reason.split(), *text.split()])[:200]


def open_at(url, offset):
    """Ask `url` for the bytes from `offset` on. Returns the response and where it starts: at `offset` or at 0."""
    headers = {"User-Agent": "counterfactual-generative-networks"} | ({"Range": f"bytes={offset}-"} if offset else {})
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.build_opener(CheckedRedirects).open(request, timeout=TIMEOUT)
        if response.status == 200:                     # the whole file, asked for or not: some servers ignore ranges
            return response, 0
        if response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            return response, offset
    except urllib.error.HTTPError as error:
        if error.code != 416:                          # "there is nothing beyond your offset"
            raise
    if offset:                                         # what came does not continue ours: do without pieces
        return open_at(url, 0)
    raise ValueError("asked for the whole file, the server sent something else")


def check_url(url, origin=None):
    """Raises ValueError unless `url` is HTTPS, or plain HTTP that never leaves this machine (nor does `origin`)."""
    local = all(urlsplit(each).hostname in ("127.0.0.1", "::1", "localhost") for each in (url, origin or url))
    if urlsplit(url).scheme != "https" and not (local and urlsplit(url).scheme == "http"):
        raise ValueError(f"redirected to {url}, which is not HTTPS" if origin else "not an HTTPS address")


class CheckedRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, response, code, message, headers, url):
        check_url(url, origin=request.full_url)
        return super().redirect_request(request, response, code, message, headers, url)


def say(line, stay=False):
    """Print a line on standard error. On a terminal it replaces one printed with `stay`."""
    live = sys.stderr.isatty()
    print("\r\x1b[K" * live + line, end="" if live and stay else "\n", file=sys.stderr, flush=True)


@contextlib.contextmanager
def disk(path):
    """Turn a file system's error into a UserError, so that it is not taken for one of the network and tried again."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot use {path}: {error.strerror or error}; free some space or choose another "
                        "--weights-dir") from None


# ---------------------------------------------------------------------------------------------------------------------
# State dicts


def bare_names(state, path):
    """`state` as a plain dict, without a `module.` that all names begin with. UserError if it is no dict of names."""
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path}: holds a {type(state).__name__}, not tensors by name; give another file")
    prefix = "module." if all(name.startswith("module.") for name in state) else ""
    return {name.removeprefix(prefix): value for name, value in state.items()}


def check_state_dict(state, expected, path):
    """Check what a file held against what is needed, before any of it is used.

    state: what was loaded from `path`. expected: name -> tensor or shape, such as `module.state_dict()`.
    Returns `state` without a `module.` common to all names. Raises UserError listing missing and unexpected names,
    values that are no (dense) tensors, wrong shapes, integers for floating-point numbers, NaN and infinite values.
    """
    state = bare_names(state, path)
    shapes = {name: tuple(getattr(want, "shape", want)) for name, want in expected.items()}
    floating = {name for name, want in expected.items() if isinstance(want, torch.Tensor) and want.is_floating_point()}
    here = [name for name in shapes if name in state]
    tensors = [name for name in here if isinstance(state[name], torch.Tensor)
               and state[name].layout == torch.strided and not state[name].is_meta]
    fitting = [name for name in tensors if tuple(state[name].shape) == shapes[name]]
    found = {"missing": [name for name in shapes if name not in state],
             "unexpected": [name for name in state if name not in shapes],
             "not a tensor": [name for name in here if name not in tensors],
             "of wrong shape": [f"{name} {tuple(state[name].shape)} instead of {shapes[name]}"
                                for name in tensors if name not in fitting],
             "not floating-point": [name for name in fitting
                                    if name in floating and not state[name].is_floating_point()],
             "not finite": [name for name in fitting
                            if state[name].is_floating_point() and not state[name].float().isfinite().all()]}
    problems = [f"{len(names)} {what}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
                for what, names in found.items() if names]
    if problems:
        raise UserError(f"{path}: not the weights needed here ({'; '.join(problems)}); give another file")
    return state


def add_torchvision_file(arch):
    """Put torchvision's first ImageNet weights of a classifier into the table; file names carry 8 digits of SHA-256."""
    weights = torchvision.models.get_model_weights(arch)
    url = getattr(weights, "IMAGENET1K_V1", weights.DEFAULT).url
    file = url.rpartition("/")[2]
    FILES.setdefault(arch, {"file": file, "size": None, "sha256": file.rpartition("-")[2].partition(".")[0],
                            "sources": [url]})


def load_network(name, weights_dir, path, expected):
    """The state dict of `FILES[name]`, downloaded if need be, or of the file `path` if that is given.

    expected: name -> tensor. Returns float32 tensors in its order. Raises UserError.
    """
    path = path or find_or_download(name, weights_dir)
    state = check_state_dict(load_tensors(path), expected, path)
    return {key: state[key].to(want.dtype) for key, want in expected.items()}


# ---------------------------------------------------------------------------------------------------------------------
# VGG-16


def vgg16_blank(number_of_convolutions):
    """Name -> tensor without memory (device "meta") of the first 1 to 13 convolutions, in torchvision's layout."""
    if not 1 <= number_of_convolutions <= len(CONVOLUTIONS):
        raise UserError(f"VGG-16 has 1 to {len(CONVOLUTIONS)} convolutions to choose, not {number_of_convolutions}")
    blank, channels = {}, 3
    for index, width in list(CONVOLUTIONS.items())[:number_of_convolutions]:
        blank[f"features.{index}.weight"] = torch.empty(width, channels, 3, 3, device="meta")
        blank[f"features.{index}.bias"] = torch.empty(width, device="meta")
        channels = width
    return blank


def load_vgg16_features(weights_dir, number_of_convolutions):
    """The first convolutions (1 to 13) of the pretrained VGG-16, downloaded if need be.

    weights_dir: the folder of the weights, or the path of a file. Returns name -> float32 tensor on the CPU, named as
    in torchvision (`features.0.weight`, `features.0.bias`, `features.2.weight`, ...). The rest of the file is neither
    read nor checked, but names that VGG-16 does not have are. Raises UserError.
    """
    needed, path = vgg16_blank(number_of_convolutions), Path(weights_dir)
    if not path.is_file() and path.suffix != ".pth":   # a missing .pth is a slip, not a folder to be made
        path = find_or_download("vgg16", path)
    known = set(vgg16_blank(len(CONVOLUTIONS)))
    known |= {f"classifier.{index}.{kind}" for index in (0, 3, 6) for kind in ("weight", "bias")}
    state = bare_names(load_tensors(path), path)
    state = {name: value for name, value in state.items() if name in needed or name not in known}
    state = check_state_dict(state, needed, path)
    # Cloned out of the memory map: the tensors outlive the file, which may be replaced or deleted.
    return {name: state[name].detach().float().clone(memory_format=torch.contiguous_format) for name in needed}


@torch.no_grad()
def random_vgg16_features(number_of_convolutions, seed=0):
    """The offline stand-in for `load_vgg16_features`: random filters, zero biases, the same names and shapes.

    Every layer is scaled to a mean activation of 1 after its ReLU on seeded pictures in [-1, 1]. The same seed gives
    the same weights, whatever the global random state.
    """
    generator = torch.Generator().manual_seed(seed)
    x, state = blob_pictures(generator), {}
    for name, blank in vgg16_blank(number_of_convolutions).items():
        if name.endswith("bias"):
            state[name] = torch.zeros(blank.shape)
            continue
        # He's normal filters (their scale is set below); orthogonal ones spread the features no better and take longer.
        # What does help is to take away each filter's mean: what comes out of a ReLU has a large common part that
        # drowns the rest (cosine of two pictures' features after 10 layers: 0.96 with it, 0.67 without). The first
        # layer has no ReLU before it and keeps the means, so that brightness counts.
        weight = torch.randn(blank.shape, generator=generator)
        if state:
            weight -= weight.mean((1, 2, 3), keepdim=True)
        x = F.conv2d(x, weight, padding=1).relu_()
        scale = x.mean()
        x /= scale
        state[name] = weight.div_(scale)
        if int(name.split(".")[1]) in POOLED:
            x = F.max_pool2d(x, 2)
    return state


def blob_pictures(generator, number=16, side=32):
    """Pictures (number, 3, side, side) in [-1, 1]: four soft coloured blobs each, on black (-1)."""
    line = torch.linspace(0, 1, side)
    x, y, radius = torch.rand(3, number, 4, 1, 1, generator=generator)
    blobs = torch.exp(-((line - x) ** 2 + (line[:, None] - y) ** 2) / (0.05 + 0.2 * radius) ** 2)
    colours = torch.rand(number, 4, 3, generator=generator)
    return torch.einsum("nbc,nbhw->nchw", colours, blobs).clamp(max=1) * 2 - 1
