"""studies/curves.py: logs to numbers, from logs written by hand, and numbers to a picture.

    python -m pytest -q tests/studies/test_curves.py        # the picture: pip install matplotlib
"""
import json

import pytest

import train_dpo, train_ppo
from data.text import DataError
from prefgpt import UserError
from studies import curves
from studies.curves import (STAGES, Config, draw, draw_alone, draw_front, read_curves, read_runs,
                            running_mean, stage_of, y_limits)
from studies.table import RESULTS, append_rows

CLOCK = dict(lr=1e-3, ms=20.0, tok_per_s=1e4)
ROWS = {    # a step of each stage, at step t
    'SFT': lambda t: dict(loss=7 / t, norm=1.0),
    'reward model': lambda t: dict(loss=0.69, accuracy=0.5, margin=0.1 * t, chosen=0.3 * t,
                                   rejected=0.2 * t, norm=1.0),
    'PPO': lambda t: dict(score=0.1 * t, kl=0.2 * t, entropy=0.5, length=16.0, eos=1.0,
                          ratio=1 + 1e-7 * t, clip_frac=0.0, pg_loss=-0.001, vf_loss=1.0 / t,
                          norm=1.0),
    'DPO': lambda t: dict(loss=0.69, accuracy=0.5, margin=0.1 * t, chosen=-20.0 - t,
                          rejected=-22.0 - 2 * t, norm=1.0)}


