"""
Compare checkpoints: what they answer to held-out prompts, in one table.

Each run answers the same prompts once at T=1, with the same random numbers, and once greedily.
Columns, means over responses:
  - what reward.py says: reward, and for data/toy helpful, harm (the share with a cost) and refused
    (the share of benign prompts refused). A number that the judge leaves out for some prompts is
    averaged over the others;
  - kl: log pi(response) summed over its tokens, minus the same under the first run, in nats. At
    T=1 its mean is KL(policy, first run), and 0 for the first run itself;
  - length in tokens with EOS, eos: the share that ended, and distinct-2: different pairs of
    successive words over all of them, over all responses (Li et al. 2016).
What it does not do: judge with a reward model.

    python -m tools.evaluate out/toy/sft out/toy/dpo out/toy/ppo --json=out/toy/evaluate.json
"""
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from prefgpt import (GPT, POLICIES, UserError, decode_responses, encode_rows, generate,
                     load_checkpoint, load_judge, load_model, load_split, load_text, rng, run_cli,
                     set_up, token_logprobs)


@dataclass
class Config:
    runs: tuple = ()                # run folders; kl is measured against the first one
    data: str = ''                  # a data folder, for its val.prompts; '': that of the first run
    reward: str = ''                # a reward.py; '': the one in the data folder, if there is one
    prompts: int = 400              # how many of the held-out prompts, from the first on
    max_new_tokens: int = 64        # longest response
    batch_size: int = 100           # prompts answered at once; the answers do not depend on it
    json: str = ''                  # a file to write the two tables to; '': none
    seed: int = 0                   # of the samples
    device: str = ''                # cuda, mps or cpu; '': the first that is there
    dtype: str = ''                 # float32 or bfloat16; '': bfloat16 on CUDA, else float32


def distinct_2(texts):
    """The share of different ones among all pairs of successive words."""
    pairs = [pair for words in map(str.split, texts) for pair in zip(words, words[1:])]
    return len(set(pairs)) / max(1, len(pairs))


@torch.no_grad()
def answer(policy, first, prompts, tokenizer, cfg, temperature):
    """Texts of the responses, and tensors (B,): kl against the first policy, length, ended."""
    texts, kl, length, ended = [], [], [], []
    generator = rng(cfg.seed, 0, 'eval')        # every run meets the same random numbers
    for i in range(0, len(prompts), cfg.batch_size):
        tokens, response_mask = generate(policy, prompts[i:i + cfg.batch_size],
                                         cfg.max_new_tokens, tokenizer.eot_token, temperature,
                                         generator)
        x, y = tokens[:, :-1], tokens[:, 1:]
        kl.append((token_logprobs(policy, x, y, response_mask)
                   - token_logprobs(first, x, y, response_mask)).sum(1))
        more_texts, more_ended = decode_responses(tokens, response_mask, tokenizer)
        texts += more_texts
        ended.append(more_ended)
        length.append(response_mask.sum(1))
    return texts, torch.cat(kl), torch.cat(length), torch.cat(ended)


def mean_scores(judge, prompts, texts):
    """The mean of every number of the judge over the responses that have it."""
    columns = {}
    for prompt, text in zip(prompts, texts):
        for name, number in judge(prompt, text).items():
            columns.setdefault(name, []).append(number)
    return {name: sum(numbers) / len(numbers) for name, numbers in columns.items()}


def show_table(rows, title):
    """Rows, dicts with the same keys, as a table; the first column is text."""
    print(f'\n{title}')
    width = max(len(row['run']) for row in rows)
    print(' ' * width + ''.join(f'{name:>11}' for name in rows[0] if name != 'run'))
    for row in rows:
        print(f"{row['run']:<{width}}"
              + ''.join(f'{number:11.3f}' for name, number in row.items() if name != 'run'))


def main(cfg):
    """Prints the two tables and returns them: {'rows': [...], 'greedy': [...]}."""
    if not cfg.runs:
        raise UserError('name at least one run folder')
    device, autocast = set_up(cfg)
    saved = [load_checkpoint(run, POLICIES) for run in cfg.runs]
    data = cfg.data or saved[0]['config']['data']
    tokenizer, template = load_text(data, saved[0])
    for run, other in zip(cfg.runs, saved):
        if other['fingerprint'] != saved[0]['fingerprint']:
            raise UserError(f'{run} reads another tokenizer than {cfg.runs[0]}')
    path = cfg.reward or str(Path(data) / 'reward.py')
    judge = load_judge(path) if cfg.reward or Path(path).exists() else None
    rows = load_split(data, 'prompts', template)[1][:cfg.prompts]       # held out
    block_size = min(each['model']['block_size'] for each in saved)
    prompts = [row[0] for row in encode_rows(rows, 'prompts', tokenizer, block_size,
                                             cfg.max_new_tokens, name='val')]
    policies = [load_model(GPT, each, 'policy', device) for each in saved]

    tables = {}
    for name, temperature in (('rows', 1.0), ('greedy', 0.0)):
        tables[name] = []
        for run, policy in zip(cfg.runs, policies):
            with autocast:
                texts, kl, length, ended = answer(policy, policies[0], prompts, tokenizer, cfg,
                                                  temperature)
            judged = mean_scores(judge, [row['prompt'] for row in rows], texts) if judge else {}
            tables[name].append({'run': run, **judged, 'kl': kl.mean().item(),
                                 'length': length.float().mean().item(),
                                 'eos': ended.float().mean().item(),
                                 'distinct-2': distinct_2(texts)})
        show_table(tables[name], f'{len(prompts)} held-out prompts, '
                   + ('one sample each at T=1' if temperature else 'answered greedily'))
    if cfg.json:
        Path(cfg.json).write_text(json.dumps(tables, indent=1) + '\n')
    return tables


if __name__ == '__main__':
    run_cli(main, Config)
