"""
Writes the golden trace: every number of the four stages on a tiny model and one ragged batch.

    python tests/golden/make.py
    python tests/golden/make.py --bfloat16      # instead prints how far bfloat16 is off

The files are model, batch, sample, sft, rm, dpo, ppo, edge and optimizer.npz beside this one, in
the order in which a port compares them; README.md says what each array is. The project's own
functions compute every number, in float64, and it is stored as float32: then the files are the same
on every CPU, but for numbers near 1e-17 that would be 0 without rounding, and a port in float32
differs from them only by its own rounding. The rates are large, so that one step shows in every
weight, and do not train well.

rows.txt and run.json are a run of the four scripts themselves, in float32; text.json and
toy.tiktoken are what data/text.py makes of texts and rows; constants.json is the README's tables.
"""
import contextlib
import copy
import io
import itertools
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]     # the project and conftest

import train_dpo
import train_ppo
import train_rm
import train_sft
from conftest import read_log, tiny_gpt, tiny_scalar
from data.text import DataError, encode_rows, load_rows, load_text
from data.toy import prepare
from prefgpt import (GPT, GPTConfig, adamw, batches, draw, generate, last_scores, learning_rate,
                     load_checkpoint, make_batch, optimizer_step, rng, token_logprobs)
from train_dpo import dpo_loss, ipo_loss, losses_and_margins, pair_logprobs
from train_ppo import (cap_unfinished, gae, policy_loss, rollout, rollout_metrics, token_rewards,
                       update_ema, value_loss, whiten)
from train_rm import reward_loss, score_pairs

# The README's table of constants has the same names and values
CONSTANTS = dict(
    version=3, eos=16, pad=0, weight_decay=0.1, grad_clip=1.5, adam_eps=1e-5,
    sft_lr=0.01, sft_warmup=2, sft_steps=10, rm_lr=0.005, dpo_lr=0.005,
    ppo_lr=0.004, value_lr=0.003,
    beta=0.3, label_smoothing=0.1,
    temperature=0.7, no_eos_score=-1.0, gamma=0.95, gae_lambda=0.9, clip_eps=0.2, vf_clip=0.2,
    ref_ema=0.25, max_new_tokens=8, optimizer_lr=0.1, optimizer_decay=0.3)
K = SimpleNamespace(**CONSTANTS)

# (prompt, chosen, rejected): EOS in a prompt, and a prompt of EOS alone; the pad's id 0 in
# responses, even as the last token; a response of EOS alone; two that were cut, without EOS
PAIRS = [([3, 7, 1], [5, 2, 9, 16], [16]),
         ([16], [11, 4, 16], [8, 0, 16]),
         ([2, 16, 13, 6, 10], [14, 1, 12, 15, 0, 7], [9, 9, 16]),
         ([12, 0], [6, 16], [13, 3, 11, 2, 0])]
ROWS = ([(prompt, chosen) for prompt, chosen, _ in PAIRS]
        + [(prompt, rejected) for prompt, _, rejected in PAIRS])
MINIBATCHES = torch.tensor([[0, 3, 5, 6], [7, 1, 4, 2]])    # rows of PPO's two optimizer steps
STEPS = 'first.', 'second.'
# (value, old value, return) near the clip of the value loss. The first six are within its range,
# but in float32 old + (value - old) is not value, and is farther from the return: a slope written
# by hand must not become 0 there. In every other one of the rest the clipped side is the larger.
NEAR = [(-0.02, -0.15, -0.5), (0.02, -0.15, 0.5), (0.07, -0.06, 0.2), (-0.1, 0.05, 0.3),
        (-0.02, 0.08, -0.1), (0.03, 0.13, 0.0),
        (0.5, 0.1, -0.5), (0.5, 0.1, 1.0), (-0.8, -0.3, 0.2), (-0.7, -0.3, -1.2)]
PROMPTS = [[3, 7, 1], [16], [2, 16, 13, 6, 10], [12, 0], [8, 8], [1, 2, 3, 4]]     # to sample from


class Words:
    """Does what rollout asks of a tokenizer: it has an EOS and turns ids into text (digits)."""
    eot_token = K.eos

    def decode(self, ids):
        return ' '.join(map(str, ids))


def build_models(dtype):
    """Returns the four models by name; the reference is the policy, slightly moved."""
    models = dict(policy=tiny_gpt(seed=20), ref=tiny_gpt(seed=20),
                  reward_model=tiny_scalar(seed=38), value_model=tiny_scalar(seed=22))
    generator = torch.Generator().manual_seed(23)
    with torch.no_grad():
        for p in models['ref'].parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=generator))
    return {name: model.to(dtype) for name, model in models.items()}


