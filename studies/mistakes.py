"""
What a mistake costs: each planted mistake of tests/mutants.py, run to the end.

Each mistake is planted in a copy of the project, which then trains one stage on data/toy from the
healthy runs in out/toy, for fewer steps than the default recipe (STEPS), and answers 200 held-out
prompts at T=1 with its own code. A reward model is judged by the best of 8 answers of out/toy/sft
that it picks. The same run without the mistake stands beside it, the same to the last bit until the
mistake acts. A mistake that leaves no trace at the default flags is run with those of its hunt
(tests/exercises.toml). The verdicts:

    loud      a number leaves what healthy runs of 5 seeds show (at step 1, in an evaluation, or in
              the mean over a quarter of the run) by three times their range and a tenth of its size
    quiet     the log differs, but only from the healthy log of the same seed
    flags     the log differs only under the flags, or on the rows, of its hunt
    silent    the log does not differ there either

    python -m studies.mistakes                      # adds the rows that are missing, draws them
"""
import json, shutil, statistics, sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from prefgpt import run_cli
from studies.style import COLORS, GREY, frame, names, new_figure, show_picture
from studies.table import RESULTS, append_rows, committed, read_rows

sys.path.append('tests')            # the mistakes are the tests'
import hunts                        # noqa: E402
from hunts import HUNTS, NUMBERS, TOP, run_stage                    # noqa: E402


@dataclass
class Config:
    csv: str = 'out/studies/mistakes.csv'   # the table for rows that studies/results/ lacks
    results: bool = False           # add them to studies/results/mistakes.csv itself
    only: str = ''                  # numbers of mistakes to run, with spaces; '': all of them
    again: bool = False             # run them although their rows are there
    quick: bool = False             # a smoke test: one mistake, a few steps, a table of its own


STEPS = {'sft': (500, 100), 'rm': (300, 100), 'ppo': (30, 10), 'dpo': (150, 50)}    # eval_every
SEEDS = 0, 1, 2, 3, 4               # of healthy runs
WORK = TOP / 'out/studies/mistakes'
NOTHING = {'reward': '', 'reward_se': '', 'harm': '', 'length': '', 'eos': ''}


def flags_of(number, steps):
    """Returns the flags of a mistake's run, and its rows ('': data/toy itself)."""
    flags, rows = hunts.hunt_flags(number, *steps)
    data = hunts.write_rows(rows, WORK / f'rows-{rows}', 10 ** 6) if rows else TOP / 'data/toy'
    return flags, data


def judged(folder, stage, out, rows):
    """Returns the judge's numbers of a run, or of the best of 8 that a reward model picks."""
    if rows == 'space' or not (out / 'ckpt.pt').exists():       # no prompts that the judge knows
        return NOTHING
    run = ([f'{TOP}/out/toy/sft', '--best_of=8', f'--select={out}'] if stage == 'rm' else [out])
    done = hunts.run_in(folder, '-m', 'tools.evaluate', *run, f'--data={TOP}/data/toy',
                            f'--judge={TOP}/data/toy/reward.py', '--prompts=200',
                            f'--json={out}/evaluate.json')
    if done.returncode:
        print(done.stderr.splitlines()[-1])
        return NOTHING
    row = json.loads((out / 'evaluate.json').read_text())['rows'][-1]
    return {key: row[key] for key in NOTHING}


def healthy(stage, flags, data, rows='', seed=0):
    """Runs a stage without a mistake, once; returns its log and the judge's numbers."""
    out = WORK / '_'.join(['healthy', stage, *flags, rows, str(seed)]).replace('--', '')
    if not (out / 'judged.json').exists():
        shutil.rmtree(out, ignore_errors=True)
        log, _ = run_stage(TOP, stage, out, [*flags, f'--data={data}', f'--seed={seed}'])
        (out / 'judged.json').write_text(json.dumps([log, judged(TOP, stage, out, rows)]))
    return json.loads((out / 'judged.json').read_text())


