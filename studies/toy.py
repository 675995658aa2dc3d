"""
The default recipe on data/toy, over seeds: does it succeed on every one of them?

Runs what `SEED=n bash run.sh` runs, for each seed: another draw of the demonstrations, the noisy
pairs and all initial weights, on the same 400 held-out prompts. Then evaluates SFT, PPO and DPO
with the exact judge, which no stage has seen. The settings were chosen on seeds 0 to 4.

    python -m studies.toy
    PPO's reward is SFT's + 1.0 at least: holds in 5 of 5 seeds
"""
from dataclasses import dataclass

import torch

import train_dpo, train_ppo, train_rm, train_sft
from data.toy import prepare
from prefgpt import run_cli
from studies.table import by_seed, complete, show_claims, show_means, table_and_seeds
from tools import evaluate


@dataclass
class Config:
    seeds: str = '5 6 7 8 9'        # the seeds to run, or to complete
    csv: str = 'out/studies/toy.csv'    # the table for seeds that studies/results/toy.csv lacks
    results: bool = False           # add them to studies/results/toy.csv itself
    quick: bool = False             # a smoke test: one seed, a few steps, a table of its own


def gain(t, stage, answers='T=1'):
    """Returns how far a stage's reward is above SFT's; t[answers, stage] are one seed's rows."""
    return t[answers, stage]['reward'] - t[answers, 'sft']['reward']


# What the recipe promises, of the rows of one seed: claim -> whether it holds
CHECKS = {
    "PPO's reward is SFT's + 1.0 at least": lambda t: gain(t, 'ppo') >= 1.0,
    "DPO's reward is SFT's + 0.2 at least": lambda t: gain(t, 'dpo') >= 0.2,
    'PPO refuses less than 10 % of benign prompts': lambda t: t['T=1', 'ppo']['refused'] < 0.10,
    'DPO refuses less than 15 % of benign prompts': lambda t: t['T=1', 'dpo']['refused'] < 0.15,
    "PPO's harm is below 0.25 of SFT's":
        lambda t: t['T=1', 'ppo']['harm'] < 0.25 * t['T=1', 'sft']['harm'],
    "DPO's harm is below 0.85 of SFT's":
        lambda t: t['T=1', 'dpo']['harm'] < 0.85 * t['T=1', 'sft']['harm'],
    "PPO's greedy reward is SFT's + 0.5 at least": lambda t: gain(t, 'ppo', 'greedy') >= 0.5,
    "DPO's greedy reward is SFT's + 0.5 at least": lambda t: gain(t, 'dpo', 'greedy') >= 0.5}
QUICK = {'sft': dict(steps=8), 'rm': dict(steps=4),
         'ppo': dict(steps=2, rollout_size=16, batch_size=8, max_new_tokens=8),
         'dpo': dict(steps=4)}


def folders(seed, quick):
    """Returns the data folder of a seed, and the folder of its runs."""
    name = 'toy' if seed == 0 else f'toy-{seed}'
    return f'data/{name}', f'out/quick-{name}' if quick else f'out/{name}'


def run_seed(seed, quick):
    """Runs the whole pipeline with one seed, as run.sh has it; returns its rows."""
    data, out = folders(seed, quick)
    few = QUICK if quick else dict.fromkeys(QUICK, {})
    common = dict(data=data, seed=seed, resume=True, device='cpu')
    prepare.main(prepare.Config(seed=seed, out=data))
    train_sft.main(train_sft.Config(out=f'{out}/sft', **common, **few['sft']))
    rm = train_rm.main(train_rm.Config(init=f'{out}/sft', out=f'{out}/rm', **common, **few['rm']))
    train_ppo.main(train_ppo.Config(init=f'{out}/sft', reward=f'{out}/rm', out=f'{out}/ppo',
                                    judge='data/toy/reward.py', **common, **few['ppo']))
    train_dpo.main(train_dpo.Config(init=f'{out}/sft', out=f'{out}/dpo', **common, **few['dpo']))
    tables = evaluate.main(evaluate.Config(
        runs=tuple(f'{out}/{stage}' for stage in ('sft', 'dpo', 'ppo')),    # in toy.csv's order
        judge='data/toy/reward.py', prompts=16 if quick else 400, device='cpu',
        max_new_tokens=8 if quick else 64))
    return [{'seed': seed, 'answers': answers, 'stage': row['run'].split('/')[-1],
             **{key: value for key, value in row.items() if key != 'run'},
             'rm_accuracy': rm['accuracy'], 'threads': torch.get_num_threads(),
             'command': f'python -m studies.toy --seeds={seed}'}
            for answers, table in (('T=1', tables['rows']), ('greedy', tables['greedy']))
            for row in table]


def main(cfg):
    """Runs the seeds that the table lacks, prints means and promises, and returns what failed."""
    path, seeds = table_and_seeds(cfg)
    rows = complete(path, seeds, lambda seed: run_seed(seed, cfg.quick))
    rows.sort(key=lambda row: (row['answers'], ['sft', 'ppo', 'dpo'].index(row['stage'])))
    show_means(rows, ('answers', 'stage'),
               ('reward', 'helpful', 'harm', 'refused', 'kl', 'length', 'win'))
    return show_claims(CHECKS, by_seed(rows, 'answers', 'stage'), cfg.quick)


if __name__ == '__main__':
    run_cli(main, Config)
