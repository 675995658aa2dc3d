"""
Reads, extends and prints the studies' tables: CSV files in which every seed has its rows.

A study adds a seed's rows to a table in out/studies/ or, with --results, to the committed one. It
does so as soon as the seed is done, so an interrupted study continues with the missing seeds.
"""
import csv, io, statistics
from pathlib import Path

from data.rows import write_text
from prefgpt import UserError

RESULTS, OWN = Path('studies/results'), Path('out/studies')
SMOKE_TEST = 'a smoke test: everything ran, too briefly to judge any claim'


def committed(path):
    """Returns the committed table that a table in out/studies/ adds to; of another path, itself."""
    return RESULTS / path.name if path.parent == OWN else path


def table_and_seeds(cfg):
    """Returns the table that a study adds to, and its seeds: with --quick only the first one."""
    path, words = Path(cfg.csv), cfg.seeds.replace(',', ' ').split()
    if not words or not all(word.isdigit() for word in words):
        raise UserError(f'--seeds={cfg.seeds!r}: whole numbers with spaces between them')
    if cfg.quick and cfg.results:
        raise UserError('--quick is a smoke test: its rows do not go into the committed table')
    seeds = [int(word) for word in words]
    if cfg.quick:
        return path.with_stem(path.stem + '-quick'), seeds[:1]
    return RESULTS / path.name if cfg.results else path, seeds


def number_or_text(cell):
    """Reads '3' as 3, '0.5' as 0.5 and 'ppo' as itself; '' is a number that the row lacks."""
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell


def read_rows(path):
    """Returns the rows of a table as dicts; none if there is no such file yet."""
    if not Path(path).exists():
        return []
    with open(path, encoding='utf-8', newline='') as file:
        return [{key: number_or_text(cell) for key, cell in row.items()}
                for row in csv.DictReader(file)]


def append_rows(path, rows):
    """
    Adds rows, dicts with the same keys, to the end of a table, which always holds whole seeds.
    Raises UserError if it, or the committed table, is of another version: has other columns.
    """
    path, new = Path(path), io.StringIO()
    old = path.read_text('utf-8') if path.exists() else ''
    for table in (committed(path), path):
        if table.exists() and table.read_text('utf-8').split('\n')[0] != ','.join(rows[0]):
            raise UserError(f'{table} has other columns than this version of the study: move it')
    writer = csv.DictWriter(new, list(rows[0]), lineterminator='\n')
    if not old:
        writer.writeheader()
    writer.writerows({key: f'{value:.4f}' if isinstance(value, float) else value
                      for key, value in row.items()} for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, old + new.getvalue())


def select(rows, **cells):
    """Returns the rows that hold these cells: select(rows, stage='ppo', seed=5)."""
    return [row for row in rows if all(row[key] == cell for key, cell in cells.items())]


def complete(path, seeds, run_seed, **cells):
    """Returns these seeds' rows, with these cells; adds run_seed(seed) where there are none."""
    rows, known = [], read_rows(committed(path))
    for seed in seeds:
        found = select(known, seed=seed, **cells) or select(read_rows(path), seed=seed, **cells)
        if not found:
            append_rows(path, run_seed(seed))
            found = select(read_rows(path), seed=seed, **cells)
        rows += found
    return rows


def mean_and_spread(values):
    """Returns mean and standard deviation (n - 1; 0 of a single value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def grouped(rows, *by):
    """Returns {cells of these columns: rows}, in the order in which the groups first appear."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row)
    return groups


def spreads_by(rows, by, column):
    """Returns the values of by, and column's means and standard deviations there: three lists."""
    groups = grouped(rows, by)
    spreads = [mean_and_spread([row[column] for row in group]) for group in groups.values()]
    return [key for key, in groups], *map(list, zip(*spreads))


def by_seed(rows, *keys):
    """Returns {seed: {cells of these columns: row}}; of one column, the cell itself is the key."""
    return {seed: {key if keys[1:] else key[0]: row
                   for key, (row,) in grouped(select(rows, seed=seed), *keys).items()}
            for seed in sorted({row['seed'] for row in rows})}


def show_means(rows, by, columns):
    """Prints mean and standard deviation over seeds of the columns, a line per group of by."""
    groups = grouped(rows, *by)
    width = max(len(' '.join(map(str, group))) for group in groups)
    print(f"\n{'mean and standard deviation over seeds':<{width}}")
    print(' ' * width + ''.join(f'{column:>16}' for column in columns))
    for group, members in groups.items():
        spreads = [mean_and_spread([row[column] for row in members]) for column in columns]
        print(f"{' '.join(map(str, group)):<{width}}"
              + ''.join(f'{mean:9.3f} ±{spread:.3f}' for mean, spread in spreads))


def above(column, one, *others):
    """Returns the claim, about {arm: row}, that one arm's number is above that of all others."""
    return lambda arms: all(arms[one][column] > arms[other][column] for other in others)


def show_claims(claims, runs, quick=False):
    """Prints in how many seeds each claim holds; returns {claim: [seeds in which it fails]}."""
    failed = {claim: [seed for seed, run in runs.items() if not holds(run)]
              for claim, holds in claims.items()}
    print()
    if quick:                       # every claim was read, but none is judged
        print(SMOKE_TEST)
        return failed
    for claim, seeds in failed.items():
        print(f'{claim}: holds in {len(runs) - len(seeds)} of {len(runs)} seeds'
              + (f', not {seeds}' if seeds else ''))
    return failed
