"""
Checks what happens between a file and the first step: rows, tokenizers, batches, randomness.

Expected rows, ids and masks are written by hand: a text's ids are its bytes, and EOS is 256.
"""
import doctest, hashlib, itertools, json, random, re

import pytest
import tiktoken
import torch
from conftest import AB_MERGED, BYTE_TOKENS, EOS, write_jsonl
from conftest import TEMPLATE as BOT

import prefgpt
from data.text import (DataError, build_tokenizer, checkpoint_text, decode_responses,
                       encode_rows, load_examples, load_rows, load_split, load_text,
                       load_tokenizer, tokenizer_text)
from prefgpt import UserError, batches, make_batch, printable, rng
from tools.sample import mark_ends

BYTE_LINES = BYTE_TOKENS.splitlines(True)
SWAPPED = 'AQ== 0\nAA== 1\n' + ''.join(BYTE_LINES[2:])      # the same tokens under other ids


def ids(text):
    """Returns the byte tokenizer's ids of a text, without the tokenizer."""
    return list(text.encode())


def sft_row(prompt, completion):
    return {'prompt': prompt, 'completion': completion}


def pair(prompt, chosen, rejected):
    return {'prompt': prompt, 'chosen': chosen, 'rejected': rejected}


# ----------------------------------------------------------------------------- canonical rows

P, R, PAIR = {'prompt': 'P'}, sft_row('P', ' r'), pair('P', ' c', ' r')


@pytest.mark.parametrize('kind, row, expected', [
    ('sft', R, R),
    ('sft', {'id': 7, **R, 'source': None, 'completion_cut': None}, R),     # pandas adds nulls
    ('sft', sft_row('', ' r'), sft_row('', ' r')),
    ('pairs', PAIR, PAIR),
    ('pairs', {**PAIR, 'rejected': ''}, {**PAIR, 'rejected': ''}),
    ('sft', PAIR, sft_row('P', ' c')),                  # what pairs chose
    ('sft', {**R, 'completion_cut': True}, {**R, 'completion_cut': True}),
    ('sft', {**PAIR, 'chosen_cut': True}, {**sft_row('P', ' c'), 'completion_cut': True}),
    ('sft', {**PAIR, 'rejected_cut': True}, sft_row('P', ' c')),
    ('pairs', {**PAIR, 'chosen_cut': False, 'rejected_cut': True}, {**PAIR, 'rejected_cut': True}),
    ('prompts', P, P),
    ('prompts', PAIR, P)])
def test_canonical_rows(tmp_path, kind, row, expected):
    """A canonical row becomes a prompt and its responses, and nothing more."""
    assert load_rows(write_jsonl(tmp_path / 'rows.jsonl', [row]), kind) == [expected]


def without(row, key):
    return {name: value for name, value in row.items() if name != key}


