"""
studies/unified.py: every loss against a loop, the exact identities, and the algorithm's order of
events.

    python -m pytest -q tests/studies/test_unified.py
"""
import itertools
import math
from functools import partial

import pytest
import torch

from studies import unified
from studies.policies import Table, peaked
from studies.unified import (best_of_n_loss, binary_feedme_loss, dpo_pairs_loss, ipo_pairs_loss,
                             ppo_loss, pref_ft_loss, ranked_pairs, reinforce_loss, rwr_loss, train)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def random_batch(seed=0, G=3, N=4, T=5):
    """logprobs (G, N, T) and a minibatch without structure; half the responses are shorter."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (G, N, 1), generator=generator)
    mask = torch.arange(T) < lengths

    def draw():
        return (-3 * torch.rand(G, N, T, generator=generator, dtype=torch.float64)) * mask
    return draw(), {'scores': torch.randn(G, N, generator=generator, dtype=torch.float64),
                    'advantages': torch.randn(G, N, T, generator=generator,
                                              dtype=torch.float64) * mask,
                    'old_logprobs': draw(), 'ref_logprobs': draw(), 'mask': mask}


# ----------------------------------------------------------------------------- the losses

@pytest.mark.parametrize('seed', range(3))
def test_losses_by_loops(seed):
    """All losses again, response by response and pair by pair, on ragged random minibatches."""
    logprobs, batch = random_batch(seed)
    G, N, T = logprobs.shape
    now, ref = logprobs.sum(-1), batch['ref_logprobs'].sum(-1)
    scores, A, old = batch['scores'], batch['advantages'], batch['old_logprobs']
    weights = [[math.exp(s / 0.7) for s in group] for group in scores.tolist()]
    mean = sum(map(sum, weights)) / (G * N)
    for g, n in itertools.product(range(G), range(N)):
        clipped = sum(max(-A[g, n, t] * r, -A[g, n, t] * min(max(r, 0.8), 1.2))
                      for t in range(T)
                      for r in [math.exp(logprobs[g, n, t] - old[g, n, t])])
        for loss, number in (
                (reinforce_loss, -sum(A[g, n, t] * logprobs[g, n, t] for t in range(T))),
                (ppo_loss, clipped),
                (partial(rwr_loss, beta=0.7), -weights[g][n] / mean * now[g, n]),
                (partial(binary_feedme_loss, bar=0.1), -now[g, n] if scores[g, n] > 0.1 else 0)):
            assert abs(loss(logprobs, batch)[g, n] - number) < 1e-10
    for g in range(G):
        best = max(range(N), key=lambda n: scores[g, n])
        assert best_of_n_loss(logprobs, batch)[g] == -now[g, best]
    pairs = [(g, w, l) for g in range(G) for w in range(N) for l in range(N)
             if scores[g, w] - scores[g, l] > 0.3]
    h = [now[g, w] - ref[g, w] - now[g, l] + ref[g, l] for g, w, l in pairs]
    dpo = dpo_pairs_loss(logprobs, batch, beta=0.2, threshold=0.3)
    ipo = ipo_pairs_loss(logprobs, batch, beta=0.2, threshold=0.3)
    pref_ft = pref_ft_loss(logprobs, batch, threshold=0.3)
    assert len(dpo) == len(ipo) == len(pref_ft) == len(pairs) > 0
    for i in range(len(pairs)):
        assert abs(dpo[i] - math.log(1 + math.exp(-0.2 * h[i]))) < 1e-10
        assert abs(ipo[i] - (h[i] - 2.5) ** 2) < 1e-10
        assert pref_ft[i] == -now[pairs[i][0], pairs[i][1]]


def test_ranked_pairs():
    """Within a group alone, each pair once, ties and near ties left out."""
    scores = tensor([[1., 1., 0.], [0., .2, .5]])
    assert [index.tolist() for index in ranked_pairs(scores)] == [
        [0, 0, 1, 1, 1], [0, 1, 1, 2, 2], [2, 2, 0, 0, 1]]
    assert [index.tolist() for index in ranked_pairs(scores, 0.4)] == [
        [0, 0, 1], [0, 1, 2], [2, 2, 0]]
    group, chosen, rejected = ranked_pairs(torch.randn(4, 10))
    assert len(group) == 4 * 45


@pytest.mark.parametrize('seed', range(3))
def test_padding_changes_no_loss(seed):
    """What stands for padding, 0 everywhere, adds to no sum and has no gradient."""
    logprobs, batch = random_batch(seed)
    wider = {name: torch.nn.functional.pad(value, (0, 3)) if value.dim() == 3 else value
             for name, value in batch.items()}
    for loss in (reinforce_loss, ppo_loss, best_of_n_loss, partial(rwr_loss, beta=1.0),
                 partial(dpo_pairs_loss, beta=0.1), partial(ipo_pairs_loss, beta=0.1)):
        padded = torch.nn.functional.pad(logprobs, (0, 3)).requires_grad_()
        assert torch.allclose(loss(padded, wider), loss(logprobs, batch))
        loss(padded, wider).sum().backward()
        if loss in (reinforce_loss, ppo_loss):
            assert (padded.grad[~wider['mask']] == 0).all()


NEGATIVE = {'REINFORCE': reinforce_loss, 'PPO': ppo_loss, 'RWR': partial(rwr_loss, beta=1.0),
            'Best-of-N': best_of_n_loss, 'on-policy DPO': partial(dpo_pairs_loss, beta=0.1),
            'on-policy IPO': partial(ipo_pairs_loss, beta=0.1),
            'DPO, IPO': partial(dpo_pairs_loss, beta=0.1), 'Pref-FT': pref_ft_loss,
            'Binary FeedMe': partial(binary_feedme_loss, bar=0.0)}


@pytest.mark.parametrize('method, loss', NEGATIVE.items())
def test_the_table_says_who_has_a_negative_gradient(method, loss):
    """The last column of the docstring's table is whether descent lowers some response."""
    line, = [line for line in unified.__doc__.splitlines() if line.strip().startswith(method + ' ')]
    assert line.split()[-1] in ('yes', 'no')
    logprobs, batch = random_batch(1)
    logprobs = batch['old_logprobs'].clone().requires_grad_()
    loss(logprobs, batch).sum().backward()
    assert (logprobs.grad > 0).any() == (line.split()[-1] == 'yes')


