"""
Prepares film reviews of one sentence, positive or negative (Pang and Lee 2005, CC BY 4.0).

    sft      "review:" -> " a sentence": imitate reviews of both kinds
    pairs    "review:", a positive against a negative sentence
    prompts  "review:" and the first 4 to 6 tokens of a sentence, to be continued

One half of the sentences is for the policies and the reward model; a tenth of it is `val`. The
other half is only for the judge (judge.npz, the tables of reward.py), whose accuracy is measured on
the first half. The files' names are the labels. Nothing is random: every order is that of the
sentences' sha256.

    python -m data.sentiment.prepare [--from=FOLDER]
    judge: 13791 words from 5332 sentences; accuracy 0.765 +- 0.006 on the other 5330
"""
import shutil, zipfile, zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data.bpe import write_tokenizer
from data.download import download
from data.look import show
from data.rows import counted, shuffle, write_all
from data.sentiment import reward
from data.text import DataError, load_tokenizer
from prefgpt import run_cli

URL = ('https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/'
       'packages/corpora/sentence_polarity.zip')
FILES = ('rt-polarity.pos', 'rt-polarity.neg')
VOCAB_SIZE = 3072  # with EOS; a sentence is then about 30 tokens, and an embedding still cheap
PROMPT = 'review:'  # every text starts with it, so that SFT, the pairs and PPO share one format
PROMPT_TOKENS = (4, 5, 6)  # of the sentence, after PROMPT
PAIRS_PER_POSITIVE = 2


@dataclass
class Config:
    from_: str = ''  # folder with rt-polarity.pos and .neg; without it they are downloaded
    out: str = 'data/sentiment'  # folder to write to


def read_zip(path):
    """Reads both files, downloading the zip unless it is there; a broken one is deleted."""
    instead = (f'or fetch and unpack it elsewhere, and give the folder that holds {FILES[0]} '
               'with --from=FOLDER')
    if not path.exists():
        download(URL, path, instead=instead)
    try:
        with zipfile.ZipFile(path) as archive:      # reading a file checks its CRC
            return [archive.read(f'sentence_polarity/{name}') for name in FILES]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        path.unlink()
        raise DataError(f'{path}, from {URL}, is not the whole zip ({error}) and was deleted: try '
                        f'again, {instead}') from error


def read_files(folder, out):
    """Returns the bytes of the positive and the negative file, from `folder` or from the zip."""
    if not folder:
        return read_zip(out / 'sentence_polarity.zip')
    files = [Path(folder) / name for name in FILES]
    if missing := [path.name for path in files if not path.is_file()]:
        raise DataError(f"--from={folder}: no {' and no '.join(missing)} there")
    return [path.read_bytes() for path in files]


def decode(data):
    """Decodes a file: the original is latin-1, but some copies are UTF-8."""
    try:                        # first, because latin-1 accepts any bytes
        return data.decode('utf-8-sig')
    except UnicodeDecodeError:
        return data.decode('latin-1')


def clean(pos, neg):
    """
    Returns the positive and the negative sentences of two files, and why others were dropped.

    White space becomes single spaces. Repeated sentences are kept once, since they could fall on
    both sides of a split; those in both classes are dropped, since one label is wrong.
    """
    dropped, classes = Counter(), []
    for data in (pos, neg):
        lines = decode(data).removesuffix('\n').split('\n')     # splitlines cuts at U+0085 too
        sentences = Counter(' '.join(line.split()) for line in lines)
        dropped['empty'] += sentences.pop('', 0)
        dropped['repeated'] += sentences.total() - len(sentences)
        classes.append(sentences)
    both = classes[0].keys() & classes[1].keys()
    dropped['in both classes'] = 2 * len(both)
    return *[[text for text in kept if text not in both] for kept in classes], dropped


def split(sentences):
    """Halves the sentences and holds out a tenth of the first half: {'train', 'val', 'judge'}."""
    order = shuffle(sentences)
    half = len(order) // 2
    tenth = half // 10
    return {'val': order[:tenth], 'train': order[tenth:half], 'judge': order[half:]}


