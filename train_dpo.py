"""
Stage 3b, direct preference optimization: the pairs themselves train the policy, no reward model.

    h    = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected))
    loss = - log sigmoid(beta h)            DPO, Rafailov et al. 2023, eq. 7
    loss = (h - 1 / (2 beta))^2             IPO, Azar et al. 2024, with --ipo

log pi(response) is a SUM over response tokens, EOS included (a mean is another method). beta
weighs KL(policy, ref), the same quantity as in train_ppo.py: given enough data, and PPO's reference
fixed, both have the optimum pi ~ ref exp(score / beta). The reference is the policy before its
first step: its logprobs of all pairs are computed then and kept, so no second network is needed.
So the loss starts at log 2 = 0.6931 (IPO's at 1 / (4 beta^2)), policy and reference being equal.
That both chosen and rejected logprobs fall is normal: the loss sees their difference alone.
What it does not do: sample, move the reference, or divide by the length.

    python train_dpo.py --data=data/toy --init=out/toy/sft --out=out/toy/dpo
"""
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from prefgpt import (GPT, POLICIES, Log, UserError, adamw, batches, check_inputs, encode_rows,
                     learning_rate, load_checkpoint, load_model, load_split, load_text, make_batch,
                     open_run, optimizer_step, run_cli, save_checkpoint, set_up, show_samples,
                     token_logprobs)


@dataclass
class Config:
    # where from, where to
    data: str = 'data/toy'          # a data folder, or one JSON Lines file
    out: str = 'out/toy/dpo'        # the run folder to write: ckpt.pt, log.jsonl, samples.txt
    init: str = 'out/toy/sft'       # the run folder whose policy to start from, and to refer to
    resume: bool = False            # continue the run in --out, or start it if there is none
    # the method
    beta: float = 0.2               # weight of KL(policy, ref); smaller moves further from ref
    label_smoothing: float = 0.0    # share of labels taken to be wrong (conservative DPO)
    ipo: bool = False               # IPO's squared loss instead of DPO's
    # training
    steps: int = 500                # optimizer steps
    batch_size: int = 32            # pairs in an optimizer step
    micro_batch_size: int = 0       # pairs in one forward pass; 0: all; changes memory, not results
    lr: float = 1e-4                # peak learning rate
    warmup: int = 20                # steps of linear warm-up; then a cosine down to lr / 10
    weight_decay: float = 0.0       # AdamW's, on matrices and embeddings
    grad_clip: float = 1.0          # largest norm of the gradient
    # the rest
    eval_every: int = 250           # steps between evaluations on held-out pairs
    save_every: int = 250           # steps between checkpoints
    max_new_tokens: int = 64        # longest sample shown
    seed: int = 0                   # of the batches
    device: str = ''                # cuda, mps or cpu; '': the first that is there
    dtype: str = ''                 # float32 or bfloat16; '': bfloat16 on CUDA, else float32
    compile: bool = False           # torch.compile the model's body


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0):
    """DPO's loss, (B,), of the seq_logprobs (B,) of both responses under policy and reference."""
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    # With label_smoothing e the label is believed with 1 - e: Mitchell 2023, "cDPO"
    return (-(1 - label_smoothing) * F.logsigmoid(margin)
            - label_smoothing * F.logsigmoid(-margin))


def ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """IPO's loss, (B,): pulls the difference of log-ratios to 1 / (2 beta), and no further."""
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    return (h - 1 / (2 * beta)) ** 2


def pair_logprobs(policy, pairs, device):
    """seq_logprobs of the chosen and of the rejected responses, (B,) each, in one forward pass."""
    _, x, y, response_mask = make_batch(
        [(prompt, chosen) for prompt, chosen, _ in pairs]
        + [(prompt, rejected) for prompt, _, rejected in pairs], device)        # (2B, T)
    return token_logprobs(policy, x, y, response_mask).sum(1).chunk(2)


@torch.no_grad()
def all_logprobs(policy, pairs, size, device, autocast):
    """seq_logprobs (2, N) of all pairs, chosen then rejected, size pairs at a time."""
    lengths = [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in pairs]
    order = sorted(range(len(pairs)), key=lengths.__getitem__)      # little padding
    out = torch.empty(2, len(pairs), device=device)
    for i in range(0, len(pairs), size):
        rows = order[i:i + size]
        with autocast:
            out[:, rows] = torch.stack(pair_logprobs(policy, [pairs[j] for j in rows], device))
    return out


