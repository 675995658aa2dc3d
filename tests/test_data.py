"""
Checks what happens between a file and the first step: rows, tokenizers, batches, randomness.

    python -m pytest -q tests/test_data.py

Every expected row, id and mask is written by hand. With the byte tokenizer this is easy: the ids of
a text are its bytes, and EOS is 256.
"""
import doctest
import hashlib
import itertools
import json
import random

import pytest
import tiktoken
import torch
from conftest import AB_MERGED, BYTE_TOKENS, EOS, write_jsonl
from conftest import TEMPLATE as BOT        # it does not begin on a new line, as HH_TEMPLATE does

import prefgpt
from data.text import (HH_TEMPLATE, DataError, build_tokenizer, checkpoint_text, decode_responses,
                       encode_rows, load_examples, load_rows, load_split, load_text,
                       load_tokenizer, mark_ends, tokenizer_text)
from prefgpt import UserError, batches, make_batch, printable, rng

BYTE_LINES = BYTE_TOKENS.splitlines(True)
SWAPPED = 'AQ== 0\nAA== 1\n' + ''.join(BYTE_LINES[2:])      # the same tokens under other ids


def ids(text):
    """Returns the byte tokenizer's ids of a text, without the tokenizer."""
    return list(text.encode())


def sft_row(prompt, response):
    return {'prompt': prompt, 'response': response}


# ----------------------------------------------------------------------------- shapes of rows

def safe_rlhf(better, safer, safe_0, safe_1):
    """Returns a row of Safe-RLHF: two axes, helpfulness and safety."""
    return {'prompt': 'P', 'response_0': 'zero', 'response_1': 'one',
            'better_response_id': better, 'safer_response_id': safer,
            'is_response_0_safe': safe_0, 'is_response_1_safe': safe_1}


def turns(*contents):
    """Returns the turns of a chat: user, assistant, user, ..."""
    roles = itertools.cycle(['user', 'assistant'])
    return [{'role': role, 'content': content} for role, content in zip(roles, contents)]


SYSTEM = {'role': 'system', 'content': 'Be kind.'}
DIALOGUE = '\n\nHuman: hi\n\nAssistant: yes\n\nHuman: why\n\nAssistant:'
TRANSCRIPTS = {'chosen': DIALOGUE + ' so', 'rejected': DIALOGUE + ' because'}
PAIR = {'prompt': 'P', 'chosen': ' c', 'rejected': ' r'}

# name, kind, the row as it comes, what must become of it
SHAPES = [
    ('completion', 'sft', {'prompt': 'P', 'completion': ' c'}, sft_row('P', ' c')),
    ('response', 'sft', sft_row('P', ' r'), sft_row('P', ' r')),
    ('more keys than needed', 'sft', {'id': 7, **sft_row('P', ' r'), 'source': None},
     sft_row('P', ' r')),
    ('empty prompt', 'sft', sft_row('', ' r'), sft_row('', ' r')),
    ('pairs', 'pairs', PAIR, PAIR),
    ('pairs with an empty rejected', 'pairs', {**PAIR, 'rejected': ''}, {**PAIR, 'rejected': ''}),
    ('transcripts, split at the last assistant turn', 'pairs', TRANSCRIPTS,
     {'prompt': DIALOGUE, 'chosen': ' so', 'rejected': ' because'}),
    ('two axes, both safe: the better one', 'pairs', safe_rlhf(1, 0, True, True),
     {'prompt': 'P', 'chosen': 'one', 'rejected': 'zero'}),
    ('two axes, one unsafe: the safer one', 'pairs', safe_rlhf(1, 0, True, False),
     {'prompt': 'P', 'chosen': 'zero', 'rejected': 'one'}),
    ('two axes, both unsafe: the safer one', 'pairs', safe_rlhf(0, 1, False, False),
     {'prompt': 'P', 'chosen': 'one', 'rejected': 'zero'}),
    ('pairs as sft', 'sft', PAIR, sft_row('P', ' c')),
    ('transcripts as sft', 'sft', TRANSCRIPTS, sft_row(DIALOGUE, ' so')),
    ('two axes as sft', 'sft', safe_rlhf(1, 1, True, True), sft_row('P', 'one')),
    ('a completion marked as cut', 'sft',
     {'prompt': 'P', 'completion': ' c', 'completion_cut': True},
     {**sft_row('P', ' c'), 'response_cut': True}),
    ('one side marked as cut', 'pairs', {**PAIR, 'chosen_cut': False, 'rejected_cut': True},
     {**PAIR, 'rejected_cut': True}),
    ('pairs as sft, the rejected side cut', 'sft', {**PAIR, 'rejected_cut': True},
     sft_row('P', ' c')),
    ('pairs as sft, the chosen side cut', 'sft', {**PAIR, 'chosen_cut': True},
     {**sft_row('P', ' c'), 'response_cut': True}),
    ('two axes, one response cut', 'pairs', {**safe_rlhf(1, 0, True, True), 'response_1_cut': True},
     {'prompt': 'P', 'chosen': 'one', 'rejected': 'zero', 'chosen_cut': True}),
    ('prompts', 'prompts', {'prompt': 'P'}, {'prompt': 'P'}),
    ('sft as prompts', 'prompts', {'prompt': 'P', 'completion': ' c'}, {'prompt': 'P'}),
    ('pairs as prompts', 'prompts', PAIR, {'prompt': 'P'}),
    ('transcripts as prompts', 'prompts', TRANSCRIPTS, {'prompt': DIALOGUE}),
]