# kind, the bad row or line, what the message must say
MALFORMED = [
    ('sft', '{"prompt": "P", "completion": }', 'column'),
    ('sft', '["P", "r"]', 'list'),
    ('sft', '{"prompt": "P", "completion": "a", "completion": "b"}', "'completion'.*twice"),
    ('sft', sft_row('P', '\ud800'), 'surrogate'),
    ('sft', '{"prompt": "caf\udce9", "completion": "r"}', '0xe9'),       # a latin-1 byte
    ('sft', '[' * 100_000, ''),
    ('sft', '{"prompt": NaN, "completion": "r"}', "'prompt'.*float"),
    ('sft', sft_row(None, 'r'), "missing 'prompt'"),
    ('sft', sft_row('P', ['r']), "'completion'.*list"),
    ('sft', sft_row('P', ''), "'completion'.*empty"),
    ('sft', sft_row(' ' * 100_000, 'r'), 'crash the tokenizer'),
    ('pairs', {**PAIR, 'chosen': ''}, "'chosen'.*empty"),
    ('pairs', {**PAIR, 'rejected': '', 'rejected_cut': True}, "'rejected'.*empty"),
    ('sft', {**R, 'chosen_cut': True}, "'chosen_cut'.*beside a 'chosen'"),
    ('pairs', {**PAIR, 'completion_cut': True}, "'completion_cut'.*beside a 'completion'"),
    ('pairs', {**PAIR, 'chosen_cut': 'yes'}, "'chosen_cut'"),
    ('prompts', {'question': 'P'}, "'prompt'.*question"),
    ('sft', {'prompt': 'P', 'answer': 'r'}, "'completion'.*prompt, answer"),
    ('pairs', without(PAIR, 'rejected'), "'rejected'.*prompt, chosen"),
    ('pairs', R, "'chosen'"),
    ('sft', {'messages': [{'role': 'user', 'content': 'hi'}]}, "'messages'.*data.prepare"),
    ('sft', {**R, 'label': False}, "'label'"),          # KTO: it would imitate the bad ones
    ('sft', {**R, 'is_safe': False}, "'is_safe'"),
    ('pairs', {**PAIR, 'system': 'Be kind.'}, "'system'"),
    ('sft', {'prompt': 'P', 'response': 'r'}, "'response'.*data.prepare"),
    ('pairs', without(PAIR, 'prompt'), "missing 'prompt'"),
    ('pairs', {**PAIR, 'rejected': 'r<|endoftext|>\n'}, "'rejected' ends in '<.endoftext.>'"),
]


@pytest.mark.parametrize('kind, line, words', MALFORMED, ids=lambda value: str(value)[:60])
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, kind, line, words):
    """A bad row on line 4, after blank lines, raises DataError('...rows.jsonl:4: ...')."""
    good, bad = json.dumps({**R, **PAIR}), json.dumps(line) if isinstance(line, dict) else line
    path = tmp_path / 'rows.jsonl'
    path.write_bytes('\n'.join([good, '', '  ', bad, good]).encode(errors='surrogateescape'))
    with pytest.raises(DataError, match=f'^{re.escape(str(path))}:4: .*{words}') as error:
        load_rows(path, kind)
    assert '\n' not in str(error.value)


def test_bom_crlf_blank_lines_unicode_line_ends_and_no_rows(tmp_path):
    """A byte-order mark, CRLF, blank lines and a missing last newline are fine; U+2028 and U+0085
    inside a string end no line (str.splitlines would cut there). No rows are an error."""
    path = tmp_path / 'rows.jsonl'
    path.write_bytes('\ufeff{"prompt": "a\u2028b", "completion": "c\u0085d"}\r\n\r\n   \n'
                     '{"prompt": "e", "completion": "f"}'.encode())
    assert load_rows(path, 'sft') == [sft_row('a\u2028b', 'c\u0085d'), sft_row('e', 'f')]
    for contents in (b'', b'\n \n', b'\xef\xbb\xbf'):
        path.write_bytes(contents)
        with pytest.raises(DataError, match='rows.jsonl: no rows'):
            load_rows(path, 'sft')
    for other, words in (('nowhere.jsonl', 'nowhere.jsonl: no such file'), ('', 'is a directory'),
                         ('a\0b', 'embedded null')):
        with pytest.raises(DataError, match=words):
            load_rows(tmp_path / other, 'sft')


# ----------------------------------------------------------------------------- ids of rows

def test_i9_prompt_and_response_are_encoded_apart():
    """I9: 'a' + 'b' stays two ids where a merge 'ab' exists, and '<|endoftext|>' in a text stays 13
    bytes. Catches texts joined before they are encoded, whose ids would depend on each other, and
    special tokens allowed: user text could end a response."""
    merges = build_tokenizer(AB_MERGED)
    assert merges.encode_ordinary('ab') == [256]
    sft = encode_rows([sft_row('a', 'b')], 'sft', merges, 16)
    assert sft == [([97], [98, 257])]
    pairs = encode_rows([pair('a', 'b', 'c')], 'pairs', merges, 16)
    assert pairs == [([97], [98, 257], [99, 257])]
    assert encode_rows([{'prompt': 'a'}], 'prompts', merges, 16, 8) == [([97],)]
    text = '<|endoftext|>'
    assert encode_rows([sft_row(text, text)], 'sft', merges, 64) == [(ids(text), ids(text) + [257])]


