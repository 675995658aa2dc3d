"""
Checks that what goes wrong around a run costs no step: other processes, signals, judges, full
disks, changed files, flags without a meaning.

    python -m pytest -q tests/test_faults.py
"""
import dataclasses
import errno
import functools
import io
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import STAGES, log_rows, same, tiny_scalar
from test_runs import (ROOT, assert_resumes_as, at, config, names_in, open_log,     # noqa: F401
                       rm_run, save)                                                # fixtures

import fuzz
import kills
import prefgpt
import train_ppo
import train_sft
from data.judge import load_judge
from data.text import DataError
from prefgpt import (RANGES, Run, UserError, load_checkpoint, parse_config, run_cli,
                     save_checkpoint, set_up)

fcntl = pytest.importorskip('fcntl')
JUDGE = 'def score(prompt, response):\n    return {}\n'


def judge_file(path, returned, before=''):
    """Writes a reward.py that returns an expression; returns its path as text."""
    path.write_text(before + JUDGE.format(returned))
    return str(path)


def step_of(cfg):
    """Returns the step that a run's checkpoint holds."""
    return load_checkpoint(cfg.out, STAGES)['step']


@pytest.fixture
def after_step(monkeypatch):
    """Returns after_step(step, call): call happens once, when that step has been logged."""
    log_step, done = Run.log, []

    def after_step(step, call):
        def log_and_call(self, now, *arguments, **metrics):
            log_step(self, now, *arguments, **metrics)
            if now == step and not done:
                done.append(now)
                call()
        monkeypatch.setattr(Run, 'log', log_and_call)
    return after_step


# ----------------------------------------------------------------------------- A: judges

def test_a_numpy_judge_leaves_a_checkpoint_that_loads(config, tmp_path):
    """numpy's float64 is a Python float to isinstance, and no plain number to weights_only=True:
    kept as it came, it made a checkpoint that nobody could load, with exit status 0."""
    path = judge_file(tmp_path / 'judge.py', '{"reward": np.mean([len(response), 1.0])}',
                      'import numpy as np\n')
    cfg = config('ppo', judge=path, steps=1)
    assert type(train_ppo.main(cfg)['gold']) is float
    assert type(load_checkpoint(cfg.out, ['ppo'])['metrics']['gold']) is float


def test_what_could_not_be_loaded_is_not_saved(save, monkeypatch):
    """An object that weights_only=True refuses, anywhere in a checkpoint, leaves the old one."""
    path = save(1)
    monkeypatch.setattr(prefgpt, 'FORMAT', __import__('numpy').float64(2))
    with pytest.raises(AssertionError):
        save(2)
    assert load_checkpoint(path, ['sft'])['step'] == 1 and names_in(path.parent) == ['ckpt.pt']


@pytest.mark.parametrize('name, text', [
    ('rules.py', 'from __future__ import annotations\nfrom dataclasses import dataclass\n'
                 '@dataclass\nclass Rule:\n    points: float = 1.0\n'
                 'def score(prompt, response): return Rule().points\n'),
    ('beside.py', 'from words_beside import K\ndef score(prompt, response): return K\n'),
    ('reward.txt', 'def score(prompt, response): return True\n')])
def test_a_reward_py_may_be_a_module(tmp_path, name, text):
    """Dataclasses with postponed annotations need a registered module, an import needs the folder
    on the path, and another suffix needs no loader of its own."""
    (tmp_path / 'words_beside.py').write_text('K = 1\n')
    (tmp_path / name).write_text(text)
    found = load_judge(tmp_path / name)('p', 'r')
    assert found == {'reward': 1.0} and type(found['reward']) is float


@pytest.mark.parametrize('returned', ['10 ** 400', '1e39', 'float("nan")', '"1"', '[1.0]'])
def test_a_reward_that_is_no_number_of_float32_is_one_line(tmp_path, returned):
    """1e39 is finite to Python and infinite to float32: its loss would be blamed on lr."""
    judge = load_judge(judge_file(tmp_path / 'reward.py', returned))
    with pytest.raises(DataError, match="score.'p', 'r'. is .*not finite numbers"):
        judge('p', 'r')


# ----------------------------------------------------------------------------- B: one owner

