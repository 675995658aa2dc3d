"""
data/sentiment: cleaning, splits, prompts, the naive Bayes judge, the download, the errors.
"""
import json, math, shutil, zipfile
from collections import Counter

import pytest

from data.rows import write_rows
from data.sentiment import prepare, reward
from data.judge import load_judge
from data.text import DataError, load_rows, load_tokenizer
GOOD = ['moving', 'funny', 'warm', 'brilliant', 'tender']
BAD = ['dull', 'lame', 'empty', 'tedious', 'awful']
WORDS = ['film', 'story', 'cast', 'plot', 'score', 'ending', 'script', 'hero']
PARTS = ('train', 'val')


def sentences(adjectives):
    """80 different sentences of 11 words with two of the adjectives in them."""
    return [f'the {WORDS[i % 8]} of this {adjectives[i % 5]} caf\xe9 tale number {i} is '
            f'{adjectives[i // 5 % 5]} .' for i in range(80)]


def write_source(folder, encoding='latin-1', order=1):
    for name, adjectives in zip(prepare.FILES, (GOOD, BAD)):
        lines = [line + ' \n' for line in sentences(adjectives)[::order]]
        (folder / name).write_bytes(''.join(lines).encode(encoding))
    return folder


def run(source, out):
    """Runs prepare with a small BPE."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, 'VOCAB_SIZE', 320)
        return prepare.main(prepare.Config(from_=str(source), out=str(out)))


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """Returns the folder that prepare wrote, and what it returned; no test may change it."""
    out = tmp_path_factory.mktemp('out')
    return out, run(write_source(tmp_path_factory.mktemp('source')), out)


def texts(path, key):
    return [json.loads(line)[key] for line in path.open(encoding='utf-8')]


def test_clean_counts_what_it_drops():
    pos = 'a caf\xe9 .\n\n  two   spaces \na caf\xe9 . \r\nin both\n'.encode('latin-1')
    neg = b'in both\nbad \x85 one\nbad one\n'
    kept_pos, kept_neg, dropped = prepare.clean(pos, neg)
    assert kept_pos == ['a caf\xe9 .', 'two spaces']
    assert kept_neg == ['bad one']                  # latin-1's 0x85 is white space, not a new line
    assert dropped == {'empty': 1, 'repeated': 2, 'in both classes': 2}


def test_no_sentence_is_on_two_sides_and_pairs_are_good_against_bad(prepared):
    out, counts = prepared
    judge = {' ' + text for words in (GOOD, BAD)
             for text in prepare.split(sentences(words))['judge']}
    train, val = [set(texts(out / f'{part}.sft.jsonl', 'completion')) for part in PARTS]
    positive, negative = [{' ' + text for text in sentences(words)} for words in (GOOD, BAD)]
    assert train | val | judge == positive | negative
    assert [len(part) for part in (train, val, judge)] == [72, 8, 80]       # so they are disjoint
    for part, side in zip(PARTS, (train, val)):
        pairs = load_rows(out / f'{part}.pairs.jsonl', 'pairs')
        assert counts[f'{part}.sft'] == counts[f'{part}.pairs'] == len(pairs) == len(side)
        assert len({(row['chosen'], row['rejected']) for row in pairs}) == len(pairs)
        for key, right in (('chosen', positive), ('rejected', negative)):
            used = Counter(row[key] for row in pairs)       # every sentence exactly twice
            assert used == dict.fromkeys(side & right, prepare.PAIRS_PER_POSITIVE)


def test_prompts_are_tokens_of_reviews(prepared):
    out, counts = prepared
    tokenizer = load_tokenizer(out / (out / 'tokenizer').read_text().strip())
    assert tokenizer.n_vocab == 320
    head = tokenizer.encode_ordinary('review:')
    prompts = {part: texts(out / f'{part}.prompts.jsonl', 'prompt') for part in PARTS}
    for part in PARTS:
        reviews = texts(out / f'{part}.sft.jsonl', 'completion')
        for prompt in prompts[part]:
            ids = tokenizer.encode_ordinary(prompt)
            start = ids[len(head):]
            assert ids == head + start and len(start) in (4, 5, 6)
            # the same ids as in SFT, and what is to be said next starts with a space
            begun = [text for text in reviews
                     if tokenizer.encode_ordinary(text)[:len(start)] == start]
            assert begun and all(text[len(prompt) - len('review:')] == ' ' for text in begun)
    both = prompts['train'] + prompts['val']
    assert len(set(both)) == len(both) == counts['train.prompts'] + counts['val.prompts']
    assert sum(counts['no_prompt'].values()) + len(both) == 80


def test_two_runs_write_the_same_bytes(prepared, tmp_path):
    """Whatever the order of lines and the encoding of the source; and the judge there works."""
    out, counts = prepared
    run(write_source(tmp_path, encoding='utf-8', order=-1), tmp_path / 'out')
    names = [path.name for path in out.iterdir()]
    assert len(names) == 6 + 4          # rows; judge.npz, reward.py, sentiment.tiktoken, tokenizer
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / 'out' / name).read_bytes(), name
    assert counts['accuracy'] == 1.0                # the adjectives give the class away
    score = load_judge(out / 'reward.py')
    assert score('review:', ' a moving and funny film .')['positive'] == 1.0
    assert score('review:', ' a lame and tedious film .')['positive'] == 0.0


def test_naive_bayes_by_hand():
    """
    By hand. Each sentence counts a word once.
        positive: "good film" "Good fun ."      good 2, film 1, fun 1, . 1      total 5
        negative: "bad film"  "bad , bad"       bad 2, film 1, "," 1            total 4
    V = 6 different words: P(good | positive) = (2 + 1) / (5 + 6), P(good | negative) = 1 / (4 + 6)
    """
    judge = reward.fit(['good film', 'Good fun .'], ['bad film', 'bad , bad'])
    assert judge == pytest.approx({word: math.log(ratio * 10 / 11) for word, ratio in {
        'good': 3, 'film': 2 / 2, 'fun': 2, '.': 2, 'bad': 1 / 3, ',': 1 / 2}.items()})
    # 30/11 x 10/11 = 300/121: repeated and unknown words add nothing, upper case is no other word
    assert reward.log_odds(judge, 'GOOD good film unheard') == pytest.approx(math.log(300 / 121))
    assert reward.log_odds(judge, 'a bad,film') == pytest.approx(math.log(500 / (33 * 11 * 11)))


def test_score_reads_the_response_only_and_is_clipped(tmp_path):
    """And a copy of reward.py without its tables says what to run."""
    shutil.copyfile(reward.__file__, tmp_path / 'reward.py')
    score = load_judge(tmp_path / 'reward.py')
    with pytest.raises(DataError, match=r'judge\.npz.*data\.sentiment\.prepare'):
        score('review:', ' praise')
    reward.save(tmp_path / 'judge.npz', {'praise': 5.0, 'more': 5.0, 'blame': -9.0})
    for response, expected in {' praise': 5.0, ' praise more': reward.CLIP, ' blame': -reward.CLIP,
                               '': 0.0, '  ': 0.0, ' unheard': 0.0}.items():
        assert score('review: blame more', response) == {'reward': expected,
                                                         'positive': float(expected > 0)}


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Returns a zip of a source, which is what the URL points to."""
    path = write_source(tmp_path) / 'there.zip'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name in prepare.FILES:
            archive.write(tmp_path / name, f'sentence_polarity/{name}')
    monkeypatch.setattr(prepare, 'URL', path.as_uri())
    return path


