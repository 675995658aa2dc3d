"""
A bandit of 100 actions: fresh samples, used samples, and what a negative gradient is good for.

Tajwar et al. 2024, sections 4 and 5:

    reference   100 equal bins of tanh(y) on [-1, 1], y Cauchy at -0.7, scale 0.4
    reward      mean over L positions of exp(-((a_i - c) / 10)^2); c = 70 in R1, 20 in R2
    policy      softmax of a table of L x 100 logits that starts at the reference; plain descent

Everything but the samples is exact: mean reward, KL and entropy are sums over the table, and so is
the policy at which imitation ends. What the claims leave open is run both ways. 'best lr' repeats
every run at its own best learning rate of 0.1, 0.3, 1, ..., chosen on seeds 100 to 102. 'own mean'
takes the collection's mean as the baseline; the authors' code takes that of all scores so far. 'far
pairs' are those whose rewards differ by more than 0.2; most others compare rewards near 0. There is
no Adam, no KL penalty, and no prompt.

    python -m studies.bandit
    R1, offline: DPO is above Best-of-N by 0.4: holds in 10 of 10 seeds
"""
import itertools
from dataclasses import dataclass
from functools import partial

import torch

from prefgpt import rng, run_cli
from studies.blind_spot import optimum
from studies.style import COLORS, GREY, POINTS, frame, names, new_figure, show_picture
from studies.table import (complete, mean_and_spread, select, show_claims, show_means, spreads_by,
                           table_and_seeds)
from studies.unified import (best_of_n_loss, binary_feedme_loss, dpo_pairs_loss, ipo_pairs_loss,
                             ppo_loss, pref_ft_loss, reinforce_loss, rwr_loss, train)


@dataclass
class Config:
    seeds: str = '0 1 2 3 4 5 6 7 8 9'      # the seeds to run, or to complete
    csv: str = 'out/studies/bandit.csv'     # for seeds that studies/results/bandit.csv lacks
    results: bool = False           # add them to studies/results/bandit.csv, and draw its picture
    quick: bool = False             # a smoke test: one seed, ten steps of every run, its own table


EDGES = torch.atanh(torch.linspace(-1, 1, 101, dtype=torch.float64))            # -inf to inf
REF = (0.5 + torch.atan((EDGES + 0.7) / 0.4) / torch.pi).diff()                 # (100,)
TASKS = {task: torch.exp(-((torch.arange(100, dtype=torch.float64) - center) / 10) ** 2)
         for task, center in (('R1', 70), ('R2', 20))}
N, OFF, ON = 10, 'offline', 'on-policy'         # responses in a group; where the data are from


def best_of_n(probs, reward, n):
    """Returns the probabilities of the best of n samples; actions of equal reward share theirs."""
    no_better = torch.stack([probs[reward <= r].sum() for r in reward])
    worse = torch.stack([probs[reward < r].sum() for r in reward])
    return (no_better ** n - worse ** n) * probs / (no_better - worse)


