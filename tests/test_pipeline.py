"""
Runs whole commands, each with a few steps: run.sh from end to end, and the core by itself.

    python -m pytest -q tests/test_pipeline.py
"""
import json, os, re, runpy, shutil, subprocess, sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent


def copy_of_the_project(folder, *patterns):
    """Copies the project, or the files that match; the copy draws a hundred rows of toy data."""
    if patterns:
        for path in (path for pattern in patterns for path in TOP.glob(pattern)):
            (folder / path.relative_to(TOP)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path.relative_to(TOP))
    else:
        shutil.copytree(TOP, folder, ignore=shutil.ignore_patterns(
            'out', '.git', '.venv', '__pycache__', '*.jsonl', 'toy-*'))
    prepare = folder / 'data' / 'toy' / 'prepare.py'
    text, changed = re.subn(r"(?m)^(TRAIN_ROWS|VAL_ROWS) = .*",
                            r"\1 = {'sft': 100, 'pairs': 100, 'prompts': 100}", prepare.read_text())
    assert changed == 2
    prepare.write_text(text)
    return folder


def run_sh(folder, *arguments, **flags):
    """Calls run.sh in a folder with the Python of these tests; returns its status and lines."""
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    done = subprocess.run(['bash', 'run.sh', *arguments], cwd=folder, capture_output=True,
                          text=True, check=False,
                          env={**os.environ, **flags, 'PATH': path, 'SEED': '3'})
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_run_sh(tmp_path):
    """
    run.sh stops at a stage that fails; called again, it keeps the finished stages and goes on to
    the end: all files are there, and the table has its rows and columns.
    """
    folder = copy_of_the_project(tmp_path / 'clone')
    flags = {'FLAGS_SFT': '--steps=4 --n_layer=1 --n_embd=32 --max_new_tokens=8',
             'FLAGS_RM': '--steps=2', 'FLAGS_DPO': '--steps=2 --max_new_tokens=8',
             'FLAGS_PPO': '--steps=2 --rollout_size=16 --batch_size=8 --max_new_tokens=8',
             'FLAGS_EVALUATE': '--prompts=40 --max_new_tokens=16'}
    stages = ['== data/toy', '== 1. supervised fine-tuning', '== 2. reward model', '== 3. PPO',
              '== 4. DPO', '== Before and after']
    status, printed, errors = run_sh(folder, **{**flags, 'FLAGS_RM': '--steps=0'})
    assert status == 1 and errors.startswith('error: --steps=0')
    assert [line for line in printed if line.startswith('== ')] == stages[:3]
    out = folder / 'out' / 'toy-3'
    kept = (out / 'sft' / 'ckpt.pt').stat().st_mtime_ns

    status, printed, errors = run_sh(folder, **flags)
    assert status == 0, errors
    assert [line for line in printed if line.startswith('== ')] == stages
    assert [line for line in printed if 'is finished' in line] == [
        'out/toy-3/sft is finished: 4 steps']
    assert (out / 'sft' / 'ckpt.pt').stat().st_mtime_ns == kept
    for stage in ('sft', 'rm', 'ppo', 'dpo'):
        assert {'ckpt.pt', 'log.jsonl'} <= set(os.listdir(out / stage))
    rows = json.loads((out / 'evaluate.json').read_text())['rows']
    assert [row['run'] for row in rows] == ['out/toy-3/sft', 'out/toy-3/ppo', 'out/toy-3/dpo']
    for row in rows:
        assert {'reward', 'helpful', 'harm', 'refused', 'kl', 'length', 'eos'} <= set(row)
        assert 0 <= row['harm'] <= 1 and row['length'] <= 16 and 0 <= row['eos'] <= 1
    # The first three held-out prompts, answered by each of three runs
    prompts = (folder / 'data' / 'toy-3' / 'val.prompts.jsonl').read_text().splitlines()
    for line in prompts[:3]:
        at = printed.index(json.loads(line)['prompt'].splitlines()[0])
        assert [answer.split()[0] for answer in printed[at + 2:at + 5]] == [
            row['run'] for row in rows]


