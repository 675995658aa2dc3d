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
import argparse, contextlib, io, json, os, re, shutil, subprocess, sys, tempfile, time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
Mutant = namedtuple('Mutant', 'file name invariants old new')

# By file: name, the invariants that must notice, and code => what replaces it
TABLE = r"""
# prefgpt.py
shift-forgotten I6 I7: return tokens[:, :-1], tokens[:, 1:] => return tokens[:, :-1], tokens[:, :-1]
last-column-one-early I3 I16: * columns).amax(1) => * columns).amax(1).sub(1).clamp(min=0)
mask-one-late I7: [b, len(prompt) - 1:end - 1] = True => [b, len(prompt):end] = True
mask-with-the-prompt I7: [b, len(prompt) - 1:end - 1] = True => [b, :end - 1] = True
mask-without-eos I7: 1:end - 1] = True => 1:max(len(prompt), end - 2)] = True
mask-with-the-pads I7: [b, len(prompt) - 1:end - 1] = True => [b, len(prompt) - 1:] = True
mask-from-token-ids I6 I7: 1:end - 1] = True => 1:] = tokens[b, len(prompt):] != 0
logprobs-of-x I6: model(x)[mask], y[mask] => model(x)[mask], x[mask]
logprobs-without-temperature I6 I14: logits = logits / temperature => pass
sampler-without-temperature I14: torch.float32)) / temperature => torch.float32))
inverse-cdf-from-the-left I14: searchsorted(cdf, u, right=True) => searchsorted(cdf, u)
inverse-cdf-one-late I14: right=True).squeeze(1).clamp => right=True).squeeze(1).add(1).clamp
cdf-not-scaled-to-its-end I14: u[:, None].to(cdf) * cdf[:, -1:] => u[:, None].to(cdf)
numbers-drawn-step-by-step I3: u[rows, lengths], => torch.rand(B, generator=generator),
numbers-of-another-token I3 I4: u[rows, lengths], => u[rows, lengths - 1],
score-one-early I3: last_column(response_mask) + 1 => last_column(response_mask)
score-at-the-right-end I2 I3: (tokens).gather(1, index[:, None]).squeeze(1) => (tokens)[:, -1]
not-causal I2 I24: (q, k, v, is_causal=True) => (q, k, v)
cache-written-one-late I4: :, positions] = => :, (positions + 1).clamp(max=cache.size(3) - 1)] =
decode-mask-one-narrow I4: slots <= positions[:, None] => slots < positions[:, None]
decode-mask-one-wide I5: slots <= positions[:, None] => slots <= positions[:, None] + 1
pads-of-prompts-seen I4: slots <= positions[:, None] => slots <= positions[:, None].clamp(min=4)
last-token-of-another-place I4: tokens[rows, last][:, None] => tokens[rows, last - 1][:, None]
rows-decoded-at-one-position I4:
    seen, last)[:, 0] => seen, (longest + lengths - 1).clamp(max=seen.size(-2) - 1))[:, 0]
eos-does-not-end I4: (token != eos) => (token >= 0)
exact-gelu I24: self.c_fc(x), approximate='tanh' => self.c_fc(x)
post-layernorm I24:
    x + self.attn(self.ln_1(x), cache, place, mask)
    => self.ln_1(x + self.attn(x, cache, place, mask))
last-layernorm-forgotten I24: return self.ln_f(x) => return x
embeddings-tied-one-way I7: dtype), weight, bias) => dtype), weight.detach(), bias)
dropout I13 I21: self.mlp(self.ln_2(x)) => F.dropout(self.mlp(self.ln_2(x)), 0.1, self.training)
rate-of-the-first-group-only I21: in optimizer.param_groups: => in optimizer.param_groups[:1]:
gradient-not-cleared I22: optimizer.zero_grad() => pass
epoch-begun-anew I22: visits[max(0, start - epoch * per_epoch):] => visits
optimizer-not-resumed I22: optimizer.load_state_dict(state) => pass
steps-logged-twice I22: log.truncate(sum(map(len, kept))) => pass
checkpoint-in-place I22: os.replace(temporary, path) => shutil.copyfile(temporary, path)

# data/text.py
eos-dropped I8 I10: + ([] if row.get(f'{key}_cut') else [eos]) => + []
eos-after-a-marked-cut I10: + ([] if row.get(f'{key}_cut') else [eos]) => + [eos]
eos-after-a-cut I10: response[:room] => response[:room - 1] + [eos]
prompt-cut-on-the-right I10: prompt = prompt[-room:] => prompt = prompt[:room]
encoded-together I9: ordinary(row[key]) => ordinary(row['prompt'] + row[key])[len(prompt):]
special-tokens-in-text I9: _ordinary(row['prompt']) => (row['prompt'], allowed_special='all')
equal-texts-and-not-ids-dropped I11:
    responses[0] == responses[1] => row['chosen'] == row['rejected']
eos-looked-for-in-the-prompt I16: response[-1] == tokenizer.eot_token => tokenizer.eot_token in y

# train_sft.py
mean-of-means I12: sum() / response_tokens => sum() / response_mask.sum() * len(x) / len(rows)
mean-over-rows I12: -logprobs.sum() / response_tokens => -logprobs.sum() / len(rows)
mean-over-columns I2: -logprobs.sum() / response_tokens => -logprobs.sum() / y.numel()
clip-in-the-micro-batch I12:
    micro_loss.backward()
    => micro_loss.backward(); torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)

# train_rm.py
sides-swapped I20: (chosen_scores - rejected_scores) => (rejected_scores - chosen_scores)
mean-of-means I12: (losses.sum() / len(indices)) => losses.mean()

# train_dpo.py
mean-for-sum I20: response_mask).sum(1).view => response_mask).sum(1).div(response_mask.sum(1)).view
prompt-counted I20: x, y, response_mask).sum => x, y, response_mask | (x > 0)).sum
reference-added I20: (chosen - ref_chosen) - (rejected => (chosen - ref_chosen) + (rejected
smoothing-without-the-flip I20: logsigmoid(-margins) => logsigmoid(margins)
ipo-target I20: 1 / (2 * beta)) ** 2 => 1 / beta) ** 2
reference-in-another-order I3 I13: out[:, indices] = => out[:, i:i + size] =
reference-computed-again-on-resuming I22:
    (saved[name].to(device) for name in ('ref_train', 'ref_val'))
    => (all_logprobs(model, z, 32, device, autocast) for z in (train, val))
mean-of-means I12: (losses.sum() / len(indices)) => losses.mean()

# train_ppo.py
kl-sign I16 I18: rewards = -beta * => rewards = beta *
score-one-slot-late I16:
    (response_mask)[:, None] => (response_mask)[:, None].add(1).clamp(max=response_mask.size(1) - 1)
gae-carries-on-into-the-prompt I16: advantage) * response_mask[:, t] => advantage)
gae-reads-values-past-the-end I2 I16: values.masked_fill(~response_mask, 0.0) => values + 0.0
gae-without-lambda I16: gamma * gae_lambda * advantage => gamma * advantage
returns-of-the-rewards I16: advantages, advantages + values => advantages, advantages + rewards
whitened-with-the-pads I17: mean = x[mask].mean() => mean = x.mean()
whitened-before-the-returns I16 I17:
    else advantages => else advantages; grid['returns'] = grid['advantages'] + grid['values']
whitened-in-the-minibatch I17: part['advantages'], => whiten(part['advantages'], mask),
variance-of-one-token I17: x[mask].var(correction=0) => x[mask].var()
advantage-sign I7 I23:
    (-advantages * ratio, -advantages * clipped) => (advantages * ratio, advantages * clipped)
clip-min-for-max I7: torch.maximum(-advantages => torch.minimum(-advantages
values-clipped-around-the-return I7: old_values + (values => returns + (values
ema-direction I19: r.lerp_(p, rate) => r.lerp_(p, 1 - rate)
ema-every-optimizer-step I19:
    cfg.grad_clip, step) => cfg.grad_clip, step); update_ema(ref, policy, cfg.ref_ema)
reference-is-the-policy I19:
    ref = load_model(GPT, saved or init, 'ref' if saved else 'policy', device).requires_grad_(False)
    => ref = policy
reference-begun-anew-on-resuming I22: saved or init, 'ref' if saved else => init,
one-trunk-for-policy-and-value I19:
    load_state_dict(source['weights']['reward_model']) => body = policy
shift-of-scores-forgotten I3: response_mask) - source['shift'] => response_mask)
no-eos-score-by-max I16: scores.clamp(max=no_eos_score) => scores.clamp(min=no_eos_score)
ended-responses-capped-too I16:
    torch.where(ended.to(scores.device), scores, scores.clamp(max=no_eos_score))
    => scores.clamp(max=no_eos_score)
rollout-sampled-without-temperature I14: cfg.temperature, generator) => 1.0, generator)
rollout-scored-without-temperature I1: (model, *part, cfg.temperature) => (model, *part)
update-without-temperature I1: part['y'], mask, cfg.temperature) => part['y'], mask)
ratio-to-itself I1: loss(logprobs, part['logprobs'] => loss(logprobs, logprobs.detach()
old-values-of-now I1: value_loss(values, part['values'] => value_loss(values, values.detach()
values-one-column-late I3: or len(mask), grid['x'] => or len(mask), grid['y']
rows-cut-to-the-shortest I7 I12: (grid['mask'][micro]).max() => (grid['mask'][micro]).min()
mean-of-means I12: mask = part['mask'] => mask = part['mask']; response_tokens = mask.sum()
values-of-pads-learned I7: cfg.vf_clip) => cfg.vf_clip); mask = torch.ones_like(mask)
ratios-of-pads-counted I15:
    (far > cfg.clip_eps).sum() / response_tokens => (far > cfg.clip_eps).float().mean()
kl-averaged-over-columns I15: grid['ref_logprobs']).sum(1) => grid['ref_logprobs']).mean(1)
rollouts-drawn-anew-on-resuming I22: step - 1, 'rollout' => step - 1 - log.start, 'rollout'
"""


