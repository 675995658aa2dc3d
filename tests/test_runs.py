"""
Runs: the command line, checkpoints and their faults, the log, resuming, and errors as a user
meets them.

    python -m pytest -q tests/test_runs.py
"""
import ast
import dataclasses
import errno
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import EOS, save_tiny_run

import train_dpo
import train_ppo
import train_rm
import train_sft
from data.text import checkpoint_text
from prefgpt import (GPT, Log, ScalarGPT, UserError, adamw, load_checkpoint, load_model, open_run,
                     parse_config, resume, run_cli, save_checkpoint)

ROOT = Path(__file__).resolve().parent.parent
STAGES = {'sft': train_sft, 'rm': train_rm, 'dpo': train_dpo, 'ppo': train_ppo}
SCRIPTS = ['train_sft', 'train_rm', 'train_dpo', 'train_ppo',
           *(f'tools.{path.stem}' for path in sorted((ROOT / 'tools').glob('[a-z]*.py')))]


# ----------------------------------------------------------------------------- the command line

@dataclass
class Flags:
    """A field of every type that a Config may have."""
    runs: tuple = ()            # the words without a flag
    from_: str = ''             # a flag whose name Python keeps to itself
    data: str = 'data/toy'      # text, even where it looks like # a comment
    steps: int = 10             # a whole number
    lr: float = 1e-3            # a number, 100% of it
    resume: bool = False        # a switch
    whiten: bool = True         # another one


@dataclass
class FlagsAlone:
    """A Config that takes no words but flags."""
    steps: int = 10             # a whole number
    resume: bool = False        # a switch


@dataclass
class NoComment:
    """A Config that is not finished."""
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
    """--flag=value of every type, and --flag value but of a switch; --lr=1 is a float,
    --whiten=False is false (as bool('False') is not), and the rest keep their defaults."""
    cfg = parse_config(Flags, argv)
    defaults = {'runs': (), 'from_': '', 'data': 'data/toy', 'steps': 10, 'lr': 0.001,
                'resume': False, 'whiten': True}
    parsed = dataclasses.asdict(cfg)
    parsed['runs'] = tuple(parsed['runs'])
    assert parsed == {**defaults, **expected}
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
    """A typo names the nearest flag, a wrong value its flag; exit status 2, and nothing is
    guessed: an abbreviation that works today means another flag tomorrow."""
    with pytest.raises(SystemExit) as error:
        parse_config(Flags, argv)
    assert error.value.code == 2
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert [word for word in words if word not in last_line] == []


def test_a_switch_never_takes_the_next_word(capsys):
    """--resume False, without a '=', would resume: where no words are taken it is refused."""
    assert parse_config(FlagsAlone, ['--resume=False']).resume is False
    assert parse_config(FlagsAlone, ['--resume', '--steps', '5']) == FlagsAlone(5, True)
    with pytest.raises(SystemExit) as error:
        parse_config(FlagsAlone, ['--resume', 'False'])
    assert error.value.code == 2 and 'unknown argument False' in capsys.readouterr().err


def test_usage_names_runs_only_where_they_are_taken(capsys):
    """[RUN ...] is in the first line of --help only if there is a field for the RUNs."""
    for Config, shown in ((Flags, True), (FlagsAlone, False)):
        with pytest.raises(SystemExit):
            parse_config(Config, ['--help'])
        assert ('[RUN ...]' in capsys.readouterr().out.splitlines()[0]) == shown


def test_a_field_without_a_comment_fails():
    """The comment is the help, so a field without one is refused and named."""
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
    """The smallest Config that open_run and save_checkpoint take."""
    data: str = 'data/old'      # data
    out: str = ''               # run folder
    resume: bool = False        # continue
    steps: int = 10             # optimizer steps
    lr: float = 1e-3            # peak learning rate
    micro_batch_size: int = 0   # rows in a forward pass


@pytest.fixture
def save(tmp_path, byte_tokenizer, tiny_gpt):
    """save(step): a checkpoint of a tiny policy in tmp_path/run/ckpt.pt; returns its path."""
    path = tmp_path / 'run' / 'ckpt.pt'
    path.parent.mkdir()

    def save(step, stage='sft', **changes):
        cfg = RunConfig(out=str(path.parent), **changes)
        policy = tiny_gpt(step, n_layer=1)
        save_checkpoint(path, stage, step, cfg, checkpoint_text(byte_tokenizer, 'Q: {} A:'),
                        {'loss': 0.5}, {'policy': policy}, [adamw(policy, 0.1)], shift=0.25)
        return path
    return save


