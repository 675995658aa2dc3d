"""
prefgpt: the GPT-2 model, the sampler, and what the stages of preference tuning share.

Read the first three sections in order: model, logprobs and scores, sampling. The rest is whatever
else a run needs: batches, optimizer, checkpoints, command line, log. The methods are elsewhere:
each train_*.py holds its own loss and its own loop. Rows and tokenizers are in data/text.py.

All tensors share one layout. A row is a prompt and a response, contiguous, padded on the RIGHT:
with causal attention a real token never sees a pad, so training needs no attention mask and no
position ids (the sampler's cache needs both). x_and_y shifts tokens (B, T+1) once, into x and y:
from there on, column t of every (B, T) tensor is about predicting y[:, t] from x[:, :t+1].

Letters: B rows, T positions, C channels, V vocabulary, H heads, S slots in the cache,
M tokens where a mask is true.

Left out: dropout, multi-GPU training, fp16, top-k and top-p (samples must match token_logprobs).
"""
import argparse, contextlib, dataclasses, difflib, functools, hashlib, inspect, itertools, json
import math, os, re, shutil, signal, sys, time, zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint


class UserError(ValueError):
    """A mistake that the user can fix; run_cli prints it as one line, without a traceback."""


# ----------------------------------------------------------------------------- the model

@dataclass
class GPTConfig:
    """The shape of a GPT-2 with biases and tied embeddings; the defaults are the 124M model's."""
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    init_std: float = 0.02


class Attention(nn.Module):
    """
    Causal self-attention: softmax(q k' / sqrt(C/H)) v in each of H heads.

    During sampling, cache (2, B, H, S, C/H) holds this layer's keys and values, place is where each
    row writes its own, (rows, positions), (B,) each, and mask (B, 1, 1, S) is 0 at the slots that
    the row may see and -inf elsewhere.
    """

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)   # q, k and v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, place=None, mask=None):
        B, T, C = x.shape                                           # x (B, T, C)
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)   # (B, T, 3, H, C/H)
        q, k, v = qkv.transpose(1, 3).unbind(2)                     # (B, H, T, C/H)
        if place is None:
            if cache is not None:                                   # prefill: keep keys, values
                cache[0, :, :, :T], cache[1, :, :, :T] = k, v
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:                                                       # decode: T is 1
            rows, positions = place
            # Each row writes at its own position. The ':' between two index tensors puts B in front
            cache[:, rows, :, positions] = qkv[:, 0, 1:]            # both sides (B, 2, H, C/H)
            out = F.scaled_dot_product_attention(q, cache[0], cache[1], attn_mask=mask)
        return self.c_proj(out.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """The position-wise half of a block. GPT-2's GELU is the tanh approximation."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate='tanh'))


class Block(nn.Module):
    """x + attention, then x + MLP, each reading a LayerNorm of x (pre-LayerNorm, eps 1e-5)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, place=None, mask=None):
        x = x + self.attn(self.ln_1(x), cache, place, mask)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 with tied embeddings. forward returns hidden states; logits projects them."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise UserError(f'--n_head={config.n_head} does not divide --n_embd={config.n_embd}')
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)   # also the output projection
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # GPT-2 scales its 2 n_layer additions to the residual stream by 1 / sqrt(2 n_layer)
                scale = (2 * config.n_layer) ** -0.5 if 'c_proj' in name else 1.0
                nn.init.normal_(p, std=config.init_std * scale)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def forward(self, tokens, cache=None, positions=None):
        """
        Returns hidden states (B, T, C) of tokens (B, T). generate first passes the prompts with an
        empty cache (prefill), then one token per row, (B, 1), with each row's own position (B,).
        """
        T = tokens.size(1)
        assert T <= self.config.block_size, f'{T} tokens exceed block_size={self.config.block_size}'
        if positions is None:
            x = self.wte(tokens) + self.wpe(torch.arange(T, device=tokens.device))  # (B, T, C)
            place = mask = None
        else:
            x = self.wte(tokens) + self.wpe(positions)[:, None]     # (B, 1, C)
            place = torch.arange(len(tokens), device=tokens.device), positions
            # A slot past the row's own position holds a pad's key or nothing, so it stays unseen.
            # As numbers, made once: each layer would turn booleans into them again
            slots = torch.arange(cache.size(-2), device=tokens.device)              # (S,)
            mask = torch.where(slots <= positions[:, None], 0.0, -math.inf)         # (B, S)
            mask = mask.to(cache.dtype)[:, None, None]              # (B, 1, 1, S)
        for layer, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[layer], place, mask)
        return self.ln_f(x)

    def logits(self, hidden, multiple=1):
        """
        Projects hidden states (..., C) to logits (..., V) with the token embedding itself. Logits
        of -inf, of tokens that do not exist, round V up to a multiple.
        """
        weight, bias, spare = self.wte.weight, None, -self.config.vocab_size % multiple
        if spare:
            bias = F.pad(weight.new_zeros(len(weight)), (0, spare), value=-math.inf)
            weight = F.pad(weight, (0, 0, 0, spare))
        # Not in bfloat16: near -100 its numbers are 0.5 apart, and PPO's first ratio would show it
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(weight.dtype), weight, bias)

    def empty_cache(self, B, S):
        """Returns a cache for keys and values, B rows of S slots: (layers, 2, B, H, S, C/H)."""
        c, weight = self.config, self.wte.weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        return torch.zeros(c.n_layer, 2, B, c.n_head, S, c.n_embd // c.n_head,
                           dtype=dtype, device=weight.device)


