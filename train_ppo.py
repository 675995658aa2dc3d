"""
Stage 3a, PPO: sample responses, score them, and make the better ones more likely, a little a time.

    r_t  = score at the last token  -  beta (log pi(y_t) - log ref(y_t))             token_rewards
    A_t  = sum over k of (gamma lambda)^k (r_{t+k} + gamma V_{t+k+1} - V_{t+k})      gae
    R    = A + V, what the value model should have said
    A    <- (A - mean) / std over all response tokens of the rollout batch           whiten
    loss = max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)),  ratio = pi / pi_old     policy_loss
    loss = (V_new - R)^2 / 2, clipped around V if vf_clip is set                     value_loss
    ref  <- ref + ref_ema (pi - ref), once per rollout batch                         update_ema

Schulman et al. 2017 with the three things that Xu et al. 2024 found decisive: normalized
advantages, large batches, and a reference that follows as an exponential moving average. beta
weighs KL(policy, ref), the same quantity as in train_dpo.py; a reference that follows loosens the
pull to where PPO began, so kl_sft is logged too.
Policy, reference, reward model and value model are four networks, and a frozen copy of the first
policy is kept for kl_sft. What it does not do: share a trunk between policy and value, adapt beta,
whiten rewards.

    python train_ppo.py --data=data/toy --init=out/toy/sft --reward=out/toy/rm --out=out/toy/ppo
"""
import time
from dataclasses import dataclass

import torch

from prefgpt import (GPT, POLICIES, GPTConfig, Log, ScalarGPT, UserError, adamw, batches,
                     check_inputs, decode_responses, encode_rows, generate, last_scores,
                     learning_rate, load_checkpoint, load_judge, load_model, load_split, load_text,
                     open_run, optimizer_step, rng, run_cli, save_checkpoint, set_up, show_samples,
                     token_logprobs)


@dataclass
class Config:
    # where from, where to
    data: str = 'data/toy'          # a data folder, or one JSON Lines file
    out: str = 'out/toy/ppo'        # the run folder to write: ckpt.pt, log.jsonl, samples.txt
    init: str = 'out/toy/sft'       # the run folder whose policy to start from, and to refer to
    reward: str = 'out/toy/rm'      # the run folder of a reward model, or a reward.py
    judge: str = ''                 # a reward.py for evaluations alone, logged as gold; '': none
    resume: bool = False            # continue the run in --out, or start it if there is none
    # rollouts
    rollout_size: int = 128         # responses sampled in a step
    max_new_tokens: int = 64        # longest response
    temperature: float = 1.0        # of sampling, and of every logprob
    no_eos_score: float = -1.0      # a response without EOS scores this at most
    # the method
    beta: float = 0.2               # weight of KL(policy, ref) in the reward; 0: off
    gamma: float = 1.0              # discount per token
    gae_lambda: float = 0.95        # 0: one-step advantages; 1: whole-response advantages
    whiten: bool = True             # normalize advantages over the rollout batch
    clip_eps: float = 0.2           # the ratio counts within 1 +- clip_eps
    vf_clip: float = 0.0            # values move at most so far from the rollout's; 0: off
    ref_ema: float = 0.005          # share by which the reference follows in a step; 0: fixed
    # training
    steps: int = 60                 # rollout batches
    ppo_epochs: int = 2             # passes over a rollout batch
    batch_size: int = 32            # responses in an optimizer step
    micro_batch_size: int = 0       # responses in a forward pass; 0: all; memory, not results
    lr: float = 3e-4                # peak learning rate of the policy
    value_lr: float = 2e-3          # peak learning rate of the value model
    warmup: int = 5                 # steps of linear warm-up; then a cosine down to a tenth
    weight_decay: float = 0.0       # AdamW's, on matrices and embeddings
    grad_clip: float = 1.0          # largest norm of each model's gradient
    # the rest
    eval_every: int = 20            # steps between evaluations on held-out prompts
    save_every: int = 20            # steps between checkpoints
    seed: int = 0                   # of prompts, samples and minibatches
    device: str = ''                # cuda, mps or cpu; '': the first that is there
    dtype: str = ''                 # float32 or bfloat16; '': bfloat16 on CUDA, else float32
    compile: bool = False           # torch.compile the models' bodies


def token_rewards(scores, logprobs, ref_logprobs, response_mask, beta):
    """
    (B, T): -beta (logprobs - ref_logprobs) on response tokens, and scores (B,) on the last one.

    The mean of the difference over samples is KL(policy, ref), token by token (the k1 estimator).
    """
    rewards = -beta * (logprobs - ref_logprobs)
    columns = torch.arange(response_mask.size(1), device=scores.device)
    last_column = (response_mask * columns).amax(1, keepdim=True)               # (B, 1)
    rewards = rewards.scatter_add(1, last_column, scores[:, None].to(rewards))
    return rewards.masked_fill(~response_mask, 0.0)


