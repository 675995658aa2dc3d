"""
Kills runs of all four stages by SIGKILL, at random moments or inside a save, resumes them until
they are finished, and compares all that they leave with a run that nobody disturbed: every tensor's
bytes, every other value, and the log but for its clock.

    python tests/kills.py 100               # so many kills in all: minutes

Prints a table; the exit status is 1 if anything differs, or a checkpoint cannot be read after a
kill. The moments are drawn, but what a run does at that moment depends on the machine. Left out:
power cuts, where the system forgets what was written.
"""
import contextlib, functools, os, signal, sys, tempfile, time
from pathlib import Path
from random import Random

TOP = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TOP), str(TOP / 'tests')]

import torch
from conftest import STAGES, contents, known, log_rows, save_tiny_run, write_toy_data

from prefgpt import load_checkpoint

SLOW = 0.02         # seconds that each system call of a save takes, where a kill is to hit a save


def start(stage, cfg, slow=0.0):
    """Starts a run in a child process, which has imported everything already; returns its id."""
    def slowly(call, *arguments):
        time.sleep(slow)
        return call(*arguments)
    if child := os.fork():
        return child
    try:
        for name in ('fsync', 'link', 'replace'):       # what save_checkpoint calls, in this order
            setattr(os, name, functools.partial(slowly, getattr(os, name)))
        with contextlib.redirect_stdout(open(os.devnull, 'w')):
            STAGES[stage].main(cfg)
        os._exit(0)
    except Exception as error:
        print(f'{stage}: {type(error).__name__}: {error}', file=sys.stderr)
    finally:
        os._exit(1)


def kill(child, out, moment, inside):
    """
    Kills the child after a moment; if inside, the moment begins with its next save. Returns whether
    it was killed, not finished, and whether that was inside a save.
    """
    def half():
        """Returns when the unfinished file was written to last; an older kill may have left it."""
        with contextlib.suppress(FileNotFoundError):
            return (out / 'ckpt.tmp').stat().st_mtime_ns
    before, ended = half(), os.WEXITED | os.WNOHANG | os.WNOWAIT
    while inside and half() in (None, before) and not os.waitid(os.P_PID, child, ended):
        time.sleep(0.001)
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)              # one that has ended feels nothing
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f'{out}: the run failed by itself, status {status}'
    return status == signal.SIGKILL, half() not in (None, before)


def finish(stage, cfg):
    """Lets a run go on to its end."""
    status = os.waitpid(start(stage, cfg), 0)[1]
    assert status == 0, f'{cfg.out}: a run that was not killed ends with status {status}'


def left_by(stage, out):
    """Returns all that a finished run leaves, but for the clock and its own path."""
    saved = [load_checkpoint(out / name, [stage]) for name in ('ckpt.pt', 'ckpt.prev.pt')]
    for each in saved:
        del each['config']['out'], each['config']['resume']
    return contents(saved), log_rows(out), sorted(path.name for path in out.iterdir())


def kill_stage(stage, cfg, kills, rng):
    """Kills a stage so many times; returns kills, those inside a save, runs that were compared."""
    top, began = Path(cfg.out).parent, time.time()
    with contextlib.redirect_stdout(open(os.devnull, 'w')):
        STAGES[stage].main(cfg)                 # here: the children have then loaded what it needs
    whole, seconds, counts = left_by(stage, Path(cfg.out)), time.time() - began, [0, 0, 0]
    while counts[0] < kills:
        cfg.out, cfg.resume, killed = f'{top}/{stage}-{counts[2]}', True, True
        out = Path(cfg.out)
        while killed and counts[0] < kills:
            inside = rng.random() < 0.5
            child = start(stage, cfg, SLOW * inside)
            moment = rng.random() * (4 * SLOW if inside else seconds)
            killed, in_a_save = kill(child, out, moment, inside)
            counts[0] += killed
            counts[1] += in_a_save
            for path in out.glob('ckpt*.pt'):
                load_checkpoint(path, [stage])
        finish(stage, cfg)
        assert left_by(stage, out) == whole, f'{stage}: {out} is not as without kills'
        counts[2] += 1
    return counts


def main(total, seed=0):
    """Prints kills, kills inside a save and finished runs by stage; returns their sums."""
    began, sums = time.time(), [0, 0, 0]
    torch.set_num_threads(1)                    # a thread pool does not survive a fork
    print(f'{"stage":6}{"kills":>8}{"inside a save":>15}{"runs compared":>15}')
    with tempfile.TemporaryDirectory() as name:
        data, init = write_toy_data(Path(name, 'data')), save_tiny_run(
            Path(name, 'init'), Path(name, 'data'))
        options = dict(data=str(data), init=str(init), reward=f'{name}/rm', steps=8, batch_size=8,
                       rollout_size=16, eval_every=2, max_new_tokens=4, ref_ema=0.1, device='cpu')
        for stage, module in STAGES.items():
            cfg = module.Config(out=f'{name}/{stage}', **known(module.Config, options))
            counts = kill_stage(stage, cfg, total // len(STAGES), Random(f'{stage} {seed}'))
            print(f'{stage:6}{counts[0]:8}{counts[1]:15}{counts[2]:15}', flush=True)
            sums = [a + b for a, b in zip(sums, counts)]
    print(f'{"all":6}{sums[0]:8}{sums[1]:15}{sums[2]:15}')
    print(f'0 differences, 0 checkpoints that cannot be read, {(time.time() - began) / 60:.1f} '
          'minutes')
    return sums


if __name__ == '__main__':
    main(int(sys.argv[1]))
