"""Downloads against a server on this machine, checks of weights files, and the random stand-in for VGG-16.

The tests on the real VGG-16 need the folder of `vgg16_features.pth` in the environment variable CGN_WEIGHTS.
"""
import functools
import hashlib
import http.server
import io
import itertools
import os
import pickle
import random
import re
import socket
import threading
import time
import types
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest
import torch
import torch.nn.functional as F

from conftest import processes
from data import weights
from data.runs import UserError

BODY = b"PK" + random.Random(0).randbytes(300_000)
LOCK = ".tiny.pth.lock"
INDICES = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]


# ---------------------------------------------------------------------------------------------------------------------
# Downloads


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves BODY; the path says in what way it goes wrong. Every request is noted in `server.log`."""

    def do_GET(self):
        kind = self.path.strip("/")
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        entry = {"kind": kind, "range": asked, "sent": 0}
        self.server.log.append(entry)
        earlier = sum(other["kind"] == kind for other in self.server.log) - 1
        body, code, headers = BODY[start:], 206 if asked else 200, {}
        headers["Content-Range"] = f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"
        if kind in ("missing", "denied", "broken"):
            code, body = {"missing": 404, "denied": 403, "broken": 500}[kind], b"no such file"
        elif kind == "busy" and not earlier or kind == "always-busy":
            code, body = 503, b"busy"
        elif kind == "no-ranges" or kind == "no-ranges-cut":
            code, body = 200, BODY
        elif kind == "shifted" and asked:              # a piece, but not the one asked for
            body, headers["Content-Range"] = BODY[start - 5:], f"bytes {start - 5}-{len(BODY) - 1}/{len(BODY)}"
        elif kind == "unsatisfiable" and asked:
            code, body, headers["Content-Range"] = 416, b"", f"bytes */{len(BODY)}"
        elif kind == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        elif kind == "longer":
            body += b"x"
        elif kind.startswith("page"):
            code, body = 200, b"<!DOCTYPE html>".ljust(len(BODY)) if kind == "page-of-right-size" else b"\n<html>"
            body = b"Sorry, moved" if kind == "page" else body
        elif kind.startswith("drive"):                 # a form first, its answers in the next address
            given = dict(parse_qsl(urlsplit(self.path).query))
            if kind.startswith("drive-quota"):
                code, body = 200, b'<p class="uc-error-subcaption">Too many <b>users</b>\n have viewed this file</p>'
            elif kind.startswith("drive-again") or not {"confirm", "uuid"} <= given.keys():
                action = f"{urlsplit(self.path).path}?uuid=1&amp;export=download"
                code, body = 200, (f'<form action="{action}" method="get" id="download-form"><input type="hidden" '
                                   f'value="7" name="id"><input type=hidden name=confirm value="t"></form>').encode()
        elif kind == "loop":
            code, body, headers["Location"] = 302, b"", self.path
        elif kind.startswith("to:"):
            code, body, headers["Location"] = 302, b"", kind.removeprefix("to:")
        self.send_response(code)
        self.send_header("Content-Type", "text/html; charset=utf-8" if kind == "page" or b"<form" in body
                         or b"<p " in body else "application/octet-stream")
        if kind != "longer":
            self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            if name != "Content-Range" or code in (206, 416):
                self.send_header(name, value)
        self.end_headers()
        if kind in ("cut", "no-ranges-cut", "stalls") and not earlier or kind == "always-cut":
            body = body[:len(body) // 3]
        for piece in range(10 if kind == "slow" else 1):
            self.wfile.write(body[piece * len(body) // 10:(piece + 1) * len(body) // 10] if kind == "slow" else body)
            if kind == "slow":
                time.sleep(0.1)
        if kind == "stalls" and not earlier:
            time.sleep(2)
        entry["sent"] = len(body) if code in (200, 206) else 0

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on a free port; `server.url(kind)`. The table gets the file "tiny", and no time is lost on waiting."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.log = []
    server.url = lambda kind: f"http://127.0.0.1:{server.server_port}/{kind}"
    thread = threading.Thread(target=functools.partial(server.serve_forever, 0.02), daemon=True)
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(weights, "BACKOFF", 0.0)
    monkeypatch.setattr(weights, "TIMEOUT", 5.0)
    monkeypatch.setitem(weights.FILES, "tiny", {"file": "tiny.pth", "size": len(BODY), "also": ["tiny_half.pth"],
                                                "sha256": hashlib.sha256(BODY).hexdigest(),
                                                "sources": [server.url("missing"), server.url("good")]})
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def get(folder, *urls):
    return weights.find_or_download("tiny", folder, sources=list(urls))


def failure(folder, *urls):
    """The message of a download that must fail and leave nothing under the final name; no other files but the part."""
    with pytest.raises(UserError) as caught:
        get(folder, *urls)
    assert {path.name for path in folder.iterdir()} <= {"tiny.pth.part", LOCK}
    assert "\n" not in str(caught.value)
    return str(caught.value)


def complete(folder, path):
    return path == folder / "tiny.pth" and path.read_bytes() == BODY and set(os.listdir(folder)) == {"tiny.pth", LOCK}


def test_plain_download_makes_the_folder_and_comes_only_once(server, tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    assert complete(folder, get(folder, server.url("good")))
    assert server.log == [{"kind": "good", "range": None, "sent": len(BODY)}]
    assert "0.3/0.3 MB" in capsys.readouterr().err
    assert complete(folder, get(folder, server.url("good")))
    assert len(server.log) == 1


def test_sources_of_the_table_are_tried_in_order(server, tmp_path):
    assert complete(tmp_path, weights.find_or_download("tiny", tmp_path))
    assert [entry["kind"] for entry in server.log] == ["missing", "good"]


def test_a_partial_download_is_continued(server, tmp_path):
    (tmp_path / "tiny.pth.part").write_bytes(BODY[:120_000])
    assert complete(tmp_path, get(tmp_path, server.url("good")))
    assert server.log == [{"kind": "good", "range": "bytes=120000-", "sent": len(BODY) - 120_000}]


@pytest.mark.parametrize("kind, ranges", [("no-ranges", ["bytes=120000-"]), ("shifted", ["bytes=120000-", None]),
                                          ("unsatisfiable", ["bytes=120000-", None])])
def test_a_server_that_cannot_continue_starts_afresh(server, tmp_path, kind, ranges):
    (tmp_path / "tiny.pth.part").write_bytes(b"#" * 120_000)       # if any of it were kept, the hash would be wrong
    assert complete(tmp_path, get(tmp_path, server.url(kind)))
    assert [entry["range"] for entry in server.log] == ranges


def test_a_complete_part_is_checked_and_taken_without_a_request(server, tmp_path):
    (tmp_path / "tiny.pth.part").write_bytes(BODY)
    assert complete(tmp_path, get(tmp_path, server.url("unsatisfiable")))
    assert server.log == []


@pytest.mark.parametrize("part", [b"#" * 120_000, b"#" * len(BODY), b"#" * (len(BODY) + 7)])
def test_a_wrong_part_is_deleted_and_the_next_source_starts_afresh(server, tmp_path, part):
    (tmp_path / "tiny.pth.part").write_bytes(part)
    assert complete(tmp_path, get(tmp_path, server.url("good"), server.url("good")))
    assert server.log[-1] == {"kind": "good", "range": None, "sent": len(BODY)}


def test_a_cut_connection_is_continued(server, tmp_path, capsys):
    assert complete(tmp_path, get(tmp_path, server.url("cut")))
    third = len(BODY) // 3
    requests = [(entry["range"], entry["sent"]) for entry in server.log]
    assert requests == [(None, third), (f"bytes={third}-", len(BODY) - third)]
    assert f"connection cut after {third} of {len(BODY)} bytes; trying again" in capsys.readouterr().err


def test_a_cut_connection_to_a_server_without_ranges(server, tmp_path):
    assert complete(tmp_path, get(tmp_path, server.url("no-ranges-cut")))
    assert [entry["sent"] for entry in server.log] == [len(BODY) // 3, len(BODY)]


def test_a_busy_server_is_asked_again(server, tmp_path):
    assert complete(tmp_path, get(tmp_path, server.url("busy")))
    assert len(server.log) == 2


@pytest.mark.parametrize("kind, requests", [("denied", 1), ("missing", 1), ("broken", weights.ATTEMPTS)])
def test_errors_of_the_server(server, tmp_path, kind, requests):
    code = {"denied": "403", "missing": "404", "broken": "500"}[kind]
    assert f"HTTP {code}" in failure(tmp_path, server.url(kind)) and len(server.log) == requests


def test_a_stalled_connection_is_continued(server, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "TIMEOUT", 0.3)
    assert complete(tmp_path, get(tmp_path, server.url("stalls")))
    assert server.log[1]["range"] == f"bytes={len(BODY) // 3}-"


def fetch(entry, folder):
    weights.FILES["tiny"] = entry
    os.environ["no_proxy"] = "127.0.0.1"
    weights.find_or_download("tiny", folder)


def test_two_processes_fetch_one_file_once(server, tmp_path):
    entry = weights.FILES["tiny"] | {"sources": [server.url("slow")]}
    both = [processes.Process(target=fetch, args=(entry, tmp_path)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert complete(tmp_path, tmp_path / "tiny.pth") and len(server.log) == 1


def test_retries_wait_longer_and_longer_and_end(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(weights, "BACKOFF", 0.5)
    monkeypatch.setattr(weights.time, "sleep", waits.append)
    message = failure(tmp_path, server.url("always-busy"))
    assert f"HTTP 503 Service Unavailable, given up after {weights.ATTEMPTS} tries" in message
    assert len(server.log) == weights.ATTEMPTS
    assert waits == [0.5 * 2 ** number for number in range(weights.ATTEMPTS - 1)]


def test_what_came_before_giving_up_is_kept_for_the_next_time(server, tmp_path):
    assert "connection cut" in failure(tmp_path, server.url("always-cut"))
    part = (tmp_path / "tiny.pth.part").read_bytes()
    assert 0 < len(part) < len(BODY) and BODY.startswith(part)
    assert complete(tmp_path, get(tmp_path, server.url("good")))
    assert server.log[-1]["sent"] == len(BODY) - len(part)


@pytest.mark.parametrize("kind", ["corrupt", "longer"])
def test_wrong_bytes_are_deleted(server, tmp_path, kind):
    assert "wrong size or SHA-256" in failure(tmp_path, server.url(kind))
    assert os.listdir(tmp_path) == [LOCK] and len(server.log) == 1


@pytest.mark.parametrize("kind", ["page", "page-as-binary", "page-of-right-size"])
def test_a_web_page_is_refused_and_never_kept(server, tmp_path, kind):
    assert "a web page came instead" in failure(tmp_path, server.url(kind))
    assert os.listdir(tmp_path) == [LOCK] and len(server.log) == 1


def test_google_drive_is_sent_its_form(server, tmp_path):
    (tmp_path / "tiny.pth.part").write_bytes(BODY[:120_000])
    assert complete(tmp_path, get(tmp_path, server.url("drive?id=7")))
    first, second = (entry["kind"] for entry in server.log)
    assert first == "drive?id=7" and second == "drive?uuid=1&export=download&id=7&confirm=t"
    assert server.log[1]["range"] == "bytes=120000-" and server.log[1]["sent"] == len(BODY) - 120_000


def test_google_drive_refuses(server, tmp_path):
    assert "came instead of the file: Too many users have viewed this file" in failure(tmp_path, server.url("drive-quota"))
    server.log.clear()
    assert "again and again" in failure(tmp_path, server.url("drive-again?"))
    assert len(server.log) == 3
    with pytest.raises(ValueError, match="not HTTPS"):
        weights.check_url("http://example.com/evil", origin="https://drive.usercontent.google.com/download")


def archive(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_a_file_of_unknown_size_and_hash_is_checked_by_the_sums_within(server, tmp_path, monkeypatch, capsys):
    body = archive({"x": torch.arange(50_000)})
    monkeypatch.setitem(globals(), "BODY", body)
    monkeypatch.setitem(weights.FILES, "tiny", {"file": "tiny.pth", "size": None, "sha256": None, "sources": []})
    assert complete(tmp_path, get(tmp_path, server.url("cut")))
    assert hashlib.sha256(body).hexdigest() in capsys.readouterr().err
    (tmp_path / "tiny.pth").unlink()
    middle = bytearray(body)
    middle[len(body) // 2] ^= 1
    monkeypatch.setitem(globals(), "BODY", bytes(middle))
    assert "wrong size" in failure(tmp_path, server.url("good"))
    assert "cut" in failure(tmp_path, server.url("always-cut"))


def test_a_web_page_does_not_cost_the_partial_download(server, tmp_path):
    (tmp_path / "tiny.pth.part").write_bytes(BODY[:120_000])
    assert complete(tmp_path, get(tmp_path, server.url("page"), server.url("page-as-binary"), server.url("good")))
    assert server.log[-1]["range"] == "bytes=120000-"


def test_a_file_of_another_size_is_refused_before_it_is_fetched(server, tmp_path, monkeypatch):
    monkeypatch.setitem(weights.FILES["tiny"], "size", len(BODY) + 1)
    assert f"has {len(BODY)} bytes instead of {len(BODY) + 1}" in failure(tmp_path, server.url("good"))
    assert os.listdir(tmp_path) == [LOCK]


def test_the_final_error_names_file_sources_folder_and_the_way_on(server, tmp_path):
    urls = [server.url("missing"), server.url("page")]
    message = failure(tmp_path, *urls)
    for part in ["tiny.pth", *urls, "HTTP 404", "web page", str(tmp_path), "--offline"]:
        assert part in message
    assert len(server.log) == 2                        # neither is worth a second try


def test_a_server_that_is_not_there(server, tmp_path):
    with socket.socket() as listener:                  # bound but not listening: nobody else gets the port
        listener.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{listener.getsockname()[1]}/f"
        assert "refused" in failure(tmp_path, dead)
        assert complete(tmp_path, get(tmp_path, dead, server.url("good")))


@pytest.mark.parametrize("url", ["http://example.com/tiny.pth", "ftp://127.0.0.1/tiny.pth", "file:///etc/hostname",
                                 "http://127.0.0.1.example.com/f", "http://127.0.0.1@example.com/f", "http://[bad/f"])
def test_other_than_https_is_refused_without_touching_the_network(server, tmp_path, monkeypatch, url):
    touched = []
    for name in ("getaddrinfo", "create_connection", "socket"):
        monkeypatch.setattr(socket, name, lambda *args, **kwargs: touched.append(args))
    monkeypatch.setattr("urllib.request.OpenerDirector.open", lambda *args, **kwargs: touched.append(args))
    message = failure(tmp_path, url)
    assert url in message and ("not an HTTPS address" in message or "[bad" in url)
    assert touched == []


def test_redirects(server, tmp_path):
    assert "not HTTPS" in failure(tmp_path, server.url("to:http://example.invalid/tiny.pth"))
    assert len(server.log) == 1
    with pytest.raises(ValueError):                    # nor may a server elsewhere send us to one on this machine
        weights.check_url(server.url("good"), origin="https://example.com/tiny.pth")
    weights.check_url("https://example.org/f", origin="https://example.com/f")
    assert "HTTP 302" in failure(tmp_path, server.url("loop"))
    (tmp_path / "tiny.pth.part").write_bytes(BODY[:7])
    assert complete(tmp_path, get(tmp_path, server.url("to:" + server.url("good"))))
    assert server.log[-1] == {"kind": "good", "range": "bytes=7-", "sent": len(BODY) - 7}


def test_a_folder_that_cannot_be_made_is_an_error_without_a_request(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="--weights-dir"):
        get(tmp_path / "file", server.url("good"))
    assert server.log == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_and_not_tried_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "open", lambda path, mode: open("/dev/full", mode), raising=False)
    assert "No space left" in failure(tmp_path, server.url("good"), server.url("good"))
    assert len(server.log) == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_the_progress_line(server, tmp_path, monkeypatch, terminal):
    clock, screen = itertools.count(0, 11), io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr(weights, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(weights.sys, "stderr", screen)
    get(tmp_path, server.url("good"))
    lines = screen.getvalue().split("\r\x1b[K" if terminal else "\n")
    lines = lines[1:] if terminal else lines[:-1]
    assert len(lines) > 1                              # 11 seconds for each block: none is passed over
    assert all(re.fullmatch(r"tiny.pth  0.\d/0.3 MB  0.0 MB/s  \d+:\d\d left", line) for line in lines[:-1])
    assert lines[-1].removesuffix("\n") == "tiny.pth  0.3/0.3 MB  0.0 MB/s  0:00 left"
    assert screen.getvalue().endswith("\n")


def test_files_that_are_there(server, tmp_path):
    assert weights.find_file("tiny", tmp_path) is None
    (tmp_path / "tiny_half.pth").write_bytes(b"any size")
    assert weights.find_or_download("tiny", tmp_path) == tmp_path / "tiny_half.pth"
    cached = tmp_path / "hub" / "checkpoints" / "tiny.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(BODY)
    assert weights.find_or_download("tiny", tmp_path) == cached
    (tmp_path / "tiny.pth").write_bytes(BODY[:-1])
    with pytest.raises(UserError, match=f"tiny.pth: {len(BODY) - 1} bytes instead of {len(BODY)}"):
        weights.find_or_download("tiny", tmp_path)
    assert server.log == []


# ---------------------------------------------------------------------------------------------------------------------
# State dicts and VGG-16


def run_convolutions(state, x):
    """Output (N, C, H, W) of the convolutions in `state` on x (N, 3, H, W), as VGG-16 runs them; and their means."""
    means = []
    for index in INDICES[:len(state) // 2]:
        x = F.conv2d(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], padding=1).relu()
        means.append(x.mean().item())
        if index in weights.POOLED:
            x = F.max_pool2d(x, 2)
    return x, means


def names(number):
    return [f"features.{index}.{kind}" for index in INDICES[:number] for kind in ("weight", "bias")]


@pytest.fixture(scope="session")
def real():
    """The real VGG-16's folder, and what its file holds."""
    folder = os.environ.get("CGN_WEIGHTS")
    if not folder or not (Path(folder) / "vgg16_features.pth").is_file():
        pytest.skip("CGN_WEIGHTS is not the folder of vgg16_features.pth")
    return folder, torch.load(Path(folder) / "vgg16_features.pth", weights_only=True, mmap=True)