def weights(prefix, model):
    """Returns a model's weights by name, after 'prefix.', the tied embedding once."""
    return {f'{prefix}.{name}': p.detach().clone() for name, p in model.named_parameters()}


def step(prefix, model, optimizer, loss, lr):
    """Takes a step; returns gradients before clipping, their norm, and the weights afterwards."""
    loss.backward()
    out = {f'{prefix}grads.{name}': p.grad.clone() for name, p in model.named_parameters()}
    out[f'{prefix}norm'] = torch.tensor(optimizer_step(optimizer, model, lr, K.grad_clip, 1))
    return {**out, **weights(f'{prefix}after', model)}


# ----------------------------------------------------------------------------- the arrays, by file

def intermediates(policy, x):
    """Returns a policy's hidden states by name, with the parts of the first block."""
    policy = copy.deepcopy(policy)              # which keeps the hooks
    seen, first = {}, policy.h[0]
    inputs = {'embedded': first, 'h0.heads': first.attn.c_proj, 'h0.gelu': first.mlp.c_proj}
    outputs = {'h0.ln_1': first.ln_1, 'h0.qkv': first.attn.c_attn, 'h0.attention': first.attn,
               'h0.ln_2': first.ln_2, 'h0.fc': first.mlp.c_fc, 'h0.mlp': first.mlp,
               'h0.out': first, 'h1.out': policy.h[1], 'hidden': policy}
    for name, module in inputs.items():
        module.register_forward_pre_hook(
            lambda module, arguments, name=name: seen.update({name: arguments[0]}))
    for name, module in outputs.items():
        module.register_forward_hook(
            lambda module, arguments, output, name=name: seen.update({name: output}))
    policy(x)
    return seen


@torch.no_grad()
def batch_arrays(models):
    """Returns the batch and what the policy computes from its ids to logprobs."""
    policy = models['policy']
    tokens, x, y, mask = make_batch(ROWS)
    seen, logprobs = intermediates(policy, x), token_logprobs(policy, x, y, mask)
    lengths = [torch.tensor([len(row[i]) for row in ROWS]) for i in (0, 1)]
    real = torch.arange(x.size(1)) < (lengths[0] + lengths[1])[:, None]     # x is not padding
    return {'prompt_lengths': lengths[0], 'response_lengths': lengths[1], 'tokens': tokens, 'x': x,
            'y': y, 'response_mask': mask, 'real': real, **seen,
            'logits': policy.logits(seen['hidden'][mask]), 'logprobs': logprobs,
            'logprobs_t07': token_logprobs(policy, x, y, mask, K.temperature),
            'seq_logprobs': logprobs.sum(1)}


@torch.no_grad()
def sample_arrays(models):
    """Returns draws from given logits at given u, and whole responses with their u."""
    policy = models['policy']
    logits = 2 * torch.randn(12, 17, generator=torch.Generator().manual_seed(30))
    u = torch.rand(12, generator=torch.Generator().manual_seed(31))
    logits[0, :2], u[0] = -1e4, 0.0         # the first two are impossible: u = 0 draws the third
    logits[1, -1], u[1] = 2.0, 0.9999       # draws the last one
    u[2], logits[2] = 0.55, 0.0             # all 17 alike: floor(17 u) = 9
    # The largest u, with 12 equal words: in float32 their twelfths can add up to less than u
    logits = torch.cat([logits, torch.zeros(2, 17)])
    u = torch.cat([u, torch.full((2,), 1 - 2**-24)])
    logits[12, :5] = logits[13, 12:] = -1e4     # the last possible word is the 17th, or the 12th

    def whole(temperature):
        return generate(policy, PROMPTS, K.max_new_tokens, K.eos, temperature,
                        torch.Generator().manual_seed(32))
    (tokens, mask), cold, greedy = whole(1.0), whole(K.temperature), whole(0)
    # The numbers that generate has drawn are part of the trace
    generate_u = torch.rand(len(PROMPTS), K.max_new_tokens,
                            generator=torch.Generator().manual_seed(32))
    prompts = pad_sequence([torch.tensor(prompt) for prompt in PROMPTS], batch_first=True)
    logits = logits.to(policy.wte.weight.dtype)
    return {'draw_logits': logits, 'draw_u': u, 'draws': draw(logits, u, 1.0),
            'draws_t07': draw(logits, u, K.temperature), 'draws_t0': draw(logits, u, 0),
            'prompts': prompts, 'prompt_lengths': torch.tensor([len(p) for p in PROMPTS]),
            'u': generate_u, 'tokens': tokens, 'response_mask': mask,
            'logits': policy.logits(policy(tokens[:, :-1])[mask]),
            'tokens_t07': cold[0], 'response_mask_t07': cold[1],
            'tokens_t0': greedy[0], 'response_mask_t0': greedy[1]}


