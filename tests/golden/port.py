"""Ports prefgpt to plain numpy: SFT, a reward model, DPO and PPO, with gradients by hand.

It was written from README.md, the porting guide, alone, and from no code of prefgpt.

    python tests/golden/port.py

recomputes, in the order of the guide, every number in the .npz files from the eight rows below, the
weights of model.npz and the few given arrays (see INPUTS). It uses no other stored number: a second
step continues from this file's own first step.

Everything is float32. Weights, gradients and intermediates are dictionaries from the guide's names
to arrays. A layer's backward function follows its forward function: `d` is the slope of the loss in
the layer's output, the result is the slope in its input `z`, and the slopes in its weights are
added to `g`. The backward pass recomputes the little that it needs from the forward pass.

Letters of the shapes: B rows, T positions, C channels, H heads of D channels, V words, N pairs,
R rows of a minibatch, P prompts, M response tokens.
"""

import math
import sys
from pathlib import Path

import numpy as np

LAYERS, HEADS, EOS, MAX_NEW_TOKENS = 2, 2, 16, 8
WEIGHT_DECAY, GRAD_CLIP = 0.1, 1.5
SFT_LR, SFT_WARMUP, SFT_STEPS = 0.01, 2, 10
RM_LR, DPO_LR, PPO_LR, VALUE_LR = 0.005, 0.005, 0.004, 0.003
BETA, LABEL_SMOOTHING, TEMPERATURE, NO_EOS_SCORE = 0.3, 0.1, 0.7, -1.0
GAMMA, GAE_LAMBDA, CLIP_EPS, VF_CLIP, REF_EMA = 0.95, 0.9, 0.2, 0.2, 0.25

PROMPTS = [[3, 7, 1], [16], [2, 16, 13, 6, 10], [12, 0]]
CHOSEN = [[5, 2, 9, 16], [11, 4, 16], [14, 1, 12, 15, 0, 7], [6, 16]]
REJECTED = [[16], [8, 0, 16], [9, 9, 16], [13, 3, 11, 2, 0]]

# What is given and not computed, besides all of model.npz.
INPUTS = {
    "sample.npz": ("draw_logits", "draw_u", "prompts", "prompt_lengths", "u"),
    "ppo.npz": ("minibatches", "near.values", "near.old_values", "near.returns"),
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
    return np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))


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
    return z.reshape(*z.shape[:2], HEADS, -1).swapaxes(1, 2)


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
    z = {"x": x, "embedded": h}
    for i in range(LAYERS):
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
    d = norm_back(d, z[f"h{LAYERS - 1}.out"], p, "ln_f", g)
    for i in reversed(range(LAYERS)):
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


def policy_logprobs(p, batch, temperature=1.0):
    """Returns logprobs of y, 0 off the mask, and what `policy_back` needs."""
    z = body(p, batch["x"])
    logits = z["hidden"] @ p["wte.weight"].T                                    # (B, T, V)
    every = logits / temperature
    every = every - every.max(-1, keepdims=True)
    every = every - np.log(np.exp(every).sum(-1, keepdims=True))                # log softmax
    logprobs = np.take_along_axis(every, batch["y"][..., None], -1)[..., 0]     # (B, T)
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


def generate(p, prompts, u, temperature):
    """Continues each prompt up to EOS or MAX_NEW_TOKENS, each row at its own position."""
    responses = [[] for _ in prompts]
    for t in range(MAX_NEW_TOKENS):
        batch = layout(prompts, responses)
        last = batch["prompt_lengths"] + batch["response_lengths"] - 1          # (P,)
        hidden = body(p, batch["tokens"])["hidden"][np.arange(len(last)), last]     # (P, C)
        drawn = draw(hidden @ p["wte.weight"].T, u[:, t], temperature)          # (P,)
        for response, token in zip(responses, drawn.tolist()):
            if EOS not in response:
                response.append(token)
    return layout(prompts, responses)


def sample_stage(policy, given):
    prompts = [row[:p].tolist() for row, p in zip(given["prompts"], given["prompt_lengths"])]
    out = {}
    for end, temperature in (("", 1.0), ("_t07", TEMPERATURE), ("_t0", 0)):
        batch = generate(policy, prompts, given["u"], temperature)
        out["draws" + end] = draw(given["draw_logits"], given["draw_u"], temperature)
        out |= {"tokens" + end: batch["tokens"], "response_mask" + end: batch["response_mask"]}
        if end == "":
            out["logits"] = policy_logprobs(policy, batch)[1]["logits"][batch["response_mask"]]
    return out