@pytest.mark.parametrize('kind, row, expected', [case[1:] for case in SHAPES],
                         ids=[case[0] for case in SHAPES])
def test_shapes(tmp_path, kind, row, expected):
    """Every accepted shape of a row becomes a prompt and its responses, and nothing more."""
    assert load_rows(write_jsonl(tmp_path / 'rows.jsonl', [row]), kind) == [expected]


@pytest.mark.parametrize('template, messages, prompt, response', [
    (HH_TEMPLATE, turns('hi', 'yes'), '\n\nHuman: hi\n\nAssistant:', ' yes'),
    (HH_TEMPLATE, [SYSTEM, *turns('hi', 'yes', 'why', 'so')], 'Be kind.' + DIALOGUE, ' so'),
    (BOT, [SYSTEM, *turns('hi', 'yes', 'why', 'so')],
     'Be kind.\nuser: hi\nbot: yes\nuser: why\nbot:', ' so'),
    (BOT, turns('a {} b', 'c {} d'), 'user: a {} b\nbot:', ' c {} d')],
    ids=['HH', 'HH, a system and four turns', 'a template without a newline in front', 'braces'])
def test_messages(tmp_path, template, messages, prompt, response):
    """Turns of a chat are put into the template; the last one is the response."""
    path = write_jsonl(tmp_path / 'rows.jsonl', [{'messages': messages}])
    assert load_rows(path, 'sft', template) == [sft_row(prompt, response)]
    assert load_rows(path, 'prompts', template) == [{'prompt': prompt}]


def with_messages(*messages):
    """Returns the JSON text of a row of chat turns."""
    return json.dumps({'messages': list(messages)})


def without(row, key):
    """Returns the JSON text of a row that lacks one key."""
    return json.dumps({name: value for name, value in row.items() if name != key})


