"""
Min, Mode and Skew Length: the unified algorithm on a GPT, a learned reward and the true one.

Tajwar et al. 2024, section 5. studies/lengths.py has the language and the three tasks. A fourth,
Toy, is data/toy with its exact judge: the stand-in for AlpacaFarm and UltraFeedback.

Every method starts from train_sft's policy and learns from the pairs, or from the scores of
train_rm's reward model, which has learned from them (on Toy from more of the kind). REINFORCE and
PPO have the KL in their rewards, and no value model: A_t is the whitened sum of rewards from t on.
An order of two methods holds only if the mean gap, paired by seed, exceeds 2 standard errors.

    python -m studies.length
    Min: gold of DPO < on-policy DPO: in 5 of 5 seeds, by 5.45 ± 1.53: holds
"""
import itertools, statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import train_ppo, train_rm, train_sft
from data.judge import load_judge
from data.text import decode_responses, load_examples, load_text
from data.toy import prepare
from prefgpt import (GPT, UserError, adamw, generate, load_checkpoint, load_model, make_batch, rng,
                     run_cli, token_logprobs, x_and_y)
from studies.lengths import MOST, gold, write_data, write_pairs
from studies.style import COLORS, POINTS, frame, names, new_figure, show_picture
from studies.table import (SMOKE_TEST, by_seed, complete, grouped, mean_and_spread, show_means,
                           spreads_by, table_and_seeds)
from studies.unified import (best_of_n_loss, dpo_pairs_loss, ipo_pairs_loss, ppo_loss, pref_ft_loss,
                             reinforce_loss, rwr_loss, train)
from train_ppo import cap_unfinished, gae, load_scorer, token_rewards, whiten


@dataclass
class Config:
    seeds: str = '0 1 2 3 4'        # the seeds to run, or to complete
    tasks: str = 'Min Mode Skew'    # which of Min, Mode, Skew and Toy
    csv: str = 'out/studies/length.csv'     # the table for what studies/results/length.csv lacks
    results: bool = False           # add it to studies/results/length.csv, and draw its picture
    quick: bool = False             # a smoke test: one seed, few steps, a table of its own


BETA, N, LR = 0.1, 4, 3e-4          # weight of KL(policy, ref); responses to a prompt; for all
LENGTH = dict(sft=800, rm=600, pairs=2000, collections=100, B=64, M=64, samples=512, most=MOST,
              model=dict(n_head=2, n_embd=32, block_size=64, batch_size=32, max_new_tokens=MOST))
TOY = dict(sft=1250, rm=2000, pairs=4000, collections=60, B=128, M=64, samples=400, most=64,
           model={})
QUICK = dict(sft=2, rm=2, pairs=30, collections=1, B=16, M=16, samples=8, most=8)
# method -> its loss, passes T, and whether it is offline
DPO, IPO = (partial(loss, beta=BETA) for loss in (dpo_pairs_loss, ipo_pairs_loss))
METHODS = {
    'Pref-FT': (pref_ft_loss, 2, True), 'DPO': (DPO, 2, True), 'IPO': (IPO, 2, True),
    'on-policy Best-of-N': (best_of_n_loss, 1, False),
    'on-policy RWR': (partial(rwr_loss, beta=1.0), 1, False),
    'on-policy DPO': (DPO, 1, False), 'on-policy IPO': (IPO, 1, False),
    'REINFORCE': (reinforce_loss, 1, False), 'PPO': (ppo_loss, 4, False)}


