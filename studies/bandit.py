"""
A bandit of 100 actions: fresh samples, used samples, and what a negative gradient is good for.

The paper's claims (Tajwar et al. 2024, sections 4 and 5). Where the reward peaks where the
reference hardly looks (R1), learning from the policy's own samples beats learning from old ones;
moderate reuse of samples helps; of fixed data, a loss that also pushes responses down makes more
than one that only imitates; and the two add up. Where the peak is likely already (R2), all of
this hardly matters.

    reference   100 equal bins of tanh(y) on [-1, 1], y Cauchy at -0.7, scale 0.4
    reward      mean over L positions of exp(-((a_i - c) / 10)^2); c = 70 in R1, 20 in R2
    policy      softmax of a table of L x 100 logits that starts at the reference; plain descent

All but the samples is exact: mean reward, KL and entropy are sums over the table, and so is the
fixed point of imitating the best of N, ref(y) P(y is the best of N), which no number of steps
leads past. What to expect: PPO is slowest here, its clip allows small steps only; and "faster"
means at these learning rates: at its best one, offline DPO comes close to on-policy imitation
(best lr). Offline DPO with L = 1 needs pairs that differ (threshold 0.2): nearly all others
compare two rewards near 0.
What it does not do: Adam (its steps are of one size however small a gradient is), a KL penalty,
prompts. Learning rates come from grids 1, 3, 10, 30, ... on seeds 100 to 102.

    python -m studies.bandit
    wrote studies/results/bandit.png
"""
import itertools
import statistics
from dataclasses import dataclass
from functools import partial

import torch

from prefgpt import run_cli
from studies.curves import COLORS, GREY
from studies.table import complete, mean_and_spread, save_picture, select, show_means
from studies.unified import (Table, best_of_n, best_of_n_loss, binary_feedme_loss, dpo_pairs_loss,
                             ipo_pairs_loss, optimum, peaked, ppo_loss, reference, reinforce_loss,
                             rwr_loss, train_table)


@dataclass
class Config:
    seeds: str = '0 1 2 3 4 5 6 7 8 9'      # the seeds to run, or to complete
    csv: str = 'studies/results/bandit.csv'     # the table to add to; the picture beside it
    quick: bool = False             # ten steps of every run for one seed, into its own table


N = 10                              # responses in a group
TASKS = {'R1': peaked(70), 'R2': peaked(20)}
LOSSES = {
    'Best-of-N': best_of_n_loss, 'REINFORCE': reinforce_loss, 'PPO': ppo_loss,
    'RWR': partial(rwr_loss, beta=0.2), 'FeedMe': partial(binary_feedme_loss, bar=0.5),
    'DPO': partial(dpo_pairs_loss, beta=0.1),
    'DPO, far pairs': partial(dpo_pairs_loss, beta=1.0, threshold=0.2),
    'IPO, far pairs': partial(ipo_pairs_loss, beta=0.05, threshold=0.2)}
# experiment -> samples, M and L; then method, lr, and by (B, T) the best lr of the grid on R1 and
# on R2 (where there is none, that task is left out)
EXPERIMENTS = {
    'staleness': (6000, 100, 10, [
        ('Best-of-N', 3, {(100, 1): (3, 10), (500, 1): (10, 10), (2000, 1): (10, 10),
                          (6000, 1): (10, 10)}),
        ('REINFORCE', 10, {(100, 1): (10, 10), (500, 1): (10, 10), (2000, 1): (30, 30),
                           (6000, 1): (30, 10)})]),
    'reuse': (2000, 50, 10, [
        ('Best-of-N', 1, {(50, 1): [3], (50, 4): [1], (50, 16): [0.3], (50, 64): [0.1]}),
        ('REINFORCE', 3, {(100, 1): [10], (100, 4): [3], (100, 16): [1], (100, 64): [0.3]}),
        ('PPO', 3, {(100, 1): [30], (100, 4): [10], (100, 16): [30], (100, 64): [10]}),
        ('DPO', 100, {(100, 1): [300], (100, 4): [100], (100, 16): [30], (100, 64): [10]})]),
    'fixed data': (5000, 100, 1, [
        ('Best-of-N', 3, {(5000, 4): (10, 30)}), ('RWR', 3, {(5000, 4): (30, 10)}),
        ('FeedMe', 3, {(5000, 4): (30, 30)}), ('DPO, far pairs', 30, {(5000, 4): (100, 100)}),
        ('IPO, far pairs', 0.1, {(5000, 4): (1, 0.3)}),
        ('Best-of-N', 3, {(500, 4): (3, 3)}), ('DPO, far pairs', 30, {(500, 4): (30, 100)})]),
    '2 x 2': (6000, 100, 10, [
        ('Best-of-N', 10, {(6000, 1): (10, 10), (500, 1): (10, 10)}),
        ('DPO', 300, {(6000, 1): (3000, 3000), (500, 1): (300, 300)}),
        ('REINFORCE', 10, {(500, 1): (10, 10)}), ('PPO', 10, {(500, 4): (100, 30)})])}


