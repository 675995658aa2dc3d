"""
Min, Mode and Skew Length: the unified algorithm on a GPT, a learned reward and the true one.

The paper's claims (Tajwar et al. 2024, section 5). Where the reward peaks where the reference
hardly goes (Min, Skew), fresh samples lead farther than given pairs, and of given pairs DPO and
IPO, which push down too, make more than Pref-FT; where it peaks at the reference's mode (Mode)
all are about alike. The reward model is learned from the same pairs.

    Min        gold is minus the number of letters; the reference, SFT, writes about 20 of them
    Mode       minus its distance from the mean of this seed's own reference
    Skew       as Min, but the pairs are of responses that are nearly all long
    Toy        data/toy with its exact judge: the stand-in for AlpacaFarm and UltraFeedback

data/lengths.py has the language. Every method starts from train_sft's policy and learns from the
pairs, or from the scores of train_rm's reward model, which has learned from them (on Toy from
more of the kind). REINFORCE and PPO have the KL in their rewards, and no value model: A_t is what
is still to come, whitened. Steps and labels are not equal: offline methods take about 124 steps on
2000 labels, on-policy ones 100, PPO 400, on 6400 of the reward model's scores besides.
All run at one learning rate, 3e-4, from a grid of 3e-4 and 1e-3 on seed 100, mostly on Min and
Skew. It is not the best of each: rows at each one's own were dropped after a look at seeds 0 and 3,
where offline DPO at 3e-3 wrote 1.2 letters with one and 26.7 with the other. At T = 1 clip_frac is
0, and kl_collect that of a single step. What to expect: Pref-FT hardly moves; on-policy methods go
as far as the reward model knows. An order holds only by 2 standard errors of the difference, seed
by seed.
What it does not do: the paper's own skew, whose exact form is not known here; a 1.4B model.

    python -m studies.length
    python -m studies.length --tasks=Toy --seeds=0
    wrote studies/results/length.png
"""
import itertools
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import train_rm
import train_sft
from data.lengths import MOST, gold, write_data, write_pairs
from data.toy import prepare
from data.text import encode_rows, load_judge, load_split, load_text
from prefgpt import GPT, UserError, load_checkpoint, load_model, run_cli
from studies.curves import COLORS, GREY
from studies.policies import Gpt, train_gpt
from studies.table import (complete, mean_and_spread, parse_seeds, save_picture, select,
                           show_means)
from studies.unified import (best_of_n_loss, dpo_pairs_loss, ipo_pairs_loss, ppo_loss, pref_ft_loss,
                             reinforce_loss, rwr_loss)


@dataclass
class Config:
    seeds: str = '0 1 2 3 4'        # the seeds to run, or to complete
    tasks: str = 'Min Mode Skew'    # which of Min, Mode, Skew and Toy
    csv: str = 'studies/results/length.csv'     # the table to add to; the picture beside it
    quick: bool = False             # few steps of everything for one seed, into its own table


BETA, N = 0.1, 4                    # weight of KL(policy, ref); responses to a prompt
LENGTH = dict(sft=800, rm=600, pairs=2000, collections=100, B=64, M=64, samples=512, most=MOST,
              model=dict(n_head=2, n_embd=32, block_size=64, batch_size=32, max_new_tokens=MOST))
TOY = dict(sft=1250, rm=2000, pairs=4000, collections=60, B=128, M=64, samples=400, most=64,
           model={})
QUICK = dict(sft=2, rm=2, pairs=30, collections=1, B=16, M=16, samples=8, most=8)
LR = 3e-4                           # of all methods
# method -> its loss, passes T, and whether it is offline
METHODS = {
    'Pref-FT': (pref_ft_loss, 2, True),
    'DPO': (partial(dpo_pairs_loss, beta=BETA), 2, True),
    'IPO': (partial(ipo_pairs_loss, beta=BETA), 2, True),
    'on-policy Best-of-N': (best_of_n_loss, 1, False),
    'on-policy RWR': (partial(rwr_loss, beta=1.0), 1, False),
    'on-policy DPO': (partial(dpo_pairs_loss, beta=BETA), 1, False),
    'on-policy IPO': (partial(ipo_pairs_loss, beta=BETA), 1, False),
    'REINFORCE': (reinforce_loss, 1, False),
    'PPO': (ppo_loss, 4, False)}


# ----------------------------------------------------------------------------- the runs

