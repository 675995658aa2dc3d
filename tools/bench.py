"""
Measures speed and memory, stage by stage: the scripts' own loops on random rows, and their bounds.

A stage's script runs on rows of exact lengths, from random weights, and its log.jsonl is read, so
there is no second loop; what it prints goes to stderr. Last line: non-padding tokens (EOS is one)
per second, the median step after two warm-ups; for ppo episodes. DPO's pass for the reference comes
before its first step; generate times the sampler alone. The line before it gives the share of what
the same machine does in the same run:
  - training: the flops that the rows need (padding and what is computed twice are no work), by the
    rate at which a batch's matrix products alone, blocks and head, run forward and backward;
  - generate: the bytes that a token must move, the weights once and the keys and values so far, by
    the rate at which as many are copied. Those of a small model stay in the processor's caches.
What it does not do: run several processes at once, or compile the sampler. On a CPU peak memory is
the process's so far: with --stage=all not each stage's own.

    python -m tools.bench --stage=dpo --shape=small
    python -m tools.bench --stage=sft --steps=42 --against="python other.py"
    python -m tools.bench --memory
"""
import base64, contextlib, itertools, json, random, re, shlex, statistics, string, subprocess, sys
import tempfile, time
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import torch

import train_dpo, train_ppo, train_rm, train_sft
from data.text import build_tokenizer, checkpoint_text, tokenizer_text
from prefgpt import (GPT, LOGITS_AT_ONCE, GPTConfig, ScalarGPT, UserError, generate, peak_memory,
                     rng, run_cli, save_checkpoint, set_up)


@dataclass
class Config:
    stage: str = 'all'              # sft, rm, ppo, dpo, generate; all: one after the other
    shape: str = 'toy'              # toy, small or gpt2
    steps: int = 10                 # steps of the script, the two warm-ups among them
    against: str = ''               # a shell command, another program's: run in turn, and compare
    rounds: int = 3                 # runs of either, with --against
    json: str = ''                  # a file to write the results to; '': none
    memory: bool = False            # instead: what fits on 8, 16, 24 and 80 GB, computed
    seed: int = 0                   # of the rows, the weights and the samples
    device: str = ''                # cuda, mps or cpu; '': cuda, else mps, else cpu
    dtype: str = ''                 # float32 or bfloat16; '': bfloat16 on CUDA, else float32
    compile: bool = False           # torch.compile the models' bodies


# Tokens of a prompt; of a response, uniform in [shortest, longest], with EOS; rows or pairs
Shape = namedtuple('Shape', 'model prompt shortest longest batch gpu_batch')
SHAPES = {'toy': Shape(GPTConfig(128, 512, 4, 4, 128), 24, 16, 40, 32, 32),
          'small': Shape(GPTConfig(256, 8192, 6, 6, 384), 64, 64, 128, 8, 8),
          'gpt2': Shape(GPTConfig(1024, 50257, 12, 12, 768), 64, 64, 128, 4, 64)}
SCRIPTS = {'sft': train_sft, 'rm': train_rm, 'ppo': train_ppo, 'dpo': train_dpo}
WARM_UPS, EPOCHS = 2, 4
GPT2 = {'124M': (12, 12, 768), '355M': (24, 16, 1024), '774M': (36, 20, 1280),
        '1.5B': (48, 25, 1600)}     # blocks, heads, channels


# ----------------------------------------------------------------------------- the workload

def make_tokenizer(vocab_size):
    """Makes a tokenizer of the 256 bytes, words of a space and four letters, and EOS."""
    words = (f' {"".join(w)}'.encode() for w in itertools.product(string.ascii_lowercase, repeat=4))
    tokens = [bytes([i]) for i in range(256)] + list(itertools.islice(words, vocab_size - 257))
    return build_tokenizer(''.join(f'{base64.b64encode(token).decode()} {i}\n'
                                   for i, token in enumerate(tokens)))


def random_rows(shape, n, seed):
    """Draws n rows (prompt, chosen, rejected), ids of words; the script adds a response's EOS."""
    draw, words = random.Random(seed), range(256, shape.model.vocab_size - 1)
    return [(draw.choices(words, k=shape.prompt),
             *(draw.choices(words, k=draw.randint(shape.shortest, shape.longest) - 1)
               for _ in range(2))) for _ in range(n)]


