"""tools/evaluate.py on tiny runs: every column against a count or a loop of its own."""
import json, math, statistics

import pytest
import torch
from conftest import EOS, TEMPLATE, record, save_tiny_run, tiny_scalar, write_jsonl

import tools.evaluate
import train_rm
from data.judge import load_judge
from data.text import load_text
from prefgpt import (GPT, ScalarGPT, UserError, generate, load_checkpoint, load_model, rng,
                     save_checkpoint)
from tools.evaluate import Config, distinct, mean_scores, standard_error, win_rate

# Says what it saw: 'hushed' is left out for prompts that are not loud
JUDGE = '''
def score(prompt, response):
    numbers = {'reward': float(len(response)), 'empty': float(not response)}
    if prompt.startswith('now'):
        numbers['hushed'] = float('!' not in response)
    return numbers
'''
OWN = ['kl', 'kl_se', 'length', 'eos', 'distinct-1', 'distinct-2']


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
    """Two run folders: random weights, on data that a test may change, and one that ends."""
    return [str(save_tiny_run(tmp_path / 'random', tiny_data)), str(sft_run)]


@pytest.fixture
def judge(tiny_data):
    """The JUDGE is beside the data."""
    (tiny_data / 'reward.py').write_text(JUDGE)


def evaluate(runs, **changes):
    """The two tables of main, with few short responses."""
    return tools.evaluate.main(Config(**{**dict(runs=tuple(runs), prompts=8, max_new_tokens=6,
                                                device='cpu'), **changes}))


@pytest.fixture
def samples(monkeypatch):
    """What generate was given and returned, call by call: the responses of the tables."""
    return record(monkeypatch, tools.evaluate, 'generate')


def responses_of(call):
    """The responses of a batch, a list of ids each, EOS included, in a plain loop."""
    _, (tokens, response_mask) = call
    return [[token for token, real in zip(row[1:].tolist(), mask.tolist()) if real]
            for row, mask in zip(tokens, response_mask)]


def prompts_of(call):
    """The prompts of a batch as text."""
    (_, prompts, *_), _ = call
    return [bytes(prompt).decode() for prompt in prompts]


def text_of(ids):
    """A response of the byte tokenizer as text, without EOS."""
    return bytes(token for token in ids if token != EOS).decode(errors='replace')


def policy_of(run):
    return load_model(GPT, load_checkpoint(run, ['sft']), 'policy', 'cpu')


def scores_alone(rm_run, shift=0.7):
    """score(prompt, ids): a reward model's number at the last token of one row, minus the shift."""
    rm = load_model(ScalarGPT, load_checkpoint(rm_run, ['rm']), 'reward_model', 'cpu')

    def score(prompt, ids):
        with torch.no_grad():
            return rm(torch.tensor([[*prompt.encode(), *ids]]))[0, -1].item() - shift
    return score


def check_counts(row, responses):
    """A row's columns that need no judge, kl aside, counted again on its responses."""
    words = [word for ids in responses for word in text_of(ids).split()]
    assert row['length'] == pytest.approx(sum(map(len, responses)) / len(responses))
    assert row['eos'] == pytest.approx(sum(EOS in ids for ids in responses) / len(responses))
    assert row['distinct-1'] == pytest.approx(len(set(words)) / len(words))


def check_rewards(row, rewards, others, abs=1e-9):
    """A row's reward, its error and win, counted again on its rewards and the first run's."""
    points = sum(1 if a > b else 0.5 if a == b else 0 for a, b in zip(rewards, others))
    assert row['reward'] == pytest.approx(sum(rewards) / len(rewards), abs=abs)
    assert row['reward_se'] == pytest.approx(
        statistics.stdev(rewards) / len(rewards) ** 0.5, abs=abs)
    assert row['win'] == points / len(rewards)


def test_distinct_by_hand():
    """2 of 3 pairs differ, (a b) is there twice; pairs do not cross from text to text."""
    texts = ['a b c', ' a  b\n', 'a', '']
    assert distinct(texts, 2) == pytest.approx(2 / 3)
    assert distinct(texts, 1) == pytest.approx(3 / 6)
    assert distinct(['a a a a'], 2) == pytest.approx(1 / 3)
    assert distinct(['a b', 'b a'], 2) == 1
    assert distinct(['one', '', ' '], 2) == distinct([], 1) == 0