USER, ASSISTANT = turns('hi', 'yes')
# name, kind, the bad line, words that the message must hold
MALFORMED = [
    ('not JSON', 'sft', '{"prompt": "P", "response": }', ['column']),
    ('cut off', 'sft', '{"prompt": "P", "respo', []),
    ('a list', 'sft', '["P", "r"]', ['list']),
    ('a string', 'sft', '"P"', ['str']),
    ('a key twice', 'sft', '{"prompt": "P", "response": "a", "response": "b"}',
     ["'response'", 'twice']),
    ('a key twice, deeper', 'sft',
     '{"messages": [{"role": "user", "role": "user", "content": "hi"}]}', ["'role'", 'twice']),
    ('NaN', 'sft', '{"prompt": "P", "response": "r", "weight": NaN}', ['NaN']),
    ('Infinity', 'sft', '{"prompt": "P", "response": "r", "weight": -Infinity}', ['Infinity']),
    ('a lone surrogate', 'sft', '{"prompt": "P", "response": "\\ud800"}', ['surrogate']),
    ('a lone surrogate in messages', 'sft',
     with_messages(USER, {'role': 'assistant', 'content': '\ud800'}), ['surrogate']),
    ('a latin-1 byte', 'sft', b'{"prompt": "caf\xe9", "response": "r"}', ['0xe9']),
    ('nested too deep', 'sft', '[' * 100_000, []),
    ('prompt is null', 'sft', '{"prompt": null, "response": "r"}', ["'prompt'", 'NoneType']),
    ('prompt is a number', 'prompts', '{"prompt": 5}', ["'prompt'", 'int']),
    ('response is a list', 'sft', '{"prompt": "P", "response": ["r"]}', ["'response'", 'list']),
    ('rejected is null', 'pairs', '{"prompt": "P", "chosen": "c", "rejected": null}',
     ["'rejected'", 'NoneType']),
    ('response is empty', 'sft', '{"prompt": "P", "response": ""}', ["'response'", 'empty']),
    ('completion is empty', 'sft', '{"prompt": "P", "completion": ""}', ['empty']),
    ('chosen is empty', 'pairs', '{"prompt": "P", "chosen": "", "rejected": "r"}',
     ["'chosen'", 'empty']),
    ('rejected is empty and cut', 'pairs',
     '{"prompt": "P", "chosen": "c", "rejected": "", "rejected_cut": true}',
     ["'rejected'", 'empty']),
    ('a mark of another key', 'sft',
     '{"prompt": "P", "completion": "c", "response_cut": true}', ["'response_cut'", 'not there']),
    ('a mark of a key that is absent', 'pairs',
     '{"prompt": "P", "chosen": "c", "rejected": "r", "completion_cut": true}',
     ["'completion_cut'", 'not there']),
    ('cut is a word', 'pairs',
     '{"prompt": "P", "chosen": "c", "rejected": "r", "chosen_cut": "yes"}', ["'chosen_cut'"]),
    ('no prompt', 'prompts', '{"question": "P"}', ["'prompt'", 'question']),
    ('no response', 'sft', '{"prompt": "P", "answer": "r"}', ["'response'", 'prompt, answer']),
    ('no rejected', 'pairs', '{"prompt": "P", "chosen": "c"}', ["'rejected'", 'prompt, chosen']),
    ('sft read as pairs', 'pairs', '{"prompt": "P", "response": "r"}', ["'chosen'"]),
    ('messages is a string', 'sft', '{"messages": "hi"}', ["'messages'"]),
    ('messages is empty', 'sft', '{"messages": []}', ["'messages'"]),
    ('messages ends with the user', 'sft', with_messages(USER, ASSISTANT, USER), ["'messages'"]),
    ('messages without a question', 'sft', with_messages(ASSISTANT), ["'messages'"]),
    ('messages without content', 'sft', with_messages({'role': 'user'}, ASSISTANT),
     ["'content'"]),
    ('messages with null content', 'sft',
     with_messages({'role': 'user', 'content': None}, ASSISTANT), []),
    ('messages with a null answer', 'sft',
     with_messages(USER, {'role': 'assistant', 'content': None}), []),
    ('messages with an empty answer', 'sft',
     with_messages(USER, {'role': 'assistant', 'content': ''}), ['empty']),
    ('messages with a tool', 'sft',
     with_messages({'role': 'tool', 'content': '7'}, USER, ASSISTANT), ["'tool'"]),
    ('messages with a list as role', 'sft',
     with_messages({'role': ['user'], 'content': 'hi'}, USER, ASSISTANT), []),
    ('transcripts that part early', 'pairs',
     '{"chosen": "\\n\\nHuman: a\\n\\nAssistant: c", "rejected": "\\n\\nHuman: b\\n\\n'
     'Assistant: r"}', ["'chosen'", "'rejected'"]),
    ('transcripts without the marker', 'pairs', '{"chosen": "c", "rejected": "r"}',
     ['Assistant:']),
    ('transcripts that are null', 'pairs', '{"chosen": null, "rejected": "r"}', ["'chosen'"]),
    ('transcripts that are lists', 'pairs', '{"chosen": [1], "rejected": [2]}', ["'chosen'"]),
    ('two axes, one missing', 'pairs', without(safe_rlhf(0, 1, False, False),
                                               'safer_response_id'), ['safer_response_id']),
    ('two axes, safety missing', 'pairs', without(safe_rlhf(0, 1, True, True),
                                                  'is_response_1_safe'), ['is_response_1_safe']),
    ('two axes, no second response', 'pairs', without(safe_rlhf(0, 1, True, True), 'response_1'),
     ['response_1']),
    ('two axes, a null id', 'pairs', json.dumps(safe_rlhf(None, 1, True, True)), []),
    ('two axes, a third response', 'pairs', json.dumps(safe_rlhf(2, 1, True, True)), []),
]


