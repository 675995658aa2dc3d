"""
One algorithm and its losses: what PPO, DPO and imitation share, and the three axes they part on.

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

REINFORCE's gradient is right for the policy's own samples alone, hence no reuse. PPO and the losses
of pairs are train_ppo.py's and train_dpo.py's own. log pi(y) is a sum over tokens, EOS included.

A minibatch is a dict of tensors: scores (G, N), and old_logprobs, ref_logprobs, advantages
(G, N, T): G prompts, N responses to each, T tokens. Outside a response all three are 0, as are the
logprobs, so that sums over T need no mask. Given pairs are groups of 2 whose scores are 1 and 0.
What it does not do: decide what is sampled and scored. bandit.py and kl_race.py train the Table
below, whose mean reward and KL are exact sums; length.py trains a GPT.
"""
from functools import partial

import torch

from prefgpt import optimizer_step, rng
from train_dpo import dpo_loss, ipo_loss
from train_ppo import policy_loss


# ----------------------------------------------------------------------------- the losses

def reinforce_loss(logprobs, batch):
    """(G, N): - sum over tokens of A_t log pi(y_t), Williams 1992."""
    return -(batch['advantages'] * logprobs).sum(-1)


def ppo_loss(logprobs, batch, clip_eps=0.2):
    """(G, N): train_ppo's clipped loss, summed over tokens; outside a response A is 0."""
    loss, _ = policy_loss(logprobs, batch['old_logprobs'], batch['advantages'], clip_eps)
    return loss.sum(-1)


def rwr_loss(logprobs, batch, beta):
    """
    (G, N): - w log pi(y), w = exp(r / beta) over its mean in the minibatch, Peters and Schaal 2007.

    Over the mean, for exp(r / beta) alone may be 1e4 or 1e-4, and the learning rate with it.
    """
    scores = batch['scores']
    weights = (scores / beta).flatten().softmax(0).view_as(scores) * scores.numel()
    return -weights * logprobs.sum(-1)


def best_of_n_loss(logprobs, batch):
    """(G,): - log pi of the response with the highest score of its group."""
    best = batch['scores'].argmax(1, keepdim=True)                              # (G, 1)
    return -logprobs.sum(-1).gather(1, best).squeeze(1)


def pref_ft_loss(logprobs, batch):
    """(G,): - log pi(chosen): of a pair, whose scores are its labels, the best of 2."""
    return best_of_n_loss(logprobs, batch)


def binary_feedme_loss(logprobs, batch, bar):
    """(G, N): - log pi(y) of responses that score above the bar, all alike; 0 of the others."""
    return -(batch['scores'] > bar).to(logprobs) * logprobs.sum(-1)


def ranked_pairs(scores, threshold=0.0):
    """All pairs of a group whose scores (G, N) differ by more: (group, chosen, rejected), (P,)."""
    ahead = scores[:, :, None] - scores[:, None, :] > threshold                 # (G, N, N)
    return ahead.nonzero(as_tuple=True)


def pair_logprobs(logprobs, batch, threshold):
    """seq_logprobs of all pairs: chosen, rejected, and both under the reference, (P,) each."""
    group, chosen, rejected = ranked_pairs(batch['scores'], threshold)
    now, ref = logprobs.sum(-1), batch['ref_logprobs'].sum(-1)                  # (G, N)
    return now[group, chosen], now[group, rejected], ref[group, chosen], ref[group, rejected]


def dpo_pairs_loss(logprobs, batch, beta, threshold=0.0):
    """(P,): train_dpo's DPO loss of every pair within a group."""
    return dpo_loss(*pair_logprobs(logprobs, batch, threshold), beta)


def ipo_pairs_loss(logprobs, batch, beta, threshold=0.0):
    """(P,): train_dpo's IPO loss of every pair within a group."""
    return ipo_loss(*pair_logprobs(logprobs, batch, threshold), beta)


# ----------------------------------------------------------------------------- the algorithm

