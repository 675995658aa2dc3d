"""
Stage 4, direct preference optimization: pairs train the policy directly, without a reward model.

    h    = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected))
    loss = - log sigmoid(beta h)            DPO, Rafailov et al. 2023, eq. 7
    loss = (h - 1 / (2 beta))^2             IPO, Azar et al. 2024, with --ipo

log pi(response), seq_logprobs in the code, is a SUM over response tokens. beta weights KL(pi, ref)
as in train_ppo.py: both have the optimum pi = ref exp(score / beta) / Z, with enough data and a
fixed reference. The reference is pi before its first step, so the loss starts at ln 2 = 0.6931
(IPO: 1 / (4 beta^2)). Both log pi terms may fall, because the loss sees only h.

    python train_dpo.py --data=data/toy --init=out/toy/sft --out=out/toy/dpo
"""
import itertools, math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data.text import load_examples, load_text, show_samples
from prefgpt import (POLICIES, Run, adamw, batches, learning_rate, load_checkpoint, load_model,
                     make_batch, one_run, open_run, optimizer_step, run_cli, set_up)
from prefgpt import GPT, UserError, pair_metrics, token_logprobs


@dataclass
class Config:
    # input and output
    data: str = 'data/toy'          # a data folder, or one JSON Lines file
    out: str = 'out/toy/dpo'        # the run folder to write: ckpt.pt and log.jsonl
    init: str = 'out/toy/sft'       # run folder of the initial policy
    resume: bool = False            # continue the run in --out, or start it if there is none
    # the method
    beta: float = 0.2               # weight of KL(policy, ref); a low one lets pi drift further
    label_smoothing: float = 0.0    # share of labels taken to be wrong (conservative DPO)
    ipo: bool = False               # IPO's squared loss instead of DPO's
    # training
    steps: int = 500                # optimizer steps
    batch_size: int = 32            # pairs per optimizer step
    micro_batch_size: int = 0       # pairs per forward pass (0: all); memory, and rounding only
    lr: float = 1e-4                # peak learning rate
    warmup: int = 20                # steps of linear warm-up; then a cosine down to lr / 10
    weight_decay: float = 0.0       # AdamW's, on matrices and embeddings
    grad_clip: float = 1.0          # maximum norm of the gradient
    # the rest
    eval_every: int = 250           # steps between held-out evaluations; each saves a checkpoint
    keep: bool = False              # keep every evaluation's checkpoint, as ckpt-STEP.pt
    max_new_tokens: int = 64        # maximum tokens of a sample shown
    seed: int = 0                   # of the batches
    device: str = ''                # cuda, mps or cpu; '': cuda, else mps, else cpu
    dtype: str = ''                 # float32 or bfloat16; '': bfloat16 on newer GPUs, else float32
    compile: bool = False           # torch.compile the model


def log_ratio(chosen, rejected, ref_chosen, ref_rejected):
    """Returns h, (B,), from the summed logprobs (B,) of both responses under policy and ref."""
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0):
    """Returns DPO's loss, (B,), from the summed logprobs (B,) that log_ratio takes."""
    margins = beta * log_ratio(chosen, rejected, ref_chosen, ref_rejected)
    # With label_smoothing e, a label is correct with probability 1 - e (cDPO, Mitchell 2023)
    return (-(1 - label_smoothing) * F.logsigmoid(margins)
            - label_smoothing * F.logsigmoid(-margins))


def ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Returns IPO's loss, (B,), which pulls h to 1 / (2 beta) and no further."""
    return (log_ratio(chosen, rejected, ref_chosen, ref_rejected) - 1 / (2 * beta)) ** 2


def pair_logprobs(policy, pairs, device):
    """Returns summed logprobs of the chosen and the rejected responses, (2, B), in one pass."""
    tokens, x, y, response_mask = make_batch(
        [(prompt, chosen) for prompt, chosen, _ in pairs]
        + [(prompt, rejected) for prompt, _, rejected in pairs], device)        # (2B, T+1), (2B, T)
    return token_logprobs(policy, x, y, response_mask).sum(1).view(2, -1)