# ----------------------------------------------------------------------------- The optimizer step

def global_norm(g):
    return np.sqrt(sum((a**2).sum() for a in g.values()))


def adamw(p, g, lr, state=None):
    """Takes one clipped step; returns weights after it, state (k, m, v), and the norm of g."""
    total = global_norm(g)
    scale = min(1, GRAD_CLIP / (total + 1e-6))
    zeros = {name: np.zeros_like(a) for name, a in p.items()}
    k, m, v = state or (0, zeros, zeros)
    k, after = k + 1, {}
    m = {name: 0.9 * m[name] + 0.1 * scale * g[name] for name in p}
    v = {name: 0.95 * v[name] + 0.05 * (scale * g[name]) ** 2 for name in p}
    for name, a in p.items():
        a = a - lr * WEIGHT_DECAY * a if a.ndim == 2 else a
        root = np.sqrt(v[name] / (1 - 0.95**k))
        after[name] = a - lr * (m[name] / (1 - 0.9**k)) / (root + 1e-5)
    return after, (k, m, v), total


def rate(s, n, w, lr):
    """Returns the rate of step s of n: w steps of warm-up to lr, then a cosine to lr / 10."""
    if s < w:
        return lr * (s + 1) / w
    return lr * (0.1 + 0.9 * (1 + math.cos(math.pi * (s - w) / max(1, n - 1 - w))) / 2)


# ----------------------------------------------------------------------------- 4. SFT

def sft_stage(p, batch):
    mask, M, state = batch["response_mask"], int(batch["response_mask"].sum()), None
    out = {"schedule": np.float32([rate(s, 11, 4, 1) for s in range(11)])}
    for s, name in enumerate(("first", "second")):
        lr = rate(s, SFT_STEPS, SFT_WARMUP, SFT_LR)
        logprobs, z = policy_logprobs(p, batch)
        g = policy_back(mask * np.float32(-1 / M), z, p)                        # slope in logprobs
        p, state, total = adamw(p, g, lr, state)
        step = {"loss": -logprobs.sum() / M, "lr": np.float32(lr), "norm": total}
        step |= {"m.ln_f.bias": state[1]["ln_f.bias"], "v.ln_f.bias": state[2]["ln_f.bias"]}
        out |= named(name + ".", {**step, **named("grads.", g), **named("after.", p)})
    return out


# ----------------------------------------------------------------------------- 5. Reward model

def log_sigmoid(z):
    return -np.logaddexp(np.float32(0), -z)


def sigmoid(z):
    return np.exp(log_sigmoid(z))


def reward_stage(p, batch):
    everywhere, z = numbers(p, batch["tokens"])                                 # (B, T+1)
    last = batch["prompt_lengths"] + batch["response_lengths"] - 1              # (B,)
    scores = everywhere[np.arange(len(last)), last]                             # (B,)
    chosen, rejected = np.split(scores, 2)                                      # (N,) each
    losses, up = -log_sigmoid(chosen - rejected), sigmoid(rejected - chosen) / len(chosen)
    slope = np.zeros_like(everywhere)                                           # d loss / d number
    slope[np.arange(len(last)), last] = np.concatenate([-up, up])
    g = numbers_back(slope, z, p)
    after, _, total = adamw(p, g, RM_LR)
    out = {"scores_everywhere": everywhere, "scores": scores, "shift": scores.mean()}
    out |= {"chosen": chosen, "rejected": rejected, "losses": losses, "loss": losses.mean()}
    return {**out, "norm": total, **named("grads.", g), **named("after.", after)}


# ----------------------------------------------------------------------------- 6. DPO

def dpo_losses(h, smoothing=0.0):
    """Returns the losses of the pairs and their slopes in h, (N,) each."""
    margin, keep = BETA * h, 1 - smoothing
    losses = -keep * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)
    return losses, BETA * (sigmoid(margin) - keep)


def ipo_losses(h):
    return (h - 1 / (2 * BETA)) ** 2, 2 * (h - 1 / (2 * BETA))


