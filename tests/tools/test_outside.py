"""
Outside judges: what transformers, safetensors and TRL make of the same weights, rows and losses.

Where a package is missing, its tests are skipped, and TRL's also beside TRL 1, for which there is
test_trl.py. TRL 0.17 wants an older transformers:

    pip install torch==2.13.0 tiktoken==0.14.0 numpy pytest transformers==5.23.0 safetensors
    pip install torch==2.13.0 tiktoken==0.14.0 "numpy<2.3" pytest trl==0.17.0 \
        transformers==4.51.3 "datasets<4" "accelerate<1.8"

One test needs GPT-2's vocabulary, and runs where TIKTOKEN_CACHE_DIR holds it: nothing is fetched.
"""
import hashlib, os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TEMPLATE, randomize, same, tiny_config, tiny_gpt

import tools.hf
import train_sft
from data.bpe import train_bpe, write_tiktoken
from data.text import checkpoint_text, load_tokenizer, tokenizer_text
from prefgpt import (GPT, ScalarGPT, generate, last_scores, load_checkpoint, load_model, make_batch,
                     save_checkpoint)
from train_dpo import dpo_loss, ipo_loss

V, SHAPE = 701, dict(block_size=64, vocab_size=701, n_layer=3, n_head=4, n_embd=32)
ROOT = Path(__file__).resolve().parent.parent.parent
# This text would be an id to transformers and is text to us: the one known difference
CODE = (ROOT / 'prefgpt.py').read_text('utf-8')[:20_000].replace('<|endoftext|>', '<|end|>')
TEXTS = [CODE, "It's 12 o'clock,  isn't it? We'LL see...\n\n\t  The end.  \n",
         '你好，世界。こんにちは、한국어 世界', '😀👩\u200d🚀 café naïve \xa0\xad\x85 \u0301e\u0301', ' ', 'a  b']
# Prompts and responses of different lengths, EOS at the end of most
PAIRS = [([5, 6, 7], [8, 9, 700], [10, 700]), ([700], [700], [3] * 20),
         ([1, 2, 3, 4, 5, 6, 7, 8], [9] * 11 + [700], [9] * 10 + [4, 700]),
         ([40], [41, 42], [43, 44, 45, 46, 700])]


@pytest.fixture(scope='module')
def transformers():
    return pytest.importorskip('transformers')


@pytest.fixture(scope='session')
def bpe(tmp_path_factory):
    """A BPE of 701 ids with merges of code, English and CJK; EOS is 700."""
    path = tmp_path_factory.mktemp('bpe') / 'bpe.tiktoken'
    write_tiktoken(path, train_bpe([CODE, *TEXTS[1:] * 9], V))
    return load_tokenizer(path)


def exported(folder, kind, name, model, tokenizer, **extra):
    """The Hugging Face folder of a model, by way of a run folder."""
    (folder / kind).mkdir()
    save_checkpoint(folder / kind / 'ckpt.pt', kind, 1, train_sft.Config(),
                    checkpoint_text(tokenizer, TEMPLATE), {}, {name: model}, [], **extra)
    tools.hf.main(tools.hf.Config(('export', str(folder / kind)), str(folder / 'hf')))
    return folder / 'hf'


def load(Class, folder):
    """What transformers reads there, if not one key is missing, unexpected or of another shape."""
    model, info = Class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def same_policy(ours, theirs, eos):
    """Logits of random rows within 1e-4, and the same greedy text, of this eos or to the end."""
    tokens = torch.randint(V, (3, 40), generator=torch.Generator().manual_seed(0))
    assert (ours.logits(ours(tokens)) - theirs(tokens).logits).abs().max() < 1e-4
    prompts = [[5, 6, 7], [eos], [40, 3, 300, 200, 100, 77, 20]]
    rows, response_mask = generate(ours, prompts, 20, eos, temperature=0)
    for row, mask, prompt in zip(rows, response_mask, prompts):
        out = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20,
                              pad_token_id=eos, attention_mask=torch.ones(1, len(prompt)))
        assert out[0].tolist() == prompt + row[1:][mask].tolist()