def first_stages(seed, task, size, out):
    """Data, SFT and reward model into out; returns gold(prompt, response), the mode on Mode, and
    the reward model's accuracy on held-out pairs."""
    data, common = f'{out}/data', dict(seed=seed, resume=True, eval_every=9999)
    if task == 'Toy':
        prepare.main(prepare.Config(seed=seed, out=data))
    else:
        write_data(Path(data), seed)
    train_sft.main(train_sft.Config(data=data, out=f'{out}/sft', steps=size['sft'],
                                    **size['model'], **common))
    if task == 'Toy':
        judge, mode = load_judge('data/toy/reward.py'), ''
    else:
        saved = load_checkpoint(f'{out}/sft', ['sft'])
        mode = write_pairs(Path(data), seed, task, load_model(GPT, saved, 'policy', 'cpu'),
                           load_text(data, saved)[0],
                           {'train': size['pairs'], 'val': size['pairs'] // 10})
    rm = train_rm.main(train_rm.Config(data=data, init=f'{out}/sft', out=f'{out}/rm',
                                       steps=size['rm'], **common))
    return (lambda prompt, response: judge(prompt, response)['reward'] if task == 'Toy'
            else gold(task, response, mode)), mode, rm['accuracy']


def rows_of(out, kind, size):
    """Training rows and held-out rows of a kind as ids, those of pairs cut to the size."""
    saved = load_checkpoint(f'{out}/sft', ['sft'])
    tokenizer, text = load_text(f'{out}/data', saved)
    count, room = (size['pairs'], 0) if kind == 'pairs' else (None, size['most'])
    return [encode_rows(rows[:count], kind, tokenizer, saved['model']['block_size'], room, name)
            for name, rows in zip(('train', 'val'),
                                  load_split(f'{out}/data', kind, text['template']))]


def run_task(seed, task, quick):
    """A seed's rows of a task: the reference, then every method."""
    size = (TOY if task == 'Toy' else LENGTH) | (QUICK if quick else {})
    out = f"out/{'quick-' if quick else ''}length-{seed}/{task.lower()}"
    judge, mode, rm_accuracy = first_stages(seed, task, size, out)
    pairs, held_out = rows_of(out, 'pairs', size)
    prompts, val = ([row[0] for row in rows] for rows in rows_of(out, 'prompts', size))
    val, rows = list(itertools.islice(itertools.cycle(val), size['samples'])), []
    for method in ('reference', *METHODS):
        gpt = Gpt(seed, f'{out}/sft', f'{out}/rm', prompts, size['most'], N, BETA)
        T, clip_frac = 0, 0.0
        if method in METHODS:
            loss, T, offline = METHODS[method]
            clip_frac = train_gpt(gpt, loss, LR, size, T, pairs if offline else None)
        rows.append({'seed': seed, 'task': task, 'method': method, 'T': T, 'lr': f'{LR:g}',
                     **gpt.measure(judge, val, held_out[:200]), 'clip_frac': clip_frac,
                     'mode': mode, 'rm_accuracy': rm_accuracy, 'threads': torch.get_num_threads(),
                     'command': f'python -m studies.length --tasks={task} --seeds={seed}'})
        print(f"{task} {method}: gold {rows[-1]['gold']:.2f}, kl {rows[-1]['kl']:.2f}", flush=True)
    return rows


# ----------------------------------------------------------------------------- what is expected

# task -> orders of gold, from low to high, by which the paper's claims are judged. On Mode all are
# about alike, if the means of all methods lie within ALIKE letters
CHAINS = {
    'Min': [('reference', 'Pref-FT', 'DPO', 'on-policy DPO'), ('DPO', 'PPO'), ('DPO', 'REINFORCE'),
            ('DPO', 'on-policy Best-of-N'), ('Pref-FT', 'IPO', 'on-policy IPO')],
    'Mode': [],
    'Skew': [('Pref-FT', 'reference', 'DPO', 'on-policy DPO'), ('DPO', 'PPO'),
             ('DPO', 'REINFORCE'), ('DPO', 'on-policy Best-of-N'),
             ('reference', 'IPO', 'on-policy IPO')],
    'Toy': [('reference', 'Pref-FT', 'DPO', 'on-policy DPO'), ('DPO', 'PPO'),
            ('Pref-FT', 'IPO', 'on-policy IPO')]}
ALIKE = 1.7


def order(rows, low, high):
    """
    Of the gold of two methods, seed by seed: in how many seeds high is above low, the mean
    difference, and its standard error, which is infinite of one seed.
    """
    by_seed = [{row['seed']: row['gold'] for row in select(rows, method=method)}
               for method in (low, high)]
    gaps = [by_seed[1][seed] - by_seed[0][seed] for seed in by_seed[0]]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float('inf')
    return sum(gap > 0 for gap in gaps), statistics.fmean(gaps), error


def check(rows):
    """Prints of every order whether it holds by 2 standard errors; returns those that do not."""
    lost = []
    for task in dict.fromkeys(row['task'] for row in rows):
        some = select(rows, task=task)
        seeds = len({row['seed'] for row in some})
        for low, high in (pair for chain in CHAINS[task] for pair in zip(chain, chain[1:])):
            above, gap, error = order(some, low, high)
            holds = gap > 2 * error
            verdict = 'holds' if holds else 'the other way' if gap < -2 * error else 'open'
            print(f'{task}: gold of {low} < {high}: in {above} of {seeds} seeds, '
                  f'by {gap:.2f} ± {error:.2f}: {verdict}')
            lost += [] if holds else [(task, low, high)]
        if task == 'Mode':
            names, means, _ = mean_and_spread(some, 'method', 'gold')
            gap = max(means[1:]) - min(means[1:])           # the first one is the reference
            print(f'{task}: all methods are about alike: the means lie within {gap:.2f}, not above '
                  f"{ALIKE}: {'holds' if gap <= ALIKE else 'does not hold'}")
            lost += [] if gap <= ALIKE else [(task, 'alike')]
    return lost


# ----------------------------------------------------------------------------- the picture

def draw_task(axes, rows):
    """Gold by method, and gold against kl; offline methods in one colour, on-policy in another."""
    names, golds, spreads = mean_and_spread(rows, 'method', 'gold')
    _, kls, kl_spreads = mean_and_spread(rows, 'method', 'kl')
    for line, name in enumerate(names):
        style = dict(marker='o', markersize=5, capsize=2, color='black' if name == 'reference'
                     else COLORS[1] if METHODS[name][2] else COLORS[0])
        axes[0].errorbar(golds[line], line, xerr=spreads[line], **style)
        axes[1].errorbar(kls[line], golds[line], xerr=kl_spreads[line], yerr=spreads[line], **style)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    axes[0].set_xlabel('gold', fontsize=10)
    axes[1].set_xlabel('KL(policy, ref), nats', fontsize=10)


def draw(rows):
    """The picture, a matplotlib Figure: a column for a task."""
    from matplotlib.figure import Figure
    tasks = [*dict.fromkeys(row['task'] for row in rows)]
    figure = Figure(figsize=(12, 7), dpi=150, layout='constrained')
    axes = figure.subplots(2, len(tasks), squeeze=False)
    for column, task in enumerate(tasks):
        draw_task(axes[:, column], select(rows, task=task))
        axes[0, column].set_title(task, loc='left', fontsize=11)
    for ax in axes[0, 1:]:
        ax.set_yticklabels([])
    for ax in axes.flat:
        ax.spines[['top', 'right']].set_visible(False)
        ax.tick_params(labelsize=9, color=GREY, labelcolor=GREY)
    axes[1, 0].set_ylabel('gold', fontsize=10)
    figure.supxlabel('Means and standard deviations over seeds. Orange: offline, on given pairs; '
                     'blue: on-policy, on the scores of a reward model.', fontsize=10, color=GREY)
    return figure


def main(cfg):
    """Runs what the table lacks, prints means and orders, draws; returns what does not hold."""
    path, seeds, tasks = Path(cfg.csv), parse_seeds(cfg.seeds), cfg.tasks.split()
    if not tasks or not set(tasks) <= set(CHAINS):
        raise UserError(f'--tasks={cfg.tasks!r}: of ' + ', '.join(CHAINS))
    if cfg.quick:
        path, seeds = path.with_stem(path.stem + '-quick'), seeds[:1]
    rows = [row for seed, task in itertools.product(seeds, tasks) for row in complete(
        path, [seed], lambda seed: run_task(seed, task, cfg.quick), task=task)]
    show_means(rows, ('task', 'method'),
               ('gold', 'score', 'kl', 'kl_collect', 'length', 'entropy', 'chosen', 'rejected',
                'margin', 'clip_frac'))
    lost = check(rows)
    if not cfg.quick:
        save_picture(lambda: draw(rows), path.with_suffix('.png'))
    return lost


if __name__ == '__main__':
    run_cli(main, Config)
