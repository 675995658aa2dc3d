"""
What checkpoints answer: see it side by side, talk with one, write scored samples or new pairs.

Several runs answer with the same random numbers, so that one sees what a stage has changed. What a
user types, in --prompt or --chat, is put into the checkpoint's template.
--out writes --n responses to each training prompt and what --reward says of them, {prompt,
response, score}; with --pairs it writes the best against the worst of the n, as train_dpo.py reads
them. A response without EOS is marked, "response_cut", and gets no EOS in training. Pairs count it
as train_ppo.py does, min(score, no_eos_score), and never choose it, not even where every response
that ended scores less: the policy would learn not to end. An empty response is not written, nor
chosen. A prompt without a response to choose, or whose best and worst have one score or one text,
gives no pair.
What it does not do: go on with an answer that was stopped, overwrite a file, or make sure that the
text of a response encodes to the very ids that were sampled and scored; and an --out that is
interrupted leaves nothing.

    python -m tools.sample out/toy/sft out/toy/ppo out/toy/dpo
    python -m tools.sample out/toy/ppo --prompt="how do i clean a mirror?" --temperature=1 --n=3
    python -m tools.sample out/toy/ppo --chat

Iterated DPO (Xu et al. 2024, section 4). Without --data a round would sample for the prompts that
its run was trained on, those of the last round's pairs:

    run=out/toy/sft
    for i in 1 2 3; do
        python -m tools.sample $run --pairs --n=4 --temperature=1 --seed=$i --data=data/toy \\
            --reward=out/toy/rm --out=out/toy/pairs-$i.jsonl
        python train_dpo.py --data=out/toy/pairs-$i.jsonl --init=$run --steps=100 \\
            --out=out/toy/dpo-$i
        run=out/toy/dpo-$i
    done
"""
import contextlib, dataclasses, itertools, json, sys, time
from collections import Counter
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import torch

import train_ppo
from data.text import (build_tokenizer, decode_responses, encode_rows, from_messages, load_split,
                       mark_ends)
from prefgpt import (GPT, POLICIES, UserError, generate, load_checkpoint, load_model, printable,
                     rng, run_cli, set_up)


@dataclass
class Config:
    runs: tuple = ()                # run folders, shown in this order; --chat and --out take one
    # what is answered
    prompt: str = ''                # what a user types; '': the prompts of the data
    data: str = ''                  # a data folder, or one JSON Lines file; '': the first run's
    split: str = ''                 # train or val; '': val to be shown, train to be written
    prompts: int = 0                # how many different ones; 0: 3 to be shown, all to be written
    chat: bool = False              # answer line by line what is typed
    history: bool = False           # the earlier lines of a chat, and answers, stay in the prompt
    # what is written
    out: str = ''                   # a new JSON Lines file; '': the answers are shown
    reward: str = ''                # a reward model's run folder, or a reward.py: scores --out
    pairs: bool = False             # write the best against the worst response to each prompt
    no_eos_score: float = train_ppo.Config.no_eos_score     # in pairs, the most without EOS
    batch_size: int = 100           # prompts answered at once; the samples do not depend on it
    # the samples
    n: int = 1                      # responses to each prompt
    temperature: float = 0.0        # 0: greedy; 1: as the model was trained
    max_new_tokens: int = 64        # longest response
    seed: int = 0                   # of the samples
    device: str = ''                # cuda, mps or cpu; '': cuda, else mps, else cpu
    dtype: str = ''                 # float32 or bfloat16; '': bfloat16 on CUDA, else float32


def settle(cfg):
    """The Config with the defaults that depend on its use; UserError where flags do not agree."""
    # What a chat makes no use of; a dataclass keeps its defaults as class attributes
    idle = [f'--{name}' for name in ('prompt', 'data', 'split', 'prompts', 'out', 'n')
            if cfg.chat and getattr(cfg, name) != getattr(Config, name)]
    for wrong, message in (
            (not cfg.runs, 'name at least one run folder'),
            ((cfg.chat or cfg.out) and len(cfg.runs) > 1,
             f"--{'chat' if cfg.chat else 'out'} is for one run: name one, not {len(cfg.runs)}"),
            (idle, f"--chat has no use for {' and '.join(idle)}: leave one or the other out"),
            (cfg.history and not cfg.chat, '--history is of a chat: add --chat'),
            (cfg.pairs and not cfg.reward, '--pairs must tell better from worse: add --reward'),
            (cfg.out and not cfg.reward, '--out holds scored responses: add --reward'),
            (cfg.reward and not cfg.out, '--reward scores what is written: add --out=FILE.jsonl'),
            (cfg.pairs and cfg.n < 2, f'--n={cfg.n}: --pairs compares responses: --n=2 or more'),
            (cfg.n > 1 and cfg.temperature == 0,
             f'--n={cfg.n}: at --temperature=0 they are all the same; add --temperature=1'),
            (cfg.split not in ('', 'train', 'val'), f'--split={cfg.split}: train or val'),
            (cfg.out and Path(cfg.out).exists(),
             f'--out={cfg.out} is there already: remove it, or name another')):
        if wrong:
            raise UserError(message)
    return dataclasses.replace(cfg, split=cfg.split or ('train' if cfg.out else 'val'),
                               prompts=cfg.prompts or (sys.maxsize if cfg.out else 3))


