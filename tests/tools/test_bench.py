"""tools/bench.py: its workload is what it says, its formulas are counts, its lines are readable."""
import json
import re
import shlex
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import prefgpt
import train_ppo
from conftest import tiny_gpt, tiny_scalar
from data.text import encode_rows, load_split, load_text
from prefgpt import GPTConfig, UserError, adamw
from tools import bench

TINY = bench.Shape(GPTConfig(16, 300, 2, 2, 8), prompt=3, shortest=2, longest=5, batch=4,
                   gpu_batch=4)


# ----------------------------------------------------------------------------- the workload

@pytest.mark.parametrize('vocab_size', [512, 8192, 50257])
def test_every_word_is_one_token(vocab_size):
    tokenizer = bench.make_tokenizer(vocab_size)
    assert tokenizer.n_vocab == vocab_size and tokenizer.eot_token == vocab_size - 1
    ids = list(range(256, vocab_size - 1))
    assert tokenizer.encode_ordinary(tokenizer.decode(ids)) == ids
    assert tokenizer.encode_ordinary(tokenizer.decode(ids[::-1])) == ids[::-1]


@pytest.mark.parametrize('shape', ['toy', 'small', 'gpt2'])
def test_rows_have_the_lengths_of_the_table(shape):
    """Prompts of one length; responses with EOS from shortest to longest, both of them drawn."""
    shape = bench.SHAPES[shape]
    rows = bench.random_rows(shape, 500, seed=1)
    assert {len(prompt) for prompt, _, _ in rows} == {shape.prompt}
    lengths = {len(response) + 1 for _, *responses in rows for response in responses}
    assert lengths == set(range(shape.shortest, shape.longest + 1))
    assert shape.prompt + shape.longest <= shape.model.block_size
    ids = {i for row in rows for part in row for i in part}
    assert min(ids) >= 256 and max(ids) < shape.model.vocab_size - 1    # no EOS, no lone byte
    assert rows == bench.random_rows(shape, 500, seed=1) != bench.random_rows(shape, 500, seed=2)


@pytest.mark.parametrize('stage, kind', [('sft', 'sft'), ('rm', 'pairs'), ('dpo', 'pairs'),
                                         ('ppo', 'prompts')])
def test_scripts_read_the_very_ids(tmp_path, stage, kind):
    rows = bench.random_rows(TINY, 7, seed=0)
    bench.prepare(stage, TINY, rows, 0, tmp_path)
    tokenizer, text = load_text(tmp_path)
    train, _ = load_split(tmp_path, kind, text['template'])
    read = encode_rows(train, kind, tokenizer, TINY.model.block_size)
    eos, sides = tokenizer.eot_token, {'sft': 1, 'prompts': 0, 'pairs': 2}[kind]
    assert read == [(prompt, *(response + [eos] for response in responses[:sides]))
                    for prompt, *responses in rows]
    counted = sum(bench.row_work(stage, TINY, row)[0] for row in rows)
    if stage == 'ppo':
        assert counted == 7 * TINY.longest
    else:       # the script's own count: both rows of a pair, its prompt twice
        assert counted == sum(len(prompt) + len(response) for prompt, *responses in read
                              for response in responses)


# ----------------------------------------------------------------------------- what is printed

def test_every_stage_at_toy_shape(capsys, monkeypatch, tmp_path):
    """The toy model and its rows, a few at a time."""
    monkeypatch.setitem(bench.SHAPES, 'toy', bench.SHAPES['toy']._replace(batch=4))
    path = tmp_path / 'bench.json'
    results = bench.main(bench.Config(stage='all', steps=3, device='cpu', json=str(path)))
    out = capsys.readouterr()
    lines = out.out.splitlines()
    assert lines[0].startswith('device cpu, float32') and len(lines) == 1 + 2 * 5
    stages = ['sft', 'rm', 'ppo', 'dpo', 'generate']
    for stage, about, last in zip(stages, lines[1::2], lines[2::2], strict=True):
        step, unit = ('token', 'GB/s') if stage == 'generate' else ('step', 'GFLOP/s')
        assert re.fullmatch(rf'{stage} toy: \d+\.\d\d ms a {step}, \d+% of \d+\.\d {unit}, '
                            r'peak memory \d+ MB.*', about)
        assert re.fullmatch(rf'{stage} toy: ' + (r'\d+\.\d\d episodes/s' if stage == 'ppo' else
                                                 r'\d+ tokens/s'), last)
    assert 'step      3/3' in out.err                   # the script's own loop has run
    assert json.loads(path.read_text()) == results
    for result, stage in zip(results, stages, strict=True):
        assert result['stage'] == stage and result['share'] == result['done'] / result['bound']
        assert 0 < result['share'] < 2                  # of a busy machine: not a bound to rely on