def prepare(stage, shape, rows, seed, folder):
    """Writes what the stage's script starts from: data, a policy and a reward model, all random."""
    tokenizer = make_tokenizer(shape.model.vocab_size)
    texts = [[tokenizer.decode(ids) for ids in row] for row in rows]
    assert [tuple(map(tokenizer.encode_ordinary, row)) for row in texts] == rows
    lines = [json.dumps(dict(zip(('prompt', 'chosen', 'rejected'), row))) + '\n' for row in texts]
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


def run_script(stage, shape, rows, batch, cfg, folder):
    """Runs the script's main; returns what its log says of every step, (seconds, tokens)."""
    prepare(stage, shape, rows, cfg.seed, folder)
    flags = dict(data=str(folder), init=str(folder / 'sft'), out=str(folder / 'out'), lr=1e-6,
                 batch_size=batch, steps=cfg.steps, eval_every=cfg.steps, seed=cfg.seed,
                 device=cfg.device, dtype=cfg.dtype, compile=cfg.compile)
    if stage == 'ppo':
        flags |= dict(reward=str(folder / 'rm'), rollout_size=2 * batch, ppo_epochs=EPOCHS,
                      max_new_tokens=shape.longest, value_lr=1e-6)
    with contextlib.redirect_stdout(sys.stderr):
        SCRIPTS[stage].main(SCRIPTS[stage].Config(**flags))
    log = map(json.loads, (folder / 'out' / 'log.jsonl').read_text().splitlines())
    return [(row['ms'] / 1e3, round(row['tok_per_s'] * row['ms'] / 1e3))
            for row in log if 'ms' in row]


# ----------------------------------------------------------------------------- work and bounds

def forward_flops(config, n, heads=0):
    """Counts a forward pass's matrix products: n tokens, heads of them to the vocabulary."""
    L, C = config.n_layer, config.n_embd
    return 24 * L * C * C * n + 2 * L * C * n * (n + 1) + 2 * config.vocab_size * C * heads


def row_work(stage, shape, row):
    """Returns what a step does with a row: tokens logged, inputs, those for the head, flops."""
    def forward(n, heads=0):
        return forward_flops(shape.model, n, heads)
    if stage == 'ppo':
        n, heads = shape.prompt + shape.longest, shape.longest
        read, values = forward(n - 1, heads), forward(n - 1)
        # Sampled, read by policy and reference, valued, scored; then learned from in every epoch
        return heads, n - 1, heads, 3 * read + values + forward(n) + EPOCHS * 3 * (read + values)
    prompt, *responses = row
    heads = [len(response) + 1 for response in responses[:1 if stage == 'sft' else 2]]
    logged = sum(len(prompt) + n for n in heads)
    if stage == 'rm':                   # it has no vocabulary, and reads a row's last token too
        return logged, logged, 0, 3 * sum(forward(len(prompt) + n) for n in heads)
    return (logged, logged - len(heads), sum(heads),
            3 * sum(forward(len(prompt) + n - 1, n) for n in heads))


def median_seconds(function, device, times=9):
    """Times the calls of a function, after the warm-ups, and returns the median."""
    seconds = []
    for _ in range(WARM_UPS + times):
        began = time.perf_counter()
        function()
        if device.type != 'cpu':
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_UPS:])


def product_rate(config, tokens, heads, device, dtype):
    """Measures flops per second of the products of blocks and head, forward and backward."""
    L, C, flops, seconds = config.n_layer, config.n_embd, 0, 0.0
    for M, inputs, outputs, times, kind in (
            (tokens, C, 3 * C, L, dtype), (tokens, C, C, L, dtype), (tokens, C, 4 * C, L, dtype),
            (tokens, 4 * C, C, L, dtype), (heads, C, config.vocab_size, 1, torch.float32)):
        if M:                           # the head in float32, as GPT.logits has it
            x, weight, grad = (torch.randn(*size, device=device, dtype=kind) for size in
                               ((M, inputs), (outputs, inputs), (M, outputs)))
            seconds += times * median_seconds(
                lambda: (x @ weight.T, grad @ weight, grad.T @ x), device)
            flops += times * 6 * M * inputs * outputs
    return flops / seconds


def decode_bytes(config, B, prompt, new, width):
    """Returns the bytes moved for a token of each of B rows, on average; the head in float32."""
    L, C, places = config.n_layer, config.n_embd, prompt + (new - 1) / 2
    return width * (12 * L * C * C + 2 * L * B * C * places) + 4 * config.vocab_size * C


