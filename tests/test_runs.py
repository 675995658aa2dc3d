"""
Checks runs: command line, checkpoints and their faults, log, resuming, errors as users see them.

    python -m pytest -q tests/test_runs.py
"""
import ast
import contextlib
import dataclasses
import errno
import importlib
import inspect
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
from conftest import EOS, STAGES, kill_after, log_rows, same, save_tiny_run, tiny_gpt

import prefgpt
import train_ppo
import train_rm
import train_sft
from data.text import checkpoint_text
from prefgpt import (GPT, Run, ScalarGPT, UserError, adamw, load_checkpoint, load_model, open_run,
                     parse_config, run_cli, save_checkpoint)

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ['.'.join(path.relative_to(ROOT).with_suffix('').parts)
           for path in sorted([*ROOT.glob('train_*.py'), *ROOT.glob('tools/*.py')])
           if 'class Config:' in path.read_text()]


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


PARSED = {
    '--lr=1': {'lr': 1.0},
    '--lr 1': {'lr': 1.0},
    '--lr=0': {'lr': 0.0},
    '--lr=-2.5e-4': {'lr': -0.00025},
    '--lr -1': {'lr': -1.0},
    '--steps=5 --data x': {'steps': 5, 'data': 'x'},
    '--data=': {'data': ''},
    '--data=a=b': {'data': 'a=b'},
    '--resume=True': {'resume': True},
    '--resume true': {'resume': True, 'runs': ('true',)},       # a switch never takes a RUN
    '--resume --steps=5': {'resume': True, 'steps': 5},
    '--whiten=False': {'whiten': False},
    '--whiten=0': {'whiten': False},
    '--from=out/a': {'from_': 'out/a'},
    'out/a out/b --steps=5': {'runs': ('out/a', 'out/b'), 'steps': 5},
    '--steps=5 out/a': {'runs': ('out/a',), 'steps': 5},
}


@pytest.mark.parametrize('flags, expected', PARSED.items(), ids=PARSED)
def test_parse_config(flags, expected):
    """--flag=value works for every type, and --flag value but for a switch; --lr=1 is a float,
    --whiten=False is false (unlike bool('False')), and the rest keep their defaults."""
    cfg = parse_config(Flags, flags.split())
    assert {**vars(cfg), 'runs': tuple(cfg.runs)} == {**vars(Flags()), **expected}
    assert type(cfg.lr) is float and type(cfg.steps) is int and type(cfg.whiten) is bool


REFUSED = {
    '--stpes=5': ['--stpes', 'did you mean --steps?'],
    '--step=5': ['--step', 'did you mean --steps?'],            # no abbreviations
    '--form=x': ['--form', 'did you mean --from?'],
    '--zzz=5': ['--zzz', '--help'],
    '--whiten=yes': ['--whiten', "'yes'", 'neither True nor False'],
    '--whiten=': ['--whiten', 'neither True nor False'],
    '--steps=1.5': ['--steps', '1.5'],
    '--lr=fast': ['--lr', 'fast'],
    '--steps': ['--steps'],
}


@pytest.mark.parametrize('flags, words', REFUSED.items(), ids=REFUSED)
def test_parse_config_refuses(flags, words, capsys):
    """A typo is answered with the nearest flag, a wrong value with its flag, in one line and with
    exit status 2. Nothing is guessed: an abbreviation that works today means another flag
    tomorrow."""
    with pytest.raises(SystemExit) as error:
        parse_config(Flags, flags.split())
    told = capsys.readouterr().err
    assert error.value.code == 2 and told.count('\n') == 1
    assert [word for word in words if word not in told] == []