def same(a, b):
    """Whether two nests of dicts, lists and tensors are equal, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def test_checkpoint_round_trip(save, byte_tokenizer, tiny_gpt):
    """What was saved comes back: stage, step, configs, tokenizer, weights, optimizer and extras,
    from the folder as from the file."""
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


def test_a_checkpoint_of_the_wrong_stage_names_both(save):
    """A reward model given as a policy is named as what it is, beside what was expected."""
    path = save(1, stage='rm')
    with pytest.raises(UserError, match=r'ckpt.pt: its stage is rm, not sft or ppo'):
        load_checkpoint(path, ['sft', 'ppo'])


def test_load_model_is_strict(save):
    """Weights that do not fit the model raise: a head that is silently left fresh would not."""
    with pytest.raises(RuntimeError, match='score.weight'):
        load_model(ScalarGPT, load_checkpoint(save(1), ['sft']), 'policy', 'cpu')


def test_a_missing_checkpoint_is_named(tmp_path):
    """A folder without a checkpoint, or no folder, gives the path and a question."""
    for path in (tmp_path, tmp_path / 'nowhere', tmp_path / 'nowhere' / 'ckpt.pt'):
        with pytest.raises(UserError, match=f'{re.escape(str(path))}.*no checkpoint'):
            load_checkpoint(path, ['sft'])


@pytest.mark.parametrize('keep', [0, 1, 0.3, 0.99, -1])
def test_a_truncated_checkpoint_is_damaged(save, keep):
    """Cut to nothing, to a byte, to a share, or by its last byte: one line with the size."""
    path = save(1)
    contents = path.read_bytes()
    cut = contents[:int(keep * len(contents)) if 0 < keep < 1 else keep]
    path.write_bytes(cut)
    with pytest.raises(UserError, match=f'damaged or incomplete, {len(cut)} bytes.*ckpt.prev.pt'):
        load_checkpoint(path, ['sft'])


def test_a_flipped_byte_is_named(save):
    """One flipped bit inside a weight: torch.load would read it without a word; the checksum
    names the record."""
    path = save(1)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    contents = bytearray(path.read_bytes())
    contents[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    path.write_bytes(contents)
    with pytest.raises(UserError, match=f'damaged.*{largest.filename}'):
        load_checkpoint(path, ['sft'])


def test_no_flipped_byte_goes_unnoticed(save):
    """A byte flipped anywhere either gives UserError or (in a time stamp or in padding) the same
    contents: never other weights, never a traceback."""
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
    """Unpickled, it would make a folder; a real one would do worse."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_malicious_checkpoint_is_not_executed(tmp_path):
    """A pickle that runs code when it is read is refused, and the code does not run."""
    torch.save({'stage': 'sft', 'weights': Evil(tmp_path / 'evil')}, tmp_path / 'ckpt.pt')
    with pytest.raises(Exception):
        load_checkpoint(tmp_path, ['sft'])
    assert not (tmp_path / 'evil').exists()


@pytest.mark.parametrize('contents', [
    {'stage': 'sft', 'weights': Evil('evil')}, {'wte.weight': torch.ones(2)},
    {'kind': 'sft', 'step': 1}, [1, 2], None],
    ids=['a malicious one', 'a bare state dict', 'an older version', 'a list', 'no zip'])
def test_a_file_that_is_no_checkpoint_of_ours_is_told_in_one_line(tmp_path, contents):
    """What torch can save, but no stage of this version wrote, gives UserError, not KeyError or
    UnpicklingError."""
    path = tmp_path / 'ckpt.pt'
    if contents is None:
        path.write_text('a text file')
    else:
        torch.save(contents, path)
    ours = isinstance(contents, dict) and 'weights' in contents or contents is None
    why = 'ckpt.pt' if ours else 'ckpt.pt.*not written by this version of prefgpt'
    with pytest.raises(UserError, match=why):
        load_checkpoint(path, ['sft'])


def test_every_torch_load_is_weights_only():
    """No file of the project calls torch.load, or the hub's loader, without weights_only=True: a
    checkpoint from somebody else could run code."""
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


