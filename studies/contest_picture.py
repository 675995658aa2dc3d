"""
The picture of studies/contest.py: what its table holds, the paper's numbers beside ours.

Bars and points are means over seeds, whiskers standard deviations.
"""
from data.contest.language import LEVELS
from studies.style import BARS, COLORS, GREY, POINTS, frame, names, new_figure
from studies.table import mean_and_spread, select

PPO = 'ppo + ema 0.001'         # the arm shown as PPO, here and in contest.py
# The first panels: arm -> its name there, with the paper's number where it has one:
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


def spreads_of(rows, arms, column, level='interview'):
    """Returns the means over seeds of these arms, and their standard deviations."""
    return zip(*(mean_and_spread([row[column] for row in select(rows, arm=arm, level=level)])
                 for arm in arms))


def draw_bars(ax, rows, column, panel):
    """Draws an arm per line; the paper's number is in brackets."""
    means, spreads = spreads_of(rows, SHOWN, column)
    colors = [COLORS[0 if arm in ('sft', PPO) else 1] for arm in SHOWN]
    ax.barh(list(SHOWN.values()), means, color=colors, height=0.6, xerr=spreads, **BARS)
    ax.invert_yaxis()
    frame(ax, *panel)


def draw_ladder(ax, rows):
    """Draws pass@1 by rung, as a multiple of SFT's in the same seed, beside the paper's."""
    sft = {row['seed']: row['pass@1'] for row in select(rows, level='interview', arm='sft')}
    ratios = [{**row, 'ratio': row['pass@1'] / sft[row['seed']]}
              for row in select(rows, level='interview')]
    for lr, color in zip((1e-3, 3e-4), COLORS):
        ax.errorbar(RUNGS, *spreads_of(ratios, [f'ppo {rung} {lr:g}' for rung in RUNGS], 'ratio'),
                    color=color, label=f'lr {lr:g}', **POINTS)
    ax.plot(RUNGS, [rung / 10.1 for rung in PAPER_RUNGS], color=GREY, marker='s', ls='--',
            label='paper, APPS pass@5')
    ax.axhline(1, color=GREY, lw=0.8)
    ax.set_ylim(bottom=0)
    frame(ax, 'the ladder', "multiple of SFT's pass@1", "PPO's rung, each on the one before")
    names(ax, loc='lower right')


def draw_logprobs(ax, rows):
    """Draws how far DPO moved chosen and rejected responses, on held-out pairs."""
    arms = [arm for arm in SHOWN if 'dpo' in arm]
    for side, color, shift in (('chosen', COLORS[2], -0.2), ('rejected', COLORS[3], 0.2)):
        moved = [{**row, 'moved': row[side] - row[f'{side}_before']} for row in rows
                 if row['arm'] in arms]
        means, spreads = spreads_of(moved, arms, 'moved')
        ax.barh([place + shift for place in range(len(arms))], means, 0.4, xerr=spreads,
                color=color, label=side, **BARS)
    ax.set_yticks(range(len(arms)), [SHOWN[arm].split(' (')[0] for arm in arms])
    ax.invert_yaxis()
    frame(ax, 'held-out pairs after DPO', below='log pi / ref, nats')
    names(ax)


def draw_pairs(ax, rows, columns, arms, panel):
    """Draws two arms side by side, at each (label, column, level)."""
    for arm, color, shift in zip(arms, COLORS, (-0.2, 0.2)):
        numbers = [mean_and_spread([row[column] for row in select(rows, arm=arm, level=level)])
                   for _, column, level in columns]
        means, spreads = zip(*numbers)
        ax.bar([place + shift for place in range(len(columns))], means, 0.4, yerr=spreads,
               color=color, label=arms[arm], **BARS)
    ax.set_xticks(range(len(columns)), [label for label, *_ in columns])
    frame(ax, *panel)
    names(ax)


def draw(rows):
    """Draws the picture of the table, a matplotlib Figure."""
    figure = new_figure(13, 8)
    axes = figure.subplots(2, 3).flat
    draw_bars(axes[0], rows, 'pass@1', ('pass@1', '', 'share (paper: pass@5, * 10@1k)'))
    draw_bars(axes[1], rows, 'valid', ('valid programs', '', 'share of samples'))
    draw_logprobs(axes[2], rows)
    draw_ladder(axes[3], rows)
    draw_pairs(axes[4], rows, [(f'{name}\n{level[:6]}.', name, level) for level in LEVELS[1:]
                               for name in ('pass@1', '10@k')],
               {'sft': 'SFT', PPO: 'PPO'}, ('SFT and PPO, by level', 'share'))
    draw_pairs(axes[5], rows, [('training\nscore', 'last_quarter', 'interview'),
                               ('pass@1\ninterv.', 'pass@1', 'interview'),
                               ('pass@1\ncompet.', 'pass@1', 'competition')],
               {'ppo binding fixed': 'fixed reference', 'ppo binding ema': 'EMA 0.1'},
               ('where the KL binds, beta 0.25', 'share'))
    return figure
