"""
Stage 2, the reward model: one number per response, learned from which of two was preferred.

    loss = - log sigmoid(score(prompt, chosen) - score(prompt, rejected))      (Bradley-Terry)

The score is a linear head on the hidden state of the last response token, EOS included. A shift
common to all scores leaves the loss as it is, so the scores are shifted afterwards to mean 0 over
the held-out responses. They are not scaled: they stay logits, and PPO's beta means DPO's beta.
What it does not do: margins between grades, or scores for single tokens.

    python train_rm.py --data=data/toy --init=out/toy/sft --out=out/toy/rm
"""
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from prefgpt import (POLICIES, GPTConfig, Log, ScalarGPT, adamw, batches, check_inputs, encode_rows,
                     last_scores, learning_rate, load_checkpoint, load_model, load_split, load_text,
                     make_batch, open_run, optimizer_step, run_cli, save_checkpoint, set_up)


@dataclass
class Config:
    # where from, where to
    data: str = 'data/toy'          # a data folder, or one JSON Lines file
    out: str = 'out/toy/rm'         # the run folder to write: ckpt.pt, log.jsonl, samples.txt
    init: str = 'out/toy/sft'       # the run folder whose policy the reward model starts from
    resume: bool = False            # continue the run in --out, or start it if there is none
    # training
    steps: int = 2000               # optimizer steps
    batch_size: int = 32            # pairs in an optimizer step
    micro_batch_size: int = 0       # pairs in one forward pass; 0: all; changes memory, not results
    lr: float = 3e-3                # peak learning rate
    warmup: int = 50                # steps of linear warm-up; then a cosine down to lr / 10
    weight_decay: float = 0.1       # AdamW's, on matrices and embeddings
    grad_clip: float = 1.0          # largest norm of the gradient
    # the rest
    eval_every: int = 500           # steps between evaluations on held-out pairs
    save_every: int = 500           # steps between checkpoints
    seed: int = 0                   # of the batches
    device: str = ''                # cuda, mps or cpu; '': the first that is there
    dtype: str = ''                 # float32 or bfloat16; '': bfloat16 on CUDA, else float32
    compile: bool = False           # torch.compile the model's body


def reward_loss(chosen_scores, rejected_scores):
    """Bradley and Terry's -log P(chosen beats rejected), (B,), of two scores (B,)."""
    return -F.logsigmoid(chosen_scores - rejected_scores)


def score_pairs(model, pairs, device):
    """Scores of the chosen and of the rejected responses, (B,) each, in one forward pass."""
    tokens, _, _, response_mask = make_batch(
        [(prompt, chosen) for prompt, chosen, _ in pairs]
        + [(prompt, rejected) for prompt, _, rejected in pairs], device)        # (2B, T+1)
    return last_scores(model, tokens, response_mask).chunk(2)


def pair_metrics(losses, chosen, rejected):
    """What is logged of a batch of pairs; accuracy is the share of margins above 0."""
    return {'loss': losses.mean().item(), 'accuracy': (chosen > rejected).float().mean().item(),
            'margin': (chosen - rejected).mean().item(), 'chosen': chosen.mean().item(),
            'rejected': rejected.mean().item()}


@torch.no_grad()
def evaluate(model, pairs, size, device, autocast):
    """Metrics on held-out pairs, size at a time, and the scores, chosen and rejected (N,) each."""
    parts = []
    for i in range(0, len(pairs), size):
        with autocast:
            parts.append(score_pairs(model, pairs[i:i + size], device))
    chosen, rejected = (torch.cat(side) for side in zip(*parts))
    return pair_metrics(reward_loss(chosen, rejected), chosen, rejected), chosen, rejected


def main(cfg):
    """Trains a reward model on pairs and returns the last evaluation's numbers."""
    saved = open_run(cfg, 'rm')
    if saved and saved['step'] == cfg.steps:
        print(f'{cfg.out} is finished: {cfg.steps} steps')
        return saved['metrics']
    device, autocast = set_up(cfg)

    # --- data and model
    init = saved or load_checkpoint(cfg.init, POLICIES)
    tokenizer, template = load_text(cfg.data, init)
    if saved:
        model = load_model(ScalarGPT, saved, 'reward_model', device)
    else:
        model = ScalarGPT(GPTConfig(**init['model'])).to(device)
        model.body.load_state_dict(init['weights']['policy'])
    print(f'reward model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters')
    train, val = load_split(cfg.data, 'pairs', template)
    train = encode_rows(train, 'pairs', tokenizer, model.config.block_size, name='train')
    val = encode_rows(val, 'pairs', tokenizer, model.config.block_size, name='val')
    inputs = check_inputs(cfg, saved, train, val)
    optimizer = adamw(model, cfg.weight_decay)
    if cfg.compile:
        model.compile()
    start, metrics = 0, {}
    if saved:
        start, metrics = saved['step'], saved['metrics']
        optimizer.load_state_dict(saved['optimizers']['reward_model'])

    # --- the loop
    log = Log(cfg.out, start, cfg.steps)
    lengths = [2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in train]
    micro_batch_size = cfg.micro_batch_size or cfg.batch_size
    for step, indices in zip(range(start, cfg.steps),
                             batches(lengths, cfg.batch_size, cfg.seed, start)):
        began = time.time()
        pairs = [train[i] for i in indices]
        parts = []
        for i in range(0, len(pairs), micro_batch_size):
            with autocast:
                chosen, rejected = score_pairs(model, pairs[i:i + micro_batch_size], device)
            losses = reward_loss(chosen, rejected)                              # (B,)
            (losses.sum() / len(pairs)).backward()      # the mean over the whole batch
            parts.append(torch.stack([losses, chosen, rejected]).detach())
        metrics_now = pair_metrics(*torch.cat(parts, dim=1))
        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup)
        norm = optimizer_step(optimizer, model, lr, cfg.grad_clip, step + 1,
                              loss=metrics_now['loss'])
        log.step(step + 1, began, sum(lengths[i] for i in indices),
                 **metrics_now, norm=norm, lr=lr)

        saving = (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps
        if saving or (step + 1) % cfg.eval_every == 0:
            metrics, chosen, rejected = evaluate(model, val, micro_batch_size, device, autocast)
            shift = torch.cat([chosen, rejected]).mean().item()
            samples = [f'{tokenizer.decode(val[i][0])}\n'
                       f'{chosen[i] - shift:6.2f} chosen  {tokenizer.decode(val[i][1])}\n'
                       f'{rejected[i] - shift:6.2f} rejected{tokenizer.decode(val[i][2])}'
                       for i in range(min(2, len(val)))]
            log.eval(step + 1, metrics, samples)
        if saving:
            save_checkpoint(f'{cfg.out}/ckpt.pt', 'rm', step + 1, cfg, tokenizer, template,
                            metrics, {'reward_model': model}, {'reward_model': optimizer},
                            inputs=inputs, shift=shift)
    log.close()
    return metrics


if __name__ == '__main__':
    run_cli(main, Config)
