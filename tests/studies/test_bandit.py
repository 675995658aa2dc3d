"""
studies/bandit.py and the table it trains: exact numbers of the reference, what the table samples
and measures, and the quick form.

    python -m pytest -q tests/studies/test_bandit.py
"""
import itertools, math, statistics

import pytest
import torch

from studies.bandit import (EXPERIMENTS, LOSSES, REF, TASKS, N, Table, best_of_n, by_run, optimum,
                            runs)
from test_studies import quick_form


def test_the_reference_and_the_rewards():
    """Bins of tanh of Cauchy draws agree with the closed form; its landmarks, as measured
    elsewhere. The tail's reward is a tenth of the mode's under the reference."""
    assert abs(REF.sum() - 1) < 1e-12 and (REF > 0).all()
    assert REF[[0, 19, 70, 99]].tolist() == pytest.approx([.0781, .0253, .0021, .0422], abs=1e-4)
    assert -(REF * REF.log()).sum() == pytest.approx(4.117, abs=1e-3)
    torch.manual_seed(0)
    y = torch.distributions.Cauchy(-0.7, 0.4).sample((400_000,))
    counts = torch.histc(torch.tanh(y), 100, -1, 1)
    assert (counts / counts.sum() - REF).abs().max() < 0.002
    assert (REF * TASKS['R1']).sum() == pytest.approx(.0390, abs=1e-4)
    assert (REF * TASKS['R2']).sum() == pytest.approx(.3772, abs=1e-4)


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
    def kl(q):
        return (q * (q / REF).log()).sum().item()
    q = best_of_n(REF, TASKS['R1'], 10)
    assert (q * TASKS['R1']).sum() == pytest.approx(.3135, abs=1e-4)
    assert kl(q) == pytest.approx(1.402, abs=1e-3) and kl(q) < math.log(10) - 0.9
    assert (best_of_n(REF, TASKS['R2'], 10) * TASKS['R2']).sum() == pytest.approx(.9401, abs=1e-4)
    for beta, reward, nats in ((.3, .341, .656), (.2, .653, 1.951), (.1, .941, 3.794)):
        q = optimum(TASKS['R1'], REF.log(), beta)
        assert (q * TASKS['R1']).sum() == pytest.approx(reward, abs=1e-3)
        assert kl(q) == pytest.approx(nats, abs=1e-3)


def test_what_a_table_samples():
    """Groups of N with mean rewards as scores, logprobs read off the table one by one; choices are
    drawn with the table's probabilities; another collection, other samples."""
    table = Table(5, TASKS['R2'], L=3)
    with torch.no_grad():
        table.logits[0][1].zero_()                                      # the second choice uniform
    batch = table.collect(20_000, 0)
    assert batch['responses'].shape == (2000, 10, 3)
    g, n = 7, 4
    actions = batch['responses'][g, n].tolist()
    assert batch['scores'][g, n] == pytest.approx(
        statistics.fmean(math.exp(-((a - 20) / 10) ** 2) for a in actions))
    ours = [REF[actions[0]].item(), 0.01, REF[actions[2]].item()]
    assert batch['old_logprobs'][g, n].exp().tolist() == pytest.approx(ours)
    assert batch['ref_logprobs'][g, n].exp().tolist() == pytest.approx(REF[actions].tolist())
    shares = torch.bincount(batch['responses'][..., 0].flatten(), minlength=100) / 20_000
    assert (shares - REF).abs().max() < 0.01
    assert torch.bincount(batch['responses'][..., 1].flatten()).max() < 300
    assert not torch.equal(table.collect(20_000, 1)['responses'], batch['responses'])


def test_advantages_are_of_all_scores_so_far():
    """Whitened by mean and deviation of this collection and those before; or of this one alone."""
    table = Table(0, TASKS['R2'], L=2)
    first, second = table.collect(50, 0), table.collect(100, 1)
    scores = torch.cat([first['scores'].flatten(), second['scores'].flatten()])
    expected = (second['scores'] - scores.mean()) / scores.std(correction=0)
    assert second['advantages'].shape == (10, 10, 2)
    assert (second['advantages'] - expected[..., None]).abs().max() < 1e-5
    for batch, name in ((first, 'advantages'), (first, 'whitened'), (second, 'whitened')):
        own = (batch['scores'] - batch['scores'].mean()) / batch['scores'].std(correction=0)
        assert (batch[name][..., 0] - own).abs().max() < 1e-5


def test_what_a_table_measures():
    """Against sums over all responses of two choices; kl_collect is the most since a collection."""
    table = Table(0, TASKS['R1'], L=2)
    batch = table.collect(100, 0)
    with torch.no_grad():
        table.logits[0] += torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    found, p = table.measure(batch), table.logprobs().exp()
    joint, ref = p[0][:, None] * p[1], REF[:, None] * REF
    reward = (TASKS['R1'][:, None] + TASKS['R1']) / 2
    assert found['reward'] == pytest.approx((joint * reward).sum().item())
    assert found['kl'] == pytest.approx((joint * (joint / ref).log()).sum().item())
    assert found['entropy'] == pytest.approx(-(joint * joint.log()).sum().item())
    assert found['kl_collect'] == pytest.approx(found['kl'])            # the reference sampled
    ratios = (table.logprobs_of(batch) - batch['ref_logprobs']).sum(-1).tolist()
    ordered = [sorted(range(10), key=group.__getitem__) for group in batch['scores'].tolist()]
    for name, place in (('chosen', -1), ('rejected', 0)):
        assert found[name] == pytest.approx(statistics.fmean(
            group[order[place]] for group, order in zip(ratios, ordered)))
    table.collect(100, 1)
    with torch.no_grad():
        table.logits[0].mul_(1.01)
    assert table.measure(batch)['kl_collect'] == found['kl_collect']    # the most, not the last


def test_every_experiment_can_be_cut_evenly():
    """B divides the samples, M divides B or B is one minibatch, groups fill both."""
    for samples, M, L, methods in EXPERIMENTS.values():
        for method, lr, best in methods:
            assert method in LOSSES
            for (B, T), lrs in best.items():
                assert samples % B == 0 and (B % M == 0 or B < M) and B % N == 0
                assert 1 <= len(lrs) <= 2


def test_runs_by_key():
    """The last rows only; the mean over seeds; under 'moved' the kl_collect of reuse."""
    row = {'experiment': 'reuse', 'task': 'R1', 'method': 'PPO', 'B': 100, 'T': 4, 'seed': 0,
           'data': 'on-policy', 'last': 1, 'reward': 0.2, 'kl_collect': 2.0}
    rows = [row, {**row, 'seed': 1, 'reward': 0.4, 'kl_collect': 3.0}, {**row, 'last': 0},
            {**row, 'experiment': 'staleness'}, {**row, 'experiment': '2 x 2, best lr'}]
    assert by_run(rows) == {('reuse', 'R1', 'PPO', 4): pytest.approx(0.3),
                            ('moved', 'R1', 'PPO', 4): 2.5, ('staleness', 'R1', 'PPO', 100): 0.2,
                            ('2 x 2, best lr', 'R1', 'PPO', 'on-policy'): 0.2}


def test_bandit_in_its_quick_form(tmp_path, monkeypatch, capsys):
    """A last row of every run; every experiment also at its best learning rates."""
    rows = quick_form('bandit', tmp_path, monkeypatch, capsys)
    assert len(rows) == len(list(runs())) and all(row['last'] == 1 for row in rows)
    assert {row['experiment'].split(',')[0] for row in rows} == set(EXPERIMENTS)
    assert all(0 <= row['reward'] <= 1 and row['kl'] > 0 for row in rows)
