"""
Plants one-line mistakes, each in its own copy of the project, and checks that tests notice (I25).

    python tests/mutants.py                             # all of them, two at a time: minutes
    python tests/mutants.py prefgpt/shift-forgotten     # some of them

In each copy every stage must still take two steps: a mutant that crashes proves nothing. Then the
invariants run, the core's tests whose docstrings have a number I1 to I24, those named with the
mutant first, until one fails. The mutant is killed if that one is among the named ones and failed
by an assertion of its own. Prints a table; the exit status is 1 if a mutant is not killed.
Left out: several mistakes at once, mistakes in tools or tests, and mistakes without effect (a mask
that is applied a second time).
"""
import argparse
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
Mutant = namedtuple('Mutant', 'file name invariants line replacement')

# Each block: file, name, the invariants that must notice; the line before, and what replaces it.
# The - or + is in place of the first space. Comments after a line do not count
MUTANTS = r'''
prefgpt.py shift-forgotten I6 I7
-   return tokens[:, :-1], tokens[:, 1:]
+   return tokens[:, :-1], tokens[:, :-1]

prefgpt.py last-column-one-early I3 I16
-   return (response_mask * columns).amax(1)
+   return (response_mask * columns).amax(1).sub(1).clamp(min=0)

prefgpt.py mask-one-late I7
-       response_mask[b, len(prompt) - 1:end - 1] = True
+       response_mask[b, len(prompt):end] = True

prefgpt.py mask-with-the-prompt I7
-       response_mask[b, len(prompt) - 1:end - 1] = True
+       response_mask[b, :end - 1] = True

prefgpt.py mask-without-eos I7
-       response_mask[b, len(prompt) - 1:end - 1] = True
+       response_mask[b, len(prompt) - 1:max(len(prompt), end - 2)] = True

prefgpt.py mask-with-the-pads I7
-       response_mask[b, len(prompt) - 1:end - 1] = True
+       response_mask[b, len(prompt) - 1:] = True

prefgpt.py mask-from-token-ids I6 I7
-       response_mask[b, len(prompt) - 1:end - 1] = True
+       response_mask[b, len(prompt) - 1:] = tokens[b, len(prompt):] != 0

prefgpt.py logprobs-of-x I6
-   hidden, targets = model(x)[mask], y[mask]
+   hidden, targets = model(x)[mask], x[mask]

prefgpt.py logprobs-without-temperature I6 I14
-           logits = logits / temperature
+           pass

prefgpt.py sampler-without-temperature I14
-   logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
+   logits = logits.to(torch.promote_types(logits.dtype, torch.float32))

prefgpt.py inverse-cdf-from-the-left I14
-   return torch.searchsorted(cdf, u, right=True).squeeze(1).clamp(max=cdf.size(1) - 1)
+   return torch.searchsorted(cdf, u).squeeze(1).clamp(max=cdf.size(1) - 1)

prefgpt.py inverse-cdf-one-late I14
-   return torch.searchsorted(cdf, u, right=True).squeeze(1).clamp(max=cdf.size(1) - 1)
+   return (torch.searchsorted(cdf, u, right=True).squeeze(1) + 1).clamp(max=cdf.size(1) - 1)

prefgpt.py cdf-not-scaled-to-its-end I14
-   u = u[:, None].to(cdf) * cdf[:, -1:]
+   u = u[:, None].to(cdf)

prefgpt.py numbers-drawn-step-by-step I3
-       token = draw(policy.logits(hidden), u[:, t], temperature)
+       token = draw(policy.logits(hidden), torch.rand(B, generator=generator), temperature)

prefgpt.py score-one-early I3
-   index = last_column(response_mask) + 1
+   index = last_column(response_mask)

prefgpt.py score-at-the-right-end I2 I3
-   return model(tokens).gather(1, index[:, None]).squeeze(1)
+   return model(tokens)[:, -1]

prefgpt.py not-causal I2 I24
-           out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
+           out = F.scaled_dot_product_attention(q, k, v)

prefgpt.py cache-written-one-late I4
-           cache[:, rows, :, positions] = qkv[:, 0, 1:]
+           cache[:, rows, :, (positions + 1).clamp(max=cache.size(3) - 1)] = qkv[:, 0, 1:]

prefgpt.py decode-mask-one-narrow I4
-           visible = (slots <= positions[:, None])[:, None, None]
+           visible = (slots < positions[:, None])[:, None, None]

prefgpt.py decode-mask-one-wide I5
-           visible = (slots <= positions[:, None])[:, None, None]
+           visible = (slots <= positions[:, None] + 1)[:, None, None]

prefgpt.py pads-of-prompts-seen I4
-           visible = (slots <= positions[:, None])[:, None, None]
+           visible = (slots <= positions.max())[None, None, None]

prefgpt.py pads-of-prompts-answered I4
-   hidden = policy.forward(tokens[:, :longest], cache)[rows, starts - 1]
+   hidden = policy.forward(tokens[:, :longest], cache)[:, -1]

prefgpt.py rows-decoded-at-one-position I4
-       hidden = policy.forward(token[:, None], seen, starts + t)[:, 0]
+       hidden = policy.forward(token[:, None], seen, starts * 0 + longest + t)[:, 0]

prefgpt.py eos-does-not-end I4
-       running = running & (token != eos)
+       running = running & (token >= 0)

prefgpt.py exact-gelu I24
-       return self.c_proj(F.gelu(self.c_fc(x), approximate='tanh'))
+       return self.c_proj(F.gelu(self.c_fc(x)))

prefgpt.py post-layernorm I24
-       x = x + self.attn(self.ln_1(x), cache, positions, visible)
+       x = self.ln_1(x + self.attn(x, cache, positions, visible))

prefgpt.py last-layernorm-forgotten I24
-       return self.ln_f(x)
+       return x

prefgpt.py embeddings-tied-one-way I7
-           return F.linear(hidden.to(self.wte.weight.dtype), self.wte.weight)
+           return F.linear(hidden.to(self.wte.weight.dtype), self.wte.weight.detach())

prefgpt.py dropout I13 I21
-       return x + self.mlp(self.ln_2(x))
+       return x + F.dropout(self.mlp(self.ln_2(x)), 0.1, self.training)

data/text.py eos-dropped I8 I10
-                    + ([] if row.get(f'{key}_cut') else [eos]) for key in RESPONSES[kind]]
+                    + [] for key in RESPONSES[kind]]

data/text.py eos-after-a-marked-cut I10
-                    + ([] if row.get(f'{key}_cut') else [eos]) for key in RESPONSES[kind]]
+                    + [eos] for key in RESPONSES[kind]]

data/text.py eos-after-a-cut I10
-       responses = [response[:room] for response in responses]
+       responses = [response[:room - 1] + [eos] for response in responses]

data/text.py prompt-cut-on-the-right I10
-       prompt = prompt[-room:]
+       prompt = prompt[:room]

data/text.py encoded-together I9
-       responses = [tokenizer.encode_ordinary(row[key])
+       responses = [tokenizer.encode_ordinary(row['prompt'] + row[key])[len(prompt):]

data/text.py special-tokens-in-text I9
-       prompt = tokenizer.encode_ordinary(row['prompt']) or [eos]
+       prompt = tokenizer.encode(row['prompt'], allowed_special='all') or [eos]

data/text.py equal-texts-and-not-ids-dropped I11
-       if kind == 'pairs' and responses[0] == responses[1]:
+       if kind == 'pairs' and row['chosen'] == row['rejected']:

data/text.py eos-looked-for-in-the-prompt I16
-       ended.append(response[-1] == tokenizer.eot_token)
+       ended.append(tokenizer.eot_token in y)

prefgpt.py rate-of-the-first-group-only I21
-   for group in optimizer.param_groups:
+   for group in optimizer.param_groups[:1]:

prefgpt.py gradient-not-cleared I22
-   optimizer.zero_grad()
+   pass

prefgpt.py epoch-begun-anew I22
-       for i in visits[max(0, start - epoch * per_epoch):]:
+       for i in visits:

prefgpt.py optimizer-not-resumed I22
-       optimizer.load_state_dict(state)
+       pass

prefgpt.py steps-logged-twice I22
-       kept = [line for line in lines if line.endswith('\n') and json.loads(line)['step'] <= start]
+       kept = [line for line in lines if line.endswith('\n')]

prefgpt.py checkpoint-in-place I22
-       os.replace(temporary, path)
+       shutil.copyfile(temporary, path)

train_sft.py mean-of-means I12
-           micro_loss = -logprobs.sum() / response_tokens
+           micro_loss = -logprobs.sum() / response_mask.sum() * len(x) / len(rows)

train_sft.py mean-over-rows I12
-           micro_loss = -logprobs.sum() / response_tokens
+           micro_loss = -logprobs.sum() / len(rows)

train_sft.py mean-over-columns I2
-           micro_loss = -logprobs.sum() / response_tokens
+           micro_loss = -logprobs.sum() / y.numel()

train_sft.py clip-in-the-micro-batch I12
-           micro_loss.backward()
+           micro_loss.backward()
+           torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)

train_rm.py sides-swapped I20
-   return -F.logsigmoid(chosen_scores - rejected_scores)
+   return -F.logsigmoid(rejected_scores - chosen_scores)

train_rm.py mean-of-means I12
-           (losses.sum() / len(indices)).backward()
+           losses.mean().backward()

train_dpo.py mean-for-sum I20
-   return token_logprobs(policy, x, y, response_mask).sum(1).view(2, -1)
+   return (token_logprobs(policy, x, y, response_mask).sum(1) / response_mask.sum(1)).view(2, -1)

train_dpo.py prompt-counted I20
-   return token_logprobs(policy, x, y, response_mask).sum(1).view(2, -1)
+   return token_logprobs(policy, x, y, response_mask | (x > 0)).sum(1).view(2, -1)

train_dpo.py reference-added I20
-   return (chosen - ref_chosen) - (rejected - ref_rejected)
+   return (chosen - ref_chosen) + (rejected - ref_rejected)

train_dpo.py smoothing-without-the-flip I20
-           - label_smoothing * F.logsigmoid(-margins))
+           - label_smoothing * F.logsigmoid(margins))

train_dpo.py ipo-target I20
-   return (log_ratio(chosen, rejected, ref_chosen, ref_rejected) - 1 / (2 * beta)) ** 2
+   return (log_ratio(chosen, rejected, ref_chosen, ref_rejected) - 1 / beta) ** 2

train_dpo.py reference-in-another-order I3 I13
-           out[:, indices] = pair_logprobs(policy, [pairs[j] for j in indices], device)
+           out[:, i:i + size] = pair_logprobs(policy, [pairs[j] for j in indices], device)

train_dpo.py reference-computed-again-on-resuming I22
-       ref_train, ref_val = (saved[name].to(device) for name in ('ref_train', 'ref_val'))
+       ref_train, ref_val = (all_logprobs(model, z, 32, device, autocast) for z in (train, val))

train_dpo.py mean-of-means I12
-           (losses.sum() / len(indices)).backward()
+           losses.mean().backward()

train_ppo.py kl-sign I16 I18
-   rewards = -beta * (logprobs - ref_logprobs)
+   rewards = beta * (logprobs - ref_logprobs)

train_ppo.py score-one-slot-late I16
-   column = last_column(response_mask)[:, None]
+   column = last_column(response_mask)[:, None].add(1).clamp(max=response_mask.size(1) - 1)

train_ppo.py gae-carries-on-into-the-prompt I16
-       advantage = (delta + gamma * gae_lambda * advantage) * response_mask[:, t]
+       advantage = delta + gamma * gae_lambda * advantage

train_ppo.py gae-reads-values-past-the-end I2 I16
-   values = values.masked_fill(~response_mask, 0.0)
+   values = values + 0.0

train_ppo.py gae-without-lambda I16
-       advantage = (delta + gamma * gae_lambda * advantage) * response_mask[:, t]
+       advantage = (delta + gamma * advantage) * response_mask[:, t]

train_ppo.py returns-of-the-rewards I16
-   return advantages, advantages + values
+   return advantages, advantages + rewards

train_ppo.py whitened-with-the-pads I17
-   mean = x[mask].mean()
+   mean = x.mean()

train_ppo.py whitened-before-the-returns I16 I17
-       grid['advantages'] = whiten(advantages, mask) if cfg.whiten else advantages
+       grid['advantages'] = whiten(advantages, mask) if cfg.whiten else advantages
+       grid['returns'] = grid['advantages'] + grid['values']

train_ppo.py whitened-in-the-minibatch I17
-       losses, ratio = policy_loss(logprobs, part['logprobs'], part['advantages'], cfg.clip_eps)
+       losses, ratio = policy_loss(logprobs, part['logprobs'], whiten(part['advantages'], mask),
+                                   cfg.clip_eps)

train_ppo.py variance-of-one-token I17
-   variance = x[mask].var(correction=0)
+   variance = x[mask].var()

train_ppo.py advantage-sign I7 I23
-   return torch.maximum(-advantages * ratio, -advantages * clipped), ratio
+   return torch.maximum(advantages * ratio, advantages * clipped), ratio

train_ppo.py clip-min-for-max I7
-   return torch.maximum(-advantages * ratio, -advantages * clipped), ratio
+   return torch.minimum(-advantages * ratio, -advantages * clipped), ratio

train_ppo.py values-clipped-around-the-return I7
-       clipped = old_values + (values - old_values).clamp(-vf_clip, vf_clip)
+       clipped = returns + (values - old_values).clamp(-vf_clip, vf_clip)

train_ppo.py ema-direction I19
-       r.lerp_(p, rate)
+       r.lerp_(p, 1 - rate)

train_ppo.py ema-every-optimizer-step I19
-               optimizer_step(value_optimizer, value_model, value_lr, cfg.grad_clip, step)
+               optimizer_step(value_optimizer, value_model, value_lr, cfg.grad_clip, step)
+               update_ema(ref, policy, cfg.ref_ema)

train_ppo.py reference-is-the-policy I19
-   ref = load_model(GPT, saved or init, 'ref' if saved else 'policy', device).requires_grad_(False)
+   ref = policy

train_ppo.py reference-begun-anew-on-resuming I22
-   ref = load_model(GPT, saved or init, 'ref' if saved else 'policy', device).requires_grad_(False)
+   ref = load_model(GPT, init, 'policy', device).requires_grad_(False)

train_ppo.py one-trunk-for-policy-and-value I19
-       value_model.load_state_dict(source['weights']['reward_model'])
+       value_model.body = policy

train_ppo.py shift-of-scores-forgotten I3
-                         response_mask) - source['shift']
+                         response_mask)

train_ppo.py no-eos-score-by-max I16
-   return torch.where(ended.to(scores.device), scores, scores.clamp(max=no_eos_score))
+   return torch.where(ended.to(scores.device), scores, scores.clamp(min=no_eos_score))

train_ppo.py ended-responses-capped-too I16
-   return torch.where(ended.to(scores.device), scores, scores.clamp(max=no_eos_score))
+   return scores.clamp(max=no_eos_score)

train_ppo.py rollout-sampled-without-temperature I14
-                           cfg.temperature, generator)
+                           1.0, generator)

train_ppo.py rollout-scored-without-temperature I1
-       grid[name] = in_parts(lambda *part: token_logprobs(model, *part, cfg.temperature),
+       grid[name] = in_parts(lambda *part: token_logprobs(model, *part),

train_ppo.py update-without-temperature I1
-           logprobs = token_logprobs(policy, part['x'], part['y'], mask, cfg.temperature)
+           logprobs = token_logprobs(policy, part['x'], part['y'], mask)

train_ppo.py ratio-to-itself I1
-       losses, ratio = policy_loss(logprobs, part['logprobs'], part['advantages'], cfg.clip_eps)
+       losses, ratio = policy_loss(logprobs, logprobs.detach(), part['advantages'], cfg.clip_eps)

train_ppo.py old-values-of-now I1
-       losses = value_loss(values, part['values'], part['returns'], cfg.vf_clip)
+       losses = value_loss(values, values.detach(), part['returns'], cfg.vf_clip)

train_ppo.py values-one-column-late I3
-           grid['values'] = in_parts(value_model, cfg.micro_batch_size or len(mask), grid['x'])
+           grid['values'] = in_parts(value_model, cfg.micro_batch_size or len(mask), grid['y'])

train_ppo.py rows-cut-to-the-shortest I7 I12
-       width = int(last_column(grid['mask'][micro]).max()) + 1
+       width = int(last_column(grid['mask'][micro]).min()) + 1

train_ppo.py mean-of-means I12
-       mask = part['mask']
+       mask = part['mask']
+       response_tokens = mask.sum()

train_ppo.py values-of-pads-learned I7
-       losses = value_loss(values, part['values'], part['returns'], cfg.vf_clip)
+       losses = value_loss(values, part['values'], part['returns'], cfg.vf_clip)
+       mask = torch.ones_like(mask)

train_ppo.py ratios-of-pads-counted I15
-       ratios.append(ratio[mask].detach())
+       ratios.append(ratio.flatten().detach())

train_ppo.py kl-averaged-over-columns I15
-           'kl': ((grid['logprobs'] - grid['ref_logprobs']).sum() / B).item(),
+           'kl': (grid['logprobs'] - grid['ref_logprobs']).mean().item(),

train_ppo.py rollouts-drawn-anew-on-resuming I22
-                                            tokenizer, cfg, rng(cfg.seed, step - 1, 'rollout'))
+                                            tokenizer, cfg,
+                                            rng(cfg.seed, step - 1 - start, 'rollout'))
'''


