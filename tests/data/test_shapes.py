"""
data/shapes.py: the shapes that are read, the rows that are dropped, and what is refused.

The expected outcome of each kind of row that people bring is in three tables, written by hand.
"""
import inspect, json, os, subprocess, sys

import pytest

from data import shapes
from data.rows import convert
from data.shapes import CONTENT, read_shape
from data.turns import HH_TEMPLATE, Odd, Unknown, check_turns, question_of, render

from conftest import TEMPLATE


def user(text):
    return {'role': 'user', 'content': text}


def bot(text):
    return {'role': 'assistant', 'content': text}


def safe(better=0, safer=0, safe_0=True, safe_1=True, **more):
    return {'prompt': 'Q', 'response_0': 'zero', 'response_1': 'one', 'better_response_id': better,
            'safer_response_id': safer, 'is_response_0_safe': safe_0, 'is_response_1_safe': safe_1,
            **more}


def rated(*answers):
    """Returns a row of UltraFeedback: (response, its ratings, overall_score) each."""
    return {'instruction': 'Q', 'models': ['a', 'b'], 'completions': [
        {'response': response, 'overall_score': score, 'annotations': {
            str(i): {'Rating': rating} for i, rating in enumerate(ratings)}}
        for response, ratings, score in answers]}


def sft(prompt, completion):
    return {'prompt': prompt, 'completion': completion}


def pair(prompt, chosen='c', rejected='r'):
    return {'prompt': prompt, 'chosen': chosen, 'rejected': rejected}


Q, SYSTEM = [('user', 'Q')], {'role': 'system', 'content': 'Be brief.'}
LONG = [('system', 'Be brief.'), ('user', 'hi'), ('assistant', 'yes'), ('user', 'Q')]
LONG_ROW = [SYSTEM, user('hi'), bot('yes'), user('Q')]
HH = '\n\nHuman: hi\n\nAssistant: yes\n\nHuman: Q\n\nAssistant:'
READ = [  # a row, what its shape's function makes of it
    ({'prompt': 'P'}, {'prompt': 'P'}),
    ({'prompt': [user('Q')]}, {'prompt': Q}),
    (sft('P', ' r'), sft('P', ' r')),
    ({'prompt': 'P', 'response': 'r'}, sft('P', 'r')),
    (sft([user('Q')], [bot('r')]), sft(Q, 'r')),
    (sft('Q', [bot('r')]), sft(Q, 'r')),
    ({**sft('P', 'r'), 'completion_cut': True}, {**sft('P', 'r'), 'completion_cut': True}),
    ({'messages': [*LONG_ROW, bot('r')]}, sft(LONG, 'r')),
    ({'messages': [user('Q')]}, {'prompt': Q}),
    ({'prompt': 'Q', 'messages': [SYSTEM, user('Q'), bot('r')]},        # UltraChat 200k
     sft([('system', 'Be brief.'), *Q], 'r')),
    ({'messages': [{**user('Q'), 'from': None, 'tool_calls': None}, bot('r')]}, sft(Q, 'r')),
    ({'messages': [{'role': 'human', 'content': 'Q'}, {'role': 'gpt', 'content': 'r'}]},
     sft(Q, 'r')),
    ({'conversations': [{'from': 'human', 'value': 'Q'}, {'from': 'gpt', 'value': 'r'}]},
     sft(Q, 'r')),
    ({'messages': [user([{'type': 'text', 'text': 'Q'}]), bot('r')]}, sft(Q, 'r')),
    ({'messages': [user('Q'), {**bot('r'), 'weight': None}]}, sft(Q, 'r')),
    ({'messages': [user('hi'), {**bot('yes'), 'weight': 0}, user('Q'), bot('r')]},
     sft(LONG[1:], 'r')),                       # only the last turn is learned anyway
    (pair('P'), pair('P')),
    ({**pair('P'), 'chosen_cut': True}, {**pair('P'), 'chosen_cut': True}),
    ({**pair('P'), 'score_chosen': '10', 'score_rejected': '9.5'}, pair('P')),  # not as text
    (pair([user('Q')]), pair(Q)),
    (pair([user('Q')], [bot('c')], [bot('r')]), pair(Q)),
    (pair('Q', [bot('c')], [bot('r')]), pair(Q)),
    ({'chosen': [*LONG_ROW, bot('c')], 'rejected': [*LONG_ROW, bot('r')]}, pair(LONG)),
    ({'chosen': [user('Q'), bot('c')], 'rejected': [user('Q'), bot('c')]}, pair(Q, 'c', 'c')),
    ({'messages': [user('Q')], 'chosen': 'c', 'rejected': 'r'}, pair(Q)),
    ({**pair('Q', [user('Q'), bot('c')], [user('Q'), bot('r')]),        # UltraFeedback-binarized
      'score_chosen': 8.5, 'score_rejected': 4.0, 'messages': [user('Q'), bot('c')]}, pair(Q)),
    ({'chosen': HH + ' c', 'rejected': HH + ' r'}, pair(LONG[1:], ' c', ' r')),
    ({'chosen': HH[2:] + ' c', 'rejected': HH[2:] + ' r'}, pair(LONG[1:], ' c', ' r')),
    ({'instruction': 'Q', 'input': '', 'output': 'r'}, sft(Q, 'r')),
    ({'instruction': 'Q', 'input': 'x', 'output': 'r'}, sft([('user', 'Q\nx')], 'r')),
    ({'instruction': 'Q', 'input': 'x', 'chosen': 'c', 'rejected': 'r'}, pair([('user', 'Q\nx')])),
    ({'instruction': 'Q', 'input': '', 'output_1': 'r', 'output_2': 'c', 'preference': 2}, pair(Q)),
    (rated(('r', '13', 9.0), ('c', '55', 1.0), ('-', '33', 5.0)), pair(Q)),     # ratings first
    (rated(('c', ['4.5', 5, 'N/A'], 1.0), ('r', [4.5, 2.0, '5'], 9.0)), pair(Q)),   # two of three
    (rated(('c', '5', 8.0), ('r', ['N/A'], 2.0)), pair(Q)),     # none of one: overall_score
    (safe(1, 0), pair(Q, 'one', 'zero')),                       # both safe: the better one
    (safe(1, 0, True, False), pair(Q, 'zero', 'one')),          # else the safer one
    (safe(0, 1, False, False), pair(Q, 'one', 'zero')),
    (safe(1, 0, 1, 1), pair(Q, 'one', 'zero'))]                 # flags as numbers


