"""
data/contest: the machine by hand, the functions by another enumeration, the judge against all
inputs, and the files that prepare.py writes.

    python -m pytest -q tests/data/test_contest_data.py
"""
import itertools
import json
import random

import pytest

from data.contest import prepare
from data.contest.language import (FUNCTIONS, HIDDEN, LEVELS, LONGEST, PROBLEMS, PUBLIC, SYMBOLS,
                                   run, show)
from data.contest.reward import score
from data.text import load_judge, load_tokenizer
from prefgpt import UserError


def outputs(program):
    return tuple(run(program, x) for x in range(10))


# ----------------------------------------------------------------------------- the machine

@pytest.mark.parametrize('program, x, left', [
    ('x', 7, 7),
    ('4', 7, 4),
    ('x5+', 7, 2),              # 12 modulo 10
    ('x5-', 3, 8),              # -2 modulo 10: the first operand is the deeper one
    ('5x-', 3, 2),
    ('x4*', 7, 8),              # 28
    ('x5M', 3, 5), ('x5M', 7, 7), ('5xM', 7, 7),
    ('x3+x2-M', 9, 7),          # 12 -> 2, 7: the larger
    ('12x+-', 5, 4),            # 2 + 5 = 7, 1 - 7 = -6
    ('x1*0+', 6, 6),
    ('', 7, None),              # nothing left
    ('x5', 7, None),            # two left
    ('x5+x', 7, None),
    ('+', 7, None), ('x+', 7, None), ('x5++', 7, None), ('+x5', 7, None),      # underflow
    ('x5m', 7, None), ('x 5+', 7, None), ('X', 7, None), ('x5+\n', 7, None),   # unknown symbols
    ('x٣+', 7, None), ('x²+', 7, None),        # digits to Python, not to the machine
    ('x0+0+0+0+0+', 7, 7),      # 11 symbols
    ('x0+0+0+0+0+0+', 7, None), ('xxxxxx+++++x', 7, None),      # 13 and 12
])
def test_programs_by_hand(program, x, left):
    assert run(program, x) == left


def test_the_machine_against_arithmetic_in_brackets():
    """Random trees, printed in postfix for the machine and with brackets for Python: the same
    number for every input. Python's % is the machine's modulo."""
    rng = random.Random(0)

    def draw(depth):
        if not depth or rng.random() < 0.3:
            symbol = rng.choice('x0123456789')
            return symbol, symbol
        operation = rng.choice('+-*M')
        (a, one), (b, two) = draw(depth - 1), draw(depth - 1)
        python = f'max({one}, {two})' if operation == 'M' else f'(({one} {operation} {two}) % 10)'
        return a + b + operation, python

    programs = [pair for pair in (draw(3) for _ in range(800)) if len(pair[0]) <= LONGEST]
    assert len(programs) > 400
    for postfix, python in programs:
        assert outputs(postfix) == tuple(eval(python, {'x': x, 'max': max}) for x in range(10))


# ----------------------------------------------------------------------------- the functions

def test_counts_of_functions():
    """28, 365 and 4601: one operation by hand is x+c (9), c-x (10), max(x, c) for c from 1 to 8 (8)
    and x+x (1)."""
    assert [len(functions) for functions in FUNCTIONS] == [28, 365, 4601]
    by_hand = ({tuple((x + c) % 10 for x in range(10)) for c in range(1, 10)}
               | {tuple((c - x) % 10 for x in range(10)) for c in range(10)}
               | {tuple(max(x, c) for x in range(10)) for c in range(1, 9)}
               | {tuple(2 * x % 10 for x in range(10))})
    assert set(FUNCTIONS[0]) == by_hand


