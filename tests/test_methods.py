"""
Checks the losses, estimators and loops of the four stages against numbers by hand and plain loops.

Whole stages are checked through main(): the gradient of a step, however its batch is cut or padded,
and what a run may not touch.
"""
import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F

import data.text
import prefgpt
import tools.evaluate
import tools.sample
import train_dpo
import train_ppo
import train_rm
import train_sft
from conftest import (AB_MERGED, EOS, STAGES, Table, known, log_rows, read_log, record, same,
                      save_tiny_run, tiny_gpt, tiny_scalar, write_jsonl)
from data.text import encode_rows, load_split, load_text
from prefgpt import (GPT, ScalarGPT, UserError, adamw, batches, learning_rate, load_checkpoint,
                     load_model, optimizer_step, rng)
from train_dpo import all_logprobs, dpo_loss, ipo_loss, log_ratio, pair_logprobs
from train_ppo import (cap_unfinished, gae, load_scorer, policy_loss, rollout, rollout_metrics,
                       token_rewards, update_ema, update_metrics, value_loss, whiten)
from train_rm import all_scores, reward_loss, score_pairs

LN2 = math.log(2)
CPU = torch.device('cpu'), torch.autocast('cpu', enabled=False)


def close(ours, expected, tolerance=1e-6):
    """Asserts that a tensor equals a (nested) list of numbers, to an absolute tolerance."""
    expected = torch.tensor(expected, dtype=torch.double)
    torch.testing.assert_close(ours.detach().double(), expected, rtol=0, atol=tolerance)


def loop_logprob(policy, prompt, response):
    """Returns log p of a response, added up token by token, from the row alone."""
    logprobs = policy.logits(policy(torch.tensor([prompt + response])))[0].log_softmax(-1)
    return sum(logprobs[len(prompt) + t - 1, token] for t, token in enumerate(response))


# ----------------------------------------------------------------------------- pair losses

def test_reward_loss_by_hand():
    """I20, reward model: the loss is ln 2 at equality, log(1 + e^-d) at difference d. The gradient
    is -sigmoid(-d) in the chosen score and its negative in the rejected one. Catches the two
    swapped."""
    chosen = torch.tensor([3., 1., -2.], requires_grad=True)
    rejected = torch.tensor([3., 2., -4.], requires_grad=True)
    loss = reward_loss(chosen, rejected)
    # d = 0, -1, 2
    close(loss, [LN2, math.log(1 + math.e), math.log(1 + math.exp(-2))])
    loss.sum().backward()
    expected = [-1 / 2, -1 / (1 + math.exp(-1)), -1 / (1 + math.exp(2))]
    close(chosen.grad, expected)
    close(rejected.grad, [-g for g in expected])


def test_dpo_and_ipo_loss_by_hand():
    """I20: h = (-3 - -4) - (-6 - -5) = 2, times beta 0.5 is a margin of 1; chosen and rejected
    swapped negate it. I13: policy == reference gives ln 2. IPO pulls h to 1 / (2 beta), 1 at beta
    0.5 and 2 at 0.25, with the gradient 2 (h - target); at the reference its loss is
    1 / (4 beta^2). Catches a target of 1 / beta, and a sum of the two log-ratios."""
    chosen, rejected, ref_chosen, ref_rejected = (torch.tensor([z]) for z in (-3., -6., -4., -5.))
    sides = chosen.requires_grad_(), rejected, ref_chosen, ref_rejected
    swapped, unmoved = (rejected, chosen, ref_rejected, ref_chosen), (chosen, rejected) * 2
    close(log_ratio(*sides), [2.])
    close(dpo_loss(*sides, 0.5), [math.log(1 + 1 / math.e)])
    close(dpo_loss(*swapped, 0.5), [math.log(1 + math.e)])
    close(dpo_loss(*unmoved, 0.5), [LN2])
    close(ipo_loss(*sides, 0.25), [0.])
    close(ipo_loss(*swapped, 0.5), [9.])
    close(ipo_loss(*unmoved, 0.1), [25.])
    loss = ipo_loss(*sides, 0.5)
    close(loss, [1.])
    loss.sum().backward()
    close(chosen.grad, [2.])


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_dpo_loss_and_gradient_in_closed_form(smoothing):
    """I20: the loss is -(1-e) log s(m) - e log s(-m), its slope in the chosen logprob
    beta (s(m) - (1-e)), in the rejected one the negative. Catches e and 1-e swapped."""
    beta, numbers = 0.3, [[-3., -7.5, -2.], [-6., -2., -2.], [-4., -4., -9.], [-5., -3., -1.]]
    c, r, ref_c, ref_r = (torch.tensor(z, dtype=torch.double, requires_grad=i < 2)
                          for i, z in enumerate(numbers))
    loss = dpo_loss(c, r, ref_c, ref_r, beta, smoothing)
    loss.sum().backward()
    for i, (a, b, ref_a, ref_b) in enumerate(zip(*numbers)):
        s = 1 / (1 + math.exp(-beta * ((a - ref_a) - (b - ref_b))))
        slope = beta * (s - (1 - smoothing))
        assert [loss[i].item(), c.grad[i].item(), r.grad[i].item()] == pytest.approx(
            [-(1 - smoothing) * math.log(s) - smoothing * math.log(1 - s), slope, -slope],
            abs=1e-12)


def test_dpo_sums_logprobs_of_responses_alone():
    """I20: summed logprobs of a 3-token table, by hand. Catches a mean for the sum, EOS left out,
    and tokens of the prompt counted."""
    probabilities = [[.50, .25, .25], [.10, .20, .70], [.60, .30, .10]]     # p(column | row)
    # After 1: 2, 0, 2 and after 1: 0. Then the prompt 2 alone: 0, and 1, 1
    pairs = [([0, 1], [2, 0, 2], [0]), ([2], [0], [1, 1])]
    expected = torch.tensor([[.7 * .6 * .25, .6], [.1, .3 * .2]], dtype=torch.double).log()
    close(pair_logprobs(Table(probabilities), pairs, 'cpu'), expected.tolist(), 1e-12)
    probabilities[0] = [.05, .05, .90]          # row 0 is met inside the first prompt...
    pairs = [([0, 1], [2, 1], [1])]             # ... and never in these responses
    close(pair_logprobs(Table(probabilities), pairs, 'cpu'),
          [[math.log(.7 * .3)], [math.log(.2)]], 1e-12)


def random_pairs(count):
    """Returns pairs of random ids below 16, of random lengths."""
    dice = random.Random(0)
    return [tuple([dice.randrange(16) for _ in range(dice.randint(1, most))] for most in (9, 7, 7))
            for _ in range(count)]


