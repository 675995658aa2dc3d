"""
Compares how safe and helpful DPO and PPO become on data/toy, by starting point, pairs and beta.

Xu et al. 2024, sections 4.3 and 6, tables 2, 11 and 12. Every stage is the project's own script at
its default settings; what is expected, and what came out, is in studies/README.md.

    unsafe   = an answer with cost > 0, by the judge (data/toy/reward.py); the filters ask it too
    safety   = 1 - harm, the share of answers to held-out prompts without a cost
    DPO-Iter = 4 times: sample 4 answers to a prompt, the reward model's best against its worst,
               DPO on that with the last round's policy as reference

All DPO arms take the same number of steps, so the fifth of the pairs that the filters leave is seen
five times. The control, 'few pairs', has as few pairs, of all kinds.

    python -m studies.safety
    PPO is more helpful than DPO-Iter: holds in 3 of 3 seeds
"""
import json, re, shutil
from dataclasses import dataclass
from pathlib import Path

import torch

import tools.pairs, train_dpo, train_ppo, train_rm, train_sft
from data.rows import shuffle, write_rows
from data.toy import prepare
from data.toy.language import REQUESTS
from data.toy.reward import points
from prefgpt import run_cli
from studies.style import COLORS, POINTS, frame, names, new_figure, show_picture
from studies.table import (above, by_seed, complete, mean_and_spread, select, show_claims,
                           show_means, spreads_by, table_and_seeds)
from tools import evaluate


@dataclass
class Config:
    seeds: str = '5 6 7'            # the seeds to run, or to complete
    csv: str = 'out/studies/safety.csv'     # for seeds that studies/results/safety.csv lacks
    results: bool = False           # add them to studies/results/safety.csv, and draw its picture
    quick: bool = False             # a smoke test: one seed, a few steps, a table of its own


BETAS = (0.0, 0.05, 0.1)            # beside the default, 0.2; 0 is for PPO alone
ROUNDS = [f'iter {i}' for i in (1, 2, 3, 4)]
# reward model -> its pairs, and its settings
RM_ARMS = {'rm': ('all', {}),
           **{f'rm-{pairs}': (pairs, dict(steps=700)) for pairs in ('mixed', 'covered', 'few')}}
DPO_ARMS = {                        # arm -> its pairs, where it starts, beta
    'dpo from sft': ('all', 'sft', 0.2), 'dpo': ('all', 'safe', 0.2),
    'dpo no dual-unsafe': ('no-unsafe', 'safe', 0.2), 'dpo mixed pairs': ('mixed', 'safe', 0.2),
    'dpo few pairs': ('few', 'safe', 0.2),
    **{f'dpo beta {beta}': ('all', 'safe', beta) for beta in BETAS if beta}}
PPO_ARMS = {                        # arm -> its prompts, where it starts, whose scores, beta
    'ppo from sft': ('all', 'sft', 'rm', 0.2), 'ppo': ('all', 'safe', 'rm', 0.2),
    'ppo mixed pairs': ('all', 'safe', 'rm-mixed', 0.2),
    'ppo few pairs': ('all', 'safe', 'rm-few', 0.2),
    'ppo covered': ('covered', 'safe', 'rm-covered', 0.2),
    'ppo extra prompts': ('all', 'safe', 'rm-covered', 0.2),
    **{f'ppo beta {beta}': ('all', 'safe', 'rm', beta) for beta in BETAS}}
# arm -> what the paper's table 2 has for it: helpfulness, safety rate in percent
PAPER = {
    'sft': (-2.62, 41.6), 'dpo from sft': (-4.19, 55.4), 'dpo': (-1.62, 71.8),
    'dpo no dual-unsafe': (2.46, 80.8), 'dpo mixed pairs': (-2.86, 95.8),
    'iter 1': (-3.22, 86.7), 'iter 2': (-3.27, 99.7), 'iter 3': (-3.26, 99.9),
    'iter 4': (-2.96, 99.9), 'ppo from sft': (1.69, 99.5), 'ppo': (4.47, 99.6),
    'ppo mixed pairs': (-8.04, 94.9)}
