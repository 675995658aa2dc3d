"""tools/pairs.py on tiny runs: the scored samples and the pairs that it writes."""
import json, os
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import EOS, save_tiny_run, write_jsonl

import train_dpo
from data.text import load_rows
from prefgpt import (GPT, ScalarGPT, UserError, generate, load_checkpoint, load_model, make_batch,
                     rng)
from tools import pairs, sample
from tools.pairs import Config, make_pair

HELD_OUT = ['now say a:', 'do b:', 'say d:', 'now say e:', 'do f:', 'say h:']     # conftest's

# Likes '!', dislikes length, so that samples differ and ties occur
JUDGE = '''
def score(prompt, response):
    return {'reward': 2.0 * response.count('!') - 0.5 * len(response)}
'''


@pytest.fixture
def run(sft_run):
    """A run folder as on the command line: it has learned to say a letter and to end."""
    return str(sft_run)


@pytest.fixture
def judge(tmp_path):
    """A reward.py as on the command line."""
    (tmp_path / 'reward.py').write_text(JUDGE)
    return str(tmp_path / 'reward.py')


@pytest.fixture
def write(run, judge, tmp_path):
    """write(out, ...) -> the summary of main and the rows it wrote, few short responses."""
    def write(out='out.jsonl', **changes):
        out = tmp_path / out
        summary = pairs.main(Config(**{**dict(runs=(run,), out=str(out), reward=judge, device='cpu',
                                              max_new_tokens=8, temperature=1.0), **changes}))
        return summary, [json.loads(line) for line in out.read_text().splitlines()]
    return write


@pytest.mark.parametrize('changes, words', [
    (dict(runs=()), '0 run folders.*name one'), (dict(runs=('a', 'b')), '2 run folders'),
    (dict(out=''), '--out=,'), (dict(reward=''), '--reward=:'),
    (dict(pairs=True), '--n=1.*--pairs.*--n=2'), (dict(n=4), '--n=4.*--temperature=1'),
    (dict(split='test'), '--split=test.*val'), (dict(out='reward.py'), 'py is there.*remove'),
    (dict(prompts=-1), '--prompts=-1'), (dict(data='nowhere'), 'nowhere'),
    (dict(max_new_tokens=32), 'lower --max_new_tokens'), (dict(reward='RUN'), 'is sft, not rm')])
def test_what_cannot_work_is_named(run, judge, tmp_path, monkeypatch, changes, words):
    """An error names the flag and what to do, before anything is sampled; nothing is written."""
    monkeypatch.chdir(tmp_path)
    flags = {'runs': (run,), 'out': 'out.jsonl', 'reward': judge, **changes}
    with pytest.raises(UserError, match=words):
        pairs.main(Config(**{**flags, 'reward': flags['reward'].replace('RUN', run)}))
    assert os.listdir(tmp_path) == ['reward.py'] and Path(judge).read_text() == JUDGE


def test_empty_responses_are_not_written(write, monkeypatch, tmp_path):
    """EOS at once has a score, but train_sft.py could not read such a row: left out, and
    counted."""
    texts = iter([b'', b'aa', b'', b'!'])

    def generate_text(policy, prompts, *arguments):
        tokens, _, _, mask = make_batch([(list(prompt), [*next(texts), EOS]) for prompt in prompts])
        return tokens, mask
    monkeypatch.setattr(sample, 'generate', generate_text)
    summary, rows = write(split='val', prompts=2, n=2)
    assert [row['completion'] for row in rows] == ['aa', '!']
    assert summary['rows'] == 2 and summary['dropped'] == {'empty response': 2}
    assert len(load_rows(tmp_path / 'out.jsonl', 'sft')) == 2


def samples_by_hand(run, prompts, n, max_new_tokens, seed=0):
    """(prompt, ids of the response) of n samples of each prompt, from one call of generate."""
    policy = load_model(GPT, load_checkpoint(run, ['sft']), 'policy', 'cpu')
    asked = [prompt for prompt in prompts for _ in range(n)]
    tokens, mask = generate(policy, [list(prompt.encode()) for prompt in asked], max_new_tokens,
                            EOS, 1.0, rng(seed, 0, 'eval'))
    return [(prompt, [i for i, real in zip(row[1:].tolist(), real_row.tolist()) if real])
            for prompt, row, real_row in zip(asked, tokens, mask)]


