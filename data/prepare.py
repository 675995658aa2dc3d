"""
Turns rows that people bring into a folder of canonical rows, which the scripts read: the gate.

It tells each row's shape (shapes.py), puts turns into the template, holds out a tenth of the
questions, takes or trains a tokenizer, and counts what was kept, dropped and not read. It reads
JSON Lines, JSON arrays and gzip of either. Left out: parquet, CSV, any shape not in shapes.py.

    python -m data.prepare alpaca.json pairs.jsonl --out=data/mine
    python -m data.prepare data/mine --look
"""
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from data.bpe import find_tokenizer, take_tokenizer, write_tokenizer
from data.look import show
from data.rows import convert, read_objects, stage_rows, write_rows, write_text
from data.shapes import CONTENT, read_shape
from data.text import RESPONSES, DataError
from data.turns import Odd, Unknown, choose_template, fit, split_rows
from prefgpt import UserError, printable, run_cli

DROPPED, UNREAD = 'dropped: ', 'cannot be read: '


@dataclass
class Config:
    files: tuple = ()           # the files to read, or with --look the folder to show
    out: str = ''               # the folder to write
    tokenizer: str = '4096'     # the size of a BPE to train, gpt2, a NAME.tiktoken or a run folder
    template: str = ''          # {} is the question's place; '': the run's, or told from the rows
    kind: str = ''              # write only sft, pairs or prompts; '': all that the rows give
    val: float = 0.1            # share of the questions to hold out
    limit: int = 0              # rows to read of each file; 0: all
    skip: bool = False          # drop rows that cannot be read, instead of stopping
    safe_rlhf: str = 'rule'     # Safe-RLHF chooses by the paper's rule, or better, or safer
    drop: str = ''              # of Safe-RLHF: dual-safe or dual-unsafe pairs; both with a comma
    look: bool = False          # show a folder that exists


def read_row(row, cfg, note):
    """Returns a row as its shape has it; note counts nulls and keys that were not read."""
    if isinstance(row, ValueError):             # its line is no JSON
        raise row
    nulls = [key for key, value in row.items() if value is None]
    try:
        out, unread = read_shape({key: value for key, value in row.items() if value is not None},
                                 cfg.kind, cfg.safe_rlhf, cfg.drop)
    except ValueError as error:
        missing = {*nulls} & {'prompt', 'completion', 'response', 'chosen', 'rejected', 'output',
                              'instruction', 'messages'}         # the null is what is wrong
        raise Odd(f"null for {' and '.join(sorted(missing))}") if missing else error
    for key in unread:
        note('row', f'whose key {key!r} was not read')
    for key in nulls:
        note('row', f'with null for {key!r}, read as absent')
    return out


def attempt(counts, where, raw, function, *arguments):
    """Returns a function's row, or None; counts what it notes and why it raises, with places."""
    notes = []
    try:
        row = function(*arguments, lambda *what: notes.append(what))
    except Odd as error:
        row, notes = None, [('row', f'{DROPPED}{error}')]
    except ValueError as error:
        advice = convert(raw, where, CONTENT) if isinstance(error, Unknown) else ''
        row, notes = None, [('row', f'{UNREAD}{error}{advice}')]
    for what in notes:
        counts[what].append(where)
    return row


