"""
The picture of studies/contest.py: what its table holds, the paper's numbers beside ours.

Means over seeds; whiskers are standard deviations. What it does not do: run or choose anything.
"""
import statistics

from data.contest.language import LEVELS
from studies.curves import COLORS, GREY

PPO = 'ppo + ema 0.001'         # the arm that stands for PPO, here and in contest.py
# What stands in the first panels: arm -> its name there, with the paper's number where it has one:
# pass@5 on APPS, interview level, CodeLlama-34B (table 7); DPO's is 10@1k on CodeContests (table 8)
SHOWN = {'sft': 'SFT (10.1 %)', 'dpo 0.0001': 'DPO 1e-4', 'dpo 0.001': 'DPO 1e-3',
         'dpo 0.003': 'DPO 3e-3 (*0.0 %)', 'dpo on-policy 0.0003': 'DPO on-policy 3e-4',
         'dpo on-policy 0.001': 'DPO on-policy 1e-3', 'iter 0.0001': 'Iter 1e-4',
         'iter 0.0003': 'Iter 3e-4', 'iter 0.001': 'Iter 1e-3',
         'iter + winners 0.0001': 'Iter + winners 1e-4',
         'iter + winners 0.0003': 'Iter + winners 3e-4',
         'iter + winners 0.001': 'Iter + winners 1e-3 (9.3 %)', PPO: 'PPO (18.0 %)'}
RUNGS = ('baseline', '+ norm', '+ batch', '+ ema')
PAPER_RUNGS = (2.4, 11.4, 14.6, 18.0)       # table 3: pass@5, APPS, interview level; SFT 10.1


def mean_and_spread(rows, arm, column, level='interview'):
    """Over the seeds, of one arm."""
    values = [row[column] for row in rows if row['arm'] == arm and row['level'] == level]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def draw_bars(ax, rows, column, title):
    """An arm a line; the bar is the mean over seeds, its whisker the standard deviation."""
    numbers = [mean_and_spread(rows, arm, column) for arm in SHOWN]
    colors = [COLORS[0 if arm in ('sft', PPO) else 1] for arm in SHOWN]
    ax.barh(list(SHOWN.values()), [mean for mean, _ in numbers], color=colors, height=0.6,
            xerr=[spread for _, spread in numbers], error_kw=dict(lw=1, ecolor=GREY))
    ax.invert_yaxis()
    ax.set_title(title, loc='left', fontsize=10)


def draw_ladder(ax, rows):
    """pass@1 by rung, as a multiple of SFT's in the same seed, beside the paper's."""
    sft = {row['seed']: row['pass@1'] for row in rows
           if row['level'] == 'interview' and row['arm'] == 'sft'}
    ratios = [{**row, 'ratio': row['pass@1'] / sft[row['seed']]} for row in rows
              if row['level'] == 'interview']
    for lr, color in zip((1e-3, 3e-4), COLORS):
        numbers = [mean_and_spread(ratios, f'ppo {rung} {lr:g}', 'ratio') for rung in RUNGS]
        ax.errorbar(RUNGS, [mean for mean, _ in numbers], [spread for _, spread in numbers],
                    color=color, marker='o', capsize=3, label=f'lr {lr:g}')
    ax.plot(RUNGS, [rung / 10.1 for rung in PAPER_RUNGS], color=GREY, marker='s', ls='--',
            label='paper, APPS pass@5')
    ax.axhline(1, color=GREY, lw=0.8)
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize=8)
    ax.set_title("the ladder: pass@1 / SFT's", loc='left', fontsize=10)


def draw_logprobs(ax, rows):
    """How far DPO moved chosen and rejected responses, in nats, on held-out pairs."""
    arms = [arm for arm in SHOWN if 'dpo' in arm]
    for side, color, shift in (('chosen', COLORS[2], -0.2), ('rejected', COLORS[3], 0.2)):
        moved = [{**row, 'moved': row[side] - row[f'{side}_before']} for row in rows
                 if row['arm'] in arms]
        numbers = [mean_and_spread(moved, arm, 'moved') for arm in arms]
        ax.barh([place + shift for place in range(len(arms))], [mean for mean, _ in numbers], 0.4,
                xerr=[spread for _, spread in numbers], color=color, label=side,
                error_kw=dict(lw=1, ecolor=GREY))
    ax.set_yticks(range(len(arms)), [SHOWN[arm].split(' (')[0] for arm in arms])
    ax.invert_yaxis()
    ax.legend(frameon=False, fontsize=8)
    ax.set_title('log pi / ref of held-out pairs, nats', loc='left', fontsize=10)


def draw_pairs(ax, rows, columns, arms, title):
    """Two arms side by side, at each (label, column, level)."""
    for arm, color, shift in zip(arms, COLORS, (-0.2, 0.2)):
        numbers = [mean_and_spread(rows, arm, column, level) for _, column, level in columns]
        ax.bar([place + shift for place in range(len(columns))], [mean for mean, _ in numbers], 0.4,
               yerr=[spread for _, spread in numbers], color=color, label=arms[arm],
               error_kw=dict(lw=1, ecolor=GREY))
    ax.set_xticks(range(len(columns)), [label for label, *_ in columns])
    ax.legend(frameon=False, fontsize=8)
    ax.set_title(title, loc='left', fontsize=10)


def draw(rows):
    """The picture of the table, a matplotlib Figure."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 7.5), dpi=150, layout='constrained')
    axes = figure.subplots(2, 3).flat
    draw_bars(axes[0], rows, 'pass@1', 'pass@1 (paper: pass@5, *10@1k)')
    draw_bars(axes[1], rows, 'valid', 'share of valid programs')
    draw_logprobs(axes[2], rows)
    draw_ladder(axes[3], rows)
    draw_pairs(axes[4], rows, [(f'{name}\n{level[:6]}.', name, level) for level in LEVELS[1:]
                               for name in ('pass@1', '10@k')],
               {'sft': 'SFT', PPO: 'PPO'}, 'SFT and PPO, by level')
    draw_pairs(axes[5], rows, [('training\nscore', 'last_quarter', 'interview'),
                               ('pass@1\ninterv.', 'pass@1', 'interview'),
                               ('pass@1\ncompet.', 'pass@1', 'competition')],
               {'ppo binding fixed': 'fixed', 'ppo binding ema': 'EMA 0.1'},
               'where the KL binds')
    for ax in figure.axes:
        ax.spines[['top', 'right']].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure
