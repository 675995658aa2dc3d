"""
What only a GPU can show: kernels, bfloat16, CUDA graphs, memory. The rest of the suite runs on the
CPU also where there is a GPU (conftest.py), so call this file alone:

    python -m pytest -q -s tests/test_cuda.py

Skipped without a GPU; PREFGPT_DEVICE=cpu runs what makes sense on a CPU. Bounds are about three
times what an H100 and an H200 showed.
"""
import math, os, subprocess, sys, time, warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import prefgpt, train_dpo, train_ppo, train_rm, train_sft
from conftest import read_log, tiny_gpt
from prefgpt import (GPT, GPTConfig, draw, generate, load_checkpoint, make_batch, set_up,
                     token_logprobs)
from tools.memory import memory

DEVICE = os.environ.get('PREFGPT_DEVICE', 'cuda')
pytestmark = pytest.mark.skipif(DEVICE == 'cuda' and not torch.cuda.is_available(),
                                reason='no CUDA GPU')
gpu_only = pytest.mark.skipif(DEVICE != 'cuda', reason='needs a GPU')
ROOT = Path(__file__).parent.parent


def bfloat16():
    return torch.autocast(DEVICE, torch.bfloat16)


@pytest.fixture(autouse=True)
def as_in_a_run():
    """Sets what every run sets."""
    set_up(train_sft.Config(device=DEVICE))


def model_and_rows(V=4099, n=12):
    """Returns one GPT with peaked logits, on the CPU and on the device, and ragged rows of ids."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, V, 4, 4, 256, 0.06))     # V is odd, as GPT-2's
    generator = torch.Generator().manual_seed(0)
    rows = [tuple(torch.randint(V, (length,), generator=generator).tolist()
                  for length in (1 + 7 * i % 40, 2 + 11 * i % 78)) for i in range(n)]
    copy = GPT(model.config)
    copy.load_state_dict(model.state_dict())
    return model, copy.to(DEVICE), rows


def sample(model, prompts, new, temperature=1.0, eos=-1):
    return generate(model, prompts, new, eos, temperature, torch.Generator().manual_seed(3))


@pytest.mark.parametrize('low, worst, cosine', [(False, 2e-2, 0.999), (True, 0.6, 0.99)])
def test_logprobs_and_gradients_are_the_cpus(low, worst, cosine):
    """The CPU's full float32 against TF32 and bfloat16: logprobs, and the gradient's direction."""
    cpu, gpu, rows = model_and_rows()
    out = []
    for model, device, enabled in ((cpu, 'cpu', False), (gpu, DEVICE, low)):
        _, x, y, mask = make_batch(rows, device)
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            logprobs = token_logprobs(model, x, y, mask)
        (-logprobs.sum() / mask.sum()).backward()
        out.append((logprobs.detach().float().cpu(),
                    torch.cat([p.grad.flatten().cpu() for p in model.parameters()])))
    (a, gradient_a), (b, gradient_b) = out
    print('logprobs differ by', (a - b).abs().max().item(), 'cosine of the gradients',
          F.cosine_similarity(gradient_a, gradient_b, 0).item())
    assert (a - b).abs().max() < worst and (a - b)[a != 0].abs().mean() < worst / 10
    assert F.cosine_similarity(gradient_a, gradient_b, 0) > cosine


def test_blocks_of_logits_are_one_piece(monkeypatch):
    """Blocks that are computed again in the backward pass, under autocast: values and gradients."""
    _, model, rows = model_and_rows()
    _, x, y, mask = make_batch(rows, DEVICE)
    out = []
    for at_once in (2 ** 25, 4099 * 7):
        monkeypatch.setattr(prefgpt, 'LOGITS_AT_ONCE', at_once)
        model.zero_grad()
        with bfloat16():
            logprobs = token_logprobs(model, x, y, mask)
        logprobs.sum().backward()
        out.append((logprobs.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(out[0][0], out[1][0], rtol=0, atol=1e-3)
    for a, b in zip(out[0][1], out[1][1]):
        assert (a - b).norm() <= 2e-2 * a.norm()


@torch.no_grad()
def test_greedy_text_is_what_the_full_forward_pass_prefers():
    """I4 in bfloat16: each token drawn from the cache is near the best of a forward pass."""
    _, model, rows = model_and_rows()
    with bfloat16():
        assert model.empty_cache(2, 8).dtype == torch.bfloat16
        tokens, mask = sample(model, [prompt for prompt, _ in rows], 24, temperature=0)
        logits = model.logits(model(tokens[:, :-1]))                        # (B, T, V)
    drawn = logits.gather(2, tokens[:, 1:, None])[..., 0]
    worst = (logits.amax(2) - drawn)[mask].max().item()
    print('a drawn logit is below the best by', worst, 'of', logits.abs().max().item())
    assert worst < 0.05 * logits.abs().max()


@torch.no_grad()
@pytest.mark.parametrize('temperature', [0, 1.0])
def test_text_is_the_cpus(temperature):
    """I14 in full float32: the CPU's text, ragged prompts, EOS on the way, more than 16 tokens."""
    torch.set_float32_matmul_precision('highest')
    prompts = [[3, 1, 4, 1, 5], [2], [16, 0, 3], [7, 16], [0, 0, 0, 0, 0, 0, 9]] * 8
    (a, _), (b, _) = (sample(tiny_gpt(seed=4).to(device), prompts, 24, temperature, eos=16)
                      for device in ('cpu', DEVICE))
    same = sum(x == y for x, y in zip(a.tolist(), b.tolist()))
    print(same, 'of', len(prompts), 'rows are alike')
    assert same >= 0.95 * len(prompts)      # a u at the very edge of a token may fall beyond it


