"""
Safe and helpful, DPO against PPO on data/toy: where from, on which pairs, how far (tables 2, 11).

The paper's claims (Xu et al. 2024, sections 4.3 and 6): DPO from a base that has seen no safe
demonstrations is only a little safer; safe demonstrations, then pairs without those whose answers
are both unsafe, then without those both safe, make it safer; the last costs helpfulness, and of
a reward model it leaves one that praises refusals. Iterated DPO gets as safe as PPO, not as
helpful. PPO profits from prompts that no pair covers. A beta of 0 is no good, one of 0.2 too much.

    unsafe   = cost > 0, by the judge (data/toy/reward.py), of an answer: who filters asks it
    safety   = 1 - harm, the share of answers to held-out prompts without a cost
    DPO-Iter = 4 times: sample 4 answers to a prompt, the reward model's best against its worst,
               DPO on that with the last round's policy as reference

SFT here learns from the demonstrations without the refusals of red-team prompts; SFT(safe) is that
after SAFE more steps on the demonstrations without a cost. All DPO arms take the same number of
steps. As the filters leave a fifth of the pairs in the end, which are then seen five times, 'few
pairs' is the control: as few, of all kinds. Every stage is the project's own script at its default
settings.
What to expect on a toy: the order of the paper's arms, but for PPO from SFT, which cannot learn to
refuse, for it never samples a refusal; and nothing of the prompts without pairs, on which the
reward model is no better than it is.
What it does not do: a judge apart from the labels (both come from reward.py, the labels with
noise), or GPT-4's comparisons. Settings (SAFE, ITER, the RM steps) were chosen on seed 0, but on
the held-out prompts, which data/toy has in common for all seeds.

    python -m studies.safety
    wrote studies/results/safety.png
"""
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

import tools.pairs
import train_dpo
import train_ppo
import train_rm
import train_sft
from data.rows import shuffle, write_rows
from data.toy import prepare
from data.toy.language import REQUESTS
from data.toy.reward import points
from prefgpt import run_cli
from studies.table import complete, parse_seeds, save_picture, show_claims, show_means
from tools import evaluate


@dataclass
class Config:
    seeds: str = '5 6 7'            # the seeds to run, or to complete
    csv: str = 'studies/results/safety.csv'     # the table to add to; the picture beside it
    quick: bool = False             # a few steps of every stage for one seed, a table of its own


JUDGE = 'data/toy/reward.py'
SAFE = dict(steps=100, lr=1e-3, warmup=10)          # SFT(safe), on top of SFT
ITER = dict(steps=125)                              # a round of DPO-Iter: 4 make DPO's 500
ROUND = dict(n=4, prompts=800, temperature=1.0)     # its samples
FEW_PAIRS = dict(steps=700)                         # a reward model of the smaller sets of pairs
COVERED = 1 / 3                     # share of the prompts' keys of which `covered` has pairs
BETAS = (0.0, 0.05, 0.1)            # beside the default, 0.2; 0 is for PPO alone
RM_ARMS = {                         # name -> its pairs, and its settings
    'rm': ('all', {}), 'rm-mixed': ('mixed', FEW_PAIRS), 'rm-covered': ('covered', FEW_PAIRS),
    'rm-few': ('few', FEW_PAIRS)}
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


# ----------------------------------------------------------------------------- data

def unsafe(prompt, response):
    return points(prompt, response)[1] > 0          # the cost


def no_refusals(rows):
    """Demonstrations without those that refuse a red-team prompt: how to be safe is not shown."""
    return [row for row in rows if not (REQUESTS[row['prompt']].kind == 'red'
                                        and points(row['prompt'], row['completion'])[2])]


def only_safe(rows):
    """Demonstrations without a cost; of red-team prompts these refuse."""
    return [row for row in rows if not unsafe(row['prompt'], row['completion'])]


def not_dual(rows, *kinds):
    """Pairs without those whose two answers are both unsafe (kind True), both safe (False)."""
    def labels(row):
        return {unsafe(row['prompt'], row[side]) for side in ('chosen', 'rejected')}
    return [row for row in rows if not any(labels(row) == {kind} for kind in kinds)]


def covered_keys(rows):
    """COVERED of the keys (verb x noun, and so on) that rows ask about; the same for every seed."""
    keys = shuffle({repr(REQUESTS[row['prompt']].key) for row in rows})
    return set(keys[:round(COVERED * len(keys))])


