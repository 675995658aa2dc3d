"""
Exercises that grade themselves: functions to write, and planted mistakes to find (EXERCISES.md).

    python tests/exercises.py list              # what there is
    python tests/exercises.py start gae         # a copy in which the body of gae is missing
    python tests/exercises.py check gae         # runs the tests and golden arrays that judge it
    python tests/exercises.py hint gae          # the next of three hints
    python tests/exercises.py hunt 7            # a copy with mistake 7: its log, a healthy one
    python tests/exercises.py answer 7          # which mistake it was; answer gae: the function

A copy is written to out/exercises/NAME (hunt-7 for a hunt), or to a folder that you give as the
last word: start gae /tmp/gae. Nothing in the copy of a hunt says which mistake it has. After you
have changed the copy, call `hunt 7` again: the copy stays as it is, and runs again. A hunt
needs out/toy/sft and out/toy/rm, which `bash run.sh` makes. exercises.toml says what judges a
function, and under which flags a mistake of mutants.py shows.
"""
import argparse, ast, re, sys
from pathlib import Path

import pytest

from hunts import HUNTS, NUMBERS, TABLES, TOP, copy_project, explain, hunt, run_in

FILL_IN = TABLES['fill_in']
MISSING = "raise NotImplementedError('yours to write')"


def find(text, name):
    """Returns a file's lines, and the syntax tree of one of its functions."""
    node, = (node for node in ast.walk(ast.parse(text))
             if isinstance(node, ast.FunctionDef) and node.name == name)
    return text.splitlines(keepends=True), node


def blank(text, name):
    """Returns a file's text in which a function has its docstring and no body."""
    lines, node = find(text, name)
    lines[node.body[0].end_lineno:node.end_lineno] = [f'    {MISSING}\n']
    return ''.join(lines)


def golden_difference(file, patterns):
    """Compares what the code computes now with golden arrays; returns the first that differs."""
    import make                             # tests/golden, in the copy
    import numpy as np
    stored, ours = np.load(make.HERE / f'{file}.npz'), make.trace()[file]
    for name in stored.files:
        if any(re.fullmatch(pattern, name) for pattern in patterns.split()):
            a, b = ours[name], stored[name]
            if a.shape != b.shape:
                return f'{name} has the shape {a.shape}, not {b.shape}'
            if not np.allclose(a, b, rtol=1e-5, atol=1e-5):
                gap = np.nan_to_num(np.abs(a.astype(float) - b), nan=np.inf)
                place = tuple(map(int, np.unravel_index(np.argmax(gap), gap.shape)))
                return f'{name}{list(place) or ""} is {a[place]:.6g}, not {b[place]:.6g}'
    return ''


def judge(name):
    """Runs, in the copy, what judges a function: tests, then golden arrays. Prints the outcome."""
    exercise = FILL_IN[name]
    status = pytest.main(['-x', '-q', '--tb=short', '-p', 'no:cacheprovider',
                          '-o', 'verbosity_assertions=2',       # lists in full
                          f'--basetemp={TOP}/out/pytest',
                          *(f'tests/{test}' for test in exercise['tests'])])
    if status:                              # pytest has said what fails
        return
    for file, patterns in exercise['golden'].items():
        if difference := golden_difference(file, patterns):
            print(f'GOLDEN {file}.npz: {difference}')
            return
    print('DONE')


def check(name, folder):
    """Judges a function in a copy; returns what fails, with what it means, or ''."""
    exercise = FILL_IN[name]
    if not folder.exists():
        sys.exit(f'error: {folder} is not there: start {name} makes it')
    if MISSING in (folder / exercise['file']).read_text():
        return f"{name} is not written yet: it is in {folder / exercise['file']}"
    done = run_in(folder, '-c', f'import exercises; exercises.judge({name!r})')
    if failed := re.search(r'^(?:FAILED|ERROR) tests/([\w.]+::\w+)', done.stdout, re.MULTILINE):
        said = re.findall(r'^E (?! +\+ +(?:where|and) ).*\S', done.stdout.split('Full diff')[0],
                          re.MULTILINE)
        lines = re.findall(r'^tests/.*: in test_.*\n +(.*)', done.stdout, re.MULTILINE)
        return '\n'.join([f'{failed[1]} fails:', *said[:8],
                          *(f'Line of the test: {line}' for line in lines[-1:]),
                          'What it means: ' + exercise['tests'][failed[1]]])
    if golden := re.search('^GOLDEN (.*)', done.stdout, re.MULTILINE):
        return (f'The tests pass, but golden array {golden[1]}\nWhat it means: this batch has a '
                'case that you forgot; tests/golden/README.md has the formula')
    if not re.search('^DONE', done.stdout, re.MULTILINE):
        return 'The file does not even run:\n' + (done.stdout + done.stderr)[-600:]
    return ''


def start(name, folder):
    """Copies the project without the body of a function."""
    copy_project(folder)
    file = folder / FILL_IN[name]['file']
    file.write_text(blank(file.read_text(), name))
    line = file.read_text()[:file.read_text().index(MISSING)].count('\n') + 1
    print(f'{file}:{line}: write the body of {name}. Its docstring says what it returns.\n'
          f'Then: python tests/exercises.py check {name}   (or hint {name})')


def show_check(name, folder):
    """Prints what check finds; the exit status says whether the function is correct."""
    if failure := check(name, folder):
        print(failure)
        sys.exit(1)
    exercise = FILL_IN[name]
    arrays = ', '.join(f'{file}.npz: {names}' for file, names in exercise['golden'].items())
    print(f"{name} is correct: {len(exercise['tests'])} tests, golden arrays {arrays}")


def hint(name, folder):
    """Prints the next hint; the copy remembers how many were taken."""
    hints, taken = FILL_IN[name]['hints'], folder / 'hints-taken'
    number = min(int(taken.read_text()) if taken.exists() else 0, len(hints) - 1)
    print(f'hint {number + 1} of {len(hints)}: {hints[number]}')
    if folder.exists():
        taken.write_text(str(number + 1))


def main(command, name, folder):
    """Does what the command line says."""
    hunts = name.isdecimal() and int(name) in NUMBERS
    folder = Path(folder or TOP / f'out/exercises/{"hunt-" * hunts}{name}').resolve()
    functions = {'start': start, 'check': show_check, 'hint': hint}
    if command == 'list':
        print(f'start, check, hint: {" ".join(FILL_IN)}\nhunt: 1 to {len(HUNTS)}')
    elif command == 'hunt' and hunts:
        hunt(int(name), folder)
    elif command == 'answer' and hunts:
        explain(int(name))
    elif command == 'answer' and name in FILL_IN:
        lines, node = find((TOP / FILL_IN[name]['file']).read_text(), name)
        print(''.join(lines[node.lineno - 1:node.end_lineno]))
    elif command in functions and name in FILL_IN:
        functions[command](name, folder)
    else:
        sys.exit(f'error: {command} {name}: no such exercise, see list')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('command', choices='list start check hint hunt answer'.split())
    parser.add_argument('name', nargs='?', default='', help='a function, or the number of a hunt')
    parser.add_argument('folder', nargs='?', help='of the copy [out/exercises/NAME]')
    main(**vars(parser.parse_args()))
