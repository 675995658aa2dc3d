"""
studies/kl_race.py: its formulas against autograd and finite differences, the signs of its cases,
and its quick form.

    python -m pytest -q tests/studies/test_kl_race.py
"""
import pytest
import torch

from studies import kl_race
from studies.kl_race import (BETA, CHECKS, NUMBERS, RACES, TRIPLES, WAYS, best_gaussian, descend,
                             draw_pairs, gaussian, gradient, nudge, race, two_modes)
from studies.table import SMOKE_TEST, read_rows
from train_dpo import dpo_loss


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def two_random(seed, size=7):
    """Two distributions (size,) without structure."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, size, generator=generator, dtype=torch.float64).softmax(1)


def kl(a, b):
    return (a * (a / b).log()).sum()


# ----------------------------------------------------------------------------- exact identities

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
    for lr in (0.1, 3.0):
        changes = {way: (race(p, q, way, 1, lr)[1] / p).log() for way in WAYS}
        push = p * ((q / p).log() + kl(p, q))
        for i in range(len(p)):
            for j in range(len(p)):
                forward = lr * ((q[i] - q[j]) - (p[i] - p[j]))
                reverse = lr * (push[i] - push[j])
                assert abs(changes['forward'][i] - changes['forward'][j] - forward) < 1e-8
                assert abs(changes['reverse'][i] - changes['reverse'][j] - reverse) < 1e-8


@pytest.mark.parametrize('seed', range(20))
def test_reverse_is_ahead_above_the_logarithmic_mean(seed):
    """(A): from p_i = p_j reverse's change is p_i / L(q_i, q_j) times forward's."""
    p, q = two_random(seed)
    p[:2] = p[:2].mean()
    mean = (q[0] - q[1]) / (q[0] / q[1]).log()
    forward, reverse = ((path[1, 0] / path[1, 1]).log()
                        for path in (race(p, q, way, 1) for way in WAYS))
    assert reverse / forward == pytest.approx((p[0] / mean).item(), abs=1e-8)


@pytest.mark.parametrize('seed', range(20))
def test_when_reverse_widens_a_gap(seed):
    """(B): q_i = q_j, p_i > p_j. A step forward closes the gap without overshooting; one in
    reverse widens it if both are below q exp(KL - 1), and closes it if both are above."""
    for p, q in (two_random(seed), two_random(seed + 100) ** 3):
        p, q = p / p.sum(), q / q.sum()
        q[:2] = q[:2].mean()
        p[:2] = p[:2].sort(descending=True).values
        before = (p[0] / p[1]).log()
        forward, reverse = ((path[1, 0] / path[1, 1]).log()
                            for path in (race(p, q, way, 1) for way in WAYS))
        turn = q[0] * (kl(p, q) - 1).exp()
        assert 0 < forward < before
        if p[0] < turn:
            assert reverse > before
        if p[1] > turn:
            assert reverse < before


# ----------------------------------------------------------------------------- the races

def test_likely_bins_and_rare_bins():
    """(A), as measured apart from this code: p_1 is .638 forward and .776 in reverse after 1
    step, .729 and .834 after 2; with rare bins reverse is behind."""
    for setting, sign in (('A, likely', 1), ('A, rare', -1)):
        forward, reverse = (race(*map(tensor, RACES[setting]), way, 2)[1:, 0] for way in WAYS)
        assert (sign * (reverse - forward) > 0).all()
        if setting == 'A, likely':
            assert forward.tolist() == pytest.approx([.638, .729], abs=5e-4)
            assert reverse.tolist() == pytest.approx([.776, .834], abs=5e-4)


def test_reverse_commits_to_the_larger_bin():
    """(B): after 10 steps (.416, .386) forward, (.693, .079) in reverse; both end at q."""
    paths = {way: race(*map(tensor, RACES['B, far']), way, 200) for way in WAYS}
    assert paths['forward'][10, :2].tolist() == pytest.approx([.416, .386], abs=5e-4)
    assert paths['reverse'][10, :2].tolist() == pytest.approx([.693, .079], abs=5e-4)
    ratios = {way: (path[10, 0] / path[10, 1]).item() for way, path in paths.items()}
    assert ratios['reverse'] > 5 and ratios['forward'] < 1.5
    for path in paths.values():
        assert (path[200] - tensor(RACES['B, far'][1])).abs().max() < 0.01


def test_one_gaussian_covers_or_seeks():
    """(C): forward straddles the modes, reverse sits on the heavier one. A target of the family is
    found itself."""
    q = two_modes(0)
    (m_forward, s_forward), (m_reverse, s_reverse) = (best_gaussian(q, way) for way in WAYS)
    assert abs(m_forward - 47) <= 2 and s_forward > 25
    assert abs(m_reverse - 70) <= 1 and s_reverse < 8
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


# ----------------------------------------------------------------------------- displacement

def by_hand(ref, features, lr, steps, method):
    """descend for one prompt with the gradient worked out: no autograd, no dpo_loss."""
    theta = torch.zeros(features.shape[1], dtype=torch.float64)
    for _ in range(steps):
        probs = (ref + features @ theta).softmax(0)
        if method == 'SFT':
            theta = theta + lr * (features[0] - probs @ features)
        else:
            difference = features[0] - features[1]
            theta = theta + lr * BETA * torch.sigmoid(-BETA * difference @ theta) * difference
    return (ref + features @ theta).log_softmax(0) - ref


@pytest.mark.parametrize('method, lr', [('DPO', 1.0), ('SFT', 0.05)])
@pytest.mark.parametrize('setting', TRIPLES)
def test_descent_by_hand(setting, method, lr):
    """100 steps against the gradients on paper."""
    probs, features = map(tensor, TRIPLES[setting])
    moved = descend(method, probs.log()[None], features[None], lr)[0]
    assert (moved - by_hand(probs.log(), features, lr, 100, method)).abs().max() < 1e-8


def test_signs_of_three_responses():
    """Distinct: DPO and SFT raise the chosen one. Near-duplicates: DPO lowers both and raises the
    third while the margin grows, SFT raises both; with a reference on the pair DPO raises the
    chosen one again. Numbers measured apart from this code."""
    moved = {(setting, method): descend(method, tensor([probs]).log(), tensor([features]), lr)[0]
             for setting, (probs, features) in TRIPLES.items()
             for method, lr in (('DPO', 1.0), ('SFT', 0.05))}
    for (setting, method), numbers in {
            ('distinct', 'DPO'): (1.55, -6.38, -2.41), ('distinct', 'SFT'): (1.43, -1.13, -1.79),
            ('near-duplicates', 'DPO'): (-1.15, -1.94, .41),
            ('near-duplicates', 'SFT'): (.63, .81, -1.24)}.items():
        assert moved[setting, method].tolist() == pytest.approx(numbers, abs=0.006)
    assert moved['near-duplicates', 'DPO'][0] - moved['near-duplicates', 'DPO'][1] > 0.7
    assert moved['likely duplicates', 'DPO'][0] > 0


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


# ----------------------------------------------------------------------------- the study

def test_every_claim_can_fail():
    """None is true whatever happens: of a run whose numbers are all -0.5, or all 0.5, none holds
    in both."""
    class Alike(dict):
        def __missing__(self, key):
            return self['all']
    for claim, holds in CHECKS.items():
        assert not all(holds(Alike(all=number)) for number in (-0.5, 0.5)), claim


def test_kl_race_in_its_quick_form(tmp_path, capsys):
    """Every number of a seed in a table beside the real one, no picture; a second call runs
    nothing anew. Seed 0, the cases as they are written, keeps every claim."""
    cfg = kl_race.Config(csv=str(tmp_path / 'kl_race.csv'), quick=True)
    failed = kl_race.main(cfg)
    assert not any(failed.values()) and len(failed) == len(CHECKS)
    path = tmp_path / 'kl_race-quick.csv'
    rows, before = read_rows(path), path.stat().st_mtime_ns
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert {row['seed'] for row in rows} == {0}
    assert all(any(row[name] != '' for row in rows) for name in NUMBERS)
    assert rows[0]['command'] == 'python -m studies.kl_race --seeds=0'
    capsys.readouterr()
    kl_race.main(cfg)
    assert path.stat().st_mtime_ns == before and SMOKE_TEST in capsys.readouterr().out


def test_the_picture(tmp_path):
    """Drawn beside the table: five panels, each with a name and a key."""
    pytest.importorskip('matplotlib')
    cfg = kl_race.Config(seeds='0', csv=str(tmp_path / 'kl_race.csv'))
    kl_race.main(cfg)
    assert (tmp_path / 'kl_race.png').stat().st_size > 10_000
    figure = kl_race.draw(read_rows(tmp_path / 'kl_race.csv'))
    assert len(figure.axes) == 5
    assert all(ax.get_title(loc='left') and ax.get_legend() for ax in figure.axes)