class Table:
    """L choices: a table of logits (L, actions), its reference, and what it samples."""

    def __init__(self, seed, reward, L):
        self.seed, self.reward = seed, reward
        self.ref = REF.log().repeat(L, 1)                               # (L, actions)
        self.logits = torch.nn.ParameterList([self.ref.clone()])
        self.count = self.total = self.squares = 0.0        # of all scores so far
        self.collected, self.kl_collect = self.ref, 0.0

    def logprobs(self):
        """Returns log pi of every action, (L, actions)."""
        return self.logits[0].log_softmax(1)

    def logprobs_of(self, batch):
        """Returns log pi of responses (G, N, L), choice by choice."""
        return self.logprobs()[torch.arange(len(self.ref)), batch['responses']]

    @torch.no_grad()
    def collect(self, B, k):
        """Samples B responses of the policy as it is, in groups of N, with all a loss asks for."""
        self.note_kl_collect()
        self.collected = self.logprobs()
        responses = torch.multinomial(self.collected.exp(), B, replacement=True,
                                      generator=rng(self.seed, k, 'rollout'))   # (L, B)
        responses = responses.T.unflatten(0, (-1, N))                           # (G, N, L)
        scores = self.reward[responses].mean(-1)                                # (G, N)
        # The baseline is the mean of all scores so far, as in the authors' code; it lags behind a
        # policy that gets better. The collection's own mean, as in train_ppo, does not
        self.count += B
        self.total += scores.sum().item()
        self.squares += (scores ** 2).sum().item()
        mean = self.total / self.count
        std = (self.squares / self.count - mean ** 2 + 1e-8) ** 0.5
        own = (scores - scores.mean()) / (scores.std(correction=0) + 1e-8)
        return {'responses': responses, 'scores': scores,
                'advantages': ((scores - mean) / std)[..., None].expand(responses.shape),
                'whitened': own[..., None].expand(responses.shape),
                'old_logprobs': self.logprobs_of({'responses': responses}),
                'ref_logprobs': self.ref[0][responses]}             # the same for each choice

    def note_kl_collect(self):
        """Updates kl_collect, the largest KL(policy, the policy that sampled) so far, in nats."""
        table = self.logprobs()
        moved = (table.exp() * (table - self.collected)).sum().item()
        self.kl_collect = max(self.kl_collect, moved)

    @torch.no_grad()
    def measure(self, batch):
        """Returns exact numbers, and mean log pi / ref of each group's best and worst response."""
        self.note_kl_collect()
        table, scores = self.logprobs(), batch['scores']
        ratios = (self.logprobs_of(batch) - batch['ref_logprobs']).sum(-1)      # (G, N)
        chosen, rejected = (ratios.gather(1, place(1, keepdim=True)).mean().item()
                            for place in (scores.argmax, scores.argmin))
        return {'reward': (table.exp() * self.reward).sum(1).mean().item(),
                'kl': (table.exp() * (table - self.ref)).sum().item(),
                'kl_collect': self.kl_collect, 'entropy': -(table.exp() * table).sum().item(),
                'chosen': chosen, 'rejected': rejected}


LOSSES = {
    'Best-of-N': best_of_n_loss, 'REINFORCE': reinforce_loss, 'PPO': ppo_loss,
    'REINFORCE, own mean': lambda p, b: reinforce_loss(p, b | {'advantages': b['whitened']}),
    'PPO, own mean': lambda p, b: ppo_loss(p, b | {'advantages': b['whitened']}),
    'RWR': partial(rwr_loss, beta=0.2), 'FeedMe': partial(binary_feedme_loss, bar=0.5),
    'Pref-FT, far pairs': partial(pref_ft_loss, threshold=0.2),
    'DPO': partial(dpo_pairs_loss, beta=0.1),
    'DPO, far pairs': partial(dpo_pairs_loss, beta=1.0, threshold=0.2),
    'IPO, far pairs': partial(ipo_pairs_loss, beta=0.05, threshold=0.2)}
