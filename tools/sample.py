"""
What checkpoints answer: to a prompt, or to the first held-out prompts of their data.

Several runs answer side by side, with the same random numbers, so that one sees what a stage has
changed. The prompt of --prompt is what a user would type: the data's template is put around it.
What it does not do: keep up a conversation, or score what it shows.

    python -m tools.sample out/toy/sft out/toy/dpo out/toy/ppo
    python -m tools.sample out/toy/ppo --prompt="how do i clean a mirror?" --temperature=1
"""
from dataclasses import dataclass

import torch

from prefgpt import (GPT, POLICIES, UserError, build_tokenizer, decode_responses, encode_rows,
                     generate, load_checkpoint, load_model, load_split, printable, rng, run_cli,
                     set_up)


@dataclass
class Config:
    runs: tuple = ()                # run folders, shown in this order
    prompt: str = ''                # what a user types; '': the first held-out prompts
    n: int = 3                      # how many held-out prompts, or samples of --prompt
    temperature: float = 0.0        # 0: greedy; 1: as the model was trained
    max_new_tokens: int = 64        # longest response
    seed: int = 0                   # of the samples
    device: str = ''                # cuda, mps or cpu; '': the first that is there
    dtype: str = ''                 # float32 or bfloat16; '': bfloat16 on CUDA, else float32


def find_prompts(cfg, saved):
    """The prompts to answer, as literal text: the one given, in the template, or held-out ones."""
    if cfg.prompt:
        text = saved['template'].replace('{}', cfg.prompt)
        return [text] * (cfg.n if cfg.temperature else 1)       # greedy samples are all the same
    _, rows = load_split(saved['config']['data'], 'prompts', saved['template'])
    return [row['prompt'] for row in rows[:cfg.n]]


@torch.no_grad()
def main(cfg):
    """Prints the answers; returns them as {run: [response, ...]}."""
    if not cfg.runs:
        raise UserError('name at least one run folder')
    device, autocast = set_up(cfg)
    saved = [load_checkpoint(run, POLICIES) for run in cfg.runs]
    prompts = find_prompts(cfg, saved[0])
    answers = {}
    for run, each in zip(cfg.runs, saved):
        tokenizer = build_tokenizer(each['tokenizer'])
        policy = load_model(GPT, each, 'policy', device)
        rows = encode_rows([{'prompt': prompt} for prompt in prompts], 'prompts', tokenizer,
                           policy.config.block_size, cfg.max_new_tokens, name=run)
        with autocast:
            out = generate(policy, [row[0] for row in rows], cfg.max_new_tokens,
                           tokenizer.eot_token, cfg.temperature, rng(cfg.seed, 0, 'eval'))
        texts, ended = decode_responses(*out, tokenizer)
        answers[run] = [text + ('' if end else ' [no end]') for text, end in zip(texts, ended)]

    width = max(map(len, cfg.runs))
    for i, prompt in enumerate(prompts):
        print('\n' + printable(prompt))
        for run in cfg.runs:
            print(f'  {run:<{width}} {printable(answers[run][i])}')
    return answers


if __name__ == '__main__':
    run_cli(main, Config)
