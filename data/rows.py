"""
Puts rows in a fixed order, writes files whole, and words what was counted: for the prepare.py's.

Does not read a source or know a data set: what is kept, cut or dropped, each prepare.py decides.
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
    """Writes a dict NAME -> rows as NAME.jsonl into a folder; prints and returns the counts."""
    for name, listed in rows.items():
        write_rows(out / f'{name}.jsonl', listed)
        print(f'{out / name}.jsonl: {len(listed)} rows')
    return {name: len(listed) for name, listed in rows.items()}


def counted(counter):
    """Returns '3 repeated, 1 empty' of a Counter, or 'none'."""
    return ', '.join(f'{n} {reason}' for reason, n in counter.most_common() if n) or 'none'


def spread(lengths):
    """Returns 'mean 30.1, median 28, 90% up to 51, 99% up to 64, the longest 80' of lengths."""
    ordered = sorted(lengths)
    half, most, nearly_all = [ordered[int(share * (len(ordered) - 1))]
                              for share in (0.5, 0.9, 0.99)]
    return (f'mean {sum(ordered) / len(ordered):.1f}, median {half}, 90% up to {most}, '
            f'99% up to {nearly_all}, the longest {ordered[-1]}')
