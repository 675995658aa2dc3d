"""
Whole commands, each with a few steps: run.sh from end to end, and the core by itself.

    python -m pytest -q tests/test_pipeline.py
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent


def run_sh(folder, **flags):
    """`bash run.sh` in a folder with the Python of these tests; the lines it printed."""
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    done = subprocess.run(['bash', 'run.sh'], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, **flags, 'PATH': path, 'SEED': '3'})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_run_sh(tmp_path):
    """
    The whole pipeline with a few steps per stage: all files are there, the table has its rows and
    columns, and a second call keeps the finished stages and makes up for the one that is missing.
    """
    folder = tmp_path / 'clone'
    shutil.copytree(TOP, folder, ignore=shutil.ignore_patterns(
        'out', '.git', '.venv', '__pycache__', '*.jsonl', 'toy-*'))
    flags = {'FLAGS_SFT': '--steps=8', 'FLAGS_RM': '--steps=4', 'FLAGS_DPO': '--steps=4',
             'FLAGS_PPO': '--steps=2 --rollout_size=16 --batch_size=8 --max_new_tokens=8',
             'FLAGS_EVALUATE': '--prompts=40 --max_new_tokens=16'}
    printed = run_sh(folder, **flags)
    assert [line for line in printed if line.startswith('== ')] == [
        '== data/toy', '== 1. supervised fine-tuning', '== 2. reward model', '== 3. PPO',
        '== 4. DPO', '== Before and after']
    out = folder / 'out' / 'toy-3'
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

    kept = (out / 'sft' / 'ckpt.pt').stat().st_mtime_ns
    for path in (out / 'ppo').iterdir():
        path.unlink()
    again = run_sh(folder, **flags)
    assert (out / 'sft' / 'ckpt.pt').stat().st_mtime_ns == kept
    assert 'out/toy-3/sft is finished: 8 steps' in again
    assert json.loads((out / 'evaluate.json').read_text())['rows'] == rows


# ----------------------------------------------------------------------------- the core by itself

@pytest.fixture(scope='module')
def foreign(tmp_path_factory):
    """A folder with packages called as ours are, for PYTHONPATH: importing one of them fails."""
    folder = tmp_path_factory.mktemp('foreign')
    for name in ('data', 'tools', 'studies'):
        (folder / name).mkdir()
        (folder / name / '__init__.py').write_text('raise ImportError("not ours")\n')
    return folder


def python(folder, words, foreign):
    """Runs Python in a folder, with the foreign packages on its path; the lines it printed."""
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(foreign), 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_no_other_package_is_taken_for_ours(foreign):
    """data, tools and studies are packages of ours wherever another one has the same name: without
    an __init__.py the other one would win."""
    code = 'import data, tools, studies; print(data.__file__, tools.__file__, studies.__file__)'
    assert python(TOP, ['-c', code], foreign)[0].split() == [
        str(TOP / name / '__init__.py') for name in ('data', 'tools', 'studies')]


def test_the_core_works_alone(tmp_path, foreign):
    """A copy of prefgpt.py, train_*.py and data/ without tools/, studies/ and tests/ draws the toy
    data and trains all four stages, whatever other packages there are."""
    for path in (TOP / 'prefgpt.py', *TOP.glob('train_*.py'), *(TOP / 'data').rglob('*.py')):
        target = tmp_path / path.relative_to(TOP)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    python(tmp_path, ['-m', 'data.toy.prepare'], foreign)
    files = sorted((tmp_path / 'data' / 'toy').glob('*.jsonl'))
    assert [path.name for path in files] == [f'{split}.{kind}.jsonl' for split in ('train', 'val')
                                             for kind in ('pairs', 'prompts', 'sft')]
    for path in files:                      # 50 rows of each are enough, and quickly encoded
        path.write_text(''.join(path.read_text().splitlines(True)[:50]))
    own = {'rm': ['--batch_size=8'], 'dpo': ['--batch_size=8', '--max_new_tokens=8'],
           'sft': ['--max_new_tokens=8'],
           'ppo': ['--rollout_size=8', '--batch_size=8', '--max_new_tokens=8',
                   '--judge=data/toy/reward.py']}
    for stage in ('sft', 'rm', 'ppo', 'dpo'):       # all folders by default: data/toy, out/toy/...
        printed = python(tmp_path, [f'train_{stage}.py', '--steps=2', *own[stage]], foreign)
        assert printed[-1].startswith(f'out/toy/{stage}/ckpt.pt | ')
        assert (tmp_path / 'out' / 'toy' / stage / 'ckpt.pt').exists()
