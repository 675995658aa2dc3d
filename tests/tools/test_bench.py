"""tools/bench.py and memory.py: the workload is what it says, the formulas are counts."""
import json, re, shlex, sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_gpt, tiny_scalar, write_jsonl

import prefgpt
from prefgpt import GPTConfig, UserError, adamw
from tools import bench
from tools.memory import memory

TINY = bench.Shape(GPTConfig(16, 300, 2, 2, 8), prompt=3, shortest=2, longest=5, batch=4,
                   gpu_batch=4)


@pytest.mark.parametrize('shape', ['toy', 'small', 'gpt2'])
def test_rows_have_the_lengths_of_the_table(shape):
    """One length of prompts, all those of responses; every word is one token, in whatever order."""
    shape = bench.SHAPES[shape]
    rows = bench.random_rows(shape, 500, seed=1)
    assert {len(prompt) for prompt, _, _ in rows} == {shape.prompt}
    lengths = {len(response) + 1 for _, *responses in rows for response in responses}
    assert lengths == set(range(shape.shortest, shape.longest + 1))
    assert shape.prompt + shape.longest <= shape.model.block_size
    words = list(range(256, shape.model.vocab_size - 1))            # no EOS, no lone byte
    assert {i for row in rows for part in row for i in part} <= set(words)
    assert rows == bench.random_rows(shape, 500, seed=1) != bench.random_rows(shape, 500, seed=2)
    tokenizer = bench.make_tokenizer(shape.model.vocab_size)
    assert tokenizer.eot_token == shape.model.vocab_size - 1
    for ids in (words, words[::-1]):
        assert tokenizer.encode_ordinary(tokenizer.decode(ids)) == ids


def test_every_stage_at_toy_shape(capsys, monkeypatch, tmp_path):
    """The toy model and its rows, a few at a time."""
    monkeypatch.setitem(bench.SHAPES, 'toy', bench.SHAPES['toy']._replace(batch=4))
    path = tmp_path / 'new' / 'bench.json'
    results = bench.main(bench.Config(stage='all', steps=3, device='cpu', json=str(path)))
    out = capsys.readouterr()
    lines = out.out.splitlines()
    assert lines[0].startswith('device cpu, float32') and len(lines) == 1 + 2 * 5
    for result, stage, about, last in zip(results, ['sft', 'rm', 'ppo', 'dpo', 'generate'],
                                          lines[1::2], lines[2::2], strict=True):
        step, unit = ('token', 'GB/s') if stage == 'generate' else ('step', 'GFLOP/s')
        assert re.fullmatch(rf'{stage} toy: \d+\.\d\d ms per {step}, \d+% of \d+\.\d {unit}, '
                            r'peak memory \d+ MB.*', about)
        assert re.fullmatch(rf'{stage} toy: ' + (r'\d+\.\d\d episodes/s' if stage == 'ppo' else
                                                 r'\d+ tokens/s'), last)
        assert result['stage'] == stage
        assert 0 < result['share'] < 2                  # of a busy machine: not a bound to rely on
    assert 'step      3/3' in out.err                   # the script's own loop has run
    assert json.loads(path.read_text()) == results


@pytest.fixture
def fake_script(monkeypatch):
    """fake_script(stage, log) -> the Configs it is called with, in a list; products at 1
    GFLOP/s."""
    monkeypatch.setitem(bench.SHAPES, 'tiny', TINY)
    monkeypatch.setattr(bench, 'product_rate', lambda *arguments: 1e9)

    def fake(stage, log):
        asked = []

        def main(cfg):
            asked.append(cfg)
            Path(cfg.out).mkdir(parents=True)
            write_jsonl(Path(cfg.out) / 'log.jsonl', log)
        monkeypatch.setitem(bench.SCRIPTS, stage, SimpleNamespace(
            main=main, Config=bench.SCRIPTS[stage].Config))
        return asked
    return fake


