"""
Trains a small byte-level BPE vocabulary and writes it in tiktoken's two-column format.

Does not encode: tiktoken does, from the file written here, with GPT-2's split pattern. Made for
small texts: it finds the best merge by looking at all pairs, with no priority queue.
"""
import base64, re, unicodedata
from collections import Counter

from data.rows import write_text
from data.text import load_tokenizer, tokenizer_text
from prefgpt import POLICIES, UserError, load_checkpoint

# data.text.SPLIT_PATTERN for the standard library's re, which has no \p{L} and \p{N}: word_pieces
# first spells every letter, number and space beyond ASCII as an ASCII one
SPLIT_ASCII = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+"
                         r'|\s+(?!\S)|\s', re.ASCII)


def word_pieces(text):
    """
    Cuts text as data.text.SPLIT_PATTERN does: "so it's 12." -> ["so", " it", "'s", " 12", "."].

    Nothing is lost: the pieces joined are the text again.
    """
    shape = text if text.isascii() else ''.join(ascii_shape(c) for c in text)
    return [text[match.start():match.end()] for match in SPLIT_ASCII.finditer(shape)]


def ascii_shape(character):
    """Returns an ASCII character of the same class: letter, number, space or other."""
    if character.isascii():
        return character
    if character.isspace():
        return '\t'  # not " ": only the real space may be glued to the word after it
    return {'L': 'A', 'N': '0'}.get(unicodedata.category(character)[0], '#')


def train_bpe(texts, vocab_size):
    """
    Learns byte-pair merges from strings; returns a dict token (bytes) -> rank.

    The 256 bytes have ranks 0 to 255, each merge takes the next one, and the last id, vocab_size
    - 1, is left for EOS. Fewer tokens come back when every word of a small text is one already.
    """
    if vocab_size < 257:
        raise ValueError(f'vocab_size is {vocab_size}, but 256 bytes and EOS need at least 257')
    ranks = {bytes([value]): value for value in range(256)}
    counted = Counter(piece for text in texts for piece in word_pieces(text))
    words = [[bytes([value]) for value in piece.encode()] for piece in counted]
    times = list(counted.values())
    # A pair is named by its joined bytes, because that is how tiktoken looks merges up
    counts = Counter()  # joined pair -> how often it occurs
    places = {}         # joined pair -> numbers of the words it has occurred in
    for number, word in enumerate(words):
        count_pairs(word, number, times[number], counts, places)
    while len(ranks) < vocab_size - 1 and counts:
        most = max(counts.values())
        best = max(pair for pair, count in counts.items() if count == most)  # the larger bytes
        ranks.setdefault(best, len(ranks))
        for number in places.pop(best):
            count_pairs(words[number], number, -times[number], counts, places)
            words[number] = merge(words[number], best)
            count_pairs(words[number], number, times[number], counts, places)
    return ranks


def count_pairs(word, number, change, counts, places):
    """Adds change to the count of each pair of neighbours in the word; drops what falls to 0."""
    for left, right in zip(word, word[1:]):
        counts[left + right] += change
        if counts[left + right] == 0:
            del counts[left + right]
        if change > 0:
            places.setdefault(left + right, set()).add(number)


def merge(word, token):
    """Joins, from left to right, neighbours that make up token: [a, b, c], ab -> [ab, c]."""
    merged = []
    for part in word:
        if merged and merged[-1] + part == token:
            merged[-1] = token
        else:
            merged.append(part)
    return merged


def write_tiktoken(path, ranks):
    """Writes one "base64 rank" line per token, in the order of the dict."""
    write_text(path, ''.join(f'{base64.b64encode(token).decode()} {rank}\n'
                             for token, rank in ranks.items()))


def find_tokenizer(where):
    """
    Returns the text of a tokenizer, 'gpt2', a NAME.tiktoken or a run's, and the run's checkpoint or
    None. Of a number, the size of a BPE yet to be trained, the text is ''.
    """
    if where == 'gpt2' or where.endswith('.tiktoken'):
        return tokenizer_text(load_tokenizer(where)), None
    if not where.isdecimal():
        saved = load_checkpoint(where, (*POLICIES, 'rm'))
        return saved['tokenizer'], saved
    if int(where) < 257:
        raise UserError(f'--tokenizer={where}: 256 bytes and EOS need at least 257')
    return '', None


def write_tokenizer(out, name, texts, vocab_size):
    """Trains a BPE for a data folder and writes it as NAME.tiktoken, and `tokenizer`."""
    write_tiktoken(out / f'{name}.tiktoken', train_bpe(texts, vocab_size))
    write_text(out / 'tokenizer', f'{name}.tiktoken\n')


def take_tokenizer(out, text):
    """Writes the text of a .tiktoken file, or 'gpt2', as a data folder's tokenizer."""
    if text != 'gpt2':
        write_text(out / 'own.tiktoken', text)
    write_text(out / 'tokenizer', 'gpt2\n' if text == 'gpt2' else 'own.tiktoken\n')
