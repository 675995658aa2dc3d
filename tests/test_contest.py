"""
The toy contest: the machine by hand, the functions by another enumeration, the judge against all
inputs, the files that prepare.py writes, and the study in its quick form.

    python -m pytest -q tests/test_contest.py
"""
import itertools
import json
import random
import shutil
import statistics
from pathlib import Path

import pytest
import torch

from data.contest import prepare
from data.contest.language import (FUNCTIONS, HIDDEN, LEVELS, LONGEST, PROBLEMS, PUBLIC, SYMBOLS,
                                   WAYS, run, show)
from data.contest.reward import score
from data.text import load_judge, load_tokenizer
from prefgpt import UserError, load_checkpoint
from studies import contest
from studies.contest import filtered_pass_at, pass_at, pass_columns
from studies.contest_picture import draw
from studies.table import read_rows

TOP = Path(__file__).parent.parent


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
    """257 ids; a program and EOS never exceed the 12 tokens that the recipes sample."""
    out, rows = written
    tokenizer = load_tokenizer(out / (out / 'tokenizer').read_text().strip())
    assert tokenizer.n_vocab == 257
    for row in rows['train.sft'] + rows['train.prompts']:
        for text in (row['prompt'], row.get('completion', '')):
            assert tokenizer.encode_ordinary(text) == list(text.encode())
    assert LONGEST + 1 == contest.TOKENS