def test_what_ppo_is_asked_to_do(fake_script):
    """PPO's sizes are the peers': twice the batch of episodes, 4 epochs of 2 minibatches, up to the
    longest length. What is asked of the bench reaches the script. Here 8 episodes take 0.5 s."""
    asked = fake_script('ppo', [{'ms': 500.0, 'tok_per_s': 80.0}] * 7 + [{'eval_score': 0.0}])
    result, = bench.main(bench.Config(stage='ppo', shape='tiny', steps=7, seed=3, device='cpu',
                                      dtype='bfloat16', compile=True))
    assert (result['rate'], result['ms']) == (pytest.approx(16), 500)
    assert result['done'] == pytest.approx(16 * bench.row_work('ppo', TINY, None)[3])
    (cfg,) = asked
    assert (cfg.steps, cfg.seed, cfg.device, cfg.dtype, cfg.compile) == (7, 3, 'cpu', 'bfloat16',
                                                                         True)
    assert (cfg.rollout_size, cfg.batch_size, cfg.ppo_epochs) == (8, 4, 4)
    assert (cfg.max_new_tokens, cfg.micro_batch_size) == (TINY.longest, 0)


def test_the_rate_is_of_the_median_step_after_two(fake_script):
    """Steps of 9, 9, 1, 2 and 4 s: the median of the last three rates, whatever came before; the
    log's tokens must add up to those of the rows."""
    rows = bench.random_rows(TINY, 20, seed=0)
    counts = [sum(len(prompt) + len(chosen) + 1 for prompt, chosen, _ in rows[i:i + 4])
              for i in range(0, 20, 4)]
    log = [{'ms': 1e3 * seconds, 'tok_per_s': n / seconds}
           for n, seconds in zip(counts, (9, 9, 1, 2, 4))]
    cfg = bench.Config(stage='sft', shape='tiny', steps=5, device='cpu')
    fake_script('sft', log)
    result, = bench.main(cfg)
    assert (result['ms'], result['rate']) == (2000, counts[3] / 2)
    assert result['done'] == pytest.approx(
        counts[3] / 2 * sum(bench.row_work('sft', TINY, row)[3] for row in rows) / sum(counts))
    fake_script('sft', log[1:])
    with pytest.raises(AssertionError, match='add up'):
        bench.main(cfg)


def test_the_samplers_work_by_hand(monkeypatch):
    """Blocks and head once a token; keys and values of 3 to 7 places, for eight rows."""
    monkeypatch.setitem(bench.SHAPES, 'tiny', TINY)
    monkeypatch.setattr(bench, 'time_calls', lambda function, *_: [function(), 2.0][1:])
    weights = 2 * (8 * 24 + 8 * 8 + 8 * 32 + 32 * 8)
    cache = [2 * 8 * 2 * 8 * places for places in range(3, 8)]  # layers, rows, k and v, channels
    for dtype, width in (('float32', 4), ('bfloat16', 2)):
        result, = bench.main(bench.Config(stage='generate', shape='tiny', device='cpu',
                                          dtype=dtype))
        size = width * (weights + sum(cache) / 5) + 4 * 300 * 8
        assert (result['rate'], result['ms']) == (8 * 5 / 2, 2000 / 5)
        assert (result['done'], result['bound']) == (pytest.approx(size * 5 / 2), size / 2)


@pytest.mark.parametrize('wrong, told', [
    (dict(stage='grpo'), '^--stage=grpo: one of sft, rm, ppo, dpo, generate, all$'),
    (dict(shape='large'), '^--shape=large: one of toy, small, gpt2$'),
    (dict(steps=2), '^--steps=2: the first 2 are warm-ups, so at least 3$'),
    (dict(against='true'), 'name it with --stage'),
    (dict(stage='sft', against='true', rounds=0), '--rounds is 1 or more')])
def test_errors_name_the_choices(wrong, told):
    with pytest.raises(UserError, match=told):
        bench.main(bench.Config(**wrong))


