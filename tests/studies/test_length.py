"""
studies/length.py, its language (studies/lengths.py) and the GPT it trains.

    python -m pytest -q tests/studies/test_length.py
"""
import json, math, statistics

import pytest
import torch

import train_rm, train_sft
from conftest import randomize
from data.text import load_text
from prefgpt import (GPT, ScalarGPT, UserError, generate, last_scores, load_checkpoint, load_model,
                     make_batch, rng, token_logprobs)
from studies import length, lengths
from studies.length import BETA, METHODS, N, Gpt, check, train_gpt
from studies.unified import best_of_n_loss, pref_ft_loss
from test_studies import quick_form

PAIRS = [([97, 98, 58], [97, 98, 256], [97, 256]), ([99, 97, 58], [99, 256], [97, 99, 97, 256])]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A folder with the language's data, an SFT run and a reward model, of random weights."""
    out = tmp_path_factory.mktemp('length')
    lengths.write_data(out / 'data', 0)
    common = dict(data=str(out / 'data'), steps=1, eval_every=1, device='cpu')
    train_sft.main(train_sft.Config(out=f'{out}/sft', n_head=2, n_embd=16, block_size=64,
                                    max_new_tokens=8, **common))
    saved = load_checkpoint(f'{out}/sft', ['sft'])
    policy = randomize(load_model(GPT, saved, 'policy', 'cpu'), 1)
    lengths.write_pairs(out / 'data', 0, 'Min', policy, load_text(str(out / 'data'))[0],
                        {'train': 40, 'val': 20})
    train_rm.main(train_rm.Config(init=f'{out}/sft', out=f'{out}/rm', **common))
    return out


@pytest.fixture
def gpt(runs):
    """A GPT whose weights, and its reference's and reward model's, are random and differ."""
    prompts = [[97, 98, 58], [104, 97, 58], [99, 99, 58]]
    gpt = Gpt(7, runs, prompts, 9)
    randomize(gpt.policy, 1)
    randomize(gpt.ref, 2)
    model = randomize(load_model(ScalarGPT, load_checkpoint(f'{runs}/rm', ['rm']), 'reward_model',
                                 'cpu'), 3)
    gpt.scorer = lambda tokens, mask, prompts, texts: last_scores(model, tokens, mask)
    return gpt


def test_demonstrations(runs):
    """Two letters of the prompt, 20 of them give or take 5; every tenth prompt is held out."""
    rows, held_out = (read(runs / 'data' / f'{split}.sft.jsonl') for split in ('train', 'val'))
    ns = [len(row['completion']) for row in rows]
    assert len(rows) == 4000 and min(ns) >= 1 and max(ns) <= 39
    assert statistics.fmean(ns) == pytest.approx(20, abs=0.3)
    assert statistics.stdev(ns) == pytest.approx(5, abs=0.3)
    assert all(set(row['completion']) <= set(row['prompt'][:2]) for row in rows)
    assert not {row['prompt'] for row in rows} & {row['prompt'] for row in held_out}
    assert len({row['prompt'] for row in rows + held_out}) == 64


def test_gold_by_hand():
    """Minus the length, or minus its distance from the mode."""
    assert [lengths.gold(task, 'abbba', 18) for task in ('Min', 'Skew', 'Mode')] == [-5, -5, -13]
    assert lengths.gold('Mode', 'a' * 21, 18) == -3 and lengths.gold('Min', '', 18) == 0


@pytest.mark.parametrize('task', ['Min', 'Mode', 'Skew'])
def test_pairs(task, runs, tmp_path):
    """As often in order as sigmoid(0.3 gap) says; on Skew 39 - n has mean 6, else the lengths are
    the policy's own, which ends at random here. The mode is the policy's mean on every task."""
    saved = load_checkpoint(f'{runs}/sft', ['sft'])
    policy, (tokenizer, _) = load_model(GPT, saved, 'policy', 'cpu'), load_text(str(runs / 'data'))
    with torch.no_grad():       # EOS as likely as all others together: geometric lengths
        policy.ln_f.weight.zero_()
        policy.ln_f.bias.fill_(1.0)
        policy.wte.weight.fill_(0.0)
        policy.wte.weight[256] = math.log(5.0) / policy.config.n_embd
        policy.wte.weight[:97], policy.wte.weight[123:256] = -10.0, -10.0
    mode = lengths.write_pairs(tmp_path, 0, task, policy, tokenizer, {'train': 1000, 'val': 20})
    prompts = [tokenizer.encode(p) for p in lengths.prompts_of('train')] * 20
    _, mask = generate(policy, prompts, 40, 256, generator=rng(0, 0, 'eval'))
    assert 3 < mode < 15 and abs(mode - (mask.sum(1) - 1.0).mean()) < 1
    rows = read(tmp_path / 'train.pairs.jsonl')
    gaps = [lengths.gold(task, row['chosen'], mode) - lengths.gold(task, row['rejected'], mode)
            for row in rows]
    sure = [1 / (1 + math.exp(-0.3 * abs(gap))) for gap in gaps if gap]
    right = statistics.fmean(gap > 0 for gap in gaps if gap)
    assert right == pytest.approx(statistics.fmean(sure), abs=0.06)
    ns = [len(row[side]) for row in rows for side in ('chosen', 'rejected')]
    assert all('' != row['chosen'] != row['rejected'] != '' for row in rows)
    if task == 'Skew':
        assert statistics.fmean(ns) == pytest.approx(39 - 6, abs=0.6) and len(rows) > 970
    else:
        assert statistics.fmean(ns) < 15 and 700 < len(rows) <= 1000
    lengths.write_pairs(tmp_path, 0, task, policy, tokenizer, {'train': 1000, 'val': 20})
    assert read(tmp_path / 'train.pairs.jsonl') == rows


