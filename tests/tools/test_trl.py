"""
Compares TRL's trainers, started from our exports on our files, with our scripts' losses.

Skipped without TRL, or with an older one (test_outside.py has the losses of TRL 0.17):

    pip install torch==2.13.0 tiktoken==0.14.0 numpy pytest trl==1.16.0 transformers==5.23.0

A batch is the whole file, because the trainers draw their batches differently. It is read six rows
at a time, and these are of different lengths, so a mask that begins or ends in the wrong place, or
a mean of means, changes the loss. OURS and THEIRS hold the settings of the table in
tools/README.md.
"""
import os, shutil

import pytest
import torch
from conftest import STAGES, randomize, read_log, save_tiny_run, tiny_config

import tools.hf
import train_rm
from data.text import load_examples, load_text
from data.toy import prepare
from prefgpt import GPT, ScalarGPT, load_checkpoint, load_model, save_checkpoint
from train_dpo import dpo_loss, ipo_loss, pair_logprobs

os.environ.setdefault('HF_HUB_OFFLINE', '1')    # before the import: TRL reports that it is used
ROWS, LENGTH = 24, 128
STAGES_OF_TRL = {'sft': ('SFT', 'sft'), 'rm': ('Reward', 'pairs'), 'dpo': ('DPO', 'pairs')}
OURS = dict(steps=4, batch_size=ROWS, micro_batch_size=6, lr=3e-3, warmup=3, weight_decay=0.1,
            grad_clip=0.5, dtype='float32', device='cpu')
THEIRS = dict(
    max_steps=4, per_device_train_batch_size=6, gradient_accumulation_steps=ROWS // 6,
    learning_rate=3e-3, warmup_steps=3, lr_scheduler_type='cosine_warmup_with_min_lr',
    lr_scheduler_kwargs={'min_lr_rate': 0.1}, adam_beta2=0.95, weight_decay=0.1, max_grad_norm=0.5,
    bf16=False, use_cpu=True, max_length=LENGTH,
    logging_steps=1, save_strategy='no', report_to='none')


@pytest.fixture(scope='module')
def trl():
    return pytest.importorskip('trl', minversion='1.16')


@pytest.fixture(scope='module')
def toy(trl, tmp_path_factory):
    """Writes the first rows of data/toy; its BPE's merges must not cross the prompt's end."""
    folder = tmp_path_factory.mktemp('data') / 'toy'
    prepare.main(prepare.Config(out=str(folder)))
    for path in folder.glob('*.jsonl'):
        path.write_text(''.join(path.read_text().splitlines(True)[:ROWS]))
    return folder


@pytest.fixture
def run(toy, tmp_path):
    return save_tiny_run(tmp_path / 'policy', toy, block_size=LENGTH)


def export(run):
    """Exports a run folder to a Hugging Face folder beside it."""
    tools.hf.main(tools.hf.Config(('export', str(run)), f'{run}-hf'))
    return f'{run}-hf'


def log_of_trl(trl, stage, model, toy, tmp_path, ref=None, **options):
    """Trains with TRL on a copy of our files, as the page says; returns its log."""
    from datasets import load_dataset
    (name, kind), rows = STAGES_OF_TRL[stage], tmp_path / 'rows'
    rows.mkdir()
    for path in toy.glob(f'*.{kind}.jsonl'):
        shutil.copy(path, rows)
    trainer = getattr(trl, f'{name}Trainer')(
        model, **({'ref_model': ref} if ref else {}),
        args=getattr(trl, f'{name}Config')(str(tmp_path / 'trl'), **{**THEIRS, **options}),
        train_dataset=load_dataset(str(rows), split='train', cache_dir=str(tmp_path / 'cache')))
    trainer.train()
    return [row for row in trainer.state.log_history if 'loss' in row]


def equal(what, theirs, ours):
    print(f'{what}: {ours:.7f}, and TRL {theirs - ours:+.1e}')     # pytest -s shows it
    assert theirs == pytest.approx(ours, abs=1e-5)


@pytest.mark.parametrize('stage', STAGES_OF_TRL)
def test_four_steps_of_each_stage(stage, trl, toy, run, tmp_path):
    """The losses and gradient norms of a script's run from the same weights. Other ids, an EOS left
    out, a mean of means (sft), another beta2, weight decay, clip (rm) or warm-up show by step 4."""
    beta = {'beta': 0.3} if stage == 'dpo' else {}
    Config, main = STAGES[stage].Config, STAGES[stage].main
    common = dict(data=str(toy), init=str(run))
    main(Config(**common, out=str(tmp_path / stage), **OURS, **beta))
    if stage == 'rm':       # an untrained reward model: the page's way to a zero head and a pad
        run = tmp_path / 'start'
        main(Config(**common, out=str(run), **{**OURS, 'steps': 1, 'lr': 0.0}))
    log = log_of_trl(trl, stage, export(run), toy, tmp_path, **beta)
    for ours, theirs in zip(read_log(tmp_path / stage), log, strict=True):
        equal(stage, theirs['loss'], ours['loss'])
        assert theirs['grad_norm'] == pytest.approx(ours['norm'], rel=1e-4)


def test_a_reward_model_that_has_learned(trl, toy, tmp_path):
    """Its first loss is not ln 2, so a score that is read one token early, as where EOS is the pad,
    or on a pad, shows. The shift cancels."""
    tokenizer, text = load_text(toy)
    model = randomize(ScalarGPT(tiny_config(vocab_size=tokenizer.n_vocab, block_size=LENGTH)), 3)
    (tmp_path / 'rm').mkdir()
    save_checkpoint(tmp_path / 'rm/ckpt.pt', 'rm', 1, train_rm.Config(), text, {},
                    {'reward_model': model}, [], shift=0.5)
    pairs, _ = load_examples(toy, 'pairs', tokenizer, text, LENGTH)
    log = log_of_trl(trl, 'rm', export(tmp_path / 'rm'), toy, tmp_path, max_steps=1)
    scores = train_rm.score_pairs(model, pairs, 'cpu')
    equal('rm, learned', log[0]['loss'], train_rm.reward_loss(*scores).mean().item())


@pytest.mark.parametrize('options', [{}, {'label_smoothing': 0.2}, {'loss_type': ['ipo']}], ids=str)
def test_dpo_beside_another_reference(options, trl, toy, run, tmp_path):
    """Where policy and reference differ, the first loss shows whose masks and sums differ. As the
    page says, TRL's sigmoid loss ignores label_smoothing, and its ipo takes means over tokens."""
    from transformers import AutoModelForCausalLM
    ref = save_tiny_run(tmp_path / 'ref', toy, block_size=LENGTH, seed=7)
    log = log_of_trl(trl, 'dpo', export(run), toy, tmp_path, beta=0.3, max_steps=1,
                     ref=AutoModelForCausalLM.from_pretrained(export(ref)), **options)
    pairs, _ = load_examples(toy, 'pairs', *load_text(toy), LENGTH)
    seq_logprobs = torch.cat([pair_logprobs(load_model(
        GPT, load_checkpoint(at, ['sft']), 'policy', 'cpu'), pairs, 'cpu') for at in (run, ref)])
    if 'loss_type' in options:                                          # seq_logprobs: (4, B)
        lengths = torch.tensor([[len(row[side]) for row in pairs] for side in (1, 2, 1, 2)])
        losses = ipo_loss(*seq_logprobs / lengths, beta=0.3)
    else:
        losses = dpo_loss(*seq_logprobs, beta=0.3)
    equal(f'dpo, {options}', log[0]['loss'], losses.mean().item())