@pytest.mark.parametrize('row, expected', READ, ids=lambda row: str(row)[:60])
def test_a_shape_is_read(row, expected):
    """Every shape that is read gives a prompt, as text or as turns, and its responses."""
    assert read_shape(row)[0] == expected


ODD = [  # a row, a word of the reason
    ({'chosen': HH + ' c', 'rejected': HH.replace('hi', 'ho') + ' r'}, 'transcripts'),
    ({'chosen': HH + ' c', 'rejected': 'no marker'}, 'transcripts'),
    ({'chosen': [user('Q'), bot('c'), user('and?'), bot('d')], 'rejected': [user('Q'), bot('r')]},
     'more than one'),
    ({**pair('P'), 'score_chosen': 7.0, 'score_rejected': 7.0}, 'not above'),
    ({'messages': [user('Q'), {**bot('r'), 'weight': 0}]}, 'not to be learned'),
    ({'messages': [user('Q'), {**bot('r'), 'train': False}]}, 'not to be learned'),
    ({**pair('P'), 'score_chosen': '7.0', 'score_rejected': 7}, 'not above'),
    (rated(('a', '5', 1.0), ('b', '5', 2.0)), 'equal'),
    (rated(('a', [], None), ('b', '5', 2.0)), 'without ratings'),
    (rated(('a', ['N/A'], 2.0), ('b', '5', 2.0)), 'without ratings'),
    (rated(), 'without ratings'),
    (safe(0, 1, True, False), 'not safe')]
