"""
Checks that each stage learns, in process, on the toy task: say a letter, end in '!'.

The bounds are far from what a stage reaches when it works, and far from what it reaches when a sign
is wrong. test_methods.py checks that the numbers are right.
"""
import math
from pathlib import Path

import pytest
import torch

import train_dpo
import train_ppo
import train_sft
from conftest import EOS, STAGES, known, log_rows, read_log, same, write_jsonl
from data.text import load_rows
from prefgpt import GPT, POLICIES, UserError, generate, load_checkpoint, load_model

LN2 = math.log(2)


def run(module, out, data, **options):
    """Runs main() of a stage for few steps with hardly any warm-up, with the options that its
    Config has; returns its metrics."""
    options = {**dict(data=data, out=out, warmup=5, eval_every=options['steps'], max_new_tokens=8,
                      device='cpu'), **options}
    return module.main(module.Config(**{
        key: str(value) if isinstance(value, Path) else value
        for key, value in known(module.Config, options).items()}))


def greedy(run_folder, prompts, tokenizer):
    """Returns greedy responses of a run's policy: texts, and whether each ended by itself."""
    policy = load_model(GPT, load_checkpoint(run_folder, POLICIES), 'policy', 'cpu')
    tokens, mask = generate(policy, [tokenizer.encode_ordinary(p) for p in prompts], 16, EOS,
                            temperature=0)
    responses = [row[chosen].tolist() for row, chosen in zip(tokens[:, 1:], mask)]
    assert all(EOS not in response[:-1] for response in responses)      # nothing after EOS
    return [(tokenizer.decode([i for i in response if i != EOS]), response[-1] == EOS)
            for response in responses]


@pytest.fixture(scope='module')
def prompts(shared_data):
    """Returns the held-out prompts."""
    return [row['prompt'] for row in load_rows(shared_data / 'val.prompts.jsonl', 'prompts')]


# ----------------------------------------------------------------------------- SFT

def test_sft_overfits_four_rows(tiny_data, tmp_path, byte_tokenizer):
    """I8: after four rows are learned by heart, greedy sampling says each response, EOS, and no
    more. Catches EOS left out of the loss, and every shift of the targets."""
    rows = [('say a:', ' yes'), ('now say b:', ' no, never!'), ('say', 'x'), ('q', ' 12345')]
    for split in ('train', 'val'):
        write_jsonl(tiny_data / f'{split}.sft.jsonl',
                    [{'prompt': prompt, 'completion': response} for prompt, response in rows])
    run(train_sft, tmp_path / 'sft', tiny_data, steps=60, batch_size=4, lr=1e-2, block_size=32,
        n_embd=32, n_head=2)
    out = greedy(tmp_path / 'sft', [prompt for prompt, _ in rows], byte_tokenizer)
    assert out == [(response, True) for _, response in rows]


def test_sft_loss_falls(sft_run):
    """I23: the loss falls from about ln 257 to below 1 nat per token, on held-out rows too."""
    steps, (evaluation,) = read_log(sft_run), read_log(sft_run, 'eval_loss')
    assert steps[0]['loss'] > 5 and steps[79]['loss'] < 1 and evaluation['eval_loss'] < 1


def test_sft_on_pairs_learns_the_chosen_side(shared_data, tmp_path, byte_tokenizer, prompts):
    """--rows=pairs is Pref-FT: the policy says '!' and never '?'."""
    run(train_sft, tmp_path / 'sft', shared_data, rows='pairs', steps=80, lr=1e-2, n_embd=32,
        n_head=2, block_size=32)
    out = greedy(tmp_path / 'sft', prompts, byte_tokenizer)
    assert all(text.endswith('!') and ended for text, ended in out)


# ----------------------------------------------------------------------------- RM, DPO, IPO