def test_rows_hold_the_samples_their_scores_and_marks(run, write, tmp_path, capsys):
    """Against one call of generate, the judge's formula by hand and a search for EOS in the ids."""
    out = tmp_path / 'new' / 'folder' / 'samples.jsonl'
    summary, rows = write(out, split='val', n=4, seed=5, max_new_tokens=4)
    expected = []
    for prompt, ids in samples_by_hand(run, HELD_OUT, 4, 4, seed=5):
        text = bytes(i for i in ids if i != EOS).decode(errors='replace')
        row = {'prompt': prompt, 'completion': text, 'score': 2 * text.count('!') - len(text) / 2}
        expected.append(row if EOS in ids else {**row, 'completion_cut': True})
    assert rows == expected and os.listdir(out.parent) == ['samples.jsonl']
    assert 0 < sum('completion_cut' in row for row in expected) < 24

    scores = [row['score'] for row in expected]
    best = [max(scores[i:i + 4]) for i in range(0, 24, 4)]
    assert summary == {'rows': 24, 'dropped': {}, 'score': pytest.approx(sum(scores) / 24),
                       'best': pytest.approx(sum(best) / 6)}
    assert (f'24 rows of 6 prompts | score {sum(scores) / 24:.3f} | best of 4 {sum(best) / 6:.3f}'
            in capsys.readouterr().out)
    # What was written can be trained on: the marks are read, and say that no EOS follows
    assert load_rows(out, 'sft') == [{key: value for key, value in row.items() if key != 'score'}
                                     for row in expected]


def test_scores_of_a_reward_model_are_its_number_at_the_last_token(run, rm_run, write):
    """Against the reward model on each row alone, without padding; in bfloat16 they are numbers."""
    _, rows = write(split='val', n=3, reward=str(rm_run), max_new_tokens=4, batch_size=2)
    saved = load_checkpoint(rm_run, ['rm'])
    model = load_model(ScalarGPT, saved, 'reward_model', 'cpu')
    with torch.no_grad():
        for row, (prompt, ids) in zip(rows, samples_by_hand(run, HELD_OUT, 3, 4), strict=True):
            number = model(torch.tensor([[*prompt.encode(), *ids]]))[0, -1] - saved['shift']
            assert row['score'] == pytest.approx(number.item(), abs=1e-5)
    assert len({row['score'] for row in rows}) > 3
    _, rows = write('bf16.jsonl', reward=str(rm_run), dtype='bfloat16', prompts=2)
    assert all(abs(row['score']) < 100 for row in rows)


def test_samples_do_not_depend_on_the_batch_size(write):
    """All prompts at once, by 2 or one by one: the same rows."""
    one, two, all_of_them = (write(f'{batch_size}.jsonl', n=3, batch_size=batch_size)
                             for batch_size in (1, 2, 100))
    assert one == two == all_of_them


def test_the_training_prompts_are_answered_unless_told_otherwise(write):
    """All different training prompts of the run's data: pairs of held-out prompts, trained on,
    would make every later evaluation a lie. --split, --prompts and --prompt change it."""
    def prompts_of(out, **changes):
        return [row['prompt'] for row in write(out, max_new_tokens=2, **changes)[1]]
    prompts = prompts_of('all')
    assert len(prompts) == len(set(prompts)) == 18 and not set(prompts) & set(HELD_OUT)
    assert prompts_of('five', prompts=5) == prompts[:5]
    assert prompts_of('val', split='val') == HELD_OUT
    assert prompts_of('hi', prompt='hi', n=2) == ['user: hi'] * 2


@pytest.mark.parametrize('fault', ['raise RuntimeError', "return {'reward': float('nan')}"])
def test_nothing_half_written_is_left(write, tmp_path, fault):
    """A judge that fails on the second batch, or says NaN: no file, no leftover of the first."""
    (tmp_path / 'bad.py').write_text("def score(prompt, response):\n    if 'b' in prompt:\n"
                                     f"        {fault}\n    return {{'reward': 0.0}}\n")
    with pytest.raises((RuntimeError, UserError)):
        write('new/samples.jsonl', reward=str(tmp_path / 'bad.py'), batch_size=1)
    assert os.listdir(tmp_path / 'new') == []