def test_the_checkpoint_before_is_kept(save):
    """I22: after three saves ckpt.pt is the third and ckpt.prev.pt the second, both whole; nothing
    else lies in the folder. Catches contents copied into ckpt.pt: a file must be renamed to it."""
    path = save(1)
    assert [file.name for file in path.parent.iterdir()] == ['ckpt.pt']
    save(2), save(3)
    assert load(path)['step'] == 3
    assert load(path.with_name('ckpt.prev.pt'))['step'] == 2
    assert sorted(file.name for file in path.parent.iterdir()) == ['ckpt.prev.pt', 'ckpt.pt']


def fail_in_save(contents, file):
    """torch.save on a disk that fills up half way."""
    file.write(b'PK\x03\x04 half a checkpoint')
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail(*arguments):
    """A system call on a disk that is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FAULTS = [(torch, 'save', fail_in_save), (os, 'fsync', fail), (os, 'replace', fail)]


@pytest.mark.parametrize('module, name, fault', FAULTS, ids=[fault[1] for fault in FAULTS])
def test_a_failed_write_leaves_the_old_checkpoint(save, monkeypatch, module, name, fault):
    """I22: whichever call fails, the write says so, ckpt.pt is still the whole checkpoint of
    before, and no temporary file is left to fill the disk."""
    path = save(1)
    save(2)
    monkeypatch.setattr(module, name, fault)
    with pytest.raises((OSError, UserError)):
        save(3)
    monkeypatch.undo()
    assert load_checkpoint(path, ['sft'])['step'] == 2
    assert {file.name for file in path.parent.iterdir()} <= {'ckpt.prev.pt', 'ckpt.pt'}


def test_the_checkpoint_before_is_kept_without_hard_links(save, monkeypatch):
    """A file system without hard links: ckpt.prev.pt is then a copy, and nothing stops."""
    path = save(1)
    monkeypatch.setattr(os, 'link', fail)
    save(2)
    assert load_checkpoint(path, ['sft'])['step'] == 2
    assert load_checkpoint(path.with_name('ckpt.prev.pt'), ['sft'])['step'] == 1


def test_what_a_killed_save_left_is_cleared_away(save, tmp_path):
    """A run killed while saving leaves a temporary file: the next save removes it."""
    (tmp_path / 'run' / 'ckpt.tmp').write_bytes(b'half')
    path = save(1)
    assert load(path)['step'] == 1 and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize('flag, value', [('steps', 0), ('batch_size', 0), ('eval_every', 0),
                                         ('micro_batch_size', -1), ('dtype', 'float16'),
                                         ('grad_clip', 0.0), ('grad_clip', math.nan),
                                         ('max_new_tokens', 0), ('device', 'nowhere'),
                                         ('n_head', 3)])
def test_a_number_that_cannot_work_is_refused(config, flag, value):
    """No success in zero steps, no division by zero: the flag is named before anything runs."""
    with pytest.raises(UserError, match=f'--{flag}={value}'):
        train_sft.main(config('sft', 'run', **{flag: value}))


@pytest.mark.parametrize('changes', [{'beta': 0.0}, {'ipo': True, 'label_smoothing': 0.1}])
def test_dpo_refuses_settings_without_a_meaning(config, changes):
    """beta 0 divides by zero or learns nothing; IPO has no label smoothing to ignore silently."""
    with pytest.raises(UserError, match='--beta.*--label_smoothing'):
        STAGES['dpo'].main(config('dpo', 'run', **changes))


@pytest.mark.parametrize('stage', ['sft', 'rm', 'dpo', 'ppo'])
def test_resume_on_changed_data_is_refused(stage, config, tiny_data, monkeypatch):
    """DPO's reference logprobs go by row number: with other rows the loss would be wrong, and
    silently so. Any stage that resumes on other rows says so instead."""
    cfg = config(stage, 'run', data=str(tiny_data))
    die_after_logging(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        STAGES[stage].main(cfg)
    monkeypatch.undo()
    for path in tiny_data.glob('train.*.jsonl'):
        path.write_text(''.join(path.read_text().splitlines(True)[1:]))
    with pytest.raises(UserError, match='has changed'):
        STAGES[stage].main(dataclasses.replace(cfg, resume=True))


def test_a_lost_checkpoint_does_not_start_the_run_anew(tmp_path):
    """With ckpt.pt gone but ckpt.prev.pt there, --resume must not begin at 0 and wipe the log."""
    (tmp_path / 'ckpt.prev.pt').write_bytes(b'')
    with pytest.raises(UserError, match='copy ckpt.prev.pt'):
        open_run(RunConfig(out=str(tmp_path), resume=True), 'sft')


def test_ppo_does_not_resume_on_another_reward_model(config, monkeypatch):
    """A reward model trained anew between the interruption and --resume would mix two rewards."""
    cfg = config('ppo', 'run')
    die_after_logging(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        STAGES['ppo'].main(cfg)
    monkeypatch.undo()
    path, saved = Path(cfg.reward) / 'ckpt.pt', load(f'{cfg.reward}/ckpt.pt')
    before = path.read_bytes()
    try:
        saved['metrics'] = {'loss': 0.123}
        torch.save(saved, path)
        with pytest.raises(UserError, match='has changed'):
            STAGES['ppo'].main(dataclasses.replace(cfg, resume=True))
    finally:
        path.write_bytes(before)


def test_a_failed_first_write_leaves_nothing(save, monkeypatch, tmp_path):
    """Without a checkpoint before, the folder stays empty: no half ckpt.pt to resume from."""
    monkeypatch.setattr(torch, 'save', fail_in_save)
    with pytest.raises((OSError, UserError)):
        save(1)
    assert list((tmp_path / 'run').iterdir()) == []


# ----------------------------------------------------------------------------- opening a run

def test_open_run_starts_and_refuses(save, tmp_path):
    """A new folder is made by the log, not before; a folder that holds a run is refused without
    --resume; with it the checkpoint is handed out, or None if the run had not saved one yet."""
    new = tmp_path / 'a' / 'new'
    assert open_run(RunConfig(out=str(new)), 'sft') is None
    assert not new.parent.exists()
    Log(str(new), 0, 10).write({'step': 1})
    with pytest.raises(UserError, match='new holds a run: .*--resume'):
        open_run(RunConfig(out=str(new)), 'sft')
    assert open_run(RunConfig(out=str(new), resume=True), 'sft') is None
    out = str(save(4).parent)
    (Path(out) / 'log.jsonl').write_text('')
    with pytest.raises(UserError, match='--resume'):
        open_run(RunConfig(out=out), 'sft')
    assert open_run(RunConfig(out=out, resume=True), 'sft')['step'] == 4


def test_open_run_refuses_a_checkpoint_without_a_log(save):
    """A checkpoint whose log was deleted is still a run: without --resume it is refused, neither
    continued nor overwritten."""
    with pytest.raises(UserError, match='--resume'):
        open_run(RunConfig(out=str(save(4).parent)), 'sft')


def test_open_run_refuses_another_stage(save):
    """--resume in the folder of another stage names both."""
    with pytest.raises(UserError, match='its stage is rm, not dpo'):
        open_run(RunConfig(out=str(save(1, stage='rm').parent), resume=True), 'dpo')


def test_open_run_names_what_changed(save):
    """A changed setting is named with both values; what moves no result may change."""
    out = str(save(1).parent)
    with pytest.raises(UserError) as error:
        open_run(RunConfig(out=out, resume=True, lr=0.002, data='data/new'), 'sft')
    assert 'was run with other flags: ' in str(error.value)
    assert '--lr was 0.001 and is 0.002' in str(error.value)
    assert "--data was 'data/old' and is 'data/new'" in str(error.value)
    assert 'resume was' not in str(error.value)
    assert open_run(RunConfig(out=out, resume=True, micro_batch_size=2), 'sft')['step'] == 1


# ----------------------------------------------------------------------------- the log

def test_log_is_cut_where_the_run_resumes(tmp_path):
    """I22: rows past the checkpoint go, with their samples, and so does a last line that was half
    written; the rest stays as it was, and new rows follow. Catches steps that are logged twice."""
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


def test_log_survives_a_sample_that_looks_like_its_own_rows(tmp_path):
    """A model may write anything, line ends and rows of a log too: resuming neither fails nor loses
    samples."""
    samples = ['a\n{"step": 9}\nb', '{"step": 99, "lo', 'a\u2028b\x85c\r', '\ud800 \x1b[2J']
    Log(str(tmp_path), 0, 10).eval(2, {'loss': 1.0}, samples)
    written = (tmp_path / 'log.jsonl').read_bytes()
    Log(str(tmp_path), 2, 10)
    assert (tmp_path / 'log.jsonl').read_bytes() == written
    assert json.loads(written)['samples'] == samples


def test_log_line(tmp_path, monkeypatch, capsys):
    """The line of a step: fixed order and width, time and what is left to go. 10 steps took 12 s,
    so 480 more take 576 s; 8158 tokens in 0.412 s are 19.8 thousand a second."""
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
    """Of 200 steps about 50 are printed, the first and the last among them; all are written."""
    log = Log(str(tmp_path), 0, 200)
    for step in range(1, 201):
        log.step(step, time.time() - 1, 100, loss=1.0)
    printed = capsys.readouterr().out.splitlines()
    assert 50 <= len(printed) <= 52
    assert '1/200' in printed[0] and '200/200' in printed[-1]
    assert len((tmp_path / 'log.jsonl').read_text().splitlines()) == 200


def test_log_strips_control_characters_from_samples(tmp_path, capsys):
    """A sample with an escape sequence reaches the terminal without it."""
    Log(str(tmp_path), 0, 10).eval(1, {'loss': 1.0}, ['a\x1b[2Jb\nc'])
    out = capsys.readouterr().out
    assert '\x1b' not in out and '[2Jb' in out and '| c' in out


# ----------------------------------------------------------------------------- resuming

@pytest.fixture(scope='module')
def rm_run(shared_data, random_run, tmp_path_factory):
    """A reward model after two steps, for PPO to read; not to be changed."""
    out = tmp_path_factory.mktemp('runs') / 'rm'
    train_rm.main(train_rm.Config(data=str(shared_data), out=str(out), init=str(random_run),
                                  steps=2, warmup=1, device='cpu'))
    return out


@pytest.fixture
def config(shared_data, random_run, rm_run, tmp_path):
    """config('ppo', 'name'): six steps over two epochs, with a checkpoint at every second one."""
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
    """The run is killed when it has logged a step: past its last checkpoint."""
    step = Log.step

    def step_and_die(self, number, *arguments, **metrics):
        step(self, number, *arguments, **metrics)
        if number == last_step:
            with open(self.path, 'a') as file:
                file.write('{"step": 6, "los')          # and was about to log another one
            raise KeyboardInterrupt
    monkeypatch.setattr(Log, 'step', step_and_die)


def die_in_save(monkeypatch, number):
    """The run is killed before the rename of its number-th checkpoint; the log's renames pass."""
    replace, calls = os.replace, []

    def replace_or_die(source, target):
        calls.extend([target] if Path(target).name == 'ckpt.pt' else [])
        if len(calls) == number:
            raise KeyboardInterrupt
        replace(source, target)
    monkeypatch.setattr(os, 'replace', replace_or_die)