# ----------------------------------------------------------------------------- the runs

def runs():
    """Every run's numbers, as they stand in its row; at the lr given, then at the best one."""
    for name, (samples, M, L, methods) in EXPERIMENTS.items():
        for method, lr, best in methods:
            for (B, T), best_lrs in best.items():
                for task, best_lr in zip(TASKS, best_lrs):
                    numbers = dict(task=task, method=method, B=B, T=T, M=M, L=L, samples=samples,
                                   data='offline' if B == samples else 'on-policy')
                    yield {'experiment': name, **numbers, 'lr': lr}
                    yield {'experiment': f'{name}, best lr', **numbers, 'lr': best_lr}


def run_seed(seed, quick):
    """A seed's rows: every run at its end; those of the 2 x 2 after every 1000 samples too."""
    rows = []
    for numbers in runs():
        table = Table(seed, TASKS[numbers['task']], numbers['L'], N)
        descent = train_table(table, LOSSES[numbers['method']],
                              *(numbers[name] for name in ('lr', 'samples', 'B', 'M', 'T')))
        steps = numbers['samples'] // numbers['M'] * numbers['T']
        show = steps // 6 if '2 x 2' in numbers['experiment'] else steps
        steps, show = (10, 10) if quick else (steps, show)
        for step, part in enumerate(itertools.islice(descent, steps), 1):
            if step % show == 0:
                chosen, rejected = table.log_ratios(part)
                rows.append({'seed': seed, **numbers, 'step': step, 'last': int(step == steps),
                             **table.measure(), 'chosen': chosen, 'rejected': rejected,
                             'command': f'python -m studies.bandit --seeds={seed}'})
    return rows


