"""tools/evaluate.py on tiny runs: every column against a count or a loop of its own.

    python -m pytest -q tests/tools/test_evaluate.py
"""
import json
import math
import statistics

import pytest
import torch
from conftest import EOS, TEMPLATE, save_tiny_run, tiny_scalar

import tools.evaluate
import train_rm
from data.text import load_judge, load_text
from prefgpt import (GPT, ScalarGPT, UserError, generate, load_checkpoint, load_model, rng,
                     save_checkpoint)
from tools.evaluate import (Config, distinct, mean_scores, show_table, standard_error, summarize,
                            win_rate)

# Says what it saw: 'hushed' is left out for prompts that are not loud
JUDGE = '''
def score(prompt, response):
    numbers = {'reward': float(len(response)), 'empty': float(not response)}
    if prompt.startswith('now'):
        numbers['hushed'] = float('!' not in response)
    return numbers
'''
# The longer the better, and so what was cut off is best; and the other way round
LONG = 'def score(prompt, response):\n    return {"reward": float(len(response))}\n'
SHORT = 'def score(prompt, response):\n    return {"reward": -float(len(response))}\n'


def save_tiny_rm(folder, data, shift=0.0, **shape):
    """A run folder with an untrained reward model whose scores are far apart, shifted by shift."""
    tokenizer, text = load_text(data)
    model = tiny_scalar(5, **{**dict(vocab_size=tokenizer.n_vocab), **shape})
    folder.mkdir(parents=True)
    cfg = train_rm.Config(data=str(data), out=str(folder))
    save_checkpoint(folder / 'ckpt.pt', 'rm', 1, cfg, text, {}, {'reward_model': model}, [],
                    shift=shift)
    return str(folder)


@pytest.fixture
def runs(tiny_data, tmp_path, sft_run):
    """
    Two run folders, as text, as on the command line: random weights, on a copy of the data that a
    test may change, and a policy that has learned to end its responses.
    """
    return [str(save_tiny_run(tmp_path / 'random', tiny_data)), str(sft_run)]


def evaluate(runs, **changes):
    """The two tables of main, with few short responses."""
    return tools.evaluate.main(Config(**{**dict(runs=tuple(runs), prompts=8, max_new_tokens=6,
                                                device='cpu'), **changes}))


@pytest.fixture
def samples(monkeypatch):
    """What generate returned, call by call: the responses that the tables are about."""
    calls, generate = [], tools.evaluate.generate

    def generate_and_keep(*arguments, **named):
        calls.append(generate(*arguments, **named))
        return calls[-1]
    monkeypatch.setattr(tools.evaluate, 'generate', generate_and_keep)
    return calls


def responses_of(tokens, response_mask):
    """The responses of a batch, a list of ids each, EOS included, in a plain loop."""
    return [[token for token, real in zip(row[1:].tolist(), mask.tolist()) if real]
            for row, mask in zip(tokens, response_mask)]


def text_of(ids):
    """A response of the byte tokenizer as text, without EOS."""
    return bytes(token for token in ids if token != EOS).decode(errors='replace')


def held_out(data, number):
    """The first so many held-out prompts, as text."""
    lines = (data / 'val.prompts.jsonl').read_text().splitlines()
    return [json.loads(line)['prompt'] for line in lines[:number]]


def score_alone(rm, prompt, ids, shift):
    """A reward model's score of one response: the number at its last token, minus the shift."""
    with torch.no_grad():
        return rm(torch.tensor([[*prompt.encode(), *ids]]))[0, -1].item() - shift


# ----------------------------------------------------------------------------- by hand

def test_distinct_by_hand():
    """(a b), (b c) and again (a b): 2 of 3 pairs differ; pairs do not cross from text to text, and
    a text of one word has none. Words: 3 of the 6 differ."""
    texts = ['a b c', ' a  b\n', 'a', '']
    assert distinct(texts, 2) == pytest.approx(2 / 3)
    assert distinct(texts, 1) == pytest.approx(3 / 6)
    assert distinct(['a a a a'], 2) == pytest.approx(1 / 3)
    assert distinct(['a a a a'], 1) == pytest.approx(1 / 4)
    assert distinct(['a b', 'b a'], 2) == 1
    assert distinct(['one', '', ' '], 2) == 0
    assert distinct([], 1) == distinct([], 2) == 0


