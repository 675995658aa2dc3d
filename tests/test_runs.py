"""
Checks runs: command line, checkpoints and their faults, log, resuming, errors as users see them.

    python -m pytest -q tests/test_runs.py
"""
import ast
import dataclasses
import errno
import importlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import EOS, STAGES, log_rows, same, save_tiny_run

import train_ppo
import train_rm
import train_sft
from data.text import checkpoint_text
from prefgpt import (GPT, Log, ScalarGPT, UserError, adamw, load_checkpoint, load_model, open_run,
                     parse_config, resume, run_cli, save_checkpoint)

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ['train_sft', 'train_rm', 'train_dpo', 'train_ppo',
           *(f'tools.{path.stem}' for path in sorted((ROOT / 'tools').glob('[a-z]*.py')))]


# ----------------------------------------------------------------------------- the command line

@dataclass
class Flags:
    """Has a field of every type that a Config may have."""
    runs: tuple = ()            # the words without a flag
    from_: str = ''             # a flag whose name Python keeps to itself
    data: str = 'data/toy'      # text, even where it looks like # a comment
    steps: int = 10             # a whole number
    lr: float = 1e-3            # a number, 100% of it
    resume: bool = False        # a switch
    whiten: bool = True         # another one


@dataclass
class FlagsAlone:
    """Takes no words but flags."""
    steps: int = 10             # a whole number
    resume: bool = False        # a switch


@dataclass
class NoComment:
    """Lacks the comment on a field."""
    steps: int = 10             # fine
    lr: float = 1e-3


PARSED = [
    ([], {}),
    (['--lr=1'], {'lr': 1.0}),
    (['--lr', '1'], {'lr': 1.0}),
    (['--lr=0'], {'lr': 0.0}),
    (['--lr=-2.5e-4'], {'lr': -0.00025}),
    (['--lr', '-1'], {'lr': -1.0}),
    (['--steps=5', '--data', 'x y'], {'steps': 5, 'data': 'x y'}),
    (['--data='], {'data': ''}),
    (['--data=a=b'], {'data': 'a=b'}),
    (['--resume'], {'resume': True}),
    (['--resume=True'], {'resume': True}),
    (['--resume', 'true'], {'resume': True, 'runs': ('true',)}),   # a flag never takes a RUN
    (['--resume=1'], {'resume': True}),
    (['--resume', '--steps=5'], {'resume': True, 'steps': 5}),
    (['--whiten=False'], {'whiten': False}),
    (['--whiten', 'false'], {'whiten': True, 'runs': ('false',)}),
    (['--whiten=0'], {'whiten': False}),
    (['--from=out/a'], {'from_': 'out/a'}),
    (['out/a', 'out/b', '--steps=5'], {'runs': ('out/a', 'out/b'), 'steps': 5}),
    (['--steps=5', 'out/a'], {'runs': ('out/a',), 'steps': 5}),
    (['--resume', 'out/a'], {'runs': ('out/a',), 'resume': True}),
]


@pytest.mark.parametrize('argv, expected', PARSED, ids=[' '.join(case[0]) for case in PARSED])
def test_parse_config(argv, expected):
    """--flag=value works for every type, and --flag value but for a switch; --lr=1 is a float,
    --whiten=False is false (unlike bool('False')), and the rest keep their defaults."""
    cfg = parse_config(Flags, argv)
    assert {**vars(cfg), 'runs': tuple(cfg.runs)} == {**vars(Flags()), **expected}
    assert type(cfg.lr) is float and type(cfg.steps) is int and type(cfg.whiten) is bool


REFUSED = [
    (['--stpes=5'], ['--stpes', 'did you mean --steps?']),
    (['--wihten', 'False'], ['--wihten', 'did you mean --whiten?']),
    (['--form=x'], ['--form', 'did you mean --from?']),
    (['--step=5'], ['--step', 'did you mean --steps?']),        # no abbreviations
    (['--zzz=5'], ['--zzz', '--help']),
    (['--whiten=yes'], ['--whiten', "'yes'", 'neither True nor False']),
    (['--whiten='], ['--whiten', 'neither True nor False']),
    (['--steps=1.5'], ['--steps', '1.5']),
    (['--lr=fast'], ['--lr', 'fast']),
    (['--steps'], ['--steps']),
]


@pytest.mark.parametrize('argv, words', REFUSED, ids=[' '.join(case[0]) for case in REFUSED])
def test_parse_config_refuses(argv, words, capsys):
    """A typo is answered with the nearest flag, a wrong value with its flag, and exit status 2.
    Nothing is guessed: an abbreviation that works today means another flag tomorrow."""
    with pytest.raises(SystemExit) as error:
        parse_config(Flags, argv)
    assert error.value.code == 2
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert [word for word in words if word not in last_line] == []


def test_words_are_refused_where_no_runs_are_taken(capsys):
    """--resume False, without a '=', would resume: a Config that takes no words refuses it, and
    only one that takes them has [RUN ...] in the first line of --help."""
    assert parse_config(FlagsAlone, ['--resume=False']).resume is False
    assert parse_config(FlagsAlone, ['--resume', '--steps', '5']) == FlagsAlone(5, True)
    with pytest.raises(SystemExit) as error:
        parse_config(FlagsAlone, ['--resume', 'False'])
    assert error.value.code == 2 and 'unknown argument False' in capsys.readouterr().err
    for Config, shown in ((Flags, True), (FlagsAlone, False)):
        with pytest.raises(SystemExit):
            parse_config(Config, ['--help'])
        assert ('[RUN ...]' in capsys.readouterr().out.splitlines()[0]) == shown