def gae(rewards, values, response_mask, gamma, gae_lambda):
    """
    Generalized advantage estimation, Schulman et al. 2016: advantages and returns, (B, T).

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lambda A_{t+1}

    The value after the last response token is 0, whatever stands in the padding.
    """
    rewards = rewards.masked_fill(~response_mask, 0.0)
    values = values.masked_fill(~response_mask, 0.0)
    advantages = torch.zeros_like(values)
    advantage = next_value = torch.zeros_like(values[:, 0])                     # (B,)
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # Nothing flows past the response, neither in from the padding nor on into the prompt
        advantage = (delta + gamma * gae_lambda * advantage) * response_mask[:, t]
        advantages[:, t] = advantage
        next_value = values[:, t]
    return advantages, advantages + values


def whiten(x, mask):
    """x with mean 0 and standard deviation 1 over the mask, and 0 outside it, (B, T)."""
    mean = x[mask].mean()
    variance = x[mask].var(correction=0)        # biased: a single token has a variance, 0
    return ((x - mean) * torch.rsqrt(variance + 1e-8)).masked_fill(~mask, 0.0)


def policy_loss(logprobs, old_logprobs, advantages, clip_eps):
    """PPO's clipped loss and the ratio, (B, T) each; the caller sums over the mask."""
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return torch.maximum(-advantages * ratio, -advantages * clipped), ratio


def value_loss(values, old_values, returns, vf_clip):
    """Half the squared error, (B, T), the larger of the clipped and the plain one if vf_clip."""
    loss = (values - returns) ** 2
    if vf_clip:
        clipped = old_values + (values - old_values).clamp(-vf_clip, vf_clip)
        loss = torch.maximum(loss, (clipped - returns) ** 2)
    return 0.5 * loss


@torch.no_grad()
def update_ema(ref, policy, rate):
    """ref <- ref + rate (policy - ref), in place, for every tensor."""
    for r, p in zip(ref.parameters(), policy.parameters()):
        r.lerp_(p, rate)


def in_parts(function, size, *tensors):
    """function of tensors (B, ...), computed size rows at a time."""
    return torch.cat([function(*part) for part in zip(*(t.split(size) for t in tensors))])


def load_scorer(reward, saved_policy, device, size=0):
    """
    score(tokens, response_mask, prompts, responses) -> (B,), by a reward.py or by the run folder of
    a reward model, size rows at a time (0: all); then the weights that the value model starts
    from, and their checkpoint: the reward model's body, or with a reward.py the policy.
    """
    if reward.endswith('.py'):
        judge = load_judge(reward)

        def score(tokens, response_mask, prompts, responses):
            rewards = [judge(p, r)['reward'] for p, r in zip(prompts, responses)]
            return torch.tensor(rewards, dtype=torch.float32, device=device)
        return score, saved_policy['weights']['policy'], saved_policy

    saved = load_checkpoint(reward, ['rm'])
    if saved['fingerprint'] != saved_policy['fingerprint']:
        raise UserError(f'{reward} reads another tokenizer than the policy')
    model = load_model(ScalarGPT, saved, 'reward_model', device).requires_grad_(False)

    def score(tokens, response_mask, prompts, responses):
        scores = in_parts(lambda *part: last_scores(model, *part), size or len(tokens), tokens,
                          response_mask) - saved['shift']
        if not scores.isfinite().all():
            raise UserError(f'{reward}: a score is not a finite number')
        return scores
    return score, model.body.state_dict(), saved


@torch.no_grad()
def rollout(policy, ref, value_model, score, prompts, tokenizer, cfg, generator):
    """
    One response for each prompt, and all that training asks of it, on one (B, T) grid.

    Returns a dict: tokens (B, T+1), response_mask, logprobs, ref_logprobs, values, all (B, T),
    scores (B,) after the rule for responses without EOS, raw_scores and ended (B,) before it.
    """
    eos, size = tokenizer.eot_token, cfg.micro_batch_size or len(prompts)
    tokens, response_mask = generate(policy, prompts, cfg.max_new_tokens, eos, cfg.temperature,
                                     generator)
    x, y = tokens[:, :-1], tokens[:, 1:]
    texts, ended = decode_responses(tokens, response_mask, tokenizer)
    raw_scores = score(tokens, response_mask, [tokenizer.decode(p) for p in prompts], texts)
    ended = ended.to(x.device)
    # A response that does not end earns no_eos_score at most: nothing else teaches it to end
    scores = torch.where(ended, raw_scores, raw_scores.clamp(max=cfg.no_eos_score))

    def logprobs_under(model):
        return in_parts(lambda *part: token_logprobs(model, *part, cfg.temperature), size, x, y,
                        response_mask)
    return {'tokens': tokens, 'response_mask': response_mask, 'raw_scores': raw_scores,
            'scores': scores, 'ended': ended, 'logprobs': logprobs_under(policy),
            'ref_logprobs': logprobs_under(ref), 'values': in_parts(value_model, size, x)}


