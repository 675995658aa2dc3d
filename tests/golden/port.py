"""Ports prefgpt to plain numpy: SFT, a reward model, DPO and PPO, with gradients by hand.

It was written from README.md, the porting guide, alone, and from no code of prefgpt.

    python tests/golden/port.py

recomputes, in the order of the guide, every number in the .npz files from the eight rows of
constants.json, the weights of model.npz and the few given arrays (see INPUTS). It uses no other
stored number: a second step continues from this file's own first step. Then it repeats the training
of run.json from the rows of rows.txt and a seed, and the ids of text.json from its texts.

Everything is float32. Weights, gradients and intermediates are dictionaries from the guide's names
to arrays. A layer's backward function follows its forward function: `d` is the slope of the loss in
the layer's output, the result is the slope in its input `z`, and the slopes in its weights are
added to `g`. The backward pass recomputes the little that it needs from the forward pass.

Letters of the shapes: B rows, T positions, C channels, H heads of D channels, V words, N pairs,
R rows of a minibatch, P prompts, M response tokens.
"""

import base64
import hashlib
import itertools
import json
import math
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np

HEADS = {16: 2, 64: 4}                          # of the trace's models, of the run's: by C
# What the guide's table of constants gives the trace. Every function takes what it needs from k.
TRACE = SimpleNamespace(
    eos=16, max_new_tokens=8, temperature=0.7, weight_decay=0.1, grad_clip=1.5, adam_eps=1e-5,
    sft_lr=0.01, sft_warmup=2, sft_steps=10, rm_lr=0.005, dpo_lr=0.005, ppo_lr=0.004,
    value_lr=0.003, beta=0.3, label_smoothing=0.1, no_eos_score=-1.0, gamma=0.95, gae_lambda=0.9,
    clip_eps=0.2, vf_clip=0.2, ref_ema=0.25, optimizer_lr=0.1, optimizer_decay=0.3, version=3,
    pad=0)

# What is given and not computed, besides all of model.npz.
INPUTS = {
    "sample.npz": ("draw_logits", "draw_u", "prompts", "prompt_lengths", "u"),
    "ppo.npz": ("minibatches", "near.values", "near.old_values", "near.returns"),
    "edge.npz": ("logits", "targets", "u", "margins", "z", "d", "qkv", "advantages"),
    "optimizer.npz": ("matrix", "vector", "grads.matrix", "grads.vector"),
}


# ----------------------------------------------------------------------------- 1. The batch

def layout(prompts, responses):
    """Returns rows of ids as the arrays of a batch. Column t is about emitting y[:, t]."""
    p, r = (np.array([len(row) for row in part]) for part in (prompts, responses))  # (B,)
    tokens = np.zeros((len(p), (p + r).max()), np.int64)                        # (B, T+1)
    for row, prompt, response in zip(tokens, prompts, responses):
        row[: len(prompt) + len(response)] = prompt + response
    t = np.arange(tokens.shape[1] - 1)                                          # (T,)
    last = (p + r - 1)[:, None]                                                 # (B, 1), in tokens
    mask, real = (p[:, None] - 1 <= t) & (t < last), t <= last                  # (B, T)
    batch = {"tokens": tokens, "x": tokens[:, :-1], "y": tokens[:, 1:], "real": real}
    return {**batch, "response_mask": mask, "prompt_lengths": p, "response_lengths": r}


# ----------------------------------------------------------------------------- 2. The layers

def linear(z, p, name):
    return z @ p[name + ".weight"].T + p[name + ".bias"]                        # (B, T, out)


def linear_back(d, z, p, name, g):
    g[name + ".weight"] = np.einsum("bto,bti->oi", d, z)                        # (out, in)
    g[name + ".bias"] = d.sum((0, 1))                                           # (out,)
    return d @ p[name + ".weight"]                                              # (B, T, in)


def standard(z):
    """Returns z with mean 0 and variance 1 over the channels, and the divisor."""
    z = z - z.mean(-1, keepdims=True)                                           # (B, T, C)
    root = np.sqrt((z**2).mean(-1, keepdims=True) + 1e-5)                       # (B, T, 1)
    return z / root, root


def norm(z, p, name):
    return standard(z)[0] * p[name + ".weight"] + p[name + ".bias"]             # (B, T, C)


def norm_back(d, z, p, name, g):
    n, root = standard(z)
    g[name + ".weight"], g[name + ".bias"] = (d * n).sum((0, 1)), d.sum((0, 1))     # (C,) each
    d = d * p[name + ".weight"]
    # n stays when z is shifted or scaled, so the parts of d along 1 and along n drop out.
    return (d - d.mean(-1, keepdims=True) - n * (d * n).mean(-1, keepdims=True)) / root


def gelu_tanh(z):
    # z**3 would take ten times as long
    return np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * (z * z * z)))


def gelu(z):
    return z / 2 * (1 + gelu_tanh(z))


def gelu_back(d, z):
    tanh, inner = gelu_tanh(z), math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2)
    return d * ((1 + tanh) / 2 + z / 2 * (1 - tanh**2) * inner)                 # tanh' = 1 - tanh^2


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def split(z):
    """Splits (B, T, C) into (B, H, T, D): head i takes the channels i*D .. (i+1)*D - 1."""
    return z.reshape(*z.shape[:2], HEADS.get(z.shape[2], 2), -1).swapaxes(1, 2)


def join(z):
    """Joins (B, H, T, D) into (B, T, C): heads side by side."""
    return z.swapaxes(1, 2).reshape(z.shape[0], z.shape[2], -1)


