"""
Imports GPT-2's weights, and exports checkpoints for Hugging Face's transformers.

import makes a run folder of stage 'base', for train_sft.py --init, from config.json and
model.safetensors; the tokenizer is gpt2's, and a folder with another one is refused.
export makes a GPT2LMHeadModel of a policy, a GPT2ForSequenceClassification of a reward model. The
latter reads its score at the last token that is not a pad. EOS must not count as a pad, so the
embedding gets a spare row of zeros for the pad, id V. The score minus prefgpt_score_shift, a key in
config.json, is ours. EOS must be appended, as in training.
What it does not do: read weights in several files, write half precision, export the chat template
or PPO's value model, or notice a flipped bit in a .safetensors file whose sha256 is not known.

    python -m tools.hf import gpt2 --out=out/gpt2       # or gpt2-medium, -large, -xl, or a folder
    python -m tools.hf export out/toy/dpo --out=out/toy/dpo-hf
"""
import itertools, json, math, os, re, tempfile
from dataclasses import dataclass, make_dataclass
from pathlib import Path

import torch

from data.download import download, sha256_of
from data.text import build_tokenizer, checkpoint_text, load_tokenizer, read_text
from data.turns import unique_keys
from prefgpt import (GPT, POLICIES, GPTConfig, ScalarGPT, UserError, load_checkpoint, load_model,
                     run_cli, save_checkpoint)


@dataclass
class Config:
    command: tuple = ()             # import WHERE (a folder, or gpt2...gpt2-xl), or export RUN
    out: str = ''                   # the folder to write; it must not be there yet


Source = make_dataclass('Source', ['data'])     # an import's run config: messages name its data
HUB_URL = 'https://huggingface.co/openai-community'
# Layers, heads, channels, revision, and the sha256 of the weights ('': not known to us)
HUB = {'gpt2': (12, 12, 768, '607a30d783dfa663caf39e06633721c8d4cfcd7e',
                '248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707'),
       'gpt2-medium': (24, 16, 1024, 'main', ''), 'gpt2-large': (36, 20, 1280, 'main', ''),
       'gpt2-xl': (48, 25, 1600, 'main', '')}
# What a config.json may choose and our GPT may not; transformers' defaults are the same
FIXED = {'model_type': 'gpt2', 'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5,
         'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False,
         'tie_word_embeddings': True}
SHAPE = ('n_positions', 'vocab_size', 'n_layer', 'n_head', 'n_embd')     # in GPTConfig's order
# Names are the same on both sides; these weights are (in, out) there, and (out, in) here
CONV1D = re.compile(r'(c_attn|c_proj|c_fc)\.weight')
BUFFER = re.compile(r'(transformer\.)?h\.\d+\.attn\.(masked_)?bias')    # old files' causal mask
DTYPES = {'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16,
          'BOOL': torch.bool, 'U8': torch.uint8}        # the last two: of buffers alone
LONGEST = 10 ** 7       # bytes of a JSON text: ten times those of gpt2's vocab.json
LARGEST = 2 ** 31       # numbers in a model; gpt2-xl has 1.6e9
EOS, PAD = '<|endoftext|>', '<|pad|>'
# vocab.json and merges.txt spell a byte as a visible character, itself or one from 256 on: 'Ġthe'
CHARACTERS = dict(zip([*range(0x21), *range(0x7f, 0xa1), 0xad], itertools.count(256)))


# ----------------------------------------------------------------------------- the files

def parse_json(path, text):
    """Returns the object that a JSON text is, or raises a UserError that names its file."""
    try:                                        # int refuses NaN and Infinity, which are no JSON
        return {**json.loads(text, object_pairs_hook=unique_keys, parse_constant=int)}
    except (ValueError, TypeError, RecursionError) as error:    # no UTF-8, no JSON, no object
        raise UserError(f'{path}: {error}') from None