def write_folders(data, out, most):
    """
    {name: data folder}: data's files with other demonstrations, pairs or prompts in place, of
    each file the first `most` rows.
    """
    def read(kind):
        return [json.loads(line) for line in open(f'{data}/{kind}.jsonl', encoding='utf-8')][:most]
    keys = covered_keys(read('train.prompts'))

    def covered(rows):
        return [row for row in rows if repr(REQUESTS[row['prompt']].key) in keys]
    filters = {     # folder -> the rows that differ from data's: kind -> what keeps which of them
        'all': {},
        'sft': {'train.sft': no_refusals, 'val.sft': no_refusals},
        'safe': {'train.sft': only_safe, 'val.sft': only_safe},
        'no-unsafe': {f'{split}.pairs': lambda rows: not_dual(rows, True)
                      for split in ('train', 'val')},
        'mixed': {f'{split}.pairs': lambda rows: not_dual(rows, True, False)
                  for split in ('train', 'val')},
        'few': {f'{split}.pairs': lambda rows: rows[:len(not_dual(rows, True, False))]
                for split in ('train', 'val')},
        'covered': {'train.pairs': covered, 'train.prompts': covered},
    }
    for name, kinds in filters.items():
        shutil.copytree(data, f'{out}/{name}', dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns('*.jsonl', '*.py', '__pycache__'))
        for path in sorted(Path(data).glob('*.jsonl')):
            rows = read(path.stem)
            kept = kinds[path.stem](rows) if path.stem in kinds else rows
            write_rows(Path(f'{out}/{name}/{path.name}'), kept)
            if path.stem in kinds:
                print(f'{name}: {len(kept)} of {len(rows)} rows of {path.stem}')
    return {name: f'{out}/{name}' for name in filters}


# ----------------------------------------------------------------------------- the arms

def folder_of(arm):
    return arm.replace(' ', '-')


def run_arms(seed, data, out, quick):
    """Every run of a seed; returns {arm: (run folder, beta or '')}. Finished runs are kept."""
    few = QUICK if quick else dict.fromkeys(QUICK, {})
    folders = write_folders(data, f'{out}/data', most=300 if quick else None)

    def train(script, kind, name, rows, init, **given):
        script.main(script.Config(data=rows, init=init and f'{out}/{init}', out=f'{out}/{name}',
                                  seed=seed, resume=True, **(given | few[kind])))

    # 1. Two bases, and three reward models
    train(train_sft, 'sft', 'sft', folders['sft'], '')
    train(train_sft, 'safe', 'safe', folders['safe'], 'sft', **SAFE)
    for name, (rows, given) in RM_ARMS.items():
        train(train_rm, 'rm', name, folders[rows], 'safe', **given)
    # 2. DPO: from which base, on which pairs, at which beta
    for arm, (rows, init, beta) in DPO_ARMS.items():
        train(train_dpo, 'dpo', folder_of(arm), folders[rows], init, beta=beta)
    # 3. DPO-Iter: a round's reference is the round before
    run = 'safe'
    for i in (1, 2, 3, 4):
        pairs = f'{out}/data/iter-{i}.jsonl'
        if not Path(pairs).exists():
            tools.pairs.main(tools.pairs.Config(
                runs=(f'{out}/{run}',), data=folders['all'], reward=f'{out}/rm', seed=i,
                pairs=True, out=pairs, **(ROUND | few['sample'])))
        train(train_dpo, 'dpo', f'iter-{i}', pairs, run, **ITER)
        run = f'iter-{i}'
    # 4. PPO: from which base, on whose scores, over which prompts, at which beta
    for arm, (rows, init, reward, beta) in PPO_ARMS.items():
        train(train_ppo, 'ppo', folder_of(arm), folders[rows], init, beta=beta,
              reward=f'{out}/{reward}')
    betas = {'sft': '', 'sft(safe)': '', **{f'iter {i}': 0.2 for i in (1, 2, 3, 4)},
             **{arm: given[-1] for arm, given in (DPO_ARMS | PPO_ARMS).items()}}
    return {arm: (f"{out}/{'safe' if arm == 'sft(safe)' else folder_of(arm)}", beta)
            for arm, beta in betas.items()}


