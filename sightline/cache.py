"""Keys and values of the tokens already read, so that writing the next one reads only that one.

Knows nothing of the layers that fill it.
"""

from torch import Tensor


class Cache:
    """The past of one decoding run: for each layer, keys and values of at most `capacity` tokens.

    Every layer appends the same new tokens, then the owner calls `advance` once. Memory is taken at the first
    append and never moves: 2 * num_layers * batch * groups * capacity * width numbers.

    >>> import torch
    >>> cache = Cache(num_layers=1, batch=1, capacity=8)
    >>> keys, values = cache.append(0, torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    >>> cache.advance(3)
    >>> keys, values = cache.append(0, torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
    >>> keys.shape
    torch.Size([1, 2, 4, 4])
    """

    def __init__(self, num_layers: int, *, batch: int, capacity: int) -> None:
        if num_layers < 1 or batch < 1 or capacity < 1:
            raise ValueError(
                f"Cache: num_layers, batch and capacity must be at least 1, got {num_layers}, {batch} and {capacity}"
            )
        self.batch = batch
        self.capacity = capacity
        self.length = 0
        """Tokens that every layer holds."""
        self.recent: Tensor | None = None
        """The last tokens read (batch tokens), for a model that looks at runs of them."""
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' (batch groups tokens width) of one layer; return those of all tokens so far.

        Raises: ValueError beyond the capacity, for another batch, or for tensors that need a gradient.
        """
        if key.requires_grad or value.requires_grad:
            raise ValueError("Cache: it keeps no gradients; call the model under torch.no_grad()")
        stop = self.length + key.shape[-2]
        stored = self.room(layer, len(key), key.shape[-2])
        if stored is None:
            stored = (self._empty(key), self._empty(value))
            self._layers[layer] = stored
        keys, values = stored
        keys[:, :, self.length : stop] = key
        values[:, :, self.length : stop] = value
        return keys[:, :, :stop], values[:, :, :stop]

    def room(self, layer: int, batch: int, tokens: int) -> tuple[Tensor, Tensor] | None:
        """Where one layer's keys and values lie, (batch groups capacity width), for who puts the new tokens' there.

        None before the first `append`. Raises: ValueError beyond the capacity, or for another batch.
        """
        if batch != self.batch:
            raise ValueError(f"Cache: built for a batch of {self.batch}, got {batch}; make a new one")
        if self.length + tokens > self.capacity:
            raise ValueError(
                f"Cache: {self.length} tokens and {tokens} more are beyond its capacity of {self.capacity}; "
                "clear it and read the newest part again"
            )
        return self._layers[layer]

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens so far of one layer; nothing is stored."""
        stored = self._layers[layer]
        assert stored is not None, "nothing was appended"
        return stored[0][:, :, : self.length], stored[1][:, :, : self.length]

    def reorder(self, rows: Tensor) -> None:
        """Sequence i becomes a copy of what sequence `rows[i]` was, as beams do that live on and die."""
        for stored in self._layers:
            for tensor in stored or ():
                tensor[:, :, : self.length] = tensor[rows, :, : self.length]
        self.recent = None if self.recent is None else self.recent[rows]

    def advance(self, tokens: int) -> None:
        """Count `tokens` new tokens, once all layers have appended them."""
        self.length += tokens

    def clear(self) -> None:
        """Forget all tokens; the memory stays."""
        self.length = 0
        self.recent = None

    def _empty(self, new: Tensor) -> Tensor:
        batch, groups, _, width = new.shape
        return new.new_empty(batch, groups, self.capacity, width)