@pytest.mark.parametrize('kind, line, words', [case[1:] for case in MALFORMED],
                         ids=[case[0] for case in MALFORMED])
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, kind, line, words):
    """A bad row on line 4, after blank lines, raises DataError('...rows.jsonl:4: ...')."""
    good = b'{"prompt": "P", "response": "r", "chosen": "c", "rejected": "r"}\n'
    bad = line if isinstance(line, bytes) else line.encode()
    path = tmp_path / 'rows.jsonl'
    path.write_bytes(good + b'\n  \n' + bad + b'\n' + good)
    with pytest.raises(DataError) as error:
        load_rows(path, kind)
    message = str(error.value)
    assert message.startswith(f'{path}:4: ')
    assert '\n' not in message
    assert [word for word in words if word not in message] == []


def test_bom_crlf_blank_lines_and_unicode_line_ends(tmp_path):
    """A byte-order mark, CRLF, blank lines and a missing last newline are fine; U+2028 and U+0085
    inside a string end no line (str.splitlines would cut there)."""
    path = tmp_path / 'rows.jsonl'
    path.write_bytes('\ufeff{"prompt": "a\u2028b", "response": "c\u0085d"}\r\n\r\n   \n'
                     '{"prompt": "e", "response": "f"}'.encode())
    assert load_rows(path, 'sft') == [{'prompt': 'a\u2028b', 'response': 'c\u0085d'},
                                      {'prompt': 'e', 'response': 'f'}]


def test_a_file_without_rows_is_an_error(tmp_path):
    """An empty file, a missing one, or a folder in its place raises DataError with the path."""
    path = tmp_path / 'rows.jsonl'
    for contents in (b'', b'\n \n', b'\xef\xbb\xbf'):
        path.write_bytes(contents)
        with pytest.raises(DataError, match='rows.jsonl: no rows'):
            load_rows(path, 'sft')
    with pytest.raises(DataError, match='nowhere.jsonl: no such file'):
        load_rows(tmp_path / 'nowhere.jsonl', 'sft')
    with pytest.raises(DataError, match='is a directory'):
        load_rows(tmp_path, 'sft')


# ----------------------------------------------------------------------------- ids of rows