REFUSED = [
    ({**sft('P', 'r'), 'label': False}, "'label' beside"),
    ({**sft('P', 'r'), 'is_safe': False}, "'is_safe' beside"),
    ({**sft('P', 'r'), 'history': [['a', 'b']]}, "'history' beside"),
    ({**sft('P', 'r'), 'messages': [user('Q'), bot('r')]}, "'messages' beside"),
    ({'prompt': 'P', 'response': 'r', 'helpfulness': 0}, "'helpfulness' beside"),
    ({**pair('P'), 'response': 'r'}, "'response' beside"),
    ({**pair('P'), 'system': 'Be brief.'}, "'system' beside"),
    ({**pair('P'), 'instruction': 'Q'}, "'prompt' beside"),
    ({**pair('P'), 'messages': [user('Q')]}, "both 'prompt' and 'messages'"),
    ({**pair('P'), 'score_chosen': 2, 'score_rejected': 9}, 'not above'),
    ({**pair('P'), 'chosen': 42}, 'int'), ({**pair('P'), 'rejected': ['r']}, 'list|str'),
    ({**pair('P'), 'chosen': ['c'], 'rejected': ['r']}, 'list'),
    (pair('other', [user('Q'), bot('c')], [user('Q'), bot('r')]), 'same turns'),
    ({'chosen': 'a c', 'rejected': 'a r'}, "without a 'prompt'"),
    ({'messages': 'hi'}, 'str'), ({'messages': ['hi']}, 'list'),
    ({'messages': [{'role': 'tool', 'content': '7'}, user('Q'), bot('r')]}, "'tool'"),
    ({'messages': [user('Q'), {**bot('r'), 'tool_calls': [{}]}]}, 'tool call'),
    ({'messages': [{'role': ['user'], 'content': 'Q'}, bot('r')]}, 'turn of'),
    ({'messages': [user('Q'), {**bot('r'), 'content': None}]}, "'content'"),
    ({'messages': [user([{'type': 'image'}]), bot('r')]}, "'text'"),
    (safe(chosen='one', rejected='zero'), "'chosen' beside"),
    (safe(safe_0='yes'), 'is_response_0_safe'), (safe(2, 0), 'better_response_id'),
    (safe('0', 0), 'better_response_id'), (safe(0, None, False, False), 'safer_response_id'),
    ({'prompt': 'P', 'answer': 'r'}, 'prompt, answer: no known shape; wanted: prompt, compl'),
    ({**pair('P'), 'score_chosen': 9}, 'alone'), ({**pair('P'), 'chosen-rating': 1}, 'beside'),
    ({**sft('P', 'r'), 'image': 'x.png'}, "'image' beside"),
    ({**pair('P'), 'score_chosen': 10 ** 400, 'score_rejected': 1}, 'preferences'),
    ({'instruction': 'Q', 'input': 5, 'output': 'r'}, "'input' is int"),
    ({'prompt': 'other', 'messages': [user('Q'), bot('r')]}, 'first question'),
    ({'instruction': 'Q', 'input': 0, 'output': 'r'}, "'input' is int"),
    ({'prompt': 'P', 'response_1': 'a', 'response_2': 'b', 'preference_strength': -2}, 'shape'),
    ({'instruction': 'Q', 'completions': 7}, 'ultrafeedback'),
    ({'instruction': 'Q', 'completions': ['r', 's']}, 'ultrafeedback'),
    ({**pair('P'), 'score_chosen': '9', 'score_rejected': '10'}, 'not above'),  # text would pass
    ({**pair('P'), 'score_chosen': [9], 'score_rejected': 2}, 'preferences'),
    ({'instruction': 'Q', 'output_1': 'a', 'output_2': 'b', 'preference': 0}, 'preference'),
    ({'instruction': 'Q', 'output_1': 'a', 'output_2': 'b', 'preference': True}, 'preference'),
    ({**sft('P', 'r'), 'completion_cut': 'false'}, 'true or false'),
    ({**sft('P', 'r'), 'completion_cut': 1}, 'true or false'),
    (safe(response_0_cut=True), "'response_0_cut' beside"),
    ({**sft('P', 'r'), 'system_prompt': 'Be brief.'}, "'system_prompt' beside"),
    ({'instruction': 'Q', 'input': ['x'], 'output': 'r'}, "'input'"), (safe(safe_0=[]), 'safe'),
    ({'messages': [user(['Q']), bot('r')]}, 'messages'), ({'prompt': 7}, 'int'),
    ({'question': 'Q', 'answer': 'r'}, 'no known shape'), ({'text': 'r'}, 'no known shape'),
    ({'instruction': 'Q', 'context': '', 'response': 'r'}, 'no known shape'),
    ({'conversation_a': [], 'conversation_b': [], 'winner': 'model_a'}, 'no known shape'),
    ({}, 'no known shape')]


