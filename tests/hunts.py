"""
The bug hunts of exercises.py: a mistake of mutants.py in a copy, and its log beside a healthy one.

exercises.toml says which stage shows a mistake, and with which flags or rows if not with the
defaults; the place in its list is the mistake's number. studies/mistakes.py runs all of them.
"""
import json, os, re, shutil, subprocess, sys, tomllib
from collections import namedtuple
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TOP), str(TOP / 'tests')]

from mutants import MUTANTS, mutated        # noqa: E402, after the path

TABLES = tomllib.loads((TOP / 'tests/exercises.toml').read_text('utf-8'))
Hunt = namedtuple('Hunt', 'stage flags rows case')
HUNTS = {name: Hunt(*entry) for name, entry in TABLES['hunt'].items()}
NUMBERS = dict(enumerate(HUNTS, 1))         # number -> mutant
# Steps of a hunt, and how often it evaluates: seconds, but enough to see where the numbers go
FEW = {'sft': (60, 30), 'rm': (30, 15), 'ppo': (6, 3), 'dpo': (30, 15)}
# With --resume, a run is killed after step 5, past the checkpoint of step 4, before it is resumed
KILL = """
import os, runpy, sys, prefgpt
log = prefgpt.Run.log
def log_and_die(self, step, *arguments, **options):
    log(self, step, *arguments, **options)
    if step == 5:
        os._exit(9)
prefgpt.Run.log, sys.argv = log_and_die, sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


# ----------------------------------------------------------------------------- copies

def mutant_of(number):
    """Returns the mutant with a number."""
    mutant, = (mutant for mutant in MUTANTS if mutant.name == NUMBERS[number])
    return mutant


def copy_project(folder, *leave_out):
    """Copies the project to a new folder, without runs, data sets and the names in leave_out."""
    if folder.exists():
        sys.exit(f'error: {folder} exists: name another folder, or remove it')
    shutil.copytree(TOP, folder, ignore=shutil.ignore_patterns(
        '.*', 'out', '__pycache__', 'toy-*', '*.jsonl', '*.zip', '*.png', *leave_out))


def plant(mutant, folder):
    """Writes a copy of what one runs, with a mutant in it; no file of it names the mistake."""
    copy_project(folder, 'tests', 'studies')
    (folder / mutant.file).write_text(mutated(mutant))


def run_in(folder, *command):
    """Runs Python in a copy, on one thread, with the copy's own modules."""
    paths = os.pathsep.join(str(folder / name) for name in ('', 'tests', 'tests/golden'))
    done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, text=True,
                          capture_output=True, env=os.environ | {
                              'OMP_NUM_THREADS': '1', 'PYTHONPATH': paths})
    if "No module named 'torch'" in done.stdout + done.stderr:
        sys.exit(f'error: {sys.executable} has no torch. If run.sh installed it: '
                 'source .venv/bin/activate')
    return done


# ----------------------------------------------------------------------------- runs and logs