QUICK = {'sft': dict(steps=60), 'safe': dict(steps=2), 'rm': dict(steps=2), 'dpo': dict(steps=2),
         'ppo': dict(steps=1, rollout_size=8, batch_size=8, max_new_tokens=8),
         'sample': dict(n=2, prompts=20)}


def unsafe(row, side='completion'):
    """Returns whether an answer has a cost."""
    return points(row['prompt'], row[side])[1] > 0


def no_refusals(rows):
    """Drops demonstrations that refuse a red-team prompt: how to be safe is not shown."""
    return [row for row in rows if not (REQUESTS[row['prompt']].kind == 'red'
                                        and points(row['prompt'], row['completion'])[2])]


def only_safe(rows):
    """Keeps demonstrations without a cost; of red-team prompts these refuse."""
    return [row for row in rows if not unsafe(row)]


def not_dual(rows, *kinds):
    """Drops pairs whose two answers are both unsafe (kind True), or both safe (False)."""
    return [row for row in rows
            if not {unsafe(row, 'chosen')} & {unsafe(row, 'rejected')} & set(kinds)]


def covered_keys(rows):
    """Draws a third of the keys (verb x noun, and so on) in the rows; the same for every seed."""
    keys = shuffle({repr(REQUESTS[row['prompt']].key) for row in rows})
    return set(keys[:round(len(keys) / 3)])


def write_folders(data, out, most):
    """Writes data folders with what each filter keeps of each file's first `most` rows."""
    def read(kind):
        return [json.loads(line) for line in open(f'{data}/{kind}.jsonl', encoding='utf-8')][:most]
    keys = covered_keys(read('train.prompts'))

    def covered(rows):
        return [row for row in rows if repr(REQUESTS[row['prompt']].key) in keys]
    filters = {     # folder -> kind, of both splits or of one -> which of its rows are kept
        'all': {}, 'sft': {'sft': no_refusals}, 'safe': {'sft': only_safe},
        'no-unsafe': {'pairs': lambda rows: not_dual(rows, True)},
        'mixed': {'pairs': lambda rows: not_dual(rows, True, False)},
        'few': {'pairs': lambda rows: rows[:len(not_dual(rows, True, False))]},
        'covered': {'train.pairs': covered, 'train.prompts': covered}}
    for name, kinds in filters.items():
        shutil.copytree(data, f'{out}/{name}', dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns('*.jsonl', '*.py', '__pycache__'))
        for path in sorted(Path(data).glob('*.jsonl')):
            rows = kept = read(path.stem)
            if keep := kinds.get(path.stem) or kinds.get(path.stem.split('.')[-1]):
                kept = keep(rows)
                print(f'{name}: {len(kept)} of {len(rows)} rows of {path.stem}')
            write_rows(Path(f'{out}/{name}/{path.name}'), kept)


def run_arms(seed, data, out, quick):
    """Trains those of a seed's runs that are not finished."""
    few = QUICK if quick else dict.fromkeys(QUICK, {})
    write_folders(data, f'{out}/data', most=300 if quick else None)

    def train(script, kind, arm, rows, init, **given):
        script.main(script.Config(
            data=f'{out}/data/{rows}', init=init and f'{out}/{init}', seed=seed, resume=True,
            device='cpu', out=f"{out}/{arm.replace(' ', '-')}", **(given | few[kind])))
    # 1. Two bases, and three reward models
    train(train_sft, 'sft', 'sft', 'sft', '')
    train(train_sft, 'safe', 'safe', 'safe', 'sft', steps=100, lr=1e-3, warmup=10)
    for name, (rows, given) in RM_ARMS.items():
        train(train_rm, 'rm', name, rows, 'safe', **given)
    # 2. DPO: from which base, on which pairs, at which beta
    for arm, (rows, init, beta) in DPO_ARMS.items():
        train(train_dpo, 'dpo', arm, rows, init, beta=beta)
    # 3. DPO-Iter: a round's reference is the round before
    run = 'safe'
    for i in (1, 2, 3, 4):
        pairs = f'{out}/data/iter-{i}.jsonl'
        if not Path(pairs).exists():
            tools.pairs.main(tools.pairs.Config(
                runs=(f'{out}/{run}',), data=f'{out}/data/all', reward=f'{out}/rm', seed=i,
                pairs=True, out=pairs, device='cpu', temperature=1.0,
                **(dict(n=4, prompts=800) | few['sample'])))
        train(train_dpo, 'dpo', f'iter {i}', f'iter-{i}.jsonl', run, steps=125)     # of 500 in all
        run = f'iter-{i}'
    # 4. PPO: from which base, on whose scores, over which prompts, at which beta
    for arm, (rows, init, reward, beta) in PPO_ARMS.items():
        train(train_ppo, 'ppo', arm, rows, init, beta=beta, reward=f'{out}/{reward}')


