"""
studies/unified.py: every loss against a loop, the exact identities, and the algorithm's order of
events.

    python -m pytest -q tests/studies/test_unified.py
"""
import itertools, math
from functools import partial

import pytest
import torch

from studies import unified
from studies.bandit import Table
from studies.unified import (best_of_n_loss, binary_feedme_loss, dpo_pairs_loss, ipo_pairs_loss,
                             ppo_loss, pref_ft_loss, reinforce_loss, rwr_loss, train)


def random_batch(seed=0, G=3, N=4, T=5):
    """logprobs (G, N, T) and a minibatch without structure; half the responses are shorter."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (G, N, 1), generator=generator)
    mask = torch.arange(T) < lengths

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    logprobs, old, ref = -draw(3, G, N, T).abs() * mask
    return logprobs, {'scores': draw(G, N), 'advantages': draw(G, N, T) * mask,
                      'old_logprobs': old, 'ref_logprobs': ref, 'mask': mask}


@pytest.mark.parametrize('seed, threshold', [(0, 0.3), (1, 0.3), (2, 0.0)])
def test_losses_by_loops(seed, threshold):
    """All losses again, response by response and pair by pair, on ragged random minibatches. A pair
    is of one group, once, and a tie is none."""
    logprobs, batch = random_batch(seed)
    batch['scores'][0, 1] = batch['scores'][0, 2]
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
             if scores[g, w] - scores[g, l] > threshold]
    dpo, ipo = (loss(logprobs, batch, beta=0.2, threshold=threshold)
                for loss in (dpo_pairs_loss, ipo_pairs_loss))
    pref_ft = pref_ft_loss(logprobs, batch, threshold)
    assert len(dpo) == len(ipo) == len(pref_ft) == len(pairs) > 0
    for i, (g, w, l) in enumerate(pairs):
        h = now[g, w] - ref[g, w] - now[g, l] + ref[g, l]
        assert abs(dpo[i] - math.log(1 + math.exp(-0.2 * h))) < 1e-10
        assert abs(ipo[i] - (h - 2.5) ** 2) < 1e-10 and pref_ft[i] == -now[g, w]


@pytest.mark.parametrize('seed', range(3))
def test_padding_changes_no_loss(seed):
    """What stands for padding, 0 everywhere, adds to no sum and has no gradient."""
    logprobs, batch = random_batch(seed)
    wider = {name: torch.nn.functional.pad(value, (0, 3)) if value.dim() == 3 else value
             for name, value in batch.items()}
    for loss in NEGATIVE.values():
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


def exact(seed, actions=6):
    """A policy's logits, with gradient, a reference and scores of all its responses."""
    generator = torch.Generator().manual_seed(seed)
    logits, ref, scores = torch.randn(3, actions, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), ref.log_softmax(0), scores


@pytest.mark.parametrize('seed', range(5))
def test_ppo_begins_as_reinforce(seed):
    """With one pass over one minibatch the ratio is 1: the gradients are the same, clip or not."""
    _, batch = random_batch(seed)
    logprobs = batch['old_logprobs'].clone().requires_grad_()
    ppo, plain = (torch.autograd.grad(loss(logprobs, batch).mean(), logprobs)[0]
                  for loss in (ppo_loss, reinforce_loss))
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


def test_the_order_of_events():
    """B / M steps a pass, T passes a collection, every sample once a pass, anew shuffled; the step
    is lr times the gradient of the minibatch's mean: here 0.5 each. The second collection comes
    after the first one's nine steps, not before."""
    weight, weights, seen = torch.nn.Parameter(torch.tensor([0.0])), [], []

    def collect(k):
        weights.append(weight.item())
        return {'scores': torch.tensor([[100. * k + g] * 5 for g in range(6)])}

    for part in train(torch.nn.ParameterList([weight]),
                      lambda part: weight * torch.ones_like(part['scores'])[..., None], collect,
                      lambda logprobs, part: logprobs.sum(-1), torch.optim.SGD([weight], lr=1.0),
                      0.5, seed=0, collections=2, passes=3, batch_size=10):
        seen.append(part['scores'][:, 0].tolist())
    assert [*weights, weight.item()] == pytest.approx([0, -4.5, -9])
    assert [len(rows) for rows in seen] == [2] * 18
    for k in (0, 1):
        passes = [sum(seen[9 * k + 3 * t:9 * k + 3 * t + 3], []) for t in range(3)]
        assert all(sorted(rows) == [100 * k + g for g in range(6)] for rows in passes)
        assert passes[0] != passes[1] or passes[1] != passes[2]


def test_a_minibatch_without_a_pair_moves_nothing():
    """All scores alike: no pair is ranked, the loss is 0 and no number is nan."""
    table = Table(0, torch.zeros(100, dtype=torch.float64), L=1)
    sgd = torch.optim.SGD(table.logits.parameters(), lr=1.0)
    list(train(table.logits, table.logprobs_of, lambda k: table.collect(20, k),
               partial(dpo_pairs_loss, beta=0.1), sgd, 1.0, 0, 1, 1, 20))
    assert (table.logprobs() - table.ref).abs().max() < 1e-12