@torch.no_grad()
def test_junk_in_the_cache_is_never_read(monkeypatch):
    """I5 in bfloat16: whatever is in slots not yet written."""
    _, model, rows = model_and_rows()
    prompts, empty = [prompt for prompt, _ in rows], model.empty_cache
    with bfloat16():
        before, _ = sample(model, prompts, 20)
        monkeypatch.setattr(model, 'empty_cache', lambda B, S: 50 * torch.randn_like(empty(B, S)))
        after, _ = sample(model, prompts, 20)
    assert torch.equal(before, after)


def test_draw_is_the_cpus():
    """I14 with 50,257 ids: sums in another order move few draws."""
    logits = 2.5 * torch.randn(1280, 50257, generator=torch.Generator().manual_seed(0))
    u = torch.rand(1280, generator=torch.Generator().manual_seed(1))
    differ = (draw(logits, u, 1.0) != draw(logits.to(DEVICE), u.to(DEVICE), 1.0).cpu()).sum().item()
    print(differ, 'of 1280 draws differ')
    assert differ <= 12


@gpu_only
@pytest.mark.parametrize('decode', [False, True])
def test_attention_kernels(decode):
    """Neither cuDNN, which plans anew for every shape, nor the unfused product."""
    _, model, rows = model_and_rows()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile, \
            torch.no_grad(), bfloat16():
        if decode:
            sample(model, [prompt for prompt, _ in rows], 4)
        else:
            model(make_batch(rows, DEVICE)[1])
    names = [event.key.lower() for event in profile.key_averages()]
    fused = [name for name in names if 'flash' in name or 'fmha' in name]
    print(*fused, sep='\n')
    assert fused and not any('cudnn' in name for name in names)


@gpu_only
def test_new_shapes_are_as_quick_as_old_ones():
    """40 lengths never seen take at most three times as long as 40 times the same one."""
    _, model, _ = model_and_rows()

    def seconds(lengths):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for T in lengths:
            with bfloat16():
                model(torch.zeros(8, T, dtype=torch.long, device=DEVICE)).sum().backward()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    seconds([64, 65])
    old, new = seconds([64] * 40), seconds(range(100, 140))
    print(f'40 steps of one shape {old:.2f} s, of 40 new ones {new:.2f} s')
    assert new < 3 * old + 0.2


def train(module, out, **flags):
    """Runs a script in bfloat16; returns its log of steps and its checkpoint."""
    module.main(module.Config(out=str(out), device=DEVICE, dtype='bfloat16', **flags))
    return read_log(out, 'norm'), load_checkpoint(out, [out.name])