def test_i9_prompt_and_response_are_encoded_apart():
    """I9: 'a' + 'b' stays two ids where a merge 'ab' exists. Catches texts joined before they are
    encoded: the prompt's ids would depend on the response."""
    merges = build_tokenizer(AB_MERGED)
    assert merges.encode_ordinary('ab') == [256]
    sft = encode_rows([sft_row('a', 'b')], 'sft', merges, 16)
    assert sft == [([97], [98, 257])]
    pairs = encode_rows([{'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}], 'pairs', merges, 16)
    assert pairs == [([97], [98, 257], [99, 257])]
    assert encode_rows([{'prompt': 'a'}], 'prompts', merges, 16, 8) == [([97],)]


def test_eos_is_appended_and_an_empty_prompt_is_eos(byte_tokenizer):
    """I10: a whole response ends with the EOS id; an empty prompt is [EOS], because some token must
    emit the first one; an empty rejected response is EOS alone. Catches EOS left out, after which
    a model never stops."""
    rows = [{'prompt': '', 'chosen': 'hi', 'rejected': ''}]
    assert encode_rows(rows, 'pairs', byte_tokenizer, 16) == [([EOS], [104, 105, EOS], [EOS])]
    assert encode_rows([{'prompt': ''}], 'prompts', byte_tokenizer, 16, 8) == [([EOS],)]


def test_text_never_becomes_a_special_token(byte_tokenizer):
    """I9: '<|endoftext|>' in a prompt or a response stays 13 bytes. Catches encode with special
    tokens allowed: user text could end a response."""
    text = '<|endoftext|>'
    [(prompt, response)] = encode_rows([sft_row(text, text)], 'sft', byte_tokenizer, 64)
    assert prompt == ids(text) and len(prompt) == 13
    assert response == ids(text) + [EOS]


# block_size 8; prompt, response, the ids that remain. A response counts its EOS: 'vwx' is 4 long
CUTS = [
    ('fits, one to spare', 'abc', 'vwx', 'abc', ids('vwx') + [EOS]),
    ('fits exactly', 'abcd', 'vwx', 'abcd', ids('vwx') + [EOS]),
    ('one too long: the prompt loses its left end', 'abcde', 'vwx', 'bcde', ids('vwx') + [EOS]),
    ('a short response leaves the prompt its room', 'abcdefghi', 'v', 'defghi', [118, EOS]),
    ('a long response, a short prompt: nothing is cut', 'ab', 'rstuv', 'ab', ids('rstuv') + [EOS]),
    ('response one too long: EOS goes first', 'ab', 'rstuvw', 'ab', ids('rstuvw')),
    ('both long: half each', 'abcdefgh', 'qrstuvwx', 'efgh', ids('qrst')),
    ('both just over half', 'abcde', 'vwxy', 'bcde', ids('vwxy')),
]


@pytest.mark.parametrize('prompt, response, kept_prompt, kept_response',
                         [case[1:] for case in CUTS], ids=[case[0] for case in CUTS])
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
    rows = [{'prompt': 'p', 'response': 'ab', 'response_cut': True}]
    assert encode_rows(rows, 'sft', byte_tokenizer, 8) == [(ids('p'), ids('ab'))]
    capsys.readouterr()
    rows = [{'prompt': 'p', 'chosen': 'ab', 'rejected': 'ab', 'rejected_cut': True}]
    assert encode_rows(rows, 'pairs', byte_tokenizer, 8) == [
        (ids('p'), ids('ab') + [EOS], ids('ab'))]
    assert '1 responses marked as cut' in capsys.readouterr().out


def test_a_pair_shares_one_prompt_after_cutting(byte_tokenizer):
    """I9: the longer response decides how much of the prompt stays, and both sides keep the same.
    Catches two sides that are cut apart: their logprobs would be for different questions."""
    rows = [{'prompt': 'abcde', 'chosen': 'v', 'rejected': 'xyz'}]
    assert encode_rows(rows, 'pairs', byte_tokenizer, 8) == [
        (ids('bcde'), [118, EOS], ids('xyz') + [EOS])]
    rows = [{'prompt': 'abcde', 'chosen': 'v', 'rejected': 'qrstuv'}]
    assert encode_rows(rows, 'pairs', byte_tokenizer, 8) == [
        (ids('bcde'), [118, EOS], ids('qrst'))]


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
    """I10: prompts and responses of 0 to 20 bytes in blocks of 2 to 12, pairs too: at least one
    token remains of each, at most the block of both together. Catches a response that is cut away:
    its loss is 0 / 0."""
    sft = [sft_row('p' * i, 'r' * j) for i in range(21) for j in range(1, 21)]
    pairs = [{'prompt': 'p' * i, 'chosen': 'c' * j, 'rejected': 'r' * (20 - j)}
             for i in range(21) for j in range(1, 21)]              # the rejected side: 0 to 19
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
    line = capsys.readouterr().out
    assert line.count('\n') == 1
    assert 'train: 4 sft kept' in line
    assert '2 prompts cut' in line and '2 responses cut' in line and 'dropped' not in line


def test_i11_pairs_that_are_equal_after_cutting_are_dropped(byte_tokenizer, capsys):
    """I11: a pair whose responses differ only in what was cut off, or not at all, is dropped and
    counted: it would pull one response up and down at once. If none is left, that is an error.
    Catches texts compared in place of ids."""
    rows = [{'prompt': 'p', 'chosen': 'good', 'rejected': 'bad'},
            {'prompt': 'p', 'chosen': 'same', 'rejected': 'same'},
            {'prompt': 'p', 'chosen': 'abcdefgX', 'rejected': 'abcdefgY'},     # cut to 7 bytes
            {'prompt': 'p', 'chosen': 'abcdefX', 'rejected': 'abcdefY'}]       # differ in the 7th
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
    bad = '\N{REPLACEMENT CHARACTER}'
    assert printable('\x1b[31mred\x07\n') == f'{bad}[31mred{bad}\n'
    assert printable('a\rb\x00c\x7fd\x9be') == f'a{bad}b{bad}c{bad}d{bad}e'
    assert printable('\u202eabc') == f'{bad}abc'
    assert printable('Grüße, 世界 ☺\n\nok') == 'Grüße, 世界 ☺\n\nok'


def test_the_examples_in_docstrings_are_true():
    """The examples in prefgpt's docstrings run and give what they say."""
    failed, tried = doctest.testmod(prefgpt)
    assert failed == 0 and tried >= 2


# ----------------------------------------------------------------------------- splits

def test_load_examples_are_the_encoded_rows_of_both_splits(tmp_path, byte_tokenizer, capsys):
    """A folder's training and held-out rows come back as ids, messages by the template of the
    checkpoint. rows='pairs' is SFT on the chosen sides, one line per split is printed, and a
    missing file is named."""
    write_jsonl(tmp_path / 'train.pairs.jsonl', [{'prompt': 'P', 'chosen': 'c', 'rejected': 'r'}])
    write_jsonl(tmp_path / 'val.pairs.jsonl', [{'prompt': 'Q', 'chosen': 'd', 'rejected': 's'}])
    write_jsonl(tmp_path / 'train.prompts.jsonl', [{'messages': turns('hi', 'yes')}])
    write_jsonl(tmp_path / 'val.prompts.jsonl', [{'prompt': 'abcdefgh' * 4}])
    text = checkpoint_text(byte_tokenizer, BOT)
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
    """Of 40 prompts with two rows each, 4 are held out with both rows, the same ones for every
    kind. Catches a reward model that is tested on prompts that SFT was trained on."""
    rows = [{'prompt': f'p{i}', 'chosen': f'c{i} {j}', 'rejected': f'r{i} {j}'}
            for j in range(2) for i in range(40)]
    path = write_jsonl(tmp_path / 'all.jsonl', rows)
    held_out = []
    for kind in ('sft', 'pairs', 'prompts'):
        train, val = load_split(path, kind, HH_TEMPLATE)
        assert len(train) == 72 and len(val) == 8
        prompts = [{row['prompt'] for row in side} for side in (train, val)]
        assert len(prompts[0]) == 36 and len(prompts[1]) == 4
        assert not prompts[0] & prompts[1]
        held_out.append(prompts[1])
    assert held_out[0] == held_out[1] == held_out[2]
    # The smallest CRC-32s of the 40; hash() would hold out others in every process
    assert held_out[0] == {'p25', 'p31', 'p35', 'p39'}

    # Neither the order of the rows nor how often a prompt comes may move the split
    random.Random(0).shuffle(rows)
    path = write_jsonl(tmp_path / 'shuffled.jsonl', rows[:60] + rows)
    assert {row['prompt'] for row in load_split(path, 'sft', HH_TEMPLATE)[1]} == held_out[0]


def test_load_split_of_a_file_with_few_prompts(tmp_path):
    """Of two prompts one is held out; a single prompt is an error, not an empty side."""
    two = write_jsonl(tmp_path / 'two.jsonl', [sft_row('a', 'x'), sft_row('b', 'y')])
    train, val = load_split(two, 'sft', HH_TEMPLATE)
    assert len(train) == len(val) == 1
    one = write_jsonl(tmp_path / 'one.jsonl', [sft_row('a', 'x'), sft_row('a', 'y')])
    with pytest.raises(DataError, match='only one prompt'):
        load_split(one, 'sft', HH_TEMPLATE)


# ----------------------------------------------------------------------------- tokenizers

def test_tokenizer_text_round_trip():
    """A tokenizer's text builds the same tokenizer; EOS is the id after the last rank."""
    text = BYTE_TOKENS + 'aGU= 256\naGVs 257\n'          # 'he' and 'hel' in base64
    tokenizer = build_tokenizer(text)
    assert tokenizer_text(tokenizer) == text
    assert tokenizer.eot_token == 258 and tokenizer.n_vocab == 259
    assert tokenizer.encode_ordinary('hello') == [257, 108, 111]
    assert tokenizer.decode([258]) == '<|endoftext|>'


BAD_TOKENIZERS = [
    ('empty', '', '256'),
    ('one column', ''.join(BYTE_LINES[:5]) + 'AAA=\n', 'tokenizer:6: '),
    ('three columns', ''.join(BYTE_LINES[:2]) + 'AAA= 2 3\n', 'tokenizer:3: '),
    ('not base64', ''.join(BYTE_LINES[:2]) + 'A?A= 2\n', 'tokenizer:3: '),
    ('rank is not a number', ''.join(BYTE_LINES[:2]) + 'AAA= two\n', 'tokenizer:3: '),
    ('a byte is missing', ''.join(BYTE_LINES[:255]), '256'),
    ('a gap in the ranks', ''.join(BYTE_LINES[:255]) + '/w== 256\n', 'ranks'),
    ('a rank twice', ''.join(BYTE_LINES[:255]) + '/w== 254\n', 'ranks'),
    ('a negative rank', ''.join(BYTE_LINES[:255]) + '/w== -1\n', 'ranks'),
]


@pytest.mark.parametrize('text, words', [case[1:] for case in BAD_TOKENIZERS],
                         ids=[case[0] for case in BAD_TOKENIZERS])
def test_a_malformed_tokenizer_is_refused(text, words):
    """A broken line is named by its number; gaps in the ranks and missing bytes are refused: some
    text could not be encoded, or some id not decoded."""
    with pytest.raises(DataError, match=words):
        build_tokenizer(text)


def test_any_bytes_can_be_encoded_and_any_ids_decoded(byte_tokenizer):
    """Text in any script comes back; ids that are not UTF-8 decode to U+FFFD and raise no error:
    a model may sample anything."""
    text = 'naïve 世界 \U0001f600 \x00\t\n'
    assert byte_tokenizer.decode(byte_tokenizer.encode_ordinary(text)) == text
    assert byte_tokenizer.decode([0xff, 104, 0xc3]) == '\ufffdh\ufffd'
    generator = random.Random(0)
    for _ in range(20):
        byte_tokenizer.decode([generator.randrange(257) for _ in range(50)])


def test_fingerprint():
    """A checkpoint keeps the tokenizer's text, the template, and 16 hex digits that depend on the
    text alone: the same tokens in another order give others."""
    kept = checkpoint_text(build_tokenizer(BYTE_TOKENS), BOT)
    assert kept == {'tokenizer': BYTE_TOKENS, 'template': BOT,
                    'fingerprint': hashlib.sha256(BYTE_TOKENS.encode()).hexdigest()[:16]}
    for text, template in ((SWAPPED, BOT), (BYTE_TOKENS, '{}')):
        fingerprint = checkpoint_text(build_tokenizer(text), template)['fingerprint']
        assert (fingerprint == kept['fingerprint']) == (text == BYTE_TOKENS)


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
    return {**checkpoint_text(build_tokenizer(text), 'Q: {} A:'), 'config': {'data': 'data/old'}}


def test_load_text_of_a_folder(folder):
    """A folder has its own tokenizer and template. A checkpoint with the same tokenizer is fine; if
    its ids mean other words, an error names both."""
    for saved in (None, saved_text(BYTE_TOKENS)):
        tokenizer, text = load_text(folder, saved)
        assert tokenizer.n_vocab == 257 and text['template'] == BOT
        assert text['tokenizer'] == BYTE_TOKENS
    with pytest.raises(UserError, match=f'{folder}.*tokenizer.*data/old'):
        load_text(folder, saved_text(SWAPPED))
    (folder / 'template.txt').unlink()
    assert load_text(folder)[1]['template'] == '{}'     # what is typed is the prompt
    (folder / 'template.txt').write_text('user:')
    with pytest.raises(DataError, match='template.txt'):
        load_text(folder)


def test_load_text_of_a_single_file(tmp_path):
    """A single file takes tokenizer and template from the checkpoint and cannot do without one."""
    path = write_jsonl(tmp_path / 'all.jsonl', [sft_row('a', 'b')])
    saved = saved_text(BYTE_TOKENS)
    tokenizer, text = load_text(path, saved)
    assert tokenizer.n_vocab == 257
    assert text == {key: saved[key] for key in ('tokenizer', 'fingerprint', 'template')}
    with pytest.raises(DataError, match='--init'):
        load_text(path)


def test_load_text_of_what_is_not_there(folder, tmp_path):
    """A missing folder says to run prepare.py; a folder without a tokenizer names the file."""
    with pytest.raises(DataError, match='prepare.py'):
        load_text(tmp_path / 'nowhere')
    (folder / 'my.tiktoken').unlink()
    with pytest.raises(DataError, match='my.tiktoken'):
        load_text(folder)
    (folder / 'tokenizer').unlink()
    with pytest.raises(DataError, match='tokenizer'):
        load_text(folder)


# ----------------------------------------------------------------------------- randomness, batches

def test_rng_is_a_function_of_seed_step_and_stream():
    """The same three give the same numbers, whatever was drawn before: nothing has state. The seeds
    are the first four bytes of sha256('0 0 batch') and so on, little-endian: a change here would
    silently change every run ever reported."""
    assert rng(0, 0, 'batch').initial_seed() == 1843628841
    assert rng(1, 2, 'eval').initial_seed() == 236783993
    torch.manual_seed(1)
    first = torch.rand(5, generator=rng(3, 7, 'rollout'))
    torch.rand(100)
    assert torch.equal(first, torch.rand(5, generator=rng(3, 7, 'rollout')))
    seeds = {rng(seed, step, stream).initial_seed() for seed in range(4) for step in range(4)
             for stream in ('batch', 'rollout', 'shuffle', 'eval')}
    assert len(seeds) == 64
    # '1 11 ...' and '11 1 ...' must not meet
    assert rng(1, 11, 'batch').initial_seed() != rng(11, 1, 'batch').initial_seed()


LENGTHS = [5, 3, 9, 1, 7, 2, 8, 4, 6, 5, 3, 9, 1, 7, 2, 8, 4]      # 17 rows


@pytest.mark.parametrize('batch_size', [1, 4, 5, 17, 40])
def test_every_epoch_visits_each_row_once(batch_size):
    """Each of three epochs is a permutation of the rows, in another order; only one batch is
    smaller than batch_size."""
    per_epoch = -(-17 // batch_size)
    all_batches = list(itertools.islice(batches(LENGTHS, batch_size, seed=0), 3 * per_epoch))
    epochs = [all_batches[i:i + per_epoch] for i in range(0, 3 * per_epoch, per_epoch)]
    for epoch in epochs:
        assert sorted(row for batch in epoch for row in batch) == list(range(17))
        sizes = sorted(map(len, epoch), reverse=True)
        assert sizes[:-1] == [batch_size] * (per_epoch - 1)
        assert sizes[-1] == 17 - batch_size * (per_epoch - 1)
    if per_epoch > 1:
        assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize('batch_size', [1, 4, 17, 40])
def test_batches_resume_from_any_step(batch_size):
    """I22: batches(start=k) is batches(start=0) without its first k, over several epochs: a resumed
    run sees the rows that it would have seen. Catches an epoch that begins anew."""
    whole = list(itertools.islice(batches(LENGTHS, batch_size, seed=3), 60))
    for start in range(45):
        tail = list(itertools.islice(batches(LENGTHS, batch_size, 3, start), 60 - start))
        assert tail == whole[start:]


def test_batches_depend_on_the_seed_alone():
    """Another seed, another order; the global generator and the caller's list are untouched."""
    lengths = list(LENGTHS)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = list(itertools.islice(batches(lengths, 4, seed=0), 10))
    other = list(itertools.islice(batches(lengths, 4, seed=1), 10))
    assert first != other
    assert lengths == LENGTHS
    assert torch.equal(before, torch.get_rng_state())


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
