"""
prefgpt: the GPT-2 model, the sampler, and what every stage of preference tuning shares.

Read it in order: model, logprobs and scores, sampling, text and rows, randomness and batches,
optimization, checkpoints, runs and their command line. The methods are not here: each train_*.py
holds its own losses and its own loop.

One layout for every tensor. A row is a prompt and a response, contiguous, padded on the RIGHT:
with causal attention a real token never sees a pad, so there is no attention mask and there are
no position ids. make_batch shifts once, x = tokens[:, :-1] and y = tokens[:, 1:]; from there on
column t of every (B, T) tensor is the act of emitting y[:, t] in the state x[:, :t+1].

Letters: B rows, T positions, C channels, V vocabulary, H heads, S places of the cache,
M response tokens of a batch, all rows together.

What it does not do: dropout, several GPUs, fp16, top-k or top-p (the distribution that is
sampled is the distribution that is scored).
"""
import argparse, base64, dataclasses, difflib, hashlib, importlib.util, inspect, itertools
import json, math, os, pickle, re, resource, shutil, sys, time, zipfile, zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class UserError(ValueError):
    """Something that was asked for cannot be done: told in one line, without a traceback."""


class DataError(UserError):
    """A row, a file or a folder of data is not what it should be; names file and line."""


# ----------------------------------------------------------------------------- the model

@dataclass
class GPTConfig:
    """The shape of a GPT-2; the defaults are the 124M model. Biases and tied embeddings always."""
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    init_std: float = 0.02


class Attention(nn.Module):
    """
    Causal self-attention: softmax(q k' / sqrt(C/H)) v in each of H heads.

    In sampling, cache (2, B, H, S, C/H) holds this layer's keys and values, positions (B,) says
    where each row stands, and visible (B, 1, 1, S) which places of the cache it may look at.
    """

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)   # q, k and v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, positions=None, visible=None):
        B, T, C = x.shape                                           # x (B, T, C)
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.transpose(1, 3).unbind(2)                     # (B, H, T, C/H)
        if positions is None:
            if cache is not None:                                   # prefill: keep keys, values
                cache[0, :, :, :T], cache[1, :, :, :T] = k, v
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:                                                       # decode: T is 1
            rows = torch.arange(B, device=x.device)
            # Each row at its own place. Two indices with a ':' between them bring B to the front
            cache[:, rows, :, positions] = qkv[:, 0, 1:]            # k and v: (B, 2, H, C/H)
            out = F.scaled_dot_product_attention(q, cache[0], cache[1], attn_mask=visible)
        return self.c_proj(out.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """The position-wise half of a block. GPT-2's GELU is the tanh form."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate='tanh'))


class Block(nn.Module):
    """x + attention, then x + MLP, each reading a LayerNorm of x (pre-LayerNorm)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, positions=None, visible=None):
        x = x + self.attn(self.ln_1(x), cache, positions, visible)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 with tied embeddings. forward gives hidden states; logits projects them."""

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0, f'{config.n_head} heads, {config.n_embd} wide'
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)   # also the output projection
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # GPT-2: what is added to the residual stream is scaled down by its 2 n_layer terms
                scale = (2 * config.n_layer) ** -0.5 if 'c_proj' in name else 1.0
                nn.init.normal_(p, std=config.init_std * scale)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def forward(self, tokens, cache=None, positions=None):
        """
        Hidden states (B, T, C) of tokens (B, T).

        Training and scoring pass tokens alone. Sampling first passes the prompts with an empty
        cache (prefill), then one token a row, (B, 1), with that row's own positions (B,).
        """
        T = tokens.size(1)
        assert T <= self.config.block_size, (
            f'{T} tokens exceed block_size={self.config.block_size}: shorten the rows')
        if positions is None:
            x = self.wte(tokens) + self.wpe(torch.arange(T, device=tokens.device))  # (B, T, C)
            visible = None
        else:
            x = self.wte(tokens) + self.wpe(positions)[:, None]     # (B, 1, C)
            # A place past the row's own position holds a pad's key or nothing: never look there
            places = torch.arange(cache.size(-2), device=tokens.device)     # (S,)
            visible = (places <= positions[:, None])[:, None, None]         # (B, 1, 1, S)
        for layer, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[layer], positions, visible)
        return self.ln_f(x)

    def logits(self, hidden):
        """(..., C) -> (..., V), by the token embedding itself."""
        # Not in bfloat16: near -100 its numbers are 0.5 apart, and PPO's first ratio would show it
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(self.wte.weight.dtype), self.wte.weight)

    def empty_cache(self, B, S):
        """Room for the keys and values of S places of B rows: (layers, 2, B, H, S, C/H)."""
        c, weight = self.config, self.wte.weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        return torch.zeros(c.n_layer, 2, B, c.n_head, S, c.n_embd // c.n_head,
                           dtype=dtype, device=weight.device)


class ScalarGPT(nn.Module):
    """A GPT body that gives one number per position: the reward model and the value model."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.body = GPT(config)
        self.score = nn.Linear(config.n_embd, 1, bias=False)
        nn.init.zeros_(self.score.weight)        # every score is 0 at the start

    def forward(self, tokens):
        hidden = self.body(tokens)                                  # (B, T, C)
        # Not in bfloat16: close scores would tie
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score(hidden.to(self.score.weight.dtype)).squeeze(-1)       # (B, T)