def parse(text):
    """Returns the mutants of a text of blocks."""
    mutants = []
    for block in text.strip().split('\n\n'):
        head, line, *replacement = block.split('\n')
        file, name, *invariants = head.split()
        assert line[0] == '-' and all(new[0] == '+' for new in replacement), head
        mutants.append(Mutant(file, f'{Path(file).stem}/{name}', invariants, ' ' + line[1:],
                              '\n'.join(' ' + new[1:] for new in replacement)))
    return mutants


def code(line):
    """Returns a line without the comment after it."""
    return re.sub(r' +# .*', '', line)


def mutated(mutant):
    """Returns the file's text with the mutant in it; its line must occur exactly once."""
    lines = (TOP / mutant.file).read_text().split('\n')
    found = [i for i, line in enumerate(lines) if code(line) == code(mutant.line)]
    assert len(found) == 1, f'{mutant.name}: its line is {len(found)} times in {mutant.file}'
    lines[found[0]] = mutant.replacement
    return '\n'.join(lines)


# ----------------------------------------------------------------------------- inside the copy

def take_two_steps(folder):
    """Takes two steps of every stage on a tiny model; raises what they raise."""
    from conftest import STAGES, save_tiny_run, write_toy_data      # the copy's, with the mutant
    data, init, rm = write_toy_data(folder / 'data'), folder / 'init', str(folder / 'rm')
    save_tiny_run(init, data)
    for name, module in STAGES.items():
        own = {'rm': {}, 'ppo': dict(max_new_tokens=4, reward=rm, rollout_size=8)}
        module.main(module.Config(
            data=str(data), init=str(init), out=str(folder / name), steps=2, batch_size=4,
            device='cpu', **own.get(name, dict(max_new_tokens=4))))