def test_mean_scores_averages_over_the_responses_that_have_the_number():
    """A key that the judge gives for two of three prompts is averaged over two: dividing by three
    would make refusals of benign prompts look rarer than they are."""
    means = mean_scores([{'reward': 2}, {'reward': 2, 'refused': 1.0},
                         {'reward': 4, 'refused': 0.0}])
    assert means == {'reward': 8 / 3, 'refused': 0.5}
    assert mean_scores([{}, {}]) == {}


def test_standard_error_by_hand():
    """Of 1, 2, 3, 6: mean 3, squares 4 + 1 + 0 + 9 = 14, std sqrt(14 / 3), over sqrt(4). Dividing
    by n would give sqrt(14 / 16). Equal numbers have none, and one number says nothing."""
    assert standard_error([1, 2, 3, 6]) == pytest.approx(math.sqrt(14 / 3) / 2)
    assert standard_error([0.1] * 7) == 0
    assert standard_error([5.0]) is None
    # Two prompts of two samples: of their means 2 and 4, sqrt(2) / sqrt(2)
    assert standard_error([1, 3, 4, 4], 2) == 1 and standard_error([1, 3], 2) is None


def response(reward, text='', eos=True, kl=0.0):
    """A response as the table is made of, with this reward."""
    return {'text': text, 'eos': eos, 'length': 1, 'kl': kl, 'judged': {'reward': reward}}


def test_win_rate_by_hand():
    """Against 1, 1, 1, 1: 2 wins, 1 ties, 0 loses and 3 wins: (1 + 1/2 + 0 + 1) / 4. The other way
    round it is 1 minus that, which counting ties as losses or as wins would break."""
    first = [response(1.0, text) for text in 'abcd']
    other = [response(reward, text) for reward, text in zip((2.0, 1.0, 0.0, 3.0), 'efgh')]
    assert win_rate(other, first) == 0.625
    assert win_rate(first, other) == 0.375
    assert win_rate(first, first) == 0.5


def test_the_same_response_ties_whatever_the_rounding():
    """A reward model scores one text a digit apart in two batches: a tie. The same text with and
    without EOS are two responses, and so are two texts: then the digit counts."""
    assert win_rate([response(1.0000001, 'a')], [response(1.0, 'a')]) == 0.5
    assert win_rate([response(1.0000001, 'a')], [response(1.0, 'a', eos=False)]) == 1
    assert win_rate([response(1.0000001, 'a')], [response(1.0, 'b')]) == 1


def test_a_row_by_hand():
    """All columns of two responses against two others; no rewards, no reward, error or win."""
    mine = [response(3.0, 'x y', kl=1.0), response(0.0, 'x', eos=False, kl=4.0)]
    first = [response(1.0, 'z'), response(2.0, 'z')]
    row = summarize('mine', mine, first)
    assert row == {'run': 'mine', 'reward': 1.5, 'reward_se': pytest.approx(1.5), 'win': 0.5,
                   'kl': 2.5, 'kl_se': pytest.approx(1.5), 'length': 1.0, 'eos': 0.5,
                   'distinct-1': pytest.approx(2 / 3), 'distinct-2': 1.0}
    row = summarize('mine', [{**each, 'judged': {}} for each in mine], first)
    assert list(row) == ['run', 'kl', 'kl_se', 'length', 'eos', 'distinct-1', 'distinct-2']


def test_the_table_puts_the_error_beside_its_mean(capsys):
    """A standard error is beside its mean and is no column; a number that a row lacks leaves a
    '-' and does not move the numbers after it under other names."""
    show_table([{'run': 'out/a', 'reward': -1 / 3, 'reward_se': 0.0812, 'refused': 0.25, 'kl': 0.0},
                {'run': 'out/second', 'reward': 2.0, 'reward_se': None, 'kl': 4.5}], 'title')
    assert capsys.readouterr().out == (
        '\ntitle\n'
        'run                reward  refused     kl\n'
        'out/a       -0.333 ±0.081    0.250  0.000\n'
        'out/second          2.000        -  4.500\n')


