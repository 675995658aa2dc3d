"""
Defines the toy code contest: a stack machine, and the functions that programs must compute.

A problem is a hidden function f from the digits to the digits. Its prompt shows f at four inputs,
always the same, and a response is a program in postfix order, one character per symbol:

    x           push the input              0 ... 9     push a digit
    + - *       of the two topmost values, modulo 10    M   the larger of the two

    prompt "5804>" is f(0) = 5, f(3) = 8, f(5) = 0, f(9) = 4;  "x5+" solves it: f(x) = x + 5

The functions are all those that one operation (introductory), two (interview) or three
(competition) out of +, - and M can make of x and the digits, and that fewer cannot make; constants
are left out. Only the machine knows multiplication: "x1*" is a long way of saying "x".

Several functions agree at the four inputs that a prompt shows. A prompt means the one that needs
the fewest operations, and among equally simple ones the first in a fixed shuffle: to guess the
simplest function that fits is often, but not always, correct. Nothing in this file is random.
"""
from itertools import product

from data.rows import shuffle

PUBLIC = (0, 3, 5, 9)       # the inputs whose outputs the prompt shows
HIDDEN = (1, 2, 4, 6, 7, 8)     # the inputs of the hidden tests
LONGEST = 11                # symbols of a program: three operations, written out at length
LEVELS = ('introductory', 'interview', 'competition')       # functions of 1, 2 and 3 operations
OPERATIONS = {
    '+': lambda a, b: (a + b) % 10,
    '-': lambda a, b: (a - b) % 10,
    '*': lambda a, b: a * b % 10,
    'M': max,
}
SYMBOLS = 'x0123456789' + ''.join(OPERATIONS)
ASKED = '+-M'               # the operations that functions are made of
LEAVES = {tuple(range(10)): 'x', **{(digit,) * 10: str(digit) for digit in range(10)}}


def run(program, x):
    """
    Returns the digit that a program leaves on the stack for input x; None if it is invalid.

    It is invalid, for every x, if it has more than LONGEST symbols, an unknown symbol or an
    operation without two values, or does not leave exactly one value.
    """
    if len(program) > LONGEST:
        return None
    stack = []
    for symbol in program:
        if symbol == 'x':
            stack.append(x)
        elif symbol in '0123456789':
            stack.append(int(symbol))
        elif symbol in OPERATIONS and len(stack) > 1:
            second, first = stack.pop(), stack.pop()
            stack.append(OPERATIONS[symbol](first, second))
        else:
            return None
    return stack[0] if len(stack) == 1 else None


def enumerate_functions():
    """
    Returns all functions (tuples of 10 outputs) by level, and the shortest ways to make each.

    That is three lists of functions, and a dict function -> list of (operation, first, second),
    where first and second are functions that need fewer operations.
    """
    by_operations, ways = [list(LEAVES)], {leaf: [] for leaf in LEAVES}
    for number in range(1, len(LEVELS) + 1):
        new = {}
        for i in range(number):         # i operations in the first operand, the rest in the second
            rest = by_operations[number - 1 - i]
            for first, second, operation in product(by_operations[i], rest, ASKED):
                function = tuple(map(OPERATIONS[operation], first, second))
                if function not in ways:
                    new.setdefault(function, []).append((operation, first, second))
        by_operations.append(list(new))
        ways.update(new)
    return by_operations[1:], ways


def show(function):
    """Returns the prompt of a function: its outputs at the public inputs."""
    return ''.join(str(function[x]) for x in PUBLIC) + '>'


def choose_functions(levels):
    """Returns a dict prompt -> (the function that it means, the name of its level)."""
    problems = {}
    for level, functions in zip(LEVELS, levels):
        for function in shuffle(functions):
            problems.setdefault(show(function), (function, level))
    return problems


FUNCTIONS, WAYS = enumerate_functions()
PROBLEMS = choose_functions(FUNCTIONS)
