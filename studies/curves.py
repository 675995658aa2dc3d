"""
Draws the log.jsonl files of runs as one picture.

A panel per metric, or per two that are read together, and a block of panels per stage. Runs of one
stage share its panels, each in its own colour; a run in progress is drawn as far as it has come.
The y axis is made for most steps and all evaluations: a spike, or the steep fall of the first
steps, may leave the panel, so that the rest can be read. gold over kl_sft has a point for every
evaluation: what the judge says for the distance travelled, on a square-root axis as in Gao et al.
2023. Clocks, the learning rate and what STAGES does not name are not drawn, and IPO is drawn as
DPO, though its loss is not in nats. --panel=NAME draws one panel alone, large, by its first name.

    python -m studies.curves out/toy/sft out/toy/rm out/toy/ppo out/toy/dpo
    python -m studies.curves out/toy/ppo out/toy/hacked --panel=gold-over-kl_sft --out=out/gold.svg
    python -m studies.curves --front --results      # README.md's picture, of the runs in out/toy
    wrote studies/results/front.png
"""
import importlib.util, json, math, statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.text import DataError
from prefgpt import UserError, run_cli
from studies.style import COLORS, GREY, frame, new_figure, save_picture
from studies.table import OWN, RESULTS, read_rows, select


@dataclass
class Config:
    runs: tuple = ()                # run folders, of any stages
    out: str = ''                   # the PNG or SVG file; '': out/studies/curves.png and the like
    panel: str = ''                 # this panel alone, such as score or gold-over-kl_sft; '': all
    results: bool = False           # the committed picture instead: studies/results/curves.png
    front: bool = False             # instead: the front page's picture, of out/toy and of toy.csv


# The panels of a stage, in reading order: the metrics in it (the second one is dashed), their unit,
# and, if it is not the steps, what the x axis shows
NORM = (('norm',), 'of the gradient, unclipped')
PAIRS = [(('loss',), 'nats per pair'), (('accuracy',), 'share of pairs')]
STAGES = {
    'SFT': [(('loss',), 'nats per token'), NORM],
    'reward model': [*PAIRS, (('margin',), 'difference of scores'),
                     (('chosen', 'rejected'), 'mean score'), NORM],
    'PPO': [(('score',), 'logits, mean per response'), (('gold',), "mean of the judge's rewards"),
            (('gold',), "mean of the judge's rewards", 'kl_sft'),
            (('kl', 'kl_sft'), 'nats per response'), (('entropy',), 'nats per token'),
            (('length',), 'tokens per response'), (('eos',), 'share of responses'),
            (('ratio',), 'in the first minibatch'), (('clip_frac',), 'share of ratios'),
            (('approx_kl',), 'nats per token'), (('explained_variance',), 'share of variance'),
            (('adv_std',), 'units of the score'), (('pg_loss',), 'per token'),
            (('vf_loss',), 'per token'), NORM],
    'DPO': [*PAIRS, (('margin',), 'beta × log-ratios'),
            (('chosen', 'rejected'), 'nats per response'), NORM]}
# Of the front picture: a run, its panel's title, metrics and unit, and what its lines are
FRONT = [('out/toy/sft', '1. SFT: loss', ('loss',), 'nats per token', ('training', 'held out')),
         ('out/toy/rm', '2. Reward model: accuracy', ('accuracy',), 'share of pairs',
          ('training', 'held out')),
         ('out/toy/ppo', '3. PPO: score and gold', ('score', 'gold'),
          'logits (left), points (right)',
          ('score, training', 'score, held out', 'gold: exact judge'))]
COLUMNS, PANEL, LINE = 5, 2.0, 0.35     # panels in a row; inches: of a row, a line of names


def read_curves(path):
    """Reads a log as {metric: (steps, values)}, without half a last line or what is not finite."""
    curves = {}
    for number, line in enumerate(Path(path).read_text('utf-8', 'replace').splitlines(True), 1):
        if not line.endswith('\n'):
            break
        try:
            row = json.loads(line)
            step = row['step']
        except (ValueError, KeyError, TypeError):       # not JSON; no step; not even a dict
            raise DataError(f'{path}:{number}: not a row of a log: {line[:40]!r}') from None
        for name, value in row.items():
            if name != 'step' and isinstance(value, (int, float)) and math.isfinite(value):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return curves


def stage_of(curves):
    """Returns the key of STAGES whose runs log such metrics."""
    if 'score' in curves:
        return 'PPO'
    if 'margin' not in curves:
        return 'SFT'
    # A reward model's margin is chosen - rejected; DPO's is measured from the reference
    margin, chosen, rejected = (dict(zip(*curves.get(name, ((), ()))))
                                for name in ('margin', 'chosen', 'rejected'))
    same = all(abs(chosen[step] - rejected[step] - margin[step]) < 1e-3
               for step in margin.keys() & chosen.keys() & rejected.keys())
    return 'reward model' if same else 'DPO'


