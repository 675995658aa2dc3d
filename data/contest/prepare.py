"""
Writes the toy contest: demonstrations, preference pairs, prompts of three splits, a tokenizer.

Problems are split once and for all, by a hash of their prompts: a prompt is one function and a
function one prompt (language.py), so no stage ever meets a function that it is tested on. Settings
are chosen on val, results are reported on test.

  - train.sft, val.sft: correct programs, in one style: x before digits where the order does not
    matter, and every other one a little longer than it need be ("e0+", "e0-", "e1*" for e, or
    "a(c-a)+" for a digit c).
  - train.pairs, val.pairs: what others wrote. Chosen are correct programs in another style: digits
    first, one or two detours, spelled in a way that hardly any demonstration has ("0e+", "1e*", and
    "a(a-c)-" for c). Rejected is chosen with one symbol changed, so that it fails. That is the
    off-policy data of Xu et al. 2024: to the policy after SFT the winner is improbable.
  - train.prompts, val.prompts, and test-LEVEL.prompts and val-LEVEL.prompts, one level each, for
    evaluate's --split.

Levels are mixed, one-operation problems a tenth; the sizes stand below.
What it does not do: order or number the problems by difficulty within a level.

    python -m data.contest.prepare
"""
import random
from dataclasses import dataclass
from pathlib import Path

from data.bpe import train_bpe, write_tiktoken
from data.contest.language import LEVELS, OPERATIONS, PROBLEMS, SYMBOLS, WAYS
from data.contest.reward import score
from data.rows import shuffle, spread, write_rows
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


# --- programs ------------------------------------------------------------------------------------

def draw_shortest(rng, function, style):
    """A program with as few operations as possible, one of all those; digits first or last."""
    if not WAYS[function]:
        return str(function[0]) if function[0] == function[1] else 'x'
    operation, first, second = rng.choice(WAYS[function])
    first, second = draw_shortest(rng, first, style), draw_shortest(rng, second, style)
    digit, other = (first, second) if first.isdigit() else (second, first)
    if operation != '-' and digit.isdigit():
        first, second = (digit, other) if style == 'other' else (other, digit)
    return first + second + operation


def begin_of(program, end):
    """Where the expression begins whose last symbol is program[end]. begin_of('3x5++', 3) is 1."""
    missing = 1                         # values still to be found, walking to the left
    for begin in range(end, -1, -1):
        missing += 1 if program[begin] in OPERATIONS else -1
        if not missing:
            return begin
    raise ValueError(f'{program!r} is no program')


def add_detour(rng, program, style):
    """The same function in two more symbols, about an expression of the program drawn at random."""
    end = rng.randrange(len(program))
    begin = begin_of(program, end)
    expression = program[begin:end + 1]
    longer = rng.choice(DETOURS[style]).format(expression)
    if expression.isdigit() and rng.random() < 0.5:     # another way to say that digit
        one, digit = rng.randrange(10), int(expression)
        longer = (f'{one}{(digit - one) % 10}+' if style == 'own' else
                  f'{one}{(one - digit) % 10}-')
    return program[:begin] + longer + program[end + 1:]


def draw_program(rng, function, style):
    """A correct program: shortest and 0 or 1 detours in SFT's own style, 1 or 2 in the other."""
    program = draw_shortest(rng, function, style)
    for _ in range(rng.randrange(2) + (style == 'other')):
        program = add_detour(rng, program, style)
    return program


def draw_wrong(rng, prompt, program):
    """The program with one symbol changed, so that it is wrong."""
    while True:
        place = rng.randrange(len(program))
        wrong = program[:place] + rng.choice(SYMBOLS) + program[place + 1:]
        if not score(prompt, wrong)['correct']:
            return wrong


# --- problems, rows and files -------------------------------------------------------------------

def split_problems():
    """All prompts, split -> level -> list. No function is in two splits, nor twice in one."""
    splits = {'train': {}, 'val': {}, 'test': {}}
    for number, level in enumerate(LEVELS):
        prompts = shuffle(prompt for prompt, (_, name) in PROBLEMS.items() if name == level)
        for split, sizes in SPLITS.items():
            splits[split][level], prompts = prompts[:sizes[number]], prompts[sizes[number]:]
        splits['train'][level] = prompts
    return splits


def draw_prompt(rng, prompts, mix):
    """A prompt of a level drawn with the shares of mix; prompts: level -> list."""
    return rng.choice(prompts[rng.choices(LEVELS, mix)[0]])


def sft_row(rng, prompts):
    prompt = draw_prompt(rng, prompts, SFT_MIX)
    return {'prompt': prompt, 'completion': draw_program(rng, PROBLEMS[prompt][0], 'own')}


def pair_row(rng, prompts):
    prompt = draw_prompt(rng, prompts, SFT_MIX)
    chosen = draw_program(rng, PROBLEMS[prompt][0], 'other')
    return {'prompt': prompt, 'chosen': chosen, 'rejected': draw_wrong(rng, prompt, chosen)}


def prompt_row(rng, prompts):
    return {'prompt': draw_prompt(rng, prompts, PROMPTS_MIX)}


def draw_rows(cfg):
    """All rows of the data set: dict "train.sft" and so on -> list of dicts."""
    splits, rows = split_problems(), {}
    sizes = {'train': (cfg.sft, cfg.pairs, cfg.prompts), 'val': (VAL_ROWS,) * 3}
    for split in ('train', 'val'):
        for (name, draw), size in zip((('sft', sft_row), ('pairs', pair_row),
                                       ('prompts', prompt_row)), sizes[split]):
            rng = random.Random(f'{cfg.seed} {split} {name}')
            rows[f'{split}.{name}'] = [draw(rng, splits[split]) for _ in range(size)]
    for split in ('val', 'test'):
        for level in LEVELS:
            rows[f'{split}-{level}.prompts'] = [{'prompt': prompt}
                                                for prompt in splits[split][level]]
    return rows


def main(cfg):
    """Write the data set into cfg.out. Returns dict file name without .jsonl -> number of rows."""
    out, rows = Path(cfg.out), draw_rows(cfg)
    out.mkdir(parents=True, exist_ok=True)
    for name, listed in rows.items():
        write_rows(out / f'{name}.jsonl', listed)
        print(f"{name + '.jsonl':<34} {len(listed):6} rows")
    # 256 bytes and EOS, no merges: a symbol is a token
    write_tiktoken(out / 'contest.tiktoken', train_bpe([], 257))
    (out / 'tokenizer').write_text('contest.tiktoken\n')
    print('symbols of a demonstration:',
          spread([len(row['completion']) for row in rows['train.sft']]))
    for row in rows['train.pairs'][:3]:
        print(f"{row['prompt']} chosen {row['chosen']:<12} rejected {row['rejected']}")
    return {name: len(listed) for name, listed in rows.items()}


if __name__ == '__main__':
    run_cli(main, Config)