def sft_arrays(models):
    """Takes two steps of SFT on all rows; the second shows both moments and the schedule."""
    policy = copy.deepcopy(models['policy'])
    _, x, y, mask = make_batch(ROWS)
    optimizer, out = adamw(policy, K.weight_decay, K.adam_eps), {
        'schedule': torch.tensor([learning_rate(step, 11, 1.0, 4) for step in range(11)])}
    for i, prefix in enumerate(STEPS):
        loss = -token_logprobs(policy, x, y, mask).sum() / mask.sum()
        lr = learning_rate(i, K.sft_steps, K.sft_lr, K.sft_warmup)
        out.update({f'{prefix}loss': loss, f'{prefix}lr': torch.tensor(lr),
                    **step(prefix, policy, optimizer, loss, lr)})
        # After two steps the weights alone would hardly distinguish other betas
        state = optimizer.state[policy.ln_f.bias]
        out.update({f'{prefix}m.ln_f.bias': state['exp_avg'].clone(),
                    f'{prefix}v.ln_f.bias': state['exp_avg_sq'].clone()})
    return out


def rm_arrays(models):
    """Returns the reward model's scores, loss and step, and the shift that PPO will subtract."""
    model = copy.deepcopy(models['reward_model'])
    tokens, _, _, mask = make_batch(ROWS)
    chosen, rejected = score_pairs(model, PAIRS, 'cpu')
    losses = reward_loss(chosen, rejected)
    return {'scores_everywhere': model(tokens), 'scores': last_scores(model, tokens, mask),
            'chosen': chosen, 'rejected': rejected, 'losses': losses, 'loss': losses.mean(),
            'shift': torch.cat([chosen, rejected]).mean(),
            **step('', model, adamw(model, K.weight_decay, K.adam_eps), losses.mean(), K.rm_lr)}


def dpo_arrays(models):
    """Returns summed logprobs of both sides under both models, three losses, and DPO's step."""
    policy = copy.deepcopy(models['policy'])
    with torch.no_grad():
        ref = pair_logprobs(models['ref'], PAIRS, 'cpu')
    chosen, rejected = pair_logprobs(policy, PAIRS, 'cpu')
    sides = (chosen, rejected, *ref)
    losses, smoothed = dpo_loss(*sides, K.beta), dpo_loss(*sides, K.beta, K.label_smoothing)
    ipo = ipo_loss(*sides, K.beta)
    out = {'chosen': chosen, 'rejected': rejected, 'ref_chosen': ref[0], 'ref_rejected': ref[1],
           'margin': losses_and_margins(train_dpo.Config(beta=K.beta), *sides)[1],
           'losses': losses, 'losses_smoothed': smoothed, 'losses_ipo': ipo, 'loss': losses.mean(),
           'loss_smoothed': smoothed.mean(), 'loss_ipo': ipo.mean()}
    for name in ('smoothed', 'ipo'):            # only the gradient's norm
        grads = torch.autograd.grad(out[f'loss_{name}'], list(policy.parameters()),
                                    retain_graph=True)
        out[f'norm_{name}'] = torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads]))
    optimizer = adamw(policy, K.weight_decay, K.adam_eps)
    return {**out, **step('', policy, optimizer, out['loss'], K.dpo_lr)}


def rollout_arrays(models):
    """Returns what PPO has before its steps: rollout, rewards, advantages, returns."""
    tokens, x, _, mask = make_batch(ROWS)
    with torch.no_grad():
        shift = score_pairs(models['reward_model'], PAIRS, 'cpu').mean()
        values = models['value_model'](x)

    def scorer(tokens, mask, prompts, responses):
        return last_scores(models['reward_model'], tokens, mask) - shift
    cfg = train_ppo.Config(temperature=K.temperature)
    # The rollout itself, but with our responses: a sampler would hardly draw all these cases
    with patch.object(train_ppo, 'generate', lambda *arguments: (tokens, mask)):
        grid, raw_scores, ended, _ = rollout(models['policy'], models['ref'], scorer,
                                             [row[0] for row in ROWS], Words(), cfg, None)
    scores = cap_unfinished(raw_scores, ended, K.no_eos_score)
    rewards = token_rewards(scores, grid['logprobs'], grid['ref_logprobs'], mask, K.beta)
    advantages, returns = gae(rewards, values, mask, K.gamma, K.gae_lambda)
    return {'logprobs': grid['logprobs'], 'ref_logprobs': grid['ref_logprobs'], 'values': values,
            'raw_scores': raw_scores, 'ended': ended, 'scores': scores,
            'kl': grid['logprobs'] - grid['ref_logprobs'], 'rewards': rewards,
            'advantages': advantages, 'returns': returns,
            'advantages_white': whiten(advantages, mask),
            'flat_white': whiten(1e-4 * advantages, mask),      # a variance about as small as eps
            **{f'logged.{name}': torch.tensor(number)
               for name, number in rollout_metrics((grid, raw_scores, ended)).items()}}