class ScalarGPT(nn.Module):
    """A GPT body with a scalar head at every position: the reward model and the value model."""

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
    Packs rows (prompt, response) of ids into tokens (B, T+1) and x, y, response_mask, (B, T) each.

    response_mask is true where y is a response token, EOS included. It comes from lengths, never
    from token ids, because a pad's id may also be a real token's.

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
    return tokens, *x_and_y(tokens), response_mask


def x_and_y(tokens):
    """Shifts tokens (B, T+1) into x and y, (B, T) each: y[:, t] is the token after x[:, t]."""
    return tokens[:, :-1], tokens[:, 1:]


def last_column(response_mask):
    """Returns the column of each response's last token, EOS or not, (B,)."""
    columns = torch.arange(response_mask.size(1), device=response_mask.device)     # (T,)
    return (response_mask * columns).amax(1)


LOGITS_AT_ONCE = 2 ** 26    # largest number of logits in one block: 256 MB of float32


def token_logprobs(model, x, y, mask, temperature=1.0):
    """
    Returns log p(y[:, t] | x[:, :t+1]), (B, T), float32 at least, and 0 where mask is false.

    Logits are computed only where mask is true, so (B, T, V) never exists. If even these are
    large, they are computed in blocks, and again in the backward pass (activation checkpointing).
    All logprobs, old, new and reference, come from here: otherwise PPO's first ratio is not 1.
    """
    def logprobs_of(hidden, targets):
        # CUDA multiplies odd widths slowly, and GPT-2's V is odd: a fifth of a training step
        logits = model.logits(hidden, 64) if hidden.is_cuda else model.logits(hidden)   # (M, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if temperature != 1:                    # at 1, a useless pass over (M, V)
            logits = logits / temperature
        return -F.cross_entropy(logits, targets, reduction='none')  # log_softmax, gathered: (M,)

    hidden, targets = model(x)[mask], y[mask]                       # (M, C), (M,)
    block = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    if len(hidden) <= block:
        picked = logprobs_of(hidden, targets)
    else:
        picked = torch.cat([checkpoint(logprobs_of, h, t, use_reentrant=False,
                                       preserve_rng_state=False)    # nothing in it is random
                            for h, t in zip(hidden.split(block), targets.split(block))])
    return picked.new_zeros(x.shape).masked_scatter(mask, picked)


def last_scores(model, tokens, response_mask):
    """Returns one score per response, (B,): the model's number at its last token, EOS or not."""
    index = last_column(response_mask) + 1      # + 1 because y[:, t] is tokens[:, t+1]
    return model(tokens).gather(1, index[:, None]).squeeze(1)


def pair_metrics(losses, margins, chosen, rejected):
    """Returns the logged metrics of pairs, from tensors (B,); accuracy counts a tie as wrong."""
    return {'loss': losses.mean().item(), 'accuracy': (margins > 0).float().mean().item(),
            'margin': margins.mean().item(), 'chosen': chosen.mean().item(),
            'rejected': rejected.mean().item()}