@pytest.mark.parametrize("number", [2, 7, 10, 13])
def test_real_vgg16_agrees_with_torchvision(real, number):
    folder, held = real
    state = weights.load_vgg16_features(folder, number)
    assert list(state) == names(number)
    assert all(torch.equal(state[name], held[name]) and state[name].dtype == torch.float32 for name in state)
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):                         # the shape of the network without its 528 MB of random weights
        features = torchvision.models.vgg16(weights=None).features
    features.load_state_dict({name.removeprefix("features."): held[name] for name in names(13)}, assign=True)
    # Up to the ReLU after the last convolution, and the pooling that may follow it.
    last = INDICES[number - 1] + (3 if INDICES[number - 1] in (2, 7, 14, 21, 28) else 2)
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = features[:last](x)
        assert expected.std() > 0.01
        torch.testing.assert_close(run_convolutions(state, x)[0], expected, rtol=1e-4, atol=1e-4)


def test_real_vgg16_with_its_classifier_by_the_path_of_the_file(real, tmp_path):
    folder, held = real
    layers = {f"classifier.{index}.{kind}": torch.zeros(3) for index in (0, 3, 6) for kind in ("weight", "bias")}
    torch.save({**held, **layers}, tmp_path / "whole.pth")
    state = weights.load_vgg16_features(tmp_path / "whole.pth", 13)
    assert list(state) == names(13) and torch.equal(state["features.28.weight"], held["features.28.weight"])