def test_eos_is_appended_and_an_empty_prompt_is_eos(byte_tokenizer):
    """I10: a whole response ends with the EOS id; an empty prompt is [EOS], because some token must
    emit the first one. Catches EOS left out, after which a model never stops."""
    assert encode_rows([pair('', 'hi', '')], 'pairs', byte_tokenizer, 16) == [
        ([EOS], [104, 105, EOS], [EOS])]
    assert encode_rows([{'prompt': ''}], 'prompts', byte_tokenizer, 16, 8) == [([EOS],)]


@pytest.mark.parametrize('prompt, response, kept_prompt, kept_response', [
    ('abc', 'vwx', 'abc', ids('vwx') + [EOS]),
    ('abcd', 'vwx', 'abcd', ids('vwx') + [EOS]),                # fits exactly, with EOS
    ('abcde', 'vwx', 'bcde', ids('vwx') + [EOS]),               # one too long
    ('abcdefghi', 'v', 'defghi', [118, EOS]),                   # short: the prompt has the rest
    ('ab', 'rstuv', 'ab', ids('rstuv') + [EOS]),
    ('ab', 'rstuvw', 'ab', ids('rstuvw')),                      # one too long: EOS goes first
    ('abcdefgh', 'qrstuvwx', 'efgh', ids('qrst')),              # half each
    ('abcde', 'vwxy', 'bcde', ids('vwxy'))])                    # both just over half
def test_cuts_at_the_edge_of_the_block(byte_tokenizer, prompt, response, kept_prompt,
                                       kept_response):
    """I10: the prompt loses its left end, down to half the block; only then is the response cut,
    and a cut response has no EOS. Catches an EOS after a cut, which would teach to stop in
    mid-sentence, and a prompt cut on the right, where its question is."""
    [row] = encode_rows([sft_row(prompt, response)], 'sft', byte_tokenizer, 8)
    assert row == (ids(kept_prompt), kept_response)


def test_a_response_marked_as_cut_gets_no_eos(byte_tokenizer, capsys):
    """I10: what was cut before it came here gets no EOS. The two sides of a pair are marked
    separately, and equal texts may differ by EOS."""
    rows = [{**sft_row('p', 'ab'), 'completion_cut': True}]
    assert encode_rows(rows, 'sft', byte_tokenizer, 8) == [(ids('p'), ids('ab'))]
    assert '1 responses marked as cut' in capsys.readouterr().out
    rows = [{**pair('p', 'ab', 'ab'), 'rejected_cut': True}]
    assert encode_rows(rows, 'pairs', byte_tokenizer, 8) == [
        (ids('p'), ids('ab') + [EOS], ids('ab'))]


def test_a_pair_shares_one_prompt_after_cutting(byte_tokenizer):
    """I9: the longer response decides how much of the prompt stays, and both sides keep the same.
    Catches two sides that are cut apart: their logprobs would be for different questions."""
    rows = [pair('abcde', 'v', 'xyz'), pair('abcde', 'v', 'qrstuv')]
    assert encode_rows(rows, 'pairs', byte_tokenizer, 8) == [
        (ids('bcde'), [118, EOS], ids('xyz') + [EOS]), (ids('bcde'), [118, EOS], ids('qrst'))]


def test_prompts_leave_room_for_max_new_tokens(byte_tokenizer):
    """A prompt to sample from keeps block_size - max_new_tokens ids, its right end; if that leaves
    no room, or a block of 1 none for prompt and response, an error says so."""
    rows = [{'prompt': 'abcd'}, {'prompt': 'abcde'}, {'prompt': 'abcdef'}]
    assert encode_rows(rows, 'prompts', byte_tokenizer, 8, 3) == [
        (ids('abcde'[:4]),), (ids('abcde'),), (ids('bcdef'),)]
    assert encode_rows(rows[:1], 'prompts', byte_tokenizer, 8, 7) == [(ids('d'),)]
    with pytest.raises(UserError, match='max_new_tokens=8'):
        encode_rows(rows, 'prompts', byte_tokenizer, 8, 8)
    with pytest.raises(UserError):
        encode_rows([sft_row('p', 'r')], 'sft', byte_tokenizer, 1)


