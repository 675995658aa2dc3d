"""
Puts rows in a fixed order, writes files whole, and formats counts, for every prepare.py.

It knows no data set: each prepare.py decides what is read, kept, cut or dropped.
"""
import hashlib, json, os
from pathlib import Path

from data.text import DataError


def shuffle(items, text=str):
    """Returns items in the order of the sha256 of text(item), whatever order they come in."""
    return sorted(items, key=lambda item: hashlib.sha256(text(item).encode()).digest())


def write_text(path, text):
    """Writes a UTF-8 file that is there whole or not at all."""
    temporary = Path(f'{path}.tmp')
    temporary.write_bytes(text.encode())
    os.replace(temporary, path)


def write_rows(path, rows):
    """Writes JSON Lines. Raises DataError instead of leaving an empty file for a later stage."""
    if not rows:
        raise DataError(f'{path}: no rows left: there is too little text for it')
    write_text(path, ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows))


def write_all(out, rows):
    """
    Writes a dict NAME -> rows as NAME.jsonl into a folder; returns the counts.

    Prints them, and each first row: as a dict, which escapes control characters of foreign text.
    """
    for name, listed in rows.items():
        write_rows(out / f'{name}.jsonl', listed)
        print(f'{out / name}.jsonl: {len(listed)} rows; the first: {listed[0]}')
    return {name: len(listed) for name, listed in rows.items()}


def counted(counter):
    """Returns '3 repeated, 1 empty' of a Counter, or 'none'."""
    return ', '.join(f'{n} {reason}' for reason, n in counter.most_common() if n) or 'none'
