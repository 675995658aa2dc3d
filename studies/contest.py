"""
DPO against PPO where tests judge: the code contest of Xu et al. 2024, on data/contest.

Tables 3, 7, 8 and 9. The paper's three conditions for PPO, and where the reference counts:

    A   <- (A - mean) / std over the rollout batch            ref <- ref + ref_ema (pi - ref)
    pi* ~ ref exp(reward / beta): with reward 0 or 1, a correct answer's odds times e^(1 / beta)

The arms:
  - sft; early sft, 1,000 steps in place of 1,500: for the "pretrained" of table 9;
  - dpo LR: one pass over the data set's pairs, whose winners are improbable under SFT;
    dpo on-policy LR: about two passes over pairs of SFT's own samples, four groups of five per
    prompt, ranked by the tests; early ref: the same pairs, but starting from early sft;
  - iter LR, iter + winners LR: four rounds of sampling and DPO, each from the policy of the last
    one; five samples without a correct one are left out, or the data set's program is the winner;
  - ppo, four rungs at two learning rates and equal rollouts: baseline (64 responses a step, plain
    advantages), + norm, + batch (512), + ema (0.02); ppo binding: beta 0.25, large batch, with a
    fixed reference and with one that follows at 0.1; ppo no value: the baseline and + norm with
    neither a value model nor gradient clipping, where normalization could matter more.

Reward 1 and beta 0.01 are the paper's 10 and 0.1 over ten; no EOS scores 0, as there. pass@1 and
pass@10 are unbiased for fresh samples (Chen et al. 2021, eq. 1); 10@k submits 10 of the samples
that pass the prompt's tests (Li et al. 2022).

    python -m studies.contest
    PPO's pass@1 is 1.5 times SFT's at least: holds in 5 of 5 seeds
"""
import json, math, statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

import tools.pairs, train_dpo, train_ppo, train_sft
from data.contest import prepare
from data.contest.language import LEVELS
from data.text import load_rows
from prefgpt import UserError, load_checkpoint, run_cli
from studies.style import BARS, COLORS, GREY, POINTS, frame, names, new_figure, show_picture
from studies.table import (above, by_seed, complete, grouped, mean_and_spread, select, show_claims,
                           show_means, table_and_seeds)
from tools import evaluate

JUDGE, TOKENS = 'data/contest/reward.py', 12        # TOKENS: the longest program and EOS


@dataclass
class Config:
    seeds: str = '5 6 7 8 9'        # the seeds to run, or to complete
    split: str = 'test'             # the problems judged: test, or val to choose settings on
    csv: str = 'out/studies/contest.csv'    # for seeds that studies/results/contest.csv lacks
    results: bool = False           # add them to studies/results/contest.csv, and draw its picture
    quick: bool = False             # a smoke test: one seed, a few steps, a table of its own


FULL = dict(sft_steps=1500, early_steps=1000, dpo_steps=78, own_steps=15, rounds=4,
            rollouts=20_480, batches=(64, 512), sampled=500, n=20, prompts=400, samples=60, data={})
QUICK = dict(sft_steps=20, early_steps=10, dpo_steps=2, own_steps=2, rounds=2, rollouts=32,
             batches=(8, 16), sampled=10, n=10, prompts=4, samples=10,
             data=dict(sft=400, pairs=100, prompts=64))
DPO_LRS, OWN_LRS = (1e-4, 1e-3, 3e-3), (3e-4, 1e-3)     # on given pairs, and on own ones
ITER_LRS = (1e-4, 3e-4, 1e-3)                           # of a round of DPO-Iter
PPO_LRS, RUNGS = (1e-3, 3e-4), ('baseline', '+ norm', '+ batch', '+ ema')
NO_VALUE = dict(value_lr=0.0, grad_clip=1e9)    # values stay 0, as they begin; nothing is clipped


