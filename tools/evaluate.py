"""
Compare checkpoints: what they answer to held-out prompts, in one table.

Each run answers the same prompts at T=1, with the same random numbers, and once greedily.
Columns, means over responses; ± is the standard error over the prompts, std / sqrt(n) with n - 1 in
the std ('reward_se' and 'kl_se' in the JSON, null where there is one prompt only):
  - what the judge says, a reward.py or a reward model: reward, and of a reward.py all its other
    numbers, for data/toy helpful, harm (the share with a cost) and refused (the share of benign
    prompts refused). A number that is left out for some prompts is averaged over the others. A
    reward model's score is a logit of Bradley and Terry, shifted to mean 0 over its own held-out
    pairs. Responses without EOS count as they are judged, without PPO's no_eos_score;
  - win: the share of prompts where this run's reward is above the first run's, a tie 1/2;
  - kl: log pi(response) summed over its tokens, minus the same under the first run, in nats. At
    T=1 its mean is KL(policy, first run), and 0 for the first run itself;
  - length in tokens with EOS, eos: the share that ended, distinct-1 and distinct-2: different
    words, and different pairs of successive words, over all of them (Li et al. 2016).

--samples=K has each run answer each prompt K times at T=1; the columns are means over all of them,
and ± is over the prompts' own means. With a reward.py that says correct and public (does a
response pass all tests; those that the prompt shows) three columns follow, means over the prompts,
n being --submit. With c of a prompt's K samples correct and F of them public:
  - pass@1, pass@n: the chance that one of n samples is correct, drawn from the K without putting
    back, 1 - C(K-c, n) / C(K, n): unbiased for n fresh samples (Chen et al. 2021, eq. 1);
  - n@K: the chance that one of n is correct that are drawn from the F, 1 - C(F-c, n) / C(F, n), and
    where F <= n all are submitted (Li et al. 2022, AlphaCode's 10@k).

--best_of=N adds to the table at T=1 what needs no training of the policy: N samples of the first
run for each prompt, of which --select picks one, and the judge judges that one. The selector is
what one would have where the model is used, a reward model. Without --select it is the judge
itself: then the row is no method, but an upper bound of what picking among N can reach. The picked
one has the highest score, of equal ones the first; a response without EOS counts as min(score, -1),
PPO's rule, so that what was cut off is not picked for what it might have become. The row's kl is
log N - (N-1)/N, not measured, so its error is 0: an upper bound of KL(best of N, first run)
(Beirami et al. 2024), reached where no response comes twice (Hilton and Gao 2022).

What it does not do: a standard error of the other columns.

    python -m tools.evaluate out/toy/sft out/toy/ppo out/toy/dpo --best_of=8 --select=out/toy/rm
    python -m tools.evaluate out/contest/sft --split=test-interview --samples=60 --max_new_tokens=12
"""
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

import train_ppo
from data.text import decode_responses, encode_rows, load_judge, load_rows, load_split, load_text
from prefgpt import (GPT, POLICIES, UserError, generate, load_checkpoint, load_model, rng, run_cli,
                     set_up, token_logprobs, x_and_y)


@dataclass
class Config:
    runs: tuple = ()                # run folders; kl and win are against the first one
    data: str = ''                  # a data folder, or one JSON Lines file; '': the first run's
    split: str = 'val'              # the prompts: val, or another NAME.prompts.jsonl of the folder
    judge: str = ''                 # a reward.py or a reward model's run; '': the data's reward.py
    prompts: int = 400              # how many of the held-out prompts, from the first on
    max_new_tokens: int = 64        # longest response
    samples: int = 1                # responses to each prompt at T=1
    submit: int = 10                # n of pass@n and n@k, where the judge says correct and public
    best_of: int = 0                # a row for the best of N samples of the first run; 0: none
    select: str = ''                # who picks it: a reward model's run, a reward.py; '': the judge
    batch_size: int = 100           # responses sampled at once; they do not depend on it
    json: str = ''                  # a file to write the two tables to; '': none
    seed: int = 0                   # of the samples
    device: str = ''                # cuda, mps or cpu; '': cuda, else mps, else cpu
    dtype: str = ''                 # float32 or bfloat16; '': bfloat16 on CUDA, else float32