def numbers_of(item):
    """Returns the invariants that a collected test names in its docstring."""
    return set(re.findall(r'\bI\d+\b', item.function.__doc__ or ''))


class Judge:
    """Makes pytest run the invariants alone, the expected ones first, and notes what fails."""

    def __init__(self, expected):
        self.expected, self.failure = set(expected), {}

    def pytest_collection_modifyitems(self, items):
        # Among the expected ones, those without a trained model come first: they are quick
        items[:] = sorted(filter(numbers_of, items), key=lambda item: (
            not numbers_of(item) & self.expected, 'sft_run' in item.fixturenames))

    def pytest_exception_interact(self, node, call):
        error, here = call.excinfo, [entry.path for entry in call.excinfo.traceback
                                     if TOP in Path(entry.path).parents]
        # The test's own assertion: not one of a fixture, and none of those in prefgpt.py
        own = (call.when == 'call' and here[-1].parent.name == 'tests'
               and isinstance(error.value, (AssertionError, pytest.fail.Exception)))
        self.failure = {'test': node.name, 'own': own, 'error': error.exconly().split('\n')[0],
                        'numbers': sorted(numbers_of(node)) if call.when == 'call' else []}


def judge(expected, folder):
    """Prints the first invariant that failed as JSON, an empty object if none did."""
    with contextlib.redirect_stdout(io.StringIO()):
        take_two_steps(Path(folder) / 'two_steps')
    plugin = Judge(expected)
    files = [str(path) for path in sorted((TOP / 'tests').glob('test_*.py'))
             if path.stem != 'test_mutants']
    status = pytest.main(['-x', '-q', '--tb=short', '-p', 'no:cacheprovider',
                          f'--basetemp={folder}/pytest', *files], plugins=[plugin])
    assert plugin.failure or status == 0, status
    print('\n' + json.dumps(plugin.failure))