@pytest.mark.parametrize('changes, message', [
    (dict(samples=0), '--samples=0'), (dict(samples=4, best_of=2), '--samples=4'),
    (dict(split='test-none'), 'test-none.prompts.jsonl'), (dict(best_of=2), 'best_of=2.*--select'),
    (dict(select='rm'), 'best_of=0.*--select'), (dict(best_of=-1), 'best_of=-1')])
def test_flags_that_cannot_be(runs, changes, message):
    with pytest.raises(UserError, match=message):
        evaluate(runs, **changes)


def test_several_samples_a_prompt(runs, tiny_data, samples):
    """Twelve samples of each of four prompts, side by side: the columns are counted again on the
    samples, the error is over the four means, the greedy table stays one response each, and the
    responses themselves are there for who counts something else."""
    (tiny_data / 'reward.py').write_text(JUDGE)
    tables = evaluate(runs, prompts=4, samples=12)
    assert [len(tokens) for tokens, _ in samples] == [48, 48, 4, 4]
    for row, kept, call in zip(tables['rows'], tables['responses'], samples):
        texts = [text_of(ids) for ids in responses_of(*call)]
        assert [each['text'] for each in kept] == texts
        assert [each['judged']['reward'] for each in kept] == [len(text) for text in texts]
        means = [statistics.fmean(map(len, texts[i:i + 12])) for i in range(0, 48, 12)]
        assert row['reward'] == pytest.approx(statistics.fmean(means))
        assert row['reward_se'] == pytest.approx(statistics.stdev(means) / 2)


def test_another_split_is_read(runs, tiny_data, samples):
    """--split=hard reads hard.prompts.jsonl, all of it, beside the data's other files."""
    (tiny_data / 'hard.prompts.jsonl').write_text('{"prompt": "now"}\n{"prompt": "go"}\n')
    evaluate(runs, split='hard')
    tokens, response_mask = samples[0]
    assert [bytes(row[:int(mask.nonzero()[0]) + 1].tolist()).decode()
            for row, mask in zip(tokens, response_mask)] == ['now', 'go']


# ----------------------------------------------------------------------------- whole tables

def test_columns_and_counts(runs, samples):
    """Length counts tokens with EOS, eos the responses that hold one; both are counted again on
    the samples. Without a reward.py the judge's columns are absent."""
    tables = evaluate(runs, prompts=24)
    assert list(tables) == ['rows', 'greedy', 'responses']
    rows = tables['rows'] + tables['greedy']
    assert [row['run'] for row in rows] == runs + runs
    assert len(samples) == 4
    for row, (tokens, response_mask) in zip(rows, samples):
        assert list(row) == ['run', 'kl', 'kl_se', 'length', 'eos', 'distinct-1', 'distinct-2']
        responses = responses_of(tokens, response_mask)
        assert row['length'] == pytest.approx(sum(map(len, responses)) / 24)
        assert row['eos'] == pytest.approx(sum(EOS in ids for ids in responses) / 24)
        words = [word for ids in responses for word in text_of(ids).split()]
        assert row['distinct-1'] == pytest.approx(len(set(words)) / len(words))
    assert tables['rows'][1]['eos'] > 0.5       # so that the counts above count something


def test_ordinary_rows_answer_with_the_eval_stream(runs, tiny_data, samples):
    """The samples are those of rng(seed, 0, 'eval'), from the first prompt on, with or without a
    best-of-N row: figures that were published before that row was there stay as they are."""
    policy = load_model(GPT, load_checkpoint(runs[0], ['sft']), 'policy', 'cpu')
    prompts = [list(prompt.encode()) for prompt in held_out(tiny_data, 8)]
    expected, _ = generate(policy, prompts, 6, EOS, 1.0, rng(3, 0, 'eval'))
    plain = evaluate(runs, seed=3)
    assert torch.equal(samples[0][0], expected)
    (tiny_data / 'reward.py').write_text(JUDGE)
    more = evaluate(runs, seed=3, best_of=3)
    for name in ('rows', 'greedy'):
        for before, after in zip(plain[name], more[name]):
            assert before.items() <= after.items()