def test_download_that_is_no_whole_zip_leaves_nothing(archive, tmp_path):
    """Catches a damaged zip that stays, where every later call would find it, and a whole one that
    is downloaded again."""
    whole = archive.read_bytes()
    flipped = bytearray(whole)
    flipped[200] ^= 0xff                            # inside the first compressed file
    target = tmp_path / 'sentence_polarity.zip'
    for path, damaged in ((target, b'left by an interrupted call'), (archive, b''),
                          (archive, whole[:len(whole) // 2]), (archive, b'<html>not found</html>'),
                          (archive, bytes(flipped)), (archive, b'PK\5\6' + bytes(18))):   # no files
        path.write_bytes(damaged)
        with pytest.raises(DataError, match='not the whole zip.*--from=FOLDER'):
            prepare.read_files('', tmp_path)
        assert not list(tmp_path.glob('sentence_polarity.zip*'))
    archive.write_bytes(whole)
    for _ in range(2):
        assert prepare.read_files('', tmp_path) == prepare.read_files(str(tmp_path), tmp_path)
        archive.unlink(missing_ok=True)
    target.unlink()
    with pytest.raises(DataError, match='could not download.*--from=FOLDER'):
        prepare.read_files('', tmp_path)


def test_missing_files_and_too_few_sentences_are_named(tmp_path):
    with pytest.raises(DataError, match='no rt-polarity.pos and no rt-polarity.neg there'):
        prepare.read_files(str(tmp_path), tmp_path)
    for name in prepare.FILES:
        (tmp_path / name).write_text(f'only one in {name}\n')
    with pytest.raises(DataError, match='1 positive and 1 negative sentences: need 20'):
        run(tmp_path, tmp_path / 'out')
    with pytest.raises(DataError, match='train.prompts.jsonl: no rows left'):
        write_rows(tmp_path / 'train.prompts.jsonl', [])