def test_words_are_refused_where_no_runs_are_taken(capsys):
    """--resume False, without a '=', would resume: a Config that takes no words refuses it, and
    only one that takes them has [RUN ...] in the first line of --help."""
    with pytest.raises(SystemExit):
        parse_config(train_sft.Config, ['--resume', 'False'])
    assert 'unknown argument False' in capsys.readouterr().err
    for Config, shown in ((Flags, True), (train_sft.Config, False)):
        with pytest.raises(SystemExit):
            parse_config(Config, ['--help'])
        assert ('[RUN ...]' in capsys.readouterr().out.splitlines()[0]) == shown


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_lists_every_field_with_its_comment(script, capsys):
    """--help of every script shows each field of its Config, with the comment and the default."""
    Config = importlib.import_module(script).Config
    with pytest.raises(SystemExit) as error:
        parse_config(Config, ['--help'])
    assert error.value.code == 0
    # argparse breaks lines where it likes: compare without white space
    shown = ''.join(capsys.readouterr().out.split())
    fields = re.findall(r'^    (\w+): (\w+) = .*?  +# (.*)$', inspect.getsource(Config), re.M)
    assert {field[0] for field in fields} == {f.name for f in dataclasses.fields(Config)}
    for name, kind, comment in fields:
        flag = f'--{name.rstrip("_")}{kind}{comment}[{getattr(Config, name)}]'
        assert ''.join((name + comment if kind == 'tuple' else flag).split()) in shown, name


def test_what_is_the_same_in_every_script_is_the_same():
    """The lines after a mark '--- the same in' differ by the stage's name alone, so that a diff of
    two scripts shows their methods."""
    marks = {'--- the same in every script\n': set(), '--- the same in train_sft, train_rm': set()}
    for stage in STAGES:
        text = (ROOT / f'train_{stage}.py').read_text().replace(f"'{stage}'", 'STAGE')
        for mark, lines in marks.items():
            lines |= {after.split('\n')[0 if mark.endswith('\n') else 1]
                      for after in text.split(mark)[1:]}
    assert [len(lines) for lines in marks.values()] == [1, 1]


# ----------------------------------------------------------------------------- checkpoints

@pytest.fixture
def open_log(tmp_path, monkeypatch):
    """
    Returns open_log(saved, steps): the log of a run in tmp_path, by itself. It saves nothing, and a
    new one closes the one before.
    """
    monkeypatch.setattr(prefgpt, 'save_checkpoint', lambda *arguments, **options: None)
    monkeypatch.setattr(Run, 'at_the_end', contextlib.ExitStack(), raising=False)

    def open_log(saved=None, steps=10, **checkpoint):
        Run.at_the_end.close()
        cfg = train_sft.Config(out=str(tmp_path), steps=steps, resume=True)
        return Run(cfg, saved, **checkpoint)
    yield open_log
    Run.must_save = False
    Run.at_the_end.close()


def at(step, log=1):
    """Returns what a run reads of a checkpoint of a step, when its log had so many rows."""
    return {'step': step, 'metrics': {'loss': 0.5}, 'optimizers': [], 'log': log}


@pytest.fixture
def save(tmp_path, byte_tokenizer):
    """Returns save(step): it writes a tiny policy to tmp_path/run/ckpt.pt and returns the path."""
    path = tmp_path / 'run' / 'ckpt.pt'
    path.parent.mkdir()

    def save(step, stage='sft'):
        cfg = train_sft.Config(data='data/old', out=str(path.parent))
        policy = tiny_gpt(step, n_layer=1)
        save_checkpoint(path, stage, step, cfg, checkpoint_text(byte_tokenizer, 'Q: {} A:'),
                        {'loss': 0.5}, {'policy': policy}, [adamw(policy, 0.3)], shift=0.25)
        return path
    return save


def test_checkpoint_round_trip(save, open_log):
    """What was saved comes back: stage, step, configs, tokenizer, weights, optimizer and extras,
    from the folder and from the file."""
    path = save(3)
    saved = load_checkpoint(path.parent, ['base', 'sft'])
    assert same(saved, load_checkpoint(path, ['sft']))
    assert saved['stage'] == 'sft' and saved['step'] == 3 and saved['shift'] == 0.25
    assert saved['config'] == dataclasses.asdict(
        train_sft.Config(data='data/old', out=str(path.parent)))
    assert saved['model'] == {'block_size': 32, 'vocab_size': 17, 'n_layer': 1, 'n_head': 2,
                              'n_embd': 16, 'init_std': 0.3}
    assert saved['template'] == 'Q: {} A:' and len(saved['fingerprint']) == 16
    assert saved['tokenizer'].splitlines()[255] == '/w== 255'
    policy = load_model(GPT, saved, 'policy', 'cpu')
    assert same(policy.state_dict(), tiny_gpt(3, n_layer=1).state_dict())
    optimizer = adamw(policy, 0.0)
    log = open_log(saved, optimizers=[optimizer])
    assert (log.start, log.close()) == (3, {'loss': 0.5})
    assert optimizer.param_groups[0]['weight_decay'] == 0.3
    log = open_log(optimizers=[optimizer])
    assert (log.start, log.close()) == (0, {})


