"""
The tables of the studies: CSV files in which every seed has its rows.

A study adds a seed's rows when the seed is done, so an interrupted study goes on with the seeds
that are missing, and whoever doubts a mean finds the rows it was taken over.
What it does not do: draw. Each study plots what it has found, and save_picture keeps it.
"""
import csv
import importlib.util
import io
import os
import statistics
from pathlib import Path

from prefgpt import UserError


def parse_seeds(text):
    """'5 6,7' -> [5, 6, 7]; UserError if there is none, or a word that is no whole number."""
    words = text.replace(',', ' ').split()
    if not words or not all(word.isdigit() for word in words):
        raise UserError(f'--seeds={text!r}: whole numbers with spaces between them')
    return [int(word) for word in words]


def number_or_text(cell):
    """'0.5' -> 0.5, '3' -> 3, 'ppo' -> 'ppo'; '' stays '' (a number that the row does not have)."""
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell


def read_rows(path):
    """The rows of a table as dicts; none if there is no such file yet."""
    if not Path(path).exists():
        return []
    with open(path, encoding='utf-8', newline='') as file:
        return [{key: number_or_text(cell) for key, cell in row.items()}
                for row in csv.DictReader(file)]


def append_rows(path, rows):
    """
    Adds rows, dicts with the same keys, to the end of a table, which is made if it is not there.

    The file is written anew and renamed: it always holds whole seeds. Raises UserError if it has
    other columns: then it is from another version of the study, and must not be mixed with it.
    """
    path, new = Path(path), io.StringIO()
    writer = csv.DictWriter(new, list(rows[0]), lineterminator='\n')
    if not path.exists():
        writer.writeheader()
    elif path.read_text(encoding='utf-8').split('\n')[0] != ','.join(rows[0]):
        raise UserError(f'{path} has other columns than this version of the study: move it away')
    writer.writerows({key: f'{value:.4f}' if isinstance(value, float) else value
                      for key, value in row.items()} for row in rows)
    old = path.read_text(encoding='utf-8') if path.exists() else ''
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(old + new.getvalue(), encoding='utf-8')
    os.replace(temporary, path)


def select(rows, **cells):
    """The rows that hold these cells: select(rows, stage='ppo', seed=5)."""
    return [row for row in rows if all(row[key] == cell for key, cell in cells.items())]


def complete(path, seeds, run_seed, **cells):
    """
    Adds run_seed(seed), a list of rows, for every seed of which the table has no row with these
    cells, one seed after the other; returns its rows of all these seeds, with these cells.
    """
    for seed in seeds:
        if not select(read_rows(path), seed=seed, **cells):
            append_rows(path, run_seed(seed))
    return [row for row in select(read_rows(path), **cells) if row['seed'] in seeds]


def mean_and_spread(rows, by, column):
    """Values of by, in the order they come, and column's means and standard deviations there."""
    groups = {}
    for row in rows:
        groups.setdefault(row[by], []).append(row[column])
    return ([*groups], [statistics.fmean(group) for group in groups.values()],
            [statistics.stdev(group) if len(group) > 1 else 0.0 for group in groups.values()])


def show_means(rows, by, columns):
    """
    Prints mean and standard deviation over seeds of the columns, a line for every value of by.

    by and columns are tuples of keys; the groups come in the order in which they first appear.
    """
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row)
    width = max(len(' '.join(map(str, group))) for group in groups)
    print(f"\n{'mean and standard deviation over seeds':<{width}}")
    print(' ' * width + ''.join(f'{column:>16}' for column in columns))
    for group, members in groups.items():
        print(f"{' '.join(map(str, group)):<{width}}", end='')
        for column in columns:
            values = [row[column] for row in members]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f'{statistics.mean(values):9.3f} ±{spread:.3f}', end='')
        print()


def show_claims(claims, runs):
    """
    Prints of every claim in how many seeds it holds; returns {claim: [seeds in which it fails]}.

    claims is {claim: holds(run)}, runs {seed: run}, a run being whatever the claims read.
    """
    failed = {claim: [seed for seed, run in runs.items() if not holds(run)]
              for claim, holds in claims.items()}
    print()
    for claim, seeds in failed.items():
        print(f'{claim}: holds in {len(runs) - len(seeds)} of {len(runs)} seeds'
              + (f', not {seeds}' if seeds else ''))
    return failed


def save_picture(draw, path):
    """
    Writes draw(), a matplotlib Figure, to the PNG file path, whole or not at all.

    Without matplotlib, which no study needs for its numbers, it says so instead.
    """
    if importlib.util.find_spec('matplotlib') is None:
        print(f'{path} is drawn with matplotlib, which is not installed')
        return
    draw().savefig(f'{path}.tmp', format='png')
    os.replace(f'{path}.tmp', path)
    print(f'wrote {path}')
