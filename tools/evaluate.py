"""
Compares checkpoints: what they answer to held-out prompts, in one table.

Each run answers the same prompts at T=1, with the same random numbers, and once greedily. Columns
are means over responses; ± is the standard error over the prompts, std / sqrt(n) with n - 1 in the
std. With --samples=K each run answers each prompt K times, and ± is over the prompts' own means.
  - the judge's numbers: from a reward.py, reward and all the others; from a reward model, the
    score. A number that is left out for some prompts is averaged over the others. Responses
    without EOS keep the number that they get: PPO's no_eos_score is not applied;
  - win: the share of prompts where this run's reward is above the first run's, a tie 1/2;
  - kl: log pi(response) summed over its tokens, minus the same under the first run, in nats. At
    T=1 its mean is KL(policy, first run); over few prompts it can be negative: raise --samples;
  - length: tokens with EOS; eos: the share that ended; distinct-1 and distinct-2: the number of
    different words, and of different pairs of successive words, divided by all (Li et al. 2016).

--best_of=N adds a row at T=1 that needs no training of the policy: --select, usually a reward
model, picks the highest-scoring of N samples of the first run. Without --select the judge itself
picks, which is an upper bound and not a method. A response without EOS counts as in PPO, min(score,
-1). The row's kl is log N - (N-1)/N, a bound of KL(best of N, first run) (Beirami et al. 2024).

    python -m tools.evaluate out/toy/sft out/toy/ppo out/toy/dpo --best_of=8 --select=out/toy/rm
"""
import json, math, statistics
from dataclasses import dataclass
from pathlib import Path

import torch

import train_ppo
from data.judge import load_judge
from data.text import decode_responses, encode_rows, load_rows, load_split, load_text
from prefgpt import (GPT, POLICIES, UserError, generate, load_checkpoint, load_model, rng, run_cli,
                     set_up, token_logprobs, x_and_y)
from tools.sample import longest


@dataclass
class Config:
    runs: tuple = ()                # run folders; kl and win are against the first one
    data: str = ''                  # a data folder, or one JSON Lines file; '': the first run's
    split: str = 'val'              # the prompts: val, or another NAME.prompts.jsonl of the folder
    judge: str = ''                 # a reward.py or a reward model's run; '': the data's reward.py
    prompts: int = 400              # how many of the held-out prompts, from the first on
    max_new_tokens: int = 0         # longest response; 0: as the first run was trained
    samples: int = 1                # responses to each prompt at T=1
    best_of: int = 0                # a row for the best of N samples of the first run; 0: none
    select: str = ''                # who picks it: a reward model's run, a reward.py; '': the judge
    batch_size: int = 100           # responses sampled at once; they do not depend on it
    json: str = ''                  # a file to write the two tables to; '': none
    seed: int = 0                   # of the samples
    device: str = ''                # cuda, mps or cpu; '': cuda, else mps, else cpu
    dtype: str = ''                 # float32 or bfloat16; '': bfloat16 on newer GPUs, else float32


# ----------------------------------------------------------------------------- columns

def distinct(texts, n):
    """Returns the number of different sequences of n successive words, divided by that of all."""
    grams = [gram for words in map(str.split, texts)
             for gram in zip(*(words[i:] for i in range(n)))]
    return len(set(grams)) / max(1, len(grams))


def standard_error(numbers, samples=1):
    """Returns std / sqrt(n) of the prompts' means; each prompt has `samples` successive numbers."""
    means = [statistics.fmean(numbers[i:i + samples]) for i in range(0, len(numbers), samples)]
    return statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None


def mean_scores(judged):
    """Returns the mean of every number of the judge over the responses that have it."""
    names = dict.fromkeys(name for numbers in judged for name in numbers)
    columns = {name: [each[name] for each in judged if name in each] for name in names}
    return {name: sum(numbers) / len(numbers) for name, numbers in columns.items()}


def win_rate(responses, others):
    """Returns how often a response has more reward than the other to its prompt; a tie: 1/2."""
    points = 0.0
    for response, other in zip(responses, others, strict=True):
        reward, other_reward = response['judged']['reward'], other['judged']['reward']
        # Equal responses tie: scores of the same text differ by rounding from batch to batch
        same = all(response[key] == other[key] for key in ('text', 'eos'))
        points += 0.5 if same or reward == other_reward else reward > other_reward
    return points / len(responses)


