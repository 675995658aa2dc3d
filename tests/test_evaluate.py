"""tools/evaluate.py on tiny runs: every column against a count or a loop of its own.

    python -m pytest -q tests/test_evaluate.py
"""
import json

import pytest
import torch
from conftest import EOS, TEMPLATE, save_tiny_run

import tools.evaluate
import train_rm
from prefgpt import GPT, UserError, load_checkpoint, load_model
from tools.evaluate import Config, distinct_2, mean_scores

# Says what it saw: 'hushed' is left out for prompts that are not loud
JUDGE = '''
def score(prompt, response):
    numbers = {'reward': float(len(response)), 'empty': float(not response)}
    if prompt.startswith('now'):
        numbers['hushed'] = float('!' not in response)
    return numbers
'''


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


# ----------------------------------------------------------------------------- by hand

def test_distinct_2_by_hand():
    """(a b), (b c) and again (a b): 2 of 3 pairs differ; pairs do not cross from text to text."""
    assert distinct_2(['a b c', ' a  b\n', 'x', '']) == pytest.approx(2 / 3)
    assert distinct_2(['a a a a']) == pytest.approx(1 / 3)
    assert distinct_2(['a b', 'b a']) == 1
    assert distinct_2(['one', '', ' ']) == 0
    assert distinct_2([]) == 0


def test_mean_scores_averages_over_the_responses_that_have_the_number():
    """A key that the judge gives for two of three prompts is averaged over two: dividing by three
    would make refusals of benign prompts look rarer than they are."""
    def judge(prompt, response):
        numbers = {'reward': len(response)}
        if prompt != 'harmful':
            numbers['refused'] = float(response == 'no')
        return numbers
    means = mean_scores(judge, ['harmful', 'p', 'q'], ['no', 'no', 'sure'])
    assert means == {'reward': 8 / 3, 'refused': 0.5}


# ----------------------------------------------------------------------------- whole tables

def test_columns_and_counts(runs, samples):
    """Length counts tokens with EOS, eos the responses that hold one; both are counted again on
    the samples. Without a reward.py the judge's columns are absent."""
    tables = evaluate(runs, prompts=24)
    assert list(tables) == ['rows', 'greedy']
    rows = tables['rows'] + tables['greedy']
    assert [row['run'] for row in rows] == runs + runs
    assert len(samples) == 4
    for row, (tokens, response_mask) in zip(rows, samples):
        assert list(row) == ['run', 'kl', 'length', 'eos', 'distinct-2']
        responses = [[token for token, real in zip(tokens[b, 1:].tolist(), response_mask[b])
                      if real] for b in range(24)]
        assert row['length'] == pytest.approx(sum(map(len, responses)) / 24)
        assert row['eos'] == pytest.approx(sum(EOS in ids for ids in responses) / 24)
    assert tables['rows'][1]['eos'] > 0.5       # so that the counts above count something


def log_p(policy, ids):
    """log p of the last id after the others, by a forward pass of its own."""
    logits = policy.logits(policy(torch.tensor([ids[:-1]])))[0, -1]
    return logits.log_softmax(-1)[ids[-1]].item()


def test_kl_is_the_sum_over_tokens_and_the_mean_over_responses(runs, samples):
    """kl of the first run is exactly 0; the other's is a double loop over its own samples of
    log p(token) under it, minus the same under the first run, with a forward pass per token."""
    tables = evaluate(runs)
    first, second = (load_model(GPT, load_checkpoint(run, ['sft']), 'policy', 'cpu')
                     for run in runs)
    for name, sample in (('rows', samples[1]), ('greedy', samples[3])):
        tokens, response_mask = sample
        total = 0.0
        with torch.no_grad():
            for b in range(8):
                for t in range(response_mask.size(1)):
                    if response_mask[b, t]:
                        ids = tokens[b, :t + 2].tolist()
                        total += log_p(second, ids) - log_p(first, ids)
        assert tables[name][0]['kl'] == 0
        assert tables[name][1]['kl'] == pytest.approx(total / 8, abs=1e-4)
    assert tables['rows'][1]['kl'] > 1          # a learned policy is far from a random one


def test_answers_do_not_depend_on_the_batch_size(runs, tiny_data):
    """24 prompts answered at once, by 7, or one by one: the same texts, so the same table."""
    (tiny_data / 'reward.py').write_text(JUDGE)
    whole = evaluate(runs, prompts=24, batch_size=100)
    for batch_size in (1, 7):
        parts = evaluate(runs, prompts=24, batch_size=batch_size)
        for name in ('rows', 'greedy'):
            for row, expected in zip(parts[name], whole[name]):
                assert row['kl'] == pytest.approx(expected['kl'], abs=1e-4)
                assert {**row, 'kl': 0} == {**expected, 'kl': 0}