def test_i10_every_example_has_a_response_token_and_cuts_are_counted(byte_tokenizer, capsys):
    """I10: prompts and responses of 0 to 20 bytes in blocks of 2 to 12: at least one token remains
    of each, at most the block of both. Catches a response that is cut away: its loss is 0 / 0."""
    sft = [sft_row('p' * i, 'r' * j) for i in range(21) for j in range(1, 21)]
    pairs = [pair('p' * i, 'c' * j, 'r' * (20 - j)) for i in range(21) for j in range(1, 21)]
    for block_size in range(2, 13):
        for kind, rows in (('sft', sft), ('pairs', pairs)):
            examples = encode_rows(rows, kind, byte_tokenizer, block_size, name='train')
            assert len(examples) == 420
            assert all(prompt and response and len(prompt) + len(response) <= block_size
                       for prompt, *responses in examples for response in responses)
    capsys.readouterr()
    # fits; prompt cut; response cut; both cut
    cases = [('ab', 'v'), ('abcdefgh', 'v'), ('a', 'qrstuvwx'), ('abcdefgh', 'qrstuvwx')]
    encode_rows([sft_row(*case) for case in cases], 'sft', byte_tokenizer, 8, name='train')
    assert capsys.readouterr().out == (
        'train: 4 sft kept, 2 prompts cut on the left, 2 responses cut (no EOS)\n')


def test_i11_pairs_that_are_equal_after_cutting_are_dropped(byte_tokenizer, capsys):
    """I11: a pair whose responses differ only in what was cut off, or not at all, is dropped: it
    would pull one response up and down at once. Catches texts compared in place of ids."""
    rows = [pair('p', 'good', 'bad'), pair('p', 'same', 'same'),
            pair('p', 'abcdefgX', 'abcdefgY'),                  # cut to 7 bytes
            pair('p', 'abcdefX', 'abcdefY')]                    # differ in the 7th
    kept = encode_rows(rows, 'pairs', byte_tokenizer, 8, name='train')
    assert kept == [([112], ids('good') + [EOS], ids('bad') + [EOS]),
                    ([112], ids('abcdefX'), ids('abcdefY'))]
    line = capsys.readouterr().out
    assert 'train: 2 pairs kept' in line and '2 dropped (chosen == rejected)' in line
    with pytest.raises(DataError, match='val: none of the 2 rows is left'):
        encode_rows(rows[1:3], 'pairs', byte_tokenizer, 8, name='val')


def test_decode_responses_by_hand(byte_tokenizer):
    """I16: returns the text without EOS, and whether the RESPONSE ended. Catches an EOS in the
    prompt that counts: the rule for responses without EOS would not be applied."""
    tokens, _, _, response_mask = make_batch([
        ([112], ids('hi') + [EOS]), ([112, EOS], ids('yo')), ([112], [EOS]), ([112], [0xff, EOS])])
    texts, ended = decode_responses(tokens, response_mask, byte_tokenizer)
    assert texts == ['hi', 'yo', '', '\ufffd']
    assert ended.tolist() == [True, False, True, True]
    assert mark_ends(texts, ended) == ['hi', 'yo [no end]', '', '\ufffd']      # for people


def test_printable_strips_control_characters():
    """Escape sequences, bells, carriage returns and text-direction marks cannot steer a terminal;
    newlines and letters of any script stay."""
    assert printable('\x1b[31mred\x07\n') == '\ufffd[31mred\ufffd\n'
    assert printable('a\rb\x00c\x7fd\x9be\u202ef') == 'a\ufffdb\ufffdc\ufffdd\ufffde\ufffdf'
    for text in ('Grüße, 世界 ☺\n\nok', 'Prêt\xa0!', '你好\u3000世界', 'می\u200cخواهم',
                 '\treturn 1', '👩\u200d👧', 'so\xadft'):
        assert printable(text) == text


