"""tools/rate.py: every number against a loop over the pairs, scored one by one."""
import json, math

import pytest
import torch
from conftest import EOS, write_jsonl

import tools.evaluate
from data.text import DataError, load_rows
from prefgpt import ScalarGPT, UserError, load_checkpoint, load_model
from tools import rate

# A judge that often agrees with the labels, ties all answers to 'do', and else likes length
JUDGE = '''
def score(prompt, response):
    return {'reward': 2.0 * ('!' in response) if 'now' in prompt else
            0.0 if 'do' in prompt else float(len(response))}
'''


@pytest.fixture
def margins(rm_run, tiny_data):
    """Of each held-out pair, in order: score of the chosen side minus that of the rejected one."""
    saved = load_checkpoint(rm_run, ['rm'])
    model = load_model(ScalarGPT, saved, 'reward_model', 'cpu')

    def score(prompt, response):
        with torch.no_grad():
            return model(torch.tensor([[*(prompt + response).encode(), EOS]]))[0, -1].item()
    return [score(row['prompt'], row['chosen']) - score(row['prompt'], row['rejected'])
            for row in load_rows(tiny_data / 'val.pairs.jsonl', 'pairs')]


def check_calibration(table, margins):
    """Compares the bins of a calibration table with loops; returns the expected error."""
    bins = [[] for _ in range(5)]
    for margin in margins:
        p = 1 / (1 + math.exp(-abs(margin)))
        bins[min(4, int((p - 0.5) * 10))].append((p, margin > 0))
    assert [each['n'] for each in table] == [len(pairs) for pairs in bins if pairs]
    for each, pairs in zip(table, filter(None, bins)):
        assert each['predicted'] == pytest.approx(sum(p for p, _ in pairs) / len(pairs), abs=1e-6)
        assert each['right'] == pytest.approx(sum(r for _, r in pairs) / len(pairs))
    return sum(abs(sum(p - r for p, r in pairs)) for pairs in bins) / len(margins)


def test_tables_against_loops(rm_run, tiny_data, margins, capsys):
    """Accuracy, loss, ceiling and agreement of all pairs, by a key, and in bins; a key's values are
    there by their number; what the training logged is the same."""
    rows = load_rows(tiny_data / 'val.pairs.jsonl', 'pairs')
    for i, row in enumerate(rows):
        row['kind'] = 'ab'[i % 3 == 1]
    write_jsonl(tiny_data / 'val.pairs.jsonl', rows)
    (tiny_data / 'reward.py').write_text(JUDGE)
    tables = rate.main(rate.Config(runs=(str(rm_run),), data=str(tiny_data), by='kind',
                                   batch_size=7, device='cpu'))
    run, judge = str(rm_run), {}
    exec(JUDGE, judge)
    gaps = [judge['score'](row['prompt'], row['chosen'])['reward']
            - judge['score'](row['prompt'], row['rejected'])['reward'] for row in rows]
    assert list(tables) == ['all pairs', 'by kind', f'calibration of {run}']

    [row], n = tables['all pairs'], len(rows)
    right = [margin > 0 for margin in margins]
    assert row['accuracy'] == pytest.approx(sum(right) / n) == pytest.approx(
        load_checkpoint(rm_run, ['rm'])['metrics']['accuracy'])
    assert row['accuracy_se'] == pytest.approx(math.sqrt(sum(right) * (n - sum(right)) / n ** 3))
    assert row['loss'] == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in margins) / n,
                                        abs=1e-5)
    points = [1 if gap > 0 else 0.5 if gap == 0 else 0 for gap in gaps]
    assert row['ceiling'] == pytest.approx(sum(points) / n) and 0.5 in points and 0 in points
    clear = [(gap > 0) == (margin > 0) for gap, margin in zip(gaps, margins) if gap]
    assert row['like judge'] == pytest.approx(sum(clear) / len(clear)) and len(clear) < n

    assert [each['kind'] for each in tables['by kind']] == ['a', 'b']
    for each in tables['by kind']:
        here = [i for i in range(n) if rows[i]['kind'] == each['kind']]
        assert each == {'kind': each['kind'], 'n': len(here),
                        'ceiling': pytest.approx(sum(points[i] for i in here) / len(here)),
                        run: pytest.approx(sum(right[i] for i in here) / len(here))}

    distance = check_calibration(tables[f'calibration of {run}'], margins)
    assert row['ece'] == pytest.approx(distance, abs=1e-6)
    assert f"{row['accuracy']:.3f} ±{row['accuracy_se']:.3f}" in capsys.readouterr().out


