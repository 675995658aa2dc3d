"""
Stage 2, the reward model: one score per response, learned from which of two was preferred.

    loss = - log sigmoid(score(prompt, chosen) - score(prompt, rejected))      (Bradley-Terry)

A linear head reads the score off the hidden state of the last response token, EOS or not. Adding a
constant to all scores leaves the loss unchanged: their held-out mean is saved as shift, and PPO
subtracts it. Scores are not scaled: they stay logits, and beta means the same in PPO and DPO.

    python train_rm.py --data=data/toy --init=out/toy/sft --out=out/toy/rm
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data.text import load_examples, load_text
from prefgpt import (POLICIES, Run, adamw, learning_rate, load_checkpoint, load_model, make_batch,
                     one_run, open_run, optimizer_step, run_cli, set_up)
from prefgpt import GPTConfig, ScalarGPT, last_scores, pair_metrics


@dataclass
class Config:
    # input and output
    data: str = 'data/toy'          # a data folder, or one JSON Lines file
    out: str = 'out/toy/rm'         # the run folder to write: ckpt.pt and log.jsonl
    init: str = 'out/toy/sft'       # run folder of the initial policy
    resume: bool = False            # continue the run in --out, or start it if there is none
    # training
    steps: int = 2000               # optimizer steps
    batch_size: int = 32            # pairs per optimizer step
    micro_batch_size: int = 0       # pairs per forward pass (0: all); memory, and rounding only
    lr: float = 3e-3                # peak learning rate
    warmup: int = 50                # steps of linear warm-up; then a cosine down to lr / 10
    weight_decay: float = 0.1       # AdamW's, on matrices and embeddings
    grad_clip: float = 1.0          # maximum norm of the gradient
    # the rest
    eval_every: int = 500           # steps between held-out evaluations; each saves a checkpoint
    keep: bool = False              # keep every evaluation's checkpoint, as ckpt-STEP.pt
    seed: int = 0                   # of the batches
    device: str = ''                # cuda, mps or cpu; '': cuda, else mps, else cpu
    dtype: str = ''                 # float32 or bfloat16; '': bfloat16 on newer GPUs, else float32
    compile: bool = False           # torch.compile the model


def reward_loss(chosen_scores, rejected_scores):
    """Returns the Bradley-Terry loss -log P(chosen beats rejected), (B,), from the scores (B,)."""
    return -F.logsigmoid(chosen_scores - rejected_scores)


def score_pairs(model, pairs, device):
    """Returns the scores of the chosen and of the rejected responses, (2, B), in one pass."""
    tokens, x, y, response_mask = make_batch(
        [(prompt, chosen) for prompt, chosen, _ in pairs]
        + [(prompt, rejected) for prompt, _, rejected in pairs], device)        # (2B, T+1), (2B, T)
    return last_scores(model, tokens, response_mask).view(2, -1)


@torch.no_grad()
def all_scores(model, pairs, size, device, autocast):
    """Returns the scores of all pairs, (2, N), chosen then rejected, size pairs at a time."""
    with autocast:
        return torch.cat([score_pairs(model, pairs[i:i + size], device)
                          for i in range(0, len(pairs), size)], dim=1)


@one_run
def main(cfg):
    """Trains the model on pairs and returns the last evaluation's numbers."""
    # --- the same in every script
    saved, (device, autocast) = open_run(cfg, 'rm'), set_up(cfg)

    # --- data and model
    init = load_checkpoint(cfg.init, (*POLICIES, 'rm'))
    tokenizer, text = load_text(cfg.data, saved or init)
    if (saved or init)['stage'] == 'rm':
        model = load_model(ScalarGPT, saved or init, 'reward_model', device)
    else:
        model = ScalarGPT(GPTConfig(**init['model'])).to(device)
        model.body.load_state_dict(init['weights']['policy'])
    print(f'{cfg.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters')
    train, val = load_examples(cfg.data, 'pairs', tokenizer, text, model.config.block_size)
    optimizer = adamw(model, cfg.weight_decay)
    if cfg.compile:
        model.compile(dynamic=True)
    micro_batch_size = cfg.micro_batch_size or cfg.batch_size

    # --- the loop
    run = Run(cfg, saved, (train, val), {'init': init['id']}, stage='rm',
              text=text, models={'reward_model': model}, optimizers=[optimizer],
              shift=saved['shift'] if saved else 0.0)
    # Tokens read per pair: the prompt is read twice
    lengths = [2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in train]
    for step, indices in run.steps(lengths, cfg.batch_size):
        parts = []
        for i in range(0, len(indices), micro_batch_size):
            micro = indices[i:i + micro_batch_size]
            with autocast:
                chosen, rejected = score_pairs(model, [train[j] for j in micro], device)    # (B,)
            losses, margins = reward_loss(chosen, rejected), chosen - rejected      # (B,)
            (losses.sum() / len(indices)).backward()    # the mean over the whole batch
            parts.append(torch.stack([losses, margins, chosen, rejected]).detach())     # (4, B)
        logged = pair_metrics(*torch.cat(parts, dim=1))

        # --- the same in train_sft, train_rm and train_dpo
        lr = learning_rate(step - 1, cfg.steps, cfg.lr, cfg.warmup)
        norm = optimizer_step(optimizer, model, lr, cfg.grad_clip, step, loss=logged['loss'])
        run.log(step, sum(lengths[i] for i in indices), **logged, norm=norm, lr=lr)
        if step % cfg.eval_every == 0 or step == cfg.steps:
            chosen, rejected = all_scores(model, val, micro_batch_size, device, autocast)   # (N,)
            losses, margins = reward_loss(chosen, rejected), chosen - rejected
            metrics = pair_metrics(losses, margins, chosen, rejected)
            shift = torch.cat([chosen, rejected]).mean().item()
            samples = [f'{tokenizer.decode(val[i][0])}\n'
                       f'{chosen[i] - shift:6.2f} chosen  {tokenizer.decode(val[i][1])}\n'
                       f'{rejected[i] - shift:6.2f} rejected{tokenizer.decode(val[i][2])}'
                       for i in range(min(2, len(val)))]
            run.save(step, metrics, samples, shift=shift)
    return run.close()


if __name__ == '__main__':
    run_cli(main, Config)
