"""
Measures each stage's speed and memory on random rows, and compares the speed with the machine's.

A stage's script runs on rows of exact lengths, from random weights, and its log.jsonl is read, so
there is no second loop; what it prints goes to stderr. The last line is the rate of the median step
after two warm-ups, in non-padding tokens (EOS is one) per second, or in episodes for ppo. DPO's
pass for the reference comes before its first step and is not timed; generate times the sampler
alone. The line above the last compares the rate with a bound measured in the same run. Training:
the flops that the rows need, without padding and recomputation, against the rate of the matrix
products alone, forward and backward. generate: the bytes that a token must move, the weights once
and the keys and values so far, against the rate of copying as many; a small model's stay in caches.
What it does not do: run several processes at once, or compile the sampler. On a CPU, peak memory is
that of the process so far, so --stage=all does not show each stage's own.

    python -m tools.bench --stage=dpo --shape=small
    python -m tools.bench --stage=sft --steps=42 --against="python other.py"
    python -m tools.bench --memory
"""
import base64, contextlib, json, random, re, shlex, statistics, subprocess, sys, tempfile, time
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import train_dpo, train_ppo, train_rm, train_sft
from data.text import build_tokenizer, checkpoint_text, tokenizer_text
from prefgpt import (GPT, GPTConfig, ScalarGPT, UserError, generate, peak_memory, rng, run_cli,
                     save_checkpoint, set_up)
from tools.memory import memory_table


@dataclass
class Config:
    stage: str = 'all'              # sft, rm, ppo, dpo, generate; all: one after the other
    shape: str = 'toy'              # toy, small or gpt2
    steps: int = 10                 # steps of the script, the two warm-ups among them
    against: str = ''               # another program's shell command: run both in turn, and compare
    rounds: int = 3                 # runs of either, with --against
    json: str = ''                  # a file to write the results to; '': none
    memory: bool = False            # instead: what fits on 8, 16, 24 and 80 GB, computed
    seed: int = 0                   # of the rows, the weights and the samples
    device: str = ''                # cuda, mps or cpu; '': cuda, else mps, else cpu
    dtype: str = ''                 # float32 or bfloat16; '': bfloat16 on newer GPUs, else float32
    compile: bool = False           # torch.compile the models' bodies


# Tokens per prompt; per response with EOS, uniform in [shortest, longest]; rows or pairs per step
Shape = namedtuple('Shape', 'model prompt shortest longest batch gpu_batch')
SHAPES = {'toy': Shape(GPTConfig(128, 512, 4, 4, 128), 24, 16, 40, 32, 32),
          'small': Shape(GPTConfig(256, 8192, 6, 6, 384), 64, 64, 128, 8, 8),
          'gpt2': Shape(GPTConfig(1024, 50257, 12, 12, 768), 64, 64, 128, 4, 64)}
SCRIPTS = {'sft': train_sft, 'rm': train_rm, 'ppo': train_ppo, 'dpo': train_dpo}
WARM_UPS, EPOCHS = 2, 4


def make_tokenizer(vocab_size):
    """Makes a tokenizer of the 256 bytes, the words ' 256', ' 257' and so on, and EOS."""
    tokens = [bytes([i]) if i < 256 else f' {i}'.encode() for i in range(vocab_size - 1)]
    return build_tokenizer(''.join(f'{base64.b64encode(token).decode()} {i}\n'
                                   for i, token in enumerate(tokens)))


def random_rows(shape, n, seed):
    """Draws n rows (prompt, chosen, rejected) of word ids; the script adds EOS to responses."""
    draw, words = random.Random(seed), range(256, shape.model.vocab_size - 1)
    return [(draw.choices(words, k=shape.prompt),
             *(draw.choices(words, k=draw.randint(shape.shortest, shape.longest) - 1)
               for _ in range(2))) for _ in range(n)]


def prepare(stage, shape, rows, seed, folder):
    """Writes what the stage's script starts from: data, a policy and a reward model, all random."""
    tokenizer = make_tokenizer(shape.model.vocab_size)
    lines = [json.dumps(dict(zip(('prompt', 'chosen', 'rejected'), map(tokenizer.decode, row))))
             + '\n' for row in rows]
    kind = {'sft': 'sft', 'ppo': 'prompts'}.get(stage, 'pairs')     # SFT reads the chosen side
    (folder / f'train.{kind}.jsonl').write_text(''.join(lines))
    (folder / f'val.{kind}.jsonl').write_text(''.join(lines[:2]))   # for the evaluation at the end
    (folder / 'tokenizer').write_text('bench.tiktoken')
    (folder / 'bench.tiktoken').write_text(tokenizer_text(tokenizer))
    torch.manual_seed(seed)
    policy, reward_model = GPT(shape.model), ScalarGPT(shape.model)
    if stage == 'ppo':
        with torch.no_grad():       # EOS gets a logit near -2500: no response ends early
            policy.ln_f.bias[0], policy.wte.weight[tokenizer.eot_token, 0] = 50.0, -50.0
    for name, models in (('sft', {'policy': policy}), ('rm', {'reward_model': reward_model})):
        (folder / name).mkdir()
        save_checkpoint(folder / name / 'ckpt.pt', name, 1, train_sft.Config(data=str(folder)),
                        checkpoint_text(tokenizer, '{}'), {}, models, [], shift=0.0)


