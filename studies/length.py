"""
Min, Mode and Skew Length: the unified algorithm on a GPT, with a learned reward and the true one.

The paper's claims (Tajwar et al. 2024, section 5). Where the reward peaks where the reference
hardly goes (Min, Skew), methods with fresh samples get farther than offline ones, and offline
methods that push responses down (DPO, IPO) farther than Pref-FT; where it peaks at the reference's
mode (Mode), all are about alike. All this with a reward model learned from the same pairs.

    prompt       two letters and a colon, "ab:"
    response     n of these letters at random; in demonstrations n is normal, mean 20, std 5
    gold         Min, Skew: - n;   Mode: - |n - 18|
    pairs        two responses of the SFT policy, the first chosen with sigmoid(0.3 (gold1 - gold2));
                 Skew: their n have probability ~ exp(-(40 - n) / 6), so hardly any is short

All methods start from train_sft's policy, and train_rm's reward model learns from the pairs that
the offline methods learn from. Task Toy is the same table on data/toy with its exact judge: the
stand-in for AlpacaFarm and UltraFeedback. REINFORCE and PPO have the KL in the reward, decision 3
of the project, and no value model: A_t is all that is still to come, whitened.
What to expect: on-policy methods end much shorter than offline ones on Min and Skew. Which of them
is best is not said: that hangs on the learning rates, chosen on seeds 100 and 101.
What it does not do: the paper's own skew, whose exact form we do not know; its 1.4B model.

    python -m studies.length
    python -m studies.length --tasks=Toy --seeds=0
    wrote studies/results/length.png
"""
import copy
import itertools
import math
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import train_rm
import train_sft
from data.bpe import write_tiktoken
from data.rows import write_rows
from data.toy import prepare
from prefgpt import (GPT, adamw, decode_responses, encode_rows, generate, load_checkpoint,
                     load_judge, load_model, load_rows, load_text, make_batch, rng, run_cli,
                     token_logprobs)
from studies.unified import (best_of_n_loss, dpo_pairs_loss, ipo_pairs_loss, ppo_loss, pref_ft_loss,
                             reinforce_loss, rwr_loss, train)
from train_ppo import gae, load_scorer, token_rewards, whiten


@dataclass
class Config:
    seeds: str = '0 1 2 3 4'        # the seeds to run, or to complete
    tasks: str = 'Min Mode Skew'    # which of Min, Mode, Skew and Toy
    csv: str = 'studies/results/length.csv'     # the table to add to; the picture beside it
    quick: bool = False             # a few steps of everything for one seed, into its own table


BETA, N = 0.1, 4                    # weight of KL(policy, ref); responses to a prompt
LETTERS, MOST = 'abcdefgh', 40      # of the language; tokens of a response, EOS included
MODE = 18                           # letters: the mean of the SFT policy, on seed 100
SIZES = {   # of the lengths' tasks, of Toy, and in brief
    'full': dict(sft=800, rm=600, pairs=2000, collections=100, B=64, M=64, evaluated=512),
    'toy': dict(sft=1250, rm=2000, pairs=4000, collections=60, B=128, M=32, evaluated=400),
    'quick': dict(sft=20, rm=5, pairs=32, collections=2, B=16, M=16, evaluated=16)}
# method -> its loss, learning rate, passes T, and whether it is offline
METHODS = {
    'Pref-FT': (pref_ft_loss, 1e-3, 2, True),
    'DPO': (partial(dpo_pairs_loss, beta=BETA), 1e-3, 2, True),
    'IPO': (partial(ipo_pairs_loss, beta=BETA), 1e-3, 2, True),
    'on-policy Best-of-N': (best_of_n_loss, 1e-3, 1, False),
    'on-policy RWR': (partial(rwr_loss, beta=1.0), 1e-3, 1, False),
    'on-policy DPO': (partial(dpo_pairs_loss, beta=BETA), 1e-3, 1, False),
    'on-policy IPO': (partial(ipo_pairs_loss, beta=BETA), 1e-3, 1, False),
    'REINFORCE': (reinforce_loss, 1e-3, 1, False),
    'PPO': (ppo_loss, 1e-3, 4, False)}