def log_p(policy, ids):
    """log p of the last id after the others, by a forward pass of its own."""
    logits = policy.logits(policy(torch.tensor([ids[:-1]])))[0, -1]
    return logits.log_softmax(-1)[ids[-1]].item()


def test_kl_is_the_sum_over_tokens_and_the_mean_over_responses(runs, samples):
    """kl of the first run is exactly 0, and so is its error; the other's is a double loop over its
    own samples of log p(token) under it, minus the same under the first run, with a forward pass
    per token; kl_se is the spread of the eight sums, not of the tokens."""
    tables = evaluate(runs)
    first, second = (load_model(GPT, load_checkpoint(run, ['sft']), 'policy', 'cpu')
                     for run in runs)
    for name, sample in (('rows', samples[1]), ('greedy', samples[3])):
        tokens, response_mask = sample
        sums = [0.0] * 8
        with torch.no_grad():
            for b in range(8):
                for t in range(response_mask.size(1)):
                    if response_mask[b, t]:
                        ids = tokens[b, :t + 2].tolist()
                        sums[b] += log_p(second, ids) - log_p(first, ids)
        assert tables[name][0]['kl'] == tables[name][0]['kl_se'] == 0
        assert tables[name][1]['kl'] == pytest.approx(sum(sums) / 8, abs=1e-4)
        assert tables[name][1]['kl_se'] == pytest.approx(statistics.stdev(sums) / 8 ** 0.5,
                                                         abs=1e-4)
    assert tables['rows'][1]['kl'] > 1          # a learned policy is far from a random one


def test_reward_its_error_and_win_are_counts_over_the_samples(runs, tiny_data, samples):
    """reward, reward_se and win of both runs in both tables, from the judge's word on each of the
    recorded samples: each is compared with the first run's response to the same prompt."""
    (tiny_data / 'reward.py').write_text(JUDGE)
    tables = evaluate(runs, prompts=24)
    for name, calls in (('rows', samples[:2]), ('greedy', samples[2:])):
        first, second = ([len(text_of(ids)) for ids in responses_of(*call)] for call in calls)
        points = sum(1 if b > a else 0.5 if b == a else 0 for a, b in zip(first, second))
        assert tables[name][0]['win'] == 0.5
        assert tables[name][1]['win'] == points / 24 < 0.5          # longer is better: it ends
        for row, rewards in zip(tables[name], (first, second)):
            assert row['reward'] == pytest.approx(sum(rewards) / 24)
            assert row['reward_se'] == pytest.approx(statistics.stdev(rewards) / 24 ** 0.5)
    assert any(a == b for a, b in zip(first, second))               # a tie is among them


def test_one_prompt_has_no_standard_error(runs, tiny_data, tmp_path):
    """One response has no spread: null in the JSON, and neither 0, which would be certainty, nor
    NaN, which is not JSON."""
    (tiny_data / 'reward.py').write_text(JUDGE)
    path = tmp_path / 'one.json'
    row = evaluate(runs, prompts=1, json=str(path))['rows'][1]
    assert row['reward_se'] is row['kl_se'] is None
    assert 'NaN' not in path.read_text() and '"kl_se": null' in path.read_text()


def test_answers_do_not_depend_on_the_batch_size(runs, tiny_data):
    """24 prompts answered at once, by 7, or one by one: the same texts, so the same table, with
    the best of 3, which fits a batch several times, or not once."""
    (tiny_data / 'reward.py').write_text(JUDGE)
    whole = evaluate(runs, prompts=24, batch_size=100, best_of=3)
    for batch_size in (1, 7):
        parts = evaluate(runs, prompts=24, batch_size=batch_size, best_of=3)
        assert len(parts['rows']) == 3
        for name in ('rows', 'greedy'):
            for row, expected in zip(parts[name], whole[name]):
                assert row['kl'] == pytest.approx(expected['kl'], abs=1e-4)
                assert row['kl_se'] == pytest.approx(expected['kl_se'], abs=1e-4)
                zero = {'kl': 0, 'kl_se': 0}
                assert {**row, **zero} == {**expected, **zero}


