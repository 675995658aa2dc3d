"""run.sh from end to end in a short form."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).parent.parent


def run_sh(folder, **flags):
    """`bash run.sh` in a folder with the Python of these tests; the lines it printed."""
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    done = subprocess.run(['bash', 'run.sh'], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, **flags, 'PATH': path, 'SEED': '3'})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_run_sh(tmp_path):
    """
    The whole pipeline with a few steps a stage: all files are there, the table has its rows and
    columns, and a second call keeps the finished stages and makes up for the one that is missing.
    """
    folder = tmp_path / 'clone'
    shutil.copytree(TOP, folder, ignore=shutil.ignore_patterns(
        'out', '.git', '.venv', '__pycache__', '*.jsonl', 'toy-*'))
    flags = {'FLAGS_SFT': '--steps=8', 'FLAGS_RM': '--steps=4', 'FLAGS_DPO': '--steps=4',
             'FLAGS_PPO': '--steps=2 --rollout_size=16 --batch_size=8 --max_new_tokens=8',
             'FLAGS_EVALUATE': '--prompts=40 --max_new_tokens=16'}
    printed = run_sh(folder, **flags)
    out = folder / 'out' / 'toy-3'
    for stage in ('sft', 'rm', 'ppo', 'dpo'):
        assert {'ckpt.pt', 'log.jsonl', 'samples.txt'} <= set(os.listdir(out / stage))
    rows = json.loads((out / 'evaluate.json').read_text())['rows']
    assert [row['run'] for row in rows] == ['out/toy-3/sft', 'out/toy-3/dpo', 'out/toy-3/ppo']
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