def test_a_field_without_a_comment_fails():
    """The comment is the help, so a field without one raises an error that names it."""
    with pytest.raises(KeyError, match="'lr'"):
        parse_config(NoComment, [])


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_lists_every_field_with_its_comment(script, capsys):
    """--help of every script shows each field of its Config, with the comment and the default."""
    module = importlib.import_module(script)
    if not hasattr(module, 'Config'):
        pytest.skip('a module without a command line of its own')
    with pytest.raises(SystemExit) as error:
        parse_config(module.Config, ['--help'])
    assert error.value.code == 0
    # argparse breaks lines where it likes: compare without white space
    shown = ''.join(capsys.readouterr().out.split())
    source = Path(module.__file__).read_text().split('class Config:')[1]
    lines = re.findall(r'^    (\w+): (\w+) = (.*?)  +# (.*)$', source, re.MULTILINE)
    assert {line[0] for line in lines} == {f.name for f in dataclasses.fields(module.Config)}
    for name, kind, _, comment in lines:
        flag = name if kind == 'tuple' else '--' + name.rstrip('_')
        usage = re.escape(flag) + r'(\[?(str|int|float|bool)\]?)?' + re.escape(
            ''.join(comment.split()))
        assert re.search(usage, shown), name
        if kind in ('int', 'bool'):
            assert ''.join(comment.split()) + f'[{getattr(module.Config, name)}]' in shown, name


# ----------------------------------------------------------------------------- checkpoints

@dataclass
class RunConfig:
    """Has what open_run and save_checkpoint need."""
    data: str = 'data/old'      # data
    out: str = ''               # run folder
    resume: bool = False        # continue
    steps: int = 10             # optimizer steps
    lr: float = 1e-3            # peak learning rate
    micro_batch_size: int = 0   # rows in a forward pass


@pytest.fixture
def save(tmp_path, byte_tokenizer, tiny_gpt):
    """Returns save(step): it writes a tiny policy to tmp_path/run/ckpt.pt and returns the path."""
    path = tmp_path / 'run' / 'ckpt.pt'
    path.parent.mkdir()

    def save(step, stage='sft', **changes):
        cfg = RunConfig(out=str(path.parent), **changes)
        policy = tiny_gpt(step, n_layer=1)
        save_checkpoint(path, stage, step, cfg, checkpoint_text(byte_tokenizer, 'Q: {} A:'),
                        {'loss': 0.5}, {'policy': policy}, [adamw(policy, 0.1)], shift=0.25)
        return path
    return save


def test_checkpoint_round_trip(save, byte_tokenizer, tiny_gpt):
    """What was saved comes back: stage, step, configs, tokenizer, weights, optimizer and extras,
    from the folder and from the file."""
    path = save(3)
    saved = load_checkpoint(path.parent, ['base', 'sft'])
    assert same(saved, load_checkpoint(path, ['sft']))
    assert saved['stage'] == 'sft' and saved['step'] == 3 and saved['shift'] == 0.25
    assert saved['config'] == {'data': 'data/old', 'out': str(path.parent), 'resume': False,
                               'steps': 10, 'lr': 1e-3, 'micro_batch_size': 0}
    assert saved['model'] == {'block_size': 32, 'vocab_size': 17, 'n_layer': 1, 'n_head': 2,
                              'n_embd': 16, 'init_std': 0.3}
    assert saved['template'] == 'Q: {} A:' and saved['metrics'] == {'loss': 0.5}
    assert saved['tokenizer'].splitlines()[255] == '/w== 255'
    policy = load_model(GPT, saved, 'policy', 'cpu')
    assert same(policy.state_dict(), tiny_gpt(3, n_layer=1).state_dict())
    optimizer = adamw(policy, 0.0)
    optimizer.load_state_dict(saved['optimizers'][0])
    assert optimizer.param_groups[0]['weight_decay'] == 0.1
    assert len(saved['fingerprint']) == 16
    assert resume(saved, adamw(policy, 0.0)) == (3, {'loss': 0.5})
    assert resume(None, optimizer) == (0, {})


def test_a_wrong_stage_or_model_is_refused(save):
    """A reward model given as a policy raises an error that names both stages. Weights that do not
    fit the model raise, too: otherwise a head would silently keep its initial weights."""
    path = save(1, stage='rm')
    with pytest.raises(UserError, match=r'ckpt.pt: its stage is rm, not sft or ppo'):
        load_checkpoint(path, ['sft', 'ppo'])
    with pytest.raises(RuntimeError, match='score.weight'):
        load_model(ScalarGPT, load_checkpoint(path, ['rm']), 'policy', 'cpu')