@pytest.mark.parametrize('odd', [True, False])
def test_odd_rows_are_told_from_what_cannot_be_read(odd):
    """Real data holds odd rows, which are dropped; what is no row of its shape is refused, above
    all a key that changes what a row means. Catches answers that a label calls bad, imitated."""
    for row, words in ODD if odd else REFUSED:
        with pytest.raises(ValueError, match=words) as error:
            read_shape(row)
        assert isinstance(error.value, Odd) == odd, row


def test_the_examples_in_docstrings_are_read():
    """Each shape's function shows rows that it reads, and that no other one takes."""
    for shape in {*(shape for shape, *_ in shapes.SHAPES), shapes.transcripts}:
        text, rows = inspect.getdoc(shape), []
        text = text[text.index('\n{'):].strip()
        while text.startswith('{'):
            row, end = json.JSONDecoder().raw_decode(text)
            text = text[end:].strip()
            rows.append(row)
        assert rows, shape
        for row in rows:
            assert read_shape(row)[0] == shape(shapes.rename(row)[0]), row


def test_keys_that_are_not_read_are_named():
    """Keys without a meaning for training are listed, so that the gate can count them. A prompt by
    itself allows none, since its answer may hide under a name that is not known."""
    assert read_shape({**sft('P', 'r'), 'id': 1, 'meta': {'a': [None]}})[1] == ['id', 'meta']
    named = {'messages': [{**user('Q'), 'name': 'x'}, bot('r')]}
    assert read_shape(named)[1] == ['messages[].name']
    asked = {'prompt': 'P', 'solution': '7'}
    assert read_shape(asked, 'prompts') == ({'prompt': 'P'}, ['solution'])


def test_safe_rlhf_by_flag():
    """--safe_rlhf picks an axis, --drop leaves dual-safe or dual-unsafe pairs out."""
    assert read_shape(safe(1, 0), by='safer')[0] == pair(Q, 'zero', 'one')
    assert read_shape(safe(1, 0, True, False), by='better')[0] == pair(Q, 'one', 'zero')
    one_axis = {'prompt': 'Q', 'response_0': 'a', 'response_1': 'b', 'better_response_id': 1}
    assert read_shape(one_axis, by='better')[0] == pair(Q, 'b', 'a')
    for flags in ({}, {'by': 'better', 'drop': 'dual-safe'}):
        with pytest.raises(ValueError, match='--safe_rlhf=better'):
            read_shape(one_axis, **flags)
    for row, kind in ((safe(), 'dual-safe'), (safe(0, 0, False, False), 'dual-unsafe')):
        with pytest.raises(Odd, match=kind):
            read_shape(row, drop='dual-safe,dual-unsafe')
    assert read_shape(safe(0, 0, True, False), drop='dual-safe,dual-unsafe')


@pytest.mark.parametrize('template, turns, prompt', [
    (HH_TEMPLATE, Q, '\n\nHuman: Q\n\nAssistant:'),
    (HH_TEMPLATE, LONG, 'Be brief.' + HH),
    (TEMPLATE, LONG, 'Be brief.\nuser: hi\nbot: yes\nuser: Q\nbot:'),
    (TEMPLATE, [('user', 'hi'), ('assistant', ' yes'), ('user', 'Q')],
     'user: hi\nbot: yes\nuser: Q\nbot:'),
    ('Q: {}\nA:\n', LONG[1:], 'Q: hi\nA:\nyes\nQ: Q\nA:\n'),   # no space where none is added
    (TEMPLATE, [('user', 'a {} b'), ('assistant', 'c {}'), ('user', '{}')],
     'user: a {} b\nbot: c {}\nuser: {}\nbot:')])
def test_render(template, turns, prompt):
    """Turns are put into the template; an answer has one space in front; braces stay."""
    check_turns(turns)
    assert render(turns, template) == prompt


@pytest.mark.parametrize('roles', ['a', 'ua', 'uu', 'uuau', 'au', 'uaau', 'us', 'uasu', 's', ''])
def test_turns_alternate(roles):
    """Two users in a row would give an empty, glued turn of the bot; so such turns are odd."""
    names = {'u': 'user', 'a': 'assistant', 's': 'system'}
    with pytest.raises(Odd, match='turns'):
        check_turns([(names[role], 'x') for role in roles])
    with pytest.raises(Odd, match='empty'):
        check_turns([('user', ' ')])