class Arms:
    """Makes the runs of one seed: a method runs a script's main and returns the run's folder."""

    def __init__(self, seed, sizes, name):
        self.seed, self.sizes = seed, sizes
        self.data, self.out = f'data/{name}', f'out/{name}'
        prepare.main(prepare.Config(seed=seed, out=self.data, **sizes['data']))

    def train(self, script, name, steps, **given):
        """Runs a script; returns the run's folder."""
        script.main(script.Config(**{
            'data': self.data, 'seed': self.seed, 'resume': True, 'steps': steps, 'device': 'cpu',
            'max_new_tokens': TOKENS, 'eval_every': steps, **given}, out=f'{self.out}/{name}'))
        return f'{self.out}/{name}'

    def sft(self, name):
        """Trains on the demonstrations: 'sft', or 'early', which stops sooner."""
        return self.train(train_sft, name, self.sizes[f'{name}_steps'], batch_size=64, lr=4e-3,
                          block_size=32)

    def dpo(self, name, init, lr, own_pairs=''):
        """Trains for about one pass over the data set's pairs or over own ones."""
        return self.train(train_dpo, name, self.sizes['own_steps' if own_pairs else 'dpo_steps'],
                          data=own_pairs or self.data, init=init, beta=0.1, lr=lr, batch_size=64,
                          warmup=3)

    def ppo(self, name, init, lr, rollout_size, **changes):
        """Trains with four optimizer steps per rollout batch, and the same rollouts in all."""
        steps = self.sizes['rollouts'] // rollout_size
        return self.train(train_ppo, name, steps, init=init, reward=JUDGE, no_eos_score=0.0, lr=lr,
                          gae_lambda=1.0, rollout_size=rollout_size, batch_size=rollout_size // 4,
                          ppo_epochs=1, warmup=steps // 20,
                          **{'beta': 0.01, 'value_lr': lr, 'ref_ema': 0.0, **changes})

    def own_pairs(self, name, run, seed, winners=None):
        """
        Writes pairs of a run's samples, five at a time: correct against wrong. If none of the five
        is correct, winners, {prompt: program}, may have the correct one. Returns the file, or None.
        """
        rows, path = Path(self.out, f'{name}.rows.jsonl'), Path(self.out, f'{name}.pairs.jsonl')
        if not rows.exists():
            tools.pairs.main(tools.pairs.Config(
                runs=(run,), data=self.data, out=str(rows), reward=JUDGE, n=self.sizes['n'],
                temperature=1.0, max_new_tokens=TOKENS, prompts=self.sizes['sampled'], seed=seed,
                device='cpu'))
        pairs, left_out = [], Counter()
        for (prompt,), group in grouped(map(json.loads, rows.open()), 'prompt').items():
            for five in (group[i:i + 5] for i in range(0, len(group), 5)):
                if winners and prompt in winners and all(row['score'] == 0 for row in five):
                    five = [{'prompt': prompt, 'completion': winners[prompt], 'score': 1.0}, *five]
                pairs.append(tools.pairs.make_pair(five, 0.0, left_out))
        pairs = [pair for pair in pairs if pair]
        path.write_text(''.join(json.dumps(pair) + '\n' for pair in pairs))
        print(f'{path}: {len(pairs)} pairs, left out: {dict(left_out)}')
        return str(path) if len({pair['prompt'] for pair in pairs}) > 1 else None

    def iterate(self, name, run, lr, winners=None):
        """Trains DPO-Iter; a round without five samples of both kinds trains nothing."""
        for number in range(1, self.sizes['rounds'] + 1):
            pairs = self.own_pairs(f'{name}-{number}', run, 100 * self.seed + number, winners)
            if pairs:
                run = self.dpo(f'{name}-{number}', run, lr, pairs)
        return run


def train_arms(arms):
    """Trains everything with one seed; returns {arm: run folder}."""
    small, large = arms.sizes['batches']
    sft, early = arms.sft('sft'), arms.sft('early')
    runs = {'sft': sft, 'early sft': early}
    for lr in DPO_LRS:
        runs[f'dpo {lr:g}'] = arms.dpo(f'dpo-{lr:g}', sft, lr)
    pairs = arms.own_pairs('own', sft, 100 * arms.seed)
    for lr in OWN_LRS:
        runs[f'dpo on-policy {lr:g}'] = arms.dpo(f'own-{lr:g}', sft, lr, pairs) if pairs else sft
    runs['dpo on-policy, early ref'] = arms.dpo('own-early', early, 3e-4, pairs) if pairs else early
    winners = {row['prompt']: row['chosen']
               for row in load_rows(f'{arms.data}/train.pairs.jsonl', 'pairs')}
    for lr in ITER_LRS:
        runs[f'iter {lr:g}'] = arms.iterate(f'iter-{lr:g}', sft, lr)
        runs[f'iter + winners {lr:g}'] = arms.iterate(f'winners-{lr:g}', sft, lr, winners)
    for lr in PPO_LRS:
        for rung, size, changes in zip(RUNGS, (small, small, large, large), (
                dict(whiten=False), {}, {}, dict(ref_ema=0.02))):
            runs[f'ppo {rung} {lr:g}'] = arms.ppo(
                f"ppo-{rung.replace('+ ', '')}-{lr:g}", sft, lr, size, **changes)
    # Here reward / beta is 4: the optimum is e^4 times the odds, not e^100
    runs['ppo binding fixed'] = arms.ppo('binding-fixed', sft, 1e-3, large, beta=0.25)
    runs['ppo binding ema'] = arms.ppo('binding-ema', sft, 1e-3, large, beta=0.25, ref_ema=0.1)
    runs['ppo no value'] = arms.ppo('no-value', sft, 1e-3, small, whiten=False, **NO_VALUE)
    runs['ppo no value + norm'] = arms.ppo('no-value-norm', sft, 1e-3, small, **NO_VALUE)
    runs['ppo + ema, early ref'] = arms.ppo('ppo-early', early, 1e-3, large, ref_ema=0.02)
    return runs