# ----------------------------------------------------------------------------- sampling

def draw(logits, u, temperature):
    """
    Draws one token id per row, (B,), from logits (B, V), by the inverse CDF at u (B,) in [0, 1):
    the first token whose cumulative probability exceeds u. Temperature 0 is greedy.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    cdf = F.softmax(logits, dim=-1).cumsum(-1)                      # (B, V)
    u = u[:, None].to(cdf) * cdf[:, -1:]        # (B, 1): rounding makes the CDF end only near 1
    return torch.searchsorted(cdf, u, right=True).squeeze(1).clamp(max=cdf.size(1) - 1)


@torch.no_grad()
def generate(policy, prompts, max_new_tokens, eos, temperature=1.0, generator=None):
    """
    Samples one response per prompt (prompts: a list of lists of ids) until EOS or max_new_tokens.
    Returns tokens (B, T+1) and response_mask (B, T) in make_batch's layout.

    The prompts are prefilled in one causal pass; then every row continues at its own position in a
    static cache. All random numbers are drawn before the loop, on the CPU, one row per prompt, so
    the text does not depend on how prompts are split into batches that share the generator.
    """
    assert temperature >= 0 and all(prompts), 'a negative temperature or an empty prompt'
    device, B = policy.wte.weight.device, len(prompts)
    u = torch.rand(B, max_new_tokens, generator=generator).to(device)               # (B, new)
    rows = torch.arange(B, device=device)                                           # (B,)
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)       # (B,)
    longest = max(len(prompt) for prompt in prompts)
    assert longest + max_new_tokens <= policy.config.block_size, (
        f'{longest} + {max_new_tokens} tokens exceed block_size={policy.config.block_size}')

    tokens = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    tokens = F.pad(tokens, (0, max_new_tokens)).to(device)                          # (B, S)
    # CUDA's attention takes a mask as it is if its rows begin at multiples of 8 numbers
    cache = policy.empty_cache(B, math.ceil((longest + max_new_tokens) / 8) * 8)
    # Prefill keeps keys and values; the first step reads each prompt's last token again
    policy.forward(tokens[:, :longest], cache)
    running = torch.ones(B, dtype=torch.bool, device=device)        # false once a row has ended
    lengths = torch.zeros_like(starts)                              # of the responses, so far

    def step(seen):
        """
        Reads each row's last token and draws the next, in place, so that it can be replayed. seen
        are the cache's slots so far, or more of them.
        """
        last = starts + lengths - 1                                 # of an ended row, its EOS
        # forward, not __call__: the shapes change at every step, and --compile would recompile
        hidden = policy.forward(tokens[rows, last][:, None], seen, last)[:, 0]      # (B, C)
        token = draw(policy.logits(hidden), u[rows, lengths], temperature)          # (B,)
        tokens[rows, last + 1] = token * running                    # 0 once the row has ended
        lengths.add_(running)
        running.logical_and_(token != eos)

    decode(step, cache, longest, running, max_new_tokens)
    ends = starts + lengths
    tokens = tokens[:, :int(ends.max())]
    columns = torch.arange(1, tokens.size(1), device=device)        # y's index in tokens
    return tokens, (columns >= starts[:, None]) & (columns < ends[:, None])


def decode(step, cache, longest, running, max_new_tokens):
    """Calls generate's step max_new_tokens times; stops earlier if no row is running by then."""
    graph = None
    for t in range(max_new_tokens):
        if graph:
            graph.replay()
        elif cache.device.type == 'cuda':
            # A step is hundreds of kernels, each quicker than Python starts it. Recorded once, they
            # are replayed as one. Recording computes nothing, and needs shapes that do not change
            step(cache)                             # the first token; it also warms up
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step(cache)
        else:
            step(cache[..., :longest + t, :])       # a view: forward writes into cache itself
        # Asking the device forces a wait, so ask only every 16 tokens
        if t % 16 == 15 and not running.any():
            break


# ----------------------------------------------------------------------------- batches, optimizer