def test_reward_model_learns_the_rule(rm_run):
    """I23: held-out accuracy rises above 0.9, from a loss of ln 2 = 0.6931 and scores of 0. Catches
    chosen and rejected swapped, and a score read at another place."""
    first, (evaluation,) = read_log(rm_run)[0], read_log(rm_run, 'eval_loss')
    assert first['loss'] == pytest.approx(LN2, abs=1e-6)
    assert (first['margin'], first['chosen'], first['rejected']) == (0, 0, 0)
    assert evaluation['eval_accuracy'] > 0.9 and evaluation['eval_loss'] < 0.3
    assert evaluation['eval_margin'] > 1


def test_dpo_learns_the_rule(shared_data, sft_run, tmp_path, byte_tokenizer, prompts):
    """I23: the held-out margin grows, accuracy rises above 0.9, from a first loss of ln 2, and the
    policy then says what the pairs prefer."""
    metrics = run(train_dpo, tmp_path / 'dpo', shared_data, init=sft_run, steps=60, lr=2e-3,
                  eval_every=10)
    first = read_log(tmp_path / 'dpo')[0]
    assert first['loss'] == pytest.approx(LN2, abs=1e-6)
    assert first['margin'] == pytest.approx(0, abs=1e-6)
    margins = [row['eval_margin'] for row in read_log(tmp_path / 'dpo', 'eval_margin')]
    assert 0 < margins[0] < margins[2] < margins[-1] == metrics['margin']
    assert metrics['accuracy'] > 0.9 and metrics['loss'] < 0.6
    assert not any('?' in text for text, _ in greedy(tmp_path / 'dpo', prompts, byte_tokenizer))


def test_ipo_stops_at_its_target(shared_data, sft_run, tmp_path):
    """I23: IPO pulls h to 1 / (2 beta) and no further: the margin beta h goes to 1/2, whatever beta
    is. The first loss is (1 / (2 beta))^2. DPO with the same steps goes past it."""
    options = dict(init=sft_run, steps=100, lr=3e-3)
    for beta in (0.25, 1.0):
        out = tmp_path / f'ipo{beta}'
        metrics = run(train_dpo, out, shared_data, ipo=True, beta=beta, **options)
        assert read_log(out)[0]['loss'] == pytest.approx(1 / (4 * beta ** 2), rel=1e-4)
        assert metrics['margin'] == pytest.approx(0.5, abs=0.15)
    metrics = run(train_dpo, tmp_path / 'dpo', shared_data, beta=1.0, **options)
    assert metrics['margin'] > 1.5


# ----------------------------------------------------------------------------- PPO

COUNT_B = '''
def score(prompt, response):
    """One point for every b, at most two, and one against every other letter."""
    letters = response.strip(' !?')
    return {'reward': min(letters.count('b'), 2) - sum(letter != 'b' for letter in letters)}
'''


@pytest.fixture
def judge(tmp_path):
    """Returns a reward.py that counts b's."""
    path = tmp_path / 'reward.py'
    path.write_text(COUNT_B)
    return str(path)


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_ppo_learns_from_a_judge(shared_data, sft_run, judge, tmp_path, seed):
    """I23: the score of a reward.py rises, on held-out prompts too, with three seeds; the first
    ratio of every step is 1.000 (I1), the first kl 0.000 (I13), and no entropy is below 0 (I15).
    Catches the sign of the advantage."""
    metrics = run(train_ppo, tmp_path / 'ppo', shared_data, init=sft_run, reward=judge,
                  steps=30, rollout_size=36, batch_size=12, lr=2e-3, value_lr=5e-3, beta=0.02,
                  seed=seed)
    log = read_log(tmp_path / 'ppo', 'ratio')
    assert log[0]['kl'] == 0
    assert all(row['ratio'] == pytest.approx(1, abs=1e-5) for row in log)
    assert all(row['ms'] > 0 and 0 <= row['entropy'] < math.log(257) for row in log)
    before = sum(row['score'] for row in log[:3]) / 3
    after = sum(row['score'] for row in log[-3:]) / 3
    assert after > before + 1 and metrics['score'] > before + 1
    assert 0 < metrics['kl_sft'] < 20