def test_a_collection(gpt):
    """B / N prompts, N responses each; all numbers again row by row, on a grid of its own. What did
    not end earns -1 at most."""
    batch, capped = gpt.collect(8, k=3), 0
    T = batch['old_logprobs'].shape[2]
    assert batch['old_logprobs'].shape == (2, N, T) and batch['tokens'].shape == (2, N, T + 1)
    for g in range(2):
        prompts = {tuple(row[:3].tolist()) for row in batch['tokens'][g]}
        assert len(prompts) == 1 and list(prompts.pop()) in gpt.prompts
        for n in range(N):
            mask = batch['response_mask'][g, n]
            end = int(mask.nonzero().max()) + 2
            row = batch['tokens'][g, n, :end].tolist()
            tokens, x, y, alone = make_batch([(row[:3], row[3:])])
            for name, model in (('old_logprobs', gpt.policy), ('ref_logprobs', gpt.ref)):
                logprobs = token_logprobs(model, x, y, alone)[0]
                assert (batch[name][g, n, :end - 1] - logprobs).abs().max() < 1e-4
                assert (batch[name][g, n, end - 1:] == 0).all()
            score = gpt.scorer(tokens, alone, None, None).item()
            ended = row[-1] == gpt.tokenizer.eot_token
            capped += score > -1 and not ended
            expected = score if ended else min(score, -1.0)
            assert batch['scores'][g, n].item() == pytest.approx(expected, abs=1e-4)
    assert 0 < capped < 8
    assert torch.equal(gpt.collect(8, 3)['tokens'], batch['tokens'])
    assert gpt.collect(8, 4)['tokens'].tolist() != batch['tokens'].tolist()


def test_advantages_are_what_is_still_to_come(gpt):
    """score - beta times the log-ratios from here on, whitened over all response tokens."""
    batch = gpt.collect(8, 0)
    mask, to_come = batch['response_mask'], torch.zeros_like(batch['old_logprobs'])
    ratios = batch['old_logprobs'] - batch['ref_logprobs']
    for g, n, t in mask.nonzero().tolist():
        to_come[g, n, t] = batch['scores'][g, n] - BETA * ratios[g, n, t:].sum()
    values = to_come[mask]
    expected = (to_come - values.mean()) / values.std(correction=0)
    assert (batch['advantages'] - expected)[mask].abs().max() < 1e-3
    assert (batch['advantages'][~mask] == 0).all()


def test_pairs_are_groups_of_two(gpt):
    """chosen first; old logprobs under the policy as it is, and 0 outside the response."""
    batch = gpt.given(PAIRS)
    assert batch['scores'].tolist() == [[1, 0], [1, 0]]
    for g, (prompt, *both) in enumerate(PAIRS):
        for n, response in enumerate(both):
            _, x, y, mask = make_batch([(prompt, response)])
            expected = token_logprobs(gpt.policy, x, y, mask).sum().item()
            assert batch['old_logprobs'][g, n].sum().item() == pytest.approx(expected, abs=1e-4)
    assert (gpt.logprobs_of(batch) - batch['old_logprobs']).abs().max() < 1e-5


def test_what_is_measured(gpt):
    """Against the definitions, from the same samples."""
    prompts, pairs = 20 * gpt.prompts, PAIRS[:1]
    gpt.collected.load_state_dict(gpt.ref.state_dict())
    numbers = gpt.measure(lambda prompt, text: len(prompt) + 10 * len(text), prompts, pairs)
    tokens, mask, scores, texts = gpt.sample(prompts, rng(7, 0, 'eval'))
    now, ref = (token_logprobs(model, tokens[:, :-1], tokens[:, 1:], mask)
                for model in (gpt.policy, gpt.ref))
    assert numbers['gold'] == pytest.approx(3 + 10 * statistics.fmean(map(len, texts)))
    assert numbers['score'] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert numbers['kl'] == pytest.approx(((now - ref).sum() / 60).item(), abs=1e-3)
    assert numbers["kl_collect"] == pytest.approx(numbers["kl"], abs=1e-5)      # ref "sampled"
    assert numbers['entropy'] == pytest.approx((-now.sum() / mask.sum()).item(), abs=1e-4)
    assert numbers['length'] == pytest.approx(mask.sum().item() / 60)
    given = gpt.given(pairs)
    ours, refs = given['old_logprobs'].sum(-1)[0], given['ref_logprobs'].sum(-1)[0]
    assert [numbers['chosen'], numbers['rejected']] == pytest.approx(ours.tolist(), abs=1e-4)
    assert numbers['margin'] == pytest.approx(
        BETA * ((ours[0] - refs[0]) - (ours[1] - refs[1])).item(), abs=1e-4)


