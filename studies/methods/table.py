"""
The five diffs of this folder, measured: GRPO, RLOO, KTO, online DPO and LoRA beside PPO and DPO.

    toy       data/toy, from the SFT and reward model of studies.toy. GRPO, RLOO and online DPO
              sample 7,680 responses, PPO 7,620; DPO, KTO and LoRA read 16,000 pairs
    contest   data/contest, where tests judge ("RLVR"): PPO, GRPO and RLOO, 20,480 responses,
              64 per rollout batch

Each diff is applied to a copy of the scripts, and the copy is run. One learning rate per diff: the
best of three by the judge's reward (contest: pass@1) on seed 0, on training prompts (contest:
validation problems); --choose runs these. PPO and DPO have the default recipe's (contest: PPO has
that of studies.contest), "dpo, tuned" the best of the same three as KTO. The other arms with a
comma show what another setting does.

    python -m studies.methods.table
    RLOO's reward is PPO's - 0.3 at least: holds in 5 of 5 seeds
"""
import json, os, shutil, subprocess, sys, tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from prefgpt import UserError, run_cli
from studies import contest, toy
from studies.style import COLORS, GREY, POINTS, frame, names, new_figure, show_pictures
from studies.table import (above, by_seed, complete, mean_and_spread, select, show_claims,
                           show_means, spreads_by, table_and_seeds)
from tools import evaluate

TOP = Path(__file__).resolve().parents[2]


@dataclass
class Config:
    seeds: str = '5 6 7 8 9'        # the seeds to run, or to complete
    csv: str = 'out/studies/methods.csv'    # for seeds that studies/results/methods.csv lacks
    choose: bool = False            # three learning rates per diff on seed 0, in a table of its own
    results: bool = False           # add the rows to studies/results/methods.csv, and draw
    quick: bool = False             # a smoke test: one seed, a few steps, a table of its own


SCRIPTS = {'grpo': 'train_ppo', 'rloo': 'train_ppo', 'kto': 'train_dpo', 'online_dpo': 'train_dpo',
           'lora': 'train_dpo', '': 'train_dpo'}       # '': the script as it is
# arm -> diff, and learning rates, the chosen one first
TOY = {'grpo': ('grpo', 1e-3, 1e-4, 3e-4), 'rloo': ('rloo', 3e-3, 1e-3, 1e-2),
       'kto': ('kto', 1e-3, 1e-4, 3e-4), 'online_dpo': ('online_dpo', 3e-3, 3e-4, 1e-3),
       'lora': ('lora', 3e-4, 1e-4, 1e-3), 'dpo, tuned': ('', 1e-3, 1e-4, 3e-4)}
CONTEST = {'grpo': ('grpo', 3e-4, 1e-3, 3e-3), 'rloo': ('rloo', 1e-3, 3e-4, 3e-3)}
# Two more arms on data/toy, for the findings: (arm, diff, lr, flags)
FURTHER = [('grpo, beta 0.04', 'grpo', 1e-3, '--beta=0.04'), ('lora, lr 1e-3', 'lora', 1e-3, '')]
COLUMNS = ('seed', 'task', 'split', 'arm', 'lr', 'step', 'score', 'gold', 'kl_sft', 'loss',
           'accuracy', 'reward', 'helpful', 'harm', 'refused', 'kl', 'length', 'pass@1', 'pass@10',
           'threads', 'command')


# ----------------------------------------------------------------------------- runs

def patched_copy(diff, folder):
    """Copies what a run needs to a new folder, and applies a diff of this folder ('': none)."""
    for name in ('data', 'tools'):
        shutil.copytree(TOP / name, folder / name, ignore=shutil.ignore_patterns(
            '__pycache__', '*.jsonl', '*.zip', 'toy-*', 'contest-*'))
    for path in TOP.glob('*.py'):
        shutil.copy(path, folder)
    if not diff:
        return folder
    # Without a repository of its own, git would look for the files in the one around it
    done = subprocess.run(['git', 'apply', '--verbose', TOP / f'studies/methods/{diff}.diff'],
                          cwd=folder, capture_output=True, text=True,
                          env=os.environ | {'GIT_CEILING_DIRECTORIES': str(folder.parent),
                                            'LC_ALL': 'C'})
    if done.returncode or 'offset' in done.stderr:
        raise UserError(f'{diff}.diff does not apply exactly: {done.stderr.strip()[-200:]}')
    return folder