# experiment -> samples, M, L, and (method, lr, {(B, T): best lr on R1 and, where it is run, on R2})
EXPERIMENTS = {
    'staleness': (6000, 100, 10, [
        ('Best-of-N', 3, {(100, 1): (3, 10), (500, 1): (10, 10), (2000, 1): (10, 10),
                          (6000, 1): (10, 10)}),
        ('REINFORCE', 10, {(100, 1): (10, 10), (500, 1): (10, 10), (2000, 1): (30, 30),
                           (6000, 1): (30, 10)}),
        ('REINFORCE, own mean', 10, {(100, 1): (10, 10), (500, 1): (10, 30), (2000, 1): (30, 30),
                                     (6000, 1): (100, 10)})]),
    'reuse': (2000, 50, 10, [
        ('Best-of-N', 1, {(50, 1): [3], (50, 4): [1], (50, 16): [0.3], (50, 64): [0.1]}),
        ('REINFORCE', 3, {(100, 1): [10], (100, 4): [3], (100, 16): [1], (100, 64): [0.3]}),
        ('PPO', 3, {(100, 1): [30], (100, 4): [10], (100, 16): [30], (100, 64): [10]}),
        ('PPO, own mean', 3, {(100, 1): [10], (100, 4): [10], (100, 16): [10], (100, 64): [10]}),
        ('DPO', 100, {(100, 1): [300], (100, 4): [100], (100, 16): [30], (100, 64): [10]})]),
    'fixed data': (5000, 100, 1, [
        ('Best-of-N', 3, {(5000, 4): (10, 30)}), ('RWR', 3, {(5000, 4): (30, 10)}),
        ('FeedMe', 3, {(5000, 4): (30, 30)}), ('Pref-FT, far pairs', 3, {(5000, 4): (10, 10)}),
        ('DPO, far pairs', 30, {(5000, 4): (100, 100)}),
        ('IPO, far pairs', 0.1, {(5000, 4): (1, 0.3)}),
        ('Best-of-N', 3, {(500, 4): (3, 3)}), ('DPO, far pairs', 30, {(500, 4): (30, 100)})]),
    '2 x 2': (6000, 100, 10, [
        ('Best-of-N', 10, {(6000, 1): (10, 10), (500, 1): (10, 10)}),
        ('DPO', 300, {(6000, 1): (3000, 3000), (500, 1): (300, 300)}),
        ('REINFORCE', 10, {(500, 1): (10, 10)}), ('PPO', 10, {(500, 4): (100, 30)})])}


def runs():
    """Yields every run's numbers, as its row has them: at the lr given, then at the best one."""
    for name, (samples, M, L, methods) in EXPERIMENTS.items():
        for method, lr, best in methods:
            for (B, T), best_lrs in best.items():
                for task, best_lr in zip(TASKS, best_lrs):
                    numbers = dict(task=task, method=method, B=B, T=T, M=M, L=L, samples=samples,
                                   data=OFF if B == samples else ON)
                    yield {'experiment': name, **numbers, 'lr': lr}
                    yield {'experiment': f'{name}, best lr', **numbers, 'lr': best_lr}