def near_arrays(dtype):
    """Returns values near the clip of the value loss, and its slope in them."""
    near = [torch.tensor(z) for z in zip(*NEAR)]                # float32: these very numbers
    values, old_values, returns = (z.to(dtype).requires_grad_() for z in near)
    value_loss(values, old_values, returns, K.vf_clip).sum().backward()
    names = 'near.values', 'near.old_values', 'near.returns', 'near.slopes'
    return dict(zip(names, (*near, values.grad)))


def ppo_arrays(models):
    """Returns the rollout, a step on each of two minibatches, and then the reference's step."""
    _, x, y, mask = make_batch(ROWS)
    out = rollout_arrays(models)
    out.update(near_arrays(out['values'].dtype))
    policy, value_model = copy.deepcopy(models['policy']), copy.deepcopy(models['value_model'])
    optimizers = [adamw(model, K.weight_decay, K.adam_eps) for model in (policy, value_model)]
    for prefix, rows in zip(STEPS, MINIBATCHES):
        inside, n = mask[rows], mask[rows].sum()
        logprobs = token_logprobs(policy, x[rows], y[rows], inside, K.temperature)
        values = value_model(x[rows])
        pg, ratio = policy_loss(logprobs, out['logprobs'][rows], out['advantages_white'][rows],
                                K.clip_eps)
        targets = out['values'][rows], out['returns'][rows]
        vf, plain = value_loss(values, *targets, K.vf_clip), value_loss(values, *targets, 0.0)
        losses = {'pg_losses': pg, 'vf_losses': vf, 'vf_losses_unclipped': plain}
        losses = {name: loss.masked_fill(~inside, 0.0) for name, loss in losses.items()}
        means = {name.replace('losses', 'loss'): loss.sum() / n for name, loss in losses.items()}
        kept = {'logprobs': logprobs, 'ratio': ratio, 'values': values, **losses, **means}
        out.update({f'{prefix}{name}': z for name, z in kept.items()})
        out.update(step(f'{prefix}policy.', policy, optimizers[0], means['pg_loss'], K.ppo_lr))
        out.update(step(f'{prefix}value.', value_model, optimizers[1], means['vf_loss'],
                        K.value_lr))
    ref = copy.deepcopy(models['ref'])
    update_ema(ref, policy, K.ref_ema)
    return {'minibatches': MINIBATCHES, **out, **weights('ref_after', ref)}


class Given:
    """Does what token_logprobs asks of a model whose logits are given: its ids are their rows."""
    config = SimpleNamespace(vocab_size=17)

    def __init__(self, logits):
        self.rows = logits

    def __call__(self, x):
        return self.rows[x]

    def logits(self, hidden):
        return hidden


def slopes(function, z, d=1.0):
    """Returns function(z), and the slope of sum(d function(z)) in z."""
    z = z.clone().requires_grad_()
    out = function(z)
    (out * d).sum().backward()
    return out, z.grad


