"""Downloads from mirrors that fail, each in its way, and into caches that cannot be written; the mirrors are real
HTTP servers on this machine."""

import errno
import gzip
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trimtab import data
from trimtab.data import files

BODY = bytes(range(256)) * 500
DIGEST = files.hashlib.sha256(BODY).hexdigest()
PACKED = gzip.compress(BODY)


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    """Nothing is found outside the test's own folder; no proxy stands between."""
    monkeypatch.setenv("TRIMTAB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(files.platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache"))


@pytest.fixture
def mirror():
    """Starts a server that answers every request by the function given; returns its address and what was asked."""
    servers = []

    def start(answer):
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                answer(self)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def sends(body, promised=None, status=200, kind="application/gzip"):
    def answer(request):
        request.send_response(status)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(body) if promised is None else promised))
        request.end_headers()
        request.wfile.write(body)

    return answer


def resets(request):
    request.send_response(200)
    request.send_header("Content-Length", str(len(PACKED)))
    request.end_headers()
    request.wfile.write(PACKED[:50])
    request.wfile.flush()
    # Closing with a linger of zero seconds sends a reset in place of an orderly end.
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.connection.shutdown(socket.SHUT_RD)
    request.connection.close()


def breaks_off_between_chunks(request):
    request.send_response(200)
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    request.wfile.write(b"ff\r\n" + PACKED[:20])


def page(request):
    sends(b"<html>Please log in to this network</html>", kind="text/html")(request)


FAILURES = {
    "short": (sends(PACKED[:100], promised=len(PACKED)), f"broke off after 100 of {len(PACKED)} bytes"),
    "reset": (resets, "reset|IncompleteRead|broke off"),
    "chunked and short": (breaks_off_between_chunks, "IncompleteRead"),
    "page of a portal": (page, "what it sent is not the file.*Not a gzipped file"),
    "missing": (sends(b"", status=404), "404"),
    "another file": (sends(gzip.compress(b"else")), "what it sent is not the file.*SHA-256"),
    "cut short at the source": (sends(PACKED[:-20]), "what it sent is not the file.*truncated or damaged"),
    "damaged": (sends(PACKED[:40] + b"\xff" * 60 + PACKED[100:]), "what it sent is not the file.*damaged"),
}


def fetch(*mirrors):
    return files.require("set", "file", DIGEST, mirrors=mirrors, hint="or from a friend")


def left_in_cache():
    folder = files.cache_folder("set")
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_a_file_is_fetched_once(mirror):
    address, asked = mirror(sends(PACKED))
    path = fetch(address + "/")
    assert (files.content(path), path) == (BODY, files.cache_folder("set") / "file.gz")
    assert fetch(address) == path
    assert asked == ["/file.gz"]
    assert left_in_cache() == ["file.gz"]


@pytest.mark.parametrize("how", FAILURES)
def test_a_mirror_that_fails_is_told_and_leaves_nothing(mirror, tmp_path, how):
    answer, reason = FAILURES[how]
    address, _ = mirror(answer)
    with pytest.raises(data.DataNotFoundError, match=f"(?s){address}: .*({reason})") as caught:
        fetch(address)
    text = str(caught.value)
    assert f"Put file or file.gz into {tmp_path / 'data' / 'set'}; or from a friend" in text
    assert len(text.splitlines()) == 2  # what to do, and a line for the mirror
    assert left_in_cache() == []


@pytest.mark.parametrize("how", FAILURES)
def test_the_next_mirror_is_asked(mirror, how):
    failing, first = mirror(FAILURES[how][0])
    good, second = mirror(sends(PACKED))
    assert files.content(fetch(failing, good)) == BODY
    assert first == second == ["/file.gz"]
    assert left_in_cache() == ["file.gz"]


def test_each_mirror_that_failed_has_a_line(mirror):
    addresses = [mirror(answer)[0] for answer, _ in FAILURES.values()]
    with pytest.raises(data.DataNotFoundError) as caught:
        fetch(*addresses)
    lines = str(caught.value).splitlines()[1:]
    assert all(line.strip().startswith(f"{a}: ") for line, a in zip(lines, addresses, strict=True))


def test_a_bomb_is_given_up_before_it_is_hashed(mirror, monkeypatch):
    """A megabyte of zeros packed to a kilobyte, with the right checksum: refused for its size all the same."""
    monkeypatch.setattr(files, "_LARGEST", 300_000)
    monkeypatch.setattr(files, "_PIECE", 10_000)
    bomb = bytes(1_000_000)
    address, _ = mirror(sends(gzip.compress(bomb)))
    hashed = []

    class Counting:
        def update(self, piece):
            hashed.append(len(piece))

    monkeypatch.setattr(files.hashlib, "sha256", Counting)
    with pytest.raises(data.DataNotFoundError, match="unpacks to more than 300,000 bytes"):
        fetch(address)
    assert sum(hashed) <= 300_000
    assert left_in_cache() == []


def test_a_bomb_that_lies_on_the_machine_is_refused_too(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LARGEST", 300_000)
    path = tmp_path / "data" / "set" / "file.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(bytes(1_000_000)))
    for read in (fetch, lambda: files.content(path)):
        with pytest.raises(data.DataCorruptError, match=f"{path}.*unpacks to more than 300,000 bytes"):
            read()


def test_an_endless_answer_is_given_up(mirror, monkeypatch):
    monkeypatch.setattr(files, "_LARGEST", 300_000)

    def endless(request):
        request.send_response(200)
        request.end_headers()
        try:
            while True:
                request.wfile.write(bytes(10_000))
        except OSError:
            pass

    address, _ = mirror(endless)
    with pytest.raises(data.DataNotFoundError, match="sends more than 300,000 bytes"):
        fetch(address)
    assert left_in_cache() == []


def test_no_mirror_is_asked_where_the_cache_cannot_be_written(mirror, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    address, asked = mirror(sends(PACKED))
    with pytest.raises(data.DataNotFoundError, match=r"file\.gz cannot be written \(Not a directory\)") as caught:
        fetch(address, address)
    assert str(files.cache_folder("set")) in str(caught.value)
    assert str(tmp_path / "data" / "set") in str(caught.value)
    assert asked == []


@pytest.mark.parametrize("step", ["write", "close"])
def test_a_full_disk_leaves_nothing_and_names_the_file(mirror, monkeypatch, step):
    address, asked = mirror(sends(PACKED))
    real = files.tempfile.NamedTemporaryFile

    class Full:
        """A file on a full disk: `write` fails, or, where what is written waits in a buffer, the end does."""

        def __init__(self, **options):
            self.part = real(**options)
            self.name = self.part.name

        def write(self, piece):
            if step == "write":
                self.refuse()

        def refuse(self):
            raise OSError(errno.ENOSPC, "No space left on device")

        def __enter__(self):
            return self

        def __exit__(self, kind, *_):
            self.part.close()
            if kind is None:
                self.refuse()

    monkeypatch.setattr(files.tempfile, "NamedTemporaryFile", Full)
    with pytest.raises(data.DataNotFoundError, match=r"file\.gz cannot be written \(No space left on device\)"):
        fetch(address, address)
    assert len(asked) == 1  # another mirror would not make room
    assert left_in_cache() == []


def test_an_interrupt_leaves_nothing(mirror, monkeypatch):
    address, _ = mirror(sends(PACKED))

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(address)
    assert left_in_cache() == []