def attention_weights(qkv):
    q, k, v = (split(z) for z in np.split(qkv, 3, -1))                          # (B, H, T, D) each
    w = q @ k.swapaxes(2, 3) / math.sqrt(q.shape[3])                            # (B, H, T, T)
    past = np.tri(q.shape[2], dtype=bool)                                       # [t, s]: s <= t
    return q, k, v, softmax(np.where(past, w, np.float32(-np.inf)))


def attention(qkv):
    _, _, v, a = attention_weights(qkv)
    return join(a @ v)                                                          # (B, T, C)


def attention_back(d, qkv):
    q, k, v, a = attention_weights(qkv)
    d = split(d)                                                                # (B, H, T, D)
    dv, da = a.swapaxes(2, 3) @ d, d @ v.swapaxes(2, 3)                         # of a v
    dw = a * (da - (da * a).sum(-1, keepdims=True)) / math.sqrt(q.shape[3])     # of a = softmax(w)
    dq, dk = dw @ k, dw.swapaxes(2, 3) @ q                                      # of w = q k^T
    return np.concatenate([join(dq), join(dk), join(dv)], -1)                   # (B, T, 3*C)


def body(p, x):
    """Returns every intermediate of the forward pass, under the names of batch.npz."""
    h = p["wte.weight"][x] + p["wpe.weight"][: x.shape[1]]                      # (B, T, C)
    z = {"x": x, "embedded": h, "layers": sum(name.endswith("ln_1.weight") for name in p)}
    for i in range(z["layers"]):
        w, n = f"h.{i}.", f"h{i}."                                              # weights, numbers
        z[n + "ln_1"] = norm(h, p, w + "ln_1")                                  # (B, T, C)
        z[n + "qkv"] = linear(z[n + "ln_1"], p, w + "attn.c_attn")              # (B, T, 3*C)
        z[n + "heads"] = attention(z[n + "qkv"])                                # (B, T, C)
        z[n + "attention"] = linear(z[n + "heads"], p, w + "attn.c_proj")       # (B, T, C)
        z[n + "middle"] = h + z[n + "attention"]
        z[n + "ln_2"] = norm(z[n + "middle"], p, w + "ln_2")                    # (B, T, C)
        z[n + "fc"] = linear(z[n + "ln_2"], p, w + "mlp.c_fc")                  # (B, T, 4*C)
        z[n + "gelu"] = gelu(z[n + "fc"])                                       # (B, T, 4*C)
        z[n + "mlp"] = linear(z[n + "gelu"], p, w + "mlp.c_proj")               # (B, T, C)
        z[n + "out"] = h = z[n + "middle"] + z[n + "mlp"]
    z["hidden"] = norm(h, p, "ln_f")                                            # (B, T, C)
    return z


def body_back(d, z, p):
    """Returns the gradients of all weights of the body, from d = d loss / d hidden (B, T, C)."""
    g = {name: np.zeros_like(p[name]) for name in ("wte.weight", "wpe.weight")}
    d = norm_back(d, z[f"h{z['layers'] - 1}.out"], p, "ln_f", g)
    for i in reversed(range(z["layers"])):
        w, n = f"h.{i}.", f"h{i}."
        before = z[f"h{i - 1}.out"] if i else z["embedded"]
        b = linear_back(d, z[n + "gelu"], p, w + "mlp.c_proj", g)               # b: the branch;
        b = gelu_back(b, z[n + "fc"])                                           # d goes by it too
        b = linear_back(b, z[n + "ln_2"], p, w + "mlp.c_fc", g)
        d = d + norm_back(b, z[n + "middle"], p, w + "ln_2", g)
        b = linear_back(d, z[n + "heads"], p, w + "attn.c_proj", g)
        b = attention_back(b, z[n + "qkv"])
        b = linear_back(b, z[n + "ln_1"], p, w + "attn.c_attn", g)
        d = d + norm_back(b, before, p, w + "ln_1", g)
    g["wpe.weight"][: d.shape[1]] = d.sum(0)                                    # (S, C)
    np.add.at(g["wte.weight"], z["x"], d)                                       # (V, C), as input
    return g


def log_softmax_at(logits, y):
    every = logits - logits.max(-1, keepdims=True)
    every = every - np.log(np.exp(every).sum(-1, keepdims=True))
    return np.take_along_axis(every, y[..., None], -1)[..., 0]


def policy_logprobs(p, batch, temperature=1.0):
    """Returns logprobs of y, 0 off the mask, and what `policy_back` needs."""
    z = body(p, batch["x"])
    logits = z["hidden"] @ p["wte.weight"].T                                    # (B, T, V)
    logprobs = log_softmax_at(logits / temperature, batch["y"])                 # (B, T)
    return logprobs * batch["response_mask"], {**z, "y": batch["y"], "logits": logits}


def policy_back(slope, z, p, temperature=1.0):
    """Returns the gradients, from slope = d loss / d logprobs (B, T), 0 off the mask."""
    onehot = z["y"][..., None] == np.arange(z["logits"].shape[-1])              # (B, T, V)
    d = slope[..., None] * (onehot - softmax(z["logits"] / temperature)) / temperature
    g = body_back(d @ p["wte.weight"], z, p)
    g["wte.weight"] += np.einsum("btv,btc->vc", d, z["hidden"])                 # as output
    return g


def numbers(p, x):
    """Returns a scalar model's number at each place of x, and what `numbers_back` needs."""
    z = body(part(p, "body."), x)
    return z["hidden"] @ p["score.weight"][0], z                                # (B, T)