# ----------------------------------------------------------------------------- exact identities

def exact(seed, actions=6):
    """A policy, its logits with gradient, a reference and scores of all its responses."""
    generator = torch.Generator().manual_seed(seed)
    logits, ref, scores = torch.randn(3, actions, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), ref.log_softmax(0), scores


@pytest.mark.parametrize('seed', range(5))
def test_ppo_begins_as_reinforce(seed):
    """With one pass over one minibatch the ratio is 1: the gradients are the same, clip or not."""
    logprobs, batch = random_batch(seed)
    logprobs = logprobs.requires_grad_()
    batch['old_logprobs'] = logprobs.detach().clone()
    ppo, = torch.autograd.grad(ppo_loss(logprobs, batch).mean(), logprobs)
    plain, = torch.autograd.grad(reinforce_loss(logprobs, batch).mean(), logprobs)
    assert (ppo - plain).abs().max() < 1e-12 and plain.abs().max() > 0.01


@pytest.mark.parametrize('seed', range(5))
def test_dpo_begins_as_a_policy_gradient_of_the_win_rate(seed):
    """
    At the reference, over independent pairs of its responses, the gradient of DPO's loss is
    -2 beta E[(w - 1/2) grad log pi], w the chance to beat another sample (half of a tie): half of
    the responses are pushed down.
    """
    beta, (_, ref, scores) = 0.3, exact(seed)
    scores[1] = scores[0]                                                           # a tie
    logits, p = ref.clone().requires_grad_(), ref.exp()
    logprobs = logits.log_softmax(0)
    total = 0.0
    for a, b in itertools.product(range(len(p)), repeat=2):
        pair = {'scores': scores[[a, b]][None], 'ref_logprobs': ref[[a, b]][None, :, None]}
        losses = dpo_pairs_loss(logprobs[[a, b]][None, :, None], pair, beta)
        total = total + p[a] * p[b] * losses.sum()
    by_pairs, = torch.autograd.grad(total, logits)
    ties = sum(p[a] * p[b] for a in range(6) for b in range(6) if scores[a] == scores[b])
    wins = torch.stack([(p * ((scores < s).double() + 0.5 * (scores == s))).sum() for s in scores])
    by_wins, = torch.autograd.grad(-2 * beta * (p * (wins - 0.5) * logits.log_softmax(0)).sum(),
                                   logits)
    # Each pair of responses that do not tie is met twice, in either order, and ranked once each
    assert (by_pairs - by_wins).abs().max() < 1e-8
    assert abs(total - (1 - ties) * math.log(2)) < 1e-8