def test_a_missing_checkpoint_is_named(tmp_path):
    """A folder without a checkpoint, or no folder, raises an error with the path."""
    for path in (tmp_path, tmp_path / 'nowhere', tmp_path / 'nowhere' / 'ckpt.pt'):
        with pytest.raises(UserError, match=f'{re.escape(str(path))}.*no checkpoint'):
            load_checkpoint(path, ['sft'])


@pytest.mark.parametrize('keep', [0, 1, 0.3, 0.99, -1])
def test_a_truncated_checkpoint_is_damaged(save, keep):
    """A file cut to nothing, to a share, or by its last byte raises one line with the size."""
    path = save(1)
    contents = path.read_bytes()
    cut = contents[:int(keep * len(contents)) if 0 < keep < 1 else keep]
    path.write_bytes(cut)
    with pytest.raises(UserError, match=f'damaged or incomplete, {len(cut)} bytes.*ckpt.prev.pt'):
        load_checkpoint(path, ['sft'])


def test_a_flipped_byte_is_named(save):
    """One flipped bit inside a weight, which torch.load would not notice, raises an error that
    names the record of the archive."""
    path = save(1)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    contents = bytearray(path.read_bytes())
    contents[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    path.write_bytes(contents)
    with pytest.raises(UserError, match=f'damaged.*{largest.filename}'):
        load_checkpoint(path, ['sft'])


def test_no_flipped_byte_goes_unnoticed(save):
    """A byte flipped anywhere gives UserError or, in a time stamp or in padding, the same contents:
    never other weights, never a traceback."""
    path = save(1)
    whole = load_checkpoint(path, ['sft'])
    contents = path.read_bytes()
    # A few everywhere, and many in the zip's directory, at the end
    places = [*range(0, len(contents), len(contents) // 97),
              *range(len(contents) - 3000, len(contents), 13)]
    noticed = 0
    for place in places:
        damaged = bytearray(contents)
        damaged[place] ^= 0x41
        path.write_bytes(damaged)
        try:
            assert same(load_checkpoint(path, ['sft']), whole), f'byte {place}'
        except UserError:
            noticed += 1
    assert noticed > len(places) / 2


class Evil:
    """Makes a folder when it is unpickled; a real one would do worse."""

    def __reduce__(self):
        return os.mkdir, ('evil',)


@pytest.mark.parametrize('contents, why', [
    ({'stage': 'sft', 'weights': Evil()}, 'damaged'), (None, 'damaged'),
    ({'wte.weight': torch.ones(2)}, 'not written by this version of prefgpt'),
    ({'kind': 'sft', 'step': 1}, 'not written by this version of prefgpt'),
    ([1, 2], 'not written by this version of prefgpt')],
    ids=['a malicious one', 'no zip', 'a bare state dict', 'an older version', 'a list'])
def test_a_file_that_is_no_checkpoint_of_ours_is_refused_in_one_line(
        tmp_path, monkeypatch, contents, why):
    """What torch can save, but no stage of this version wrote, gives UserError, not KeyError or
    UnpicklingError; and code inside a pickle does not run."""
    monkeypatch.chdir(tmp_path)
    if contents is None:
        Path('ckpt.pt').write_text('a text file')
    else:
        torch.save(contents, 'ckpt.pt')
    with pytest.raises(UserError, match=why):
        load_checkpoint('ckpt.pt', ['sft'])
    assert not Path('evil').exists()


def test_every_torch_load_is_weights_only():
    """No file of the project calls torch.load, or the hub's loader, without weights_only=True:
    otherwise somebody else's checkpoint could run code."""
    found = 0
    for path in ROOT.rglob('*.py'):
        if {'.venv', 'out', '.git'} & set(path.relative_to(ROOT).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called == 'torch.load' or called.endswith('load_state_dict_from_url'):
                found += 1
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords.get('weights_only') == 'True', f'{path}:{node.lineno}'
            assert called not in ('pickle.load', 'pickle.loads'), f'{path}:{node.lineno}'
    assert found >= 2           # prefgpt.py's and this file's


def load(path):
    return torch.load(path, weights_only=True)


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def fail_in_save(contents, file):
    """Fails as torch.save does on a disk that fills up half way."""
    file.write(b'PK\x03\x04 half a checkpoint')
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail(*arguments):
    """Fails as a system call does on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize('links', [True, False], ids=['links', 'no hard links'])
def test_the_checkpoint_before_is_kept(save, monkeypatch, tmp_path, links):
    """I22: after three saves ckpt.pt is the third and ckpt.prev.pt the second, both whole, also on
    a file system without hard links. Nothing else is in the folder: what a killed save left is
    removed. Catches contents copied into ckpt.pt: a file must be renamed to it."""
    if not links:
        monkeypatch.setattr(os, 'link', fail)
    (tmp_path / 'run' / 'ckpt.tmp').write_bytes(b'half')
    path = save(1)
    assert names_in(path.parent) == ['ckpt.pt']
    save(2), save(3)
    assert load_checkpoint(path, ['sft'])['step'] == 3
    assert load_checkpoint(path.with_name('ckpt.prev.pt'), ['sft'])['step'] == 2
    assert names_in(path.parent) == ['ckpt.prev.pt', 'ckpt.pt']


FAULTS = [(torch, 'save', fail_in_save), (os, 'fsync', fail), (os, 'replace', fail)]


@pytest.mark.parametrize('module, name, fault', FAULTS, ids=[fault[1] for fault in FAULTS])
def test_a_failed_write_leaves_the_old_checkpoint(save, monkeypatch, tmp_path, module, name,
                                                  fault):
    """I22: whichever call fails, the write says so, ckpt.pt is still the whole checkpoint of
    before, or not there if this was the first, and no temporary file is left to fill the disk."""
    def save_in_vain(step):
        with monkeypatch.context() as patch, pytest.raises((OSError, UserError)):
            patch.setattr(module, name, fault)
            save(step)

    save_in_vain(1)
    assert names_in(tmp_path / 'run') == []
    path = save(1)
    save(2)
    save_in_vain(3)
    assert load_checkpoint(path, ['sft'])['step'] == 2
    assert set(names_in(path.parent)) <= {'ckpt.prev.pt', 'ckpt.pt'}


@pytest.mark.parametrize('flag, value', [('steps', 0), ('batch_size', 0), ('eval_every', 0),
                                         ('micro_batch_size', -1), ('dtype', 'float16'),
                                         ('grad_clip', 0.0), ('grad_clip', math.nan),
                                         ('max_new_tokens', 0), ('device', 'nowhere'),
                                         ('n_head', 3)])
def test_a_number_that_cannot_work_is_refused(config, flag, value):
    """Zero steps, a division by zero, ...: an error names the flag before anything runs."""
    with pytest.raises(UserError, match=f'--{flag}={value}'):
        train_sft.main(config('sft', 'run', **{flag: value}))


@pytest.mark.parametrize('changes', [{'beta': 0.0}, {'ipo': True, 'label_smoothing': 0.1}])
def test_dpo_refuses_settings_without_a_meaning(config, changes):
    """beta 0 divides by zero or learns nothing, IPO has no label smoothing: an error says so."""
    with pytest.raises(UserError, match='--beta.*--label_smoothing'):
        STAGES['dpo'].main(config('dpo', 'run', **changes))


@pytest.mark.parametrize('stage, changed', [*((stage, 'data') for stage in STAGES),
                                            ('ppo', 'reward model')])
def test_resume_on_changed_inputs_is_refused(stage, changed, config, tiny_data, rm_run, tmp_path,
                                             monkeypatch):
    """A stage that resumes on other rows says so: DPO's reference logprobs go by row number, and
    its loss would silently be wrong. So does PPO with a reward model that was trained anew: the
    run would mix two rewards."""
    own = {'reward': str(shutil.copytree(rm_run, tmp_path / 'rm'))} if stage == 'ppo' else {}
    cfg = config(stage, 'run', data=str(tiny_data), **own)
    interrupt(STAGES[stage], cfg, monkeypatch)
    if changed == 'data':
        for path in tiny_data.glob('train.*.jsonl'):
            path.write_text(''.join(path.read_text().splitlines(True)[1:]))
    else:
        torch.save({**load(tmp_path / 'rm' / 'ckpt.pt'), 'metrics': {'loss': 0.123}},
                   tmp_path / 'rm' / 'ckpt.pt')
    with pytest.raises(UserError, match='has changed'):
        STAGES[stage].main(dataclasses.replace(cfg, resume=True))


def test_a_lost_checkpoint_does_not_start_the_run_anew(tmp_path):
    """If only ckpt.prev.pt is there, --resume must not begin at step 0 and wipe the log."""
    (tmp_path / 'ckpt.prev.pt').write_bytes(b'')
    with pytest.raises(UserError, match='copy ckpt.prev.pt'):
        open_run(RunConfig(out=str(tmp_path), resume=True), 'sft')


# ----------------------------------------------------------------------------- opening a run

def test_open_run_starts_and_refuses(save, tmp_path):
    """The log makes a new folder, nothing else does. Without --resume, a folder that holds a log
    or a checkpoint is refused; with it, open_run returns the checkpoint, or None before the
    first."""
    new = tmp_path / 'a' / 'new'
    assert open_run(RunConfig(out=str(new)), 'sft') is None
    assert not new.parent.exists()
    Log(str(new), 0, 10).write({'step': 1})
    with pytest.raises(UserError, match='new holds a run: .*--resume'):
        open_run(RunConfig(out=str(new)), 'sft')
    assert open_run(RunConfig(out=str(new), resume=True), 'sft') is None
    out = str(save(4).parent)
    for _ in ('without a log', 'with one'):
        with pytest.raises(UserError, match='--resume'):
            open_run(RunConfig(out=out), 'sft')
        assert open_run(RunConfig(out=out, resume=True), 'sft')['step'] == 4
        (Path(out) / 'log.jsonl').write_text('')


def test_open_run_names_what_changed(save):
    """A changed setting is named with both values, and so is another stage; what changes no result
    may change."""
    out = str(save(1).parent)
    with pytest.raises(UserError) as error:
        open_run(RunConfig(out=out, resume=True, lr=0.002, data='data/new'), 'sft')
    assert 'was run with other flags: ' in str(error.value)
    assert '--lr was 0.001 and is 0.002' in str(error.value)
    assert "--data was 'data/old' and is 'data/new'" in str(error.value)
    assert 'resume was' not in str(error.value)
    assert open_run(RunConfig(out=out, resume=True, micro_batch_size=2), 'sft')['step'] == 1
    with pytest.raises(UserError, match='its stage is sft, not dpo'):
        open_run(RunConfig(out=out, resume=True), 'dpo')


# ----------------------------------------------------------------------------- the log

def test_log_is_cut_where_the_run_resumes(tmp_path):
    """I22: rows past the checkpoint are removed, with their samples, and so is a last line that was
    half written; the rest stays, and new rows follow. Catches steps that are logged twice."""
    rows = ['{"step": 1, "loss": 3.0}\n', '{"step": 2, "loss": 2.5}\n',
            '{"step": 2, "eval_loss": 2.6, "samples": ["hi", "yo"]}\n',
            '{"step": 3, "loss": 2.0, "samples": ["hi there"]}\n', '{"step": 4, "lo']
    (tmp_path / 'log.jsonl').write_text(''.join(rows))
    log = Log(str(tmp_path), 2, 10)
    assert (tmp_path / 'log.jsonl').read_text() == ''.join(rows[:3])
    log.write({'step': 3, 'loss': 1.5})
    log.eval(3, {'loss': 1.25}, ['one', 'two'])
    assert (tmp_path / 'log.jsonl').read_text() == ''.join(
        [*rows[:3], '{"step": 3, "loss": 1.5}\n',
         '{"step": 3, "eval_loss": 1.25, "samples": ["one", "two"]}\n'])
    assert [path.name for path in tmp_path.iterdir()] == ['log.jsonl']


def test_log_survives_any_sample(tmp_path, capsys):
    """A model may write anything, even line ends and rows of a log: resuming neither fails nor
    loses samples, and escape sequences do not reach the terminal."""
    samples = ['a\n{"step": 9}\nb', '{"step": 99, "lo', 'a\u2028b\x85c\r', '\ud800 \x1b[2J']
    Log(str(tmp_path), 0, 10).eval(2, {'loss': 1.0}, samples)
    written = (tmp_path / 'log.jsonl').read_bytes()
    Log(str(tmp_path), 2, 10)
    assert (tmp_path / 'log.jsonl').read_bytes() == written
    assert json.loads(written)['samples'] == samples
    printed = capsys.readouterr().out
    assert '\x1b' not in printed and '[2J' in printed and '| b' in printed


def test_log_line(tmp_path, monkeypatch, capsys):
    """A step's line has a fixed order and width, its time and the time left: 10 steps took 12 s, so
    480 more take 576 s; 8158 tokens in 0.412 s are 19.8 thousand per second."""
    clock = [1000.0]
    monkeypatch.setattr(time, 'time', lambda: clock[0])
    log = Log(str(tmp_path), 10, 500)
    clock[0] = 1012.0
    numbers = dict(loss=0.61212, accuracy=0.65625, margin=0.41349, chosen=-21.305,
                   rejected=-25.4, norm=3.1, lr=1e-5)
    log.step(20, 1011.588, 8158, **numbers)
    line = capsys.readouterr().out.rstrip('\n')
    assert ' '.join(line.split()) == (
        'step 20/500 | loss 0.6121 | accuracy 0.66 | margin 0.413 | chosen -21.30 | '
        'rejected -25.40 | norm 3.10 | lr 1.0e-05 | 412 ms | 19.8k tok/s | 10m left')
    log.step(120, 1011.588, 8158, **{**numbers, 'loss': 1.5, 'margin': -7.5, 'norm': 12.0})
    other = capsys.readouterr().out.rstrip('\n')
    assert [i for i, c in enumerate(line) if c == '|'][:8] == [
        i for i, c in enumerate(other) if c == '|'][:8]
    row = json.loads((tmp_path / 'log.jsonl').read_text().splitlines()[0])
    assert {key: row[key] for key in numbers} == numbers and row['step'] == 20


def test_log_prints_fifty_lines_and_writes_every_row(tmp_path, capsys):
    """About 50 of 200 steps are printed, the first and the last among them; all are written."""
    log = Log(str(tmp_path), 0, 200)
    for step in range(1, 201):
        log.step(step, time.time() - 1, 100, loss=1.0)
    printed = capsys.readouterr().out.splitlines()
    assert 50 <= len(printed) <= 52
    assert '1/200' in printed[0] and '200/200' in printed[-1]
    assert len((tmp_path / 'log.jsonl').read_text().splitlines()) == 200


# ----------------------------------------------------------------------------- resuming

@pytest.fixture(scope='module')
def rm_run(shared_data, random_run, tmp_path_factory):
    """Returns the run of a reward model after two steps; no test may change it."""
    out = tmp_path_factory.mktemp('runs') / 'rm'
    train_rm.main(train_rm.Config(data=str(shared_data), out=str(out), init=str(random_run),
                                  steps=2, warmup=1, device='cpu'))
    return out


@pytest.fixture
def config(shared_data, random_run, rm_run, tmp_path):
    """Returns config(stage, name): six steps over two epochs, a checkpoint at every second one."""
    def config(stage, name, **changes):
        common = dict(data=str(shared_data), out=str(tmp_path / name), steps=6, warmup=2, lr=1e-3,
                      eval_every=2, batch_size=24, device='cpu')
        own = {'sft': dict(n_layer=1, n_head=2, n_embd=16, block_size=32, max_new_tokens=4),
               'rm': dict(init=str(random_run)),
               'dpo': dict(init=str(random_run), max_new_tokens=4),
               'ppo': dict(init=str(random_run), reward=str(rm_run), rollout_size=24,
                           batch_size=8, max_new_tokens=4, ref_ema=0.1)}[stage]
        return STAGES[stage].Config(**{**common, **own, **changes})
    return config


def die_after_logging(monkeypatch, last_step):
    """Kills the run when it has logged a step: past its last checkpoint."""
    step = Log.step

    def step_and_die(self, number, *arguments, **metrics):
        step(self, number, *arguments, **metrics)
        if number == last_step:
            with open(self.path, 'a') as file:
                file.write('{"step": 6, "los')          # and was about to log another one
            raise KeyboardInterrupt
    monkeypatch.setattr(Log, 'step', step_and_die)


def die_in_save(monkeypatch, number):
    """Kills the run before the rename of its number-th checkpoint; the log may rename files."""
    replace, calls = os.replace, []

    def replace_or_die(source, target):
        calls.extend([target] if Path(target).name == 'ckpt.pt' else [])
        if len(calls) == number:
            raise KeyboardInterrupt
        replace(source, target)
    monkeypatch.setattr(os, 'replace', replace_or_die)


def interrupt(module, cfg, monkeypatch, die=die_after_logging, number=5):
    """Runs a stage until it is killed: by default after step 5, past the checkpoint of step 4."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die(patch, number)
        module.main(cfg)
    assert load(f'{cfg.out}/ckpt.pt')['step'] == 4


def assert_resuming_is_never_having_stopped(module, whole, parts, monkeypatch):
    """Asserts that the run parts, killed after step 5 and while saving step 6, ends as whole."""
    metrics = module.main(whole)
    interrupt(module, parts, monkeypatch)
    parts = dataclasses.replace(parts, resume=True)
    interrupt(module, parts, monkeypatch, die_in_save, 1)
    assert module.main(parts) == metrics
    expected = assert_same_end(whole, parts)
    assert expected['step'] == 6
    rows = log_rows(whole.out)
    assert [row['step'] for row in rows if 'lr' in row] == [1, 2, 3, 4, 5, 6]
    assert [row['step'] for row in rows if 'samples' in row] == [2, 4, 6]
    return expected


def assert_same_end(whole, parts):
    """Asserts that two runs ended with finite and equal checkpoints and with the same log."""
    expected, resumed = load(f'{whole.out}/ckpt.pt'), load(f'{parts.out}/ckpt.pt')
    for saved in (expected, resumed):
        del saved['config']             # out and resume differ
    assert all(torch.isfinite(weight).all() for weights in expected['weights'].values()
               for weight in weights.values())
    assert same(expected, resumed)
    assert log_rows(whole.out) == log_rows(parts.out)
    assert names_in(whole.out) == names_in(parts.out)
    return expected


@pytest.mark.parametrize('stage', STAGES)
def test_i22_resuming_is_never_having_stopped(stage, config, monkeypatch):
    """I22: six steps at once, and six steps killed after step 5 and killed again while saving
    step 6, end with the same weights, optimizers, log rows and samples, bit for bit."""
    assert_resuming_is_never_having_stopped(STAGES[stage], config(stage, 'whole'),
                                            config(stage, 'parts'), monkeypatch)


def test_i22_a_reward_model_of_another_shape(config, shared_data, tmp_path, monkeypatch):
    """I22: PPO runs and resumes, bit for bit, if the reward model, and so the value model, has
    other layers, heads and channels than the policy. Catches a value model of the policy's
    shape."""
    save_tiny_run(tmp_path / 'other', shared_data, n_layer=1, n_head=3, n_embd=12, block_size=48)
    rm = config('rm', 'rm', init=str(tmp_path / 'other'), steps=1)
    train_rm.main(rm)
    saved = assert_resuming_is_never_having_stopped(
        train_ppo, *(config('ppo', name, reward=rm.out) for name in ('whole', 'parts')),
        monkeypatch)
    assert saved['model']['n_embd'] == saved['weights']['policy']['wte.weight'].size(1) == 16
    assert saved['weights']['value_model']['body.wpe.weight'].shape == (48, 12)
    assert saved['weights']['value_model'].keys() == load(f'{rm.out}/ckpt.pt')['weights'][
        'reward_model'].keys()


@pytest.mark.parametrize('stage', STAGES)
def test_steps_count_from_one(stage, config, capsys):
    """Printed lines, log rows and checkpoints count steps from 1; the first has lr / warmup."""
    cfg = config(stage, 'run', steps=2, warmup=4, eval_every=1)
    STAGES[stage].main(cfg)
    rows = log_rows(cfg.out)
    assert [row['step'] for row in rows] == [1, 1, 2, 2]
    assert [row['lr'] for row in rows if 'lr' in row] == pytest.approx([cfg.lr / 4, cfg.lr / 2])
    saved = load(f'{cfg.out}/ckpt.pt')
    assert saved['step'] == 2 and load(f'{cfg.out}/ckpt.prev.pt')['step'] == 1
    assert saved['optimizers'][0]['param_groups'][0]['lr'] == pytest.approx(cfg.lr / 2)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed if line.startswith(('step ', 'eval '))] == [
        '1/2', '1/2', '2/2', '2/2']


# A child process trains with this, and the system kills it in the middle of its second checkpoint
KILLED = '''
import io, json, os, signal, sys
import torch
import train_ppo

save, calls = torch.save, []

def save_half_and_die(contents, file):
    calls.append(file)
    if len(calls) == 1:
        return save(contents, file)
    whole = io.BytesIO()
    save(contents, whole)
    file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_half_and_die
torch.set_num_threads(int(sys.argv[1]))
train_ppo.main(train_ppo.Config(**json.loads(sys.argv[2])))
'''


def test_i22_kill_9_while_a_checkpoint_is_written(config):
    """I22: after kill -9 in the middle of a write, when no clean-up runs, ckpt.pt is the whole one
    of step 2, and --resume ends bit for bit where a run that never stopped does. PPO's state is
    the largest. Catches a checkpoint written in place."""
    whole, parts = config('ppo', 'whole'), config('ppo', 'parts')
    metrics = train_ppo.main(whole)
    done = subprocess.run([sys.executable, '-c', KILLED, str(torch.get_num_threads()),
                           json.dumps(dataclasses.asdict(parts))], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert load_checkpoint(parts.out, ['ppo'])['step'] == 2
    assert names_in(parts.out) == ['ckpt.pt', 'ckpt.tmp', 'log.jsonl']      # ckpt.tmp: a half
    assert train_ppo.main(dataclasses.replace(parts, resume=True)) == metrics
    assert_same_end(whole, parts)


def test_resume_with_other_micro_batches_is_allowed(config, monkeypatch):
    """A run that stops at step 5 and resumes with --micro_batch_size=5 is the same but for
    rounding; with another lr it is refused."""
    train_sft.main(config('sft', 'whole'))
    interrupt(train_sft, config('sft', 'parts'), monkeypatch)
    with pytest.raises(UserError, match='--lr was 0.001 and is 0.5'):
        train_sft.main(config('sft', 'parts', resume=True, lr=0.5))
    train_sft.main(config('sft', 'parts', resume=True, micro_batch_size=5))
    whole, parts = (load(config('sft', name).out + '/ckpt.pt')['weights']['policy']
                    for name in ('whole', 'parts'))
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('stage', STAGES)
def test_resuming_a_finished_run_changes_nothing(stage, config, capsys):
    """--resume of a finished run says that it is finished, returns its metrics, takes no step and
    touches no file, so that a broken pipeline can be run again. Other --steps are refused."""
    main, cfg = STAGES[stage].main, config(stage, 'run', steps=2)
    metrics = main(cfg)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns)
              for path in Path(cfg.out).iterdir()}
    assert set(before) == {'ckpt.pt', 'log.jsonl'}
    capsys.readouterr()
    assert main(dataclasses.replace(cfg, resume=True)) == metrics
    printed = capsys.readouterr().out.splitlines()
    assert f'{cfg.out} is finished: 2 steps' in printed
    assert not [line for line in printed if line.startswith(('step ', 'eval '))]
    with pytest.raises(UserError, match='--steps was 2 and is 3'):
        main(dataclasses.replace(cfg, resume=True, steps=3))
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns)
                      for path in Path(cfg.out).iterdir()}