def dpo_stage(policy, ref, batch):
    logprobs, z = policy_logprobs(policy, batch)
    chosen, rejected = np.split(logprobs.sum(1), 2)                             # (N,) each
    ref_chosen, ref_rejected = np.split(policy_logprobs(ref, batch)[0].sum(1), 2)
    h = (chosen - ref_chosen) - (rejected - ref_rejected)                       # (N,)
    out = {"chosen": chosen, "rejected": rejected, "margin": BETA * h}
    out |= {"ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
    kinds = {"_ipo": ipo_losses(h), "_smoothed": dpo_losses(h, LABEL_SMOOTHING), "": dpo_losses(h)}
    for kind, (losses, dh) in kinds.items():
        slope = np.concatenate([dh, -dh])[:, None] / len(h) * batch["response_mask"]    # (B, T)
        g = policy_back(slope, z, policy)
        out |= {"losses" + kind: losses, "loss" + kind: losses.mean()}
        out["norm" + kind] = global_norm(g)
    after, _, _ = adamw(policy, g, DPO_LR)                                      # g: DPO's, the last
    return {**out, **named("grads.", g), **named("after.", after)}


# ----------------------------------------------------------------------------- 7. PPO

def gae(rewards, values, batch):
    """Returns advantages (B, T), backwards over each row's response; nothing follows the last."""
    advantages = np.zeros_like(rewards)
    for b, mask in enumerate(batch["response_mask"]):
        A = V_next = np.float32(0)
        for t in reversed(np.flatnonzero(mask)):
            A = rewards[b, t] + GAMMA * V_next - values[b, t] + GAMMA * GAE_LAMBDA * A
            advantages[b, t], V_next = A, values[b, t]
    return advantages


def whiten(A, mask):
    M = int(mask.sum())
    mean = (A * mask).sum() / M
    var = ((A - mean) ** 2 * mask).sum() / M                                    # by M, not M - 1
    return (A - mean) / np.sqrt(var + 1e-8) * mask                              # (B, T)


def rollout(policy, ref, value_model, reward, batch):
    """Returns the numbers that are the same in every pass over the rollout batch."""
    mask, rows = batch["response_mask"], np.arange(len(batch["x"]))             # (B, T), (B,)
    last = batch["prompt_lengths"] + batch["response_lengths"] - 1              # (B,), in tokens
    logprobs, _ = policy_logprobs(policy, batch, TEMPERATURE)                   # (B, T)
    ref_logprobs, _ = policy_logprobs(ref, batch, TEMPERATURE)
    values, _ = numbers(value_model, batch["x"])                                # (B, T)
    raw = reward["scores"] - reward["shift"]                                    # (B,)
    ended = batch["tokens"][rows, last] == EOS
    scores = np.where(ended, raw, np.minimum(raw, np.float32(NO_EOS_SCORE)))
    kl = logprobs - ref_logprobs
    rewards = -BETA * kl
    rewards[rows, last - 1] += scores                                           # y: the last there
    advantages, B, M = gae(rewards, values, batch), len(rows), int(mask.sum())
    log = {"score": raw.mean(), "kl": kl.sum() / B, "entropy": -logprobs.sum() / M}
    log |= {"length": np.float32(M / B), "eos": np.float32(ended.mean())}
    out = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values, "kl": kl}
    out |= {"raw_scores": raw, "ended": ended, "scores": scores, "rewards": rewards}
    out |= {"advantages": advantages, "returns": (advantages + values) * mask}
    out |= {"advantages_white": whiten(advantages, mask)}
    out |= {"flat_white": whiten(1e-4 * advantages, mask)}
    return {**out, **named("logged.", log)}


def policy_losses(logprobs, old, A):
    """Returns ratios, losses and slopes in the logprobs, (R, T) each."""
    ratio = np.exp(logprobs - old)
    plain, clipped = -A * ratio, -A * np.clip(ratio, 1 - CLIP_EPS, 1 + CLIP_EPS)
    return ratio, np.maximum(plain, clipped), plain * (plain >= clipped)


def value_losses(values, old, returns, vf_clip):
    """Returns losses and slopes in the values, (R, T) each."""
    moved = values - old
    c = old + np.clip(moved, -vf_clip, vf_clip) if vf_clip else values
    plain, clipped = (values - returns) ** 2, (c - returns) ** 2
    # Within the clip range c is `values` but for rounding, which must not set the slope to 0.
    inside = abs(moved) <= vf_clip
    return np.maximum(plain, clipped) / 2, (values - returns) * (inside | (plain >= clipped))


def policy_step(p, state, old, batch):
    n = int(batch["response_mask"].sum())
    logprobs, z = policy_logprobs(p, batch, TEMPERATURE)                        # (R, T)
    ratio, losses, slope = policy_losses(logprobs, old["logprobs"], old["advantages_white"])
    g = policy_back(slope / n, z, p, TEMPERATURE)                               # A: 0 off the mask
    p, state, total = adamw(p, g, PPO_LR, state)
    out = {"logprobs": logprobs, "ratio": ratio, "pg_losses": losses, "pg_loss": losses.sum() / n}
    out |= {"policy.norm": total, **named("policy.grads.", g), **named("policy.after.", p)}
    return p, state, out