def test_a_run_given_twice_gives_equal_rows(runs, samples):
    """The same weights meet the same random numbers: equal rows, and kl exactly 0 in both. Another
    seed gives other samples, but the same greedy answers."""
    tables = evaluate([runs[0], runs[0]])
    for table in tables.values():
        assert table[0] == table[1]
        assert table[1]['kl'] == 0
    evaluate([runs[0]], seed=1)
    first, _, greedy, _, other, other_greedy = (tokens for tokens, _ in samples)
    assert not torch.equal(first, other)
    assert torch.equal(greedy, other_greedy)


def test_the_judge_of_the_data_folder_and_a_judge_by_name(runs, tiny_data, tmp_path):
    """reward.py beside the data gives its columns first; --reward names another one; a number
    that is left out for some prompts keeps its own mean."""
    (tiny_data / 'reward.py').write_text(JUDGE)
    row = evaluate(runs)['rows'][0]
    assert list(row) == ['run', 'reward', 'empty', 'hushed', 'kl', 'length', 'eos', 'distinct-2']
    assert 0 < row['reward'] <= 6
    other = tmp_path / 'other.py'
    other.write_text('def score(prompt, response):\n    return {"reward": 7.0}\n')
    row = evaluate(runs, reward=str(other))['rows'][1]
    assert row['reward'] == 7 and 'empty' not in row
    with pytest.raises(UserError, match='nowhere.py'):
        evaluate(runs, reward=str(tmp_path / 'nowhere.py'))


def test_the_judge_reads_the_whole_prompt_and_the_response_without_eos(runs, tiny_data,
                                                                       monkeypatch):
    """The judge gets the prompt as it stands in the file, even where the model's was cut to fit
    the block, and a response without the text of EOS."""
    long = 'x' * 100 + 'say a:'
    (tiny_data / 'val.prompts.jsonl').write_text(json.dumps({'prompt': long}) + '\n')
    heard = []

    def judge(prompt, response):
        heard.append((prompt, response))
        return {'reward': 0.0}
    monkeypatch.setattr(tools.evaluate, 'load_judge', lambda path: judge)
    evaluate(runs, reward='reward.py')
    assert [prompt for prompt, _ in heard] == [long] * 4
    assert not any('<|endoftext|>' in response for _, response in heard)


def test_json_holds_the_two_tables(runs, tmp_path, capsys):
    """--json writes what main returns and prints: both tables, every column."""
    path = tmp_path / 'evaluate.json'
    tables = evaluate(runs, json=str(path))
    assert json.loads(path.read_text()) == tables
    shown = capsys.readouterr().out
    for name in ('kl', 'length', 'eos', 'distinct-2', *runs):
        assert shown.count(f'{name}') >= 2
    assert f"{tables['rows'][1]['kl']:.3f}" in shown


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


# ----------------------------------------------------------------------------- errors

def test_runs_with_different_tokenizers_are_refused(runs, tiny_data, tmp_path):
    """The same ids mean other words in the second run: it is named, and nothing is compared."""
    lines = (tiny_data / 'bytes.tiktoken').read_text().splitlines(True)
    swapped = [lines[1].replace(' 1', ' 0'), lines[0].replace(' 0', ' 1'), *lines[2:]]
    other_data = tmp_path / 'other_data'
    other_data.mkdir()
    (other_data / 'tokenizer').write_text('bytes.tiktoken')
    (other_data / 'bytes.tiktoken').write_text(''.join(swapped))
    (other_data / 'template.txt').write_text(TEMPLATE)
    other = str(save_tiny_run(tmp_path / 'other', other_data, vocab_size=EOS + 1))
    with pytest.raises(UserError, match=f'{other}.*tokenizer.*{runs[0]}'):
        evaluate([runs[0], other])
    with pytest.raises(UserError, match='tokenizer'):
        evaluate(runs, data=str(other_data))


def test_no_run_no_checkpoint_and_no_policy(runs, tiny_data, tmp_path):
    """No run at all, a folder without a checkpoint, and a reward model: each is told apart."""
    with pytest.raises(UserError, match='at least one run'):
        evaluate([])
    with pytest.raises(UserError, match='nowhere.*no checkpoint'):
        evaluate([runs[0], str(tmp_path / 'nowhere')])
    rm = str(tmp_path / 'rm')
    train_rm.main(train_rm.Config(data=str(tiny_data), out=rm, init=runs[0], steps=1,
                                  device='cpu'))
    with pytest.raises(UserError, match="'rm'.*'sft'"):
        evaluate([runs[0], rm])


def test_runs_with_different_block_sizes(runs, tiny_data, tmp_path):
    """A run with a smaller block than the first one is answered with shorter prompts, or refused
    by name: not an AssertionError in the middle of the table."""
    small = str(save_tiny_run(tmp_path / 'small', tiny_data, block_size=12))
    try:
        tables = evaluate([runs[0], small])
    except UserError as error:
        assert 'block' in str(error)
    else:
        assert len(tables['rows']) == 2