def test_means_and_errors_by_hand():
    """A number that the judge leaves out for a prompt is averaged over the others. Of 1, 2, 3, 6:
    squares 4 + 1 + 0 + 9 = 14, std sqrt(14 / 3), over sqrt(4). One has no error, and not 0."""
    assert mean_scores([{'reward': 2}, {'reward': 2, 'refused': 1.0},
                        {'reward': 4, 'refused': 0.0}]) == {'reward': 8 / 3, 'refused': 0.5}
    assert mean_scores([{}, {}]) == {}
    assert standard_error([1, 2, 3, 6]) == pytest.approx(math.sqrt(14 / 3) / 2)
    assert standard_error([0.1] * 7) == 0 and standard_error([5.0]) is None
    # Two prompts of two samples: of their means 2 and 4, sqrt(2) / sqrt(2)
    assert standard_error([1, 3, 4, 4], 2) == 1 and standard_error([1, 3], 2) is None


def response(reward, text='', eos=True, kl=0.0):
    """A response as the table is made of, with this reward."""
    return {'text': text, 'eos': eos, 'length': 1, 'kl': kl, 'judged': {'reward': reward}}


def test_win_rate_by_hand():
    """Against 1, 1, 1, 1: 2 wins, 1 ties, 0 loses, 3 wins. A reward model scores one text a digit
    apart in two batches: a tie. With and without EOS it is two responses."""
    first = [response(1.0, text) for text in 'abcd']
    other = [response(reward, text) for reward, text in zip((2.0, 1.0, 0.0, 3.0), 'efgh')]
    assert win_rate(other, first) == 0.625
    assert win_rate(first, other) == 0.375
    assert win_rate([response(1.0000001, 'a')], [response(1.0, 'a')]) == 0.5
    assert win_rate([response(1.0000001, 'a')], [response(1.0, 'a', eos=False)]) == 1
    assert win_rate([response(1.0000001, 'a')], [response(1.0, 'b')]) == 1


# ----------------------------------------------------------------------------- whole tables

@pytest.mark.parametrize('by', ['reward.py', 'rm'])
def test_columns_are_counts_over_the_samples(runs, tiny_data, judge, samples, tmp_path, capsys, by):
    """Every column but kl of both runs in both tables, from the judge's word on each sample, or a
    reward model's number at its last token, alone, minus the shift; --json holds what is shown."""
    path, columns, score, near = tmp_path / 'new' / 'evaluate.json', ['empty', 'hushed'], None, 1e-9
    if by == 'rm':                              # --judge goes before the reward.py beside the data
        by, columns, near = save_tiny_rm(tmp_path / 'rm', tiny_data, shift=0.7), [], 1e-4
        score = scores_alone(by)
    tables = evaluate(runs, prompts=24, json=str(path), judge=by if score else '')
    assert list(tables) == ['rows', 'greedy', 'responses'] and len(samples) == 4
    for name, calls in (('rows', samples[:2]), ('greedy', samples[2:])):
        both = [responses_of(call) for call in calls]
        first, second = ([score(prompt, ids) if score else len(text_of(ids))
                          for prompt, ids in zip(prompts_of(call), responses_of(call))]
                         for call in calls)
        assert [row['run'] for row in tables[name]] == runs
        for row, responses, rewards in zip(tables[name], both, (first, second)):
            assert list(row) == ['run', 'reward', *columns, 'reward_se', 'win', *OWN]
            check_counts(row, responses)
            check_rewards(row, rewards, first, near)
    assert score or any(a == b for a, b in zip(first, second))      # a tie is among them
    assert tables['rows'][1]['eos'] > 0.5       # so that the counts above count something

    assert json.loads(path.read_text()) == {name: tables[name] for name in ('rows', 'greedy')}
    row, shown = tables['rows'][1], capsys.readouterr().out
    assert all(shown.count(name) >= 2 for name in ('kl', 'length', 'eos', 'distinct-2', *runs))
    assert f"{row['kl']:.3f} ±{row['kl_se']:.3f}" in shown