# ----------------------------------------------------------------------------- logprobs and scores

def make_batch(rows, device='cpu'):
    """
    Rows of (prompt, response), lists of ids, as tokens (B, T+1), x, y and response_mask (B, T).

    The one shift of the project: y[:, t] is the token after x[:, t]. response_mask is true where
    y is a response token, EOS included; it comes from lengths, never from token ids.

    >>> tokens, x, y, response_mask = make_batch([([1, 2], [3, 4]), ([5], [6])])
    >>> y.tolist(), response_mask.int().tolist()
    ([[2, 3, 4], [6, 0, 0]], [[0, 1, 1], [1, 0, 0]])
    """
    assert all(prompt and response for prompt, response in rows), 'an empty prompt or response'
    width = max(len(prompt) + len(response) for prompt, response in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)        # the pad's id does not matter
    response_mask = torch.zeros(len(rows), width - 1, dtype=torch.bool)
    for b, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        tokens[b, :end] = torch.tensor(prompt + response)
        response_mask[b, len(prompt) - 1:end - 1] = True
    tokens, response_mask = tokens.to(device), response_mask.to(device)
    return tokens, tokens[:, :-1], tokens[:, 1:], response_mask


LOGITS_AT_ONCE = 2 ** 25    # most numbers in one block of logits: 128 MB of float32


def token_logprobs(model, x, y, mask, temperature=1.0):
    """
    log p(y[:, t] | x[:, :t+1]) at the given temperature, (B, T), float32 at least, 0 off the mask.

    Only masked positions meet the vocabulary, so (B, T, V) never exists. Where even their logits
    are large, they are computed in blocks and again in the backward pass (checkpointing).
    Old, new and reference logprobs all come from here: otherwise PPO's first ratio is not 1.
    """
    def logprobs_of(hidden, targets):
        logits = model.logits(hidden)                               # (M, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if temperature != 1:                    # at 1 it is a pass over (M, V) for nothing
            logits = logits / temperature
        return -F.cross_entropy(logits, targets, reduction='none')  # log_softmax, gathered: (M,)

    hidden, targets = model(x)[mask], y[mask]                       # (M, C), (M,)
    block = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    if len(hidden) <= block:
        picked = logprobs_of(hidden, targets)
    else:
        picked = torch.cat([checkpoint(logprobs_of, h, t, use_reentrant=False)
                            for h, t in zip(hidden.split(block), targets.split(block))])
    return picked.new_zeros(x.shape).masked_scatter(mask, picked)


def last_scores(model, tokens, response_mask):
    """The score of each response, (B,): the model's number at its last token, EOS or not."""
    T = response_mask.size(1)
    # y[:, t] is tokens[:, t+1]: a response that ends in column t ends at place t + 1 of tokens
    place = (response_mask * torch.arange(1, T + 1, device=tokens.device)).amax(1)  # (B,)
    return model(tokens).gather(1, place[:, None]).squeeze(1)


# ----------------------------------------------------------------------------- sampling