@pytest.mark.parametrize('samples, expected', [
    ([('a', 1.0), ('b', 3.0), ('c', 2.0)], ('b', 3.0, 'a', 1.0, False)),
    ([('a', -3.0), ('b', 9.0, True)], 'best and worst alike'),          # b is neither
    ([('a', -3.0), ('c', -4.0), ('b', 9.0, True)], ('a', -3.0, 'c', -4.0, False)),
    ([('a', 2.0), ('b', 9.0, True)], ('a', 2.0, 'b', -1.0, True)),      # capped, and so worst
    ([('a', 2.0), ('b', -5.0, True), ('c', 1.0)], ('a', 2.0, 'b', -5.0, True)),
    ([('a', -1.0), ('b', 9.0, True)], 'best and worst alike'),
    ([('a', 5.0, True), ('b', 9.0, True)], 'no response to choose'),
    ([('', 5.0), ('b', 1.0), ('c', 2.0)], ('c', 2.0, 'b', 1.0, False)),  # load_rows refuses ''
    ([('', 0.0), ('b', 1.0)], ('b', 1.0, '', 0.0, False)),
    ([('', 5.0), ('b', 9.0, True)], 'no response to choose'),
    ([('a', 1.0), ('b', 1.0)], 'best and worst alike'),
    ([('a', 2.0), ('a', 9.0, True)], 'best and worst alike')])          # one text, two scores
def test_a_pair_by_hand(samples, expected):
    """Every rule of what is chosen, rejected and dropped, one by one."""
    dropped = Counter()
    pair = make_pair([{'prompt': 'P', 'completion': text, 'score': score,
                       **({'completion_cut': True} if cut else {})}
                      for text, score, *cut in samples],
                     -1.0, dropped)
    if isinstance(expected, str):
        assert pair is None and dropped == {expected: 1}
        return
    chosen, chosen_score, rejected, rejected_score, cut = expected
    assert not dropped and pair == {
        'prompt': 'P', 'chosen': chosen, 'rejected': rejected, 'chosen_score': chosen_score,
        'rejected_score': rejected_score, **({'rejected_cut': True} if cut else {})}


def test_pairs_are_made_of_the_very_samples(write, capsys):
    """--pairs samples what it would write without, and --no_eos_score reaches the pairs."""
    _, rows = write('samples.jsonl', n=4, max_new_tokens=4)
    for no_eos_score in (-1.0, -100.0):
        summary, written = write(f'{no_eos_score}.jsonl', n=4, max_new_tokens=4, pairs=True,
                                 no_eos_score=no_eos_score)
        dropped = Counter()
        made = [make_pair(rows[i:i + 4], no_eos_score, dropped) for i in range(0, len(rows), 4)]
        assert written == [pair for pair in made if pair]
        assert summary['rows'] == len(written) and summary['dropped'] == dropped
        line = capsys.readouterr().out.splitlines()[-1]
        assert f"{summary['rows']} pairs of 18 prompts" in line
        assert all(f'{count} dropped: {why}' in line for why, count in dropped.items())
    assert any(row.get('rejected_score') == -100 and row['rejected_cut'] for row in written)


def test_no_pair_left_is_an_error(write, judge, tmp_path):
    """A judge that likes all alike: an empty file would fail only in the training after it."""
    Path(judge).write_text("def score(prompt, response):\n    return {'reward': 1.0}\n")
    with pytest.raises(UserError, match='nothing of 18 prompts.*18 dropped: best and worst alike'):
        write(pairs=True, n=3)
    assert os.listdir(tmp_path) == ['reward.py']


def test_iterated_dpo(run, write, shared_data, tmp_path):
    """The loop of the docstring, three rounds on --data's prompts: the judge likes each one
    more."""
    scores = []
    for i in range(3):
        out = str(tmp_path / f'dpo-{i}')
        summary, _ = write(f'{i}.jsonl', runs=(run,), data=str(shared_data), n=6, pairs=True,
                           seed=i)
        assert summary['rows'] + sum(summary['dropped'].values()) == 18
        scores.append(summary['score'])
        train_dpo.main(train_dpo.Config(
            data=str(tmp_path / f'{i}.jsonl'), init=run, out=out, steps=15, batch_size=8, lr=3e-3,
            warmup=2, eval_every=15, max_new_tokens=8, device='cpu'))
        run = out
    assert scores[0] < scores[1] < scores[2]