def log_p(policy, ids):
    """log p of the last id after the others, by a forward pass of its own."""
    logits = policy.logits(policy(torch.tensor([ids[:-1]])))[0, -1]
    return logits.log_softmax(-1)[ids[-1]].item()


def test_kl_is_the_sum_over_tokens_and_the_mean_over_responses(runs, samples):
    """A double loop over its samples of log p(token) under a run, minus the same under the first,
    with a forward pass per token; kl_se is the spread of the eight sums. The first run's is exactly
    0."""
    tables = evaluate(runs)
    first, second = map(policy_of, runs)
    for name, (_, (tokens, response_mask)) in (('rows', samples[1]), ('greedy', samples[3])):
        sums = [0.0] * 8
        with torch.no_grad():
            for b in range(8):
                for t in range(response_mask.size(1)):
                    if response_mask[b, t]:
                        ids = tokens[b, :t + 2].tolist()
                        sums[b] += log_p(second, ids) - log_p(first, ids)
        mine, theirs = tables[name]
        assert list(mine) == ['run', *OWN] and mine['kl'] == mine['kl_se'] == 0
        assert theirs['kl'] == pytest.approx(sum(sums) / 8, abs=1e-4)
        assert theirs['kl_se'] == pytest.approx(statistics.stdev(sums) / 8 ** 0.5, abs=1e-4)
    assert tables['rows'][1]['kl'] > 1          # a learned policy is far from a random one


def test_all_runs_answer_with_the_eval_stream(runs, judge, samples):
    """The samples are those of rng(seed, 0, 'eval'), from the first prompt on, with or without a
    best-of-N row: figures that were published before that row was there stay as they are."""
    plain = evaluate(runs, seed=3)
    for run, ((_, prompts, *_), (tokens, _)) in zip(runs, samples):
        expected, _ = generate(policy_of(run), prompts, 6, EOS, 1.0, rng(3, 0, 'eval'))
        assert torch.equal(tokens, expected)
    more = evaluate(runs, seed=3, best_of=3)
    for name in ('rows', 'greedy'):
        assert plain[name] == more[name][:2]


def test_several_samples_a_prompt(runs, judge, samples):
    """Twelve samples of each of four prompts, side by side: columns are counted again on the
    samples, the error is over the four means, and the greedy table stays one response each."""
    tables = evaluate(runs, prompts=4, samples=12)
    assert [len(prompts_of(call)) for call in samples] == [48, 48, 4, 4]
    for row, kept, call in zip(tables['rows'], tables['responses'], samples):
        texts = [text_of(ids) for ids in responses_of(call)]
        assert [each['text'] for each in kept] == texts
        assert [each['judged']['reward'] for each in kept] == [len(text) for text in texts]
        means = [statistics.fmean(map(len, texts[i:i + 12])) for i in range(0, 48, 12)]
        assert row['reward'] == pytest.approx(statistics.fmean(means))
        assert row['reward_se'] == pytest.approx(statistics.stdev(means) / 2)


def test_answers_do_not_depend_on_the_batch_size(runs, judge):
    """24 prompts at once, by 7, or one by one; the best of 3 fits a batch several times, or not
    once."""
    whole = evaluate(runs, prompts=24, batch_size=100, best_of=3)
    for batch_size in (1, 7):
        parts = evaluate(runs, prompts=24, batch_size=batch_size, best_of=3)
        for name in ('rows', 'greedy'):
            for row, expected in zip(parts[name], whole[name], strict=True):
                near = {key: pytest.approx(expected[key], abs=1e-4) for key in ('kl', 'kl_se')}
                assert row == {**expected, **near}


def test_the_judge_by_name_reads_the_whole_prompt(runs, tiny_data, judge, monkeypatch):
    """It hears the prompt as the file has it, even where the model's was cut, and no EOS."""
    long, heard = 'x' * 100 + 'say a:', []
    write_jsonl(tiny_data / 'val.prompts.jsonl', [{'prompt': long}])

    def other(prompt, response):
        heard.append((prompt, response))
        return {'reward': 7.0}
    monkeypatch.setattr(tools.evaluate, 'load_judge', lambda path: other)
    row = evaluate(runs, judge='other.py')['rows'][1]
    assert row['reward'] == 7 and 'empty' not in row
    assert [prompt for prompt, _ in heard] == [long] * 4
    assert not any('<|endoftext|>' in response for _, response in heard)