def test_a_run_given_twice_gives_equal_rows(runs, tiny_data, tmp_path, samples):
    """The same weights meet the same random numbers: equal rows, kl exactly 0 and win exactly 1/2
    in both. Another seed gives other samples, but the same greedy answers."""
    tables = evaluate([runs[0], runs[0]], judge=save_tiny_rm(tmp_path / 'rm', tiny_data))
    for table in (tables['rows'], tables['greedy']):
        assert table[0] == table[1]
        assert table[1]['kl'] == 0 and table[1]['win'] == 0.5
    evaluate([runs[0]], seed=1)
    first, _, greedy, _, other, other_greedy = (tokens for tokens, _ in samples)
    assert not torch.equal(first, other)
    assert torch.equal(greedy, other_greedy)


def test_the_judge_of_the_data_folder_and_a_judge_by_name(runs, tiny_data, tmp_path):
    """reward.py beside the data gives its columns first; --judge names another one; a number
    that is left out for some prompts keeps its own mean."""
    (tiny_data / 'reward.py').write_text(JUDGE)
    row = evaluate(runs)['rows'][0]
    assert list(row) == ['run', 'reward', 'empty', 'hushed', 'reward_se', 'win', 'kl', 'kl_se',
                         'length', 'eos', 'distinct-1', 'distinct-2']
    assert 0 < row['reward'] <= 6
    other = tmp_path / 'other.py'
    other.write_text('def score(prompt, response):\n    return {"reward": 7.0}\n')
    row = evaluate(runs, judge=str(other))['rows'][1]
    assert row['reward'] == 7 and 'empty' not in row
    with pytest.raises(UserError, match='nowhere.py'):
        evaluate(runs, judge=str(tmp_path / 'nowhere.py'))


def test_the_judge_reads_the_whole_prompt_and_the_response_without_eos(runs, tiny_data,
                                                                       monkeypatch):
    """The judge gets the prompt as the file has it, even where the model's was cut to fit
    the block, and a response without the text of EOS."""
    long = 'x' * 100 + 'say a:'
    (tiny_data / 'val.prompts.jsonl').write_text(json.dumps({'prompt': long}) + '\n')
    heard = []

    def judge(prompt, response):
        heard.append((prompt, response))
        return {'reward': 0.0}
    monkeypatch.setattr(tools.evaluate, 'load_judge', lambda path: judge)
    evaluate(runs, judge='reward.py')
    assert [prompt for prompt, _ in heard] == [long] * 4
    assert not any('<|endoftext|>' in response for _, response in heard)


def test_json_holds_the_two_tables(runs, tmp_path, capsys):
    """--json writes what main returns and prints: both tables, every column. Its folder is made
    before the work, and not found missing when both tables have been computed."""
    path = tmp_path / 'new' / 'evaluate.json'
    tables = evaluate(runs, json=str(path))
    assert json.loads(path.read_text()) == {name: tables[name] for name in ('rows', 'greedy')}
    shown = capsys.readouterr().out
    for name in ('kl', 'length', 'eos', 'distinct-1', 'distinct-2', *runs):
        assert shown.count(f'{name}') >= 2
    assert f"{tables['rows'][1]['kl']:.3f} ±{tables['rows'][1]['kl_se']:.3f}" in shown


def test_prompts_come_from_the_first_runs_data_or_from_the_flag(runs, tiny_data, samples):
    """--data names the prompts; without it they are those of the first run's own data; --prompts
    takes them from the first on."""
    prompts = [f'question {i}:' for i in range(5)]
    (tiny_data / 'val.prompts.jsonl').write_text(
        ''.join(json.dumps({'prompt': prompt}) + '\n' for prompt in prompts))
    for named in ({}, {'data': str(tiny_data)}):
        samples.clear()
        evaluate(runs, prompts=3, **named)
        tokens, _ = samples[0]
        assert [bytes(row[:11].tolist()).decode() for row in tokens] == prompts[:3]
    samples.clear()
    evaluate(runs, prompts=100)
    assert len(samples[0][0]) == 5


