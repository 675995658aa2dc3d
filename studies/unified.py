"""
One algorithm and its losses: what PPO, DPO and imitation share, and three axes where they differ.

Tajwar et al. 2024, "Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data":

    repeat:  1. B / N prompts, N responses to each: by the policy as it is (on-policy), or given
             2. scores of them; from the scores advantages, ranks or weights
             3. minibatches of M responses, and over them T passes:
                    theta <- theta - lr * gradient of the loss's mean over the minibatch

So B / M * T steps lie between two collections. The data are staler the larger B or T is; only
T > 1 uses a sample twice. Offline is one collection, made before the first step. A loss has a
negative gradient if it pushes some response down. The methods by these three axes:

    method           loss of a response, pair or group              on-policy  reuse  negative
    REINFORCE        - sum_t A_t log pi(y_t)                           yes       no      yes
    PPO              sum_t max(-A_t ratio_t, -A_t clip(ratio_t))       yes       yes     yes
    RWR              - exp(r / beta) / mean * log pi(y)                yes       yes     no
    Best-of-N        - log pi(the best of N)                           yes       yes     no
    on-policy DPO    - log sigmoid(beta h), pairs of the N             yes       yes     yes
    on-policy IPO    (h - 1 / (2 beta))^2, pairs of the N              yes       yes     yes
    DPO, IPO         the same of given pairs                           no        yes     yes
    Pref-FT          - log pi(chosen)                                  no        yes     no
    Binary FeedMe    - log pi(y) if r > bar, else 0                    no        yes     no

REINFORCE's gradient is correct only for the current policy's samples, hence no reuse. A minibatch
is a dict of tensors: scores (G, N), and old_logprobs, ref_logprobs, advantages (G, N, T): G
prompts, N responses to each, T tokens. Outside a response all three are 0, as are the logprobs, so
that sums over T, which include EOS, need no mask. Given pairs are groups of 2 with scores 1 and 0.
"""
import torch

from prefgpt import optimizer_step, rng
from train_dpo import dpo_loss, ipo_loss
from train_ppo import policy_loss


def reinforce_loss(logprobs, batch):
    """Returns (G, N): - sum over tokens of A_t log pi(y_t), Williams 1992."""
    return -(batch['advantages'] * logprobs).sum(-1)


def ppo_loss(logprobs, batch, clip_eps=0.2):
    """Returns (G, N): train_ppo's clipped loss, summed; outside a response A is 0."""
    loss, _ = policy_loss(logprobs, batch['old_logprobs'], batch['advantages'], clip_eps)
    return loss.sum(-1)


def rwr_loss(logprobs, batch, beta):
    """Returns (G, N): - w log pi(y), w = exp(r / beta) over its mean, Peters and Schaal 2007."""
    scores = batch['scores']
    weights = (scores / beta).flatten().softmax(0).view_as(scores) * scores.numel()
    return -weights * logprobs.sum(-1)


def best_of_n_loss(logprobs, batch):
    """Returns (G,): - log pi of the response with the highest score of its group."""
    best = batch['scores'].argmax(1, keepdim=True)                              # (G, 1)
    return -logprobs.sum(-1).gather(1, best).squeeze(1)


def binary_feedme_loss(logprobs, batch, bar):
    """Returns (G, N): - log pi(y) of responses that score above the bar; 0 of the others."""
    return -(batch['scores'] > bar).to(logprobs) * logprobs.sum(-1)


def ranked_logprobs(logprobs, batch, threshold):
    """Returns all pairs' seq_logprobs (P,): chosen, rejected, both under the reference."""
    ahead = batch['scores'][:, :, None] - batch['scores'][:, None, :]           # (G, N, N)
    group, chosen, rejected = (ahead > threshold).nonzero(as_tuple=True)
    now, ref = logprobs.sum(-1), batch['ref_logprobs'].sum(-1)                  # (G, N)
    return now[group, chosen], now[group, rejected], ref[group, chosen], ref[group, rejected]


def pref_ft_loss(logprobs, batch, threshold=0.0):
    """Returns (P,): - log pi(chosen) of every pair in a group: DPO's, without the push down."""
    return -ranked_logprobs(logprobs, batch, threshold)[0]


def dpo_pairs_loss(logprobs, batch, beta, threshold=0.0):
    """Returns (P,): train_dpo's DPO loss of every pair within a group."""
    return dpo_loss(*ranked_logprobs(logprobs, batch, threshold), beta)


def ipo_pairs_loss(logprobs, batch, beta, threshold=0.0):
    """Returns (P,): train_dpo's IPO loss of every pair within a group."""
    return ipo_loss(*ranked_logprobs(logprobs, batch, threshold), beta)


def train(policy, logprobs_of, collect, loss, optimizer, lr, seed, collections, passes,
          batch_size, grad_clip=float('inf')):
    """
    Runs the algorithm; yields after every gradient step the minibatch, with its logprobs before.

    collect(k) returns collection k, a dict of tensors (G, N, ...); logprobs_of(minibatch) the
    logprobs (G, N, T) of the policy as it is. passes is the paper's T, batch_size its M.
    """
    for k in range(collections):
        batch = collect(k)                                                      # 1. and 2.
        G, N = batch['scores'].shape
        for t in range(passes):
            order = torch.randperm(G, generator=rng(seed, k * passes + t, 'shuffle'))
            for rows in order.split(max(1, batch_size // N)):                   # 3.
                part = {name: value[rows] for name, value in batch.items()}
                logprobs = logprobs_of(part)                                    # (G, N, T)
                losses = loss(logprobs, part)
                mean = losses.sum() / max(1, losses.numel())    # a threshold may leave no pair
                mean.backward()
                optimizer_step(optimizer, policy, lr, grad_clip, k + 1, loss=mean.item())
                yield {**part, 'logprobs': logprobs.detach()}
