"""Holds what the tests share: tiny models, a byte tokenizer, a toy data set, and runs."""
import base64
import json
import os
import shutil
import sys
from pathlib import Path

# The suite is the CPU's also where there is a GPU; only test_cuda.py, called alone, sees it
if not any('test_cuda' in word for word in sys.argv):
    os.environ['CUDA_VISIBLE_DEVICES'] = ''

import pytest
import torch

import train_dpo
import train_ppo
import train_rm
import train_sft
from data.text import build_tokenizer, load_text
from prefgpt import GPT, GPTConfig, Run, ScalarGPT, save_checkpoint

EOS = 256           # of the byte tokenizer: the id after the 256 bytes
TEMPLATE, LETTERS = 'user: {}\nbot:', 'user: {}'      # the letters' prompts end in none
BYTE_TOKENS = ''.join(f'{base64.b64encode(bytes([i])).decode()} {i}\n' for i in range(256))
AB_MERGED = BYTE_TOKENS + f"{base64.b64encode(b'ab').decode()} 256\n"      # EOS is 257 then
STAGES = {'sft': train_sft, 'rm': train_rm, 'dpo': train_dpo, 'ppo': train_ppo}


def tiny_config(**shape):
    """Returns 2 layers, 16 wide, 17 words; init_std is large, so that logits are not flat."""
    tiny = dict(block_size=32, vocab_size=17, n_layer=2, n_head=2, n_embd=16, init_std=0.3)
    return GPTConfig(**{**tiny, **shape})


def randomize(model, seed):
    """Sets all weights at random, by seed: zero biases, unit LayerNorms would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(p + 0.2 * noise if p.dim() == 1 else 0.3 * noise)
    return model


def tiny_gpt(seed=0, **shape):
    """Returns a GPT with fixed random weights, biases and LayerNorms included."""
    return randomize(GPT(tiny_config(**shape)), seed)


def tiny_scalar(seed=0, **shape):
    """Returns a ScalarGPT with fixed random weights, its head included (at first it is zero)."""
    return randomize(ScalarGPT(tiny_config(**shape)), seed)


class Table:
    """A fake model whose logits are looked up: p(next | this) is a row of a table."""

    def __init__(self, probabilities):
        self.table = torch.tensor(probabilities, dtype=torch.double).log()
        self.config = GPTConfig(vocab_size=len(probabilities))

    def __call__(self, tokens):
        return tokens[..., None]                    # the "hidden state" is the token itself

    def logits(self, hidden):
        return self.table[hidden[..., 0]]


@pytest.fixture(scope='session')
def byte_tokenizer():
    """Returns a tokenizer with one token per byte, and EOS = 256."""
    return build_tokenizer(BYTE_TOKENS)


def write_jsonl(path, rows):
    """Writes rows as JSON Lines; returns the path."""
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


def write_toy_data(folder):
    """
    Writes a toy task as a data folder, 6 of 24 prompts held out: say a letter one to three times.
    People like the '!': the chosen response ends in it, the rejected one in '?', demonstrations in
    either. How often a letter is said differs within a pair, but predicts nothing on average.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [f'{verb} {letter}:' for letter in 'abcdefgh' for verb in ('say', 'now say', 'do')]
    held_out = prompts[1::4]
    for split, part in (('train', [p for p in prompts if p not in held_out]), ('val', held_out)):
        sft = [{'prompt': p, 'completion': f' {p[-2] * (1 + (number + i) % 3)}{"!?"[i % 2]}'}
               for number, p in enumerate(part) for i in range(4)]
        pairs = [{'prompt': p, 'chosen': f' {p[-2] * times}!', 'rejected': f' {p[-2] * other}?'}
                 for p in part for times, other in [(1, 3), (3, 1), (2, 1), (1, 2)]]
        write_jsonl(folder / f'{split}.sft.jsonl', sft)
        write_jsonl(folder / f'{split}.pairs.jsonl', pairs)
        write_jsonl(folder / f'{split}.prompts.jsonl', [{'prompt': p} for p in part] * 4)
    (folder / 'tokenizer').write_text('bytes.tiktoken\n')
    (folder / 'bytes.tiktoken').write_text(BYTE_TOKENS)
    (folder / 'template.txt').write_text(LETTERS)
    return folder


@pytest.fixture(scope='session')
def shared_data(tmp_path_factory):
    """Returns the toy data folder; all tests share it, so none may change it."""
    return write_toy_data(tmp_path_factory.mktemp('data') / 'letters')


