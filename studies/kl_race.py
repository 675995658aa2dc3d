"""
Forward against reverse KL on the way to one target, and when DPO lowers the chosen response too.

Tajwar et al. 2024, section 6. On-policy RL descends the reverse KL to its optimum, imitation of
good samples the forward one: (A) to (C) race them. Then pairs: when DPO lowers both responses.

    p = softmax(theta), target q, plain descent: the gradients in theta are
    p - q of KL(q||p), forward, and p (log(p / q) - KL(p||q)) of KL(p||q), reverse.
    A step changes log(p_i / p_j) by exactly lr (g_j - g_i), g the gradient, so that
    (A) from p_i = p_j reverse's change is p_i log(q_i / q_j) / (q_i - q_j) times forward's: it is
        ahead where the bins are likelier than the q's logarithmic mean, behind where rarer;
    (B) if q_i = q_j forward closes the gap; reverse widens it where p (log(q / p) + KL) still
        rises in p, that is below q exp(KL - 1): far from the target only.
    log pi = log ref + phi theta - log Z, and one pair: DPO moves theta along phi_w - phi_l, so
    log pi(w) falls at once if and only if (phi_w - E_pi phi) (phi_w - phi_l) < 0; it is concave
    along that line, so it then keeps falling. With a parameter per response it always rises.

Exact gradients, nothing sampled. Seed 0 has the cases as they are written here, other seeds move
each probability by a factor exp(0.2 z).

    python -m studies.kl_race
    near-duplicates: DPO lowers both, SFT raises both: holds in 10 of 10 seeds
"""
from dataclasses import dataclass

import torch

from prefgpt import rng, run_cli
from studies.style import BARS, COLORS, GREY, POINTS, frame, names, new_figure, show_picture
from studies.table import (above, by_seed, complete, select, show_claims, show_means, spreads_by,
                           table_and_seeds)
from train_dpo import dpo_loss


@dataclass
class Config:
    seeds: str = '0 1 2 3 4 5 6 7 8 9'      # the seeds to run, or to complete
    csv: str = 'out/studies/kl_race.csv'    # for seeds that studies/results/kl_race.csv lacks
    results: bool = False           # add them to studies/results/kl_race.csv, and draw its picture
    quick: bool = False             # a smoke test: the first seed, a table of its own


BETA, WAYS, METHODS = 0.1, ('forward', 'reverse'), ('DPO', 'SFT')
RACES = {           # start p, target q; in A p_1 = p_2, in B q_1 = q_2
    'A, likely': ((.45, .45, .05, .05), (.88, .02, .05, .05)),
    'A, rare': ((.10, .10, .40, .40), (.88, .02, .05, .05)),
    'B, far': ((.10, .02, .44, .44), (.45, .45, .05, .05)),
    'B, near': ((.40, .30, .15, .15), (.45, .45, .05, .05))}
TRIPLES = {         # ref, and a row of features for each of chosen, rejected, other
    'distinct': ((.2, .2, .6), ((1, 0, 0), (0, 1, 0), (0, 0, 1))),
    'near-duplicates': ((.2, .2, .6), ((1, .2), (1, -.2), (0, 1))),
    'likely duplicates': ((.48, .48, .04), ((1, .2), (1, -.2), (0, 1)))}
PAIRS, RESPONSES = 32, 8                    # the map: prompts with a pair each; responses to each
DISTANCES = (0.1, 0.2, 0.5, 1.0, 1.4)       # |phi_w - phi_l|; random ones are 1.4 apart
WIDTHS = (8, 32, 128, 512)                  # features, and parameters; 512: more than responses
NUMBERS = ('p1', 'ratio', 'off', 'mean', 'sd', 'chosen', 'rejected', 'other', 'fell')
PANELS = {          # of the picture: title, what its y axis shows, its x axis
    'A': ('(A) two equal bins', 'probability of the better one', 'steps'),
    'B': ('(B) two bins that must grow', 'probability of bin 1 / of bin 2', 'steps'),
    'C': ('(C) one Gaussian for two modes', 'probability of a bin', 'bin'),
    'triples': ('three responses after 100 steps', '', 'log pi / ref, nats'),
    'map': ('chosen responses that DPO lowers', 'share of pairs',
            'distance of chosen and rejected features')}


def gradient(p, q, way):
    """Returns (K,), d KL / d theta at p = softmax(theta): forward KL(q||p), reverse KL(p||q)."""
    log_ratio = (p / q).log()
    return p - q if way == 'forward' else p * (log_ratio - (p * log_ratio).sum())


def race(p, q, way, steps, lr=1.0):
    """Returns the probabilities (steps + 1, K) on the way from p towards q."""
    path = [p]
    for _ in range(steps):
        path.append((path[-1].log() - lr * gradient(path[-1], q, way)).softmax(0))
    return torch.stack(path)