@torch.no_grad()
def test_scores_and_logprobs_of_pairs_keep_their_order():
    """I3: both sides of the pairs share a forward pass, and all_logprobs sorts pairs by length:
    each number is still that of its own row alone, the chosen side first. Catches numbers handed
    to another pair; 70 pairs are 35 batches."""
    policy, model, pairs = tiny_gpt(), tiny_scalar(seed=1), random_pairs(70)
    out, scores = all_logprobs(policy, pairs, 2, *CPU), score_pairs(model, pairs, 'cpu')
    torch.testing.assert_close(all_scores(model, pairs, 3, *CPU), scores, rtol=0, atol=1e-5)
    for i, (prompt, *sides) in enumerate(pairs):
        for side, response in enumerate(sides):
            score = model(torch.tensor([prompt + response]))[0, -1].item()
            expected = loop_logprob(policy, prompt, response).item()
            assert out[side, i].item() == pytest.approx(expected, abs=1e-4)
            assert scores[side, i].item() == pytest.approx(score, abs=1e-5)


# ----------------------------------------------------------------------------- PPO's estimators

# Prompts of 2, 1 and 3 tokens; responses of 3, 5 and 1
MASK = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0]]).bool()


def test_token_rewards_by_hand():
    """I16: -beta (logprob - ref_logprob) on every response token, EOS too, plus the score on the
    last one. Catches the score one slot late or in the last column, a reward on the prompt, and
    the sign of the KL."""
    logprobs = torch.tensor([[9., -1, -2, -3, 9, 9], [-1, -1, -1, -1, -1, 9], [9, 9, -2, 9, 9, 9]])
    ref = torch.tensor([[7., -2, -2, -1, 7, 7], [-1, -1, -1, -1, -3, 7], [7, 7, -2, 7, 7, 7]])
    rewards = token_rewards(torch.tensor([10., 20., -1.]), logprobs, ref, MASK, beta=0.5)
    # -0.5 * (-1 - -2) = -0.5;   10 - 0.5 * (-3 - -1) = 11;   20 - 0.5 * (-1 - -3) = 19
    close(rewards, [[0, -0.5, 0, 11, 0, 0], [0, 0, 0, 0, 19, 0], [0, 0, -1, 0, 0, 0]])


def reference_gae(rewards, values, gamma, gae_lambda):
    """Returns A_t = sum over k of (gamma lambda)^k delta_t+k, for one response's numbers."""
    n, after = len(rewards), values[1:] + [0.0]
    return [sum((gamma * gae_lambda) ** k
                * (rewards[t + k] + gamma * after[t + k] - values[t + k]) for k in range(n - t))
            for t in range(n)]