def read_runs(runs):
    """Reads the runs as {stage: {run: curves}}: stages in STAGES' order, runs in that given."""
    stages = {stage: {} for stage in STAGES}
    for run in runs:
        path = Path(run) / 'log.jsonl'
        if not path.is_file():
            raise UserError(f'{run}: no log.jsonl there; name the --out of a training run')
        curves = read_curves(path)
        if not curves.keys() & {'loss', 'score'}:
            raise UserError(f'{path}: no step in it yet; draw it when the run has made one')
        stages[stage_of(curves)][run] = curves
    for stage, members in stages.items():
        if len(members) > len(COLORS):
            raise UserError(f'{len(members)} runs of {stage}: more than {len(COLORS)} cannot be '
                            'told apart in one picture; name fewer')
    return {stage: members for stage, members in stages.items() if members}


def running_mean(values, window):
    """Returns the mean over window values around each one: a mean of the past alone would lag."""
    sums, counts = (np.convolve(each, np.ones(window), 'same')
                    for each in (values, np.ones(len(values))))
    return sums / counts


def y_limits(values, kept):
    """Returns the ends of a y axis: all that is kept, and other values that are not far off."""
    quarter, three_quarters = np.quantile(values or kept, (0.25, 0.75))
    reach = 5 * (three_quarters - quarter)
    shown = [*(y for y in values if quarter - reach <= y <= three_quarters + reach), *kept]
    low, high = min(shown), max(shown)
    # A constant is a flat line, and so is a ratio that is off 1 by its rounding
    room = 0.05 * max(high - low, 0.2 * max(abs(low), abs(high)), 1e-6)
    return low - room, high + room


