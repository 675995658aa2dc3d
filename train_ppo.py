"""
Stage 3, PPO: sample responses, score them, and make the better ones more likely, little by little.

    s    = score; without EOS, at most no_eos_score                                  cap_unfinished
    r_t  = s at the last token  -  beta (log pi(y_t) - log ref(y_t))                 token_rewards
    A_t  = sum over k of (gamma lambda)^k (r_{t+k} + gamma V_{t+k+1} - V_{t+k})      gae
    R    = A + V, what the value model should have predicted
    A    <- (A - mean) / std over all response tokens of the rollout batch           whiten
    loss = max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)),  ratio = pi / pi_old     policy_loss
    loss = (V_new - R)^2 / 2, clipped around V if vf_clip is set                     value_loss
    ref  <- ref + ref_ema (pi - ref), once per rollout batch                         update_ema

Both losses are means over a minibatch's response tokens. PPO is Schulman et al. 2017, the KL in the
reward Ziegler et al. 2019 and Ouyang et al. 2022. Xu et al. 2024 found normalized advantages, large
batches and an EMA reference decisive; studies/README.md says how much of this holds here. beta
weights KL(policy, ref) as in train_dpo.py. A moving reference pulls less, so kl_sft, the KL to the
initial policy, is logged. Left out: a trunk shared with the value model, whitened rewards.

    python train_ppo.py --data=data/toy --init=out/toy/sft --reward=out/toy/rm --out=out/toy/ppo
"""
from dataclasses import dataclass

import torch

from data.judge import load_judge
from data.text import decode_responses, load_examples, load_text, read_text, show_samples
from prefgpt import (POLICIES, Run, adamw, learning_rate, load_checkpoint, load_model, one_run,
                     open_run, optimizer_step, run_cli, set_up)
from prefgpt import (GPT, GPTConfig, ScalarGPT, UserError, generate, last_column, last_scores, rng,
                     token_logprobs, x_and_y)


@dataclass
class Config:
    # input and output
    data: str = 'data/toy'          # a data folder, or one JSON Lines file
    out: str = 'out/toy/ppo'        # the run folder to write: ckpt.pt and log.jsonl
    init: str = 'out/toy/sft'       # run folder of the initial policy
    reward: str = 'out/toy/rm'      # reward to train on: a reward model's run folder or a reward.py
    judge: str = ''                 # reward.py for evaluation only, logged as gold; '': none
    resume: bool = False            # continue the run in --out, or start it if there is none
    # rollouts
    rollout_size: int = 128         # responses per rollout batch
    max_new_tokens: int = 64        # maximum tokens of a response
    temperature: float = 1.0        # of sampling and of every logprob
    no_eos_score: float = -1.0      # maximum score of a response without EOS
    # the method
    beta: float = 0.2               # weight of KL(policy, ref) in the reward; 0: off
    gamma: float = 1.0              # discount per token
    gae_lambda: float = 0.95        # 0: one-step (TD) advantages; 1: Monte Carlo advantages
    whiten: bool = True             # normalize advantages over the rollout batch
    clip_eps: float = 0.2           # no gain from a ratio beyond 1 +- clip_eps
    vf_clip: float = 0.0            # the same for values, around the rollout's values; 0: off
    ref_ema: float = 0.005          # EMA rate of the reference, per rollout batch; 0: fixed
    # training
    steps: int = 60                 # rollout batches
    ppo_epochs: int = 2             # passes over a rollout batch
    batch_size: int = 32            # responses per optimizer step
    micro_batch_size: int = 0       # rows per forward pass (0: all); memory, and rounding only
    lr: float = 3e-4                # peak learning rate of the policy
    value_lr: float = 2e-3          # peak learning rate of the value model
    warmup: int = 5                 # rollout batches of linear warm-up; then a cosine to a tenth
    weight_decay: float = 0.0       # AdamW's, on matrices and embeddings
    grad_clip: float = 1.0          # maximum norm of each model's gradient
    # the rest
    eval_every: int = 5             # rollout batches between evaluations; each saves a checkpoint
    keep: bool = False              # keep every evaluation's checkpoint, as ckpt-STEP.pt
    seed: int = 0                   # of prompts, samples and minibatches
    device: str = ''                # cuda, mps or cpu; '': cuda, else mps, else cpu
    dtype: str = ''                 # float32 or bfloat16; '': bfloat16 on newer GPUs, else float32
    compile: bool = False           # torch.compile policy, reference and value model