def test_calibration_by_hand():
    """Margins of ±ln 3 are 3 in 4; empty bins are left out, and certainty is in the last one."""
    rows = rate.calibration(torch.tensor([math.log(3), math.log(3), -math.log(3), 0.0, 99.0]))
    assert [(row['probability'], row['n'], round(row['predicted'], 6), round(row['right'], 6))
            for row in rows] == [('0.5 to 0.6', 1, 0.5, 0.0), ('0.7 to 0.8', 3, 0.75, 0.666667),
                                 ('0.9 to 1.0', 1, 1.0, 1.0)]


def test_a_file_of_pairs_is_split_as_in_training(rm_run, tiny_data, tmp_path, capsys):
    """Held out are the pairs that a training on this file would hold out; without a judge there is
    no ceiling; a key that no row has is one kind; a pair that the block cuts to equals is left out.
    """
    rows = [json.loads(line) for line in
            (tiny_data / 'train.pairs.jsonl').read_text().splitlines()]
    alike = {'prompt': rows[0]['prompt'], 'chosen': 'a' * 40 + 'b', 'rejected': 'a' * 40 + 'c'}
    write_jsonl(tiny_data / 'val.pairs.jsonl', [*rows[:3], alike])
    tables = rate.main(rate.Config(runs=(str(rm_run),), data=str(tiny_data), by='edit',
                                   device='cpu'))
    assert '3 of 4 held-out pairs kept' in capsys.readouterr().out
    [row] = tables['by edit']
    assert list(row) == ['edit', 'n', str(rm_run)] and row['edit'] == '-' and row['n'] == 3
    assert 'ceiling' not in tables['all pairs'][0]
    path = write_jsonl(tmp_path / 'pairs.jsonl', rows)
    rate.main(rate.Config(runs=(str(rm_run),), data=str(path), device='cpu'))
    kept, total = capsys.readouterr().out.split(f'{path}: ')[1].split(' held-out')[0].split(' of ')
    assert kept == total and 0 < int(total) < len(rows) / 2


def test_values_of_a_key_are_one_line_of_plain_text():
    """They come from the data: line breaks would end the row, escapes would reach the terminal."""
    rows = [{'key': 'a\n\x1b[31mb'}, {'key': ['c', 1]}, {'key': None}]
    assert [row['key'] for row in rate.by_kind('key', rows, {})] == [
        'a \ufffd[31mb', "['c', 1]", 'None']


def test_pairs_that_are_all_equal_and_runs_that_do_not_go_together_are_refused(
        rm_run, tiny_data, tmp_path):
    """Equal once they are cut to the block; another template, which only a file lets through."""
    alike = {'prompt': 'user: say a:', 'chosen': 'a' * 40 + 'b', 'rejected': 'a' * 40 + 'c'}
    write_jsonl(tiny_data / 'val.pairs.jsonl', [alike] * 2)
    with pytest.raises(DataError, match='in each pair both sides are equal, cut to 32 tokens'):
        rate.main(rate.Config(runs=(str(rm_run),), data=str(tiny_data), device='cpu'))
    other = torch.load(rm_run / 'ckpt.pt', weights_only=True) | {'template': 'q: {}'}
    torch.save(other, tmp_path / 'other.pt')
    with pytest.raises(UserError, match='different tokenizers or templates'):
        rate.main(rate.Config(runs=(str(rm_run), str(tmp_path / 'other.pt')), device='cpu',
                              data=str(tiny_data / 'train.pairs.jsonl')))


def test_wrong_runs_are_told(sft_run, rm_run):
    """No run, a policy; and tools.evaluate names this tool when it is given a reward model."""
    for runs, message in (((), 'at least one'), ((str(sft_run),), 'its stage is sft, not rm')):
        with pytest.raises(UserError, match=message):
            rate.main(rate.Config(runs=runs))
    with pytest.raises(UserError, match=f'is a reward model: python -m tools.rate {rm_run}'):
        tools.evaluate.main(tools.evaluate.Config(runs=(str(sft_run), str(rm_run))))