def test_levels_are_the_shortest_programs():
    """All programs of one and two operations, run one after another: what they compute and fewer
    operations cannot is what the levels hold, constants aside."""
    def functions_of(shapes):
        return {outputs(''.join(program)) for shape in shapes
                for program in itertools.product(*shape)}
    leaf, operation = 'x0123456789', '+-M'
    none = functions_of([[leaf]])
    one = functions_of([[leaf, leaf, operation]]) - none
    two = functions_of([[leaf, leaf, leaf, operation, operation],
                        [leaf, leaf, operation, leaf, operation]]) - none - one
    assert one == set(FUNCTIONS[0]) and two == set(FUNCTIONS[1])
    assert not any(len(set(function)) == 1 for functions in FUNCTIONS for function in functions)


def test_a_prompt_is_one_function_and_the_simplest():
    """Every function is behind the prompt it shows, or another one is that needs no more
    operations; and no function is behind two prompts."""
    assert sorted(PUBLIC + HIDDEN) == list(range(10))
    for level, functions in zip(LEVELS, FUNCTIONS):
        for function in functions:
            chosen, its_level = PROBLEMS[show(function)]
            assert show(chosen) == show(function)
            assert LEVELS.index(its_level) <= LEVELS.index(level)
    chosen = [function for function, _ in PROBLEMS.values()]
    assert len(chosen) == len(set(chosen)) == 28 + 322 + 1753
    assert show(tuple((x + 5) % 10 for x in range(10))) == '5804>'


# ----------------------------------------------------------------------------- the judge

def test_verdicts_by_hand():
    assert score('5804>', 'x5+') == {'reward': 1, 'correct': 1, 'public': 1, 'valid': 1}
    assert score('5804>', '5x+0-')['reward'] == 1       # another program, the same function
    assert score('5804>', 'x5-')['reward'] == 1         # and so is this: modulo 10
    assert score('5804>', 'x6+') == {'reward': 0, 'correct': 0, 'public': 0, 'valid': 1}
    assert score('5804>', 'x5') == {'reward': 0, 'correct': 0, 'public': 0, 'valid': 0}
    assert score('5804>', '') == {'reward': 0, 'correct': 0, 'public': 0, 'valid': 0}
    with pytest.raises(UserError, match='not a problem'):
        score('5804', 'x5+')


def test_public_is_not_correct():
    """A function that agrees at the public inputs and not elsewhere passes the public tests."""
    other = next(function for function in FUNCTIONS[2] if PROBLEMS[show(function)][0] != function)
    program = prepare.draw_shortest(random.Random(0), other, 'own')
    assert outputs(program) == other
    assert score(show(other), program) == {'reward': 0, 'correct': 0, 'public': 1, 'valid': 1}


def test_the_judge_against_all_inputs():
    """Random strings, half of them programs: every verdict from the ten outputs themselves."""
    rng = random.Random(1)
    seen = set()
    for _ in range(6000):
        prompt = rng.choice(list(PROBLEMS))
        function, _ = PROBLEMS[prompt]
        if rng.random() < 0.5:
            response = prepare.draw_program(rng, function, 'own')
        else:
            response = ''.join(rng.choices(SYMBOLS, k=rng.randrange(1, 13)))
        if rng.random() < 0.5:
            response = response[:-1] + rng.choice(SYMBOLS)
        got = outputs(response)
        correct = got == function
        public = [got[x] for x in (0, 3, 5, 9)] == [int(digit) for digit in prompt[:4]]
        expected = {'reward': correct, 'correct': correct, 'public': public,
                    'valid': got[0] is not None}
        assert score(prompt, response) == expected
        seen.add(tuple(expected.values()))
    assert len(seen) >= 3


def test_the_judge_is_loaded_by_its_path():
    assert load_judge('data/contest/reward.py')('5804>', 'x5+')['reward'] == 1


# ----------------------------------------------------------------------------- prepare.py

def test_begin_of_by_hand():
    assert prepare.begin_of('3x5++', 3) == 1
    assert prepare.begin_of('3x5++', 4) == 0
    assert prepare.begin_of('3x5++', 2) == 2
    with pytest.raises(ValueError):
        prepare.begin_of('x+', 1)