def test_a_second_process_is_refused(config, after_step):
    """A run whose folder another process has locked stops before it cuts the log or touches a
    temporary file. When the other one is gone, the same command goes on."""
    cfg = config('sft', resume=True, eval_every=1, steps=3)
    out = Path(cfg.out)
    out.mkdir()
    (out / 'ckpt.tmp').write_text('half')
    (out / 'log.jsonl').write_text('{"step": 7}\n')
    with open(out / 'log.jsonl', 'a') as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match='another process'):
            train_sft.main(cfg)
        assert (out / 'ckpt.tmp').read_text() == 'half'
        assert (out / 'log.jsonl').read_text() == '{"step": 7}\n'

    def others_try():
        with open(out / 'log.jsonl') as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    after_step(2, others_try)
    train_sft.main(cfg)
    assert step_of(cfg) == 3


def test_without_locks_a_file_marks_the_owner(config, after_step, monkeypatch):
    """Where locks do not exist, a file that may not be there yet stands for them: it is there while
    a run lasts, refuses another one by its name, and is gone at the end, also after an error."""
    def flock(*arguments):
        raise OSError(errno.ENOSYS, 'no locks')
    monkeypatch.setattr(fcntl, 'flock', flock)
    cfg = config('sft', resume=True)
    mark = Path(cfg.out, 'a-process-trains-here')

    def interrupt():
        with pytest.raises(FileExistsError, match=mark.name):
            Run(cfg)
        raise KeyboardInterrupt
    after_step(3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_sft.main(cfg)
    assert not mark.exists()
    train_sft.main(cfg)
    assert step_of(cfg) == 6 and not mark.exists()


def test_a_run_that_begins_meanwhile_is_not_overwritten(config, monkeypatch):
    """Of two first starts at once, the one that comes to its log second is refused, even if the
    other one has ended by then."""
    cfg = config('sft', steps=1)

    def set_up_late(cfg):
        monkeypatch.undo()
        train_sft.main(cfg)             # the other one, from its start to its end
        return set_up(cfg)
    monkeypatch.setattr(train_sft, 'set_up', set_up_late)
    with pytest.raises(UserError, match='another process has begun'):
        train_sft.main(cfg)
    assert step_of(cfg) == 1


def test_a_run_without_a_step_may_be_started_again(config, tmp_path):
    """A reward.py that fails in the first rollout leaves no run: the same command, without
    --resume, starts."""
    cfg = config('ppo', reward=judge_file(tmp_path / 'reward.py', 'None'), steps=1)
    with pytest.raises(DataError, match='is None'):
        train_ppo.main(cfg)
    judge_file(tmp_path / 'reward.py', '1.0')
    train_ppo.main(cfg)
    assert step_of(cfg) == 1


# ----------------------------------------------------------------------------- C: nothing is lost

@pytest.mark.parametrize('stage, name, status, step', [
    ('sft', 'SIGINT', 130, 3), ('rm', 'SIGHUP', 129, 4), ('dpo', 'SIGTERM', 143, 4),
    ('ppo', 'SIGTERM', 143, 3)])
def test_a_signal_ends_the_run_after_the_step(stage, name, status, step, config, after_step,
                                              capsys):
    """SIGINT, SIGTERM and SIGHUP finish the step, and its evaluation where one is due; then the
    step is saved and told. Going on ends bit for bit where a run without signals does. Python's
    handlers are as before, and a signal that was ignored, as by nohup, stays so."""
    main, number = STAGES[stage].main, getattr(signal, name)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    whole, parts = config(stage, 'whole'), config(stage, 'parts')
    main(whole)
    after_step(step, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as end:
        main(parts)
    assert end.value.code == status and step_of(parts) == step
    assert f'saved to step {step}; --resume goes on' in capsys.readouterr().err
    assert {n: signal.getsignal(n) for n in handlers} == handlers
    assert_resumes_as(whole, parts)


def test_a_second_signal_ends_the_run_at_once(config, after_step):
    """A second Ctrl-C does not wait for an evaluation: the step is saved and the run ends."""
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
    after_step(2, twice)
    cfg = config('sft')
    with pytest.raises(KeyboardInterrupt):
        train_sft.main(cfg)
    assert step_of(cfg) == 2
    assert [row for row in log_rows(cfg.out) if 'samples' in row] == []


def test_nohups_wish_is_respected(config, after_step):
    """A signal that is ignored when the run starts, as nohup has it, does not end it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        after_step(2, lambda: os.kill(os.getpid(), signal.SIGHUP))
        cfg = config('sft')
        train_sft.main(cfg)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert step_of(cfg) == 6


def test_what_fails_after_a_step_costs_no_step(config, monkeypatch, rm_run):
    """A judge or a sample that fails in an evaluation, a print, or a reward in a rollout: the steps
    before it are saved, and resumed they lead to the same weights. In the middle of an update,
    between two optimizer steps, the weights belong to no step: the save before it stays."""
    def main(cfg):
        train_ppo.main(cfg)
        return load_checkpoint(cfg.out, ['ppo'])['weights']
    whole = main(config('ppo', 'whole'))
    # Evaluations at steps 2, 4 and 6; three minibatches and two epochs per step
    for module, name, at_call, saved in [
            (train_ppo, 'evaluate', 2, 4), (train_ppo, 'rollout', 4, 2), (Run, 'show', 7, 5),
            (train_ppo, 'minibatch_gradient', 15, 2)]:
        parts, function, calls = config('ppo', name), getattr(module, name), []

        def fail(*arguments, **options):
            calls.append(name)
            if len(calls) == at_call:
                raise KeyError('a fault')
            return function(*arguments, **options)
        with monkeypatch.context() as patch, pytest.raises(KeyError):
            patch.setattr(module, name, fail)
            main(parts)
        assert step_of(parts) == saved, name
        assert same(main(dataclasses.replace(parts, resume=True)), whole)
        assert [row['step'] for row in log_rows(parts.out) if 'lr' in row] == [1, 2, 3, 4, 5, 6]


def test_a_value_model_with_nan_is_not_saved(config, monkeypatch):
    """Neither loss nor evaluation shows what the last update did to the value model: its weights
    are looked at before they are written, and the checkpoint before them stays."""
    cfg, step = config('ppo', eval_every=1, steps=3), train_ppo.optimizer_step

    def blow_up(optimizer, model, lr, grad_clip, now, **losses):
        norm = step(optimizer, model, lr, grad_clip, now, **losses)
        if now == 3 and isinstance(model, prefgpt.ScalarGPT):
            model.score.weight.data.fill_(math.nan)
        return norm
    monkeypatch.setattr(train_ppo, 'optimizer_step', blow_up)
    cfg = dataclasses.replace(cfg, ppo_epochs=1, batch_size=cfg.rollout_size)
    with pytest.raises(UserError, match='step 3: the norm of the value_model is nan'):
        train_ppo.main(cfg)
    assert step_of(cfg) == 2


def test_the_way_that_a_nan_names_works(config, monkeypatch, capsys):
    """After a nan, what is saved is told truly, and --init=RUN in another --out with a lower --lr
    goes on. If no step was saved, none is said to be kept."""
    for eval_every, saved in ((2, 2), (6, 0)):
        cfg = config('sft', f'run{saved}', eval_every=eval_every)
        with monkeypatch.context() as patch:
            patch.setattr(train_sft, 'learning_rate', lambda step, *_: 1e38 if step == 2 else 1e-3)
            with pytest.raises(UserError, match='another --out; there, --init=RUN') as error:
                train_sft.main(cfg)
        assert 'kept' not in str(error.value)
        assert f'saved to step {saved};' in capsys.readouterr().err
    first = config('sft', 'run2')
    train_sft.main(train_sft.Config(data=first.data, out=first.out + '-on', init=first.out, lr=1e-4,
                                    steps=1, max_new_tokens=4, device='cpu'))
    assert not Path(cfg.out, 'ckpt.pt').exists()


# ----------------------------------------------------------------------------- D: the same run?

def test_files_may_move_and_flags_may_be_added(config, tmp_path, tiny_data, random_run):
    """Resuming asks what the files hold, not where they are: a copy of the data, a copy of --init,
    one more slash. A flag that the checkpoint does not know had its default."""
    cfg = config('dpo', data=str(tiny_data), steps=2)
    STAGES['dpo'].main(cfg)
    for path in (tiny_data, random_run):
        shutil.copytree(path, tmp_path / 'moved' / path.name)
    saved = torch.load(Path(cfg.out, 'ckpt.pt'), weights_only=True)
    del saved['config']['label_smoothing']
    torch.save(saved, Path(cfg.out, 'ckpt.pt'))
    STAGES['dpo'].main(dataclasses.replace(
        cfg, resume=True, data=f'{tmp_path}/moved/letters/', init=f'{tmp_path}/moved/random/'))


@pytest.mark.parametrize('stage', STAGES)
def test_a_stage_made_from_something_that_changed_is_not_finished(stage, config, tmp_path,
                                                                  random_run, capsys):
    """An --init with the same metrics and other weights is another one: a stage that was made from
    the old one is not finished, and does not go on."""
    own = {'n_layer': 2} if stage == 'sft' else {}
    init = shutil.copytree(random_run, tmp_path / 'init')
    cfg = config(stage, init=str(init), steps=2, **own)
    STAGES[stage].main(cfg)
    saved = torch.load(init / 'ckpt.pt', weights_only=True)
    saved['weights']['policy']['wte.weight'] *= 1.3
    torch.save(saved, init / 'ckpt.pt')
    capsys.readouterr()
    with pytest.raises(UserError, match='its init has changed: name another --out'):
        STAGES[stage].main(dataclasses.replace(cfg, resume=True))
    assert 'finished' not in capsys.readouterr().out


def test_an_edited_reward_py_is_another_reward(config, tmp_path):
    """Half a run with one reward and half with another would be neither. The judge, which trains
    nothing, may change."""
    path, judge = tmp_path / 'reward.py', tmp_path / 'judge.py'
    cfg = config('ppo', reward=judge_file(path, '1.0'), judge=judge_file(judge, '1.0'), steps=1)
    train_ppo.main(cfg)
    judge_file(judge, '2.0')
    train_ppo.main(dataclasses.replace(cfg, resume=True))
    judge_file(path, '-1.0')
    with pytest.raises(UserError, match='its reward has changed'):
        train_ppo.main(dataclasses.replace(cfg, resume=True))


def test_more_steps_and_other_flags_name_the_way(config):
    """The schedule depends on --steps, so a run cannot have more of them: the message names
    --init=RUN and another --out, and that works, for a reward model too."""
    cfg = config('rm', steps=1)
    STAGES['rm'].main(cfg)
    with pytest.raises(UserError, match=f'--steps was 1 and is 2. Name another --out .*'
                                        f'--init={cfg.out}'):
        STAGES['rm'].main(dataclasses.replace(cfg, resume=True, steps=2))
    STAGES['rm'].main(config('rm', 'on', init=cfg.out, steps=1))


def test_a_changed_script_is_told_and_goes_on(config, monkeypatch, capsys):
    """Resuming with another source prints one line, and trains to the end."""
    cfg = config('sft', steps=2)
    train_sft.main(cfg)
    getsource = prefgpt.inspect.getsource
    monkeypatch.setattr(prefgpt.inspect, 'getsource', lambda of: getsource(of) + '# edited\n')
    train_sft.main(dataclasses.replace(cfg, resume=True))
    assert capsys.readouterr().out.count('its script has changed') == 1


# ----------------------------------------------------------------------------- E, F: flags

def test_every_number_has_a_range():
    """A numeric flag of a script that nobody gave a range would take any value. Every default is in
    its range."""
    ranges = {name: ends for ends, names in RANGES.items() for name in names.split()}
    for module in STAGES.values():
        for field in dataclasses.fields(module.Config):
            if type(field.default) in (int, float):
                least, most = ranges[field.name]
                assert least <= field.default <= most, field.name


@pytest.mark.parametrize('flag', [
    'lr=-1.0', 'value_lr=-1.0', 'beta=-1.0', 'gamma=2.0', 'gae_lambda=5.0', 'clip_eps=-1.0',
    'vf_clip=-1.0', 'ref_ema=5.0', 'ref_ema=-1.0', 'warmup=-5', 'weight_decay=-1.0', 'lr=nan',
    'lr=inf', 'temperature=-1.0', 'no_eos_score=-inf', 'n_embd=0', 'n_head=0', 'n_layer=-1',
    'n_embd=1000000000000', 'block_size=-8', 'init_std=-1.0', 'seed=18446744073709551616',
    'seed=-1', 'label_smoothing=2.0', 'device=meta'])
def test_a_flag_without_a_meaning_is_refused(flag):
    """A value without a meaning is named before anything is read; nan and inf are none either."""
    name, value = flag.split('=')
    Config = next(module.Config for module in STAGES.values() if hasattr(module.Config, name))
    cfg = dataclasses.replace(Config(), **{name: type(getattr(Config, name))(value)})
    with pytest.raises(UserError, match=f'--{name}='):
        set_up(cfg)


def test_model_flags_beside_init_are_no_silent_wish(config, random_run):
    """With --init the model is the checkpoint's: another --n_layer is an error, the same is not."""
    cfg = config('sft', init=str(random_run), n_layer=2, steps=1)
    with pytest.raises(UserError, match='--n_layer=3: that of --init=.* is 2'):
        train_sft.main(dataclasses.replace(cfg, n_layer=3))
    assert not Path(cfg.out).exists()
    train_sft.main(cfg)


def test_out_is_a_path(config, monkeypatch, tmp_path):
    """An empty --out would write into the current folder; ~ is the home folder, not a name."""
    with pytest.raises(UserError, match='--out is empty'):
        train_sft.main(config('sft', out=''))
    monkeypatch.setenv('HOME', str(tmp_path))
    train_sft.main(config('sft', out='~/x', steps=1))
    assert (tmp_path / 'x' / 'ckpt.pt').exists() and not Path('~').exists()


# ----------------------------------------------------------------------------- G: the machine

def cli(monkeypatch, main, *flags):
    """Calls run_cli as a shell does; returns what it prints to end with, or its status."""
    monkeypatch.setattr(sys, 'argv', ['train_sft.py', *flags])
    with pytest.raises(SystemExit) as end:
        run_cli(main, train_sft.Config)
    return end.value.code


@pytest.mark.parametrize('share', [0.1, 0.5, 0.99])
def test_a_full_disk_is_one_line(random_run, tmp_path, monkeypatch, share):
    """A real one: torch.save then raises a RuntimeError, 'unexpected pos', which hides the cause.
    The line names cause and file; the checkpoint before it is whole, and nothing else is left."""
    path = Path(shutil.copytree(random_run, tmp_path / 'run'), 'ckpt.pt')
    limit, model = resource.getrlimit(resource.RLIMIT_FSIZE), tiny_scalar(n_embd=64)
    save = functools.partial(save_checkpoint, path, 'rm', cfg=train_sft.Config(), text={},
                             metrics={}, models={'reward_model': model}, optimizers=[])
    save(step=2)
    size = path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size * share), limit[1]))
    try:
        told = cli(monkeypatch, lambda cfg: save(step=3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert 'File too large' in told and 'ckpt.tmp' in told and '\n' not in told
    assert load_checkpoint(path, ['rm'])['step'] == 2
    assert names_in(path.parent) == ['ckpt.prev.pt', 'ckpt.pt']


def test_cpu_memory_is_one_line(monkeypatch):
    """On a CPU torch raises a RuntimeError of its allocator, which is no torch.OutOfMemoryError;
    any other RuntimeError is a mistake of ours, and keeps its traceback."""
    assert '--micro_batch_size' in cli(monkeypatch, lambda cfg: torch.empty(2 ** 50))
    with pytest.raises(RuntimeError, match='ours'):
        cli(monkeypatch, lambda cfg: (_ for _ in ()).throw(RuntimeError('ours')))


@pytest.mark.parametrize('damage', [
    b'\0\0\0\0\n', b'garbage\n', b'{"loss": 1.0}\n', b'caf\xe9\n', b'\xef\xbb\xbf{"step": 1}\n',
    b'[1, 2]\n', b'{"step": 1}{"step": 2}\n', b'\n'])
def test_a_damaged_log_does_not_stop_a_run(open_log, tmp_path, damage):
    """A row that is none stays as it is, and so do its neighbours; rows past the checkpoint are
    still cut."""
    rows = b'{"step": 1}\n' + damage + b'{"step": 2}\n'
    (tmp_path / 'log.jsonl').write_bytes(rows + b'{"step": 3}\n')
    open_log(at(2, rows.count(b'\n')))
    assert (tmp_path / 'log.jsonl').read_bytes() == b'{"step": 1}\n' + damage + b'{"step": 2}\n'


def test_a_log_that_is_cut_short_gets_whole_rows(open_log, tmp_path):
    """A power cut, or an editor, may take the end of the last row: the next one begins a line."""
    (tmp_path / 'log.jsonl').write_text('{"step": 1}\n{"step": 2')
    open_log(at(2, 2)).write({'step': 3})
    assert (tmp_path / 'log.jsonl').read_text() == '{"step": 1}\n{"step": 2\n{"step": 3}\n'


def test_an_ascii_terminal_shows_what_it_can(monkeypatch):
    """A sample with an umlaut on a terminal that knows ASCII alone is no error."""
    shown = io.TextIOWrapper(io.BytesIO(), 'ascii')
    monkeypatch.setattr(sys, 'stdout', shown)
    monkeypatch.setattr(sys, 'argv', ['train_sft.py'])
    run_cli(lambda cfg: print('stra\xdfe', flush=True), train_sft.Config)
    assert shown.buffer.getvalue() == b'stra\\xdfe\n'


def test_a_closed_pipe_is_one_line():
    """`python train_sft.py | head -1`: one line, and none from Python as it ends."""
    code = ('import sys, prefgpt, train_sft\nsys.argv = ["train_sft.py"]\n'
            'prefgpt.run_cli(lambda cfg: [print("x" * 9999, flush=True) for _ in range(99)], '
            'train_sft.Config)')
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, '-c', code], stdout=write, stderr=subprocess.PIPE,
                          cwd=ROOT, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, 'error: [Errno 32] Broken pipe\n')