# What is expected of the runs of one seed: claim -> whether it holds. r is the reward and k the
# kl_collect at a run's end, by experiment, task, method and what varies: B, T, or the data
CHECKS = {
    'R1, Best-of-N and REINFORCE: reward falls from B = 100 to 500 to 2000':
        lambda r, k: all(r['staleness', 'R1', method, 100] > r['staleness', 'R1', method, 500]
                         > r['staleness', 'R1', method, 2000]
                         for method in ('Best-of-N', 'REINFORCE')),
    'R1, Best-of-N: B = 100 is above 2000 by 0.5, and by 3 times as much as on R2':
        lambda r, k: (fresh_gain(r, 'R1') > 0.5 and fresh_gain(r, 'R1') > 3 * fresh_gain(r, 'R2')),
    'Best-of-N, REINFORCE, DPO: 4 passes are above 1, and above 64 by 0.1':
        lambda r, k: all(r['reuse', 'R1', method, 4] > max(r['reuse', 'R1', method, 1],
                                                           r['reuse', 'R1', method, 64] + 0.1)
                         for method in ('Best-of-N', 'REINFORCE', 'DPO')),
    'PPO: 64 passes are no worse than 16 (within 0.03)':
        lambda r, k: r['reuse', 'R1', 'PPO', 64] >= r['reuse', 'R1', 'PPO', 16] - 0.03,
    '64 passes: PPO stays within 3 nats of its samples, REINFORCE goes beyond 10':
        lambda r, k: k['reuse', 'R1', 'PPO', 64] < 3 and k['reuse', 'R1', 'REINFORCE', 64] > 10,
    'R1, offline: DPO is above Best-of-N by 0.4':
        lambda r, k: (r['fixed data', 'R1', 'DPO, far pairs', 'offline']
                      > r['fixed data', 'R1', 'Best-of-N', 'offline'] + 0.4),
    'R1, offline: Best-of-N ends at its fixed point, 0.3135 (within 0.06)':
        lambda r, k: abs(r['fixed data', 'R1', 'Best-of-N', 'offline'] - 0.3135) < 0.06,
    'R2, offline: DPO and Best-of-N are within 0.06':
        lambda r, k: abs(r['fixed data', 'R2', 'DPO, far pairs', 'offline']
                         - r['fixed data', 'R2', 'Best-of-N', 'offline']) < 0.06,
    'R1: offline MLE + 0.2 < offline DPO < on-policy MLE':
        lambda r, k: (r['2 x 2', 'R1', 'Best-of-N', 'offline'] + 0.2
                      < r['2 x 2', 'R1', 'DPO', 'offline']
                      < r['2 x 2', 'R1', 'Best-of-N', 'on-policy']),
    'R1: on-policy DPO is above on-policy MLE by 0.02, above offline DPO by 0.3':
        lambda r, k: r['2 x 2', 'R1', 'DPO', 'on-policy'] >= max(
            r['2 x 2', 'R1', 'Best-of-N', 'on-policy'] + 0.02,
            r['2 x 2', 'R1', 'DPO', 'offline'] + 0.3),
    'R2: the best three of these four are within 0.06':
        lambda r, k: spread_of_three(r) < 0.06,
}


def fresh_gain(r, task):
    """What Best-of-N gains by B = 100 in the place of 2000."""
    return (r['staleness', task, 'Best-of-N', 100]
            - r['staleness', task, 'Best-of-N', 2000])


def spread_of_three(r):
    three = sorted(r['2 x 2', 'R2', method, data] for method in ('Best-of-N', 'DPO')
                   for data in ('offline', 'on-policy'))[1:]
    return three[-1] - three[0]


def by_run(rows, column):
    """{experiment, task, method and what varies: number}, of one seed's last rows."""
    varied = {'staleness': 'B', 'reuse': 'T'}
    return {(row['experiment'], row['task'], row['method'],
             row[varied.get(row['experiment'].split(',')[0], 'data')]): row[column]
            for row in rows}


def check(rows):
    """Prints of every claim in how many seeds it holds, and whether it does of the means over
    them; returns {claim: [seeds that failed]}."""
    seeds, failed = sorted({row['seed'] for row in rows}), {}
    tables = [[by_run(select(rows, seed=seed), column)
               for column in ('reward', 'kl_collect')] for seed in seeds]
    means = [{key: statistics.fmean(each[key] for each in column) for key in column[0]}
             for column in zip(*tables)]
    for claim, holds in CHECKS.items():
        failed[claim] = [seed for seed, table in zip(seeds, tables) if not holds(*table)]
        print(f'{claim}: holds in {len(seeds) - len(failed[claim])} of {len(seeds)} seeds'
              + (f', not {failed[claim]}' if failed[claim] else '')
              + ('' if holds(*means) else ', nor of the means'))
    return failed


# ----------------------------------------------------------------------------- the picture

COLOR = dict(zip(('Best-of-N', 'DPO', 'REINFORCE', 'PPO'), COLORS))


def draw_sweep(ax, rows, experiment, x):
    """Reward over B or T: R1 a line, R2 dashed; dotted, R1 with the best lr at every point."""
    for method, color in COLOR.items():
        for name, task, style in (
                (experiment, 'R1', dict(label=method)), (experiment, 'R2', dict(linestyle='--')),
                (f'{experiment}, best lr', 'R1', dict(linestyle=':', marker=''))):
            if found := select(rows, experiment=name, task=task, method=method):
                ax.errorbar(*mean_and_spread(found, x, 'reward'), color=color, capsize=2,
                            **{'marker': 'o', 'markersize': 4, **style})
    values = sorted({row[x] for row in select(rows, experiment=experiment)})
    ax.set_xscale('log', base=2)
    ax.set_xticks(values, map(str, values))