def log_rows(out):
    """The rows of log.jsonl without the fields that a clock wrote."""
    rows = [json.loads(line) for line in (Path(out) / 'log.jsonl').read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ('ms', 'tok_per_s')}
            for row in rows]


def assert_resuming_is_never_having_stopped(module, whole, parts, monkeypatch):
    """The run parts, killed after step 5 and again while saving step 6, ends as the run whole."""
    metrics = module.main(whole)
    for die, number, step_saved in ((die_after_logging, 5, 4), (die_in_save, 1, 4)):
        die(monkeypatch, number)
        with pytest.raises(KeyboardInterrupt):
            module.main(parts)
        monkeypatch.undo()
        assert load(f'{parts.out}/ckpt.pt')['step'] == step_saved
        parts = dataclasses.replace(parts, resume=True)
    assert module.main(parts) == metrics

    expected, resumed = load(f'{whole.out}/ckpt.pt'), load(f'{parts.out}/ckpt.pt')
    for saved in (expected, resumed):
        del saved['config']             # out and resume differ
    assert expected['step'] == 6
    assert all(torch.isfinite(weight).all() for weights in expected['weights'].values()
               for weight in weights.values())
    assert same(expected, resumed)
    assert log_rows(whole.out) == log_rows(parts.out)
    rows = log_rows(whole.out)
    assert [row['step'] for row in rows if 'lr' in row] == [1, 2, 3, 4, 5, 6]
    assert [row['step'] for row in rows if 'samples' in row] == [2, 4, 6]
    return expected