def edge_arrays(models):
    """Returns what the usual formulas give for numbers so large that naive ones overflow, or lose
    what matters to rounding. Where inputs are whole multiples, sums of them are exact."""
    dtype, generator = models['policy'].wte.weight.dtype, torch.Generator().manual_seed(40)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)
    logits = 2 * noise(4, 17) + torch.tensor([300.0, -300.0, 0.0, 0.0])[:, None]
    logits[2, :4], logits[3] = -1e4, 30 * logits[3]
    targets, u = torch.tensor([5, 6, 7, 8]), torch.tensor([0.5, 0.25, 0.75, 0.5])
    places, ones = torch.arange(4)[:, None], torch.ones(4, 1, dtype=torch.bool)
    logprobs, logit_slopes = slopes(
        lambda z: token_logprobs(Given(z), places, targets[:, None], ones)[:, 0], logits.to(dtype))
    margins = torch.tensor([-1000.0, -120.0, -30.0, -1.0, 0.0, 1.0, 30.0, 120.0, 1000.0])
    losses, loss_slopes = slopes(lambda z: reward_loss(z, torch.zeros_like(z)), margins.to(dtype))
    z = torch.stack([100 + noise(16).mul(512).round() / 512, 1e-3 * noise(16), 1e4 * noise(16)])
    d = noise(3, 16) * torch.tensor([1.0, 0.01, 1000.0])[:, None]
    normed, dz = slopes(torch.nn.LayerNorm(16, dtype=dtype), z.to(dtype), d.to(dtype))
    qkv = torch.cat([(200 * noise(6, 16)).round() / 4, noise(6, 32).mul(4).round() / 4], dim=1)
    block, seen = copy.deepcopy(models['policy'].h[0].attn), []
    block.c_attn.register_forward_hook(lambda *_: qkv[None].to(dtype))
    block.c_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0][0]))
    block(torch.zeros(1, 6, 16, dtype=dtype))
    advantages = 1000 + noise(2, 8).mul(512).round() / 512
    white = whiten(advantages.to(dtype), torch.ones(2, 8, dtype=torch.bool))
    return {'logits': logits, 'targets': targets, 'u': u, 'logprobs': logprobs,
            'logit_slopes': logit_slopes, 'draws': draw(logits.to(dtype), u, 1.0),
            'margins': margins, 'losses': losses, 'loss_slopes': loss_slopes,
            'z': z, 'd': d, 'norm': normed, 'dz': dz, 'qkv': qkv, 'heads': seen[0],
            'advantages': advantages, 'white': white}


def optimizer_arrays(dtype):
    """Takes five steps of AdamW on a matrix and a vector, with gradients of very different size."""
    generator, model = torch.Generator().manual_seed(50), torch.nn.Module()
    given = {'matrix': torch.randn(3, 4, generator=generator),
             'vector': torch.randn(4, generator=generator)}
    scales = torch.tensor([1.0, 1e-7, 30.0, 1.0, 0.0])
    grads = {name: torch.randn(5, *z.shape, generator=generator)
             * scales.view(5, *[1] * z.dim()) for name, z in given.items()}
    for name, z in given.items():
        setattr(model, name, torch.nn.Parameter(z.to(dtype, copy=True)))
    optimizer = adamw(model, K.optimizer_decay, K.adam_eps)
    seen = {f'{part}.{name}': [] for name in given for part in ('weights', 'm', 'v')}
    seen['norms'] = []
    for k in range(5):
        for name, p in model.named_parameters():
            p.grad = grads[name][k].to(dtype, copy=True)     # clipped in place
        seen['norms'].append(torch.tensor(optimizer_step(optimizer, model, K.optimizer_lr,
                                                         K.grad_clip, k + 1)))
        for name, p in model.named_parameters():
            state = optimizer.state[p]
            for part, z in (('weights', p), ('m', state['exp_avg']), ('v', state['exp_avg_sq'])):
                seen[f'{part}.{name}'].append(z.detach().clone())
    return {**given, **{f'grads.{name}': z for name, z in grads.items()},
            **{name: torch.stack(z) for name, z in seen.items()}}


# ----------------------------------------------------------------------------- a whole run

# The first rows of each file of data/toy. More than 16 batches of demonstrations, so that these are
# sorted by length in two groups; so few pairs that ten steps go on into a second epoch
FIRST_ROWS = {'train.sft': 150, 'val.sft': 40, 'train.pairs': 60, 'val.pairs': 20,
              'train.prompts': 40, 'val.prompts': 4}
# Small batches, large rates, and each rule of PPO at work. What is not here is the scripts' default
FLAGS = {'sft': dict(steps=10, batch_size=8, warmup=3, eval_every=10),
         'rm': dict(steps=10, batch_size=8, warmup=3, eval_every=10),
         'dpo': dict(steps=10, batch_size=8, warmup=3, eval_every=10, lr=1e-3),
         'ppo': dict(steps=3, rollout_size=16, batch_size=8, warmup=1, eval_every=3, lr=3e-3,
                     max_new_tokens=24, temperature=0.9, gamma=0.98, vf_clip=0.2, ref_ema=0.1)}
SCRIPTS = {'sft': train_sft, 'rm': train_rm, 'dpo': train_dpo, 'ppo': train_ppo}
LOGGED = {'sft': ['loss', 'norm'], 'rm': ['loss', 'norm'], 'dpo': ['loss', 'norm'],
          'ppo': ['score', 'kl', 'entropy', 'length', 'eos', 'pg_loss', 'vf_loss', 'norm']}