def test_what_the_script_is_asked_to_do(monkeypatch, tmp_path):
    """PPO's sizes are the peers', and what is asked of the bench reaches the script."""
    asked = []

    def main(cfg):
        asked.append(cfg)
        tmp_path.joinpath('out').mkdir()
        tmp_path.joinpath('out', 'log.jsonl').write_text(
            '{"step": 1, "ms": 500.0, "tok_per_s": 80.0}\n{"step": 1, "eval_score": 0.0}\n')
    monkeypatch.setitem(bench.SCRIPTS, 'ppo', SimpleNamespace(main=main, Config=train_ppo.Config))
    cfg = bench.Config(steps=7, seed=3, device='cpu', dtype='bfloat16', compile=True)
    rows = bench.random_rows(TINY, 8, seed=3)
    assert bench.run_script('ppo', TINY, rows, 4, cfg, tmp_path) == [(0.5, 40)]
    flags, = map(vars, asked)
    assert {name: flags[name] for name in ('steps', 'seed', 'device', 'dtype', 'compile')} == dict(
        steps=7, seed=3, device='cpu', dtype='bfloat16', compile=True)
    # Twice the batch of episodes, 4 epochs of 2 minibatches, up to the longest length
    assert (flags['rollout_size'], flags['batch_size'], flags['ppo_epochs']) == (8, 4, 4)
    assert flags['max_new_tokens'] == TINY.longest and flags['micro_batch_size'] == 0


def test_the_shapes_are_the_peers():
    """Layers, heads, width; V, block; prompt, response tokens; batch, and batch on a GPU."""
    rows = [(m.n_layer, m.n_head, m.n_embd, m.vocab_size, m.block_size, *rest)
            for m, *rest in bench.SHAPES.values()]
    assert rows == [(4, 4, 128, 512, 128, 24, 16, 40, 32, 32),
                    (6, 6, 384, 8192, 256, 64, 64, 128, 8, 8),
                    (12, 12, 768, 50257, 1024, 64, 64, 128, 4, 64)]


@pytest.mark.parametrize('stage', ['sft', 'generate'])
def test_bfloat16(monkeypatch, stage):
    """In autocast the blocks' products, and the cache, are in bfloat16: the bound's bytes too."""
    seen = []
    monkeypatch.setitem(bench.SHAPES, 'tiny', TINY)
    for name in ('product_rate', 'decode_bytes'):
        monkeypatch.setattr(bench, name, lambda *arguments: seen.append(arguments[-1]) or 1e6)
    bench.main(bench.Config(stage=stage, shape='tiny', steps=3, device='cpu', dtype='bfloat16'))
    assert seen == [2 if stage == 'generate' else torch.bfloat16]


def test_the_rate_is_of_the_median_step_after_two(monkeypatch):
    """Steps of 9, 9, 1, 2 and 4 s: the median of the last three rates, whatever came before."""
    monkeypatch.setitem(bench.SHAPES, 'tiny', TINY)
    monkeypatch.setattr(bench, 'product_rate', lambda *arguments: 1e9)

    def run_script(stage, shape, rows, batch, cfg, folder):
        return [(seconds, sum(len(prompt) + len(chosen) + 1 for prompt, chosen, _ in rows[i:i + 4]))
                for i, seconds in zip(range(0, len(rows), 4), (9, 9, 1, 2, 4), strict=True)]
    monkeypatch.setattr(bench, 'run_script', run_script)
    result, = bench.main(bench.Config(stage='sft', shape='tiny', steps=5, device='cpu'))
    rows = bench.random_rows(TINY, 20, seed=0)[12:16]
    assert result['ms'] == 2000
    assert result['rate'] == sum(len(prompt) + len(chosen) + 1 for prompt, chosen, _ in rows) / 2


def test_a_row_that_is_not_visited_is_noticed(monkeypatch):
    """The log's tokens must add up to those of the rows."""
    monkeypatch.setitem(bench.SHAPES, 'tiny', TINY)
    monkeypatch.setattr(bench, 'run_script', lambda *arguments: [(1.0, 20)] * 4)
    with pytest.raises(AssertionError, match='add up'):
        bench.main(bench.Config(stage='rm', shape='tiny', steps=4, device='cpu'))


@pytest.mark.parametrize('flag, wrong, choices', [
    ('stage', 'grpo', 'sft, rm, ppo, dpo, generate, all'), ('shape', 'large', 'toy, small, gpt2')])