def forward_flops(config, n, heads=0):
    """Counts a forward pass's flops for n tokens, of which `heads` are projected to logits."""
    L, C = config.n_layer, config.n_embd
    return 24 * L * C * C * n + 2 * L * C * n * (n + 1) + 2 * config.vocab_size * C * heads


def row_work(stage, shape, row):
    """Returns a row's share of a step: tokens logged, tokens read, tokens projected, flops."""
    forward = partial(forward_flops, shape.model)
    if stage == 'ppo':
        n, heads = shape.prompt + shape.longest, shape.longest
        read, values = forward(n - 1, heads), forward(n - 1)
        # Sampled, read by policy and reference, valued, scored; then learned from in every epoch
        return heads, n - 1, heads, 3 * read + values + forward(n) + EPOCHS * 3 * (read + values)
    heads = [len(response) + 1 for response in row[1:2 if stage == 'sft' else 3]]
    ends = [len(row[0]) + n for n in heads]
    if stage == 'rm':                   # it has no vocabulary, and reads a row's last token too
        return sum(ends), sum(ends), 0, 3 * sum(map(forward, ends))
    return (sum(ends), sum(ends) - len(ends), sum(heads),
            3 * sum(forward(end - 1, n) for end, n in zip(ends, heads)))


def time_calls(function, device, times=9):
    """Returns the seconds of a function's calls after the warm-ups, a list."""
    seconds = []
    for _ in range(WARM_UPS + times):
        began = time.perf_counter()
        function()
        if device.type != 'cpu':
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds[WARM_UPS:]


def product_rate(config, tokens, heads, device, dtype):
    """Measures flops per second of the products of blocks and head, forward and backward."""
    L, C, flops, seconds = config.n_layer, config.n_embd, 0, 0.0
    for M, inputs, outputs, times, kind in (
            (tokens, C, 3 * C, L, dtype), (tokens, C, C, L, dtype), (tokens, C, 4 * C, L, dtype),
            (tokens, 4 * C, C, L, dtype), (heads, C, config.vocab_size, 1, torch.float32)):
        if M:                           # the head in float32, as GPT.logits has it
            x, weight, grad = (torch.randn(*size, device=device, dtype=kind) for size in
                               ((M, inputs), (outputs, inputs), (M, outputs)))
            seconds += times * statistics.median(time_calls(
                lambda: (x @ weight.T, grad @ weight, grad.T @ x), device))
            flops += times * 6 * M * inputs * outputs
    return flops / seconds


def bench_script(stage, shape, batch, cfg, device, dtype):
    """Runs a script's main; returns every step's (seconds, tokens), flops per token, flop/s."""
    at_once = 2 * batch if stage == 'ppo' else batch            # rows in a step
    rows = random_rows(shape, cfg.steps * at_once, cfg.seed)
    with tempfile.TemporaryDirectory() as folder:
        prepare(stage, shape, rows, cfg.seed, Path(folder))
        flags = dict(data=folder, init=f'{folder}/sft', out=f'{folder}/out', lr=1e-6,
                     batch_size=batch, steps=cfg.steps, eval_every=cfg.steps, seed=cfg.seed,
                     device=cfg.device, dtype=cfg.dtype, compile=cfg.compile)
        if stage == 'ppo':
            flags |= dict(reward=f'{folder}/rm', rollout_size=at_once, ppo_epochs=EPOCHS,
                          max_new_tokens=shape.longest, value_lr=1e-6)
        with contextlib.redirect_stdout(sys.stderr):
            SCRIPTS[stage].main(SCRIPTS[stage].Config(**flags))
        log = map(json.loads, Path(folder, 'out', 'log.jsonl').read_text().splitlines())
    steps = [(row['ms'] / 1e3, round(row['tok_per_s'] * row['ms'] / 1e3))
             for row in log if 'ms' in row]
    counted, tokens, heads, work = map(sum, zip(*(row_work(stage, shape, row) for row in rows)))
    # Every row was visited once, at the length that it was drawn with
    assert sum(n for _, n in steps) == counted, f'{steps} add up to {counted} tokens?'
    bound = product_rate(shape.model, tokens * batch // len(rows), heads * batch // len(rows),
                         device, dtype)
    return steps[WARM_UPS:], work / counted, bound


