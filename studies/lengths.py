"""
Defines a language in which only the length counts, for studies/length.py.

    prompt     two letters of eight and a colon, "ab:"
    response   n of these two letters, each at random; in demonstrations n is normal, mean 20, std 5
    gold       Min, Skew: -n;  Mode: -|n - mode|, mode being the SFT policy's own mean, rounded
    pairs      two responses of a policy, the first chosen with sigmoid(0.3 (gold_1 - gold_2));
               Skew: not of the policy, 39 - n is exponential with mean 6: hardly any is short

Writes the files that train_*.py read.
"""
import itertools

import torch

from data.bpe import write_tiktoken
from data.rows import write_rows
from data.text import decode_responses
from prefgpt import generate, rng

LETTERS, MEAN, STD, MOST = 'abcdefgh', 20, 5, 40    # MOST: tokens of a response, EOS included


def gold(task, response, mode):
    """Returns the reward of a response on 'Min', 'Mode' or 'Skew'; mode counts on Mode alone."""
    return -abs(len(response) - mode) if task == 'Mode' else -len(response)


def draw_response(prompt, skew, generator):
    """Draws a demonstration or, on Skew, a response nearly as long as can be."""
    n = (MOST - 1 + 6 * torch.rand((), generator=generator).log() if skew
         else MEAN + STD * torch.randn((), generator=generator))
    n = int(n.round().clamp(1, MOST - 1))
    return ''.join(prompt[i] for i in torch.randint(2, (n,), generator=generator))


def prompts_of(split):
    """Returns the prompts of a split; every tenth is held out, for 'val'."""
    prompts = [f'{a}{b}:' for a in LETTERS for b in LETTERS]
    return prompts[::10] if split == 'val' else [p for i, p in enumerate(prompts) if i % 10]


def write_data(folder, seed):
    """Writes demonstrations, prompts and the tokenizer, one token per byte, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = rng(seed, 0, 'batch')
    for split, count in (('train', 4000), ('val', 200)):
        prompts = prompts_of(split)
        write_rows(folder / f'{split}.prompts.jsonl', [{'prompt': p} for p in prompts])
        write_rows(folder / f'{split}.sft.jsonl', [
            {'prompt': p, 'completion': draw_response(p, False, generator)}
            for p in itertools.islice(itertools.cycle(prompts), count)])
    write_tiktoken(folder / 'bytes.tiktoken', {bytes([i]): i for i in range(256)})
    (folder / 'tokenizer').write_text('bytes.tiktoken\n')


def write_pairs(folder, seed, task, policy, tokenizer, counts):
    """Writes a task's pairs, at most counts[split]; returns the policy's mean length, rounded."""
    generator, mode = rng(seed, 0, 'shuffle'), None
    for split, count in counts.items():
        prompts = [p for p in itertools.islice(itertools.cycle(prompts_of(split)), count)
                   for _ in (1, 2)]
        texts, _ = decode_responses(*generate(
            policy, [tokenizer.encode(p) for p in prompts], MOST, tokenizer.eot_token,
            generator=generator), tokenizer)
        mode = mode or round(sum(map(len, texts)) / len(texts))
        if task == 'Skew':
            texts = [draw_response(p, True, generator) for p in prompts]
        rows = []
        for prompt, first, second in zip(prompts[::2], texts[::2], texts[1::2]):
            ahead = torch.tensor(0.3 * (gold(task, first, mode) - gold(task, second, mode)))
            if torch.rand((), generator=generator) > ahead.sigmoid():
                first, second = second, first
            if first and second and first != second:    # an empty one cannot be taught
                rows.append({'prompt': prompt, 'chosen': first, 'rejected': second})
        write_rows(folder / f'{split}.pairs.jsonl', rows)
    return mode
