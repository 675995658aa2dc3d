"""
Shows a data folder as the scripts read it: lengths, two rows by mask, the commands to run next.

    python -m data.prepare data/toy --look
"""
import sys

from data.text import RESPONSES, DataError, load_split, load_text
from prefgpt import printable


def show(folder):
    """Prints a folder's counts, lengths, first rows and commands; returns the counts."""
    tokenizer, text = load_text(folder)
    counts, lengths = {}, {}                    # lengths: (kind, split, key) -> tokens
    for kind in [kind for kind in RESPONSES if (folder / f'train.{kind}.jsonl').exists()]:
        splits = dict(zip(('train', 'val'), load_split(folder, kind, text['template'])))
        if both := {*map(str, splits['train'])} & {*map(str, splits['val'])}:
            print(f'{folder}: {len(both)} rows of val.{kind} are also in train.{kind}')
        for split, rows in splits.items():
            counts[f'{split}.{kind}'] = len(rows)
            for key in ('prompt', *RESPONSES[kind]):            # an answer has its EOS
                lengths[kind, split, key] = [len(tokenizer.encode_ordinary(row[key]))
                                             + (key != 'prompt') for row in rows]
        if kind != 'prompts':
            print(f'\n{folder}/train.{kind}.jsonl, the first row as the model sees it:')
            print(*(paint(splits['train'][0], key) for key in RESPONSES[kind]), sep='\n')
    if not counts:
        raise DataError(f'{folder}: no train.sft.jsonl, train.pairs.jsonl or train.prompts.jsonl')
    print(f"\n{folder}: template {text['template']!r}, a vocabulary of {tokenizer.n_vocab}, "
          + ', '.join(f'{n} {name}' for name, n in counts.items()))
    for (kind, split, key), each in lengths.items():
        if split == 'train':
            print(f'train.{kind:8}{key:11} tokens: ' + ', '.join(
                f'{share}% up to {percentile(each, share)}' for share in (50, 95, 100)))
    if 'train.pairs' in counts:
        shares = []
        for split in ('train', 'val'):
            sides = zip(*(lengths['pairs', split, side] for side in RESPONSES['pairs']))
            longer = [0.5 if chosen == rejected else chosen > rejected
                      for chosen, rejected in sides]
            shares.append(sum(longer) / len(longer))
        error = (shares[1] * (1 - shares[1]) / len(longer)) ** 0.5
        print(f'the longer answer is the chosen one in {shares[0]:.3f} of train.pairs and '
              f'{shares[1]:.3f} ± {error:.3f} of the {len(longer)} val.pairs, which a reward '
              "model's accuracy has to beat")
    print('\n'.join(commands(folder, counts, lengths, text['template'], tokenizer.n_vocab)))
    return counts


def percentile(numbers, share):
    """Returns the number that `share` percent of the numbers do not exceed."""
    return sorted(numbers)[(len(numbers) * share - 1) // 100]


def paint(row, key):
    """
    Returns prompt, response and EOS in colours: grey, green, inverse; or in plain marks. Of a long
    text both ends are shown, since the mask begins and ends there.
    """
    def short(text):
        return text if len(text) <= 500 else f'{text[:200]} [...] {text[-200:]}'
    marks = ['\033[90m{}\033[0m', '\033[32m{}\033[0m', '\033[7m{}\033[0m']
    if not sys.stdout.isatty():
        marks = ['prompt [{}]', ' response [{}]', ' {}']
    end = 'no EOS, because it is cut' if row.get(f'{key}_cut') else 'EOS'
    return ''.join(mark.format(printable(short(part)))
                   for mark, part in zip(marks, (row['prompt'], row[key], end)))


def commands(folder, counts, lengths, template, vocab_size):
    """Returns the commands to run next, with sizes that suit the data."""
    both = {'prompt': [0], 'answer': [0]}
    for (kind, _, key), each in lengths.items():
        both['prompt' if key == 'prompt' else 'answer'] += each
    prompt, answer = (percentile(each, 95) for each in both.values())
    longest = max(both['answer'])
    block = next((size for size in (64, 128) if size >= prompt + answer), 256)      # for CPUs
    tokens = sum(map(sum, both.values()))
    mean = min(block, tokens / max(1, len(both['prompt'])))                         # of a row
    small = tokens < 3e5
    shape = '--n_layer=4 --n_embd=128' if small else '--n_layer=6 --n_head=6 --n_embd=384'
    out, new = f'out/{folder.name}', f'--max_new_tokens={min(max(16, longest), block // 2)}'

    def steps(kind, epochs):
        """Returns flags for so many epochs, or for about 200 seconds on 2 cores."""
        speed = 5000 if small else 1.8e10 / (10.6e6 + 384 * vocab_size)     # tokens per second
        most = 200 * speed / (8 * mean * len(RESPONSES[kind]))
        n = int(max(20, min(epochs * counts[f'train.{kind}'] / 8, most)))
        return f'--batch_size=8 --steps={n} --warmup={n // 10} --eval_every={-(-n // 4)} {new}'
    lines = ['\n# next, at most a few minutes each on 2 cores. DPO needs only SFT, PPO the reward '
             'model too.\n# Better: more --steps in another --out, while the loss on val falls, or '
             'GPT-2 to begin with (tools/README.md).']
    last = ''
    if 'train.sft' in counts:
        last = f'{out}/sft'
        lines.append(f'python train_sft.py --data={folder} --out={out}/sft {shape} --lr=1e-3 '
                     f'--block_size={block} --init_std=0.02 {steps("sft", 30)}')
    if 'train.pairs' in counts:
        last, data = f'{out}/dpo', f'--data={folder} --init={out}/sft'
        lines += [f'python train_rm.py {data} --out={out}/rm --lr=3e-4 '
                  + steps('pairs', 3).removesuffix(f' {new}'),
                  f'python train_ppo.py {data} --reward={out}/rm --out={out}/ppo --lr=1e-4 '
                  f'--value_lr=5e-4 --rollout_size=32 --batch_size=16 '
                  f'--steps={20 if small else 8} --eval_every=4 {new}',
                  f'python train_dpo.py {data} --out={out}/dpo --lr=3e-5 {steps("pairs", 3)}',
                  '# compare the runs that you have made',
                  f'python -m tools.sample {out}/sft {out}/ppo {out}/dpo',
                  f'python -m tools.evaluate {out}/sft {out}/ppo {out}/dpo --judge={out}/rm'
                  + ' --samples=16' * (counts['val.pairs'] < 100)]
    if template == '{}':
        lines.append("# to chat, prepare with a template: --template='user: {}\\nbot:'")
    elif last:
        lines.append(f'python -m tools.sample {last} --chat')
    return lines