def test_the_examples_in_docstrings_are_true():
    """The examples in prefgpt's docstrings run and give what they say."""
    failed, tried = doctest.testmod(prefgpt)
    assert failed == 0 and tried >= 2


# ----------------------------------------------------------------------------- splits

def test_load_examples_are_the_encoded_rows_of_both_splits(tmp_path, byte_tokenizer, capsys):
    """A folder's training and held-out rows come back as ids; rows='pairs' is SFT on the chosen
    sides; a missing file is named."""
    write_jsonl(tmp_path / 'train.pairs.jsonl', [pair('P', 'c', 'r')])
    write_jsonl(tmp_path / 'val.pairs.jsonl', [pair('Q', 'd', 's')])
    write_jsonl(tmp_path / 'train.prompts.jsonl', [{'prompt': 'user: hi\nbot:'}])
    write_jsonl(tmp_path / 'val.prompts.jsonl', [{'prompt': 'abcdefgh' * 4}])
    text = checkpoint_text(byte_tokenizer, '{}')
    assert load_examples(tmp_path, 'pairs', byte_tokenizer, text, 16) == (
        [(ids('P'), ids('c') + [EOS], ids('r') + [EOS])],
        [(ids('Q'), ids('d') + [EOS], ids('s') + [EOS])])
    assert load_examples(tmp_path, 'sft', byte_tokenizer, text, 16, rows='pairs') == (
        [(ids('P'), ids('c') + [EOS])], [(ids('Q'), ids('d') + [EOS])])
    capsys.readouterr()
    assert load_examples(tmp_path, 'prompts', byte_tokenizer, text, 24, 8) == (
        [(ids('user: hi\nbot:'),)], [(ids('abcdefgh' * 2),)])
    assert capsys.readouterr().out.splitlines() == [
        'train: 1 prompts kept', 'val: 1 prompts kept, 1 prompts cut on the left']
    with pytest.raises(DataError, match='train.sft.jsonl: no such file'):
        load_examples(tmp_path, 'sft', byte_tokenizer, text, 16)


def test_load_split_of_a_file_holds_out_a_tenth_of_the_prompts(tmp_path):
    """Of 40 prompts with two rows each, 5 are held out with both rows, the same ones for every
    kind. Catches a reward model that is tested on prompts that SFT was trained on."""
    rows = [pair(f'p{i}', f'c{i} {j}', f'r{i} {j}') for j in range(2) for i in range(40)]
    path = write_jsonl(tmp_path / 'all.jsonl', rows)
    # Those whose sha256 begins below 0x1999...; hash() would hold out others in every process
    held_out = {'p0', 'p7', 'p17', 'p33', 'p37'}
    for kind in ('sft', 'pairs', 'prompts'):
        train, val = load_split(path, kind, '{}')
        assert len(train) == 70 and len(val) == 10
        assert {row['prompt'] for row in val} == held_out
        assert not {row['prompt'] for row in train} & held_out
    # Neither the order of the rows nor how often a prompt comes may move the split
    random.Random(0).shuffle(rows)
    path = write_jsonl(tmp_path / 'shuffled.jsonl', rows[:60] + rows)
    assert {row['prompt'] for row in load_split(path, 'sft', '{}')[1]} == held_out
    # Nor the other prompts of the file: SFT and DPO on two files must agree on what is held out
    half = [pair(f'p{i}', 'c', 'r') for i in range(20)]
    path = write_jsonl(tmp_path / 'half.jsonl', half)
    assert {row['prompt'] for row in load_split(path, 'sft', '{}')[1]} == {'p0', 'p7', 'p17'}
    # White space does not make another question, and one that a quarter of the rows ask stays
    spaced = [pair(f'{"  " * j}p{i}\r\n', 'c', 'r') for j in range(2) for i in range(40)]
    path = write_jsonl(tmp_path / 'spaced.jsonl', spaced + [pair('p0', 'c', 'r')] * 40)
    assert {row['prompt'].strip() for row in load_split(path, 'sft', '{}')[1]} == held_out - {'p0'}
    # Of two prompts one is held out; a single prompt is an error, not an empty side
    two = write_jsonl(tmp_path / 'two.jsonl', [sft_row('a', 'x'), sft_row('b', 'y')])
    assert [len(side) for side in load_split(two, 'sft', '{}')] == [1, 1]
    # The wrapping of a question does not move it, and one that most rows ask is not held out
    asked = [{'prompt': BOT.replace('{}', row['prompt'])} for row in rows]
    path = write_jsonl(tmp_path / 'asked.jsonl', asked)
    assert {row['prompt'][6:-5] for row in load_split(path, 'prompts', BOT)[1]} == held_out
    path = write_jsonl(tmp_path / 'skewed.jsonl', [sft_row('', f'{i}') for i in range(200)]
                       + [sft_row('other', 'r')])
    assert [len(side) for side in load_split(path, 'sft', '{}')] == [200, 1]
    one = write_jsonl(tmp_path / 'one.jsonl', [sft_row('a', 'x'), sft_row('a', 'y')])
    with pytest.raises(UserError, match='only one prompt'):
        load_split(one, 'sft', '{}')


