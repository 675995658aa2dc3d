"""tools/look.py: its numbers against those inside the scripts, and against loops of their own."""
import json, re, sys

import pytest
import torch
from conftest import record

import train_dpo, train_ppo
from data.text import build_tokenizer
from prefgpt import (GPT, POLICIES, ScalarGPT, UserError, load_checkpoint, load_model,
                     token_logprobs)
from tools import look


def look_at(run, **changes):
    """What main returns of a run."""
    return look.main(look.Config(runs=(str(run),), **changes))


def numbers(rows, name):
    """A column of the rows that count."""
    return [row[name] for row in rows if row['mask']]


@pytest.fixture(scope='module')
def ppo_run(shared_data, sft_run, rm_run, tmp_path_factory):
    """A run folder that PPO has left after three steps, and what it computed in each."""
    out = tmp_path_factory.mktemp('runs') / 'ppo'
    with pytest.MonkeyPatch.context() as patch:
        calls = [record(patch, train_ppo, name)
                 for name in ('token_rewards', 'gae', 'whiten', 'rollout')]
        train_ppo.main(train_ppo.Config(
            data=str(shared_data), init=str(sft_run), reward=str(rm_run), out=str(out), steps=3,
            rollout_size=8, batch_size=4, max_new_tokens=6, eval_every=1, keep=True, lr=1e-2,
            micro_batch_size=3, device='cpu'))
    return out, calls


@pytest.fixture(scope='module')
def dpo_run(shared_data, sft_run, tmp_path_factory):
    """A run folder that DPO has left after a few steps."""
    out = tmp_path_factory.mktemp('runs') / 'dpo'
    train_dpo.main(train_dpo.Config(data=str(shared_data), init=str(sft_run), out=str(out), steps=4,
                                    lr=1e-3, max_new_tokens=6, device='cpu'))
    return out


@pytest.mark.parametrize('step', [0, 1, 2])
def test_a_kept_step_shows_the_numbers_inside_ppo(ppo_run, step, capsys):
    """Bit for bit: of rows 1 to 3 of the rollout that followed the checkpoint, every number that
    train_ppo.main itself computed, whitened over the whole batch; and the log's own means."""
    out, (rewarded, estimated, whitened, rollouts) = ppo_run
    (_, logprobs, ref_logprobs, mask, _), rewards = rewarded[step]
    (_, values, *_), (advantages, _) = estimated[step]
    [(grid, _, _, (prompts, _))] = [result for _, result in rollouts
                                    if result[0]['logprobs'] is logprobs]
    expected = {'logprob': logprobs, 'ref logprob': ref_logprobs, 'kl': logprobs - ref_logprobs,
                'reward': rewards, 'value': values, 'advantage': advantages,
                'whitened': whitened[step][1]}
    tables = look_at(out, step=step, first=1, rows=3)
    for b, table in enumerate(tables, 1):
        rows = table['parts']['y']
        assert table['title'] == prompts[b] and table['numbers'] == list(expected)
        assert len(rows) == 1 + mask[b].sum()
        for name, column in expected.items():
            assert numbers(rows, name) == column[b][mask[b]].tolist(), name
        ids = grid['y'][b][mask[b]].tolist()
        assert [row['y'] for row in rows[1:]] == ['EOS' if i == 256 else chr(i) for i in ids]
    rows = map(json.loads, (out / 'log.jsonl').read_text().splitlines())
    [logged] = [row for row in rows if row['step'] == step + 1 and 'score' in row]
    assert (f"step {step + 1}: score {logged['score']:.6f}, kl {logged['kl']:.6f}; compare"
            in capsys.readouterr().out)