def draw(logits, u, temperature):
    """
    One token id a row, (B,), from logits (B, V): the inverse CDF at u (B,) in [0, 1).

    The token is the first whose cumulative probability exceeds u. Temperature 0 is greedy.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    cdf = F.softmax(logits, dim=-1).cumsum(-1)                      # (B, V)
    u = u[:, None].to(cdf) * cdf[:, -1:]                            # rounding: the CDF ends near 1
    return torch.searchsorted(cdf, u, right=True).squeeze(1).clamp(max=cdf.size(1) - 1)


@torch.no_grad()
def generate(policy, prompts, max_new_tokens, eos, temperature=1.0, generator=None):
    """
    Samples one response for each prompt, a list of lists of ids, until EOS or max_new_tokens.

    Returns tokens (B, T+1) and response_mask (B, T) in make_batch's layout. The prompts are
    prefilled in one causal pass; then every row goes on at its own position of a static cache.
    All random numbers are drawn before the loop, on the CPU, a row of them for each prompt: the
    same text comes out however the rows are split.
    """
    assert temperature >= 0 and all(prompts), 'a negative temperature or an empty prompt'
    device, B = policy.wte.weight.device, len(prompts)
    u = torch.rand(B, max_new_tokens, generator=generator).to(device)               # (B, new)
    rows = torch.arange(B, device=device)                                           # (B,)
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)       # (B,)
    longest = max(len(prompt) for prompt in prompts)
    assert longest + max_new_tokens <= policy.config.block_size, (
        f'{longest} prompt tokens and {max_new_tokens} new ones exceed block_size='
        f'{policy.config.block_size}: shorten the prompt or lower max_new_tokens')

    tokens = torch.zeros(B, longest + max_new_tokens, dtype=torch.long)             # (B, S)
    for b, prompt in enumerate(prompts):
        tokens[b, :len(prompt)] = torch.tensor(prompt)
    tokens = tokens.to(device)
    cache = policy.empty_cache(B, longest + max_new_tokens)
    hidden = policy.forward(tokens[:, :longest], cache)[rows, starts - 1]           # (B, C)

    running = torch.ones(B, dtype=torch.bool, device=device)
    lengths = torch.zeros_like(starts)                              # of the responses, so far
    for t in range(max_new_tokens):
        token = draw(policy.logits(hidden), u[:, t], temperature)   # (B,)
        tokens[rows, starts + t] = token * running                  # 0 once the row has ended
        lengths += running
        running = running & (token != eos)
        # Asking the device costs a wait: only now and then
        if t + 1 == max_new_tokens or (t % 16 == 15 and not running.any()):
            break
        # The token just drawn stands at place starts + t of its row.
        # forward and not __call__: the shapes change at every step, --compile would recompile
        seen = cache[..., :longest + t + 1, :]
        hidden = policy.forward(token[:, None], seen, starts + t)[:, 0]             # (B, C)

    ends = starts + lengths
    tokens = tokens[:, :int(ends.max())]
    columns = torch.arange(1, tokens.size(1), device=device)        # y's place in tokens
    return tokens, (columns >= starts[:, None]) & (columns < ends[:, None])


# ----------------------------------------------------------------------------- text and rows

# How GPT-2 cuts text into words before BPE (in tiktoken's possessive spelling)
SPLIT_PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$"
                 r"|\s+(?!\S)|\s")
HH_TEMPLATE = '\n\nHuman: {}\n\nAssistant:'
RESPONSES = {'sft': ('response',), 'pairs': ('chosen', 'rejected'), 'prompts': ()}


def read_text(path):
    """The text of a file, or a DataError that names it."""
    try:
        return Path(path).read_bytes().decode('utf-8-sig')
    except OSError as error:
        raise DataError(f'{path}: {error.strerror.lower()}; has prepare.py been run, '
                        'and is the path right?') from None
    except UnicodeDecodeError as error:
        line, byte = error.object[:error.start].count(b'\n') + 1, error.object[error.start]
        raise DataError(f'{path}:{line}: byte 0x{byte:02x} is not UTF-8') from None


def build_tokenizer(text):
    """A tiktoken.Encoding from the text of a .tiktoken file; EOS is the last id."""
    ranks = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise DataError(f'tokenizer, line {number}: not "base64 rank": '
                            f'{line[:40]!r}') from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(f'tokenizer: {len(ranks)} tokens, but their ranks are not 0, 1, 2, ...')
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise DataError('tokenizer: some of the 256 single bytes are missing')
    return tiktoken.Encoding('prefgpt', pat_str=SPLIT_PATTERN, mergeable_ranks=ranks,
                             special_tokens={'<|endoftext|>': len(ranks)})


def tokenizer_text(tokenizer):
    """The .tiktoken text of an encoding: what a checkpoint keeps, and what is fingerprinted."""
    tokens = (tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.eot_token))
    return ''.join(f'{base64.b64encode(token).decode()} {i}\n' for i, token in enumerate(tokens))


def load_tokenizer(where):
    """The tiktoken.Encoding 'gpt2', or the one in a .tiktoken file."""
    if where != 'gpt2':
        return build_tokenizer(read_text(where))
    try:
        return tiktoken.get_encoding('gpt2')
    except Exception as error:      # tiktoken passes on whatever its download raised
        raise DataError(f"tiktoken could not fetch 'gpt2' ({type(error).__name__}): set "
                        'TIKTOKEN_CACHE_DIR to a folder that holds its two files') from None


def unique_keys(pairs):
    """json's object_pairs_hook: a key that comes twice is an error, not the last one's value."""
    if len(dict(pairs)) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'the key {max(keys, key=keys.count)!r} comes twice')
    return dict(pairs)


def refuse_constant(name):
    """json's parse_constant: NaN and Infinity are not JSON."""
    raise ValueError(f'{name} is not JSON')


def load_rows(path, kind, template=HH_TEMPLATE):
    """
    The rows of a JSON Lines file, normalized; kind is 'sft', 'pairs' or 'prompts'.

    Raises DataError('file.jsonl:143: ...') on the first line that cannot be used.
    """
    rows = []
    # Lines end at '\n' alone: str.splitlines would also break inside a string, at U+2028
    for number, line in enumerate(read_text(path).split('\n'), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=unique_keys, parse_constant=refuse_constant)
            if not isinstance(row, dict):
                raise ValueError(f'an object was expected, not {type(row).__name__}')
            rows.append(normalize(row, kind, template))
        except json.JSONDecodeError as error:
            raise DataError(f'{path}:{number}: {error.msg} at column {error.colno}') from None
        except (ValueError, RecursionError) as error:
            raise DataError(f'{path}:{number}: {error}') from None
    if not rows:
        raise DataError(f'{path}: no rows')
    return rows


def string_of(row, key):
    """row[key], which must be there and a string that can be encoded; else ValueError."""
    if not isinstance(row, dict):
        raise ValueError(f'an object with {key!r} was expected, not {type(row).__name__}')
    if key not in row:
        raise ValueError(f'missing {key!r} (keys: {", ".join(row)})')
    if not isinstance(row[key], str):
        raise ValueError(f'{key!r} is {type(row[key]).__name__}, not a string')
    row[key].encode()                           # a lone surrogate raises here, its line known
    return row[key]