def token_rewards(scores, logprobs, ref_logprobs, response_mask, beta):
    """
    Returns -beta (logprobs - ref_logprobs) per response token, (B, T), plus scores (B,) on the last
    one. The difference has the expectation KL(policy, ref) under the policy: the k1 estimator.
    """
    rewards = -beta * (logprobs - ref_logprobs)
    column = last_column(response_mask)[:, None]                                # (B, 1)
    rewards = rewards.scatter_add(1, column, scores[:, None].to(rewards))
    return rewards.masked_fill(~response_mask, 0.0)


def gae(rewards, values, response_mask, gamma, gae_lambda):
    """
    Computes generalized advantage estimates (Schulman et al. 2016) and the returns, (B, T) each.

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lambda A_{t+1}

    The value after the last response token is 0, even where a response was stopped without EOS.
    """
    rewards = rewards.masked_fill(~response_mask, 0.0)
    values = values.masked_fill(~response_mask, 0.0)
    advantages = torch.zeros_like(values)                                       # (B, T)
    advantage = next_value = torch.zeros_like(values[:, 0])                     # (B,)
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # Nothing crosses the response's ends: neither in from the padding nor out to the prompt
        advantage = (delta + gamma * gae_lambda * advantage) * response_mask[:, t]
        advantages[:, t] = advantage
        next_value = values[:, t]
    return advantages, advantages + values


def whiten(x, mask):
    """Returns x with mean 0 and standard deviation 1 over the mask, and 0 outside it, (B, T)."""
    mean = x[mask].mean()
    variance = x[mask].var(correction=0)        # biased: a single token's variance is 0, not nan
    return ((x - mean) * torch.rsqrt(variance + 1e-8)).masked_fill(~mask, 0.0)


def policy_loss(logprobs, old_logprobs, advantages, clip_eps):
    """Returns PPO's clipped loss and the ratio, (B, T) each; the caller sums over the mask."""
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return torch.maximum(-advantages * ratio, -advantages * clipped), ratio


def value_loss(values, old_values, returns, vf_clip):
    """Returns half the squared error, (B, T); with vf_clip, the larger of clipped and unclipped."""
    loss = (values - returns) ** 2
    if vf_clip:
        clipped = old_values + (values - old_values).clamp(-vf_clip, vf_clip)
        loss = torch.maximum(loss, (clipped - returns) ** 2)
    return 0.5 * loss


@torch.no_grad()
def update_ema(ref, policy, rate):
    """Moves every tensor of ref, in place: ref <- ref + rate (policy - ref)."""
    for r, p in zip(ref.parameters(), policy.parameters()):
        r.lerp_(p, rate)


def cap_unfinished(scores, ended, no_eos_score):
    """Caps the scores (B,) of responses without EOS; a score already below the cap stays."""
    return torch.where(ended.to(scores.device), scores, scores.clamp(max=no_eos_score))


def in_parts(function, size, *tensors):
    """Applies function to tensors (B, ...), size rows at a time."""
    return torch.cat([function(*part) for part in zip(*(t.split(size) for t in tensors))])


def grid_logprobs(model, x, y, mask, cfg):
    """Returns token_logprobs, (B, T), micro_batch_size rows at a time."""
    return in_parts(lambda *part: token_logprobs(model, *part, cfg.temperature),
                    cfg.micro_batch_size or len(x), x, y, mask)