# ----------------------------------------------------------------------------- reward models

def test_a_reward_model_as_judge(runs, tiny_data, tmp_path, samples):
    """reward is the model's number at the last token, minus the shift, a response at a time without
    padding; it has an error and a win, and no column but these. --judge comes before the
    reward.py beside the data. A score of the padding, or without the shift, would differ."""
    (tiny_data / 'reward.py').write_text(JUDGE)
    rm_run = save_tiny_rm(tmp_path / 'rm', tiny_data, shift=0.7)
    rm = load_model(ScalarGPT, load_checkpoint(rm_run, ['rm']), 'reward_model', 'cpu')
    rows = evaluate(runs, judge=rm_run)['rows']
    first, second = ([score_alone(rm, prompt, ids, 0.7) for prompt, ids
                      in zip(held_out(tiny_data, 8), responses_of(*call))] for call in samples[:2])
    for row, rewards in zip(rows, (first, second)):
        assert list(row) == ['run', 'reward', 'reward_se', 'win', 'kl', 'kl_se', 'length', 'eos',
                             'distinct-1', 'distinct-2']
        assert row['reward'] == pytest.approx(sum(rewards) / 8, abs=1e-4)
        assert row['reward_se'] == pytest.approx(statistics.stdev(rewards) / 8 ** 0.5, abs=1e-4)
    assert rows[1]['win'] == sum(b > a for a, b in zip(first, second)) / 8


# ----------------------------------------------------------------------------- best of N

def pick(scores, ends):
    """The place of the highest score, the first of equal ones; without EOS it is at most -1."""
    scores = [score if end else min(score, -1.0) for score, end in zip(scores, ends)]
    return scores.index(max(scores))


