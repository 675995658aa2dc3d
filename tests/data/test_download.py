"""
data/download.py, from a server on 127.0.0.1: what resumes, and what a failure leaves.
"""
import hashlib, http.server, threading

import pytest

from data.download import download
from data.text import DataError

BODY = bytes(i * i % 251 for i in range(100_000))
OTHER = BODY[::-1]
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.body by the server's settings; server.asked holds the ranges asked for."""

    def do_GET(self):
        server, total = self.server, len(self.server.body)
        held = self.headers.get('Range', '')
        server.asked.append(held)
        changed = self.headers.get('If-Range', server.etag) != server.etag
        if not server.ranges or server.knows_if_range and changed:
            held = ''
        start = int(held.removeprefix('bytes=').removesuffix('-') or 0)
        if self.path != '/file' or held and start >= total:
            self.send_error(416 if held else 404)
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


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'file'


def interrupted(server, path, sends=30_000):
    """Makes a first call during which the server hangs up; then the server is well again."""
    server.sends = sends
    with pytest.raises(DataError, match='it ended after .* of 100000 bytes; call again to go on'):
        download(server.url, path)
    server.sends = len(BODY)
    server.asked.clear()


def left(path):
    return sorted(other.name for other in path.parent.iterdir())


@pytest.mark.parametrize('etag, sha256', [('"one"', ''), ('"one"', SHA256), ('', ''),
                                          ('W/"one"', '')])
def test_the_next_call_goes_on_where_it_stopped(server, path, etag, sha256, capsys):
    """Catches a short body taken for the whole, a call that starts over, and leftovers. Without a
    (strong) version nothing would say that the bytes are of one file, so it does start over."""
    server.etag = etag
    interrupted(server, path)
    assert left(path) == ['file.etag', 'file.part']
    interrupted(server, path, sends=20_000)
    goes_on = etag == '"one"'
    assert path.with_name('file.part').read_bytes() == BODY[:50_000 if goes_on else 20_000]
    download(server.url, path, sha256)
    assert server.asked == ['bytes=50000-' if goes_on else '']
    assert path.read_bytes() == BODY and left(path) == ['file']
    assert 'download 97 / 97 KB\n' in capsys.readouterr().err


@pytest.mark.parametrize('settings', [
    dict(body=OTHER, etag='"two"'),                         # the file has changed
    dict(body=OTHER, etag='"two"', knows_if_range=False),   # and its end is sent all the same
    dict(shift=7),                                          # bytes of another place
    dict(ranges=False),                                     # the whole is sent, whatever is asked
    dict(says_length=False)])
def test_two_halves_are_never_glued_together(server, path, settings):
    """Catches the end of a new version, or of another place, after the start of the old one."""
    interrupted(server, path)
    vars(server).update(settings)
    try:
        download(server.url, path)
    except DataError as error:
        assert 'the server sent bytes of another file or place; call again' in str(error)
        assert left(path) == []                             # nothing to go on from
        server.shift = 0
        download(server.url, path)
    assert server.asked[0] == 'bytes=30000-'
    assert path.read_bytes() == server.body and left(path) == ['file']


def test_a_new_version_is_noted_only_when_the_old_part_is_gone(server, path, monkeypatch):
    """Killed while it notes the new version, a download must not go on from the old bytes."""
    interrupted(server, path)
    server.body, server.etag = OTHER, '"two"'

    def stop(self, text):
        self.write_bytes(text.encode())
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr('pathlib.Path.write_text', stop)
        with pytest.raises(KeyboardInterrupt):
            download(server.url, path)
    download(server.url, path)
    assert path.read_bytes() == OTHER


def test_a_part_that_is_already_whole(server, path):
    """Catches a call that can never succeed: the server has no byte after the last (416)."""
    path.with_name('file.part').write_bytes(BODY)
    path.with_name('file.etag').write_text('"one"')
    with pytest.raises(DataError, match='416'):
        download(server.url, path)
    download(server.url, path)
    assert path.read_bytes() == BODY and left(path) == ['file']


def test_a_wrong_sha256_leaves_nothing(server, path):
    """Catches a wrong file that is kept, or a part of it from which every call would go on."""
    interrupted(server, path)
    server.body = bytes(100_000)                            # other bytes under the old version
    with pytest.raises(DataError, match=f'not {SHA256}: it was deleted, or use --from'):
        download(server.url, path, SHA256, 'or use --from')
    assert left(path) == []


def test_errors_are_one_line_that_says_how_to_do_without(server, path):
    """Catches a traceback, and an empty file left by a server that was never reached."""
    for url in (server.url + 's', 'http://127.0.0.1:9/file', 'nonsense', 'file:///no/such/file'):
        with pytest.raises(DataError, match=f'^could not download {url}: .+, or use --from$'):
            download(url, path, instead='or use --from')
        assert left(path) == []
