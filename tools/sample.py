"""
Shows what checkpoints answer to the same prompts, side by side; or lets you chat with one of them.

Several runs answer with the same random numbers, so that one sees what a stage has changed. What a
user types, in --prompt or --chat, is put into the checkpoint's template. tools/pairs.py writes
answers to a file.
What it does not do: continue an answer that was stopped.

    python -m tools.sample out/toy/sft out/toy/ppo out/toy/dpo
    python -m tools.sample out/toy/ppo --prompt="how do i clean a mirror?" --temperature=1 --n=3
    python -m tools.sample out/toy/ppo --chat
"""
import contextlib, dataclasses, itertools, sys
from dataclasses import dataclass

import torch

from data.text import build_tokenizer, decode_responses, encode_rows, load_split
from data.turns import render
from prefgpt import (GPT, POLICIES, UserError, generate, load_checkpoint, load_model, printable,
                     rng, run_cli, set_up)


@dataclass
class Config:
    runs: tuple = ()                # run folders, shown in this order; --chat takes one
    # what is answered
    prompt: str = ''                # what a user types; '': the prompts of the data
    data: str = ''                  # a data folder, or one JSON Lines file; '': the first run's
    split: str = 'val'              # train or val
    prompts: int = 3                # how many different ones
    chat: bool = False              # answer line by line what is typed
    history: bool = False           # keep a chat's earlier lines and answers in the prompt
    # the samples
    n: int = 1                      # responses to each prompt
    temperature: float = 0.0        # 0: greedy; 1: as the model was trained
    max_new_tokens: int = 0         # longest response; 0: as the first run was trained
    batch_size: int = 100           # prompts answered at once; the samples do not depend on it
    seed: int = 0                   # of the samples
    device: str = ''                # cuda, mps or cpu; '': cuda, else mps, else cpu
    dtype: str = ''                 # float32 or bfloat16; '': bfloat16 on newer GPUs, else float32


def check_samples(cfg):
    """Raises UserError if --n or --split cannot work."""
    if cfg.n > 1 and cfg.temperature == 0:
        raise UserError(f'--n={cfg.n} are all the same at --temperature=0: add --temperature=1')
    if cfg.split not in ('train', 'val'):
        raise UserError(f'--split={cfg.split}: train or val')


def longest(cfg, saved):
    """Returns cfg with the longest response that a run was trained for, unless a flag says it."""
    trained = saved['config'].get('max_new_tokens', 64)
    return dataclasses.replace(cfg, max_new_tokens=cfg.max_new_tokens or trained)


def find_prompts(cfg, saved):
    """Returns the rows to answer, {prompt} each: the one given, in the template, or the data's."""
    if cfg.prompt:
        return [{'prompt': saved['template'].replace('{}', cfg.prompt)}]
    train, val = load_split(cfg.data or saved['config']['data'], 'prompts', saved['template'])
    rows = train if cfg.split == 'train' else val
    return list({row['prompt']: row for row in rows}.values())[:cfg.prompts]


def respond(policy, prompts, tokenizer, cfg, turn=0):
    """
    Yields tokens, response_mask, texts and ended (B,) of n responses to each prompt, (ids,). B is
    n times batch_size, or less at the end; the responses to one prompt are neighbours.
    """
    generator = rng(cfg.seed, turn, 'eval')     # every run meets the same random numbers
    for i in range(0, len(prompts), cfg.batch_size):
        rows = [ids for ids, in prompts[i:i + cfg.batch_size] for _ in range(cfg.n)]
        out = generate(policy, rows, cfg.max_new_tokens, tokenizer.eot_token, cfg.temperature,
                       generator)
        yield *out, *decode_responses(*out, tokenizer)


def mark_ends(texts, ended):
    """Returns the texts for people to read: ' [no end]' follows those that did not end."""
    return [text + ('' if end else ' [no end]') for text, end in zip(texts, ended)]


def show(cfg, saved, device, autocast):
    """Prints what every run answers, side by side; returns it as {run: [response, ...]}."""
    prompts, answers = find_prompts(cfg, saved[0]), {}
    for run, each in zip(cfg.runs, saved):
        tokenizer = build_tokenizer(each['tokenizer'])
        policy = load_model(GPT, each, 'policy', device)
        ids = encode_rows(prompts, 'prompts', tokenizer, policy.config.block_size,
                          cfg.max_new_tokens, name=run)
        with autocast:
            answers[run] = [text for *_, texts, ended in respond(policy, ids, tokenizer, cfg)
                            for text in mark_ends(texts, ended)]
    width = max(map(len, cfg.runs))
    for i in range(len(prompts) * cfg.n):
        print('\n' + printable(prompts[i // cfg.n]['prompt']))
        for run in cfg.runs:
            print(f'  {run:<{width}} {printable(answers[run][i])}')
    return answers


def chat(cfg, saved, device, autocast):
    """Answers lines until the input ends or Ctrl-C comes at the prompt; returns the answers."""
    tokenizer = build_tokenizer(saved['tokenizer'])
    policy = load_model(GPT, saved, 'policy', device)
    room = policy.config.block_size - cfg.max_new_tokens
    if room < 1:
        raise UserError(f'block_size={policy.config.block_size} has no room for a prompt beside '
                        f'max_new_tokens={cfg.max_new_tokens}: lower --max_new_tokens')
    for stream in (sys.stdin, sys.stdout):      # bytes that are no text must not end the chat
        stream.reconfigure(errors='replace')
    print('Type a line and press Enter: a line is a turn. Ctrl-C stops an answer, Ctrl-D leaves; '
          '[no end] marks an answer cut at --max_new_tokens.')
    turns, answers = [], []
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        for turn in itertools.count():
            while not (line := input('> ')).strip():
                pass                            # nothing was said
            asked = [*turns, ('user', line)]
            ids = tokenizer.encode_ordinary(render(asked, saved['template']))
            if len(ids) > room:
                print(f'[the first {len(ids) - room} of {len(ids)} tokens are cut]')
            try:
                with autocast:
                    *_, [text], ended = next(respond(policy, [(ids[-room:],)], tokenizer, cfg,
                                                     turn))
            except KeyboardInterrupt:
                print(' [stopped]')
                continue
            answers.append(text.removeprefix(' '))
            print(printable(*mark_ends(answers[-1:], ended)))
            if cfg.history:
                turns = [*asked, ('assistant', text)]
    print()                                     # the shell goes on in a line of its own
    return answers


@torch.no_grad()
def main(cfg):
    """Shows or chats; returns the answers: {run: [response, ...]}, or a chat's in a list."""
    # Flags that a chat does not use; a dataclass keeps its defaults as class attributes
    idle = [f'--{name}' for name in ('prompt', 'data', 'split', 'prompts', 'n')
            if cfg.chat and getattr(cfg, name) != getattr(Config, name)]
    if idle:
        raise UserError(f"--chat has no use for {' and '.join(idle)}: leave one or the other out")
    if not cfg.runs or cfg.chat and len(cfg.runs) > 1:
        raise UserError(f'{len(cfg.runs)} run folders: name at least one, and one with --chat')
    if cfg.history and not cfg.chat:
        raise UserError('--history needs --chat')
    check_samples(cfg)
    saved = [load_checkpoint(run, POLICIES) for run in cfg.runs]
    cfg = longest(cfg, saved[0])
    device, autocast = set_up(cfg)
    return chat(cfg, saved[0], device, autocast) if cfg.chat else show(cfg, saved, device, autocast)


if __name__ == '__main__':
    run_cli(main, Config)
