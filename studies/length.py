"""
Min, Mode and Skew Length: the unified algorithm on a GPT, a learned reward and the true one.

Tajwar et al. 2024, section 5; the reward model is learned from the pairs that offline methods get.

    Min        gold is minus the number of letters; the reference, SFT, writes about 20 of them
    Mode       minus its distance from the mean of this seed's own reference
    Skew       as Min, but the pairs are of responses that are nearly all long
    Toy        data/toy with its exact judge: the stand-in for AlpacaFarm and UltraFeedback

studies/lengths.py has the language. Every method starts from train_sft's policy and learns from the
pairs, or from the scores of train_rm's reward model, which has learned from them (on Toy from
more of the kind). REINFORCE and PPO have the KL in their rewards, and no value model: A_t is what
is still to come, whitened. All run at one learning rate, which is not the best of each. An order of
two methods holds only by 2 standard errors of the difference, seed by seed. At T = 1 clip_frac is
0, and kl_collect that of a single step.

    python -m studies.length
    Min: gold of DPO < on-policy DPO: in 5 of 5 seeds, by 5.81 ± 0.44: holds
"""
import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import train_rm
import train_sft
from data.toy import prepare
from data.text import encode_rows, load_judge, load_split, load_text
from prefgpt import GPT, UserError, load_checkpoint, load_model, run_cli
from studies.lengths import MOST, gold, write_data, write_pairs
from studies.policies import Gpt, train_gpt
from studies.style import COLORS, POINTS, frame, names, new_figure, show_picture
from studies.table import (SMOKE_TEST, complete, mean_and_spread, select, show_means, spreads_by,
                           table_and_seeds)
from studies.unified import (best_of_n_loss, dpo_pairs_loss, ipo_pairs_loss, ppo_loss, pref_ft_loss,
                             reinforce_loss, rwr_loss)


@dataclass
class Config:
    seeds: str = '0 1 2 3 4'        # the seeds to run, or to complete
    tasks: str = 'Min Mode Skew'    # which of Min, Mode, Skew and Toy
    csv: str = 'out/studies/length.csv'     # the table for what studies/results/length.csv lacks
    results: bool = False           # add it to studies/results/length.csv, and draw its picture
    quick: bool = False             # a smoke test: one seed, few steps, a table of its own


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
    """
    Makes data, SFT and reward model in out; returns gold(prompt, response), the mode on Mode, and
    the reward model's accuracy on held-out pairs.
    """
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
    """Returns training rows and held-out rows of a kind as ids, pairs cut to the size."""
    saved = load_checkpoint(f'{out}/sft', ['sft'])
    tokenizer, text = load_text(f'{out}/data', saved)
    count, room = (size['pairs'], 0) if kind == 'pairs' else (None, size['most'])
    return [encode_rows(rows[:count], kind, tokenizer, saved['model']['block_size'], room, name)
            for name, rows in zip(('train', 'val'),
                                  load_split(f'{out}/data', kind, text['template']))]


def run_task(seed, task, quick):
    """Returns a seed's rows of a task: the reference, then every method."""
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
    Compares the gold of two methods seed by seed: returns in how many seeds high is above low, the
    mean difference, and its standard error, which is infinite of one seed.
    """
    by_seed = [{row['seed']: row['gold'] for row in select(rows, method=method)}
               for method in (low, high)]
    gaps = [by_seed[1][seed] - by_seed[0][seed] for seed in by_seed[0]]
    gap, spread = mean_and_spread(gaps)
    return sum(g > 0 for g in gaps), gap, spread / len(gaps) ** 0.5 if gaps[1:] else float('inf')


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
            _, means, _ = spreads_by(some, 'method', 'gold')
            gap = max(means[1:]) - min(means[1:])           # the first one is the reference
            print(f'{task}: all methods are about alike: the means lie within {gap:.2f}, not above '
                  f"{ALIKE}: {'holds' if gap <= ALIKE else 'does not hold'}")
            lost += [] if gap <= ALIKE else [(task, 'alike')]
    return lost


# ----------------------------------------------------------------------------- the picture

def draw_task(axes, rows, task):
    """Draws gold by method, and gold against kl; offline methods in one colour, others in blue."""
    methods, golds, spreads = spreads_by(rows, 'method', 'gold')
    _, kls, kl_spreads = spreads_by(rows, 'method', 'kl')
    for line, method in enumerate(methods):
        style = dict(color=COLORS[6] if method == 'reference' else COLORS[METHODS[method][2]],
                     **POINTS)
        axes[0].errorbar(golds[line], line, xerr=spreads[line], **style)
        axes[1].errorbar(kls[line], golds[line], xerr=kl_spreads[line], yerr=spreads[line], **style)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].set_ylim(len(methods) - 0.5, -0.5)
    unit = 'letters' if task != 'Toy' else "the judge's reward"
    frame(axes[0], task, below=f'gold, {unit}')
    frame(axes[1], f'{task}: gold and KL', f'gold, {unit}', 'KL(policy, ref), nats per response')


def draw(rows):
    """Draws the picture, a matplotlib Figure: a column per task."""
    tasks = [*dict.fromkeys(row['task'] for row in rows)]
    figure = new_figure(12, 7)
    axes = figure.subplots(2, len(tasks), squeeze=False)
    for column, task in enumerate(tasks):
        draw_task(axes[:, column], select(rows, task=task), task)
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
