"""
Writes what a run answers to the training prompts, with scores; or, with --pairs, as new pairs.

There are --n responses to each prompt. --reward scores them, and each is a row {prompt, completion,
score}. With --pairs, each row is a pair for train_dpo.py instead: the best of a prompt's n against
the worst. A response without EOS is marked "completion_cut": training adds none. In pairs its
score is min(score, no_eos_score), as in train_ppo.py. It is never the chosen one, even where every
response that ended scores less: the policy would learn not to end. An empty response is never
chosen and, without --pairs, not written. A prompt gives no pair if no response can be chosen, or if
its best and worst have the same score or text.
What it does not do: overwrite a file, leave one behind when it is interrupted, or make sure that
the text of a response encodes to the very ids that were sampled and scored.

    python -m tools.pairs out/toy/sft --n=4 --temperature=1 --reward=out/toy/rm --out=scored.jsonl

Iterated DPO (Xu et al. 2024, section 4). Without --data a round would sample for the prompts that
its run was trained on, those of the last round's pairs:

    run=out/toy/sft
    for i in 1 2 3; do
        python -m tools.pairs $run --pairs --n=4 --temperature=1 --seed=$i --data=data/toy \\
            --reward=out/toy/rm --out=out/toy/pairs-$i.jsonl
        python train_dpo.py --data=out/toy/pairs-$i.jsonl --init=$run --steps=100 \\
            --out=out/toy/dpo-$i
        run=out/toy/dpo-$i
    done
"""
import dataclasses, json, sys, time
from collections import Counter
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import torch

import train_ppo
from data.text import build_tokenizer, encode_rows
from prefgpt import GPT, POLICIES, UserError, load_checkpoint, load_model, run_cli, set_up
from tools.sample import check_samples, find_prompts, longest, respond


@dataclass
class Config:
    runs: tuple = ()                # the run folder that answers
    out: str = ''                   # a new JSON Lines file
    reward: str = ''                # what scores: a reward model's run folder, or a reward.py
    pairs: bool = False             # write the best against the worst response to each prompt
    no_eos_score: float = train_ppo.Config.no_eos_score     # in pairs: maximum without EOS
    # what is answered
    prompt: str = ''                # what a user types; '': the prompts of the data
    data: str = ''                  # a data folder, or one JSON Lines file; '': the run's
    split: str = 'train'            # train or val
    prompts: int = 0                # how many different ones; 0: all
    # the samples
    n: int = 1                      # responses to each prompt
    temperature: float = 0.0        # 0: greedy; 1: as the model was trained
    max_new_tokens: int = 0         # longest response; 0: as the run was trained
    batch_size: int = 100           # prompts answered at once; the samples do not depend on it
    seed: int = 0                   # of the samples
    device: str = ''                # cuda, mps or cpu; '': cuda, else mps, else cpu
    dtype: str = ''                 # float32 or bfloat16; '': bfloat16 on newer GPUs, else float32


def scored_samples(policy, scorer, prompts, ids, tokenizer, cfg):
    """Yields prompt by prompt its n rows {prompt, completion, score}, marked if without EOS."""
    began, tokens_so_far, batches = time.time(), 0, range(0, len(ids), cfg.batch_size)
    for i, out in zip(batches, respond(policy, ids, tokenizer, cfg)):
        tokens, response_mask, texts, ended = out
        asked = [row['prompt'] for row in prompts[i:i + cfg.batch_size] for _ in range(cfg.n)]
        scores = scorer(tokens, response_mask, asked, texts)                    # (B,)
        rows = [{'prompt': prompt, 'completion': text, 'score': number,
                 **({} if end else {'completion_cut': True})}
                for prompt, text, number, end in zip(asked, texts, scores.tolist(), ended)]
        yield from (rows[b:b + cfg.n] for b in range(0, len(rows), cfg.n))
        tokens_so_far += int(response_mask.sum())
        if i == batches[-1] or i // cfg.batch_size % max(1, len(batches) // 10) == 0:
            print(f'{min(i + cfg.batch_size, len(ids)):>6}/{len(ids)} prompts | '
                  f'{tokens_so_far / (time.time() - began) / 1e3:.1f}k tok/s', flush=True)