def load_scorer(reward, init, device, size=0):
    """
    Returns scorer(tokens, response_mask, prompts, texts) -> scores (B,), from a reward.py or from a
    reward model's run (size rows at a time), and the checkpoint that the value model starts from.
    """
    if reward.endswith('.py'):
        judge = load_judge(reward)

        def scorer(tokens, response_mask, prompts, texts):
            numbers = [judge(prompt, text)['reward'] for prompt, text in zip(prompts, texts)]
            return torch.tensor(numbers, dtype=torch.float32, device=device)
        return scorer, {**init, 'id': read_text(reward)}
    source = load_checkpoint(reward, ['rm'])
    if source['fingerprint'] != init['fingerprint']:
        raise UserError(f"{reward} has a different tokenizer from the policy's")
    model = load_model(ScalarGPT, source, 'reward_model', device).requires_grad_(False)

    def scorer(tokens, response_mask, prompts, texts):
        return in_parts(lambda *part: last_scores(model, *part), size or len(tokens), tokens,
                        response_mask) - source['shift']
    return scorer, source


@torch.no_grad()
def rollout(policy, ref, scorer, prompts, tokenizer, cfg, generator):
    """
    Samples one response per prompt. Returns the grid, a dict of (B, T) tensors: x, y, mask,
    logprobs, ref_logprobs. Also returns scores and ended, (B,), and texts of prompts and responses.
    """
    tokens, mask = generate(policy, prompts, cfg.max_new_tokens, tokenizer.eot_token,
                            cfg.temperature, generator)
    responses, ended = decode_responses(tokens, mask, tokenizer)
    texts = [tokenizer.decode(prompt) for prompt in prompts], responses
    x, y = x_and_y(tokens)
    grid = {'x': x, 'y': y, 'mask': mask, 'logprobs': grid_logprobs(policy, x, y, mask, cfg),
            'ref_logprobs': grid_logprobs(ref, x, y, mask, cfg)}
    return grid, scorer(tokens, mask, *texts), ended, texts


def rollout_metrics(*parts):
    """Returns the logged means of parts (grid, scores, ended); entropy, -log pi, is per token."""
    numbers = [torch.stack([scores, (grid['logprobs'] - grid['ref_logprobs']).sum(1),
                            -grid['logprobs'].sum(1), grid['mask'].sum(1), ended.to(scores)])
               for grid, scores, ended in parts]                                # (5, B) each
    score, kl, surprise, length, eos = torch.cat(numbers, dim=1).mean(1).tolist()
    return {'score': score, 'kl': kl, 'entropy': surprise / length, 'length': length, 'eos': eos}


def evaluate(policy, start_policy, scorer, judge, rows, tokenizer, cfg):
    """Returns rollout_metrics on held-out prompts (kl as kl_sft), and gold, the judge's reward."""
    generator, parts, golds = rng(cfg.seed, 0, 'eval'), [], []
    prompts = [row[0] for row in rows]
    for i in range(0, len(rows), cfg.rollout_size):     # no more at once than in training
        *part, texts = rollout(policy, start_policy, scorer, prompts[i:i + cfg.rollout_size],
                               tokenizer, cfg, generator)
        parts.append(part)
        golds += [judge(prompt, text)['reward'] for prompt, text in zip(*texts)] if judge else []
    metrics = rollout_metrics(*parts)
    gold = {'gold': sum(golds) / len(golds)} if judge else {}
    return {'score': metrics.pop('score'), **gold, 'kl_sft': metrics.pop('kl'), **metrics}


def update_metrics(logprobs, grid, advantages):
    """
    Returns three numbers over response tokens, from the policy's logprobs (B, T) after its steps.
    approx_kl is the mean of r - 1 - log r, r = pi / pi_old, an estimate of KL(pi_old, pi) (k3).
    explained_variance is 1 - var(R - V) / var(R), where R - V = A. adv_std is A's, not whitened.
    """
    log_ratio = (logprobs - grid['logprobs'])[grid['mask']]                     # (M,)
    both = torch.stack([advantages, grid['returns']])[:, grid['mask']]          # (2, M)
    adv_std, returns_std = both.std(1, correction=0).tolist()
    return {'approx_kl': (log_ratio.expm1() - log_ratio).mean().item(),
            'explained_variance': 1 - (adv_std / max(returns_std, 1e-8)) ** 2, 'adv_std': adv_std}