def test_the_same_seed_writes_the_same_bytes(written, tmp_path):
    out, _ = written
    prepare.main(prepare.Config(seed=1, out=str(tmp_path / 'a'), sft=600, pairs=600, prompts=600))
    prepare.main(prepare.Config(seed=2, out=str(tmp_path / 'b'), sft=600, pairs=600, prompts=600))
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / 'a' / path.name).read_bytes()
    assert (out / 'train.sft.jsonl').read_bytes() != (tmp_path / 'b/train.sft.jsonl').read_bytes()
    for name in ('test-interview.prompts.jsonl', 'val-interview.prompts.jsonl'):
        assert (out / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()    # fixed


# ----------------------------------------------------------------------------- pass@k and n@k

def test_pass_at_by_hand():
    """Of 5 samples 2 are correct: two draws miss with 3/5 x 2/4 = 3/10. With one draw it is the
    share; none correct is 0; where more are drawn than are wrong, one must be correct."""
    assert pass_at(5, 2, 2) == pytest.approx(0.7)
    assert pass_at(5, 2, 1) == pytest.approx(0.4)
    assert pass_at(5, 0, 3) == 0 and pass_at(5, 2, 4) == 1 and pass_at(5, 5, 1) == 1


def test_filtered_pass_at_by_hand():
    """Of 4 that pass the public tests 1 is correct: two of them submitted hit it with 1/2. Where
    all can be submitted one correct is enough, and none is not."""
    assert filtered_pass_at(4, 1, 2) == pytest.approx(0.5)
    assert filtered_pass_at(2, 1, 2) == 1 and filtered_pass_at(1, 1, 10) == 1
    assert filtered_pass_at(3, 0, 10) == filtered_pass_at(0, 0, 10) == 0


def test_closed_forms_against_all_subsets():
    """All C(K, n) subsets, one by one: the share that holds a correct one. For n@k the subsets are
    of those that pass the public tests, or the one subset of all of them."""
    for total in range(1, 8):
        for correct in range(total + 1):
            samples = [True] * correct + [False] * (total - correct)
            for n in range(1, 8):
                subsets = list(itertools.combinations(samples, min(n, total)))
                share = sum(map(any, subsets)) / len(subsets)
                assert filtered_pass_at(total, correct, n) == pytest.approx(share)
                if n <= total:
                    assert pass_at(total, correct, n) == pytest.approx(share)


def test_closed_forms_against_simulation():
    """K fresh samples of a problem, again and again: pass@n averages to 1 - (1 - p)^n, that of n
    fresh ones, which 1 - (1 - c/K)^n does not; and n@K to what submitting at random gets."""
    random, K, n, p, q = torch.Generator().manual_seed(0), 12, 4, 0.15, 0.3   # p correct, q public
    estimates, plug_in, closed, submitted = [], [], [], []
    for draws in torch.rand(20_000, K, generator=random):
        correct, public = int((draws < p).sum()), int((draws < q).sum())
        estimates.append(pass_at(K, correct, n))
        plug_in.append(1 - (1 - correct / K) ** n)
        closed.append(filtered_pass_at(public, correct, n))
        passed = draws[draws < q]
        order = torch.randperm(public, generator=random)[:n]
        submitted.append(float((passed[order] < p).any()))
    assert statistics.fmean(estimates) == pytest.approx(1 - (1 - p) ** n, abs=0.008)
    assert statistics.fmean(plug_in) < 1 - (1 - p) ** n - 0.02
    assert statistics.fmean(closed) == pytest.approx(statistics.fmean(submitted), abs=0.008)


def test_pass_columns_by_hand():
    """Two prompts of three samples. First: 1 correct, 2 public: pass@1 1/3, pass@2 2/3, 2@k 1;
    second: none correct, all public: 0. Means over the prompts, not over the samples."""
    judged = [{'correct': c, 'public': f} for c, f in ((1, 1), (0, 1), (0, 0),
                                                       (0, 1), (0, 1), (0, 1))]
    assert pass_columns(judged, 3, 2) == {'pass@1': pytest.approx(1 / 6),
                                          'pass@2': pytest.approx(1 / 3), '2@k': 0.5}


# ----------------------------------------------------------------------------- the study

def test_contest_in_its_quick_form(tmp_path, monkeypatch, capsys):
    """Every arm at every level, in a table beside the real one; a second call runs nothing."""
    shutil.copytree(TOP / 'data', tmp_path / 'data', ignore=shutil.ignore_patterns(
        '*.jsonl', '__pycache__', 'contest-*', 'toy-*', '*.gz', '*.zip'))
    monkeypatch.chdir(tmp_path)
    contest.main(contest.Config(seeds='3', quick=True))
    rows = read_rows('studies/results/contest-quick.csv')
    arms = list(dict.fromkeys(row['arm'] for row in rows))
    assert [(row['level'], row['arm']) for row in rows] == list(itertools.product(LEVELS, arms))
    assert {'sft', 'iter 0.0001', 'iter + winners 0.0001', contest.PPO} <= set(arms)
    log = Path('out/contest-quick-3/ppo-ema-0.001/log.jsonl').read_text().splitlines()
    row = next(row for row in rows if row['arm'] == contest.PPO)
    assert {row['k'] for row in rows} == {10} and all(0 <= row['pass@1'] <= row['pass@10'] <= 1
                                                      for row in rows)
    assert row['first_quarter'] == pytest.approx(json.loads(log[0])['score'], abs=1e-4)
    # Each arm is what its name says: where it started, and its settings
    out = 'out/contest-quick-3'
    for run, given in (
            ('dpo-0.003', dict(lr=3e-3, init=f'{out}/sft', data='data/contest-quick-3')),
            ('ppo-baseline-0.001', dict(whiten=False, ref_ema=0.0, rollout_size=8, steps=4)),
            ('ppo-norm-0.001', dict(whiten=True, ref_ema=0.0, rollout_size=8, steps=4)),
            ('ppo-batch-0.0003', dict(whiten=True, ref_ema=0.0, rollout_size=16, steps=2, lr=3e-4)),
            ('ppo-ema-0.001', dict(whiten=True, ref_ema=0.02, rollout_size=16, beta=0.01)),
            ('binding-fixed', dict(beta=0.25, ref_ema=0.0)),
            ('binding-ema', dict(beta=0.25, ref_ema=0.1)),
            ('no-value', dict(value_lr=0.0, grad_clip=1e9, whiten=False)),
            ('no-value-norm', dict(value_lr=0.0, grad_clip=1e9, whiten=True)),
            ('ppo-early', dict(init=f'{out}/early', ref_ema=0.02))):
        config = load_checkpoint(f'{out}/{run}', ['dpo', 'ppo'])['config']
        assert {key: config[key] for key in given} == given, run
    assert not Path('studies/results/contest.csv').exists()
    assert not list(Path('studies/results').glob('*.png'))
    capsys.readouterr()
    contest.main(contest.Config(seeds='3', quick=True))
    shown = capsys.readouterr().out
    assert 'loss' not in shown and "PPO's pass@1" in shown


def test_own_pairs_by_hand(tmp_path, monkeypatch):
    """
    Ten samples of each of three prompts, in fives. a: first five with correct c1, then none
    correct; b: all correct, so nothing to compare; c: none correct. Winners of a and b are known.
    """
    monkeypatch.chdir(tmp_path)
    arms = contest.Arms(3, contest.QUICK, 'contest-quick-3')
    Path(arms.out).mkdir(parents=True)
    scores = {'a': [0, 0, 1, 1, 0] + [0] * 5, 'b': [1] * 10, 'c': [0] * 10}
    rows = [{'prompt': prompt, 'response': f'{prompt}{i}', 'score': float(number)}
            for prompt, numbers in scores.items() for i, number in enumerate(numbers)]
    Path(arms.out, 'own.rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))

    def pairs(winners=None):
        arms.own_pairs('own', 'no run is asked', 0, winners)
        lines = Path(arms.out, 'own.pairs.jsonl').read_text().splitlines()
        return [(row['prompt'], row['chosen'], row['rejected']) for row in map(json.loads, lines)]
    assert pairs() == [('a', 'a2', 'a0')]
    assert arms.own_pairs('own', '', 0) is None         # one prompt: none could be held out
    assert pairs({'a': 'A', 'b': 'B'}) == [('a', 'a2', 'a0'), ('a', 'A', 'a5')]
    assert pairs({'c': 'C'}) == [('a', 'a2', 'a0'), ('c', 'C', 'c0'), ('c', 'C', 'c5')]
    assert arms.own_pairs('own', '', 0, {'c': 'C'}) == f'{arms.out}/own.pairs.jsonl'


def finding_rows(value):
    """Rows of one seed in which every number of every arm is value."""
    arms = ['sft', 'early sft', 'ppo binding fixed', 'ppo binding ema', 'ppo no value',
            'ppo no value + norm', 'dpo on-policy, early ref', 'ppo + ema, early ref',
            *contest.DPO_ARMS, *contest.ON_POLICY,
            *(f'{name} {lr:g}' for lr in contest.ITER_LRS for name in ('iter', 'iter + winners')),
            *(f'ppo {rung} {lr:g}' for lr in contest.PPO_LRS
              for rung in ('baseline', '+ norm', '+ batch', '+ ema'))]
    numbers = ('pass@1', '10@k', 'valid', 'first_quarter', 'last_quarter', 'accuracy')
    return [{'seed': 5, 'level': 'interview', 'arm': arm, **dict.fromkeys(numbers, value)}
            for arm in arms]


def test_every_finding_can_fail():
    """With all arms alike no finding holds, but that DPO-Iter keeps SFT's valid programs; where it
    has none, that fails too: none of them is true whatever happens."""
    rows = finding_rows(0.5)
    held = [finding for finding, seeds in contest.check(rows).items() if not seeds]
    assert len(held) == 1 and held[0].startswith('DPO-Iter without them')
    rows = [{**row, 'valid': 0.0 if row['arm'].startswith('iter') else 0.5} for row in rows]
    assert contest.check(rows)[held[0]] == [5]


def test_differences_by_hand(capsys):
    """PPO is 0.2 and 0.4 above SFT's 0.5: mean 0.3, spread sqrt(2 x 0.01); ratios 1.4 and 1.8.
    Chosen moved by 1 and by 3 nats."""
    rows = [{**row, 'seed': seed, 'chosen': 0.0, 'chosen_before': -move, 'rejected': '',
             'rejected_before': '', **({'pass@1': 0.5 + gain} if row['arm'] == contest.PPO else {})}
            for seed, gain, move in ((5, 0.2, 1.0), (6, 0.4, 3.0)) for row in finding_rows(0.5)]
    contest.show_differences(rows)
    lines = capsys.readouterr().out.splitlines()
    assert f'pass@1        {contest.PPO} - sft: +0.300 ±0.141 (1.600 ±0.283)' in lines
    assert 'nats          dpo 0.001, chosen: +2.000 ±1.414' in lines
    assert not any('rejected' in line for line in lines)


def test_the_picture_is_drawn_of_any_seeds():
    """Six panels of one seed or of two; a column that an arm lacks is no zero in it."""
    pytest.importorskip('matplotlib')
    columns = ('chosen', 'chosen_before', 'rejected', 'rejected_before')
    rows = [{**row, **dict.fromkeys(columns, 1.0), 'level': level, 'seed': seed}
            for seed in (5, 6) for level in LEVELS for row in finding_rows(0.5)]
    for some in (rows, [row for row in rows if row['seed'] == 5]):
        figure = draw(some)
        assert len(figure.axes) == 6 and all(ax.get_title('left') for ax in figure.axes)


@pytest.mark.parametrize('changes', [dict(seeds=''), dict(seeds='five'), dict(split='train')])
def test_what_cannot_be_run(changes):
    """A study of no seed, or on the training problems, is told in one line before it runs."""
    with pytest.raises(UserError, match='--seeds|--split'):
        contest.main(contest.Config(**changes))
