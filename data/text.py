"""
From files to token ids and back: tokenizers, rows and splits.

A data folder holds canonical rows as JSON Lines, a tokenizer and perhaps a chat template; rows of
other shapes go through data/prepare.py first. A training script calls load_text (tokenizer and
template), load_examples (token ids of both splits) and show_samples (what the policy answers).
"""
import base64, hashlib, itertools, json
from collections import Counter
from pathlib import Path

import tiktoken
import torch

from data.turns import FOREIGN, clean_template, split_rows, string_of, unique_keys
from prefgpt import UserError, generate, x_and_y


class DataError(UserError):
    """A row, file or folder of data that cannot be used; names file and line if they are known."""


# ----------------------------------------------------------------------------- tokenizers

# How GPT-2 cuts text into words before BPE (with tiktoken's possessive quantifiers)
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def read_text(path):
    """Returns the text of a UTF-8 file, or raises a DataError that names it."""
    try:
        return Path(path).read_bytes().decode('utf-8-sig')
    except UnicodeDecodeError as error:
        line, byte = error.object[:error.start].count(b'\n') + 1, error.object[error.start]
        raise DataError(f'{path}:{line}: byte 0x{byte:02x} is not UTF-8') from None
    except (OSError, ValueError) as error:      # ValueError: a NUL in the name
        why = getattr(error, 'strerror', str(error)).lower()
        raise DataError(f'{path}: {why}; has prepare.py been run?') from None


def build_tokenizer(text):
    """Returns a tiktoken.Encoding from the text of a .tiktoken file; EOS is the last id."""
    ranks = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise DataError(f'tokenizer:{number}: not "base64 rank": {line[:40]!r}') from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(f'tokenizer: {len(ranks)} tokens, but their ranks are not 0, 1, 2, ...')
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise DataError('tokenizer: some of the 256 single bytes are missing')
    return tiktoken.Encoding('prefgpt', pat_str=SPLIT_PATTERN, mergeable_ranks=ranks,
                             special_tokens={'<|endoftext|>': len(ranks)})


def tokenizer_text(tokenizer):
    """Returns an encoding as the text of a .tiktoken file, which is what a checkpoint keeps."""
    tokens = (tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.eot_token))
    return ''.join(f'{base64.b64encode(token).decode()} {i}\n' for i, token in enumerate(tokens))


def load_tokenizer(where):
    """Loads the tiktoken.Encoding 'gpt2', or the one in a .tiktoken file."""
    if where != 'gpt2':
        return build_tokenizer(read_text(where))
    try:
        return tiktoken.get_encoding('gpt2')
    except Exception as error:      # tiktoken passes on whatever its download raised
        raise DataError(f"tiktoken could not fetch 'gpt2' ({type(error).__name__}): set "
                        'TIKTOKEN_CACHE_DIR to a folder that holds its two files') from None


def checkpoint_text(tokenizer, template):
    """Returns both as a checkpoint keeps them, and a fingerprint that tells tokenizers apart."""
    text = tokenizer_text(tokenizer)
    return {'tokenizer': text, 'fingerprint': hashlib.sha256(text.encode()).hexdigest()[:16],
            'template': template}