# ----------------------------------------------------------------------------- errors in a run

@pytest.mark.parametrize('eval_every', [1, 2])
@pytest.mark.parametrize('stage', STAGES)
def test_a_non_finite_loss_stops_the_run(stage, config, monkeypatch, eval_every):
    """A learning rate that blows up in step 3 stops the run with an error that names step and lr,
    whether the evaluation after it notices or the next step. Nothing is saved any more: the
    checkpoint of step 2 stays, with finite weights."""
    module = STAGES[stage]
    schedule = module.learning_rate

    def blow_up(step, *arguments):
        return 1e38 if step == 2 else schedule(step, *arguments)
    monkeypatch.setattr(module, 'learning_rate', blow_up)
    cfg = config(stage, 'run', eval_every=eval_every)
    with pytest.raises(UserError, match=r'step [34], lr=\d.*(nan|inf).*checkpoint'):
        module.main(cfg)
    saved = load_checkpoint(cfg.out, [stage])
    assert saved['step'] == 2
    assert all(torch.isfinite(weight).all() for weights in saved['weights'].values()
               for weight in weights.values())


@pytest.mark.parametrize('error, words', [
    (torch.OutOfMemoryError('CUDA out of memory'), r'MB.*: set --micro_batch_size.*--roll'),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 'No space left'),
    (UserError('the role \x1b[2J is unknown'), 'the role')],
    ids=['memory', 'disk', 'escape sequence'])
