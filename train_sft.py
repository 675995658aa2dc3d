"""
Stage 1, supervised fine-tuning: imitate the responses of a data set.

    loss = - sum over response tokens of log p(y_t | x_<=t)  /  number of response tokens

The prompt is read but not learned; EOS is a response token, or the model would never stop. Given
pairs (--rows=pairs) it imitates their chosen side: Pref-FT in Tajwar et al. 2024.
What it does not do: pack several rows into one, or train on the user's turns.

    python train_sft.py --data=data/toy --out=out/toy/sft
"""
import time
from dataclasses import dataclass

import torch

from prefgpt import (GPT, POLICIES, GPTConfig, Log, UserError, adamw, batches, check_inputs,
                     encode_rows, learning_rate, load_checkpoint, load_model, load_split, load_text,
                     make_batch, open_run, optimizer_step, run_cli, save_checkpoint, set_up,
                     show_samples, token_logprobs)


@dataclass
class Config:
    # where from, where to
    data: str = 'data/toy'          # a data folder, or one JSON Lines file (with --init)
    rows: str = 'sft'               # the folder's rows: sft, or pairs for their chosen side
    out: str = 'out/toy/sft'        # the run folder to write: ckpt.pt, log.jsonl, samples.txt
    init: str = ''                  # a run folder whose policy to start from; '': from scratch
    resume: bool = False            # continue the run in --out, or start it if there is none
    # the model, where it starts from scratch
    n_layer: int = 2                # blocks
    n_head: int = 4                 # attention heads
    n_embd: int = 64                # channels
    block_size: int = 128           # most tokens of prompt and response together
    init_std: float = 0.1           # spread of the initial weights; 0.02 for a GPT-2 of full size
    # training
    steps: int = 1250               # optimizer steps
    batch_size: int = 16            # rows in an optimizer step
    micro_batch_size: int = 0       # rows in one forward pass; 0: all; changes memory, not results
    lr: float = 6e-3                # peak learning rate
    warmup: int = 50                # steps of linear warm-up; then a cosine down to lr / 10
    weight_decay: float = 0.1       # AdamW's, on matrices and embeddings
    grad_clip: float = 1.0          # largest norm of the gradient
    # the rest
    eval_every: int = 250           # steps between evaluations on held-out rows
    save_every: int = 250           # steps between checkpoints
    max_new_tokens: int = 64        # longest sample shown
    seed: int = 0                   # of the initial weights, the batches and the samples
    device: str = ''                # cuda, mps or cpu; '': the first that is there
    dtype: str = ''                 # float32 or bfloat16; '': bfloat16 on CUDA, else float32
    compile: bool = False           # torch.compile the model's body


@torch.no_grad()
def evaluate(policy, rows, size, device, autocast):
    """The loss per response token over held-out rows (prompt, response), size at a time."""
    total, response_tokens = 0.0, 0
    for i in range(0, len(rows), size):
        _, x, y, response_mask = make_batch(rows[i:i + size], device)
        with autocast:
            total -= token_logprobs(policy, x, y, response_mask).sum().item()
        response_tokens += response_mask.sum().item()
    return {'loss': total / response_tokens}


def main(cfg):
    """Trains a policy on demonstrations and returns the last evaluation's numbers."""
    saved = open_run(cfg, 'sft')
    if saved and saved['step'] == cfg.steps:
        print(f'{cfg.out} is finished: {cfg.steps} steps')
        return saved['metrics']
    device, autocast = set_up(cfg)

    # --- data and model
    init = saved or (load_checkpoint(cfg.init, POLICIES) if cfg.init else None)
    tokenizer, template = load_text(cfg.data, init)
    if init:
        policy = load_model(GPT, init, 'policy', device)
    else:
        if cfg.n_embd % cfg.n_head:
            raise UserError(f'--n_head={cfg.n_head} does not divide --n_embd={cfg.n_embd}')
        policy = GPT(GPTConfig(cfg.block_size, tokenizer.n_vocab, cfg.n_layer, cfg.n_head,
                               cfg.n_embd, cfg.init_std)).to(device)
    print(f'policy: {sum(p.numel() for p in policy.parameters()) / 1e6:.2f}M parameters')
    train, val = load_split(cfg.data, 'sft', template, cfg.rows)
    train = encode_rows(train, 'sft', tokenizer, policy.config.block_size, name='train')
    val = encode_rows(val, 'sft', tokenizer, policy.config.block_size, name='val')
    inputs = check_inputs(cfg, saved, train, val)
    optimizer = adamw(policy, cfg.weight_decay)
    if cfg.compile:
        policy.compile()
    start, metrics = 0, {}
    if saved:
        start, metrics = saved['step'], saved['metrics']
        optimizer.load_state_dict(saved['optimizers']['policy'])

    # --- the loop
    log = Log(cfg.out, start, cfg.steps)
    lengths = [len(prompt) + len(response) for prompt, response in train]
    micro_batch_size = cfg.micro_batch_size or cfg.batch_size
    for step, indices in zip(range(start, cfg.steps),
                             batches(lengths, cfg.batch_size, cfg.seed, start)):
        began = time.time()
        rows = [train[i] for i in indices]
        # The whole batch's response tokens, so that micro-batches add up to the same mean
        response_tokens = sum(len(response) for _, response in rows)
        loss = 0.0
        for i in range(0, len(rows), micro_batch_size):
            _, x, y, response_mask = make_batch(rows[i:i + micro_batch_size], device)
            with autocast:
                logprobs = token_logprobs(policy, x, y, response_mask)          # (B, T)
            micro_loss = -logprobs.sum() / response_tokens
            micro_loss.backward()
            loss += micro_loss.detach()
        loss, lr = loss.item(), learning_rate(step, cfg.steps, cfg.lr, cfg.warmup)
        norm = optimizer_step(optimizer, policy, lr, cfg.grad_clip, step + 1, loss=loss)
        log.step(step + 1, began, sum(lengths[i] for i in indices),
                 loss=loss, norm=norm, lr=lr)

        saving = (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps
        if saving or (step + 1) % cfg.eval_every == 0:
            metrics = evaluate(policy, val, micro_batch_size, device, autocast)
            with autocast:
                samples = show_samples(policy, [row[0] for row in val[:2]], tokenizer,
                                       cfg.max_new_tokens)
            log.eval(step + 1, metrics, samples)
        if saving:
            save_checkpoint(f'{cfg.out}/ckpt.pt', 'sft', step + 1, cfg, tokenizer, template,
                            metrics, {'policy': policy}, {'policy': optimizer},
                            inputs=inputs)
    log.close()
    return metrics


if __name__ == '__main__':
    run_cli(main, Config)