# ----------------------------------------------------------------------------- tokenizers

def test_tokenizer_text_round_trip_and_fingerprint():
    """A tokenizer's text builds the same tokenizer; EOS is the id after the last rank."""
    text = BYTE_TOKENS + 'aGU= 256\naGVs 257\n'          # 'he' and 'hel' in base64
    tokenizer = build_tokenizer(text)
    assert tokenizer_text(tokenizer) == text
    assert tokenizer.eot_token == 258 and tokenizer.n_vocab == 259
    assert tokenizer.encode_ordinary('hello') == [257, 108, 111]
    assert tokenizer.decode([258]) == '<|endoftext|>'
    # A checkpoint keeps the text, the template, and 16 hex digits that depend on the text alone
    kept = checkpoint_text(build_tokenizer(BYTE_TOKENS), BOT)
    assert kept == {'tokenizer': BYTE_TOKENS, 'template': BOT,
                    'fingerprint': hashlib.sha256(BYTE_TOKENS.encode()).hexdigest()[:16]}
    for text, template in ((SWAPPED, BOT), (BYTE_TOKENS, '{}')):
        fingerprint = checkpoint_text(build_tokenizer(text), template)['fingerprint']
        assert (fingerprint == kept['fingerprint']) == (text == BYTE_TOKENS)


def lines(count, *more):
    """Returns the first lines of the byte tokenizer, and more lines."""
    return ''.join([*BYTE_LINES[:count], *[f'{line}\n' for line in more]])


@pytest.mark.parametrize('text, words', [
    ('', '256'),
    (lines(5, 'AAA='), 'tokenizer:6: '),                # one column
    (lines(2, 'AAA= 2 3'), 'tokenizer:3: '),            # three
    (lines(2, 'A?A= 2'), 'tokenizer:3: '),              # not base64
    (lines(2, 'AAA= two'), 'tokenizer:3: '),
    (lines(255), '256'),                                # a byte is missing
    (lines(255, '/w== 256'), 'ranks'),                  # a gap
    (lines(255, '/w== 254'), 'ranks'),                  # a rank twice
    (lines(255, '/w== -1'), 'ranks')])
def test_a_malformed_tokenizer_is_refused(text, words):
    """A broken line is named by its number; gaps in the ranks and missing bytes are refused: some
    text could not be encoded, or some id not decoded."""
    with pytest.raises(DataError, match=words):
        build_tokenizer(text)


def test_load_tokenizer_gpt2_without_a_network(monkeypatch):
    """Offline, 'gpt2' raises one line that says what to set, not the download's traceback."""
    def no_network(name):
        raise ConnectionError('could not resolve the name of the host\nand so on')
    monkeypatch.setattr(tiktoken, 'get_encoding', no_network)
    with pytest.raises(DataError, match='gpt2.*TIKTOKEN_CACHE_DIR') as error:
        load_tokenizer('gpt2')
    assert '\n' not in str(error.value)