def test_ppo_learns_from_a_reward_model(shared_data, sft_run, rm_run, tmp_path, byte_tokenizer,
                                        prompts):
    """I23: the reward model's score rises until '?' is gone, with KL bounded by beta; a fixed
    reference, and one that follows."""
    for ref_ema in (0.0, 0.1):
        out = tmp_path / f'ppo{ref_ema}'
        metrics = run(train_ppo, out, shared_data, init=sft_run, reward=rm_run, steps=20,
                      rollout_size=36, batch_size=12, lr=1e-3, ref_ema=ref_ema)
        assert metrics['score'] > read_log(out, 'ratio')[0]['score'] + 0.5
        assert 0 < metrics['kl_sft'] < 10
        said = ''.join(text for text, _ in greedy(out, prompts[:6], byte_tokenizer))
        assert said.count('!') > said.count('?')


def test_the_judge_of_evaluations_is_logged_as_gold_and_trains_nothing(
        shared_data, sft_run, rm_run, judge, tmp_path):
    """--judge scores evaluations alone: gold is in their rows, and every step and evaluation is
    otherwise that of a run without it. So a run may resume with it."""
    options = dict(init=sft_run, reward=rm_run, steps=2, rollout_size=12, batch_size=6,
                   eval_every=1)
    plain = run(train_ppo, tmp_path / 'plain', shared_data, **options)
    judged = run(train_ppo, tmp_path / 'judged', shared_data, judge=judge, **options)
    golds = [row['eval_gold'] for row in read_log(tmp_path / 'judged', 'eval_gold')]
    assert len(golds) == 2 and golds[-1] == judged.pop('gold')
    assert judged == plain and not read_log(tmp_path / 'plain', 'eval_gold')
    assert run(train_ppo, tmp_path / 'plain', shared_data, judge=judge, resume=True,
               **options) == plain


@pytest.mark.parametrize('text, words', [
    (None, 'no such file'),
    ('reward = 1.0', r'no score\(prompt, response\)'),
    ("def score(prompt, response):\n    return {'points': 1.0}", "not finite .* 'reward'"),
    ("def score(prompt, response):\n    return {'reward': float('nan')}", 'nan.*not finite')],
    ids=['missing', 'no function', 'no reward', 'nan'])
def test_a_broken_judge_fails_before_the_first_step(
        shared_data, sft_run, rm_run, tmp_path, text, words):
    """A broken judge fails before the first step, and not in the first evaluation, where the steps
    before it would be lost."""
    path = tmp_path / 'judge.py'
    if text:
        path.write_text(text + '\n')
    with pytest.raises(UserError, match=words):
        run(train_ppo, tmp_path / 'ppo', shared_data, init=sft_run, reward=rm_run,
            judge=str(path), steps=1, rollout_size=6, batch_size=6)
    assert not (tmp_path / 'ppo').exists()


def test_beta_holds_the_policy_back(shared_data, sft_run, judge, tmp_path):
    """I23: a large beta keeps the policy at the reference, with far less KL than beta 0. Catches
    the sign of the KL in the reward, with which a large beta runs away."""
    kl = {}
    for beta in (0.0, 2.0):
        metrics = run(train_ppo, tmp_path / f'ppo{beta}', shared_data, init=sft_run,
                      reward=judge, steps=20, rollout_size=36, batch_size=12, lr=2e-3, beta=beta,
                      ref_ema=0.0)
        kl[beta] = metrics['kl_sft']
    assert kl[2.0] < 0.5 < 1.5 < kl[0.0]