def rollout_metrics(batch):
    """
    What is logged of a rollout batch. kl is summed over a response, then averaged over responses;
    entropy is per token, estimated by -log pi of the tokens drawn.
    """
    B, response_tokens = len(batch['tokens']), batch['response_mask'].sum()
    return {'score': batch['raw_scores'].mean().item(),
            'kl': ((batch['logprobs'] - batch['ref_logprobs']).sum() / B).item(),
            'entropy': (-batch['logprobs'].sum() / response_tokens).item(),
            'length': (response_tokens / B).item(), 'eos': batch['ended'].float().mean().item()}


def evaluate(policy, start_policy, value_model, score, judge, prompts, tokenizer, cfg):
    """
    The same numbers on held-out prompts; kl_sft is to the policy that PPO started from. With a
    judge also gold, its mean reward: what the score is a stand-in for, and training never sees.
    """
    batch = rollout(policy, start_policy, value_model, score, prompts, tokenizer, cfg,
                    rng(cfg.seed, 0, 'eval'))
    metrics = {'kl_sft' if name == 'kl' else name: number
               for name, number in rollout_metrics(batch).items()}
    if judge:
        texts, _ = decode_responses(batch['tokens'], batch['response_mask'], tokenizer)
        golds = [judge(tokenizer.decode(p), text)['reward'] for p, text in zip(prompts, texts)]
        metrics = {'score': metrics['score'], 'gold': sum(golds) / len(golds), **metrics}
    return metrics