# ----------------------------------------------------------------------------- the language

def gold_of(task):
    """gold(prompt, response): the reward that a task is about."""
    if task == 'Toy':
        judge = load_judge('data/toy/reward.py')
        return lambda prompt, response: judge(prompt, response)['reward']
    if task == 'Mode':
        return lambda prompt, response: -abs(len(response) - MODE)
    return lambda prompt, response: -len(response)


def draw_response(prompt, n, generator):
    """n letters of the prompt's two, as text."""
    return ''.join(prompt[i] for i in torch.randint(2, (n,), generator=generator))


def draw_length(generator, skew):
    """1 to MOST - 1 letters, so that EOS fits: normal, or most of them nearly as long as can be."""
    if skew:
        weights = torch.exp(torch.arange(1 - MOST, 0) / 6)
        return 1 + int(torch.multinomial(weights, 1, generator=generator))
    return int((20 + 5 * torch.randn(1, generator=generator)).round().clamp(1, MOST - 1))


def write_language(folder, seed):
    """The data folder for SFT: demonstrations and prompts, of which every tenth is held out."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, prompts = rng(seed, 0, 'batch'), [a + b + ':' for a in LETTERS for b in LETTERS]
    for split, part, count in (('train', [p for i, p in enumerate(prompts) if i % 10], 4000),
                               ('val', prompts[::10], 200)):
        write_rows(folder / f'{split}.prompts.jsonl', [{'prompt': p} for p in part])
        write_rows(folder / f'{split}.sft.jsonl', [
            {'prompt': p, 'completion': draw_response(p, draw_length(generator, False), generator)}
            for p in itertools.islice(itertools.cycle(part), count)])
    write_tiktoken(folder / 'bytes.tiktoken', {bytes([i]): i for i in range(256)})
    (folder / 'tokenizer').write_text('bytes.tiktoken\n')


def write_pairs(folder, seed, task, policy, tokenizer, count):
    """The task's pairs: of the policy's samples, or on Skew of lengths that it hardly has."""
    gold, generator = gold_of(task), rng(seed, 0, 'shuffle')
    for split, size in (('train', count), ('val', max(10, count // 10))):
        prompts = [row['prompt'] for row in load_rows(folder / f'{split}.prompts.jsonl', 'prompts')]
        prompts = [prompts[i] for i in torch.randint(len(prompts), (size,), generator=generator)
                   for _ in range(2)]
        if task == 'Skew':
            texts = [draw_response(p, draw_length(generator, True), generator) for p in prompts]
        else:
            out = generate(policy, [tokenizer.encode(p) for p in prompts], MOST,
                           tokenizer.eot_token, generator=generator)
            texts, _ = decode_responses(*out, tokenizer)
        rows = []
        for prompt, first, second in zip(prompts[::2], texts[::2], texts[1::2]):
            ahead = torch.tensor(0.3 * (gold(prompt, first) - gold(prompt, second)))
            if torch.rand((), generator=generator) > ahead.sigmoid():
                first, second = second, first
            if first and first != second:       # an empty response cannot be taught
                rows.append({'prompt': prompt, 'chosen': first, 'rejected': second})
        write_rows(folder / f'{split}.pairs.jsonl', rows)


# ----------------------------------------------------------------------------- a method's run

class Trainee:
    """A GPT policy that a method trains, its reference, and what it learns from."""

    def __init__(self, seed, sft, reward_model, prompts, most, N=N):
        saved = load_checkpoint(sft, ['sft'])
        self.policy, self.ref, self.collected = (
            load_model(GPT, saved, 'policy', 'cpu') for _ in range(3))
        self.tokenizer, _ = load_text(saved['config']['data'], saved)
        self.score, *_ = load_scorer(reward_model, saved, 'cpu')
        self.seed, self.prompts, self.most, self.N = seed, prompts, most, N

    def logprobs_of(self, batch, policy=None):
        """(G, N, T): of the responses of a batch, under the policy as it is or another one."""
        tokens, response_mask = batch['tokens'].flatten(0, 1), batch['response_mask'].flatten(0, 1)
        logprobs = token_logprobs(policy or self.policy, tokens[:, :-1], tokens[:, 1:],
                                  response_mask)
        return logprobs.unflatten(0, batch['scores'].shape)

    @torch.no_grad()
    def sample(self, prompts, generator):
        """A response to each prompt: tokens, response_mask, scores as PPO has them, and texts."""
        tokens, response_mask = generate(self.policy, prompts, self.most, self.tokenizer.eot_token,
                                         generator=generator)
        texts, ended = decode_responses(tokens, response_mask, self.tokenizer)
        scores = self.score(tokens, response_mask, None, texts)
        # As in train_ppo: a response without EOS earns -1 at most
        return tokens, response_mask, torch.where(ended, scores, scores.clamp(max=-1)), texts

    def collect(self, B, k):
        """B responses of the policy as it is, N to a prompt, scored by the reward model."""
        self.collected.load_state_dict(self.policy.state_dict())
        chosen = torch.randint(len(self.prompts), (B // self.N,), generator=rng(self.seed, k,
                                                                                'batch'))
        prompts = [self.prompts[i] for i in chosen for _ in range(self.N)]
        tokens, response_mask, scores, _ = self.sample(prompts, rng(self.seed, k, 'rollout'))
        return self.grouped(tokens, response_mask, scores, self.N)

    def given(self, pairs):
        """The pairs as one collection: groups of 2 whose scores, 1 and 0, are the labels."""
        rows = [(prompt, response) for prompt, *both in pairs for response in both]
        tokens, _, _, response_mask = make_batch(rows)
        return self.grouped(tokens, response_mask, torch.tensor([1.0, 0.0]).repeat(len(pairs)), 2)

    @torch.no_grad()
    def grouped(self, tokens, response_mask, scores, N):
        """All that a loss asks for, (G, N, ...)."""
        batch = {'tokens': tokens, 'response_mask': response_mask, 'scores': scores}
        batch = {name: value.unflatten(0, (-1, N)) for name, value in batch.items()}
        old, ref = self.logprobs_of(batch), self.logprobs_of(batch, self.ref)   # (G, N, T)
        rewards = token_rewards(scores, old.flatten(0, 1), ref.flatten(0, 1), response_mask, BETA)
        to_come, _ = gae(rewards, torch.zeros_like(rewards), response_mask, 1.0, 1.0)
        return {**batch, 'old_logprobs': old, 'ref_logprobs': ref,
                'advantages': whiten(to_come, response_mask).view_as(old)}

    @torch.no_grad()
    def measure(self, task, prompts, held_out):
        """
        The policy on held-out prompts and pairs. kl is to the reference, kl_collect to the policy
        that sampled last, both summed over a response; entropy is per token; chosen, rejected are
        seq_logprobs, and margin is BETA times the difference of their log-ratios.
        """
        tokens, response_mask, scores, texts = self.sample(prompts, rng(self.seed, 0, 'eval'))
        gold = gold_of(task)
        batch = self.grouped(tokens, response_mask, scores, 1)
        now = batch['old_logprobs']
        pairs = self.given(held_out)
        chosen, rejected = pairs['old_logprobs'].sum(-1).unbind(1)              # (G,) each
        ref_chosen, ref_rejected = pairs['ref_logprobs'].sum(-1).unbind(1)
        return {'gold': statistics.fmean(gold(self.tokenizer.decode(prompt), text)
                                         for prompt, text in zip(prompts, texts)),
                'score': scores.mean().item(),
                'kl': (now - batch['ref_logprobs']).sum(-1).mean().item(),
                'kl_collect': (now - self.logprobs_of(batch, self.collected)).sum(-1).mean().item(),
                'entropy': (-now.sum() / response_mask.sum()).item(),
                'length': response_mask.sum(1).float().mean().item(),
                'chosen': chosen.mean().item(), 'rejected': rejected.mean().item(),
                'margin': BETA * (chosen - ref_chosen - rejected + ref_rejected).mean().item()}


def run(method, trainee, pairs, size):
    """Trains by a method; returns the mean share of ratios beyond 1 +- 0.2, PPO's clip."""
    loss, lr, passes, offline = METHODS[method]
    collect = (lambda k: trainee.given(pairs)) if offline else partial(trainee.collect, size['B'])
    clipped = []
    for part in train(trainee.policy, trainee.logprobs_of, collect, loss,
                      adamw(trainee.policy, 0.0), lr, trainee.seed,
                      1 if offline else size['collections'], passes, size['M'], grad_clip=1.0):
        ratio = torch.exp(part['logprobs'] - part['old_logprobs'])[part['response_mask']]
        clipped.append(((ratio - 1).abs() > 0.2).float().mean().item())
    return statistics.fmean(clipped)