def test_import_of_what_transformers_saved(transformers, tmp_path, bpe, monkeypatch):
    """A random GPT-2 of 12 layers, every bias and LayerNorm random too."""
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=V, n_positions=64, n_embd=48, n_layer=12, n_head=4, bos_token_id=V - 1,
        eos_token_id=V - 1)).eval()
    randomize(theirs, 3)
    for p in theirs.parameters():
        p.data.mul_(0.5 if p.dim() == 2 else 1)
    theirs.save_pretrained(tmp_path / 'hf')
    monkeypatch.setattr(tools.hf, 'load_tokenizer', {'gpt2': bpe}.__getitem__)
    tools.hf.write_tokenizer(tmp_path / 'hf', bpe, 64, pad=False)
    tools.hf.main(tools.hf.Config(('import', str(tmp_path / 'hf')), str(tmp_path / 'base')))
    saved = load_checkpoint(tmp_path / 'base', ['base'])
    assert saved['tokenizer'] == tokenizer_text(bpe)
    same_policy(load_model(GPT, saved, 'policy', 'cpu'), theirs, V - 1)


def test_an_exported_policy(transformers, tmp_path, bpe):
    """EOS stops both alike."""
    policy = tiny_gpt(5, **SHAPE)
    theirs = load(transformers.AutoModelForCausalLM, exported(tmp_path, 'ppo', 'policy', policy,
                                                              bpe))
    assert type(theirs).__name__ == 'GPT2LMHeadModel'
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == V - 1
    assert theirs.generation_config.eos_token_id == V - 1
    same_policy(policy, theirs, V - 1)
    # A greedy token taken for EOS, so that a row ends early
    early = generate(policy, [[5, 6, 7]], 8, V - 1, temperature=0)[0][0, 7].item()
    theirs.generation_config.eos_token_id = early
    same_policy(policy, theirs, early)


@torch.no_grad()
def test_an_exported_reward_model(transformers, tmp_path, bpe):
    """Scores of a ragged batch, padded with pad_token_id: at EOS where there is one, shifted."""
    model = randomize(ScalarGPT(tiny_config(**SHAPE)), 6)
    folder = exported(tmp_path, 'rm', 'reward_model', model, bpe, shift=1.25)
    theirs = load(transformers.AutoModelForSequenceClassification, folder)
    assert type(theirs).__name__ == 'GPT2ForSequenceClassification'
    config = theirs.config
    assert (config.num_labels, config.pad_token_id, config.vocab_size) == (1, V, V + 1)
    rows = [(prompt, response) for prompt, *pair in PAIRS for response in pair]
    tokens, _, _, response_mask = make_batch(rows)
    ours = last_scores(model, tokens, response_mask) - 1.25
    width = tokens.size(1)
    padded = torch.tensor([p + r + [config.pad_token_id] * (width - len(p + r)) for p, r in rows])
    scores = theirs(padded).logits.squeeze(1) - config.prefgpt_score_shift
    masked = theirs(padded, attention_mask=(padded != V).long()).logits.squeeze(1) - 1.25
    assert torch.allclose(scores, ours, atol=1e-4) and torch.allclose(masked, ours, atol=1e-4)


def same_ids(theirs, ours):
    """The ids and the decoded text of all TEXTS."""
    for text in TEXTS:
        ids = ours.encode_ordinary(text)
        assert theirs(text)['input_ids'] == ids and theirs.decode(ids) == text
    assert theirs.eos_token_id == ours.eot_token
    assert theirs.convert_ids_to_tokens(ours.eot_token) == '<|endoftext|>'


