"""
Prepares dialogues, and which of two replies people preferred: the helpful part of HH-RLHF.

Each row of the source (Bai et al. 2022, MIT licence) is a dialogue twice, with two last replies.
What is written for train and val: pairs of replies to a prompt, which is the dialogue up to the
last "Assistant:"; demonstrations, which are the preferred replies; and the distinct prompts.

A tenth of the FIRST human turns is held out, with all that follows them: the source holds some
dialogues several times, at different lengths, and a longer one gives away the replies that a
shorter one asks for. Nothing is random: every order is that of a sha256.
Replies are cut at 128 tokens, EOS included, and cut ones are marked ("chosen_cut": true), so that
no EOS follows them. Prompts stay whole here; encode_rows cuts them on the left, to the block.

There is no reward.py, because what people prefer has no exact judge. Instead, this prints the
baseline that a reward model has to beat: a linear model of a reply's tokens and length, on the same
held-out pairs. It does not repair noisy labels, find near-duplicates, or mark replies that were
already cut when they were collected.

    python -m data.hh.prepare --from=FOLDER     # with three test files, see data/README.md
    baseline on 607 held-out pairs: tokens and length (l2 0.03) rank 0.610 +- 0.020 correctly; ...
"""
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from data.bpe import write_tokenizer
from data.download import download
from data.look import show
from data.rows import counted, read_objects, shuffle, stage_rows, write_all, write_text
from data.text import RESPONSES, DataError, load_tokenizer
from data.turns import HH_TEMPLATE, from_transcripts, string_of
from prefgpt import UserError, run_cli

URL = 'https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/helpful-base/'
FILES = {'train.jsonl.gz': '',  # its sha256 is not known to us; gzip checks its own checksum
         'test.jsonl.gz': '8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b'}
VOCAB_SIZE = 8192  # with EOS
BLOCK_SIZE = 256  # what lengths are reported for; encode_rows does the cutting of prompts
REPLY_TOKENS = 128  # with EOS; half the block, so that the prompt has the other half
SIDES = ('chosen', 'rejected')
L2_STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3)  # of the baseline, tried on training pairs


@dataclass
class Config:
    from_: str = ''  # folder with *.jsonl.gz or *.jsonl, at any depth; without it: a download
    tokenizer: str = ''  # gpt2 for tiktoken's; without it a BPE is trained on the training text
    out: str = 'data/hh'  # folder to write to


def find_files(folder, out):
    """Returns the source files: those below `folder`, or the hub's two, downloaded to `out`."""
    if folder:
        ours = [f'{part}.{kind}.jsonl' for part in ('train', 'val') for kind in RESPONSES]
        files = sorted(path for end in ('jsonl', 'jsonl.gz')
                       for path in Path(folder).rglob(f'*.{end}') if path.name not in ours)
        if not files:
            raise DataError(f'--from={folder}: no *.jsonl.gz and no *.jsonl below it')
        return files
    files = {out / f'helpful-base.{name}': name for name in FILES}
    for path, name in files.items():
        if not path.exists():
            download(URL + name, path, FILES[name], 'or fetch the files of helpful-base elsewhere, '
                     'and give the folder that holds them with --from=FOLDER')
    return list(files)


def read_rows(path):
    """Returns the pairs of transcripts in a file; raises DataError with the line of a bad one."""
    rows = []
    for where, row in read_objects(path):
        try:
            if isinstance(row, ValueError):
                raise row
            rows.append((string_of(row, 'chosen'), string_of(row, 'rejected')))
        except ValueError as error:
            raise DataError(f'{where}: {error}') from None
    return rows


def clean(transcripts, taken, dropped):
    """Returns usable new pairs as rows, and adds them to `taken`; `dropped` counts the others."""
    rows = []
    for pair in transcripts:
        try:
            prompt, chosen, rejected = row = from_transcripts(*pair)
        except ValueError:
            dropped['prompts that differ'] += 1
            continue
        if chosen == rejected:
            dropped['equal replies'] += 1
        elif not chosen.strip() or not rejected.strip():
            dropped['empty replies'] += 1
        elif row in taken:
            dropped['repeated'] += 1
        else:
            taken.add(row)
            rows.append({'prompt': prompt, 'chosen': chosen, 'rejected': rejected})
    return rows


def read_files(files):
    """Returns the clean rows of all files, in hash order; prints per file what was dropped."""
    rows, taken = [], set()
    for path in files:
        transcripts, dropped = read_rows(path), Counter()
        kept = clean(transcripts, taken, dropped)
        print(f'{path}: {len(transcripts)} rows, {len(kept)} kept; dropped: {counted(dropped)}')
        rows += kept
    return shuffle(rows, lambda row: '\0'.join(row.values()))


def first_turn(row):
    """Returns a dialogue up to its first reply, which longer and shorter versions share."""
    return row['prompt'].split('\n\nAssistant:')[0]