def train(policy, logprobs_of, collect, loss, optimizer, lr, seed, collections, passes,
          batch_size, grad_clip=float('inf')):
    """
    The algorithm. Yields after every gradient step the minibatch, with its logprobs before it.

    collect(k) returns collection k, a dict of tensors (G, N, ...), B = G N responses;
    logprobs_of(minibatch) their logprobs (G, N, T) under the policy as it is; loss(logprobs,
    minibatch) is one of the above. passes is the paper's T, batch_size its M, in responses.
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


# ----------------------------------------------------------------------------- a policy to train

def reference(actions=100):
    """Probabilities of equal bins of tanh(y) on [-1, 1], y Cauchy at -0.7 with scale 0.4."""
    edges = torch.atanh(torch.linspace(-1, 1, actions + 1, dtype=torch.float64))    # -inf to inf
    return (0.5 + torch.atan((edges + 0.7) / 0.4) / torch.pi).diff()


def peaked(center, actions=100):
    """A reward for each action, exp(-((action - center) / 10)^2)."""
    return torch.exp(-((torch.arange(actions, dtype=torch.float64) - center) / 10) ** 2)


def best_of_n(probs, reward, n):
    """
    Probabilities of the best of n samples: where imitating it ends, however long it takes.

    P(the best is no better than r) = P(reward <= r)^n; actions of equal reward share theirs.
    """
    no_better = torch.stack([probs[reward <= r].sum() for r in reward])
    worse = torch.stack([probs[reward < r].sum() for r in reward])
    return (no_better ** n - worse ** n) * probs / (no_better - worse)


def optimum(probs, reward, beta):
    """ref exp(r / beta) / Z, (actions,): the most reward there is at its KL."""
    return (probs.log() + reward / beta).softmax(0)


class Table:
    """
    L independent choices: a table of logits (L, actions), its reference, and what it samples.

    reward (actions,) is that of a choice; a response's score is its mean over the L choices.
    """

    def __init__(self, seed, reward, L, N):
        self.seed, self.reward, self.N = seed, reward, N
        self.ref = reference().log().repeat(L, 1)                       # (L, actions)
        self.logits = torch.nn.ParameterList([self.ref.clone()])
        self.count = self.total = self.squares = 0.0        # of all scores so far
        self.collected, self.kl_collect = self.ref, 0.0

    def logprobs(self):
        """log pi of every action, (L, actions)."""
        return self.logits[0].log_softmax(1)

    def logprobs_of(self, batch):
        """log pi of responses (G, N, L), choice by choice."""
        return self.gather(self.logprobs(), batch['responses'])

    def gather(self, table, responses):
        return table[torch.arange(len(table)), responses]

    @torch.no_grad()
    def collect(self, B, k):
        """B responses of the policy as it is, in groups of N, with all that a loss asks for."""
        self.note_kl_collect()
        self.collected = table = self.logprobs()
        responses = torch.multinomial(table.exp(), B, replacement=True,
                                      generator=rng(self.seed, k, 'rollout'))   # (L, B)
        responses = responses.T.reshape(B // self.N, self.N, len(table))        # (G, N, L)
        scores = self.reward[responses].mean(-1)                                # (G, N)
        # The baseline is the mean of all scores so far, the scale their standard deviation
        self.count += B
        self.total += scores.sum().item()
        self.squares += (scores ** 2).sum().item()
        mean = self.total / self.count
        std = (self.squares / self.count - mean ** 2 + 1e-8) ** 0.5
        return {'responses': responses, 'scores': scores,
                'advantages': ((scores - mean) / std)[..., None].expand(responses.shape),
                'old_logprobs': self.gather(table, responses),
                'ref_logprobs': self.gather(self.ref, responses)}

    @torch.no_grad()
    def note_kl_collect(self):
        """Keeps the most nats that the policy has moved from the one that sampled."""
        table = self.logprobs()
        moved = (table.exp() * (table - self.collected)).sum().item()
        self.kl_collect = max(self.kl_collect, moved)

    @torch.no_grad()
    def measure(self):
        """Exact numbers: mean reward; KL to the reference and entropy, summed over choices."""
        self.note_kl_collect()
        table = self.logprobs()
        return {'reward': (table.exp() * self.reward).sum(1).mean().item(),
                'kl': (table.exp() * (table - self.ref)).sum().item(),
                'kl_collect': self.kl_collect, 'entropy': -(table.exp() * table).sum().item()}

    @torch.no_grad()
    def log_ratios(self, batch):
        """Mean log pi / ref of a batch's best responses, group by group, and of its worst ones."""
        ratios = (self.logprobs_of(batch) - batch['ref_logprobs']).sum(-1)      # (G, N)
        best, worst = batch['scores'].argmax(1), batch['scores'].argmin(1)
        groups = torch.arange(len(best))
        return {'chosen': ratios[groups, best].mean().item(),
                'rejected': ratios[groups, worst].mean().item()}


def train_table(table, loss, lr, samples, B, M, T):
    """The algorithm on a table by plain descent: samples / B collections; yields every step."""
    sgd = torch.optim.SGD(table.logits.parameters(), lr=lr)
    return train(table.logits, table.logprobs_of, partial(table.collect, B), loss, sgd, lr,
                 table.seed, collections=samples // B, passes=T, batch_size=M)