def test_forward_flops_by_hand_and_as_torch_counts_them():
    """2 blocks, 8 wide, 300 words, 5 tokens of which 2 meet the vocabulary; and all matrix products
    of a real model. torch counts a causal attention whole, so it is left out there."""
    block = 2 * 5 * (8 * 24 + 8 * 8 + 8 * 32 + 32 * 8)          # a multiplication and an addition
    attention = sum(2 * 8 * (t + 1) * 2 for t in range(5))      # q k' and the mean of v
    assert (block, attention) == (7680, 480)
    assert bench.forward_flops(TINY.model, 5, 2) == 2 * (7680 + 480) + 2 * 2 * 8 * 300

    from torch.utils.flop_counter import FlopCounterMode
    policy, tokens = tiny_gpt(), torch.zeros(1, 6, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        policy.logits(policy(tokens)[:, :4]).sum().backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()['Global'].items()}
    products = sum(n for op, n in counts.items() if 'mm' in op)
    assert products == 3 * (bench.forward_flops(policy.config, 6, 4) - 2 * 2 * 16 * 6 * 7)


def test_row_work_by_hand():
    """Tokens logged, inputs, tokens for the head, flops; responses of 5 and 2 tokens with EOS."""
    row = ([1] * 3, [1] * 4, [1] * 1)

    def forward(*sizes):
        return bench.forward_flops(TINY.model, *sizes)
    assert bench.row_work('sft', TINY, row) == (8, 7, 5, 3 * forward(7, 5))
    assert bench.row_work('dpo', TINY, row) == (13, 11, 7, 3 * (forward(7, 5) + forward(4, 2)))
    assert bench.row_work('rm', TINY, row) == (13, 13, 0, 3 * (forward(8) + forward(5)))
    # 3 + 5 tokens: sampled, two logprobs, values, scores; four epochs of policy and value model
    assert bench.row_work('ppo', TINY, row) == (5, 7, 5, 3 * forward(7, 5) + forward(7) + forward(8)
                                                + 4 * 3 * (forward(7, 5) + forward(7)))


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


def test_held_bytes_are_those_of_the_tensors():
    """SFT and DPO train one model, PPO two and holds three more; autocast copies the matrices."""
    (policy, matrices), (scalar, more) = bytes_of(tiny_gpt()), bytes_of(tiny_scalar())
    config = tiny_gpt().config
    held = {method: numbers[0] for method, numbers in memory(config).items()}
    head = 12 * prefgpt.LOGITS_AT_ONCE + 16 * config.vocab_size * config.n_embd
    assert held['SFT'] == held['DPO'] == policy + 2 * matrices + head
    assert held['PPO'] == (policy + scalar + 2 * (matrices + more) + (2 * policy + scalar) // 4
                           + head)


def test_row_bytes_are_what_autograd_keeps():
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
        with torch.autocast('cpu', torch.bfloat16):
            hidden = policy(torch.zeros(1, 24, dtype=torch.long))
        hidden = hidden[torch.ones(1, 24, dtype=torch.bool)]
    last = hidden.numel() * 4                           # what the head reads
    config = replace(policy.config, block_size=24)      # all of which a row fills
    assert sum(kept.values()) + last == memory(config)['SFT'][1]


def test_the_table(capsys):
    """Every cell: so many rows fit, and one more does not."""
    results = bench.main(bench.Config(memory=True))
    lines = capsys.readouterr().out.splitlines()
    for row, line in zip(results, lines[1:], strict=True):
        cells = line.split()
        assert cells[:2] == [row['model'], row['method']]
        for size, cell in zip((8, 16, 24, 80), cells[-4:], strict=True):
            n = int(cell.replace('-', '0'))
            assert n == 0 or row['held'] + n * row['row'] <= size * 2 ** 30
            assert row['held'] + (n + 1) * row['row'] > size * 2 ** 30
    sft, ppo, dpo = results[:3]                         # GPT-2 124M
    assert dpo['row'] == 2 * ppo['row'] == 2 * sft['row']
    assert ppo['cache'] == 12 * 2 * 1024 * 768 * 2


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
    failed = python("print('1 tokens/s'); raise SystemExit(3)")
    others = python("print('27,350 tokens/s 1.5e+04 tokens/s 24.5 episodes/s')")
    for wrong, told in ((failed, 'status 3, last rate 1 '), (others, 'status 0, last rate 0 '),
                        ('no-such-program', 'status 127')):
        with pytest.raises(UserError, match=told):
            bench.rate_of(wrong, 'tokens')