def windows(log):
    """Returns {(number, step it begins at): mean} over step 1, quarters of a run, evaluations."""
    steps = [row for row in log if 'samples' not in row]
    parts = [steps[:1], *(steps[i * len(steps) // 4:(i + 1) * len(steps) // 4] for i in range(4))]
    parts += [[row | {'no_end': sum('[no end]' in sample for sample in row['samples'])}]
              for row in log if 'samples' in row]
    return {(name, part[0]['step'], len(part) > 1): statistics.fmean(row[name] for row in part)
            for part in parts if part for name in part[0]
            if name not in ('step', 'lr', 'samples')}


def loudest(log, others):
    """Returns the first numbers of a log that are far outside what other healthy runs show."""
    seen, found = [windows(other) for other in others], []
    for key, value in windows(log).items():
        known = [other[key] for other in seen if key in other]
        if len(known) == len(seen):
            low, high = min(known), max(known)
            # Step 1 is known exactly: ln 2, a ratio of 1. Later, a tenth more or less is nothing
            share = 0.01 if key[1:] == (1, False) else 0.1
            room = 3 * (high - low) + share * max(abs(low), abs(high), 1e-2)
            if not low - room <= value <= high + room:
                found.append((key[1], f'{key[0]} {value:.3g}, not {low:.3g} to {high:.3g}'))
    return min(found, key=lambda pair: pair[0]) if found else ('', '')


def trace(before, after):
    """Returns the step at which two logs first differ, and up to four numbers there, as text."""
    found = list(hunts.differences(before, after))
    here = [difference for difference in found if difference[0] == found[0][0]]
    return (found[0][0] if found else ''), '; '.join(
        name if name == 'samples' else f'{name} {x:.3g} -> {y:.3g}' for _, name, x, y in here[:4])


def run_mistake(number, quick):
    """Plants a mistake, runs its stage to the end, and returns its row."""
    name, entry = NUMBERS[number], HUNTS[NUMBERS[number]]
    mutant = hunts.mutant_of(number)
    stage, hidden = entry.stage, bool(entry.flags or entry.rows)
    steps, folder = (3, 3) if quick else STEPS[entry.stage], WORK / f'planted-{number}'
    shutil.rmtree(folder, ignore_errors=True)
    hunts.plant(mutant, folder)
    flags, data = flags_of(number, steps)
    before, judge_before = healthy(stage, flags, data, entry.rows)
    after, words = run_stage(folder, stage, folder / 'out/run',
                             [*flags, f'--data={data}', '--seed=0'])
    step, differs = trace(before, after)
    row = {'number': number, 'mistake': name, 'invariants': ' '.join(mutant.invariants),
           'stage': stage, 'flags': entry.flags or entry.rows and f'rows: {entry.rows}',
           'seed': 0, 'trace_step': step, 'trace': differs,
           'loud_step': '', 'loud': '', 'verdict': 'flags' if step else 'silent'}
    if not hidden:
        row |= {'verdict': 'quiet' if step else 'silent'}
        loud = loudest(after, [healthy(stage, flags, data, seed=seed)[0]
                               for seed in SEEDS[:1 if quick else None]])
        if step and loud[0]:
            row |= {'loud_step': loud[0], 'loud': loud[1], 'verdict': 'loud'}
    elif not quick:                                 # does it show without its flags after all?
        few, data = ['--steps=4', '--eval_every=4'], TOP / 'data/toy'
        log, _ = run_stage(folder, stage, folder / 'out/few', [*few, f'--data={data}', '--seed=0'])
        if trace(healthy(stage, few, data)[0], log)[0]:
            row['verdict'] = 'quiet'
    row |= judged(folder, stage, folder / 'out/run', entry.rows)
    row |= {'healthy_reward': judge_before['reward'], 'healthy_harm': judge_before['harm'],
            'ends': words[-1][:80] if not words[-1].startswith(str(folder)) else ''}
    shutil.rmtree(folder)
    (WORK / f'log-{number}.json').write_text(json.dumps(after))
    return row


def run_healthy(stage, seed, template):
    """Returns a healthy run's row; it is loud if the other seeds do not show the like."""
    flags = [f'--steps={STEPS[stage][0]}', f'--eval_every={STEPS[stage][1]}']
    logs = {s: healthy(stage, flags, TOP / 'data/toy', seed=s) for s in SEEDS}
    loud = loudest(logs[seed][0], [logs[s][0] for s in SEEDS if s != seed])
    row = dict.fromkeys(template, '') | logs[seed][1] | {
        'number': 0, 'mistake': 'none', 'stage': stage, 'seed': seed, 'loud_step': loud[0],
        'loud': loud[1], 'verdict': 'loud' if loud[0] else 'healthy'}
    return row


def main(cfg):
    """Runs the mistakes whose rows are missing, prints and draws all; returns the verdicts."""
    path = Path(cfg.csv)
    path = path.with_stem(path.stem + '-quick') if cfg.quick else (
        RESULTS / path.name if cfg.results else path)
    numbers = [int(word) for word in cfg.only.split()] or ([63] if cfg.quick else list(NUMBERS))
    known = {row['mistake'] for row in read_rows(committed(path)) + read_rows(path)}
    for number in sorted(numbers, key=lambda number: HUNTS[NUMBERS[number]].stage == 'ppo'):
        if cfg.again or NUMBERS[number] not in known:
            row = run_mistake(number, cfg.quick)
            append_rows(path, [row])
            print(number, row['mistake'], row['verdict'], row['trace_step'], row['trace'], '|',
                  row['loud_step'], row['loud'], '|', row['reward'], row['healthy_reward'],
                  row['ends'], flush=True)
    rows = read_rows(committed(path)) + [row for row in read_rows(path) if committed(path) != path]
    if not cfg.quick and not any(row['number'] == 0 for row in rows):
        more = [run_healthy(stage, seed, rows[0]) for stage in STEPS for seed in SEEDS]
        append_rows(path, more)
        rows += more
    return Counter(row['verdict'] for row in rows if row['number'])


if __name__ == '__main__':
    run_cli(main, Config)