def main(cfg):
    """Trains a policy against a reward and returns the last evaluation's numbers."""
    saved = open_run(cfg, 'ppo')
    if saved and saved['step'] == cfg.steps:
        print(f'{cfg.out} is finished: {cfg.steps} steps')
        return saved['metrics']
    if cfg.temperature <= 0:
        raise UserError(f'--temperature={cfg.temperature}: PPO samples, so it must be above 0')
    device, autocast = set_up(cfg)

    # --- data and models
    init = load_checkpoint(cfg.init, POLICIES)
    tokenizer, template = load_text(cfg.data, init)
    score, value_weights, source = load_scorer(cfg.reward, init, device, cfg.micro_batch_size)
    policy = load_model(GPT, saved or init, 'policy', device)
    ref = load_model(GPT, saved or init, 'ref' if saved else 'policy', device).requires_grad_(False)
    start_policy = load_model(GPT, init, 'policy', device).requires_grad_(False)    # for kl_sft
    if saved:
        value_model = load_model(ScalarGPT, saved, 'value_model', device)
    else:
        value_model = ScalarGPT(GPTConfig(**source['model'])).to(device)
        value_model.body.load_state_dict(value_weights)
    for name, model in (('policy and reference', policy), ('value model', value_model)):
        print(f'{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters')
    train, val = load_split(cfg.data, 'prompts', template)
    limits = policy.config.block_size, cfg.max_new_tokens
    train = [row[0] for row in encode_rows(train, 'prompts', tokenizer, *limits, name='train')]
    val = [row[0] for row in encode_rows(val[:128], 'prompts', tokenizer, *limits, name='val')]
    inputs = check_inputs(cfg, saved, train, val, [init['metrics'], source['metrics']])
    judge = load_judge(cfg.judge) if cfg.judge else None
    if judge:
        judge(tokenizer.decode(val[0]), '')     # what is wrong with it shows before the first step
    policy_optimizer = adamw(policy, cfg.weight_decay)
    value_optimizer = adamw(value_model, cfg.weight_decay)
    if cfg.compile:
        for model in (policy, ref, value_model):
            model.compile()
    start, metrics = 0, {}
    if saved:
        start, metrics = saved['step'], saved['metrics']
        policy_optimizer.load_state_dict(saved['optimizers']['policy'])
        value_optimizer.load_state_dict(saved['optimizers']['value_model'])

    # --- the loop
    log = Log(cfg.out, start, cfg.steps)
    micro_batch_size = cfg.micro_batch_size or cfg.batch_size
    # Equal lengths: a rollout batch sorted by length would be sorted by kind of prompt
    for step, indices in zip(range(start, cfg.steps),
                             batches([1] * len(train), cfg.rollout_size, cfg.seed, start)):
        began = time.time()
        # 1. Sample and score
        with autocast:
            batch = rollout(policy, ref, value_model, score, [train[i] for i in indices],
                            tokenizer, cfg, rng(cfg.seed, step, 'rollout'))
        x, y = batch['tokens'][:, :-1], batch['tokens'][:, 1:]                  # (B, T)
        response_mask = batch['response_mask']
        # 2. Which tokens were better than expected
        rewards = token_rewards(batch['scores'], batch['logprobs'], batch['ref_logprobs'],
                                response_mask, cfg.beta)                        # (B, T)
        advantages, returns = gae(rewards, batch['values'], response_mask, cfg.gamma,
                                  cfg.gae_lambda)
        if cfg.whiten:      # after the returns, which must stay in units of the score
            advantages = whiten(advantages, response_mask)      # over the whole rollout batch

        # 3. Several passes over the batch, an optimizer step a minibatch
        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup)
        value_lr = learning_rate(step, cfg.steps, cfg.value_lr, cfg.warmup)
        lengths = response_mask.sum(1).cpu()                # (B,) response tokens of each row
        widths = (response_mask * torch.arange(1, x.size(1) + 1, device=device)
                  ).amax(1).cpu()                           # (B,) columns up to its last one
        sums, norms, ratio_of_first = torch.zeros(3, device=device), [], None   # pg, vf, clipped
        for epoch in range(cfg.ppo_epochs):
            order = torch.randperm(len(x), generator=rng(cfg.seed, step * cfg.ppo_epochs + epoch,
                                                         'shuffle'))
            for minibatch in order.split(cfg.batch_size):
                response_tokens = int(lengths[minibatch].sum())
                losses, ratios = torch.zeros(2, device=device), []      # pg_loss and vf_loss
                for rows in minibatch.split(micro_batch_size):
                    T = int(widths[rows].max())             # cut the padding these rows share
                    mask = response_mask[rows, :T]
                    with autocast:
                        logprobs = token_logprobs(policy, x[rows, :T], y[rows, :T], mask,
                                                  cfg.temperature)
                        values = value_model(x[rows, :T])
                    pg, ratio = policy_loss(logprobs, batch['logprobs'][rows, :T],
                                            advantages[rows, :T], cfg.clip_eps)
                    vf = value_loss(values, batch['values'][rows, :T], returns[rows, :T],
                                    cfg.vf_clip)
                    pg, vf = pg[mask].sum() / response_tokens, vf[mask].sum() / response_tokens
                    (pg + vf).backward()                    # two networks: nothing is mixed
                    losses += torch.stack([pg, vf]).detach()
                    ratios.append(ratio[mask].detach())
                ratios = torch.cat(ratios)
                if ratio_of_first is None:                  # no step yet: pi is pi_old
                    ratio_of_first = ratios[(ratios - 1).abs().argmax()].item()
                pg_loss, vf_loss = losses.tolist()
                clipped = ((ratios - 1).abs() > cfg.clip_eps).float().mean()
                sums += torch.stack([*losses, clipped])
                norms.append(optimizer_step(policy_optimizer, policy, lr, cfg.grad_clip, step + 1,
                                            pg_loss=pg_loss, vf_loss=vf_loss))
                optimizer_step(value_optimizer, value_model, value_lr, cfg.grad_clip, step + 1)
        # 4. The reference follows
        if cfg.ref_ema:
            update_ema(ref, policy, cfg.ref_ema)

        pg_loss, vf_loss, clip_frac = (sums / len(norms)).tolist()
        log.step(step + 1, began, int(lengths.sum()), **rollout_metrics(batch),
                 ratio=ratio_of_first, clip_frac=clip_frac, pg_loss=pg_loss, vf_loss=vf_loss,
                 norm=sum(norms) / len(norms), lr=lr)

        saving = (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps
        if saving or (step + 1) % cfg.eval_every == 0:
            with autocast:
                metrics = evaluate(policy, start_policy, value_model, score, judge, val, tokenizer,
                                   cfg)
                samples = show_samples(policy, val[:2], tokenizer, cfg.max_new_tokens)
            log.eval(step + 1, metrics, samples)
        if saving:
            save_checkpoint(f'{cfg.out}/ckpt.pt', 'ppo', step + 1, cfg, tokenizer, template,
                            metrics, {'policy': policy, 'value_model': value_model, 'ref': ref},
                            {'policy': policy_optimizer, 'value_model': value_optimizer},
                            inputs=inputs)
    log.close()
    return metrics


if __name__ == '__main__':
    run_cli(main, Config)