def test_a_wrong_stage_or_model_is_refused(save):
    """A reward model given as a policy raises an error that names both stages. Weights that do not
    fit the model raise, too: otherwise a head would silently keep its initial weights."""
    path = save(1, stage='rm')
    with pytest.raises(UserError, match=r'ckpt.pt: its stage is rm, not sft or ppo'):
        load_checkpoint(path, ['sft', 'ppo'])
    with pytest.raises(RuntimeError, match='score.weight'):
        load_model(ScalarGPT, load_checkpoint(path, ['rm']), 'policy', 'cpu')


@pytest.mark.parametrize('keep', [0, 1, 0.3, 0.99, -1])
def test_a_truncated_checkpoint_is_damaged(save, keep):
    """A file cut to nothing, to a share, or by its last byte raises one line with the size."""
    path = save(1)
    contents = path.read_bytes()
    cut = contents[:int(keep * len(contents)) if 0 < keep < 1 else keep]
    path.write_bytes(cut)
    with pytest.raises(UserError, match=f'damaged or incomplete, {len(cut)} bytes.*ckpt.prev.pt'):
        load_checkpoint(path, ['sft'])


def test_no_flipped_byte_goes_unnoticed(save):
    """A byte flipped anywhere gives UserError or, in a time stamp or in padding, the same contents:
    never other weights, never a traceback. In a weight, where torch.load would not notice it, the
    error names the record of the archive."""
    path = save(1)
    whole, contents = load_checkpoint(path, ['sft']), path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    in_a_weight = largest.header_offset + 200 + largest.file_size // 2
    # A few everywhere, and many in the zip's directory, at the end
    places = [in_a_weight, *range(0, len(contents), len(contents) // 97),
              *range(len(contents) - 3000, len(contents), 13)]
    errors = {}
    for place in places:
        damaged = bytearray(contents)
        damaged[place] ^= 0x41
        path.write_bytes(damaged)
        try:
            assert same(load_checkpoint(path, ['sft']), whole), f'byte {place}'
        except UserError as error:
            errors[place] = str(error)
    # Of a record that the directory calls a folder, torch.load would read nothing, or junk
    for name in ('data/0', 'data.pkl'):
        damaged = bytearray(contents)
        damaged[contents.rindex(f'/{name}'.encode()) - len('archive') - 8] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f'record .*{name}'):
            load_checkpoint(path, ['sft'])
    assert f'damaged or incomplete, {len(contents)} bytes' in errors[in_a_weight]
    assert largest.filename in errors[in_a_weight]
    assert len(errors) > len(places) / 2


class Evil:
    """Makes a folder when it is unpickled; a real one would do worse."""

    def __reduce__(self):
        return os.mkdir, ('evil',)


@pytest.mark.parametrize('contents, why', [
    ({'stage': 'sft', 'weights': Evil()}, 'damaged'),
    ({'kind': 'sft', 'step': 1}, 'not written by this version of prefgpt'),
    ({'format': 1, 'stage': 'sft'}, 'not written by this version of prefgpt'),
    ([1, 2], 'not written by this version of prefgpt')],
    ids=['a malicious one', 'an old one', 'another format', 'a list'])