def test_prompts_come_from_the_first_runs_data_or_from_the_flags(runs, tiny_data, samples):
    """--data names the prompts; without it they are those of the first run's own data; --prompts
    takes them from the first on; --split=hard reads hard.prompts.jsonl beside the others."""
    prompts = [f'question {i}:' for i in range(5)]
    write_jsonl(tiny_data / 'val.prompts.jsonl', [{'prompt': prompt} for prompt in prompts])
    write_jsonl(tiny_data / 'hard.prompts.jsonl', [{'prompt': 'now'}, {'prompt': 'go'}])
    for flags, expected in (({'prompts': 3}, prompts[:3]), ({'split': 'hard'}, ['now', 'go']),
                            ({'data': str(tiny_data)}, prompts)):
        samples.clear()
        evaluate(runs, **flags)
        assert prompts_of(samples[0]) == expected


# ----------------------------------------------------------------------------- best of N

def picked(calls, N, score):
    """Of the recorded samples the best of N, ids, by prompt; without EOS a score is <= -1."""
    rows = [row for call in calls for row in zip(prompts_of(call), responses_of(call))]
    best = []
    for i in range(0, len(rows), N):
        scores = [score(prompt, ids) if ids[-1] == EOS else min(score(prompt, ids), -1.0)
                  for prompt, ids in rows[i:i + N]]
        best.append(rows[i + scores.index(max(scores))][1])
    return best


@pytest.mark.parametrize('which', [0, 1])
def test_the_best_of_n_by_a_reward_model(runs, tiny_data, judge, tmp_path, samples, which):
    """The row is made of what a loop over all N samples of every prompt picks, scored one by one;
    its other columns are the judge's, who did not pick."""
    rm_run = save_tiny_rm(tmp_path / 'rm', tiny_data, shift=0.7)
    tables = evaluate([runs[which]], data=str(tiny_data), best_of=4, select=rm_run, batch_size=13)
    calls = samples[1:-1]                       # 3, 3 and 2 prompts; around them the run's own
    assert [len(prompts_of(call)) for call in calls] == [12, 12, 8]
    prompts = prompts_of(samples[0])
    assert sum(map(prompts_of, calls), []) == [prompt for prompt in prompts for _ in range(4)]

    best, row = picked(calls, 4, scores_alone(rm_run)), tables['rows'][1]
    rewards, others = ([len(text_of(ids)) for ids in responses]
                       for responses in (best, responses_of(samples[0])))
    assert row['run'] == f'best of 4 of {runs[which]}' and list(row) == list(tables['rows'][0])
    check_counts(row, best)
    check_rewards(row, rewards, others)
    assert row['hushed'] == statistics.mean('!' not in text_of(ids) for prompt, ids
                                            in zip(prompts, best) if prompt.startswith('now'))


@pytest.mark.parametrize('select', ['float(len(response))', '-float(len(response))', '-2.0', ''])
def test_a_response_without_eos_is_not_picked_for_its_score(runs, tiny_data, judge, tmp_path,
                                                            samples, select):
    """What was cut off counts at most -1, be the longer better, or the shorter (below -1 already);
    of equal scores the first is picked; without --select the judge picks, here the longer."""
    path = tmp_path / 'select.py' if select else tiny_data / 'reward.py'
    if select:
        path.write_text(f'def score(prompt, response):\n    return {{"reward": {select}}}\n')
    score = load_judge(path)
    rows = evaluate(runs[1:], data=str(tiny_data), best_of=4, max_new_tokens=5,
                    select=str(path) if select else '')['rows']
    ends = [ids[-1] == EOS for ids in responses_of(samples[1])]
    mixed = [any(four) and not all(four) for four in zip(*[iter(ends)] * 4)]
    assert any(mixed)                           # so that there was something to choose between
    best = picked(samples[1:2], 4, lambda prompt, ids: score(prompt, text_of(ids))['reward'])
    check_counts(rows[1], best)
    assert rows[1]['reward'] == pytest.approx(sum(len(text_of(ids)) for ids in best) / 8)


