"""
Writes the toy contest: demonstrations, preference pairs, prompts of three splits, a tokenizer.

Problems are split once and for all, by a hash of their prompts: a prompt is one function and a
function one prompt (language.py), so no stage meets a function that it is tested on. Settings are
chosen on val, results are reported on test.

  - train.sft, val.sft: correct programs in one style: x before digits where the order does not
    matter, and half of them a little longer than necessary ("e0+", "e0-", "e1*" for e, or
    "a(c-a)+" for a digit c).
  - train.pairs, val.pairs: what others wrote. Chosen are correct programs in another style: digits
    first, one or two detours, in a spelling that hardly any demonstration has ("0e+", "1e*", and
    "a(a-c)-" for c). Rejected is chosen with one symbol changed, so that it fails. This is the
    off-policy data of Xu et al. 2024: to the policy after SFT the winner is improbable.
  - train.prompts, val.prompts, and test-LEVEL.prompts and val-LEVEL.prompts, one level each, for
    evaluate's --split.

    python -m data.contest.prepare
"""
import random
from dataclasses import dataclass
from pathlib import Path

from data.bpe import write_tokenizer
from data.contest.language import LEVELS, OPERATIONS, PROBLEMS, SYMBOLS, WAYS
from data.contest.reward import score
from data.rows import shuffle, spread, write_all
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
    raise ValueError(f'{program!r} is no program')


def add_detour(rng, program, style):
    """Spells an expression of the program, drawn at random, in two more symbols."""
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


# --- problems, rows and files -------------------------------------------------------------------

def split_problems():
    """Returns all prompts, split -> level -> list; no function occurs twice."""
    splits = {'train': {}, 'val': {}, 'test': {}}
    for number, level in enumerate(LEVELS):
        prompts = shuffle(prompt for prompt, (_, name) in PROBLEMS.items() if name == level)
        for split, sizes in SPLITS.items():
            splits[split][level], prompts = prompts[:sizes[number]], prompts[sizes[number]:]
        splits['train'][level] = prompts
    return splits


def draw_prompt(rng, prompts, mix):
    """Draws a level with the shares of mix, then one of its prompts (level -> list)."""
    return rng.choice(prompts[rng.choices(LEVELS, mix)[0]])


def sft_row(rng, prompts):
    """Draws a demonstration."""
    prompt = draw_prompt(rng, prompts, SFT_MIX)
    return {'prompt': prompt, 'completion': draw_program(rng, PROBLEMS[prompt][0], 'own')}


def pair_row(rng, prompts):
    """Draws a preference pair."""
    prompt = draw_prompt(rng, prompts, SFT_MIX)
    chosen = draw_program(rng, PROBLEMS[prompt][0], 'other')
    return {'prompt': prompt, 'chosen': chosen, 'rejected': draw_wrong(rng, prompt, chosen)}


def prompt_row(rng, prompts):
    """Draws a prompt to train on."""
    return {'prompt': draw_prompt(rng, prompts, PROMPTS_MIX)}


def draw_rows(cfg):
    """Draws all rows of the data set; returns a dict "train.sft" and so on -> list of rows."""
    splits, rows = split_problems(), {}
    for name, draw, size in (('sft', sft_row, cfg.sft), ('pairs', pair_row, cfg.pairs),
                             ('prompts', prompt_row, cfg.prompts)):
        for split, count in (('train', size), ('val', VAL_ROWS)):
            rng = random.Random(f'{cfg.seed} {split} {name}')
            rows[f'{split}.{name}'] = [draw(rng, splits[split]) for _ in range(count)]
    for split in ('val', 'test'):
        for level in LEVELS:
            rows[f'{split}-{level}.prompts'] = [{'prompt': prompt}
                                                for prompt in splits[split][level]]
    return rows


def main(cfg):
    """Writes the data set into cfg.out; returns a dict file name -> number of rows."""
    out, rows = Path(cfg.out), draw_rows(cfg)
    out.mkdir(parents=True, exist_ok=True)
    counts = write_all(out, rows)
    write_tokenizer(out, 'contest', [], 257)    # 256 bytes and EOS, no merges: a token per symbol
    print('symbols of a demonstration:',
          spread([len(row['completion']) for row in rows['train.sft']]))
    for row in rows['train.pairs'][:3]:
        print(f"{row['prompt']} chosen {row['chosen']:<12} rejected {row['rejected']}")
    return counts


if __name__ == '__main__':
    run_cli(main, Config)
