"""
What a mistake costs: each planted mistake of tests/mutants.py, run to the end.

Each mistake is planted in a copy of the project, which then trains one stage on data/toy from the
healthy runs in out/toy, for fewer steps than the default recipe (STEPS), and answers 200 held-out
prompts at T=1 with its own code. A reward model is judged by the best of 8 answers of out/toy/sft
that it picks. It is compared with the same run without the mistake, which is equal bit for bit
until the mistake acts. A mistake that leaves no trace at the default flags is run with those of its
hunt (tests/exercises.toml), with three seeds. The verdicts:

    loud      a number leaves what healthy runs of 5 seeds show (at step 1, in an evaluation, or in
              the mean over a quarter of the run) by more than three times their range plus a tenth
              of their size, at step 1 a hundredth
    quiet     the log differs, but only from the healthy log of the same seed
    flags     the log differs only under the flags, or on the rows, of its hunt
    silent    the log does not differ there either

    python -m studies.mistakes --results        # runs what is missing in the table: an hour in all
    python -m studies.mistakes --only="7 63" --csv=out/again.csv                # some of them again
"""
import json, shutil, statistics, sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from prefgpt import UserError, run_cli
from studies.style import COLORS, GREY, frame, names, new_figure, save_picture
from studies.table import RESULTS, append_rows, committed, read_rows

sys.path.append('tests')            # the mistakes are the tests'
import hunts                        # noqa: E402
from hunts import HUNTS, NUMBERS, TOP, run_stage                    # noqa: E402


@dataclass
class Config:
    csv: str = 'out/studies/mistakes.csv'   # the table for rows that studies/results/ lacks
    results: bool = False           # add them to studies/results/mistakes.csv itself
    only: str = ''                  # numbers of mistakes to run, with spaces; '': all of them


STEPS = {'sft': (500, 100), 'rm': (300, 100), 'ppo': (30, 10), 'dpo': (150, 50)}    # eval_every
SEEDS = 0, 1, 2, 3, 4               # of healthy runs
MORE_SEEDS = 0, 1, 2                # of mistakes without a trace at the default flags; else 0
VERDICTS = 'loud', 'quiet', 'flags', 'silent'
WORK, DATA = TOP / 'out/studies/mistakes', TOP / 'data/toy'
NOTHING = {'reward': '', 'reward_se': '', 'harm': '', 'length': '', 'eos': ''}