def gather(cfg, saved):
    """Reads all files; returns canonical rows and the template. Prints what became of the rest."""
    counts, read = defaultdict(list), []                # (of what, what was done) -> places
    for path in cfg.files:
        for number, (where, raw) in enumerate(read_objects(path)):
            if cfg.limit and number >= cfg.limit:
                counts['row', f'beyond --limit={cfg.limit}, not read'].append(where)
            else:
                read.append((where, raw, attempt(counts, where, raw, read_row, raw, cfg)))
    template = choose_template(cfg.template, [row for *_, row in read if row], saved)
    kept = [attempt(counts, where, raw, fit, row, template) for where, raw, row in read if row]
    kept = [row for row in kept if row]
    seen = {(row['prompt'], row['chosen'], row['rejected']) for row in kept if 'chosen' in row}
    contradicted = sum((prompt, rejected, chosen) in seen for prompt, chosen, rejected in seen)
    counts['row', 'repeating another, kept'] = [''] * (len(kept) - len({*map(str, kept)}))
    counts['pair', 'contradicted by another, kept'] = [''] * contradicted
    print(f'{len(read)} rows, {len(kept)} kept; template {template!r}')
    for (of, done), places in counts.items():
        where = f" ({', '.join(places[:3])})" if done.startswith((DROPPED, UNREAD)) else ''
        if places:
            print(f"{len(places)} {of}{'s' * (len(places) > 1)} {printable(done)}{where}")
    bad = [key for key in counts if key[1].startswith(UNREAD)]
    if kept and (cfg.skip or not bad):
        return kept, template
    if not read:
        raise DataError(f'{cfg.files[0]}: no rows')
    first = (bad or [key for key in counts if key[1].startswith(DROPPED)])[0]
    raise DataError(f'{counts[first][0]}: {len(counts[first])} of {len(read)} rows'
                    + (' (--skip drops them) ' if kept else ' ') + first[1])


def check_flags(cfg):
    """Raises UserError if a flag cannot work."""
    drop, rules = {*filter(None, cfg.drop.split(','))}, ('rule', 'better', 'safer')
    if cfg.kind not in ('', *RESPONSES) or cfg.safe_rlhf not in rules or not 0 < cfg.val < 1 or (
            drop - {'dual-safe', 'dual-unsafe'} or cfg.limit < 0):
        raise UserError(f'--kind={cfg.kind}: sft, pairs or prompts; --safe_rlhf={cfg.safe_rlhf}: '
                        f'rule, better or safer; --drop={cfg.drop}: dual-safe, dual-unsafe; '
                        f'--val={cfg.val}: above 0 and below 1; --limit={cfg.limit}: not negative')


def main(cfg):
    """Writes a folder of canonical rows and shows it; returns the counts of its rows."""
    if cfg.look and len(cfg.files) == 1:
        return show(Path(cfg.files[0]))
    if cfg.look or not cfg.files or not cfg.out:
        raise UserError('name the files to read, and with --out=FOLDER the folder to write; or '
                        'with --look one folder')
    check_flags(cfg)
    out = Path(cfg.out)
    if any(out.glob('*.jsonl')):
        raise UserError(f'{out} holds rows: delete it, or name another --out; all files go into '
                        'one call')
    text, saved = find_tokenizer(cfg.tokenizer)
    rows, template = gather(cfg, saved)
    train, val = split_rows(rows, template, cfg.val)
    chosen = not any('completion' in row for row in rows)
    parts = {'train': stage_rows(train, cfg.kind, chosen), 'val': stage_rows(val, cfg.kind, chosen)}
    if not parts['train']:
        raise DataError(f'--kind={cfg.kind}: these rows hold none')
    if few := parts['train'].keys() ^ parts['val'].keys():
        raise DataError(f'{", ".join(few)}: too few rows to hold some out; bring more, or raise '
                        '--val, or leave them out with --kind')
    if chosen and 'sft' in parts['train']:
        print('sft: no demonstrations, so the chosen sides of the pairs are taken for them')
    out.mkdir(parents=True, exist_ok=True)
    if text:
        take_tokenizer(out, 'gpt2' if cfg.tokenizer == 'gpt2' else text)
    else:
        print('training a BPE: minutes, if the text is long or Chinese; --tokenizer=gpt2 has one')
        write_tokenizer(out, 'bpe', (text for row in train for text in row.values()
                                     if isinstance(text, str)), int(cfg.tokenizer))
    write_text(out / 'template.txt', template + '\n' * template.endswith('\n'))  # one is cut off
    for part in parts:
        for kind, listed in parts[part].items():
            write_rows(out / f'{part}.{kind}.jsonl', listed)
    return show(out)


if __name__ == '__main__':
    run_cli(main, Config)