def rng(seed, step, stream):
    """
    Returns a fresh CPU generator for one step, or epoch, and one purpose: 'batch', 'rollout',
    'shuffle' or 'eval'. No random state is carried over: a resumed run draws the same numbers.
    """
    digest = hashlib.sha256(f'{seed} {step} {stream}'.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], 'little'))


def batches(lengths, batch_size, seed, start=0):
    """
    Yields the row indices of batches start, start + 1, ...; an epoch visits every row once. They
    have batch_size rows at most, and mostly of similar lengths, so that little of it is padding.
    """
    per_epoch = math.ceil(len(lengths) / batch_size)
    for epoch in itertools.count(start // per_epoch):
        generator = rng(seed, epoch, 'batch')
        order = torch.randperm(len(lengths), generator=generator).tolist()
        # Sorted only within groups of 16 batches, so that batches hold different rows every epoch
        group = 16 * batch_size
        order = [index for i in range(0, len(order), group)
                 for index in sorted(order[i:i + group], key=lengths.__getitem__)]
        # As even as can be: a last batch of one row would weigh as much as any other
        in_epoch = torch.tensor(order).tensor_split(per_epoch)
        # The batches are shuffled too, or each group would run from short rows to long ones
        visits = torch.randperm(per_epoch, generator=generator).tolist()
        for i in visits[max(0, start - epoch * per_epoch):]:    # resume in the middle of an epoch
            yield in_epoch[i].tolist()


def learning_rate(step, steps, lr, warmup):
    """Returns step's rate: linear warm-up, then a cosine from lr to lr / 10; step counts from 0."""
    if step < warmup:
        return lr * (step + 1) / warmup         # not from 0: the first step would be wasted
    progress = (step - warmup) / max(1, steps - 1 - warmup)         # 0 to 1
    return lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def adamw(model, weight_decay, eps=1e-8):
    """Returns AdamW: matrices and embeddings decay, biases and LayerNorms do not (two groups)."""
    parameters = [p for p in model.parameters() if p.requires_grad]     # tied weights appear once
    groups = [{'params': [p for p in parameters if p.dim() >= 2], 'weight_decay': weight_decay},
              {'params': [p for p in parameters if p.dim() < 2], 'weight_decay': 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=eps, fused=True)


def check_finite(where, **numbers):
    """Raises UserError if a number is not finite; the message names it and where it occurred."""
    for name, number in numbers.items():
        if not math.isfinite(number):
            Run.unsaved = False     # what blew up must not replace the last good checkpoint
            raise UserError(f'{where}: the {name} is {number}. Check the data, or lower --lr in '
                            'another --out; there, --init=RUN goes on from a checkpoint')


def optimizer_step(optimizer, model, lr, grad_clip, step, **losses):
    """
    Clips the gradient, takes a step and zeroes the gradient; returns its norm before clipping.
    Raises UserError, and leaves the weights alone, if a loss or the norm is not finite.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip).item()
    check_finite(f'step {step}, lr={lr:.1e}', **losses, norm=norm)
    for group in optimizer.param_groups:        # every group: weights that decay and the others
        group['lr'] = lr
    Run.unsaved = False                         # until Run.log, the weights are between two steps
    optimizer.step()
    optimizer.zero_grad()                       # backward() adds to what is there
    return norm


# ----------------------------------------------------------------------------- checkpoints

FORMAT = 2      # raised when an older run could not go on as it began; older files are refused
POLICIES = ('base', 'sft', 'ppo', 'dpo')        # the stages whose checkpoints hold a policy


def save_checkpoint(path, stage, step, cfg, text, metrics, models, optimizers, **extra):
    """
    Writes one file, whole or not at all; the old one stays as ckpt.prev.pt. models maps names to
    models, the first gives the shape; optimizers has the same order, and text is load_text's.
    """
    path, shape = Path(path), next(iter(models.values())).config
    check_finite(f'step {step}', **{f'norm of the {name}': nn.utils.get_total_norm(
        model.parameters()).item() for name, model in models.items()})
    contents = dict(
        format=FORMAT, stage=stage, step=step, config=dataclasses.asdict(cfg),
        model=dataclasses.asdict(shape), metrics=metrics,
        weights={name: model.state_dict() for name, model in models.items()},
        optimizers=[optimizer.state_dict() for optimizer in optimizers], **text, **extra)
    temporary, previous = path.with_name('ckpt.tmp'), path.with_name('ckpt.prev.pt')
    try:
        with open(temporary, 'wb') as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())             # a full disk fails here, before the rename
        assert not torch.serialization.get_unsafe_globals_in_checkpoint(temporary)  # numpy's
        if path.exists():
            previous.unlink(missing_ok=True)
            try:
                os.link(path, previous)         # a second name: ckpt.pt itself never disappears
            except OSError:                     # a file system without hard links
                shutil.copy2(path, previous)
        os.replace(temporary, path)             # atomic: the old file or the new one
    except (OSError, RuntimeError) as error:    # torch.save's own hides a full disk's
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        raise OSError(f'{temporary}: {cause or error}') from error
    finally:
        temporary.unlink(missing_ok=True)       # there only if something failed


def load_checkpoint(path, stages):
    """
    Loads the checkpoint of a run folder, or a checkpoint file, onto the CPU. Raises UserError if it
    is missing or damaged, if its stage is not one of stages, or if a weight is not finite.
    """
    path = Path(path) / 'ckpt.pt' if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(f'{path}: no checkpoint there; run that stage, or copy ckpt.prev.pt to it')
    try:
        # torch.load does not notice flipped bytes; the checksums of the zip archive do
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f'checksum of {damaged}')
        saved = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:                  # a damaged file can raise nearly anything
        raise UserError(f'{path}: damaged or incomplete, {path.stat().st_size} bytes ({error!r:.99}'
                        '); copy ckpt.prev.pt, the checkpoint before it, over it') from None
    if not isinstance(saved, dict) or saved.get('format') != FORMAT:
        raise UserError(f'{path}: not written by this version of prefgpt; remove that run, and '
                        'run its stage (or tools.hf import) again')
    if saved['stage'] not in stages:
        raise UserError(f"{path}: its stage is {saved['stage']}, not {' or '.join(stages)}")
    digest = hashlib.sha256()
    for tensor in itertools.chain(*(weights.values() for weights in saved['weights'].values())):
        if not tensor.isfinite().all():
            raise UserError(f'{path}: some of its weights are not finite; train it again')
        digest.update(tensor.float().numpy().tobytes())
    return {**saved, 'id': digest.hexdigest()}


def load_model(Model, saved, name, device):
    """Returns a checkpoint's model by name ('policy', 'ref', ...), in the first one's shape."""
    model = Model(GPTConfig(**saved['model']))
    model.load_state_dict(saved['weights'][name])
    return model.to(device)


# ----------------------------------------------------------------------------- the command line

def parse_bool(text):
    """Parses 'True', 'false', '1', '0', ..., because bool('False') is True."""
    if text.lower() not in ('true', 'false', '1', '0'):
        raise argparse.ArgumentTypeError(f'{text!r} is neither True nor False')
    return text.lower() in ('true', '1')


def parse_config(Config, argv=None):
    """
    Reads a Config from the command line: every field is a flag, --lr=0 or --lr 0 (a switch: --ipo
    or --ipo=True), and its comment is the help. A tuple field takes the positional arguments.
    """
    comments = dict(re.findall(r'^ +(\w+): .*?  # (.*)$', inspect.getsource(Config), re.MULTILINE))
    parser = argparse.ArgumentParser(
        description=inspect.getdoc(inspect.getmodule(Config)), usage='%(prog)s [--flag=value ...]',
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f'error: {message}\n')     # one line, no usage
    flags, bools = [], []
    for field in dataclasses.fields(Config):
        kind, about = type(field.default), comments[field.name].replace('%', '%%')
        if kind is tuple:
            parser.add_argument(field.name, nargs='*', help=about)
            parser.usage = f"%(prog)s [{field.name.rstrip('s').upper()} ...] [--flag=value ...]"
            continue
        flags.append('--' + field.name.rstrip('_'))     # from_ is --from: Python reserves the word
        bools += [flags[-1]] * (kind is bool)
        parser.add_argument(flags[-1], dest=field.name, default=field.default,
                            help=f'{about} [{field.default}]', metavar=kind.__name__,
                            type=parse_bool if kind is bool else kind)
    # --resume alone means --resume=True: the word after it may be a RUN
    argv = [f'{word}=True' if word in bools else word
            for word in (sys.argv[1:] if argv is None else argv)]
    arguments, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split('=')[0], flags, n=1)
        parser.error(f'unknown argument {unknown[0]}'
                     + (f', did you mean {near[0]}?' if near else ': see --help'))
    return Config(**vars(arguments))


def run_cli(main, Config):
    """Calls main with the Config from the command line; prints a user's mistake as one line."""
    sys.stdout.reconfigure(errors='backslashreplace')   # a terminal may not know every character
    try:
        main(parse_config(Config))
    except (UserError, OSError) as error:       # OSError: a full disk, somebody else's folder
        sys.stdout = None if isinstance(error, BrokenPipeError) else sys.stdout    # not once more
        sys.exit('error: ' + printable(' '.join(str(error).split())))
    except KeyboardInterrupt:
        sys.exit(130)                           # what a shell expects after Ctrl-C
    except (RuntimeError, MemoryError) as error:        # for a CPU torch has no OutOfMemoryError
        if not re.search("^$|out of memory|can't allocate memory", str(error)):
            raise
        sys.exit(f'error: out of memory, peak {peak_memory()}: set --micro_batch_size, or halve it '
                 '(that changes rounding only), or halve --rollout_size; in a tool, --batch_size')


def printable(text):
    """Replaces characters that control a terminal, the direction of its text included."""
    return re.sub('[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]', '\ufffd',
                  text)


def peak_memory():
    """Returns this process's peak memory as text: that of the GPU, if it used one."""
    if torch.cuda.is_initialized():
        return f'{torch.cuda.max_memory_allocated() / 2 ** 20:.0f} MB of GPU memory'
    try:
        import resource
    except ImportError:                         # Windows
        return 'unknown'
    unit = 2 ** 10 if sys.platform == 'linux' else 2 ** 20      # Linux counts KB, macOS bytes
    return f'{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.0f} MB'


# ----------------------------------------------------------------------------- runs and their log

# Flags that may change on resuming: they change rounding only (it can flip a token), or move files
MAY_CHANGE = ('out', 'resume', 'device', 'compile', 'micro_batch_size', 'eval_every', 'judge',
              'data', 'init', 'reward')
# The least and the most that a flag's number may be, so that no run of zero steps is a success
RANGES = {(1, 1e38): 'steps batch_size eval_every max_new_tokens rollout_size ppo_epochs prompts n',
          (1, 1e6): 'n_layer n_head n_embd block_size', (0, 1e9): 'temperature init_std',
          (0, 1e38): 'micro_batch_size warmup lr value_lr weight_decay beta clip_eps vf_clip',
          (0, 1): 'gamma gae_lambda ref_ema label_smoothing', (0, 1.8e19): 'seed',
          (1e-9, 1e38): 'grad_clip', (-1e38, 1e38): 'no_eos_score'}
# Formats of the numbers in the printed lines; a number not named here is printed as 6.3f
FORMATS = dict(loss='6.4f', accuracy='4.2f', chosen='7.2f', rejected='7.2f', ratio='5.3f',
               clip_frac='5.3f', pg_loss='7.4f', vf_loss='6.4f', entropy='5.3f', length='5.1f',
               eos='5.3f', norm='6.2f', lr='7.1e', approx_kl='6.4f')


def one_run(main):
    """Decorates main(cfg): whatever ends it, the steps taken are saved and the folder is free."""
    @functools.wraps(main)
    def run(cfg):
        with contextlib.ExitStack() as Run.at_the_end:
            return main(dataclasses.replace(cfg, out=os.path.expanduser(cfg.out)))
    return run


def open_run(cfg, stage):
    """Returns the checkpoint in cfg.out to continue from, or None; never overwrites a run."""
    out = Path(cfg.out)
    if not cfg.out:
        raise UserError('--out is empty: name a folder for the run')
    if not cfg.resume and any(path.exists() and path.stat().st_size     # an empty log is no run
                              for path in (out / 'ckpt.pt', out / 'log.jsonl')):
        raise UserError(f'{out} holds a run: continue it with --resume, or name another --out')
    if not any((out / name).exists() for name in ('ckpt.pt', 'ckpt.prev.pt')):
        return None                             # a new run
    saved, now = load_checkpoint(out, [stage]), dataclasses.asdict(cfg)
    before = {**dataclasses.asdict(type(cfg)()), **saved['config']}     # a new flag had its default
    # Half a run with one learning rate and half with another would be neither
    changed = [f'--{key} was {before[key]!r} and is {now[key]!r}' for key in now
               if key not in MAY_CHANGE and before[key] != now[key]]
    if changed:
        raise UserError(f'{out} was run with other flags: {", ".join(changed)}. Name another --out '
                        f'(with --init={out}, to train on from it), or remove {out}')
    return saved


def set_up(cfg):
    """Returns a run's device and autocast context; raises UserError if a flag cannot work."""
    for (least, most), names in RANGES.items():
        for name in names.split():
            if not least <= getattr(cfg, name, least) <= most:      # 'not' catches nan as well
                raise UserError(f'--{name}={getattr(cfg, name)}: must be {least:g} to {most:g}')
    try:
        device = torch.device(cfg.device or torch.accelerator.current_accelerator(True) or 'cpu')
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:     # no such device, or torch built without it
        raise UserError(f'--device={cfg.device}: {str(error).splitlines()[0]}') from None
    if device.type == 'cuda':       # else, with cuda:1, what asks for the current one gets cuda:0
        torch.cuda.set_device(device.index or 0)
    # A GPU before Ampere (T4, V100) only emulates bfloat16, more slowly than it computes float32
    native = device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = cfg.dtype or ('bfloat16' if native else 'float32')
    if dtype not in ('float32', 'bfloat16'):
        raise UserError(f'--dtype={dtype}: use float32 or bfloat16 (fp16 would need loss scaling)')
    torch.manual_seed(cfg.seed)                         # for the initial weights
    torch.set_float32_matmul_precision('high')          # TF32 on CUDA
    # On an H100 torch would choose cuDNN's attention, which plans for 0.5 s at every new shape
    torch.backends.cuda.enable_cudnn_sdp(False)
    print(f'device {device}, {dtype}, seed {cfg.seed}, {torch.get_num_threads()} threads')
    return device, torch.autocast(device.type, torch.bfloat16, enabled=dtype == 'bfloat16')


def own_log(path, rows, resume, at_the_end):
    """Locks a run's log, and so its folder; cuts off all but its first rows; counts them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = at_the_end.enter_context(open(path, 'a+b'))
    try:
        import fcntl
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)     # until it is closed, or we are gone
    except BlockingIOError:
        raise UserError(f'{path.parent}: another process trains there') from None
    except (ImportError, OSError):              # Windows, or a file system without locks
        (mark := path.with_name('a-process-trains-here')).touch(exist_ok=False)
        at_the_end.callback(mark.unlink)
    if not resume and log.seek(0, os.SEEK_END):
        raise UserError(f'{path.parent}: another process has begun a run there')
    log.seek(0)
    kept = list(itertools.islice(log, rows))
    if log.read(1):                             # an interrupted run wrote on after its checkpoint
        log.truncate(sum(map(len, kept)))
    os.write(log.fileno(), b'\n' * (b''.join(kept[-1:])[-1:] not in b'\n'))    # a line cut short
    return len(kept)


class Run:
    """A run folder and its owner: log.jsonl, the printed lines, signals, checkpoints."""

    def __init__(self, cfg, saved=None, rows=(), inputs={}, **checkpoint):
        """Takes cfg.out and goes on after saved; rows and inputs are what the run is made from."""
        saved = saved or {'step': 0, 'metrics': {}, 'optimizers': [], 'log': 0}
        self.path, self.cfg, self.began = Path(cfg.out, 'log.jsonl'), cfg, time.time()
        self.lr, self.signal, self.start, self.saved = 0.0, 0, saved['step'], saved['step']
        inputs = {**inputs, 'rows': hashlib.sha256(repr(rows).encode()).hexdigest(),
                  'script': inspect.getsource(inspect.getmodule(type(cfg)))}
        before = {**inputs, **saved.get('inputs', {})}
        changed = [name for name in inputs if before[name] != inputs[name]]
        if changed == ['script']:
            print(f'{cfg.out}: its script has changed since it began; it goes on with the new one')
        elif changed:
            raise UserError(f'{cfg.out}: its {", ".join(changed)} has changed: name another --out')
        for optimizer, state in zip(checkpoint.get('optimizers', ()), saved['optimizers']):
            optimizer.load_state_dict(state)
        self.checkpoint = {**checkpoint, 'cfg': cfg, 'inputs': inputs, 'metrics': saved['metrics']}
        self.rows = own_log(self.path, saved.get('log', sys.maxsize), cfg.resume, Run.at_the_end)
        Run.unsaved = False         # whether the weights are those of a step that is not saved yet
        Run.at_the_end.push(self.leave)
        if self.start == cfg.steps:
            print(f'{cfg.out} is finished: {cfg.steps} steps')

    def leave(self, error=None, *_):
        """Saves the last step if it is not saved; if an error ends the run, says how far it is."""
        if Run.unsaved:
            save_checkpoint(self.path.with_name('ckpt.pt'), step=self.last, log=self.rows,
                            **self.checkpoint)
            self.saved, Run.unsaved = self.last, False
        if error:
            print(f'{self.cfg.out}: saved to step {self.saved}; --resume goes on', file=sys.stderr)

    def steps(self, lengths, batch_size):
        """Yields the steps that are left, and their rows' indices; ends the run on a signal."""
        def stop(number, frame):
            if self.signal:
                raise KeyboardInterrupt         # asked twice: at once
            self.signal = number
        for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, 'SIGHUP', signal.SIGINT)}:
            if signal.getsignal(number) != signal.SIG_IGN:      # which nohup asked for
                Run.at_the_end.callback(signal.signal, number, signal.signal(number, stop))
        for step, indices in zip(range(self.start + 1, self.cfg.steps + 1),
                                 batches(lengths, batch_size, self.cfg.seed, self.start)):
            self.step_began = time.time()
            yield step, indices
            if self.signal:
                sys.exit(128 + self.signal)     # what a shell expects

    def write(self, row):
        with open(self.path, 'a') as file:
            file.write(json.dumps(row) + '\n')
        self.rows += 1

    def log(self, step, tokens, **metrics):
        """Logs a step; tokens is how many it read (PPO: only responses)."""
        Run.unsaved, self.last, steps = True, step, self.cfg.steps
        seconds, self.lr = max(time.time() - self.step_began, 1e-9), metrics.get('lr', self.lr)
        self.write({'step': step, **metrics, 'ms': seconds * 1e3, 'tok_per_s': tokens / seconds})
        if step in (1, steps) or step % max(1, steps // 50) == 0:       # 50 to 99 lines
            left = (time.time() - self.began) / (step - self.start) * (steps - step)
            self.show(f'step  {step:>5}/{steps}', metrics, f'{seconds * 1e3:.0f} ms',
                      f'{tokens / seconds / 1e3:.1f}k tok/s',
                      f'{left / 60:.0f}m left' if left > 90 else f'{left:.0f}s left')

    def save(self, step, metrics, samples, **more):
        """Saves a step with its evaluation on held-out rows; logs it with two samples as text."""
        check_finite(f'evaluation at step {step}, lr={self.lr:.1e}', **metrics)
        self.write({'step': step, **{f'eval_{name}': value for name, value in metrics.items()},
                    'samples': samples})
        self.checkpoint |= {'metrics': metrics, **more}
        self.leave()
        self.show(f'eval  {step:>5}/{self.cfg.steps}', metrics)         # printing can fail
        for sample in samples:
            print('      | ' + printable(sample).strip().replace('\n', '\n      | '))

    def show(self, head, metrics, *tail):
        numbers = [f"{name} {value:{FORMATS.get(name, '6.3f')}}" for name, value in metrics.items()]
        print(' | '.join([head, *numbers, *tail]), flush=True)

    def close(self):
        print(f"{self.path.with_name('ckpt.pt')} | {(time.time() - self.began) / 60:.1f} minutes | "
              f'peak memory {peak_memory()}', flush=True)
        return self.checkpoint['metrics']