def load_text(data, saved=None):
    """
    Loads tokenizer and template of a data folder, or of the checkpoint saved if data is a file.
    Returns the tiktoken.Encoding and checkpoint_text's dict. Both must be the checkpoint's: the
    same ids, or the same question, would mean something else. A base model has no template yet.
    """
    folder = Path(data)
    if not folder.exists():
        raise DataError(f'{data}: no such file or folder; run its prepare.py first')
    if not folder.is_dir() and not saved:
        raise DataError(f'{data} is a file, without a tokenizer: pass --init, or make a folder: '
                        f'python -m data.prepare {data} --out=FOLDER')
    if not folder.is_dir():
        tokenizer = build_tokenizer(saved['tokenizer'])
        return tokenizer, checkpoint_text(tokenizer, saved['template'])
    where = read_text(folder / 'tokenizer').strip()
    tokenizer = load_tokenizer(where if where == 'gpt2' else folder / where)
    path, template = folder / 'template.txt', saved['template'] if saved else '{}'
    if path.is_file():
        template = clean_template(read_text(path).removesuffix('\n').removesuffix('\r'), path)
    text = checkpoint_text(tokenizer, template)
    if saved and text['fingerprint'] != saved['fingerprint']:
        raise UserError(f'{data} was prepared with another tokenizer; the checkpoint is '
                        f"from {saved['config']['data']}: all stages must use the same tokenizer")
    if saved and saved['stage'] != 'base' and template != saved['template']:
        raise UserError(f"{path}: {template!r}, but the checkpoint's is {saved['template']!r}: "
                        'prepare the rows with --tokenizer=RUN, the run that is to go on')
    return tokenizer, text


# ----------------------------------------------------------------------------- rows

RESPONSES = {'sft': ('completion',), 'pairs': ('chosen', 'rejected'), 'prompts': ()}


def canonical(row, kind):
    """Returns {prompt} and a kind's responses, with marks of those that were cut beforehand."""
    if not isinstance(row, dict):
        raise ValueError(f'an object was expected, not {type(row).__name__}')
    row = {key: value for key, value in row.items() if value is not None}   # pandas adds nulls
    if foreign := [key for key in FOREIGN if key in row]:
        raise ValueError(f'no training script reads {foreign[0]!r}')
    for key in row:
        if key.endswith('_cut') and not (isinstance(row[key], bool) and key[:-4] in row):
            raise ValueError(f'{key!r} must be true or false beside a {key[:-4]!r}')
    if kind == 'sft' and 'completion' not in row and 'chosen' in row:
        row |= {'completion': row['chosen'], 'completion_cut': row.get('chosen_cut', False)}
    out = {key: string_of(row, key) for key in ('prompt', *RESPONSES[kind])}
    for key in RESPONSES[kind]:
        cut = row.get(f'{key}_cut', False)
        # A rejected response may be EOS alone; without EOS there must be text
        if out[key] == '' and (cut or key != 'rejected'):
            raise ValueError(f'{key!r} is empty: there is nothing to learn')
        if out[key].rstrip().endswith('<|endoftext|>'):
            raise ValueError(f"{key!r} ends in '<|endoftext|>' as text; EOS is added as an id")
        out |= {f'{key}_cut': True} if cut else {}
    return out


def load_rows(path, kind):
    """
    Loads canonical rows: {prompt} and {completion} ('sft'; also the chosen side of pairs) or
    {chosen, rejected} ('pairs'). "chosen_cut": true says that its end is missing: no EOS follows.
    Raises DataError('file.jsonl:143: ...') at the first line that is not such a row.
    """
    rows = []
    # Lines end only at '\n': str.splitlines would also break inside a string, at U+2028
    for number, line in enumerate(read_text(path).split('\n'), 1):
        try:
            if line.strip():
                rows.append(canonical(json.loads(line, object_pairs_hook=unique_keys), kind))
        except (ValueError, RecursionError) as error:
            raise DataError(f'{path}:{number}: {error}; other shapes go through python -m '
                            f'data.prepare {path} --out=FOLDER first') from None
    if not rows:
        raise DataError(f'{path}: no rows')
    return rows


def load_split(data, kind, template, rows=''):
    """
    Loads training and held-out rows of a data folder (with rows='pairs', SFT reads chosen) or of
    one file. Says how many prompts end as the template does; raises DataError if none does.
    """
    if Path(data).is_dir():
        train, val = (load_rows(Path(data) / f'{split}.{rows or kind}.jsonl', kind)
                      for split in ('train', 'val'))
    else:
        train, val = split_rows(load_rows(data, kind), template)
    end = template.split('{}')[1]
    right = sum(row['prompt'].endswith(end) for row in train + val)
    said = f'{data}: {right} of {len(train + val)} prompts end as the template does, in {end!r}'
    if not right:                               # what people ask in a chat never looks like these
        raise DataError(f'{said}: python -m data.prepare FILE --out=FOLDER puts them into it')
    if right < len(train + val):
        print(said)
    return train, val


