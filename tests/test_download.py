"""
data/download.py: resuming, servers that do not resume, files that change, what failure leaves.

    python -m pytest -q tests/test_download.py

The server is http.server on 127.0.0.1, in a thread; no test needs a network.
"""
import hashlib
import http.server
import os
import threading

import pytest

from data import download as module
from data.download import download
from data.text import DataError

BODY = bytes(i * i % 251 for i in range(100_000))
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.body by the server's settings; server.asked holds the headers of requests."""

    def do_GET(self):
        server, total = self.server, len(self.server.body)
        server.asked.append(dict(self.headers))
        held = self.headers.get('Range', '') if server.ranges else ''
        if self.headers.get('If-Range', server.etag) != server.etag:
            held = ''
        start = int(held.removeprefix('bytes=').removesuffix('-')) if held else 0
        if self.path != '/file' or held and start >= total:
            self.send_error(404 if self.path != '/file' else 416)
            return
        self.send_response(206 if held else 200)
        if held:
            begin = start + server.shift
            self.send_header('Content-Range', f'bytes {begin}-{total - 1}/{total}')
        if server.etag:
            self.send_header('ETag', server.etag)
        if server.says_length:
            self.send_header('Content-Length', str(total - start))
        self.end_headers()
        self.wfile.write(server.body[start:start + server.sends])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """A server of BODY that knows ranges; a test changes its settings."""
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.body, server.etag, server.ranges, server.says_length = BODY, '"one"', True, True
    server.sends, server.shift, server.asked = len(BODY), 0, []     # bytes before it hangs up
    server.url = f'http://127.0.0.1:{server.server_port}/file'
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def interrupted(server, path, sends=30_000, sha256=''):
    """A first call during which the server hangs up; then the server is well again."""
    server.sends = sends
    with pytest.raises(DataError) as caught:
        download(server.url, path, sha256)
    server.sends = len(BODY)
    server.asked.clear()
    return str(caught.value)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_fetched_whole(server, tmp_path, capsys):
    """Catches leftovers beside the file, and a progress line that never says it is done."""
    download(server.url, tmp_path / 'file', SHA256)
    assert (tmp_path / 'file').read_bytes() == BODY
    assert names(tmp_path) == ['file']
    assert 'download 97 / 97 KB\n' in capsys.readouterr().err
    assert 'Range' not in server.asked[0]


def test_file_urls(tmp_path):
    """Catches a reader of HTTP's status or headers where file:// has none."""
    (tmp_path / 'there').write_bytes(BODY)
    download((tmp_path / 'there').as_uri(), tmp_path / 'file', SHA256)
    assert (tmp_path / 'file').read_bytes() == BODY


@pytest.mark.parametrize('sha256', ['', SHA256])
def test_the_next_call_goes_on_where_it_stopped(server, tmp_path, sha256):
    """Catches a short body taken for the whole, and a second call that starts over."""
    message = interrupted(server, tmp_path / 'file', sha256=sha256)
    assert 'it ended after 30000 of 100000 bytes; the next call goes on from the 29 KB' in message
    assert names(tmp_path) == ['file.etag', 'file.part']
    interrupted(server, tmp_path / 'file', sends=20_000, sha256=sha256)
    assert (tmp_path / 'file.part').read_bytes() == BODY[:50_000]
    download(server.url, tmp_path / 'file', sha256)
    assert [asked.get('Range') for asked in server.asked] == ['bytes=50000-']
    assert (tmp_path / 'file').read_bytes() == BODY and names(tmp_path) == ['file']


def test_a_server_without_ranges_starts_over(server, tmp_path):
    """Catches a whole body appended to the part of it that was there."""
    interrupted(server, tmp_path / 'file')
    server.ranges = False
    download(server.url, tmp_path / 'file')
    assert server.asked[0]['Range'] == 'bytes=30000-'
    assert (tmp_path / 'file').read_bytes() == BODY


@pytest.mark.parametrize('sha256', ['', SHA256])
def test_a_file_that_has_changed_starts_over(server, tmp_path, sha256):
    """Catches a file of two halves: the start of the old version, the end of the new one."""
    interrupted(server, tmp_path / 'file')
    server.body, server.etag = BODY[::-1], '"two"'
    sha256 = sha256 and hashlib.sha256(server.body).hexdigest()
    download(server.url, tmp_path / 'file', sha256)
    assert (tmp_path / 'file').read_bytes() == BODY[::-1]