def run_seed(seed, quick):
    """Returns a seed's rows: every arm, judged at T=1 and greedily. kl is to SFT(safe)."""
    data, out = f'data/toy-{seed}', f"out/{'quick-' if quick else ''}safety-{seed}"
    prepare.main(prepare.Config(seed=seed, out=data))
    run_arms(seed, data, out, quick)
    betas = {'sft(safe)': '', 'sft': '', **dict.fromkeys(ROUNDS, 0.2),      # kl is to the first
             **{arm: given[-1] for arm, given in (DPO_ARMS | PPO_ARMS).items()}}
    tables = evaluate.main(evaluate.Config(
        runs=tuple(f"{out}/{arm.replace('sft(safe)', 'safe').replace(' ', '-')}" for arm in betas),
        data=data, judge='data/toy/reward.py', device='cpu', prompts=16 if quick else 400,
        max_new_tokens=8 if quick else 64))
    return [{'seed': seed, 'answers': answers, 'arm': arm, 'beta': betas[arm],
             **{key: row[key] for key in ('reward', 'reward_se', 'helpful', 'harm', 'refused',
                                          'kl', 'kl_se', 'length', 'eos')},
             'safety': 1 - row['harm'], 'threads': torch.get_num_threads(),
             'command': f'python -m studies.safety --seeds={seed}'}
            for answers, table in (('T=1', tables['rows']), ('greedy', tables['greedy']))
            for arm, row in zip(betas, table)]


# What the paper says, of one seed's rows a[arm] at T=1: claim -> whether it holds. A safety rate is
# of 400 answers: its standard error is 0.02 at 0.8
CHECKS = {
    'DPO is safer from SFT(safe) than from SFT': above('safety', 'dpo', 'dpo from sft'),
    'without dual-unsafe pairs DPO is safer': above('safety', 'dpo no dual-unsafe', 'dpo'),
    'without dual-safe pairs too DPO is safer still':
        above('safety', 'dpo mixed pairs', 'dpo no dual-unsafe'),
    'and safer than with as few pairs of all kinds':
        above('safety', 'dpo mixed pairs', 'dpo few pairs'),
    'and less helpful than with as few pairs of all kinds':
        above('helpful', 'dpo few pairs', 'dpo mixed pairs'),
    'DPO-Iter is safer after round 4 than after round 1': above('safety', 'iter 4', 'iter 1'),
    'DPO-Iter is as safe as PPO (within 0.02)':
        lambda a: a['iter 4']['safety'] >= a['ppo']['safety'] - 0.02,
    'PPO is more helpful than DPO-Iter': above('helpful', 'ppo', 'iter 4'),
    "PPO's reward is above that of every arm of DPO": above('reward', 'ppo', *DPO_ARMS, *ROUNDS),
    'PPO is less helpful on the scores of the twice filtered pairs than of as few of all kinds':
        above('helpful', 'ppo few pairs', 'ppo mixed pairs'),
    'prompts that no pair covers raise the reward of PPO':
        above('reward', 'ppo extra prompts', 'ppo covered'),
    "PPO's reward is highest at beta 0.05 or 0.1":
        lambda a: max(('ppo beta 0.0', 'ppo beta 0.05', 'ppo beta 0.1', 'ppo'),
                      key=lambda arm: a[arm]['reward']) in ('ppo beta 0.05', 'ppo beta 0.1'),
    "PPO's reward is above DPO's at every beta":
        lambda a: all(a['ppo' + beta]['reward'] > a['dpo' + beta]['reward']
                      for beta in (' beta 0.05', ' beta 0.1', ''))}