def train(diff, out, flags):
    """Trains with a patched script, or goes on; returns the run's folder."""
    command = [sys.executable, f'{SCRIPTS[diff]}.py', f'--out={Path(out).resolve()}', '--resume',
               '--device=cpu', *flags]
    with tempfile.TemporaryDirectory() as folder:
        copy = patched_copy(diff, Path(folder, 'copy'))
        if subprocess.run(command, cwd=copy).returncode:
            raise UserError(f'{diff}: {" ".join(command[1:])} failed')
    return out


def curve(run, cells):
    """Returns a row per evaluation of a run, with what its log says."""
    log = map(json.loads, Path(run, 'log.jsonl').read_text().splitlines())
    return [dict.fromkeys(COLUMNS, '') | cells | {'step': row['step'], **{
        name: row[f'eval_{name}'] for name in ('score', 'gold', 'kl_sft', 'loss', 'accuracy')
        if f'eval_{name}' in row}} for row in log if 'samples' in row]


def rows_of(runs, table, seed, split, task):
    """Returns the rows of runs, {(arm, lr): folder}; the last of each run has table's numbers."""
    rows, chosen = [], split in ('val', 'test-interview')
    for ((arm, lr), run), judged in zip(runs.items(), table):
        rows += curve(run, {'seed': seed, 'task': task, 'split': split, 'arm': arm, 'lr': lr,
                            'threads': torch.get_num_threads(),
                            'command': 'python -m studies.methods.table '
                                       + (f'--seeds={seed}' if chosen else '--choose')})
        rows[-1] |= {name: judged[name] for name in COLUMNS if name in judged}
    return rows


def toy_rows(seed, arms, cfg):
    """Trains arms, [(arm, diff, lr, flags)], on data/toy, and judges them; returns their rows."""
    toy.run_seed(seed, cfg.quick)                   # SFT, reward model, PPO and DPO
    data, out = (TOP / folder for folder in toy.folders(seed, cfg.quick))
    judge = f'{TOP}/data/toy/reward.py'
    runs = {(stage, ''): f'{out}/{stage}' for stage in ('sft', 'ppo', 'dpo')}
    for arm, diff, lr, flags in arms:
        flags = [f'--data={data}', f'--init={out}/sft', f'--seed={seed}', f'--lr={lr}',
                 *flags.split()]
        flags += [f'--reward={out}/rm'] * (diff in ('grpo', 'rloo', 'online_dpo'))
        flags += [f'--judge={judge}'] * (SCRIPTS[diff] == 'train_ppo')
        flags += ['--steps=2', '--max_new_tokens=8'] * cfg.quick
        flags += ['--rollout_size=16'] * (cfg.quick and SCRIPTS[diff] == 'train_ppo')
        runs[arm, lr] = train(diff, f'{out}/{arm}-{lr:g}'.replace(', ', '-').replace(' ', '-'),
                              flags)
    split = 'train' if cfg.choose else 'val'
    table = evaluate.main(evaluate.Config(
        runs=tuple(runs.values()), data=str(data), split=split, judge=judge,
        prompts=16 if cfg.quick else 400, max_new_tokens=8 if cfg.quick else 64, device='cpu'))
    return rows_of(runs, table['rows'], seed, split, 'toy')


def contest_rows(seed, arms, cfg):
    """Trains arms on data/contest, and judges them at its middle level; returns their rows."""
    sizes = contest.QUICK if cfg.quick else contest.FULL
    made = contest.Arms(seed, sizes, f"contest-{'quick-' * cfg.quick}{seed}")
    sft, (size, _) = made.sft('sft'), sizes['batches']
    steps = sizes['rollouts'] // size
    runs = {('sft', ''): sft, ('ppo', ''): made.ppo('ppo-norm-0.001', sft, 1e-3, size)}
    for arm, diff, lr, _ in arms:
        flags = (f'--data={TOP / made.data} --init={TOP / sft} --reward={TOP / contest.JUDGE} '
                 f'--seed={seed} --lr={lr} --steps={steps} --rollout_size={size} --ref_ema=0 '
                 f'--no_eos_score=0 --beta=0.01 --max_new_tokens={contest.TOKENS} '
                 f'--warmup={steps // 20} --eval_every={max(1, steps // 8)}').split()
        flags += [f'--batch_size={size // 4}', '--ppo_epochs=1'] * (diff == 'grpo')     # as PPO
        runs[arm, lr] = train(diff, f'{made.out}/{arm}-{lr:g}', flags)
    split = 'val-interview' if cfg.choose else 'test-interview'
    table = evaluate.main(evaluate.Config(
        runs=tuple(runs.values()), data=made.data, split=split, judge=contest.JUDGE,
        prompts=sizes['prompts'], samples=sizes['samples'], max_new_tokens=contest.TOKENS,
        batch_size=2000, device='cpu'))
    table = [row | contest.pass_columns([each['judged'] for each in responses], sizes['samples'],
                                        10)
             for row, responses in zip(table['rows'], table['responses'])]
    return rows_of(runs, table, seed, split, 'contest')