def test_an_error_ends_in_one_line(monkeypatch, error, words):
    """Out of memory names the flag to halve and the peak, a full disk is no traceback, and a
    message that quotes a data file's escape sequence is printed without it."""
    def main(cfg):
        raise error
    monkeypatch.setattr(sys, 'argv', ['train_sft.py'])
    with pytest.raises(SystemExit, match=words) as told:
        run_cli(main, train_sft.Config)
    assert '\n' not in told.value.code and '\x1b' not in told.value.code


@pytest.mark.parametrize('stage', STAGES)
def test_a_prompt_longer_than_the_block_is_cut_and_counted(stage, config, tiny_data, capsys):
    """A prompt of 200 bytes in a block of 32 loses its left end, is counted, and trains."""
    long = {'prompt': 'x' * 200 + 'say a:', 'completion': ' a!', 'chosen': ' a!',
            'rejected': ' a?'}
    kind = {'sft': 'sft', 'ppo': 'prompts'}.get(stage, 'pairs')
    with open(tiny_data / f'train.{kind}.jsonl', 'a') as file:
        file.write(json.dumps(long) + '\n')
    metrics = STAGES[stage].main(config(stage, 'run', data=str(tiny_data), steps=1))
    assert metrics
    assert re.search(r'train: 73 \w+ kept, 1 prompts cut', capsys.readouterr().out)


