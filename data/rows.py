"""
Reads files of rows, puts rows in a fixed order, writes files whole, and formats counts.

It knows no data set and no shape: each prepare.py decides what is kept, cut or dropped.
"""
import gzip, hashlib, json, os, re, zlib
from pathlib import Path

from data.text import DataError
from data.turns import unique_keys


WHAT = {  # what some files are instead, by their first bytes, and what to do
    b'PAR1': 'parquet: python -c "import pandas; pandas.read_parquet(\'{}\').to_json('
             '\'NEW.jsonl\', orient=\'records\', lines=True)"',
    b'\xff\xfe': 'UTF-16: iconv -f UTF-16 -t UTF-8 {} > NEW',
    b'\xfe\xff': 'UTF-16: iconv -f UTF-16 -t UTF-8 {} > NEW',
    b'version https://git-lfs': 'a Git LFS pointer, not the file: git lfs pull',
    b'PK\x03\x04': 'a zip archive: unzip {}',
    b'\x28\xb5\x2f\xfd': 'compressed by zstd: zstd -d {} -o NEW',
    b'ARROW1': 'Arrow: python -c "import datasets; datasets.Dataset.from_file(\'{}\').to_json('
               '\'NEW.jsonl\')"',
    b'<': 'HTML, perhaps an error page, not the file: download {} again',
}


def read_file(path):
    """Returns the text of a file, perhaps gzipped; raises DataError if it cannot hold JSON."""
    try:
        data = Path(path).read_bytes()
        data = gzip.decompress(data) if data[:2] == b'\x1f\x8b' else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f'{path}: cannot be read ({error}); if it is damaged, delete it and '
                        'fetch it again') from None
    for start, what in WHAT.items():
        if data.lstrip().startswith(start):
            raise DataError(f'{path}: this is {what.format(path)}')
    try:
        text = data.decode('utf-8-sig').replace('\r\n', '\n').replace('\r', '\n')
    except UnicodeDecodeError as error:
        line, byte = data[:error.start].count(b'\n') + 1, data[error.start]
        raise DataError(f'{path}:{line}: byte 0x{byte:02x} is not UTF-8; if it is Latin-1: iconv '
                        f'-f LATIN1 -t UTF-8 {path} > NEW') from None
    if text.strip() and text.lstrip()[0] not in '[{':
        raise DataError(f'{path}: not JSON; if it is CSV: python -c "import csv, json; [print(json.'
                        f"dumps(row)) for row in csv.DictReader(open('{path}'))]\" > NEW.jsonl")
    return text


def parse(text):
    """Returns JSON as Python has it. NaN is no JSON, but pandas writes it for what is missing."""
    return json.loads(text, object_pairs_hook=unique_keys, parse_constant=lambda name: None)


def parse_row(line):
    """Returns the object in a line; raises ValueError that says what is wrong and what to do."""
    try:
        row = parse(line)
    except json.JSONDecodeError as error:
        if line.startswith("{'"):
            advice = ('Python, not JSON: python -c "import ast, json, sys; [print(json.dumps(ast.'
                      'literal_eval(line))) for line in sys.stdin]" < FILE > NEW')
        elif error.msg == 'Extra data':
            advice = ("a comma after the object, or a second one: sed 's/,$//' FILE > NEW, or "
                      'jq -c . FILE > NEW')
        else:
            advice = (f'not a whole JSON object ({error.msg} at column {error.colno}); if objects '
                      'span lines: jq -c . FILE > NEW; if the file is cut off, fetch it again')
        raise ValueError(advice) from None
    except RecursionError:
        raise ValueError('too many brackets within brackets') from None
    if not isinstance(row, dict):
        raise ValueError(f'an object was expected, not {type(row).__name__}')
    return row