def test_run_sh_gpt2(tmp_path):
    """run.sh gpt2 from random weights: every line of it, on toy rows, with a small model."""
    folder = copy_of_the_project(tmp_path / 'clone')
    prepare = [sys.executable, '-m', 'data.toy.prepare', '--out=data/toy']
    subprocess.run(prepare, cwd=folder, check=True, capture_output=True)
    status, printed, errors = run_sh(
        folder, 'gpt2', DATA='data/toy', STEPS='1', FLAGS_DPO='--max_new_tokens=8',
        FLAGS_SFT='--n_layer=1 --n_head=2 --n_embd=32 --max_new_tokens=8',
        FLAGS_PPO='--rollout_size=16 --batch_size=8 --max_new_tokens=8',
        FLAGS_EVALUATE='--prompts=4 --max_new_tokens=8')
    assert status == 0, errors
    assert printed[0].startswith('random weights, which prove speed and memory and nothing else')
    out = folder / 'out' / 'toy-gpt2-1-steps-3'
    rows = json.loads((out / 'evaluate.json').read_text())['rows']
    assert [row['run'] for row in rows] == [f'out/toy-gpt2-1-steps-3/{name}'
                                            for name in ('sft', 'ppo', 'dpo')]
    # The learning rates are those of models of this size, not data/toy's
    rates = [json.loads((out / name / 'log.jsonl').read_text().splitlines()[0])['lr']
             for name in ('sft', 'rm', 'ppo', 'dpo')]
    assert all(0 < rate < 1e-4 for rate in rates)


# ----------------------------------------------------------------------------- the core by itself

@pytest.fixture(scope='module')
def foreign(tmp_path_factory):
    """Returns a folder with packages called as ours are; importing one of them fails."""
    folder = tmp_path_factory.mktemp('foreign')
    for name in ('data', 'tools', 'studies'):
        (folder / name).mkdir()
        (folder / name / '__init__.py').write_text('raise ImportError("not ours")\n')
    return folder


def python(folder, words, foreign):
    """Runs Python in a folder, with the foreign packages on its path; returns the lines printed."""
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(foreign), 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_no_other_package_is_taken_for_ours(foreign):
    """data, tools and studies are our packages even if others have the same names: without an
    __init__.py the other one would win."""
    code = 'import data, tools, studies; print(data.__file__, tools.__file__, studies.__file__)'
    assert python(TOP, ['-c', code], foreign)[0].split() == [
        str(TOP / name / '__init__.py') for name in ('data', 'tools', 'studies')]


@pytest.mark.parametrize('path', ['tools/sample.py', 'tools/evaluate.py'])
def test_a_module_called_as_a_script_says_how_to_call_it(path):
    """`python tools/sample.py` would not find our modules: one line names the command."""
    with pytest.raises(SystemExit, match=f"python -m {path[:-3].replace('/', '.')}$"):
        runpy.run_path(TOP / path, run_name='__main__')


# Calls each command line as `python` does, one after the other, in one process
COMMANDS = '''
import runpy, sys

for command, *flags in %r:
    sys.argv = [command, *flags]
    if command.endswith('.py'):
        runpy.run_path(command, run_name='__main__')
    else:
        runpy.run_module(command, run_name='__main__', alter_sys=True)
'''


def test_the_core_works_alone(tmp_path, foreign):
    """A copy of prefgpt.py, train_*.py and data/ without tools/, studies/ and tests/ draws the toy
    data and trains all four stages, whatever other packages there are."""
    copy_of_the_project(tmp_path, 'prefgpt.py', 'train_*.py', 'data/**/*.py')
    own = {'rm': [], 'dpo': ['--max_new_tokens=8'], 'sft': ['--max_new_tokens=8'],
           'ppo': ['--rollout_size=8', '--max_new_tokens=8', '--judge=data/toy/reward.py']}
    stages = ('sft', 'rm', 'ppo', 'dpo')            # all folders by default: data/toy, out/toy/...
    printed = python(tmp_path, ['-c', COMMANDS % [
        ['data.toy.prepare'],
        *([f'train_{stage}.py', '--steps=2', '--batch_size=8', *own[stage]] for stage in stages)
    ]], foreign)
    files = sorted((tmp_path / 'data' / 'toy').glob('*.jsonl'))
    assert [path.name for path in files] == [f'{split}.{kind}.jsonl' for split in ('train', 'val')
                                             for kind in ('pairs', 'prompts', 'sft')]
    assert [line.split(' | ')[0] for line in printed if ' | peak memory ' in line] == [
        f'out/toy/{stage}/ckpt.pt' for stage in stages]
    assert all((tmp_path / 'out' / 'toy' / stage / 'ckpt.pt').exists() for stage in stages)