def test_a_file_that_is_no_checkpoint_of_ours_is_refused(tmp_path, monkeypatch, contents, why):
    """What torch can save, but no stage of this version wrote, gives UserError, not KeyError or
    UnpicklingError; and code inside a pickle does not run."""
    monkeypatch.chdir(tmp_path)
    torch.save(contents, 'ckpt.pt')
    with pytest.raises(UserError, match=why):
        load_checkpoint('ckpt.pt', ['sft'])
    assert not Path('evil').exists()


def test_every_torch_load_is_weights_only():
    """No file of the project unpickles, or calls torch.load without weights_only=True: otherwise
    somebody else's checkpoint could run code. One place outside the tests calls it at all."""
    calls = [(path.relative_to(ROOT).as_posix(), ast.unparse(node))
             for folder in ('.', 'data', 'data/*', 'tools', 'studies', 'tests', 'tests/*')
             for path in ROOT.glob(f'{folder}/*.py')
             for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    loads = [(path, call) for path, call in calls if re.match(
        r'(torch|torch\.jit|pickle|marshal|shelve|joblib)\.(load|loads|open)\(', call)]
    assert [call for call in loads if 'weights_only=True' not in call[1]] == []
    assert [path for path, _ in loads if not path.startswith('tests/')] == ['prefgpt.py']
    assert not [call for call in calls if 'allow_pickle=True' in call[1]
                or re.match(r'torch\.serialization\.(add_)?safe_globals', call[1])]


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


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


@pytest.mark.parametrize('module, name', [(torch, 'save'), (os, 'fsync'), (os, 'replace')])
def test_a_failed_write_leaves_the_old_checkpoint(save, monkeypatch, tmp_path, module, name):
    """I22: whichever call fails, the write says so, ckpt.pt is still the whole checkpoint of
    before, or not there if this was the first, and no temporary file is left to fill the disk."""
    def save_in_vain(step):
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(module, name, fail)
            save(step)

    save_in_vain(1)
    assert names_in(tmp_path / 'run') == []
    path = save(1)
    save(2)
    save_in_vain(3)
    assert load_checkpoint(path, ['sft'])['step'] == 2
    assert set(names_in(path.parent)) <= {'ckpt.prev.pt', 'ckpt.pt'}


# ----------------------------------------------------------------------------- opening a run

def test_open_run_starts_and_refuses(save, tmp_path):
    """open_run makes no folder. Without --resume, a folder that holds a log or a checkpoint is
    refused; with it, open_run returns the checkpoint, or None before the first."""
    def open_at(out, **flags):
        return open_run(train_sft.Config(data='data/old', out=str(out), **flags), 'sft')

    new = tmp_path / 'a' / 'new'
    assert open_at(new) is None
    assert not new.parent.exists()
    new.mkdir(parents=True)
    (new / 'log.jsonl').write_text('{"step": 1}\n')
    with pytest.raises(UserError, match='new holds a run: .*--resume'):
        open_at(new)
    assert open_at(new, resume=True) is None
    out = save(4).parent
    for _ in ('without a log', 'with one'):
        with pytest.raises(UserError, match='--resume'):
            open_at(out)
        assert open_at(out, resume=True)['step'] == 4
        (out / 'log.jsonl').write_text('')
    # A lost checkpoint does not start the run anew, at step 0 and with an empty log
    (out / 'ckpt.pt').rename(out / 'ckpt.prev.pt')
    with pytest.raises(UserError, match='copy ckpt.prev.pt'):
        open_at(out, resume=True)


def test_open_run_names_what_changed(save):
    """A changed setting is named with both values, and so is another stage; what changes no result
    may change."""
    cfg = train_sft.Config(data='data/old', out=str(save(1).parent), resume=True)
    with pytest.raises(UserError, match='was run with other flags: .*Name another --out') as error:
        open_run(dataclasses.replace(cfg, lr=0.002, rows='pairs'), 'sft')
    assert '--lr was 0.006 and is 0.002' in str(error.value)
    assert "--rows was 'sft' and is 'pairs'" in str(error.value)
    assert 'resume was' not in str(error.value)
    assert open_run(dataclasses.replace(cfg, micro_batch_size=2, data='moved'), 'sft')['step'] == 1
    with pytest.raises(UserError, match='its stage is sft, not dpo'):
        open_run(cfg, 'dpo')


# ----------------------------------------------------------------------------- the log

def test_log_is_cut_where_the_run_resumes(tmp_path, open_log):
    """I22: rows past the checkpoint are removed, with their samples, and so is a last line that was
    half written; the rest stays, and new rows follow. Catches steps that are logged twice."""
    rows = ['{"step": 1, "loss": 3.0}\n', '{"step": 2, "loss": 2.5}\n',
            '{"step": 2, "eval_loss": 2.6, "samples": ["hi", "yo"]}\n',
            '{"step": 3, "loss": 2.0, "samples": ["hi there"]}\n', '{"step": 4, "lo']
    (tmp_path / 'log.jsonl').write_text(''.join(rows))
    log = open_log(at(2, 3))
    assert (tmp_path / 'log.jsonl').read_text() == ''.join(rows[:3])
    log.write({'step': 3, 'loss': 1.5})
    log.save(3, {'loss': 1.25}, ['one', 'two'])
    assert (tmp_path / 'log.jsonl').read_text() == ''.join(
        [*rows[:3], '{"step": 3, "loss": 1.5}\n',
         '{"step": 3, "eval_loss": 1.25, "samples": ["one", "two"]}\n'])
    assert names_in(tmp_path) == ['log.jsonl']


def test_log_survives_any_sample(tmp_path, capsys, open_log):
    """A model may write anything, even line ends and rows of a log: resuming neither fails nor
    loses samples, and escape sequences do not reach the terminal."""
    samples = ['a\n{"step": 9}\nb', '{"step": 99, "lo', 'a\u2028b\x85c\r', '\ud800 \x1b[2J']
    open_log().save(2, {'loss': 1.0}, samples)
    written = (tmp_path / 'log.jsonl').read_bytes()
    open_log(at(2))
    assert (tmp_path / 'log.jsonl').read_bytes() == written
    assert json.loads(written)['samples'] == samples
    printed = capsys.readouterr().out
    assert '\x1b' not in printed and '[2J' in printed and '| b' in printed


def test_log_line(tmp_path, monkeypatch, capsys, open_log):
    """A step's line has a fixed order, its time and the time left: 10 steps took 12 s, so 480 more
    take 576 s; 8158 tokens in 0.412 s are 19.8 thousand per second. Of 490 steps about 50 are
    printed, and all are written."""
    clock = [1000.0]
    monkeypatch.setattr(time, 'time', lambda: clock[0])
    log = open_log(at(10), steps=500)
    clock[0], log.step_began = 1012.0, 1011.588
    numbers = dict(loss=0.61212, accuracy=0.65625, margin=0.41349, chosen=-21.305,
                   rejected=-25.4, norm=3.1, lr=1e-5)
    for step in range(11, 501):
        log.log(step, 8158, **numbers)
    printed = capsys.readouterr().out.splitlines()
    assert ' '.join(printed[0].split()) == (
        'step 20/500 | loss 0.6121 | accuracy 0.66 | margin 0.413 | chosen -21.30 | '
        'rejected -25.40 | norm 3.10 | lr 1.0e-05 | 412 ms | 19.8k tok/s | 10m left')
    assert len(printed) == 49 and ' 500/500 |' in printed[-1]
    assert log_rows(tmp_path) == [{'step': step, **numbers} for step in range(11, 501)]


def test_ppo_cuts_prompts_for_the_smaller_block(shared_data, random_run, tmp_path, capsys):
    """A reward model with a smaller block than the policy's: PPO's prompts are cut for both."""
    init = save_tiny_run(tmp_path / 'init', shared_data, block_size=16)
    common = dict(data=str(shared_data), steps=1, device='cpu')
    train_rm.main(train_rm.Config(out=f'{tmp_path}/rm', init=str(init), **common))
    train_ppo.main(train_ppo.Config(out=f'{tmp_path}/ppo', init=str(random_run), **common,
                                    reward=f'{tmp_path}/rm', rollout_size=8, max_new_tokens=8))
    assert 'prompts cut on the left' in capsys.readouterr().out


# ----------------------------------------------------------------------------- resuming

@pytest.fixture(scope='module')
def rm_run(shared_data, tmp_path_factory):
    """
    Returns the run of a reward model after two steps; no test may change it. Its layers, heads,
    channels and block differ from the policy's.
    """
    folder = tmp_path_factory.mktemp('runs')
    init = save_tiny_run(folder / 'init', shared_data, n_layer=1, n_head=3, n_embd=12,
                         block_size=48)
    train_rm.main(train_rm.Config(data=str(shared_data), out=str(folder / 'rm'), init=str(init),
                                  steps=2, warmup=1, device='cpu'))
    return folder / 'rm'


@pytest.fixture
def config(shared_data, random_run, rm_run, tmp_path):
    """Returns config(stage, name): six steps over two epochs, a checkpoint at every second one."""
    def config(stage, name='run', **changes):
        common = dict(data=str(shared_data), out=str(tmp_path / name), steps=6, warmup=2, lr=1e-3,
                      eval_every=2, batch_size=24, device='cpu')
        own = {'sft': dict(n_layer=1, n_head=2, n_embd=16, block_size=32, max_new_tokens=4),
               'rm': dict(init=str(random_run)),
               'dpo': dict(init=str(random_run), max_new_tokens=4),
               'ppo': dict(init=str(random_run), reward=str(rm_run), rollout_size=24,
                           batch_size=8, max_new_tokens=4, ref_ema=0.1)}[stage]
        return STAGES[stage].Config(**{**common, **own, **changes})
    return config


def assert_finite(saved):
    """Asserts that all weights of a checkpoint are finite."""
    for weights in saved['weights'].values():
        assert all(torch.isfinite(weight).all() for weight in weights.values())


def assert_resumes_as(whole, parts):
    """Asserts that the run parts, resumed, ends with the metrics, checkpoint and log of whole."""
    saved = load_checkpoint(whole.out, STAGES)
    main = STAGES[saved['stage']].main
    assert main(dataclasses.replace(parts, resume=True)) == saved['metrics']
    resumed = load_checkpoint(parts.out, STAGES)
    del saved['config'], resumed['config']          # out and resume differ
    assert_finite(saved)
    assert same(saved, resumed)
    rows = log_rows(whole.out)
    assert rows == log_rows(parts.out) and names_in(whole.out) == names_in(parts.out)
    assert [row['step'] for row in rows if 'lr' in row] == [1, 2, 3, 4, 5, 6]
    assert [row['step'] for row in rows if 'samples' in row] == [2, 4, 6]


@pytest.mark.parametrize('stage', STAGES)
def test_i22_resuming_is_never_having_stopped(stage, config, monkeypatch):
    """I22: six steps at once, and six steps killed after step 5, past the checkpoint of step 4, end
    with the same weights, optimizers, log rows and samples, bit for bit. Catches a value model of
    the policy's shape: PPO's reward model, and so its value model, has another."""
    main = STAGES[stage].main
    whole, parts = config(stage, 'whole'), config(stage, 'parts')
    main(whole)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_after(patch, 5)
        main(parts)
    assert load_checkpoint(parts.out, STAGES)['step'] == 4
    assert_resumes_as(whole, parts)
    if stage == 'ppo':
        weights = load_checkpoint(whole.out, STAGES)['weights']
        assert weights['policy']['wpe.weight'].shape == (32, 16)
        assert weights['value_model']['body.wpe.weight'].shape == (48, 12)


# A child process trains with this, and the system kills it in the middle of its second checkpoint
KILLED = '''
import json, os, signal, sys
import torch
import train_ppo

save, files = torch.save, []

def save_and_die(contents, file):
    save(contents, file)
    files.append(file)
    if len(files) == 2:
        file.truncate(file.tell() // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_and_die
torch.set_num_threads(int(sys.argv[1]))
train_ppo.main(train_ppo.Config(**json.loads(sys.argv[2])))
'''


def test_i22_kill_9_while_a_checkpoint_is_written(config):
    """I22: after kill -9 in the middle of a write, when no clean-up runs, ckpt.pt is the whole one
    of step 2, and --resume ends bit for bit where a run that never stopped does. PPO's state is
    the largest. Catches a checkpoint written in place."""
    whole, parts = config('ppo', 'whole'), config('ppo', 'parts')
    train_ppo.main(whole)
    done = subprocess.run([sys.executable, '-c', KILLED, str(torch.get_num_threads()),
                           json.dumps(dataclasses.asdict(parts))], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert load_checkpoint(parts.out, ['ppo'])['step'] == 2
    assert names_in(parts.out) == ['ckpt.pt', 'ckpt.tmp', 'log.jsonl']      # ckpt.tmp: a half
    assert_resumes_as(whole, parts)


@pytest.mark.parametrize('stage', STAGES)
def test_a_short_run_and_resuming_it_when_finished(stage, config, capsys):
    """Printed lines, log rows and checkpoints count steps from 1; the first has lr / warmup.
    --resume of a finished run says that it is finished, returns its metrics, takes no step and
    touches no file, so that a broken pipeline can be run again. Other --steps are refused.
    --keep keeps every evaluation's checkpoint, and leaves the others as they are."""
    def contents():
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns)
                for path in Path(cfg.out).iterdir()}

    main, cfg = STAGES[stage].main, config(stage, steps=2, warmup=4, eval_every=1,
                                           keep=True)
    metrics = main(cfg)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed if line.startswith(('step ', 'eval '))] == [
        ['step', '1/2'], ['eval', '1/2'], ['step', '2/2'], ['eval', '2/2']]
    rows, before = log_rows(cfg.out), contents()
    assert [row['step'] for row in rows] == [1, 1, 2, 2]
    assert [row['lr'] for row in rows if 'lr' in row] == pytest.approx([cfg.lr / 4, cfg.lr / 2])
    assert sorted(before) == ['ckpt-1.pt', 'ckpt-2.pt', 'ckpt.prev.pt', 'ckpt.pt', 'log.jsonl']
    assert [load_checkpoint(f'{cfg.out}/{name}', STAGES)['step']
            for name in ('ckpt-1.pt', 'ckpt-2.pt', 'ckpt.prev.pt', 'ckpt.pt')] == [1, 2, 1, 2]

    assert main(dataclasses.replace(cfg, resume=True)) == metrics
    printed = capsys.readouterr().out.splitlines()
    assert f'{cfg.out} is finished: 2 steps' in printed
    assert not [line for line in printed if line.startswith(('step ', 'eval '))]
    with pytest.raises(UserError, match='--steps was 2 and is 3'):
        main(dataclasses.replace(cfg, resume=True, steps=3))
    assert contents() == before


