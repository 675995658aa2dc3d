"""
studies/kl_race.py: its formulas against autograd and finite differences, the signs of its cases,
and its quick form.

    python -m pytest -q tests/studies/test_kl_race.py
"""
import itertools

import pytest
import torch

from studies.kl_race import (BETA, CHECKS, NUMBERS, RACES, TRIPLES, WAYS, best_gaussian, descend,
                             draw_pairs, gaussian, gradient, nudge, race, two_modes)
from studies.table import by_seed
from test_studies import quick_form
from train_dpo import dpo_loss


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def two_random(seed, size=7):
    """Two distributions (size,) without structure."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, size, generator=generator, dtype=torch.float64).softmax(1)


def kl(a, b):
    return (a * (a / b).log()).sum()


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('way', WAYS)
def test_gradients_of_both_kls(way, seed):
    """By autograd through the softmax, and by central differences of the logits, to 1e-8."""
    p, q = two_random(seed)
    divergence = (lambda p: kl(q, p)) if way == 'forward' else (lambda p: kl(p, q))
    theta = p.log().requires_grad_()
    slope, = torch.autograd.grad(divergence(theta.softmax(0)), theta)
    assert (gradient(p, q, way) - slope).abs().max() < 1e-12
    steps = 1e-5 * torch.eye(len(p), dtype=torch.float64)
    by_differences = tensor([(divergence((p.log() + step).softmax(0))
                              - divergence((p.log() - step).softmax(0))) / 2e-5 for step in steps])
    assert (gradient(p, q, way) - by_differences).abs().max() < 1e-8


@pytest.mark.parametrize('seed', range(5))
def test_what_a_step_does_to_a_ratio(seed):
    """log(p_i / p_j) changes by lr [(q_i - q_j) - (p_i - p_j)] forward, and in reverse by
    lr [p_i (log(q_i / p_i) + KL) - p_j (log(q_j / p_j) + KL)]: no normaliser, whatever lr."""
    p, q = two_random(seed)
    for lr, (way, push) in itertools.product((0.1, 3.0), (
            ('forward', q - p), ('reverse', p * ((q / p).log() + kl(p, q))))):
        change = (race(p, q, way, 1, lr)[1] / p).log()
        for i, j in itertools.product(range(len(p)), repeat=2):
            assert abs(change[i] - change[j] - lr * (push[i] - push[j])) < 1e-8


def first_steps(p, q):
    """log(p_1 / p_2) after a step forward, and after one in reverse."""
    return [(path[1, 0] / path[1, 1]).log() for path in (race(p, q, way, 1) for way in WAYS)]


@pytest.mark.parametrize('seed', range(20))
def test_reverse_is_ahead_above_the_logarithmic_mean(seed):
    """(A): from p_i = p_j reverse's change is p_i / L(q_i, q_j) times forward's."""
    p, q = two_random(seed)
    p[:2] = p[:2].mean()
    mean = (q[0] - q[1]) / (q[0] / q[1]).log()
    forward, reverse = first_steps(p, q)
    assert reverse / forward == pytest.approx((p[0] / mean).item(), abs=1e-8)


@pytest.mark.parametrize('seed', range(20))
def test_when_reverse_widens_a_gap(seed):
    """(B): q_i = q_j, p_i > p_j. A step forward closes the gap without overshooting; one in
    reverse widens it if both are below q exp(KL - 1), and closes it if both are above."""
    for p, q in (two_random(seed), two_random(seed + 100) ** 3):
        p, q = p / p.sum(), q / q.sum()
        q[:2] = q[:2].mean()
        p[:2] = p[:2].sort(descending=True).values
        before, (forward, reverse) = (p[0] / p[1]).log(), first_steps(p, q)
        turn = q[0] * (kl(p, q) - 1).exp()
        assert 0 < forward < before
        assert reverse > before or not p[0] < turn
        assert reverse < before or not p[1] > turn


@pytest.mark.parametrize('setting, way, at, expected', [
    ('A, likely', 'forward', (slice(1, 3), 0), [.638, .729]),           # p_1 after 1 and 2 steps
    ('A, likely', 'reverse', (slice(1, 3), 0), [.776, .834]),
    ('B, far', 'forward', (10, slice(2)), [.416, .386]),                # both bins after 10 steps
    ('B, far', 'reverse', (10, slice(2)), [.693, .079])])
def test_races_as_measured_apart_from_this_code(setting, way, at, expected):
    """(A) reverse is ahead with likely bins, (B) and commits to the larger bin; all end at q."""
    path = race(*map(tensor, RACES[setting]), way, 200)
    assert path[at].tolist() == pytest.approx(expected, abs=5e-4)
    assert (path[200] - tensor(RACES[setting][1])).abs().max() < 0.01


def test_one_gaussian_covers_or_seeks():
    """(C): forward straddles the modes, reverse sits on the heavier one. A target of the family is
    found itself."""
    (mean, sd), (heavier, narrow) = (best_gaussian(two_modes(0), way) for way in WAYS)
    assert abs(mean - 47) <= 2 and sd > 25 and abs(heavier - 70) <= 1 and narrow < 8
    bins, p = torch.arange(100), gaussian(40, 6)
    assert abs((p * bins).sum() - 40) < 1e-8 and abs((p * (bins - 40) ** 2).sum() - 36) < 1e-6
    for way in WAYS:
        assert best_gaussian(gaussian(33, 9), way) == (33, 9)


def test_what_a_seed_moves():
    """Seed 0 moves nothing; others move each probability, equal ones alike, and stay sums of 1."""
    assert nudge((.2, .2, .6), 0).tolist() == pytest.approx([.2, .2, .6], abs=1e-15)
    moved = [nudge((.2, .2, .6), seed) for seed in range(1, 400)]
    assert all(probs[0] == probs[1] and abs(probs.sum() - 1) < 1e-12 for probs in moved)
    # log(p_3 / p_1) moves by 0.2 (z - z'): standard deviation 0.2 sqrt 2
    spread = torch.stack([(probs[2] / probs[0]).log() for probs in moved]).std()
    assert 0.25 < spread < 0.32


@pytest.mark.parametrize('setting, method, lr, measured', [
    ('distinct', 'DPO', 1.0, [1.55, -6.38, -2.41]), ('distinct', 'SFT', .05, [1.43, -1.13, -1.79]),
    ('near-duplicates', 'DPO', 1.0, [-1.15, -1.94, .41]),
    ('near-duplicates', 'SFT', .05, [.63, .81, -1.24]),
    ('likely duplicates', 'DPO', 1.0, None), ('likely duplicates', 'SFT', .05, None)])
def test_descent_by_hand(setting, method, lr, measured):
    """100 steps against the gradients on paper, no autograd, no dpo_loss; and against numbers
    measured apart from this code. DPO lowers both near-duplicates, unless the reference suits."""
    probs, features = map(tensor, TRIPLES[setting])
    ref, theta, difference = probs.log(), 0 * features[0], features[0] - features[1]
    for _ in range(100):
        if method == 'SFT':
            theta = theta + lr * (features[0] - (ref + features @ theta).softmax(0) @ features)
        else:
            theta = theta + lr * BETA * torch.sigmoid(-BETA * difference @ theta) * difference
    moved = descend(method, ref[None], features[None], lr)[0]
    assert (moved - (ref + features @ theta).log_softmax(0) + ref).abs().max() < 1e-8
    assert moved.tolist() == pytest.approx(measured, abs=.006) if measured else moved[0] > 0


def slope_of_chosen(ref, features):
    """(phi_w - E phi) (phi_w - phi_l): what decides whether DPO's first step lowers w."""
    return ((features[0] - ref.exp() @ features) @ (features[0] - features[1])).item()