def find_prompts(cfg, saved):
    """The prompts to answer, as literal text: the one given, in the template, or the data's."""
    if cfg.prompt:
        return [saved['template'].replace('{}', cfg.prompt)]
    train, val = load_split(cfg.data or saved['config']['data'], 'prompts', saved['template'])
    rows = train if cfg.split == 'train' else val
    return list(dict.fromkeys(row['prompt'] for row in rows))[:cfg.prompts]


def encode_prompts(prompts, tokenizer, block_size, cfg, name):
    """The prompts as lists of ids, cut on the left to leave room for a response."""
    return [ids for ids, in encode_rows([{'prompt': prompt} for prompt in prompts], 'prompts',
                                        tokenizer, block_size, cfg.max_new_tokens, name=name)]


def respond(policy, prompts, tokenizer, cfg, turn=0):
    """
    Yields tokens, response_mask, texts and ended (B,) of n responses to each prompt, lists of ids.

    B is n times batch_size, or less at the end; the responses to one prompt are neighbours.
    """
    generator = rng(cfg.seed, turn, 'eval')     # every run meets the same random numbers
    for i in range(0, len(prompts), cfg.batch_size):
        rows = [prompt for prompt in prompts[i:i + cfg.batch_size] for _ in range(cfg.n)]
        out = generate(policy, rows, cfg.max_new_tokens, tokenizer.eot_token, cfg.temperature,
                       generator)
        yield *out, *decode_responses(*out, tokenizer)