def summarize(run, responses, first_responses, samples=1):
    """Returns a run's row of the table; the first run's responses are what win compares with."""
    judged = mean_scores([response['judged'] for response in responses])
    kl, length, eos, texts = ([response[name] for response in responses]
                              for name in ('kl', 'length', 'eos', 'text'))
    own = {'kl': statistics.fmean(kl), 'kl_se': standard_error(kl, samples),
           'length': statistics.fmean(length), 'eos': statistics.fmean(eos),
           'distinct-1': distinct(texts, 1), 'distinct-2': distinct(texts, 2)}
    if judged:
        rewards = [response['judged']['reward'] for response in responses]
        own = {'reward_se': standard_error(rewards, samples),
               'win': win_rate(responses, first_responses), **own}
    if taken := {'run', *own} & judged.keys():
        raise UserError(f'the judge says {", ".join(sorted(taken))}: a column of the table itself')
    return {'run': run, **judged, **own}


# ----------------------------------------------------------------------------- responses

def load_columns(where, saved_policy, device, size):
    """
    Returns a reward.py or a reward model as a function, columns(tokens, response_mask, prompts,
    texts) -> a dict of numbers per response, and the checkpoint whose block limits what it reads.
    """
    if where.endswith('.py'):
        judge = load_judge(where)
        return (lambda tokens, response_mask, prompts, texts:
                [judge(prompt, text) for prompt, text in zip(prompts, texts)]), saved_policy
    scorer, source = train_ppo.load_scorer(where, saved_policy, device, size)
    return lambda *batch: [{'reward': number} for number in scorer(*batch).tolist()], source


def describe(tokens, response_mask, prompts, columns, tokenizer):
    """Returns a dict per response of a batch: text, eos, length, judged (what the judge says)."""
    texts, ended = decode_responses(tokens, response_mask, tokenizer)
    judged = columns(tokens, response_mask, prompts, texts) if columns else [{} for _ in texts]
    return [{'text': text, 'eos': eos, 'length': length, 'judged': numbers}
            for text, eos, length, numbers in zip(texts, ended.tolist(),
                                                  response_mask.sum(1).tolist(), judged)]


def sample(policy, prompts, n, at_once, stream, tokenizer, cfg, temperature=1.0):
    """Yields tokens, response_mask and prompts as text of n responses to each prompt, in parts."""
    generator = rng(cfg.seed, stream, 'eval')       # every run meets the same random numbers
    rows = [prompt for prompt in prompts for _ in range(n)]
    for i in range(0, len(rows), at_once):
        texts, ids = zip(*rows[i:i + at_once])
        yield *generate(policy, ids, cfg.max_new_tokens, tokenizer.eot_token, temperature,
                        generator), texts


def answer(policy, first, prompts, columns, tokenizer, cfg, temperature):
    """Returns the responses to each prompt, (text, ids), as describe has them, with kl to first."""
    responses, n = [], cfg.samples if temperature else 1
    for tokens, response_mask, texts in sample(policy, prompts, n, cfg.batch_size, 0, tokenizer,
                                               cfg, temperature):
        x, y = x_and_y(tokens)
        kl = (token_logprobs(policy, x, y, response_mask)
              - token_logprobs(first, x, y, response_mask)).sum(1)              # (B,)
        batch = describe(tokens, response_mask, texts, columns, tokenizer)
        responses += [{**each, 'kl': nats} for each, nats in zip(batch, kl.tolist())]
    return responses