@pytest.fixture
def small(tmp_path):
    """`small(changes)` writes a file of two right convolutions and `changes`; a value of None removes the name."""
    def write(changes, path=tmp_path / "small.pth"):
        state = {**weights.random_vgg16_features(2), **changes}
        torch.save({name: value for name, value in state.items() if value is not None}, path)
        return path
    return write


def test_only_the_convolutions_used_are_needed(small):
    path = small({"features.5.weight": torch.full((2,), torch.nan), "classifier.0.bias": torch.zeros(1)})
    state = weights.load_vgg16_features(path, 2)
    assert {name: tuple(state[name].shape) for name in state} == {
        "features.0.weight": (64, 3, 3, 3), "features.0.bias": (64,),
        "features.2.weight": (64, 64, 3, 3), "features.2.bias": (64,)}
    for number in (0, 14):
        with pytest.raises(UserError, match=f"13 convolutions to choose, not {number}"):
            weights.load_vgg16_features(path, number)


def test_the_weights_outlive_their_file(small):
    path = small({})
    state = weights.load_vgg16_features(path, 2)
    with open(path, "r+b") as file:                    # in place: a memory map would see it
        file.write(bytes(path.stat().st_size))
    right = weights.random_vgg16_features(2)
    assert all(torch.equal(state[name], right[name]) for name in right)