def pass_at(total, correct, n):
    """Returns the chance that one of n, drawn from the total without putting back, is correct."""
    return 1 - math.comb(total - correct, n) / math.comb(total, n)


def filtered_pass_at(public, correct, n):
    """Returns the same for samples that pass the public tests; of n or fewer, all are drawn."""
    return float(correct > 0) if public <= n else pass_at(public, correct, n)


def pass_columns(judged, samples, n):
    """Returns mean pass@1, pass@n and n@k of the prompts, whose judged responses are neighbours."""
    rows = []
    for i in range(0, len(judged), samples):
        prompt = judged[i:i + samples]
        public = [each for each in prompt if each['public']]    # what would be submitted
        correct, submitted = (sum(each['correct'] > 0 for each in some)
                              for some in (prompt, public))
        rows.append({**{f'pass@{k}': pass_at(samples, correct, k) for k in (1, n)},
                     f'{n}@k': filtered_pass_at(len(public), submitted, n)})
    return evaluate.mean_scores(rows)


def training_numbers(run):
    """Returns what a run's log says: PPO's score by quarters, DPO's last numbers and first ones."""
    numbers = dict.fromkeys(('first_quarter', 'last_quarter', 'loss', 'accuracy', 'chosen_before',
                             'chosen', 'rejected_before', 'rejected'), '')
    saved = load_checkpoint(run, ['sft', 'dpo', 'ppo'])
    if saved['stage'] == 'ppo':
        log = map(json.loads, Path(run, 'log.jsonl').read_text().splitlines())
        scores = [row['score'] for row in log if 'score' in row]
        quarter = max(1, len(scores) // 4)
        numbers |= {'first_quarter': statistics.fmean(scores[:quarter]),
                    'last_quarter': statistics.fmean(scores[-quarter:])}
    if saved['stage'] == 'dpo':          # on its held-out pairs
        numbers |= {name: saved['metrics'][name]
                    for name in ('loss', 'accuracy', 'chosen', 'rejected')}
        numbers['chosen_before'], numbers['rejected_before'] = saved['ref_val'].mean(1).tolist()
    return numbers


def run_seed(seed, cfg):
    """Trains all arms with one seed; returns their rows, judged level by level."""
    sizes = QUICK if cfg.quick else FULL
    arms = Arms(seed, sizes, f"contest-{'quick-' if cfg.quick else ''}{seed}")
    runs, rows = train_arms(arms), []
    trained = {arm: training_numbers(run) for arm, run in runs.items()}
    for level in LEVELS:
        tables = evaluate.main(evaluate.Config(
            runs=tuple(runs.values()), data=arms.data, split=f'{cfg.split}-{level}', judge=JUDGE,
            prompts=sizes['prompts'], samples=sizes['samples'], max_new_tokens=TOKENS,
            batch_size=2000, device='cpu'))
        for arm, row, responses in zip(runs, tables['rows'], tables['responses']):
            judged = [response['judged'] for response in responses]
            rows.append({'seed': seed, 'split': cfg.split, 'level': level, 'arm': arm,
                         **pass_columns(judged, sizes['samples'], 10), 'k': sizes['samples'],
                         **{name: row[name] for name in ('public', 'valid', 'kl', 'length')},
                         **trained[arm], 'threads': torch.get_num_threads(), 'command':
                         f'python -m studies.contest --seeds={seed} --split={cfg.split}'})
    return rows


# Of the interview rows of one seed, t[arm]: a finding -> whether it holds
PLAIN, SMALL, LARGE, PPO = (f'ppo {rung} 0.001' for rung in RUNGS)
BOUND, DPO_ARMS = ('ppo binding ema', 'ppo binding fixed'), [f'dpo {lr:g}' for lr in DPO_LRS]
ON_POLICY = [f'dpo on-policy {lr:g}' for lr in OWN_LRS]
ITER, ITER_WINNERS = ([f'{name} {lr:g}' for lr in ITER_LRS] for name in ('iter', 'iter + winners'))
CHECKS = {
    "PPO's pass@1 is 1.5 times SFT's at least":
        lambda t: t[PPO]['pass@1'] >= 1.5 * t['sft']['pass@1'],
    "off-policy DPO somewhere loses half of SFT's pass@1, at a pair accuracy of 0.70 at least":
        lambda t: any(t[arm]['pass@1'] <= 0.5 * t['sft']['pass@1'] and t[arm]['accuracy'] >= 0.70
                      for arm in DPO_ARMS),
    'off-policy DPO somewhere loses 10 points of valid programs':
        lambda t: any(t[arm]['valid'] <= t['sft']['valid'] - 0.10 for arm in DPO_ARMS),
    "PPO's pass@1 is above that of every plain DPO arm":
        above('pass@1', PPO, *DPO_ARMS, *ON_POLICY),
    "DPO-Iter with dataset winners somewhere loses half of SFT's pass@1 and 10 points of valid "
    'programs':
        lambda t: any(t[arm]['pass@1'] <= 0.5 * t['sft']['pass@1']
                      and t[arm]['valid'] <= t['sft']['valid'] - 0.10 for arm in ITER_WINNERS),
    'DPO-Iter without them, at the same lr and steps, stays within 5 points of valid programs':
        lambda t: all(t[arm]['valid'] > t['sft']['valid'] - 0.05 for arm in ITER),
    "PPO's pass@1 is above DPO-Iter's without dataset winners": above('pass@1', PPO, *ITER),
    'large batch above small, both normalized, at lr 1e-3: first quarter of training':
        above('first_quarter', LARGE, SMALL),
    'large batch above small at lr 1e-3: last quarter of training':
        above('last_quarter', LARGE, SMALL),
    'large batch above small at lr 1e-3: pass@1': above('pass@1', LARGE, SMALL),
    'large batch above small at lr 3e-4: last quarter of training':
        above('last_quarter', 'ppo + batch 0.0003', 'ppo + norm 0.0003'),
    'EMA above a fixed reference where the KL binds: last quarter of training':
        above('last_quarter', *BOUND),
    'EMA above a fixed reference where the KL binds: pass@1': above('pass@1', *BOUND),
    'EMA above a fixed reference where it does not bind: pass@1': above('pass@1', PPO, LARGE),
    'normalization above the baseline at lr 1e-3: last quarter of training':
        above('last_quarter', SMALL, PLAIN),
    'normalization above the baseline at lr 1e-3: pass@1': above('pass@1', SMALL, PLAIN),
    'normalization above the baseline at lr 3e-4: last quarter of training':
        above('last_quarter', 'ppo + norm 0.0003', 'ppo baseline 0.0003'),
    'normalization above plain advantages without a value model and gradient clipping: pass@1':
        above('pass@1', 'ppo no value + norm', 'ppo no value'),
    'the baseline below SFT, as in table 3: pass@1 at lr 1e-3': above('pass@1', 'sft', PLAIN),
    "PPO's 10@k is above SFT's, as in table 8": above('10@k', PPO, 'sft'),
    'an early reference costs DPO more than PPO, as in table 9: share of pass@1 lost':
        lambda t: (t['dpo on-policy, early ref']['pass@1'] * t[PPO]['pass@1']
                   < t['ppo + ema, early ref']['pass@1'] * t['dpo on-policy 0.0003']['pass@1'])}


# What the findings rest on: the first arm's number minus the second's, seed by seed
DIFFERENCES = [(f'ppo {one} {lr:g}', f'ppo {other} {lr:g}', column)
               for lr in PPO_LRS for other, one in zip(RUNGS, RUNGS[1:])
               for column in ('pass@1', 'first_quarter', 'last_quarter')]
DIFFERENCES += [(one, other, column) for column in ('pass@1', 'last_quarter')
                for one, other in (BOUND, ('ppo no value + norm', 'ppo no value'))]
DIFFERENCES += [(PPO, other, 'pass@1') for other in ('sft', ON_POLICY[0], *ITER)]
DIFFERENCES += [(PPO, 'sft', '10@k'), (PPO, 'ppo + ema, early ref', 'pass@1'),
                (ON_POLICY[0], 'dpo on-policy, early ref', 'pass@1')]


def show_differences(rows):
    """Prints DIFFERENCES, and how far DPO moved its pairs: means and standard deviations."""
    def text(values, sign=''):
        mean, spread = mean_and_spread(values)
        return f'{mean:{sign}.3f} ±{spread:.3f}'
    runs = by_seed(select(rows, level='interview'), 'arm').values()
    print('\npaired differences over seeds, interview level, ratios in brackets; log pi, moved by')
    for one, other, column in DIFFERENCES:
        pairs = [[run[arm][column] for arm in (one, other)] for run in runs]
        ratios = [a / b for a, b in pairs if b]         # in the quick form b may be 0
        print(f'{column:<13} {one} - {other}: {text([a - b for a, b in pairs], "+")}'
              + (f' ({text(ratios)})' if len(ratios) == len(pairs) else ''))
    for arm in (*DPO_ARMS, *ON_POLICY):
        for side in ('chosen', 'rejected'):
            ends = [[run[arm][name] for name in (side, f'{side}_before')] for run in runs]
            if '' not in ends[0]:               # in the quick form there may be no pairs
                print(f'nats          {arm}, {side}: {text([a - b for a, b in ends], "+")}')


# The first panels: arm -> its name there, with the paper's number where it has one:
# pass@5 on APPS, interview level, CodeLlama-34B (table 7); DPO's is 10@1k on CodeContests (table 8)
SHOWN = {'sft': 'SFT (10.1 %)', 'dpo 0.0001': 'DPO 1e-4', 'dpo 0.001': 'DPO 1e-3',
         'dpo 0.003': 'DPO 3e-3 (*0.0 %)', 'dpo on-policy 0.0003': 'DPO on-policy 3e-4',
         'dpo on-policy 0.001': 'DPO on-policy 1e-3', 'iter 0.0001': 'Iter 1e-4',
         'iter 0.0003': 'Iter 3e-4', 'iter 0.001': 'Iter 1e-3',
         'iter + winners 0.0001': 'Iter + winners 1e-4',
         'iter + winners 0.0003': 'Iter + winners 3e-4',
         'iter + winners 0.001': 'Iter + winners 1e-3 (9.3 %)', PPO: 'PPO (18.0 %)'}
PAPER_RUNGS = (2.4, 11.4, 14.6, 18.0)       # table 3: pass@5, APPS, interview level; SFT 10.1


def spreads_of(rows, arms, column, level='interview'):
    """Returns the means over seeds of these arms, and their standard deviations."""
    return zip(*(mean_and_spread([row[column] for row in select(rows, arm=arm, level=level)])
                 for arm in arms))


def draw_bars(ax, rows, column, panel):
    """Draws an arm per line; the paper's number is in brackets."""
    means, spreads = spreads_of(rows, SHOWN, column)
    colors = [COLORS[arm not in ('sft', PPO)] for arm in SHOWN]
    ax.barh(list(SHOWN.values()), means, color=colors, height=0.6, xerr=spreads, **BARS)
    ax.invert_yaxis()
    frame(ax, *panel)


def draw_ladder(ax, rows):
    """Draws pass@1 by rung, as a multiple of SFT's in the same seed, beside the paper's."""
    sft = {row['seed']: row['pass@1'] for row in select(rows, level='interview', arm='sft')}
    ratios = [{**row, 'ratio': row['pass@1'] / sft[row['seed']]}
              for row in select(rows, level='interview')]
    for lr, color in zip(PPO_LRS, COLORS):
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
    arms = [*DPO_ARMS, *ON_POLICY]
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
        means, spreads = zip(*(
            mean_and_spread([row[column] for row in select(rows, arm=arm, level=level)])
            for _, column, level in columns))
        ax.bar([place + shift for place in range(len(columns))], means, 0.4, yerr=spreads,
               color=color, label=arms[arm], **BARS)
    ax.set_xticks(range(len(columns)), [label for label, *_ in columns])
    frame(ax, *panel)
    names(ax)


def draw(rows):
    """Draws the picture: the arms above; below, the ladder, the levels and the binding KL."""
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


def main(cfg):
    """Runs the seeds that the table lacks, prints, draws, and returns what failed."""
    path, seeds = table_and_seeds(cfg)
    if cfg.split not in ('test', 'val'):
        raise UserError(f'--split={cfg.split!r}: test or val')
    rows = complete(path, seeds, lambda seed: run_seed(seed, cfg), split=cfg.split)
    for level in LEVELS:
        print(f'\n{level}', end='')
        show_means(select(rows, level=level), ('arm',),
                   ('pass@1', 'pass@10', '10@k', 'public', 'valid', 'kl', 'length'))
    show_differences(rows)
    show_picture(cfg, path, lambda: draw(rows))
    return show_claims(CHECKS, by_seed(select(rows, level='interview'), 'arm'), cfg.quick)


if __name__ == '__main__':
    run_cli(main, Config)