def check_files(folder):
    """Raises UserError if a file that import reads is not this folder's own, or far too long."""
    home = Path(os.path.realpath(folder))
    # In the Hub's cache, models--NAME/snapshots/REVISION/ has links to models--NAME/blobs/
    homes = [home, home.parents[1] / 'blobs'] if home.parent.name == 'snapshots' else [home]
    for name in ('config.json', 'vocab.json', 'merges.txt', 'model.safetensors'):
        path, real = folder / name, Path(os.path.realpath(folder / name))
        if not os.path.lexists(path):
            continue
        if not real.is_file() or not any(real.is_relative_to(each) for each in homes):
            raise UserError(f'{path}: no file, or a link that leads out of the folder, to {real}')
        if path.suffix != '.safetensors' and real.stat().st_size > LONGEST:
            raise UserError(f'{path}: {real.stat().st_size} bytes are not those of a GPT-2')


def read_safetensors(path):
    """
    Returns a file's tensors by name, but for causal masks; raises UserError unless they account for
    every byte.
    """
    size, tensors, at = path.stat().st_size, {}, 0
    with open(path, 'rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        room = size - 8 - length                        # for the numbers
        if room < 0 or length > LONGEST:
            raise UserError(f'{path}: {size} bytes and a header of {length}: cut off, or no model')
        name = entry = header = parse_json(path, file.read(length))
        header.pop('__metadata__', None)
        try:
            for name, entry in sorted(header.items(), key=lambda item: item[1]['data_offsets']):
                dtype, shape = DTYPES[entry['dtype']], entry['shape']
                end = at + math.prod(shape) * dtype.itemsize
                if entry['data_offsets'] != [at, end] or end > room:
                    raise ValueError
                if BUFFER.fullmatch(name):
                    file.seek(end - at, os.SEEK_CUR)
                else:
                    data = bytearray(end - at)
                    file.readinto(data)
                    tensors[name] = torch.frombuffer(data, dtype=dtype).reshape(shape)
                at = end
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise UserError(f'{path}: damaged: {str((name, entry))[:150]}, not a tensor in one of '
                            f'{", ".join(DTYPES)}, from byte {at} of {room} on') from None
    if at != room:
        raise UserError(f'{path}: {room - at} bytes after the last tensor')
    return tensors


def write_safetensors(path, tensors):
    """Writes tensors as float32: the header's length in 8 bytes, the header, the numbers."""
    header, at = {'__metadata__': {'format': 'pt'}}, 0
    for name, tensor in tensors.items():
        begin, at = at, at + 4 * tensor.numel()
        header[name] = {'dtype': 'F32', 'shape': list(tensor.shape), 'data_offsets': [begin, at]}
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)                     # the numbers begin at a multiple of 8
    with open(path, 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for tensor in tensors.values():                 # a transposed one is copied here
            file.write(tensor.float().contiguous().numpy().data)


def halves(token, ranks):
    """Returns the two tokens that BPE joins last on the way from single bytes to this one."""
    # A .tiktoken file holds no merges, but BPE always joins the neighbours of lowest rank first
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, len(ranks)) for left, right in zip(parts, parts[1:])]
        i = joined.index(min(joined))
        if joined[i] >= ranks[token]:
            raise UserError(f'tokenizer: no merges lead to {token!r}, rank {ranks[token]}')
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def vocab_and_merges(tokenizer):
    """Returns a tokenizer as vocab.json and merges.txt have it: {token: id}, ['one two', ...]."""
    def spell(token):
        return token.decode('latin-1').translate(CHARACTERS)
    ranks = {tokenizer.decode_single_token_bytes(i): i for i in range(tokenizer.eot_token)}
    vocab = {spell(token): i for token, i in ranks.items()} | {EOS: tokenizer.eot_token}
    return vocab, [' '.join(map(spell, halves(token, ranks))) for token in ranks if len(token) > 1]