def parse(table):
    """Returns the mutants of a table; a line that begins with spaces continues the one before."""
    mutants = []
    for entry in re.sub(r'\n {4}', ' ', table.strip()).splitlines():
        if entry.startswith('# '):
            file = entry[2:]
        elif entry:
            head, change = entry.split(': ', 1)
            name, *invariants = head.split()
            old, new = change.split(' => ')
            mutants.append(Mutant(file, f'{Path(file).stem}/{name}', invariants, old, new))
    return mutants


MUTANTS = parse(TABLE)


def mutated(mutant):
    """Returns the file's text with the mutant in it; what it replaces must occur exactly once."""
    text = (TOP / mutant.file).read_text()
    times = text.count(mutant.old)
    assert times == 1, f'{mutant.name}: {mutant.old!r} is {times} times in {mutant.file}'
    return text.replace(mutant.old, mutant.new)


# ----------------------------------------------------------------------------- inside the copy

def take_two_steps(folder):
    """Takes two steps of every stage on a tiny model; raises what they raise."""
    # The copy's, with the mutant
    from conftest import STAGES, known, save_tiny_run, write_toy_data
    data, init = write_toy_data(folder / 'data'), folder / 'init'
    save_tiny_run(init, data)
    options = dict(data=str(data), init=str(init), reward=str(folder / 'rm'), steps=2, batch_size=4,
                   rollout_size=8, max_new_tokens=4, device='cpu')
    for name, module in STAGES.items():
        module.main(module.Config(out=str(folder / name), **known(module.Config, options)))


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
        self.failure = {'test': node.name, 'error': error.exconly().split('\n')[0],
                        'numbers': sorted(numbers_of(node)) if own else []}


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
    Tries one mutant in its own copy. Returns the invariants that noticed it and their test; if it
    was not killed, '' and what happened instead.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / 'copy'
        shutil.copytree(TOP, copy, ignore=shutil.ignore_patterns(
            '.*', 'out', 'toy-*', '*.jsonl', '*.zip', '*.npz'))
        (copy / mutant.file).write_text(mutated(mutant))
        code = f'import mutants; mutants.judge({mutant.invariants}, {folder!r})'
        done = subprocess.run(
            [sys.executable, '-c', code], cwd=copy, text=True, capture_output=True,
            env=os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': f'{copy}:{copy}/tests'})
    if done.returncode:
        return '', f'does not run: {(done.stderr.strip() or "?").splitlines()[-1]}'
    failure = json.loads(done.stdout.splitlines()[-1])
    if not failure:
        return '', 'survived'
    by = ' '.join(number for number in mutant.invariants if number in failure['numbers'])
    return by, failure['test'] if by else f"other failure: {failure['test']}: {failure['error']}"


def main(names, jobs):
    """Prints the table, row by row, and returns how many mutants were not killed."""
    if unknown := set(names) - {mutant.name for mutant in MUTANTS}:
        sys.exit(f'error: no mutant is called {", ".join(sorted(unknown))}')
    mutants = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    began, survivors = time.time(), 0
    width = max(len(mutant.name) for mutant in mutants)
    print(f'{"mutant":<{width}}  killed by   test')
    with ThreadPoolExecutor(jobs) as pool:
        for mutant, (by, test) in zip(mutants, pool.map(check, mutants)):
            survivors += not by
            print(f'{mutant.name:<{width}}  {by or "NOT KILLED":<10}  {test}', flush=True)
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