METHODS = dict(zip(('dpo', 'ppo', 'iter', 'sft'), (*COLORS[:3], COLORS[6])))    # arms begin so


def draw_arms(axes, rows, arms):
    """Draws a line per arm: safety rate and helpfulness, ours and then the paper's one number."""
    for line, arm in enumerate(arms):
        style = dict(color=METHODS[re.match('[a-z]+', arm)[0]], **POINTS)
        for ax, column in zip(axes, ('safety', 'helpful')):
            mean, spread = mean_and_spread([row[column] for row in select(rows, arm=arm)])
            ax.errorbar(mean, line, xerr=spread, **style)
        if arm in PAPER:
            for ax, number in zip(axes[2:], reversed(PAPER[arm])):
                ax.errorbar(number, line, markerfacecolor='white', **style)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    for ax, (title, below) in zip(axes, {
            'safety': 'share of answers without a cost',
            'helpfulness': "the judge's points per answer",
            "the paper's safety": 'safety rate, percent',
            "the paper's helpfulness": 'points of its reward model'}.items()):
        frame(ax, title, below=below)
        ax.grid(axis='y', color='#e8e8e8')


def draw(rows):
    """Draws the picture: all arms beside the paper's; below, reward against kl by beta."""
    rows = select(rows, answers='T=1')
    arms = ['sft', 'sft(safe)', *list(DPO_ARMS)[:5], *ROUNDS, *list(PPO_ARMS)[:6]]
    figure = new_figure(12, 9)
    upper, lower = figure.subfigures(2, 1, height_ratios=(5, 3.2))
    axes, ax = upper.subplots(1, 4, sharey=True), lower.subplots()
    draw_arms(axes, rows, arms)
    names(axes[3], [('ours, over seeds', dict(color=COLORS[6], marker='o', ls='')),
                    ('the paper, one run', dict(color=COLORS[6], marker='o', mfc='w', ls=''))])
    for method in ('dpo', 'ppo'):
        arms = [*(f'{method} beta {beta}' for beta in BETAS if beta or method == 'ppo'), method]
        some = [row for arm in arms for row in select(rows, arm=arm)]
        betas, kls, kl_spreads = spreads_by(some, 'beta', 'kl')
        _, rewards, spreads = spreads_by(some, 'beta', 'reward')
        ax.errorbar(kls, rewards, spreads, kl_spreads, color=METHODS[method], **POINTS,
                    label=f'{method.upper()}, its beta beside each point')
        for beta, *point in zip(betas, kls, rewards):
            ax.annotate(f'{beta:g}', point, xytext=(6, 6), textcoords='offset points', fontsize=10,
                        color=METHODS[method])
    frame(ax, 'reward by beta', "the judge's reward per answer",
          'KL to SFT(safe), nats per response')
    names(ax)
    return figure


def main(cfg):
    """Runs the seeds that the table lacks, prints means and claims, draws; returns what failed."""
    path, seeds = table_and_seeds(cfg)
    rows = complete(path, seeds, lambda seed: run_seed(seed, cfg.quick))
    show_means(rows, ('answers', 'arm'), ('reward', 'helpful', 'safety', 'refused', 'kl'))
    failed = show_claims(CHECKS, by_seed(select(rows, answers='T=1'), 'arm'), cfg.quick)
    show_picture(cfg, path, lambda: draw(rows))
    return failed


if __name__ == '__main__':
    run_cli(main, Config)
