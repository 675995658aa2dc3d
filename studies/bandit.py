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
policy at which imitation ends. Much hangs on what the claims leave open. The learning rate: 'best
lr' has every run again at its own; reuse then costs little, and offline DPO comes near on-policy
imitation. The baseline of REINFORCE and PPO, the mean of all scores so far as in the authors' code:
with the collection's 'own mean' REINFORCE hardly minds old data. The pairs: 'far' ones differ by
0.2, most others compare rewards near 0; imitating their chosen side beats Best-of-N, too.
What it does not do: Adam, a KL penalty, prompts. Learning rates: 1, 3, 10, ... on seeds 100 to 102.

    python -m studies.bandit
    wrote studies/results/bandit.png
"""
import itertools
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from prefgpt import run_cli
from studies.curves import COLORS, GREY
from studies.policies import Table, best_of_n, optimum, peaked, reference, train_table
from studies.table import (complete, mean_and_spread, parse_seeds, save_picture, select,
                           show_claims, show_means)
from studies.unified import (best_of_n_loss, binary_feedme_loss, dpo_pairs_loss, ipo_pairs_loss,
                             ppo_loss, pref_ft_loss, reinforce_loss, rwr_loss)


@dataclass
class Config:
    seeds: str = '0 1 2 3 4 5 6 7 8 9'      # the seeds to run, or to complete
    csv: str = 'studies/results/bandit.csv'     # the table to add to; the picture beside it
    quick: bool = False             # ten steps of every run for one seed, into its own table


N, OFF, ON = 10, 'offline', 'on-policy'         # responses in a group; where the data are from
TASKS = {'R1': peaked(70), 'R2': peaked(20)}
LOSSES = {
    'Best-of-N': best_of_n_loss, 'REINFORCE': reinforce_loss, 'PPO': ppo_loss,
    'REINFORCE, own mean': lambda p, b: reinforce_loss(p, b | {'advantages': b['whitened']}),
    'PPO, own mean': lambda p, b: ppo_loss(p, b | {'advantages': b['whitened']}),
    'RWR': partial(rwr_loss, beta=0.2), 'FeedMe': partial(binary_feedme_loss, bar=0.5),
    'Pref-FT, far pairs': partial(pref_ft_loss, threshold=0.2),
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


# ----------------------------------------------------------------------------- the runs

def runs():
    """Every run's numbers, as they stand in its row; at the lr given, then at the best one."""
    for name, (samples, M, L, methods) in EXPERIMENTS.items():
        for method, lr, best in methods:
            for (B, T), best_lrs in best.items():
                for task, best_lr in zip(TASKS, best_lrs):
                    numbers = dict(task=task, method=method, B=B, T=T, M=M, L=L, samples=samples,
                                   data=OFF if B == samples else ON)
                    yield {'experiment': name, **numbers, 'lr': lr}
                    yield {'experiment': f'{name}, best lr', **numbers, 'lr': best_lr}


def run_seed(seed, quick):
    """A seed's rows: every run at its end; those of the 2 x 2 after every 1000 samples too."""
    rows = []
    for numbers in runs():
        table = Table(seed, TASKS[numbers['task']], numbers['L'], N)
        descent = train_table(table, LOSSES[numbers['method']],
                              *(numbers[name] for name in ('lr', 'samples', 'B', 'M', 'T')))
        steps = 10 if quick else numbers['samples'] // numbers['M'] * numbers['T']
        show = steps if quick or '2 x 2' not in numbers['experiment'] else steps // 6
        for step, part in enumerate(itertools.islice(descent, steps), 1):
            if step % show == 0:
                rows.append({'seed': seed, **numbers, 'step': step, 'last': int(step == steps),
                             **table.measure(), **table.log_ratios(part),
                             'command': f'python -m studies.bandit --seeds={seed}'})
    return rows


def by_run(rows):
    """Mean reward of last rows by (experiment, task, method, B, T or data); 'moved': kl_collect."""
    values, varies = {}, {'staleness': 'B', 'reuse': 'T'}
    for row in select(rows, last=1):
        name = row['experiment']
        key = row['task'], row['method'], row[varies.get(name.split(',')[0], 'data')]
        values.setdefault((name, *key), []).append(row['reward'])
        if name == 'reuse':
            values.setdefault(('moved', *key), []).append(row['kl_collect'])
    return {key: statistics.fmean(each) for key, each in values.items()}


def gap(r, experiment, low, high, task='R1'):
    """How far the reward of one run is above that of another, (method, B, T or data) each."""
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


# ----------------------------------------------------------------------------- the picture

COLOR = dict(zip(('Best-of-N', 'DPO', 'REINFORCE', 'PPO', 'REINFORCE, own mean', 'PPO, own mean'),
                 (*COLORS[:4], *COLORS[6:4:-1])))