@pytest.mark.parametrize('row, expected', [
    ({'question': 'Q', 'answer': 'r'}, sft(Q, 'r')),
    ({'instruction': 'Q', 'context': 'x', 'response': 'r'}, sft([('user', 'Q\nx')], 'r')),
    ({'system': 'Be brief.', 'question': 'Q', 'chosen': 'c', 'rejected': 'r'},
     pair([('user', 'Be brief.\nQ')])),
    ({'system': 'Be brief.', 'prompt': 'Q', 'chosen': 'c', 'rejected': 'r'},
     pair([('user', 'Be brief.\nQ')])),
    ({'query': 'Q', 'chosen': 'c', 'rejected': 'r'}, pair(Q)),
    ({'question': 'Q', 'response_j': 'c', 'response_k': 'r', 'qid': 3}, pair(Q)),
    ({**sft('P', 'r'), 'label': True}, sft('P', 'r')), ({**sft('P', 'r'), 'label': False}, None)])
def test_the_line_that_converts_a_row_works(tmp_path, row, expected):
    """Runs the command of the error message in a shell; its rows are read as they were meant."""
    with pytest.raises(Unknown):
        read_shape(row)
    for where, text in (('rows.jsonl:1', json.dumps(row) + '\n'),
                        ('rows, row 1', f'[{json.dumps(row)}]')):
        (tmp_path / where.split(',')[0].split(':')[0]).write_text(text)
        command = convert(row, where, CONTENT).removeprefix('; to convert it: ')
        command = command.replace('python -c', f'{sys.executable} -S -c', 1)
        subprocess.run(['bash', '-c', command], cwd=tmp_path, check=True, env=os.environ)
        rows = [json.loads(line) for line in (tmp_path / 'NEW.jsonl').read_text().splitlines()]
        assert [read_shape(new)[0] for new in rows] == ([expected] if expected else [])


@pytest.mark.parametrize('row', [
    {'input': 'Q', 'output': 'r', 'reward': -3}, {**sft('P', 'r'), 'helpfulness': 0},
    {**sft('P', 'r'), 'history': [['a', 'b']]}, {**pair('P'), 'chosen-rating': 1},
    {'question': 'Q', 'good': 'c', 'bad': 'r'}, {'text': 'r'}, {**sft('P', 'r'), 'label': 'good'},
    {'message_id': 1, 'text': 'r', 'role': 'prompter'}])
def test_no_line_converts_what_it_would_change(row):
    """Catches an error message that tells people to drop the reward that calls an answer bad."""
    assert convert(row, 'rows.jsonl:1', CONTENT) == ''


@pytest.mark.parametrize('prompt, template, question', [
    ('user: q\nbot:', TEMPLATE, 'q'), ('q', '{}', 'q'), ('Be brief.\nuser: q\nbot:', TEMPLATE, 'q'),
    ('user: q\nbot: yes\nuser: and?\nbot:', TEMPLATE, 'q'), ('user: a\nb\nbot:', TEMPLATE, 'a\nb'),
    ('Be.\n\nHuman: q\n\nAssistant: yes\n\nHuman: and?\n\nAssistant:', HH_TEMPLATE, 'q'),
    ('user: who is the user: you?\nbot:', TEMPLATE, 'who is the user: you?'),
    ('the superuser: q\nbot:', TEMPLATE, 'the superuser: q\nbot:'), ('user: q', 'user: {}', 'q'),
    ('Greet the user: now.\nuser: q\nbot:', TEMPLATE, 'q'),
    ('Be. USER: q ASSISTANT:', 'USER: {} ASSISTANT:', 'q'), ('a\nb', '{}\nbot:', 'a\nb'),
    ('q\nbot:', '{}\nbot:', 'q'), ('user: a {} b\nbot:', TEMPLATE, 'a {} b')])
def test_the_question_is_found_in_its_prompt(prompt, template, question):
    """The split holds out questions. Catches a mark inside a question that is taken for its
    beginning: then two rows of one question, long and short, stand on both sides."""
    assert question_of(prompt, template) == question
