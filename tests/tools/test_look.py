"""tools/look.py: the table of one response, against loops over the checkpoint's own models."""
import pytest
import torch

import train_ppo
from data.text import build_tokenizer
from prefgpt import GPT, POLICIES, UserError, load_checkpoint, load_model
from tools import look


@pytest.fixture(scope='module')
def ppo_run(shared_data, sft_run, rm_run, tmp_path_factory):
    """A run folder that PPO has left after two steps."""
    out = tmp_path_factory.mktemp('runs') / 'ppo'
    train_ppo.main(train_ppo.Config(
        data=str(shared_data), init=str(sft_run), reward=str(rm_run), out=str(out), steps=2,
        rollout_size=8, batch_size=4, max_new_tokens=6, eval_every=2, lr=1e-2, device='cpu'))
    return out


def test_rows_against_loops(ppo_run, rm_run):
    """Logprobs token by token from whole forward passes; the rewards add up to the score minus beta
    times the log-ratio; an advantage with gamma 1 is the discounted sum of deltas."""
    rows = look.main(look.Config(runs=(str(ppo_run),), prompt='say b:', seed=1))
    saved = load_checkpoint(ppo_run, ['ppo'])
    tokenizer, cfg = build_tokenizer(saved['tokenizer']), train_ppo.Config(**saved['config'])
    prompt = tokenizer.encode_ordinary('user: say b:')
    responses = rows[1:]
    assert [row['mask'] for row in rows] == [0] + [1] * len(responses)
    assert list(rows[0].values())[3:] == [0.0] * 5
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


def test_mistakes_are_told(ppo_run, sft_run):
    """No run, no prompt, or a run of another stage."""
    for wrong in (dict(), dict(runs=(str(ppo_run),)), dict(runs=(str(sft_run),), prompt='say b:')):
        with pytest.raises(UserError):
            look.main(look.Config(**wrong))