@pytest.mark.parametrize('stage', STAGES)
def test_i22_resuming_is_never_having_stopped(stage, config, monkeypatch):
    """I22: six steps at once, and six steps killed after step 5 and killed again while saving
    step 6, end with the same weights, optimizers, log rows and samples, bit for bit."""
    assert_resuming_is_never_having_stopped(STAGES[stage], config(stage, 'whole'),
                                            config(stage, 'parts'), monkeypatch)


def test_i22_a_reward_model_of_another_shape(config, shared_data, tmp_path, monkeypatch):
    """I22: PPO runs and resumes, bit for bit, where the reward model, and so the value model, has
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
    """Printed lines, log rows and checkpoint call the first step 1; its rate is lr / warmup."""
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


# What a child does: it trains, and is killed by the system with its second checkpoint half written
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
    """I22: kill -9 in the middle of a write, when no clean-up runs: ckpt.pt is the whole one of
    step 2, and --resume ends bit for bit where a run that never stopped does. PPO, whose state is
    the largest. Catches a checkpoint written in place."""
    whole, parts = config('ppo', 'whole'), config('ppo', 'parts')
    metrics = train_ppo.main(whole)
    done = subprocess.run([sys.executable, '-c', KILLED, str(torch.get_num_threads()),
                           json.dumps(dataclasses.asdict(parts))], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert load_checkpoint(parts.out, ['ppo'])['step'] == 2
    assert {path.name for path in Path(parts.out).iterdir()} == {
        'ckpt.pt', 'ckpt.tmp', 'log.jsonl'}                 # half of another one beside it

    assert train_ppo.main(dataclasses.replace(parts, resume=True)) == metrics
    expected, resumed = load(f'{whole.out}/ckpt.pt'), load(f'{parts.out}/ckpt.pt')
    for key in expected.keys() - {'config'}:                # where out and resume differ
        assert same(expected[key], resumed[key]), key
    assert log_rows(whole.out) == log_rows(parts.out)
    assert ({path.name for path in Path(parts.out).iterdir()}
            == {path.name for path in Path(whole.out).iterdir()})


def test_resume_with_other_micro_batches_is_allowed(config, monkeypatch):
    """Out of memory at step 5, resumed with --micro_batch_size=5: the same run, but for rounding;
    a resumed run with another lr is refused."""
    train_sft.main(config('sft', 'whole'))
    die_after_logging(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        train_sft.main(config('sft', 'parts'))
    monkeypatch.undo()
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
    touches no file: a pipeline can be run again after it broke. Other --steps are refused."""
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
    """A learning rate that blows up in step 3 stops the run with step and lr, before anything is
    saved, whether the evaluation after it notices or the next step: the checkpoint of step 2 is
    kept, and its weights are finite."""
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