def read_objects(path):
    """Yields (where, row or ValueError) of JSON Lines or of an array; DataError: neither."""
    text = read_file(path)
    whole = None                                # the file's JSON, if it is one array or object
    if text.lstrip().startswith(('[', '{\n')) or text.count('\n') < 2:      # else JSON Lines
        try:
            whole = parse(text)
        except (ValueError, RecursionError) as error:
            if text.lstrip().startswith('['):
                raise DataError(f'{path}: an array, but not a whole one ({error})') from None
    if isinstance(whole, list):
        pieces = ((f'{path}, row {number}', json.dumps(row)) for number, row in enumerate(whole, 1))
    else:
        for key, value in (whole or {}).items():
            if isinstance(value, list) and 'instruction' not in whole and all(
                    isinstance(row, dict) and not row.keys() & {'role', 'from'} for row in value):
                raise DataError(f'{path}: the rows are under {key!r}: python -c "import json; '
                                f"print(json.dumps(json.load(open('{path}'))['{key}']))\" "
                                '> NEW.json')
        # Lines end only at '\n': str.splitlines would also break inside a string, at U+2028
        pieces = ((f'{path}:{number}', line) for number, line in enumerate(text.split('\n'), 1))
    for where, line in pieces:
        if line.strip():
            try:
                yield where, parse_row(line)
            except ValueError as error:
                yield where, ValueError(str(error).replace('FILE', str(path)))


def convert(row, where, content):
    """
    Returns a command that turns rows with such keys into rows that are read. Returns '' if it would
    leave out a key of `content`, which has a meaning. A label keeps the rows that it calls good.
    """
    def first(*keys):
        return next((key for key in keys if key in row), '')
    label = first('label', 'kto_tag', 'is_safe')
    asked = [key for key in ('system', 'prompt', 'question', 'query', 'instruction', 'input',
                             'context') if key in row]
    sides = {'chosen': first('chosen', 'response_j'), 'rejected': first('rejected', 'response_k')}
    if not all(sides.values()):
        sides = {'completion': first('completion', 'output', 'response', 'answer')}
    used = [*asked, *sides.values(), label]
    path = re.sub('(:|, row )[0-9]+$', '', where)
    lost = [key for key in row if key not in used and key.replace('-', '_') in content]
    odd_label = label and row[label] not in (True, False, 'desirable', 'undesirable')
    if '' in sides.values() or not asked or lost or odd_label or path.endswith('.gz'):
        return ''
    prompt = ', '.join(f"r['{key}']" for key in asked)
    if len(asked) > 1:
        prompt = f"'\\n'.join(filter(None, [{prompt}]))"
    if asked != ['prompt']:                     # a question, not the literal text
        prompt = f"[{{'role': 'user', 'content': {prompt}}}]"
    texts = ''.join(f", '{side}': r['{key}']" for side, key in sides.items())
    which = f" if r['{label}'] in (True, 'desirable')" if label else ''
    rows = f"open('{path}')"
    rows = f'json.load({rows})' if ', row ' in where else f'map(json.loads, {rows})'
    return (f"; to convert it: python -c \"import json; [print(json.dumps({{'prompt': {prompt}"
            f'{texts}}})) for r in {rows}{which}]" > NEW.jsonl')


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


def stage_rows(rows, kind='', chosen=True):
    """Returns rows by kind. If `chosen`, the chosen sides of pairs are the demonstrations."""
    pairs = [row for row in rows if 'chosen' in row]
    if chosen:
        sft = [{key.replace('chosen', 'completion'): value for key, value in row.items()
                if 'rejected' not in key} for row in pairs]
    else:
        sft = [row for row in rows if 'completion' in row]
    asked = [{'prompt': prompt} for prompt in dict.fromkeys(row['prompt'] for row in rows)]
    return {name: listed for name, listed in (('sft', sft), ('pairs', pairs), ('prompts', asked))
            if listed and kind in ('', name)}


def counted(counter):
    """Returns '3 repeated, 1 empty' of a Counter, or 'none'."""
    return ', '.join(f'{n} {reason}' for reason, n in counter.most_common() if n) or 'none'
