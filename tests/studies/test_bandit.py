"""
studies/bandit.py and the table it trains: exact numbers of the reference, what the table samples
and measures, and the quick form.

    python -m pytest -q tests/studies/test_bandit.py
"""
import itertools
import math
import statistics
from pathlib import Path

import pytest
import torch

from studies import bandit
from studies.bandit import CHECKS, EXPERIMENTS, LOSSES, TASKS, by_run
from studies.policies import Table, best_of_n, optimum, peaked, reference, train_table
from studies.table import SMOKE_TEST, read_rows
from studies.unified import best_of_n_loss


# ----------------------------------------------------------------------------- what is exact

def test_the_reference_is_the_squashed_cauchy():
    """Bins of tanh of draws agree with the closed form; its landmarks, as measured elsewhere."""
    p = reference()
    assert abs(p.sum() - 1) < 1e-12 and (p > 0).all()
    assert p[[0, 19, 70, 99]].tolist() == pytest.approx([.0781, .0253, .0021, .0422], abs=1e-4)
    assert -(p * p.log()).sum() == pytest.approx(4.117, abs=1e-3)
    y = torch.distributions.Cauchy(-0.7, 0.4)
    torch.manual_seed(0)
    counts = torch.histc(torch.tanh(y.sample((400_000,))), 100, -1, 1)
    assert (counts / counts.sum() - p).abs().max() < 0.002


def test_geometry():
    """T1: the tail's reward is a tenth of the mode's under the reference."""
    p = reference()
    means = {task: (p * reward).sum().item() for task, reward in TASKS.items()}
    assert means['R1'] == pytest.approx(.0390, abs=1e-4)
    assert means['R2'] == pytest.approx(.3772, abs=1e-4)
    assert means['R2'] > 9 * means['R1']


def test_best_of_n_by_enumeration():
    """All 4^3 draws of 3 from 4 actions, two of the same reward: a tie is the first drawn's."""
    p, reward = torch.tensor([.1, .2, .3, .4], dtype=torch.float64), torch.tensor([5., 7., 7., 0.])
    chances = torch.zeros(4, dtype=torch.float64)
    for draw in itertools.product(range(4), repeat=3):
        chances[max(draw, key=lambda a: reward[a])] += math.prod(p[list(draw)].tolist())
    assert (best_of_n(p, reward, 3) - chances).abs().max() < 1e-12


def test_best_of_10_and_the_optimum():
    """The fixed points of imitation and its KL, which is below log n - (n - 1) / n; and ref
    exp(r / beta), which has more reward at less KL: as measured elsewhere."""
    p = reference()

    def kl(q):
        return (q * (q / p).log()).sum().item()
    q = best_of_n(p, TASKS['R1'], 10)
    assert (q * TASKS['R1']).sum() == pytest.approx(.3135, abs=1e-4)
    assert kl(q) == pytest.approx(1.402, abs=1e-3) and kl(q) < math.log(10) - 0.9
    assert (best_of_n(p, TASKS['R2'], 10) * TASKS['R2']).sum() == pytest.approx(.9401, abs=1e-4)
    for beta, reward, nats in ((.3, .341, .656), (.2, .653, 1.951), (.1, .941, 3.794)):
        q = optimum(p, TASKS['R1'], beta)
        assert (q * TASKS['R1']).sum() == pytest.approx(reward, abs=1e-3)
        assert kl(q) == pytest.approx(nats, abs=1e-3)


# ----------------------------------------------------------------------------- the table

def test_what_a_table_samples():
    """Groups of N with mean rewards as scores, logprobs read off the table one by one; choices are
    drawn with the table's probabilities; another collection, other samples."""
    table = Table(5, peaked(20), L=3, N=10)
    with torch.no_grad():
        table.logits[0][1].zero_()                                      # the second choice uniform
    batch = table.collect(20_000, 0)
    assert batch['responses'].shape == (2000, 10, 3)
    g, n = 7, 4
    actions = batch['responses'][g, n].tolist()
    assert batch['scores'][g, n] == pytest.approx(
        statistics.fmean(math.exp(-((a - 20) / 10) ** 2) for a in actions))
    ref = reference()
    assert batch['ref_logprobs'][g, n].exp().tolist() == pytest.approx(ref[actions].tolist())
    assert batch['old_logprobs'][g, n].exp().tolist() == pytest.approx(
        [ref[actions[0]].item(), 0.01, ref[actions[2]].item()])
    shares = torch.bincount(batch['responses'][..., 0].flatten(), minlength=100) / 20_000
    assert (shares - ref).abs().max() < 0.01
    assert torch.bincount(batch['responses'][..., 1].flatten()).max() < 300
    assert not torch.equal(table.collect(20_000, 1)['responses'], batch['responses'])


def test_advantages_are_of_all_scores_so_far():
    """Whitened by mean and deviation of this collection and those before; or of this one alone."""
    table = Table(0, peaked(20), L=2, N=10)
    first, second = table.collect(50, 0), table.collect(100, 1)
    scores = torch.cat([first['scores'].flatten(), second['scores'].flatten()])
    expected = (second['scores'] - scores.mean()) / scores.std(correction=0)
    assert second['advantages'].shape == (10, 10, 2)
    assert (second['advantages'][..., 0] - expected).abs().max() < 1e-5
    assert torch.equal(second['advantages'][..., 0], second['advantages'][..., 1])
    for batch, name in ((first, 'advantages'), (first, 'whitened'), (second, 'whitened')):
        own = (batch['scores'] - batch['scores'].mean()) / batch['scores'].std(correction=0)
        assert (batch[name][..., 0] - own).abs().max() < 1e-5