def nudge(probs, seed, number=0):
    """Multiplies probs (K,) by exp(0.2 z), equal ones by the same z; seed 0 changes nothing."""
    logits, which = torch.tensor(probs, dtype=torch.float64).log().unique(return_inverse=True)
    z = torch.randn(len(logits), generator=rng(seed, number, 'batch'), dtype=torch.float64)
    return (logits + (0.2 if seed else 0) * z)[which].softmax(0)


def gaussian(mean, sd):
    """Returns probabilities (..., 100) of a discretized Gaussian, the restricted family of (C)."""
    return (-(torch.arange(100, dtype=torch.float64) - mean) ** 2 / (2 * sd ** 2)).softmax(-1)


def two_modes(seed):
    """Returns a target (100,): sd 5 around 20 and around 70, 1.3 times as much there."""
    return nudge((1 / 2.3, 1.3 / 2.3), seed, 2) @ gaussian(torch.tensor([[20], [70]]), 5)


def best_gaussian(q, way):
    """Returns (mean, sd), whole numbers, of the Gaussian nearest to q, forward or reverse."""
    p = gaussian(torch.arange(100)[:, None, None], torch.arange(1, 61)[:, None])    # (100, 60, 100)
    # A narrow one's tails are 0 in float64: KL(q||p) is infinite then, and 0 log 0 is 0
    kl = q * (q / p).log() if way == 'forward' else torch.xlogy(p, p / q)
    mean, sd = divmod(kl.sum(-1).argmin().item(), 60)
    return mean, sd + 1


def descend(method, ref, features, lr, steps=100):
    """Returns log pi / ref (N, K) after DPO on response 0, chosen, and 1, rejected, or SFT on 0."""
    theta = torch.zeros(features.shape[-1], dtype=torch.float64, requires_grad=True)    # (d,)
    for _ in range(steps):
        chosen, rejected = (ref + features @ theta).log_softmax(1).T[:2]                # (N,) each
        losses = -chosen if method == 'SFT' else dpo_loss(chosen, rejected, *ref.T[:2], BETA)
        slope, = torch.autograd.grad(losses.mean(), theta)
        theta = (theta - lr * slope).detach().requires_grad_()
    return ((ref + features @ theta).log_softmax(1) - ref).detach()


def draw_pairs(seed, distance, width):
    """Draws ref (N, K) and features (N, K, d), random but for chosen's distance to rejected."""
    z = torch.randn(PAIRS, RESPONSES, 1 + width, generator=rng(seed, 0, 'shuffle')).double()
    ref, features = z[..., 0].log_softmax(1), torch.nn.functional.normalize(z[..., 1:], dim=-1)
    shared, apart = features[:, :2].clone().unbind(1)                                   # (N, d)
    features[:, 0], features[:, 1] = shared + distance / 2 * apart, shared - distance / 2 * apart
    return ref, features


def run_seed(seed):
    """Returns the rows of races, Gaussians, triples and the map; '' where a number is missing."""
    rows = []

    def add(setting, method, step, **numbers):
        rows.append({'seed': seed, 'setting': setting, 'method': method, 'step': step,
                     **dict.fromkeys(NUMBERS, ''), **numbers,
                     'command': f'python -m studies.kl_race --seeds={seed}'})
    for way in WAYS:
        for setting, (start, target) in RACES.items():
            p, q = nudge(start, seed, 0), nudge(target, seed, 1)
            path = race(p, q, way, 200)
            for step in (0, 1, 2, 10, 200):
                add(setting, way, step, p1=path[step, 0].item(),
                    ratio=(path[step, 0] / path[step, 1]).item(),
                    off=(path[step] - q).abs().max().item())
        add('C', way, '', **dict(zip(('mean', 'sd'), best_gaussian(two_modes(seed), way))))
    worlds = [(setting, nudge(probs, seed, 3).log()[None],                              # (1, 3)
               torch.tensor([features], dtype=torch.float64), 1.0)                      # (1, 3, d)
              for setting, (probs, features) in TRIPLES.items()]
    # At this rate a pair on its own gains as much margin whatever its distance
    worlds += [(f'{width} x {distance}', *draw_pairs(seed, distance, width),
                0.1 * PAIRS / (BETA * distance ** 2)) for width in WIDTHS for distance in DISTANCES]
    for setting, ref, features, lr in worlds:
        for method, rate in (('DPO', lr), ('SFT', 0.05 * len(ref))):
            moved = descend(method, ref, features, rate)                                # (N, K)
            add(setting, method, 100, fell=(moved[:, 0] < 0).double().mean().item(),
                **dict(zip(('chosen', 'rejected', 'other'), moved.mean(0).tolist())))
    return rows