def numbers_back(slope, z, p):
    """Returns the gradients, from slope = d loss / d number (B, T)."""
    g = body_back(slope[..., None] * p["score.weight"][0], z, part(p, "body."))
    return {**named("body.", g), "score.weight": np.einsum("bt,btc->c", slope, z["hidden"])[None]}


def part(arrays, prefix):
    return {k[len(prefix) :]: a for k, a in arrays.items() if k.startswith(prefix)}


def named(prefix, arrays):
    return {prefix + k: a for k, a in arrays.items()}


# ----------------------------------------------------------------------------- 3. Sampling

def draw(logits, u, temperature):
    """Draws one id per row of logits (B, V), at the uniform numbers u (B,)."""
    if temperature == 0:
        return logits.argmax(-1)                                                # the first largest
    F = softmax(logits / temperature).cumsum(-1)                                # (B, V)
    below = (F <= (u * F[:, -1])[:, None]).sum(-1)                              # (B,)
    return np.minimum(below, logits.shape[1] - 1)                               # if u rounds to 1


def generate(p, prompts, u, temperature, k):
    """Continues each prompt up to EOS or max_new_tokens, each row at its own position."""
    responses = [[] for _ in prompts]
    for t in range(k.max_new_tokens):
        batch = layout(prompts, responses)
        last = batch["prompt_lengths"] + batch["response_lengths"] - 1          # (P,)
        hidden = body(p, batch["tokens"])["hidden"][np.arange(len(last)), last]     # (P, C)
        drawn = draw(hidden @ p["wte.weight"].T, u[:, t], temperature)          # (P,)
        for response, token in zip(responses, drawn.tolist()):
            if k.eos not in response:
                response.append(token)
        if all(k.eos in response for response in responses):
            break
    return layout(prompts, responses)


def sample_stage(policy, given):
    prompts = [row[:p].tolist() for row, p in zip(given["prompts"], given["prompt_lengths"])]
    out = {}
    for end, temperature in (("", 1.0), ("_t07", TRACE.temperature), ("_t0", 0)):
        batch = generate(policy, prompts, given["u"], temperature, TRACE)
        out["draws" + end] = draw(given["draw_logits"], given["draw_u"], temperature)
        out |= {"tokens" + end: batch["tokens"], "response_mask" + end: batch["response_mask"]}
        if end == "":
            out["logits"] = policy_logprobs(policy, batch)[1]["logits"][batch["response_mask"]]
    return out


# ----------------------------------------------------------------------------- The optimizer step

def global_norm(g):
    return np.sqrt(sum((a**2).sum() for a in g.values()))


def adamw(p, g, lr, k, state=None):
    """Takes one clipped step; returns weights after it, state (count, m, v), and the norm of g."""
    total = global_norm(g)
    scale = min(1, k.grad_clip / (total + 1e-6))
    zeros = {name: np.zeros_like(a) for name, a in p.items()}
    count, m, v = state or (0, zeros, zeros)
    count, after = count + 1, {}
    m = {name: 0.9 * m[name] + 0.1 * scale * g[name] for name in p}
    v = {name: 0.95 * v[name] + 0.05 * (scale * g[name]) ** 2 for name in p}
    for name, a in p.items():
        a = a - lr * k.weight_decay * a if a.ndim == 2 else a
        root = np.sqrt(v[name] / (1 - 0.95**count))
        after[name] = a - lr * (m[name] / (1 - 0.9**count)) / (root + k.adam_eps)
    return after, (count, m, v), total


def rate(s, n, w, lr):
    """Returns the rate of step s of n: w steps of warm-up to lr, then a cosine to lr / 10."""
    if s < w:
        return lr * (s + 1) / w
    return lr * (0.1 + 0.9 * (1 + math.cos(math.pi * (s - w) / max(1, n - 1 - w))) / 2)


# ----------------------------------------------------------------------------- 4. SFT

def sft_loss(p, batch):
    """Returns the loss and the gradients."""
    mask, M = batch["response_mask"], int(batch["response_mask"].sum())
    logprobs, z = policy_logprobs(p, batch)
    return -logprobs.sum() / M, policy_back(mask * np.float32(-1 / M), z, p)    # slope in logprobs


def sft_stage(p, batch, k):
    state, out = None, {"schedule": np.float32([rate(s, 11, 4, 1) for s in range(11)])}
    for s, name in enumerate(("first", "second")):
        lr = rate(s, k.sft_steps, k.sft_warmup, k.sft_lr)
        loss, g = sft_loss(p, batch)
        p, state, total = adamw(p, g, lr, k, state)
        step = {"loss": loss, "lr": np.float32(lr), "norm": total}
        step |= {"m.ln_f.bias": state[1]["ln_f.bias"], "v.ln_f.bias": state[2]["ln_f.bias"]}
        out |= named(name + ".", {**step, **named("grads.", g), **named("after.", p)})
    return out


# ----------------------------------------------------------------------------- 5. Reward model

def log_sigmoid(z):
    return -np.logaddexp(np.float32(0), -z)


def sigmoid(z):
    return np.exp(log_sigmoid(z))


def scores_of(p, batch):
    """Returns the scores, (B,), the numbers at every place, and what `numbers_back` needs."""
    everywhere, z = numbers(p, batch["tokens"])                                 # (B, T+1)
    last = batch["prompt_lengths"] + batch["response_lengths"] - 1              # (B,)
    return everywhere[np.arange(len(last)), last], everywhere, z