def judged(folder, stage, out, rows):
    """Returns the judge's numbers of a run, or of the best of 8 that a reward model picks."""
    if rows == 'space' or not (out / 'ckpt.pt').exists():   # the judge knows no such prompt
        return NOTHING
    run = ([f'{TOP}/out/toy/sft', '--best_of=8', f'--select={out}'] if stage == 'rm' else [out])
    done = hunts.run_in(folder, '-m', 'tools.evaluate', *run, f'--data={DATA}',
                            f'--judge={DATA}/reward.py', '--prompts=200',
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
    """
    Returns {(number, step it begins at, whether of several steps): mean} over step 1, quarters of a
    run, and evaluations; no_end is how many of an evaluation's samples do not end.
    """
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


def run_mistake(number, seed=0):
    """Plants a mistake, runs its stage to the end, and returns its row."""
    name, mutant, entry = NUMBERS[number], hunts.mutant_of(number), HUNTS[NUMBERS[number]]
    stage, folder = entry.stage, WORK / f'planted-{number}'
    shutil.rmtree(folder, ignore_errors=True)
    hunts.plant(mutant, folder)
    flags, rows = hunts.hunt_flags(number, *STEPS[stage])
    data = hunts.write_rows(rows, WORK / f'rows-{rows}', 10 ** 6) if rows else DATA
    before, judge_before = healthy(stage, flags, data, rows, seed)
    after, words = run_stage(folder, stage, folder / 'out/run',
                             [*flags, f'--data={data}', f'--seed={seed}'])
    (step, differs), loud = trace(before, after), ('', '')
    if entry.flags or rows:                     # does it show without them after all?
        few = ['--steps=4', '--eval_every=4']
        log, _ = run_stage(folder, stage, folder / 'out/few',
                           [*few, f'--data={DATA}', f'--seed={seed}'])
        shows = trace(healthy(stage, few, DATA, seed=seed)[0], log)[0]
    else:
        shows = step
        loud = loudest(after, [healthy(stage, flags, DATA, seed=other)[0] for other in SEEDS])
    verdict = ('loud' if loud[0] else 'quiet') if shows else 'flags' if step else 'silent'
    judge = judged(folder, stage, folder / 'out/run', rows)
    shutil.rmtree(folder)
    (WORK / f'log-{number}.json').write_text(json.dumps(after))
    return {'number': number, 'mistake': name, 'invariants': ' '.join(mutant.invariants),
            'stage': stage, 'flags': entry.flags or rows and f'rows: {rows}', 'seed': seed,
            'trace_step': step, 'trace': differs, 'loud_step': loud[0], 'loud': loud[1],
            'verdict': verdict, **judge, 'healthy_reward': judge_before['reward'],
            'healthy_harm': judge_before['harm'],
            'ends': words[-1][:80] if not words[-1].startswith(str(folder)) else ''}


def run_healthy(stage, seed, template):
    """Returns a healthy run's row; it is loud if the other seeds do not show the like."""
    flags = [f'--steps={STEPS[stage][0]}', f'--eval_every={STEPS[stage][1]}']
    logs = {s: healthy(stage, flags, DATA, seed=s) for s in SEEDS}
    loud = loudest(logs[seed][0], [logs[s][0] for s in SEEDS if s != seed])
    return dict.fromkeys(template, '') | logs[seed][1] | {
        'number': 0, 'mistake': 'none', 'stage': stage, 'seed': seed, 'loud_step': loud[0],
        'loud': loud[1], 'verdict': 'loud' if loud[0] else 'healthy'}


def costs(rows, number):
    """Returns the reward that a mistake lost, per seed in which the judge could answer."""
    return [row['healthy_reward'] - row['reward'] for row in rows
            if row['number'] == number and row['reward'] != '']


def verdict_of(rows, number):
    """Returns the verdict on a mistake, that of seed 0, or '' before it has run."""
    return next((row['verdict'] for row in rows if (row['number'], row['seed']) == (number, 0)), '')


def draw(rows):
    """Draws what each mistake costs, by verdict, and names those that cost most."""
    figure = new_figure(10, 6)
    ax = figure.subplots()
    for k, verdict in enumerate(VERDICTS):
        own = [(statistics.fmean(cost), cost, number) for number in NUMBERS
               if verdict_of(rows, number) == verdict and (cost := costs(rows, number))]
        own.sort(key=lambda each: each[0])
        for i, (mean, cost, number) in enumerate(own):
            x = k + 0.6 * (i / max(1, len(own) - 1) - 0.5)      # from the cheapest to the dearest
            color = COLORS[list(STEPS).index(HUNTS[NUMBERS[number]].stage)]
            ax.plot([x] * len(cost), cost, '-', lw=1, color=color)
            ax.plot(x, mean, 'o', ms=5, color=color)
            if mean > (1.0 if verdict == 'loud' else 0.3):
                left = (len(own) - i) % 2               # neighbours' names would overlap
                ax.annotate(NUMBERS[number].split('/')[1], (x, mean),
                            (-6 if left else 6, -2.5), ha='right' if left else 'left',
                            textcoords='offset points', fontsize=7, color=GREY)
    spans = [[row['reward'] for row in rows if (row['number'], row['stage']) == (0, stage)]
             for stage in STEPS]
    wide = max(max(span, default=0.0) - min(span, default=0.0) for span in spans)
    ax.axhspan(-wide, wide, color=GREY, alpha=0.15, lw=0)
    ax.set_xlim(-0.6, 3.6)
    counts = Counter(verdict_of(rows, number) for number in NUMBERS)
    ax.set_xticks(range(4), [f'{verdict}: {counts[verdict]}\n{meaning}' for verdict, meaning in zip(
        VERDICTS, ('outside what healthy runs show', 'only against the same seed',
                   'only with the flags of its hunt', 'in no log'))])
    frame(ax, 'What a mistake costs, and whether the log shows it',
          'reward lost against the healthy run of the same seed; line: the range of three seeds; '
          'grey: how far five healthy seeds are apart')
    names(ax, [(stage, {'color': COLORS[i], 'marker': 'o', 'lw': 0})
               for i, stage in enumerate(STEPS)], loc='upper right')
    return figure


def main(cfg):
    """Runs the mistakes whose rows are missing, prints and draws all; returns the verdicts."""
    path = RESULTS / Path(cfg.csv).name if cfg.results else Path(cfg.csv)
    known = read_rows(committed(path)) + read_rows(path) * (committed(path) != path)
    if odd := [word for word in cfg.only.split() if word not in map(str, NUMBERS)]:
        raise UserError(f'--only={cfg.only}: {odd[0]} is not one of 1 to {len(NUMBERS)}')
    numbers = [int(word) for word in cfg.only.split()] or list(NUMBERS)
    for number in numbers:
        for seed in MORE_SEEDS:
            if (number, seed) in [(row['number'], row['seed']) for row in known] or (
                    seed > 0 and verdict_of(known, number) in ('loud', 'quiet')):
                continue
            known.append(run_mistake(number, seed))
            append_rows(path, known[-1:])
            print(*(known[-1][key] for key in (
                'number', 'mistake', 'seed', 'verdict', 'trace_step', 'trace', 'loud_step',
                'loud', 'reward', 'healthy_reward', 'ends')), sep=' | ', flush=True)
    if cfg.results and not any(row['number'] == 0 for row in known):
        known += [run_healthy(stage, seed, known[0]) for stage in STEPS for seed in SEEDS]
        append_rows(path, known[-len(STEPS) * len(SEEDS):])
    verdicts = Counter(verdict_of(known, number) for number in NUMBERS)
    print(', '.join(f'{verdict}: {verdicts[verdict]}' for verdict in VERDICTS))
    if cfg.results:
        save_picture(draw(known), path.with_suffix('.png'))
    return verdicts


if __name__ == '__main__':
    run_cli(main, Config)
