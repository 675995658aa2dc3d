"""
Writes the toy contest: demonstrations, preference pairs, prompts of three splits, a tokenizer.

Problems are split once and for all, by a hash of their prompts. Each prompt means one function, and
no two mean the same (language.py), so no stage meets a function that it is tested on. Settings are
chosen on val, results are reported on test.

  - sft: correct programs in one style: x before digits where the order does not matter, and half of
    them a little longer than necessary ("e0+", "e0-", "e1*" for e, or "a(c-a)+" for a digit c).
  - pairs: what others wrote. Chosen are correct programs in another style: digits first, and one or
    two detours that hardly any demonstration has ("0e+", "1e*", and "a(a-c)-" for c). Rejected is
    chosen with one symbol changed, so that it fails. This is the off-policy data of Xu et al. 2024:
    to the policy after SFT the winner is improbable.
  - prompts, and test-LEVEL.prompts and val-LEVEL.prompts of one level each, for evaluate's --split.

    python -m data.contest.prepare
"""
import random
from dataclasses import dataclass
from pathlib import Path

from data.bpe import write_tokenizer
from data.contest.language import LEVELS, OPERATIONS, PROBLEMS, SYMBOLS, WAYS
from data.contest.reward import score
from data.rows import shuffle, write_all
from prefgpt import run_cli


@dataclass
class Config:
    seed: int = 0                       # of what is drawn; the split of the problems is fixed
    out: str = 'data/contest'           # the folder to write to
    sft: int = 60_000                   # demonstrations
    pairs: int = 5_000                  # preference pairs
    prompts: int = 20_480               # prompts to train on, most problems several times


SPLITS = {'test': (8, 110, 60), 'val': (4, 40, 60)}     # problems of each level; the rest: train
SFT_MIX = (0.1, 0.5, 0.4)               # shares of the levels among demonstrations and pairs
PROMPTS_MIX = (0.1, 0.4, 0.5)           # and among the prompts to train on
VAL_ROWS = 500                          # demonstrations, and pairs, held out
DETOURS = {'own': ('{}0+', '{}0-', '{}1*'), 'other': ('0{}+', '1{}*')}     # all leave {} as it is


def draw_shortest(rng, function, style):
    """Draws one of the shortest programs; style says whether digits come first or last."""
    if not WAYS[function]:
        return str(function[0]) if function[0] == function[1] else 'x'
    operation, first, second = rng.choice(WAYS[function])
    first, second = draw_shortest(rng, first, style), draw_shortest(rng, second, style)
    digit, other = (first, second) if first.isdigit() else (second, first)
    if operation != '-' and digit.isdigit():
        first, second = (digit, other) if style == 'other' else (other, digit)
    return first + second + operation


def begin_of(program, end):
    """Returns where the expression begins that ends at program[end]: ('3x5++', 3) -> 1."""
    missing = 1                         # values still to be found, walking to the left
    for begin in range(end, -1, -1):
        missing += 1 if program[begin] in OPERATIONS else -1
        if not missing:
            return begin


def add_detour(rng, program, style):
    """Rewrites an expression of the program, drawn at random, with two more symbols."""
    end = rng.randrange(len(program))
    begin = begin_of(program, end)
    expression = program[begin:end + 1]
    longer = rng.choice(DETOURS[style]).format(expression)
    if expression.isdigit() and rng.random() < 0.5:     # a sum or a difference that is this digit
        one, digit = rng.randrange(10), int(expression)
        longer = (f'{one}{(digit - one) % 10}+' if style == 'own' else
                  f'{one}{(one - digit) % 10}-')
    return program[:begin] + longer + program[end + 1:]


def draw_program(rng, function, style):
    """Draws a correct program with 0 or 1 detours in SFT's own style, 1 or 2 in the other."""
    program = draw_shortest(rng, function, style)
    for _ in range(rng.randrange(2) + (style == 'other')):
        program = add_detour(rng, program, style)
    return program


def draw_wrong(rng, prompt, program):
    """Changes one symbol of the program, so that it is wrong."""
    while True:
        place = rng.randrange(len(program))
        wrong = program[:place] + rng.choice(SYMBOLS) + program[place + 1:]
        if not score(prompt, wrong)['correct']:
            return wrong


def split_problems():
    """Returns all prompts, split -> level -> list; no function occurs twice."""
    splits = {'train': {}, 'val': {}, 'test': {}}
    for number, level in enumerate(LEVELS):
        prompts = shuffle(prompt for prompt, (_, name) in PROBLEMS.items() if name == level)
        for split, sizes in SPLITS.items():
            splits[split][level], prompts = prompts[:sizes[number]], prompts[sizes[number]:]
        splits['train'][level] = prompts
    return splits


def draw_row(rng, prompts, kind):
    """Draws a level, one of its prompts (level -> list), and what else rows of that kind hold."""
    mix = PROMPTS_MIX if kind == 'prompts' else SFT_MIX
    prompt = rng.choice(prompts[rng.choices(LEVELS, mix)[0]])
    function, _ = PROBLEMS[prompt]
    if kind == 'sft':
        return {'prompt': prompt, 'completion': draw_program(rng, function, 'own')}
    if kind == 'pairs':
        chosen = draw_program(rng, function, 'other')
        return {'prompt': prompt, 'chosen': chosen, 'rejected': draw_wrong(rng, prompt, chosen)}
    return {'prompt': prompt}


def draw_rows(cfg):
    """Draws all rows of the data set; returns a dict "train.sft" and so on -> list of rows."""
    splits, rows = split_problems(), {}
    for kind, size in (('sft', cfg.sft), ('pairs', cfg.pairs), ('prompts', cfg.prompts)):
        for split, count in (('train', size), ('val', VAL_ROWS)):
            rng = random.Random(f'{cfg.seed} {split} {kind}')
            rows[f'{split}.{kind}'] = [draw_row(rng, splits[split], kind) for _ in range(count)]
    for split in ('val', 'test'):
        for level in LEVELS:
            rows[f'{split}-{level}.prompts'] = [{'prompt': p} for p in splits[split][level]]
    return rows


def main(cfg):
    """Writes the data set into cfg.out; returns a dict file name -> number of rows."""
    out, rows = Path(cfg.out), draw_rows(cfg)
    out.mkdir(parents=True, exist_ok=True)
    counts = write_all(out, rows)
    write_tokenizer(out, 'contest', [], 257)    # 256 bytes and EOS, no merges: a token per symbol
    return counts


if __name__ == '__main__':
    run_cli(main, Config)