def normalize(row, kind, template):
    """
    A row in any accepted shape as {prompt} and, by kind, {response} or {chosen, rejected}.

    A response whose end was cut off beforehand is marked in the row, 'chosen_cut': true, and the
    mark is kept: no EOS will follow it. Raises ValueError that says what is missing. SFT reads
    pairs too: their chosen side, which is Pref-FT in Tajwar et al. 2024.
    """
    row = dict(row)
    if 'messages' in row:
        row['prompt'], row['response'] = from_messages(row['messages'], template)
    elif 'response_0' in row:                   # Safe-RLHF: safety decides where it is at stake
        safe = [row.get(f'is_response_{i}_safe') for i in (0, 1)]
        key = 'better_response_id' if all(safe) else 'safer_response_id'
        if row.get(key) not in (0, 1) or not all(isinstance(value, bool) for value in safe):
            raise ValueError(f'{key!r} must be 0 or 1, and is_response_0_safe and '
                             'is_response_1_safe true or false')
        better = int(row[key])
        for side, i in (('chosen', better), ('rejected', 1 - better)):
            row[side] = string_of(row, f'response_{i}')
            row[f'{side}_cut'] = row.pop(f'response_{i}_cut', False)
    elif 'prompt' not in row and 'chosen' in row and 'rejected' in row:     # HH's transcripts
        row['prompt'], row['chosen'], row['rejected'] = from_transcripts(
            string_of(row, 'chosen'), string_of(row, 'rejected'))
    for key in ('response', 'completion', 'chosen', 'rejected'):
        if row.get(f'{key}_cut') and key not in row:    # its response would get an EOS after all
            raise ValueError(f"'{key}_cut' marks a {key!r} that is not there")
    for other in ('completion', 'chosen'):
        if kind == 'sft' and other in row and 'response' not in row:
            row['response'], row['response_cut'] = row[other], row.get(f'{other}_cut', False)

    out = {key: string_of(row, key) for key in ('prompt', *RESPONSES[kind])}
    for key in RESPONSES[kind]:
        cut = row.get(f'{key}_cut', False)
        if not isinstance(cut, bool):
            raise ValueError(f"'{key}_cut' is {cut!r}: true, if the end of {key!r} is missing")
        # A rejected response may be EOS alone; without EOS there must be text
        if out[key] == '' and (cut or key != 'rejected'):
            raise ValueError(f'{key!r} is empty: there is nothing to learn to say')
        if cut:
            out[f'{key}_cut'] = True
    return out


def from_messages(messages, template):
    """Chat turns as (prompt, response): the last turn is the response, an assistant's."""
    # A turn begins where the template begins: on a new line
    end = '' if template.startswith('\n') else '\n'
    form = {'user': template, 'assistant': ' {}' + end, 'system': '{}' + end}
    roles = ([string_of(turn, 'role') for turn in messages] if isinstance(messages, list) else [])
    if roles[-2:] != ['user', 'assistant'] or not set(roles) <= set(form):
        raise ValueError("'messages' must be turns {role, content} of user, assistant or system, "
                         f'the last two of user and assistant, not of {roles}')
    contents = [string_of(turn, 'content') for turn in messages]
    if not contents[-1]:
        raise ValueError("the last 'content' is empty: there is nothing to learn to say")
    turns = [form[role].replace('{}', content) for role, content in zip(roles, contents)]
    return ''.join(turns[:-1]), ' ' + contents[-1]


def from_transcripts(chosen, rejected):
    """Two whole dialogues as (prompt, chosen, rejected), cut at the LAST assistant turn."""
    marker = '\n\nAssistant:'
    cuts = [text.rfind(marker) + len(marker) for text in (chosen, rejected)]
    if min(cuts) < len(marker) or chosen[:cuts[0]] != rejected[:cuts[1]]:
        raise ValueError("'chosen' and 'rejected' do not share all up to the last "
                         "'\\n\\nAssistant:'; a row like this must be dropped beforehand")
    return chosen[:cuts[0]], chosen[cuts[0]:], rejected[cuts[1]:]