def reward_loss(p, batch):
    """Returns the pairs' losses, (N,), the gradients and the scores; chosen rows come first."""
    scores, everywhere, z = scores_of(p, batch)
    chosen, rejected = np.split(scores, 2)                                      # (N,) each
    losses, up = -log_sigmoid(chosen - rejected), sigmoid(rejected - chosen) / len(chosen)
    last = batch["prompt_lengths"] + batch["response_lengths"] - 1              # (B,)
    slope = np.zeros_like(everywhere)                                           # d loss / d number
    slope[np.arange(len(last)), last] = np.concatenate([-up, up])
    return losses, numbers_back(slope, z, p), scores


def reward_stage(p, batch, k):
    losses, g, scores = reward_loss(p, batch)
    after, _, total = adamw(p, g, k.rm_lr, k)
    out = {"scores_everywhere": scores_of(p, batch)[1], "scores": scores, "shift": scores.mean()}
    out |= dict(zip(("chosen", "rejected"), np.split(scores, 2)))
    out |= {"losses": losses, "loss": losses.mean()}
    return {**out, "norm": total, **named("grads.", g), **named("after.", after)}


# ----------------------------------------------------------------------------- 6. DPO

def dpo_losses(h, beta, smoothing=0.0):
    """Returns the losses of the pairs and their slopes in h, (N,) each."""
    margin, keep = beta * h, 1 - smoothing
    losses = -keep * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)
    return losses, beta * (sigmoid(margin) - keep)


def ipo_losses(h, beta):
    return (h - 1 / (2 * beta)) ** 2, 2 * (h - 1 / (2 * beta))


def dpo_gradient(dh, z, p, batch):
    """Returns the gradients, from the losses' slopes in h, (N,)."""
    slope = np.concatenate([dh, -dh])[:, None] / len(dh) * batch["response_mask"]       # (B, T)
    return policy_back(slope, z, p)


def dpo_stage(policy, ref, batch, k):
    logprobs, z = policy_logprobs(policy, batch)
    chosen, rejected = np.split(logprobs.sum(1), 2)                             # (N,) each
    ref_chosen, ref_rejected = np.split(policy_logprobs(ref, batch)[0].sum(1), 2)
    h = (chosen - ref_chosen) - (rejected - ref_rejected)                       # (N,)
    out = {"chosen": chosen, "rejected": rejected, "margin": k.beta * h}
    out |= {"ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
    kinds = {"_ipo": ipo_losses(h, k.beta), "": dpo_losses(h, k.beta)}
    kinds = {"_smoothed": dpo_losses(h, k.beta, k.label_smoothing), **kinds}
    for kind, (losses, dh) in kinds.items():
        g = dpo_gradient(dh, z, policy, batch)
        out |= {"losses" + kind: losses, "loss" + kind: losses.mean()}
        out["norm" + kind] = global_norm(g)
    after, _, _ = adamw(policy, g, k.dpo_lr, k)                                 # g: DPO's, the last
    return {**out, **named("grads.", g), **named("after.", after)}


# ----------------------------------------------------------------------------- 7. PPO

def gae(rewards, values, batch, k):
    """Returns advantages (B, T), backwards over each row's response; nothing follows the last."""
    advantages = np.zeros_like(rewards)
    for b, mask in enumerate(batch["response_mask"]):
        A = V_next = np.float32(0)
        for t in reversed(np.flatnonzero(mask)):
            A = rewards[b, t] + k.gamma * V_next - values[b, t] + k.gamma * k.gae_lambda * A
            advantages[b, t], V_next = A, values[b, t]
    return advantages


def whiten(A, mask):
    M = int(mask.sum())
    mean = (A * mask).sum() / M
    var = ((A - mean) ** 2 * mask).sum() / M                                    # by M, not M - 1
    return (A - mean) / np.sqrt(var + 1e-8) * mask                              # (B, T)


def rollout(policy, ref, value_model, reward_model, shift, batch, k):
    """Returns the numbers that are the same in every pass over the rollout batch."""
    mask, rows = batch["response_mask"], np.arange(len(batch["x"]))             # (B, T), (B,)
    last = batch["prompt_lengths"] + batch["response_lengths"] - 1              # (B,), in tokens
    logprobs, _ = policy_logprobs(policy, batch, k.temperature)                 # (B, T)
    ref_logprobs, _ = policy_logprobs(ref, batch, k.temperature)
    values, _ = numbers(value_model, batch["x"])                                # (B, T)
    raw = scores_of(reward_model, batch)[0] - shift                             # (B,)
    ended = batch["tokens"][rows, last] == k.eos
    scores = np.where(ended, raw, np.minimum(raw, np.float32(k.no_eos_score)))
    kl = logprobs - ref_logprobs
    rewards = -k.beta * kl
    rewards[rows, last - 1] += scores                                           # y: the last there
    advantages, B, M = gae(rewards, values, batch, k), len(rows), int(mask.sum())
    log = {"score": raw.mean(), "kl": kl.sum() / B, "entropy": -logprobs.sum() / M}
    log |= {"length": np.float32(M / B), "eos": np.float32(ended.mean())}
    out = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values, "kl": kl}
    out |= {"raw_scores": raw, "ended": ended, "scores": scores, "rewards": rewards}
    out |= {"advantages": advantages, "returns": (advantages + values) * mask}
    out |= {"advantages_white": whiten(advantages, mask)}
    out |= {"flat_white": whiten(1e-4 * advantages, mask)}
    return {**out, **named("logged.", log)}


