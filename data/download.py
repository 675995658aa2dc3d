"""
Downloads a file; an interrupted download continues where it stopped.

NAME.part holds the bytes received so far, NAME.etag the server's name for their version (ETag), and
NAME is the whole file or not there. It does not retry by itself, and continues only if the server
names versions. If it does not say how long a file is, only a sha256 shows that all is received.
"""
import hashlib, http.client, os, sys, urllib.error, urllib.request
from pathlib import Path

from data.text import DataError


def download(url, path, sha256='', instead=''):
    """
    Downloads `url` to `path`, checks its `sha256` (in hex) if one is given, and shows progress.

    Raises DataError if that fails; `instead` tells the user how to do without the download.
    """
    path = Path(path)
    part, etag = [path.with_name(f'{path.name}.{end}') for end in ('part', 'etag')]
    try:
        fetch(url, part, etag)
        if sha256 and (found := sha256_of(part)) != sha256:
            raise ValueError(f'its sha256 is {found}, not {sha256}: it was deleted')
        os.replace(part, path)
        etag.unlink(missing_ok=True)
    except (OSError, ValueError, http.client.HTTPException) as error:
        # The bytes received are not part of this file; 416: the server has none after ours
        if isinstance(error, ValueError) or getattr(error, 'code', 0) == 416:
            part.unlink(missing_ok=True)
            etag.unlink(missing_ok=True)
        raise DataError(f'could not download {url}: {str(error) or type(error).__name__}'
                        + (f', {instead}' if instead else '')) from error


def fetch(url, part, etag):
    """Adds to `part` until it holds all of `url`; raises OSError if the bytes end before that."""
    version = etag.read_text() if etag.exists() else ''
    held = part.stat().st_size if version and part.exists() else 0
    headers = {'Range': f'bytes={held}-', 'If-Range': version} if held else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
        theirs = answer.headers.get('ETag', '')
        if answer.status != 206:            # the file from its start: it is new, or has changed
            held = 0
            part.unlink(missing_ok=True)    # before the new version is noted: they must not mix
            # A weak one (W/) only says "about the same file"
            etag.write_text('' if theirs.startswith('W/') else theirs)
        elif theirs != version or f'bytes {held}-' not in answer.headers.get('Content-Range', ''):
            raise ValueError('the server sent bytes of another file or place; call again')
        size = held + int(answer.headers.get('Content-Length') or -held)        # 0: not said
        with open(part, 'ab') as file:
            try:
                while chunk := answer.read(2 ** 18):
                    held += file.write(chunk)
                    print(f'\rdownload {held >> 10} / {size >> 10} KB', end='', file=sys.stderr)
            finally:
                print(file=sys.stderr)      # what is printed next starts a line
    if size and held != size:
        raise OSError(f'it ended after {held} of {size} bytes; call again to go on')


def sha256_of(path):
    """Returns the sha256 of a file, in hex."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