def load_split(data, kind, template, rows=''):
    """
    Training rows and held-out rows of a data folder, or of one JSON Lines file.

    Of a file, a tenth of the prompts is held out, by a hash: the same whenever it is read. rows
    names the folder's files where it is not the kind: 'pairs' for SFT on their chosen side.
    """
    if Path(data).is_dir():
        return tuple(load_rows(Path(data) / f'{split}.{rows or kind}.jsonl', kind, template)
                     for split in ('train', 'val'))
    rows = load_rows(data, kind, template)
    prompts = sorted({row['prompt'] for row in rows}, key=lambda p: (zlib.crc32(p.encode()), p))
    if len(prompts) < 2:
        raise DataError(f'{data}: one prompt only, so none can be held out; pass a folder with '
                        f'train.{kind}.jsonl and val.{kind}.jsonl')
    held_out = set(prompts[:max(1, len(prompts) // 10)])
    return ([row for row in rows if row['prompt'] not in held_out],
            [row for row in rows if row['prompt'] in held_out])


def encode_rows(rows, kind, tokenizer, block_size, max_new_tokens=0, name='rows'):
    """
    Token ids of normalized rows, cut to the block: (prompt,), (prompt, response) or
    (prompt, chosen, rejected), by kind. Prints how many were kept, cut and dropped, and why.

    Prompt and response are encoded apart, so that a prompt's ids never depend on its response.
    What is too long loses the left end of its prompt; where the response is longer than half the
    block, the prompt keeps the other half and the response loses its end, and so gets no EOS.
    Nor does a response that the row marks as cut.
    """
    if block_size < 2 or kind == 'prompts' and max_new_tokens >= block_size:
        raise UserError(f'block_size={block_size} has no room for a prompt beside '
                        f'max_new_tokens={max_new_tokens}: lower --max_new_tokens')
    eos, counts, examples = tokenizer.eot_token, Counter(), []
    for row in rows:
        prompt = tokenizer.encode_ordinary(row['prompt']) or [eos]
        responses = [tokenizer.encode_ordinary(row[key])
                     + ([] if row.get(f'{key}_cut') else [eos]) for key in RESPONSES[kind]]
        counts['responses marked as cut'] += sum(row.get(f'{key}_cut', False)
                                                 for key in RESPONSES[kind])
        room = block_size - max_new_tokens
        if responses:
            room = max(block_size - max(map(len, responses)), block_size // 2)
        counts['prompts cut on the left'] += len(prompt) > room
        prompt = prompt[-room:]
        room = block_size - len(prompt)
        counts['responses cut, without EOS'] += sum(len(response) > room for response in responses)
        responses = [response[:room] for response in responses]
        if kind == 'pairs' and responses[0] == responses[1]:
            counts['dropped, chosen == rejected'] += 1
            continue
        examples.append((prompt, *responses))
    print(f'{name}: {len(examples)} {kind} kept'
          + ''.join(f', {n} {what}' for what, n in counts.items() if n))
    if not examples:
        raise DataError(f'{name}: none of {len(rows)} rows is left')
    return examples


def decode_responses(tokens, response_mask, tokenizer):
    """The responses of a batch as text, without EOS, and whether each one ended with EOS (B,)."""
    texts, ended = [], []
    for y, mask in zip(tokens[:, 1:].tolist(), response_mask.tolist()):
        response = list(itertools.compress(y, mask))
        ended.append(response[-1] == tokenizer.eot_token)
        texts.append(tokenizer.decode(response[:-1] if ended[-1] else response))
    return texts, torch.tensor(ended)


def show_samples(policy, prompts, tokenizer, max_new_tokens):
    """Greedy answers to prompts (lists of ids), as text with the prompt before it."""
    max_new_tokens = min(max_new_tokens, policy.config.block_size - 1)
    prompts = [prompt[max_new_tokens - policy.config.block_size:] for prompt in prompts]
    out = generate(policy, prompts, max_new_tokens, tokenizer.eot_token, temperature=0)
    texts, ended = decode_responses(*out, tokenizer)
    return [tokenizer.decode(prompt) + text + ('' if end else ' [no end]')
            for prompt, text, end in zip(prompts, texts, ended)]


def printable(text):
    """Text without control characters (but newlines), so that it cannot steer a terminal."""
    return ''.join(c if c == '\n' or c.isprintable() else '\N{REPLACEMENT CHARACTER}'
                   for c in text)


# ----------------------------------------------------------------------------- randomness, batches

def rng(seed, step, stream):
    """
    A fresh CPU generator for one purpose of one step: nothing random has state.

    stream is 'batch', 'rollout', 'shuffle' or 'eval'. A run that resumes at a step draws what it
    would have drawn had it never stopped.
    """
    digest = hashlib.sha256(f'{seed} {step} {stream}'.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], 'little'))


def batches(lengths, batch_size, seed, start=0):
    """
    Yields the row numbers of the batches start, start + 1, ...; every epoch visits each row once.

    Rows are shuffled, then sorted by length within groups of 16 batches, then the batches are
    shuffled: rows of a batch are about equally long, so that little of it is padding.
    """
    per_epoch = math.ceil(len(lengths) / batch_size)
    for epoch in itertools.count(start // per_epoch):
        generator = rng(seed, epoch, 'batch')
        order = torch.randperm(len(lengths), generator=generator).tolist()
        group = 16 * batch_size
        order = [row for i in range(0, len(order), group)
                 for row in sorted(order[i:i + group], key=lengths.__getitem__)]
        in_epoch = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
        visits = torch.randperm(per_epoch, generator=generator).tolist()
        for i in visits[max(0, start - epoch * per_epoch):]:
            yield in_epoch[i]


# ----------------------------------------------------------------------------- optimization

def learning_rate(step, steps, lr, warmup):
    """Of step 0, 1, ...: a linear warm-up, then a cosine from lr down to lr / 10 at the end."""
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)         # 0 to 1
    return lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def adamw(model, weight_decay):
    """AdamW over two groups: matrices and embeddings decay, biases and LayerNorms do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{'params': [p for p in parameters if p.dim() >= 2], 'weight_decay': weight_decay},
              {'params': [p for p in parameters if p.dim() < 2], 'weight_decay': 0.0}]
    # A weight whose gradient is far below eps hardly moves; with the usual 1e-8 Adam would move it
    # as far as any other, on noise (cf. Huang et al. 2024, N Implementation Details of RLHF)
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5, fused=True)


def check_finite(where, **numbers):
    """Raises UserError that says which number is not finite, and where."""
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise UserError(f'{where}: the {name} is {number}; the last good checkpoint is kept: '
                            'lower --lr or look at the data')


def optimizer_step(optimizer, model, lr, grad_clip, step, **losses):
    """
    Clips the gradient, steps and clears; returns the gradient's norm before clipping.

    Raises UserError, and leaves the weights alone, if a loss or the norm is not finite.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip).item()
    check_finite(f'step {step}, lr={lr:.1e}', **losses, norm=norm)
    for group in optimizer.param_groups:        # every group: weights that decay and the others
        group['lr'] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm


# ----------------------------------------------------------------------------- checkpoints

POLICIES = ('base', 'sft', 'ppo', 'dpo')        # the kinds of checkpoint that hold a policy


def save_checkpoint(path, kind, step, cfg, tokenizer, template, metrics, models, optimizers,
                    **extra):
    """
    One file that holds all that resuming, sampling and the next stage need.

    models and optimizers are dicts by name; the first model gives the shape. Everything is kept
    as tensors, strings, numbers, dicts and lists, so that weights_only=True loads it.
    """
    text = tokenizer_text(tokenizer)
    config = next(iter(models.values())).config
    write_atomically(path, dict(
        kind=kind, step=step, config=dataclasses.asdict(cfg), model=dataclasses.asdict(config),
        tokenizer=text, fingerprint=fingerprint(text), template=template, metrics=metrics,
        weights={name: model.state_dict() for name, model in models.items()},
        optimizers={name: o.state_dict() for name, o in optimizers.items()}, **extra))


def write_atomically(path, contents):
    """
    Writes one file, or none: to a temporary name in the same folder, synced, then renamed.

    The checkpoint before stays as ckpt.prev.pt; its hard link is made first, so that at every
    moment ckpt.pt is a whole checkpoint.
    """
    path = Path(path)
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    try:
        with open(temporary, 'wb') as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())             # a full disk says so here, before the rename
        if path.exists():
            previous = path.with_name(f'{path.stem}.prev{path.suffix}')
            previous.unlink(missing_ok=True)
            try:
                os.link(path, previous)
            except OSError:                     # a file system without hard links
                shutil.copy2(path, previous)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_archive(path):
    """Raises BadZipFile if a record of a zip file, such as torch.save writes, is not as written."""
    # torch.load reads flipped bytes without a word; the archive's checksums name them
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f'checksum of {damaged}')


