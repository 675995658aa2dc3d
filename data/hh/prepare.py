"""
Dialogues with an assistant, and which of two replies people preferred: the helpful part of
Anthropic's HH-RLHF (Bai et al. 2022, MIT licence).

Every row of the source is the same dialogue twice, with two last replies. Written are

    train.pairs.jsonl    the dialogue up to "\\n\\nAssistant:", the preferred and the other reply
    train.sft.jsonl      the same, with the preferred reply alone
    train.prompts.jsonl  the distinct dialogues, to be answered
    val.*.jsonl          the same three, of other dialogues
    tokenizer, hh.tiktoken, template.txt    a BPE trained on the training dialogues; or 'gpt2'

Held out is a tenth of the FIRST human turns with all that follows them: the source holds some
dialogues several times, at different lengths, and a longer one gives away the replies that the
shorter one asks for. No random number is drawn: every order is that of a sha256.

Replies are cut at 128 tokens, EOS included, and a cut one is marked ("chosen_cut": true): no EOS
will follow it. Prompts stay whole here; encode_rows cuts them on the left, to the block.

There is no judge (reward.py): what people prefer has no exact one. What a reward model has to
beat is printed instead: a linear model of which words a reply holds and how long it is, on the
same held-out pairs. What this file does not do: repair the labels, which are noisy, find
near-duplicates, or mark replies that were cut when they were collected: some of those that stay
whole here end within a sentence, and all the same get their EOS.

    python -m data.hh.prepare [--from=FOLDER] [--tokenizer=gpt2]
    baseline on 607 held-out pairs: tokens and length (l2 0.03) rank 0.610 +- 0.020 correctly; ...

(that line is of the test files of helpful-base, -online and -rejection-sampled).
"""
import gzip
import json
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from data.bpe import train_bpe, write_tiktoken
from data.download import download
from data.rows import counted, shuffle, spread, write_rows
from data.text import HH_TEMPLATE, RESPONSES, DataError, from_transcripts, load_tokenizer, string_of
from prefgpt import UserError, run_cli

URL = 'https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/helpful-base/'
FILES = {'train.jsonl.gz': '',  # its sha256 is not known to us; gzip's own checksum is looked at
         'test.jsonl.gz': '8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b'}
VOCAB_SIZE = 8192  # with EOS
BLOCK_SIZE = 256  # what lengths are reported for; encode_rows does the cutting of prompts
REPLY_TOKENS = 128  # with EOS; half the block, so that the prompt has the other half
L2_STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3)  # of the baseline, tried on training pairs


@dataclass
class Config:
    from_: str = ''  # folder with *.jsonl.gz or *.jsonl, at any depth; without it: a download
    tokenizer: str = ''  # gpt2 for tiktoken's; without it a BPE is trained on the training text
    out: str = 'data/hh'  # folder to write to


# --- reading ---

def find_files(folder, out):
    """The source files: those below `folder`, or the hub's two, downloaded into `out`."""
    if folder:
        ours = [f'{part}.{kind}.jsonl' for part in ('train', 'val') for kind in RESPONSES]
        files = sorted(path for path in Path(folder).rglob('*.jsonl*')
                       if path.name.endswith(('.jsonl', '.jsonl.gz')) and path.name not in ours)
        if not files:
            raise DataError(f'--from={folder}: no *.jsonl.gz and no *.jsonl below it')
        return files
    files = [out / f'helpful-base.{name}' for name in FILES]
    for path, (name, sha256) in zip(files, FILES.items()):
        if not path.exists():
            download(URL + name, path, sha256, 'or fetch the files of helpful-base elsewhere, '
                     'and give the folder that holds them with --from=FOLDER')
    return files