def write_tokenizer(folder, tokenizer, block_size, pad):
    """Writes vocab.json, merges.txt and tokenizer_config.json, as GPT2Tokenizer reads them."""
    vocab, merges = vocab_and_merges(tokenizer)
    # The last key keeps decoding from turning ' .' into '.'
    config = {'tokenizer_class': 'GPT2Tokenizer', 'model_max_length': block_size, 'bos_token': EOS,
              'eos_token': EOS, 'unk_token': EOS, 'clean_up_tokenization_spaces': False}
    if pad:
        vocab[PAD], config['pad_token'] = len(vocab), PAD
    (folder / 'vocab.json').write_text(json.dumps(vocab))
    (folder / 'merges.txt').write_bytes('\n'.join(['#version: 0.2', *merges, '']).encode())
    (folder / 'tokenizer_config.json').write_text(json.dumps(config, indent=2) + '\n')


def check_tokenizer(folder, tokenizer):
    """Raises UserError if a folder comes with another tokenizer than this one, gpt2's."""
    paths = [folder / name for name in ('vocab.json', 'merges.txt', 'tokenizer.json')]
    if not any(path.exists() for path in paths):
        return                                          # weights alone: their ids are gpt2's
    vocab, merges = vocab_and_merges(tokenizer)
    if (not all(path.exists() for path in paths[:2])
            or parse_json(paths[0], read_text(paths[0])) != vocab
            or read_text(paths[1]).split('\n')[1:-1] != merges):
        raise UserError(f"{folder}: vocab.json and merges.txt must be there and be gpt2's: import "
                        'knows no other tokenizer')


# ----------------------------------------------------------------------------- in and out

def read_config(path, n_vocab):
    """Returns the GPTConfig of a config.json; raises UserError if our GPT cannot be that model."""
    config = parse_json(path, read_text(path))
    for key, value in {**FIXED, 'vocab_size': n_vocab}.items():
        if config.get(key, value) != value:
            raise UserError(f'{path}: {key} is {config[key]!r}, and ours is always {value!r}')
    shape = {key: config.get(key) for key in SHAPE}
    if not all(type(n) is int and 0 < n <= 2 ** 16 for n in shape.values()) or (
            shape['n_layer'] > 256 or numbers_of(GPTConfig(*shape.values())) > LARGEST):
        raise UserError(f'{path}: not the shape of a model: {shape}')
    return GPTConfig(*shape.values())


def numbers_of(config):
    """Returns how many numbers a model has, the embedding twice, as in a file with a head."""
    C = config.n_embd
    return ((2 * config.vocab_size + config.block_size + 2) * C
            + config.n_layer * (12 * C * C + 13 * C))


def to_gpt(where, tensors, config):
    """Returns a GPT with the tensors, which have transformers' names; UserError if they differ."""
    weights = {}
    for name in list(tensors):
        tensor, ours = tensors.pop(name), name.removeprefix('transformer.')     # pop: frees it
        if ours in weights:
            raise UserError(f'{where}: {ours!r} is there twice, with and without transformer.')
        if not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise UserError(f'{where}: {name!r}, {tensor.dtype}, holds other than finite numbers')
        tensor = tensor.t() if CONV1D.search(name) and tensor.dim() == 2 else tensor
        weights[ours] = tensor.float().contiguous()
    head = weights.pop('lm_head.weight', None)
    with torch.device('meta'):
        model = GPT(config)                             # names and shapes, no numbers yet
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:       # it names what is missing, unknown or of another shape
        raise UserError(f'{where}: {" ".join(str(error).split())[:300]}') from None
    if head is not None and not torch.equal(head, weights['wte.weight']):
        raise UserError(f"{where}: 'lm_head.weight' is not 'wte.weight', and ours is always tied")
    return model