@pytest.mark.parametrize('stage, changed', [*((stage, 'data') for stage in STAGES),
                                            ('ppo', 'reward model')])
def test_resume_on_changed_inputs_is_refused(stage, changed, config, tiny_data, rm_run, tmp_path):
    """A stage that resumes on other rows says so: DPO's reference logprobs go by row number, and
    its loss would silently be wrong. So does PPO with a reward model that was trained anew: the
    run would mix two rewards."""
    own = {'reward': str(shutil.copytree(rm_run, tmp_path / 'rm'))} if stage == 'ppo' else {}
    cfg = config(stage, data=str(tiny_data), steps=1, **own)
    STAGES[stage].main(cfg)
    if changed == 'data':
        for path in tiny_data.glob('train.*.jsonl'):
            path.write_text(''.join(path.read_text().splitlines(True)[1:]))
    else:
        saved = load_checkpoint(own['reward'], ['rm'])
        saved['weights']['reward_model']['score.weight'] *= -1
        torch.save(saved, tmp_path / 'rm' / 'ckpt.pt')
    with pytest.raises(UserError, match='has changed'):
        STAGES[stage].main(dataclasses.replace(cfg, resume=True))


# ----------------------------------------------------------------------------- errors in a run

@pytest.mark.parametrize('eval_every', [1, 2])
@pytest.mark.parametrize('stage', STAGES)
def test_a_non_finite_loss_stops_the_run(stage, config, monkeypatch, eval_every):
    """A learning rate that blows up in step 3 stops the run with an error that names step and lr,
    whether the evaluation after it notices or the next step. Nothing is saved any more: the
    checkpoint of step 2 stays, with finite weights."""
    module = STAGES[stage]
    schedule = module.learning_rate
    monkeypatch.setattr(module, 'learning_rate', lambda step, *arguments: (
        1e38 if step == 2 else schedule(step, *arguments)))
    cfg = config(stage, eval_every=eval_every)
    with pytest.raises(UserError, match=r'step [34], lr=\d.*(nan|inf).*checkpoint'):
        module.main(cfg)
    saved = load_checkpoint(cfg.out, [stage])
    assert saved['step'] == 2
    assert_finite(saved)


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