def show(cfg, saved, device, autocast):
    """Prints what every run answers, side by side; returns it as {run: [response, ...]}."""
    prompts, answers = find_prompts(cfg, saved[0]), {}
    for run, each in zip(cfg.runs, saved):
        tokenizer = build_tokenizer(each['tokenizer'])
        policy = load_model(GPT, each, 'policy', device)
        ids = encode_prompts(prompts, tokenizer, policy.config.block_size, cfg, run)
        with autocast:
            answers[run] = [text for *_, texts, ended in respond(policy, ids, tokenizer, cfg)
                            for text in mark_ends(texts, ended)]

    width = max(map(len, cfg.runs))
    for i in range(len(prompts) * cfg.n):
        print('\n' + printable(prompts[i // cfg.n]))
        for run in cfg.runs:
            print(f'  {run:<{width}} {printable(answers[run][i])}')
    return answers


def chat(cfg, saved, device, autocast):
    """Answers lines until the input ends or Ctrl-C comes at the prompt; returns the answers."""
    tokenizer = build_tokenizer(saved['tokenizer'])
    policy = load_model(GPT, saved, 'policy', device)
    room = policy.config.block_size - cfg.max_new_tokens
    if room < 1:
        raise UserError(f'block_size={policy.config.block_size} has no room for a prompt beside '
                        f'max_new_tokens={cfg.max_new_tokens}: lower --max_new_tokens')
    if sys.stdin is None:
        raise UserError('--chat: there is no standard input to read from')
    for stream in (sys.stdin, sys.stdout):      # bytes that are no text must not end the chat
        stream.reconfigure(errors='replace')
    print('Type a line and press Enter. Ctrl-C stops an answer, Ctrl-D leaves.')
    turns, answers = [], []
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        for turn in itertools.count():
            while not (line := input('> ')).strip():
                pass                            # nothing was said
            asked = [*turns, {'role': 'user', 'content': line}]
            # The prompt is what stands before the answer, whatever the answer will be
            prompt, _ = from_messages([*asked, {'role': 'assistant', 'content': '?'}],
                                      saved['template'])
            ids = tokenizer.encode_ordinary(prompt)
            if len(ids) > room:
                print(f'[the first {len(ids) - room} of {len(ids)} tokens are cut]')
            try:
                with autocast:
                    *_, [text], ended = next(respond(policy, [ids[-room:]], tokenizer, cfg, turn))
            except KeyboardInterrupt:
                print(' [stopped]')
                continue
            answers.append(text.removeprefix(' '))      # from_messages puts the space back
            print(printable(*mark_ends(answers[-1:], ended)))
            if cfg.history:
                turns = [*asked, {'role': 'assistant', 'content': answers[-1]}]
    print()                                     # the shell goes on in a line of its own
    return answers


def scored_samples(policy, scorer, prompts, ids, tokenizer, cfg):
    """Yields prompt by prompt its n rows: {prompt, response, score}, and a mark if without EOS."""
    began, tokens_so_far, batches = time.time(), 0, range(0, len(ids), cfg.batch_size)
    for i, out in zip(batches, respond(policy, ids, tokenizer, cfg)):
        tokens, response_mask, texts, ended = out
        asked = [prompt for prompt in prompts[i:i + cfg.batch_size] for _ in range(cfg.n)]
        scores = scorer(tokens, response_mask, asked, texts)                    # (B,)
        rows = [{'prompt': prompt, 'response': text, 'score': number,
                 **({} if end else {'response_cut': True})}
                for prompt, text, number, end in zip(asked, texts, scores.tolist(), ended)]
        yield from (rows[b:b + cfg.n] for b in range(0, len(rows), cfg.n))
        tokens_so_far += int(response_mask.sum())
        if i == batches[-1] or i // cfg.batch_size % max(1, len(batches) // 10) == 0:
            print(f'{min(i + cfg.batch_size, len(ids)):>6}/{len(ids)} prompts | '
                  f'{tokens_so_far / (time.time() - began) / 1e3:.1f}k tok/s', flush=True)


def make_pair(rows, no_eos_score, dropped):
    """One prompt's rows as a pair, by the rules at the top; or None, and dropped counts why."""
    scores = torch.tensor([row['score'] for row in rows], dtype=torch.float64)
    ended = torch.tensor(['response_cut' not in row for row in rows])
    scores = train_ppo.cap_unfinished(scores, ended, no_eos_score).tolist()
    rows, by_score = [{**row, 'score': s} for row, s in zip(rows, scores)], itemgetter('score')
    to_choose = [row for row in rows if row['response'] and 'response_cut' not in row]
    if not to_choose:
        dropped['no response to choose'] += 1
        return None
    best, worst = max(to_choose, key=by_score), min(rows, key=by_score)
    if best['score'] == worst['score'] or best['response'] == worst['response']:
        dropped['best and worst alike'] += 1
        return None
    return {'prompt': best['prompt'], 'chosen': best['response'], 'rejected': worst['response'],
            'chosen_score': best['score'], 'rejected_score': worst['score'],
            **({'rejected_cut': True} if 'response_cut' in worst else {})}


def write(cfg, saved, device, autocast):
    """Writes the scored rows, or the pairs they make; prints and returns a summary of them."""
    tokenizer = build_tokenizer(saved['tokenizer'])
    policy = load_model(GPT, saved, 'policy', device)
    scorer, source = train_ppo.load_scorer(cfg.reward, saved, device, cfg.batch_size)
    prompts = find_prompts(cfg, saved)
    block_size = min(policy.config.block_size, source['model']['block_size'])   # both read it
    ids = encode_prompts(prompts, tokenizer, block_size, cfg, cfg.split)
    written, scores, dropped = 0, [], Counter()
    temporary = Path(f'{cfg.out}.tmp')          # nothing half-written ever bears the name
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, 'w') as file, autocast:
            for rows in scored_samples(policy, scorer, prompts, ids, tokenizer, cfg):
                scores.append([row['score'] for row in rows])
                if cfg.pairs:
                    rows = filter(None, [make_pair(rows, cfg.no_eos_score, dropped)])
                for row in rows:
                    if not (cfg.pairs or row['response']):      # no row of training may be so
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
    """Shows, chats or writes; returns the answers, or the summary of what was written."""
    cfg = settle(cfg)
    device, autocast = set_up(cfg)
    saved = [load_checkpoint(run, POLICIES) for run in cfg.runs]
    if cfg.chat:
        return chat(cfg, saved[0], device, autocast)
    if cfg.out:
        return write(cfg, saved[0], device, autocast)
    return show(cfg, saved, device, autocast)


if __name__ == '__main__':
    run_cli(main, Config)