def test_the_condition_decides_the_first_step():
    """+1 for distinct responses, -.16 for near-duplicates; for 200 random pairs of similar ones its
    sign is that of what a small step does to the chosen one, and a fall is never undone."""
    worth = [slope_of_chosen(tensor(probs).log(), tensor(features))
             for probs, features in TRIPLES.values()]
    assert worth == pytest.approx([1.0, -0.16, 0.064], abs=1e-9)
    generator = torch.Generator().manual_seed(0)
    signs = []
    for _ in range(200):
        ref = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
        features = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        features[1] = features[0] + 0.3 * features[1]
        slope = slope_of_chosen(ref, features)
        moved = descend('DPO', ref[None], features[None], 1e-4, 1)[0, 0]
        # The step itself: lr beta / 2 times the slope
        assert moved == pytest.approx(1e-4 * BETA / 2 * slope, rel=1e-3, abs=1e-9)
        signs.append(slope < 0)
        if slope < 0:
            assert descend('DPO', ref[None], features[None], 1.0, 30)[0, 0] < 0
    assert 20 < sum(signs) < 180


def test_a_parameter_for_each_response_never_lowers_the_chosen():
    """Tabular: d log pi(w) is 1 - pi(w) + pi(l) > 0, for any reference."""
    for seed in range(5):
        ref, _ = two_random(seed)
        table = torch.eye(len(ref), dtype=torch.float64)
        assert slope_of_chosen(ref.log(), table) == pytest.approx(
            (1 - ref[0] + ref[1]).item(), abs=1e-12)
        for steps in (1, 10, 100):
            assert descend('DPO', ref.log()[None], table[None], 5.0, steps)[0, 0] > 0


@pytest.mark.parametrize('distance, width', [(0.1, 8), (1.4, 8), (0.5, 512)])
def test_pairs_of_the_map(distance, width):
    """Distributions; the pair as far apart as asked, the other features of length 1."""
    ref, features = draw_pairs(3, distance, width)
    assert (ref.exp().sum(1) - 1).abs().max() < 1e-12 and features.shape[2] == width
    assert ((features[:, 0] - features[:, 1]).norm(dim=1) - distance).abs().max() < 1e-12
    assert (features[:, 2:].norm(dim=2) - 1).abs().max() < 1e-12


def test_pairs_that_share_parameters():
    """The descent on all pairs is that of the mean of the project's dpo_loss: finite differences
    in theta give its first step, to 1e-8."""
    ref, features = draw_pairs(1, 0.5, 8)

    def loss(theta):
        logprobs = (ref + features @ theta).log_softmax(1)
        return dpo_loss(logprobs[:, 0], logprobs[:, 1], ref[:, 0], ref[:, 1], BETA).mean()
    steps = 1e-5 * torch.eye(8, dtype=torch.float64)
    theta = -tensor([(loss(step) - loss(-step)) / 2e-5 for step in steps])      # lr 1
    expected = (ref + features @ theta).log_softmax(1) - ref
    assert (descend('DPO', ref, features, 1.0, 1) - expected).abs().max() < 1e-8


def test_kl_race_in_its_quick_form(tmp_path, monkeypatch, capsys):
    """Every number of a seed. Seed 0, the cases as they are written, keeps every claim."""
    rows = quick_form('kl_race', tmp_path, monkeypatch, capsys, seeds='0')
    assert all(any(row[name] != '' for row in rows) for name in NUMBERS)
    run = by_seed(rows, 'setting', 'method', 'step')[0]
    assert all(holds(run) for holds in CHECKS.values())