def run_seed(seed, quick):
    """Returns a seed's rows: every run at its end, and the 2 x 2's after every 1000 samples."""
    rows = []
    for numbers in runs():
        table = Table(seed, TASKS[numbers['task']], numbers['L'])
        B, M, T, samples, lr = (numbers[name] for name in ('B', 'M', 'T', 'samples', 'lr'))
        descent = train(table.logits, table.logprobs_of, partial(table.collect, B),
                        LOSSES[numbers['method']], torch.optim.SGD(table.logits.parameters(), lr),
                        lr, seed, samples // B, T, M)
        steps = 10 if quick else samples // M * T
        show = steps if quick or '2 x 2' not in numbers['experiment'] else steps // 6
        for step, part in enumerate(itertools.islice(descent, steps), 1):
            if step % show == 0:
                rows.append({'seed': seed, **numbers, 'step': step, 'last': int(step == steps),
                             **table.measure(part),
                             'command': f'python -m studies.bandit --seeds={seed}'})
    return rows


def by_run(rows):
    """Returns final rewards by (experiment, task, method, B, T or data); by 'moved', kl_collect."""
    values, varies = {}, {'staleness': 'B', 'reuse': 'T'}
    for row in select(rows, last=1):
        name = row['experiment']
        key = row['task'], row['method'], row[varies.get(name.split(',')[0], 'data')]
        values.setdefault((name, *key), []).append(row['reward'])
        if name == 'reuse':
            values.setdefault(('moved', *key), []).append(row['kl_collect'])
    return {key: mean_and_spread(each)[0] for key, each in values.items()}


def gap(r, experiment, low, high, task='R1'):
    """Returns how far high's reward is above low's, runs as (method, B, T or data)."""
    return r[experiment, task, *high] - r[experiment, task, *low]


# Of the runs of one seed, r as by_run has it: claim -> whether it holds
OLD, NEW, MLE = ('Best-of-N', 2000), ('Best-of-N', 100), ('Best-of-N', OFF)
FAR, OFF_DPO, ON_DPO, ON_MLE = ('DPO, far pairs', OFF), ('DPO', OFF), ('DPO', ON), ('Best-of-N', ON)
CHECKS = {
    'R1, Best-of-N and REINFORCE: reward falls from B = 100 to 500 to 2000': lambda r: all(
        gap(r, 'staleness', (method, old), (method, new)) > 0
        for method in ('Best-of-N', 'REINFORCE') for old, new in ((500, 100), (2000, 500))),
    'R1, Best-of-N: B = 100 is above 2000 by 0.5, and by 3 times as much as on R2': lambda r: (
        gap(r, 'staleness', OLD, NEW) > max(0.5, 3 * gap(r, 'staleness', OLD, NEW, 'R2'))),
    'Best-of-N, REINFORCE, DPO: 4 passes are above 1, and above 64 by 0.1': lambda r: all(
        gap(r, 'reuse', (method, T), (method, 4)) > by
        for method in ('Best-of-N', 'REINFORCE', 'DPO') for T, by in ((1, 0), (64, 0.1))),
    'PPO: 64 passes are no worse than 16 (within 0.03)': lambda r: (
        gap(r, 'reuse', ('PPO', 16), ('PPO', 64)) >= -0.03),
    '64 passes: PPO stays within 3 nats of its samples, REINFORCE goes beyond 10': lambda r: (
        r['moved', 'R1', 'PPO', 64] < 3 and r['moved', 'R1', 'REINFORCE', 64] > 10),
    'R1, offline: DPO is above Best-of-N by 0.4': lambda r: gap(r, 'fixed data', MLE, FAR) > 0.4,
    'R2, offline: DPO and Best-of-N are within 0.06': lambda r: (
        abs(gap(r, 'fixed data', MLE, FAR, 'R2')) < 0.06),
    'R1, offline: Best-of-N ends at its fixed point, 0.3135 (within 0.06)': lambda r: (
        abs(r['fixed data', 'R1', *MLE] - 0.3135) < 0.06),
    'R1: offline Best-of-N + 0.2 < offline DPO < on-policy Best-of-N': lambda r: (
        gap(r, '2 x 2', MLE, OFF_DPO) > 0.2 and gap(r, '2 x 2', OFF_DPO, ON_MLE) > 0),
    'R1: on-policy DPO is above on-policy Best-of-N by 0.02, offline DPO by 0.3': lambda r: (
        gap(r, '2 x 2', ON_MLE, ON_DPO) >= 0.02 and gap(r, '2 x 2', OFF_DPO, ON_DPO) > 0.3),
    'R2: on-policy DPO is at most 0.06 above on-policy Best-of-N and offline DPO': lambda r: all(
        gap(r, '2 x 2', other, ON_DPO, 'R2') < 0.06 for other in (ON_MLE, OFF_DPO))}


COLOR = dict(zip(('Best-of-N', 'DPO', 'REINFORCE', 'PPO', 'REINFORCE, own mean', 'PPO, own mean'),
                 (*COLORS[:4], *COLORS[6:4:-1])))
PANELS = (('reference and rewards', 'reward; probability / its maximum', 'action'),
          ('fresh and old samples', 'reward', 'B, samples per collection'),
          ('reuse', 'reward', 'T, passes over a collection'),
          ('fixed data, 4 passes', 'reward', ''),
          *((f'{task}: reward and KL', 'reward', 'KL(policy, ref), nats per response')
            for task in TASKS))
SWEEPS = [('R1', {}), ('R2', dict(ls='--')), ('R1, each at\nits best lr', dict(ls=':')),
          *((method.replace(', ', ',\n'), dict(color=color, marker='o', ls=''))
            for method, color in COLOR.items())]


def draw_sweep(ax, rows, experiment, x):
    """Draws reward over B or T: R1 a line, R2 dashed; dotted, R1 with the best lr at each point."""
    for method, color in COLOR.items():
        for name, task, style in (
                (experiment, 'R1', {}), (experiment, 'R2', dict(linestyle='--')),
                (f'{experiment}, best lr', 'R1', dict(linestyle=':', marker=''))):
            if found := select(rows, experiment=name, task=task, method=method):
                ax.errorbar(*spreads_by(found, x, 'reward'), color=color, **POINTS | style)
    values = sorted({row[x] for row in select(rows, experiment=experiment)})
    ax.set_xscale('log', base=2)
    ax.set_xticks(values, map(str, values))


def draw_fixed(ax, rows, task, reward, color):
    """Draws a task's reward by loss on fixed data; dotted, where imitating the best of N ends."""
    fixed = [{**row, 'name': f"{row['method'].split(',')[0]}\n{row['data']}"}
             for row in select(rows, experiment='fixed data', task=task)]
    ax.errorbar(*spreads_by(fixed, 'name', 'reward'), color=color, label=task, linestyle='none',
                **POINTS)
    ax.axhline((best_of_n(REF, reward, N) * reward).sum(), color=color, linestyle=':')
    ax.tick_params(axis='x', labelrotation=60)


def draw_frontier(ax, rows, task, reward):
    """Draws reward against KL in the 2 x 2, and in grey the most reward there is at a KL."""
    best = [optimum(reward, REF.log(), beta) for beta in torch.logspace(1, -2, 99).tolist()]
    ax.plot([10 * (p * (p / REF).log()).sum() for p in best],           # of 10 choices
            [(p * reward).sum() for p in best], color=GREY, linewidth=1, label='most there is')
    for method, data in itertools.product(COLOR, (OFF, ON)):
        if found := select(rows, experiment='2 x 2', task=task, method=method, data=data):
            _, kl, _ = spreads_by(found, 'step', 'kl')
            ax.errorbar(kl, *spreads_by(found, 'step', 'reward')[1:], color=COLOR[method],
                        label=f'{data} {method}', linestyle='--' if data == OFF else '-', **POINTS)


def draw(rows):
    """Draws the picture: the bandit, both sweeps, fixed data, reward and KL."""
    figure = new_figure(13, 8)
    axes = figure.subplots(2, 3).flatten()
    draw_sweep(axes[1], rows, 'staleness', 'B')
    draw_sweep(axes[2], rows, 'reuse', 'T')
    for ax, color, (task, reward) in zip(axes[4:], COLORS[4:], TASKS.items()):
        axes[0].plot(reward, color=color, label=f'reward {task}')
        draw_fixed(axes[3], rows, task, reward, color)
        draw_frontier(ax, rows, task, reward)
    axes[0].fill_between(range(100), REF / REF.max(), step='mid', color='#ccc', label='reference')
    for ax, panel in zip(axes, PANELS):
        ax.set_ylim(0, 1.05)
        frame(ax, *panel)
    for ax in axes[[0, 4, 5]]:
        names(ax)
    names(axes[2], SWEEPS, loc='upper left', bbox_to_anchor=(1, 1))     # of axes[1] too
    names(axes[3], [('best of 10, imitated', dict(ls=':'))])
    return figure


def main(cfg):
    """Runs the seeds that the table lacks, prints means and claims, draws; returns what failed."""
    path, seeds = table_and_seeds(cfg)
    rows = complete(path, seeds, lambda seed: run_seed(seed, cfg.quick))
    show_means(select(rows, last=1), ('experiment', 'task', 'method', 'B', 'T', 'lr'),
               ('reward', 'kl', 'kl_collect', 'entropy', 'chosen', 'rejected'))
    runs = {seed: by_run(select(rows, seed=seed)) for seed in seeds}
    failed, of_means = show_claims(CHECKS, runs, cfg.quick), by_run(rows)
    if not cfg.quick:
        print('hold of the means over seeds:', sum(holds(of_means) for holds in CHECKS.values()))
    show_picture(cfg, path, lambda: draw(rows))
    return failed


if __name__ == '__main__':
    run_cli(main, Config)