def test_half_precision_and_a_common_prefix(tmp_path):
    right = weights.random_vgg16_features(2)
    halves = {f"module.{name}": torch.nn.Parameter(value.half()) for name, value in right.items()}
    torch.save(halves, tmp_path / "f.pth")
    state = weights.load_vgg16_features(tmp_path / "f.pth", 2)
    assert list(state) == list(right)
    assert all(torch.equal(state[name], right[name].half().float()) for name in right)
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in state.values())


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("changes, words", [
    ({"features.2.bias": None}, ["1 missing", "features.2.bias"]),
    ({"features.2.weight": torch.zeros(64, 3, 3, 3)}, ["wrong shape", "(64, 3, 3, 3) instead of (64, 64, 3, 3)"]),
    ({f"features.{index}.weight": torch.zeros(1) for index in (1, 3, 4, 6, 8)},
     ["5 unexpected", "features.1.weight", "..."]),
    ({"classifier.1.weight": torch.zeros(1)}, ["1 unexpected", "classifier.1.weight"]),
    ({"module.features.2.bias": torch.zeros(64)}, ["1 unexpected", "module.features.2.bias"]),
    ({"features.0.bias": torch.tensor([float("nan")] + [0.0] * 63)}, ["1 not finite", "features.0.bias"]),
    ({"features.0.bias": torch.tensor([0.0] * 63 + [float("-inf")])}, ["1 not finite", "features.0.bias"]),
    ({"features.0.bias": torch.zeros(64, dtype=torch.int64)}, ["1 not floating-point", "features.0.bias"]),
    ({"features.0.bias": [0.0] * 64}, ["1 not a tensor", "features.0.bias"]),
    ({"features.0.bias": torch.zeros(64).to_sparse()}, ["1 not a tensor", "features.0.bias"]),
    ({"features.0.bias": torch.zeros(64, device="meta")}, ["1 not a tensor", "features.0.bias"]),
    ({3: torch.zeros(1)}, ["not tensors by name"]),
])
def test_wrong_state_dicts(small, changes, words):
    path = small(changes)
    with pytest.raises(UserError) as caught:
        weights.load_vgg16_features(path, 2)
    assert all(word in str(caught.value) for word in [str(path), *words]), str(caught.value)
    assert "features.8.weight" not in str(caught.value)            # a long list is cut short
    assert "\n" not in str(caught.value)