def bench_script(stage, shape, batch, cfg, device, dtype):
    """Measures a training stage: tokens or episodes per second, ms per step, flop/s, its bound."""
    at_once = 2 * batch if stage == 'ppo' else batch            # rows in a step
    rows = random_rows(shape, cfg.steps * at_once, cfg.seed)
    with tempfile.TemporaryDirectory() as folder:
        steps = run_script(stage, shape, rows, batch, cfg, Path(folder))
    counted, tokens, heads, work = map(sum, zip(*(row_work(stage, shape, row) for row in rows)))
    # Every row was visited once, at the length that it was drawn with
    assert sum(n for _, n in steps) == counted, f'{steps} add up to {counted} tokens?'
    rate = statistics.median((at_once if stage == 'ppo' else n) / seconds
                             for seconds, n in steps[WARM_UPS:])
    ms = 1e3 * statistics.median(seconds for seconds, _ in steps[WARM_UPS:])
    bound = product_rate(shape.model, tokens * batch // len(rows), heads * batch // len(rows),
                         device, dtype)
    return rate, ms, rate * work / (len(rows) if stage == 'ppo' else counted), bound


def bench_generate(shape, batch, cfg, device, dtype, autocast):
    """Measures the sampler: tokens per second, ms per token of every row, byte/s, its bound."""
    policy, B, new = GPT(shape.model).to(device), 2 * batch, shape.longest
    prompts = [row[0] for row in random_rows(shape, B, cfg.seed)]

    def sample():
        with autocast:                  # eos=-1 is never drawn
            _, mask = generate(policy, prompts, new, -1, generator=rng(cfg.seed, 0, 'rollout'))
        assert mask.sum() == B * new
    seconds = median_seconds(sample, device, cfg.steps - WARM_UPS) / new
    size = decode_bytes(shape.model, B, shape.prompt, new, dtype.itemsize)
    half = torch.ones(int(size / 2), dtype=torch.uint8, device=device)
    copy = torch.ones_like(half)        # half of the bytes are read, half are written
    copying = median_seconds(lambda: copy.copy_(half), device)
    return B / seconds, 1e3 * seconds, size / seconds, size / copying


def measure(stage, cfg, device, autocast):
    """Prints two lines on a stage, in the docstring's terms, and returns the same as a dict."""
    shape, generating = SHAPES[cfg.shape], stage == 'generate'
    batch = shape.gpu_batch if device.type == 'cuda' else shape.batch
    with autocast:
        dtype = GPT(shape.model).to(device).empty_cache(1, 1).dtype     # of the blocks' products
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    arguments = shape, batch, cfg, device, dtype
    rate, ms, done, bound = (bench_generate(*arguments, autocast) if generating else
                             bench_script(stage, *arguments))
    memory, name = peak_memory(), f'{stage} {cfg.shape}'
    print(f'{name}: {ms:.2f} ms a {"token" if generating else "step"}, {done / bound:.0%} of '
          f'{bound / 1e9:.1f} {"GB/s" if generating else "GFLOP/s"}, peak memory {memory}')
    print(f'{name}:', f'{rate:.2f} episodes/s' if stage == 'ppo' else f'{rate:.0f} tokens/s')
    return {'stage': stage, 'shape': cfg.shape, 'rate': rate, 'ms': ms, 'done': done,
            'bound': bound, 'share': done / bound, 'peak_memory': memory}


# ----------------------------------------------------------------------------- side by side

def rate_of(command, unit):
    """Runs a command in a shell; returns the last rate, 'N unit/s', that it prints."""
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True)
    rates = re.findall(rf'(?<!\S)([0-9]+(?:\.[0-9]+)?) {unit}/s', done.stdout)  # no 1,000, no 1e3
    if done.returncode or not rates or float(rates[-1]) == 0:
        raise UserError(f'{command}: exit status {done.returncode}, last rate '
                        f'{rates[-1] if rates else "none"} {unit}/s; run it alone to see why')
    return float(rates[-1])


