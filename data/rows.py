"""
What the prepare.py files share: a fixed order, writing rows, and saying what was counted.

Does not read a source or know a data set: what is kept, cut or dropped, each prepare.py decides.
"""
import hashlib
import json
import os

from data.text import DataError


def shuffle(items, text=str):
    """A fixed shuffle: the order of the sha256 of text(item), whatever order they come in."""
    return sorted(items, key=lambda item: hashlib.sha256(text(item).encode()).digest())


def write_rows(path, rows):
    """
    JSON Lines, UTF-8, there whole or not at all. Raises DataError instead of leaving an empty file
    for a later stage.
    """
    if not rows:
        raise DataError(f'{path}: no rows left: there is too little text for it')
    lines = [json.dumps(row, ensure_ascii=False) + '\n' for row in rows]
    temporary = path.with_name(f'{path.name}.tmp')
    temporary.write_bytes(''.join(lines).encode())
    os.replace(temporary, path)


def counted(counter):
    """Counter -> '3 repeated, 1 empty', or 'none'."""
    return ', '.join(f'{n} {reason}' for reason, n in counter.most_common() if n) or 'none'


def spread(lengths):
    """Lengths -> 'mean 30.1, median 28, 90% up to 51, 99% up to 64, the longest 80'."""
    ordered = sorted(lengths)
    half, most, nearly_all = [ordered[int(share * (len(ordered) - 1))]
                              for share in (0.5, 0.9, 0.99)]
    return (f'mean {sum(ordered) / len(ordered):.1f}, median {half}, 90% up to {most}, '
            f'99% up to {nearly_all}, the longest {ordered[-1]}')