def make_pair(rows, no_eos_score, dropped):
    """Returns one prompt's rows as a pair, by the rules at the top; or None: dropped counts why."""
    scores = torch.tensor([row['score'] for row in rows], dtype=torch.float64)
    ended = torch.tensor(['completion_cut' not in row for row in rows])
    scores = train_ppo.cap_unfinished(scores, ended, no_eos_score).tolist()
    rows, by_score = [{**row, 'score': s} for row, s in zip(rows, scores)], itemgetter('score')
    to_choose = [row for row in rows if row['completion'] and 'completion_cut' not in row]
    if not to_choose:
        dropped['no response to choose'] += 1
        return None
    best, worst = max(to_choose, key=by_score), min(rows, key=by_score)
    if best['score'] == worst['score'] or best['completion'] == worst['completion']:
        dropped['best and worst alike'] += 1
        return None
    return {'prompt': best['prompt'], 'chosen': best['completion'], 'rejected': worst['completion'],
            'chosen_score': best['score'], 'rejected_score': worst['score'],
            **({'rejected_cut': True} if 'completion_cut' in worst else {})}


def write(cfg, saved, device, autocast):
    """Writes the scored rows, or the pairs they make; prints and returns a summary of them."""
    tokenizer = build_tokenizer(saved['tokenizer'])
    policy = load_model(GPT, saved, 'policy', device)
    scorer, source = train_ppo.load_scorer(cfg.reward, saved, device, cfg.batch_size)
    prompts = find_prompts(cfg, saved)
    block_size = min(policy.config.block_size, source['model']['block_size'])   # both read it
    ids = encode_rows(prompts, 'prompts', tokenizer, block_size, cfg.max_new_tokens, cfg.split)
    written, scores, dropped = 0, [], Counter()
    temporary = Path(f'{cfg.out}.tmp')          # --out is whole or not there
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, 'w') as file, autocast:
            for rows in scored_samples(policy, scorer, prompts, ids, tokenizer, cfg):
                scores.append([row['score'] for row in rows])
                if cfg.pairs:
                    rows = filter(None, [make_pair(rows, cfg.no_eos_score, dropped)])
                for row in rows:
                    if not (cfg.pairs or row['completion']):      # nothing to learn
                        dropped['empty response'] += 1
                        continue
                    file.write(json.dumps(row) + '\n')
                    written += 1
        why = ''.join(f', {count} dropped: {reason}' for reason, count in dropped.items())
        if not written:
            raise UserError(f'{cfg.out}: nothing of {len(ids)} prompts is left{why}')
        temporary.replace(cfg.out)
    finally:
        temporary.unlink(missing_ok=True)
    mean = sum(map(sum, scores)) / (cfg.n * len(scores))
    best = sum(map(max, scores)) / len(scores)
    print(f"{cfg.out}: {written} {'pairs' if cfg.pairs else 'rows'} of {len(ids)} prompts{why} | "
          f'score {mean:.3f} | best of {cfg.n} {best:.3f}')
    return {'rows': written, 'dropped': dict(dropped), 'score': mean, 'best': best}


@torch.no_grad()
def main(cfg):
    """Writes --out; returns a summary: rows, what was dropped, the mean and best score."""
    if len(cfg.runs) != 1 or not cfg.out or not cfg.reward:
        raise UserError(f'{len(cfg.runs)} run folders, --out={cfg.out}, --reward={cfg.reward}: '
                        'name one run, a file to write, and what scores')
    if cfg.pairs and cfg.n < 2:
        raise UserError(f'--n={cfg.n}: --pairs compares responses: --n=2 or more')
    if Path(cfg.out).exists():
        raise UserError(f'--out={cfg.out} is there already: remove it, or name another')
    check_samples(cfg)
    cfg = dataclasses.replace(cfg, prompts=cfg.prompts or sys.maxsize)
    saved = load_checkpoint(cfg.runs[0], POLICIES)
    cfg = longest(cfg, saved)
    return write(cfg, saved, *set_up(cfg))


if __name__ == '__main__':
    run_cli(main, Config)