@pytest.fixture
def tiny_data(shared_data, tmp_path):
    """Returns a copy of the toy data folder that a test may change."""
    return shutil.copytree(shared_data, tmp_path / 'letters')


def save_tiny_run(folder, data, **shape):
    """Writes a run folder as SFT leaves it: an untrained policy for the data's tokenizer."""
    tokenizer, text = load_text(data)
    policy = tiny_gpt(**{'vocab_size': tokenizer.n_vocab, **shape})
    folder.mkdir(parents=True)
    cfg = train_sft.Config(data=str(data), out=str(folder))
    save_checkpoint(folder / 'ckpt.pt', 'sft', 1, cfg, text, {}, {'policy': policy}, [])
    return folder


@pytest.fixture(scope='session')
def random_run(shared_data, tmp_path_factory):
    """Returns a run folder with an untrained, but not flat, policy; no test may change it."""
    return save_tiny_run(tmp_path_factory.mktemp('runs') / 'random', shared_data)


def train_tiny_sft(data, out):
    """Teaches a tiny policy the toy task by SFT; returns its run folder."""
    train_sft.main(train_sft.Config(
        data=str(data), out=str(out), n_layer=2, n_head=2, n_embd=32, block_size=32, steps=150,
        warmup=10, lr=1e-2, eval_every=150, max_new_tokens=8, device='cpu'))
    return out


def train_tiny_rm(data, init, out):
    """Trains a tiny reward model that likes '!'; returns its run folder."""
    train_rm.main(train_rm.Config(
        data=str(data), init=str(init), out=str(out), steps=60, warmup=5, lr=6e-3, eval_every=60,
        device='cpu'))
    return out


@pytest.fixture(scope='session')
def sft_run(shared_data, tmp_path_factory):
    """Returns a run folder with a policy that SFT taught the toy task; no test may change it."""
    return train_tiny_sft(shared_data, tmp_path_factory.mktemp('runs') / 'sft')


@pytest.fixture(scope='session')
def rm_run(shared_data, sft_run, tmp_path_factory):
    """Returns a run folder with a reward model that likes '!'; no test may change it."""
    return train_tiny_rm(shared_data, sft_run, tmp_path_factory.mktemp('runs') / 'rm')


def known(Config, options):
    """Returns the options that a stage's Config has; one that no stage has is a slip."""
    for key in options:
        assert any(hasattr(module.Config, key) for module in STAGES.values()), key
    return {key: options[key] for key in options if hasattr(Config, key)}


def read_log(out, key='loss'):
    """Reads a run's log.jsonl: the rows that hold the key, steps or, with 'eval_...', the rest."""
    rows = [json.loads(line) for line in (Path(out) / 'log.jsonl').read_text().splitlines()]
    return [row for row in rows if key in row]


def log_rows(out):
    """Reads a run's log.jsonl without the numbers that depend on the clock."""
    return [{k: row[k] for k in row.keys() - {'ms', 'tok_per_s'}} for row in read_log(out, 'step')]


def same(a, b):
    """Returns whether two nests of dicts, lists and tensors are equal, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def contents(value):
    """Returns a nest of dicts, lists and tensors as types, shapes and bytes, to compare exactly."""
    if isinstance(value, dict):
        return {key: contents(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, (list, tuple)):
        return type(value), [contents(each) for each in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    return type(value), value


def record(monkeypatch, module, name, keep=lambda argument: argument):
    """
    Lets a function of a module run as it is, and lists (arguments, result) of every call. keep
    copies what later steps change, a model for instance, before the call.
    """
    calls, function = [], getattr(module, name)

    def recording(*arguments, **options):
        kept = tuple(map(keep, arguments))
        calls.append((kept, function(*arguments, **options)))
        return calls[-1][1]
    monkeypatch.setattr(module, name, recording)
    return calls


def kill_after(monkeypatch, step):
    """Ends a run after a step as a kill would, by KeyboardInterrupt: nothing is saved for it."""
    log_step = Run.log

    def log_and_die(self, number, *arguments, **metrics):
        log_step(self, number, *arguments, **metrics)
        if number == step:
            with open(self.path, 'a') as file:
                file.write(f'{{"step": {step + 1}, "los')       # it was about to log another one
            Run.must_save = False                     # a kill leaves no time to save
            raise KeyboardInterrupt
    monkeypatch.setattr(Run, 'log', log_and_die)