def draw_fixed(ax, rows):
    """Reward by loss, R1 and R2, on fixed data and on fresh; the fixed points of imitation."""
    rows = [{**row, 'name': f"{row['method'].split(',')[0]}\n{row['data']}"} for row in rows]
    for task, color in (('R1', COLORS[4]), ('R2', COLORS[5])):
        ax.errorbar(*mean_and_spread(select(rows, task=task), 'name', 'reward'), color=color,
                    capsize=2, marker='o', linestyle='none', label=task)
        end = (best_of_n(reference(), TASKS[task], N) * TASKS[task]).sum()
        ax.axhline(end, color=color, linestyle=':')
    ax.tick_params(axis='x', labelrotation=60)


def draw_plane(ax, rows, task):
    """Reward against KL, a point after every 1000 samples; grey: the most there is at that KL."""
    ref, reward = reference(), TASKS[task]
    best = [optimum(ref, reward, beta) for beta in torch.logspace(1, -2, 99).tolist()]
    ax.plot([10 * (p * (p / ref).log()).sum() for p in best],   # of 10 choices
            [(p * reward).sum() for p in best], color=GREY, linewidth=1)
    for method, data in dict.fromkeys((row['method'], row['data']) for row in rows):
        found = select(rows, task=task, method=method, data=data)
        _, kl, _ = mean_and_spread(found, 'step', 'kl')
        ax.errorbar(kl, *mean_and_spread(found, 'step', 'reward')[1:], color=COLOR[method],
                    capsize=2, marker='o', markersize=4, label=f'{data} {method}',
                    linestyle='--' if data == 'offline' else '-')
    ax.set_xlabel('KL(policy, ref), nats', fontsize=10)


def draw(rows):
    """The picture, a matplotlib Figure: the bandit, both sweeps, fixed data, reward and KL."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 7.8), dpi=150, layout='constrained')
    axes = figure.subplots(2, 3).flat
    axes[0].fill_between(range(100), reference() / reference().max(), step='mid', color='#cccccc',
                         label='ref / its maximum')
    for (task, reward), color in zip(TASKS.items(), COLORS[4:]):
        axes[0].plot(reward, color=color, label=task)
    draw_sweep(axes[1], rows, 'staleness', 'B')
    draw_sweep(axes[2], rows, 'reuse', 'T')
    draw_fixed(axes[3], select(rows, experiment='fixed data'))
    draw_plane(axes[4], select(rows, experiment='2 x 2'), 'R1')
    draw_plane(axes[5], select(rows, experiment='2 x 2'), 'R2')
    titles = ('reference and rewards, by action', 'reward by B, samples a collection',
              'reward by T, passes', 'reward by loss and data, T = 4', 'R1: reward and KL',
              'R2: reward and KL')
    for ax, title in zip(axes, titles):
        ax.set_title(title, loc='left', fontsize=11)
        ax.spines[['top', 'right']].set_visible(False)
        ax.tick_params(labelsize=9, color=GREY, labelcolor=GREY)
        ax.set_ylim(0, 1.05)
        ax.legend(frameon=False, fontsize=9)
    seeds = len({row['seed'] for row in rows})
    figure.supxlabel(f'Mean and standard deviation of {seeds} seeds. Above: line R1, dashed R2, '
                     'dotted R1 at the best lr of each point.\nBelow: dotted, where imitating the '
                     'best of 10 ends; grey, the most reward there is at a KL.', fontsize=10,
                     color=GREY)
    return figure


def main(cfg):
    """Runs the seeds that the table lacks, prints means and claims, draws; returns what failed."""
    path, rows = complete(cfg, run_seed)
    ends = select(rows, last=1)
    show_means(ends, ('experiment', 'task', 'method', 'B', 'T', 'lr'),
               ('reward', 'kl', 'kl_collect', 'entropy', 'chosen', 'rejected'))
    failed = check(ends)
    save_picture(cfg, path, draw, rows)
    return failed


if __name__ == '__main__':
    run_cli(main, Config)