class RunsCode:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("save", [torch.save, functools.partial(torch.save, _use_new_zipfile_serialization=False),
                                  lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_a_file_that_would_run_code(tmp_path, save):
    save({"features.0.weight": RunsCode(tmp_path / "ran")}, tmp_path / "f.pth")
    with pytest.raises(UserError, match="f.pth"):
        weights.load_vgg16_features(tmp_path / "f.pth", 2)
    assert not (tmp_path / "ran").exists()


def test_damaged_and_missing_files(small, tmp_path):
    path = small({})
    assert len(weights.load_vgg16_features(path, 2)) == 4
    whole = path.read_bytes()
    for length in (0, 1000, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="small.pth"):
            weights.load_vgg16_features(path, 2)
    with pytest.raises(UserError, match="no such file"):
        weights.load_vgg16_features(tmp_path / "none.pth", 2)
    torch.save(["features.0.weight"], path)
    with pytest.raises(UserError, match="holds a list"):
        weights.load_vgg16_features(path, 2)
    assert os.listdir(tmp_path) == ["small.pth"]


def test_check_state_dict_with_a_module():
    module = torch.nn.BatchNorm1d(3)                   # has an integer among its buffers
    state = module.state_dict()
    wrapped = {f"module.{name}": value for name, value in state.items()}
    module.load_state_dict(weights.check_state_dict(wrapped, state, "f.pth"))
    assert list(weights.check_state_dict({"a": torch.zeros(2, dtype=torch.int32)}, {"a": (2,)}, "f.pth")) == ["a"]
    with pytest.raises(UserError) as caught:
        weights.check_state_dict({"weight": torch.zeros(4), "other": 1}, state, "f.pth")
    for words in ["f.pth", "4 missing: bias", "1 unexpected: other", "1 of wrong shape: weight (4,) instead of (3,)"]:
        assert words in str(caught.value)


def test_random_features_are_the_same_for_the_same_seed_only():
    torch.manual_seed(1)
    first = weights.random_vgg16_features(10)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second, other = weights.random_vgg16_features(10), weights.random_vgg16_features(10, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(first) == names(10)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if name.endswith("weight"))
    assert all(torch.equal(first[name], value) for name, value in weights.random_vgg16_features(2).items())


@pytest.mark.parametrize("seed", [0, 1])
def test_random_features_have_a_sensible_scale_and_tell_pictures_apart(seed):
    state = weights.random_vgg16_features(13, seed)
    pictures = weights.blob_pictures(torch.Generator().manual_seed(1000 + seed), number=64)
    assert pictures.shape == (64, 3, 32, 32) and pictures.min() >= -1 and pictures.max() <= 1 and pictures.std() > 0.2
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in state.values())
    assert not any(state[name].any() for name in state if name.endswith("bias"))
    _, means = run_convolutions(state, pictures)       # pictures other than those the scale was set with
    assert all(0.8 < mean < 1.25 for mean in means), means
    features, _ = run_convolutions({name: state[name] for name in names(10)}, pictures)
    features = F.normalize(features.flatten(1))
    assert (features @ features.T).mean() < 0.9        # filters with their means: 0.97 and more


def test_random_features_match_the_layout_of_the_real_ones(real):
    state = weights.random_vgg16_features(13)
    assert {name: value.shape for name, value in state.items()} == {name: real[1][name].shape for name in names(13)}