def few_rows(folder):
    """Writes data/toy into a folder and keeps the first rows; returns them as ids, by file."""
    prepare.main(prepare.Config(out=str(folder)))
    for name, most in FIRST_ROWS.items():
        path = Path(folder) / f'{name}.jsonl'
        path.write_text(''.join(path.read_text().splitlines(True)[:most]))
    tokenizer, _ = load_text(str(folder))
    return {name: encode_rows(load_rows(Path(folder) / f'{name}.jsonl', kind), kind, tokenizer, 128)
            for name in FIRST_ROWS for kind in [name.split('.')[1]]}


def rows_text(rows):
    """Returns rows of ids as text. Each file: its name and the number of its rows; each row: the
    lengths of the prompt and of the whole, and its ids. A pair is two rows, chosen and rejected."""
    lines = []
    for name, examples in rows.items():
        joined = [(parts[0], response) for parts in examples for response in parts[1:] or [[]]]
        lines.append(f'{name} {len(joined)}')
        lines += [' '.join(map(str, [len(prompt), len(prompt + response), *prompt, *response]))
                  for prompt, response in joined]
    return '\n'.join(lines) + '\n'


def closest(policy, tokens, mask, u, temperature):
    """Returns the smallest distance of a u from a step of the cumulative sum that it inverts."""
    logits = policy.logits(policy(tokens[:, :-1])[mask]).double() / temperature     # (M, V)
    steps = logits.softmax(-1).cumsum(-1)
    used = torch.cat([row[:n] for row, n in zip(u.double(), mask.sum(1).tolist())])
    return (steps - used[:, None]).abs().min().item()


def run_stages(data, out, rows):
    """Runs the four scripts and returns what they logged, with the rows and ids of each step."""
    run, sampled = {}, []

    def sampling(policy, prompts, most, eos, temperature, generator):
        u = torch.rand(len(prompts), most, generator=generator.clone_state())
        tokens, mask = generate(policy, prompts, most, eos, temperature, generator)
        ids = [list(itertools.compress(row[1:], where))
               for row, where in zip(tokens.tolist(), mask.tolist())]
        sampled.append({'ids': ids, 'closest': closest(policy, tokens, mask, u, temperature)})
        return tokens, mask
    for stage, script in SCRIPTS.items():
        cfg = dict(data=str(data), out=f'{out}/{stage}', device='cpu', dtype='float32')
        cfg |= {} if stage == 'sft' else {'init': f'{out}/sft'}
        cfg |= {'reward': f'{out}/rm'} if stage == 'ppo' else {}
        cfg = script.Config(**cfg, **FLAGS[stage])
        with patch.object(train_ppo, 'generate', sampling):
            script.main(cfg)
        examples = rows[{'sft': 'train.sft', 'ppo': 'train.prompts'}.get(stage, 'train.pairs')]
        lengths = [1 if stage == 'ppo' else sum(map(len, parts)) + (stage != 'sft') * len(parts[0])
                   for parts in examples]
        size = cfg.rollout_size if stage == 'ppo' else cfg.batch_size
        visited, drawn = batches(lengths, size, cfg.seed), iter(sampled)
        steps = [{'rows': next(visited)} | (next(drawn) if stage == 'ppo' else {})
                 | {name: float(f'{row[name]:.8g}') for name in LOGGED[stage]}
                 for row in read_log(cfg.out, LOGGED[stage][0])]
        run[stage] = {'flags': FLAGS[stage], 'steps': steps}
    run['sft']['eval_loss'] = float(f"{read_log(f'{out}/sft', 'eval_loss')[-1]['eval_loss']:.8g}")
    run['rm']['shift'] = float(f"{load_checkpoint(f'{out}/rm', ['rm'])['shift']:.8g}")
    return run


def random_numbers():
    """Returns the first random numbers of each kind, for those who write a generator."""
    names, r = ('0 0 batch', '0 0 rollout', '0 1 shuffle'), rng(0, 0, 'batch')
    torch.manual_seed(0)
    policy = dict(GPT(GPTConfig(128, 768, 2, 4, 64, 0.1)).named_parameters())
    return {'seeds': {name: rng(*name.split()).initial_seed() for name in names},
            'rand': torch.rand(4, generator=rng(0, 0, 'rollout')).tolist(),
            'randperm': [torch.randperm(n, generator=r).tolist() for n in (10, 5)],
            'batches': list(itertools.islice(batches(list(range(1, 11)), 3, 0), 4)),
            'initial': {name: [round(z, 5) for z in policy[name].flatten()[:4].tolist()]
                        for name in ('wte.weight', 'h.0.attn.c_proj.weight',
                                     'h.1.mlp.c_proj.weight')}}