def write_run(folder, stage, steps=40, tail='', **evaluation):
    """A run folder, as text, with the log of a stage, an evaluation after every tenth step."""
    rows = []
    for t in range(1, steps + 1):
        rows.append({'step': t, **ROWS[stage](t), **CLOCK})
        if evaluation and t % 10 == 0:
            rows.append({'step': t, **{f'eval_{name}': value * t for name, value
                                       in evaluation.items()}, 'samples': ['say a: aa!']})
    folder.mkdir(parents=True)
    (folder / 'log.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows) + tail)
    return str(folder)


def test_a_log_is_read_metric_by_metric(tmp_path):
    """Steps and evaluations apart; what is not finite, and a last line not whole, are left out."""
    run = write_run(tmp_path / 'sft', 'SFT', steps=20, loss=0.1)
    read = read_curves(f'{run}/log.jsonl')
    assert read['loss'] == (list(range(1, 21)), [7 / t for t in range(1, 21)])
    assert read['eval_loss'] == ([10, 20], [1.0, 2.0])
    assert 'step' not in read and 'samples' not in read
    path = tmp_path / 'log.jsonl'
    path.write_text('{"step": 1, "loss": NaN, "norm": 2.0}\n{"step": 2, "loss": -Infinity}\n'
                    '{"step": 3, "loss": 0.5, "norm": null}\n{"step": 4, "loss": 0.')
    assert read_curves(path) == {'norm': ([1], [2.0]), 'loss': ([3], [0.5])}


@pytest.mark.parametrize('line', ['{"step": 2, "lo', '{"loss": 1.0}', '[1, 2]', '7'])
def test_a_broken_line_that_is_not_the_last_is_named(tmp_path, line):
    """Not JSON, no step, not a dict."""
    path = tmp_path / 'log.jsonl'
    path.write_text(f'{{"step": 1, "loss": 1.0}}\n{line}\n{{"step": 3, "loss": 1.0}}\n')
    with pytest.raises(DataError, match=r'log\.jsonl:2: not a row'):
        read_curves(path)


@pytest.mark.parametrize('stage', STAGES)
@pytest.mark.parametrize('steps', [1, 40])
def test_the_stage_is_told_by_the_log(tmp_path, stage, steps):
    """Even after a single step."""
    run = write_run(tmp_path / 'run', stage, steps)
    assert stage_of(read_curves(f'{run}/log.jsonl')) == stage


def test_every_metric_that_is_logged_has_a_panel(shared_data, sft_run, rm_run, tmp_path):
    """Stage by stage what the scripts log, evaluations too, but for clocks and learning rate."""
    (tmp_path / 'judge.py').write_text('def score(prompt, response):\n    return {"reward": 1.0}\n')
    common = dict(data=str(shared_data), init=str(sft_run), steps=1, max_new_tokens=4, device='cpu')
    train_ppo.main(train_ppo.Config(out=f'{tmp_path}/ppo', reward=str(rm_run), rollout_size=8,
                                    judge=f'{tmp_path}/judge.py', **common))
    train_dpo.main(train_dpo.Config(out=f'{tmp_path}/dpo', **common))
    runs = (sft_run, rm_run, tmp_path / 'ppo', tmp_path / 'dpo')
    for run, panels in zip(runs, STAGES.values(), strict=True):
        logged = {name.removeprefix('eval_') for name in read_curves(run / 'log.jsonl')}
        assert {metric for metrics, *_ in panels for metric in metrics} == logged - CLOCK.keys()


def test_running_mean():
    """Over the values around each one; at the ends over those there are."""
    for window, expected in ((1, [0, 3, 6, 6]), (2, [0, 1.5, 4.5, 6]), (3, [1.5, 3, 5, 6])):
        assert running_mean([0.0, 3.0, 6.0, 6.0], window).tolist() == expected


def test_y_limits():
    """Evaluations stay, a spike does not, and rounding is a flat line."""
    steps = [0.4, 0.5, 0.6] * 30
    low, high = y_limits([*steps, 7.0], [0.45])
    assert 0.3 < low < 0.4 and 0.6 < high < 0.7
    assert y_limits(steps, [2.0])[1] > 2.0
    assert y_limits([], [1.0, 2.0])[1] > 2.0                            # evaluations alone
    low, high = y_limits([1 - 1e-6, 1 + 1e-6], [])
    assert low == pytest.approx(0.99, abs=1e-3) and high == pytest.approx(1.01, abs=1e-3)
    low, high = y_limits([0.0, 0.0], [])
    assert low < 0 < high


@pytest.fixture
def matplotlib():
    """The one package that is not required: pip install matplotlib, or these tests are skipped."""
    return pytest.importorskip('matplotlib')


def panels_of(figure):
    """{title: axes} of the panels of a figure."""
    return {ax.get_title(loc='left'): ax for ax in figure.axes if ax.axison}


def test_runs_of_all_stages_make_one_png(tmp_path, matplotlib, capsys):
    """Two SFT runs, one of them one step old; the picture's folder is made, no other file left."""
    runs = [write_run(tmp_path / name, stage, steps, tail='{"step": 41, "lo')
            for name, stage, steps in [('ppo', 'PPO', 40), ('new', 'SFT', 1), ('sft', 'SFT', 40),
                                       ('dpo', 'DPO', 40), ('rm', 'reward model', 40)]]
    out = tmp_path / 'pictures' / 'curves.png'
    stages = curves.main(Config(runs=tuple(runs), out=str(out)))
    assert list(stages) == list(STAGES) and list(stages['SFT']) == runs[1:3]
    assert out.read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
    assert [path.name for path in out.parent.iterdir()] == ['curves.png']
    assert capsys.readouterr().out == f'wrote {out}\n'


def test_score_and_gold_have_panels_of_their_own_and_clocks_have_none(tmp_path, matplotlib):
    """Without a judge there is no gold; kl and kl_sft share a panel, the second one dashed."""
    run = write_run(tmp_path / 'plain', 'PPO')
    assert list(panels_of(draw(read_runs([run]))))[:2] == ['score', 'kl']
    run = write_run(tmp_path / 'ppo', 'PPO', score=0.1, gold=-0.1, kl_sft=0.3)
    panels = panels_of(draw(read_runs([run])))
    assert list(panels) == ['score', 'gold', 'gold over kl_sft', 'kl ━━  kl_sft ╍╍', 'entropy',
                            'length', 'eos', 'ratio', 'clip_frac', 'pg_loss', 'vf_loss', 'norm']
    (steps, mean, scores), [golds] = panels['score'].lines, panels['gold'].lines
    assert list(scores.get_xdata()) == list(golds.get_xdata()) == [10, 20, 30, 40]
    assert list(golds.get_ydata()) == [-1, -2, -3, -4] and not golds.is_dashed()
    assert list(mean.get_ydata()) == pytest.approx(running_mean(steps.get_ydata(), 2))
    *_, kl_sft = panels['kl ━━  kl_sft ╍╍'].lines
    assert list(kl_sft.get_ydata()) == [3, 6, 9, 12] and kl_sft.is_dashed()
    path, end = panels['gold over kl_sft'].lines
    assert list(path.get_xdata()) == [3, 6, 9, 12] and list(path.get_ydata()) == [-1, -2, -3, -4]
    assert (end.get_xdata(), end.get_ydata()) == ([12], [-4])


def test_one_panel_alone_is_an_svg(tmp_path, matplotlib, monkeypatch, capsys):
    """The same lines as in the whole picture; runs without a judge have no path; a name that is no
    panel, or one of two stages, is told."""
    runs = [write_run(tmp_path / 'ppo', 'PPO', score=0.1, gold=-0.1, kl_sft=0.3),
            write_run(tmp_path / 'plain', 'PPO'), write_run(tmp_path / 'sft', 'SFT'),
            write_run(tmp_path / 'dpo', 'DPO')]
    curves.main(Config(runs=tuple(runs), panel='gold-over-kl_sft', out=f'{tmp_path}/new/gold.svg'))
    text = (tmp_path / 'new' / 'gold.svg').read_text()
    assert text.startswith('<?xml') and '<svg' in text
    stages = read_runs(runs)
    [ax] = draw_alone(stages, 'score').axes
    assert [len(line.get_xdata()) for line in ax.lines] == [40, 40, 4, 40, 40, 0, 0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == runs[:2]
    with pytest.raises(UserError, match='--panel=loss is one of SFT, DPO: name the runs of one'):
        draw_alone(stages, 'loss')
    with pytest.raises(UserError, match='--panel=mist: one of loss, norm, score, gold, gold-over-'):
        draw_alone(stages, 'mist')
    monkeypatch.chdir(tmp_path)
    curves.main(Config(runs=(runs[2],), panel='loss'))
    assert capsys.readouterr().out.endswith('wrote out/studies/loss.svg\n')


def test_runs_of_a_stage_share_panels_and_are_named(tmp_path, matplotlib):
    """A colour each, named in the legend over the panels."""
    runs = [write_run(tmp_path / name, 'SFT') for name in 'ab']
    head, loss, norm = draw(read_runs(runs)).axes
    assert head.get_title(loc='left') == 'SFT'
    assert [text.get_text() for text in head.get_legend().get_texts()] == runs
    assert len({line.get_color() for line in loss.lines}) == 2


def test_the_front_picture_shows_three_stages_and_their_result(tmp_path, matplotlib, monkeypatch):
    """Held-out accuracy, score beside gold, and seed by seed the rewards at T=1 with their mean."""
    monkeypatch.chdir(tmp_path)
    for stage, name, evaluation in (('SFT', 'sft', dict(loss=0.1)),
                                    ('reward model', 'rm', dict(accuracy=0.02)),
                                    ('PPO', 'ppo', dict(score=0.1, gold=0.05))):
        write_run(tmp_path / 'out/toy' / name, stage, **evaluation)
    rows = [dict(seed=seed, answers=answers, stage=stage, reward=seed + reward + more)
            for seed in (5, 7) for answers, more in (('T=1', 0), ('greedy', 9))
            for stage, reward in (('sft', -6.0), ('dpo', 0.5), ('ppo', 1.0))]
    append_rows(RESULTS / 'toy.csv', rows)
    stages = curves.main(Config(front=True, out='front.png'))
    assert (tmp_path / 'front.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
    sft, rm, ppo, result, gold = draw_front(stages).axes
    assert list(sft.lines[2].get_ydata()) == [1, 2, 3, 4]
    assert list(rm.lines[2].get_ydata()) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    [held_out], [golds] = ppo.lines[2:], gold.lines
    assert list(held_out.get_ydata()) == [1, 2, 3, 4]
    assert list(golds.get_ydata()) == [0.5, 1, 1.5, 2]
    assert gold.yaxis.get_ticks_position() == 'right'       # another unit, another axis
    assert [text.get_text() for text in ppo.get_legend().get_texts()] == [
        'score, training', 'score, held out', 'gold: exact judge']
    assert [text.get_text() for text in result.get_xticklabels()] == ['SFT', 'PPO', 'DPO']
    assert [bar.get_height() for bar in result.patches] == [0, 7, 6.5]
    assert [list(line.get_ydata()) for line in result.lines[:3]] == [[-1, 1], [6, 8], [5.5, 7.5]]


def test_what_cannot_be_drawn_is_refused(monkeypatch, tmp_path):
    """No matplotlib first, flags next; then a run without a log or a step, and too many runs."""
    def refused(message, *runs, **flags):
        with pytest.raises(UserError, match=message):
            curves.main(Config(runs=runs, **flags))
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    refused('pip install matplotlib')
    monkeypatch.setattr('importlib.util.find_spec', lambda name: name)      # none is needed here
    refused('name at least one run folder')
    refused('or --front without any', 'nowhere', front=True)
    refused(r'--out=curves\.pdf: name a file that ends in \.png or \.svg', 'nowhere',
            out='curves.pdf')
    refused('or --front without any', front=True, panel='loss')
    refused('nowhere: no log.jsonl there; name the --out', 'nowhere')
    refused('begun/log.jsonl: no step in it yet',
            write_run(tmp_path / 'begun', 'SFT', steps=0, tail='{"step": 1'))
    refused('8 runs of DPO: more than 7 cannot be told apart',
            *(write_run(tmp_path / str(i), 'DPO', steps=1) for i in range(8)))