def policy_losses(logprobs, old, A, k):
    """Returns ratios, losses and slopes in the logprobs, (R, T) each."""
    ratio = np.exp(logprobs - old)
    plain, clipped = -A * ratio, -A * np.clip(ratio, 1 - k.clip_eps, 1 + k.clip_eps)
    return ratio, np.maximum(plain, clipped), plain * (plain >= clipped)


def value_losses(values, old, returns, vf_clip):
    """Returns losses and slopes in the values, (R, T) each."""
    moved = values - old
    c = old + np.clip(moved, -vf_clip, vf_clip) if vf_clip else values
    plain, clipped = (values - returns) ** 2, (c - returns) ** 2
    # Within the clip range c is `values` but for rounding, which must not set the slope to 0.
    inside = abs(moved) <= vf_clip
    return np.maximum(plain, clipped) / 2, (values - returns) * (inside | (plain >= clipped))


def policy_step(p, state, old, batch, lr, k):
    n = int(batch["response_mask"].sum())
    logprobs, z = policy_logprobs(p, batch, k.temperature)                      # (R, T)
    ratio, losses, slope = policy_losses(logprobs, old["logprobs"], old["advantages_white"], k)
    g = policy_back(slope / n, z, p, k.temperature)                             # A: 0 off the mask
    p, state, total = adamw(p, g, lr, k, state)
    out = {"logprobs": logprobs, "ratio": ratio, "pg_losses": losses, "pg_loss": losses.sum() / n}
    out |= {"policy.norm": total, **named("policy.grads.", g), **named("policy.after.", p)}
    return p, state, out


def value_step(p, state, old, batch, lr, k):
    mask, n, out = batch["response_mask"], int(batch["response_mask"].sum()), {}
    values, z = numbers(p, batch["x"])                                          # (R, T)
    for end, vf_clip in (("_unclipped", 0), ("", k.vf_clip)):
        losses, slope = value_losses(values, old["values"], old["returns"], vf_clip)
        losses, slope = losses * mask, slope * mask
        out |= {"vf_losses" + end: losses, "vf_loss" + end: losses.sum() / n}
    g = numbers_back(slope / n, z, p)                                           # of the clipped one
    p, state, total = adamw(p, g, lr, k, state)
    out |= {"values": values, "value.norm": total}
    return p, state, {**out, **named("value.grads.", g), **named("value.after.", p)}


def update_ema(ref, policy, rate):
    return {name: a + rate * (policy[name] - a) for name, a in ref.items()}


FIXED = "logprobs", "values", "returns", "advantages_white"                     # in every pass


def ppo_stage(policy, ref, value_model, reward_model, shift, batch, given, k):
    out = rollout(policy, ref, value_model, reward_model, shift, batch, k)
    near = (given["near." + name] for name in ("values", "old_values", "returns"))
    out["near.slopes"] = value_losses(*near, k.vf_clip)[1]
    policy_state = value_state = None
    for name, rows in zip(("first", "second"), given["minibatches"]):
        old = {key: out[key][rows] for key in FIXED}                            # (R, T)
        mini = {key: a[rows] for key, a in batch.items()}
        policy, policy_state, policy_out = policy_step(policy, policy_state, old, mini, k.ppo_lr, k)
        value_model, value_state, value_out = value_step(
            value_model, value_state, old, mini, k.value_lr, k)
        out |= named(name + ".", {**policy_out, **value_out})
    return {**out, **named("ref_after.", update_ema(ref, policy, k.ref_ema))}   # once, at the end


# ----------------------------------------------------------------------------- Extreme numbers

def edge_stage(given):
    logits, y, z = given["logits"], given["targets"], given["z"]
    onehot, weights = y[:, None] == np.arange(logits.shape[1]), {}
    unit = {"ln.weight": np.ones(16, np.float32), "ln.bias": np.zeros(16, np.float32)}
    return {
        "logprobs": log_softmax_at(logits, y),
        "logit_slopes": onehot - softmax(logits),
        "draws": draw(logits, given["u"], 1.0),
        "losses": -log_sigmoid(given["margins"]),
        "loss_slopes": -sigmoid(-given["margins"]),
        "norm": norm(z, unit, "ln"),
        "dz": norm_back(given["d"][:, None], z[:, None], unit, "ln", weights)[:, 0],
        "heads": attention(given["qkv"][None])[0],
        "white": whiten(given["advantages"], np.ones((2, 8), bool)),
    }


def optimizer_stage(given, k):
    k = SimpleNamespace(**{**vars(k), "weight_decay": k.optimizer_decay})
    p, state, steps = {name: given[name] for name in ("matrix", "vector")}, None, []
    for i in range(5):
        g = {name: given["grads." + name][i] for name in p}
        p, state, total = adamw(p, g, k.optimizer_lr, k, state)
        parts = {"weights.": p, "m.": state[1], "v.": state[2], "norms": {"": total}}
        steps.append({end + name: a for end, part in parts.items() for name, a in part.items()})
    return {name: np.stack([step[name] for step in steps]) for name in steps[0]}


# ----------------------------------------------------------------------------- Randomness