POINTS = dict(marker='o', markersize=4, capsize=2)
TITLES = ('reference and rewards', 'reward by B, samples a collection', 'reward by T, passes',
          'reward by loss and data, T = 4', 'R1: reward and KL', 'R2: reward and KL')


def draw_sweep(ax, rows, experiment, x):
    """Reward over B or T: R1 a line, R2 dashed; dotted, R1 with the best lr at every point."""
    for method, color in COLOR.items():
        for name, task, style in (
                (experiment, 'R1', dict(label=method)), (experiment, 'R2', dict(linestyle='--')),
                (f'{experiment}, best lr', 'R1', dict(linestyle=':', marker=''))):
            if found := select(rows, experiment=name, task=task, method=method):
                ax.errorbar(*mean_and_spread(found, x, 'reward'), color=color, **POINTS | style)
    values = sorted({row[x] for row in select(rows, experiment=experiment)})
    ax.set_xscale('log', base=2)
    ax.set_xticks(values, map(str, values))


def draw_tasks(axes, rows):
    """By task: its reward, each loss on fixed data, and reward against KL in the 2 x 2."""
    ref = reference()
    for ax, color, (task, reward) in zip(axes[4:], COLORS[4:], TASKS.items()):
        axes[0].plot(reward, color=color, label=task)
        fixed = [{**row, 'name': f"{row['method'].split(',')[0]}\n{row['data']}"}
                 for row in select(rows, experiment='fixed data', task=task)]
        axes[3].errorbar(*mean_and_spread(fixed, 'name', 'reward'), color=color, label=task,
                         **POINTS, linestyle='none')
        axes[3].axhline((best_of_n(ref, reward, N) * reward).sum(), color=color, linestyle=':')
        best = [optimum(ref, reward, beta) for beta in torch.logspace(1, -2, 99).tolist()]
        ax.plot([10 * (p * (p / ref).log()).sum() for p in best],       # of 10 choices
                [(p * reward).sum() for p in best], color=GREY, linewidth=1)
        for method, data in itertools.product(COLOR, (OFF, ON)):
            if found := select(rows, experiment='2 x 2', task=task, method=method, data=data):
                _, kl, _ = mean_and_spread(found, 'step', 'kl')
                ax.errorbar(kl, *mean_and_spread(found, 'step', 'reward')[1:], **POINTS,
                            color=COLOR[method], label=f'{data} {method}',
                            linestyle='--' if data == OFF else '-')
        ax.set_xlabel('KL(policy, ref), nats', fontsize=10)
    axes[0].fill_between(range(100), ref / ref.max(), step='mid', color='#cccccc', label='ref')
    axes[3].tick_params(axis='x', labelrotation=60)


def draw(rows):
    """The picture, a matplotlib Figure: the bandit, both sweeps, fixed data, reward and KL."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 7.8), dpi=150, layout='constrained')
    axes = figure.subplots(2, 3).flatten()
    draw_sweep(axes[1], rows, 'staleness', 'B')
    draw_sweep(axes[2], rows, 'reuse', 'T')
    draw_tasks(axes, rows)
    for ax, title in zip(axes, TITLES):
        ax.set_title(title, loc='left', fontsize=11)
        ax.spines[['top', 'right']].set_visible(False)
        ax.tick_params(labelsize=9, color=GREY, labelcolor=GREY)
        ax.set_ylim(0, 1.05)
        ax.legend(frameon=False, fontsize=9)
    figure.supxlabel('Means and standard deviations over seeds. Above: line R1, dashed R2, dotted '
                     'R1 at the best lr of each point.\nBelow: dotted, where imitating the best of '
                     '10 ends; grey, the most reward there is at a KL.', fontsize=10, color=GREY)
    return figure


def main(cfg):
    """Runs the seeds that the table lacks, prints means and claims, draws; returns what failed."""
    path, seeds = Path(cfg.csv), parse_seeds(cfg.seeds)
    if cfg.quick:
        path, seeds = path.with_stem(path.stem + '-quick'), seeds[:1]
    rows = complete(path, seeds, lambda seed: run_seed(seed, cfg.quick))
    show_means(select(rows, last=1), ('experiment', 'task', 'method', 'B', 'T', 'lr'),
               ('reward', 'kl', 'kl_collect', 'entropy', 'chosen', 'rejected'))
    failed = show_claims(CHECKS, {seed: by_run(select(rows, seed=seed)) for seed in seeds})
    print('hold of the means over seeds:', sum(holds(by_run(rows)) for holds in CHECKS.values()))
    if not cfg.quick:
        save_picture(lambda: draw(rows), path.with_suffix('.png'))
    return failed


if __name__ == '__main__':
    run_cli(main, Config)