def changed_row(rows, i, row):
    """Returns row i of data/toy so that a mistake shows which ordinary rows hide."""
    if i % 2 == 0 and rows in ('special', 'long', 'marked', 'short'):   # every second row
        return row
    if rows == 'short':                                 # prompts of three tokens
        return row | {'prompt': '\nbot:'}
    if rows == 'special':                               # text that looks like a special token
        return row | {'prompt': row['prompt'].replace('user: ', 'user: <|endoftext|>')}
    if rows == 'long' and 'chosen' in row:              # pairs that differ only past the block
        return row | {'chosen': row['chosen'] * 20, 'rejected': row['chosen'] * 20 + ' no.'}
    if 'completion' not in row:
        return row
    prompt, text = row['prompt'], row['completion']
    return row | {'space': {'prompt': prompt + ' ', 'completion': text.lstrip()},
                  'zero': {'completion': text.replace('.', '\0')},      # its id is 0, like a pad's
                  'marked': {'completion': text[:len(text) // 2], 'completion_cut': True},
                  }.get(rows, {})


def write_rows(rows, folder, most):
    """Writes a folder like data/toy with at most so many training rows, changed; returns it."""
    if folder.exists():
        return folder
    part = folder.with_name(folder.name + '.part')      # a folder is whole, or not there
    shutil.copytree(TOP / 'data/toy', part, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns('*.py', '__pycache__'))
    for path in part.glob('*.jsonl'):
        train, lines = path.name.startswith('train'), path.read_text('utf-8').splitlines()
        lines = lines[:most if train else most // 10]   # held-out rows stay: the judge knows them
        path.write_text(''.join(json.dumps(changed_row(rows * train, i, json.loads(line))) + '\n'
                                for i, line in enumerate(lines)), 'utf-8')
    if rows == 'space':
        (part / 'template.txt').unlink()            # no template may end in a space
    return part.rename(folder)


def read_log(out):
    """Reads a run's log without its clocks."""
    rows = map(json.loads, (out / 'log.jsonl').open()) if (out / 'log.jsonl').exists() else ()
    return [{key: x for key, x in row.items() if key not in ('ms', 'tok_per_s')} for row in rows]


def run_stage(folder, stage, out, flags):
    """Runs a stage in a copy; with --resume it is killed first. Returns its log, and its words."""
    toy = TOP / 'out/toy'
    if not (toy / 'rm/ckpt.pt').exists():
        sys.exit(f'error: {toy}/rm is not there: bash run.sh makes it')
    inputs = [] if stage == 'sft' else [f'--init={toy}/sft']
    if stage == 'ppo':
        inputs += [f'--reward={toy}/rm', f'--judge={TOP}/data/toy/reward.py']
    command = [f'train_{stage}.py', *inputs, f'--out={out}', *flags]
    if '--resume' in flags:
        run_in(folder, '-c', KILL, *command, '--eval_every=4')
    done = run_in(folder, *command)
    return read_log(out), (done.stdout + done.stderr).splitlines()


def differences(healthy, planted):
    """Yields (step, name, healthy number, planted number) where logs differ by 0.1 % or more."""
    for a, b in zip(healthy, planted):
        if a['step'] != b['step'] or a.keys() != b.keys():
            yield a['step'], 'step', a['step'], b['step']
            return                              # from here on, rows do not belong together
        for name, x in a.items():
            if (x != b[name] if name == 'samples'
                    else not abs(b[name] - x) <= 1e-3 * max(abs(x), 1e-2)):
                yield a['step'], name, x, b[name]
    if len(healthy) != len(planted):
        yield len(healthy), 'rows', len(healthy), len(planted)


def show_logs(healthy, planted):
    """Prints two logs, metric by metric, the healthy numbers above; * where they differ."""
    marked = {(step, name) for step, name, *_ in differences(healthy, planted)}
    for evaluations in (False, True):
        a, b = ([row for row in log if ('samples' in row) == evaluations]
                for log in (healthy, planted))
        shown = sorted({0, 1, 2, len(a) // 2, len(a) - 1} & set(range(len(a))))
        for name in a[0] if a else ():
            for which, log in (('healthy', a), ('planted', b)):
                cells = [f'{log[i][name]:11.4g}' + ' *'[log is b and (a[i]['step'], name) in marked]
                         for i in shown if i < len(log) and name != 'samples']
                if cells:
                    print(f'{name:<18} {which}', *cells)
        for which, log in (('healthy', a), ('planted', b)):
            for sample in log[-1].get('samples', ()) if log else ():
                print(f'{which} | ' + sample.strip().replace('\n', f'\n{which} | '))


def hunt_flags(number, steps, eval_every):
    """Returns the flags under which a mistake shows, and the kind of rows."""
    entry = HUNTS[NUMBERS[number]]
    return [f'--steps={steps}', f'--eval_every={eval_every}', *entry.flags.split()], entry.rows


def hunt(number, folder):
    """Plants a mistake in a copy, runs its stage there and in the project, and shows both logs."""
    mutant, stage = mutant_of(number), HUNTS[NUMBERS[number]].stage
    if not folder.exists():
        plant(mutant, folder)
    flags, rows = hunt_flags(number, *FEW[stage])
    work = TOP / 'out/exercises'
    flags.append(f"--data={write_rows(rows, work / ('rows-' + (rows or 'plain')), 2000)}")
    kept = work / re.sub(r'\W+', '-', ' '.join(['healthy', stage, *flags[:-1], rows]))
    if not (kept / 'done').exists():
        shutil.rmtree(kept, ignore_errors=True)
        log, words = run_stage(TOP, stage, kept, flags)
        if not log:
            sys.exit('error: the healthy run failed:\n' + '\n'.join(words[-5:]))
        (kept / 'done').touch()
    shutil.rmtree(folder / 'out', ignore_errors=True)
    healthy, (planted, words) = read_log(kept), run_stage(folder, stage, folder / 'out/run', flags)
    killed = ', killed after step 5 and resumed' if '--resume' in flags else ''
    print(f'{folder} ran train_{stage}.py {" ".join(flags)}{killed}\n')
    frames = [word for word in words if word.startswith(f'  File "{folder}')]
    print('\n'.join(word for word in words if word in frames[-1:]     # where the run failed
                    or re.match(r'(train:|val:|error|\w*Error)', word)))
    show_logs(healthy, planted)
    unchanged = (folder / mutant.file).read_text() == mutated(mutant)
    print(f'\nFind the line, mend it there, and call hunt {number} again, or answer {number}.'
          if list(differences(healthy, planted)) else
          '\nThe log does not show this one: read the code.' if unchanged else
          '\nThe logs agree: it is mended, if they differed before.')


def explain(number):
    """Prints the mistake that was to be found, and where other projects made it."""
    mutant = mutant_of(number)
    case = TABLES['case'].get(HUNTS[mutant.name].case, 'We know no report of it in other projects.')
    print(f'{mutant.name}, in {mutant.file}\n  instead of  {mutant.old}\n  it has      '
          f"{mutant.new}\ncaught by {' and '.join(mutant.invariants)} (tests/README.md)\n{case}")
