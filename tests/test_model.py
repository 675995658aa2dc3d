"""
Checks the model, its logprobs and scores, and the sampler.

GPT-2 is compared with plain numpy in float64, attention written as loops; the sampler with a loop
that recomputes everything; logprobs and masks with numbers by hand.
"""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prefgpt
from conftest import Table, record, tiny_config, tiny_gpt, tiny_scalar
from prefgpt import (GPT, GPTConfig, ScalarGPT, draw, generate, last_column, last_scores,
                     make_batch, token_logprobs)

EOS = 16                        # of the tiny models, whose vocabulary is 0 to 16
# Ragged prompts and responses: length 1 on either side, 0 and EOS inside, with and without EOS
ROWS = [([3, 1, 4, 1, 5], [9, 2, EOS]), ([2], [7, 1, 8, 2, 8, EOS]), ([EOS, 0, 3], [EOS]),
        ([1, 6], [1]), ([14, 0, 0, EOS, 2], [0, 0, EOS, 0])]
PROMPTS = [[3, 1, 4, 1, 5], [2], [EOS, 0, 3], [7, EOS], [0, 0, 0, 0, 0, 0, 9]]


# ----------------------------------------------------------------------------- GPT-2, written out

def numpy_norm(x, weights, name):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return ((x - mean) / np.sqrt(variance + 1e-5) * weights[name + '.weight']
            + weights[name + '.bias'])


def numpy_linear(x, weights, name):
    return x @ weights[name + '.weight'].T + weights[name + '.bias']


def numpy_attention(q, k, v, n_head):
    """Computes softmax(q k' / sqrt(d)) v over the past, one position and one head at a time."""
    T, C = q.shape
    d = C // n_head
    out = np.zeros_like(q)
    for t in range(T):
        for h in range(n_head):
            part = slice(h * d, (h + 1) * d)
            weights = np.array([math.exp(q[t, part] @ k[s, part] / math.sqrt(d))
                                for s in range(t + 1)])
            out[t, part] = sum(w * v[s, part] for s, w in enumerate(weights / weights.sum()))
    return out


def numpy_gpt(model, row):
    """Returns hidden states (T, C) and logits (T, V) of one row of ids, as GPT-2 defines them."""
    w = {name: p.detach().numpy().astype(np.float64) for name, p in model.state_dict().items()}
    C = model.config.n_embd
    x = np.stack([w['wte.weight'][token] + w['wpe.weight'][t] for t, token in enumerate(row)])
    for i in range(model.config.n_layer):
        qkv = numpy_linear(numpy_norm(x, w, f'h.{i}.ln_1'), w, f'h.{i}.attn.c_attn')
        attended = numpy_attention(qkv[:, :C], qkv[:, C:2 * C], qkv[:, 2 * C:],
                                   model.config.n_head)
        x = x + numpy_linear(attended, w, f'h.{i}.attn.c_proj')
        a = numpy_linear(numpy_norm(x, w, f'h.{i}.ln_2'), w, f'h.{i}.mlp.c_fc')
        gelu = 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a ** 3)))
        x = x + numpy_linear(gelu, w, f'h.{i}.mlp.c_proj')
    x = numpy_norm(x, w, 'ln_f')
    return x, x @ w['wte.weight'].T


def test_forward_is_gpt2():
    """I24: the whole model is GPT-2. Catches the exact GELU, post-LayerNorm, a missing causal mask,
    a wrong scale of attention, q, k and v in another order, and an untied output projection. The
    reward and value model is score . hidden at every position, and 0 at the start."""
    scalar = tiny_scalar(n_layer=3, n_head=4).double()
    model = scalar.body
    for prompt, response in ROWS:
        row = torch.tensor([prompt + response])
        hidden, logits = numpy_gpt(model, prompt + response)
        scores = hidden @ scalar.score.weight.detach().numpy()[0]
        for ours, expected in ((model(row), hidden), (model.logits(model(row)), logits),
                               (scalar(row), scores)):
            np.testing.assert_allclose(ours[0].detach().numpy(), expected, rtol=0, atol=1e-11)
    assert scalar.score.bias is None
    assert not ScalarGPT(tiny_config())(torch.randint(17, (3, 9))).any()