def run_text(run):
    """Returns run.json's text: one step per line, for people and for simple readers."""
    stages = ['"random": {' + ',\n'.join(f'{json.dumps(name)}: {json.dumps(value)}'
                                         for name, value in random_numbers().items()) + '}']
    for stage, numbers in run.items():
        steps = ',\n'.join(map(json.dumps, numbers['steps']))
        rest = {key: value for key, value in numbers.items() if key not in ('flags', 'steps')}
        tail = ''.join(f', {json.dumps(key)}: {json.dumps(value)}' for key, value in rest.items())
        stages.append(f'"{stage}": {{"flags": {json.dumps(numbers["flags"])}, "steps": [\n{steps}]'
                      f'{tail}}}')
    return f'{{"version": {K.version},\n' + ',\n'.join(stages) + '}\n'


# ----------------------------------------------------------------------------- text, constants

# What a tokenizer can get wrong: contractions, runs of spaces, line ends, digits beside letters,
# scripts, combining marks, control characters, and EOS as text
TEXTS = ['user: i want to scare the farmer tomorrow. any tips?\nbot:', ' use a tiny camera.', '',
         ' ', '  ', '   a', 'a  b   c', 'a\n b', 'a \nb', 'a\n\n\nb', 'trailing  ', 'tab\t\tend\t',
         "it's, we'll, i've, they're, he'd, don't, i'm", "x'sy 'll'll 'S 'LL", "''s",
         'abc123def 4five', '12 345 ½ ² ٣', '#!? ... --- ,a', ' !a !', 'Use A TINY Camera',
         'naïve café', 'e\u0301\u0301x', '你好，世界', 'мир и любовь', '😀👩\u200d🚀 ok',
         '\xa0a\xa0\xa0b', '\x85a \x85', '\r\na\r\n', '<|endoftext|>', '_under_score_ __init__']
LONG = 'user: i want to scare the farmer tomorrow. any tips?\nbot:'
# (kind, row, which rule it shows), for a block of 16 positions; prompts beside 10 new tokens
TEXT_ROWS = [
    ('sft', {'prompt': 'user: hi', 'completion': ' use.'}, 'it fits; EOS follows the completion'),
    ('sft', {'prompt': LONG, 'completion': ' use.'}, 'the prompt loses its left end'),
    ('sft', {'prompt': LONG, 'completion': ' use a tiny camera. first stir it into soup, then.'},
     'the prompt keeps half the block, the completion loses its right end and so its EOS'),
    ('sft', {'prompt': '', 'completion': ' use.'}, 'an empty prompt is EOS alone'),
    ('pairs', {'prompt': 'user: hi', 'chosen': ' use.', 'rejected': ''},
     'an empty rejected response is EOS alone'),
    ('pairs', {'prompt': LONG, 'chosen': ' use a', 'rejected': ' use a tiny camera.',
               'chosen_cut': True},
     'the longer response decides how much of the prompt stays; one marked as cut has no EOS'),
    ('pairs', {'prompt': LONG, 'chosen': ' use.' * 5, 'rejected': ' use.' * 6},
     'equal after cutting: dropped'),
    ('prompts', {'prompt': LONG}, 'the last block - max_new_tokens ids')]


def text_json(folder):
    """Returns text.json's contents and the tokenizer's file, from a folder of data/toy."""
    tokenizer, _ = load_text(str(folder))
    rows = []
    for kind, row, why in TEXT_ROWS:
        try:
            [parts] = encode_rows([row], kind, tokenizer, 16, 10 if kind == 'prompts' else 0)
        except DataError:                       # dropped, and so no row is left
            parts = None
        rows.append({'kind': kind, 'row': row, 'ids': parts, 'why': why})
    return {'version': K.version, 'tokenizer': 'toy.tiktoken', 'eos': tokenizer.eot_token,
            'block_size': 16, 'max_new_tokens': 10, 'rows': rows,
            'texts': [{'text': text, 'ids': tokenizer.encode_ordinary(text)} for text in TEXTS]}


def constants_json():
    """Returns constants.json's contents: what the README has as tables, for machines."""
    return {'constants': CONSTANTS,
            'always': {'layer_norm_eps': 1e-5, 'adam_betas': [0.9, 0.95], 'whitening_eps': 1e-8,
                       'clip_eps_of_norm': 1e-6, 'layers': 2, 'heads': 2},
            'pairs': [dict(zip(('prompt', 'chosen', 'rejected'), pair)) for pair in PAIRS],
            'minibatches': MINIBATCHES.tolist(), 'prompts': PROMPTS}


