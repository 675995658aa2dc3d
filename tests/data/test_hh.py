"""
data/hh: what is dropped, the split by first turns, the cut, the files, the baseline, the errors.
"""
import gzip, json, math, random
from collections import Counter

import pytest

from data import text
from data.hh import prepare
from data.text import DataError, build_tokenizer, encode_rows, load_rows, load_text
from data.turns import HH_TEMPLATE
from prefgpt import UserError

from conftest import BYTE_TOKENS, EOS

WORDS = ['wash', 'the', 'caf\xe9', '\u2019s', '\u65e5\u672c\u8a9e', 'cup', 'with', 'soap', 'and',
         '\U0001f600', 'a\n\nline', 'two  spaces']


def prompt_of(number, turns):
    """The prompt of a dialogue about something, after so many human turns."""
    steps = [f'\n\nHuman: number {number}, step {i}?\n\nAssistant:' for i in range(turns)]
    return ' do it.'.join(steps)


GOOD = json.dumps({'chosen': f'{prompt_of(1, 1)} a', 'rejected': f'{prompt_of(1, 1)} b'})


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """80 pairs: every other one of 40 dialogues appears again, with one or two turns more."""
    rng = random.Random(0)
    lines = []
    for i in range(80):
        prompt = prompt_of(i % 60 % 40, 1 + i // 40 + (i % 2 if i >= 40 else 0))
        yes, no = [' '.join(rng.choices(WORDS, k=rng.choice([2, 3, 30]))) for _ in range(2)]
        pair = {'chosen': f'{prompt} yes {yes}.', 'rejected': f'{prompt} no {no}.'}
        lines.append(json.dumps(pair) + '\n')
    folder = tmp_path_factory.mktemp('source')
    (folder / 'base').mkdir()
    for name, some in (('base/train', lines[:50]), ('test', lines[50:])):
        (folder / f'{name}.jsonl.gz').write_bytes(gzip.compress(''.join(some).encode()))
    return folder


def run(source, out, **flags):
    return prepare.main(prepare.Config(from_=str(source), out=str(out), **flags))


@pytest.fixture(scope='module', autouse=True)
def small():
    """A BPE of 320 tokens and replies of 24, so that synthetic ones are cut; a quick baseline."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, 'VOCAB_SIZE', 320)
        patch.setattr(prepare, 'REPLY_TOKENS', 24)
        patch.setattr(prepare, 'L2_STRENGTHS', (0.001, 0.1))
        yield


@pytest.fixture(scope='module')
def prepared(source, small, tmp_path_factory):
    """Returns the folder that prepare wrote, and what it returned; no test may change it."""
    out = tmp_path_factory.mktemp('out')
    return out, run(source, out)


def test_clean_counts_what_it_drops():
    """Catches a row of another prompt, without a difference or without a reply that gets in, and a
    row that counts twice because two files hold it."""
    prompt = prompt_of(1, 2)
    good, taken, dropped = (f'{prompt} a', f'{prompt} b'), set(), Counter()
    pairs = [good, (f'{prompt} a', f'{prompt_of(2, 2)} b'),     # other prompts
             (f'{prompt} a', '\n\nHuman: no reply'),        # no prompt at all
             (f'{prompt} a', f'{prompt} a'),
             (f'{prompt} ', f'{prompt} b'), (f'{prompt} a', prompt),
             good]
    assert prepare.clean(pairs, taken, dropped) == [
        {'prompt': prompt, 'chosen': ' a', 'rejected': ' b'}]
    assert dropped == {'prompts that differ': 2, 'equal replies': 1, 'empty replies': 2,
                       'repeated': 1}
    assert prepare.clean([good], taken, dropped) == [] and dropped['repeated'] == 2


def test_dialogues_with_one_beginning_are_on_one_side(source):
    """Catches a held-out prompt whose reply stands in a longer dialogue of the training rows."""
    train, val = prepare.split(prepare.read_files(prepare.find_files(source, None)))
    numbers = [{row['prompt'].split(',')[0] for row in part} for part in (train, val)]
    assert not numbers[0] & numbers[1]
    assert (len(numbers[0]), len(numbers[1])) == (36, 4)
    assert len(train) + len(val) == 80 and len(val) > 4         # some of them at several lengths
    # A first turn ends neither at its first blank line nor at the last reply
    row = {'prompt': '\n\nHuman: one\n\ntwo\n\nAssistant: three\n\nHuman: four\n\nAssistant:'}
    assert prepare.first_turn(row) == '\n\nHuman: one\n\ntwo'


def test_the_cut_by_hand(byte_tokenizer, monkeypatch):
    """Catches a start that ends within a character or encodes to other ids, and no room for EOS."""
    monkeypatch.setattr(prepare, 'REPLY_TOKENS', 4)
    for text, expected in {'abc': ('abc', False),               # and EOS is the fourth
                           'abcd': ('abcd', True),              # EOS would be the fifth
                           'abcde': ('abcd', True), 'ab\xe9d': ('ab\xe9', True),
                           'abc\xe9': ('abc', True),            # its first byte alone is no text
                           'a\U0001f600': ('a', True)}.items():
        assert prepare.cut(text, byte_tokenizer) == expected, text
    # A blank line is two tokens before a word, but one at the end of the start
    tokenizer = build_tokenizer(BYTE_TOKENS + 'Cgo= 256\n')     # b'\n\n'
    assert tokenizer.encode_ordinary('a\n\nb') == [97, 10, 10, 98]
    assert tokenizer.encode_ordinary('a\n\n') == [97, 256]
    monkeypatch.setattr(prepare, 'REPLY_TOKENS', 3)
    assert prepare.cut('a\n\nb', tokenizer) == ('a\n', True)


def test_cut_replies_are_marked_and_have_no_eos_in_any_stage(prepared, byte_tokenizer):
    """Catches a mark that is lost, misspelt or set on a whole reply, which ends in a full stop; and
    pairs that would teach a preference between two equal replies."""
    tokenizer, _ = load_text(prepared[0])
    seen = Counter()
    for kind in ('sft', 'pairs'):
        rows = load_rows(prepared[0] / f'train.{kind}.jsonl', kind)
        for _, *responses in encode_rows(rows, kind, tokenizer, block_size=400):
            for side, ids in enumerate(responses):
                whole = ids[-1] == tokenizer.eot_token
                assert len(ids) <= 24 and (whole or len(ids) > 16)
                assert whole <= tokenizer.decode(ids).endswith('.<|endoftext|>')
                seen[kind, side, whole] += 1
    assert len(seen) == 6 and min(seen.values()) > 5
    rows = [{'prompt': 'P', 'chosen': 'a' * 30 + 'b', 'rejected': 'a' * 30 + 'c'},
            {'prompt': 'P', 'chosen': 'a' * 24, 'rejected': 'c'},
            {'prompt': 'P', 'chosen': 'a' * 23, 'rejected': 'c'}]       # and EOS is the 24th
    dropped = Counter()
    assert prepare.cut_pairs(rows, byte_tokenizer, dropped) == [
        {'prompt': 'P', 'chosen': 'a' * 24, 'rejected': 'c', 'chosen_cut': True}, rows[2]]
    assert dropped == {'equal once cut': 1}


def test_the_files_agree(prepared):
    """Catches a side mixed up, a prompt missing or twice, a row in two parts."""
    out, counts = prepared
    for part in ('train', 'val'):
        sft, pairs, prompts = [load_rows(out / f'{part}.{kind}.jsonl', kind)
                               for kind in ('sft', 'pairs', 'prompts')]
        assert all(row['chosen'].startswith(' yes') and row['rejected'].startswith(' no')
                   for row in pairs)
        assert [(row['prompt'], row['completion']) for row in sft] == [
            (row['prompt'], row['chosen']) for row in pairs]
        asked = dict.fromkeys(row['prompt'] for row in pairs)
        assert [row['prompt'] for row in prompts] == list(asked)
        assert counts[f'{part}.pairs'] == len(pairs)
    assert counts['train.pairs'] + counts['val.pairs'] == 80
    tokenizer, text = load_text(out)
    assert tokenizer.n_vocab == 320 and text['template'] == HH_TEMPLATE


def test_two_runs_write_the_same_bytes(source, prepared, tmp_path, monkeypatch):
    """Catches an order by set, row or file, packed or not; held-out text in the vocabulary; and
    replies that are cut before it is trained."""
    first, counts = prepared
    seen, write = [], prepare.write_tokenizer
    monkeypatch.setattr(prepare, 'write_tokenizer', lambda out, name, texts, size: write(
        out, name, seen.extend(texts) or seen, size))
    lines = [line for path in source.rglob('*.gz')
             for line in gzip.decompress(path.read_bytes()).splitlines(keepends=True)]
    (tmp_path / 'all.jsonl').write_bytes(b''.join(lines[::-1]))
    assert run(tmp_path, tmp_path / 'out') == counts        # the baseline's accuracy too
    names = [path.name for path in first.iterdir()]
    assert len(names) == 6 + 3              # rows; tokenizer, hh.tiktoken, template.txt
    for name in names:
        assert (first / name).read_bytes() == (tmp_path / 'out' / name).read_bytes(), name
    train, _ = prepare.split(prepare.read_files([tmp_path / 'all.jsonl']))
    assert sorted(seen) == sorted(text for row in train for text in row.values())


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


@pytest.mark.parametrize('chosen, rejected, expected, within', [
    ('x', 'y', 1, 0.05), ('y', 'x', 1, 0.05), ('abcdefgh' * 3, '', 1, 0.05),
    ('', '', 0.5, 0.1)])                            # 4 standard errors
def test_the_baseline_learns_words_and_length(byte_tokenizer, chosen, rejected, expected, within,
                                              capsys):
    """Catches reversed labels, and a baseline that cannot see what it is there to see, or sees what
    is not there: an accuracy measured on what was fitted, and ties counted for one side."""
    rng = random.Random(0)
    train, val = [[{'prompt': prompt_of(i, 1)} | {
        side: ''.join(rng.choices('abcdefgh', k=rng.randrange(5, 15))) + end
        for side, end in (('chosen', chosen), ('rejected', rejected))}
        for i in range(400)] for _ in range(2)]
    assert abs(prepare.baseline(train, val, byte_tokenizer) - expected) < within
    longer = [len(pair['chosen']) - len(pair['rejected']) for pair in val]
    share = (sum(difference > 0 for difference in longer) + longer.count(0) / 2) / 400
    assert f'the longer reply is chosen: {share:.3f}' in capsys.readouterr().out


def test_without_from_the_hub_is_asked_once(source, tmp_path, monkeypatch, byte_tokenizer):
    """Catches a download that is repeated, unchecked, or reads what main itself has written. Then
    GPT-2's tokenizer: catches replies cut by another tokenizer than the one named."""
    asked = []

    def fetch(url, path, sha256, instead):
        asked.append((url.removeprefix(prepare.URL), sha256, '--from=FOLDER' in instead))
        path.write_bytes(next(source.rglob(url.rpartition('/')[2])).read_bytes())
    monkeypatch.setattr(prepare, 'download', fetch)
    counts = run('', tmp_path)
    assert asked == [(name, sha256, True) for name, sha256 in prepare.FILES.items()]
    assert run('', tmp_path) == run(tmp_path, tmp_path) == counts and len(asked) == 2
    for module in (prepare, text):              # that trains on the folder, too
        monkeypatch.setattr(module, 'load_tokenizer', {'gpt2': byte_tokenizer}.get)
    run('', tmp_path, tokenizer='gpt2')
    assert (tmp_path / 'tokenizer').read_text() == 'gpt2\n'
    pairs = load_rows(tmp_path / 'train.pairs.jsonl', 'pairs')
    assert all(len(row['chosen'].encode()) <= 24 for row in pairs)
    with pytest.raises(UserError, match='--tokenizer=gpt3: gpt2, or leave it out'):
        run('', tmp_path, tokenizer='gpt3')


@pytest.mark.parametrize('line, message', [
    ('{"chosen": "a"', r"bad\.jsonl:2: not a whole .* .Expecting ',' delimiter at column 15"),
    ('{"chosen": "a"}', r"bad\.jsonl:2: missing 'rejected' \(keys: chosen\)"),
    ('["chosen"]', r'bad\.jsonl:2: an object .* not list'),
    ('"\udcff"', r'bad\.jsonl:2: byte 0xff is not UTF-8')])
def test_a_broken_line_is_named(tmp_path, line, message):
    """Catches a traceback, or a broken line that is dropped like an ordinary row."""
    (tmp_path / 'bad.jsonl').write_bytes(
        f'{GOOD}\n{line}\n{GOOD}\n'.encode(errors='surrogateescape'))
    with pytest.raises(DataError, match=message):
        run(tmp_path, tmp_path / 'out')


def test_files_that_cannot_be_used_are_named(tmp_path):
    """Catches a traceback of gzip, an empty folder prepared without a word, an empty val file."""
    with pytest.raises(DataError, match=r': no \*\.jsonl\.gz and no \*\.jsonl below it'):
        run(tmp_path, tmp_path / 'out')
    path = tmp_path / 'test.jsonl.gz'
    whole = gzip.compress(GOOD.encode())
    for damaged in (whole[:-20], b'<html>', whole[:50] + b'\0\0\0\0' + whole[54:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r'test\.jsonl\.gz: (cannot .* delete it|.* HTML)'):
            run(tmp_path, tmp_path / 'out')
    path.write_bytes(whole)
    with pytest.raises(DataError, match='1 rows with 1 first turns: none can be held out'):
        run(tmp_path, tmp_path / 'out')
