"""
Stage 1, supervised fine-tuning: imitate the responses of a data set.

    loss = - sum over response tokens of log p(y_t | x_<=t)  /  number of response tokens

The prompt is read but not learned. EOS is a response token, or the model would never stop. Batches
hold rows of similar lengths, so a token counts more in a short response than in a long one. With
--rows=pairs it imitates the chosen side of pairs: Preferred-FT in Rafailov et al. 2023.
Left out: packing several rows into one, training on the user's turns.

    python train_sft.py --data=data/toy --out=out/toy/sft
"""
from dataclasses import dataclass

import torch

from data.text import load_examples, load_text, show_samples
from prefgpt import (POLICIES, Run, adamw, learning_rate, load_checkpoint, load_model, make_batch,
                     one_run, open_run, optimizer_step, run_cli, set_up)
from prefgpt import GPT, GPTConfig, UserError, token_logprobs


@dataclass
class Config:
    # input and output
    data: str = 'data/toy'          # a data folder, or one JSON Lines file (with --init)
    rows: str = 'sft'               # which rows of the folder: sft, or pairs for their chosen side
    out: str = 'out/toy/sft'        # the run folder to write: ckpt.pt and log.jsonl
    init: str = ''                  # run folder of the initial policy; '': train from scratch
    resume: bool = False            # continue the run in --out, or start it if there is none
    # the model, if trained from scratch
    n_layer: int = 2                # blocks
    n_head: int = 4                 # attention heads
    n_embd: int = 64                # channels
    block_size: int = 128           # maximum length of prompt plus response, in tokens
    init_std: float = 0.1           # std of the initial weights; 0.02 for a full-size GPT-2
    # training
    steps: int = 1250               # optimizer steps
    batch_size: int = 16            # rows per optimizer step
    micro_batch_size: int = 0       # rows per forward pass (0: all); memory, and rounding only
    lr: float = 6e-3                # peak learning rate
    warmup: int = 50                # steps of linear warm-up; then a cosine down to lr / 10
    weight_decay: float = 0.1       # AdamW's, on matrices and embeddings
    grad_clip: float = 1.0          # maximum norm of the gradient
    # the rest
    eval_every: int = 250           # steps between held-out evaluations; each saves a checkpoint
    keep: bool = False              # keep every evaluation's checkpoint, as ckpt-STEP.pt
    max_new_tokens: int = 64        # maximum tokens of a sample shown
    seed: int = 0                   # of the initial weights and the batches
    device: str = ''                # cuda, mps or cpu; '': cuda, else mps, else cpu
    dtype: str = ''                 # float32 or bfloat16; '': bfloat16 on newer GPUs, else float32
    compile: bool = False           # torch.compile the model


@torch.no_grad()
def evaluate(policy, rows, size, device, autocast):
    """Returns the loss per response token over rows (prompt, response), size rows at a time."""
    total, response_tokens = 0.0, 0
    for i in range(0, len(rows), size):
        _, x, y, response_mask = make_batch(rows[i:i + size], device)           # (B, T)
        with autocast:
            total -= token_logprobs(policy, x, y, response_mask).sum().item()
        response_tokens += response_mask.sum().item()
    return {'loss': total / response_tokens}


@one_run
def main(cfg):
    """Trains a policy on demonstrations and returns the last evaluation's numbers."""
    if cfg.rows not in ('sft', 'pairs'):
        raise UserError(f'--rows={cfg.rows}: sft or pairs')
    # --- the same in every script
    saved, (device, autocast) = open_run(cfg, 'sft'), set_up(cfg)

    # --- data and model
    init = load_checkpoint(cfg.init, POLICIES) if cfg.init else None
    for name, size in init['model'].items() if init else ():
        if getattr(cfg, name, size) not in (size, getattr(Config, name, size)):
            raise UserError(f'--{name}={getattr(cfg, name)}: that of --init={cfg.init} is {size}')
    tokenizer, text = load_text(cfg.data, saved or init)
    if saved or init:
        policy = load_model(GPT, saved or init, 'policy', device)
    else:
        policy = GPT(GPTConfig(cfg.block_size, tokenizer.n_vocab, cfg.n_layer, cfg.n_head,
                               cfg.n_embd, cfg.init_std)).to(device)
    print(f'{cfg.out}: {sum(p.numel() for p in policy.parameters()) / 1e6:.2f}M parameters')
    train, val = load_examples(cfg.data, 'sft', tokenizer, text, policy.config.block_size,
                               rows=cfg.rows)
    optimizer = adamw(policy, cfg.weight_decay)
    if cfg.compile:
        policy.compile(dynamic=True)

    # --- the loop
    run = Run(cfg, saved, (train, val), {'init': init and init['id']},
              stage='sft', text=text, models={'policy': policy}, optimizers=[optimizer])
    lengths = [len(prompt) + len(response) for prompt, response in train]
    micro_batch_size = cfg.micro_batch_size or cfg.batch_size
    for step, indices in run.steps(lengths, cfg.batch_size):
        loss = 0.0
        rows = [train[i] for i in indices]
        # Counted over the whole batch, so that the micro-batches' losses add up to its mean
        response_tokens = sum(len(response) for _, response in rows)
        for i in range(0, len(rows), micro_batch_size):
            _, x, y, response_mask = make_batch(rows[i:i + micro_batch_size], device)   # (B, T)
            with autocast:
                logprobs = token_logprobs(policy, x, y, response_mask)          # (B, T)
            micro_loss = -logprobs.sum() / response_tokens
            micro_loss.backward()
            loss += micro_loss.item()

        # --- the same in train_sft, train_rm and train_dpo
        lr = learning_rate(step - 1, cfg.steps, cfg.lr, cfg.warmup)
        norm = optimizer_step(optimizer, policy, lr, cfg.grad_clip, step, loss=loss)
        run.log(step, sum(lengths[i] for i in indices), loss=loss, norm=norm, lr=lr)
        if step % cfg.eval_every == 0 or step == cfg.steps:
            metrics = evaluate(policy, val, micro_batch_size, device, autocast)
            with autocast:
                samples = show_samples(policy, val[:2], tokenizer, cfg.max_new_tokens)
            run.save(step, metrics, samples)
    return run.close()


if __name__ == '__main__':
    run_cli(main, Config)