def losses_of(cfg, chosen, rejected, ref_chosen, ref_rejected):
    """The configured loss (B,), and for the log the margin (B,), beta h."""
    margin = cfg.beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    if cfg.ipo:
        return ipo_loss(chosen, rejected, ref_chosen, ref_rejected, cfg.beta), margin
    return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, cfg.beta,
                    cfg.label_smoothing), margin


def pair_metrics(losses, margin, chosen, rejected):
    """What is logged of a batch of pairs; chosen and rejected are mean seq_logprobs, in nats."""
    return {'loss': losses.mean().item(), 'accuracy': (margin > 0).float().mean().item(),
            'margin': margin.mean().item(), 'chosen': chosen.mean().item(),
            'rejected': rejected.mean().item()}


def main(cfg):
    """Trains a policy on pairs and returns the last evaluation's numbers."""
    saved = open_run(cfg, 'dpo')
    if saved and saved['step'] == cfg.steps:
        print(f'{cfg.out} is finished: {cfg.steps} steps')
        return saved['metrics']
    if cfg.beta <= 0 or cfg.ipo and cfg.label_smoothing:
        raise UserError(f'--beta={cfg.beta} must be above 0, and --label_smoothing='
                        f"{cfg.label_smoothing} is DPO's, not IPO's")
    device, autocast = set_up(cfg)

    # --- data and model
    init = saved or load_checkpoint(cfg.init, POLICIES)
    tokenizer, template = load_text(cfg.data, init)
    policy = load_model(GPT, init, 'policy', device)
    print(f'policy: {sum(p.numel() for p in policy.parameters()) / 1e6:.2f}M parameters')
    train, val = load_split(cfg.data, 'pairs', template)
    train = encode_rows(train, 'pairs', tokenizer, policy.config.block_size, name='train')
    val = encode_rows(val, 'pairs', tokenizer, policy.config.block_size, name='val')
    inputs = check_inputs(cfg, saved, train, val)
    optimizer = adamw(policy, cfg.weight_decay)
    if cfg.compile:
        policy.compile()
    start, metrics = 0, {}
    micro_batch_size = cfg.micro_batch_size or cfg.batch_size
    if saved:
        start, metrics = saved['step'], saved['metrics']
        optimizer.load_state_dict(saved['optimizers']['policy'])
        ref_train, ref_val = (saved[name].to(device) for name in ('ref_train', 'ref_val'))
    else:
        # The policy has not moved yet: it is its own reference
        ref_train = all_logprobs(policy, train, micro_batch_size, device, autocast)     # (2, N)
        ref_val = all_logprobs(policy, val, micro_batch_size, device, autocast)

    # --- the loop
    log = Log(cfg.out, start, cfg.steps)
    lengths = [2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in train]
    for step, indices in zip(range(start, cfg.steps),
                             batches(lengths, cfg.batch_size, cfg.seed, start)):
        began = time.time()
        parts = []
        for i in range(0, len(indices), micro_batch_size):
            rows = indices[i:i + micro_batch_size]
            with autocast:
                chosen, rejected = pair_logprobs(policy, [train[j] for j in rows], device)
            losses, margin = losses_of(cfg, chosen, rejected, *ref_train[:, rows])
            (losses.sum() / len(indices)).backward()    # the mean over the whole batch
            parts.append(torch.stack([losses, margin, chosen, rejected]).detach())
        metrics_now = pair_metrics(*torch.cat(parts, dim=1))
        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup)
        norm = optimizer_step(optimizer, policy, lr, cfg.grad_clip, step + 1,
                              loss=metrics_now['loss'])
        log.step(step + 1, began, sum(lengths[i] for i in indices),
                 **metrics_now, norm=norm, lr=lr)

        saving = (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps
        if saving or (step + 1) % cfg.eval_every == 0:
            chosen, rejected = all_logprobs(policy, val, micro_batch_size, device, autocast)
            metrics = pair_metrics(*losses_of(cfg, chosen, rejected, *ref_val), chosen, rejected)
            with autocast:
                samples = show_samples(policy, [row[0] for row in val[:2]], tokenizer,
                                       cfg.max_new_tokens)
            log.eval(step + 1, metrics, samples)
        if saving:
            save_checkpoint(f'{cfg.out}/ckpt.pt', 'dpo', step + 1, cfg, tokenizer, template,
                            metrics, {'policy': policy}, {'policy': optimizer},
                            inputs=inputs, ref_train=ref_train, ref_val=ref_val)
    log.close()
    return metrics


if __name__ == '__main__':
    run_cli(main, Config)