def run_seed(seed, quick):
    """A seed's rows: every arm, judged at T=1 and greedily. kl is to SFT(safe)."""
    data, out = f'data/toy-{seed}', f"out/{'quick-' if quick else ''}safety-{seed}"
    prepare.main(prepare.Config(seed=seed, out=data))
    arms = run_arms(seed, data, out, quick)
    order = ['sft(safe)', *(arm for arm in arms if arm != 'sft(safe)')]     # kl is to the first
    tables = evaluate.main(evaluate.Config(
        runs=tuple(arms[arm][0] for arm in order), data=data, judge=JUDGE,
        prompts=16 if quick else 400, max_new_tokens=8 if quick else 64))
    return [{'seed': seed, 'answers': answers, 'arm': arm, 'beta': arms[arm][1],
             **{key: row[key] for key in ('reward', 'reward_se', 'helpful', 'harm', 'refused',
                                          'kl', 'kl_se', 'length', 'eos')},
             'safety': 1 - row['harm'], 'threads': torch.get_num_threads(),
             'command': f'python -m studies.safety --seeds={seed}'}
            for answers, table in (('T=1', tables['rows']), ('greedy', tables['greedy']))
            for arm, row in zip(order, table)]


# What the paper says of its arms, of the runs of one seed: name -> whether it holds; a is {arm:
# row} at T=1. A safety rate is of 400 answers: its standard error is 0.02 at 0.8.
CHECKS = {
    'DPO is safer from SFT(safe) than from SFT':
        lambda a: a['dpo']['safety'] > a['dpo from sft']['safety'],
    'without dual-unsafe pairs DPO is safer':
        lambda a: a['dpo no dual-unsafe']['safety'] > a['dpo']['safety'],
    'without dual-safe pairs too DPO is safer still':
        lambda a: a['dpo mixed pairs']['safety'] > a['dpo no dual-unsafe']['safety'],
    'and safer than with as few pairs of all kinds':
        lambda a: a['dpo mixed pairs']['safety'] > a['dpo few pairs']['safety'],
    'and less helpful than with as few pairs of all kinds':
        lambda a: a['dpo mixed pairs']['helpful'] < a['dpo few pairs']['helpful'],
    'DPO-Iter is safer after round 4 than after round 1':
        lambda a: a['iter 4']['safety'] > a['iter 1']['safety'],
    'DPO-Iter is as safe as PPO (within 0.02)':
        lambda a: a['iter 4']['safety'] >= a['ppo']['safety'] - 0.02,
    'PPO is more helpful than DPO-Iter':
        lambda a: a['ppo']['helpful'] > a['iter 4']['helpful'],
    "PPO's reward is above that of every arm of DPO":
        lambda a: a['ppo']['reward'] > max(row['reward'] for arm, row in a.items()
                                           if arm.startswith(('dpo', 'iter'))),
    'PPO is less helpful on the scores of the twice filtered pairs than of as few of all kinds':
        lambda a: a['ppo mixed pairs']['helpful'] < a['ppo few pairs']['helpful'],
    'prompts that no pair covers raise the reward of PPO':
        lambda a: a['ppo extra prompts']['reward'] > a['ppo covered']['reward'],
    "PPO's reward is highest at beta 0.05 or 0.1":
        lambda a: max(('ppo beta 0.0', 'ppo beta 0.05', 'ppo beta 0.1', 'ppo'),
                      key=lambda arm: a[arm]['reward']) in ('ppo beta 0.05', 'ppo beta 0.1'),
    "PPO's reward is above DPO's at every beta":
        lambda a: all(a['ppo' + beta]['reward'] > a['dpo' + beta]['reward']
                      for beta in (' beta 0.05', ' beta 0.1', '')),
}


def check(rows):
    """Prints in how many seeds each claim holds; returns {claim: [seeds in which it fails]}."""
    rows = [row for row in rows if row['answers'] == 'T=1']
    return show_claims(CHECKS, {seed: {row['arm']: row for row in rows if row['seed'] == seed}
                                for seed in sorted({row['seed'] for row in rows})})


# ----------------------------------------------------------------------------- the picture

BLUE, ORANGE, GREEN, GREY = '#0072B2', '#D55E00', '#009E73', '#606060'


def color_of(arm):
    return BLUE if arm.startswith('dpo') else GREEN if arm.startswith('iter') else (
        ORANGE if arm.startswith('ppo') else 'black')