def import_weights(where, out, folder):
    """Writes to folder, which becomes out, a checkpoint of stage 'base'; says what it was."""
    source, tokenizer = Path(where), load_tokenizer('gpt2')
    weights = source / 'model.safetensors'
    if where in HUB and not source.exists():
        *shape, revision, sha256 = HUB[where]
        config, weights = GPTConfig(1024, 50257, *shape), folder.with_name('weights')
        # What breaks off stays in DOWNLOADED.part, beside out, and the next call continues it
        downloaded = out.with_name(f'{out.name}.download')
        download(f'{HUB_URL}/{where}/resolve/{revision}/model.safetensors', downloaded, sha256,
                 instead='without a network, import a folder that holds the files')
        downloaded.rename(weights)
        if not sha256:
            print(f'{where}: sha256 {sha256_of(weights)}, not checked: it is not known to us')
    elif weights.is_file() and (source / 'config.json').is_file():
        check_files(source)
        config = read_config(source / 'config.json', tokenizer.n_vocab)
        check_tokenizer(source, tokenizer)
        masks = 4 * config.n_layer * (config.block_size ** 2 + 1)
        if weights.stat().st_size > 4 * numbers_of(config) + masks + LONGEST:
            raise UserError(f'{weights}: {weights.stat().st_size} bytes are more than a model of '
                            "config.json's shape has")
    else:
        raise UserError(f'{where}: expected one of {", ".join(HUB)}, or a folder with config.json '
                        'and model.safetensors, in one file')
    model = to_gpt(where, read_safetensors(weights), config)
    # The template '{}': a base model just continues what is typed
    save_checkpoint(folder / 'ckpt.pt', 'base', 0, Source(where), checkpoint_text(tokenizer, '{}'),
                    {}, {'policy': model}, [])
    return f'a GPT-2 of {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters'


def export(run, out):
    """Writes a run's policy or reward model to out; says which class reads it."""
    saved = load_checkpoint(run, (*POLICIES, 'rm'))
    is_reward, shape = saved['stage'] == 'rm', saved['model']
    tokenizer = build_tokenizer(saved['tokenizer'])
    config = {'architectures': ['GPT2LMHeadModel'], **FIXED, **dict(zip(SHAPE, shape.values())),
              'resid_pdrop': 0.0, 'embd_pdrop': 0.0, 'attn_pdrop': 0.0,
              'bos_token_id': tokenizer.eot_token, 'eos_token_id': tokenizer.eot_token}
    try:
        model = load_model(ScalarGPT if is_reward else GPT, saved,
                           'reward_model' if is_reward else 'policy', 'cpu')
    except RuntimeError as error:       # adapters, say, which transformers would silently leave out
        raise UserError(f'{run}: {" ".join(str(error).split())[:300]}') from None
    tensors = {}
    for name, tensor in model.state_dict().items():
        name = name if name == 'score.weight' else 'transformer.' + name.removeprefix('body.')
        tensors[name] = tensor.t() if CONV1D.search(name) else tensor
    if is_reward:
        wte = tensors['transformer.wte.weight']
        tensors['transformer.wte.weight'] = torch.cat([wte, torch.zeros_like(wte[:1])])  # (V+1, C)
        config |= {'architectures': ['GPT2ForSequenceClassification'], 'num_labels': 1,
                   'vocab_size': len(wte) + 1, 'pad_token_id': len(wte),
                   'prefgpt_score_shift': saved['shift']}
    write_safetensors(out / 'model.safetensors', tensors)
    write_tokenizer(out, tokenizer, shape['block_size'], pad=is_reward)
    (out / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
    return f"transformers' {config['architectures'][0]} reads it"


def main(cfg):
    """Imports or exports; writes to a temporary folder, which becomes --out when it is complete."""
    if len(cfg.command) != 2 or cfg.command[0] not in ('import', 'export') or not cfg.out:
        raise UserError('say import WHERE --out=RUN, or export RUN --out=FOLDER')
    (verb, where), out = cfg.command, Path(cfg.out)
    if out.exists():
        raise UserError(f'{out} is there already: name another --out')
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        folder = Path(temporary, 'whole')
        folder.mkdir()
        done = export(where, folder) if verb == 'export' else import_weights(where, out, folder)
        folder.rename(out)
    print(f'{out}: {done}')


if __name__ == '__main__':
    run_cli(main, Config)