# ----------------------------------------------------------------------------- columns

OWN_COLUMNS = {'run', 'reward_se', 'win', 'kl', 'kl_se', 'length', 'eos', 'distinct-1',
               'distinct-2'}


def pass_at(total, correct, n):
    """
    The chance that one of n samples is correct, drawn without putting back from total of which
    correct are: 1 - C(total - correct, n) / C(total, n). Exact, and 1 where n must hit one.
    """
    return 1 - math.comb(total - correct, n) / math.comb(total, n)


def filtered_pass_at(public, correct, n):
    """
    The same where n are drawn from the samples that pass the public tests; correct of them are.
    Where there are n or fewer all are submitted, so that one correct sample is enough.
    """
    return float(correct > 0) if public <= n else pass_at(public, correct, n)


def pass_columns(judged, samples, n):
    """pass@1, pass@n and n@samples, means over prompts; judged: dicts, a prompt's side by side."""
    rows = []
    for i in range(0, len(judged), samples):
        prompt = judged[i:i + samples]
        public = [each for each in prompt if each['public']]    # what would be submitted
        correct, submitted = (sum(each['correct'] > 0 for each in some)
                              for some in (prompt, public))
        rows.append({**{f'pass@{k}': pass_at(samples, correct, k) for k in (1, n)},
                     f'{n}@{samples}': filtered_pass_at(len(public), submitted, n)})
    return mean_scores(rows)


def distinct(texts, n):
    """The share of different ones among all runs of n successive words."""
    grams = [gram for words in map(str.split, texts)
             for gram in zip(*(words[i:] for i in range(n)))]
    return len(set(grams)) / max(1, len(grams))


def standard_error(numbers):
    """Of their mean: std / sqrt(n), with n - 1 in the std. One number says nothing of it: None."""
    if len(numbers) < 2:
        return None
    return statistics.stdev(numbers) / math.sqrt(len(numbers))


def prompt_means(numbers, samples):
    """The mean of each prompt's samples, which stand side by side."""
    return [statistics.fmean(numbers[i:i + samples]) for i in range(0, len(numbers), samples)]


def mean_scores(judged):
    """The mean of every number of the judge over the responses that have it; judged: dicts."""
    columns = {}
    for numbers in judged:
        for name, number in numbers.items():
            columns.setdefault(name, []).append(number)
    return {name: sum(numbers) / len(numbers) for name, numbers in columns.items()}


def win_rate(responses, others):
    """The share of responses with more reward than the other one to the same prompt; a tie: 1/2."""
    points = 0.0
    for response, other in zip(responses, others, strict=True):
        reward, other_reward = response['judged']['reward'], other['judged']['reward']
        # A reward model's score of one and the same response differs in the last digits from batch
        # to batch: that is no win
        same = all(response[key] == other[key] for key in ('text', 'eos'))
        points += 0.5 if same or reward == other_reward else reward > other_reward
    return points / len(responses)


def summarize(run, responses, first_responses, samples=1, submit=0):
    """
    A run's row of the table, from its responses and the first run's to the same prompts; the
    samples responses to one prompt stand side by side. submit is pass@n's n; 0: without them.
    """
    judged = mean_scores([response['judged'] for response in responses])
    if taken := OWN_COLUMNS & judged.keys():
        raise UserError(f'the judge says {", ".join(sorted(taken))}: a column of the table itself')
    row = {'run': run, **judged}
    if 'reward' in row:
        row['reward_se'] = standard_error(
            prompt_means([each['judged']['reward'] for each in responses], samples))
        row['win'] = win_rate(responses, first_responses)
    if submit and all({'correct', 'public'} <= each['judged'].keys() for each in responses):
        row |= pass_columns([each['judged'] for each in responses], samples, submit)
    texts = [response['text'] for response in responses]
    kl, length, eos = ([response[name] for response in responses]
                       for name in ('kl', 'length', 'eos'))
    return {**row, 'kl': statistics.fmean(kl), 'kl_se': standard_error(prompt_means(kl, samples)),
            'length': statistics.fmean(length), 'eos': statistics.fmean(eos),
            'distinct-1': distinct(texts, 1), 'distinct-2': distinct(texts, 2)}