class Gpt:
    """A GPT, its reference, the same at the start, and what it samples, on a grid (G, N, T)."""

    def __init__(self, seed, out, prompts, most):
        saved = load_checkpoint(f'{out}/sft', ['sft'])
        self.policy, self.ref, self.collected = (
            load_model(GPT, saved, 'policy', 'cpu') for _ in range(3))
        self.tokenizer, _ = load_text(f'{out}/data', saved)
        self.scorer, _ = load_scorer(f'{out}/rm', saved, 'cpu')
        self.seed, self.prompts, self.most = seed, prompts, most

    def logprobs_of(self, batch, policy=None):
        """Returns the responses' logprobs (G, N, T) under the policy as it is, or another one."""
        tokens, mask = batch['tokens'].flatten(0, 1), batch['response_mask'].flatten(0, 1)
        logprobs = token_logprobs(policy or self.policy, *x_and_y(tokens), mask)
        return logprobs.unflatten(0, batch['scores'].shape)

    @torch.no_grad()
    def grouped(self, tokens, response_mask, scores, N):
        """Returns all that a loss asks for, (G, N, ...)."""
        batch = {name: value.unflatten(0, (-1, N)) for name, value in (
            ('tokens', tokens), ('response_mask', response_mask), ('scores', scores))}
        old, ref = self.logprobs_of(batch), self.logprobs_of(batch, self.ref)   # (G, N, T)
        rewards = token_rewards(scores, old.flatten(0, 1), ref.flatten(0, 1), response_mask, BETA)
        to_come, _ = gae(rewards, torch.zeros_like(rewards), response_mask, 1.0, 1.0)
        return {**batch, 'old_logprobs': old, 'ref_logprobs': ref,
                'advantages': whiten(to_come, response_mask).view_as(old)}

    def given(self, pairs, k=0):
        """Returns pairs as one collection, groups of 2 with scores 1 and 0."""
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
        drawn = torch.randint(len(self.prompts), (B // N,), generator=rng(self.seed, k, 'batch'))
        prompts = [self.prompts[i] for i in drawn.tolist() for _ in range(N)]
        tokens, response_mask, scores, _ = self.sample(prompts, rng(self.seed, k, 'rollout'))
        return self.grouped(tokens, response_mask, scores, N)

    @torch.no_grad()
    def measure(self, judge, prompts, pairs):
        """
        Returns numbers on held-out prompts and pairs. kl is to the reference, kl_collect to what
        sampled last, summed over a response; entropy is per token; chosen, rejected: seq_logprobs.
        """
        tokens, response_mask, scores, texts = self.sample(prompts, rng(self.seed, 0, 'eval'))
        batch, given = self.grouped(tokens, response_mask, scores, 1), self.given(pairs)
        now = batch['old_logprobs']                                             # (G, 1, T)
        ours, refs = (given[f'{name}_logprobs'].sum(-1).mean(0) for name in ('old', 'ref'))  # (2,)
        golds = [judge(self.tokenizer.decode(p), text) for p, text in zip(prompts, texts)]
        return {'gold': statistics.fmean(golds), 'score': scores.mean().item(),
                'kl': (now - batch['ref_logprobs']).sum(-1).mean().item(),
                'kl_collect': (now - self.logprobs_of(batch, self.collected)).sum(-1).mean().item(),
                'entropy': (-now.sum() / response_mask.sum()).item(),
                'length': response_mask.sum(1).float().mean().item(),
                'chosen': ours[0].item(), 'rejected': ours[1].item(),
                'margin': BETA * ((ours[0] - refs[0]) - (ours[1] - refs[1])).item()}


def train_gpt(gpt, loss, lr, size, T, pairs=None):
    """Trains a GPT, on pairs if offline; returns the mean share of ratios that PPO would clip."""
    collections, collect, clipped = size['collections'], partial(gpt.collect, size['B']), []
    if pairs is not None:
        collections, collect = 1, partial(gpt.given, pairs)
    optimizer = adamw(gpt.policy, 0.0, eps=1e-5)            # as in PPO, for all methods alike
    for part in train(gpt.policy, gpt.logprobs_of, collect, loss, optimizer, lr, gpt.seed,
                      collections, T, size['M'], grad_clip=1.0):
        ratio = torch.exp(part['logprobs'] - part['old_logprobs'])[part['response_mask']]
        clipped.append(((ratio - 1).abs() > 0.2).float().mean().item())
    return statistics.fmean(clipped)


def first_stages(seed, task, size, out):
    """Makes data, SFT and reward model; returns the gold function, the mode and rm's accuracy."""
    data, common = f'{out}/data', dict(seed=seed, resume=True, eval_every=9999, device='cpu')
    if task == 'Toy':
        prepare.main(prepare.Config(seed=seed, out=data))
        judge, mode = load_judge('data/toy/reward.py'), ''
    else:
        write_data(Path(data), seed)
    train_sft.main(train_sft.Config(data=data, out=f'{out}/sft', steps=size['sft'],
                                    **size['model'], **common))
    saved = load_checkpoint(f'{out}/sft', ['sft'])
    if task != 'Toy':
        mode = write_pairs(Path(data), seed, task, load_model(GPT, saved, 'policy', 'cpu'),
                           load_text(data, saved)[0],
                           {'train': size['pairs'], 'val': size['pairs'] // 10})
    rm = train_rm.main(train_rm.Config(data=data, init=f'{out}/sft', out=f'{out}/rm',
                                       steps=size['rm'], **common))
    return (lambda prompt, response: judge(prompt, response)['reward'] if task == 'Toy'
            else gold(task, response, mode)), mode, rm['accuracy']


def run_task(seed, task, quick):
    """Returns a seed's rows of a task: the reference, then every method."""
    size = (TOY if task == 'Toy' else LENGTH) | (QUICK if quick else {})
    out = f"out/{'quick-' if quick else ''}length-{seed}/{task.lower()}"
    judge, mode, rm_accuracy = first_stages(seed, task, size, out)
    saved = load_checkpoint(f'{out}/sft', ['sft'])
    given = (*load_text(f'{out}/data', saved), saved['model']['block_size'])
    pairs, held_out = load_examples(f'{out}/data', 'pairs', *given)
    prompts, val = ([prompt for prompt, in rows] for rows in load_examples(
        f'{out}/data', 'prompts', *given, size['most']))
    val, rows = list(itertools.islice(itertools.cycle(val), size['samples'])), []
    for method in ('reference', *METHODS):
        gpt, T, clip_frac = Gpt(seed, out, prompts, size['most']), 0, 0.0
        if method in METHODS:
            loss, T, offline = METHODS[method]
            clip_frac = train_gpt(gpt, loss, LR, size, T,
                                  pairs[:size['pairs']] if offline else None)
        rows.append({'seed': seed, 'task': task, 'method': method, 'T': T, 'lr': f'{LR:g}',
                     **gpt.measure(judge, val, held_out[:200]), 'clip_frac': clip_frac,
                     'mode': mode, 'rm_accuracy': rm_accuracy, 'threads': torch.get_num_threads(),
                     'command': f'python -m studies.length --tasks={task} --seeds={seed}'})
        print(f"{task} {method}: gold {rows[-1]['gold']:.2f}, kl {rows[-1]['kl']:.2f}", flush=True)
    return rows


# task -> orders of gold, from low to high. On Mode all means lie within ALIKE letters
ALIKE = 1.7
AHEAD = [('DPO', 'PPO'), ('DPO', 'REINFORCE'), ('DPO', 'on-policy Best-of-N')]
CHAINS = {
    'Min': [('reference', 'Pref-FT', 'DPO', 'on-policy DPO'), *AHEAD,
            ('Pref-FT', 'IPO', 'on-policy IPO')], 'Mode': [],
    'Skew': [('Pref-FT', 'reference', 'DPO', 'on-policy DPO'), *AHEAD,
             ('reference', 'IPO', 'on-policy IPO')],
    'Toy': [('reference', 'Pref-FT', 'DPO', 'on-policy DPO'), ('DPO', 'PPO'),
            ('Pref-FT', 'IPO', 'on-policy IPO')]}


def check(rows):
    """Prints for every order whether it holds by 2 standard errors; returns those that do not."""
    lost = []
    for (task,), some in grouped(rows, 'task').items():
        runs = by_seed(some, 'method').values()
        for low, high in (pair for chain in CHAINS[task] for pair in zip(chain, chain[1:])):
            gaps = [run[high]['gold'] - run[low]['gold'] for run in runs]
            gap, spread = mean_and_spread(gaps)
            error = spread / len(gaps) ** 0.5 if gaps[1:] else float('inf')
            holds = gap > 2 * error
            verdict = 'holds' if holds else 'the other way' if gap < -2 * error else 'open'
            print(f'{task}: gold of {low} < {high}: in {sum(g > 0 for g in gaps)} of {len(gaps)} '
                  f'seeds, by {gap:.2f} ± {error:.2f}: {verdict}')
            lost += [] if holds else [(task, low, high)]
        if task == 'Mode':
            _, means, _ = spreads_by(some, 'method', 'gold')
            gap = max(means[1:]) - min(means[1:])           # the first one is the reference
            print(f'{task}: all methods are about alike: the means lie within {gap:.2f}, not above '
                  f"{ALIKE}: {'holds' if gap <= ALIKE else 'does not hold'}")
            lost += [] if gap <= ALIKE else [(task, 'alike')]
    return lost


def draw(rows):
    """Draws the picture: a column per task, gold by method and gold against kl."""
    tasks = grouped(rows, 'task')
    figure = new_figure(12, 7)
    axes = figure.subplots(2, len(tasks), squeeze=False)
    for (above, below), ((task,), rows) in zip(axes.T, tasks.items()):
        methods, golds, spreads = spreads_by(rows, 'method', 'gold')
        _, kls, kl_spreads = spreads_by(rows, 'method', 'kl')
        for line, method in enumerate(methods):
            style = dict(color=COLORS[6] if method == 'reference' else COLORS[METHODS[method][2]],
                         **POINTS)
            above.errorbar(golds[line], line, xerr=spreads[line], **style)
            below.errorbar(kls[line], golds[line], spreads[line], kl_spreads[line], **style)
        above.set_yticks(range(len(methods)), methods)
        above.set_ylim(len(methods) - 0.5, -0.5)
        unit = 'letters' if task != 'Toy' else "the judge's reward"
        frame(above, task, below=f'gold, {unit}')
        frame(below, f'{task}: gold and KL', f'gold, {unit}', 'KL(policy, ref), nats per response')
    for ax in axes[0, 1:]:
        ax.set_yticklabels([])
    names(axes[1, 0], [(name, dict(color=color, marker='o', ls='')) for name, color in (
        ('reference', COLORS[6]), ('offline, given pairs', COLORS[1]),
        ("on-policy, reward model's scores", COLORS[0]))])
    return figure


def main(cfg):
    """Runs what the table lacks, prints means and orders, draws; returns what does not hold."""
    (path, seeds), tasks = table_and_seeds(cfg), cfg.tasks.split()
    if not tasks or not set(tasks) <= set(CHAINS):
        raise UserError(f'--tasks={cfg.tasks!r}: of ' + ', '.join(CHAINS))
    rows = [row for seed, task in itertools.product(seeds, tasks) for row in complete(
        path, [seed], lambda seed: run_task(seed, task, cfg.quick), task=task)]
    show_means(rows, ('task', 'method'),
               ('gold', 'score', 'kl', 'kl_collect', 'length', 'entropy', 'chosen', 'rejected',
                'margin', 'clip_frac'))
    if cfg.quick:
        print(SMOKE_TEST)
        return []
    lost = check(rows)
    show_picture(cfg, path, lambda: draw(rows))
    return lost


if __name__ == '__main__':
    run_cli(main, Config)
