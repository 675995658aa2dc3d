"""
Shows what a run sees, token by token: a rollout, a pair or a response, as text and as a page.

A row is a column of the grid: the token read (x), the one predicted (y), and whether it counts
(mask); if not, its numbers are shown as 0. All come from the scripts' own functions, by stage:
  - PPO: logprob and ref logprob of y; kl, their difference; reward, -beta kl, with the score on the
    last token; value; advantage. Without --prompt it shows the rollout batch that follows the
    checkpoint, sampled again from the run's seeds: with --step=5 that of step 6, with --step=0 the
    first one. Only there is the advantage whitened too, because that takes the whole batch;
  - DPO, or PPO with --pairs: held-out pairs. push is minus the gradient of DPO's loss, the way its
    next step pushes the logprob: 0 where both sides begin alike. margin is a token's share
    of the pair's margin: beta (logprob - ref logprob), with a minus on the rejected side;
  - reward model: held-out pairs. score is what the response would get if it ended after y, and
    change how much y adds to that. The model was trained on last tokens only;
  - SFT: held-out demonstrations. With --response any run reads that one instead.

    python -m tools.look out/toy/ppo --prompt="how do i clean a mirror?"
    python -m tools.look out/toy/ppo --step=5 --rows=3 --html=out/look.html
"""
from dataclasses import dataclass
from pathlib import Path

import torch

import train_dpo, train_ppo, train_rm
from data.text import build_tokenizer, encode_rows, load_examples, load_split
from data.turns import spaced
from prefgpt import (GPT, POLICIES, GPTConfig, ScalarGPT, UserError, batches, last_scores,
                     load_checkpoint, load_model, make_batch, rng, run_cli, set_up, token_logprobs,
                     x_and_y)
from tools.page import make_table, show, write_page
from tools.sample import find_prompts


@dataclass
class Config:
    runs: tuple = ()                # a run folder
    step: int = -1                  # the checkpoint that --keep kept of this step; -1: the last one
    prompt: str = ''                # what a user types; it is put into the run's template
    response: str = ''              # the response to it; '': PPO samples one
    pairs: bool = False             # of a PPO run: held-out pairs instead of a rollout
    rows: int = 1                   # how many responses or pairs
    first: int = 0                  # the first of them, counted from 0
    color: str = ''                 # the column that colours the tokens, such as kl; '': the last
    html: str = ''                  # a page to write all of it to; '': none
    seed: int = 0                   # of the response to --prompt
    device: str = 'cpu'             # cuda, mps or cpu
    dtype: str = ''                 # float32 or bfloat16; '': bfloat16 on newer GPUs, else float32


def find_checkpoint(cfg):
    """Returns the checkpoint of --step, or the last one; of step 0 only its settings matter."""
    folder = Path(cfg.runs[0])
    path = folder / f'ckpt-{cfg.step}.pt' if cfg.step > 0 else folder
    if cfg.step > 0 and not path.exists():
        kept = sorted(int(other.stem[5:]) for other in folder.glob('ckpt-*.pt'))
        raise UserError(f'{path}: no such checkpoint; --keep has kept those of {kept or "no step"}')
    return load_checkpoint(path, (*POLICIES, 'rm')) | ({} if cfg.step else {'step': 0})


def check_input(saved, name, now):
    """Raises UserError if what a run was made from, its init or reward, has changed since."""
    if saved.get('inputs', {name: now['id']})[name] != now['id']:
        raise UserError(f"{saved['config'][name]} has changed since the run was made from it")


def load_ppo(saved, run, device):
    """Returns policy, reference and value model of a step, and the scorer."""
    init = load_checkpoint(run.init, POLICIES)
    scorer, source = train_ppo.load_scorer(run.reward, init, device, run.micro_batch_size)
    check_input(saved, 'reward', source)
    value_model = ScalarGPT(GPTConfig(**source['model'])).to(device)    # with a head of zeros
    if saved['step'] == 0:
        check_input(saved, 'init', init)
        return *[load_model(GPT, init, 'policy', device)] * 2, value_model, scorer
    value_model.load_state_dict(saved['weights']['value_model'])
    policies = (load_model(GPT, saved, name, device) for name in ('policy', 'ref'))
    return *policies, value_model, scorer