# ----------------------------------------------------------------------------- responses

def load_columns(where, saved_policy, device, size):
    """
    columns(tokens, response_mask, prompts, texts) -> a dict of numbers for each response, by a
    reward.py or by a reward model, size rows at a time; then the checkpoint whose block must hold
    what it reads: the reward model's, or with a reward.py the policy's.
    """
    if where.endswith('.py'):
        judge = load_judge(where)
        return (lambda tokens, response_mask, prompts, texts:
                [judge(prompt, text) for prompt, text in zip(prompts, texts)]), saved_policy
    scorer, source = train_ppo.load_scorer(where, saved_policy, device, size)
    return lambda *batch: [{'reward': number} for number in scorer(*batch).tolist()], source


def describe(tokens, response_mask, prompts, columns, tokenizer):
    """A dict for each response of a batch: text, eos, length, and judged, what the judge says."""
    texts, ended = decode_responses(tokens, response_mask, tokenizer)
    judged = columns(tokens, response_mask, prompts, texts) if columns else [{} for _ in texts]
    return [{'text': text, 'eos': eos, 'length': length, 'judged': numbers}
            for text, eos, length, numbers in zip(texts, ended.tolist(),
                                                  response_mask.sum(1).tolist(), judged)]


@torch.no_grad()
def answer(policy, first, prompts, columns, tokenizer, cfg, temperature):
    """
    The responses to each prompt, (text, ids), as describe has them, with kl against first:
    cfg.samples side by side, or one if greedy.
    """
    responses = []
    prompts = [prompt for prompt in prompts for _ in range(cfg.samples if temperature else 1)]
    generator = rng(cfg.seed, 0, 'eval')        # every run meets the same random numbers
    for i in range(0, len(prompts), cfg.batch_size):
        texts, ids = zip(*prompts[i:i + cfg.batch_size])
        tokens, response_mask = generate(policy, ids, cfg.max_new_tokens, tokenizer.eot_token,
                                         temperature, generator)
        x, y = x_and_y(tokens)
        kl = (token_logprobs(policy, x, y, response_mask)
              - token_logprobs(first, x, y, response_mask)).sum(1)              # (B,)
        batch = describe(tokens, response_mask, texts, columns, tokenizer)
        responses += [{**each, 'kl': nats} for each, nats in zip(batch, kl.tolist())]
    return responses