@pytest.fixture
def folder(tmp_path):
    """Returns a data folder with nothing but a tokenizer and a template."""
    folder = tmp_path / 'data'
    folder.mkdir()
    (folder / 'tokenizer').write_text('my.tiktoken\n')
    (folder / 'my.tiktoken').write_text(BYTE_TOKENS)
    (folder / 'template.txt').write_text(BOT)
    return folder


def saved_text(text):
    """Returns what load_text reads of a checkpoint, of a run on a folder called data/old."""
    return {**checkpoint_text(build_tokenizer(text), 'Q: {} A:'), 'stage': 'base',
            'config': {'data': 'data/old'}}


def test_load_text_of_a_folder(folder):
    """A folder has its own tokenizer and template. A checkpoint with the same tokenizer is fine; if
    its ids mean other words, an error names both."""
    for saved in (None, saved_text(BYTE_TOKENS)):
        tokenizer, text = load_text(folder, saved)
        assert tokenizer.n_vocab == 257
        assert (text['template'], text['tokenizer']) == (BOT, BYTE_TOKENS)
    with pytest.raises(UserError, match=f'{folder}.*tokenizer.*data/old'):
        load_text(folder, saved_text(SWAPPED))
    (folder / 'template.txt').unlink()
    assert load_text(folder)[1]['template'] == '{}'     # what is typed is the prompt
    later = {**saved_text(BYTE_TOKENS), 'stage': 'sft'}
    assert load_text(folder, later)[1]['template'] == 'Q: {} A:'


def test_a_template_is_read_as_it_was_meant(folder):
    """An editor's last newline and CRLF are no part of a template, and '\\\\n' is a newline, as
    README prints it. One place for the question, and no space, which answers bring. A template
    other than the checkpoint's is refused: its model would chat in another one."""
    for text in (BOT, BOT + '\n', '\ufeff' + BOT, BOT.replace('\n', '\r\n') + '\r\n',
                 'user: {}\\nbot:\n'):
        (folder / 'template.txt').write_bytes(text.encode())
        assert load_text(folder)[1]['template'] == BOT
    for text in ('user:', '{} {}', BOT + ' '):
        (folder / 'template.txt').write_text(text)
        with pytest.raises(UserError, match='template.txt: .*once'):
            load_text(folder)
    (folder / 'template.txt').write_text(BOT)
    with pytest.raises(UserError, match='template.txt.*Q: {} A:.*--tokenizer=RUN'):
        load_text(folder, {**saved_text(BYTE_TOKENS), 'stage': 'sft'})


def test_prompts_end_as_the_template_does(tmp_path, capsys):
    """All, or no template: nothing is said. Some: a count. None: an error, since no question of a
    chat would look like what was trained. Catches DPO on raw questions after SFT on a template,
    which lost more than half of its gain while its log looked better."""
    right = 'user: b\nbot:'
    for prompts, words in (([right, right], ''), (['a', right], '1 of 2'), (['a', 'b'], None)):
        for split in ('train', 'val'):
            rows = [{'prompt': prompt} for prompt in prompts[split == 'val':][:1]]
            write_jsonl(tmp_path / f'{split}.prompts.jsonl', rows)
        path = tmp_path
        load_split(path, 'prompts', '{}')
        assert capsys.readouterr().out == ''
        if words is None:
            with pytest.raises(DataError, match='0 of 2 prompts end.*data.prepare'):
                load_split(path, 'prompts', BOT)
        else:
            load_split(path, 'prompts', BOT)
            said = capsys.readouterr().out
            assert words in said and bool(words) == bool(said)