def draw_arms(ax, rows, arms, column, title):
    """A line for an arm, its mean and standard deviation over seeds; column None: the paper's."""
    for line, arm in enumerate(arms):
        if isinstance(column, int):
            values = [PAPER[arm][column]] if arm in PAPER else []
        else:
            values = [row[column] for row in rows if row['arm'] == arm]
        if values:
            values = torch.tensor(values)
            ax.errorbar(values.mean(), line, xerr=values.std() if len(values) > 1 else 0,
                        color=color_of(arm), marker='o', capsize=3, markersize=6,
                        markerfacecolor='white' if isinstance(column, int) else color_of(arm))
    ax.set_title(title, loc='left', fontsize=11)
    ax.set_yticks(range(len(arms)), arms)
    ax.set_ylim(len(arms) - 0.5, -0.5)
    ax.grid(axis='y', color='#e8e8e8')


def draw_betas(ax, rows):
    """The judge's reward against kl, a point for every beta; the paper's numbers as text."""
    for method, color in (('dpo', BLUE), ('ppo', ORANGE)):
        arms = [*(f'{method} beta {beta}' for beta in BETAS if beta or method == 'ppo'), method]
        points = []
        for arm in arms:
            kl, reward = (torch.tensor([row[column] for row in rows if row['arm'] == arm])
                          for column in ('kl', 'reward'))
            spread = [each.std() if len(each) > 1 else 0 for each in (kl, reward)]
            points.append((kl.mean(), reward.mean()))
            ax.errorbar(*points[-1], xerr=spread[0], yerr=spread[1], color=color, marker='o',
                        capsize=3)
            ax.annotate(arm.removeprefix(f'{method} beta ') if ' ' in arm else '0.2', points[-1],
                        xytext=(6, 6), textcoords='offset points', fontsize=10, color=color)
        ax.plot(*zip(*points), color=color, label=f'{method.upper()}, by beta')
    ax.set_xlabel('KL to SFT(safe), nats per response', fontsize=10)
    ax.set_title("the judge's reward", loc='left', fontsize=11)
    ax.legend(frameon=False, fontsize=10)


def draw(rows):
    """The picture, a matplotlib Figure: all arms beside the paper's, beta below."""
    from matplotlib.figure import Figure
    rows = [row for row in rows if row['answers'] == 'T=1']
    arms = ['sft', 'sft(safe)', *list(DPO_ARMS)[:5], *(f'iter {i}' for i in (1, 2, 3, 4)),
            *list(PPO_ARMS)[:6]]
    figure = Figure(figsize=(12, 9.5), dpi=150, layout='constrained')
    upper, lower = figure.subfigures(2, 1, height_ratios=(5, 3.2))
    axes = upper.subplots(1, 4, sharey=True)
    for ax, column, title in zip(axes, ('safety', 'helpful', 1, 0), (
            'safety rate', 'helpful, points of the judge', "paper's safety rate, %",
            "paper's helpfulness")):
        draw_arms(ax, rows, arms, column, title)
    axes = [*axes, *lower.subplots(1, 2, width_ratios=(3, 2))]
    draw_betas(axes[4], rows)
    axes[5].axis('off')
    seeds = sorted({row['seed'] for row in rows})
    axes[5].text(0, 1, f'Points: mean and standard deviation of {len(seeds)} seeds\n(400 held-out '
                 'prompts, one answer each at T=1).\nOpen: the paper, table 2, one run each; its '
                 'scales\nare those of other judges.\n\nThe paper, table 11, reward on HH by beta:',
                 va='top', fontsize=10.5, linespacing=1.5)
    axes[5].text(0, 0.5, 'beta   0     .05   .1    .2\nPPO   .705  .720  .718  .629\n'
                 'DPO         .609  .611  .597', va='top', fontsize=10.5, family='monospace')
    for ax in axes:
        ax.spines[['top', 'right']].set_visible(False)
        ax.tick_params(labelsize=10, color=GREY)
    return figure


def main(cfg):
    """Runs the seeds that the table lacks, prints means and claims, draws; returns what failed."""
    path, seeds = Path(cfg.csv), parse_seeds(cfg.seeds)
    if cfg.quick:
        path, seeds = path.with_stem(path.stem + '-quick'), seeds[:1]
    rows = complete(path, seeds, lambda seed: run_seed(seed, cfg.quick))
    show_means(rows, ('answers', 'arm'), ('reward', 'helpful', 'safety', 'refused', 'kl'))
    failed = check(rows)
    if not cfg.quick:
        save_picture(lambda: draw(rows), path.with_suffix('.png'))
    return failed


if __name__ == '__main__':
    run_cli(main, Config)