def run_seed(seed, cfg):
    """Runs both tasks with one seed; returns their rows. With cfg.choose, every learning rate."""
    tasks = [[(arm, diff, lr, '') for arm, (diff, *lrs) in task.items()
              for lr in (lrs if cfg.choose else lrs[:1])] for task in (TOY, CONTEST)]
    return (toy_rows(seed, tasks[0] + FURTHER * (not cfg.choose), cfg)
            + contest_rows(seed, tasks[1], cfg))


# ----------------------------------------------------------------------------- findings

def kl_gradients(actions=5, seed=0):
    """
    Returns four gradients (actions,) with respect to the logits of a policy over a few actions,
    enumerated: of KL(pi, ref), of KL(ref, pi), and the two that methods estimate from samples of
    pi, k1 in the reward (PPO, RLOO) and k3 in the loss (GRPO), as means over actions that pi draws.
    """
    generator = torch.Generator().manual_seed(seed)
    logits, ref = torch.randn(2, actions, generator=generator, dtype=torch.double)
    logits.requires_grad_()
    log_pi, log_ref = logits.log_softmax(0), ref.log_softmax(0)
    pi, log_ratio = log_pi.exp().detach(), log_ref - log_pi     # pi: how often each is sampled
    means = {'KL(pi, ref)': (log_pi.exp() * (log_pi - log_ref)).sum(),
             'k1 in the reward': (pi * (log_pi - log_ref).detach() * log_pi).sum(),
             'KL(ref, pi)': (log_ref.exp() * (log_ref - log_pi)).sum(),
             'k3 in the loss': (pi * (log_ratio.exp() - 1 - log_ratio)).sum()}
    return {name: torch.autograd.grad(mean, logits, retain_graph=True)[0]
            for name, mean in means.items()}


def both(*claims):
    """Returns the claim that these claims hold together."""
    return lambda arms: all(claim(arms) for claim in claims)


PPO, DPO, TUNED, KTO, ONLINE, FAST = (('toy', arm) for arm in (
    'ppo', 'dpo', 'dpo, tuned', 'kto', 'online_dpo', 'lora, lr 1e-3'))
# Claims about the last rows of one seed, t[task, arm]. They come from another seed's runs, with an
# older recipe
CHECKS = {
    **{f"{name}'s reward is SFT's + 1.0 at least": lambda t, arm=arm: (
        t['toy', arm]['reward'] >= t['toy', 'sft']['reward'] + 1.0)
       for arm, name in (('grpo', 'GRPO'), ('rloo', 'RLOO'), ('kto', 'KTO'),
                         ('online_dpo', 'online DPO'), ('lora', 'LoRA-DPO'))},
    "KTO's reward is above DPO's": above('reward', KTO, DPO),
    "KTO's reward is above tuned DPO's": above('reward', KTO, TUNED),
    "online DPO's reward is above tuned DPO's": above('reward', ONLINE, TUNED),
    "tuned DPO has a lower held-out loss than DPO and a higher reward":
        both(above('loss', DPO, TUNED), above('reward', TUNED, DPO)),
    "online DPO's reward is above DPO's, at a higher kl":
        both(above('reward', ONLINE, DPO), above('kl', ONLINE, DPO)),
    "RLOO's reward is PPO's - 0.3 at least":
        lambda t: t['toy', 'rloo']['reward'] >= t[PPO]['reward'] - 0.3,
    'GRPO at beta 0.04 has a lower reward than at 0.2':
        above('reward', ('toy', 'grpo'), ('toy', 'grpo, beta 0.04')),
    'GRPO at beta 0.04 has a lower reward than SFT':
        above('reward', ('toy', 'sft'), ('toy', 'grpo, beta 0.04')),
    'LoRA at ten times the rate of DPO has a lower held-out loss and a lower reward':
        both(above('loss', DPO, FAST), above('reward', DPO, FAST)),
    "contest: GRPO's pass@1 is above PPO's": above('pass@1', ('contest', 'grpo'),
                                                   ('contest', 'ppo')),
    "contest: RLOO's pass@1 is above PPO's": above('pass@1', ('contest', 'rloo'),
                                                   ('contest', 'ppo'))}