class Stream:
    """Draws what torch draws on a CPU: numpy has the same MT19937, seeded the same way."""

    def __init__(self, seed):
        self.state = np.random.RandomState(seed)

    def numbers(self, n):
        return self.state.randint(0, 2**32, n, np.uint32)

    def rand(self, *shape):
        return (self.numbers(math.prod(shape)) % 2**24 / 2**24).astype(np.float32).reshape(shape)

    def randperm(self, n):
        order = list(range(n))
        for i, number in enumerate(self.numbers(max(0, n - 1)).tolist()):
            j = i + number % (n - i)
            order[i], order[j] = order[j], order[i]
        return order

    def normal(self, n, std):
        a = self.rand(n)
        blocks = a[: n - n % 16]
        if n % 16:                                                              # drawn anew
            a[n - 16 :] = self.rand(16)
        for block in (blocks, a[n - 16 :]) if n % 16 else (blocks,):
            u1, u2 = 1 - block.reshape(-1, 2, 8)[:, 0], block.reshape(-1, 2, 8)[:, 1]
            radius, angle = np.sqrt(-2 * np.log(u1)), np.float32(2 * math.pi) * u2
            block[:] = std * np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).ravel()
        return a


def stream(seed, step, purpose):
    digest = hashlib.sha256(f"{seed} {step} {purpose}".encode()).digest()
    return Stream(int.from_bytes(digest[:4], "little"))


def initial_weights(seed, V, S, L, C, std):
    r, p = Stream(seed), {}
    sizes = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C)}
    sizes |= {"mlp.c_proj": (C, 4 * C)}
    r.numbers((V + S) * C + L * sum(out * (n + 1) for out, n in sizes.values()))    # thrown away
    shapes = {"wte.weight": (V, C), "wpe.weight": (S, C)}
    for i in range(L):
        for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            shape = sizes.get(name, (C,))
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[:1]}
    shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
    for name, shape in shapes.items():
        if len(shape) == 2:
            scale = std / math.sqrt(2 * L) if "c_proj" in name else std
            p[name] = r.normal(math.prod(shape), np.float32(scale)).reshape(shape)
        else:
            p[name] = np.full(shape, name.endswith("weight"), np.float32)
    return p


def parts_of(order, n):
    """Cuts a list into n parts as even as can be; the larger ones come first."""
    return [part.tolist() for part in np.array_split(order, n)]


def batches(lengths, size, seed):
    """Yields the rows of each batch, epoch after epoch."""
    for epoch in itertools.count():
        r, order = stream(seed, epoch, "batch"), []
        shuffled, n = r.randperm(len(lengths)), -(-len(lengths) // size)
        for i in range(0, len(shuffled), 16 * size):                            # a stable sort
            order += sorted(shuffled[i : i + 16 * size], key=lengths.__getitem__)
        parts = parts_of(order, n)
        yield from (parts[i] for i in r.randperm(n))


def random_numbers():
    """Returns what run.json has under "random": the first numbers of each kind."""
    r, p = stream(0, 0, "batch"), initial_weights(0, 768, 128, 2, 64, 0.1)
    seeds = {purpose: int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "little")
             for purpose in ("0 0 batch", "0 0 rollout", "0 1 shuffle")}
    weights = {name: [round(float(z), 5) for z in p[name].ravel()[:4]]
               for name in ("wte.weight", "h.0.attn.c_proj.weight", "h.1.mlp.c_proj.weight")}
    return {"seeds": seeds, "rand": stream(0, 0, "rollout").rand(4).tolist(),
            "randperm": [r.randperm(10), r.randperm(5)],
            "batches": list(itertools.islice(batches(list(range(1, 11)), 3, 0), 4)),
            "initial": weights}


# ----------------------------------------------------------------------------- The four loops

def read_rows(path):
    """Reads rows.txt: {name: [(prompt, response)]}; pairs are two rows each."""
    files = {}
    for line in path.read_text().splitlines():
        if line[0].isalpha():
            rows = files[line.split()[0]] = []
        else:
            p, _, *ids = map(int, line.split())
            rows.append((ids[:p], ids[p:]))
    return files


def pack(rows):
    return layout(*zip(*rows))


def train(p, rows, size, loss_of, peak, k):
    """Trains for ten steps on rows (tuples of one or two); returns weights and what is logged."""
    state, log = None, []
    lengths = [sum(len(prompt + response) for prompt, response in row) for row in rows]
    for s, indices in zip(range(10), batches(lengths, size, 0)):
        batch = pack([rows[i][side] for side in range(len(rows[0])) for i in indices])
        loss, g = loss_of(p, batch, indices)
        p, state, total = adamw(p, g, rate(s, 10, 3, peak), k, state)
        log.append({"rows": indices, "loss": loss, "norm": total})
    return p, log