@pytest.mark.parametrize('seed', range(5))
def test_a_constant_changes_no_expected_gradient_on_policy(seed):
    """
    E_pi[grad log pi] is 0: on-policy, REINFORCE with advantages A and A - c differ in variance
    alone. Off-policy their expected gradients differ. The expectation is a sum over responses.
    """
    logits, ref, scores = exact(seed)

    def gradient(advantages, sampler):
        losses = reinforce_loss(logits.log_softmax(0)[None, :, None],
                                {'advantages': advantages[None, :, None]})          # (1, actions)
        return torch.autograd.grad((sampler * losses[0]).sum(), logits)[0]
    own = logits.detach().softmax(0)
    assert (gradient(scores, own) - gradient(scores - 2.5, own)).abs().max() < 1e-8
    assert gradient(scores, own).abs().max() > 0.01
    assert (gradient(scores, ref.exp()) - gradient(scores - 2.5, ref.exp())).abs().max() > 0.01


# ----------------------------------------------------------------------------- the algorithm

def run_and_record(G, N, passes, batch_size, collections=2):
    """What train asks for: the collections' numbers, and the rows of every minibatch."""
    weight, asked, seen = torch.nn.Parameter(tensor([0.0])), [], []

    def collect(k):
        asked.append(k)
        return {'scores': tensor([[100 * k + g] * N for g in range(G)])}

    for part in train(torch.nn.ParameterList([weight]),
                      lambda part: weight * torch.ones_like(part['scores'])[..., None], collect,
                      lambda logprobs, part: logprobs.sum(-1), torch.optim.SGD([weight], lr=1.0),
                      0.5, 0, collections, passes, batch_size):
        seen.append(part['scores'][:, 0].tolist())
    return asked, seen, weight.item()


def test_the_order_of_events():
    """B / M steps a pass, T passes a collection, every sample once a pass, anew shuffled; the
    step is lr times the gradient of the minibatch's mean: here 0.5 each."""
    asked, seen, weight = run_and_record(G=6, N=5, passes=3, batch_size=10)
    assert asked == [0, 1] and [len(rows) for rows in seen] == [2] * 18
    for k in (0, 1):
        passes = [sum(seen[9 * k + 3 * t:9 * k + 3 * t + 3], []) for t in range(3)]
        assert all(sorted(rows) == [100 * k + g for g in range(6)] for rows in passes)
        assert passes[0] != passes[1] or passes[1] != passes[2]
    assert weight == pytest.approx(-9.0)


def test_a_collection_is_made_by_the_policy_as_it_is():
    """The second collection comes after the first one's steps, not before."""
    table = Table(0, peaked(70), L=2, N=10)
    moved = []

    def collect(k):
        moved.append((table.logprobs().detach() - table.ref).abs().max().item())
        return table.collect(20, k)
    sgd = torch.optim.SGD(table.logits.parameters(), lr=1.0)
    for _ in train(table.logits, table.logprobs_of, collect, best_of_n_loss, sgd, 1.0, 0, 2, 1, 20):
        pass
    assert moved[0] < 1e-12 and moved[1] > 0.01


def test_a_minibatch_without_a_pair_moves_nothing():
    """All scores alike: no pair is ranked, the loss is 0 and no number is nan."""
    table = Table(0, torch.zeros(100, dtype=torch.float64), L=1, N=10)
    sgd = torch.optim.SGD(table.logits.parameters(), lr=1.0)
    list(train(table.logits, table.logprobs_of, lambda k: table.collect(20, k),
               partial(dpo_pairs_loss, beta=0.1), sgd, 1.0, 0, 1, 1, 20))
    assert (table.logprobs() - table.ref).abs().max() < 1e-12