@pytest.mark.parametrize('stage', ['dpo', 'ppo'])
def test_a_tokenizer_that_does_not_fit_is_named(stage, tmp_path, config, tiny_data):
    """Data with other ids for the same words than --init has, or for PPO a reward model that reads
    other ids, is refused before the first step: its numbers would be noise."""
    lines = (tiny_data / 'bytes.tiktoken').read_text().splitlines(True)
    swapped = [lines[1].replace(' 1', ' 0'), lines[0].replace(' 0', ' 1'), *lines[2:]]
    (tiny_data / 'bytes.tiktoken').write_text(''.join(swapped))
    if stage == 'dpo':
        cfg = config('dpo', data=str(tiny_data))
    else:
        other = save_tiny_run(tmp_path / 'other', tiny_data, vocab_size=EOS + 1)
        rm = config('rm', 'rm', data=str(tiny_data), init=str(other), steps=1)
        train_rm.main(rm)
        cfg = config('ppo', reward=rm.out)
    with pytest.raises(UserError, match='tokenizer'):
        STAGES[stage].main(cfg)


# Stages, flags, and what the message says
REFUSED_STARTS = [
    (STAGES, dict(data='no/such/folder'), 'no/such/folder.*prepare.py'),
    (STAGES, dict(init='no/such/run'), 'no/such/run.*no checkpoint'),
    (STAGES, dict(init='data'), 'data.ckpt.pt: no checkpoint'),
    (STAGES, dict(steps=0), '--steps=0'),
    (STAGES, dict(device='nowhere'), '--device=nowhere'),
    (['ppo'], dict(reward='no/such/run'), 'no/such/run.*no checkpoint'),
    (['ppo'], dict(reward='no/such/reward.py'), 'no/such/reward.py'),
    (['dpo'], dict(beta=0.0), '--beta.*--label_smoothing'),
    (['dpo'], dict(ipo=True, label_smoothing=0.1), '--beta.*--label_smoothing'),
    *((['sft'], {flag: value}, f'--{flag}={value}') for flag, value in [
        ('batch_size', 0), ('eval_every', 0), ('micro_batch_size', -1), ('dtype', 'float16'),
        ('grad_clip', 0.0), ('grad_clip', math.nan), ('max_new_tokens', 0), ('n_head', 3)]),
]


@pytest.mark.parametrize('stage, flags, words', [
    (stage, flags, words) for stages, flags, words in REFUSED_STARTS for stage in stages], ids=str)
def test_a_refused_start_leaves_no_folder(stage, flags, words, config):
    """What cannot work, or has no meaning, is named before the first step, and leaves no --out
    behind: the corrected command must not find a run there."""
    cfg = config(stage, 'a/run', **flags)
    with pytest.raises(UserError, match=words):
        STAGES[stage].main(cfg)
    assert not Path(cfg.out).parent.exists()


def test_runs_of_the_wrong_stage_are_refused(config, random_run, rm_run):
    """A reward model is no --init, and a policy no --reward."""
    with pytest.raises(UserError, match='its stage is rm, not base or sft'):
        train_ppo.main(config('ppo', init=str(rm_run)))
    with pytest.raises(UserError, match='its stage is sft, not rm'):
        train_ppo.main(config('ppo', reward=str(random_run)))
    assert not Path(config('ppo').out).exists()
