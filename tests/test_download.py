"""Downloads against a server on this machine: whole, resumed, cut, refused, damaged, confirmed."""

import functools
import hashlib
import http.server
import io
import itertools
import os
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
import torchvision
from conftest import processes

from data import download
from data.runs import UserError

BODY = b"PK" + random.Random(0).randbytes(300_000)
LOCK = ".tiny.pth.lock"
ENTRY = {
    "file": "tiny.pth",
    "size": len(BODY),
    "sha256": hashlib.sha256(BODY).hexdigest(),
    "sources": [],
    "also": ["tiny_half.pth"],
}


# --------------------------------------------------------------------------------------------------
# The server

HTML = "text/html; charset=utf-8"
BINARY = "application/octet-stream"
ERRORS = {"missing": 404, "denied": 403, "broken": 500, "always-busy": 503}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves BODY; the path says in what way it goes wrong. `server.log` has the requests."""

    def do_GET(self):
        kind = self.path.strip("/")
        asked = self.headers.get("Range")
        entry = {"kind": kind, "range": asked, "sent": 0}
        self.server.log.append(entry)
        first = sum(other["kind"] == kind for other in self.server.log) == 1
        code, body, headers = self.answer(kind, asked, first)
        self.send_response(code)
        if kind not in ("longer", "endless"):
            self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

        cut_once = kind in ("cut", "no-ranges-cut", "stalls") and first
        if cut_once or kind == "always-cut":
            body = body[: len(body) // 3]
        entry["sent"] = len(body) if code in (200, 206) else 0  # before the client may go on
        if kind == "slow":
            for piece in range(10):
                self.wfile.write(body[piece * len(body) // 10 : (piece + 1) * len(body) // 10])
                time.sleep(0.1)
        else:
            self.wfile.write(body)
        if kind == "stalls" and first:
            time.sleep(2)

    def answer(self, kind, asked, first):
        """Status, body and headers."""
        headers = {"Content-Type": BINARY}
        if kind.startswith("page"):
            return self.page(kind)
        if kind.startswith("drive"):
            return self.drive(kind)
        if kind in ERRORS:
            return ERRORS[kind], b"no such file", headers
        if kind == "busy" and first:
            return 503, b"busy", headers
        if kind == "loop":
            return 302, b"", headers | {"Location": self.path}
        if kind.startswith("to:"):
            return 302, b"", headers | {"Location": kind.removeprefix("to:")}
        if kind == "unsatisfiable" and asked:
            return 416, b"", headers | {"Content-Range": f"bytes */{len(BODY)}"}
        if asked is None or kind.startswith("no-ranges"):
            return 200, self.damage(kind, BODY), headers
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if kind == "shifted":  # a piece, but not the one asked for
            start -= 5
        headers["Content-Range"] = f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"
        return 206, self.damage(kind, BODY[start:]), headers

    def damage(self, kind, body):
        if kind == "corrupt":
            return body[:-1] + bytes([body[-1] ^ 1])
        if kind == "longer":
            return body + b"x"
        if kind == "endless":
            return body + bytes(10**6)
        return body

    def page(self, kind):
        """A web page in place of the file, honest about it or not."""
        if kind == "page":
            return 200, b"Sorry, moved", {"Content-Type": HTML}
        if kind == "page-of-right-size":
            return 200, b"<!DOCTYPE html>".ljust(len(BODY)), {"Content-Type": BINARY}
        return 200, b"\n<html>", {"Content-Type": BINARY}

    def drive(self, kind):
        """As Google Drive: a form first, its fields in the next address."""
        if kind.startswith("drive-quota"):
            page = (
                '<p class="uc-error-subcaption">Too many <b>users</b>\n have viewed this file</p>'
            )
            return 200, page.encode(), {"Content-Type": HTML}
        address = urlsplit(self.path)
        confirmed = {"confirm", "uuid"} <= dict(parse_qsl(address.query)).keys()
        if confirmed and not kind.startswith("drive-again"):
            return self.answer("good", self.headers.get("Range"), False)
        action = f"{address.path}?uuid=1&amp;export=download"
        page = (
            f'<form action="{action}" method="get" id="download-form"><input type="hidden" '
            'value="7" name="id"><input type=hidden name=confirm value="t"></form>'
        )
        return 200, page.encode(), {"Content-Type": HTML}

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on a free port; `server.url(kind)`. No time is lost on waiting."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.log = []
    server.url = lambda kind: f"http://127.0.0.1:{server.server_port}/{kind}"
    thread = threading.Thread(target=functools.partial(server.serve_forever, 0.02), daemon=True)
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "BACKOFF", 0.0)
    monkeypatch.setattr(download, "TIMEOUT", 5.0)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def get(folder, *urls, entry=ENTRY):
    return download.find_or_download(entry, folder, sources=list(urls))


def failure(folder, *urls, entry=ENTRY):
    """The message of a download that must fail, and leave nothing under the final name and no other
    file than the part.
    """
    with pytest.raises(UserError) as caught:
        get(folder, *urls, entry=entry)
    assert {path.name for path in folder.iterdir()} <= {"tiny.pth.part", LOCK}
    assert "\n" not in str(caught.value)
    return str(caught.value)


def complete(folder, path):
    """Whether a download returned the right path and left the right file, and no other."""
    assert path == folder / "tiny.pth"
    assert path.read_bytes() == BODY
    return set(os.listdir(folder)) == {"tiny.pth", LOCK}


# --------------------------------------------------------------------------------------------------
# Whole and resumed


def test_plain_download_makes_the_folder_and_comes_only_once(server, tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    assert complete(folder, get(folder, server.url("good")))
    assert server.log == [{"kind": "good", "range": None, "sent": len(BODY)}]
    assert "0.3/0.3 MB" in capsys.readouterr().err
    assert complete(folder, get(folder, server.url("good")))
    assert len(server.log) == 1


def test_sources_of_the_table_are_tried_in_order(server, tmp_path):
    entry = ENTRY | {"sources": [server.url("missing"), server.url("good")]}
    assert complete(tmp_path, download.find_or_download(entry, tmp_path))
    assert [request["kind"] for request in server.log] == ["missing", "good"]


def test_a_partial_download_is_resumed(server, tmp_path):
    (tmp_path / "tiny.pth.part").write_bytes(BODY[:120_000])
    assert complete(tmp_path, get(tmp_path, server.url("good")))
    sent = len(BODY) - 120_000
    assert server.log == [{"kind": "good", "range": "bytes=120000-", "sent": sent}]


@pytest.mark.parametrize(
    "kind, ranges",
    [
        ("no-ranges", ["bytes=120000-"]),
        ("shifted", ["bytes=120000-", None]),
        ("unsatisfiable", ["bytes=120000-", None]),
    ],
)
def test_a_server_that_cannot_resume_starts_afresh(server, tmp_path, kind, ranges):
    # If any of this were kept, the hash would be wrong.
    (tmp_path / "tiny.pth.part").write_bytes(b"#" * 120_000)
    assert complete(tmp_path, get(tmp_path, server.url(kind)))
    assert [request["range"] for request in server.log] == ranges


def test_a_complete_part_is_checked_and_taken_without_a_request(server, tmp_path):
    (tmp_path / "tiny.pth.part").write_bytes(BODY)
    assert complete(tmp_path, get(tmp_path, server.url("unsatisfiable")))
    assert server.log == []


@pytest.mark.parametrize("part", [b"#" * 120_000, b"#" * len(BODY), b"#" * (len(BODY) + 7)])
def test_a_wrong_part_is_deleted_and_the_next_source_starts_afresh(server, tmp_path, part):
    (tmp_path / "tiny.pth.part").write_bytes(part)
    assert complete(tmp_path, get(tmp_path, server.url("good"), server.url("good")))
    assert server.log[-1] == {"kind": "good", "range": None, "sent": len(BODY)}


def test_a_cut_connection_is_resumed(server, tmp_path, capsys):
    assert complete(tmp_path, get(tmp_path, server.url("cut")))
    third = len(BODY) // 3
    requests = [(request["range"], request["sent"]) for request in server.log]
    assert requests == [(None, third), (f"bytes={third}-", len(BODY) - third)]
    message = f"connection cut after {third} of {len(BODY)} bytes; trying again"
    assert message in capsys.readouterr().err


def test_a_cut_connection_to_a_server_without_ranges(server, tmp_path):
    assert complete(tmp_path, get(tmp_path, server.url("no-ranges-cut")))
    assert [request["sent"] for request in server.log] == [len(BODY) // 3, len(BODY)]


def test_a_busy_server_is_asked_again(server, tmp_path):
    assert complete(tmp_path, get(tmp_path, server.url("busy")))
    assert len(server.log) == 2


@pytest.mark.parametrize(
    "kind, requests", [("denied", 1), ("missing", 1), ("broken", download.ATTEMPTS)]
)
def test_errors_of_the_server(server, tmp_path, kind, requests):
    assert f"HTTP {ERRORS[kind]}" in failure(tmp_path, server.url(kind))
    assert len(server.log) == requests


def test_a_stalled_connection_is_resumed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    assert complete(tmp_path, get(tmp_path, server.url("stalls")))
    assert server.log[1]["range"] == f"bytes={len(BODY) // 3}-"


def fetch(entry, folder):
    os.environ["no_proxy"] = "127.0.0.1"
    download.find_or_download(entry, folder)


def test_two_processes_fetch_one_file_once(server, tmp_path):
    entry = ENTRY | {"sources": [server.url("slow")]}
    both = [processes.Process(target=fetch, args=(entry, tmp_path)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert complete(tmp_path, tmp_path / "tiny.pth")
    assert len(server.log) == 1


def test_retries_wait_longer_and_longer_and_end(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(download, "BACKOFF", 0.5)
    monkeypatch.setattr(download.time, "sleep", waits.append)
    message = failure(tmp_path, server.url("always-busy"))
    assert f"HTTP 503 Service Unavailable, given up after {download.ATTEMPTS} tries" in message
    assert len(server.log) == download.ATTEMPTS
    assert waits == [0.5 * 2**number for number in range(download.ATTEMPTS - 1)]


def test_what_came_before_giving_up_is_kept_for_the_next_time(server, tmp_path):
    assert "connection cut" in failure(tmp_path, server.url("always-cut"))
    part = (tmp_path / "tiny.pth.part").read_bytes()
    assert 0 < len(part) < len(BODY)
    assert BODY.startswith(part)
    assert complete(tmp_path, get(tmp_path, server.url("good")))
    assert server.log[-1]["sent"] == len(BODY) - len(part)


# --------------------------------------------------------------------------------------------------
# Wrong content


def test_no_more_is_read_than_the_file_should_have(server, tmp_path, monkeypatch):
    sizes = []
    append = download.PartialFile.append

    def note(part, block):
        sizes.append(len(block))
        append(part, block)

    monkeypatch.setattr(download.PartialFile, "append", note)
    assert "wrong size" in failure(tmp_path, server.url("endless"))
    assert sum(sizes) <= len(BODY) + download.BLOCK


@pytest.mark.parametrize("kind", ["corrupt", "longer"])
def test_wrong_bytes_are_deleted(server, tmp_path, kind):
    assert "wrong size or SHA-256" in failure(tmp_path, server.url(kind))
    assert os.listdir(tmp_path) == [LOCK]
    assert len(server.log) == 1


@pytest.mark.parametrize("kind", ["page", "page-as-binary", "page-of-right-size"])
def test_a_web_page_is_refused_and_never_kept(server, tmp_path, kind):
    assert "a web page came instead" in failure(tmp_path, server.url(kind))
    assert os.listdir(tmp_path) == [LOCK]
    assert len(server.log) == 1


def test_google_drive_is_sent_its_form(server, tmp_path):
    (tmp_path / "tiny.pth.part").write_bytes(BODY[:120_000])
    assert complete(tmp_path, get(tmp_path, server.url("drive?id=7")))
    first, second = server.log
    assert first["kind"] == "drive?id=7"
    assert second["kind"] == "drive?uuid=1&export=download&id=7&confirm=t"
    assert second["range"] == "bytes=120000-"
    assert second["sent"] == len(BODY) - 120_000


def test_google_drive_refuses(server, tmp_path):
    message = failure(tmp_path, server.url("drive-quota"))
    assert "came instead of the file: Too many users have viewed this file" in message
    server.log.clear()
    assert "again and again" in failure(tmp_path, server.url("drive-again?"))
    assert len(server.log) == 3
    drive = "https://drive.usercontent.google.com/download"
    with pytest.raises(ValueError, match="not HTTPS"):
        download.check_url("http://example.com/evil", origin=drive)


def archive(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


UNKNOWN = {"file": "tiny.pth", "size": None, "sha256": None, "sources": []}


def test_a_damaged_beginning_does_not_cost_a_good_source(server, tmp_path):
    """As a power cut may leave one: zeros, of any length."""
    for size in (len(BODY) // 2, len(BODY), len(BODY) + 5):
        (tmp_path / "tiny.pth.part").write_bytes(bytes(size))
        assert complete(tmp_path, get(tmp_path, server.url("good")))
        (tmp_path / "tiny.pth").unlink()


@pytest.mark.parametrize("body", [b'{"error": "quota exceeded"}', b"legacy"])
def test_a_file_without_tensors_is_refused(body, server, tmp_path, monkeypatch):
    if body == b"legacy":  # without checksums, and cut
        file = io.BytesIO()
        torch.save(torch.arange(9_000), file, _use_new_zipfile_serialization=False)
        body = file.getvalue()[:40_000]
    monkeypatch.setitem(globals(), "BODY", body)
    assert "wrong size" in failure(tmp_path, server.url("good"), entry=UNKNOWN)


def test_a_file_of_unknown_size_and_hash_is_checked_by_the_sums_within(
    server, tmp_path, monkeypatch, capsys
):
    body = archive({"x": torch.arange(50_000)})
    monkeypatch.setitem(globals(), "BODY", body)
    assert complete(tmp_path, get(tmp_path, server.url("cut"), entry=UNKNOWN))
    assert hashlib.sha256(body).hexdigest() in capsys.readouterr().err
    (tmp_path / "tiny.pth").unlink()
    middle = bytearray(body)
    middle[len(body) // 2] ^= 1
    monkeypatch.setitem(globals(), "BODY", bytes(middle))
    assert "wrong size" in failure(tmp_path, server.url("good"), entry=UNKNOWN)
    assert "cut" in failure(tmp_path, server.url("always-cut"), entry=UNKNOWN)


def test_an_empty_file_of_unknown_size_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "BODY", b"")
    assert "wrong size" in failure(tmp_path, server.url("good"), entry=UNKNOWN)


def test_a_web_page_does_not_cost_the_partial_download(server, tmp_path):
    (tmp_path / "tiny.pth.part").write_bytes(BODY[:120_000])
    urls = [server.url(kind) for kind in ("page", "page-as-binary", "good")]
    assert complete(tmp_path, get(tmp_path, *urls))
    assert server.log[-1]["range"] == "bytes=120000-"


def test_a_file_of_another_size_is_refused_before_it_is_fetched(server, tmp_path):
    larger = ENTRY | {"size": len(BODY) + 1}
    message = failure(tmp_path, server.url("good"), entry=larger)
    assert f"has {len(BODY)} bytes instead of {len(BODY) + 1}" in message
    assert os.listdir(tmp_path) == [LOCK]


def test_the_final_error_names_file_sources_folder_and_the_way_on(server, tmp_path):
    urls = [server.url("missing"), server.url("page")]
    message = failure(tmp_path, *urls)
    for part in ["tiny.pth", *urls, "HTTP 404", "web page", str(tmp_path), "--offline"]:
        assert part in message
    assert len(server.log) == 2  # neither is worth a second try


# --------------------------------------------------------------------------------------------------
# Addresses


def test_a_server_that_is_not_there(server, tmp_path):
    with socket.socket() as listener:  # bound but not listening: nobody else gets the port
        listener.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{listener.getsockname()[1]}/f"
        assert "refused" in failure(tmp_path, dead)
        assert complete(tmp_path, get(tmp_path, dead, server.url("good")))


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/tiny.pth",
        "ftp://127.0.0.1/tiny.pth",
        "file:///etc/hostname",
        "http://127.0.0.1.example.com/f",
        "http://127.0.0.1@example.com/f",
        "http://[bad/f",
    ],
)
def test_other_than_https_is_refused_without_touching_the_network(
    server, tmp_path, monkeypatch, url
):
    touched = []

    def touch(*args, **kwargs):
        touched.append(args)

    for name in ("getaddrinfo", "create_connection", "socket"):
        monkeypatch.setattr(socket, name, touch)
    monkeypatch.setattr("urllib.request.OpenerDirector.open", touch)
    message = failure(tmp_path, url)
    assert url in message
    assert "not an HTTPS address" in message or "[bad" in url
    assert touched == []


def test_redirects(server, tmp_path):
    elsewhere = server.url("to:http://example.invalid/tiny.pth")
    assert "not HTTPS" in failure(tmp_path, elsewhere)
    assert len(server.log) == 1
    with pytest.raises(ValueError):  # nor may a server elsewhere send us to one on this machine
        download.check_url(server.url("good"), origin="https://example.com/tiny.pth")
    download.check_url("https://example.org/f", origin="https://example.com/f")
    assert "HTTP 302" in failure(tmp_path, server.url("loop"))
    (tmp_path / "tiny.pth.part").write_bytes(BODY[:7])
    assert complete(tmp_path, get(tmp_path, server.url("to:" + server.url("good"))))
    assert server.log[-1] == {"kind": "good", "range": "bytes=7-", "sent": len(BODY) - 7}


# --------------------------------------------------------------------------------------------------
# Disk and screen


def test_a_folder_that_cannot_be_made_is_an_error_without_a_request(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="--weights-dir"):
        get(tmp_path / "file", server.url("good"))
    assert server.log == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_and_not_tried_again(server, tmp_path, monkeypatch):
    def open_full(path, mode):
        return open("/dev/full", mode)

    monkeypatch.setattr(download, "open", open_full, raising=False)
    assert "No space left" in failure(tmp_path, server.url("good"), server.url("good"))
    assert len(server.log) == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_the_progress_line(server, tmp_path, monkeypatch, terminal):
    clock = itertools.count(0, 11)
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    slow = types.SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr(download, "time", slow)
    monkeypatch.setattr(download.sys, "stderr", screen)
    get(tmp_path, server.url("good"))
    lines = screen.getvalue().split("\r\x1b[K" if terminal else "\n")
    lines = lines[1:] if terminal else lines[:-1]
    assert len(lines) > 1  # 11 seconds for each block: none is passed over
    for line in lines[:-1]:
        assert re.fullmatch(r"tiny.pth  0.\d/0.3 MB  0.0 MB/s  \d+:\d\d left", line)
    assert lines[-1].removesuffix("\n") == "tiny.pth  0.3/0.3 MB  0.0 MB/s  0:00 left"
    assert screen.getvalue().endswith("\n")


def test_files_that_are_there(server, tmp_path):
    entry = ENTRY | {"sources": [server.url("good")]}
    assert download.find_file(entry, tmp_path) is None
    (tmp_path / "tiny_half.pth").write_bytes(b"any size")
    assert download.find_or_download(entry, tmp_path) == tmp_path / "tiny_half.pth"
    cached = tmp_path / "hub" / "checkpoints" / "tiny.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(BODY)
    assert download.find_or_download(entry, tmp_path) == cached
    (tmp_path / "tiny.pth").write_bytes(BODY[:-1])
    message = f"tiny.pth: {len(BODY) - 1} bytes instead of {len(BODY)}"
    with pytest.raises(UserError, match=message):
        download.find_or_download(entry, tmp_path)
    assert server.log == []


def test_entries_of_torchvision():
    weights = torchvision.models.ResNet50_Weights
    entry = download.torchvision_file("resnet50")
    assert entry["sources"] == [weights.IMAGENET1K_V1.url]
    assert entry["file"] == "resnet50-0676ba61.pth"
    assert entry["sha256"] == "0676ba61"
    assert entry["size"] is None
    assert "resnet50" not in download.FILES