@pytest.mark.parametrize('Class', ['GPT2Tokenizer', 'GPT2TokenizerFast', 'AutoTokenizer'])
def test_an_exported_tokenizer(Class, transformers, tmp_path, bpe):
    """The same ids on text, code, CJK and emoji; a batch is padded with an id of its own."""
    model = ScalarGPT(tiny_config(**SHAPE))
    folder = exported(tmp_path, 'rm', 'reward_model', model, bpe, shift=0.0)
    theirs = getattr(transformers, Class).from_pretrained(folder)
    same_ids(theirs, bpe)
    assert (theirs.pad_token_id, len(theirs), theirs.model_max_length) == (V, V + 1, 64)
    batch = theirs(['a b c<|endoftext|>', 'a'], padding=True)       # to them, this text is EOS
    assert batch['input_ids'][0][-1] == V - 1 and batch['input_ids'][1][-1] == V


@pytest.mark.skipif(not (Path(os.environ.get('TIKTOKEN_CACHE_DIR', ''))
                         / '6c7ea1a7e38e3a7f062df639a5b80947f075ffe6').is_file(),
                    reason='TIKTOKEN_CACHE_DIR holds no gpt2')
def test_gpt2s_own_tokenizer(transformers, tmp_path):
    """Exported, its two files are the hub's byte for byte, and import takes them for gpt2's."""
    gpt2 = load_tokenizer('gpt2')
    tools.hf.write_tokenizer(tmp_path, gpt2, 1024, pad=False)
    for name, sha256 in (
            ('vocab.json', '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783'),
            ('merges.txt', '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5')):
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == sha256
    tools.hf.check_tokenizer(tmp_path, gpt2)
    same_ids(transformers.GPT2Tokenizer.from_pretrained(tmp_path), gpt2)


def test_safetensors_reads_ours_and_we_read_its_files(tmp_path):
    """Half precision too, a scalar, and a transposed tensor, which is written as it looks."""
    torch_files = pytest.importorskip('safetensors.torch')
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    tensors = {'a': x, 'b': x.t(), 'c.weight': torch.tensor(2.0), 'd': x[0]}
    tools.hf.write_safetensors(tmp_path / 'ours', tensors)
    assert same(torch_files.load_file(tmp_path / 'ours'), tensors)
    tensors = {'f16': x.half(), 'bf16': x.bfloat16(), 'z': x, 'mask': x > 0,
               'one': torch.tensor(2.0)}
    torch_files.save_file(tensors, tmp_path / 'theirs', metadata={'format': 'pt', 'by': 'them'})
    assert same(tools.hf.read_safetensors(tmp_path / 'theirs'), tensors)


@pytest.mark.parametrize('label_smoothing', [0.0, 0.1, 0.3])
@pytest.mark.parametrize('beta', [0.05, 0.5])
def test_the_losses_are_trls(beta, label_smoothing):
    """DPO's, and IPO's (TRL gives it means over tokens, and we sums), of the same summed logprobs;
    TRL's chosen_rewards - rejected_rewards is our margin. No model is trained."""
    trainer = pytest.importorskip('trl').DPOTrainer
    if not hasattr(trainer, 'dpo_loss'):
        pytest.skip('this TRL has no dpo_loss; test_trl.py compares its whole trainer')
    stand_in = SimpleNamespace(         # as much of a DPOTrainer as its pure part looks at
        accelerator=SimpleNamespace(device=torch.device('cpu')), reference_free=False,
        f_divergence_type='reverse_kl', f_divergence_params=None, loss_type='sigmoid', beta=beta,
        label_smoothing=label_smoothing)
    generator = torch.Generator().manual_seed(0)
    logprobs = [-80 * torch.rand(64, generator=generator, dtype=torch.float64) for _ in range(4)]
    losses, chosen, rejected = trainer.dpo_loss(stand_in, *logprobs)
    assert torch.allclose(dpo_loss(*logprobs, beta, label_smoothing), losses, atol=1e-9, rtol=0)
    margin = beta * ((logprobs[0] - logprobs[2]) - (logprobs[1] - logprobs[3]))
    assert torch.allclose(margin, chosen - rejected, atol=1e-9, rtol=0)
    stand_in.loss_type = 'ipo'
    losses, *_ = trainer.dpo_loss(stand_in, *logprobs)
    assert torch.allclose(ipo_loss(*logprobs, beta), losses, atol=1e-9, rtol=0)