def run_task(seed, task, quick):
    """A seed's rows of a task: the reference, then every method."""
    size = SIZES['quick' if quick else 'toy' if task == 'Toy' else 'full']
    out = Path(f"out/{'quick-' if quick else ''}length-{seed}")
    common = dict(seed=seed, resume=True, eval_every=9999, save_every=9999)
    if task == 'Toy':
        data, sft, most = Path(f'data/toy-{seed}'), f'{out}/toy-sft', 8 if quick else 64
        prepare.main(prepare.Config(seed=seed, out=str(data)))
        train_sft.main(train_sft.Config(data=str(data), out=sft, steps=size['sft'], **common))
    else:
        data, sft, most = out / task.lower(), f'{out}/sft', MOST
        write_language(out / 'data', seed)
        train_sft.main(train_sft.Config(data=f'{out}/data', out=sft, steps=size['sft'], n_head=2,
                                        n_embd=32, block_size=48, batch_size=32, **common))
        saved = load_checkpoint(sft, ['sft'])
        write_language(data, seed)
        write_pairs(data, seed, task, load_model(GPT, saved, 'policy', 'cpu'),
                    load_text(f'{out}/data', saved)[0], size['pairs'])
    reward_model = f'{out}/{task.lower()}-rm'
    rm = train_rm.main(train_rm.Config(data=str(data), init=sft, out=reward_model,
                                       steps=size['rm'], **common))
    saved = load_checkpoint(sft, ['sft'])
    tokenizer, block_size = load_text(str(data))[0], saved['model']['block_size']

    def rows_of(split, kind, count):
        rows = load_rows(data / f'{split}.{kind}.jsonl', kind)
        return encode_rows(rows, kind, tokenizer, block_size, name=split)[:count]
    pairs, held_out = rows_of('train', 'pairs', size['pairs']), rows_of('val', 'pairs', 200)
    prompts, val = ([row[0] for row in rows_of(split, 'prompts', None)]
                    for split in ('train', 'val'))
    val = list(itertools.islice(itertools.cycle(val), size['evaluated']))
    rows = []
    for method in ('reference', *METHODS):
        trainee = Trainee(seed, sft, reward_model, prompts, most)
        clip_frac = run(method, trainee, pairs, size) if method in METHODS else 0.0
        rows.append({'seed': seed, 'task': task, 'method': method,
                     **trainee.measure(task, val, held_out), 'clip_frac': clip_frac,
                     'rm_accuracy': rm['accuracy'], 'threads': torch.get_num_threads(),
                     'command': f'python -m studies.length --tasks={task} --seeds={seed}'})
        print(f"{task} {method}: gold {rows[-1]['gold']:.2f}, kl {rows[-1]['kl']:.2f}")
    return rows