def test_out_of_memory_says_what_to_halve(monkeypatch):
    """OOM names the flag to lower and the peak, in one line."""
    def main(cfg):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
    monkeypatch.setattr(sys, 'argv', ['train_sft.py'])
    with pytest.raises(SystemExit, match=r'MB.*: halve --micro_batch_size.*--roll') as error:
        run_cli(main, train_sft.Config)
    assert '\n' not in error.value.code


def test_a_full_disk_is_told_in_one_line(monkeypatch):
    """No space left while a checkpoint is written: one line, not a traceback."""
    monkeypatch.setattr(sys, 'argv', ['train_sft.py'])
    with pytest.raises(SystemExit, match='No space left') as error:
        run_cli(fail, train_sft.Config)
    assert '\n' not in error.value.code


def test_an_error_cannot_steer_the_terminal(monkeypatch):
    """A message that quotes a data file's escape sequence is printed without it."""
    def main(cfg):
        raise UserError('the role \x1b[2J is unknown')
    monkeypatch.setattr(sys, 'argv', ['train_sft.py'])
    with pytest.raises(SystemExit, match='the role') as error:
        run_cli(main, train_sft.Config)
    assert '\x1b' not in error.value.code


@pytest.mark.parametrize('stage', STAGES)
def test_a_prompt_longer_than_the_block_is_cut_and_counted(stage, config, tiny_data, capsys):
    """One prompt of 200 bytes in a block of 32 loses its left end, is counted, and trains."""
    long = {'prompt': 'x' * 200 + 'say a:', 'completion': ' a!', 'chosen': ' a!',
            'rejected': ' a?'}
    kind = {'sft': 'sft', 'ppo': 'prompts'}.get(stage, 'pairs')
    with open(tiny_data / f'train.{kind}.jsonl', 'a') as file:
        file.write(json.dumps(long) + '\n')
    metrics = STAGES[stage].main(config(stage, 'run', data=str(tiny_data), steps=1))
    assert metrics
    assert re.search(r'train: 73 \w+ kept, 1 prompts cut', capsys.readouterr().out)