# ----------------------------------------------------------------------------- outside

def check(mutant):
    """
    Tries one mutant in its own copy. Returns (killed, by, test, seconds): the invariants that
    noticed and the test, or what happened instead.
    """
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / 'copy'
        shutil.copytree(TOP, copy, ignore=shutil.ignore_patterns(
            '.*', 'out', 'toy-*', '*.jsonl', '*.zip', '*.npz'))
        (copy / mutant.file).write_text(mutated(mutant))
        code = f'import mutants; mutants.judge({mutant.invariants}, {folder!r})'
        done = subprocess.run([sys.executable, '-c', code], cwd=copy, text=True,
                              capture_output=True, env={
                                  **os.environ, 'OMP_NUM_THREADS': '1',
                                  'PYTHONPATH': f'{copy}{os.pathsep}{copy}/tests'})
    seconds = time.time() - began
    if done.returncode:
        return False, '', f'does not run: {(done.stderr.strip() or "?").splitlines()[-1]}', seconds
    failure = json.loads(done.stdout.splitlines()[-1])
    if not failure:
        return False, '', 'survived', seconds
    by = [number for number in mutant.invariants if number in failure['numbers']]
    if not failure['own'] or not by:
        return False, ' '.join(failure['numbers']), (
            f"not killed as it should be: {failure['test']}: {failure['error']}"), seconds
    return True, ' '.join(by), failure['test'], seconds


def main(names, jobs):
    """Prints the table, row by row, and returns how many mutants were not killed."""
    mutants = parse(MUTANTS)
    unknown = set(names) - {mutant.name for mutant in mutants}
    if unknown:
        sys.exit(f'error: no mutant is called {", ".join(sorted(unknown))}')
    mutants = [mutant for mutant in mutants if not names or mutant.name in names]
    began, survivors = time.time(), 0
    width = max(len(mutant.name) for mutant in mutants)
    print(f'{"mutant":<{width}}  killed by   seconds  test')
    with ThreadPoolExecutor(jobs) as pool:
        for mutant, (killed, by, test, seconds) in zip(mutants, pool.map(check, mutants)):
            survivors += not killed
            print(f'{mutant.name:<{width}}  {by if killed else "NOT KILLED":<10}  {seconds:>7.1f}  '
                  f'{test}', flush=True)
    print(f'{len(mutants) - survivors} of {len(mutants)} mutants killed, '
          f'{(time.time() - began) / 60:.1f} minutes')
    return survivors


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='mutants to try; none: all')
    parser.add_argument('--jobs', type=int, default=2, help='mutants tried at once [2]')
    arguments = parser.parse_args()
    sys.exit(main(arguments.names, arguments.jobs) > 0)