def load_checkpoint(path, kinds):
    """The contents of a run folder's (or file's) checkpoint, on the CPU, if of one of the kinds."""
    path = Path(path)
    path = path / 'ckpt.pt' if path.is_dir() else path
    if not path.is_file():
        raise UserError(f'{path}: no checkpoint there; has that stage been run?')
    try:
        check_archive(path)
        saved = torch.load(path, map_location='cpu', weights_only=True)
        if not isinstance(saved, dict) or 'kind' not in saved:
            raise ValueError('not written by prefgpt')
    except (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, EOFError, OSError,
            RuntimeError, ValueError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(f'{path}: damaged or incomplete, {path.stat().st_size} bytes ({reason}); '
                        'copy ckpt.prev.pt beside it, the one before, over it') from None
    if saved['kind'] not in kinds:
        raise UserError(f"{path}: a checkpoint of kind {saved['kind']!r}, not "
                        + ' or '.join(map(repr, kinds)))
    return saved


def load_model(Model, saved, name, device):
    """The GPT or ScalarGPT called name ('policy', 'ref', ...) in a checkpoint, on the device."""
    model = Model(GPTConfig(**saved['model']))
    model.load_state_dict(saved['weights'][name])
    return model.to(device)


def fingerprint(text):
    """16 hex digits that differ where two texts do."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_text(data, saved=None):
    """
    The tokenizer and the chat template of a data folder, and of the checkpoint it meets.

    Raises UserError where the two were not made with the same tokenizer: its ids would be other
    words. A single file of data has neither: they are then the checkpoint's.
    """
    folder = Path(data)
    if not folder.exists():
        raise DataError(f'{data}: no such file or folder; run its prepare.py first')
    if not folder.is_dir():
        if not saved:
            raise DataError(f'{data} is a file and brings no tokenizer: pass --init')
        return build_tokenizer(saved['tokenizer']), saved['template']
    where = read_text(folder / 'tokenizer').strip()
    tokenizer = load_tokenizer(where if where == 'gpt2' else folder / where)
    if saved and fingerprint(tokenizer_text(tokenizer)) != saved['fingerprint']:
        raise UserError(f'{data} was prepared with another tokenizer than the checkpoint from '
                        f"{saved['config']['data']}: its stages must all be trained on it")
    path = folder / 'template.txt'
    template = read_text(path) if path.is_file() else '{}'      # '{}': what is typed is the prompt
    if '{}' not in template:
        raise DataError(f'{path}: no {{}}, so there is no place for what the user says')
    return tokenizer, template


def check_inputs(cfg, saved, *lists):
    """
    A fingerprint of what a run learns from, lists of encoded rows, for its checkpoint.

    Raises UserError if the run would resume on something else than it began with.
    """
    digest = hashlib.sha256()
    for rows in lists:
        for row in (*rows, 'end'):              # where train ends and val begins counts too
            digest.update(repr(row).encode())
    if saved and saved['inputs'] != digest.hexdigest():
        raise UserError(f'{cfg.data}, or a checkpoint that {cfg.out} was made from, has changed '
                        'since it began: start in another --out')
    return digest.hexdigest()


def load_judge(path):
    """
    score(prompt, response) -> dict of finite numbers, 'reward' among them, from a reward.py.

    Raises DataError if the file has no such function, or as soon as it says something else.
    """
    read_text(path)                             # a clear error if it is not there
    spec = importlib.util.spec_from_file_location('judge', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, 'score', None)):
        raise DataError(f'{path}: there is no score(prompt, response) in it')

    def judge(prompt, response):
        numbers = module.score(prompt, response)
        if 'reward' not in numbers or not all(map(math.isfinite, numbers.values())):
            raise DataError(f"{path}: score({prompt!r}, {response!r}) is {numbers}, not finite "
                            "numbers with a 'reward'")
        return numbers
    return judge


# ----------------------------------------------------------------------------- runs

def field_comments(Config):
    """The trailing comment of every field of a dataclass, by name: the --help."""
    comments = dict(re.findall(r'^ +(\w+): .*?  # (.*)$', inspect.getsource(Config), re.MULTILINE))
    missing = [f.name for f in dataclasses.fields(Config) if f.name not in comments]
    assert not missing, f'{Config.__qualname__}: no comment after {missing}'
    return comments


BOOLS = {'true': True, '1': True, 'false': False, '0': False}


def parse_bool(text):
    """'True', 'true', '1', 'False', ...: bool('False') would be true."""
    if text.lower() not in BOOLS:
        raise argparse.ArgumentTypeError(f'{text!r} is neither True nor False')
    return BOOLS[text.lower()]


def parse_config(Config, argv=None):
    """
    A Config from the command line: every field is a flag, --lr=0 or --lr 0, and its comment is its
    help. A tuple field takes what stands without a flag; from_ becomes --from (a Python keyword).
    """
    parser = argparse.ArgumentParser(description=inspect.getmodule(Config).__doc__.strip(),
                                     usage='%(prog)s [RUN ...] [--flag=value ...]',
                                     allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f'error: {message}\n')     # one line, no usage
    comments = field_comments(Config)
    for field in dataclasses.fields(Config):
        about = f'{comments[field.name]} [{field.default}]'.replace('%', '%%')
        kind = type(field.default)
        if kind is tuple:
            parser.add_argument(field.name, nargs='*', help=comments[field.name])
        else:
            parser.add_argument('--' + field.name.rstrip('_'), dest=field.name, help=about,
                                default=field.default, metavar=kind.__name__,
                                type=parse_bool if kind is bool else kind)
    argv = sys.argv[1:] if argv is None else argv
    bools = {'--' + field.name for field in dataclasses.fields(Config)
             if type(field.default) is bool}
    # --resume alone is --resume=True: what stands after it may be a RUN
    argv = [f'{word}=True' if word in bools and after.lower() not in BOOLS else word
            for word, after in zip(argv, [*argv[1:], ''])]
    arguments, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        flags = ['--' + field.name.rstrip('_') for field in dataclasses.fields(Config)]
        near = difflib.get_close_matches(unknown[0].split('=')[0], flags, n=1)
        parser.error(f'unknown argument {unknown[0]}'
                     + (f', did you mean {near[0]}?' if near else ': see --help'))
    return Config(**vars(arguments))


def run_cli(main, Config):
    """main(Config from the command line); what a user can mend is told in one line."""
    try:
        main(parse_config(Config))
    except (UserError, OSError) as error:       # OSError: a full disk, a folder not ours
        sys.exit(f'error: {printable(str(error))}')
    except KeyboardInterrupt:
        print('interrupted; a training run goes on with --resume, a download when called again',
              file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError:
        sys.exit(f'error: out of memory, peak {peak_memory()}: halve --micro_batch_size, which '
                 'leaves the results as they are, or what is sampled at once, --rollout_size; '
                 'of a tool, --batch_size')


def peak_memory():
    """The most memory this process has held, on the GPU where there is one, as text."""
    if torch.cuda.is_initialized():
        return f'{torch.cuda.max_memory_allocated() / 2 ** 20:.0f} MB of GPU memory'
    unit = 2 ** 10 if sys.platform == 'linux' else 2 ** 20          # Linux counts kilobytes
    return f'{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.0f} MB'


# What may change when a run is resumed: nothing here moves a result but by rounding
MAY_CHANGE = ('out', 'resume', 'device', 'compile', 'micro_batch_size', 'eval_every', 'save_every',
              'judge')


def open_run(cfg, kind):
    """The checkpoint to continue in cfg.out, or None for a fresh run; refuses to overwrite one."""
    out = Path(cfg.out)
    if not cfg.resume and any((out / name).exists() for name in ('ckpt.pt', 'log.jsonl')):
        raise UserError(f'{out} holds a run: continue it with --resume, or name another --out')
    out.mkdir(parents=True, exist_ok=True)
    for unfinished in out.glob('ckpt.pt.*.tmp'):        # of a run that was killed while saving
        unfinished.unlink()
    if not (out / 'ckpt.pt').exists():
        if (out / 'ckpt.prev.pt').exists():
            raise UserError(f'{out} has lost its ckpt.pt: copy ckpt.prev.pt, the one before, to it')
        return None
    saved, now = load_checkpoint(out, [kind]), dataclasses.asdict(cfg)
    changed = [f"--{key} was {saved['config'].get(key)!r} and is {now[key]!r}" for key in now
               if key not in MAY_CHANGE and saved['config'].get(key) != now[key]]
    if changed:
        raise UserError(f'{out} was run otherwise: ' + ', '.join(changed))
    return saved


def set_up(cfg):
    """
    The device and the autocast context of a run; seeds what initialises the weights.

    Raises UserError for a flag that cannot work, before any data is read: no success in no steps.
    """
    for name in ('steps', 'batch_size', 'eval_every', 'save_every', 'max_new_tokens',
                 'rollout_size', 'ppo_epochs', 'prompts', 'n'):
        if getattr(cfg, name, 1) < 1:
            raise UserError(f'--{name}={getattr(cfg, name)}: must be at least 1')
    for name in ('micro_batch_size', 'temperature'):
        if not getattr(cfg, name, 0) >= 0:                  # nan is neither below nor above
            raise UserError(f'--{name}={getattr(cfg, name)}: must not be below 0')
    if getattr(cfg, 'grad_clip', 1) <= 0:
        raise UserError(f'--grad_clip={cfg.grad_clip}: must be above 0; a large one never clips')
    best = ('cuda' if torch.cuda.is_available() else
            'mps' if torch.backends.mps.is_available() else 'cpu')
    try:
        device = torch.device(cfg.device or best)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:     # not there, or torch built without it
        raise UserError(f'--device={cfg.device}: {str(error).splitlines()[0]}') from None
    dtype = cfg.dtype or ('bfloat16' if device.type == 'cuda' else 'float32')
    if dtype not in ('float32', 'bfloat16'):
        raise UserError(f'--dtype={dtype}: float32 or bfloat16 (fp16 would need loss scaling)')
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision('high')                      # TF32 on CUDA
    print(f'device {device}, {dtype}, seed {cfg.seed}, {torch.get_num_threads()} threads')
    return device, torch.autocast(device.type, torch.bfloat16, enabled=dtype == 'bfloat16')


FORMATS = dict(loss='6.4f', accuracy='4.2f', margin='6.3f', chosen='7.2f', rejected='7.2f',
               score='6.3f', gold='6.3f', kl='6.3f', kl_sft='6.3f', ratio='5.3f', clip_frac='5.3f',
               pg_loss='7.4f', vf_loss='6.4f', entropy='5.3f', length='5.1f', eos='5.3f',
               norm='6.2f', lr='7.1e')


class Log:
    """A run's printed lines, its log.jsonl (a row for every step) and its samples.txt."""

    def __init__(self, out, start, steps):
        """Cuts off what an interrupted run wrote after the checkpoint it resumes from."""
        self.out, self.start, self.steps = Path(out), start, steps
        self.began, self.lr = time.time(), 0.0
        path = self.out / 'log.jsonl'
        lines = path.read_text().splitlines(True) if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith('\n')]     # whole lines
        rows = [row for row in rows if row['step'] <= start]
        for name, text in (('log.jsonl', ''.join(json.dumps(row) + '\n' for row in rows)),
                           ('samples.txt', ''.join(map(self.samples_text, rows)))):
            temporary = self.out / f'{name}.tmp'
            temporary.write_text(text)
            temporary.replace(self.out / name)

    def samples_text(self, row):
        if 'samples' not in row:
            return ''
        return f"=== step {row['step']}\n" + '\n\n'.join(row['samples']) + '\n\n'

    def write(self, row):
        with open(self.out / 'log.jsonl', 'a') as file:
            file.write(json.dumps(row) + '\n')
        if 'samples' in row:                    # evaluations only: steps are many
            with open(self.out / 'samples.txt', 'a') as file:
                file.write(self.samples_text(row))

    def step(self, step, began, tokens, **metrics):
        """One optimizer step, counted from 1: began is its time.time(), tokens its real tokens."""
        seconds, self.lr = time.time() - began, metrics.get('lr', self.lr)
        self.write({'step': step, **metrics, 'ms': seconds * 1e3, 'tok_per_s': tokens / seconds})
        if step not in (1, self.steps) and step % max(1, self.steps // 50):
            return
        done = (time.time() - self.began) / (step - self.start)     # seconds a step, all in
        left = done * (self.steps - step)
        self.show(f'step  {step:>5}/{self.steps}', metrics, f'{seconds * 1e3:.0f} ms',
                  f'{tokens / seconds / 1e3:.1f}k tok/s',
                  f'{left / 60:.0f}m left' if left > 90 else f'{left:.0f}s left')

    def eval(self, step, metrics, samples):
        """An evaluation on held-out rows, and what two of them look like."""
        self.show(f'eval  {step:>5}/{self.steps}', metrics)
        for sample in samples:
            print('      | ' + printable(sample).strip().replace('\n', '\n      | '))
        # Weights that blew up in this step's update must not replace the last good checkpoint
        check_finite(f'evaluation at step {step}, lr={self.lr:.1e}', **metrics)
        self.write({'step': step, **{f'eval_{name}': value for name, value in metrics.items()},
                    'samples': samples})

    def show(self, head, metrics, *tail):
        numbers = [f"{name} {value:{FORMATS.get(name, '7.3f')}}"
                   for name, value in metrics.items()]
        print(' | '.join([head, *numbers, *tail]), flush=True)

    def close(self):
        print(f'{self.out}/ckpt.pt | {(time.time() - self.began) / 60:.1f} minutes | '
              f'peak memory {peak_memory()}', flush=True)
