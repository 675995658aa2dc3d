"""
Computes what a training run holds in memory, from the sizes of its tensors: no run, and no GPU.

`python -m tools.bench --memory` prints the table, for rows of 1024 tokens under bfloat16 autocast.
Left out: the CUDA context, fragments, gradients within a block, and the keys and values of PPO's
sampler, which have a column of their own.
"""
from dataclasses import astuple

from prefgpt import LOGITS_AT_ONCE, GPTConfig


def memory(config):
    """Returns {method: bytes (held, per row of block_size tokens, of its cache)}, in bfloat16."""
    T, V, L, H, C, _ = astuple(config)
    matrices = 12 * L * C * C
    weights = matrices + 13 * L * C + (V + T + 2) * C
    # Weight, gradient and AdamW's two moments; autocast copies the matrices
    trained, frozen = 16 * weights + 2 * matrices, 4 * weights
    # Three blocks of logits; the embedding in a width that CUDA likes, and three gradients of it
    head = 12 * LOGITS_AT_ONCE + 16 * V * C
    # Kept for the backward pass, per block: LayerNorms' inputs 8 C, statistics 16 and outputs 4 C;
    # q, k, v 6 C; attention's output 2 C and sums 4 H; both sides of GELU 16 C. Then the last
    # LayerNorm's
    row = T * (L * (36 * C + 4 * H + 16) + 8 * C + 8)
    # PPO: a value model too, and reference, kl_sft's copy and reward model; two have a head.
    # Policy and value model learn one after the other, so only one's activations are held
    held = 2 * trained + 3 * frozen + 22 * C + head
    return {'SFT': (trained + head, row, 0), 'PPO': (held, row, 4 * L * C * T),
            'DPO': (trained + head, 2 * row, 0)}        # a row is a pair


def memory_table():
    """Prints what GPT-2's sizes hold, and the largest micro_batch_size by GB; returns the rows."""
    print('GPT-2        held GB  row MB cache MB   8 GB  16 GB  24 GB  80 GB')
    rows = []
    for model, *shape in (('124M', 12, 12, 768), ('355M', 24, 16, 1024), ('774M', 36, 20, 1280),
                          ('1.5B', 48, 25, 1600)):      # blocks, heads, channels
        for method, (held, row, cache) in memory(GPTConfig(1024, 50257, *shape)).items():
            fits = {f'{n} GB': max(0, int((n * 2 ** 30 - held) // row)) for n in (8, 16, 24, 80)}
            rows.append({'model': model, 'method': method, 'held': held, 'row': row,
                         'cache': cache, **fits})
            print(f'{model} {method:6} {held / 2 ** 30:9.1f} {row / 2 ** 20:7.0f} '
                  f'{cache / 2 ** 20:8.0f}' + ''.join(f'{n or "-":>7}' for n in fits.values()))
    return rows
