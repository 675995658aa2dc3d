"""
studies/contest.py: pass@k, the study in its quick form, its pairs, its findings and its picture.

    python -m pytest -q tests/studies/test_contest.py
"""
import itertools
import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch

from data.contest.language import LEVELS, LONGEST
from prefgpt import UserError, load_checkpoint
from studies import contest
from studies.contest import filtered_pass_at, pass_at, pass_columns
from studies.contest_picture import draw
from studies.table import SMOKE_TEST, read_rows

TOP = Path(__file__).parents[2]


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
    rows = read_rows('out/studies/contest-quick.csv')
    assert contest.TOKENS == LONGEST + 1        # a program and EOS
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
    assert [path.name for path in Path('out/studies').iterdir()] == ['contest-quick.csv']
    capsys.readouterr()
    contest.main(contest.Config(seeds='3', quick=True))
    shown = capsys.readouterr().out
    assert 'loss' not in shown and SMOKE_TEST in shown and "PPO's pass@1" not in shown


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


def test_the_training_problems_are_not_judged():
    with pytest.raises(UserError, match='--split'):
        contest.main(contest.Config(split='train'))