def compare(cfg):
    """Runs this stage and the command of --against in turn; returns both medians and the ratio."""
    unit = 'episodes' if cfg.stage == 'ppo' else 'tokens'
    flags = ('stage', 'shape', 'steps', 'seed', 'device', 'dtype', 'compile')
    ours = shlex.join([sys.executable, '-m', 'tools.bench',
                       *(f'--{flag}={getattr(cfg, flag)}' for flag in flags)])
    rates = {'ours': [], 'theirs': []}
    for _ in range(cfg.rounds):         # in turn: what slows the machine slows both
        rates['theirs'].append(rate_of(cfg.against, unit))
        rates['ours'].append(rate_of(ours, unit))
    medians = {name: statistics.median(of_runs) for name, of_runs in rates.items()}
    ratio, name = medians['ours'] / medians['theirs'], f'{cfg.stage} {cfg.shape}'
    for whose, of_runs in rates.items():
        print(f'{name} {whose}:', *(f'{rate:.10g}' for rate in of_runs))
    print(f'{name}: {medians["ours"]:.10g} against {medians["theirs"]:.10g}, {ratio:.2f}x')
    return {'stage': cfg.stage, 'shape': cfg.shape, **rates, 'ratio': ratio}


# ----------------------------------------------------------------------------- what fits

def memory(config, w=2):
    """
    Returns {method: (bytes held, bytes per row of block_size tokens, bytes of its cache)}; a row is
    a pair in DPO. w is 2 under bfloat16 autocast and 4 without it.
    """
    L, H, C, T, V = (config.n_layer, config.n_head, config.n_embd, config.block_size,
                     config.vocab_size)
    matrices = 12 * L * C * C
    weights = matrices + 13 * L * C + (V + T + 2) * C
    copies = w if w < 4 else 0                  # bytes per weight: autocast copies the matrices
    frozen = 4 * weights
    trained = 16 * weights + copies * matrices  # weight, gradient and AdamW's two moments
    # Three blocks of logits, and two gradients of the embedding
    head = 12 * LOGITS_AT_ONCE + 8 * V * C
    # Kept for the backward pass, per block: LayerNorms' inputs 8 C, statistics 16 and outputs
    # 2 w C; q, k, v 3 w C; attention's output w C and sums 4 H; both sides of GELU 8 w C. Then the
    # last LayerNorm's
    row = T * (L * ((8 + 14 * w) * C + 4 * H + 16) + 8 * C + 8)
    # PPO: a value model too, and reference, kl_sft's copy and reward model; two of them have a head
    held = 2 * trained + 3 * frozen + (16 + copies + 4) * C + head
    return {'SFT': (trained + head, row, 0), 'PPO': (held, 2 * row, 4 * L * C * T),
            'DPO': (trained + head, 2 * row, 0)}


def memory_table(sizes=(8, 16, 24, 80)):
    """Prints what GPT-2's sizes hold, and the largest micro_batch_size by GB; returns the rows."""
    print('GPT-2        held GB  row MB cache MB' + ''.join(f'{f"{size} GB":>7}' for size in sizes))
    rows = []
    for model, (L, H, C) in GPT2.items():
        config = GPTConfig(n_layer=L, n_head=H, n_embd=C)
        for method, (held, row, cache) in memory(config).items():
            fits = {f'{n} GB': max(0, int((n * 2 ** 30 - held) // row)) for n in sizes}
            rows.append({'model': model, 'method': method, 'held': held, 'row': row,
                         'cache': cache, **fits})
            print(f'{model} {method:6} {held / 2 ** 30:9.1f} {row / 2 ** 20:7.0f} '
                  f'{cache / 2 ** 20:8.0f}' + ''.join(f'{n or "-":>7}' for n in fits.values()))
    return rows


def main(cfg):
    """Measures, or with --memory computes; returns a list of dicts, which --json writes too."""
    stages = [*SCRIPTS, 'generate']
    for name, choices in (('stage', [*stages, 'all']), ('shape', SHAPES)):
        if getattr(cfg, name) not in choices:
            raise UserError(f'--{name}={getattr(cfg, name)}: one of {", ".join(choices)}')
    if cfg.steps <= WARM_UPS:
        raise UserError(f'--steps={cfg.steps}: the first {WARM_UPS} are warm-ups, so at least 3')
    if cfg.json:                        # what is wrong with it shows before the measuring
        Path(cfg.json).parent.mkdir(parents=True, exist_ok=True)
    if cfg.against and (cfg.stage == 'all' or cfg.rounds < 1):
        raise UserError('--against compares one stage: name it with --stage; --rounds is 1 or more')
    if cfg.memory:
        results = memory_table()
    elif cfg.against:
        results = [compare(cfg)]
    else:
        device, autocast = set_up(cfg)
        results = [measure(stage, cfg, device, autocast)
                   for stage in (stages if cfg.stage == 'all' else [cfg.stage])]
    if cfg.json:
        Path(cfg.json).write_text(json.dumps(results, indent=1) + '\n')
    return results


if __name__ == '__main__':
    run_cli(main, Config)