# ----------------------------------------------------------------------------- token ids

def encode_rows(rows, kind, tokenizer, block_size, max_new_tokens=0, name='rows'):
    """
    Returns the token ids of canonical rows, cut to the block: (prompt,), (prompt, response) or
    (prompt, chosen, rejected), by kind. Prints how many were kept, cut and dropped, and why.

    Prompt and response are encoded separately, so their tokens never merge. If a prompt and its
    longest response do not fit, the prompt loses its left end, down to half the block. If they
    still do not, a response loses its end, and so its EOS; one that the row marks as cut has none.
    """
    if block_size < 2 or kind == 'prompts' and max_new_tokens >= block_size:
        raise UserError(f'block_size={block_size} has no room for a prompt beside '
                        f'max_new_tokens={max_new_tokens}: lower --max_new_tokens')
    eos, counts, examples = tokenizer.eot_token, Counter(), []
    for row in rows:
        prompt = tokenizer.encode_ordinary(row['prompt']) or [eos]      # an empty one is EOS alone
        responses = [tokenizer.encode_ordinary(row[key])
                     + ([] if row.get(f'{key}_cut') else [eos]) for key in RESPONSES[kind]]
        counts['responses marked as cut'] += sum(row.get(f'{key}_cut', False)
                                                 for key in RESPONSES[kind])
        room = block_size - max_new_tokens
        if responses:
            room = max(block_size - max(map(len, responses)), block_size // 2)
        counts['prompts cut on the left'] += len(prompt) > room
        prompt = prompt[-room:]
        room = block_size - len(prompt)
        counts['responses cut (no EOS)'] += sum(len(response) > room for response in responses)
        responses = [response[:room] for response in responses]
        if kind == 'pairs' and responses[0] == responses[1]:
            counts['dropped (chosen == rejected)'] += 1
            continue
        examples.append((prompt, *responses))
    print(f'{name}: {len(examples)} {kind} kept'
          + ''.join(f', {n} {what}' for what, n in counts.items() if n))
    if not examples:
        raise DataError(f'{name}: none of the {len(rows)} rows is left')
    return examples


def load_examples(data, kind, tokenizer, text, block_size, max_new_tokens=0, rows=''):
    """Loads the training rows and the held-out rows of data as token ids (see encode_rows)."""
    splits = load_split(data, kind, text['template'], rows)
    return tuple(encode_rows(split, kind, tokenizer, block_size, max_new_tokens, name)
                 for name, split in zip(('train', 'val'), splits))


def decode_responses(tokens, response_mask, tokenizer):
    """Returns a batch's responses as text, without EOS, and whether each ended with EOS, (B,)."""
    texts, ended = [], []
    for y, mask in zip(x_and_y(tokens)[1].tolist(), response_mask.tolist()):
        response = list(itertools.compress(y, mask))
        ended.append(response[-1] == tokenizer.eot_token)
        texts.append(tokenizer.decode(response[:-1] if ended[-1] else response))
    return texts, torch.tensor(ended)


def show_samples(policy, examples, tokenizer, max_new_tokens):
    """Returns greedy answers to the prompts of examples, as text, each after its prompt."""
    prompts = [example[0] for example in examples]
    room = policy.config.block_size - max(map(len, prompts))    # an example holds a response too
    out = generate(policy, prompts, min(max_new_tokens, room), tokenizer.eot_token, temperature=0)
    texts, ended = decode_responses(*out, tokenizer)
    return [tokenizer.decode(prompt) + text + ('' if end else ' [no end]')
            for prompt, text, end in zip(prompts, texts, ended)]
