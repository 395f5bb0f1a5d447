"""What the last few tokens mean together, looked up instead of computed. Knows nothing of attention.

The 66 characters of a play make 4,356 pairs, and a table tells what follows a pair for the price of a sum, where a
Transformer must first learn to look one token back.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A prime, so that the number of a long run can be kept small; products of two such numbers fit 64 bits.
_PRIME = 2**31 - 1
_SCRAMBLE = 1_540_483_477


class Ngrams(nn.Module):
    """A trained vector for each run of the last 2, 3, .. `longest` tokens, summed: to add to embeddings.

        output[i] = sum over n of table_n[row(tokens[i - n + 1 .. i])]

    A table has `rows` rows, or fewer where there are fewer different runs: then each has a row of its own, otherwise
    runs share rows by a hash. Before the first token stand tokens of a kind of their own. Vectors start at zero.

    Source: the hashed n-gram embeddings of Pagnoni et al. 2024, Byte Latent Transformer.

    >>> ngrams = Ngrams(vocabulary=65, d_model=8, longest=3)
    >>> [len(table.weight) for table in ngrams.tables]
    [4356, 32768]
    >>> ngrams(torch.tensor([[5, 6, 7]])).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, vocabulary: int, d_model: int, *, longest: int, rows: int = 1 << 15) -> None:
        super().__init__()
        self.base = vocabulary + 1  # 0 is what stands before the first token
        self.longest = longest
        self.sizes = [min(rows, self.base**n) for n in range(2, longest + 1)]
        self.tables = nn.ModuleList(nn.Embedding(size, d_model) for size in self.sizes)
        self.forget()

    @torch.no_grad()
    def forget(self) -> None:
        """Sets every vector to zero."""
        for parameter in self.parameters():
            parameter.zero_()

    def forward(self, tokens: Tensor, past: Tensor | None = None) -> Tensor:
        """(batch tokens d_model); `past` holds tokens that came before, `longest` - 1 of them at least, or all."""
        total = torch.zeros((), device=tokens.device)
        for table, rows in zip(self.tables, self.rows(tokens, past), strict=True):
            total = total + table(rows)
        return total

    def rows(self, tokens: Tensor, past: Tensor | None = None) -> list[Tensor]:
        """For each table the row that a token looks up (batch tokens)."""
        context = self.longest - 1
        known = (tokens if past is None else torch.cat((past[:, -context:], tokens), dim=1)) + 1
        known = F.pad(known, (context + tokens.shape[1] - known.shape[1], 0))
        number, found = known[:, context:], []
        for n, rows in enumerate(self.sizes, start=1):
            number = (number + known[:, context - n : known.shape[1] - n] * pow(self.base, n, _PRIME)) % _PRIME
            own = rows == self.base ** (n + 1)
            found.append(number if own else number * _SCRAMBLE % _PRIME % rows)
        return found
