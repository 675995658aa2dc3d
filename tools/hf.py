"""
GPT-2 weights in, checkpoints out: the files that Hugging Face's transformers reads and writes.

import makes a run folder of stage 'base', for train_sft.py --init, from config.json and
model.safetensors; the tokenizer is gpt2's, and a folder with another one is refused.
export makes a GPT2LMHeadModel of a policy, a GPT2ForSequenceClassification of a reward model. That
one reads its score at the last token that is not a pad, and EOS must not pass for a pad: so the
embedding gets a spare row of zeros, id V of V + 1, for the pad alone. The score minus
prefgpt_score_shift, a key of its config.json, is ours; EOS must be appended, as in training.
Names are GPT-2's on both sides; its Conv1D keeps weights (in, out), nn.Linear (out, in).
What it does not do: read weights in several files, write half precision, export the chat template
or PPO's value model, or notice a flipped bit in a .safetensors file whose sha256 is not known.

    python -m tools.hf import gpt2 --out=out/gpt2       # or gpt2-medium, -large, -xl, or a folder
    python -m tools.hf export out/toy/dpo --out=out/toy/dpo-hf
"""
import json, math, re, tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from data.download import download, sha256_of
from data.text import (build_tokenizer, checkpoint_text, load_tokenizer, read_text, refuse_constant,
                       unique_keys)
from prefgpt import GPT, POLICIES, GPTConfig, UserError, load_checkpoint, run_cli, save_checkpoint


@dataclass
class Config:
    command: tuple = ()             # import WHERE (a folder, or gpt2...gpt2-xl), or export RUN
    out: str = ''                   # the folder to write; it must not be there yet


@dataclass
class Source:
    """An imported checkpoint's run config: messages name a checkpoint by its data."""
    data: str


HUB_URL = 'https://huggingface.co/openai-community'
# Layers, heads, channels, where the weights are, and their sha256 ('': not known to us)
HUB = {'gpt2': (12, 12, 768, 'gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e',
                '248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707'),
       'gpt2-medium': (24, 16, 1024, 'gpt2-medium/resolve/main', ''),
       'gpt2-large': (36, 20, 1280, 'gpt2-large/resolve/main', ''),
       'gpt2-xl': (48, 25, 1600, 'gpt2-xl/resolve/main', '')}
# What a config.json may choose and GPT does not; absent, transformers takes the same
FIXED = {'model_type': 'gpt2', 'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5,
         'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False,
         'tie_word_embeddings': True}
SHAPE = {'block_size': 'n_positions', 'vocab_size': 'vocab_size', 'n_layer': 'n_layer',
         'n_head': 'n_head', 'n_embd': 'n_embd'}
CONV1D = re.compile(r'(c_attn|c_proj|c_fc)\.weight')    # to be transposed
# The causal mask, which old files hold; c_attn.bias is a weight
BUFFER = re.compile(r'(transformer\.)?h\.\d+\.attn\.(masked_)?bias')
DTYPES = {'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16,
          'BOOL': torch.bool, 'U8': torch.uint8}        # the last two: of buffers alone
EOS, PAD = '<|endoftext|>', '<|pad|>'


# ----------------------------------------------------------------------------- safetensors

def parse_json(path, text):
    """Returns the object that a JSON text is, or raises a UserError that names its file."""
    try:
        parsed = json.loads(text, object_pairs_hook=unique_keys, parse_constant=refuse_constant)
        if not isinstance(parsed, dict):
            raise ValueError(f'an object was expected, not {type(parsed).__name__}')
    except (ValueError, RecursionError) as error:       # also what is not UTF-8
        raise UserError(f'{path}: {error}') from None
    return parsed