def test_load_text_of_a_single_file_or_of_what_is_not_there(folder, tmp_path):
    """A single file takes tokenizer and template from the checkpoint and cannot do without one. A
    missing folder says to run prepare.py; a folder without a tokenizer names the file."""
    path = write_jsonl(tmp_path / 'all.jsonl', [sft_row('a', 'b')])
    saved = saved_text(BYTE_TOKENS)
    tokenizer, text = load_text(path, saved)
    assert tokenizer.n_vocab == 257
    assert text == {key: saved[key] for key in ('tokenizer', 'fingerprint', 'template')}
    (folder / 'my.tiktoken').unlink()
    for missing, words in ((path, '--init'), (tmp_path / 'nowhere', 'prepare.py'),
                           (folder, 'my.tiktoken: no such file')):
        with pytest.raises(DataError, match=words):
            load_text(missing)
    (folder / 'tokenizer').unlink()
    with pytest.raises(DataError, match='tokenizer: no such file'):
        load_text(folder)


# ----------------------------------------------------------------------------- randomness, batches

def test_rng_is_a_function_of_seed_step_and_stream():
    """The same three give the same numbers. The seeds are the first four bytes of
    sha256('0 0 batch'): a change here would silently change every run ever reported."""
    assert rng(0, 0, 'batch').initial_seed() == 1843628841
    assert rng(1, 2, 'eval').initial_seed() == 236783993
    draws = [torch.rand(5, generator=rng(3, 7, 'rollout')) for _ in range(2)]
    assert torch.equal(*draws)
    # '1 11 ...' and '11 1 ...' must not meet
    seeds = {rng(seed, step, stream).initial_seed() for seed in (0, 1, 2, 11)
             for step in (0, 1, 2, 11) for stream in ('batch', 'rollout', 'shuffle', 'eval')}
    assert len(seeds) == 64


LENGTHS = [5, 3, 9, 1, 7, 2, 8, 4, 6, 5, 3, 9, 1, 7, 2, 8, 4]      # 17 rows


def first_batches(count, batch_size, seed, start=0):
    return list(itertools.islice(batches(LENGTHS, batch_size, seed, start), count))


@pytest.mark.parametrize('batch_size', [1, 4, 5, 17, 40])
def test_every_epoch_visits_each_row_once(batch_size):
    """Each of three epochs is a permutation of the rows, in another order; no batch is larger than
    batch_size, and no two differ by more than one row. The order depends on the seed, not on
    torch's global generator."""
    torch.manual_seed(batch_size)
    before = torch.get_rng_state()
    per_epoch = -(-17 // batch_size)
    all_batches = first_batches(3 * per_epoch, batch_size, seed=0)
    epochs = [all_batches[i:i + per_epoch] for i in range(0, 3 * per_epoch, per_epoch)]
    for epoch in epochs:
        assert sorted(row for batch in epoch for row in batch) == list(range(17))
        sizes = sorted(map(len, epoch))
        assert sizes[-1] <= batch_size and sizes[-1] - sizes[0] <= 1
    assert torch.equal(before, torch.get_rng_state())
    if per_epoch > 1:
        assert epochs[0] != epochs[1] != epochs[2]
        assert all_batches != first_batches(3 * per_epoch, batch_size, seed=1)


@pytest.mark.parametrize('batch_size', [1, 4, 17, 40])
def test_batches_resume_from_any_step(batch_size):
    """I22: batches(start=k) is batches(start=0) without its first k, over several epochs: a resumed
    run sees the rows that it would have seen. Catches an epoch that begins anew."""
    whole = first_batches(60, batch_size, seed=3)
    for start in range(45):
        assert first_batches(60 - start, batch_size, seed=3, start=start) == whole[start:]


def test_batches_hold_rows_of_like_length():
    """Rows of 1 to 100 tokens in batches of 8: the padded area is at most 1.15 times the tokens
    (unsorted it would be about 1.8 times), and batches still come in a random order of length."""
    generator = random.Random(0)
    lengths = [generator.randint(1, 100) for _ in range(1000)]
    epoch = list(itertools.islice(batches(lengths, 8, seed=0), 125))
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in epoch)
    assert padded < 1.15 * sum(lengths)
    means = [sum(lengths[row] for row in batch) / len(batch) for batch in epoch]
    rises = sum(a < b for a, b in zip(means, means[1:]))
    assert 40 < rises < 85      # 62 of 124 expected; sorted batches would give nearly 124