def test_errors_name_the_choices(flag, wrong, choices):
    with pytest.raises(UserError, match=f'^--{flag}={wrong}: one of {choices}$'):
        bench.main(bench.Config(**{flag: wrong}))


def test_two_steps_are_warm_ups_alone():
    with pytest.raises(UserError, match='^--steps=2: the first 2 are warm-ups, so at least 3$'):
        bench.main(bench.Config(steps=2))


# ----------------------------------------------------------------------------- work

def test_forward_flops_by_hand():
    """2 blocks, 8 wide, 300 words, 5 tokens of which 2 meet the vocabulary."""
    block = 2 * 5 * (8 * 24 + 8 * 8 + 8 * 32 + 32 * 8)          # a multiplication and an addition
    attention = sum(2 * 8 * (t + 1) * 2 for t in range(5))      # q k' and the mean of v
    assert (block, attention) == (7680, 480)
    assert bench.forward_flops(TINY.model, 5, 2) == 2 * (7680 + 480) + 2 * 2 * 8 * 300


def test_flops_of_a_model_as_torch_counts_them():
    """All matrix products of a real model; torch counts a causal attention whole, so it is left."""
    from torch.utils.flop_counter import FlopCounterMode
    policy, tokens = tiny_gpt(), torch.zeros(1, 6, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        policy.logits(policy(tokens)[:, :4]).sum().backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()['Global'].items()}
    products = sum(n for op, n in counts.items() if 'mm' in op)
    attention = 2 * 2 * 16 * 6 * 7
    assert products == 3 * (bench.forward_flops(policy.config, 6, 4) - attention)


def test_row_work_by_hand():
    """Tokens logged, inputs, tokens for the head, flops; responses of 5 and 2 tokens with EOS."""
    forward = bench.forward_flops
    row = ([1] * 3, [1] * 4, [1] * 1)
    config = TINY.model
    assert bench.row_work('sft', TINY, row) == (8, 7, 5, 3 * forward(config, 7, 5))
    assert bench.row_work('dpo', TINY, row) == (
        13, 11, 7, 3 * (forward(config, 7, 5) + forward(config, 4, 2)))
    assert bench.row_work('rm', TINY, row) == (
        13, 13, 0, 3 * (forward(config, 8) + forward(config, 5)))
    # 3 + 5 tokens: sampled, two logprobs, values, scores; four epochs of policy and value model
    assert bench.row_work('ppo', TINY, row) == (5, 7, 5,
        3 * forward(config, 7, 5) + forward(config, 7) + forward(config, 8)
        + 4 * 3 * (forward(config, 7, 5) + forward(config, 7)))


def test_decode_bytes_by_hand():
    """Blocks and head once a token; keys and values of 3, 4 and 5 places, for two rows."""
    weights = 2 * (8 * 24 + 8 * 8 + 8 * 32 + 32 * 8)
    cache = [2 * 2 * 2 * 8 * places for places in (3, 4, 5)]    # layers, k and v, rows, channels
    assert bench.decode_bytes(TINY.model, 2, 3, 3, width=2) == (
        2 * weights + 2 * sum(cache) / 3 + 4 * 300 * 8)


# ----------------------------------------------------------------------------- memory

def bytes_of(model):
    """Weights, gradients and moments of a real model after a real step, and its matrices' sizes."""
    optimizer = adamw(model, 0.1)
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()
    weights = list(model.parameters())
    moments = [tensor for state in optimizer.state.values() for name, tensor in state.items()
               if name != 'step']
    matrices = sum(p.numel() for name, p in model.named_parameters()
                   if p.dim() == 2 and 'w' in name and 'wte' not in name and 'wpe' not in name)
    return sum(t.numel() * t.element_size()
               for t in [*weights, *(p.grad for p in weights), *moments]), matrices