def read_rows(path):
    """The rows of a .jsonl or .jsonl.gz file; raises DataError with the line of a broken one."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == '.gz' else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f'{path}: cannot be read ({error}); if it is damaged, delete it and '
                        'fetch it again') from None
    rows = []
    for number, line in enumerate(data.split(b'\n'), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append((string_of(row, 'chosen'), string_of(row, 'rejected')))
        except json.JSONDecodeError as error:
            raise DataError(f'{path}:{number}: {error.msg} at column {error.colno}') from None
        except (ValueError, RecursionError) as error:  # a byte that is not UTF-8 is a ValueError
            raise DataError(f'{path}:{number}: {error}') from None
    return rows


def clean(transcripts, taken, dropped):
    """
    Pairs of transcripts -> rows {prompt, chosen, rejected}; `dropped` counts why others are not.

    Rows that are in `taken` (which grows) are repeated ones.
    """
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
    """The clean rows of all files, in hash order; prints what was read and dropped, by file."""
    rows, taken = [], set()
    for path in files:
        transcripts, dropped = read_rows(path), Counter()
        kept = clean(transcripts, taken, dropped)
        print(f'{path}: {len(transcripts)} rows, {len(kept)} kept; dropped: {counted(dropped)}')
        rows += kept
    return shuffle(rows, lambda row: '\0'.join(row.values()))


# --- splitting and cutting ---

def first_turn(row):
    """A dialogue up to its first reply: what all longer and shorter versions of it share."""
    return row['prompt'].split('\n\nAssistant:')[0]


def split(rows):
    """(train, val): a tenth of the first human turns is held out, with all their rows."""
    turns = shuffle({first_turn(row) for row in rows})
    if len(turns) < 2:
        raise DataError(f'{len(rows)} rows with {len(turns)} first turns: none can be held out')
    held_out = set(turns[:max(1, len(turns) // 10)])
    return ([row for row in rows if first_turn(row) not in held_out],
            [row for row in rows if first_turn(row) in held_out])


def cut(text, tokenizer):
    """
    (text, False), or (the start of the text, True) if it and EOS are more than REPLY_TOKENS.

    A start must be valid text that encodes to the same ids again, or it would not be what the
    model sees of the reply. So tokens go that end within a character, or that are whole only by
    what comes after them: "\\n\\n" is one token at the end of a text, but two before a word.
    """
    ids = tokenizer.encode_ordinary(text)
    if len(ids) < REPLY_TOKENS:
        return text, False
    for end in range(REPLY_TOKENS, 0, -1):
        try:
            start = tokenizer.decode_bytes(ids[:end]).decode()
        except UnicodeDecodeError:
            continue
        if tokenizer.encode_ordinary(start) == ids[:end]:
            return start, True
    return '', True


def cut_pairs(rows, tokenizer, dropped):
    """Rows with their replies cut and marked; those that the cut made equal are dropped."""
    pairs = []
    for row in rows:
        chosen, chosen_cut = cut(row['chosen'], tokenizer)
        rejected, rejected_cut = cut(row['rejected'], tokenizer)
        if chosen == rejected:
            dropped['equal once cut'] += 1
            continue
        marks = {'chosen_cut': chosen_cut, 'rejected_cut': rejected_cut}
        pairs.append({'prompt': row['prompt'], 'chosen': chosen, 'rejected': rejected}
                     | {key: True for key, was_cut in marks.items() if was_cut})
    return pairs


def sft_row(pair):
    """A demonstration: the chosen reply of a pair."""
    row = {'prompt': pair['prompt'], 'completion': pair['chosen']}
    return row | {'completion_cut': True} if 'chosen_cut' in pair else row


def prompt_rows(pairs):
    """The distinct prompts of pairs."""
    return [{'prompt': prompt} for prompt in dict.fromkeys(pair['prompt'] for pair in pairs)]


# --- the baseline ---

def reply_ids(pair, side, tokenizer):
    """The ids that a reward model reads of a reply: with EOS, unless it was cut."""
    ids = tokenizer.encode_ordinary(pair[side])
    return ids if f'{side}_cut' in pair else ids + [tokenizer.eot_token]


def bags(pairs, side, tokenizer):
    """log(1 + count) of every token of the replies, and of all together: (pairs, V + 1), sparse."""
    ids = [reply_ids(pair, side, tokenizer) for pair in pairs]
    ids = [row + [tokenizer.n_vocab] * len(row) for row in ids]  # "all" is one more token
    places = torch.stack([
        torch.arange(len(ids)).repeat_interleave(torch.tensor([len(row) for row in ids])),
        torch.tensor([token for row in ids for token in row])])
    ones = torch.ones(places.size(1), dtype=torch.float64)
    counts = torch.sparse_coo_tensor(places, ones, (len(ids), tokenizer.n_vocab + 1),
                                     check_invariants=True).coalesce()  # adds what falls together
    return counts.log1p()


def features(pairs, tokenizer):
    """What differs within each pair, chosen less rejected: (pairs, V + 1), sparse."""
    return bags(pairs, 'chosen', tokenizer) - bags(pairs, 'rejected', tokenizer)


def fit(x, l2):
    """Weights (V + 1, 1) that minimise Bradley and Terry's loss + l2 |w|^2, a convex problem."""
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
    Returns the share of held-out pairs that a linear model of tokens and length ranks correctly,
    and its l2.

    How strongly it is held back, l2, is chosen by the loss on a tenth of the training pairs; val
    is looked at once.
    """
    some, others = [features(part, tokenizer) for part in split(train)]
    l2 = min(L2_STRENGTHS, key=lambda l2: F.softplus(-(others @ fit(some, l2))).mean().item())
    margins = features(val, tokenizer) @ fit(features(train, tokenizer), l2)
    return (margins > 0).double().mean().item(), l2


# --- the whole ---

def make_tokenizer(out, which, rows):
    """A BPE trained on the text of the rows, or 'gpt2'; returns the tiktoken.Encoding."""
    if not which:
        ranks = train_bpe((text for row in rows for text in row.values()), VOCAB_SIZE)
        write_tiktoken(out / 'hh.tiktoken', ranks)
    (out / 'tokenizer').write_text(f"{which or 'hh.tiktoken'}\n", encoding='utf-8')
    return load_tokenizer(which or out / 'hh.tiktoken')


def longer(chosen, rejected):
    """From lengths, the share of pairs whose chosen reply is the longer one; a tie counts half."""
    return sum(0.5 if a == b else a > b for a, b in zip(chosen, rejected)) / len(chosen)


def report_lengths(rows, tokenizer):
    """Print tokens of prompts and of uncut replies, and how many of them are too long."""
    prompts, chosen, rejected = [[len(tokenizer.encode_ordinary(row[key])) for row in rows]
                                 for key in ('prompt', 'chosen', 'rejected')]
    print(f'tokenizer: {tokenizer.n_vocab} tokens')
    for name, lengths in (('prompt', prompts), ('chosen', chosen), ('rejected', rejected)):
        print(f'{name + " tokens":<15} {spread(lengths)}')
    room = BLOCK_SIZE - REPLY_TOKENS
    print(f'prompts: {sum(n > room for n in prompts)} of {len(rows)} have more than {room} tokens; '
          f'--block_size={BLOCK_SIZE} keeps their right end, beside a reply of {REPLY_TOKENS}')
    print(f'replies: {sum(n >= REPLY_TOKENS for n in chosen + rejected)} of {2 * len(rows)} have '
          f'more than {REPLY_TOKENS} tokens, with EOS, and are cut; before that the chosen one is '
          f'the longer in {longer(chosen, rejected):.3f}')


def report_baseline(train, val, tokenizer):
    """Print what a reward model has to beat on val; returns the accuracy."""
    accuracy, l2 = baseline(train, val, tokenizer)
    error = (accuracy * (1 - accuracy) / len(val)) ** 0.5
    lengths = [[len(reply_ids(pair, side, tokenizer)) for pair in val]
               for side in ('chosen', 'rejected')]
    print(f'baseline on {len(val)} held-out pairs: tokens and length (l2 {l2:g}) rank '
          f'{accuracy:.3f} +- {error:.3f} correctly; the longer reply is chosen: '
          f'{longer(*lengths):.3f}')
    return accuracy


def main(cfg):
    """Write the data set; returns the counts of rows and the baseline's accuracy."""
    if cfg.tokenizer not in ('', 'gpt2'):
        raise UserError(f'--tokenizer={cfg.tokenizer}: gpt2, or leave it out to train a BPE')
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = read_files(find_files(cfg.from_, out))
    train, val = split(rows)
    tokenizer = make_tokenizer(out, cfg.tokenizer, train)
    (out / 'template.txt').write_bytes(HH_TEMPLATE.encode())
    report_lengths(rows, tokenizer)
    dropped, counts = Counter(), {}
    pairs = {'train': cut_pairs(train, tokenizer, dropped),
             'val': cut_pairs(val, tokenizer, dropped)}
    print(f'pairs dropped after the cut: {counted(dropped)}')
    for part, some in pairs.items():
        for kind, listed in (('sft', [sft_row(pair) for pair in some]), ('pairs', some),
                             ('prompts', prompt_rows(some))):
            write_rows(out / f'{part}.{kind}.jsonl', listed)
            counts[f'{part}.{kind}'] = len(listed)
            print(f'{out / part}.{kind}.jsonl: {len(listed)} rows')
    for row in pairs['train'][:2]:  # repr: text from a file may hold control characters
        print(f"pair   {row['prompt']!r}\n  chosen   {row['chosen']!r}\n"
              f"  rejected {row['rejected']!r}")
    return counts | {'accuracy': report_baseline(pairs['train'], pairs['val'], tokenizer)}


if __name__ == '__main__':
    run_cli(main, Config)