def best_of(policy, prompts, columns, scorer, tokenizer, cfg):
    """
    Returns the response to each prompt that scorer scores highest among N samples at T=1. Its kl is
    log N - (N-1)/N, because the log-ratio of the first run's samples to the first run is 0.
    """
    responses, N = [], cfg.best_of
    at_once = max(1, cfg.batch_size // N) * N       # all N of a prompt; memory is as in answer
    # Stream 1 is not answer's: else N=1 would copy the first run
    for tokens, response_mask, texts in sample(policy, prompts, N, at_once, 1, tokenizer, cfg):
        samples, ended = decode_responses(tokens, response_mask, tokenizer)
        scores = scorer(tokens, response_mask, texts, samples)                  # (B N,)
        scores = train_ppo.cap_unfinished(scores, ended, train_ppo.Config.no_eos_score)
        best = scores.view(-1, N).argmax(1)             # (B,), of equal scores the first
        best += N * torch.arange(len(best), device=best.device)     # places among the B N
        responses += describe(tokens[best], response_mask[best], texts[::N], columns, tokenizer)
    return [{**response, 'kl': math.log(N) - (N - 1) / N} for response in responses]


def load_prompts(cfg, data, template, tokenizer, block_size):
    """Returns prompts as (text, ids); only ids may be cut: a reward.py reads the whole text."""
    if cfg.split == 'val':
        rows = load_split(data, 'prompts', template)[1]             # held out
    else:
        rows = load_rows(Path(data) / f'{cfg.split}.prompts.jsonl', 'prompts')
    rows = rows[:cfg.prompts]
    ids = encode_rows(rows, 'prompts', tokenizer, block_size, cfg.max_new_tokens, name=cfg.split)
    return [(row['prompt'], prompt) for row, (prompt,) in zip(rows, ids)]


def show_table(rows, title):
    """Prints rows, dicts, as a table: the first column is text, and NAME_se follows NAME."""
    def cell(row, name):
        value, error = row.get(name), row.get(f'{name}_se')
        text = f'{value:.3f}' if isinstance(value, float) else value or '-'
        return text if error is None else f'{text} ±{error:.3f}'
    names = dict.fromkeys(name for row in rows for name in row if not name.endswith('_se'))
    columns = [[name, *(cell(row, name) for row in rows)] for name in names]
    widths = [max(map(len, column)) for column in columns]
    print(f'\n{title}')
    for run, *cells in zip(*columns):
        print('  '.join([run.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]))


@torch.no_grad()
def main(cfg):
    """
    Prints the two tables, and writes them to --json. Returns {'rows': [...], 'greedy': [...]}, and
    under 'responses' for each of the rows the list of its responses, as describe has them.
    """
    if not cfg.runs:
        raise UserError('name at least one run folder')
    if cfg.samples < 1 or cfg.samples > 1 and cfg.best_of:
        raise UserError(f'--samples={cfg.samples}: at least 1, and 1 with --best_of')
    if cfg.best_of < 0 or cfg.select and not cfg.best_of:
        raise UserError(f'--best_of={cfg.best_of}: 0 for no such row, and above 0 with --select')
    saved = [load_checkpoint(run, POLICIES) for run in cfg.runs]
    cfg, data = longest(cfg, saved[0]), cfg.data or saved[0]['config']['data']
    device, autocast = set_up(cfg)
    tokenizer, text = load_text(data, saved[0])
    for run, other in zip(cfg.runs, saved):
        if other['fingerprint'] != saved[0]['fingerprint']:
            raise UserError(f'{run} reads another tokenizer than {cfg.runs[0]}')
    policies = [load_model(GPT, each, 'policy', device) for each in saved]

    # --- who judges, and who picks the best of N
    beside = Path(data) / 'reward.py'
    judge = cfg.judge or (str(beside) if beside.exists() else '')
    selector = cfg.select or judge
    columns, readers = None, list(saved)        # readers: checkpoints of all that read a response
    if judge:
        columns, source = load_columns(judge, saved[0], device, cfg.batch_size)
        readers.append(source)
        print(f'judge: {judge}')
    else:
        print(f'no judge: {beside} is not there; --judge=RUN lets a reward model judge')
    if cfg.best_of:
        if not selector:
            raise UserError(f'--best_of={cfg.best_of}: nobody to pick one; pass --select')
        scorer, source = train_ppo.load_scorer(selector, saved[0], device, cfg.batch_size)
        readers.append(source)
        print(f'the best of {cfg.best_of} is picked by {selector}')
    block_size = min(each['model']['block_size'] for each in readers)
    prompts = load_prompts(cfg, data, text['template'], tokenizer, block_size)

    tables, kept = {}, []
    for name, temperature in (('rows', 1.0), ('greedy', 0.0)):
        with autocast:
            answers = [(run, answer(policy, policies[0], prompts, columns, tokenizer, cfg,
                                    temperature)) for run, policy in zip(cfg.runs, policies)]
            if cfg.best_of and temperature:     # greedy samples are all the same
                answers.append((f'best of {cfg.best_of} of {cfg.runs[0]}',
                                best_of(policies[0], prompts, columns, scorer, tokenizer, cfg)))
        samples = cfg.samples if temperature else 1
        tables[name] = [summarize(run, each, answers[0][1], samples) for run, each in answers]
        kept = kept or [each for _, each in answers]
        drawn = 'one sample' if samples == 1 else f'{samples} samples'
        show_table(tables[name], f'{len(prompts)} held-out prompts, '
                   + (f'{drawn} each at T=1' if temperature else 'answered greedily'))
    if cfg.json:
        Path(cfg.json).parent.mkdir(parents=True, exist_ok=True)
        Path(cfg.json).write_text(json.dumps(tables, indent=1) + '\n')
    return {**tables, 'responses': kept}


if __name__ == '__main__':
    run_cli(main, Config)
