"""
data/contest: the machine by hand, the functions by another enumeration, the judge, the files.
"""
import hashlib, itertools, json, random

import pytest

from data.contest import prepare
from data.contest.language import FUNCTIONS, HIDDEN, LEVELS, LONGEST, PROBLEMS, PUBLIC, run, show
from data.contest.reward import score
from data.judge import load_judge
from data.text import load_tokenizer
from prefgpt import UserError


def outputs(program):
    return tuple(run(program, x) for x in range(10))


@pytest.mark.parametrize('program, x, left', [
    ('x5+', 7, 2),              # 12 modulo 10
    ('x5-', 3, 8),              # -2 modulo 10: the first operand is the deeper one
    ('x4*', 7, 8),              # 28
    ('x5M', 3, 5), ('x5M', 7, 7),
    ('x3+x2-M', 9, 7),          # 12 -> 2, 7: the larger
    ('12x+-', 5, 4),            # 2 + 5 = 7, 1 - 7 = -6
    ('x0+0+0+0+0+', 7, 7),      # 11 symbols
    *[(program, 7, None) for program in (
        '', 'x5', 'x5+x',               # not one value left
        '+', 'x+', 'x5++', '+x5',       # underflow
        'x5m', 'x 5+', 'X', 'x5+\n',    # unknown symbols
        'x٣+', 'x²+',                   # digits to Python, not to the machine
        'x0+0+0+0+0+0+', 'xxxxxx+++++x')],      # 13 and 12 symbols
])
def test_programs_by_hand(program, x, left):
    assert run(program, x) == left


def test_levels_are_the_shortest_programs():
    """All programs of one and two operations, run one after another: what they compute and fewer
    operations cannot is what the levels hold, constants aside."""
    def functions_of(*shapes):
        symbols = {'v': 'x0123456789', 'o': '+-M'}
        return {outputs(''.join(program)) for shape in shapes
                for program in itertools.product(*[symbols[place] for place in shape])}
    none = functions_of('v')
    one = functions_of('vvo') - none
    two = functions_of('vvvoo', 'vvovo') - none - one
    assert one == set(FUNCTIONS[0]) and two == set(FUNCTIONS[1])
    assert [len(functions) for functions in FUNCTIONS] == [28, 365, 4601]
    assert not any(len(set(function)) == 1 for functions in FUNCTIONS for function in functions)


def test_a_prompt_is_one_function_and_the_simplest():
    """Behind a prompt is a function that shows it and needs no more operations than any other; a
    prompt, and so a function, is in one split only."""
    assert sorted(PUBLIC + HIDDEN) == list(range(10))
    for level, functions in zip(LEVELS, FUNCTIONS):
        for function in functions:
            chosen, its_level = PROBLEMS[show(function)]
            assert show(chosen) == show(function)
            assert LEVELS.index(its_level) <= LEVELS.index(level)
    chosen = [function for function, _ in PROBLEMS.values()]
    assert len(chosen) == len(set(chosen)) == 28 + 322 + 1753
    assert show(tuple((x + 5) % 10 for x in range(10))) == '5804>'
    splits = prepare.split_problems()
    prompts = [prompt for split in splits.values() for level in split.values() for prompt in level]
    assert sorted(prompts) == sorted(PROBLEMS) and len(set(prompts)) == len(prompts)
    assert [len(splits['test'][level]) for level in LEVELS] == [8, 110, 60]
    for split in splits.values():
        for level, prompts in split.items():
            assert {PROBLEMS[prompt][1] for prompt in prompts} == {level}


def test_verdicts_by_hand():
    assert score('5804>', 'x5+') == {'reward': 1, 'correct': 1, 'public': 1, 'valid': 1}
    assert score('5804>', '5x+0-')['reward'] == 1       # another program, the same function
    assert score('5804>', 'x5-')['reward'] == 1         # and so is this: modulo 10
    assert score('5804>', 'x6+') == {'reward': 0, 'correct': 0, 'public': 0, 'valid': 1}
    assert score('5804>', 'x5') == {'reward': 0, 'correct': 0, 'public': 0, 'valid': 0}
    assert score('5804>', '') == {'reward': 0, 'correct': 0, 'public': 0, 'valid': 0}
    assert load_judge('data/contest/reward.py')('5804>', 'x5+')['reward'] == 1
    with pytest.raises(UserError, match='not a problem'):
        score('5804', 'x5+')
    # A function that agrees at the public inputs and not elsewhere passes the public tests alone
    other = next(function for function in FUNCTIONS[2] if PROBLEMS[show(function)][0] != function)
    program = prepare.draw_shortest(random.Random(0), other, 'own')
    assert outputs(program) == other
    assert score(show(other), program) == {'reward': 0, 'correct': 0, 'public': 1, 'valid': 1}


@pytest.mark.parametrize('style', ['own', 'other'])
def test_every_drawn_program_is_right(style):
    """It computes the function and fits; detours are 0 or 1 in SFT's own style, else 1 or 2."""
    rng = random.Random(2)
    for number, functions in enumerate(FUNCTIONS, 1):
        for function in functions[:1200]:
            shortest = prepare.draw_shortest(rng, function, style)
            assert outputs(shortest) == function and len(shortest) == 2 * number + 1
            program = prepare.draw_program(rng, function, style)
            assert outputs(program) == function and len(program) <= LONGEST
            detours = (len(program) - len(shortest)) // 2
            assert detours in ((0, 1) if style == 'own' else (1, 2))


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
    _, rows = written
    for row in rows['train.sft'] + rows['val.sft']:
        assert score(row['prompt'], row['completion'])['correct']
    for row in rows['train.pairs'] + rows['val.pairs']:
        assert score(row['prompt'], row['chosen'])['correct']
        assert not score(row['prompt'], row['rejected'])['correct']
        assert sum(a != b for a, b in zip(row['chosen'], row['rejected'], strict=True)) == 1
    train, val, val_levels, test = [
        {row['prompt'] for name, listed in rows.items() if name.startswith(part) for row in listed}
        for part in ('train.', 'val.', 'val-', 'test-')]
    assert val <= val_levels and not train & val_levels and not test & (train | val_levels)


def test_the_same_seed_writes_the_same_bytes_and_a_symbol_is_a_token(written):
    """257 ids, and the ids of a text are its bytes. The numbers in studies/results are of the data
    that this version draws."""
    out, rows = written
    tokenizer = load_tokenizer(out / (out / 'tokenizer').read_text().strip())
    assert tokenizer.n_vocab == 257
    text = ''.join(row['prompt'] + row['completion'] for row in rows['train.sft'])
    assert tokenizer.encode_ordinary(text) == list(text.encode())
    digest = hashlib.sha256(b''.join(path.read_bytes() for path in sorted(out.iterdir())))
    assert digest.hexdigest()[:16] == 'a8a26e68ae751429'