def test_ppo_learns_to_stop(shared_data, sft_run, tmp_path):
    """I23: a response without EOS scores no_eos_score at most, so with a judge that gives all the
    same, more responses end. Catches a rule that is not applied, or applied to rows with EOS."""
    (tmp_path / 'reward.py').write_text("def score(prompt, response):\n    return {'reward': 1}\n")
    run(train_ppo, tmp_path / 'ppo', shared_data, init=sft_run, steps=25, rollout_size=36,
        reward=tmp_path / 'reward.py', batch_size=12, lr=2e-3, beta=0.0, max_new_tokens=4)
    ended = [row['eos'] for row in read_log(tmp_path / 'ppo', 'ratio')]
    assert sum(ended[:3]) / 3 < 0.8 < 0.95 < sum(ended[-3:]) / 3


@pytest.mark.parametrize('options', [
    dict(whiten=False), dict(vf_clip=0.2), dict(ref_ema=1.0), dict(ref_ema=0.0),
    dict(gamma=0.9, gae_lambda=1.0), dict(beta=0.0), dict(micro_batch_size=5),
    dict(temperature=0.5), dict(rollout_size=5, batch_size=2)], ids=str)
def test_ppo_runs_with_every_option(shared_data, sft_run, rm_run, tmp_path, options):
    """PPO takes three steps with each option of the studies; every number is finite."""
    run(train_ppo, tmp_path / 'ppo', shared_data, init=sft_run, reward=rm_run,
        **{**dict(steps=3, rollout_size=16, batch_size=8), **options})
    log = read_log(tmp_path / 'ppo', 'step')
    assert len(log) == 4                                # an evaluation too, with its samples
    assert all(math.isfinite(row[key]) for row in log for key in row if key != 'samples')


# ----------------------------------------------------------------------------- compile

@pytest.mark.filterwarnings('ignore:.*torch.jit:DeprecationWarning')    # torch's own
@pytest.mark.parametrize('name', STAGES)
def test_compile_takes_the_same_steps(shared_data, sft_run, rm_run, tmp_path, monkeypatch, name):
    """--compile=True compiles the bodies in place: steps and weights stay the same, and no name in
    the checkpoint has '_orig_mod.' in it. Sampling does not use the compiled call."""
    compiled, logs, calls = [], [], []
    original = torch.nn.Module.compile

    def note(model, **options):
        original(model, **options)
        inner = model._compiled_call_impl
        model._compiled_call_impl = lambda *a: calls.append(a) or inner(*a)
        compiled.append(type(model).__name__)
    monkeypatch.setattr(torch.nn.Module, 'compile', note)
    # Without a compiler: what would be compiled runs as it is
    with torch.compiler.set_stance('force_eager'):
        for out, flag in ((tmp_path / 'eager', False), (tmp_path / 'compiled', True)):
            run(STAGES[name], out, shared_data, steps=2, batch_size=8, compile=flag, init=sft_run,
                reward=rm_run, rollout_size=8)
            logs.append(log_rows(out))
    assert logs[0] == logs[1]
    assert compiled == {'ppo': ['GPT', 'GPT', 'ScalarGPT'], 'rm': ['ScalarGPT']}.get(name, ['GPT'])
    # Every compiled call has the tokens alone, (B, T): no cache and no positions
    assert calls and all(len(arguments) == 1 and arguments[0].dim() == 2 for arguments in calls)
    assert same(*(load_checkpoint(tmp_path / out, [name])['weights']
                  for out in ('eager', 'compiled')))


@pytest.mark.parametrize('name', STAGES)
def test_bfloat16_starts_where_float32_does(shared_data, sft_run, rm_run, tmp_path, name):
    """With --dtype=bfloat16 the first losses agree with float32's to bf16's rounding, and PPO's
    first ratio is 1 within 0.01: the sampler and the update round alike."""
    first = []
    for dtype in ('float32', 'bfloat16'):
        out = tmp_path / f'{name}-{dtype}'
        run(STAGES[name], out, shared_data, steps=2, batch_size=8, dtype=dtype,
            init=sft_run, reward=rm_run, rollout_size=8)
        first.append(read_log(out, 'norm')[0])
    for key in ('loss', 'kl', 'ratio'):
        if key in first[0]:
            assert first[1][key] == pytest.approx(first[0][key], abs=0.01), key