def minibatch_gradient(policy, value_model, grid, indices, cfg, autocast):
    """
    Adds the gradients of both losses over the rows of a minibatch, micro_batch_size rows at a time.
    Returns the logged metrics; ratio is the one furthest from 1.
    """
    indices = indices.to(grid['x'].device)
    response_tokens = grid['mask'][indices].sum()               # (): of the whole minibatch
    losses, ratios = [], []
    for micro in indices.split(cfg.micro_batch_size or cfg.batch_size):
        width = int(last_column(grid['mask'][micro]).max()) + 1         # cut shared padding
        part = {name: tensor[micro, :width] for name, tensor in grid.items()}       # (R, width)
        mask = part['mask']
        with autocast:
            logprobs = token_logprobs(policy, part['x'], part['y'], mask, cfg.temperature)
        # Outside the mask logprobs and advantages are 0, so the ratio is 1 and the loss is 0
        pg, ratio = policy_loss(logprobs, part['logprobs'], part['advantages'], cfg.clip_eps)
        pg_loss = pg.sum() / response_tokens
        pg_loss.backward()
        ratios.append(ratio.detach().flatten())
        # The value model runs after the policy's backward pass: fewer activations are held at once
        with autocast:
            values = value_model(part['x'])
        vf = value_loss(values, part['values'], part['returns'], cfg.vf_clip)
        vf_loss = (vf * mask).sum() / response_tokens
        vf_loss.backward()
        losses.append(torch.stack([pg_loss, vf_loss]).detach())
    ratios = torch.cat(ratios)
    far = (ratios - 1).abs()
    clipped = (far > cfg.clip_eps).sum() / response_tokens
    pg_loss, vf_loss = sum(losses).tolist()     # read once, because each reading waits for the GPU
    return {'ratio': ratios[far.argmax()].item(), 'clip_frac': clipped.item(),
            'pg_loss': pg_loss, 'vf_loss': vf_loss}


