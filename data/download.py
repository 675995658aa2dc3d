"""
Fetches one file over HTTP so that an interrupted download goes on where it stopped.

What has come stands in NAME.part, and the version of the file that it is a part of (the server's
ETag) in NAME.etag; NAME itself is the whole file or not there. Does not unpack, retry by itself,
or fetch anything in parallel; where a server does not say how long a file is, only a sha256 tells
that it has come whole.
"""
import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

from data.text import DataError

TIMEOUT = 60        # seconds without a byte before the server is given up
CHUNK = 2 ** 18     # bytes read at once


def download(url, path, sha256='', instead=''):
    """
    Fetch `url` to `path`, with progress on stderr; `sha256`, if given, is the file's, in hex.

    Raises DataError if the file is not there, whole, in the end; `instead` says in it how to do
    without. What has come is kept for the next call, unless it is not the file that was asked for.
    """
    path = Path(path)
    part, etag = [path.with_name(f'{path.name}.{end}') for end in ('part', 'etag')]
    try:
        fetch(url, part, etag, trusted=bool(sha256))
        if sha256 and (found := sha256_of(part)) != sha256:
            part.unlink()
            raise OSError(f'its sha256 is {found}, not {sha256}: it was deleted')
        os.replace(part, path)
        etag.unlink(missing_ok=True)
    except (OSError, ValueError, http.client.HTTPException) as error:
        held = part.stat().st_size if part.exists() else 0
        if not held:
            part.unlink(missing_ok=True)
            etag.unlink(missing_ok=True)
        again = f'; the next call goes on from the {held >> 10} KB in {part}' if held else ''
        raise DataError(f'could not download {url}: {str(error) or type(error).__name__}{again}'
                        + (f', {instead}' if instead else '')) from error


def fetch(url, part, etag, trusted):
    """
    Bring `part` up to the whole of `url`; raises OSError if the bytes end before that.

    Goes on from what `part` holds only if that is a piece of the same file: the server says so
    (If-Range), or, where it names no version, a sha256 will (`trusted`). Otherwise starts over.
    """
    held = part.stat().st_size if part.exists() else 0
    version = etag.read_text(encoding='utf-8') if etag.exists() else ''
    with ask(url, held if version or trusted else 0, version) as answer:
        # 206: the rest comes. 200, or a file:// without a status: the whole comes, from its start
        held = held if answer.status == 206 else 0
        if held and version and answer.headers.get('ETag', version) != version:
            part.unlink()
            raise OSError('the file there has changed since; the part was deleted')
        if held and not answer.headers.get('Content-Range', '').startswith(f'bytes {held}-'):
            part.unlink()
            raise OSError(f'the server answered bytes {held}- with others; the part was deleted')
        size = held + int(answer.headers.get('Content-Length') or -held)    # 0: not said
        if not held:
            part.unlink(missing_ok=True)        # before its version goes: they must never be mixed
            version = answer.headers.get('ETag') or ''
            # A weak one ("about the same file") does not vouch for bytes
            etag.write_text('' if version.startswith('W/') else version, encoding='utf-8')
        with open(part, 'ab' if held else 'wb') as file:
            copy(answer, file, held, size)


def copy(answer, file, held, size):
    """The bytes of an answer into a file that holds some already, up to `size` if it is not 0."""
    try:
        while chunk := answer.read(CHUNK):
            file.write(chunk)
            held += len(chunk)
            print(f'\rdownload {held >> 10} / {size >> 10} KB', end='', file=sys.stderr)
    finally:
        print(file=sys.stderr)                  # what is said next starts a line
    if size and held != size:
        raise OSError(f'it ended after {held} of {size} bytes')


def ask(url, held, version):
    """The server's answer: the bytes from `held` on, or all of them where it will not do that."""
    headers = {'Range': f'bytes={held}-'} if held else {}
    if held and version:
        headers['If-Range'] = version           # another version now: answered with 200, the whole
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers),
                                      timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not held:       # 416: the file there has no byte number `held`
            raise
        return urllib.request.urlopen(url, timeout=TIMEOUT)


def sha256_of(path):
    """The sha256 of a file, in hex."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