@torch.no_grad()
def all_logprobs(policy, pairs, size, device, autocast):
    """Returns summed logprobs of all pairs, (2, N), chosen then rejected, size pairs at a time."""
    lengths = [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in pairs]
    order = sorted(range(len(pairs)), key=lengths.__getitem__)      # less padding
    out = torch.empty(2, len(pairs), device=device)
    for i in range(0, len(pairs), size):
        if i and i % (100 * size) == 0:             # over many pairs, this takes minutes
            print(f'logprobs of {i} of {len(pairs)} pairs', flush=True)
        indices = order[i:i + size]
        with autocast:
            out[:, indices] = pair_logprobs(policy, [pairs[j] for j in indices], device)
    return out


def losses_and_margins(cfg, *seq_logprobs):
    """Returns the configured loss and the margin beta h, (B,) each, from log_ratio's arguments."""
    losses = (ipo_loss(*seq_logprobs, cfg.beta) if cfg.ipo else
              dpo_loss(*seq_logprobs, cfg.beta, cfg.label_smoothing))
    return losses, cfg.beta * log_ratio(*seq_logprobs)


@one_run
def main(cfg):
    """Trains the model on pairs and returns the last evaluation's numbers."""
    if cfg.beta <= 0 or cfg.ipo and cfg.label_smoothing:
        raise UserError('--beta must be above 0, and --ipo takes no --label_smoothing')
    # --- the same in every script
    saved, (device, autocast) = open_run(cfg, 'dpo'), set_up(cfg)

    # --- data and model
    init = load_checkpoint(cfg.init, POLICIES)
    tokenizer, text = load_text(cfg.data, saved or init)
    model = load_model(GPT, saved or init, 'policy', device)
    print(f'{cfg.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters')
    train, val = load_examples(cfg.data, 'pairs', tokenizer, text, model.config.block_size)
    optimizer = adamw(model, cfg.weight_decay)
    if cfg.compile:
        model.compile(dynamic=True)
    micro_batch_size = cfg.micro_batch_size or cfg.batch_size
    # Tokens read per pair: the prompt is read twice
    lengths = [2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in train]
    if saved:
        ref_train, ref_val = (saved[name].to(device) for name in ('ref_train', 'ref_val'))
    else:       # the policy has not moved yet: it is its own reference
        ref_val = all_logprobs(model, val, micro_batch_size, device, autocast)  # (2, N)
        steps = itertools.islice(batches(lengths, cfg.batch_size, cfg.seed), cfg.steps)
        visited = sorted({i for indices in steps for i in indices})     # no step needs the others
        ref_train = torch.full((2, len(train)), math.nan, device=device)
        ref_train[:, visited] = all_logprobs(model, [train[i] for i in visited], micro_batch_size,
                                             device, autocast)

    # --- the loop
    run = Run(cfg, saved, (train, val), {'init': init['id']}, text=text, ref_val=ref_val,
              stage='dpo', models={'policy': model}, optimizers=[optimizer], ref_train=ref_train)
    for step, indices in run.steps(lengths, cfg.batch_size):
        parts = []
        for i in range(0, len(indices), micro_batch_size):
            micro = indices[i:i + micro_batch_size]
            with autocast:
                chosen, rejected = pair_logprobs(model, [train[j] for j in micro], device)  # (B,)
            losses, margins = losses_and_margins(cfg, chosen, rejected, *ref_train[:, micro])
            (losses.sum() / len(indices)).backward()    # the mean over the whole batch
            parts.append(torch.stack([losses, margins, chosen, rejected]).detach())     # (4, B)
        logged = pair_metrics(*torch.cat(parts, dim=1))

        # --- the same in train_sft, train_rm and train_dpo
        lr = learning_rate(step - 1, cfg.steps, cfg.lr, cfg.warmup)
        norm = optimizer_step(optimizer, model, lr, cfg.grad_clip, step, loss=logged['loss'])
        run.log(step, sum(lengths[i] for i in indices), **logged, norm=norm, lr=lr)
        if step % cfg.eval_every == 0 or step == cfg.steps:
            chosen, rejected = all_logprobs(model, val, micro_batch_size, device, autocast)  # (N,)
            losses, margins = losses_and_margins(cfg, chosen, rejected, *ref_val)
            metrics = pair_metrics(losses, margins, chosen, rejected)
            with autocast:
                samples = show_samples(model, val[:2], tokenizer, cfg.max_new_tokens)
            run.save(step, metrics, samples)
    return run.close()


if __name__ == '__main__':
    run_cli(main, Config)