def test_rows_against_loops(ppo_run, rm_run):
    """Logprobs token by token from whole forward passes; the rewards add up to the score minus beta
    times the log-ratio; an advantage with gamma 1 is the discounted sum of deltas."""
    [table] = look_at(ppo_run[0], prompt='say b:', seed=1)
    rows, saved = table['parts']['y'], load_checkpoint(ppo_run[0], ['ppo'])
    tokenizer, cfg = build_tokenizer(saved['tokenizer']), train_ppo.Config(**saved['config'])
    prompt = tokenizer.encode_ordinary('user: say b:')
    responses = rows[1:]
    assert [row['mask'] for row in rows] == [0] + [1] * len(responses)
    assert list(rows[0].values())[3:] == [0.0] * 6
    ids = [tokenizer.eot_token if row['y'] == 'EOS' else tokenizer.encode_ordinary(row['y'])[0]
           for row in responses]

    for name, column in (('policy', 'logprob'), ('ref', 'ref logprob')):
        model = load_model(GPT, saved, name, 'cpu')
        for t, row in enumerate(responses):
            tokens = torch.tensor([prompt + ids[:t]])
            logprobs = model.logits(model(tokens))[0, -1].log_softmax(0)
            assert row[column] == pytest.approx(logprobs[ids[t]].item(), abs=1e-5)

    scorer, _ = train_ppo.load_scorer(str(rm_run), load_checkpoint(cfg.init, POLICIES), 'cpu')
    tokens = torch.tensor([prompt + ids])
    mask = torch.tensor([[False] * (len(prompt) - 1) + [True] * len(ids)])
    score = scorer(tokens, mask, None, None).item()
    score = score if ids[-1] == tokenizer.eot_token else min(score, cfg.no_eos_score)
    kl = sum(row['logprob'] - row['ref logprob'] for row in responses)
    assert sum(row['reward'] for row in responses) == pytest.approx(score - cfg.beta * kl, abs=1e-5)
    for t, row in enumerate(responses):
        values = [later['value'] for later in responses[t:]] + [0.0]
        deltas = [later['reward'] + values[i + 1] - values[i]
                  for i, later in enumerate(responses[t:])]
        expected = sum(cfg.gae_lambda ** i * delta for i, delta in enumerate(deltas))
        assert row['advantage'] == pytest.approx(expected, abs=1e-4)


def test_a_pair_sums_to_its_margin(dpo_run):
    """Sums under the reference are those that the run has kept, the columns margin add up to DPO's
    margin, push is the loss's numerical slope, and 0 where the sides begin alike."""
    saved = load_checkpoint(dpo_run, ['dpo'])
    cfg = train_dpo.Config(**saved['config'])
    for i, table in enumerate(look_at(dpo_run, first=2, rows=2), 2):
        sides = table['parts'].values()
        sums, refs = ([sum(numbers(rows, name)) for rows in sides]
                      for name in ('logprob', 'ref logprob'))
        assert refs == pytest.approx(saved['ref_val'][:, i].tolist(), abs=1e-4)

        def loss(chosen=0.0, rejected=0.0):
            return train_dpo.losses_and_margins(cfg, *torch.tensor(
                [sums[0] + chosen, sums[1] + rejected, *refs], dtype=torch.double))
        assert sum(sum(numbers(rows, 'margin')) for rows in sides) == pytest.approx(
            loss()[1].item(), abs=1e-5)
        alike = next(t for t, (a, b) in enumerate(zip(*sides)) if a['y'] != b['y'])
        for side, rows in table['parts'].items():
            slope = (loss(**{side: 1e-4})[0] - loss(**{side: -1e-4})[0]).item() / 2e-4
            assert [row['push'] for row in rows[:alike]] == [0.0] * alike and alike > 1
            assert numbers(rows[alike:], 'push') == pytest.approx(
                [-slope] * len(rows[alike:]), rel=1e-3)


def test_a_reward_model_scores_every_prefix(rm_run):
    """score is what the response cut off after y would get alone, change its differences; pairs,
    and a response that was typed."""
    saved = load_checkpoint(rm_run, ['rm'])
    model = load_model(ScalarGPT, saved, 'reward_model', 'cpu')
    tables = [*look_at(rm_run), *look_at(rm_run, prompt='say b:', response='bb!')]
    assert [list(table['parts']) for table in tables] == [['chosen', 'rejected'], ['y']]
    for table in tables:
        for rows in table['parts'].values():
            tokens = list(table['title'].encode())
            with torch.no_grad():
                scores = [model(torch.tensor([tokens]))[0, -1].item() - saved['shift']]
                for row in rows[1:]:
                    tokens.append(256 if row['y'] == 'EOS' else ord(row['y']))
                    scores.append(model(torch.tensor([tokens]))[0, -1].item() - saved['shift'])
            assert numbers(rows, 'score') == pytest.approx(scores[1:], abs=1e-4)
            assert numbers(rows, 'change') == pytest.approx(
                [b - a for a, b in zip(scores, scores[1:])], abs=1e-4)
    assert ''.join(row['y'] for row in tables[1]['parts']['y'][1:]) == ' bb!EOS'
    assert tables[1]['notes'] == [f'score {scores[-1]:.3f}']