def split(rows):
    """Returns (train, val); val has a tenth of the first human turns, with all their rows."""
    turns = shuffle({first_turn(row) for row in rows})
    if len(turns) < 2:
        raise DataError(f'{len(rows)} rows with {len(turns)} first turns: none can be held out')
    held_out = set(turns[:max(1, len(turns) // 10)])
    return ([row for row in rows if first_turn(row) not in held_out],
            [row for row in rows if first_turn(row) in held_out])


def cut(text, tokenizer):
    """
    Returns (text, False), or (its start, True) if it and EOS are more than REPLY_TOKENS.

    A start is valid text that encodes to the same ids again: it ends before a token that is part of
    a character, or that depends on what follows ("\\n\\n" is one token only at the end of a text).
    """
    ids = tokenizer.encode_ordinary(text)
    if len(ids) < REPLY_TOKENS:
        return text, False
    for end in range(REPLY_TOKENS, -1, -1):
        start = tokenizer.decode(ids[:end])     # U+FFFD for a part of a character: other ids
        if tokenizer.encode_ordinary(start) == ids[:end]:
            return start, True


def cut_pairs(rows, tokenizer, dropped):
    """Returns rows with their replies cut and marked; drops those that the cut made equal."""
    pairs = []
    for row in rows:
        pair, marks = {'prompt': row['prompt']}, {}
        for side in SIDES:
            pair[side], was_cut = cut(row[side], tokenizer)
            if was_cut:
                marks[f'{side}_cut'] = True
        if pair['chosen'] == pair['rejected']:
            dropped['equal once cut'] += 1
        else:
            pairs.append(pair | marks)
    return pairs


# --- the baseline ---

def reply_ids(pair, side, tokenizer):
    """Returns the ids that a reward model reads of a reply: with EOS, unless it was cut."""
    ids = tokenizer.encode_ordinary(pair[side])
    return ids if f'{side}_cut' in pair else ids + [tokenizer.eot_token]


def features(pairs, tokenizer):
    """Returns log(1 + count) of each token and of all, chosen less rejected: (pairs, V + 1)."""
    places, values = [], []
    for row, pair in enumerate(pairs):
        for side, sign in zip(SIDES, (1, -1)):
            ids = reply_ids(pair, side, tokenizer)
            for token, count in [*Counter(ids).items(), (tokenizer.n_vocab, len(ids))]:
                places.append((row, token))
                values.append(sign * math.log1p(count))
    size = (len(pairs), tokenizer.n_vocab + 1)
    return torch.sparse_coo_tensor(torch.tensor(places).T, values, size, dtype=torch.float64,
                                   check_invariants=True).coalesce()    # adds the two sides


def fit(x, l2):
    """Returns weights (V + 1, 1) that minimise the Bradley-Terry loss + l2 |w|^2 (convex)."""
    w = torch.zeros(x.size(1), 1, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, line_search_fn='strong_wolfe')

    def closure():
        optimizer.zero_grad()
        loss = F.softplus(-(x @ w)).mean() + l2 * w.square().sum()  # -log sigmoid(margin)
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach()


def baseline(train, val, tokenizer):
    """
    Prints and returns the share of val that a linear model of tokens and length ranks correctly.

    Its l2 is the one with the lowest loss on a tenth of the training pairs; val is read once.
    """
    some, others = [features(part, tokenizer) for part in split(train)]
    l2 = min(L2_STRENGTHS, key=lambda l2: F.softplus(-(others @ fit(some, l2))).mean().item())
    margins = features(val, tokenizer) @ fit(features(train, tokenizer), l2)
    accuracy = (margins > 0).double().mean().item()
    error = (accuracy * (1 - accuracy) / len(val)) ** 0.5
    lengths = [[len(reply_ids(pair, side, tokenizer)) for side in SIDES] for pair in val]
    longer = sum(0.5 if a == b else a > b for a, b in lengths) / len(val)   # a tie counts half
    print(f'baseline on {len(val)} held-out pairs: tokens and length (l2 {l2:g}) rank '
          f'{accuracy:.3f} +- {error:.3f} correctly; the longer reply is chosen: {longer:.3f}')
    return accuracy


def report_lengths(rows, tokenizer):
    """Prints how many prompts and uncut replies are too long."""
    prompts, chosen, rejected = [[len(tokenizer.encode_ordinary(row[key])) for row in rows]
                                 for key in ('prompt', *SIDES)]
    room = BLOCK_SIZE - REPLY_TOKENS
    print(f'prompts: {sum(n > room for n in prompts)} of {len(rows)} have more than {room} tokens; '
          f'--block_size={BLOCK_SIZE} keeps their right end, beside a reply of {REPLY_TOKENS}')
    print(f'replies: {sum(n >= REPLY_TOKENS for n in chosen + rejected)} of {2 * len(rows)} have '
          f'more than {REPLY_TOKENS} tokens, with EOS, and are cut')


def main(cfg):
    """Writes the data set; returns the counts of rows and the baseline's accuracy."""
    if cfg.tokenizer not in ('', 'gpt2'):
        raise UserError(f'--tokenizer={cfg.tokenizer}: gpt2, or leave it out to train a BPE')
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = read_files(find_files(cfg.from_, out))
    train, val = split(rows)
    if cfg.tokenizer:
        write_text(out / 'tokenizer', 'gpt2\n')
    else:
        write_tokenizer(out, 'hh', (text for row in train for text in row.values()), VOCAB_SIZE)
    tokenizer = load_tokenizer(cfg.tokenizer or out / 'hh.tiktoken')
    write_text(out / 'template.txt', HH_TEMPLATE)
    report_lengths(rows, tokenizer)
    dropped = Counter()
    train, val = [cut_pairs(part, tokenizer, dropped) for part in (train, val)]
    print(f'pairs dropped after the cut: {counted(dropped)}')
    parts = {'train': stage_rows(train), 'val': stage_rows(val)}
    counts = write_all(out, {f'{part}.{kind}': rows for part in parts
                             for kind, rows in parts[part].items()})
    show(out)
    return counts | {'accuracy': baseline(train, val, tokenizer)}


if __name__ == '__main__':
    run_cli(main, Config)