def test_four_stages_in_bfloat16(shared_data, tmp_path):
    """
    I13, I1: DPO begins at ln 2 and PPO at ratio 1, as near as bfloat16 comes. I22: a run that was
    stopped ends near one that was not (attention's backward pass adds in no fixed order).
    """
    data, init = dict(data=str(shared_data)), dict(init=str(tmp_path / 'sft'))
    log, _ = train(train_sft, tmp_path / 'sft', n_layer=2, n_head=2, n_embd=64, block_size=32,
                   steps=150, warmup=10, lr=1e-2, max_new_tokens=8, eval_every=150, **data)
    assert log[-1]['loss'] < 0.7 * log[0]['loss']
    log, _ = train(train_rm, tmp_path / 'rm', steps=120, warmup=20, lr=2e-3, eval_every=120, **data,
                   **init)
    assert read_log(tmp_path / 'rm', 'eval_accuracy')[-1]['eval_accuracy'] > 0.9
    log, _ = train(train_dpo, tmp_path / 'dpo', steps=30, eval_every=30, lr=1e-3, **data, **init)
    print('DPO loses', log[0]['loss'], 'at first and', log[-1]['loss'], 'at last')
    assert abs(log[0]['loss'] - math.log(2)) < 5e-3 and log[-1]['loss'] < log[0]['loss']
    ppo = dict(reward=str(tmp_path / 'rm'), rollout_size=32, batch_size=16, max_new_tokens=8,
               steps=6, eval_every=3, **data, **init)
    log, saved = train(train_ppo, tmp_path / 'ppo', **ppo)
    print('PPO ratios', [row['ratio'] for row in log], 'kl', [row['kl'] for row in log])
    assert all(abs(row['ratio'] - 1) < 0.1 for row in log) and abs(log[0]['kl']) < 0.05
    (tmp_path / 'ppo' / 'ckpt.prev.pt').replace(tmp_path / 'ppo' / 'ckpt.pt')      # as after step 3
    again, resumed = train(train_ppo, tmp_path / 'ppo', resume=True, **ppo)
    assert [row['step'] for row in again] == [row['step'] for row in log]
    for name, p in saved['weights']['policy'].items():
        assert (p - resumed['weights']['policy'][name]).norm() <= 0.05 * p.norm() + 1e-3, name


@gpu_only
def test_memory_is_what_bench_computes():
    """A row of 1,024 tokens, 12 blocks: what the forward pass keeps, within a quarter."""
    config = GPTConfig(vocab_size=512)
    model = GPT(config).to(DEVICE)
    x = torch.zeros(4, 1024, dtype=torch.long, device=DEVICE)
    with bfloat16():
        model(x).sum().backward()       # autocast's copies and cuBLAS's workspace are there
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        hidden = model(x)
        kept = (torch.cuda.memory_allocated() - before) / 4
    computed = memory(config)['SFT'][1]
    print(f'a row keeps {kept / 2 ** 20:.0f} MB, computed {computed / 2 ** 20:.0f}; {hidden.shape}')
    assert kept == pytest.approx(computed, rel=0.25)


@gpu_only
def test_out_of_memory_is_one_line():
    """A GPU that is full: exit status 1 and one line that names --micro_batch_size."""
    code = ('import sys, torch; torch.cuda.set_per_process_memory_fraction(0.01); '
            'sys.argv = ["bench", "--stage=sft", "--shape=gpt2", "--steps=3"]; '
            'from prefgpt import run_cli; from tools import bench; '
            'run_cli(bench.main, bench.Config)')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                          cwd=ROOT)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith('error: out of memory')
    assert '--micro_batch_size' in done.stderr and 'Traceback' not in done.stderr


@gpu_only
@pytest.mark.parametrize('stage, most', [('sft', 12), ('ppo', 200)])
def test_how_often_a_step_waits(shared_data, tmp_path, stage, most):
    """Counts the waits for the GPU per step: a .item() too many in a loop is slow everywhere."""
    model = dict(data=str(shared_data), device=DEVICE, max_new_tokens=8, eval_every=99)
    sft = dict(n_layer=2, n_head=2, n_embd=64, block_size=32, **model)
    train_sft.main(train_sft.Config(out=str(tmp_path / 'init'), steps=1, **sft))
    ppo = dict(init=str(tmp_path / 'init'), reward=str(tmp_path / 'rm'), **model)
    train_rm.main(train_rm.Config(init=ppo['init'], out=ppo['reward'], steps=1, device=DEVICE,
                                  data=model['data']))
    counts = []
    for steps in (4, 14):
        flags = dict(steps=steps, out=str(tmp_path / f'{steps}'))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            torch.cuda.set_sync_debug_mode('warn')
            if stage == 'sft':
                train_sft.main(train_sft.Config(**flags, **sft))
            else:
                train_ppo.main(train_ppo.Config(**flags, **ppo))
            torch.cuda.set_sync_debug_mode('default')
        counts.append(sum('synchroniz' in str(warning.message) for warning in seen))
    print(stage, 'waits per step:', (counts[1] - counts[0]) / 10)
    assert (counts[1] - counts[0]) / 10 <= most