# Of the rows of one seed, r[setting, method, step]: claim -> whether it holds
CHECKS = {
    '(A) 1 and 2 steps: reverse is ahead with likely bins, behind with rare ones': lambda r: all(
        r['A, likely', 'reverse', t]['p1'] > r['A, likely', 'forward', t]['p1']
        and r['A, rare', 'reverse', t]['p1'] < r['A, rare', 'forward', t]['p1'] for t in (1, 2)),
    '(B) far, 10 steps: reverse has widened the gap, forward is below 1.5': lambda r: (
        r['B, far', 'reverse', 10]['ratio'] > r['B, far', 'reverse', 0]['ratio']
        and r['B, far', 'forward', 10]['ratio'] < 1.5),
    '(B) near: a step of either narrows the gap': lambda r: all(
        abs(r['B, near', w, 1]['ratio'] - 1) < abs(r['B, near', w, 0]['ratio'] - 1) for w in WAYS),
    '(A), (B), 200 steps: all are within 0.01 of the target': lambda r: all(
        r[setting, way, 200]['off'] < 0.01 for setting in RACES for way in WAYS),
    '(C) the forward Gaussian has sd > 25, the reverse one sd < 8': lambda r: (
        r['C', 'forward', '']['sd'] > 25 and r['C', 'reverse', '']['sd'] < 8),
    'distinct: DPO and SFT raise the chosen, lower the rejected': lambda r: all(
        r['distinct', m, 100]['chosen'] > 0 > r['distinct', m, 100]['rejected'] for m in METHODS),
    'near-duplicates: DPO lowers both, SFT raises both': lambda r: all(
        r['near-duplicates', 'DPO', 100][side] < 0 < r['near-duplicates', 'SFT', 100][side]
        for side in ('chosen', 'rejected')),
    'likely duplicates: DPO raises the chosen':
        lambda r: r['likely duplicates', 'DPO', 100]['chosen'] > 0,
    'map: DPO lowers more of the nearest than of the farthest, at any width': lambda r: all(
        r[f'{w} x 0.1', 'DPO', 100]['fell'] > r[f'{w} x 1.4', 'DPO', 100]['fell'] for w in WIDTHS),
    'map: of the farthest it lowers more with 8 features than with 512':
        above('fell', ('8 x 1.4', 'DPO', 100), ('512 x 1.4', 'DPO', 100)),
    'map: of the nearest it lowers most, even with 512 features':
        lambda r: r['512 x 0.1', 'DPO', 100]['fell'] > 0.5}


def draw(rows):
    """Draws the picture: the cases as they are written (seed 0's) above, displacement below."""
    figure = new_figure(12, 8)
    axes = figure.subplot_mosaic([['A', 'B', 'C'], ['triples', 'triples', 'map']])
    for way, color in zip(WAYS, COLORS):
        for setting, dash in zip(RACES, ('-', '--', '-', '--')):
            path = race(*(nudge(probs, 0) for probs in RACES[setting]), way, 30)
            ax, below = (axes['A'], 1) if setting[0] == 'A' else (axes['B'], path[:, 1])
            ax.plot(path[:, 0] / below, color=color, ls=dash, label=f'{way}, {setting[3:]}')
        axes['C'].plot(gaussian(*best_gaussian(two_modes(0), way)), color=color, label=way)
    axes['C'].fill_between(range(100), two_modes(0), color=GREY, alpha=0.3, lw=0, label='target')
    axes['B'].set(yscale='log', yticks=(1, 2, 5, 10), yticklabels=(1, 2, 5, 10))
    axes['B'].minorticks_off()
    arms = [(setting, method) for setting in TRIPLES for method in METHODS]
    some = [{**row, 'arm': (setting, method)} for setting, method in arms
            for row in select(rows, setting=setting, method=method)]
    for i, name in enumerate(('chosen', 'rejected', 'other')):
        _, means, spreads = spreads_by(some, 'arm', name)
        axes['triples'].barh([y + (i - 1) / 4 for y in range(6)], means, 0.25, xerr=spreads,
                             color=(*COLORS[2:4], GREY)[i], label=name, **BARS)
    axes['triples'].set_yticks(range(6), map('\n'.join, arms))
    axes['triples'].axvline(0, color=GREY, lw=0.8)
    axes['triples'].invert_yaxis()
    for width, color in zip(WIDTHS, COLORS):
        some = [row for distance in DISTANCES
                for row in select(rows, setting=f'{width} x {distance}', method='DPO')]
        axes['map'].errorbar(range(5), *spreads_by(some, 'setting', 'fell')[1:], color=color,
                             label=f'{width} features', **POINTS)
    axes['map'].set_xticks(range(5), DISTANCES)
    for name, ax in axes.items():
        frame(ax, *PANELS[name])
        names(ax)
    return figure


def main(cfg):
    """Runs the seeds that the table lacks, prints means and claims, draws; returns what failed."""
    path, seeds = table_and_seeds(cfg)
    rows = complete(path, seeds, run_seed)
    for columns in (NUMBERS[:3], NUMBERS[3:5], NUMBERS[5:]):
        some = [row for row in rows if row[columns[0]] != '']
        show_means(some, ('setting', 'method', 'step'), columns)
    failed = show_claims(CHECKS, by_seed(rows, 'setting', 'method', 'step'), cfg.quick)
    show_picture(cfg, path, lambda: draw(rows))
    return failed


if __name__ == '__main__':
    run_cli(main, Config)