def test_responses_under_a_policy(sft_run, dpo_run, ppo_run):
    """A held-out demonstration under SFT's policy; a typed response under DPO's and PPO's, with the
    kl to the reference; PPO's pairs are DPO's with its own reference and beta."""
    [table] = look_at(sft_run)
    saved, rows = load_checkpoint(sft_run, ['sft']), table['parts']['y']
    prompt = list(table['title'].encode())
    ids = prompt + [256 if row['y'] == 'EOS' else ord(row['y']) for row in rows[1:]]
    tokens = torch.tensor([ids])
    mask = torch.arange(1, len(ids))[None] >= len(prompt)
    logprobs = token_logprobs(load_model(GPT, saved, 'policy', 'cpu'), tokens[:, :-1],
                              tokens[:, 1:], mask)
    assert numbers(rows, 'logprob') == pytest.approx(logprobs[mask].tolist(), abs=1e-5)
    for run in (dpo_run, ppo_run[0]):
        [table] = look_at(run, prompt='say b:', response=' b!')
        for row in table['parts']['y']:
            assert row['kl'] == pytest.approx(row['logprob'] - row['ref logprob'], abs=1e-6)
    pairs = [look_at(run, pairs=True)[0] for run in (dpo_run, ppo_run[0])]
    assert pairs[0]['title'] == pairs[1]['title'] and pairs[0]['numbers'] == pairs[1]['numbers']


def edited(run, folder, edit):
    """A copy of a run whose checkpoint was edited."""
    saved = torch.load(run / 'ckpt.pt', weights_only=True)
    edit(saved)
    folder.mkdir()
    torch.save(saved, folder / 'ckpt.pt')
    return folder


def test_a_typed_response_has_the_numbers_of_a_sampled_one(ppo_run, tmp_path):
    """PPO's logprobs are at its temperature, in the rollout and of what is typed."""
    run = edited(ppo_run[0], tmp_path / 'cool', lambda saved: saved['config'].update(
        temperature=0.5))
    [sampled] = look_at(run, prompt='say b: ')      # so that no space is put before the response
    *text, end = [row['y'] for row in sampled['parts']['y'][1:]]
    assert end == 'EOS' and text
    [typed] = look_at(run, prompt='say b: ', response=''.join(text))
    for name in ('logprob', 'ref logprob', 'kl'):
        assert numbers(typed['parts']['y'], name) == pytest.approx(
            numbers(sampled['parts']['y'], name), abs=1e-5)


def test_a_response_without_eos_says_what_its_score_counts(ppo_run, tmp_path):
    """At most no_eos_score; its rewards add up to that."""
    run = edited(ppo_run[0], tmp_path / 'short', lambda saved: saved['config'].update(
        max_new_tokens=1, no_eos_score=-50.0, beta=0.0))
    [table] = look_at(run, prompt='say b:')
    assert re.fullmatch(r'score -?[\d.]+, without EOS counted as -50.000, beta 0.0',
                        table['notes'][0])
    assert numbers(table['parts']['y'], 'reward') == [-50.0]


def test_a_pair_parts_where_one_side_ends():
    """A side that was cut is followed by pads, and a pad's id is that of a real token."""
    grid = {'y': torch.tensor([[5, 7, 0], [5, 7, 0]]), 'logprob': torch.zeros(2, 3),
            'mask': torch.tensor([[False, True, False], [False, True, True]]),
            'ref logprob': torch.zeros(2, 3)}
    grid, _ = look.pair_columns(train_dpo.Config(beta=1.0), grid, torch.zeros(2, 3))
    assert grid['push'][:, 1:].tolist() == [[0.0, 0.5], [0.0, -0.5]]