def look_at_rollout(cfg, saved, tokenizer, device):
    """Returns tables of what PPO samples: to --prompt, or rows of the next rollout batch."""
    run, step = train_ppo.Config(**saved['config']), saved['step']
    policy, ref, value_model, scorer = load_ppo(saved, run, device)
    block_size = min(model.config.block_size for model in (policy, value_model))
    if cfg.prompt:
        rows = encode_rows(find_prompts(cfg, saved), 'prompts', tokenizer, block_size,
                           run.max_new_tokens, name=cfg.runs[0])
        generator = rng(cfg.seed, 0, 'eval')
    else:
        train, _ = load_examples(run.data, 'prompts', tokenizer, saved, block_size,
                                 run.max_new_tokens)
        indices = next(batches([1] * len(train), run.rollout_size, run.seed, step))
        rows, generator = [train[i] for i in indices], rng(run.seed, step, 'rollout')
    sampled, scores, ended, (prompts, _) = train_ppo.rollout(
        policy, ref, scorer, [prompt for prompt, in rows], tokenizer, run, generator)
    x, y, mask, logprobs, ref_logprobs = sampled.values()                       # (B, T)
    capped = train_ppo.cap_unfinished(scores, ended, run.no_eos_score)
    rewards = train_ppo.token_rewards(capped, logprobs, ref_logprobs, mask, run.beta)
    values = train_ppo.in_parts(value_model, run.micro_batch_size or len(x), x)
    advantages, _ = train_ppo.gae(rewards, values, mask, run.gamma, run.gae_lambda)
    grid = {'x': x, 'y': y, 'mask': mask, 'logprob': logprobs, 'ref logprob': ref_logprobs,
            'kl': logprobs - ref_logprobs, 'reward': rewards, 'value': values,
            'advantage': advantages}
    notes = []
    if not cfg.prompt:
        grid |= {'whitened': train_ppo.whiten(advantages, mask)} if run.whiten else {}
        means = train_ppo.rollout_metrics((sampled, scores, ended))
        notes = [f"the rollout batch of step {step + 1}: score {means['score']:.6f}, kl "
                 f"{means['kl']:.6f}" + '; compare log.jsonl' * (step < run.steps)]
    said = [f'score {score:.3f}, ' + f'without EOS counted as {least:.3f}, ' * (not end)
            + f'beta {run.beta}' for score, least, end in zip(scores, capped, ended)]
    return [make_table(prompts[b], [said[b], *notes], ['y'],
                       {name: column[b:b + 1] for name, column in grid.items()}, tokenizer)
            for b in range(len(rows))[cfg.first:][:cfg.rows]]


def pair_columns(run, grid, kl):
    """Returns a pair's grid with the columns push and margin, and a note."""
    sums, refs = (grid[name].sum(1) for name in ('logprob', 'ref logprob'))     # (2,)
    with torch.enable_grad():
        sums.requires_grad_()
        loss, margin = train_dpo.losses_and_margins(run, *sums[:, None], *refs[:, None])
        push = -torch.autograd.grad(loss.sum(), sums)[0][:, None]               # (2, 1)
    y = grid['y'].masked_fill(~grid['mask'], -1)    # a pad's id may also be a real token's
    alike = (y[0] == y[1]).cumprod(0)                                           # (T,)
    margins = run.beta * torch.stack([kl[0], -kl[1]])                           # (2, T)
    return {**grid, 'push': push + alike * push.flip(0), 'margin': margins}, (
        f'margin {margin.item():.3f} = {run.beta} (({sums[0]:.3f} - {refs[0]:.3f}) - '
        f'({sums[1]:.3f} - {refs[1]:.3f})); loss {loss.item():.3f}')