def test_what_a_table_measures():
    """Against sums over all responses of two choices; kl_collect is the most since a collection."""
    table = Table(0, peaked(70), L=2, N=10)
    batch = table.collect(100, 0)
    with torch.no_grad():
        table.logits[0] += torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    numbers, p, q = table.measure(), table.logprobs().exp(), reference()
    joint, ref = p[0][:, None] * p[1], q[:, None] * q
    reward = (peaked(70)[:, None] + peaked(70)) / 2
    assert numbers['reward'] == pytest.approx((joint * reward).sum().item())
    assert numbers['kl'] == pytest.approx((joint * (joint / ref).log()).sum().item())
    assert numbers['entropy'] == pytest.approx(-(joint * joint.log()).sum().item())
    assert numbers['kl_collect'] == pytest.approx(numbers['kl'])        # the reference sampled
    table.collect(100, 1)
    with torch.no_grad():
        table.logits[0].mul_(1.01)
    assert table.measure()['kl_collect'] == numbers['kl_collect']       # the most, not the last
    ratios = (table.logprobs_of(batch) - batch['ref_logprobs']).sum(-1)
    best = [ratios[g, batch['scores'][g].argmax()].item() for g in range(10)]
    worst = [ratios[g, batch['scores'][g].argmin()].item() for g in range(10)]
    assert table.log_ratios(batch) == {'chosen': pytest.approx(statistics.fmean(best)),
                                       'rejected': pytest.approx(statistics.fmean(worst))}


def test_steps_of_a_table():
    """samples / B collections of B / M steps and T passes: 600 samples in 200s by 100s, twice."""
    table = Table(0, peaked(20), L=1, N=10)
    parts = list(train_table(table, best_of_n_loss, 1.0, samples=600, B=200, M=100, T=2))
    assert len(parts) == 12 and all(part['scores'].shape == (10, 10) for part in parts)
    assert parts[0]['responses'].shape == (10, 10, 1)
    again = Table(0, peaked(20), L=1, N=10)
    list(train_table(again, best_of_n_loss, 1.0, samples=600, B=200, M=100, T=2))
    assert torch.equal(table.logits[0], again.logits[0])


# ----------------------------------------------------------------------------- the study

def test_every_experiment_can_be_cut_evenly():
    """B divides the samples, M divides B or B is one minibatch, groups fill both."""
    for samples, M, L, methods in EXPERIMENTS.values():
        for method, lr, best in methods:
            assert method in LOSSES
            for (B, T), lrs in best.items():
                assert samples % B == 0 and (B % M == 0 or B < M) and B % bandit.N == 0
                assert 1 <= len(lrs) <= 2


def test_every_claim_can_fail():
    """With all runs alike none holds, but for those that say 'within' or 'no worse'; with rewards
    that grow without end those fail."""
    class Alike(dict):
        def __missing__(self, key):
            return self['all']

    class Far(dict):
        def __missing__(self, key):
            return {'PPO': 0.9 if key[3] == 64 else 1.0, 'DPO': 1.0,
                    'DPO, far pairs': 1.0}.get(key[2], 0.0)
    held = {claim for claim, holds in CHECKS.items() if holds(Alike(all=0.5))}
    assert all('within' in claim or 'at most' in claim for claim in held), held
    assert not any(CHECKS[claim](Far()) for claim in held)


def test_runs_by_key():
    """The last rows only; the mean over seeds; under 'moved' the kl_collect of reuse."""
    row = {'experiment': 'reuse', 'task': 'R1', 'method': 'PPO', 'B': 100, 'T': 4, 'seed': 0,
           'data': 'on-policy', 'last': 1, 'reward': 0.2, 'kl_collect': 2.0}
    rows = [row, {**row, 'seed': 1, 'reward': 0.4, 'kl_collect': 3.0}, {**row, 'last': 0},
            {**row, 'experiment': 'staleness'}, {**row, 'experiment': '2 x 2, best lr'}]
    assert by_run(rows) == {('reuse', 'R1', 'PPO', 4): pytest.approx(0.3),
                            ('moved', 'R1', 'PPO', 4): 2.5, ('staleness', 'R1', 'PPO', 100): 0.2,
                            ('2 x 2, best lr', 'R1', 'PPO', 'on-policy'): 0.2}


def test_bandit_in_its_quick_form(tmp_path, capsys):
    """Every run of a seed in a table beside the real one, no picture; a second call runs nothing
    anew and says the same."""
    cfg = bandit.Config(csv=str(tmp_path / 'bandit.csv'), quick=True)
    bandit.main(cfg)
    path = tmp_path / 'bandit-quick.csv'
    rows, before = read_rows(path), path.stat().st_mtime_ns
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert len(rows) == len(list(bandit.runs())) and all(row['last'] == 1 for row in rows)
    assert {row['experiment'].split(',')[0] for row in rows} == set(EXPERIMENTS)
    assert {row['command'] for row in rows} == {'python -m studies.bandit --seeds=0'}
    assert all(0 <= row['reward'] <= 1 and row['kl'] > 0 for row in rows)
    first = capsys.readouterr().out
    bandit.main(cfg)
    assert path.stat().st_mtime_ns == before and capsys.readouterr().out == first
    assert SMOKE_TEST in first and 'hold' not in first


def test_the_picture(tmp_path):
    """Drawn of the committed table: six panels with names."""
    pytest.importorskip('matplotlib')
    figure = bandit.draw(read_rows(Path(__file__).parents[2] / 'studies/results/bandit.csv'))
    assert [ax.get_title(loc='left') for ax in figure.axes] == [panel[0] for panel in bandit.PANELS]
    figure.savefig(tmp_path / 'bandit.png')