@pytest.mark.parametrize('stage', ['dpo', 'ppo'])
def test_a_tokenizer_that_does_not_fit_is_named(stage, tmp_path, config, tiny_data):
    """Data with other ids for the same words than --init has, or for PPO a reward model that reads
    other ids, is refused before the first step: its numbers would be noise."""
    lines = (tiny_data / 'bytes.tiktoken').read_text().splitlines(True)
    swapped = [lines[1].replace(' 1', ' 0'), lines[0].replace(' 0', ' 1'), *lines[2:]]
    (tiny_data / 'bytes.tiktoken').write_text(''.join(swapped))
    if stage == 'dpo':
        cfg = config('dpo', 'run', data=str(tiny_data))
    else:
        other = save_tiny_run(tmp_path / 'other', tiny_data, vocab_size=EOS + 1)
        rm = config('rm', 'rm', data=str(tiny_data), init=str(other), steps=1)
        train_rm.main(rm)
        cfg = config('ppo', 'run', reward=rm.out)
    with pytest.raises(UserError, match='tokenizer'):
        STAGES[stage].main(cfg)


@pytest.mark.parametrize('stage, changes', [
    *itertools.product(STAGES, [dict(data='no/such/folder'), dict(init='no/such/run'),
                                dict(steps=0), dict(device='nowhere')]),
    *(('ppo', dict(reward=reward)) for reward in ('no/such/run', 'no/such/reward.py', 'POLICY'))],
    ids=str)
