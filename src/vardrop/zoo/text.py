"""Texts as token ids: sentences to classify, and running text to predict character by character."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from vardrop.errors import DataError

VOCABULARY = 20_000
"""Ids of words: 0 fills up, 1 is any word that is not among the most frequent ones."""

LONGEST = 200
CHARACTERS = 100
FILLER, UNKNOWN = 0, 1


def classified(train: Sequence[str], *others: Sequence[str]) -> tuple[Tensor, ...]:
    """Texts as ids of their words, int64 ``(N, T)``, filled up on the left so that the last word stands last.

    Words are what stands between blanks, in small letters; the vocabulary is that of the training texts. T is the
    length of the longest training text, at most 200; of longer ones the first words count.

    >>> from vardrop.zoo.text import classified
    >>> classified(["a b a", "a"], ["c a"])[1]
    tensor([[0, 1, 2]])
    """
    words = [text.lower().split() for text in train]
    counts = Counter(word for text in words for word in text)
    common = sorted(counts, key=lambda word: (-counts[word], word))[: VOCABULARY - 2]
    ids = {word: index for index, word in enumerate(common, start=2)}
    length = min(LONGEST, max(1, *(len(text) for text in words)))

    def numbered(texts: Sequence[list[str]]) -> Tensor:
        rows = [[ids.get(word, UNKNOWN) for word in text[:length]] for text in texts]
        return torch.tensor([[FILLER] * (length - len(row)) + row for row in rows], dtype=torch.int64)

    return numbered(words), *(numbered([text.lower().split() for text in texts]) for texts in others)


def running(name: str, **parts: Sequence[str]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Lines of text as stretches of 100 characters and, as labels, the characters that follow each: ``(N, 100)`` twice.

    The end of a line is a character. Where the training text has its characters set apart by blanks, as prepared
    corpora do, the blanks do not count. The stretches follow on one another; what is left at the end falls away. The
    first of the `parts` is the training text.

    Raises:
        DataError: another text holds a character that the training text lacks, or there are fewer than 101.

    >>> from vardrop.zoo.text import running
    >>> (x, y), _ = running("mine", training=["to be or not to be"] * 20, test=["be"] * 40)
    >>> x.shape, bool((x[:, 1:] == y[:, :-1]).all())
    (torch.Size([3, 100]), True)
    """
    train = next(iter(parts.values()))
    apart = all(len(token) == 1 for line in train for token in line.split())
    known: dict[str, int] = {}

    def numbered(lines: Sequence[str], part: str) -> tuple[Tensor, Tensor]:
        text = "".join(("".join(line.split()) if apart else line) + "\n" for line in lines)
        if not known:
            known.update({character: index for index, character in enumerate(sorted(set(text)))})
        strange = sorted(set(text) - set(known))
        if strange:
            raise DataError(f"{part} text of {name!r} holds {strange[0]!r}, which the training text does not")
        count = (len(text) - 1) // CHARACTERS
        if count < 1:
            raise DataError(f"{part} text of {name!r}: {len(text)} characters; must be at least {CHARACTERS + 1}")
        ids = torch.tensor([known[character] for character in text[: count * CHARACTERS + 1]])
        return ids[:-1].view(count, CHARACTERS), ids[1:].view(count, CHARACTERS)

    return tuple(numbered(lines, part) for part, lines in parts.items())
