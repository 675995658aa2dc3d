"""
Two policies that studies/unified.py can train: a table of logits, and a GPT.

Each samples collections, and gives all that a loss may ask for on one grid, (G, N, T): G prompts,
N responses to each, T tokens, or choices. bandit.py and length.py choose the losses.
"""
import statistics
from functools import partial

import torch

import train_ppo
from data.text import decode_responses, load_text
from prefgpt import (GPT, adamw, generate, load_checkpoint, load_model, make_batch, rng,
                     token_logprobs, x_and_y)
from studies.unified import train
from train_ppo import cap_unfinished, gae, load_scorer, token_rewards, whiten


# ----------------------------------------------------------------------------- a table

def reference(actions=100):
    """Returns the probabilities of equal bins of tanh(y), y Cauchy at -0.7 with scale 0.4."""
    edges = torch.atanh(torch.linspace(-1, 1, actions + 1, dtype=torch.float64))    # -inf to inf
    return (0.5 + torch.atan((edges + 0.7) / 0.4) / torch.pi).diff()


def peaked(center, actions=100):
    """Returns a reward for each action, exp(-((action - center) / 10)^2)."""
    return torch.exp(-((torch.arange(actions, dtype=torch.float64) - center) / 10) ** 2)


def best_of_n(probs, reward, n):
    """
    Returns the probabilities of the best of n samples: where imitating it ends.

    P(the best is no better than r) = P(reward <= r)^n; actions of equal reward share theirs.
    """
    no_better = torch.stack([probs[reward <= r].sum() for r in reward])
    worse = torch.stack([probs[reward < r].sum() for r in reward])
    return (no_better ** n - worse ** n) * probs / (no_better - worse)


