"""How archives are fetched: only the pinned files are kept, nothing of them is executed."""

import functools
import hashlib
import io
import os
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from material import pinned

from hsa_mini.data import archives
from hsa_mini.data.archives import ARCHIVES, Archive, fetch_archives
from hsa_mini.data.longer_archives import LONGER
from hsa_mini.paths import data_dir

# An in-tree build backend needs no other package, so pip would run it before it looks at anything.
BACKEND = """
from pathlib import Path
Path({mark!r}).touch()
"""
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HSA_MINI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "archives").glob("*"))


def test_the_archives_are_the_recorded_ones():
    record = (data_dir() / "PROVENANCE.md").read_text(encoding="utf-8")
    longer = [archive for archives in LONGER.values() for archive in archives]
    for archive in (*ARCHIVES, *longer):
        assert f"| `{archive.name}` | `{archive.sha256}` |" in record
    for split, some in LONGER.items():
        for archive in some:
            assert f"| `{archive.name}` | `{archive.sha256}` | {split}, " in record
    assert len({archive.sha256 for archive in longer}) == len(longer)
    assert sum(archive.size for archive in longer) < 1e9


# Fetching from an index


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; /moved/FILE is redirected to /files/FILE."""

    def do_GET(self):
        if self.path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", self.path.replace("/moved/", "/files/"))
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, *_):
        """A client that hangs up is no error."""


@pytest.fixture
def serve():
    """Starts servers on this machine; returns the address of each."""
    servers = []

    def start(handler) -> str:
        server = Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def malicious(tmp_path, monkeypatch) -> Archive:
    """A source archive whose build code writes the file tmp_path/executed, in a package index."""
    files = {
        "pyproject.toml": PYPROJECT,
        "backend.py": BACKEND.format(mark=str(tmp_path / "executed")),
        "setup.py": BACKEND.format(mark=str(tmp_path / "executed")),
        "PKG-INFO": "Metadata-Version: 2.1\nName: bad\nVersion: 1.0\n",
    }
    for name in ("site/files", "site/simple/bad"):
        (tmp_path / name).mkdir(parents=True)
    path = tmp_path / "site/files/bad-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"bad-1.0/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "pip"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return Archive("bad", path.name, len(content), digest)


@pytest.mark.parametrize("kind", ["file", "server", "find-links"])
def test_a_source_archive_is_fetched_by_its_pin_and_never_executed(
    cache, malicious, monkeypatch, serve, tmp_path, kind
):
    site = tmp_path / "site"
    handler = functools.partial(Handler, directory=site)
    address = serve(handler) if kind == "server" else site.as_uri()
    folder = "moved" if kind == "server" else "files"
    link = f'<a href="../../{folder}/{malicious.name}">{malicious.name}</a>'
    (site / "simple/bad/index.html").write_text(link)
    monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")
    if kind == "find-links":
        monkeypatch.setenv("PIP_FIND_LINKS", str(site / "files"))
        monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(archives, "ARCHIVES", (malicious,))
    fetch_archives()
    assert malicious.read() == (site / "files" / malicious.name).read_bytes()
    assert kept(cache) == [malicious.name] and not (tmp_path / "executed").exists()

    malicious.path.unlink()
    with (site / "files" / malicious.name).open("r+b") as file:
        file.write(b"\1")  # the size stays
    with pytest.raises(OSError, match=r"^could not fetch bad-1.0.tar.gz: .* sha256 [0-9a-f]{64}$"):
        fetch_archives()
    assert kept(cache) == [] and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("index", ["http://127.0.0.1:1/simple", "x:"])
def test_without_an_index_there_is_one_line_with_the_reason(cache, malicious, monkeypatch, index):
    monkeypatch.setenv("PIP_INDEX_URL", index)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setattr(archives, "ARCHIVES", (malicious,))
    with pytest.raises(OSError, match=r"^could not fetch bad-1.0.tar.gz: ERROR: .* for bad$"):
        fetch_archives()
    assert kept(cache) == []


# Fetching from a known address


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """A folder with other archives, which are the pinned ones; pip says that they are there."""
    contents = [archive.name.encode() * 5000 for archive in ARCHIVES]
    monkeypatch.setattr(archives, "ARCHIVES", pinned(contents))
    (tmp_path / "source").mkdir()
    for archive, content in zip(ARCHIVES, contents):
        (tmp_path / "source" / archive.name).write_bytes(content)
    monkeypatch.setattr(
        archives, "_address", lambda archive: (tmp_path / "source" / archive.name).as_uri()
    )
    return tmp_path / "source"


def test_what_is_missing_or_altered_is_fetched(cache, source):
    fetch_archives()
    paths = [archive.path for archive in ARCHIVES]
    content = paths[1].read_bytes()
    assert [path.read_bytes() for path in paths] == [
        (source / path.name).read_bytes() for path in paths
    ]
    for altered in (content[:-1], content[:-1] + b"x", content + b"x", b""):
        paths[1].write_bytes(altered)
        fetch_archives()
        assert paths[1].read_bytes() == content
    for path in source.iterdir():
        path.unlink()
    fetch_archives()  # nothing is missing, so nothing is fetched
    assert kept(cache) == sorted(path.name for path in paths)


def test_control_c_leaves_nothing(cache, source, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(archives.tqdm, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch_archives()
    assert kept(cache) == []


@pytest.mark.parametrize("fault", ["endless", "cut", "silent", "no answer", "not found"])
def test_a_server_can_neither_fill_the_disk_nor_hang_the_command(
    cache, source, monkeypatch, serve, fault
):
    sent = []

    class Faulty(Handler):
        def do_GET(self):
            if fault == "no answer":
                return
            self.send_response(404 if fault == "not found" else 200)
            if fault in ("cut", "silent"):
                self.send_header("Content-Length", "100000")
            self.end_headers()
            while fault == "endless" and len(sent) < 1000:
                sent.append(self.wfile.write(bytes(1 << 16)))
            if fault == "silent":
                done.wait(10)

    done = threading.Event()
    address = serve(Faulty)
    monkeypatch.setattr(archives, "_address", lambda archive: f"{address}/{archive.name}")
    monkeypatch.setattr(archives, "MAX_SILENCE", 0.3)
    with pytest.raises(OSError, match=rf"^could not fetch {ARCHIVES[0].name}: .+") as caught:
        fetch_archives()
    done.set()
    assert kept(cache) == [] and "\n" not in str(caught.value)
    assert len(sent) < 1000  # 64 MB