LABELS = {'ppo': 'PPO', 'grpo': 'GRPO, beta 0.2', 'rloo': 'RLOO', 'dpo': 'DPO', 'lora': 'LoRA-DPO',
          'grpo, beta 0.04': 'GRPO, beta 0.04', 'lora, lr 1e-3': 'LoRA-DPO, lr 1e-3',
          'dpo, tuned': 'DPO, lr 1e-3'}


def draw_curves(ax, rows, arms, x, y):
    """Draws y over x, means over the seeds at each evaluation, and y's standard deviation."""
    for arm, color in zip(arms, COLORS):
        own = select(rows, task='toy', arm=arm)         # of each seed in the order of the steps
        (_, across, _), (_, means, spreads) = (spreads_by(own, 'step', name) for name in (x, y))
        ax.errorbar(across, means, spreads, color=color, label=LABELS[arm], **POINTS)
    names(ax)


def draw_kl(rows):
    """Draws what the two places of the KL pull towards, and the judge's reward over the KL."""
    figure = new_figure(10, 4.2)
    left, right = figure.subplots(1, 2)
    for i, (name, gradient) in enumerate(kl_gradients().items()):
        left.bar([a + 0.2 * i - 0.3 for a in range(len(gradient))], gradient, 0.2, label=name,
                 color=COLORS[i])
    frame(left, 'Two KLs, two gradients', 'gradient with respect to the logits of five actions',
          'action')
    names(left)
    draw_curves(right, rows, ('ppo', 'grpo', 'grpo, beta 0.04'), 'kl_sft', 'gold')
    frame(right, 'How hard the KL holds', "the judge's reward, mean and std over seeds",
          'kl to SFT, nats')
    return figure


def draw_critic(rows):
    """Draws the judge's reward while three methods see the same number of responses."""
    figure = new_figure(6, 4.2)
    ax = figure.subplots()
    draw_curves(ax, rows, ('ppo', 'rloo', 'grpo'), 'step', 'gold')
    frame(ax, 'PPO with a critic, RLOO and GRPO without',
          "the judge's reward, mean and std over seeds",
          'rollout batches of 128 responses; optimizer steps: PPO and GRPO 8 each, RLOO 1')
    return figure


def draw_lora(rows):
    """Draws reward over held-out loss, a point per seed."""
    figure = new_figure(6, 4.2)
    ax = figure.subplots()
    for arm, color in zip(('dpo', 'lora', 'lora, lr 1e-3', 'dpo, tuned'), COLORS):
        ends = [row for row in select(rows, task='toy', arm=arm) if row['reward'] != '']
        ax.plot([row['loss'] for row in ends], [row['reward'] for row in ends], 'o', color=color,
                label=LABELS[arm])
    sft = [row['reward'] for row in select(rows, task='toy', arm='sft') if row['reward'] != '']
    ax.axhline(mean_and_spread(sft)[0], color=GREY, lw=0.8, ls='--', label='SFT')
    frame(ax, 'A better loss and a worse policy', "the judge's reward, a point per seed",
          'loss on held-out pairs')
    names(ax)
    return figure


def main(cfg):
    """Runs the seeds that the table lacks, prints, draws, and returns what failed."""
    if cfg.choose:                      # other prompts and rates, so a table of their own
        own = Path(cfg.csv)
        cfg = replace(cfg, seeds='0', csv=str(own.with_stem(f'{own.stem}_choose')))
    path, seeds = table_and_seeds(cfg)
    rows = complete(path, seeds, lambda seed: run_seed(seed, cfg))
    ends = [row for row in rows if row['length'] != '']         # the last row of each run
    for task, columns in (('toy', ('reward', 'helpful', 'harm', 'refused', 'kl', 'length')),
                          ('contest', ('pass@1', 'pass@10', 'kl', 'length'))):
        show_means(select(ends, task=task), ('arm', 'lr'), columns)
    for name, gradient in kl_gradients().items():
        print(f'{name:<18}', *(f'{number:7.4f}' for number in gradient))
    if cfg.choose:
        return ends
    show_pictures(cfg, path, {'_kl': lambda: draw_kl(rows), '_critic': lambda: draw_critic(rows),
                              '_lora': lambda: draw_lora(rows)})
    return show_claims(CHECKS, by_seed(ends, 'task', 'arm'), cfg.quick)


if __name__ == '__main__':
    run_cli(main, Config)