@pytest.mark.parametrize('w', [2, 4])
def test_held_bytes_are_those_of_the_tensors(w):
    """SFT and DPO train one model, PPO two and holds three more; copies only under autocast."""
    (policy, matrices), (scalar, more) = bytes_of(tiny_gpt()), bytes_of(tiny_scalar())
    config = tiny_gpt().config
    held = {method: numbers[0] for method, numbers in bench.memory(config, w).items()}
    head = 12 * prefgpt.LOGITS_AT_ONCE + 8 * config.vocab_size * config.n_embd
    copies = 0 if w == 4 else w
    assert held['SFT'] == held['DPO'] == policy + copies * matrices + head
    assert held['PPO'] == (policy + scalar + copies * (matrices + more)
                           + (2 * policy + scalar) // 4 + head)


@pytest.mark.parametrize('autocast', [False, True])
def test_row_bytes_are_what_autograd_keeps(autocast):
    """Different floating-point storages saved for the backward pass, weights and copies aside."""
    policy, kept = tiny_gpt(n_embd=32, n_head=4), {}
    shapes = {p.shape for p in policy.parameters()} | {p.T.shape for p in policy.parameters()
                                                       if p.dim() == 2}

    def pack(tensor):
        if tensor.is_floating_point() and tensor.shape not in shapes:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            hidden = policy(torch.zeros(1, 24, dtype=torch.long))
        hidden = hidden[torch.ones(1, 24, dtype=torch.bool)]
    last = hidden.numel() * 4                           # what the head reads
    config = replace(policy.config, block_size=24)      # all of which a row fills
    _, row, _ = bench.memory(config, 2 if autocast else 4)['SFT']
    assert sum(kept.values()) + last == row


def test_the_table(capsys, tmp_path):
    """Every cell: so many rows fit, and one more does not."""
    path = tmp_path / 'memory.json'
    results = bench.main(bench.Config(memory=True, json=str(path)))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 12 and json.loads(path.read_text()) == results
    for row, line in zip(results, lines[1:], strict=True):
        cells = line.split()
        assert cells[:2] == [row['model'], row['method']]
        for size, cell in zip((8, 16, 24, 80), cells[-4:], strict=True):
            n = row[f'{size} GB']
            assert cell == (str(n) if n else '-')
            assert n == 0 or row['held'] + n * row['row'] <= size * 2 ** 30
            assert row['held'] + (n + 1) * row['row'] > size * 2 ** 30
    sft, ppo, dpo = results[:3]                         # GPT-2 124M
    assert sft['held'] == dpo['held'] < ppo['held']
    assert dpo['row'] == ppo['row'] == 2 * sft['row'] and ppo['cache'] == 12 * 2 * 1024 * 768 * 2


# ----------------------------------------------------------------------------- side by side

def test_two_programs_in_turn(capsys, monkeypatch):
    """Theirs, ours, theirs, ours, theirs, ours; the medians' ratio, and not the ratios' median."""
    commands, rates = [], iter([100.0, 150.0, 300.0, 600.0, 200.0, 100.0])
    monkeypatch.setattr(bench, 'rate_of',
                        lambda command, unit: commands.append(command) or next(rates))
    [result] = bench.main(bench.Config(stage='dpo', shape='small', steps=7, against="run 'a b'"))
    assert result['theirs'] == [100, 300, 200] and result['ours'] == [150, 600, 100]
    assert result['ratio'] == 150 / 200
    assert commands[::2] == ["run 'a b'"] * 3
    asked = {'--stage=dpo', '--shape=small', '--steps=7'}
    assert all(asked <= set(ours.split()) for ours in commands[1::2])
    assert '--against' not in commands[1]
    assert 'dpo small: 150 against 200, 0.75x' in capsys.readouterr().out


def test_the_rate_of_a_program():
    """The last one it prints; a program that fails, prints none or is not there is one line."""
    def python(program):
        return shlex.join([sys.executable, '-c', program])
    assert bench.rate_of(python("print('1 tokens/s'); print('x: 24.5 tokens/s (y)')"),
                         'tokens') == 24.5
    with pytest.raises(UserError, match='exit status 3, last rate 1 '):
        bench.rate_of(python("print('1 tokens/s'); raise SystemExit(3)"), 'tokens')
    for printed in ('27,350 tokens/s', '1.5e+04 tokens/s', '24.5 episodes/s', ''):
        with pytest.raises(UserError, match='exit status 0, last rate none tokens/s'):
            bench.rate_of(python(f'print({printed!r})'), 'tokens')
    with pytest.raises(UserError, match='last rate 0 episodes/s'):
        bench.rate_of(python("print('0 episodes/s')"), 'episodes')
    for wrong, status in (('no-such-program', 127), ("a 'b", '[12]'), (' ', 0)):
        with pytest.raises(UserError, match=f'^{wrong}: exit status {status}, last rate none'):
            bench.rate_of(wrong, 'tokens')


@pytest.mark.parametrize('wrong, told', [
    (dict(against='true'), 'name it with --stage'),
    (dict(stage='sft', against='true', rounds=0), '--rounds is 1 or more')])
def test_what_cannot_be_compared(wrong, told):
    with pytest.raises(UserError, match=told):
        bench.main(bench.Config(**wrong))
