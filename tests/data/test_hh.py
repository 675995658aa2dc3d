"""
data/hh: what is dropped, the split by first turns, the cut, the files, the baseline, the errors.

    python -m pytest -q tests/data/test_hh.py

Runs on a few synthetic dialogues in a temporary folder, without a network; it does not look at
the real rows, so it says nothing about how accurate the baseline is on them.
"""
import gzip
import json
import math
import random
import string
from collections import Counter

import pytest

from data.hh import prepare
from data.text import HH_TEMPLATE, DataError, build_tokenizer, encode_rows, load_rows, load_text
from prefgpt import UserError, parse_config

from conftest import BYTE_TOKENS, EOS

KINDS = ('sft', 'pairs', 'prompts')
WORDS = ['wash', 'the', 'caf\xe9', '\u2019s', '\u65e5\u672c\u8a9e', 'cup', 'with', 'soap', 'and',
         '\U0001f600', 'a\n\nline', 'two  spaces']


def prompt_of(number, turns):
    """The prompt of a dialogue about something, after so many human turns."""
    return ' do it.'.join(f'\n\nHuman: number {number}, step {i}?\n\nAssistant:'
                          for i in range(turns))


def transcripts():
    """80 pairs: every other one of 40 dialogues appears again, with one or two turns more."""
    rng = random.Random(0)
    pairs = []
    for i in range(80):
        prompt = prompt_of(i % 60 % 40, 1 + i // 40 + (i % 2 if i >= 40 else 0))
        yes, no = [' '.join(rng.choices(WORDS, k=rng.choice([2, 3, 30]))) for _ in range(2)]
        pairs.append({'chosen': f'{prompt} yes {yes}.', 'rejected': f'{prompt} no {no}.'})
    return pairs


def write_source(folder, reverse=False, packed=True):
    """The pairs in two files, one of them in a folder; packed or not, in one order or the other."""
    pairs = transcripts()[::-1 if reverse else 1]
    (folder / 'base').mkdir(parents=True)
    for name, some in (('base/train.jsonl', pairs[:50]), ('test.jsonl', pairs[50:])):
        data = ''.join(json.dumps(row, ensure_ascii=packed) + '\n' for row in some).encode()
        (folder / f'{name}.gz' if packed else folder / name).write_bytes(
            gzip.compress(data) if packed else data)
    (folder / 'README.md').write_text('not a source')
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A BPE of 320 tokens and replies of 24, so that synthetic ones are cut; a quick baseline."""
    monkeypatch.setattr(prepare, 'VOCAB_SIZE', 320)
    monkeypatch.setattr(prepare, 'REPLY_TOKENS', 24)
    monkeypatch.setattr(prepare, 'L2_STRENGTHS', (0.001, 0.1))


def prepared(tmp_path, name='out', **source):
    """Run prepare on synthetic files; returns (out folder, what main returned)."""
    folder = write_source(tmp_path / f'source-{name}', **source)
    out = tmp_path / name
    return out, prepare.main(prepare.Config(from_=str(folder), out=str(out)))


def source_rows(source):
    return prepare.read_files(prepare.find_files(source, None))


# --- cleaning, split, cut ---

def test_clean_counts_what_it_drops():
    """Catches a row of another prompt, without a difference or without a reply that gets in."""
    prompt = prompt_of(1, 2)
    good, taken, dropped = (f'{prompt} a', f'{prompt} b'), set(), Counter()
    pairs = [good,
             (f'{prompt} a', f'{prompt_of(2, 2)} b'),       # other prompts
             (f'{prompt} a', '\n\nHuman: no reply'),        # no prompt at all
             (f'{prompt} a', f'{prompt} a'),
             (f'{prompt} ', f'{prompt} b'), (f'{prompt} a', prompt),
             good]
    rows = prepare.clean(pairs, taken, dropped)
    assert rows == [{'prompt': prompt, 'chosen': ' a', 'rejected': ' b'}]
    assert dropped == {'prompts that differ': 2, 'equal replies': 1, 'empty replies': 2,
                       'repeated': 1}
    assert prepare.clean([good], taken, dropped) == [] and dropped['repeated'] == 2


def test_repeated_rows_of_several_files(tmp_path, capsys):
    """Catches a row that counts twice because two files hold it."""
    source = write_source(tmp_path / 'source')
    (source / 'copy.jsonl').write_bytes(gzip.decompress((source / 'test.jsonl.gz').read_bytes()))
    assert len(source_rows(source)) == 80
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(': ')[2] for line in lines] == [
        '50 rows, 50 kept; dropped: none', '30 rows, 30 kept; dropped: none',
        '30 rows, 0 kept; dropped: 30 repeated']


def test_dialogues_with_one_beginning_are_on_one_side(tmp_path):
    """Catches a held-out prompt whose reply stands in a longer dialogue of the training rows."""
    train, val = prepare.split(source_rows(write_source(tmp_path / 'source')))
    numbers = [{row['prompt'].split(',')[0] for row in part} for part in (train, val)]
    assert not numbers[0] & numbers[1]
    assert (len(numbers[0]), len(numbers[1])) == (36, 4)
    assert len(train) + len(val) == 80 and len(val) > 4         # some of them at several lengths
    assert any(row['prompt'].count('Human:') > 1 for row in val)
    # A first turn ends neither at its first blank line nor at the last reply
    row = {'prompt': '\n\nHuman: one\n\ntwo\n\nAssistant: three\n\nHuman: four\n\nAssistant:'}
    assert prepare.first_turn(row) == '\n\nHuman: one\n\ntwo'


def test_the_cut_by_hand(byte_tokenizer, monkeypatch):
    """Catches a start that ends within a character or encodes to other ids, and no room for EOS."""
    monkeypatch.setattr(prepare, 'REPLY_TOKENS', 4)
    for text, expected in {'abc': ('abc', False),               # and EOS is the fourth
                           'abcd': ('abcd', True),              # EOS would be the fifth
                           'abcde': ('abcd', True),
                           'ab\xe9d': ('ab\xe9', True),
                           'abc\xe9': ('abc', True),            # its first byte alone is no text
                           'a\U0001f600': ('a', True)}.items():
        assert prepare.cut(text, byte_tokenizer) == expected, text
    # A blank line is two tokens before a word, but one at the end of the start
    tokenizer = build_tokenizer(BYTE_TOKENS + 'Cgo= 256\n')     # b'\n\n'
    assert tokenizer.encode_ordinary('a\n\nb') == [97, 10, 10, 98]
    assert tokenizer.encode_ordinary('a\n\n') == [97, 256]
    monkeypatch.setattr(prepare, 'REPLY_TOKENS', 3)
    assert prepare.cut('a\n\nb', tokenizer) == ('a\n', True)


def test_cut_replies_have_no_eos_in_any_stage(tmp_path):
    """Catches a mark that is lost, misspelt or set on a whole reply, which ends in a full stop."""
    out, _ = prepared(tmp_path)
    tokenizer, _ = load_text(out)
    seen = Counter()
    for kind in ('sft', 'pairs'):
        rows = load_rows(out / f'train.{kind}.jsonl', kind)
        for _, *responses in encode_rows(rows, kind, tokenizer, block_size=400):
            for side, ids in enumerate(responses):
                whole = ids[-1] == tokenizer.eot_token
                assert len(ids) <= 24 and (whole or len(ids) > 16)
                assert whole <= tokenizer.decode(ids).endswith('.<|endoftext|>')
                seen[kind, side, whole] += 1
    assert len(seen) == 6 and min(seen.values()) > 5


def test_pairs_that_the_cut_makes_equal_are_dropped(byte_tokenizer):
    """Catches pairs that would teach a preference between two equal replies."""
    rows = [{'prompt': 'P', 'chosen': 'a' * 30 + 'b', 'rejected': 'a' * 30 + 'c'},
            {'prompt': 'P', 'chosen': 'a' * 30, 'rejected': 'c'}]
    dropped = Counter()
    assert prepare.cut_pairs(rows, byte_tokenizer, dropped) == [
        {'prompt': 'P', 'chosen': 'a' * 24, 'rejected': 'c', 'chosen_cut': True}]
    assert dropped == {'equal once cut': 1}


# --- the files ---

def test_the_files_agree(tmp_path):
    """Catches a side mixed up, a prompt missing or twice, a row in two parts."""
    out, counts = prepared(tmp_path)
    for part in ('train', 'val'):
        files = [out / f'{part}.{kind}.jsonl' for kind in KINDS]
        sft, pairs, prompts = [[json.loads(line) for line in path.read_text().splitlines()]
                               for path in files]
        assert all(row['chosen'].startswith(' yes') and row['rejected'].startswith(' no')
                   for row in pairs)
        assert [(row['prompt'], row['completion']) for row in sft] == [
            (row['prompt'], row['chosen']) for row in pairs]
        assert [row['prompt'] for row in prompts] == list(
            dict.fromkeys(row['prompt'] for row in pairs))
        for path, kind in zip(files, KINDS):
            assert counts[path.stem] == len(load_rows(path, kind))
    assert counts['train.pairs'] + counts['val.pairs'] == 80
    tokenizer, text = load_text(out)
    assert tokenizer.n_vocab == 320 and text['template'] == HH_TEMPLATE
    assert (out / 'tokenizer').read_text() == 'hh.tiktoken\n'


def test_the_bpe_reads_the_training_text_only(tmp_path, monkeypatch):
    """Catches held-out text in the vocabulary, and replies that are cut before they are read."""
    seen, real = [], prepare.write_tokenizer
    monkeypatch.setattr(prepare, 'write_tokenizer', lambda out, name, texts, size: real(
        out, name, seen.extend(texts) or seen, size))
    prepared(tmp_path)
    train, _ = prepare.split(source_rows(tmp_path / 'source-out'))
    assert sorted(seen) == sorted(text for row in train for text in row.values())


def test_two_runs_write_the_same_bytes(tmp_path):
    """Whatever the order of rows and files, packed or not; catches an order by set or by file."""
    first, counts = prepared(tmp_path, 'first')
    second, again = prepared(tmp_path, 'second', reverse=True, packed=False)
    names = {path.name for path in first.iterdir()}
    assert names == {'tokenizer', 'template.txt', 'hh.tiktoken'} | {
        f'{part}.{kind}.jsonl' for part in ('train', 'val') for kind in KINDS}
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert counts == again                          # the baseline's accuracy too


def test_the_tokenizer_may_be_gpt2(tmp_path, monkeypatch, byte_tokenizer):
    """Catches a BPE trained for nothing, or replies cut by another tokenizer than the one named."""
    asked = []
    monkeypatch.setattr(prepare, 'load_tokenizer',
                        lambda where: asked.append(where) or byte_tokenizer)
    source, out = write_source(tmp_path / 'source'), tmp_path / 'out'
    prepare.main(prepare.Config(from_=str(source), tokenizer='gpt2', out=str(out)))
    assert asked == ['gpt2'] and (out / 'tokenizer').read_text() == 'gpt2\n'
    assert not (out / 'hh.tiktoken').exists()
    pairs = load_rows(out / 'train.pairs.jsonl', 'pairs')
    assert all(len(row['chosen'].encode()) <= 24 for row in pairs)
    cfg = parse_config(prepare.Config, [f'--from={source}', '--tokenizer=gpt3', f'--out={out}'])
    with pytest.raises(UserError, match='--tokenizer=gpt3: gpt2, or leave it out'):
        prepare.main(cfg)


# --- the baseline ---

def test_features_by_hand(byte_tokenizer):
    """Catches a sign turned round, EOS counted after a cut, a length that is left out."""
    pairs = [{'prompt': 'P', 'chosen': 'aab', 'rejected': 'b', 'rejected_cut': True},
             {'prompt': 'P', 'chosen': 'c', 'rejected': 'dd'}]
    x = prepare.features(pairs, byte_tokenizer).to_dense()
    expected = {(0, ord('a')): math.log(3), (0, EOS): math.log(2),
                (0, EOS + 1): math.log(5 / 2),              # 4 tokens and 1
                (1, ord('c')): math.log(2), (1, ord('d')): -math.log(3),
                (1, EOS + 1): math.log(3 / 4)}
    assert x.shape == (2, EOS + 2)
    assert {tuple(place): x[*place].item() for place in x.nonzero().tolist()} == pytest.approx(
        expected)


def random_pairs(count, chosen_ends, rejected_ends, seed, letters='abcdefgh'):
    """Pairs of random letters, in which the ends alone tell the sides apart."""
    rng = random.Random(seed)

    def text():
        return ''.join(rng.choices(letters, k=rng.randrange(5, 15)))
    return [{'prompt': prompt_of(i, 1), 'chosen': text() + chosen_ends,
             'rejected': text() + rejected_ends} for i in range(count)]


@pytest.mark.parametrize('chosen, rejected', [('x', 'y'), ('y', 'x'), ('abcdefgh' * 3, '')])
def test_the_baseline_learns_words_and_length(byte_tokenizer, chosen, rejected):
    """Catches reversed labels, and a baseline that cannot see what it is there to see."""
    train, val = [random_pairs(200, chosen, rejected, seed) for seed in (0, 1)]
    assert prepare.baseline(train, val, byte_tokenizer) > 0.95


def test_the_baseline_finds_nothing_where_nothing_is(byte_tokenizer, capsys):
    """Catches an accuracy that was measured on what was fitted, and ties counted for one side."""
    train, val = [random_pairs(400, '', '', seed, string.ascii_letters) for seed in (0, 1)]
    accuracy = prepare.baseline(train, val, byte_tokenizer)
    assert abs(accuracy - 0.5) < 0.1                # 4 standard errors
    assert f'{accuracy:.3f} +- 0.025 correctly; the longer reply is' in capsys.readouterr().out
    assert prepare.longer([3, 2, 24, 24], [2, 3, 24, 7]) == (1 + 0 + 0.5 + 1) / 4


# --- the source: download, folder, errors ---

def test_without_from_the_hub_is_asked_once(tmp_path, monkeypatch):
    """Catches a download that is repeated, unchecked, or reads what main itself has written."""
    asked = []

    def fetch(url, path, sha256, instead):
        asked.append((url.removeprefix(prepare.URL), sha256, '--from=FOLDER' in instead))
        path.write_bytes((source / {'train.jsonl.gz': 'base/train.jsonl.gz'}.get(
            url.rsplit('/')[-1], 'test.jsonl.gz')).read_bytes())
    source, out = write_source(tmp_path / 'source'), tmp_path / 'out'
    monkeypatch.setattr(prepare, 'download', fetch)
    counts = prepare.main(prepare.Config(out=str(out)))
    assert asked == [('train.jsonl.gz', '', True),
                     ('test.jsonl.gz', prepare.FILES['test.jsonl.gz'], True)]
    assert prepare.main(prepare.Config(out=str(out))) == counts and len(asked) == 2


@pytest.mark.parametrize('line, message', [
    ('{"chosen": "a"', r"bad\.jsonl:2: Expecting ',' delimiter at column 15"),
    ('{"chosen": "a"}', r"bad\.jsonl:2: missing 'rejected' \(keys: chosen\)"),
    ('{"chosen": 1, "rejected": "b"}', r"bad\.jsonl:2: 'chosen' is int, not a string"),
    ('["chosen"]', r'bad\.jsonl:2: an object .* not list'),
    ('"\udcff"', r'bad\.jsonl:2: .*codec can.t decode byte 0xff')])
def test_a_broken_line_is_named(tmp_path, line, message):
    """Catches a traceback, or a broken line that is dropped like an ordinary row."""
    good = json.dumps(transcripts()[0])
    (tmp_path / 'bad.jsonl').write_bytes(
        f'{good}\n{line}\n{good}\n'.encode(errors='surrogateescape'))
    with pytest.raises(DataError, match=message):
        prepare.main(prepare.Config(from_=str(tmp_path), out=str(tmp_path / 'out')))


def test_files_that_cannot_be_used_are_named(tmp_path):
    """Catches a traceback of gzip, an empty folder prepared without a word, an empty val file."""
    cfg = prepare.Config(from_=str(tmp_path / 'source'), out=str(tmp_path / 'out'))
    with pytest.raises(DataError, match=r'source: no \*\.jsonl\.gz and no \*\.jsonl below it'):
        prepare.main(cfg)
    (tmp_path / 'one').mkdir()
    (tmp_path / 'one' / 'one.jsonl').write_text(json.dumps(transcripts()[0]))
    with pytest.raises(DataError, match='1 rows with 1 first turns: none can be held out'):
        prepare.main(prepare.Config(from_=str(tmp_path / 'one'), out=str(tmp_path / 'out')))
    path = write_source(tmp_path / 'source') / 'test.jsonl.gz'
    whole = path.read_bytes()
    for damaged in (whole[:-20], b'<html>', whole[:50] + b'\0\0\0\0' + whole[54:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r'test\.jsonl\.gz: cannot be read .* delete it'):
            prepare.main(cfg)