@pytest.mark.parametrize('style', ['own', 'other'])
def test_every_drawn_program_is_right(style):
    """Of every function there is: the program computes it and fits; detours are 0 or 1 in SFT's
    own style, and 1 or 2, so that the program is longer than it need be, in the other."""
    rng = random.Random(2)
    for number, functions in enumerate(FUNCTIONS, 1):
        for function in functions[:1200]:
            shortest = prepare.draw_shortest(rng, function, style)
            assert outputs(shortest) == function and len(shortest) == 2 * number + 1
            program = prepare.draw_program(rng, function, style)
            assert outputs(program) == function and len(program) <= LONGEST
            detours = (len(program) - len(shortest)) // 2
            assert detours in ((0, 1) if style == 'own' else (1, 2))


def test_splits_share_no_function():
    splits = prepare.split_problems()
    prompts = [prompt for split in splits.values() for level in split.values() for prompt in level]
    assert sorted(prompts) == sorted(PROBLEMS) and len(set(prompts)) == len(prompts)
    functions = {split: {PROBLEMS[prompt][0] for level in levels.values() for prompt in level}
                 for split, levels in splits.items()}
    for one, two in itertools.combinations(functions.values(), 2):
        assert not one & two
    assert [len(splits['test'][level]) for level in LEVELS] == [8, 110, 60]
    for split in splits.values():
        for level, prompts in split.items():
            assert {PROBLEMS[prompt][1] for prompt in prompts} == {level}


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """A small data set, and its rows by file."""
    out = tmp_path_factory.mktemp('contest')
    prepare.main(prepare.Config(seed=1, out=str(out), sft=600, pairs=600, prompts=600))
    return out, {path.name.removesuffix('.jsonl'): [json.loads(line) for line in path.open()]
                 for path in out.glob('*.jsonl')}


def test_demonstrations_and_pairs_are_what_they_claim(written):
    """Demonstrations and winners are right, losers wrong and one symbol away; no held-out problem
    is among the training rows."""
    out, rows = written
    for split in ('train', 'val'):
        assert all(score(row['prompt'], row['completion'])['correct']
                   for row in rows[f'{split}.sft'])
        for row in rows[f'{split}.pairs']:
            assert score(row['prompt'], row['chosen'])['correct']
            assert not score(row['prompt'], row['rejected'])['correct']
            assert len(row['chosen']) == len(row['rejected'])
            assert sum(a != b for a, b in zip(row['chosen'], row['rejected'])) == 1
    of = {name: {row['prompt'] for row in listed} for name, listed in rows.items()}
    training = of['train.sft'] | of['train.pairs'] | of['train.prompts']
    val = of['val.sft'] | of['val.pairs'] | of['val.prompts']
    test = set().union(*(of[f'test-{level}.prompts'] for level in LEVELS))
    assert not training & val and not training & test and not val & test
    assert val <= set().union(*(of[f'val-{level}.prompts'] for level in LEVELS))


def test_a_symbol_is_a_token(written):
    """257 ids, and the ids of a text are its bytes."""
    out, rows = written
    tokenizer = load_tokenizer(out / (out / 'tokenizer').read_text().strip())
    assert tokenizer.n_vocab == 257
    for row in rows['train.sft'] + rows['train.prompts']:
        for text in (row['prompt'], row.get('completion', '')):
            assert tokenizer.encode_ordinary(text) == list(text.encode())


def test_the_same_seed_writes_the_same_bytes(written, tmp_path):
    out, _ = written
    prepare.main(prepare.Config(seed=1, out=str(tmp_path / 'a'), sft=600, pairs=600, prompts=600))
    prepare.main(prepare.Config(seed=2, out=str(tmp_path / 'b'), sft=600, pairs=600, prompts=600))
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / 'a' / path.name).read_bytes()
    assert (out / 'train.sft.jsonl').read_bytes() != (tmp_path / 'b/train.sft.jsonl').read_bytes()
    for name in ('test-interview.prompts.jsonl', 'val-interview.prompts.jsonl'):
        assert (out / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()    # fixed
