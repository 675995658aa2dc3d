"""run.sh from end to end in a short form, and tools/sample.py."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train_sft
from prefgpt import UserError
from tools import sample

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
             'FLAGS_PPO': '--steps=2 --rollout_size=16 --batch_size=8 --max_new_tokens=8'}
    printed = run_sh(folder, **flags)
    out = folder / 'out' / 'toy-3'
    for stage in ('sft', 'rm', 'ppo', 'dpo'):
        assert {'ckpt.pt', 'log.jsonl', 'samples.txt'} <= set(os.listdir(out / stage))
    rows = json.loads((out / 'evaluate.json').read_text())['rows']
    assert [row['run'] for row in rows] == ['out/toy-3/sft', 'out/toy-3/dpo', 'out/toy-3/ppo']
    for row in rows:
        assert {'reward', 'helpful', 'harm', 'refused', 'kl', 'length', 'eos'} <= set(row)
        assert 0 <= row['harm'] <= 1 and row['length'] <= 64 and 0 <= row['eos'] <= 1
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


def test_sample_answers_held_out_prompts(sft_run, capsys):
    """Two runs answer the first prompts side by side; given twice, a run answers the same."""
    answers = sample.main(sample.Config(runs=(str(sft_run),), n=2, max_new_tokens=8))
    assert [len(texts) for texts in answers.values()] == [2]
    shown = capsys.readouterr().out
    assert all(text in shown for text in answers[str(sft_run)])


def test_sample_puts_the_prompt_into_the_template(sft_run, capsys):
    """A typed prompt stands in the template; greedily there is one answer, at T=1 there are n."""
    cfg = sample.Config(runs=(str(sft_run),), prompt='say a', n=3, max_new_tokens=8)
    assert len(sample.main(cfg)[str(sft_run)]) == 1
    template = train_sft.load_checkpoint(sft_run, ['sft'])['template']
    assert template.replace('{}', 'say a').splitlines()[0] in capsys.readouterr().out
    cfg.temperature = 1.0
    first = sample.main(cfg)[str(sft_run)]
    assert len(first) == 3 and first == sample.main(cfg)[str(sft_run)]


def test_sample_cuts_a_prompt_longer_than_the_block(sft_run, capsys):
    """A prompt that is too long loses its left end, and says so."""
    sample.main(sample.Config(runs=(str(sft_run),), prompt='a' * 500, max_new_tokens=8))
    assert '1 prompts cut on the left' in capsys.readouterr().out


def test_sample_shows_no_control_characters(sft_run, capsys):
    """What a user or a model writes must not steer the terminal."""
    sample.main(sample.Config(runs=(str(sft_run),), prompt='\x1b[2J', max_new_tokens=4))
    assert '\x1b' not in capsys.readouterr().out


def test_sample_without_a_run():
    """No run named is an error that says so."""
    with pytest.raises(UserError, match='run folder'):
        sample.main(sample.Config())


def test_sample_refuses_a_negative_temperature(sft_run):
    """A temperature below 0 would prefer the worst tokens: the flag is named instead."""
    with pytest.raises(UserError, match='--temperature=-1'):
        sample.main(sample.Config(runs=(str(sft_run),), temperature=-1.0))
