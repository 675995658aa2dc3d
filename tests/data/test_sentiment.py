"""
data/sentiment: cleaning, splits, prompts, the naive Bayes judge, the download, the errors.

Runs on a few synthetic sentences in a temporary folder, without a network; it does not look at
the real reviews, so it says nothing about how accurate the judge is on them.
"""
import json
import math
import shutil
import zipfile
from collections import Counter

import pytest

from data.bpe import write_tiktoken
from data.rows import write_rows
from data.sentiment import prepare, reward
from data.text import DataError, load_judge, load_rows, load_tokenizer

GOOD = ['moving', 'funny', 'warm', 'brilliant', 'tender']
BAD = ['dull', 'lame', 'empty', 'tedious', 'awful']
WORDS = ['film', 'story', 'cast', 'plot', 'score', 'ending', 'script', 'hero']


def sentences(adjectives):
    """80 different sentences of 11 words with two of the adjectives in them."""
    return [f'the {WORDS[i % 8]} of this {adjectives[i % 5]} caf\xe9 tale number {i} is '
            f'{adjectives[i // 5 % 5]} .' for i in range(80)]


def write_source(folder, encoding='latin-1', reverse=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, adjectives in zip(prepare.FILES, (GOOD, BAD)):
        lines = sentences(adjectives)[::-1 if reverse else 1]
        (folder / name).write_bytes(''.join(line + ' \n' for line in lines).encode(encoding))
    return folder


def prepared(tmp_path, monkeypatch, name='out', **source):
    """Run prepare on synthetic files with a small BPE; returns (out folder, what main returned)."""
    monkeypatch.setattr(prepare, 'VOCAB_SIZE', 320)
    folder = write_source(tmp_path / f'source-{name}', **source)
    out = tmp_path / name
    return out, prepare.main(prepare.Config(from_=str(folder), out=str(out)))


def texts(path, key):
    return [json.loads(line)[key] for line in path.read_text(encoding='utf-8').splitlines()]


# --- cleaning ---

def test_clean_counts_what_it_drops():
    pos = 'a caf\xe9 .\n\n  two   spaces \na caf\xe9 . \r\nin both\n'.encode('latin-1')
    neg = b'in both\nbad \x85 one\nbad one\n'
    kept_pos, kept_neg, dropped = prepare.clean(pos, neg)
    assert kept_pos == ['a caf\xe9 .', 'two spaces']
    assert kept_neg == ['bad one']                  # latin-1's 0x85 is white space, not a new line
    assert dropped == {'empty': 1, 'repeated': 2, 'in both classes': 2}


# --- splits and rows ---

def test_no_sentence_is_on_two_sides_and_pairs_are_good_against_bad(tmp_path, monkeypatch):
    out, counts = prepared(tmp_path, monkeypatch)
    judge = {' ' + text for words in (GOOD, BAD)
             for text in prepare.split(sentences(words))['judge']}
    train, val = [set(texts(out / f'{part}.sft.jsonl', 'completion')) for part in ('train', 'val')]
    everything = {' ' + text for text in sentences(GOOD) + sentences(BAD)}
    assert train | val | judge == everything
    assert [len(part) for part in (train, val, judge)] == [72, 8, 80]       # so they are disjoint
    positive = {' ' + text for text in sentences(GOOD)}
    for part, side in (('train', train), ('val', val)):
        pairs = load_rows(out / f'{part}.pairs.jsonl', 'pairs')
        assert counts[f'{part}.sft'] == counts[f'{part}.pairs'] == len(pairs) == len(side)
        assert {row['prompt'] for row in pairs} == {'review:'}
        assert len({(row['chosen'], row['rejected']) for row in pairs}) == len(pairs)
        for key, right in (('chosen', positive), ('rejected', everything - positive)):
            used = Counter(row[key] for row in pairs)       # every sentence exactly twice
            assert used == dict.fromkeys(side & right, prepare.PAIRS_PER_POSITIVE)


def test_prompts_are_tokens_of_reviews(tmp_path, monkeypatch):
    out, counts = prepared(tmp_path, monkeypatch)
    tokenizer = load_tokenizer(out / (out / 'tokenizer').read_text().strip())
    assert tokenizer.n_vocab == 320
    head = tokenizer.encode_ordinary('review:')
    prompts = {}
    for part in ('train', 'val'):
        prompts[part] = texts(out / f'{part}.prompts.jsonl', 'prompt')
        reviews = texts(out / f'{part}.sft.jsonl', 'completion')
        for prompt in prompts[part]:
            ids = tokenizer.encode_ordinary(prompt)
            assert ids[:len(head)] == head
            start = ids[len(head):]
            assert len(start) in (4, 5, 6)
            # the same ids as in SFT, and what is to be said next starts with a space
            begun = [text for text in reviews
                     if tokenizer.encode_ordinary(text)[:len(start)] == start]
            assert begun and all(text[len(prompt) - len('review:')] == ' ' for text in begun)
    assert not set(prompts['train']) & set(prompts['val'])
    assert len(set(prompts['train'])) == len(prompts['train']) == counts['train.prompts']
    assert sum(counts['no_prompt'].values()) + counts['train.prompts'] + counts['val.prompts'] == 80


def test_cuts_by_hand(tmp_path):
    """With a tokenizer of single bytes, so that " abc" is four tokens."""
    write_tiktoken(tmp_path / 'bytes.tiktoken', {bytes([i]): i for i in range(256)})
    tokenizer = load_tokenizer(tmp_path / 'bytes.tiktoken')
    taken, dropped = {'review: held'}, Counter()
    rows = prepare.prompt_rows(['abc de', 'abcde f', 'abc x', 'held out', 'abcdef g', 'abc', 'uvw'],
                               tokenizer, taken, dropped)
    assert [row['prompt'] for row in rows] == ['review: abc', 'review: abcde']
    assert dropped == {'repeated': 2, 'no word ends there': 1, 'too short': 2}
    rows = prepare.prompt_rows(['rst x y', 'uvw x y'], tokenizer, set(), dropped)
    assert [row['prompt'] for row in rows] == ['review: rst', 'review: uvw x']  # 4 tokens, then 6


def test_two_runs_write_the_same_bytes(tmp_path, monkeypatch):
    """Whatever the order of lines and the encoding of the source; and the judge there works."""
    first, counts = prepared(tmp_path, monkeypatch, 'first')
    second, _ = prepared(tmp_path, monkeypatch, 'second', reverse=True, encoding='utf-8')
    names = {path.name for path in first.iterdir()}
    assert names == {'judge.npz', 'reward.py', 'sentiment.tiktoken', 'tokenizer',
                     'train.sft.jsonl', 'train.pairs.jsonl', 'train.prompts.jsonl',
                     'val.sft.jsonl', 'val.pairs.jsonl', 'val.prompts.jsonl'}
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert counts['accuracy'] == 1.0                # the adjectives give the class away
    score = load_judge(first / 'reward.py')
    assert score('review:', ' a moving and funny film .')['positive'] == 1.0
    assert score('review:', ' a lame and tedious film .')['positive'] == 0.0


# --- the judge ---

# By hand. Each sentence counts a word once.
#   positive: "good film" "Good fun ."      good 2, film 1, fun 1, . 1            total 5
#   negative: "bad film"  "bad , bad"       bad 2, film 1, "," 1                  total 4
# V = 6 different words, so P(good | positive) = (2 + 1) / (5 + 6), P(good | negative) = 1 / (4 + 6)
BY_HAND = {'good': (3 / 11) / (1 / 10), 'film': (2 / 11) / (2 / 10), 'fun': (2 / 11) / (1 / 10),
           '.': (2 / 11) / (1 / 10), 'bad': (1 / 11) / (3 / 10), ',': (1 / 11) / (2 / 10)}


def fit_by_hand():
    return reward.fit(['good film', 'Good fun .'], ['bad film', 'bad , bad'])


def test_naive_bayes_by_hand():
    judge = fit_by_hand()
    assert judge == pytest.approx({word: math.log(ratio) for word, ratio in BY_HAND.items()})
    # 30/11 x 10/11 = 300/121: repeated and unknown words add nothing, upper case is no other word
    assert reward.log_odds(judge, 'GOOD good film unheard') == pytest.approx(math.log(300 / 121))
    assert reward.log_odds(judge, 'a bad,film') == pytest.approx(math.log(500 / (33 * 11 * 11)))
    assert reward.log_odds(judge, '') == 0.0


def judge_beside(folder, judge):
    """score() of a copy of reward.py beside these tables, without which it says what to run."""
    folder.mkdir()
    shutil.copyfile(reward.__file__, folder / 'reward.py')
    with pytest.raises(DataError, match=r'judge\.npz.*data\.sentiment\.prepare'):
        load_judge(folder / 'reward.py')('review:', ' good')
    reward.save(folder / 'judge.npz', judge)
    return load_judge(folder / 'reward.py')


def test_score_reads_the_response_only_and_is_clipped(tmp_path):
    score = judge_beside(tmp_path / 'hand', fit_by_hand())
    good = score('review: bad bad', ' good')
    assert good['reward'] == pytest.approx(math.log(30 / 11)) and good['positive'] == 1.0
    bad = score('review: good', ' bad')
    assert bad['reward'] == pytest.approx(math.log(10 / 33)) and bad['positive'] == 0.0
    for nothing in ('', '  ', ' unheard'):
        assert score('review: good', nothing) == {'reward': 0.0, 'positive': 0.0}
    score = judge_beside(tmp_path / 'clipped', {'praise': 5.0, 'more': 5.0, 'blame': -9.0})
    assert score('', ' praise')['reward'] == 5.0
    assert score('', ' praise more')['reward'] == reward.CLIP
    assert score('', ' blame') == {'reward': -reward.CLIP, 'positive': 0.0}


# --- the source: download, folder, errors ---

def write_zip(tmp_path):
    folder = write_source(tmp_path / 'source')
    path = tmp_path / 'there.zip'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name in prepare.FILES:
            archive.write(folder / name, f'sentence_polarity/{name}')
    return folder, path


def test_download_then_no_second_one(tmp_path, monkeypatch, capsys):
    folder, there = write_zip(tmp_path)
    out = tmp_path / 'out'
    out.mkdir()
    monkeypatch.setattr(prepare, 'URL', there.as_uri())
    expected = prepare.read_files(str(folder), out)
    assert prepare.read_files('', out) == expected
    size = there.stat().st_size >> 10
    assert f'download {size} / {size} KB' in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ['sentence_polarity.zip']
    there.unlink()
    assert prepare.read_files('', out) == expected  # what was downloaded is kept


def test_download_that_is_no_whole_zip_leaves_nothing(tmp_path, monkeypatch):
    """Catches a damaged zip that stays: every later call would find it and fail."""
    _, there = write_zip(tmp_path)
    monkeypatch.setattr(prepare, 'URL', there.as_uri())
    whole = there.read_bytes()
    flipped = bytearray(whole)
    flipped[200] ^= 0xff                            # inside the first compressed file
    target = tmp_path / 'target.zip'
    for damaged in (whole[:len(whole) // 2], b'<html>not found</html>', b'', bytes(flipped)):
        there.write_bytes(damaged)
        with pytest.raises(DataError, match='not a whole zip.*--from=FOLDER'):
            prepare.fetch_zip(target)
        assert sorted(path.name for path in tmp_path.iterdir()) == ['source', 'there.zip']
    target.write_bytes(b'left by an interrupted check')     # what is there is looked at as well
    with pytest.raises(DataError, match='not a whole zip'):
        prepare.fetch_zip(target)
    assert not target.exists()
    there.unlink()
    with pytest.raises(DataError, match='could not download.*--from=FOLDER'):
        prepare.fetch_zip(target)


def test_missing_files_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / 'sentence_polarity.zip', 'w') as archive:
        archive.writestr('README', 'other')
    with pytest.raises(DataError, match='no sentence_polarity/rt-polarity.neg, .*pos in it'):
        prepare.read_files('', tmp_path)
    with pytest.raises(DataError, match='no rt-polarity.pos and no rt-polarity.neg there'):
        prepare.read_files(str(tmp_path / 'nowhere'), tmp_path)
    folder = write_source(tmp_path / 'source')
    (folder / 'rt-polarity.neg').unlink()
    with pytest.raises(DataError, match=r'source: no rt-polarity\.neg there'):
        prepare.read_files(str(folder), tmp_path)


def test_too_few_sentences(tmp_path):
    for name in prepare.FILES:
        (tmp_path / name).write_text(f'only one in {name}\n')
    with pytest.raises(DataError, match='1 positive and 1 negative sentences: need 20'):
        prepare.main(prepare.Config(from_=str(tmp_path), out=str(tmp_path / 'out')))
    with pytest.raises(DataError, match='train.prompts.jsonl: no rows left'):
        write_rows(tmp_path / 'train.prompts.jsonl', [])