def test_a_tokenizer_that_does_not_fit_is_named(tmp_path, config, tiny_data):
    """--init on data with other ids for the same words: refused before the first step."""
    lines = (tiny_data / 'bytes.tiktoken').read_text().splitlines(True)
    swapped = [lines[1].replace(' 1', ' 0'), lines[0].replace(' 0', ' 1'), *lines[2:]]
    (tiny_data / 'bytes.tiktoken').write_text(''.join(swapped))
    with pytest.raises(UserError, match='tokenizer'):
        train_dpo.main(config('dpo', 'run', data=str(tiny_data)))


def test_a_reward_model_of_another_tokenizer_is_named(tmp_path, config, tiny_data):
    """PPO with a reward model that reads other ids: its scores would be noise."""
    lines = (tiny_data / 'bytes.tiktoken').read_text().splitlines(True)
    swapped = [lines[1].replace(' 1', ' 0'), lines[0].replace(' 0', ' 1'), *lines[2:]]
    (tiny_data / 'bytes.tiktoken').write_text(''.join(swapped))
    other = save_tiny_run(tmp_path / 'other', tiny_data, vocab_size=EOS + 1)
    rm = config('rm', 'rm', data=str(tiny_data), init=str(other), steps=1)
    train_rm.main(rm)
    with pytest.raises(UserError, match='tokenizer'):
        train_ppo.main(config('ppo', 'run', reward=rm.out))


@pytest.mark.parametrize('changes', [
    dict(data='no/such/folder'), dict(init='no/such/run'), dict(steps=0), dict(device='nowhere')],
    ids=lambda changes: next(iter(changes)))
@pytest.mark.parametrize('stage', STAGES)
def test_a_refused_start_leaves_no_folder(stage, config, changes):
    """What is refused before the first step leaves no --out behind: the same command, mended, is
    not told that the folder holds a run."""
    cfg = config(stage, 'a/run', **changes)
    with pytest.raises(UserError, match='no/such|--steps=0|--device=nowhere'):
        STAGES[stage].main(cfg)
    assert not Path(cfg.out).parent.exists()


@pytest.mark.parametrize('reward', ['no/such/run', 'no/such/reward.py', 'policy'])
def test_a_refused_reward_leaves_no_folder(config, random_run, reward):
    """The same of PPO's --reward: missing, or a policy's run."""
    cfg = config('ppo', 'a/run', reward=str(random_run) if reward == 'policy' else reward)
    with pytest.raises(UserError, match='no/such|its stage is sft, not rm'):
        train_ppo.main(cfg)
    assert not Path(cfg.out).parent.exists()


# the script, its flags (with names for what only the test knows), words that the line must hold
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
def test_a_mistake_is_told_in_one_line(command, words, shared_data, tiny_data, rm_run, tmp_path):
    """A user's mistake, by the real script, ends with a nonzero status and ONE line on stderr that
    says what is wrong: no traceback, and no list of flags to scroll past."""
    with open(tiny_data / 'train.sft.jsonl', 'a') as file:          # 72 rows, then blank lines
        file.write('\n\n{"prompt": "P", "completion": }\n')
    used = tmp_path / 'used'
    used.mkdir()
    (used / 'log.jsonl').write_text('')
    flags = command.format(data=shared_data, bad=tiny_data, used=used, rm=rm_run,
                           new=tmp_path / 'new').split()
    done = subprocess.run([sys.executable, *flags, '--device=cpu'], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode in (1, 2) and not (tmp_path / 'new').exists()
    assert 'Traceback' not in done.stderr
    assert [word for word in words if word not in done.stderr] == []
    assert done.stderr.count('\n') == 1
