"""
From files to token ids and back: tokenizers, rows, splits, and a data set's judge.

A data folder holds rows as JSON Lines, a tokenizer and perhaps a chat template. A training script
calls load_text (tokenizer and template), load_examples (token ids of training and held-out rows)
and show_samples (what the policy answers).
"""
import base64, hashlib, importlib.util, itertools, json, math, zlib
from collections import Counter
from pathlib import Path

import tiktoken
import torch

from prefgpt import UserError, generate, x_and_y


class DataError(UserError):
    """A row, file or folder of data that cannot be used; names file and line if they are known."""


# ----------------------------------------------------------------------------- tokenizers

# How GPT-2 cuts text into words before BPE (with tiktoken's possessive quantifiers)
SPLIT_PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$"
                 r"|\s+(?!\S)|\s")


def read_text(path):
    """Returns the text of a UTF-8 file, or raises a DataError that names it."""
    try:
        return Path(path).read_bytes().decode('utf-8-sig')
    except OSError as error:
        raise DataError(f'{path}: {error.strerror.lower()}; has prepare.py been run, '
                        'and is the path right?') from None
    except UnicodeDecodeError as error:
        line, byte = error.object[:error.start].count(b'\n') + 1, error.object[error.start]
        raise DataError(f'{path}:{line}: byte 0x{byte:02x} is not UTF-8') from None


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
    Loads the tokenizer and the chat template of a data folder; a single file of data has neither,
    so they come from the checkpoint saved. Returns the tiktoken.Encoding and checkpoint_text's
    dict. Raises UserError if the two tokenizers differ: the same ids would mean other words.
    """
    folder = Path(data)
    if not folder.exists():
        raise DataError(f'{data}: no such file or folder; run its prepare.py first')
    if not folder.is_dir():
        if not saved:
            raise DataError(f'{data} is a file, without a tokenizer: pass --init')
        tokenizer = build_tokenizer(saved['tokenizer'])
        return tokenizer, checkpoint_text(tokenizer, saved['template'])
    where = read_text(folder / 'tokenizer').strip()
    tokenizer = load_tokenizer(where if where == 'gpt2' else folder / where)
    path = folder / 'template.txt'
    template = read_text(path) if path.is_file() else '{}'      # '{}': what is typed is the prompt
    text = checkpoint_text(tokenizer, template)
    if saved and text['fingerprint'] != saved['fingerprint']:
        raise UserError(f'{data} was prepared with another tokenizer; the checkpoint is '
                        f"from {saved['config']['data']}: all stages must use the same tokenizer")
    if '{}' not in template:
        raise DataError(f'{path}: no {{}}, so there is no place for what the user says')
    return tokenizer, text


# ----------------------------------------------------------------------------- rows

HH_TEMPLATE = '\n\nHuman: {}\n\nAssistant:'
RESPONSES = {'sft': ('response',), 'pairs': ('chosen', 'rejected'), 'prompts': ()}


def unique_keys(pairs):
    """Raises ValueError on a repeated key: json keeps its last value (an object_pairs_hook)."""
    if len(dict(pairs)) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'the key {max(keys, key=keys.count)!r} appears twice')
    return dict(pairs)


def refuse_constant(name):
    """Raises ValueError for NaN and Infinity, which are not JSON (json's parse_constant)."""
    raise ValueError(f'{name} is not JSON')


def load_rows(path, kind, template=HH_TEMPLATE):
    """
    Loads the rows of a JSON Lines file, normalized; kind is 'sft', 'pairs' or 'prompts'. Raises
    DataError('file.jsonl:143: ...') on the first line that cannot be used.
    """
    rows = []
    # Lines end only at '\n': str.splitlines would also break inside a string, at U+2028
    for number, line in enumerate(read_text(path).split('\n'), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=unique_keys, parse_constant=refuse_constant)
            if not isinstance(row, dict):
                raise ValueError(f'an object was expected, not {type(row).__name__}')
            rows.append(normalize(row, kind, template))
        except json.JSONDecodeError as error:
            raise DataError(f'{path}:{number}: {error.msg} at column {error.colno}') from None
        except (ValueError, RecursionError) as error:
            raise DataError(f'{path}:{number}: {error}') from None
    if not rows:
        raise DataError(f'{path}: no rows')
    return rows


def string_of(row, key):
    """Returns row[key]; raises ValueError if it is missing or not a string that can be encoded."""
    if not isinstance(row, dict):
        raise ValueError(f'an object with {key!r} was expected, not {type(row).__name__}')
    if key not in row:
        raise ValueError(f'missing {key!r} (keys: {", ".join(row)})')
    if not isinstance(row[key], str):
        raise ValueError(f'{key!r} is {type(row[key]).__name__}, not a string')
    row[key].encode()                           # a lone surrogate fails here, at a known line
    return row[key]


def normalize(row, kind, template):
    """
    Returns a row in any accepted shape as {prompt} and, by kind, {response} or {chosen, rejected}.

    SFT also reads the chosen side of pairs. 'chosen_cut': true marks a response whose end was cut
    off beforehand; the mark is kept, and no EOS follows. Raises ValueError naming what is missing.
    """
    row = dict(row)
    if 'messages' in row:
        row['prompt'], row['response'] = from_messages(row['messages'], template)
    elif 'response_0' in row:                   # Safe-RLHF: if either is unsafe, safety decides
        safe = [row.get(f'is_response_{i}_safe') for i in (0, 1)]
        key = 'better_response_id' if all(safe) else 'safer_response_id'
        if row.get(key) not in (0, 1) or not all(isinstance(value, bool) for value in safe):
            raise ValueError(f'{key!r} must be 0 or 1, and is_response_0_safe and '
                             'is_response_1_safe true or false')
        better = int(row[key])
        for side, i in (('chosen', better), ('rejected', 1 - better)):
            row[side] = string_of(row, f'response_{i}')
            row[f'{side}_cut'] = row.pop(f'response_{i}_cut', False)
    elif 'prompt' not in row and 'chosen' in row and 'rejected' in row:     # HH's transcripts
        row['prompt'], row['chosen'], row['rejected'] = from_transcripts(
            string_of(row, 'chosen'), string_of(row, 'rejected'))
    for key in ('response', 'completion', 'chosen', 'rejected'):
        if row.get(f'{key}_cut') and key not in row:    # else its response would get an EOS
            raise ValueError(f"'{key}_cut' marks a {key!r} that is not there")
    for other in ('completion', 'chosen'):
        if kind == 'sft' and other in row and 'response' not in row:
            row['response'], row['response_cut'] = row[other], row.get(f'{other}_cut', False)

    out = {key: string_of(row, key) for key in ('prompt', *RESPONSES[kind])}
    for key in RESPONSES[kind]:
        cut = row.get(f'{key}_cut', False)
        if not isinstance(cut, bool):
            raise ValueError(f"'{key}_cut' must be true (its end is missing) or false, not {cut!r}")
        # A rejected response may be EOS alone; without EOS there must be text
        if out[key] == '' and (cut or key != 'rejected'):
            raise ValueError(f'{key!r} is empty: there is nothing to learn')
        if cut:
            out[f'{key}_cut'] = True
    return out


def from_messages(messages, template):
    """Returns chat turns as (prompt, response): the last turn, an assistant's, is the response."""
    # A turn begins where the template begins: on a new line
    end = '' if template.startswith('\n') else '\n'
    form = {'user': template, 'assistant': ' {}' + end, 'system': '{}' + end}
    roles = ([string_of(turn, 'role') for turn in messages] if isinstance(messages, list) else [])
    if roles[-2:] != ['user', 'assistant'] or not set(roles) <= set(form):
        raise ValueError("'messages' must be turns {role, content} of user, assistant or system, "
                         f'ending with user, then assistant; the roles are {roles}')
    contents = [string_of(turn, 'content') for turn in messages]
    if not contents[-1]:
        raise ValueError("the last 'content' is empty: there is nothing to learn")
    turns = [form[role].replace('{}', content) for role, content in zip(roles, contents)]
    return ''.join(turns[:-1]), ' ' + contents[-1]


def from_transcripts(chosen, rejected):
    """Cuts two whole dialogues at the LAST assistant turn: (prompt, chosen, rejected)."""
    marker = '\n\nAssistant:'
    cuts = [text.rfind(marker) + len(marker) for text in (chosen, rejected)]
    if min(cuts) < len(marker) or chosen[:cuts[0]] != rejected[:cuts[1]]:
        raise ValueError("'chosen' and 'rejected' do not share everything up to the last "
                         "'\\n\\nAssistant:'; drop this row")
    return chosen[:cuts[0]], chosen[cuts[0]:], rejected[cuts[1]:]


def load_split(data, kind, template, rows=''):
    """
    Loads training and held-out rows of a data folder (rows='pairs': SFT on their chosen side), or
    of one JSON Lines file, where a hash of the prompt holds out the same tenth each time.
    """
    if Path(data).is_dir():
        return tuple(load_rows(Path(data) / f'{split}.{rows or kind}.jsonl', kind, template)
                     for split in ('train', 'val'))
    all_rows = load_rows(data, kind, template)
    prompts = sorted({row['prompt'] for row in all_rows}, key=lambda p: (zlib.crc32(p.encode()), p))
    if len(prompts) < 2:
        raise DataError(f'{data}: only one prompt, so none can be held out; pass a folder with '
                        f'train.{kind}.jsonl and val.{kind}.jsonl')
    held_out = set(prompts[:max(1, len(prompts) // 10)])
    return ([row for row in all_rows if row['prompt'] not in held_out],
            [row for row in all_rows if row['prompt'] in held_out])


# ----------------------------------------------------------------------------- token ids

def encode_rows(rows, kind, tokenizer, block_size, max_new_tokens=0, name='rows'):
    """
    Returns the token ids of normalized rows, cut to the block: (prompt,), (prompt, response) or
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


def hash_data(cfg, saved, *lists):
    """Hashes encoded rows for the checkpoint; raises UserError if a resumed run's rows changed."""
    digest = hashlib.sha256()
    for rows in lists:
        for row in (*rows, 'end'):              # where train ends and val begins counts too
            digest.update(repr(row).encode())
    if saved and saved['data_hash'] != digest.hexdigest():
        raise UserError(f'{cfg.data}, or a checkpoint that {cfg.out} was made from, has changed '
                        'since the run began: start a new one in another --out')
    return digest.hexdigest()


def decode_responses(tokens, response_mask, tokenizer):
    """Returns a batch's responses as text, without EOS, and whether each ended with EOS, (B,)."""
    texts, ended = [], []
    for y, mask in zip(x_and_y(tokens)[1].tolist(), response_mask.tolist()):
        response = list(itertools.compress(y, mask))
        ended.append(response[-1] == tokenizer.eot_token)
        texts.append(tokenizer.decode(response[:-1] if ended[-1] else response))
    return texts, torch.tensor(ended)


def mark_ends(texts, ended):
    """Returns the texts for people to read: ' [no end]' follows those that did not end."""
    return [text + ('' if end else ' [no end]') for text, end in zip(texts, ended)]


def show_samples(policy, examples, tokenizer, max_new_tokens):
    """Returns greedy answers to the prompts of examples, as text, each after its prompt."""
    max_new_tokens = min(max_new_tokens, policy.config.block_size - 1)
    room = policy.config.block_size - max_new_tokens
    prompts = [example[0][-room:] for example in examples]
    out = generate(policy, prompts, max_new_tokens, tokenizer.eot_token, temperature=0)
    texts = mark_ends(*decode_responses(*out, tokenizer))
    return [tokenizer.decode(prompt) + text for prompt, text in zip(prompts, texts)]


def load_judge(path):
    """Returns a reward.py's score as judge(prompt, response) -> a dict of finite numbers."""
    read_text(path)                             # a clear error if the file is not there
    spec = importlib.util.spec_from_file_location('judge', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, 'score', None)):
        raise DataError(f'{path}: it defines no score(prompt, response)')

    def judge(prompt, response):
        numbers = module.score(prompt, response)
        if 'reward' not in numbers or not all(map(math.isfinite, numbers.values())):
            raise DataError(f"{path}: score({prompt!r}, {response!r}) is {numbers}, not finite "
                            "numbers with a 'reward'")
        return numbers
    return judge