def test_a_reference_or_reward_that_has_changed_is_refused(ppo_run, dpo_run, tmp_path):
    """Its numbers would not be the run's; a step past the first does not need PPO's init."""
    for name, run in (('init', dpo_run), ('init', ppo_run[0]), ('reward', ppo_run[0])):
        copy = edited(run, tmp_path / f'{run.name}-{name}', lambda saved: saved['inputs'].update(
            {name: 'of other weights'}))
        with pytest.raises(UserError, match='has changed since the run was made from it'):
            look_at(copy, step=0 if run is ppo_run[0] else -1)
    assert look_at(tmp_path / 'ppo-init')


def test_the_page_has_the_same_numbers_and_no_foreign_text(ppo_run, dpo_run, tmp_path, capsys):
    """One file with every line that was printed; what a user typed is text, and nothing is fetched
    from elsewhere. Pairs are side by side."""
    page = tmp_path / 'new' / 'look.html'
    look_at(ppo_run[0], prompt='<b onload=x>&', response='<i>\x1b[31m', html=str(page))
    plain = re.sub('<[^>]*>', '', page.read_text()[page.read_text().index('<pre>'):])
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == ['x', 'y'])
    unescaped = plain.replace('&lt;', '<').replace('&gt;', '>').replace('&amp;', '&')
    assert unescaped.strip('\n') == '\n'.join(lines[start:-1])
    assert lines[-1] == f'wrote {page}'
    assert not re.search('<b|<i>|\x1b|http|<script|src=|url', page.read_text())

    [table] = look_at(dpo_run, html=str(page))
    head, *lines = capsys.readouterr().out.splitlines()[-len(max(table['parts'].values(),
                                                                 key=len)) - 2:-1]
    assert head.split().count('margin') == 2 and len({line.index('|') for line in lines}) == 1
    assert '<th>chosen<th>rejected' in page.read_text()


def test_tokens_are_coloured_in_a_terminal(ppo_run, monkeypatch, capsys):
    """By the last column or by --color: blue above 0, orange below, as strong as the number is
    large; the text is the same, and NO_COLOR switches it off."""
    monkeypatch.delenv('NO_COLOR', raising=False)
    plain, shown = [], {}
    for color in ('', 'kl'):
        [table] = look_at(ppo_run[0], step=2, color=color)
        plain.append(capsys.readouterr().out)
        with monkeypatch.context() as patch:
            patch.setattr(sys.stdout, 'isatty', lambda: True)
            look_at(ppo_run[0], step=2, color=color)
            shown[color] = capsys.readouterr().out
            patch.setenv('NO_COLOR', '1')
            look_at(ppo_run[0], step=2, color=color)
        assert capsys.readouterr().out == re.sub('\x1b\\[[0-9;]*m', '', shown[color]) == plain[-1]
        rows = table['parts']['y']
        strongest = max(rows, key=lambda row: abs(row[color or 'whitened']))
        code = 75 if strongest[color or 'whitened'] > 0 else 208
        assert re.search(f'48;5;{code}m *{re.escape(strongest["y"])}\x1b', shown[color])
    assert shown[''] != shown['kl'] and plain[0] == plain[1]


def test_mistakes_are_told(ppo_run, sft_run, dpo_run, rm_run):
    """No run, a step that was not kept, and what a stage has not."""
    with pytest.raises(UserError, match='name one run'):
        look.main(look.Config())
    for message, run, changes in (
            (r'ckpt-7\.pt: no such checkpoint; --keep has kept those of \[1, 2, 3\]', ppo_run[0],
             dict(step=7)),
            (r'ckpt-1\.pt: .* of no step', dpo_run, dict(step=1)),
            ('or a --prompt without a --response', sft_run, dict(prompt='say b:')),
            ('or a --prompt without a --response', ppo_run[0], dict(prompt='say b:', pairs=True)),
            ('only a rollout of PPO', dpo_run, dict(step=0)),
            ('--first=8 --rows=1: there are no such rows', ppo_run[0], dict(first=8)),
            ('--first=99 --rows=1: there are no such rows', rm_run, dict(first=99)),
            ('and a --prompt', rm_run, dict(response='b')),
            ('--color=push: one of score, change', rm_run, dict(color='push'))):
        with pytest.raises(UserError, match=message):
            look_at(run, **changes)