def test_the_best_of_n_is_a_row_of_its_own(runs, judge, samples):
    """It comes last, at T=1 only; its samples are not the first run's row over again; kl is
    log N - (N-1)/N, 0 for N = 1 and 1.2044 for N = 8, without an error. N = 0: no such row."""
    for N, kl in ((1, 0.0), (2, math.log(2) - 0.5), (8, 1.204442)):
        samples.clear()
        tables = evaluate(runs, best_of=N)
        assert [row['run'] for row in tables['rows']] == [*runs, f'best of {N} of {runs[0]}']
        assert [row['run'] for row in tables['greedy']] == runs
        assert tables['rows'][2]['kl'] == pytest.approx(kl, abs=1e-6)
        assert tables['rows'][2]['kl_se'] == 0
        assert responses_of(samples[2])[0] != responses_of(samples[0])[0]
    assert len(evaluate(runs)['rows']) == 2


def test_all_that_read_a_response_have_room_for_it(runs, tiny_data, tmp_path, samples):
    """The smallest block holds the prompts: another run's, the judge's, the selector's."""
    small = save_tiny_rm(tmp_path / 'small', tiny_data, block_size=12)
    for runs_, flags in ((runs, dict(judge=small)), (runs, dict(select=small, best_of=2)),
                         ([runs[0], str(save_tiny_run(tmp_path / 'run', tiny_data, block_size=12))],
                          {})):
        samples.clear()
        evaluate(runs_, **flags)
        assert max(tokens.size(1) for _, (tokens, _) in samples) == 12


# ----------------------------------------------------------------------------- errors

@pytest.mark.parametrize('changes, told', [
    (dict(runs=()), 'at least one run'), (dict(runs=('random', 'none')), 'none.*no checkpoint'),
    (dict(runs=('random', 'rm')), 'rm is a reward model: python -m tools.rate rm'),
    (dict(samples=0), '--samples=0'), (dict(samples=4, best_of=2), '--samples=4'),
    (dict(split='test-none'), 'test-none.prompts.jsonl'), (dict(best_of=2), 'best_of=2.*--select'),
    (dict(select='rm'), 'best_of=0.*--select'), (dict(best_of=-1), 'best_of=-1'),
    (dict(judge='none.py'), 'none.py'), (dict(judge='random'), 'its stage is sft, not rm'),
    (dict(judge='hides.py'), 'the judge says length')])
def test_what_cannot_be_is_told(runs, tiny_data, tmp_path, monkeypatch, changes, told):
    """Among others a judge's number that would hide a column of the table, without a word."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'hides.py').write_text(
        "def score(prompt, response):\n    return {'reward': 1.0, 'length': 99.0}\n")
    save_tiny_rm(tmp_path / 'rm', tiny_data)
    with pytest.raises(UserError, match=told):
        evaluate(**{'runs': runs, **changes})


def test_another_tokenizer_is_refused(runs, tiny_data, tmp_path):
    """A tokenizer with two bytes the other way round: the same ids mean other words in the second
    run, to the reward model or in the data. What reads it is named, and nothing is compared."""
    lines = (tiny_data / 'bytes.tiktoken').read_text().splitlines(True)
    swapped = tmp_path / 'other_data'
    swapped.mkdir()
    (swapped / 'tokenizer').write_text('bytes.tiktoken')
    (swapped / 'bytes.tiktoken').write_text(
        ''.join([lines[1].replace(' 1', ' 0'), lines[0].replace(' 0', ' 1'), *lines[2:]]))
    (swapped / 'template.txt').write_text(TEMPLATE)
    other = str(save_tiny_run(tmp_path / 'other', swapped, vocab_size=EOS + 1))
    rm = save_tiny_rm(tmp_path / 'other_rm', swapped)
    for runs_, flags, told in (([runs[0], other], {}, f'{other}.*tokenizer.*{runs[0]}'),
                               (runs, dict(data=str(swapped)), 'tokenizer'),
                               (runs, dict(judge=rm), f'{rm}.*tokenizer'),
                               (runs, dict(select=rm, best_of=2), f'{rm}.*tokenizer')):
        with pytest.raises(UserError, match=told):
            evaluate(runs_, **flags)