def picked(data, calls, N, score):
    """Of the recorded samples, by a loop over all of them, the ids of the best of N, by prompt."""
    samples = [ids for call in calls for ids in responses_of(*call)]
    best = []
    for i, prompt in enumerate(held_out(data, len(samples) // N)):
        asked = samples[N * i:N * (i + 1)]
        scores = [score(prompt, ids) for ids in asked]
        best.append(asked[pick(scores, [ids[-1] == EOS for ids in asked])])
    return best


@pytest.mark.parametrize('which', [0, 1])
def test_the_best_of_n_by_a_reward_model(runs, tiny_data, tmp_path, samples, which):
    """The row is made of what a loop over all N samples of every prompt picks, scored one by one;
    its other columns are the judge's, who did not pick. N samples of one prompt taken for samples
    of N prompts would be told by the prompts that the samples begin with."""
    (tiny_data / 'reward.py').write_text(JUDGE)
    rm_run = save_tiny_rm(tmp_path / 'rm', tiny_data, shift=0.7)
    rm = load_model(ScalarGPT, load_checkpoint(rm_run, ['rm']), 'reward_model', 'cpu')
    tables = evaluate([runs[which]], data=str(tiny_data), best_of=4, select=rm_run, batch_size=13)
    first = responses_of(*samples[0])
    calls = samples[1:-1]                       # 3, 3 and 2 prompts; around them the run's own
    assert [len(tokens) for tokens, _ in calls] == [12, 12, 8]
    prompts = held_out(tiny_data, 8)
    asked = [bytes(row[:len(prompts[i // 4])].tolist()).decode() for i, row in
             enumerate(row for tokens, _ in calls for row in tokens)]
    assert asked == [prompt for prompt in prompts for _ in range(4)]

    best = picked(tiny_data, calls, 4, lambda prompt, ids: score_alone(rm, prompt, ids, 0.7))
    row = tables['rows'][1]
    rewards, others = ([len(text_of(ids)) for ids in responses] for responses in (best, first))
    assert row['run'] == f'best of 4 of {runs[which]}'
    assert row['reward'] == pytest.approx(sum(rewards) / 8)
    assert row['reward_se'] == pytest.approx(statistics.stdev(rewards) / 8 ** 0.5)
    assert row['win'] == sum(1 if a > b else 0.5 if a == b else 0
                             for a, b in zip(rewards, others)) / 8
    assert row['hushed'] == statistics.mean('!' not in text_of(ids) for prompt, ids
                                            in zip(prompts, best) if prompt.startswith('now'))
    assert row['length'] == pytest.approx(sum(map(len, best)) / 8)
    assert row['eos'] == sum(EOS in ids for ids in best) / 8
    words = [word for ids in best for word in text_of(ids).split()]
    assert row['distinct-1'] == pytest.approx(len(set(words)) / len(words))
    assert list(row) == list(tables['rows'][0])


@pytest.mark.parametrize('select', [LONG, SHORT])
def test_a_response_without_eos_is_not_picked_for_its_score(runs, tiny_data, tmp_path, samples,
                                                            select):
    """With the longer the better, what was cut off scores most and must not be picked where
    another one ended; with the shorter the better it keeps its own score, below -1 already."""
    (tiny_data / 'reward.py').write_text(JUDGE)
    (tmp_path / 'select.py').write_text(select)
    score = load_judge(tmp_path / 'select.py')
    rows = evaluate(runs[1:], data=str(tiny_data), best_of=4, max_new_tokens=5,
                    select=str(tmp_path / 'select.py'))['rows']
    ends = [ids[-1] == EOS for ids in responses_of(*samples[1])]
    mixed = [any(four) and not all(four) for four in zip(*[iter(ends)] * 4)]
    assert any(mixed)                           # so that there was something to choose between
    best = picked(tiny_data, samples[1:2], 4,
                  lambda prompt, ids: score(prompt, text_of(ids))['reward'])
    assert rows[1]['length'] == pytest.approx(sum(map(len, best)) / 8)
    assert rows[1]['eos'] == sum(any(four) for four in zip(*[iter(ends)] * 4)) / 8
    assert rows[1]['reward'] == pytest.approx(sum(len(text_of(ids)) for ids in best) / 8)


def test_of_equal_scores_the_first_is_picked(runs, tiny_data, tmp_path, samples):
    """A selector that finds all alike takes each prompt's first sample; it is no judge."""
    (tmp_path / 'select.py').write_text('def score(prompt, response):\n    return {"reward": -2}\n')
    row = evaluate(runs[1:], best_of=3, select=str(tmp_path / 'select.py'))['rows'][1]
    firsts = responses_of(*samples[1])[::3]
    assert row['length'] == pytest.approx(sum(map(len, firsts)) / 8)
    assert 'reward' not in row and 'win' not in row


def test_without_a_selector_the_judge_picks(runs, tiny_data, samples):
    """Then the row's reward is the mean of each prompt's highest, where all end: an upper bound,
    which picking by anything else cannot exceed."""
    (tiny_data / 'reward.py').write_text(SHORT)
    rows = evaluate(runs[1:], data=str(tiny_data), best_of=4, max_new_tokens=8)['rows']
    responses = responses_of(*samples[1])
    assert all(EOS in ids for ids in responses)
    rewards = [-len(text_of(ids)) for ids in responses]
    highest = [max(four) for four in zip(*[iter(rewards)] * 4)]
    assert rows[1]['reward'] == sum(highest) / 8 > rows[0]['reward']


def test_the_best_of_n_is_a_row_of_its_own(runs, tiny_data, samples):
    """It comes last, at T=1 only; its samples are not the first run's row over again; kl is
    log N - (N-1)/N, 0 for N = 1 and 1.2044 for N = 8, without an error. N = 0: no such row."""
    (tiny_data / 'reward.py').write_text(JUDGE)
    for N, kl in ((1, 0.0), (2, math.log(2) - 0.5), (8, 1.204442)):
        samples.clear()
        tables = evaluate(runs, best_of=N)
        assert [row['run'] for row in tables['rows']] == [*runs, f'best of {N} of {runs[0]}']
        assert [row['run'] for row in tables['greedy']] == runs
        assert tables['rows'][2]['kl'] == pytest.approx(kl, abs=1e-6)
        assert tables['rows'][2]['kl_se'] == 0
        mine, first = samples[2][0], samples[0][0]
        assert not torch.equal(mine[:1, :first.size(1)], first[:1, :mine.size(1)])
    assert len(evaluate(runs)['rows']) == 2


# ----------------------------------------------------------------------------- errors

def test_a_judges_number_may_not_hide_a_column_of_the_table(runs, tiny_data):
    """A judge that says 'length' would be overwritten without a word, or overwrite."""
    (tiny_data / 'reward.py').write_text(
        "def score(prompt, response):\n    return {'reward': 1.0, 'length': 99.0}\n")
    with pytest.raises(UserError, match='the judge says length'):
        evaluate(runs)


@pytest.fixture
def swapped(tiny_data, tmp_path):
    """A data folder whose tokenizer has two bytes the other way round: the same ids, other text."""
    lines = (tiny_data / 'bytes.tiktoken').read_text().splitlines(True)
    folder = tmp_path / 'other_data'
    folder.mkdir()
    (folder / 'tokenizer').write_text('bytes.tiktoken')
    (folder / 'bytes.tiktoken').write_text(
        ''.join([lines[1].replace(' 1', ' 0'), lines[0].replace(' 0', ' 1'), *lines[2:]]))
    (folder / 'template.txt').write_text(TEMPLATE)
    return folder


def test_runs_with_different_tokenizers_are_refused(runs, swapped, tmp_path):
    """The same ids mean other words in the second run: it is named, and nothing is compared."""
    other = str(save_tiny_run(tmp_path / 'other', swapped, vocab_size=EOS + 1))
    with pytest.raises(UserError, match=f'{other}.*tokenizer.*{runs[0]}'):
        evaluate([runs[0], other])
    with pytest.raises(UserError, match='tokenizer'):
        evaluate(runs, data=str(swapped))


def test_no_run_no_checkpoint_and_no_policy(runs, tiny_data, tmp_path):
    """No run at all, a folder without a checkpoint, and a reward model: each is told apart."""
    with pytest.raises(UserError, match='at least one run'):
        evaluate([])
    with pytest.raises(UserError, match='nowhere.*no checkpoint'):
        evaluate([runs[0], str(tmp_path / 'nowhere')])
    rm = str(tmp_path / 'rm')
    train_rm.main(train_rm.Config(data=str(tiny_data), out=rm, init=runs[0], steps=1,
                                  device='cpu'))
    with pytest.raises(UserError, match='its stage is rm, not base or sft'):
        evaluate([runs[0], rm])


def test_all_that_read_a_response_have_room_for_it(runs, tiny_data, tmp_path, samples):
    """The prompts are cut so that the smallest block holds them, another run's or the reward
    model's, as judge or as selector: not an AssertionError amid the table."""
    small = save_tiny_rm(tmp_path / 'small', tiny_data, block_size=12)
    for runs_, flags in ((runs, dict(judge=small)), (runs, dict(select=small, best_of=2)),
                         ([runs[0], str(save_tiny_run(tmp_path / 'run', tiny_data, block_size=12))],
                          {})):
        samples.clear()
        evaluate(runs_, **flags)
        assert max(tokens.size(1) for tokens, _ in samples) == 12


def test_judges_and_selectors_that_cannot_be(runs, swapped, tmp_path):
    """A reward model that reads another tokenizer scores other words; a policy scores nothing."""
    other = save_tiny_rm(tmp_path / 'other_rm', swapped)
    with pytest.raises(UserError, match=f'{other}.*tokenizer'):
        evaluate(runs, judge=other)
    with pytest.raises(UserError, match=f'{other}.*tokenizer'):
        evaluate(runs, select=other, best_of=2)
    with pytest.raises(UserError, match='its stage is sft, not rm'):
        evaluate(runs, judge=runs[1])