@pytest.mark.parametrize('gamma, gae_lambda', [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize('outside', [0.0, 100.0, math.nan])
def test_gae_against_a_double_loop(gamma, gae_lambda, outside):
    """I16: responses of 1, 2, 4 and all 7 tokens; the value after the last token is 0. Catches
    lambda left out. I2: whatever prompts and padding hold, NaN even, changes nothing."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(4, 7, dtype=torch.bool)
    spans = [(3, 4), (0, 2), (2, 6), (0, 7)]
    for b, (start, end) in enumerate(spans):
        mask[b, start:end] = True
    rewards, values = (torch.randn(4, 7, generator=generator, dtype=torch.double)
                       .masked_fill(~mask, outside) for _ in range(2))
    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
    for b, (start, end) in enumerate(spans):
        own = values[b, start:end].tolist()
        expected = reference_gae(rewards[b, start:end].tolist(), own, gamma, gae_lambda)
        close(advantages[b, start:end], expected, 1e-12)
        close(returns[b, start:end], [a + v for a, v in zip(expected, own)], 1e-12)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_gae_by_hand():
    """I16: two tokens, gamma 1/2, lambda 1/2: delta_1 = 4 - 2 = 2, delta_0 = 1 + 1/2 * 2 - 1 = 1,
    A_1 = 2, A_0 = 1 + 1/4 * 2 = 1.5, returns 1.5 + 1 and 2 + 2."""
    advantages, returns = gae(torch.tensor([[1., 4.]]), torch.tensor([[1., 2.]]),
                              torch.ones(1, 2, dtype=torch.bool), 0.5, 0.5)
    close(advantages, [[1.5, 2.]])
    close(returns, [[2.5, 4.]])


def test_whiten():
    """I17: mean 0 and biased deviation 1 over the mask alone, and 0 outside, NaN there or not.
    Catches padding that counts, and the variance of a single token, which must not be NaN."""
    x = torch.tensor([[math.nan, 1., 3.], [99., 99., 99.]])
    mask = torch.tensor([[False, True, True], [False, False, False]])
    close(whiten(x, mask), [[0, -1, 1], [0, 0, 0]])         # mean 2, variance (1 + 1) / 2 = 1
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)) * 5 + 3
    white = whiten(x, MASK)[MASK]
    assert white.mean().item() == pytest.approx(0, abs=1e-6)
    assert (white ** 2).mean().item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(x[MASK].argsort(), white.argsort())
    assert whiten(torch.tensor([[7.]]), torch.tensor([[True]])).tolist() == [[0.]]


def test_cap_unfinished_by_hand():
    """I16: a response that ended is never capped, however high its score; one that did not end gets
    min(score, no_eos_score). Catches the two swapped, and max for min."""
    scores = torch.tensor([5., 5., -3., -3., -1., -1.])
    ended = torch.tensor([True, False, True, False, True, False])
    close(cap_unfinished(scores, ended, -1.0), [5., -1., -3., -3., -1., -1.])
    close(cap_unfinished(scores, ended, 7.0), scores.tolist())      # a cap above them all
    assert scores.tolist() == [5., 5., -3., -3., -1., -1.]          # what is logged stays raw


def test_policy_loss_in_every_clip_case():
    """I7, PPO's loss: with clip_eps 0.2 the ratio of a good token counts up to 1.2, that of a bad
    one down to 0.8, with no gradient past that; the other way nothing is clipped. Catches min for
    max, and the sign of the advantage."""
    #    ratio    A   loss                            d loss / d logprob = -A ratio, or 0
    cases = [(1.0, 2.0, -2.0, -2.0),
             (1.1, 2.0, -2.2, -2.2),
             (1.5, 1.0, -1.2, 0.0),         # good and already likelier: enough
             (0.5, 1.0, -0.5, -0.5),        # good but less likely: the full pull
             (1.5, -1.0, 1.5, 1.5),         # bad but likelier: the full push
             (0.5, -1.0, 0.8, 0.0)]         # bad and already less likely: enough
    ratio, advantages, losses, slopes = torch.tensor(cases).T
    old = torch.linspace(-3, -1, len(cases))
    logprobs = (old + ratio.log()).requires_grad_()
    loss, ratio_out = policy_loss(logprobs, old, advantages, 0.2)
    loss.sum().backward()
    close(loss, losses.tolist())
    close(ratio_out, ratio.tolist())
    close(logprobs.grad, slopes.tolist())


def test_value_loss_in_every_clip_case():
    """I7, the value loss: with vf_clip 0.5 around the rollout's value of 1 it is half the larger of
    plain and clipped error, without a gradient where the clipped one is larger; vf_clip 0 is half
    the square. Catches a clip around the return, and the smaller error taken."""
    #    V    R     max of plain and clipped, halved               slope
    cases = [(2., 0., max(4, 1.5 ** 2) / 2, 2.0),           # moved away from R: plain
             (2., 3., max(1, 1.5 ** 2) / 2, 0.0),           # moved too fast towards R: clipped
             (1.2, 3., 1.8 ** 2 / 2, -1.8),                 # within the clip: both are the same
             (-1., -2., max(1, 2.5 ** 2) / 2, 0.0),         # too fast downwards: .5 - -2 = 2.5
             (0., 2., max(4, 1.5 ** 2) / 2, -2.0)]          # away, downwards: plain
    v, returns, losses, slopes = torch.tensor(cases).T
    values = v.clone().requires_grad_()
    loss = value_loss(values, torch.ones(5), returns, 0.5)
    loss.sum().backward()
    close(loss, losses.tolist())
    close(values.grad, slopes.tolist())
    close(value_loss(v, torch.ones(5), returns, 0.0), [2, .5, 1.62, .5, 2])


def test_update_ema():
    """I19: the reference moves towards the policy by the rate, and the policy does not move; equal
    weights stay equal bit for bit, and rate 1 copies. Catches 1 - rate for rate."""
    ref, policy = tiny_gpt(seed=0), tiny_gpt(seed=1)
    before, kept = [p.clone() for p in ref.parameters()], [p.clone() for p in policy.parameters()]
    update_ema(ref, policy, 0.25)
    for r, b, p, k in zip(ref.parameters(), before, policy.parameters(), kept):
        torch.testing.assert_close(r, 0.75 * b + 0.25 * p, rtol=0, atol=1e-6)
        assert torch.equal(p, k)
    equal = tiny_gpt(seed=1)
    update_ema(equal, policy, 0.005)
    update_ema(ref, policy, 1.0)
    assert same(equal.state_dict(), policy.state_dict())
    assert same(ref.state_dict(), policy.state_dict())


# ----------------------------------------------------------------------------- the optimizer

def test_learning_rate_by_hand():
    """Of 11 steps 4 warm up, 1/4 to 4/4; then half a cosine falls from 1 over .55 to .1."""
    rates = [learning_rate(step, 11, 1.0, 4) for step in range(11)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[7] == pytest.approx(0.55)                          # half way from 4 to 10
    assert rates[6] == pytest.approx(0.1 + 0.45 * 1.5)              # a third: cos(pi/3) = 1/2
    assert rates[10] == pytest.approx(0.1)
    assert learning_rate(0, 1, 3.0, 0) == 3.0                       # a single step


def test_adamw_groups():
    """Every tensor is in one group, the tied embedding once; biases and LayerNorms do not decay."""
    model = tiny_scalar()
    decayed, plain = adamw(model, 0.1).param_groups
    assert decayed['weight_decay'] == 0.1 and plain['weight_decay'] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [[names[id(p)] for p in group['params']] for group in (decayed, plain)]
    assert sorted(groups[0] + groups[1]) == sorted(names.values())
    assert groups[1] == [name for name in names.values()
                         if name.endswith('bias') or 'ln_' in name]
    assert decayed['eps'] == 1e-8 and decayed['betas'] == (0.9, 0.95)
    assert {group['eps'] for group in adamw(model, 0.1, eps=1e-5).param_groups} == {1e-5}


def test_optimizer_step_sets_every_group_and_clips():
    """The learning rate reaches every group, the norm returned is the one before clipping, Adam
    gets the clipped gradient, and afterwards there is none."""
    model = torch.nn.Linear(2, 1, bias=True)
    optimizer = adamw(model, 0.0)
    optimizer.zero_grad()
    (3 * model.weight.sum() + 1 * model.bias.sum()).backward()      # norm sqrt(9 + 9 + 1)
    norm = optimizer_step(optimizer, model, 0.125, 1.0, 1, loss=0.5)
    assert norm == pytest.approx(math.sqrt(19), rel=1e-6)
    assert [group['lr'] for group in optimizer.param_groups] == [0.125, 0.125]
    first_moment = optimizer.state[model.bias]['exp_avg'].item()    # 0.1 of the clipped gradient
    assert first_moment == pytest.approx(0.1 / math.sqrt(19), rel=1e-4)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize('bad', [math.nan, math.inf])
@pytest.mark.parametrize('where', ['loss', 'gradient'])
def test_optimizer_step_refuses_what_is_not_finite(bad, where):
    """A loss or a gradient of nan or inf raises an error that names the step; no weight moves."""
    model = torch.nn.Linear(2, 1)
    optimizer, before = adamw(model, 0.1), [p.clone() for p in model.parameters()]
    model(torch.ones(1, 2)).sum().backward()
    if where == 'gradient':
        model.weight.grad[0, 1] = bad
    with pytest.raises(UserError, match='step 7'):
        optimizer_step(optimizer, model, 0.1, 1.0, 7, loss=bad if where == 'loss' else 1.0)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))


# ----------------------------------------------------------------------------- whole stages

@pytest.fixture
def stage(shared_data, sft_run, rm_run, tmp_path):
    """
    Returns stage(name, **options): it runs a stage's main() for two small steps in a new folder,
    with the options that its Config has, and returns the checkpoint, its optimizers by model.
    """
    numbers = itertools.count()

    def stage(name, data=shared_data, init=sft_run, rm=rm_run, out=None, **options):
        out, Config = out or tmp_path / f'{name}{next(numbers)}', STAGES[name].Config
        options = {**dict(data=str(data), init=str(init), out=str(out), reward=str(rm), steps=2,
                          batch_size=8, rollout_size=24, warmup=0, max_new_tokens=5, device='cpu'),
                   **options}
        STAGES[name].main(Config(**known(Config, options)))
        saved = load_checkpoint(out, [name])
        return {**saved, 'optimizers': dict(zip(saved['weights'], saved['optimizers']))}
    return stage


@pytest.fixture
def float64():
    """Runs in float64, where rounding is far below what a mistake does to a gradient."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_equal_gradients(runs, optimizer):
    """
    Asserts that Adam's first moments, a tenth of the first step's gradient, agree to 1e-6 of each
    tensor's norm; returns how many tensors were compared.

    It leaves out a tensor whose gradient is 0 but for rounding: a reward model's last LayerNorm
    bias, which shifts both scores alike.
    """
    whole, *others = ([state['exp_avg'] for state in run['optimizers'][optimizer]['state'].values()]
                      for run in runs)
    floor = 1e-12 * max(moment.norm() for moment in whole)
    compared = [i for i, moment in enumerate(whole) if moment.norm() > floor]
    for other in others:
        for i in compared:
            assert (other[i] - whole[i]).norm() <= 1e-6 * whole[i].norm(), (optimizer, i)
    return len(compared)


@pytest.mark.parametrize('name', STAGES)
def test_micro_batches_change_no_gradient(stage, name, float64):
    """I12: one step with the batch in one piece, in single rows, and in 3 + 3 + ... + 1 has the
    same gradients; 40 rows of the toy data are short and long. Catches the mean of means, and a
    division by the micro-batch's count. Reward and value model are compared at the second step:
    at the first only their head has a gradient. With a grad_clip that shortens every gradient, and
    PPO at temperature 0.7, it holds too. Catches each micro-batch clipped on its own."""
    options = dict(batch_size=40, rollout_size=40, ppo_epochs=1)
    for steps in (1, 2):
        runs = [stage(name, steps=steps, micro_batch_size=size, grad_clip=1e9, **options)
                for size in (0, 1, 3)]
        for model in runs[0]['optimizers']:
            # 2 embeddings, 2 blocks of 12, the last LayerNorm's two; with the head of a value
            # model, without the RM's last bias
            tensors = 28 + (model == 'value_model') if model == 'policy' or steps == 2 else 1
            assert assert_equal_gradients(runs, model) == tensors
    runs = [stage(name, steps=1, micro_batch_size=size, grad_clip=1e-3, temperature=0.7, **options)
            for size in (0, 7)]
    for model, state in runs[0]['optimizers'].items():
        assert assert_equal_gradients(runs, model) >= 1
        norms = [moments['exp_avg'].norm() * 10 for moments in state['state'].values()]
        assert torch.stack(norms).norm().item() == pytest.approx(1e-3, rel=1e-3)    # it did clip


def encoded(data, kind, split='train'):
    """Returns the encoded rows of a data folder, in the order of the file."""
    tokenizer, text = load_text(data)
    rows = dict(zip(('train', 'val'), load_split(data, kind, text['template'])))[split]
    return encode_rows(rows, kind, tokenizer, 32)


@pytest.mark.parametrize('name', STAGES)
def test_padding_changes_no_run(stage, name, tmp_path, monkeypatch, float64):
    """I2, I5, I15: four more columns of padding with random ids, in every batch of a run, change no
    gradient and no number of its log: loss, margin, kl, entropy, ratio, clip_frac, norm, ... (PPO
    at temperature 0.7). Catches a mean over all columns of a batch."""
    runs = [stage(name, out=tmp_path / 'plain', temperature=0.7)]
    function = 'generate' if name == 'ppo' else 'make_batch'
    original, widened = getattr(STAGES[name], function), []

    def wide(*arguments):
        out = original(*arguments)
        tokens, mask = out[0], F.pad(out[-1], (0, 4))
        junk = torch.randint(256, (len(tokens), 4), generator=torch.Generator().manual_seed(0))
        tokens = torch.cat([tokens, junk], dim=1)
        widened.append(tokens.shape)
        return (tokens, mask) if name == 'ppo' else (tokens, tokens[:, :-1], tokens[:, 1:], mask)
    monkeypatch.setattr(STAGES[name], function, wide)
    runs.append(stage(name, out=tmp_path / 'wide', temperature=0.7))
    assert widened
    assert all(assert_equal_gradients(runs, optimizer) > 1 for optimizer in runs[0]['optimizers'])
    plain, padded = (log_rows(tmp_path / out) for out in ('plain', 'wide'))
    assert len(plain) == len(padded) == 3               # two steps and an evaluation
    for a, b in zip(plain, padded):
        assert a.pop('samples', None) == b.pop('samples', None)
        assert b == pytest.approx(a, abs=2e-5, rel=2e-5)


@pytest.mark.parametrize('name', STAGES)
def test_no_learning_rate_no_change(stage, sft_run, rm_run, name, monkeypatch):
    """I21: with lr = 0 every weight is bit for bit what it was; PPO's ratio is 1 in all epochs, at
    temperature 0.7, and nothing is clipped. Catches weights touched elsewhere, dropout, and a rate
    that reaches only one group of parameters."""
    ratios = record(monkeypatch, train_ppo, 'policy_loss')
    saved = stage(name, lr=0.0, value_lr=0.0, weight_decay=0.1, temperature=0.7)
    start = load_checkpoint(sft_run, ['sft'])['weights']['policy']
    if name == 'rm':
        model = saved['weights']['reward_model']
        assert not model.pop('score.weight').any()
        assert same(model, {f'body.{key}': weight for key, weight in start.items()})
    else:
        assert same(saved['weights']['policy'], start)
    if name == 'ppo':
        assert same(saved['weights']['ref'], start)
        assert len(ratios) == 12                        # 2 steps, 2 epochs of 3 minibatches
        assert all((ratio - 1).abs().max() <= 1e-5 for _, (_, ratio) in ratios)
        value_model = saved['weights']['value_model']   # the reward model's body, a head of 0
        reward_model = load_checkpoint(rm_run, ['rm'])['weights']['reward_model']
        assert not value_model.pop('score.weight').any() and reward_model.pop('score.weight').any()
        assert same(value_model, reward_model)


def assert_first_gradient(optimizer, model, tolerance):
    """Asserts that Adam's first moments after one step, a tenth of its gradient, are the model's
    .grad, to a share of each tensor's norm."""
    # adamw has the same order of tensors
    parameters = [p for group in adamw(model, 0.0).param_groups for p in group['params']]
    assert len(parameters) == len(optimizer['state'])
    for i, p in enumerate(parameters):
        difference = optimizer['state'][i]['exp_avg'].double() * 10 - p.grad
        assert difference.norm() <= tolerance * p.grad.norm(), i


@pytest.mark.parametrize('name', ['sft', 'rm', 'dpo'])
def test_first_step_against_autograd_over_loops(stage, sft_run, shared_data, tmp_path, float64,
                                                name):
    """I7, I12, I20: the first step's logged loss, and its gradient in every tensor, are those of
    the loss written as a loop over rows alone: SFT's sum over the batch's response tokens, EOS
    included, divided by their number; the reward model's and DPO's -log sigmoid. Catches a mask, a
    shift or a last token one off, a mean over rows or of means, a mean for DPO's sum, and the two
    sides swapped."""
    saved = stage(name, out=tmp_path / 'run', steps=1, batch_size=40, micro_batch_size=7,
                  grad_clip=1e9)
    rows = encoded(shared_data, 'sft' if name == 'sft' else 'pairs')
    lengths = [(len(row) - 1) * len(row[0]) + sum(map(len, row[1:])) for row in rows]
    batch = [rows[i] for i in next(batches(lengths, 40, 0))]
    policy = load_model(GPT, load_checkpoint(sft_run, ['sft']), 'policy', 'cpu')
    if name == 'sft':
        assert len({len(r) for _, r in batch}) == 3 and all(r[-1] == EOS for _, r in batch)
        loss = -sum(loop_logprob(policy, *row) for row in batch) / sum(len(r) for _, r in batch)
        key, model = 'policy', policy
    elif name == 'dpo':                     # at the start policy and reference are equal
        h = [loop_logprob(policy, p, c) - loop_logprob(policy, p, r) for p, c, r in batch]
        loss = -sum(F.logsigmoid(train_dpo.Config.beta * (z - z.detach())) for z in h) / len(batch)
        key, model = 'policy', policy
    else:
        key, model = 'reward_model', ScalarGPT(policy.config)
        model.body = policy                 # with a head of 0 no other tensor has a gradient
        scores = [[model(torch.tensor([p + side]))[0, -1] for side in sides] for p, *sides in batch]
        loss = -sum(F.logsigmoid(chosen - rejected) for chosen, rejected in scores) / len(batch)
    loss.backward()
    assert read_log(tmp_path / 'run')[0]['loss'] == pytest.approx(loss.item(), rel=1e-6)
    assert_first_gradient(saved['optimizers'][key], model, 1e-9)


def test_sft_evaluation_is_the_mean_over_held_out_tokens():
    """The held-out loss weighs tokens, not rows or batches: 70 rows by a double loop."""
    policy = tiny_gpt().double()
    rows = [(prompt, chosen) for prompt, chosen, _ in random_pairs(70)]
    expected = (-sum(loop_logprob(policy, *row) for row in rows).item()
                / sum(len(response) for _, response in rows))
    assert train_sft.evaluate(policy, rows, 3, *CPU)['loss'] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize('options, loss_of', [
    (dict(), lambda m: math.log1p(math.exp(-m))),
    (dict(label_smoothing=0.2), lambda m: (0.8 * math.log1p(math.exp(-m))
                                           + 0.2 * math.log1p(math.exp(m)))),
    (dict(ipo=True), lambda m: (m / 0.3 - 1 / 0.6) ** 2)], ids=str)
def test_dpo_reference_stays_where_it_began(stage, sft_run, shared_data, tmp_path, options,
                                            loss_of):
    """I19: DPO's reference logprobs are those of the policy before the first step, even after
    training, and the second step logs the numbers that follow from them, with every loss. I13: the
    first margin is 0, so that DPO's loss is ln 2."""
    options = dict(lr=1e-3, beta=0.3, **options)
    one = stage('dpo', steps=1, **options)      # with no warm-up the first rate is lr in both
    saved = stage('dpo', steps=2, out=tmp_path / 'two', **options)
    pairs = encoded(shared_data, 'pairs')
    start, moved = (load_model(GPT, contents, 'policy', 'cpu')
                    for contents in (load_checkpoint(sft_run, ['sft']), one))
    lengths = [2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in pairs]
    first, second = itertools.islice(batches(lengths, 8, 0), 2)
    visited = sorted(first + second)
    torch.testing.assert_close(saved['ref_train'][:, visited],
                               all_logprobs(start, pairs, 8, *CPU)[:, visited], rtol=0, atol=1e-5)
    # A pair that no step visits has no number, so that its use would not pass unnoticed
    assert saved['ref_train'].isnan().sum() == 2 * (len(pairs) - len(visited)) > 0
    second = [pairs[i] for i in second]
    (chosen, rejected), (ref_chosen, ref_rejected) = (all_logprobs(model, second, 3, *CPU).tolist()
                                                      for model in (moved, start))
    margins = [0.3 * ((c - ref_c) - (r - ref_r))
               for c, r, ref_c, ref_r in zip(chosen, rejected, ref_chosen, ref_rejected)]
    log = read_log(tmp_path / 'two')
    assert log[0]['loss'] == pytest.approx(loss_of(0.0), rel=1e-5)
    assert abs(log[0]['margin']) < 1e-6
    assert log[1]['margin'] == pytest.approx(sum(margins) / 8, abs=1e-5) != 0
    assert log[1]['loss'] == pytest.approx(sum(map(loss_of, margins)) / 8, rel=1e-4)
    assert log[1]['accuracy'] == sum(m > 0 for m in margins) / 8
    for name, numbers in (('chosen', chosen), ('rejected', rejected)):
        assert log[1][name] == pytest.approx(sum(numbers) / 8, abs=1e-4)


def test_a_prompt_has_the_same_ids_wherever_it_is_read(stage, tiny_data, tmp_path, monkeypatch):
    """I9: all four stages, their samples and both tools read one prompt as the same ids, although
    a merge 'ab' would join its last letter with the first one of the response."""
    (tiny_data / 'bytes.tiktoken').write_text(AB_MERGED)
    prompts = ['say a', 'now say a']
    for split in ('train', 'val'):
        for kind, responses in dict(sft=dict(completion='b!'), prompts={},
                                    pairs=dict(chosen='b!', rejected='b?')).items():
            write_jsonl(tiny_data / f'{split}.{kind}.jsonl',
                        [{'prompt': prompt, **responses} for prompt in prompts])
    policy = save_tiny_run(tmp_path / 'policy', tiny_data)
    batches_read = [record(monkeypatch, module, 'make_batch')
                    for module in (train_sft, train_rm, train_dpo)]
    answered = [record(monkeypatch, module, 'generate')
                for module in (data.text, train_ppo, tools.sample, tools.evaluate)]
    for name in STAGES:
        stage(name, data=tiny_data, init=policy, rm=tmp_path / 'rm', out=tmp_path / name)
    tools.sample.main(tools.sample.Config(runs=(str(policy),), max_new_tokens=4, device='cpu'))
    tools.evaluate.main(tools.evaluate.Config(runs=(str(policy),), max_new_tokens=4, device='cpu'))
    expected = {tuple(prompt.encode()) for prompt in prompts}
    for calls in batches_read:
        assert {tuple(row[0]) for (rows, *_), _ in calls for row in rows} == expected
    for calls in answered:
        assert {tuple(prompt) for (_, rows, *_), _ in calls for prompt in rows} == expected


# ----------------------------------------------------------------------------- PPO's rollout

def rollout_of(result):
    """Returns what rollout returned as one dict; main has added to its grid since."""
    grid, scores, ended, texts = result
    return {**grid, 'scores': scores, 'ended': ended, 'texts': texts}


@torch.no_grad()
def test_rollout_against_loops(sft_run, byte_tokenizer):
    """I3: logprobs and reference logprobs, at the rollout's temperature and with micro-batches of
    4, are those of a loop over rows alone. Catches a temperature missing in one of them, the two
    models swapped, and an EOS in a prompt that counts as an end."""
    policy = load_model(GPT, load_checkpoint(sft_run, ['sft']), 'policy', 'cpu')
    ref = tiny_gpt(seed=1, vocab_size=257, n_embd=32)
    prompts = [[EOS] * (letter == 'c') + byte_tokenizer.encode_ordinary(f'{verb} {letter}:')
               for verb in ('say', 'now say', 'do') for letter in 'abc']
    cfg = train_ppo.Config(max_new_tokens=4, temperature=0.7, micro_batch_size=4)

    def scorer(tokens, response_mask, *texts):
        assert texts[0] == [byte_tokenizer.decode(prompt) for prompt in prompts]
        return torch.arange(9.)
    batch, again = (rollout_of(rollout(policy, ref, scorer, prompts, byte_tokenizer, cfg,
                                       torch.Generator().manual_seed(0))) for _ in range(2))
    assert batch.pop('texts') == again['texts']
    assert all(torch.equal(batch[key], again[key]) for key in batch)    # I13: bit-equal
    assert batch['scores'].tolist() == list(range(9))       # the scorer's, before the no-EOS rule
    assert 0 < batch['ended'].sum() < 9 and not batch['ended'][2::3].all()
    for b, prompt in enumerate(prompts):
        n = int(batch['mask'][b].sum())
        row = torch.cat([batch['x'][b, :1], batch['y'][b]])[:len(prompt) + n]
        assert row[:len(prompt)].tolist() == prompt
        assert batch['x'][b, :len(row) - 1].tolist() == row[:-1].tolist()
        assert batch['ended'][b].item() == (row[-1].item() == EOS)
        said = row[len(prompt):len(row) - int(batch['ended'][b])].tolist()
        assert [texts[b] for texts in again['texts']] == [byte_tokenizer.decode(ids)
                                                          for ids in (prompt, said)]
        for model, key in ((policy, 'logprobs'), (ref, 'ref_logprobs')):
            logits = (model.logits(model(row[None]))[0] / 0.7).log_softmax(-1)
            expected = [logits[t, row[t + 1]].item() for t in range(len(prompt) - 1, len(row) - 1)]
            close(batch[key][b, len(prompt) - 1:len(row) - 1], expected, 1e-5)
            assert batch[key][b].count_nonzero() <= n


class FiveTokens:
    """Does what a rollout asks of a tokenizer; EOS is the last of five ids."""
    eot_token = 4

    def decode(self, ids):
        return str(ids)


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_rollouts_follow_the_logprobs_they_keep(temperature):
    """I14: the counts of the first tokens of 20,000 rollouts match exp of the logprobs that the
    rollout keeps, by chi-square. Catches a rollout sampled at one temperature and scored at
    another, which the first ratio does not show."""
    policy, N = tiny_gpt(seed=1, vocab_size=5), 20_000
    cfg = train_ppo.Config(max_new_tokens=2, temperature=temperature)
    grid, *_ = rollout(policy, policy, lambda *_: torch.zeros(N), [[3, 1]] * N, FiveTokens(), cfg,
                       torch.Generator().manual_seed(0))
    first, logprobs = grid['y'][:, 1], grid['logprobs'][:, 1]
    counts = first.bincount(minlength=5).double()
    expected = torch.zeros(5).scatter(0, first, logprobs.exp()).double() * N
    assert expected.sum().item() == pytest.approx(N, rel=1e-5) and expected.min() > 50
    # 23.5 is exceeded once in 10,000 by a chi-square of 4 degrees of freedom
    assert ((counts - expected) ** 2 / expected).sum().item() < 23.5


@torch.no_grad()
def test_scores_of_a_reward_model_are_shifted(rm_run, sft_run, shared_data):
    """I3: the reward model's scores for PPO are those of each row alone, minus the shift of its
    checkpoint, which is their mean over the held-out responses, chosen and rejected. Catches the
    shift left out, or added."""
    saved = load_checkpoint(rm_run, ['rm'])
    assert abs(saved['shift']) > 1e-3                   # or forgetting it would not be seen
    model = load_model(ScalarGPT, saved, 'reward_model', 'cpu')
    rows = [(prompt, response) for prompt, *sides in encoded(shared_data, 'pairs', 'val')
            for response in sides]
    raw = [model(torch.tensor([prompt + response]))[0, -1].item() for prompt, response in rows]
    assert saved['shift'] == pytest.approx(sum(raw) / len(raw), abs=1e-5)
    for size in (0, 5):
        scorer, source = load_scorer(str(rm_run), load_checkpoint(sft_run, ['sft']),
                                     torch.device('cpu'), size)
        tokens, _, _, mask = prefgpt.make_batch(rows)
        close(scorer(tokens, mask, [], []), [z - saved['shift'] for z in raw], 1e-5)
    assert same(source['weights']['reward_model'],      # where the value model starts
                saved['weights']['reward_model'])


def test_a_judge_scores_the_texts_and_the_value_model_starts_from_the_policy(sft_run, tmp_path):
    """With a reward.py a score is its reward for one prompt and response, in order, and the value
    model starts from the policy's own checkpoint."""
    (tmp_path / 'reward.py').write_text("def score(prompt, response):\n"
                                        "    return {'reward': len(prompt) - 10 * len(response)}\n")
    init = load_checkpoint(sft_run, ['sft'])
    scorer, source = load_scorer(str(tmp_path / 'reward.py'), init, torch.device('cpu'))
    assert source['weights'] is init['weights']
    assert scorer(None, None, ['ab', 'abc'], ['x!', '!']).tolist() == [-18.0, -7.0]


def test_a_reward_model_with_nan_is_refused(rm_run, sft_run, tmp_path):
    """A nan in a reward model raises an error that names its run, in PPO and in the tools: as a nan
    of the loss it would be blamed on lr, and argmax would pick it as the best of N."""
    saved = load_checkpoint(rm_run, ['rm'])
    saved['weights']['reward_model']['score.weight'].fill_(math.nan)
    torch.save(saved, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match=f'{tmp_path}.*weights are not finite'):
        load_scorer(str(tmp_path), load_checkpoint(sft_run, ['sft']), torch.device('cpu'))


@pytest.mark.parametrize('pad', [0, 5])
def test_rollout_metrics_by_hand(pad):
    """I15: the score is the plain mean; kl is summed over a response and averaged over responses;
    entropy is per response token. Padding changes none of them."""
    zeros = torch.zeros(3, 6)
    grid = {'mask': MASK, 'logprobs': zeros.masked_scatter(MASK, -torch.arange(1., 10.)),
            'ref_logprobs': zeros.masked_fill(MASK, -6.)}
    scores, ended = torch.tensor([1., 2., 6.]), torch.tensor([True, False, True])
    padded = {key: F.pad(value, (0, pad)) for key, value in grid.items()}
    parts = [({key: value[:2] for key, value in padded.items()}, scores[:2], ended[:2]),
             ({key: value[2:] for key, value in grid.items()}, scores[2:], ended[2:])]
    # Sum of logprobs -45, of the reference's -54, over 3 responses and 9 tokens
    for metrics in rollout_metrics((padded, scores, ended)), rollout_metrics(*parts):
        assert metrics == pytest.approx({'score': 3.0, 'kl': 3.0, 'entropy': 5.0, 'length': 3.0,
                                         'eos': 2 / 3})


def test_update_metrics_by_hand():
    """I15: approx_kl is the mean of r - 1 - log r, explained_variance is 1 - var(R - V) / var(R),
    and adv_std is the advantages', over response tokens. Junk in the pads changes nothing."""
    mask = torch.tensor([[False, True, True], [True, True, False]])
    zeros = torch.zeros(2, 3)
    ratios = [1.0, 2.0, 0.5, 1.0]               # 2 - 1 - log 2 and 0.5 - 1 + log 2 add up to 0.5
    values, returns = [1.0, 2.0, 3.0, 4.0], [2.0, 0.0, 6.0, 4.0]    # R - V: 1, -2, 3, 0
    junk = torch.full((2, 3), 7.0)
    grid = {'mask': mask, 'logprobs': zeros, 'returns': junk.masked_scatter(mask, torch.tensor(
        returns))}
    metrics = update_metrics(junk.masked_scatter(mask, torch.tensor(ratios).log()), grid,
                             grid['returns'] - junk.masked_scatter(mask, torch.tensor(values)))
    # R - V has the mean 0.5 and the variance 3.25, R the mean 3 and the variance 5
    assert metrics == pytest.approx({'approx_kl': 0.125, 'explained_variance': 1 - 3.25 / 5,
                                     'adv_std': 3.25 ** 0.5})


def test_evaluation_in_parts_is_the_same(stage, tmp_path):
    """PPO's evaluation samples rollout_size prompts at a time; texts and numbers are those of one
    piece. Catches a generator that begins anew in each part."""
    logs = []
    for size in (24, 5):                        # 24 prompts: one part, or five
        stage('ppo', steps=1, lr=0.0, value_lr=0.0, rollout_size=size, out=tmp_path / str(size))
        logs.append(read_log(tmp_path / str(size), 'eval_kl_sft')[-1])
    names = ('eval_score', 'eval_kl_sft', 'eval_entropy', 'eval_length', 'eval_eos')
    assert [logs[0][name] for name in names] == pytest.approx([logs[1][name] for name in names],
                                                              abs=1e-5)


# ----------------------------------------------------------------------------- PPO's loop

@pytest.mark.parametrize('temperature', [1.0, 0.7])
@pytest.mark.parametrize('micro_batch_size', [0, 3])
def test_first_ratio_is_one(stage, monkeypatch, tmp_path, temperature, micro_batch_size):
    """I1: before the first optimizer step of a rollout batch the policy is the one that sampled:
    |log ratio| <= 1e-5 on every token. I13: the first kl to the reference is exactly 0. Catches
    two temperatures, and old logprobs that are not the rollout's."""
    calls = record(monkeypatch, train_ppo, 'policy_loss')
    stage('ppo', out=tmp_path / 'run', temperature=temperature, lr=1e-2,
          micro_batch_size=micro_batch_size)
    log = read_log(tmp_path / 'run', 'ratio')
    first = calls[:1 if micro_batch_size == 0 else 3]               # 8 rows: 3 + 3 + 2
    assert sum(len(arguments[0]) for arguments, _ in first) == 8
    for (logprobs, old_logprobs, *_), (_, ratio) in first:
        assert (logprobs - old_logprobs).abs().max() <= 1e-5
        assert (old_logprobs < -1e-3).any()                         # not both zero
    assert (calls[len(first)][1][1] - 1).abs().max() > 1e-3         # one step later it has moved
    assert all(abs(math.log(row['ratio'])) <= 1e-5 for row in log)
    assert log[0]['kl'] == 0.0 and log[1]['kl'] != 0.0


def loop_advantages(batch, cfg):
    """Returns advantages and returns of a rollout batch by plain loops: dicts by (row, column)."""
    advantages, returns = {}, {}
    for b, mask in enumerate(batch['mask'].tolist()):
        columns = [t for t, response in enumerate(mask) if response]
        score = batch['scores'][b].item()
        if batch['y'][b, columns[-1]] != EOS:
            score = min(score, cfg['no_eos_score'])
        rewards = [-cfg['beta'] * (batch['logprobs'][b, t] - batch['ref_logprobs'][b, t]).item()
                   for t in columns]
        rewards[-1] += score
        values = [batch['values'][b, t].item() for t in columns]
        for t, a, v in zip(columns, reference_gae(rewards, values, cfg['gamma'],
                                                  cfg['gae_lambda']), values):
            advantages[b, t], returns[b, t] = a, a + v
    if cfg['whiten']:
        mean = sum(advantages.values()) / len(advantages)
        variance = sum((a - mean) ** 2 for a in advantages.values()) / len(advantages)
        advantages = {key: (a - mean) / math.sqrt(variance) for key, a in advantages.items()}
    return advantages, returns


@pytest.mark.parametrize('whitened', [True, False])
def test_ppo_losses_against_loops(stage, monkeypatch, tmp_path, whitened):
    """I16, I17: pg_loss and vf_loss of the log, by plain loops from the rollout on: score rule, KL
    in the reward, GAE, whitening over the WHOLE rollout batch, means over the minibatch's tokens.
    The policy has left the reference, some responses have no EOS, no value is 0; with lr = 0 from
    here on the ratio is 1. Catches whitening in the minibatch, or before the returns."""
    options = dict(beta=0.5, gamma=0.9, gae_lambda=0.8, no_eos_score=-2.0, max_new_tokens=4,
                   rollout_size=24, batch_size=5, micro_batch_size=2, whiten=whitened, ref_ema=0.0)
    # The first step moves the models, the second leaves them in place
    monkeypatch.setattr(train_ppo, 'learning_rate', lambda step, *_: 5e-3 * (step == 0))
    rollouts = record(monkeypatch, train_ppo, 'rollout')
    whitenings = record(monkeypatch, train_ppo, 'whiten')
    cfg = stage('ppo', out=tmp_path / 'run', eval_every=10, **options)['config']
    batch, row = rollout_of(rollouts[1][1]), read_log(tmp_path / 'run', 'ratio')[1]
    assert 0 < batch['ended'].sum() < 24 and row['kl'] != 0
    assert batch['values'][batch['mask']].abs().min() > 0
    # whiten is called once per rollout batch, with all 24 rows
    assert [len(mask) for (_, mask), _ in whitenings] == ([24, 24] if whitened else [])

    advantages, returns = loop_advantages(batch, cfg)
    pg, vf = [], []
    for epoch in range(2):
        order = torch.randperm(24, generator=rng(0, 2 + epoch, 'shuffle')).tolist()
        for i in range(0, 24, 5):
            cells = [key for key in advantages if key[0] in order[i:i + 5]]
            pg.append(-sum(advantages[key] for key in cells) / len(cells))
            vf.append(sum(0.5 * (batch['values'][key].item() - returns[key]) ** 2
                          for key in cells) / len(cells))
    assert max(map(abs, pg)) > 0.01
    assert row['pg_loss'] == pytest.approx(sum(pg) / len(pg), abs=1e-5)
    assert row['vf_loss'] == pytest.approx(sum(vf) / len(vf), rel=1e-4)
    assert row['clip_frac'] == 0.0


def test_ppo_gradients_against_autograd_over_loops(stage, monkeypatch, sft_run, rm_run):
    """I7: PPO's first gradient is that of -sum A_t log pi(y_t) / tokens, written as a loop over
    rows: at ratio 1 this is the policy gradient. The value model's is that of half the squares
    (V - R)^2 / tokens, with a head that is not 0. I3: values[:, t] is its number where token t + 1
    is still unknown. Catches the sign of the advantage, a mask with the prompt or without EOS,
    values one column off or of another row, and prompts and padding in the loss."""
    def give_a_head(model):
        torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
        return model

    def adamw_of(model, *arguments, **options):     # after its weights are loaded
        return adamw(give_a_head(model) if isinstance(model, ScalarGPT) else model, *arguments,
                     **options)
    monkeypatch.setattr(train_ppo, 'adamw', adamw_of)
    rollouts = record(monkeypatch, train_ppo, 'rollout')
    saved = stage('ppo', steps=1, ppo_epochs=1, batch_size=24, micro_batch_size=3, grad_clip=1e9,
                  temperature=0.7, eval_every=10)
    batch = rollout_of(rollouts[0][1])
    assert batch['values'][batch['mask']].unique().numel() > 20
    advantages, returns = loop_advantages(batch, saved['config'])
    policy = load_model(GPT, load_checkpoint(sft_run, ['sft']), 'policy', 'cpu').double()
    model = give_a_head(load_model(ScalarGPT, load_checkpoint(rm_run, ['rm']), 'reward_model',
                                   'cpu'))
    loss = squares = 0.0
    for b, t in batch['mask'].nonzero().tolist():
        state = torch.cat([batch['x'][b, :1], batch['y'][b, :t]])[None]     # all but token t + 1
        logprobs = (policy.logits(policy(state))[0, -1] / 0.7).log_softmax(-1)
        loss -= advantages[b, t] * logprobs[batch['y'][b, t]]
        value = model(state)[0, -1]
        assert batch['values'][b, t].item() == pytest.approx(value.item(), abs=1e-5)
        squares += (value - returns[b, t]) ** 2 / 2
    (loss / len(advantages)).backward()
    (squares / len(returns)).backward()
    assert_first_gradient(saved['optimizers']['policy'], policy, 1e-4)
    assert_first_gradient(saved['optimizers']['value_model'], model, 1e-4)


@pytest.mark.parametrize('ref_ema', [0.0, 0.5])
def test_reference_and_reward_model_stay(stage, monkeypatch, sft_run, rm_run, ref_ema):
    """I19: the policy that PPO began from and the reward model stay bit for bit what they were, the
    others do not (the reference does with ref_ema = 0), and no two models share a tensor.
    Catches a reference, or a trunk of the value model, that is the policy itself."""
    loads = record(monkeypatch, train_ppo, 'load_model')
    save, written = prefgpt.save_checkpoint, []
    monkeypatch.setattr(prefgpt, 'save_checkpoint', lambda *arguments, **options: (
        written.append(options['models']), save(*arguments, **options)))
    weights = stage('ppo', lr=5e-3, ref_ema=ref_ema)['weights']
    made, trained = [model for _, model in loads], written[-1]          # trained: models by name
    start = load_checkpoint(sft_run, ['sft'])['weights']['policy']
    reward = load_checkpoint(rm_run, ['rm'])['weights']['reward_model']
    assert same(weights['ref'], start) == (ref_ema == 0) and not same(weights['policy'], start)
    # One GPT never moved: the policy that kl_sft is measured against
    assert sum(isinstance(model, GPT) and same(model.state_dict(), start) for model in made) == 1
    assert [same(model.state_dict(), reward) for model in made
            if isinstance(model, ScalarGPT)] == [True]
    assert not same(weights['value_model'], reward)
    models = {id(model): model for model in [*made, *trained.values()]}.values()
    assert len(models) == (5 if ref_ema else 4)
    storages = [p.data_ptr() for model in models for p in model.parameters()]
    assert len(storages) == len(set(storages))


@pytest.mark.parametrize('rate', [0.25, 1.0])
def test_reference_follows_once_a_step(stage, sft_run, rate):
    """I19: the reference moves by ref_ema once per rollout batch, after its epochs: one step from
    equal weights leaves it at start + rate (policy - start). Catches a reference that follows at
    every optimizer step."""
    saved = stage('ppo', steps=1, lr=5e-3, ref_ema=rate)['weights']
    start = load_checkpoint(sft_run, ['sft'])['weights']['policy']
    for key, before in start.items():
        expected = before + rate * (saved['policy'][key] - before)
        torch.testing.assert_close(saved['ref'][key], expected, rtol=0, atol=1e-6)
        assert not torch.equal(saved['ref'][key], before)


@pytest.mark.parametrize('rates', [dict(lr=0.0, value_lr=5e-3), dict(lr=5e-3, value_lr=0.0)])
def test_policy_and_value_model_have_rates_of_their_own(stage, sft_run, rates):
    """lr moves the policy alone, value_lr the value model alone."""
    saved = stage('ppo', **rates)['weights']
    start = load_checkpoint(sft_run, ['sft'])['weights']['policy']
    assert same(saved['policy'], start) == (rates['lr'] == 0)
    assert bool(saved['value_model']['score.weight'].any()) == (rates['value_lr'] > 0)


def test_every_pass_is_measured_against_the_rollout(stage, monkeypatch, tmp_path):
    """I1, after the first minibatch: in every minibatch of every epoch, old logprobs, old values,
    advantages and returns are the rollout's for the same rows, and the clip ranges are the
    configured ones. Catches old values computed again, which would never clip. I15: clip_frac is
    the share of RESPONSE tokens whose ratio left 1 +- clip_eps, averaged over minibatches. Catches
    prompts and padding counted."""
    policy_calls = record(monkeypatch, train_ppo, 'policy_loss')
    value_calls = record(monkeypatch, train_ppo, 'value_loss')
    rollouts = record(monkeypatch, train_ppo, 'rollout')
    cfg = stage('ppo', out=tmp_path / 'run', clip_eps=0.05, vf_clip=0.15, lr=5e-3,
                eval_every=10)['config']
    batch = rollout_of(rollouts[1][1])      # of the second step: in the first all values are 0
    advantages, returns = loop_advantages(batch, cfg)
    assert batch['values'][batch['mask']].unique().numel() > 3
    assert len(policy_calls) == len(value_calls) == 12      # 2 steps, 2 epochs of 3 minibatches
    shares = []
    for i, (policy_call, value_call) in enumerate(zip(policy_calls[6:], value_calls[6:])):
        (_, old_logprobs, ours, clip_eps), (_, ratio) = policy_call
        (values, old_values, our_returns, vf_clip), _ = value_call
        assert (clip_eps, vf_clip) == (0.05, 0.15)
        rows = torch.randperm(24, generator=rng(0, 2 + i // 3, 'shuffle')).split(8)[i % 3]
        cells = batch['mask'][rows].nonzero().tolist()
        for k, t in cells:
            b = rows[k].item()
            assert old_logprobs[k, t] == batch['logprobs'][b, t]
            assert old_values[k, t] == batch['values'][b, t]
            assert ours[k, t].item() == pytest.approx(advantages[b, t], abs=1e-4)
            assert our_returns[k, t].item() == pytest.approx(returns[b, t], abs=1e-4)
        shares.append(sum(abs(ratio[k, t].item() - 1) > 0.05 for k, t in cells) / len(cells))
        assert i == 0 or not torch.equal(values, old_values)        # the model has moved
    assert shares[0] == 0 and max(shares) > 0.05
    log = read_log(tmp_path / 'run', 'ratio')[1]
    assert log['clip_frac'] == pytest.approx(sum(shares) / len(shares), abs=1e-6)