def test_parameter_count():
    """The defaults are GPT-2 124M, whose output projection is the token embedding."""
    with torch.device('meta'):
        model = GPT(GPTConfig())
    # 50257*768 + 1024*768 + 12 (12*768^2 + 13*768) + 2*768
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_initial_weights():
    """GPT-2's init is N(0, init_std), divided by sqrt(2 n_layer) where the residual stream is
    written; biases are 0, LayerNorms 1. Catches sqrt(n_layer), or only one of the two scaled."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, vocab_size=512, n_layer=8, n_head=4, n_embd=64,
                          init_std=0.05))
    for name in ('c_attn', 'c_fc', 'attn.c_proj', 'mlp.c_proj', 'wte', 'wpe'):
        weights = torch.cat([p.detach().flatten() for key, p in model.named_parameters()
                             if key.endswith(name + '.weight')])
        expected = 0.05 / 4 if 'c_proj' in name else 0.05           # sqrt(2 * 8) = 4
        # The sample deviation of n draws is off by 1 / sqrt(2n) of it: allow five of that
        bound = 5 / math.sqrt(2 * len(weights))
        assert weights.std().item() == pytest.approx(expected, rel=bound), name
        assert abs(weights.mean().item()) < 5 * expected / math.sqrt(len(weights)), name
    for name, p in model.named_parameters():
        if p.dim() == 1:
            expected = 1.0 if 'ln_' in name and name.endswith('weight') else 0.0
            assert torch.equal(p, torch.full_like(p, expected)), name


def test_what_does_not_fit_the_block_is_refused():
    """One token too many raises an error that names block_size, in a forward pass and, prompt and
    response together, in generate; block_size tokens do not."""
    model = tiny_gpt()
    assert model(torch.zeros(1, 32, dtype=torch.long)).shape == (1, 32, 16)
    with pytest.raises(AssertionError, match='block_size=32'):
        model(torch.zeros(1, 33, dtype=torch.long))
    tokens, _ = generate(model, [[1] * 24], 8, 99, temperature=0)   # no token is 99: no end
    assert tokens.shape == (1, 32)
    with pytest.raises(AssertionError, match='block_size=32'):
        generate(model, [[1], [1] * 25], 8, EOS)


# ----------------------------------------------------------------------------- batches and masks

def test_make_batch_by_hand():
    """I6: y is x a token later, and the mask is true from the column that emits the first response
    token to the one that emits EOS. Ids 0 and EOS inside a row change nothing. Catches a second
    shift, and a mask that is read off the ids."""
    tokens, x, y, mask = make_batch([([5, EOS, 0], [0, 7, EOS]), ([8], [EOS])])
    assert tokens.tolist() == [[5, EOS, 0, 0, 7, EOS], [8, EOS, 0, 0, 0, 0]]
    assert x.tolist() == [[5, EOS, 0, 0, 7], [8, EOS, 0, 0, 0]]
    assert y.tolist() == [[EOS, 0, 0, 7, EOS], [EOS, 0, 0, 0, 0]]
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == [[0, 0, 1, 1, 1], [1, 0, 0, 0, 0]]


def test_last_column_by_hand():
    """I3: the column that emits the last response token, with and without padding after it, for
    one token and for a whole row, whatever the prompt's length. Catches one early, one late, the
    number of response tokens, and the last column of the batch."""
    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0],
                         [0, 0, 0, 0, 0, 1], [0, 0, 1, 0, 0, 0]]).bool()
    assert last_column(mask).tolist() == [3, 5, 0, 5, 2]
    # Row by row, ROWS have 5 + 3, 1 + 6, 3 + 1, 2 + 1 and 5 + 4 tokens: two less is the column
    assert last_column(make_batch(ROWS)[-1]).tolist() == [6, 5, 2, 1, 7]


@pytest.mark.parametrize('row', [([], [1]), ([1], [])])
def test_make_batch_refuses_empty_sides(row):
    """Without a prompt nothing emits the first token; without a response there is no loss."""
    with pytest.raises(AssertionError):
        make_batch([([1], [2]), row])


# ----------------------------------------------------------------------------- invariances

def logprobs_scores_gradients(tokens, mask, temperature, dtype=torch.double):
    """Returns all that a stage reads off a batch, and the gradients of a loss on it."""
    policy, scalar = tiny_gpt().to(dtype), tiny_scalar(seed=1).to(dtype)
    logprobs = token_logprobs(policy, tokens[:, :-1], tokens[:, 1:], mask, temperature)
    scores = last_scores(scalar, tokens, mask)
    values = scalar(tokens[:, :-1])
    ((logprobs ** 2).sum() + (scores ** 2).sum() + (values[mask] ** 2).sum()).backward()
    gradients = [p.grad for model in (policy, scalar) for p in model.parameters()]
    return logprobs.detach(), scores.detach(), values.detach(), gradients


def assert_same_gradients(ours, expected, tolerance=1e-12):
    """Asserts that each tensor's gradient is right to a share of its norm, and that none is 0."""
    for a, b in zip(ours, expected, strict=True):
        assert 0 < b.norm() and (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_padding_changes_nothing(temperature):
    """I2: three more columns of padding change no logprob, score, value or gradient. Catches masks
    and last positions counted from the right end, and attention to the right."""
    tokens, _, _, mask = make_batch(ROWS)
    logprobs, scores, values, gradients = logprobs_scores_gradients(
        F.pad(tokens, (0, 3), value=11), F.pad(mask, (0, 3)), temperature)
    before = logprobs_scores_gradients(tokens, mask, temperature)
    torch.testing.assert_close(logprobs, F.pad(before[0], (0, 3)), rtol=0, atol=1e-12)
    assert not logprobs[:, -3:].any()
    torch.testing.assert_close(scores, before[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(values[:, :-3][mask], before[2][mask], rtol=0, atol=1e-12)
    assert_same_gradients(gradients, before[3])


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_batch_composition_changes_nothing(temperature):
    """I3: a row alone has the logprobs, the score and the values that it has inside a batch, and
    the batch's gradient is the sum of the rows' own. Catches what crosses from row to row."""
    tokens, _, _, mask = make_batch(ROWS)
    logprobs, scores, values, gradients = logprobs_scores_gradients(tokens, mask, temperature)
    sums = [torch.zeros_like(gradient) for gradient in gradients]
    for b, row in enumerate(ROWS):
        tokens1, x1, _, mask1 = make_batch([row])
        alone = logprobs_scores_gradients(tokens1, mask1, temperature)
        torch.testing.assert_close(logprobs[b, :x1.size(1)], alone[0][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(scores[b:b + 1], alone[1], rtol=0, atol=1e-12)
        torch.testing.assert_close(values[b, :x1.size(1)], alone[2][0], rtol=0, atol=1e-12)
        sums = [total + gradient for total, gradient in zip(sums, alone[3])]
    assert_same_gradients(sums, gradients)


@pytest.mark.parametrize('temperature', [1.0, 0.7])
@pytest.mark.parametrize('pad', [0, EOS, 'random'])
def test_pad_value_changes_nothing(pad, temperature):
    """I5: the ids in the padding do not matter, bit for bit. Catches masks made from ids."""
    tokens, _, _, mask = make_batch(ROWS)
    lengths = torch.tensor([len(prompt) + len(response) for prompt, response in ROWS])
    padding = torch.arange(tokens.size(1)) >= lengths[:, None]
    ids = (torch.randint(17, tokens.shape, generator=torch.Generator().manual_seed(0))
           if pad == 'random' else torch.full_like(tokens, pad))
    before, after = (logprobs_scores_gradients(z, mask, temperature, torch.float32)
                     for z in (tokens, torch.where(padding, ids, tokens)))
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
    assert torch.equal(after[2][mask], before[2][mask])
    assert all(map(torch.equal, after[3], before[3]))


# ----------------------------------------------------------------------------- token_logprobs

class Leaf:
    """A fake model whose logits (B, T, V) are a tensor of ours, so that it has their gradient."""

    def __init__(self, logits):
        self.leaf, self.config = logits, GPTConfig(vocab_size=logits.size(-1))

    def __call__(self, tokens):
        return self.leaf[:, :tokens.size(1)]

    def logits(self, hidden):
        return hidden


def test_logprobs_of_a_table():
    """I6: logprobs of a hand-made table. Catches every shift by one, of y, x or the mask."""
    model = Table([[.50, .25, .25], [.10, .20, .70], [.60, .30, .10]])      # p(column | row)
    _, x, y, mask = make_batch([([0, 1], [2, 0, 0]), ([2], [1])])
    # Row 0: after 1 comes 2, after 2 comes 0, after 0 comes 0. Row 1: after 2 comes 1.
    # A temperature of 1/2 squares the probabilities: .49 / (.01 + .04 + .49) and so on
    for temperature, row0, row1 in ((1.0, [.7, .6, .5], .3),
                                    (0.5, [.49 / .54, .36 / .46, .25 / .375], .09 / .46)):
        expected = torch.tensor([[1, *row0], [row1, 1, 1, 1]], dtype=torch.double).log()
        logprobs = token_logprobs(model, x, y, mask, temperature)
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_gradient_reaches_the_response_and_nothing_else(temperature):
    """I7: d loss / d logits is 0 at prompt and pad columns, and (p - onehot) / n / T at each
    response column, from the first token to EOS; one entry is checked by finite differences.
    Catches a mask one column off at either end, or with the prompt or the padding in it."""
    generator = torch.Generator().manual_seed(1)
    _, x, y, mask = make_batch(ROWS)
    logits = torch.randn(*x.shape, 17, generator=generator, dtype=torch.double)

    def loss_of(logits):
        return -token_logprobs(Leaf(logits), x, y, mask, temperature).sum() / mask.sum()

    leaf = logits.clone().requires_grad_()
    loss_of(leaf).backward()
    response_tokens = sum(len(response) for _, response in ROWS)    # 3 + 6 + 1 + 1 + 4
    for b, (prompt, response) in enumerate(ROWS):
        for t in range(x.size(1)):
            # Column t emits token t + 1 of the row
            if len(prompt) <= t + 1 < len(prompt) + len(response):
                expected = np.exp(logits[b, t].numpy() / temperature)
                expected /= expected.sum()
                expected[response[t + 1 - len(prompt)]] -= 1
                expected /= response_tokens * temperature
                np.testing.assert_allclose(leaf.grad[b, t].numpy(), expected, rtol=0, atol=1e-12)
            else:
                assert not leaf.grad[b, t].any(), (b, t)

    b, t, v = 0, 6, EOS                             # the column that emits row 0's EOS
    up, down = logits.clone(), logits.clone()
    up[b, t, v] += 1e-5
    down[b, t, v] -= 1e-5
    slope = (loss_of(up) - loss_of(down)).item() / 2e-5
    assert slope == pytest.approx(leaf.grad[b, t, v].item(), rel=1e-7)


def test_every_weight_has_the_gradient_of_its_finite_difference():
    """I7: along a random direction of each tensor the loss changes by gradient . direction, at
    temperature 0.7. Catches a tensor that is used but gets no gradient, such as embeddings tied
    one way."""
    policy, scalar = tiny_gpt().double(), tiny_scalar(seed=1).double()
    tokens, x, y, mask = make_batch(ROWS)

    def loss():
        scores, values = last_scores(scalar, tokens, mask), scalar(x)[mask]
        logprobs = token_logprobs(policy, x, y, mask, 0.7)
        return (logprobs.sum() + (scores ** 2).sum() + (values ** 2).sum()) / 10

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    for name, p in [*policy.named_parameters(), *scalar.named_parameters()]:
        direction = torch.randn(p.shape, generator=generator, dtype=torch.double)
        sides = []
        for step in (1e-5, -2e-5):
            p.data += step * direction
            sides.append(loss().item())
        p.data += 1e-5 * direction
        slope = (p.grad * direction).sum().item()
        assert (sides[0] - sides[1]) / 2e-5 == pytest.approx(slope, rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize('temperature', [1.0, 0.7])
@pytest.mark.parametrize('masked', ['responses', 'some', 'all'])
def test_token_logprobs_against_full_logits(temperature, masked):
    """token_logprobs takes any mask, even with a row without a true column, and gives there what a
    float64 log_softmax over all logits gives, and 0 elsewhere."""
    model = tiny_gpt()
    _, x, y, mask = make_batch(ROWS)
    if masked != 'responses':
        chance = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
        mask = chance < (0.3 if masked == 'some' else 1)
        mask[1] = masked == 'all'
    logprobs = (model.logits(model(x)).double() / temperature).log_softmax(-1)
    expected = logprobs.gather(2, y[..., None])[..., 0] * mask
    torch.testing.assert_close(token_logprobs(model, x, y, mask, temperature).double(), expected,
                               rtol=0, atol=2e-6)


@pytest.mark.parametrize('at_once', [1, 17 * 4, 17 * 5])
def test_blocks_of_logits_change_nothing(monkeypatch, at_once):
    """Large logits come in blocks under checkpointing: no block is larger than allowed (but for
    one row), and values and gradients are those of one piece."""
    model = tiny_gpt().double()
    _, x, y, mask = make_batch(ROWS)

    def run():
        model.zero_grad()
        logprobs = token_logprobs(model, x, y, mask, 0.7)
        (logprobs ** 2).sum().backward()
        return logprobs.detach(), [p.grad.clone() for p in model.parameters()]

    whole = run()
    sizes, logits = [], model.logits
    monkeypatch.setattr(model, 'logits', lambda h: sizes.append(len(h)) or logits(h))
    monkeypatch.setattr(prefgpt, 'LOGITS_AT_ONCE', at_once)
    blocks = run()
    assert max(sizes) <= max(1, at_once // 17)
    assert sum(sizes) == 2 * mask.sum()             # once forward, again in the backward pass
    torch.testing.assert_close(blocks[0], whole[0], rtol=0, atol=1e-12)
    for a, b in zip(blocks[1], whole[1]):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_spare_logits_change_nothing():
    """V rounded up to 64, as CUDA gets it: the spare logits are -inf, and the losses and gradients
    are those without them."""
    model = tiny_gpt().double()
    _, x, y, mask = make_batch(ROWS)
    out = []
    for multiple in (1, 64):
        model.zero_grad()
        logits = model.logits(model(x)[mask], multiple)             # (M, 17) or (M, 64)
        F.cross_entropy(logits, y[mask]).backward()
        out.append((logits.detach(), [p.grad.clone() for p in model.parameters()]))
    (plain, gradients), (padded, same) = out
    assert torch.equal(padded[:, :17], plain) and (padded[:, 17:] == -math.inf).all()
    assert padded.size(1) == 64
    for a, b in zip(same, gradients):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_logprobs_and_scores_are_at_least_float32():
    """float64 stays float64; a bfloat16 model and bfloat16 autocast give float32. Under autocast
    the two projections stay in float32 too: rounded to bfloat16, a logit of -100 is off by up to a
    quarter, which PPO's first ratio would show, and close scores would tie."""
    tokens, x, y, mask = make_batch(ROWS)
    for model, dtype in ((tiny_gpt().double(), torch.float64), (tiny_gpt(), torch.float32),
                         (tiny_gpt().bfloat16(), torch.float32)):
        assert token_logprobs(model, x, y, mask).dtype == dtype
    policy, model = tiny_gpt(), tiny_scalar()
    with torch.autocast('cpu', torch.bfloat16):
        hidden, scores = policy(x), last_scores(model, tokens, mask)
        logits, logprobs = policy.logits(hidden), token_logprobs(policy, x, y, mask)
    assert logits.dtype == scores.dtype == logprobs.dtype == torch.float32
    expected = hidden.double() @ policy.wte.weight.double().T
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logprobs.double()[mask], expected.log_softmax(-1).gather(
        2, y[..., None])[..., 0][mask], rtol=0, atol=1e-5)
    assert not torch.equal(scores, scores.bfloat16().float())


# ----------------------------------------------------------------------------- last_scores

def test_last_scores_against_a_loop():
    """I3: a row's score is the model's number at the last token of the row alone, EOS or not, even
    of a response of one token. Catches reading one place early or late, at EOS ids, or in the
    padding."""
    model = tiny_scalar(seed=5).double()
    tokens, _, _, mask = make_batch(ROWS)
    scores = last_scores(model, tokens, mask)
    for b, (prompt, response) in enumerate(ROWS):
        row = torch.tensor([prompt + response])
        torch.testing.assert_close(scores[b], model(row)[0, -1], rtol=0, atol=1e-12)

    def place(tokens):
        return torch.arange(tokens.size(1)).float().expand(tokens.shape)
    assert last_scores(place, tokens, mask).tolist() == [7, 6, 3, 2, 8]     # a row's length - 1


# ----------------------------------------------------------------------------- draw

def test_draw_at_the_boundaries():
    """I14: each of four equal tokens has its quarter of [0, 1), as the first one whose cumulative
    probability exceeds u. Catches an inverse CDF off by one, or the lower token at a boundary."""
    just_below = 1 - 2 ** -24
    u = torch.tensor([0, .25 * just_below, .25, .5 * just_below, .5, .75, just_below])
    assert draw(torch.zeros(7, 4), u, 1.0).tolist() == [0, 0, 1, 1, 2, 3, 3]


def test_draw_never_takes_the_impossible():
    """I14: a token of probability 0 is drawn neither at u = 0 nor just below 1; nor, where the CDF
    of many tokens ends below 1 in float32, at a u above that end. Catches a u that is not scaled
    to the end of the CDF."""
    logits = torch.tensor([[-math.inf, 0, 0, -math.inf]]).expand(2, 4)
    assert draw(logits, torch.tensor([0, 1 - 2 ** -24]), 1.0).tolist() == [1, 2]
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(0))
    logits[:, -1] = -math.inf
    assert (logits.softmax(-1).cumsum(-1)[:, -1] < 1).any()
    assert (draw(logits, torch.full((64,), 1 - 2 ** -24), 1.0) < 4999).all()


@pytest.mark.parametrize('temperature, expected', [
    (1.0, [100, 200, 300, 400]),
    (0.5, [33.3, 133.3, 300, 533.3]),       # squares: 1, 4, 9, 16 of 30
    (2.0, [162.7, 230.1, 281.8, 325.4])])   # roots: 1, 1.4142, 1.7321, 2 of 6.1463
def test_draw_follows_the_distribution(temperature, expected):
    """I14: with u on an even grid of 1000 midpoints each token comes 1000 p^(1/T) / Z times.
    Catches a temperature left out, or multiplied by."""
    logits = torch.tensor([.1, .2, .3, .4]).log().expand(1000, 4) + 3.0
    u = (torch.arange(1000) + 0.5) / 1000
    counts = draw(logits, u, temperature).bincount(minlength=4).tolist()
    assert counts == pytest.approx(expected, abs=1)


# ----------------------------------------------------------------------------- generate

def responses_of(tokens, mask):
    return [row[chosen].tolist() for row, chosen in zip(tokens[:, 1:], mask)]


def naive_response(model, prompt, u, temperature):
    """Samples one response without cache, batch or padding: the whole row again for each token."""
    row = list(prompt)
    for number in u.tolist():
        logits = model.logits(model(torch.tensor([row])))[0, -1].double()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            weights = torch.exp((logits - logits.max()) / temperature).tolist()
            total, below, token = sum(weights), 0.0, 0
            while below + weights[token] / total <= number:
                below += weights[token] / total
                token += 1
        row.append(token)
        if token == EOS:
            break
    return row[len(prompt):]


@pytest.mark.parametrize('temperature', [0, 0.7, 1.0, 1.5])
@torch.no_grad()
def test_generate_is_the_naive_loop(temperature):
    """I4: cached sampling of ragged prompts gives the tokens of a loop that recomputes everything:
    it stops at EOS, not at an EOS in the prompt, and a row without EOS gets max_new_tokens tokens.
    Mask and layout are make_batch's. Catches a cache one place off, and u of another row."""
    model = tiny_gpt(seed=4)
    prompts = PROMPTS * 4
    generator = torch.Generator().manual_seed(3)
    tokens, mask = generate(model, prompts, 20, EOS, temperature, generator)
    u = torch.rand(len(prompts), 20, generator=torch.Generator().manual_seed(3))
    expected = [naive_response(model, prompt, numbers, temperature)
                for prompt, numbers in zip(prompts, u)]
    tokens2, _, _, mask2 = make_batch(list(zip(prompts, expected)))
    assert tokens.tolist() == tokens2.tolist() and torch.equal(mask, mask2)
    # The case is a real one: many lengths, rows without EOS, id 0 (the padding's) in a response
    assert len({len(response) for response in expected if response[-1] == EOS}) >= 3
    assert any(EOS not in response for response in expected)
    assert any(0 in response for response in expected)


@torch.no_grad()
def test_sampler_logits_are_the_full_forwards(monkeypatch):
    """I4: at each step the cached sampler sees the logits of a whole forward pass."""
    model = tiny_gpt(seed=4)
    seen = record(monkeypatch, model, 'logits')
    tokens, mask = generate(model, PROMPTS, 20, EOS, 1.0, torch.Generator().manual_seed(3))
    monkeypatch.undo()
    full = model.logits(model(tokens[:, :-1]))                      # (B, T, V)
    lengths = mask.sum(1).tolist()
    assert len(set(lengths)) > 2
    for b, prompt in enumerate(PROMPTS):
        for t in range(lengths[b]):
            torch.testing.assert_close(seen[t][1][b], full[b, len(prompt) - 1 + t], rtol=0,
                                       atol=1e-5)


@torch.no_grad()
def test_sampler_reads_no_junk_from_the_cache(monkeypatch):
    """I5: junk in the cache before the prefill changes no token of ragged prompts: a row reads no
    place that holds nothing yet, or a pad's key. Catches a decode mask one place wide."""
    model = tiny_gpt(seed=4)
    before = generate(model, PROMPTS, 20, EOS, 0.7, torch.Generator().manual_seed(3))
    empty_cache = model.empty_cache

    def full_cache(B, S):
        junk = torch.Generator().manual_seed(0)
        return 10 * torch.randn(empty_cache(B, S).shape, generator=junk)
    monkeypatch.setattr(model, 'empty_cache', full_cache)
    after = generate(model, PROMPTS, 20, EOS, 0.7, torch.Generator().manual_seed(3))
    assert before[0].tolist() == after[0].tolist() and torch.equal(before[1], after[1])


def test_generate_however_rows_are_split():
    """I3: one batch, batches of 2 and single rows give the same text, with one generator for all
    calls. Catches random numbers drawn step by step."""
    model = tiny_gpt(seed=4)

    def text(size):
        generator = torch.Generator().manual_seed(4)
        out = []
        for i in range(0, len(PROMPTS), size):
            out += responses_of(*generate(model, PROMPTS[i:i + size], 20, EOS, 1.0, generator))
        return out

    assert text(5) == text(2) == text(1)


@pytest.mark.parametrize('length', [1, 15, 16, 17, 18, 31, 32, 33, 40])
def test_generate_asks_every_16_tokens(monkeypatch, length):
    """generate checks every 16 tokens whether all rows have ended: this makes no response longer
    or shorter, and nothing is computed afterwards."""
    model, drawn = tiny_gpt(block_size=64), []
    monkeypatch.setattr(prefgpt, 'draw', lambda logits, *_: drawn.append(1) or torch.full(
        (2,), EOS if len(drawn) == length else 1))
    tokens, mask = generate(model, [[1, 1, 1], [1, EOS]], 40, EOS)
    assert responses_of(tokens, mask) == [[1] * (length - 1) + [EOS]] * 2
    assert len(drawn) == min(40, 16 * math.ceil(length / 16))
