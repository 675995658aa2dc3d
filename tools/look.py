"""
Shows one response of a PPO run, token by token, in a table of what the policy's update sees.

The numbers come from train_ppo.py's own functions, on the run's last checkpoint. Columns: the token
read (x) and the one predicted (y); log pi(y) and log ref(y); the reward, which is -beta times their
difference, plus the score on the last token; the value; and the advantage, not whitened, because
whitening needs the whole rollout batch. Numbers outside the mask are unused, and shown as 0.
What it does not do: read other stages, or steps before the last checkpoint.

    python -m tools.look out/toy/ppo --prompt="how do i clean a mirror?"
"""
from dataclasses import dataclass

import torch

import train_ppo
from data.text import build_tokenizer, encode_rows
from prefgpt import (GPT, POLICIES, GPTConfig, ScalarGPT, UserError, load_checkpoint, load_model,
                     printable, rng, run_cli, set_up)
from tools.sample import find_prompts


@dataclass
class Config:
    runs: tuple = ()                # a PPO run folder
    prompt: str = ''                # what a user types; it is put into the run's template
    seed: int = 0                   # of the sample
    device: str = 'cpu'             # cuda, mps or cpu
    dtype: str = ''                 # float32 or bfloat16; '': bfloat16 on newer GPUs, else float32


@torch.no_grad()
def main(cfg):
    """Prints the table and returns its rows, dicts."""
    if len(cfg.runs) != 1 or not cfg.prompt:
        raise UserError('name one PPO run folder, and a --prompt')
    device, autocast = set_up(cfg)
    saved = load_checkpoint(cfg.runs[0], ['ppo'])
    tokenizer, run = build_tokenizer(saved['tokenizer']), train_ppo.Config(**saved['config'])
    scorer, source = train_ppo.load_scorer(run.reward, load_checkpoint(run.init, POLICIES), device)
    policy, ref = (load_model(GPT, saved, name, device) for name in ('policy', 'ref'))
    value_model = ScalarGPT(GPTConfig(**source['model'])).to(device)
    value_model.load_state_dict(saved['weights']['value_model'])
    block_size = min(policy.config.block_size, source['model']['block_size'])   # both read it
    [(prompt,)] = encode_rows(find_prompts(cfg, saved), 'prompts', tokenizer, block_size,
                              run.max_new_tokens, name=cfg.runs[0])

    with autocast:
        grid, scores, ended, _ = train_ppo.rollout(policy, ref, scorer, [prompt], tokenizer, run,
                                                   rng(cfg.seed, 0, 'eval'))
        values = value_model(grid['x'])                                         # (1, T)
    capped = train_ppo.cap_unfinished(scores, ended, run.no_eos_score)
    rewards = train_ppo.token_rewards(capped, grid['logprobs'], grid['ref_logprobs'], grid['mask'],
                                      run.beta)                                 # (1, T)
    advantages, _ = train_ppo.gae(rewards, values, grid['mask'], run.gamma, run.gae_lambda)

    def word(token):
        text = tokenizer.decode([token]) if token != tokenizer.eot_token else 'EOS'
        return repr(printable(text))[1:-1]
    columns = (grid['logprobs'], grid['ref_logprobs'], rewards, values, advantages)
    rows = [{'x': word(grid['x'][0, t].item()), 'y': word(grid['y'][0, t].item()),
             'mask': int(grid['mask'][0, t]),
             **{name: column[0, t].item() if grid['mask'][0, t] else 0.0 for name, column in
                zip(('logprob', 'ref logprob', 'reward', 'value', 'advantage'), columns)}}
            for t in range(len(prompt) - 2, grid['x'].size(1))]
    print(f'score {scores.item():.3f}, beta {run.beta}; {len(prompt) - 2} columns of the prompt '
          'before these')
    print(f'{"x":>12} {"y":>12}' + ''.join(f' {name:>11}' for name in list(rows[0])[2:]))
    for row in rows:
        x, y, mask, *numbers = row.values()
        print(f'{x:>12} {y:>12} {mask:>11}' + ''.join(f' {number:>11.3f}' for number in numbers))
    return rows


if __name__ == '__main__':
    run_cli(main, Config)