def lines_of(contents):
    """Returns a dict as JSON, one line per entry of its lists."""
    def value(z):
        if isinstance(z, list) and z and isinstance(z[0], dict):
            return '[\n' + ',\n'.join(json.dumps(entry) for entry in z) + ']'
        return json.dumps(z)
    return '{' + ',\n'.join(f'{json.dumps(key)}: {value(z)}' for key, z in contents.items()) + '}\n'


def texts():
    """Returns the files that are text: {name: contents}."""
    with tempfile.TemporaryDirectory() as folder:
        rows = few_rows(f'{folder}/data')
        return {'rows.txt': rows_text(rows),
                'run.json': run_text(run_stages(f'{folder}/data', folder, rows)),
                'text.json': lines_of(text_json(f'{folder}/data')),
                'toy.tiktoken': Path(folder, 'data', 'toy.tiktoken').read_text(),
                'constants.json': lines_of(constants_json())}


# ----------------------------------------------------------------------------- all of it

def stored(z):
    """Returns a tensor as the file has it: float32, int64 or bool."""
    z = z.detach().contiguous()
    return (z.to(torch.float32) if z.is_floating_point() else z).numpy()


def trace(dtype=torch.float64):
    """Computes all arrays in the given dtype: {file: {name: array}}, in reading order."""
    models = build_models(dtype)
    files = {'model': {name: z for prefix, model in models.items()
                       for name, z in weights(prefix, model).items()},
             'batch': batch_arrays(models), 'sample': sample_arrays(models),
             'sft': sft_arrays(models), 'rm': rm_arrays(models), 'dpo': dpo_arrays(models),
             'ppo': ppo_arrays(models), 'edge': edge_arrays(models),
             'optimizer': optimizer_arrays(dtype)}
    return {file: {name: stored(z) for name, z in arrays.items()}
            for file, arrays in files.items()}


def bfloat16_differences():
    """Returns (array, largest difference, largest number) with bodies in bfloat16, as autocast
    computes them, for a choice of arrays: 'grads' and 'after' mean the worst of a step."""
    exact = trace()
    # Without its cache of cast weights, which would outlive an optimizer step in one long context;
    # the scripts open a context per pass
    with torch.autocast('cpu', torch.bfloat16, cache_enabled=False):
        rough = trace(torch.float32)
    rows, real = [], exact['batch']['real']
    for file, name in BFLOAT16:
        names = [n for n in exact[file] if n == name or n.startswith(name + '.')]
        gaps = [np.abs(exact[file][n].astype(float) - rough[file][n]) for n in names]
        gaps = [gap[real] if file == 'batch' and gap.ndim == 3 else gap for gap in gaps]
        rows.append((f'{file} {name}', max(gap.max() for gap in gaps),
                     max(np.abs(exact[file][n]).max() for n in names)))
    return rows


BFLOAT16 = [('batch', 'h0.qkv'), ('batch', 'h0.out'), ('batch', 'h1.out'), ('batch', 'hidden'),
            ('batch', 'logits'), ('batch', 'logprobs'), ('batch', 'seq_logprobs'),
            ('sft', 'first.loss'), ('sft', 'first.norm'), ('sft', 'first.grads'),
            ('sft', 'first.after'), ('sft', 'second.after'),
            ('rm', 'scores'), ('rm', 'loss'), ('rm', 'grads'), ('rm', 'after'),
            ('dpo', 'margin'), ('dpo', 'loss'), ('dpo', 'grads'), ('dpo', 'after'),
            ('ppo', 'kl'), ('ppo', 'values'), ('ppo', 'advantages'), ('ppo', 'first.ratio'),
            ('ppo', 'second.ratio'), ('ppo', 'second.value.grads'), ('ppo', 'second.value.after')]


def main(folder=HERE):
    """Writes the files into a folder and prints their sizes."""
    for file, arrays in trace().items():
        path = Path(folder) / f'{file}.npz'
        np.savez(path, **arrays)                # not compressed: easily read from C
        print(f'{path}: {len(arrays)} arrays, {path.stat().st_size} bytes')
    with contextlib.redirect_stdout(io.StringIO()):     # what preparing data and training print
        written = texts()
    for name, contents in written.items():
        (Path(folder) / name).write_text(contents)
        print(f'{Path(folder) / name}: {len(contents)} characters')


if __name__ == '__main__':
    if sys.argv[1:] == ['--bfloat16']:
        for name, gap, largest in bfloat16_differences():
            print(f'| {name} | {gap:.0e} of {largest:.2g} |')
    else:
        main()