def columns_of(saved, model, ref, tokens, x, y, mask):
    """Returns the grid of a response or of a pair, with the columns of its stage, and a note."""
    grid, run = {'x': x, 'y': y, 'mask': mask}, saved['config']
    if saved['stage'] == 'rm':
        before, after = x_and_y(model(tokens) - saved['shift'])                 # (B, T)
        scores = last_scores(model, tokens, mask) - saved['shift']              # (B,)
        note = f'score {scores[0]:.3f}' if len(x) == 1 else (
            f'P(chosen beats rejected) = {(-train_rm.reward_loss(*scores)).exp():.3f}')
        return {**grid, 'score': after, 'change': after - before}, note
    temperature = run.get('temperature', 1.0)                                   # PPO's
    grid['logprob'] = token_logprobs(model, x, y, mask, temperature)            # (B, T)
    if not ref:
        return grid, f'loss {-grid["logprob"].sum() / mask.sum():.3f} per token'
    grid['ref logprob'] = token_logprobs(ref, x, y, mask, temperature)
    kl = grid['logprob'] - grid['ref logprob']
    if len(x) == 1:
        return {**grid, 'kl': kl}, f'kl {kl.sum():.3f}'
    run = train_dpo.Config(**run) if saved['stage'] == 'dpo' else train_dpo.Config(beta=run['beta'])
    return pair_columns(run, grid, kl)


def look_at_rows(cfg, saved, tokenizer, device):
    """Yields tables of --response, or of held-out rows, under the run's model."""
    stage, run, ref = saved['stage'], saved['config'], None
    kind = 'sft' if cfg.response or stage in ('base', 'sft') else 'pairs'
    if cfg.response:
        prompt = find_prompts(cfg, saved)[0]['prompt']
        rows = [{'prompt': prompt, 'completion': spaced(cfg.response, prompt)}]
    else:
        rows = load_split(run['data'], kind, saved['template'], run.get('rows', ''))[1]
    if stage == 'ppo':
        ref = load_model(GPT, saved, 'ref', device)
    elif stage == 'dpo':
        init = load_checkpoint(run['init'], POLICIES)
        check_input(saved, 'init', init)
        ref = load_model(GPT, init, 'policy', device)
    model = load_model(*((ScalarGPT, saved, 'reward_model') if stage == 'rm' else
                         (GPT, saved, 'policy')), device)
    examples = encode_rows(rows, kind, tokenizer, model.config.block_size, name=cfg.runs[0])
    for prompt, *responses in examples[cfg.first:][:cfg.rows]:
        batch = make_batch([(prompt, response) for response in responses], device)
        grid, note = columns_of(saved, model, ref, *batch)
        names = ('chosen', 'rejected') if kind == 'pairs' else ('y',)
        yield make_table(tokenizer.decode(prompt), [note], names, grid, tokenizer)


@torch.no_grad()
def main(cfg):
    """Prints the tables, writes --html, and returns them as tools/page.py describes them."""
    if len(cfg.runs) != 1 or cfg.response and not cfg.prompt:
        raise UserError('name one run folder, and a --prompt with a --response')
    (device, autocast), saved = set_up(cfg), find_checkpoint(cfg)
    samples = saved['stage'] == 'ppo' and not (cfg.pairs or cfg.response)
    if not samples and (cfg.step == 0 or cfg.prompt and not cfg.response):
        raise UserError('only a rollout of PPO has a --step=0, or a --prompt without a --response')
    with autocast:
        look_at = look_at_rollout if samples else look_at_rows
        tables = list(look_at(cfg, saved, build_tokenizer(saved['tokenizer']), device))
    if not tables:
        raise UserError(f'--first={cfg.first} --rows={cfg.rows}: there are no such rows')
    show(tables, cfg.color)
    if cfg.html:
        write_page(cfg.html, f'{cfg.runs[0]}, step {saved["step"]}', tables)
    return tables


if __name__ == '__main__':
    run_cli(main, Config)