def bench_generate(shape, batch, cfg, device, dtype, autocast):
    """Runs the sampler; returns every call's (seconds, tokens), bytes per token, byte/s."""
    policy, B, new = GPT(shape.model).to(device), 2 * batch, shape.longest
    prompts = [row[0] for row in random_rows(shape, B, cfg.seed)]

    def sample():
        with autocast:                  # eos=-1 is never drawn
            generate(policy, prompts, new, -1, generator=rng(cfg.seed, 0, 'rollout'))
    steps = [(seconds, B * new) for seconds in time_calls(sample, device, cfg.steps - WARM_UPS)]
    # Moved for a token of each row, on average: the blocks, keys and values; the head in float32
    L, C, places = shape.model.n_layer, shape.model.n_embd, shape.prompt + (new - 1) / 2
    size = (dtype.itemsize * (12 * L * C * C + 2 * L * B * C * places)
            + 4 * shape.model.vocab_size * C)
    half = torch.ones(int(size / 2), dtype=torch.uint8, device=device)
    copy = torch.ones_like(half)        # half of the bytes are read, half are written
    copying = statistics.median(time_calls(lambda: copy.copy_(half), device))
    return steps, size / B, size / copying


def measure(stage, cfg, device, autocast):
    """Prints a stage's two lines, explained at the top; returns their numbers as a dict."""
    name, generating, shape = f'{stage} {cfg.shape}', stage == 'generate', SHAPES[cfg.shape]
    new = shape.longest                 # tokens of each of PPO's responses and of the sampler's
    batch = shape.gpu_batch if device.type == 'cuda' else shape.batch
    with autocast:
        dtype = GPT(shape.model).to(device).empty_cache(1, 1).dtype     # of the blocks' products
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    steps, work, bound = (bench_generate(shape, batch, cfg, device, dtype, autocast) if generating
                          else bench_script(stage, shape, batch, cfg, device, dtype))
    ms = 1e3 * statistics.median(seconds for seconds, _ in steps) / (new if generating else 1)
    tokens = statistics.median(n / seconds for seconds, n in steps)
    rate, done, memory = tokens / (new if stage == 'ppo' else 1), tokens * work, peak_memory()
    print(f'{name}: {ms:.2f} ms per {"token" if generating else "step"}, {done / bound:.0%} of '
          f'{bound / 1e9:.1f} {"GB/s" if generating else "GFLOP/s"}, peak memory {memory}')
    print(f'{name}:', f'{rate:.2f} episodes/s' if stage == 'ppo' else f'{rate:.0f} tokens/s')
    return {'stage': stage, 'shape': cfg.shape, 'rate': rate, 'ms': ms, 'done': done,
            'bound': bound, 'share': done / bound, 'peak_memory': memory}


def rate_of(command, unit):
    """Runs a command in a shell; returns the last rate, 'N unit/s', that it prints."""
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True)
    rates = re.findall(rf'(?<!\S)([0-9]+(?:\.[0-9]+)?) {unit}/s', done.stdout)  # no 1,000, no 1e3
    rate = float(rates[-1]) if rates else 0.0
    if done.returncode or not rate:
        raise UserError(f'{command}: exit status {done.returncode}, last rate {rate:g} {unit}/s; '
                        'run it alone to see why')
    return rate


def compare(cfg):
    """Runs this stage and the command of --against in turn; returns both medians and the ratio."""
    unit, name = 'episodes' if cfg.stage == 'ppo' else 'tokens', f'{cfg.stage} {cfg.shape}'
    flags = [f'--{flag}={getattr(cfg, flag)}'
             for flag in ('stage', 'shape', 'steps', 'seed', 'device', 'dtype', 'compile')]
    command = shlex.join([sys.executable, '-m', 'tools.bench', *flags])
    rates = {'ours': [], 'theirs': []}
    for _ in range(cfg.rounds):         # in turn: what slows the machine slows both
        rates['theirs'].append(rate_of(cfg.against, unit))
        rates['ours'].append(rate_of(command, unit))
    for whose, of_runs in rates.items():
        print(f'{name} {whose}:', *(f'{rate:.10g}' for rate in of_runs))
    ours, theirs = map(statistics.median, rates.values())
    print(f'{name}: {ours:.10g} against {theirs:.10g}, {ours / theirs:.2f}x')
    return {'stage': cfg.stage, 'shape': cfg.shape, **rates, 'ratio': ours / theirs}


def main(cfg):
    """Measures, or with --memory computes; returns a list of dicts, which --json writes too."""
    for name, choices in (('stage', [*SCRIPTS, 'generate', 'all']), ('shape', SHAPES)):
        if getattr(cfg, name) not in choices:
            raise UserError(f'--{name}={getattr(cfg, name)}: one of {", ".join(choices)}')
    if cfg.steps <= WARM_UPS:
        raise UserError(f'--steps={cfg.steps}: the first {WARM_UPS} are warm-ups, so at least 3')
    if cfg.against and (cfg.stage == 'all' or cfg.rounds < 1):
        raise UserError('--against compares one stage: name it with --stage; --rounds is 1 or more')
    if cfg.memory:
        results = memory_table()
    elif cfg.against:
        results = [compare(cfg)]
    else:
        device, autocast = set_up(cfg)
        stages = [*SCRIPTS, 'generate'] if cfg.stage == 'all' else [cfg.stage]
        results = [measure(stage, cfg, device, autocast) for stage in stages]
    if cfg.json:
        Path(cfg.json).parent.mkdir(parents=True, exist_ok=True)
        Path(cfg.json).write_text(json.dumps(results, indent=1) + '\n')
    return results


if __name__ == '__main__':
    run_cli(main, Config)