@one_run
def main(cfg):
    """Trains a policy against a reward and returns the last evaluation's numbers."""
    if cfg.temperature <= 0:
        raise UserError(f'--temperature={cfg.temperature}: PPO samples, so it must be above 0')
    # --- the same in every script
    saved, (device, autocast) = open_run(cfg, 'ppo'), set_up(cfg)

    # --- data and models: policy, reference, value model, scorer; and start_policy for kl_sft
    init = load_checkpoint(cfg.init, POLICIES)
    tokenizer, text = load_text(cfg.data, saved or init)
    scorer, source = load_scorer(cfg.reward, init, device, cfg.micro_batch_size)
    judge = load_judge(cfg.judge) if cfg.judge else None
    policy = load_model(GPT, saved or init, 'policy', device)
    ref = load_model(GPT, saved or init, 'ref' if saved else 'policy', device).requires_grad_(False)
    start_policy = ref                          # with ref_ema=0 it stays the initial policy
    if cfg.ref_ema:
        start_policy = load_model(GPT, init, 'policy', device).requires_grad_(False)
    print(f'{cfg.out}: {sum(p.numel() for p in policy.parameters()) / 1e6:.2f}M parameters')
    block_size = min(policy.config.block_size, source['model']['block_size'])
    train, val = load_examples(cfg.data, 'prompts', tokenizer, text, block_size,
                               cfg.max_new_tokens)                              # rows (prompt,)
    val = val[:128]                             # enough for a mean
    value_model = ScalarGPT(GPTConfig(**source['model'])).to(device)    # in the source's shape
    if saved:
        value_model.load_state_dict(saved['weights']['value_model'])
    elif source['stage'] == 'rm':
        value_model.load_state_dict(source['weights']['reward_model'])
        torch.nn.init.zeros_(value_model.score.weight)      # a value is not a score
    else:
        value_model.body.load_state_dict(source['weights']['policy'])
    if judge:
        judge(tokenizer.decode(val[0][0]), '')  # a broken judge fails before the first step
    # A weight whose gradient is far below eps hardly moves. With 1e-8 Adam would move it as far as
    # any other, on noise (cf. Huang et al. 2024, The N+ Implementation Details of RLHF with PPO)
    optimizer = adamw(policy, cfg.weight_decay, eps=1e-5)
    value_optimizer = adamw(value_model, cfg.weight_decay, eps=1e-5)
    if cfg.compile:
        for model in (policy, ref, value_model):
            model.compile(dynamic=True)

    # --- the loop
    run = Run(cfg, saved, (train, val), {'init': init['id'], 'reward': source['id']},
              stage='ppo', text=text, optimizers=[optimizer, value_optimizer],
              models={'policy': policy, 'value_model': value_model, 'ref': ref})
    # All lengths given as 1, so nothing is sorted: by length, prompts would be grouped by kind
    for step, indices in run.steps([1] * len(train), cfg.rollout_size):
        # 1. Sample and score
        with autocast:
            grid, scores, ended, _ = rollout(policy, ref, scorer, [train[i][0] for i in indices],
                                             tokenizer, cfg, rng(cfg.seed, step - 1, 'rollout'))
        # 2. Find which tokens were better than expected
        mask = grid['mask']                                                     # (B, T)
        with autocast, torch.no_grad():
            grid['values'] = in_parts(value_model, cfg.micro_batch_size or len(mask), grid['x'])
        rewards = token_rewards(cap_unfinished(scores, ended, cfg.no_eos_score), grid['logprobs'],
                                grid['ref_logprobs'], mask, cfg.beta)           # (B, T)
        advantages, grid['returns'] = gae(rewards, grid['values'], mask, cfg.gamma, cfg.gae_lambda)
        # After the returns, so that these keep the units of the score; over the whole rollout batch
        grid['advantages'] = whiten(advantages, mask) if cfg.whiten else advantages
        # 3. Several passes over the batch, one optimizer step per minibatch
        lr = learning_rate(step - 1, cfg.steps, cfg.lr, cfg.warmup)
        value_lr = learning_rate(step - 1, cfg.steps, cfg.value_lr, cfg.warmup)
        minibatches = -(-len(mask) // cfg.batch_size)   # rounded up, of sizes as even as can be
        updates = []                                    # the metrics of each optimizer step
        for epoch in range(cfg.ppo_epochs):
            shuffle = rng(cfg.seed, (step - 1) * cfg.ppo_epochs + epoch, 'shuffle')
            order = torch.randperm(len(mask), generator=shuffle)
            for minibatch in order.tensor_split(minibatches):
                update = minibatch_gradient(policy, value_model, grid, minibatch, cfg, autocast)
                norm = optimizer_step(optimizer, policy, lr, cfg.grad_clip, step, **update)
                optimizer_step(value_optimizer, value_model, value_lr, cfg.grad_clip, step)
                updates.append({**update, 'norm': norm})
        update_ema(ref, policy, cfg.ref_ema)            # 4. The reference follows if ref_ema > 0

        with autocast, torch.no_grad():
            logprobs = grid_logprobs(policy, grid['x'], grid['y'], mask, cfg)    # (B, T)
        means = {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]}
        means['ratio'] = updates[0]['ratio']            # before any step: pi is pi_old
        run.log(step, int(mask.sum()), **rollout_metrics((grid, scores, ended)), **means,
                 **update_metrics(logprobs, grid, advantages), lr=lr)
        if step % cfg.eval_every == 0 or step == cfg.steps:
            with autocast:
                metrics = evaluate(policy, start_policy, scorer, judge, val, tokenizer, cfg)
                samples = show_samples(policy, val[:2], tokenizer, cfg.max_new_tokens)
            run.save(step, metrics, samples)
    return run.close()


if __name__ == '__main__':
    run_cli(main, Config)
