"""
Rates reward models: how well their scores rank held-out pairs, and which kinds of pairs they miss.

  - accuracy: the share of pairs whose chosen side has the higher score (± sqrt(p (1 - p) / n));
    loss: nats per pair, 0.693 for a coin. Both are those of training's log;
  - ceiling: labels are noisy, so even the judge (the data's reward.py) agrees with only so many,
    and with half of those that it ties; like judge: of the others, the share ranked as it does;
  - calibration: pairs in bins by the probability of the side that the model prefers. predicted is
    its mean, right the share of pairs where that side is the chosen one, ece their mean distance.
What it does not do: rate a reward.py, or compare scores across prompts, which no pair teaches.

    python -m tools.rate out/toy/rm out/toy/weak-rm --by=edit
"""
import contextlib, io, json, math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

import train_rm
from data.judge import load_judge
from data.text import DataError, encode_rows, load_rows, load_text, read_text
from data.turns import split_rows
from prefgpt import ScalarGPT, UserError, load_checkpoint, load_model, printable, run_cli, set_up
from tools.evaluate import show_table


@dataclass
class Config:
    runs: tuple = ()                # run folders of reward models
    data: str = ''                  # a data folder, or one JSON Lines file; '': the first run's
    by: str = ''                    # a table by this key of the pairs, such as data/toy's edit
    judge: str = ''                 # the reward.py that knows the ceiling; '': the data's
    batch_size: int = 100           # pairs scored at once
    seed: int = 0                   # has no effect: nothing here is random
    device: str = ''                # cuda, mps or cpu; '': cuda, else mps, else cpu
    dtype: str = ''                 # float32 or bfloat16; '': bfloat16 on newer GPUs, else float32


def load_pairs(data, template, tokenizer, block_size):
    """Returns the held-out pairs with all their keys, and their ids, as training keeps them."""
    folder, kept, ids = Path(data).is_dir(), [], []
    path = Path(data) / 'val.pairs.jsonl' if folder else Path(data)
    load_rows(path, 'pairs')                    # names the line of a row that cannot be used
    rows = [json.loads(line) for line in read_text(path).split('\n') if line.strip()]
    rows = rows if folder else split_rows(rows, template)[1]
    for row in rows:                            # one by one, because encode_rows may drop some
        with contextlib.suppress(DataError), contextlib.redirect_stdout(io.StringIO()):
            ids += encode_rows([row], 'pairs', tokenizer, block_size)
            kept.append(row)
    print(f'{path}: {len(kept)} of {len(rows)} held-out pairs kept')
    if not kept:
        raise DataError(f'{path}: in each pair both sides are equal, cut to {block_size} tokens')
    return kept, ids


def mean(values):
    """Returns the mean of a tensor as a number, or None if it is empty."""
    return values.double().mean().item() if len(values) else None


def calibration(margins, bins=5):
    """Returns the rows of a calibration table, one per bin that is not empty."""
    p = margins.abs().double().sigmoid()                                        # (N,)
    place = ((p - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    return [{'probability': f'{0.5 + i / bins / 2:.1f} to {0.5 + (i + 1) / bins / 2:.1f}',
             'n': int((place == i).sum()), 'predicted': mean(p[place == i]),
             'right': mean(margins[place == i] > 0)} for i in place.unique().tolist()]


def rate(run, margins, gaps):
    """Returns a run's row of the first table; gaps are the judge's margins, (N,), or None."""
    n, p = len(margins), mean(margins > 0)
    out = {'run': run, 'accuracy': p, 'accuracy_se': math.sqrt(p * (1 - p) / n),
           'loss': mean(train_rm.reward_loss(margins, torch.zeros(n)))}
    if gaps is not None:
        out |= {'ceiling': mean(0.5 + gaps.sign() / 2),
                'like judge': mean((margins * gaps)[gaps != 0] > 0)}
    return {**out, 'ece': sum(row['n'] / n * abs(row['predicted'] - row['right'])
                              for row in calibration(margins))}


def by_kind(key, rows, columns):
    """Returns a table with a row for each value of a key of the rows: n, the columns' means."""
    kinds = [' '.join(printable(str(row.get(key, '-'))).split()) for row in rows]
    return [{key: kind, 'n': n,
             **{name: mean(column[torch.tensor([each == kind for each in kinds])])
                for name, column in columns.items()}} for kind, n in Counter(kinds).most_common()]


@torch.no_grad()
def main(cfg):
    """Prints the tables, and returns them by their titles."""
    if not cfg.runs:
        raise UserError('name at least one run folder of a reward model')
    saved = [load_checkpoint(run, ['rm']) for run in cfg.runs]
    data, (device, autocast) = cfg.data or saved[0]['config']['data'], set_up(cfg)
    (tokenizer, text), *others = [load_text(data, each) for each in saved]  # all must fit the data
    if any(other != text for _, other in others):       # and, where the data is a file, each other
        raise UserError('the runs have different tokenizers or templates: rate them one by one')
    rows, pairs = load_pairs(data, text['template'], tokenizer,
                             min(each['model']['block_size'] for each in saved))
    path, gaps, margins = cfg.judge or f'{data}/reward.py', None, {}    # both (N,)
    if cfg.judge or Path(path).exists():
        judge = load_judge(path)
        gaps = torch.tensor([judge(row['prompt'], row['chosen'])['reward']
                             - judge(row['prompt'], row['rejected'])['reward'] for row in rows])
    for run, each in zip(cfg.runs, saved):
        model = load_model(ScalarGPT, each, 'reward_model', device)
        chosen, rejected = train_rm.all_scores(model, pairs, cfg.batch_size, device, autocast)
        margins[run] = (chosen - rejected).cpu()
    tables = {'all pairs': [rate(run, each, gaps) for run, each in margins.items()]}
    if cfg.by:
        columns = {} if gaps is None else {'ceiling': 0.5 + gaps.sign() / 2}
        columns |= {run: each > 0 for run, each in margins.items()}
        tables[f'by {cfg.by}'] = by_kind(cfg.by, rows, columns)
    tables |= {f'calibration of {run}': calibration(each) for run, each in margins.items()}
    for title, table in tables.items():
        show_table(table, title)
    return tables


if __name__ == '__main__':
    run_cli(main, Config)