def draw_panel(ax, members, metrics, unit, title=''):
    """Draws every step faint, a running mean over it, evaluations as points; a colour per run."""
    every, kept = [], []                        # steps' values; what must stay in the picture
    faint = 0.3 / len(members) ** 0.5           # many runs, one over the other, are still faint
    for curves, color in zip(members.values(), COLORS):
        for metric, dash, face in zip(metrics, ('-', (0, (4, 1.5))), (color, 'white')):
            if metric in curves:
                steps, values = curves[metric]
                mean = running_mean(values, max(1, len(values) // 20))
                ax.plot(steps, values, color=color, linewidth=0.5, alpha=faint, zorder=1)
                ax.plot(steps, mean, color=color, linewidth=1.5, linestyle=dash)
                every += values
                kept += list(mean[len(mean) // 10:])        # a steep start may leave the panel
            if f'eval_{metric}' in curves:
                steps, values = curves[f'eval_{metric}']
                ax.plot(steps, values, color=color, linewidth=0.8, linestyle=dash, marker='o',
                        markersize=4, markerfacecolor=face)
                kept += values
    ax.set_ylim(*y_limits(every, kept))
    frame(ax, title or ' ━━  '.join(metrics) + ' ╍╍' * (len(metrics) == 2), unit)
    ax.ticklabel_format(useOffset=False)
    ax.locator_params(axis='x', nbins=4, integer=True)
    ax.locator_params(axis='y', nbins=5)


def draw_path(ax, members, metric, unit, x):
    """Draws what evaluations say of a metric over their x, a path that ends in the large point."""
    for curves, color in zip(members.values(), COLORS):
        if f'eval_{metric}' in curves:
            across, values = (curves[f'eval_{name}'][1] for name in (x, metric))
            across = np.maximum(across, 0)      # of samples: at first it may be just below 0
            ax.plot(across, values, color=color, linewidth=0.8, marker='o', markersize=4)
            ax.plot(across[-1], values[-1], 'o', color=color, markersize=8)
    # A hacked run goes a long way at last; what matters is won or lost at the beginning
    ax.set_xscale('function', functions=(np.sqrt, np.square))
    ax.set_xlim(left=0)
    ax.set_xticks([0, *(float(f'{ax.get_xlim()[1] * (i / 4) ** 2:.1g}') for i in range(1, 4))])
    ax.xaxis.set_major_formatter('{x:g}')
    frame(ax, f'{metric} over {x}', unit)
    ax.locator_params(axis='y', nbins=5)


def panels_of(stage, members):
    """Returns the panels of a stage whose metrics its runs have logged: {name: what to draw}."""
    logged = {name.removeprefix('eval_') for curves in members.values() for name in curves}
    panels = {}
    for metrics, unit, *x in STAGES[stage]:
        if found := [metric for metric in metrics if metric in logged]:
            panels['-over-'.join([found[0], *x])] = (found, unit, *x)
    return panels


def draw_one(ax, members, metrics, unit, x=None):
    """Draws a panel as panels_of describes it."""
    if x:
        draw_path(ax, members, metrics[0], unit, x)
    else:
        draw_panel(ax, members, metrics, unit)


def draw_alone(stages, name):
    """Draws one panel of {stage: {run: curves}}, a small Figure with large type: for a slide."""
    found = [(stage, members, panels[name]) for stage, members in stages.items()
             if name in (panels := panels_of(stage, members))]
    if len(found) != 1:
        names = [name for stage, members in stages.items() for name in panels_of(stage, members)]
        raise UserError(f'--panel={name} is one of {", ".join(stage for stage, *_ in found)}: name '
                        'the runs of one stage' if found else
                        f'--panel={name}: one of {", ".join(dict.fromkeys(names))}')
    [(stage, members, panel)] = found
    figure = new_figure(5.6, 3.15)              # 16:9
    ax = figure.subplots()
    draw_one(ax, members, *panel)
    ax.set_xlabel('step; points are held-out evaluations' if len(panel) == 2 else
                  f'{panel[2]} at each evaluation; the last one is large', fontsize=9, color=GREY)
    for run, color in zip(members, COLORS):
        ax.plot([], [], color=color, linewidth=2, label=run)
    ax.legend(frameon=False, fontsize=9)
    return figure


def draw(stages):
    """Draws the picture of {stage: {run: curves}}, a matplotlib Figure."""
    heads, panels, heights = [], [], []         # heads and panels: (row, what to draw there)
    for stage, members in stages.items():
        side_by_side = max(1, 125 // (max(map(len, members)) + 8))      # names beside the stage's
        heads.append((len(heights), stage, members, side_by_side))
        heights.append(LINE * math.ceil(len(members) / side_by_side))
        for i, panel in enumerate(panels_of(stage, members).values()):
            heights += [PANEL] * (i % COLUMNS == 0)
            panels.append((len(heights) - 1, i % COLUMNS, members, *panel))
    figure = new_figure(12, sum(heights) + LINE)
    grid = figure.add_gridspec(len(heights), 1 + max(column for _, column, *_ in panels),
                               height_ratios=heights)
    for row, stage, members, side_by_side in heads:
        ax = figure.add_subplot(grid[row, :])
        ax.axis('off')
        ax.set_title(stage, loc='left', y=0, fontsize=13, fontweight='bold')
        for run, color in zip(members, COLORS):
            ax.plot([], [], color=color, linewidth=2, label=run)
        ax.legend(loc='lower right', ncols=side_by_side, frameon=False, fontsize=10, borderpad=0,
                  borderaxespad=0)
    for row, column, *panel in panels:
        draw_one(figure.add_subplot(grid[row, column]), *panel)
    figure.supxlabel((8 * ' ').join(('steps', 'faint: every step', 'line: running mean',
                                     'points: held-out evaluations')), fontsize=10, color=GREY)
    return figure


def draw_front(stages):
    """Draws the front picture, a matplotlib Figure, of FRONT's runs and the committed toy.csv."""
    figure = new_figure(10, 2.6, dpi=132)           # large type for its width
    *axes, last = figure.subplots(1, 4)
    runs = {run: curves for members in stages.values() for run, curves in members.items()}
    for ax, (run, title, metrics, unit, names) in zip(axes, FRONT):
        draw_panel(ax, {run: runs[run]}, metrics[:1], unit, title)
        lines = ax.lines[1:]
        for metric in metrics[1:]:              # another unit, so an axis of its own, on the right
            other = ax.twinx()
            steps, values = runs[run][f'eval_{metric}']
            lines += other.plot(steps, values, 'o-', color=COLORS[1], linewidth=1.2, markersize=4)
            other.tick_params(labelsize=9, color=COLORS[1], labelcolor=COLORS[1])
            other.spines[['top', 'left', 'bottom']].set_visible(False)
            other.spines['right'].set_color(COLORS[1])
        ax.legend(lines, names, frameon=False, fontsize=9, labelspacing=0.25)
        ax.set_xlabel('step', fontsize=9, color=GREY)
    rows = select(read_rows(RESULTS / 'toy.csv'), answers='T=1')
    for place, stage in enumerate(('sft', 'ppo', 'dpo')):
        rewards = [row['reward'] for row in select(rows, stage=stage)]
        last.bar(place, statistics.fmean(rewards), color=COLORS[0], alpha=0.3, width=0.6)
        last.plot(np.linspace(place - 0.2, place + 0.2, len(rewards)), rewards, 'o',
                  color=COLORS[0], markersize=4)
    last.set_xticks(range(3), ('SFT', 'PPO', 'DPO'))
    last.axhline(0, color=GREY, linewidth=0.8)
    frame(last, f'Mean reward, {len(rewards)} seeds', 'by the exact judge, at T=1')
    return figure


def main(cfg):
    """Draws the runs, and returns what was drawn: {stage: {run: curves}}."""
    if importlib.util.find_spec('matplotlib') is None:
        raise UserError('the picture is drawn with matplotlib, which is not installed: '
                        'pip install matplotlib')
    if bool(cfg.runs) == cfg.front or cfg.panel and cfg.front:
        raise UserError('name at least one run folder, or --front without any')
    name = 'front.png' if cfg.front else f'{cfg.panel}.svg' if cfg.panel else 'curves.png'
    out = Path(cfg.out or (RESULTS if cfg.results else OWN) / name)
    if out.suffix not in ('.png', '.svg'):
        raise UserError(f'--out={cfg.out}: name a file that ends in .png or .svg')
    stages = read_runs(cfg.runs or [run for run, *_ in FRONT])
    save_picture(draw_front(stages) if cfg.front else draw_alone(stages, cfg.panel) if cfg.panel
                 else draw(stages), out)
    return stages


if __name__ == '__main__':
    run_cli(main, Config)