def read_safetensors(path):
    """Returns a file's tensors by name; raises UserError unless they account for every byte."""
    size, tensors, at = path.stat().st_size, {}, 0
    with open(path, 'rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        room = size - 8 - length                        # for the numbers
        if room < 0:
            raise UserError(f'{path}: {size} bytes, of which {length} would be the header: cut '
                            'off, or not a safetensors file')
        name = entry = header = parse_json(path, file.read(length))
        header.pop('__metadata__', None)
        try:
            for name, entry in sorted(header.items(), key=lambda item: item[1]['data_offsets']):
                dtype, shape = DTYPES[entry['dtype']], entry['shape']
                end = at + math.prod(shape) * dtype.itemsize
                if entry['data_offsets'] != [at, end] or end > room:
                    raise ValueError
                data = bytearray(end - at)
                file.readinto(data)
                tensors[name], at = torch.frombuffer(data, dtype=dtype).reshape(shape), end
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise UserError(f'{path}: damaged at {str(name)[:80]!r}, {str(entry)[:100]}: every '
                            f'tensor, one of {", ".join(DTYPES)}, must begin where the one before '
                            f'ends, here {at}, and fill its bytes, of {room} in all') from None
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


# ----------------------------------------------------------------------------- tokenizer

# vocab.json and merges.txt spell a byte as one visible character: itself, or one from 256 on
VISIBLE = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
CHARACTERS = ({byte: chr(byte) for byte in VISIBLE}
              | {byte: chr(256 + i) for i, byte in enumerate(HIDDEN)})


def spell(token):
    """Spells bytes in GPT-2's characters. b' the' -> 'Ġthe'"""
    return ''.join(CHARACTERS[byte] for byte in token)


def halves(token, ranks):
    """
    Returns the two tokens that BPE joins last on the way from single bytes to this one. A .tiktoken
    file keeps no merges: of all that can be joined, the lowest rank comes first.
    """
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
    ranks = {tokenizer.decode_single_token_bytes(i): i for i in range(tokenizer.eot_token)}
    vocab = {spell(token): i for token, i in ranks.items()} | {EOS: tokenizer.eot_token}
    return vocab, [' '.join(map(spell, halves(token, ranks))) for token in ranks if len(token) > 1]


def write_tokenizer(folder, tokenizer, block_size, pad):
    """Writes vocab.json, merges.txt and tokenizer_config.json, as GPT2Tokenizer reads them."""
    vocab, merges = vocab_and_merges(tokenizer)
    # The last key: decoding would else turn ' .' into '.'
    config = {'tokenizer_class': 'GPT2Tokenizer', 'model_max_length': block_size, 'bos_token': EOS,
              'eos_token': EOS, 'unk_token': EOS, 'clean_up_tokenization_spaces': False}
    if pad:
        vocab[PAD], config['pad_token'] = len(vocab), PAD
    for name, text in (('vocab.json', json.dumps(vocab)),
                       ('merges.txt', '\n'.join(['#version: 0.2', *merges, ''])),
                       ('tokenizer_config.json', json.dumps(config, indent=2) + '\n')):
        (folder / name).write_bytes(text.encode())      # not write_text: '\n' on every system


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


# ----------------------------------------------------------------------------- in

def read_config(path):
    """Returns the GPTConfig of a config.json; raises UserError if ours cannot be that GPT-2."""
    config = parse_json(path, read_text(path))
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise UserError(f'{path}: {key} is {config[key]!r}, and ours is always {value!r}')
    shape = {ours: config.get(theirs) for ours, theirs in SHAPE.items()}
    # Upper ends too: a size beyond them is a slip, and would end in whatever torch says of it
    whole = all(type(n) is int and 0 < n <= (1024 if ours == 'n_layer' else 2 ** 20)
                for ours, n in shape.items())
    if not whole or shape['n_embd'] % shape['n_head']:
        raise UserError(f'{path}: not the shape of a model: '
                        + ', '.join(f'{key} {config.get(key)!r}' for key in SHAPE.values()))
    return GPTConfig(**shape)


def to_gpt(path, tensors, config):
    """Returns a GPT with the tensors, which have transformers' names; UserError if they differ."""
    weights = {}
    for name in [name for name in tensors if not BUFFER.fullmatch(name)]:
        tensor, ours = tensors.pop(name), name.removeprefix('transformer.')     # pop: frees it
        if ours in weights:
            raise UserError(f'{path}: {ours!r} is there twice, with and without transformer.')
        if not tensor.is_floating_point():
            raise UserError(f'{path}: {name!r} is {tensor.dtype}: weights are floating-point')
        if not tensor.isfinite().all():
            raise UserError(f'{path}: {name!r} holds nan or infinity')
        if CONV1D.search(name) and tensor.dim() == 2:
            tensor = tensor.t()                         # (in, out) -> (out, in)
        weights[ours] = tensor.float().contiguous()
    head = weights.pop('lm_head.weight', None)
    with torch.device('meta'):
        model = GPT(config)                             # names and shapes, no numbers yet
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:       # it names what is missing, unknown or of another shape
        raise UserError(f'{path}: {" ".join(str(error).split())[:300]}') from None
    if head is not None and not torch.equal(head, weights['wte.weight']):
        raise UserError(f"{path}: 'lm_head.weight' is not 'wte.weight', and ours is always tied")
    return model


def import_weights(where, path, config, tokenizer, out):
    """Writes a .safetensors file to out as a checkpoint of stage 'base'; says what it was."""
    if tokenizer.n_vocab != config.vocab_size:
        raise UserError(f'{where}: its vocab_size is {config.vocab_size}, and its tokenizer, '
                        f"gpt2's, has {tokenizer.n_vocab} ids")
    model = to_gpt(path, read_safetensors(path), config)
    # The template '{}': a model that has only read goes on with what is typed
    save_checkpoint(out / 'ckpt.pt', 'base', 0, Source(where), checkpoint_text(tokenizer, '{}'), {},
                    {'policy': model}, [])
    return f'a GPT-2 of {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters'


def import_folder(where, out):
    """Imports config.json and model.safetensors of a folder."""
    folder = Path(where)
    path = folder / 'model.safetensors'
    if not path.is_file() or not (folder / 'config.json').is_file():
        raise UserError(f'{where}: expected one of {", ".join(HUB)}, or a folder with config.json '
                        'and model.safetensors, in one file')
    config, tokenizer = read_config(folder / 'config.json'), load_tokenizer('gpt2')
    check_tokenizer(folder, tokenizer)
    return import_weights(where, path, config, tokenizer, out)


def import_from_hub(name, path, out):
    """Downloads a GPT-2's weights to path, imports them, and deletes them there."""
    n_layer, n_head, n_embd, where, sha256 = HUB[name]
    config = GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    tokenizer = load_tokenizer('gpt2')
    # A download that breaks off stays in PATH.part, and the next call continues it
    download(f'{HUB_URL}/{where}/model.safetensors', path, sha256,
             instead='without a network, import a folder that holds the files')
    if not sha256:
        print(f'{name}: the sha256 of its model.safetensors is not known to us, so it was not '
              f'checked; it is {sha256_of(path)}')
    try:
        return import_weights(name, path, config, tokenizer, out)
    finally:
        path.unlink()


# ----------------------------------------------------------------------------- out

def export(run, out):
    """Writes a run's policy or reward model to out; says which class reads it."""
    saved = load_checkpoint(run, (*POLICIES, 'rm'))
    is_reward, shape = saved['stage'] == 'rm', saved['model']
    tokenizer = build_tokenizer(saved['tokenizer'])
    config = {'architectures': ['GPT2LMHeadModel'], **FIXED,
              **{theirs: shape[ours] for ours, theirs in SHAPE.items()},
              'resid_pdrop': 0.0, 'embd_pdrop': 0.0, 'attn_pdrop': 0.0,
              'bos_token_id': tokenizer.eot_token, 'eos_token_id': tokenizer.eot_token}
    tensors = {}
    for name, tensor in saved['weights']['reward_model' if is_reward else 'policy'].items():
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
    """Imports or exports; --out takes its name when it is whole."""
    if len(cfg.command) != 2 or cfg.command[0] not in ('import', 'export') or not cfg.out:
        raise UserError('say import WHERE --out=RUN, or export RUN --out=FOLDER')
    (verb, where), out = cfg.command, Path(cfg.out)
    if out.exists():
        raise UserError(f'{out} is there already: name another --out')
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        folder = Path(temporary, 'whole')
        folder.mkdir()
        if verb == 'export':
            done = export(where, folder)
        elif where in HUB and not Path(where).exists():
            done = import_from_hub(where, out.with_name(f'{out.name}.download'), folder)
        else:
            done = import_folder(where, folder)
        folder.rename(out)
    print(f'{out}: {done}')


if __name__ == '__main__':
    run_cli(main, Config)
