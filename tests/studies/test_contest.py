"""
studies/contest.py: pass@k, the study in its quick form, its pairs and its differences.

    python -m pytest -q tests/studies/test_contest.py
"""
import itertools, json
from pathlib import Path

import pytest

from data.contest.language import LEVELS, LONGEST
from prefgpt import UserError, load_checkpoint
from studies import contest
from studies.contest import filtered_pass_at, pass_at, pass_columns
from test_studies import quick_form


def test_closed_forms_against_all_subsets():
    """All C(K, n) subsets, one by one: the share that holds a correct one. For n@k the subsets are
    of those that pass the public tests, or the one subset of all of them. By hand: of 5 samples 2
    are correct, so that two draws miss with 3/5 x 2/4 = 3/10."""
    assert pass_at(5, 2, 2) == pytest.approx(0.7) and filtered_pass_at(0, 0, 10) == 0
    for total in range(1, 8):
        for correct in range(total + 1):
            samples = [True] * correct + [False] * (total - correct)
            for n in range(1, 8):
                subsets = list(itertools.combinations(samples, min(n, total)))
                share = sum(map(any, subsets)) / len(subsets)
                assert filtered_pass_at(total, correct, n) == pytest.approx(share)
                if n <= total:
                    assert pass_at(total, correct, n) == pytest.approx(share)


def test_pass_columns_by_hand():
    """Two prompts of three samples. First: 1 correct, 2 public: pass@1 1/3, pass@2 2/3, 2@k 1;
    second: none correct, all public: 0. Means over the prompts, not over the samples."""
    judged = [{'correct': c, 'public': f} for c, f in ((1, 1), (0, 1), (0, 0),
                                                       (0, 1), (0, 1), (0, 1))]
    assert pass_columns(judged, 3, 2) == {'pass@1': pytest.approx(1 / 6),
                                          'pass@2': pytest.approx(1 / 3), '2@k': 0.5}


def test_contest_in_its_quick_form(tmp_path, monkeypatch, capsys):
    """Every arm at every level, and each arm is what its name says."""
    rows = quick_form('contest', tmp_path, monkeypatch, capsys)
    assert contest.TOKENS == LONGEST + 1        # a program and EOS
    arms = list(dict.fromkeys(row['arm'] for row in rows))
    assert [(row['level'], row['arm']) for row in rows] == list(itertools.product(LEVELS, arms))
    assert {'sft', 'iter 0.0001', 'iter + winners 0.0001', contest.PPO} <= set(arms)
    assert {row['k'] for row in rows} == {10}
    assert all(0 <= row['pass@1'] <= row['pass@10'] <= 1 for row in rows)
    out = 'out/contest-quick-3'
    log = Path(out, 'ppo-ema-0.001/log.jsonl').read_text().splitlines()
    ppo = next(row for row in rows if row['arm'] == contest.PPO)
    assert ppo['first_quarter'] == pytest.approx(json.loads(log[0])['score'], abs=1e-4)
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
    with pytest.raises(UserError, match='--split'):     # the training problems are not judged
        contest.main(contest.Config(split='train'))


def test_own_pairs_by_hand(tmp_path, monkeypatch):
    """
    Ten samples of each of three prompts, in fives. a: first five with correct c1, then none
    correct; b: all correct, so nothing to compare; c: none correct. Winners of a and b are known.
    """
    monkeypatch.chdir(tmp_path)
    arms = contest.Arms(3, contest.QUICK, 'contest-quick-3')
    Path(arms.out).mkdir(parents=True)
    scores = {'a': [0, 0, 1, 1, 0] + [0] * 5, 'b': [1] * 10, 'c': [0] * 10}
    rows = [{'prompt': prompt, 'completion': f'{prompt}{i}', 'score': float(number)}
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


def test_differences_by_hand(capsys):
    """PPO is 0.2 and 0.4 above SFT's 0.5: mean 0.3, spread sqrt(2 x 0.01); ratios 1.4 and 1.8.
    Chosen moved by 1 and by 3 nats."""
    arms = {arm for one, other, _ in contest.DIFFERENCES for arm in (one, other)}
    rows = [{**dict.fromkeys(('first_quarter', 'last_quarter', '10@k'), 0.5), 'seed': seed,
             'level': 'interview', 'arm': arm, 'pass@1': 0.5 + gain * (arm == contest.PPO),
             'chosen': 0.0, 'chosen_before': -move, 'rejected': '', 'rejected_before': ''}
            for seed, gain, move in ((5, 0.2, 1.0), (6, 0.4, 3.0))
            for arm in arms.union(contest.DPO_ARMS, contest.ON_POLICY)]
    contest.show_differences(rows)
    lines = capsys.readouterr().out.splitlines()
    assert f'pass@1        {contest.PPO} - sft: +0.300 ±0.141 (1.600 ±0.283)' in lines
    assert 'nats          dpo 0.001, chosen: +2.000 ±1.414' in lines
    assert not any('rejected' in line for line in lines)
