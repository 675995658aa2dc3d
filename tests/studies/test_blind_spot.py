"""
The blind spot of DPO: its exact facts, the map, and the study in its quick form.

    python -m pytest -q tests/studies/test_blind_spot.py
"""
import math

import pytest
import torch

from studies.blind_spot import (along, ascend, descend, draw_map, fit, measure, mlp, numbers,
                                optimum, pair_loss, peak)
from test_studies import quick_form


@pytest.mark.parametrize('beta', [0.1, 1.0])
def test_the_loss_is_of_the_ratio_alone(beta):
    """log(1 + (b/a)^beta) with a reference that likes both alike, whatever is left for y3."""
    for a, b in ((0.4, 0.1), (0.04, 0.01), (0.8, 0.2), (0.2, 0.8)):
        rest = numbers(a, b, max(1 - a - b, 1e-12)).log()
        for ref in (numbers(.5, .5, 1e-8), numbers(.1, .1, .8)):
            assert pair_loss(rest, ref.log(), beta).item() == pytest.approx(
                math.log(1 + (b / a) ** beta), abs=1e-8)


def test_the_third_logit_has_no_gradient():
    """dL/dz = -beta sigmoid(-margin) (1, -1, 0), with the margin worked out by hand."""
    logits = numbers(0.7, -0.4, 2.0).requires_grad_()
    ref = numbers(0.2, 0.3, 0.5).log()
    pair_loss(logits, ref, 0.5).backward()
    margin = 0.5 * (1.1 - math.log(0.2 / 0.3))
    slope = 0.5 / (1 + math.exp(margin))
    assert torch.allclose(logits.grad, numbers(-slope, slope, 0.0), rtol=0, atol=1e-8)


def test_descent_stays_on_its_curve_and_ends_far_from_the_optimum():
    """From (.05, .05, .9) to margin 5 at beta 1 DPO keeps .59 on y3, that the reference has at
    1e-8; each end point lies on the closed form at its own shift, half its margin over beta."""
    start, ref = numbers(.05, .05, .9), numbers(.5, .5, 1e-8)
    assert along(start, 2.5).tolist() == pytest.approx([.4025, .0027, .5948], abs=5e-5)
    for margin in (1.0, 5.0):
        end = descend(start.log(), lambda z: pair_loss(z, ref.log(), 1.0),
                      math.log1p(math.exp(-margin)), lr=0.1).softmax(-1)
        shift = (end[0] / end[1]).log() / 2
        assert margin / 2 <= shift < margin / 2 + 0.03      # a last step too far at the most
        assert torch.allclose(end, along(start, shift), rtol=0, atol=1e-8)
    scores = numbers(2.5, -2.5, 0.0)
    assert optimum(scores, ref.log(), 0.1).tolist() == pytest.approx([1, 0, 0], abs=1e-8)


@pytest.mark.parametrize('start, most', [((.01, .98, .01), .0480793), ((.2, .3, .5), .5051026)])
def test_the_peak_of_the_third(start, most):
    """y3 rises while the winner is the rarer, to p3 / (2 sqrt(p1 p2) + p3) at ln(p2/p1) / 2; of a
    balanced pair it only falls."""
    start = numbers(*start)
    assert peak(start).item() == pytest.approx(most, abs=1e-6)
    at = ((start[1] / start[0]).log() / 2).item()
    path = along(start, torch.linspace(0, 2 * at, 1001))[:, 2]
    assert path.argmax() == 500 and path[500].item() == pytest.approx(peak(start).item(), abs=1e-8)
    assert path[-1].item() == pytest.approx(start[2].item(), abs=1e-8)     # p1 and p2 changed over
    path = along(numbers(.45, .45, .1), torch.linspace(0, 5, 101))[:, 2]
    assert path[0].item() == pytest.approx(0.1, abs=1e-12) and (path.diff() < 0).all()


def test_ascent_finds_the_optimum():
    """Policy gradient on a table ends at ref exp(score / beta) / Z, and nothing is above it. With
    y2 out of play, y1 and y3 are equally likely where the gap is beta ln(ref1 / ref3)."""
    gap = 0.1 * math.log(.5 / 1e-8)
    probs = optimum(numbers(0, -50, gap), numbers(.5, .5, 1e-8).log(), 0.1)
    assert probs.tolist() == pytest.approx([.5, 0, .5], abs=1e-8)

    def objective(logits):
        probs = logits.softmax(-1)
        return (probs * scores).sum(-1) - 0.5 * (probs * (probs.log() - ref)).sum(-1)
    torch.manual_seed(0)
    scores = torch.randn(2, 8, dtype=torch.float64)
    ref = torch.randn(2, 8, dtype=torch.float64).log_softmax(-1)
    best = optimum(scores, ref, 0.5)
    table = ref.clone().requires_grad_()
    probs = ascend([table], lambda: table, scores, ref, 0.5, steps=1500, lr=0.02)
    assert torch.allclose(probs, best, rtol=0, atol=1e-3)
    for _ in range(20):
        other = best.log() + 0.3 * torch.randn(2, 8, dtype=torch.float64)
        assert (objective(other) < objective(best.log())).all()


def test_what_a_map_is():
    """Two losers a prompt, never the diagonal; off-policy the winner is rare, else not."""
    for seed in range(20):
        losers, target = draw_map(seed, off_policy=True)
        balanced_losers, balanced = draw_map(seed, off_policy=False)
        assert losers.equal(balanced_losers)
        for row, pair in enumerate(losers.tolist()):
            assert len({row, *pair}) == 3 and set(pair) <= set(range(8))
        assert torch.allclose(target.sum(1), torch.ones(8, dtype=torch.float64))
        # the losers' weight over the winner's is 100 times what it is in the balanced table
        odds = target.gather(1, losers) / target.diag()[:, None]
        assert torch.allclose(odds, 100 * balanced.gather(1, losers) / balanced.diag()[:, None])


def test_measures_by_hand():
    """Of one prompt's five uncovered cells one doubles and the others fall to a half."""
    losers = torch.tensor([[(row + 1) % 8, (row + 2) % 8] for row in range(8)])
    ref = torch.full((8, 8), 1 / 8, dtype=torch.float64)
    probs = ref.clone()
    probs[0, 3:] = numbers(2, .5, .5, .5, .5) / 8
    probs[0, 0] += 1 / 8
    found = measure(probs, ref, losers)
    assert found['p_best'] == pytest.approx(1 / 8 + 1 / 64)
    assert found['uncovered'] == pytest.approx(5 / 8 - 1 / 64)
    assert found['up'] == pytest.approx(1 / 40) and found['ratio_max'] == pytest.approx(2)


def test_fit_stops_where_it_first_reaches_each_target():
    torch.manual_seed(0)

    def loss_of(table):
        return ((table - torch.eye(8, dtype=torch.float64)) ** 2).mean()
    (first, early), (last, late) = fit(mlp(0.5), loss_of, [0.1, 0.05])
    assert first < last and 0.08 < loss_of(early) <= 0.1 and 0.04 < loss_of(late) <= 0.05
    with pytest.raises(RuntimeError, match='after 3 steps'):
        list(fit(mlp(0.5), loss_of, [0.0], most_steps=3))


def test_blind_spot_in_its_quick_form(tmp_path, monkeypatch, capsys):
    """Off-policy DPO first raises the uncovered cells, and has lowered them at the end."""
    rows = quick_form('blind_spot', tmp_path, monkeypatch, capsys)
    dpo = {row['policy']: row for row in rows if row['setting'] == 'off-policy'}
    assert dpo['dpo 0.6']['up'] > 0.8 and dpo['dpo 0.05']['up'] < 0.2