@torch.no_grad()
def best_of(policy, prompts, columns, scorer, tokenizer, cfg):
    """
    The response to each prompt, (text, ids), that scorer scores highest among N samples at T=1.

    As describe has it, with log N - (N-1)/N for kl: the samples are the first run's own, so that a
    log-ratio of the one that was picked would be 0.
    """
    responses, N = [], cfg.best_of
    generator = rng(cfg.seed, 1, 'eval')        # not answer's: the row is no copy of the first run
    at_once = max(1, cfg.batch_size // N)       # prompts: memory is as in answer
    for i in range(0, len(prompts), at_once):
        asked = prompts[i:i + at_once]
        texts, ids = zip(*(prompt for prompt in asked for _ in range(N)))       # B N of them
        tokens, response_mask = generate(policy, ids, cfg.max_new_tokens, tokenizer.eot_token,
                                         1.0, generator)
        samples, ended = decode_responses(tokens, response_mask, tokenizer)
        scores = scorer(tokens, response_mask, texts, samples)                  # (B N,)
        scores = train_ppo.cap_unfinished(scores, ended, train_ppo.Config.no_eos_score)
        best = scores.view(len(asked), N).argmax(1)     # (B,), of equal scores the first
        best += N * torch.arange(len(asked), device=best.device)    # places among the B N
        responses += describe(tokens[best], response_mask[best], [text for text, _ in asked],
                              columns, tokenizer)
    return [{**response, 'kl': math.log(N) - (N - 1) / N} for response in responses]


# ----------------------------------------------------------------------------- the tables

def show_table(rows, title):
    """Rows, dicts, as a table: the first column is text, and NAME_se stands beside NAME."""
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


def main(cfg):
    """Prints the two tables and returns them: {'rows': [...], 'greedy': [...]}."""
    if not cfg.runs:
        raise UserError('name at least one run folder')
    if cfg.samples < 1 or cfg.samples > 1 and cfg.best_of:
        raise UserError(f'--samples={cfg.samples}: at least 1, and 1 with --best_of')
    if cfg.samples > 1 and not 1 <= cfg.submit <= cfg.samples:
        raise UserError(f'--submit={cfg.submit}: 1 to --samples={cfg.samples}')
    if cfg.best_of < 0 or cfg.select and not cfg.best_of:
        raise UserError(f'--best_of={cfg.best_of}: 0 for no such row, and above 0 with --select')
    device, autocast = set_up(cfg)
    if cfg.json:
        Path(cfg.json).parent.mkdir(parents=True, exist_ok=True)

    saved = [load_checkpoint(run, POLICIES) for run in cfg.runs]
    data = cfg.data or saved[0]['config']['data']
    tokenizer, text = load_text(data, saved[0])
    for run, other in zip(cfg.runs, saved):
        if other['fingerprint'] != saved[0]['fingerprint']:
            raise UserError(f'{run} reads another tokenizer than {cfg.runs[0]}')
    policies = [load_model(GPT, each, 'policy', device) for each in saved]

    # --- who judges, and who picks the best of N
    beside = Path(data) / 'reward.py'
    judge = cfg.judge or (str(beside) if beside.exists() else '')
    columns, readers = None, list(saved)        # readers: checkpoints of all that read a response
    if judge:
        columns, source = load_columns(judge, saved[0], device, cfg.batch_size)
        readers.append(source)
        print(f'judge: {judge}')
    if cfg.best_of:
        if not (cfg.select or judge):
            raise UserError(f'--best_of={cfg.best_of}: nobody to pick one; pass --select')
        scorer, source = train_ppo.load_scorer(cfg.select or judge, saved[0], device,
                                               cfg.batch_size)
        readers.append(source)
        print(f'the best of {cfg.best_of} is picked by {cfg.select or judge}')

    # --- prompts, cut so that every reader's block holds them
    if cfg.split == 'val':
        rows = load_split(data, 'prompts', text['template'])[1]     # held out
    else:
        rows = load_rows(Path(data) / f'{cfg.split}.prompts.jsonl', 'prompts', text['template'])
    block_size = min(each['model']['block_size'] for each in readers)
    rows = rows[:cfg.prompts]
    ids = encode_rows(rows, 'prompts', tokenizer, block_size, cfg.max_new_tokens, name=cfg.split)
    # A reward.py reads the text as it stands in the file, even where the ids were cut
    prompts = [(row['prompt'], prompt) for row, (prompt,) in zip(rows, ids)]

    tables = {}
    for name, temperature in (('rows', 1.0), ('greedy', 0.0)):
        with autocast:
            answers = [(run, answer(policy, policies[0], prompts, columns, tokenizer, cfg,
                                    temperature)) for run, policy in zip(cfg.runs, policies)]
            if cfg.best_of and temperature:     # greedy samples are all the same
                answers.append((f'best of {cfg.best_of} of {cfg.runs[0]}',
                                best_of(policies[0], prompts, columns, scorer, tokenizer, cfg)))
        samples = cfg.samples if temperature else 1
        tables[name] = [summarize(run, responses, answers[0][1], samples,
                                  cfg.submit if samples > 1 else 0) for run, responses in answers]
        show_table(tables[name], f'{len(prompts)} held-out prompts, '
                   + (f"{samples if samples > 1 else 'one'} sample{'s' * (samples > 1)} each at T=1"
                      if temperature else 'answered greedily'))
    if cfg.json:
        Path(cfg.json).write_text(json.dumps(tables, indent=1) + '\n')
    return tables


if __name__ == '__main__':
    run_cli(main, Config)