def test_training_on_pairs_and_on_samples(gpt):
    """Pref-FT raises the chosen side. Best-of-N with a score that likes short text shortens, and
    kl_collect is of the last collection; clip_frac is 0 where each sample is used once."""
    pairs = PAIRS[:1] * 8
    before = gpt.given(pairs)['old_logprobs'].sum(-1)[:, 0].mean()
    size = dict(collections=15, B=32, M=32)
    train_gpt(gpt, pref_ft_loss, 3e-3, {**size, 'M': 8}, 2, pairs)
    assert gpt.given(pairs)['old_logprobs'].sum(-1)[:, 0].mean() > before + 1
    gpt.scorer = lambda tokens, mask, prompts, texts: -mask.sum(1).float()
    lengths_before = gpt.sample(40 * gpt.prompts, rng(0, 0, 'eval'))[1].sum().item()
    assert train_gpt(gpt, best_of_n_loss, 3e-3, size, 1) == 0.0
    assert gpt.sample(40 * gpt.prompts, rng(0, 0, 'eval'))[1].sum().item() < 0.8 * lengths_before
    moved = [(a - b).abs().max().item() for a, b in zip(gpt.policy.parameters(),
                                                       gpt.collected.parameters())]
    assert 0 < max(moved) < 0.01                    # one step from the policy that sampled last


def test_an_order_holds_by_two_standard_errors_only(capsys, monkeypatch):
    """1.9 standard errors are open, 2.1 hold, -2.1 are the other way; one seed says nothing."""
    monkeypatch.setattr(length, 'CHAINS', {'Min': [('reference', 'DPO')]})
    for gap, above, verdict in ((1.9, 3, 'open'), (2.1, 3, 'holds'), (-2.1, 0, 'the other way')):
        spread = 3 ** 0.5               # of gaps g - s, g, g + s the standard error is s / sqrt 3
        rows = [{'seed': seed, 'task': 'Min', 'method': method, 'gold': gold}
                for seed in (2, 0, 1) for method, gold in (
                    ('DPO', seed + gap + spread * (seed - 1)), ('reference', float(seed)))]
        lost = check(rows)
        assert capsys.readouterr().out.endswith(
            f': in {above} of 3 seeds, by {gap:.2f} ± 1.00: {verdict}\n')
        assert lost == ([] if verdict == 'holds' else [('Min', 'reference', 'DPO')])
    check(rows[:2])
    assert capsys.readouterr().out.endswith('± inf: open\n')


def test_mode_is_judged_by_how_far_apart_the_means_are(capsys):
    """1.6 apart are alike and 1.8 are not; the reference may be anywhere, and single seeds too."""
    for gap, alike in ((1.6, True), (1.8, False)):
        rows = [{'seed': seed, 'task': 'Mode', 'method': method, 'gold': gold + 3 * seed}
                for seed in (0, 1) for method, gold in (
                    ('reference', -9.0), ('DPO', -2.0), ('PPO', -2.0 + gap))]
        assert check(rows) == ([] if alike else [('Mode', 'alike')])
        assert capsys.readouterr().out.endswith(': holds\n') == alike


def test_length_in_its_quick_form(tmp_path, monkeypatch, capsys):
    """All methods on all three tasks, one number each of everything; of one task, if so asked."""
    rows = quick_form('length', tmp_path, monkeypatch, capsys)
    assert len(rows) == 3 * (1 + len(METHODS))
    assert [row['method'] for row in rows if row['task'] == 'Min'] == ['reference', *METHODS]
    assert all(1 <= row['mode'] <= 40 for row in rows)
    assert rows[0]['kl'] == rows[0]['margin'] == rows[0]['clip_frac'] == 0
    assert all(isinstance(row[name], (int, float)) for row in rows for name in (
        'gold', 'score', 'kl', 'kl_collect', 'entropy', 'chosen', 'rejected', 'margin',
        'clip_frac', 'length'))
    assert rows[0]['command'] == 'python -m studies.length --tasks=Min --seeds=3'
    length.main(length.Config(seeds='3', tasks='Mode', quick=True))
    shown = capsys.readouterr().out
    assert 'Mode PPO' in shown and 'Min' not in shown and 'alike' not in shown
    with pytest.raises(UserError, match='--tasks'):
        length.main(length.Config(tasks='Max'))