def value_step(p, state, old, batch):
    mask, n, out = batch["response_mask"], int(batch["response_mask"].sum()), {}
    values, z = numbers(p, batch["x"])                                          # (R, T)
    for end, vf_clip in (("_unclipped", 0), ("", VF_CLIP)):
        losses, slope = value_losses(values, old["values"], old["returns"], vf_clip)
        losses, slope = losses * mask, slope * mask
        out |= {"vf_losses" + end: losses, "vf_loss" + end: losses.sum() / n}
    g = numbers_back(slope / n, z, p)                                           # of the clipped one
    p, state, total = adamw(p, g, VALUE_LR, state)
    out |= {"values": values, "value.norm": total}
    return p, state, {**out, **named("value.grads.", g), **named("value.after.", p)}


def ppo_stage(policy, ref, value_model, reward, batch, given):
    out = rollout(policy, ref, value_model, reward, batch)
    near = (given["near." + k] for k in ("values", "old_values", "returns"))
    out["near.slopes"] = value_losses(*near, VF_CLIP)[1]
    fixed = {k: out[k] for k in ("logprobs", "values", "returns", "advantages_white")}
    policy_state = value_state = None
    for name, rows in zip(("first", "second"), given["minibatches"]):
        old, mini = ({k: a[rows] for k, a in z.items()} for z in (fixed, batch))    # (R, T)
        policy, policy_state, policy_out = policy_step(policy, policy_state, old, mini)
        value_model, value_state, value_out = value_step(value_model, value_state, old, mini)
        out |= named(name + ".", {**policy_out, **value_out})
    after = {k: a + REF_EMA * (policy[k] - a) for k, a in ref.items()}          # once, at the end
    return {**out, **named("ref_after.", after)}


# ----------------------------------------------------------------------------- The comparison

def recompute(stored):
    """Computes the arrays of every file, by file and name, in the guide's order."""
    model = stored["model.npz"]
    policy, ref = part(model, "policy."), part(model, "ref.")
    batch = layout(PROMPTS + PROMPTS, CHOSEN + REJECTED)
    logprobs, z = policy_logprobs(policy, batch)
    z |= {"logits": z["logits"][batch["response_mask"]], "logprobs": logprobs}
    z |= {"seq_logprobs": logprobs.sum(1)}
    z |= {"logprobs_t07": policy_logprobs(policy, batch, TEMPERATURE)[0]}
    out = {"batch.npz": {**z, **batch}}
    out["sample.npz"] = sample_stage(policy, stored["sample.npz"])
    out["sft.npz"] = sft_stage(policy, batch)
    out["rm.npz"] = reward = reward_stage(part(model, "reward_model."), batch)
    out["dpo.npz"] = dpo_stage(policy, ref, batch)
    value_model, given = part(model, "value_model."), stored["ppo.npz"]
    out["ppo.npz"] = ppo_stage(policy, ref, value_model, reward, batch, given)
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


def compare(folder):
    """Returns (file/name, difference, tolerance) of every stored array that is not given."""
    files = ("model", "batch", "sample", "sft", "rm", "dpo", "ppo")
    stored = {f"{file}.npz": dict(np.load(Path(folder) / f"{file}.npz")) for file in files}
    computed, result = recompute(stored), []
    for file, ours in computed.items():
        for name, theirs in stored[file].items():
            if name not in INPUTS.get(file, ()):
                where = places(file, name, theirs, computed["batch.npz"], stored["ppo.npz"])
                result.append((f"{file}/{name}", *difference(ours.get(name), theirs, name, where)))
    return result


def main(folder):
    result = compare(folder)
    for file in dict.fromkeys(name.split("/")[0] for name, _, _ in result):
        rows = [row for row in result if row[0].startswith(file)]
        name, gap, tolerance = max(rows, key=lambda row: row[1] / (row[2] or 1))
        print(f"{len(rows):3} arrays, largest difference {gap:.1e} of {tolerance:.1e}: {name}")
    for name, gap, tolerance in result:
        if not gap <= tolerance:                                                # nan is not either
            sys.exit(f"{name} differs by {gap:.3g}, where {tolerance:.3g} is allowed")
    print(f"{len(result)} arrays agree")


if __name__ == "__main__":
    main(Path(__file__).parent)