def test_a_refused_start_leaves_no_folder(stage, changes, config, random_run):
    """What is refused before the first step, PPO's --reward included, leaves no --out behind: the
    corrected command must not find a run there."""
    if changes.get('reward') == 'POLICY':
        changes = dict(reward=str(random_run))
    cfg = config(stage, 'a/run', **changes)
    with pytest.raises(UserError, match='no/such|--steps=0|--device=nowhere|stage is sft, not rm'):
        STAGES[stage].main(cfg)
    assert not Path(cfg.out).parent.exists()


# the command, with names for what only the test knows, and words that the line must hold
MISTAKES = {
    'typo': ('train_sft.py --step=1', ['--step=1', 'did you mean --steps?']),
    'missing data': ('train_sft.py --data=no/such/folder --out={new}',
                     ['no/such/folder', 'prepare.py']),
    'existing run': ('train_sft.py --data={data} --out={used}', ['used', '--resume']),
    'malformed row': ('train_sft.py --data={bad} --out={new}', ['train.sft.jsonl:75: ']),
    'wrong stage': ('train_dpo.py --data={data} --init={rm} --out={new}',
                    ['its stage is rm', 'sft or ppo']),
}


@pytest.mark.parametrize('command, words', MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_ends_in_one_line(command, words, shared_data, tiny_data, rm_run, tmp_path,
                                    monkeypatch, capsys):
    """A user's mistake ends with a nonzero status and ONE line on stderr that says what is wrong:
    no traceback, and no list of flags to scroll past. One is made in a process of its own."""
    with open(tiny_data / 'train.sft.jsonl', 'a') as file:          # 72 rows, then blank lines
        file.write('\n\n{"prompt": "P", "completion": }\n')
    used = tmp_path / 'used'
    used.mkdir()
    (used / 'log.jsonl').write_text('')
    script, *flags = command.format(data=shared_data, bad=tiny_data, used=used, rm=rm_run,
                                    new=tmp_path / 'new').split() + ['--device=cpu']
    if '--data={bad}' in command:
        done = subprocess.run([sys.executable, script, *flags], cwd=ROOT, capture_output=True,
                              text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
        status, told = done.returncode, done.stderr
    else:
        module = STAGES[script.removeprefix('train_').removesuffix('.py')]
        monkeypatch.setattr(sys, 'argv', [script, *flags])
        with pytest.raises(SystemExit) as error:
            run_cli(module.main, module.Config)
        status, told = error.value.code, capsys.readouterr().err
        if isinstance(status, str):     # Python prints it, and exits with status 1
            status, told = 1, f'{told}{status}\n'
    assert status in (1, 2) and not (tmp_path / 'new').exists()
    assert 'Traceback' not in told and told.count('\n') == 1
    assert [word for word in words if word not in told] == []
