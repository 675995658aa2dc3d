"""
data/download.py: what resumes, what must not, and what a failure leaves.

    python -m pytest -q tests/data/test_download.py

The server is http.server on 127.0.0.1, in a thread; no test needs a network.
"""
import hashlib
import http.server
import threading

import pytest

from data.download import download
from data.text import DataError

BODY = bytes(i * i % 251 for i in range(100_000))
OTHER = BODY[::-1]
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.body by the server's settings; server.asked holds the headers of requests."""

    def do_GET(self):
        server, total = self.server, len(self.server.body)
        server.asked.append(dict(self.headers))
        held = self.headers.get('Range', '') if server.ranges else ''
        if server.knows_if_range and self.headers.get('If-Range', server.etag) != server.etag:
            held = ''
        start = int(held.removeprefix('bytes=').removesuffix('-')) if held else 0
        if self.path != '/file' or held and start >= total:
            self.send_error(404 if self.path != '/file' else 416)
            return
        self.send_response(206 if held else 200)
        if held:
            start += server.shift
            self.send_header('Content-Range', f'bytes {start}-{total - 1}/{total}')
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
    server.body, server.etag, server.ranges, server.knows_if_range = BODY, '"one"', True, True
    server.sends, server.shift, server.says_length = len(BODY), 0, True     # sends, then hangs up
    server.asked, server.url = [], f'http://127.0.0.1:{server.server_port}/file'
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def interrupted(server, path, sends=30_000):
    """Makes a first call during which the server hangs up; then the server is well again."""
    server.sends = sends
    with pytest.raises(DataError, match='it ended after .* of 100000 bytes; call again to go on'):
        download(server.url, path)
    server.sends = len(BODY)
    server.asked.clear()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize('sha256', ['', SHA256])
def test_the_next_call_goes_on_where_it_stopped(server, tmp_path, sha256, capsys):
    """Catches a short body taken for the whole, a call that starts over, and leftovers."""
    interrupted(server, tmp_path / 'file')
    assert names(tmp_path) == ['file.etag', 'file.part']
    interrupted(server, tmp_path / 'file', sends=20_000)
    assert (tmp_path / 'file.part').read_bytes() == BODY[:50_000]
    download(server.url, tmp_path / 'file', sha256)
    assert [asked.get('Range') for asked in server.asked] == ['bytes=50000-']
    assert (tmp_path / 'file').read_bytes() == BODY and names(tmp_path) == ['file']
    assert 'download 97 / 97 KB\n' in capsys.readouterr().err


@pytest.mark.parametrize('settings', [
    dict(body=OTHER, etag='"two"'),                         # the file has changed
    dict(body=OTHER, etag='"two"', knows_if_range=False),   # and its end is sent all the same
    dict(shift=7),                                          # bytes of another place
    dict(ranges=False),                                     # the whole is sent, whatever is asked
    dict(says_length=False)])
def test_two_halves_are_never_glued_together(server, tmp_path, settings, capsys):
    """Catches the end of a new version, or of another place, after the start of the old one."""
    interrupted(server, tmp_path / 'file')
    vars(server).update(settings)
    try:
        download(server.url, tmp_path / 'file')
    except DataError as error:
        assert 'the server sent bytes of another file or place; call again' in str(error)
        assert names(tmp_path) == []                        # nothing to go on from
        server.shift = 0
        download(server.url, tmp_path / 'file')
    assert server.asked[0]['Range'] == 'bytes=30000-'
    assert (tmp_path / 'file').read_bytes() == server.body and names(tmp_path) == ['file']
    assert 'download 97 / ' in capsys.readouterr().err


@pytest.mark.parametrize('etag', ['', 'W/"one"'])
def test_without_a_version_it_starts_over(server, tmp_path, etag):
    """Catches bytes joined on trust: nothing would say that they are of one file."""
    server.etag = etag
    interrupted(server, tmp_path / 'file')
    download(server.url, tmp_path / 'file')
    assert 'Range' not in server.asked[0] and (tmp_path / 'file').read_bytes() == BODY


def test_a_new_version_is_noted_only_when_the_old_part_is_gone(server, tmp_path, monkeypatch):
    """Killed while it notes the new version, a download must not go on from the old bytes."""
    interrupted(server, tmp_path / 'file')
    server.body, server.etag = OTHER, '"two"'

    def stop(self, text):
        self.write_bytes(text.encode())
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr('pathlib.Path.write_text', stop)
        with pytest.raises(KeyboardInterrupt):
            download(server.url, tmp_path / 'file')
    download(server.url, tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == OTHER


def test_a_part_that_is_already_whole(server, tmp_path, monkeypatch):
    """Catches a call that can never succeed: the server has no byte after the last (416)."""
    def refuse(source, target):
        raise OSError('disk trouble')
    with monkeypatch.context() as patch:
        patch.setattr('os.replace', refuse)
        with pytest.raises(DataError, match='disk trouble'):
            download(server.url, tmp_path / 'file')
    with pytest.raises(DataError, match='416'):
        download(server.url, tmp_path / 'file')
    download(server.url, tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == BODY and names(tmp_path) == ['file']


def test_a_wrong_sha256_leaves_nothing(server, tmp_path):
    """Catches a wrong file that is kept, or a part of it from which every call would go on."""
    with pytest.raises(DataError, match=f'sha256 is {SHA256}, not 00: it was deleted, or use'):
        download(server.url, tmp_path / 'file', '00', 'or use --from')
    assert names(tmp_path) == []
    interrupted(server, tmp_path / 'file')
    server.body = bytes(100_000)                            # other bytes under the old version
    with pytest.raises(DataError, match='it was deleted'):
        download(server.url, tmp_path / 'file', SHA256)
    assert names(tmp_path) == []


def test_errors_are_one_line_that_says_how_to_do_without(server, tmp_path):
    """Catches a traceback, and an empty file left by a server that was never reached."""
    for url in (server.url + 's', 'http://127.0.0.1:9/file', 'nonsense', 'file:///no/such/file'):
        with pytest.raises(DataError) as caught:
            download(url, tmp_path / 'file', instead='or use --from=FOLDER')
        message = str(caught.value)
        assert message.startswith(f'could not download {url}: ') and '\n' not in message
        assert message.endswith(', or use --from=FOLDER') and names(tmp_path) == []