def optimum(probs, reward, beta):
    """Returns ref exp(r / beta) / Z, (actions,): the most reward there is at its KL."""
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
        """Returns log pi of every action, (L, actions)."""
        return self.logits[0].log_softmax(1)

    def logprobs_of(self, batch):
        """Returns log pi of responses (G, N, L), choice by choice."""
        return self.gather(self.logprobs(), batch['responses'])

    def gather(self, table, responses):
        return table[torch.arange(len(table)), responses]

    @torch.no_grad()
    def collect(self, B, k):
        """Samples B responses of the policy as it is, in groups of N, with all a loss asks for."""
        self.note_kl_collect()
        self.collected = table = self.logprobs()
        responses = torch.multinomial(table.exp(), B, replacement=True,
                                      generator=rng(self.seed, k, 'rollout'))   # (L, B)
        responses = responses.T.reshape(B // self.N, self.N, len(table))        # (G, N, L)
        scores = self.reward[responses].mean(-1)                                # (G, N)
        # The baseline is the mean of all scores so far, as in the authors' code; it lags behind a
        # policy that gets better. The collection's own mean, as in train_ppo, does not
        self.count += B
        self.total += scores.sum().item()
        self.squares += (scores ** 2).sum().item()
        mean = self.total / self.count
        std = (self.squares / self.count - mean ** 2 + 1e-8) ** 0.5
        return {'responses': responses, 'scores': scores,
                'advantages': ((scores - mean) / std)[..., None].expand(responses.shape),
                'whitened': ((scores - scores.mean()) / (scores.std(correction=0) + 1e-8)
                             )[..., None].expand(responses.shape),
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
        """Returns exact numbers: mean reward; KL and entropy, summed over choices."""
        self.note_kl_collect()
        table = self.logprobs()
        return {'reward': (table.exp() * self.reward).sum(1).mean().item(),
                'kl': (table.exp() * (table - self.ref)).sum().item(),
                'kl_collect': self.kl_collect, 'entropy': -(table.exp() * table).sum().item()}

    @torch.no_grad()
    def log_ratios(self, batch):
        """Returns the mean log pi / ref of the groups' best responses, and of their worst."""
        ratios = (self.logprobs_of(batch) - batch['ref_logprobs']).sum(-1)      # (G, N)
        best, worst = batch['scores'].argmax(1), batch['scores'].argmin(1)
        groups = torch.arange(len(best))
        return {'chosen': ratios[groups, best].mean().item(),
                'rejected': ratios[groups, worst].mean().item()}


def train_table(table, loss, lr, samples, B, M, T):
    """Trains a table by plain descent on samples / B collections; yields every step."""
    sgd = torch.optim.SGD(table.logits.parameters(), lr=lr)
    return train(table.logits, table.logprobs_of, partial(table.collect, B), loss, sgd, lr,
                 table.seed, collections=samples // B, passes=T, batch_size=M)


# ----------------------------------------------------------------------------- a GPT

class Gpt:
    """
    A GPT from an SFT run, its reference, which is the same at the start, and what it samples.

    score is a reward model's run folder; beta weighs the KL in REINFORCE's and PPO's rewards.
    """

    def __init__(self, seed, sft, reward_model, prompts, most, N, beta):
        saved = load_checkpoint(sft, ['sft'])
        self.policy, self.ref, self.collected = (
            load_model(GPT, saved, 'policy', 'cpu') for _ in range(3))
        self.tokenizer, _ = load_text(saved['config']['data'], saved)
        self.scorer, _ = load_scorer(reward_model, saved, 'cpu')
        self.seed, self.prompts, self.most, self.N, self.beta = seed, prompts, most, N, beta

    def logprobs_of(self, batch, policy=None):
        """Returns (G, N, T), of a batch's responses, under the policy as it is, or another one."""
        tokens, mask = batch['tokens'].flatten(0, 1), batch['response_mask'].flatten(0, 1)
        logprobs = token_logprobs(policy or self.policy, *x_and_y(tokens), mask)
        return logprobs.unflatten(0, batch['scores'].shape)

    @torch.no_grad()
    def grouped(self, tokens, response_mask, scores, N):
        """Returns all that a loss asks for, (G, N, ...)."""
        batch = {name: value.unflatten(0, (-1, N)) for name, value in (
            ('tokens', tokens), ('response_mask', response_mask), ('scores', scores))}
        old, ref = self.logprobs_of(batch), self.logprobs_of(batch, self.ref)   # (G, N, T)
        rewards = token_rewards(scores, old.flatten(0, 1), ref.flatten(0, 1), response_mask,
                                self.beta)                                      # (B, T)
        to_come, _ = gae(rewards, torch.zeros_like(rewards), response_mask, 1.0, 1.0)
        return {**batch, 'old_logprobs': old, 'ref_logprobs': ref,
                'advantages': whiten(to_come, response_mask).view_as(old)}

    def given(self, pairs, k=0):
        """Returns pairs as one collection: groups of 2 whose scores, 1 and 0, are the labels."""
        tokens, _, _, response_mask = make_batch(
            [(prompt, response) for prompt, *both in pairs for response in both])
        return self.grouped(tokens, response_mask, torch.tensor([1.0, 0.0]).repeat(len(pairs)), 2)

    @torch.no_grad()
    def sample(self, prompts, generator):
        """Samples a response per prompt: tokens, response_mask, scores (B,), and texts."""
        tokens, response_mask = generate(self.policy, prompts, self.most, self.tokenizer.eot_token,
                                         generator=generator)
        texts, ended = decode_responses(tokens, response_mask, self.tokenizer)
        scores = self.scorer(tokens, response_mask, None, texts)
        scores = cap_unfinished(scores, ended, train_ppo.Config.no_eos_score)
        return tokens, response_mask, scores, texts

    def collect(self, B, k):
        """Samples B responses of the policy as it is, N per prompt, and their scores."""
        self.collected.load_state_dict(self.policy.state_dict())
        drawn = torch.randint(len(self.prompts), (B // self.N,),
                              generator=rng(self.seed, k, 'batch'))
        prompts = [self.prompts[i] for i in drawn.tolist() for _ in range(self.N)]
        tokens, response_mask, scores, _ = self.sample(prompts, rng(self.seed, k, 'rollout'))
        return self.grouped(tokens, response_mask, scores, self.N)

    @torch.no_grad()
    def measure(self, judge, prompts, pairs):
        """
        Returns numbers on held-out prompts and pairs. kl is to the reference, kl_collect to what
        sampled last, summed over a response; entropy is per token; chosen and rejected are
        seq_logprobs, and margin is beta times the difference of their log-ratios.
        """
        tokens, response_mask, scores, texts = self.sample(prompts, rng(self.seed, 0, 'eval'))
        batch, given = self.grouped(tokens, response_mask, scores, 1), self.given(pairs)
        now, (ours, refs) = batch['old_logprobs'], (
            given[name].sum(-1).mean(0) for name in ('old_logprobs', 'ref_logprobs'))   # (2,) each
        golds = [judge(self.tokenizer.decode(p), text) for p, text in zip(prompts, texts)]
        return {'gold': statistics.fmean(golds), 'score': scores.mean().item(),
                'kl': (now - batch['ref_logprobs']).sum(-1).mean().item(),
                'kl_collect': (now - self.logprobs_of(batch, self.collected)).sum(-1).mean().item(),
                'entropy': (-now.sum() / response_mask.sum()).item(),
                'length': response_mask.sum(1).float().mean().item(),
                'chosen': ours[0].item(), 'rejected': ours[1].item(),
                'margin': self.beta * ((ours[0] - refs[0]) - (ours[1] - refs[1])).item()}


def train_gpt(gpt, loss, lr, size, T, pairs=None):
    """
    Trains a GPT with AdamW; pairs are the one collection of an offline method. Returns
    the mean share of ratios to the collecting policy that are off 1 by more than 0.2, PPO's clip.
    """
    collect = partial(gpt.collect, size['B']) if pairs is None else partial(gpt.given, pairs)
    clipped = []
    for part in train(gpt.policy, gpt.logprobs_of, collect, loss, adamw(gpt.policy, 0.0), lr,
                      gpt.seed, collections=size['collections'] if pairs is None else 1, passes=T,
                      batch_size=size['M'], grad_clip=1.0):
        ratio = torch.exp(part['logprobs'] - part['old_logprobs'])[part['response_mask']]
        clipped.append(((ratio - 1).abs() > 0.2).float().mean().item())
    return statistics.fmean(clipped)
