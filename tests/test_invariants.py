"""
Checks what holds on average over a distribution, by adding up all of it instead of sampling.

There are five words, and responses have one token: an expectation is a sum of five terms, exact to
rounding.
"""
import pytest
import torch

from prefgpt import GPTConfig, make_batch, token_logprobs
from train_ppo import policy_loss, token_rewards

V, BETA = 5, 0.3


class OneStep:
    """A fake model with the same logits (V,) everywhere."""
    config = GPTConfig(vocab_size=V)

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.scores = torch.randn(V, generator=generator, dtype=torch.double).requires_grad_()

    def __call__(self, tokens):
        return tokens[..., None]

    def logits(self, hidden):
        return self.scores.expand(len(hidden), V)


def exact_kl(p, q):
    """Computes the KL of two models from their logits."""
    p, q = p.scores.log_softmax(0), q.scores.log_softmax(0)
    return (p.exp() * (p - q)).sum()


def gradient(loss, model):
    return torch.autograd.grad(loss, model.scores, retain_graph=True)[0]


@pytest.fixture
def both():
    """
    Returns policy and reference, which differ, their logprobs of all five responses to a prompt of
    one id, (5, 1), the policy's probabilities, fixed, and the mask.
    """
    policy, ref = OneStep(0), OneStep(1)
    _, x, y, mask = make_batch([([0], [word]) for word in range(V)])
    logprobs, ref_logprobs = (token_logprobs(model, x, y, mask) for model in (policy, ref))
    return policy, ref, logprobs, ref_logprobs.detach(), logprobs.exp().detach(), mask


def test_kl_estimators_by_enumeration(both):
    """I18: over the policy's own samples the means of k1 = logprobs - ref_logprobs and of
    k3 = r - 1 - log r, r = ref / policy, are KL(policy, ref). Catches the inverse ratio, whose mean
    is no KL; KL(ref, policy) is another number. Why the KL belongs in the reward: as a LOSS, k1 has
    a mean gradient of 0, and k3 that of KL(ref, policy), the other divergence."""
    policy, ref, logprobs, ref_logprobs, p, _ = both
    log_r = ref_logprobs - logprobs
    k1, k3 = -log_r, log_r.exp() - 1 - log_r
    kl, other = exact_kl(policy, ref), exact_kl(ref, policy)
    assert (p * k1).sum().item() == pytest.approx(kl.item(), abs=1e-12)
    assert (p * k3).sum().item() == pytest.approx(kl.item(), abs=1e-12)
    assert (k3 >= 0).all() and (k1 < 0).any() and abs(other - kl) > 1e-2

    slope = gradient((p * k1).sum(), policy)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12)
    slope = gradient((p * k3).sum(), policy)
    torch.testing.assert_close(slope, gradient(other, policy), rtol=0, atol=1e-12)
    assert (slope - gradient(kl, policy)).abs().max() > 0.01


def test_reward_is_the_score_less_beta_kl_on_average(both):
    """I18: the mean reward is the mean score - beta KL(policy, ref). Catches the sign of the KL
    term, and the term or its beta left out."""
    policy, ref, logprobs, ref_logprobs, p, mask = both
    scores = torch.tensor([2., -1., 0.5, 3., -2.], dtype=torch.double)
    rewards = token_rewards(scores, logprobs, ref_logprobs, mask, BETA)
    expected = (p[:, 0] * scores).sum() - BETA * exact_kl(policy, ref)
    assert (p * rewards).sum().item() == pytest.approx(expected.item(), abs=1e-12)


def test_kl_in_the_reward_pulls_to_the_reference(both):
    """I18: with no score, the mean gradient of PPO's loss is that of beta KL(policy, ref)."""
    policy, ref, logprobs, ref_logprobs, p, mask = both
    old = logprobs.detach()
    rewards = token_rewards(torch.zeros(V), old, ref_logprobs, mask, BETA)
    loss, _ = policy_loss(logprobs, old, rewards, 0.2)
    expected = gradient(BETA * exact_kl(policy, ref), policy)
    torch.testing.assert_close(gradient((p * loss).sum(), policy), expected, rtol=0, atol=1e-12)
    assert expected.abs().max() > 0.01