def test_a_server_that_ignores_if_range_is_caught_by_its_version(server, tmp_path, monkeypatch):
    """A 206 of another version is not glued to the old part: the part goes, the next call is whole.
    Catches trusting that whoever knows Range knows If-Range."""
    interrupted(server, tmp_path / 'file')
    real = module.ask
    monkeypatch.setattr(module, 'ask', lambda url, held, version: real(url, held, ''))
    server.body, server.etag = BODY[::-1], '"two"'
    with pytest.raises(DataError, match='has changed since'):
        download(server.url, tmp_path / 'file')
    download(server.url, tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == BODY[::-1]


def test_a_new_version_is_noted_only_when_the_old_part_is_gone(server, tmp_path, monkeypatch):
    """Interrupted while it notes the new version, a download must not go on from the old bytes."""
    interrupted(server, tmp_path / 'file')
    server.body, server.etag = BODY[::-1], '"two"'

    def stop(*arguments):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(module, 'copy', stop)
        with pytest.raises(KeyboardInterrupt):
            download(server.url, tmp_path / 'file')
    download(server.url, tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == BODY[::-1]


@pytest.mark.parametrize('etag', ['', 'W/"one"'])
def test_without_a_version_only_a_sha256_allows_to_go_on(server, tmp_path, etag):
    """Catches bytes joined on trust: nothing would say that they are of one file."""
    server.etag = etag
    interrupted(server, tmp_path / 'file')
    download(server.url, tmp_path / 'file')
    assert 'Range' not in server.asked[0]
    interrupted(server, tmp_path / 'other', sha256=SHA256)
    download(server.url, tmp_path / 'other', SHA256)
    assert server.asked[0]['Range'] == 'bytes=30000-' and 'If-Range' not in server.asked[0]
    assert (tmp_path / 'other').read_bytes() == (tmp_path / 'file').read_bytes() == BODY


def test_a_part_that_is_already_whole(server, tmp_path, monkeypatch):
    """Catches a call that can never succeed: the server has no byte after the last (416)."""
    def refuse(source, target):
        raise OSError('disk trouble')
    with monkeypatch.context() as patch:
        patch.setattr(module.os, 'replace', refuse)
        with pytest.raises(DataError, match='disk trouble; the next call goes on'):
            download(server.url, tmp_path / 'file')
    assert os.path.getsize(tmp_path / 'file.part') == len(BODY)
    download(server.url, tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == BODY and names(tmp_path) == ['file']


def test_other_bytes_than_those_asked_for(server, tmp_path):
    """Catches an answer that is appended in the wrong place."""
    interrupted(server, tmp_path / 'file')
    server.shift = 7
    with pytest.raises(DataError, match='answered bytes 30000- with others'):
        download(server.url, tmp_path / 'file')
    assert names(tmp_path) == []


def test_a_wrong_sha256_leaves_nothing(server, tmp_path):
    """Catches a wrong file that is kept, or a part of it from which every call would go on."""
    with pytest.raises(DataError, match=f'sha256 is {SHA256}, not 00: it was deleted, or use'):
        download(server.url, tmp_path / 'file', '00', 'or use --from')
    assert names(tmp_path) == []
    interrupted(server, tmp_path / 'file', sha256=SHA256)
    server.body, server.etag = bytes(100_000), '"one"'      # other bytes under the old version
    with pytest.raises(DataError, match='it was deleted'):
        download(server.url, tmp_path / 'file', SHA256)
    assert names(tmp_path) == []


def test_a_server_that_does_not_say_the_length(server, tmp_path):
    """Catches a size of 0, or of the part alone, that is compared with what came."""
    interrupted(server, tmp_path / 'part')
    server.says_length = False
    for name in ('file', 'part'):
        download(server.url, tmp_path / name)
        assert (tmp_path / name).read_bytes() == BODY


def test_errors_are_one_line_that_says_how_to_do_without(server, tmp_path):
    """Catches a traceback, and an empty .part that promises to go on from nothing."""
    for url in (server.url + 's', 'http://127.0.0.1:9/file', 'nonsense', 'file:///no/such/file'):
        with pytest.raises(DataError) as caught:
            download(url, tmp_path / 'file', instead='or use --from=FOLDER')
        message = str(caught.value)
        assert message.startswith(f'could not download {url}: ')
        assert message.endswith(', or use --from=FOLDER') and '\n' not in message
        assert 'next call' not in message and names(tmp_path) == []