def pair_rows(pos, neg):
    """Pairs each positive sentence with PAIRS_PER_POSITIVE negative ones, in hash order."""
    return [{'prompt': PROMPT, 'chosen': ' ' + text,
             'rejected': ' ' + neg[(i + shift) % len(neg)]}
            for shift in range(PAIRS_PER_POSITIVE) for i, text in enumerate(pos)]


def prompt_rows(sentences, tokenizer, taken, dropped):
    """
    Returns PROMPT and the first 4, 5 or 6 tokens of each sentence, as text.

    Cuts only where the next token starts with a space: then the ids, which PPO encodes anew, are
    those that SFT saw, and the response starts a word. Drops sentences without such a place, and
    prompts already in `taken`, to which it adds the new ones; `dropped` counts why.
    """
    rows = []
    for text in sentences:
        ids = tokenizer.encode_ordinary(' ' + text)
        cuts = [n for n in PROMPT_TOKENS
                if n < len(ids) and tokenizer.decode_single_token_bytes(ids[n]).startswith(b' ')]
        if not cuts:
            dropped['too short' if len(ids) <= PROMPT_TOKENS[0] else 'no word ends there'] += 1
            continue
        cut = cuts[len(rows) % len(cuts)]  # in turn, so that all three lengths occur
        prompt = PROMPT + tokenizer.decode(ids[:cut])
        if tokenizer.encode_ordinary(prompt) != tokenizer.encode_ordinary(PROMPT) + ids[:cut]:
            dropped['does not encode to the same tokens'] += 1
        elif prompt in taken:
            dropped['repeated'] += 1
        else:
            taken.add(prompt)
            rows.append({'prompt': prompt})
    return rows


def make_judge(out, pos, neg):
    """Trains the judge on its half, writes its tables; returns its accuracy on the other half."""
    judge = reward.fit(pos['judge'], neg['judge'])
    reward.save(out / 'judge.npz', judge)
    code = Path(reward.__file__)
    if out.resolve() != code.parent.resolve():
        shutil.copyfile(code, out / 'reward.py')  # it looks for judge.npz beside itself
    right = [reward.log_odds(judge, text) > 0 for text in pos['train'] + pos['val']]
    right += [reward.log_odds(judge, text) <= 0 for text in neg['train'] + neg['val']]
    accuracy = sum(right) / len(right)
    error = (accuracy * (1 - accuracy) / len(right)) ** 0.5
    print(f"judge: {len(judge)} words from {len(pos['judge']) + len(neg['judge'])} sentences; "
          f'accuracy {accuracy:.3f} +- {error:.3f} on the other {len(right)}')
    return accuracy


def main(cfg):
    """Writes the data set; returns counts of rows, of what gave no prompt, and the accuracy."""
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    pos, neg, dropped = clean(*read_files(cfg.from_, out))
    print(f'sentences: {len(pos)} positive, {len(neg)} negative; dropped: {counted(dropped)}')
    if min(len(pos), len(neg)) < 20:  # a tenth of a half
        raise DataError(f'{len(pos)} positive and {len(neg)} negative sentences: need 20 of each')
    pos, neg = split(pos), split(neg)
    # val comes first, so that train gets no prompt that starts sentences of both
    texts = {part: shuffle(pos[part] + neg[part]) for part in ('val', 'train')}
    write_tokenizer(out, 'sentiment', [f'{PROMPT} {text}' for text in texts['train']], VOCAB_SIZE)
    tokenizer = load_tokenizer(out / 'sentiment.tiktoken')
    rows, taken, no_prompt = {}, set(), Counter()
    for part, sentences in texts.items():
        rows[f'{part}.sft'] = [{'prompt': PROMPT, 'completion': ' ' + text} for text in sentences]
        rows[f'{part}.pairs'] = pair_rows(pos[part], neg[part])
        rows[f'{part}.prompts'] = prompt_rows(sentences, tokenizer, taken, no_prompt)
    counts = write_all(out, rows)
    print(f'sentences that gave no prompt: {counted(no_prompt)}')
    show(out)
    return counts | {'accuracy': make_judge(out, pos, neg), 'no_prompt': dict(no_prompt)}


if __name__ == '__main__':
    run_cli(main, Config)