def test_a_clock_that_stands_still_and_a_script_without_docstring(config, monkeypatch, capsys):
    """A coarse clock gives a step of 0 seconds, and python -OO no docstring."""
    monkeypatch.setattr(time, 'time', lambda: 1e9)
    train_sft.main(config('sft', steps=1))
    monkeypatch.setattr(train_sft, '__doc__', None)
    with pytest.raises(SystemExit) as end:
        parse_config(train_sft.Config, ['--help'])
    assert end.value.code == 0 and '--lr' in capsys.readouterr().out


# ----------------------------------------------------------------------------- I: weights

def test_weights_that_are_not_finite_are_refused_where_they_are_read(random_run, tmp_path):
    """A nan in a file would come out as text of NULs, or as an export that others trust."""
    saved = torch.load(random_run / 'ckpt.pt', weights_only=True)
    saved['weights']['policy']['wpe.weight'][3, 2] = math.inf
    torch.save(saved, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match='ckpt.pt: some of its weights are not finite'):
        load_checkpoint(tmp_path, ['sft'])


# ----------------------------------------------------------------------------- fuzz.py, kills.py

def test_mutated_files_are_read_or_refused(tmp_path):
    """The short form of tests/fuzz.py: eight mutants of each kind, none a fault."""
    table, faults = fuzz.fuzz(64, tmp_path)
    assert faults == [] and all(counts.total() == 8 for counts in table.values())


def test_killed_runs_end_as_others_do():
    """I22: the short form of tests/kills.py: one kill in each stage."""
    threads = torch.get_num_threads()
    try:
        kills_in_all, _, compared = kills.main(4)
    finally:
        torch.set_num_threads(threads)
    assert kills_in_all == 4 and compared >= 4


def test_the_fuzzer_notices(tmp_path, monkeypatch):
    """A reader that fails otherwise than by UserError, or reads something else, is a fault."""
    read = load_checkpoint
    monkeypatch.setattr(fuzz, 'load_checkpoint', lambda *arguments: {**read(*arguments), 'id': 0})
    monkeypatch.setattr(fuzz, 'load_text', lambda *arguments: {}['text'])
    table, faults = fuzz.fuzz(60, tmp_path, kinds=['tokenizers', 'checkpoints'])
    assert sum("KeyError" in fault for fault in faults) == 30
    monkeypatch.setattr(fuzz, 'read_by_hand', lambda path: {})
    table, faults = fuzz.fuzz(30, tmp_path / 'again', kinds=['safetensors'])
    assert table['safetensors']['faults'] == len(faults) > 0 == table['safetensors']['read']