def run_ppo(policy, reward_model, shift, prompts, k):
    ref, log = policy, []
    value_model = {**reward_model, "score.weight": np.zeros_like(reward_model["score.weight"])}
    policy_state = value_state = None
    for s, indices in zip(range(3), batches([1] * len(prompts), 16, 0)):
        u = stream(0, s, "rollout").rand(len(indices), k.max_new_tokens)
        batch = generate(policy, [prompts[i][0] for i in indices], u, k.temperature, k)
        out = rollout(policy, ref, value_model, reward_model, shift, batch, k)
        ids = [row[mask].tolist() for row, mask in zip(batch["y"], batch["response_mask"])]
        steps = []
        for e in range(2):
            order = stream(0, 2 * s + e, "shuffle").randperm(len(indices))
            for rows in parts_of(order, -(-len(order) // 8)):
                old = {key: out[key][rows] for key in FIXED}
                mini = {key: a[rows] for key, a in batch.items()}
                policy, policy_state, policy_out = policy_step(
                    policy, policy_state, old, mini, rate(s, 3, 1, 3e-3), k)
                value_model, value_state, value_out = value_step(
                    value_model, value_state, old, mini, rate(s, 3, 1, 2e-3), k)
                both = {**policy_out, **value_out}
                steps.append([both[name] for name in ("pg_loss", "vf_loss", "policy.norm")])
        ref = update_ema(ref, policy, k.ref_ema)
        log.append({"rows": indices, "ids": ids, **part(out, "logged.")})
        log[-1] |= dict(zip(("pg_loss", "vf_loss", "norm"), np.mean(steps, 0)))
    return log


def run(rows):
    """Returns run.json's numbers, from rows.txt's rows."""
    k = SimpleNamespace(
        eos=767, max_new_tokens=24, temperature=0.9, weight_decay=0.1, grad_clip=1.0, adam_eps=1e-8,
        beta=0.2, no_eos_score=-1.0, gamma=0.98, gae_lambda=0.95, clip_eps=0.2, vf_clip=0.2,
        ref_ema=0.1)
    p = initial_weights(0, 768, 128, 2, 64, 0.1)
    pairs = list(zip(rows["train.pairs"][::2], rows["train.pairs"][1::2]))
    policy, sft = train(p, [(row,) for row in rows["train.sft"]], 8,
                        lambda p, batch, indices: sft_loss(p, batch), 6e-3, k)
    held_out = sft_loss(policy, pack(rows["val.sft"]))[0]

    def rm_loss(p, batch, indices):
        losses, g, _ = reward_loss(p, batch)
        return losses.mean(), g
    start = {**named("body.", policy), "score.weight": np.zeros((1, 64), np.float32)}
    reward_model, rm = train(start, pairs, 8, rm_loss, 3e-3, k)
    shift = scores_of(reward_model, pack(rows["val.pairs"]))[0].mean()

    k.weight_decay = 0.0
    sums = policy_logprobs(policy, pack(rows["train.pairs"]))[0].sum(1)
    refs = sums[::2], sums[1::2]

    def dpo_loss(p, batch, indices):
        logprobs, z = policy_logprobs(p, batch)
        chosen, rejected = np.split(logprobs.sum(1), 2)
        h = (chosen - refs[0][indices]) - (rejected - refs[1][indices])
        losses, dh = dpo_losses(h, k.beta)
        return losses.mean(), dpo_gradient(dh, z, p, batch)
    _, dpo = train(policy, pairs, 8, dpo_loss, 1e-3, k)
    k.adam_eps = 1e-5
    ppo = run_ppo(policy, reward_model, shift, rows["train.prompts"], k)
    return {"sft": {"steps": sft, "eval_loss": held_out}, "rm": {"steps": rm, "shift": shift},
            "dpo": {"steps": dpo}, "ppo": {"steps": ppo}}


# ----------------------------------------------------------------------------- Text

def kind_of(character):
    if character.isspace() and not "\x1c" <= character <= "\x1f":
        return "space"
    return {"L": "letter", "N": "digit"}.get(unicodedata.category(character)[0], "other")


def words_of(text):
    """Cuts text into GPT-2's words: contractions, runs of one kind with a space before, spaces."""
    i = 0
    while i < len(text):
        end = i + 1
        tail = next((t for t in ("s", "d", "m", "t", "ll", "ve", "re")
                     if text[i] == "'" and text.startswith(t, i + 1)), None)
        first = i + (text[i] == " ")
        if tail:
            end = i + 1 + len(tail)
        elif first < len(text) and kind_of(text[first]) != "space":
            kinds = itertools.takewhile(lambda c: kind_of(c) == kind_of(text[first]), text[first:])
            end = first + len(list(kinds))
        else:
            spaces = len(list(itertools.takewhile(lambda c: kind_of(c) == "space", text[i:])))
            # The last space of a run belongs to the word after it, if it is one and can
            end = i + (spaces if i + spaces == len(text) or spaces == 1 else spaces - 1)
        yield text[i:end]
        i = end


def encode(text, ranks):
    """Returns the ids of a text: in each word, the pair of lowest rank is joined until none is."""
    ids = []
    for word in words_of(text):
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            pairs = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
            if min(pairs, default=math.inf) == math.inf:
                break
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[token] for token in parts]
    return ids


def encode_row(row, kind, ranks, block, max_new_tokens):
    """Returns the ids of a row's prompt and responses, cut to the block; None if it is dropped."""
    eos, keys = len(ranks), {"sft": ["completion"], "pairs": ["chosen", "rejected"], "prompts": []}
    prompt = encode(row["prompt"], ranks) or [eos]
    responses = [encode(row[key], ranks) + [eos] * (not row.get(key + "_cut"))
                 for key in keys[kind]]
    room = block - max_new_tokens
    if responses:
        room = max(block - max(map(len, responses)), block // 2)
    prompt = prompt[-room:]
    responses = [response[: block - len(prompt)] for response in responses]
    if kind == "pairs" and responses[0] == responses[1]:
        return None
    return [prompt, *responses]


# ----------------------------------------------------------------------------- The comparison

def exact(name, ours, theirs):
    return name, 0.0 if ours == theirs else math.inf, 0.0


def compare_constants(folder):
    said = json.loads((folder / "constants.json").read_text())["constants"]
    return [exact(f"constants.json/{name}", getattr(TRACE, name, None), value)
            for name, value in said.items()]


def compare_text(folder):
    said = json.loads((folder / "text.json").read_text())
    lines = (folder / said["tokenizer"]).read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    results = [exact(f"text.json/texts.{i}", encode(entry["text"], ranks), entry["ids"])
               for i, entry in enumerate(said["texts"])]
    sizes = said["block_size"], said["max_new_tokens"]
    for i, entry in enumerate(said["rows"]):
        ids = encode_row(entry["row"], entry["kind"], ranks, sizes[0],
                         sizes[1] if entry["kind"] == "prompts" else 0)
        results.append(exact(f"text.json/rows.{i}", ids, entry["ids"]))
    return results


def compare_run(folder):
    """Compares the run, step by step: what is whole exactly, shift to 1e-3, the rest to 1e-4."""
    said, results = json.loads((folder / "run.json").read_text()), []
    ours = run(read_rows(folder / "rows.txt"))
    random = said["random"]
    drawn = random_numbers()
    initial = drawn.pop("initial")
    results += [exact(f"run.json/random.{name}", z, random[name]) for name, z in drawn.items()]
    results += [(f"run.json/random.{name}", max(abs(np.subtract(initial[name], z))), 1e-4)
                for name, z in random["initial"].items()]

    def add(name, a, b):
        if isinstance(b, float):
            most = 1e-3 if name.endswith("shift") else 1e-4
            results.append((name, abs(float(a) - b), most * max(1, abs(b))))
        else:
            results.append(exact(name, a, b))
    for stage, numbers in ours.items():
        for s, step in enumerate(numbers.pop("steps")):
            for name, value in step.items():
                add(f"run.json/{stage}.{s + 1}.{name}", value, said[stage]["steps"][s][name])
        for name, value in numbers.items():
            add(f"run.json/{stage}.{name}", value, said[stage][name])
    return results


def recompute(stored, rows):
    """Computes the arrays of every file, by file and name, in the guide's order."""
    model = stored["model.npz"]
    policy, ref = part(model, "policy."), part(model, "ref.")
    batch = pack(rows)
    logprobs, z = policy_logprobs(policy, batch)
    del z["layers"]
    z |= {"logits": z["logits"][batch["response_mask"]], "logprobs": logprobs}
    z |= {"seq_logprobs": logprobs.sum(1)}
    z |= {"logprobs_t07": policy_logprobs(policy, batch, TRACE.temperature)[0]}
    out = {"batch.npz": {**z, **batch}}
    out["sample.npz"] = sample_stage(policy, stored["sample.npz"])
    out["sft.npz"] = sft_stage(policy, batch, TRACE)
    reward_model, value_model = part(model, "reward_model."), part(model, "value_model.")
    out["rm.npz"] = reward = reward_stage(reward_model, batch, TRACE)
    out["dpo.npz"] = dpo_stage(policy, ref, batch, TRACE)
    out["ppo.npz"] = ppo_stage(policy, ref, value_model, reward_model, reward["shift"], batch,
                               stored["ppo.npz"], TRACE)
    out["edge.npz"] = edge_stage(stored["edge.npz"])
    out["optimizer.npz"] = optimizer_stage(stored["optimizer.npz"], TRACE)
    return out


def places(file, name, array, batch, ppo):
    """Returns where to compare an array: at real places if the guide says so, else everywhere."""
    real, lengths = batch["real"], batch["prompt_lengths"] + batch["response_lengths"]
    if file == "batch.npz":
        return real if array.ndim == 3 else ...
    first, second = ppo["minibatches"]
    return {
        "scores_everywhere": np.arange(batch["tokens"].shape[1]) < lengths[:, None],    # (B, T+1)
        "values": real,
        "first.values": real[first],
        "second.values": real[second],
    }.get(name, ...)


def difference(ours, theirs, name, where):
    """Returns |ours - theirs| and the tolerance, both at the place that is worst."""
    if ours is None or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return math.inf, 0.0
    a, b = (np.atleast_1d(z[where]).ravel().astype(float) for z in (ours, theirs))
    if theirs.dtype.kind != "f":
        return abs(a - b).max(), 0.0
    gap, tolerance = abs(a - b), (1e-4 if "after" in name else 1e-5) + 1e-5 * abs(b)
    worst = np.argmax(gap / tolerance)                                          # a nan, if any
    return gap[worst], tolerance[worst]


def compare_arrays(folder):
    """Returns (file/name, difference, tolerance) of every stored array that is not given."""
    files = ("model", "batch", "sample", "sft", "rm", "dpo", "ppo", "edge", "optimizer")
    stored = {f"{file}.npz": dict(np.load(Path(folder) / f"{file}.npz")) for file in files}
    pairs = json.loads((folder / "constants.json").read_text())["pairs"]
    rows = [(pair["prompt"], pair[side]) for side in ("chosen", "rejected") for pair in pairs]
    computed, result = recompute(stored, rows), []
    for file, ours in computed.items():
        for name, theirs in stored[file].items():
            if name not in INPUTS.get(file, ()):
                where = places(file, name, theirs, computed["batch.npz"], stored["ppo.npz"])
                result.append((f"{file}/{name}", *difference(ours.get(name), theirs, name, where)))
    return result


def compare(folder):
    folder = Path(folder)
    return [*compare_constants(folder), *compare_arrays(folder), *compare_text(folder),
            *compare_run(folder)]


def main(folder):
    result = compare(folder)
    for file in dict.fromkeys(name.split("/")[0] for name, _, _ in result):
        rows = [row for row in result if row[0].startswith(file)]
        name, gap, tolerance = max(rows, key=lambda row: row[1] / (row[2] or 1))
        print(f"{len(rows):3} compared, largest difference {gap:.1e} of {tolerance:.1e}: {name}")
    for name, gap, tolerance in result:
        if not gap <= tolerance:                                                # nan is not either
            sys.exit(f"{name} differs by {gap:.3g}, where {tolerance:.3g} is allowed")
    print(f"{len(result)} arrays and numbers agree")


if __name__ == "__main__":
    main(Path(__file__).parent)
